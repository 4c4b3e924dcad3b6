package sim

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"time"

	"fsbus/bus/matrix"
)

// NotaryServer is the number of the server that Config.Notary makes a notary.
const NotaryServer = 0

// keyVersion is the second part of every server's key id, keyID.
const (
	keyVersion = "sim"
	keyID      = "ed25519:" + keyVersion
)

// keyLife is how long a published key is valid.
const keyLife = 24 * time.Hour

// OversizedKeys is how many bytes too many an answer of Oversized has: more
// than a Synapse reads at all.
const OversizedKeys = 101 << 20

// KeyFault is what is wrong with answers that hold keys, of GET key/v2/server and
// of POST key/v2/query. The zero value is nothing.
type KeyFault uint8

// The faults. What the notary adds to an object is always right: it is the object
// that is bad.
const (
	NoKeyFault   KeyFault = iota
	WrongName             // the object claims to be another server's, and is signed as such with this one's key
	Swapped               // another server's object, a good one, in place of the one asked for
	BadSignature          // the server's own signature is not right
	Oversized             // OversizedKeys more, in the member unsigned
	CutKeys               // the connection is closed in the middle of the body
	WrongType             // Content-Type: text/html
	NumKeyFaults
)

var keyFaultNames = [NumKeyFaults]string{"none", "wrong-name", "swapped", "bad-signature", "oversized", "cut", "wrong-type"}

// String returns the name that flags use.
func (f KeyFault) String() string {
	if f >= NumKeyFaults {
		return "invalid"
	}
	return keyFaultNames[f]
}

// ParseKeyFault is the inverse of String.
func ParseKeyFault(s string) (KeyFault, error) {
	for f, name := range keyFaultNames {
		if name == s {
			return KeyFault(f), nil
		}
	}
	return 0, fmt.Errorf("%q is not a fault of keys: want one of %v", s, keyFaultNames)
}

// SetKeyFault changes what is wrong with keys from now on.
func (w *World) SetKeyFault(f KeyFault) { w.keyFault.Store(uint32(f)) }

// keyServer is S2S "Publishing Keys".
func keyServer(s *server, _ *request) answer {
	fault := KeyFault(s.world.keyFault.Load())
	return faultyKeys(answer{status: http.StatusOK, body: s.keysFor(fault)}, fault)
}

// keyQuery is S2S "Querying Keys Through Another Server". The notary knows the
// keys of all servers, alive or not; other servers answer what concerns
// themselves. Each object is signed by its server and by the one that answers.
func keyQuery(s *server, r *request) answer {
	var query struct {
		ServerKeys map[string]json.RawMessage `json:"server_keys"`
	}
	if json.Unmarshal(r.body, &query) != nil {
		return notJSON()
	}
	w := s.world
	notary := w.config.Notary && s.index == NotaryServer
	fault := KeyFault(w.keyFault.Load())
	keys := []json.RawMessage{}
	for name := range query.ServerKeys {
		i, known := w.indexOf(name)
		if !known || !notary && i != s.index {
			continue
		}
		keys = append(keys, s.countersigned(w.servers[i], fault))
	}
	a := ok(object{"server_keys": keys})
	if notary {
		a.delay = w.config.NotaryLatency
	}
	return faultyKeys(a, fault)
}

// publicKeys is the server's signed key object. It stays the same until half of
// its life is over.
func (s *server) publicKeys() []byte {
	key := s.signingKey()
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.republish) {
		return s.published
	}
	s.published = serverKeys(s.name, now, key)
	s.notarised = nil
	s.republish = now.Add(keyLife / 2)
	return s.published
}

func serverKeys(name matrix.ServerName, now time.Time, key matrix.SigningKey) []byte {
	body, err := matrix.ServerKeys(string(name), matrix.At(now.Add(keyLife)), []matrix.SigningKey{key}, nil)
	if err != nil {
		panic(fmt.Sprintf("sim: keys of %s: %v", name, err))
	}
	return body
}

// keysFor is publicKeys with a fault.
func (s *server) keysFor(fault KeyFault) []byte {
	other := s.world.servers[(s.index+1)%len(s.world.servers)]
	switch fault {
	case WrongName:
		return serverKeys(other.name, time.Now(), s.signingKey())
	case Swapped:
		return other.publicKeys()
	case BadSignature:
		return forge(s.publicKeys(), string(s.name))
	}
	return s.publicKeys()
}

// forge spoils the signature of a server. What it returns looks well.
func forge(keys []byte, name string) []byte {
	var members map[string]json.RawMessage
	var signatures map[string]map[string]string
	err := json.Unmarshal(keys, &members)
	if err == nil {
		err = json.Unmarshal(members["signatures"], &signatures)
	}
	if err != nil {
		panic(fmt.Sprintf("sim: keys of %s: %v", name, err))
	}
	good := []byte(signatures[name][keyID])
	if good[0] == 'A' {
		good[0] = 'B'
	} else {
		good[0] = 'A'
	}
	signatures[name][keyID] = string(good)
	text, err := json.Marshal(signatures)
	if err == nil {
		members["signatures"] = text
		text, err = json.Marshal(members)
	}
	if err != nil {
		panic(fmt.Sprintf("sim: keys of %s: %v", name, err))
	}
	return text
}

// countersigned returns the keys of another server with the signature of s as
// well. Those of the notary are kept, since it is asked for all.
func (s *server) countersigned(of *server, fault KeyFault) []byte {
	keys := of.keysFor(fault)
	if s == of && fault == NoKeyFault {
		return keys
	}
	keep := fault == NoKeyFault && s.index == NotaryServer
	if keep {
		of.mu.Lock()
		kept := of.notarised
		of.mu.Unlock()
		if kept != nil {
			return kept
		}
	}
	signed, err := s.signingKey().Sign(keys, string(s.name))
	if err != nil {
		panic(fmt.Sprintf("sim: countersign keys of %s: %v", of.name, err))
	}
	if keep {
		of.mu.Lock()
		of.notarised = signed
		of.mu.Unlock()
	}
	return signed
}

// faultyKeys gives an answer, a JSON object, those faults that are not in its keys.
func faultyKeys(a answer, fault KeyFault) answer {
	switch fault {
	case Oversized:
		// No signature covers the member unsigned.
		a.head, a.body = []byte(`{"unsigned":{"padding":"`), append([]byte(`"},`), a.body[1:]...)
		a.stream, a.streamed = padding(OversizedKeys), OversizedKeys
	case CutKeys:
		a.cut = true
	case WrongType:
		a.contentType = "text/html"
	}
	return a
}

// padding yields so many bytes that need no escape in JSON.
func padding(size int64) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for size > 0 {
			b := filler32[:min(size, int64(len(filler32)))]
			if !yield(b) {
				return
			}
			size -= int64(len(b))
		}
	}
}

package matrix

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Bounds on the keys that a server publishes.
const (
	// MaxServerKeys is the size in bytes of the largest object that is looked at.
	// Real ones have some hundred bytes.
	MaxServerKeys = 64 << 10
	// MaxKeyValidity is how long after it was fetched an object may be used for
	// new signatures, however long it says (S2S "Publishing Keys",
	// valid_until_ts).
	MaxKeyValidity = 7 * 24 * time.Hour

	// maxKeys is how many keys of each sort an object may have, and how many
	// servers may have signed it.
	maxKeys = 64
	// maxKeyID is the length in bytes of the longest key id. It is that of the
	// other identifiers of Matrix (appendices, "Common Identifier Format").
	maxKeyID = 255
	// maxKeyDepth is how deep an object may nest. What is specified nests 3 deep.
	// An object goes into an answer beside others, and one that is too deep for
	// the reader would cost it all of them.
	maxKeyDepth = 32
)

// ErrServerKeys is what errors about the keys that a server publishes, and about
// a notary's answer, wrap.
var ErrServerKeys = errors.New("invalid server keys")

// ServerKeyObject is what a server says of its signing keys (S2S "Publishing
// Keys"). One that came from CheckServerKeys has a valid signature of the server
// itself. It shares no memory with what it was read from. The zero value has no
// keys.
type ServerKeyObject struct {
	// Server is whose keys these are.
	Server ServerName
	// ValidUntil is until when the server means to sign with Verify, Unix time in
	// milliseconds. For how long it may be believed depends on when it said so,
	// see MaxKeyValidity.
	ValidUntil Timestamp
	// Verify is the keys it signs with, by key id, without those that are in Old,
	// too. All are of ed25519.
	Verify map[string]ed25519.PublicKey
	// Old is the keys it has ceased to sign with, by key id.
	Old map[string]OldKey

	signers []string // sorted
}

// CheckServerKeys reads the keys of server from the JSON object that it
// publishes. The object must be signed by one of its own verify_keys at least,
// and each signature of these that it has must be right. Keys of other
// algorithms than ed25519 are passed over, as are members that are not
// specified.
//
// A Synapse that meets one object which it cannot process drops all that came
// with it (crypto/keyring.py). So this refuses whatever would make it fail, in
// its JSON reader, its database or libsodium, even where the specification or
// Go's ed25519 does not mind. Of members with equal names the last counts. The
// error wraps ErrServerKeys and quotes nothing of the object.
func CheckServerKeys(object []byte, server ServerName) (*ServerKeyObject, error) {
	return readServerKeys(object, server, true)
}

// KnownServerKeys is CheckServerKeys for an object that passed it before: the
// signature, which is most of the work, is not looked at again.
func KnownServerKeys(object []byte, server ServerName) (*ServerKeyObject, error) {
	return readServerKeys(object, server, false)
}

// What readServerKeys may find in more than one place.
var (
	errNoObject = errors.New("not an object")
	errTooMany  = fmt.Errorf("more than %d", maxKeys)
	errKeyID    = errors.New("an impossible key id")
	errTime     = errors.New("not a time in milliseconds")
	errNoKey    = errors.New("not a key of 32 bytes in base64")
	errWeakKey  = errors.New("a key of small order")
)

func readServerKeys(object []byte, server ServerName, verify bool) (*ServerKeyObject, error) {
	o, err := parseServerKeys(object, server, verify)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrServerKeys, err)
	}
	return o, nil
}

func parseServerKeys(object []byte, server ServerName, verify bool) (*ServerKeyObject, error) {
	canonical, err := canonicalServerKeys(object)
	if err != nil {
		return nil, err
	}
	cut, err := cutSigned(canonical)
	if err != nil {
		return nil, err
	}
	o := &ServerKeyObject{
		Server: server,
		Verify: make(map[string]ed25519.PublicKey),
		Old:    make(map[string]OldKey),
	}
	var named, until bool
	err = eachCanonical(cut.signed, func(name, value []byte) error {
		switch string(name) {
		case "server_name":
			if named = plainText(value) == string(server); !named {
				return errors.New("server_name is another")
			}
		case "valid_until_ts":
			var ts int64
			if ts, until = jsonInteger(value); !until || ts < 0 {
				return fmt.Errorf("valid_until_ts: %w", errTime)
			}
			o.ValidUntil = Timestamp(ts)
		case "verify_keys":
			if err := o.readVerify(value); err != nil {
				return fmt.Errorf("verify_keys: %w", err)
			}
		case "old_verify_keys":
			if err := o.readOld(value); err != nil {
				return fmt.Errorf("old_verify_keys: %w", err)
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case !named:
		return nil, errors.New("no server_name")
	case !until:
		return nil, errors.New("no valid_until_ts")
	case len(o.Verify) == 0:
		return nil, errors.New("no key in verify_keys")
	}
	if err := o.readSignatures(cut, verify); err != nil {
		return nil, fmt.Errorf("signatures: %w", err)
	}
	for id := range o.Old {
		// To a Synapse such a key has expired.
		delete(o.Verify, id)
	}
	return o, nil
}

// canonicalServerKeys returns the object in canonical form. Its numbers must be
// in that form already: Python would write 1e3 as 1000.0, and the signature would
// fit only what this here makes of it.
func canonicalServerKeys(object []byte) ([]byte, error) {
	if len(object) > MaxServerKeys {
		return nil, fmt.Errorf("%d bytes, at most %d", len(object), MaxServerKeys)
	}
	c := canonicalizer{
		jsonReader: jsonReader{src: object},
		dst:        make([]byte, 0, len(object)),
		numbers:    RawNumbers,
	}
	if err := c.value(MaxJSONDepth - maxKeyDepth); err != nil {
		return nil, err
	}
	if c.space(); c.pos < len(object) {
		return nil, c.syntax("more after the object")
	}
	strict, err := CanonicalJSON(c.dst)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(strict, c.dst) {
		return nil, fmt.Errorf("%w: or not written as one", ErrJSONNumber)
	}
	return c.dst, nil
}

func (o *ServerKeyObject) readVerify(keys []byte) error {
	return eachKey(keys, func(id string, key []byte) error {
		public, _, err := readPublicKey(key)
		if err == nil {
			o.Verify[id] = public
		}
		return err
	})
}

func (o *ServerKeyObject) readOld(keys []byte) error {
	return eachKey(keys, func(id string, key []byte) error {
		public, expiry, err := readPublicKey(key)
		if err != nil {
			return err
		}
		expired, ok := jsonInteger(expiry)
		if !ok || expired < 0 {
			return fmt.Errorf("expired_ts: %w", errTime)
		}
		o.Old[id] = OldKey{ID: id, Public: public, Expired: Timestamp(expired)}
		return nil
	})
}

// eachKey calls each with the ed25519 keys of a map by key id.
func eachKey(keys []byte, each func(id string, key []byte) error) error {
	n := 0
	return eachCanonical(keys, func(id, key []byte) error {
		if n++; n > maxKeys {
			return errTooMany
		}
		if !bytes.HasPrefix(id, []byte(keyAlgorithm+":")) {
			return nil
		}
		if !isKeyID(id) {
			return errKeyID
		}
		return each(string(id), key)
	})
}

// isKeyID reports whether a name, as written in canonical JSON, may be a key id.
// A database index need not take every other name.
func isKeyID(name []byte) bool {
	for _, b := range name {
		if b <= ' ' || b >= 0x7f || b == '"' || b == '\\' {
			return false
		}
	}
	return len(name) > 0 && len(name) <= maxKeyID
}

// readPublicKey reads {"key": base64, "expired_ts": expiry}, both in any order.
func readPublicKey(value []byte) (key ed25519.PublicKey, expiry []byte, err error) {
	err = eachCanonical(value, func(name, value []byte) error {
		switch string(name) {
		case "key":
			key = decodeExactly(value, ed25519.PublicKeySize)
		case "expired_ts":
			expiry = value
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, nil, err
	case key == nil:
		return nil, nil, errNoKey
	case isWeakPoint(key):
		return nil, nil, errWeakKey
	}
	return key, expiry, nil
}

// decodeExactly decodes a JSON string of so many bytes in base64; nil if it is
// anything else. The string must not have line breaks, over which Go's decoder
// steps but Python's may stumble; in canonical JSON they are escaped.
func decodeExactly(value []byte, size int) []byte {
	b, err := decodeBase64(plainText(value))
	if err != nil || len(b) != size {
		return nil
	}
	return b
}

// readSignatures notes who signed and checks, if verify is set, what the server
// itself signed with the keys in Verify.
func (o *ServerKeyObject) readSignatures(cut signedObject, verify bool) error {
	if cut.signatures == nil {
		return errors.New("none")
	}
	verified := !verify
	servers := 0
	err := eachCanonical(cut.signatures, func(server, ofServer []byte) error {
		if servers++; servers > maxKeys {
			return errTooMany
		}
		ids := 0
		err := eachCanonical(ofServer, func(id, value []byte) error {
			if ids++; ids > maxKeys {
				return errTooMany
			}
			if value[0] != '"' {
				return errors.New("not a string")
			}
			public := o.Verify[string(id)]
			if !verify || string(server) != string(o.Server) || public == nil {
				return nil
			}
			sig := decodeExactly(value, ed25519.SignatureSize)
			if sig == nil || isWeakPoint(sig[:32]) || !ed25519.Verify(public, cut.signed, sig) {
				return ErrSignature
			}
			verified = true
			return nil
		})
		if ids > 0 && bytes.IndexByte(server, '\\') < 0 {
			o.signers = append(o.signers, string(server))
		}
		return err
	})
	if err != nil {
		return err
	}
	if !verified {
		return fmt.Errorf("%w: none by a key of verify_keys", ErrSignature)
	}
	return nil
}

// eachCanonical calls each with the names and the values of the members of a
// canonical object until it returns an error. The names are without their
// quotes, and still escaped.
func eachCanonical(object []byte, each func(name, value []byte) error) error {
	if object[0] != '{' {
		return errNoObject
	}
	for i := 1; object[i] != '}'; {
		start := i
		i = skipCanonical(object, i)
		name := object[start+1 : i-1]
		value := i + 1 // after the colon
		i = skipCanonical(object, value)
		if err := each(name, object[value:i:i]); err != nil {
			return err
		}
		if object[i] == ',' {
			i++
		}
	}
	return nil
}

// weakPoints are the points of small order in their encodings without the sign
// bit, but for 0 and 1.
var weakPoints = [...]string{
	unhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
	unhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
	unhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
}

func unhex(s string) string {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic("matrix: " + err.Error())
	}
	return string(b)
}

// isWeakPoint reports whether a public key, or the first half of a signature, is
// a point of small order or not in its one proper encoding. libsodium refuses
// both (crypto_sign_verify_detached), crypto/ed25519 neither: with such a key a
// signature fits any message.
func isWeakPoint(point []byte) bool {
	var y [32]byte
	copy(y[:], point)
	y[31] &= 0x7f
	if strings.Trim(string(y[1:]), "\x00") == "" && y[0] <= 1 {
		return true
	}
	// The field has 2^255-19 elements.
	if y[31] == 0x7f && strings.Trim(string(y[1:31]), "\xff") == "" && y[0] >= 0xed {
		return true
	}
	return slices.Contains(weakPoints[:], string(y[:]))
}

// SignedBy reports whether the object has any signature in the name of server,
// as that of the notary which it was fetched from. Nothing says that such a
// signature is valid unless server is o.Server.
func (o *ServerKeyObject) SignedBy(server ServerName) bool {
	_, ok := slices.BinarySearch(o.signers, string(server))
	return ok
}

// validUntil is until when the object is good for new signatures if it was
// fetched at that time. Its form is one that does not overflow.
func (o *ServerKeyObject) validUntil(fetched Timestamp) Timestamp {
	const longest = Timestamp(MaxKeyValidity / time.Millisecond)
	if fetched < o.ValidUntil-longest {
		return fetched + longest
	}
	return o.ValidUntil
}

// Satisfies reports whether the object, fetched at fetched, is an answer to
// somebody who needs the key keyID for a signature made at minValid (S2S
// "Querying keys through another server", minimum_valid_until_ts); both are Unix
// times in milliseconds. With "" for keyID any key will do.
func (o *ServerKeyObject) Satisfies(keyID string, minValid, fetched Timestamp) bool {
	if _, ok := o.Verify[keyID]; ok || keyID == "" {
		return o.validUntil(fetched) >= minValid
	}
	old, ok := o.Old[keyID]
	return ok && old.Expired >= minValid
}

// RequestKey returns the key keyID if a request that comes at now may be signed
// with it, where the object was fetched at fetched; both are Unix times in
// milliseconds. Old keys are for events only.
func (o *ServerKeyObject) RequestKey(keyID string, now, fetched Timestamp) (ed25519.PublicKey, bool) {
	key, ok := o.Verify[keyID]
	if !ok || o.validUntil(fetched) < now {
		return nil, false
	}
	return key, true
}

// RefreshAt returns when the object, fetched at fetched, should be fetched anew:
// after half of the time for which it is good (S2S "Querying keys through another
// server"). Both are Unix times in milliseconds.
func (o *ServerKeyObject) RefreshAt(fetched Timestamp) Timestamp {
	return fetched + max(o.validUntil(fetched)-fetched, 0)/2
}

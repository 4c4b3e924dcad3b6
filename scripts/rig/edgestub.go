package rig

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
)

// StubConfig says how a Stub answers.
type StubConfig struct {
	Name matrix.ServerName // its own

	// Delay passes before the answer to each transaction, of many at the same time:
	// what a homeserver waits for its database and for other servers.
	Delay time.Duration

	// Busy is what a transaction takes of the one processor that the stub has, as
	// a Synapse process does, so one after the other. BusyEphemeral is the same for
	// those without PDUs. No processor is really used up for it: the machine has
	// few, and they are needed for what is measured.
	Busy, BusyEphemeral time.Duration

	// Keys are the keys of those who may send. If there are any, a request that
	// none of them signed is answered 401.
	Keys map[matrix.ServerName]ed25519.PublicKey

	// ClientAnswer is how many bytes the answer to a client has; 0: none is answered.
	ClientAnswer int
}

// Stub is a homeserver's federation listener: HTTP/1.1 without TLS. It answers
// transactions, each with an answer that no other has, and GET with {}. It
// remembers which transactions it has seen. A homeserver would answer those that
// it knows as before; this one takes them for new, and counts.
type Stub struct {
	Address string // "host:port"

	cfg    StubConfig
	server http.Server
	closed chan struct{}

	mu    sync.Mutex // guards what follows
	stats StubStats
	seen  map[txnName]int
	now   map[string]int // transactions under way, by origin
	free  time.Time      // when the processor has nothing more to do
}

type txnName struct{ origin, id string }

// StubStats is what a Stub has seen since the start or the last Reset.
type StubStats struct {
	Transactions int64         // of all kinds
	Ephemeral    int64         // those without PDUs
	Repeated     int64         // those that had been there before, even before a Reset
	Others       int64         // requests that are no transactions
	Refused      int64         // requests of both that nobody known had signed
	AtOnce       int           // the most transactions of one origin that there were at a time
	Busy         time.Duration // of the processor, until now
}

// StartStub starts a stub on a free address of loopback. The caller closes it.
func StartStub(c StubConfig) (*Stub, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("rig: stub: %w", err)
	}
	s := &Stub{Address: l.Addr().String(), cfg: c, closed: make(chan struct{}), seen: make(map[txnName]int), now: make(map[string]int)}
	s.server.Handler = s
	s.server.ErrorLog = log.New(io.Discard, "", 0) // clients may do as they like
	go s.server.Serve(l)                           // until Close
	return s, nil
}

// Close ends all connections. It is called once.
func (s *Stub) Close() {
	close(s.closed)
	s.server.Close()
}

// Stats returns what has been seen.
func (s *Stub) Stats() StubStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Busy -= max(0, time.Until(s.free)) // what it has yet to do
	return st
}

// Reset makes the statistics zero. Transactions are still known.
func (s *Stub) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats = StubStats{}
}

// Seen returns how often a transaction has come.
func (s *Stub) Seen(origin matrix.ServerName, id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[txnName{string(origin), id}]
}

const sendPrefix = "/_matrix/federation/v1/send/"

// ServeHTTP implements http.Handler.
func (s *Stub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // who sends it has gone
	}
	x, err := matrix.ParseXMatrix(r.Header.Get("Authorization"))
	signed := err == nil
	if len(s.cfg.Keys) > 0 && signed {
		if x.Destination == "" {
			x.Destination = string(s.cfg.Name)
		}
		signed = matrix.VerifyRequest(s.cfg.Keys[matrix.ServerName(x.Origin)], x, r.Method, r.RequestURI, body) == nil
	}
	id, send := strings.CutPrefix(r.RequestURI, sendPrefix)
	send = send && r.Method == http.MethodPut
	header := w.Header()
	header["Content-Type"] = []string{"application/json"}
	switch {
	case s.cfg.ClientAnswer > 0 && strings.HasPrefix(r.RequestURI, "/_matrix/client/"):
		w.Write(bytes.Repeat([]byte{' '}, s.cfg.ClientAnswer))
	case !signed && (send || len(s.cfg.Keys) > 0):
		s.mu.Lock()
		s.stats.Refused++
		s.mu.Unlock()
		w.WriteHeader(http.StatusUnauthorized)
		w.Write(matrix.ErrorJSON(matrix.MUnauthorized, "the stub: nobody known has signed this"))
	case send:
		w.Write(s.send(txnName{x.Origin, id}, body))
	default:
		s.mu.Lock()
		s.stats.Others++
		s.mu.Unlock()
		w.Write([]byte("{}"))
	}
}

// send takes a transaction and returns its answer.
func (s *Stub) send(name txnName, body []byte) []byte {
	ephemeral := bytes.Contains(body, []byte(`"pdus":[]`))
	busy := s.cfg.Busy
	if ephemeral {
		busy = s.cfg.BusyEphemeral
	}
	until := time.Now()
	s.mu.Lock()
	st := &s.stats
	st.Transactions++
	if ephemeral {
		st.Ephemeral++
	}
	if s.seen[name] > 0 {
		st.Repeated++
	}
	s.seen[name]++
	serial := len(s.seen)*1000 + s.seen[name]
	s.now[name.origin]++
	st.AtOnce = max(st.AtOnce, s.now[name.origin])
	if busy > 0 {
		if s.free.Before(until) {
			s.free = until
		}
		s.free = s.free.Add(busy)
		st.Busy += busy
		until = s.free
	}
	s.mu.Unlock()
	if busy > 0 || s.cfg.Delay > 0 {
		// It goes on if the client leaves, as a homeserver does.
		timer := time.NewTimer(time.Until(until) + s.cfg.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-s.closed:
		}
	}
	answer, err := json.Marshal(map[string]any{"pdus": map[string]any{fmt.Sprintf("$%d:%s", serial, s.cfg.Name): struct{}{}}})
	if err != nil {
		panic(fmt.Sprintf("rig: stub: an answer: %v", err))
	}
	s.mu.Lock()
	if s.now[name.origin]--; s.now[name.origin] == 0 {
		delete(s.now, name.origin)
	}
	s.mu.Unlock()
	return answer
}

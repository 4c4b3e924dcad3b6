package sim

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"fsbus/bus/matrix"
)

// World is a running federation. Its methods may be called concurrently.
type World struct {
	config    Config
	authority *authority
	recorder  *recorder
	servers   []*server
	names     []matrix.ServerName
	hashes    maphash.Seed // of what servers remember
	queue     *queue
	keyFault  atomic.Uint32 // a KeyFault
	http      *http.Server
	running   sync.WaitGroup

	mu      sync.Mutex // serialises Start, SetKind and Close
	started bool
	closed  bool
}

// ErrClosed is returned by SetKind after Close.
var ErrClosed = errors.New("the simulated federation is closed")

// New makes the servers and opens the sockets of all that are not Dead, so that
// no one else can take their port. Connections are accepted from Start on. Close
// must be called also when Start never is.
func New(c Config) (*World, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	kinds, err := c.Shares.assign(c.Servers, c.Seed)
	if err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	if well := slices.Index(kinds, Well); c.Notary && well >= 0 {
		kinds[well], kinds[NotaryServer] = kinds[NotaryServer], kinds[well]
	}
	authority, err := newAuthority(time.Now())
	if err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	w := &World{
		config:    c,
		authority: authority,
		recorder:  newRecorder(),
		servers:   make([]*server, c.Servers),
		names:     make([]matrix.ServerName, c.Servers),
		hashes:    maphash.MakeSeed(),
		queue:     newQueue(),
	}
	w.SetKeyFault(c.KeyFault)
	for i, kind := range kinds {
		w.servers[i] = &server{world: w, index: i}
		w.servers[i].kind.Store(uint32(kind))
	}
	if err := w.listen(); err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	w.http = &http.Server{
		Handler:           w.routes(),
		TLSConfig:         w.tlsConfig(),
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       c.IdleTimeout,
		ErrorLog:          log.New(io.Discard, "", 0), // clients may do as they like
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, serverKey{}, c.(*tls.Conn).NetConn().(*conn).server)
		},
	}
	return w, nil
}

// serverKey is under what a request's context holds its *server.
type serverKey struct{}

// listen opens all sockets, on any port that they all have free if Config names
// none.
func (w *World) listen() error {
	const tries = 10 // when another program has the port on one of our addresses
	for try := 1; ; try++ {
		port := w.config.Port
		if port == 0 {
			var err error
			if port, err = freePort(); err != nil {
				return err
			}
		}
		err := w.listenOn(port)
		if err == nil {
			return nil
		}
		for _, s := range w.servers {
			s.mute()
		}
		if w.config.Port != 0 || try == tries || !errors.Is(err, syscall.EADDRINUSE) {
			return err
		}
	}
}

func (w *World) listenOn(port int) error {
	for i, s := range w.servers {
		s.name = serverName(i, port)
		w.names[i] = s.name
		if s.kindNow() == Dead {
			continue
		}
		if err := s.listen(); err != nil {
			return err
		}
	}
	return nil
}

// freePort returns a port that nothing listens on at the first server's address.
func freePort() (int, error) {
	l, err := net.Listen("tcp4", net.JoinHostPort(address(0).String(), "0"))
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (w *World) tlsConfig() *tls.Config {
	config := &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: w.config.NoTickets,
		NextProtos:             []string{"http/1.1"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return hello.Conn.(*conn).server.tlsCertificate()
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			w.recorder.handshake(state.DidResume)
			return nil
		},
	}
	if w.config.TLS12 {
		config.MaxVersion = tls.VersionTLS12
	}
	if w.config.HTTP2 {
		config.NextProtos = []string{"h2", "http/1.1"}
	}
	return config
}

// Start begins to accept connections. A second call does nothing.
func (w *World) Start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.started || w.closed {
		return
	}
	w.started = true
	w.running.Go(func() {
		w.http.Serve(tls.NewListener(w.queue, w.http.TLSConfig)) // until Close
	})
	for _, s := range w.servers {
		w.serve(s)
	}
}

// serve starts to accept what arrives at the server's socket, if it has one.
func (w *World) serve(s *server) {
	if l := s.listener; l != nil { // written only under w.mu
		w.running.Go(func() { s.accept(l) })
	}
}

// Close closes all sockets and connections and waits until nothing is accepted
// any more. Requests that are being answered are broken off; their handlers may
// end a little later. A second call does nothing.
func (w *World) Close() {
	w.mu.Lock()
	w.closed = true
	w.queue.Close()
	w.http.Close()
	for _, s := range w.servers {
		s.mute()
	}
	w.mu.Unlock()
	w.running.Wait()
}

// Names returns the names of all servers; a server's number is its index. The
// slice must not be changed.
func (w *World) Names() []matrix.ServerName { return w.names }

// NamesOf returns the names of the servers that are of a kind now.
func (w *World) NamesOf(kind Kind) []matrix.ServerName {
	var names []matrix.ServerName
	for _, s := range w.servers {
		if s.kindNow() == kind {
			names = append(names, s.name)
		}
	}
	return names
}

// Kind returns what server i is now.
func (w *World) Kind(i int) Kind { return w.servers[i].kindNow() }

// SetKind changes how server i behaves and closes the connections to it. Dead
// stops it, any other kind revives it. The error is ErrClosed, or why a revived
// server's socket could not be opened; the server then stays as it was.
func (w *World) SetKind(i int, kind Kind) error {
	if kind >= NumKinds {
		return fmt.Errorf("sim: server %d: no kind %d", i, kind)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return ErrClosed
	}
	s := w.servers[i]
	was := s.kindNow()
	if was == Dead && kind != Dead {
		if err := s.listen(); err != nil {
			return fmt.Errorf("sim: revive server %d: %w", i, err)
		}
	}
	s.mu.Lock()
	s.kind.Store(uint32(kind))
	s.limiter = nil
	s.mu.Unlock()
	switch {
	case kind == Dead:
		s.mute()
	case was == Dead:
		if w.started {
			w.serve(s)
		}
	default:
		s.hangUp()
	}
	return nil
}

// CAPEM returns the certificate of the authority that signs for all servers.
func (w *World) CAPEM() []byte { return w.authority.pem }

// SigningKey returns the key with which server i signs, for drivers that send
// requests in its name.
func (w *World) SigningKey(i int) matrix.SigningKey { return w.servers[i].signingKey() }

// Stats returns what has happened since the start or the last Reset.
func (w *World) Stats() Stats { return w.recorder.snapshot() }

// Server returns what server i has seen since the start or the last Reset.
func (w *World) Server(i int) ServerStats { return w.recorder.server(w.servers[i]) }

// Reset makes the statistics zero. Servers still remember what they received, so
// that what comes again is told apart from what is new.
func (w *World) Reset() { w.recorder.reset(w.servers) }

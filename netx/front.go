package netx

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

// Defaults of FrontConfig.
const (
	defaultMaxConns             = 4096             // a storm's 4,000: 8 MiB of heap when all of them wait, without their bodies
	defaultMaxReading           = 64               // about 48 KiB each: two buffers and a stack
	defaultHeaderTimeout        = 10 * time.Second // the client is on this machine
	defaultBodyTimeout          = 30 * time.Second // half of Synapse's 60 s
	defaultBodyRate             = 4 << 10          // bytes a second: a poor mobile connection has ten times as much
	defaultBodyTotal            = 10 * time.Minute
	defaultStallTimeout         = 60 * time.Second // what Synapse itself allows for a body
	defaultSweepInterval        = time.Second
	defaultMaxHeaderBytes       = 16 << 10               // Synapse's are below 1 KiB
	defaultMaxBody        int64 = 200 * 64 << 10         // what a Synapse takes: MAX_REQUEST_SIZE, 200 events of 64 KiB
	defaultLinger               = 500 * time.Millisecond // not configurable
	errorLogInterval            = 30 * time.Second       // between two log lines about bodies that could not be stored
)

// FrontConfig configures a Front. Secret, Spool, Handle and Gone are required.
type FrontConfig struct {
	// Secret is what the homeserver shows in Proxy-Authorization: Bearer.
	Secret []byte

	// MaxConns bounds the accepted connections: those that say nothing, are being read,
	// parked and being answered. Further ones wait in the kernel's accept backlog. Each
	// listener that is served takes one of the places while it waits for a
	// connection; see gate for who gives way. 0 means 4,096. Each needs a file descriptor.
	MaxConns int

	// MaxReading bounds those of them whose request is being read, from its first byte on,
	// or handed over. Each costs buffers. 0 means 64.
	MaxReading int

	// HeaderTimeout bounds the time from accepting a connection until its request's
	// first byte, and from then until its header is complete; such a connection is closed
	// without an answer. 0 means 10 s.
	HeaderTimeout time.Duration

	// BodyTimeout bounds the time from then until the body is complete, with a second more
	// for each 4 KiB that have come. It
	// includes waiting for room in the spool. 0 means 30 s.
	BodyTimeout time.Duration

	// StallTimeout is how long a client may take no byte of its answer, that
	// is: leave a full socket buffer full. 0 means 60 s.
	StallTimeout time.Duration

	// SweepInterval is the time between two looks at all parked connections
	// for clients that went away. 0 means 1 s.
	SweepInterval time.Duration

	// MaxHeaderBytes bounds the request line and the header. 0 means 16 KiB.
	MaxHeaderBytes int

	// MaxBody returns how many bytes a request's body may have; it should stay
	// well below the spool's budgets. It is called in many goroutines at a
	// time. nil means 13,107,200 for all, as Synapse has it.
	MaxBody func(method, target string) int64

	// Own reports whether a request of the usual form, "/path", is for the bus itself,
	// and how many bytes its body may have. Its secret stands in Authorization, as
	// Synapse's replication has it. nil: there is none.
	Own func(method, target string) (maxBody int64, ok bool)

	// Spool takes the bodies.
	Spool *Spool

	// Logger is told of panics and, at most every 30 s, that a connection could
	// not be accepted or a body not be stored. nil discards it.
	Logger *slog.Logger

	// Handle takes over a parked request. It is called in the connection's
	// goroutine, by MaxReading of them at a time, and while it blocks fewer
	// connections are accepted. It may answer at once. A panic in it aborts
	// the connection.
	Handle func(*Inbound)

	// WrongSecret is told of each request without Secret, if it is not nil. It must not
	// block.
	WrongSecret func()

	// Gone is told that the client closed its connection, or its sending half
	// of it, while its request was parked. It is called at most once for a
	// request, after Handle returned, never once Reply, Stream or Abort has
	// been called. The connection is closed by then; the body must still be
	// released. It must not block for long: the next client that goes is
	// noticed after it returns.
	Gone func(*Inbound)
}

// A Front takes the homeserver's outgoing federation requests, as an HTTP
// proxy would: it accepts connections, checks and reads one request on each,
// and parks it. A parked request is an Inbound: a connection without a
// goroutine, which waits until somebody answers it. Every connection carries
// one request, which is how Synapse uses them, and is closed after its answer.
//
// What is refused is refused before the body is read, in this order:
//
//	400 M_UNKNOWN        the head is not well-formed HTTP
//	431 M_TOO_LARGE      the head is over MaxHeaderBytes
//	405 M_UNRECOGNIZED   the method is CONNECT
//	404 M_UNRECOGNIZED   the target is not matrix-federation://..., nor one of Own
//	407 M_UNAUTHORIZED   Proxy-Authorization is not exactly the secret
//	400 M_INVALID_PARAM  the target is malformed, or has no valid server name
//	505 M_UNKNOWN        HTTP/1.0, which cannot tell a cut answer from a whole one
//	417 M_UNKNOWN        Expect is not 100-continue
//	413 M_TOO_LARGE      Content-Length is over MaxBody
//
// and while it is read:
//
//	413 M_TOO_LARGE      a chunked body is over MaxBody
//	503 M_UNKNOWN        BodyTimeout is over, or there was no room in the spool for so long
//	400 M_UNKNOWN        the chunks are malformed
//	500 M_UNKNOWN        the spool's disk fails
//
// A request that the client cuts off is dropped without an answer.
//
// It is no http.Server, which would start a second goroutine for each request
// and keep two buffers for the sake of a next request that never comes: a
// fifth of the processor time of a lookup.
//
// All methods may be called concurrently.
type Front struct {
	cfg      FrontConfig
	secret   [sha256.Size]byte
	linger   time.Duration // how long a refused client may go on sending
	gate     *gate
	lastID   atomic.Uint64
	errorLog rate.Sometimes
	receiver receiver

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	closed    bool
	waiting   []*Inbound // parked requests that the watcher looks after; Inbound.pos is the index
	sweeping  bool       // the watcher runs
	stats     FrontStats // without what gate counts
}

// FrontStats is a snapshot of what a Front holds and has done.
type FrontStats struct {
	Open       int // connections accepted and not yet closed, and listeners that wait for one
	Reading    int // those of them whose request is being read
	Parked     int // those of them that wait for an answer to begin
	MaxOpen    int // the most so far
	MaxReading int
	MaxParked  int

	Requests uint64         // requests handed over
	Gone     uint64         // clients that went away while parked
	Cut      uint64         // clients that went away, or had to, before their request was complete
	GaveWay  uint64         // those of them that had to, as others waited
	Refused  map[int]uint64 // answers of the Front itself, by status code
	Secret   SecretStats
}

// SecretStats says when requests had the secret. Refused has how many did not, under 407.
type SecretStats struct {
	LastRight  time.Time // when the last request with it came; zero: never
	FirstWrong time.Time // when the first without it came since then; zero: none did
	LastWrong  time.Time // when the last without it came; zero: never
}

// NewFront returns a Front that serves nothing yet. It panics when a required
// field is missing: a Front without a secret would be an open proxy.
func NewFront(c FrontConfig) *Front {
	if len(c.Secret) == 0 || c.Spool == nil || c.Handle == nil || c.Gone == nil {
		panic("netx: FrontConfig needs Secret, Spool, Handle and Gone")
	}
	setDefault(&c.MaxConns, defaultMaxConns)
	setDefault(&c.MaxReading, defaultMaxReading)
	setDefault(&c.HeaderTimeout, defaultHeaderTimeout)
	setDefault(&c.BodyTimeout, defaultBodyTimeout)
	setDefault(&c.StallTimeout, defaultStallTimeout)
	setDefault(&c.SweepInterval, defaultSweepInterval)
	setDefault(&c.MaxHeaderBytes, defaultMaxHeaderBytes)
	if c.MaxBody == nil {
		c.MaxBody = func(string, string) int64 { return defaultMaxBody }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Front{
		cfg:       c,
		secret:    sha256.Sum256(c.Secret),
		linger:    defaultLinger,
		gate:      newGate(c.MaxConns, c.MaxReading),
		errorLog:  rate.Sometimes{First: 1, Interval: errorLogInterval},
		listeners: map[net.Listener]struct{}{},
		stats:     FrontStats{Refused: map[int]uint64{}},
	}
	f.receiver = receiver{c.Spool, c.Logger, &f.errorLog}
	f.cfg.Secret = nil // its digest is all that is needed
	return f
}

func setDefault[T int | int64 | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Serve accepts connections from ln until Close or Shutdown, and closes it.
// Several listeners may be served at once, but fewer than MaxConns, as each of them
// holds a place. The error is never nil, and
// http.ErrServerClosed after Close or Shutdown.
func (f *Front) Serve(ln net.Listener) error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		ln.Close()
		return http.ErrServerClosed
	}
	f.listeners[ln] = struct{}{}
	f.mu.Unlock()

	over := overTCP
	if ln.Addr().Network() == "unix" {
		over = overUnix
	}
	f.gate.listen(over, 1)
	err := f.accept(ln, over)
	f.gate.listen(over, -1)
	ln.Close()

	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.listeners, ln)
	if f.closed {
		return http.ErrServerClosed
	}
	return err
}

// accept reads each connection's request in a goroutine of its own, which ends when the
// request is handed over.
func (f *Front) accept(ln net.Listener, over via) error {
	for pause := time.Duration(0); ; {
		if !f.gate.enter(over) {
			return http.ErrServerClosed
		}
		conn, err := ln.Accept()
		if err == nil {
			pause = 0
			go f.serve(f.gate.came(conn, over))
			continue
		}
		f.gate.failed(over)
		if !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) && !errors.Is(err, syscall.ECONNABORTED) {
			return err
		}
		// It passes, once connections are closed.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		f.errorLog.Do(func() { f.cfg.Logger.Error("a connection could not be accepted", "err", err) })
		time.Sleep(pause)
	}
}

// stopAccepting closes the gate and the listeners. A unix socket that Listen
// made is removed; one that systemd passed on stays, and new connections wait
// in it for the next process.
func (f *Front) stopAccepting() {
	f.gate.close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for ln := range f.listeners {
		ln.Close()
	}
}

// Close stops accepting and drops the connections whose request is being read.
// Parked requests stay until they are answered.
func (f *Front) Close() error {
	f.stopAccepting()
	f.gate.dropAll()
	return nil
}

// Shutdown stops accepting and returns when every request that was being read
// has been handed over, or, with ctx's error, when ctx is done; those still
// being read are dropped then. Parked requests stay until they are answered.
func (f *Front) Shutdown(ctx context.Context) error {
	f.stopAccepting()
	err := f.gate.drain(ctx)
	if err != nil {
		f.gate.dropAll()
	}
	return err
}

// Stats returns a snapshot.
func (f *Front) Stats() FrontStats {
	f.mu.Lock()
	s := f.stats
	s.Refused = maps.Clone(s.Refused)
	f.mu.Unlock()
	g := f.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	s.Open = g.openLocked(overUnix) + g.openLocked(overTCP)
	s.Reading = g.readingLocked(overUnix) + g.readingLocked(overTCP)
	s.MaxOpen, s.MaxReading, s.GaveWay = g.mostOpen, g.mostReading, g.cuts
	return s
}

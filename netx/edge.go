package netx

import (
	"bytes"
	"context"
	"crypto/tls"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Defaults of EdgeConfig, and what is not configurable.
const (
	defaultEdgeConns       = 256 // idle with TLS, 26 KiB of heap and stack each, HTTP/2 35 KiB; of resident memory twice that
	defaultEdgeReading     = 32  // about 48 KiB each
	defaultEdgeRequests    = 256 // about 6 KiB each besides their connection, without their bodies
	defaultEdgeIdleTimeout = 90 * time.Second
	defaultEdgeStreams     = 32 // a server sends one transaction at a time and a few lookups

	// What a client's HTTP/2 makes us hold of bodies that are not read yet: the
	// smallest window that there is. 64 KiB carry 5 Mbit/s at 100 ms.
	edgeWindow = 64 << 10

	maxMethod        = 32                     // bytes
	maxTarget        = 8 << 10                // bytes
	edgeRetryAfter   = "10"                   // seconds, when too many requests are held
	edgeLinger       = 500 * time.Millisecond // how long what is refused may go on sending
	ownAnswerFor     = 5 * time.Second        // for writing a small answer of our own
	edgeReadBuffer   = 16 << 10               // of HTTP/2 frames; the smallest there is
	edgeHeaderTable  = 4 << 10                // of HPACK; what a client may presume
	edgeWriteTimeout = 30 * time.Second
)

// EdgeConfig configures an Edge. Spool, Handle and Gone are required.
type EdgeConfig struct {
	// TLS are the certificates. nil serves plain HTTP/1.1, for a proxy that
	// does TLS.
	TLS *Certificates

	// TrustedProxies are the addresses of proxies whose X-Forwarded-For is
	// believed: the last address in it that is none of them is the client's.
	// Whoever connects over a unix socket is trusted as well.
	TrustedProxies []netip.Prefix

	// MaxConns bounds the connections. When all are in use, another one gives way to a
	// new one, of whoever has most; see edgeConns. 0 means 256. Each needs a file
	// descriptor, and each listener that is served one more.
	MaxConns int

	// MaxConnsPerAddr bounds those of one client: an IPv4 address or an IPv6
	// /64. A further one is closed at once, unless one of the client's others gives way:
	// then that one is. Trusted proxies are exempt. 0 means no bound but a quarter of
	// MaxConns when all are in use: one host may serve many homeservers.
	MaxConnsPerAddr int

	// MaxReading bounds the requests whose body is being read at a time: from its
	// first byte on. A client gets one only while three times as many as it has are
	// free: a quarter of all at most. Others wait, for BodyTimeout, and the client
	// that has fewest is next; meanwhile the slowest of those that are read gives way,
	// with 408, if it is slower than BodyRate. 0 means 32.
	MaxReading int

	// MaxRequests bounds the requests held at a time, each from its complete header to the
	// end of its answer, whoever makes it. A client has
	// a share as with MaxReading. A further one is answered 503 with Retry-After; if
	// MaxRefusals of those answers are under way it has none: its stream is reset, or
	// its connection.
	// Requests through a trusted proxy without X-Forwarded-For have no share, here
	// and with MaxReading; they leave an eighth to others. 0 means 256.
	MaxRequests int

	// HeaderTimeout bounds the TLS handshake, and the time from a request's
	// first byte until its header is complete. 0 means 10 s. With HTTP/2 a header
	// that is not complete counts as idleness.
	HeaderTimeout time.Duration

	// BodyTimeout bounds the time from then until the body is complete, with a second more
	// for each BodyRate bytes that have come, BodyTotal at most. It includes waiting for a
	// place among MaxReading, and for room in the spool. 0 means 30 s, 4 KiB and 10 min.
	BodyTimeout time.Duration
	BodyRate    int64
	BodyTotal   time.Duration

	// IdleTimeout is how long a connection may be without a request. 0 means
	// 90 s: longer than most clients keep one, since who closes first risks that
	// a request is on its way.
	IdleTimeout time.Duration

	// StallTimeout is how long a client may take to accept 32 KiB of its answer.
	// 0 means 60 s.
	StallTimeout time.Duration

	// MaxHeaderBytes bounds the request line and the header; net/http adds 4 KiB
	// for HTTP/1.1 and 320 bytes for HTTP/2. 0 means 16 KiB.
	MaxHeaderBytes int

	// MaxStreams bounds the concurrent requests on one HTTP/2 connection. 0
	// means 32.
	MaxStreams int

	// MaxBody returns how many bytes a request's body may have; it should stay
	// well below the spool's budgets. It is called in many goroutines at a time.
	// nil means 13,107,200 for all, as Synapse has it.
	MaxBody func(method, target string) int64

	// Spool takes the bodies.
	Spool *Spool

	// Logger is told of panics and, at most every 30 s, of what net/http and the
	// spool complain about. nil discards it.
	Logger *slog.Logger

	// Check looks at a request before its body is read: at everything but Body
	// and Sum, with Size as announced, -1 for unknown. It returns nil to go on.
	// It is called in the request's goroutine and must not keep the request. nil
	// lets all pass.
	Check func(*EdgeRequest) *EdgeRefusal

	// Handle takes over a request. It is called in the request's goroutine, by
	// MaxRequests of them at a time. It may answer at once, or leave that to
	// others. A panic in it aborts the request.
	Handle func(*EdgeRequest)

	// Gone is told that the client closed its connection, or its sending half of
	// it, or cancelled its HTTP/2 stream, while its request waited. It is called
	// at most once for a request, after Handle returned, never once Reply, Stream
	// or Abort has been called. The body must still be released. A client that
	// has sent the beginning of a further HTTP/1.1 request is not noticed.
	Gone func(*EdgeRequest)
}

// An Edge takes the federation's requests: HTTP/1.1 and, with TLS, HTTP/2. It
// checks each, reads its body into the spool, and hands it over as an
// EdgeRequest.
//
// It is made of net/http's Server, which is what reads the wire. That costs, in
// goroutines: one for a handshake, one for a connection of HTTP/1.1, and a second while a request on
// it waits; two for a connection of HTTP/2, and one for each request on it.
// MaxConns and MaxRequests bound them. Serve runs in the caller's.
//
// net/http itself answers, in plain text and closing the connection:
//
//	400  the head is not well-formed; no Host, or several; Content-Lengths that
//	     differ or are no number; a name or value with a forbidden byte; plain
//	     HTTP where TLS is spoken
//	417  Expect is not 100-continue
//	431  the head is over MaxHeaderBytes
//	501  Transfer-Encoding is not exactly chunked
//	505  the version is not HTTP/1.x
//
// and a headGuard, in JSON, 431 to a head of more than 128 lines.
//
// With HTTP/2 it resets the stream or closes the connection instead, also when
// streams are opened and reset too fast, or a header does not end. The Edge
// refuses, in Matrix's JSON, before the body is read and in this order:
//
//	503 M_UNKNOWN        MaxRequests are held, with Retry-After
//	405 M_UNRECOGNIZED   the method is CONNECT
//	431 M_TOO_LARGE      the header has more than 128 fields (HTTP/2)
//	400 M_INVALID_PARAM  the method is too long; the target is not a path, with a
//	                     query or not, of printable ASCII without '#'
//	414 M_TOO_LARGE      the target is over 8 KiB
//	400 M_UNKNOWN        Host is malformed
//	417 M_UNKNOWN        Expect is not 100-continue (HTTP/2)
//	400 M_UNKNOWN        GET or HEAD with a body, over which Synapse checks no signature
//	413 M_TOO_LARGE      Content-Length is over MaxBody
//	                     what Check refuses
//
// and while it is read 413, 400, 503 and 500 as Front has them, but 408 when
// BodyTimeout is over while there was room in the spool. A request that the client
// cuts off is dropped without an answer.
//
// A connection is closed after a refusal of the Edge's own that leaves a body
// unread, but not after 503 and what Check refuses: there up to 256 KiB of body
// are read and thrown away, for half a second. It is closed as well after the answer to HTTP/1.0 and
// to a chunked request of HTTP/1.1. In the latter, net/http drops a
// Content-Length unseen, in the former a Transfer-Encoding, and a proxy that
// believed the other one of the two would see a further request where there is
// none: closed as it is, nothing that stands behind such a request is ever read
// as one. Equal Content-Lengths count as one.
//
// Trailers are thrown away. A header line that is continued on the next one
// (obs-fold) is joined by a space, as RFC 9112 5.2 has it.
//
// All methods may be called concurrently.
type Edge struct {
	cfg      EdgeConfig
	server   http.Server
	tls      *tls.Config // nil: plain HTTP/1.1
	conns    *edgeConns
	reading  *fairSlots
	lastID   atomic.Uint64
	errorLog rate.Sometimes // of our own errors
	connLog  rate.Sometimes // of what clients can cause
	receiver receiver

	mu      sync.Mutex
	stats   EdgeStats   // without what conns, reading and held count
	held    *FairPlaces // requests; of nobody knows whom under zero
	refused *FairPlaces // those beyond MaxRequests that are being answered
}

// EdgeStats is a snapshot of what an Edge holds and has done.
type EdgeStats struct {
	Open       int // connections that have a place
	Idle       int // those of them that are between two requests
	Reading    int // requests whose body is being read
	Held       int // requests that count towards MaxRequests
	MaxOpen    int // the most so far
	MaxReading int
	MaxHeld    int

	Requests  uint64         // requests handed over
	HTTP2     uint64         // those of them that came over HTTP/2
	Gone      uint64         // clients that went away while they waited for an answer
	Cut       uint64         // clients that went away inside the request's body
	Evicted   uint64         // idle connections closed for new ones
	Crowding  uint64         // connections on which no request was read or answered, closed for new ones
	Slow      uint64         // bodies and answers broken off for others, as they were the slowest
	OverAddr  uint64         // connections closed because their client had MaxConnsPerAddr, or a quarter of all when all were in use
	Wasteful  uint64         // connections closed at once, since their client had wasted so many
	Dropped   uint64         // requests beyond MaxRequests that got no answer
	Protocol  uint64         // HTTP/2 connections and streams that net/http ended for what the client did
	Handshake uint64         // TLS handshakes that failed
	Refused   map[int]uint64 // answers of the Edge itself and of Check, by status code; not net/http's
}

// NewEdge returns an Edge that serves nothing yet. It panics when a required
// field is missing.
func NewEdge(c EdgeConfig) *Edge {
	if c.Spool == nil || c.Handle == nil || c.Gone == nil {
		panic("netx: EdgeConfig needs Spool, Handle and Gone")
	}
	setDefault(&c.MaxConns, defaultEdgeConns)
	setDefault(&c.MaxReading, defaultEdgeReading)
	setDefault(&c.MaxRequests, defaultEdgeRequests)
	setDefault(&c.HeaderTimeout, defaultHeaderTimeout)
	setDefault(&c.BodyTimeout, defaultBodyTimeout)
	setDefault(&c.BodyRate, defaultBodyRate)
	setDefault(&c.BodyTotal, defaultBodyTotal)
	setDefault(&c.IdleTimeout, defaultEdgeIdleTimeout)
	setDefault(&c.StallTimeout, defaultStallTimeout)
	setDefault(&c.MaxHeaderBytes, defaultMaxHeaderBytes)
	setDefault(&c.MaxStreams, defaultEdgeStreams)
	if c.MaxBody == nil {
		c.MaxBody = func(string, string) int64 { return defaultMaxBody }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Edge{
		cfg:      c,
		reading:  newFairSlots(c.MaxReading, c.BodyRate),
		errorLog: rate.Sometimes{First: 1, Interval: errorLogInterval},
		connLog:  rate.Sometimes{First: 1, Interval: errorLogInterval},
		stats:    EdgeStats{Refused: map[int]uint64{}},
		held:     NewFairPlaces(c.MaxRequests),
		refused:  NewFairPlaces(MaxRefusals(c.MaxRequests)),
	}
	e.conns = newEdgeConns(c.MaxConns, c.MaxConnsPerAddr, c.BodyRate, e.trusted)
	e.receiver = receiver{c.Spool, c.Logger, &e.errorLog}

	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(c.TLS != nil)
	e.server = http.Server{
		Handler:           http.HandlerFunc(e.serve),
		Protocols:         protocols,
		ReadHeaderTimeout: c.HeaderTimeout,

		DisableGeneralOptionsHandler: true, // it would answer "*" with 200
		IdleTimeout:                  c.IdleTimeout,
		MaxHeaderBytes:               c.MaxHeaderBytes,
		ErrorLog:                     log.New(edgeLog{e}, "", 0),
		ConnState:                    e.conns.state,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, edgeConnKey{}, edgeConnOf(c))
		},
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          c.MaxStreams,
			MaxDecoderHeaderTableSize:     edgeHeaderTable,
			MaxEncoderHeaderTableSize:     edgeHeaderTable,
			MaxReadFrameSize:              edgeReadBuffer,
			MaxReceiveBufferPerConnection: edgeWindow,
			MaxReceiveBufferPerStream:     edgeWindow,
			WriteByteTimeout:              edgeWriteTimeout,
			CountError: func(string) {
				e.mu.Lock()
				defer e.mu.Unlock()
				e.stats.Protocol++
			},
		},
	}
	e.server.RegisterOnShutdown(e.conns.closeFresh)
	if c.TLS != nil {
		e.tls = c.TLS.Config()
		e.tls.NextProtos = []string{"h2", "http/1.1"}
	} else {
		e.server.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	}
	return e
}

// edgeConnKey is where a request's context has its *edgeConn.
type edgeConnKey struct{}

// trusted reports whether the peer at addr is a trusted proxy.
func (e *Edge) trusted(addr netip.Addr) bool { return within(e.cfg.TrustedProxies, addr) }

// Serve accepts connections from ln until Close or Shutdown, and closes it.
// Several listeners may be served at once. The error is never nil, and http.ErrServerClosed after Close or Shutdown.
func (e *Edge) Serve(ln net.Listener) error {
	l := newEdgeListener(ln, e)
	go l.run()
	err := e.server.Serve(l)
	_ = l.Close() // run ends, also when nothing was ever served
	return err
}

// Shutdown stops accepting, closes idle connections and those on which no
// request has come, and returns when every request has been answered and its
// connection closed, or, with ctx's error, when ctx is done. Then Close ends
// what is left.
func (e *Edge) Shutdown(ctx context.Context) error {
	return e.server.Shutdown(ctx)
}

// Close stops accepting and closes all connections. Requests that wait for an
// answer are told to Gone.
func (e *Edge) Close() error { return e.server.Close() }

// Stats returns a snapshot.
func (e *Edge) Stats() EdgeStats {
	e.mu.Lock()
	s := e.stats
	s.Held = e.held.Used()
	s.Refused = maps.Clone(s.Refused)
	e.mu.Unlock()
	c := e.conns
	c.mu.Lock()
	s.Open, s.MaxOpen, s.Evicted, s.Crowding, s.Slow, s.OverAddr, s.Wasteful = len(c.all), c.most, c.evicted, c.crowding, c.slow, c.overClient, c.wasteful
	for c := range c.all { // a sum
		if c.class == classIdle {
			s.Idle++
		}
	}
	c.mu.Unlock()
	r := e.reading
	r.mu.Lock()
	s.Reading, s.MaxReading = r.used, r.most
	s.Slow += r.cuts
	r.mu.Unlock()
	return s
}

// edgeLog takes net/http's complaints, most of which clients can cause at will.
type edgeLog struct{ e *Edge }

func (l edgeLog) Write(line []byte) (int, error) {
	text := string(bytes.TrimSpace(line))
	if strings.Contains(text, "Accept error") { // no descriptor is left, say
		l.e.errorLog.Do(func() { l.e.cfg.Logger.Error("a connection could not be accepted", "err", text) })
		return len(line), nil
	}
	l.e.connLog.Do(func() { l.e.cfg.Logger.Info("a client's connection ended badly", "err", text) })
	return len(line), nil
}

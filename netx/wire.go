package netx

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// A server may send more than its answers: empty frames, headers of frames that nobody
// has asked for, chunks of one byte, heads of tiny fields. net/http reads all of it for as
// long as the request may take, 15 minutes for a join. So what comes over the wire is
// measured against what has been read as answers.
const (
	// wireBase is what may come beside answers on a connection, in bytes: as frames of
	// nothing some 100 ms of a board's processor.
	wireBase = 4 << 20
	// wirePerRequest is what each request adds to that: a head of the largest size.
	wirePerRequest = 256 << 10
	// wirePerByte is what each byte of a body may take on the wire. Frames of 100 bytes take
	// a third more than what is in them.
	wirePerByte = 2
)

// errFlood ends a connection on which much more has come than answers.
var errFlood = errors.New("the server sends much besides its answers")

// meter measures what comes over one connection.
type meter struct {
	read    atomic.Int64
	allowed atomic.Int64 // beyond wireBase
}

// saw notes n bytes from the wire.
func (m *meter) saw(n int) error {
	if m.read.Add(int64(n)) > wireBase+m.allowed.Load() {
		return errFlood
	}
	return nil
}

// request notes a request, and body n bytes of an answer that were read. nil measures
// nothing.
func (m *meter) request() {
	if m != nil {
		m.allowed.Add(wirePerRequest)
	}
}

func (m *meter) body(n int) {
	if m != nil {
		m.allowed.Add(wirePerByte * int64(n))
	}
}

// remoteWire is what is measured of a connection to a server.
type remoteWire struct {
	meter *meter
	heads *answerConn // of HTTP/1; else nil
}

// request notes that a request is about to be sent.
func (w *remoteWire) request() {
	if w == nil {
		return
	}
	w.meter.request()
	if w.heads != nil {
		w.heads.next()
	}
}

// measured returns a body whose bytes are measured as they are read.
func (w *remoteWire) measured(body io.ReadCloser) io.ReadCloser {
	if w == nil {
		return body
	}
	return &measuredBody{body, w.meter}
}

type measuredBody struct {
	io.ReadCloser
	meter *meter
}

func (b *measuredBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.meter.body(n)
	return n, err
}

// newRemoteWire returns the connection that net/http should have, and what measures it.
func newRemoteWire(conn *tls.Conn) (net.Conn, *remoteWire) {
	w := new(remoteWire)
	if c, ok := conn.NetConn().(*countedConn); ok {
		w.meter = &c.meter
	}
	if conn.ConnectionState().NegotiatedProtocol == "h2" {
		return conn, w // which bounds heads by their fields itself
	}
	w.heads = &answerConn{Conn: conn, guard: headGuard{answers: true}}
	return w.heads, w
}

// answerConn is a connection of HTTP/1 whose answers' heads are guarded.
type answerConn struct {
	net.Conn
	mu    sync.Mutex
	guard headGuard
}

func (c *answerConn) next() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guard.next()
}

func (c *answerConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	if many := c.guard.see(p[:n]); many != nil {
		return 0, many
	}
	return n, err
}

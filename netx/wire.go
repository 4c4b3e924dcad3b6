package netx

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
)

// A server may send more than its answers: empty frames, headers of frames that nobody
// has asked for, chunks of one byte, heads of tiny fields. net/http reads all of it for as
// long as the request may take, 15 minutes for a join. So what comes over the wire is
// measured against what has been read as answers.
//
// Frames cannot be counted: net/http speaks HTTP/2 over a *tls.Conn and nothing around it.
// What costs most are frames that net/http answers, PING and SETTINGS, with a write each, so
// small writes count too.
const (
	// wireBase is what may come beside answers on a connection, in bytes. As empty frames
	// that is half a million, or a tenth of a second of a fast core.
	wireBase = 4 << 20
	// wirePerRequest is what each request takes off what has come: a head of the largest
	// size, and what was under way of an answer that was given up.
	wirePerRequest = 256 << 10
	// wirePerByte is what each byte of a body takes off. Frames of 100 bytes take a third
	// more than what is in them.
	wirePerByte = 2
	// wirePerWrite is what a write of less than smallWrite bytes counts for. An answer to a
	// PING has 39, a request more than smallWrite. For a large body net/http writes a few
	// for each 4 KiB, to widen the window.
	wirePerWrite = 512
	smallWrite   = 128
)

// errFlood ends a connection on which much more has come than answers.
var errFlood = errors.New("the server sends much besides its answers")

// meter measures what comes over one connection. The zero value is ready; a nil one measures
// nothing.
type meter struct {
	mu     sync.Mutex
	excess int64 // bytes that no answer explains; never negative, so that nothing is saved up
}

// saw notes n bytes from the wire.
func (m *meter) saw(n int) error { return m.add(int64(n)) }

// wrote notes a write of n bytes.
func (m *meter) wrote(n int) error {
	if n >= smallWrite {
		return nil
	}
	return m.add(wirePerWrite)
}

// request notes a request.
func (m *meter) request() { _ = m.add(-wirePerRequest) }

// body notes n bytes of an answer that were read.
func (m *meter) body(n int) { _ = m.add(-wirePerByte * int64(n)) }

func (m *meter) add(n int64) error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.excess = max(0, m.excess+n)
	if m.excess > wireBase {
		return errFlood
	}
	return nil
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
		return conn, w // of which checkFields sees the heads
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

// checkFields refuses an answer of more than maxFields fields, which may hold them for as long
// as its body lasts. Over HTTP/1 answerConn has counted the lines.
func checkFields(h http.Header) error {
	n := 0
	for _, values := range h {
		n += len(values)
	}
	if n > maxFields {
		return errManyFields
	}
	return nil
}

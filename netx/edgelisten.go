package netx

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"fsbus/bus/matrix"
)

// edgeListener gives net/http connections that have a place in edgeConns, and whose
// handshake is through. So net/http sees HTTP/1 as it is read, with a headGuard, and
// HTTP/2 as the *tls.Conn that it needs.
type edgeListener struct {
	net.Listener
	edge   *Edge
	ready  chan accepted
	quit   chan struct{} // closed by Close
	closed bool          // guarded by edge.conns.mu
}

type accepted struct {
	conn net.Conn
	err  error
}

func newEdgeListener(ln net.Listener, e *Edge) *edgeListener {
	return &edgeListener{Listener: ln, edge: e, ready: make(chan accepted), quit: make(chan struct{})}
}

// run accepts until the listener is closed.
func (l *edgeListener) run() {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			if !l.give(accepted{err: err}) || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // net/http repeats what passes, after a pause
		}
		c := l.edge.conns.admit(l, raw)
		switch {
		case c == nil:
		case l.edge.cfg.TLS == nil:
			l.offer(c, &headConn{Conn: c, conn: c, edge: l.edge})
		default:
			go l.handshake(c)
		}
	}
}

// give hands something to net/http. It reports false when the listener is closed.
func (l *edgeListener) give(a accepted) bool {
	select {
	case l.ready <- a:
		return true
	case <-l.quit:
		return false
	}
}

// offer hands net/http a connection, which is top of c.
func (l *edgeListener) offer(c *edgeConn, top net.Conn) {
	if !l.give(accepted{conn: top}) {
		_ = c.Close()
	}
}

// handshake does TLS's, within HeaderTimeout.
func (l *edgeListener) handshake(c *edgeConn) {
	e := l.edge
	t := tls.Server(c, e.tls)
	_ = c.SetDeadline(time.Now().Add(e.cfg.HeaderTimeout)) // a broken connection fails below
	if err := t.HandshakeContext(context.Background()); err != nil {
		if h, ok := errors.AsType[tls.RecordHeaderError](err); ok && h.Conn != nil && asHTTP(h.RecordHeader) {
			_, _ = io.WriteString(c, plainHTTP)
		}
		_ = c.Close()
		e.mu.Lock()
		e.stats.Handshake++
		e.mu.Unlock()
		e.connLog.Do(func() { e.cfg.Logger.Info("a client's connection ended badly", "client", c.peer, "err", err) })
		return
	}
	_ = c.SetDeadline(time.Time{})
	if t.ConnectionState().NegotiatedProtocol == "h2" {
		l.offer(c, t)
		return
	}
	l.offer(c, &headConn{Conn: t, conn: c, edge: e})
}

// plainHTTP is for who speaks HTTP where TLS is spoken.
const plainHTTP = "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\nThis port speaks HTTPS.\n"

// asHTTP reports whether something that should have been a TLS record begins like an
// HTTP request.
func asHTTP(b [5]byte) bool {
	switch string(b[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "DELET":
		return true
	}
	return false
}

func (l *edgeListener) Accept() (net.Conn, error) {
	select {
	case a := <-l.ready:
		return a.conn, a.err
	case <-l.quit:
		return nil, net.ErrClosed
	}
}

func (l *edgeListener) Close() error {
	s := l.edge.conns
	s.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.quit)
	}
	s.mu.Unlock()
	s.change.Broadcast()
	return l.Listener.Close()
}

// headConn is a connection of HTTP/1, in the clear. It ends when a head has too many
// lines: net/http would keep them all before anybody sees one.
type headConn struct {
	net.Conn
	conn  *edgeConn
	edge  *Edge
	guard headGuard
}

func (c *headConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.guard.see(p[:n]) == nil {
		return n, err
	}
	e := c.edge
	e.mu.Lock()
	e.stats.Refused[refuseHead.status]++
	e.mu.Unlock()
	_ = c.SetWriteDeadline(time.Now().Add(ownAnswerFor))
	body := matrix.ErrorJSON(refuseHead.errcode, refuseHead.message)
	head := answerHead(refuseHead.status, http.Header{"Content-Type": {"application/json"}}, framing(http.MethodGet, refuseHead.status, int64(len(body))))
	_, _ = c.Write(append(head, body...)) // whoever sends that may not listen
	_ = c.Close()
	return 0, errManyFields
}

// CloseWrite is what net/http calls to let a client read an answer that it has
// not waited for.
func (c *headConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// edgeConnOf returns the connection below TLS.
func edgeConnOf(c net.Conn) *edgeConn {
	switch c := c.(type) {
	case *headConn:
		return c.conn
	case *tls.Conn:
		return c.NetConn().(*edgeConn)
	}
	return c.(*edgeConn)
}

package node

import (
	"bytes"
	"container/list"
	"net"
	"net/http"
	"sync"
	"time"

	"fsbus/netx"
)

// crowdListener bounds the connections that an http.Server has: the oldest on which no
// request is being answered, or about to be, is closed for a new one; if there is none, the
// new one waits. Each has freshFor for its first request.
type crowdListener struct {
	net.Listener
	most int

	mu     sync.Mutex
	change sync.Cond // a connection ended, or became free; L is &mu
	open   list.List // of *crowdConn, the oldest in front
}

// crowdConn is one of them.
type crowdConn struct {
	net.Conn
	of      *crowdListener
	element *list.Element // nil once it has ended; guarded by of.mu
	busy    bool          // the head of a request is read, and the answer not written; guarded by of.mu
	since   time.Time     // when it came
	tail    []byte        // the last three bytes that were read
}

// freshFor is for how long a connection may be silent while others want its place.
const freshFor = 20 * time.Millisecond

func newCrowdListener(ln net.Listener, most int) *crowdListener {
	l := &crowdListener{Listener: ln, most: most}
	l.change.L = &l.mu
	return l
}

func (l *crowdListener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.open.Len() >= l.most {
		stop := func() bool { return false }
		if c := l.freeLocked(); c != nil {
			young := freshFor - time.Since(c.since)
			if young <= 0 {
				c.endLocked()
				_ = c.Conn.Close() // nothing is lost
				break
			}
			stop = time.AfterFunc(young, l.wake).Stop
		}
		l.change.Wait() // for WriteTimeout at most
		stop()
	}
	c := &crowdConn{Conn: raw, of: l, since: time.Now()}
	c.element = l.open.PushBack(c)
	return c, nil
}

// wake has Accept look again. It takes the lock so that it cannot come between a look and
// the waiting.
func (l *crowdListener) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.change.Broadcast()
}

func (l *crowdListener) freeLocked() *crowdConn {
	for e := l.open.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*crowdConn); !c.busy && !netx.HeadIsThere(c.Conn) {
			return c
		}
	}
	return nil
}

func (c *crowdConn) endLocked() {
	if c.element != nil {
		c.of.open.Remove(c.element)
		c.element = nil
		c.of.change.Broadcast()
	}
}

// Read notes when the head of a request is read.
func (c *crowdConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	seen := append(c.tail, p[:n]...)
	if bytes.Contains(seen, []byte("\r\n\r\n")) {
		c.setBusy(true)
	}
	c.tail = append([]byte(nil), seen[max(0, len(seen)-3):]...)
	return n, err
}

func (c *crowdConn) Close() error {
	c.of.mu.Lock()
	c.endLocked()
	c.of.mu.Unlock()
	return c.Conn.Close()
}

func (c *crowdConn) setBusy(busy bool) {
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	c.busy = busy
	c.of.change.Broadcast()
}

// crowdState is http.Server.ConnState: what is written of an answer after its handler has
// returned is part of it.
func crowdState(conn net.Conn, state http.ConnState) {
	if c, ok := conn.(*crowdConn); ok && state == http.StateIdle {
		c.setBusy(false)
	}
}

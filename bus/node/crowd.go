package node

import (
	"container/list"
	"context"
	"net"
	"net/http"
	"sync"
)

// crowdListener bounds the connections that an http.Server has: the oldest on which no
// request is being answered is closed for a new one; if there is none, the new one waits.
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
	busy    bool          // a request on it is being answered; guarded by of.mu
}

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
		if c := l.freeLocked(); c != nil {
			c.endLocked()
			_ = c.Conn.Close() // nothing is lost
			break
		}
		l.change.Wait() // for WriteTimeout at most
	}
	c := &crowdConn{Conn: raw, of: l}
	c.element = l.open.PushBack(c)
	return c, nil
}

func (l *crowdListener) freeLocked() *crowdConn {
	for e := l.open.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*crowdConn); !c.busy {
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

type crowdKey struct{}

// crowdContext is http.Server.ConnContext.
func crowdContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, crowdKey{}, conn)
}

// answering notes that a request is being answered, until its connection is idle or ends.
func answering(r *http.Request) {
	if c, ok := r.Context().Value(crowdKey{}).(*crowdConn); ok {
		c.setBusy(true)
	}
}

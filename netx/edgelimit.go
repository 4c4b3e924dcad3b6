package netx

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// edgeConns bounds an Edge's connections. A listener takes a place before it
// accepts, so that the limit holds exactly and what is beyond it stays in the
// kernel's backlog; one that waits in Accept therefore holds a place. When there
// is none, the connection that has been idle for longest gives its own, unless it
// has been so for less than evictAfter: then its client's next request may be on its
// way, and would be cut off. While a listener waits for want of an older one, the
// connections are closed after their next answer, which costs no request.
type edgeConns struct {
	max, perAddr int
	trusted      func(netip.Addr) bool
	evictAfter   time.Duration

	mu     sync.Mutex
	change sync.Cond // a place became free, a connection idle, or a listener was closed; L is &mu
	open   int       // places taken: connections, and listeners in Accept
	wanted int       // listeners that wait for a place
	all    map[*edgeConn]struct{}
	idle   list.List          // of *edgeConn, the longest idle last
	by     map[netip.Addr]int // connections of each client, only with perAddr

	most             int
	evicted, refused uint64
}

func newEdgeConns(limit, perAddr int, trusted func(netip.Addr) bool) *edgeConns {
	s := &edgeConns{max: limit, perAddr: perAddr, trusted: trusted, evictAfter: evictAfter, all: map[*edgeConn]struct{}{}, by: map[netip.Addr]int{}}
	s.change.L = &s.mu
	return s
}

// edgeConn is a connection of an Edge.
type edgeConn struct {
	net.Conn
	conns   *edgeConns
	peer    netip.Addr // zero on a unix socket
	trusted bool       // the peer is a proxy whose X-Forwarded-For is believed
	key     netip.Addr // what it counts under in conns.by; zero: it does not

	// Guarded by conns.mu.
	fresh   bool          // nothing has come on it yet that net/http understood
	since   time.Time     // when it became idle
	element *list.Element // in conns.idle, or nil
	left    bool          // its place has been given back, or on
}

// edgeListener accepts connections when edgeConns has a place.
type edgeListener struct {
	net.Listener
	conns  *edgeConns
	closed bool // guarded by conns.mu
}

func (l *edgeListener) Accept() (net.Conn, error) {
	for {
		if !l.conns.enter(l) {
			return nil, net.ErrClosed
		}
		raw, err := l.Listener.Accept()
		if err != nil {
			l.conns.leave()
			return nil, err // of which net/http repeats what passes
		}
		if c := l.conns.admit(raw); c != nil {
			return c, nil
		}
	}
}

func (l *edgeListener) Close() error {
	l.conns.mu.Lock()
	l.closed = true
	l.conns.mu.Unlock()
	l.conns.change.Broadcast()
	return l.Listener.Close()
}

// enter waits for a place. It reports false when l is closed.
func (s *edgeConns) enter(l *edgeListener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !l.closed {
		if s.open < s.max {
			s.open++
			s.most = max(s.most, s.open)
			return true
		}
		wake := func() {}
		if last := s.idle.Back(); last != nil {
			c := last.Value.(*edgeConn)
			young := s.evictAfter - time.Since(c.since)
			if young <= 0 {
				s.evictLocked(c)
				continue
			}
			t := time.AfterFunc(young, s.change.Broadcast)
			wake = func() { t.Stop() }
		}
		s.wanted++
		s.change.Wait()
		s.wanted--
		wake()
	}
	return false
}

// evictAfter is how long a connection must have been idle to be closed for a new
// one: longer than a client takes to send what it has waited to send.
const evictAfter = 200 * time.Millisecond

// crowded reports whether connections should make room after their next answer.
func (s *edgeConns) crowded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wanted > 0
}

// leave gives back a place for which no connection came.
func (s *edgeConns) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaveLocked()
}

func (s *edgeConns) leaveLocked() {
	if s.open--; s.open < 0 {
		panic(fmt.Sprintf("netx: more connections left than came: %d", s.open))
	}
	s.change.Broadcast()
}

// admit gives the place that was taken to a new connection. If its client has
// too many, the one of them that has been idle for longest is closed, and if
// none is idle the new one: then admit returns nil.
func (s *edgeConns) admit(raw net.Conn) *edgeConn {
	c := &edgeConn{Conn: raw, conns: s, fresh: true}
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		c.peer = tcp.AddrPort().Addr().Unmap().WithZone("")
		c.trusted = s.trusted(c.peer)
	} else {
		c.trusted = true // whoever may connect to a unix socket belongs to this machine
	}
	s.mu.Lock()
	if s.perAddr > 0 && !c.trusted {
		c.key = clientKey(c.peer)
		if s.by[c.key] >= s.perAddr {
			if old := s.idleOfLocked(c.key); old != nil {
				s.evictLocked(old)
			} else {
				s.refused++
				s.leaveLocked()
				s.mu.Unlock()
				reset(raw)
				return nil
			}
		}
		s.by[c.key]++
	}
	s.all[c] = struct{}{}
	s.mu.Unlock()
	return c
}

// idleOfLocked returns the connection of a client that has been idle for
// longest. It looks at MaxConns at most.
func (s *edgeConns) idleOfLocked(key netip.Addr) *edgeConn {
	for e := s.idle.Back(); e != nil; e = e.Prev() {
		if c := e.Value.(*edgeConn); c.key == key {
			return c
		}
	}
	return nil
}

// evictLocked closes an idle connection. It closes what is below TLS, as that
// does not block: a client that is idle expects nothing.
func (s *edgeConns) evictLocked(c *edgeConn) {
	s.evicted++
	s.endLocked(c)
	_ = c.Conn.Close()
}

// endLocked gives back what c holds.
func (s *edgeConns) endLocked(c *edgeConn) {
	if c.left {
		return
	}
	c.left = true
	s.busyLocked(c)
	delete(s.all, c)
	if c.key.IsValid() {
		if s.by[c.key]--; s.by[c.key] == 0 {
			delete(s.by, c.key)
		}
	}
	s.leaveLocked()
}

func (s *edgeConns) busyLocked(c *edgeConn) {
	if c.element != nil {
		s.idle.Remove(c.element)
		c.element = nil
	}
}

// Close closes the connection and gives its place back.
func (c *edgeConn) Close() error {
	c.conns.mu.Lock()
	c.conns.endLocked(c)
	c.conns.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite is what net/http calls to let a client read an answer that it has
// not waited for.
func (c *edgeConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// state is http.Server.ConnState.
func (s *edgeConns) state(conn net.Conn, state http.ConnState) {
	c := edgeConnOf(conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	if state == http.StateNew || c.left {
		return
	}
	c.fresh = false
	s.busyLocked(c)
	if state == http.StateIdle {
		c.since = time.Now()
		c.element = s.idle.PushFront(c)
		s.change.Broadcast()
	}
}

// closeFresh closes the connections on which no request has come yet.
func (s *edgeConns) closeFresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		if c.fresh {
			_ = c.Conn.Close() // net/http notices, and closes c
		}
	}
}

// edgeConnOf returns the connection below TLS.
func edgeConnOf(c net.Conn) *edgeConn {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	return c.(*edgeConn)
}

// reset closes a connection so that its client does not take what it got for
// complete, and so that it leaves nothing in the kernel.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only on a connection that is broken already
	}
	_ = c.Close()
}

// clientKey is what one client is told from another by: an IPv4 address, or the
// /64 of an IPv6 address, of which one client has all.
func clientKey(a netip.Addr) netip.Addr {
	if a.Is6() && !a.Is4In6() {
		p, _ := a.WithZone("").Prefix(64) // 64 is no error
		return p.Addr()
	}
	return a.Unmap()
}

// A fairSlots bounds how many of something run at once, in all and for one
// client, so that one client cannot keep all the others from it. Who waits has
// its turn in order, but is passed over while its client has its share.
type fairSlots struct {
	max, share int

	mu      sync.Mutex
	used    int
	by      map[netip.Addr]int
	waiting list.List // of *fairWaiter, the first in front
	most    int
}

type fairWaiter struct {
	key  netip.Addr
	turn chan struct{} // closed when it has its slot
}

func newFairSlots(n int) *fairSlots {
	return &fairSlots{max: n, share: max(1, n/4), by: map[netip.Addr]int{}}
}

var errNoSlot = errors.New("no slot was free in time")

// acquire waits for a slot for a client; the zero address is nobody's and has no
// share. The error is errNoSlot at the deadline, or ctx's.
func (s *fairSlots) acquire(ctx context.Context, key netip.Addr, deadline time.Time) error {
	s.mu.Lock()
	if s.freeLocked(key) {
		s.takeLocked(key)
		s.mu.Unlock()
		return nil
	}
	w := &fairWaiter{key, make(chan struct{})}
	element := s.waiting.PushBack(w)
	s.mu.Unlock()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	var err error
	select {
	case <-w.turn:
		return nil
	case <-timer.C:
		err = errNoSlot
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-w.turn: // at the same moment
		return nil
	default:
	}
	s.waiting.Remove(element)
	return err
}

func (s *fairSlots) freeLocked(key netip.Addr) bool {
	return s.used < s.max && (!key.IsValid() || s.by[key] < s.share)
}

func (s *fairSlots) takeLocked(key netip.Addr) {
	s.used++
	s.most = max(s.most, s.used)
	if key.IsValid() {
		s.by[key]++
	}
}

// release gives back what acquire took.
func (s *fairSlots) release(key netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used--; s.used < 0 {
		panic(fmt.Sprintf("netx: slot released that nobody held, of %d", s.max))
	}
	if key.IsValid() {
		if s.by[key]--; s.by[key] == 0 {
			delete(s.by, key)
		}
	}
	for e := s.waiting.Front(); e != nil && s.used < s.max; {
		w, next := e.Value.(*fairWaiter), e.Next()
		if s.freeLocked(w.key) {
			s.takeLocked(w.key)
			s.waiting.Remove(e)
			close(w.turn)
		}
		e = next
	}
}

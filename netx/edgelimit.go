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
//
// A connection on which no request has come yet is not idle: its client may be far
// away. But a client could hold all places with such ones, for HeaderTimeout each.
// So the one that has most connections, if those are more than a quarter of the
// places, gives the oldest of them when nothing idle can go.
type edgeConns struct {
	max, perAddr int
	trusted      func(netip.Addr) bool
	evictAfter   time.Duration

	mu     sync.Mutex
	change sync.Cond          // a place became free, a connection idle, or a listener was closed; L is &mu
	open   int                // places taken: connections, and listeners in Accept
	wanted int                // listeners that wait for a place
	fresh  list.List          // of *edgeConn on which nothing has come yet that net/http understood, the oldest last
	idle   list.List          // of *edgeConn, the longest idle last
	by     map[netip.Addr]int // connections of each client but trusted proxies

	most                       int
	evicted, crowding, refused uint64
}

func newEdgeConns(limit, perAddr int, trusted func(netip.Addr) bool) *edgeConns {
	s := &edgeConns{max: limit, perAddr: perAddr, trusted: trusted, evictAfter: evictAfter, by: map[netip.Addr]int{}}
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
	list    *list.List    // conns.fresh, conns.idle, or nil
	element *list.Element // in list
	since   time.Time     // when it came there
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
		stop := func() bool { return false }
		if c := s.nextLocked(); c != nil {
			young := s.evictAfter - time.Since(c.since)
			if young <= 0 {
				s.evictLocked(c)
				continue
			}
			stop = time.AfterFunc(young, s.wake).Stop
		}
		s.wanted++
		s.change.Wait()
		s.wanted--
		stop()
	}
	return false
}

// wake has all listeners look again. It takes the lock so that it cannot come
// between a listener's look and its waiting.
func (s *edgeConns) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.change.Broadcast()
}

// nextLocked returns the connection to be closed for a new one, as soon as it is old
// enough; nil if there is none.
func (s *edgeConns) nextLocked() *edgeConn {
	var idle *edgeConn
	if last := s.idle.Back(); last != nil {
		if idle = last.Value.(*edgeConn); time.Since(idle.since) >= s.evictAfter {
			return idle
		}
	}
	if fresh := s.freshLocked(); fresh != nil && (idle == nil || fresh.since.Before(idle.since)) {
		return fresh
	}
	return idle
}

// freshLocked returns the oldest fresh connection of the client that has most
// connections, if those are more than a quarter of the places. It looks at MaxConns
// at most.
func (s *edgeConns) freshLocked() (oldest *edgeConn) {
	most := max(1, s.max/4)
	for e := s.fresh.Back(); e != nil; e = e.Prev() {
		c := e.Value.(*edgeConn)
		if n := s.by[c.key]; n > most { // by has nothing for trusted proxies
			oldest, most = c, n
		}
	}
	return oldest
}

// evictAfter is how long a connection must have been idle, or fresh, to be closed
// for a new one: longer than a client takes to send what it has waited to send.
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
	c := &edgeConn{Conn: raw, conns: s}
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		c.peer = tcp.AddrPort().Addr().Unmap().WithZone("")
		c.trusted = s.trusted(c.peer)
	} else {
		c.trusted = true // whoever may connect to a unix socket belongs to this machine
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.trusted {
		c.key = clientKey(c.peer)
		if s.perAddr > 0 && s.by[c.key] >= s.perAddr {
			if old := s.idleOfLocked(c.key); old != nil {
				s.evictLocked(old)
			} else {
				s.refused++
				s.leaveLocked()
				reset(raw)
				return nil
			}
		}
		s.by[c.key]++
	}
	s.putLocked(c, &s.fresh)
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

// evictLocked closes an idle or fresh connection. It closes what is below TLS, as
// that does not block: a client that is idle expects nothing.
func (s *edgeConns) evictLocked(c *edgeConn) {
	if c.list == &s.fresh {
		s.crowding++
	} else {
		s.evicted++
	}
	s.endLocked(c)
	_ = c.Conn.Close()
}

// endLocked gives back what c holds.
func (s *edgeConns) endLocked(c *edgeConn) {
	if c.left {
		return
	}
	c.left = true
	s.putLocked(c, nil)
	if c.key.IsValid() {
		if s.by[c.key]--; s.by[c.key] == 0 {
			delete(s.by, c.key)
		}
	}
	s.leaveLocked()
}

// putLocked moves c to the front of a list, or into none.
func (s *edgeConns) putLocked(c *edgeConn, to *list.List) {
	if c.list != nil {
		c.list.Remove(c.element)
	}
	c.list, c.element = to, nil
	if to != nil {
		c.element, c.since = to.PushFront(c), time.Now()
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
	if state != http.StateIdle {
		s.putLocked(c, nil)
		return
	}
	s.putLocked(c, &s.idle)
	s.change.Broadcast()
}

// closeFresh closes the connections on which no request has come yet.
func (s *edgeConns) closeFresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for e := s.fresh.Front(); e != nil; e = e.Next() {
		_ = e.Value.(*edgeConn).Conn.Close() // net/http notices, and closes the edgeConn
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

// mayTake reports whether a client that holds own places may have one more, when
// used of limit are taken: three times as many as it holds must stay free. Alone it
// gets a quarter so, several get less each, and 4/7 together if they are four:
// whoever comes next finds a place, and the more a client holds the more of the
// last ones are not for it.
//
// Requests of which nobody knows whose they are, as behind a proxy that does not
// say for whom it speaks, may be everybody's. They have no share but leave an
// eighth to those who have a name.
func mayTake(key netip.Addr, own, used, limit int) bool {
	if !key.IsValid() {
		return limit-used > limit/8
	}
	return limit-used > 3*own
}

// A fairSlots bounds how many of something run at once, in all and for one
// client, so that some clients cannot keep all the others from it. Of those who
// wait, the client that holds fewest is next, and among equals the first.
type fairSlots struct {
	max int

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
	return &fairSlots{max: n, by: map[netip.Addr]int{}}
}

var errNoSlot = errors.New("no slot was free in time")

// acquire waits for a slot for a client; the zero address is nobody's, see mayTake.
// The error is errNoSlot at the deadline, or ctx's.
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
	return mayTake(key, s.by[key], s.used, s.max)
}

func (s *fairSlots) takeLocked(key netip.Addr) {
	s.used++
	s.most = max(s.most, s.used)
	s.by[key]++
}

// release gives back what acquire took, and to those who wait what is free.
func (s *fairSlots) release(key netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used--; s.used < 0 {
		panic(fmt.Sprintf("netx: slot released that nobody held, of %d", s.max))
	}
	if s.by[key]--; s.by[key] == 0 {
		delete(s.by, key)
	}
	for e := s.nextLocked(); e != nil; e = s.nextLocked() {
		w := s.waiting.Remove(e).(*fairWaiter)
		s.takeLocked(w.key)
		close(w.turn)
	}
}

// nextLocked returns the waiter whose turn it is, nil if there is none or no slot
// for any. It looks at all: no more than there are requests held.
func (s *fairSlots) nextLocked() (next *list.Element) {
	fewest := 0
	for e := s.waiting.Front(); e != nil && s.used < s.max; e = e.Next() {
		key := e.Value.(*fairWaiter).key
		if n := s.by[key]; s.freeLocked(key) && (next == nil || n < fewest) {
			next, fewest = e, n
		}
	}
	return next
}

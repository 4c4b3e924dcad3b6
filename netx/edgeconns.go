package netx

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// edgeConns bounds an Edge's connections. Each of them is at all times in exactly one
// class, which says who may take its place when all are in use:
//
//	refused  what is left of a refused request's body is being thrown away
//	moving   a body is coming, or an answer going, and no request waits
//	head     a handshake or a request's head is coming
//	idle     it is between two requests
//	waiting  a request on it waits for its answer
//
// Whoever comes from a client that has fewer connections than another may take one of
// that other's, of the client that has most first; a client never takes from one that
// has fewer than itself, but it may take its own. What is refused gives way at once, and
// so does, after slowAfter, what moves more slowly than leastRate, whoever has it. Beyond
// that a head may take headAfter and an idle connection evictAfter, in which the next
// request may be on its way. What moves fast gives way only to a client that would have a
// quarter as many, and what waits for its answer only if its client has more than a quarter
// of all. Of a client's own only what is idle, refused or slow gives way.
//
// A new connection for which nothing gives way waits, and those behind it in the
// kernel's backlog; while one does, connections are closed after their next answer. One
// of a client that has several is closed instead.
//
// Connections that end before a request on them was taken are counted against their
// client: one that has wasted wasteBurst of them has wastePerSecond, and the others are
// closed before they cost a handshake.
//
// A client is an IPv4 address or an IPv6 /64. Half of what an IPv6 /48 has counts as
// each client's in it, if that is more.
type edgeConns struct {
	max, perAddr int
	leastRate    int64 // bytes a second
	trusted      func(netip.Addr) bool
	evictAfter   time.Duration
	headAfter    time.Duration

	mu     sync.Mutex
	change sync.Cond                    // a connection left or changed its class, or a listener was closed; L is &mu
	all    map[*edgeConn]struct{}       // max at most
	last   int64                        // edgeConn.serial of the last one
	wanted int                          // new connections that wait for a place
	by     shares                       // connections of each client but trusted proxies
	wasted map[netip.Addr]*rate.Limiter // of clients that have wasted some; maxWasters at most

	most                                          int
	evicted, slow, crowding, overClient, wasteful uint64
}

const (
	// evictAfter is how long a connection must have been idle, or in another class, to be
	// closed for a new one: longer than a client takes to send what it has waited to send.
	evictAfter = 200 * time.Millisecond
	// headAfter is how long a handshake or a head may take while others wait: two round
	// trips to the other side of the world.
	headAfter = 500 * time.Millisecond
	// slowAfter is when a body or an answer is measured first.
	slowAfter = time.Second
	// wasteBurst and wastePerSecond are how many connections a client may waste.
	wasteBurst     = 64
	wastePerSecond = 4
	// maxWasters bounds the clients of which that is known. Beyond it the others are free.
	maxWasters = 4096
)

func newEdgeConns(limit, perAddr int, leastRate int64, trusted func(netip.Addr) bool) *edgeConns {
	s := &edgeConns{max: limit, perAddr: perAddr, leastRate: leastRate, trusted: trusted, evictAfter: evictAfter, headAfter: headAfter, all: map[*edgeConn]struct{}{}, by: newShares(), wasted: map[netip.Addr]*rate.Limiter{}}
	s.change.L = &s.mu
	return s
}

// edgeConn is a connection of an Edge. It counts the bytes that pass.
type edgeConn struct {
	net.Conn
	conns   *edgeConns
	peer    netip.Addr // zero on a unix socket
	trusted bool       // the peer is a proxy whose X-Forwarded-For is believed
	key     netip.Addr // its client; zero if it is trusted, which has no share
	serial  int64      // counts up with each
	moved   atomic.Int64

	// Guarded by conns.mu.
	phases  [numPhases]int // requests on it
	resting bool           // it is between two requests
	drains  bool           // net/http throws away what is left of a refused request's body
	class   connClass
	since   time.Time // when it came into its class
	from    int64     // moved then
	used    bool      // a request on it was taken
	left    bool      // its place has been given back
}

// phase is what a request does with its connection.
type phase uint8

const (
	phaseNone   phase = iota
	phaseRefuse       // it is refused, or its body no longer wanted
	phaseRead         // its body is read, or waited for
	phaseWait         // it waits for its answer
	phaseWrite        // its answer is written
	numPhases
)

// connClass is the class of a connection.
type connClass uint8

const (
	classHead connClass = iota
	classRefused
	classMoving
	classIdle
	classWaiting
)

// classLocked returns the class that c belongs to.
func (c *edgeConn) classLocked() connClass {
	switch {
	case c.phases[phaseWait] > 0:
		return classWaiting
	case c.phases[phaseRead]+c.phases[phaseWrite] > 0:
		return classMoving
	case c.phases[phaseRefuse] > 0, c.drains:
		return classRefused
	case c.resting:
		return classIdle
	}
	return classHead
}

func (c *edgeConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.moved.Add(int64(n))
	return n, err
}

func (c *edgeConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.moved.Add(int64(n))
	return n, err
}

// setLocked notes that what c does has changed.
func (c *edgeConn) setLocked(now time.Time) {
	if class := c.classLocked(); class != c.class {
		c.class, c.since, c.from = class, now, c.moved.Load()
		c.conns.change.Broadcast()
	}
}

// phase moves a request on c from one phase to another.
func (c *edgeConn) phase(from, to phase) {
	s := c.conns
	s.mu.Lock()
	defer s.mu.Unlock()
	if from != phaseNone {
		if c.phases[from]--; c.phases[from] < 0 {
			panic(fmt.Sprintf("netx: more requests left phase %d than came", from))
		}
	}
	if to != phaseNone {
		c.phases[to]++
	}
	c.used = c.used || to == phaseWait
	c.setLocked(time.Now())
}

// drain notes that net/http goes on to read a body that nobody wants.
func (c *edgeConn) drain() {
	c.conns.mu.Lock()
	defer c.conns.mu.Unlock()
	c.drains = true
	c.setLocked(time.Now())
}

// state is http.Server.ConnState.
func (s *edgeConns) state(conn net.Conn, state http.ConnState) {
	c := edgeConnOf(conn)
	if h, ok := conn.(*headConn); ok && state == http.StateIdle {
		h.guard.next() // net/http reads nothing meanwhile
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if state == http.StateNew || c.left {
		return
	}
	c.resting = state == http.StateIdle
	c.drains = c.drains && !c.resting
	c.setLocked(time.Now())
}

// admit waits for a place for a new connection. It returns nil, and has closed raw, if
// there is none for its client, or the listener is closed.
func (s *edgeConns) admit(l *edgeListener, raw net.Conn) *edgeConn {
	c := &edgeConn{Conn: raw, conns: s}
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		c.peer = tcp.AddrPort().Addr().Unmap().WithZone("")
		c.trusted = s.trusted(c.peer)
	} else {
		c.trusted = true // whoever may connect to a unix socket belongs to this machine
	}
	if !c.trusted {
		c.key = clientKey(c.peer)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.roomLocked(l, c.key) {
		reset(raw)
		return nil
	}
	s.last++
	c.serial = s.last
	s.all[c] = struct{}{}
	if !c.trusted {
		s.by.add(c.key, 1)
	}
	s.most = max(s.most, len(s.all))
	c.since = time.Now()
	return c
}

// roomLocked waits until there is a place for one more connection of a client.
func (s *edgeConns) roomLocked(l *edgeListener, key netip.Addr) bool {
	if w := s.wasted[key]; w != nil && w.Tokens() < 1 {
		s.wasteful++
		return false
	}
	for !l.closed {
		now := time.Now()
		own := key.IsValid() && s.perAddr > 0 && s.by.own(key) >= s.perAddr
		if !own && len(s.all) < s.max {
			return true
		}
		victim, next := s.victimLocked(key, own, now)
		switch {
		case victim != nil:
			s.evictLocked(victim)
			continue
		case own, key.IsValid() && s.by.weight(key) > 1:
			s.overClient++
			return false
		}
		stop := func() bool { return false }
		if next > 0 {
			stop = time.AfterFunc(next, s.wake).Stop
		}
		s.wanted++
		s.change.Wait()
		s.wanted--
		stop()
	}
	return false
}

// victimLocked returns the connection that gives way to one more of a client; only
// one of its own if own says so. If there is none, next is when there may be one, or 0.
// It looks at all: max at most.
func (s *edgeConns) victimLocked(key netip.Addr, own bool, now time.Time) (victim *edgeConn, next time.Duration) {
	weight, quarter := s.by.weight(key), max(1, s.max/4)
	var best [4]int64 // what victim is chosen by: the least
	for c := range s.all {
		mine := key.IsValid() && c.key == key
		if own && !mine {
			continue
		}
		n := s.by.weight(c.key)
		crowds := !mine && n > weight && (n > quarter || n >= 4*(weight+1))
		wait, ok := c.givesWayLocked(now, crowds, n > quarter, mine)
		if !ok {
			continue
		}
		free := c.class == classRefused || c.class == classMoving && !crowds // whoever asks
		if !free && !mine && n <= weight {
			continue
		}
		if wait > 0 {
			if next == 0 || wait < next {
				next = wait
			}
			continue
		}
		rank := [4]int64{1, int64(-n), c.since.UnixNano(), c.serial}
		if free {
			rank[0] = 0
		} else if c.class == classWaiting {
			rank[0] = 2
		}
		if victim == nil || cmpRank(rank, best) < 0 {
			victim, best = c, rank
		}
	}
	return victim, next
}

func cmpRank(a, b [4]int64) int {
	for i := range a {
		if c := cmp.Compare(a[i], b[i]); c != 0 {
			return c
		}
	}
	return 0
}

// givesWayLocked returns how long it takes until c may be closed for another one; ok is
// false if that depends on what it does until then.
func (c *edgeConn) givesWayLocked(now time.Time, crowds, quarter, mine bool) (wait time.Duration, ok bool) {
	age, evictAfter := now.Sub(c.since), c.conns.evictAfter
	after := func(d time.Duration) (time.Duration, bool) { return max(0, d-age), true }
	switch c.class {
	case classRefused:
		return 0, true
	case classHead:
		if crowds {
			return after(evictAfter)
		}
		wait, ok = after(c.conns.headAfter)
		return wait, ok && !mine
	case classIdle:
		if mine { // its client has chosen another one
			return 0, true
		}
		return after(evictAfter)
	case classMoving:
		if crowds {
			return after(evictAfter)
		}
		if age < slowAfter {
			return slowAfter - age, true
		}
		if c.moved.Load()-c.from < int64(age.Seconds()*float64(c.conns.leastRate)) {
			return 0, true
		}
		return slowAfter, true // it is looked at again
	}
	wait, _ = after(evictAfter)
	return wait, crowds && quarter
}

// wake has all that wait look again. It takes the lock so that it cannot come between a
// look and the waiting.
func (s *edgeConns) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.change.Broadcast()
}

// crowded reports whether connections should make room after their next answer.
func (s *edgeConns) crowded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wanted > 0
}

// evictLocked closes a connection for a new one. It closes what is below TLS, as that
// does not block.
func (s *edgeConns) evictLocked(c *edgeConn) {
	switch c.class {
	case classIdle:
		s.evicted++
	case classMoving:
		s.slow++
	default:
		s.crowding++
	}
	s.endLocked(c)
	reset(c.Conn)
}

// endLocked gives back what c holds.
func (s *edgeConns) endLocked(c *edgeConn) {
	if c.left {
		return
	}
	c.left = true
	delete(s.all, c)
	if !c.used {
		s.wasteLocked(c.key)
	}
	if !c.trusted {
		s.by.add(c.key, -1)
	}
	s.change.Broadcast()
}

// wasteLocked counts a connection that ended before a request on it was taken.
func (s *edgeConns) wasteLocked(key netip.Addr) {
	if !key.IsValid() {
		return
	}
	w := s.wasted[key]
	if w == nil {
		if len(s.wasted) >= maxWasters {
			maps.DeleteFunc(s.wasted, func(_ netip.Addr, w *rate.Limiter) bool { return w.Tokens() >= wasteBurst })
		}
		if len(s.wasted) >= maxWasters {
			return
		}
		w = rate.NewLimiter(wastePerSecond, wasteBurst)
		s.wasted[key] = w
	}
	w.Allow() // what cannot be taken is gone already
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

// closeFresh closes the connections on which no request has come yet.
func (s *edgeConns) closeFresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		if c.class == classHead {
			_ = c.Conn.Close() // whoever reads from it notices, and closes the edgeConn
		}
	}
}

// reset closes a connection so that its client does not take what it got for
// complete, and so that it leaves nothing in the kernel.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only on a connection that is broken already
	}
	_ = c.Close()
}

package netx

import (
	"bufio"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"fsbus/bus/matrix"
)

// honest does a signed server's request from an address, and says how long it took.
func (et *edgeTest) honest(from string) time.Duration {
	et.t.Helper()
	start := time.Now()
	c := et.dial(from)
	write(et.t, c, "PUT /honest HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
	if res, _ := readReply(et.t, bufio.NewReader(c), "PUT"); res.StatusCode != 200 {
		et.t.Error(res.Status)
	}
	return time.Since(start)
}

// Connections with a head and an unsent body, of one address or of sixteen, refused or
// not, keep nobody else waiting.
func TestEdgeUnsentBodies(t *testing.T) {
	for _, target := range []string{"/refused", "/taken"} {
		for _, addrs := range []int{1, 16} {
			t.Run(fmt.Sprint(target, " from ", addrs), func(t *testing.T) {
				const places = 64
				et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
					c.MaxConns, c.MaxRequests = places, places
					c.Handle = reply
					c.Check = func(q *EdgeRequest) *EdgeRefusal {
						if q.Target == "/refused" {
							return &EdgeRefusal{Status: 404, Errcode: matrix.MUnrecognized}
						}
						return nil
					}
				})
				for i := range 2 * places {
					et.tries(fmt.Sprintf("127.0.3.%d", i%addrs+1), "PUT "+target+" HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n")
				}
				eventually(t, "it has all that it may", func() bool { s := et.Stats(); return s.MaxOpen == places || s.Dropped+s.Wasteful > 0 })
				for range 5 {
					if took := et.honest("127.0.0.2"); took > testWait/2 {
						t.Errorf("another one waits %v", took)
					}
				}
				if s := et.Stats(); s.MaxOpen > places || s.MaxHeld > places || s.Crowding+s.Slow+s.OverAddr+s.Dropped+s.Wasteful == 0 {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

// What is refused is read for half a second at most.
func TestEdgeRefusedIsNotReadForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		et := newEdge(t, func(c *EdgeConfig) {
			c.Check = func(*EdgeRequest) *EdgeRefusal { return &EdgeRefusal{Status: 404, Errcode: matrix.MUnrecognized} }
		})
		ln := newPipeListener()
		et.serveListener(ln)
		c := ln.dial()
		start := time.Now()
		go trickle(c, "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n", "x")
		br := bufio.NewReader(c)
		if res, _ := readReply(t, br, "PUT"); res.StatusCode != 404 || !res.Close {
			t.Errorf("%v", res)
		}
		if took := time.Since(start); took != edgeLinger {
			t.Errorf("it took %v", took)
		}
		for c := range et.conns.all {
			if c.class != classRefused {
				t.Errorf("class %d", c.class)
			}
		}
		c.Close()
		et.close()
		time.Sleep(2 * time.Second) // trickle ends
	})
}

// Slow bodies of sixteen addresses do not keep others' from being read.
func TestEdgeSlowBodiesGiveWay(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.MaxReading = 4
		c.Handle = reply
	})
	for i := range 16 {
		write(t, et.dial(fmt.Sprintf("127.0.3.%d", i+1)), "PUT /slow HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n{")
	}
	eventually(t, "all places are taken", func() bool { return et.Stats().Reading == 4 })
	for range 3 {
		et.honest("127.0.0.2")
	}
	if s := et.Stats(); s.Slow == 0 || s.MaxReading > 4 || s.Refused[408] == 0 {
		t.Errorf("%+v", s)
	}
}

// Streams that nobody reads the answers of are bounded in all, whatever answers them.
func TestEdgeUnreadStreams(t *testing.T) {
	const most = 16
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.TLS = testCertificates(t)
		c.MaxRequests = most
		c.Handle = reply
		c.Check = func(q *EdgeRequest) *EdgeRefusal {
			if q.Target == "/refused" {
				return &EdgeRefusal{Status: 404, Errcode: matrix.MUnrecognized, Message: strings.Repeat("x", 100)}
			}
			return nil
		}
	})
	before := runtime.NumGoroutine()
	const conns, streams = 10, 20
	for i := range conns {
		c := newH2Client(et.dialTLS("h2"))
		c.frame(h2Settings, 0, 0, []byte{0, 4, 0, 0, 0, 0}) // no window
		go func() {                                         // reads on until the connection ends
			for err := error(nil); err == nil; {
				_, _, _, _, err = c.read()
			}
		}()
		for s := range streams {
			c.headers(uint32(2*s+1), true, "GET", []string{"/refused", "/x"}[i%2])
		}
	}
	eventually(t, "they are dropped", func() bool { return et.Stats().Dropped >= conns*streams/2 })
	if n := runtime.NumGoroutine() - before; n > most+MaxRefusals(most)+conns*5 {
		t.Errorf("%d goroutines", n)
	}
	if s := et.Stats(); s.MaxHeld > most {
		t.Errorf("%+v", s)
	}
}

// Every connection is in exactly one class, by what its requests do.
func TestConnClasses(t *testing.T) {
	s, _, _ := connsOf(t, "", "203.0.113.1")
	var c *edgeConn
	for c = range s.all {
	}
	is := func(what string, want connClass) {
		t.Helper()
		if c.class != want {
			t.Errorf("%s: class %d, want %d", what, c.class, want)
		}
	}
	is("a new one", classHead)
	c.phase(phaseNone, phaseRead)
	is("a body", classMoving)
	c.phase(phaseRead, phaseWait)
	is("a request that waits", classWaiting)
	c.phase(phaseNone, phaseRead)
	is("a body beside it", classWaiting)
	c.phase(phaseWait, phaseWrite)
	is("an answer", classMoving)
	c.phase(phaseWrite, phaseNone)
	c.phase(phaseRead, phaseRefuse)
	is("a refusal", classRefused)
	c.drain()
	c.phase(phaseRefuse, phaseNone)
	is("what is left of its body", classRefused)
	s.state(c, http.StateIdle)
	is("then nothing", classIdle)
	s.state(c, http.StateActive)
	is("the next head", classHead)
}

// Who gives way, by class, age and how many its client has.
func TestWhoGivesWay(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for _, test := range []struct {
		name   string
		change func(c *edgeConn)
		crowds bool
		ok     bool
		wait   time.Duration
	}{
		{"refused", func(c *edgeConn) { c.class = classRefused }, false, true, 0},
		{"a head", func(c *edgeConn) { c.class = classHead }, false, true, headAfter},
		{"an old head", func(c *edgeConn) { c.class, c.since = classHead, ago(time.Hour) }, false, true, 0},
		{"a head of who crowds", func(c *edgeConn) { c.class = classHead }, true, true, evictAfter},
		{"idle", func(c *edgeConn) { c.class = classIdle }, false, true, evictAfter},
		{"slow, and young", func(c *edgeConn) { c.class = classMoving }, false, true, slowAfter},
		{"slow", func(c *edgeConn) { c.class, c.since = classMoving, ago(2*time.Second); c.moved.Store(1999) }, false, true, 0},
		{"fast", func(c *edgeConn) { c.class, c.since = classMoving, ago(2*time.Second); c.moved.Store(2000) }, false, true, slowAfter},
		{"fast, since it counts from here", func(c *edgeConn) { c.class, c.since, c.from = classMoving, ago(2*time.Second), 1; c.moved.Store(2000) }, false, true, 0},
		{"fast, of who crowds", func(c *edgeConn) { c.class, c.since = classMoving, ago(2*time.Second); c.moved.Store(2000) }, true, true, 0},
		{"waiting", func(c *edgeConn) { c.class, c.since = classWaiting, ago(time.Hour) }, false, false, 0},
		{"waiting, of who crowds", func(c *edgeConn) { c.class, c.since = classWaiting, ago(time.Hour) }, true, true, 0},
	} {
		s := newEdgeConns(8, 0, 1000, nil)
		c := &edgeConn{conns: s, since: now}
		test.change(c)
		if wait, ok := c.givesWayLocked(now, test.crowds, test.crowds, false); ok != test.ok || ok && wait != test.wait {
			t.Errorf("%s: %v, %v", test.name, wait, ok)
		}
	}
}

// A client never takes from one that has fewer.
func TestNobodyTakesFromWhoHasFewer(t *testing.T) {
	s, l, conns := connsOf(t, "", "203.0.113.1", "203.0.113.2", "203.0.113.2", "203.0.113.2")
	s.mu.Lock()
	for c := range s.all {
		c.class, c.since = classIdle, time.Now().Add(-time.Hour)
		if c.peer.As4()[3] == 1 {
			c.since = time.Now().Add(-2 * time.Hour)
		}
	}
	s.mu.Unlock()
	if s.admit(l, &peerConn{peer: conns[1].peer}) == nil || conns[0].closed {
		t.Error("who has most takes the oldest one of another")
	}
	s.mu.Lock()
	for c := range s.all {
		c.class, c.since = classWaiting, time.Now()
	}
	s.mu.Unlock()
	s.evictAfter = time.Hour
	more := &peerConn{peer: conns[1].peer}
	if s.admit(l, more) != nil || !more.closed || s.overClient != 1 {
		t.Error("who has a quarter of all waits for more, and others behind")
	}
}

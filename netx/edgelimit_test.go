package netx

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// pipeListener hands out the ends of pipes, for tests with a clock of their own.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  func()
}

func newPipeListener() *pipeListener {
	l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
	l.once = sync.OnceFunc(func() { close(l.done) })
	return l
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once(); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (l *pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	l.conns <- server
	return client
}

// trickle sends s and then a byte a second for as long as they are taken. It
// returns how long that was.
func trickle(c net.Conn, s, drop string) time.Duration {
	start := time.Now()
	_, err := io.WriteString(c, s)
	for err == nil {
		time.Sleep(time.Second)
		_, err = io.WriteString(c, drop)
	}
	return time.Since(start)
}

func within2s(got, want time.Duration) bool { return got >= want && got <= want+2*time.Second }

// Clients that are slow on purpose lose their connection when the time-outs say
// so, whatever they send meanwhile.
func TestEdgeSlowClients(t *testing.T) {
	certs := testCertificates(t)
	for _, test := range []struct {
		name   string
		tls    bool
		run    func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration
		want   time.Duration
		status int // of the answer
	}{
		{name: "silence", want: defaultHeaderTimeout, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			start := time.Now()
			io.Copy(io.Discard, dial())
			return time.Since(start)
		}},
		{name: "slow header", want: defaultHeaderTimeout, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			return trickle(dial(), "GET /x HTTP/1.1\r\nHost: h\r\nX: ", "x")
		}},
		{name: "slow second header", want: defaultHeaderTimeout, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			c := dial()
			io.WriteString(c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
			reply1 := make(chan *EdgeRequest, 1)
			go func() { q := <-et.requests; reply1 <- q; reply(q) }()
			readReply(t, bufio.NewReader(c), "GET")
			<-reply1
			time.Sleep(defaultEdgeIdleTimeout / 2)
			go io.Copy(io.Discard, c) // net/http answers a line that does not end with 400
			return trickle(c, "GET /", "x")
		}},
		{name: "idle", want: defaultEdgeIdleTimeout, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			c := dial()
			io.WriteString(c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
			go func() { reply(<-et.requests) }()
			readReply(t, bufio.NewReader(c), "GET")
			start := time.Now()
			io.Copy(io.Discard, c)
			return time.Since(start)
		}},
		{name: "slow body", want: defaultBodyTimeout, status: 408, run: slowBody("PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n", "x")},
		{name: "slow chunks", want: defaultBodyTimeout, status: 408, run: slowBody("PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n")},
		{name: "slow handshake", tls: true, want: defaultHeaderTimeout, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			return trickle(dial(), "\x16\x03\x01\x02\x00\x01", "\x00")
		}},
		{name: "slow HTTP/2 header", tls: true, want: defaultEdgeIdleTimeout, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			c := tls.Client(dial(), clientTLS("h2"))
			go io.Copy(io.Discard, c)
			h := newH2Client(c)
			h.frame(h2Headers, 0, 1, hpack(":method", "GET"))
			return trickle(c, "", string([]byte{0, 0, 0, h2Continuation, 0, 0, 0, 0, 1}))
		}},
		{name: "slow HTTP/2 body", tls: true, want: defaultBodyTimeout, status: 408, run: func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
			c := tls.Client(dial(), clientTLS("h2"))
			h := newH2Client(c)
			start := time.Now()
			h.headers(1, false, "PUT", "/x")
			go trickle(c, "", string([]byte{0, 0, 1, h2Data, 0, 0, 0, 0, 1, 'x'}))
			if _, _, err := h.until(h2Headers); err != nil {
				t.Error(err)
			}
			took := time.Since(start)
			c.Close()
			return took
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				et := newEdge(t, func(c *EdgeConfig) {
					if test.tls {
						c.TLS = certs
					}
				})
				ln := newPipeListener()
				et.serveListener(ln)
				took := test.run(t, et, ln.dial)
				if !within2s(took, test.want) {
					t.Errorf("it took %v instead of %v", took, test.want)
				}
				time.Sleep(5 * time.Second) // what net/http gives connections to end
				synctest.Wait()
				s := et.Stats()
				if s.Open != 1 || s.Held != 0 || s.Reading != 0 || test.status != 0 && s.Refused[test.status] != 1 {
					t.Errorf("%+v", s)
				}
				et.close()
				et.checkSpool()
			})
		})
	}
}

func slowBody(head, drop string) func(*testing.T, *edgeTest, func() net.Conn) time.Duration {
	return func(t *testing.T, et *edgeTest, dial func() net.Conn) time.Duration {
		c := dial()
		start := time.Now()
		go trickle(c, head, drop)
		res, _ := readReply(t, bufio.NewReader(c), "PUT")
		took := time.Since(start)
		if res.StatusCode != 408 || !res.Close {
			t.Errorf("%v", res)
		}
		c.Close()
		return took
	}
}

// bodies returns how many bodies are read or wait for a place.
func (et *edgeTest) bodies() int {
	et.reading.mu.Lock()
	defer et.reading.mu.Unlock()
	return et.reading.used + et.reading.waiting.Len()
}

// One client that sends its bodies slowly has a quarter of the places, and the
// others do not notice.
func TestEdgeReadingIsShared(t *testing.T) {
	et := newEdgeTest(t, "unix", func(c *EdgeConfig) {
		c.MaxReading = 8
		c.Handle = reply
	})
	const slow = 20
	for range slow {
		write(t, et.dial(), "PUT /slow HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.1\r\nContent-Length: 9\r\n\r\n{")
	}
	eventually(t, "all are read or wait", func() bool { return et.bodies() == slow })
	for i := range 5 {
		c := et.dial()
		write(t, c, fmt.Sprintf("PUT /x HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.%d\r\nContent-Length: 2\r\n\r\n{}", i+2))
		if res, _ := readReply(t, bufio.NewReader(c), "PUT"); res.StatusCode != 200 {
			t.Fatal(res.Status)
		}
	}
	if s := et.Stats(); s.Reading != 2 || s.MaxReading != 3 {
		t.Errorf("%+v", s)
	}
}

// Four clients that send their bodies slowly do not have all places: whoever comes
// next, and the one after that, need not wait.
func TestEdgeReadingLeavesRoom(t *testing.T) {
	et := newEdgeTest(t, "unix", func(c *EdgeConfig) {
		c.MaxReading, c.MaxRequests = 16, 256
		c.BodyTimeout = time.Hour
		c.Handle = reply
	})
	const each = 10
	for i := range 4 * each {
		write(t, et.dial(), fmt.Sprintf("PUT /slow HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.%d\r\nContent-Length: 9\r\n\r\n{", i%4))
	}
	eventually(t, "all are read or wait", func() bool { return et.bodies() == 4*each })
	for i := range 5 {
		c := et.dial()
		write(t, c, fmt.Sprintf("PUT /x HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 198.51.100.%d\r\nContent-Length: 2\r\n\r\n{}", i))
		if res, _ := readReply(t, bufio.NewReader(c), "PUT"); res.StatusCode != 200 {
			t.Fatal(res.Status)
		}
	}
	// 4/7 of 16 when they come in turn, and up to 12 when they do not.
	if s := et.Stats(); s.Reading < 9 || s.Reading > 12 || et.bodies() != 4*each {
		t.Errorf("%+v", s)
	}
}

// A client that announces a body and sends none has no place among those that are
// read; with the first byte it has one. MaxReading is the most.
func TestEdgeReadingBeginsWithTheFirstByte(t *testing.T) {
	et := newEdgeTest(t, "unix", func(c *EdgeConfig) {
		c.MaxReading = 2
		c.BodyTimeout = time.Hour
		c.Handle = reply
	})
	var conns []net.Conn
	for i := range 4 {
		conns = append(conns, et.dial())
		write(t, conns[i], fmt.Sprintf("PUT /slow HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.%d\r\nContent-Length: 2\r\n\r\n", i))
	}
	eventually(t, "all are held", func() bool { return et.Stats().Held == len(conns) })
	c := et.dial()
	write(t, c, "PUT /x HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 198.51.100.1\r\nContent-Length: 2\r\n\r\n{}")
	if res, _ := readReply(t, bufio.NewReader(c), "PUT"); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	if s := et.Stats(); s.Reading != 0 || s.MaxReading != 1 {
		t.Errorf("%+v", s)
	}
	waiting := func(n int) func() bool {
		return func() bool {
			et.reading.mu.Lock()
			defer et.reading.mu.Unlock()
			return et.reading.waiting.Len() == n
		}
	}
	for i, c := range conns {
		write(t, c, "{")
		if i < 2 {
			eventually(t, "it is read", func() bool { return et.Stats().Reading == i+1 })
		} else {
			eventually(t, "it waits", waiting(i-1))
		}
	}
	for i, c := range conns { // the third goes on when the first is through
		write(t, c, "}")
		if res, _ := readReply(t, bufio.NewReader(c), "PUT"); res.StatusCode != 200 {
			t.Errorf("%d: %s", i, res.Status)
		}
	}
	if s := et.Stats(); s.MaxReading != 2 || !waiting(0)() {
		t.Errorf("%+v", s)
	}
}

func TestMayTake(t *testing.T) {
	a := netip.MustParseAddr("203.0.113.1")
	for _, test := range []struct {
		key              netip.Addr
		own, used, limit int
		want             bool
	}{
		{a, 0, 0, 1, true}, {a, 0, 1, 1, false}, {a, 1, 1, 2, false},
		{a, 0, 15, 16, true}, {a, 0, 16, 16, false}, // the first for as long as there are any
		{a, 1, 12, 16, true}, {a, 1, 13, 16, false}, // the last three are not for who has one
		{a, 63, 63, 256, true}, {a, 64, 64, 256, false}, // alone a quarter
		{netip.Addr{}, 100, 223, 256, true}, {netip.Addr{}, 100, 224, 256, false}, {netip.Addr{}, 0, 224, 256, false},
		{netip.Addr{}, 0, 0, 1, true}, {netip.Addr{}, 1, 1, 1, false},
	} {
		if got := mayTake(test.key, test.own, test.used, test.limit); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
	// However many are greedy, somebody new finds a place, and at the end each of
	// them has about as many as the others.
	for clients := 1; clients <= 20; clients++ {
		const limit = 256
		own, used := make([]int, clients), 0
		for range limit {
			for i := range own {
				if mayTake(a, own[i], used, limit) {
					own[i]++
					used++
				}
			}
		}
		if want := clients * limit / (clients + 3); used < want || used > want+clients || !mayTake(a, 0, used, limit) {
			t.Errorf("%d clients hold %d, want %d", clients, used, want)
		}
		if most, fewest := slices.Max(own), slices.Min(own); most > fewest+1 {
			t.Errorf("of %d clients one holds %d and another one %d", clients, most, fewest)
		}
	}
}

// slotTest is a fairSlots in a bubble of its own.
type slotTest struct {
	t testing.TB
	*fairSlots
	until time.Time
}

func (s slotTest) acquire(ctx context.Context, key netip.Addr) <-chan error {
	done := make(chan error, 1)
	go func() { done <- s.fairSlots.acquire(ctx, key, s.until) }()
	synctest.Wait()
	return done
}

// release gives one back, and lets those go on who get it.
func (s slotTest) release(key netip.Addr) {
	s.fairSlots.release(key)
	synctest.Wait()
}

func (s slotTest) got(c <-chan error) bool {
	s.t.Helper()
	select {
	case err := <-c:
		if err != nil {
			s.t.Error(err)
		}
		return true
	default:
		return false
	}
}

func TestFairSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c, d := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("203.0.113.3"), netip.MustParseAddr("203.0.113.4")
		nobody := netip.Addr{}
		s := slotTest{t, newFairSlots(8), time.Now().Add(time.Minute)}
		ctx, cancel := context.WithCancel(t.Context())
		if !s.got(s.acquire(ctx, a)) || !s.got(s.acquire(ctx, a)) {
			t.Fatal("a has no share")
		}
		third, fourth := s.acquire(ctx, a), s.acquire(ctx, a)
		if s.got(third) || s.got(fourth) || !s.got(s.acquire(ctx, b)) {
			t.Fatal("a has more than its share, or b has to wait for it")
		}
		for range 4 {
			if !s.got(s.acquire(ctx, nobody)) {
				t.Fatal("the nameless have a share")
			}
		}
		nameless, late := s.acquire(t.Context(), nobody), s.acquire(t.Context(), b)
		if s.got(nameless) || s.got(late) || !s.got(s.acquire(ctx, c)) {
			t.Fatal("the last one is not for who has none")
		}
		newcomer := s.acquire(t.Context(), d)
		if s.got(newcomer) {
			t.Fatal("more slots than there are")
		}
		cancel()
		synctest.Wait()
		for _, gone := range []<-chan error{third, fourth} {
			if err := <-gone; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		s.release(nobody)
		if s.got(nameless) || s.got(late) || !s.got(newcomer) {
			t.Fatal("the newcomer does not get what is free")
		}
		s.release(c)
		if s.got(nameless) || s.got(late) {
			t.Fatal("the last one is taken")
		}
		s.release(nobody)
		if !s.got(nameless) || s.got(late) {
			t.Fatal("the nameless leave more than an eighth")
		}
		for i, key := range []netip.Addr{a, a, d} { // four free are more than three times one
			s.release(key)
			if s.got(late) != (i == 2) {
				t.Fatalf("b has another one with %d free, or not with 4", s.max-s.used)
			}
		}
		full := []netip.Addr{b, b, nobody, nobody, nobody}
		for s.used < s.max {
			key := netip.AddrFrom4([4]byte{198, 51, 100, byte(s.used)})
			if !s.got(s.acquire(t.Context(), key)) {
				t.Fatal("a free slot is not given")
			}
			full = append(full, key)
		}
		last := s.acquire(t.Context(), c)
		start := time.Now()
		if err := <-last; err != errNoSlot || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if s.used != 8 || s.most != 8 || s.waiting.Len() != 0 {
			t.Errorf("%d %d %d", s.used, s.most, s.waiting.Len())
		}
		for _, key := range full {
			s.release(key)
		}
		if s.used != 0 || len(s.by) != 0 {
			t.Errorf("%d %v", s.used, s.by)
		}
	})
}

// What becomes free is for the one who holds fewest, not for the one who has waited
// for longest; among equals it is.
func TestFairSlotsFewestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nobody, a, b := netip.Addr{}, netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
		s := slotTest{t, newFairSlots(4), time.Now().Add(time.Minute)}
		for range 4 {
			if !s.got(s.acquire(t.Context(), nobody)) {
				t.Fatal("they are free")
			}
		}
		waiting := []<-chan error{s.acquire(t.Context(), nobody), s.acquire(t.Context(), nobody), s.acquire(t.Context(), a), s.acquire(t.Context(), b)}
		for _, next := range []int{2, 3, 0, 1} {
			s.release(nobody)
			for i, w := range waiting {
				if s.got(w) != (i == next) {
					t.Fatalf("%d instead of %d", i, next)
				}
			}
		}
		for _, key := range []netip.Addr{a, b, nobody, nobody} {
			s.release(key)
		}
	})
}

// get does one request on a connection that stays open.
func getOn(t testing.TB, c net.Conn) {
	t.Helper()
	write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
	if res, _ := readReply(t, bufio.NewReader(c), "GET"); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
}

func closedByEdge(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection is not closed: %d, %v", n, err)
	}
}

// evictAtOnce has connections closed for new ones however short a time they have been
// idle.
func (et *edgeTest) evictAtOnce() {
	et.conns.mu.Lock()
	defer et.conns.mu.Unlock()
	et.conns.evictAfter = 0
}

// A client whose next request may be on its way is not cut off: while all have been
// idle for a short time only, connections end with their next answer.
func TestEdgeEvictsNoneThatHasJustBecomeIdle(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.MaxConns = 3
		c.Handle = reply
	})
	et.conns.mu.Lock()
	et.conns.evictAfter = time.Hour
	et.conns.mu.Unlock()
	a, b := et.dial(), et.dial()
	getOn(t, a)
	getOn(t, b)
	last := et.dial()
	write(t, last, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
	res, _ := readReply(t, bufio.NewReader(last), "GET") // the third, and nobody has a place
	if et.Stats().Evicted != 0 {
		t.Errorf("%+v", et.Stats())
	}
	if !res.Close {
		write(t, a, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		if res, _ = readReply(t, bufio.NewReader(a), "GET"); !res.Close {
			t.Error("the connection stays")
		}
	}
	getOn(t, et.dial()) // which has its place
	if s := et.Stats(); s.Evicted != 0 || s.MaxOpen != 3 {
		t.Errorf("%+v", s)
	}
}

// A new connection takes the place of the one that has been idle for longest.
func TestEdgeEvictsIdle(t *testing.T) {
	for _, https := range []bool{false, true} {
		t.Run(fmt.Sprint("tls ", https), func(t *testing.T) {
			const places = 5 // one of which is the listener's
			et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
				if https {
					c.TLS = testCertificates(t)
				}
				c.MaxConns = places
				c.Handle = reply
			})
			et.evictAtOnce()
			dial := func() net.Conn {
				if https {
					return et.dialTLS()
				}
				return et.dial()
			}
			var conns []net.Conn
			for i := range 20 {
				conns = append(conns, dial())
				getOn(t, conns[i])
				eventually(t, "it is idle", func() bool { return et.Stats().Idle == min(i+1, places-1) })
			}
			for i, c := range conns {
				if i < len(conns)-places+1 {
					closedByEdge(t, c)
				} else {
					getOn(t, c)
				}
			}
			if s := et.Stats(); s.MaxOpen != places || s.Evicted != 16 || s.Open != places {
				t.Errorf("%+v", s)
			}
		})
	}
}

// HTTP/2 connections are idle as well when they have no stream, and also before
// their first.
func TestEdgeEvictsIdleHTTP2(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.TLS = testCertificates(t)
		c.MaxConns = 2
		c.Handle = reply
	})
	et.evictAtOnce()
	var last *h2Client
	for i := range 3 {
		c := newH2Client(et.dialTLS("h2"))
		if i > 0 {
			for err := error(nil); err == nil; {
				_, _, _, _, err = last.read()
			}
			c.headers(1, true, "GET", "/x")
			if _, _, err := c.until(h2Headers); err != nil {
				t.Fatal(err)
			}
		}
		last = c
		eventually(t, "it is idle", func() bool { return et.Stats().Idle == 1 })
	}
	if s := et.Stats(); s.Evicted != 2 || s.Requests != 2 {
		t.Errorf("%+v", s)
	}
}

// When all connections are busy, a new one waits in the backlog.
func TestEdgeBacklog(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.MaxConns = 3 })
	var busy []*EdgeRequest
	for range 3 {
		write(t, et.dial(), "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		busy = append(busy, et.next())
	}
	waiting := et.dial() // the kernel takes it
	write(t, waiting, "GET /waits HTTP/1.1\r\nHost: h\r\n\r\n")
	if s := et.Stats(); s.Open != 3 || s.MaxOpen != 3 {
		t.Errorf("%+v", s)
	}
	select {
	case q := <-et.requests:
		t.Fatalf("%s has got through", q.Target)
	default:
	}
	reply(busy[0]) // which ends its connection
	q := et.next()
	if q.Target != "/waits" {
		t.Error(q.Target)
	}
	if s := et.Stats(); s.MaxOpen != 3 || s.Evicted != 0 {
		t.Errorf("%+v", s)
	}
	for _, q := range append(busy[1:], q) {
		reply(q)
	}
}

func TestEdgeConnsPerAddr(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.MaxConnsPerAddr = 2
		c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}
	})
	var busy []*EdgeRequest
	for range 2 {
		write(t, et.dial("127.0.0.2"), "GET /busy HTTP/1.1\r\nHost: h\r\n\r\n")
		busy = append(busy, et.next())
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	if third, err := d.Dial("tcp", et.addr.String()); err == nil { // else it was reset before we had it
		third.SetDeadline(time.Now().Add(testWait))
		closedByEdge(t, third)
		third.Close()
	}
	eventually(t, "it is counted", func() bool { return et.Stats().OverAddr == 1 })
	other := et.dial("127.0.0.3")
	write(t, other, "GET /other HTTP/1.1\r\nHost: h\r\n\r\n")
	reply(et.next())
	for range 4 {
		write(t, et.dial("127.0.0.9"), "GET /proxy HTTP/1.1\r\nHost: h\r\n\r\n")
		busy = append(busy, et.next())
	}
	reply(busy[0])
	eventually(t, "two are idle", func() bool { return et.Stats().Idle == 2 })
	again := et.dial("127.0.0.2") // takes the place of the client's own idle one
	write(t, again, "GET /again HTTP/1.1\r\nHost: h\r\n\r\n")
	busy = append(busy, et.next())
	for _, q := range busy[1:] {
		reply(q)
	}
	if s := et.Stats(); s.OverAddr != 1 || s.Evicted != 1 {
		t.Errorf("%+v", s)
	}
	et.close()
	eventually(t, "all are closed", func() bool { return et.Stats().Open == 0 })
	et.conns.mu.Lock()
	defer et.conns.mu.Unlock()
	if len(et.conns.by) != 0 || et.conns.fresh.Len() != 0 {
		t.Errorf("left over: %v, %d fresh", et.conns.by, et.conns.fresh.Len())
	}
}

func TestClientKey(t *testing.T) {
	for _, test := range [][2]string{
		{"203.0.113.5", "203.0.113.5"}, {"::ffff:203.0.113.5", "203.0.113.5"},
		{"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"}, {"2001:db8:1:2::9", "2001:db8:1:2::"},
	} {
		if got := clientKey(netip.MustParseAddr(test[0])); got.String() != test[1] {
			t.Errorf("%s: %v", test[0], got)
		}
	}
}

// Many connections that say nothing, each from an address of its own, hold the
// places for HeaderTimeout at most, and no memory but their own.
func TestEdgeManySilentConnections(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.MaxConns = 50
		c.HeaderTimeout = 50 * time.Millisecond
		c.Handle = reply
	})
	for i := range 250 {
		et.dial(fmt.Sprintf("127.0.1.%d", i+1))
	}
	c := et.dial()
	write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
	if res, _ := readReply(t, bufio.NewReader(c), "GET"); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	if s := et.Stats(); s.MaxOpen != 50 || s.Crowding != 0 {
		t.Errorf("%+v", s)
	}
}

// One address with any number of silent connections does not keep others out: its
// oldest ones go, until a quarter of the places is left to it.
func TestEdgeOneAddressLeavesConnections(t *testing.T) {
	for _, https := range []bool{false, true} {
		t.Run(fmt.Sprint("tls ", https), func(t *testing.T) {
			const places, silent = 8, 40
			et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
				if https {
					c.TLS = testCertificates(t)
				}
				c.MaxConns = places
				c.HeaderTimeout = time.Hour
				c.Handle = reply
			})
			et.evictAtOnce()
			dial := func(from string) net.Conn {
				c := et.dial(from)
				write(t, c, "\x16") // the beginning of a handshake, or of a method
				return c
			}
			var conns []net.Conn
			for range silent {
				conns = append(conns, dial("127.0.0.2"))
			}
			const kept = places - 1 // the listener has one
			eventually(t, "the first are closed", func() bool { return et.Stats().Crowding == silent-kept })
			for _, c := range conns[:silent-kept] {
				closedByEdge(t, c)
			}
			conns = conns[silent-kept:]

			// Others are let in, while it has more than a quarter.
			for i := range kept - places/4 {
				dial(fmt.Sprintf("127.0.0.%d", i+3))
				eventually(t, "it has a place", func() bool { return et.Stats().Crowding == uint64(silent-kept+i+1) })
				closedByEdge(t, conns[i])
			}
			dial("127.0.0.20")
			eventually(t, "all places are in use", et.conns.crowded)
			if s := et.Stats(); s.Open != places || s.MaxOpen != places || s.Crowding != silent-places/4 {
				t.Errorf("%+v", s)
			}
			// Now others wait for one of them to end.
			last := et.dial("127.0.0.21")
			conns[kept-1].Close()
			if https {
				c := tls.Client(last, clientTLS())
				getOn(t, c)
			} else {
				getOn(t, last)
			}
		})
	}
}

// peerConn is a connection from an address.
type peerConn struct {
	net.Conn
	peer   netip.AddrPort
	closed bool
}

func (c *peerConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.peer) }
func (c *peerConn) Close() error         { c.closed = true; return nil }

// connsOf is an edgeConns that is full of connections of these peers, the oldest
// first.
func connsOf(t *testing.T, trusted string, peers ...string) (s *edgeConns, l *edgeListener, conns []*peerConn) {
	t.Helper()
	s = newEdgeConns(len(peers), 0, func(a netip.Addr) bool { return a.String() == trusted })
	l = &edgeListener{conns: s}
	for _, p := range peers {
		c := &peerConn{peer: netip.AddrPortFrom(netip.MustParseAddr(p), 1)}
		if !s.enter(l) || s.admit(c) == nil {
			t.Fatal("no place for a connection")
		}
		conns = append(conns, c)
	}
	return s, l, conns
}

func TestEdgeConnsWhoMakesRoom(t *testing.T) {
	for _, test := range []struct {
		name  string
		peers string
		want  int // index of the one that is closed, -1 for none
	}{
		{"one has most", "a b b b c d e f", 1},
		{"a quarter is not more than one", "b b c c d d e e", -1},
		{"the one with most", "b b b c c c c e", 3},
		{"an IPv6 /64 is one", "d 6:1::1 6:1::2 6:1::3 b b c e", 1},
		{"another /64 is another", "6:1::1 6:2::1 6:3::1 6:4::1 b b c c", -1},
		{"a trusted proxy is nobody", "p p p p p b b c", -1},
		{"nor does it keep others", "p p b p c b p b", 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			var peers []string
			for _, p := range strings.Fields(test.peers) {
				switch {
				case strings.HasPrefix(p, "6:"):
					peers = append(peers, "2001:db8:0:"+p[2:])
				default:
					peers = append(peers, fmt.Sprintf("203.0.113.%d", p[0]))
				}
			}
			s, l, conns := connsOf(t, fmt.Sprintf("203.0.113.%d", 'p'), peers...)
			s.evictAfter = 0
			s.mu.Lock()
			c := s.nextLocked()
			s.mu.Unlock()
			if (c != nil) != (test.want >= 0) {
				t.Fatalf("%v is to be closed", c)
			}
			if c == nil {
				return
			}
			if !s.enter(l) {
				t.Fatal("no place")
			}
			for i, c := range conns {
				if c.closed != (i == test.want) {
					t.Errorf("connection %d: closed %v", i, c.closed)
				}
			}
		})
	}
}

// A connection of a client that has many is given as long as one that is idle.
func TestEdgeConnsFreshHasItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l, conns := connsOf(t, "", "203.0.113.1", "203.0.113.1", "203.0.113.1", "203.0.113.2")
		start := time.Now()
		if !s.enter(l) || time.Since(start) != evictAfter || !conns[0].closed || conns[1].closed || s.crowding != 1 {
			t.Errorf("after %v: %v", time.Since(start), conns)
		}
	})
}

// Without TLS there is no HTTP/2, and with TLS no plain HTTP.
func TestEdgeProtocols(t *testing.T) {
	plain := newEdgeTest(t, "tcp", nil)
	c := plain.dial()
	write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n")
	q := plain.next()
	if len(q.Header) != 0 {
		t.Errorf("%v", q.Header)
	}
	reply(q)
	if res, _ := readReply(t, bufio.NewReader(c), "GET"); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	secure := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = testCertificates(t) })
	c = secure.dial()
	write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
	if got, _ := io.ReadAll(c); !strings.HasPrefix(string(got), "HTTP/1.0 400") {
		t.Errorf("%q", got)
	}
	old := tls.Client(secure.dial(), &tls.Config{RootCAs: ca().pool, ServerName: "hs1.test", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
	if err := old.Handshake(); err == nil {
		t.Error("TLS 1.1")
	}
	eventually(t, "both are counted", func() bool { return secure.Stats().Handshake == 2 })
	if n := strings.Count(secure.log.String(), "ended badly"); n != 1 {
		t.Errorf("%d log lines", n)
	}
}

func TestEdgeServeAfterClose(t *testing.T) {
	et := newEdge(t, nil)
	et.Close()
	if err := et.Serve(must(net.Listen("tcp", "127.0.0.1:0"))); err != http.ErrServerClosed {
		t.Error(err)
	}
}

// failingListener fails once, as when there is no descriptor left.
type failingListener struct {
	net.Listener
	failed bool
}

func (l *failingListener) Accept() (net.Conn, error) {
	if !l.failed {
		l.failed = true
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

func TestEdgeOutlivesAcceptErrors(t *testing.T) {
	et := newEdge(t, func(c *EdgeConfig) { c.Handle = reply })
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	et.addr = ln.Addr()
	et.serveListener(&failingListener{Listener: ln})
	defer et.close()
	getOn(t, et.dial())
	if log := et.log.String(); !strings.Contains(log, "could not be accepted") {
		t.Error(log)
	}
	if s := et.Stats(); s.MaxOpen > 2 {
		t.Errorf("%+v", s)
	}
}

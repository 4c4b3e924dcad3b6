package netx

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
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
				if s.Open != 0 || s.Held != 0 || s.Reading != 0 || test.status != 0 && s.Refused[test.status] != 1 {
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
		c.MaxConns = 2
		c.Handle = reply
	})
	et.conns.mu.Lock()
	et.conns.evictAfter = time.Hour
	et.conns.mu.Unlock()
	a, b := et.dial("127.0.0.2"), et.dial("127.0.0.3")
	getOn(t, a)
	getOn(t, b)
	last := et.dial("127.0.0.4")
	eventually(t, "it waits", et.conns.crowded)
	write(t, a, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
	if res, _ := readReply(t, bufio.NewReader(a), "GET"); !res.Close {
		t.Error("the connection stays")
	}
	getOn(t, last) // which has its place
	if s := et.Stats(); s.Evicted != 0 || s.MaxOpen != 2 {
		t.Errorf("%+v", s)
	}
}

// A new connection takes the place of the one that has been idle for longest.
func TestEdgeEvictsIdle(t *testing.T) {
	for _, https := range []bool{false, true} {
		t.Run(fmt.Sprint("tls ", https), func(t *testing.T) {
			const places = 5
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
				eventually(t, "it is idle", func() bool { return et.Stats().Idle == min(i+1, places) })
			}
			for i, c := range conns {
				if i < len(conns)-places {
					closedByEdge(t, c)
				} else {
					getOn(t, c)
				}
			}
			if s := et.Stats(); s.MaxOpen != places || s.Evicted != 15 || s.Open != places {
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
		c.MaxConns = 1
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
	for i := range 3 {
		write(t, et.dial(fmt.Sprintf("127.0.0.%d", i+2)), "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		busy = append(busy, et.next())
	}
	waiting := et.dial()
	eventually(t, "it waits", et.conns.crowded)
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
	if len(et.conns.by.clients) != 0 || len(et.conns.all) != 0 {
		t.Errorf("left over: %v, %d", et.conns.by.clients, len(et.conns.all))
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

// tries connects from an address and writes, which may fail: it may be closed at once.
func (et *edgeTest) tries(from, text string) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	if c, err := d.Dial("tcp", et.addr.String()); err == nil {
		et.t.Cleanup(func() { c.Close() })
		_, _ = io.WriteString(c, text)
	}
}

// A client that has wasted many connections has no more for a while, and others have
// theirs.
func TestEdgeWastedConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l, _ := connsOf(t, "203.0.113.9", "203.0.113.8")
		s.max = 2
		comes := func(from string) *edgeConn {
			return s.admit(l, &peerConn{peer: netip.AddrPortFrom(netip.MustParseAddr(from), 1)})
		}
		for i := range wasteBurst {
			c := comes("203.0.113.1")
			if c == nil {
				t.Fatalf("no place after %d", i)
			}
			c.Close()
		}
		if comes("203.0.113.1") != nil || s.wasteful != 1 {
			t.Error("it has another one")
		}
		for _, from := range []string{"203.0.113.2", "203.0.113.9"} {
			for range 2 * wasteBurst { // of which none is wasted
				c := comes(from)
				if c == nil {
					t.Fatal("others have none")
				}
				c.phase(phaseNone, phaseWait)
				c.phase(phaseWait, phaseNone)
				c.Close()
			}
		}
		time.Sleep(time.Second / wastePerSecond)
		c := comes("203.0.113.1")
		if c == nil {
			t.Fatal("it has none later")
		}
		c.Close()

		// What is known of clients is bounded, and forgotten.
		for i := range maxWasters + 10 {
			c := comes(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).String())
			c.Close()
		}
		if n := len(s.wasted); n != maxWasters {
			t.Errorf("%d clients are remembered", n)
		}
		time.Sleep(time.Hour)
		comes("203.0.113.3").Close()
		if n := len(s.wasted); n != 1 {
			t.Errorf("%d clients are remembered after an hour", n)
		}
	})
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
			et.conns.mu.Lock()
			et.conns.headAfter = time.Hour
			et.conns.mu.Unlock()
			dial := func(from string) net.Conn {
				c := et.dial(from)
				write(t, c, "\x16") // the beginning of a handshake, or of a method
				return c
			}
			var conns []net.Conn
			for range places {
				conns = append(conns, dial("127.0.0.2"))
			}
			eventually(t, "it has all places", func() bool { return et.Stats().Open == places })
			for range silent - places { // further ones are closed at once
				et.tries("127.0.0.2", "\x16")
			}
			eventually(t, "they are counted", func() bool { return et.Stats().OverAddr == silent-places })

			// Others are let in, while it has more than a quarter.
			for i := range places - places/4 {
				dial(fmt.Sprintf("127.0.0.%d", i+3))
				eventually(t, "it has a place", func() bool { return et.Stats().Crowding == uint64(i+1) })
				closedByEdge(t, conns[i])
			}
			last := et.dial("127.0.0.20") // waits for one of them to end
			eventually(t, "all places are in use", et.conns.crowded)
			if s := et.Stats(); s.Open != places || s.MaxOpen != places || s.Crowding != places-places/4 {
				t.Errorf("%+v", s)
			}
			conns[places-1].Close()
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
	s = newEdgeConns(len(peers), 0, 1000, func(a netip.Addr) bool { return a.String() == trusted })
	l = &edgeListener{edge: &Edge{conns: s}}
	for _, p := range peers {
		c := &peerConn{peer: netip.AddrPortFrom(netip.MustParseAddr(p), 1)}
		if s.admit(l, c) == nil {
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
		{"but half of a /48 counts", "b 6:1::1 6:2::1 6:3::1 6:4::1 6:5::1 c d", 1},
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
			next := netip.MustParseAddr("198.51.100.1")
			s.mu.Lock()
			c, _ := s.victimLocked(next, false, time.Now())
			s.mu.Unlock()
			if (c != nil) != (test.want >= 0) {
				t.Fatalf("%v is to be closed", c)
			}
			if c == nil {
				return
			}
			if s.admit(l, &peerConn{peer: netip.AddrPortFrom(next, 1)}) == nil {
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
		if s.admit(l, &peerConn{peer: netip.MustParseAddrPort("203.0.113.3:1")}) == nil || time.Since(start) != evictAfter || !conns[0].closed || conns[1].closed || s.crowding != 1 {
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

package netx

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
)

// plan says what becomes of an attempt to connect to an address.
type plan struct {
	after time.Duration
	err   error // nil: it connects
}

// network is a fake of what a dialer connects to. It notes when each attempt
// began, and which connections are open.
type network struct {
	plans map[string]plan
	start time.Time

	mu            sync.Mutex
	attempts      []string
	running, peak int
	open          map[string]bool
}

type networkConn struct {
	net.Conn
	close func()
}

func (c networkConn) Close() error { c.close(); return c.Conn.Close() }

func (n *network) connect(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	n.mu.Lock()
	n.attempts = append(n.attempts, fmt.Sprintf("%s at %v", to.Addr(), time.Since(n.start)))
	n.running++
	n.peak = max(n.peak, n.running)
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.running--
		n.mu.Unlock()
	}()
	p := n.plans[to.Addr().String()]
	select {
	case <-time.After(p.after):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if p.err != nil {
		return nil, p.err
	}
	here, there := net.Pipe()
	n.mu.Lock()
	n.open[to.Addr().String()] = true
	n.mu.Unlock()
	return networkConn{here, func() {
		_ = there.Close()
		n.mu.Lock()
		delete(n.open, to.Addr().String())
		n.mu.Unlock()
	}}, nil
}

// stubborn is an attempt that succeeds although it was cancelled: it connected
// in the moment in which another did.
func (n *network) stubborn(_ context.Context, to netip.AddrPort) (net.Conn, error) {
	return n.connect(context.Background(), to)
}

func newTestDialer(n *network) *dialer {
	n.start, n.open = time.Now(), map[string]bool{}
	return &dialer{lookup: &fakeLookup{}, random: newLockedRand(centred{}), shakes: newHandshakes(-1), connect: 5 * time.Second,
		shake: 10 * time.Second, tls: newTLSConfig(&ClientConfig{}), now: time.Now, connectTo: n.connect}
}

func ports(list ...string) (a []netip.AddrPort) {
	for _, s := range list {
		a = append(a, netip.AddrPortFrom(netip.MustParseAddr(s), 8448))
	}
	return a
}

func errno(e syscall.Errno) error {
	return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", e)}
}

func TestRace(t *testing.T) {
	const ms = time.Millisecond
	const never = time.Hour
	refused, unreachable := errno(syscall.ECONNREFUSED), errno(syscall.ENETUNREACH)
	for _, tt := range []struct {
		name     string
		addrs    []string
		plans    map[string]plan
		want     string // the address that is connected
		failure  matrix.Failure
		attempts []string
		took     time.Duration
	}{
		{"one", []string{"192.0.2.1"}, map[string]plan{"192.0.2.1": {100 * ms, nil}}, "192.0.2.1", 0,
			[]string{"192.0.2.1 at 0s"}, 100 * ms},
		{"one is silent", []string{"192.0.2.1"}, map[string]plan{"192.0.2.1": {never, nil}}, "", matrix.FailTimeout,
			[]string{"192.0.2.1 at 0s"}, 5 * time.Second},
		{"the first is quick", []string{"192.0.2.1", "192.0.2.2"}, map[string]plan{"192.0.2.1": {249 * ms, nil}}, "192.0.2.1", 0,
			[]string{"192.0.2.1 at 0s"}, 249 * ms},
		{"the first is slow", []string{"192.0.2.1", "192.0.2.2"}, map[string]plan{"192.0.2.1": {400 * ms, nil}, "192.0.2.2": {200 * ms, nil}},
			"192.0.2.1", 0, []string{"192.0.2.1 at 0s", "192.0.2.2 at 250ms"}, 400 * ms},
		{"the first is silent", []string{"192.0.2.1", "192.0.2.2"}, map[string]plan{"192.0.2.1": {never, nil}, "192.0.2.2": {10 * ms, nil}},
			"192.0.2.2", 0, []string{"192.0.2.1 at 0s", "192.0.2.2 at 250ms"}, 260 * ms},
		{"the next follows a failure at once", []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"},
			map[string]plan{"192.0.2.1": {10 * ms, refused}, "192.0.2.2": {20 * ms, refused}, "192.0.2.3": {5 * ms, nil}},
			"192.0.2.3", 0, []string{"192.0.2.1 at 0s", "192.0.2.2 at 10ms", "192.0.2.3 at 30ms"}, 35 * ms},
		{"no more than two at a time", []string{"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"},
			map[string]plan{"192.0.2.1": {never, nil}, "192.0.2.2": {never, nil}, "192.0.2.3": {never, nil}, "192.0.2.4": {ms, nil}},
			"192.0.2.4", 0,
			[]string{"192.0.2.1 at 0s", "192.0.2.2 at 250ms", "192.0.2.3 at 5s", "192.0.2.4 at 5.25s"}, 5251 * ms},
		{"all fail", []string{"192.0.2.1", "192.0.2.2"}, map[string]plan{"192.0.2.1": {ms, refused}, "192.0.2.2": {ms, unreachable}},
			"", matrix.FailRefused, []string{"192.0.2.1 at 0s", "192.0.2.2 at 1ms"}, 2 * ms},
		{"no IPv6 here", []string{"2001:db8::1", "192.0.2.2"}, map[string]plan{"2001:db8::1": {0, unreachable}, "192.0.2.2": {ms, refused}},
			"", matrix.FailRefused, []string{"2001:db8::1 at 0s", "192.0.2.2 at 0s"}, ms},
		{"no network", []string{"2001:db8::1", "192.0.2.2"}, map[string]plan{"2001:db8::1": {0, unreachable}, "192.0.2.2": {0, unreachable}},
			"", matrix.FailUnreachable, []string{"2001:db8::1 at 0s", "192.0.2.2 at 0s"}, 0},
		{"both silent", []string{"192.0.2.1", "192.0.2.2"}, map[string]plan{"192.0.2.1": {never, nil}, "192.0.2.2": {never, nil}},
			"", matrix.FailTimeout, []string{"192.0.2.1 at 0s", "192.0.2.2 at 250ms"}, 5250 * ms},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &network{plans: tt.plans}
				d := newTestDialer(n)
				conn, err := d.race(t.Context(), ports(tt.addrs...))
				if took := time.Since(n.start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				if FailureOf(err) != tt.failure {
					t.Errorf("error %v, want %v", err, tt.failure)
				}
				if !slices.Equal(n.attempts, tt.attempts) {
					t.Errorf("attempts %q\nwant     %q", n.attempts, tt.attempts)
				}
				if n.running != 0 || n.peak > maxAttempts {
					t.Errorf("%d attempts left, at most %d ran at a time", n.running, n.peak)
				}
				if tt.want == "" {
					if conn != nil || len(n.open) != 0 || d.counters.open.Load() != 0 {
						t.Errorf("connection %v, open %v, counted %d", conn, n.open, d.counters.open.Load())
					}
					return
				}
				if len(n.open) != 1 || !n.open[tt.want] || d.counters.open.Load() != 1 {
					t.Errorf("open %v, counted %d, want one to %s", n.open, d.counters.open.Load(), tt.want)
				}
				_ = conn.Close()
				_ = conn.Close()
				if d.counters.open.Load() != 0 || d.counters.attempts.Load() != int64(len(tt.attempts)) {
					t.Errorf("counted %d open, %d attempts", d.counters.open.Load(), d.counters.attempts.Load())
				}
			})
		})
	}
}

func TestRaceClosesLosers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{plans: map[string]plan{"192.0.2.1": {time.Second, nil}, "192.0.2.2": {750 * time.Millisecond, nil}}}
		d := newTestDialer(n)
		d.connectTo = n.stubborn
		conn, err := d.race(t.Context(), ports("192.0.2.1", "192.0.2.2"))
		if err != nil {
			t.Fatal(err)
		}
		if len(n.open) != 1 || d.counters.open.Load() != 1 || d.counters.peak.Load() != 2 {
			t.Errorf("open %v, counted %d, peak %d", n.open, d.counters.open.Load(), d.counters.peak.Load())
		}
		_ = conn.Close()
	})
}

func TestRaceIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{plans: map[string]plan{"192.0.2.1": {time.Hour, nil}, "192.0.2.2": {time.Hour, nil}, "192.0.2.3": {time.Hour, nil}}}
		d := newTestDialer(n)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err := d.race(ctx, ports("192.0.2.1", "192.0.2.2", "192.0.2.3"))
		if FailureOf(err) != matrix.FailCancelled || time.Since(n.start) != time.Second || len(n.attempts) != 2 || n.running != 0 {
			t.Errorf("%v after %v, attempts %q, %d left", err, time.Since(n.start), n.attempts, n.running)
		}
	})
}

// TestWorse is about the errors of a name of which no address can be reached.
func TestWorse(t *testing.T) {
	no6 := connectError("2001:db8::1", syscall.ENETUNREACH)
	off6 := connectError("2001:db8::1", syscall.EAFNOSUPPORT)
	no4 := connectError("192.0.2.1", syscall.ENETUNREACH)
	down := connectError("2001:db8::1", syscall.ENETDOWN)
	host := connectError("192.0.2.1", syscall.EHOSTUNREACH)
	denied := connectError("192.0.2.1", syscall.EPERM)
	refused := connectError("192.0.2.1", syscall.ECONNREFUSED)
	for _, tt := range []struct {
		name string
		errs []error // in the order in which they come
		want error
		own  bool // our own network is down
	}{
		{"a host without IPv6, and the remote refuses", []error{no6, refused}, refused, false},
		{"a host without IPv6, and the remote is off", []error{no6, host}, host, false},
		{"a host without IPv6, and no network", []error{no6, no4}, no4, true},
		{"a kernel without IPv6, and no network", []error{off6, no4}, no4, true},
		{"no network, the other way round", []error{no4, no6}, no4, true},
		{"an interface that is down", []error{no6, down}, down, true},
		{"a remote without IPv4, a host without IPv6", []error{no6, no6}, no6, false},
		{"a firewall for one address", []error{denied, no6}, denied, false},
		{"a way out for one address", []error{no4, host}, host, false},
		{"the first of equals", []error{host, connectError("192.0.2.2", syscall.EHOSTUNREACH)}, host, false},
		{"the first that says something", []error{refused, errno(syscall.ETIMEDOUT), no4, host}, refused, false},
	} {
		var got error
		for _, err := range tt.errs {
			got = worse(got, err)
		}
		if got != tt.want || ownNetwork(got) != tt.own {
			t.Errorf("%s: %v, our own network: %v; want %v, %v", tt.name, got, ownNetwork(got), tt.want, tt.own)
		}
	}
}

// TestClockIsWrong: a machine that does not know the time yet blames no server
// for its certificate, and tries no other target.
func TestClockIsWrong(t *testing.T) {
	served := counter{}
	addr := tcp(t, func(c net.Conn) {
		served.Add(1)
		_ = tls.Server(c, serverTLS("a.test")).Handshake()
	})
	for _, tt := range []struct {
		now  time.Time // the test authority's certificates are valid from 1970 on
		want matrix.Failure
	}{
		{time.Date(1969, 12, 31, 22, 59, 59, 0, time.UTC), matrix.FailLocal},
		{time.Date(1969, 12, 31, 23, 0, 1, 0, time.UTC), matrix.FailTLS},
		{time.Now().Add(365 * 24 * time.Hour), matrix.FailTLS},
	} {
		served.Store(0)
		c := newTestClient(t, map[string]string{"a.test:1": addr, "a.test:2": addr}, nil)
		c.dialer.tls.Time = func() time.Time { return tt.now }
		_, err := c.dialer.dial(testContext(t), &Route{TLSName: "a.test", Targets: []Target{{Host: "a.test", Port: 1}, {Host: "a.test", Port: 2}}}, alpnAny)
		wantFailure(t, err, tt.want, OpTLS)
		tried := int64(2)
		if tt.want == matrix.FailLocal {
			tried = 1
		}
		if n := served.Load(); n != tried || errors.Is(err, errClock) != (tt.want == matrix.FailLocal) {
			t.Errorf("at %v: %v after %d handshakes", tt.now, err, n)
		}
	}
}

func TestInterleave(t *testing.T) {
	for _, tt := range []struct{ in, want []string }{
		{[]string{"::1", "::2", "::3", "1.1.1.1"}, []string{"::1", "1.1.1.1", "::2", "::3"}},
		{[]string{"1.1.1.1", "::1", "1.1.1.2", "::2"}, []string{"1.1.1.1", "::1", "1.1.1.2", "::2"}},
		{[]string{"1.1.1.1", "1.1.1.2", "::1"}, []string{"1.1.1.1", "::1", "1.1.1.2"}},
		{[]string{"::1"}, []string{"::1"}},
	} {
		if got := interleave(ports(tt.in...)); !slices.Equal(got, ports(tt.want...)) {
			t.Errorf("%v: %v, want %v", tt.in, got, tt.want)
		}
	}
}

// TestDialAddresses is about what is left of a name's addresses.
func TestDialAddresses(t *testing.T) {
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("1.0.0.%d", i)
	}
	static, err := NewStatic(map[string]string{"static.test": "1.2.3.4", "inner.test": "10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	block, err := NewBlocklist(DefaultBlocklist(), nil)
	if err != nil {
		t.Fatal(err)
	}
	d := newTestDialer(&network{})
	d.static, d.block = static, block
	d.lookup = &fakeLookup{ip: map[string][]string{
		"a.test":       {"10.0.0.1", "1.1.1.1", "127.0.0.1", "2a00::1", "1.1.1.1", "::ffff:1.1.1.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"},
		"private.test": {"10.0.0.1", "::1", "0.0.0.0"},
		"many.test":    many,
		"static.test":  {"9.9.9.9"},
	}, fail: map[string]error{"broken.test": errServfail}}
	for _, tt := range []struct {
		host    string
		want    []netip.AddrPort
		failure matrix.Failure
	}{
		{"a.test", ports("1.1.1.1", "2a00::1"), 0},
		{"many.test", ports(many[:maxAddresses]...), 0},
		{"static.test", ports("1.2.3.4"), 0},
		{"8.8.8.8", ports("8.8.8.8"), 0},
		{"2a00::2", ports("2a00::2"), 0},
		{"private.test", nil, matrix.FailBlocked},
		{"inner.test", nil, matrix.FailBlocked},
		{"127.0.0.1", nil, matrix.FailBlocked},
		{"::1", nil, matrix.FailBlocked},
		{"::ffff:127.0.0.1", nil, matrix.FailBlocked},
		{"missing.test", nil, matrix.FailNoName},
		{"broken.test", nil, matrix.FailDNS},
	} {
		got, err := d.addresses(t.Context(), Target{Host: tt.host, Port: 8448})
		if !slices.Equal(got, tt.want) || FailureOf(err) != tt.failure {
			t.Errorf("%s: %v, %v, want %v, %v", tt.host, got, err, tt.want, tt.failure)
		}
	}
	if n := d.counters.refused.Load(); n != 3+3+1+3 {
		t.Errorf("%d addresses counted as refused", n)
	}
}

// TestBlocklistHasTheLastWord calls what dials as a mistake in the rest would.
func TestBlocklistHasTheLastWord(t *testing.T) {
	accepted := make(chan struct{}, 1)
	addr := tcp(t, func(net.Conn) { accepted <- struct{}{} })
	d := newTestDialer(&network{})
	d.block = must(NewBlocklist([]string{"127.0.0.0/8"}, nil))
	for _, to := range []netip.AddrPort{addrOf(addr), netip.AddrPortFrom(netip.AddrFrom16(addrOf(addr).Addr().As16()), addrOf(addr).Port())} {
		conn, err := d.connectTCP(t.Context(), to)
		if FailureOf(err) != matrix.FailBlocked || conn != nil {
			t.Errorf("%v: %v, %v", to, conn, err)
		}
	}
	d.block = openList(t)
	conn, err := d.connectTCP(t.Context(), addrOf(addr))
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	<-accepted
	if len(accepted) != 0 {
		t.Error("a blocked address was connected to")
	}
}

// TestDialFailsOver is about the order of targets and whose error counts.
func TestDialFailsOver(t *testing.T) {
	refused, unreachable := errno(syscall.ECONNREFUSED), errno(syscall.EHOSTUNREACH)
	route := func(hosts ...string) *Route {
		r := &Route{TLSName: "a.test"}
		for i, h := range hosts {
			r.Targets = append(r.Targets, Target{Host: h, Port: 8448, Priority: uint16(i)})
		}
		return r
	}
	for _, tt := range []struct {
		name     string
		route    *Route
		want     matrix.Failure
		attempts int
	}{
		{"the first error counts", route("192.0.2.1", "192.0.2.2"), matrix.FailRefused, 2},
		{"the first error counts", route("192.0.2.2", "192.0.2.1"), matrix.FailUnreachable, 2},
		{"but not the block-list's", route("127.0.0.1", "192.0.2.2", "192.0.2.1"), matrix.FailUnreachable, 2},
		{"unless it is all there is", route("127.0.0.1", "127.0.0.2"), matrix.FailBlocked, 0},
		{"our own fault ends it", route("192.0.2.3", "192.0.2.1"), matrix.FailLocal, 1},
		{"a name that is missing is passed over", route("missing.test", "192.0.2.1"), matrix.FailNoName, 1},
		{"there is an end", route(slices.Repeat([]string{"192.0.2.1"}, 30)...), matrix.FailRefused, maxTargets},
	} {
		n := &network{plans: map[string]plan{"192.0.2.1": {0, refused}, "192.0.2.2": {0, unreachable}, "192.0.2.3": {0, errno(syscall.EMFILE)}}}
		d := newTestDialer(n)
		d.block = must(NewBlocklist([]string{"127.0.0.0/8"}, nil))
		_, err := d.dial(t.Context(), tt.route, alpnAny)
		var e *Error
		if !errors.As(err, &e) || e.Failure != tt.want || !e.Unsent || len(n.attempts) != tt.attempts {
			t.Errorf("%s: %v, attempts %q; want %v after %d", tt.name, err, n.attempts, tt.want, tt.attempts)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a route without targets goes unnoticed")
		}
	}()
	_, _ = newTestDialer(&network{}).dial(t.Context(), route(), alpnAny)
}

// TestDialIsBounded: however long the request may take, the dial may not.
func TestDialIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{plans: map[string]plan{"192.0.2.1": {time.Hour, nil}}}
		d := newTestDialer(n)
		r := &Route{TLSName: "a.test"}
		for range maxTargets {
			r.Targets = append(r.Targets, Target{Host: "192.0.2.1", Port: 8448})
		}
		_, err := d.dial(t.Context(), r, alpnAny)
		if FailureOf(err) != matrix.FailTimeout || time.Since(n.start) != dialTimeout {
			t.Errorf("%v after %v", err, time.Since(n.start))
		}
	})
}

func TestHandshakeIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{plans: map[string]plan{"192.0.2.1": {time.Second, nil}}}
		d := newTestDialer(n)
		d.shakes = newHandshakes(0.1)
		_, err := d.dial(t.Context(), &Route{TLSName: "a.test", Targets: []Target{{Host: "192.0.2.1", Port: 1}}}, alpnAny)
		wantFailure(t, err, matrix.FailTimeout, OpTLS)
		if took := time.Since(n.start); took != 11*time.Second || len(n.open) != 0 {
			t.Errorf("a remote that is silent in the handshake: took %v, open %v", took, n.open)
		}
		// The pace is waited for with the connection open; it is closed if that
		// takes too long, and the remote is not blamed.
		_ = d.shakes.wait(t.Context(), fullCost)
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		_, err = d.dial(ctx, &Route{TLSName: "a.test", Targets: []Target{{Host: "192.0.2.1", Port: 1}}}, alpnAny)
		wantFailure(t, err, matrix.FailLocal, OpTLS)
		if len(n.open) != 0 || d.counters.open.Load() != 0 {
			t.Errorf("open %v, counted %d", n.open, d.counters.open.Load())
		}
	})
}

// TestCertificates dials real servers.
func TestCertificates(t *testing.T) {
	names := make(chan string, 10)
	note := func(config *tls.Config) *tls.Config {
		config.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			names <- h.ServerName
			return nil, nil
		}
		return config
	}
	serve := func(config *tls.Config) netip.AddrPort {
		return addrOf(tcp(t, func(c net.Conn) {
			tc := tls.Server(c, config)
			if tc.Handshake() == nil {
				_, _ = io.Copy(io.Discard, tc)
			}
		}))
	}
	old := serverTLS("a.test")
	old.MaxVersion = tls.VersionTLS11
	expired := &tls.Config{Certificates: []tls.Certificate{ca().issue(time.Now().Add(-time.Hour), "a.test")}}
	unknown := &tls.Config{Certificates: []tls.Certificate{newCA().issue(time.Now().Add(time.Hour), "a.test")}}

	for _, tt := range []struct {
		name    string
		to      netip.AddrPort
		tlsName string
		sni     string
		failure matrix.Failure
	}{
		{"name", serve(note(serverTLS("a.test"))), "a.test", "a.test", 0},
		{"IPv4", serve(note(serverTLS("192.0.2.1"))), "192.0.2.1", "", 0},
		{"IPv6", serve(note(serverTLS("2001:db8::1"))), "2001:db8::1", "", 0},
		{"another name", serve(note(serverTLS("b.test"))), "a.test", "a.test", matrix.FailTLS},
		{"another address", serve(note(serverTLS("192.0.2.2", "a.test"))), "192.0.2.1", "", matrix.FailTLS},
		{"an address as a name", serve(note(serverTLS("a.test"))), "2001:db8::1", "", matrix.FailTLS},
		{"expired", serve(note(expired)), "a.test", "a.test", matrix.FailTLS},
		{"unknown authority", serve(note(unknown)), "a.test", "a.test", matrix.FailTLS},
		{"TLS 1.1", serve(note(old)), "a.test", "a.test", matrix.FailTLS},
		{"plain HTTP", addrOf(tcp(t, func(c net.Conn) {
			names <- "-"
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
			_, _ = io.Copy(io.Discard, c)
		})), "a.test", "-", matrix.FailTLS},
		{"garbage", addrOf(tcp(t, func(c net.Conn) {
			names <- "-"
			_, _ = c.Write([]byte{22, 3, 3, 0, 4, 2, 0, 0, 0})
			_, _ = io.Copy(io.Discard, c)
		})), "a.test", "-", matrix.FailTLS},
		{"hangs up", addrOf(tcp(t, func(c net.Conn) { names <- "-" })), "a.test", "-", matrix.FailTLS},
		{"resets", addrOf(tcp(t, func(c net.Conn) {
			names <- "-"
			_, _ = c.Read(make([]byte, 1))
			_ = c.(*net.TCPConn).SetLinger(0)
		})), "a.test", "-", matrix.FailTLS},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newTestClient(t, nil, nil)
			d := c.dialer
			d.static = must(NewStatic(map[string]string{"target.test:1": tt.to.String()}))
			conn, err := d.dial(testContext(t), &Route{TLSName: tt.tlsName, Targets: []Target{{Host: "target.test", Port: 1}}}, alpnAny)
			if got := <-names; got != tt.sni {
				t.Errorf("SNI %q, want %q", got, tt.sni)
			}
			if tt.failure != matrix.FailNone {
				wantFailure(t, err, tt.failure, OpTLS)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		})
	}
}

func TestSessionsAreResumed(t *testing.T) {
	var served counter
	c := newTestClient(t, map[string]string{"a.test:1": web(t, false, served.handler(ok), "a.test"), "a.test:2": web(t, true, ok, "a.test")},
		func(c *ClientConfig) { c.MaxIdle = -1 })
	for range 3 {
		get(t, c, "a.test:1", "/")
	}
	if s := c.Stats(); s.Handshakes != 3 || s.Resumed != 2 || s.Dials != 3 || s.Reused != 0 {
		t.Errorf("three requests without kept connections: %+v", s)
	}
}

// TestResumptionsCountLess dials a server whose sessions can be resumed until it
// forgets how, and then one that breaks the handshake off.
func TestResumptionsCountLess(t *testing.T) {
	for version, name := range map[uint16]string{tls.VersionTLS12: "TLS 1.2", tls.VersionTLS13: "TLS 1.3"} {
		t.Run(name, func(t *testing.T) {
			config := serverTLS("a.test")
			config.MaxVersion = version
			config.SetSessionTicketKeys([][32]byte{{1}})
			var broken atomic.Bool
			addr := tcp(t, func(c net.Conn) {
				tc := tls.Server(c, config)
				if broken.Load() || tc.Handshake() != nil || head(bufio.NewReader(tc)) == nil {
					return
				}
				_, _ = io.WriteString(tc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
				_ = tc.Close()
			})
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			const had = 100
			limiter := rate.NewLimiter(1e-6, had)
			c.dialer.shakes = &handshakes{limiter: limiter}
			want := 0
			check := func(what string, cost int, resumed int64) {
				t.Helper()
				want += cost
				if got := had - int(math.Round(limiter.Tokens())); got != want {
					t.Errorf("%s: %d tenths in all, want %d", what, got, want)
				}
				if n := c.Stats().Resumed; n != resumed {
					t.Errorf("%s: %d resumptions, want %d", what, n, resumed)
				}
			}
			get(t, c, "a.test:1", "/")
			check("the first", fullCost, 0)
			get(t, c, "a.test:1", "/")
			check("a resumption", resumedCost, 1)
			get(t, c, "a.test:1", "/")
			check("another", resumedCost, 2)
			config.SetSessionTicketKeys([][32]byte{{2}})
			get(t, c, "a.test:1", "/")
			check("refused", fullCost, 2)
			get(t, c, "a.test:1", "/")
			check("a resumption of the new session", resumedCost, 3)
			broken.Store(true)
			for range 2 {
				_, _, err := tryGet(testContext(t), c, "a.test:1", "/")
				wantFailure(t, err, matrix.FailTLS, OpTLS)
				check("broken off, and so with a small ClientHello", 2*fullCost, 3)
			}
		})
	}
	d := newTestDialer(&network{})
	d.tls.ClientSessionCache.Put("a.test", nil)
	if cost := d.cost("a.test"); cost != fullCost {
		t.Errorf("with a session thrown away a handshake costs %d", cost)
	}
}

func TestCAPool(t *testing.T) {
	system := must(x509.SystemCertPool())
	pool, err := CAPool(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca().cert.Raw}))
	if err != nil {
		t.Fatal(err)
	}
	system.AddCert(ca().cert)
	if !pool.Equal(system) {
		t.Error("not the system's authorities and the given one")
	}
	for _, bad := range []string{"", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		if _, err := CAPool([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

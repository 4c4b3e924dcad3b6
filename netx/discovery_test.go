package netx

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// delegating serves a well-known document that the test may change.
type delegating struct {
	atomic.Value
	asked counter
}

func (d *delegating) serve(w http.ResponseWriter, r *http.Request) {
	d.asked.Add(1)
	if s, _ := d.Load().(string); s != "" {
		_, _ = io.WriteString(w, `{"m.server": "`+s+`"}`)
		return
	}
	w.WriteHeader(404)
}

// TestDiscoveryEndToEnd goes from a server name to the Host header that a server
// saw, through real well-known fetches and handshakes.
func TestDiscoveryEndToEnd(t *testing.T) {
	hosts := make(chan string, 1)
	serve := func(w http.ResponseWriter, r *http.Request) { hosts <- r.Host }
	wellKnown := func(document string, name string) string {
		d := &delegating{}
		d.Store(document)
		return web(t, false, d.serve, name)
	}
	lookup := &fakeLookup{srv: map[string][]*net.SRV{
		"_matrix-fed._tcp.fed.test":       {{Target: "target.test.", Port: 1}},
		"_matrix._tcp.old.test":           {{Target: "target.test.", Port: 2}},
		"_matrix-fed._tcp.delegated.test": {{Target: "dead.test.", Port: 1, Priority: 1}, {Target: "dead.test.", Port: 2, Priority: 1}, {Target: "target.test.", Port: 3, Priority: 2}},
		"_matrix-fed._tcp.gone.test":      {{Target: ".", Port: 0}},
		"_matrix-fed._tcp.dead2.test":     {{Target: "dead.test.", Port: 1}, {Target: "dead.test.", Port: 2}},
	}, ip: map[string][]string{"dead.test": {"127.0.0.1"}}}
	c := newTestClient(t, map[string]string{
		"[2001:db8::9]:8448": web(t, true, serve, "2001:db8::9"),
		"192.0.2.9:8448":     web(t, true, serve, "192.0.2.9"),
		"port.test:1234":     web(t, true, serve, "port.test"),
		"direct.test:8448":   web(t, true, serve, "direct.test"),
		"a.test:443":         wellKnown("b.test:99", "a.test"),
		"b.test:99":          web(t, true, serve, "b.test"),
		"c.test:443":         wellKnown("192.0.2.9", "c.test"),
		"d.test:443":         wellKnown("delegated.test", "d.test"),
		"e.test:443":         wellKnown("direct.test", "e.test"),
		"target.test:1":      web(t, true, serve, "fed.test"),
		"target.test:2":      web(t, true, serve, "old.test"),
		"target.test:3":      web(t, true, serve, "delegated.test"),
		"wrong.test:8448":    web(t, true, serve, "target.test"),
		"plain.test:8448":    web(t, true, serve, "plain.test"),
		"plain.test:443":     web(t, true, serve, "plain.test"), // closed below by its own well-known's 404
	}, func(c *ClientConfig) { c.Lookup = lookup; c.ConnectTimeout = time.Second })
	for _, tt := range []struct {
		dest    matrix.ServerName
		host    string
		failure matrix.Failure
	}{
		{"[2001:db8::9]", "[2001:db8::9]", 0},
		{"[2001:db8::9]:8448", "[2001:db8::9]:8448", 0},
		{"192.0.2.9", "192.0.2.9", 0},
		{"port.test:1234", "port.test:1234", 0},
		{"Port.Test:1234", "Port.Test:1234", 0},
		{"direct.test", "direct.test", 0},
		{"a.test", "b.test:99", 0},
		{"c.test", "192.0.2.9", 0},
		{"d.test", "delegated.test", 0},
		{"e.test", "direct.test", 0},
		{"fed.test", "fed.test", 0},
		{"old.test", "old.test", 0},
		{"gone.test", "", matrix.FailNoName},
		{"missing.test", "", matrix.FailNoName},
		{"dead2.test", "", matrix.FailRefused},
		{"wrong.test", "", matrix.FailTLS},
	} {
		resp, err := c.Do(testContext(t), &Request{Destination: tt.dest, Method: "GET", Target: "/"}, nil)
		if FailureOf(err) != tt.failure {
			t.Errorf("%s: %v", tt.dest, err)
		}
		if err != nil {
			continue
		}
		_ = resp.Body.Close()
		if got := <-hosts; got != tt.host {
			t.Errorf("%s: Host %q, want %q", tt.dest, got, tt.host)
		}
	}
}

// TestDelegationMoves: when a document changes, a connection that is kept to
// where the old one led is not used.
func TestDelegationMoves(t *testing.T) {
	hosts := make(chan string, 1)
	serve := func(w http.ResponseWriter, r *http.Request) { hosts <- r.Host }
	var d delegating
	d.Store("b.test:1")
	var now atomic.Int64
	c := newTestClient(t, map[string]string{"a.test:443": web(t, false, d.serve, "a.test"),
		"b.test:1": web(t, true, serve, "b.test"), "c.test:1": web(t, true, serve, "c.test")},
		func(c *ClientConfig) { c.Now = func() time.Time { return time.Unix(1e9+now.Load(), 0) } })
	for _, step := range []struct {
		document string
		after    int64 // seconds
		want     string
		asked    int64
	}{
		{"b.test:1", 0, "b.test:1", 1},
		{"c.test:1", 3600, "b.test:1", 1},
		{"c.test:1", 48 * 3600, "c.test:1", 2},
		{"c.test:1", 1, "c.test:1", 2},
	} {
		d.Store(step.document)
		now.Add(step.after)
		get(t, c, "a.test", "/")
		if got := <-hosts; got != step.want || d.asked.Load() != step.asked {
			t.Errorf("%+v: Host %s, document fetched %d times", step, got, d.asked.Load())
		}
	}
	if s := c.Stats(); s.WellKnownEntries != 1 || s.WellKnownHits != 2 || s.WellKnownFetches != 2 || s.Reused != 2 {
		t.Errorf("%+v", s)
	}
}

// rebinding gives a public address for the first look-up of a name, and a
// private one from then on.
type rebinding struct {
	fakeLookup
	mu    sync.Mutex
	asked map[string]int
}

func (r *rebinding) IP(_ context.Context, host string) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked[host]++
	if r.asked[host] == 1 {
		return addrs("192.0.2.80"), nil
	}
	return addrs("127.0.0.1", "::ffff:127.0.0.1", "::1"), nil
}

func TestRebindingIsRefused(t *testing.T) {
	var reached counter
	addr := addrOf(tcp(t, func(net.Conn) { reached.Add(1) }))
	c := newTestClient(t, nil, func(c *ClientConfig) {
		c.Blocklist = must(NewBlocklist([]string{"127.0.0.0/8", "::1"}, nil))
		c.Lookup = &rebinding{asked: map[string]int{}}
	})
	var dialled []netip.AddrPort
	real := c.dialer.connectTo
	c.dialer.connectTo = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		dialled = append(dialled, to)
		if to.Addr() == netip.MustParseAddr("192.0.2.80") {
			return nil, errno(113) // no route to host
		}
		return real(ctx, to)
	}
	dest := matrix.ServerName("a.test:" + netip.AddrPortFrom(addr.Addr(), addr.Port()).String()[len("127.0.0.1:"):])
	for i, want := range []matrix.Failure{matrix.FailUnreachable, matrix.FailBlocked, matrix.FailBlocked} {
		_, err := c.Do(testContext(t), &Request{Destination: dest, Method: "GET", Target: "/"}, nil)
		if FailureOf(err) != want {
			t.Errorf("attempt %d: %v, want %v", i, err, want)
		}
	}
	if len(dialled) != 1 || reached.Load() != 0 {
		t.Errorf("dialled %v, reached %d times", dialled, reached.Load())
	}
	if s := c.Stats(); s.Blocked != 2*2 { // the mapped one is the same address
		t.Errorf("%d addresses counted as blocked", s.Blocked)
	}
}

// TestDefaultsAreSafe: a Client that nobody configured reaches no private
// address, by whatever way one is named.
func TestDefaultsAreSafe(t *testing.T) {
	lookup := &fakeLookup{
		ip:  map[string][]string{"inner.test": {"127.0.0.1"}},
		srv: map[string][]*net.SRV{"_matrix-fed._tcp.srv.test": {{Target: "inner.test.", Port: 1}}, "_matrix._tcp.srv2.test": {{Target: "127.0.0.1.", Port: 1}}},
	}
	c := NewClient(ClientConfig{Lookup: lookup})
	for _, dest := range []matrix.ServerName{"127.0.0.1", "127.0.0.1:1", "[::1]", "[::ffff:10.0.0.1]:1", "[64:ff9b::7f00:1]", "inner.test:1", "srv.test",
		"srv2.test", "0.0.0.0:1", "[::]:1", "169.254.169.254:80"} {
		_, err := c.Do(testContext(t), &Request{Destination: dest, Method: "GET", Target: "/"}, nil)
		wantFailure(t, err, matrix.FailBlocked, OpResolve)
	}
	if s := c.Stats(); s.Dials != 0 || s.Blocked == 0 {
		t.Errorf("%+v", s)
	}
	if d := NewClient(ClientConfig{}); d.dns == nil || d.pool.maxIdle != 64 || d.pool.perHost != 2 {
		t.Errorf("defaults: %+v", d)
	}
}

// TestDiscoveryIsShared: a burst to one server costs one fetch.
func TestDiscoveryIsShared(t *testing.T) {
	var d delegating
	d.Store("b.test:1")
	c := newTestClient(t, map[string]string{"a.test:443": web(t, false, d.serve, "a.test"), "b.test:1": web(t, true, ok, "b.test")}, nil)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if _, _, err := tryGet(testContext(t), c, "a.test", "/"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if d.asked.Load() != 1 {
		t.Errorf("the document was fetched %d times", d.asked.Load())
	}
}

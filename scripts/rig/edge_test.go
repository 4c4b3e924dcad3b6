package rig

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/bus/node"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

func testOrigin(t *testing.T, name matrix.ServerName, seed byte) fedload.Homeserver {
	t.Helper()
	key, err := matrix.NewSigningKey(append(make([]byte, ed25519.SeedSize-1), seed), "test")
	if err != nil {
		t.Fatal(err)
	}
	return fedload.Homeserver{Name: name, Key: key}
}

func transaction(from fedload.Homeserver, id string, pdus ...json.RawMessage) *Signed {
	return Sign(from, fedload.Send(from.Name, "hs.test", id, time.UnixMilli(1), pdus, nil))
}

func startStub(t *testing.T, c StubConfig) *Stub {
	t.Helper()
	c.Name = "hs.test"
	s, err := StartStub(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func newSender(t *testing.T, target Target, local netip.Addr) *Sender {
	t.Helper()
	s := NewSender(target, local, 2)
	t.Cleanup(s.Close)
	return s
}

func TestStubCountsWhatComesTwice(t *testing.T) {
	one, other := testOrigin(t, "one.test", 1), testOrigin(t, "other.test", 2)
	stub := startStub(t, StubConfig{})
	s := newSender(t, Target{Address: stub.Address}, netip.Addr{})
	event := json.RawMessage(`{"type":"m"}`)
	answers := make(map[string]bool)
	for _, r := range []*Signed{
		transaction(one, "a", event), transaction(other, "a", event), transaction(one, "b"), transaction(one, "a", event),
		Sign(one, fedload.Lookup("hs.test", "user")),
	} {
		res := s.Do(t.Context(), r)
		if res.Err != nil || res.Status != http.StatusOK {
			t.Fatalf("%s: %+v", r.Request.Target, res)
		}
		answers[string(res.Body)] = true
	}
	if want := (StubStats{Transactions: 4, Ephemeral: 1, Repeated: 1, Others: 1, AtOnce: 1}); stub.Stats() != want {
		t.Errorf("%+v, want %+v", stub.Stats(), want)
	}
	if a, b := stub.Seen("one.test", "a"), stub.Seen("two.test", "a"); a != 2 || b != 0 {
		t.Errorf("seen %d and %d times", a, b)
	}
	if len(answers) != 5 {
		t.Errorf("answers that are equal: %v", answers)
	}
	stub.Reset()
	s.Do(t.Context(), transaction(one, "b"))
	if got := stub.Stats(); got.Transactions != 1 || got.Repeated != 1 {
		t.Errorf("after a reset %+v", got)
	}
}

func TestStubRefusesWhatNobodyKnownHasSigned(t *testing.T) {
	one, other := testOrigin(t, "one.test", 1), testOrigin(t, "other.test", 2)
	stub := startStub(t, StubConfig{Keys: map[matrix.ServerName]ed25519.PublicKey{one.Name: one.Key.Public()}})
	s := newSender(t, Target{Address: stub.Address}, netip.Addr{})
	good := transaction(one, "a")
	changed := &Signed{fedload.Send(one.Name, "hs.test", "b", time.UnixMilli(1), nil, nil), good.Authorization}
	for _, test := range []struct {
		r      *Signed
		status int
	}{
		{good, 200},
		{changed, 401},
		{transaction(other, "a"), 401},
		{transaction(fedload.Homeserver{Name: one.Name, Key: other.Key}, "c"), 401},
		{&Signed{Request: good.Request}, 401},
	} {
		if res := s.Do(t.Context(), test.r); res.Status != test.status {
			t.Errorf("%s of %s: %+v, want %d", test.r.Request.Target, test.r.Authorization, res, test.status)
		}
	}
	if got := stub.Stats(); got.Transactions != 1 || got.Refused != 4 {
		t.Errorf("%+v", got)
	}
}

// The stub has one processor, and no transaction is free of charge.
func TestStubWorksOnOneAfterTheOther(t *testing.T) {
	const n, busy = 8, 10 * time.Millisecond
	stub := startStub(t, StubConfig{Busy: time.Nanosecond, BusyEphemeral: busy})
	start := time.Now()
	var running sync.WaitGroup
	for i := range n {
		running.Go(func() {
			from := testOrigin(t, "one.test", byte(i))
			s := newSender(t, Target{Address: stub.Address}, netip.Addr{})
			if res := s.Do(t.Context(), transaction(from, string(rune('a'+i)))); res.Status != 200 {
				t.Errorf("%+v", res)
			}
		})
	}
	running.Wait()
	if took := time.Since(start); took < n*busy {
		t.Errorf("%d transactions of %v took %v", n, busy, took)
	}
	got := stub.Stats()
	if got.Busy != n*busy || got.AtOnce < 1 || got.AtOnce > n {
		t.Errorf("%+v", got)
	}
}

// A sender comes over TLS, by the protocol and from the address that it should.
func TestSenderSpeaksTLS(t *testing.T) {
	c, err := NewCertificate(t.TempDir(), "hs.test")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	type came struct{ proto, from, host, sni string }
	var mu sync.Mutex
	var last came
	server := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			mu.Lock()
			defer mu.Unlock()
			last = came{r.Proto, host, r.Host, r.TLS.ServerName}
		}),
	}
	go server.ServeTLS(l, "", "")
	defer server.Close()
	from := testOrigin(t, "one.test", 1)
	for _, http2 := range []bool{false, true} {
		s := newSender(t, Target{l.Addr().String(), c.Roots, http2}, OriginAddress(258))
		if res := s.Do(t.Context(), transaction(from, "a")); res.Err != nil || res.Status != 200 {
			t.Fatalf("%+v", res)
		}
		want := came{"HTTP/1.1", "127.2.1.2", "hs.test", "hs.test"}
		if http2 {
			want.proto = "HTTP/2.0"
		}
		mu.Lock()
		if last != want {
			t.Errorf("%+v, want %+v", last, want)
		}
		mu.Unlock()
	}
}

func TestWhy(t *testing.T) {
	from := testOrigin(t, "one.test", 1)
	c, err := NewCertificate(t.TempDir(), "hs.test")
	if err != nil {
		t.Fatal(err)
	}
	listen := func(each func(net.Conn)) string {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				each(conn)
			}
		}()
		return l.Addr().String()
	}
	nobody, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	slow := startStub(t, StubConfig{Delay: time.Hour})
	for want, target := range map[string]Target{
		"refused":   {Address: nobody},
		"cut":       {Address: listen(func(c net.Conn) { c.Close() })},
		"TLS":       {Address: listen(func(c net.Conn) { c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }), Roots: c.Roots},
		"timed out": {Address: slow.Address},
	} {
		s := newSender(t, target, netip.Addr{})
		s.Timeout = 200 * time.Millisecond
		res := s.Do(t.Context(), transaction(from, "a"))
		if res.Err == nil || Why(res.Err) != want {
			t.Errorf("%+v is %q, want %q", res, Why(res.Err), want)
		}
	}
	gone, stop := context.WithCancel(t.Context())
	stop()
	if res := newSender(t, Target{Address: slow.Address}, netip.Addr{}).Do(gone, transaction(from, "b")); Why(res.Err) != "given up" {
		t.Errorf("%+v", res)
	}
	if got := Why(errors.New("else")); got != "other" {
		t.Error(got)
	}
}

func TestParseMetrics(t *testing.T) {
	m, err := parseMetrics("# HELP a b\na 1\nb{x=\"y z\"} 2.5\nb{x=\"w\"} 3\nbc{x=\"w\"} 4\n")
	if err != nil {
		t.Fatal(err)
	}
	if v, err := m.Get("a"); v != 1 || err != nil {
		t.Error(v, err)
	}
	if v, err := m.Get("c"); err == nil {
		t.Error(v)
	}
	if l := m.Labels("b"); len(l) != 2 || l[`x="y z"`] != 2.5 || l[`x="w"`] != 3 {
		t.Error(l)
	}
	for _, bad := range []string{"a\n", "a b\n"} {
		if m, err := parseMetrics(bad); err == nil {
			t.Errorf("%q: %v", bad, m)
		}
	}
}

func TestKillLeavesNoChance(t *testing.T) {
	p, err := StartProcess(filepath.Join(t.TempDir(), "log"), "sh", "-c", "trap '' TERM; sleep 100 & wait; wait")
	if err != nil {
		t.Fatal(err)
	}
	var tree Usage
	for tree.Files == 0 {
		own, err := p.Usage()
		if err != nil {
			t.Fatal(err)
		}
		if u, err := p.TreeUsage(); err == nil && u.Files > own.Files {
			tree = u
		}
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.Running(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("%v", err)
	}
	if err := p.Kill(); err != nil {
		t.Error(err)
	}
}

// What EdgeSettings writes is a configuration that fsbus takes.
func TestEdgeSettingsAreTaken(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", example))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f, err := NewFederation(dir, sim.Config{Servers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := NewCertificate(dir, f.From.Name)
	if err != nil {
		t.Fatal(err)
	}
	stub := startStub(t, StubConfig{})
	b := &Bus{Unix: "unix:" + filepath.Join(dir, "s"), TCP: "127.0.0.1:1", Page: "127.0.0.1:2"}
	settings := b.settings(dir, f)
	for key, value := range EdgeSettings("127.0.0.1:3", c, stub) {
		settings[key] = value
	}
	config, err := Adapt(string(text), settings)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := node.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if e := got.Edge; len(e.Listen) != 1 || e.Listen[0] != "127.0.0.1:3" || e.Upstream != "http://"+stub.Address || e.TLSCertificate != c.CertFile {
		t.Errorf("%+v", e)
	}
}

func TestDoEndsWithItsContext(t *testing.T) {
	stub := startStub(t, StubConfig{Delay: time.Hour})
	s := newSender(t, Target{Address: stub.Address}, netip.Addr{})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if res := s.Do(ctx, transaction(testOrigin(t, "one.test", 1), "a")); Why(res.Err) != "timed out" || stub.Seen("one.test", "a") != 1 {
		t.Errorf("%+v, seen %d times", res, stub.Seen("one.test", "a"))
	}
}

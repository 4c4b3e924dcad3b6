package netx

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"fsbus/bus/matrix"
)

// fakeResolver answers what next says, and counts.
type fakeResolver struct {
	mu    sync.Mutex
	asked []string
	ip    func(ctx context.Context, host string) ([]netip.Addr, error)
	srv   func(name string) ([]*net.SRV, error)
}

func (r *fakeResolver) note(q string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, q)
}

func (r *fakeResolver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.asked)
}

func (r *fakeResolver) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	r.note(network + " " + host)
	return r.ip(ctx, host)
}

func (r *fakeResolver) LookupSRV(_ context.Context, service, proto, name string) (string, []*net.SRV, error) {
	q := "_" + service + "._" + proto + "." + name
	r.note(q)
	srvs, err := r.srv(q)
	return "", srvs, err
}

var errServfail = &net.DNSError{Err: "server misbehaving", Name: "x", IsTemporary: true}

func addrs(list ...string) (a []netip.Addr) {
	for _, s := range list {
		a = append(a, netip.MustParseAddr(s))
	}
	return a
}

func TestDNSCache(t *testing.T) {
	now := time.Unix(1e9, 0)
	var answer []netip.Addr
	var fail error
	r := &fakeResolver{ip: func(context.Context, string) ([]netip.Addr, error) { return answer, fail }}
	d := NewDNS(DNSConfig{resolver: r, Now: func() time.Time { return now }})

	one, two := addrs("192.0.2.1"), addrs("192.0.2.2", "2001:db8::2")
	gone := notFound("x")
	type want struct {
		asked int
		addrs []netip.Addr
		fail  matrix.Failure
	}
	for i, step := range []struct {
		after  time.Duration // since the step before
		answer []netip.Addr
		err    error // the resolver's, from here on
		want   want
	}{
		{0, one, nil, want{1, one, matrix.FailNone}},
		{dnsPositive - 1, two, nil, want{1, one, matrix.FailNone}}, // still cached
		{1, two, nil, want{2, two, matrix.FailNone}},
		// The name server fails: the old answer serves, asked for again every 30 s ...
		{dnsPositive, nil, errServfail, want{3, two, matrix.FailNone}},
		{dnsFailed - 1, nil, errServfail, want{3, two, matrix.FailNone}},
		{1, nil, errServfail, want{4, two, matrix.FailNone}},
		{dnsStale - dnsPositive - dnsFailed - 1, nil, errServfail, want{5, two, matrix.FailNone}},
		// ... for an hour after it was got.
		{dnsFailed, nil, errServfail, want{6, nil, matrix.FailDNS}},
		{dnsFailed - 1, one, nil, want{6, nil, matrix.FailDNS}}, // a failure is remembered too
		{1, one, nil, want{7, one, matrix.FailNone}},
		// A name that is gone is gone at once, and stays so for one attempt.
		{dnsPositive, nil, gone, want{8, nil, matrix.FailNoName}},
		{dnsNoName - 1, one, nil, want{8, nil, matrix.FailNoName}},
		{1, nil, errServfail, want{9, nil, matrix.FailDNS}}, // there is nothing to stand in
		{dnsFailed, one, nil, want{10, one, matrix.FailNone}},
	} {
		now = now.Add(step.after)
		answer, fail = step.answer, step.err
		got, err := d.IP(t.Context(), "example.org")
		if !slices.Equal(got, step.want.addrs) || FailureOf(err) != step.want.fail || r.count() != step.want.asked {
			t.Fatalf("step %d: %v, %v, asked %d times; want %+v", i, got, err, r.count(), step.want)
		}
	}
	if r.asked[0] != "ip example.org." {
		t.Errorf("asked %q; a name without its final dot is tried in the search domains", r.asked[0])
	}
	if s := d.Stats(); s.Lookups != 10 || s.Hits != 4 || s.Entries != 1 || s.Bytes <= 0 {
		t.Errorf("stats %+v", s)
	}
	literal, err := d.IP(t.Context(), "2001:db8::1")
	if err != nil || !slices.Equal(literal, addrs("2001:db8::1")) || r.count() != 10 {
		t.Errorf("an IP literal: %v, %v", literal, err)
	}
}

func TestDNSServices(t *testing.T) {
	var answer []*net.SRV
	var fail error
	r := &fakeResolver{srv: func(string) ([]*net.SRV, error) { return answer, fail }}
	now := time.Unix(1e9, 0)
	d := NewDNS(DNSConfig{resolver: r, Now: func() time.Time { return now }})

	for i := range 2 * maxSRV {
		answer = append(answer, &net.SRV{Target: "a.", Port: 1, Priority: uint16(2*maxSRV - i)})
	}
	// Records that are malformed come back as an error beside those that are not.
	fail = &net.DNSError{Err: "malformed", Name: "x"}
	got, err := d.SRV(t.Context(), "matrix-fed", "tcp", "example.org")
	if err != nil || len(got) != maxSRV || got[0].Priority != 1 {
		t.Errorf("%d records, the first %+v, error %v; want the %d of lowest priority", len(got), got[0], err, maxSRV)
	}
	if r.asked[0] != "_matrix-fed._tcp.example.org." {
		t.Errorf("asked %q", r.asked[0])
	}
	answer = nil
	if _, err := d.SRV(t.Context(), "matrix", "tcp", "example.org"); FailureOf(err) != matrix.FailDNS {
		t.Errorf("nothing but malformed records: %v", err)
	}
}

func TestDNSBounds(t *testing.T) {
	many := make([]netip.Addr, 4000)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{1, 2, byte(i >> 8), byte(i)})
	}
	r := &fakeResolver{ip: func(_ context.Context, host string) ([]netip.Addr, error) {
		if strings.HasPrefix(host, "missing") {
			return nil, notFound(host)
		}
		return many, nil
	}}
	d := NewDNS(DNSConfig{resolver: r, MaxEntries: 50})
	got, err := d.IP(t.Context(), "example.org")
	if err != nil || len(got) != maxAddresses {
		t.Errorf("%d addresses of an answer are kept, want %d", len(got), maxAddresses)
	}
	for i := range 200 {
		_, _ = d.IP(t.Context(), fmt.Sprint(i, ".example.org"))
	}
	if s := d.Stats(); s.Entries != 50 {
		t.Errorf("%d entries, bound 50", s.Entries)
	}
	const maxBytes = 20_000
	d = NewDNS(DNSConfig{resolver: r, MaxBytes: maxBytes})
	for i := range 200 {
		_, _ = d.IP(t.Context(), fmt.Sprint("missing", i, strings.Repeat("x", i)))
		if s := d.Stats(); s.Bytes > maxBytes {
			t.Fatalf("%d bytes, bound %d", s.Bytes, maxBytes)
		}
	}
	if s := d.Stats(); s.Entries < 10 || s.Bytes < maxBytes/2 {
		t.Errorf("a full cache holds %d entries of %d bytes, bound %d", s.Entries, s.Bytes, maxBytes)
	}
}

func TestDNSConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, peak, asked atomic.Int64
		r := &fakeResolver{ip: func(ctx context.Context, _ string) ([]netip.Addr, error) {
			asked.Add(1)
			if n := running.Add(1); n > peak.Load() {
				peak.Store(n)
			}
			time.Sleep(time.Second)
			running.Add(-1)
			return addrs("192.0.2.1"), ctx.Err()
		}}
		d := NewDNS(DNSConfig{resolver: r, MaxConcurrent: 3})
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 90 {
			wg.Go(func() {
				if _, err := d.IP(t.Context(), fmt.Sprint(i%9)+".example.org"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if peak.Load() != 3 || asked.Load() != 9 || time.Since(start) != 3*time.Second {
			t.Errorf("9 names by 10 callers each, 3 at a time: peak %d, %d questions, %v", peak.Load(), asked.Load(), time.Since(start))
		}

		// Who does not get a slot in time has met our limit, and nothing is remembered.
		for range 3 {
			d.slots <- struct{}{}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := d.IP(ctx, "new.example.org"); FailureOf(err) != matrix.FailLocal {
			t.Errorf("without a slot: %v", err)
		}
		for range 3 {
			d.slots.release()
		}
		if _, err := d.IP(t.Context(), "new.example.org"); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

func TestDNSTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeResolver{ip: func(ctx context.Context, host string) ([]netip.Addr, error) {
			<-ctx.Done()
			return nil, &net.DNSError{Err: ctx.Err().Error(), Name: host, IsTimeout: errors.Is(ctx.Err(), context.DeadlineExceeded),
				UnwrapErr: ctx.Err()}
		}}
		d := NewDNS(DNSConfig{resolver: r})

		// A silent name server is given half of the caller's time, and its
		// failure is remembered.
		ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
		defer cancel()
		start := time.Now()
		if _, err := d.IP(ctx, "silent.example.org"); FailureOf(err) != matrix.FailDNS || ctx.Err() != nil {
			t.Errorf("silent: %v", err)
		}
		if d := time.Since(start); d != 4*time.Second {
			t.Errorf("silent: took %v of 8s", d)
		}
		if _, err := d.IP(t.Context(), "silent.example.org"); FailureOf(err) != matrix.FailDNS || r.count() != 2 { // both kinds of address, and one alone
			t.Errorf("silent, again: %v, asked %d times", err, r.count())
		}
		// Without a deadline it has 10 s.
		start = time.Now()
		_, _ = d.IP(t.Context(), "other.example.org")
		if d := time.Since(start); d != lookupTimeout {
			t.Errorf("without a deadline: took %v", d)
		}
		// A caller who gives up leaves no answer behind.
		given, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := d.IP(given, "third.example.org"); FailureOf(err) != matrix.FailCancelled {
			t.Errorf("given up: %v", err)
		}
		if s := d.Stats(); s.Entries != 2 {
			t.Errorf("%d entries, want the two failures", s.Entries)
		}
	})
}

// TestDNSOverTheWire has Go's resolver talk to a name server on the loopback,
// for the errors that it really returns.
func TestDNSOverTheWire(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			q := buf[:n]
			m := slices.Clone(q[:12])
			m[2], m[3] = 0x84, 0 // answer, authoritative
			name, i := "", 12
			for q[i] != 0 {
				name += string(q[i+1:i+1+int(q[i])]) + "."
				i += 1 + int(q[i])
			}
			question := q[12 : i+5]
			kind := binary.BigEndian.Uint16(question[len(question)-4:])
			clear(m[6:12])
			m = append(m, question...)
			switch {
			case strings.HasPrefix(name, "missing."):
				m[3] = 3 // NXDOMAIN
			case strings.HasPrefix(name, "broken."):
				m[3] = 2 // SERVFAIL
			case strings.HasPrefix(name, "fine.") && kind == 1:
				m[7] = 1
				m = append(m, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 33)
			case strings.HasPrefix(name, "_matrix-fed._tcp.fine.") && kind == 33:
				m[7] = 1
				m = append(m, 0xc0, 12, 0, 33, 0, 1, 0, 0, 0, 60, 0, 9, 0, 1, 0, 2, 0x20, 0xfb, 1, 'h', 0)
			}
			_, _ = pc.WriteTo(m, from)
		}
	}()
	d := NewDNS(DNSConfig{resolver: &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", pc.LocalAddr().String())
	}}})
	ctx := testContext(t)
	if got, err := d.IP(ctx, "fine.example.org"); err != nil || !slices.Equal(got, addrs("192.0.2.33")) {
		t.Errorf("fine: %v, %v", got, err)
	}
	if _, err := d.IP(ctx, "missing.example.org"); FailureOf(err) != matrix.FailNoName {
		t.Errorf("NXDOMAIN: %v", err)
	}
	if _, err := d.IP(ctx, "none.example.org"); FailureOf(err) != matrix.FailNoName {
		t.Errorf("no records: %v", err)
	}
	if _, err := d.IP(ctx, "broken.example.org"); FailureOf(err) != matrix.FailDNS {
		t.Errorf("SERVFAIL: %v", err)
	}
	srvs, err := d.SRV(ctx, "matrix-fed", "tcp", "fine.example.org")
	if err != nil || len(srvs) != 1 || *srvs[0] != (net.SRV{Target: "h.", Port: 8443, Priority: 1, Weight: 2}) {
		t.Errorf("SRV: %v, %v", srvs, err)
	}
	if _, err := d.SRV(ctx, "matrix", "tcp", "fine.example.org"); FailureOf(err) != matrix.FailNoName {
		t.Errorf("no SRV: %v", err)
	}
}

func TestStatic(t *testing.T) {
	s, err := NewStatic(map[string]string{
		"hs2.test":           "127.0.0.2",
		"HS3.test":           "::1",
		"hs4.test:8448":      "127.0.0.4",
		"hs5.test:8448":      "127.0.0.5:9999",
		"hs2.test:443":       "[::1]:4443",
		"192.0.2.1:8448":     "127.0.0.1:18448",
		"[2001:db8::1]:8448": "127.0.0.1:28448",
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		host string
		port uint16
		want string
	}{
		{"hs2.test", 8448, "127.0.0.2:8448"},
		{"hs2.test", 443, "[::1]:4443"},
		{"hs3.test", 1, "[::1]:1"},
		{"hs4.test", 8448, "127.0.0.4:8448"},
		{"hs4.test", 443, ""},
		{"hs5.test", 8448, "127.0.0.5:9999"},
		{"192.0.2.1", 8448, "127.0.0.1:18448"},
		{"2001:db8::1", 8448, "127.0.0.1:28448"},
		{"other.test", 8448, ""},
	} {
		got, ok := s.find(tt.host, tt.port)
		if ok != (tt.want != "") || ok && got.String() != tt.want {
			t.Errorf("find(%s, %d) = %v, %v, want %q", tt.host, tt.port, got, ok, tt.want)
		}
	}
	for host, want := range map[string]bool{"hs2.test": true, "hs3.test": true, "hs5.test": true, "other.test": false, "2001:db8::1": true} {
		if s.has(host) != want {
			t.Errorf("has(%s) = %v", host, !want)
		}
	}
	if _, ok := (*Static)(nil).find("a", 1); ok || (*Static)(nil).has("a") || (&Static{}).has("a") {
		t.Error("no Static holds an address")
	}
	for key, value := range map[string]string{
		"":         "127.0.0.1",
		"a b":      "127.0.0.1",
		"a.test":   "127.0.0.1:80",
		"b.test":   "localhost",
		"c.test:1": "127.0.0.1:0",
		"d.test:0": "127.0.0.1",
		"e.test":   "",
		"f.test:1": "::1:80:",
	} {
		if _, err := NewStatic(map[string]string{key: value}); err == nil {
			t.Errorf("%q = %q is taken", key, value)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", key)) {
			t.Errorf("%q: the error does not name the entry: %v", key, err)
		}
	}
}

func TestStaticNamesHaveNoServices(t *testing.T) {
	s, err := NewStatic(map[string]string{"hs2.test:8448": "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeLookup{fail: map[string]error{"_matrix._tcp.other.test": io.ErrUnexpectedEOF}}
	l := staticLookup{f, s}
	if _, err := l.SRV(t.Context(), "matrix", "tcp", "hs2.test"); !isNotFound(err) || len(f.asked) != 0 {
		t.Errorf("a static name: %v, asked %v", err, f.asked)
	}
	if _, err := l.SRV(t.Context(), "matrix", "tcp", "other.test"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("another name: %v", err)
	}
}

// That a server has no SRV record is remembered for longer than that its name does not
// exist, which may be repaired at any moment.
func TestHowLongItIsRememberedThatThereIsNothing(t *testing.T) {
	gone := notFound("x")
	r := &fakeResolver{srv: func(string) ([]*net.SRV, error) { return nil, gone }, ip: func(context.Context, string) ([]netip.Addr, error) { return nil, gone }}
	now := time.Unix(1e9, 0)
	d := NewDNS(DNSConfig{resolver: r, Now: func() time.Time { return now }})
	ask := func() (asked int) {
		before := r.count()
		_, _ = d.IP(t.Context(), "example.org")
		_, _ = d.SRV(t.Context(), "matrix-fed", "tcp", "example.org")
		return r.count() - before
	}
	for _, step := range []struct {
		after time.Duration
		want  int
	}{{0, 2}, {dnsNoName - 1, 0}, {1, 1}, {dnsNoRecord - dnsNoName - 1, 1}, {1, 1}} {
		now = now.Add(step.after)
		if got := ask(); got != step.want {
			t.Errorf("%s later %d questions are asked, want %d", step.after, got, step.want)
		}
	}
}

// A name server that never answers to AAAA does not keep what has an A record out of reach.
func TestAQuestionForAAAAThatIsNeverAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := addrs("192.0.2.1")
		var networks []string
		r := &networkResolver{func(ctx context.Context, network string) ([]netip.Addr, error) {
			networks = append(networks, network)
			if network == "ip4" {
				return one, nil
			}
			<-ctx.Done()
			return nil, &net.DNSError{Err: "i/o timeout", IsTimeout: true, UnwrapErr: ctx.Err()}
		}}
		d := NewDNS(DNSConfig{resolver: r})
		start := time.Now()
		got, err := d.IP(t.Context(), "a.example.org")
		if err != nil || !slices.Equal(got, one) || time.Since(start) != bothWait {
			t.Errorf("%v, %v after %s, asked %q", got, err, time.Since(start), networks)
		}
	})
}

// One that does not know EDNS0 is asked without.
func TestANameServerWithoutEDNS(t *testing.T) {
	one := addrs("192.0.2.1")
	modern := &networkResolver{func(context.Context, string) ([]netip.Addr, error) {
		return nil, &net.DNSError{Err: "server misbehaving"}
	}}
	plain := &networkResolver{func(context.Context, string) ([]netip.Addr, error) { return one, nil }}
	d := NewDNS(DNSConfig{resolver: modern, plain: plain})
	if got, err := d.IP(t.Context(), "a.example.org"); err != nil || !slices.Equal(got, one) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := d.SRV(t.Context(), "matrix", "tcp", "a.example.org"); err != nil || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}
}

// networkResolver is a resolver whose answers depend on the network that is asked for.
type networkResolver struct {
	ip func(ctx context.Context, network string) ([]netip.Addr, error)
}

func (r *networkResolver) LookupNetIP(ctx context.Context, network, _ string) ([]netip.Addr, error) {
	return r.ip(ctx, network)
}

func (r *networkResolver) LookupSRV(ctx context.Context, _, _, _ string) (string, []*net.SRV, error) {
	if _, err := r.ip(ctx, "srv"); err != nil {
		return "", nil, err
	}
	return "", []*net.SRV{{Target: "a.", Port: 1}}, nil
}

func TestPlainQuestion(t *testing.T) {
	question := []byte("\x12\x34\x01\x20\x00\x01\x00\x00\x00\x00\x00\x01" + "\x01a\x04test\x00\x00\x01\x00\x01")
	opt := "\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00"
	want := "\x12\x34\x01\x20\x00\x01\x00\x00\x00\x00\x00\x00" + "\x01a\x04test\x00\x00\x01\x00\x01"
	if got := plainQuestion(append(question, opt...)); string(got) != want {
		t.Errorf("%q", got)
	}
	for _, q := range []string{"", "short", want, want + opt, string(question) + "\x00\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00"} {
		if got := plainQuestion([]byte(q)); string(got) != q {
			t.Errorf("%q became %q", q, got)
		}
	}
}

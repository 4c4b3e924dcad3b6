package netx

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"fsbus/bus/matrix"
)

var (
	errNoAnswer = &Error{Failure: matrix.FailRefused, Op: OpConnect, Err: errors.New("connection refused")}
	err404      = fmt.Errorf("%w: status 404", errNoDocument)
)

// centred is a random source whose jitter is none.
type centred struct{}

func (centred) Uint64() uint64 { return 1 << 52 }

// wellKnownTest is a cache with a scripted fetch and a clock.
type wellKnownTest struct {
	*wellKnown
	time  time.Time
	doc   document
	err   error
	asked int
}

func newWellKnownTest(src mathrand.Source) *wellKnownTest {
	wt := &wellKnownTest{time: time.Unix(1e9, 0)}
	wt.wellKnown = newWellKnown(100, func() time.Time { return wt.time }, newLockedRand(src),
		func(context.Context, string) (document, error) {
			wt.asked++
			return wt.doc, wt.err
		})
	return wt
}

// untilFetch returns how much later the next fetch happens, to the second.
func (wt *wellKnownTest) untilFetch(t *testing.T) time.Duration {
	t.Helper()
	start, asked := wt.time, wt.asked
	for wt.asked == asked {
		wt.time = wt.time.Add(time.Second)
		if wt.time.Sub(start) > 49*time.Hour {
			t.Fatal("never fetched again")
		}
		if _, err := wt.delegation(t.Context(), "a.test"); err != nil {
			t.Fatal(err)
		}
	}
	return wt.time.Sub(start)
}

func TestWellKnownLifetimes(t *testing.T) {
	doc := func(life time.Duration) document { return document{server: "b.test", life: life} }
	type step struct {
		doc  document
		err  error
		want matrix.ServerName
		next time.Duration // until it is fetched again
	}
	const minutes = time.Minute
	for name, steps := range map[string][]step{
		"a document": {
			// Fetched again when 80 % of its life are over.
			{doc(10 * time.Hour), nil, "b.test", 8 * time.Hour},
			{doc(5 * minutes), nil, "b.test", 4 * minutes},
			{document{server: "c.test", life: 48 * time.Hour}, nil, "c.test", 48 * time.Hour * 8 / 10},
		},
		"an answer that is none": {
			{doc(0), err404, "", time.Hour},
			{doc(0), err404, "", time.Hour},
			{doc(time.Hour), nil, "b.test", 48 * minutes},
			{doc(0), err404, "", time.Hour}, // it may withdraw a document that is still valid
		},
		"no answer": {
			// Never seen: 2 min, doubling up to an hour.
			{doc(0), errNoAnswer, "", 2 * minutes},
			{doc(0), errNoAnswer, "", 4 * minutes},
			{doc(0), errNoAnswer, "", 8 * minutes},
			{doc(0), errNoAnswer, "", 16 * minutes},
			{doc(0), errNoAnswer, "", 32 * minutes},
			{doc(0), errNoAnswer, "", 60 * minutes},
			{doc(0), errNoAnswer, "", 60 * minutes},
			{doc(0), errNoAnswer, "", 60 * minutes},
			{doc(0), errNoAnswer, "", 60 * minutes},
			{doc(0), err404, "", 60 * minutes},
			{doc(0), errNoAnswer, "", 2 * minutes}, // an answer starts over
		},
		"an outage": {
			{doc(10 * minutes), nil, "b.test", 8 * minutes},
			{doc(0), errNoAnswer, "b.test", 2 * minutes}, // the old one still serves
			{doc(0), errNoAnswer, "", 2 * minutes},       // its life is over
			{doc(0), errNoAnswer, "", 2 * minutes},       // seen lately: no back-off
			{doc(10 * minutes), nil, "b.test", 8 * minutes},
		},
	} {
		t.Run(name, func(t *testing.T) {
			wt := newWellKnownTest(centred{})
			for i, s := range steps {
				wt.doc, wt.err = s.doc, s.err
				if i == 0 {
					_, _ = wt.delegation(t.Context(), "a.test")
				} else if d := wt.untilFetch(t); d != steps[i-1].next {
					t.Fatalf("step %d happens %v after the one before, want %v", i, d, steps[i-1].next)
				}
				if got, err := wt.delegation(t.Context(), "a.test"); got != s.want || err != nil {
					t.Fatalf("step %d: %q, %v, want %q", i, got, err, s.want)
				}
			}
			if d := wt.untilFetch(t); d != steps[len(steps)-1].next {
				t.Errorf("fetched again after %v, want %v", d, steps[len(steps)-1].next)
			}
		})
	}

	t.Run("the end of an outage's grace", func(t *testing.T) {
		wt := newWellKnownTest(centred{})
		wt.doc = doc(10 * minutes)
		_, _ = wt.delegation(t.Context(), "a.test")
		wt.err = errNoAnswer
		wt.time = wt.time.Add(10*minutes + wellKnownGrace - time.Second)
		_, _ = wt.delegation(t.Context(), "a.test")
		if d := wt.untilFetch(t); d != 2*minutes {
			t.Errorf("within it: next after %v", d)
		}
		for _, want := range []time.Duration{2 * minutes, 4 * minutes, 8 * minutes} {
			if d := wt.untilFetch(t); d != want {
				t.Errorf("after it: next after %v, want %v", d, want)
			}
		}
	})
}

func TestWellKnownJitter(t *testing.T) {
	for _, tt := range []struct {
		name     string
		doc      document
		err      error
		from, to time.Duration // of the next fetch
	}{
		{"our own default", document{server: "b.test", life: matrix.WellKnownDefault, ours: true}, nil,
			24 * time.Hour * 72 / 100, 24 * time.Hour * 88 / 100},
		{"what the remote asks for", document{server: "b.test", life: 10 * time.Hour}, nil, 8 * time.Hour, 8 * time.Hour},
		{"no document", document{}, err404, 54 * time.Minute, 66 * time.Minute},
		{"no answer", document{}, errNoAnswer, 108 * time.Second, 132 * time.Second},
	} {
		wt := newWellKnownTest(mathrand.NewPCG(1, 2))
		wt.doc, wt.err = tt.doc, tt.err
		least, most := time.Duration(1<<62), time.Duration(0)
		for i := range 300 {
			host := fmt.Sprint(i, ".test")
			_, _ = wt.delegation(t.Context(), host)
			d, _ := wt.cache.get(host)
			least, most = min(least, d.refresh.Sub(wt.time)), max(most, d.refresh.Sub(wt.time))
		}
		span := tt.to - tt.from
		if least < tt.from || most > tt.to || least > tt.from+span/10 || most < tt.to-span/10 {
			t.Errorf("%s: fetched again after %v to %v, want %v to %v", tt.name, least, most, tt.from, tt.to)
		}
	}
}

func TestWellKnownIsBounded(t *testing.T) {
	wt := newWellKnownTest(centred{})
	wt.doc = document{server: matrix.ServerName(strings.Repeat("b", matrix.MaxServerName)), life: time.Hour}
	for i := range 300 {
		host := fmt.Sprint(i, strings.Repeat("a", matrix.MaxServerName-4))
		if got, err := wt.delegation(t.Context(), host); got != wt.doc.server || err != nil {
			t.Fatal(got, err)
		}
	}
	if entries, _, fetches := wt.stats(); entries != 100 || fetches != 300 {
		t.Errorf("%d entries of the longest names, bound 100; %d fetches", entries, fetches)
	}
}

func TestWellKnownFetchesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetches := 0
		var release chan struct{}
		doc := document{server: "b.test", life: 10 * time.Hour}
		w := newWellKnown(100, time.Now, newLockedRand(centred{}), func(context.Context, string) (document, error) {
			fetches++ // one at a time, or the race detector tells
			<-release
			return doc, nil
		})
		ask := func(n int) (answers chan matrix.ServerName) {
			answers = make(chan matrix.ServerName, n)
			for range n {
				go func() {
					name, err := w.delegation(t.Context(), "a.test")
					if err != nil {
						t.Error(err)
					}
					answers <- name
				}()
			}
			synctest.Wait()
			return answers
		}
		release = make(chan struct{})
		answers := ask(100)
		close(release)
		for range 100 {
			if n := <-answers; n != "b.test" {
				t.Fatalf("got %q", n)
			}
		}
		if fetches != 1 {
			t.Errorf("%d fetches for 100 callers", fetches)
		}

		// Late in its life one caller fetches it anew. The others do not wait.
		time.Sleep(9 * time.Hour)
		release, doc.server = make(chan struct{}), "c.test"
		answers = ask(100)
		if len(answers) != 99 {
			t.Errorf("%d of 99 have the old document during the fetch", len(answers))
		}
		close(release)
		synctest.Wait()
		got := map[matrix.ServerName]int{}
		for range 100 {
			got[<-answers]++
		}
		if got["b.test"] != 99 || got["c.test"] != 1 || fetches != 2 {
			t.Errorf("got %v after %d fetches", got, fetches)
		}
	})
}

func TestWellKnownTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := func(ctx context.Context, _ string) (document, error) {
			<-ctx.Done()
			return document{}, requestError(ctx, ctx.Err(), false)
		}
		w := newWellKnown(100, time.Now, newLockedRand(centred{}), hang)

		// A silent web server takes half of the caller's time, leaves the rest
		// for the other steps, and is remembered.
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		start := time.Now()
		if got, err := w.delegation(ctx, "a.test"); got != "" || err != nil || time.Since(start) != 5*time.Second {
			t.Errorf("silent: %q, %v after %v", got, err, time.Since(start))
		}
		start = time.Now()
		if got, err := w.delegation(ctx, "a.test"); got != "" || err != nil || time.Since(start) != 0 {
			t.Errorf("silent, again: %q, %v after %v", got, err, time.Since(start))
		}
		start = time.Now()
		if got, err := w.delegation(t.Context(), "b.test"); got != "" || err != nil || time.Since(start) != wellKnownTimeout {
			t.Errorf("without a deadline: %q, %v after %v", got, err, time.Since(start))
		}

		// A caller who gives up, and a limit of our own, decide nothing.
		given, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := w.delegation(given, "c.test"); FailureOf(err) != matrix.FailCancelled {
			t.Errorf("given up: %v", err)
		}
		w.fetch = func(ctx context.Context, _ string) (document, error) {
			return document{}, dialError(ctx, OpTLS, errOwnLimit)
		}
		if _, err := w.delegation(t.Context(), "c.test"); FailureOf(err) != matrix.FailLocal {
			t.Errorf("own limit: %v", err)
		}
		w.fetch = func(context.Context, string) (document, error) {
			return document{server: "d.test", life: 10 * time.Hour}, nil
		}
		if got, err := w.delegation(t.Context(), "c.test"); got != "d.test" || err != nil {
			t.Errorf("afterwards: %q, %v", got, err)
		}
		// Nor do they take away a document that is still valid.
		w.fetch = hang
		time.Sleep(9 * time.Hour)
		given, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if got, err := w.delegation(given, "c.test"); got != "d.test" || err != nil {
			t.Errorf("given up while a document is valid: %q, %v", got, err)
		}
	})
}

// ownFailures are what a fetch ends with when it is our own network, or our
// clock, that is not in order.
var ownFailures = map[string]error{
	"our name server fails":      &Error{Failure: matrix.FailDNS, Op: OpResolve, Err: errServfail},
	"our name server is silent":  &Error{Failure: matrix.FailTimeout, Op: OpResolve, Err: context.DeadlineExceeded},
	"there is no way out":        &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: errno(syscall.ENETUNREACH)},
	"the interface is down":      &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: errno(syscall.ENETDOWN)},
	"our clock is in the past":   &Error{Failure: matrix.FailLocal, Op: OpTLS, Err: errClock},
	"IPv4 has no way out either": &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: connectError("192.0.2.1", syscall.ENETUNREACH)},
}

// TestWellKnownOwnOutage: a machine that starts half an hour before its router
// does not believe of any server that it delegates nothing, neither during that
// time nor after it.
func TestWellKnownOwnOutage(t *testing.T) {
	for name, failure := range ownFailures {
		t.Run(name, func(t *testing.T) {
			wt := newWellKnownTest(centred{})
			wt.err = failure
			for range 31 {
				if got, err := wt.delegation(t.Context(), "a.test"); got != "" || FailureOf(err) != FailureOf(failure) {
					t.Fatalf("during the outage: %q, %v, want %v", got, err, failure)
				}
				wt.time = wt.time.Add(time.Minute)
			}
			_, _ = wt.delegation(t.Context(), "a.test")
			wt.doc, wt.err = document{server: "b.test", life: 24 * time.Hour}, nil
			wt.time = wt.time.Add(wellKnownOutage)
			if got, err := wt.delegation(t.Context(), "a.test"); got != "b.test" || err != nil {
				t.Errorf("after it: %q, %v", got, err)
			}
			if entries, _, fetches := wt.stats(); entries != 1 || fetches != 1 {
				t.Errorf("%d entries, %d outcomes; the document alone is one", entries, fetches)
			}
		})
	}
}

// TestWellKnownOthersOutage is about what looks like an outage of our own, and
// is the remote's: discovery goes on, and it is remembered.
func TestWellKnownOthersOutage(t *testing.T) {
	for name, failure := range map[string]error{
		"no such name":           &Error{Failure: matrix.FailNoName, Op: OpResolve, Err: notFound("a.test")},
		"the host is off":        &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: errno(syscall.EHOSTUNREACH)},
		"a firewall":             &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: errno(syscall.EPERM)},
		"a route that prohibits": &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: errno(syscall.EACCES)},
		"only IPv6, and none":    &Error{Failure: matrix.FailUnreachable, Op: OpConnect, Err: connectError("2001:db8::1", syscall.ENETUNREACH)},
		"silent":                 &Error{Failure: matrix.FailTimeout, Op: OpConnect, Err: context.DeadlineExceeded},
		"its certificate":        &Error{Failure: matrix.FailTLS, Op: OpTLS, Err: errors.New("expired")},
	} {
		wt := newWellKnownTest(centred{})
		wt.err = failure
		for range 2 {
			if got, err := wt.delegation(t.Context(), "a.test"); got != "" || err != nil || wt.asked != 1 {
				t.Errorf("%s: %q, %v, fetched %d times", name, got, err, wt.asked)
			}
		}
		if d := wt.untilFetch(t); d != wellKnownRetry {
			t.Errorf("%s: fetched again after %v", name, d)
		}
	}
}

// TestWellKnownWhileOthersAreReached: what looks like an outage of our own is none
// while servers are connected to. A machine with IPv6 alone finds no way to a host that
// has an IPv4 address, and the zone of a name may answer SERVFAIL.
func TestWellKnownWhileOthersAreReached(t *testing.T) {
	for name, failure := range ownFailures {
		wt := newWellKnownTest(centred{})
		up := true
		wt.up = func() bool { return up }
		wt.err = failure
		got, err := wt.delegation(t.Context(), "a.test")
		if own := errors.Is(failure, errClock); own != (err != nil) || got != "" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		up = false
		if got, err := wt.delegation(t.Context(), "b.test"); got != "" || err == nil {
			t.Errorf("%s, and none is reached: %q, %v", name, got, err)
		}
	}
}

// TestWellKnownOutageIsAskedAboutOnce: however many requests there are for a
// host, few fetches are made while our own network is down.
func TestWellKnownOutageIsAskedAboutOnce(t *testing.T) {
	for name, failure := range ownFailures {
		wt := newWellKnownTest(centred{})
		ask := func(n int, want matrix.ServerName, failure error) {
			t.Helper()
			for range n {
				if got, err := wt.delegation(t.Context(), "a.test"); got != want || FailureOf(err) != FailureOf(failure) {
					t.Fatalf("%s: %q, %v, want %q, %v", name, got, err, want, failure)
				}
			}
		}
		wt.err = failure
		ask(1000, "", failure)
		wt.time = wt.time.Add(wellKnownOutage - 1)
		ask(1000, "", failure)
		if wt.asked != 1 {
			t.Errorf("%s: %d fetches at once", name, wt.asked)
		}
		if _, _ = wt.delegation(t.Context(), "b.test"); wt.asked != 2 {
			t.Errorf("%s: another host's failure was taken for this one's", name)
		}
		wt.time = wt.time.Add(1)
		ask(1000, "", failure)
		if wt.asked != 3 {
			t.Errorf("%s: %d fetches after a while, want 1", name, wt.asked-2)
		}

		// A document that is still good serves on, and is sought just as rarely.
		wt.doc, wt.err = document{server: "c.test", life: 10 * time.Hour}, nil
		wt.time = wt.time.Add(wellKnownOutage)
		ask(1, "c.test", nil)
		wt.err = failure
		wt.time = wt.time.Add(9 * time.Hour)
		wt.asked = 0
		ask(1000, "c.test", nil)
		wt.time = wt.time.Add(wellKnownOutage)
		ask(1000, "c.test", nil)
		if wt.asked != 2 {
			t.Errorf("%s: %d fetches late in a document's life, want 2", name, wt.asked)
		}
		wt.time = wt.time.Add(time.Hour)
		ask(1, "", failure) // its life is over
	}
}

// TestWellKnownOwnLimit: a limit that was not free for one request may be free
// for the next, which is not made to wait for that.
func TestWellKnownOwnLimit(t *testing.T) {
	wt := newWellKnownTest(centred{})
	wt.err = &Error{Failure: matrix.FailLocal, Op: OpTLS, Err: errOwnLimit}
	for i := range 3 {
		if _, err := wt.delegation(t.Context(), "a.test"); FailureOf(err) != matrix.FailLocal || wt.asked != i+1 {
			t.Errorf("%v after %d fetches", err, wt.asked)
		}
	}
}

func TestWellKnownOutagesAreBounded(t *testing.T) {
	for _, tt := range []struct {
		name, host string
		max        int // hosts remembered
	}{
		{"many hosts", ".test", maxOutages},
		{"with the longest names", strings.Repeat("a", matrix.MaxServerName-4), maxOutages * 512 / (entryOverhead + 3*matrix.MaxServerName)},
	} {
		wt := newWellKnownTest(centred{})
		host := func(i int) string { return fmt.Sprintf("%03d%s", i, tt.host) }
		for i := range 2 * maxOutages {
			dns := *errServfail
			dns.Name = host(i)
			wt.err = &Error{Failure: matrix.FailDNS, Op: OpResolve, Err: &dns}
			_, _ = wt.delegation(t.Context(), host(i))
		}
		n := wt.outages.len()
		if n > tt.max || n < tt.max*8/10 || wt.outages.bytes > maxOutages<<9 || wt.cache.len() != 0 {
			t.Errorf("%s: %d outages of %d bytes, at most %d; %d outcomes", tt.name, n, wt.outages.bytes, tt.max, wt.cache.len())
		}
		wt.asked = 0
		_, _ = wt.delegation(t.Context(), host(2*maxOutages-1))
		if wt.asked != 0 {
			t.Errorf("%s: the last one is not among them", tt.name)
		}
	}
}

// TestDiscoveryDuringAnOutage goes through a Client: a request fails for what our
// own network is, without a look at the place where an undelegated server would
// be, and finds the right server as soon as the network is back.
func TestDiscoveryDuringAnOutage(t *testing.T) {
	var d delegating
	d.Store("b.test:1")
	hosts := make(chan string, 1)
	static := map[string]string{
		"a.test:443": web(t, false, d.serve, "a.test"),
		"b.test:1":   web(t, true, func(_ http.ResponseWriter, r *http.Request) { hosts <- r.Host }, "b.test"),
	}
	for name, tt := range map[string]struct {
		dns, connect error
		want         matrix.Failure
	}{
		"name server": {dns: errServfail, want: matrix.FailDNS},
		"network":     {connect: connectError("127.0.0.1", syscall.ENETUNREACH), want: matrix.FailUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			lookup := &fakeLookup{ip: map[string][]string{}}
			entries := maps.Clone(static)
			if tt.dns != nil {
				delete(entries, "a.test:443")
				lookup.fail = map[string]error{"a.test": tt.dns}
			}
			now := time.Unix(1e9, 0)
			c := newTestClient(t, entries, func(c *ClientConfig) { c.Lookup, c.Now = lookup, func() time.Time { return now } })
			connect := c.dialer.connectTo
			tried := 0
			c.dialer.connectTo = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
				tried++
				if tt.connect != nil {
					return nil, tt.connect
				}
				return connect(ctx, to)
			}
			for range 3 {
				_, err := c.Do(testContext(t), &Request{Destination: "a.test", Method: "GET", Target: "/"}, nil)
				wantFailure(t, err, tt.want, OpResolve)
			}
			if slices.ContainsFunc(lookup.asked, func(q string) bool { return q != "a.test" }) || tried > 1 {
				t.Errorf("asked for %q, %d connects", lookup.asked, tried)
			}
			// The network is back.
			c.dialer.connectTo, c.dialer.static, lookup.fail = connect, must(NewStatic(static)), nil
			now = now.Add(wellKnownOutage)
			get(t, c, "a.test", "/")
			if got := <-hosts; got != "b.test:1" {
				t.Errorf("Host %q", got)
			}
		})
	}
}

// TestWellKnownFetch runs the fetch against real servers.
func TestWellKnownFetch(t *testing.T) {
	silentLogs(t)
	var mu sync.Mutex
	var requests []*http.Request
	handler := func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		requests = append(requests, r)
		mu.Unlock()
		switch host, path := r.Host, r.URL.Path; {
		case host == "plain.test" && path == wellKnownPath, path == "/found":
			w.Header().Set("Cache-Control", "max-age=7200")
			_, _ = io.WriteString(w, `{"m.server": "there.test:443"}`)
		case host == "ageless.test":
			_, _ = io.WriteString(w, `{"m.server": "there.test"}`)
		case host == "404.test":
			w.WriteHeader(404)
			_, _ = io.WriteString(w, `{"m.server": "there.test"}`)
		case host == "503.test":
			w.WriteHeader(503)
		case host == "429.test":
			w.WriteHeader(429)
		case host == "202.test":
			w.WriteHeader(202)
			_, _ = io.WriteString(w, `{"m.server": "there.test"}`)
		case host == "bad.test":
			_, _ = io.WriteString(w, `{"m.server": "not a name"}`)
		case host == "fits.test":
			_, _ = io.WriteString(w, `{"m.server": "there.test"}`+strings.Repeat(" ", matrix.MaxWellKnown-26))
		case host == "1mib.test":
			_, _ = io.WriteString(w, `{"m.server": "there.test"}`+strings.Repeat(" ", 1<<20))
		case host == "moved.test" && path == wellKnownPath:
			http.Redirect(w, r, "/hop?a=%2F", http.StatusMovedPermanently)
		case host == "moved.test" && r.RequestURI == "/hop?a=%2F":
			http.Redirect(w, r, "https://User:pass@OTHER.test/found#x", http.StatusTemporaryRedirect)
		case host == "loop.test":
			http.Redirect(w, r, wellKnownPath, http.StatusFound)
		case strings.HasPrefix(host, "hops"): // as many as the digit says
			n := int(host[4] - '0')
			if i := strings.Count(path, "y"); i < n {
				http.Redirect(w, r, "/"+strings.Repeat("y", i+1), http.StatusFound)
			} else {
				_, _ = io.WriteString(w, `{"m.server": "there.test"}`)
			}
		case host == "http.test":
			http.Redirect(w, r, "http://plain.test/found", http.StatusFound)
		case host == "nowhere.test":
			w.WriteHeader(302)
		case host == "inner.test":
			http.Redirect(w, r, "https://169.254.169.254/found", http.StatusFound)
		case host == "lost.test":
			http.Redirect(w, r, "https://servfail.test/found", http.StatusFound)
		case host == "inner2.test":
			http.Redirect(w, r, "https://private.test/found", http.StatusFound)
		default:
			w.WriteHeader(500)
		}
	}
	names := []string{"plain.test", "ageless.test", "404.test", "503.test", "429.test", "202.test", "bad.test", "fits.test", "1mib.test",
		"moved.test", "other.test", "loop.test", "hops5.test", "hops6.test", "http.test", "nowhere.test", "inner.test", "inner2.test", "lost.test", "badcert.test"}
	addr := web(t, true, handler, names[:len(names)-1]...)
	static := map[string]string{}
	for _, n := range names {
		static[n+":443"] = addr
	}
	for name, serve := range map[string]func(*tls.Conn, *bufio.Reader){
		"cut.test": func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"m.server\"")
		},
		"endless.test": func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			for ; err == nil; _, err = io.WriteString(c, "X: "+strings.Repeat("x", 1000)+"\r\n") {
			}
		},
		"silent.test": func(_ *tls.Conn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) },
		"trickle.test": func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
			for ; err == nil; _, err = io.WriteString(c, " ") {
				time.Sleep(time.Millisecond)
			}
		},
	} {
		static[name+":443"] = raw(t, serve, name)
	}
	client := newTestClient(t, static, func(c *ClientConfig) {
		c.Lookup = &fakeLookup{ip: map[string][]string{"private.test": {"10.1.2.3", "fd00::1"}}, fail: map[string]error{"servfail.test": errServfail}}
	})
	fetch := (&wellKnownFetcher{open: client.connector.open, now: time.Now}).fetch

	for _, tt := range []struct {
		host    string
		want    document
		none    bool // the remote has no valid document
		failure matrix.Failure
	}{
		{host: "plain.test", want: document{"there.test:443", 2 * time.Hour, false}},
		{host: "ageless.test", want: document{"there.test", matrix.WellKnownDefault, true}},
		{host: "fits.test", want: document{"there.test", matrix.WellKnownDefault, true}},
		{host: "moved.test", want: document{"there.test:443", 2 * time.Hour, false}},
		{host: "hops5.test", want: document{"there.test", matrix.WellKnownDefault, true}},
		{host: "404.test", none: true},
		{host: "202.test", none: true},
		{host: "bad.test", none: true},
		{host: "1mib.test", none: true},
		{host: "loop.test", none: true},
		{host: "hops6.test", none: true},
		{host: "http.test", none: true},
		{host: "nowhere.test", none: true},
		{host: "503.test"},
		{host: "429.test"},
		{host: "inner.test", failure: matrix.FailBlocked},
		{host: "inner2.test", failure: matrix.FailBlocked},
		{host: "badcert.test", failure: matrix.FailTLS},
		{host: "unknown.test", failure: matrix.FailNoName},
		{host: "servfail.test", failure: matrix.FailDNS},
		{host: "cut.test", failure: matrix.FailReset},
		{host: "endless.test", failure: matrix.FailTooLarge},
		{host: "silent.test", failure: matrix.FailTimeout},
		{host: "trickle.test", failure: matrix.FailTimeout},
	} {
		t.Run(tt.host, func(t *testing.T) {
			limit := testWait
			if tt.failure == matrix.FailTimeout {
				limit = 200 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			got, err := fetch(ctx, tt.host)
			switch {
			case tt.want.server != "":
				if got != tt.want || err != nil {
					t.Errorf("%+v, %v, want %+v", got, err, tt.want)
				}
			case errors.Is(err, errNoDocument) != tt.none || err == nil:
				t.Errorf("error %v; the remote has no document: %v", err, tt.none)
			case tt.failure != matrix.FailNone && FailureOf(err) != tt.failure:
				t.Errorf("%v: %v, want %v", err, FailureOf(err), tt.failure)
			}
		})
	}
	// A redirect into the void is the remote's fault: to reach it we have a network.
	if _, err := fetch(testContext(t), "lost.test"); err == nil || errors.Is(err, errNoDocument) || ownNetwork(err) {
		t.Errorf("a redirect to a name that cannot be looked up: %v", err)
	}
	for _, r := range requests {
		if r.ProtoMajor != 1 || r.Method != "GET" || r.UserAgent() != "" || r.Header.Get("Accept-Encoding") != "" || r.Header.Get("Authorization") != "" {
			t.Errorf("request %s %s over %s with %v", r.Method, r.RequestURI, r.Proto, r.Header)
		}
	}
	requests = nil
	if _, err := (&wellKnownFetcher{open: client.connector.open, now: time.Now, userAgent: "a bus"}).fetch(testContext(t), "plain.test"); err != nil ||
		requests[0].UserAgent() != "a bus" {
		t.Errorf("%v; User-Agent %q", err, requests[0].UserAgent())
	}
}

func FuzzRedirect(f *testing.F) {
	for _, s := range []string{"/a", "//b.test/c", "https://b.test:8443/x?y#z", "http://b.test/", "https://u:p@b.test", "https:b", "https://[::1]/",
		"https://b.test:/", "ftp://x", "%zz", "https://b.test\r\n", "?q", "https://[fe80::1%25eth0]/", "https://%62.test/", "/a? b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, location string) {
		from := &url.URL{Scheme: "https", Host: "a.test", Path: wellKnownPath}
		to, err := redirect(from, location)
		if err != nil {
			if to != nil || !errors.Is(err, errNoDocument) {
				t.Errorf("%q: %v with %v", location, err, to)
			}
			return
		}
		if _, err := matrix.ParseServerName(to.Host); err != nil || to.Scheme != "https" || to.User != nil || to.Fragment != "" {
			t.Errorf("%q leads to %v: %v", location, to, err)
		}
		if uri := to.RequestURI(); uri[0] != '/' || strings.ContainsAny(uri, " \r\n") {
			t.Errorf("%q: request target %q", location, uri)
		}
	})
}

package netx

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

// fakeDelegator is a delegator from a map. It notes in the lookup's list that
// it was asked, so that the order of all questions can be checked.
type fakeDelegator struct {
	documents map[string]matrix.ServerName
	err       error
	lookup    *fakeLookup
}

func (f *fakeDelegator) delegation(_ context.Context, host string) (matrix.ServerName, error) {
	f.lookup.asked = append(f.lookup.asked, "well-known "+host)
	return f.documents[host], f.err
}

// TestDiscover has a case for each step of S2S "Resolving server names".
func TestDiscover(t *testing.T) {
	srv := func(target string, port uint16) []*net.SRV { return []*net.SRV{{Target: target, Port: port}} }
	one := func(host string, port uint16) []Target { return []Target{{Host: host, Port: port}} }
	temporary := &net.DNSError{Err: "server misbehaving", IsTemporary: true}

	const wk, fed, legacy = "well-known a.test", "_matrix-fed._tcp.a.test", "_matrix._tcp.a.test"
	const dfed, dlegacy = "_matrix-fed._tcp.d.test", "_matrix._tcp.d.test"
	tests := []struct {
		name      string
		server    matrix.ServerName
		delegates matrix.ServerName // a.test's document
		srv       map[string][]*net.SRV
		fail      map[string]error
		want      Route
		failure   matrix.Failure
		asked     []string
	}{
		{name: "IPv4", server: "192.0.2.1",
			want: Route{TLSName: "192.0.2.1", HostHeader: "192.0.2.1", Targets: one("192.0.2.1", 8448), Step: "1"}},
		{name: "IPv4 and port", server: "192.0.2.1:443",
			want: Route{TLSName: "192.0.2.1", HostHeader: "192.0.2.1:443", Targets: one("192.0.2.1", 443), Step: "1"}},
		{name: "IPv6", server: "[2001:db8::1]",
			want: Route{TLSName: "2001:db8::1", HostHeader: "[2001:db8::1]", Targets: one("2001:db8::1", 8448), Step: "1"}},
		{name: "IPv6 and port", server: "[2001:db8::1]:443",
			want: Route{TLSName: "2001:db8::1", HostHeader: "[2001:db8::1]:443", Targets: one("2001:db8::1", 443), Step: "1"}},

		{name: "port", server: "a.test:443", delegates: "d.test", srv: map[string][]*net.SRV{fed: srv("b.test.", 1)},
			want: Route{TLSName: "a.test", HostHeader: "a.test:443", Targets: one("a.test", 443), Step: "2"}},
		{name: "default port written out", server: "a.test:8448", delegates: "d.test",
			want: Route{TLSName: "a.test", HostHeader: "a.test:8448", Targets: one("a.test", 8448), Step: "2"}},

		{name: "delegated to an IP literal", server: "a.test", delegates: "192.0.2.1", asked: []string{wk},
			want: Route{TLSName: "192.0.2.1", HostHeader: "192.0.2.1", Targets: one("192.0.2.1", 8448), Step: "3.1"}},
		{name: "delegated to an IP literal and port", server: "a.test", delegates: "[2001:db8::1]:443", asked: []string{wk},
			want: Route{TLSName: "2001:db8::1", HostHeader: "[2001:db8::1]:443", Targets: one("2001:db8::1", 443), Step: "3.1"}},
		{name: "delegated to a port", server: "a.test", delegates: "d.test:443", asked: []string{wk},
			srv:  map[string][]*net.SRV{dfed: srv("b.test.", 1)},
			want: Route{TLSName: "d.test", HostHeader: "d.test:443", Targets: one("d.test", 443), Step: "3.2"}},
		{name: "delegated, SRV", server: "a.test", delegates: "d.test", asked: []string{wk, dfed},
			srv:  map[string][]*net.SRV{dfed: srv("b.test.", 1), dlegacy: srv("c.test.", 2), fed: srv("e.test.", 3)},
			want: Route{TLSName: "d.test", HostHeader: "d.test", Targets: one("b.test", 1), Step: "3.3"}},
		{name: "delegated, deprecated SRV", server: "a.test", delegates: "d.test", asked: []string{wk, dfed, dlegacy},
			srv:  map[string][]*net.SRV{dlegacy: srv("c.test.", 2), fed: srv("e.test.", 3)},
			want: Route{TLSName: "d.test", HostHeader: "d.test", Targets: one("c.test", 2), Step: "3.4"}},
		{name: "delegated, no SRV", server: "a.test", delegates: "d.test", asked: []string{wk, dfed, dlegacy},
			srv:  map[string][]*net.SRV{fed: srv("e.test.", 3)},
			want: Route{TLSName: "d.test", HostHeader: "d.test", Targets: one("d.test", 8448), Step: "3.5"}},
		{name: "delegated to itself", server: "a.test", delegates: "a.test", asked: []string{wk, fed, legacy},
			want: Route{TLSName: "a.test", HostHeader: "a.test", Targets: one("a.test", 8448), Step: "3.5"}},

		{name: "SRV", server: "a.test", asked: []string{wk, fed},
			srv:  map[string][]*net.SRV{fed: srv("b.test.", 1), legacy: srv("c.test.", 2)},
			want: Route{TLSName: "a.test", HostHeader: "a.test", Targets: one("b.test", 1), Step: "4"}},
		{name: "deprecated SRV", server: "a.test", asked: []string{wk, fed, legacy},
			srv:  map[string][]*net.SRV{legacy: srv("c.test.", 2)},
			want: Route{TLSName: "a.test", HostHeader: "a.test", Targets: one("c.test", 2), Step: "5"}},
		{name: "nothing", server: "a.test", asked: []string{wk, fed, legacy},
			want: Route{TLSName: "a.test", HostHeader: "a.test", Targets: one("a.test", 8448), Step: "6"}},
		{name: "spelling", server: "A.Test", delegates: "D.Test", asked: []string{wk, dfed, dlegacy},
			want: Route{TLSName: "d.test", HostHeader: "D.Test", Targets: one("d.test", 8448), Step: "3.5"}},

		{name: "several records", server: "a.test", asked: []string{wk, fed},
			srv: map[string][]*net.SRV{fed: {{Target: "B.test", Port: 1, Priority: 5, Weight: 2}, {Target: "c.test.", Port: 2, Priority: 1},
				{Target: "d.test.", Port: 0}, {Target: ".", Port: 4}}},
			want: Route{TLSName: "a.test", HostHeader: "a.test",
				Targets: []Target{{"b.test", 1, 5, 2}, {"c.test", 2, 1, 0}}, Step: "4"}},
		{name: "no service", server: "a.test", asked: []string{wk, fed},
			srv: map[string][]*net.SRV{fed: srv(".", 0), legacy: srv("c.test.", 2)}, failure: matrix.FailNoName},
		{name: "no service, deprecated", server: "a.test", delegates: "d.test", asked: []string{wk, dfed, dlegacy},
			srv: map[string][]*net.SRV{dlegacy: srv(".", 8448)}, failure: matrix.FailNoName},
		{name: "SRV fails for now", server: "a.test", asked: []string{wk, fed},
			srv: map[string][]*net.SRV{legacy: srv("c.test.", 2)}, fail: map[string]error{fed: temporary}, failure: matrix.FailDNS},
		{name: "deprecated SRV fails for now", server: "a.test", asked: []string{wk, fed, legacy},
			fail: map[string]error{legacy: temporary}, failure: matrix.FailDNS},
	}
	steps := map[string]bool{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			lookup := &fakeLookup{srv: tt.srv, fail: tt.fail}
			d := &fakeDelegator{documents: map[string]matrix.ServerName{"a.test": tt.delegates, "d.test": "never.test:1"}, lookup: lookup}
			r, err := discover(t.Context(), tt.server, d, lookup)
			if FailureOf(err) != tt.failure {
				t.Fatalf("error %v, want %v", err, tt.failure)
			}
			if err == nil && !reflect.DeepEqual(*r, tt.want) {
				t.Errorf("got  %+v\nwant %+v", *r, tt.want)
			}
			if !slices.Equal(lookup.asked, tt.asked) {
				t.Errorf("asked %q\nwant  %q", lookup.asked, tt.asked)
			}
			if r != nil {
				steps[r.Step] = true
			}
		})
	}
	for _, s := range []string{"1", "2", "3.1", "3.2", "3.3", "3.4", "3.5", "4", "5", "6"} {
		if !steps[s] {
			t.Errorf("no case for step %s", s)
		}
	}
}

func TestDiscoverGivesUp(t *testing.T) {
	lookup := &fakeLookup{}
	_, err := discover(t.Context(), "a.test", &fakeDelegator{err: context.Canceled, lookup: lookup}, lookup)
	if !errors.Is(err, context.Canceled) || len(lookup.asked) != 1 {
		t.Errorf("error %v, asked %q; without an outcome of step 3 no other may decide", err, lookup.asked)
	}
}

func TestOrder(t *testing.T) {
	random := newLockedRand(mathrand.NewPCG(1, 2))
	targets := []Target{
		{"low.test", 1, 20, 5},
		{"seldom.test", 1, 10, 10}, {"often.test", 1, 10, 30}, {"zero.test", 1, 10, 0},
		{"first.test", 1, 1, 0}, {"first2.test", 1, 1, 0},
	}
	before := slices.Clone(targets)
	const rounds = 20000
	chosen := map[string]int{}
	for range rounds {
		o := order(targets, random)
		if !slices.Equal(targets, before) {
			t.Fatal("the route's own targets were changed")
		}
		sorted, want := slices.Clone(o), slices.Clone(targets)
		byName := func(a, b Target) int { return strings.Compare(a.Host, b.Host) }
		slices.SortFunc(sorted, byName)
		slices.SortFunc(want, byName)
		if !slices.Equal(sorted, want) {
			t.Fatalf("targets lost or invented: %v", o)
		}
		if !slices.IsSortedFunc(o, func(a, b Target) int { return int(a.Priority) - int(b.Priority) }) {
			t.Fatalf("not by priority: %v", o)
		}
		chosen[o[0].Host]++
		chosen[o[2].Host]++
	}
	// Weights 30, 10 and 0: of 41 numbers, 30, 10 and 1 (RFC 2782 gives a
	// weight of 0 "a very small chance"). Without weights the first stays first.
	for host, share := range map[string]float64{"often.test": 30. / 41, "seldom.test": 10. / 41, "zero.test": 1. / 41, "first.test": 1} {
		if got := float64(chosen[host]) / rounds; got < share*0.8-0.001 || got > share*1.2 {
			t.Errorf("%s comes first in %.3f of all cases, want about %.3f", host, got, share)
		}
	}
	if o := order(nil, random); len(o) != 0 {
		t.Errorf("order of nothing: %v", o)
	}
}

func TestResolveError(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		ctx  context.Context
		err  error
		want matrix.Failure
	}{
		{t.Context(), notFound("x"), matrix.FailNoName},
		{t.Context(), errServfail, matrix.FailDNS},
		{t.Context(), errors.New("anything a Lookup may say"), matrix.FailDNS},
		{t.Context(), fmt.Errorf("%w: slots", errOwnLimit), matrix.FailLocal},
		{cancelled, errServfail, matrix.FailCancelled},
	} {
		e := resolveError(tt.ctx, tt.err)
		if e.Failure != tt.want || e.Op != OpResolve || !e.Unsent || !errors.Is(e, tt.err) {
			t.Errorf("%v: %+v, want %v", tt.err, e, tt.want)
		}
	}
}

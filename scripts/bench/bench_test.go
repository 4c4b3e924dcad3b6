package main

import (
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

func TestMedianOfRounds(t *testing.T) {
	var r result
	r.begin("one")
	for _, v := range []float64{5, 1, 3} {
		r.add("odd", "ms", v)
	}
	for _, v := range []float64{4, 1} {
		r.add("even", "ms", v)
	}
	if odd, even := r.median("odd"), r.median("even"); odd != 3 || even != 2.5 {
		t.Errorf("medians %v and %v", odd, even)
	}
	if table := r.table("one"); !strings.Contains(table, "odd") || !strings.Contains(table, "2.500") {
		t.Error(table)
	}
}

func TestBounds(t *testing.T) {
	var r result
	r.begin("one")
	r.atMost("equal", 2, 2, "s")
	r.atMost("above", 2.1, 2, "s")
	r.atLeast("equal", 2, 2, "s")
	r.atLeast("below", 1.9, 2, "s")
	if got := r.missed(); got != 2 {
		t.Errorf("%d missed, want 2", got)
	}
	if text := r.bounds(); !strings.Contains(text, "MISSED  above: 2.100 s, wanted at most 2\n") || !strings.Contains(text, "4 bounds, 2 missed") {
		t.Error(text)
	}
}

func TestDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 3: "3", 0.1234: "0.123", -0.5: "-0.500", 12.345: "12.35", 123.45: "123.5", 12345.6: "12346"} {
		if got := digits(v); got != want {
			t.Errorf("%v: %s, want %s", v, got, want)
		}
	}
}

func TestTargetsAreTakenFromBothEnds(t *testing.T) {
	targets := []target{{name: "a"}, {name: "b"}, {name: "c"}}
	if got := inTurn(targets, 0)[0].name + inTurn(targets, 1)[0].name + targets[0].name; got != "aca" {
		t.Error(got)
	}
}

func TestEventsHaveTheirSizeAndDiffer(t *testing.T) {
	key, err := matrix.NewSigningKey(make([]byte, 32), "test")
	if err != nil {
		t.Fatal(err)
	}
	from := fedload.Homeserver{Name: "example.org", Key: key}
	one, other := event(from, 1), event(from, 2)
	if len(one) != eventSize || sim.EventID(one) == sim.EventID(other) {
		t.Errorf("%d bytes, want %d; %s and %s", len(one), eventSize, sim.EventID(one), sim.EventID(other))
	}
}

// What is compared with must do the work: signatures arrive as they were.
func TestNaiveProxyCarriesRequests(t *testing.T) {
	f, err := rig.NewFederation(t.TempDir(), sim.Config{Servers: 2, Seed: 1, Shares: sim.Shares{sim.Dead: 0.5}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	handler, err := newNaiveProxy(f.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	defer handler.transport.CloseIdleConnections()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(l)
	defer server.Close()

	client := fedload.NewHook("unix:"+socket, naiveSecret, f.From)
	well, dead := f.NamesOf(sim.Well)[0], f.NamesOf(sim.Dead)[0]
	presence := f.From.Presence("a", "online", "")
	for _, test := range []struct {
		client *fedload.Client
		r      *fedload.Request
		status int
	}{
		{client, fedload.Lookup(well, "user"), 200},
		{client, fedload.Send(f.From.Name, well, "1", time.UnixMilli(1), nil, []json.RawMessage{presence}), 200},
		{client, fedload.Lookup(dead, "user"), 502},
		{fedload.NewHook("unix:"+socket, "wrong", f.From), fedload.Lookup(well, "user"), 407},
	} {
		if res := test.client.Do(t.Context(), test.r); res.Err != nil || res.Status != test.status {
			t.Errorf("%s %s: %+v, want %d", test.r.Method, test.r.Target, res, test.status)
		}
	}
}

// The second round asks for nothing that the first did not bring.
func TestProfilesOfTheSecondRoundAreKnown(t *testing.T) {
	f, err := rig.NewFederation(t.TempDir(), sim.Config{Servers: profileServers, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	known, fields := make(map[string]bool), make(map[string]int)
	for u := range profileUsers {
		known[profileLookup(f, u, 1).Target] = true
	}
	for u := range profileUsers {
		target := profileLookup(f, u, 2).Target
		full, field, _ := strings.Cut(target, "&field=")
		if !known[target] && !known[full] {
			t.Errorf("nobody has asked for %s", target)
		}
		fields[field]++
	}
	if len(known) != profileUsers || fields[""] != profileUsers/4 || fields["displayname"] != profileUsers/2 || fields["avatar_url"] != profileUsers/4 {
		t.Errorf("%d lookups, then by field %v", len(known), fields)
	}
}

func TestKeyIsRight(t *testing.T) {
	f, err := rig.NewFederation(t.TempDir(), sim.Config{Servers: 3, Notary: true})
	if err != nil {
		t.Fatal(err)
	}
	w := &way{Federation: f, name: "direct"}
	defer w.stop()
	client := w.client()
	defer client.Close()
	of := func(i int) signer { return signer{f.Names()[i], f.SigningKey(i)} }
	ask := func() []byte {
		wanted := fedload.KeyWanted{Server: f.Names()[1], ID: f.SigningKey(1).ID()}
		res := client.Do(t.Context(), fedload.KeyQuery(f.Names()[sim.NotaryServer], wanted))
		if res.Err != nil || res.Status != 200 {
			t.Fatalf("%+v", res)
		}
		return res.Body
	}
	now := time.Now()
	good, until := ask(), now.UnixMilli()
	if !keyIsRight(good, until, of(1), of(0)) {
		t.Errorf("%s is not right", good)
	}
	if keyIsRight(good, now.Add(48*time.Hour).UnixMilli(), of(1), of(0)) || keyIsRight(good, until, of(2), of(0)) || keyIsRight(good, until, of(1), of(2)) || keyIsRight(nil, until, of(1), of(0)) {
		t.Errorf("%s is right for whatever is asked", good)
	}
	for _, fault := range []sim.KeyFault{sim.WrongName, sim.Swapped, sim.BadSignature} {
		f.SetKeyFault(fault)
		if bad := ask(); keyIsRight(bad, until, of(1), of(0)) {
			t.Errorf("%v: %s is right", fault, bad)
		}
	}
}

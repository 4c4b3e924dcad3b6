package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fsbus/bus/node"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

func TestStormAsksForEachUserTwice(t *testing.T) {
	f, err := rig.NewFederation(t.TempDir(), sim.Config{Servers: 20, Seed: 1, Shares: shares})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tr := newTraffic(quickPlan, f, nil, nil)
	asked := make(map[string]int)
	requests := tr.storm("a")
	for _, r := range requests {
		asked[r.Target]++
	}
	for target, n := range asked {
		if n != 2 {
			t.Errorf("%s comes %d times", target, n)
		}
	}
	if want := 2 * (19*usersOfServer + usersOfLimited); len(requests) != want {
		t.Errorf("%d requests, want %d", len(requests), want)
	}
	if len(tr.dead) != 6 {
		t.Errorf("%d of 20 servers are dead, want 6", len(tr.dead))
	}
	for _, r := range tr.storm("b") {
		if asked[r.Target] > 0 {
			t.Errorf("%s is in both lists", r.Target)
		}
	}
}

func TestWrongAnswersAreTold(t *testing.T) {
	tr := newTraffic(quickPlan, &rig.Federation{World: emptyWorld(t)}, nil, nil)
	r := fedload.Lookup("a.test", "user")
	for _, y := range tr.tallies() {
		y.add(r, fedload.Result{Status: 200})
		y.add(r, fedload.Result{Status: 502, Body: []byte("why")})
	}
	tr.capturedLive.add(r, fedload.Result{Status: 404})
	tr.take(r, fedload.Result{Status: 200, Body: []byte(`{"pdus":{}}`)}, 3)
	wrong := tr.wrong()
	if len(wrong) != 6 || !strings.Contains(wrong[0], "1 of 2 were not answered as they should be") || !strings.Contains(wrong[0], "status 502, why") ||
		!strings.Contains(wrong[2], "status 200") || !strings.Contains(wrong[3], "1 of 3") {
		t.Errorf("%q", wrong)
	}
	if tr.events != 3 || !strings.Contains(wrong[5], "2 of 3") {
		t.Errorf("%d events are awaited, %q", tr.events, wrong[5])
	}
	if silent := newTraffic(quickPlan, &rig.Federation{World: emptyWorld(t)}, nil, nil).wrong(); len(silent) != 6 {
		t.Errorf("nothing was asked, which is wrong: %q", silent)
	}
}

func TestTableSaysWhatIsAllowed(t *testing.T) {
	v := &view{peaks: new(rig.Peaks)}
	v.last.Report = &node.Report{RateLimits: node.RateLimits{HandshakesPerSecond: 100, HostRate: 7, HostConcurrency: 4}}
	text := table(newTraffic(quickPlan, &rig.Federation{World: emptyWorld(t)}, nil, nil), v, true)
	if want := "3 at once, then 7"; !strings.Contains(text, want) {
		t.Errorf("%q is not in\n%s", want, text)
	}
}

func emptyWorld(t *testing.T) *sim.World {
	w, err := sim.New(sim.Config{Servers: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func TestProgressIsOneLineASecond(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := newScreen(f)
	s.print("begin\n\n")
	s.progress("%d", 1)
	s.progress("%d", 2)
	s.print("end")
	if text, err := os.ReadFile(path); err != nil || string(text) != "begin\n1\nend\n" {
		t.Errorf("%q, %v", text, err)
	}
	terminal := &screen{out: f, terminal: true}
	terminal.progress("%d", 3)
	terminal.print("end")
	if text, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(text), "end\n3\r\x1b[Kend\n") {
		t.Errorf("%q, %v", text, err)
	}
}

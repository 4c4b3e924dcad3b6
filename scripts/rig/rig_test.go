package rig

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/bus/node"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

func TestAdaptReplacesValuesAndNothingElse(t *testing.T) {
	const text = "# a = 1\na = 1\nlist = [\n  2,\n]\n\n[s]\n# about a\na = 3\nb = \"x\"\n"
	got, err := Adapt(text, map[string]string{"s.a": "4", "s.b": Texts(`y"`, "z")})
	if want := "# a = 1\na = 1\nlist = [\n  2,\n]\n\n[s]\n# about a\na = 4\nb = [\"y\\\"\", \"z\"]\n"; err != nil || got != want {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
	for _, key := range []string{"b", "s.list", "list", "t.a"} {
		if got, err := Adapt(text, map[string]string{key: "5"}); err == nil {
			t.Errorf("%s: %q", key, got)
		}
	}
}

// What StartBus writes is a configuration that fsbus takes.
func TestTheExampleCanBeAdapted(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", example))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	b := &Bus{Unix: "unix:" + filepath.Join(dir, "s"), TCP: "127.0.0.1:1", Page: "127.0.0.1:2"}
	f, err := NewFederation(dir, sim.Config{Servers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	settings := b.settings(dir, f)
	settings["outbound.host_rate"] = "99.0"
	settings["homeserver.signing_key_path"] = Text(f.KeyFile)
	config, err := Adapt(string(text), settings)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := node.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Front.Listen, []string{b.Unix, b.TCP}) || c.Status.Listen != b.Page || c.Homeserver.ServerName != matrix.ServerName("example.org") ||
		c.Outbound.HostRate != 99 || len(c.Federation.IPRangeAllowlist) != 1 {
		t.Errorf("%+v", c)
	}
	// The key that signs is the one that the servers know.
	key, err := os.ReadFile(f.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	keys, _, err := matrix.ParseSigningKeys(key)
	if err != nil || len(keys) != 1 || keys[0].ID() != f.From.Key.ID() || !slices.Equal(keys[0].Public(), f.From.Key.Public()) {
		t.Errorf("the file of keys has %v, %v", keys, err)
	}
}

func TestStatusBytes(t *testing.T) {
	const status = "Name:\tVmRSS: 1 kB\nVmHWM:\t   20480 kB\nVmRSS:\t     100 kB\nThreads:\t7\n"
	for key, want := range map[string]int64{"VmHWM": 20 << 20, "VmRSS": 100 << 10} {
		if got, err := statusBytes([]byte(status), key); got != want || err != nil {
			t.Errorf("%s: %d, %v, want %d", key, got, err, want)
		}
	}
	for _, key := range []string{"VmSwap", "Threads"} {
		if got, err := statusBytes([]byte(status), key); err == nil {
			t.Errorf("%s: %d", key, got)
		}
	}
}

func TestStatCPU(t *testing.T) {
	const stat = "12 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 250 51 14 15 16\n"
	if got, err := statCPU([]byte(stat)); got != 3010*time.Millisecond || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "12 (a) S 1", "12 (a) S 1 2 3 4 5 6 7 8 9 10 x 51 14"} {
		if got, err := statCPU([]byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func TestRefusedConnects(t *testing.T) {
	const snmp = "Ip: Forwarding DefaultTTL\nIp: 1 64\nTcp: RtoAlgorithm AttemptFails\nTcp: 1 17\n"
	if got, err := snmpCount([]byte(snmp), "Tcp", "AttemptFails"); got != 17 || err != nil {
		t.Errorf("%d, %v, want 17", got, err)
	}
	if got, err := snmpCount([]byte(snmp), "Tcp", "Forwarding"); err == nil {
		t.Errorf("%d", got)
	}
	before, err := RefusedConnects()
	if err != nil {
		t.Fatal(err)
	}
	address, err := FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		t.Skip("another program has taken the address")
	}
	// Other programs may be refused as well.
	if after, err := RefusedConnects(); err != nil || after <= before {
		t.Errorf("%d before and %d after one was refused, %v", before, after, err)
	}
}

func TestUsageOfThisProcess(t *testing.T) {
	u, err := readUsage(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if u.RSS < 1<<20 || u.PeakRSS < u.RSS/2 || u.Files < 3 || u.CPU < 0 {
		t.Errorf("%+v", u)
	}
	if _, err := readUsage(1 << 30); err == nil {
		t.Error("a process that does not exist uses something")
	}
}

func TestProcessTellsHowItEnded(t *testing.T) {
	p, err := StartProcess(filepath.Join(t.TempDir(), "log"), "sh", "-c", "echo one; echo two >&2; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := p.Running(); err == nil || err.Error() != "sh has ended (exit status 3); the last that it wrote:\n  one\n  two" {
		t.Errorf("%v", err)
	}
	if err := p.Stop(time.Second); err == nil {
		t.Error("exit status 3 is no error")
	}
}

func TestStopKillsWhatDoesNotEnd(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := StartProcess(log, "sh", "-c", "trap '' TERM; echo ready; exec sleep 100")
	if err != nil {
		t.Fatal(err)
	}
	for {
		if text, err := os.ReadFile(log); err != nil {
			t.Fatal(err)
		} else if len(text) > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := p.Running(); err != nil {
		t.Error(err)
	}
	if err := p.Stop(time.Millisecond); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("%v", err)
	}
	<-p.Done()
}

func TestPeaksKeepTheMost(t *testing.T) {
	sample := func(health string, used, most int64, files int) Sample {
		return Sample{
			Report: &node.Report{Health: health, Budgets: []node.BudgetUse{{Name: Memory, Used: used, Max: most, Allowed: 10, Unit: "bytes"}, {Name: Goroutines, Used: used, Max: -1, Allowed: 4}}},
			Usage:  Usage{Files: files},
		}
	}
	var p Peaks
	for _, s := range []Sample{sample("ok", 3, 9, 1), sample("late", 5, 8, 7), sample("ok", 1, 8, 2)} {
		p.Add(s)
	}
	memory, err := p.Budget(Memory)
	if err != nil || memory.Max != 9 || memory.Used != 1 {
		t.Errorf("%+v, %v", memory, err)
	}
	if over := p.Over(); p.Samples != 3 || p.Files != 7 || p.Health != "late" || len(over) != 1 || !strings.HasPrefix(over[0], "goroutines: 5, allowed 4") {
		t.Errorf("%+v, over: %q", p, over)
	}
	if _, err := p.Budget(Connections); err == nil {
		t.Error("a budget that was not there")
	}
}

func TestPacedYieldsAllOrUntilTheEnd(t *testing.T) {
	requests := []*fedload.Request{{Target: "/1"}, {Target: "/2"}, {Target: "/3"}}
	if got := slices.Collect(Paced(t.Context(), 1e6, slices.Values(requests))); !slices.Equal(got, requests) {
		t.Errorf("%d requests", len(got))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	for range Paced(ctx, 1e-6, slices.Values(requests)) { // the second is due in days
		n++
		cancel()
	}
	if n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
}

func TestFormats(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", -1: "-1", -123: "-123", -1234: "-1,234", 1234567: "1,234,567"} {
		if got := Count(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "0.00 ms", 1234 * time.Microsecond: "1.23 ms", 45 * time.Millisecond: "45 ms", 6780 * time.Millisecond: "6.78 s"} {
		if got := Took(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
	if got := MiB(3 << 19); got != "1.5 MiB" {
		t.Error(got)
	}
}

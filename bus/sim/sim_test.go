package sim

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"fsbus/bus"
	"fsbus/sched"
)

var (
	seedFlag        = flag.Uint64("seed", 0, "run only this seed, in every profile")
	outboxSeedsFlag = flag.Uint64("outboxseeds", 200, "how many seeds to run in all profiles with an outbox")
	seedsFlag       = flag.Uint64("seeds", 40, "how many seeds to run in each profile")
)

// saturated gives the core more work than it has workers for: only then does
// it matter in which order things happen.
func saturated() Profile {
	c := bus.Default()
	c.Workers, c.Unknown, c.Failing = 8, 4, 2
	c.HostConcurrency, c.HostRate, c.HostBurst = 3, 20, 10
	c.MaxRequests, c.MaxHosts = 400, 460
	c.KnownAnswers, c.CacheBytes = 20, 100*sched.KiB
	return Profile{Config: c, Hosts: 30, Requests: 1200, Gap: 5 * time.Millisecond, Faulty: 30}
}

const rareSeeds = 200

var profiles = map[string]func() Profile{
	"drawn":     func() Profile { return Profile{} },
	"saturated": saturated,
	"crash":     func() Profile { p := Profile{Crash: true}; return p },
	"dead":      func() Profile { return Profile{Faulty: 95} },
	"lookups":   lookups,
}

// reaches says what must happen in some run of a profile; what is rare does so
// only in as many runs as rareSeeds.
var reaches = map[string][]string{
	"drawn": {"STALE", "load", "origin", "again", "passed in the middle", "passed at last"},
	"crash": {"crash"},
	"dead":  {"load", "origin"},
	"lookups": {"STALE", "STALE in time", "load", "origin", "again", "retry joined", "retry kept", "whole", "passed in the middle", "passed at last",
		"late batch", "late origin", "crash", "drain"},
}

// outboxProfiles run with an outbox; what each must reach.
var outboxProfiles = map[string]struct {
	profile func() Profile
	share   uint64 // of a hundred seeds
	reaches []string
}{
	"drawn": {func() Profile { return Profile{Requests: 40, Outbox: &OutboxProfile{}} }, 40,
		[]string{"bisect", "set aside", "malformed", "thaw", "merged", "duplicate", "repeated", "accept fault 1", "accept fault 2",
			"expired", "same id again", "offer gone", "hold", "flush", "drop", "drain", "reconfigured", "thaw merged"}},
	"saturated": {outboxSaturated, 20, []string{"line", "thaw", "merged", "delivery put off"}},
	"crash": {func() Profile { return Profile{Requests: 20, Outbox: &OutboxProfile{Crashes: 5}} }, 30,
		[]string{"crash", "repeated", "same id again", "bisect"}},
	"outage": {func() Profile {
		return Profile{Requests: 20, Hosts: 5, Faulty: 10, Outbox: &OutboxProfile{News: 120, Gap: 90 * time.Second, Outage: 4 * time.Hour, Items: 500}}
	}, 10, []string{"superseded", "expired", "thaw", "merged", "sweep"}},
}

// A server that was ill for long, in any way, has all that is durable soon after it is
// well, each item once.
func TestIllnessEnds(t *testing.T) {
	for _, ill := range []time.Duration{20 * time.Minute, 3 * time.Hour, 20 * time.Hour} {
		t.Run(ill.String(), func(t *testing.T) {
			t.Parallel()
			seeds := *outboxSeedsFlag / 20
			if ill > 3*time.Hour {
				seeds /= 2
			}
			for seed := range seeds {
				if *seedFlag != 0 && seed != *seedFlag {
					continue
				}
				w := run(t, seed, Profile{Requests: 60, Gap: ill / 60, Hosts: len(illnesses), Faulty: 1,
					Outbox: &OutboxProfile{News: 60, Gap: ill / 60, Rooms: 4, Items: 1000, Ill: ill}})
				if w.Counts[fmt.Sprint("well again after ", ill)] != 1 {
					t.Fatal("no server became well")
				}
			}
		})
	}
}

// outboxSaturated has many destinations for few workers.
func outboxSaturated() Profile {
	c := bus.Default()
	c.Workers, c.Unknown, c.Failing = 8, 4, 2
	c.HostConcurrency, c.HostRate, c.HostBurst = 3, 20, 10
	c.MaxRequests = 45
	return Profile{Config: c, Hosts: 40, Requests: 100, Gap: 20 * time.Millisecond, Faulty: 40, Outbox: &OutboxProfile{News: 40, Gap: 100 * time.Millisecond}}
}

func TestWorldHoldsItsInvariants(t *testing.T) {
	for name, profile := range profiles {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			total := map[string]int{}
			for seed := range *seedsFlag {
				if *seedFlag != 0 && seed != *seedFlag {
					continue
				}
				w := run(t, seed, profile())
				for k, n := range w.Counts {
					total[k] += n
				}
			}
			t.Log(fmt.Sprint(total))
			for _, must := range []string{"send", "reply", "refuse", "gone", "healed reply", "HIT", "SHARED", "field", "stored", "keys", "batch", "ahead", "key wanted", "join window true", "join window false"} {
				if total[must] == 0 {
					t.Errorf("no %q in any run: the simulation does not reach it", must)
				}
			}
			for _, must := range reaches[name] {
				if total[must] == 0 && *seedFlag == 0 && (*seedsFlag >= rareSeeds || profile().Lookups) { // which are all about that
					t.Errorf("no %q in any run: the simulation does not reach it", must)
				}
			}
		})
	}
}

func run(t *testing.T, seed uint64, p Profile) (w *World) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			t.Fatalf("%v\nagain with: go test ./bus/sim -run %s -seed=%d", r, t.Name(), seed)
		}
	}()
	w = NewWorld(seed, p)
	w.Run()
	return w
}

func TestOutboxHoldsItsInvariants(t *testing.T) {
	for name, p := range outboxProfiles {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			total := map[string]int{}
			for seed := range *outboxSeedsFlag * p.share / 100 {
				if *seedFlag != 0 && seed != *seedFlag {
					continue
				}
				w := run(t, seed, p.profile())
				for k, n := range w.Counts {
					total[k] += n
				}
				total["steps"] += w.Steps
			}
			t.Log(fmt.Sprint(total))
			for _, must := range append(p.reaches, "offer acknowledged", "item delivered", "delivery") {
				if total[must] == 0 && *seedFlag == 0 {
					t.Errorf("no %q in any run: the simulation does not reach it", must)
				}
			}
		})
	}
}

// The same seed must give the same run to the last effect: no map order, no
// clock and no other chance may decide anything.
func TestSameSeedSameRun(t *testing.T) {
	for name, profile := range profiles {
		for seed := range uint64(10) {
			a, b := NewWorld(seed, profile()).Run(), NewWorld(seed, profile()).Run()
			if a != b {
				t.Errorf("profile %s, seed %d: two runs differ", name, seed)
			}
		}
	}
	for name, p := range outboxProfiles {
		for seed := range uint64(5) {
			a, b := NewWorld(seed, p.profile()).Run(), NewWorld(seed, p.profile()).Run()
			if a != b {
				t.Errorf("outbox profile %s, seed %d: two runs differ", name, seed)
			}
		}
	}
}

package main

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// target is one way to the servers.
type target struct {
	name   string
	client *fedload.Client
	proxy  *proxy // nil for none
}

// targets starts both proxies and returns the ways that are compared: directly,
// and through each over TCP and over its unix socket. stop ends the proxies.
func (b *bench) targets(ctx context.Context, f *rig.Federation, settings map[string]string) (all []target, stop func() error, err error) {
	naive, err := b.startNaive(ctx, f)
	if err != nil {
		return nil, nil, err
	}
	bus, err := b.startBus(ctx, f, settings)
	if err != nil {
		naive.stop()
		return nil, nil, err
	}
	direct := fedload.NewDirect(f.Roots, f.From)
	all = []target{
		{"direct", direct, nil},
		{"naive, TCP", naive.tcp, naive},
		{"fsbus, TCP", bus.tcp, bus},
		{"naive, unix socket", naive.unix, naive},
		{"fsbus, unix socket", bus.unix, bus},
	}
	return all, func() error {
		direct.Close()
		err := naive.stop()
		if busErr := bus.stop(); busErr != nil {
			err = busErr
		}
		return err
	}, nil
}

// users yields lookups, to the servers in turn, each of a user that nobody has
// asked for before: nothing is answered from a cache.
type users struct{ n int }

func (u *users) lookups(names []matrix.ServerName, count int, until time.Time) iter.Seq[*fedload.Request] {
	return func(yield func(*fedload.Request) bool) {
		for i := 0; i < count && (until.IsZero() || time.Now().Before(until)); i++ {
			u.n++
			if !yield(fedload.Lookup(names[u.n%len(names)], fmt.Sprint("user", u.n))) {
				return
			}
		}
	}
}

// allAnswered fails unless every request of a report was answered with 200.
func allAnswered(name string, r *fedload.Report) error {
	if r.Statuses[200] != r.Requests || r.Failed > 0 {
		return fmt.Errorf("%s: not all was answered: %v", name, r)
	}
	return nil
}

// overhead measures what a proxy adds to a small request.
func overhead(ctx context.Context, b *bench) error {
	// As many servers as stay connected with the default configuration. Each gets
	// four requests a round through fsbus, and rounds come so seldom that this is
	// below its host_rate.
	const servers, requests, rounds, pause = 50, 100, 25, 500 * time.Millisecond
	f, err := rig.NewFederation(b.dir, sim.Config{Servers: servers, Seed: 1})
	if err != nil {
		return err
	}
	defer f.Close()
	targets, stop, err := b.targets(ctx, f, nil)
	if err != nil {
		return err
	}
	defer stop()
	var u users
	for round := range rounds + 1 {
		for _, t := range inTurn(targets, round) {
			r := t.client.Run(ctx, 1, u.lookups(f.Names(), requests, time.Time{}), nil)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := allAnswered(t.name, r); err != nil {
				return err
			}
			if round > 0 { // the first one connects
				b.result.add(t.name+", p50", "ms", milliseconds(r.Whole.Percentile(50)))
				b.result.add(t.name+", p99", "ms", milliseconds(r.Whole.Percentile(99)))
			}
		}
		time.Sleep(pause)
	}
	direct := b.result.median("direct, p50")
	for _, via := range []string{"TCP", "unix socket"} {
		naive, fsbus := b.result.median("naive, "+via+", p50"), b.result.median("fsbus, "+via+", p50")
		b.result.note("over %s the naive proxy adds %.3f ms to direct calls, fsbus %.3f ms", via, naive-direct, fsbus-direct)
		b.result.atMost("p50 through fsbus over "+via+", the naive proxy's and 0.5 ms", fsbus, naive+0.5, "ms")
	}
	b.result.note("default configuration; %d servers, each round %d requests of each way, one after another", servers, requests)
	return nil
}

// throughput measures how many small requests pass in a second, and what they
// cost. Pacing is what fsbus is for, but not what is measured here, so it is
// turned up.
func throughput(ctx context.Context, b *bench) error {
	const servers, concurrency, rounds, turn = 200, 64, 13, 1500 * time.Millisecond
	settings := map[string]string{
		"memory_limit":                   rig.Text("256MiB"),
		"outbound.workers":               "256",
		"outbound.unknown_hosts":         "200",
		"outbound.host_concurrency":      "64",
		"outbound.host_rate":             "1000.0",
		"outbound.host_burst":            "1000",
		"outbound.handshakes_per_second": "1000.0",
		"outbound.idle_connections":      "1000",
		"outbound.cache":                 rig.Text("0"),
		"outbound.cache_entries":         "0",
	}
	f, err := rig.NewFederation(b.dir, sim.Config{Servers: servers, Seed: 1})
	if err != nil {
		return err
	}
	defer f.Close()
	targets, stop, err := b.targets(ctx, f, settings)
	if err != nil {
		return err
	}
	defer stop()
	var u users
	for round := range rounds + 1 {
		rate := make(map[string]float64)
		cpu := make(map[string]float64)
		for _, t := range inTurn(targets, round) {
			before, err := t.usage()
			if err != nil {
				return err
			}
			r := t.client.Run(ctx, concurrency, u.lookups(f.Names(), 1<<30, time.Now().Add(turn)), nil)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := allAnswered(t.name, r); err != nil {
				return err
			}
			after, err := t.usage()
			if err != nil {
				return err
			}
			if round == 0 { // it connects
				continue
			}
			rate[t.name] = float64(r.Requests) / r.Elapsed.Seconds()
			b.result.add(t.name, "requests/s", rate[t.name])
			if t.proxy != nil {
				cpu[t.name] = (after.CPU - before.CPU).Seconds() / float64(r.Requests) * 1000
				b.result.add(t.name+", processor time per 1,000", "s", cpu[t.name])
			}
		}
		if round == 0 {
			continue
		}
		for _, via := range []string{"TCP", "unix socket"} {
			b.result.add("fsbus to naive, "+via+", requests", "times", rate["fsbus, "+via]/rate["naive, "+via])
			b.result.add("fsbus to naive, "+via+", processor time", "times", cpu["fsbus, "+via]/cpu["naive, "+via])
		}
	}
	for _, t := range targets {
		u, err := t.usage()
		if err != nil {
			return err
		}
		if t.proxy != nil && t.client == t.proxy.unix {
			b.result.add(t.proxy.name+", most memory", "MiB", mib(u.PeakRSS))
		}
	}
	for _, via := range []string{"TCP", "unix socket"} {
		b.result.atLeast("requests through fsbus over "+via+" to those through the naive proxy", b.result.median("fsbus to naive, "+via+", requests"), 1, "times")
	}
	b.result.note("host_rate, host_burst, host_concurrency, handshakes_per_second, workers and idle_connections are raised, the cache is off")
	b.result.note("fsbus to naive: in the same round; all share the machine, the simulated servers and the load included,")
	b.result.note("and what these need hides a part of every difference")
	return nil
}

// inTurn returns the targets, backwards in every other round, so that none is
// always the one after the same other.
func inTurn[T any](targets []T, round int) []T {
	if round%2 == 1 {
		targets = slices.Clone(targets)
		slices.Reverse(targets)
	}
	return targets
}

// usage returns what the target's proxy uses, nothing if it has none.
func (t *target) usage() (rig.Usage, error) {
	if t.proxy == nil {
		return rig.Usage{}, nil
	}
	return t.proxy.Usage()
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

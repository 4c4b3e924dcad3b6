package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

const (
	stormServers = 4000
	// liveRate lookups a second go to live servers while a storm runs, from
	// liveAfter its beginning on, for liveFor. A person waits for each.
	liveRate  = 20
	liveAfter = 2 * time.Second
	liveFor   = 60 * time.Second
	// lookupTimeout is Synapse's for profiles (federation/transport/client.py).
	lookupTimeout = 10 * time.Second
)

// stormShares makes a third of the servers dead: half of those refuse
// connections, half accept them and are silent.
var stormShares = sim.Shares{sim.Dead: 1. / 6, sim.Hanging: 1. / 6}

// storm is a request for each server, all at once.
type storm struct {
	timeout time.Duration // the homeserver's
	request func(f *rig.Federation, i int) *fedload.Request
}

// stormSend is what one change of presence does.
func stormSend(ctx context.Context, b *bench) error {
	return b.storms(ctx, storm{fedload.DefaultTimeout, func(f *rig.Federation, i int) *fedload.Request {
		presence := []json.RawMessage{f.From.Presence("alice", "online", "")}
		return fedload.Send(f.From.Name, f.Names()[i], fmt.Sprint("storm", i), time.Now(), nil, presence)
	}})
}

// stormLookups is a list of users that is opened, one of each server.
func stormLookups(ctx context.Context, b *bench) error {
	return b.storms(ctx, storm{lookupTimeout, func(f *rig.Federation, i int) *fedload.Request {
		return fedload.Lookup(f.Names()[i], fmt.Sprint("storm", i))
	}})
}

// storms sends the same storm through the naive proxy, for comparison, and
// through fsbus with its default configuration, each before new servers.
func (b *bench) storms(ctx context.Context, s storm) error {
	startBus := func(ctx context.Context, f *rig.Federation) (*proxy, error) { return b.startBus(ctx, f, nil) }
	for _, start := range []func(context.Context, *rig.Federation) (*proxy, error){b.startNaive, startBus} {
		f, err := rig.NewFederation(b.dir, sim.Config{Servers: stormServers, Seed: 1, Shares: stormShares})
		if err != nil {
			return err
		}
		p, err := start(ctx, f)
		if err == nil {
			err = b.storm(ctx, s, f, p)
			if stopped := p.stop(); err == nil {
				err = stopped
			}
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	b.result.note("default configuration; from %v after the storm's beginning on, %d lookups a second at live servers, for %v", liveAfter, liveRate, liveFor)
	b.result.note("a lookup that is not answered with 200 counts as one that took %v; connections and handshakes as the servers saw them", lookupTimeout)
	return nil
}

// part is what became of a part of a storm's requests.
type part struct {
	asked, answered int64
	took            fedload.Histogram
}

func (p *part) add(res fedload.Result) {
	p.asked++
	if res.Err == nil && res.Status == http.StatusOK {
		p.answered++
	}
	p.took.Add(res.Whole)
}

// storm sends a storm through p and measures what a person notices of it.
func (b *bench) storm(ctx context.Context, s storm, f *rig.Federation, p *proxy) error {
	requests := make([]*fedload.Request, stormServers)
	for i := range requests {
		requests[i] = s.request(f, i)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	rng.Shuffle(len(requests), func(i, j int) { requests[i], requests[j] = requests[j], requests[i] })
	alive := make(map[matrix.ServerName]bool)
	for _, name := range f.NamesOf(sim.Well) {
		alive[name] = true
	}

	watching, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	var (
		running             sync.WaitGroup
		peaks               *rig.Peaks
		watchErr            error
		toLive, toDead      part
		lookups             fedload.Histogram
		unanswered, noReply int64
	)
	var watcher sync.WaitGroup
	if p.bus != nil {
		watcher.Go(func() { peaks, watchErr = p.bus.Watch(watching, 500*time.Millisecond, nil) })
	}
	start := time.Now()
	running.Go(func() {
		caller := p.hook()
		defer caller.Close()
		caller.Timeout = s.timeout
		caller.Run(ctx, len(requests), slices.Values(requests), func(r *fedload.Request, res fedload.Result) {
			if res.Status == 0 {
				noReply++
			}
			if alive[r.Destination] {
				toLive.add(res)
			} else {
				toDead.add(res)
			}
		})
	})
	running.Go(func() {
		caller := p.hook()
		defer caller.Close()
		caller.Timeout = lookupTimeout
		select {
		case <-ctx.Done():
			return
		case <-time.After(liveAfter):
		}
		const total = liveRate * int(liveFor/time.Second)
		caller.Run(ctx, liveRate*int(lookupTimeout/time.Second), rig.Paced(ctx, liveRate, randomLookups(f.NamesOf(sim.Well), total)), func(_ *fedload.Request, res fedload.Result) {
			if res.Err != nil || res.Status != http.StatusOK {
				unanswered++
				lookups.Add(lookupTimeout)
				return
			}
			lookups.Add(res.Whole)
		})
	})
	running.Wait()
	took := time.Since(start)
	stopWatching()
	watcher.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if watchErr != nil {
		return watchErr
	}
	usage, err := p.Usage()
	if err != nil {
		return err
	}
	seen := f.Stats()

	add := func(name, unit string, value float64) { b.result.add(p.name+": "+name, unit, value) }
	add("a lookup at a live server, p50", "ms", milliseconds(lookups.Percentile(50)))
	add("a lookup at a live server, p99", "ms", milliseconds(lookups.Percentile(99)))
	add("a lookup at a live server, longest", "ms", milliseconds(lookups.Max()))
	add(fmt.Sprintf("of %d lookups, unanswered", lookups.Count()), "", float64(unanswered))
	add(fmt.Sprintf("of %d in the storm to live servers, answered", toLive.asked), "", float64(toLive.answered))
	add("storm to live servers, p50", "s", toLive.took.Percentile(50).Seconds())
	add("storm to dead servers, p50", "s", toDead.took.Percentile(50).Seconds())
	add("of the storm, connections lost or timed out by the caller", "", float64(noReply))
	add("all over after", "s", took.Seconds())
	add("most memory", "MiB", mib(usage.PeakRSS))
	add("processor time", "s", usage.CPU.Seconds())
	add("most connections to servers", "", float64(seen.Connections.MaxOpen))
	add("most handshakes in a second", "/s", float64(seen.TLS.MaxPerSecond))
	if p.bus != nil {
		return b.stormBounds(ctx, p.bus, peaks, add, milliseconds(lookups.Percentile(99)), mib(usage.PeakRSS), seen)
	}
	return nil
}

// stormBounds holds what was seen of fsbus in a storm against its limits.
func (b *bench) stormBounds(ctx context.Context, bus *rig.Bus, peaks *rig.Peaks, add func(string, string, float64), p99, memory float64, seen sim.Stats) error {
	last, err := bus.Sample(ctx)
	if err != nil {
		return err
	}
	peaks.Add(last)
	b.result.atMost("p99 of the lookups at live servers", p99, 2000, "ms")
	b.result.atMost("memory", memory, 64, "MiB")
	for _, name := range []string{rig.Goroutines, rig.Connections, rig.Callers} {
		budget, err := peaks.Budget(name)
		if err != nil {
			return err
		}
		add("most "+name+", by its own status", "", float64(budget.Max))
		b.result.atMost(name, float64(budget.Max), float64(budget.Allowed), "")
		if name == rig.Connections {
			b.result.atMost("connections, as the servers saw it", float64(seen.Connections.MaxOpen), float64(budget.Allowed), "")
		}
	}
	// What begins evenly may end in a bunch on a busy machine, hence a tenth more.
	rate := last.Report.RateLimits.HandshakesPerSecond
	b.result.atMost("full handshakes in one second, handshakes_per_second and a tenth", float64(seen.TLS.MaxFullPerSecond), 1.1*rate, "/s")
	if over := peaks.Over(); len(over) > 0 {
		b.result.note("over its budget: %s", strings.Join(over, "; "))
	}
	r := last.Report.Requests
	b.result.note("fsbus: %d attempts, %d failed fast, %d refused near the caller's time-out, %d new connections; %d status samples, health %q",
		last.Report.Remotes.Attempts, r.FailedFast, r.Expired, last.Report.Remotes.Connects, peaks.Samples, last.Report.Health)
	return nil
}

// randomLookups yields n lookups of users of random servers, no user twice.
func randomLookups(names []matrix.ServerName, n int) func(func(*fedload.Request) bool) {
	rng := rand.New(rand.NewPCG(3, 3))
	return func(yield func(*fedload.Request) bool) {
		for i := range n {
			if !yield(fedload.Lookup(names[rng.IntN(len(names))], fmt.Sprint("live", i))) {
				return
			}
		}
	}
}

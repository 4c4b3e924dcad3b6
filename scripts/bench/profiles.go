package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

const (
	profileServers = 500
	profileUsers   = 8000
	// profilesAtOnce is how many lookups a Synapse has under way for one client.
	profilesAtOnce = 50
	// profileLatency is that of a server that is well.
	profileLatency = 20 * time.Millisecond
	// profileRate is what a rate limited server bears, in requests a second.
	profileRate = 1
	// profileCallers ask for one profile at the same time.
	profileCallers = 50
	// profileSettle is how long servers may go on after a round.
	profileSettle = 15 * time.Second
)

// profileShares make a third of the servers dead, as in a real list of users most
// of those refuse connections, and limit a tenth.
var profileShares = sim.Shares{sim.Dead: 0.28, sim.Hanging: 0.05, sim.Limited: 0.1}

// profiles is the list of users of a large room that is opened twice.
func profiles(ctx context.Context, b *bench) error {
	c := sim.Config{Servers: profileServers, Seed: 1, Shares: profileShares, Rate: profileRate, Latency: profileLatency}
	if err := b.eachWay(ctx, c, b.profiles); err != nil {
		return err
	}
	b.result.note("default configuration; %d users on %d servers, %d lookups at a time, in another order in each round", profileUsers, profileServers, profilesAtOnce)
	b.result.note("28%% of the servers refuse connections, 5%% accept them and are silent, 10%% answer %d/s, the others after %v", profileRate, profileLatency)
	b.result.note("a quarter of the lookups are for one field; in the second round half of those that were for all are for one")
	b.result.note("refused: failed connects as the kernel counts them, other programs' included; silent: as the servers saw them")
	return nil
}

// profileLookup is the lookup of user u in a round, as Synapse makes it: with a
// field when a client wants only that.
func profileLookup(f *rig.Federation, u, round int) *fedload.Request {
	to, name := f.Names()[u%profileServers], fmt.Sprint("user", u)
	switch part := u / profileServers % 4; {
	case part == 0, part == 1 && round == 2: // one full answer has both fields
		return fedload.LookupField(to, name, "displayname")
	case part == 2 && round == 2:
		return fedload.LookupField(to, name, "avatar_url")
	}
	return fedload.Lookup(to, name)
}

// profileRound is what one round came to.
type profileRound struct {
	took                     time.Duration
	live, answered, limited  int64 // lookups at live servers; with 200; 429s that reached the caller
	arrived, silent, refused int64 // requests; connects to silent servers; refused ones
	lookups, toLive, toDead  fedload.Histogram
}

func (b *bench) profiles(ctx context.Context, w *way) error {
	var rounds [3]profileRound
	for round := 1; round <= 2; round++ {
		r, err := w.profileRound(ctx, round)
		if err != nil {
			return err
		}
		rounds[round] = r
		add := func(name, unit string, value float64) {
			b.result.add(fmt.Sprintf("%s, round %d: %s", w.name, round, name), unit, value)
		}
		add("took", "s", r.took.Seconds())
		add(fmt.Sprintf("of %s at live servers, answered", rig.Count(r.live)), "", float64(r.answered))
		add("429s that reached the client", "", float64(r.limited))
		add("lookups that arrived at servers", "", float64(r.arrived))
		add("connects to silent servers", "", float64(r.silent))
		add("connects that were refused", "", float64(r.refused))
		add("all, p50", "ms", milliseconds(r.lookups.Percentile(50)))
		add("all, p99", "ms", milliseconds(r.lookups.Percentile(99)))
		add("at live servers, p50", "ms", milliseconds(r.toLive.Percentile(50)))
		add("at live servers, p99", "ms", milliseconds(r.toLive.Percentile(99)))
		add("at dead servers, p50", "ms", milliseconds(r.toDead.Percentile(50)))
		add("at dead servers, p99", "ms", milliseconds(r.toDead.Percentile(99)))
	}
	arrived, err := w.sameProfile(ctx)
	if err != nil {
		return err
	}
	b.result.add(fmt.Sprintf("%s: requests for one profile, %d callers", w.name, profileCallers), "", float64(arrived))
	if err := b.addUsage(w); err != nil {
		return err
	}
	if w.name != "fsbus" {
		return nil
	}
	first, second := &rounds[1], &rounds[2]
	b.result.atLeast("lookups at live servers that are answered, first round", float64(first.answered), float64(first.live), "")
	b.result.atMost("429s that reach the client", float64(first.limited+second.limited), 0, "")
	b.result.atMost("connects to silent servers, first round", float64(first.silent), float64(len(w.NamesOf(sim.Hanging))), "")
	b.result.atMost("lookups that arrive at servers, second round", float64(second.arrived), 0, "")
	b.result.atMost("connects to silent servers, second round", float64(second.silent), 0, "")
	b.result.atLeast("lookups at live servers that are answered, second round", float64(second.answered), float64(second.live), "")
	b.result.atMost("the second round", second.took.Seconds(), 2, "s")
	b.result.atMost(fmt.Sprintf("requests for one profile of %d callers at once", profileCallers), float64(arrived), 1, "")
	return nil
}

// profileRound looks all users up.
func (w *way) profileRound(ctx context.Context, round int) (profileRound, error) {
	var r profileRound
	requests := make([]*fedload.Request, profileUsers)
	for u := range requests {
		requests[u] = profileLookup(w.Federation, u, round)
	}
	rng := rand.New(rand.NewPCG(1, uint64(round)))
	rng.Shuffle(len(requests), func(i, j int) { requests[i], requests[j] = requests[j], requests[i] })
	dead := make(map[string]bool)
	for _, name := range append(w.NamesOf(sim.Dead), w.NamesOf(sim.Hanging)...) {
		dead[string(name)] = true
	}
	if err := w.settle(ctx); err != nil {
		return r, err
	}
	w.Reset()
	refused, err := rig.RefusedConnects()
	if err != nil {
		return r, err
	}
	client := w.client()
	defer client.Close()
	client.Timeout = lookupTimeout
	report := client.Run(ctx, profilesAtOnce, slices.Values(requests), func(q *fedload.Request, res fedload.Result) {
		if res.Status == http.StatusTooManyRequests {
			r.limited++
		}
		if dead[string(q.Destination)] {
			r.toDead.Add(res.Whole)
			return
		}
		r.live++
		if res.Err == nil && res.Status == http.StatusOK {
			r.answered++
		}
		r.toLive.Add(res.Whole)
	})
	if ctx.Err() != nil {
		return r, ctx.Err()
	}
	// What the callers did not wait for counts as well.
	if err := w.settle(ctx); err != nil {
		return r, err
	}
	after, err := rig.RefusedConnects()
	if err != nil {
		return r, err
	}
	r.took, r.lookups, r.refused = report.Elapsed, report.Whole, after-refused
	r.arrived = w.Stats().Endpoints["query/profile"].Count
	for i := range w.Names() {
		if w.Kind(i) == sim.Hanging {
			r.silent += w.Server(i).Connections
		}
	}
	return r, nil
}

// sameProfile has many callers ask for one profile at once, and returns how many
// requests arrive at the server.
func (w *way) sameProfile(ctx context.Context) (int64, error) {
	if err := w.settle(ctx); err != nil {
		return 0, err
	}
	w.Reset()
	request := fedload.Lookup(w.NamesOf(sim.Well)[0], "everybodys")
	client := w.client()
	defer client.Close()
	client.Timeout = lookupTimeout
	report := client.Run(ctx, profileCallers, slices.Values(slices.Repeat([]*fedload.Request{request}, profileCallers)), nil)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err := allAnswered("one profile", report); err != nil {
		return 0, err
	}
	return w.Stats().Endpoints["query/profile"].Count, nil
}

// settle waits until no server is busy with a request, but not for ever.
func (w *way) settle(ctx context.Context) error {
	deadline := time.Now().Add(profileSettle)
	for w.Stats().InFlight > 0 && time.Now().Before(deadline) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

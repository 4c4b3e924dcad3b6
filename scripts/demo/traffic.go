package main

import (
	"context"
	"fmt"
	"iter"
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

// plan is what a run of the demo does, and when.
type plan struct {
	servers    int
	captured   float64       // requests of the captured traffic in a second
	single     float64       // lookups of one user in a second
	background time.Duration // how long both go on
	storms     []storm
}

// storm is a list of users from all servers that is opened: a lookup for each of
// them, all at once, and for each a second one by somebody else who does the same.
type storm struct {
	at    time.Duration // after the beginning
	list  string        // users of different lists are different
	about string
}

// The storms wait until some of the dead servers are known, as they are to a bus
// that has not just been started for the first time.
var (
	fullPlan = plan{
		servers: 500, captured: 25, single: 10, background: 31 * time.Second,
		storms: []storm{
			{8 * time.Second, "a", "a list of users from all servers is opened, by two people at once"},
			{18 * time.Second, "a", "the same list is opened again"},
			{22 * time.Second, "b", "another list is opened"},
		},
	}
	quickPlan = plan{
		servers: 100, captured: 20, single: 5, background: 6 * time.Second,
		storms: []storm{
			{2 * time.Second, "a", "a list of users from all servers is opened, by two people at once"},
			{5 * time.Second, "a", "the same list is opened again"},
		},
	}
)

// shares makes a third of the servers dead: half of those refuse connections,
// half accept them and are silent. A twentieth is busy and limits the rate.
var shares = sim.Shares{sim.Dead: 1. / 6, sim.Hanging: 1. / 6, sim.Limited: 1. / 20}

// So few that every live server's answer can come in the 10 s that Synapse waits
// for one, with half of that to spare.
const (
	usersOfServer  = 1
	usersOfLimited = 10 // more than such a server answers in a second
)

// tally is what became of the requests of one sort.
type tally struct {
	about string
	right func(fedload.Result) bool

	mu    sync.Mutex
	asked int64
	good  int64
	wrong string // the first that was not right, in words
	took  fedload.Histogram
}

func (t *tally) add(r *fedload.Request, res fedload.Result) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.asked++
	t.took.Add(res.Whole)
	if t.right(res) {
		t.good++
		return
	}
	if t.wrong == "" {
		t.wrong = fmt.Sprintf("%s %s of %s: status %d", r.Method, r.Target, r.Destination, res.Status)
		if res.Err != nil {
			t.wrong += ", " + res.Err.Error()
		} else {
			t.wrong += ", " + string(res.Body[:min(len(res.Body), 200)])
		}
	}
}

// count returns how many were asked and how many of them got the right answer.
func (t *tally) count() (asked, good int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.asked, t.good
}

// What is right depends on who was asked: a server that works answers, and for a
// dead one an error comes in time, which is what Synapse needs to hear.
func answered(res fedload.Result) bool { return res.Err == nil && res.Status == http.StatusOK }
func answeredOrNone(res fedload.Result) bool {
	return answered(res) || res.Err == nil && res.Status == http.StatusNotFound
}

// takenOver is what a transaction is answered once it is on disk, whatever the
// server is like for which it is.
func takenOver(res fedload.Result) bool {
	return answered(res) && string(res.Body) == `{"pdus":{}}`
}
func failed(res fedload.Result) bool {
	return res.Err == nil && (res.Status == http.StatusBadGateway || res.Status == http.StatusGatewayTimeout)
}

// traffic plays the homeserver's part.
type traffic struct {
	plan plan
	fed  *rig.Federation
	hook *fedload.Client
	say  func(format string, args ...any)

	dead map[matrix.ServerName]bool
	rng  *rand.Rand

	single, stormLive, stormDead, capturedLive, capturedDead, taken tally

	events int64 // in transactions for live servers that were taken over; of taken's lock
}

func newTraffic(p plan, fed *rig.Federation, hook *fedload.Client, say func(string, ...any)) *traffic {
	t := &traffic{plan: p, fed: fed, hook: hook, say: say, dead: make(map[matrix.ServerName]bool), rng: rand.New(rand.NewPCG(1, 1))}
	for _, name := range slices.Concat(fed.NamesOf(sim.Dead), fed.NamesOf(sim.Hanging)) {
		t.dead[name] = true
	}
	t.single.about, t.single.right = "lookups one by one, live servers", answered
	t.stormLive.about, t.stormLive.right = "storms of lookups, live servers", answered
	t.stormDead.about, t.stormDead.right = "storms of lookups, dead servers", failed
	t.capturedLive.about, t.capturedLive.right = "captured traffic, live servers", answeredOrNone
	t.capturedDead.about, t.capturedDead.right = "captured traffic, dead servers", failed
	t.taken.about, t.taken.right = "captured transactions, all servers", takenOver
	return t
}

// tallies returns all of them, in the order in which they are shown.
func (t *traffic) tallies() []*tally {
	return []*tally{&t.single, &t.stormLive, &t.stormDead, &t.capturedLive, &t.capturedDead, &t.taken}
}

// play does what the plan says, and returns when all requests have their answers
// or ctx ends.
func (t *traffic) play(ctx context.Context) {
	var running sync.WaitGroup
	background, stop := context.WithTimeout(ctx, t.plan.background)
	defer stop()
	total := func(perSecond float64) int { return int(perSecond * t.plan.background.Seconds()) }

	running.Go(func() {
		live := t.fed.NamesOf(sim.Well)
		users := t.lookups(total(t.plan.single), live)
		t.hook.Run(ctx, 200, rig.Paced(background, t.plan.single, users), t.single.add)
	})
	running.Go(func() {
		// Those that limit their rate would rightly pass on a 429 to what must
		// not be repeated.
		names := slices.Concat(t.fed.NamesOf(sim.Well), t.fed.NamesOf(sim.Dead), t.fed.NamesOf(sim.Hanging))
		slices.Sort(names)
		replay := fedload.Replay(t.fed.From.Name, names, "demo", total(t.plan.captured))
		t.hook.Run(ctx, 200, rig.Paced(background, t.plan.captured, replay), func(r *fedload.Request, res fedload.Result) {
			if txn, err := matrix.ParseTransaction(r.Body); err == nil {
				t.take(r, res, len(txn.PDUs))
				return
			}
			t.sort(r, &t.capturedLive, &t.capturedDead).add(r, res)
		})
	})
	start := time.Now()
	for _, s := range t.plan.storms {
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(start.Add(s.at))):
		}
		if ctx.Err() != nil {
			break
		}
		requests := t.storm(s.list)
		t.say("%3.0f s  %s: %s lookups at once", s.at.Seconds(), s.about, rig.Count(int64(len(requests))))
		running.Go(func() {
			t.hook.Run(ctx, len(requests), slices.Values(requests), func(r *fedload.Request, res fedload.Result) {
				t.sort(r, &t.stormLive, &t.stormDead).add(r, res)
			})
		})
	}
	running.Wait()
}

// take counts a transaction, and what of it live servers must get.
func (t *traffic) take(r *fedload.Request, res fedload.Result, events int) {
	t.taken.add(r, res)
	if takenOver(res) && !t.dead[r.Destination] {
		t.taken.mu.Lock()
		defer t.taken.mu.Unlock()
		t.events += int64(events)
	}
}

// sort returns live or dead, by the server that is asked.
func (t *traffic) sort(r *fedload.Request, live, dead *tally) *tally {
	if t.dead[r.Destination] {
		return dead
	}
	return live
}

// lookups yields n lookups of users that nobody else asks for.
func (t *traffic) lookups(n int, names []matrix.ServerName) iter.Seq[*fedload.Request] {
	rng := rand.New(rand.NewPCG(2, 2))
	return func(yield func(*fedload.Request) bool) {
		for i := range n {
			if !yield(fedload.Lookup(names[rng.IntN(len(names))], fmt.Sprint("single", i))) {
				return
			}
		}
	}
}

// storm returns the lookups of a list of users, in no order.
func (t *traffic) storm(list string) []*fedload.Request {
	var requests []*fedload.Request
	for i, name := range t.fed.Names() {
		users := usersOfServer
		if t.fed.Kind(i) == sim.Limited {
			users = usersOfLimited
		}
		for u := range users {
			r := fedload.Lookup(name, fmt.Sprint(list, u))
			requests = append(requests, r, r)
		}
	}
	t.rng.Shuffle(len(requests), func(i, j int) { requests[i], requests[j] = requests[j], requests[i] })
	return requests
}

// wrong lists what was answered otherwise than it should have been.
func (t *traffic) wrong() []string {
	var list []string
	for _, y := range t.tallies() {
		switch asked, good := y.count(); {
		case asked == 0:
			list = append(list, y.about+": there were none")
		case good < asked:
			list = append(list, fmt.Sprintf("%s: %s of %s were not answered as they should be, the first: %s",
				y.about, rig.Count(asked-good), rig.Count(asked), strings.TrimSpace(y.wrong)))
		}
	}
	return list
}

package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/rig"
)

const (
	presenceOrigins = 2000
	talkingOrigins  = 20 // they come after those
	presenceFor     = 30 * time.Second
	talkEvery       = time.Second // of each
	maxEvents       = 50          // in a transaction

	// presenceCost is what Synapse needs for a transaction of one user's presence,
	// and it has one processor. One with an event costs it no less.
	presenceCost = 9500 * time.Microsecond

	// afterError is how long a server that had no answer waits before it sends
	// again. A Synapse waits for longer.
	afterError = time.Second
)

// edgeStorm is what follows after a homeserver comes back or joins a large room:
// every server sends presence, and some send events, for which people wait.
func edgeStorm(ctx context.Context, b *bench) error {
	for _, s := range presenceStorms {
		for _, through := range []bool{false, true} {
			if err := b.presenceStorm(ctx, s, through); err != nil {
				return err
			}
		}
	}
	b.result.note("%d servers send presence for %v; %d others send an event a second each,", presenceOrigins, presenceFor, talkingOrigins)
	b.result.note("in one transaction at a time; the time of an event is from when it was made to when its transaction was answered")
	b.result.note("the homeserver has one processor, of which every transaction takes %v; direct is without TLS; fsbus has its default configuration", presenceCost)
	return nil
}

// presenceStorm is a way to send presence: each server every so often, 0 is as soon
// as the last is answered.
type presenceStorm struct {
	name  string
	every time.Duration
}

// What is as fast as can be takes the whole machine; the other one leaves room, and
// is still four times what the homeserver can take.
var presenceStorms = []presenceStorm{{"at once", 0}, {"every 5 s", 5 * time.Second}}

func (b *bench) presenceStorm(ctx context.Context, storm presenceStorm, through bool) (err error) {
	f, err := b.edgeField(presenceOrigins+talkingOrigins, false, rig.StubConfig{Busy: presenceCost, BusyEphemeral: presenceCost})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	target, name := f.direct(), "direct, "+storm.name
	if through {
		if err := f.learnKeys(ctx); err != nil {
			return err
		}
		if err := f.start(ctx, nil); err != nil {
			return err
		}
		target, name = f.target(), "fsbus, "+storm.name
	}
	start := time.Now()
	end := start.Add(presenceFor)
	var watched func() (*rig.Peaks, error)
	var rates []float64 // of presence that the bus lets through
	if through {
		watched = f.watch(ctx, func(s rig.Sample) {
			if time.Now().Before(end) {
				rates = append(rates, s.Report.Edge.EphemeralPS)
			}
		})
	}
	var (
		presence, talk ends
		ages           fedload.Histogram
		lost           int64 // events that were never acknowledged
		mu             sync.Mutex
		running        sync.WaitGroup
	)
	for i := range presenceOrigins {
		running.Go(func() {
			from := f.Origin(i)
			s := f.sender(target, i, 1)
			defer s.Close()
			due := start.Add(storm.every * time.Duration(i) / presenceOrigins)
			for k := 0; due.Before(end) && until(ctx, due); k++ {
				res := s.Do(ctx, f.presence(from, fmt.Sprint("presence", k)))
				presence.add(res, 0)
				next := time.Now()
				if !isOK(res) {
					next = next.Add(afterError)
				}
				if due = due.Add(storm.every); due.Before(next) {
					due = next
				}
			}
		})
	}
	for t := range talkingOrigins {
		running.Go(func() {
			i := presenceOrigins + t
			s := f.sender(target, i, 1)
			defer s.Close()
			due := start.Add(talkEvery * time.Duration(t) / talkingOrigins)
			for k := 0; due.Before(end) && until(ctx, due); k++ {
				// All that have been made meanwhile, as a homeserver does it.
				var made []time.Time
				for now := time.Now(); !due.After(now) && due.Before(end) && len(made) < maxEvents; due = due.Add(talkEvery) {
					made = append(made, due)
				}
				r := f.events(f.Origin(i), fmt.Sprint("talk", k), len(made))
				for tries := 0; ; tries++ {
					res := s.Do(ctx, r)
					talk.add(res, 0)
					now := time.Now()
					if isOK(res) {
						mu.Lock()
						for _, at := range made {
							ages.Add(now.Sub(at))
						}
						mu.Unlock()
						break
					}
					// Long after the storm nothing will come of it any more.
					if now.Sub(end) > time.Minute || !until(ctx, now.Add(afterError)) {
						mu.Lock()
						lost += int64(len(made))
						mu.Unlock()
						break
					}
				}
			}
		})
	}
	// What the homeserver has done when the storm ends.
	if !until(ctx, end) {
		running.Wait()
		return ctx.Err()
	}
	seen := f.stub.Stats()
	running.Wait()
	took := time.Since(start)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	add := func(what, unit string, value float64) { b.result.add(name+": "+what, unit, value) }
	add("the homeserver busy, of the storm's 30 s", "s", seen.Busy.Seconds())
	add("transactions of presence that reached it meanwhile", "", float64(seen.Ephemeral))
	add("transactions of events that reached it meanwhile", "", float64(seen.Transactions-seen.Ephemeral))
	add("events acknowledged", "", float64(ages.Count()))
	add("events never acknowledged", "", float64(lost))
	b.addTimes(name+": an event", &ages)
	add("presence answered", "", float64(presence.of(good)))
	b.addTimes(name+": presence", &presence.took)
	add("presence without any answer", "", float64(presence.unanswered()))
	add("presence not answered 200", "", float64(presence.failed()))
	add("events' transactions not answered 200", "", float64(talk.failed()))
	add("all over after", "s", took.Seconds())
	b.result.note("%s: presence ended so: %v; events' transactions so: %v", name, &presence, &talk)
	if !through {
		return nil
	}
	peaks, err := watched()
	if err != nil {
		return err
	}
	usage, err := f.bus.Usage()
	if err != nil {
		return err
	}
	m, err := f.bus.Metrics(ctx)
	if err != nil {
		return err
	}
	shed := 0.0
	for _, n := range m.Labels("fsbus_edge_shed_total") {
		shed += n
	}
	add("presence dropped", "", shed)
	last, err := f.bus.Status(ctx)
	if err != nil {
		return err
	}
	for _, band := range last.Edge.Bands {
		if band.Band == "pdus" {
			add("a transaction of events waits for its turn, mean", "ms", 1000*band.MeanWait)
			add("a transaction of events waits for its turn, longest", "ms", 1000*band.MaxWait)
		}
	}
	for _, r := range rates {
		add("presence let through in a second, by its own status", "", r)
	}
	add("most memory", "MiB", mib(usage.PeakRSS))
	add("processor time", "s", usage.CPU.Seconds())
	b.result.note("%s: dropped: %s; answered: %s; refused: %s", name, counts(m.Labels("fsbus_edge_shed_total")), counts(m.Labels("fsbus_edge_answered_total")), counts(m.Labels("fsbus_edge_refused_total")))
	if over := peaks.Over(); len(over) > 0 {
		b.result.note("over its budget: %v", over)
	}
	// Where presence takes the whole machine, what is left of it decides.
	bound := 2000.
	if storm.every == 0 {
		bound = b.result.median("direct, "+storm.name+": an event, p99") / 4
	}
	b.result.atMost("p99 of an event in the storm, "+storm.name, milliseconds(ages.Percentile(99)), bound, "ms")
	b.result.atMost("events never acknowledged, "+storm.name, float64(lost), 0, "")
	b.result.atMost("memory, "+storm.name, mib(usage.PeakRSS), 128, "MiB")
	b.result.atMost("transactions that the homeserver got twice, "+storm.name, float64(f.stub.Stats().Repeated), 0, "")
	return nil
}

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
	crowdOrigins = 2000
	crowdEvery   = 5 * time.Second // of each
	crowdFor     = 60 * time.Second
)

// edgeConnections lets more servers connect than there are places.
func edgeConnections(ctx context.Context, b *bench) (err error) {
	f, err := b.edgeField(crowdOrigins, true, rig.StubConfig{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.learnKeys(ctx); err != nil {
		return err
	}
	if err := f.start(ctx, nil); err != nil {
		return err
	}
	before, err := f.bus.Usage()
	if err != nil {
		return err
	}
	watched := f.watch(ctx, nil)
	var ends ends
	var running sync.WaitGroup
	start := time.Now()
	for i := range crowdOrigins {
		running.Go(func() {
			from := f.Origin(i)
			s := f.sender(f.target(), i, 1)
			defer s.Close()
			due := start.Add(crowdEvery * time.Duration(i) / crowdOrigins)
			for k := 0; due.Sub(start) < crowdFor && until(ctx, due); k++ {
				// Nobody has asked for this user before, so the homeserver is asked.
				r := rig.Sign(from, fedload.Lookup(f.From.Name, fmt.Sprintf("user%d-%d", i, k)))
				late := time.Since(due)
				ends.add(s.Do(ctx, r), late)
				due = due.Add(crowdEvery)
			}
		})
	}
	running.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	peaks, err := watched()
	if err != nil {
		return err
	}
	usage, err := f.bus.Usage()
	if err != nil {
		return err
	}
	metrics, err := f.bus.Metrics(ctx)
	if err != nil {
		return err
	}
	evicted, err := metrics.Get("fsbus_edge_connections_evicted_total")
	if err != nil {
		return err
	}
	connections, err := peaks.Budget("connections from servers")
	if err != nil {
		return err
	}
	b.result.add("requests", "", float64(ends.all()))
	b.result.add("of them without any answer", "", float64(ends.unanswered()))
	b.result.add("of them not answered 200", "", float64(ends.failed()))
	b.addTimes("a request", &ends.took)
	b.result.add("most connections, by its own status", "", float64(connections.Max))
	b.result.add("idle connections closed for others", "", evicted)
	b.result.add("memory before", "MiB", mib(before.RSS))
	b.result.add("most memory", "MiB", mib(usage.PeakRSS))
	b.result.add("processor time", "s", (usage.CPU - before.CPU).Seconds())
	b.result.note("default configuration; %d servers, each asks for a profile every %v on one connection for %v; times from when it was due", crowdOrigins, crowdEvery, crowdFor)
	b.result.note("the requests ended so: %v", &ends)
	if over := peaks.Over(); len(over) > 0 {
		b.result.note("over its budget: %v", over)
	}
	b.result.atMost("connections", float64(connections.Max), float64(connections.Allowed), "")
	b.result.atMost("memory", mib(usage.PeakRSS), 64, "MiB")
	b.result.atMost("requests that were not answered 200, of 1,000", 1000*float64(ends.failed())/float64(ends.all()), 1, "")
	return nil
}

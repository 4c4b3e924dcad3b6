package main

import (
	"context"
	"fmt"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// large measures the passage of one large answer: whether it takes memory, and
// how fast it is.
func large(ctx context.Context, b *bench) error {
	// 100 MiB is the most that Synapse reads, so fsbus passes no more; the frame
	// around the content counts.
	const size, rounds = 100<<20 - frameRoom, 15
	f, err := rig.NewFederation(b.dir, sim.Config{Servers: 1, Seed: 1})
	if err != nil {
		return err
	}
	defer f.Close()
	targets, stop, err := b.targets(ctx, f, nil)
	if err != nil {
		return err
	}
	defer stop()
	for round := range rounds + 1 {
		rate := make(map[string]float64)
		for _, t := range inTurn(targets, round) {
			if t.proxy != nil && t.client == t.proxy.tcp {
				continue // the unix socket is what is recommended
			}
			var before rig.Usage
			if t.proxy != nil {
				if err := t.proxy.ResetPeak(); err != nil {
					return err
				}
				if before, err = t.usage(); err != nil {
					return err
				}
			}
			request := fedload.Media(f.Names()[0], size)
			if round == 0 { // it connects
				request = fedload.Lookup(f.Names()[0], "user")
			}
			r := t.client.Do(ctx, request)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if r.Err != nil || r.Status != 200 || round > 0 && r.Size < size {
				return fmt.Errorf("%s: status %d, %d bytes, %v, %.200s", t.name, r.Status, r.Size, r.Err, r.Body)
			}
			if round == 0 {
				continue
			}
			rate[t.name] = mib(r.Size) / r.Whole.Seconds()
			b.result.add(t.name, "MiB/s", rate[t.name])
			b.result.add(t.name+", to the first byte", "ms", milliseconds(r.Headers))
			if t.proxy == nil {
				continue
			}
			after, err := t.usage()
			if err != nil {
				return err
			}
			b.result.add(t.name+", processor time", "s", (after.CPU - before.CPU).Seconds())
			b.result.add(t.name+", memory before", "MiB", mib(before.RSS))
			b.result.add(t.name+", memory grows by", "MiB", mib(after.PeakRSS-before.RSS))
		}
		if round > 0 {
			b.result.add("fsbus to naive, rate", "times", rate["fsbus, unix socket"]/rate["naive, unix socket"])
		}
	}
	var most float64
	for _, fig := range b.result.last().Figures {
		if fig.Name == "fsbus, unix socket, memory grows by" {
			most = fig.sorted()[len(fig.Rounds)-1]
		}
	}
	b.result.note("fsbus to naive: in the same round")
	b.result.atMost("memory that a large answer takes, in the worst round", most, 8, "MiB")
	b.result.atLeast("rate through fsbus to that through the naive proxy", b.result.median("fsbus to naive, rate"), 0.8, "times")
	return nil
}

// frameRoom is more than the multipart frame of a media answer has.
const frameRoom = 1 << 10

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// scan measures what it costs to look through the answer to a join while it
// passes: the same answer of 100 MB through two busses, of which one does it.
func scan(ctx context.Context, b *bench) (err error) {
	const size, members, rounds = 100_000_000, 500, 10
	f, err := rig.NewFederation(b.dir, sim.Config{Servers: members, Seed: 1, RoomMembers: members, Notary: true, SendJoin: sim.SendJoin{Size: size}})
	if err != nil {
		return err
	}
	defer f.Close()
	var ways []*way
	for _, name := range []string{"scan", "no scan"} {
		p, err := b.startBus(ctx, f, map[string]string{"joins.preflight": "0", "joins.prefetch_keys": fmt.Sprint(name == "scan")})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.stop()) }()
		ways = append(ways, &way{Federation: f, name: name, proxy: p})
		// So that it knows whom the homeserver asks for keys.
		wanted := fedload.KeyWanted{Server: f.Names()[1], ID: "ed25519:sim", Until: time.Now().UnixMilli()}
		if r := p.unix.Do(ctx, fedload.KeyQuery(f.Names()[sim.NotaryServer], wanted)); r.Err != nil || r.Status != 200 {
			return fmt.Errorf("key query: status %d, %w", r.Status, r.Err)
		}
	}
	for round := range rounds + 1 {
		rate := make(map[string]float64)
		for _, w := range inTurn(ways, round) {
			dest, client := f.Names()[0], w.proxy.unix
			made := client.Do(ctx, w.From.MakeJoin(dest, f.RoomID(0), fmt.Sprint("user", round)))
			if made.Err != nil {
				return made.Err
			}
			id, event, err := w.From.Join(made.Body, time.Now())
			if err != nil {
				return err
			}
			before, err := w.proxy.Usage()
			if err != nil {
				return err
			}
			if err := w.proxy.ResetPeak(); err != nil {
				return err
			}
			r := client.Do(ctx, fedload.SendJoin(dest, f.RoomID(0), id, event))
			if r.Err != nil || r.Status != 200 || r.Size < size {
				return fmt.Errorf("%s: status %d, %d bytes, %v, %.200s", w.name, r.Status, r.Size, r.Err, r.Body)
			}
			after, err := w.proxy.Usage()
			if err != nil {
				return err
			}
			if round == 0 { // it connects, and learns the keys
				continue
			}
			rate[w.name] = float64(r.Size) / 1e6 / r.Whole.Seconds()
			b.result.add(w.name+": rate", "MB/s", rate[w.name])
			b.result.add(w.name+": processor time", "s", (after.CPU - before.CPU).Seconds())
			b.result.add(w.name+": memory grows by", "MiB", mib(after.PeakRSS-before.RSS))
		}
		if round > 0 {
			b.result.add("rate with the scan to that without", "times", rate["scan"]/rate["no scan"])
		}
	}
	b.result.note("a send_join of %d MB from a room of %d servers; server, client and both busses share the machine", size/1_000_000, members)
	b.result.atLeast("rate with the scan", b.result.median("scan: rate"), 100, "MB/s")
	b.result.atLeast("rate with the scan to that without", b.result.median("rate with the scan to that without"), 0.9, "times")
	b.result.atMost("memory that the answer takes", b.result.median("scan: memory grows by"), 4, "MiB")
	return nil
}

package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// joinMembers is how many servers are in each room.
const joinMembers = 20

// slowJoins are what Synapse cannot join by itself. Each is at a server, and in a
// room, of its own: server i is that of slowJoins[i].
var slowJoins = []struct {
	name string
	how  sim.SendJoin
}{
	{"headers after 100 s", sim.SendJoin{Delay: 100 * time.Second}},
	{"headers after 200 s", sim.SendJoin{Delay: 200 * time.Second}},
	// Larger than what a proxy may hold back before it passes the headers on.
	{"a body that drips for 90 s", sim.SendJoin{Drip: 90 * time.Second, Size: 1_000_000}},
	{"120 MB at 1 MB/s", sim.SendJoin{Size: 120_000_000, Rate: 1_000_000}},
}

// joins lets a model of Synapse join rooms whose servers are slow: all at once,
// and every way at the same time, since they do little but wait.
func joins(ctx context.Context, b *bench) (err error) {
	ways := make([]*way, 0, len(waysThere))
	defer func() {
		for _, w := range ways {
			err = errors.Join(err, w.stop())
		}
	}()
	for _, name := range waysThere {
		w, err := b.startWay(ctx, name, sim.Config{Servers: joinMembers, Seed: 1, RoomMembers: joinMembers})
		if err != nil {
			return err
		}
		ways = append(ways, w)
		for i, j := range slowJoins {
			if err := w.SetSendJoin(i, j.how); err != nil {
				return err
			}
		}
	}
	joined := make([][]fedload.Joined, len(ways))
	var running sync.WaitGroup
	for k, w := range ways {
		joined[k] = make([]fedload.Joined, len(slowJoins))
		for i := range slowJoins {
			running.Go(func() {
				j := fedload.NewJoiner(w.From, w.client)
				defer j.Close()
				joined[k][i] = j.Join(ctx, w.Names()[i], w.RoomID(i), "alice")
			})
		}
	}
	running.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	for k, w := range ways {
		for i, j := range slowJoins {
			b.addJoin(w, i, j.name, joined[k][i])
		}
		if err := b.addUsage(w); err != nil {
			return err
		}
	}
	b.result.note("default configuration; %d rooms of %d members, each by a server of its own, all at once and every way at the same time", len(slowJoins), joinMembers)
	b.result.note("the client gives 60 s to the headers and 60 s to the body, and tries 4 times, but not again once it has the headers")
	return nil
}

// addJoin notes what became of the join at server i.
func (b *bench) addJoin(w *way, i int, name string, joined fedload.Joined) {
	add := func(what, unit string, value float64) { b.result.add(w.name+", "+name+": "+what, unit, value) }
	success := 0.
	if joined.Err == nil {
		success = 1
	} else {
		b.result.note("%s, %s: %v", w.name, name, joined.Err)
	}
	sent := float64(w.Server(i).SendJoins)
	add("joined", "", success)
	add("took", "s", joined.Took.Seconds())
	add("tries", "", float64(joined.Tries))
	add("send_joins at the server", "", sent)
	add("bytes of the last answer", "", float64(joined.Last.Size))
	if w.name != "fsbus" {
		return
	}
	b.result.atLeast("joined, "+name, success, 1, "")
	b.result.atMost("send_joins at the server, "+name, sent, 1, "")
	if size := slowJoins[i].how.Size; size > 0 {
		b.result.atLeast("bytes of the answer, "+name, float64(joined.Last.Size), float64(size), "")
	}
}

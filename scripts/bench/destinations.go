package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// destinationCounts are the sizes that destinations compares.
var destinationCounts = []int{100, 1000, 10000}

const (
	// destinationRounds are measured at each size, of destinationTurn
	// transactions or one for each destination, whichever is more: processor
	// time comes in steps of 10 ms.
	destinationRounds = 3
	destinationTurn   = 2000
	// destinationsAtOnce transactions are offered at a time.
	destinationsAtOnce = 64
	// destinationTime is what a round may take.
	destinationTime = 5 * time.Minute
)

// field is a federation of one size with its bus.
type field struct {
	*rig.Federation
	bus    *proxy
	events int
	sent   int64
}

// destinations measures what a destination costs where there are few and where
// there are many.
func destinations(ctx context.Context, b *bench) (err error) {
	fields := make([]*field, 0, len(destinationCounts))
	defer func() {
		for _, f := range fields {
			err = errors.Join(err, f.bus.stop())
			f.Close()
		}
	}()
	for _, n := range destinationCounts {
		// No tickets: some sessions would be resumed where there are few servers,
		// and none where there are many.
		f, err := rig.NewFederation(b.dir, sim.Config{Servers: n, Seed: 1, NoTickets: true})
		if err != nil {
			return err
		}
		bus, err := b.startBus(ctx, f, destinationSettings(f))
		if err != nil {
			f.Close()
			return err
		}
		fields = append(fields, &field{Federation: f, bus: bus})
	}
	for round := range destinationRounds + 1 {
		for i, f := range fields {
			n := destinationCounts[i]
			what, turns := "further events", max(1, destinationTurn/n)
			if round == 0 {
				what, turns = "the first event", 1
			}
			cost, err := f.spread(ctx, turns)
			if err != nil {
				return fmt.Errorf("%d destinations: %w", n, err)
			}
			name := fmt.Sprintf("%6s destinations, %s: ", rig.Count(int64(n)), what)
			b.result.add(name+"processor time", "ms", cost.cpu)
			b.result.add(name+"rows", "", cost.rows)
			b.result.add(name+"commits", "", cost.commits)
			b.result.add(name+"handshakes", "", cost.handshakes)
		}
	}
	for i, f := range fields {
		u, err := f.bus.Usage()
		if err != nil {
			return err
		}
		b.result.add(fmt.Sprintf("%6s destinations, most memory", rig.Count(int64(destinationCounts[i]))), "MiB", mib(u.PeakRSS))
	}
	b.result.note("for each transaction that was delivered: one event of %d bytes for one destination", eventSize)
	b.result.note("each delivery makes a new connection with a full handshake, and so costs the same in this respect")
	for _, c := range []struct {
		name  string
		bound float64
	}{{"processor time", 1.25}, {"rows", 1.05}} {
		var least, most float64
		for i, n := range destinationCounts {
			v := b.result.median(fmt.Sprintf("%6s destinations, further events: %s", rig.Count(int64(n)), c.name))
			if i == 0 {
				least, most = v, v
			}
			least, most = min(least, v), max(most, v)
		}
		b.result.atMost(c.name+" for a transaction, the most to the least of the sizes", most/least, c.bound, "times")
	}
	return nil
}

// destinationSettings make room for all sizes, and keep no connection.
func destinationSettings(f *rig.Federation) map[string]string {
	s := outboxSettings(f)
	for key, value := range map[string]string{
		"memory_limit":                   rig.Text("128MiB"),
		"outbound.max_hosts":             "15000",
		"outbound.unknown_hosts":         "80",
		"outbound.host_rate":             "1000.0",
		"outbound.host_burst":            "1000",
		"outbound.handshakes_per_second": "10000.0",
		"outbound.idle_connections":      "1",
		"outbox.max_destinations":        "11000",
	} {
		s[key] = value
	}
	return s
}

// destinationCost is what one delivered transaction takes.
type destinationCost struct{ cpu, rows, commits, handshakes float64 }

// spread sends one event after another to all, each when the one before it is
// delivered.
func (f *field) spread(ctx context.Context, events int) (destinationCost, error) {
	before, err := f.bus.bus.Sample(ctx)
	if err != nil {
		return destinationCost{}, err
	}
	for range events {
		f.events++
		message := []json.RawMessage{event(f.From, f.events)}
		transactions := func(yield func(*fedload.Request) bool) {
			for _, name := range f.Names() {
				f.sent++
				if !yield(fedload.Send(f.From.Name, name, fmt.Sprint(f.sent), time.Now(), message, nil)) {
					return
				}
			}
		}
		r := f.bus.unix.Run(ctx, destinationsAtOnce, transactions, nil)
		if ctx.Err() != nil {
			return destinationCost{}, ctx.Err()
		}
		if err := allAnswered("the events", r); err != nil {
			return destinationCost{}, err
		}
		if err := f.awaitAll(ctx); err != nil {
			return destinationCost{}, err
		}
	}
	if err := awaitSettled(ctx, f.bus, 0); err != nil {
		return destinationCost{}, err
	}
	after, err := f.bus.bus.Sample(ctx)
	if err != nil {
		return destinationCost{}, err
	}
	delivered := float64(after.Report.Outbox.Sent - before.Report.Outbox.Sent)
	if want := float64(events * len(f.Names())); delivered != want {
		return destinationCost{}, fmt.Errorf("%v transactions were sent, want %v", delivered, want)
	}
	s0, s1 := before.Report.Store, after.Report.Store
	return destinationCost{
		cpu:        milliseconds(after.Usage.CPU-before.Usage.CPU) / delivered,
		rows:       float64(s1.Rows-s0.Rows) / delivered,
		commits:    float64(s1.Commits-s0.Commits) / delivered,
		handshakes: float64(after.Report.Remotes.Handshakes-before.Report.Remotes.Handshakes) / delivered,
	}, nil
}

// awaitAll waits until the servers have all that was sent. It looks at them and
// not at the bus, whose processor time is measured.
func (f *field) awaitAll(ctx context.Context) error {
	deadline := time.Now().Add(destinationTime)
	for {
		got := f.Stats().Transactions.Count
		if got >= f.sent {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d transactions have arrived", got, f.sent)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

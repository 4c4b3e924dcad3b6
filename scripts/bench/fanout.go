package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

const (
	// eventSize is that of the event that all servers get, as a transaction has it.
	eventSize = 1500
	// fanoutPatience is for the last live server: hanging ones keep workers busy
	// for tls_timeout each.
	fanoutPatience = 4 * time.Minute
)

// taken is the answer to a transaction that the outbox has taken over.
const taken = `{"pdus":{}}`

// fanout is a message in a room of 4,000 servers: a transaction for each, all at
// once, with the same event.
func fanout(ctx context.Context, b *bench) error {
	for _, variant := range []struct {
		name   string
		shares sim.Shares
	}{
		{"all well", sim.Shares{}},
		{"a third dead", stormShares},
	} {
		if err := b.fanout(ctx, variant.name, variant.shares); err != nil {
			return fmt.Errorf("%s: %w", variant.name, err)
		}
	}
	b.result.note(`default configuration with signing_key_path and ack_pace = "off"; one event of %d bytes for %d servers`, eventSize, stormServers)
	b.result.note("all well: no faulty servers; a third dead: a sixth refuses connections, a sixth accepts them and is silent")
	b.result.note("handshakes alone: every connection that the servers saw begins one, handshakes_per_second limits them")
	b.result.note("the database is the main file and the log; what counts is the most that was seen in samples")
	return nil
}

// outboxSettings turn the outbox on. Answers are given at once, so that what the
// storage costs can be seen.
func outboxSettings(f *rig.Federation) map[string]string {
	return map[string]string{"homeserver.signing_key_path": rig.Text(f.KeyFile), "outbox.ack_pace": rig.Text("off")}
}

// event is a message of eventSize bytes. Those that differ in n differ.
func event(from fedload.Homeserver, n int) json.RawMessage {
	now := time.Now()
	text := func(size int) string { return fmt.Sprintf("%09d%s", n, strings.Repeat("x", size)) }
	empty := from.Message("alice", "!room:example.org", text(0), int64(n), now)
	return from.Message("alice", "!room:example.org", text(eventSize-len(empty)), int64(n), now)
}

// databaseSizes returns those of the main file, of the log, and of both.
func databaseSizes(s rig.Sample) [3]int64 {
	st := &s.Report.Store
	return [...]int64{st.FileBytes, st.WALBytes, st.FileBytes + st.WALBytes}
}

// fanout sends one event to all servers and waits until the live ones have it.
func (b *bench) fanout(ctx context.Context, variant string, shares sim.Shares) error {
	f, err := rig.NewFederation(b.dir, sim.Config{Servers: stormServers, Seed: 1, Shares: shares})
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := b.startBus(ctx, f, outboxSettings(f))
	if err != nil {
		return err
	}
	err = b.fanoutTo(ctx, variant, f, p)
	return errors.Join(err, p.stop())
}

func (b *bench) fanoutTo(ctx context.Context, variant string, f *rig.Federation, p *proxy) error {
	message := []json.RawMessage{event(f.From, 1)}
	requests := make([]*fedload.Request, stormServers)
	for i, name := range f.Names() {
		requests[i] = fedload.Send(f.From.Name, name, fmt.Sprint("fanout", i), time.Now(), message, nil)
	}
	live := f.NamesOf(sim.Well)
	before, err := p.bus.Sample(ctx)
	if err != nil {
		return err
	}
	watching, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	var (
		watcher  sync.WaitGroup
		peaks    *rig.Peaks
		watchErr error
		most     [3]int64 // of the main file, the log, both at a time
	)
	measure := func(s rig.Sample) {
		for i, size := range databaseSizes(s) {
			most[i] = max(most[i], size)
		}
	}
	watcher.Go(func() { peaks, watchErr = p.bus.Watch(watching, 500*time.Millisecond, measure) })

	caller := p.hook()
	defer caller.Close()
	answered := 0
	var refused string // the first that was
	start := time.Now()
	report := caller.Run(ctx, len(requests), slices.Values(requests), func(_ *fedload.Request, res fedload.Result) {
		if res.Err == nil && res.Status == http.StatusOK && string(res.Body) == taken {
			answered++
		} else if refused == "" {
			refused = fmt.Sprintf("%d %.200s %v", res.Status, res.Body, res.Err)
		}
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	atLastAnswer, err := p.bus.Status(ctx)
	if err != nil {
		return err
	}
	reached, last, err := awaitEvent(ctx, f, p, start, len(live))
	if err != nil {
		return err
	}
	seen := f.Stats()
	end, err := p.bus.Sample(ctx)
	if err != nil {
		return err
	}
	stopWatching()
	watcher.Wait()
	if watchErr != nil {
		return watchErr
	}
	peaks.Add(end)
	measure(end)

	once := 0
	for i := range f.Names() {
		if f.Kind(i) == sim.Well && f.Server(i).PDUs == 1 {
			once++
		}
	}
	rate := end.Report.RateLimits.HandshakesPerSecond
	handshakes := time.Duration(float64(seen.Connections.Accepted) / rate * float64(time.Second))
	commits := atLastAnswer.Store.Commits - before.Report.Store.Commits
	accepting := end.Report.Store.Accepting - before.Report.Store.Accepting
	var growth [len(most)]float64
	for i, size := range databaseSizes(before) {
		growth[i] = mib(most[i] - size)
	}
	open, err := peaks.Budget(rig.Connections)
	if err != nil {
		return err
	}

	add := func(name, unit string, value float64) { b.result.add(variant+": "+name, unit, value) }
	atMost := func(name string, value, bound float64, unit string) {
		b.result.atMost(variant+": "+name, value, bound, unit)
	}
	add("transactions answered with "+taken, "", float64(answered))
	add("an answer took, p50", "s", report.Whole.Percentile(50).Seconds())
	add("all answered after", "s", report.Elapsed.Seconds())
	add("commits until then", "", float64(commits))
	add("commits that took transactions over", "", float64(accepting))
	add("the longest commit", "s", end.Report.Store.MaxCommitSeconds)
	add(fmt.Sprintf("of %d live servers, have the event once", len(live)), "", float64(once))
	add("half of them have it after", "s", reached.Seconds())
	add("the last one has it after", "s", last.Seconds())
	add("handshakes alone", "s", handshakes.Seconds())
	add("full handshakes that succeeded", "", float64(seen.TLS.Full))
	add("connections in all, as the servers saw them", "", float64(seen.Connections.Accepted))
	add("most connections at once, as the servers saw it", "", float64(seen.Connections.MaxOpen))
	add("most connections at once, by its own status", "", float64(open.Max))
	add("most memory", "MiB", mib(end.Usage.PeakRSS))
	add("processor time", "s", (end.Usage.CPU - before.Usage.CPU).Seconds())
	add("the database grew by", "MiB", growth[2])
	add("its main file grew by", "MiB", growth[0])
	add("its log grew by", "MiB", growth[1])
	add("rows written", "", float64(end.Report.Store.Rows-before.Report.Store.Rows))

	b.result.atLeast(variant+": transactions answered with "+taken, float64(answered), stormServers, "")
	atMost("all answered after", report.Elapsed.Seconds(), 3, "s")
	atMost("commits until all were answered", float64(commits), 60, "")
	atMost("commits that took transactions over", float64(accepting), 60, "")
	b.result.atLeast(variant+": live servers that have the event once", float64(once), float64(len(live)), "")
	atMost("events that came twice", float64(seen.Transactions.Duplicates+seen.Transactions.Repeated), 0, "")
	atMost("memory", mib(end.Usage.PeakRSS), 64, "MiB")
	atMost("growth of the database", growth[2], 4, "MiB")
	atMost("connections, as the servers saw it", float64(seen.Connections.MaxOpen), float64(open.Allowed), "")
	if refused != "" {
		b.result.note("%s: the first answer that was another: %s", variant, refused)
	}
	if over := peaks.Over(); len(over) > 0 {
		b.result.note("%s: over its budget: %s", variant, strings.Join(over, "; "))
	}
	return nil
}

// awaitEvent waits until n servers have the one event that was sent, and until
// the bus knows that, and returns when the server in the middle and the last one
// got it. It is no error if one does not.
func awaitEvent(ctx context.Context, f *rig.Federation, p *proxy, start time.Time, n int) (half, last time.Duration, err error) {
	deadline := time.After(fanoutPatience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if events := f.Stats().Events; len(events) > 0 {
			e := events[0]
			if e.Servers >= n/2 && half == 0 {
				half = time.Since(start)
			}
			last = e.Last.Sub(start)
			if e.Servers >= n {
				return half, last, awaitSettled(ctx, p, len(f.Names())-n)
			}
		}
		select {
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		case <-deadline:
			return half, last, p.Running()
		case <-tick.C:
		}
	}
}

// awaitSettled waits until the bus has something pending for so many destinations
// at most.
func awaitSettled(ctx context.Context, p *proxy, n int) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		r, err := p.bus.Status(ctx)
		if err != nil {
			return err
		}
		switch {
		case r.Outbox == nil:
			return errors.New("the bus has no outbox")
		case r.Outbox.StandsStill != "":
			return errors.New("the outbox stands still: " + r.Outbox.StandsStill)
		case r.Outbox.Destinations <= n:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("something is still pending for %d destinations", r.Outbox.Destinations)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

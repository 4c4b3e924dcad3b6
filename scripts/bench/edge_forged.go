package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

const (
	forgedRequests  = 10_000
	forgedRate      = 400 // a second
	forgedAddresses = 8   // of those who forge, each with up to forgedAtOnce connections
	forgedAtOnce    = 32

	// Servers by number: those who send in earnest, those whose names are used but
	// are known to nobody, and those that accept a connection and are silent.
	honestServers = 20
	namedServers  = 500
	silentServers = 100

	honestEvery = 2 * time.Second // of each honest server
)

// edgeForged measures what honest servers notice of requests that are not by
// whom they say, and what these make the bus do.
func edgeForged(ctx context.Context, b *bench) (err error) {
	f, err := b.edgeField(honestServers+namedServers+silentServers, true, rig.StubConfig{Delay: 20 * time.Millisecond})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	for i := range silentServers {
		if err := f.SetKind(honestServers+namedServers+i, sim.Hanging); err != nil {
			return err
		}
	}
	if err := f.start(ctx, nil); err != nil {
		return err
	}
	honest := make([]*rig.Sender, honestServers)
	for i := range honest {
		honest[i] = f.sender(f.target(), i, 1)
		defer honest[i].Close()
	}
	// What the machine does to requests that have nothing to do with the bus.
	apart := make([]*rig.Sender, honestServers)
	for i := range apart {
		apart[i] = f.sender(f.direct(), i, 1)
		defer apart[i].Close()
	}
	both := func(ctx context.Context, id string, end time.Time, through, direct *ends) {
		var running sync.WaitGroup
		running.Go(func() { f.sendHonestly(ctx, apart, "direct "+id, end, direct) })
		f.sendHonestly(ctx, honest, id, end, through)
		running.Wait()
	}
	// The first requests fetch keys.
	var first ends
	f.sendHonestly(ctx, honest, "first", time.Now().Add(honestEvery), &first)
	quietFor := forgedRequests / forgedRate * time.Second
	var quiet, during, quietDirect, duringDirect ends
	both(ctx, "quiet", time.Now().Add(quietFor), &quiet, &quietDirect)

	before, err := f.bus.Metrics(ctx)
	if err != nil {
		return err
	}
	f.Reset()
	refusedBefore, err := rig.RefusedConnects()
	if err != nil {
		return err
	}
	if err := f.bus.ResetPeak(); err != nil {
		return err
	}
	usageBefore, err := f.bus.Usage()
	if err != nil {
		return err
	}
	stubBefore := f.stub.Stats()
	// A quarter of the flood fills what may be filled, and what comes after it must
	// not need more.
	start := time.Now()
	var early, late int64 // most memory in the second quarter, and in the last
	watched := f.watch(ctx, func(s rig.Sample) {
		switch 4 * time.Since(start) / quietFor {
		case 1:
			early = max(early, s.Usage.RSS)
		case 3:
			late = max(late, s.Usage.RSS)
		}
	})
	flooding, flooded := context.WithCancel(ctx)
	defer flooded()
	var running sync.WaitGroup
	running.Go(func() { both(flooding, "during", time.Now().Add(time.Hour), &during, &duringDirect) })
	var forged [numForgeries]ends
	f.forge(ctx, &forged)
	took := time.Since(start)
	flooded()
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
	after, err := f.bus.Metrics(ctx)
	if err != nil {
		return err
	}
	refused, err := rig.RefusedConnects()
	if err != nil {
		return err
	}
	seen := f.Stats()
	fetches := after["fsbus_edge_key_fetches_total"] - before["fsbus_edge_key_fetches_total"]
	b.addTimes("honest, no flood", &quiet.took)
	b.addTimes("honest, flood", &during.took)
	b.addTimes("past the bus, no flood", &quietDirect.took)
	b.addTimes("past the bus, flood", &duringDirect.took)
	b.result.add(fmt.Sprintf("honest, flood, of %d not answered 200", during.all()), "", float64(during.failed()))
	b.result.add("the flood took", "s", took.Seconds())
	b.result.add("keys fetched, by its own count", "", fetches)
	b.result.add("keys not fetched, too many were", "", after["fsbus_edge_key_fetches_denied_total"]-before["fsbus_edge_key_fetches_denied_total"])
	b.result.add("requests for keys, at the servers", "", float64(seen.Endpoints["key/server"].Count))
	b.result.add("connections to servers that are there", "", float64(seen.Connections.Accepted))
	b.result.add("connections refused, on this machine", "", float64(refused-refusedBefore))
	b.result.add("forged that the homeserver was asked about", "", float64(f.stub.Stats().Refused-stubBefore.Refused))
	b.result.add("memory before", "MiB", mib(usageBefore.RSS))
	b.result.add("most memory in the second quarter", "MiB", mib(early))
	b.result.add("most memory in the last quarter", "MiB", mib(late))
	b.result.add("most memory", "MiB", mib(usage.PeakRSS))
	b.result.add("memory after", "MiB", mib(usage.RSS))
	b.result.add("processor time", "s", (usage.CPU - usageBefore.CPU).Seconds())
	through := int64(0)
	for k := range forged {
		b.result.note("%s: %v; the answers took %v", forgeries[k].name, &forged[k], &forged[k].other)
		through += forged[k].of(good)
	}
	b.result.note("refused, by reason: %s", counts(minus(after.Labels("fsbus_edge_refused_total"), before.Labels("fsbus_edge_refused_total"))))
	if over := peaks.Over(); len(over) > 0 {
		b.result.note("over its budget: %v", over)
	}
	b.result.note("default configuration; %d honest servers, each a transaction every %v; times from when it was due; before the flood: %v, in it: %v", honestServers, honestEvery, &quiet, &during)
	minutes := float64(int(took/time.Minute) + 1)
	b.result.atMost("honest transactions in the flood that were not answered 200", float64(during.failed()), 0, "")
	b.result.atMost("p99 of the honest ones in the flood, that past the bus and 500 ms", milliseconds(during.took.Percentile(99)), milliseconds(duringDirect.took.Percentile(99))+500, "ms")
	b.result.atMost("forged requests answered 200", float64(through), 0, "")
	b.result.atMost("keys fetched, key_fetches for each minute begun", fetches, 300*minutes, "")
	b.result.atMost("memory", mib(usage.PeakRSS), 128, "MiB")
	b.result.atMost("memory in the last quarter, a tenth more than in the second", mib(late), 1.1*mib(early), "MiB")
	return nil
}

// minus returns the differences of counters.
func minus(after, before map[string]float64) map[string]float64 {
	d := make(map[string]float64, len(after))
	for label, v := range after {
		d[label] = v - before[label]
	}
	return d
}

// sendHonestly sends an event from each server every honestEvery, until end or ctx
// ends; what is on its way is waited for.
func (f *edgeField) sendHonestly(ctx context.Context, senders []*rig.Sender, id string, end time.Time, e *ends) {
	var running sync.WaitGroup
	start := time.Now()
	for i, s := range senders {
		running.Go(func() {
			from := f.Origin(i)
			due := start.Add(honestEvery * time.Duration(i) / time.Duration(len(senders)))
			for k := 0; due.Before(end) && until(ctx, due); k++ {
				r := f.events(from, fmt.Sprint(id, k), 1)
				late := time.Since(due)
				e.add(s.Do(context.WithoutCancel(ctx), r), late)
				due = due.Add(honestEvery)
			}
		})
	}
	running.Wait()
}

// forgeries are the ways in which a request is not by whom it says.
var forgeries = [...]struct {
	name  string
	share int // of 12
	from  func(f *edgeField, n int) matrix.ServerName
}{
	{"names of nobody", 4, func(f *edgeField, n int) matrix.ServerName { return nobody(n) }},
	{"names of servers that are not known yet", 4, func(f *edgeField, n int) matrix.ServerName { return f.Names()[honestServers+n%namedServers] }},
	{"names of silent servers", 2, func(f *edgeField, n int) matrix.ServerName {
		return f.Names()[honestServers+namedServers+n%silentServers]
	}},
	{"names of honest servers", 2, func(f *edgeField, n int) matrix.ServerName { return f.Names()[n%honestServers] }},
}

const numForgeries = len(forgeries)

// nobody is a name under which nobody can be reached: its address, which no
// simulated server has, refuses.
func nobody(n int) matrix.ServerName {
	return matrix.ServerName(fmt.Sprintf("127.1.%d.%d:9", 128+n>>8&127, n&255))
}

// forge sends all forged requests and waits until they are answered.
func (f *edgeField) forge(ctx context.Context, e *[numForgeries]ends) {
	seed := make([]byte, 32)
	seed[0] = 1
	key, err := matrix.NewSigningKey(seed, "sim") // as the simulated servers call theirs
	if err != nil {
		panic(fmt.Sprintf("bench: a key: %v", err))
	}
	var turn []int // of forgeries, by share
	for k := range forgeries {
		for range forgeries[k].share {
			turn = append(turn, k)
		}
	}
	var next atomic.Int64
	start := time.Now()
	var running sync.WaitGroup
	for a := range forgedAddresses {
		s := rig.NewSender(f.target(), netip.AddrFrom4([4]byte{127, 0, 0, byte(10 + a)}), forgedAtOnce)
		defer s.Close()
		for range forgedAtOnce {
			running.Go(func() {
				for {
					n := int(next.Add(1) - 1)
					if n >= forgedRequests || !until(ctx, start.Add(time.Duration(n)*time.Second/forgedRate)) {
						return
					}
					k := turn[n%len(turn)]
					from := fedload.Homeserver{Name: forgeries[k].from(f, n), Key: key}
					e[k].add(s.Do(ctx, f.events(from, fmt.Sprint("forged", n), 1)), 0)
				}
			})
		}
	}
	running.Wait()
}

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"fsbus/scripts/rig"
)

// edgeWay is one way to the stub.
type edgeWay struct {
	name    string
	usage   func() (rig.Usage, error) // of the proxy; nil for none
	senders []*rig.Sender
}

// edgeThroughput measures how many small transactions pass in a second, and what
// they cost. Pacing is what fsbus is for, but not what is measured here, so it is
// turned up.
func edgeThroughput(ctx context.Context, b *bench) (err error) {
	const (
		origins, each, rounds = 64, 80, 7
		// settle is after how long what belongs to answered transactions is on disk.
		settle = 1200 * time.Millisecond
	)
	f, err := b.edgeField(origins, false, rig.StubConfig{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	err = f.start(ctx, map[string]string{
		"memory_limit":         rig.Text("256MiB"),
		"edge.concurrency":     "64",
		"edge.parallel":        "64",
		"edge.origin_rate":     "10000.0",
		"edge.origin_burst":    "10000",
		"edge.key_fetches":     "10000",
		"edge.ephemeral":       rig.Text("pass"),
		"edge.max_reading":     "64",
		"edge.record_disk":     rig.Text("64MiB"),
		"edge.max_connections": "512",
	})
	if err != nil {
		return err
	}
	h2 := func(t rig.Target) rig.Target { t.HTTP2 = true; return t }
	var ways []*edgeWay
	add := func(name string, t rig.Target, usage func() (rig.Usage, error)) {
		w := &edgeWay{name: name, usage: usage}
		for i := range origins {
			w.senders = append(w.senders, f.sender(t, i, 1))
		}
		ways = append(ways, w)
	}
	defer func() {
		for _, w := range ways {
			for _, s := range w.senders {
				s.Close()
			}
		}
	}()
	add("direct, no TLS", f.direct(), nil)
	plain := ""
	if command, name, ok := findProxy(); ok {
		p, err := b.startPlain(ctx, f, command, name)
		if err != nil {
			return err
		}
		defer p.Stop(10 * time.Second)
		plain = name
		add(name+", HTTP/1.1", p.target(f), p.TreeUsage)
		add(name+", HTTP/2", h2(p.target(f)), p.TreeUsage)
	} else {
		b.result.note("THERE IS NO REVERSE PROXY to compare with: neither nginx nor caddy is in PATH, and -proxy names none")
	}
	add("fsbus, HTTP/1.1", f.target(), f.bus.Usage)
	add("fsbus, HTTP/2", h2(f.target()), f.bus.Usage)

	kinds := []struct {
		name string
		make func(i int, id string) *rig.Signed
	}{
		{"an event", func(i int, id string) *rig.Signed { return f.events(f.Origin(i), id, 1) }},
		{"presence", func(i int, id string) *rig.Signed { return f.presence(f.Origin(i), id) }},
	}
	turn := 0
	for _, kind := range kinds {
		for round := range rounds + 1 {
			rate, cpu := make(map[string]float64), make(map[string]float64)
			for _, w := range inTurn(ways, round) {
				turn++
				requests := make([][]*rig.Signed, origins)
				parallel(2, origins, func(i int) {
					for k := range each {
						requests[i] = append(requests[i], kind.make(i, fmt.Sprintf("%d-%d", turn, k)))
					}
				})
				var before, after rig.Usage
				if w.usage != nil {
					if before, err = w.usage(); err != nil {
						return err
					}
				}
				var ends ends
				var running sync.WaitGroup
				start := time.Now()
				for i, s := range w.senders {
					running.Go(func() {
						for _, r := range requests[i] {
							ends.add(s.Do(ctx, r), 0)
						}
					})
				}
				running.Wait()
				took := time.Since(start)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if ends.failed() > 0 {
					return fmt.Errorf("%s, %s, round %d: %v", w.name, kind.name, round, &ends)
				}
				if w.usage != nil {
					if strings.HasPrefix(w.name, "fsbus") && !until(ctx, time.Now().Add(settle)) {
						return ctx.Err()
					}
					if after, err = w.usage(); err != nil {
						return err
					}
				}
				if round == 0 { // it connects, and learns the keys
					continue
				}
				name := kind.name + ": " + w.name
				rate[w.name] = float64(ends.all()) / took.Seconds()
				b.result.add(name, "transactions/s", rate[w.name])
				b.result.add(name+", p50", "ms", milliseconds(ends.took.Percentile(50)))
				b.result.add(name+", p99", "ms", milliseconds(ends.took.Percentile(99)))
				if w.usage != nil {
					cpu[w.name] = (after.CPU - before.CPU).Seconds() * 1000 / float64(ends.all())
					b.result.add(name+", processor time", "ms", cpu[w.name])
				}
			}
			if round == 0 || plain == "" {
				continue
			}
			for _, via := range []string{", HTTP/1.1", ", HTTP/2"} {
				b.result.add(kind.name+": fsbus to "+plain+via+", transactions", "times", rate["fsbus"+via]/rate[plain+via])
				b.result.add(kind.name+": fsbus to "+plain+via+", processor time", "times", cpu["fsbus"+via]/cpu[plain+via])
			}
		}
	}
	for _, w := range ways {
		if w.usage == nil || strings.HasSuffix(w.name, "HTTP/2") {
			continue
		}
		u, err := w.usage()
		if err != nil {
			return err
		}
		name, _, _ := strings.Cut(w.name, ",")
		b.result.add(name+", most memory", "MiB", mib(u.PeakRSS))
	}
	seen := f.stub.Stats()
	b.result.atMost("transactions that the homeserver got twice", float64(seen.Repeated), 0, "")
	b.result.note("%d servers, each with one connection, on which it sends %d transactions one after the other in each turn;", origins, each)
	b.result.note("all share the machine, the load and the stub included, and what these need hides a part of every difference")
	b.result.note("processor time is that of the proxy for one transaction, with what fsbus does within %v after the answers;", settle)
	b.result.note("fsbus stores what was answered before it answers; concurrency, origin_rate and key_fetches are raised, ephemeral is \"pass\"")
	return nil
}

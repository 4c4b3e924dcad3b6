package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

const (
	// patience bounds a run: what has no answer by then never gets one.
	patience = 3 * time.Minute
	// drain is how long fsbus gets to stop, more than its own drain_timeout.
	drain = 15 * time.Second
)

// options are the flags.
type options struct {
	quick, keep bool
	dir         string
	fsbus       []string // empty: build it
}

// demo runs everything and shows it. Its error is what did not go as it should.
func demo(ctx context.Context, o options, s *screen) (err error) {
	p := fullPlan
	if o.quick {
		p = quickPlan
	}
	if err := rig.InRepository(); err != nil {
		return err
	}
	// A socket for each server that lives, a connection for each lookup of a
	// storm, and at the other end one for each that fsbus has open.
	const filesPerServer = 8
	if err := rig.NeedFiles(uint64(p.servers) * filesPerServer); err != nil {
		return err
	}
	dir, err := rig.Workspace(o.dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			s.print("what fsbus wrote is in %s", filepath.Join(dir, "fsbus.log"))
			return
		}
		os.RemoveAll(dir)
		os.Remove(o.dir) // if it is empty
	}()
	if len(o.fsbus) == 0 {
		s.print("building fsbus (the first time takes a minute)")
		binary := filepath.Join(dir, "fsbus")
		if err := rig.Build(ctx, binary); err != nil {
			return err
		}
		o.fsbus = []string{binary}
	}

	fed, err := rig.NewFederation(dir, sim.Config{Servers: p.servers, Seed: 1, Shares: shares, Jitter: 50 * time.Millisecond})
	if err != nil {
		return err
	}
	defer fed.Close()
	s.print("%d simulated servers: %d work, %d limit the rate, %d refuse connections, %d accept them and are silent", p.servers,
		len(fed.NamesOf(sim.Well)), len(fed.NamesOf(sim.Limited)), len(fed.NamesOf(sim.Dead)), len(fed.NamesOf(sim.Hanging)))
	bus, err := rig.StartBus(ctx, dir, o.fsbus, fed, map[string]string{
		"homeserver.signing_key_path": rig.Text(fed.KeyFile),
		"outbox.ack_hold":             rig.Text("5s"), // for the demo to end soon
	})
	if err != nil {
		return err
	}
	defer bus.Stop(time.Second) // unless it was stopped below
	s.print("fsbus is up with the example configuration; its status page is http://%s/\n", bus.Page)

	t, v, err := perform(ctx, p, fed, bus, s)
	if err != nil {
		return err
	}
	memory := !o.quick
	s.print("%s", table(t, v, memory))
	problems := append(t.wrong(), v.wrong(memory, t.events)...)
	if len(problems) == 0 {
		s.print("%s", conclusion(t, v, memory))
		if o.keep {
			s.print("\nfsbus stays, with nothing to do: http://%s/ shows what it did. Ctrl-C ends it.", bus.Page)
			select {
			case <-ctx.Done():
			case <-bus.Done():
				return bus.Running()
			}
		}
	}
	if err := bus.Stop(drain); err != nil {
		problems = append(problems, "fsbus did not stop in good order: "+err.Error())
	}
	if len(problems) > 0 {
		return fmt.Errorf("not as it should be:\n  %s", strings.Join(problems, "\n  "))
	}
	return nil
}

// view is what was seen from the outside while the traffic went on.
type view struct {
	last    rig.Sample // at the end
	peaks   *rig.Peaks
	servers sim.Stats
	took    time.Duration
}

// delivered waits until the live servers have all events that were taken over for
// them, or ctx ends.
func (v *view) delivered(ctx context.Context, events int64, fed *rig.Federation) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for fed.Stats().Transactions.PDUs < events {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// perform plays the traffic and watches.
func perform(ctx context.Context, p plan, fed *rig.Federation, bus *rig.Bus, s *screen) (*traffic, *view, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)

	t := newTraffic(p, fed, bus.Hook(bus.Unix), s.print)
	defer t.hook.Close()
	v := new(view)
	start := time.Now()
	watching, stopWatching := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		var err error
		v.peaks, err = bus.Watch(watching, 250*time.Millisecond, func(now rig.Sample) { s.progress("%s", progress(time.Since(start), t, now)) })
		if err != nil {
			fail(err) // the bus has ended, or does not answer
		}
	}()
	t.play(ctx)
	v.delivered(ctx, t.events, fed)
	v.took = time.Since(start)
	stopWatching()
	<-watched
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	var err error
	if v.last, err = bus.Sample(ctx); err != nil {
		return nil, nil, err
	}
	v.peaks.Add(v.last)
	v.servers = fed.Stats()
	return t, v, nil
}

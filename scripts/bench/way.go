package main

import (
	"context"
	"errors"
	"fmt"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// way is one way to the servers of a federation of its own: what one of them has
// been asked must not make it easier for the next.
type way struct {
	*rig.Federation
	name  string
	proxy *proxy // nil for none
}

// waysThere are what is compared: no proxy, the naive one, and fsbus with its
// default configuration. The flag -alone leaves only the last.
var waysThere = []string{"direct", "naive", "fsbus"}

// startWay starts a federation, and the proxy before it that name says.
func (b *bench) startWay(ctx context.Context, name string, c sim.Config) (*way, error) {
	dir, err := b.folder()
	if err != nil {
		return nil, err
	}
	f, err := rig.NewFederation(dir, c)
	if err != nil {
		return nil, err
	}
	w := &way{Federation: f, name: name}
	switch name {
	case "naive":
		w.proxy, err = b.startNaive(ctx, f)
	case "fsbus":
		w.proxy, err = b.startBus(ctx, f, nil)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return w, nil
}

// client returns another client that goes this way, by the unix socket of a proxy.
func (w *way) client() *fedload.Client {
	if w.proxy == nil {
		return fedload.NewDirect(w.Roots, w.From)
	}
	return w.proxy.hook()
}

func (w *way) stop() error {
	var err error
	if w.proxy != nil {
		err = w.proxy.stop()
	}
	w.Close()
	return err
}

// eachWay runs the same on every way, one after the other.
func (b *bench) eachWay(ctx context.Context, c sim.Config, run func(context.Context, *way) error) error {
	for _, name := range waysThere {
		w, err := b.startWay(ctx, name, c)
		if err != nil {
			return err
		}
		if err := errors.Join(run(ctx, w), w.stop()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// addUsage notes what the way's proxy has used so far, if it has one.
func (b *bench) addUsage(w *way) error {
	if w.proxy == nil {
		return nil
	}
	u, err := w.proxy.Usage()
	if err != nil {
		return err
	}
	b.result.add(w.name+": most memory", "MiB", mib(u.PeakRSS))
	b.result.add(w.name+": processor time", "s", u.CPU.Seconds())
	return nil
}

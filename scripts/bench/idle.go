package main

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// idle measures a bus that was started and left alone.
func idle(ctx context.Context, b *bench) error {
	const wait = 10 * time.Second
	f, err := rig.NewFederation(b.dir, sim.Config{Servers: 1, Seed: 1})
	if err != nil {
		return err
	}
	defer f.Close()
	bus, err := b.startBus(ctx, f, nil)
	if err != nil {
		return err
	}
	defer bus.stop()
	before, err := bus.Usage()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
	}
	after, err := bus.Usage()
	if err != nil {
		return err
	}
	b.result.add("memory after 10 s", "MiB", mib(after.RSS))
	b.result.add("the most since the start", "MiB", mib(after.PeakRSS))
	b.result.add("processor time in 10 s", "s", (after.CPU - before.CPU).Seconds())
	b.result.atMost("memory of an idle fsbus", mib(after.RSS), 20, "MiB")

	for _, target := range []struct{ name, arch, bits string }{
		{"program for armv7", "arm", "7"},
		{"program for arm64", "arm64", ""},
		{"program for amd64", "amd64", ""},
	} {
		path := filepath.Join(b.dir, "fsbus-"+target.arch)
		env := []string{"GOOS=linux", "GOARCH=" + target.arch}
		if target.bits != "" {
			env = append(env, "GOARM="+target.bits)
		}
		if err := rig.Build(ctx, path, env...); err != nil {
			return err
		}
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		b.result.add(target.name+", stripped", "MiB", mib(fi.Size()))
	}
	b.result.atMost("program for armv7, stripped", b.result.median("program for armv7, stripped"), 14, "MiB")
	return nil
}

package netx

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestGateLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(3, 2)
		entered := 0
		for range 4 {
			go func() {
				if g.enter() {
					g.mu.Lock()
					entered++
					g.mu.Unlock()
				}
			}()
		}
		step := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			g.mu.Lock()
			defer g.mu.Unlock()
			if entered != want {
				t.Fatalf("%s: %d inside, want %d", what, entered, want)
			}
		}
		step("two are being read", 2)
		g.leave(0, 1)
		step("one is parked", 3)
		g.leave(0, 1)
		step("two are parked, and one is being read", 3)
		g.leave(1, 0)
		step("one of them is answered", 4)
		if g.mostOpen != 3 || g.mostReading != 2 {
			t.Errorf("most open %d, most reading %d", g.mostOpen, g.mostReading)
		}

		refused := make(chan bool)
		go func() { refused <- !g.enter() }()
		synctest.Wait()
		g.close()
		if !<-refused || g.enter() {
			t.Error("a closed gate lets somebody in")
		}
		ctx, cancel := context.WithCancel(t.Context())
		drained := make(chan error)
		go func() { drained <- g.drain(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-drained; !errors.Is(err, context.Canceled) {
			t.Errorf("drain: %v", err)
		}
		go func() { drained <- g.drain(t.Context()) }()
		synctest.Wait()
		g.leave(0, 2)
		if err := <-drained; err != nil {
			t.Errorf("drain: %v", err)
		}
	})
}

func TestGatePanicsWhenMoreLeaveThanCame(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	newGate(1, 1).leave(1, 0)
}

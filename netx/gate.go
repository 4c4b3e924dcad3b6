package netx

import (
	"context"
	"fmt"
	"sync"
)

// A gate decides when a Front may accept a further connection. Whoever wants
// one takes a place first and calls Accept then, so that the limits hold
// exactly and what is beyond them stays in the kernel's backlog. A listener
// that waits in Accept therefore holds a place.
type gate struct {
	maxOpen, maxReading int

	mu      sync.Mutex
	change  sync.Cond // a place became free, or the gate was closed; L is &mu
	open    int       // places taken: accepted connections and listeners in Accept
	reading int       // those of them whose request is not yet handed over
	closed  bool

	mostOpen, mostReading int
}

func newGate(maxOpen, maxReading int) *gate {
	g := &gate{maxOpen: maxOpen, maxReading: maxReading}
	g.change.L = &g.mu
	return g
}

// enter waits for a place. It reports false when the gate is closed.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.closed && (g.open >= g.maxOpen || g.reading >= g.maxReading) {
		g.change.Wait()
	}
	if g.closed {
		return false
	}
	g.open++
	g.reading++
	g.mostOpen = max(g.mostOpen, g.open)
	g.mostReading = max(g.mostReading, g.reading)
	return true
}

// leave gives back what the caller holds: places among the open connections,
// among those being read, or both.
func (g *gate) leave(open, reading int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open -= open
	g.reading -= reading
	if g.open < 0 || g.reading < 0 {
		panic(fmt.Sprintf("netx: more connections left than came: open %d, reading %d", g.open, g.reading))
	}
	g.change.Broadcast()
}

// close lets nobody in any more.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.change.Broadcast()
}

// drain waits until no request is being read, or ctx is done.
func (g *gate) drain(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.change.Broadcast()
	})
	defer stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.reading > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		g.change.Wait()
	}
	return nil
}

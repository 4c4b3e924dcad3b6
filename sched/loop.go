package sched

import (
	"context"
	"time"
)

// Machine is a pure state machine: events in, effects out.
type Machine[E, F any] interface {
	// Step handles one event at the moment now, and whatever has become due
	// by then, and appends its effects to out.
	Step(now Time, ev E, out []F) []F
	// NextWake returns the moment at which Step wants to be called even if
	// nothing happens, with the event that the loop was given for it.
	NextWake() (Time, bool)
}

// maxBatch is how many waiting events share one reading of the clock and one
// call of the executor. It bounds how long effects wait for later events.
const maxBatch = 64

// Loop is the one goroutine that runs a Machine.
type Loop[E, F any] struct {
	machine Machine[E, F]
	exec    func([]F)
	wake    E
	clock   func() Time
	events  chan E
	calls   chan func()
	now     []E // events from the executor, which come before those that wait
}

// NewLoop returns a loop over m. exec is given the effects of up to 64 events;
// wake is the event for a timer; queue is how many events may wait before
// Post blocks.
func NewLoop[E, F any](m Machine[E, F], clock func() Time, wake E, queue int, exec func([]F)) *Loop[E, F] {
	return &Loop[E, F]{machine: m, exec: exec, wake: wake, clock: clock, events: make(chan E, queue), calls: make(chan func())}
}

// Post hands an event to the loop, waiting for room if need be. The executor
// uses Inject instead, since the loop cannot wait for itself.
func (l *Loop[E, F]) Post(ev E) { l.events <- ev }

// Inject hands over an event that the executor knows of at once. Only the
// executor may call it.
func (l *Loop[E, F]) Inject(ev E) { l.now = append(l.now, ev) }

// Call runs f on the loop's goroutine between two steps, so that f may read
// the machine, and returns when it is done or ctx ends.
func (l *Loop[E, F]) Call(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case l.calls <- func() { f(); close(done) }:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run runs the loop until ctx ends.
func (l *Loop[E, F]) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var out []F
	for {
		var ev E
		select {
		case <-ctx.Done():
			return
		case f := <-l.calls:
			f()
			continue
		case ev = <-l.events:
		case <-timer.C:
			ev = l.wake
		}
		now := l.clock()
		out = l.machine.Step(now, ev, out[:0])
	batch:
		for range maxBatch - 1 {
			select {
			case ev = <-l.events:
				out = l.machine.Step(now, ev, out)
			default:
				break batch
			}
		}
		for {
			l.exec(out)
			clear(out)
			if len(l.now) == 0 {
				break
			}
			ev, out = l.now[0], out[:0]
			l.now = append(l.now[:0], l.now[1:]...)
			out = l.machine.Step(l.clock(), ev, out)
		}
		if at, ok := l.machine.NextWake(); ok {
			timer.Reset(max(0, at.Sub(l.clock())))
		} else {
			timer.Reset(time.Hour)
		}
	}
}

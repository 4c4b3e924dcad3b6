package sim

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// The system's clock of a board without a battery starts anywhere and is set when a time
// server is reached; so it jumps while the bus runs, and more so between two starts. The
// bus's own time takes no part in that, but what is stored of it is from another origin
// after a start.

// jumps are what the system's clock does.
var jumps = []time.Duration{-24 * time.Hour, 90 * 24 * time.Hour, -time.Hour}

// wall is what the system's clock says.
func (w *World) wall() matrix.Timestamp {
	return matrix.Timestamp(w.now.Stored()).Add(w.jumped)
}

// jump sets the system's clock.
func (w *World) jump() {
	w.Counts["clock jump"]++
	w.jumped += jumps[w.rng.IntN(len(jumps))]
}

// scheduleJumps has the clock set now and then until end.
func (w *World) scheduleJumps(end sched.Time) {
	for range w.rng.IntN(3) {
		w.future.Set(w.now.Add(w.between(0, end.Sub(w.now)+1)), w.jump)
	}
}

// reboot sets the system's clock between two starts: what is stored was stamped by another
// one, and lies as far back, or ahead, as the clock was set on, or back.
func (w *World) reboot() {
	if w.rng.IntN(3) > 0 {
		return
	}
	before := w.jumped
	w.jump()
	back := before - w.jumped
	shift := func(t *sched.Time) {
		if *t != 0 {
			*t = max(1, t.Add(back))
		}
	}
	for name, r := range w.disk { // each for itself
		for _, t := range []*sched.Time{&r.FirstFailure, &r.LastTry, &r.NextTry, &r.LastSuccess} {
			shift(t)
		}
		w.disk[name] = r
	}
	if back < 0 { // to the core it has been long
		for _, r := range w.remotes {
			r.failures = 0
		}
	}
	w.Counts["clock set between starts"]++
}

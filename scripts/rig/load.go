package rig

import (
	"context"
	"iter"
	"time"

	"fsbus/scripts/fedload"
)

// Paced yields what requests does, at most perSecond of them in a second and
// evenly spread, until there are no more or ctx ends. What is late because the
// consumer was busy follows at once, so that the number is right in the end.
func Paced(ctx context.Context, perSecond float64, requests iter.Seq[*fedload.Request]) iter.Seq[*fedload.Request] {
	return func(yield func(*fedload.Request) bool) {
		gap := time.Duration(float64(time.Second) / perSecond)
		timer := time.NewTimer(0)
		defer timer.Stop()
		due := time.Now()
		for r := range requests {
			timer.Reset(time.Until(due))
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			if !yield(r) {
				return
			}
			due = due.Add(gap)
		}
	}
}

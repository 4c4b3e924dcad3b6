package sched

import "time"

// Clock reads the bus's time: the wall clock at its creation plus the
// monotonic time that has passed since.
type Clock struct {
	start time.Time
	base  Time
}

// NewClock starts a clock.
func NewClock() *Clock {
	now := time.Now()
	return &Clock{start: now, base: Time(now.UnixNano())}
}

// Now returns the present moment.
func (c *Clock) Now() Time { return c.At(time.Now()) }

// At returns the moment t, which must come from time.Now in this process.
func (c *Clock) At(t time.Time) Time { return c.base.Add(t.Sub(c.start)) }

package sched

import "time"

// Time is a moment on the bus's own clock, in nanoseconds. It never goes back
// and never jumps, unlike the wall clock of a board without a battery. The
// origin is the Unix epoch as the system's clock had it when the process started,
// so Stored is a good label for people and for the database. It is not the time of
// day: that may have been set since, and what is said in documents of others, such
// as until when a key is valid, is compared with matrix.Timestamp and never with
// this. The zero value means "never".
type Time int64

// Add returns t+d.
func (t Time) Add(d time.Duration) Time { return t + Time(d) }

// Sub returns the duration t-u.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t - u) }

// Before reports whether t is earlier than u.
func (t Time) Before(u Time) bool { return t < u }

// Stored returns t as milliseconds, as it is stored and shown, 0 for "never".
func (t Time) Stored() int64 { return int64(t) / int64(time.Millisecond) }

// FromStored is the inverse of Stored.
func FromStored(ms int64) Time { return Time(ms) * Time(time.Millisecond) }

// Std returns t as a time.Time, for x/time/rate and for display.
func (t Time) Std() time.Time { return time.Unix(0, int64(t)) }

package matrix

import "time"

// Timestamp is a moment by the clocks of the world, in milliseconds since the Unix epoch, as
// Matrix has it in its documents: until when a key is valid, when it was fetched, from when
// on an event needs it. It is compared with the system's clock as that is at the moment,
// which may be set at any time, and is a type of its own so that it cannot be compared with
// the bus's own clock (sched.Time), by which ages and pauses are measured. The zero value is
// the epoch, which for what may be missing means that it is.
type Timestamp int64

// At returns t as a Timestamp.
func At(t time.Time) Timestamp { return Timestamp(t.UnixMilli()) }

// Std returns t as a time.Time.
func (t Timestamp) Std() time.Time { return time.UnixMilli(int64(t)) }

// Add returns t+d.
func (t Timestamp) Add(d time.Duration) Timestamp { return t + Timestamp(d.Milliseconds()) }

// Sub returns the duration t-u.
func (t Timestamp) Sub(u Timestamp) time.Duration {
	return time.Duration(t-u) * time.Millisecond
}

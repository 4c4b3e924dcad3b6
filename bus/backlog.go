package bus

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Backlog is what the outbox holds for a destination, as the store counts it.
// The zero value is nothing.
type Backlog struct {
	Items  [matrix.NumKinds + 1]int32 // by kind, those of a frozen batch included
	Bytes  int64                      // of all payloads, shared ones included
	Oldest sched.Time                 // when the oldest item was accepted; 0: there is none
	Frozen bool                       // a batch was packed and is not settled
	Held   bool                       // an admin wants nothing to be sent
}

// Total returns how many items there are.
func (b *Backlog) Total() (n int64) {
	for _, items := range b.Items {
		n += int64(items)
	}
	return n
}

// Adjusted: somebody other than the core has changed what the store holds for a
// destination.
type Adjusted struct {
	Dest    matrix.ServerName
	Backlog Backlog
}

// Flush: what is pending for a destination is to be tried at once, whatever its
// back-off says.
type Flush struct{ Dest matrix.ServerName }

// QueueStatus is the queue of one destination at one moment, for people.
type QueueStatus struct {
	Name matrix.ServerName
	Backlog
	State     string     // "idle", "waiting", "queued", "sending", "backing off" or "held"
	Why       string     // why what is there has not been sent yet, in words
	NextTry   sched.Time // when it is tried next; 0: as soon as there is room, or not at all
	Failures  int32      // deliveries that failed, in a row
	LastError string     // of the last delivery that failed; "" if the last one went well
	LastTry   sched.Time // 0: not since the start
	// Answer is what is known of the homeserver's transaction for it, and Paced
	// whether anything is.
	Answer PaceDest
	Paced  bool
}

// Age is how long the oldest item has waited.
func (s *QueueStatus) Age(now sched.Time) time.Duration {
	if s.Oldest == 0 {
		return 0
	}
	return now.Sub(s.Oldest)
}

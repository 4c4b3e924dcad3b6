package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// OutboxConfig bounds the outbox and says when it sends. The zero value is no
// outbox: then no Offered may come. Otherwise start from DefaultOutbox.
type OutboxConfig struct {
	// MaxQueues is how many destinations may have something pending; the store
	// keeps to it.
	MaxQueues int32
	// MaxTransaction is the size that a transaction should not exceed.
	MaxTransaction sched.Bytes
	// The windows are how long what came may wait for more of its kind or for
	// something that is more important and takes it along. Everything else goes
	// at once.
	PresenceWindow, ReceiptWindow, TypingWindow time.Duration
	// CatchUpAfter is the age at which a destination that cannot be reached keeps
	// only the newest events of each room. A Synapse does so after an hour
	// (CATCHUP_RETRY_INTERVAL in federation/sender/per_destination_queue.py).
	CatchUpAfter time.Duration
	// Pace says when the homeserver is answered.
	Pace PaceConfig
}

// DefaultOutbox returns what suits a board with four small cores.
func DefaultOutbox() OutboxConfig {
	return OutboxConfig{
		MaxQueues:      4500,
		MaxTransaction: 4 * sched.MiB,
		PresenceWindow: 10 * time.Second,
		ReceiptWindow:  time.Second,
		TypingWindow:   300 * time.Millisecond,
		CatchUpAfter:   time.Hour,
		Pace:           DefaultPace(),
	}
}

// Validate reports the first limit that makes no sense or contradicts another.
func (c OutboxConfig) Validate() error {
	switch {
	case c.MaxQueues < 1:
		return fmt.Errorf("max_destinations is %d, at least 1 is needed", c.MaxQueues)
	case c.MaxTransaction < minTransaction || c.MaxTransaction > matrix.MaxRequestBody:
		return fmt.Errorf("max_transaction_bytes is %v, it must be between %v and %v", c.MaxTransaction, minTransaction, sched.Bytes(matrix.MaxRequestBody))
	case c.PresenceWindow < 0 || c.ReceiptWindow < 0 || c.TypingWindow < 0:
		return fmt.Errorf("the windows are %v, %v and %v, none may be negative", c.PresenceWindow, c.ReceiptWindow, c.TypingWindow)
	case c.CatchUpAfter < time.Minute:
		return fmt.Errorf("catch_up_after is %v, at least %v is needed", c.CatchUpAfter, time.Minute)
	}
	return c.Pace.Validate()
}

const (
	// minTransaction is the size of the largest event (S2S "Size limits").
	minTransaction = 64 * sched.KiB

	// spreadEach is how far apart destinations are begun with after a start.
	spreadEach = 20 * time.Millisecond
	// maxSpread bounds all of that.
	maxSpread = 2 * time.Minute
	// probesEach is how many queues of failing hosts may have a call for each
	// worker that there is for them.
	probesEach = 4
	// sweepEvery is how often what has expired is looked for.
	sweepEvery = time.Minute
	// compactEvery is how often one destination is compacted at most.
	compactEvery = 10 * time.Minute
	// storePause is how long the outbox waits after the store failed.
	storePause = 5 * time.Second
)

package store

import (
	"os"
	"sync"
	"time"
)

// Stats are figures for the status page and the metrics. Counts are since Open.
type Stats struct {
	Commits    int64         // transactions made durable
	Accepting  int64         // those of them in which something was accepted
	Batches    int64         // batches in them
	Rows       int64         // rows they wrote or deleted
	Failed     int64         // batches completed with an error
	Pruned     int64         // rows deleted to keep to the bounds
	LastCommit time.Duration // of the last transaction, from BEGIN to the end of COMMIT
	MaxCommit  time.Duration // the longest so far

	Outbox      OutboxTotals  // what is stored
	Answers     CacheTotals   // of other servers, to be used again
	Keys        CacheTotals   // of other servers
	Inbound     InboundTotals // transactions of other servers that were answered
	InboundLeft int64         // those that were not stored, for want of room or as they are too large
	Damaged     int64         // times that a row of what is looked up was left out, as it cannot be ours

	QueueLen   int   // batches that wait for the writer
	QueueBytes int64 // their size
	FileBytes  int64 // size of the main file
	WALBytes   int64 // size of the write-ahead log
}

// counters are the part of Stats that the writer keeps.
type counters struct {
	mu sync.Mutex
	s  Stats
}

// group counts a group of batches. Failed attempts count as no commit.
func (c *counters) group(errs []error, rows, pruned int64, accepting bool, took time.Duration, now totals) {
	failed := int64(0)
	for _, err := range errs {
		if err != nil {
			failed++
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Failed += failed
	c.s.Batches += int64(len(errs)) - failed
	c.s.Rows += rows
	c.s.Pruned += pruned
	c.set(now)
	if failed < int64(len(errs)) {
		c.s.Commits++
		if accepting {
			c.s.Accepting++
		}
		c.s.LastCommit = took
		c.s.MaxCommit = max(c.s.MaxCommit, took)
	}
}

func (c *counters) set(t totals) {
	c.s.Outbox, c.s.Answers, c.s.Keys = t.outbox, t.answers.totals, t.keys.totals
	c.s.Inbound, c.s.InboundLeft = t.inbound.totals, t.inbound.left
}

// Stats returns the figures of this moment.
func (s *Store) Stats() Stats {
	s.counters.mu.Lock()
	st := s.counters.s
	s.counters.mu.Unlock()
	st.Damaged = s.damaged.Load()
	st.QueueLen, st.QueueBytes = s.queue.len()
	st.FileBytes = fileSize(s.opt.Path)
	st.WALBytes = fileSize(s.opt.Path + "-wal")
	return st
}

// fileSize returns 0 for a file that is not there, as the log is after Close.
func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}

package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
)

// Defaults of Options.
const (
	DefaultCacheBytes = 2 << 20 // two thirds of a full host table
	DefaultMaxGroup   = 1000    // rows per second hardly grow beyond, latency does (doc.go)
	DefaultQueueLen   = 4096    // four full groups
	DefaultQueueBytes = 4 << 20 // four of maxGroupBytes
	DefaultMaxHosts   = 20000   // 3 MiB of file; the largest public rooms have 10,000 servers

	DefaultMaxDestinations = DefaultMaxHosts
	DefaultMaxDestItems    = 10000     // 200 full transactions
	DefaultMaxDestBytes    = 16 << 20  // more than the largest transaction, 12.5 MiB
	DefaultMaxItems        = 1000000   // 100 MB of file, of which most is keys
	DefaultMaxFileBytes    = 512 << 20 // what an SD card can spare
	DefaultMaxAside        = 1000
	DefaultMaxAsideBytes   = 16 << 20

	DefaultMaxAnswers     = 10000 // the profiles of all users of a large room
	DefaultMaxAnswerBytes = 16 << 20
	DefaultMaxKeys        = 10000    // the servers of the largest public rooms, or half of them by two ways
	DefaultMaxKeyBytes    = 24 << 20 // at most: a key object has 1 KiB, and some have many old keys

	DefaultMaxInbound      = 50000    // one each 1.7 seconds in InboundFor
	DefaultMaxInboundBytes = 16 << 20 // 335 for each; one with a PDU takes 140
)

// Op names what Options.Fault is asked about.
type Op string

// The operations at which a fault can be put, in the words that stand in the
// errors.
const (
	OpOpen       Op = "open"       // SQLite opens the main file
	OpBegin      Op = "begin"      // a group is about to be written
	OpCommit     Op = "commit"     // it is written and about to be made durable
	OpCheckpoint Op = "checkpoint" // Close is about to move the log into the main file
)

// Options configure a Store. A zero field, other than Path, has its default.
type Options struct {
	// Path is the main file. Its directory is created if need be, the
	// directory above is not. SQLite adds files named Path-wal and Path-shm,
	// the store Path.lock.
	Path string
	// Reserve keeps 1 MiB on the disk, in Path.reserve, for when it is full: see
	// HasReserve. Default false.
	Reserve bool
	// ServerName is the homeserver's name, in which all is sent. It is stored, and
	// Open returns ErrOtherServer where it is not the one that was stored before, to
	// the letter, and something is pending. "" checks nothing and stores nothing.
	ServerName matrix.ServerName
	// CacheBytes bounds the writer's page cache, DefaultCacheBytes. It lies
	// outside of Go's heap, and so outside of GOMEMLIMIT.
	CacheBytes int64
	// MaxGroup is how many batches share one transaction at most,
	// DefaultMaxGroup.
	MaxGroup int
	// QueueLen and QueueBytes bound what waits for the writer besides the
	// group that it is storing, DefaultQueueLen and DefaultQueueBytes.
	QueueLen   int
	QueueBytes int64
	// Linger is the least time from the beginning of one commit to that of the
	// next: what comes meanwhile shares it. The first after a pause does not
	// wait. 0 is none.
	Linger time.Duration
	// MaxHosts bounds the rows of the host table, DefaultMaxHosts.
	MaxHosts int
	// The bounds of the outbox, see ErrOutboxFull. MaxDestItems and MaxDestBytes
	// are those of one destination, bytes being those of its items' payloads,
	// shared ones included. MaxItems is that of all. MaxFileBytes bounds the
	// main file, without its free pages, at which nothing more is accepted; it
	// may be passed by what one group brings. MaxDestinations bounds the rows
	// that are kept of destinations, pending or not. Each has a default.
	MaxDestinations int
	MaxDestItems    int
	MaxDestBytes    int64
	MaxItems        int
	MaxFileBytes    int64
	// MaxAside and MaxAsideBytes bound the items that are set aside: beyond
	// them the oldest are deleted.
	MaxAside      int
	MaxAsideBytes int64
	// MaxAnswers and MaxAnswerBytes bound the rows of answers and the sum of their
	// headers and bodies, DefaultMaxAnswers and DefaultMaxAnswerBytes. Beyond
	// them those that were written first are deleted. No answer is written where
	// the file is at MaxFileBytes, and the oldest go when the outbox needs the room.
	MaxAnswers     int
	MaxAnswerBytes int64
	// MaxKeys and MaxKeyBytes bound the rows of server keys and the sum of their
	// objects in the same way. Keys are written in any case, and the outbox has
	// only the rest of the file: so MaxKeyBytes is an eighth of MaxFileBytes by
	// default if that is less than DefaultMaxKeyBytes.
	MaxKeys     int
	MaxKeyBytes int64
	// MaxInbound, MaxInboundBytes and MaxInboundPDUs bound the transactions of other
	// servers, the sum of their answers and of what is kept of their PDUs (an event id
	// and 17 or 18 bytes for each), and the number of these PDUs. Beyond them those that
	// were written first are deleted, with their PDUs. Defaults: DefaultMaxInbound,
	// DefaultMaxInboundBytes, and four for each of MaxInbound. None is written where the
	// file is at MaxFileBytes, and the oldest go when the outbox needs the room and has
	// that of all answers. Look-ups take the longer the larger MaxInbound is.
	MaxInbound      int
	MaxInboundBytes int64
	MaxInboundPDUs  int
	// Logger is told what no caller is waiting for; nil for nobody.
	Logger *slog.Logger
	// Fault is a seam for tests, nil in production. It is called right before
	// each Op, on the goroutine that is about to do it, may block it, and an
	// error that it returns takes the operation's place. For OpCommit that
	// is a commit that failed.
	Fault func(Op) error
}

// check validates o and fills in the defaults.
func (o *Options) check() error {
	if o.Path == "" {
		return errors.New("store: no path")
	}
	path, err := filepath.Abs(o.Path)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	o.Path = path
	for _, n := range []struct {
		name string
		val  int64
	}{
		{"CacheBytes", o.CacheBytes}, {"MaxGroup", int64(o.MaxGroup)}, {"QueueLen", int64(o.QueueLen)},
		{"QueueBytes", o.QueueBytes}, {"MaxHosts", int64(o.MaxHosts)},
		{"MaxDestinations", int64(o.MaxDestinations)}, {"MaxDestItems", int64(o.MaxDestItems)}, {"MaxDestBytes", o.MaxDestBytes},
		{"MaxItems", int64(o.MaxItems)}, {"MaxFileBytes", o.MaxFileBytes}, {"MaxAside", int64(o.MaxAside)},
		{"MaxAsideBytes", o.MaxAsideBytes}, {"MaxAnswers", int64(o.MaxAnswers)}, {"MaxAnswerBytes", o.MaxAnswerBytes},
		{"MaxKeys", int64(o.MaxKeys)}, {"MaxKeyBytes", o.MaxKeyBytes},
		{"MaxInbound", int64(o.MaxInbound)}, {"MaxInboundBytes", o.MaxInboundBytes}, {"MaxInboundPDUs", int64(o.MaxInboundPDUs)},
	} {
		if n.val < 0 {
			return fmt.Errorf("store: %s is %d", n.name, n.val)
		}
	}
	fill(&o.CacheBytes, DefaultCacheBytes)
	fill(&o.MaxGroup, DefaultMaxGroup)
	fill(&o.QueueLen, DefaultQueueLen)
	fill(&o.QueueBytes, DefaultQueueBytes)
	fill(&o.MaxHosts, DefaultMaxHosts)
	fill(&o.MaxDestinations, DefaultMaxDestinations)
	fill(&o.MaxDestItems, DefaultMaxDestItems)
	fill(&o.MaxDestBytes, DefaultMaxDestBytes)
	fill(&o.MaxItems, DefaultMaxItems)
	fill(&o.MaxFileBytes, DefaultMaxFileBytes)
	fill(&o.MaxAside, DefaultMaxAside)
	fill(&o.MaxAsideBytes, DefaultMaxAsideBytes)
	fill(&o.MaxAnswers, DefaultMaxAnswers)
	fill(&o.MaxAnswerBytes, DefaultMaxAnswerBytes)
	fill(&o.MaxKeys, DefaultMaxKeys)
	fill(&o.MaxKeyBytes, min(DefaultMaxKeyBytes, o.MaxFileBytes/8))
	fill(&o.MaxInbound, DefaultMaxInbound)
	fill(&o.MaxInboundBytes, DefaultMaxInboundBytes)
	fill(&o.MaxInboundPDUs, 4*min(o.MaxInbound, math.MaxInt/4))
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Fault == nil {
		o.Fault = func(Op) error { return nil }
	}
	return nil
}

func fill[T int | int64](field *T, def T) {
	if *field == 0 {
		*field = def
	}
}

// Store is the open store. Its methods may be called from any goroutine.
type Store struct {
	opt      Options
	lock     *os.File
	queue    *queue
	writer   *writer // of the writer's goroutine alone
	counters counters

	reader       sync.Mutex // held while there is a reader connection
	readerClosed bool
	lookups      readers      // of what is looked up all the time
	damaged      atomic.Int64 // rows left out

	reserved     atomic.Bool // see HasReserve
	reserving    sync.Mutex  // guards reserveTried
	reserveTried time.Time

	stopped  chan struct{} // closed when the writer's goroutine has ended
	closeErr error         // valid from then on
}

// Submit queues b for the writer and returns at once. If it returns nil, done
// is called exactly once: with nil when b is durable (fsync), otherwise with
// the error. If Submit returns an error (ErrClosed, ErrQueueFull, ErrTooLarge),
// b was not taken and done is never called.
//
// Completions come in the order of the Submits, one after the other, from the
// writer's goroutine, and whatever follows waits meanwhile: done must be quick.
// It may call Submit but must not wait for the store, least of all in Close.
func (s *Store) Submit(b *Batch, done func(error)) error {
	if done == nil {
		panic("store: Submit without a completion")
	}
	return s.queue.put(job{batch: b, size: b.size(), done: done})
}

// Close stores what is queued, moves the log into the main file, closes and
// unlocks it. Submit refuses from the moment of the call. If ctx ends first,
// what the writer has not begun completes with ErrClosed, Close returns
// ctx's error without waiting any longer, and the rest of closing goes on in
// the background. Another call waits in the same way and returns the same.
//
// An error of the checkpoint costs nothing but time at the next Open.
func (s *Store) Close(ctx context.Context) error {
	s.queue.close(false)
	select {
	case <-s.stopped:
		return s.closeErr
	case <-ctx.Done():
		s.queue.close(true)
		return fmt.Errorf("store: close: %w", ctx.Err())
	}
}

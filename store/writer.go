package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// maxGroupBytes bounds what one SQLite transaction writes, so that its pages
// fit into the page cache and a group's latency has a limit. A single batch
// may be larger.
const maxGroupBytes = 1 << 20

// writer is the only code that changes the database, used by one goroutine.
type writer struct {
	conn    *conn
	path    string
	fault   func(Op) error
	hosts   *hostTable
	outbox  *outbox
	answers *answerTable
	keys    *keyTable
	inbound *inboundTable

	begin, commit, rollback *stmt
	save, undo, release     *stmt
}

func newWriter(ctx context.Context, c *conn, o *Options) (*writer, error) {
	w := &writer{conn: c, path: o.Path, fault: o.Fault}
	for _, p := range []struct {
		dst   **stmt
		query string
	}{
		// IMMEDIATE: if another program holds the write lock, this is known
		// before anything is written.
		{&w.begin, "BEGIN IMMEDIATE"},
		{&w.commit, "COMMIT"},
		{&w.rollback, "ROLLBACK"},
		{&w.save, "SAVEPOINT batch"},
		{&w.undo, "ROLLBACK TO batch"},
		{&w.release, "RELEASE batch"},
	} {
		s, err := c.prepare(p.query)
		if err != nil {
			return nil, err
		}
		*p.dst = s
	}
	var err error
	if w.hosts, err = newHostTable(ctx, c, int64(o.MaxHosts)); err != nil {
		return nil, err
	}
	if w.outbox, err = newOutbox(ctx, c, o); err != nil {
		return nil, err
	}
	if w.answers, err = newAnswerTable(c, w.outbox); err != nil {
		return nil, err
	}
	if w.keys, err = newKeyTable(c, w.outbox); err != nil {
		return nil, err
	}
	if w.inbound, err = newInboundTable(c, w.outbox); err != nil {
		return nil, err
	}
	w.outbox.yield = w.yield
	return w, nil
}

// yield makes room for the outbox: answers go first, which cost a request when they
// are missed. A transaction that was answered costs the homeserver more, or is taken
// for a new one by it.
func (w *writer) yield(bytes int64) (int64, error) {
	gone, err := w.answers.yield(bytes)
	if gone == 0 && err == nil {
		gone, err = w.inbound.yield(bytes)
	}
	return gone, err
}

// totals are those that are kept beside the tables.
type totals struct {
	outbox        OutboxTotals
	answers, keys cacheState
	inbound       inboundState
}

func (w *writer) totals() totals {
	return totals{w.outbox.totals, w.answers.cacheState, w.keys.cacheState, w.inbound.inboundState}
}

// restore sets the totals to what they were before what was rolled back.
func (w *writer) restore(t totals) {
	w.outbox.totals = t.outbox
	w.outbox.used = w.outbox.opt.MaxFileBytes // to be looked at
	w.answers.restore(t.answers)
	w.keys.restore(t.keys)
	w.inbound.restore(t.inbound)
}

// start starts the writer's goroutine.
func (s *Store) start() {
	go s.write()
}

// write takes what waits, stores it as one transaction and completes each
// batch, in order, until nothing more will come. Then it closes the file.
func (s *Store) write() {
	defer close(s.stopped)
	var group []job
	var errs []error
	var last time.Time
	for {
		if s.queue.wait() {
			time.Sleep(s.opt.Linger - time.Since(last)) // returns at once if that is over
		}
		last = time.Now()
		group = s.queue.take(group[:0], s.opt.MaxGroup, maxGroupBytes)
		if len(group) == 0 {
			break
		}
		errs = append(errs[:0], make([]error, len(group))...)
		began := time.Now()
		rows, pruned := s.writer.store(group, errs)
		s.counters.group(errs, rows, pruned, accepting(group, errs), time.Since(began), s.writer.totals())
		for i, j := range group {
			j.done(errs[i])
		}
		clear(group)
	}
	for _, j := range s.queue.rest() {
		j.done(ErrClosed)
	}
	s.closeErr = s.shut()
}

// accepting tells whether a batch that was stored accepts something.
func accepting(group []job, errs []error) bool {
	for i, j := range group {
		if errs[i] == nil && slices.ContainsFunc(j.batch.Outbox, func(op OutboxOp) bool { _, ok := op.(*Accept); return ok }) {
			return true
		}
	}
	return false
}

// store stores the group in one transaction and sets in errs, which is all
// nil, the error of each batch that was not stored. If a batch alone is refused the transaction is done once more with a savepoint around each
// batch, which costs two statements for each and one fsync for all, where
// trying them one by one would cost an fsync for each.
func (w *writer) store(group []job, errs []error) (rows, pruned int64) {
	rows, pruned, err := w.transact(group, nil)
	if len(group) > 1 && refused(err) {
		rows, pruned, err = w.transact(group, errs)
	}
	if err == nil {
		return rows, pruned
	}
	for i := range errs {
		if errs[i] == nil {
			errs[i] = err
		}
	}
	return 0, 0
}

// transact is one attempt at a group. With errs, a refused batch is taken
// back alone and its error noted there; otherwise it ends the attempt.
func (w *writer) transact(group []job, errs []error) (rows, pruned int64, err error) {
	before := w.totals()
	defer func() {
		if err != nil {
			// SQLite may have rolled back on its own, as it does when the
			// disk is full; then this fails, and that is fine. Should it fail
			// for another reason the next BEGIN does too, and ends up here.
			w.rollback.exec()
			w.hosts.rolledBack()
			w.restore(before)
		}
	}()
	if err := w.step(OpBegin, w.begin); err != nil {
		return 0, 0, err
	}
	for i, j := range group {
		n, err := w.applyOne(j.batch, errs != nil)
		if errs != nil && refused(err) {
			errs[i], err = err, nil
		}
		if err != nil {
			return 0, 0, err
		}
		rows += n
	}
	for _, t := range []struct {
		op    string
		bound func() (int64, error)
	}{
		{"prune hosts", w.hosts.bound}, {"prune answers", w.answers.bound}, {"prune keys", w.keys.bound},
		{"prune inbound", w.inbound.bound},
	} {
		n, err := t.bound()
		if err != nil {
			return 0, 0, classify(t.op, w.path, err)
		}
		pruned += n
	}
	return rows, pruned, w.step(OpCommit, w.commit)
}

// applyOne applies b, with a savepoint around it if guarded.
func (w *writer) applyOne(b *Batch, guarded bool) (int64, error) {
	if !guarded {
		return w.apply(b)
	}
	if _, err := w.save.exec(); err != nil {
		return 0, classify("savepoint", w.path, err)
	}
	before := w.totals()
	rows, err := w.apply(b)
	if err != nil {
		if !refused(err) {
			return 0, err // the whole transaction goes, the savepoint with it
		}
		w.restore(before)
		if _, err := w.undo.exec(); err != nil {
			return 0, classify("undo batch", w.path, err)
		}
	}
	if _, err := w.release.exec(); err != nil {
		return 0, classify("release", w.path, err)
	}
	return rows, err
}

// step runs one of the statements at which faults can be put.
func (w *writer) step(op Op, s *stmt) error {
	err := w.fault(op)
	if err == nil {
		_, err = s.exec()
	}
	if err != nil {
		return classify(string(op), w.path, err)
	}
	return nil
}

// shut is the end of the writer's goroutine: the log goes into the main file,
// the files are closed, the lock is released.
func (s *Store) shut() error {
	w := s.writer
	s.reader.Lock() // wait for a reader, keep out others
	s.readerClosed = true
	s.reader.Unlock()
	rerr := s.lookups.close()

	err := w.fault(OpCheckpoint)
	if err == nil {
		// Its result says if something, such as an admin's shell, was in the
		// way. That is no error: the log is complete, the next Open reads it.
		err = w.conn.exec(context.Background(), "PRAGMA wal_checkpoint(TRUNCATE)")
	}
	if err != nil {
		err = classify(string(OpCheckpoint), w.path, err)
	}
	if rerr != nil {
		err = errors.Join(err, fmt.Errorf("store: close: %w", rerr))
	}
	if cerr := w.conn.close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("store: close: %w", cerr))
	}
	return errors.Join(err, s.lock.Close())
}

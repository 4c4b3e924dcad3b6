package store

import (
	"database/sql/driver"
	"errors"
	"fmt"

	"fsbus/bus/matrix"
)

// Accept takes over a transaction of the homeserver for one destination.
//
// Items are merged with what waits for the destination and is not frozen, by the
// rules of their kinds (matrix.Merge): what is replaced goes, and the new item
// takes its place at the end of its lane.
type Accept struct {
	Destination matrix.ServerName
	// TxnID is the homeserver's id of the transaction, at most MaxTxnID bytes. If
	// it is that of the last one accepted for the destination, nothing
	// changes. Only the last is known: a homeserver has one in flight. Empty: it
	// is never taken for a repetition.
	TxnID string
	Items []matrix.Item
	// Load takes the place of Items where that is nil: it appends the items to dst
	// when they are to be stored. A transaction that waits as the body it came in
	// takes a fraction of the memory of its items.
	//
	// It is called on the writer's goroutine, so all other batches wait for it, and
	// once more after a rollback. It must not keep dst. The store keeps nothing of
	// the items, so their payloads may lie in memory that the next Load uses again.
	// An error of it is one of the content (ErrInvalid). A repeated transaction is
	// not loaded.
	Load func(dst []matrix.Item) ([]matrix.Item, error)
	// Bytes is about how large the transaction is that Load yields. It counts
	// against Options.QueueBytes and for the size of groups as the items would.
	Bytes    int64
	Accepted int64 // when

	Result AcceptResult
}

// AcceptResult says what became of the items. Each is in one of the first three
// numbers, unless Repeated.
type AcceptResult struct {
	Accepted   int // stored beside what was there
	Merged     int // stored in place of another one
	Duplicates int // copies of what is pending, dropped
	Repeated   bool
	// Kinds is what the transaction brought, whatever became of it; nothing if
	// Repeated.
	Kinds KindTotals
	// Destination is what is pending afterwards.
	Destination Destination
}

// String says what a does, for errors.
func (a *Accept) String() string { return fmt.Sprintf("accept for %q", a.Destination) }

// What an Accept and an Item take besides their strings, on 64-bit.
const (
	acceptBytes     = 448
	acceptItemBytes = 88
)

func (a *Accept) size() int64 {
	n := int64(acceptBytes + len(a.Destination) + len(a.TxnID))
	if a.lazy() {
		return n + max(a.Bytes, 0)
	}
	for i := range a.Items {
		it := &a.Items[i]
		n += int64(acceptItemBytes + len(it.Key) + len(it.Group) + len(it.Payload))
	}
	return n
}

// lazy tells whether the items are still to be loaded.
func (a *Accept) lazy() bool { return a.Items == nil && a.Load != nil }

// check tells whether items can be stored.
func check(items []matrix.Item) error {
	for i := range items {
		if it := &items[i]; it.Kind.Lane() == 0 || len(it.Payload) == 0 || it.Lifetime < 0 {
			return fmt.Errorf("%w: an item of kind %d, %d bytes, lifetime %v", ErrInvalid, it.Kind, len(it.Payload), it.Lifetime)
		}
	}
	return nil
}

func (a *Accept) apply(o *outbox) (int64, error) {
	a.Result = AcceptResult{}
	if len(a.TxnID) > MaxTxnID {
		return 0, fmt.Errorf("%w: a transaction id of %d bytes", ErrInvalid, len(a.TxnID))
	}
	d, err := o.newDest(a.Destination)
	if err != nil {
		return 0, err
	}
	if a.TxnID != "" && a.TxnID == d.TxnID {
		a.Result.Repeated, a.Result.Destination = true, d.Destination
		return 0, nil
	}
	if !a.lazy() {
		return a.add(o, d, a.Items)
	}
	var rows int64
	items, err := a.Load(o.scratch[:0])
	if err != nil {
		err = fmt.Errorf("%w: loading the items: %w", ErrInvalid, err)
	} else {
		rows, err = a.add(o, d, items)
	}
	o.reuse(items)
	return rows, err
}

// maxScratch is how many items outbox.scratch holds. Few transactions have more,
// and what those need is not worth keeping.
const maxScratch = 512

// reuse makes items the next scratch if it is larger, and lets go of the payloads:
// each may keep the whole body of a transaction in memory. Items may lie behind
// the length, where a Load has taken some back.
func (o *outbox) reuse(items []matrix.Item) {
	if cap(items) > cap(o.scratch) && cap(items) <= maxScratch {
		o.scratch = items
	}
	clear(o.scratch[:cap(o.scratch)])
}

// add puts the items into d.
func (a *Accept) add(o *outbox, d *dest, items []matrix.Item) (int64, error) {
	if err := check(items); err != nil {
		return 0, err
	}
	for i := range items {
		a.Result.Kinds.add(items[i].Kind, 1, int64(len(items[i].Payload)))
	}
	brought := a.Result.Kinds.Sum()
	if err := o.room(brought.Items*itemBytes + brought.Bytes); err != nil {
		return 0, err
	}
	before, oldest := d.Kinds.Sum(), d.Oldest
	m := merger{outbox: o, dest: d, result: &a.Result}
	for i := range items {
		if err := m.add(&items[i], a.Accepted); err != nil {
			return 0, fmt.Errorf("item %d, %v: %w", i, items[i].Kind, err)
		}
	}
	if m.oldest != 0 && m.oldest == oldest {
		if err := o.findOldest(d); err != nil {
			return 0, err
		}
	}
	if a.TxnID != "" { // else it is none of the homeserver's transactions, of which the last is known
		d.TxnID = a.TxnID
	}
	if err := o.save(d); err != nil {
		return 0, err
	}
	if err := o.bound(d, before); err != nil {
		return 0, err
	}
	a.Result.Destination = d.Destination
	return m.rows + 1, nil
}

// bound tells whether what d has is too much. Where it did not grow it is not, so
// that merging goes on when a bound was lowered.
func (o *outbox) bound(d *dest, before KindTotal) error {
	now := d.Kinds.Sum()
	if now.Bytes > before.Bytes && now.Bytes > o.opt.MaxDestBytes {
		return fmt.Errorf("%w: %d bytes", ErrOutboxFull, now.Bytes)
	}
	if now.Items <= before.Items {
		return nil
	}
	if now.Items > int64(o.opt.MaxDestItems) {
		return fmt.Errorf("%w: %d items", ErrOutboxFull, now.Items)
	}
	if o.totals.Items > int64(o.opt.MaxItems) {
		return fmt.Errorf("%w: %d items in all", ErrOutboxFull, o.totals.Items)
	}
	return nil
}

// merger adds items to one destination, or thaws those that it has.
type merger struct {
	*outbox
	dest   *dest
	result *AcceptResult // of those added
	rows   int64         // changed
	oldest int64         // the time of the oldest item deleted
}

func (m *merger) add(it *matrix.Item, accepted int64) error {
	key := itemKey(it)
	var old *queued
	if key != nil && it.Kind.Merge() != matrix.MergeKeep && it.Kind.Merge() != matrix.MergeNever {
		var err error
		if old, err = m.find(it.Kind, key); err != nil {
			return err
		}
	}
	if old != nil {
		merged, replaces, err := m.merge(old, it)
		if err != nil {
			return err
		}
		if !replaces {
			old = nil
		} else {
			if err := m.drop(m.dest, old); err != nil {
				return err
			}
			m.rows++
			if m.oldest == 0 || old.accepted < m.oldest {
				m.oldest = old.accepted
			}
			changed := *it
			changed.Payload = merged
			it = &changed
		}
	}
	stored, err := m.put(m.dest, it, key, accepted)
	switch {
	case err != nil:
		return err
	case !stored:
		m.result.Duplicates++
		return nil
	case old != nil:
		m.result.Merged++
	default:
		m.result.Accepted++
	}
	m.rows++
	return nil
}

// find returns the newest item of the same kind and key that is not frozen, nil
// if there is none. If more of it is damaged than its payload, merging would spread
// that, and so it is an error until Pack has set the item aside.
func (m *merger) find(kind matrix.Kind, key []byte) (old *queued, err error) {
	lane := kind.Lane()
	err = m.same.query(func(vals []driver.Value) error {
		it, err := scanItem(vals)
		if it.damage == damagedRow {
			err = it.err()
		}
		old = &it
		return err
	}, m.dest.id, int64(kind), key, int64(lane), m.dest.frozen(lane))
	return old, err
}

// merge returns the payload that takes the place of old's and it's. It may change
// items between the two. If replaces is false both stay.
func (m *merger) merge(old *queued, it *matrix.Item) (merged []byte, replaces bool, err error) {
	switch it.Kind.Merge() {
	case matrix.MergeFields:
		merged, err := matrix.MergeSigningKeys(old.payload, it.Payload)
		if errors.Is(err, matrix.ErrItem) {
			return nil, false, nil
		}
		return merged, true, err
	case matrix.MergeChain:
		return m.relink(old, it)
	}
	return it.Payload, true, nil
}

// maxChain is how many lists of one user's devices are searched for those that
// refer to one. Where more wait, old and new ones both stay: the work that one
// item causes has a bound, and so has the queue.
const maxChain = 100

// relink takes old out of the chain of its user's device lists. it is the last of
// them, or already stands among those behind old; then merged is of no use.
func (m *merger) relink(old *queued, it *matrix.Item) (merged []byte, replaces bool, err error) {
	first := append(make([]byte, 0, groupBytes+hashBytes), old.key[:groupBytes]...)
	last := append(make([]byte, 0, groupBytes+hashBytes), first...)
	for range hashBytes {
		first, last = append(first, 0), append(last, 0xff)
	}
	var behind []queued
	err = m.group.query(func(vals []driver.Value) error {
		b, err := scanItem(vals)
		if b.damage == damagedRow {
			err = b.err()
		}
		behind = append(behind, b)
		return err
	}, m.dest.id, int64(it.Kind), first, last, old.seq, int64(maxChain+1))
	if err != nil || len(behind) > maxChain {
		return nil, false, err
	}
	merged, replaces, err = matrix.RelinkDeviceList(old.payload, it.Payload)
	if errors.Is(err, matrix.ErrItem) {
		return nil, false, nil
	}
	if !replaces {
		merged = it.Payload
	}
	for i := range behind {
		payload, refers, err := matrix.RelinkDeviceList(old.payload, behind[i].payload)
		if !refers || err != nil {
			continue
		}
		replaces = true
		if err := m.rewrite(m.dest, &behind[i], payload); err != nil {
			return nil, false, err
		}
		m.rows++
	}
	return merged, replaces, nil
}

// thaw merges old, which is frozen and about to be no more, with the newest item
// of its kind and key that came since. gone says that old was dropped: the newer
// one has its place, as if it had come when old was not frozen.
func (m *merger) thaw(old *queued) (gone bool, err error) {
	newer, err := m.find(old.kind, old.key)
	if newer == nil || err != nil {
		return false, err
	}
	if old.kind.Merge() != matrix.MergeReplace {
		// Device lists dropped before this one may have changed it.
		if err := m.each(m.dest, old.lane, old.seq, old.seq, func(it *queued) error {
			*old = *it
			return nil
		}); err != nil {
			return false, err
		}
	}
	switch old.kind.Merge() {
	case matrix.MergeFields:
		merged, err := matrix.MergeSigningKeys(old.payload, newer.payload)
		if errors.Is(err, matrix.ErrItem) {
			return false, nil
		}
		if err == nil {
			err = m.rewrite(m.dest, newer, merged)
		}
		if err != nil {
			return false, err
		}
		m.rows++
	case matrix.MergeChain:
		_, replaces, err := m.relink(old, &matrix.Item{Kind: newer.kind, Payload: newer.payload})
		if !replaces || err != nil {
			return false, err
		}
	}
	m.rows++
	return true, m.drop(m.dest, old)
}

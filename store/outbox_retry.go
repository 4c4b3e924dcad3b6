package store

import (
	"database/sql/driver"
	"errors"
	"fmt"
	"time"

	"fsbus/bus/matrix"
)

// RetryAside puts items that were set aside back into the queue of their destination, behind
// what waits there. An item of a kind of which a newer one takes the place of an older one
// stays: the newer one has been delivered since.
type RetryAside struct {
	Destination matrix.ServerName
	ID          int64 // of the only one; 0: all of Destination
	// Once has only those tried again that have been aside for RetryAfter, and were set
	// aside sooner than that after they were accepted: what is set aside again is not. It
	// is one item, the oldest: several that are refused again would hold up what is behind.
	Once bool
	Now  int64

	Result RetryResult
}

// RetryAfter is when an item that was set aside is tried again.
const RetryAfter = 24 * time.Hour

// retryMost and retryBytes bound what one RetryAside tries again: so many items, of which
// the last one that fits may go beyond the bytes.
const (
	retryMost  = 100
	retryBytes = 1 << 20
)

// RetryResult says what became of the items.
type RetryResult struct {
	Again KindTotal // put back
	Left  int64     // that were passed over, as they may not or cannot be sent again
	// Destination is what is pending afterwards; its Name is "" if nothing was put back.
	Destination Destination
}

// String says what r does, for errors.
func (r *RetryAside) String() string {
	return fmt.Sprintf("try again what is set aside for %q", r.Destination)
}

func (r *RetryAside) size() int64 { return 128 + int64(len(r.Destination)) + retryBytes }

func (r *RetryAside) apply(o *outbox) (int64, error) {
	r.Result = RetryResult{}
	if o.totals.Aside == 0 {
		return 0, nil
	}
	list, err := r.load(o)
	if err != nil || len(list) == 0 {
		return 0, err
	}
	if err := o.room(r.Result.Again.Items*itemBytes + r.Result.Again.Bytes); err != nil {
		return 0, err
	}
	d, err := o.newDest(r.Destination)
	if err != nil {
		return 0, err
	}
	before := d.Kinds.Sum()
	m := merger{outbox: o, dest: d, result: new(AcceptResult)}
	for i := range list {
		if err := m.add(&list[i].item, list[i].accepted); err != nil {
			return 0, err
		}
		if _, err := o.deleteAside(o.oneAside, list[i].id); err != nil {
			return 0, err
		}
	}
	if err := o.save(d); err != nil {
		return 0, err
	}
	if err := o.bound(d, before); err != nil {
		return 0, err
	}
	r.Result.Destination = d.Destination
	return m.rows + r.Result.Again.Items + 1, nil
}

// asideItem is an item that goes back.
type asideItem struct {
	id, accepted int64
	item         matrix.Item
}

// load returns the items that go back, and passes over those that do not, so that none of
// them is in the way of others.
func (r *RetryAside) load(o *outbox) (list []asideItem, err error) {
	first, last, before, sooner := int64(0), int64(maxSeq), int64(maxSeq), int64(maxSeq)
	if r.ID != 0 {
		first, last = r.ID, r.ID
	}
	most := int64(retryMost)
	if r.Once {
		most = 1
		before, sooner = r.Now-RetryAfter.Milliseconds(), RetryAfter.Milliseconds()
	}
	again := &r.Result.Again
	err = o.asideOf.query(func(vals []driver.Value) error {
		var a asideItem
		var kind int64
		var payload []byte
		if err := scan(vals, &a.id, &kind, &a.accepted, &payload); err == nil {
			var ok bool
			if a.item, ok = asideAgain(kind, payload); ok {
				list = append(list, a)
				again.Items++
				again.Bytes += int64(len(payload))
				if again.Items >= most || again.Bytes >= retryBytes {
					return errStop
				}
				return nil
			}
		}
		r.Result.Left++
		return nil
	}, string(r.Destination), first, last, before, sooner)
	if errors.Is(err, errStop) {
		err = nil
	}
	return list, err
}

// asideAgain returns the item that a row stands for; ok is false if it should not, or cannot,
// be in a queue again.
func asideAgain(kind int64, payload []byte) (it matrix.Item, ok bool) {
	k, err := kindOf(kind)
	switch {
	case err != nil || len(payload) == 0:
		return it, false
	case k.Merge() == matrix.MergeNever:
		return matrix.Item{Kind: k, Payload: payload}, true
	case k != matrix.KindPDU:
		return it, false
	}
	txn, err := matrix.ParseTransaction(fmt.Appendf(nil, `{"pdus":[%s]}`, payload))
	if err != nil && !errors.Is(err, matrix.ErrNoOrigin) || len(txn.PDUs) != 1 {
		return it, false
	}
	return txn.Items(nil)[0], true
}

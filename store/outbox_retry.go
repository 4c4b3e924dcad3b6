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
	// is one item at a time: several that are refused again would hold up what is behind.
	Once bool
	Now  int64

	Result RetryResult
}

// RetryAfter is when an item that was set aside is tried again.
const RetryAfter = 24 * time.Hour

// retryMost is how many items one RetryAside tries again.
const retryMost = 100

// RetryResult says what became of the items.
type RetryResult struct {
	Again KindTotal // put back
	Left  int64     // that stay aside, as they may not or cannot be sent again
	// Destination is what is pending afterwards; its Name is "" if nothing was put back.
	Destination Destination
}

// String says what r does, for errors.
func (r *RetryAside) String() string {
	return fmt.Sprintf("try again what is set aside for %q", r.Destination)
}

func (r *RetryAside) size() int64 { return 128 + int64(len(r.Destination)) }

func (r *RetryAside) apply(o *outbox) (int64, error) {
	r.Result = RetryResult{}
	if o.totals.Aside == 0 {
		return 0, nil
	}
	list, err := r.load(o)
	if err != nil || len(list) == 0 {
		return 0, err
	}
	d, err := o.newDest(r.Destination)
	if err != nil {
		return 0, err
	}
	before := d.Kinds.Sum()
	m := merger{outbox: o, dest: d, result: new(AcceptResult)}
	for i := range list {
		a := &list[i]
		it, ok := a.item()
		if !ok {
			r.Result.Left++
			continue
		}
		if err := o.room(itemBytes + int64(len(it.Payload))); err != nil {
			return 0, err
		}
		if err := m.add(&it, a.Accepted); err != nil {
			return 0, err
		}
		if _, err := o.deleteAside(o.oneAside, a.ID); err != nil {
			return 0, err
		}
		r.Result.Again.Items++
		r.Result.Again.Bytes += int64(len(it.Payload))
	}
	if r.Result.Again.Items == 0 {
		return 0, nil
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

// load returns the items that r is for.
func (r *RetryAside) load(o *outbox) (list []Aside, err error) {
	first, last, before := int64(0), int64(maxSeq), int64(maxSeq)
	if r.ID != 0 {
		first, last = r.ID, r.ID
	}
	sooner, most := int64(maxSeq), int64(retryMost)
	if r.Once {
		most = 1
		before, sooner = r.Now-RetryAfter.Milliseconds(), RetryAfter.Milliseconds()
	}
	err = o.asideOf.query(func(vals []driver.Value) error {
		a := Aside{Destination: r.Destination}
		var kind int64
		if err := scan(vals, &a.ID, &kind, &a.Accepted, &a.Payload); err != nil {
			r.Result.Left++ // it is damaged, and for an admin to look at
			return nil
		}
		a.Kind = matrix.Kind(min(max(kind, 0), int64(matrix.NumKinds)+1)) // none beyond has a lane
		list = append(list, a)
		return nil
	}, string(r.Destination), first, last, before, sooner, most)
	return list, err
}

// item returns what a is in a queue; ok is false if it should not, or cannot, be there again.
func (a *Aside) item() (it matrix.Item, ok bool) {
	switch {
	case a.Kind.Lane() == 0 || len(a.Payload) == 0:
		return it, false
	case a.Kind.Merge() == matrix.MergeNever:
		return matrix.Item{Kind: a.Kind, Payload: a.Payload}, true
	case a.Kind != matrix.KindPDU:
		return it, false
	}
	txn, err := matrix.ParseTransaction(fmt.Appendf(nil, `{"pdus":[%s]}`, a.Payload))
	if err != nil && !errors.Is(err, matrix.ErrNoOrigin) || len(txn.PDUs) != 1 {
		return it, false
	}
	return txn.Items(nil)[0], true
}

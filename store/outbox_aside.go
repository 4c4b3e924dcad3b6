package store

import (
	"context"
	"database/sql/driver"
	"fmt"

	"fsbus/bus/matrix"
)

// Aside is an item that was given up, because the destination refuses it or
// because it cannot be sent, and is kept for an admin to look at. Of one that is
// damaged it is what is left: Payload may be empty, Accepted 0, and Kind the first of
// its lane.
type Aside struct {
	ID          int64
	Destination matrix.ServerName
	Kind        matrix.Kind
	Accepted    int64
	At          int64  // when it was set aside
	Reason      string // at most MaxErrorBytes
	Payload     []byte
}

// setAside moves an item to the ones set aside, and deletes the oldest of those
// if they are too many.
func (o *outbox) setAside(d *dest, it *queued, now int64, reason string) (*Aside, error) {
	if err := o.drop(d, it); err != nil {
		return nil, err
	}
	size := int64(len(it.payload)) // of what is kept
	a := &Aside{
		Destination: d.Name, Kind: it.kind, Accepted: it.accepted, At: now,
		Reason: clip(reason, MaxErrorBytes), Payload: it.payload,
	}
	if _, err := o.putAside.exec(string(a.Destination), int64(a.Kind), a.Accepted, a.At, a.Reason, size, a.Payload); err != nil {
		return nil, err
	}
	t := &o.totals
	t.Aside++
	t.AsideBytes += size
	for t.Aside > int64(o.opt.MaxAside) || t.AsideBytes > o.opt.MaxAsideBytes && t.Aside > 1 {
		cut, err := o.deleteAside(o.cutAside)
		if err != nil {
			return nil, err
		}
		if cut.Items == 0 {
			break // an admin's shell was faster
		}
	}
	return a, nil
}

// deleteAside runs a statement that deletes rows and returns their sizes. One that is
// damaged makes the totals wrong, which is no reason to keep Pack from its work.
func (o *outbox) deleteAside(s *stmt, args ...driver.Value) (cut KindTotal, err error) {
	err = s.query(func(vals []driver.Value) error {
		cut.Items++
		cut.Bytes += number(vals[0])
		return nil
	}, args...)
	o.totals.Aside -= cut.Items
	o.totals.AsideBytes -= cut.Bytes
	return cut, err
}

// LoadAside calls f for each item that is set aside, oldest first, until f
// returns an error.
func (s *Store) LoadAside(ctx context.Context, f func(Aside) error) error {
	return s.read(ctx, "load what is set aside", func(c *conn) error {
		return c.query(ctx, "SELECT id, dest, kind, accepted, at, reason, bytes FROM aside ORDER BY id", nil,
			func(vals []driver.Value) error {
				var a Aside
				var name string
				var kind int64
				if err := scan(vals, &a.ID, &name, &kind, &a.Accepted, &a.At, &a.Reason, &a.Payload); err != nil {
					return err
				}
				k, err := kindOf(kind)
				if err != nil {
					return err
				}
				a.Destination, a.Kind = matrix.ServerName(name), k
				return f(a)
			})
	})
}

// ForgetAside deletes items that were set aside: those with an ID up to Through.
type ForgetAside struct {
	Through int64

	Result KindTotal // deleted
}

// String says what f does, for errors.
func (f *ForgetAside) String() string {
	return fmt.Sprintf("forget what is set aside up to %d", f.Through)
}

func (f *ForgetAside) size() int64 { return 64 }

func (f *ForgetAside) apply(o *outbox) (int64, error) {
	var err error
	f.Result, err = o.deleteAside(o.forgetAside, f.Through)
	return f.Result.Items, err
}

package store

import (
	"database/sql/driver"
	"errors"
	"fmt"

	"fsbus/bus/matrix"
)

// Expire deletes items that have waited for longer than their lifetime, of some
// destinations at a time. Of a lane it looks at what stands first, up to the
// first item that has not expired; Pack looks at each that it sends. Lanes of
// items that have no lifetime are left alone, and so is what is frozen.
type Expire struct {
	Now int64
	// After is 0 at the start of a round, and then the Result's Next.
	After int64

	Result ExpireResult
}

// ExpireResult says what was deleted.
type ExpireResult struct {
	Expired KindTotals
	// Next is where to go on; 0 at the end of the round.
	Next int64
	// Destinations are those of which something was deleted.
	Destinations []Destination
}

// String says what e does, for errors.
func (e *Expire) String() string { return "expire" }

func (e *Expire) size() int64 { return 256 }

// expireDests is how many destinations Expire looks at in one step.
const expireDests = 100

func (e *Expire) apply(o *outbox) (rows int64, err error) {
	e.Result = ExpireResult{}
	var dests []*dest
	if err := o.dests.query(func(vals []driver.Value) error {
		d, err := scanDest(vals)
		if errors.Is(err, ErrDamagedRow) {
			// It is for all destinations: nothing to do for this one.
			d, err = &dest{id: number(vals[0])}, nil
		}
		dests = append(dests, d)
		return err
	}, e.After, int64(expireDests)); err != nil {
		return 0, err
	}
	if len(dests) == expireDests {
		e.Result.Next = dests[expireDests-1].id
	}
	for _, d := range dests {
		gone, more, err := o.expire(d, e.Now, maxTrim-int(rows))
		if err != nil {
			return 0, err
		}
		if n := gone.Sum().Items; n > 0 {
			rows += n
			for k, t := range gone {
				e.Result.Expired.add(matrix.Kind(k), t.Items, t.Bytes)
			}
			e.Result.Destinations = append(e.Result.Destinations, d.Destination)
		}
		if more {
			e.Result.Next = d.id - 1
			break
		}
	}
	return rows, nil
}

// expire deletes at most limit expired items of d and saves it. more is true if
// there may be others.
func (o *outbox) expire(d *dest, now int64, limit int) (gone KindTotals, more bool, err error) {
	var list []queued
	for l := matrix.LaneReceipt; l <= matrix.NumLanes; l++ {
		if d.Kinds.lane(l) == 0 {
			continue
		}
		if err := o.each(d, l, d.frozen(l)+1, maxSeq, func(it *queued) error {
			if !it.expired(now) {
				return errStop
			}
			if more = len(list) >= limit; more {
				return errStop
			}
			list = append(list, *it)
			return nil
		}); err != nil {
			return gone, false, err
		}
		if more {
			break
		}
	}
	if len(list) == 0 {
		return gone, more, nil
	}
	for i := range list {
		if err := o.drop(d, &list[i]); err != nil {
			return gone, false, err
		}
		gone.add(list[i].kind, 1, list[i].size)
	}
	if err := o.findOldest(d); err != nil {
		return gone, false, err
	}
	return gone, more, o.save(d)
}

// Compact gives up what a destination that was away for long does not need: of
// each room all PDUs but those that matrix.Newest keeps, since the receiver asks
// for what lies between, and what Expire would delete. Frozen items stay, and so
// do PDUs of which the room is not known.
type Compact struct {
	Destination matrix.ServerName
	Now         int64

	Result CompactResult
}

// CompactResult says what was deleted.
type CompactResult struct {
	Superseded KindTotal // PDUs
	Expired    KindTotals
	More       bool // there is more to delete: do it again
	// Destination is what is pending afterwards.
	Destination Destination
}

// String says what c does, for errors.
func (c *Compact) String() string { return fmt.Sprintf("compact for %q", c.Destination) }

func (c *Compact) size() int64 { return int64(384 + len(c.Destination)) }

func (c *Compact) apply(o *outbox) (int64, error) {
	c.Result = CompactResult{}
	d, err := o.dest(c.Destination)
	if d == nil || err != nil {
		return 0, err
	}
	list, err := o.superseded(d)
	if err != nil {
		return 0, err
	}
	if c.Result.More = len(list) > maxTrim; c.Result.More {
		list = list[:maxTrim]
	}
	for i := range list {
		if err := o.drop(d, &list[i]); err != nil {
			return 0, err
		}
		c.Result.Superseded.Items++
		c.Result.Superseded.Bytes += list[i].size
	}
	if len(list) > 0 {
		if err := o.findOldest(d); err != nil {
			return 0, err
		}
		if err := o.save(d); err != nil {
			return 0, err
		}
	}
	gone, more, err := o.expire(d, c.Now, maxTrim-len(list))
	c.Result.Expired = gone
	c.Result.More = c.Result.More || more
	c.Result.Destination = d.Destination
	return int64(len(list)) + gone.Sum().Items, err
}

// superseded returns the PDUs of d that newer ones of their room make needless,
// in the order of the queue. It is for d.items rows in memory at most, 40 bytes
// each.
func (o *outbox) superseded(d *dest) ([]queued, error) {
	type room struct {
		places []int
		depths []int64
	}
	var list []queued
	rooms := map[[groupBytes]byte]*room{}
	err := o.pdus.query(func(vals []driver.Value) error {
		it := queued{lane: matrix.LanePDU, kind: matrix.KindPDU}
		var depth int64
		if err := scan(vals[:3], &it.seq, &depth, &it.size); err != nil {
			return err
		}
		var group [groupBytes]byte
		if key, ok := vals[3].([]byte); ok {
			copy(group[:], key)
		}
		if group == [groupBytes]byte{} {
			return nil
		}
		r := rooms[group]
		if r == nil {
			r = new(room)
			rooms[group] = r
		}
		r.places = append(r.places, len(list))
		r.depths = append(r.depths, depth)
		list = append(list, it)
		return nil
	}, d.id, int64(matrix.LanePDU), d.frozen(matrix.LanePDU))
	if err != nil {
		return nil, err
	}
	keep := make([]bool, len(list))
	for _, r := range rooms {
		for _, i := range matrix.Newest(r.depths) {
			keep[r.places[i]] = true
		}
	}
	rest := list[:0]
	for i, it := range list {
		if !keep[i] {
			rest = append(rest, it)
		}
	}
	return rest, nil
}

// Hold sets or clears Destination.Held.
type Hold struct {
	Destination matrix.ServerName
	Held        bool

	Result Destination // what is pending
}

// String says what h does, for errors.
func (h *Hold) String() string { return fmt.Sprintf("hold %q", h.Destination) }

func (h *Hold) size() int64 { return int64(320 + len(h.Destination)) }

func (h *Hold) apply(o *outbox) (int64, error) {
	h.Result = Destination{}
	d, err := o.newDest(h.Destination)
	if err != nil {
		return 0, err
	}
	d.Held = h.Held
	err = o.save(d)
	h.Result = d.Destination
	return 1, err
}

// Drop deletes what an admin does not want to be delivered. For the admin to keep
// it, first write down what LoadItems gives, and then set Through to the
// largest ID seen, so that nothing else goes.
type Drop struct {
	Destination matrix.ServerName
	// PDUs says that everything goes, the frozen batch as well. Otherwise it is
	// the EDUs, and those in the frozen batch stay.
	PDUs    bool
	Through int64

	Result DropResult
}

// DropResult says what was deleted.
type DropResult struct {
	Dropped KindTotals
	// Destination is what is pending afterwards.
	Destination Destination
}

// String says what dr does, for errors.
func (dr *Drop) String() string { return fmt.Sprintf("drop for %q", dr.Destination) }

func (dr *Drop) size() int64 { return int64(448 + len(dr.Destination)) }

func (dr *Drop) apply(o *outbox) (int64, error) {
	dr.Result = DropResult{}
	d, err := o.dest(dr.Destination)
	if d == nil || err != nil {
		return 0, err
	}
	if dr.PDUs && d.frozenThrough() <= dr.Through {
		d.parts = nil
	}
	var rows int64
	for l := matrix.Lane(1); l <= matrix.NumLanes; l++ {
		if l == matrix.LanePDU && !dr.PDUs {
			continue
		}
		n, err := o.removeSpan.exec(d.id, int64(l), d.frozen(l)+1, dr.Through)
		if err != nil {
			return 0, err
		}
		rows += n
	}
	before := d.Kinds
	if err := o.count(d); err != nil {
		return 0, err
	}
	for k, t := range before {
		dr.Result.Dropped[k] = KindTotal{t.Items - d.Kinds[k].Items, t.Bytes - d.Kinds[k].Bytes}
	}
	if err := o.findOldest(d); err != nil {
		return 0, err
	}
	err = o.save(d)
	dr.Result.Destination = d.Destination
	return rows + 1, err
}

// frozenThrough returns the largest number of a frozen item.
func (d *dest) frozenThrough() (last int64) {
	for l := matrix.Lane(1); l <= matrix.NumLanes; l++ {
		last = max(last, d.frozen(l))
	}
	return last
}

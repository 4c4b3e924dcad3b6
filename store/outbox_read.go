package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"

	"fsbus/bus/matrix"
)

// LoadOutbox calls f for each destination that has something pending or is held,
// in no particular order, until f returns an error. It is for the start: totals
// are stored, so this reads one row for each destination and none of the items.
func (s *Store) LoadOutbox(ctx context.Context, f func(Destination) error) error {
	return s.read(ctx, "load outbox", func(c *conn) error {
		return c.query(ctx, "SELECT "+destColumns+" FROM dest WHERE items > 0 OR held", nil, func(vals []driver.Value) error {
			d, err := scanDest(vals)
			if err != nil {
				return err
			}
			return f(d.Destination)
		})
	})
}

// Ages counts items by how long they wait: up to 1, 5, 15, 60, 240, 1440 minutes,
// and longer.
type Ages [7]int64

// AgeBounds are the upper bounds of Ages but for the last, in minutes.
var AgeBounds = [len(Ages{}) - 1]int64{1, 5, 15, 60, 240, 1440}

// agesStep is how many items one query of LoadAges reads, and those of one
// destination more. While a query runs, the log cannot start over: what is written
// meanwhile makes it grow.
const agesStep = 20_000

// LoadAges calls f for each destination that has something pending, with the ages
// of its items at the time now, until f returns an error. It reads all items, in
// steps, so that what it gives is not of one moment.
func (s *Store) LoadAges(ctx context.Context, now int64, f func(matrix.ServerName, Ages) error) error {
	return s.loadAges(ctx, now, agesStep, f)
}

func (s *Store) loadAges(ctx context.Context, now, step int64, f func(matrix.ServerName, Ages) error) error {
	query := "SELECT i.dest, d.name"
	for i := range (Ages{}) {
		query += ", sum(?1 - i.accepted"
		switch {
		case i == 0:
			query += fmt.Sprintf(" <= %d)", minutes(i))
		case i < len(AgeBounds):
			query += fmt.Sprintf(" > %d AND ?1 - i.accepted <= %d)", minutes(i-1), minutes(i))
		default:
			query += fmt.Sprintf(" > %d)", minutes(i-1))
		}
	}
	// Both tables are in the order of destinations: no sort.
	query += " FROM item i CROSS JOIN dest d ON d.id = i.dest WHERE i.dest > ?2 GROUP BY i.dest"
	return s.read(ctx, "load ages", func(c *conn) error {
		after := int64(0)
		for {
			items := int64(0)
			err := c.query(ctx, query, []driver.Value{now, after}, func(vals []driver.Value) error {
				if items >= step {
					return errStop
				}
				var name string
				var a Ages
				if err := scan(vals, &after, &name, &a[0], &a[1], &a[2], &a[3], &a[4], &a[5], &a[6]); err != nil {
					return err
				}
				for _, n := range a {
					items += n
				}
				return f(matrix.ServerName(name), a)
			})
			if !errors.Is(err, errStop) {
				return err
			}
		}
	})
}

// minutes is the bound i in milliseconds.
func minutes(i int) int64 { return AgeBounds[i] * 60_000 }

// PendingItem is an item of a destination.
type PendingItem struct {
	ID       int64 // grows within a lane
	Kind     matrix.Kind
	Size     int64
	Accepted int64
	Expires  int64 // 0: never
	Frozen   bool
	Payload  []byte
}

// LoadItems calls f for what is pending for a destination, in the order in which
// it is packed, until f returns an error. Payloads are read with it, one at a
// time.
func (s *Store) LoadItems(ctx context.Context, name matrix.ServerName, f func(PendingItem) error) error {
	return s.read(ctx, "load items", func(c *conn) error {
		// One transaction, so that the batch and the items are of one moment.
		if err := c.exec(ctx, "BEGIN"); err != nil {
			return err
		}
		var d *dest
		err := c.query(ctx, "SELECT "+destColumns+" FROM dest WHERE name = ?1", []driver.Value{string(name)},
			func(vals []driver.Value) (err error) {
				d, err = scanDest(vals)
				return err
			})
		if d == nil || err != nil {
			return err
		}
		return c.query(ctx, rowsQuery+"WHERE i.dest = ?1 ORDER BY i.lane, i.seq", []driver.Value{d.id}, func(vals []driver.Value) error {
			it, err := scanItem(vals)
			if err == nil {
				err = it.err()
			}
			if err != nil {
				return err
			}
			p := PendingItem{
				ID: it.seq, Kind: it.kind, Size: it.size, Accepted: it.accepted,
				Frozen: it.seq <= d.frozen(it.lane), Payload: it.payload,
			}
			if it.lifetime > 0 {
				p.Expires = it.accepted + it.lifetime
			}
			return f(p)
		})
	})
}

// pendingPDUQuery yields the newest PDU of a destination before a number. What its
// payload lies in may be gone in a damaged file; then it is NULL.
var pendingPDUQuery = fmt.Sprintf(`SELECT i.seq, coalesce(i.bytes, b.bytes)
	FROM item i LEFT JOIN payload p ON p.hash = i.hash LEFT JOIN body b ON b.id = p.body
	WHERE i.dest = (SELECT id FROM dest WHERE name = ?1) AND i.lane = %d AND i.seq < ?2 ORDER BY i.seq DESC LIMIT 1`, matrix.LanePDU)

// PendingPDUs calls each for the PDUs that are pending for a destination, those of a
// frozen batch included, the newest first and at most limit of them, until it says
// that it needs no more or returns an error, which PendingPDUs returns as it is. It has
// one of them in memory at a time, sees whatever was completed before the call, and
// holds up nobody while each runs, which may keep the PDU and call the store. What is
// written or delivered meanwhile may show. A PDU of which the payload is damaged is
// left out (Stats.Damaged), but counts.
func (s *Store) PendingPDUs(dest matrix.ServerName, limit int, each func(pdu []byte) (more bool, err error)) error {
	before := int64(maxSeq)
	for range limit {
		var pdu []byte
		var bad error
		found := false
		err := s.lookUp("load pending PDUs", func(r *reader) error {
			return r.pendingPDU.query(func(vals []driver.Value) error {
				found = true
				if err := scan(vals[:1], &before); err != nil {
					return err
				}
				bad = scan(vals[1:], &pdu)
				return nil
			}, string(dest), before)
		})
		if !found || err != nil {
			return err
		}
		if bad != nil {
			s.leftOut("item", 1, bad)
			continue
		}
		if more, err := each(pdu); !more || err != nil {
			return err
		}
	}
	return nil
}

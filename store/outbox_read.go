package store

import (
	"context"
	"database/sql/driver"
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

// LoadAges calls f for each destination that has something pending, with the ages
// of its items at the time now, until f returns an error. It reads all items.
func (s *Store) LoadAges(ctx context.Context, now int64, f func(matrix.ServerName, Ages) error) error {
	query := "SELECT d.name"
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
	query += " FROM item i CROSS JOIN dest d ON d.id = i.dest GROUP BY i.dest"
	return s.read(ctx, "load ages", func(c *conn) error {
		return c.query(ctx, query, []driver.Value{now}, func(vals []driver.Value) error {
			var name string
			var a Ages
			if err := scan(vals, &name, &a[0], &a[1], &a[2], &a[3], &a[4], &a[5], &a[6]); err != nil {
				return err
			}
			return f(matrix.ServerName(name), a)
		})
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
			if err != nil {
				return fmt.Errorf("item %d: %w", it.seq, err)
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

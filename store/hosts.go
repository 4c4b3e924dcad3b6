package store

import (
	"context"
	"database/sql/driver"
	"fmt"
	"strings"
	"unicode/utf8"

	"fsbus/bus/matrix"
)

// MaxErrorBytes is how much of Host.Error is kept.
const MaxErrorBytes = 200

// Host is what the bus remembers of one destination, so that back-off survives
// a restart. All times are wall-clock milliseconds, 0 for never; they come from
// the caller, and the store neither compares them with a clock nor with each
// other.
type Host struct {
	// Name is the key; it must satisfy matrix.ParseServerName.
	Name matrix.ServerName
	// Failures counts the failures since the last success; 0 is a host that
	// does not fail.
	Failures int32
	// Failure is how the last of them ended, FailNone if the host gave an
	// answer that counts as a failure. It is stored by name, so that the
	// order of the constants may change. A name that is unknown reads as
	// FailLocal.
	Failure matrix.Failure
	// Status is the status code of that answer, 0 if there was none.
	Status int32
	// Error is the text of the last failure for the admin. What exceeds
	// MaxErrorBytes is cut off, what is not UTF-8 replaced.
	Error string

	FailingSince int64 // the first of the Failures
	FailedAt     int64 // the last of them
	RetryAt      int64 // not before
	SucceededAt  int64 // the last success
}

// check tells whether h may be stored. It stands at both borders, writing and
// reading, so that what is written can be read.
func (h *Host) check() error {
	if _, err := matrix.ParseServerName(string(h.Name)); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if h.Failures < 0 || h.Failure >= matrix.NumFailures {
		return fmt.Errorf("%w: %d failures, class %d", ErrInvalid, h.Failures, h.Failure)
	}
	return nil
}

// clip returns at most limit bytes of s, in whole characters.
func clip(s string, limit int) string {
	if len(s) > limit {
		for limit > 0 && !utf8.RuneStart(s[limit]) {
			limit--
		}
		s = s[:limit]
	}
	return strings.ToValidUTF8(s, "?")
}

// hostTable is the writer's side of the table.
type hostTable struct {
	conn                     *conn
	update, insert, del, cut *stmt

	max     int64 // rows that may stay
	rows    int64 // never less than the rows in the table: inserts count, deletes do not
	touched int64 // the highest value given out
}

const hostColumns = "name, failures, failure, status, error, failing_since, failed_at, retry_at, succeeded_at"

func newHostTable(ctx context.Context, c *conn, limit int64) (*hostTable, error) {
	t := &hostTable{conn: c, max: limit}
	for _, p := range []struct {
		dst   **stmt
		query string
	}{
		{&t.update, `UPDATE host SET failures = ?2, failure = ?3, status = ?4, error = ?5, failing_since = ?6,
			failed_at = ?7, retry_at = ?8, succeeded_at = ?9, touched = ?10 WHERE name = ?1`},
		{&t.insert, "INSERT INTO host (" + hostColumns + ", touched) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"},
		{&t.del, "DELETE FROM host WHERE name = ?1"},
		{&t.cut, "DELETE FROM host WHERE name IN (SELECT name FROM host ORDER BY failures > 0, touched LIMIT ?1)"},
	} {
		s, err := c.prepare(p.query)
		if err != nil {
			return nil, err
		}
		*p.dst = s
	}
	err := c.query(ctx, "SELECT count(*), coalesce(max(touched), 0) FROM host", nil, func(vals []driver.Value) error {
		return scan(vals, &t.rows, &t.touched)
	})
	return t, err
}

// put writes one row.
func (t *hostTable) put(h *Host) (int64, error) {
	if err := h.check(); err != nil {
		return 0, err
	}
	t.touched++
	args := [...]driver.Value{
		string(h.Name), int64(h.Failures), h.Failure.String(), int64(h.Status), clip(h.Error, MaxErrorBytes),
		h.FailingSince, h.FailedAt, h.RetryAt, h.SucceededAt, t.touched,
	}
	// Not INSERT ... ON CONFLICT: it does not tell which of the two it did,
	// and the number of rows has a bound.
	if n, err := t.update.exec(args[:]...); n != 0 || err != nil {
		return n, err
	}
	t.rows++
	return t.insert.exec(args[:]...)
}

func (t *hostTable) delete(name matrix.ServerName) (int64, error) {
	return t.del.exec(string(name))
}

// rolledBack is called when a transaction was undone, perhaps after bound, so
// that the next bound counts again.
func (t *hostTable) rolledBack() { t.rows = max(t.rows, t.max+1) }

// bound is called before each commit. If there may be more rows than allowed
// it counts them and deletes what is too much and a sixteenth beyond, so that
// a full table is not counted at every commit. The first to go are hosts that
// do not fail, the longest untouched first: of those nothing is lost but the
// knowledge that they once worked.
func (t *hostTable) bound() (int64, error) {
	if t.rows <= t.max {
		return 0, nil
	}
	n, err := value[int64](context.Background(), t.conn, "SELECT count(*) FROM host")
	if err != nil {
		return 0, err
	}
	t.rows = n
	if n <= t.max {
		return 0, nil
	}
	n, err = t.cut.exec(n - t.max + t.max/16)
	t.rows -= n
	return n, err
}

// LoadHosts returns at most limit hosts, the most useful first: failing ones,
// then the others; among equals the last written first. A row that
// cannot be one of ours is left out and reported to the log.
func (s *Store) LoadHosts(ctx context.Context, limit int) ([]Host, error) {
	var hosts []Host
	var bad int64
	var why error
	err := s.read(ctx, "load hosts", func(c *conn) error {
		return c.query(ctx, "SELECT "+hostColumns+" FROM host ORDER BY failures > 0 DESC, touched DESC LIMIT ?1",
			[]driver.Value{int64(max(limit, 0))}, func(vals []driver.Value) error {
				h, err := scanHost(vals)
				if err != nil {
					bad, why = bad+1, err
					return nil
				}
				hosts = append(hosts, h)
				return nil
			})
	})
	if err != nil {
		return nil, err
	}
	if bad > 0 {
		s.opt.Logger.Warn("rows of the host table left out", "rows", bad, "last", why)
	}
	return hosts, nil
}

func scanHost(vals []driver.Value) (h Host, err error) {
	var name, failure string
	var failures, status int64
	if err := scan(vals, &name, &failures, &failure, &status, &h.Error,
		&h.FailingSince, &h.FailedAt, &h.RetryAt, &h.SucceededAt); err != nil {
		return Host{}, err
	}
	h.Name = matrix.ServerName(name)
	h.Failures, h.Status = int32(failures), int32(status)
	if int64(h.Failures) != failures || int64(h.Status) != status {
		return Host{}, fmt.Errorf("%w: %q: %d failures, status %d", ErrInvalid, name, failures, status)
	}
	h.Failure, _ = matrix.ParseFailure(failure)
	return h, h.check()
}

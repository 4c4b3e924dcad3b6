package store

import (
	"database/sql/driver"
	"errors"
	"fmt"
	"math/bits"
)

// CacheTotals are the totals of a table of things that could be had again:
// answers of other servers, or keys.
type CacheTotals struct {
	Rows  int64
	Bytes int64 // of what is kept in them: headers and bodies, or key objects
}

// cacheTable is the writer's side of such a table. Rows are found by a hash of 64
// bits, beside which the key itself is compared, and are in the order in which
// they were written.
type cacheTable struct {
	cacheState
	outbox             *outbox // knows how large the file is
	maxRows, maxBytes  int64
	uncounted          bool  // the totals may be wrong
	del, insert        *stmt // both have the hash as ?1
	count, oldest, cut *stmt
}

// cacheState is what a rollback takes back.
type cacheState struct {
	totals CacheTotals
	pruned int64 // rows deleted in this transaction to keep to bounds
}

// cacheRowBytes is about what a row takes in the file besides what is kept in it,
// with its entry in the index and what lies idle on pages.
const cacheRowBytes = 200

// cacheQueries are the statements of a table. same is the condition that a row has
// a certain key.
type cacheQueries struct{ table, same, insert string }

func (q cacheQueries) del() string {
	return "DELETE FROM " + q.table + " WHERE hash = ?1 AND " + q.same + " RETURNING size"
}

// count has all it needs in the index.
func (q cacheQueries) count() string {
	return "SELECT count(*), coalesce(sum(size), 0) FROM " + q.table
}

func (q cacheQueries) oldest() string { return "SELECT id, size FROM " + q.table + " ORDER BY id" }
func (q cacheQueries) cut() string    { return "DELETE FROM " + q.table + " WHERE id <= ?1" }

func (t *cacheTable) prepare(c *conn, q cacheQueries) error {
	for _, p := range []struct {
		dst   **stmt
		query string
	}{
		{&t.del, q.del()}, {&t.insert, q.insert}, {&t.count, q.count()}, {&t.oldest, q.oldest()}, {&t.cut, q.cut()},
	} {
		s, err := c.prepare(p.query)
		if err != nil {
			return err
		}
		*p.dst = s
	}
	return t.recount()
}

func (t *cacheTable) recount() error {
	err := t.count.query(func(vals []driver.Value) error { return scan(vals, &t.totals.Rows, &t.totals.Bytes) })
	t.uncounted = err != nil
	return err
}

// delete deletes the row of a key. A size that is damaged makes the totals wrong,
// which is no reason to fail: they are counted before anything depends on them.
func (t *cacheTable) delete(key ...driver.Value) (rows int64, err error) {
	err = t.del.query(func(vals []driver.Value) error {
		size, _ := vals[0].(int64)
		t.totals.Rows--
		t.totals.Bytes -= size
		rows++
		return nil
	}, key...)
	return rows, err
}

// put inserts a row that keeps so many bytes.
func (t *cacheTable) put(size int64, args ...driver.Value) error {
	if _, err := t.insert.exec(args...); err != nil {
		return err
	}
	t.totals.Rows++
	t.totals.Bytes += size
	return nil
}

// restore sets what the table had before what was rolled back. It is counted anew
// before the next commit all the same: of a commit that failed it is not certain
// what became of it.
func (t *cacheTable) restore(s cacheState) {
	t.cacheState = s
	t.uncounted = true
}

// bound is called before each commit. It keeps the table to its bounds, and returns
// how many rows this transaction deleted for the sake of bounds. The totals are kept,
// so a full table is only counted when it has to be cut, and then a sixteenth of the
// bound more goes than has to.
func (t *cacheTable) bound() (pruned int64, err error) {
	if t.uncounted || t.totals.Rows > t.maxRows || t.totals.Bytes > t.maxBytes {
		if err := t.recount(); err != nil {
			return 0, err
		}
		over := CacheTotals{t.totals.Rows - t.maxRows, t.totals.Bytes - t.maxBytes}
		if over.Rows > 0 {
			over.Rows += t.maxRows / 16
		}
		if over.Bytes > 0 {
			over.Bytes += t.maxBytes / 16
		}
		if over.Rows > 0 || over.Bytes > 0 {
			if _, err := t.prune(over); err != nil {
				return 0, err
			}
		}
	}
	pruned, t.pruned = t.pruned, 0
	return pruned, nil
}

// yield makes room for something else in the file: so many bytes and a sixteenth of
// the bound more, so that this is not done for each row. It returns how many rows
// are gone.
func (t *cacheTable) yield(bytes int64) (int64, error) {
	if t.totals.Rows == 0 {
		return 0, nil
	}
	return t.prune(CacheTotals{Bytes: bytes + t.maxBytes/16})
}

// prune deletes the oldest rows, at least as many and with at least as many bytes
// as least says, or all that there are.
func (t *cacheTable) prune(least CacheTotals) (int64, error) {
	var gone CacheTotals
	var last int64
	err := t.oldest.query(func(vals []driver.Value) error {
		if gone.Rows >= least.Rows && gone.Bytes >= least.Bytes {
			return errStop
		}
		last, _ = vals[0].(int64) // a rowid is never anything else
		size, _ := vals[1].(int64)
		gone.Rows++
		gone.Bytes += max(size, 0)
		return nil
	})
	if err != nil && !errors.Is(err, errStop) {
		return 0, err
	}
	if gone.Rows == 0 {
		return 0, nil
	}
	if _, err := t.cut.exec(last); err != nil {
		return 0, err
	}
	t.totals.Rows -= gone.Rows
	t.totals.Bytes -= gone.Bytes
	t.pruned += gone.Rows
	return gone.Rows, nil
}

// notOurRow is of a row that this package cannot have written.
func notOurRow(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// leftOut counts rows of a table that cannot be ours and tells the log of the
// first, the second, the fourth and so on: a damaged row may be read often.
func (s *Store) leftOut(table string, rows int64, last error) {
	n := s.damaged.Add(rows)
	if bits.Len64(uint64(n)) != bits.Len64(uint64(n-rows)) {
		s.opt.Logger.Warn("rows of a cache left out", "table", table, "rows so far", n, "last", last)
	}
}

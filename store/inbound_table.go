package store

import (
	"database/sql/driver"
	"errors"
	"fmt"
)

// InboundTotals are the totals of the transactions of other servers. Bytes are those
// of their answers and of what is kept of their PDUs.
type InboundTotals struct {
	CacheTotals
	PDUs int64
}

// over tells whether t is above one of the bounds.
func (t *InboundTotals) over(bounds *InboundTotals) bool {
	return t.Rows > bounds.Rows || t.Bytes > bounds.Bytes || t.PDUs > bounds.PDUs
}

// inboundGen: rows of which the ids are the same without so many bits are one
// generation. See schema.go.
const inboundGen = 12

// What a row takes in the file besides what is kept in it, and an entry of a PDU, with
// what lies idle on pages.
const (
	inboundRowBytes   = 100
	inboundEntryBytes = 32
)

// inboundSlack is by how much the oldest row must be too old before those that are go,
// so that some go together.
const inboundSlack = InboundFor / 16

// inboundTable is the writer's side of the tables. Rows are in the order in which they
// were written, and go from the front.
type inboundTable struct {
	inboundState
	outbox    *outbox // knows how large the file is
	bounds    InboundTotals
	uncounted bool // the totals may be wrong

	find, insert, insertPDU *stmt
	del, delPDUs            *stmt
	count, oldest           *stmt
	cut, cutPDUs            *stmt

	list pduList // both reused
	keys []inboundKey
}

// inboundState is what a rollback takes back.
type inboundState struct {
	totals InboundTotals
	left   int64 // transactions that were not stored, since Open
	pruned int64 // rows deleted in this transaction to keep to bounds
	last   int64 // the id of the last row written in this transaction, 0 if none was
	newest int64 // when the newest of these was answered, or 0
}

func newInboundTable(c *conn, o *outbox) (*inboundTable, error) {
	t := &inboundTable{outbox: o, bounds: InboundTotals{CacheTotals{int64(o.opt.MaxInbound), o.opt.MaxInboundBytes}, int64(o.opt.MaxInboundPDUs)}}
	for _, p := range t.queries() {
		s, err := c.prepare(p.query)
		if err != nil {
			return nil, err
		}
		*p.dst = s
	}
	return t, t.recount()
}

// queries are the statements of the writer, and how SQLite is to run them.
func (t *inboundTable) queries() []struct {
	dst   **stmt
	query string
	plan  []string
} {
	const (
		front   = "SEARCH inbound USING INTEGER PRIMARY KEY (rowid<?)"
		entries = "SEARCH inbound_pdu USING PRIMARY KEY "
	)
	return []struct {
		dst   **stmt
		query string
		plan  []string
	}{
		{&t.find, inboundGens + "SELECT t.id, t.size, t.pdus " + findInbound, inboundPlan("SEARCH t USING INDEX inbound_find (<expr>=? AND hash=?)")},
		// An empty slice reaches SQLite as NULL.
		{&t.insert, `INSERT INTO inbound (hash, key, size, pdus, answered, list, answer, sum)
			VALUES (?1, ?2, ?3, ?4, ?5, coalesce(?6, x''), coalesce(?7, x''), ?8) RETURNING id`, nil},
		{&t.insertPDU, fmt.Sprintf("INSERT OR IGNORE INTO inbound_pdu VALUES (?1 >> %d, ?2, ?1)", inboundGen), nil},
		{&t.del, "DELETE FROM inbound WHERE id = ?1", []string{"SEARCH inbound USING INTEGER PRIMARY KEY (rowid=?)"}},
		// These read what there is of a generation.
		{&t.delPDUs, fmt.Sprintf("DELETE FROM inbound_pdu WHERE gen = ?1 >> %d AND txn = ?1", inboundGen), []string{entries + "(gen=?)"}},
		{&t.cutPDUs, fmt.Sprintf("DELETE FROM inbound_pdu WHERE gen <= ?1 >> %d AND txn <= ?1", inboundGen), []string{entries + "(gen<?)"}},
		// All that it needs is in the index.
		{&t.count, "SELECT count(*), coalesce(sum(size), 0), coalesce(sum(pdus), 0) FROM inbound", []string{"SCAN inbound USING COVERING INDEX inbound_find"}},
		{&t.oldest, "SELECT id, size, pdus, answered FROM inbound ORDER BY id", []string{"SCAN inbound"}}, // in the order of the table, and left early
		{&t.cut, "DELETE FROM inbound WHERE id <= ?1", []string{front}},
	}
}

// inboundPlan is how SQLite runs a look-up through all generations.
func inboundPlan(steps ...string) []string {
	return append([]string{
		"CO-ROUTINE gen", "SETUP", "SEARCH inbound", "RECURSIVE STEP", "SCAN gen", "SCALAR SUBQUERY 2", "SEARCH inbound", "SCAN gen",
	}, steps...)
}

func (t *inboundTable) recount() error {
	err := t.count.query(func(vals []driver.Value) error {
		return scan(vals, &t.totals.Rows, &t.totals.Bytes, &t.totals.PDUs)
	})
	t.uncounted = err != nil
	return err
}

// put writes one transaction, in place of what is there under its name, and makes no
// row at all of what is over the bounds of one or finds no room.
func (t *inboundTable) put(x *InboundTxn) (int64, error) {
	if err := x.check(); err != nil {
		return 0, err
	}
	key := newInboundKey(x.Origin, x.ID)
	rows, err := t.forget(&key)
	if err != nil {
		return 0, err
	}
	t.list, t.keys = x.appendPDUs(t.list[:0], t.keys[:0])
	one := InboundTotals{CacheTotals{1, int64(len(x.Answer)) + int64(len(t.list))}, int64(len(t.keys))}
	// What is larger than a bound would push out all others, and then go itself.
	fits := len(x.Answer) <= MaxInboundAnswer && !one.over(&t.bounds)
	if fits {
		fits, err = t.outbox.fits(one.Bytes + inboundRowBytes + one.PDUs*inboundEntryBytes)
	}
	if !fits || err != nil {
		t.left++
		return rows, err
	}
	if err := t.insert.query(func(vals []driver.Value) error { return scan(vals, &t.last) },
		key.hash(), key[:], one.Bytes, one.PDUs, x.Answered, []byte(t.list), x.Answer, x.Sum); err != nil {
		return 0, err
	}
	for i := range t.keys {
		if _, err := t.insertPDU.exec(t.last, t.keys[i].hash()); err != nil {
			return 0, err
		}
	}
	t.totals.add(one, 1)
	t.newest = max(t.newest, x.Answered)
	return 1, nil
}

func (t *InboundTotals) add(o InboundTotals, sign int64) {
	t.Rows += sign * o.Rows
	t.Bytes += sign * o.Bytes
	t.PDUs += sign * o.PDUs
}

// forget deletes what is stored of a transaction. Numbers that are damaged make the
// totals wrong, which is no reason to fail, as in cacheTable.
func (t *inboundTable) forget(key *inboundKey) (rows int64, err error) {
	var ids []int64 // not more than one
	if err := t.find.query(func(vals []driver.Value) error {
		ids = append(ids, number(vals[0]))
		t.totals.add(InboundTotals{CacheTotals{1, number(vals[1])}, number(vals[2])}, -1)
		return nil
	}, key.hash(), key[:]); err != nil {
		return 0, err
	}
	for _, id := range ids {
		if _, err := t.delPDUs.exec(id); err != nil {
			return 0, err
		}
		if _, err := t.del.exec(id); err != nil {
			return 0, err
		}
		rows++
	}
	return rows, nil
}

// number is a value that is a number unless the file is damaged.
func number(v driver.Value) int64 {
	n, _ := v.(int64)
	return n
}

// restore sets what the table had before what was rolled back. See cacheTable.restore.
func (t *inboundTable) restore(s inboundState) {
	t.inboundState = s
	t.uncounted = true
}

// bound is called before each commit and returns how many rows this transaction
// deleted for the sake of bounds. See cacheTable.bound.
func (t *inboundTable) bound() (pruned int64, err error) {
	if t.last > 0 {
		if err := t.expire(); err != nil {
			return 0, err
		}
	}
	if t.uncounted || t.totals.over(&t.bounds) {
		if err := t.recount(); err != nil {
			return 0, err
		}
		if t.totals.over(&t.bounds) {
			if err := t.prune(t.excess()); err != nil {
				return 0, err
			}
		}
	}
	pruned, t.pruned, t.last, t.newest = t.pruned, 0, 0, 0
	return pruned, nil
}

// excess is what is to go: of what is above its bound a sixteenth of that more than
// has to.
func (t *inboundTable) excess() (over InboundTotals) {
	for _, b := range []struct {
		over         *int64
		total, bound int64
	}{
		{&over.Rows, t.totals.Rows, t.bounds.Rows},
		{&over.Bytes, t.totals.Bytes, t.bounds.Bytes},
		{&over.PDUs, t.totals.PDUs, t.bounds.PDUs},
	} {
		if b.total > b.bound {
			*b.over = b.total - b.bound + b.bound/16
		}
	}
	return over
}

// expire deletes rows that were answered too long before the newest of this
// transaction, at most maxTrim. That one decides and not the newest of all, so that
// after a moment with a wrong clock things are as before.
//
// Ids are used up by what is written over others, too, and a look-up takes the longer
// the more generations there are: so rows also go when twice as many ids as there may
// be rows came after them.
func (t *inboundTable) expire() error {
	limit := t.newest - InboundFor.Milliseconds()
	return t.cutWhile(func(id, answered int64, gone *InboundTotals) bool {
		far := (t.last-id)/2 >= t.bounds.Rows
		if gone.Rows == 0 && answered >= limit-inboundSlack.Milliseconds() && !far {
			return false
		}
		return gone.Rows < maxTrim && (answered < limit || far)
	})
}

// yield makes room for something else in the file, see cacheTable.yield.
func (t *inboundTable) yield(bytes int64) (int64, error) {
	before := t.pruned
	if t.totals.Rows == 0 {
		return 0, nil
	}
	err := t.prune(InboundTotals{CacheTotals: CacheTotals{Bytes: bytes + t.bounds.Bytes/16}})
	return t.pruned - before, err
}

// prune deletes the oldest rows, at least what least says, or all that there are.
func (t *inboundTable) prune(least InboundTotals) error {
	return t.cutWhile(func(_, _ int64, gone *InboundTotals) bool { return least.over(gone) })
}

// cutWhile deletes rows from the front for as long as goes says so. It is told what
// goes already.
func (t *inboundTable) cutWhile(goes func(id, answered int64, gone *InboundTotals) bool) error {
	var gone InboundTotals
	var last int64
	err := t.oldest.query(func(vals []driver.Value) error {
		id := number(vals[0])
		if !goes(id, number(vals[3]), &gone) {
			return errStop
		}
		last = id
		gone.add(InboundTotals{CacheTotals{1, max(number(vals[1]), 0)}, max(number(vals[2]), 0)}, 1)
		return nil
	})
	if err != nil && !errors.Is(err, errStop) {
		return err
	}
	if gone.Rows == 0 {
		return nil
	}
	if _, err := t.cutPDUs.exec(last); err != nil {
		return err
	}
	if _, err := t.cut.exec(last); err != nil {
		return err
	}
	t.totals.add(gone, -1)
	t.pruned += gone.Rows
	return nil
}

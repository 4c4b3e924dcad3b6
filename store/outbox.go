package store

import (
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"fsbus/bus/matrix"
)

// OutboxOp is one of Accept, Pack, Settle, Compact, Expire, Hold, Drop and
// ForgetAside, by pointer: what to do, and then what came of it.
//
// Times are wall-clock milliseconds of the caller. The store compares them with
// one another and with lifetimes, never with a clock.
type OutboxOp interface {
	// String says what is to be done and for whom, for errors.
	fmt.Stringer
	// size is about how many bytes of memory the operation holds, or loads to
	// write them.
	size() int64
	// apply does it inside the open transaction, sets the Result, and returns
	// how many rows changed. It may be called again after a rollback.
	apply(*outbox) (int64, error)
}

// MaxTxnID is how many bytes the id of a transaction may have.
const MaxTxnID = 255

// KindTotal counts items, and the bytes of their payloads.
type KindTotal struct{ Items, Bytes int64 }

// KindTotals has the totals of each kind; element 0 is not used.
type KindTotals [matrix.NumKinds + 1]KindTotal

// Sum returns the totals of all kinds.
func (k KindTotals) Sum() (sum KindTotal) {
	for _, t := range k {
		sum.Items += t.Items
		sum.Bytes += t.Bytes
	}
	return sum
}

func (k *KindTotals) add(kind matrix.Kind, items, bytes int64) {
	k[kind].Items += items
	k[kind].Bytes += bytes
}

// lane counts the items of one lane.
func (k KindTotals) lane(l matrix.Lane) (items int64) {
	for kind, t := range k {
		if matrix.Kind(kind).Lane() == l {
			items += t.Items
		}
	}
	return items
}

// appendTo writes k as pairs of varints, for the column dest.kinds.
func (k KindTotals) appendTo(b []byte) []byte {
	for _, t := range k[1:] {
		b = binary.AppendUvarint(b, uint64(t.Items))
		b = binary.AppendUvarint(b, uint64(t.Bytes))
	}
	return b
}

// parse reads what appendTo wrote, perhaps when there were fewer kinds.
func (k *KindTotals) parse(b []byte) error {
	for i := 1; len(b) > 0; i++ {
		items, n := binary.Uvarint(b)
		bytes, m := binary.Uvarint(b[max(n, 0):])
		if n <= 0 || m <= 0 || i >= len(k) {
			return fmt.Errorf("%w: totals of kinds", ErrDamagedRow)
		}
		k[i] = KindTotal{int64(items), int64(bytes)}
		b = b[n+m:]
	}
	return nil
}

// OutboxTotals are the totals of all destinations.
type OutboxTotals struct {
	Destinations int64 // rows of destinations, with something pending or not
	Items        int64 // pending
	Aside        int64 // set aside
	AsideBytes   int64
}

// Destination is what the outbox holds for a server.
type Destination struct {
	Name matrix.ServerName
	// TxnID is the id of the homeserver's last accepted transaction.
	TxnID string
	// Kinds has what is pending, frozen items included.
	Kinds KindTotals
	// Oldest is when the oldest of it was accepted, 0 if there is none. It is
	// the earliest of those at the front of each lane, and so exact as long as
	// the clock did not go back.
	Oldest int64
	// Frozen says that there is a batch that was packed and is not settled, or
	// half of one that was refused.
	Frozen bool
	// Held is what Hold set. The store does not act on it.
	Held bool
}

// dest is a row of the table, as the writer works on it.
type dest struct {
	Destination
	id      int64
	touched int64
	parts   []part // of the frozen batch, to be tried one after the other
	items   int64  // as stored
	// uncounted says that the totals may not be those of the items, so that save has
	// to count them.
	uncounted bool
}

// part is a batch, or what is left of one: of each lane the items between two
// numbers. Nothing that is frozen changes, so these, its time and its size make
// the same transaction again.
//
// Since a batch takes the items at the front of each lane, and numbers grow, an
// item is frozen if its number is not greater than the last one of its lane in
// any part.
type part struct {
	ID    string         `json:"id,omitempty"` // none: to be tried under a new one
	At    int64          `json:"at,omitempty"` // when it was packed
	Max   int            `json:"max,omitempty"`
	Spans []span         `json:"spans"`
	Kinds []partialTotal `json:"kinds"`
	// Refused says that it was part of a batch that the destination has seen and
	// refused.
	Refused bool `json:"refused,omitempty"`
}

// span is the items of a lane with the numbers from First to Last.
type span struct {
	Lane  matrix.Lane `json:"lane"`
	First int64       `json:"first"`
	Last  int64       `json:"last"`
}

type partialTotal struct {
	Kind  matrix.Kind `json:"kind"`
	Items int64       `json:"items"`
	Bytes int64       `json:"bytes"`
}

// add puts an item at the end of p.
func (p *part) add(it *queued) {
	if n := len(p.Spans); n > 0 && p.Spans[n-1].Lane == it.lane {
		p.Spans[n-1].Last = it.seq
	} else {
		p.Spans = append(p.Spans, span{it.lane, it.seq, it.seq})
	}
	for i := range p.Kinds {
		if t := &p.Kinds[i]; t.Kind == it.kind {
			t.Items++
			t.Bytes += it.size
			return
		}
	}
	p.Kinds = append(p.Kinds, partialTotal{it.kind, 1, it.size})
}

// totals returns p's items by kind.
func (p *part) totals() (k KindTotals) {
	for _, t := range p.Kinds {
		k.add(t.Kind, t.Items, t.Bytes)
	}
	return k
}

// frozen returns the number up to which the items of a lane are frozen.
func (d *dest) frozen(l matrix.Lane) (last int64) {
	for _, p := range d.parts {
		for _, s := range p.Spans {
			if s.Lane == l {
				last = max(last, s.Last)
			}
		}
	}
	return last
}

const destColumns = "id, name, txn, touched, items, oldest, held, kinds, frozen"

func scanDest(vals []driver.Value) (*dest, error) {
	d := new(dest)
	var name, frozen string
	var held int64
	var kinds []byte
	if err := scan(vals, &d.id, &name, &d.TxnID, &d.touched, &d.items, &d.Oldest, &held, &kinds, &frozen); err != nil {
		return nil, err
	}
	d.Name, d.Held = matrix.ServerName(name), held != 0
	if err := d.Kinds.parse(kinds); err != nil {
		return nil, fmt.Errorf("destination %q: %w", name, err)
	}
	if frozen != "" {
		if err := json.Unmarshal([]byte(frozen), &d.parts); err != nil {
			return nil, fmt.Errorf("destination %q: %w: frozen batch: %w", name, ErrDamagedRow, err)
		}
		for i := range d.parts {
			for _, t := range d.parts[i].Kinds {
				if t.Kind.Lane() == 0 {
					return nil, fmt.Errorf("destination %q: %w: kind %d in the frozen batch", name, ErrDamagedRow, t.Kind)
				}
			}
		}
	}
	d.Frozen = len(d.parts) > 0
	return d, nil
}

// outbox is the writer's side of the tables.
type outbox struct {
	conn *conn
	opt  *Options

	find, create, update, idle                      *stmt // dest
	insert, unique, insertBody, remove, removeSpan  *stmt // item
	same, group, rows, fronts, recount, pdus, dests *stmt
	putAside, cutAside, forgetAside                 *stmt
	oneAside, asideOf                               *stmt
	pages, free                                     *stmt

	totals OutboxTotals
	// seq is the last number given to an item. The numbers of items and bodies
	// that are there are not above the touched of some destination.
	seq   int64
	used  int64 // bytes in use in the file when it was last looked at
	grown int64 // about what was added since
	kinds []byte
	// scratch is for the items that an Accept loads, and refers to nothing otherwise.
	scratch []matrix.Item
	// yield makes room for so many bytes in the file where it can, and returns how
	// many rows that cost, 0 if there is nothing to give up.
	yield func(bytes int64) (int64, error)
}

// itemBytes is what a row of an item takes in the file besides its payload,
// with its entry in the index and what lies idle on pages.
const itemBytes = 200

const (
	// seq is compared last: within a destination, a lane, and in its order. The
	// plus signs: SQLite plans anew whenever a value that stands alone changes
	// to or from 0 or 1, and the first destination and lane are 1.
	rowsQuery = `SELECT i.lane, i.seq, i.kind, i.accepted, i.lifetime, i.size, i.key, coalesce(i.bytes, b.bytes)
		FROM item i LEFT JOIN payload p ON p.hash = i.hash LEFT JOIN body b ON b.id = p.body `
	insertQuery = "INSERT INTO item (dest, lane, seq, kind, accepted, lifetime, depth, size, key, hash, bytes) "
)

// outboxQueries are those of the writer.
func (o *outbox) queries() []struct {
	dst   **stmt
	query string
} {
	return []struct {
		dst   **stmt
		query string
	}{
		{&o.find, "SELECT " + destColumns + " FROM dest WHERE name = ?1"},
		{&o.create, "INSERT INTO dest (name, txn, touched, items, oldest, held, kinds, frozen) VALUES (?1, '', ?2, 0, 0, 0, x'', '')"},
		{&o.update, "UPDATE dest SET txn = ?2, touched = ?3, items = ?4, oldest = ?5, held = ?6, kinds = ?7, frozen = ?8 WHERE id = ?1"},
		{&o.idle, "DELETE FROM dest WHERE id IN (SELECT id FROM dest WHERE items = 0 AND held = 0 ORDER BY touched LIMIT ?1)"},
		{&o.dests, "SELECT " + destColumns + " FROM dest WHERE id > ?1 AND items > 0 ORDER BY id LIMIT ?2"},

		{&o.insert, insertQuery + "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)"},
		{&o.unique, insertQuery + `SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11
			WHERE NOT EXISTS (SELECT 1 FROM item WHERE dest = +?1 AND kind = +?4 AND key = ?9)`},
		{&o.insertBody, "INSERT INTO body SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM payload WHERE hash = ?3 AND body = ?1)"},
		{&o.remove, "DELETE FROM item WHERE dest = +?1 AND lane = +?2 AND seq = ?3"},
		{&o.removeSpan, "DELETE FROM item WHERE dest = +?1 AND lane = +?2 AND seq BETWEEN ?3 AND ?4"},

		{&o.same, rowsQuery + "WHERE i.dest = +?1 AND i.kind = +?2 AND i.key = ?3 AND i.lane = +?4 AND i.seq > ?5 ORDER BY i.seq DESC LIMIT 1"},
		{&o.group, rowsQuery + "WHERE i.dest = +?1 AND i.kind = +?2 AND i.key BETWEEN ?3 AND ?4 AND i.seq > ?5 LIMIT ?6"},
		{&o.rows, rowsQuery + "WHERE i.dest = +?1 AND i.lane = +?2 AND i.seq BETWEEN ?3 AND ?4 ORDER BY i.seq LIMIT ?5"},
		{&o.fronts, "SELECT accepted FROM item WHERE dest = +?1 AND lane = +?2 ORDER BY seq LIMIT 1"},
		{&o.recount, "SELECT lane, kind, count(*), sum(CAST(size AS INTEGER)) FROM item WHERE dest = +?1 GROUP BY kind, lane"},
		{&o.pdus, "SELECT seq, depth, size, key FROM item WHERE dest = +?1 AND lane = +?2 AND seq > ?3 ORDER BY seq"},

		{&o.putAside, "INSERT INTO aside (dest, kind, accepted, at, reason, size, bytes) VALUES (?1, ?2, ?3, ?4, ?5, ?6, coalesce(?7, x''))"}, // an empty slice reaches SQLite as NULL
		{&o.cutAside, "DELETE FROM aside WHERE id IN (SELECT id FROM aside ORDER BY id LIMIT 1) RETURNING size"},
		{&o.forgetAside, "DELETE FROM aside WHERE id <= ?1 RETURNING size"},
		{&o.oneAside, "DELETE FROM aside WHERE id = ?1 RETURNING size"},
		{&o.asideOf, "SELECT id, kind, accepted, bytes FROM aside WHERE dest = ?1 AND id BETWEEN ?2 AND ?3 AND at <= ?4 AND at - accepted < ?5 ORDER BY id"},

		{&o.pages, "PRAGMA page_count"},
		{&o.free, "PRAGMA freelist_count"},
	}
}

func newOutbox(ctx context.Context, c *conn, opt *Options) (*outbox, error) {
	o := &outbox{conn: c, opt: opt, used: opt.MaxFileBytes} // to be looked at
	for _, p := range o.queries() {
		s, err := c.prepare(p.query)
		if err != nil {
			return nil, err
		}
		*p.dst = s
	}
	t := &o.totals
	err := c.query(ctx, "SELECT count(*), coalesce(sum(items), 0), coalesce(max(touched), 0) FROM dest", nil,
		func(vals []driver.Value) error { return scan(vals, &t.Destinations, &t.Items, &o.seq) })
	if err != nil {
		return nil, err
	}
	err = c.query(ctx, "SELECT count(*), coalesce(sum(size), 0) FROM aside", nil,
		func(vals []driver.Value) error { return scan(vals, &t.Aside, &t.AsideBytes) })
	if err != nil {
		return nil, err
	}
	return o, nil
}

// dest returns the row of a destination, nil if there is none.
func (o *outbox) dest(name matrix.ServerName) (d *dest, err error) {
	err = o.find.query(func(vals []driver.Value) error {
		d, err = scanDest(vals)
		return err
	}, string(name))
	return d, err
}

// newDest returns the row of a destination, a new one if there is none. For that
// it may have to forget some of which nothing is pending.
func (o *outbox) newDest(name matrix.ServerName) (*dest, error) {
	d, err := o.dest(name)
	if d != nil || err != nil {
		return d, err
	}
	if _, err := matrix.ParseServerName(string(name)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if limit := int64(o.opt.MaxDestinations); o.totals.Destinations >= limit {
		// A sixteenth beyond, so that this is not done for each new one.
		n, err := o.idle.exec(o.totals.Destinations - limit + 1 + limit/16)
		if err != nil {
			return nil, err
		}
		if o.totals.Destinations -= n; o.totals.Destinations >= limit {
			return nil, fmt.Errorf("%w: %d destinations", ErrOutboxFull, o.totals.Destinations)
		}
	}
	o.seq++
	if _, err := o.create.exec(string(name), o.seq); err != nil {
		return nil, err
	}
	o.totals.Destinations++
	return o.dest(name)
}

// save writes d back.
func (o *outbox) save(d *dest) error {
	if d.uncounted {
		if err := o.count(d); err != nil {
			return err
		}
		if err := o.findOldest(d); err != nil {
			return err
		}
		d.uncounted = false
	}
	frozen := ""
	if len(d.parts) > 0 {
		b, err := json.Marshal(d.parts)
		if err != nil {
			panic(fmt.Sprintf("store: marshal %+v: %v", d.parts, err))
		}
		frozen = string(b)
	}
	items := d.Kinds.Sum().Items
	if items == 0 {
		d.Oldest = 0
	}
	o.totals.Items += items - d.items
	d.items = items
	d.Frozen = len(d.parts) > 0
	held := int64(0)
	if d.Held {
		held = 1
	}
	o.kinds = d.Kinds.appendTo(o.kinds[:0])
	_, err := o.update.exec(d.id, d.TxnID, o.seq, items, d.Oldest, held, o.kinds, frozen)
	return err
}

// findOldest sets d.Oldest after items were deleted.
func (o *outbox) findOldest(d *dest) error {
	d.Oldest = 0
	for l := matrix.Lane(1); l <= matrix.NumLanes; l++ {
		if d.Kinds.lane(l) == 0 {
			continue
		}
		err := o.fronts.query(func(vals []driver.Value) error {
			if accepted, ok := vals[0].(int64); ok { // else Pack sets it aside
				d.older(accepted)
			}
			return nil
		}, d.id, int64(l))
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *dest) older(accepted int64) {
	if d.Oldest == 0 || accepted < d.Oldest {
		d.Oldest = accepted
	}
}

// count sets the totals of d from its items. Those that are damaged count as well:
// else a lane that has nothing but them would never be looked at.
func (o *outbox) count(d *dest) error {
	d.Kinds = KindTotals{}
	return o.recount.query(func(vals []driver.Value) error {
		if l, ok := laneOf(number(vals[0])); ok {
			d.Kinds.add(kindIn(l, number(vals[1])), number(vals[2]), number(vals[3]))
		}
		return nil
	}, d.id)
}

func kindOf(n int64) (matrix.Kind, error) {
	if n < 1 || n > matrix.NumKinds {
		return 0, fmt.Errorf("%w: kind %d", ErrDamagedRow, n)
	}
	return matrix.Kind(n), nil
}

// kindIn returns the kind with the number n, or if that is not of the lane, the first
// one that is: an item counts as that if its own kind is damaged.
func kindIn(l matrix.Lane, n int64) matrix.Kind {
	if k, err := kindOf(n); err == nil && k.Lane() == l {
		return k
	}
	k := matrix.Kind(1)
	for k.Lane() != l {
		k++
	}
	return k
}

func laneOf(n int64) (l matrix.Lane, ok bool) {
	return matrix.Lane(n), n >= 1 && n <= matrix.NumLanes
}

// room makes sure that about so many bytes may be added to the file, if need be by
// giving up what can be had again.
func (o *outbox) room(bytes int64) error {
	for {
		fits, err := o.fits(bytes)
		if fits || err != nil {
			return err
		}
		gone, err := o.yield(o.used + bytes - o.opt.MaxFileBytes)
		if err != nil {
			return err
		}
		if gone == 0 {
			return fmt.Errorf("%w: %d bytes in the file", ErrOutboxFull, o.used)
		}
	}
}

// fits tells whether about so many bytes may be added to the file, and if so counts
// them as added.
func (o *outbox) fits(bytes int64) (bool, error) {
	// Twice: of rows that are a little larger than half a page, each takes a page.
	if o.used+2*(o.grown+bytes) > o.opt.MaxFileBytes {
		pages, err := o.pragma(o.pages)
		if err != nil {
			return false, err
		}
		free, err := o.pragma(o.free)
		if err != nil {
			return false, err
		}
		o.used, o.grown = (pages-free)*pageSize, 0
		if o.used+bytes > o.opt.MaxFileBytes {
			return false, nil
		}
	}
	o.grown += bytes
	return true, nil
}

func (o *outbox) pragma(s *stmt) (n int64, err error) {
	err = s.query(func(vals []driver.Value) error { return scan(vals, &n) })
	return n, err
}

// queued is a row of the table of items.
type queued struct {
	lane     matrix.Lane
	seq      int64
	kind     matrix.Kind
	accepted int64
	lifetime int64
	size     int64
	key      []byte // nil if there is none
	payload  []byte
	damage   damage
}

// damage is what of an item cannot be as it was written, in the words for
// Aside.Reason. It is empty if all can.
type damage string

const (
	// damagedPayload: queued.payload is nil, which no rule of merging takes for an
	// item. All else can be relied on.
	damagedPayload damage = "its payload is damaged"
	// damagedRow: only queued.lane and queued.seq can be relied on.
	damagedRow damage = "its row is damaged"
)

// err is nil for an item that is not damaged.
func (it *queued) err() error {
	if it.damage == "" {
		return nil
	}
	return fmt.Errorf("%w: item %d: %s", ErrDamagedRow, it.seq, it.damage)
}

func (it *queued) expired(now int64) bool {
	return it.lifetime > 0 && now-it.accepted > it.lifetime && it.damage != damagedRow
}

// scanItem reads the result of a rowsQuery. What is damaged of an item is no error but
// noted in it, if the row can be found again: so the item can be set aside.
func scanItem(vals []driver.Value) (it queued, err error) {
	var lane int64
	if err := scan(vals[:2], &lane, &it.seq); err != nil {
		return it, err
	}
	var ok bool
	if it.lane, ok = laneOf(lane); !ok {
		return it, fmt.Errorf("%w: item %d: lane %d", ErrDamagedRow, it.seq, lane)
	}
	if scan(vals[7:], &it.payload) != nil {
		it.damage = damagedPayload
	}
	read := func(i int, dst any) {
		if scan(vals[i:i+1], dst) != nil {
			it.damage = damagedRow
		}
	}
	var kind int64
	read(2, &kind)
	read(3, &it.accepted)
	read(4, &it.lifetime)
	read(5, &it.size)
	if vals[6] != nil {
		read(6, &it.key)
	}
	if it.kind = kindIn(it.lane, kind); int64(it.kind) != kind {
		it.damage = damagedRow
	}
	return it, nil
}

// errStop ends a query early.
var errStop = errors.New("stop")

// each calls f for the items of a lane with numbers from first to last, in
// order, until it returns errStop or another error. f must not change items. Damaged
// ones are among them.
func (o *outbox) each(d *dest, l matrix.Lane, first, last int64, f func(*queued) error) error {
	err := o.rows.query(func(vals []driver.Value) error {
		it, err := scanItem(vals)
		if err != nil {
			return err
		}
		return f(&it)
	}, d.id, int64(l), first, last, int64(-1))
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// inlineBytes is up to what size a payload lies in its item. Most typing,
// presence and receipts are below; a reference would take a fifth of that and
// cost two more rows.
const inlineBytes = 256

const (
	// hashBytes is the length of the hash that names a payload, a part of
	// SHA-256: of 128 bits nobody finds two alike, least of all when one of our
	// signatures or random ids is in each.
	hashBytes = 16
	// groupBytes is the length of the hash of a group. What two groups with one
	// hash would share are the rules of their own users' rooms and devices.
	groupBytes = 8
)

func payloadHash(payload []byte) []byte {
	h := sha256.Sum256(payload)
	return h[:hashBytes:hashBytes]
}

// itemKey is what is stored of an item's key: hashes of its group and of the key
// itself, so that all items of a group are one range. It is nil without a key.
func itemKey(it *matrix.Item) []byte {
	if it.Key == "" {
		return nil
	}
	key := make([]byte, groupBytes, groupBytes+hashBytes)
	if it.Group != "" {
		h := sha256.Sum256([]byte(it.Group))
		copy(key, h[:])
	}
	h := sha256.Sum256([]byte(it.Key))
	return append(key, h[:hashBytes]...)
}

// put stores a new item, under a new number, unless it only copies one that is
// there.
func (o *outbox) put(d *dest, it *matrix.Item, key []byte, accepted int64) (stored bool, err error) {
	insert := o.insert
	if key != nil && it.Kind.Merge() == matrix.MergeKeep {
		insert = o.unique
	}
	lane := it.Kind.Lane()
	o.seq++
	var keyVal, hash, inline driver.Value
	if key != nil {
		keyVal = key
	}
	if len(it.Payload) <= inlineBytes {
		inline = it.Payload
	} else {
		hash = payloadHash(it.Payload)
	}
	n, err := insert.exec(d.id, int64(lane), o.seq, int64(it.Kind), accepted, it.Lifetime.Milliseconds(), it.Depth,
		int64(len(it.Payload)), keyVal, hash, inline)
	if n == 0 || err != nil {
		return false, err
	}
	if hash != nil {
		if _, err := o.insertBody.exec(o.seq, it.Payload, hash); err != nil {
			return false, err
		}
	}
	if d.Kinds.lane(lane) == 0 {
		d.older(accepted)
	}
	d.Kinds.add(it.Kind, 1, int64(len(it.Payload)))
	return true, nil
}

// rewrite changes the payload of an item in its place. It then lies in the item,
// whatever its size: nobody else has the same.
func (o *outbox) rewrite(d *dest, it *queued, payload []byte) error {
	if _, err := o.remove.exec(d.id, int64(it.lane), it.seq); err != nil {
		return err
	}
	_, err := o.insert.exec(d.id, int64(it.lane), it.seq, int64(it.kind), it.accepted, it.lifetime, int64(0),
		int64(len(payload)), it.key, nil, payload)
	d.Kinds.add(it.kind, 0, int64(len(payload))-it.size)
	return err
}

// drop deletes an item.
func (o *outbox) drop(d *dest, it *queued) error {
	_, err := o.remove.exec(d.id, int64(it.lane), it.seq)
	d.Kinds.add(it.kind, -1, -it.size)
	d.uncounted = d.uncounted || it.damage == damagedRow
	return err
}

package store

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"fsbus/bus/matrix"
)

// model is the outbox as plain lists, with nothing shared and nothing stored.
type model map[matrix.ServerName]*modelDest

type modelDest struct {
	txn   string
	lanes [matrix.NumLanes + 1][]*modelItem
	parts []modelPart
	held  bool
	aside int
}

type modelItem struct {
	matrix.Item
	accepted int64
	frozen   bool
}

type modelPart struct {
	id    string
	at    int64
	items []*modelItem
	half  bool // of a refused batch
}

func (m model) dest(name matrix.ServerName) *modelDest {
	if m[name] == nil {
		m[name] = new(modelDest)
	}
	return m[name]
}

func (d *modelDest) remove(gone func(*modelItem) bool) (k KindTotals) {
	for l := range d.lanes {
		d.lanes[l] = slices.DeleteFunc(d.lanes[l], func(it *modelItem) bool {
			if !gone(it) {
				return false
			}
			k.add(it.Kind, 1, int64(len(it.Payload)))
			return true
		})
	}
	return k
}

// accept follows the words of matrix.Merge.
func (d *modelDest) accept(a *Accept) (r AcceptResult) {
	if a.TxnID != "" && a.TxnID == d.txn {
		return AcceptResult{Repeated: true}
	}
	d.txn = a.TxnID
	list := a.Items
	if a.Load != nil {
		list, _ = a.Load(nil)
	}
next:
	for _, it := range list {
		r.Kinds.add(it.Kind, 1, int64(len(it.Payload)))
		lane := &d.lanes[it.Kind.Lane()]
		var old *modelItem
		for _, other := range *lane {
			if it.Key == "" || other.Kind != it.Kind || other.Key != it.Key {
				continue
			}
			if it.Kind.Merge() == matrix.MergeKeep {
				r.Duplicates++
				continue next
			}
			if !other.frozen {
				old = other
			}
		}
		if old != nil {
			switch it.Kind.Merge() {
			case matrix.MergeFields:
				merged, err := matrix.MergeSigningKeys(old.Payload, it.Payload)
				if err != nil {
					panic(err)
				}
				it.Payload = merged
			case matrix.MergeChain:
				found := false
				for _, later := range (*lane)[slices.Index(*lane, old)+1:] {
					if later.Kind == it.Kind && later.Group == it.Group {
						if p, refers, _ := matrix.RelinkDeviceList(old.Payload, later.Payload); refers {
							later.Payload, found = p, true
						}
					}
				}
				if p, refers, _ := matrix.RelinkDeviceList(old.Payload, it.Payload); refers {
					it.Payload, found = p, true
				}
				if !found {
					old = nil
				}
			}
		}
		if old != nil {
			*lane = slices.DeleteFunc(*lane, func(it *modelItem) bool { return it == old })
			r.Merged++
		} else {
			r.Accepted++
		}
		*lane = append(*lane, &modelItem{Item: it, accepted: a.Accepted})
	}
	return r
}

func (d *modelDest) pack(p *Pack) (r PackResult) {
	fresh := len(d.parts) == 0
	part := modelPart{}
	if !fresh {
		part = d.parts[0]
	}
	r.Again = part.id != ""
	if !r.Again {
		part.id, part.at = p.NewID, p.Now
	}
	b := matrix.NewBuilder(p.Origin, p.MaxBytes)
	add := func(it *modelItem) bool {
		ok, err := b.Add(it.Kind, it.Payload, part.at-it.accepted)
		if err != nil {
			panic(err)
		}
		return ok
	}
	if fresh {
		r.Expired = d.remove(func(it *modelItem) bool { return it.Expired(it.accepted, p.Now) })
		for _, lane := range d.lanes {
			for _, it := range lane {
				if !add(it) {
					break
				}
				it.frozen = true
				part.items = append(part.items, it)
			}
		}
	} else {
		for _, it := range part.items {
			if !add(it) {
				panic("a frozen item finds no room")
			}
		}
	}
	if b.Empty() {
		return PackResult{Expired: r.Expired}
	}
	if fresh {
		d.parts = []modelPart{part}
	} else {
		d.parts[0] = part
	}
	r.ID, r.At, r.Body = part.id, part.at, b.Finish(part.at)
	return r
}

func (d *modelDest) settle(s *Settle) (r SettleResult) {
	if len(d.parts) == 0 || d.parts[0].id != s.TxnID || s.TxnID == "" {
		return r
	}
	r.Found = true
	if s.Outcome == Thaw {
		if len(d.parts) == 1 && !d.parts[0].half {
			r.Thawed = true
			for _, it := range d.parts[0].items {
				if d.thaw(it) {
					r.Merged++
				}
			}
			d.parts = nil
		}
		return r
	}
	items := d.parts[0].items
	d.parts = d.parts[1:]
	in := func(it *modelItem) bool { return slices.Contains(items, it) }
	switch {
	case s.Outcome == Delivered:
		r.Delivered = d.remove(in)
	case len(items) == 1:
		d.remove(in)
		d.aside++
		r.SetAside = &Aside{Payload: items[0].Payload}
	default:
		half := len(items) / 2
		d.parts = append([]modelPart{{items: items[:half], half: true}, {items: items[half:], half: true}}, d.parts...)
	}
	return r
}

// thaw unfreezes an item and follows the words of matrix.Merge for it and the
// newest one of its key that came since.
func (d *modelDest) thaw(old *modelItem) (gone bool) {
	defer func() { old.frozen = false }()
	lane := &d.lanes[old.Kind.Lane()]
	var newer *modelItem
	for _, it := range *lane {
		if !it.frozen && old.Key != "" && it.Kind == old.Kind && it.Key == old.Key {
			newer = it
		}
	}
	if newer == nil {
		return false
	}
	switch old.Kind.Merge() {
	case matrix.MergeReplace:
		gone = true
	case matrix.MergeFields:
		merged, err := matrix.MergeSigningKeys(old.Payload, newer.Payload)
		if err != nil {
			panic(err)
		}
		newer.Payload, gone = merged, true
	case matrix.MergeChain:
		for _, later := range (*lane)[slices.Index(*lane, old)+1:] {
			if later.Kind == old.Kind && later.Group == old.Group {
				if p, refers, _ := matrix.RelinkDeviceList(old.Payload, later.Payload); refers {
					later.Payload, gone = p, true
				}
			}
		}
	}
	if gone {
		*lane = slices.DeleteFunc(*lane, func(it *modelItem) bool { return it == old })
	}
	return gone
}

// twice returns an item that is in the batch with another of its key, though one
// of the two should have taken the place of the other.
func (p *modelPart) twice() *modelItem {
	seen := map[string]bool{}
	for _, it := range p.items {
		if m := it.Kind.Merge(); it.Key == "" || m != matrix.MergeReplace && m != matrix.MergeFields {
			continue
		}
		k := fmt.Sprint(it.Kind, it.Key)
		if seen[k] {
			return it
		}
		seen[k] = true
	}
	return nil
}

// expire removes from the lanes in which items expire what stands first.
func (d *modelDest) expire(now int64) KindTotals {
	var gone []*modelItem
	for l := matrix.LaneReceipt; l <= matrix.NumLanes; l++ {
		for _, it := range d.lanes[l] {
			if it.frozen {
				continue
			}
			if !it.Expired(it.accepted, now) {
				break
			}
			gone = append(gone, it)
		}
	}
	return d.remove(func(it *modelItem) bool { return slices.Contains(gone, it) })
}

func (d *modelDest) compact(c *Compact) (r CompactResult) {
	rooms := map[string][]*modelItem{}
	for _, it := range d.lanes[matrix.LanePDU] {
		if !it.frozen && it.Group != "" {
			rooms[it.Group] = append(rooms[it.Group], it)
		}
	}
	var keep []*modelItem
	for _, list := range rooms {
		var depths []int64
		for _, it := range list {
			depths = append(depths, it.Depth)
		}
		for _, i := range matrix.Newest(depths) {
			keep = append(keep, list[i])
		}
	}
	r.Superseded = d.remove(func(it *modelItem) bool {
		return it.Kind == matrix.KindPDU && !it.frozen && it.Group != "" && !slices.Contains(keep, it)
	}).Sum()
	r.Expired = d.expire(c.Now)
	return r
}

// listing is what the model and the store must agree on.
func (d *modelDest) listing() string {
	var b strings.Builder
	for _, lane := range d.lanes {
		for _, it := range lane {
			fmt.Fprintf(&b, "%v %d %t %s\n", it.Kind, it.accepted, it.frozen, it.Payload)
		}
	}
	return b.String()
}

func (d *modelDest) summary(name matrix.ServerName) Destination {
	s := Destination{Name: name, TxnID: d.txn, Frozen: len(d.parts) > 0, Held: d.held}
	for _, lane := range d.lanes {
		for i, it := range lane {
			s.Kinds.add(it.Kind, 1, int64(len(it.Payload)))
			if i == 0 && (s.Oldest == 0 || it.accepted < s.Oldest) {
				s.Oldest = it.accepted
			}
		}
	}
	return s
}

// run is one random sequence of operations.
type run struct {
	t     *testing.T
	rng   *rand.Rand
	model model
	names []matrix.ServerName
	now   int64
	next  int // for what must be new
	chain int // stream id of device lists
	packs map[matrix.ServerName]string

	thawed, merged int // batches, and items that newer ones took the place of
}

func (r *run) pick(n int) int { return r.rng.IntN(n) }

func (r *run) items() []matrix.Item {
	user := func() string { return fmt.Sprintf("@u%d:hs1.test", r.pick(3)) }
	room := func() string { return fmt.Sprintf("!r%d", r.pick(3)) }
	// On both sides of inlineBytes.
	text := func() string { return strings.Repeat("x", r.pick(2)*r.pick(300)) }
	var p, e []string
	for range r.pick(4) {
		p = append(p, pdu(room(), r.pick(9), fmt.Sprint(text(), r.pick(3))))
	}
	if r.pick(20) == 0 {
		p = append(p, fmt.Sprintf(`{"depth":%d,"type":"m.room.create"}`, r.pick(3)))
	}
	for range r.pick(7) {
		r.next++
		switch r.pick(8) {
		case 0:
			e = append(e, toDevice(fmt.Sprint(r.next), text()))
		case 1:
			e = append(e, typing(room(), user(), r.pick(2) == 0))
		case 2, 3:
			e = append(e, presence(user(), text(), r.pick(1000)))
		case 4:
			e = append(e, receipt(room(), user(), fmt.Sprint("$", r.next), []string{"", "main", "$t"}[r.pick(3)]))
		case 5:
			r.chain++
			e = append(e, deviceList(user(), fmt.Sprint("D", r.pick(2)), r.chain, text(), r.chain-1))
		case 6:
			e = append(e, signingKey(user(), fmt.Sprintf(`%q:{"k":%d,"t":%q}`, []string{"master_key", "self_signing_key"}[r.pick(2)], r.next, text())))
		case 7:
			e = append(e, fmt.Sprintf(`{"content":{"n":%d},"edu_type":"x"}`, r.pick(3)))
		}
	}
	return items(r.t, p, e)
}

// op makes one operation and the check that is to follow once it has succeeded.
func (r *run) op() (OutboxOp, func()) {
	name := r.names[r.pick(len(r.names))]
	r.now += int64(r.pick(20_000))
	if r.pick(50) == 0 {
		r.now += 3_600_000
	}
	same := func(what string, got, want any) {
		r.t.Helper()
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			r.t.Errorf("%s for %s:\n got %+v\nwant %+v", what, name, got, want)
		}
	}
	switch r.pick(12) {
	case 0, 1, 2, 3:
		a := &Accept{Destination: name, TxnID: fmt.Sprint(r.pick(6)), Items: r.items(), Accepted: r.now}
		if list := a.Items; r.pick(2) == 0 {
			a.Items, a.Load = nil, func(dst []matrix.Item) ([]matrix.Item, error) { return append(dst, list...), nil }
		}
		return a, func() {
			want := r.model.dest(name).accept(a)
			want.Destination = r.model[name].summary(name)
			same("accept", a.Result, want)
		}
	case 4, 5, 6:
		r.next++
		p := &Pack{Destination: name, NewID: fmt.Sprint("b", r.next), Now: r.now, Origin: origin, MaxBytes: 3000}
		return p, func() {
			d := r.model[name]
			if d == nil {
				same("pack", p.Result, PackResult{})
				return
			}
			want, got := d.pack(p), p.Result
			if !bytes.Equal(got.Body, want.Body) {
				r.t.Errorf("packed for %s:\n got %s\nwant %s", name, got.Body, want.Body)
			}
			same("pack", []any{got.ID, got.At, got.Again, got.Expired, got.Destination}, []any{want.ID, want.At, want.Again, want.Expired, d.summary(name)})
			if got.ID != "" {
				if it := d.parts[0].twice(); it != nil {
					r.t.Errorf("%s: one of two in a batch: %v %s", name, it.Kind, it.Payload)
				}
			}
			r.packs[name] = got.ID
		}
	case 7, 8, 9:
		s := &Settle{Destination: name, TxnID: r.packs[name], Outcome: Delivered, Now: r.now}
		switch r.pick(6) {
		case 0, 1:
			s.Outcome = Bisect
		case 2, 3:
			s.Outcome = Thaw
		}
		return s, func() {
			d := r.model[name]
			if d == nil {
				return
			}
			want, got := d.settle(s), s.Result
			same("settle", []any{got.Found, got.Delivered, got.Destination, got.SetAside != nil, got.Thawed, got.Merged},
				[]any{want.Found, want.Delivered, d.summary(name), want.SetAside != nil, want.Thawed, want.Merged})
			if got.Thawed {
				r.thawed++
			}
			r.merged += got.Merged
			if want.SetAside != nil {
				same("set aside", string(got.SetAside.Payload), string(want.SetAside.Payload))
			}
		}
	case 10:
		if r.pick(2) == 0 {
			c := &Compact{Destination: name, Now: r.now}
			return c, func() {
				if d := r.model[name]; d != nil {
					want := d.compact(c)
					want.Destination = d.summary(name)
					same("compact", c.Result, want)
				}
			}
		}
		h := &Hold{Destination: name, Held: r.pick(2) == 0}
		return h, func() {
			d := r.model.dest(name)
			d.held = h.Held
			same("hold", h.Result, d.summary(name))
		}
	}
	e := &Expire{Now: r.now}
	return e, func() {
		var gone KindTotals
		for _, name := range r.names {
			if d := r.model[name]; d != nil {
				for k, n := range d.expire(e.Now) {
					gone.add(matrix.Kind(k), n.Items, n.Bytes)
				}
			}
		}
		same("expire", e.Result.Expired, gone)
	}
}

// verify compares all that the store has with the model.
func (r *run) verify(s *Store) {
	r.t.Helper()
	found := loadOutbox(r.t, s)
	for _, name := range r.names {
		d := r.model.dest(name)
		var b strings.Builder
		for _, it := range pending(r.t, s, name) {
			fmt.Fprintf(&b, "%v %d %t %s\n", it.Kind, it.Accepted, it.Frozen, it.Payload)
		}
		if b.String() != d.listing() {
			r.t.Errorf("%s:\n got %s\nwant %s", name, b.String(), d.listing())
		}
		want := d.summary(name)
		if got := found[name]; (want.Oldest != 0 || want.Held) && got != want {
			r.t.Errorf("%s:\n got %+v\nwant %+v", name, got, want)
		}
	}
}

// settleAll ends everything, so that the next run starts with nothing.
func (r *run) settleAll(s *Store) {
	r.t.Helper()
	for _, name := range r.names {
		do(r.t, s, &Hold{Destination: name})
		for i := 0; ; i++ {
			if i == 1000 {
				r.t.Fatalf("%s: still something to pack", name)
			}
			p := pack(r.t, s, name, "last", r.now)
			if p.ID == "" {
				break
			}
			settle(r.t, s, name, p.ID, Delivered)
		}
	}
}

func TestTheOutboxIsThatOfAPlainModel(t *testing.T) {
	const seeds = 300
	path := newPath(t)
	// Now and then a commit fails, and with it whatever batches share it.
	var failing atomic.Bool
	opt := Options{Path: path, MaxGroup: 3, Fault: func(op Op) error {
		if op == OpCommit && failing.CompareAndSwap(true, false) {
			return errInjected
		}
		return nil
	}}
	s := open(t, opt)
	failed, done, thawed, merged := 0, 0, 0, 0
	for seed := range uint64(seeds) {
		r := &run{t: t, rng: rand.New(rand.NewPCG(seed, 1)), model: model{}, now: 1000, packs: map[matrix.ServerName]string{}}
		for i := range 1 + r.pick(3) {
			r.names = append(r.names, matrix.ServerName(fmt.Sprintf("s%d.d%d.test", seed, i)))
		}
		for range 4 + r.pick(6) {
			// Some batches of some operations, together in flight.
			failing.Store(r.pick(8) == 0)
			batches := make([]Batch, 1+r.pick(4))
			checks := make([][]func(), len(batches))
			errs := make(chan error, len(batches))
			for i := range batches {
				for range 1 + r.pick(3) {
					op, check := r.op()
					batches[i].Outbox = append(batches[i].Outbox, op)
					checks[i] = append(checks[i], check)
				}
				if err := s.Submit(&batches[i], func(err error) { errs <- err }); err != nil {
					t.Fatal(err)
				}
			}
			for i := range batches {
				switch err := <-errs; {
				case errors.Is(err, errInjected):
					failed++
				case err != nil:
					t.Fatal(err)
				default:
					for _, check := range checks[i] {
						check()
						done++
					}
				}
			}
			failing.Store(false)
			if seed%16 == 0 && r.pick(4) == 0 {
				closeStore(t, s)
				s = open(t, opt)
			}
		}
		r.verify(s)
		if seed%16 == 0 {
			audit(t, path)
		}
		r.settleAll(s)
		thawed += r.thawed
		merged += r.merged
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	want(t, "items in the end", s.Stats().Outbox.Items, int64(0))
	t.Logf("%d operations, %d batches failed, %d thawed with %d items merged", done, failed, thawed, merged)
	if failed == 0 || thawed == 0 || merged == 0 {
		t.Error("not all of it happened")
	}
}

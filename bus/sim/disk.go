package sim

import (
	"fmt"
	"slices"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// fate is what became of an item.
type fate uint8

const (
	nowhere    fate = iota // the disk has never had it
	pending                // the disk has it
	delivered              // the rest are out of the outbox
	merged                 // a newer one took its place
	duplicate              // a copy of it was pending
	expired                // it had waited for too long
	superseded             // a newer event of its room made it needless
	aside                  // its destination refuses it
	dropped                // by an admin
	numFates
)

var fateNames = [numFates]string{"nowhere", "pending", "delivered", "merged", "duplicate", "expired", "superseded", "aside", "dropped"}

func (f fate) String() string { return fateNames[f] }

// item stands for a PDU or a part of an EDU, for one destination.
type item struct {
	n         int
	to        *remote
	kind      matrix.Kind
	room      int    // of a PDU
	event     int64  // of a PDU: its number in its room, which is its depth, too
	key       string // of what may be merged
	version   int64
	life      time.Duration
	poison    bool // its destination answers 500 to what it is in
	malformed bool // cannot be packed

	fate     fate
	accepted sched.Time // when the disk was given it
	acked    bool       // the homeserver has forgotten it
	got      int        // how often its destination has taken it
	unclear  bool       // it was taken in a transaction that was divided
}

func (it *item) expired(now sched.Time) bool { return it.life > 0 && now.Sub(it.accepted) > it.life }

// itemBytes is what each item counts as.
const itemBytes = 100

// disk is the outbox of the store: what its operations promise, in memory. They
// take effect one after the other, in the order in which they were given, and
// are reported later, in the same order. A crash loses what has not taken
// effect; what has, but was not reported, stays.
type disk struct {
	w     *World
	dests []*diskDest // in the order of the remotes

	last, reported sched.Time // when the latest operation takes effect, and is reported

	failures     int // per cent of the operations
	downFrom     sched.Time
	downTo       sched.Time // all operations fail
	maxDestItems int
	maxItems     int
	maxDests     int // with something pending
	packPDUs     int
	packEDUs     int
}

type diskDest struct {
	r     *remote
	txn   string  // the last accepted one's id
	wait  []*item // not frozen, in order
	parts []part
	held  bool
}

// part is a frozen batch, or a part of one that was refused.
type part struct {
	id    string // "": to be packed under a new one
	items []*item
}

// trimAtOnce is how many items one Compact or Expire gives up, and expireDests
// how many destinations Expire looks at: few, so that there is more to do.
const (
	trimAtOnce  = 5
	expireDests = 4
)

// submit queues an operation: apply is called when it takes effect, with false if
// it fails, and report, which it returns, when the core is told.
func (d *disk) submit(apply func(ok bool) (report func())) {
	w := d.w
	delay := w.between(100*time.Microsecond, 20*time.Millisecond)
	if w.rng.IntN(200) == 0 {
		delay = w.between(100*time.Millisecond, 2*time.Second)
	}
	d.last = max(d.last, w.now.Add(delay))
	ok := w.rng.IntN(100) >= d.failures
	lag := w.between(0, 5*time.Millisecond)
	w.at(d.last.Sub(w.now), func() {
		if w.now >= d.downFrom && w.now < d.downTo {
			ok = false
		}
		if !ok {
			w.Counts["disk failure"]++
		}
		report := apply(ok)
		d.reported = max(d.reported, w.now.Add(lag))
		w.at(d.reported.Sub(w.now), report)
	})
}

// frozen returns the frozen items.
func (d *diskDest) frozen() (items []*item) {
	for _, p := range d.parts {
		items = append(items, p.items...)
	}
	return items
}

func (d *diskDest) empty() bool { return len(d.wait) == 0 && len(d.parts) == 0 }

func (d *diskDest) backlog() bus.Backlog {
	b := bus.Backlog{Frozen: len(d.parts) > 0, Held: d.held}
	for _, it := range append(d.frozen(), d.wait...) {
		b.Items[it.kind]++
		b.Bytes += itemBytes
		if b.Oldest == 0 || it.accepted < b.Oldest {
			b.Oldest = it.accepted
		}
	}
	return b
}

func (d *disk) totals() (items, dests int) {
	for _, dd := range d.dests {
		n := len(dd.wait) + len(dd.frozen())
		items += n
		if n > 0 || dd.held {
			dests++
		}
	}
	return items, dests
}

// records is what the disk gives back after a start.
func (d *disk) records() (list []bus.QueueRecord) {
	for _, dd := range d.dests {
		if !dd.empty() || dd.held {
			list = append(list, bus.QueueRecord{Name: dd.r.name, Backlog: dd.backlog()})
		}
	}
	return list
}

// accepted is what an accept comes to.
type accepted struct {
	full, repeated     bool
	merged, duplicates int32
}

// accept takes items over, or changes nothing.
func (d *disk) accept(dd *diskDest, txn string, items []*item, now sched.Time) (a accepted) {
	if txn == dd.txn {
		a.repeated = true
		return a
	}
	wait := slices.Clone(dd.wait)
	frozen := dd.frozen()
	fates := map[*item]fate{}
	stored := 0
	for _, it := range items {
		old := slices.IndexFunc(wait, func(o *item) bool { return o.kind == it.kind && o.key == it.key })
		switch it.kind.Merge() {
		case matrix.MergeNever:
			old = -1
		case matrix.MergeKeep:
			if old >= 0 || slices.ContainsFunc(frozen, func(o *item) bool { return o.kind == it.kind && o.key == it.key }) {
				fates[it] = duplicate
				a.duplicates++
				continue
			}
		}
		if old >= 0 {
			fates[wait[old]] = merged
			wait = slices.Delete(wait, old, old+1)
			a.merged++
		} else {
			stored++
		}
		fates[it] = pending
		wait = append(wait, it)
	}
	all, dests := d.totals()
	isNew := dd.empty() && !dd.held
	switch {
	case stored > 0 && len(wait)+len(frozen) > d.maxDestItems, stored > 0 && all+stored > d.maxItems, isNew && dests >= d.maxDests:
		return accepted{full: true}
	}
	for it, f := range fates { // each is set once
		it.fate = f
	}
	for _, it := range items {
		it.accepted = now
	}
	dd.wait, dd.txn = wait, txn
	return a
}

// packed is a transaction.
type packed struct {
	dest     *diskDest
	id       string
	again    bool
	items    []*item
	oldest   sched.Time
	expired  [matrix.NumKinds + 1]int32
	setAside int32

	unpacked bool
	control  bool // holds nothing, and is on no disk
}

// pack makes the next transaction, or the frozen one again.
func (d *disk) pack(dd *diskDest, id string, now sched.Time) *packed {
	p := &packed{dest: dd}
	if len(dd.parts) == 0 {
		var take, rest []*item
		pdus, edus, given := 0, 0, 0
		full := [matrix.NumLanes + 1]bool{}
		for lane := matrix.Lane(1); lane <= matrix.NumLanes; lane++ {
			for _, it := range dd.wait {
				if it.kind.Lane() != lane {
					continue
				}
				n, most := &edus, d.packEDUs
				if it.kind == matrix.KindPDU {
					n, most = &pdus, d.packPDUs
				}
				switch {
				case full[lane]:
				case it.expired(now):
					if given++; given > trimAtOnce {
						full[lane] = true
						continue
					}
					it.fate = expired
					p.expired[it.kind]++
				case it.malformed:
					it.fate = aside
					p.setAside++
				case *n == most:
					full[lane] = true
				default:
					*n++
					take = append(take, it)
				}
			}
		}
		taken := map[*item]bool{}
		for _, it := range take {
			taken[it] = true
		}
		for _, it := range dd.wait {
			if it.fate == pending && !taken[it] {
				rest = append(rest, it)
			}
		}
		dd.wait = rest
		if len(take) == 0 {
			return p
		}
		dd.parts = []part{{items: take}}
	}
	first := &dd.parts[0]
	p.again = first.id != ""
	if !p.again {
		first.id = id
	}
	p.id, p.items = first.id, slices.Clone(first.items)
	for _, it := range p.items {
		if p.oldest == 0 || it.accepted < p.oldest {
			p.oldest = it.accepted
		}
	}
	return p
}

// settled is what a settle comes to.
type settled struct {
	delivered [matrix.NumKinds + 1]int32
	setAside  int32
	divided   bool
	thawed    bool
	merged    int // of what thawed, with newer ones
}

func (d *disk) settle(dd *diskDest, id string, o bus.Outcome) (s settled) {
	if len(dd.parts) == 0 || dd.parts[0].id != id {
		return s
	}
	p := dd.parts[0]
	switch o {
	case bus.Delivered:
		dd.parts = dd.parts[1:]
		for _, it := range p.items {
			it.fate = delivered
			s.delivered[it.kind]++
		}
	case bus.Bisect:
		dd.parts = dd.parts[1:]
		if len(p.items) == 1 {
			p.items[0].fate = aside
			s.setAside = 1
			break
		}
		half := len(p.items) / 2
		dd.parts = append([]part{{items: p.items[:half]}, {items: p.items[half:]}}, dd.parts...)
		s.divided = true
	case bus.Thaw:
		if len(dd.parts) != 1 {
			break // what stands behind it in its lanes is frozen, so it must be
		}
		s.thawed = true
		dd.parts = nil
		back := p.items[:0:0]
		for _, it := range p.items {
			if m := it.kind.Merge(); m != matrix.MergeNever && slices.ContainsFunc(dd.wait, func(o *item) bool { return o.kind == it.kind && o.key == it.key }) {
				it.fate = merged
				s.merged++
				continue
			}
			back = append(back, it)
		}
		dd.wait = append(back, dd.wait...)
	}
	return s
}

// compact gives up the events that newer ones of their rooms make needless.
func (d *disk) compact(dd *diskDest) (gone int32, more bool) {
	rooms := map[int][]int64{}
	places := map[int][]int{}
	for i, it := range dd.wait {
		if it.kind == matrix.KindPDU {
			rooms[it.room] = append(rooms[it.room], it.event)
			places[it.room] = append(places[it.room], i)
		}
	}
	keep := map[int]bool{}
	for room, depths := range rooms { // a set
		for _, i := range matrix.Newest(depths) {
			keep[places[room][i]] = true
		}
	}
	rest := dd.wait[:0:0]
	for i, it := range dd.wait {
		if it.kind == matrix.KindPDU && !keep[i] {
			if gone < trimAtOnce {
				gone++
				it.fate = superseded
				continue
			}
			more = true
		}
		rest = append(rest, it)
	}
	dd.wait = rest
	return gone, more
}

// expire gives up what has waited for too long.
func (d *disk) expire(after int64, now sched.Time) (gone [matrix.NumKinds + 1]int32, changed []bus.QueueRecord, next int64) {
	looked := 0
	for i := int(after); i < len(d.dests); i++ {
		dd := d.dests[i]
		if dd.empty() {
			continue
		}
		if looked++; looked > expireDests {
			return gone, changed, int64(i)
		}
		rest := dd.wait[:0:0]
		for _, it := range dd.wait {
			if it.expired(now) {
				it.fate = expired
				gone[it.kind]++
				continue
			}
			rest = append(rest, it)
		}
		if len(rest) < len(dd.wait) {
			dd.wait = rest
			changed = append(changed, bus.QueueRecord{Name: dd.r.name, Backlog: dd.backlog()})
		}
	}
	return gone, changed, 0
}

// drop gives up what an admin does not want.
func (d *disk) drop(dd *diskDest, all bool) {
	rest := dd.wait[:0:0]
	for _, it := range dd.wait {
		if all || it.kind != matrix.KindPDU {
			it.fate = dropped
			continue
		}
		rest = append(rest, it)
	}
	dd.wait = rest
	if all {
		for _, it := range dd.frozen() {
			it.fate = dropped
		}
		dd.parts = nil
	}
}

// execute runs an operation that the core has asked for.
func (d *disk) execute(e bus.Effect) {
	w := d.w
	now := w.now
	switch e := e.(type) {
	case bus.Accept:
		o := w.offer(e.Req, "Accept")
		if o.asked || o.freed {
			w.failf("Accept of transaction %d: asked before %t, freed %t", e.Req, o.asked, o.freed)
		}
		o.asked = true
		dd := d.dests[o.to.index]
		d.submit(func(ok bool) func() {
			ev := bus.Accepted{Req: e.Req, Fault: bus.AcceptedNot, Detail: "simulated"}
			if ok {
				a := d.accept(dd, o.txn.id, o.txn.items, now)
				ev = bus.Accepted{Req: e.Req, Fault: bus.AcceptedFull, Detail: "simulated"}
				if !a.full {
					o.stored = true
					ev = bus.Accepted{Req: e.Req, Repeated: a.repeated, Merged: a.merged, Duplicates: a.duplicates, Backlog: dd.backlog()}
					for _, it := range o.txn.items {
						ev.Kinds[it.kind]++
					}
				}
			}
			return func() {
				w.Counts[fmt.Sprintf("accept fault %d", ev.Fault)]++
				if ev.Repeated {
					w.Counts["repeated"]++
				}
				w.Counts["merged"] += int(ev.Merged)
				w.Counts["duplicate"] += int(ev.Duplicates)
				o.accepted = w.now
				w.step(ev)
			}
		})
	case bus.Pack:
		dd := w.begins(e)
		d.submit(func(ok bool) func() {
			ev := bus.Packed{Batch: e.Batch}
			var p *packed
			if ok {
				p = d.pack(dd, e.TxnID, now)
				ev.OK, ev.Expired, ev.SetAside, ev.Backlog = true, p.expired, p.setAside, dd.backlog()
				if p.id != "" {
					ev.Txn = bus.TxnInfo{ID: p.id, Again: p.again, Bytes: int64(len(p.items) * itemBytes), Oldest: p.oldest}
					for _, it := range p.items {
						if it.kind == matrix.KindPDU {
							ev.Txn.PDUs++
						} else {
							ev.Txn.EDUs++
						}
					}
				}
			}
			return func() {
				w.hasPacked(e.Batch, dd, p)
				w.step(ev)
			}
		})
	case bus.Settle:
		dd := w.ends(e)
		d.submit(func(ok bool) func() {
			ev := bus.Settled{Batch: e.Batch, OK: ok}
			var s settled
			if ok {
				s = d.settle(dd, e.TxnID, e.Outcome)
				ev.Delivered, ev.SetAside, ev.Backlog = s.delivered, s.setAside, dd.backlog()
				w.out.thawMerged += s.merged
			}
			return func() {
				dd.r.busy = ""
				w.counts(s)
				w.step(ev)
			}
		})
	case bus.Compact:
		dd := w.trims(e)
		d.submit(func(ok bool) func() {
			ev := bus.Trimmed{Batch: e.Batch, OK: ok}
			if ok {
				gone, more := d.compact(dd)
				ev.Superseded = gone
				if more {
					ev.Next = 1
				}
				ev.Changed = []bus.QueueRecord{{Name: dd.r.name, Backlog: dd.backlog()}}
			}
			return func() {
				dd.r.busy, dd.r.trimming = "", ev.Next != 0
				w.Counts["superseded"] += int(ev.Superseded)
				w.step(ev)
			}
		})
	case bus.Expire:
		d.submit(func(ok bool) func() {
			ev := bus.Trimmed{Batch: e.Batch, OK: ok}
			if ok {
				ev.Expired, ev.Changed, ev.Next = d.expire(e.After, now)
			}
			return func() {
				for _, n := range ev.Expired {
					w.Counts["expired"] += int(n)
				}
				w.Counts["sweep"]++
				w.step(ev)
			}
		})
	}
}

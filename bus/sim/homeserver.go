package sim

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// homeserver sends transactions as Synapse does: one at a time for each
// destination, again with the same id until it is answered 200 or ten minutes are
// over (federation/sender/per_destination_queue.py, http/matrixfederationclient.py).
// What comes meanwhile waits for the next.
type homeserver struct {
	w        *World
	dests    []*hsDest
	rooms    []hsRoom
	users    int
	merges   bool // what waits, where something newer says it all
	poison   int  // of a thousand items
	nextTxn  int64
	nextItem int
	versions map[string]int64
	items    []*item // all that there are
}

type hsRoom struct {
	members []int
	events  int64 // so far
	newest  *item
}

type hsDest struct {
	r       *remote
	waits   []*item
	flight  *hsTxn
	down    sched.Time // nothing is sent before it
	kicking bool
}

type hsTxn struct {
	id    string
	items []*item
	req   bus.ReqID // of the latest attempt
	open  bool      // which has not ended
	first sched.Time
	tries int
}

// offer is one attempt of the homeserver.
type offer struct {
	req      bus.ReqID
	to       *remote
	dest     *hsDest
	txn      *hsTxn
	at       sched.Time
	asked    bool
	accepted sched.Time // when the core was told
	stored   bool       // on disk
	ended    bool
	freed    bool
	loose    bool // the hold has changed since
}

const (
	hsTimeout = 60 * time.Second
	hsGivesUp = 10 * time.Minute
	hsDown    = 10 * time.Minute
)

func (hs *homeserver) add(to int, it item) {
	hs.nextItem++
	it.n = hs.nextItem
	d := hs.dests[to]
	it.to = d.r
	p := &it
	hs.items = append(hs.items, p)
	if hs.merges && p.kind.Merge() == matrix.MergeReplace {
		if i := slices.IndexFunc(d.waits, func(o *item) bool { return o.kind == p.kind && o.key == p.key }); i >= 0 {
			d.waits = slices.Delete(d.waits, i, i+1)
		}
	}
	d.waits = append(d.waits, p)
	hs.kick(d)
}

// happen has something happen that other servers are to know.
func (hs *homeserver) happen() {
	w := hs.w
	ri := w.rng.IntN(len(hs.rooms))
	room := &hs.rooms[ri]
	bad := func(it item) item {
		it.poison = w.rng.IntN(1000) < hs.poison
		it.malformed = w.rng.IntN(500) == 0
		return it
	}
	version := func(key string) int64 { hs.versions[key]++; return hs.versions[key] }
	user := w.rng.IntN(hs.users)
	one := room.members[w.rng.IntN(len(room.members))]
	switch w.rng.IntN(10) {
	case 0, 1, 2:
		room.events++
		hs.event(ri, room.events, bad(item{}))
	case 3:
		if room.events > 0 { // as in a catch-up: the newest once more
			hs.add(one, *hs.rooms[ri].newest)
		}
	case 4, 5:
		key := fmt.Sprintf("user %d", user)
		it := bad(item{kind: matrix.KindPresence, key: key, version: version("presence " + key), life: 30 * time.Minute})
		for _, to := range room.members {
			hs.add(to, it)
		}
	case 6:
		key := fmt.Sprintf("room %d user %d", ri, user)
		it := bad(item{kind: matrix.KindTyping, key: key, version: version("typing " + key), life: 30 * time.Second})
		for _, to := range room.members {
			hs.add(to, it)
		}
	case 7:
		key := fmt.Sprintf("room %d user %d", ri, user)
		it := bad(item{kind: matrix.KindReceipt, key: key, version: version("receipt " + key), life: 7 * 24 * time.Hour})
		for _, to := range room.members {
			hs.add(to, it)
		}
	case 8:
		for n := w.rng.IntN(4); n >= 0; n-- {
			hs.add(one, bad(item{kind: matrix.KindToDevice}))
		}
	case 9:
		kind := []matrix.Kind{matrix.KindDeviceList, matrix.KindSigningKey, matrix.KindOther}[w.rng.IntN(3)]
		it := bad(item{kind: kind})
		if kind != matrix.KindOther {
			it.key = fmt.Sprintf("user %d", user)
			it.version = version(kind.String() + " " + it.key)
		}
		for _, to := range room.members {
			hs.add(to, it)
		}
	}
}

// event has an event go to all members of a room.
func (hs *homeserver) event(ri int, n int64, it item) {
	it.kind, it.room, it.event, it.key = matrix.KindPDU, ri, n, fmt.Sprintf("event %d of %d", n, ri)
	hs.rooms[ri].newest = &it
	for _, to := range hs.rooms[ri].members {
		hs.add(to, it)
	}
}

// kick has the next transaction sent to a destination if none is under way.
func (hs *homeserver) kick(d *hsDest) {
	if d.kicking || d.flight != nil {
		return
	}
	d.kicking = true
	w := hs.w
	w.future.Set(max(d.down, w.now.Add(w.between(time.Millisecond, 20*time.Millisecond))), func() {
		d.kicking = false
		if d.flight != nil || len(d.waits) == 0 {
			return
		}
		pdus, edus := 0, 0
		var take, rest []*item
		for _, it := range d.waits {
			n, most := &edus, matrix.MaxEDUs
			if it.kind == matrix.KindPDU {
				n, most = &pdus, matrix.MaxPDUs
			}
			if *n == most {
				rest = append(rest, it)
				continue
			}
			*n++
			take = append(take, it)
		}
		d.waits = rest
		hs.nextTxn++
		d.flight = &hsTxn{id: strconv.FormatInt(1_800_000_000_000+hs.nextTxn, 10), items: take, first: w.now}
		hs.send(d)
	})
}

// send makes an attempt, once the bus listens.
func (hs *homeserver) send(d *hsDest) {
	w, t := hs.w, d.flight
	if w.deaf() {
		hs.again(d, t)
		return
	}
	w.lastReq++
	o := &offer{req: w.lastReq, to: d.r, dest: d, txn: t, at: w.now}
	t.req, t.open = o.req, true
	t.tries++
	w.out.offers[o.req] = o
	gone := hsTimeout
	if w.rng.IntN(50) == 0 {
		gone = w.between(time.Millisecond, 10*time.Second)
	}
	w.at(gone, func() {
		if o.ended {
			return
		}
		if gone == hsTimeout {
			w.failf("transaction %d to %s is not answered in time", o.req, d.r.name)
		}
		o.ended = true
		w.Counts["offer gone"]++
		hs.failed(d, t)
		w.step(bus.Gone{Req: o.req})
	})
	w.due(o)
	ev := bus.Offered{Req: o.req, Dest: d.r.name, Class: matrix.ClassPresence}
	for _, it := range t.items {
		switch it.kind {
		case matrix.KindPDU:
			ev.Class = matrix.ClassEvent
			ev.Pace.PDUs = append(ev.Pace.PDUs, bus.PaceMark{Room: fmt.Sprint("!room", it.room), Mark: uint64(it.room)<<32 | uint64(it.event)})
		case matrix.KindTyping, matrix.KindReceipt:
			ev.Pace.Rooms = append(ev.Pace.Rooms, "!"+it.key)
		case matrix.KindPresence:
		default:
			ev.Class = min(ev.Class, matrix.ClassDevice)
			ev.Pace.Device = true
		}
	}
	w.step(ev)
}

// again makes the next attempt later, with the same id.
func (hs *homeserver) again(d *hsDest, t *hsTxn) {
	if hs.w.out.finished {
		return // what is left is for servers that take nothing, and nobody listens any more
	}
	w := hs.w
	most := min(time.Second<<min(t.tries, 10), time.Minute)
	w.future.Set(w.now.Add(w.between(most/2, most)), func() {
		if d.flight == t && !t.open {
			hs.send(d)
		}
	})
}

// failed: an attempt was refused, or its connection is gone.
func (hs *homeserver) failed(d *hsDest, t *hsTxn) {
	w := hs.w
	t.open = false
	if w.now.Sub(t.first) < hsGivesUp {
		hs.again(d, t)
		return
	}
	// The newest event of each room comes in the catch-up, all else is lost.
	w.Counts["homeserver gives up"]++
	d.flight = nil
	d.down = w.now.Add(hsDown)
	newest := map[int]*item{}
	var events []*item
	for _, it := range append(t.items, d.waits...) {
		if it.kind == matrix.KindPDU {
			newest[it.room] = it
			events = append(events, it)
		}
	}
	d.waits = nil
	for _, it := range events {
		if newest[it.room] == it {
			hs.add(d.r.index, item{kind: it.kind, room: it.room, event: it.event, key: it.key, poison: it.poison, malformed: it.malformed})
		}
	}
	if len(d.waits) > 0 {
		hs.kick(d)
	}
}

// answered: the bus has answered 200.
func (hs *homeserver) answered(o *offer) {
	for _, it := range o.txn.items {
		it.acked = true
	}
	o.txn.open = false
	o.dest.flight = nil
	if len(o.dest.waits) > 0 {
		hs.kick(o.dest)
	}
}

// broke: the bus has died, and every connection with it.
func (hs *homeserver) broke() {
	for _, d := range hs.dests {
		if d.flight != nil && d.flight.open {
			hs.failed(d, d.flight)
		}
	}
}

func (hs *homeserver) idle() bool {
	for _, d := range hs.dests {
		if (d.flight != nil || len(d.waits) > 0) && d.r.does != broken { // one that stays so may be full for ever
			return false
		}
	}
	return true
}

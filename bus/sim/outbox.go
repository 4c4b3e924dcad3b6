package sim

import (
	"fmt"
	"slices"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// OutboxProfile shapes what a run does with the outbox. Zero fields are drawn
// from the seed.
type OutboxProfile struct {
	News    int           // that are to be sent in all, each to a room's servers
	Gap     time.Duration // mean time between them
	Crashes int           // of the bus, at any step
	Outage  time.Duration // during which no server can be reached
	Rooms   int
	Items   int           // of a destination that the disk takes
	Ill     time.Duration // for which each server is ill in one way, at the same time
}

// What a remote does to transactions only.
const (
	denies  behaviour = numBehaviours + iota // 401 or 403, or does not know the path
	strange                                  // what answers is not a Matrix server
	loses                                    // takes it, and its answer is lost
	broken                                   // 500 to all
	numOutboxBehaviours
)

// What a remote does in the test of illnesses only.
const (
	servfail     behaviour = numOutboxBehaviours + iota // its name cannot be looked up for now
	expiredCert                                         // TLS fails
	blocks                                              // 403, in HTML
	resets                                              // when the body is there
	resetsAtOnce                                        // before that
	limitsAll                                           // 429, and no time
)

// outboxWorld is the outbox's part of a world.
type outboxWorld struct {
	profile OutboxProfile
	disk    *disk
	hs      *homeserver
	offers  map[bus.ReqID]*offer
	packs   map[bus.BatchID]*packed
	ids     map[string]bool // that the core has chosen for transactions

	partition  bool
	suspended  bool
	draining   bool
	drained    func() // what follows
	dead       bool   // crashed in the middle of a step
	crashAt    []int
	thawMerged int
	finished   bool
}

// txState is what there is to know of a remote for its transactions.
type txState struct {
	index      int
	busy       string // what the store has under way for it
	delivering *attempt
	flushed    bool // it is tried, whatever its back-off: an admin wants it, or something came from it
	stranger   bool // a key of it was wanted
	trimming   bool // there is more to compact

	content  map[string]string // of each id that was sent
	reached  map[string]bool   // some of it may have arrived
	taken    map[string]bool
	events   map[int]int64 // the newest of each room
	versions map[string]int64
	spent    int // how often it was tried ahead of its time for a user's sake, since the start
	tries    map[string]*tries
	rousedAt sched.Time // when something came from it that ended a back-off
	aliveAt  sched.Time // when something came from it
	freed    bool       // an admin wants it tried
	control  bool       // what became of the last control: it was taken
	flaky    bool       // has taken something and lost the answer
}

func (w *World) drawOutbox() {
	p := w.profile.Outbox
	o := &outboxWorld{profile: *p, offers: map[bus.ReqID]*offer{}, packs: map[bus.BatchID]*packed{}, ids: map[string]bool{}}
	w.out = o
	pick := func(v *int, lo, hi int) {
		if *v == 0 {
			*v = lo + w.rng.IntN(hi-lo)
		}
	}
	pick(&o.profile.News, 30, 150)
	pick(&o.profile.Rooms, 1, 8)
	pick(&o.profile.Items, 15, 300)
	if o.profile.Gap == 0 {
		o.profile.Gap = time.Duration(1+w.rng.IntN(1500)) * time.Millisecond
	}
}

// drawOutboxConfig draws limits that are small enough to matter.
func (w *World) drawOutboxConfig(c *bus.Config) {
	hosts := w.profile.Hosts
	c.MaxHosts = c.MaxRequests + 3*int32(c.Workers) + 5 + int32(w.rng.IntN(20))
	c.MaxHosts = max(c.MaxHosts, int32(hosts)+1) // one that is forgotten may be tried too early
	c.Outbox = bus.DefaultOutbox()
	out := &c.Outbox
	out.MaxQueues = 1 + int32(hosts/2+w.rng.IntN(hosts))
	out.PresenceWindow = w.between(0, 15*time.Second)
	out.ReceiptWindow = w.between(0, 3*time.Second)
	out.TypingWindow = w.between(0, time.Second)
	w.drawPace(&out.Pace)
}

func (w *World) drawPace(p *bus.PaceConfig) {
	p.Ack = []bus.AckPace{bus.AckAuto, bus.AckAuto, bus.AckOff, 1, 3, 20}[w.rng.IntN(6)]
	p.Floor = 1 + int32(w.rng.IntN(10))
	p.Ceiling = p.Floor + int32(w.rng.IntN(20))
	p.Hold = w.between(time.Second, 40*time.Second)
	p.MaxHeld = 1 + int32(w.rng.IntN(30))
	p.MaxRooms = 1 + int32(w.rng.IntN(10))
	p.MaxDestinations = p.MaxHeld + 1 + int32(w.rng.IntN(30))
	p.MaxBytes = sched.Bytes(p.MaxDestinations)*sched.KiB + 4*sched.KiB
	p.SmallRoom = 1 + int32(w.rng.IntN(8))
	p.Prompt = 1 + int32(w.rng.IntN(30))
}

// startOutbox makes the disk and the homeserver, and has things happen.
func (w *World) startOutbox() {
	o := w.out
	o.disk = &disk{w: w, failures: []int{0, 0, 3, 15}[w.rng.IntN(4)], maxDestItems: o.profile.Items,
		maxItems: o.profile.Items * (2 + w.rng.IntN(len(w.remotes))), maxDests: int(w.profile.Config.Outbox.MaxQueues),
		packPDUs: 1 + w.rng.IntN(20), packEDUs: 1 + w.rng.IntN(20)}
	if o.profile.Ill > 0 { // what else goes wrong has profiles of its own
		o.disk.failures, o.disk.maxItems = 0, 1000*len(w.remotes)
	}
	o.hs = &homeserver{w: w, users: 1 + w.rng.IntN(6), merges: w.rng.IntN(2) == 0, poison: []int{0, 3, 12}[w.rng.IntN(3)], versions: map[string]int64{}}
	if o.profile.Ill > 0 {
		o.hs.poison = 0
	}
	for i, r := range w.remotes {
		r.txState = txState{index: i, tries: map[string]*tries{}, content: map[string]string{}, reached: map[string]bool{},
			taken: map[string]bool{}, events: map[int]int64{}, versions: map[string]int64{}}
		if r.does != healthy && w.rng.IntN(2) == 0 {
			r.does = numBehaviours + behaviour(w.rng.IntN(int(numOutboxBehaviours-numBehaviours)))
		}
		o.disk.dests = append(o.disk.dests, &diskDest{r: r})
		o.hs.dests = append(o.hs.dests, &hsDest{r: r})
	}
	for i := range o.profile.Rooms {
		room := hsRoom{}
		most := len(w.remotes)
		if i > 0 {
			most = 1 + w.rng.IntN(4)
		}
		for j := range w.remotes {
			if i == 0 || len(room.members) < most && w.rng.IntN(3) == 0 {
				room.members = append(room.members, j)
			}
		}
		if len(room.members) == 0 {
			room.members = []int{w.rng.IntN(len(w.remotes))}
		}
		o.hs.rooms = append(o.hs.rooms, room)
	}
}

// scheduleOutbox has news, faults and admins come until the moment returned.
func (w *World) scheduleOutbox(end sched.Time) sched.Time {
	o := w.out
	at := w.now
	for range o.profile.News {
		at = at.Add(time.Duration(w.rng.ExpFloat64() * float64(o.profile.Gap)))
		w.future.Set(at, o.hs.happen)
	}
	end = max(at, end)
	moment := func() sched.Time { return w.now.Add(w.between(0, end.Sub(w.now)+1)) }
	if o.profile.Ill > 0 {
		return max(end, w.scheduleIllness())
	}
	if o.profile.Outage > 0 {
		from := w.now.Add(w.between(0, time.Minute))
		w.future.Set(from, func() { o.partition = true })
		end = max(end, from.Add(o.profile.Outage))
	}
	if w.rng.IntN(3) == 0 {
		o.disk.downFrom = moment()
		o.disk.downTo = o.disk.downFrom.Add(w.between(time.Second, 2*time.Minute))
	}
	for range w.rng.IntN(4) {
		w.future.Set(moment(), func() { w.admin(o.disk.dests[w.rng.IntN(len(w.remotes))]) })
	}
	if w.rng.IntN(3) == 0 {
		from := moment()
		w.future.Set(from, func() { o.suspended = true; w.step(bus.Suspended{Why: "simulated"}) })
		w.future.Set(from.Add(w.between(time.Second, time.Minute)), func() {
			o.suspended = false
			w.step(bus.Suspended{})
		})
	}
	for range w.rng.IntN(3) {
		w.future.Set(moment(), w.reconfigure)
	}
	for range w.rng.IntN(5) {
		w.future.Set(moment(), func() { w.step(bus.Pressure{Hundredths: int32(w.rng.IntN(10000))}) })
	}
	if w.rng.IntN(4) == 0 {
		w.future.Set(moment(), w.restart)
	}
	for range o.profile.Crashes {
		o.crashAt = append(o.crashAt, 20+w.rng.IntN(15*o.profile.News))
	}
	slices.Sort(o.crashAt)
	return end
}

// deaf reports whether the bus takes no connection.
func (w *World) deaf() bool { return w.out.draining || w.out.dead }

// admin has somebody interfere with a destination.
func (w *World) admin(dd *diskDest) {
	what := w.rng.IntN(8)
	if w.deaf() || w.healed {
		return
	}
	if what < 3 {
		w.flush(dd)
		return
	}
	w.out.disk.submit(func(ok bool) func() {
		switch {
		case !ok:
		case what < 6:
			w.Counts["hold"]++
			dd.held = true
			w.future.Set(w.now.Add(w.between(time.Second, time.Minute)), func() { w.unhold(dd) })
		default:
			w.Counts["drop"]++
			w.out.disk.drop(dd, what == 7)
		}
		return w.adjusted(dd)
	})
}

// adjusted tells the core what is pending now.
func (w *World) adjusted(dd *diskDest) func() {
	ev := bus.Adjusted{Dest: dd.r.name, Backlog: dd.backlog()}
	return func() { w.step(ev) }
}

// flush has a destination tried at once.
func (w *World) flush(dd *diskDest) {
	w.Counts["flush"]++
	dd.r.flushed, dd.r.freed = true, true
	w.step(bus.Flush{Dest: dd.r.name})
}

// unhold lets deliveries go on; it is repeated when it is lost in a crash.
func (w *World) unhold(dd *diskDest) {
	if !dd.held || w.out.finished {
		return
	}
	w.future.Set(w.now.Add(10*time.Second), func() { w.unhold(dd) })
	if w.deaf() {
		return
	}
	w.out.disk.submit(func(ok bool) func() {
		if ok {
			dd.held = false
		}
		return w.adjusted(dd)
	})
}

func (w *World) reconfigure() {
	c := &w.profile.Config
	c.Workers = sched.Slots(8 + w.rng.IntN(20))
	c.Unknown = 1 + sched.Slots(w.rng.IntN(int(c.Workers)))
	c.Failing = 1 + sched.Slots(w.rng.IntN(int(c.Workers)))
	c.MaxHosts = max(c.MaxRequests+3*int32(c.Workers)+5+int32(w.rng.IntN(20)), int32(len(w.remotes))+1)
	w.drawPace(&c.Outbox.Pace)
	// What was accepted under the old hold keeps to the longer of both.
	for _, o := range w.out.offers {
		o.loose = true
	}
	w.Counts["reconfigured"]++
	w.step(bus.Reconfigured{Config: *c})
}

// restart ends the process in good order, and starts it again.
func (w *World) restart() {
	if w.deaf() || w.healed {
		return
	}
	w.Counts["drain"]++
	w.drain(w.now.Add(w.between(0, 20*time.Second)), func() {
		w.out.hs.broke()
		w.boot()
	})
}

// drain has the core come to its end; what is stored is answered by a moment.
func (w *World) drain(by sched.Time, then func()) {
	o := w.out
	o.draining, o.drained = true, then
	w.at(by.Sub(w.now)+time.Millisecond, func() {
		for _, of := range o.offers { // any that fails will do
			if of.accepted != 0 && of.accepted < by && !of.ended {
				w.failf("transaction %d is not answered by the moment by which it was to be", of.req)
			}
		}
	})
	// An accept may take seconds, an attempt its minute, and the disk again.
	w.at(by.Sub(w.now)+90*time.Second, func() {
		switch {
		case w.drained:
		case !w.asks():
			w.failf("not drained 90 s after the moment by which all is answered")
		case then != nil: // requests may take ten minutes; nobody waits for them
			w.Counts["killed"]++
			then()
		}
	})
	w.step(bus.Draining{By: by})
}

// asks reports whether requests are under way.
func (w *World) asks() bool {
	for _, r := range w.reqs { // any will do
		if !r.ended {
			return true
		}
	}
	for _, a := range w.atts {
		if a.txn == nil && !a.done {
			return true
		}
	}
	return false
}

func (w *World) hasDrained() {
	w.noneUnderWay("drained")
	o := w.out
	w.at(0, func() {
		if then := o.drained; then != nil {
			o.drained = nil
			then()
		}
	})
}

// healOutbox ends all faults but one, and waits for all to be delivered.
func (w *World) healOutbox() {
	o := w.out
	w.healed = true
	o.partition, o.suspended, o.crashAt = false, false, nil
	o.disk.failures, o.disk.downTo = 0, 0
	for _, r := range w.remotes {
		if r.does != broken || w.rng.IntN(2) == 0 {
			r.does = healthy
		}
	}
	if w.deaf() { // it has not come back yet
		w.future.Set(w.now.Add(3*time.Minute), w.healOutbox)
		return
	}
	w.step(bus.Suspended{})
	flush := w.rng.IntN(2) == 0
	for _, dd := range o.disk.dests {
		if dd.held {
			w.unhold(dd)
		}
		if flush {
			w.flush(dd)
		}
	}
	until := w.now.Add(20 * 24 * time.Hour) // a day for each item that is refused
	var look func()
	look = func() {
		switch {
		case w.isDelivered():
			o.finished = true
			w.drain(w.now.Add(5*time.Second), nil)
		case w.now > until:
			w.failf("twenty days after healing not all is delivered:%s", w.undelivered())
		default:
			w.future.Set(w.now.Add(2*time.Minute), look)
		}
	}
	w.future.Set(w.now.Add(time.Minute), look)
}

// bootOutbox forgets what a crash loses.
func (w *World) bootOutbox() {
	o := w.out
	for _, r := range w.remotes {
		if a := r.delivering; a != nil && a.sent && w.rng.IntN(2) == 0 && !r.refuses(a.txn) {
			w.takes(r, a.txn) // it was on its way
		}
		r.busy, r.delivering = "", nil
	}
	for _, of := range o.offers {
		of.ended = true
	}
	o.offers, o.packs = map[bus.ReqID]*offer{}, map[bus.BatchID]*packed{}
	o.draining, o.dead, o.suspended = false, false, false
	o.disk.last, o.disk.reported = 0, 0
	o.drained = nil
}

// cutByCrash drops what the core wants done after the moment at which it dies.
func (w *World) cutByCrash(effects []bus.Effect) []bus.Effect {
	o := w.out
	if len(o.crashAt) == 0 || w.Steps < o.crashAt[0] {
		return effects
	}
	o.crashAt = o.crashAt[1:]
	o.dead = true
	return effects[:w.rng.IntN(len(effects)+1)]
}

// outboxEffect executes an effect of the outbox; false if it is none.
func (w *World) outboxEffect(e bus.Effect) bool {
	o := w.out
	switch e := e.(type) {
	case bus.Send:
		if e.Batch == 0 && e.Control == "" {
			return false
		}
		w.deliver(e)
	case bus.Refuse:
		of := o.offers[e.Req]
		if of == nil {
			return false
		}
		if e.Status != 503 {
			w.failf("transaction %d is refused with %d", e.Req, e.Status)
		}
		w.endOffer(e.Req, "refused")
		o.hs.failed(of.dest, of.txn)
	case bus.Free:
		of := o.offers[e.Req]
		if of == nil {
			return false
		}
		if of.freed || of.asked && of.accepted == 0 {
			w.failf("Free of transaction %d: freed %t, still with the store", e.Req, of.freed)
		}
		of.freed = true
	case bus.Acknowledge:
		w.acknowledge(e.Req)
	case bus.Accept, bus.Pack, bus.Settle, bus.Compact, bus.Expire:
		o.disk.execute(e)
	case bus.Unpack:
		p := o.packs[e.Batch]
		if p == nil || p.unpacked || p.dest.r.delivering != nil && p.dest.r.delivering.txn == p {
			w.failf("Unpack of batch %d, which is not held or on its way", e.Batch)
		}
		p.unpacked = true
	default:
		return false
	}
	return true
}

// deliver sends a transaction and decides what comes of it.
func (w *World) deliver(e bus.Send) {
	h := w.byName[e.Dest]
	p := w.mayDeliver(h, e)
	a := &attempt{id: e.Op, host: h, txn: p}
	w.atts[e.Op] = a
	h.delivering = a
	w.Counts["delivery"]++
	if p.again {
		w.Counts["same id again"]++
	}
	w.limits(a, e.Class)
	h.triedAt = w.now

	does := w.does(h)
	latency := w.between(time.Millisecond, 300*time.Millisecond)
	if h.connected && (does == refuses || does == noName || does == hangs) {
		w.reaches(a)
		w.at(latency, func() { h.connected = false; w.finish(a, matrix.FailReset) })
		return
	}
	connect := w.between(time.Millisecond, 200*time.Millisecond)
	switch {
	case does == servfail:
		w.at(connect, func() { w.finish(a, matrix.FailDNS) })
		return
	case does == expiredCert:
		w.at(connect, func() { w.finish(a, matrix.FailTLS) })
		return
	case does == refuses && w.out.partition:
		w.at(connect, func() { w.finish(a, matrix.FailUnreachable) })
		return
	case does == refuses:
		w.at(connect, func() { w.finish(a, matrix.FailRefused) })
		return
	case does == noName:
		w.at(connect, func() { w.finish(a, matrix.FailNoName) })
		return
	case does == hangs:
		w.at(8*time.Second, func() { w.finish(a, matrix.FailTimeout) })
		return
	case h.connected:
		connect = 0
		w.reaches(a)
	default:
		w.at(connect, func() {
			if !a.done {
				h.connected, h.failures = true, 0
				w.reaches(a)
				w.step(bus.Connected{Op: a.id})
			}
		})
	}
	switch does {
	case slow:
		latency = w.between(time.Second, 20*time.Second)
	case resets, resetsAtOnce:
		w.at(connect+latency, func() { h.connected = false; w.finish(a, matrix.FailReset) })
		return
	case mute:
		if w.rng.IntN(2) == 0 {
			w.at(connect+latency, func() {
				if !a.done && !h.refuses(p) {
					h.flaky = true
					w.takes(h, p)
				}
			})
		}
		return // until it is cancelled
	}
	w.at(connect+latency, func() {
		if a.done {
			return
		}
		w.handles(a, does)
	})
}

// refuses reports whether a remote that can be reached will not take it.
func (h *remote) refuses(p *packed) bool {
	return h.does == broken || slices.ContainsFunc(p.items, func(it *item) bool { return it.poison })
}

// handles is what a remote does with a transaction that has arrived.
func (w *World) handles(a *attempt, does behaviour) {
	h, p := a.host, a.txn
	status, retry, end := 200, time.Duration(0), matrix.FailNone
	coin := w.rng.IntN(2) == 0
	switch {
	case does == limits && coin:
		status, retry = 429, w.between(0, 5*time.Second)
	case does == gatewayDown:
		status = 502 + w.rng.IntN(3)
	case does == denies:
		status = []int{401, 403, 404}[h.index%3]
	case does == blocks:
		status = 403
	case does == limitsAll:
		status = 429
	case does == strange:
		end = matrix.FailContent
	case h.taken[p.id]:
		// It answers as the first time.
	case h.refuses(p):
		status = 500
	default:
		w.takes(h, p)
	}
	if status == 200 && end == matrix.FailNone && coin {
		switch does {
		case loses:
			h.flaky = true
			w.finish(a, matrix.FailReset)
			return
		case cuts:
			h.flaky = true
			end = matrix.FailCut
		}
	}
	if status < 502 {
		h.failures = 0
	}
	a.answered, a.status = true, status
	w.heard(h, status != 429 && status < 502)
	w.Counts[fmt.Sprintf("status %d", status)]++
	w.at(w.between(0, 100*time.Millisecond), func() { w.finish(a, end) })
	w.step(bus.Answered{Op: a.id, Status: status, RetryAfter: retry})
}

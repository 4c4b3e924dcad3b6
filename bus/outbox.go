package bus

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// outbox is the part of the core that takes over the homeserver's transactions
// and delivers them. What is pending is in the store; here is what is known of it.
type outbox struct {
	queues map[matrix.ServerName]*queue
	offers map[ReqID]*offer
	pacer  *Pacer
	acks   []ReqID // scratch

	// active are the queues that have a call. Those that want one and find no
	// place stand in lines, by class; one that gets something better stands in a
	// better line, too. Those of failing hosts are probes: they have few of the
	// places, since each may keep its own for long, and the last line, number 0.
	active, probes sched.Gauge
	lines          [matrix.NumClasses + 1]sched.FIFO[*queue]

	packs   map[BatchID]*call
	settles map[BatchID]*settling
	trims   map[BatchID]*queue // nil: the sweep of all

	handedAt sched.Time // when something was handed over last, or the module asked
	hands    bool       // that has ever been

	served    sched.Time // when a fetch of our keys last ended waits
	unsettled int        // outcomes that the store could not note, and is asked to again

	txnPrefix string
	txns      uint64
	suspended string // why nothing is delivered; "" if it is
	sweep     *sched.Timer[timer]
	sweeping  bool

	stats OutboxStats
}

// offer is a transaction of the homeserver that has not been answered.
type offer struct {
	dest   matrix.ServerName
	txn    PaceTxn
	stored bool // the pacer decides when it is answered
	gone   bool // nobody listens any more, but the store has been asked
}

// settling is what the store was asked to note of a transaction.
type settling struct {
	queue   *queue
	id      string
	outcome Outcome
	reason  string
}

// queue is what is known of a destination that has something pending.
type queue struct {
	name matrix.ServerName
	Backlog
	call *call // that is to deliver, or does
	busy bool  // the store is changing what is pending: nothing may be packed

	unnoted bool // the store could not note what became of the last batch, and is asked again

	due       sched.Time // when what was accepted last is to go; 0: nothing was since the last batch
	left      bool       // something is pending that has waited long enough for company
	packed    int64      // how many items were pending when the last batch was packed
	notBefore sched.Time // the queue's own back-off, or its place after a start
	waits     waits      // what notBefore is for
	timer     *sched.Timer[timer]
	listed    bool   // stands in line
	inLines   uint16 // a bit for each line that has an entry for it, perhaps one that is out of date

	failures     int32      // deliveries in a row that did not go well
	since        sched.Time // when the first of them ended
	verdict      verdict    // what came of the last
	refusals     int32      // of the same batch in a row, with the same verdict
	refusedSince sched.Time // when the first of these ended
	trial        trial
	suspect      string     // the id of the batch that the trial is about
	takes        bool       // has taken some of the batch of which it refuses others
	barren       bool       // has taken nothing since an item was set aside
	revived      sched.Time // when a sign of life ended its own back-off last
	lastError    string
	lastTry      sched.Time
	compacted    sched.Time
	fullAt       sched.Time // when something was refused because it has too much
}

// waits says why a queue waits for its notBefore.
type waits uint8

const (
	waitsStart waits = iota // destinations are begun with one after the other
	waitsHost               // for nothing of its own: its host could not be reached
	waitsOwn                // for what the last delivery came to, or for a fault of ours
	waitsStore              // the store could not write
)

func (o *outbox) init(rng uint64) {
	o.queues = make(map[matrix.ServerName]*queue)
	o.offers = make(map[ReqID]*offer)
	o.packs = make(map[BatchID]*call)
	o.settles = make(map[BatchID]*settling)
	o.trims = make(map[BatchID]*queue)
	// Ids must differ from the homeserver's, which are numbers, and from those
	// of the time before the last start, whatever the clock says.
	o.txnPrefix = "fsbus" + strconv.FormatUint(rng, 36) + "-"
}

func (m *Machine) configureOutbox() {
	o := &m.outbox
	if m.cfg.Outbox.MaxQueues == 0 {
		return
	}
	// What is left beside requests, attempts, servers asked for their own keys, and
	// those connected to ahead.
	o.active.Limit = sched.Slots(m.cfg.MaxHosts-m.cfg.MaxRequests) - 2*m.cfg.Workers - aheadAtOnce - 1
	o.probes.Limit = min(probesEach*m.cfg.Failing, max(1, o.active.Limit/2))
	if o.pacer == nil {
		o.pacer = NewPacer(m.cfg.Outbox.Pace)
		return
	}
	o.pacer.Configure(m.cfg.Outbox.Pace)
	m.admit()
}

// waiting is how many requests of the homeserver have not been answered.
func (m *Machine) waiting() int {
	return len(m.reqs) + len(m.outbox.offers) + len(m.keys.byReq) + m.answers.parked
}

func (m *Machine) offered(ev Offered) {
	o := &m.outbox
	if m.cfg.Outbox.MaxQueues == 0 {
		panic(fmt.Sprintf("bus: transaction %d is offered, but there is no outbox", ev.Req))
	}
	if m.reqs[ev.Req] != nil || o.offers[ev.Req] != nil {
		panic(fmt.Sprintf("bus: request %d arrived twice", ev.Req))
	}
	m.stats.Requests[ev.Class]++
	if m.waiting() >= int(m.cfg.MaxRequests) {
		m.refuseOffer(ev.Req, "fsbus: too many requests are waiting")
		m.emit(Free{ev.Req})
		return
	}
	o.offers[ev.Req] = &offer{dest: ev.Dest, txn: ev.Pace}
	m.emit(Accept{Req: ev.Req})
}

// refuseOffer answers a transaction in such a way that the homeserver keeps it and
// tries again.
func (m *Machine) refuseOffer(req ReqID, text string) {
	m.stats.Refused[5]++
	m.emit(Refuse{Req: req, Status: 503, Code: matrix.MUnknown, Text: text})
}

// accepted: the store has taken a transaction over, or has not.
func (m *Machine) accepted(ev Accepted) {
	o := &m.outbox
	of := o.offers[ev.Req]
	if of == nil || of.stored {
		panic(fmt.Sprintf("bus: transaction %d is accepted, which was not offered (%d were)", ev.Req, len(o.offers)))
	}
	m.emit(Free{ev.Req})
	if ev.Fault != AcceptedOK {
		delete(o.offers, ev.Req)
		m.notAccepted(of, ev)
		return
	}
	if ev.Repeated {
		o.stats.Repeated++
	} else {
		o.stats.Accepted++
		o.stats.Merged += int64(ev.Merged)
		o.stats.Duplicates += int64(ev.Duplicates)
		for k, n := range ev.Kinds {
			o.stats.ItemsIn[k] += int64(n)
		}
	}
	if came := (Backlog{Items: ev.Kinds}); came.durable() && !ev.Repeated {
		m.writtenTo(of.dest)
	}
	m.backlog(of.dest, ev.Backlog, ev.Kinds, o.pacer.Pause(m.now, of.txn))
	if of.gone {
		delete(o.offers, ev.Req)
		return
	}
	of.stored = true
	if h := m.hosts[of.dest]; h != nil {
		of.txn.Away = h.Failures > 0 && !h.reachable
		of.txn.Slow = h.took >= slow
	}
	if o.handsOver(m.now) {
		o.pacer.Pass(m.now, ev.Req)
	} else {
		o.pacer.Held(m.now, ev.Req, of.dest, of.txn)
	}
	of.txn = PaceTxn{}
}

func (m *Machine) notAccepted(of *offer, ev Accepted) {
	o := &m.outbox
	text := "fsbus: the outbox could not store the transaction"
	if ev.Fault == AcceptedFull {
		o.stats.Full++
		text = fmt.Sprintf("fsbus: the outbox holds as much for %s as it may: %s", of.dest, cut(ev.Detail))
		if q := o.queues[of.dest]; q != nil {
			q.fullAt = m.now
			if q.call == nil && !q.busy {
				m.rest(q)
			}
		}
	} else {
		o.stats.NotStored++
	}
	if !of.gone {
		m.refuseOffer(ev.Req, text)
	}
}

// backlog notes what the store holds for a destination, and how soon what came
// with it must go: not before pause is over.
func (m *Machine) backlog(dest matrix.ServerName, b Backlog, came [matrix.NumKinds + 1]int32, pause time.Duration) {
	o := &m.outbox
	q := o.queues[dest]
	if q == nil {
		if b.Total() == 0 && !b.Held || o.pacer == nil {
			return
		}
		q = m.newQueue(dest)
	}
	q.Backlog = b
	if window, any := m.window(came); any {
		if window = max(window, pause); b.class() == matrix.ClassPresence {
			window = max(window, m.patient(dest))
		}
		if due := m.now.Add(window); q.due == 0 || due < q.due {
			q.due = due
		}
	}
	m.plan(q)
}

// newQueue returns the queue of a destination of which nothing was pending.
func (m *Machine) newQueue(dest matrix.ServerName) *queue {
	q := &queue{name: dest}
	if h := m.hosts[dest]; h != nil && h.former != nil {
		q, h.former = h.former, nil
		q.due, q.left = 0, false
	}
	m.outbox.queues[dest] = q
	return q
}

// endQueue forgets a queue of which nothing is pending, but not that it has
// failed, as long as its host is known: whoever refuses what expires meanwhile
// would else be tried as if for the first time.
func (m *Machine) endQueue(q *queue) {
	delete(m.outbox.queues, q.name)
	if h := m.hosts[q.name]; h != nil && (q.failures > 0 || q.barren) {
		h.former = q
	}
}

// slow is the time from which on an answer to a transaction counts as slow. Such
// hosts have workers of their own: each keeps one busy for that long.
const slow = time.Second

// patient is how long what is least important waits for a destination that is
// slow to answer. An event that comes while such a transaction is under way would
// have to wait for its end.
func (m *Machine) patient(dest matrix.ServerName) time.Duration {
	h := m.hosts[dest]
	if h == nil || h.took < slow {
		return 0
	}
	return min(2*h.took, m.cfg.Outbox.PresenceWindow)
}

// window is how long what came may wait for company.
func (m *Machine) window(came [matrix.NumKinds + 1]int32) (least time.Duration, any bool) {
	for k, n := range came {
		if n == 0 {
			continue
		}
		d := time.Duration(0)
		switch matrix.Kind(k) {
		case matrix.KindPresence:
			d = m.cfg.Outbox.PresenceWindow
		case matrix.KindReceipt:
			d = m.cfg.Outbox.ReceiptWindow
		case matrix.KindTyping:
			d = m.cfg.Outbox.TypingWindow
		}
		if !any || d < least {
			least, any = d, true
		}
	}
	return least, any
}

// class is that of a transaction of what is pending.
func (b *Backlog) class() matrix.Class {
	switch {
	case b.Items[matrix.KindPDU] > 0:
		return matrix.ClassEvent
	case b.Items[matrix.KindToDevice]+b.Items[matrix.KindDeviceList]+b.Items[matrix.KindSigningKey]+b.Items[matrix.KindOther] > 0:
		return matrix.ClassDevice
	}
	return matrix.ClassPresence
}

// plan sees to it that what is pending is sent when it may be: it is called
// whenever that may have changed.
func (m *Machine) plan(q *queue) {
	if q.busy {
		return
	}
	if c := q.call; c != nil {
		m.hasten(q, c)
		return
	}
	at, ok := m.nextTry(q)
	switch {
	case !ok:
		m.timers.Stop(q.timer)
		q.timer = nil
		if q.Total() == 0 && !q.Held {
			m.endQueue(q)
		}
	case at > m.now:
		if q.timer == nil || q.timer.At != at {
			m.timers.Stop(q.timer)
			q.timer = m.timers.Set(at, timer{queue: q})
		}
	default:
		m.timers.Stop(q.timer)
		q.timer = nil
		m.activate(q)
	}
}

// nextTry returns when the queue may be sent from; ok is false if that is not
// for time to tell.
func (m *Machine) nextTry(q *queue) (at sched.Time, ok bool) {
	if q.Total() == 0 || q.Held || m.outbox.suspended != "" || m.draining {
		return 0, false
	}
	if at = max(q.due, q.notBefore); q.left || at == 0 {
		at = max(m.now, q.notBefore)
	}
	if q.trial.asks() {
		at = m.now
	}
	if h := m.hosts[q.name]; h != nil {
		if h.Failures > 0 && !h.reachable {
			at = max(at, h.NextTry)
		}
		at = max(at, h.pausedUntil)
	}
	return at, true
}

// activate makes a call for the queue, or puts it in line for one.
func (m *Machine) activate(q *queue) {
	o := &m.outbox
	h := m.hosts[q.name]
	class := q.class()
	line, probe := class, h != nil && h.lane(m.now) == laneFailing
	if probe {
		line = 0
	}
	if o.active.Free() == 0 || probe && o.probes.Free() == 0 {
		q.listed = true
		if q.inLines&(1<<line) == 0 {
			q.inLines |= 1 << line
			o.lines[line].Push(q)
		}
		return
	}
	q.listed = false // whatever entries there are
	if h == nil {
		h = m.newHost(q.name)
	}
	o.active.Take()
	if probe {
		o.probes.Take()
	}
	q.call = &call{queue: q, probe: probe, host: h, endpoint: sendEndpoint, class: class, queued: m.now}
	m.enqueue(q.call)
}

// sendEndpoint is the row of what is delivered.
var sendEndpoint = matrix.Match("PUT", "/_matrix/federation/v1/send/1")

// hasten moves a call that waits to a better class if something better came.
func (m *Machine) hasten(q *queue, c *call) {
	class := q.class()
	if c.phase != phaseWaiting || class >= c.class {
		return
	}
	m.unqueue(c)
	q.call = &call{queue: q, probe: c.probe, host: c.host, endpoint: sendEndpoint, class: class, queued: c.queued}
	m.enqueue(q.call)
}

// unqueue takes a call that waits out of its host's queue.
func (m *Machine) unqueue(c *call) {
	c.phase = phaseEnded
	c.host.waiting[c.class]--
	c.host.compact(c.class)
	m.touch(c.host)
}

// leave ends a queue's call, and has others that wait for its place go on.
func (m *Machine) leave(q *queue) {
	o := &m.outbox
	if q.call.batch != 0 && m.outbox.packs[q.call.batch] == nil {
		m.emit(Unpack{q.call.batch})
	}
	if q.call.probe {
		o.probes.Give()
	}
	q.call.phase = phaseEnded
	q.call = nil
	o.active.Give()
	m.admit()
}

// admit gives free places to those that stand in line for one.
func (m *Machine) admit() {
	o := &m.outbox
	for line := 1; line < len(o.lines); line++ {
		for o.active.Free() > 0 && m.admitOne(line) {
		}
	}
	for o.active.Free() > 0 && o.probes.Free() > 0 && m.admitOne(0) {
	}
}

// admitOne takes the first out of a line; false if nobody stands there.
func (m *Machine) admitOne(line int) bool {
	next, ok := m.outbox.lines[line].Pop()
	if !ok {
		return false
	}
	next.inLines &^= 1 << line
	if next.listed && m.outbox.queues[next.name] == next {
		next.listed = false
		m.plan(next)
	}
	return true
}

// wake has a queue tried whose destination has just shown that it can be reached. That it
// answers something else does not say that it takes what it did not take.
func (m *Machine) wake(h *host) {
	if p := m.outbox.pacer; p != nil {
		p.Reach(m.now, h.Name, false)
	}
	q := m.outbox.queues[h.Name]
	if q == nil || q.call != nil || q.busy {
		return
	}
	if q.waits == waitsStart || q.waits == waitsHost {
		q.notBefore = 0
	}
	m.plan(q)
}

// handoverFor is for how long after a hand-over, or after the module asked, answers to
// transactions are not held: what still comes as one is what events may have to wait for,
// and holding it back makes the homeserver merge no more.
const handoverFor = 5 * time.Minute

// handedOver: the store has taken over what was handed over for a destination.
func (m *Machine) handedOver(ev HandedOver) {
	o := &m.outbox
	o.handedAt, o.hands = m.now, true
	if ev.Dest == "" { // the module has only asked
		return
	}
	o.stats.Merged += int64(ev.Merged)
	o.stats.Duplicates += int64(ev.Duplicates)
	for k, n := range ev.Kinds {
		o.stats.ItemsIn[k] += int64(n)
	}
	if came := (Backlog{Items: ev.Kinds}); came.durable() {
		m.writtenTo(ev.Dest)
	}
	m.backlog(ev.Dest, ev.Backlog, ev.Kinds, 0)
}

// handsOver reports whether the homeserver hands over.
func (o *outbox) handsOver(now sched.Time) bool {
	return o.hands && now.Sub(o.handedAt) < handoverFor
}

// adjusted: an admin has changed what the store holds.
func (m *Machine) adjusted(ev Adjusted) {
	m.backlog(ev.Dest, ev.Backlog, [matrix.NumKinds + 1]int32{}, 0)
	q := m.outbox.queues[ev.Dest]
	if q == nil {
		return
	}
	if c := q.call; c != nil && c.phase == phaseWaiting && (q.Held || q.Total() == 0) {
		m.unqueue(c)
		m.leave(q)
		m.plan(q)
	}
}

// flush: an admin wants a destination to be tried now.
func (m *Machine) flush(dest matrix.ServerName) {
	q := m.outbox.queues[dest]
	if q == nil || q.call != nil {
		return
	}
	q.due, q.notBefore = m.now, 0
	if h := m.hosts[q.name]; h != nil {
		h.NextTry = min(h.NextTry, m.now)
		h.pausedUntil = min(h.pausedUntil, m.now)
	}
	m.plan(q)
}

// suspend stops all deliveries, or lets them go on.
func (m *Machine) suspend(why string) {
	o := &m.outbox
	o.suspended = why
	if why != "" {
		return // calls that wait find out when their turn comes
	}
	for _, q := range o.inOrder() {
		m.plan(q)
	}
}

// inOrder returns the queues in an order that does not depend on chance.
func (o *outbox) inOrder() []*queue {
	all := make([]*queue, 0, len(o.queues))
	for _, q := range o.queues {
		all = append(all, q)
	}
	slices.SortFunc(all, func(a, b *queue) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	return all
}

// restoreQueues takes over what the store holds. The destinations are begun with
// one after the other: all at once would be a storm of our own making.
func (m *Machine) restoreQueues(list []QueueRecord) {
	o := &m.outbox
	if o.pacer == nil {
		return // there is no outbox
	}
	spread := min(time.Duration(len(list))*spreadEach, maxSpread)
	for _, r := range list {
		if o.queues[r.Name] != nil || r.Backlog.Total() == 0 && !r.Backlog.Held {
			continue
		}
		q := &queue{name: r.Name, Backlog: r.Backlog, due: m.now}
		q.notBefore = m.now.Add(time.Duration(m.rng.Int64N(int64(spread) + 1)))
		o.queues[r.Name] = q
		m.plan(q)
	}
}

// sweepSoon sets the timer of the next sweep while there is something pending.
func (m *Machine) sweepSoon() {
	o := &m.outbox
	if o.sweep == nil && !o.sweeping && len(o.queues) > 0 && !m.draining {
		o.sweep = m.timers.Set(m.now.Add(sweepEvery), timer{sweep: true})
	}
}

// underWay is how much the store is doing for the outbox.
func (o *outbox) underWay() int { return len(o.packs) + len(o.settles) + len(o.trims) }

// release has those answers given whose time has come.
func (m *Machine) release() {
	o := &m.outbox
	if o.pacer == nil {
		return
	}
	o.acks = o.pacer.Release(m.now, o.acks[:0])
	for _, req := range o.acks {
		delete(o.offers, req)
		m.stats.Answered++
		m.emit(Acknowledge{req})
	}
}

// offerGone: the homeserver gave a transaction up.
func (m *Machine) offerGone(id ReqID, of *offer) {
	m.stats.Gone++
	if !of.stored {
		of.gone = true
		return
	}
	m.outbox.pacer.Gone(m.now, id)
	delete(m.outbox.offers, id)
}

package edge

import (
	"fmt"
	"math/bits"
	"time"

	"fsbus/sched"
)

// laneID says what of the homeserver a call uses: so that a slow transaction is in
// nobody's way who only asks, and the other way round.
type laneID uint8

const (
	laneTxn laneID = iota
	laneOther
	numLanes
)

// The transactions of one size cost about the same. What is asked for with other
// requests does not, so there the times of one kind may differ by more.
func (w *window) init(l laneID) {
	switch l {
	case laneTxn:
		w.least, w.near, w.far = 1, 1500, 2000
	default:
		w.least, w.near, w.far = 2, 2500, 4000
	}
}

var laneNames = [numLanes]string{"transactions", "requests"}

// stallAfter is how long an attempt may take and still count. What takes longer
// waits for something, such as another server's keys, rather than for a processor.
const stallAfter = time.Second

// lane is how much the homeserver is given at a time of one sort.
type lane struct {
	window  window
	slots   sched.Gauge
	running [NumBands]sched.Slots
	stalled int32 // that run for longer than stallAfter
	slow    int32 // those, and others of origins that are slow

	breaking int32                  // broken off, but not over
	broken   sched.FIFO[sched.Time] // when some were in the last breakWindow
	again    sched.Time             // when the next one may be, if there is need; 0: there is not
}

// spare is how many of a lane's places are kept from what stalls: a quarter.
func (l *lane) spare(places int32) int32 { return min(places, max(l.window.least, places/4)) }

// slowMost is how many places the origins that are slow may take.
func (l *lane) slowMost() int32 { return max(1, l.window.most-l.spare(l.window.most)) }

// share is a band's share, with all below it, of so many places.
func share(b Band, places int32) int32 {
	return max(1, int32(int64(places)*bands[b].share/1000))
}

func (l *lane) resize() {
	l.slots.Limit = sched.Slots(min(l.window.most, l.window.size+l.stalled))
}

// room reports whether a band may take one more place of its lane: it and each
// better one, with all that is below them, must keep to their shares. If it may not,
// full is the band whose share is taken.
func (l *lane) room(b Band) (ok bool, full Band) {
	var held sched.Slots
	for d := Band(NumBands); d > 0; {
		d--
		if bands[d].lane != bands[b].lane {
			continue
		}
		held += l.running[d]
		if d <= b && held >= sched.Slots(share(d, int32(l.slots.Limit))) {
			return false, d
		}
	}
	return true, 0
}

// candidate returns the next call of a band for which there is a place.
func (m *Machine) candidate(b Band) *call {
	id := bands[b].lane
	l := &m.lanes[id]
	o := m.turnOf(b, l)
	if o == nil {
		return nil
	}
	if l.slots.Free() == 0 {
		l.window.wanted = true
	}
	if id == laneTxn && m.record.total() >= maxRecording {
		return nil
	}
	if b == BandEphemeral {
		if ok, _ := m.mayPace(); !ok {
			return nil
		}
	}
	if ok, full := l.room(b); !ok {
		if (!o.late[b] || b == BandJoin) && b != BandEphemeral {
			m.makeWay(id, full)
		}
		return nil
	}
	return o.nextCall(b)
}

// turnOf returns the origin whose turn is next in a band. Those that the homeserver was
// slow about come after the others, unless they have waited for long, and all of them
// take no more than their part of the lane.
func (m *Machine) turnOf(b Band, l *lane) *origin {
	o, late := m.ready[b].first(false), m.ready[b].first(true)
	patience := lateAfter
	switch {
	case late == nil:
		return o
	case b == BandJoin: // whose room takes the homeserver long says nothing about the server
		patience = 0
	case l.slow >= l.slowMost():
		return o
	}
	if o == nil {
		return late
	}
	if since := late.nextCall(b).queued; m.now.Sub(since) >= patience && since < o.nextCall(b).queued {
		return late
	}
	return o
}

// makeWay breaks off a stalled attempt of a band or one below it, if these leave too
// little of its share to the others: one that nobody waits for, or the one that has run
// for longest. The homeserver goes on with a transaction, and knows it when it is sent
// again. But if it is short of processor time, to give it more makes all worse.
func (m *Machine) makeWay(id laneID, full Band) {
	l := &m.lanes[id]
	if l.stalled == 0 || l.breaking > 0 || m.pressure >= hard {
		return
	}
	var stalled int32
	var v *call
	for _, c := range m.ops { // in any order: only one is before all the others
		if !c.stalled || c.band < full || bands[c.band].lane != id {
			continue
		}
		stalled++
		if c.breakable() && (v == nil || c.before(v)) {
			v = c
		}
	}
	places := share(full, int32(l.slots.Limit))
	if v == nil || places-stalled >= min(share(full, l.window.size), l.spare(places)) {
		return
	}
	l.oldBreaks(m.now)
	if first, _ := l.broken.Peek(); l.broken.Len() >= l.mostBreaks() {
		l.again = first.Add(breakWindow)
		return
	}
	l.broken.Push(m.now)
	l.breaking++
	v.broken = true
	m.stats.BrokenOff++
	m.cancel(v)
}

func (l *lane) mostBreaks() int { return int(max(leastBreaks, l.window.most)) }

// oldBreaks forgets what was broken off longer ago than breakWindow.
func (l *lane) oldBreaks(now sched.Time) {
	for {
		at, ok := l.broken.Peek()
		if !ok || now.Sub(at) < breakWindow {
			return
		}
		l.broken.Pop()
	}
}

// breakable reports whether a stalled attempt may be broken off and made again later. A
// join's may not: it would come too late then.
func (c *call) breakable() bool {
	return c.band != BandJoin && c.long && !c.cancelled && c.status == 0 && (c.txn != nil || c.endpoint.CancelSafe && c.unknown+1 < maxTries)
}

// before reports whether an attempt is broken off rather than another.
func (c *call) before(v *call) bool {
	switch a, b := len(c.waiters) == 0, len(v.waiters) == 0; {
	case a != b:
		return a
	case c.started != v.started:
		return c.started < v.started
	}
	return c.op < v.op
}

// dispatch begins calls while the homeserver may be given more.
func (m *Machine) dispatch() {
	for i := range m.lanes {
		m.lanes[i].again = 0
	}
	for !m.over && m.home.mayTry(m.now) {
		var next [NumBands]*call
		var wanting uint32
		for b := range next {
			if next[b] = m.candidate(Band(b)); next[b] != nil {
				wanting |= 1 << b
			}
		}
		turn := m.turns.Pick(wanting)
		if turn < 0 {
			break
		}
		c := next[turn]
		// Whoever has waited for long may ride on a better band's turn. A join waits
		// for nobody, and presence is dropped rather than hurried.
		for b := turn + 1; Band(turn) != BandJoin && b < NumBands; b++ {
			old := next[b]
			if old != nil && bands[b].lane == bands[turn].lane && Band(b) != BandEphemeral &&
				old.queued < c.queued && m.now.Sub(old.queued) >= ageStep*time.Duration(b-turn) {
				c = old
				m.stats.Aged++
			}
		}
		m.begin(c)
	}
	m.setWake()
}

// setWake sets the timer for what waits for nothing but a moment that concerns all
// origins.
func (m *Machine) setWake() {
	var at sched.Time
	any := false
	for b := range m.ready {
		any = any || m.ready[b].Len() > 0
	}
	switch {
	case !any || m.over:
	case !m.home.mayTry(m.now):
		at = m.home.next
	case m.ready[BandEphemeral].Len() > 0:
		_, at = m.mayPace()
	}
	for i := range m.lanes {
		if again := m.lanes[i].again; again != 0 && (at == 0 || again < at) {
			at = again
		}
	}
	if at == 0 || m.wake != nil && m.wake.At <= at {
		return
	}
	m.timers.Stop(m.wake)
	m.wake = m.timers.Set(at, timer{wake: true})
}

// begin gives the homeserver a call that is its origin's next.
func (m *Machine) begin(c *call) {
	o, l := c.origin, &m.lanes[bands[c.band].lane]
	m.unlink(c)
	m.uncrowd(c)
	m.count(c, false)
	m.stats.waited(c.band, m.now.Sub(c.queued))
	// Behind the others: each origin has its turn.
	if o.ready[c.band] != nil {
		m.ready[c.band].remove(o, c.band)
	}
	if !c.charged {
		c.charged = true
		o.limiter.ReserveN(m.now.Std(), 1) // a join may leave the others in debt
	}
	if c.band == BandEphemeral && m.cfg.Ephemeral == PaceEphemeral {
		m.pace.ReserveN(m.now.Std(), 1)
	}
	l.slots.Take()
	l.running[c.band]++
	if c.txn != nil {
		o.current = c
	} else {
		o.running++
	}
	m.nextOp++
	c.op = m.nextOp
	c.phase = phaseRunning
	c.started = m.now
	c.status, c.retry, c.stalled, c.long = 0, 0, false, false
	if c.slow = o.isSlow(bands[c.band].lane, m.now); c.slow {
		l.slow++
	}
	if c.probe = m.home.down; c.probe {
		m.home.probing(m.now)
	}
	c.timer = m.timers.Set(m.now.Add(stallAfter), timer{call: c})
	m.ops[c.op] = c
	m.stats.Forwarded++
	m.emit(Forward{Op: c.op, Req: c.leader.Req})
	m.update(o)
}

// stall stops counting an attempt.
func (m *Machine) stall(c *call) {
	id := bands[c.band].lane
	l, o := &m.lanes[id], c.origin
	c.stalled = true
	l.stalled++
	if !c.slow {
		c.slow = true
		l.slow++
	}
	o.stalled[id]++
	o.slow[id] = m.now
	m.stats.Stalled++
	l.resize()
	m.update(o) // behind the others
}

// leaveHome gives back a call's place at the homeserver.
func (m *Machine) leaveHome(c *call) {
	id := bands[c.band].lane
	l := &m.lanes[id]
	l.slots.Give()
	l.running[c.band]--
	if c.stalled {
		c.stalled = false
		l.stalled--
		c.origin.stalled[id]--
		c.origin.slow[id] = m.now
	}
	if c.slow {
		c.slow = false
		l.slow--
	}
	if c.broken {
		l.breaking--
	}
	l.resize()
	m.timers.Stop(c.timer)
	c.timer = nil
	if c.txn == nil {
		c.origin.running--
	}
}

// answered notes the headers of an answer. A transaction's answer is passed on when
// all of it is there, since it is stored first.
func (m *Machine) answered(c *call, ev Answered) {
	if c.status != 0 || ev.Status < 100 {
		panic(fmt.Sprintf("edge: attempt %d is answered with status %d after %d", c.op, ev.Status, c.status))
	}
	c.status, c.retry = ev.Status, ev.RetryAfter
	m.stats.Statuses[min(ev.Status/100, 5)]++
	l := &m.lanes[bands[c.band].lane]
	if !gateway(ev.Status) {
		m.homeWorks()
		if !c.origin.stranger && ev.Status < 500 && ev.Status != 429 {
			l.window.answered(m.now, c.kind(), m.now.Sub(c.started), m.pressure < hard)
			l.resize()
			if c.band == BandEphemeral {
				m.tookEphemeral(c)
			}
		}
	}
	if c.txn == nil {
		m.replyAll(c)
	}
}

// kind names what the answer times of like calls are compared with.
func (c *call) kind() kind {
	if c.txn != nil {
		return kind{bands[c.band].name, bits.Len32(uint32(max(0, c.txn.PDUs+c.txn.EDUs)))}
	}
	return kind{name: c.endpoint.Name}
}

// gateway reports whether a status comes from something in front of a homeserver
// that is down.
func gateway(status int) bool { return status >= 502 && status <= 504 }

func (m *Machine) done(c *call, ev Done) {
	delete(m.ops, c.op)
	m.leaveHome(c)
	m.stats.Failures[ev.Failure]++
	lost := c.status == 0 && (ev.Unsent || ev.Failure.NeverConnected())
	if !c.cancelled {
		m.homeEnded(c, ev, lost)
	}
	broken := c.broken
	if broken {
		c.broken, c.cancelled = false, false // it is made again
	}
	if c.txn != nil {
		m.doneTxn(c, ev, lost, broken)
		return
	}
	m.emit(Discard{c.op})
	again := !ev.Final && (lost || c.endpoint.CancelSafe && c.unknown+1 < maxTries)
	switch {
	case c.status != 0, len(c.waiters) == 0:
		m.end(c)
	case again && !m.over:
		if !lost {
			c.unknown++
		}
		m.stats.Again++
		m.share(c) // if it was broken off
		m.wait(c)
	case lost:
		m.refuseAll(c, ForHomeserver, 503, "fsbus: the homeserver cannot be reached")
	default:
		m.refuseAll(c, ForHomeserver, 502, "fsbus: the homeserver does not answer: "+ev.Failure.String())
	}
}

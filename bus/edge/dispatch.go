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
}

func (l *lane) resize() {
	l.slots.Limit = sched.Slots(min(l.window.most, l.window.size+l.stalled))
}

// room reports whether a band may take one more place of its lane: it and each
// better one, with all that is below them, must keep to their shares.
func (l *lane) room(b Band) bool {
	var held sched.Slots
	for d := Band(NumBands); d > 0; {
		d--
		if bands[d].lane != bands[b].lane {
			continue
		}
		held += l.running[d]
		if d <= b && held >= max(1, sched.Slots(int64(l.slots.Limit)*bands[d].share/1000)) {
			return false
		}
	}
	return true
}

// candidate returns the next call of a band for which there is a place.
func (m *Machine) candidate(b Band) *call {
	o := m.ready[b].first()
	if o == nil {
		return nil
	}
	id := bands[b].lane
	l := &m.lanes[id]
	if l.slots.Free() == 0 {
		l.window.wanted = true
		return nil
	}
	if !l.room(b) || id == laneTxn && m.record.total() >= maxRecording {
		return nil
	}
	if b == BandEphemeral {
		if ok, _ := m.mayPace(); !ok {
			return nil
		}
	}
	return o.queue[b].first
}

// dispatch begins calls while the homeserver may be given more.
func (m *Machine) dispatch() {
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
	if at == 0 || m.wake != nil && m.wake.At <= at {
		return
	}
	m.timers.Stop(m.wake)
	m.wake = m.timers.Set(at, timer{wake: true})
}

// begin gives the homeserver a call that is first in its origin's queue.
func (m *Machine) begin(c *call) {
	o, l := c.origin, &m.lanes[bands[c.band].lane]
	m.unlink(c)
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
	c.status, c.retry, c.stalled = 0, 0, false
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
	l := &m.lanes[bands[c.band].lane]
	c.stalled = true
	l.stalled++
	m.stats.Stalled++
	l.resize()
}

// leaveHome gives back a call's place at the homeserver.
func (m *Machine) leaveHome(c *call) {
	l := &m.lanes[bands[c.band].lane]
	l.slots.Give()
	l.running[c.band]--
	if c.stalled {
		c.stalled = false
		l.stalled--
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
	if c.txn != nil {
		m.doneTxn(c, ev, lost)
		return
	}
	m.emit(Discard{c.op})
	again := lost || c.endpoint.CancelSafe && c.unknown+1 < maxTries
	switch {
	case c.status != 0, len(c.waiters) == 0:
		m.end(c)
	case again && !m.over:
		if !lost {
			c.unknown++
		}
		m.stats.Again++
		m.wait(c)
	case lost:
		m.refuseAll(c, ForHomeserver, 503, "fsbus: the homeserver cannot be reached")
	default:
		m.refuseAll(c, ForHomeserver, 502, "fsbus: the homeserver does not answer: "+ev.Failure.String())
	}
}

package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// lane is a set of workers for hosts of one rank, with the hosts that have
// something to send and may send it, by class. A host stands in each list at
// most once; an entry may be out of date and is checked when its turn comes.
type lane struct {
	slots   sched.Gauge
	running [matrix.NumClasses + 1]sched.Slots
	ready   [matrix.NumClasses + 1]sched.FIFO[*host]
}

// enqueue puts a new call into its host's queue.
func (m *Machine) enqueue(c *call) {
	h := c.host
	h.stranger = h.stranger && c.forKey
	listed := h.listed[c.class]
	h.queue[c.class].Push(c)
	h.waiting[c.class]++
	m.touch(h)
	m.ready(h)
	if c.class == matrix.ClassLookup && listed != numLanes && h.listed[c.class] == listed {
		// Its host stands far ahead in the list. Let it be found at the end too.
		if q := &m.lanes[listed].ready[c.class]; q.Len() < 2*int(m.cfg.MaxHosts) {
			q.Push(h)
		}
	}
}

// compact drops calls that ended while they waited, once they are many.
func (h *host) compact(class matrix.Class) {
	q := &h.queue[class]
	if q.Len() < 2*int(h.waiting[class])+16 {
		return
	}
	for range q.Len() {
		if c, _ := q.Pop(); c.phase == phaseWaiting {
			q.Push(c)
		}
	}
}

// head returns the first live call of a class without removing it.
func (h *host) head(class matrix.Class) *call {
	for {
		c, ok := h.queue[class].Peek()
		if !ok || c.phase == phaseWaiting {
			return c
		}
		h.queue[class].Pop()
	}
}

// last is head from the other end. A host that limits our rate has its calls in
// their order: what holds them up is itself and not the flood.
func (h *host) last(class matrix.Class) *call {
	if h.slowed {
		return h.head(class)
	}
	for {
		c, ok := h.queue[class].PeekBack()
		if !ok || c.phase == phaseWaiting {
			return c
		}
		h.queue[class].PopBack()
	}
}

// ready puts the host on the lists of its lane for each class that it may now
// send in, and sets its timer if it must wait.
func (m *Machine) ready(h *host) {
	var wake sched.Time
	for class := matrix.Class(1); class <= matrix.NumClasses; class++ {
		if h.waiting[class] == 0 {
			continue
		}
		ok, again := h.mayRun(class, m.cfg, m.now)
		if !ok {
			if again != 0 && (wake == 0 || again < wake) {
				wake = again
			}
			continue
		}
		if l := h.lane(m.now); h.listed[class] != l {
			h.listed[class] = l
			m.lanes[l].ready[class].Push(h)
		}
	}
	if wake != 0 && (h.timer == nil || h.timer.At > wake) {
		m.timers.Stop(h.timer)
		h.timer = m.timers.Set(wake, timer{host: h})
	}
}

// peek returns the call whose turn is next in a class of a lane: the oldest,
// or for every other turn of pressed look-ups the newest.
func (m *Machine) peek(l laneID, class matrix.Class) *call {
	c := m.atEnd(l, class, false)
	if c == nil || class != matrix.ClassLookup || !m.newestNext || m.now.Sub(c.queued) < pressed {
		return c
	}
	return m.atEnd(l, class, true)
}

// atEnd returns the first call at one end of a list, dropping entries that are
// out of date.
func (m *Machine) atEnd(l laneID, class matrix.Class, newest bool) *call {
	q := &m.lanes[l].ready[class]
	peek, pop, call := q.Peek, q.Pop, (*host).head
	if newest {
		peek, pop, call = q.PeekBack, q.PopBack, (*host).last
	}
	for {
		h, ok := peek()
		if !ok {
			return nil
		}
		if h.listed[class] == l {
			if c := call(h, class); c != nil && h.lane(m.now) == l {
				if ok, _ := h.mayRun(class, m.cfg, m.now); ok {
					c.newest = newest
					return c
				}
			}
			h.listed[class] = numLanes
			pop()
			m.ready(h) // it may belong on another list, or wait for a moment
			continue
		}
		pop()
	}
}

// room reports whether a class may take one more of limit workers, given how
// many each class holds: it and each better class, with all that is below
// them, must keep to their shares, so that the rest stays free. While a room is
// joined the shares of what nobody waits for are smaller.
func room(class matrix.Class, running *[matrix.NumClasses + 1]sched.Slots, limit sched.Slots, joining bool) bool {
	var held sched.Slots
	for d := matrix.Class(matrix.NumClasses); d >= 1; d-- {
		held += running[d]
		share := classes[d].share
		if joining && d >= matrix.ClassLookup {
			share /= stepBack
		}
		if d <= class && held >= max(1, sched.Slots(int64(limit)*share/1000)) {
			return false
		}
	}
	return true
}

// candidate returns the next call of a class for which a worker is free.
func (m *Machine) candidate(class matrix.Class) *call {
	joining := m.joins.open > 0
	if m.workers.Free() == 0 || !room(class, &m.running, m.workers.Limit, joining) {
		return nil
	}
	for l := range numLanes {
		if ln := &m.lanes[l]; ln.slots.Free() > 0 && room(class, &ln.running, ln.slots.Limit, joining) {
			if c := m.peek(l, class); c != nil {
				return c
			}
		}
	}
	return nil
}

// contended reports whether calls wait because others hold a lane's workers.
func (m *Machine) contended(l laneID) bool {
	for class := matrix.Class(1); class <= matrix.NumClasses; class++ {
		if m.peek(l, class) != nil {
			return true // dispatch leaves none that could be started
		}
	}
	return false
}

// dispatch starts calls while workers are free and calls may run.
func (m *Machine) dispatch() {
	for m.workers.Free() > 0 && !m.drained {
		var next [matrix.NumClasses + 1]*call
		var wanting uint32
		for class := matrix.Class(1); class <= matrix.NumClasses; class++ {
			if next[class] = m.candidate(class); next[class] != nil {
				wanting |= 1 << class
			}
		}
		turn := m.turns.Pick(wanting)
		if turn < 0 {
			return
		}
		c := next[turn]
		// Whoever has waited for long may ride on a better class's turn.
		for class := turn + 1; turn > int(matrix.ClassJoin) && class < len(next); class++ {
			old := next[class]
			if old != nil && old.queued < c.queued && m.now.Sub(old.queued) >= ageStep*time.Duration(class-turn) {
				c = old
				m.stats.Aged++
			}
		}
		m.begin(c)
	}
}

// begin gives a worker to the call, which is at one end of its host's queue.
func (m *Machine) begin(c *call) {
	h := c.host
	c.lane = h.lane(m.now)
	calls, hosts := h.queue[c.class].Pop, m.lanes[c.lane].ready[c.class].Pop
	if c.newest {
		hosts = m.lanes[c.lane].ready[c.class].PopBack
		if !h.slowed {
			calls = h.queue[c.class].PopBack
		}
	}
	if got, _ := calls(); got != c {
		panic(fmt.Sprintf("bus: the call to start at %s is not at the end of its queue", h.Name))
	}
	if c.class == matrix.ClassLookup {
		m.newestNext = !c.newest
	}
	h.waiting[c.class]--
	h.compact(c.class)
	// Behind the others of its list: each host has its turn.
	hosts()
	h.listed[c.class] = numLanes

	if c.queue == nil && c.class != matrix.ClassKey && !c.ahead { // a remote does not count these
		h.limiter.ReserveN(m.now.Std(), 1) // joins and events may leave the others in debt
	}
	h.inUse++
	h.begun = m.now
	h.running[c.class]++
	m.hold(c)
	m.stats.waited(c.class, m.now.Sub(c.queued))
	m.touch(h)
	m.ready(h)
	if h.Failures == 0 || h.reachable {
		m.start(c)
		return
	}
	// A failing host: what a crash in the middle of the attempt must not undo
	// is on disk before the attempt.
	h.LastTry = m.now
	intent := h.HostRecord
	intent.Failures++
	intent.NextTry = m.now.Add(m.delay(h, intent.Failures, h.LastFailure))
	h.NextTry = intent.NextTry
	c.phase = phaseIntent
	m.commit([]HostRecord{intent}, commit{call: c})
}

// start sends the call, unless nobody waits for it any more.
func (m *Machine) start(c *call) {
	if c.queue != nil {
		m.startDelivery(c)
		return
	}
	switch {
	case c.desk != nil && c.wanted():
		m.sendKeys(c)
	case c.desk != nil:
		m.unstart(c)
		m.keysOver(c, "")
	case c.ahead && (m.draining || c.host.reachable):
		m.unstart(c)
		m.aheadOver(c)
	case len(c.waiters) == 0 && !c.ahead:
		m.unstart(c)
		m.end(c)
	default:
		m.transmit(c)
	}
}

// transmit sends the call's request or transaction.
func (m *Machine) transmit(c *call) {
	h := c.host
	m.nextOp++
	c.op = m.nextOp
	c.phase = phaseRunning
	c.started, c.asked = m.now, m.now
	c.connected = h.reachable
	c.held, c.fallback, c.total, c.size, c.passed = false, false, 0, 0, 0
	if c.lane == laneUnknown {
		c.timer = m.timers.Set(m.now.Add(patience), timer{call: c})
	}
	m.ops[c.op] = c
	m.stats.Attempts++
	m.joinSent(c)
	s := Send{Op: c.op, Req: c.leader, Dest: h.Name, Class: c.class, Batch: c.batch, Control: c.control, Ahead: c.ahead}
	switch {
	case c.desk == nil:
	case c.desk.name == "":
		s.Origin = true
	default:
		s.Notary = c.wants
	}
	m.emit(s)
}

// unstart gives back what begin took for a call that is not sent. The time that begin
// has set for a failing host is that after an attempt, and there was none.
func (m *Machine) unstart(c *call) {
	m.leaveHost(c)
	if h := c.host; h.Failures > 0 && !h.reachable && h.inUse == 0 {
		h.NextTry = min(h.NextTry, m.now)
	}
	m.touch(c.host)
	m.ready(c.host)
}

// leaveHost gives back a call's worker and its place at its host.
func (m *Machine) leaveHost(c *call) {
	m.giveBack(c)
	c.host.inUse--
	c.host.running[c.class]--
}

func (m *Machine) hold(c *call) {
	m.workers.Take()
	m.running[c.class]++
	ln := &m.lanes[c.lane]
	ln.slots.Take()
	ln.running[c.class]++
}

// giveBack returns what hold took.
func (m *Machine) giveBack(c *call) {
	m.workers.Give()
	m.running[c.class]--
	ln := &m.lanes[c.lane]
	ln.slots.Give()
	ln.running[c.class]--
}

package edge

import (
	"time"

	"fsbus/sched"
)

// joinLongest bounds a join window whose end nobody tells of.
const joinLongest = 15 * time.Minute

// joins are the rooms that our homeserver is joining. It ignores, but acknowledges,
// events of a room that it does not know yet, so these wait.
type joins struct {
	rooms map[string]*joinWindow
	since sched.Time // of the first of those that are open
}

// joinWindow is one room.
type joinWindow struct {
	opened sched.Time
	timer  *sched.Timer[timer] // when it is over
}

func (j *joins) init() { j.rooms = make(map[string]*joinWindow) }

// concerns reports whether one of the rooms is being joined.
func (j *joins) concerns(rooms []string) bool {
	if len(j.rooms) == 0 {
		return false
	}
	for _, r := range rooms {
		if j.rooms[r] != nil {
			return true
		}
	}
	return false
}

// quiet returns until when presence waits.
func (j *joins) quiet(hold time.Duration) sched.Time {
	if len(j.rooms) == 0 {
		return 0
	}
	return j.since.Add(hold)
}

func (m *Machine) joining(ev Joining) {
	j := &m.joins
	w := j.rooms[ev.Room]
	known := w != nil
	switch {
	case ev.Room == "" || !ev.Open && !known:
		return
	case !known && len(j.rooms) >= maxJoins:
		m.stats.JoinsIgnored++
		return
	case !known && len(j.rooms) == 0:
		j.since = m.now
	}
	if !known {
		w = &joinWindow{opened: m.now}
		j.rooms[ev.Room] = w
	}
	m.timers.Stop(w.timer)
	after := joinLongest
	if !ev.Open {
		after = min(max(m.now.Sub(w.opened), leastAfterJoin), afterJoin)
	}
	w.timer = m.timers.Set(m.now.Add(after), timer{room: ev.Room})
	if !known {
		m.holdWaiting()
	}
}

// mustHold reports whether a transaction has to wait for a join. One that the
// homeserver may have had already does not.
func (m *Machine) mustHold(c *call) bool {
	return c.txn.PDUs > 0 && !c.charged && !m.draining && m.now < c.arrived.Add(m.cfg.JoinHold) && m.joins.concerns(c.txn.Rooms)
}

// holdBack keeps a transaction out of its origin's queue until a join is over.
func (m *Machine) holdBack(c *call) {
	m.stats.Held++
	c.phase = phaseHeld
	c.timer = m.timers.Set(c.arrived.Add(m.cfg.JoinHold), timer{call: c})
	m.line[c.band].insert(c)
}

// holdWaiting holds back what waits already when a join begins.
func (m *Machine) holdWaiting() {
	var next *call
	for c := m.line[BandPDUs].first; c != nil; c = next {
		if next = c.link[linkLine].next; c.phase == phaseWaiting && m.mustHold(c) {
			m.unlink(c)
			m.holdBack(c)
			m.update(c.origin)
		}
	}
}

// joinOver lets go on what waited for a room alone.
func (m *Machine) joinOver(room string) {
	delete(m.joins.rooms, room)
	m.releaseHeld()
}

// releaseHeld lets transactions go on that have nothing to wait for any more.
func (m *Machine) releaseHeld() {
	var next *call
	for c := m.line[BandPDUs].first; c != nil; c = next {
		next = c.link[linkLine].next
		if c.phase == phaseHeld && (m.draining || !m.joins.concerns(c.txn.Rooms)) {
			m.unhold(c)
		}
	}
}

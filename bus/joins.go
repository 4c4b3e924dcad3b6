package bus

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

const (
	// maxJoins bounds the join windows that are remembered, the closed ones for
	// the status page.
	maxJoins = 16
	// askingFor is how long a window stays open after a make_join: its caller
	// tries one server after another, up to 20 s each.
	askingFor = 30 * time.Second
	// resyncQuiet is how long after the last request for a room's state its resync
	// counts as over.
	resyncQuiet = time.Minute
	// stepBack is the part of their shares that classes 5 to 7 keep while a window
	// is open.
	stepBack = 4

	// maxAhead bounds the servers that wait to be connected to in advance.
	maxAhead = 4096
	// aheadAfter is for how long before that no room may have been joined and no
	// keys asked for: the homeserver has better uses for the processor meanwhile.
	aheadAfter = 5 * time.Second
	// aheadAtOnce bounds the attempts at that.
	aheadAtOnce = 4
)

// JoinPhase is how far a join has come.
type JoinPhase uint8

// The phases.
const (
	JoinAsking  JoinPhase = iota // a server is asked for the template of the event
	JoinSending                  // it has been sent, and the state arrives
	JoinSyncing                  // the rest of the state is fetched
	JoinOver
)

func (p JoinPhase) String() string {
	return [...]string{"asking", "joining", "resync", "over"}[p]
}

// JoinStatus is a join, for people. Times that have not come are 0.
type JoinStatus struct {
	Room  string
	Phase JoinPhase

	Asked   sched.Time // the first make_join
	Asks    int        // how many there were
	Via     matrix.ServerName
	Sent    sched.Time // the first send_join
	Again   int        // how often the homeserver sent it again
	Sends   int        // how often it went upstream
	Headers sched.Time // of the answer
	Status  int
	Size    int64 // bytes of the answer so far
	Total   int64 // of all of it, -1 if the server did not say, 0 if unknown yet
	Whole   sched.Time
	Passed  sched.Time // when the homeserver first got the answer's headers
	Failed  string     // how the last attempt failed

	KeysSeen int // server keys that were fetched ahead
	KeysDone int // those of them that are looked up
	Servers  int // in the room

	Resync     sched.Time // the first request for the state
	Resyncs    int
	ResyncSize int64
	ResyncEnd  sched.Time // of the last answer so far
	Closed     sched.Time
}

// joins are the join windows: from a make_join until the send_join's answer is
// through, and after that until the room's state is there. While one is in its
// first part, what nobody waits for steps back.
type joins struct {
	rooms  map[string]*joinWindow
	recent []*joinWindow // the oldest first; may be over
	open   int           // that are asking or sending

	ahead   sched.FIFO[matrix.ServerName]
	aheads  int // that are under way
	connect sched.Time
	timer   *sched.Timer[timer]
}

type joinWindow struct {
	JoinStatus
	told  bool // the shell knows that it is open
	timer *sched.Timer[timer]
}

func (j *joins) init() { j.rooms = make(map[string]*joinWindow) }

// joinArrived notes what a request does for a join, and returns its class.
func (m *Machine) joinArrived(a Arrived) matrix.Class {
	if a.Room == "" {
		return a.Class
	}
	w := m.joins.rooms[a.Room]
	switch a.Endpoint.Join {
	case matrix.JoinMake:
		if w == nil || w.Phase != JoinAsking {
			w = m.openJoin(a.Room)
		}
		w.Asks++
		m.keepJoin(w, JoinAsking, askingFor)
	case matrix.JoinSend:
		if w == nil {
			w = m.openJoin(a.Room)
		}
		if w.Sent == 0 {
			w.Sent = m.now
		}
		w.Via = a.Dest
		if w.Phase < JoinSyncing { // else the homeserver has lost its answer
			m.keepJoin(w, JoinSending, a.Endpoint.Timeout+resyncQuiet)
		}
	case matrix.JoinResync:
		if w == nil || w.Phase != JoinSyncing {
			return a.Class
		}
		if w.Resync == 0 {
			w.Resync = m.now
		}
		w.Resyncs++
		m.keepJoin(w, JoinSyncing, a.Endpoint.Timeout+resyncQuiet)
		return min(a.Class, matrix.ClassEvent) // the room is of no use without it
	}
	return a.Class
}

func (m *Machine) openJoin(room string) *joinWindow {
	j := &m.joins
	if old := j.rooms[room]; old != nil {
		m.closeJoin(old)
	}
	if len(j.recent) >= maxJoins {
		m.closeJoin(j.recent[0])
		j.recent = append(j.recent[:0], j.recent[1:]...)
	}
	w := &joinWindow{JoinStatus: JoinStatus{Room: room, Asked: m.now}}
	j.rooms[room] = w
	j.recent = append(j.recent, w)
	j.open++
	return w
}

// keepJoin moves a window into a phase, for so long.
func (m *Machine) keepJoin(w *joinWindow, p JoinPhase, d time.Duration) {
	switch was, is := w.Phase < JoinSyncing, p < JoinSyncing; {
	case was && !is:
		m.joins.open--
	case is && !was:
		m.joins.open++ // the homeserver has lost the answer, and the next try failed
	}
	w.Phase = p
	m.timers.Stop(w.timer)
	w.timer = m.timers.Set(m.now.Add(d), timer{join: w})
	m.tellJoin(w)
}

// tellJoin has the shell know of a window in which the homeserver throws away
// what others send of the room: from its send_join on, as before that nobody sends
// anything.
func (m *Machine) tellJoin(w *joinWindow) {
	if open := w.Phase == JoinSending; open != w.told && !m.drained {
		w.told = open
		m.emit(JoinWindow{Room: w.Room, Open: open})
	}
}

func (m *Machine) closeJoin(w *joinWindow) {
	if w.Phase == JoinOver {
		return
	}
	if w.Phase < JoinSyncing {
		m.joins.open--
	}
	m.timers.Stop(w.timer)
	w.timer = nil
	w.Phase, w.Closed = JoinOver, m.now
	delete(m.joins.rooms, w.Room)
	m.tellJoin(w)
}

// joinSent: a call for a join goes upstream.
func (m *Machine) joinSent(c *call) {
	if w := m.joins.rooms[c.room]; w != nil && c.endpoint.Join == matrix.JoinSend {
		w.Sends++
	}
}

// joinAgain: the homeserver asks for what it asked for before, of which all may
// be here.
func (m *Machine) joinAgain(a Arrived, whole bool) {
	w := m.joins.rooms[a.Room]
	if w == nil || a.Endpoint.Join != matrix.JoinSend {
		return
	}
	w.Again++
	if whole {
		m.passedJoin(w)
	}
}

// joinAnswered: the answer's headers are there.
func (m *Machine) joinAnswered(c *call, ev Answered) {
	w := m.joins.rooms[c.room]
	if w == nil || c.endpoint.Join != matrix.JoinSend {
		return
	}
	w.Headers, w.Status, w.Total = m.now, ev.Status, ev.Size
}

// joinProgress: so much of an answer has arrived.
func (m *Machine) joinProgress(c *call, size int64) {
	w := m.joins.rooms[c.room]
	switch {
	case w == nil:
	case c.endpoint.Join == matrix.JoinSend:
		w.Size = size
		if w.Phase < JoinSyncing {
			m.keepJoin(w, JoinSending, c.endpoint.Timeout+resyncQuiet)
		}
	case w.Phase == JoinSyncing:
		m.keepJoin(w, JoinSyncing, resyncQuiet)
	}
}

// joinDone: an attempt is over.
func (m *Machine) joinDone(c *call, ev Done) {
	w := m.joins.rooms[c.room]
	switch {
	case w == nil:
	case c.endpoint.Join == matrix.JoinSend:
		w.Size = ev.Size
		if ev.Failure != matrix.FailNone || c.status != 200 {
			w.Failed = failureText(ev.Failure, c.status)
			m.keepJoin(w, JoinAsking, askingFor) // the homeserver may try another server
			return
		}
		w.Whole, w.Failed = m.now, ""
		if w.Passed != 0 {
			m.joinPassed(c)
		}
	case c.endpoint.Join == matrix.JoinResync && w.Phase == JoinSyncing:
		w.ResyncEnd = m.now
		w.ResyncSize += ev.Size
		m.keepJoin(w, JoinSyncing, resyncQuiet)
	}
}

// joinPassed: the homeserver gets the answer to its send_join.
func (m *Machine) joinPassed(c *call) {
	w := m.joins.rooms[c.room]
	if w != nil && c.endpoint.Join == matrix.JoinSend && c.status == 200 {
		m.passedJoin(w)
	}
}

func (m *Machine) passedJoin(w *joinWindow) {
	if w.Passed == 0 {
		w.Passed = m.now
	}
	if w.Whole != 0 {
		m.keepJoin(w, JoinSyncing, resyncQuiet)
	}
}

// serversSeen has the servers of a room connected to, one after the other.
func (m *Machine) serversSeen(ev ServersSeen) {
	j := &m.joins
	if w := j.rooms[ev.Room]; w != nil {
		w.Servers += len(ev.Servers)
	}
	if m.cfg.Preflight == 0 || m.draining {
		return
	}
	for _, s := range ev.Servers {
		if j.ahead.Len() >= maxAhead {
			break
		}
		j.ahead.Push(s)
	}
	m.goAhead()
}

// goAhead connects to the next servers of which nothing is known, as long as
// nobody waits for anything else.
func (m *Machine) goAhead() {
	j := &m.joins
	if j.open > 0 || len(m.keys.queries) > 0 {
		j.connect = max(j.connect, m.now.Add(aheadAfter))
	}
	for j.ahead.Len() > 0 && j.aheads < aheadAtOnce && m.cfg.Preflight > 0 && !m.draining {
		if m.now < j.connect {
			if j.timer == nil {
				j.timer = m.timers.Set(j.connect, timer{ahead: true})
			}
			return
		}
		name, _ := j.ahead.Pop()
		h := m.hosts[name]
		if h != nil && (h.lane(m.now) != laneUnknown || !h.isIdle) {
			continue
		}
		if h == nil {
			h = m.newHost(name)
		}
		j.aheads++
		j.connect = m.now.Add(time.Duration(float64(time.Second) / m.cfg.Preflight))
		m.stats.Aheads++
		m.enqueue(&call{host: h, endpoint: versionRow, class: matrix.ClassState, queued: m.now, ahead: true})
	}
}

var versionRow = matrix.Match("GET", "/_matrix/federation/v1/version")

// aheadOver ends an attempt to connect in advance.
func (m *Machine) aheadOver(c *call) {
	c.phase = phaseEnded
	m.joins.aheads--
	m.goAhead()
}

// joinStatus returns the joins that are under way and some that are over, the latest
// first.
func (m *Machine) joinStatus() (list []JoinStatus) {
	for i := len(m.joins.recent) - 1; i >= 0; i-- {
		list = append(list, m.joins.recent[i].JoinStatus)
	}
	return list
}

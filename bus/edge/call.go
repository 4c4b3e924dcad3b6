package edge

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// call is what the homeserver is asked once, for one request or for several equal
// ones of one origin.
type call struct {
	seq      uint64 // in the order of arrival
	origin   *origin
	band     Band
	endpoint *matrix.Endpoint
	txn      *Txn // nil: it is no transaction, or one that could not be verified
	key      Key
	leader   *request   // whose body is sent; nil when that is not needed any more
	waiters  []*request // may hold the leader
	phase    phase

	arrived   sched.Time
	queued    sched.Time // when it last began to wait for its turn
	started   sched.Time
	timer     *sched.Timer[timer]
	op        OpID
	status    int // of the answer, 0: none yet
	retry     time.Duration
	unknown   int32 // attempts of which nobody knows what became
	charged   bool  // its origin's rate has been
	stalled   bool  // it runs for so long that it does not count
	long      bool  // so long that it may have to make room
	slow      bool  // it runs, and counts among what is slow in its lane
	cancelled bool
	broken    bool // to make room, so that it is made again
	probe     bool // it was begun to see whether the homeserver is back
	replied   bool // what is being recorded has been answered
	counts    bool // among its origin's transactions that wait
	bytes     int64
	crowds    int32  // its part of its origin's waits
	peer      string // of one whose signature could not be checked: where it came from

	link [numLinks]link
}

// phase is how far a call has come.
type phase uint8

const (
	phaseLooking   phase = iota // the store is looked through
	phaseHeld                   // until a join is through
	phaseWaiting                // for its turn
	phasePaused                 // before it is sent again
	phaseRunning                // the homeserver has it
	phaseRecording              // it has been answered, and that is being stored
	phaseEnded
)

type txnKey struct {
	origin matrix.ServerName
	id     string
}

type shareKey struct {
	origin matrix.ServerName
	key    Key
}

func (c *call) txnKey() txnKey     { return txnKey{c.origin.key.name, c.txn.ID} }
func (c *call) shareKey() shareKey { return shareKey{c.origin.key.name, c.key} }

// mayShare reports whether equal requests may join it.
func (c *call) mayShare() bool {
	return c.txn == nil && !c.origin.stranger && c.endpoint.Share == matrix.ShareSame && !c.endpoint.Once
}

// paced reports whether it may be answered without the homeserver.
func (c *call) paced(m *Machine) bool {
	return c.txn != nil && c.txn.Ephemeral && m.cfg.Ephemeral != PassEphemeral
}

// newCall makes a call of a request that has been admitted.
func (m *Machine) newCall(r *request, o *origin, b Band) *call {
	m.seq++
	c := &call{
		seq: m.seq, origin: o, band: b, endpoint: r.Endpoint, key: r.Key,
		leader: r, waiters: []*request{r}, arrived: r.Received,
	}
	if !o.stranger {
		c.txn = r.Txn
	}
	r.call = c
	m.hold(o)
	c.bytes = r.bytes
	o.bytes += c.bytes
	m.crowdIn(c)
	return c
}

// admit moves a request to those that are held until they are answered. There must
// be room for it.
func (m *Machine) admit(r *request) {
	if r.stage != stageThrough {
		m.unverify(r)
		r.stage = stageThrough
	}
	m.held.take(r)
	if r.timer == nil {
		r.timer = m.timers.Set(r.deadline, timer{req: r})
	}
}

// request handles one that is no transaction.
func (m *Machine) request(r *request, o *origin) {
	b := bandOf(&r.Arrived, r.Origin == "")
	if c := m.shared[shareKey{r.Origin, r.Key}]; c != nil && r.Endpoint == c.endpoint {
		switch {
		case c.status != 0:
			m.stats.Shared++
			m.reply(r, c)
			m.free(r)
			return
		case m.mayJoin(r, c):
			m.stats.Shared++
			m.join(r, c)
			return
		}
	}
	if o.waiting()+o.looks >= m.cfg.OriginQueue {
		m.stats.Limited++
		o.counts.Limited++
		after := time.Duration(float64(o.waiting()) / m.cfg.OriginRate * float64(time.Second))
		m.turnAway(o, r, ForRate, 429, matrix.MLimitExceeded, fmt.Sprintf("fsbus: %d requests wait already", o.waiting()), min(max(after, time.Second), 30*time.Second))
		return
	}
	if !o.fits(r, &m.cfg) || !m.room(r, b, o) {
		m.full(o, r, "fsbus: too many requests wait for the homeserver")
		return
	}
	m.admit(r)
	m.ask(r, o, b)
}

// ask has a request that is no transaction wait for its turn.
func (m *Machine) ask(r *request, o *origin, b Band) {
	c := m.newCall(r, o, b)
	m.share(c)
	if r.Look && r.Origin != "" && !o.stranger {
		m.look(c)
		return
	}
	m.wait(c)
}

// look has the store looked through for the answer to a call.
func (m *Machine) look(c *call) {
	c.phase = phaseLooking
	if c.txn == nil {
		c.origin.looks++
	}
	m.looks[c.leader.Req] = c
	m.emit(Look{c.leader.Req})
}

// mayJoin reports whether a request may wait for the answer to an equal one. It takes
// place in the room for requests, and cannot be made to leave it while that one runs;
// so when room gets short few may.
func (m *Machine) mayJoin(r *request, c *call) bool {
	most := maxWaiters
	if m.held.n >= m.held.maxN/2 {
		most = crowdedWaiters
	}
	return len(c.waiters) < most && m.held.fits(r.Size)
}

// join has a request wait for the answer to an equal one. Its own body is not
// needed.
func (m *Machine) join(r *request, c *call) {
	m.admit(r)
	r.call = c
	c.waiters = append(c.waiters, r)
	if c.link[linkUnbegun].in {
		c.crowds++
		c.origin.waits[c.band]++
	}
	m.free(r)
}

// detach takes a request away from its call.
func (m *Machine) detach(r *request) {
	c := r.call
	r.call = nil
	for i, w := range c.waiters {
		if w == r {
			c.waiters = append(c.waiters[:i], c.waiters[i+1:]...)
			if c.link[linkUnbegun].in {
				c.crowds--
				c.origin.waits[c.band]--
			}
			return
		}
	}
	panic(fmt.Sprintf("edge: request %d is none of %d that wait for its call", r.Req, len(c.waiters)))
}

// abandon ends a call that nobody waits for, if it may.
func (m *Machine) abandon(c *call) {
	if len(c.waiters) > 0 {
		return
	}
	switch c.phase {
	case phaseHeld, phaseWaiting, phasePaused:
		m.end(c)
	case phaseRunning:
		// A transaction goes on: its answer is stored for the sender's next try.
		if c.endpoint.CancelSafe && c.txn == nil && c.status == 0 {
			m.cancel(c)
		}
	case phaseLooking, phaseRecording, phaseEnded:
	}
}

// cancel breaks off an attempt. Its call is not joined any more.
func (m *Machine) cancel(c *call) {
	if c.cancelled {
		return
	}
	c.cancelled = true
	m.unshare(c)
	m.emit(Cancel{c.op})
}

// share lets equal requests join a call, unless they join another.
func (m *Machine) share(c *call) {
	if c.mayShare() && m.shared[c.shareKey()] == nil {
		m.shared[c.shareKey()] = c
	}
}

func (m *Machine) unshare(c *call) {
	if c.mayShare() && m.shared[c.shareKey()] == c {
		delete(m.shared, c.shareKey())
	}
}

// wait puts a call in its origin's queue.
func (m *Machine) wait(c *call) {
	c.phase = phaseWaiting
	c.queued = m.now
	m.count(c, true)
	if c.paced(m) {
		at, why := c.dropAt(m.cfg.EphemeralHold)
		if at <= m.now || m.draining {
			if m.draining {
				why = ShedDrained
			}
			m.shed(c, why)
			return
		}
		c.timer = m.timers.Set(at, timer{call: c})
	}
	c.origin.queue[c.band].insert(c)
	m.line[c.band].insert(c)
	m.update(c.origin)
	if c.paced(m) && m.line[BandEphemeral].n > int(m.cfg.EphemeralWaiting) {
		m.shed(m.line[BandEphemeral].first, ShedRoom)
	}
}

// unlink takes a call out of all queues and stops its timer.
func (m *Machine) unlink(c *call) {
	m.timers.Stop(c.timer)
	c.timer = nil
	if c.link[linkQueue].in {
		c.origin.queue[c.band].remove(c)
	}
	if c.link[linkLine].in {
		m.line[c.band].remove(c)
	}
}

// count keeps the total of an origin's transactions that wait.
func (m *Machine) count(c *call, on bool) {
	if c.txn == nil || c.counts == on {
		return
	}
	o := c.origin
	if c.counts = on; on {
		o.txns++
	} else {
		o.txns--
	}
}

// refuseAll answers all that wait for a call with an error, and ends it.
func (m *Machine) refuseAll(c *call, why Refusal, status int, text string) {
	for _, r := range c.waiters {
		r.call = nil
		m.refuse(c.origin, r, why, status, matrix.MUnknown, text, fullRetry)
	}
	c.waiters = nil
	m.end(c)
}

// replyAll answers all that wait for a call with what the homeserver said.
func (m *Machine) replyAll(c *call) {
	for _, r := range c.waiters {
		r.call = nil
		m.reply(r, c)
	}
	c.waiters = nil
}

// freeLeader lets go of the body that a call sends.
func (m *Machine) freeLeader(c *call) {
	if c.leader != nil {
		r := c.leader
		c.leader = nil
		c.origin.bytes -= c.bytes
		c.bytes = 0
		m.free(r)
	}
}

// end forgets a call that nobody waits for.
func (m *Machine) end(c *call) {
	if len(c.waiters) > 0 || c.phase == phaseRunning && m.ops[c.op] != nil || c.phase == phaseEnded {
		panic(fmt.Sprintf("edge: the call of attempt %d ends in phase %d, %d requests wait for it", c.op, c.phase, len(c.waiters)))
	}
	m.unlink(c)
	m.uncrowd(c)
	m.count(c, false)
	m.unshare(c)
	if c.txn != nil {
		delete(m.txns, c.txnKey())
	}
	m.freeLeader(c)
	c.phase = phaseEnded
	o := c.origin
	if o.current == c {
		o.current = nil
	}
	m.update(o)
	m.drop(o)
}

// callDue handles a call whose time is up.
func (m *Machine) callDue(c *call) {
	switch c.phase {
	case phaseHeld:
		m.stats.HeldLongest++
		m.unhold(c)
	case phasePaused:
		m.unlink(c)
		m.wait(c)
	case phaseWaiting:
		if c.paced(m) {
			_, why := c.dropAt(m.cfg.EphemeralHold)
			m.shed(c, why)
		}
	case phaseRunning:
		switch {
		case !c.stalled:
			m.stall(c)
			c.timer = m.timers.Set(c.started.Add(breakAfter), timer{call: c})
		case !c.long:
			c.long = true
			c.timer = m.timers.Set(c.started.Add(maxRun), timer{call: c})
		default:
			m.cancel(c)
		}
	default:
		panic(fmt.Sprintf("edge: a timer for the call of attempt %d in phase %d", c.op, c.phase))
	}
}

// link is a place in a callList.
type link struct {
	prev, next *call
	in         bool
}

const (
	linkQueue   = iota // its origin's
	linkLine           // its band's
	linkUnbegun        // its origin's that have never begun
	numLinks
)

// callList is a list through the calls themselves, in the order of their arrival.
type callList struct {
	first, last *call
	n           int
	in          int // which of a call's links it uses
}

// insert adds c where it belongs. Nearly always that is one of the ends.
func (l *callList) insert(c *call) {
	var prev *call
	if l.first != nil && l.first.seq < c.seq {
		for prev = l.last; prev.seq > c.seq; prev = prev.link[l.in].prev {
		}
	}
	k := &c.link[l.in]
	k.prev, k.in = prev, true
	if prev != nil {
		k.next = prev.link[l.in].next
		prev.link[l.in].next = c
	} else {
		k.next = l.first
		l.first = c
	}
	if k.next != nil {
		k.next.link[l.in].prev = c
	} else {
		l.last = c
	}
	l.n++
}

func (l *callList) remove(c *call) {
	k := &c.link[l.in]
	if k.prev != nil {
		k.prev.link[l.in].next = k.next
	} else {
		l.first = k.next
	}
	if k.next != nil {
		k.next.link[l.in].prev = k.prev
	} else {
		l.last = k.prev
	}
	*k = link{}
	l.n--
}

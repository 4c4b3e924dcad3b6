package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// request is one request of the homeserver that has not been answered.
type request struct {
	id       ReqID
	call     *call
	deadline sched.Time
	timer    *sched.Timer[timer]
	gone     bool   // nobody listens any more, but the call must not be cut short
	field    string // the only member of the answer that is wanted; "": all
	try      int32  // how many have asked the same of the call, with it
}

// phase is how far a call has come.
type phase uint8

const (
	phaseWaiting  phase = iota // in its host's queue
	phaseIntent                // holds a worker; the intent to try is being stored
	phasePacking               // holds a worker; its transaction is being packed
	phaseRunning               // sent, no answer yet
	phaseAnswered              // the answer's headers are there
	phaseLosing                // failed; an old answer is being loaded
	phaseEnded                 // answered, refused or dropped
)

// call is the work that one or more equal requests wait for, or that a queue of
// the outbox does.
type call struct {
	key      Key
	room     string // of a join
	field    string // that it asks for, of the answer under whole
	whole    Key
	tries    int32  // how many have waited for it
	queue    *queue // of a delivery, which has no leader and no waiters
	probe    bool   // its host was failing when the queue got its place
	batch    BatchID
	txn      TxnInfo
	told     bool                // how long the destination of a delivery wants to be left alone
	control  string              // the id of the empty transaction that a delivery sends instead
	expire   *sched.Timer[timer] // when a delivery is given up
	overdue  bool                // it was
	desk     *notary             // of a fetch of keys, the same
	fetches  []*keyFetch
	wants    []matrix.KeyWant
	late     *sched.Timer[timer] // when its waiters have waited for long enough
	slow     bool                // they have
	ahead    bool                // only to connect, for later
	forKey   bool                // of a fetch of keys: nobody but KeyWanted waits for it
	host     *host
	endpoint *matrix.Endpoint
	class    matrix.Class
	leader   ReqID // whose request is sent
	waiters  []*request
	queued   sched.Time
	newest   bool // its turn was the newest's
	phase    phase

	// Of the present attempt.
	op        OpID
	started   sched.Time
	asked     sched.Time // since when there has been a connection, or might have been
	status    int        // of the answer
	held      bool       // the answer is held back until all of it is sure to come
	passed    sched.Time // when one whose caller could not wait got it nevertheless
	fallback  bool       // an old answer is better than this one
	total     int64      // bytes of the answer, -1 if the remote did not say
	size      int64      // that have arrived
	lane      laneID
	connected bool // over a new connection, or one that was open
	cancelled bool
	retry     bool // cancelled only to be tried again at leisure
	timer     *sched.Timer[timer]
	again     bool // put back into the queue when the attempt is over
}

func (m *Machine) arrived(a Arrived) {
	if m.reqs[a.Req] != nil {
		panic(fmt.Sprintf("bus: request %d arrived twice", a.Req))
	}
	m.stats.Requests[a.Class]++
	if q := m.outbox.queues[a.Dest]; q != nil && q.Total() > 0 && a.Endpoint == sendEndpoint {
		m.refuseNew(a, notYet)
		return
	}
	a.Class = m.joinArrived(a)
	m.route(a)
}

// route finds the way of a request: an answer that is there, a call that it may
// join, or one of its own.
func (m *Machine) route(a Arrived) {
	shares := a.Endpoint.Share != matrix.ShareNever
	if shares {
		if e, field := m.look(a); e != nil {
			m.joinAgain(a, true)
			m.answerWith(a, e, field, FromCache)
			return
		}
	}
	running, field := m.runningFor(a)
	switch {
	case running != nil && running.phase == phaseAnswered && !running.held && !running.fallback:
		m.stats.Shared++
		m.joinAgain(a, false)
		m.answerNew(a, running.op, field, FromOther, 0)
		return
	case m.waiting() >= int(m.cfg.MaxRequests):
		m.refuseNew(a, tooMany)
		return
	case running != nil:
		m.stats.Shared++
		m.joinAgain(a, false)
		m.wait(running, a, field)
		m.emit(Free{a.Req})
		return
	case m.loadFor(a, false), m.refusedBefore(a):
		return
	}
	if no, ok := m.turnsAway(a); ok {
		m.failFast(a, no)
		return
	}
	h := m.hosts[a.Dest]
	if h == nil {
		h = m.newHost(a.Dest)
	}
	if h.backingOff(m.now) {
		h.NextTry = m.now // it is urgent
	}
	c := &call{key: a.Key, room: a.Room, field: a.Field, whole: a.Whole, host: h, endpoint: a.Endpoint, class: a.Class, leader: a.Req, queued: m.now}
	if shares {
		m.calls[c.key] = c
	}
	m.wait(c, a, "")
	m.enqueue(c)
}

// runningFor returns the call that a request may join, and the field of its
// answer that is asked for.
func (m *Machine) runningFor(a Arrived) (c *call, field string) {
	if c = m.calls[a.Key]; c == nil && a.Field != "" {
		return m.calls[a.Whole], a.Field
	}
	return c, ""
}

// urgent reports whether a request may try a host that is backing off: for a
// join a person waits, but not for one that has long been dead, as the caller
// knows other servers of the room.
func (m *Machine) urgent(a Arrived, h *host) bool {
	again := probeAgain
	if h.Failures >= knownDead && a.Endpoint.Join == matrix.JoinMake {
		again = probeDead
	}
	return a.Class == matrix.ClassJoin && m.now.Sub(h.LastTry) >= again || m.spendFor(a, h)
}

// turnsAway reports whether a request would come to nothing at its host now, and
// how it is to be refused then.
func (m *Machine) turnsAway(a Arrived) (no Refuse, ok bool) {
	h := m.hosts[a.Dest]
	switch {
	case h == nil:
	case h.backingOff(m.now) && !m.urgent(a, h), a.Class != matrix.ClassJoin && (h.hanging(m.now) || h.quietUntil > m.now):
		return Refuse{Status: 502, Code: matrix.MUnknown, Text: h.why(m.now)}, true
	case h.pausedUntil > m.deadline(a):
		wait := h.pausedUntil.Sub(m.now)
		return Refuse{Status: 429, Code: matrix.MLimitExceeded, RetryAfter: wait.Milliseconds(),
			Text: fmt.Sprintf("fsbus: %s asked to be left alone for another %s", h.Name, round(wait))}, true
	}
	if a.Endpoint.Kind == matrix.AnswerServerKeys && m.keysTried(a.Dest) {
		return Refuse{Status: 502, Code: matrix.MUnknown, Text: fmt.Sprintf("fsbus: %s had no valid keys a moment ago", a.Dest)}, true
	}
	return Refuse{}, false
}

func (m *Machine) wait(c *call, a Arrived, field string) {
	c.tries++
	r := &request{id: a.Req, call: c, deadline: m.deadline(a), field: field, try: c.tries}
	if c.endpoint.RunOn > 0 {
		m.timers.Stop(c.expire)
		c.expire = nil
	}
	r.timer = m.timers.Set(r.deadline, timer{req: r})
	m.reqs[r.id] = r
	c.waiters = append(c.waiters, r)
}

// failFast answers a request that would come to nothing: with an old answer if
// there is one, else with what is known about the host.
func (m *Machine) failFast(a Arrived, no Refuse) {
	if a.Endpoint.Share != matrix.ShareNever {
		if e, field := m.lookStale(a); e != nil {
			m.answerWith(a, e, field, FromStale)
			return
		}
		if m.loadFor(a, true) {
			return
		}
	}
	m.stats.FailedFast++
	m.refuseNew(a, no)
}

// Cause says in words how a host failed last.
func (r *HostRecord) Cause() string {
	s := failureText(r.LastFailure, r.LastStatus)
	if r.Detail != "" {
		s += " (" + r.Detail + ")"
	}
	return s
}

// why says in words what is wrong with a host.
func (h *host) why(now sched.Time) string {
	s := fmt.Sprintf("fsbus: %s: %s", h.Name, h.Cause())
	switch {
	case h.Failures > 0 && h.NextTry > now:
		s += fmt.Sprintf("; failures in a row: %d, next try in %s", h.Failures, round(h.NextTry.Sub(now)))
	case h.quietUntil > now:
		s = fmt.Sprintf("fsbus: %s: %s; it did not answer %d requests in a row, next try in %s", h.Name, h.quietFor, h.quiet*softFailures, round(h.quietUntil.Sub(now)))
	}
	return s
}

func failureText(f matrix.Failure, status int) string {
	switch f {
	case matrix.FailNone:
		return fmt.Sprintf("answered with status %d", status)
	case matrix.FailRefused:
		return "connection refused"
	case matrix.FailUnreachable:
		return "host or network unreachable"
	case matrix.FailNoName:
		return "no such server name"
	case matrix.FailDNS:
		return "name look-up failed"
	case matrix.FailTLS:
		return "TLS failed"
	case matrix.FailTimeout:
		return "timed out"
	case matrix.FailReset:
		return "connection broke"
	case matrix.FailCut:
		return "answer was cut short"
	case matrix.FailTooLarge:
		return "answer is too large"
	case matrix.FailProtocol:
		return "answer is not HTTP"
	case matrix.FailBlocked:
		return "its address is on the block-list"
	case matrix.FailContent:
		return "answered, but not as a Matrix server"
	case matrix.FailCancelled:
		return "not reached in time"
	}
	return "fault of the bus itself"
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Second)
}

// answerWith answers a request that has not become part of a call with what is
// known.
func (m *Machine) answerWith(a Arrived, e *entry, field string, from Source) {
	if from == FromStale {
		m.stats.CacheStale++
	} else {
		m.stats.CacheHits++
	}
	m.answerNew(a, e.op, field, from, m.now.Sub(e.stored))
}

// answerNew answers a request that has not become part of a call.
func (m *Machine) answerNew(a Arrived, op OpID, field string, from Source, age time.Duration) {
	m.stats.Answered++
	m.emit(Reply{Req: a.Req, Op: op, Field: field, From: from, Age: age})
	m.emit(Free{a.Req})
}

// refuseNew refuses a request that has not become part of a call.
func (m *Machine) refuseNew(a Arrived, no Refuse) {
	m.stats.Refused[no.Status/100]++
	no.Req = a.Req
	m.emit(no)
	m.emit(Free{a.Req})
}

// notYet keeps a transaction that is carried through as it is from going before what
// the outbox has for its destination: the homeserver sends it again.
var notYet = Refuse{Status: 503, Code: matrix.MUnknown, Text: "fsbus: what it has taken over for this server goes first"}

var tooMany = Refuse{Status: 503, Code: matrix.MUnknown, Text: "fsbus: too many requests are waiting"}

// refuse answers every request that waits for c with an error.
func (m *Machine) refuse(c *call, status int, text string) {
	code := matrix.MUnknown
	if status == 429 {
		code = matrix.MLimitExceeded
	}
	for _, r := range m.take(c) {
		if !r.gone {
			m.stats.Refused[status/100]++
			m.emit(Refuse{Req: r.id, Status: status, Code: code, Text: text})
		}
	}
}

// reply answers every request that waits for c with its answer.
func (m *Machine) reply(c *call) {
	for _, r := range m.take(c) {
		if r.gone {
			continue
		}
		m.stats.Answered++
		m.emit(Reply{Req: r.id, Op: c.op, Field: r.field, From: c.source(r)})
	}
}

// source says whose request it was that the answer of c is for.
func (c *call) source(r *request) Source {
	if r.id == c.leader {
		return FromRemote
	}
	return FromOther
}

// replyOld answers every request that waits for c with an old answer, of which
// field is what c asked for.
func (m *Machine) replyOld(c *call, e *entry, field string) {
	for _, r := range m.take(c) {
		if !r.gone {
			m.emitOld(r, e, field)
		}
	}
}

// emitOld answers a request with an old answer, of which field is what its call
// asked for.
func (m *Machine) emitOld(r *request, e *entry, field string) {
	m.stats.CacheStale++
	m.stats.Answered++
	if r.field != "" {
		field = r.field
	}
	m.emit(Reply{Req: r.id, Op: e.op, Field: field, From: FromStale, Age: m.now.Sub(e.stored)})
}

// take removes the waiters of c; none of them is known afterwards.
func (m *Machine) take(c *call) []*request {
	w := c.waiters
	c.waiters = nil
	for _, r := range w {
		m.timers.Stop(r.timer)
		r.timer = nil
		delete(m.reqs, r.id)
	}
	return w
}

// detach removes one waiter of its call.
func (m *Machine) detach(r *request) {
	m.timers.Stop(r.timer)
	r.timer = nil
	delete(m.reqs, r.id)
	c := r.call
	for i, w := range c.waiters {
		if w == r {
			c.waiters = append(c.waiters[:i], c.waiters[i+1:]...)
			return
		}
	}
	panic(fmt.Sprintf("bus: request %d is not among the %d waiters of its call", r.id, len(c.waiters)))
}

// gone: nobody waits for the request any more. Work that has not begun is
// dropped, work that may be cut short is cancelled, and the rest runs on until
// its caller would have given up: the remote may be acting on it already.
func (m *Machine) gone(id ReqID) {
	if of := m.outbox.offers[id]; of != nil {
		m.offerGone(id, of)
		return
	}
	if q := m.keys.byReq[id]; q != nil {
		m.queryGone(q)
		return
	}
	r := m.reqs[id]
	if r == nil {
		if m.unparked(id) { // else it was answered while the news was on its way
			m.stats.Gone++
		}
		return
	}
	m.stats.Gone++
	c := r.call
	if c.phase == phaseRunning && !c.endpoint.CancelSafe && c.endpoint.RunOn == 0 && len(c.waiters) == 1 {
		r.gone = true
		return
	}
	m.detach(r)
	m.abandon(c)
}

// expired: the caller is about to give up.
func (m *Machine) expired(r *request) {
	if m.heldTooLong(r) {
		return
	}
	c := r.call
	m.detach(r)
	if !r.gone && m.expiredOld(r) {
		m.abandon(c)
		return
	}
	if !r.gone {
		m.stats.Expired++
		m.stats.Refused[5]++
		m.emit(Refuse{Req: r.id, Status: 504, Code: matrix.MUnknown, Text: c.why(m.now)})
	}
	m.abandon(c)
}

// expiredOld answers a request whose time is up with an old answer, if there is
// one in memory: a host that is silent has failed like any other. There is no time
// to load one.
func (m *Machine) expiredOld(r *request) bool {
	c := r.call
	if c.endpoint.Share == matrix.ShareNever {
		return false
	}
	e, field := m.lookStale(c.request())
	if e == nil {
		return false
	}
	m.emitOld(r, e, field)
	return true
}

// why says in words what a call was waiting for.
func (c *call) why(now sched.Time) string {
	h := c.host
	switch {
	case c.held:
		return c.heldText()
	case c.phase == phaseLosing:
		return "fsbus: the store is slow"
	case c.phase == phaseRunning && c.connected, c.phase == phaseAnswered:
		return fmt.Sprintf("fsbus: %s has not answered in time", h.Name)
	case c.phase == phaseRunning:
		return fmt.Sprintf("fsbus: no connection to %s in time", h.Name)
	case h.pausedUntil > now:
		return fmt.Sprintf("fsbus: %s limits our rate and asked for another %s", h.Name, round(h.pausedUntil.Sub(now)))
	case h.inUse > 0:
		return fmt.Sprintf("fsbus: %d other requests to %s were not answered in time", h.inUse, h.Name)
	}
	return fmt.Sprintf("fsbus: no worker was free for %s in time", h.Name)
}

// abandon ends a call that nobody waits for.
func (m *Machine) abandon(c *call) {
	if len(c.waiters) > 0 {
		return
	}
	switch c.phase {
	case phaseWaiting:
		c.host.waiting[c.class]--
		c.host.compact(c.class)
		m.end(c)
		m.touch(c.host)
	case phaseIntent:
		// start sees that nobody waits.
	case phaseRunning:
		if !m.goesOn(c) {
			m.cancel(c)
		}
	case phaseAnswered:
		if c.held && !m.goesOn(c) {
			m.cancel(c)
		}
	}
}

// suspect looks at an attempt at an unknown host that has not connected yet.
// As long as others wait for such a worker, it goes on among the attempts at
// failing hosts, whose few workers are for finding out. If none of those is free,
// it is put back into the queue, to be tried again at leisure, as a delivery is in
// any case; a look-up is given up, as whoever asks had better hear that soon.
func (m *Machine) suspect(c *call) {
	if c.connected || c.phase != phaseRunning || c.cancelled || c.lane != laneUnknown {
		return
	}
	if !m.contended(laneUnknown) {
		c.timer = m.timers.Set(m.now.Add(patience/4), timer{call: c})
		return
	}
	m.stats.Suspects++
	if ln := &m.lanes[laneFailing]; c.queue == nil && ln.slots.Free() > 0 && room(c.class, &ln.running, ln.slots.Limit, m.joins.open > 0) {
		m.giveBack(c)
		c.lane, c.host.suspect = laneFailing, true
		m.hold(c)
		m.ready(c.host)
		return
	}
	if c.class >= matrix.ClassLookup && c.queue == nil {
		c.overdue = true
		m.cancel(c)
		return
	}
	c.cancelled, c.retry = true, true
	m.emit(Cancel{c.op})
}

func (m *Machine) cancel(c *call) {
	if c.cancelled {
		return
	}
	c.cancelled = true
	m.unshare(c) // a request that comes now shall not share the fate
	m.emit(Cancel{c.op})
}

func (m *Machine) unshare(c *call) {
	if m.calls[c.key] == c {
		delete(m.calls, c.key)
	}
}

// end lets go of a call that is over or was never started.
func (m *Machine) end(c *call) {
	if len(c.waiters) > 0 {
		panic(fmt.Sprintf("bus: a call to %s ends while %d requests wait for it", c.host.Name, len(c.waiters)))
	}
	c.phase = phaseEnded
	m.timers.Stop(c.expire)
	c.expire = nil
	m.unshare(c)
	m.emit(Free{c.leader})
}

func (m *Machine) connected(c *call) {
	m.stats.Connects++
	c.connected, c.asked = true, m.now
	h := c.host
	h.reachable, h.suspect = true, false
	h.NextTry = 0
	m.promote(c)
	m.ready(h)
	m.wake(h)
}

// promote counts an attempt among those at hosts that are known to work, once its
// host has shown that it is there: the few workers for others are for finding that
// out.
func (m *Machine) promote(c *call) {
	if c.lane == laneUnknown || c.lane == laneFailing {
		m.giveBack(c)
		c.lane = c.host.lane(m.now)
		m.hold(c)
	}
}

func (m *Machine) answered(c *call, ev Answered) {
	if c.phase != phaseRunning {
		panic(fmt.Sprintf("bus: attempt %d is answered in phase %d", c.op, c.phase))
	}
	h := c.host
	m.stats.Statuses[min(max(ev.Status/100, 0), 5)]++
	switch {
	case gateway(ev.Status) && c.queue != nil:
		h.LastStatus = ev.Status // the queue has a back-off of its own
	case gateway(ev.Status):
		m.softFailed(h, matrix.FailNone, ev.Status, "")
	default:
		if c.queue == nil {
			h.soft, h.quiet, h.quietUntil = 0, 0, 0
		}
		m.succeeded(h, ev.Status)
		m.promote(c)
	}
	if c.queue != nil {
		h.took = m.now.Sub(c.asked)
	}
	if ev.Status < 400 {
		m.faster(h)
	}
	if ev.Status == 429 {
		m.stats.Limited++
		wait := ev.RetryAfter
		if c.told = wait > 0; !c.told {
			wait = pause
		}
		m.slower(h, wait)
		h.pausedUntil = max(h.pausedUntil, m.now.Add(wait))
		if c.queue == nil && c.endpoint.Repeat && m.canWait(c, h.pausedUntil) {
			c.again = true
			m.ready(h)
			return
		}
	}
	c.phase, c.status = phaseAnswered, ev.Status
	m.joinAnswered(c, ev)
	m.remember(c, ev.Status, ev.Code)
	c.fallback = (ev.Status == 429 || gateway(ev.Status)) && m.hasOld(c)
	if !c.fallback && !m.holdBack(c, ev) {
		m.joinPassed(c)
		m.reply(c)
	}
	m.ready(h)
}

// canWait reports whether somebody still waits for c after the moment t, with
// some time left for the attempt itself.
func (m *Machine) canWait(c *call, t sched.Time) bool {
	for _, r := range c.waiters {
		if !r.gone && r.deadline.Sub(t) > time.Second {
			return true
		}
	}
	return false
}

// gateway reports whether a status comes from something in front of a remote
// that is down: RFC 9110 15.6 and what content delivery networks add.
func gateway(status int) bool {
	return status >= 502 && status <= 504 || status >= 520 && status <= 530
}

func (m *Machine) done(c *call, ev Done) {
	h := c.host
	m.stats.Failures[ev.Failure]++
	m.stats.BytesIn += ev.Size
	delete(m.ops, c.op)
	m.leaveHost(c)
	m.timers.Stop(c.timer)
	c.timer = nil
	op, retry := c.op, c.retry && ev.Failure == matrix.FailCancelled && !(c.connected && c.endpoint.Once)
	c.retry = false
	own := m.ownFault(c, ev)

	switch {
	case c.queue != nil:
		m.emit(Discard{op})
		m.delivered(c, ev, retry)
	case c.desk != nil:
		m.emit(Discard{op})
		m.keysDone(c, ev, retry)
	case c.ahead:
		m.emit(Discard{op})
		if ev.Failure != matrix.FailNone {
			m.blame(c, ev)
		}
		m.aheadOver(c)
		if h.backingOff(m.now) {
			m.refuseQueue(h)
		}
	case c.phase == phaseAnswered && c.fallback:
		m.emit(Discard{op})
		status := 502
		if c.status == 429 {
			status = 429
		}
		if m.lose(c, status, fmt.Sprintf("fsbus: %s answered with status %d", h.Name, c.status)) {
			m.end(c)
		}
	case c.phase == phaseAnswered:
		m.joinDone(c, ev)
		m.doneAnswered(c, ev)
	case own || (c.again || retry) && m.canWait(c, m.now):
		if own { // an error would be taken for the remote's
			h.pausedUntil = max(h.pausedUntil, m.now.Add(pause))
		}
		h.suspect = retry && !h.reachable
		c.again, c.cancelled = false, false
		m.emit(Discard{op})
		c.phase = phaseWaiting
		h.queue[c.class].PushFront(c)
		h.waiting[c.class]++
	case c.again:
		// The time is up after all: pass on what the remote said.
		m.reply(c)
		m.emit(Discard{op})
		m.end(c)
	default:
		m.emit(Discard{op})
		m.joinDone(c, ev)
		m.doneUnanswered(c, ev)
	}
	if h.quietUntil > m.now && !h.backingOff(m.now) {
		m.refuseQueue(h)
	}
	m.touch(h)
	m.ready(h)
	m.forgetStranger(h)
}

// ownFault reports whether an attempt failed for want of something here, and may be
// made again while somebody waits.
func (m *Machine) ownFault(c *call, ev Done) bool {
	return ev.Failure == matrix.FailLocal && c.phase != phaseAnswered && (c.endpoint.Repeat || !ev.Sent) && m.canWait(c, m.now.Add(pause))
}

// doneAnswered handles the end of an answer whose headers were there before.
func (m *Machine) doneAnswered(c *call, ev Done) {
	switch {
	case !c.held:
	case ev.Failure == matrix.FailNone:
		m.passOn(c)
	default:
		c.held = false
		m.refuse(c, 502, m.failText(c.host, ev))
	}
	if ev.Failure != matrix.FailNone || !m.keep(c, ev) {
		m.emit(Discard{c.op})
	}
	m.end(c)
}

// failText says in words how an attempt failed.
func (m *Machine) failText(h *host, ev Done) string {
	text := fmt.Sprintf("fsbus: %s: %s", h.Name, failureText(ev.Failure, 0))
	if ev.Detail != "" {
		text += " (" + cut(ev.Detail) + ")"
	}
	return text
}

// blame notes what an attempt that ended without an answer says about its host.
func (m *Machine) blame(c *call, ev Done) {
	h := c.host
	f := ev.Failure
	if c.overdue && f == matrix.FailCancelled {
		f = matrix.FailTimeout
	}
	switch f {
	case matrix.FailNone:
		panic(fmt.Sprintf("bus: attempt %d at %s ended well without an answer", c.op, h.Name))
	case matrix.FailLocal, matrix.FailContent:
		// Says nothing about the host.
	default:
		switch {
		case c.queue == nil:
			m.blameAttempt(c, ev.Detail, f)
		case ev.Sent: // what a transaction comes to says nothing about requests
			h.reachable = false // the next attempt finds out
		default:
			m.failed(h, f, ev.Detail, m.now)
		}
	}
}

// blameAttempt is blame for a fault of the host's, or what may be one.
func (m *Machine) blameAttempt(c *call, detail string, f matrix.Failure) {
	h := c.host
	switch f {
	case matrix.FailCancelled:
		// Cut short by us because the callers' time was up: a host that was
		// connected to and does that again and again is not well.
		if m.now.Sub(c.started) >= c.endpoint.Timeout/2 {
			m.softFailed(h, matrix.FailTimeout, 0, "no answer within the caller's time-out")
		}
	case matrix.FailTimeout, matrix.FailReset, matrix.FailCut, matrix.FailTooLarge:
		if c.connected {
			h.reachable = h.reachable && f != matrix.FailReset
			m.softFailed(h, f, 0, detail)
		} else {
			m.failed(h, f, detail, m.now)
		}
	default:
		m.failed(h, f, detail, m.now)
	}
}

// doneUnanswered handles an attempt that ended before an answer came.
func (m *Machine) doneUnanswered(c *call, ev Done) {
	h, f := c.host, ev.Failure
	m.blame(c, ev)
	status := 502
	if f == matrix.FailTimeout || f == matrix.FailCancelled {
		status = 504
	}
	if m.lose(c, status, m.failText(h, ev)) {
		m.end(c)
	}
	if h.backingOff(m.now) {
		m.refuseQueue(h)
	}
}

// request returns what c asks for, as a request of its own.
func (c *call) request() Arrived {
	return Arrived{Key: c.key, Endpoint: c.endpoint, Field: c.field, Whole: c.whole}
}

// hasOld reports whether there is an old answer to what c asks for.
func (m *Machine) hasOld(c *call) bool {
	if len(c.waiters) == 0 {
		return false
	}
	if e, _ := m.lookStale(c.request()); e != nil {
		return true
	}
	_, _, ok := m.knownOld(c)
	return ok
}

// knownOld returns the key and the times of a stored old answer.
func (m *Machine) knownOld(c *call) (k Key, t times, ok bool) {
	if !c.endpoint.Durable {
		return k, t, false
	}
	if t, ok = m.answers.known[short(c.key)]; ok && m.now < t.stale {
		return c.key, t, true
	}
	if c.field == "" {
		return k, t, false
	}
	t, ok = m.answers.known[short(c.whole)]
	return c.whole, t, ok && m.now < t.stale
}

// lose answers the waiters of a call whose attempt failed: with an old answer
// if there is one that is better than none. It reports false if that has to be
// loaded first; the call ends then.
func (m *Machine) lose(c *call, status int, text string) bool {
	if len(c.waiters) > 0 && c.endpoint.Share != matrix.ShareNever {
		if e, field := m.lookStale(c.request()); e != nil {
			m.replyOld(c, e, field)
			return true
		}
		if k, t, ok := m.knownOld(c); ok {
			l := m.load(k, t)
			l.losing, l.status, l.text = c, status, text
			c.phase = phaseLosing
			return false
		}
	}
	m.refuse(c, status, text)
	return true
}

// refuseQueue answers at once all that waits for a host that turned out dead. If it
// only does not answer requests, joins and transactions are left to find out.
func (m *Machine) refuseQueue(h *host) {
	text, dead := h.why(m.now), h.backingOff(m.now)
	for class := range h.queue {
		for range h.queue[class].Len() { // what is planned anew is not looked at again
			c, _ := h.queue[class].Pop()
			if c.phase != phaseWaiting {
				continue
			}
			if !dead && (c.queue != nil || c.class == matrix.ClassJoin) {
				h.queue[class].Push(c)
				continue
			}
			h.waiting[class]--
			if c.queue != nil {
				m.leave(c.queue)
				m.plan(c.queue)
				continue
			}
			if c.desk != nil {
				m.keysOver(c, text)
				continue
			}
			if c.ahead {
				m.aheadOver(c)
				continue
			}
			m.stats.FailedFast += int64(len(c.waiters))
			if m.lose(c, 502, text) {
				m.end(c)
			}
		}
	}
}

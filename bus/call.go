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
	received sched.Time
	deadline sched.Time
	timer    *sched.Timer[timer]
	gone     bool // nobody listens any more, but the call must not be cut short
}

// phase is how far a call has come.
type phase uint8

const (
	phaseWaiting  phase = iota // in its host's queue
	phaseIntent                // holds a worker; the intent to try is being stored
	phasePacking               // holds a worker; its transaction is being packed
	phaseRunning               // sent, no answer yet
	phaseAnswered              // the answer's headers are there
	phaseEnded                 // answered, refused or dropped
)

// call is the work that one or more equal requests wait for, or that a queue of
// the outbox does.
type call struct {
	key      Key
	queue    *queue // of a delivery, which has no leader and no waiters
	probe    bool   // its host was failing when the queue got its place
	batch    BatchID
	txn      TxnInfo
	expire   *sched.Timer[timer] // when a delivery is given up
	overdue  bool                // it was
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
	shares := a.Endpoint.Share != matrix.ShareNever
	if shares {
		if e := m.cache.get(a.Key); e != nil && m.now < e.fresh {
			m.stats.CacheHits++
			m.answerNew(a, e.op)
			return
		}
	}
	running := m.calls[a.Key]
	switch {
	case running != nil && running.phase == phaseAnswered:
		m.stats.Shared++
		m.answerNew(a, running.op)
		return
	case m.waiting() >= int(m.cfg.MaxRequests):
		m.refuseNew(a, 503, matrix.MUnknown, "fsbus: too many requests are waiting", 0)
		return
	case running != nil:
		m.stats.Shared++
		m.wait(running, a)
		m.emit(Free{a.Req})
		return
	}
	h := m.hosts[a.Dest]
	if h == nil {
		h = m.newHost(a.Dest)
	}
	if h.backingOff(m.now) {
		urgent := a.Class == matrix.ClassJoin && m.now.Sub(h.LastTry) >= probeAgain
		if !urgent {
			m.failFast(a, h)
			return
		}
		h.NextTry = m.now
	}
	due := deadline(a)
	if h.pausedUntil > due {
		wait := h.pausedUntil.Sub(m.now)
		m.refuseNew(a, 429, matrix.MLimitExceeded, fmt.Sprintf("fsbus: %s asked to be left alone for another %s", h.Name, round(wait)), wait.Milliseconds())
		return
	}
	c := &call{key: a.Key, host: h, endpoint: a.Endpoint, class: a.Class, leader: a.Req, queued: m.now}
	if shares {
		m.calls[c.key] = c
	}
	m.wait(c, a)
	m.enqueue(c)
}

func (m *Machine) wait(c *call, a Arrived) {
	r := &request{id: a.Req, call: c, received: a.Received, deadline: deadline(a)}
	r.timer = m.timers.Set(r.deadline, timer{req: r})
	m.reqs[r.id] = r
	m.maxRequests = max(m.maxRequests, sched.Slots(m.waiting()))
	c.waiters = append(c.waiters, r)
}

// failFast answers a request to a host that is backing off: from the cache if
// an old answer is better than none, else with what is known about the host.
func (m *Machine) failFast(a Arrived, h *host) {
	if e := m.cache.get(a.Key); e != nil && m.now < e.stale {
		m.stats.CacheStale++
		m.answerNew(a, e.op)
		return
	}
	m.stats.FailedFast++
	m.refuseNew(a, 502, matrix.MUnknown, h.why(m.now), 0)
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
	if h.Failures > 0 && h.NextTry > now {
		s += fmt.Sprintf("; failures in a row: %d, next try in %s", h.Failures, round(h.NextTry.Sub(now)))
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

// answerNew answers a request that has not become part of a call.
func (m *Machine) answerNew(a Arrived, op OpID) {
	m.stats.Answered++
	m.emit(Reply{Req: a.Req, Op: op})
	m.emit(Free{a.Req})
}

// refuseNew refuses a request that has not become part of a call.
func (m *Machine) refuseNew(a Arrived, status int, code, text string, retry int64) {
	m.stats.Refused[status/100]++
	m.emit(Refuse{Req: a.Req, Status: status, Code: code, Text: text, RetryAfter: retry})
	m.emit(Free{a.Req})
}

// refuse answers every request that waits for c with an error.
func (m *Machine) refuse(c *call, status int, text string) {
	for _, r := range m.take(c) {
		if !r.gone {
			m.stats.Refused[status/100]++
			m.emit(Refuse{Req: r.id, Status: status, Code: matrix.MUnknown, Text: text})
		}
	}
}

// reply answers every request that waits for c with the answer of op.
func (m *Machine) reply(c *call, op OpID) {
	for _, r := range m.take(c) {
		if !r.gone {
			m.stats.Answered++
			m.emit(Reply{Req: r.id, Op: op})
		}
	}
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
	r := m.reqs[id]
	if r == nil {
		return // answered while the news was on its way
	}
	m.stats.Gone++
	c := r.call
	if c.phase == phaseRunning && !c.endpoint.CancelSafe && len(c.waiters) == 1 {
		r.gone = true
		return
	}
	m.detach(r)
	m.abandon(c)
}

// expired: the caller is about to give up.
func (m *Machine) expired(r *request) {
	c := r.call
	m.detach(r)
	if !r.gone {
		m.stats.Expired++
		m.stats.Refused[5]++
		m.emit(Refuse{Req: r.id, Status: 504, Code: matrix.MUnknown, Text: c.why(m.now)})
	}
	m.abandon(c)
}

// why says in words what a call was waiting for.
func (c *call) why(now sched.Time) string {
	h := c.host
	switch {
	case c.phase == phaseRunning && c.connected:
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
		m.cancel(c)
	}
}

// suspect looks at an attempt at an unknown host that has not connected yet.
// As long as others wait for such a worker, it goes back into the queue and
// its host among the failing ones, whose few workers are for finding out.
func (m *Machine) suspect(c *call) {
	if c.connected || c.cancelled || c.lane != laneUnknown {
		return
	}
	if !m.contended(laneUnknown) {
		c.timer = m.timers.Set(m.now.Add(patience/4), timer{call: c})
		return
	}
	m.stats.Suspects++
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
	case gateway(ev.Status):
		m.softFailed(h, matrix.FailNone, ev.Status, "")
	default:
		m.succeeded(h, ev.Status)
		m.promote(c)
	}
	if c.queue != nil {
		h.took = m.now.Sub(c.asked)
	}
	if ev.Status == 429 {
		m.stats.Limited++
		wait := ev.RetryAfter
		if wait <= 0 {
			wait = pause
		}
		h.pausedUntil = max(h.pausedUntil, m.now.Add(wait))
		if c.queue == nil && c.endpoint.Repeat && m.canWait(c, h.pausedUntil) {
			c.again = true
			m.ready(h)
			return
		}
	}
	c.phase, c.status = phaseAnswered, ev.Status
	m.reply(c, c.op)
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

	switch {
	case c.queue != nil:
		m.emit(Discard{op})
		m.delivered(c, ev, retry)
	case c.phase == phaseAnswered:
		if ev.Failure == matrix.FailNone && ev.Kept && m.cache.put(m, c, op, ev.Size) {
			m.end(c)
			break
		}
		m.emit(Discard{op})
		m.end(c)
	case (c.again || retry) && m.canWait(c, m.now):
		h.suspect = retry && !h.reachable
		c.again, c.cancelled = false, false
		m.emit(Discard{op})
		c.phase = phaseWaiting
		h.queue[c.class].PushFront(c)
		h.waiting[c.class]++
	case c.again:
		// The time is up after all: pass on what the remote said.
		m.reply(c, op)
		m.emit(Discard{op})
		m.end(c)
	default:
		m.emit(Discard{op})
		m.doneUnanswered(c, ev)
	}
	m.touch(h)
	m.ready(h)
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
	case matrix.FailCancelled:
		// Cut short by us because the callers' time was up: a host that was
		// connected to and does that again and again is not well.
		if m.now.Sub(c.started) >= c.endpoint.Timeout/2 {
			m.softFailed(h, matrix.FailTimeout, 0, "no answer within the caller's time-out")
		}
	case matrix.FailTimeout, matrix.FailReset, matrix.FailCut, matrix.FailTooLarge:
		if c.connected {
			h.reachable = h.reachable && f != matrix.FailReset
			m.softFailed(h, f, 0, ev.Detail)
		} else {
			m.failed(h, f, ev.Detail, m.now)
		}
	default:
		m.failed(h, f, ev.Detail, m.now)
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
	text := fmt.Sprintf("fsbus: %s: %s", h.Name, failureText(f, 0))
	if ev.Detail != "" {
		text += " (" + cut(ev.Detail) + ")"
	}
	m.lose(c, status, text)
	m.end(c)
	if h.backingOff(m.now) {
		m.refuseQueue(h)
	}
}

// lose answers the waiters of a call whose attempt failed: with an old answer
// if there is one that is better than none.
func (m *Machine) lose(c *call, status int, text string) {
	if e := m.cache.get(c.key); e != nil && m.now < e.stale {
		m.stats.CacheStale += int64(len(c.waiters))
		m.reply(c, e.op)
		return
	}
	m.refuse(c, status, text)
}

// refuseQueue answers at once all that waits for a host that turned out dead.
func (m *Machine) refuseQueue(h *host) {
	text := h.why(m.now)
	for class := range h.queue {
		for {
			c, ok := h.queue[class].Pop()
			if !ok {
				break
			}
			if c.phase != phaseWaiting {
				continue
			}
			h.waiting[class]--
			if c.queue != nil {
				m.leave(c.queue)
				m.plan(c.queue)
				continue
			}
			m.stats.FailedFast += int64(len(c.waiters))
			m.lose(c, 502, text)
			m.end(c)
		}
	}
}

package edge

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// request is one request from the federation, from its arrival until it is answered
// and its body is freed.
type request struct {
	Arrived
	deadline sched.Time
	timer    *sched.Timer[timer]
	pool     *pool
	bytes    int64 // of the pool
	stage    stage
	fetched  bool  // its key was fetched, or could not be
	call     *call // that it waits for
	answered bool  // or gone
	freed    bool
}

// stage is how far a request has come.
type stage uint8

const (
	stageQueued    stage = iota // to be verified
	stageVerifying              // its Verify is under way
	stageParked                 // another fetches its origin's key
	stageThrough                // verified, or nothing to verify
)

// pool bounds requests by count and bytes.
type pool struct {
	n, maxN, topN          int32
	bytes, maxBytes, bytop int64
}

func (p *pool) fits(size int64) bool { return p.n < p.maxN && p.bytes+size <= p.maxBytes }

func (p *pool) take(r *request) {
	r.pool, r.bytes = p, r.Size
	p.n++
	p.bytes += r.bytes
	p.topN, p.bytop = max(p.topN, p.n), max(p.bytop, p.bytes)
}

// giveBytes gives back what the body took.
func (p *pool) giveBytes(r *request) {
	p.bytes -= r.bytes
	r.bytes = 0
	if p.bytes < 0 {
		panic(fmt.Sprintf("edge: %d bytes are held after request %d", p.bytes, r.Req))
	}
}

func (p *pool) give(r *request) {
	p.giveBytes(r)
	r.pool = nil
	p.n--
	if p.n < 0 {
		panic(fmt.Sprintf("edge: %d requests are held after request %d", p.n, r.Req))
	}
}

// arrived turns away what can be without a look at the signature, and has the
// signature of the rest checked.
func (m *Machine) arrived(a Arrived) {
	if m.reqs[a.Req] != nil {
		panic(fmt.Sprintf("edge: request %d of %s arrived twice", a.Req, a.Origin))
	}
	m.stats.Requests++
	if a.Endpoint.Unsigned {
		a.Origin, a.Keys = "", nil // nobody has checked them
	}
	r := &request{Arrived: a, deadline: deadline(&a)}
	m.reqs[a.Req] = r
	switch t := a.Txn; {
	case m.draining:
		m.turnAway(nil, r, ForDraining, 503, matrix.MUnknown, "fsbus: it is being stopped; ask again", fullRetry)
		return
	case r.deadline <= m.now:
		m.turnAway(nil, r, ForTime, 503, matrix.MUnknown, "fsbus: the request has waited for too long", fullRetry)
		return
	case a.Origin == "" && !a.Endpoint.Unsigned:
		m.turnAway(nil, r, ForAuth, 401, matrix.MUnauthorized, "fsbus: the request has no Authorization header with X-Matrix", 0)
		return
	case a.Origin != "" && !m.acl.Allows(a.Origin):
		m.turnAway(nil, r, ForACL, 403, matrix.MForbidden, fmt.Sprintf("fsbus: %s may not talk to this server", a.Origin), 0)
		return
	case t != nil && (t.PDUs > matrix.MaxPDUs || t.EDUs > matrix.MaxEDUs):
		m.turnAway(nil, r, ForContent, 400, matrix.MInvalidParam, fmt.Sprintf("fsbus: the transaction has %d PDUs and %d EDUs, at most %d and %d may be in it", t.PDUs, t.EDUs, matrix.MaxPDUs, matrix.MaxEDUs), 0)
		return
	case a.Origin == "":
		m.unsigned(r)
		return
	}
	m.toVerify(r)
}

// turnAway refuses a request that nothing is done for.
func (m *Machine) turnAway(o *origin, r *request, why Refusal, status int, code, text string, after time.Duration) {
	m.refuse(o, r, why, status, code, text, after)
	m.free(r)
}

// full refuses a request for which there is no room.
func (m *Machine) full(o *origin, r *request, text string) {
	m.turnAway(o, r, ForRoom, 503, matrix.MUnknown, text, fullRetry)
}

// refuse answers a request with an error. o is its origin, if that is authentic.
func (m *Machine) refuse(o *origin, r *request, why Refusal, status int, code, text string, after time.Duration) {
	m.stats.Refused[why]++
	if o != nil {
		o.counts.Refused++
	}
	m.emit(Refuse{Req: r.Req, Status: status, Code: code, Text: text, RetryAfter: after})
	m.settled(r)
}

// settled notes that a request has its answer, or that nobody wants it any more.
func (m *Machine) settled(r *request) {
	if r.answered {
		panic(fmt.Sprintf("edge: request %d is answered twice", r.Req))
	}
	r.answered = true
	m.timers.Stop(r.timer)
	r.timer = nil
	m.forgetRequest(r)
}

// free lets go of a request's body.
func (m *Machine) free(r *request) {
	if r.freed {
		panic(fmt.Sprintf("edge: request %d is freed twice", r.Req))
	}
	r.freed = true
	m.emit(Free{r.Req})
	if r.pool != nil {
		r.pool.giveBytes(r)
	}
	m.forgetRequest(r)
}

func (m *Machine) forgetRequest(r *request) {
	if !r.answered || !r.freed {
		return
	}
	if r.stage != stageThrough {
		m.unverify(r)
	} else if r.pool != nil {
		r.pool.give(r)
	}
	delete(m.reqs, r.Req)
}

// gone handles a sender that has closed its connection.
func (m *Machine) gone(id ReqID) {
	r := m.reqs[id]
	if r == nil || r.answered {
		return
	}
	m.stats.Gone++
	m.leave(r)
}

// leave takes a request away from what it waits for, without an answer.
func (m *Machine) leave(r *request) {
	c := r.call
	m.settled(r)
	if c == nil {
		return // its Verified frees it, or its turn to be verified
	}
	m.detach(r)
	m.abandon(c)
}

// expired handles a request whose sender is about to give up.
func (m *Machine) expired(r *request) {
	m.giveUp(r, ForTime, "fsbus: there was no time for the request; ask again")
}

// giveUp answers a request before what it waits for is through.
func (m *Machine) giveUp(r *request, why Refusal, text string) {
	c := r.call
	switch {
	case c == nil:
		m.refuse(nil, r, why, 503, matrix.MUnknown, text, fullRetry)
		return
	case c.phase == phaseRecording:
		// The homeserver has acknowledged it. That the disk has not matters less.
		m.detach(r)
		m.stats.Unrecorded++
		m.reply(r, c)
	case c.paced(m) && c.phase != phaseRunning && c.phase != phaseLooking:
		m.shed(c, ShedExpired)
		return
	case c.phase == phaseRunning:
		m.detach(r)
		m.refuse(c.origin, r, why, 504, matrix.MUnknown, "fsbus: the homeserver has not answered yet; ask again", fullRetry)
	case m.home.down:
		m.detach(r)
		m.refuse(c.origin, r, ForHomeserver, 503, matrix.MUnknown, "fsbus: the homeserver does not answer; ask again", fullRetry)
	default:
		m.detach(r)
		m.refuse(c.origin, r, why, 503, matrix.MUnknown, text, fullRetry)
	}
	m.abandon(c)
}

// reply answers a request with what the homeserver says to its call.
func (m *Machine) reply(r *request, c *call) {
	m.stats.Replied++
	c.origin.counts.Answered++
	m.emit(Reply{Req: r.Req, Op: c.op})
	m.settled(r)
}

package bus

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"fsbus/sched"
)

// An answer that its caller wants whole within some time of its headers is held
// back until the rest is sure to follow: all of it is there, or its size and its
// rate say that it will be. A caller that cannot wait any longer is told to come
// again, and its next request joins the same call; when it comes for the last
// time, it gets what there is.

// holdMargin is the part of a caller's time for the body that the rest of a held
// answer may take at the rate so far.
const holdMargin = 2

// holdBack keeps back the answer of c, and reports false if it need not be.
func (m *Machine) holdBack(c *call, ev Answered) bool {
	if c.endpoint.Whole == 0 || ev.Status != 200 {
		return false
	}
	c.held, c.total = true, ev.Size
	c.asked = m.now // the rate is that since the headers
	return true
}

func (m *Machine) progress(c *call, ev Progress) {
	c.size = ev.Size
	m.joinProgress(c, ev.Size)
	if c.held && len(c.waiters) > 0 && c.follows(m.now.Sub(c.asked)) {
		m.passOn(c)
	}
}

// follows reports whether the rest of a held answer will have arrived in good
// time, after so much has arrived in a while.
func (c *call) follows(in time.Duration) bool {
	if c.total < 0 || c.size <= 0 || in < time.Second {
		return false
	}
	rest := float64(in) / float64(c.size) * float64(c.total-c.size)
	return rest <= float64(c.endpoint.Whole)/holdMargin
}

// passOn passes a held answer on to all that wait for it.
func (m *Machine) passOn(c *call) {
	c.held = false
	if len(c.waiters) == 0 {
		return
	}
	m.stats.Held++
	m.joinPassed(c)
	m.reply(c)
}

// heldTooLong: a caller of a held answer is about to give up. It reports whether
// it got the answer.
func (m *Machine) heldTooLong(r *request) bool {
	c := r.call
	if !c.held || r.try < c.endpoint.Tries || r.gone {
		return false
	}
	m.detach(r)
	c.passed = m.now
	m.stats.Answered++
	m.joinPassed(c)
	m.emit(Reply{Req: r.id, Op: c.op, From: c.source(r)})
	if len(c.waiters) == 0 {
		m.goesOn(c)
	}
	return true
}

// goesOn reports whether a call that nobody waits for may still be asked for
// again, or is being listened to, and has it run on.
func (m *Machine) goesOn(c *call) bool {
	if c.endpoint.RunOn == 0 || c.cancelled {
		return false
	}
	var at sched.Time
	if !m.draining {
		at = c.started.Add(c.endpoint.RunOn)
	}
	if c.passed != 0 {
		at = max(at, c.passed.Add(c.endpoint.Whole))
	}
	if m.now >= at {
		return false
	}
	m.timers.Stop(c.expire)
	c.expire = m.timers.Set(at, timer{call: c, expire: true})
	return true
}

// dropUnwanted ends what nobody waits for, as nobody will ask for it again.
func (m *Machine) dropUnwanted() {
	for _, id := range slices.Sorted(maps.Keys(m.keys.queries)) {
		if q := m.keys.queries[id]; q.isAhead() {
			m.timers.Stop(q.timer)
			m.keysDue(q)
		}
	}
	for _, op := range slices.Sorted(maps.Keys(m.ops)) {
		switch c := m.ops[op]; {
		case c.desk != nil && !c.wanted(), c.ahead:
			m.cancel(c)
		case c.expire != nil && c.queue == nil && c.desk == nil:
			m.abandon(c)
		}
	}
}

// heldText says what a caller whose time is up may wait for.
func (c *call) heldText() string {
	of := ""
	if c.total > 0 {
		of = fmt.Sprintf(" of %d", c.total)
	}
	return fmt.Sprintf("fsbus: %d%s bytes of the answer of %s are here, the rest follows; ask again", c.size, of, c.host.Name)
}

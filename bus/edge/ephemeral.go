package edge

import (
	"time"

	"golang.org/x/time/rate"

	"fsbus/sched"
)

// Shed says why a transaction with presence and typing only was answered without
// the homeserver.
type Shed uint8

// The reasons.
const (
	ShedSuperseded Shed = iota // a newer one says all that it said
	ShedExpired                // it is too old to be of use
	ShedHeld                   // its turn did not come within EphemeralHold
	ShedRoom                   // others needed the room
	ShedDropped                // they are dropped all
	ShedDrained                // the bus is being stopped
	NumSheds       = 6
)

var shedNames = [NumSheds]string{"superseded", "expired", "held", "room", "dropped", "drained"}

// String returns the reason as metrics and the status page show it.
func (s Shed) String() string {
	if s >= NumSheds {
		return "invalid"
	}
	return shedNames[s]
}

// shed answers a transaction with presence and typing only that has not been
// begun, and drops it. That is stored, so that it cannot come back and undo what is
// newer.
func (m *Machine) shed(c *call, why Shed) {
	if !c.txn.Ephemeral || c.txn.PDUs > 0 {
		panic("edge: a transaction that holds more than presence and typing is to be dropped")
	}
	m.stats.Shed[why]++
	c.origin.counts.Shed++
	m.unlink(c)
	m.uncrowd(c)
	m.count(c, false)
	for _, r := range c.waiters {
		r.call = nil
		m.stats.Empties++
		m.emit(Empty{r.Req})
		m.settled(r)
	}
	c.waiters = nil
	if c.origin.current == c {
		c.origin.current = nil
	}
	m.freeLeader(c)
	m.update(c.origin)
	c.op = 0
	m.toRecord(c, false)
}

// empty is shed for one that has just come.
func (m *Machine) empty(r *request, o *origin, why Shed) {
	m.stats.Shed[why]++
	o.counts.Shed++
	m.stats.Empties++
	m.emit(Empty{r.Req})
	m.settled(r)
	m.free(r)
}

// shedAll drops all that wait.
func (m *Machine) shedAll(why Shed) {
	for m.line[BandEphemeral].n > 0 {
		m.shed(m.line[BandEphemeral].first, why)
	}
}

// dropAt returns when a transaction is dropped, and why.
func (c *call) dropAt(hold time.Duration) (sched.Time, Shed) {
	at := c.arrived.Add(hold)
	if e := c.txn.Expires; e != 0 && e < at {
		return e, ShedExpired
	}
	return at, ShedHeld
}

// supersede drops what c makes needless of its origin, before c waits itself: those
// that came before it and say nothing that it does not.
func (m *Machine) supersede(c *call) {
	if m.cfg.Ephemeral == PassEphemeral {
		return
	}
	var next *call
	for old := c.origin.queue[BandEphemeral].first; old != nil && old.seq < c.seq; old = next {
		next = old.link[linkQueue].next
		if covers(c.txn.Covers, old.txn.Covers) {
			m.shed(old, ShedSuperseded)
		}
	}
}

// covers reports whether all of old, of which there is some, is in wide; both are
// ascending.
func covers(wide, old []uint64) bool {
	if len(old) == 0 || len(old) > len(wide) {
		return false
	}
	for _, k := range old {
		for len(wide) > 0 && wide[0] < k {
			wide = wide[1:]
		}
		if len(wide) == 0 || wide[0] != k {
			return false
		}
		wide = wide[1:]
	}
	return true
}

const (
	// calm is the pressure, in 1/100 %, up to which presence has its whole rate,
	// hard that from which it has a quarter.
	calm, hard = 1500, 6000
)

const (
	// slowest is the least rate of presence and typing in a second, however long the
	// homeserver takes: the rate could not recover if nothing was measured any more.
	slowest = 0.25
	// smoothing is how many answers count for the time that the homeserver takes over
	// presence and typing.
	smoothing = 8
	// outlier is by how much more than the others one of them counts at most.
	outlier = 4
)

// tookEphemeral notes how long the homeserver took over presence or typing. What waited for
// something else than a processor does not count.
func (m *Machine) tookEphemeral(c *call) {
	if c.stalled {
		return
	}
	took := m.now.Sub(c.started)
	if m.measured++; m.measured > 1 {
		took = min(took, outlier*m.ephemeral)
	}
	// The first ones count for more, so that a bad one is soon made up for.
	m.ephemeral += (took - m.ephemeral) / time.Duration(min(m.measured, smoothing))
	m.setPace()
}

// setPace sets the rate of presence and typing by the time that the homeserver takes
// over one, and by the pressure on the host.
func (m *Machine) setPace() {
	limit := m.cfg.EphemeralRate
	if m.ephemeral > 0 {
		limit = min(limit, m.cfg.EphemeralShare/m.ephemeral.Seconds())
	}
	if over := min(m.pressure, hard) - calm; over > 0 {
		limit *= 1 - 0.75*float64(over)/(hard-calm)
	}
	limit = max(limit, min(slowest, m.cfg.EphemeralRate))
	m.pace.SetLimitAt(m.now.Std(), rate.Limit(limit))
	m.pace.SetBurstAt(m.now.Std(), burst(limit/4))
}

func burst(limit float64) int { return max(1, int(limit)) }

// mayPace reports whether presence and typing may go now, and if only time is in
// the way, when.
func (m *Machine) mayPace() (bool, sched.Time) {
	if m.cfg.Ephemeral == PassEphemeral {
		return true, 0
	}
	if until := m.joins.quiet(m.cfg.JoinHold); m.now < until && !m.draining {
		return false, until
	}
	if tokens := m.pace.TokensAt(m.now.Std()); tokens < 1 {
		return false, m.now.Add(forToken(tokens, m.pace.Limit()))
	}
	return true, 0
}

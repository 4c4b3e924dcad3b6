package bus

import (
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
)

// A host that has been away for long is tried rarely. Somebody who writes to a user of
// it, or asks for that user's keys, may know better, and a person waits: such a request
// may be one attempt ahead of the host's time. That is bounded for each host and for
// all of them, since a message to a large room is one for each of its dead servers.
const (
	// spendEach is how long it takes until the next such attempt at one host.
	spendEach = 5 * time.Minute
	// spendAfter is how long after any attempt it comes at the earliest.
	spendAfter = 10 * time.Second
	// spendRate and spendBurst bound those at all hosts, in attempts a second and
	// attempts at once.
	spendRate  = 0.5
	spendBurst = 20
)

func newSpending() *rate.Limiter { return rate.NewLimiter(spendRate, spendBurst) }

// spend reports whether the host's back-off may be ended for the sake of a user, and
// takes note of it if so.
func (m *Machine) spend(h *host) bool {
	if h.spent != 0 && m.now.Sub(h.spent) < spendEach || h.inUse > 0 || !m.spending.AllowN(m.now.Std(), 1) {
		return false
	}
	h.spent = m.now
	m.stats.Spent++
	return true
}

// spendFor reports whether a request may try a host that is backing off. Whether a name
// exists now costs next to nothing to find out, so any request may; else those behind
// which a message waits.
func (m *Machine) spendFor(a Arrived, h *host) bool {
	if h.hanging(m.now) {
		return false
	}
	noName := h.LastFailure == matrix.FailNoName || h.LastFailure == matrix.FailDNS
	if a.Class != matrix.ClassEvent && a.Class != matrix.ClassDevice && !noName {
		return false
	}
	return m.now.Sub(h.LastTry) >= spendAfter && m.spend(h)
}

// writtenTo: something durable has been taken over for a destination. Its host is tried
// ahead of its time if that may be, and else no later than what is durable waits. What
// it did not take is not tried ahead of its time.
func (m *Machine) writtenTo(name matrix.ServerName) {
	if q := m.outbox.queues[name]; q != nil && q.waits == waitsOwn && q.notBefore > m.now && !q.durable() {
		q.notBefore = min(q.notBefore, m.now.Add(m.pause(q.verdict.backoff(), q.failures, q.since, true)))
	}
	h := m.hosts[name]
	if h == nil || !h.backingOff(m.now) {
		return
	}
	if !h.hanging(m.now) && m.spend(h) {
		h.NextTry = min(h.NextTry, max(m.now, h.LastTry.Add(spendAfter)))
	} else {
		h.NextTry = min(h.NextTry, m.now.Add(m.pause(backoffs[h.LastFailure], h.Failures, h.FirstFailure, true)))
	}
	m.ready(h)
}

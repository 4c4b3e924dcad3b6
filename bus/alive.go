package bus

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

const (
	// aliveShare and aliveMost are after which part of its back-off, and after how
	// long at the latest, a server that sends us something is tried: it may well
	// hear nothing, and then the back-off goes on.
	aliveShare = 8
	aliveMost  = 10 * time.Minute
)

// alive: a server has sent something authentic. If it is in back-off, what is
// pending for it is tried once now, and so is what the homeserver wants next.
func (m *Machine) alive(name matrix.ServerName) {
	h := m.hosts[name]
	if h != nil && h.Failures > 0 && !h.reachable && m.worthTrying(h.LastTry, h.NextTry) {
		h.NextTry = m.now
		m.stats.Revived++
		m.ready(h)
	}
	q := m.outbox.queues[name]
	if q == nil || q.call != nil {
		return
	}
	switch {
	case q.waits == waitsStart:
		q.notBefore = m.now
	case q.waits == waitsOwn && q.verdict.silent() && (q.revived == 0 || m.now.Sub(q.revived) >= aliveMost) && m.worthTrying(q.lastTry, q.notBefore):
		// Not more often: that it sends does not say that it listens.
		q.notBefore, q.revived = m.now, m.now
	}
	m.plan(q)
}

// worthTrying reports whether something that was tried at one time, and is to be
// tried again at another, may be tried now.
func (m *Machine) worthTrying(last, next sched.Time) bool {
	return next > m.now && m.now.Sub(last) >= min(next.Sub(last)/aliveShare, aliveMost)
}

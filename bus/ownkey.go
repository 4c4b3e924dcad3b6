package bus

import (
	"time"

	"fsbus/sched"
)

// A 401 to a transaction is about our key: the destination does not have it yet, or what it
// has is another. So whoever answered that is tried as soon as something has changed.

const (
	// servedEach is how often what others fetch may end such waits: anybody can ask for our
	// keys, without saying who he is.
	servedEach = 30 * time.Second
	// servedAfter is how long after the last attempt a destination is tried at the earliest.
	servedAfter = 5 * time.Second
	// servedLater is how long who has fetched our keys has to look at them.
	servedLater = time.Second
)

// keyServed: another server has fetched our keys.
func (m *Machine) keyServed() {
	o := &m.outbox
	if o.served != 0 && m.now.Sub(o.served) < servedEach {
		return
	}
	if m.trustAgain(m.now.Add(-servedAfter), m.now.Add(servedLater)) {
		o.served = m.now
	}
}

// trustAgain has each destination tried at a moment that did not accept our signature, and
// was tried last before another. It reports whether there was one.
func (m *Machine) trustAgain(before, at sched.Time) (any bool) {
	for _, q := range m.outbox.inOrder() {
		if q.waits != waitsOwn || !q.verdict.untrusted() || q.call != nil || q.notBefore <= at || q.lastTry > before {
			continue
		}
		any = true
		q.notBefore = at
		m.plan(q)
	}
	return any
}

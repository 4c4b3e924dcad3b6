package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// OutboxSnapshot is the state of the outbox at one moment, for people and metrics.
type OutboxSnapshot struct {
	Stats     OutboxStats
	Suspended string                     // why nothing is delivered; "" if it is
	Queues    int                        // destinations with something pending, or held
	MaxQueues int                        // of at most so many
	Items     [matrix.NumKinds + 1]int64 // pending, by kind
	Bytes     int64                      // of their payloads, shared ones counted for each destination
	Oldest    time.Duration              // since the oldest was accepted
	Active    sched.Gauge                // queues that wait for a worker or have one
	Failing   int                        // queues whose last delivery did not go well
	Held      int                        // by an admin
	Full      int                        // destinations of which something was refused lately
	Offers    int                        // transactions that are not answered
	Pace      PaceStatus
}

// fullFor is for how long a destination counts as full after a refusal.
const fullFor = 10 * time.Minute

// Outbox returns the state of the outbox; ok is false if there is none.
func (m *Machine) Outbox(now sched.Time) (s OutboxSnapshot, ok bool) {
	o := &m.outbox
	if o.pacer == nil {
		return s, false
	}
	s = OutboxSnapshot{
		Stats: o.stats, Suspended: o.suspended, Queues: len(o.queues), MaxQueues: int(m.cfg.Outbox.MaxQueues),
		Active: o.active, Offers: len(o.offers), Pace: o.pacer.Status(now),
	}
	for _, q := range o.queues { // sums and a maximum: order does not matter
		for k, n := range q.Items {
			s.Items[k] += int64(n)
		}
		s.Bytes += q.Bytes
		if q.Oldest != 0 {
			s.Oldest = max(s.Oldest, now.Sub(q.Oldest))
		}
		if q.failures > 0 {
			s.Failing++
		}
		if q.Held {
			s.Held++
		}
		if q.fullAt != 0 && now.Sub(q.fullAt) < fullFor {
			s.Full++
		}
	}
	return s, true
}

// Queues calls f for each destination that has something pending or is held, by
// name.
func (m *Machine) Queues(now sched.Time, f func(QueueStatus)) {
	for _, q := range m.outbox.inOrder() {
		f(m.queueStatus(now, q))
	}
}

// QueueStatus returns the queue of one destination; ok is false if nothing is
// known of it.
func (m *Machine) QueueStatus(now sched.Time, name matrix.ServerName) (s QueueStatus, ok bool) {
	if q := m.outbox.queues[name]; q != nil {
		return m.queueStatus(now, q), true
	}
	s = QueueStatus{Name: name, State: "idle", Why: "nothing is pending for it"}
	if p := m.outbox.pacer; p != nil {
		s.Answer, s.Paced = p.Explain(now, name)
	}
	return s, s.Paced
}

// HostStatus returns what is known of a destination's host; ok is false if
// nothing is.
func (m *Machine) HostStatus(now sched.Time, name matrix.ServerName) (s HostStatus, ok bool) {
	h := m.hosts[name]
	if h == nil {
		return s, false
	}
	return h.status(now), true
}

func (m *Machine) queueStatus(now sched.Time, q *queue) QueueStatus {
	s := QueueStatus{Name: q.name, Backlog: q.Backlog, Failures: q.failures, LastError: q.lastError, LastTry: q.lastTry}
	s.Answer, s.Paced = m.outbox.pacer.Explain(now, q.name)
	h := m.hosts[q.name]
	at, timed := m.nextTry(q)
	switch c := q.call; {
	case c != nil && c.phase == phaseWaiting:
		s.State, s.Why = "queued", c.whyNot(now)
	case c != nil && c.phase == phaseIntent, c != nil && c.phase == phasePacking:
		s.State, s.Why = "sending", "a transaction is being made"
	case c != nil:
		s.State, s.Why = "sending", fmt.Sprintf("a transaction is on its way for %s", round(now.Sub(c.started)))
	case q.unnoted:
		s.State, s.Why = "waiting", "what became of the last transaction could not be written down; that is tried again soon"
	case q.busy:
		s.State, s.Why = "sending", "the outcome of the last transaction is being written"
	case q.Held:
		s.State, s.Why = "held", "an admin holds it"
	case m.outbox.suspended != "":
		s.State, s.Why = "waiting", "nothing is delivered: "+m.outbox.suspended
	case m.draining:
		s.State, s.Why = "waiting", "fsbus is stopping"
	case !timed:
		s.State, s.Why = "idle", "nothing is pending for it"
	case at > now && h != nil && h.Failures > 0 && !h.reachable && h.NextTry >= at:
		s.State, s.NextTry, s.Why = "backing off", at, fmt.Sprintf("it cannot be reached: %s; attempts that failed in a row: %d", h.Cause(), h.Failures)
		if s.LastError == "" {
			s.LastError = h.Cause()
		}
	case h != nil && h.pausedUntil >= at && h.pausedUntil > now:
		s.State, s.NextTry, s.Why = "backing off", at, fmt.Sprintf("it limits our rate and asked for another %s", round(h.pausedUntil.Sub(now)))
	case q.failures > 0 && at > now:
		s.State, s.NextTry, s.Why = "backing off", at, fmt.Sprintf("%s; deliveries that failed in a row: %d", q.lastError, q.failures)
		if q.trial == trialIll {
			s.Why += "; an empty transaction did not go well either, so it is the server"
		}
	case at > now && q.notBefore >= at && q.waits == waitsStore:
		s.State, s.NextTry, s.Why = "waiting", at, "what is to be sent could not be written down; that is tried again soon"
	case at > now && q.notBefore >= at:
		s.State, s.NextTry, s.Why = "waiting", at, "after a start destinations are begun with one after the other"
	case at > now:
		s.State, s.NextTry, s.Why = "waiting", at, "for a moment, so that what follows may ride along"
	default:
		s.State, s.Why = "queued", fmt.Sprintf("%d destinations are before it or being sent to", m.outbox.active.Used)
	}
	return s
}

// whyNot says in words what a call in its host's queue waits for.
func (c *call) whyNot(now sched.Time) string {
	h := c.host
	switch {
	case h.inUse > 0:
		return fmt.Sprintf("%d other requests to it are under way", h.inUse)
	case h.pausedUntil > now:
		return fmt.Sprintf("it limits our rate and asked for another %s", round(h.pausedUntil.Sub(now)))
	}
	return fmt.Sprintf("no worker is free for a host that is %s; it has waited for %s", h.lane(now), round(now.Sub(c.queued)))
}

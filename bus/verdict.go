package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// A destination's fault and an item's fault look the same: an error. What tells
// them apart is an empty transaction, which holds nothing that could be disliked.
// It is the control: where it is taken, what was refused is refused for what it
// holds; where it is not, the server is ill, and what is pending waits.

// verdict is how an attempt at a transaction ended that may have reached its
// destination. The zero value is none.
type verdict struct {
	failure matrix.Failure // FailNone: it was answered
	status  int            // of the answer, 0 if there was none
}

func (c *call) verdict(ev Done) verdict {
	v := verdict{failure: ev.Failure}
	if v.failure == matrix.FailCancelled && (c.overdue || ev.Sent) {
		v.failure = matrix.FailTimeout
	}
	if c.phase == phaseAnswered {
		v.status = c.status
	}
	return v
}

// well reports whether the transaction was taken.
func (v verdict) well() bool { return v.failure == matrix.FailNone && v.status == 200 }

// String says it in words; status is only of interest where the answer was whole.
func (v verdict) String() string {
	if v.failure != matrix.FailNone {
		return failureText(v.failure, 0)
	}
	return failureText(matrix.FailNone, v.status)
}

// silent reports whether the homeserver itself may not have been there: a gateway
// answered in its place, or nobody. That it sends something shows then that it is
// back.
func (v verdict) silent() bool {
	return v.failure == matrix.FailTimeout || v.failure == matrix.FailNone && gateway(v.status)
}

// untrusted reports whether it could not, or would not, verify our signature. That is
// our key, or its knowledge of it, and no fault of what was sent.
func (v verdict) untrusted() bool { return v.failure == matrix.FailNone && v.status == 401 }

// telling reports whether the same again and again can come from what the transaction
// holds.
func (v verdict) telling() bool {
	switch v.failure {
	case matrix.FailNone:
		return v.status != 429 && v.status != 200
	case matrix.FailLocal, matrix.FailCancelled:
		return false
	}
	return true
}

// toAsk is how many times in a row the same must come of a batch before the control is
// sent. After that it must come once more. An answer is definite; a connection that
// broke may have broken for many reasons, and the batch may have been taken.
func (v verdict) toAsk() int32 {
	if v.failure == matrix.FailNone && !gateway(v.status) {
		return 2
	}
	return 3
}

// How long a destination's queue waits after an attempt that reached the destination.
// The host's own back-off is for those that did not.
var (
	brokenBackoff  = sched.Backoff{First: 5 * time.Second, Factor: 2, Cap: maxBackoff}
	gateBackoff    = sched.Backoff{First: 10 * time.Second, Factor: 2, Cap: maxBackoff}
	refusedBackoff = sched.Backoff{First: 5 * time.Second, Factor: 3, Cap: maxBackoff}
	// Most of the time it just does not have our key yet.
	untrustedBackoff = sched.Backoff{First: 5 * time.Second, Factor: 2, Cap: leastCap}
	// It bans us: that does not pass quickly.
	deniedBackoff = sched.Backoff{First: time.Minute, Factor: 3, Cap: maxBackoff}
	// What answers is not a Matrix server, or not any more.
	strangeBackoff = sched.Backoff{First: 5 * time.Minute, Factor: 2, Cap: maxBackoff}
)

func (v verdict) backoff() sched.Backoff {
	switch {
	case v.failure == matrix.FailContent:
		return strangeBackoff
	case v.failure != matrix.FailNone, v.status == 429: // without a time
		return brokenBackoff
	case gateway(v.status):
		return gateBackoff
	case v.untrusted():
		return untrustedBackoff
	case v.status == 403:
		return deniedBackoff
	case v.status == 404 || v.status == 405 || v.status < 400:
		return strangeBackoff
	}
	return refusedBackoff
}

// trial is what is being found out about a batch that its destination does not take.
type trial uint8

const (
	trialNone  trial = iota
	trialAsk         // it has failed often enough: the control goes next
	trialWell        // the control was taken: the batch once more
	trialAgain       // and it failed once more: the control again, as the server may have come back in between
	trialIll         // the control failed: it is the server
)

// asks reports whether the control goes next, and at once: it is not what has failed.
func (t trial) asks() bool { return t == trialAsk || t == trialAgain }

// illBatch is which attempt at a server that is ill is made with the batch itself: one
// that does not like the control must not be taken to be ill for ever.
const illBatch = 4

// barrenFor is how long an item that stands alone is refused before it is set aside, if
// the destination has taken nothing since the one before. A server may take what is
// empty and be ill nevertheless.
const barrenFor = time.Hour

// triesControl reports whether the next attempt is the control.
func (q *queue) triesControl() bool {
	return q.trial.asks() || q.trial == trialIll && q.failures%illBatch != 0
}

// startControl sends the control in place of what is pending.
func (m *Machine) startControl(c *call) {
	c.control = m.newTxnID()
	c.queue.lastTry = m.now
	m.outbox.stats.Controls++
	c.expire = m.timers.Set(m.now.Add(m.cfg.ClientTimeout), timer{call: c, expire: true})
	m.transmit(c)
}

// controlTaken: the server is well. It reports whether what it does not take is to be
// divided now.
func (q *queue) controlTaken() (divide bool) {
	switch q.trial {
	case trialAsk:
		q.trial = trialWell
	case trialAgain:
		q.trial = trialNone
		return true
	default:
		q.trial = trialNone
		q.failures, q.refusals, q.notBefore = 0, 0, 0
	}
	return false
}

// unwell notes that an attempt did not go well, and when the next is made.
func (m *Machine) unwell(q *queue, c *call, ev Done, v verdict) {
	if q.failures == 0 {
		q.since = m.now
	}
	q.failures += max(1, ev.Sends)
	q.waits, q.lastError = waitsOwn, v.String()
	if ev.Detail != "" {
		q.lastError += " (" + cut(ev.Detail) + ")"
	}
	if !ev.Sent && v.failure != matrix.FailNone && v.failure != matrix.FailLocal {
		// Nothing reached it: its host's own back-off says when.
		q.verdict, q.refusals, q.notBefore = verdict{}, 0, 0
		q.waits = waitsHost
		if q.trial != trialIll {
			q.trial = trialNone
		}
		return
	}
	if v.status == 429 && c.told {
		q.failures--
		q.notBefore = c.host.pausedUntil
		return
	}
	same := q.verdict == v
	q.verdict = v
	if c.control != "" {
		q.trial, q.refusals = trialIll, 0
	} else {
		m.judge(q, c, v, same)
	}
	q.notBefore = m.now.Add(m.pause(v.backoff(), q.failures, q.since, q.durable()))
}

// judge counts what a batch came to, and says when it is time to look for the item that
// its destination does not take.
func (m *Machine) judge(q *queue, c *call, v verdict, same bool) {
	if !v.telling() {
		return
	}
	if !same {
		q.refusals = 0
		if q.trial != trialIll {
			q.trial = trialNone
		}
	}
	if q.refusals++; q.refusals == 1 {
		q.refusedSince = m.now
	}
	if c.txn.PDUs+c.txn.EDUs == 1 && q.barren && m.now.Sub(q.refusedSince) < barrenFor {
		return
	}
	switch {
	case q.trial == trialNone && q.refusals >= v.toAsk():
		q.trial = trialAsk
	case q.trial == trialWell:
		q.trial = trialAgain
	}
	q.suspect = c.txn.ID
}

// reason says why an item is set aside, for people.
func (q *queue) reason() string {
	return fmt.Sprintf("%s does not take it (%s, %d times), but took a transaction without it", q.name, q.lastError, q.refusals)
}

// pause is how long after so many failures in a row, of which the first was at the
// moment since, the next attempt is made. What is durable does not wait for longer than
// a part of the outage so far, so that it goes out soon after the repair.
func (m *Machine) pause(b sched.Backoff, failures int32, since sched.Time, durable bool) time.Duration {
	if durable {
		b.Cap = min(b.Cap, max(leastCap, m.now.Sub(since)/outagePart))
	}
	return b.Delay(failures, m.rng)
}

const (
	// leastCap and outagePart are the cap of a back-off where something durable waits:
	// ten minutes, or a sixteenth of the time for which the destination has been away.
	leastCap   = 10 * time.Minute
	outagePart = 16
)

// durable reports whether something is pending that does not expire.
func (b *Backlog) durable() bool {
	return b.Items[matrix.KindPDU]+b.Items[matrix.KindToDevice]+b.Items[matrix.KindDeviceList]+b.Items[matrix.KindSigningKey]+b.Items[matrix.KindOther] > 0
}

package bus

import (
	"fmt"
	"strconv"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// A delivery is a call that no request waits for: it has its queue in their place.
// Its way, each step only after the one before is known to be on disk or over:
//
//	a worker is free -> Pack, Packed -> Send, Done -> Settle, Settled -> the next
//
// The worker is given back at Done. Until Settled the queue is busy.

// A destination that is in doubt gets the control in place of a packed transaction
// (verdict.go): then Send follows at once, and nothing is settled but what it decides.

// startDelivery packs the next transaction, now that a worker is free.
func (m *Machine) startDelivery(c *call) {
	q, o := c.queue, &m.outbox
	if q.Held || o.suspended != "" || m.draining {
		m.unstart(c)
		m.leave(q)
		m.plan(q)
		return
	}
	if q.triesControl() {
		m.startControl(c)
		return
	}
	m.nextBatch++
	c.batch, c.phase = m.nextBatch, phasePacking
	o.packs[c.batch] = c
	m.emit(Pack{Batch: c.batch, Dest: q.name, TxnID: m.newTxnID(), MaxBytes: m.cfg.Outbox.MaxTransaction})
}

// newTxnID returns an id for a transaction that no other has.
func (m *Machine) newTxnID() string {
	o := &m.outbox
	o.txns++
	return o.txnPrefix + strconv.FormatUint(o.txns, 36)
}

func (m *Machine) packed(ev Packed) {
	o := &m.outbox
	c := o.packs[ev.Batch]
	if c == nil {
		panic(fmt.Sprintf("bus: batch %d is packed, which is not under way (%d are)", ev.Batch, len(o.packs)))
	}
	delete(o.packs, ev.Batch)
	q := c.queue
	if ev.OK {
		q.Backlog = ev.Backlog
		o.stats.expired(ev.Expired)
		o.stats.SetAside += int64(ev.SetAside)
	}
	if !ev.OK || ev.Txn.ID == "" {
		c.batch = 0 // there is nothing to let go of
		m.unstart(c)
		m.leave(q)
		if !ev.OK {
			m.stats.CommitsFailed++
		}
		if !ev.OK || q.Total() > 0 { // or the store has miscounted
			q.notBefore, q.waits = m.now.Add(storePause), waitsStore
		} else {
			q.due, q.left = 0, false
		}
		m.plan(q)
		return
	}
	// All that came so far is in it, or will be in the next.
	q.due, q.left, q.packed = 0, true, q.Total()
	c.txn = ev.Txn
	q.lastTry = m.now
	o.stats.Transactions++
	if ev.Txn.Again {
		o.stats.Retried++
	} else {
		q.forgive() // whatever was refused, it was not this
	}
	c.expire = m.timers.Set(m.now.Add(m.cfg.ClientTimeout), timer{call: c, expire: true})
	m.transmit(c)
}

// delivered: the attempt is over, its worker given back.
func (m *Machine) delivered(c *call, ev Done, suspect bool) {
	q, o := c.queue, &m.outbox
	m.timers.Stop(c.expire)
	c.expire = nil
	v, txn := c.verdict(ev), c.txn
	switch {
	case v.well() && c.control != "":
		m.leave(q)
		if q.controlTaken() {
			o.stats.Bisected++
			m.settle(q, q.suspect, Bisect, q.reason())
			return
		}
		m.plan(q)
		return
	case v.well():
		o.stats.PDUErrors += int64(ev.PDUErrors)
		m.leave(q)
		m.settle(q, txn.ID, Delivered, "")
		return
	case suspect && !ev.Sent:
		c.host.suspect = !c.host.reachable
	default:
		if c.phase == phaseRunning {
			m.blame(c, ev)
			c.host.took = max(c.host.took, m.now.Sub(c.asked))
		}
		m.unwell(q, c, ev, v)
		if c.host.backingOff(m.now) {
			m.refuseQueue(c.host)
		}
	}
	m.leave(q)
	if c.control == "" && !ev.Sent && !txn.Again { // else an earlier attempt, perhaps before a crash, may have arrived
		o.stats.Thawed++
		m.settle(q, txn.ID, Thaw, "")
		return
	}
	m.rest(q)
}

// forgive forgets what came of a batch that is not there any more. That the server is
// ill is not about the batch.
func (q *queue) forgive() {
	q.refusals = 0
	if q.trial != trialIll {
		q.trial = trialNone
	}
}

// settle has the store note what became of a transaction.
func (m *Machine) settle(q *queue, id string, outcome Outcome, reason string) {
	q.busy = true
	m.note(&settling{q, id, outcome, reason})
}

func (m *Machine) note(s *settling) {
	m.nextBatch++
	m.outbox.settles[m.nextBatch] = s
	m.emit(Settle{Batch: m.nextBatch, Dest: s.queue.name, TxnID: s.id, Outcome: s.outcome, Reason: s.reason})
}

// noteAgain tries to note what could not be noted before, unless the bus stops: after
// the start the transaction is then sent again, with the same id.
func (m *Machine) noteAgain(s *settling) {
	m.outbox.unsettled--
	if !m.draining {
		m.note(s)
		return
	}
	s.queue.busy, s.queue.unnoted = false, false
	m.plan(s.queue)
}

func (m *Machine) settled(ev Settled) {
	o := &m.outbox
	s, ok := o.settles[ev.Batch]
	if !ok {
		panic(fmt.Sprintf("bus: batch %d is settled, which is not under way (%d are)", ev.Batch, len(o.settles)))
	}
	delete(o.settles, ev.Batch)
	q := s.queue
	if !ev.OK {
		// What became of the transaction is known, so it is not sent again meanwhile.
		m.stats.CommitsFailed++
		o.unsettled++
		q.unnoted = true
		m.timers.Set(m.now.Add(storePause), timer{outcome: s})
		return
	}
	q.busy, q.unnoted = false, false
	q.Backlog = ev.Backlog
	o.stats.SetAside += int64(ev.SetAside)
	switch s.outcome {
	case Delivered:
		for k, n := range ev.Delivered {
			o.stats.ItemsOut[k] += int64(n)
			q.packed -= int64(n)
		}
		q.left = q.packed > 0
		q.failures, q.refusals, q.verdict, q.trial, q.lastError, q.notBefore = 0, 0, verdict{}, trialNone, "", 0
		q.barren = false
		q.takes = ev.Backlog.Frozen
	case Bisect:
		q.refusals, q.notBefore = 0, 0 // dividing costs nothing, so the halves need not wait
		if ev.SetAside > 0 {
			q.barren = q.barren || !q.takes
			q.takes = false // that would set aside one after the other in an outage
			break
		}
		q.failures = 0
	}
	q.takes = q.takes && ev.Backlog.Frozen
	m.rest(q)
}

// rest has what is needless given up after a long outage, and then goes on.
func (m *Machine) rest(q *queue) {
	old := q.Oldest != 0 && m.now.Sub(q.Oldest) >= m.cfg.Outbox.CatchUpAfter
	failing := q.failures > 0
	if h := m.hosts[q.name]; h != nil {
		failing = failing || h.Failures > 0
	}
	recent := q.compacted != 0 && m.now.Sub(q.compacted) < compactEvery
	if old && failing && !recent && q.Items[matrix.KindPDU] > 1 {
		m.compact(q)
		return
	}
	m.plan(q)
}

func (m *Machine) compact(q *queue) {
	q.busy, q.compacted = true, m.now
	m.trim(q, Compact{Dest: q.name})
}

func (m *Machine) trim(q *queue, e Compact) {
	m.nextBatch++
	e.Batch = m.nextBatch
	m.outbox.trims[e.Batch] = q
	m.emit(e)
}

func (m *Machine) sweepAll(after int64) {
	m.outbox.sweeping = true
	m.nextBatch++
	m.outbox.trims[m.nextBatch] = nil
	m.emit(Expire{Batch: m.nextBatch, After: after})
}

// trimmed: a Compact or an Expire is over.
func (m *Machine) trimmed(ev Trimmed) {
	o := &m.outbox
	q, ok := o.trims[ev.Batch]
	if !ok {
		panic(fmt.Sprintf("bus: batch %d is trimmed, which is not under way (%d are)", ev.Batch, len(o.trims)))
	}
	delete(o.trims, ev.Batch)
	if ev.OK {
		o.stats.expired(ev.Expired)
		o.stats.Superseded += int64(ev.Superseded)
	} else {
		m.stats.CommitsFailed++
	}
	if q == nil {
		o.sweeping = false
		for _, r := range ev.Changed {
			m.backlog(r.Name, r.Backlog, [matrix.NumKinds + 1]int32{}, 0)
		}
		if ev.OK && ev.Next != 0 && !m.draining {
			m.sweepAll(ev.Next)
		}
		return
	}
	for _, r := range ev.Changed {
		q.Backlog = r.Backlog
	}
	if ev.OK && ev.Next != 0 && !m.draining {
		m.trim(q, Compact{Dest: q.name})
		return
	}
	q.busy = false
	m.plan(q)
}

// OutboxStats counts what the outbox has done since it was made. Arrays are by
// kind of item.
type OutboxStats struct {
	Accepted   int64 // transactions of the homeserver, stored
	Repeated   int64 // that were stored before
	Full       int64 // refused since there was no room
	NotStored  int64 // refused since the store failed
	ItemsIn    [matrix.NumKinds + 1]int64
	Merged     int64 // items that took the place of others
	Duplicates int64 // items that were pending already
	ItemsOut   [matrix.NumKinds + 1]int64
	Expired    [matrix.NumKinds + 1]int64
	Superseded int64 // events that a destination need not get, since it was away for long

	Transactions int64 // sent, or tried to be
	Retried      int64 // those of them that had been tried before
	Thawed       int64 // taken apart again, since no connection came about
	Bisected     int64
	Controls     int64 // empty ones, to find out whether it is the server that refuses
	SetAside     int64
	PDUErrors    int64 // events that a destination took the transaction of, and refused
}

func (s *OutboxStats) expired(kinds [matrix.NumKinds + 1]int32) {
	for k, n := range kinds {
		s.Expired[k] += int64(n)
	}
}

// QueueRecord is a destination and what the store holds for it.
type QueueRecord struct {
	Name    matrix.ServerName
	Backlog Backlog
}

// Outcome is what became of a packed transaction.
type Outcome uint8

const (
	// Delivered: the destination has answered 200.
	Delivered Outcome = 1 + iota
	// Bisect: the destination refuses it, and will go on to.
	Bisect
	// Thaw: not a byte of it has reached the destination.
	Thaw
)

func (o Outcome) String() string {
	switch o {
	case Delivered:
		return "delivered"
	case Bisect:
		return "bisect"
	case Thaw:
		return "thaw"
	}
	return "invalid"
}

// TxnInfo is a transaction that was packed.
type TxnInfo struct {
	ID         string // "": there is nothing to send
	Again      bool   // it had been packed before
	PDUs, EDUs int32
	Bytes      int64
	Oldest     sched.Time
}

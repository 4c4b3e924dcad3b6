package edge

import (
	"fmt"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// transaction handles a transaction whose signature is good.
func (m *Machine) transaction(r *request, o *origin) {
	if c := m.txns[txnKey{r.Origin, r.Txn.ID}]; c != nil {
		m.again(r, c)
		return
	}
	b := bandOf(&r.Arrived, false)
	lossy := r.Txn.Ephemeral && m.cfg.Ephemeral != PassEphemeral
	if lossy && m.cfg.Ephemeral == DropEphemeral {
		m.empty(r, o, ShedDropped)
		return
	}
	for o.txns >= m.cfg.TxnQueue || !o.fits(r, &m.cfg) {
		old := o.queue[BandEphemeral].first
		switch {
		case old != nil && old.paced(m):
			m.shed(old, ShedRoom)
		case lossy:
			m.empty(r, o, ShedRoom)
			return
		default:
			m.full(o, r, fmt.Sprintf("fsbus: %d transactions wait already, of %d bytes in all that are held", o.txns, o.bytes))
			return
		}
	}
	if !m.room(r, b, o) {
		if lossy {
			m.empty(r, o, ShedRoom)
			return
		}
		m.full(o, r, "fsbus: too many requests wait for the homeserver")
		return
	}
	m.admit(r)
	c := m.newCall(r, o, b)
	m.count(c, true)
	m.txns[c.txnKey()] = c
	m.look(c)
}

// again handles a transaction of which there is one already, under way or just
// answered. What it holds does not matter: the id is what counts (S2S
// "Transactions").
func (m *Machine) again(r *request, c *call) {
	m.stats.Joined++
	if r.Txn.BodyHash != c.txn.BodyHash {
		m.differs(r.Req)
	}
	switch {
	case c.phase == phaseRecording && c.op == 0:
		m.stats.Empties++
		m.emit(Empty{r.Req})
		m.settled(r)
		m.free(r)
	case c.phase == phaseRecording && c.replied:
		m.reply(r, c)
		m.free(r)
	case !m.mayJoin(r, c):
		m.full(c.origin, r, "fsbus: too many requests wait for the homeserver")
	default:
		m.join(r, c)
	}
}

// differs notes that a transaction repeats an id with other content.
func (m *Machine) differs(r ReqID) {
	m.stats.Differing++
	m.emit(Differs{r})
}

// looked goes on with what the store knows.
func (m *Machine) looked(ev Looked) {
	c := m.looks[ev.Req]
	if c == nil {
		panic(fmt.Sprintf("edge: request %d was looked up, but not asked for (%d are)", ev.Req, len(m.looks)))
	}
	delete(m.looks, ev.Req)
	t := c.txn
	if t == nil {
		c.origin.looks--
	}
	switch {
	case ev.Found:
		if ev.Differs {
			m.differs(ev.Req)
		}
		m.replay(c, false)
	case len(c.waiters) == 0:
		m.end(c)
	case t == nil:
		m.wait(c)
	case ev.AllPDUs && t.PDUs > 0 && t.EDUs == 0:
		m.replay(c, true)
	case m.mustHold(c):
		m.holdBack(c)
	default:
		m.goes(c)
	}
}

// replay answers from the store.
func (m *Machine) replay(c *call, fromPDUs bool) {
	for _, r := range c.waiters {
		r.call = nil
		if m.stats.Replayed++; fromPDUs {
			m.stats.FromPDUs++
		}
		c.origin.counts.Answered++
		m.emit(Replay{Req: r.Req, FromPDUs: fromPDUs})
		m.settled(r)
	}
	c.waiters = nil
	m.end(c)
}

// goes lets a transaction wait for its turn.
func (m *Machine) goes(c *call) {
	m.supersede(c)
	m.wait(c)
}

// unhold lets a transaction go on that was held back for a join.
func (m *Machine) unhold(c *call) {
	m.unlink(c)
	m.goes(c)
}

// doneTxn handles the end of an attempt at a transaction.
func (m *Machine) doneTxn(c *call, ev Done, lost, broken bool) {
	switch ok := ev.Failure == matrix.FailNone; {
	case ok && c.status == 200:
		m.stats.Acknowledged++
		c.origin.current = nil
		m.freeLeader(c)
		m.update(c.origin)
		if c.txn.Ephemeral {
			// To see one of these twice does no harm, so the disk need not be waited for.
			m.replyAll(c)
		}
		m.toRecord(c, !c.txn.Ephemeral)
		return
	case ok && c.status != 0 && c.status != 429 && !gateway(c.status):
		m.replyAll(c)
		m.emit(Discard{c.op})
		m.end(c)
		return
	}
	m.emit(Discard{c.op})
	if !lost && !broken && c.status == 0 {
		c.unknown++
	}
	switch {
	case len(c.waiters) == 0:
		m.end(c)
	case lost:
		m.stats.Again++
		m.wait(c)
	case c.status == 0 && c.unknown >= maxTries:
		m.refuseAll(c, ForHomeserver, 502, "fsbus: the homeserver does not answer this transaction: "+ev.Failure.String())
	default:
		m.stats.Again++
		c.phase = phasePaused
		m.count(c, true)
		m.line[c.band].insert(c)
		c.timer = m.timers.Set(m.now.Add(min(max(pause, c.retry), maxPause)), timer{call: c})
	}
}

// recorder has the answers to transactions stored, one write at a time. Who sent a
// transaction with anything that must not be lost is answered after that: so
// whoever has had an answer finds it again, whatever happens to the bus.
type recorder struct {
	pending []*call
	batch   []*call
	writing BatchID // 0: none is
	last    BatchID
	urgent  bool // some of pending wait for it
	timer   *sched.Timer[timer]
	top     int
}

func (s *recorder) total() int { return len(s.pending) + len(s.batch) }

// toRecord has the answer to a call stored: soon, if its sender waits for that.
func (m *Machine) toRecord(c *call, soon bool) {
	s := &m.record
	c.phase = phaseRecording
	c.replied = !soon
	if !soon && s.total() >= maxRecording {
		m.stats.Unrecorded++
		m.recordOver(c)
		return
	}
	s.pending = append(s.pending, c)
	s.top = max(s.top, s.total())
	if soon {
		s.urgent = true
	} else if s.timer == nil {
		s.timer = m.timers.Set(m.now.Add(recordAfter), timer{record: true})
	}
}

// store begins the next write.
func (m *Machine) store() {
	s := &m.record
	if s.writing != 0 || len(s.pending) == 0 || !s.urgent && !m.draining && len(s.pending) < maxRecording/4 {
		return
	}
	m.timers.Stop(s.timer)
	s.timer = nil
	s.urgent = false
	s.last++
	s.writing = s.last
	s.batch, s.pending = s.pending, s.batch[:0]
	answers := make([]Stored, len(s.batch))
	for i, c := range s.batch {
		answers[i] = Stored{Origin: c.origin.key.name, Txn: c.txn, Op: c.op}
	}
	m.emit(Record{Batch: s.writing, Answers: answers})
}

func (m *Machine) recorded(ev Recorded) {
	s := &m.record
	if s.writing == 0 || ev.Batch != s.writing {
		panic(fmt.Sprintf("edge: record %d ended, but %d is under way", ev.Batch, s.writing))
	}
	s.writing = 0
	if ev.OK {
		m.stats.Recorded += int64(len(s.batch))
	} else {
		// The homeserver remembers for as long.
		m.stats.Unrecorded += int64(len(s.batch))
	}
	for i, c := range s.batch {
		s.batch[i] = nil
		m.replyAll(c)
		m.recordOver(c)
	}
	s.batch = s.batch[:0]
}

// recordOver ends a call whose answer is stored, or is not going to be.
func (m *Machine) recordOver(c *call) {
	if c.op != 0 {
		m.emit(Discard{c.op})
	}
	m.end(c)
}

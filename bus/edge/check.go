package edge

import (
	"fmt"

	"fsbus/sched"
)

// Check recounts everything that the core keeps running totals of and returns
// the first disagreement. It is for tests; it takes time linear in the number of
// origins and requests.
func (m *Machine) Check() error {
	for _, check := range []func() error{m.checkRequests, m.checkDesk, m.checkCalls, m.checkOrigins, m.checkLanes} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (m *Machine) checkRequests() error {
	var n [2]int32
	var bytes [2]int64
	var open int64
	for id, r := range m.reqs {
		if r.Req != id || r.answered && r.freed {
			return fmt.Errorf("request %d stands as %d, answered %t, freed %t", id, r.Req, r.answered, r.freed)
		}
		p := 0
		if r.stage == stageThrough {
			p = 1
		}
		if want := []*pool{&m.unverified, &m.held}[p]; r.pool != want {
			return fmt.Errorf("request %d in stage %d is counted in the wrong pool", id, r.stage)
		}
		n[p]++
		bytes[p] += r.bytes
		if r.freed != (r.bytes == 0) && r.Size > 0 {
			return fmt.Errorf("request %d, freed %t, counts for %d bytes", id, r.freed, r.bytes)
		}
		if r.answered {
			if r.timer != nil || r.call != nil {
				return fmt.Errorf("request %d is answered and waits", id)
			}
			continue
		}
		open++
		if r.timer == nil || (r.call == nil) != (r.stage != stageThrough) {
			return fmt.Errorf("request %d in stage %d waits for nothing", id, r.stage)
		}
	}
	for i, p := range []*pool{&m.unverified, &m.held} {
		if n[i] != p.n || bytes[i] != p.bytes {
			return fmt.Errorf("pool %d: %d requests of %d bytes, the counts say %d and %d", i, n[i], bytes[i], p.n, p.bytes)
		}
		if (p.topN > p.maxN || p.bytop > p.maxBytes) && !m.reconfigured() {
			return fmt.Errorf("pool %d: %d requests of %d, %d bytes of %d", i, p.topN, p.maxN, p.bytop, p.maxBytes)
		}
	}
	s := &m.stats
	ended := s.Replied + s.Replayed + s.Empties + s.Gone
	for _, n := range s.Refused {
		ended += n
	}
	if ended+open != s.Requests {
		return fmt.Errorf("%d requests came, %d ended and %d are open", s.Requests, ended, open)
	}
	return nil
}

func (m *Machine) checkDesk() error {
	d := &m.desk
	var bytes int64
	var held, running, parked, fetching, queued int32
	for _, r := range m.reqs {
		switch r.stage {
		case stageQueued:
			queued++
		case stageParked:
			parked++
		case stageVerifying:
			if r.fetched {
				fetching++
			} else {
				running++
			}
		}
	}
	turns := 0
	var inQueues int32
	var parkedHere int32
	for name, p := range d.peers {
		if p.name != name || p.held < 0 || p.held == 0 && !p.turns {
			return fmt.Errorf("address %q stands as %q with %d requests", name, p.name, p.held)
		}
		held += p.held
		bytes += p.bytes
		inQueues += int32(p.queue.Len())
		parkedHere += p.parked
		if p.turns {
			turns++
		} else if p.queue.Len() > 0 {
			return fmt.Errorf("address %q has %d requests in its queue, but does not stand in line", name, p.queue.Len())
		}
		if most := m.mostParked(); name != "" && p.parked > max(2, most/4) && !m.reconfigured() {
			return fmt.Errorf("address %q has %d of %d that wait for fetches", name, p.parked, most)
		}
	}
	var behind int32
	for o, f := range d.fetching {
		if behind += int32(len(f.parked)); len(f.parked) >= parkedPerOrigin {
			return fmt.Errorf("%d requests wait for a key of %s", len(f.parked)+1, o)
		}
		if f.req.Origin != o || f.req.stage != stageVerifying {
			return fmt.Errorf("a key of %s is fetched for request %d of %s", o, f.req.Req, f.req.Origin)
		}
	}
	var recent int32
	for _, n := range d.recent {
		recent += n
	}
	if bytes != m.unverified.bytes {
		return fmt.Errorf("verification: %d bytes by addresses, %d in all", bytes, m.unverified.bytes)
	}
	if held != m.unverified.n || queued != d.queued || queued != inQueues || running != d.running || turns != d.turn.Len() ||
		parked != behind || int(fetching) != len(d.fetching) || int(recent) != d.fetches.Len() {
		return fmt.Errorf("verification: %d of %d held, %d, %d and %d queued, %d and %d running, %d and %d turns, %d and %d parked, %d and %d fetching, %d and %d fetches",
			held, m.unverified.n, queued, d.queued, inQueues, running, d.running, turns, d.turn.Len(), parked, behind, fetching, len(d.fetching), recent, d.fetches.Len())
	}
	if d.parked != parked+fetching || d.parked != parkedHere || d.topPark > m.mostParked() && !m.reconfigured() {
		return fmt.Errorf("verification: %d parked, %d fetching, %d by addresses, the count says %d, at most %d of %d", parked, fetching, parkedHere, d.parked, d.topPark, m.mostParked())
	}
	if running > m.cfg.Verifying && !m.reconfigured() || d.topFetch > m.cfg.KeyFetches && !m.reconfigured() {
		return fmt.Errorf("verification: %d of %d, %d fetches of %d", running, m.cfg.Verifying, d.topFetch, m.cfg.KeyFetches)
	}
	if wrong := m.checkLedger(); wrong != "" {
		return fmt.Errorf("verification: %s are miscounted", wrong)
	}
	return nil
}

// eachCall calls f for each call that has not ended, in no order.
func (m *Machine) eachCall(f func(*call) error) error {
	seen := make(map[*call]bool)
	visit := func(c *call) error {
		if seen[c] {
			return nil
		}
		seen[c] = true
		return f(c)
	}
	for _, c := range m.txns {
		if err := visit(c); err != nil {
			return err
		}
	}
	for _, c := range m.ops {
		if err := visit(c); err != nil {
			return err
		}
	}
	for _, c := range m.looks {
		if err := visit(c); err != nil {
			return err
		}
	}
	for b := range m.line {
		for c := m.line[b].first; c != nil; c = c.link[linkLine].next {
			if err := visit(c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Machine) checkCalls() error {
	waiters, recording := 0, 0
	err := m.eachCall(func(c *call) error {
		waiters += len(c.waiters)
		for _, r := range c.waiters {
			if r.call != c || r.answered || r.Origin != c.origin.key.name && !c.origin.stranger {
				return fmt.Errorf("request %d of %s waits for a call of %s", r.Req, r.Origin, c.origin.key.name)
			}
		}
		inLine := c.phase == phaseWaiting || c.phase == phaseHeld || c.phase == phasePaused
		if c.link[linkLine].in != inLine || c.link[linkQueue].in != (c.phase == phaseWaiting) {
			return fmt.Errorf("a call in phase %d: in line %t, in its queue %t", c.phase, c.link[linkLine].in, c.link[linkQueue].in)
		}
		if (m.ops[c.op] == c) != (c.phase == phaseRunning) {
			return fmt.Errorf("the call of attempt %d is in phase %d", c.op, c.phase)
		}
		if inLine && len(c.waiters) == 0 {
			return fmt.Errorf("a call in phase %d waits for nobody", c.phase)
		}
		if (c.leader == nil) != (c.phase == phaseRecording) || c.leader != nil && c.leader.freed {
			return fmt.Errorf("a call in phase %d without its body", c.phase)
		}
		if c.phase == phaseRecording {
			recording++
		}
		if len(c.waiters) > maxWaiters {
			return fmt.Errorf("%d requests wait for one call", len(c.waiters))
		}
		return nil
	})
	if err != nil {
		return err
	}
	attached := 0
	for _, r := range m.reqs {
		if r.call != nil {
			attached++
		}
	}
	if attached != waiters || recording != m.record.total() || recording > maxRecording+int(m.lanes[laneTxn].slots.Max) {
		return fmt.Errorf("%d and %d requests wait for calls, %d and %d answers are being stored", attached, waiters, recording, m.record.total())
	}
	for k, c := range m.txns {
		if c.txnKey() != k || c.phase == phaseEnded {
			return fmt.Errorf("transaction %s of %s is one in phase %d", k.id, k.origin, c.phase)
		}
	}
	for k, c := range m.shared {
		if c.shareKey() != k || c.phase == phaseEnded || c.cancelled {
			return fmt.Errorf("a call of %s in phase %d (cancelled: %t) may still be joined", k.origin, c.phase, c.cancelled)
		}
	}
	for id, c := range m.looks {
		if c.phase != phaseLooking || c.leader.Req != id {
			return fmt.Errorf("request %d is looked up for a call in phase %d", id, c.phase)
		}
	}
	return nil
}

// totals is what is counted of one origin.
type totals struct {
	calls, txns, running, looks int32
	stalled                     [numLanes]int32
	unbegun, waits              [NumBands]int32
	bytes                       int64
	current                     *call
}

func (m *Machine) checkOrigins() error {
	sums := make(map[*origin]*totals)
	err := m.eachCall(func(c *call) error {
		t := sums[c.origin]
		if t == nil {
			t = new(totals)
			sums[c.origin] = t
		}
		t.calls++
		if c.phase == phaseRunning && c.stalled {
			t.stalled[bands[c.band].lane]++
		}
		if c.link[linkUnbegun].in {
			t.unbegun[c.band]++
			t.waits[c.band] += int32(len(c.waiters))
			if c.charged || c.phase == phaseRunning || c.phase == phaseRecording {
				return fmt.Errorf("a call of %s in phase %d counts as not begun", c.origin.key.name, c.phase)
			}
		} else if !c.charged && c.phase != phaseRecording {
			return fmt.Errorf("a call of %s in phase %d does not count as not begun", c.origin.key.name, c.phase)
		}
		if c.leader != nil {
			t.bytes += c.leader.bytes
		}
		if c.txn == nil {
			switch c.phase {
			case phaseRunning:
				t.running++
			case phaseLooking:
				t.looks++
			}
			return nil
		}
		switch c.phase {
		case phaseLooking, phaseHeld, phaseWaiting, phasePaused:
			t.txns++
		case phaseRunning:
			if t.current != nil {
				return fmt.Errorf("two transactions of %s are at the homeserver", c.origin.key.name)
			}
			t.current = c
		}
		return nil
	})
	if err != nil {
		return err
	}
	idle := 0
	var crowds [NumBands]int
	check := func(o *origin) error {
		t := sums[o]
		if t == nil {
			t = new(totals)
		}
		if t.calls != o.calls || t.txns != o.txns || t.running != o.running || t.looks != o.looks || t.bytes != o.bytes || t.current != nil && t.current != o.current {
			return fmt.Errorf("origin %s: %+v, the counts say %d calls, %d transactions, %d bytes, %d running", o.key.name, *t, o.calls, o.txns, o.bytes, o.running)
		}
		if !o.stranger && o.isIdle != (o.calls == 0) {
			return fmt.Errorf("origin %s has %d calls, idle: %t", o.key.name, o.calls, o.isIdle)
		}
		if o.isIdle {
			idle++
		}
		if c := o.current; c != nil && c.phase != phaseRunning && c.phase != phaseWaiting && c.phase != phasePaused {
			return fmt.Errorf("origin %s keeps back others for a transaction in phase %d", o.key.name, c.phase)
		}
		if o.txns > m.cfg.TxnQueue+1 && !m.reconfigured() || o.waiting() > max(m.cfg.OriginQueue, passQueue)+m.cfg.OriginParallel && !m.reconfigured() {
			return fmt.Errorf("origin %s: %d transactions, %d others wait", o.key.name, o.txns, o.waiting())
		}
		if t.stalled != o.stalled || t.waits != o.waits {
			return fmt.Errorf("origin %s: %d stalled, %d wait for what has not begun, the counts say %d and %d", o.key.name, t.stalled, t.waits, o.stalled, o.waits)
		}
		// The one that is to be sent again is the only one that may be, and is it at once.
		if c := o.current; c != nil && c.phase == phaseWaiting && (o.ready[c.band] == nil || o.nextCall(c.band) != c) {
			return fmt.Errorf("origin %s: its transaction that is to be sent again stands behind others", o.key.name)
		}
		for b := range o.queue {
			if n := o.unbegun[b].n; int(t.unbegun[b]) != n || n > 0 && m.crowd[b][o.place[b]] != o {
				return fmt.Errorf("origin %s, band %s: %d calls have not begun, the count says %d", o.key.name, Band(b), t.unbegun[b], n)
			}
			if n := o.unbegun[b].n; n > 0 {
				crowds[b]++
			}
			ok := false
			if o.queue[b].n > 0 {
				ok, _ = o.mayRun(Band(b), &m.cfg, m.now)
			}
			// Its rate may allow it a moment before its timer says so.
			if ready := o.ready[b] != nil; ready && !ok || ok && !ready && o.timer == nil {
				return fmt.Errorf("origin %s, band %s: %d wait, may run %t, in line %t", o.key.name, Band(b), o.queue[b].n, ok, o.ready[b] != nil)
			}
		}
		return nil
	}
	for k, o := range m.origins {
		if o.key != k {
			return fmt.Errorf("origin %s stands as %s", o.key.name, k.name)
		}
		if err := check(o); err != nil {
			return err
		}
	}
	if err := check(m.strangers); err != nil {
		return err
	}
	for b, n := range crowds {
		if n != len(m.crowd[b]) {
			return fmt.Errorf("band %s: %d origins have calls that have not begun, %d are listed", Band(b), n, len(m.crowd[b]))
		}
	}
	if idle != m.idle.n {
		return fmt.Errorf("%d origins are idle, the list holds %d", idle, m.idle.n)
	}
	if len(m.origins) > int(m.cfg.Origins) && !m.reconfigured() {
		return fmt.Errorf("%d origins of %d", len(m.origins), m.cfg.Origins)
	}
	return nil
}

func (m *Machine) checkLanes() error {
	var used [numLanes]sched.Slots
	var stalled, slow, breaking [numLanes]int32
	var running [NumBands]sched.Slots
	for id, c := range m.ops {
		if c.op != id || c.phase != phaseRunning || c.timer == nil && !c.cancelled {
			return fmt.Errorf("attempt %d belongs to a call of attempt %d in phase %d", id, c.op, c.phase)
		}
		used[bands[c.band].lane]++
		running[c.band]++
		if c.stalled {
			stalled[bands[c.band].lane]++
		}
		if c.slow {
			slow[bands[c.band].lane]++
		}
		if c.stalled && !c.slow || c.long && !c.stalled || c.broken && !(c.long && c.cancelled) {
			return fmt.Errorf("attempt %d: stalled %t, slow %t, long %t, broken off %t", id, c.stalled, c.slow, c.long, c.broken)
		}
		if c.broken {
			breaking[bands[c.band].lane]++
		}
	}
	for i := range m.lanes {
		l := &m.lanes[i]
		if l.slots.Used != used[i] || l.stalled != stalled[i] || int32(l.slots.Max) > l.window.most && !m.reconfigured() {
			return fmt.Errorf("lane %s: %d run, %d of them stalled, the gauge says %+v and %d", laneNames[i], used[i], stalled[i], l.slots, l.stalled)
		}
		if l.slow != slow[i] || l.breaking != breaking[i] || l.breaking > 1 || l.broken.Len() > l.mostBreaks() && !m.reconfigured() {
			return fmt.Errorf("lane %s: %d are slow and %d broken off, the counts say %d and %d, %d of late", laneNames[i], slow[i], breaking[i], l.slow, l.breaking, l.broken.Len())
		}
		if l.slots.Used > sched.Slots(l.window.most) && !m.reconfigured() {
			return fmt.Errorf("lane %s: %d run, at most %d may", laneNames[i], l.slots.Used, l.window.most)
		}
		if l.window.size < 1 || l.window.size > l.window.most || len(l.window.ratios) > adjustMost || len(l.window.best) > maxBaselines {
			return fmt.Errorf("lane %s: a window of %d, at most %d, with %d answers", laneNames[i], l.window.size, l.window.most, len(l.window.ratios))
		}
	}
	for b := range running {
		if r := m.lanes[bands[b].lane].running[b]; r != running[b] {
			return fmt.Errorf("band %s: %d run, the count says %d", Band(b), running[b], r)
		}
	}
	for b := range m.line {
		n := 0
		var last uint64
		for c := m.line[b].first; c != nil; c = c.link[linkLine].next {
			if n++; c.seq <= last || c.band != Band(b) {
				return fmt.Errorf("band %s: call %d of band %s stands behind %d", Band(b), c.seq, c.band, last)
			}
			last = c.seq
		}
		if n != m.line[b].n {
			return fmt.Errorf("band %s: %d in line, the count says %d", Band(b), n, m.line[b].n)
		}
	}
	return nil
}

// reconfigured reports whether limits were lowered, so that what is above them is
// not a mistake.
func (m *Machine) reconfigured() bool { return m.changed }

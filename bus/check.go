package bus

import (
	"fmt"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Check recounts everything that the core keeps running totals of and returns
// the first disagreement. It is for tests; it takes time linear in the number
// of hosts and requests.
func (m *Machine) Check() error {
	var lanes [numLanes]sched.Slots
	var classes [matrix.NumClasses + 1]sched.Slots
	var total sched.Slots
	intents := make(map[*host]int32)
	count := func(c *call) {
		lanes[c.lane]++
		classes[c.class]++
		total++
		intents[c.host]++
	}
	for id, c := range m.ops {
		if c.op != id || c.phase != phaseRunning && c.phase != phaseAnswered {
			return fmt.Errorf("attempt %d belongs to a call of attempt %d in phase %d", id, c.op, c.phase)
		}
		count(c)
	}
	for _, c := range m.commits {
		if c.call != nil {
			count(c.call)
		}
	}
	for _, c := range m.outbox.packs {
		count(c)
	}
	if total != m.workers.Used || total > m.workers.Limit && total > m.workers.Max {
		return fmt.Errorf("%d workers are in use, the gauge says %d of %d", total, m.workers.Used, m.workers.Limit)
	}
	for l := range lanes {
		if lanes[l] != m.lanes[l].slots.Used {
			return fmt.Errorf("lane %s: %d workers are in use, the gauge says %d", laneID(l), lanes[l], m.lanes[l].slots.Used)
		}
	}
	for c := range classes {
		if classes[c] != m.running[c] {
			return fmt.Errorf("class %d: %d workers are in use, the count says %d", c, classes[c], m.running[c])
		}
	}
	idle := 0
	for _, h := range m.hosts {
		if h.inUse != intents[h] {
			return fmt.Errorf("host %s: %d attempts run, the count says %d", h.Name, intents[h], h.inUse)
		}
		var running int32
		for c := range h.queue {
			running += h.running[c]
			if live := h.live(matrix.Class(c)); live != h.waiting[c] {
				return fmt.Errorf("host %s, class %d: %d calls wait, the count says %d", h.Name, c, live, h.waiting[c])
			}
			if n := h.queue[c].Len(); n > 2*int(h.waiting[c])+16 {
				return fmt.Errorf("host %s, class %d: %d entries in the queue for %d calls", h.Name, c, n, h.waiting[c])
			}
		}
		if running != h.inUse {
			return fmt.Errorf("host %s: classes add up to %d attempts, the count says %d", h.Name, running, h.inUse)
		}
		if h.isIdle != (h.inUse == 0 && h.allWaiting() == 0) {
			return fmt.Errorf("host %s: on the idle list: %t, attempts %d, waiting %d", h.Name, h.isIdle, h.inUse, h.allWaiting())
		}
		if h.isIdle {
			idle++
		}
	}
	if idle != m.idle.n {
		return fmt.Errorf("%d hosts are idle, the list holds %d", idle, m.idle.n)
	}
	for id, r := range m.reqs {
		if r.id != id || r.timer == nil || r.call.phase == phaseAnswered && !r.call.held && !r.call.fallback || r.call.phase == phaseEnded {
			return fmt.Errorf("request %d waits for a call in phase %d, timer set: %t", id, r.call.phase, r.timer != nil)
		}
	}
	for _, c := range m.calls {
		if c.phase == phaseEnded || c.cancelled && !c.retry {
			return fmt.Errorf("a call to %s in phase %d (cancelled: %t) may still be joined", c.host.Name, c.phase, c.cancelled)
		}
	}
	if len(m.hosts) > int(m.cfg.MaxHosts) || m.waiting() > int(m.cfg.MaxRequests) {
		return fmt.Errorf("%d hosts of %d, %d requests of %d", len(m.hosts), m.cfg.MaxHosts, m.waiting(), m.cfg.MaxRequests)
	}
	if err := m.checkAnswers(); err != nil {
		return err
	}
	if err := m.checkKeys(); err != nil {
		return err
	}
	return m.checkOutbox()
}

// checkAnswers is Check for answers that are stored, or kept whole.
func (m *Machine) checkAnswers() error {
	for _, c := range []*cache{&m.cache, &m.whole, &m.media} {
		var bytes int64
		for el := c.recent.Front(); el != nil; el = el.Next() {
			bytes += el.Value.(*entry).size
		}
		if n := c.recent.Len(); n > c.maxEntries || c.bytes > c.maxBytes || n != len(c.entries) || bytes != c.bytes {
			return fmt.Errorf("cache: %d and %d entries of %d, %d and %d bytes of %d", n, len(c.entries), c.maxEntries, c.bytes, bytes, c.maxBytes)
		}
	}
	s := &m.answers
	parked := 0
	for _, l := range s.loads {
		for _, a := range l.parked {
			if a.Req != 0 {
				parked++
			}
		}
	}
	if parked != s.parked || len(s.known) > s.max || s.order.Len() > 2*s.max || len(s.unstored) > storeAtOnce {
		return fmt.Errorf("answers: %d and %d requests wait for the store, %d known and %d in order of %d, %d to be stored", parked, s.parked, len(s.known), s.order.Len(), s.max, len(s.unstored))
	}
	return nil
}

// checkKeys is Check for the key desk and the joins.
func (m *Machine) checkKeys() error {
	d := &m.keys
	wants, ahead, reqs := 0, 0, 0
	for id, q := range d.queries {
		wants += len(q.wants)
		switch {
		case q.Req != 0:
			reqs++
		case q.isAhead():
			ahead += len(q.wants)
		}
		if q.id != id || !q.loading && len(q.open) == 0 || !q.loading && q.timer == nil {
			return fmt.Errorf("key query %d: loading %t, waits for %d fetches, timer set: %t", id, q.loading, len(q.open), q.timer != nil)
		}
		for f := range q.open {
			if f.call == nil && d.fetches[f.fetchKey] == nil {
				return fmt.Errorf("key query %d waits for %s, which nobody fetches", id, f.server)
			}
		}
	}
	if wants != d.wants || ahead != d.ahead || reqs != len(d.byReq) || wants > m.cfg.Keys.MaxWants && wants > d.maxWants {
		return fmt.Errorf("keys: %d and %d wants, %d and %d of them ahead, %d and %d queries of requests", wants, d.wants, ahead, d.ahead, reqs, len(d.byReq))
	}
	open := 0
	for _, w := range m.joins.rooms {
		if w.Phase < JoinSyncing {
			open++
		}
		if w.timer == nil {
			return fmt.Errorf("the join of %s waits for nothing", w.Room)
		}
	}
	if open != m.joins.open || len(m.joins.recent) > maxJoins || m.joins.ahead.Len() > maxAhead {
		return fmt.Errorf("joins: %d and %d open, %d remembered, %d servers to connect to", open, m.joins.open, len(m.joins.recent), m.joins.ahead.Len())
	}
	return nil
}

// checkOutbox is Check for the outbox.
func (m *Machine) checkOutbox() error {
	o := &m.outbox
	if o.pacer == nil {
		return nil
	}
	var active sched.Slots
	busy := 0
	var probes sched.Slots
	for name, q := range o.queues {
		if q.name != name {
			return fmt.Errorf("queue %s is filed under %s", q.name, name)
		}
		if c := q.call; c != nil {
			active++
			if c.probe {
				probes++
			}
			if c.queue != q || c.phase == phaseEnded || q.busy {
				return fmt.Errorf("queue %s: its call is in phase %d and another's: %t, busy: %t", name, c.phase, c.queue != q, q.busy)
			}
		}
		if q.busy {
			busy++
		}
		if h := m.hosts[name]; q.listed && o.active.Free() > 0 && (h == nil || h.lane(m.now) != laneFailing || o.probes.Free() > 0) {
			return fmt.Errorf("queue %s is in line while %d places are free, and %d for probes", name, o.active.Free(), o.probes.Free())
		}
		_, may := m.nextTry(q)
		if may && q.call == nil && !q.busy && q.timer == nil && !q.listed {
			return fmt.Errorf("queue %s: %d items wait for nothing", name, q.Total())
		}
	}
	if active != o.active.Used || active > o.active.Limit && active > o.active.Max {
		return fmt.Errorf("%d queues have a call, the gauge says %d of %d", active, o.active.Used, o.active.Limit)
	}
	sweeps := 0
	for _, q := range o.trims {
		if q == nil {
			sweeps++
		}
	}
	if busy != len(o.settles)+o.unsettled+len(o.trims)-sweeps || sweeps > 1 {
		return fmt.Errorf("%d queues are busy, the store settles %d, is to settle %d and trims %d, sweeps %d", busy, len(o.settles), o.unsettled, len(o.trims), sweeps)
	}
	if probes != o.probes.Used || probes > o.probes.Limit && probes > o.probes.Max {
		return fmt.Errorf("%d queues have a call for a probe, the gauge says %d of %d", probes, o.probes.Used, o.probes.Limit)
	}
	stored := 0
	for _, of := range o.offers {
		if of.stored {
			stored++
		}
	}
	if held := len(o.pacer.held); held != stored {
		return fmt.Errorf("%d answers are held, %d transactions are stored and not answered", held, stored)
	}
	return o.pacer.Check(m.now)
}

// live counts the calls of a class that wait.
func (h *host) live(class matrix.Class) (n int32) {
	q := &h.queue[class]
	for range q.Len() {
		c, _ := q.Pop()
		if c.phase == phaseWaiting {
			n++
		}
		q.Push(c)
	}
	return n
}

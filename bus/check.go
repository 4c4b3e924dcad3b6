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
		if r.id != id || r.timer == nil || r.call.phase == phaseAnswered || r.call.phase == phaseEnded {
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
	if n := m.cache.recent.Len(); n > m.cache.maxEntries || m.cache.bytes > m.cache.maxBytes || n != len(m.cache.entries) {
		return fmt.Errorf("cache: %d and %d entries of %d, %d bytes of %d", n, len(m.cache.entries), m.cache.maxEntries, m.cache.bytes, m.cache.maxBytes)
	}
	return m.checkOutbox()
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
	if busy != len(o.settles)+len(o.trims)-sweeps || sweeps > 1 {
		return fmt.Errorf("%d queues are busy, the store settles %d and trims %d, sweeps %d", busy, len(o.settles), len(o.trims), sweeps)
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

package node

import (
	"fmt"
	"math"
	"reflect"

	"fsbus/bus"
	"fsbus/sched"
)

// fitSteps is how finely limits are lowered.
const fitSteps = 64

// fit gives the limits that stand at their defaults what goes with those that do not:
// first with the limits beside them (see bounds), then with MemoryLimit, for which they
// are lowered, all in the same proportion but none below what its tag says, until the sum
// keeps to it. So whoever sets one limit, or gives the bus less memory, need not find out
// what else to change. Other values stand. If the least is too much, memory reports it.
func (k *checker) fit() {
	c := k.c
	type limit struct {
		field
		from field // its default
		was  int64
	}
	var limits []limit
	defaults := DefaultConfig()
	from := defaults.fields()
	for i, f := range c.fields() {
		inUse := (f.section != "edge" || c.hasEdge()) && (f.section != "outbox" || c.hasOutbox())
		if f.tag.Get("fit") != "" && inUse && f.equal(from[i]) {
			limits = append(limits, limit{f, from[i], f.value.Int()})
		}
	}
	set := func(part int64) {
		for _, l := range limits {
			least, most := c.bounds(l.key())
			l.setPart(l.from, part, least, most)
		}
	}
	changes := func() (list []string) { // since it was called last
		for i := range limits {
			l := &limits[i]
			if now := l.value.Int(); now != l.was {
				was := reflect.ValueOf(l.was).Convert(l.value.Type())
				list = append(list, fmt.Sprintf("%s from %v to %v", l.key(), was, l.value))
				l.was = now
			}
		}
		return list
	}
	set(fitSteps)
	c.followed = changes()
	over := func() bool { b := c.Budget(); return b.Memory > b.Limit }
	for part := int64(fitSteps - 1); part > 0 && over(); part-- {
		set(part)
	}
	c.lowered = changes()
}

// bounds returns what a limit must be within beside others, which come before it or are
// lowered as it is. Of fewer workers than by default those for servers that may not
// answer keep their part, so that they do not take all.
func (c *Config) bounds(key string) (least, most int64) {
	d := bus.Default()
	o, e := &c.Outbound, &c.Edge
	share := func(n sched.Slots) int64 { // rounded up
		return (int64(o.Workers)*int64(n) + int64(d.Workers) - 1) / int64(d.Workers)
	}
	switch key {
	case "outbound.unknown_hosts":
		return 1, share(d.Unknown)
	case "outbound.failing_hosts":
		return 1, share(d.Failing)
	case "outbound.max_hosts":
		return int64(c.Front.MaxConnections) + 3*int64(o.Workers) + 5, math.MaxInt64
	case "edge.origins":
		return int64(e.Requests) + int64(e.Concurrency) + int64(e.Parallel) + 257, math.MaxInt64
	}
	return 0, math.MaxInt64
}

// setPart sets f to a part of its default, in fitSteps, but not below its tag, and
// within bounds in any case.
func (f field) setPart(from field, part, least, most int64) {
	whole := from.value.Int()
	v := whole * part / fitSteps
	if _, ok := f.value.Interface().(sched.Bytes); ok {
		v = v / int64(sched.KiB) * int64(sched.KiB)
	}
	v = min(max(v, int64(f.parse(f.tag.Get("fit")))), whole)
	f.value.SetInt(min(max(v, least), most))
}

package node

import (
	"fmt"

	"fsbus/sched"
)

// fitSteps is how finely limits are lowered.
const fitSteps = 64

// fit lowers the limits that stand at their defaults, all in the same proportion but
// none below what its tag says, until the sum keeps to MemoryLimit: whoever gives the
// bus less memory need not find out what to lower. Other values stand. If the least
// is too much, memory reports it.
func (k *checker) fit() {
	c := k.c
	over := func() bool { b := c.Budget(); return b.Memory > b.Limit }
	if !over() {
		return
	}
	defaults := DefaultConfig()
	from := defaults.fields()
	all := c.fields()
	may := make([]bool, len(all))
	for i, f := range all {
		inUse := (f.section != "edge" || c.hasEdge()) && (f.section != "outbox" || c.hasOutbox())
		may[i] = f.tag.Get("fit") != "" && inUse && f.equal(from[i])
	}
	for step := int64(fitSteps - 1); step > 0 && over(); step-- {
		for i, f := range all {
			if may[i] {
				f.lower(from[i], step, c.floor(f.key()))
			}
		}
	}
	for i, f := range all {
		if may[i] && !f.equal(from[i]) {
			c.lowered = append(c.lowered, fmt.Sprintf("%s from %v to %v", f.key(), from[i].value.Interface(), f.value.Interface()))
		}
	}
}

// floor returns what a limit must not be below beside others, which come before it
// or are lowered as it is.
func (c *Config) floor(key string) int64 {
	o, e := &c.Outbound, &c.Edge
	switch key {
	case "outbound.max_hosts":
		return int64(c.Front.MaxConnections) + 3*int64(o.Workers) + 5
	case "edge.origins":
		return int64(e.Requests) + int64(e.Concurrency) + int64(e.Parallel) + 257
	}
	return 0
}

// lower sets f to a part of a value, in fitSteps, but not below a floor or its tag.
func (f field) lower(from field, part, floor int64) {
	full, _ := number(from.value.Interface())
	v := int64(full) * part / fitSteps
	if _, ok := f.value.Interface().(sched.Bytes); ok {
		v = v / int64(sched.KiB) * int64(sched.KiB)
	}
	f.value.SetInt(min(max(v, floor, int64(f.parse(f.tag.Get("fit")))), int64(full)))
}

package node

import (
	"maps"
	"slices"
	"sync"
)

// endpointCounts counts requests by endpoint. The names are those of the
// endpoint table, so there is a bounded number of them.
type endpointCounts struct {
	mu sync.Mutex
	n  map[string]int64
}

func (c *endpointCounts) count(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = make(map[string]int64)
	}
	c.n[name]++
}

// report lists the counts by name.
func (c *endpointCounts) report() []CountReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]CountReport, 0, len(c.n))
	for _, name := range slices.Sorted(maps.Keys(c.n)) {
		list = append(list, CountReport{name, c.n[name]})
	}
	return list
}

package bus

import (
	"container/list"

	"fsbus/sched"
)

// cache keeps the answers of finished attempts for equal requests to come. It
// holds references only; the bodies are the shell's, until Discard.
type cache struct {
	entries    map[Key]*list.Element // of *entry
	recent     *list.List            // the latest used first
	bytes      int64
	maxEntries int
	maxBytes   int64
}

type entry struct {
	key   Key
	op    OpID
	size  int64
	fresh sched.Time // until then it answers any equal request
	stale sched.Time // until then it answers when the host fails
}

// entryCost is what an entry takes beside its body: headers and bookkeeping.
const entryCost = 1024

func (c *cache) init() {
	c.entries = make(map[Key]*list.Element)
	c.recent = list.New()
}

func (c *cache) get(k Key) *entry {
	el := c.entries[k]
	if el == nil {
		return nil
	}
	c.recent.MoveToFront(el)
	return el.Value.(*entry)
}

// put keeps the answer of op if its endpoint and its status allow that and it
// fits, and lets go of what it displaces.
func (c *cache) put(m *Machine, call *call, op OpID, size int64) bool {
	ep := call.endpoint
	size += entryCost
	if ep.CacheFor <= 0 || call.status != 200 || c.maxEntries == 0 || size > c.maxBytes/4 {
		return false
	}
	if old := c.entries[call.key]; old != nil {
		c.drop(m, old)
	}
	for c.recent.Len() >= c.maxEntries || c.bytes+size > c.maxBytes {
		c.drop(m, c.recent.Back())
	}
	e := &entry{key: call.key, op: op, size: size, fresh: m.now.Add(ep.CacheFor), stale: m.now.Add(ep.CacheFor + ep.StaleFor)}
	c.entries[e.key] = c.recent.PushFront(e)
	c.bytes += size
	return true
}

func (c *cache) drop(m *Machine, el *list.Element) {
	e := c.recent.Remove(el).(*entry)
	delete(c.entries, e.key)
	c.bytes -= e.size
	m.emit(Discard{e.op})
}

package bus

import (
	"container/list"

	"fsbus/sched"
)

// cache keeps the answers of finished attempts for equal requests to come. It
// holds references only; the bodies are the shell's, until Discard. There are three:
// of small ones, in memory, and of whole ones and of media, in the spool's files.
type cache struct {
	entries    map[Key]*list.Element // of *entry
	recent     *list.List            // the latest used first
	bytes      int64
	maxEntries int
	maxBytes   int64
}

type entry struct {
	key    Key
	op     OpID
	status int
	size   int64
	stored sched.Time // when it was answered
	fresh  sched.Time // until then it answers any equal request
	stale  sched.Time // until then it answers when the host fails
	keep   bool       // it is to be stored, and is not yet
}

const (
	// entryCost is what an entry takes beside its body: headers and bookkeeping.
	entryCost = 1024
	// shelfFiles bounds the answers in files: each costs a descriptor.
	shelfFiles = 64
)

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

// fits reports whether an answer of this size may be kept.
func (c *cache) fits(size int64) bool { return c.maxEntries > 0 && size <= c.maxBytes/4 }

// put keeps an answer that fits, and lets go of what it displaces.
func (c *cache) put(m *Machine, e *entry) {
	c.drop(m, e.key)
	for c.recent.Len() >= c.maxEntries || c.bytes+e.size > c.maxBytes {
		c.dropElement(m, c.recent.Back())
	}
	c.entries[e.key] = c.recent.PushFront(e)
	c.bytes += e.size
}

// drop lets go of the answer under a key, if there is one.
func (c *cache) drop(m *Machine, k Key) {
	if el := c.entries[k]; el != nil {
		c.dropElement(m, el)
	}
}

func (c *cache) dropElement(m *Machine, el *list.Element) {
	e := el.Value.(*entry)
	if e.keep {
		m.storeAnswers() // as long as it is there
	}
	c.recent.Remove(el)
	delete(c.entries, e.key)
	c.bytes -= e.size
	m.emit(Discard{e.op})
}

// shrink drops what is over the bounds, after they have changed.
func (c *cache) shrink(m *Machine) {
	for c.recent.Len() > c.maxEntries || c.bytes > c.maxBytes {
		c.dropElement(m, c.recent.Back())
	}
}

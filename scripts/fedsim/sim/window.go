package sim

import "time"

// window finds the largest number of events within any one second. It keeps
// the times of at most limit events, so a larger number is reported as limit.
type window struct {
	times []time.Duration // ring: times[first], ..., count of them
	first int
	count int
	max   int
}

// add notes an event at now, which is never earlier than the one before.
func (w *window) add(now time.Duration, limit int) {
	for w.count > 0 && now-w.times[w.first] >= time.Second {
		w.drop()
	}
	if w.count == limit {
		w.drop()
	}
	if w.count == len(w.times) {
		w.grow(limit)
	}
	w.times[(w.first+w.count)%len(w.times)] = now
	w.count++
	w.max = max(w.max, w.count)
}

func (w *window) drop() {
	w.first = (w.first + 1) % len(w.times)
	w.count--
}

// grow doubles the full ring, up to limit.
func (w *window) grow(limit int) {
	times := make([]time.Duration, min(limit, max(4, 2*len(w.times))))
	for i := range w.count {
		times[i] = w.times[(w.first+i)%len(w.times)]
	}
	w.times, w.first = times, 0
}

// memory is a set of the latest keys, each with a value, bounded in number: a
// new key takes the place of the oldest. Keys and values are hashes, and there
// are few enough of them to look at each.
type memory struct {
	entries []memoryEntry
	next    int
}

type memoryEntry struct{ key, value uint64 }

// add remembers key and its value, of at most limit, unless the key is known;
// then it returns the value it came with first, and true.
func (m *memory) add(key, value uint64, limit int) (uint64, bool) {
	for _, e := range m.entries {
		if e.key == key {
			return e.value, true
		}
	}
	if len(m.entries) < limit {
		m.entries = append(m.entries, memoryEntry{key, value})
		return value, false
	}
	m.entries[m.next] = memoryEntry{key, value}
	m.next = (m.next + 1) % limit
	return value, false
}

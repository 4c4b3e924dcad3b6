package sched

import "fmt"

// Timers is a heap of moments, each with a value. Timers due at the same
// moment come out in the order in which they were set, so that a run can be
// replayed. The zero value is empty and ready to use. Set, Reset and Stop take
// O(log n); memory is one pointer and one node for each timer that is set.
type Timers[V any] struct {
	heap []*Timer[V]
	seq  uint64
}

// Timer is one entry of Timers.
type Timer[V any] struct {
	At    Time
	Value V
	seq   uint64
	index int // position in the heap, -1 when not set
}

// Len returns the number of timers that are set.
func (t *Timers[V]) Len() int { return len(t.heap) }

// Set adds a timer for the moment at.
func (t *Timers[V]) Set(at Time, v V) *Timer[V] {
	t.seq++
	n := &Timer[V]{At: at, Value: v, seq: t.seq, index: len(t.heap)}
	t.heap = append(t.heap, n)
	t.up(n.index)
	return n
}

// Stop removes n if it is still set; nil is allowed.
func (t *Timers[V]) Stop(n *Timer[V]) {
	if n == nil || n.index < 0 {
		return
	}
	i, last := n.index, len(t.heap)-1
	if t.heap[i] != n {
		panic(fmt.Sprintf("sched: timer at index %d of %d is another's", i, len(t.heap)))
	}
	t.swap(i, last)
	t.heap[last] = nil
	t.heap = t.heap[:last]
	n.index = -1
	if i < last {
		t.down(i)
		t.up(i)
	}
}

// Next returns the earliest moment that is set.
func (t *Timers[V]) Next() (Time, bool) {
	if len(t.heap) == 0 {
		return 0, false
	}
	return t.heap[0].At, true
}

// Due removes and returns the earliest timer that is not after now.
func (t *Timers[V]) Due(now Time) (v V, ok bool) {
	if len(t.heap) == 0 || t.heap[0].At > now {
		return v, false
	}
	n := t.heap[0]
	t.Stop(n)
	return n.Value, true
}

func (t *Timers[V]) less(i, j int) bool {
	a, b := t.heap[i], t.heap[j]
	return a.At < b.At || a.At == b.At && a.seq < b.seq
}

func (t *Timers[V]) swap(i, j int) {
	t.heap[i], t.heap[j] = t.heap[j], t.heap[i]
	t.heap[i].index, t.heap[j].index = i, j
}

func (t *Timers[V]) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if !t.less(i, parent) {
			return
		}
		t.swap(i, parent)
		i = parent
	}
}

func (t *Timers[V]) down(i int) {
	for {
		child := 2*i + 1
		if child >= len(t.heap) {
			return
		}
		if r := child + 1; r < len(t.heap) && t.less(r, child) {
			child = r
		}
		if !t.less(child, i) {
			return
		}
		t.swap(i, child)
		i = child
	}
}

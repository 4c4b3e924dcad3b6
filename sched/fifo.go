package sched

// FIFO is a queue in a ring that grows by doubling and shrinks when it is
// mostly empty. The zero value is an empty queue.
type FIFO[T any] struct {
	ring []T
	head int
	n    int
}

// Len returns the number of elements.
func (q *FIFO[T]) Len() int { return q.n }

// Push adds v at the end.
func (q *FIFO[T]) Push(v T) {
	if q.n == len(q.ring) {
		q.resize(max(4, 2*q.n))
	}
	q.ring[(q.head+q.n)%len(q.ring)] = v
	q.n++
}

// PushFront adds v before the first element.
func (q *FIFO[T]) PushFront(v T) {
	if q.n == len(q.ring) {
		q.resize(max(4, 2*q.n))
	}
	q.head = (q.head - 1 + len(q.ring)) % len(q.ring)
	q.ring[q.head] = v
	q.n++
}

// Peek returns the first element; ok is false when there is none.
func (q *FIFO[T]) Peek() (v T, ok bool) {
	if q.n == 0 {
		return v, false
	}
	return q.ring[q.head], true
}

// PeekBack returns the last element; ok is false when there is none.
func (q *FIFO[T]) PeekBack() (v T, ok bool) {
	if q.n == 0 {
		return v, false
	}
	return q.ring[(q.head+q.n-1)%len(q.ring)], true
}

// PopBack removes and returns the last element; ok is false when there is none.
func (q *FIFO[T]) PopBack() (v T, ok bool) {
	if q.n == 0 {
		return v, false
	}
	var zero T
	i := (q.head + q.n - 1) % len(q.ring)
	v, q.ring[i] = q.ring[i], zero
	q.n--
	q.shrink()
	return v, true
}

// Pop removes and returns the first element; ok is false when there is none.
func (q *FIFO[T]) Pop() (v T, ok bool) {
	if q.n == 0 {
		return v, false
	}
	var zero T
	v, q.ring[q.head] = q.ring[q.head], zero
	q.head = (q.head + 1) % len(q.ring)
	q.n--
	q.shrink()
	return v, true
}

func (q *FIFO[T]) shrink() {
	if len(q.ring) > 64 && q.n < len(q.ring)/4 {
		q.resize(len(q.ring) / 2)
	}
}

func (q *FIFO[T]) resize(size int) {
	ring := make([]T, size)
	for i := range q.n {
		ring[i] = q.ring[(q.head+i)%len(q.ring)]
	}
	q.ring, q.head = ring, 0
}

package store

import "sync"

// job is one submitted batch and whom to tell.
type job struct {
	batch *Batch
	size  int64
	done  func(error)
}

// queue holds what waits for the writer, oldest first, bounded in number and
// bytes. Any goroutine puts, the writer takes.
type queue struct {
	maxJobs  int
	maxBytes int64

	mu        sync.Mutex
	ready     sync.Cond // something to take, or closed
	jobs      []job
	bytes     int64
	closed    bool // nothing more is put
	abandoned bool // nothing more is taken
}

func newQueue(maxJobs int, maxBytes int64) *queue {
	q := &queue{maxJobs: maxJobs, maxBytes: maxBytes}
	q.ready.L = &q.mu
	return q
}

// put appends j without waiting.
func (q *queue) put(j job) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.closed:
		return ErrClosed
	case j.size > q.maxBytes:
		return ErrTooLarge
	case len(q.jobs) == q.maxJobs || q.bytes+j.size > q.maxBytes:
		return ErrQueueFull
	}
	q.jobs = append(q.jobs, j)
	q.bytes += j.size
	q.ready.Signal()
	return nil
}

// wait waits for jobs. It returns false when nothing more will come.
func (q *queue) wait() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.jobs) == 0 && !q.closed {
		q.ready.Wait()
	}
	return !q.closed
}

// take waits for jobs and appends to dst those that fit into one group, the
// first in any case. It returns dst as it was when nothing more will come.
func (q *queue) take(dst []job, maxJobs int, maxBytes int64) []job {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.jobs) == 0 && !q.closed {
		q.ready.Wait()
	}
	if q.abandoned {
		return dst
	}
	n, bytes := 0, int64(0)
	for n < min(len(q.jobs), maxJobs) && (n == 0 || bytes+q.jobs[n].size <= maxBytes) {
		bytes += q.jobs[n].size
		n++
	}
	dst = append(dst, q.jobs[:n]...)
	q.remove(n, bytes)
	return dst
}

// rest removes and returns what was not taken.
func (q *queue) rest() []job {
	q.mu.Lock()
	defer q.mu.Unlock()
	jobs := append([]job(nil), q.jobs...)
	q.remove(len(q.jobs), q.bytes)
	return jobs
}

// remove drops the first n jobs and the references in their old places.
func (q *queue) remove(n int, bytes int64) {
	left := copy(q.jobs, q.jobs[n:])
	clear(q.jobs[left:])
	q.jobs = q.jobs[:left]
	q.bytes -= bytes
}

// close refuses what comes from now on. With abandon set, what waits is not
// taken any more either.
func (q *queue) close(abandon bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.abandoned = q.abandoned || abandon
	q.ready.Signal()
}

func (q *queue) len() (jobs int, bytes int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.jobs), q.bytes
}

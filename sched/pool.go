package sched

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync/atomic"
)

// panics counts the jobs of all pools that panicked; see Panics.
var panics atomic.Int64

// Panics returns how many jobs have panicked since the process began. Tests
// check that it stays zero, since a recovered panic is still a bug.
func Panics() int64 { return panics.Load() }

// Pool runs jobs of type J on a fixed number of goroutines.
type Pool[J any] struct {
	jobs  chan J
	alive atomic.Int32
	ended chan struct{} // closed when the last goroutine has
	size  int
}

// NewPool starts size goroutines that call run for each job; queue more jobs
// may wait for them. When run panics, ended is called with the job and an
// error that holds the panic and its stack, so that the job still ends.
func NewPool[J any](size, queue int, run func(J), ended func(J, error)) *Pool[J] {
	p := &Pool[J]{jobs: make(chan J, queue), ended: make(chan struct{}), size: size}
	p.alive.Store(int32(size))
	for range size {
		go func() {
			for j := range p.jobs {
				p.one(j, run, ended)
			}
			if p.alive.Add(-1) == 0 {
				close(p.ended)
			}
		}()
	}
	return p
}

func (p *Pool[J]) one(j J, run func(J), ended func(J, error)) {
	defer func() {
		if r := recover(); r != nil {
			panics.Add(1)
			ended(j, fmt.Errorf("panic in a worker: %v\n%s", r, debug.Stack()))
		}
	}()
	run(j)
}

// Submit queues a job. It never blocks: more jobs than the queue holds means
// that whoever counts the slots has lost count, and panics.
func (p *Pool[J]) Submit(j J) {
	select {
	case p.jobs <- j:
	default:
		panic(fmt.Sprintf("sched: pool of %d has %d jobs waiting and was given another", p.size, len(p.jobs)))
	}
}

// Close waits until the queued jobs have finished and the goroutines have
// ended, or until ctx ends. No Submit may follow.
func (p *Pool[J]) Close(ctx context.Context) error {
	close(p.jobs)
	select {
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

package main

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/rig"
)

const (
	retryOrigins  = 500
	retriesAtOnce = 64 // origins
	retryDelay    = 200 * time.Millisecond
	// cutAfter is when the first attempt of each is given up: while it waits, or
	// while the homeserver has it.
	cutAfter = 100 * time.Millisecond
	// killAfter is when the bus is killed while transactions are on their way.
	killAfter = 3 * time.Second
)

// retried is a transaction that is sent again and again.
type retried struct {
	request *rig.Signed
	id      string
	origin  int

	mu     sync.Mutex
	answer []byte // the first
	same   int
	other  int    // answers that differ from it
	differ string // the first of those
}

// note takes an answer into account.
func (r *retried) note(res fedload.Result) {
	if !isOK(res) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.answer == nil:
		r.answer, r.same = bytes.Clone(res.Body), 1
	case bytes.Equal(r.answer, res.Body):
		r.same++
	default:
		if r.other++; r.other == 1 {
			r.differ = string(res.Body)
		}
	}
}

// edgeRetries sends each transaction many times, before and after the bus is
// killed, and counts how often the homeserver sees it.
func edgeRetries(ctx context.Context, b *bench) (err error) {
	f, err := b.edgeField(retryOrigins, true, rig.StubConfig{Delay: retryDelay})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.learnKeys(ctx); err != nil {
		return err
	}
	if err := f.start(ctx, nil); err != nil {
		return err
	}
	all := make([]*retried, retryOrigins)
	for i := range all {
		all[i] = f.retried(i, "retried")
	}
	var ends, cut, again ends
	start := time.Now()
	parallel(retriesAtOnce, retryOrigins, func(i int) {
		r := all[i]
		s := f.sender(f.target(), i, 4)
		defer s.Close()
		short, cancel := context.WithTimeout(ctx, cutAfter)
		res := s.Do(short, r.request)
		cancel()
		cut.add(res, 0)
		r.note(res)
		for _, n := range []int{4, 4, 1} {
			parallel(n, n, func(int) { f.send(ctx, s, r, &ends) })
		}
	})
	took := time.Since(start)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := f.bus.Kill(); err != nil {
		return err
	}
	f.bus = nil
	start = time.Now()
	if err := f.start(ctx, nil); err != nil {
		return err
	}
	up := time.Since(start)
	parallel(retriesAtOnce, retryOrigins, func(i int) {
		s := f.sender(f.target(), i, 2)
		defer s.Close()
		parallel(2, 2, func(int) { f.send(ctx, s, all[i], &again) })
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	more, differ, shown := f.twice(all), 0, false
	for _, r := range all {
		if differ += r.other; r.other > 0 && !shown {
			shown = true
			b.result.note("differing: %s of %s: first %.200s, %d times, then %.200s", r.id, f.Names()[r.origin], r.answer, r.same, r.differ)
		}
	}
	b.result.add("transactions", "", retryOrigins)
	b.result.add("attempts", "", float64(cut.all()+ends.all()+again.all()))
	b.result.add("of them given up by the sender", "", float64(cut.of("timed out")))
	b.result.add("the others, not answered 200", "", float64(ends.failed()+again.failed()))
	b.result.add("transactions that the homeserver got more than once", "", float64(more))
	b.result.add("most transactions of a server there at a time", "", float64(f.stub.Stats().AtOnce))
	b.result.add("answers that differ from the first", "", float64(differ))
	b.result.add("all answered after", "s", took.Seconds())
	b.result.add("up after kill -9", "s", up.Seconds())
	b.result.note("attempts: first %v; then %v; after kill -9: %v", &cut, &ends, &again)
	b.result.atMost("transactions that the homeserver got more than once", float64(more), 0, "")
	b.result.atMost("answers that differ from the first", float64(differ), 0, "")
	b.result.atMost("attempts that were not given up and not answered 200", float64(ends.failed()+again.failed()), 0, "")
	b.result.atMost("transactions of a server at the homeserver at a time", float64(f.stub.Stats().AtOnce), 1, "")
	return b.killed(ctx, f)
}

// retried returns a new transaction of server i: of four with an event one has a
// to-device message.
func (f *edgeField) retried(i int, id string) *retried {
	r := &retried{id: id, origin: i}
	if i%5 == 4 {
		r.request = f.toDevice(f.Origin(i), id)
	} else {
		r.request = f.events(f.Origin(i), id, 1)
	}
	return r
}

func (f *edgeField) send(ctx context.Context, s *rig.Sender, r *retried, e *ends) {
	res := s.Do(ctx, r.request)
	e.add(res, 0)
	r.note(res)
}

// twice counts the transactions that the homeserver got more than once.
func (f *edgeField) twice(all []*retried) (n int) {
	for _, r := range all {
		if f.stub.Seen(f.Names()[r.origin], r.id) > 1 {
			n++
		}
	}
	return n
}

// killed kills the bus while transactions are on their way, and sends all again.
func (b *bench) killed(ctx context.Context, f *edgeField) error {
	all := make([]*retried, retryOrigins)
	for i := range all {
		all[i] = f.retried(i, "killed")
	}
	// What the homeserver was given in the moment of the kill, nobody has an answer
	// to: that may reach it again.
	var answered atomic.Int64
	var first, again ends
	var running sync.WaitGroup
	gone, stop := context.WithCancel(ctx)
	defer stop()
	running.Go(func() {
		parallel(retriesAtOnce, retryOrigins, func(i int) {
			if gone.Err() != nil {
				return
			}
			s := f.sender(f.target(), i, 1)
			defer s.Close()
			f.send(gone, s, all[i], &first)
		})
	})
	if !until(ctx, time.Now().Add(killAfter)) {
		return ctx.Err()
	}
	err := f.bus.Kill()
	f.bus = nil
	stop()
	running.Wait()
	if err != nil {
		return err
	}
	had := make([]bool, retryOrigins)
	for i, r := range all {
		if had[i] = r.answer != nil; had[i] {
			answered.Add(1)
		}
	}
	if err := f.start(ctx, nil); err != nil {
		return err
	}
	parallel(retriesAtOnce, retryOrigins, func(i int) {
		s := f.sender(f.target(), i, 1)
		defer s.Close()
		for range 2 {
			f.send(ctx, s, all[i], &again)
		}
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var twiceAnswered, twiceOpen, most, differ int
	for i, r := range all {
		n := f.stub.Seen(f.Names()[i], r.id)
		most = max(most, n)
		differ += r.other
		switch {
		case n > 1 && had[i]:
			twiceAnswered++
		case n > 1:
			twiceOpen++
		}
	}
	b.result.add("killed in the middle: answered before", "", float64(answered.Load()))
	b.result.add("killed in the middle: of these, got again by the homeserver", "", float64(twiceAnswered))
	b.result.add("killed in the middle: of the others, got again by the homeserver", "", float64(twiceOpen))
	b.result.add("killed in the middle: answers that differ from the first", "", float64(differ))
	b.result.note("killed in the middle: %v; sent again: %v; one transaction reached the homeserver %d times at most", &first, &again, most)
	b.result.atMost("killed in the middle, answered ones that the homeserver got again", float64(twiceAnswered), 0, "")
	b.result.atMost("killed in the middle, answers that differ from the first", float64(differ), 0, "")
	b.result.atMost("killed in the middle, sent again and not answered 200", float64(again.failed()), 0, "")
	b.result.note("default configuration; %d servers, %d at a time; the homeserver takes %v for each transaction; four of five have an event, one a to-device message", retryOrigins, retriesAtOnce, retryDelay)
	b.result.note("each is sent once and given up after %v, then 4 times at once, 4 times at once, once, and after kill -9 twice at once", cutAfter)
	return nil
}

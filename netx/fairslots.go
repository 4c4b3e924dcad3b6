package netx

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// A fairSlots bounds how many bodies are read at once, in all and for one client, so that
// some clients cannot keep all the others from it. Of those who wait, the client that
// holds fewest is next, and among equals the first. While somebody waits, the slowest
// body gives its slot if after slotSlowAfter it is slower than the least rate; and, once
// somebody has waited for crowdedFor, if it has had its slot for longestAlone,
// however fast it is.
type fairSlots struct {
	max       int
	leastRate int64 // bytes a second

	mu      sync.Mutex
	used    int
	by      shares
	held    map[*slot]struct{}
	cutting int       // slots that were cut, and not given back yet
	waiting list.List // of *fairWaiter, the first in front
	most    int
	cuts    uint64
}

const (
	// slotSlowAfter is when a body is measured first: what a line takes for the next piece.
	slotSlowAfter = 250 * time.Millisecond
	slotLook      = 50 * time.Millisecond
	crowdedFor    = 2 * time.Second
	longestAlone  = 10 * time.Second
)

// slot is a place in which a body is read.
type slot struct {
	of    *fairSlots
	key   netip.Addr
	begun time.Time

	// Guarded by of.mu.
	moved       int64 // bytes
	cut         bool
	setDeadline func(time.Time) error
}

type fairWaiter struct {
	key  netip.Addr
	turn chan *slot // room for one
	cut  *slot      // taken back for it; guarded by fairSlots.mu
}

func newFairSlots(n int, leastRate int64) *fairSlots {
	return &fairSlots{max: n, leastRate: leastRate, by: newShares(), held: map[*slot]struct{}{}}
}

var errNoSlot = errors.New("no slot was free in time")

// acquire waits for a slot for a client; the zero address is nobody's, see mayTake.
// The error is errNoSlot at the deadline, or ctx's. setDeadline is for reading the body.
func (s *fairSlots) acquire(ctx context.Context, key netip.Addr, deadline time.Time, setDeadline func(time.Time) error) (*slot, error) {
	s.mu.Lock()
	if s.freeLocked(key) {
		got := s.takeLocked(key)
		got.setDeadline = setDeadline
		s.mu.Unlock()
		return got, nil
	}
	w := &fairWaiter{key: key, turn: make(chan *slot, 1)}
	element := s.waiting.PushBack(w)
	s.mu.Unlock()
	begun := time.Now()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	look := time.NewTimer(0)
	defer look.Stop()
	var err error
	for err == nil {
		select {
		case got := <-w.turn:
			return got.use(setDeadline), nil
		case now := <-look.C:
			s.cutSlowest(w, now.Sub(begun) >= crowdedFor, now)
			look.Reset(slotLook)
		case <-timer.C:
			err = errNoSlot
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	s.mu.Lock()
	select {
	case got := <-w.turn: // at the same moment
		s.mu.Unlock()
		return got.use(setDeadline), nil
	default:
	}
	s.waiting.Remove(element)
	s.mu.Unlock()
	return nil, err
}

// use sets what reads the body of a slot that was waited for.
func (t *slot) use(setDeadline func(time.Time) error) *slot {
	t.of.mu.Lock()
	defer t.of.mu.Unlock()
	t.setDeadline = setDeadline
	return t
}

// progress notes that n bytes have come, and sets until when the next must if that is
// later now, unless the slot was taken back.
func (t *slot) progress(n int64, later time.Time) error {
	if t.note(n) || later.IsZero() {
		return nil
	}
	err := t.setDeadline(later)
	if t.note(n) { // meanwhile
		return t.setDeadline(time.Now())
	}
	return err
}

func (t *slot) note(n int64) (cut bool) {
	t.of.mu.Lock()
	defer t.of.mu.Unlock()
	t.moved = n
	return t.cut
}

// cutSlowest takes a slot back for a client that waits, if that would give it one.
func (s *fairSlots) cutSlowest(w *fairWaiter, crowded bool, now time.Time) {
	s.mu.Lock()
	slowest := s.slowestLocked(w, crowded, now)
	if slowest != nil {
		slowest.cut, w.cut = true, slowest
		s.cutting++
		s.cuts++
	}
	s.mu.Unlock()
	if slowest != nil {
		_ = slowest.setDeadline(now) // a connection that is broken ends as well
	}
}

func (s *fairSlots) slowestLocked(w *fairWaiter, crowded bool, now time.Time) (slowest *slot) {
	_, coming := s.held[w.cut]
	if coming || !mayTake(w.key, s.by.weight(w.key), s.used-s.cutting-1, s.max) {
		return nil
	}
	var least float64
	for t := range s.held { // max at most
		age := now.Sub(t.begun)
		rate := float64(t.moved) / age.Seconds()
		if t.cut || t.setDeadline == nil || age < slotSlowAfter || rate >= float64(s.leastRate) && !(crowded && age >= longestAlone) {
			continue
		}
		if slowest == nil || rate < least || rate == least && t.begun.Before(slowest.begun) {
			slowest, least = t, rate
		}
	}
	return slowest
}

func (s *fairSlots) freeLocked(key netip.Addr) bool {
	return mayTake(key, s.by.weight(key), s.used, s.max)
}

func (s *fairSlots) takeLocked(key netip.Addr) *slot {
	s.used++
	s.most = max(s.most, s.used)
	s.by.add(key, 1)
	t := &slot{of: s, key: key, begun: time.Now()}
	s.held[t] = struct{}{}
	return t
}

// release gives back what acquire took, and to those who wait what is free.
func (t *slot) release() {
	s := t.of
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.held[t]; !ok {
		panic(fmt.Sprintf("netx: slot released that nobody held, of %d", s.max))
	}
	delete(s.held, t)
	s.used--
	s.by.add(t.key, -1)
	if t.cut {
		s.cutting--
	}
	for e := s.nextLocked(); e != nil; e = s.nextLocked() {
		w := s.waiting.Remove(e).(*fairWaiter)
		w.turn <- s.takeLocked(w.key)
	}
}

// nextLocked returns the waiter whose turn it is, nil if there is none or no slot
// for any. It looks at all: no more than there are requests held.
func (s *fairSlots) nextLocked() (next *list.Element) {
	fewest := 0
	for e := s.waiting.Front(); e != nil && s.used < s.max; e = e.Next() {
		key := e.Value.(*fairWaiter).key
		if n := s.by.weight(key); s.freeLocked(key) && (next == nil || n < fewest) {
			next, fewest = e, n
		}
	}
	return next
}

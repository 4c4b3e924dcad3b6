package netx

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"fsbus/bus/matrix"
)

func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(2)
		for range 2 {
			if err := s.acquire(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.acquire(ctx); FailureOf(err) != matrix.FailLocal {
			t.Errorf("a third of two slots: %v, want our own limit's error", err)
		}
		given, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.acquire(given); FailureOf(err) != matrix.FailCancelled {
			t.Errorf("with a cancelled context: %v", err)
		}
		got := make(chan error)
		go func() { got <- s.acquire(t.Context()) }()
		synctest.Wait()
		select {
		case <-got:
			t.Fatal("a slot too many")
		default:
		}
		s.release()
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		s.release()
		s.release()
		defer func() {
			if recover() == nil {
				t.Error("a release too many goes unnoticed")
			}
		}()
		s.release()
	})
}

func TestHandshakesArePaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(4)
		start := time.Now()
		for range 1 + 8 { // one at once, then two seconds' worth
			if err := h.wait(t.Context(), fullCost); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("9 handshakes at 4 per second took %v, want 2s", d)
		}
		// A wait beyond the deadline is our own fault.
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		start = time.Now()
		if err := h.wait(ctx, fullCost); FailureOf(err) != matrix.FailLocal {
			t.Errorf("beyond the deadline: %v", err)
		}
		if d := time.Since(start); d != 100*time.Millisecond {
			t.Errorf("it failed after %v", d)
		}
		if h.timer.Stop() {
			t.Error("the timer runs for one that gave up")
		}
		given, cancel := context.WithCancel(t.Context())
		cancel()
		if err := h.wait(given, fullCost); FailureOf(err) != matrix.FailCancelled {
			t.Errorf("with a cancelled context: %v", err)
		}
		if err := newHandshakes(-1).wait(given, fullCost); err != nil {
			t.Errorf("no limit: %v", err)
		}
	})
}

func TestHandshakesGoByPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(10)
		if err := h.wait(t.Context(), fullCost); err != nil {
			t.Fatal(err)
		}
		order := make(chan int, 10)
		gone, cancel := context.WithCancel(t.Context())
		for _, p := range []int{6, 6, 5, 1, 99, 1} {
			go func() {
				if err := h.wait(withPriority(t.Context(), p), fullCost); err != nil {
					t.Error(err)
				}
				order <- p
			}()
			synctest.Wait()
		}
		go func() {
			if err := h.wait(withPriority(gone, 1), fullCost); FailureOf(err) != matrix.FailCancelled {
				t.Errorf("a waiter that gave up: %v", err)
			}
		}()
		synctest.Wait()
		cancel()
		var got []int
		start := time.Now()
		for range 6 {
			got = append(got, <-order)
		}
		if want := []int{1, 1, 5, 6, 6, 99}; !slices.Equal(got, want) {
			t.Errorf("turns by priority %v, want %v", got, want)
		}
		if d := time.Since(start); d != 600*time.Millisecond {
			t.Errorf("six turns at 10 per second took %v", d)
		}
		synctest.Wait()
		if h.timer.Stop() {
			t.Error("the timer runs although nobody waits")
		}
	})
}

// costs names what the tests below wait for.
var costs = map[byte]int{'F': fullCost, 'r': resumedCost}

// TestResumptionsArePaced: a resumption takes its part of the pace, in whatever
// order they come with full ones.
func TestResumptionsArePaced(t *testing.T) {
	full, resumed := strings.Repeat("F", 100), strings.Repeat("r", 250)
	for _, tt := range []struct {
		perSecond float64
		kinds     string
		want      time.Duration // until the last may begin
	}{
		{100, "FF", 0},
		{100, "FFF", 10 * time.Millisecond},
		{100, "FF" + full, time.Second},
		{100, "rrrrr", 0},
		{100, "rrrrrr", 4 * time.Millisecond},
		{100, "rrrrr" + resumed, time.Second},
		{100, "FF" + strings.Repeat("FrrFrFrr", 25), (75*10 + 125*4) * time.Millisecond},
		{100, "FrrF", 8 * time.Millisecond},
		{10, "F", 0},
		{10, "FFr", 140 * time.Millisecond},
		{10, "FrF", 140 * time.Millisecond},
		{10, "rr", 0},
		{10, "rrr", 20 * time.Millisecond},
		{10, "rrF", 80 * time.Millisecond},
		{1, "rrF", 800 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := newHandshakes(tt.perSecond)
			start := time.Now()
			for _, k := range []byte(tt.kinds) {
				if err := h.wait(t.Context(), costs[k]); err != nil {
					t.Fatal(err)
				}
			}
			// Each wait may round off a nanosecond.
			if d := time.Since(start); (d - tt.want).Abs() > time.Microsecond {
				t.Errorf("%.30s at %v per second took %v, want %v", tt.kinds, tt.perSecond, d, tt.want)
			}
		})
	}
}

// TestWaitingHandshakesOfBothKinds: who is first in the queue decides when the
// next one begins, and that may change.
func TestWaitingHandshakesOfBothKinds(t *testing.T) {
	type waiter struct {
		at       time.Duration
		kind     byte
		priority int
		gone     time.Duration // when it gives up; 0: never
		want     time.Duration // when it begins; -1: never
	}
	const ms = time.Millisecond
	for name, list := range map[string][]waiter{
		"a resumption does not overtake its like": {{at: 10 * ms, kind: 'F', want: 100 * ms}, {at: 50 * ms, kind: 'r', want: 140 * ms}},
		"an urgent one goes as soon as its part is there": {
			{at: 10 * ms, kind: 'F', priority: 6, want: 140 * ms}, {at: 20 * ms, kind: 'r', priority: 1, want: 40 * ms}},
		"which may be at once": {{at: 10 * ms, kind: 'F', priority: 6, want: 140 * ms}, {at: 50 * ms, kind: 'r', priority: 1, want: 50 * ms}},
		"an urgent full one has a resumption wait": {
			{at: 10 * ms, kind: 'r', priority: 6, want: 140 * ms}, {at: 20 * ms, kind: 'F', priority: 1, want: 100 * ms}},
		"one that gives up lets the next go": {
			{at: 10 * ms, kind: 'F', gone: 60 * ms, want: -1}, {at: 20 * ms, kind: 'r', want: 60 * ms}, {at: 30 * ms, kind: 'r', want: 80 * ms}},
		"or have its turn in time": {{at: 10 * ms, kind: 'F', gone: 30 * ms, want: -1}, {at: 20 * ms, kind: 'r', want: 40 * ms}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHandshakes(10)
				start := time.Now()
				if err := h.wait(t.Context(), fullCost); err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				for i, w := range list {
					wg.Go(func() {
						time.Sleep(w.at)
						ctx, cancel := context.WithCancel(withPriority(t.Context(), w.priority))
						defer cancel()
						if w.gone > 0 {
							time.AfterFunc(w.gone-w.at, cancel)
						}
						began := time.Duration(-1)
						if h.wait(ctx, costs[w.kind]) == nil {
							began = time.Since(start)
						}
						if (began - w.want).Abs() > time.Microsecond {
							t.Errorf("waiter %d begins after %v, want %v", i, began, w.want)
						}
					})
				}
				wg.Wait()
			})
		})
	}
}

// TestRefusedResumptionsAreOwed: in the mean they cost what full ones do, and
// those that wait already wait for longer.
func TestRefusedResumptionsAreOwed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(10)
		start := time.Now()
		for range 1 + 50 {
			if err := h.wait(t.Context(), resumedCost); err != nil {
				t.Fatal(err)
			}
			h.charge(fullCost - resumedCost)
		}
		// But for the very last one's, 51 have been paid, less 10 that were there.
		if d, want := time.Since(start), (51*10-6-10)*10*time.Millisecond; (d - want).Abs() > time.Microsecond {
			t.Errorf("50 refused resumptions took %v, want %v", d, want)
		}
		start = time.Now()
		began := make(chan time.Duration)
		go func() {
			if err := h.wait(t.Context(), fullCost); err != nil {
				t.Error(err)
			}
			began <- time.Since(start)
		}()
		time.Sleep(50 * time.Millisecond)
		h.charge(fullCost)
		if d, want := <-began, 260*time.Millisecond; (d - want).Abs() > time.Microsecond {
			t.Errorf("with 6 tenths owed and then 10 more a full one began after %v, want %v", d, want)
		}
		newHandshakes(-1).charge(fullCost) // no limit, no debt
	})
}

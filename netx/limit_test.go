package netx

import (
	"context"
	"slices"
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
			if err := h.wait(t.Context()); err != nil {
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
		if err := h.wait(ctx); FailureOf(err) != matrix.FailLocal {
			t.Errorf("beyond the deadline: %v", err)
		}
		if d := time.Since(start); d != 100*time.Millisecond {
			t.Errorf("it failed after %v", d)
		}
		given, cancel := context.WithCancel(t.Context())
		cancel()
		if err := h.wait(given); FailureOf(err) != matrix.FailCancelled {
			t.Errorf("with a cancelled context: %v", err)
		}
		if err := newHandshakes(-1).wait(given); err != nil {
			t.Errorf("no limit: %v", err)
		}
	})
}

func TestHandshakesGoByPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(10)
		if err := h.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		order := make(chan int, 10)
		gone, cancel := context.WithCancel(t.Context())
		for _, p := range []int{6, 6, 5, 1, 99, 1} {
			go func() {
				if err := h.wait(withPriority(t.Context(), p)); err != nil {
					t.Error(err)
				}
				order <- p
			}()
			synctest.Wait()
		}
		go func() {
			if err := h.wait(withPriority(gone, 1)); FailureOf(err) != matrix.FailCancelled {
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
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.timer != nil {
			t.Error("the timer runs although nobody waits")
		}
	})
}

package netx

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
)

func TestLRUBounds(t *testing.T) {
	c := newLRU[int](3, 1<<20)
	for i := range 3 {
		c.put(fmt.Sprint(i), i, 0)
	}
	c.get("0") // now "1" is the oldest
	c.put("3", 3, 0)
	for key, want := range map[string]bool{"0": true, "1": false, "2": true, "3": true} {
		if _, ok := c.get(key); ok != want {
			t.Errorf("%s there: %v, want %v", key, ok, want)
		}
	}

	const each = 1000
	c = newLRU[int](1000, 10*(each+entryOverhead+1))
	for i := range 100 {
		c.put(fmt.Sprint(i%10), i, each)
		if c.bytes > c.maxBytes {
			t.Fatalf("%d bytes, bound %d", c.bytes, c.maxBytes)
		}
	}
	if c.len() != 10 {
		t.Errorf("%d entries of 1/10 of the bytes fit, want 10", c.len())
	}
	c.put("large", 1, 5*each)
	if c.bytes > c.maxBytes || c.len() != 6 {
		t.Errorf("after a large entry: %d entries, %d bytes, bound %d", c.len(), c.bytes, c.maxBytes)
	}
	c.put("too large", 1, 100*each)
	if _, ok := c.get("too large"); ok || c.len() != 6 {
		t.Error("an entry larger than the cache has been put in, or has pushed others out")
	}
	// What does not fit must not leave an older value behind.
	c.put("large", 2, 100*each)
	if v, ok := c.get("large"); ok {
		t.Errorf("the old value %d outlives the new one", v)
	}
	for key := range c.entries {
		c.remove(key)
	}
	c.remove("absent")
	if c.bytes != 0 || c.order.Len() != 0 {
		t.Errorf("empty, but %d bytes and %d in order", c.bytes, c.order.Len())
	}
	c = newLRU[int](0, 1000)
	if c.put("a", 1, 0); c.len() != 0 {
		t.Error("a cache of no entries keeps one")
	}
}

func TestFlightDoesItOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flight[string]
		calls := 0
		release := make(chan struct{})
		results := make(chan string, 100)
		for range 100 {
			go func() {
				v, err := f.do(t.Context(), "key", func(context.Context) (string, error) {
					calls++ // one at a time, or the race detector tells
					<-release
					return "value", errors.New("error")
				})
				results <- fmt.Sprint(v, " ", err)
			}()
		}
		synctest.Wait()
		if !f.running("key") || f.running("other") {
			t.Error("running is wrong")
		}
		close(release)
		for range 100 {
			if r := <-results; r != "value error" {
				t.Fatalf("result %q", r)
			}
		}
		if calls != 1 || f.running("key") || len(f.calls) != 0 {
			t.Errorf("%d calls, want 1; %d left", calls, len(f.calls))
		}
	})
}

func TestFlightIsTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flight[string]
		first, giveUp := context.WithCancel(t.Context())
		go func() {
			_, err := f.do(first, "key", func(ctx context.Context) (string, error) {
				<-ctx.Done()
				return "", ctx.Err()
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("who gave up got %v", err)
			}
		}()
		synctest.Wait()
		impatient, cancel := context.WithCancel(t.Context())
		go func() {
			if _, err := f.do(impatient, "key", nil); !errors.Is(err, context.Canceled) {
				t.Errorf("who did not wait got %v", err)
			}
		}()
		done := make(chan string)
		go func() {
			v, _ := f.do(t.Context(), "key", func(context.Context) (string, error) { return "second", nil })
			done <- v
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		giveUp()
		if v := <-done; v != "second" {
			t.Errorf("the waiting caller got %q", v)
		}
	})
}

func TestFlightSurvivesAPanic(t *testing.T) {
	var f flight[string]
	func() {
		defer func() { _ = recover() }()
		_, _ = f.do(t.Context(), "key", func(context.Context) (string, error) { panic("bug") })
	}()
	v, err := f.do(t.Context(), "key", func(context.Context) (string, error) { return strings.ToUpper("fine"), nil })
	if v != "FINE" || err != nil {
		t.Errorf("after a panic: %q, %v", v, err)
	}
}

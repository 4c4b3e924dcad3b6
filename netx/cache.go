package netx

import (
	"container/list"
	"context"
	"sync"
)

// lru keeps the values that were used last, bounded in number and in bytes. The
// zero value keeps nothing. It is not safe for concurrent use.
type lru[V any] struct {
	maxEntries int
	maxBytes   int64
	bytes      int64
	order      list.List // of *lruEntry[V], most recently used first
	entries    map[string]*list.Element
}

type lruEntry[V any] struct {
	key   string
	value V
	bytes int64
}

// entryOverhead is about what an entry costs beside its key and its value's own
// data: list element, map slot, headers.
const entryOverhead = 200

func newLRU[V any](maxEntries int, maxBytes int64) *lru[V] {
	return &lru[V]{maxEntries: maxEntries, maxBytes: maxBytes, entries: make(map[string]*list.Element)}
}

// get returns the value for key and marks it as used.
func (c *lru[V]) get(key string) (v V, ok bool) {
	e, ok := c.entries[key]
	if !ok {
		return v, false
	}
	c.order.MoveToFront(e)
	return e.Value.(*lruEntry[V]).value, true
}

// put stores value for key and drops the least recently used values that no
// longer fit. bytes is the size of the value's own data.
func (c *lru[V]) put(key string, value V, bytes int64) {
	c.remove(key)
	bytes += int64(len(key)) + entryOverhead
	if bytes > c.maxBytes || c.maxEntries <= 0 {
		return
	}
	for len(c.entries) >= c.maxEntries || c.bytes+bytes > c.maxBytes {
		c.remove(c.order.Back().Value.(*lruEntry[V]).key)
	}
	c.entries[key] = c.order.PushFront(&lruEntry[V]{key, value, bytes})
	c.bytes += bytes
}

func (c *lru[V]) remove(key string) {
	e, ok := c.entries[key]
	if !ok {
		return
	}
	delete(c.entries, key)
	c.order.Remove(e)
	c.bytes -= e.Value.(*lruEntry[V]).bytes
}

func (c *lru[V]) len() int { return len(c.entries) }

// flight lets one caller do what several want done at the same time. The zero
// value is ready.
type flight[V any] struct {
	mu    sync.Mutex
	calls map[string]*flightCall[V]
}

type flightCall[V any] struct {
	done      chan struct{}
	value     V
	err       error
	abandoned bool // the caller who did it gave up: this is no result
}

// do returns fn's result for key. If another caller is at it, do waits for that
// caller's result instead, and takes over if that caller gives up: there is no
// goroutine here, fn runs in a caller's own, under its context.
func (f *flight[V]) do(ctx context.Context, key string, fn func(context.Context) (V, error)) (V, error) {
	for {
		f.mu.Lock()
		c := f.calls[key]
		if c == nil {
			break
		}
		f.mu.Unlock()
		select {
		case <-c.done:
			if !c.abandoned {
				return c.value, c.err
			}
		case <-ctx.Done():
			var none V
			return none, ctx.Err()
		}
		if err := ctx.Err(); err != nil {
			var none V
			return none, err
		}
	}
	c := &flightCall[V]{done: make(chan struct{}), abandoned: true}
	if f.calls == nil {
		f.calls = make(map[string]*flightCall[V])
	}
	f.calls[key] = c
	f.mu.Unlock()

	defer func() { // also when fn panics
		f.mu.Lock()
		delete(f.calls, key)
		f.mu.Unlock()
		close(c.done)
	}()
	c.value, c.err = fn(ctx)
	c.abandoned = c.err != nil && ctx.Err() != nil
	return c.value, c.err
}

// running reports whether somebody is at key.
func (f *flight[V]) running(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[key] != nil
}

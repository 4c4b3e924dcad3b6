package netx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// slots bounds how many of something run at once.
type slots chan struct{}

func newSlots(n int) slots { return make(slots, n) }

// acquire waits for a slot until ctx ends.
func (s slots) acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	default:
	}
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ownLimit(ctx, "slots")
	}
}

// release gives back what acquire took.
func (s slots) release() {
	select {
	case <-s:
	default:
		panic(fmt.Sprintf("netx: slot released that nobody held, of %d", cap(s)))
	}
}

// handshakes paces TLS handshakes. They are what costs CPU in a burst towards
// many servers: 1 to 3 ms each on a fast amd64 core, several times that on a
// small ARM board. Whoever has the lowest Request.Priority goes first, and
// among equals whoever came first. As many as connect at a time may wait.
type handshakes struct {
	limiter *rate.Limiter // nil: no limit

	mu      sync.Mutex
	waiting [maxPriority + 1][]*handshakeWaiter
	timer   *time.Timer // runs while somebody waits
}

// handshakeWaiter is one dial that waits; turn is closed when it may go on.
type handshakeWaiter struct{ turn chan struct{} }

// maxPriority is the highest Request.Priority, which goes last.
const maxPriority = 15

// newHandshakes returns a pace of perSecond, evenly: hardly more than two at
// once. No limit if perSecond is negative.
func newHandshakes(perSecond float64) *handshakes {
	if perSecond < 0 {
		return &handshakes{}
	}
	return &handshakes{limiter: rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond/50)))}
}

// wait returns when the next handshake may begin.
func (h *handshakes) wait(ctx context.Context) error {
	if h.limiter == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ownLimit(ctx, "handshakes per second")
	}
	h.mu.Lock()
	if h.timer == nil && h.limiter.Allow() {
		h.mu.Unlock()
		return nil
	}
	w := &handshakeWaiter{turn: make(chan struct{})}
	p := priorityOf(ctx)
	h.waiting[p] = append(h.waiting[p], w)
	h.scheduleLocked()
	h.mu.Unlock()
	select {
	case <-w.turn:
		return nil
	case <-ctx.Done():
		h.mu.Lock()
		defer h.mu.Unlock()
		h.waiting[p] = slices.DeleteFunc(h.waiting[p], func(o *handshakeWaiter) bool { return o == w })
		return ownLimit(ctx, "handshakes per second")
	}
}

// scheduleLocked sees to it that the next one has its turn in time.
func (h *handshakes) scheduleLocked() {
	if h.timer == nil {
		h.timer = time.AfterFunc(h.limiter.Reserve().Delay(), h.next)
	}
}

// next gives the turn to the first of those with the lowest priority.
func (h *handshakes) next() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.timer = nil
	given := false
	for p := range h.waiting {
		if q := h.waiting[p]; len(q) > 0 && !given {
			close(q[0].turn)
			h.waiting[p] = slices.Delete(q, 0, 1)
			given = true
		}
		if len(h.waiting[p]) > 0 {
			h.scheduleLocked()
			return
		}
	}
}

type priorityKey struct{}

// withPriority has what is done under the context wait with priority p.
func withPriority(ctx context.Context, p int) context.Context {
	return context.WithValue(ctx, priorityKey{}, min(max(p, 0), maxPriority))
}

func priorityOf(ctx context.Context) int {
	p, _ := ctx.Value(priorityKey{}).(int)
	return p
}

// ownLimit is the error of having waited in vain for something of ours: the
// remote must not be blamed for it. If the caller gave up it is that instead.
func ownLimit(ctx context.Context, what string) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %s", errOwnLimit, what)
}

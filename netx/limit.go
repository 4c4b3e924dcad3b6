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

// What a handshake counts for in the pace, in tenths of a full one.
//
// A resumption checks no signature. Measured over loopback, as the client's CPU
// time with the key exchange that crypto/tls prefers, it takes this part of a
// full handshake:
//
//	a P-256 certificate, right below the root     amd64 0.7, 386 0.4
//	the same below an intermediate one of P-384   amd64 0.3, 386 0.2
//
// P-256 is cheap on amd64 and arm64, which have assembler for it. 386 stands for
// 32-bit ARM, which has none either: 4 tenths are right for the worst case there.
const (
	fullCost    = 10
	resumedCost = 4
)

// handshakes paces TLS handshakes. They are what costs CPU in a burst towards
// many servers: a full one 1 to 3 ms on a fast amd64 core, several times that on
// a small ARM board. Whoever has the lowest Request.Priority goes first, and
// among equals whoever came first: a cheap one does not overtake an expensive
// one. As many as connect at a time may wait.
type handshakes struct {
	limiter *rate.Limiter // in tenths of a full handshake; nil: no limit

	mu      sync.Mutex
	waiting [maxPriority + 1][]*handshakeWaiter
	timer   *time.Timer // runs while somebody waits; nil until somebody has
}

// handshakeWaiter is one dial that waits; turn is closed when it may go on.
type handshakeWaiter struct {
	cost int
	turn chan struct{}
}

// maxPriority is the highest Request.Priority, which goes last.
const maxPriority = 15

// newHandshakes returns a pace of perSecond full ones, evenly: hardly more than
// two at once. No limit if perSecond is negative.
func newHandshakes(perSecond float64) *handshakes {
	if perSecond < 0 {
		return &handshakes{}
	}
	return &handshakes{limiter: rate.NewLimiter(rate.Limit(perSecond*fullCost), fullCost*max(1, int(perSecond/50)))}
}

// wait returns when the next handshake may begin, which costs so many tenths of
// a full one: fullCost or less.
func (h *handshakes) wait(ctx context.Context, cost int) error {
	if h.limiter == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ownLimit(ctx, "handshakes per second")
	}
	w := &handshakeWaiter{cost: cost, turn: make(chan struct{})}
	p := priorityOf(ctx)
	h.mu.Lock()
	h.waiting[p] = append(h.waiting[p], w)
	h.nextLocked()
	h.mu.Unlock()
	select {
	case <-w.turn:
		return nil
	case <-ctx.Done():
		h.mu.Lock()
		defer h.mu.Unlock()
		h.waiting[p] = slices.DeleteFunc(h.waiting[p], func(o *handshakeWaiter) bool { return o == w })
		h.nextLocked() // the one behind it may cost less
		return ownLimit(ctx, "handshakes per second")
	}
}

// charge counts tenths more for a handshake that has begun. What is not there
// is owed: those that come next wait until it has been made up for.
func (h *handshakes) charge(tenths int) {
	if h.limiter != nil {
		h.limiter.ReserveN(time.Now(), tenths)
	}
}

// next is what the timer calls.
func (h *handshakes) next() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nextLocked()
}

// nextLocked gives the turn to those that may begin now, the lowest priority
// first, and sees to it that the next one has its turn in time. It may be called
// at any time.
func (h *handshakes) nextLocked() {
	for p := range h.waiting {
		for len(h.waiting[p]) > 0 {
			w, now := h.waiting[p][0], time.Now()
			if !h.limiter.AllowN(now, w.cost) {
				missing := float64(w.cost) - h.limiter.TokensAt(now)
				h.scheduleLocked(time.Duration(missing / float64(h.limiter.Limit()) * float64(time.Second)))
				return
			}
			close(w.turn)
			h.waiting[p] = slices.Delete(h.waiting[p], 0, 1)
		}
	}
	if h.timer != nil {
		h.timer.Stop()
	}
}

func (h *handshakes) scheduleLocked(d time.Duration) {
	if h.timer == nil {
		h.timer = time.AfterFunc(d, h.next)
	} else {
		h.timer.Reset(d)
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

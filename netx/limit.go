package netx

import (
	"context"
	"errors"
	"fmt"

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
// many servers: 1 to 3 ms each on a fast amd64 core, ten times that on a small
// ARM board. The zero value is no limit.
type handshakes struct {
	limiter *rate.Limiter
}

// newHandshakes returns a pace of perSecond, with a burst of one second's
// worth. No limit if perSecond is negative.
func newHandshakes(perSecond float64) handshakes {
	if perSecond < 0 {
		return handshakes{}
	}
	return handshakes{rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond)))}
}

// wait returns when the next handshake may begin. It fails at once if that is
// later than ctx's deadline.
func (h handshakes) wait(ctx context.Context) error {
	if h.limiter == nil {
		return nil
	}
	if err := h.limiter.Wait(ctx); err != nil {
		return ownLimit(ctx, "handshakes per second")
	}
	return nil
}

// ownLimit is the error of having waited in vain for something of ours: the
// remote must not be blamed for it. If the caller gave up it is that instead.
func ownLimit(ctx context.Context, what string) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %s", errOwnLimit, what)
}

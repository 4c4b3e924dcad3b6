package sched

import (
	"math/rand/v2"
	"time"
)

// Backoff says how long to leave a host alone after failures in a row.
type Backoff struct {
	First  time.Duration // after the first failure
	Factor int64         // growth for each further one, at least 1
	Cap    time.Duration // never longer than this, jitter included
}

// Delay returns the pause after the given number of failures in a row (1 is
// the first), spread evenly over 80 % to 120 % so that hosts that failed
// together are not tried together. failures < 1 gives 0.
func (b Backoff) Delay(failures int32, rng *rand.Rand) time.Duration {
	if failures < 1 || b.First <= 0 {
		return 0
	}
	d := b.First
	for i := int32(1); i < failures && d < b.Cap; i++ {
		if d > b.Cap/time.Duration(max(1, b.Factor)) {
			d = b.Cap
			break
		}
		d *= time.Duration(max(1, b.Factor))
	}
	d = d/5*4 + time.Duration(rng.Int64N(int64(d/5*2)+1))
	return min(d, b.Cap)
}

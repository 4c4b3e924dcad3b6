package fedload

import (
	"fmt"
	"math/bits"
	"time"
)

// Histogram counts durations in buckets that are at most 1/64 wider than the
// durations in them, from nanoseconds to years. Its size does not depend on how
// many it counts. The zero value is empty.
type Histogram struct {
	buckets [(64 - subBits) << subBits]int64
	count   int64
	max     time.Duration
}

// subBits: each power of two has 1<<subBits buckets.
const subBits = 6

// bucket returns the index for v >= 0: v itself while small, else its highest
// subBits+1 bits with their exponent.
func bucket(v uint64) int {
	shift := max(0, bits.Len64(v)-subBits-1)
	return shift<<subBits + int(v>>shift)
}

// top returns the largest value that a bucket counts.
func top(i int) uint64 {
	shift := max(0, i>>subBits-1)
	return uint64(i-shift<<subBits+1)<<shift - 1
}

// Add counts d; what is negative counts as 0.
func (h *Histogram) Add(d time.Duration) {
	d = max(0, d)
	h.buckets[bucket(uint64(d))]++
	h.count++
	h.max = max(h.max, d)
}

// Count returns how many durations were added.
func (h *Histogram) Count() int64 { return h.count }

// Max returns the largest, exactly; 0 of an empty histogram.
func (h *Histogram) Max() time.Duration { return h.max }

// Percentile returns a duration that p percent of those added do not exceed, and
// that is at most 1/64 above the smallest such one; 0 of an empty histogram.
func (h *Histogram) Percentile(p float64) time.Duration {
	want := int64(p / 100 * float64(h.count))
	if float64(want) < p/100*float64(h.count) {
		want++
	}
	var seen int64
	for i, n := range h.buckets {
		if seen += n; seen >= max(1, want) {
			return min(h.max, time.Duration(top(i)))
		}
	}
	return h.max
}

// String shows the usual percentiles.
func (h *Histogram) String() string {
	show := func(d time.Duration) string { return d.Round(max(time.Microsecond, d/1000)).String() }
	return fmt.Sprintf("p50 %s, p90 %s, p99 %s, max %s",
		show(h.Percentile(50)), show(h.Percentile(90)), show(h.Percentile(99)), show(h.max))
}

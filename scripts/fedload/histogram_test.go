package fedload

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestBucketsAreNarrow(t *testing.T) {
	values := []uint64{0, 1, 63, 64, 127, 128, 129, math.MaxInt64}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 10_000 {
		values = append(values, rng.Uint64()>>(1+rng.IntN(63)))
	}
	for _, v := range values {
		i := bucket(v)
		if got := top(i); got < v || got-v > v/64 {
			t.Fatalf("%d is in bucket %d, which ends at %d", v, i, got)
		}
		if i > 0 && top(i-1) >= v {
			t.Fatalf("%d is in bucket %d, but the one before ends at %d", v, i, top(i-1))
		}
	}
	var h Histogram
	if last := len(h.buckets) - 1; bucket(math.MaxInt64) != last {
		t.Errorf("the largest duration is in bucket %d of %d", bucket(math.MaxInt64), last)
	}
}

func TestPercentiles(t *testing.T) {
	var h Histogram
	if h.Percentile(50) != 0 || h.Max() != 0 {
		t.Error("an empty histogram has durations")
	}
	for ms := range 1000 {
		h.Add(time.Duration(ms+1) * time.Millisecond)
	}
	for _, test := range []struct {
		p    float64
		want time.Duration
	}{{0, time.Millisecond}, {50, 500 * time.Millisecond}, {99, 990 * time.Millisecond}, {99.9, 999 * time.Millisecond}} {
		if got := h.Percentile(test.p); got < test.want || got > test.want+test.want/64 {
			t.Errorf("percentile %v is %v, want %v and at most 1/64 more", test.p, got, test.want)
		}
	}
	if h.Percentile(100) != time.Second || h.Max() != time.Second || h.Count() != 1000 {
		t.Errorf("percentile 100 is %v, max %v of %d", h.Percentile(100), h.Max(), h.Count())
	}
	h.Add(-1)
	if h.Percentile(0) != 0 {
		t.Errorf("a negative duration counts as %v", h.Percentile(0))
	}
}

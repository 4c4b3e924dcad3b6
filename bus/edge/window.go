package edge

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// window is how many calls of one sort the homeserver works on at a time: as many
// as it takes without getting slower. It grows by one while answers are about as
// fast as the fastest of their kind, and is halved when they take much longer.
type window struct {
	size, least, most int32
	near, far         int64 // medians, in thousandths of the best, up to which it grows and from which it is halved
	wanted            bool  // more could have been begun since the last adjustment

	best   map[kind]*baseline
	ratios []int64 // answer times since then, in thousandths of the best
	since  sched.Time
	shrunk sched.Time

	recent   [64]time.Duration // answer times, a ring
	seen     int64
	grown    int64
	halved   int64
	measured int64 // the median of the last adjustment, in thousandths of the best
}

// kind is what has like answer times: an endpoint or a band, and how much is asked
// of it, as a power of two.
type kind struct {
	name  string
	scale int
}

// baseline is the fastest answer of a kind within the last bestFor to twice that.
type baseline struct {
	now, before time.Duration
	since       sched.Time
}

const (
	// A window is adjusted after adjustAfter answers and adjustEvery, or at the
	// latest after len(ratios) answers.
	adjustAfter = 8
	adjustMost  = 64
	adjustEvery = 250 * time.Millisecond
	// What is halved does not grow for calmFor.
	calmFor = 5 * time.Second
	bestFor = 5 * time.Minute
	// quick is the answer time below which none counts as slower than another.
	quick = 10 * time.Millisecond
	// maxBaselines bounds the kinds: there are fewer endpoints and scales.
	maxBaselines = 128
)

// limit sets how large it may be, and begins in the middle.
func (w *window) limit(most int32) {
	least := min(w.least, most)
	if w.most = most; w.size == 0 {
		w.size = max(least, most/2)
		w.best = make(map[kind]*baseline)
	}
	w.size = min(max(w.size, least), most)
}

// answered notes an answer of a kind that took so long.
func (w *window) answered(now sched.Time, k kind, took time.Duration, mayGrow bool) {
	w.recent[w.seen%int64(len(w.recent))] = took
	w.seen++
	b := w.best[k]
	if b == nil {
		if len(w.best) >= maxBaselines {
			return
		}
		b = &baseline{now: took, before: took, since: now}
		w.best[k] = b
	}
	if now.Sub(b.since) >= bestFor {
		b.now, b.before, b.since = took, b.now, now
	}
	b.now = min(b.now, took)
	if now.Add(-took) < w.shrunk {
		return // begun while there was more at a time
	}
	w.ratios = append(w.ratios, int64(max(took, quick))*1000/int64(max(min(b.now, b.before), quick)))
	if n := len(w.ratios); n < adjustAfter || n < adjustMost && now.Sub(w.since) < adjustEvery {
		return
	}
	slices.Sort(w.ratios)
	median := w.ratios[len(w.ratios)/2]
	w.measured = median
	switch {
	case median >= w.far:
		w.halve(now)
	case median <= w.near && w.wanted && mayGrow && w.size < w.most && now.Sub(w.shrunk) >= calmFor:
		w.size++
		w.grown++
	}
	w.begin(now)
}

// begin begins to measure anew.
func (w *window) begin(now sched.Time) {
	w.ratios, w.since, w.wanted = w.ratios[:0], now, false
}

func (w *window) halve(now sched.Time) {
	w.shrunk = now
	if n := max(w.size/2, min(w.least, w.most)); n < w.size {
		w.size = n
		w.halved++
	}
}

// quantiles returns the median and the 90th percentile of the latest answer times.
func (w *window) quantiles() (p50, p90 time.Duration) {
	n := int(min(w.seen, int64(len(w.recent))))
	if n == 0 {
		return 0, 0
	}
	sorted := slices.SortedFunc(slices.Values(w.recent[:n]), cmp.Compare)
	return sorted[n/2], sorted[n*9/10]
}

// homeserver is what is known of ours.
type homeserver struct {
	down     bool
	since    sched.Time // that it is down, or up; 0: since the start
	next     sched.Time // when it is tried next, if it is down
	failures int32      // tries in a row
	why      string
	times    int64         // that it was down
	total    time.Duration // for how long, in all, until the last time that it came back
}

// probeFor is how long one try may take before the next.
const probeFor = 5 * time.Second

// mayTry reports whether it may be given something.
func (h *homeserver) mayTry(now sched.Time) bool { return !h.down || now >= h.next }

// probing notes that one request has been sent to see whether it is back.
func (h *homeserver) probing(now sched.Time) { h.next = now.Add(probeFor) }

// homeWorks notes that it has answered.
func (m *Machine) homeWorks() {
	h := &m.home
	if !h.down {
		return
	}
	h.down, h.failures = false, 0
	h.total += m.now.Sub(h.since)
	h.since = m.now
}

// homeEnded notes what the end of an attempt says about it.
func (m *Machine) homeEnded(c *call, ev Done, lost bool) {
	h := &m.home
	l := &m.lanes[bands[c.band].lane]
	away := lost || ev.Away || gateway(c.status) && (c.txn != nil || c.probe)
	if !away {
		if c.status == 0 && ev.Failure != matrix.FailLocal { // which says nothing about it
			l.window.halve(m.now)
			l.resize()
		}
		return
	}
	if h.down && !c.probe {
		return // begun before that was known
	}
	if !h.down {
		h.down, h.since, h.failures = true, m.now, 0
		h.times++
		// It comes back cold.
		for i := range m.lanes {
			w := &m.lanes[i].window
			w.size = min(w.least, w.most)
			w.begin(m.now)
			m.lanes[i].resize()
		}
	}
	h.failures++
	h.next = m.now.Add(probes.Delay(h.failures, m.rng))
	h.why = ev.Failure.String()
	if c.status != 0 {
		h.why = fmt.Sprintf("status %d", c.status)
	} else if ev.Detail != "" {
		h.why += ": " + cut(ev.Detail)
	}
}

// maxDetail bounds the text kept of a failure, in bytes.
const maxDetail = 200

// cut bounds a text without splitting a character.
func cut(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	n := maxDetail
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n]
}

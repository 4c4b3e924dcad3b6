package fedload

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Report sums up many requests.
type Report struct {
	Requests int64
	Failed   int64         // with an error, those that broke off in the body included
	Statuses map[int]int64 // 0 for those that got no answer
	Bytes    int64         // of answers' bodies
	Elapsed  time.Duration // of the whole run
	Headers  Histogram     // of those that got an answer
	Whole    Histogram     // of all
	FirstErr error         // the first error met; nil if Failed is 0
}

// String shows the report in one line.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests in %v:", r.Requests, r.Elapsed.Round(time.Millisecond))
	for _, status := range slices.Sorted(maps.Keys(r.Statuses)) {
		if status == 0 {
			fmt.Fprintf(&b, " no answer x%d", r.Statuses[0])
			continue
		}
		fmt.Fprintf(&b, " %d x%d", status, r.Statuses[status])
	}
	fmt.Fprintf(&b, "; headers %v; whole %v", &r.Headers, &r.Whole)
	if r.FirstErr != nil {
		fmt.Fprintf(&b, "; %d failed, first: %v", r.Failed, r.FirstErr)
	}
	return b.String()
}

func (r *Report) add(res Result) {
	r.Requests++
	r.Statuses[res.Status]++
	r.Bytes += res.Size
	if res.Status != 0 {
		r.Headers.Add(res.Headers)
	}
	r.Whole.Add(res.Whole)
	if res.Err != nil {
		r.Failed++
		if r.FirstErr == nil {
			r.FirstErr = res.Err
		}
	}
}

// Run makes all requests, at most concurrency (at least 1) at once, and returns when
// the last has its answer. When ctx ends it begins no more and breaks off those
// that run. each, if not nil, is called with every result, one call at a time.
func (c *Client) Run(ctx context.Context, concurrency int, requests iter.Seq[*Request], each func(*Request, Result)) *Report {
	report := &Report{Statuses: make(map[int]int64)}
	start := time.Now()
	var (
		mu      sync.Mutex // guards report and each
		workers sync.WaitGroup
	)
	work := make(chan *Request)
	for range max(1, concurrency) {
		workers.Go(func() {
			for r := range work {
				res := c.Do(ctx, r)
				mu.Lock()
				report.add(res)
				if each != nil {
					each(r, res)
				}
				mu.Unlock()
			}
		})
	}
	for r := range requests {
		select {
		case work <- r:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
	}
	close(work)
	workers.Wait()
	report.Elapsed = time.Since(start)
	return report
}

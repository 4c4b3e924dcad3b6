package node

import (
	"cmp"
	"context"
	"io"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
	"fsbus/store"
)

// queueList is the answer to GET /queue.
type queueList struct {
	queueHead
	Destinations []queueRow `json:"destinations"`
}

// queueHead is a queueList without what is streamed.
type queueHead struct {
	AgeBounds   []int64   `json:"age_bounds_minutes"`
	Total       queueSum  `json:"total"`                  // of all that pass the filter
	Rest        *queueSum `json:"rest,omitempty"`         // of those beyond the limit
	AgesMissing string    `json:"ages_missing,omitempty"` // why there are no ages
}

// queueSum adds up some destinations.
type queueSum struct {
	Destinations int64   `json:"destinations"`
	Items        int64   `json:"items"`
	Bytes        int64   `json:"bytes"`
	Ages         []int64 `json:"ages"` // as store.Ages; null if they are missing
}

// queueRow is one destination.
type queueRow struct {
	Destination   string  `json:"destination"`
	Items         int64   `json:"items"`
	Bytes         int64   `json:"bytes"`
	Ages          []int64 `json:"ages"`
	OldestSeconds float64 `json:"oldest_seconds"`
	State         string  `json:"state"`
	Failures      int32   `json:"failures"`
	NextTryIn     float64 `json:"next_try_in_seconds,omitempty"`
}

// listed is what is kept in memory of each destination that is listed: 96 bytes,
// of which the texts are the core's own.
type listed struct {
	name     matrix.ServerName
	state    string
	bytes    int64
	oldest   sched.Time
	nextTry  sched.Time
	items    int32
	failures int32
	ages     [len(store.Ages{})]int32
}

// orders are the ways to sort a list; what is the same in them is sorted by name.
var orders = map[string]func(a, b *listed) int{
	"name":  func(a, b *listed) int { return 0 },
	"total": func(a, b *listed) int { return cmp.Compare(b.items, a.items) },
	"bytes": func(a, b *listed) int { return cmp.Compare(b.bytes, a.bytes) },
	"oldest": func(a, b *listed) int {
		// As unsigned numbers: where nothing is pending there is no oldest, which
		// stands last.
		return cmp.Compare(uint64(a.oldest-1), uint64(b.oldest-1))
	},
}

// list answers GET /queue?sort=&filter=&limit=.
func (a *adminServer) list(ctx context.Context, q url.Values) (reply, error) {
	order := orders[cmp.Or(q.Get("sort"), "total")]
	if order == nil {
		return nil, badRequest("sort by name, total, oldest or bytes, not %q", q.Get("sort"))
	}
	match, err := filterTest(q.Get("filter"))
	if err != nil {
		return nil, badRequest("the filter %q: %v", q.Get("filter"), err)
	}
	limit := int64(0)
	if s := q.Get("limit"); s != "" {
		if limit, err = strconv.ParseInt(s, 10, 32); err != nil || limit < 0 {
			return nil, badRequest("the limit is a number, 0 for none, not %q", s)
		}
	}
	rows, missing, err := a.rows(ctx, match)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(rows, func(x, y listed) int { return cmp.Or(order(&x, &y), cmp.Compare(x.name, y.name)) })

	head := queueHead{AgeBounds: store.AgeBounds[:], Total: sum(rows, missing), AgesMissing: missing}
	if limit > 0 && limit < int64(len(rows)) {
		rest := sum(rows[limit:], missing)
		head.Rest = &rest
		rows = rows[:limit]
	}
	now := a.now()
	return func(w io.Writer) error {
		return writeListed(w, head, "destinations", len(rows), func(i int) any { return rows[i].row(now, missing) })
	}, nil
}

// rows collects the destinations that match, in no order. missing says why
// their ages are not known, and is empty if they are.
func (a *adminServer) rows(ctx context.Context, match func(string) bool) (rows []listed, missing string, err error) {
	asking, cancel := patiently(ctx)
	defer cancel()
	if err := a.core.queues(asking, func(st bus.QueueStatus) {
		if match(string(st.Name)) {
			rows = append(rows, listed{
				name: st.Name, state: st.State, bytes: st.Bytes, oldest: st.Oldest, nextTry: st.NextTry,
				items: int32(st.Total()), failures: st.Failures,
			})
		}
	}); err != nil {
		return nil, "", loopError(err)
	}
	slices.SortFunc(rows, func(x, y listed) int { return cmp.Compare(x.name, y.name) })
	reading, cancel := context.WithTimeout(ctx, adminReading)
	defer cancel()
	err = a.store.LoadAges(reading, a.now().Stored(), func(name matrix.ServerName, ages store.Ages) error {
		i, ok := slices.BinarySearchFunc(rows, name, func(r listed, n matrix.ServerName) int { return cmp.Compare(r.name, n) })
		if ok {
			for k, n := range ages {
				rows[i].ages[k] = int32(n)
			}
		}
		return nil
	})
	switch {
	case reading.Err() != nil && ctx.Err() == nil:
		missing = "there are more items than could be read within " + adminReading.String()
	case err != nil:
		missing = err.Error()
	}
	return rows, missing, nil
}

// loopError says what it means when the core was not asked.
func loopError(err error) error {
	return adminError{503, "the event loop does not answer: " + err.Error()}
}

// filterTest returns a test for names: they have to contain the text, or to match it
// as a whole if it has a * or ?.
func filterTest(text string) (func(string) bool, error) {
	text = strings.ToLower(text)
	if !strings.ContainsAny(text, "*?") {
		return func(name string) bool { return strings.Contains(strings.ToLower(name), text) }, nil
	}
	_, err := path.Match(text, "")
	return func(name string) bool {
		ok, _ := path.Match(text, strings.ToLower(name))
		return ok
	}, err
}

// sum adds up rows.
func sum(rows []listed, missing string) queueSum {
	s := queueSum{Destinations: int64(len(rows))}
	if missing == "" {
		s.Ages = make([]int64, len(store.Ages{}))
	}
	for i := range rows {
		s.Items += int64(rows[i].items)
		s.Bytes += rows[i].bytes
		for k := range s.Ages {
			s.Ages[k] += int64(rows[i].ages[k])
		}
	}
	return s
}

func (r *listed) row(now sched.Time, missing string) queueRow {
	row := queueRow{
		Destination: string(r.name), Items: int64(r.items), Bytes: r.bytes,
		OldestSeconds: since(now, r.oldest), State: r.state, Failures: r.failures, NextTryIn: until(now, r.nextTry),
	}
	if missing == "" {
		for _, n := range r.ages {
			row.Ages = append(row.Ages, int64(n))
		}
	}
	return row
}

// since returns how many seconds ago t was, 0 if never.
func since(now, t sched.Time) float64 {
	if t == 0 {
		return 0
	}
	return max(0, seconds(now.Sub(t)))
}

// until returns in how many seconds t is, 0 if never or in the past.
func until(now, t sched.Time) float64 {
	if t <= now {
		return 0
	}
	return max(seconds(t.Sub(now)), seconds(time.Millisecond))
}

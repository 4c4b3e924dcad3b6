package node

import (
	"context"
	"io"
	"math"
	"net/url"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
	"fsbus/store"
)

// queueShow is the answer to GET /queue/show: all that is known of one
// destination.
type queueShow struct {
	showHead
	List []itemReport `json:"list"`
}

// showHead is a queueShow without what is streamed.
type showHead struct {
	Destination   string        `json:"destination"`
	State         string        `json:"state"`
	Why           string        `json:"why,omitempty"` // it has not been sent
	Items         int64         `json:"items"`
	Bytes         int64         `json:"bytes"`
	Kinds         []kindReport  `json:"kinds"`
	AgeBounds     []int64       `json:"age_bounds_minutes"`
	Ages          []int64       `json:"ages"`
	OldestSeconds float64       `json:"oldest_seconds"`
	Held          bool          `json:"held"`
	Frozen        int64         `json:"frozen"` // items in the batch that is on its way
	Failures      int32         `json:"failures"`
	LastError     string        `json:"last_error,omitempty"`
	LastTryAgo    float64       `json:"last_try_seconds_ago,omitempty"`
	NextTryIn     float64       `json:"next_try_in_seconds,omitempty"`
	Answer        *answerReport `json:"answer,omitempty"`
	Host          *HostReport   `json:"host,omitempty"`
	Aside         []asideReport `json:"aside"`
}

// kindReport counts the items of a kind.
type kindReport struct {
	Kind  string `json:"kind"`
	Items int64  `json:"items"`
	Bytes int64  `json:"bytes"`
}

// answerReport is what is known of the homeserver's transactions for a
// destination.
type answerReport struct {
	Held       bool    `json:"held"` // one waits for its answer
	ForSeconds float64 `json:"for_seconds,omitempty"`
	Lane       string  `json:"lane"`
	Why        string  `json:"why"`
	Rooms      int     `json:"rooms"` // known to be shared with it
}

// itemReport is one item that waits.
type itemReport struct {
	ID         int64   `json:"id"`
	Kind       string  `json:"kind"`
	Bytes      int64   `json:"bytes"`
	AgeSeconds float64 `json:"age_seconds"`
	// ExpiresIn is negative for what has expired, and missing for what never does.
	ExpiresIn *float64 `json:"expires_in_seconds,omitempty"`
	Frozen    bool     `json:"frozen"`
}

// asideReport is one item that was set aside.
type asideReport struct {
	ID          int64   `json:"id"`
	Destination string  `json:"destination"`
	Kind        string  `json:"kind"`
	Bytes       int64   `json:"bytes"`
	AgeSeconds  float64 `json:"age_seconds"`
	AsideFor    float64 `json:"aside_seconds"`
	Reason      string  `json:"reason"`
}

// shownItems is how many items are shown of a destination if not all are wanted.
const shownItems = 100

// show answers GET /queue/show?destination=&items=: items are "all", "none", or
// else some.
func (a *adminServer) show(ctx context.Context, q url.Values) (reply, error) {
	name, err := destination(q)
	if err != nil {
		return nil, err
	}
	most := shownItems
	switch q.Get("items") {
	case "all":
		most = math.MaxInt32
	case "none":
		most = 0
	}
	asking, cancel := patiently(ctx)
	defer cancel()
	st, host, known, err := a.core.queue(asking, name)
	if err != nil {
		return nil, loopError(err)
	}
	ctx, cancel = context.WithTimeout(ctx, adminReading)
	defer cancel()
	now := a.now()
	head := newShowHead(now, name, &st, &host)
	if head.Aside, err = a.asideOf(ctx, now, name); err != nil {
		return nil, err
	}
	items, err := a.items(ctx, now, &head, most)
	if err != nil {
		return nil, err
	}
	if !known && head.Items == 0 && len(head.Aside) == 0 {
		return nil, unknown(name)
	}
	return func(w io.Writer) error {
		return writeListed(w, &head, "list", len(items), func(i int) any { return newItemReport(now, &items[i]) })
	}, nil
}

// newShowHead returns what the core knows.
func newShowHead(now sched.Time, name matrix.ServerName, st *bus.QueueStatus, host *bus.HostStatus) showHead {
	h := showHead{
		Destination: string(name), State: st.State, Why: st.Why, Held: st.Held,
		Failures: st.Failures, LastError: st.LastError, LastTryAgo: since(now, st.LastTry), NextTryIn: until(now, st.NextTry),
		Kinds: []kindReport{}, AgeBounds: store.AgeBounds[:], Ages: make([]int64, len(store.Ages{})), Aside: []asideReport{},
	}
	if h.State == "" {
		h.State = "idle"
	}
	if st.Paced {
		p := &st.Answer
		h.Answer = &answerReport{p.Held, seconds(p.For), p.Lane, p.Why, p.Rooms}
	}
	if host.Name != "" {
		r := newHostReport(now, host)
		h.Host = &r
	}
	return h
}

// items reads what is pending: it completes head, and returns at most so many
// items, without their payloads. A destination has no more of them than the store
// allows it.
func (a *adminServer) items(ctx context.Context, now sched.Time, head *showHead, most int) ([]store.PendingItem, error) {
	var list []store.PendingItem
	var kinds store.KindTotals
	var oldest int64
	err := a.store.LoadItems(ctx, matrix.ServerName(head.Destination), func(it store.PendingItem) error {
		it.Payload = nil
		if len(list) < most {
			list = append(list, it)
		}
		kinds[it.Kind].Items++
		kinds[it.Kind].Bytes += it.Size
		head.Items++
		head.Bytes += it.Size
		if it.Frozen {
			head.Frozen++
		}
		if oldest == 0 || it.Accepted < oldest {
			oldest = it.Accepted
		}
		head.Ages[ageColumn(now.Stored()-it.Accepted)]++
		return nil
	})
	head.OldestSeconds = since(now, sched.FromStored(oldest))
	head.Kinds = kindReports(kinds)
	return list, err
}

// ageColumn returns where an age in milliseconds counts in store.Ages.
func ageColumn(ms int64) int {
	for i, bound := range store.AgeBounds {
		if ms <= bound*time.Minute.Milliseconds() {
			return i
		}
	}
	return len(store.AgeBounds)
}

// kindReports lists the kinds of which there are any.
func kindReports(totals store.KindTotals) []kindReport {
	list := []kindReport{}
	for kind, t := range totals {
		if t.Items > 0 {
			list = append(list, kindReport{matrix.Kind(kind).String(), t.Items, t.Bytes})
		}
	}
	return list
}

func newItemReport(now sched.Time, it *store.PendingItem) itemReport {
	r := itemReport{
		ID: it.ID, Kind: it.Kind.String(), Bytes: it.Size, AgeSeconds: since(now, sched.FromStored(it.Accepted)), Frozen: it.Frozen,
	}
	if it.Expires > 0 {
		in := seconds(sched.FromStored(it.Expires).Sub(now))
		r.ExpiresIn = &in
	}
	return r
}

// asideOf returns what is set aside for a destination, or for all if name is
// empty. The store bounds how much that is.
func (a *adminServer) asideOf(ctx context.Context, now sched.Time, name matrix.ServerName) ([]asideReport, error) {
	list := []asideReport{}
	err := a.store.LoadAside(ctx, func(it store.Aside) error {
		if name == "" || it.Destination == name {
			list = append(list, asideReport{
				it.ID, string(it.Destination), it.Kind.String(), int64(len(it.Payload)),
				since(now, sched.FromStored(it.Accepted)), since(now, sched.FromStored(it.At)), it.Reason,
			})
		}
		return nil
	})
	return list, err
}

// asideList is the answer to GET /queue/aside.
type asideList struct {
	Aside []asideReport `json:"aside"`
}

// aside answers GET /queue/aside.
func (a *adminServer) aside(ctx context.Context, _ url.Values) (reply, error) {
	ctx, cancel := context.WithTimeout(ctx, adminReading)
	defer cancel()
	list, err := a.asideOf(ctx, a.now(), "")
	return writeJSON(asideList{list}), err
}

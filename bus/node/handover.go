package node

import (
	"container/list"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/scripts/synapse"
	"fsbus/store"
)

// handoverPath is where the module in Synapse hands over (scripts/synapse/FORMAT.md).
const handoverPath = "/_fsbus/v1/handover"

const (
	// maxHandoverNames and maxSets bound the servers of the sets that are remembered.
	maxHandoverNames = matrix.MaxHandoverServers
	maxSets          = 64
	// handsOverFor is for how long after the last hand-over, or the last time that the
	// module asked, the homeserver counts as one that hands over.
	handsOverFor = 5 * time.Minute
)

// handover takes what the module in Synapse hands over.
type handover struct {
	n    *Node
	hash string
	turn sync.Mutex // of the one request that is taken apart

	mu    sync.Mutex               // guards what follows
	sets  map[string]*list.Element // of matrix.HandoverSet
	used  list.List                // the last used in front
	names int
	seen  HandoverReport // without Current and Text
	last  time.Time      // that the module was heard of; zero: never
}

// HandoverReport is what is known of the module in Synapse.
type HandoverReport struct {
	Last    *time.Time `json:"last,omitempty"` // that it was heard of; nil: never since the start
	Synapse string     `json:"synapse,omitempty"`
	Module  string     `json:"module,omitempty"` // hash of its file
	Current bool       `json:"current"`          // it is the one that this fsbus has
	Events  int64      `json:"events"`
	EDUs    int64      `json:"edus"`
	Pairs   int64      `json:"pairs"`        // of a payload and a server
	Refused int64      `json:"refused"`      // pairs, and payloads that cannot be sent
	Sends   int64      `json:"transactions"` // with events that Synapse sent itself although it hands over
	Text    string     `json:"text"`
}

func newHandover(n *Node) *handover {
	return &handover{n: n, hash: synapse.Hash(), sets: make(map[string]*list.Element)}
}

// own is netx.FrontConfig.Own.
func (h *handover) own(_, target string) (maxBody int64, ok bool) {
	path, _, _ := strings.Cut(target, "?")
	return matrix.MaxHandoverBytes, path == handoverPath
}

// serve answers a request of the module. It runs on the connection's goroutine, which
// waits for the store.
func (h *handover) serve(in *netx.Inbound) {
	defer in.Release()
	status, body := h.answer(in)
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // maps and texts
	}
	_ = in.Reply(status, nil, b) // who has gone asks again
}

// handoverError is what is answered to what is not taken.
type handoverError struct {
	Errcode  string   `json:"errcode"`
	Error    string   `json:"error"`
	Versions []int    `json:"versions,omitempty"`
	Unknown  []string `json:"unknown,omitempty"`
}

func (h *handover) answer(in *netx.Inbound) (status int, body any) {
	t := h.n.takeover
	if t == nil {
		return http.StatusNotFound, handoverError{Errcode: matrix.MUnrecognized, Error: "fsbus has no outbox: homeserver.signing_key_path is not set"}
	}
	switch in.Method {
	case http.MethodGet:
		return h.hello(in.Target)
	case http.MethodPost:
	default:
		return http.StatusMethodNotAllowed, handoverError{Errcode: matrix.MUnrecognized, Error: "GET or POST is wanted"}
	}
	if why := t.reason(); why != "" {
		return http.StatusServiceUnavailable, handoverError{Errcode: matrix.MUnknown, Error: "fsbus: the outbox stands still: " + why}
	}
	wait, status, body := h.take(in)
	if wait == nil {
		return status, body
	}
	return wait()
}

// hello tells the module what is taken.
func (h *handover) hello(target string) (int, any) {
	_, query, _ := strings.Cut(target, "?")
	q, _ := url.ParseQuery(query) // what is malformed says nothing
	h.heard(q.Get("module"), q.Get("synapse"))
	h.n.loop.Post(event{Event: bus.HandedOver{}})
	return http.StatusOK, map[string]any{
		"version": matrix.HandoverVersion, "fsbus": h.n.version, "module": h.hash,
		"max_bytes": matrix.MaxHandoverBytes, "max_items": matrix.MaxHandoverItems, "max_sets": matrix.MaxHandoverSets,
	}
}

// heard notes that the module is there.
func (h *handover) heard(module, version string) {
	const most = 128
	h.mu.Lock()
	defer h.mu.Unlock()
	first := h.last.IsZero() || h.seen.Module != module
	h.last = time.Now()
	h.seen.Module, h.seen.Synapse = module[:min(len(module), most)], version[:min(len(version), most)]
	if !first {
		return
	}
	log := h.n.log.With("synapse", h.seen.Synapse)
	if module == h.hash {
		log.Info("Synapse hands over: it gives each event once, with its servers")
	} else {
		log.Warn("Synapse hands over, with a module of another version of fsbus: fsbus synapse-module prints the right one")
	}
}

// handed is what one destination is given.
type handed struct {
	dest  matrix.ServerName
	items []matrix.Item
}

// take takes a hand-over apart and gives it to the store. wait waits until it is on disk,
// and returns the answer; it is nil if there is one already.
func (h *handover) take(in *netx.Inbound) (wait func() (int, any), status int, body any) {
	if in.Body == nil {
		return nil, http.StatusBadRequest, handoverError{Errcode: matrix.MBadJSON, Error: matrix.ErrHandover.Error()}
	}
	h.turn.Lock() // one at a time is in memory in parts
	defer h.turn.Unlock()
	text, done, err := h.n.takeover.bulk.whole(in.Body, in.Size)
	defer done()
	if err != nil {
		return nil, http.StatusServiceUnavailable, handoverError{Errcode: matrix.MUnknown, Error: "fsbus: the body could not be read"}
	}
	req, err := matrix.ParseHandover(text)
	switch {
	case errors.Is(err, matrix.ErrHandoverVersion):
		return nil, http.StatusBadRequest, handoverError{Errcode: "FSBUS_VERSION", Error: err.Error(), Versions: []int{matrix.HandoverVersion}}
	case errors.Is(err, matrix.ErrHandoverTooLarge):
		return nil, http.StatusRequestEntityTooLarge, handoverError{Errcode: matrix.MTooLarge, Error: err.Error()}
	case err != nil:
		return nil, http.StatusBadRequest, handoverError{Errcode: matrix.MBadJSON, Error: err.Error()}
	}
	h.heard(req.Module, req.Synapse)
	sets, unknown := h.resolve(req)
	if len(unknown) > 0 {
		return nil, http.StatusConflict, handoverError{Errcode: "FSBUS_UNKNOWN_SETS", Error: "these sets are not known; send their servers", Unknown: unknown}
	}
	list, refused, wrong, ok := h.plan(req, sets)
	if !ok {
		return nil, http.StatusRequestEntityTooLarge, handoverError{Errcode: matrix.MTooLarge, Error: "too many servers for so many items"}
	}
	return h.submit(list, in.Size, refused, wrong), 0, nil
}

// resolve returns the servers of the sets that a request names, and remembers those that
// it lists; or those that are not known.
func (h *handover) resolve(req *matrix.Handover) (sets map[string][]string, unknown []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sets = make(map[string][]string)
	for _, s := range req.Sets {
		sets[s.ID] = s.Servers
		h.rememberLocked(s)
	}
	for i := range req.Items {
		id := req.Items[i].To
		if _, ok := sets[id]; ok {
			continue
		}
		if e := h.sets[id]; e != nil {
			h.used.MoveToFront(e)
			sets[id] = e.Value.(matrix.HandoverSet).Servers
		} else if !slices.Contains(unknown, id) {
			unknown = append(unknown, id)
		}
	}
	return sets, unknown
}

func (h *handover) rememberLocked(s matrix.HandoverSet) {
	if e := h.sets[s.ID]; e != nil {
		h.used.MoveToFront(e)
		return
	}
	h.sets[s.ID] = h.used.PushFront(s)
	h.names += len(s.Servers)
	for h.names > maxHandoverNames || h.used.Len() > maxSets {
		old := h.used.Remove(h.used.Back()).(matrix.HandoverSet)
		delete(h.sets, old.ID)
		h.names -= len(old.Servers)
	}
}

// plan says what each destination is given, in the order of the items. ok is false if that
// is too much.
func (h *handover) plan(req *matrix.Handover, sets map[string][]string) (list []*handed, refused, wrong map[string]string, ok bool) {
	refused, wrong = make(map[string]string), make(map[string]string)
	own := h.n.cfg.Load().Homeserver.ServerName
	by := make(map[string]*handed)
	pairs, events, edus := int64(0), int64(0), int64(0)
	for i := range req.Items {
		it := &req.Items[i]
		if it.Wrong != "" {
			wrong[strconv.Itoa(i)] = it.Wrong
			continue
		}
		if it.Items[0].Kind == matrix.KindPDU {
			events++
		} else {
			edus++
		}
		for _, name := range sets[it.To] {
			if name == string(own) {
				continue
			}
			d := by[name]
			if d == nil {
				dest, err := matrix.ParseServerName(name)
				if err != nil {
					refused[name] = "it is not a server's name"
					continue
				}
				d = &handed{dest: dest}
				by[name] = d
				list = append(list, d)
			}
			d.items = append(d.items, it.Items...)
			if pairs++; pairs > matrix.MaxHandoverPairs {
				return nil, nil, nil, false
			}
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen.Events += events
	h.seen.EDUs += edus
	h.seen.Pairs += pairs
	h.seen.Refused += int64(len(wrong))
	return list, refused, wrong, true
}

// submit has the store take it all over, and returns what waits for that.
func (h *handover) submit(list []*handed, size int64, refused, wrong map[string]string) func() (int, any) {
	s := &submission{n: h.n, refused: refused}
	ops := make([]store.OutboxOp, len(list))
	now := h.n.clock.Now().Stored()
	for i, d := range list {
		op := &store.Accept{Destination: d.dest, Accepted: now, Load: func(dst []matrix.Item) ([]matrix.Item, error) {
			return append(dst, d.items...), nil
		}}
		if i == 0 { // the payloads are in memory once
			op.Bytes = size
		}
		ops[i] = op
	}
	s.running.Add(1)
	s.all(ops)
	return func() (int, any) {
		s.running.Wait()
		h.mu.Lock()
		h.seen.Refused += int64(len(refused))
		h.mu.Unlock()
		if s.failed != nil {
			h.n.notable.write(slog.LevelError, "what Synapse hands over could not be stored; it keeps it, and tries again", slog.Any("error", s.failed))
			return http.StatusServiceUnavailable, handoverError{Errcode: matrix.MUnknown, Error: "fsbus: the store could not write it"}
		}
		return http.StatusOK, map[string]any{"refused": refused, "refused_items": wrong}
	}
}

// submission is a hand-over on its way into the store.
type submission struct {
	n       *Node
	running sync.WaitGroup

	mu      sync.Mutex // guards what follows until running is done
	refused map[string]string
	failed  error
}

// all has the store take everything over in one transaction, in which rows of many
// servers share the pages that are written: a tenth of what one by one costs. If one of
// them is full it is one by one after all.
func (s *submission) all(ops []store.OutboxOp) {
	defer s.running.Done()
	if len(ops) == 0 {
		return
	}
	s.running.Add(1)
	err := s.n.store.Submit(&store.Batch{Outbox: ops}, func(err error) {
		defer s.running.Done()
		if errors.Is(err, store.ErrOutboxFull) && len(ops) > 1 {
			s.each(ops)
			return
		}
		for _, op := range ops {
			s.done(op, err)
		}
	})
	if err != nil { // the module hands it over again
		s.done(ops[0], err)
		s.running.Done()
	}
}

// each has the store take one after the other over.
func (s *submission) each(ops []store.OutboxOp) {
	for _, op := range ops {
		s.running.Add(1)
		err := s.n.store.Submit(&store.Batch{Outbox: []store.OutboxOp{op}}, func(err error) {
			defer s.running.Done()
			s.done(op, err)
		})
		if err != nil { // the module hands all of it over again
			s.done(op, err)
			s.running.Done()
			return
		}
	}
}

// done notes what became of what is for one destination.
func (s *submission) done(op store.OutboxOp, err error) {
	s.n.noteCommit(op, err)
	a := op.(*store.Accept)
	if err == nil {
		r := &a.Result
		s.n.loop.Post(event{Event: bus.HandedOver{
			Dest: a.Destination, Kinds: countsOf(r.Kinds), Merged: int32(r.Merged), Duplicates: int32(r.Duplicates), Backlog: backlogOf(r.Destination),
		}})
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(err, store.ErrOutboxFull) {
		s.refused[string(a.Destination)] = "full"
	} else {
		s.failed = err
	}
}

// sent counts a transaction with events that the homeserver has made although it hands
// over.
func (h *handover) sent() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.last.IsZero() && time.Since(h.last) < handsOverFor {
		h.seen.Sends++
	}
}

// report describes it, nil without an outbox.
func (h *handover) report(now time.Time) *HandoverReport {
	if h.n.takeover == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.seen
	switch {
	case h.last.IsZero():
		r.Text = "Synapse makes a transaction for each server; with the module it gives each event once (fsbus synapse-module)"
		return &r
	case now.Sub(h.last) >= handsOverFor:
		r.Text = "Synapse has handed nothing over for " + now.Sub(h.last).Round(time.Second).String()
	default:
		r.Text = "Synapse hands over: each event once, with its servers"
	}
	last := h.last
	r.Last, r.Current = &last, r.Module == h.hash
	if !r.Current {
		r.Text += ", with a module of another version"
	}
	return &r
}

// handover writes the metrics of it.
func (e exposition) handover(h *HandoverReport) {
	if h == nil {
		return
	}
	last := 0.0
	if h.Last != nil {
		last = float64(h.Last.Unix())
	}
	e.one("fsbus_handover_last_seconds", "gauge", "When Synapse's module was heard of last, in seconds since the epoch; 0 if never.", last)
	e.one("fsbus_handover_events_total", "counter", "Events that Synapse has handed over.", float64(h.Events))
	e.one("fsbus_handover_edus_total", "counter", "EDUs that Synapse has handed over.", float64(h.EDUs))
	e.one("fsbus_handover_pairs_total", "counter", "Payloads times the servers that get them, of what was handed over.", float64(h.Pairs))
	e.one("fsbus_handover_refused_total", "counter", "Payloads and servers that were refused when handed over.", float64(h.Refused))
	e.one("fsbus_handover_transactions_total", "counter", "Transactions with events that Synapse has sent by itself although it hands over.", float64(h.Sends))
}

package sim

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of what is remembered for statistics.
const (
	maxWorldWindow  = 1 << 14 // handshakes within a second that are told apart
	maxServerWindow = 1 << 7  // requests to one server within a second that are told apart
	maxEvents       = 1 << 9  // events whose spreading is followed; the oldest go first
	maxEDUTypes     = 1 << 8  // others count as otherName
)

// otherName takes the counts of what exceeds maxEDUTypes.
const otherName = "(other)"

// Outcomes that stand beside status codes in EndpointStats.
const (
	outcomeCut     = "cut"     // the connection was closed inside the body
	outcomeGarbage = "garbage" // no HTTP came back
	outcomeGone    = "gone"    // the client left before the answer began
)

// Stats is a snapshot of what has happened since the start or the last Reset.
// Its JSON form is what the driver serves.
type Stats struct {
	// Elapsed is the time since the start or the last Reset.
	Elapsed time.Duration `json:"elapsed_ns"`

	// Endpoints by name, such as "query/profile"; "unknown" is all that there
	// is no endpoint for.
	Endpoints map[string]EndpointStats `json:"endpoints"`

	Requests    int64 `json:"requests"`
	InFlight    int64 `json:"in_flight"`
	MaxInFlight int64 `json:"max_in_flight"`
	// MaxPerServerSecond is the largest number of requests that any one server
	// got within any one second, up to 128.
	MaxPerServerSecond int `json:"max_per_server_second"`

	Connections  ConnectionStats  `json:"connections"`
	TLS          TLSStats         `json:"tls"`
	Transactions TransactionStats `json:"transactions"`

	EDUs map[string]int64 `json:"edus"` // by type

	// Events are the latest 512 PDUs and how far they got, newest last.
	Events []EventStats `json:"events"`
}

// EndpointStats counts the requests to one endpoint.
type EndpointStats struct {
	Count       int64 `json:"count"`
	MaxInFlight int64 `json:"max_in_flight"`
	// Outcomes by status code; "cut", "garbage" and "gone" for answers that
	// broke off, were no HTTP, and were no longer wanted.
	Outcomes map[string]int64 `json:"outcomes"`

	inFlight int64
}

// ConnectionStats counts TCP connections, those of Hanging servers too.
type ConnectionStats struct {
	Accepted     int64 `json:"accepted"`
	Open         int64 `json:"open"`
	MaxOpen      int64 `json:"max_open"`
	AcceptErrors int64 `json:"accept_errors"` // such as no file descriptor left
	BytesIn      int64 `json:"bytes_in"`      // as on the wire, TLS included
	BytesOut     int64 `json:"bytes_out"`
}

// TLSStats counts handshakes that came as far as the server's last message.
type TLSStats struct {
	Full             int64 `json:"full"`
	Resumed          int64 `json:"resumed"`
	MaxPerSecond     int   `json:"max_per_second"`      // of both, within any one second, up to 16384
	MaxFullPerSecond int   `json:"max_full_per_second"` // of the full ones alone, likewise
}

// TransactionStats counts what came in by PUT /send and was taken.
type TransactionStats struct {
	Count       int64 `json:"count"`
	WithoutPDUs int64 `json:"without_pdus"`
	Repeated    int64 `json:"repeated"`   // same origin and id again; counted nowhere else
	Conflicts   int64 `json:"conflicts"`  // of those, with another body
	Refused     int64 `json:"refused"`    // malformed or with too many PDUs or EDUs
	PDUs        int64 `json:"pdus"`       // duplicates included
	Duplicates  int64 `json:"duplicates"` // PDUs that the same server had already
	EDUs        int64 `json:"edus"`

	// MaxInFlightPerServer is the largest number of /send requests that any one
	// server had at once: 1 if the sender keeps to the specification. A request
	// that the client gave up counts until the server has noticed.
	MaxInFlightPerServer int64 `json:"max_in_flight_per_server"`
	// ServersOverOne is how many servers ever had more than one.
	ServersOverOne int64 `json:"servers_over_one"`
}

// EventStats says how far one PDU got.
type EventStats struct {
	ID      string    `json:"id"` // see EventID
	Servers int       `json:"servers"`
	First   time.Time `json:"first"` // when the first and the latest server got it
	Last    time.Time `json:"last"`
}

// ServerStats is what one server has seen.
type ServerStats struct {
	Requests        int64 `json:"requests"`
	MaxPerSecond    int   `json:"max_per_second"` // up to 128
	Transactions    int64 `json:"transactions"`
	PDUs            int64 `json:"pdus"` // without duplicates
	EDUs            int64 `json:"edus"`
	SendJoins       int64 `json:"send_joins"`
	Connections     int64 `json:"connections"` // accepted
	SendInFlight    int64 `json:"send_in_flight"`
	MaxSendInFlight int64 `json:"max_send_in_flight"`
}

// recorder is the live form of Stats and of every server's ServerStats.
type recorder struct {
	bytesIn, bytesOut atomic.Int64

	mu         sync.Mutex // guards all below, and server.stats and server.requests
	since      time.Time
	stats      Stats // without what snapshot fills in
	endpoints  map[string]*EndpointStats
	handshakes window
	full       window       // handshakes
	events     []EventStats // oldest first, at most maxEvents
}

func newRecorder() *recorder {
	return &recorder{since: time.Now(), stats: Stats{EDUs: map[string]int64{}}, endpoints: map[string]*EndpointStats{}}
}

// reset makes all counts zero; what is open or in flight stays so.
func (r *recorder) reset(servers []*server) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.since = time.Now()
	inFlight, open := r.stats.InFlight, r.stats.Connections.Open
	r.stats = Stats{
		InFlight:    inFlight,
		MaxInFlight: inFlight,
		Connections: ConnectionStats{Open: open, MaxOpen: open},
		EDUs:        map[string]int64{},
	}
	for name, e := range r.endpoints {
		if e.inFlight == 0 {
			delete(r.endpoints, name)
			continue
		}
		*e = EndpointStats{MaxInFlight: e.inFlight, Outcomes: map[string]int64{}, inFlight: e.inFlight}
	}
	r.handshakes, r.full = window{}, window{}
	r.events = nil
	for _, s := range servers {
		n := s.stats.SendInFlight
		s.stats = ServerStats{SendInFlight: n, MaxSendInFlight: n}
		s.requests = window{}
		r.stats.Transactions.MaxInFlightPerServer = max(r.stats.Transactions.MaxInFlightPerServer, n)
		if n > 1 {
			r.stats.Transactions.ServersOverOne++
		}
	}
	r.bytesIn.Store(0)
	r.bytesOut.Store(0)
}

func (r *recorder) snapshot() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Elapsed = time.Since(r.since)
	s.Connections.BytesIn = r.bytesIn.Load()
	s.Connections.BytesOut = r.bytesOut.Load()
	s.TLS.MaxPerSecond, s.TLS.MaxFullPerSecond = r.handshakes.max, r.full.max
	s.EDUs = maps.Clone(s.EDUs)
	s.Endpoints = make(map[string]EndpointStats, len(r.endpoints))
	for name, e := range r.endpoints {
		c := *e
		c.Outcomes = maps.Clone(e.Outcomes)
		s.Endpoints[name] = c
	}
	s.Events = append([]EventStats{}, r.events...) // JSON: a list, not null
	return s
}

func (r *recorder) server(s *server) ServerStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := s.stats
	c.MaxPerSecond = s.requests.max
	return c
}

// opened notes a change of the number of open connections to s: 1 or -1.
func (r *recorder) opened(s *server, change int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &r.stats.Connections
	if change > 0 {
		c.Accepted++
		s.stats.Connections++
	}
	c.Open += change
	c.MaxOpen = max(c.MaxOpen, c.Open)
}

func (r *recorder) acceptFailed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Connections.AcceptErrors++
}

func (r *recorder) handshake(resumed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Since(r.since)
	if resumed {
		r.stats.TLS.Resumed++
	} else {
		r.stats.TLS.Full++
		r.full.add(now, maxWorldWindow)
	}
	r.handshakes.add(now, maxWorldWindow)
}

// begin notes a request of which the headers have arrived. Each is followed by
// one end with the same arguments.
func (r *recorder) begin(s *server, endpoint string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.endpoints[endpoint]
	if e == nil {
		e = &EndpointStats{Outcomes: map[string]int64{}}
		r.endpoints[endpoint] = e
	}
	e.Count++
	e.inFlight++
	e.MaxInFlight = max(e.MaxInFlight, e.inFlight)

	st := &r.stats
	st.Requests++
	st.InFlight++
	st.MaxInFlight = max(st.MaxInFlight, st.InFlight)

	s.stats.Requests++
	s.requests.add(time.Since(r.since), maxServerWindow)
	st.MaxPerServerSecond = max(st.MaxPerServerSecond, s.requests.max)

	if endpoint == sendJoinEndpoint {
		s.stats.SendJoins++
	}
	if endpoint != sendEndpoint {
		return
	}
	s.stats.SendInFlight++
	if n := s.stats.SendInFlight; n > s.stats.MaxSendInFlight {
		s.stats.MaxSendInFlight = n
		st.Transactions.MaxInFlightPerServer = max(st.Transactions.MaxInFlightPerServer, n)
		if n == 2 {
			st.Transactions.ServersOverOne++
		}
	}
}

func (r *recorder) end(s *server, endpoint, outcome string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.endpoints[endpoint]
	e.inFlight--
	e.Outcomes[outcome]++
	r.stats.InFlight--
	if endpoint == sendEndpoint {
		s.stats.SendInFlight--
	}
}

// refused, repeated and taken note what became of a transaction.

func (r *recorder) refused() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Transactions.Refused++
}

func (r *recorder) repeated(conflict bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Transactions.Repeated++
	if conflict {
		r.stats.Transactions.Conflicts++
	}
}

// taken gets the ids of the PDUs that are new to the server and the number of
// those that are not.
func (r *recorder) taken(s *server, pdus []string, duplicates int, eduTypes []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := &r.stats.Transactions
	t.Count++
	t.PDUs += int64(len(pdus) + duplicates)
	t.Duplicates += int64(duplicates)
	t.EDUs += int64(len(eduTypes))
	if len(pdus)+duplicates == 0 {
		t.WithoutPDUs++
	}
	s.stats.Transactions++
	s.stats.PDUs += int64(len(pdus))
	s.stats.EDUs += int64(len(eduTypes))
	for _, name := range eduTypes {
		if _, known := r.stats.EDUs[name]; !known && len(r.stats.EDUs) >= maxEDUTypes {
			name = otherName
		}
		r.stats.EDUs[name]++
	}
	for _, id := range pdus {
		r.spread(time.Now(), id)
	}
}

// spread notes that one more server has got an event; mu is held.
func (r *recorder) spread(now time.Time, id string) {
	for i := len(r.events) - 1; i >= 0; i-- {
		if e := &r.events[i]; e.ID == id {
			e.Servers++
			e.Last = now
			return
		}
	}
	if len(r.events) == maxEvents {
		r.events = slices.Delete(r.events, 0, 1)
	}
	r.events = append(r.events, EventStats{ID: id, Servers: 1, First: now, Last: now})
}

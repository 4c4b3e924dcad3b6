package node

import (
	"fmt"
	"io"
	"time"

	"fsbus/bus/edge"
	"fsbus/netx"
	"fsbus/sched"
)

// EdgeReport is the side to which other servers connect.
type EdgeReport struct {
	Homeserver  HomeReport      `json:"homeserver"`
	Connections int             `json:"connections"`
	Evicted     uint64          `json:"connections_evicted"`  // idle ones, closed for new ones
	Crowding    uint64          `json:"connections_crowding"` // those that brought no request, or were refused, closed for new ones
	Slow        uint64          `json:"connections_slow"`     // bodies and answers broken off for others, as they were the slowest
	Dropped     uint64          `json:"requests_dropped"`     // those beyond all bounds, ended without an answer
	OverAddress uint64          `json:"connections_over_address"`
	Wasteful    uint64          `json:"connections_wasteful"` // closed at once, of addresses that had wasted many
	Handshake   uint64          `json:"handshakes_failed"`
	HTTP2       uint64          `json:"http2_requests"`
	Listener    map[int]uint64  `json:"listener_answers"` // given before a body was read, by status
	Requests    int64           `json:"requests"`         // that the core decided about, or whose origin is denied
	Bands       []BandReport    `json:"bands"`
	Answered    []CountReport   `json:"answered"`
	Refused     []CountReport   `json:"refused"` // by reason
	Signatures  []CountReport   `json:"signatures"`
	KeyFetches  int64           `json:"key_fetches"`
	KeysDenied  int64           `json:"key_fetches_denied"` // beyond what is allowed
	Shed        []CountReport   `json:"shed"`               // transactions of presence and typing, by reason
	EphemeralPS float64         `json:"ephemeral_per_second"`
	Ways        []CountReport   `json:"ways"`     // that requests took besides going to the homeserver and back
	Attempts    []CountReport   `json:"attempts"` // at the homeserver
	Record      []CountReport   `json:"record"`   // of transactions that the homeserver has acknowledged
	Replies     []CountReport   `json:"replies"`  // that were not written whole
	Held        int64           `json:"held_for_joins"`
	Gaps        int64           `json:"events_with_gaps"`
	GapRooms    []GapReport     `json:"rooms_with_gaps"`
	Worst       []OriginReport  `json:"worst"`
	Endpoints   []CountReport   `json:"endpoints"`
	Certificate *CertificateUse `json:"certificate,omitempty"` // none without TLS
}

// HomeReport is our homeserver as the edge sees it.
type HomeReport struct {
	Up    bool         `json:"up"`
	Why   string       `json:"why,omitempty"` // it is not
	Downs int64        `json:"downs"`         // so far
	Down  float64      `json:"down_seconds"`  // in all, until it was last back
	Lanes []LaneReport `json:"lanes"`
}

// LaneReport is what the homeserver is given of one sort.
type LaneReport struct {
	Name      string  `json:"name"`
	Running   int64   `json:"running"`
	Allowed   int64   `json:"allowed"` // at present
	Most      int32   `json:"most"`    // that may be allowed
	P50       float64 `json:"p50_seconds"`
	P90       float64 `json:"p90_seconds"`
	Grown     int64   `json:"grown"`
	Halved    int64   `json:"halved"`
	Abandoned int     `json:"abandoned"` // for which nobody waits
}

// BandReport is one priority class of inbound requests.
type BandReport struct {
	Band          string  `json:"band"`
	Begun         int64   `json:"begun"` // so far
	Waiting       int     `json:"waiting"`
	Running       int     `json:"running"`
	OldestSeconds float64 `json:"oldest_seconds"`
	MeanWait      float64 `json:"mean_wait_seconds"`
	MaxWait       float64 `json:"max_wait_seconds"`
}

// OriginReport is one server that costs much.
type OriginReport struct {
	Name     string    `json:"name"`           // "": it signs nothing
	Peer     string    `json:"peer,omitempty"` // its address then
	Last     time.Time `json:"last"`
	Waiting  int32     `json:"waiting"`
	Running  int32     `json:"running"`
	Requests int64     `json:"requests"`
	Answered int64     `json:"answered"`
	Refused  int64     `json:"refused"`
	Limited  int64     `json:"limited"`
	Shed     int64     `json:"shed"`
	Forged   int64     `json:"forged"`
}

// CertificateUse is the certificate in use.
type CertificateUse struct {
	Names    []string  `json:"names"`
	NotAfter time.Time `json:"not_after"`
	Problem  string    `json:"problem,omitempty"` // why it is not valid, will soon not be, or what the files hold now is not in use
}

// worstOrigins is how many origins a report names, worstGaps how many rooms.
const (
	worstOrigins = 20
	worstGaps    = 10
)

// report describes the present moment, with a snapshot of the core.
func (s *edgeShell) report(snap *edge.Snapshot, server netx.EdgeStats) *EdgeReport {
	st := snap.Stats // its own, as some counts are ours
	denied := s.counts.denied.Load()
	st.Requests += denied
	st.Refused[edge.ForACL] += denied
	r := &EdgeReport{
		Homeserver:  HomeReport{Up: snap.Home.Up, Why: snap.Home.Why, Downs: snap.Home.Downs, Down: seconds(snap.Home.Down)},
		Connections: server.Open, Evicted: server.Evicted, Crowding: server.Crowding, Slow: server.Slow, Dropped: server.Dropped, OverAddress: server.OverAddr, Wasteful: server.Wasteful, Handshake: server.Handshake, HTTP2: server.HTTP2, Listener: server.Refused,
		Requests: st.Requests, KeyFetches: st.Fetches, KeysDenied: st.FetchesDenied, EphemeralPS: snap.EphemeralRate, Held: st.Held,
		Answered: []CountReport{
			{"replied", st.Replied}, {"replayed", st.Replayed}, {"from_pdus", st.FromPDUs}, {"empty", st.Empties}, {"gone", st.Gone},
		},
		Signatures: []CountReport{{"good", st.Verified}, {"forged", st.Forged}, {"no_key", st.NoKey}, {"key_lacked", st.KeyLacked}},
		Ways: []CountReport{
			{"own_answer", s.counts.own.Load()}, {"unknown_path", s.counts.unknown.Load()}, {"malformed", s.counts.malformed.Load()},
			{"client", s.counts.clients.Load()}, {"no_room_for_details", s.counts.busy.Load()}, {"passed_unverified", st.Passed},
			{"key_wait_denied", st.ParkedDenied}, {"displaced", st.Displaced}, {"evicted", st.Evicted}, {"limited", st.Limited},
			{"joined", st.Joined}, {"differing", st.Differing}, {"shared", st.Shared},
			{"held_longest", st.HeldLongest}, {"aged", st.Aged}, {"origin_forgotten", st.Forgotten},
		},
		Attempts: []CountReport{{"begun", st.Forwarded}, {"again", st.Again}, {"stalled", st.Stalled}, {"broken_off", st.BrokenOff}},
		Record:   []CountReport{{"acknowledged", st.Acknowledged}, {"recorded", st.Recorded}, {"unrecorded", st.Unrecorded}},
		Replies: []CountReport{
			{"cut", s.counts.replies.cut.Load()}, {"slow", s.counts.replies.slow.Load()}, {"gone", s.counts.replies.gone.Load()}, {"unread", s.unread.cuts.Load()},
		},
		Endpoints: s.endpoints.report(),
	}
	for why, n := range st.Refused {
		r.Refused = append(r.Refused, CountReport{edge.Refusal(why).String(), n})
	}
	for why, n := range st.Shed {
		r.Shed = append(r.Shed, CountReport{edge.Shed(why).String(), n})
	}
	for i := range snap.Bands {
		b, w := &snap.Bands[i], &st.Waits[i]
		br := BandReport{Band: b.Band.String(), Begun: w.Count, Waiting: b.Waiting, Running: b.Running, OldestSeconds: seconds(b.Oldest), MaxWait: seconds(w.Max)}
		if w.Count > 0 {
			br.MeanWait = seconds(w.Total / time.Duration(w.Count))
		}
		r.Bands = append(r.Bands, br)
	}
	for _, l := range snap.Home.Lanes {
		r.Homeserver.Lanes = append(r.Homeserver.Lanes, LaneReport{
			l.Name, int64(l.Slots.Used), int64(l.Slots.Limit), l.Most, seconds(l.P50), seconds(l.P90), l.Grown, l.Halved, l.Abandoned,
		})
	}
	for i := range snap.Worst {
		o := &snap.Worst[i]
		r.Worst = append(r.Worst, OriginReport{
			string(o.Name), o.Peer, o.Last.Std().UTC(), o.Waiting, o.Running, o.Requests, o.Answered, o.Refused, o.Limited, o.Shed, o.Forged,
		})
	}
	r.Gaps, r.GapRooms = s.gaps.report(worstGaps)
	if s.certs != nil {
		i := s.certs.Info()
		r.Certificate = &CertificateUse{i.Names, i.NotAfter, certificateWarning(i, time.Now())}
	}
	return r
}

// budgets lists what the edge may use of what is bounded.
func (s *edgeShell) budgets(cfg *Config, snap *edge.Snapshot, server netx.EdgeStats) []BudgetUse {
	e, spool := &cfg.Edge, s.spool.Stats()
	gauge := func(name string, g sched.Gauge) BudgetUse {
		return BudgetUse{name, "count", int64(g.Used), int64(g.Max), int64(g.Limit)}
	}
	return []BudgetUse{
		{"connections from servers", "count", int64(server.Open), int64(server.MaxOpen), int64(e.MaxConnections)},
		gauge("requests of servers", snap.Requests),
		{"bodies of servers' requests", "bytes", snap.Bytes, snap.BytesMax, snap.BytesLimit},
		gauge("requests being verified", snap.Unverified),
		gauge("requests that wait for keys", snap.Parked),
		gauge("keys fetched in a minute", snap.FetchesMinute),
		{"servers' bodies in memory", "bytes", spool.Memory, spool.MaxMemory, int64(e.SpoolMemory)},
		{"servers' bodies on disk", "bytes", spool.Disk, spool.MaxDisk, cfg.edgeDisk()},
		{"origins remembered", "count", int64(snap.Origins), -1, int64(snap.OriginsLimit)},
		gauge("answers being recorded", snap.Recording),
	}
}

// name says who an origin is.
func (o *OriginReport) name() string {
	if o.Name == "" {
		return "unsigned, from " + o.Peer
	}
	return o.Name
}

// health says what is wrong with the edge, "" if nothing is. That the homeserver is
// away is not its fault.
func (s *edgeShell) health() string {
	if s == nil || s.certs == nil {
		return ""
	}
	switch i := s.certs.Info(); {
	case i.NotAfter.IsZero():
		return "the edge has no certificate, so no server can connect: " + i.Problem
	case !time.Now().Before(i.NotAfter):
		return "the edge's certificate has expired"
	}
	return ""
}

// fates lists what became of requests so far, in words.
func (r *EdgeReport) fates() (all []CountReport) {
	for _, list := range []struct {
		name   string
		counts []CountReport
	}{
		{"", r.Answered}, {"refused: ", r.Refused}, {"signature ", r.Signatures}, {"presence dropped: ", r.Shed}, {"", r.Ways},
		{"attempts at the homeserver: ", r.Attempts}, {"transactions ", r.Record}, {"answers not written whole: ", r.Replies},
	} {
		for _, c := range list.counts {
			if c.Count > 0 {
				all = append(all, CountReport{list.name + c.Name, c.Count})
			}
		}
	}
	return all
}

func (p page) edge(r *EdgeReport) {
	if r == nil {
		return
	}
	title := fmt.Sprintf("From other servers: %d requests, %d connections", r.Requests, r.Connections)
	if !r.Homeserver.Up {
		title += "; the homeserver does not answer: " + r.Homeserver.Why
	}
	p.table(title, "band", "begun", "waiting", "running", "oldest", "mean wait", "longest")
	for _, b := range r.Bands {
		p.row(b.Band, b.Begun, b.Waiting, b.Running, secs(b.OldestSeconds), secs(b.MeanWait), secs(b.MaxWait))
	}
	p.end()
	p.table("At the homeserver", "", "running", "allowed", "at most", "p50", "p90", "slowed down")
	for _, l := range r.Homeserver.Lanes {
		p.row(l.Name, l.Running, l.Allowed, l.Most, secs(l.P50), secs(l.P90), l.Halved)
	}
	p.end()
	p.table("What became of them", "", "so far")
	for _, c := range r.fates() {
		p.row(c.Name, c.Count)
	}
	p.row("keys fetched", r.KeyFetches)
	if r.KeysDenied > 0 {
		p.row("keys not fetched, too many were", r.KeysDenied)
	}
	p.end()
	if len(r.Worst) > 0 {
		p.table("Origins that cost most", "origin", "requests", "waiting", "refused", "limited", "shed", "forged")
		for i := range r.Worst {
			o := &r.Worst[i]
			p.row(o.name(), o.Requests, o.Waiting, o.Refused, o.Limited, o.Shed, o.Forged)
		}
		p.end()
	}
	if len(r.GapRooms) > 0 {
		p.table(fmt.Sprintf("Events after others that have not come by: %d", r.Gaps), "room", "events", "last from", "at")
		for _, g := range r.GapRooms {
			p.row(g.Room, g.Events, g.Origin, g.Last.UTC().Format(time.DateTime))
		}
		p.end()
	}
	if c := r.Certificate; c != nil {
		p.WriteString(`<p class="dim">`)
		if !c.NotAfter.IsZero() {
			p.f(`Certificate for %s, valid until %s.`, esc(fmt.Sprint(c.Names)), c.NotAfter.UTC().Format(time.DateTime))
		}
		if c.Problem != "" {
			p.f(` <span class="no">%s</span>`, esc(c.Problem))
		}
		p.WriteString("</p>\n")
	}
}

// table writes the report for a terminal.
func (r *EdgeReport) table(w io.Writer) {
	if r == nil {
		return
	}
	say(w, "\nFROM OTHER SERVERS\tBEGUN\tWAITING\tRUNNING\tOLDEST\tMEAN WAIT\tLONGEST\n")
	for _, b := range r.Bands {
		say(w, "%s\t%d\t%d\t%d\t%s\t%s\t%s\n", b.Band, b.Begun, b.Waiting, b.Running, secs(b.OldestSeconds), secs(b.MeanWait), secs(b.MaxWait))
	}
	say(w, "\nAT THE HOMESERVER\tRUNNING\tALLOWED\tAT MOST\tP50\tP90\n")
	for _, l := range r.Homeserver.Lanes {
		say(w, "%s\t%d\t%d\t%d\t%s\t%s\n", l.Name, l.Running, l.Allowed, l.Most, secs(l.P50), secs(l.P90))
	}
	if !r.Homeserver.Up {
		say(w, "does not answer\t%s\n", r.Homeserver.Why)
	}
	say(w, "\nTHEIR REQUESTS\tSO FAR\n")
	for _, c := range r.fates() {
		say(w, "%s\t%d\n", c.Name, c.Count)
	}
	say(w, "keys fetched\t%d\n", r.KeyFetches)
	if len(r.Worst) > 0 {
		say(w, "\nORIGINS THAT COST MOST\tREQUESTS\tWAITING\tREFUSED\tLIMITED\tSHED\tFORGED\n")
		for i := range r.Worst {
			o := &r.Worst[i]
			say(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\n", o.name(), o.Requests, o.Waiting, o.Refused, o.Limited, o.Shed, o.Forged)
		}
	}
	for _, g := range r.GapRooms {
		say(w, "\nEVENTS MISSING BEFORE OTHERS\t%s\t%d, last from %s\n", g.Room, g.Events, g.Origin)
	}
}

func (e exposition) edge(r *EdgeReport) {
	if r == nil {
		return
	}
	up := 0.0
	if r.Homeserver.Up {
		up = 1
	}
	e.one("fsbus_edge_homeserver_up", "gauge", "1 if the homeserver's federation listener answers.", up)
	e.one("fsbus_edge_requests_total", "counter", "Requests of other servers.", float64(r.Requests))
	e.one("fsbus_edge_connections", "gauge", "Connections of other servers.", float64(r.Connections))
	e.one("fsbus_edge_connections_evicted_total", "counter", "Idle connections closed to make room.", float64(r.Evicted))
	e.one("fsbus_edge_connections_crowding_total", "counter", "Connections that brought no request, or whose request was refused, closed to make room.", float64(r.Crowding))
	e.one("fsbus_edge_connections_slow_total", "counter", "Bodies and answers broken off for others that waited, as they were the slowest.", float64(r.Slow))
	e.one("fsbus_edge_connections_over_address_total", "counter", "Connections closed since their address had too many.", float64(r.OverAddress))
	e.one("fsbus_edge_connections_wasteful_total", "counter", "Connections closed at once, of addresses that had wasted many.", float64(r.Wasteful))
	e.one("fsbus_edge_requests_dropped_total", "counter", "Requests beyond all bounds, ended without an answer.", float64(r.Dropped))
	e.one("fsbus_edge_key_fetches_total", "counter", "Keys asked for to check signatures.", float64(r.KeyFetches))
	e.one("fsbus_edge_key_fetches_denied_total", "counter", "Keys not asked for, as too many were.", float64(r.KeysDenied))
	e.one("fsbus_edge_gaps_total", "counter", "Events that name others before them which have not come by.", float64(r.Gaps))
	e.one("fsbus_edge_ephemeral_rate", "gauge", "Transactions of presence and typing that the homeserver is given in a second.", r.EphemeralPS)
	if c := r.Certificate; c != nil {
		e.one("fsbus_edge_certificate_not_after_seconds", "gauge", "When the certificate in use ends, in seconds since the epoch; 0 if there is none.", float64(max(0, c.NotAfter.Unix())))
	}
	for _, f := range []struct {
		name, label, help string
		counts            []CountReport
	}{
		{"fsbus_edge_answered_total", "how", "Requests that were answered, by how.", r.Answered},
		{"fsbus_edge_refused_total", "reason", "Requests that were refused, by reason.", r.Refused},
		{"fsbus_edge_signatures_total", "verdict", "Signatures that were checked.", r.Signatures},
		{"fsbus_edge_shed_total", "why", "Transactions of presence and typing that were dropped.", r.Shed},
		{"fsbus_edge_ways_total", "way", "Ways that requests took besides going to the homeserver and back.", r.Ways},
		{"fsbus_edge_attempts_total", "what", "Attempts at the homeserver.", r.Attempts},
		{"fsbus_edge_record_total", "what", "Transactions that the homeserver acknowledged, and what was recorded of them.", r.Record},
		{"fsbus_edge_replies_cut_total", "why", "Answers that were not written whole.", r.Replies},
		{"fsbus_edge_endpoint_requests_total", "endpoint", "Requests of other servers by endpoint.", r.Endpoints},
	} {
		e.counts(f.name, f.help, f.label, f.counts)
	}
	for _, f := range []struct {
		name, kind, help string
		of               func(*BandReport) float64
	}{
		{"fsbus_edge_begun_total", "counter", "Calls that the homeserver was given, by band.", func(b *BandReport) float64 { return float64(b.Begun) }},
		{"fsbus_edge_waiting", "gauge", "Calls that wait for their turn.", func(b *BandReport) float64 { return float64(b.Waiting) }},
		{"fsbus_edge_oldest_wait_seconds", "gauge", "How long the first waiting call of a band has waited.", func(b *BandReport) float64 { return b.OldestSeconds }},
	} {
		e.family(f.name, f.kind, f.help)
		for i := range r.Bands {
			e.sample(f.name, f.of(&r.Bands[i]), "band", r.Bands[i].Band)
		}
	}
	e.family("fsbus_edge_window", "gauge", "How many calls the homeserver is given at a time, at present.")
	for _, l := range r.Homeserver.Lanes {
		e.sample("fsbus_edge_window", float64(l.Allowed), "lane", l.Name)
	}
	e.family("fsbus_edge_answer_seconds", "gauge", "Answer times of the homeserver, of the latest calls.")
	for _, l := range r.Homeserver.Lanes {
		e.sample("fsbus_edge_answer_seconds", l.P50, "lane", l.Name, "quantile", "0.5")
		e.sample("fsbus_edge_answer_seconds", l.P90, "lane", l.Name, "quantile", "0.9")
	}
}

package node

import (
	"context"
	"runtime"
	"time"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
	"fsbus/store"
)

// Report is what the status page, /status and the metrics show: one moment of
// a running bus. Sizes are bytes, times are seconds unless the name says
// otherwise.
type Report struct {
	Version       string           `json:"version"`
	ServerName    string           `json:"server_name"`
	Health        string           `json:"health"` // "ok", or what is wrong
	Started       time.Time        `json:"started"`
	UptimeSeconds int64            `json:"uptime_seconds"`
	Homeserver    HomeserverReport `json:"homeserver"`
	Budgets       []BudgetUse      `json:"budgets"`
	Queues        []QueueReport    `json:"queues"`
	Hosts         HostsReport      `json:"hosts"`
	Requests      RequestsReport   `json:"requests"`
	Remotes       RemotesReport    `json:"remotes"`
	Caches        []CacheReport    `json:"caches"`
	Keys          KeysReport       `json:"keys"`
	Joins         JoinsReport      `json:"joins"`
	Store         StoreReport      `json:"store"`
	Outbox        *OutboxReport    `json:"outbox,omitempty"`   // none without signing_key_path
	Handover      *HandoverReport  `json:"handover,omitempty"` // none without signing_key_path
	Edge          *EdgeReport      `json:"edge,omitempty"`     // none without edge.listen
	Endpoints     []CountReport    `json:"endpoints"`          // requests so far, by endpoint
	RateLimits    RateLimits       `json:"rate_limits"`
}

// BudgetUse is one thing of which only so much may exist.
type BudgetUse struct {
	Name    string `json:"name"`
	Unit    string `json:"unit"` // "bytes" or "count"
	Used    int64  `json:"used"`
	Max     int64  `json:"max"` // the most so far, -1 if not known
	Allowed int64  `json:"allowed"`
}

// QueueReport is one priority class.
type QueueReport struct {
	Class         string  `json:"class"`
	Requests      int64   `json:"requests"` // so far
	Waiting       int64   `json:"waiting"`
	Running       int64   `json:"running"`
	OldestSeconds float64 `json:"oldest_seconds"`
	MeanWait      float64 `json:"mean_wait_seconds"` // for a worker, so far
	MaxWait       float64 `json:"max_wait_seconds"`
}

// HostsReport is the destinations by rank, and those that are worst off.
type HostsReport struct {
	Known      int          `json:"known"`
	Allowed    int          `json:"allowed"`
	Forgotten  int64        `json:"forgotten"`       // to make room, so far
	Revived    int64        `json:"revived"`         // tried early, as something came from them
	Spent      int64        `json:"tried_for_users"` // tried early, as a user wrote to them or asked for keys
	Ranks      []RankReport `json:"ranks"`
	BackingOff int          `json:"backing_off"`
	Worst      []HostReport `json:"worst"`
}

// RankReport is one rank of hosts: proven, unknown or failing.
type RankReport struct {
	Rank           string `json:"rank"`
	Hosts          int    `json:"hosts"`
	Workers        int64  `json:"workers"`
	WorkersMax     int64  `json:"workers_max"`
	WorkersAllowed int64  `json:"workers_allowed"`
}

// HostReport is one destination.
type HostReport struct {
	Name        string     `json:"name"`
	Rank        string     `json:"rank"`
	Waiting     int32      `json:"waiting"`
	Running     int32      `json:"running"`
	Failures    int32      `json:"failures"` // in a row
	LastError   string     `json:"last_error,omitempty"`
	FailingFor  float64    `json:"failing_seconds,omitempty"`
	NextTryIn   float64    `json:"next_try_in_seconds,omitempty"`
	LastSuccess *time.Time `json:"last_success,omitempty"`
}

// RequestsReport counts what became of the homeserver's requests.
type RequestsReport struct {
	Answered    int64          `json:"answered"` // with what a remote said
	Shared      int64          `json:"shared"`   // with a call under way
	CacheHits   int64          `json:"cache_hits"`
	CacheStale  int64          `json:"cache_stale"`    // an old answer, since the host failed
	Refused     int64          `json:"refused_before"` // as the remote did a moment ago
	FailedFast  int64          `json:"failed_fast"`    // the host is backing off
	Expired     int64          `json:"expired"`        // the caller's time-out was near
	Gone        int64          `json:"gone"`           // given up by the homeserver
	Aged        int64          `json:"aged"`           // let through early for having waited long
	Refused4xx  int64          `json:"refused_4xx"`
	Refused5xx  int64          `json:"refused_5xx"`
	RepliesCut  int64          `json:"replies_cut"`
	RepliesSlow int64          `json:"replies_slow"`
	RepliesGone int64          `json:"replies_gone"`
	Front       map[int]uint64 `json:"front_refused"` // by status
	FrontCut    uint64         `json:"front_cut"`
}

// RemotesReport counts what happened at the remotes.
type RemotesReport struct {
	Attempts   int64         `json:"attempts"`
	Connects   int64         `json:"connects"`
	Limited    int64         `json:"rate_limited"`
	BytesIn    int64         `json:"bytes_in"`
	Statuses   []CountReport `json:"statuses"`
	Failures   []CountReport `json:"failures"`
	Handshakes int64         `json:"handshakes"`
	Resumed    int64         `json:"handshakes_resumed"`
}

// CountReport is a named count.
type CountReport struct {
	Name  string `json:"name"`
	Count int64  `json:"count"`
}

// CacheReport is one cache.
type CacheReport struct {
	Name    string `json:"name"`
	Entries int64  `json:"entries"`
	Hits    int64  `json:"hits"`   // look-ups that it answered, -1 if not counted by itself
	Misses  int64  `json:"misses"` // those that went further, the same
}

// StoreReport is the database.
type StoreReport struct {
	Commits           int64   `json:"commits"`
	Batches           int64   `json:"batches"`           // in them
	Accepting         int64   `json:"commits_accepting"` // with transactions of the homeserver
	Rows              int64   `json:"rows"`
	Failed            int64   `json:"failed"`
	LastCommitSeconds float64 `json:"last_commit_seconds"`
	MaxCommitSeconds  float64 `json:"max_commit_seconds"`
	FileBytes         int64   `json:"file_bytes"`
	WALBytes          int64   `json:"wal_bytes"`
	Queue             int     `json:"queue"`
}

// RateLimits are the rates that the configuration allows.
type RateLimits struct {
	HandshakesPerSecond float64 `json:"handshakes_per_second"`
	HostRate            float64 `json:"host_rate"`
	HostConcurrency     int     `json:"host_concurrency"`
}

// worstHosts is how many destinations a report names.
const worstHosts = 20

// Report describes the present moment. It fails when the loop does not answer
// before ctx ends, which is itself a finding.
func (n *Node) Report(ctx context.Context) (*Report, error) {
	var snap bus.Snapshot
	var outbox bus.OutboxSnapshot
	var inbound edge.Snapshot
	if err := n.loop.Call(ctx, func() {
		now := n.clock.Now()
		snap = n.core.Snapshot(now, worstHosts)
		outbox, _ = n.core.Outbox(now)
		if n.edge != nil {
			inbound = n.edge.core.Snapshot(now, worstOrigins)
		}
	}); err != nil {
		return nil, err
	}
	cfg, st := n.cfg.Load(), &snap.Stats
	front, spool, client, db := n.front.Stats(), n.spool.Stats(), n.client.Stats(), n.store.Stats()
	r := &Report{
		Version: n.version, ServerName: string(cfg.Homeserver.ServerName), Health: n.health(),
		Started: n.started, UptimeSeconds: int64(time.Since(n.started).Seconds()),
		Homeserver: homeserverReport(&front, time.Now()),
		Budgets:    n.budgets(cfg, &snap, &outbox, front, spool, client, db),
		Hosts:      hostsReport(&snap),
		Store:      storeReport(db),
		Outbox:     n.outboxReport(&outbox, db.Outbox.Aside),
		Handover:   n.handover.report(time.Now()),
		Caches: []CacheReport{
			{"answers in memory", int64(snap.Cache.Entries), st.CacheHits + st.CacheStale, st.Attempts},
			{"answers in the database", int64(snap.Known), st.Loads, st.Attempts},
			{"whole answers to joins", int64(snap.Whole.Entries), -1, -1},
			{"media", int64(snap.Media.Entries), -1, -1},
			{"server keys", db.Keys.Rows, st.KeysKnown, st.KeysAsked},
			{"well-known", int64(client.WellKnownEntries), client.WellKnownHits, client.WellKnownFetches},
			{"dns", int64(client.DNS.Entries), client.DNS.Hits, client.DNS.Lookups},
		},
		Keys: n.keysReport(&snap, db), Joins: n.joinsReport(&snap),
		RateLimits: RateLimits{cfg.Outbound.HandshakesPerSecond, cfg.Outbound.HostRate, cfg.Outbound.HostConcurrency},
	}
	if n.edge != nil {
		server := n.edge.server.Stats()
		r.Edge = n.edge.report(&inbound, server)
		r.Budgets = append(r.Budgets, n.edge.budgets(cfg, &inbound, server)...)
		r.Budgets = append(r.Budgets, BudgetUse{"answered transactions remembered", "count", db.Inbound.Rows, -1, int64(cfg.Edge.RecordEntries)},
			BudgetUse{"record of answered transactions", "bytes", db.Inbound.Bytes, -1, int64(cfg.Edge.RecordDisk)})
	}
	for c := matrix.Class(1); c <= matrix.NumClasses; c++ {
		q := QueueReport{Class: c.String(), Requests: st.Requests[c], Waiting: snap.Waiting[c], Running: snap.Running[c], OldestSeconds: seconds(snap.Oldest[c]), MaxWait: seconds(st.Waits[c].Max)}
		if k := st.Waits[c].Count; k > 0 {
			q.MeanWait = seconds(st.Waits[c].Total / time.Duration(k))
		}
		r.Queues = append(r.Queues, q)
	}
	r.Requests = RequestsReport{
		Answered: st.Answered, Shared: st.Shared, CacheHits: st.CacheHits, CacheStale: st.CacheStale, Refused: st.RefusedBefore, FailedFast: st.FailedFast,
		Expired: st.Expired, Gone: st.Gone, Aged: st.Aged, Refused4xx: st.Refused[4], Refused5xx: st.Refused[5],
		RepliesCut: n.replies.cut.Load(), RepliesSlow: n.replies.slow.Load(), RepliesGone: n.replies.gone.Load(),
		Front: front.Refused, FrontCut: front.Cut,
	}
	r.Remotes = RemotesReport{Attempts: st.Attempts, Connects: st.Connects, Limited: st.Limited, BytesIn: st.BytesIn, Handshakes: client.Handshakes, Resumed: client.Resumed}
	for d, name := range []string{"invalid", "1xx", "2xx", "3xx", "4xx", "5xx"} {
		r.Remotes.Statuses = append(r.Remotes.Statuses, CountReport{name, st.Statuses[d]})
	}
	for f := range matrix.NumFailures {
		r.Remotes.Failures = append(r.Remotes.Failures, CountReport{f.String(), st.Failures[f]})
	}
	r.Endpoints = n.endpoints.report()
	return r, nil
}

func (n *Node) budgets(cfg *Config, snap *bus.Snapshot, outbox *bus.OutboxSnapshot, front netx.FrontStats, spool netx.SpoolStats, client netx.ClientStats, db store.Stats) []BudgetUse {
	b := cfg.Budget()
	rss, rssMax := residentBytes()
	use := []BudgetUse{
		{"memory (resident)", "bytes", rss, rssMax, int64(cfg.MemoryLimit)},
		{"goroutines", "count", int64(runtime.NumGoroutine()), -1, int64(b.Goroutines)},
		{"connections from the homeserver", "count", int64(front.Open), int64(front.MaxOpen), int64(cfg.Front.MaxConnections)},
		{"requests waiting or running", "count", int64(snap.Requests.Used), int64(snap.Requests.Max), int64(snap.Requests.Limit)},
		{"workers", "count", int64(snap.Workers.Used), int64(snap.Workers.Max), int64(snap.Workers.Limit)},
		{"connections to remotes", "count", client.Open, client.PeakOpen, int64(b.Connections)},
		{"bodies in memory", "bytes", spool.Memory, spool.MaxMemory, int64(cfg.Outbound.SpoolMemory)},
		{"bodies on disk", "bytes", spool.Disk, spool.MaxDisk, int64(cfg.Outbound.SpoolDisk)},
		{"cached answers", "bytes", snap.Cache.Bytes, -1, snap.Cache.Limit},
		{"cached answers in the database", "bytes", db.Answers.Bytes, -1, int64(cfg.Outbound.CacheDisk)},
		{"whole answers to joins", "bytes", snap.Whole.Bytes, -1, snap.Whole.Limit},
		{"media", "bytes", snap.Media.Bytes, -1, snap.Media.Limit},
		{"server keys in the database", "bytes", db.Keys.Bytes, -1, int64(cfg.Keys.CacheDisk)},
		{"server keys looked for", "count", int64(snap.KeysWanted.Used), int64(snap.KeysWanted.Max), int64(snap.KeysWanted.Limit)},
		{"file descriptors", "count", openFiles(), -1, int64(b.FileDescriptors)},
	}
	if o := &cfg.Outbox; n.takeover != nil {
		use = append(use,
			BudgetUse{"destinations with something pending", "count", int64(outbox.Queues), -1, int64(o.MaxDestinations)},
			BudgetUse{"pending items", "count", db.Outbox.Items, -1, int64(o.MaxItems)},
			BudgetUse{"database", "bytes", db.FileBytes, -1, int64(o.MaxDisk)},
			BudgetUse{"acknowledgements held", "count", int64(outbox.Pace.Held), -1, int64(outbox.Pace.MaxHeld)},
			BudgetUse{"rooms and servers known", "bytes", int64(outbox.Pace.Bytes), -1, int64(outbox.Pace.MaxBytes)},
		)
	}
	return use
}

func hostsReport(s *bus.Snapshot) HostsReport {
	h := HostsReport{Known: s.Hosts, Allowed: s.HostsLimit, Forgotten: s.Stats.HostsForgotten, Revived: s.Stats.Revived, Spent: s.Stats.Spent, BackingOff: s.BackingOff, Worst: []HostReport{}}
	for _, l := range s.Lanes {
		h.Ranks = append(h.Ranks, RankReport{l.Name, l.Hosts, int64(l.Slots.Used), int64(l.Slots.Max), int64(l.Slots.Limit)})
	}
	for i := range s.Worst {
		h.Worst = append(h.Worst, newHostReport(s.At, &s.Worst[i]))
	}
	return h
}

func newHostReport(now sched.Time, w *bus.HostStatus) HostReport {
	r := HostReport{Name: string(w.Name), Rank: w.Rank, Waiting: w.Waiting, Running: w.Running, Failures: w.Failures, LastError: w.Why}
	if w.FirstFailure != 0 {
		r.FailingFor = seconds(now.Sub(w.FirstFailure))
	}
	if next := max(w.NextTry, w.Paused); next > now {
		r.NextTryIn = seconds(next.Sub(now))
	}
	if w.LastSuccess != 0 {
		t := w.LastSuccess.Std().UTC()
		r.LastSuccess = &t
	}
	return r
}

func storeReport(s store.Stats) StoreReport {
	return StoreReport{
		Commits: s.Commits, Batches: s.Batches, Accepting: s.Accepting, Rows: s.Rows, Failed: s.Failed, LastCommitSeconds: seconds(s.LastCommit), MaxCommitSeconds: seconds(s.MaxCommit),
		FileBytes: s.FileBytes, WALBytes: s.WALBytes, Queue: s.QueueLen,
	}
}

func seconds(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }

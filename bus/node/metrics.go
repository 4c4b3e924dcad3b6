package node

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// exposition writes the Prometheus text format, version 0.0.4. All figures
// come from one Report, so there is no registry to keep: a family is declared,
// then its samples are written.
type exposition struct{ *bufio.Writer }

func (e exposition) family(name, kind, help string) {
	fmt.Fprintf(e, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one line; labels are name, value, name, value.
func (e exposition) sample(name string, v float64, labels ...string) {
	e.WriteString(name)
	for i := 0; i+1 < len(labels); i += 2 {
		e.WriteByte("{,"[min(i, 1)])
		e.WriteString(labels[i] + `="` + labelEscaper.Replace(labels[i+1]) + `"`)
	}
	if len(labels) > 0 {
		e.WriteByte('}')
	}
	e.WriteByte(' ')
	e.WriteString(strconv.FormatFloat(v, 'g', -1, 64))
	e.WriteByte('\n')
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func (e exposition) one(name, kind, help string, v float64) {
	e.family(name, kind, help)
	e.sample(name, v)
}

// counts writes a family of counters that differ in one label.
func (e exposition) counts(name, help, label string, list []CountReport) {
	e.family(name, "counter", help)
	for _, c := range list {
		e.sample(name, float64(c.Count), label, c.Name)
	}
}

func writeMetrics(w io.Writer, r *Report) error {
	e := exposition{bufio.NewWriter(w)}
	e.family("fsbus_build_info", "gauge", "The running version; the value is always 1.")
	e.sample("fsbus_build_info", 1, "version", r.Version)
	healthy := 0.0
	if r.Health == "ok" {
		healthy = 1
	}
	e.one("fsbus_healthy", "gauge", "1 if /health says ok.", healthy)
	e.one("fsbus_start_time_seconds", "gauge", "When the process started, in seconds since the epoch.", float64(r.Started.Unix()))

	seen := 0.0
	if r.Homeserver.LastSeen != nil {
		seen = float64(r.Homeserver.LastSeen.Unix())
	}
	e.one("fsbus_homeserver_last_seen_seconds", "gauge", "When the last request with the right secret came, in seconds since the epoch; 0 if none has.", seen)
	e.one("fsbus_wrong_secret_total", "counter", "Requests without the right secret, answered 407.", float64(r.Homeserver.WrongSecret))

	e.family("fsbus_budget_used", "gauge", "What is in use of each bounded resource.")
	for _, b := range r.Budgets {
		e.sample("fsbus_budget_used", float64(b.Used), "resource", b.Name, "unit", b.Unit)
	}
	e.family("fsbus_budget_allowed", "gauge", "How much of each bounded resource may be in use.")
	for _, b := range r.Budgets {
		e.sample("fsbus_budget_allowed", float64(b.Allowed), "resource", b.Name, "unit", b.Unit)
	}

	e.family("fsbus_requests_total", "counter", "Requests of the homeserver by priority class.")
	for _, q := range r.Queues {
		e.sample("fsbus_requests_total", float64(q.Requests), "class", q.Class)
	}
	e.family("fsbus_requests_waiting", "gauge", "Calls that wait for a worker.")
	for _, q := range r.Queues {
		e.sample("fsbus_requests_waiting", float64(q.Waiting), "class", q.Class)
	}
	e.family("fsbus_requests_running", "gauge", "Calls that hold a worker.")
	for _, q := range r.Queues {
		e.sample("fsbus_requests_running", float64(q.Running), "class", q.Class)
	}
	e.family("fsbus_oldest_wait_seconds", "gauge", "How long the first waiting call of a class has waited.")
	for _, q := range r.Queues {
		e.sample("fsbus_oldest_wait_seconds", q.OldestSeconds, "class", q.Class)
	}
	e.counts("fsbus_endpoint_requests_total", "Requests of the homeserver by endpoint.", "endpoint", r.Endpoints)
	e.counts("fsbus_outcomes_total", "What became of the homeserver's requests.", "outcome", r.Requests.counts())

	e.one("fsbus_attempts_total", "counter", "Requests sent to remotes.", float64(r.Remotes.Attempts))
	e.one("fsbus_connects_total", "counter", "New connections to remotes.", float64(r.Remotes.Connects))
	e.one("fsbus_handshakes_total", "counter", "TLS handshakes with remotes.", float64(r.Remotes.Handshakes))
	e.one("fsbus_handshakes_resumed_total", "counter", "TLS handshakes that resumed a session.", float64(r.Remotes.Resumed))
	e.one("fsbus_rate_limited_total", "counter", "Answers with status 429.", float64(r.Remotes.Limited))
	e.one("fsbus_received_bytes_total", "counter", "Bytes of answers' bodies.", float64(r.Remotes.BytesIn))
	e.counts("fsbus_remote_answers_total", "Answers of remotes by status.", "status", r.Remotes.Statuses)
	e.counts("fsbus_attempt_ends_total", "How attempts ended.", "end", r.Remotes.Failures)

	e.family("fsbus_hosts", "gauge", "Known destinations by rank.")
	for _, k := range r.Hosts.Ranks {
		e.sample("fsbus_hosts", float64(k.Hosts), "rank", k.Rank)
	}
	e.family("fsbus_workers", "gauge", "Workers in use by rank of host.")
	for _, k := range r.Hosts.Ranks {
		e.sample("fsbus_workers", float64(k.Workers), "rank", k.Rank)
	}
	e.one("fsbus_hosts_tried_for_users_total", "counter", "Destinations tried early, as a user wrote to them or asked for keys.", float64(r.Hosts.Spent))
	e.one("fsbus_hosts_revived_total", "counter", "Destinations tried early, as something came from them.", float64(r.Hosts.Revived))
	e.one("fsbus_hosts_backing_off", "gauge", "Destinations that are left alone for now.", float64(r.Hosts.BackingOff))

	e.family("fsbus_cache_entries", "gauge", "Entries of each cache.")
	for _, c := range r.Caches {
		e.sample("fsbus_cache_entries", float64(c.Entries), "cache", c.Name)
	}
	e.family("fsbus_cache_hits_total", "counter", "Look-ups that a cache answered.")
	for _, c := range r.Caches {
		if c.Hits >= 0 {
			e.sample("fsbus_cache_hits_total", float64(c.Hits), "cache", c.Name)
		}
	}
	e.family("fsbus_cache_misses_total", "counter", "Look-ups that went further than a cache.")
	for _, c := range r.Caches {
		if c.Misses >= 0 {
			e.sample("fsbus_cache_misses_total", float64(c.Misses), "cache", c.Name)
		}
	}
	e.joins(&r.Joins, &r.Keys)

	e.outbox(r.Outbox)
	e.handover(r.Handover)

	e.edge(r.Edge)

	e.one("fsbus_store_commits_total", "counter", "Transactions made durable.", float64(r.Store.Commits))
	e.one("fsbus_store_commits_accepting_total", "counter", "Those with transactions of the homeserver.", float64(r.Store.Accepting))
	e.one("fsbus_store_batches_total", "counter", "Batches made durable; several share a transaction.", float64(r.Store.Batches))
	e.one("fsbus_store_rows_total", "counter", "Rows written or deleted.", float64(r.Store.Rows))
	e.one("fsbus_store_failed_total", "counter", "Batches that could not be written.", float64(r.Store.Failed))
	e.one("fsbus_store_commit_seconds", "gauge", "Duration of the last commit.", r.Store.LastCommitSeconds)
	e.one("fsbus_store_commit_seconds_max", "gauge", "Duration of the longest commit.", r.Store.MaxCommitSeconds)
	e.family("fsbus_store_bytes", "gauge", "Size of the database's files.")
	e.sample("fsbus_store_bytes", float64(r.Store.FileBytes), "file", "main")
	e.sample("fsbus_store_bytes", float64(r.Store.WALBytes), "file", "wal")
	return e.Flush()
}

// counts lists the outcomes in the order in which the page shows them.
func (r *RequestsReport) counts() []CountReport {
	return []CountReport{
		{"answered", r.Answered}, {"shared", r.Shared}, {"cache_hit", r.CacheHits}, {"cache_stale", r.CacheStale}, {"refused_before", r.Refused},
		{"failed_fast", r.FailedFast}, {"expired", r.Expired}, {"gone", r.Gone}, {"aged", r.Aged},
		{"refused_4xx", r.Refused4xx}, {"refused_5xx", r.Refused5xx},
		{"reply_cut", r.RepliesCut}, {"reply_slow", r.RepliesSlow}, {"reply_gone", r.RepliesGone},
	}
}

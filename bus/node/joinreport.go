package node

import (
	"fmt"
	"time"

	"fsbus/bus"
	"fsbus/sched"
	"fsbus/store"
)

// KeysReport is what was done for queries for server keys.
type KeysReport struct {
	Notary   string `json:"notary,omitempty"` // that was asked last
	Own      string `json:"own,omitempty"`    // under which the bus is one
	Queries  int64  `json:"queries"`          // of the homeserver
	Wanted   int64  `json:"wanted"`           // keys that are being looked for now
	Known    int64  `json:"known"`            // keys that were stored already
	Shared   int64  `json:"shared"`           // that were on their way already
	Requests int64  `json:"requests"`         // to notaries and servers
	Asked    int64  `json:"asked"`            // servers that they asked about
	Had      int64  `json:"had"`              // of which valid keys came
	Late     int64  `json:"late"`             // requests that nobody waited for any more
	Missing  int64  `json:"missing"`          // not asked for, since there was no answer a moment ago
	Skipped  int64  `json:"skipped"`          // not fetched ahead, since too many were on their way
	Refused  int64  `json:"refused"`          // objects that came and are not valid
	Stored   int64  `json:"stored"`           // servers whose keys are stored
}

// JoinsReport is the rooms that are being joined, or were, and what is done ahead
// for them.
type JoinsReport struct {
	Held          int64        `json:"held"`           // answers that waited until all of them was sure to come
	Scans         int64        `json:"scans"`          // answers that were looked through
	ScansSkipped  int64        `json:"scans_skipped"`  // too many at a time
	ScansGaveUp   int64        `json:"scans_gave_up"`  // they were not what they should be
	ScannedBytes  int64        `json:"scanned_bytes"`  //
	ScannedEvents int64        `json:"scanned_events"` //
	Connected     int64        `json:"connected"`      // servers that were connected to ahead
	Waiting       int64        `json:"waiting"`        // servers that are to be
	Joins         []JoinReport `json:"joins"`          // the latest first
}

// JoinReport is one join. Times are seconds since it began; -1 is one that has not
// come.
type JoinReport struct {
	Room       string    `json:"room"`
	Phase      string    `json:"phase"`
	Began      time.Time `json:"began"`
	Asks       int       `json:"make_joins"`
	Via        string    `json:"via,omitempty"`
	Sent       float64   `json:"sent_seconds"`
	Upstream   int       `json:"send_joins_upstream"`
	Again      int       `json:"send_joins_again"` // of the homeserver, which joined the one upstream
	Headers    float64   `json:"headers_seconds"`
	Status     int       `json:"status,omitempty"`
	Bytes      int64     `json:"bytes"`
	BytesTotal int64     `json:"bytes_total"` // -1: the server does not say
	Whole      float64   `json:"whole_seconds"`
	Passed     float64   `json:"passed_seconds"` // to the homeserver
	Failed     string    `json:"failed,omitempty"`
	KeysSeen   int       `json:"keys_seen"`
	KeysDone   int       `json:"keys_done"`
	Servers    int       `json:"servers"`
	Resync     float64   `json:"resync_seconds"`
	Resyncs    int       `json:"resync_requests"`
	ResyncSize int64     `json:"resync_bytes"`
	ResyncEnd  float64   `json:"resync_end_seconds"`
}

func (n *Node) keysReport(s *bus.Snapshot, db store.Stats) KeysReport {
	st := &s.Stats
	r := KeysReport{
		Notary: string(s.Notary), Queries: st.KeyQueries, Wanted: int64(s.KeysWanted.Used), Known: st.KeysKnown, Shared: st.KeysShared,
		Requests: st.KeyBatches, Asked: st.KeysAsked, Had: st.KeysHad, Late: st.KeysLate, Missing: st.KeysMissing, Skipped: st.KeysSkipped,
		Refused: n.keyCounts.refused.Load(), Stored: db.Keys.Rows,
	}
	if n.notary != nil {
		r.Own = string(n.notary.name)
	}
	return r
}

func (n *Node) joinsReport(s *bus.Snapshot) JoinsReport {
	r := JoinsReport{
		Held: s.Stats.Held, Scans: n.scanned.scans.Load(), ScansSkipped: n.scanned.skipped.Load(), ScansGaveUp: n.scanned.gaveUp.Load(),
		ScannedBytes: n.scanned.bytes.Load(), ScannedEvents: n.scanned.events.Load(),
		Connected: s.Stats.Aheads, Waiting: int64(s.AheadWaiting), Joins: []JoinReport{},
	}
	for i := range s.Joins {
		r.Joins = append(r.Joins, newJoinReport(&s.Joins[i]))
	}
	return r
}

func newJoinReport(j *bus.JoinStatus) JoinReport {
	after := func(t sched.Time) float64 {
		if t == 0 {
			return -1
		}
		return seconds(t.Sub(j.Asked))
	}
	return JoinReport{
		Room: j.Room, Phase: j.Phase.String(), Began: j.Asked.Std().UTC(), Asks: j.Asks, Via: string(j.Via),
		Sent: after(j.Sent), Upstream: j.Sends, Again: j.Again, Headers: after(j.Headers), Status: j.Status,
		Bytes: j.Size, BytesTotal: j.Total, Whole: after(j.Whole), Passed: after(j.Passed), Failed: j.Failed,
		KeysSeen: j.KeysSeen, KeysDone: j.KeysDone, Servers: j.Servers,
		Resync: after(j.Resync), Resyncs: j.Resyncs, ResyncSize: j.ResyncSize, ResyncEnd: after(j.ResyncEnd),
	}
}

// timeline lists what has happened in a join, in its order, each with its moment.
func (j *JoinReport) timeline() (steps []string) {
	step := func(at float64, format string, args ...any) {
		if at >= 0 {
			steps = append(steps, fmt.Sprintf("%s %s", secs(at), fmt.Sprintf(format, args...)))
		}
	}
	step(0, "make_join (%d)", j.Asks)
	again := ""
	if j.Again > 0 {
		again = fmt.Sprintf(", asked for again %d times", j.Again)
	}
	step(j.Sent, "send_join to %s (%d%s)", j.Via, j.Upstream, again)
	step(j.Headers, "it answers %d", j.Status)
	if j.Headers >= 0 && j.Whole < 0 {
		of := ""
		if j.BytesTotal > 0 {
			of = " of " + amount(j.BytesTotal, "bytes")
		}
		steps = append(steps, fmt.Sprintf("so far %s%s", amount(j.Bytes, "bytes"), of))
	}
	step(j.Whole, "all of it is here, %s", amount(j.Bytes, "bytes"))
	step(j.Passed, "the homeserver gets it")
	if j.KeysSeen > 0 {
		steps = append(steps, fmt.Sprintf("keys %d of %d", j.KeysDone, j.KeysSeen))
	}
	if j.Servers > 0 {
		steps = append(steps, fmt.Sprintf("%d servers", j.Servers))
	}
	step(j.Resync, "the rest of the state is asked for (%d)", j.Resyncs)
	step(j.ResyncEnd, "%s of it came", amount(j.ResyncSize, "bytes"))
	if j.Failed != "" {
		steps = append(steps, "failed: "+j.Failed)
	}
	return steps
}

// joins writes the joins and the keys to the page.
func (p page) joins(j *JoinsReport, k *KeysReport) {
	if len(j.Joins) > 0 {
		p.table("Joins", "room", "phase", "began")
		for i := range j.Joins {
			join := &j.Joins[i]
			p.WriteString(`<tr class="h">`)
			p.cells(join.Room, join.Phase, join.Began.Format(time.TimeOnly))
			p.WriteString(`<tr><td colspan="3" class="dim">`)
			for n, s := range join.timeline() {
				if n > 0 {
					p.WriteString(" · ")
				}
				p.WriteString(esc(s))
			}
			p.WriteString("</td>\n")
		}
		p.end()
	}
	p.table("Server keys", "", "so far")
	for _, c := range k.counts() {
		p.row(c.Name, c.Count)
	}
	p.end()
}

// counts lists the counts in the order in which the page shows them.
func (k *KeysReport) counts() []CountReport {
	return []CountReport{
		{"queries", k.Queries}, {"known", k.Known}, {"shared", k.Shared}, {"requests", k.Requests}, {"asked", k.Asked}, {"had", k.Had},
		{"late", k.Late}, {"missing", k.Missing}, {"skipped", k.Skipped}, {"refused", k.Refused},
	}
}

func (e exposition) joins(j *JoinsReport, k *KeysReport) {
	e.counts("fsbus_keys_total", "What was done for queries for server keys.", "what", k.counts())
	e.one("fsbus_keys_wanted", "gauge", "Server keys that are being looked for.", float64(k.Wanted))
	e.one("fsbus_keys_stored", "gauge", "Servers whose keys are stored.", float64(k.Stored))
	phases := []bus.JoinPhase{bus.JoinAsking, bus.JoinSending, bus.JoinSyncing}
	e.family("fsbus_joins", "gauge", "Rooms that are being joined, by how far that is.")
	for _, p := range phases {
		count := 0
		for i := range j.Joins {
			if j.Joins[i].Phase == p.String() {
				count++
			}
		}
		e.sample("fsbus_joins", float64(count), "phase", p.String())
	}
	e.one("fsbus_join_answers_held_total", "counter", "Answers to joins that were held until all of them was sure to come.", float64(j.Held))
	e.one("fsbus_scanned_bytes_total", "counter", "Bytes of rooms' answers that were looked through.", float64(j.ScannedBytes))
	e.one("fsbus_connected_ahead_total", "counter", "Servers that were connected to before anything was sent.", float64(j.Connected))
}

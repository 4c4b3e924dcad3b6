package edge

import (
	"cmp"
	"slices"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Refusal says why a request was answered with an error of the bus's own.
type Refusal uint8

// The reasons.
const (
	ForACL        Refusal = iota // its origin is denied
	ForAuth                      // no, or a bad signature
	ForContent                   // a transaction with too much in it
	ForRoom                      // something is full
	ForRate                      // its origin asks for too much
	ForTime                      // the sender's time-out is near
	ForHomeserver                // the homeserver is away, or does not answer
	ForDraining                  // the bus is being stopped
	NumRefusals   = 8
)

var refusalNames = [NumRefusals]string{"denied", "signature", "content", "full", "rate", "time", "homeserver", "stopping"}

// String returns the reason as metrics and the status page show it.
func (r Refusal) String() string {
	if r >= NumRefusals {
		return "invalid"
	}
	return refusalNames[r]
}

// Stats counts what the edge has done since it was made. Each request ends in one
// of Replied, Replayed, Empties, Refused and Gone.
type Stats struct {
	Requests int64
	Replied  int64              // with what the homeserver answered
	Replayed int64              // with what it answered before
	FromPDUs int64              // of them, because it had each of the PDUs before
	Empties  int64              // with an empty answer, as what they held was dropped
	Refused  [NumRefusals]int64 // with an error of the bus's own
	Gone     int64              // given up by the sender

	Verified      int64 // signatures that were good
	Forged        int64 // signatures that were not
	NoKey         int64 // signatures that could not be checked
	Passed        int64 // of them, passed on to the homeserver
	Fetches       int64 // of keys
	FetchesDenied int64
	ParkedDenied  int64 // of those that are not checked, as too many wait for fetches
	Displaced     int64 // unverified requests of an address that had most, refused for another's

	Joined       int64 // transactions that joined an equal one
	Differing    int64 // of them, with another content under the same id
	Shared       int64 // other requests that joined an equal one
	Limited      int64 // answers 429
	Evicted      int64 // calls that made room for more urgent ones, or for another origin's
	Shed         [NumSheds]int64
	Held         int64 // transactions that waited for a join
	HeldLongest  int64 // of them, until that was too long
	JoinsIgnored int64

	Forwarded    int64 // attempts at the homeserver
	Again        int64 // of them, put back to be tried again
	Stalled      int64 // of them, slower than counts
	BrokenOff    int64 // of them, to make room for others
	KeyLacked    int64 // requests signed with a key that their server does not have
	Statuses     [6]int64
	Failures     [matrix.NumFailures]int64
	Acknowledged int64 // transactions
	Recorded     int64 // answers that were stored
	Unrecorded   int64 // answers that were not, or not before they were given
	Aged         int64 // calls that rode on a better band's turn
	Forgotten    int64 // origins, to make room for others
	Waits        [NumBands]Wait
}

// Wait sums up how long calls waited for their turn.
type Wait struct {
	Count int64
	Total time.Duration
	Max   time.Duration
}

func (s *Stats) waited(b Band, d time.Duration) {
	w := &s.Waits[b]
	w.Count++
	w.Total += d
	w.Max = max(w.Max, d)
}

// OriginCounts is what one server has sent, since it was last forgotten.
type OriginCounts struct {
	Requests int64 // that were authentic
	Answered int64 // with what the homeserver answers or answered
	Refused  int64
	Limited  int64 // of them, with 429
	Shed     int64 // transactions
	Forged   int64 // requests in its name
}

// Snapshot is the state of the edge at one moment, for people and metrics.
type Snapshot struct {
	At              sched.Time
	Stats           Stats
	Requests        sched.Gauge // verified, or without a signature
	Bytes           int64
	BytesMax        int64
	BytesLimit      int64
	Unverified      sched.Gauge
	UnverifiedBytes int64
	Verifying       int32 // without fetching
	Fetching        int
	Parked          sched.Gauge // requests that wait for a fetch, or that it is for
	FetchesMinute   sched.Gauge // of keys, in the last minute
	Bands           [NumBands]BandStatus
	Home            HomeStatus
	Joins           int
	EphemeralRate   float64 // per second, at present
	Recording       sched.Gauge
	Origins         int
	OriginsLimit    int
	Worst           []OriginStatus
}

// BandStatus is one band.
type BandStatus struct {
	Band    Band
	Waiting int // held back ones included
	Running int
	Oldest  time.Duration // longest wait
}

// HomeStatus is our homeserver.
type HomeStatus struct {
	Up    bool
	Since sched.Time // 0: since the start
	Why   string     // why it is not up
	Downs int64      // how often it was not
	// Down is for how long in all, until it last came back.
	Down  time.Duration
	Lanes [numLanes]LaneStatus
}

// LaneStatus is what the homeserver is given of one sort.
type LaneStatus struct {
	Name      string
	Slots     sched.Gauge // the limit is the present one
	Most      int32       // that it may become
	Window    int32       // the limit, without what takes so long that it does not count
	Grown     int64
	Halved    int64
	P50, P90  time.Duration // of the latest answers
	SlowBy    int64         // their median when the window was last adjusted, in thousandths of the best
	Stalled   int32         // of what runs, too slow to count
	Abandoned int           // attempts for which nobody waits
}

// OriginStatus is one server, in words.
type OriginStatus struct {
	Name    matrix.ServerName // "": none, the requests have no signature
	Peer    string
	Last    sched.Time
	Waiting int32
	Running int32
	OriginCounts
}

// Snapshot returns the state, with at most worst origins: those that hold or cost
// most.
func (m *Machine) Snapshot(now sched.Time, worst int) Snapshot {
	m.oldFetches()
	s := Snapshot{
		At:              now,
		Stats:           m.stats,
		Requests:        sched.Gauge{Used: sched.Slots(m.held.n), Limit: sched.Slots(m.held.maxN), Max: sched.Slots(m.held.topN)},
		Bytes:           m.held.bytes,
		BytesMax:        m.held.bytop,
		BytesLimit:      m.held.maxBytes,
		Unverified:      sched.Gauge{Used: sched.Slots(m.unverified.n), Limit: sched.Slots(m.unverified.maxN), Max: sched.Slots(m.unverified.topN)},
		UnverifiedBytes: m.unverified.bytes,
		Verifying:       m.desk.running,
		Fetching:        len(m.desk.fetching),
		FetchesMinute:   sched.Gauge{Used: sched.Slots(m.desk.fetches.Len()), Limit: sched.Slots(m.cfg.KeyFetches), Max: sched.Slots(m.desk.topFetch)},
		Parked:          sched.Gauge{Used: sched.Slots(m.desk.parked), Limit: sched.Slots(m.mostParked()), Max: sched.Slots(m.desk.topPark)},
		Home:            HomeStatus{Up: !m.home.down, Since: m.home.since, Why: m.home.why, Downs: m.home.times, Down: m.home.total},
		Joins:           len(m.joins.rooms),
		EphemeralRate:   float64(m.pace.Limit()),
		Recording:       sched.Gauge{Used: sched.Slots(m.record.total()), Limit: maxRecording + sched.Slots(m.cfg.Concurrency), Max: sched.Slots(m.record.top)},
		Origins:         len(m.origins),
		OriginsLimit:    int(m.cfg.Origins),
	}
	if !m.home.down {
		s.Home.Why = ""
	}
	for b := range s.Bands {
		l := &m.line[b]
		st := BandStatus{Band: Band(b), Waiting: l.n, Running: int(m.lanes[bands[b].lane].running[b])}
		if l.first != nil {
			st.Oldest = now.Sub(l.first.arrived)
		}
		s.Bands[b] = st
	}
	for i := range m.lanes {
		l := &m.lanes[i]
		st := LaneStatus{Name: laneNames[i], Slots: l.slots, Most: l.window.most, Window: l.window.size, Grown: l.window.grown, Halved: l.window.halved, SlowBy: l.window.measured, Stalled: l.stalled}
		st.P50, st.P90 = l.window.quantiles()
		s.Home.Lanes[i] = st
	}
	for _, c := range m.ops { // only counted
		if len(c.waiters) == 0 && c.status == 0 {
			s.Home.Lanes[bands[c.band].lane].Abandoned++
		}
	}
	all := make([]*origin, 0, len(m.origins))
	for _, o := range m.origins { // sorted below
		if o.cost() > 0 || o.calls > 0 {
			all = append(all, o)
		}
	}
	slices.SortFunc(all, func(a, b *origin) int {
		return cmp.Or(cmp.Compare(b.calls, a.calls), cmp.Compare(b.cost(), a.cost()), cmp.Compare(a.key.name, b.key.name), cmp.Compare(a.key.peer, b.key.peer))
	})
	for _, o := range all[:min(len(all), worst)] {
		s.Worst = append(s.Worst, o.status())
	}
	return s
}

// cost is what went wrong with an origin.
func (o *origin) cost() int64 { return o.counts.Refused + o.counts.Shed + o.counts.Forged }

func (o *origin) status() OriginStatus {
	s := OriginStatus{Name: o.key.name, Peer: o.key.peer, Last: o.last, Waiting: o.txns + o.waiting(), Running: o.running, OriginCounts: o.counts}
	if o.current != nil && o.current.phase == phaseRunning {
		s.Running++
	}
	return s
}

package bus

import (
	"cmp"
	"slices"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Stats counts what the core has done since it was made.
type Stats struct {
	Requests       [matrix.NumClasses + 1]int64 // that arrived, by class
	Answered       int64                        // with what a remote answered
	Shared         int64                        // joined a call that was under way
	CacheHits      int64                        // answered with what was known, and fresh
	CacheStale     int64                        // answered with an old answer, since the host failed
	Loads          int64                        // answers read from the store
	RefusedBefore  int64                        // refused as the server did a moment ago
	Held           int64                        // answers that were held back until all was sure to come
	Aheads         int64                        // servers connected to in advance
	Revived        int64                        // servers tried early because something came from them
	Spent          int64                        // hosts tried early because a user wrote to them or asked for keys
	KeyQueries     int64                        // of the homeserver
	KeysKnown      int64                        // keys that the store had
	KeysShared     int64                        // keys that were being fetched already
	KeysMissing    int64                        // keys not asked for, as they could not be had a moment ago
	KeysSkipped    int64                        // keys not fetched ahead, since too many are asked for
	KeyBatches     int64                        // requests for keys that were sent
	KeysAsked      int64                        // servers whose keys they asked for
	KeysHad        int64                        // servers whose keys came
	KeysLate       int64                        // requests for keys that their queries did not wait for
	FailedFast     int64                        // refused at once because the host is backing off
	Expired        int64                        // refused because the caller's time-out was near
	Gone           int64                        // given up by the caller
	Refused        [6]int64                     // by the first digit of the status
	Attempts       int64                        // sent to a remote
	Connects       int64                        // new connections
	Statuses       [6]int64                     // answers by the first digit of the status, 0: invalid
	Limited        int64                        // answers with status 429
	Failures       [matrix.NumFailures]int64    // ends of attempts
	BytesIn        int64                        // bodies of answers
	Suspects       int64                        // attempts put off since they did not connect
	Aged           int64                        // calls that rode on a better class's turn
	HostsForgotten int64                        // to make room for others
	CommitsFailed  int64
	Waits          [matrix.NumClasses + 1]Wait // for a worker, by class
}

// Wait sums up how long calls waited for a worker.
type Wait struct {
	Count int64
	Total time.Duration
	Max   time.Duration
}

func (s *Stats) waited(c matrix.Class, d time.Duration) {
	w := &s.Waits[c]
	w.Count++
	w.Total += d
	w.Max = max(w.Max, d)
}

// Snapshot is the state of the core at one moment, for people and metrics.
type Snapshot struct {
	At           sched.Time
	Stats        Stats
	Requests     sched.Gauge // of the homeserver, waiting or running
	Workers      sched.Gauge
	Lanes        [numLanes]LaneStatus
	Waiting      [matrix.NumClasses + 1]int64
	Running      [matrix.NumClasses + 1]int64
	Oldest       [matrix.NumClasses + 1]time.Duration // longest wait in the queue
	Hosts        int
	HostsLimit   int
	BackingOff   int
	Cache        CacheStatus // of small answers, in memory
	Whole        CacheStatus // of whole answers, in files
	Media        CacheStatus // of media, in files
	Known        int         // answers that are stored
	KnownLimit   int
	KeysWanted   sched.Gauge // keys that are asked for
	Notary       matrix.ServerName
	Joins        []JoinStatus // the latest first
	AheadWaiting int          // servers to be connected to in advance
	Worst        []HostStatus
}

// CacheStatus is how full a cache is.
type CacheStatus struct {
	Entries int
	Bytes   int64
	Limit   int64
}

func (c *cache) status() CacheStatus { return CacheStatus{c.recent.Len(), c.bytes, c.maxBytes} }

// LaneStatus is one rank of hosts.
type LaneStatus struct {
	Name  string
	Slots sched.Gauge
	Hosts int
}

// HostStatus is one destination, in words.
type HostStatus struct {
	HostRecord
	Rank    string
	Waiting int32
	Running int32
	Paused  sched.Time // until then, as the remote asked; 0 if it did not
	Why     string     // why it is not well, or empty
}

// Snapshot returns the state, with at most worst hosts: those that fail or
// hold up most.
func (m *Machine) Snapshot(now sched.Time, worst int) Snapshot {
	s := Snapshot{
		At:           now,
		Stats:        m.stats,
		Requests:     sched.Gauge{Used: sched.Slots(m.waiting()), Limit: sched.Slots(m.cfg.MaxRequests), Max: m.maxRequests},
		Workers:      m.workers,
		Hosts:        len(m.hosts),
		HostsLimit:   int(m.cfg.MaxHosts),
		Cache:        m.cache.status(),
		Whole:        m.whole.status(),
		Media:        m.media.status(),
		Known:        len(m.answers.known),
		KnownLimit:   m.answers.max,
		KeysWanted:   sched.Gauge{Used: sched.Slots(m.keys.wants), Limit: sched.Slots(m.cfg.Keys.MaxWants), Max: sched.Slots(m.keys.maxWants)},
		Notary:       m.keys.latest,
		Joins:        m.joinStatus(),
		AheadWaiting: m.joins.ahead.Len(),
	}
	for l := range m.lanes {
		s.Lanes[l] = LaneStatus{Name: laneID(l).String(), Slots: m.lanes[l].slots}
	}
	var bad []*host
	for _, h := range m.hosts { // sorted below
		s.Lanes[h.lane(now)].Hosts++
		if h.backingOff(now) {
			s.BackingOff++
		}
		for class := matrix.Class(1); class <= matrix.NumClasses; class++ {
			if h.waiting[class] > 0 {
				s.Waiting[class] += int64(h.waiting[class])
				if c := h.head(class); c != nil {
					s.Oldest[class] = max(s.Oldest[class], now.Sub(c.queued))
				}
			}
			s.Running[class] += int64(h.running[class])
		}
		if h.Failures > 0 || h.pausedUntil > now || h.allWaiting() > 0 {
			bad = append(bad, h)
		}
	}
	slices.SortFunc(bad, func(a, b *host) int {
		return cmp.Or(cmp.Compare(b.allWaiting(), a.allWaiting()), cmp.Compare(b.Failures, a.Failures), cmp.Compare(a.Name, b.Name))
	})
	for _, h := range bad[:min(len(bad), worst)] {
		s.Worst = append(s.Worst, h.status(now))
	}
	return s
}

func (h *host) status(now sched.Time) HostStatus {
	s := HostStatus{HostRecord: h.HostRecord, Rank: h.lane(now).String(), Waiting: h.allWaiting(), Running: h.inUse}
	switch {
	case h.Failures > 0:
		s.Why = h.Cause()
	case h.pausedUntil > now:
		s.Paused = h.pausedUntil
		s.Why = "limits our rate (429)"
	}
	return s
}

package node

import (
	"cmp"
	"io"
	"slices"
	"sync/atomic"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

const (
	// scanners look through the answers of rooms, one after the other: it is an
	// advance on what the homeserver asks for later, and worth one processor.
	scanners = 1
	// maxScans is how many may wait or run; a further one is left out.
	maxScans = 16
	// seenAtOnce is how many keys are told the core at a time, as long as more
	// come: a notary's batch.
	seenAtOnce = 50
	scanPiece  = 32 << 10
	// scanQuiet is after how many bytes without anything new the rest is left
	// alone: what is still to come, if anything, is not worth the processor.
	scanQuiet = 8 << 20
)

// scanCounts counts what was looked through.
type scanCounts struct {
	waiting atomic.Int64
	scans   atomic.Int64
	skipped atomic.Int64 // since too many waited
	gaveUp  atomic.Int64 // since the answer is not what it should be
	bytes   atomic.Int64
	events  atomic.Int64
}

// scan looks through an answer from a room while it arrives, for the servers
// whose keys the homeserver will want. It never holds up who else reads it.
type scan struct {
	room   string
	origin matrix.ServerName // our own
	reader *netx.Reader
}

// startScan has an attempt's answer looked through.
func (n *Node) startScan(a *attempt, ep *matrix.Endpoint) {
	room := matrix.RoomID(ep, a.in.Target)
	cfg := n.cfg.Load()
	if room == "" || !cfg.Joins.PrefetchKeys && cfg.Joins.Preflight == 0 {
		return
	}
	if n.scanned.waiting.Add(1) > maxScans {
		n.scanned.waiting.Add(-1)
		n.scanned.skipped.Add(1)
		return
	}
	n.scanners.Submit(&scan{room: room, origin: cfg.Homeserver.ServerName, reader: a.body.Reader()})
}

func (s *scan) run(n *Node) {
	defer n.scanned.waiting.Add(-1)
	defer s.reader.Close()
	n.scanned.scans.Add(1)
	state := matrix.NewStateScan(matrix.ScanLimits{})
	prefetch := n.cfg.Load().Joins.PrefetchKeys
	var seen []matrix.KeyWant
	quiet := 0
	piece := make([]byte, scanPiece)
	for {
		read, err := s.reader.Read(piece)
		n.scanned.bytes.Add(int64(read))
		state.Write(piece[:read])
		keys, servers := state.Take()
		for _, k := range keys {
			if k.Server != s.origin && prefetch {
				seen = append(seen, k)
			}
		}
		if quiet += read; len(keys)+len(servers) > 0 {
			quiet = 0
		}
		last := err != nil || state.GaveUp() != nil || quiet > scanQuiet
		for len(seen) >= seenAtOnce || len(seen) > 0 && last {
			part := min(len(seen), seenAtOnce)
			n.loop.Post(event{Event: bus.KeysSeen{Room: s.room, Wants: byServer(seen[:part])}})
			seen = seen[part:]
		}
		if len(servers) > 0 {
			n.loop.Post(event{Event: bus.ServersSeen{Room: s.room, Servers: servers}})
		}
		if last {
			if state.GaveUp() != nil || err == io.EOF && !state.Whole() {
				n.scanned.gaveUp.Add(1)
			}
			_, _, events := state.Found()
			n.scanned.events.Add(events)
			return
		}
	}
}

// byServer returns wants in the order that a query has them.
func byServer(wants []matrix.KeyWant) []matrix.KeyWant {
	wants = slices.Clone(wants)
	slices.SortFunc(wants, func(a, b matrix.KeyWant) int {
		return cmp.Or(cmp.Compare(a.Server, b.Server), cmp.Compare(a.KeyID, b.KeyID))
	})
	return wants
}

func (s *scan) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
}

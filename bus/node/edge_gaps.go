package node

import (
	"cmp"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

const (
	// gapMemory is how many events and rooms that came by are remembered in each of
	// two generations, as 8 bytes in a map.
	gapMemory = 4096
	// gapRooms is how many rooms with gaps are remembered.
	gapRooms = 32
)

// gaps notes the events that name others before them which have not come by, so
// that an admin sees of which room the homeserver has to ask others. It knows what
// the homeserver has acknowledged or sent since the start, and nothing of the time
// before, so that it may call missing what the homeserver has.
type gaps struct {
	mu    sync.Mutex
	young map[uint64]struct{}
	old   map[uint64]struct{}
	rooms map[string]*gapRoom
	total int64
}

// gapRoom is a room with gaps.
type gapRoom struct {
	Events int64             // with gaps, since the room was last forgotten
	Origin matrix.ServerName // that sent the last of them
	Last   sched.Time
}

// follow is what an event of a room comes after.
type follow struct {
	room string
	prev []uint64
}

var gapSeed = maphash.MakeSeed()

func mark(s string) uint64 { return maphash.String(gapSeed, s) }

// follows returns what the events of a transaction come after.
func follows(pdus []matrix.PDU) (list []follow) {
	for i := range pdus {
		if !isRoomID(pdus[i].Room) {
			continue
		}
		f := follow{room: strings.Clone(pdus[i].Room)}
		for id := range pdus[i].PrevEvents() {
			f.prev = append(f.prev, mark(id))
			if len(f.prev) == 20 { // as many as an event may have (S2S "PDUs")
				break
			}
		}
		if len(f.prev) > 0 {
			list = append(list, f)
		}
	}
	return list
}

// came notes events and rooms that have come by.
func (g *gaps) came(marks ...uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range marks {
		if g.young == nil || len(g.young) >= gapMemory {
			g.young, g.old = make(map[uint64]struct{}), g.young
		}
		g.young[m] = struct{}{}
	}
}

// sent notes events of the homeserver, which goes on from events that it has. Of one
// for many servers this is called as often.
func (g *gaps) sent(pdus []matrix.PDU) {
	for i := range pdus {
		p := &pdus[i]
		whole := maphash.Bytes(gapSeed, p.Raw)
		g.mu.Lock()
		again := g.knows(whole)
		g.mu.Unlock()
		if again {
			continue
		}
		marks := []uint64{whole, mark(p.Room)}
		for _, id := range matrix.EventIDs(p.Raw) {
			marks = append(marks, mark(id))
		}
		for _, f := range follows(pdus[i : i+1]) {
			marks = append(marks, f.prev...)
		}
		g.came(marks...)
	}
}

// knows reports whether a mark has come by.
func (g *gaps) knows(m uint64) bool {
	_, young := g.young[m]
	_, old := g.old[m]
	return young || old
}

// note notes what is missing before events that a server sent. Of a room of which
// nothing has come by, that is no news.
func (g *gaps) note(origin matrix.ServerName, list []follow, now sched.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, f := range list {
		if !g.knows(mark(f.room)) || !slices.ContainsFunc(f.prev, func(m uint64) bool { return !g.knows(m) }) {
			continue
		}
		g.total++
		r := g.rooms[f.room]
		if r == nil {
			g.forget()
			r = new(gapRoom)
			g.rooms[f.room] = r
		}
		r.Events++
		r.Origin, r.Last = origin, now
	}
}

// forget makes room for one more room.
func (g *gaps) forget() {
	if g.rooms == nil {
		g.rooms = make(map[string]*gapRoom)
	}
	if len(g.rooms) < gapRooms {
		return
	}
	oldest := ""
	for room, r := range g.rooms { // the order does not matter: it is the least that is looked for
		if oldest == "" || r.Last < g.rooms[oldest].Last {
			oldest = room
		}
	}
	delete(g.rooms, oldest)
}

// GapReport is a room of whose events some name others that have not come by.
type GapReport struct {
	Room   string            `json:"room"`
	Events int64             `json:"events"`
	Origin matrix.ServerName `json:"origin"` // that sent the last of them
	Last   time.Time         `json:"last"`
}

// report returns the number of events with gaps since the start, and the rooms with
// the latest.
func (g *gaps) report(most int) (total int64, rooms []GapReport) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for room, r := range g.rooms { // sorted below
		rooms = append(rooms, GapReport{room, r.Events, r.Origin, r.Last.Std()})
	}
	slices.SortFunc(rooms, func(a, b GapReport) int { return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.Room, b.Room)) })
	return g.total, rooms[:min(len(rooms), most)]
}

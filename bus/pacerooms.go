package bus

import (
	"container/list"
	"fmt"
	"strings"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// rooms remembers which destination is in which room, as far as the
// transactions that passed have told: the least recently seen is forgotten
// first, and what is forgotten only makes the pace cruder. Nothing here waits
// or decides when anything is answered.
type rooms struct {
	byID     map[string]*paceRoom
	recent   *list.List // of *paceRoom, the latest seen first
	dests    map[matrix.ServerName]*paceDest
	idle     *list.List // of *paceDest without a held answer, the latest seen first
	strange  paceRoom   // a stand-in room for the destinations of which no room is known
	bytes    sched.Bytes
	links    int
	maxRooms int
	maxDests int
	maxBytes sched.Bytes
	small    int
}

// paceRoom is a room and the destinations that are known to be in it.
type paceRoom struct {
	id    string
	elem  *list.Element
	links []*roomLink
	big   bool // has had more destinations than a small room has

	marks  [8]uint64 // the latest PDUs, in a ring
	next   int
	newest uint64
	newAt  sched.Time // when the newest PDU was seen first; 0: none yet
}

// paceDest is a destination.
type paceDest struct {
	name      matrix.ServerName
	elem      *list.Element // in idle, nil while an answer is held
	links     []*roomLink
	held      *heldAnswer
	answered  sched.Time // last time; 0: never
	talkUntil sched.Time
	away      bool // cannot be reached
	slow      bool // takes long to answer
}

// roomLink says that dest is in room. It knows its place in both, so that it
// can be taken out of either.
type roomLink struct {
	room           *paceRoom
	dest           *paceDest
	inRoom, inDest int32
	seen           sched.Time
}

const (
	// What is counted for each, in bytes: the structs, their places in maps,
	// lists and slices, and the room's or server's name at its usual length.
	roomCost = 400
	destCost = 350
	linkCost = 72

	// maxRoomID is the longest room id that is remembered (S2S appendices,
	// "Room IDs").
	maxRoomID = 255
	// maxDestRooms is how many rooms are remembered of one destination.
	maxDestRooms = 256
	// linkAge is after what time without a word from a room a destination's
	// place in it says nothing about its pace any more.
	linkAge = time.Hour
)

func (r *rooms) init() {
	r.byID = make(map[string]*paceRoom)
	r.recent = list.New()
	r.dests = make(map[matrix.ServerName]*paceDest)
	r.idle = list.New()
	r.strange.big = true
}

func (r *rooms) limit(c PaceConfig) {
	r.maxRooms, r.maxDests, r.maxBytes, r.small = int(c.MaxRooms), int(c.MaxDestinations), c.MaxBytes, int(c.SmallRoom)
	r.shrink(nil, 0)
}

// dest returns the destination of that name, made if need be.
func (r *rooms) dest(name matrix.ServerName) *paceDest {
	d := r.dests[name]
	if d == nil {
		name = matrix.ServerName(strings.Clone(string(name))) // not the whole request with it
		d = &paceDest{name: name}
		r.dests[name] = d
		r.bytes += destCost
		r.link(&r.strange, d, 0)
		d.elem = r.idle.PushFront(d)
		r.shrink(nil, 0)
	} else if d.elem != nil {
		r.idle.MoveToFront(d.elem)
	}
	return d
}

// pin keeps d from being forgotten while it has a held answer.
func (r *rooms) pin(d *paceDest) {
	if d.elem != nil {
		r.idle.Remove(d.elem)
		d.elem = nil
	}
}

func (r *rooms) unpin(d *paceDest) {
	d.elem = r.idle.PushFront(d)
	r.shrink(nil, 0)
}

// room returns the room of that id, made if need be; nil for what is no id.
func (r *rooms) room(id string) *paceRoom {
	if id == "" || len(id) > maxRoomID {
		return nil
	}
	if room := r.byID[id]; room != nil {
		r.recent.MoveToFront(room.elem)
		return room
	}
	id = strings.Clone(id) // not the whole transaction with it
	room := &paceRoom{id: id}
	r.byID[id] = room
	room.elem = r.recent.PushFront(room)
	r.bytes += roomCost
	r.shrink(room, 0)
	return room
}

// join notes that d is in room.
func (r *rooms) join(room *paceRoom, d *paceDest, now sched.Time) {
	oldest := -1
	for i, l := range d.links {
		if l.room == room {
			l.seen = now
			return
		}
		if oldest < 0 || l.seen < d.links[oldest].seen {
			oldest = i
		}
	}
	if len(d.links) >= maxDestRooms {
		r.unlink(d.links[oldest])
	}
	if !r.shrink(room, linkCost) {
		room.big = true // as far as there is no more to be known
		r.stray(d)
		return
	}
	r.link(room, d, now)
	if d.links[0].room == &r.strange {
		r.unlink(d.links[0])
	}
	room.big = room.big || len(room.links) > r.small
}

func (r *rooms) link(room *paceRoom, d *paceDest, now sched.Time) {
	l := &roomLink{room: room, dest: d, inRoom: int32(len(room.links)), inDest: int32(len(d.links)), seen: now}
	room.links = append(room.links, l)
	d.links = append(d.links, l)
	r.count(room, 1)
}

// count charges for n links; those to the stand-in are part of destCost.
func (r *rooms) count(room *paceRoom, n int) {
	if room != &r.strange {
		r.links += n
		r.bytes += sched.Bytes(n) * linkCost
	}
}

func (r *rooms) unlink(l *roomLink) {
	last := len(l.room.links) - 1
	l.room.links[last].inRoom = l.inRoom
	l.room.links[l.inRoom] = l.room.links[last]
	l.room.links[last] = nil
	l.room.links = l.room.links[:last]
	last = len(l.dest.links) - 1
	l.dest.links[last].inDest = l.inDest
	l.dest.links[l.inDest] = l.dest.links[last]
	l.dest.links[last] = nil
	l.dest.links = l.dest.links[:last]
	r.count(l.room, -1)
}

// shrink forgets until everything is within its bounds and there is room for
// extra bytes more: rooms first, then destinations, but never keep, the
// destination seen last, or one with a held answer. It reports whether that was
// enough.
func (r *rooms) shrink(keep *paceRoom, extra sched.Bytes) bool {
	for len(r.byID) > r.maxRooms || r.bytes+extra > r.maxBytes && len(r.byID) > 0 {
		room := r.recent.Back().Value.(*paceRoom)
		if room == keep {
			break
		}
		r.forgetRoom(room)
	}
	for (len(r.dests) > r.maxDests || r.bytes+extra > r.maxBytes) && r.idle.Len() > 1 {
		r.forgetDest(r.idle.Back().Value.(*paceDest))
	}
	return r.bytes+extra <= r.maxBytes
}

func (r *rooms) forgetRoom(room *paceRoom) {
	for n := len(room.links); n > 0; n-- {
		d := room.links[n-1].dest
		r.unlink(room.links[n-1])
		r.stray(d)
	}
	r.recent.Remove(room.elem)
	delete(r.byID, room.id)
	r.bytes -= roomCost
}

func (r *rooms) forgetDest(d *paceDest) {
	for n := len(d.links); n > 0; n-- {
		r.unlink(d.links[n-1])
	}
	r.idle.Remove(d.elem)
	delete(r.dests, d.name)
	r.bytes -= destCost
}

// stray puts a destination that is in no known room any more with the others
// of that kind.
func (r *rooms) stray(d *paceDest) {
	if len(d.links) == 0 {
		r.link(&r.strange, d, 0)
	}
}

// sees notes a PDU and reports whether it is the first time that it passes.
func (room *paceRoom) sees(mark uint64, now sched.Time) bool {
	if room.newAt != 0 {
		for _, m := range room.marks {
			if m == mark {
				return false
			}
		}
	}
	room.marks[room.next] = mark
	room.next = (room.next + 1) % len(room.marks)
	room.newest, room.newAt = mark, now
	return true
}

// onlySmall reports whether d is known to be in rooms, and lately in small
// ones only.
func (d *paceDest) onlySmall(now sched.Time) bool {
	known := false
	for _, l := range d.links {
		if l.seen != 0 && now.Sub(l.seen) < linkAge {
			if l.room.big {
				return false
			}
			known = true
		}
	}
	return known
}

// check recounts what rooms keeps running totals of.
func (r *rooms) check() error {
	bytes, links := sched.Bytes(len(r.byID))*roomCost+sched.Bytes(len(r.dests))*destCost, 0
	for e := r.recent.Front(); e != nil; e = e.Next() {
		room := e.Value.(*paceRoom)
		links += len(room.links)
		for i, l := range room.links {
			if l.room != room || int(l.inRoom) != i || l.dest.links[l.inDest] != l {
				return fmt.Errorf("room %s: link %d is out of place", room.id, i)
			}
		}
	}
	if links != r.links || bytes+sched.Bytes(links)*linkCost != r.bytes {
		return fmt.Errorf("%d links and %d bytes are counted, there are %d and %d", r.links, r.bytes, links, bytes+sched.Bytes(links)*linkCost)
	}
	if len(r.byID) > r.maxRooms || len(r.dests) > r.maxDests || r.bytes > r.maxBytes {
		return fmt.Errorf("%d rooms of %d, %d destinations of %d, %d bytes of %d", len(r.byID), r.maxRooms, len(r.dests), r.maxDests, r.bytes, r.maxBytes)
	}
	return nil
}

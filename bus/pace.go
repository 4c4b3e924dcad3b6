package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Pacer decides when a stored transaction of the homeserver is answered. While
// an answer is held, Synapse keeps what follows for that destination together
// (one transaction in flight for each), so the pace of the answers is the
// number of transactions that it builds, and with it most of its load.
//
// The price is that an event for a destination whose answer is held waits in
// Synapse, where nobody sees it. So held answers stand in one of four lanes:
//
//   - prompt: destinations in a conversation, and those of small rooms; not held
//     unless they are so many that answering them at once is itself a storm,
//   - hurried: an event of one of the destination's rooms has passed to another
//     destination, so it probably waits behind this answer, too,
//   - away: destinations that cannot be reached now. What waits for them in
//     Synapse could not be delivered, and is in nobody's way,
//   - steady: all others.
//
// Each lane gives its oldest answer first and has a pace of its own, fast
// enough for all that wait in it to be answered within the hold, or for those
// that are away within twice the hold.
//
// A Pacer is pure: it is told the time and starts nothing. It is not safe for
// concurrent use.
type Pacer struct {
	cfg   PaceConfig
	rooms rooms
	held  map[ReqID]*heldAnswer
	lanes [numPaceLanes]paceLane
	free  []ReqID // to be given at the next Release

	drainBy sched.Time // 0: not draining

	// Of AckAuto, between Floor (0) and Ceiling (1000): the steady pace, and
	// the one that the hurried lane's is a multiple of. The first decides how
	// much is to be done, the second only how closely together.
	level, haste int64
	adjusted     sched.Time
	pressure     int32 // as Pressure was told
	pressed      sched.Time
	returns      [16]returned
	next         int

	second   sched.Time // in which arrivals are being counted
	arriving int64
	arrivals int64 // in the last full second

	counts PaceCounts
}

type paceLaneID int8

const (
	lanePrompt paceLaneID = iota
	laneHurried
	laneSteady
	laneAway
	numPaceLanes
)

var paceLaneNames = [numPaceLanes]string{lanePrompt: "prompt", laneHurried: "hurried", laneSteady: "steady", laneAway: "away"}

func (l paceLaneID) String() string { return paceLaneNames[l] }

// paceLane holds answers by the moment at which they were held.
type paceLane struct {
	heap  sched.Timers[*heldAnswer]
	aged  [64]int32  // how many were held in each second, by second modulo 64
	given sched.Time // when the last one's turn was
}

type heldAnswer struct {
	req   ReqID
	dest  *paceDest
	since sched.Time
	lane  paceLaneID
	timer *sched.Timer[*heldAnswer]
}

// returned is how long after an answer the next transaction came.
type returned struct {
	at    sched.Time
	after time.Duration
}

// PaceMark tells PDUs apart: equal for the same PDU to different destinations.
// A hash of its canonical bytes does, as Synapse sends the same bytes to all.
type PaceMark struct {
	Room string
	Mark uint64
}

// PaceTxn is what a Pacer wants to know of a transaction. The zero value is a
// transaction of nothing but presence.
type PaceTxn struct {
	PDUs  []PaceMark // at most matrix.MaxPDUs
	Rooms []string   // that its typing and receipts speak of, at most matrix.MaxEDUs
	// Device: it carries to-device messages, device lists or signing keys;
	// an encrypted event tends to follow them.
	Device bool
	// Away: the destination could not be reached last time.
	Away bool
	// Slow: it takes long to answer. It gets an event before others, so that all
	// have it at about the same time.
	Slow bool
}

// PaceCounts counts answers by why they were given when they were.
type PaceCounts struct {
	Unheld  int64 // ack_pace is "off"
	Prompt  int64 // small rooms and conversations
	Hurried int64 // an event probably waited
	Steady  int64 // at the pace
	Away    int64 // the destination could not be reached, so it was in nobody's way
	Late    int64 // held for as long as may be
	Full    int64 // too many were held
	Passed  int64 // the destination's next transaction arrived nonetheless
	Drained int64 // the process ends
	Gone    int64 // the homeserver gave up
	Forward int64 // moved to the hurried lane while they were held
}

// How AckAuto adapts.
const (
	adjustEvery = 250 * time.Millisecond
	// Of the time in which some task waited for a processor, in 1/100 %.
	highPressure, lowPressure = 5000, 2000
	pressureAge               = 30 * time.Second
	// An answer after which Synapse has something to send is followed by its
	// next transaction as soon as its reactor gets there, so the quickest of
	// the latest such returns is its delay. A return after more than
	// maxReturn is taken for new traffic.
	slowReturn, quickReturn = 80 * time.Millisecond, 40 * time.Millisecond
	maxReturn               = 4 * time.Second
	returnAge               = 10 * time.Second
	climb                   = 25 // thousandths, for each quiet quarter of a second
	// raceFor is how long after an event was first seen a transaction without
	// it may still have been built before it.
	raceFor = 5 * time.Second
)

// catchUp is how much of its pace a lane may make up for: a little where
// Release comes late, more where the answers should not wait at all.
var catchUp = [numPaceLanes]time.Duration{lanePrompt: time.Second, laneHurried: 20 * time.Millisecond, laneSteady: 20 * time.Millisecond, laneAway: 20 * time.Millisecond}

// NewPacer returns a Pacer with the given limits, which must be valid.
func NewPacer(cfg PaceConfig) *Pacer {
	p := &Pacer{held: make(map[ReqID]*heldAnswer), level: 1000, haste: 1000}
	p.rooms.init()
	p.Configure(cfg)
	return p
}

// Configure changes the limits, which must be valid. What is held goes on
// under the new ones.
func (p *Pacer) Configure(cfg PaceConfig) {
	if err := cfg.Validate(); err != nil {
		panic("bus: " + err.Error())
	}
	p.cfg = cfg
	p.rooms.limit(cfg)
}

// Held takes a transaction that is stored and waits for its answer. Release
// says when to give it, at the same moment if it need not wait.
func (p *Pacer) Held(now sched.Time, req ReqID, dest matrix.ServerName, t PaceTxn) {
	if p.held[req] != nil {
		panic(fmt.Sprintf("bus: answer %d is held twice, among %d", req, len(p.held)))
	}
	p.countArrival(now)
	if p.cfg.Ack == AckOff {
		p.counts.Unheld++
		p.free = append(p.free, req)
		return
	}
	d := p.rooms.dest(dest)
	if d.held != nil {
		// One in flight for each destination: the older has been given up.
		p.counts.Passed++
		p.give(now, d.held)
	}
	if d.answered != 0 && now.Sub(d.answered) <= maxReturn {
		p.returns[p.next] = returned{at: now, after: now.Sub(d.answered)}
		p.next = (p.next + 1) % len(p.returns)
	}
	d.away, d.slow = t.Away, t.Slow
	p.learn(now, d, t)
	h := &heldAnswer{req: req, dest: d, since: now}
	p.held[req], d.held = h, h
	p.rooms.pin(d)
	p.enter(h, p.laneFor(now, d, t))
}

// Pass has an answer given at once.
func (p *Pacer) Pass(now sched.Time, req ReqID) {
	p.countArrival(now)
	p.counts.Unheld++
	p.free = append(p.free, req)
}

// learn notes who is in which room, and brings forward what an event that is
// seen for the first time makes urgent.
func (p *Pacer) learn(now sched.Time, d *paceDest, t PaceTxn) {
	for i, id := range t.Rooms[:min(len(t.Rooms), matrix.MaxEDUs)] {
		if i > 0 && id == t.Rooms[i-1] {
			continue
		}
		if room := p.rooms.room(id); room != nil {
			p.rooms.join(room, d, now)
		}
	}
	for _, pdu := range t.PDUs[:min(len(t.PDUs), matrix.MaxPDUs)] {
		room := p.rooms.room(pdu.Room)
		if room == nil {
			continue
		}
		p.rooms.join(room, d, now)
		if !room.big {
			d.talkUntil = now.Add(p.cfg.Talk)
		}
		if room.sees(pdu.Mark, now) {
			p.bring(room)
			if room.big {
				// Of these no room is known, so it may be this one.
				p.bring(&p.rooms.strange)
			}
		}
	}
}

// bring moves the steady answers of a room's destinations to the hurried lane,
// those of slow ones to the prompt one.
func (p *Pacer) bring(room *paceRoom) {
	for _, l := range room.links {
		if h := l.dest.held; h != nil && h.lane == laneSteady {
			p.leave(h)
			if l.dest.slow {
				p.enter(h, lanePrompt)
			} else {
				p.enter(h, laneHurried)
			}
			p.counts.Forward++
		}
	}
}

func (p *Pacer) laneFor(now sched.Time, d *paceDest, t PaceTxn) paceLaneID {
	switch {
	case d.away:
		return laneAway
	case d.talkUntil > now:
		return lanePrompt
	case d.onlySmall(now) && p.lanes[lanePrompt].heap.Len() <= int(p.cfg.Prompt)/10:
		// A tenth of a second's worth waits: conversations come after that.
		return lanePrompt
	case t.Device || d.owed(now, t):
		return laneHurried
	}
	return laneSteady
}

// owed reports whether an event that has passed to another destination of one
// of d's rooms may have come too late for this transaction: it was seen after
// d was answered last, and is not in it.
func (d *paceDest) owed(now sched.Time, t PaceTxn) bool {
	for _, l := range d.links {
		room := l.room
		if room.newAt <= d.answered || now.Sub(room.newAt) > raceFor {
			continue
		}
		has := false
		for _, pdu := range t.PDUs {
			has = has || pdu.Mark == room.newest && pdu.Room == room.id
		}
		if !has {
			return true
		}
	}
	return false
}

func (p *Pacer) enter(h *heldAnswer, lane paceLaneID) {
	h.lane = lane
	l := &p.lanes[lane]
	h.timer = l.heap.Set(h.since, h)
	l.aged[second(h.since)%64]++
}

func (p *Pacer) leave(h *heldAnswer) {
	l := &p.lanes[h.lane]
	l.heap.Stop(h.timer)
	l.aged[second(h.since)%64]--
}

func second(t sched.Time) int64 { return int64(t) / int64(time.Second) }

// let ends the holding of h.
func (p *Pacer) let(h *heldAnswer) {
	p.leave(h)
	delete(p.held, h.req)
	h.dest.held = nil
	p.rooms.unpin(h.dest)
}

// give ends the holding of h with its answer.
func (p *Pacer) give(now sched.Time, h *heldAnswer) {
	h.dest.answered = now
	p.let(h)
	p.free = append(p.free, h.req)
}

// While the homeserver makes this many transactions within two seconds, deliveries
// that can wait leave it the processors: what matters least from stormOf on for
// stormPause, and from burstOf on, which is more than any pace and so a fan-out
// that found no answer held, events of large rooms for burstPause.
const (
	stormOf, stormPause = 100, 2 * time.Second
	burstOf, burstPause = 600, time.Second
)

// Pause is how long the delivery of a transaction that has just arrived should
// wait, because the homeserver is busy with making more of them.
func (p *Pacer) Pause(now sched.Time, t PaceTxn) time.Duration {
	p.countArrivals(now)
	switch n := p.arriving + p.arrivals; {
	case n < stormOf || t.Device:
		return 0
	case len(t.PDUs) == 0:
		return stormPause
	case n < burstOf:
		return 0
	}
	for _, pdu := range t.PDUs {
		if room := p.rooms.byID[pdu.Room]; room == nil || !room.big {
			return 0 // perhaps somebody waits for it in a conversation
		}
	}
	return burstPause
}

// Gone says that the homeserver closed the connection of a transaction. It
// does nothing if the answer is not held.
func (p *Pacer) Gone(now sched.Time, req ReqID) {
	if h := p.held[req]; h != nil {
		p.counts.Gone++
		p.let(h)
	}
}

// Heard says that a destination sent us something of a room: an event, typing or
// a receipt. It is a hint that an event for it may follow soon, so that its
// answer should not be in the way.
func (p *Pacer) Heard(now sched.Time, dest matrix.ServerName, roomID string) {
	if p.cfg.Ack == AckOff {
		return
	}
	d := p.rooms.dest(dest)
	room := p.rooms.room(roomID)
	if room == nil {
		return
	}
	p.rooms.join(room, d, now)
	if room.big {
		return
	}
	d.talkUntil = now.Add(p.cfg.Talk)
	if h := d.held; h != nil && h.lane != lanePrompt {
		p.leave(h)
		p.enter(h, lanePrompt)
		p.counts.Forward++
	}
}

// Reach says that a destination can be reached again, or cannot be reached any
// more.
func (p *Pacer) Reach(now sched.Time, dest matrix.ServerName, away bool) {
	d := p.rooms.dests[dest]
	if d == nil || d.away == away {
		return
	}
	d.away = away
	if h := d.held; h != nil {
		p.leave(h)
		if away {
			p.enter(h, laneAway)
		} else {
			// What waits behind it may have waited for long.
			p.enter(h, laneHurried)
			p.counts.Forward++
		}
	}
}

// Pressure says for what part of the last ten seconds some task waited for a
// processor, in 1/100 %: "some avg10" of /proc/pressure/cpu or of a cgroup's
// cpu.pressure. After half a minute it counts for nothing.
func (p *Pacer) Pressure(now sched.Time, hundredths int32) {
	p.pressure, p.pressed = min(max(hundredths, 0), 10000), now
}

// Drain says that the process ends: by the given moment every answer has been
// given.
func (p *Pacer) Drain(by sched.Time) { p.drainBy = max(by, 1) }

// Release appends the answers that are to be given now, the oldest of each
// lane first.
func (p *Pacer) Release(now sched.Time, out []ReqID) []ReqID {
	p.countArrivals(now)
	p.adjust(now)
	for id := range p.lanes {
		l := &p.lanes[id]
		hold := p.hold(paceLaneID(id), now)
		for {
			since, ok := l.heap.Next()
			if !ok {
				break
			}
			late := now.Sub(since) >= hold
			if !late {
				turn := p.turn(paceLaneID(id), now)
				if turn > now {
					break
				}
				l.given = max(turn, now.Add(-catchUp[id]))
			}
			*p.reason(late, paceLaneID(id))++
			p.give(now, l.take())
		}
	}
	for len(p.held) > int(p.cfg.MaxHeld) {
		lane, _, _ := p.oldest()
		p.counts.Full++
		p.give(now, p.lanes[lane].take())
	}
	out = append(out, p.free...)
	p.free = p.free[:0]
	return out
}

// reason is the count of an answer's reason to be given.
func (p *Pacer) reason(late bool, lane paceLaneID) *int64 {
	switch {
	case p.drainBy != 0:
		return &p.counts.Drained
	case late && p.cfg.Ack == AckOff:
		return &p.counts.Unheld
	case lane == laneAway:
		return &p.counts.Away
	case late:
		return &p.counts.Late
	case lane == lanePrompt:
		return &p.counts.Prompt
	case lane == laneHurried:
		return &p.counts.Hurried
	}
	return &p.counts.Steady
}

// NextWake returns the moment at which Release has something to give.
func (p *Pacer) NextWake(now sched.Time) (sched.Time, bool) {
	if len(p.free) > 0 || len(p.held) > int(p.cfg.MaxHeld) {
		return now, true
	}
	var wake sched.Time
	for id := range p.lanes {
		l := &p.lanes[id]
		if since, ok := l.heap.Next(); ok {
			at := max(min(since.Add(p.hold(paceLaneID(id), now)), p.turn(paceLaneID(id), now)), now)
			if p.drainBy > now {
				at = min(at, p.drainBy)
			}
			if wake == 0 || at < wake {
				wake = at
			}
		}
	}
	return wake, wake != 0
}

// hold is how long an answer in a lane may be held at this moment.
func (p *Pacer) hold(lane paceLaneID, now sched.Time) time.Duration {
	switch {
	case p.cfg.Ack == AckOff || p.drainBy != 0 && now >= p.drainBy:
		return 0
	case lane == laneAway:
		return min(2*p.cfg.Hold, maxHold)
	}
	return p.cfg.Hold
}

// take takes the oldest answer, which there must be, out of the order.
func (l *paceLane) take() *heldAnswer {
	since, _ := l.heap.Next()
	h, _ := l.heap.Due(since)
	return h
}

// oldest returns the lane of the answer that has been held longest.
func (p *Pacer) oldest() (lane paceLaneID, since sched.Time, ok bool) {
	for id := range p.lanes {
		if at, has := p.lanes[id].heap.Next(); has && (!ok || at < since) {
			lane, since, ok = paceLaneID(id), at, true
		}
	}
	return lane, since, ok
}

// turn is when the lane's next answer may be given, as far as its pace goes, if
// nothing changes until then.
func (p *Pacer) turn(id paceLaneID, now sched.Time) sched.Time {
	l := &p.lanes[id]
	rate, from := p.pace(id, now)
	if rate == 0 {
		return from
	}
	at := l.given.Add(time.Duration(int64(time.Second) * milli / rate))
	if from > now {
		return min(at, from)
	}
	return at
}

// pace is how fast the lane gives answers at this moment. If it will have to be
// faster, that begins at from.
func (p *Pacer) pace(id paceLaneID, now sched.Time) (rate int64, from sched.Time) {
	l := &p.lanes[id]
	rate = p.rate(id)
	rush, from := l.rush(now, p.hold(id, now), max(rate, p.rate(laneHurried)/2))
	switch {
	case id == laneAway, id == laneSteady && p.lanes[laneHurried].heap.Len() > 0:
		rate = rush // only what must be; for the others while there are some in a hurry
	default:
		rate = max(rate, rush)
	}
	if p.drainBy > now {
		rate = max(rate, int64(l.heap.Len())*milli*int64(time.Second)/int64(p.drainBy.Sub(now)))
	}
	return rate, from
}

// milli: rates are in thousandths of an answer a second.
const milli = 1000

// rate is a lane's pace, need aside.
func (p *Pacer) rate(id paceLaneID) int64 {
	switch id {
	case lanePrompt:
		return int64(p.cfg.Prompt) * milli
	case laneHurried:
		return p.between(p.haste) * int64(p.cfg.Hurry)
	}
	return p.between(p.level)
}

// between is the pace at a level of AckAuto, or the one that is set.
func (p *Pacer) between(level int64) int64 {
	if p.cfg.Ack > 0 {
		return int64(p.cfg.Ack) * milli
	}
	return int64(p.cfg.Floor)*milli + int64(p.cfg.Ceiling-p.cfg.Floor)*level*milli/1000
}

// rush is the pace that the lane needs so that each answer is given before its
// time is up: for any moment by which some must have been given, as many in the
// time that is left. It is 0 as long as there is time enough at the pace of
// least, which is until from: an event may come and bring the answers forward
// by then, and what was given before it came would have been given in vain.
// Answers are taken by the second in which they were held, as if all at its
// beginning.
func (l *paceLane) rush(now sched.Time, hold time.Duration, least int64) (rate int64, from sched.Time) {
	from = now.Add(hold)
	if l.heap.Len() == 0 || hold <= 0 {
		return 0, from
	}
	var due int64
	for s := second(now.Add(-hold)); s <= second(now); s++ {
		n := int64(l.aged[s%64])
		if n == 0 {
			continue
		}
		due += n
		by := sched.Time(s * int64(time.Second)).Add(hold)
		rate = max(rate, due*milli*int64(time.Second)/max(int64(by.Sub(now)), int64(time.Millisecond)))
		from = min(from, by.Add(-time.Duration(due*milli*int64(time.Second)/least)))
	}
	if from > now {
		return 0, from
	}
	return rate, from
}

// adjust moves the pace of AckAuto: down when the host or the homeserver is slow,
// up a little while neither is. A busy host alone does not slow the hurried lane,
// since that saves no work and events would wait; and that lane falls less and
// rises sooner, since an event that is queued for a thousand destinations keeps
// the homeserver busy for a moment anyway.
func (p *Pacer) adjust(now sched.Time) {
	if now.Sub(p.adjusted) < adjustEvery {
		return
	}
	p.adjusted = now
	host, homeserver := p.strain(now)
	p.level = moved(p.level, max(host, homeserver), 2, climb)
	p.haste = moved(p.haste, homeserver, 4, 2*climb)
}

// moved is a level after one step: less by one part in so many, or more by rise.
func moved(level int64, s strain, part, rise int64) int64 {
	switch s {
	case strainHigh:
		return level * (part - 1) / part
	case strainNone:
		return min(level+rise, 1000)
	}
	return level
}

type strain int8

const (
	strainNone strain = iota
	strainSome
	strainHigh
)

// strain says how busy the host and the homeserver are.
func (p *Pacer) strain(now sched.Time) (host, homeserver strain) {
	if p.pressed != 0 && now.Sub(p.pressed) < pressureAge {
		switch {
		case p.pressure >= highPressure:
			host = strainHigh
		case p.pressure > lowPressure:
			host = strainSome
		}
	}
	if delay, known := p.delay(now); known {
		switch {
		case delay >= slowReturn:
			homeserver = strainHigh
		case delay > quickReturn:
			homeserver = strainSome
		}
	}
	return host, homeserver
}

// delay estimates how long Synapse's reactor takes to get to a thing; it is not
// known when there were too few returns lately.
func (p *Pacer) delay(now sched.Time) (least time.Duration, known bool) {
	n := 0
	for _, r := range p.returns {
		if r.at != 0 && now.Sub(r.at) <= returnAge {
			if n == 0 || r.after < least {
				least = r.after
			}
			n++
		}
	}
	return least, n >= len(p.returns)/2
}

func (p *Pacer) countArrival(now sched.Time) {
	p.countArrivals(now)
	p.arriving++
}

func (p *Pacer) countArrivals(now sched.Time) {
	if s := now - now%sched.Time(time.Second); s != p.second {
		p.arrivals = 0
		if s.Sub(p.second) == time.Second {
			p.arrivals = p.arriving
		}
		p.second, p.arriving = s, 0
	}
}

// Check recounts what the Pacer keeps running totals of, after a Release, and
// returns the first disagreement. It is for tests.
func (p *Pacer) Check(now sched.Time) error {
	n := 0
	for id := range p.lanes {
		l := &p.lanes[id]
		n += l.heap.Len()
		aged := 0
		for _, c := range l.aged {
			aged += int(c)
		}
		if aged != l.heap.Len() {
			return fmt.Errorf("lane %v: %d answers by age, %d in order", paceLaneID(id), aged, l.heap.Len())
		}
		if since, ok := l.heap.Next(); ok && now.Sub(since) >= p.hold(paceLaneID(id), now) {
			return fmt.Errorf("an answer in lane %v is held for %v, %v at most", paceLaneID(id), now.Sub(since), p.hold(paceLaneID(id), now))
		}
	}
	if n != len(p.held) || n > int(p.cfg.MaxHeld) {
		return fmt.Errorf("%d answers in the lanes, %d held of %d", n, len(p.held), p.cfg.MaxHeld)
	}
	if len(p.rooms.dests) != p.rooms.idle.Len()+n {
		return fmt.Errorf("%d destinations, %d idle and %d held", len(p.rooms.dests), p.rooms.idle.Len(), n)
	}
	return p.rooms.check()
}

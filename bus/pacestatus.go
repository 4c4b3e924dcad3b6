package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// PaceStatus is the state of a Pacer at one moment, for people and metrics.
type PaceStatus struct {
	Ack       AckPace
	Held      int // answers, of at most MaxHeld
	MaxHeld   int
	Lanes     [numPaceLanes]PaceLaneStatus
	Oldest    time.Duration // since the oldest answer was held
	Hold      time.Duration // how long it may be at most
	Why       string        // why the pace is what it is, in words
	Pressure  int32         // as Pressure was told last, in 1/100 %
	Delay     time.Duration // of the homeserver's reactor, estimated; 0: not known
	Arrivals  int64         // transactions in the last full second
	Rooms     int           // of which destinations are known
	Dests     int
	Links     int // of a destination to a room
	Bytes     sched.Bytes
	MaxBytes  sched.Bytes
	Counts    PaceCounts
	Strangers int // destinations of which no room is known
}

// PaceLaneStatus is one lane of held answers.
type PaceLaneStatus struct {
	Name   string
	Held   int
	Oldest time.Duration
	// Pace is how many answers are given in a thousand seconds.
	Pace int64
}

// Status returns the state.
func (p *Pacer) Status(now sched.Time) PaceStatus {
	s := PaceStatus{
		Ack:       p.cfg.Ack,
		Held:      len(p.held),
		MaxHeld:   int(p.cfg.MaxHeld),
		Hold:      p.hold(laneSteady, now),
		Pressure:  p.pressure,
		Arrivals:  p.arrivals,
		Rooms:     len(p.rooms.byID),
		Dests:     len(p.rooms.dests),
		Links:     p.rooms.links,
		Bytes:     p.rooms.bytes,
		MaxBytes:  p.rooms.maxBytes,
		Counts:    p.counts,
		Strangers: len(p.rooms.strange.links),
	}
	if d, known := p.delay(now); known {
		s.Delay = d
	}
	for id := range p.lanes {
		l := &p.lanes[id]
		st := PaceLaneStatus{Name: paceLaneID(id).String(), Held: l.heap.Len()}
		st.Pace, _ = p.pace(paceLaneID(id), now)
		if since, ok := l.heap.Next(); ok {
			st.Oldest = now.Sub(since)
		}
		s.Lanes[id] = st
	}
	if _, since, ok := p.oldest(); ok {
		s.Oldest = now.Sub(since)
	}
	s.Why = p.why(now)
	return s
}

func (p *Pacer) why(now sched.Time) string {
	steady := p.lanes[laneSteady].heap.Len()
	switch pace, _ := p.pace(laneSteady, now); {
	case p.drainBy != 0:
		return "fsbus is stopping, every answer is given"
	case p.cfg.Ack == AckOff:
		return `ack_pace is "off", nothing is held`
	case pace > p.rate(laneSteady):
		return fmt.Sprintf("%d answers are held and each must be given within %v", steady, p.cfg.Hold)
	case pace < p.rate(laneSteady):
		return fmt.Sprintf("%d answers behind which an event probably waits come first", p.lanes[laneHurried].heap.Len())
	case p.cfg.Ack > 0:
		return fmt.Sprintf("ack_pace is %d", p.cfg.Ack)
	}
	host, homeserver := p.strain(now)
	switch delay, _ := p.delay(now); {
	case homeserver == strainHigh:
		return fmt.Sprintf("the homeserver is busy (it takes %v for the next thing)", delay.Round(time.Millisecond))
	case host == strainHigh:
		return fmt.Sprintf("the host is busy (tasks waited for a processor for %d.%02d %% of the time)", p.pressure/100, p.pressure%100)
	case host == strainSome || homeserver == strainSome:
		return "the host or the homeserver is somewhat busy, the pace stays"
	}
	if p.level == 1000 {
		return "neither the host nor the homeserver is busy, the pace is at its ceiling"
	}
	return "neither the host nor the homeserver is busy, the pace rises"
}

// PaceDest is what a Pacer knows of one destination.
type PaceDest struct {
	Held  bool
	Req   ReqID         // whose answer is held
	For   time.Duration // how long it has been
	Lane  string
	Why   string // why the answer is held or would be, in words
	Rooms int    // that it is known to be in
}

// Explain tells about one destination; ok is false if nothing is known of it.
func (p *Pacer) Explain(now sched.Time, name matrix.ServerName) (e PaceDest, ok bool) {
	d := p.rooms.dests[name]
	if d == nil {
		return PaceDest{}, false
	}
	lane := p.laneFor(now, d, PaceTxn{})
	if d.held != nil {
		lane = d.held.lane
		e = PaceDest{Held: true, Req: d.held.req, For: now.Sub(d.held.since)}
	}
	e.Lane = lane.String()
	for _, l := range d.links {
		if l.room != &p.rooms.strange {
			e.Rooms++
		}
	}
	switch {
	case p.cfg.Ack == AckOff:
		e.Why = `ack_pace is "off", nothing is held`
	case lane == laneAway:
		e.Why = "it cannot be reached, so the answer is in nobody's way"
	case lane == lanePrompt && d.talkUntil > now:
		e.Why = "an event of a small room passed lately, so it is answered at once"
	case lane == lanePrompt:
		e.Why = "its rooms are small, so it is answered at once"
	case lane == laneHurried:
		e.Why = "an event of one of its rooms probably waits behind the answer, so it is given soon"
	case d.onlySmall(now):
		e.Why = "its rooms are small, but answering all such destinations at once would be too many"
	case e.Rooms == 0:
		e.Why = "no room of it is known yet, so it is answered at the steady pace"
	default:
		e.Why = "it is in a large room, so it is answered at the steady pace"
	}
	return e, true
}

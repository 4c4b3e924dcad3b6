package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Acks decides when the transactions of a modelled Synapse are answered.
// *bus.Pacer is one.
type Acks interface {
	Held(now sched.Time, req bus.ReqID, dest matrix.ServerName, t bus.PaceTxn)
	Release(now sched.Time, out []bus.ReqID) []bus.ReqID
	NextWake(now sched.Time) (sched.Time, bool)
}

// SenderCosts is what things cost a Synapse, in time of its one core. What runs
// on its reactor is cut into turns; each turn waits behind all that were ready
// before it. That alone makes a client's request slow while a thousand
// destinations have a turn each, so the number of turns matters as much as
// what they cost.
type SenderCosts struct {
	// Before and After are the turns of a transaction until its request is on
	// its way and after its answer has come; TxnTurn is what each costs.
	Before, After int
	TxnTurn       time.Duration
	// Queue is what it costs to queue an EDU for one destination, Event an
	// event. Each fan-out is a single turn.
	Queue, Event time.Duration
	// ClientTurn is what a turn of a client's request costs; the others are
	// how many turns a request takes.
	ClientTurn                             time.Duration
	Send, Sync, Presence, Typing, Receipts int
	// Idle is spent in each second whatever happens.
	Idle time.Duration
}

// SenderLoad is what the users do.
type SenderLoad struct {
	Destinations int           // of the large room
	Length       time.Duration // of the scenario

	// The storm of lab/baseline.py S4.
	Users         int           // whose presence flips and who send receipts
	PresenceEvery time.Duration // of each user; 0: never
	Typists       int
	TypingEvery   time.Duration
	MessageEvery  time.Duration // to the large room; 0: only the first, at one second

	// LocalEvery is how often the measured client sends to a room that no
	// other server is in.
	LocalEvery time.Duration
	// TalkEvery is how often somebody writes to a room with one other server;
	// 0: never. That server is in the large room, too, if TalkInRoom is set.
	TalkEvery  time.Duration
	TalkInRoom bool
	// Lead is how long the conversation has gone on when the rest begins.
	Lead time.Duration
	// Pressure is told to the Acks each second if they want to know, in 1/100 %.
	Pressure int32
}

// SenderResult is what a scenario came to.
type SenderResult struct {
	Transactions, WithoutPDUs int
	CPU                       time.Duration
	Client                    Spread // sends of the local client
	PDU                       Spread // from an event's making to its handing over, large room
	Talk                      Spread // the same in the room with one other server
	EDU                       Spread // presence, typing and receipts, those that were not superseded
	HeldMax                   int
	Held                      Spread // how long answers were held
	Missing                   int    // PDUs not handed over by the end, of events older than a minute
}

// Spread is a distribution.
type Spread struct {
	N                  int
	P50, P90, P99, Max time.Duration
}

func spread(d []time.Duration) Spread {
	if len(d) == 0 {
		return Spread{}
	}
	slices.Sort(d)
	at := func(thousandths int) time.Duration { return d[thousandths*(len(d)-1)/1000] }
	return Spread{len(d), at(500), at(900), at(990), at(1000)}
}

// Sender models Synapse's federation sender and the reactor that it shares with
// the clients: one transaction in flight for each destination, what comes
// meanwhile waits and merges (synapse/federation/sender/per_destination_queue.py),
// presence wakes one destination at a time (_DestinationWakeupQueue).
type Sender struct {
	costs SenderCosts
	load  SenderLoad
	acks  Acks
	rng   *rand.Rand

	now    sched.Time
	timers sched.Timers[func()]
	ready  sched.FIFO[turn]
	busy   bool
	wake   *sched.Timer[func()] // for acks

	dests   []*senderDest
	queue   sched.FIFO[*senderDest] // of _DestinationWakeupQueue
	waking  bool
	events  []sched.Time // when each event was made
	talks   []sched.Time
	flying  map[bus.ReqID]*senderDest
	nextReq bus.ReqID
	out     []bus.ReqID

	result                       SenderResult
	client, pdu, talk, edu, held []time.Duration
}

type turn struct {
	cost time.Duration
	then func()
}

// senderDest is a PerDestinationQueue.
type senderDest struct {
	name    matrix.ServerName
	inRoom  bool // the large one
	inTalk  bool
	running bool // a transaction is in flight or being built
	fresh   bool // _new_data_to_send
	queued  bool // in the wake-up queue
	heldAt  sched.Time

	events, talks []int // pending
	edus          [numEDUs][]sched.Time
	pending       int // of edus
	presence      int
}

const (
	eduPresence = iota
	eduTyping
	eduReceipt
	numEDUs
)

const (
	largeRoom, talkRoom = "!large:sim", "!talk:sim"
	maxPresence         = 50 // states in a transaction
	maxWakeDelay        = 20 * time.Millisecond
	maxWakeQueue        = 30 * time.Second
	wire                = time.Millisecond // from Synapse to the bus
)

// NewSender returns a model of a Synapse at time zero. Its randomness, a
// quarter more or less on each turn's cost, comes from rng.
func NewSender(costs SenderCosts, load SenderLoad, acks Acks, rng *rand.Rand) *Sender {
	s := &Sender{costs: costs, load: load, acks: acks, rng: rng, flying: make(map[bus.ReqID]*senderDest), now: sched.Time(time.Hour)} // any moment but 0, which is never
	add := func(name string, inRoom, inTalk bool) {
		d := &senderDest{name: matrix.ServerName(name), inRoom: inRoom, inTalk: inTalk}
		d.edus[eduPresence] = make([]sched.Time, load.Users)
		d.edus[eduTyping] = make([]sched.Time, load.Typists)
		d.edus[eduReceipt] = make([]sched.Time, load.Users)
		s.dests = append(s.dests, d)
	}
	for i := range load.Destinations {
		add(fmt.Sprintf("s%d.sim", i), true, false)
	}
	if load.TalkEvery > 0 {
		add("talk.sim", load.TalkInRoom, true)
	}
	return s
}

// Run plays the scenario and returns what it came to.
func (s *Sender) Run() SenderResult {
	start := s.now
	end := start.Add(s.load.Lead + s.load.Length)
	s.drive(end)
	for {
		at, ok := s.timers.Next()
		if !ok || at >= end {
			break
		}
		s.now = at
		then, _ := s.timers.Due(at)
		then()
	}
	s.now = end
	for _, d := range s.dests {
		for _, e := range d.events {
			if end.Sub(s.events[e]) > time.Minute {
				s.result.Missing++
			}
		}
	}
	r := s.result
	r.Client, r.PDU, r.Talk, r.EDU, r.Held = spread(s.client), spread(s.pdu), spread(s.talk), spread(s.edu), spread(s.held)
	return r
}

// after calls f in d.
func (s *Sender) after(d time.Duration, f func()) { s.timers.Set(s.now.Add(d), f) }

// turn queues a turn on the reactor; then runs at its end.
func (s *Sender) turn(cost time.Duration, then func()) {
	if cost > 0 {
		cost = cost*3/4 + time.Duration(s.rng.Int64N(int64(cost/2)+1))
	}
	s.ready.Push(turn{cost, then})
	if !s.busy {
		s.react()
	}
}

func (s *Sender) react() {
	t, ok := s.ready.Pop()
	s.busy = ok
	if !ok {
		return
	}
	s.result.CPU += t.cost
	s.after(t.cost, func() {
		t.then()
		s.react()
	})
}

// turns queues n turns one after the other, then then.
func (s *Sender) turns(n int, cost time.Duration, then func()) {
	if n == 0 {
		then()
		return
	}
	s.turn(cost, func() { s.turns(n-1, cost, then) })
}

// attempt is attempt_new_transaction.
func (s *Sender) attempt(d *senderDest) {
	d.fresh = true
	if !d.running {
		d.running = true
		s.transmit(d)
	}
}

func (s *Sender) transmit(d *senderDest) {
	d.fresh = false
	if len(d.events)+len(d.talks)+d.pending == 0 {
		d.running = false
		return
	}
	s.turns(s.costs.Before, s.costs.TxnTurn, func() { s.send(d) })
}

// send takes what a transaction holds and hands it to the bus.
func (s *Sender) send(d *senderDest) {
	var t bus.PaceTxn
	s.result.Transactions++
	if len(d.events)+len(d.talks) == 0 {
		s.result.WithoutPDUs++
	}
	handed := s.now.Add(wire)
	take := func(pending []int, room string, made []sched.Time, delays *[]time.Duration) []int {
		n := min(len(pending), matrix.MaxPDUs-len(t.PDUs))
		for _, e := range pending[:n] {
			t.PDUs = append(t.PDUs, bus.PaceMark{Room: room, Mark: uint64(e)})
			*delays = append(*delays, handed.Sub(made[e]))
		}
		return pending[n:]
	}
	d.talks = take(d.talks, talkRoom, s.talks, &s.talk)
	d.events = take(d.events, largeRoom, s.events, &s.pdu)
	states := 0
	for kind := range d.edus {
		for i, made := range d.edus[kind] {
			if made == 0 || kind == eduPresence && states == maxPresence {
				continue
			}
			if kind == eduPresence {
				states++
			} else if len(t.Rooms) == 0 {
				t.Rooms = []string{largeRoom}
			}
			s.edu = append(s.edu, handed.Sub(made))
			d.edus[kind][i] = 0
			d.pending--
		}
	}
	s.nextReq++
	req := s.nextReq
	s.after(wire, func() {
		d.heldAt = s.now
		s.flying[req] = d
		s.result.HeldMax = max(s.result.HeldMax, len(s.flying))
		s.acks.Held(s.now, req, d.name, t)
		s.release()
	})
}

// release lets the acks answer, and comes back when they want.
func (s *Sender) release() {
	s.out = s.acks.Release(s.now, s.out[:0])
	for _, req := range s.out {
		d := s.flying[req]
		if d == nil {
			panic(fmt.Sprintf("sim: request %d was answered, %d are in flight", req, len(s.flying)))
		}
		delete(s.flying, req)
		s.held = append(s.held, s.now.Sub(d.heldAt))
		s.after(wire, func() { s.turns(s.costs.After, s.costs.TxnTurn, func() { s.transmit(d) }) })
	}
	s.timers.Stop(s.wake)
	if at, ok := s.acks.NextWake(s.now); ok {
		s.wake = s.timers.Set(max(at, s.now.Add(100*time.Microsecond)), func() { s.release() })
	}
}

// notify queues an EDU for every destination of the large room.
func (s *Sender) notify(kind, user int) {
	s.turn(s.costs.Queue*time.Duration(s.load.Destinations), func() {
		for _, d := range s.dests {
			if !d.inRoom {
				continue
			}
			if d.edus[kind][user] == 0 {
				d.pending++
			}
			d.edus[kind][user] = s.now
			if kind != eduPresence {
				s.attempt(d)
				continue
			}
			d.fresh = true
			if !d.queued {
				d.queued = true
				s.queue.Push(d)
			}
		}
		if !s.waking {
			s.waking = true
			s.wakeNext(maxWakeDelay)
		}
	})
}

// wakeNext is _DestinationWakeupQueue._handle: the pause only ever shrinks
// until the queue is empty.
func (s *Sender) wakeNext(pause time.Duration) {
	for {
		if s.queue.Len() == 0 {
			s.waking = false
			return
		}
		pause = min(pause, maxWakeQueue/time.Duration(s.queue.Len()))
		d, _ := s.queue.Pop()
		d.queued = false
		if d.fresh {
			s.attempt(d)
			s.after(pause, func() { s.wakeNext(pause) })
			return
		}
	}
}

// message is a client's send to a room with other servers; done is called when
// the client has its answer.
func (s *Sender) message(talk bool, done func()) {
	// The event is made in the first third of the request.
	first := s.costs.Send / 3
	s.turns(first, s.costs.ClientTurn, func() {
		made := &s.events
		if talk {
			made = &s.talks
		}
		*made = append(*made, s.now)
		event := len(*made) - 1
		s.turns(s.costs.Send-first, s.costs.ClientTurn, func() {
			n := 1
			if !talk {
				n = s.load.Destinations
			}
			s.turn(s.costs.Event*time.Duration(n), func() {
				for _, d := range s.dests {
					switch {
					case talk && d.inTalk:
						d.talks = append(d.talks, event)
					case !talk && d.inRoom:
						d.events = append(d.events, event)
					default:
						continue
					}
					s.attempt(d)
				}
			})
			done()
		})
	})
}

// loop calls f at start and then each time every has passed, or, when f takes
// longer than that, at the next multiple of every: the closed loop of the
// clients in lab/baseline.py. f calls its argument when it is done.
func (s *Sender) loop(start sched.Time, every time.Duration, f func(i int, done func())) {
	var at func(i int)
	at = func(i int) {
		s.timers.Set(max(start.Add(time.Duration(i)*every), s.now), func() {
			f(i, func() { at(max(i+1, int(s.now.Sub(start)/every))) })
		})
	}
	at(0)
}

// drive starts what the users do.
func (s *Sender) drive(end sched.Time) {
	l, c := s.load, s.costs
	if l.TalkEvery > 0 {
		s.loop(s.now, l.TalkEvery, func(i int, done func()) { s.message(true, done) })
	}
	start := s.now.Add(l.Lead)
	if l.PresenceEvery > 0 {
		for u := range l.Users {
			s.loop(start.Add(time.Duration(u)*l.PresenceEvery/10), l.PresenceEvery, func(i int, done func()) {
				s.turns(c.Presence, c.ClientTurn, func() { s.notify(eduPresence, u); done() })
			})
		}
	}
	if l.TypingEvery > 0 {
		for u := range l.Typists {
			s.loop(start.Add(time.Duration(u)*l.TypingEvery*13/40), l.TypingEvery, func(i int, done func()) {
				s.turns(c.Typing, c.ClientTurn, func() { s.notify(eduTyping, u); done() })
			})
		}
	}
	last := 0 // events whose sending has been answered
	every := l.MessageEvery
	if every == 0 {
		every = 2 * l.Length
	}
	s.loop(start.Add(time.Second), every, func(i int, done func()) {
		s.message(false, func() {
			last = len(s.events)
			if l.MessageEvery == 0 && l.Users > 0 {
				s.notify(eduPresence, 0) // sending makes the sender online
			}
			done()
		})
	})
	if l.PresenceEvery > 0 {
		for u := range l.Users {
			read := 0
			s.loop(start.Add(time.Duration(u)*time.Second/10), time.Second, func(i int, done func()) {
				if read == last {
					done()
					return
				}
				read = last
				s.turns(c.Receipts, c.ClientTurn, func() { s.notify(eduReceipt, u); done() })
			})
		}
	}
	// The local client's phase drifts against the messages', so that its sends
	// meet every moment of a fan-out.
	s.loop(start.Add(time.Second/2), l.LocalEvery, func(i int, done func()) {
		s.after(time.Duration(s.rng.Int64N(int64(l.LocalEvery)/2)), func() {
			began := s.now
			s.turns(c.Send, c.ClientTurn, func() {
				s.client = append(s.client, s.now.Sub(began))
				s.turns(c.Sync, c.ClientTurn, func() {})
				done()
			})
		})
	})
	s.loop(start, time.Second, func(i int, done func()) {
		s.turn(c.Idle, func() {})
		if p, ok := s.acks.(interface{ Pressure(sched.Time, int32) }); ok && l.Pressure > 0 {
			p.Pressure(s.now, l.Pressure)
		}
		done()
	})
}

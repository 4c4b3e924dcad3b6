package bus

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

const second0 = sched.Time(1e18) // when the tests begin

// pacing drives a Pacer as a loop would: it is called when something happens
// and when it asked to be.
type pacing struct {
	*testing.T
	*Pacer
	now   sched.Time
	next  ReqID
	since map[ReqID]sched.Time
	dest  map[ReqID]string
	given []ReqID
	at    []sched.Time // of given

	longest time.Duration // that an answer may be held; 0: the hold
}

func startPacing(t *testing.T, change func(*PaceConfig)) *pacing {
	cfg := DefaultPace()
	if change != nil {
		change(&cfg)
	}
	return &pacing{T: t, Pacer: NewPacer(cfg), now: second0, since: map[ReqID]sched.Time{}, dest: map[ReqID]string{}}
}

func (p *pacing) release() {
	p.Helper()
	for _, req := range p.Release(p.now, nil) {
		since, held := p.since[req]
		if !held {
			p.Fatalf("answer %d is given, which is not held", req)
		}
		if d := p.now.Sub(since); d > max(p.cfg.Hold, p.longest) {
			p.Fatalf("answer %d was held for %v, %v at most", req, d, max(p.cfg.Hold, p.longest))
		}
		delete(p.since, req)
		p.given = append(p.given, req)
		p.at = append(p.at, p.now)
	}
	if err := p.Check(p.now); err != nil {
		p.Fatal(err)
	}
	if at, ok := p.NextWake(p.now); ok && at <= p.now {
		p.Fatalf("Release at %d left something to do at %d", p.now, at)
	} else if ok != (len(p.since) > 0) {
		p.Fatalf("%d answers are held, a wake is wanted: %t", len(p.since), ok)
	}
}

// hold hands over a transaction and returns its request.
func (p *pacing) hold(dest string, t PaceTxn) ReqID {
	p.Helper()
	p.next++
	p.since[p.next], p.dest[p.next] = p.now, dest
	p.Held(p.now, p.next, matrix.ServerName(dest), t)
	p.release()
	return p.next
}

// lane hands over a transaction and returns the lane that it came to.
func (p *pacing) lane(dest string, t PaceTxn) paceLaneID {
	p.Helper()
	before := p.counts
	if h := p.held[p.hold(dest, t)]; h != nil {
		return h.lane
	}
	switch {
	case p.counts.Prompt > before.Prompt:
		return lanePrompt
	case p.counts.Hurried > before.Hurried:
		return laneHurried
	}
	return laneSteady
}

// pass lets time pass and returns what was given meanwhile.
func (p *pacing) pass(d time.Duration) []ReqID {
	p.Helper()
	n, until := len(p.given), p.now.Add(d)
	for {
		at, ok := p.NextWake(p.now)
		if !ok || at > until {
			p.now = until
			return p.given[n:]
		}
		p.now = at
		p.release()
	}
}

func event(room string, mark uint64) PaceTxn {
	return PaceTxn{PDUs: []PaceMark{{Room: room, Mark: mark}}}
}

func typing(room string) PaceTxn { return PaceTxn{Rooms: []string{room}} }

// fill makes room a large one with n destinations, all answered, and lets a
// moment pass.
func (p *pacing) fill(room string, n int) {
	p.Helper()
	for i := range n {
		p.hold(fmt.Sprintf("d%d", i), typing(room))
	}
	p.pass(time.Minute)
	if len(p.since) > 0 {
		p.Fatalf("%d answers are still held after a minute", len(p.since))
	}
	p.given, p.at = nil, nil
}

func TestPaceOffAnswersAtOnce(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = AckOff })
	for i := range 100 {
		p.hold(fmt.Sprint("d", i), PaceTxn{})
	}
	if len(p.given) != 100 || p.counts.Unheld != 100 {
		t.Errorf("%d of 100 are answered at once, %d counted", len(p.given), p.counts.Unheld)
	}
}

func TestPaceGivesOldestFirstAtThePace(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack, c.Hold = 10, 45*time.Second })
	for i := range 100 {
		p.hold(fmt.Sprint("d", i), PaceTxn{})
		p.now = p.now.Add(time.Millisecond)
	}
	p.pass(5 * time.Second)
	if n := len(p.given); n < 50 || n > 52 {
		t.Errorf("%d answers in 5 s at 10 a second", n)
	}
	if !slices.IsSorted(p.given) {
		t.Errorf("not the oldest first: %v", p.given)
	}
}

func TestPaceAnswersAtOnceWhatComesSlowerThanThePace(t *testing.T) {
	p := startPacing(t, nil)
	for i := range 50 {
		p.hold(fmt.Sprint("d", i), PaceTxn{})
		if len(p.since) != 0 {
			t.Fatalf("transaction %d waits, though they come at ten a second", i)
		}
		p.now = p.now.Add(100 * time.Millisecond)
	}
}

// As many destinations as must be answered within the hold are spread over it
// and not let go all at its end.
func TestPaceSpreadsManyOverTheHold(t *testing.T) {
	for _, n := range []int{1000, 4000} {
		p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
		for i := range n {
			p.hold(fmt.Sprint("d", i), PaceTxn{})
		}
		p.pass(p.cfg.Hold)
		if len(p.given) != n {
			t.Errorf("of %d, %d are answered when the hold is over", n, len(p.given))
		}
		most := 0
		for i, at := range p.at {
			j, _ := slices.BinarySearch(p.at, at.Add(time.Second))
			most = max(most, j-i)
		}
		if limit := max(n/10, 100); most > limit {
			t.Errorf("of %d, %d are answered within one second, want at most %d", n, most, limit)
		}
	}
}

func TestPaceEventBringsItsRoomForward(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 10 })
	p.fill("!a", 100)
	var other, here []ReqID
	for i := range 100 {
		other = append(other, p.hold(fmt.Sprint("o", i), typing("!b"))) // some at once, while !b looks small
	}
	for i := range 100 {
		here = append(here, p.hold(fmt.Sprint("d", i), typing("!a")))
	}
	p.pass(100 * time.Millisecond)
	held := len(p.since)
	p.hold("new", event("!a", 1))
	p.given = nil
	p.pass(time.Second)
	hurried, steady := 0, 0
	for _, req := range p.given {
		switch {
		case slices.Contains(here, req):
			hurried++
		case slices.Contains(other, req):
			steady++
		}
	}
	if hurried < 80 || hurried > 100 || steady > 2 {
		t.Errorf("in the second after the event, %d of its room and %d others are answered, of %d", hurried, steady, held)
	}
	if p.counts.Forward != int64(len(here)) && p.counts.Forward < 90 {
		t.Errorf("%d answers were moved", p.counts.Forward)
	}
	// The same event to another destination is no news.
	before := p.counts.Forward
	for i := range 100 {
		p.hold(fmt.Sprint("d", i), event("!a", 1))
	}
	if p.counts.Forward != before {
		t.Errorf("an event seen before moved %d answers", p.counts.Forward-before)
	}
}

func TestPaceEventReachesDestinationsOfWhichNothingIsKnown(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.fill("!a", 20)
	for i := range 5 {
		p.hold(fmt.Sprint("stranger", i), PaceTxn{})
	}
	held := len(p.since)
	p.hold("d1", event("!a", 1))
	p.pass(time.Second)
	if held != 4 || p.counts.Hurried != 4 {
		t.Errorf("of %d answers to destinations of no known room, %d were given soon after the event", held, p.counts.Hurried)
	}
}

// A transaction that was built before an event and arrives after it is in the
// way of it, too.
func TestPaceLateTransactionIsHurried(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.fill("!a", 20)
	p.hold("d1", event("!a", 7))
	p.now = p.now.Add(time.Second)
	if lane := p.lane("d2", typing("!a")); lane != laneHurried {
		t.Errorf("a transaction without the event is %v", lane)
	}
	if lane := p.lane("d3", event("!a", 7)); lane != laneSteady {
		t.Errorf("a transaction with the event is %v", lane)
	}
	p.pass(time.Minute)
	if lane := p.lane("d4", typing("!a")); lane != laneSteady {
		t.Errorf("a minute after the event, a transaction without it is %v", lane)
	}
}

func TestPaceDeviceMessagesAreHurried(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.fill("!a", 20)
	if lane := p.lane("d1", PaceTxn{Device: true}); lane != laneHurried {
		t.Errorf("device messages are %v", lane)
	}
}

func TestPaceSmallRoomsAndConversations(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.fill("!large", 50)
	at := func(req ReqID) bool { return p.held[req] == nil }
	p.hold("d40", typing("!large")) // takes the turn of this second
	if at(p.hold("d1", typing("!large"))) {
		t.Error("a destination of a large room is answered at once")
	}
	for i := range 30 {
		if !at(p.hold("friend", typing("!small"))) || !at(p.hold("friend", PaceTxn{})) {
			t.Fatalf("transaction %d to a destination of a small room waits", i)
		}
		p.pass(50 * time.Millisecond)
	}
	// In both: only while it talks.
	p.hold("d2", typing("!small"))
	p.hold("d3", typing("!large"))
	if at(p.hold("d2", typing("!large"))) {
		t.Error("a destination of a large room is answered at once, though nothing was said in the small one")
	}
	if !at(p.hold("d2", event("!small", 1))) {
		t.Error("an event of a small room waits")
	}
	p.pass(p.cfg.Talk - time.Second)
	if !at(p.hold("d2", typing("!large"))) {
		t.Error("in a conversation, an answer waits")
	}
	p.pass(2 * time.Second)
	p.hold("d4", typing("!large"))
	p.hold("d5", typing("!large"))
	if at(p.hold("d2", typing("!large"))) {
		t.Error("a conversation never ends")
	}
}

// So many destinations of small rooms that answering them at once would be a
// storm do not get in the way of a conversation.
func TestPacePromptAnswersHaveALimit(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack, c.Prompt = 1, 20 })
	for i := range 500 {
		p.hold(fmt.Sprint("d", i), typing(fmt.Sprint("!r", i)))
	}
	if n := p.counts.Prompt; n != 21 {
		t.Errorf("%d answers at once, want those of one second and one more", n)
	}
	if n := p.lanes[lanePrompt].heap.Len(); n != 3 {
		t.Errorf("%d wait for a prompt answer, want 3", n)
	}
	talk := p.hold("friend", event("!small", 1))
	p.pass(200 * time.Millisecond)
	if p.held[talk] != nil {
		t.Error("a conversation waits behind those who do not talk")
	}
}

func TestPaceHeardFromEndsAHold(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.fill("!large", 50)
	p.hold("d0", typing("!large"))
	req := p.hold("d1", typing("!large"))
	p.Pacer.Heard(p.now, "d1", "!large")
	p.release()
	if p.held[req] == nil {
		t.Error("something in a large room ended the hold")
	}
	p.Pacer.Heard(p.now, "d1", "!small")
	p.release()
	if p.held[req] != nil {
		t.Error("something in a small room did not end the hold")
	}
}

func TestPaceHeldBound(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack, c.MaxHeld = 1, 100 })
	for i := range 300 {
		p.hold(fmt.Sprint("d", i), PaceTxn{})
		if len(p.since) > 100 {
			t.Fatalf("%d are held", len(p.since))
		}
	}
	if !slices.IsSorted(p.given) || p.counts.Full != int64(len(p.given))-1 {
		t.Errorf("%d given, %d as too many; the oldest first: %v", len(p.given), p.counts.Full, p.given)
	}
}

func TestPaceSecondTransactionEndsTheFirst(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.hold("other", PaceTxn{})
	first := p.hold("d", PaceTxn{})
	second := p.hold("d", PaceTxn{})
	if p.held[first] != nil || p.held[second] == nil || p.counts.Passed != 1 {
		t.Errorf("first held %t, second held %t, %d passed", p.held[first] != nil, p.held[second] != nil, p.counts.Passed)
	}
}

func TestPaceGoneIsNotAnswered(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.hold("other", PaceTxn{})
	req := p.hold("d", PaceTxn{})
	p.Gone(p.now, req)
	p.Gone(p.now, req) // of an answer that is not held: nothing happens
	delete(p.since, req)
	p.release()
	p.pass(time.Minute)
	if slices.Contains(p.given, req) || p.counts.Gone != 1 {
		t.Errorf("given: %v, %d gone", p.given, p.counts.Gone)
	}
}

func TestPaceDrain(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	for i := range 1000 {
		p.hold(fmt.Sprint("d", i), PaceTxn{})
	}
	p.Drain(p.now.Add(5 * time.Second))
	half := len(p.pass(2500 * time.Millisecond))
	p.pass(2500 * time.Millisecond)
	if half < 400 || half > 600 || len(p.since) != 0 {
		t.Errorf("%d answers in the first half of the drain, %d left at its end", half, len(p.since))
	}
}

// The last answer is given by then as well, though the pace is a whole number.
func TestPaceDrainOfWhoIsAway(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack, c.Hold = 1, maxHold })
	p.hold("d", PaceTxn{Away: true})
	p.hold("e", PaceTxn{Away: true})
	p.Drain(p.now.Add(19900 * time.Millisecond))
	p.release()
	if len(p.since) != 1 {
		t.Fatalf("%d are held, want the second", len(p.since))
	}
	p.pass(19900 * time.Millisecond)
	if len(p.since) != 0 {
		t.Error("it is held beyond the end of the drain")
	}
}

func TestPaceReconfigured(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	for i := range 100 {
		p.hold(fmt.Sprint("d", i), PaceTxn{})
	}
	cfg := p.cfg
	cfg.MaxHeld, cfg.MaxDestinations = 10, 20
	p.Configure(cfg)
	p.release()
	if len(p.since) != 10 {
		t.Errorf("%d are held of 10", len(p.since))
	}
	cfg.Ack = AckOff
	p.Configure(cfg)
	p.cfg.Hold = time.Hour // pacing.release must not mind
	p.release()
	if len(p.since) != 0 {
		t.Errorf("%d are held though the pace is off", len(p.since))
	}
}

func TestPaceAuto(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Floor, c.Ceiling = 10, 100 })
	pace := func() int64 { return p.Status(p.now).Lanes[laneSteady].Pace }
	press := func(hundredths int32, d time.Duration) {
		for range d / (250 * time.Millisecond) {
			p.Pressure(p.now, hundredths)
			p.now = p.now.Add(250 * time.Millisecond)
			p.release()
		}
	}
	if pace() != 100_000 {
		t.Errorf("it begins at %d thousandths a second, want the ceiling", pace())
	}
	press(8000, 10*time.Second)
	if hurried := p.Status(p.now).Lanes[laneHurried].Pace; hurried != 100_000*int64(p.cfg.Hurry) {
		t.Errorf("on a busy host the hurried pace is %d, want no change", hurried)
	}
	if pace() != 10_000 || !strings.Contains(p.Status(p.now).Why, "80.00 %") {
		t.Errorf("on a busy host: %d, %q; want the floor", pace(), p.Status(p.now).Why)
	}
	press(3000, 10*time.Second)
	if pace() != 10_000 {
		t.Errorf("on a somewhat busy host: %d, want no change", pace())
	}
	press(0, 5*time.Second)
	if pace() <= 10_000 || pace() >= 100_000 {
		t.Errorf("5 s after it became quiet: %d, want a climb", pace())
	}
	press(0, 10*time.Second)
	if pace() != 100_000 {
		t.Errorf("15 s after it became quiet: %d, want the ceiling", pace())
	}
	// Pressure that nobody has told for long counts for nothing.
	p.Pressure(p.now, 9000)
	p.now = p.now.Add(pressureAge)
	p.release()
	if pace() != 100_000 {
		t.Errorf("pressure of half a minute ago: %d, want the ceiling", pace())
	}
	// A homeserver that comes back late after each answer.
	due := sched.Timers[string]{}
	for i := range 30 {
		due.Set(p.now, fmt.Sprint("d", i))
	}
	for range 1500 {
		n := len(p.given)
		p.pass(10 * time.Millisecond)
		for {
			dest, ok := due.Due(p.now)
			if !ok {
				break
			}
			p.hold(dest, PaceTxn{})
		}
		for i, req := range p.given[n:] {
			due.Set(p.at[n+i].Add(200*time.Millisecond), p.dest[req])
		}
	}
	if hurried := p.Status(p.now).Lanes[laneHurried].Pace; hurried > 200_000 {
		t.Errorf("with a slow homeserver the hurried pace is %d", hurried)
	}
	if pace() > 20_000 || !strings.Contains(p.Status(p.now).Why, "homeserver is busy") {
		t.Errorf("with a slow homeserver: %d, %q; want about the floor", pace(), p.Status(p.now).Why)
	}
}

// What is remembered of rooms stays within its bounds, each of which is
// reached, and destinations with held answers are never forgotten.
func TestPaceMemoryBounds(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*PaceConfig)
		rooms  int
		dests  int
	}{
		{"rooms", func(c *PaceConfig) { c.MaxRooms = 5 }, 50, 50},
		{"destinations", func(c *PaceConfig) { c.MaxDestinations, c.MaxHeld = 30, 20 }, 10, 300},
		{"bytes", func(c *PaceConfig) {
			c.MaxDestinations, c.MaxHeld, c.MaxBytes = 100, 50, 100*destCost+roomCost+20*linkCost
		}, 3, 300},
		{"rooms of a destination", nil, maxDestRooms + 50, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startPacing(t, tt.change)
			rng := rand.New(rand.NewPCG(1, 0))
			var most rooms
			links := 0
			for i := range 5000 {
				p.hold(fmt.Sprint("d", rng.IntN(tt.dests)), event(fmt.Sprint("!r", i%tt.rooms), uint64(i)))
				p.now = p.now.Add(time.Duration(rng.IntN(int(10 * time.Millisecond))))
				most.bytes = max(most.bytes, p.rooms.bytes)
				most.maxRooms = max(most.maxRooms, len(p.rooms.byID))
				most.maxDests = max(most.maxDests, len(p.rooms.dests))
				if d := p.rooms.dests["d0"]; d != nil {
					links = max(links, len(d.links))
				}
			}
			switch tt.name {
			case "rooms":
				if most.maxRooms != 5 {
					t.Errorf("%d rooms, want 5", most.maxRooms)
				}
			case "destinations":
				if most.maxDests != 30 {
					t.Errorf("%d destinations, want 30", most.maxDests)
				}
			case "bytes":
				if most.bytes <= p.cfg.MaxBytes-linkCost {
					t.Errorf("%d bytes, want about %d", most.bytes, p.cfg.MaxBytes)
				}
			default:
				if links != maxDestRooms {
					t.Errorf("%d rooms of one destination, want %d", links, maxDestRooms)
				}
			}
		})
	}
	p := startPacing(t, nil)
	p.hold("d", event(strings.Repeat("x", maxRoomID+1), 1))
	p.hold("d", event("", 2))
	if len(p.rooms.byID) != 0 {
		t.Errorf("%d rooms are remembered of names that are none", len(p.rooms.byID))
	}
}

// Whatever happens, each answer is given once, in time, or the homeserver gave
// it up; and a seed replays.
func TestPaceRandom(t *testing.T) {
	play := func(seed uint64) (log []string) {
		rng := rand.New(rand.NewPCG(seed, 0))
		p := startPacing(t, func(c *PaceConfig) {
			c.Ack = []AckPace{AckAuto, AckOff, 1, 30, 1000}[rng.IntN(5)]
			c.Hold = time.Duration(1+rng.IntN(45)) * time.Second
			c.MaxHeld = 1 + rng.Int32N(60)
			c.MaxDestinations = c.MaxHeld + 1 + rng.Int32N(30)
			c.MaxRooms = 1 + rng.Int32N(10)
			c.SmallRoom = 1 + rng.Int32N(5)
			c.MaxBytes = sched.Bytes(c.MaxDestinations)*destCost + roomCost + sched.Bytes(rng.IntN(100))*linkCost
		})
		mark := uint64(0)
		for range 600 {
			room := fmt.Sprint("!r", rng.IntN(12))
			dest := fmt.Sprint("d", rng.IntN(80))
			switch rng.IntN(12) {
			case 0:
				mark++
				p.hold(dest, event(room, mark))
			case 1, 2:
				p.hold(dest, event(room, mark-uint64(rng.IntN(int(min(mark, 12)+1)))))
			case 3, 4, 5:
				p.hold(dest, typing(room))
			case 6, 7:
				p.hold(dest, PaceTxn{Device: rng.IntN(5) == 0})
			case 8:
				p.Pacer.Heard(p.now, matrix.ServerName(dest), room)
				p.release()
			case 9:
				p.Pressure(p.now, rng.Int32N(10001))
			case 10:
				if req := ReqID(rng.Uint64N(uint64(p.next) + 1)); p.since[req] != 0 {
					p.Gone(p.now, req)
					delete(p.since, req)
					p.release()
				}
			case 11:
				p.pass(time.Duration(rng.Int64N(int64(3 * time.Second))))
			}
			if rng.IntN(20) == 0 {
				p.now = p.now.Add(time.Duration(rng.Int64N(int64(time.Second))))
				if at, ok := p.NextWake(p.now); ok && at <= p.now {
					// A loop that was late: what is due is given, however long it
					// was held.
					for _, req := range p.Release(p.now, nil) {
						delete(p.since, req)
						p.given = append(p.given, req)
					}
				}
			}
		}
		p.pass(p.cfg.Hold)
		if len(p.since) != 0 {
			t.Fatalf("seed %d: %d answers are never given", seed, len(p.since))
		}
		return append(log, fmt.Sprint(p.given, p.counts))
	}
	for seed := range uint64(60) {
		if a, b := play(seed), play(seed); !slices.Equal(a, b) {
			t.Fatalf("seed %d does not replay:\n%v\n%v", seed, a, b)
		}
	}
}

func TestPaceStatusAndExplain(t *testing.T) {
	p := startPacing(t, nil)
	p.fill("!a", 100)
	for i := range 100 {
		p.hold(fmt.Sprint("d", i), typing("!a"))
	}
	p.now = p.now.Add(time.Second)
	s := p.Status(p.now)
	if s.Held != 99 || s.Lanes[laneSteady].Held != 99 || s.Oldest != time.Second || s.Arrivals != 0 || s.Rooms != 1 || s.Links != 100 || s.Why == "" {
		t.Errorf("Status = %+v", s)
	}
	if e, ok := p.Explain(p.now, "d50"); !ok || !e.Held || e.For != time.Second || e.Lane != "steady" || e.Rooms != 1 || !strings.Contains(e.Why, "large room") {
		t.Errorf("Explain = %+v, %t", e, ok)
	}
	if _, ok := p.Explain(p.now, "nobody"); ok {
		t.Error("something is known of a destination that never came")
	}
}

// Each state has its words.
func TestPaceSaysWhy(t *testing.T) {
	explain := func(p *pacing, name matrix.ServerName) string {
		e, ok := p.Explain(p.now, name)
		if !ok {
			return "unknown"
		}
		return e.Why
	}
	many := func(p *pacing) {
		for i := range 100 {
			p.hold(fmt.Sprint("d", i), typing("!a"))
		}
	}
	for _, tt := range []struct {
		name          string
		change        func(*PaceConfig)
		do            func(*pacing)
		status, dest1 string
	}{
		{"off", func(c *PaceConfig) { c.Ack = AckOff }, func(p *pacing) {}, `"off"`, "unknown"},
		{"number", func(c *PaceConfig) { c.Ack = 5 }, many, "ack_pace is 5", "large room"},
		{"must be given", func(c *PaceConfig) { c.Ack = 1 }, func(p *pacing) { many(p); p.pass(5 * time.Second) }, "must be given within", "large room"},
		{"event", func(c *PaceConfig) { c.Ack = 1 }, func(p *pacing) { many(p); p.hold("new", event("!a", 1)) }, "behind which an event", "probably waits"},
		{"draining", nil, func(p *pacing) { many(p); p.Drain(p.now.Add(time.Second)) }, "stopping", "large room"},
		{"somewhat busy", nil, func(p *pacing) { many(p); p.Pressure(p.now, 3000) }, "somewhat busy", "large room"},
		{"rising", nil, func(p *pacing) {
			p.Pressure(p.now, 9000)
			p.now = p.now.Add(time.Second)
			p.release()
			p.Pressure(p.now, 0)
		}, "rises", "unknown"},
		{"ceiling", nil, many, "ceiling", "large room"},
		{"stranger", nil, func(p *pacing) { p.hold("d50", PaceTxn{}) }, "ceiling", "no room of it"},
		{"small room", nil, func(p *pacing) { p.hold("d50", typing("!b")) }, "ceiling", "its rooms are small, so"},
		{"too many small rooms", func(c *PaceConfig) { c.Prompt = 1 }, func(p *pacing) {
			for i := range 4 {
				p.hold(fmt.Sprint("o", i), typing("!b"))
			}
			p.hold("d50", typing("!b"))
		}, "ceiling", "too many"},
		{"conversation", nil, func(p *pacing) { p.hold("d50", event("!b", 1)) }, "ceiling", "of a small room passed"},
	} {
		p := startPacing(t, tt.change)
		tt.do(p)
		if why := p.Status(p.now).Why; !strings.Contains(why, tt.status) {
			t.Errorf("%s: Status says %q, want %q", tt.name, why, tt.status)
		}
		if why := explain(p, "d50"); !strings.Contains(why, tt.dest1) {
			t.Errorf("%s: Explain says %q, want %q", tt.name, why, tt.dest1)
		}
	}
}

// What is counted for the memory of rooms is no less than what it takes.
func TestPaceMemoryIsCounted(t *testing.T) {
	cfg := DefaultPace()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	p := NewPacer(cfg)
	now, n := second0, ReqID(0)
	for i := range 1000 {
		for j := range 20 {
			n++
			p.Held(now, n, matrix.ServerName(fmt.Sprintf("matrix-%d.some-domain.example", i)), event(fmt.Sprintf("!AbCdEfGhIjKlMnOpQr%d:some-domain.example", (i*7+j)%1500), uint64(n)))
			now = now.Add(time.Second)
			p.Release(now, nil)
		}
	}
	now = now.Add(time.Minute)
	p.Release(now, nil)
	runtime.GC()
	runtime.ReadMemStats(&after)
	took, s := int64(after.HeapAlloc)-int64(before.HeapAlloc), p.Status(now)
	if s.Dests != 1000 || s.Rooms != 1500 || took > int64(s.Bytes) {
		t.Errorf("%d destinations in %d rooms, %d links: %d bytes, counted %d", s.Dests, s.Rooms, s.Links, took, s.Bytes)
	}
	runtime.KeepAlive(p)
}

func TestPaceHeldTwicePanics(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 1 })
	p.hold("a", PaceTxn{})
	req := p.hold("b", PaceTxn{})
	defer func() {
		if recover() == nil {
			t.Error("a request was held twice without a panic")
		}
	}()
	p.Held(p.now, req, "c", PaceTxn{})
}

func TestAckPaceText(t *testing.T) {
	for _, s := range []string{"auto", "off", "1", "25", "10000"} {
		var a AckPace
		if err := a.UnmarshalText([]byte(s)); err != nil || a.String() != s {
			t.Errorf("%q is read as %v, %v", s, a, err)
		}
	}
	for _, s := range []string{"", "on", "0", "-1", "+5", "2.5", "10001", "25/s", "AUTO"} {
		var a AckPace
		if err := a.UnmarshalText([]byte(s)); !errors.Is(err, ErrAckPace) {
			t.Errorf("%q is read as %v, %v; want ErrAckPace", s, a, err)
		}
	}
}

func TestPaceConfigValidate(t *testing.T) {
	if err := DefaultPace().Validate(); err != nil {
		t.Errorf("the default: %v", err)
	}
	for name, change := range map[string]func(*PaceConfig){
		"ack_pace":         func(c *PaceConfig) { c.Ack = -2 },
		"ack_pace_floor":   func(c *PaceConfig) { c.Floor = 0 },
		"ack_pace_ceiling": func(c *PaceConfig) { c.Ceiling = c.Floor - 1 },
		"ack_hurry":        func(c *PaceConfig) { c.Hurry = 0 },
		"ack_hold":         func(c *PaceConfig) { c.Hold = 46 * time.Second },
		"ack_held":         func(c *PaceConfig) { c.MaxHeld = 0 },
		"ack_small_room":   func(c *PaceConfig) { c.SmallRoom = 0 },
		"ack_talk":         func(c *PaceConfig) { c.Talk = -1 },
		"ack_prompt":       func(c *PaceConfig) { c.Prompt = 0 },
		"ack_rooms":        func(c *PaceConfig) { c.MaxRooms = 0 },
		"ack_destinations": func(c *PaceConfig) { c.MaxDestinations = c.MaxHeld },
		"ack_memory":       func(c *PaceConfig) { c.MaxBytes = 1 },
	} {
		c := DefaultPace()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: Validate = %v", name, err)
		}
	}
}

// BenchmarkPace is a storm in a room of 4,000: the cost of one transaction.
func BenchmarkPace(b *testing.B) {
	p := NewPacer(DefaultPace())
	now := second0
	names := make([]matrix.ServerName, 4000)
	for i := range names {
		names[i] = matrix.ServerName(fmt.Sprint("d", i))
	}
	var out []ReqID
	rooms := []string{"!a"}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		txn := PaceTxn{Rooms: rooms}
		if i%4000 == 0 {
			txn.PDUs = []PaceMark{{"!a", uint64(i)}}
		}
		p.Held(now, ReqID(i), names[i%4000], txn)
		out = p.Release(now, out[:0])
		now = now.Add(4 * time.Millisecond)
	}
}

// Who cannot be reached is answered last, and not before twice the hold is over; an
// event of its room changes nothing. When it is back what it may have missed comes
// soon.
func TestPaceAwayComesLast(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack, c.Hold = 10, 20*time.Second })
	p.longest = 40 * time.Second
	p.fill("!big", 30)
	away := typing("!big")
	away.Away = true
	for _, d := range []string{"d0", "d1"} {
		if got := p.lane(d, away); got != laneAway {
			t.Errorf("%s is in lane %v", d, got)
		}
	}
	p.hold("d2", event("!big", 1)) // its news goes past those that are away
	p.pass(39 * time.Second)
	if len(p.given) != 1 || p.dest[p.given[0]] != "d2" {
		t.Errorf("%d answers are given while two are away, want that of d2", len(p.given))
	}
	if given := p.pass(time.Second); len(given) != 2 || p.counts.Away != 2 || p.counts.Late != 0 {
		t.Errorf("%d are given in the end, %+v", len(given), p.counts)
	}

	p.hold("d0", away)
	p.hold("d1", away)
	p.Reach(p.now, "d0", false)
	if h := p.rooms.dests["d0"].held; h.lane != laneHurried {
		t.Errorf("back, its answer is in lane %v", h.lane)
	}
	if given := p.pass(time.Second); len(given) != 1 || p.dest[given[0]] != "d0" {
		t.Errorf("given: %v, want that of d0", given)
	}
	p.Reach(p.now, "d2", true)
	p.hold("d3", typing("!big")) // takes the turn
	if got := p.lane("d2", typing("!big")); got != laneSteady {
		t.Errorf("Held knows better than an older Reach, but the answer is in lane %v", got)
	}
	p.Reach(p.now, "d2", true)
	if h := p.rooms.dests["d2"].held; h == nil || h.lane != laneAway {
		t.Error("what is held when it cannot be reached any more is not in the lane for that")
	}
	p.Reach(p.now, "nobody", true) // is not remembered for that
	if p.rooms.dests["nobody"] != nil {
		t.Error("a destination is known of which no answer was ever held")
	}
}

// A slow destination gets an event of a large room before the others.
func TestPaceSlowOnesGetAnEventFirst(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.Ack = 10 })
	p.fill("!big", 30)
	for i := range 29 {
		x := typing("!big")
		x.Slow = i >= 27
		p.hold(fmt.Sprint("d", i), x)
	}
	n := len(p.given)
	p.hold("d29", event("!big", 1))
	p.pass(50 * time.Millisecond)
	var first []string
	for _, req := range p.given[n:] {
		first = append(first, p.dest[req])
	}
	if !slices.Contains(first, "d27") || !slices.Contains(first, "d28") || len(first) > 8 {
		t.Errorf("given within 50 ms: %v, want d27 and d28 among them", first)
	}
}

// While the homeserver makes many transactions, deliveries that can wait do.
func TestPauseOfDeliveries(t *testing.T) {
	p := startPacing(t, func(c *PaceConfig) { c.MaxHeld = 2000; c.MaxDestinations = 4000 })
	p.fill("!big", 30)
	device := typing("!big")
	device.Device = true
	check := func(when string, least, large, both, small, devices time.Duration) {
		t.Helper()
		mixed := event("!big", 1)
		mixed.PDUs = append(mixed.PDUs, PaceMark{Room: "!small", Mark: 2})
		for _, tt := range []struct {
			what string
			txn  PaceTxn
			want time.Duration
		}{
			{"what matters least", typing("!big"), least}, {"an event of a large room", event("!big", 1), large},
			{"events of a large room and another", mixed, both}, {"an event of an unknown room", event("!small", 1), small}, {"device lists", device, devices},
		} {
			if got := p.Pause(p.now, tt.txn); got != tt.want {
				t.Errorf("%s, %s waits for %v, want %v", when, tt.what, got, tt.want)
			}
		}
	}
	arrive := func(n int) {
		for range n {
			p.hold(fmt.Sprint("x", p.next), typing("!big"))
		}
	}
	check("at rest", 0, 0, 0, 0, 0)
	arrive(stormOf)
	check("in a storm", stormPause, 0, 0, 0, 0)
	arrive(burstOf - stormOf)
	check("in a burst", stormPause, burstPause, 0, 0, 0)
	p.pass(3 * time.Second)
	check("afterwards", 0, 0, 0, 0, 0)
}

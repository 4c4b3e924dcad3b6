package sim

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// crude answers as lab/holdproxy does, tick for tick.
type crude struct {
	rate, burst int64         // answers a second; rate 0: only when an event passes or after hold
	hold        time.Duration // 0: at once
	eventsFirst bool          // those with events before the others
	forward     bool          // a new event releases what is held, burst a second

	lanes      [3][]crudeHeld
	seen       map[bus.PaceMark]bool
	slow, fast int64 // thousandths of an answer that may be given
	ticked     sched.Time
}

type crudeHeld struct {
	req   bus.ReqID
	since sched.Time
}

func (c *crude) Held(now sched.Time, req bus.ReqID, _ matrix.ServerName, t bus.PaceTxn) {
	isNew := false
	for _, m := range t.PDUs {
		isNew = isNew || !c.seen[m]
		c.seen[m] = true
	}
	lane := 2
	if c.eventsFirst && len(t.PDUs) > 0 {
		lane = 1
	}
	if c.forward && isNew {
		c.lanes[0] = append(c.lanes[0], c.lanes[2]...)
		c.lanes[2] = nil
	}
	c.lanes[lane] = append(c.lanes[lane], crudeHeld{req, now})
}

const crudeTick = 10 * time.Millisecond

func (c *crude) Release(now sched.Time, out []bus.ReqID) []bus.ReqID {
	for ; c.ticked.Add(crudeTick) <= now; c.ticked = c.ticked.Add(crudeTick) {
		c.slow = min(c.slow+c.rate*10, c.rate*250+1000)
		c.fast = min(c.fast+c.burst*10, c.burst*250+1000)
	}
	pop := func(lane int) bool {
		if len(c.lanes[lane]) == 0 {
			return false
		}
		out = append(out, c.lanes[lane][0].req)
		c.lanes[lane] = c.lanes[lane][1:]
		return true
	}
	for l := range c.lanes {
		var still []crudeHeld
		for _, h := range c.lanes[l] {
			if now.Sub(h.since) >= c.hold {
				out = append(out, h.req)
			} else {
				still = append(still, h)
			}
		}
		c.lanes[l] = still
	}
	for c.fast >= 1000 && pop(0) {
		c.fast -= 1000
	}
	for c.slow >= 1000 && (pop(1) || pop(2)) {
		c.slow -= 1000
	}
	return out
}

func (c *crude) NextWake(now sched.Time) (sched.Time, bool) {
	if len(c.lanes[0])+len(c.lanes[1])+len(c.lanes[2]) == 0 {
		return 0, false
	}
	return c.ticked.Add(crudeTick), true
}

// remotes answers as the lab's live servers do without a bus: at once, one in
// ten after 5 s.
type remotes struct{ due sched.Timers[bus.ReqID] }

func (r *remotes) Held(now sched.Time, req bus.ReqID, dest matrix.ServerName, _ bus.PaceTxn) {
	d := 10 * time.Millisecond
	if dest[len(dest)-5] == '3' {
		d = 5 * time.Second
	}
	r.due.Set(now.Add(d), req)
}

func (r *remotes) Release(now sched.Time, out []bus.ReqID) []bus.ReqID {
	for {
		req, ok := r.due.Due(now)
		if !ok {
			return out
		}
		out = append(out, req)
	}
}

func (r *remotes) NextWake(sched.Time) (sched.Time, bool) { return r.due.Next() }

// fitted is what a Synapse 1.160 costs on the machine of lab/BASELINE.md, from
// the table in lab/BASELINE.md and the one in DESIGN.md 4:
//
//   - A transaction to the bus costs 1.75 ms: the paced rows have 26 s for 6,400
//     and 45 s for 17,000, which is 1.79 ms for each and 14.5 s beside; the row
//     "at once" has 122 s for 67,000, which with the little that clients get done
//     then is 1.75 ms. The two turns and those of the clients come from the
//     same row: a send takes 18 s while a thousand transactions are under way,
//     so with two turns for a transaction it takes about 18, and likewise typing
//     (2.5 to 2.8 s in the direct row) 3, presence (3.2 to 3.9 s) 4, a receipt
//     (7.2 to 7.8 s) 8.
//   - A client's turn costs 1.4 ms: 38 ms for an idle send and its /sync, less
//     what it waits for the disk.
//   - Idle is 0.45 s in 60 s (S8).
//   - Queue is what is left of the 14.5 s: 7.6 s for 418 fan-outs to 1,000.
//   - Event is the one number without a sum behind it: it makes a client's
//     longest wait in the paced rows what it was.
func fitted() SenderCosts {
	return SenderCosts{
		Before: 1, After: 1, TxnTurn: 875 * time.Microsecond,
		Queue: 18 * time.Microsecond, Event: 250 * time.Microsecond,
		ClientTurn: 1400 * time.Microsecond, Send: 18, Sync: 4, Presence: 4, Typing: 3, Receipts: 8,
		Idle: 7500 * time.Microsecond,
	}
}

// direct is fitted for a Synapse that sends by itself: 3.0 to 3.9 ms for each
// transaction (S4).
func direct() SenderCosts {
	c := fitted()
	c.TxnTurn = 1700 * time.Microsecond
	return c
}

// slower is fitted for a machine on which everything takes longer.
func slower(percent time.Duration) SenderCosts {
	c := fitted()
	for _, d := range []*time.Duration{&c.TxnTurn, &c.Queue, &c.Event, &c.ClientTurn, &c.Idle} {
		*d = *d * percent / 100
	}
	return c
}

// storm is lab/baseline.py S4.
func storm(destinations int) SenderLoad {
	return SenderLoad{
		Destinations: destinations, Length: 120 * time.Second, Users: 10, PresenceEvery: 5 * time.Second,
		Typists: 3, TypingEvery: 4 * time.Second, MessageEvery: 15 * time.Second, LocalEvery: time.Second,
	}
}

// one is lab/baseline.py S3.
func one(destinations int) SenderLoad {
	return SenderLoad{Destinations: destinations, Length: 120 * time.Second, Users: 1, LocalEvery: time.Second}
}

// talking is load while somebody in the large room has a conversation in a room
// with one other server of it.
func talking(load SenderLoad) SenderLoad {
	load.TalkEvery, load.TalkInRoom, load.Lead = 2*time.Second, true, 5*time.Second
	return load
}

func hold(c crude) Acks {
	c.seen, c.ticked = map[bus.PaceMark]bool{}, simStart
	return &c
}

// simStart is when a Sender begins.
const simStart = sched.Time(time.Hour)

func paced(change func(*bus.PaceConfig)) *bus.Pacer {
	cfg := bus.DefaultPace()
	if change != nil {
		change(&cfg)
	}
	return bus.NewPacer(cfg)
}

func play(seed uint64, c SenderCosts, l SenderLoad, a Acks) SenderResult {
	return NewSender(c, l, a, rand.New(rand.NewPCG(seed, 0))).Run()
}

const header = "                               |     tx | EDU only | CPU s | client p50  p99   max | PDU p50   p99 | talk p50  p99 | EDU p50  p90 | held most  longest"

func row(name string, r SenderResult) string {
	s := func(d time.Duration) string { return fmt.Sprintf("%5.2f", d.Seconds()) }
	return fmt.Sprintf("%-30s | %6d | %5d %%  | %5.1f |   %s %s %s |  %s %s |   %s %s |  %s %s | %6d    %s",
		name, r.Transactions, 100*r.WithoutPDUs/max(1, r.Transactions), r.CPU.Seconds(), s(r.Client.P50), s(r.Client.P99), s(r.Client.Max),
		s(r.PDU.P50), s(r.PDU.P99), s(r.Talk.P50), s(r.Talk.P99), s(r.EDU.P50), s(r.EDU.P90), r.HeldMax, s(r.Held.Max))
}

// The model against what was measured. A cell says between what its figure was
// in the lab and by how many per cent the model may be off; run with -v for the
// model's.
//
// It is weak where the tolerance is large. It has the crude policies build fewer
// transactions than they did, by 30 % for the last of them, perhaps because the
// lab's counts include what came after the two minutes; CPU time is off by less,
// 18 %. There is no database, no garbage collector and nobody else on the core,
// so a stall after an answer to all (the row "10 s") is half of what it was. How
// long a client waits for a single fan-out depends on when in it the client
// comes. PDUs of a saturated Synapse come sooner than they did.
func TestSenderReproducesTheLab(t *testing.T) {
	type cell struct {
		low, high float64
		tolerance float64 // per cent
	}
	type want struct{ tx, cpu, clientP50, clientMax, pduP50, pduP99 cell }
	t.Log(header)
	for _, tt := range []struct {
		name string
		c    SenderCosts
		l    SenderLoad
		a    Acks
		want want
	}{
		{"direct, 665 live", direct(), storm(665), &remotes{}, want{
			tx: cell{30465, 39823, 10}, cpu: cell{119, 119, 2}, clientP50: cell{17.2, 19.3, 15}, clientMax: cell{18.1, 21.3, 10}, pduP50: cell{17.1, 22.6, 20}, pduP99: cell{26.7, 32.9, 30}}},
		{"at once", fitted(), storm(1000), hold(crude{}), want{
			tx: cell{67000, 67000, 10}, cpu: cell{122, 122, 5}, clientP50: cell{18, 18, 10}, clientMax: cell{19, 19, 10}}},
		{"25/s, PDUs first, 45 s", fitted(), storm(1000), hold(crude{rate: 25, hold: 45 * time.Second, eventsFirst: true}), want{
			tx: cell{6400, 6400, 30}, cpu: cell{26, 26, 10}, clientP50: cell{0.03, 0.03, 20}, clientMax: cell{1.1, 1.1, 70}, pduP99: cell{45, 45, 5}}},
		{"10 s, all at a PDU", fitted(), storm(1000), hold(crude{burst: 100000, hold: 10 * time.Second, forward: true}), want{
			cpu: cell{59, 59, 40}, clientP50: cell{0.04, 0.04, 40}, clientMax: cell{7.4, 7.4, 80}}},
		{"25/s, at a PDU 200/s, 20 s", fitted(), storm(1000), hold(crude{rate: 25, burst: 200, hold: 20 * time.Second, forward: true}), want{
			tx: cell{17000, 17000, 35}, cpu: cell{45, 45, 20}, clientP50: cell{0.03, 0.03, 20}, clientMax: cell{0.64, 0.64, 50}, pduP50: cell{2.7, 2.7, 15}, pduP99: cell{5.8, 5.8, 20}}},
		{"S3 again, open connections", direct(), one(665), &remotes{}, want{
			clientMax: cell{0.74, 0.74, 150}, pduP50: cell{0.69, 0.69, 30}}},
	} {
		r := play(1, tt.c, tt.l, tt.a)
		t.Log(row(tt.name, r))
		check := func(what string, got float64, c cell) {
			if c.high > 0 && (got < c.low*(100-c.tolerance)/100 || got > c.high*(100+c.tolerance)/100) {
				t.Errorf("%s: %s is %.2f; measured %.2f to %.2f, %.0f %% allowed", tt.name, what, got, c.low, c.high, c.tolerance)
			}
		}
		check("transactions", float64(r.Transactions), tt.want.tx)
		check("CPU", r.CPU.Seconds(), tt.want.cpu)
		check("client p50", r.Client.P50.Seconds(), tt.want.clientP50)
		check("client max", r.Client.Max.Seconds(), tt.want.clientMax)
		check("PDU p50", r.PDU.P50.Seconds(), tt.want.pduP50)
		check("PDU p99", r.PDU.P99.Seconds(), tt.want.pduP99)
	}
}

// What the default pace is chosen by: at most 40 % of direct's CPU time, clients
// that notice nothing, events within seconds. Run with -v for the table.
func TestPaceOfAStorm(t *testing.T) {
	limit := play(1, direct(), storm(665), &remotes{}).CPU * 2 / 5
	t.Log(header)
	for _, ack := range []bus.AckPace{bus.AckOff, 12, 25, 50, bus.AckAuto} {
		seeds := uint64(1)
		if ack == bus.AckAuto {
			seeds = 3
		}
		for seed := range seeds {
			r := play(seed, fitted(), talking(storm(1000)), paced(func(c *bus.PaceConfig) { c.Ack = ack }))
			t.Log(row(fmt.Sprintf("ack_pace %v, seed %d", ack, seed), r))
			if ack != bus.AckAuto {
				continue
			}
			for what, over := range map[string]bool{
				"CPU":                r.CPU > limit,
				"client p99":         r.Client.P99 > 300*time.Millisecond,
				"client max":         r.Client.Max > time.Second,
				"PDU p50":            r.PDU.P50 > 3*time.Second,
				"PDU p99":            r.PDU.P99 > 8*time.Second,
				"EDU p90":            r.EDU.P90 > 15*time.Second,
				"conversation p99":   r.Talk.P99 > 500*time.Millisecond,
				"messages not there": r.Missing > 0 || r.PDU.N < 7000,
				"held":               r.Held.Max > bus.DefaultPace().Hold,
			} {
				if over {
					t.Errorf("seed %d: %s is beyond its limit: %+v", seed, what, r)
				}
			}
		}
	}
}

// Machines and rooms of other sizes, for the table only as far as it is physics.
func TestPaceOfOtherSizes(t *testing.T) {
	t.Log(header)
	for _, tt := range []struct {
		name string
		c    SenderCosts
		l    SenderLoad
		p    *bus.Pacer
		ok   func(SenderResult) bool
	}{
		{"1,000, a machine twice as fast", slower(50), talking(storm(1000)), paced(nil), func(r SenderResult) bool {
			return r.Client.Max < 200*time.Millisecond && r.PDU.P50 < 3*time.Second
		}},
		{"1,000, half as fast", slower(200), talking(storm(1000)), paced(nil), func(r SenderResult) bool {
			return r.Client.P50 < 300*time.Millisecond && r.PDU.P99 < 12*time.Second
		}},
		{"250, a quarter as fast", slower(400), talking(storm(250)), paced(nil), func(r SenderResult) bool {
			return r.Client.P50 < 300*time.Millisecond && r.PDU.P50 < 3*time.Second
		}},
		{"4,000", fitted(), talking(storm(4000)), paced(nil), func(r SenderResult) bool {
			return r.Held.Max <= bus.DefaultPace().Hold && r.CPU < 110*time.Second
		}},
		{"4,000, ack_hold 45 s", fitted(), talking(storm(4000)), paced(func(c *bus.PaceConfig) { c.Hold = 45 * time.Second }), func(r SenderResult) bool {
			return r.Held.Max <= 45*time.Second && r.CPU < 110*time.Second
		}},
		{"1,000, pressure 60 %", fitted(), func() SenderLoad { l := talking(storm(1000)); l.Pressure = 6000; return l }(), paced(nil), func(r SenderResult) bool {
			return r.CPU < 45*time.Second && r.Client.P99 < 300*time.Millisecond && r.PDU.P50 < 3*time.Second
		}},
		{"one message to 1,000 (S3)", fitted(), one(1000), paced(nil), func(r SenderResult) bool {
			return r.Client.Max < time.Second && r.PDU.Max < 2*time.Second
		}},
	} {
		r := play(1, tt.c, tt.l, tt.p)
		t.Log(row(tt.name, r))
		if !tt.ok(r) {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
}

func TestSenderReplays(t *testing.T) {
	l := talking(storm(100))
	if a, b := play(5, fitted(), l, paced(nil)), play(5, fitted(), l, paced(nil)); a != b {
		t.Errorf("one seed, two results:\n%+v\n%+v", a, b)
	}
}

// watcher checks what a Synapse promises of its transactions.
type watcher struct {
	*testing.T
	crude
	flying map[matrix.ServerName]bus.ReqID
	dests  map[bus.ReqID]matrix.ServerName
	most   int
}

func (w *watcher) Held(now sched.Time, req bus.ReqID, dest matrix.ServerName, t bus.PaceTxn) {
	if other := w.flying[dest]; other != 0 {
		w.Fatalf("%s has request %d and %d in flight", dest, other, req)
	}
	w.flying[dest], w.dests[req] = req, dest
	w.most = max(w.most, len(t.PDUs))
	w.crude.Held(now, req, dest, t)
}

func (w *watcher) Release(now sched.Time, out []bus.ReqID) []bus.ReqID {
	n := len(out)
	out = w.crude.Release(now, out)
	for _, req := range out[n:] {
		delete(w.flying, w.dests[req])
	}
	return out
}

// One transaction in flight for each destination; what waits behind it merges,
// up to 50 events, and none is lost.
func TestSenderKeepsOneInFlightAndMerges(t *testing.T) {
	l := storm(20)
	l.MessageEvery = 300 * time.Millisecond
	w := &watcher{T: t, flying: map[matrix.ServerName]bus.ReqID{}, dests: map[bus.ReqID]matrix.ServerName{}}
	w.crude = crude{hold: 30 * time.Second, seen: map[bus.PaceMark]bool{}, ticked: simStart}
	r := play(1, fitted(), l, w)
	if w.most != matrix.MaxPDUs {
		t.Errorf("at most %d events in a transaction, want %d", w.most, matrix.MaxPDUs)
	}
	if r.Transactions < 20*4 || r.Transactions > 20*5 {
		t.Errorf("%d transactions to 20 destinations in 120 s, each answered after 30 s", r.Transactions)
	}
}

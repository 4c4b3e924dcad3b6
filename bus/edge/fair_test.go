package edge

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

func server(s string, i int) matrix.ServerName {
	return matrix.ServerName(fmt.Sprintf("%s%d.test", s, i))
}

// An older transaction comes into the queue after one was begun that is to be sent
// again: released from a join, or because its look-up took longer.
func TestTransactionToBeSentAgainGoesBeforeOlderOnes(t *testing.T) {
	for what, failure := range map[string]Done{
		"nobody knows what became of it": {Failure: matrix.FailReset},
		"it never arrived":               {Failure: matrix.FailRefused, Unsent: true},
	} {
		for _, join := range []bool{true, false} {
			r := newRig(t, nil)
			var a, b ReqID
			var f Forward
			if join {
				r.step(Joining{Room: "!join", Open: true})
				a = r.send("a.test", pdus("A", "!join"))
				b = r.send("a.test", pdus("B", "!other"))
				f = r.forwarded()
			} else {
				r.manual = true
				a = r.send("a.test", pdus("A"))
				r.step(Verified{Req: a, Verdict: Good})
				b = r.send("a.test", pdus("B"))
				r.step(Verified{Req: b, Verdict: Good})
				r.step(Looked{Req: b})
				f = r.forwarded()
				r.step(Looked{Req: a})
				r.manual = false
			}
			r.one("the other one is begun", f.Req == b)
			failure.Op = f.Op
			if r.step(failure); join {
				r.step(Joining{Room: "!join", Open: false})
			}
			r.pass(6 * time.Second)
			if r.forwarded().Req != b {
				t.Errorf("%s, join %t: the older one is sent while the homeserver may have the other", what, join)
			}
			r.answer(r.m.origins[originKey{name: "a.test"}].current.op, 200)
			r.one("then the older one", r.forwarded().Req == a)
			r.rest()
			if n := len(of[Refuse](r.all)); n > 0 {
				t.Errorf("%s, join %t: %d refused", what, join, n)
			}
		}
	}
}

// Made-up names whose servers do not answer hold places only apart from those whose keys
// are at hand.
func TestParkedRequestsAreInNobodysWay(t *testing.T) {
	ask := matrix.Match("GET", "/_matrix/federation/v1/state_ids/!r")
	for _, tt := range []struct {
		what        string
		names, each int
		peer        func(i int) string
		want        int32 // parked
	}{
		{"one name from four addresses", 1, 256, func(i int) string { return fmt.Sprint(i % 4) }, parkedPerOrigin},
		{"names without end from one address", 200, 1, func(int) string { return "A" }, 32},
		{"names without end from many addresses", 200, 1, func(i int) string { return fmt.Sprint(i) }, 96},
		{"names without end behind a proxy that does not say", 200, 1, func(int) string { return "" }, 96},
	} {
		r := newRig(t, func(c *Config) { c.UnverifiedBytes, c.NoKey = Default().UnverifiedBytes, RefuseNoKey })
		r.send("known.test", pdus("0"))
		r.answer(r.forwarded().Op, 200)
		r.manual = true
		noKey := func() {
			for _, e := range of[Verify](r.last) {
				if !e.MayFetch {
					r.step(Verified{Req: e.Req, Verdict: NoKey})
				}
			}
		}
		for i := range tt.names * tt.each {
			r.arrive(Arrived{Origin: server("blackhole", i%tt.names), Keys: []string{fmt.Sprint("ed25519:", i)}, Peer: tt.peer(i), Endpoint: ask})
			noKey()
		}
		if got := r.m.desk.parked; got != tt.want || r.m.unverified.n != got {
			t.Errorf("%s: %d are parked, %d held, want %d", tt.what, got, r.m.unverified.n, tt.want)
		}
		for _, e := range of[Refuse](r.all) {
			if e.Status != 503 {
				t.Fatalf("%s: refused with %d though no key was asked for", tt.what, e.Status)
			}
		}
		honest := r.arrive(Arrived{Origin: "honest.test", Peer: "H", Txn: pdus("1")})
		r.one("one whose key is at hand is looked at at once", reflect.DeepEqual(of[Verify](r.last), []Verify{{Req: honest}}))
		known := r.arrive(Arrived{Origin: "known.test", Keys: []string{"ed25519:new"}, Peer: "K", Txn: pdus("1")})
		r.one("as is a known one's", len(of[Verify](r.last)) == 1)
		r.step(Verified{Req: known, Verdict: NoKey})
		r.one("which may have a new key fetched", reflect.DeepEqual(r.last, []Effect{Verify{Req: known, MayFetch: true}}))
		r.step(Verified{Req: honest, Verdict: Good})
		for len(r.m.desk.fetching) > 0 {
			for _, f := range r.m.desk.fetching {
				r.step(Verified{Req: f.req.Req, Verdict: NoKey, Tried: true})
				noKey()
				break
			}
		}
		if r.m.desk.parked != 0 {
			t.Errorf("%s: %d are parked without a fetch", tt.what, r.m.desk.parked)
		}
		for _, l := range of[Look](r.all) {
			if r.m.looks[l.Req] != nil {
				r.step(Looked{Req: l.Req})
			}
		}
		r.manual = false
		r.rest()
	}
}

// When it is full, a newcomer's room is taken from the address that has most.
func TestUnverifiedRoomIsSharedByAddresses(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Unverified, c.Verifying, c.UnverifiedBytes = 100, 4, Default().UnverifiedBytes })
	r.manual = true
	for i := range 100 { // four addresses
		r.arrive(Arrived{Origin: "flood.test", Peer: fmt.Sprint(i / 25), Txn: pdus(fmt.Sprint(i))})
	}
	r.one("all places are taken", r.m.unverified.n == 100 && len(of[Refuse](r.all)) == 0)
	r.arrive(Arrived{Origin: "a.test", Peer: "a", Txn: pdus("1")})
	r.one("the newest of one of them goes", r.refused(503).Req == 25)
	r.step(Gone{50})
	r.arrive(Arrived{Origin: "b.test", Peer: "b", Txn: pdus("1")})
	r.one("the first of equals by name", reflect.DeepEqual(of[Free](r.last), []Free{{50}}) && len(of[Refuse](r.last)) == 0)
	for i := range 200 {
		r.arrive(Arrived{Origin: "c.test", Peer: "c", Txn: pdus(fmt.Sprint(i))})
	}
	// 100 places, 2 of which a and b have.
	for name, p := range r.m.desk.peers {
		if len(name) == 1 && name[0] < 'a' && p.held < 18 || name == "c" && p.held > 20 {
			t.Errorf("address %s has %d", name, p.held)
		}
	}
	r.arrive(Arrived{Origin: "c.test", Peer: "c", Txn: pdus("x")})
	r.one("who has as much as the others takes nothing from them", r.refused(503).Req == r.req)
	r.manual = false
	r.verdict = func(*request) Verdict { return Forged }
	for _, v := range of[Verify](r.all) {
		if q := r.m.reqs[v.Req]; q != nil && q.stage == stageVerifying {
			r.step(Verified{Req: v.Req, Verdict: Forged})
		}
	}
	r.rest()
	if r.m.stats.Displaced < 5 {
		t.Errorf("%d displaced", r.m.stats.Displaced)
	}
}

func TestUnverifiedBytesAreSharedByAddresses(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Verifying, c.UnverifiedBytes = 1, 16*sched.MiB })
	r.manual = true
	for i := range 16 {
		r.arrive(Arrived{Origin: "flood.test", Peer: fmt.Sprint(i / 4), Txn: pdus(fmt.Sprint(i)), Size: 1 << 20})
	}
	r.one("all bytes are taken", r.m.unverified.bytes == 16<<20)
	r.arrive(Arrived{Origin: "a.test", Peer: "a", Txn: pdus("1"), Size: 2 << 20})
	got := of[Refuse](r.last)
	r.one("two make room", len(got) == 2 && got[0].Req == 4 && got[1].Req == 8)
	r.arrive(Arrived{Origin: "a.test", Peer: "b", Txn: pdus("1"), Size: 30 << 20})
	r.one("none for what never fits", r.refused(503).Req == r.req)
	r.verdict = func(*request) Verdict { return Forged }
	r.manual = false
	r.step(Verified{Req: 1, Verdict: Forged})
	r.rest()
}

// Servers whose transactions the homeserver waits long over do not take all the room,
// and come after the others for a minute.
func TestStalledLeaveRoomForOthers(t *testing.T) {
	r := newRig(t, nil)
	for o := range 8 {
		r.send(server("evil", o), pdus("1"))
		r.send(server("evil", o), pdus("2"))
	}
	r.pass(4 * time.Second) // the window lets them in, one after another
	l := &r.m.lanes[laneTxn]
	r.one("all places are taken by what hangs", l.slots.Used == 8 && l.stalled == 8)
	honest := r.send("honest.test", pdus("1"))
	r.one("none is broken off early", len(of[Cancel](r.all)) == 0)
	r.pass(2 * time.Second)
	c := of[Cancel](r.last)
	r.one("then the one that has run for longest", len(c) == 1 && c[0].Op == 1)
	r.step(Done{Op: c[0].Op, Failure: matrix.FailCancelled})
	f := r.forwarded()
	r.one("the other has its place", f.Req == honest && l.slots.Used == 8)
	r.answer(f.Op, 200)
	r.pass(2 * time.Second)
	r.one("and it is not taken by one that hung", len(of[Forward](r.last)) == 0 && l.slots.Used == 7)
	for i := range 20 {
		id := r.send(server("good", i), pdus("1"))
		f := r.forwarded()
		r.one("nor by others", f.Req == id)
		r.answer(f.Op, 200)
	}
	r.one("none of which needs another broken off", len(of[Cancel](r.all)) == 1 && len(of[Refuse](r.all)) == 0)
	// The homeserver has the first one's transaction still and answers it when it is sent again.
	for _, op := range []OpID{2, 3, 4} {
		r.answer(op, 200)
	}
	found := false
	for _, f := range of[Forward](r.all)[9:] {
		found = found || f.Req == 1
	}
	r.one("it is sent again when there is room", found)
	r.rest()
	if got := of[Refuse](r.all); len(got) > 0 {
		t.Errorf("refused: %+v", got)
	}
}

// However many servers are slow, what is broken off is bounded, and nothing is under
// pressure or for another that was slow itself.
func TestBreakingOffIsBounded(t *testing.T) {
	for _, pressure := range []int32{0, hard} {
		r := newRig(t, func(c *Config) { c.Concurrency, c.Requests = 2, 200 })
		r.step(Pressure{Hundredths: pressure})
		var cancels []sched.Time
		for i := range 90 * 4 {
			if i%8 == 0 {
				r.send(server("evil", i), pdus("1"))
			}
			r.pass(250 * time.Millisecond)
			for _, c := range of[Cancel](r.last) {
				cancels = append(cancels, r.now)
				r.step(Done{Op: c.Op, Failure: matrix.FailCancelled})
			}
		}
		in := 0
		for _, at := range cancels {
			if at.Sub(cancels[0]) < breakWindow {
				in++
			}
		}
		if pressure == 0 && (in != leastBreaks || len(cancels) <= in) || pressure > 0 && len(cancels) > 0 {
			t.Errorf("pressure %d: %d broken off in a minute, want %d, %d in all", pressure, in, leastBreaks, len(cancels))
		}
		r.rest()
	}
	r := newRig(t, func(c *Config) { c.Concurrency = 2 })
	for o := range 2 {
		r.send(server("slow", o), pdus("1"))
		r.pass(2 * time.Second)
	}
	for o := range 2 {
		r.answer(OpID(o+1), 200)
	}
	for o := range 2 {
		r.send(server("slow", o), pdus("2"))
		r.pass(20 * time.Second)
	}
	r.one("it waits for the other slow one", len(of[Forward](r.all)) == 3 && len(of[Cancel](r.all)) == 0)
	r.rest()
}

// A question that is broken off is asked again, twice at most, and may be joined again;
// what changes something is never.
func TestStalledQuestionsLeaveRoomForOthers(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Parallel = 4 })
	r.get("a.test", "GET", "/_matrix/federation/v1/event/$a")
	r.get("b.test", "PUT", "/_matrix/federation/v2/send_join/!r/$e")
	r.get("c.test", "PUT", "/_matrix/federation/v2/send_join/!r/$f")
	r.get("d.test", "PUT", "/_matrix/federation/v2/send_join/!r/$g")
	r.pass(7 * time.Second)
	l := &r.m.lanes[laneOther]
	r.one("all places are taken by what hangs", l.stalled == 4)
	honest := r.get("e.test", "GET", "/_matrix/federation/v1/event/$e")
	c := of[Cancel](r.last)
	r.one("the only one that may be broken off is", len(c) == 1 && r.m.ops[c[0].Op].leader.Req == 1)
	r.step(Done{Op: c[0].Op, Failure: matrix.FailCancelled})
	f := r.forwarded()
	r.one("the other has its place", f.Req == honest)
	copied := r.get("a.test", "GET", "/_matrix/federation/v1/event/$a")
	r.one("the first may be joined again", len(r.m.reqs[1].call.waiters) == 2)
	r.pass(8 * time.Second)
	r.get("f.test", "GET", "/_matrix/federation/v1/event/$f")
	c = of[Cancel](r.last)
	r.one("the next one", len(c) == 1 && c[0].Op == f.Op)
	r.step(Done{Op: f.Op, Failure: matrix.FailCancelled})
	r.answer(r.forwarded().Op, 200)
	r.answer(2, 200)
	r.answer(3, 200)
	r.answer(of[Forward](r.last)[0].Op, 200)
	r.rest()
	n := 0
	for _, e := range of[Reply](r.all) {
		if e.Req == 1 || e.Req == copied || e.Req == honest {
			n++
		}
	}
	if n != 3 || len(of[Refuse](r.all)) > 0 {
		t.Errorf("%d of 3 answered, refused %+v", n, of[Refuse](r.all))
	}
}

// How long a room's join takes says nothing about the server that asks.
func TestJoinsWaitForNobody(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Parallel = 16 })
	r.get("slow.test", "GET", "/_matrix/federation/v1/state/!r?event_id=$e")
	op := r.forwarded().Op
	r.pass(1500 * time.Millisecond)
	r.answer(op, 200)
	for i := range 12 {
		r.get(server("s", i), "PUT", "/_matrix/federation/v2/send_join/!r/$e")
	}
	r.pass(3 * time.Second)
	l := &r.m.lanes[laneOther]
	if l.slots.Free() == 0 || l.slow < l.slowMost() {
		t.Fatalf("%d places are free, %d of %d slow", l.slots.Free(), l.slow, l.slowMost())
	}
	join := r.get("slow.test", "GET", "/_matrix/federation/v1/make_join/!r/@u:slow.test")
	r.one("it is begun at once", r.forwarded().Req == join)
}

// Origins that have stalled wait for the others, but not for ever.
func TestSlowOriginsHaveTheirTurnInTheEnd(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency, c.OriginRate, c.OriginBurst = 1, 1000, 1000 })
	r.send("slow.test", pdus("0"))
	r.pass(2 * time.Second)
	r.answer(1, 200)
	r.send("x.test", pdus("0"))
	op := r.forwarded().Op
	slow := r.send("slow.test", pdus("1"))
	turns := 0
	for i := range 100 {
		r.send(server("s", i), pdus("1"))
		r.send(server("s", i+1000), pdus("1"))
		r.pass(500 * time.Millisecond)
		r.answer(op, 200)
		f := r.forwarded()
		if f.Req == slow {
			turns = i
			break
		}
		op = f.Op
	}
	if turns < 18 || turns > 21 {
		t.Errorf("it has its turn after %d of the others' in half a second each, want %s", turns, lateAfter)
	}
	r.rest()
	r = newRig(t, func(c *Config) { c.Concurrency = 1 })
	r.send("slow.test", pdus("0"))
	r.pass(2 * time.Second)
	r.answer(1, 200)
	r.pass(slowFor - time.Second)
	r.send("x.test", pdus("0"))
	r.forwarded()
	slow = r.send("slow.test", pdus("1"))
	r.pass(900 * time.Millisecond)
	r.send("y.test", pdus("1"))
	r.pass(400 * time.Millisecond) // it is forgotten, and so are its place behind the others
	r.send("z.test", pdus("1"))
	r.answer(2, 200)
	r.one("first y.test, which came before that", r.m.ops[r.forwarded().Op].origin.key.name == "y.test")
	r.answer(3, 200)
	r.one("then the slow one in its turn", r.forwarded().Req == slow)
	r.rest()
}

// One that hangs for longer than is remembered makes its origin slow all the time.
func TestHangingOriginStaysSlow(t *testing.T) {
	r := newRig(t, nil)
	r.get("a.test", "GET", "/_matrix/federation/v1/state/!r?event_id=1")
	r.pass(3 * slowFor)
	o := r.m.origins[originKey{name: "a.test"}]
	r.get("a.test", "GET", "/_matrix/federation/v1/event/1")
	r.one("it goes, among what is slow", len(of[Forward](r.last)) == 1 && r.m.lanes[laneOther].slow == 2)
	r.one("transactions are another thing", o.isSlow(laneOther, r.now) && !o.isSlow(laneTxn, r.now))
	r.answer(1, 200)
	r.answer(2, 200)
	r.pass(slowFor - time.Second)
	r.one("and for a minute more", o.isSlow(laneOther, r.now))
	r.pass(time.Second)
	r.one("but no longer", !o.isSlow(laneOther, r.now))
	r.rest()
}

// When all room is taken within one band, it is shared out by origins.
func TestManyOriginsDoNotKeepOthersOut(t *testing.T) {
	r := newRig(t, nil)
	for o := range 60 {
		for i := range 11 {
			r.send(server("evil", o), pdus(fmt.Sprint(i)))
		}
	}
	r.one("all is taken", r.m.held.n == r.m.held.maxN)
	for i := range 50 {
		r.send(server("honest", i), pdus("1"))
		got := of[Refuse](r.last)
		r.one("a newcomer has room, at the expense of one that has most", len(got) == 1 && got[0].Status == 503 && got[0].RetryAfter > 0 && got[0].Req != r.req)
	}
	for _, o := range r.m.crowd[BandPDUs] {
		if n := o.waits[BandPDUs]; o.key.name[0] == 'e' && n < 5 || n > 9 {
			t.Errorf("%s has %d", o.key.name, n)
		}
	}
	held := map[matrix.ServerName]int32{}
	for _, o := range r.m.crowd[BandPDUs] {
		held[o.key.name] = o.waits[BandPDUs]
	}
	for i := range 20 {
		r.send("greedy.test", pdus(fmt.Sprint(i)))
	}
	if n := r.m.origins[originKey{name: "greedy.test"}].waits[BandPDUs]; n < 4 || n > 9 {
		t.Errorf("one that sends 20 has %d of them here", n)
	}
	r.rest()
}

// Nor do many urgent requests of one origin keep out what is less urgent of others.
func TestUrgentRequestsDoNotKeepOthersOut(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Requests, c.Parallel, c.OriginRate, c.OriginBurst = 100, 2, 1000, 1000 })
	ask := func(o matrix.ServerName, what string, i int) ReqID {
		return r.get(o, "GET", fmt.Sprintf("/_matrix/federation/v1/%s/%d", what, i))
	}
	for i := range 48 {
		ask("small.test", "backfill", i)
	}
	for i := range 4 {
		ask("tiny.test", "backfill", i)
	}
	for o := range 2 {
		for i := range 49 {
			ask(server("evil", o), "make_join/!r", i)
		}
	}
	r.one("joins make what nobody waits for give way", r.m.held.n == 100 && len(of[Refuse](r.all)) == 50)
	if n := r.m.origins[originKey{name: "small.test"}].waits[BandState]; n > 10 {
		t.Errorf("the one with most has %d left", n)
	}
	for i := range 60 {
		ask(server("evil", i%2), "make_join/!s", i)
	}
	r.one("but not what is far less", r.m.origins[originKey{name: "tiny.test"}].waits[BandState] == 4)
	q := r.send("honest.test", pdus("1"))
	got := of[Refuse](r.last)
	r.one("far more joins of one give way to another's events", len(got) == 1 && got[0].Req != q)
	r.rest()
}

// Bytes are shared out like places.
func TestFewOriginsWithMuchDoNotKeepOthersOut(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency, c.Bytes, c.OriginBytes = 1, 40*sched.MiB, 13*sched.MiB })
	for o := range 5 {
		for i := range 8 {
			r.arrive(Arrived{Origin: server("evil", o), Txn: pdus(fmt.Sprint(i)), Size: 1 << 20})
		}
	}
	r.one("all is taken", r.m.held.bytes == 40<<20 && len(of[Refuse](r.all)) == 0)
	r.arrive(Arrived{Origin: "honest.test", Txn: pdus("1"), Size: 2 << 20})
	got := of[Refuse](r.last)
	r.one("two make room", len(got) == 2 && got[0].Req != r.req && got[1].Req != r.req)
	r.arrive(Arrived{Origin: "big.test", Txn: pdus("1"), Size: 41 << 20})
	r.one("none for what never fits", r.refused(503).Req == r.req)
	r.rest()
}

// What joins an attempt that runs cannot be made to leave, so few may when room is short.
func TestCopiesDoNotTakeTheRoom(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Requests = 100 })
	for o := range 8 {
		for range maxWaiters {
			r.send(server("evil", o), pdus("1"))
		}
	}
	if n := r.m.held.n; n < 50 || n > 50+8*crowdedWaiters {
		t.Errorf("%d of 100 are held", n)
	}
	r.send("honest.test", pdus("1"))
	r.one("another has room", len(of[Refuse](r.last)) == 0)
	// Copies of what waits count for their origin.
	r = newRig(t, func(c *Config) { c.Requests, c.Concurrency = 40, 1 })
	r.send("x.test", pdus("0"))
	for range 15 {
		r.send("copies.test", pdus("1"))
	}
	for o := range 24 {
		r.send(server("s", o), pdus("1"))
	}
	r.one("all is taken", r.m.held.n == 40)
	r.send("honest.test", pdus("1"))
	r.one("that of the copies is given up", len(of[Refuse](r.last)) == 15)
	r.rest()
}

// A failure of the bus's own says nothing about the homeserver.
func TestOwnFailureLeavesTheWindowAlone(t *testing.T) {
	for _, tt := range []struct {
		failure matrix.Failure
		want    int32
	}{{matrix.FailLocal, 4}, {matrix.FailTimeout, 2}} {
		r := newRig(t, nil)
		r.send("a.test", pdus("1"))
		r.step(Done{Op: r.forwarded().Op, Failure: tt.failure})
		if w := &r.m.lanes[laneTxn].window; w.size != tt.want {
			t.Errorf("a window of %d after %s, want %d", w.size, tt.failure, tt.want)
		}
		r.rest()
	}
}

// The shell asks the list from other goroutines than the loop.
func TestACLIsSharedByGoroutines(t *testing.T) {
	c := Default()
	c.Deny = []string{"denied.*"}
	a := NewACL(&c)
	c.Deny[0] = "other"
	answers := make(chan bool)
	for range 4 {
		go func() {
			ok := true
			for i := range 1000 {
				ok = ok && !a.Allows("Denied.test:8448") && a.Allows(server("s", i))
			}
			answers <- ok
		}()
	}
	for range 4 {
		if !<-answers {
			t.Error("it answers otherwise")
		}
	}
	var none ACL
	if !none.Allows("a.test") || none.Allows("192.0.2.1") {
		t.Error("the zero value")
	}
}

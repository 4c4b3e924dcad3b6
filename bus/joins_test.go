package bus

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

const (
	makeJoin = "/_matrix/federation/v1/make_join/!r/@u"
	sendJoin = "/_matrix/federation/v2/send_join/!r/$e"
	stateIDs = "/_matrix/federation/v1/state_ids/!r"
)

// joins sends a request that is about the room !r, or the one of number n.
func (r *rig) joins(dest matrix.ServerName, method, target string, n int) ReqID {
	r.t.Helper()
	room := "!r"
	if n > 0 {
		room = fmt.Sprintf("!r%d", n)
	}
	target = strings.Replace(target, "!r", room, 1)
	return r.arrive(Arrived{Dest: dest, Endpoint: matrix.Match(method, target), Key: keyOf(dest, target), Room: room})
}

// latest returns the join that came last.
func (r *rig) latest() JoinStatus {
	r.t.Helper()
	list := r.m.Snapshot(r.now, 0).Joins
	r.one("there is a join", len(list) > 0)
	return list[0]
}

func (r *rig) phase(what string, p JoinPhase) {
	r.t.Helper()
	if got := r.latest().Phase; got != p {
		r.t.Fatalf("%s: the join is %s, want %s", what, got, p)
	}
}

func TestJoinHasATimeline(t *testing.T) {
	r := newRig(t, unhurried)
	start := r.now
	r.works("h.test")
	r.works("first.test")
	at := func(t sched.Time) time.Duration {
		if t == 0 {
			return -1
		}
		return t.Sub(start)
	}
	r.pass(time.Second)
	r.joins("first.test", "GET", makeJoin, 0) // 1 s
	r.phase("make_join opens", JoinAsking)
	op := r.sent().Op
	r.pass(time.Second)
	r.answer(op, 403)
	r.joins("h.test", "GET", makeJoin, 0) // 2 s
	r.answer(r.sent().Op, 200)
	r.pass(time.Second)
	r.joins("h.test", "PUT", sendJoin, 0) // 3 s
	r.phase("send_join", JoinSending)
	op = r.sent().Op
	r.pass(time.Second)
	r.step(Answered{Op: op, Status: 200, Size: 1000}) // 4 s
	r.step(KeysSeen{Room: "!r", Wants: wants(0, 7)})  // of which none is fetched: there is no notary
	r.step(ServersSeen{Room: "!r", Servers: []matrix.ServerName{"h.test", "first.test"}})
	r.pass(time.Second)
	r.step(Progress{Op: op, Size: 400})
	if w := r.latest(); w.Size != 400 || w.Total != 1000 || w.Whole != 0 {
		t.Errorf("in the middle of the answer: %+v", w)
	}
	r.joins("h.test", "PUT", sendJoin, 0) // again
	r.pass(time.Second)
	r.step(Done{Op: op, Size: 1000}) // 6 s
	r.phase("all of it is through", JoinSyncing)
	r.pass(time.Second)
	r.joins("h.test", "GET", stateIDs, 0) // 7 s
	op = r.sent().Op
	r.pass(time.Second)
	r.answer(op, 200) // 8 s
	r.pass(resyncQuiet - 1)
	r.phase("resync", JoinSyncing)
	r.pass(1)
	w := r.latest()
	if got, want := []time.Duration{at(w.Asked), at(w.Sent), at(w.Headers), at(w.Whole), at(w.Passed), at(w.Resync), at(w.ResyncEnd), at(w.Closed)},
		[]time.Duration{time.Second, 3 * time.Second, 4 * time.Second, 6 * time.Second, 5 * time.Second, 7 * time.Second, 8 * time.Second, 68 * time.Second}; !reflect.DeepEqual(got, want) {
		t.Errorf("times %v, want %v", got, want)
	}
	w.Asked, w.Sent, w.Headers, w.Whole, w.Passed, w.Resync, w.ResyncEnd, w.Closed = 0, 0, 0, 0, 0, 0, 0, 0
	if want := (JoinStatus{Room: "!r", Phase: JoinOver, Asks: 2, Via: "h.test", Again: 1, Sends: 1, Status: 200, Size: 1000, Total: 1000,
		Servers: 2, Resyncs: 1, ResyncSize: 100}); w != want {
		t.Errorf("got  %+v\nwant %+v", w, want)
	}
	for p, want := range map[JoinPhase]string{JoinAsking: "asking", JoinSending: "joining", JoinSyncing: "resync", JoinOver: "over"} {
		if p.String() != want {
			t.Errorf("phase %d is %s", p, p)
		}
	}
}

func TestJoinThatFailsCloses(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	r.joins("h.test", "GET", makeJoin, 0)
	r.answer(r.sent().Op, 200)
	r.joins("h.test", "PUT", sendJoin, 0)
	r.answer(r.sent().Op, 403)
	r.phase("another server may be tried", JoinAsking)
	r.one("and why", strings.Contains(r.latest().Failed, "403"))
	r.joins("h.test", "PUT", sendJoin, 0)
	r.phase("it is", JoinSending)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailReset})
	r.phase("in vain", JoinAsking)
	r.pass(askingFor)
	r.phase("nobody goes on", JoinOver)
	if open := r.m.joins.open; open != 0 {
		t.Errorf("%d are open", open)
	}
}

// The homeserver may have lost the answer, and come again when its window is past
// that.
func TestJoinThatIsSentAgainAfterItsEnd(t *testing.T) {
	r := newRig(t, func(c *Config) { unhurried(c); c.KeepFor = 0 })
	r.works("h.test")
	r.joins("h.test", "PUT", sendJoin, 0)
	r.answer(r.sent().Op, 200)
	r.phase("it is through", JoinSyncing)
	r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 200, Size: -1})
	r.step(Progress{Op: op, Size: 5})
	r.phase("what follows goes on", JoinSyncing)
	r.step(Done{Op: op, Failure: matrix.FailCut})
	r.phase("but when that fails", JoinAsking)
	if open := r.m.joins.open; open != 1 {
		t.Errorf("%d are open", open)
	}
}

func TestAnswerThatNobodyWaitedForIsPassedOnLater(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	a := r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.step(Gone{a})
	r.pass(time.Second)
	r.answer(op, 200)
	w := r.latest()
	r.one("it is here, and with nobody", w.Phase == JoinSending && w.Whole == r.now && w.Passed == 0)
	r.pass(time.Second)
	r.joins("h.test", "PUT", sendJoin, 0)
	w = r.latest()
	r.one("until the homeserver comes again", w.Phase == JoinSyncing && w.Passed == r.now && w.Again == 1)
}

// What nobody waits for steps back while a room is joined, but not to nothing.
func TestOthersStepBackDuringAJoin(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 32, 32, 1 })
	events := func(n int) {
		for i := range 40 {
			r.get(matrix.ServerName(fmt.Sprintf("b%d-%d.test", n, i)), "GET", "/_matrix/federation/v1/backfill/r")
			r.profile(matrix.ServerName(fmt.Sprintf("l%d-%d.test", n, i)), 1)
		}
	}
	counts := func() [2]sched.Slots {
		return [2]sched.Slots{r.m.running[matrix.ClassState], r.m.running[matrix.ClassState] + r.m.running[matrix.ClassLookup]}
	}
	r.joins("j.test", "GET", makeJoin, 0)
	join := r.sent().Op
	events(1)
	if got, want := counts(), [2]sched.Slots{2, 5}; got[1] != want[1]+1 && got[1] != want[1] || got[0] < 1 || got[0] > want[0] {
		t.Errorf("%v run in the window, want %v at most", got, want)
	}
	r.get("d.test", "GET", "/_matrix/federation/v1/user/devices/u")
	r.one("better classes do not", len(of[Send](r.last)) == 1)
	r.step(Connected{join})
	r.answer(join, 403)
	before := counts()
	for i := range 7 {
		r.pass(time.Second)
		if i == 0 && counts()[1] > before[1] {
			t.Errorf("%v run while the window is open", counts())
		}
	}
	r.pass(askingFor)
	r.phase("the window closes", JoinOver)
	events(2)
	if got := counts(); got[1] < 20 {
		t.Errorf("%v run after it", got)
	}

	r = newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 8, 2, 1 })
	r.joins("j.test", "GET", makeJoin, 0)
	r.step(Connected{r.sent().Op})
	r.get("b.test", "GET", "/_matrix/federation/v1/backfill/r")
	r.one("one worker is left to the last class even if a quarter of its share is none", len(of[Send](r.last)) == 1)
}

func TestResyncGoesFirst(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	r.joins("h.test", "GET", stateIDs, 0)
	r.one("not without a join", r.sent().Class == matrix.ClassState)
	r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.joins("h.test", "GET", stateIDs+"?event_id=a", 0)
	r.one("nor before its end", r.sent().Class == matrix.ClassState)
	r.answer(op, 200)
	r.joins("h.test", "GET", stateIDs+"?event_id=b", 0)
	r.one("the room is of no use without it", r.sent().Class == matrix.ClassEvent)
	r.joins("h.test", "GET", stateIDs, 1)
	r.one("another room waits", r.sent().Class == matrix.ClassState)
}

func TestJoinsKeepToTheirBound(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	for i := range 3 * maxJoins {
		r.joins("h.test", "GET", makeJoin, 1+i)
		r.answer(r.sent().Op, 200)
	}
	list := r.m.Snapshot(r.now, 0).Joins
	if len(list) != maxJoins || list[0].Room != fmt.Sprintf("!r%d", 3*maxJoins) || r.m.joins.open != maxJoins || len(r.m.joins.rooms) != maxJoins {
		t.Errorf("%d are remembered, the latest of %s, %d open", len(list), list[0].Room, r.m.joins.open)
	}
	r.pass(askingFor)
	if r.m.joins.open != 0 || len(r.m.joins.rooms) != 0 {
		t.Errorf("%d are open", r.m.joins.open)
	}
}

func TestMakeJoinToADeadHostFailsAtOnce(t *testing.T) {
	r := newRig(t, nil)
	r.step(Restored{Hosts: []HostRecord{
		{Name: "dead.test", Failures: knownDead, LastFailure: matrix.FailRefused, LastTry: r.now.Add(-time.Minute), NextTry: r.now.Add(time.Hour)},
		{Name: "ill.test", Failures: knownDead - 1, LastFailure: matrix.FailRefused, LastTry: r.now.Add(-time.Minute), NextTry: r.now.Add(time.Hour)},
	}})
	r.joins("dead.test", "GET", makeJoin, 0)
	refused := of[Refuse](r.last)
	r.one("its caller knows others", len(refused) == 1 && refused[0].Status == 502)
	r.joins("dead.test", "PUT", sendJoin, 0)
	r.one("but not for the join itself", len(of[Commit](r.last)) == 1)
	r.joins("ill.test", "GET", makeJoin, 0)
	r.one("nor if it may be back", len(of[Commit](r.last)) == 1)
	r.step(Restored{Hosts: []HostRecord{{Name: "long.test", Failures: knownDead, LastFailure: matrix.FailRefused, LastTry: r.now.Add(-probeDead), NextTry: r.now.Add(time.Hour)}}})
	r.joins("long.test", "GET", makeJoin, 0)
	r.one("nor if nobody has looked for long", len(of[Commit](r.last)) == 1)
}

func TestRefusalToLetJoinIsRemembered(t *testing.T) {
	for _, code := range []string{matrix.MUnableToAuthoriseJoin, matrix.MUnableDueToPartialState} {
		r := newRig(t, unhurried)
		r.works("h.test")
		r.works("other.test")
		r.joins("h.test", "GET", makeJoin, 0)
		op := r.sent().Op
		r.step(Answered{Op: op, Status: 400, Code: code})
		r.step(Done{Op: op, Size: 50, Kept: true})
		r.pass(10 * time.Second)
		r.joins("h.test", "GET", makeJoin+"nother", 0)
		refused := of[Refuse](r.last)
		r.one("another user hears the same", len(refused) == 1 && refused[0].Status == 400 && refused[0].Code == code && strings.Contains(refused[0].Text, "10s ago"))
		r.joins("h.test", "GET", makeJoin, 1)
		r.one("not of another room", len(of[Send](r.last)) == 1)
		r.joins("h.test", "PUT", sendJoin, 0)
		r.one("not for another request", len(of[Send](r.last)) == 1)
		r.joins("other.test", "GET", makeJoin, 0)
		r.one("not by another server", len(of[Send](r.last)) == 1)
		r.pass(roomRefusalFor)
		r.joins("h.test", "GET", makeJoin+"nother", 0)
		r.one("not for ever", len(of[Send](r.last)) == 1)
	}
	r := newRig(t, unhurried)
	r.works("h.test")
	for i := range 2 * maxRefusals {
		r.joins("h.test", "GET", makeJoin, 1+i)
		op := r.sent().Op
		r.step(Answered{Op: op, Status: 403, Code: "M_FORBIDDEN"})
		r.step(Done{Op: op})
		r.joins("h.test", "GET", makeJoin, 1+i)
		op = r.sent().Op // this depends on the user
		r.step(Answered{Op: op, Status: 400, Code: matrix.MUnableToAuthoriseJoin})
		r.step(Done{Op: op})
	}
	if n, m := len(r.m.answers.refusals), r.m.answers.refused.Len(); n != maxRefusals || m != n {
		t.Errorf("%d and %d are remembered, want %d", n, m, maxRefusals)
	}
}

func TestServersOfARoomAreConnectedToAhead(t *testing.T) {
	r := newRig(t, nil)
	r.works("well.test")
	r.profile("dead.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.committed()
	r.all = nil
	servers := []matrix.ServerName{"well.test", "dead.test"}
	for i := range 30 {
		servers = append(servers, matrix.ServerName(fmt.Sprintf("s%d.test", i)))
	}
	r.step(ServersSeen{Room: "!r", Servers: servers})
	s := r.sent()
	r.one("one that nothing is known of", s.Ahead && s.Dest == "s0.test" && s.Req == 0 && s.Notary == nil)
	r.pass(time.Second)
	r.one("no more than a few at a time", len(of[Send](r.all)) == aheadAtOnce)
	for n, start := 0, r.now; n < 29; n++ {
		r.one("none is left out", len(of[Send](r.all)) > n)
		s := of[Send](r.all)[n]
		r.one("in their order", s.Ahead && s.Dest == servers[2+n])
		if n%2 == 0 {
			r.step(Connected{s.Op})
			r.step(Done{Op: s.Op})
		} else {
			r.step(Done{Op: s.Op, Failure: matrix.FailRefused})
		}
		r.pass(100 * time.Millisecond)
		if most := 1 + aheadAtOnce + int(r.now.Sub(start)/(100*time.Millisecond)); len(of[Send](r.all)) > most {
			t.Fatalf("%d attempts after %s, want %d at most", len(of[Send](r.all)), r.now.Sub(start), most)
		}
	}
	r.profile("s0.test", 1)
	r.one("what works is a proven host", r.m.hosts["s0.test"].lane(r.now) == laneProven && len(of[Send](r.last)) == 1)
	r.profile("s1.test", 1)
	r.one("what does not is known to", len(of[Refuse](r.last)) == 1)
	if w := of[Discard](r.all); len(w) != 29 {
		t.Errorf("%d attempts were let go", len(w))
	}
}

func TestServersToConnectToKeepToTheirBound(t *testing.T) {
	r := newRig(t, nil)
	var servers []matrix.ServerName
	for i := range maxAhead + 100 {
		servers = append(servers, matrix.ServerName(fmt.Sprintf("s%d.test", i)))
	}
	r.step(ServersSeen{Servers: servers})
	r.step(ServersSeen{Servers: servers})
	if n := r.m.Snapshot(r.now, 0).AheadWaiting; n != maxAhead {
		t.Errorf("%d wait, want %d", n, maxAhead)
	}
	r = newRig(t, func(c *Config) { c.Preflight = 0 })
	r.step(ServersSeen{Servers: servers})
	r.one("none is connected to if that is not wanted", len(r.last) == 0 && r.m.joins.ahead.Len() == 0)
	r = newRig(t, nil)
	r.step(ServersSeen{Servers: servers})
	op := r.sent().Op
	r.step(Draining{})
	r.one("nor while draining", reflect.DeepEqual(of[Cancel](r.last), []Cancel{{op}}))
	r.step(Done{Op: op, Failure: matrix.FailCancelled})
	r.pass(time.Second)
	r.one("that is not waited for", len(of[Send](r.all)) == 1 && len(of[Drained](r.all)) == 1)
}

// The few workers that are left to the last class may all be taken; the host has
// shown by then that it works.
func TestServerThatIsReachedMeanwhileIsNotConnectedToAgain(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 8, 1, 1 })
	r.profile("busy.test", 1)
	busy := r.sent().Op
	r.step(ServersSeen{Servers: []matrix.ServerName{"s.test"}})
	r.one("there is no worker", len(of[Send](r.last)) == 0)
	r.get("s.test", "GET", "/_matrix/federation/v1/make_join/r/u")
	r.step(Connected{busy})
	join := r.sent().Op
	r.step(Connected{join})
	r.answer(join, 200)
	r.answer(busy, 200)
	r.pass(time.Second)
	for _, s := range of[Send](r.all) {
		r.one("nothing is connected to", !s.Ahead)
	}
	if r.m.joins.aheads != 0 {
		t.Error("it still waits")
	}
}

// A request for a server that is just being connected to in advance waits for that,
// and hears at once if it fails.
func TestRequestBehindAFailedConnectionAheadIsRefused(t *testing.T) {
	r := newRig(t, nil)
	r.step(ServersSeen{Room: "!r", Servers: []matrix.ServerName{"s.test"}})
	ahead := r.sent().Op
	id := r.profile("s.test", 1)
	r.one("it waits", len(r.last) == 0)
	r.step(Done{Op: ahead, Failure: matrix.FailRefused, Detail: "dial"})
	refused := of[Refuse](r.last)
	r.one("and is refused with the reason", len(refused) == 1 && refused[0].Req == id && refused[0].Status == 502 && strings.Contains(refused[0].Text, "connection refused"))
	r.one("without an attempt of its own", len(of[Send](r.all)) == 1)

	r = newRig(t, nil)
	r.step(ServersSeen{Room: "!r", Servers: []matrix.ServerName{"s.test"}})
	ahead = r.sent().Op
	id = r.profile("s.test", 1)
	r.step(Connected{ahead})
	r.one("the connection lets it go", r.sent().Req == id)
}

func TestServersAreConnectedToAtTheConfiguredRate(t *testing.T) {
	for _, rate := range []float64{0.5, 2, 50} {
		r := newRig(t, func(c *Config) { c.Preflight = rate })
		var servers []matrix.ServerName
		for i := range 20 {
			servers = append(servers, matrix.ServerName(fmt.Sprintf("s%d.test", i)))
		}
		start := r.now
		r.step(ServersSeen{Servers: servers})
		var at []time.Duration
		for seen := 0; seen < len(servers); { // each ends at once, so that only the rate holds the next up
			if len(of[Send](r.all)) == seen {
				next, ok := r.m.NextWake()
				r.one("there is a next one", ok)
				r.pass(next.Sub(r.now))
				continue
			}
			at = append(at, r.now.Sub(start))
			op := of[Send](r.all)[seen].Op
			seen++
			r.step(Connected{op})
			r.step(Done{Op: op})
		}
		for i, d := range at {
			if want := time.Duration(float64(i) * float64(time.Second) / rate); d != want {
				t.Errorf("at %g a second, attempt %d begins after %s, want %s", rate, i, d, want)
				break
			}
		}
	}
}

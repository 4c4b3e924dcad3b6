package bus

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

func want(server matrix.ServerName, id string, min matrix.Timestamp) matrix.KeyWant {
	return matrix.KeyWant{Server: server, KeyID: id, MinValid: min}
}

// wants are for one key of each of n servers, from number i on.
func wants(i, n int) (list []matrix.KeyWant) {
	for k := range n {
		list = append(list, want(matrix.ServerName(fmt.Sprintf("s%05d.test", i+k)), "ed25519:1", 0))
	}
	return list
}

// keys sends a query to a notary, or to the bus itself as one if that is "own.test".
func (r *rig) keys(via matrix.ServerName, wants ...matrix.KeyWant) ReqID {
	r.t.Helper()
	r.req++
	a := Arrived{Req: r.req, Dest: via, Endpoint: keyQueryRow, Class: keyQueryRow.Class, Received: r.now}
	a.Key = keyOf(via, fmt.Sprint(r.req))
	r.step(KeyQuery{Arrived: a, Own: via == "own.test", Wants: wants})
	return r.req
}

// looked tells the machine that the store has nothing of the latest query but
// what is not among missing.
func (r *rig) looked(missing ...matrix.KeyWant) {
	r.t.Helper()
	list := of[LoadKeys](r.all)
	r.step(KeysLoaded{Query: list[len(list)-1].Query, Missing: missing})
}

// asks sends a query of which the store has nothing.
func (r *rig) asks(via matrix.ServerName, wants ...matrix.KeyWant) ReqID {
	r.t.Helper()
	id := r.keys(via, wants...)
	r.looked(wants...)
	return id
}

// notary makes a notary a proven host.
func notaryRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	r := newRig(t, change)
	r.works("notary.test")
	r.all = nil
	return r
}

func ownNotary(c *Config) { c.Keys.OwnName = "own.test" }

// keysCame ends an attempt well.
func (r *rig) keysCame(op OpID, missing ...matrix.ServerName) {
	r.t.Helper()
	r.step(Answered{Op: op, Status: 200})
	r.step(Done{Op: op, Size: 1000, Missing: missing})
}

// replied returns who has been answered with keys since the last time, in order.
func (r *rig) replied() (ids []ReqID) {
	for _, e := range of[ReplyKeys](r.all) {
		ids = append(ids, e.Req)
	}
	r.all = slices.DeleteFunc(r.all, func(e Effect) bool { _, ok := e.(ReplyKeys); return ok })
	return ids
}

func (r *rig) repliedTo(what string, ids ...ReqID) {
	r.t.Helper()
	if got := r.replied(); !slices.Equal(got, ids) {
		r.t.Fatalf("%s: %v are answered, want %v; the last step gave %+v", what, got, ids, r.last)
	}
}

func TestKnownKeysAnswerAQueryAtOnce(t *testing.T) {
	r := notaryRig(t, nil)
	list := wants(1, 3)
	id := r.keys("notary.test", list...)
	r.one("the store is looked through", reflect.DeepEqual(r.last, []Effect{LoadKeys{Query: 1, Via: "notary.test", Wants: list}}))
	r.looked()
	r.one("and has all", reflect.DeepEqual(r.last, []Effect{ReplyKeys{Req: id, Via: "notary.test", Wants: list}, Free{id}}))
	r.step(Gone{id})
	r.one("that is its end", len(r.last) == 0)
	r.replied()
	id = r.keys("notary.test")
	r.looked()
	r.repliedTo("one that asks for nothing", id)
}

func TestMissingKeysOfManyQueriesGoTogether(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(1, 2)...)
	b := r.asks("notary.test", wants(2, 2)...)
	r.one("they wait for more", len(of[Send](r.all)) == 0)
	r.pass(gather)
	s := of[Send](r.all)
	r.one("and go as one", len(s) == 1 && reflect.DeepEqual(s[0].Notary, wants(1, 3)) && s[0].Dest == "notary.test" && s[0].Req == 0)
	c := r.asks("notary.test", wants(3, 1)...)
	r.one("what is on its way is not asked for again", len(of[Send](r.all)) == 1)
	r.keysCame(s[0].Op)
	r.repliedTo("all three", a, b, c)
	r.one("nothing is kept of the attempt", len(of[Discard](r.all)) == 1)
}

func TestBatchesAreFullAndSideBySide(t *testing.T) {
	r := notaryRig(t, func(c *Config) { c.Keys.Parallel = 3 })
	id := r.asks("notary.test", wants(0, 170)...)
	sends := of[Send](r.all)
	r.one("three at once, without waiting", len(sends) == 3)
	for i, s := range sends {
		r.one("of fifty servers each", reflect.DeepEqual(s.Notary, wants(50*i, 50)))
	}
	r.pass(time.Second)
	r.one("no fourth", len(of[Send](r.all)) == 3)
	r.keysCame(sends[1].Op)
	r.pass(time.Second)
	sends = of[Send](r.all)
	r.one("but when one has ended", len(sends) == 4 && reflect.DeepEqual(sends[3].Notary, wants(150, 20)))
	for _, i := range []int{0, 3, 2} {
		r.one("the query waits for all", len(r.replied()) == 0)
		r.keysCame(sends[i].Op)
	}
	r.repliedTo("the query", id)
}

func TestSlowBatchHoldsUpNobody(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(0, 60)...)
	late := r.now.Add(5 * time.Second)
	r.pass(time.Second)
	sends := of[Send](r.all)
	r.one("two batches", len(sends) == 2)
	r.keysCame(sends[1].Op)
	b := r.asks("notary.test", wants(55, 1)...)
	r.pass(time.Second)
	r.one("others go on", len(of[Send](r.all)) == 3)
	r.keysCame(of[Send](r.all)[2].Op)
	r.repliedTo("what does not wait for it", b)
	higher := r.asks("notary.test", want("s00001.test", "ed25519:1", 99))
	r.pass(late.Sub(r.now) - 1)
	r.one("the slow one is waited for", len(r.replied()) == 0 && len(of[Refuse](r.all)) == 0)
	r.pass(1)
	r.one("for five seconds, even by who wants more", len(of[Refuse](r.all)) == 1 && of[Refuse](r.all)[0].Req == higher)
	r.repliedTo("some of the first query has come", a)
	c := r.asks("notary.test", wants(1, 1)...)
	r.one("nor is who asks then", len(of[Refuse](r.last)) == 1 && of[Refuse](r.last)[0].Req == c && of[Refuse](r.last)[0].Status == 502)
	d := r.keys("notary.test", wants(0, 60)...)
	r.looked(wants(0, 50)...)
	r.repliedTo("what is known is better than nothing", d)
	r.step(Answered{Op: sends[0].Op, Status: 200})
	r.one("it is not cancelled", len(of[Cancel](r.all)) == 0)
	r.step(Done{Op: sends[0].Op})
	e := r.keys("notary.test", wants(1, 1)...)
	r.looked()
	r.repliedTo("what came late is for the next", e)
	if s := r.m.stats; s.KeysLate != 1 {
		t.Errorf("%d batches were late", s.KeysLate)
	}
}

func TestBatchThatNeverEndsIsGivenUp(t *testing.T) {
	r := notaryRig(t, nil)
	r.asks("notary.test", wants(0, 1)...)
	r.pass(gather + keysGiveUp - 1)
	r.one("not yet", len(of[Cancel](r.all)) == 0)
	r.pass(1)
	op := of[Cancel](r.all)[0].Op
	r.step(Done{Op: op, Failure: matrix.FailCancelled})
	r.asks("notary.test", wants(0, 1)...)
	r.pass(gather)
	r.one("and asked for again", len(of[Send](r.all)) == 2)
}

func TestWhoWantsMoreThanIsAskedForIsServedNext(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", want("s.test", "ed25519:1", 5))
	r.pass(gather)
	same := r.asks("notary.test", want("s.test", "ed25519:1", 4))
	more := r.asks("notary.test", want("s.test", "ed25519:1", 6))
	most := r.asks("notary.test", want("s.test", "ed25519:1", 7))
	other := r.asks("notary.test", want("s.test", "ed25519:2", 1))
	r.pass(time.Second)
	r.one("one at a time for a server", len(of[Send](r.all)) == 1)
	r.keysCame(of[Send](r.all)[0].Op)
	again := of[LoadKeys](r.last)
	r.repliedTo("those that are content", a, same)
	r.one("what came may do for the others", len(again) == 3)
	for _, look := range again {
		r.step(KeysLoaded{Query: look.Query, Missing: look.Wants})
	}
	r.pass(gather)
	s := of[Send](r.all)
	r.one("the others go together", len(s) == 2 && reflect.DeepEqual(s[1].Notary, []matrix.KeyWant{want("s.test", "ed25519:1", 7), want("s.test", "ed25519:2", 1)}))
	r.keysCame(s[1].Op)
	r.repliedTo("the others", more, most, other)
}

func TestAnyKeyCoversAll(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", want("s.test", "", 5))
	r.pass(gather)
	b := r.asks("notary.test", want("s.test", "ed25519:9", 5))
	r.pass(time.Second)
	r.one("one request", len(of[Send](r.all)) == 1)
	r.keysCame(of[Send](r.all)[0].Op)
	r.repliedTo("both", a, b)
}

func TestKeysOfAQueryThatIsGoneAreNotAskedFor(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(0, 1)...)
	r.step(Gone{a})
	r.one("it is freed", reflect.DeepEqual(r.last, []Effect{Free{a}}))
	b := r.keys("notary.test", wants(1, 1)...)
	r.step(Gone{b})
	r.looked(wants(1, 1)...)
	c := r.asks("notary.test", wants(2, 1)...)
	r.pass(time.Second)
	s := of[Send](r.all)
	r.one("only what somebody waits for goes", len(s) == 1 && reflect.DeepEqual(s[0].Notary, wants(2, 1)))
	r.step(Gone{c})
	r.one("what is under way runs on, for the next", len(of[Cancel](r.last)) == 0)
	r.keysCame(s[0].Op)
	r.one("nobody is answered", len(r.replied()) == 0)
	if n := len(r.m.keys.fetches) + len(r.m.keys.notaries) + r.m.keys.wants; n != 0 {
		t.Errorf("%d fetches, notaries and wants are left", n)
	}
}

func TestNotaryThatIsDead(t *testing.T) {
	r := newRig(t, nil)
	a := r.asks("notary.test", wants(0, 1)...)
	b := r.keys("notary.test", wants(0, 2)...)
	r.looked(wants(0, 1)...)
	r.pass(gather)
	r.step(Done{Op: of[Send](r.all)[0].Op, Failure: matrix.FailRefused})
	refused := of[Refuse](r.last)
	r.one("whoever gets nothing hears why", len(refused) == 1 && refused[0].Req == a && refused[0].Status == 502 && strings.Contains(refused[0].Text, "connection refused"))
	r.repliedTo("who has a part of it gets that", b)
	c := r.asks("notary.test", wants(0, 60)...)
	refused = of[Refuse](r.last)
	r.one("it is not tried again at once", len(refused) == 1 && refused[0].Req == c && len(of[Send](r.all)) == 1)
}

func TestNotaryThatRefuses(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(0, 1)...)
	r.pass(gather)
	r.answer(of[Send](r.all)[0].Op, 500)
	refused := of[Refuse](r.last)
	r.one("its status is in the text", len(refused) == 1 && refused[0].Req == a && strings.Contains(refused[0].Text, "500"))
	b := r.asks("notary.test", wants(0, 1)...)
	r.pass(gather)
	r.step(Answered{Op: of[Send](r.all)[1].Op, Status: 200})
	r.step(Done{Op: of[Send](r.all)[1].Op, Failure: matrix.FailCut})
	refused = of[Refuse](r.last)
	r.one("an answer that is cut is none", len(refused) == 1 && refused[0].Req == b && strings.Contains(refused[0].Text, "cut short"))
}

func TestNotaryThatLimitsOurRateIsAskedAgain(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(0, 2)...)
	r.pass(gather)
	limited := func(n int, wait time.Duration) {
		op := of[Send](r.all)[n].Op
		r.step(Answered{Op: op, Status: 429, RetryAfter: wait})
		r.step(Done{Op: op})
	}
	limited(0, 2*time.Second)
	r.pass(2*time.Second - 1)
	r.one("not before it may be", len(of[Send](r.all)) == 1)
	r.pass(1)
	r.pass(gather)
	s := of[Send](r.all)
	r.one("then for the same", len(s) == 2 && reflect.DeepEqual(s[1].Notary, s[0].Notary))
	r.keysCame(s[1].Op)
	r.repliedTo("the query", a)
	b := r.asks("notary.test", wants(5, 1)...)
	for i := range keysAgain + 1 {
		r.pass(3 * time.Second)
		limited(2+i, time.Second)
	}
	refused := of[Refuse](r.all)
	r.one("not for ever", len(refused) == 1 && refused[0].Req == b)
	r.pass(3 * time.Second)
	c := r.asks("notary.test", wants(6, 1)...)
	r.pass(gather)
	limited(2+keysAgain+1, time.Minute)
	refused = of[Refuse](r.last)
	r.one("nor if it takes longer than anybody waits", len(refused) == 1 && refused[0].Req == c)
}

// The waiters of a batch that is put off may leave, while others want more of one
// of its servers.
func TestWhoWantsMoreIsNotLostWithABatchThatIsPutOff(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", want("s.test", "ed25519:1", 5))
	r.pass(gather)
	op := of[Send](r.all)[0].Op
	b := r.asks("notary.test", want("s.test", "ed25519:1", 6))
	r.step(Answered{Op: op, Status: 429, RetryAfter: time.Second})
	r.step(Done{Op: op})
	r.step(Gone{a})
	r.pass(2 * time.Second)
	s := of[Send](r.all)
	r.one("what is still wanted is asked for", len(s) == 2 && s[1].Notary[0].MinValid == 6)
	r.keysCame(s[1].Op)
	r.repliedTo("the other", b)
}

func TestQueryIsAnsweredBeforeItsCallerGivesUp(t *testing.T) {
	r := notaryRig(t, func(c *Config) { c.Keys.Wait = time.Hour })
	a := r.asks("notary.test", wants(0, 1)...)
	b := r.keys("notary.test", wants(1, 1)...) // the store hangs
	due := r.m.deadline(Arrived{Received: r.now, Endpoint: keyQueryRow}).Add(-keysAnswerBy)
	r.pass(gather)
	op := of[Send](r.all)[0].Op
	r.pass(due.Sub(r.now) - 1)
	r.one("it has time", len(r.replied()) == 0)
	r.pass(1)
	r.repliedTo("in time for the caller to ask elsewhere", a)
	refused := of[Refuse](r.all)
	r.one("even if the store is late", len(refused) == 1 && refused[0].Req == b && refused[0].Status == 502)
	r.step(Gone{a})
	r.step(KeysLoaded{Query: 2, Missing: wants(1, 1)})
	r.one("which then has nothing fetched", len(r.last) == 0)
	r.step(Done{Op: op, Failure: matrix.FailCancelled}) // given up after half a minute
	r.pass(time.Second)
	r.one("no other was sent", len(of[Send](r.all)) == 1)
}

func TestServerWithoutValidKeysIsNotAskedForAMinute(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(0, 3)...)
	r.pass(gather)
	r.keysCame(of[Send](r.all)[0].Op, "s00001.test")
	b := r.asks("notary.test", wants(1, 1)...)
	r.repliedTo("with what there is", a, b)
	c := r.asks("notary.test", wants(2, 1)...)
	r.pass(gather)
	r.one("others are asked for", len(of[Send](r.all)) == 2)
	r.keysCame(of[Send](r.all)[1].Op)
	r.repliedTo("it", c)
	r.asks("other.test", wants(1, 1)...)
	r.pass(gather)
	r.one("another notary may know it", len(of[Send](r.all)) == 3)
	r.pass(keysMissingFor)
	r.asks("notary.test", wants(1, 1)...)
	r.pass(gather)
	r.one("after a minute", len(of[Send](r.all)) == 4)
}

func TestServersWithoutKeysAreRememberedToABound(t *testing.T) {
	r := notaryRig(t, nil)
	for i := range maxKeysMissing + 500 {
		r.m.keysMiss(fetchKey{"notary.test", matrix.ServerName(fmt.Sprintf("s%05d.test", i))})
	}
	if n, order := len(r.m.keys.missing), r.m.keys.forgot.Len(); n != maxKeysMissing || order != n {
		t.Errorf("%d and %d are remembered, want %d", n, order, maxKeysMissing)
	}
}

func TestOwnNotaryAsksEachServerOnce(t *testing.T) {
	r := newRig(t, ownNotary)
	a := r.asks("own.test", want("s1.test", "ed25519:1", 1), want("s2.test", "ed25519:1", 1))
	b := r.asks("own.test", want("s1.test", "ed25519:2", 5), want("s3.test", "ed25519:1", 1))
	s := of[Send](r.all)
	r.one("one request to each", len(s) == 3)
	for i, name := range []matrix.ServerName{"s1.test", "s2.test", "s3.test"} {
		r.one("for its own keys", s[i].Dest == name && s[i].Origin && s[i].Notary == nil && s[i].Req == 0)
	}
	for _, load := range of[LoadKeys](r.all) {
		r.one("looked up under the bus's own name", load.Via == "own.test")
	}
	r.step(Connected{s[0].Op})
	r.keysCame(s[0].Op)
	r.step(Done{Op: s[1].Op, Failure: matrix.FailRefused})
	r.repliedTo("with what there is", a)
	r.keysCame(s[2].Op, "s3.test")
	r.repliedTo("even if that is nothing", b)
	c := r.asks("own.test", want("s3.test", "ed25519:1", 1))
	r.repliedTo("which is known for a minute", c)
	r.get("s3.test", "GET", "/_matrix/key/v2/server")
	refused := of[Refuse](r.last)
	r.one("the homeserver's own try would come to the same", len(refused) == 1 && refused[0].Status == 502)
	r.pass(keysMissingFor)
	r.get("s3.test", "GET", "/_matrix/key/v2/server")
	r.one("for a minute", len(of[Send](r.last)) == 1)
}

func TestHangingServersHoldUpAQueryForFiveSeconds(t *testing.T) {
	r := newRig(t, func(c *Config) { ownNotary(c); c.Workers, c.Unknown, c.Failing = 16, 8, 4 })
	hanging := wants(0, 6)
	id := r.asks("own.test", append(slices.Clone(hanging), want("well.test", "ed25519:1", 1))...)
	start := r.now
	first := of[Send](r.all)
	r.one("all are asked", len(first) == 7)
	well := first[6]
	r.step(Connected{well.Op})
	r.keysCame(well.Op)
	for i := range 20 { // others want such a worker, so those that hang go among the failing
		r.profile(matrix.ServerName(fmt.Sprintf("p%d.test", i)), 1)
	}
	for r.now.Sub(start) < 5*time.Second {
		r.pass(100 * time.Millisecond)
		for _, c := range of[Cancel](r.last) {
			r.step(Done{Op: c.Op, Failure: matrix.FailCancelled})
		}
	}
	r.repliedTo("after five seconds", id)
	if r.m.lanes[laneFailing].slots.Used == 0 {
		t.Error("none was put among the failing ones")
	}
	again := r.asks("own.test", hanging...)
	r.repliedTo("nor is the next held up", again)
}

// A server that accepts connections and says nothing is not asked again soon.
func TestMuteServerIsAskedForItsKeysOnce(t *testing.T) {
	r := newRig(t, ownNotary)
	id := r.asks("own.test", want("s.test", "ed25519:1", 1))
	op := r.sent().Op
	r.step(Connected{op})
	r.pass(5 * time.Second)
	r.repliedTo("the first", id)
	r.pass(keysGiveUp)
	r.step(Done{Op: op, Failure: matrix.FailCancelled})
	id = r.asks("own.test", want("s.test", "ed25519:1", 1))
	r.repliedTo("the second, at once", id)
	if n := len(of[Send](r.all)); n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestKeysThatAreAskedForHaveABound(t *testing.T) {
	r := newRig(t, func(c *Config) { ownNotary(c); c.Keys.MaxWants = 100 })
	r.works("notary.test")
	r.all = nil
	r.asks("notary.test", wants(0, 90)...)
	r.one("two batches", len(of[Send](r.all)) == 1) // the rest waits for company
	id := r.keys("notary.test", wants(90, 11)...)
	s := r.sent()
	r.one("more is carried through as it is", s.Req == id && s.Notary == nil && len(of[LoadKeys](r.last)) == 0)
	r.keys("own.test", wants(90, 11)...)
	looked := of[LoadKeys](r.last)
	r.one("the bus itself answers what it can", len(looked) == 1 && reflect.DeepEqual(looked[0].Wants, wants(90, 10)))
	own := r.keys("own.test", wants(90, 1)...)
	refused := of[Refuse](r.last)
	r.one("and then no more", len(refused) == 1 && refused[0].Req == own && refused[0].Status == 503)
	r.step(KeysSeen{Room: "!r", Wants: wants(200, 1)})
	r.one("nothing is fetched ahead then", len(r.last) == 0 && r.m.stats.KeysSkipped == 1)
	if g := r.m.Snapshot(r.now, 0).KeysWanted; g.Used != 100 || g.Limit != 100 || g.Max != 100 {
		t.Errorf("the gauge is %+v", g)
	}
}

func TestQueriesCountAmongTheRequests(t *testing.T) {
	r := notaryRig(t, func(c *Config) { c.MaxRequests = 3 })
	for i := range 3 {
		r.keys("notary.test", wants(i, 1)...)
	}
	id := r.keys("notary.test", wants(9, 1)...)
	refused := of[Refuse](r.last)
	r.one("the fourth is one too many", len(refused) == 1 && refused[0].Req == id && refused[0].Status == 503)
	r.profile("h.test", 1)
	r.one("so is another request", len(of[Refuse](r.last)) == 1)
	if g := r.m.Snapshot(r.now, 0).Requests; g.Used != 3 || g.Max != 3 {
		t.Errorf("the gauge is %+v", g)
	}
}

func TestKeysThatAreSeenAreFetchedAhead(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Keys.MaxWants = 100 })
	r.step(KeysSeen{Room: "!r", Wants: wants(0, 10)})
	r.one("not while no notary is known", len(r.last) == 0)
	r.step(Restored{Notary: "notary.test"})
	r.step(KeysSeen{Room: "!r", Wants: wants(0, 20)})
	r.looked(wants(0, 20)...)
	r.step(KeysSeen{Room: "!r", Wants: wants(20, 6)})
	r.one("no more than a quarter of the bound", len(r.last) == 0)
	r.pass(gather)
	s := of[Send](r.all)
	r.one("from the notary of the time before", len(s) == 1 && s[0].Dest == "notary.test" && len(s[0].Notary) == 20)
	r.step(Connected{s[0].Op})
	id := r.asks("notary.test", wants(3, 1)...)
	r.keysCame(s[0].Op)
	r.repliedTo("who asks shares them", id)
	r.step(KeysSeen{Room: "!r", Wants: wants(20, 6)})
	r.one("there is room again", len(of[LoadKeys](r.last)) == 1)
	r.looked(wants(20, 6)...)
	r.pass(keysGiveUp + time.Second)
	if n := r.m.keys.wants + r.m.keys.ahead; n != 0 {
		t.Errorf("%d keys are still wanted", n)
	}
	r.step(KeysSeen{Room: "!r", Wants: wants(60, 1)})
	r.looked(wants(60, 1)...)
	r.step(KeysSeen{Room: "!r", Wants: wants(70, 1)})
	r.step(Draining{})
	r.looked(wants(70, 1)...)
	r.step(KeysSeen{Room: "!r", Wants: wants(80, 1)})
	r.one("not while draining", len(of[LoadKeys](r.last)) == 0)
	sends := len(of[Send](r.all))
	r.pass(time.Minute)
	r.one("nor what was to be", len(of[Send](r.all)) == sends && len(r.m.keys.queries) == 0)
}

// keyNet is a notary and a store that answer by themselves.
type keyNet struct {
	*rig
	latency time.Duration
	future  []keyEvent
	stored  map[matrix.ServerName]bool
	open    int // attempts
	most    int
	sends   int
	done    map[ReqID]sched.Time
	newer   bool // later queries want more, so that a server may be asked for again
}

type keyEvent struct {
	at sched.Time
	do func()
}

func (k *keyNet) in(d time.Duration, do func()) {
	e := keyEvent{k.now.Add(d), do}
	i, _ := slices.BinarySearchFunc(k.future, e, func(a, b keyEvent) int {
		if a.at == b.at {
			return -1
		}
		return cmp.Compare(a.at, b.at)
	})
	k.future = slices.Insert(k.future, i, e)
}

// handle does what the last step asks for.
func (k *keyNet) handle() {
	k.t.Helper()
	for _, e := range k.last {
		switch e := e.(type) {
		case LoadKeys:
			k.in(2*time.Millisecond, func() {
				ev := KeysLoaded{Query: e.Query}
				for _, w := range e.Wants {
					if !k.stored[w.Server] {
						ev.Missing = append(ev.Missing, w)
					}
				}
				k.step(ev)
			})
		case Send:
			k.open++
			k.sends++
			k.most = max(k.most, k.open)
			if len(e.Notary) > 50 {
				k.t.Fatalf("a batch of %d", len(e.Notary))
			}
			k.in(k.latency, func() { k.step(Answered{Op: e.Op, Status: 200}) })
			k.in(k.latency+10*time.Millisecond, func() {
				for _, w := range e.Notary {
					if k.stored[w.Server] && !k.newer {
						k.t.Fatalf("%s is asked for twice", w.Server)
					}
					k.stored[w.Server] = true
				}
				k.open--
				k.step(Done{Op: e.Op})
			})
		case ReplyKeys:
			for _, w := range e.Wants {
				if !k.stored[w.Server] {
					k.t.Fatalf("request %d is answered without the key of %s", e.Req, w.Server)
				}
			}
			k.done[e.Req] = k.now
		case Refuse:
			k.t.Fatalf("%+v", e)
		}
	}
	k.all, k.last = nil, nil
}

func (k *keyNet) run() {
	k.t.Helper()
	for len(k.future) > 0 {
		if at, ok := k.m.NextWake(); ok && at < k.future[0].at {
			k.now = max(k.now, at)
			k.step(Tick{})
			k.handle()
			continue
		}
		e := k.future[0]
		k.future = k.future[1:]
		k.now = e.at
		e.do()
		k.handle()
	}
}

// 10,000 queries of 2,000 servers, all at once or in the course of some seconds.
func TestManyKeyQueriesAreFewRequests(t *testing.T) {
	for _, over := range []time.Duration{time.Millisecond, time.Second, 5 * time.Second, 8 * time.Second} {
		r := notaryRig(t, func(c *Config) { c.MaxRequests, c.MaxHosts = 11_000, 12_000; c.Keys.MaxWants = 20_000 })
		r.checkEach = 997
		k := &keyNet{rig: r, latency: 2 * time.Second, stored: map[matrix.ServerName]bool{}, done: map[ReqID]sched.Time{}}
		start := k.now
		const queries, servers = 10_000, 2_000
		rng := rand.New(rand.NewPCG(3, 4))
		for i := range queries {
			at, server := over*time.Duration(i)/queries, rng.IntN(servers)
			if i%5 == 0 {
				server = i / 5 // so that each is among them
			}
			k.in(at, func() { k.keys("notary.test", wants(server, 1)...) })
		}
		k.run()
		var last sched.Time
		for _, at := range k.done {
			last = max(last, at)
		}
		took := last.Sub(start)
		t.Logf("over %s: %d requests, at most %d at a time, done after %s", over, k.sends, k.most, took)
		if k.sends > 60 || k.most > 10 || took > 15*time.Second || len(k.done) != queries || len(k.stored) != servers {
			t.Errorf("over %s: %d requests, at most %d at a time, done after %s, %d answers, %d servers", over, k.sends, k.most, took, len(k.done), len(k.stored))
		}
	}
}

func TestQueryOfOneOfTwoThatIsGone(t *testing.T) {
	r := notaryRig(t, nil)
	a := r.asks("notary.test", wants(0, 2)...)
	b := r.asks("notary.test", wants(1, 2)...)
	r.step(Gone{a})
	r.one("it is freed", reflect.DeepEqual(r.last, []Effect{Free{a}}))
	r.pass(gather)
	s := of[Send](r.all)
	r.one("what the other wants is asked for, and no more", len(s) == 1 && reflect.DeepEqual(s[0].Notary, wants(1, 2)))
	c := r.asks("notary.test", wants(1, 1)...)
	r.step(Gone{b})
	r.keysCame(s[0].Op)
	r.repliedTo("one who is left while it runs", c)
	for _, id := range []ReqID{a, b, c} {
		n := 0
		for _, f := range of[Free](r.all) {
			if f.Req == id {
				n++
			}
		}
		r.one("each is freed once", n == 1)
	}
	r.one("nobody is refused", len(of[Refuse](r.all)) == 0)
}

func TestNotaryThatFailsLeavesWhatIsKnown(t *testing.T) {
	r := notaryRig(t, nil)
	for _, status := range []int{400, 404, 500, 502} {
		r.all = nil
		part := r.keys("notary.test", wants(0, 2)...)
		r.looked(wants(0, 1)...)
		nothing := r.asks("notary.test", wants(0, 1)...)
		r.pass(time.Second)
		r.answer(of[Send](r.all)[0].Op, status)
		refused := of[Refuse](r.last)
		r.one("nothing is known", len(refused) == 1 && refused[0].Req == nothing && refused[0].Status == 502 && strings.Contains(refused[0].Text, fmt.Sprint(status)))
		r.repliedTo("something is known", part)
	}
}

// How a server fails does not matter: its homeserver is kept from trying the same,
// unless the fault is ours.
func TestServerThatFailsIsNotAskedForItsKeysAgain(t *testing.T) {
	for _, tt := range []struct {
		what      string
		status    int // 0: no answer
		failure   matrix.Failure
		connected bool
		again     bool
	}{
		{what: "no such path", status: 404},
		{what: "a front without its server", status: 502},
		{what: "limited", status: 429},
		{what: "cut", status: 200, failure: matrix.FailCut},
		{what: "not JSON", status: 200, failure: matrix.FailContent},
		{what: "refused", failure: matrix.FailRefused},
		{what: "never connected", failure: matrix.FailTimeout},
		{what: "mute", failure: matrix.FailTimeout, connected: true},
		{what: "our own fault", failure: matrix.FailLocal, again: true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			r := newRig(t, ownNotary)
			id := r.asks("own.test", want("s.test", "ed25519:1", 1), want("well.test", "ed25519:1", 1))
			s := of[Send](r.all)
			r.one("both are asked", len(s) == 2)
			if tt.connected || tt.status != 0 {
				r.step(Connected{s[0].Op})
			}
			if tt.status != 0 {
				r.step(Answered{Op: s[0].Op, Status: tt.status, RetryAfter: time.Hour})
			}
			r.step(Done{Op: s[0].Op, Failure: tt.failure})
			r.one("the other is waited for", len(r.replied()) == 0)
			r.keysCame(s[1].Op)
			r.repliedTo("then it is answered", id)
			id = r.asks("own.test", want("s.test", "ed25519:2", 9))
			if tt.again {
				r.one("it is asked again", len(of[Send](r.last)) == 1)
				return
			}
			r.repliedTo("the next at once", id)
			get := r.get("s.test", "GET", "/_matrix/key/v2/server")
			refused := of[Refuse](r.last)
			r.one("and the homeserver's own", len(refused) == 1 && refused[0].Req == get && (refused[0].Status == 502 || refused[0].Status == 429))
			r.one("with nothing sent", len(of[Send](r.all)) == 2)
		})
	}
}

// Servers that are known to be dead end their part of a query while the rest of it
// is not asked for yet.
func TestDeadServerDoesNotEndAQueryForOthers(t *testing.T) {
	r := newRig(t, ownNotary)
	r.profile("dead.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.all = nil
	id := r.asks("own.test", want("dead.test", "ed25519:1", 1), want("well.test", "ed25519:1", 1))
	s := of[Send](r.all)
	r.one("the other is asked", len(s) == 1 && s[0].Dest == "well.test")
	r.one("and waited for", len(r.replied()) == 0)
	r.step(Connected{s[0].Op})
	r.keysCame(s[0].Op)
	r.repliedTo("then it is answered", id)
}

func TestDrainingEndsWhenTheLastQueryIsAnswered(t *testing.T) {
	r := notaryRig(t, nil)
	r.asks("notary.test", wants(0, 1)...)
	r.pass(gather)
	r.keysCame(of[Send](r.all)[0].Op)
	r.all = nil
	r.step(KeysSeen{Wants: wants(10, 50)})
	r.looked(wants(10, 50)...)
	ahead := r.sent()
	r.step(KeysSeen{Wants: wants(70, 3)})
	seen := of[LoadKeys](r.last)[0].Query
	r.step(KeysSeen{Wants: wants(80, 3)})
	r.looked(wants(80, 3)...)
	a := r.keys("notary.test", wants(20, 1)...)
	query := of[LoadKeys](r.last)[0].Query
	b := r.asks("notary.test", wants(100, 1)...)
	r.replied()
	r.step(Draining{})
	r.one("what nobody waits for is cut short", reflect.DeepEqual(of[Cancel](r.last), []Cancel{{ahead.Op}}))
	r.step(Done{Op: ahead.Op, Failure: matrix.FailCancelled})
	r.step(KeysLoaded{Query: query, Missing: wants(20, 1)})
	r.pass(time.Second)
	s := of[Send](r.all)
	r.one("what somebody waits for is fetched", len(s) == 2 && reflect.DeepEqual(s[1].Notary, []matrix.KeyWant{wants(100, 1)[0], wants(20, 1)[0]}))
	r.one("and that is waited for", len(of[Drained](r.all)) == 0)
	r.keysCame(s[1].Op)
	r.repliedTo("both", b, a)
	for batch := range r.m.commits {
		r.step(Committed{Batch: batch, OK: true})
	}
	r.one("then it is done", len(of[Drained](r.last)) == 1)
	r.step(KeysLoaded{Query: seen, Missing: wants(70, 3)})
	r.pass(time.Minute)
	r.one("and stays so", len(of[Send](r.all)) == 2 && len(of[Drained](r.all)) == 1)
	if d := &r.m.keys; len(d.queries)+len(d.fetches)+d.wants+d.ahead != 0 {
		t.Errorf("%d queries, %d fetches, %d wants, %d ahead are left", len(d.queries), len(d.fetches), d.wants, d.ahead)
	}
}

// A front holds back what is above MaxRequests. Those who ask later want a key that
// is valid for longer, as the events that they are about are newer.
func TestManyKeyQueriesThroughAFullFront(t *testing.T) {
	r := notaryRig(t, func(c *Config) { c.MaxRequests = 4200 })
	r.checkEach = 997
	k := &keyNet{rig: r, latency: 2 * time.Second, stored: map[matrix.ServerName]bool{}, done: map[ReqID]sched.Time{}, newer: true}
	const servers, each, limit = 2_000, 5, 4200
	start := k.now
	order := rand.New(rand.NewPCG(5, 6)).Perm(servers * each)
	var held []func()
	letIn := func() {}
	letIn = func() {
		for len(held) > 0 && r.m.waiting() < limit {
			ask := held[0]
			held = held[1:]
			ask()
			k.handle()
		}
		if len(held) > 0 || len(k.done) < len(order) {
			k.in(5*time.Millisecond, letIn)
		}
	}
	for i, n := range order {
		k.in(time.Second*time.Duration(i)/time.Duration(len(order)), func() {
			w := wants(n/each, 1)
			w[0].MinValid = 1_800_000_000_000 + matrix.Timestamp(i)
			held = append(held, func() { k.keys("notary.test", w...) })
		})
	}
	k.in(0, letIn)
	k.run()
	var last sched.Time
	for _, at := range k.done {
		last = max(last, at)
	}
	took := last.Sub(start)
	t.Logf("%d requests, at most %d at a time, done after %s", k.sends, k.most, took)
	if g := r.m.Snapshot(r.now, 0).Requests; g.Max != limit {
		t.Errorf("%d requests waited at the most, the front was to be full at %d", g.Max, limit)
	}
	if k.sends > 60 || took > 15*time.Second || len(k.done) != len(order) || len(k.stored) != servers {
		t.Errorf("%d requests, done after %s, %d answers, %d servers", k.sends, took, len(k.done), len(k.stored))
	}
}

// moreIsWanted has a fetch run for one query while two others wait for more of its
// server, and one of these for another server, too.
func moreIsWanted(t *testing.T) (r *rig, a, b, c ReqID, op OpID) {
	t.Helper()
	r = notaryRig(t, func(c *Config) { c.Keys.Wait = time.Hour })
	a = r.asks("notary.test", want("s.test", "ed25519:1", 5))
	r.pass(gather)
	op = of[Send](r.all)[0].Op
	b = r.asks("notary.test", want("s.test", "ed25519:1", 6))
	c = r.asks("notary.test", want("s.test", "ed25519:1", 7), want("t.test", "ed25519:1", 1))
	r.pass(time.Second)
	r.one("the other server is asked for", len(of[Send](r.all)) == 2)
	return r, a, b, c, op
}

func TestKeysThatCameMayBeGoodEnoughForWhoWantsMore(t *testing.T) {
	r, a, b, c, op := moreIsWanted(t)
	r.keysCame(op)
	r.repliedTo("who is content", a)
	looked := of[LoadKeys](r.all)
	looked = looked[len(looked)-2:]
	known := r.m.stats.KeysKnown
	r.step(KeysLoaded{Query: looked[0].Query})
	r.repliedTo("for whom it is enough", b)
	r.step(KeysLoaded{Query: looked[1].Query, Missing: looked[1].Wants[1:]})
	r.one("the other server is waited for", len(r.replied()) == 0)
	r.pass(time.Second)
	r.one("and nothing is asked for again", len(of[Send](r.all)) == 2)
	r.keysCame(of[Send](r.all)[1].Op)
	r.repliedTo("then it is complete", c)
	if now := r.m.stats.KeysKnown; now != known {
		t.Errorf("%d keys count as known which were fetched", now-known)
	}
}

func TestWhoWantsMoreIsServedAfterAFailureToo(t *testing.T) {
	r, a, b, c, op := moreIsWanted(t)
	r.answer(op, 500)
	refused := of[Refuse](r.last)
	r.one("the first has nothing", len(refused) == 1 && refused[0].Req == a)
	r.pass(gather * 4)
	s := of[Send](r.all)
	r.one("no look at the store for nothing", len(s) == 3 && s[2].Notary[0].MinValid == 7 && len(of[LoadKeys](r.all)) == 3)
	r.keysCame(s[1].Op)
	r.keysCame(s[2].Op)
	r.repliedTo("both", b, c)
}

func TestQueryThatEndsWhileItIsLookedUpAgain(t *testing.T) {
	r, _, b, c, op := moreIsWanted(t)
	r.keysCame(op)
	r.replied()
	looked := of[LoadKeys](r.last)
	r.step(Gone{b})
	r.one("one is gone", reflect.DeepEqual(r.last, []Effect{Free{b}}))
	r.pass(r.m.deadline(Arrived{Received: r.now, Endpoint: keyQueryRow}).Sub(r.now) - keysAnswerBy)
	r.repliedTo("the other gets what there is when its time is up, though the store is slow", c)
	for _, look := range looked {
		r.step(KeysLoaded{Query: look.Query, Missing: look.Wants[:1]})
	}
	r.one("once", len(r.replied()) == 0)
	r.one("and nothing is asked for again", len(of[Send](r.all)) == 2)
}

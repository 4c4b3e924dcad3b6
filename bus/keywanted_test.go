package bus

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// wantKey asks for a key of a server, of which the store has none.
func (r *rig) wantKey(server matrix.ServerName) uint64 {
	r.t.Helper()
	r.req++
	r.step(KeyWanted{For: uint64(r.req), Server: server, KeyID: "ed25519:1"})
	l := of[LoadKeys](r.last)
	r.one("the store is looked through", len(l) == 1 && l[0].Via == server)
	r.step(KeysLoaded{Query: l[0].Query, Missing: l[0].Wants})
	return uint64(r.req)
}

// fetched tells which wishes are over since the last time.
func (r *rig) fetched() (list []uint64) {
	for _, e := range of[KeyFetched](r.all) {
		list = append(list, e.For)
	}
	r.all = nil
	return list
}

func TestWantedKeyComesFromItsServer(t *testing.T) {
	r := newRig(t, nil)
	id := r.wantKey("h.test")
	s := r.sent()
	r.one("the server itself is asked", s.Origin && s.Dest == "h.test")
	again := r.wantKey("h.test")
	r.one("once, whoever wants it", len(of[Send](r.last)) == 0)
	r.step(Connected{s.Op})
	r.keysCame(s.Op)
	r.one("both are over", reflect.DeepEqual(r.fetched(), []uint64{id, again}))
	r.one("and it is a server like any other", r.m.hosts["h.test"] != nil && !r.m.hosts["h.test"].stranger)
	r.one("nothing is left of it", len(r.m.keys.queries)+len(r.m.keys.fetches) == 0)
}

func TestKnownKeyIsOverAtOnce(t *testing.T) {
	r := newRig(t, nil)
	r.step(KeyWanted{For: 7, Server: "h.test", KeyID: "ed25519:1"})
	r.step(KeysLoaded{Query: of[LoadKeys](r.last)[0].Query})
	r.one("without a request", reflect.DeepEqual(r.last, []Effect{KeyFetched{For: 7}}))
}

func TestANotaryIsAskedForAServerThatIsAway(t *testing.T) {
	r := notaryRig(t, nil)
	r.asks("notary.test", wants(1, 1)...)
	r.pass(gather)
	r.keysCame(r.sent().Op)
	id := r.wantKey("h.test")
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	l := of[LoadKeys](r.last)
	r.one("what the notary said before counts", len(l) == 1 && l[0].Via == "notary.test")
	r.one("nothing is over yet", r.fetched() == nil)
	r.step(KeysLoaded{Query: l[0].Query, Missing: l[0].Wants})
	r.pass(gather)
	s := of[Send](r.all)
	r.one("then it is asked", len(s) == 1 && s[0].Dest == "notary.test" && len(s[0].Notary) == 1)
	r.keysCame(s[0].Op)
	r.one("and that is the end", reflect.DeepEqual(r.fetched(), []uint64{id}))
}

func TestNoOtherNotaryWhereTheBusIsOne(t *testing.T) {
	r := notaryRig(t, ownNotary)
	r.m.keys.latest = "notary.test"
	id := r.wantKey("h.test")
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.one("it is over", reflect.DeepEqual(r.fetched(), []uint64{id}))
}

// Names that are made up leave nothing behind, so that they drive out nothing.
func TestStrangersAreForgotten(t *testing.T) {
	r := newRig(t, nil)
	for i := range 3000 {
		id := r.wantKey(matrix.ServerName(fmt.Sprintf("forged%d.test", i)))
		r.step(Done{Op: r.sent().Op, Failure: matrix.FailNoName})
		r.one("over", reflect.DeepEqual(r.fetched(), []uint64{id}))
	}
	r.one("none is remembered, none is to be stored", len(r.m.hosts) == 0 && len(r.m.dirty) == 0 && !r.m.writing)
	r.one("but that they have no key is", len(r.m.keys.missing) == 3000)
	r.wantKey("forged0.test")
	r.one("for a while", len(of[Send](r.last)) == 0 && len(of[KeyFetched](r.last)) == 1)
	r.pass(keysMissingFor)
	r.wantKey("forged0.test")
	r.one("and not longer", len(of[Send](r.last)) == 1)
}

func TestAStrangerThatTheHomeserverWantsIsNone(t *testing.T) {
	r := newRig(t, nil)
	r.wantKey("h.test")
	op := r.sent().Op
	r.profile("h.test", 1)
	r.step(Done{Op: op, Failure: matrix.FailRefused})
	h := r.m.hosts["h.test"]
	r.one("its failure is remembered", h != nil && h.Failures == 1 && len(of[Commit](r.all)) > 0)
}

func TestWantedKeysAreBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Keys.MaxWants = 10 })
	for i := range 10 {
		r.wantKey(matrix.ServerName(fmt.Sprintf("h%d.test", i)))
	}
	r.step(KeyWanted{For: 99, Server: "late.test", KeyID: "ed25519:1"})
	r.one("one more comes to nothing, at once", reflect.DeepEqual(r.last, []Effect{KeyFetched{For: 99}}))
}

func TestWantedKeysDoNotTakeForever(t *testing.T) {
	r := newRig(t, nil)
	r.step(KeyWanted{For: 1, Server: "h.test", KeyID: "ed25519:1"})
	l := of[LoadKeys](r.last)[0]
	r.pass(keyWantedFor)
	r.one("a store that hangs", reflect.DeepEqual(r.fetched(), []uint64{1}))
	r.step(KeysLoaded{Query: l.Query, Missing: l.Wants})
	r.one("and comes to life", len(r.last) == 0 && len(r.m.keys.queries) == 0)
	r.wantKey("slow.test")
	op := r.sent().Op
	r.pass(keyWantedFor)
	r.one("a server that hangs", len(r.fetched()) == 1)
	r.step(Done{Op: op, Failure: matrix.FailCancelled})
	r.one("is forgotten", r.m.hosts["slow.test"] == nil)
	r.step(Draining{By: r.now.Add(time.Second)})
	r.step(KeyWanted{For: 3, Server: "h.test", KeyID: "ed25519:1"})
	r.one("nothing is begun at the end", len(of[KeyFetched](r.last)) == 1 && len(of[LoadKeys](r.last)) == 0)
}

// Whoever wants a key is told whether anybody was asked: else it is not known that it
// cannot be had.
func TestWantedKeyTellsWhetherItWasAskedFor(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Keys.MaxWants = 2 })
	over := func() KeyFetched {
		t.Helper()
		all := of[KeyFetched](r.all)
		r.all = nil
		r.one("one is over", len(all) == 1)
		return all[0]
	}
	r.wantKey("h.test")
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.one("it was asked", over().Asked)
	r.wantKey("h.test")
	r.one("a moment ago, which counts", over().Asked)

	r.wantKey("a.test")
	r.wantKey("b.test")
	r.all = nil
	r.step(KeyWanted{For: 99, Server: "c.test", KeyID: "ed25519:1"})
	r.one("for want of room nobody is", !over().Asked)

	r = newRig(t, nil)
	r.profile("away.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	h := r.m.hosts["away.test"]
	r.all = nil
	r.wantKey("away.test")
	r.one("a server that has just failed is not", !over().Asked)
	r.pass(h.NextTry.Sub(r.now)/2 - time.Millisecond)
	r.all = nil
	r.wantKey("away.test")
	r.one("but for what may have come from it before its back-off is over", h.Failures == 1 && len(of[Commit](r.all))+len(of[Send](r.all)) == 1)
}

// A key must be valid by the system's clock, wherever the bus's own began.
func TestAKeyIsWantedForTheTimeOfDay(t *testing.T) {
	r := newRig(t, nil)
	r.step(KeyWanted{For: 1, Server: "h.test", KeyID: "ed25519:1", Now: 1_700_000_000_000})
	w := of[LoadKeys](r.last)[0].Wants
	r.one("it is wanted for that", len(w) == 1 && w[0].MinValid == 1_700_000_000_000)
}

// A key that does not fit may have been replaced: what is stored does not count.
func TestANewerKeyIsFetchedWhateverIsStored(t *testing.T) {
	r := newRig(t, nil)
	r.step(KeyWanted{For: 1, Server: "h.test", KeyID: "ed25519:1", Newer: true, Now: 1_700_000_000_000})
	w := of[LoadKeys](r.last)[0].Wants
	r.one("nothing is good for so long", len(w) == 1 && w[0].MinValid > matrix.Timestamp(1_700_000_000_000).Add(matrix.MaxKeyValidity))
}

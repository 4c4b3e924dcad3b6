package edge

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// rig drives a Machine by hand and keeps what it asked for. Signatures are good
// and the store knows nothing, unless a test says otherwise.
type rig struct {
	t    *testing.T
	m    *Machine
	now  sched.Time
	req  ReqID
	last []Effect // of the latest step, and of what answered it at once
	all  []Effect

	manual  bool                          // the test answers Verify, Look and Record
	verdict func(r *request) Verdict      // nil: good
	known   func(origin, txn string) bool // nil: nothing is stored
}

func newRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	cfg := Default()
	cfg.UnverifiedBytes, cfg.Bytes = 14*sched.MiB, 32*sched.MiB
	cfg.EphemeralShare, cfg.EphemeralHold, cfg.EphemeralWaiting = 1, 40*time.Second, 2000 // so that only the rate counts
	if change != nil {
		change(&cfg)
	}
	return &rig{t: t, m: New(cfg, rand.New(rand.NewPCG(1, 2))), now: sched.FromStored(1_800_000_000_000)}
}

func (r *rig) step(ev Event) []Effect {
	r.t.Helper()
	r.last = nil
	for todo := []Event{ev}; len(todo) > 0; todo = todo[1:] {
		effects := r.m.Step(r.now, todo[0], nil)
		if err := r.m.Check(); err != nil {
			r.t.Fatalf("after %T%+v: %v", todo[0], todo[0], err)
		}
		r.last = append(r.last, effects...)
		if r.manual {
			continue
		}
		for _, e := range effects {
			switch e := e.(type) {
			case Verify:
				q, v := r.m.reqs[e.Req], Good
				if r.verdict != nil {
					v = r.verdict(q)
				}
				todo = append(todo, Verified{Req: e.Req, Verdict: v, Text: "because", Tried: v == NoKey && e.MayFetch})
			case Look:
				q := r.m.reqs[e.Req]
				todo = append(todo, Looked{Req: e.Req, Found: r.known != nil && r.known(string(q.Origin), q.Txn.ID)})
			case Record:
				todo = append(todo, Recorded{Batch: e.Batch, OK: true})
			}
		}
	}
	r.all = append(r.all, r.last...)
	return r.last
}

// pass lets time go by, waking the machine whenever it wants to be woken.
func (r *rig) pass(d time.Duration) {
	r.t.Helper()
	until := r.now.Add(d)
	var seen []Effect
	for {
		at, ok := r.m.NextWake()
		if !ok || at > until {
			break
		}
		r.now = max(r.now, at)
		seen = append(seen, r.step(Tick{})...)
	}
	r.now = until
	r.last = seen
}

// arrive sends a request whose fields the test has chosen.
func (r *rig) arrive(a Arrived) ReqID {
	r.t.Helper()
	r.req++
	a.Req = r.req
	if a.Received == 0 {
		a.Received = r.now
	}
	if a.Endpoint == nil {
		a.Endpoint = matrix.Match("PUT", "/_matrix/federation/v1/send/1")
	}
	if a.Class == 0 {
		a.Class = a.Endpoint.Class
	}
	if a.Key == (Key{}) {
		a.Key = sha256.Sum256([]byte(fmt.Sprint(a.Origin, r.req)))
	}
	if a.Size == 0 {
		a.Size = 1000
	}
	if a.Keys == nil && a.Origin != "" {
		a.Keys = []string{"ed25519:1"}
	}
	r.step(a)
	return r.req
}

// get sends a request for a real path; equal ones have equal keys.
func (r *rig) get(origin matrix.ServerName, method, target string) ReqID {
	r.t.Helper()
	return r.arrive(Arrived{Origin: origin, Endpoint: matrix.Match(method, target), Key: sha256.Sum256([]byte(string(origin) + method + target))})
}

func pdus(id string, rooms ...string) *Txn {
	return &Txn{ID: id, BodyHash: sha256.Sum256([]byte(id)), PDUs: int32(max(1, len(rooms))), Rooms: rooms, Items: [matrix.NumKinds + 1]int32{matrix.KindPDU: 1}}
}

func presence(id string, covers ...uint64) *Txn {
	return &Txn{ID: id, BodyHash: sha256.Sum256([]byte(id)), EDUs: 1, Ephemeral: true, Covers: covers, Items: [matrix.NumKinds + 1]int32{matrix.KindPresence: 1}}
}

func receipts(id string) *Txn {
	return &Txn{ID: id, BodyHash: sha256.Sum256([]byte(id)), EDUs: 1, Items: [matrix.NumKinds + 1]int32{matrix.KindReceipt: 1}}
}

func (r *rig) send(origin matrix.ServerName, t *Txn) ReqID {
	r.t.Helper()
	return r.arrive(Arrived{Origin: origin, Txn: t})
}

// of returns the effects of one kind.
func of[E Effect](effects []Effect) (found []E) {
	for _, e := range effects {
		if e, ok := e.(E); ok {
			found = append(found, e)
		}
	}
	return found
}

func (r *rig) one(what string, ok bool) {
	r.t.Helper()
	if !ok {
		r.t.Fatalf("%s; the last step gave %+v", what, r.last)
	}
}

// forwarded returns the only Forward of the last step.
func (r *rig) forwarded() Forward {
	r.t.Helper()
	f := of[Forward](r.last)
	r.one("want one Forward", len(f) == 1)
	return f[0]
}

// refused returns the only Refuse of the last step.
func (r *rig) refused(status int) Refuse {
	r.t.Helper()
	f := of[Refuse](r.last)
	r.one(fmt.Sprintf("want one refusal with %d", status), len(f) == 1 && f[0].Status == status)
	return f[0]
}

func (r *rig) answer(op OpID, status int) {
	r.t.Helper()
	a := r.step(Answered{Op: op, Status: status})
	r.step(Done{Op: op})
	r.last = append(append([]Effect(nil), a...), r.last...)
}

// rest lets everything end and checks that nothing is left.
func (r *rig) rest() {
	r.t.Helper()
	for range 1000 {
		ops := of[Forward](r.all)
		for _, f := range ops {
			if r.m.ops[f.Op] != nil {
				r.answer(f.Op, 200)
			}
		}
		r.pass(2 * time.Second)
		if len(r.m.reqs)+len(r.m.ops)+r.m.record.total() == 0 {
			break
		}
	}
	m := r.m
	if len(m.reqs)+len(m.txns)+len(m.shared)+len(m.ops)+len(m.looks)+len(m.desk.peers) != 0 || m.held.bytes+m.unverified.bytes != 0 || m.idle.n != len(m.origins) {
		r.t.Fatalf("at rest: %d requests, %d transactions, %d shared, %d attempts, %d look-ups, %d addresses, %d and %d bytes, %d of %d origins idle",
			len(m.reqs), len(m.txns), len(m.shared), len(m.ops), len(m.looks), len(m.desk.peers), m.held.bytes, m.unverified.bytes, m.idle.n, len(m.origins))
	}
	free, arrived := of[Free](r.all), int(r.req)
	if len(free) != arrived || len(of[Discard](r.all)) != len(of[Forward](r.all)) {
		r.t.Fatalf("%d requests, %d freed; %d attempts, %d discarded", arrived, len(free), len(of[Forward](r.all)), len(of[Discard](r.all)))
	}
}

func TestSignatureComesFirst(t *testing.T) {
	r := newRig(t, nil)
	r.manual = true
	a := r.send("a.test", pdus("1"))
	r.one("only the signature is looked at", reflect.DeepEqual(r.last, []Effect{Verify{Req: a}}))
	r.step(Verified{Req: a, Verdict: Good})
	r.one("then the outbound core hears of it, and the store is asked", reflect.DeepEqual(r.last, []Effect{Alive{"a.test"}, Look{a}}))
	r.step(Looked{Req: a})
	f := r.forwarded()
	r.step(Answered{Op: f.Op, Status: 200})
	r.one("the answer is not passed on before it is complete", len(r.last) == 0)
	r.step(Done{Op: f.Op})
	rec := of[Record](r.last)
	r.one("nor before it is stored", len(rec) == 1 && len(of[Reply](r.last)) == 0 && rec[0].Answers[0].Op == f.Op && rec[0].Answers[0].Origin == "a.test")
	r.step(Recorded{Batch: rec[0].Batch, OK: true})
	r.one("then it is", reflect.DeepEqual(r.last, []Effect{Reply{Req: a, Op: f.Op}, Discard{f.Op}}))
	r.manual = false
	r.rest()
}

func TestAliveIsToldNowAndThen(t *testing.T) {
	r := newRig(t, nil)
	for i := range 30 {
		r.get("a.test", "GET", fmt.Sprintf("/_matrix/federation/v1/query/profile?user_id=%d", i))
		r.pass(time.Second)
		r.rest()
	}
	if n := len(of[Alive](r.all)); n < 3 || n > 8 {
		t.Errorf("told %d times in half a minute or so, want every %s", n, aliveEvery)
	}
}

func TestForgedIsRefusedAndLeavesNothing(t *testing.T) {
	r := newRig(t, nil)
	r.verdict = func(*request) Verdict { return Forged }
	for i := range 100 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), pdus("1"))
		f := r.refused(401)
		r.one("with the reason", f.Code == matrix.MUnauthorized && strings.Contains(f.Text, "because") && len(of[Free](r.last)) == 1)
	}
	if len(r.m.origins) != 0 || r.m.stats.Forged != 100 || len(of[Forward](r.all))+len(of[Alive](r.all)) != 0 {
		t.Errorf("%d origins remembered, %d forged, effects %+v", len(r.m.origins), r.m.stats.Forged, r.all)
	}
	r.rest()
}

func TestFetchesOfKeysAreBounded(t *testing.T) {
	for _, policy := range []NoKeyPolicy{PassNoKey, RefuseNoKey} {
		r := newRig(t, func(c *Config) { c.KeyFetches, c.NoKey = 40, policy })
		r.verdict = func(q *request) Verdict {
			if q.Origin == "known.test" && len(q.Keys) == 1 && q.Keys[0] == "ed25519:1" {
				return Good
			}
			return NoKey
		}
		r.get("known.test", "GET", "/_matrix/federation/v1/event/1")
		r.answer(r.forwarded().Op, 200)
		var fetched int
		count := func() {
			for _, v := range of[Verify](r.last) {
				if v.MayFetch {
					fetched++
				}
			}
		}
		for i := range 10_000 {
			r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), pdus("1"))
			count()
		}
		if fetched != 30 {
			t.Errorf("%s: %d fetches for 10,000 unknown names, want 30 of 40", policy, fetched)
		}
		for i := range 10 {
			r.arrive(Arrived{Origin: "known.test", Keys: []string{fmt.Sprintf("ed25519:new%d", i)}, Txn: pdus("2")})
			count()
		}
		if fetched != 30+fetchesPerOrigin {
			t.Errorf("%s: %d fetches, want %d more for a known server with ten new keys", policy, fetched, fetchesPerOrigin)
		}
		if passed := len(of[Forward](r.all)) - 1; policy == RefuseNoKey && passed != 0 || passed > 5 {
			t.Errorf("%s: %d requests passed on in no time", policy, passed)
		}
		if len(r.m.desk.recent) > 40 || r.m.held.topN > passQueue+10 {
			t.Errorf("%s: %d origins of fetches, %d requests held", policy, len(r.m.desk.recent), r.m.held.topN)
		}
		r.pass(61 * time.Second)
		r.send("later.test", pdus("1"))
		count()
		if fetched != 31+fetchesPerOrigin {
			t.Errorf("%s: none is fetched a minute later", policy)
		}
		r.rest()
	}
}

func TestNoKeyPolicy(t *testing.T) {
	r := newRig(t, func(c *Config) { c.NoKey = RefuseNoKey })
	r.verdict = func(*request) Verdict { return NoKey }
	r.send("a.test", pdus("1"))
	r.one("refused as Synapse does once the key could not be had", r.refused(401).Code == matrix.MUnauthorized)
	for range 3 {
		r.send("a.test", pdus("1"))
	}
	r.one("but without a try only for now", r.refused(503).RetryAfter > 0)

	r = newRig(t, nil)
	r.verdict = func(*request) Verdict { return NoKey }
	r.send("a.test", pdus("1"))
	first := r.forwarded()
	r.send("a.test", pdus("1"))
	r.one("what is not verified joins nothing, and is not looked up", r.forwarded().Op != first.Op && len(of[Look](r.all)) == 0)
	r.answer(first.Op, 200)
	r.one("and is not stored", len(of[Record](r.all)) == 0 && len(of[Reply](r.last)) == 1)
	r.one("nor does it prove a server alive", len(of[Alive](r.all)) == 0)
	r.rest()
}

// Several requests that need the same key cost one fetch.
func TestOneFetchServesAllOfItsOrigin(t *testing.T) {
	r := newRig(t, nil)
	r.manual = true
	var reqs []ReqID
	for i := range 5 {
		reqs = append(reqs, r.get("a.test", "GET", fmt.Sprintf("/_matrix/federation/v1/event/%d", i)))
		r.step(Verified{Req: reqs[i], Verdict: NoKey})
	}
	var fetches []Verify
	for _, v := range of[Verify](r.all) {
		if v.MayFetch {
			fetches = append(fetches, v)
		}
	}
	r.one("one is fetched for", len(fetches) == 1 && fetches[0].Req == reqs[0])
	r.step(Gone{reqs[3]})
	r.step(Verified{Req: reqs[0], Verdict: Good})
	again := of[Verify](r.last)
	r.one("the others are looked at again", len(again) == 3 && !again[0].MayFetch && len(of[Free](r.last)) == 1)
	for _, v := range again {
		r.step(Verified{Req: v.Req, Verdict: Good})
	}
	r.manual = false
	r.rest()
	if n := len(of[Forward](r.all)); n != 4 {
		t.Errorf("%d forwarded, want 4", n)
	}
}

// One fetch that fails says nothing about another key.
func TestAnotherKeyIsFetchedOnItsOwn(t *testing.T) {
	r := newRig(t, nil)
	r.manual = true
	var reqs []ReqID
	for i := range 3 {
		reqs = append(reqs, r.arrive(Arrived{Origin: "a.test", Keys: []string{fmt.Sprint("ed25519:", i/2)}, Txn: pdus(fmt.Sprint(i))}))
		r.step(Verified{Req: reqs[i], Verdict: NoKey})
	}
	r.step(Verified{Req: reqs[0], Verdict: NoKey})
	r.one("the one with the same key shares the fate, the other does not", len(of[Forward](r.last)) == 2 && reflect.DeepEqual(of[Verify](r.last), []Verify{{Req: reqs[2]}}))
	r.step(Verified{Req: reqs[2], Verdict: NoKey})
	r.one("it has its own fetch", reflect.DeepEqual(of[Verify](r.last), []Verify{{Req: reqs[2], MayFetch: true}}))
	r.step(Verified{Req: reqs[2], Verdict: Good})
	r.step(Looked{Req: reqs[2]})
	r.manual = false
	r.rest()
}

func TestBands(t *testing.T) {
	send := matrix.Match("PUT", "/_matrix/federation/v1/send/1")
	toDevice := receipts("1")
	toDevice.Items[matrix.KindToDevice] = 1
	for _, tt := range []struct {
		a    Arrived
		want Band
	}{
		{Arrived{Txn: pdus("1")}, BandPDUs}, {Arrived{Txn: toDevice}, BandPDUs},
		{Arrived{Txn: receipts("1")}, BandEDUs}, {Arrived{Txn: &Txn{}}, BandEDUs}, {Arrived{Txn: presence("1")}, BandEphemeral},
		{Arrived{Class: matrix.ClassJoin}, BandJoin}, {Arrived{Class: matrix.ClassPresence}, BandLookup},
		{Arrived{Class: matrix.ClassState}, BandState}, {Arrived{Class: matrix.ClassDevice}, BandDevice},
	} {
		tt.a.Endpoint = send
		if got := bandOf(&tt.a, false); got != tt.want {
			t.Errorf("%+v is in band %s, want %s", tt.a, got, tt.want)
		}
	}
	media := Arrived{Endpoint: matrix.Match("GET", "/_matrix/media/v3/download/a/b"), Class: matrix.ClassLookup}
	if got := bandOf(&media, true); got != BandLookup {
		t.Errorf("media without a signature is in band %s", got)
	}
}

func TestUnverifiedRequestsAreBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Unverified, c.Verifying = 100, 4 })
	r.manual = true
	for i := range 100 {
		r.arrive(Arrived{Origin: "flood.test", Peer: "192.0.2.1", Txn: pdus(fmt.Sprint(i))})
	}
	if n := r.m.unverified.n; n != 25 {
		t.Errorf("one address holds %d of 100 places, want a quarter", n)
	}
	r.refused(503)
	if n := len(of[Verify](r.all)); n != 4 {
		t.Errorf("%d signatures are checked at a time, want 4", n)
	}
	last := r.arrive(Arrived{Origin: "a.test", Peer: "192.0.2.2", Txn: pdus("x")})
	r.step(Verified{Req: 1, Verdict: Forged})
	r.step(Verified{Req: 2, Verdict: Forged})
	v := of[Verify](r.all)
	r.one("addresses take turns", v[len(v)-1].Req == last || v[len(v)-2].Req == last)
	for i := range 200 {
		r.arrive(Arrived{Origin: "many.test", Txn: pdus(fmt.Sprint(i)), Peer: fmt.Sprint(i)})
	}
	if r.m.unverified.n != 100 {
		t.Errorf("%d are held, want all 100 places taken", r.m.unverified.n)
	}
	r.arrive(Arrived{Origin: "big.test", Txn: pdus("1"), Size: 1 << 30})
	r.refused(503)
	big := newRig(t, nil)
	big.manual = true
	for i := range 3 {
		big.arrive(Arrived{Origin: "a.test", Txn: pdus(fmt.Sprint(i)), Peer: "192.0.2.1", Size: 2 << 20})
	}
	if n := big.m.unverified.bytes; n != 2<<20 {
		t.Errorf("one address holds %d bytes of %s, want a quarter", n, big.m.cfg.UnverifiedBytes)
	}
	big.arrive(Arrived{Origin: "b.test", Txn: pdus("1"), Peer: "192.0.2.2", Size: matrix.MaxRequestBody - 2<<20})
	big.one("but one large request may always come", len(of[Refuse](big.last)) == 0)
	r.verdict = func(*request) Verdict { return Forged }
	r.manual = false
	for _, v := range of[Verify](r.all) {
		if q := r.m.reqs[v.Req]; q != nil && q.stage == stageVerifying {
			r.step(Verified{Req: v.Req, Verdict: Forged})
		}
	}
	r.rest()
}

func TestUnverifiedRequestIsAnsweredInTime(t *testing.T) {
	r := newRig(t, nil)
	r.manual = true
	a := r.send("a.test", pdus("1"))
	r.pass(58 * time.Second)
	r.one("not yet", len(r.last) == 0)
	r.pass(2 * time.Second)
	r.refused(503)
	r.one("its body is still looked at", len(of[Free](r.all)) == 0)
	r.step(Verified{Req: a, Verdict: Good})
	r.one("and freed after that", reflect.DeepEqual(r.last, []Effect{Free{a}}))
	r.rest()
}

func TestDeniedOriginsAreRefusedAtOnce(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Deny = []string{"*.bad.test", "evil.test"} })
	for _, n := range []matrix.ServerName{"a.bad.test", "EVIL.test:8448", "192.0.2.1", "[2001:db8::1]:8448"} {
		r.send(n, pdus("1"))
		r.one("403 before any look at the signature", r.refused(403).Code == matrix.MForbidden && len(of[Verify](r.last)) == 0)
	}
	r.send("bad.test", pdus("1"))
	r.one("others pass", len(of[Forward](r.last)) == 1)
	r.rest()
}

func TestMissingSignatureAndTooLargeTransactions(t *testing.T) {
	r := newRig(t, nil)
	r.get("", "GET", "/_matrix/federation/v1/event/1")
	r.refused(401)
	big := pdus("1")
	big.PDUs = matrix.MaxPDUs + 1
	r.send("a.test", big)
	r.refused(400)
	many := receipts("2")
	many.EDUs = matrix.MaxEDUs + 1
	r.send("a.test", many)
	r.refused(400)
	r.one("nothing was verified", len(of[Verify](r.all)) == 0)
	r.rest()
}

func TestStoredAnswerIsGivenAgain(t *testing.T) {
	r := newRig(t, nil)
	r.known = func(origin, txn string) bool { return txn == "old" }
	a := r.send("a.test", pdus("old"))
	r.one("from the store", reflect.DeepEqual(of[Replay](r.last), []Replay{{Req: a}}) && len(of[Forward](r.last)) == 0 && len(of[Free](r.last)) == 1)
	r.rest()
}

func TestKnownPDUsAreAnsweredFromTheRecord(t *testing.T) {
	r := newRig(t, nil)
	r.manual = true
	look := func(txn *Txn) {
		a := r.send("a.test", txn)
		r.step(Verified{Req: a, Verdict: Good})
		r.step(Looked{Req: a, AllPDUs: true})
	}
	look(pdus("1"))
	r.one("answered", len(of[Replay](r.last)) == 1 && of[Replay](r.last)[0].FromPDUs)
	mixed := pdus("2")
	mixed.EDUs = 1
	look(mixed)
	r.one("but not when it has EDUs, too", len(of[Replay](r.last)) == 0 && len(of[Forward](r.last)) == 1)
	r.manual = false
	r.rest()
	r.manual = true
	look(receipts("3"))
	r.one("nor when it has no PDUs", len(of[Replay](r.last)) == 0 && len(of[Forward](r.last)) == 1)
}

func TestEqualTransactionsReachTheHomeserverOnce(t *testing.T) {
	r := newRig(t, nil)
	a := r.send("a.test", pdus("1"))
	f := r.forwarded()
	var reqs = []ReqID{a}
	for range 9 {
		reqs = append(reqs, r.send("a.test", pdus("1")))
		r.one("a copy waits, its body is freed", len(of[Forward](r.last)) == 0 && len(of[Free](r.last)) == 1)
	}
	r.send("b.test", pdus("1"))
	r.one("another server's of the same id is another", r.forwarded().Op != f.Op)
	r.manual = true
	r.answer(f.Op, 200)
	reqs = append(reqs, r.arrive(Arrived{Origin: "a.test", Txn: pdus("1")}))
	r.step(Verified{Req: reqs[10], Verdict: Good})
	r.one("one that comes while the answer is being stored waits, too", len(of[Look](r.last)) == 0)
	r.manual = false
	r.step(Recorded{Batch: of[Record](r.all)[0].Batch, OK: true})
	var want []Reply
	for _, q := range reqs {
		want = append(want, Reply{Req: q, Op: f.Op})
	}
	r.one("all get the one answer", reflect.DeepEqual(of[Reply](r.last), want))
	if s := r.m.stats; s.Joined != 10 {
		t.Errorf("%d joined, want 10", s.Joined)
	}
	r.rest()
}

func TestSameIDWithAnotherBodyIsTheSameTransaction(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	other := pdus("1")
	other.BodyHash[0] ^= 1
	r.send("a.test", other)
	if len(of[Forward](r.all)) != 1 || r.m.stats.Differing != 1 || len(of[Differs](r.all)) != 1 {
		t.Errorf("%d forwarded, %d differ, %d said", len(of[Forward](r.all)), r.m.stats.Differing, len(of[Differs](r.all)))
	}
	r.rest()
}

func TestOneTransactionPerOriginAtATime(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", receipts("1"))
	f := r.forwarded()
	r.send("a.test", receipts("2"))
	r.send("a.test", pdus("3"))
	r.one("the others wait, and are not refused", len(of[Forward](r.last))+len(of[Refuse](r.all)) == 0)
	r.answer(f.Op, 200)
	next := r.forwarded()
	r.one("events go first", next.Req == 3)
	r.answer(next.Op, 200)
	r.one("then the rest", r.forwarded().Req == 2)
	r.rest()
}

func TestTransactionsOfOneOriginAreBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.TxnQueue, c.OriginBytes, c.UnverifiedBytes = 3, 14*sched.MiB, 20*sched.MiB })
	for i := range 4 {
		r.send("a.test", pdus(fmt.Sprint(i)))
	}
	r.one("one runs, three wait", len(of[Refuse](r.all)) == 0)
	r.send("a.test", pdus("4"))
	r.one("a fifth is told to come again, not 429", r.refused(503).RetryAfter > 0)
	r.send("b.test", receipts("0"))
	r.arrive(Arrived{Origin: "b.test", Txn: receipts("1"), Size: 8 << 20})
	r.arrive(Arrived{Origin: "b.test", Txn: receipts("2"), Size: 8 << 20})
	r.refused(503)
	r.arrive(Arrived{Origin: "b.test", Endpoint: matrix.Match("POST", "/_matrix/federation/v1/user/keys/claim"), Size: 8 << 20})
	r.refused(503)
	r.arrive(Arrived{Origin: "c.test", Txn: pdus("1"), Size: 15 << 20})
	r.one("but one may always come", len(of[Refuse](r.last)) == 0)
	r.rest()
}

func TestWaitingTransactionIsRefusedInTime(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency = 1 })
	r.send("a.test", pdus("1"))
	f := r.forwarded()
	b := r.send("a.test", pdus("2"))
	r.pass(59 * time.Second)
	got := of[Refuse](r.last)
	r.one("both before their senders give up", len(got) == 2 && got[0].Status == 504 && got[1].Req == b && got[1].Status == 503)
	r.one("what runs is not broken off", len(of[Cancel](r.all)) == 0)
	again := r.send("a.test", pdus("1"))
	r.answer(f.Op, 200)
	r.one("and its answer is there for the next try", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: again, Op: f.Op}}))
	r.rest()
}

func TestGoneSendersAreForgotten(t *testing.T) {
	r := newRig(t, nil)
	a := r.send("a.test", pdus("1"))
	f := r.forwarded()
	b := r.send("a.test", pdus("2"))
	r.step(Gone{b})
	r.one("one that waited is dropped", reflect.DeepEqual(r.last, []Effect{Free{b}}))
	r.step(Gone{a})
	r.one("one that runs goes on", len(r.last) == 0)
	r.answer(f.Op, 200)
	r.one("and is stored", len(of[Record](r.last)) == 1 && len(of[Reply](r.last)) == 0)
	q := r.get("a.test", "GET", "/_matrix/federation/v1/event/1")
	g := r.forwarded()
	r.step(Gone{q})
	r.one("a question is not asked any more", reflect.DeepEqual(r.last, []Effect{Cancel{g.Op}}))
	r.get("a.test", "GET", "/_matrix/federation/v1/event/1")
	r.one("and the same one again is asked anew", r.forwarded().Op != g.Op)
	r.step(Done{Op: g.Op, Failure: matrix.FailCancelled})
	r.step(Gone{q})
	r.rest()
}

func TestBandsShareByWeightAndOriginsTakeTurns(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency, c.OriginRate, c.OriginBurst = 1, 1000, 1000 })
	r.send("x.test", receipts("0"))
	f := r.forwarded()
	for i := range 10 {
		for o := range 4 {
			r.send(matrix.ServerName(fmt.Sprintf("p%d.test", o)), pdus(fmt.Sprint(i)))
			if i < 4 {
				r.send(matrix.ServerName(fmt.Sprintf("e%d.test", o)), receipts(fmt.Sprint(i)))
			}
		}
	}
	var order []string
	for range 20 {
		r.answer(f.Op, 200)
		f = r.forwarded()
		order = append(order, string(r.m.ops[f.Op].origin.key.name[:2]))
	}
	events := map[string]int{}
	n := 0
	for _, o := range order {
		if o[0] == 'p' {
			n++
			events[o]++
		}
	}
	if n < 13 || n > 16 {
		t.Errorf("%d of 20 turns for events, want 16 of 22: %v", n, order)
	}
	for o, k := range events {
		if k < n/4 || k > n/4+1 {
			t.Errorf("%s had %d of %d turns: %v", o, k, n, order)
		}
	}
	r.rest()
}

func TestLongWaitRidesOnABetterTurn(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency, c.OriginRate, c.OriginBurst = 1, 1000, 1000 })
	r.send("x.test", pdus("0"))
	f := r.forwarded()
	old := r.send("e.test", receipts("1"))
	r.pass(3 * time.Second)
	for i := range 9 {
		r.send(matrix.ServerName(fmt.Sprintf("p%d.test", i)), pdus("1"))
	}
	r.m.turns.Pick(1 << BandEDUs) // it has just had one
	r.answer(f.Op, 200)
	r.one("it goes first", of[Forward](r.last)[0].Req == old)
	if r.m.stats.Aged != 1 {
		t.Errorf("%d rode on another's turn, want 1", r.m.stats.Aged)
	}
	r.rest()
}

func TestOriginHasARate(t *testing.T) {
	r := newRig(t, func(c *Config) { c.OriginRate, c.OriginBurst, c.OriginParallel = 2, 3, 50 })
	for i := range 6 {
		r.get("a.test", "GET", fmt.Sprintf("/_matrix/federation/v1/event/%d", i))
	}
	if n := len(of[Forward](r.all)); n != 3 {
		t.Fatalf("%d at once, want a burst of 3", n)
	}
	r.pass(600 * time.Millisecond)
	if n := len(of[Forward](r.all)); n != 4 {
		t.Errorf("%d after 0.6 s, want 4", n)
	}
	r.get("a.test", "GET", "/_matrix/federation/v1/make_join/r/u")
	r.one("a join does not wait", len(of[Forward](r.last)) == 1)
	r.get("b.test", "GET", "/_matrix/federation/v1/event/1")
	r.one("nor does another server", len(of[Forward](r.last)) == 1)
	r.rest()
}

func TestQuestionsShareOneAnswerWithinAnOrigin(t *testing.T) {
	r := newRig(t, nil)
	for _, path := range []string{"state_ids/r?event_id=1", "backfill/r?v=1", "event_auth/r/e"} {
		a := r.get("a.test", "GET", "/_matrix/federation/v1/"+path)
		f := r.forwarded()
		b := r.get("a.test", "GET", "/_matrix/federation/v1/"+path)
		r.one(path+": an equal one waits", len(of[Forward](r.last)) == 0)
		r.get("b.test", "GET", "/_matrix/federation/v1/"+path)
		other := r.forwarded()
		r.step(Answered{Op: f.Op, Status: 200})
		r.one(path+": both are answered, nobody else", reflect.DeepEqual(of[Reply](r.last), []Reply{{a, f.Op}, {b, f.Op}}))
		c := r.get("a.test", "GET", "/_matrix/federation/v1/"+path)
		r.one(path+": a third joins while the body is on its way", reflect.DeepEqual(of[Reply](r.last), []Reply{{c, f.Op}}))
		r.step(Done{Op: f.Op})
		r.one(path+": then it is discarded", len(of[Discard](r.last)) == 1)
		r.answer(other.Op, 200)
	}
	// The shell's key is over the origin; should it ever not be, no answer leaks.
	same := sha256.Sum256([]byte("same"))
	ep := matrix.Match("GET", "/_matrix/federation/v1/state_ids/r")
	r.arrive(Arrived{Origin: "a.test", Endpoint: ep, Key: same})
	r.arrive(Arrived{Origin: "b.test", Endpoint: ep, Key: same})
	r.one("equal keys of two servers are two questions", len(of[Forward](r.last)) == 1)
	r.get("a.test", "POST", "/_matrix/federation/v1/user/keys/claim")
	r.forwarded()
	r.get("a.test", "POST", "/_matrix/federation/v1/user/keys/claim")
	if n := len(of[Forward](r.all)); len(r.m.ops)+r.m.origins[originKey{name: "a.test"}].queue[BandDevice].n != 4 {
		t.Errorf("claims are shared: %d forwarded", n)
	}
	r.rest()
}

// An event that the outbox has for this origin need not be asked for again.
func TestEventIsAnsweredFromTheOutbox(t *testing.T) {
	r := newRig(t, nil)
	r.manual = true
	ask := func(origin matrix.ServerName, event string, v Verdict) ReqID {
		target := "/_matrix/federation/v1/event/" + event
		q := r.arrive(Arrived{Origin: origin, Endpoint: matrix.Match("GET", target), Key: sha256.Sum256([]byte(string(origin) + target)), Look: true})
		r.one("not before the signature is looked at", len(of[Look](r.last)) == 0)
		r.step(Verified{Req: q, Verdict: v})
		return q
	}
	a := ask("a.test", "1", Good)
	r.one("the store is asked", reflect.DeepEqual(of[Look](r.last), []Look{{a}}))
	b := ask("a.test", "1", Good)
	r.step(Looked{Req: a, Found: true})
	r.one("and answers both", reflect.DeepEqual(of[Replay](r.last), []Replay{{Req: a}, {Req: b}}) && len(of[Forward](r.last)) == 0)
	c := ask("a.test", "2", Good)
	r.step(Looked{Req: c})
	r.one("or the homeserver", r.forwarded().Req == c)
	d := ask("a.test", "3", Good)
	r.step(Gone{d})
	r.step(Looked{Req: d})
	r.one("unless nobody waits", len(of[Forward](r.last)) == 0)
	for i := range 51 {
		ask("b.test", fmt.Sprint("x", i), Good)
	}
	r.refused(429)
	f := ask("c.test", "4", Forged)
	r.one("never for a forged one", of[Refuse](r.last)[0].Req == f && len(of[Look](r.last)) == 0)
	for _, l := range of[Look](r.all) {
		if r.m.looks[l.Req] != nil {
			r.step(Looked{Req: l.Req, Found: true})
		}
	}
	r.manual = false
	r.rest()
}

func TestTooManyQuestionsOfOneOrigin(t *testing.T) {
	r := newRig(t, nil)
	for i := range 53 {
		r.get("a.test", "GET", fmt.Sprintf("/_matrix/federation/v1/event/%d", i))
	}
	r.one("three run and fifty wait", len(of[Refuse](r.all)) == 0 && len(of[Forward](r.all)) == 3)
	r.get("a.test", "GET", "/_matrix/federation/v1/event/x")
	f := r.refused(429)
	r.one("the next is told when to come again", f.Code == matrix.MLimitExceeded && f.RetryAfter >= time.Second)
	r.get("b.test", "GET", "/_matrix/federation/v1/event/x")
	r.one("others do not notice", len(of[Forward](r.last)) == 1)
	r.rest()
}

func TestUnsignedRequestsShareAndAreBounded(t *testing.T) {
	r := newRig(t, nil)
	version := func(peer string) {
		ep := matrix.Match("GET", "/_matrix/federation/v1/version")
		r.arrive(Arrived{Peer: peer, Endpoint: ep, Key: Key{1}})
	}
	version("192.0.2.1")
	f := r.forwarded()
	r.one("no signature is looked at", len(of[Verify](r.last)) == 0 && r.m.ops[f.Op].band == BandKey)
	version("192.0.2.2")
	r.answer(f.Op, 200)
	r.one("one answer for both", len(of[Reply](r.last)) == 2)
	for i := range 60 {
		r.arrive(Arrived{Peer: "192.0.2.1", Endpoint: matrix.Match("GET", "/_matrix/key/v2/server"), Key: Key{2, byte(i)}})
	}
	r.refused(429)
	r.one("the others wait their turn", len(of[Forward](r.all)) == 4)
	r.rest()
}

func TestHomeserverAwayMakesTransactionsWait(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailRefused, Unsent: true})
	r.one("not refused", len(of[Refuse](r.last)) == 0 && r.m.home.down)
	for i := range 20 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), pdus("1"))
	}
	r.one("nothing is sent at once", len(of[Forward](r.last)) == 0)
	tries := len(of[Forward](r.all))
	for range 10 {
		for len(of[Forward](r.last)) == 0 {
			r.pass(100 * time.Millisecond)
		}
		r.one("one goes ahead", len(r.m.ops) == 1)
		r.step(Done{Op: of[Forward](r.last)[0].Op, Failure: matrix.FailRefused, Unsent: true})
	}
	if n := len(of[Forward](r.all)) - tries; n != 10 || len(of[Refuse](r.all)) != 0 {
		t.Errorf("%d tries, %d refused", n, len(of[Refuse](r.all)))
	}
	for len(of[Forward](r.last)) == 0 {
		r.pass(100 * time.Millisecond)
	}
	r.answer(of[Forward](r.last)[0].Op, 200)
	r.one("it is back, the others follow", !r.m.home.down && len(of[Forward](r.last)) >= 1)
	r.rest()
	if len(of[Refuse](r.all)) != 0 || len(of[Reply](r.all)) != 21 {
		t.Errorf("%d refused, %d answered", len(of[Refuse](r.all)), len(of[Reply](r.all)))
	}
}

func TestHomeserverAwayForTooLong(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	e := r.send("b.test", presence("1", 1))
	q := r.get("c.test", "GET", "/_matrix/federation/v1/query/profile?user_id=1")
	for range 120 {
		for id := range r.m.ops {
			r.step(Done{Op: id, Failure: matrix.FailRefused, Unsent: true})
		}
		r.pass(time.Second / 2)
	}
	refused := of[Refuse](r.all)
	r.one("refused with 503 within their time", len(refused) == 2 && refused[0].Req == q && refused[0].Status == 503 && refused[1].Req == 1 && refused[1].Status == 503)
	r.one("and presence dropped", reflect.DeepEqual(of[Empty](r.all), []Empty{{e}}))
	if len(of[Reply](r.all)) != 0 {
		t.Error("an acknowledgement was made up")
	}
	r.rest()
}

func TestUnknownOutcomeIsTriedAgainSeldom(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	r.send("a.test", pdus("2"))
	for i := range maxTries {
		r.one("an attempt, and no other of the origin's", len(r.m.ops) == 1)
		for id := range r.m.ops {
			if r.m.ops[id].txn.ID != "1" {
				t.Fatal("the next transaction overtakes one whose outcome is open")
			}
			r.step(Done{Op: id, Failure: matrix.FailReset})
		}
		if i < maxTries-1 {
			r.one("later", len(of[Forward](r.last)) == 0)
			r.pass(pause + time.Millisecond)
		}
	}
	r.refused(502)
	r.one("then the next has its turn", len(of[Forward](r.last)) == 1)
	r.rest()

	r = newRig(t, func(c *Config) { c.OriginRate, c.OriginBurst = 0.001, 1 })
	r.send("a.test", pdus("1"))
	for range 5 {
		r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailRefused, Unsent: true})
		r.pass(5 * time.Second)
	}
	r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailReset})
	r.pass(probeFor)
	r.one("what did not arrive counts neither as a try nor for the rate", len(of[Forward](r.last)) == 1)
	r.rest()

	r = newRig(t, nil)
	r.get("a.test", "POST", "/_matrix/federation/v1/user/keys/claim")
	r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailReset})
	r.refused(502)
	r.get("a.test", "POST", "/_matrix/federation/v1/user/keys/claim")
	r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailRefused, Unsent: true})
	r.one("a claim is sent again only if it never arrived", len(of[Refuse](r.last)) == 0)
	r.rest()

	r = newRig(t, nil)
	r.get("a.test", "POST", "/_matrix/federation/v1/user/keys/claim")
	r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailReset, Away: true})
	r.refused(502)
	r.one("a connection that ended says that it is away, if no other can be made", r.m.home.down)
	r.rest()
}

func TestHomeserverLimitIsNotPassedOn(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	f := r.forwarded()
	r.step(Answered{Op: f.Op, Status: 429, RetryAfter: 3 * time.Second})
	r.step(Done{Op: f.Op})
	r.one("it waits", len(of[Reply](r.last))+len(of[Refuse](r.last)) == 0)
	r.pass(2900 * time.Millisecond)
	r.one("as long as it is told to", len(of[Forward](r.last)) == 0)
	r.pass(200 * time.Millisecond)
	f = r.forwarded()
	r.answer(f.Op, 503)
	r.one("nor that of a gateway", len(of[Reply](r.last))+len(of[Refuse](r.last)) == 0 && r.m.home.down)
	r.pass(3 * time.Second)
	f = r.forwarded()
	r.step(Answered{Op: f.Op, Status: 200})
	r.step(Done{Op: f.Op, Failure: matrix.FailCut})
	r.one("nor half an answer, which is not stored either", len(of[Reply](r.last))+len(of[Refuse](r.last))+len(of[Record](r.last)) == 0)
	r.pass(3 * time.Second)
	r.forwarded()
	r.rest()
}

// While it is not known to be back, one request at a time goes to it.
func TestHangingProbe(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	r.step(Done{Op: r.forwarded().Op, Failure: matrix.FailRefused, Unsent: true})
	for i := range 10 {
		r.get(matrix.ServerName(fmt.Sprintf("s%d.test", i)), "GET", "/_matrix/federation/v1/event/1")
	}
	r.pass(4 * time.Second)
	r.one("one", len(r.m.ops) == 1)
	r.pass(2 * time.Second)
	r.one("and after five seconds another", len(r.m.ops) == 2)
	r.rest()
}

// What nobody waits for is written with others, once a second.
func TestPresenceIsStoredAtLeisure(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	r.answer(r.forwarded().Op, 200)
	for i := range 3 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), presence("1", 1))
		r.answer(r.forwarded().Op, 200)
		r.one("answered, not stored yet", len(of[Reply](r.last)) == 1 && len(of[Record](r.last)) == 0)
	}
	r.send("s0.test", presence("1", 1))
	r.one("but known", len(of[Reply](r.last)) == 1 && len(of[Forward](r.last)) == 0)
	r.pass(recordAfter)
	r.one("then all at once", len(of[Record](r.last)) == 1 && len(of[Record](r.last)[0].Answers) == 3)
	r.rest()
}

func TestErrorsOfTheHomeserverArePassedOnAndNotStored(t *testing.T) {
	r := newRig(t, nil)
	for _, status := range []int{400, 403, 500} {
		r.send("a.test", pdus(fmt.Sprint(status)))
		f := r.forwarded()
		r.answer(f.Op, status)
		r.one("passed on", len(of[Reply](r.last)) == 1 && len(of[Record](r.last)) == 0 && len(of[Discard](r.last)) == 1)
	}
	r.send("a.test", pdus("400"))
	r.one("and asked anew", len(of[Forward](r.last)) == 1)
	r.rest()
}

func TestPresenceIsPaced(t *testing.T) {
	r := newRig(t, func(c *Config) { c.EphemeralRate = 8; c.Concurrency = 8 })
	for i := range 1000 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), presence("1", uint64(i)))
	}
	var done int
	finish := func() {
		for _, f := range of[Forward](r.all)[done:] {
			done++
			r.answer(f.Op, 200)
		}
	}
	for range 50 {
		finish()
		r.pass(100 * time.Millisecond)
	}
	finish()
	if n := len(of[Forward](r.all)); n < 38 || n > 46 {
		t.Errorf("%d forwarded in 5 s, want 2 at once and 8 a second", n)
	}
	p := r.send("p.test", pdus("1"))
	r.one("events do not wait for that", r.forwarded().Req == p)
	r.step(Pressure{Hundredths: 9000})
	before := len(of[Forward](r.all))
	for range 50 {
		finish()
		r.pass(100 * time.Millisecond)
	}
	if n := len(of[Forward](r.all)) - before; n < 8 || n > 13 {
		t.Errorf("%d forwarded in 5 s under pressure, want a quarter", n)
	}
	for range 400 {
		finish()
		r.pass(100 * time.Millisecond)
	}
	if n := r.m.stats.Shed[ShedHeld]; n == 0 || len(of[Refuse](r.all)) != 0 {
		t.Errorf("%d dropped after %s, %d refused", n, r.m.cfg.EphemeralHold, len(of[Refuse](r.all)))
	}
	r.rest()
	if s := r.m.stats; s.Empties+s.Replied != s.Requests {
		t.Errorf("%d requests, %d answered, %d dropped", s.Requests, s.Replied, s.Empties)
	}
}

// Presence takes a share of the homeserver's time, however slow that is.
func TestPresenceTakesAShareOfTheTime(t *testing.T) {
	for _, tt := range []struct {
		took time.Duration
		want float64 // in a second
	}{
		{2 * time.Millisecond, 20}, // the rate
		{10 * time.Millisecond, 10},
		{50 * time.Millisecond, 2},
		{150 * time.Millisecond, 2. / 3},
		{900 * time.Millisecond, slowest},
		{3 * time.Second, 20}, // it waits for something else
	} {
		r := newRig(t, func(c *Config) { c.EphemeralShare, c.EphemeralRate, c.Concurrency = 0.1, 20, 8 })
		for i := range 40 {
			r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), presence("1", uint64(i)))
			for range 3 {
				for _, f := range of[Forward](r.last) {
					r.pass(tt.took)
					r.answer(f.Op, 200)
				}
			}
		}
		if got := float64(r.m.pace.Limit()); got < tt.want*0.9 || got > tt.want*1.1 {
			t.Errorf("answers take %s: %.2f in a second, want %.2f", tt.took, got, tt.want)
		}
	}
}

func TestPresenceModes(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Ephemeral = DropEphemeral })
	a := r.send("a.test", presence("1", 1))
	r.one("dropped", reflect.DeepEqual(of[Empty](r.last), []Empty{{a}}) && len(of[Forward](r.last)) == 0)
	r.send("a.test", receipts("2"))
	r.one("never receipts", len(of[Forward](r.last)) == 1)
	r.rest()

	r = newRig(t, func(c *Config) { c.Ephemeral, c.EphemeralRate = PassEphemeral, 0.1 })
	for i := range 20 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), presence("1", 1))
	}
	r.rest()
	if n := len(of[Reply](r.all)); n != 20 || len(of[Empty](r.all)) != 0 {
		t.Errorf("%d of 20 answered by the homeserver, %d dropped", n, len(of[Empty](r.all)))
	}

	r = newRig(t, func(c *Config) { c.EphemeralRate = 0.1 })
	for i := range 20 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), presence("1", 1))
	}
	cfg := r.m.cfg
	cfg.Ephemeral = DropEphemeral
	r.step(Reconfigured{cfg})
	r.one("a change takes effect at once", len(of[Empty](r.last)) == 19)
	r.rest()
}

// What began to wait while nothing was dropped is dropped at the last moment.
func TestPresenceFromBeforeAChangeOfMode(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Ephemeral, c.Concurrency = PassEphemeral, 1 })
	r.send("x.test", receipts("0"))
	a := r.send("a.test", presence("1", 1))
	cfg := r.m.cfg
	cfg.Ephemeral = PaceEphemeral
	r.step(Reconfigured{cfg})
	r.pass(59 * time.Second)
	r.one("not refused", reflect.DeepEqual(of[Empty](r.all), []Empty{{a}}) && len(of[Refuse](r.all)) == 1)
	r.rest()
}

// Each band leaves room for the better ones.
func TestBandsKeepToTheirShares(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Ephemeral, c.Parallel = PassEphemeral, 16 })
	for l := range r.m.lanes {
		r.m.lanes[l].window.size = r.m.lanes[l].window.most
		r.m.lanes[l].resize()
	}
	running := func(b Band) int { return int(r.m.lanes[bands[b].lane].running[b]) }
	for i := range 20 {
		o := matrix.ServerName(fmt.Sprintf("s%d.test", i))
		r.send(o, presence("1", 1))
		r.get(o, "GET", fmt.Sprintf("/_matrix/federation/v1/backfill/%d", i))
	}
	if p, s := running(BandEphemeral), running(BandState); p != 2 || s != 8 {
		t.Errorf("presence has %d of 8 places, state %d of 16; want 2 and 8", p, s)
	}
	for i := range 20 {
		o := matrix.ServerName(fmt.Sprintf("t%d.test", i))
		r.send(o, receipts("1"))
		r.get(o, "GET", fmt.Sprintf("/_matrix/federation/v1/query/profile?user_id=%d", i))
	}
	if e, l := running(BandEDUs), running(BandLookup); e != 4 || l != 4 {
		t.Errorf("receipts have %d more places, lookups %d; want 4 and 4", e, l)
	}
	r.send("p.test", pdus("1"))
	r.one("events have room", len(of[Forward](r.last)) == 1)
	r.get("p.test", "GET", "/_matrix/federation/v1/make_join/r/u")
	r.one("so have joins", len(of[Forward](r.last)) == 1)
	r.rest()
}

func TestNewerPresenceSupersedesOlder(t *testing.T) {
	r := newRig(t, func(c *Config) { c.EphemeralRate = 0.001 })
	r.send("x.test", presence("0", 1))
	r.forwarded()
	a := r.send("a.test", presence("1", 1, 3))
	r.send("a.test", presence("2", 1, 2))
	r.one("not one that says something else", len(of[Empty](r.last)) == 0)
	r.send("b.test", presence("3", 1, 2, 3))
	r.one("nor one of another server", len(of[Empty](r.last)) == 0)
	r.send("a.test", presence("4", 1, 3, 4))
	r.one("the one it covers", reflect.DeepEqual(of[Empty](r.last), []Empty{{a}}))
	r.send("a.test", presence("1", 1, 3))
	r.one("which cannot come back", len(of[Empty](r.last)) == 1 && r.m.stats.Joined == 1)
	r.pass(2 * time.Second)
	rec := of[Record](r.all)
	r.one("as that is stored", len(rec) == 1 && rec[0].Answers[0].Op == 0 && rec[0].Answers[0].Txn.ID == "1")
	unlisted := presence("5")
	r.send("a.test", unlisted)
	r.send("a.test", presence("6", 1, 2, 3, 4, 5))
	r.one("one whose keys are not known is covered by none", len(of[Empty](r.last)) == 2)
	if s := r.m.stats.Shed; s[ShedSuperseded] != 3 {
		t.Errorf("shed %v", s)
	}
	r.rest()
}

func TestCovers(t *testing.T) {
	for _, tt := range []struct {
		wide, old []uint64
		want      bool
	}{
		{[]uint64{1, 2, 3}, []uint64{2}, true},
		{[]uint64{1, 2, 3}, []uint64{1, 2, 3}, true},
		{[]uint64{1, 3}, []uint64{1, 2}, false},
		{[]uint64{1, 3}, []uint64{4}, false},
		{[]uint64{1}, nil, false},
		{nil, []uint64{1}, false},
		{[]uint64{1, 2}, []uint64{1, 1}, false},
	} {
		if got := covers(tt.wide, tt.old); got != tt.want {
			t.Errorf("covers(%v, %v) = %t", tt.wide, tt.old, got)
		}
	}
}

func TestOldPresenceIsDropped(t *testing.T) {
	r := newRig(t, func(c *Config) { c.EphemeralRate = 0.001 })
	r.send("x.test", presence("0", 1))
	typing := presence("1", 1)
	typing.Expires = r.now.Add(10 * time.Second)
	a := r.send("a.test", typing)
	r.pass(9 * time.Second)
	r.one("not yet", len(of[Empty](r.last)) == 0)
	r.pass(2 * time.Second)
	r.one("now", reflect.DeepEqual(of[Empty](r.last), []Empty{{a}}) && r.m.stats.Shed[ShedExpired] == 1)
	late := presence("2", 1)
	late.Expires = r.now - 1
	b := r.send("a.test", late)
	r.one("at once", reflect.DeepEqual(of[Empty](r.last), []Empty{{b}}))
	r.rest()
}

func TestWaitingPresenceIsBounded(t *testing.T) {
	r := newRig(t, func(c *Config) { c.EphemeralRate, c.EphemeralWaiting, c.TxnQueue = 0.001, 10, 4 })
	for i := range 12 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), presence("1", 1))
	}
	r.one("the oldest of eleven is dropped", reflect.DeepEqual(of[Empty](r.all), []Empty{{2}}))
	for i := range 5 {
		r.send("a.test", presence(fmt.Sprint(i), uint64(i)))
	}
	if n := r.m.origins[originKey{name: "a.test"}].txns; n != 4 {
		t.Errorf("one server has %d waiting, want 4", n)
	}
	r.send("a.test", receipts("x"))
	r.one("room is made for what must not be dropped", len(of[Refuse](r.all)) == 0 && len(of[Forward](r.last)) == 1)
	r.rest()
}

func TestJoinHoldsTransactionsOfItsRoom(t *testing.T) {
	r := newRig(t, nil)
	r.step(Joining{Room: "!r:x", Open: true})
	a := r.send("a.test", pdus("1", "!r:x"))
	r.send("b.test", pdus("1", "!o:x"))
	r.one("others go", r.forwarded().Req == 2)
	r.send("c.test", presence("1", 1))
	r.one("presence waits", len(of[Forward](r.last)) == 0)
	r.pass(5 * time.Second)
	r.step(Joining{Room: "!r:x"})
	r.one("a moment more", len(of[Forward](r.last)) == 0)
	r.pass(afterJoin)
	f := of[Forward](r.last)
	r.one("then both go", len(f) == 2 && f[0].Req+f[1].Req == a+3)
	r.rest()

	r = newRig(t, nil)
	r.step(Joining{Room: "!r:x", Open: true})
	r.pass(100 * time.Millisecond)
	r.step(Joining{Room: "!r:x"})
	a = r.send("a.test", pdus("1", "!r:x"))
	r.pass(leastAfterJoin - time.Millisecond)
	r.one("the homeserver writes it down", len(of[Forward](r.last)) == 0)
	r.pass(time.Millisecond)
	r.one("which takes less where the join was quick", r.forwarded().Req == a)
	r.rest()

	r = newRig(t, nil)
	r.step(Joining{Room: "!r:x", Open: true})
	r.send("a.test", pdus("1", "!o:x", "!r:x"))
	r.send("c.test", presence("1", 1))
	r.pass(24 * time.Second)
	r.one("not for ever", len(of[Forward](r.last)) == 0)
	r.pass(2 * time.Second)
	r.one("but half a minute", len(of[Forward](r.last)) == 2 && r.m.stats.HeldLongest == 1)
	r.rest()

	r = newRig(t, nil)
	r.step(Done{Op: func() OpID { r.send("x.test", pdus("0")); return r.forwarded().Op }(), Failure: matrix.FailRefused, Unsent: true})
	a = r.send("a.test", pdus("1", "!r:x"))
	r.step(Joining{Room: "!r:x", Open: true})
	for range 100 {
		for _, f := range of[Forward](r.last) {
			r.one("one that waited before is held back, too", f.Req != a)
			r.answer(f.Op, 200)
		}
		r.pass(100 * time.Millisecond)
	}
	r.step(Joining{Room: "!r:x"})
	r.pass(afterJoin)
	r.one("until it is over", r.forwarded().Req == a)
	r.rest()

	r = newRig(t, nil)
	for i := range 2 * maxJoins {
		r.step(Joining{Room: fmt.Sprint(i), Open: true})
	}
	if len(r.m.joins.rooms) != maxJoins || r.m.stats.JoinsIgnored != maxJoins {
		t.Errorf("%d rooms, %d ignored", len(r.m.joins.rooms), r.m.stats.JoinsIgnored)
	}
	r.pass(joinLongest)
	if len(r.m.joins.rooms) != 0 {
		t.Errorf("%d windows stay open for ever", len(r.m.joins.rooms))
	}
}

func TestFullMakesRoomAtTheCheapestEnd(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Requests, c.Origins, c.Concurrency, c.Parallel, c.EphemeralRate = 12, 1000, 1, 2, 0.001
	})
	r.send("x.test", presence("0", 1))
	first := r.forwarded()
	for i := range 4 {
		r.send(matrix.ServerName(fmt.Sprintf("e%d.test", i)), presence("1", 1))
	}
	for i := range 4 {
		r.get("s.test", "GET", fmt.Sprintf("/_matrix/federation/v1/backfill/%d", i))
	}
	for i := range 3 {
		r.send(matrix.ServerName(fmt.Sprintf("p%d.test", i)), pdus("1"))
	}
	r.one("twelve are held", r.m.held.n == 12 && len(of[Refuse](r.all))+len(of[Empty](r.all)) == 0)
	r.get("q.test", "GET", "/_matrix/federation/v1/make_join/r/u")
	r.one("the oldest presence goes", reflect.DeepEqual(of[Empty](r.last), []Empty{{2}}))
	for i := range 3 {
		r.send("q.test", pdus(fmt.Sprint(i)))
	}
	r.one("and all of it", len(of[Empty](r.all)) == 4)
	r.send("q.test", pdus("x"))
	r.one("then the newest of what nobody waits for", r.refused(503).Req == 9)
	r.get("q.test", "GET", "/_matrix/federation/v1/backfill/9")
	r.one("another server's takes the room of the newest of the one that has most", r.refused(503).Req == 8)
	r.get("q.test", "GET", "/_matrix/federation/v1/backfill/10")
	r.one("but none when it has as much", r.refused(503).Req == r.req)
	r.answer(first.Op, 200)
	r.rest()

	r = newRig(t, nil)
	for i := range 8 {
		r.arrive(Arrived{Origin: matrix.ServerName(fmt.Sprintf("p%d.test", i)), Txn: pdus("1"), Size: 5 << 20})
	}
	if r.m.held.bytes > int64(r.m.cfg.Bytes) || len(of[Refuse](r.all)) != 2 {
		t.Errorf("%d bytes are held, %d refused", r.m.held.bytes, len(of[Refuse](r.all)))
	}
	r.rest()
}

func TestOriginsAreForgotten(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Requests, c.Origins = 12, 300 })
	for i := range 1000 {
		r.get(matrix.ServerName(fmt.Sprintf("s%d.test", i)), "GET", "/_matrix/federation/v1/event/1")
		r.answer(r.forwarded().Op, 200)
	}
	if len(r.m.origins) != 300 || r.m.stats.Forgotten != 700 || !r.m.known("s999.test") || !r.m.known("s700.test") || r.m.known("s699.test") {
		t.Errorf("%d origins, %d forgotten", len(r.m.origins), r.m.stats.Forgotten)
	}
	r.rest()
}

func TestWaitersForOneTransactionAreBounded(t *testing.T) {
	r := newRig(t, nil)
	for range maxWaiters + 1 {
		r.send("a.test", pdus("1"))
	}
	r.refused(503)
	r.rest()
}

// When the disk stands still no more transactions are begun than answers may wait
// for it.
func TestSlowDiskHoldsTransactionsBack(t *testing.T) {
	r := newRig(t, func(c *Config) { c.OriginRate, c.OriginBurst = 1000, 1000 })
	r.manual = true
	for i := range 400 {
		q := r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), pdus("1"))
		r.step(Verified{Req: q, Verdict: Good})
		r.step(Looked{Req: q})
	}
	for range 400 {
		for _, f := range of[Forward](r.all) {
			if r.m.ops[f.Op] != nil {
				r.answer(f.Op, 200)
			}
		}
	}
	if n := r.m.record.total(); n < maxRecording || n > maxRecording+8 || len(of[Reply](r.all)) != 0 {
		t.Errorf("%d answers wait for the disk, %d were given", n, len(of[Reply](r.all)))
	}
	r.pass(59 * time.Second)
	if n := len(of[Reply](r.all)); n < maxRecording || r.m.stats.Unrecorded != int64(n) {
		t.Errorf("%d were given in time, %d of them not stored", n, r.m.stats.Unrecorded)
	}
	r.manual = false
	r.step(Recorded{Batch: 1, OK: false})
	r.rest()
}

func TestDrainEndsEverything(t *testing.T) {
	r := newRig(t, func(c *Config) { c.EphemeralRate, c.Concurrency = 0.001, 1 })
	r.step(Joining{Room: "!r:x", Open: true})
	held := r.send("h.test", pdus("1", "!r:x"))
	r.step(Joining{Room: "!r:x"})
	r.send("a.test", presence("1", 1))
	r.pass(afterJoin)
	r.send("b.test", presence("1", 1))
	r.send("c.test", pdus("1"))
	r.send("d.test", pdus("1"))
	r.get("e.test", "PUT", "/_matrix/federation/v2/send_join/r/e")
	r.step(Draining{By: r.now.Add(5 * time.Second)})
	r.one("presence is dropped", len(of[Empty](r.all)) == 2)
	r.answer(of[Forward](r.all)[0].Op, 200)
	r.one("the rest goes on", of[Reply](r.last)[0].Req == held && len(of[Forward](r.last)) == 1)
	r.pass(5 * time.Second)
	r.one("until time is up", len(of[Refuse](r.last)) == 3 && len(of[Cancel](r.last)) == 2 && len(of[Drained](r.all)) == 0)
	for _, f := range of[Forward](r.all) {
		if r.m.ops[f.Op] != nil {
			r.step(Done{Op: f.Op, Failure: matrix.FailCancelled})
		}
	}
	r.one("and everything has ended", len(of[Drained](r.all)) == 1)
	r.rest()

	r = newRig(t, nil)
	r.step(Joining{Room: "!r:x", Open: true})
	r.send("h.test", pdus("1", "!r:x"))
	r.step(Draining{By: r.now.Add(5 * time.Second)})
	r.one("a join is not waited for", len(of[Forward](r.last)) == 1)
	r.send("i.test", pdus("1", "!r:x"))
	r.refused(503)
	r.rest()
	r.one("which ends it", len(of[Drained](r.all)) == 1)
}

func TestWindowFollowsAnswerTimes(t *testing.T) {
	var w window
	w.init(laneTxn)
	w.limit(8)
	now := sched.FromStored(1_800_000_000_000)
	feed := func(n int, took time.Duration) {
		for range n {
			now = now.Add(50 * time.Millisecond)
			w.wanted = true
			w.answered(now, kind{name: "pdus"}, took, true)
		}
	}
	feed(96, 30*time.Millisecond)
	if w.size != 8 {
		t.Errorf("%d while answers are fast, want 8", w.size)
	}
	feed(8, 70*time.Millisecond)
	if w.size != 4 {
		t.Errorf("%d after a median of more than twice the best, want 4", w.size)
	}
	for range 20 {
		w.wanted = true
		w.answered(now, kind{name: "pdus"}, 2*time.Second, true)
	}
	if w.size != 4 {
		t.Errorf("%d after answers to what was begun before that, want 4", w.size)
	}
	feed(16, 45*time.Millisecond)
	if w.size != 4 {
		t.Errorf("%d right after that, want 4", w.size)
	}
	feed(100, 70*time.Millisecond)
	if w.size != 1 {
		t.Errorf("%d when that goes on, want 1", w.size)
	}
	feed(200, 35*time.Millisecond)
	if w.size != 8 {
		t.Errorf("%d when it is over, want 8", w.size)
	}
	// What was fast once is forgotten.
	feed(20*60*11, 70*time.Millisecond)
	if w.size != 8 {
		t.Errorf("%d after ten minutes of nothing faster, want 8", w.size)
	}
	w.wanted = false
	w.size = 2
	for range 100 {
		now = now.Add(50 * time.Millisecond)
		w.answered(now, kind{name: "pdus"}, 70*time.Millisecond, true)
	}
	if w.size != 2 {
		t.Errorf("it grows to %d though nobody waits", w.size)
	}
	for i := range 300 {
		w.answered(now, kind{"pdus", i}, time.Second, true)
	}
	if len(w.best) != maxBaselines || len(w.ratios) > adjustMost {
		t.Errorf("%d kinds and %d answers are remembered", len(w.best), len(w.ratios))
	}
	if p50, p90 := w.quantiles(); p50 != time.Second || p90 != time.Second {
		t.Errorf("quantiles %s and %s", p50, p90)
	}
}

// One attempt that hangs does not stop the others when only one may run.
func TestHangingAttemptIsInNobodysWay(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency = 4 })
	r.m.lanes[laneTxn].window.size = 1
	r.m.lanes[laneTxn].resize()
	r.send("a.test", pdus("1"))
	r.forwarded()
	r.send("b.test", pdus("1"))
	r.one("waits", len(of[Forward](r.last)) == 0)
	r.pass(stallAfter)
	r.one("goes after a second", len(of[Forward](r.last)) == 1)
	for i := range 10 {
		r.send(matrix.ServerName(fmt.Sprintf("s%d.test", i)), pdus("1"))
		r.pass(stallAfter)
	}
	if n := len(r.m.ops); n != 4 {
		t.Errorf("%d run, want no more than concurrency", n)
	}
	r.rest()
}

func TestEndlessAttemptIsBrokenOff(t *testing.T) {
	r := newRig(t, nil)
	r.send("a.test", pdus("1"))
	f := r.forwarded()
	r.pass(maxRun + time.Second)
	r.one("in the end", reflect.DeepEqual(of[Cancel](r.last), []Cancel{{f.Op}}))
	r.step(Done{Op: f.Op, Failure: matrix.FailCancelled})
	r.rest()
}

func TestConfigIsChecked(t *testing.T) {
	good := Default()
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for key, change := range map[string]func(*Config){
		"key_fetches":        func(c *Config) { c.KeyFetches = 0 },
		"verifying":          func(c *Config) { c.Verifying = 0 },
		"unverified ":        func(c *Config) { c.Unverified = -1 },
		"requests":           func(c *Config) { c.Requests = 1 },
		"concurrency":        func(c *Config) { c.Concurrency = 0 },
		"parallel":           func(c *Config) { c.Parallel = 1 },
		"transaction_queue ": func(c *Config) { c.TxnQueue = 0 },
		"origin_queue":       func(c *Config) { c.OriginQueue = 49 },
		"origin_parallel":    func(c *Config) { c.OriginParallel = 0 },
		"origin_burst":       func(c *Config) { c.OriginBurst = 0 },
		"ephemeral_waiting":  func(c *Config) { c.EphemeralWaiting = 0 },
		"unverified_bytes":   func(c *Config) { c.UnverifiedBytes = sched.MiB },
		"request_bytes":      func(c *Config) { c.Bytes = sched.MiB },
		"origin_bytes":       func(c *Config) { c.OriginBytes = sched.MiB },
		"pass_rate":          func(c *Config) { c.PassRate = 0 },
		"origin_rate":        func(c *Config) { c.OriginRate = -1 },
		"ephemeral_rate":     func(c *Config) { c.EphemeralRate = 0 },
		"ephemeral_share":    func(c *Config) { c.EphemeralShare = 1.1 },
		"no_key":             func(c *Config) { c.NoKey = 9 },
		"ephemeral ":         func(c *Config) { c.Ephemeral = 9 },
		"origins":            func(c *Config) { c.Origins = c.Requests },
		"ephemeral_hold":     func(c *Config) { c.EphemeralHold = time.Minute },
		"join_hold":          func(c *Config) { c.JoinHold = time.Minute },
		"deny":               func(c *Config) { c.Deny = []string{""} },
		"deny ":              func(c *Config) { c.Deny = []string{"a.test", "*.test:8448"} },
		"deny  ":             func(c *Config) { c.Deny = []string{"[::1]:1"} },
		"allow ":             func(c *Config) { c.Allow = []string{"a.test:1"} },
		"allow":              func(c *Config) { c.Allow = make([]string, maxPatterns+1) },
	} {
		c := Default()
		change(&c)
		if err := c.Validate(); err == nil || !strings.HasPrefix(err.Error()+" ", strings.TrimSpace(key)+" ") {
			t.Errorf("%s: %v", key, err)
		}
	}
	ports := Default()
	ports.Deny, ports.Allow = []string{"[::1]", "[2001:db8:*", "*:?", "a.test:"}, []string{"8448", "*1"}
	if err := ports.Validate(); err != nil {
		t.Errorf("no pattern ends in a port: %v", err)
	}
	globs := Default()
	for i := range maxGlobs + 1 {
		globs.Deny = append(globs.Deny, fmt.Sprintf("*.%d.test", i))
	}
	if globs.Validate() == nil {
		t.Error("too many wildcards are accepted")
	}
	for _, s := range []string{"pass", "pace", "drop"} {
		var e EphemeralMode
		if err := e.UnmarshalText([]byte(s)); err != nil || e.String() != s {
			t.Errorf("%q gives %s, %v", s, e, err)
		}
	}
	var p NoKeyPolicy
	if p.UnmarshalText([]byte("refuse")) != nil || p != RefuseNoKey || p.UnmarshalText([]byte("maybe")) == nil {
		t.Error("no_key is not read")
	}
}

func TestACL(t *testing.T) {
	for _, tt := range []struct {
		deny, allow []string
		literals    bool
		name        matrix.ServerName
		want        bool
	}{
		{nil, nil, false, "a.test", true},
		{nil, nil, false, "192.0.2.1", false},
		{nil, nil, false, "[::1]", false},
		{nil, nil, true, "192.0.2.1:8448", true},
		{[]string{"[2001:*"}, nil, true, "[2001:db8::1]:1", false},
		{[]string{"[2001:*"}, nil, true, "[fe80::1]", true},
		{[]string{"A.test"}, nil, false, "a.TEST:8448", false},
		{[]string{"*.test"}, []string{"a.test"}, false, "a.test", false},
		{nil, []string{"*.test"}, false, "a.test", true},
		{nil, []string{"*.test"}, false, "test", false},
		{[]string{"?.test"}, nil, false, "ab.test", true},
		{[]string{"?.test"}, nil, false, "a.test", false},
		{[]string{"*a*b*c"}, nil, false, "xaxbxbxc", false},
		{[]string{"*a*b*c"}, nil, false, "xaxcxb", true},
		{[]string{"*"}, nil, false, "x", false},
		{[]string{"2001:DB8:0::1"}, nil, true, "[2001:db8::0:1]:8448", false},
		{[]string{"[2001:db8::1]"}, nil, true, "[2001:DB8:0:0::1]", false},
		{[]string{"192.0.2.1"}, nil, true, "[::ffff:192.0.2.1]", false},
		{[]string{"192.0.2.1"}, nil, true, "192.0.2.2", true},
		{[]string{"192.0.2.*"}, nil, true, "[::ffff:192.0.2.5]", false},
		{[]string{"[2001:db8::*"}, nil, true, "[2001:DB8:0::5]:8448", false},
		{nil, []string{"2001:db8::1"}, true, "[2001:db8::1]", true},
		{[]string{"Evil.test."}, nil, false, "evil.TEST", false},
	} {
		c := Default()
		c.Deny, c.Allow, c.AllowIPLiterals = tt.deny, tt.allow, tt.literals
		if got := NewACL(&c).Allows(tt.name); got != tt.want {
			t.Errorf("deny %q, allow %q, literals %t: %s gives %t", tt.deny, tt.allow, tt.literals, tt.name, got)
		}
	}
}

// A pattern of many stars must not take for ever.
func TestGlobTakesBoundedTime(t *testing.T) {
	pattern, s := strings.Repeat("*a", 110)+"b", strings.Repeat("a", 230)
	begun := time.Now()
	for range 100 {
		if glob(pattern, s) {
			t.Fatal("it matches")
		}
	}
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("100 matches took %s", took)
	}
}

func TestSnapshotTellsWhatIsWrong(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Concurrency = 1 })
	r.send("a.test", pdus("1"))
	r.send("a.test", pdus("2"))
	r.get("b.test", "GET", "/_matrix/federation/v1/event/1")
	r.verdict = func(*request) Verdict { return Forged }
	r.send("a.test", pdus("3"))
	r.pass(500 * time.Millisecond)
	s := r.m.Snapshot(r.now, 1)
	if b := s.Bands[BandPDUs]; b.Waiting != 1 || b.Running != 1 || b.Oldest != 500*time.Millisecond {
		t.Errorf("band %+v", b)
	}
	if len(s.Worst) != 1 || s.Worst[0].Name != "a.test" || s.Worst[0].Forged != 1 || s.Worst[0].Waiting != 1 || s.Worst[0].Running != 1 {
		t.Errorf("worst %+v", s.Worst)
	}
	if !s.Home.Up || s.Requests.Used != 3 || s.Bytes != 3000 || s.Stats.Forged != 1 {
		t.Errorf("%+v", s)
	}
	for _, f := range of[Forward](r.all) {
		r.step(Done{Op: f.Op, Failure: matrix.FailRefused, Unsent: true, Detail: "connect: refused"})
	}
	if h := r.m.Snapshot(r.now, 0).Home; h.Up || h.Since != r.now || !strings.Contains(h.Why, "connect: refused") || h.Downs != 1 {
		t.Errorf("homeserver %+v", h)
	}
	r.rest()
}

func TestBrokenInvariantsPanic(t *testing.T) {
	for what, ev := range map[string]Event{
		"an end of nothing": Done{Op: 7}, "a verdict for nobody": Verified{Req: 7}, "a look for nobody": Looked{Req: 7},
		"a record of nothing": Recorded{Batch: 7}, "an answer to nothing": Answered{Op: 7, Status: 200},
	} {
		func() {
			defer func() {
				if p := recover(); p == nil || !strings.Contains(fmt.Sprint(p), "7") {
					t.Errorf("%s: %v", what, p)
				}
			}()
			newRig(t, nil).step(ev)
		}()
	}
}

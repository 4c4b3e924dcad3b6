package bus

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// unhurried is for tests that are not about the rate of a host.
func unhurried(c *Config) { c.HostRate, c.HostBurst, c.HostConcurrency = 1e6, 1000, 50 }

// storing is that, with answers in the store.
func storing(c *Config) {
	unhurried(c)
	c.KnownAnswers = 1000
}

// arrive sends a request and returns its number.
func (r *rig) arrive(a Arrived) ReqID {
	r.t.Helper()
	r.req++
	a.Req, a.Received, a.Class = r.req, r.now, a.Endpoint.Class
	r.step(a)
	return r.req
}

func profileKey(dest matrix.ServerName, n int) Key {
	return keyOf(dest, fmt.Sprintf("/_matrix/federation/v1/query/profile?user_id=%d", n))
}

// field sends a query for one field of what profile asks for.
func (r *rig) field(dest matrix.ServerName, n int, field string) ReqID {
	r.t.Helper()
	return r.arrive(Arrived{Dest: dest, Endpoint: matrix.Match("GET", "/_matrix/federation/v1/query/profile"), Key: keyOf(dest, fmt.Sprint(n, field)), Field: field, Whole: profileKey(dest, n)})
}

// replies compares the replies of the last step.
func (r *rig) replies(what string, want ...Reply) {
	r.t.Helper()
	if got := of[Reply](r.last); !reflect.DeepEqual(got, want) {
		r.t.Fatalf("%s: replies %+v, want %+v; the last step gave %+v", what, got, want, r.last)
	}
}

// had asks for a profile and gets it, so that it is known.
func (r *rig) had(dest matrix.ServerName, n int) OpID {
	r.t.Helper()
	r.profile(dest, n)
	op := r.sent().Op
	r.answer(op, 200)
	return op
}

// committed reports every commit that is under way as done.
func (r *rig) committed() {
	r.t.Helper()
	for _, c := range of[Commit](r.all) {
		if _, ok := r.m.commits[c.Batch]; ok {
			r.step(Committed{Batch: c.Batch, OK: true})
		}
	}
}

// stored returns the answers of all commits.
func (r *rig) stored() (list [][]KeptAnswer) {
	for _, c := range of[Commit](r.all) {
		if c.Answers != nil {
			list = append(list, c.Answers)
		}
	}
	return list
}

// flood has many other profiles push everything else out of memory.
func (r *rig) flood(dest matrix.ServerName) {
	r.t.Helper()
	for range 300 {
		r.had(dest, 1000*(1+int(r.req))) // never the same
	}
	r.pass(storeLater)
	r.committed()
}

func TestKnownAnswerSaysHowOldItIs(t *testing.T) {
	r := newRig(t, nil)
	r.works("h.test")
	op := of[Send](r.all)[0].Op
	r.pass(100 * time.Second)
	a := r.profile("h.test", -1)
	r.replies("after a while", Reply{Req: a, Op: op, From: FromCache, Age: 100 * time.Second})
	r.pass(200*time.Second - 1)
	b := r.profile("h.test", -1)
	r.replies("to the last moment", Reply{Req: b, Op: op, From: FromCache, Age: 300*time.Second - 1})
	r.pass(1)
	r.profile("h.test", -1)
	r.one("and no longer", len(of[Send](r.last)) == 1)
	for s, want := range map[Source]string{FromRemote: "MISS", FromOther: "SHARED", FromCache: "HIT", FromStale: "STALE"} {
		if s.String() != want {
			t.Errorf("source %d is %s", s, s)
		}
	}
}

func TestFieldOfAProfileIsCutFromTheWhole(t *testing.T) {
	r := newRig(t, unhurried)
	whole := r.profile("h.test", 1)
	op := r.sent().Op
	a := r.field("h.test", 1, "displayname")
	r.one("it waits for the whole that is asked for", len(of[Send](r.last)) == 0)
	r.step(Connected{op})
	r.step(Answered{Op: op, Status: 200})
	r.replies("and gets its part", Reply{Req: whole, Op: op}, Reply{Req: a, Op: op, Field: "displayname", From: FromOther})
	b := r.field("h.test", 1, "avatar_url")
	r.replies("another, while it arrives", Reply{Req: b, Op: op, Field: "avatar_url", From: FromOther})
	r.step(Done{Op: op, Size: 100, Kept: true})
	r.pass(time.Minute)
	c := r.field("h.test", 1, "displayname")
	r.replies("another from memory", Reply{Req: c, Op: op, Field: "displayname", From: FromCache, Age: time.Minute})
	r.pass(5 * time.Minute)
	d := r.field("h.test", 1, "displayname")
	alone := r.sent().Op
	e := r.profile("h.test", 1)
	r.one("a field does not answer for the whole", len(of[Send](r.last)) == 1)
	second := r.sent().Op
	r.step(Done{Op: alone, Failure: matrix.FailRefused})
	age := r.now.Sub(sched.FromStored(1_800_000_000_000))
	r.replies("an old whole is better than none", Reply{Req: d, Op: op, Field: "displayname", From: FromStale, Age: age})
	r.step(Done{Op: second, Failure: matrix.FailRefused})
	r.replies("for the whole, too", Reply{Req: e, Op: op, From: FromStale, Age: age})
}

func TestFieldOfAMissingProfile(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	r.profile("h.test", 1)
	op := r.sent().Op
	r.answer(op, 404)
	a := r.field("h.test", 1, "displayname")
	r.replies("is missing as well", Reply{Req: a, Op: op, Field: "displayname", From: FromCache})
}

func TestFieldIsCutFromALoadedWhole(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	r.had("h.test", 1)
	r.flood("h.test")
	a := r.field("h.test", 1, "displayname")
	load := of[Load](r.last)
	r.one("the whole is loaded", len(load) == 1 && load[0].Key == profileKey("h.test", 1))
	b := r.profile("h.test", 1)
	r.one("once", len(r.last) == 0)
	r.step(Loaded{Op: load[0].Op, OK: true, Status: 200, Size: 100})
	r.replies("for both", Reply{Req: a, Op: load[0].Op, Field: "displayname", From: FromCache, Age: storeLater}, Reply{Req: b, Op: load[0].Op, From: FromCache, Age: storeLater})
}

func TestMissingAnswerIsKnownBriefly(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	r.profile("h.test", 1)
	op := r.sent().Op
	r.answer(op, 404)
	r.pass(30*time.Second - 1)
	a := r.profile("h.test", 1)
	r.replies("for half a minute", Reply{Req: a, Op: op, From: FromCache, Age: 30*time.Second - 1})
	r.pass(1)
	r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.one("and does not stand in for a host that fails", len(of[Reply](r.last)) == 0 && len(of[Refuse](r.last)) == 1)
}

func TestOtherAnswersAreNotKept(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	for i, done := range []Done{{Size: 100, Kept: true}, {Size: 100}, {Size: 100, Kept: true, Private: true}, {Size: 100, Kept: true, Failure: matrix.FailCut}} {
		status := 200
		if i == 0 {
			status = 403
		}
		for range 2 {
			r.profile("h.test", i)
			done.Op = r.sent().Op
			r.step(Answered{Op: done.Op, Status: status})
			r.step(done)
			r.one("it is let go", reflect.DeepEqual(of[Discard](r.last), []Discard{{done.Op}}))
		}
	}
}

func TestAnswersAreStoredTogether(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	for i := range storeAtOnce - 2 { // with the one that made it work
		r.had("h.test", i)
	}
	r.pass(storeLater - 1)
	r.one("nothing is stored yet", r.stored() == nil)
	r.pass(1)
	list := r.stored()
	if len(list) != 1 || len(list[0]) != storeAtOnce-1 {
		t.Fatalf("%d commits", len(list))
	}
	first := list[0][1]
	if first.Key != profileKey("h.test", 0) || first.Op != of[Send](r.all)[1].Op || first.Fresh.Sub(first.Stored) != 5*time.Minute || first.Stale.Sub(first.Stored) != 5*time.Minute+24*time.Hour {
		t.Errorf("stored as %+v", first)
	}
	for i := range storeAtOnce {
		r.had("h.test", 1000+i)
	}
	r.one("many are not waited with", len(r.stored()) == 2 && len(r.stored()[1]) == storeAtOnce)
	r.get("h.test", "GET", "/_matrix/federation/v1/publicRooms")
	r.answer(r.sent().Op, 200)
	r.pass(storeLater)
	r.one("what is not durable stays in memory", len(r.stored()) == 2)
}

// What is pushed out of memory before its time is written at that moment, as its
// body is about to be let go.
func TestAnswerIsStoredBeforeItIsLetGo(t *testing.T) {
	r := newRig(t, func(c *Config) { storing(c); c.CacheBytes = 10 * sched.KiB })
	r.works("h.test")
	for i := range 20 {
		r.had("h.test", i)
		for j, e := range r.last {
			d, ok := e.(Discard)
			if !ok {
				continue
			}
			found := false
			for _, c := range of[Commit](append(r.all[:len(r.all)-len(r.last):len(r.all)-len(r.last)], r.last[:j]...)) {
				for _, a := range c.Answers {
					found = found || a.Op == d.Op
				}
			}
			r.one("stored, then discarded", found)
		}
	}
	r.one("some were let go", len(of[Discard](r.all)) > 5)
}

func TestStoredAnswerIsLoaded(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	r.had("h.test", 1)
	at := r.now
	r.flood("h.test")
	a := r.profile("h.test", 1)
	op := of[Load](r.last)[0].Op
	b := r.profile("h.test", 1)
	r.one("an equal request waits with it", len(r.last) == 0)
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 100})
	age := r.now.Sub(at)
	r.replies("both get it", Reply{Req: a, Op: op, From: FromCache, Age: age}, Reply{Req: b, Op: op, From: FromCache, Age: age})
	c := r.profile("h.test", 1)
	r.replies("then it is in memory", Reply{Req: c, Op: op, From: FromCache, Age: age})
	r.flood("h.test")
	n := 0
	for _, d := range of[Discard](r.all) {
		if d.Op == op {
			n++
		}
	}
	r.one("and let go once", n == 1)
}

func TestStoredAnswersSurviveARestart(t *testing.T) {
	r := newRig(t, storing)
	hour := r.now.Add(time.Hour)
	r.step(Restored{Answers: []AnswerRecord{
		{Key: profileKey("h.test", 2), Stored: hour, Fresh: hour.Add(5 * time.Minute), Stale: hour.Add(time.Hour)},
		{Key: profileKey("h.test", 1), Stored: r.now.Add(-time.Minute), Fresh: r.now.Add(4 * time.Minute), Stale: r.now.Add(time.Hour)},
	}})
	r.profile("h.test", 1)
	op := of[Load](r.last)[0].Op
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 100})
	r.replies("it is as old as it was", Reply{Req: 1, Op: op, From: FromCache, Age: time.Minute})
	r.profile("h.test", 2)
	op = of[Load](r.last)[0].Op
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 5000})
	r.replies("one from the future is new now", Reply{Req: 2, Op: op, From: FromCache})
	r.pass(5*time.Minute - 1)
	r.profile("h.test", 2)
	r.replies("it is good for no longer than any other", Reply{Req: 3, Op: op, From: FromCache, Age: 5*time.Minute - 1})
	r.pass(1)
	r.profile("h.test", 2)
	r.one("then it is asked for", len(of[Send](r.last)) == 1)
}

// What the store could not write it does not have; what it had before it still has.
func TestAnswerThatCouldNotBeStoredIsNotKnown(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	r.committed()
	r.pass(storeLater)
	for _, c := range of[Commit](r.last) {
		r.step(Committed{Batch: c.Batch})
	}
	r.one("it is not", len(r.m.answers.known) == 0 && len(r.stored()) == 1)
	r.had("h.test", 1)
	r.pass(storeLater)
	r.committed()
	old := r.m.answers.known[short(profileKey("h.test", 1))]
	r.pass(6 * time.Minute)
	r.had("h.test", 1)
	r.pass(storeLater)
	for _, c := range of[Commit](r.last) {
		r.step(Committed{Batch: c.Batch})
	}
	r.one("the old one is", r.m.answers.known[short(profileKey("h.test", 1))] == old && old.stored != 0)
}

func TestLoadThatFailsGoesUpstream(t *testing.T) {
	r := newRig(t, storing)
	r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now, Fresh: r.now.Add(time.Minute), Stale: r.now.Add(time.Hour)}}})
	a := r.profile("h.test", 1)
	b := r.profile("h.test", 1)
	r.step(Loaded{Op: of[Load](r.all)[0].Op})
	op := r.sent().Op
	r.step(Connected{op})
	r.step(Answered{Op: op, Status: 403})
	r.replies("both are answered by the remote", Reply{Req: a, Op: op}, Reply{Req: b, Op: op, From: FromOther})
	r.step(Done{Op: op, Size: 10, Kept: true})
	r.profile("h.test", 1)
	r.one("the store is not asked again", len(of[Load](r.last)) == 0 && len(of[Send](r.last)) == 1)
	r.one("and there is nothing to let go of but attempts", len(of[Discard](r.all)) == 1)
}

func TestGoneWhileItsAnswerIsLoaded(t *testing.T) {
	r := newRig(t, storing)
	r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now, Fresh: r.now.Add(time.Minute), Stale: r.now.Add(time.Hour)}}})
	a := r.profile("h.test", 1)
	op := of[Load](r.last)[0].Op
	r.step(Gone{a})
	r.one("its body is freed", reflect.DeepEqual(r.last, []Effect{Free{a}}))
	r.step(Gone{a})
	r.one("once", len(r.last) == 0)
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 10})
	r.one("nobody is answered", len(r.last) == 0)
	if s := r.m.stats; s.Gone != 1 || s.Answered != 0 {
		t.Errorf("gone %d, answered %d", s.Gone, s.Answered)
	}
}

// stale is a rig whose host has given an answer that is old by now, and only in
// the store.
func stale(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, storing)
	r.works("h.test")
	r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now.Add(-time.Hour), Fresh: r.now.Add(-time.Minute), Stale: r.now.Add(time.Hour)}}})
	return r
}

// loadsOld answers the load of the last step, whose answer is old.
func (r *rig) loadsOld(what string, req ReqID) {
	r.t.Helper()
	load := of[Load](r.last)
	r.one(what+": it is loaded", len(load) == 1 && len(of[Refuse](r.last)) == 0)
	r.step(Loaded{Op: load[0].Op, OK: true, Status: 200, Size: 10})
	r.replies(what, Reply{Req: req, Op: load[0].Op, From: FromStale, Age: time.Hour})
}

func TestOldAnswerIsLoadedWhenTheHostIsNotWell(t *testing.T) {
	r := stale(t)
	a := r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.loadsOld("the attempt fails", a)

	r = stale(t)
	r.profile("h.test", 2)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.loadsOld("the host is backing off", r.profile("h.test", 1))

	for what, ev := range map[string]Answered{
		"a 429 for longer than the caller waits": {Status: 429, RetryAfter: time.Minute},
		"a gateway's answer":                     {Status: 502},
	} {
		r = stale(t)
		a = r.profile("h.test", 1)
		ev.Op = r.sent().Op
		r.step(ev)
		r.one(what+": nobody is answered with it", len(of[Reply](r.last)) == 0)
		r.step(Done{Op: ev.Op, Size: 10, Kept: true})
		r.loadsOld(what, a)
	}

	r = stale(t)
	r.profile("h.test", 2)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 429, RetryAfter: time.Minute})
	r.step(Done{Op: op, Size: 10, Kept: true})
	r.loadsOld("the host wants to be left alone", r.profile("h.test", 1))

	r = stale(t)
	a = r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.step(Loaded{Op: of[Load](r.last)[0].Op})
	refused := of[Refuse](r.last)
	r.one("the store does not have it after all", len(refused) == 1 && refused[0].Req == a && refused[0].Status == 502)

	r = stale(t)
	r.profile("h.test", 1)
	op = r.sent().Op
	r.answer(op, 500)
	r.one("an error of the server's own is passed on", len(of[Load](r.all)) == 0 && len(of[Reply](r.all)) == 2)
}

func TestCallerWhoseTimeIsUpWhileAnOldAnswerIsLoaded(t *testing.T) {
	r := stale(t)
	a := r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	op := of[Load](r.last)[0].Op
	b := r.profile("h.test", 1)
	r.one("another joins", len(of[Load](r.last)) == 0)
	r.pass(9500 * time.Millisecond)
	refused := of[Refuse](r.all)
	r.one("both are told in time", len(refused) == 2 && refused[0].Req == a && refused[1].Req == b && refused[0].Status == 504)
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 10})
	r.one("and not twice", len(of[Reply](r.last)) == 0 && len(of[Free](r.last)) == 1)
}

// The answer of a server's own keys says how long it is good for. Where the store
// is all there is to answer with, it is asked once.
func TestServerKeysSayHowOldTheyMayGet(t *testing.T) {
	for _, cacheBytes := range []sched.Bytes{0, 256 * sched.KiB} {
		r := newRig(t, func(c *Config) { storing(c); c.CacheBytes = cacheBytes })
		const target = "/_matrix/key/v2/server"
		r.step(Restored{Answers: []AnswerRecord{{Key: keyOf("h.test", target), Stored: r.now.Add(-time.Hour), Fresh: r.now.Add(-time.Minute), Stale: r.now.Add(time.Hour)}}})
		r.m.keysMiss(fetchKey{server: "h.test"})
		a := r.get("h.test", "GET", target)
		r.loadsOld("had no keys a moment ago", a)
	}
	r := newRig(t, storing)
	r.get("h.test", "GET", "/_matrix/key/v2/server")
	op := r.sent().Op
	r.step(Connected{op})
	r.step(Answered{Op: op, Status: 200})
	r.step(Done{Op: op, Size: 1000, Kept: true, Fresh: time.Hour, Stale: 2 * time.Hour})
	r.pass(storeLater)
	kept := r.stored()[0][0]
	if kept.Fresh.Sub(kept.Stored) != time.Hour || kept.Stale.Sub(kept.Stored) != 3*time.Hour {
		t.Errorf("kept for %s and %s", kept.Fresh.Sub(kept.Stored), kept.Stale.Sub(kept.Stored))
	}
	r.pass(time.Hour)
	r.get("h.test", "GET", "/_matrix/key/v2/server")
	op = r.sent().Op
	r.step(Answered{Op: op, Status: 200})
	r.step(Done{Op: op, Size: 1000, Kept: true})
	r.get("h.test", "GET", "/_matrix/key/v2/server")
	r.one("one that does not say is not kept", len(of[Send](r.last)) == 1)
}

func TestKnownAnswersKeepToTheirBound(t *testing.T) {
	r := newRig(t, func(c *Config) { storing(c); c.KnownAnswers = 10 })
	r.works("h.test")
	for i := range 30 {
		r.had("h.test", i)
		r.pass(storeLater)
		r.committed()
	}
	if n := len(r.m.answers.known); n != 10 {
		t.Fatalf("%d are known, want 10", n)
	}
	for range 30 { // the same again and again
		r.pass(6 * time.Minute)
		r.had("h.test", 29)
		r.pass(storeLater)
		r.committed()
	}
	if n, order := len(r.m.answers.known), r.m.answers.order.Len(); n == 0 || n > 10 || order > 20 {
		t.Fatalf("%d are known, %d in order", n, order)
	}
	if _, ok := r.m.answers.known[short(profileKey("h.test", 29))]; !ok {
		t.Error("the latest is not among them")
	}
	cfg := r.m.cfg
	cfg.KnownAnswers = 1
	r.step(Reconfigured{cfg})
	if n := len(r.m.answers.known); n > 1 {
		t.Errorf("%d are known with a bound of 1", n)
	}
	var ev Restored
	for i := range 5 {
		ev.Answers = append(ev.Answers, AnswerRecord{Key: profileKey("h.test", 100-i), Stored: r.now.Add(-time.Duration(i)), Fresh: r.now.Add(time.Hour), Stale: r.now.Add(time.Hour)})
	}
	r.step(ev)
	if _, ok := r.m.answers.known[short(profileKey("h.test", 100))]; !ok || len(r.m.answers.known) != 1 {
		t.Errorf("of five restored the newest is not the one that is known")
	}
}

func TestFilesKeepToTheirBounds(t *testing.T) {
	for name, target := range map[string]string{"media": "/_matrix/federation/v1/media/download/%d", "whole": "/_matrix/federation/v1/state/%d"} {
		r := newRig(t, func(c *Config) { unhurried(c); c.MediaBytes, c.KeepBytes, c.CacheBytes = sched.MiB, sched.MiB, 0 })
		r.works("h.test")
		shelf := &r.m.media
		if name == "whole" {
			shelf = &r.m.whole
		}
		get := func(i int, size int64) {
			r.get("h.test", "GET", fmt.Sprintf(target, i))
			op := r.sent().Op
			r.step(Answered{Op: op, Status: 200, Size: -1})
			r.step(Done{Op: op, Size: size})
		}
		for i := range 100 {
			get(i, 1000)
		}
		if n := shelf.recent.Len(); n != shelfFiles {
			t.Errorf("%s: %d small files, want %d", name, n, shelfFiles)
		}
		for i := range 20 {
			get(100+i, 200<<10)
		}
		if n := shelf.recent.Len(); n != 5 {
			t.Errorf("%s: %d files of 200 KiB within 1 MiB, want 5", name, n)
		}
		get(200, 300<<10)
		r.one("one that takes too much is let go", len(of[Discard](r.last)) == 1)
		r.get("h.test", "GET", fmt.Sprintf(target, 119))
		r.one("the latest is there", len(of[Reply](r.last)) == 1 && of[Reply](r.last)[0].From == FromCache)
		cfg := r.m.cfg
		cfg.MediaBytes, cfg.KeepBytes = 0, 0
		r.step(Reconfigured{cfg})
		r.one("all is let go", shelf.recent.Len() == 0 && len(of[Discard](r.last)) == 5)
	}
}

func TestWhatIsNotStoredYetIsStoredWhileDraining(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	r.committed()
	r.step(Draining{})
	r.one("at once, and that is waited for", len(r.stored()) == 1 && len(of[Drained](r.last)) == 0)
	r.committed()
	r.one("then it is done", len(of[Drained](r.last)) == 1)
}

func TestOutdatedKeysAreForgotten(t *testing.T) {
	r := newRig(t, storing)
	const target = "/_matrix/key/v2/server"
	r.get("h.test", "GET", target)
	op := r.sent().Op
	r.step(Connected{op})
	r.step(Answered{Op: op, Status: 200})
	r.step(Done{Op: op, Size: 1000, Kept: true, Fresh: time.Hour, Stale: 2 * time.Hour})
	r.keys("notary.test", want("h.test", "ed25519:new", 0))
	r.step(KeysLoaded{Query: of[LoadKeys](r.last)[0].Query, Outdated: []Key{keyOf("h.test", target)}})
	r.get("h.test", "GET", target)
	r.one("the server is asked again", len(of[Send](r.last)) == 1)
}

// Nothing but a 200 is kept, and a 404 where it says that something does not exist.
func TestStatusesThatAreNotKept(t *testing.T) {
	const complexity = "/_matrix/federation/unstable/rooms/r/complexity"
	r := newRig(t, storing)
	r.works("h.test")
	for _, status := range []int{201, 301, 400, 403, 404, 410, 500} {
		for range 2 {
			r.get("h.test", "GET", complexity)
			op := r.sent().Op
			r.answer(op, status)
			r.one(fmt.Sprint(status, " is let go"), reflect.DeepEqual(of[Discard](r.last), []Discard{{op}}))
		}
	}
	r.get("h.test", "GET", "/_matrix/key/v2/server")
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 200})
	r.step(Done{Op: op, Size: 100, Kept: true, Private: true, Fresh: time.Hour, Stale: time.Hour})
	r.one("what is private is let go whatever it says of its age", reflect.DeepEqual(of[Discard](r.last), []Discard{{op}}))
}

func TestFieldOfAProfileThatTurnsOutMissing(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	whole := r.profile("h.test", 1)
	op := r.sent().Op
	a := r.field("h.test", 1, "displayname")
	r.step(Answered{Op: op, Status: 404})
	r.replies("both hear that it is missing", Reply{Req: whole, Op: op}, Reply{Req: a, Op: op, Field: "displayname", From: FromOther})
}

// An old whole answers for its field also where it has to be loaded first: by the
// time that the field's own attempt has failed, or at once if there can be none.
func TestFieldIsCutFromAnOldWholeThatIsLoaded(t *testing.T) {
	r := stale(t)
	a := r.field("h.test", 1, "displayname")
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	first := of[Load](r.last)
	r.one("the whole is loaded", len(first) == 1 && first[0].Key == profileKey("h.test", 1))
	r.step(Loaded{Op: first[0].Op, OK: true, Status: 200, Size: 10})
	r.replies("for the attempt that failed", Reply{Req: a, Op: first[0].Op, Field: "displayname", From: FromStale, Age: time.Hour})

	r = stale(t)
	r.profile("h.test", 2)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	b := r.field("h.test", 1, "avatar_url")
	second := of[Load](r.last)
	r.one("the whole is loaded at once", len(second) == 1 && second[0].Key == profileKey("h.test", 1))
	r.step(Loaded{Op: second[0].Op, OK: true, Status: 200, Size: 10})
	r.replies("while the host backs off", Reply{Req: b, Op: second[0].Op, Field: "avatar_url", From: FromStale, Age: time.Hour})
}

func TestOldAnswerInMemoryWhenTheHostIsNotWell(t *testing.T) {
	for what, ev := range map[string]Answered{
		"a 429 for longer than the caller waits": {Status: 429, RetryAfter: time.Minute},
		"a gateway's answer":                     {Status: 502},
		"a content network's":                    {Status: 522},
	} {
		r := newRig(t, unhurried)
		r.works("h.test")
		op := r.had("h.test", 1)
		r.pass(20 * time.Minute)
		a := r.profile("h.test", 1)
		ev.Op = r.sent().Op
		r.step(ev)
		r.one(what+": nobody is answered with it", len(of[Reply](r.last)) == 0)
		b := r.profile("h.test", 1)
		r.one(what+": who comes meanwhile waits", len(of[Reply](r.last)) == 0 && len(of[Send](r.last)) == 0)
		r.step(Done{Op: ev.Op, Size: 10, Kept: true})
		old := Reply{Op: op, From: FromStale, Age: 20 * time.Minute}
		first, second := old, old
		first.Req, second.Req = a, b
		r.replies(what, first, second)
		if ev.Status == 429 {
			old.Req = r.profile("h.test", 1)
			r.replies("while the host wants to be left alone", old)
		}
	}
	r := newRig(t, unhurried)
	r.works("h.test")
	r.profile("h.test", 1)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 502})
	r.one("without an old one the 502 is passed on", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: r.req, Op: op}}))
}

func TestStoredAnswerIsNotUsedPastItsTime(t *testing.T) {
	old := func(t *testing.T, left time.Duration) *rig {
		r := newRig(t, storing)
		r.works("h.test")
		r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now.Add(-time.Hour), Fresh: r.now.Add(-time.Minute), Stale: r.now.Add(left)}}})
		return r
	}
	r := old(t, time.Second)
	r.pass(time.Second)
	r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	r.one("it is not even loaded", len(of[Load](r.last)) == 0 && len(of[Refuse](r.last)) == 1)

	r.profile("h.test", 1)
	r.one("nor while the host backs off", len(of[Load](r.last)) == 0 && len(of[Refuse](r.last)) == 1)

	r = old(t, time.Second)
	r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	op := of[Load](r.last)[0].Op
	r.pass(time.Second)
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 10})
	r.one("its time is up while it is loaded", len(of[Reply](r.last)) == 0 && len(of[Refuse](r.last)) == 1)
	r.one("and it is let go", reflect.DeepEqual(of[Discard](r.last), []Discard{{op}}))
}

// An answer that was fresh when its load began is not when it ends.
func TestAnswerThatAgesWhileItIsLoadedGoesUpstream(t *testing.T) {
	r := newRig(t, storing)
	r.works("h.test")
	r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now, Fresh: r.now.Add(time.Second), Stale: r.now.Add(time.Hour)}}})
	a := r.profile("h.test", 1)
	load := of[Load](r.last)[0].Op
	r.pass(time.Second)
	r.step(Loaded{Op: load, OK: true, Status: 200, Size: 10})
	s := r.sent()
	r.one("it is asked for", s.Req == a && len(of[Reply](r.last)) == 0)
	r.step(Done{Op: s.Op, Failure: matrix.FailRefused})
	r.replies("and stands in if that fails", Reply{Req: a, Op: load, From: FromStale, Age: time.Second})
}

func TestOneOfTwoIsGoneWhileTheirAnswerIsLoaded(t *testing.T) {
	r := newRig(t, storing)
	r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now, Fresh: r.now.Add(time.Minute), Stale: r.now.Add(time.Hour)}}})
	a := r.profile("h.test", 1)
	op := of[Load](r.last)[0].Op
	b := r.profile("h.test", 1)
	r.step(Gone{a})
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 10})
	r.replies("the other is answered", Reply{Req: b, Op: op, From: FromCache})
	r.one("and each body is freed once", reflect.DeepEqual(of[Free](r.all), []Free{{a}, {b}}))
}

// Requests that wait for the store count like all others, and are waited for.
func TestRequestsThatWaitForTheStoreKeepToTheBound(t *testing.T) {
	r := newRig(t, func(c *Config) { storing(c); c.MaxRequests, c.MaxHosts = 5, 400 })
	r.step(Restored{Answers: []AnswerRecord{{Key: profileKey("h.test", 1), Stored: r.now, Fresh: r.now.Add(time.Minute), Stale: r.now.Add(time.Hour)}}})
	for range 5 {
		r.profile("h.test", 1)
	}
	op := of[Load](r.all)[0].Op
	r.one("five wait", len(of[Refuse](r.all)) == 0)
	r.profile("h.test", 1)
	refused := of[Refuse](r.last)
	r.one("the sixth is refused", len(refused) == 1 && refused[0].Status == 503)
	r.step(Draining{})
	r.one("the end waits for them", len(of[Drained](r.last)) == 0)
	r.step(Loaded{Op: op, OK: true, Status: 200, Size: 10})
	r.one("all five are answered, then it comes", len(of[Reply](r.last)) == 5 && len(of[Drained](r.last)) == 1)
}

func TestSmallerCacheLetsGoOfWhatWasUsedLast(t *testing.T) {
	r := newRig(t, func(c *Config) { unhurried(c); c.CacheBytes = 40 * sched.KiB })
	r.works("h.test")
	for i := range 30 {
		r.had("h.test", i)
	}
	r.profile("h.test", 3) // is used once more
	cfg := r.m.cfg
	cfg.CacheBytes = 10 * sched.KiB
	r.step(Reconfigured{cfg})
	if n, b := r.m.cache.recent.Len(), r.m.cache.bytes; n != 9 || b != 9*(100+entryCost) || len(of[Discard](r.last)) != 31-9 {
		t.Errorf("%d entries of %d bytes, %d were let go", n, b, len(of[Discard](r.last)))
	}
	for _, i := range []int{3, 29, 22} {
		r.profile("h.test", i)
		r.one(fmt.Sprint(i, " is still there"), len(of[Reply](r.last)) == 1)
	}
	r.profile("h.test", 21)
	r.one("21 is not", len(of[Send](r.last)) == 1)
}

func TestMediaAreKeptOnlyWhereThatIsConfigured(t *testing.T) {
	const target = "/_matrix/federation/v1/media/download/m"
	for _, room := range []sched.Bytes{0, sched.MiB} {
		r := newRig(t, func(c *Config) { unhurried(c); c.MediaBytes = room })
		r.works("h.test")
		r.get("h.test", "GET", target)
		op := r.sent().Op
		r.step(Answered{Op: op, Status: 200, Size: 100})
		r.one("they are passed on at once", len(of[Reply](r.last)) == 1)
		r.step(Done{Op: op, Size: 100, Kept: true})
		r.pass(r.m.cfg.MediaFor - 1)
		id := r.get("h.test", "GET", target)
		if room == 0 {
			r.one("not without room for them", len(of[Send](r.last)) == 1)
			continue
		}
		r.replies("for a day", Reply{Req: id, Op: op, From: FromCache, Age: r.m.cfg.MediaFor - 1})
		r.pass(1)
		r.get("h.test", "GET", target)
		op = r.sent().Op
		r.step(Answered{Op: op, Status: 200, Size: 100})
		r.step(Done{Op: op, Size: 100, Kept: true, Private: true})
		r.one("one that is for its caller alone is let go", len(of[Discard](r.last)) == 1 && of[Discard](r.last)[0].Op == op)
	}
}

// A host that says nothing has failed like any other: whoever cannot wait any
// longer gets the old answer, not an error.
func TestOldAnswerWhenTheHostIsSilent(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	op := r.had("h.test", 1)
	start := r.now
	r.pass(20 * time.Minute)
	whole := r.profile("h.test", 1)
	second := r.sent().Op
	field := r.field("h.test", 1, "displayname")
	fresh := r.profile("h.test", 2)
	r.all = nil
	r.pass(9500*time.Millisecond - 1)
	r.one("nobody is answered early", len(of[Reply](r.all))+len(of[Refuse](r.all)) == 0)
	r.pass(1)
	age := r.now.Sub(start)
	if got, want := of[Reply](r.all), []Reply{{Req: whole, Op: op, From: FromStale, Age: age}, {Req: field, Op: op, Field: "displayname", From: FromStale, Age: age}}; !reflect.DeepEqual(got, want) {
		t.Errorf("replies %+v, want %+v", got, want)
	}
	refused := of[Refuse](r.all)
	r.one("who has no old one gets an error", len(refused) == 1 && refused[0].Req == fresh && refused[0].Status == 504)
	r.one("and the attempt ends", slices.Contains(of[Cancel](r.all), Cancel{second}))
	r.step(Done{Op: second, Failure: matrix.FailCancelled})
	r.one("with nobody left to answer", len(of[Reply](r.last))+len(of[Refuse](r.last)) == 0)
	if s := r.m.stats; s.CacheStale != 2 || s.Expired != 1 {
		t.Errorf("%d stale answers, %d expired", s.CacheStale, s.Expired)
	}
}

// A 429 whose body takes the rest of the caller's time is what the caller gets.
func TestRateLimitThatEndsTooLateIsPassedOn(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	id := r.profile("h.test", 1)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 429, RetryAfter: time.Second})
	r.pass(9 * time.Second)
	r.step(Done{Op: op, Size: 10, Kept: true})
	r.one("and it is let go", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: id, Op: op}}) && reflect.DeepEqual(of[Discard](r.last), []Discard{{op}}))
	r.pass(time.Minute)
	r.one("once", len(of[Refuse](r.all)) == 0 && len(of[Send](r.all)) == 2)
}

package bus

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// What may have arrived under one id must not be sent under another, even if
// nothing of the latest attempt was sent.
func TestWhatMayHaveArrivedIsNotTakenApart(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	s := r.packs()
	r.step(Connected{s.Op})
	r.breaks(s, matrix.FailReset, true)
	r.one("it stays as it is", len(of[Settle](r.last)) == 0)
	r.passTo(time.Minute)
	s = r.packs()
	r.breaks(s, matrix.FailRefused, false)
	r.one("it still stays as it is", len(of[Settle](r.last)) == 0)
}

// A refusal is one of what was sent, not of what takes its place when an admin
// has dropped that.
func TestRefusalsAreOfOneBatch(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	r.ends(r.packs(), 500)
	r.take("h.test", kPDU, kPDU)
	delete(r.frozen, "h.test") // an admin drops the first
	*r.backlog("h.test") = Backlog{Oldest: r.now}
	r.backlog("h.test").Items[kPDU] = 2
	r.step(Adjusted{Dest: "h.test", Backlog: *r.backlog("h.test")})
	r.passTo(time.Hour)
	r.ends(r.packs(), 500)
	r.one("the next one has been refused once", len(of[Send](r.last)) == 0)
	r.passTo(time.Hour)
	r.ends(r.packs(), 500)
	r.one("and when it has been twice the control is sent", only[Send](r, "want a Send").Control != "")
}

// Who does not want us is not asked at once because what it did not want has
// expired meanwhile.
func TestBackOffOutlivesWhatExpires(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.PresenceWindow = 0 })
	r.take("h.test", kPresence)
	for _, want := range []time.Duration{time.Minute, 3 * time.Minute} {
		r.ends(r.packs(), 403)
		delete(r.frozen, "h.test")
		*r.backlog("h.test") = Backlog{}
		r.step(Adjusted{Dest: "h.test"})
		r.one("nothing is pending", len(r.m.outbox.queues) == 0)
		r.take("h.test", kPresence)
		if waited := r.passTo(time.Hour); !nearly(waited, want) {
			t.Errorf("the next is tried after %s, want about %s", waited, want)
		}
	}
}

// What answers under the name of a server need not be one; that it answers says
// nothing.
func TestBackOffIsLiftedOnlyByWhatItIsFor(t *testing.T) {
	for _, tt := range []struct {
		what  string
		end   func(r *outboxRig, s Send)
		lifts bool
	}{
		{"a broken connection", func(r *outboxRig, s Send) { r.breaks(s, matrix.FailReset, true) }, false},
		{"a gateway", func(r *outboxRig, s Send) { r.ends(s, 520) }, false},
		{"an answer that is not a Matrix server's", func(r *outboxRig, s Send) {
			r.step(Answered{Op: s.Op, Status: 200})
			r.breaks(s, matrix.FailContent, true)
		}, false},
		{"a refusal", func(r *outboxRig, s Send) { r.ends(s, 500) }, false},
		{"a failure of the store", func(r *outboxRig, s Send) {
			r.ends(s, 200)
			r.step(Settled{Batch: only[Settle](r, "want one Settle").Batch})
		}, false},
	} {
		r := newOutboxRig(t, nil)
		r.take("h.test", kPDU)
		s := r.packs()
		r.step(Connected{s.Op})
		tt.end(r, s)
		r.profile("h.test", 1)
		r.answer(r.sent().Op, 200)
		begun := 0
		for _, p := range of[Pack](r.all) {
			if p.Dest == "h.test" {
				begun++
			}
		}
		if lifted := begun == 2; lifted != tt.lifts {
			t.Errorf("%s: tried again as soon as a lookup is answered: %t, want %t", tt.what, lifted, tt.lifts)
		}
		tries := func() int { return len(of[Pack](r.all)) + len(of[Settle](r.all)) }
		if again := tries(); !tt.lifts && (r.passTo(time.Hour) == time.Hour || tries() == again) {
			t.Errorf("%s: never tried again", tt.what)
		}
	}
}

func TestOneTransactionAtATimeForADestination(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.works("h.test") // so that its limits are not those of an unknown host
	r.take("h.test", kPDU)
	p := only[Pack](r, "want one Pack")
	r.take("h.test", kPDU)
	r.one("not while it is packed", len(of[Pack](r.last)) == 0)
	r.last = []Effect{p}
	s := r.packs()
	r.take("h.test", kPDU)
	r.one("nor while it is on its way", len(of[Pack](r.last)) == 0)
	r.ends(s, 200)
	settle := only[Settle](r, "the outcome is noted")
	r.take("h.test", kPDU)
	r.one("nor before the outcome is on disk", len(of[Pack](r.last)) == 0)
	r.last = []Effect{settle}
	r.settles()
	r.one("the rest goes then", len(of[Pack](r.last)) == 1)
	r.one("and what was packed first is let go of", len(of[Unpack](r.all)) == 1 && of[Unpack](r.all)[0].Batch == p.Batch)
	r.ends(r.packs(), 200)
	r.settles()
	if s := r.m.outbox.stats; s.Transactions != 2 || s.ItemsOut[kPDU] != 4 || s.Retried != 0 {
		t.Errorf("%d transactions, %d items, %d retried; want 2, 4, 0", s.Transactions, s.ItemsOut[kPDU], s.Retried)
	}
}

func TestIDsAreNeverUsedTwice(t *testing.T) {
	seen := map[string]bool{}
	for seed := range uint64(3) { // three starts
		r := newOutboxRig(t, nil)
		r.m.outbox.init(seed * 1000003)
		for range 100 {
			r.take("h.test", kPDU)
			p := only[Pack](r, "want one Pack")
			if seen[p.TxnID] || strings.Trim(p.TxnID, "0123456789") == "" {
				t.Fatalf("the id %q is another's", p.TxnID)
			}
			seen[p.TxnID] = true
			r.ends(r.packs(), 200)
			r.settles()
		}
	}
}

// Presence that waits for a worker must not keep an event waiting that comes for
// the same destination.
func TestDeliveryMovesToABetterClass(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) {
		c.Workers, c.Unknown, c.Failing = 8, 8, 1
		c.Outbox.PresenceWindow = 0
	})
	for i := range 20 { // presence may hold four of the eight
		r.take(matrix.ServerName(fmt.Sprintf("h%d.test", i)), kPresence)
	}
	packing := len(of[Pack](r.all))
	r.one("some wait", packing == 4 && r.status("h19.test").State == "queued")
	r.take("h19.test", kPDU)
	p := only[Pack](r, "it has its turn at once")
	r.one("before those that came first", p.Dest == "h19.test")
	r.one("as an event", r.packs().Class == matrix.ClassEvent)
	r.take("h18.test", kToDevice)
	r.one("so has one with a message to a device", only[Pack](r, "want one Pack").Dest == "h18.test")
}

func TestBackOffByAnswer(t *testing.T) {
	for _, tt := range []struct {
		status int
		after  []time.Duration
	}{
		{500, []time.Duration{5 * time.Second, 15 * time.Second, 45 * time.Second}},
		{502, []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second}},
		{429, []time.Duration{5 * time.Second, 10 * time.Second, 20 * time.Second}},
		{401, []time.Duration{5 * time.Second, 10 * time.Second, 20 * time.Second, 40 * time.Second}},
		{403, []time.Duration{time.Minute, 3 * time.Minute, 9 * time.Minute, 10 * time.Minute, 10 * time.Minute}},
		{404, []time.Duration{5 * time.Minute, 10 * time.Minute, 10 * time.Minute}},
		{302, []time.Duration{5 * time.Minute, 10 * time.Minute, 10 * time.Minute}},
	} {
		r := newOutboxRig(t, nil)
		r.take("h.test", kPDU, kPDU)
		s := r.packs()
		id := of[Pack](r.all)[0].TxnID
		r.step(Connected{s.Op})
		for i, want := range tt.after {
			r.ends(s, tt.status)
			r.one("nothing is noted", len(of[Settle](r.last)) == 0)
			q := r.status("h.test")
			if !strings.Contains(q.LastError, fmt.Sprint(tt.status)) || int(q.Failures) != i+1 {
				t.Errorf("%d: the last error is %q, %d in a row", tt.status, q.LastError, q.Failures)
			}
			if c := of[Send](r.last); len(c) == 1 && c[0].Control != "" {
				r.ends(c[0], 200) // so that the next is the batch, in its time
			}
			if got := r.passTo(24 * time.Hour); !nearly(got, want) {
				t.Errorf("%d for the %d. time: tried again after %s, want about %s", tt.status, i+1, got, want)
			}
			s = r.packs()
			r.m.outbox.queues["h.test"].trial = trialNone // what is divided is another test
		}
		r.ends(s, 200)
		r.one("it keeps its id", r.settles().TxnID == id)
		r.one("all is well again", len(r.m.outbox.queues) == 0 && r.m.hosts["h.test"].former == nil)
	}
}

func TestRateLimitOfADelivery(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	s := r.packs()
	for range 30 { // it never counts as a failure, nor as a refusal, if it says for how long
		r.step(Answered{Op: s.Op, Status: 429, RetryAfter: 7 * time.Second})
		r.step(Done{Op: s.Op, Size: 2, Sent: true})
		r.one("nothing is noted", len(of[Settle](r.last)) == 0)
		if got := r.passTo(time.Hour); got != 7*time.Second {
			t.Fatalf("tried again after %s, 7s were asked for", got)
		}
		s = r.packs()
	}
	if q := r.status("h.test"); q.Failures != 0 {
		t.Errorf("%d failures are counted", q.Failures)
	}
}

func TestBackOffWithoutAnAnswer(t *testing.T) {
	for _, tt := range []struct {
		what string
		fail matrix.Failure
		want []time.Duration
	}{
		{"a broken connection", matrix.FailReset, []time.Duration{5 * time.Second, 10 * time.Second}},
		{"an answer that is cut short", matrix.FailCut, []time.Duration{5 * time.Second, 10 * time.Second}},
		{"our own fault", matrix.FailLocal, []time.Duration{5 * time.Second, 10 * time.Second}},
		{"no Matrix server", matrix.FailContent, []time.Duration{5 * time.Minute, 10 * time.Minute}},
	} {
		r := newOutboxRig(t, nil)
		r.works("h.test")
		r.take("h.test", kPDU)
		s := r.packs()
		for i, want := range tt.want {
			r.step(Connected{s.Op})
			if tt.fail == matrix.FailCut || tt.fail == matrix.FailContent {
				r.step(Answered{Op: s.Op, Status: 200})
			}
			r.breaks(s, tt.fail, true)
			r.one("it stays as it is", len(of[Settle](r.last)) == 0)
			if got := r.passTo(time.Hour); !nearly(got, want) {
				t.Errorf("%s: tried again after %s, want about %s", tt.what, got, want)
			}
			r.commits()
			if len(of[Pack](r.last)) == 0 {
				r.last = latest[Pack](r.all)
			}
			s = r.packs()
			if i == 0 && r.m.outbox.stats.Retried != 1 {
				t.Errorf("%s: %d retried", tt.what, r.m.outbox.stats.Retried)
			}
		}
	}
}

// latest returns the last effect of one kind.
func latest[E Effect](effects []Effect) []Effect {
	found := of[E](effects)
	return []Effect{found[len(found)-1]}
}

// A remote that takes the transaction and says nothing holds a worker for a
// minute, no longer.
func TestDeliveryIsGivenUpAfterAMinute(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	r.pass(time.Second)
	s := r.packs()
	r.step(Connected{s.Op})
	r.pass(r.m.cfg.ClientTimeout - time.Millisecond)
	r.one("not before", len(of[Cancel](r.all)) == 0)
	r.pass(time.Millisecond)
	r.one("it is cut short", len(of[Cancel](r.all)) == 1)
	r.breaks(s, matrix.FailCancelled, true)
	q := r.status("h.test")
	r.one("that is a time-out", q.State == "backing off" && strings.Contains(q.LastError, "timed out"))
	r.one("it may have arrived, so it stays as it is", len(of[Settle](r.last)) == 0)
	r.one("it is tried again soon", nearly(r.passTo(time.Hour), 5*time.Second))
}

func TestDeadHostOfADelivery(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	s := r.packs()
	lookup := r.profile("h.test", 1)
	r.one("a lookup waits for the pre-flight", len(of[Send](r.last)) == 0)
	r.breaks(s, matrix.FailRefused, false)
	e := only[Refuse](r, "it is refused with what is known")
	r.one("at once", e.Req == lookup && e.Status == 502 && strings.Contains(e.Text, "connection refused"))
	thaw := r.settles()
	r.one("what was packed is taken apart", thaw.Outcome == Thaw && r.m.outbox.stats.Thawed == 1)
	r.commits()
	q := r.status("h.test")
	r.one("the host's back-off holds", q.State == "backing off" && q.NextTry == r.m.hosts["h.test"].NextTry)
	r.take("h.test", kPDU)
	r.one("for what comes meanwhile, too", len(of[Pack](r.last)) == 0)
	if got := r.passTo(time.Minute); !nearly(got, 5*time.Second) || len(of[Commit](r.last)) != 1 {
		t.Errorf("tried again after %s: %+v", got, r.last)
	}
	r.one("the intent is on disk before it is packed", len(of[Pack](r.last)) == 0)
	r.commits()
	p := only[Pack](r, "want one Pack")
	r.one("under a new id", p.TxnID != thaw.TxnID)
	s = r.packs()
	r.step(Connected{s.Op})
	r.ends(s, 200)
	r.settles()
	if s := r.m.outbox.stats; s.ItemsOut[kPDU] != 2 || s.Retried != 0 {
		t.Errorf("%d items delivered, %d retried; want 2 and 0", s.ItemsOut[kPDU], s.Retried)
	}
}

// A delivery that waits behind a lookup finds the host dead, and waits with it.
func TestLookupFindsTheHostOfADeliveryDead(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.profile("h.test", 1)
	op := r.sent().Op
	r.take("h.test", kPDU)
	r.one("it waits for the pre-flight", len(of[Pack](r.last)) == 0 && r.status("h.test").State == "queued")
	r.step(Done{Op: op, Failure: matrix.FailRefused})
	r.one("then for its time", r.status("h.test").State == "backing off" && r.m.outbox.active.Used == 0)
}

func TestSuccessOfALookupWakesTheQueue(t *testing.T) {
	r := newOutboxRig(t, nil)
	const join = "/_matrix/federation/v1/make_join/r/u?ver=10"
	r.take("h.test", kPDU)
	r.breaks(r.packs(), matrix.FailNoName, false)
	r.settles()
	r.commits()
	r.pass(40 * time.Second)
	r.get("h.test", "GET", join)
	r.commits()
	op := r.sent().Op
	r.one("it waits", len(of[Pack](r.all)) == 1)
	r.step(Connected{op})
	r.one("until somebody gets through", len(of[Pack](r.all)) == 2)
}

func TestRestoredQueueBeginsWhenItsHostIsHeardOf(t *testing.T) {
	r := newOutboxRig(t, nil)
	b := Backlog{Oldest: r.now}
	b.Items[kPDU] = 1
	var records []QueueRecord
	for i := range 2000 {
		records = append(records, QueueRecord{matrix.ServerName(fmt.Sprintf("h%d.test", i)), b})
	}
	r.step(Restored{Queues: records})
	late := matrix.ServerName("")
	for _, q := range r.m.outbox.inOrder() {
		if q.notBefore.Sub(r.now) > 20*time.Second {
			late = q.name
		}
	}
	r.profile(late, 1)
	r.step(Connected{r.sent().Op})
	r.one("it need not wait for its place", only[Pack](r, "want one Pack").Dest == late)
}

// A host that takes long to connect while others wait for its worker is put off;
// nothing was sent, so nothing is tried under the same id.
func TestDeliveryThatDoesNotConnectMakesRoom(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 16, 8, 2 })
	for i := range 20 {
		r.take(matrix.ServerName(fmt.Sprintf("h%d.test", i)), kPDU)
	}
	var first Send
	for n, p := range of[Pack](r.all) {
		r.last = []Effect{p}
		if s := r.packs(); n == 0 {
			first = s
		}
	}
	r.pass(patience)
	r.one("it is cancelled", len(of[Cancel](r.all)) > 0 && of[Cancel](r.all)[0].Op == first.Op)
	r.breaks(first, matrix.FailCancelled, false)
	r.one("its host is not blamed", r.m.hosts[first.Dest].Failures == 0)
	r.one("another has its turn", len(of[Pack](r.last)) == 1)
	r.last = latest[Settle](r.all)
	r.one("it is taken apart", r.settles().Outcome == Thaw)
	p := only[Pack](r, "and has a second chance among the failing ones")
	r.one("the same", p.Dest == first.Dest)
	r.packs()
	r.pass(30 * time.Second)
	for _, c := range of[Cancel](r.all) {
		r.one("which is not cut short", c.Op != r.m.outbox.queues[first.Dest].call.op)
	}
}

func TestStoreThatFails(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	p := only[Pack](r, "want one Pack")
	r.step(Packed{Batch: p.Batch})
	r.one("nothing is sent, nor let go of", len(of[Send](r.last))+len(of[Unpack](r.last)) == 0)
	r.one("no worker is kept", r.m.workers.Used == 0)
	r.one("it is tried again soon", r.passTo(time.Minute) == storePause)
	s := r.packs()
	r.ends(s, 200)
	lost := only[Settle](r, "want one Settle")
	r.step(Settled{Batch: lost.Batch})
	r.take("h.test", kPDU)
	for range 3 {
		r.one("so is the outcome, and nothing is sent meanwhile", r.passTo(time.Minute) == storePause)
		again := only[Settle](r, "want one Settle")
		if again.TxnID != lost.TxnID || again.Outcome != Delivered {
			t.Errorf("again with the id %s, was %s", again.TxnID, lost.TxnID)
		}
		r.step(Settled{Batch: again.Batch})
	}
	r.passTo(time.Minute)
	r.settles()
	r.one("then what came meanwhile is sent", len(of[Pack](r.last)) == 1)
	if r.m.outbox.stats.Retried != 0 || r.m.stats.CommitsFailed != 5 {
		t.Errorf("retried %d, failed %d", r.m.outbox.stats.Retried, r.m.stats.CommitsFailed)
	}
}

// A bus that stops waits for no store: whether the transaction has arrived is found
// out after the start, by its id.
func TestStoreThatFailsAtTheEnd(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	r.ends(r.packs(), 200)
	r.step(Settled{Batch: only[Settle](r, "want one Settle").Batch})
	r.step(Draining{By: r.now.Add(time.Second)})
	r.commits()
	r.pass(time.Second)
	r.one("it is over", len(of[Drained](r.all)) == 1)
	r.pass(storePause)
	r.one("nothing more is written", len(of[Settle](r.all)) == 1)
}

// A store whose counts are wrong has something pending and nothing to send.
func TestStoreThatMiscounts(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	for range 3 {
		r.step(Packed{Batch: only[Pack](r, "want one Pack").Batch, OK: true, Backlog: *r.backlog("h.test")})
		r.one("it is asked again after a pause", len(of[Pack](r.last)) == 0 && r.passTo(time.Minute) == storePause)
	}
}

// A clock that stood right when a server failed, and is behind after a start, makes
// no day of the seconds for which it was to be left alone.
func TestBackOffOutlivesAClockThatGoesBack(t *testing.T) {
	failed := sched.FromStored(1_800_000_000_000)
	for _, now := range []sched.Time{sched.FromStored(60_000), failed.Add(-30 * time.Minute), failed.Add(time.Second)} {
		r := newOutboxRig(t, nil)
		r.now = now
		b := Backlog{Oldest: now}
		b.Items[kPDU] = 1
		r.pending["h.test"] = &b
		r.step(Restored{
			Hosts:  []HostRecord{{Name: "h.test", Failures: 1, LastFailure: matrix.FailRefused, FirstFailure: failed, LastTry: failed, NextTry: failed.Add(time.Minute)}},
			Queues: []QueueRecord{{Name: "h.test", Backlog: b}},
		})
		if d := r.passTo(time.Hour); d < 50*time.Second || d > 70*time.Second {
			t.Errorf("at %s it is tried after %s", now.Std(), d)
		}
	}
}

func TestNothingLeftToSend(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPresence)
	r.passTo(time.Minute)
	p := only[Pack](r, "want one Pack")
	r.step(Packed{Batch: p.Batch, OK: true, Expired: [matrix.NumKinds + 1]int32{kPresence: 1}})
	r.one("nothing is sent, nor let go of", len(of[Send](r.last))+len(of[Unpack](r.last)) == 0)
	r.one("the place and the worker are given back", r.m.outbox.active.Used == 0 && r.m.workers.Used == 0 && len(r.m.outbox.queues) == 0)
	r.one("it is counted", r.m.outbox.stats.Expired[kPresence] == 1)
}

func TestAfterAnHourOnlyTheNewestStays(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU, kPDU, kPDU)
	r.breaks(r.packs(), matrix.FailRefused, false)
	r.settles()
	r.commits()
	start := r.now
	compacts := func() []Compact { return of[Compact](r.all) }
	for len(compacts()) == 0 && r.now.Sub(start) < 5*time.Hour {
		r.passTo(time.Hour)
		r.commits()
		if len(of[Pack](r.last)) == 1 {
			r.breaks(r.packs(), matrix.FailRefused, false)
			r.settles()
		}
	}
	if d := r.now.Sub(start); len(compacts()) != 1 || d < time.Hour {
		t.Fatalf("%d after %s", len(compacts()), d)
	}
	r.take("h.test", kPDU)
	r.one("meanwhile nothing is packed", len(of[Pack](r.last)) == 0)
	b := r.backlog("h.test")
	b.Items[kPDU] = 2
	r.step(Trimmed{Batch: compacts()[0].Batch, OK: true, Superseded: 1, Changed: []QueueRecord{{"h.test", *b}}, Next: 1})
	more := only[Compact](r, "there is more to do")
	b.Items[kPDU] = 1
	r.step(Trimmed{Batch: more.Batch, OK: true, Superseded: 2, Changed: []QueueRecord{{"h.test", *b}}})
	r.one("that is all", len(of[Compact](r.last)) == 0 && r.m.outbox.stats.Superseded == 3)
	q := r.status("h.test")
	r.one("one is left, and waits for the host", q.Total() == 1 && q.State == "backing off")
	b.Items[kPDU] = 5
	r.step(Adjusted{Dest: "h.test", Backlog: *b})
	r.step(Flush{"h.test"})
	r.commits()
	r.breaks(r.packs(), matrix.FailRefused, false)
	r.settles()
	r.one("it is not done again within ten minutes", len(of[Compact](r.last)) == 0)
}

// What a working destination has yet to get is not given up, however old.
func TestNothingIsSupersededWhileItWorks(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.most = 1
	b := r.backlog("h.test")
	b.Items[kPDU], b.Oldest = 5, r.now.Add(-5*time.Hour)
	r.step(Restored{Queues: []QueueRecord{{"h.test", *b}}})
	for range 5 {
		if len(of[Pack](r.last)) == 0 {
			r.passTo(time.Minute)
		}
		r.ends(r.packs(), 200)
		r.settles()
	}
	r.one("all are sent", len(of[Compact](r.all)) == 0 && r.m.outbox.stats.ItemsOut[kPDU] == 5)
}

// A destination that is full and cannot be reached makes room by itself.
func TestFullAndFailingIsCompacted(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU, kPDU)
	r.breaks(r.packs(), matrix.FailNoName, false)
	r.settles()
	r.commits()
	r.step(Suspended{"so that nothing is tried"})
	r.pass(2 * time.Hour)
	r.one("nothing was tried", len(of[Compact](r.all)) == 0)
	req := r.offer("h.test")
	r.step(Accepted{Req: req, Fault: AcceptedFull})
	r.one("it is compacted", len(of[Compact](r.last)) == 1)
}

func TestEventsThatARemoteRefusesAreCounted(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU, kPDU)
	s := r.packs()
	r.step(Answered{Op: s.Op, Status: 200})
	r.step(Done{Op: s.Op, Size: 100, Sent: true, PDUErrors: 1})
	r.one("it is delivered all the same", r.settles().Outcome == Delivered)
	r.one("they are counted", r.m.outbox.stats.PDUErrors == 1)
}

// A destination that a lookup found to limit our rate is left alone, and takes
// no place meanwhile.
func TestDeliveryWaitsWhileItsHostLimitsOurRate(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.works("h.test")
	r.get("h.test", "POST", "/_matrix/federation/v1/user/keys/claim")
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 429, RetryAfter: time.Minute})
	r.step(Done{Op: op, Kept: true})
	r.take("h.test", kPDU)
	s := r.status("h.test")
	r.one("it waits", s.State == "backing off" && s.NextTry == r.now.Add(time.Minute) && strings.Contains(s.Why, "limits our rate"))
	r.one("without a place", r.m.outbox.active.Used == 0)
	r.one("for as long as was asked", r.passTo(time.Hour) == time.Minute && len(of[Pack](r.last)) == 1)
}

// Once its back-off is over, what comes waits for company as with any other.
func TestWindowOfADestinationThatHasFailed(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	r.ends(r.packs(), 500)
	delete(r.frozen, "h.test")
	*r.backlog("h.test") = Backlog{}
	r.step(Adjusted{Dest: "h.test"})
	r.pass(time.Hour)
	r.take("h.test", kPresence)
	r.one("presence waits", len(of[Pack](r.last)) == 0 && r.passTo(time.Hour) == r.m.cfg.Outbox.PresenceWindow)
}

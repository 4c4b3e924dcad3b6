package bus

import (
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
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
	r.passTo(time.Minute)
	r.ends(r.packs(), 500)
	r.take("h.test", kPDU, kPDU)
	delete(r.frozen, "h.test") // an admin drops the first
	*r.backlog("h.test") = Backlog{Oldest: r.now}
	r.backlog("h.test").Items[kPDU] = 2
	r.step(Adjusted{Dest: "h.test", Backlog: *r.backlog("h.test")})
	for _, what := range []string{"once", "twice"} {
		r.passTo(time.Hour)
		r.ends(r.packs(), 500)
		r.one("the next one is not divided when it is refused "+what, len(of[Settle](r.last)) == 0)
	}
	r.passTo(time.Hour)
	r.ends(r.packs(), 500)
	r.one("but three times", only[Settle](r, "want a Settle").Outcome == Bisect)
}

// Who does not want us is not asked at once because what it did not want has
// expired meanwhile.
func TestBackOffOutlivesWhatExpires(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.PresenceWindow = 0 })
	r.take("h.test", kPresence)
	for _, want := range []time.Duration{time.Minute, 3 * time.Minute, 9 * time.Minute} {
		r.ends(r.packs(), 401)
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

// refuses has what is packed for a destination refused until it is to be
// divided, or for so many times at most. It returns how often it was refused, and
// what the store is to note, if anything.
func (r *outboxRig) refuses(status, most int) (times int, s *Settle) {
	r.t.Helper()
	for times < most {
		for _, e := range of[Compact](r.last) {
			r.step(Trimmed{Batch: e.Batch, OK: true})
		}
		if len(of[Pack](r.last)) == 0 {
			r.passTo(24 * time.Hour)
		}
		for len(of[Commit](r.last)) > 0 && len(of[Pack](r.last)) == 0 {
			r.commits()
		}
		r.ends(r.packs(), status)
		times++
		if found := of[Settle](r.last); len(found) == 1 {
			return times, &found[0]
		}
	}
	return times, nil
}

// A server whose database is away for a while answers 500 to everything. That
// must not cost it what is sent meanwhile.
func TestItemAloneIsNotSetAsideBecauseOfAnOutage(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	start := r.now
	times, s := r.refuses(500, 100)
	r.one("it is set aside at last", s != nil && s.Outcome == Bisect && strings.Contains(s.Reason, "h.test answered 500 to it"))
	if d := r.now.Sub(start); times != refusalsAlone || d < time.Hour || d > 3*time.Hour {
		t.Errorf("it is set aside after %d refusals and %s, want %d and more than an hour", times, d, refusalsAlone)
	}
	r.settles()
	r.one("it is counted", r.m.outbox.stats.SetAside == 1)

	r.take("h.test", kPDU)
	start = r.now
	times, s = r.refuses(500, 100)
	if d := r.now.Sub(start); s == nil || times != refusalsWhenNothingWorks || d < 12*time.Hour {
		t.Errorf("the next is set aside after %d refusals and %s, want %d and most of a day", times, d, refusalsWhenNothingWorks)
	}
}

// What a server takes shows that the rest is refused for what it is.
func TestRefusedItemIsFoundQuicklyAmongOthers(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU, kPDU, kPDU, kPDU)
	start := r.now
	for _, what := range []string{"all", "the first half", "the first"} { // the first stands alone then
		times, s := r.refuses(500, 100)
		if what == "the first" {
			r.one("nothing was taken, so the first has time", times == refusalsAlone)
		} else {
			r.one(what+" is divided after three refusals", s != nil && times == refusalsToBisect)
		}
		r.settles()
	}
	if d := r.now.Sub(start); d > 3*time.Hour {
		t.Errorf("the first is found after %s, want a few hours", d)
	}
	r.refuses(200, 1)
	r.settles() // the second was taken
	times, s := r.refuses(500, 100)
	r.one("the second half is divided after three", s != nil && times == refusalsToBisect)
	r.settles()
	r.refuses(200, 1)
	r.settles()
	start = r.now
	times, _ = r.refuses(500, 100)
	r.settles()
	if d := r.now.Sub(start); times != refusalsToBisect || d > time.Minute {
		t.Errorf("the last is set aside after %d refusals and %s, want %d and seconds", times, d, refusalsToBisect)
	}
	if s := r.m.outbox.stats; s.SetAside != 2 || s.ItemsOut[kPDU] != 2 || s.Bisected != 5 {
		t.Errorf("set aside %d, delivered %d, divided %d; want 2, 2, 5", s.SetAside, s.ItemsOut[kPDU], s.Bisected)
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
		{"a broken connection", func(r *outboxRig, s Send) { r.breaks(s, matrix.FailReset, true) }, true},
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
		if again := len(of[Pack](r.all)); !tt.lifts && (r.passTo(time.Hour) == time.Hour || len(of[Pack](r.all)) == again) {
			t.Errorf("%s: never tried again", tt.what)
		}
	}
}

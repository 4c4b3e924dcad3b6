package bus

import (
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

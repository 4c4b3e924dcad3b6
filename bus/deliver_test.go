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
	r.take("h.test", kPDU)
	delete(r.frozen, "h.test") // an admin drops the first
	*r.backlog("h.test") = Backlog{Oldest: r.now}
	r.backlog("h.test").Items[kPDU] = 1
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

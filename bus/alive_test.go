package bus

import (
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// away makes a host one that has failed n times, the last time just now.
func (r *outboxRig) away(n int) {
	r.t.Helper()
	r.take("h.test", kPDU)
	for i := range n {
		if i > 0 {
			r.passTo(48 * time.Hour)
			r.commits()
			if len(of[Pack](r.last)) == 0 {
				r.last = latest[Pack](r.all)
			}
		}
		r.breaks(r.packs(), matrix.FailRefused, false)
		r.settles()
		r.commits()
		r.all = nil
	}
}

func TestASignOfLifeEarnsOneTry(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.away(6)
	h := r.m.hosts["h.test"]
	wait := h.NextTry.Sub(r.now)
	r.one("it is to be left alone for long", wait > 5*time.Minute)
	r.step(Alive{"h.test"})
	r.one("right after a try nothing is gained", len(of[Pack](r.last))+len(of[Commit](r.last)) == 0)
	r.pass(min(wait/aliveShare+time.Second, aliveMost))
	r.step(Alive{"h.test"})
	r.commits()
	s := r.packs()
	r.one("what is pending is tried", s.Dest == "h.test" && r.m.stats.Revived == 1)
	r.breaks(s, matrix.FailRefused, false)
	r.settles()
	r.commits()
	r.step(Alive{"h.test"})
	r.one("once", len(of[Pack](r.last))+len(of[Commit](r.last)) == 0)
	r.one("and its back-off goes on", h.NextTry.Sub(r.now) > 5*time.Minute)
}

func TestASignOfLifeSaysNothingAboutARefusal(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	r.ends(r.packs(), 403)
	r.all = nil
	r.pass(time.Minute)
	r.step(Alive{"h.test"})
	r.one("it is left alone as before", len(of[Pack](r.all)) == 0)
}

func TestASignOfLifeKeepsToAWindow(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPresence)
	r.all = nil
	r.step(Alive{"h.test"})
	r.one("what waits for company goes on waiting", len(of[Pack](r.all)) == 0)
	r.step(Alive{"unknown.test"})
	r.one("who is not known stays so", r.m.hosts["unknown.test"] == nil)
}

// A server behind a gateway that fails sends something itself: what is pending for it is
// tried, but not each time, as that it sends does not say that it takes anything.
func TestSignsOfLifeDoNotEndABackOffEachTime(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	attempts := 0
	for end := r.now.Add(10 * time.Minute); r.now < end; {
		if len(of[Pack](r.last)) == 1 || r.control() {
			attempts++
			r.ends(r.due(), 502)
			continue
		}
		if r.passTo(5*time.Second) == 5*time.Second {
			r.step(Alive{"h.test"})
		}
	}
	if attempts < 5 || attempts > 12 { // 10 s, 20 s, 40 s ... with a control now and then, and one for a sign of life
		t.Errorf("%d attempts in ten minutes, want as many as by its own back-off and one", attempts)
	}
}

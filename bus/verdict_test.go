package bus

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// due brings the time of the next attempt, and returns what is sent then: a batch, or
// the control.
func (r *outboxRig) due() Send {
	r.t.Helper()
	for range 10 {
		switch {
		case r.control():
			return r.sent()
		case len(of[Pack](r.last)) == 1:
			return r.packs()
		case len(of[Compact](r.last)) == 1:
			e := of[Compact](r.last)[0]
			r.step(Trimmed{Batch: e.Batch, OK: true, Changed: []QueueRecord{{e.Dest, *r.backlog(e.Dest)}}})
		case len(r.m.commits) > 0:
			r.commits()
		default:
			r.passTo(24 * time.Hour)
		}
	}
	r.t.Fatalf("nothing is sent; the last step gave %v", r.last)
	return Send{}
}

// dislikes has a destination answer status to the batches that are refused, and 200 to
// what else comes, until something is to be noted. It returns how many batches were
// refused and how many controls were sent before.
func (r *outboxRig) dislikes(status int) (refused, controls int, s Settle) {
	r.t.Helper()
	for range 100 {
		switch e := r.due(); {
		case e.Control != "":
			controls++
			r.ends(e, 200)
		default:
			refused++
			r.ends(e, status)
		}
		if found := of[Settle](r.last); len(found) == 1 {
			return refused, controls, found[0]
		}
	}
	r.t.Fatal("nothing is noted after a hundred attempts")
	return
}

// What a server refuses again and again, though it takes an empty transaction before
// and after, is divided until the item that it dislikes stands alone.
func TestADislikedItemIsFound(t *testing.T) {
	for _, status := range []int{400, 403, 413, 500, 520} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			r := newOutboxRig(t, nil)
			r.take("h.test", kPDU, kPDU, kPDU, kPDU)
			want := 3
			if gateway(status) {
				want = 4
			}
			start := r.now
			for _, what := range []string{"all", "the first half", "the first"} {
				refused, controls, s := r.dislikes(status)
				if s.Outcome != Bisect || refused != want || controls != 2 {
					t.Fatalf("%s: %d refused, %d controls, then %v; want %d, 2 and bisect", what, refused, controls, s.Outcome, want)
				}
				r.settles()
			}
			if s := r.m.outbox.stats; s.SetAside != 1 || s.Bisected != 3 || s.Controls != 6 {
				t.Errorf("set aside %d, divided %d, controls %d; want 1, 3, 6", s.SetAside, s.Bisected, s.Controls)
			}
			for range 2 {
				r.ends(r.due(), 200)
				r.settles()
			}
			r.one("all else is there", len(r.m.outbox.queues) == 0)
			if d := r.now.Sub(start); d > time.Hour {
				t.Errorf("it took %s", d)
			}
		})
	}
}

// The same for a destination that breaks the connection, says nothing, or answers
// something that is not Matrix.
func TestADislikedItemIsFoundWithoutAnAnswer(t *testing.T) {
	for _, f := range []matrix.Failure{matrix.FailReset, matrix.FailTimeout, matrix.FailContent, matrix.FailCut, matrix.FailProtocol} {
		t.Run(f.String(), func(t *testing.T) {
			r := newOutboxRig(t, nil)
			r.take("h.test", kPDU, kPDU)
			attempts := 0
			for len(of[Settle](r.last)) == 0 {
				e := r.due()
				if e.Control != "" {
					r.ends(e, 200)
					continue
				}
				r.step(Connected{e.Op})
				if f == matrix.FailContent || f == matrix.FailCut {
					r.step(Answered{Op: e.Op, Status: 200})
				}
				r.breaks(e, f, true)
				if attempts++; attempts > 10 {
					t.Fatal("it is never divided")
				}
			}
			s := r.settles()
			if s.Outcome != Bisect || attempts != 4 {
				t.Errorf("after %d attempts: %s; want 4, and that it is divided", attempts, s.Outcome)
			}
		})
	}
}

// A server that refuses the control, too, is ill. Nothing is divided or set aside,
// however long that is, and it is found out with the control whether it is well.
func TestAnOutageIsNoFaultOfAnItem(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kToDevice)
	batches, controls := 0, 0
	start := r.now
	for r.now.Sub(start) < 3*time.Hour {
		e := r.due()
		if e.Control != "" {
			controls++
		} else {
			batches++
		}
		r.ends(e, 500)
		r.one("nothing is noted", len(of[Settle](r.last)) == 0)
	}
	if controls < 2*batches || batches < 3 {
		t.Errorf("%d controls, %d batches: want the control most of the time, and the batch now and then", controls, batches)
	}
	q := r.status("h.test")
	if wait := q.NextTry.Sub(r.now); wait > 12*time.Minute {
		t.Errorf("the next try is in %s, want a few minutes", wait)
	}
	r.one("it says so", strings.Contains(q.Why, "an empty transaction"))
	e := r.due()
	for e.Control == "" { // one of the few with the batch
		r.ends(e, 500)
		e = r.due()
	}
	r.ends(e, 200)
	r.one("the batch follows at once", len(of[Pack](r.last)) == 1)
	r.ends(r.due(), 200)
	r.one("and is delivered", r.settles().Outcome == Delivered && r.m.outbox.stats.SetAside == 0)
}

// A server that comes back between the refusal of a batch and the control would have its
// items set aside for nothing, so the batch goes once more.
func TestAServerThatComesBackMeanwhile(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	for range 2 {
		r.ends(r.due(), 500)
	}
	e := r.due()
	r.one("the control goes", e.Control != "")
	r.ends(e, 200)
	r.one("nothing is noted yet", len(of[Settle](r.last)) == 0)
	r.ends(r.due(), 200)
	r.one("the batch is taken", r.settles().Outcome == Delivered)
}

// A server may take what is empty and be ill nevertheless: after one item is set aside
// and nothing was taken, the next has time.
func TestOneAfterTheOtherIsNotSetAside(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU, kPDU, kPDU, kPDU)
	for range 3 {
		r.dislikes(500)
		r.settles()
	}
	r.one("the first is set aside", r.m.outbox.stats.SetAside == 1)
	start := r.now
	r.dislikes(500)
	r.settles()
	if d := r.now.Sub(start); d < barrenFor || d > 2*barrenFor {
		t.Errorf("the next is set aside after %s, want %s", d, barrenFor)
	}
}

// What a transaction comes to says nothing about requests, and the other way round.
func TestBackOffBelongsToItsKind(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.works("h.test")
	r.take("h.test", kPDU)
	sends, start := 0, r.now
	for r.now.Sub(start) < 40*time.Second {
		if len(of[Pack](r.last)) == 1 {
			e := r.packs()
			r.breaks(e, matrix.FailReset, true)
			sends++
			r.step(Tick{})
		}
		r.profile("h.test", sends*1000+int(r.now.Sub(start)/time.Millisecond))
		if found := of[Send](r.last); len(found) == 1 && found[0].Batch == 0 && found[0].Control == "" {
			r.step(Connected{found[0].Op})
			r.answer(found[0].Op, 200)
		}
		r.pass(200 * time.Millisecond)
		if found := of[Send](r.last); len(found) == 1 && found[0].Control != "" {
			r.breaks(found[0], matrix.FailReset, true)
		}
	}
	if sends < 2 || sends > 4 {
		t.Errorf("the transaction was sent %d times in 40 s, want 2 to 4 by its own back-off", sends)
	}
	r.one("requests are not refused for it", r.m.stats.FailedFast == 0)
}

// A host that is reached and answers no request gets none for a while; what the outbox
// has for it is tried all the same, and its success does not let requests in again.
func TestAHostThatAnswersNoRequests(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.works("h.test")
	for i := range softFailures {
		r.pass(time.Second) // its rate
		r.profile("h.test", 100+i)
		op := r.sent().Op
		r.step(Connected{op})
		r.step(Done{Op: op, Failure: matrix.FailTimeout})
	}
	r.profile("h.test", 200)
	e := of[Refuse](r.last)
	r.one("a request is refused", len(e) == 1 && e[0].Status == 502 && strings.Contains(e[0].Text, "did not answer 3 requests"))
	r.take("h.test", kPDU)
	r.ends(r.packs(), 200)
	r.settles()
	r.profile("h.test", 201)
	r.one("also after a transaction was taken", len(of[Refuse](r.last)) == 1)
	r.pass(15 * time.Second)
	r.profile("h.test", 202)
	r.one("it is asked again after a while", len(of[Send](r.last)) == 1)
	r.answer(r.sent().Op, 200)
	r.one("and all is well", r.m.hosts["h.test"].quiet == 0)
}

// A user's message, or a query for keys, is one attempt ahead of the host's time: soon,
// but not again and again.
func TestAUserMayTryADeadHost(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.away(9)
	h := r.m.hosts["h.test"]
	r.one("it is to be left alone", h.NextTry.Sub(r.now) > 5*time.Minute)
	r.pass(time.Second)
	r.take("h.test", kPDU)
	if got := r.passTo(time.Hour); got > spendAfter {
		t.Errorf("it is tried %s after a message, want %s at most", got, spendAfter)
	}
	r.commits()
	r.breaks(r.packs(), matrix.FailRefused, false)
	r.settles()
	r.commits()
	for range 10 {
		r.pass(11 * time.Second)
		r.take("h.test", kPDU)
		r.get("h.test", "POST", "/_matrix/federation/v1/user/keys/query")
		r.one("not for each", len(of[Commit](r.last))+len(of[Pack](r.last)) == 0)
	}
	r.pass(spendEach)
	r.all = nil
	r.get("h.test", "POST", "/_matrix/federation/v1/user/keys/query")
	r.one("but again after a while", len(of[Commit](r.all)) == 1)
}

// A message to a large room is one to many dead servers: they are not all tried at once.
func TestUsersTryFewDeadHostsAtOnce(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.MaxQueues = 200 })
	var hosts []HostRecord
	for i := range 100 {
		hosts = append(hosts, HostRecord{Name: matrix.ServerName(fmt.Sprintf("h%d.test", i)), Failures: 9, LastFailure: matrix.FailRefused,
			FirstFailure: r.now.Add(-20 * time.Hour), LastTry: r.now.Add(-30 * time.Minute), NextTry: r.now.Add(30 * time.Minute)})
	}
	r.step(Restored{Hosts: hosts})
	for _, h := range hosts {
		r.take(h.Name, kPDU)
	}
	if got := r.m.stats.Spent; got < spendBurst || got > spendBurst+5 {
		t.Errorf("%d hosts are tried ahead of their time, want %d", got, spendBurst)
	}
}

func TestPauseEndsSoonAfterAnOutage(t *testing.T) {
	r := newOutboxRig(t, nil)
	for _, b := range backoffs {
		for _, away := range []time.Duration{0, time.Hour, 3 * time.Hour, 10 * time.Hour, 1000 * time.Hour} {
			most := max(10*time.Minute, min(away/16, time.Hour))
			if d := r.m.pause(b, 50, r.now.Add(-away), true); d > most {
				t.Errorf("after %s the pause is %s, want %s at most", away, d, most)
			}
			if d := r.m.pause(b, 50, r.now.Add(-away), false); d > time.Hour {
				t.Errorf("after %s the pause is %s, want an hour at most", away, d)
			}
		}
	}
}

package bus

import (
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// hand has the store take over what was handed over for a destination.
func (r *outboxRig) hand(dest matrix.ServerName, kinds ...matrix.Kind) {
	r.t.Helper()
	b := r.backlog(dest)
	ev := HandedOver{Dest: dest}
	for _, k := range kinds {
		ev.Kinds[k]++
		b.Items[k]++
		b.Bytes += 100
	}
	if b.Oldest == 0 {
		b.Oldest = r.now
	}
	ev.Backlog = *b
	r.step(ev)
}

// What is handed over is sent like what came as a transaction: events at once, the others
// in their windows.
func TestHandedOverIsDelivered(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.hand("a.test", matrix.KindPDU, matrix.KindPDU)
	s := r.packs()
	r.one("it goes to its destination", s.Dest == "a.test")
	r.hand("b.test", matrix.KindReceipt)
	r.one("a receipt waits for company", len(of[Pack](r.last)) == 0)
	r.hand("b.test", matrix.KindPDU)
	r.one("and goes with an event", len(of[Pack](r.last)) == 1 && of[Pack](r.last)[0].Dest == "b.test")
	if in := r.m.outbox.stats.ItemsIn; in[matrix.KindPDU] != 3 || in[matrix.KindReceipt] != 1 {
		t.Errorf("%v", in)
	}
}

// While the homeserver hands over, answers to its transactions are not held; a while after
// the last hand-over they are again.
func TestAnswersAreNotHeldWhileItHandsOver(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.Pace.Ack = 1 })
	held := func() bool {
		t.Helper()
		for range 3 { // more than are answered at once
			r.take("a.test", matrix.KindDeviceList)
		}
		return r.m.outbox.pacer.Status(r.now).Held > 0
	}
	if !held() {
		t.Fatal("nothing is held without a hand-over")
	}
	r.pass(time.Minute)
	r.step(HandedOver{}) // the module has asked
	if held() {
		t.Error("an answer is held, and the homeserver hands over")
	}
	r.pass(handoverFor)
	if !held() {
		t.Error("nothing is held, and nothing has been handed over for long")
	}
}

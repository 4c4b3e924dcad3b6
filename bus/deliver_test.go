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

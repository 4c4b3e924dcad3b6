package bus

import (
	"testing"
	"time"
)

// Whoever did not accept our signature is tried soon after somebody has fetched the key.
func TestAFetchedKeyEndsTheWaitAfterA401(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	refuse := func(status int) {
		t.Helper()
		if len(of[Pack](r.last)) > 0 {
			r.ends(r.packs(), status)
		}
		for len(of[Send](r.last)) > 0 { // of the control
			r.ends(only[Send](r, "want one Send"), status)
		}
	}
	for range 8 {
		refuse(401)
		r.passTo(24 * time.Hour)
	}
	refuse(401)
	r.step(KeyServed{})
	if got := r.passTo(24 * time.Hour); got < time.Minute {
		t.Fatalf("tried %s after the last attempt, which is too soon for anybody to cause it", got)
	}
	refuse(401)
	r.pass(servedAfter + time.Second)
	r.step(KeyServed{})
	if got := r.passTo(24 * time.Hour); got > servedLater {
		t.Fatalf("tried %s after the key was fetched", got)
	}
	refuse(401)
	r.pass(servedAfter + time.Second)
	r.step(KeyServed{})
	if got := r.passTo(24 * time.Hour); got < servedEach-servedAfter-2*time.Second {
		t.Fatalf("fetching again and again has it tried after %s", got)
	}
	refuse(401)
	r.step(KeyChanged{})
	r.one("another key: it is tried at once", len(of[Send](r.last))+len(of[Pack](r.last)) == 1)
	refuse(500)
	n := len(of[Send](r.all)) + len(of[Pack](r.all))
	r.pass(servedAfter + time.Second)
	r.step(KeyServed{})
	r.step(KeyChanged{})
	r.one("a 500 is not about our key", len(of[Send](r.all))+len(of[Pack](r.all)) == n)
}

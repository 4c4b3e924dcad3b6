package sim

import (
	"net/http/httptest"
	"testing"
)

// A client that has read its whole answer may send the next request at once. It
// must not look as if it had two in flight.
func TestARequestIsOverBeforeItsAnswerIsWhole(t *testing.T) {
	for _, a := range []answer{
		{status: 200, body: []byte("{}")},
		{status: 200, head: []byte("head"), filler: 100_000, body: []byte("tail")},
	} {
		rec, written, ends := httptest.NewRecorder(), 0, 0
		a.write(t.Context(), rec, false, func() { written = rec.Body.Len(); ends++ })
		whole := len(a.head) + int(a.filler) + len(a.body)
		if rec.Body.Len() != whole || ends != 1 || written >= whole {
			t.Errorf("%d of %d bytes written, over %d times, last after %d bytes", rec.Body.Len(), whole, ends, written)
		}
	}
}

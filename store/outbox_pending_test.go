package store

import (
	"bytes"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

// pendingPDUs returns the texts of what PendingPDUs gives.
func pendingPDUs(t testing.TB, s *Store, dest matrix.ServerName, limit int) (list []string) {
	t.Helper()
	if err := s.PendingPDUs(dest, limit, func(pdu []byte) (bool, error) {
		list = append(list, string(pdu))
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestPendingPDUsAreThoseOfADestinationTheNewestFirst(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	want(t, "of nobody", pendingPDUs(t, s, "a.test", 10), []string(nil))
	var all []string // from the newest on
	long := strings.Repeat("x", 2*inlineBytes)
	for i := range 60 {
		text := pdu("!r", i, long[:i*8]) // some lie in their items, others do not
		all = append([]string{text}, all...)
		accept(t, s, "a.test", "", 1, items(t, []string{text}, []string{typing("!r", fmt.Sprintf("@u%d:hs1.test", i), true)}))
	}
	accept(t, s, "b.test", "", 1, pdus(t, pdu("!other", 1, "b"), pdu("!r", 59, long[:59*8])))
	accept(t, s, "c.test", "", 1, edus(t, toDevice("1", "x")))
	want(t, "frozen", pack(t, s, "a.test", "batch", 2).PDUs, 50) // which leaves the newest ten
	for range 2 {
		for _, limit := range []int{-1, 0, 1, 10, 11, 59, 60, 61, 1 << 30} {
			want(t, fmt.Sprint(limit, " at most"), pendingPDUs(t, s, "a.test", limit), append([]string(nil), all[:max(min(limit, len(all)), 0)]...))
		}
		want(t, "of another", pendingPDUs(t, s, "b.test", 10), []string{all[0], pdu("!other", 1, "b")})
		want(t, "without PDUs", pendingPDUs(t, s, "c.test", 10), []string(nil))
		closeStore(t, s)
		s = open(t, Options{Path: path})
	}
	settle(t, s, "a.test", "batch", Delivered)
	want(t, "when the batch is delivered", pendingPDUs(t, s, "a.test", 100), all[:10])
}

func TestPendingPDUsStopWhenTheyAreTold(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	accept(t, s, "a.test", "", 1, pdus(t, pdu("!r", 1, "1"), pdu("!r", 2, "2"), pdu("!r", 3, "3")))
	n := 0
	err := s.PendingPDUs("a.test", 9, func([]byte) (bool, error) { n++; return n < 2, nil })
	want(t, "enough", []any{n, err}, []any{2, nil})
	n = 0
	err = s.PendingPDUs("a.test", 9, func([]byte) (bool, error) { n++; return true, errInjected })
	want(t, "an error", []any{n, err}, []any{1, errInjected})
	r := s.lookups.open
	pendingPDUs(t, s, "a.test", 1)
	want(t, "the same reader", s.lookups.open, r)

	// A callback may use the store, and keep what it gets.
	var list [][]byte
	err = s.PendingPDUs("a.test", 9, func(pdu []byte) (bool, error) {
		want(t, "inside", len(pendingPDUs(t, s, "a.test", 1)), 1)
		list = append(list, pdu)
		accept(t, s, "a.test", "", 1, pdus(t, fmt.Sprintf(`{"depth":%d,"room_id":"!new"}`, len(list))))
		return true, nil
	})
	want(t, "kept", fmt.Sprintf("%s, %v", bytes.Join(list, []byte(" ")), err), pdu("!r", 3, "3")+" "+pdu("!r", 2, "2")+" "+pdu("!r", 1, "1")+", <nil>")
	err = s.PendingPDUs("a.test", 9, func([]byte) (bool, error) { closeStore(t, s); return true, nil })
	wantErr(t, "closed meanwhile", err, ErrClosed)
}

func TestAPendingPDUThatIsDamagedIsLeftOut(t *testing.T) {
	path := newPath(t)
	var log bytes.Buffer
	s := open(t, Options{Path: path, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	long := strings.Repeat("x", 2*inlineBytes)
	accept(t, s, "a.test", "", 1, pdus(t, pdu("!r", 1, "1"), pdu("!r", 2, long), pdu("!r", 3, "3")))
	if err := openRaw(t, path).exec(t.Context(), "DELETE FROM body"); err != nil {
		t.Fatal(err)
	}
	want(t, "the others", pendingPDUs(t, s, "a.test", 9), []string{pdu("!r", 3, "3"), pdu("!r", 1, "1")})
	want(t, "it counts", pendingPDUs(t, s, "a.test", 2), []string{pdu("!r", 3, "3")})
	want(t, "damaged", s.Stats().Damaged, int64(2))
	if !strings.Contains(log.String(), "left out") {
		t.Errorf("log %q", log.String())
	}
}

func TestPendingPDUsTakeTheMemoryOfOne(t *testing.T) {
	const rows, size = 100, 60_000
	s := open(t, Options{Path: newPath(t), QueueBytes: 64 << 20})
	for i := range rows {
		accept(t, s, "a.test", "", 1, pdus(t, pdu("!r", i, strings.Repeat("x", size))))
	}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, most, n := heap(), int64(0), 0
	if err := s.PendingPDUs("a.test", rows, func(pdu []byte) (bool, error) {
		if n++; n%10 == 0 {
			most = max(most, heap()-before)
		}
		runtime.KeepAlive(pdu)
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	want(t, "PDUs", n, rows)
	if most > 8*size {
		t.Errorf("%d bytes of heap while reading %d PDUs of %d", most, rows, size)
	}
}

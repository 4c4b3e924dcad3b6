package store

import (
	"crypto/sha256"
	"fmt"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// inboundAt is when inboundTxn was answered.
const inboundAt int64 = 1_763_700_000_000

const day = int64(24 * time.Hour / time.Millisecond)

func inboundOrigin(i int) matrix.ServerName { return numberedName(i % 7) }

func inboundPDU(i, n int) InboundPDU {
	return InboundPDU{sha256.Sum256(fmt.Append(nil, "pdu ", i, n)), fmt.Sprintf("$%d-%d", i, n)}
}

// inboundTxn has a number, an answer of so many bytes and so many PDUs.
func inboundTxn(i, size, pdus int) InboundTxn {
	x := InboundTxn{Origin: inboundOrigin(i), ID: fmt.Sprint("txn", i), Answered: inboundAt, Answer: filled(i, size), Sum: int64(i)}
	for n := range pdus {
		x.PDUs = append(x.PDUs, inboundPDU(i, n))
	}
	return x
}

func hashes(x *InboundTxn) (list [][32]byte) {
	for _, p := range x.PDUs {
		list = append(list, p.Hash)
	}
	return list
}

func loadInbound(t testing.TB, s *Store, i int, since int64) ([]byte, bool) {
	t.Helper()
	a, found, err := s.LoadInbound(inboundOrigin(i), fmt.Sprint("txn", i), since)
	if err != nil {
		t.Fatal(err)
	}
	return a.Answer, found
}

func inboundPDUs(t testing.TB, s *Store, origin matrix.ServerName, list [][32]byte, since int64) ([]string, bool) {
	t.Helper()
	ids, ok, err := s.InboundPDUs(origin, list, since)
	if err != nil {
		t.Fatal(err)
	}
	return ids, ok
}

// wantInbound checks that x is there as it is.
func wantInbound(t testing.TB, s *Store, x *InboundTxn) {
	t.Helper()
	a, found, err := s.LoadInbound(x.Origin, x.ID, x.Answered-1)
	if err != nil {
		t.Fatal(err)
	}
	want(t, "found "+x.ID, found, true)
	want(t, "answer", a, InboundAnswer{x.Answer, x.Sum})
	if len(x.PDUs) == 0 {
		return
	}
	var ids []string
	for _, p := range x.PDUs {
		ids = append(ids, p.EventID)
	}
	got, ok := inboundPDUs(t, s, x.Origin, hashes(x), x.Answered-1)
	want(t, "PDUs of "+x.ID, ok, true)
	want(t, "event ids", got, ids)
}

func TestInboundComesBackAsItWas(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	list := []InboundTxn{
		inboundTxn(1, 500, 3),
		inboundTxn(2, 0, 0),
		inboundTxn(3, MaxInboundAnswer, matrix.MaxPDUs),
		{Origin: "a.test", ID: "", Answered: inboundAt, Answer: []byte{0, 255}},
		{Origin: "a.test", ID: strings.Repeat("long", 5000), Answered: inboundAt, Answer: []byte("{}")},
		{Origin: "a.test", ID: "b\x00c", Answered: inboundAt, PDUs: []InboundPDU{{EventID: strings.Repeat("e", MaxInboundEventID)}, {Hash: [32]byte{31: 1}}}},
		{Origin: "[2001:db8::1]:8448", ID: "../?#é", Answered: inboundAt, PDUs: []InboundPDU{{EventID: "$other"}}}, // the same hash
	}
	putBatch(t, s, &Batch{Inbound: list})
	for range 2 {
		for i := range list {
			wantInbound(t, s, &list[i])
		}
		_, found := loadInbound(t, s, 9, 0)
		want(t, "what was never stored", found, false)
		_, found, _ = s.LoadInbound("b.test", "", 0)
		want(t, "of another origin", found, false)
		auditCaches(t, s)
		closeStore(t, s)
		s = open(t, Options{Path: path})
	}
	want(t, "totals", [2]int64{s.Stats().Inbound.Rows, s.Stats().Inbound.PDUs}, [2]int64{7, 3 + matrix.MaxPDUs + 3})
	// An empty slice is read as none.
	putBatch(t, s, &Batch{Inbound: []InboundTxn{{Origin: "a.test", ID: "e", Answered: 1, Answer: []byte{}}}})
	wantInbound(t, s, &InboundTxn{Origin: "a.test", ID: "e", Answered: 1})
}

func TestAnInboundThatIsTooOldIsNotFound(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	x := inboundTxn(1, 10, 2)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	for since, there := range map[int64]bool{0: true, inboundAt - 1: true, inboundAt: false, inboundAt + 1: false} {
		_, found := loadInbound(t, s, 1, since)
		want(t, fmt.Sprint("since ", since-inboundAt), found, there)
		_, ok := inboundPDUs(t, s, x.Origin, hashes(&x), since)
		want(t, fmt.Sprint("PDUs since ", since-inboundAt), ok, there)
	}
}

func TestPDUsAreFoundWhateverTransactionTheyCameIn(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	old, newer := inboundTxn(7, 10, 3), inboundTxn(14, 10, 1) // of one origin
	newer.Answered = inboundAt + 1000
	newer.PDUs = append(newer.PDUs, InboundPDU{old.PDUs[1].Hash, "$again"}, InboundPDU{old.PDUs[1].Hash, "$twice"})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{old, newer}})
	auditCaches(t, s)
	want(t, "PDUs", s.Stats().Inbound.PDUs, int64(5)) // one that comes twice is there once
	ids, ok := inboundPDUs(t, s, old.Origin, [][32]byte{newer.PDUs[0].Hash, old.PDUs[2].Hash, newer.PDUs[0].Hash}, 0)
	want(t, "of both", []any{ids, ok}, []any{[]string{"$14-0", "$7-2", "$14-0"}, true})
	for name, c := range map[string]struct {
		origin matrix.ServerName
		list   [][32]byte
		since  int64
		ids    []string
	}{
		"another origin's":      {"other.test", hashes(&old), 0, nil},
		"none":                  {old.Origin, nil, 0, nil},
		"one is not there":      {old.Origin, [][32]byte{old.PDUs[0].Hash, {}}, 0, nil},
		"one is older":          {old.Origin, hashes(&old)[:2], inboundAt, nil},
		"only the newer counts": {old.Origin, hashes(&old)[1:2], inboundAt, []string{"$again"}},
	} {
		ids, ok := inboundPDUs(t, s, c.origin, c.list, c.since)
		want(t, name, []any{ids, ok}, []any{c.ids, c.ids != nil})
	}
}

func TestAnInboundTakesThePlaceOfTheOneBefore(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	old, newer, newest := inboundTxn(1, 5000, 3), inboundTxn(1, 300, 0), inboundTxn(1, 700, 2)
	newer.Answered, newest.Answered = inboundAt+7, inboundAt+3
	newest.PDUs[0] = InboundPDU{sha256.Sum256(nil), "$new"} // the other is the same
	putBatch(t, s, &Batch{Inbound: []InboundTxn{old, inboundTxn(2, 10, 0)}})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{newer, newest}})
	wantInbound(t, s, &newest)
	_, ok := inboundPDUs(t, s, old.Origin, hashes(&old)[:1], 0)
	want(t, "a PDU of the one before", ok, false)
	want(t, "rows", s.Stats().Inbound.Rows, int64(2))
	auditCaches(t, s)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{newer}})
	_, ok = inboundPDUs(t, s, old.Origin, hashes(&newest)[:1], 0)
	want(t, "a PDU of the one before", ok, false)
	want(t, "totals", s.Stats().Inbound, InboundTotals{CacheTotals{2, 310}, 0})
	auditCaches(t, s)
}

// fillInbound writes transactions with numbers from first to end, in large batches.
func fillInbound(t testing.TB, s *Store, first, end int, txn func(i int) InboundTxn) {
	t.Helper()
	for first < end {
		var b Batch
		for ; first < end && len(b.Inbound) < 500; first++ {
			b.Inbound = append(b.Inbound, txn(first))
		}
		putBatch(t, s, &b)
	}
}

func TestInboundIsFoundInEachGeneration(t *testing.T) {
	const n = 3<<inboundGen + 10
	path := newPath(t)
	s := open(t, Options{Path: path})
	txn := func(i int) InboundTxn { return inboundTxn(i, 20, i%2) }
	fillInbound(t, s, 0, n, txn)
	check := func(there func(i int) bool) {
		t.Helper()
		for _, i := range []int{0, 1, 1000, 1<<inboundGen - 2, 1<<inboundGen - 1, 1 << inboundGen, 2<<inboundGen + 1, n - 2, n - 1} {
			if x := txn(i); there(i) {
				wantInbound(t, s, &x)
			} else if _, found := loadInbound(t, s, i, 0); found {
				t.Errorf("%d is there", i)
			}
		}
		auditCaches(t, s)
	}
	check(func(int) bool { return true })
	// Others in the place of some in an old generation.
	for _, i := range []int{0, 1<<inboundGen - 1} {
		x := txn(i)
		x.Answer = []byte("another")
		putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
		wantInbound(t, s, &x)
		putBatch(t, s, &Batch{Inbound: []InboundTxn{txn(i)}})
	}
	want(t, "rows", s.Stats().Inbound.Rows, int64(n))
	check(func(int) bool { return true })
	closeStore(t, s)

	// A lower bound holds with the next that is written. 1 << inboundGen of them are left,
	// less a sixteenth, of two generations.
	s = open(t, Options{Path: path, MaxInbound: 1 << inboundGen, MaxInboundPDUs: n})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{txn(n - 1)}})
	want(t, "rows", s.Stats().Inbound.Rows, int64(1<<inboundGen-1<<inboundGen/16))
	want(t, "generations", count(t, openRaw(t, path), "SELECT count(DISTINCT gen) FROM inbound_pdu"), int64(2))
	check(func(i int) bool { return i > n-3<<inboundGen/4 || i == 0 || i == 1<<inboundGen-1 })
}

func TestInboundIsBoundedInPDUs(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxInbound: 1000, MaxInboundPDUs: 64})
	fillInbound(t, s, 0, 16, func(i int) InboundTxn { return inboundTxn(i, 10, 4) })
	fillInbound(t, s, 16, 100, func(i int) InboundTxn { return inboundTxn(i, 10, 0) })
	want(t, "at the bound", [2]int64{s.Stats().Inbound.PDUs, s.Stats().Pruned}, [2]int64{64, 0})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(100, 10, 1)}})
	// One more than fits and four, which are those of two transactions.
	want(t, "beyond", [2]int64{s.Stats().Inbound.PDUs, s.Stats().Pruned}, [2]int64{57, 2})
	auditCaches(t, s)
	kind := cacheKinds[len(cacheKinds)-1]
	want(t, "kept", kept(t, &kind, s, 101), from(2, 101))
	old := inboundTxn(0, 10, 4)
	_, ok := inboundPDUs(t, s, old.Origin, hashes(&old)[:1], 0)
	want(t, "a PDU of what is gone", ok, false)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(101, 10, matrix.MaxPDUs)}})
	want(t, "kept", kept(t, &kind, s, 102), from(14, 102))
	auditCaches(t, s)
}

func kept(t testing.TB, k *cacheKind, s *Store, n int) []int { t.Helper(); return k.kept(t, s, n) }

// The defaults for PDUs follow the other bound, also at its largest.
func TestTheBoundOfInboundPDUsFollowsThatOfRows(t *testing.T) {
	for rows, pdus := range map[int]int{0: 4 * DefaultMaxInbound, 10: 40, math.MaxInt: math.MaxInt - 3} {
		o := Options{Path: newPath(t), MaxInbound: rows}
		if err := o.check(); err != nil {
			t.Fatal(err)
		}
		want(t, fmt.Sprint("PDUs for ", rows), o.MaxInboundPDUs, pdus)
	}
	s := open(t, Options{Path: newPath(t), MaxInbound: math.MaxInt})
	fillInbound(t, s, 0, 10, func(i int) InboundTxn { return inboundTxn(i, 10, 1) })
	want(t, "rows", s.Stats().Inbound.Rows, int64(10))
}

func TestAnInboundThatIsTooLargeIsLeftOut(t *testing.T) {
	s := open(t, Options{Path: newPath(t), MaxInboundBytes: 100_000, MaxInboundPDUs: 10})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(1, 10, 1), inboundTxn(2, 10, 1)}})
	long := inboundTxn(4, 10, 3)
	long.PDUs[1].EventID = strings.Repeat("e", MaxInboundEventID+1)
	// None of them keeps the others of its batch from being stored.
	putBatch(t, s, &Batch{Inbound: []InboundTxn{
		inboundTxn(1, MaxInboundAnswer+1, 0), inboundTxn(2, 10, 11), inboundTxn(3, 10, 1), long,
	}})
	for i, there := range []bool{false, false, false, true, true} { // what was to be replaced is outdated
		_, found := loadInbound(t, s, i, 0)
		want(t, fmt.Sprint("found ", i), found, there)
	}
	want(t, "left", s.Stats().InboundLeft, int64(2))
	want(t, "PDUs", s.Stats().Inbound.PDUs, int64(3))
	for i, there := range []bool{true, false, true} {
		_, ok := inboundPDUs(t, s, long.Origin, hashes(&long)[i:i+1], 0)
		want(t, fmt.Sprint("PDU ", i), ok, there)
	}
	auditCaches(t, s)

	s = open(t, Options{Path: newPath(t), MaxInboundBytes: 1000})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(1, 500, 0), inboundTxn(2, 1001, 0), inboundTxn(3, 900, 5)}})
	want(t, "larger than all", s.Stats().Inbound, InboundTotals{CacheTotals{1, 500}, 0})
	want(t, "left", s.Stats().InboundLeft, int64(2))

	s = open(t, Options{Path: newPath(t)})
	many := inboundTxn(1, 10, matrix.MaxPDUs+5)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{many}})
	want(t, "PDUs", s.Stats().Inbound.PDUs, int64(matrix.MaxPDUs))
	_, ok := inboundPDUs(t, s, many.Origin, hashes(&many)[:matrix.MaxPDUs], 0)
	want(t, "the first", ok, true)
	_, ok = inboundPDUs(t, s, many.Origin, hashes(&many)[matrix.MaxPDUs:], 0)
	want(t, "others", ok, false)
	auditCaches(t, s)
}

// inboundKept returns how many rows there are.
func inboundKept(s *Store) int64 { return s.Stats().Inbound.Rows }

func TestOldInboundGoesWhenOthersAreWritten(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	at := func(i, pdus int, ms int64) *Batch {
		x := inboundTxn(i, 10, pdus)
		x.Answered = ms
		return &Batch{Inbound: []InboundTxn{x}}
	}
	slack := inboundSlack.Milliseconds()
	for i := range 10 {
		putBatch(t, s, at(i, 1, inboundAt+int64(i)*slack/4)) // the last 2 slacks and a quarter later
	}
	putBatch(t, s, at(10, 0, inboundAt+day+slack))
	want(t, "just not", inboundKept(s), int64(11))
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 10)}})
	putBatch(t, s, at(11, 0, inboundAt+day)) // older than one before
	want(t, "nothing newer", inboundKept(s), int64(12))
	putBatch(t, s, at(12, 0, inboundAt+day+slack+1))
	want(t, "those of a day", inboundKept(s), int64(13-5)) // all within the slack, 0 to 4
	want(t, "pruned", s.Stats().Pruned, int64(5))
	kind := cacheKinds[len(cacheKinds)-1]
	want(t, "kept", kept(t, &kind, s, 13), from(5, 13))
	auditCaches(t, s)

	// Of one batch the newest counts, whatever its place.
	b := at(13, 0, inboundAt+3*day)
	b.Inbound = append(b.Inbound, at(14, 0, 1).Inbound[0])
	putBatch(t, s, b)
	want(t, "kept", kept(t, &kind, s, 15), []int{13, 14})
	// Behind one that is not old nothing goes. A time that cannot be hides nothing.
	putBatch(t, s, at(15, 0, -1<<63))
	putBatch(t, s, at(16, 0, inboundAt+3*day+1))
	want(t, "kept", kept(t, &kind, s, 17), []int{13, 14, 16})
	want(t, "rows", inboundKept(s), int64(4))
	putBatch(t, s, at(17, 0, 1<<63-1))
	want(t, "kept", kept(t, &kind, s, 18), []int{17})
	auditCaches(t, s)
}

func TestOldInboundGoesAFewAtATime(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	fillInbound(t, s, 0, 2*maxTrim+500, func(i int) InboundTxn { return inboundTxn(i, 10, 1) })
	closeStore(t, s)
	s = open(t, Options{Path: path})
	for i, left := range []int64{maxTrim + 500, 500, 0, 0} {
		x := inboundTxn(10_000+i, 10, 0)
		x.Answered = inboundAt + 2*day
		putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
		want(t, "left", inboundKept(s), left+int64(i)+1)
		auditCaches(t, s)
	}
}

// A moment with a clock that is wrong costs what it takes for too old, and no more.
func TestInboundSurvivesAWrongClock(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	at := func(i int, ms int64) {
		x := inboundTxn(i, 10, 0)
		x.Answered = ms
		putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	}
	at(1, inboundAt)
	at(2, inboundAt+300*day) // takes 1 along
	at(3, inboundAt+1)
	at(4, inboundAt+2)
	kind := cacheKinds[len(cacheKinds)-1]
	want(t, "kept", kept(t, &kind, s, 5), []int{2, 3, 4})
	at(5, 0) // a board without a clock
	at(6, inboundAt+3)
	want(t, "kept", inboundKept(s), int64(5))
	at(2, inboundAt+4) // in place of the one from the future, which hid those behind it
	at(7, inboundAt+5)
	want(t, "kept", kept(t, &kind, s, 8), []int{2, 3, 4, 6, 7})
}

// What is written over others uses up ids, and so generations, each of which a look-up
// looks into.
func TestGenerationsOfInboundAreBounded(t *testing.T) {
	const rows = 100
	path := newPath(t)
	s := open(t, Options{Path: path, MaxInbound: rows})
	kind := cacheKinds[len(cacheKinds)-1]
	// The one that is last gives its id to what takes its place; so there are two.
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(0, 10, 1), inboundTxn(1, 10, 1), inboundTxn(2, 10, 1)}})
	for i := range 2*rows - 3 {
		putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(1+i%2, 10, 1)}})
	}
	want(t, "kept", kept(t, &kind, s, 3), []int{0, 1, 2})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(2, 10, 1)}})
	want(t, "kept", kept(t, &kind, s, 3), []int{1, 2})
	auditCaches(t, s)
	want(t, "id", count(t, openRaw(t, path), "SELECT max(id) FROM inbound"), int64(2*rows+1))
}

func TestARefusedInboundIsTakenBackAlone(t *testing.T) {
	g := newGate(OpBegin)
	s := open(t, Options{Path: newPath(t), Fault: g.fault})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(1, 10, 1)}})
	g.hold(t, s)
	bad := inboundTxn(9, 10, 1)
	bad.Origin = "not a name"
	errs := make(chan error, 3)
	for _, b := range []*Batch{
		{Inbound: []InboundTxn{inboundTxn(2, 20, 1), inboundTxn(0, MaxInboundAnswer+1, 0)}},
		{Inbound: []InboundTxn{inboundTxn(1, 70, 2), inboundTxn(8, MaxInboundAnswer+1, 0), bad}},
		{Inbound: []InboundTxn{inboundTxn(3, 20, 1)}},
	} {
		if err := s.Submit(b, func(err error) { errs <- err }); err != nil {
			t.Fatal(err)
		}
	}
	g.leave <- nil
	for i, class := range []error{nil, ErrInvalid, nil} {
		wantErr(t, fmt.Sprint(i), <-errs, class)
	}
	for i := 1; i <= 3; i++ {
		x := inboundTxn(i, 20, 1)
		if i == 1 {
			x.Answer = filled(i, 10)
		}
		wantInbound(t, s, &x)
	}
	want(t, "left", s.Stats().InboundLeft, int64(1)) // not the one of the refused batch
	auditCaches(t, s)
}

func TestAFaultLeavesNothingOfInbound(t *testing.T) {
	for _, op := range []Op{OpBegin, OpCommit} {
		t.Run(string(op), func(t *testing.T) {
			var fail atomic.Bool
			s := open(t, Options{Path: newPath(t), MaxInbound: 16, Fault: func(o Op) error {
				if o == op && fail.Load() {
					return syscall.ENOSPC
				}
				return nil
			}})
			fillInbound(t, s, 0, 16, func(i int) InboundTxn { return inboundTxn(i, 50, 2) })
			before := s.Stats()
			late := inboundTxn(20, 50, 2) // for which others go
			late.Answered += 2 * day
			for range 2 {
				fail.Store(true)
				wantErr(t, "full", submit(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(1, 5000, 0), inboundTxn(30, MaxInboundAnswer+1, 0)}}), ErrFull)
				wantErr(t, "full", submit(t, s, &Batch{Inbound: []InboundTxn{late}}), ErrFull)
				now := s.Stats()
				want(t, "totals", []any{now.Inbound, now.InboundLeft, now.Pruned}, []any{before.Inbound, int64(0), int64(0)})
				for i := range 16 {
					x := inboundTxn(i, 50, 2)
					wantInbound(t, s, &x)
				}
				auditCaches(t, s)
				fail.Store(false)
			}
			putBatch(t, s, &Batch{Inbound: []InboundTxn{late}})
			want(t, "kept", s.Stats().Inbound.Rows, int64(1))
			auditCaches(t, s)
		})
	}
}

func TestNoInboundIsWrittenInAFullFile(t *testing.T) {
	const limit = 1 << 20
	path := newPath(t)
	s := open(t, Options{Path: path, MaxFileBytes: limit})
	fillFile(t, s, "a.test")
	for i := range 100 {
		putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(i, 60_000, 50)}})
	}
	want(t, "inbound", s.Stats().Inbound, InboundTotals{})
	want(t, "left", s.Stats().InboundLeft, int64(100))
	auditCaches(t, s)
	for pack(t, s, "a.test", "b", 2).ID != "" {
		settle(t, s, "a.test", "b", Delivered)
	}
	x := inboundTxn(1, 60_000, 50)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	wantInbound(t, s, &x)

	// One that finds no room does not leave an older one.
	var b Batch
	s.writerDo(t, func(w *writer) { w.keys.maxBytes = 8 << 20 })
	for i := range 20 {
		b.Keys = append(b.Keys, someKeys(notaryName, i, MaxKeyObject))
	}
	putBatch(t, s, &b)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(1, 200, 1)}})
	_, found := loadInbound(t, s, 1, 0)
	want(t, "found", found, false)
	_, ok := inboundPDUs(t, s, x.Origin, hashes(&x)[:1], 0)
	want(t, "its PDU", ok, false)
	auditCaches(t, s)
}

func TestInboundMakesRoomForTheOutboxAfterTheAnswers(t *testing.T) {
	const limit = 4 << 20
	path := newPath(t)
	var fault atomic.Bool
	s := open(t, Options{Path: path, MaxFileBytes: limit, Fault: func(op Op) error {
		if op == OpCommit && fault.Load() {
			return errInjected
		}
		return nil
	}})
	for i := range 300 {
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(i, 3000)}})
	}
	i := 0
	for ; s.Stats().InboundLeft == 0; i++ {
		if i == 5000 {
			t.Fatal("never full")
		}
		putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(i, 2000, 3)}})
	}
	full := s.Stats()
	if full.Answers.Rows != 300 || full.Inbound.Bytes < limit/4 {
		t.Fatalf("in a full file %+v and %+v", full.Answers, full.Inbound)
	}
	accept := func(n int) *Batch {
		return &Batch{Outbox: []OutboxOp{&Accept{Destination: "a.test", Items: pdus(t, pdu("!r", n, strings.Repeat("x", 60_000))), Accepted: 1}}}
	}
	putBatch(t, s, accept(0))
	if now := s.Stats(); now.Answers.Rows >= 300 || now.Inbound != full.Inbound {
		t.Errorf("after accepting: %+v, %+v", now.Answers, now.Inbound)
	}
	n := 1
	for ; s.Stats().Inbound == full.Inbound; n++ {
		if n == 100 {
			t.Fatal("never any of them")
		}
		putBatch(t, s, accept(n))
	}
	now := s.Stats()
	want(t, "answers when inbound goes", now.Answers, CacheTotals{})
	want(t, "pruned", now.Pruned, 300+full.Inbound.Rows-now.Inbound.Rows)
	_, found := loadInbound(t, s, 0, 0)
	want(t, "the oldest", found, false)
	x := inboundTxn(i-2, 2000, 3)
	wantInbound(t, s, &x)
	auditCaches(t, s)

	fault.Store(true)
	for range 5 {
		wantErr(t, "commit", submit(t, s, &Batch{Outbox: append(accept(200).Outbox, accept(201).Outbox...)}), errInjected)
		want(t, "after a rollback", s.Stats().Inbound, now.Inbound)
	}
	fault.Store(false)
	fillFile(t, s, "a.test")
	want(t, "in the end", []any{s.Stats().Answers, s.Stats().Inbound}, []any{CacheTotals{}, InboundTotals{}})
	auditCaches(t, s)
	audit(t, path)
	want(t, "entries", count(t, openRaw(t, path), "SELECT count(*) FROM inbound_pdu"), int64(0))
	closeStore(t, s)
	if size := fileSize(path); size > limit+64<<10 {
		t.Errorf("%d bytes in the file", size)
	}
}

func TestRowsOfInboundThatAreNotOursAreLeftOut(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxInbound: 64})
	fillInbound(t, s, 0, 8, func(i int) InboundTxn { return inboundTxn(i, 10, 2) })
	c := openRaw(t, path)
	change := func(i int, set string) {
		t.Helper()
		key := newInboundKey(inboundOrigin(i), fmt.Sprint("txn", i))
		if err := c.exec(t.Context(), fmt.Sprintf("UPDATE inbound SET %s WHERE key = x'%x'", set, key)); err != nil {
			t.Fatal(err)
		}
	}
	entry := len("$0-0") + 1 + hashBytes
	for _, d := range []struct {
		i            int
		set          string
		answer, pdus bool // still found
	}{
		{0, "answer = x'00'", false, true},
		{1, fmt.Sprintf("answer = zeroblob(%d), size = %d", MaxInboundAnswer+1, MaxInboundAnswer+1+2*entry), false, true},
		{2, "list = substr(list, 1, length(list) - 1), size = size - 1", true, false},
		{3, fmt.Sprintf("list = substr(list, 1, %d), size = %d", entry+hashBytes-1, 10+entry+hashBytes-1), true, false},
		{4, fmt.Sprintf("list = CAST(substr(list, 1, %d) || x'ffffffffffffffffffff01' AS BLOB), size = %d", entry+hashBytes, 10+entry+hashBytes+11), true, false},
		{5, fmt.Sprintf("list = zeroblob(%d), size = %d", maxPDUList+1, 10+maxPDUList+1), true, false},
		{6, "pdus = 3", true, false},
	} {
		x := inboundTxn(d.i, 10, 2)
		wantInbound(t, s, &x)
		before := s.Stats().Damaged
		change(d.i, d.set)
		_, found := loadInbound(t, s, d.i, 0)
		want(t, fmt.Sprint("answer of ", d.i), found, d.answer)
		_, ok := inboundPDUs(t, s, x.Origin, hashes(&x), 0)
		want(t, fmt.Sprint("PDUs of ", d.i), ok, d.pdus)
		want(t, "damaged", s.Stats().Damaged, before+1)
	}
	// Rows and entries that only have the same hash are others.
	x, y := inboundTxn(7, 10, 2), inboundTxn(14, 30, 1) // of one origin
	putBatch(t, s, &Batch{Inbound: []InboundTxn{y}})
	kx, ky := newInboundKey(x.Origin, x.ID), newInboundKey(y.Origin, y.ID)
	px, py := newInboundKey(x.Origin, x.PDUs[1].Hash[:]), newInboundKey(y.Origin, y.PDUs[0].Hash[:])
	if err := c.exec(t.Context(), fmt.Sprintf(`UPDATE inbound SET hash = %d WHERE key = x'%x';
		UPDATE inbound_pdu SET hash = %d WHERE hash = %d; INSERT INTO inbound_pdu VALUES (0, %[3]d, 12345)`,
		kx.hash(), ky, px.hash(), py.hash())); err != nil {
		t.Fatal(err)
	}
	before := s.Stats().Damaged
	wantInbound(t, s, &x)
	_, found := loadInbound(t, s, 14, 0)
	want(t, "one that has another hash", found, false)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	wantInbound(t, s, &x)
	want(t, "the other", count(t, c, fmt.Sprintf("SELECT count(*) FROM inbound WHERE key = x'%x'", ky)), int64(1))
	want(t, "damaged", s.Stats().Damaged, before)

	// They are replaced, and go like others.
	z := inboundTxn(4, 20, 2)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{z}})
	wantInbound(t, s, &z)
	fillInbound(t, s, 100, 20_100, func(i int) InboundTxn { return inboundTxn(i, 10, 1) })
	auditCaches(t, s)
}

// A damaged file may hold anything where a number should be.
func TestANumberOfInboundThatIsNoneIsNoReasonToFail(t *testing.T) {
	s := open(t, Options{Path: newPath(t), MaxInbound: 16})
	fillInbound(t, s, 0, 16, func(i int) InboundTxn { return inboundTxn(i, 10, 1) })
	s.writerDo(t, func(w *writer) {
		// The table has no such values; statements that yield them have.
		for dst, query := range map[**stmt]string{
			&w.inbound.find:   inboundGens + "SELECT t.id, NULL, 'x' " + findInbound,
			&w.inbound.oldest: "SELECT id, NULL, x'', answered FROM inbound ORDER BY id",
		} {
			var err error
			if *dst, err = w.conn.prepare(query); err != nil {
				t.Error(err)
			}
		}
	})
	putBatch(t, s, &Batch{Inbound: []InboundTxn{inboundTxn(0, 10, 1), inboundTxn(16, 10, 1)}})
	for _, i := range []int{0, 16} {
		x := inboundTxn(i, 10, 1)
		wantInbound(t, s, &x)
	}
}

func TestInboundComesWithTheFourthSchema(t *testing.T) {
	script, err := os.ReadFile("testdata/v3.sql")
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := newPath(t), newPath(t)
	makeRaw(t, old, string(script))
	want(t, "version before", count(t, openRaw(t, old), "PRAGMA user_version"), int64(3))
	s := open(t, Options{Path: old})
	want(t, "totals", s.Stats().Inbound, InboundTotals{})
	_, found := loadInbound(t, s, 1, 0)
	want(t, "found", found, false)
	x := inboundTxn(1, 100, 2)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	for range 2 {
		wantInbound(t, s, &x)
		for i := 1; i <= 2; i++ { // what was there before
			got, _ := loadAnswer(t, s, answerKey(i))
			want(t, "answer", got, anAnswer(i, 20*i))
		}
		want(t, "hosts", len(load(t, s, 10)), 3)
		auditCaches(t, s)
		closeStore(t, s)
		s = open(t, Options{Path: old})
	}
	closeStore(t, s)
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, old), schema(t, fresh))
	want(t, "version", count(t, openRaw(t, old), "PRAGMA user_version"), int64(len(migrations)))
}

// A row that is damaged does not keep the file from being brought to the schema of today.
func TestTheFourthSchemaIsOpenedWithADamagedRow(t *testing.T) {
	script, err := os.ReadFile("testdata/v4.sql")
	if err != nil {
		t.Fatal(err)
	}
	path := newPath(t)
	makeRaw(t, path, string(script))
	shell(t, path, `PRAGMA writable_schema = ON;
		UPDATE sqlite_schema SET sql = replace(replace(sql, 'NOT NULL', ''), ') STRICT', ')') WHERE name = 'inbound'`)
	shell(t, path, `UPDATE inbound SET answered = 'then', list = NULL WHERE id = (SELECT min(id) FROM inbound)`)
	shell(t, path, `PRAGMA writable_schema = ON;
		UPDATE sqlite_schema SET sql = replace(replace(replace(sql, 'list     BLOB    ,', 'list     BLOB    NOT NULL,'), 'answered INTEGER ,', 'answered INTEGER NOT NULL,'), char(10) || '	)', char(10) || '	) STRICT') WHERE name = 'inbound'`)
	s := open(t, Options{Path: path})
	if n := s.Stats().Inbound.Rows; n != 1 {
		t.Errorf("%d rows are left of 2, one of them damaged", n)
	}
	closeStore(t, s)
}

func TestTheFourthSchemaIsStillOpened(t *testing.T) {
	script, err := os.ReadFile("testdata/v4.sql")
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := newPath(t), newPath(t)
	makeRaw(t, old, string(script))
	s := open(t, Options{Path: old})
	auditCaches(t, s)
	for i := 1; i <= 2; i++ {
		x := inboundTxn(i, 20*i, i-1)
		x.Sum = 0 // which that schema did not have
		wantInbound(t, s, &x)
	}
	want(t, "totals", [2]int64{s.Stats().Inbound.Rows, s.Stats().Inbound.PDUs}, [2]int64{2, 1})
	x := inboundTxn(2, 5, 2)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	wantInbound(t, s, &x)
	auditCaches(t, s)
	closeStore(t, s)
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, old), schema(t, fresh))
}

// TestNoStatementOfInboundScans asks SQLite how it runs the statements.
func TestNoStatementOfInboundScans(t *testing.T) {
	path := newPath(t)
	closeStore(t, open(t, Options{Path: path}))
	c := openRaw(t, path)
	check := func(query string, plan []string) {
		t.Helper()
		var got []string
		if err := explain(t, c, query, &got); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		want(t, query, got, plan)
	}
	for _, q := range new(inboundTable).queries() {
		check(q.query, q.plan)
	}
	check(loadInboundQuery, inboundPlan("SEARCH t USING INDEX inbound_find (<expr>=? AND hash=?)"))
	check(inboundPDUQuery, inboundPlan("SEARCH p USING PRIMARY KEY (gen=? AND hash=?)", "SEARCH t USING INTEGER PRIMARY KEY (rowid=?)"))
	check(pendingPDUQuery, []string{
		"SEARCH i USING PRIMARY KEY (dest=? AND lane=? AND seq<?)",
		"SCALAR SUBQUERY 1", "SEARCH dest USING COVERING INDEX sqlite_autoindex_dest_1 (name=?)",
		"SEARCH p USING PRIMARY KEY (hash=?) LEFT-JOIN", "SEARCH b USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN",
	})
}

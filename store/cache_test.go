package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"fsbus/bus/matrix"
)

const notaryName matrix.ServerName = "notary.test"

// answerKey is the key of an answer with a number.
func answerKey(i int) [32]byte { return sha256.Sum256(fmt.Append(nil, "answer ", i)) }

// filled returns size bytes that say what they are of, nil for none.
func filled(i, size int) []byte {
	if size == 0 {
		return nil
	}
	b := bytes.Repeat(fmt.Appendf(nil, "%d,", i), size/2+1)
	return b[:size]
}

// anAnswer is an answer of so many bytes, of which up to 16 are its header.
func anAnswer(i, size int) Answer {
	return Answer{
		Key: answerKey(i), Stored: int64(-i), Fresh: int64(i), Stale: int64(2 * i), Status: 200,
		Header: filled(i, min(size, 16)), Body: filled(i, size-min(size, 16)),
	}
}

func someKeys(via matrix.ServerName, i, size int) ServerKeys {
	return ServerKeys{Via: via, Server: matrix.ServerName(numbered("s", i)), Fetched: matrix.Timestamp(-i), ValidUntil: matrix.Timestamp(i), Object: filled(i, size)}
}

func putBatch(t testing.TB, s *Store, b *Batch) {
	t.Helper()
	if err := submit(t, s, b); err != nil {
		t.Fatal(err)
	}
}

func loadAnswer(t testing.TB, s *Store, key [32]byte) (Answer, bool) {
	t.Helper()
	a, found, err := s.LoadAnswer(key)
	if err != nil {
		t.Fatal(err)
	}
	return a, found
}

func loadKeys(t testing.TB, s *Store, via matrix.ServerName, servers ...matrix.ServerName) []ServerKeys {
	t.Helper()
	var list []ServerKeys
	if err := s.LoadKeys(via, servers, func(k ServerKeys) error {
		list = append(list, k)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

func index(t testing.TB, s *Store, limit int) []AnswerInfo {
	t.Helper()
	var list []AnswerInfo
	if err := s.AnswerIndex(t.Context(), limit, func(i AnswerInfo) error {
		list = append(list, i)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

// cacheKind is one of the tables, for what holds for all.
type cacheKind struct {
	name    string
	options func(rows int, bytes int64) Options
	put     func(i, size int) *Batch
	totals  func(Stats) CacheTotals
	has     func(t testing.TB, s *Store, i int) bool
}

var cacheKinds = []cacheKind{
	{
		"answers",
		func(rows int, bytes int64) Options { return Options{MaxAnswers: rows, MaxAnswerBytes: bytes} },
		func(i, size int) *Batch { return &Batch{Answers: []Answer{anAnswer(i, size)}} },
		func(s Stats) CacheTotals { return s.Answers },
		func(t testing.TB, s *Store, i int) bool {
			_, found := loadAnswer(t, s, answerKey(i))
			return found
		},
	},
	{
		"keys",
		func(rows int, bytes int64) Options { return Options{MaxKeys: rows, MaxKeyBytes: bytes} },
		func(i, size int) *Batch { return &Batch{Keys: []ServerKeys{someKeys(notaryName, i, size)}} },
		func(s Stats) CacheTotals { return s.Keys },
		func(t testing.TB, s *Store, i int) bool {
			return len(loadKeys(t, s, notaryName, matrix.ServerName(numbered("s", i)))) > 0
		},
	},
	{
		"inbound",
		func(rows int, bytes int64) Options { return Options{MaxInbound: rows, MaxInboundBytes: bytes} },
		func(i, size int) *Batch { return &Batch{Inbound: []InboundTxn{inboundTxn(i, size, 0)}} },
		func(s Stats) CacheTotals { return s.Inbound.CacheTotals },
		func(t testing.TB, s *Store, i int) bool {
			_, found := loadInbound(t, s, i, 0)
			return found
		},
	},
}

func eachCache(t *testing.T, f func(*testing.T, cacheKind)) {
	for _, k := range cacheKinds {
		t.Run(k.name, func(t *testing.T) { f(t, k) })
	}
}

// kept returns which of the numbers below n are there.
func (k *cacheKind) kept(t testing.TB, s *Store, n int) (list []int) {
	t.Helper()
	for i := range n {
		if k.has(t, s, i) {
			list = append(list, i)
		}
	}
	return list
}

func from(first, end int) (list []int) {
	for i := first; i < end; i++ {
		list = append(list, i)
	}
	return list
}

// auditCaches checks what must hold in the tables, and that the totals are right.
func auditCaches(t testing.TB, s *Store) {
	t.Helper()
	c := openRaw(t, s.opt.Path)
	for what, query := range map[string]string{
		"answers of the wrong size": "SELECT count(*) FROM answer WHERE size <> length(header) + length(body)",
		"keys of the wrong size":    "SELECT count(*) FROM server_key WHERE size <> length(object)",
		"answers twice":             "SELECT count(*) - count(DISTINCT key) FROM answer",
		"keys twice":                "SELECT count(*) - count(DISTINCT via || ' ' || server) FROM server_key",
		"inbound of the wrong size": "SELECT count(*) FROM inbound WHERE size <> length(list) + length(answer)",
		"inbound twice":             "SELECT count(*) - count(DISTINCT key) FROM inbound",
		"PDUs without a row":        "SELECT count(*) FROM inbound_pdu WHERE txn NOT IN (SELECT id FROM inbound)",
		"PDUs too many or few":      "SELECT count(*) FROM inbound LEFT JOIN (SELECT txn, count(*) AS n FROM inbound_pdu GROUP BY txn) ON txn = id WHERE pdus <> coalesce(n, 0)",
		"PDUs elsewhere":            "SELECT count(*) FROM inbound_pdu WHERE gen <> txn >> 12",
	} {
		if n := count(t, c, query); n != 0 {
			t.Errorf("%d %s", n, what)
		}
	}
	st := s.Stats()
	for table, got := range map[string]CacheTotals{"answer": st.Answers, "server_key": st.Keys, "inbound": st.Inbound.CacheTotals} {
		want(t, "totals of "+table, got, CacheTotals{
			count(t, c, "SELECT count(*) FROM "+table), count(t, c, "SELECT coalesce(sum(size), 0) FROM "+table),
		})
	}
	want(t, "PDUs of inbound", st.Inbound.PDUs, count(t, c, "SELECT count(*) FROM inbound_pdu"))
	c.close()
	c.stmts = nil
}

func TestAnswersComeBackAsTheyWere(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	list := []Answer{
		anAnswer(1, 500),
		anAnswer(2, 0),
		{Key: answerKey(3), Stored: -1 << 63, Fresh: 1<<63 - 1, Stale: -1, Status: -1 << 31, Body: []byte{0, 255}},
		{Key: answerKey(4), Status: 1<<31 - 1, Header: filled(4, MaxAnswerHeader), Body: filled(4, MaxAnswerBody)},
		{Key: [32]byte{31: 1}, Header: []byte{0}},
		{}, // the key of zeros
	}
	list[1].Header, list[1].Body = []byte{}, nil
	putBatch(t, s, &Batch{Answers: list})
	list[1].Header = nil
	for range 2 {
		for _, a := range list {
			got, found := loadAnswer(t, s, a.Key)
			want(t, "found", found, true)
			want(t, "answer", got, a)
		}
		_, found := loadAnswer(t, s, answerKey(9))
		want(t, "what was never stored", found, false)
		auditCaches(t, s)
		closeStore(t, s)
		s = open(t, Options{Path: path})
	}
	want(t, "rows", s.Stats().Answers.Rows, int64(len(list)))
}

func TestAnAnswerTakesThePlaceOfTheOneBefore(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	old, newer, newest := anAnswer(1, 5000), anAnswer(1, 300), anAnswer(1, 700)
	newer.Stored, newest.Stored = 7, 3
	putBatch(t, s, &Batch{Answers: []Answer{old, anAnswer(2, 10)}})
	putBatch(t, s, &Batch{Answers: []Answer{newer, newest}})
	got, _ := loadAnswer(t, s, old.Key)
	want(t, "answer", got, newest)
	want(t, "totals", s.Stats().Answers, CacheTotals{2, 710})

	// All begin alike, and have the same hash.
	var b Batch
	for i := range 5 {
		key := [32]byte{0: 9}
		key[8+i] = 1
		b.Answers = append(b.Answers, Answer{Key: key, Stored: int64(i)})
	}
	putBatch(t, s, &b)
	for i, a := range b.Answers {
		got, found := loadAnswer(t, s, a.Key)
		want(t, "one of those that begin alike", []int64{got.Stored, b2i(found)}, []int64{int64(i), 1})
	}
	putBatch(t, s, &Batch{DropAnswers: [][32]byte{b.Answers[2].Key, answerKey(99)}})
	_, found := loadAnswer(t, s, b.Answers[2].Key)
	want(t, "dropped", found, false)
	_, found = loadAnswer(t, s, b.Answers[3].Key)
	want(t, "its neighbour", found, true)

	putBatch(t, s, &Batch{Answers: []Answer{old}, DropAnswers: [][32]byte{old.Key}}) // in this order
	_, found = loadAnswer(t, s, old.Key)
	want(t, "written and dropped", found, false)
	auditCaches(t, s)
}

func b2i(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func TestTheIndexOfAnswersHasTheLastWrittenFirst(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	for i := range 5 {
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(i, 100*i)}})
	}
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 50)}})
	var order []AnswerInfo
	for _, i := range []int{1, 4, 3, 2, 0} {
		info := AnswerInfo{answerKey(i), int64(-i), int64(i), int64(2 * i), int64(100 * i)}
		if i == 1 {
			info.Size = 50
		}
		order = append(order, info)
	}
	for limit := range len(order) + 2 {
		want(t, "index", index(t, s, limit), append([]AnswerInfo(nil), order[:min(limit, len(order))]...))
	}
	want(t, "negative limit", index(t, s, -1), []AnswerInfo(nil))
	n := 0
	wantErr(t, "a callback that fails", s.AnswerIndex(t.Context(), 5, func(AnswerInfo) error { n++; return errInjected }), errInjected)
	want(t, "calls", n, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, "a context that has ended", s.AnswerIndex(ctx, 5, func(AnswerInfo) error { return nil }), context.Canceled)
}

func TestKeysComeBackInTheOrderAskedFor(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	all := []ServerKeys{
		someKeys(notaryName, 1, 500), someKeys(notaryName, 2, MaxKeyObject), someKeys("other.test", 1, 30),
		{Via: numberedName(1), Server: numberedName(1), Object: []byte("own")},
		{Via: "[2001:db8::1]:8448", Server: numberedName(1), Fetched: -1 << 63, ValidUntil: 1<<63 - 1, Object: []byte{0}},
	}
	putBatch(t, s, &Batch{Keys: all})
	for range 2 {
		want(t, "by the notary", loadKeys(t, s, notaryName, numberedName(2), numberedName(3), numberedName(1), numberedName(2)),
			[]ServerKeys{all[1], all[0], all[1]})
		for _, k := range all {
			want(t, "one", loadKeys(t, s, k.Via, k.Server), []ServerKeys{k})
		}
		want(t, "by nobody", loadKeys(t, s, "nobody.test", numberedName(1)), []ServerKeys(nil))
		want(t, "of nobody", loadKeys(t, s, notaryName), []ServerKeys(nil))
		auditCaches(t, s)
		closeStore(t, s)
		s = open(t, Options{Path: path})
	}
	newer := someKeys(notaryName, 1, 20)
	newest := newer
	newest.Fetched++
	putBatch(t, s, &Batch{Keys: []ServerKeys{newer, newest}})
	want(t, "replaced", loadKeys(t, s, notaryName, numberedName(1)), []ServerKeys{newest})
	want(t, "by others", loadKeys(t, s, "other.test", numberedName(1)), []ServerKeys{all[2]})
	putBatch(t, s, &Batch{Keys: []ServerKeys{{Via: notaryName, Server: numberedName(1)}}})
	want(t, "without an object", loadKeys(t, s, notaryName, numberedName(1)), []ServerKeys(nil))
	auditCaches(t, s)

	n := 0
	err := s.LoadKeys(notaryName, []matrix.ServerName{numberedName(2), numberedName(2)}, func(ServerKeys) error { n++; return errInjected })
	want(t, "a callback that fails", err, errInjected)
	want(t, "calls", n, 1)
}

func numberedName(i int) matrix.ServerName { return matrix.ServerName(numbered("s", i)) }

func TestACallbackOfLoadKeysMayUseTheStore(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	putBatch(t, s, &Batch{Keys: []ServerKeys{someKeys(notaryName, 1, 10), someKeys(notaryName, 2, 10)}})
	var list []ServerKeys
	if err := s.LoadKeys(notaryName, []matrix.ServerName{numberedName(1), numberedName(2)}, func(k ServerKeys) error {
		list = append(list, loadKeys(t, s, notaryName, k.Server)...)
		putBatch(t, s, &Batch{Keys: []ServerKeys{someKeys(notaryName, 2, 20)}})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want(t, "keys", list, []ServerKeys{someKeys(notaryName, 1, 10), someKeys(notaryName, 2, 20)})

	// What is read after Close is refused, also in the middle of a call.
	err := s.LoadKeys(notaryName, []matrix.ServerName{numberedName(1), numberedName(2)}, func(k ServerKeys) error {
		want(t, "server", k.Server, numberedName(1))
		closeStore(t, s)
		return nil
	})
	wantErr(t, "LoadKeys", err, ErrClosed)
}

func TestTheLatestNotaryIsFound(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	latest := func(name matrix.ServerName) {
		t.Helper()
		via, found, err := s.LatestVia()
		if err != nil {
			t.Fatal(err)
		}
		want(t, "notary", via, name)
		want(t, "found", found, name != "")
	}
	latest("")
	own := ServerKeys{Via: "a.test", Server: "a.test", Object: []byte("x")}
	putBatch(t, s, &Batch{Keys: []ServerKeys{own}})
	latest("")
	putBatch(t, s, &Batch{Keys: []ServerKeys{someKeys("one.test", 1, 5), someKeys("two.test", 1, 5), own}})
	latest("two.test")
	putBatch(t, s, &Batch{Keys: []ServerKeys{someKeys("one.test", 1, 6)}})
	latest("one.test")
	closeStore(t, s)
	s = open(t, Options{Path: path})
	latest("one.test")
	if err := openRaw(t, path).exec(t.Context(), "INSERT INTO server_key VALUES (NULL, 1, 'no name', 'a.test', 1, 0, 0, 'x')"); err == nil {
		t.Error("a STRICT table took a text for a blob")
	}
	if err := openRaw(t, path).exec(t.Context(), "INSERT INTO server_key VALUES (NULL, 1, 'no name', 'a.test', 1, 0, 0, x'00')"); err != nil {
		t.Fatal(err)
	}
	latest("one.test")
	want(t, "damaged", s.Stats().Damaged, int64(1))
}

func TestCachesAreBoundedInRows(t *testing.T) {
	eachCache(t, func(t *testing.T, k cacheKind) {
		o := k.options(64, 0) // a prune makes room for 4 more
		o.Path = newPath(t)
		s := open(t, o)
		for i := range 64 {
			putBatch(t, s, k.put(i, 10))
		}
		putBatch(t, s, k.put(0, 10)) // replacing does not count, and makes young
		want(t, "pruned at the bound", s.Stats().Pruned, int64(0))
		want(t, "kept", len(k.kept(t, s, 70)), 64)
		putBatch(t, s, k.put(64, 10))
		want(t, "pruned", s.Stats().Pruned, int64(5))
		want(t, "kept", k.kept(t, s, 70), append([]int{0}, from(6, 65)...))
		auditCaches(t, s)

		// One batch of more than fits.
		var b Batch
		for i := range 200 {
			one := k.put(i, 10)
			b.Answers, b.Keys = append(b.Answers, one.Answers...), append(b.Keys, one.Keys...)
			b.Inbound = append(b.Inbound, one.Inbound...)
		}
		putBatch(t, s, &b)
		want(t, "kept of many", k.kept(t, s, 200), from(140, 200))
		auditCaches(t, s)
		closeStore(t, s)

		// A lower bound holds from the first commit on, and the order of writes goes on.
		o = k.options(10, 0)
		o.Path = s.opt.Path
		s = open(t, o)
		want(t, "totals", k.totals(s.Stats()), CacheTotals{60, 600})
		putBatch(t, s, k.put(0, 10))
		want(t, "kept under a lower bound", k.kept(t, s, 200), append([]int{0}, from(191, 200)...))
		auditCaches(t, s)
	})
}

func TestCachesAreBoundedInBytes(t *testing.T) {
	eachCache(t, func(t *testing.T, k cacheKind) {
		o := k.options(0, 32<<10) // a prune makes room for 2 KiB more
		o.Path = newPath(t)
		s := open(t, o)
		for i := range 32 {
			putBatch(t, s, k.put(i, 1<<10))
		}
		want(t, "totals at the bound", k.totals(s.Stats()), CacheTotals{32, 32 << 10})
		want(t, "pruned at the bound", s.Stats().Pruned, int64(0))
		putBatch(t, s, k.put(32, 1))
		want(t, "kept", k.kept(t, s, 40), from(3, 33))
		want(t, "pruned", s.Stats().Pruned, int64(3))
		auditCaches(t, s)
		putBatch(t, s, k.put(32, 20<<10))
		want(t, "kept beside a large one", k.kept(t, s, 40), from(22, 33))
		auditCaches(t, s)

		// What is larger than all that may be kept does not push out the others, but
		// what it was to replace is outdated.
		putBatch(t, s, k.put(25, 32<<10+1))
		want(t, "kept", k.kept(t, s, 40), append(from(22, 25), from(26, 33)...))
		auditCaches(t, s)
	})
}

func TestTheBoundsOfCachesHoldAfterARollback(t *testing.T) {
	eachCache(t, func(t *testing.T, k cacheKind) {
		var fail atomic.Bool
		o := k.options(64, 32<<10)
		o.Path = newPath(t)
		o.Fault = func(op Op) error {
			if op == OpCommit && fail.Load() {
				return errInjected
			}
			return nil
		}
		s := open(t, o)
		for i := range 32 {
			putBatch(t, s, k.put(i, 1<<10))
		}
		before := k.totals(s.Stats())
		fail.Store(true)
		for i := range 3 { // a prune that is undone, each time
			wantErr(t, "commit", submit(t, s, k.put(40+i, 2000)), errInjected)
			want(t, "totals", k.totals(s.Stats()), before)
			want(t, "pruned", s.Stats().Pruned, int64(0))
			want(t, "kept", k.kept(t, s, 50), from(0, 32))
			auditCaches(t, s)
		}
		fail.Store(false)
		putBatch(t, s, k.put(32, 10))
		want(t, "kept", k.kept(t, s, 50), from(3, 33))
		want(t, "pruned", s.Stats().Pruned, int64(3))
		auditCaches(t, s)

		// After a rollback they are counted, whether a bound is reached or not.
		fail.Store(true)
		wantErr(t, "commit", submit(t, s, k.put(40, 10)), errInjected)
		if err := openRaw(t, o.Path).exec(t.Context(), "DELETE FROM answer WHERE id % 2; DELETE FROM server_key WHERE id % 2; DELETE FROM inbound WHERE id % 2"); err != nil {
			t.Fatal(err)
		}
		fail.Store(false)
		putBatch(t, s, k.put(50, 10))
		auditCaches(t, s)

		// What a shell deletes is noticed before anything else is deleted in vain.
		if err := openRaw(t, o.Path).exec(t.Context(), "DELETE FROM answer; DELETE FROM server_key; DELETE FROM inbound"); err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			putBatch(t, s, k.put(i, 1<<10))
		}
		want(t, "kept", k.kept(t, s, 60), from(0, 20))
		auditCaches(t, s)
	})
}

func TestARefusedBatchOfACacheIsTakenBackAlone(t *testing.T) {
	badAnswer := Answer{Key: answerKey(99), Body: make([]byte, MaxAnswerBody+1)}
	badKeys := ServerKeys{Via: notaryName, Server: "s.test", Object: make([]byte, MaxKeyObject+1)}
	for name, bad := range map[string]*Batch{
		"body":   {Answers: []Answer{anAnswer(1, 70), badAnswer}},
		"header": {Answers: []Answer{anAnswer(1, 70), {Key: answerKey(99), Header: make([]byte, MaxAnswerHeader+1)}}},
		"object": {Keys: []ServerKeys{someKeys(notaryName, 1, 70), badKeys}},
		"via":    {Keys: []ServerKeys{someKeys(notaryName, 1, 70), {Via: "not a name", Server: "s.test", Object: []byte("x")}}},
		"server": {Keys: []ServerKeys{someKeys(notaryName, 1, 70), {Via: "s.test", Object: []byte("x")}}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate(OpBegin)
			s := open(t, Options{Path: newPath(t), Fault: g.fault})
			putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 10)}, Keys: []ServerKeys{someKeys(notaryName, 1, 10)}})
			g.hold(t, s)
			errs := make(chan error, 3)
			good := func(i int) *Batch {
				return &Batch{Answers: []Answer{anAnswer(i, 20)}, Keys: []ServerKeys{someKeys(notaryName, i, 20)}}
			}
			for _, b := range []*Batch{good(2), bad, good(3)} {
				if err := s.Submit(b, func(err error) { errs <- err }); err != nil {
					t.Fatal(err)
				}
			}
			g.leave <- nil
			for i, class := range []error{nil, ErrInvalid, nil} {
				wantErr(t, fmt.Sprint(i), <-errs, class)
			}
			want(t, "commits", s.Stats().Commits, int64(3))
			want(t, "totals", []CacheTotals{s.Stats().Answers, s.Stats().Keys}, []CacheTotals{{3, 50}, {3, 50}})
			auditCaches(t, s)
		})
	}
}

func TestAFaultLeavesNothingOfACache(t *testing.T) {
	for _, op := range []Op{OpBegin, OpCommit} {
		t.Run(string(op), func(t *testing.T) {
			var fail atomic.Bool
			s := open(t, Options{Path: newPath(t), Fault: func(o Op) error {
				if o == op && fail.Load() {
					return syscall.ENOSPC
				}
				return nil
			}})
			b := &Batch{Answers: []Answer{anAnswer(1, 5000)}, Keys: []ServerKeys{someKeys(notaryName, 1, 5000)}}
			old := &Batch{Answers: []Answer{anAnswer(2, 50)}, Keys: []ServerKeys{someKeys(notaryName, 2, 50)}}
			putBatch(t, s, old)
			for range 2 {
				fail.Store(true)
				wantErr(t, "full", submit(t, s, b), ErrFull)
				_, found := loadAnswer(t, s, answerKey(1))
				want(t, "answer", found, false)
				want(t, "keys", loadKeys(t, s, notaryName, numberedName(1), numberedName(2)), old.Keys)
				want(t, "index", len(index(t, s, 10)), 1)
				wantErr(t, "drop", submit(t, s, &Batch{DropAnswers: [][32]byte{answerKey(2)}}), ErrFull)
				_, found = loadAnswer(t, s, answerKey(2))
				want(t, "old answer", found, true)
				auditCaches(t, s)
				fail.Store(false)
			}
			putBatch(t, s, b)
			want(t, "kept", s.Stats().Answers, CacheTotals{2, 5050})
			auditCaches(t, s)
		})
	}
}

// fillFile accepts events until the outbox refuses.
func fillFile(t *testing.T, s *Store, dest matrix.ServerName) (n int) {
	t.Helper()
	var err error
	for ; err == nil; n++ {
		if n == 2000 {
			t.Fatal("never full")
		}
		err = submit(t, s, &Batch{Outbox: []OutboxOp{&Accept{
			Destination: dest, Items: pdus(t, pdu("!r", n, strings.Repeat("x", 2000))), Accepted: 1,
		}}})
	}
	wantErr(t, "full", err, ErrOutboxFull)
	return n - 1
}

func TestNoAnswerIsWrittenInAFullFileButKeysAre(t *testing.T) {
	const limit = 1 << 20
	path := newPath(t)
	s := open(t, Options{Path: path, MaxFileBytes: limit})
	want(t, "bound of keys", s.opt.MaxKeyBytes, int64(limit/8))
	fillFile(t, s, "a.test")
	for i := range 100 {
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(i, 60_000)}, Keys: []ServerKeys{someKeys(notaryName, i, 5_000)}})
	}
	want(t, "answers", s.Stats().Answers, CacheTotals{})
	want(t, "the latest keys", len(loadKeys(t, s, notaryName, numberedName(98), numberedName(99))), 2)
	if n := s.Stats().Keys.Bytes; n < limit/10 || n > limit/8 {
		t.Errorf("%d bytes of keys", n)
	}
	auditCaches(t, s)
	audit(t, path)
	for pack(t, s, "a.test", "b", 2).ID != "" {
		settle(t, s, "a.test", "b", Delivered)
	}
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 60_000)}})
	want(t, "answers when there is room", s.Stats().Answers, CacheTotals{1, 60_000})
	closeStore(t, s)
	if size := fileSize(path); size > limit+limit/4 {
		t.Errorf("%d bytes in the file", size)
	}
}

func TestAnAnswerThatFindsNoRoomDoesNotLeaveAnOlderOne(t *testing.T) {
	const limit = 1 << 20
	s := open(t, Options{Path: newPath(t), MaxFileBytes: limit})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 100)}})
	// A file that is full of keys, which do not ask.
	var b Batch
	s.writerDo(t, func(w *writer) { w.keys.maxBytes = 8 << 20 })
	for i := range 20 {
		b.Keys = append(b.Keys, someKeys(notaryName, i, MaxKeyObject))
	}
	putBatch(t, s, &b)
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 200), anAnswer(2, 200)}})
	for i := range 3 {
		_, found := loadAnswer(t, s, answerKey(i))
		want(t, "found", found, false)
	}
	auditCaches(t, s)
}

// writerDo calls f on the writer's goroutine.
func (s *Store) writerDo(t testing.TB, f func(*writer)) {
	t.Helper()
	done := make(chan struct{})
	if err := s.Submit(&Batch{}, func(error) { f(s.writer); close(done) }); err != nil {
		t.Fatal(err)
	}
	<-done
}

func TestAnswersMakeRoomForTheOutbox(t *testing.T) {
	const limit = 2 << 20
	path := newPath(t)
	fail := errInjected
	var fault atomic.Bool
	s := open(t, Options{Path: path, MaxFileBytes: limit, Fault: func(op Op) error {
		if op == OpCommit && fault.Load() {
			return fail
		}
		return nil
	}})
	i := 0
	for ; s.Stats().Answers.Rows == int64(i); i++ {
		if i == 2000 {
			t.Fatal("never full")
		}
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(i, 3000)}})
	}
	full := s.Stats().Answers
	if full.Bytes < limit/2 {
		t.Errorf("only %d bytes of answers in a full file", full.Bytes)
	}
	_, found := loadAnswer(t, s, answerKey(0))
	want(t, "the oldest", found, true)

	// The first that is accepted costs the oldest answers, unless it fails.
	op := func() *Batch {
		return &Batch{Outbox: []OutboxOp{&Accept{Destination: "a.test", Items: pdus(t, pdu("!r", 1, strings.Repeat("x", 60_000))), Accepted: 1}}}
	}
	fault.Store(true)
	wantErr(t, "commit", submit(t, s, op()), errInjected)
	want(t, "answers after a rollback", s.Stats().Answers, full)
	fault.Store(false)
	putBatch(t, s, op())
	if now := s.Stats(); now.Answers.Rows >= full.Rows || now.Pruned != full.Rows-now.Answers.Rows || now.Outbox.Items != 1 {
		t.Errorf("after accepting: %+v, pruned %d", now.Answers, now.Pruned)
	}
	_, found = loadAnswer(t, s, answerKey(0))
	want(t, "the oldest", found, false)
	auditCaches(t, s)

	// In the end the file is the outbox's alone.
	n := fillFile(t, s, "a.test")
	want(t, "answers", s.Stats().Answers, CacheTotals{})
	if n < limit*8/10/pageSize {
		t.Errorf("only %d accepted", n)
	}
	auditCaches(t, s)
	audit(t, path)
	closeStore(t, s)
	if size := fileSize(path); size > limit+64<<10 {
		t.Errorf("%d bytes in the file", size)
	}
}

func TestRowsOfCachesThatAreNotOursAreLeftOut(t *testing.T) {
	path := newPath(t)
	var log bytes.Buffer
	s := open(t, Options{Path: path, MaxAnswers: 16, MaxKeys: 16, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(0, 10)}, Keys: []ServerKeys{someKeys(notaryName, 0, 10)}})
	c := openRaw(t, path)
	answer := func(i int, size, status int64, header, body string) {
		t.Helper()
		key := answerKey(i)
		if err := c.exec(t.Context(), fmt.Sprintf("INSERT INTO answer VALUES (NULL, %d, x'%x', %d, 0, 0, 0, %d, %s, %s)",
			answerHash(&key), key, size, status, header, body)); err != nil {
			t.Fatal(err)
		}
	}
	answer(1, 5, 200, "x''", "x'00'")
	answer(2, 0, 1<<31, "x''", "x''")
	answer(3, MaxAnswerHeader+1, 200, fmt.Sprintf("zeroblob(%d)", MaxAnswerHeader+1), "x''")
	answer(4, MaxAnswerBody+1, 200, "x''", fmt.Sprintf("zeroblob(%d)", MaxAnswerBody+1))
	answer(5, 2, 200, "x'00'", "x'00'") // as ours
	for i := 1; i <= 5; i++ {
		_, found := loadAnswer(t, s, answerKey(i))
		want(t, fmt.Sprint("answer ", i), found, i == 5)
	}
	want(t, "damaged answers", s.Stats().Damaged, int64(4))
	for i, row := range []string{"7, 0, 0, x'00'", fmt.Sprintf("%d, 0, 0, zeroblob(%[1]d)", MaxKeyObject+1), "0, 0, 0, x''", "1, 0, 0, x'00'"} {
		server := numberedName(i + 1)
		if err := c.exec(t.Context(), fmt.Sprintf("INSERT INTO server_key VALUES (NULL, %d, '%s', '%s', %s)",
			keysHash(notaryName, server), notaryName, server, row)); err != nil {
			t.Fatal(err)
		}
	}
	got := loadKeys(t, s, notaryName, numberedName(0), numberedName(1), numberedName(2), numberedName(3), numberedName(4))
	want(t, "keys", got, []ServerKeys{someKeys(notaryName, 0, 10), {Via: notaryName, Server: numberedName(4), Object: []byte{0}}})
	want(t, "damaged", s.Stats().Damaged, int64(7))
	for range 100 {
		loadAnswer(t, s, answerKey(1))
	}
	if n := strings.Count(log.String(), "left out"); n != 7 { // 1, 2, 4, ... 64
		t.Errorf("%d lines in the log for %d rows:\n%s", n, s.Stats().Damaged, &log)
	}
	if err := c.exec(t.Context(), "UPDATE answer SET key = x'00' WHERE status = 200 AND size = 5"); err != nil {
		t.Fatal(err)
	}
	want(t, "index", len(index(t, s, 100)), 5) // which does not see what is in a row
	want(t, "damaged", s.Stats().Damaged, int64(108))

	// They are replaced and go like others. What the shell has put in is counted when
	// the bound seems to be reached.
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(3, 10)}, Keys: []ServerKeys{someKeys(notaryName, 1, 10)}})
	got2, found := loadAnswer(t, s, answerKey(3))
	want(t, "replaced", []any{got2, found}, []any{anAnswer(3, 10), true})
	want(t, "replaced", loadKeys(t, s, notaryName, numberedName(1)), []ServerKeys{someKeys(notaryName, 1, 10)})
	for i := range 40 {
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(100+i, 10)}, Keys: []ServerKeys{someKeys(notaryName, 100+i, 10)}})
	}
	auditCaches(t, s)
}

// A damaged file may hold anything where a number should be.
func TestASizeThatIsNoNumberIsNoReasonToFail(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxAnswers: 16})
	for i := range 16 {
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(i, 10)}})
	}
	s.writerDo(t, func(w *writer) {
		// The table has no such values; a statement that yields them has.
		del, err := w.conn.prepare(strings.Replace(answerQueries.del(), "RETURNING size", "RETURNING NULL", 1))
		if err != nil {
			t.Error(err)
		}
		oldest, err := w.conn.prepare("SELECT id, NULL FROM answer ORDER BY id")
		if err != nil {
			t.Error(err)
		}
		w.answers.del, w.answers.oldest = del, oldest
	})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(0, 10), anAnswer(16, 10)}})
	want(t, "rows", s.Stats().Answers.Rows, int64(15))
	want(t, "index", len(index(t, s, 100)), 15)
}

func TestTheReaderBeginsAnewAfterAnError(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 10)}})
	loadAnswer(t, s, answerKey(1))
	c := openRaw(t, path)
	if err := c.exec(t.Context(), "ALTER TABLE answer RENAME TO elsewhere"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, found, err := s.LoadAnswer(answerKey(1)); err == nil || found || !strings.Contains(err.Error(), path+": load answer: ") {
			t.Errorf("without the table: %v, %v", found, err)
		}
	}
	if err := c.exec(t.Context(), "ALTER TABLE elsewhere RENAME TO answer"); err != nil {
		t.Fatal(err)
	}
	_, found := loadAnswer(t, s, answerKey(1))
	want(t, "found", found, true)
}

func TestADamagedCacheIsReported(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 50_000)}, Keys: []ServerKeys{someKeys(notaryName, 1, 50_000)}})
	closeStore(t, s)
	c := openRaw(t, path)
	pages := map[string]int64{}
	for _, table := range []string{"answer", "server_key"} {
		pages[table] = count(t, c, "SELECT rootpage FROM sqlite_schema WHERE name = '"+table+"'")
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	c.stmts = nil
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if _, err := f.WriteAt(bytes.Repeat([]byte{0xee}, pageSize), (page-1)*pageSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Path: path}) // the totals are in the index
	_, _, err = s.LoadAnswer(answerKey(1))
	wantErr(t, "LoadAnswer", err, ErrCorrupt)
	wantErr(t, "LoadKeys", s.LoadKeys(notaryName, []matrix.ServerName{numberedName(1)}, func(ServerKeys) error { return nil }), ErrCorrupt)
	wantErr(t, "AnswerIndex", s.AnswerIndex(t.Context(), 1, func(AnswerInfo) error { return nil }), ErrCorrupt)
	_, _, err = s.LatestVia()
	wantErr(t, "LatestVia", err, ErrCorrupt)
	put(t, s, up("a.test")) // the rest works
}

func TestAClosedStoreLooksNothingUp(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 10)}})
	loadAnswer(t, s, answerKey(1))
	closeStore(t, s)
	_, _, err := s.LoadAnswer(answerKey(1))
	wantErr(t, "LoadAnswer", err, ErrClosed)
	wantErr(t, "LoadKeys", s.LoadKeys(notaryName, []matrix.ServerName{"a.test"}, nil), ErrClosed)
	wantErr(t, "AnswerIndex", s.AnswerIndex(t.Context(), 1, nil), ErrClosed)
	_, _, err = s.LatestVia()
	wantErr(t, "LatestVia", err, ErrClosed)
	_, _, err = s.LoadInbound("a.test", "1", 0)
	wantErr(t, "LoadInbound", err, ErrClosed)
	_, _, err = s.InboundPDUs("a.test", make([][32]byte, 1), 0)
	wantErr(t, "InboundPDUs", err, ErrClosed)
	wantErr(t, "PendingPDUs", s.PendingPDUs("a.test", 1, nil), ErrClosed)
}

// secondSchema makes a file as the fsbus before the caches made it.
func secondSchema(t *testing.T, path string) {
	t.Helper()
	makeRaw(t, path, fmt.Sprintf("PRAGMA page_size = %d; PRAGMA application_id = %d", pageSize, applicationID))
	c := openRaw(t, path)
	if _, err := migrate(t.Context(), c, path, migrations[:2]); err != nil {
		t.Fatal(err)
	}
	if err := c.exec(t.Context(), "PRAGMA journal_mode = WAL; INSERT INTO host VALUES ('a.test', 1, 'ok', 0, '', 0, 0, 0, 0, 1)"); err != nil {
		t.Fatal(err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	c.stmts = nil
}

func TestTheCachesComeWithTheThirdSchema(t *testing.T) {
	path, fresh := newPath(t), newPath(t)
	secondSchema(t, path)
	s := open(t, Options{Path: path})
	want(t, "hosts", names(load(t, s, 10)), []matrix.ServerName{"a.test"})
	b := &Batch{Answers: []Answer{anAnswer(1, 100)}, Keys: []ServerKeys{someKeys(notaryName, 1, 100)}}
	putBatch(t, s, b)
	got, _ := loadAnswer(t, s, answerKey(1))
	want(t, "answer", got, b.Answers[0])
	want(t, "keys", loadKeys(t, s, notaryName, numberedName(1)), b.Keys)
	closeStore(t, s)
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, path), schema(t, fresh))
	want(t, "version", count(t, openRaw(t, path), "PRAGMA user_version"), int64(len(migrations)))
}

func TestTheThirdSchemaIsStillOpened(t *testing.T) {
	script, err := os.ReadFile("testdata/v3.sql")
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := newPath(t), newPath(t)
	makeRaw(t, old, string(script))
	s := open(t, Options{Path: old})
	auditCaches(t, s)
	for i := 1; i <= 2; i++ {
		got, _ := loadAnswer(t, s, answerKey(i))
		want(t, "answer", got, anAnswer(i, 20*i))
	}
	want(t, "keys", loadKeys(t, s, notaryName, numberedName(1), numberedName(2)), []ServerKeys{someKeys(notaryName, 1, 20), someKeys(notaryName, 2, 40)})
	closeStore(t, s)
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, old), schema(t, fresh))
}

// TestNoStatementOfACacheScans asks SQLite how it runs the statements.
func TestNoStatementOfACacheScans(t *testing.T) {
	path := newPath(t)
	closeStore(t, open(t, Options{Path: path}))
	c := openRaw(t, path)
	for _, q := range []cacheQueries{answerQueries, keyQueries} {
		idx := "USING INDEX " + q.table + "_hash (hash=?)"
		load := loadAnswerQuery
		if q.table == "server_key" {
			load = loadKeysQuery
		}
		for query, plan := range map[string]string{
			q.del():    "SEARCH " + q.table + " " + idx,
			load:       "SEARCH " + q.table + " " + idx,
			q.count():  "SCAN " + q.table + " USING COVERING INDEX " + q.table + "_hash",
			q.oldest(): "SCAN " + q.table, // in the order of the table, and left early
			q.cut():    "SEARCH " + q.table + " USING INTEGER PRIMARY KEY (rowid<?)",
		} {
			var got []string
			if err := explain(t, c, query, &got); err != nil {
				t.Fatalf("%s: %v", query, err)
			}
			want(t, query, got, []string{plan})
		}
	}
}

package store

import (
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// lazy returns an Accept that parses body when its items are to be stored, and
// counts in calls how often.
func lazy(dest matrix.ServerName, txn string, body []byte, calls *int) *Accept {
	return &Accept{Destination: dest, TxnID: txn, Accepted: 1, Bytes: int64(len(body)), Load: func(dst []matrix.Item) ([]matrix.Item, error) {
		*calls++
		txn, err := matrix.ParseTransaction(body)
		return txn.Items(dst), err
	}}
}

func bodyOf(pdus, edus []string) []byte {
	return fmt.Appendf(nil, `{"edus":[%s],"origin":%q,"origin_server_ts":1,"pdus":[%s]}`, strings.Join(edus, ","), origin, strings.Join(pdus, ","))
}

func TestItemsThatAreLoadedAreStoredLikeOthers(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	long := strings.Repeat("x", 1000)
	p := []string{pdu("!r", 1, "short"), pdu("!r", 2, long), pdu("!r", 2, long)}
	e := []string{toDevice("1", long), presence("@u:hs1.test", "here", 1), presence("@u:hs1.test", "gone", 1), signingKey("@u:hs1.test", `"master_key":{}`)}
	calls := 0
	for i, op := range []*Accept{
		{Destination: "a.test", TxnID: "1", Accepted: 1, Items: items(t, p, e)},
		lazy("a.test", "1", bodyOf(p, e), &calls),
	} {
		op.Destination = matrix.ServerName(numbered("a", i))
		do(t, s, op)
		var brought KindTotals
		for _, it := range items(t, p, e) {
			brought.add(it.Kind, 1, int64(len(it.Payload)))
		}
		want(t, "brought", op.Result.Kinds, brought)
		want(t, "result", []int{op.Result.Accepted, op.Result.Merged, op.Result.Duplicates}, []int{5, 1, 1})
		again := *op
		do(t, s, &again)
		want(t, "repeated", again.Result, AcceptResult{Repeated: true, Destination: op.Result.Destination})
		none := &Accept{Destination: op.Destination, TxnID: "none", Accepted: 1, Load: func(dst []matrix.Item) ([]matrix.Item, error) { return nil, nil }}
		do(t, s, none)
		want(t, "of nothing", none.Result.Kinds, KindTotals{})
	}
	want(t, "loaded", calls, 1) // the repeated one is not
	without := func(name string) (list []PendingItem) {
		for _, it := range pending(t, s, matrix.ServerName(name)) {
			it.ID = 0
			list = append(list, it)
		}
		return list
	}
	want(t, "pending", without(numbered("a", 1)), without(numbered("a", 0)))
	audit(t, path)
}

func TestAnItemThatCopiesOneIsCountedAsBrought(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	list := pdus(t, pdu("!r", 1, "x"))
	first, second := accept(t, s, "a.test", "1", 1, list), accept(t, s, "a.test", "2", 1, list)
	want(t, "duplicates", second.Duplicates, 1)
	want(t, "brought", second.Kinds, first.Kinds)
	want(t, "pending", second.Destination.Kinds, first.Kinds)
}

func TestTheMemoryOfALoadIsUsedAgain(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	shared := make([]byte, 4096)
	var before *matrix.Item // the first place of the scratch
	for i := range 5 {
		text := strings.Repeat(fmt.Sprint(i), 400)
		op := &Accept{Destination: "a.test", TxnID: fmt.Sprint(i), Accepted: 1, Load: func(dst []matrix.Item) ([]matrix.Item, error) {
			if len(dst) != 0 {
				t.Errorf("%d items before the first", len(dst))
			}
			for _, it := range dst[:cap(dst)] {
				if it.Payload != nil || it.Key != "" {
					t.Errorf("left of the last: %s", it.Payload)
				}
			}
			txn, err := matrix.ParseTransaction(append(shared[:0], bodyOf([]string{pdu("!r", i, text), pdu("!s", i, "x")}, nil)...))
			dst = txn.Items(dst)
			if i > 0 && &dst[0] != before {
				t.Error("the memory is not the same")
			}
			// One that is taken back leaves its trace behind the length.
			dst = append(dst, dst[0])
			before = &dst[0]
			return dst[:2], err
		}}
		do(t, s, op)
	}
	clear(shared)
	var list []string
	for i := range 5 {
		list = append(list, pdu("!r", i, strings.Repeat(fmt.Sprint(i), 400)), pdu("!s", i, "x"))
	}
	want(t, "pending", payloads(pending(t, s, "a.test")), strings.Join(list, "\n")+"\n")

	many := &Accept{Destination: "b.test", Accepted: 1, Load: func(dst []matrix.Item) ([]matrix.Item, error) {
		for range maxScratch + 1 {
			dst = append(dst, matrix.Item{Kind: matrix.KindOther, Payload: []byte("{}")})
		}
		return dst, nil
	}}
	do(t, s, many)
	want(t, "many", many.Result.Accepted, maxScratch+1)
	if n := cap(s.writer.outbox.scratch); n > maxScratch {
		t.Errorf("room for %d items is kept", n)
	}
}

func TestALoadedBodyIsNotKept(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	var freed atomic.Int32
	store := func(fails bool) {
		body := bodyOf([]string{pdu("!r", 1, strings.Repeat("x", 1000))}, []string{typing("!r", "@u:hs1.test", true)})
		runtime.AddCleanup(&body[0], func(int) { freed.Add(1) }, 0)
		err := submit(t, s, &Batch{Outbox: []OutboxOp{&Accept{Destination: "a.test", Accepted: 1, Load: func(dst []matrix.Item) ([]matrix.Item, error) {
			txn, err := matrix.ParseTransaction(body)
			if dst = txn.Items(dst); fails {
				err = errInjected
			}
			return dst, err
		}}}})
		if (err != nil) != fails {
			t.Fatal(err)
		}
	}
	store(false)
	store(true)
	for range 500 {
		if runtime.GC(); freed.Load() == 2 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d of 2 bodies are freed", freed.Load())
}

func TestAnErrorOfALoadIsThatOfItsBatch(t *testing.T) {
	g := newGate(OpBegin)
	path := newPath(t)
	s := open(t, Options{Path: path, Fault: g.fault})
	g.hold(t, s)
	var calls [3]int
	done := make(chan error, len(calls))
	for i := range calls {
		op := lazy(matrix.ServerName(numbered("a", i)), "1", bodyOf([]string{pdu("!r", i, strings.Repeat("x", 500))}, nil), &calls[i])
		if i == 1 {
			load := op.Load
			op.Load = func(dst []matrix.Item) ([]matrix.Item, error) {
				dst, _ = load(dst)
				return dst, errInjected
			}
		}
		if err := s.Submit(&Batch{Hosts: []Host{up(numbered("h", i))}, Outbox: []OutboxOp{op}}, func(err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
	}
	g.leave <- nil
	for i := range calls {
		err := <-done
		if i != 1 {
			want(t, fmt.Sprint("error of ", i), err, nil)
			continue
		}
		wantErr(t, "the failing one", err, ErrInvalid)
		wantErr(t, "the failing one", err, errInjected)
	}
	// The first attempt ends at the error; in the second each batch has its own.
	want(t, "loaded", calls, [3]int{2, 2, 1})
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 2, Items: 2})
	want(t, "hosts", len(load(t, s, 10)), 2)
	want(t, "commits", s.Stats().Commits, int64(2))
	bad := &Accept{Destination: "a.test", Load: func(dst []matrix.Item) ([]matrix.Item, error) { return append(dst, matrix.Item{}), nil }}
	wantErr(t, "an item of no kind", submit(t, s, &Batch{Outbox: []OutboxOp{bad}}), ErrInvalid)
	audit(t, path)
}

func TestWhatIsToBeLoadedCountsByItsBytes(t *testing.T) {
	load := func(dst []matrix.Item) ([]matrix.Item, error) { return dst, nil }
	none := (&Accept{Load: load, Bytes: -1}).size()
	want(t, "size", (&Accept{Load: load, Bytes: 1000}).size(), none+1000)
	some := pdus(t, pdu("!r", 1, "x"))
	want(t, "size with items", (&Accept{Items: some, Load: load, Bytes: 1 << 30}).size(), (&Accept{Items: some}).size())

	g := newGate(OpBegin)
	s := open(t, Options{Path: newPath(t), Fault: g.fault})
	g.hold(t, s)
	var r recorder
	for i := range 7 {
		r.submit(t, s, i, &Batch{Outbox: []OutboxOp{&Accept{Destination: "a.test", Accepted: 1, Load: load, Bytes: 300 << 10}}})
	}
	g.leave <- nil
	r.want(t, 7, nil)
	want(t, "commits", s.Stats().Commits, int64(1+3)) // three to a MiB
	wantErr(t, "too large", s.Submit(&Batch{Outbox: []OutboxOp{&Accept{Load: load, Bytes: DefaultQueueBytes}}}, func(error) {}), ErrTooLarge)
}

// A slow disk does not hold up many transactions for longer than a few: those that
// wait share a sync. 2 kB is a transaction with one event.
func TestAThousandTransactionsTakeTenSyncsAtMost(t *testing.T) {
	const n, size, latency, most = 1000, 2000, 10 * time.Millisecond, 10
	g := newGate(OpCommit)
	var syncs atomic.Int64
	path := newPath(t)
	s := open(t, Options{Path: path, Fault: func(op Op) error {
		if op == OpCommit {
			syncs.Add(1)
			time.Sleep(latency) // as the disk would
		}
		return g.fault(op)
	}})
	g.hold(t, s)
	var r recorder
	calls := 0
	for i := range n {
		body := bodyOf([]string{pdu("!r", i, strings.Repeat("x", size))}, nil)
		r.submit(t, s, i, &Batch{Outbox: []OutboxOp{lazy(matrix.ServerName(numbered("a", i)), "1", body, &calls)}})
	}
	before := syncs.Load()
	g.leave <- nil
	r.want(t, n, nil)
	if took := syncs.Load() - before; took < 1 || took > most {
		t.Errorf("%d syncs for %d transactions, want 1 to %d", took, n, most)
	}
	want(t, "commits", s.Stats().Commits, syncs.Load())
	want(t, "commits that accepted", s.Stats().Accepting, syncs.Load()-before)
	want(t, "pending", s.Stats().Outbox.Items, int64(n))
	audit(t, path)
}

func TestCommitsThatAcceptAreCounted(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	accepting := func(of string, n int64) {
		t.Helper()
		want(t, "commits that accepted, after "+of, s.Stats().Accepting, n)
	}
	put(t, s, up("a.test"))
	accepting("a host", 0)
	do(t, s, &Pack{Destination: "a.test", NewID: "b", Now: 1, Origin: origin, MaxBytes: 1 << 20}, &Accept{Destination: "a.test", Items: pdus(t, pdu("!r", 1, "x")), Accepted: 1})
	accepting("a pack and an accept", 1)
	pack(t, s, "a.test", "b", 2)
	accepting("a pack", 1)
	bad := &Accept{Destination: "a.test", Items: []matrix.Item{{}}}
	wantErr(t, "an item of no kind", submit(t, s, &Batch{Outbox: []OutboxOp{bad}}), ErrInvalid)
	accepting("one that was refused", 1)
}

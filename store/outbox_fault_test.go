package store

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"fsbus/bus/matrix"
)

// snapshot is all that can be read of an outbox.
func snapshot(t *testing.T, s *Store, dests ...matrix.ServerName) string {
	t.Helper()
	text := fmt.Sprintf("%+v\n", loadOutbox(t, s))
	for _, d := range dests {
		for _, it := range pending(t, s, d) {
			text += fmt.Sprintf("%+v\n", it)
		}
	}
	if err := s.LoadAside(t.Context(), func(a Aside) error {
		text += fmt.Sprintf("%+v\n", a)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	frozen, err := value[string](t.Context(), openRaw(t, s.opt.Path), "SELECT coalesce(group_concat(frozen), '') FROM dest")
	if err != nil {
		t.Fatal(err)
	}
	return text + fmt.Sprintf("%s\n%+v", frozen, s.Stats().Outbox)
}

// everyOp returns one of each operation, to be done in this order.
func everyOp(t *testing.T) []OutboxOp {
	big := strings.Repeat("x", 5000)
	list := items(t, []string{pdu("!r", 1, big), pdu("!r", 2, "x")}, []string{toDevice("1", big), presence("@u:hs1.test", big, 1)})
	newer := items(t, nil, []string{presence("@u:hs1.test", big+"newer", 1), deviceList("@u:hs1.test", "B", 2, big, 1)})
	return []OutboxOp{
		&Accept{Destination: "a.test", TxnID: "0", Accepted: 1, Load: func(dst []matrix.Item) ([]matrix.Item, error) {
			return append(append(dst, list...), edus(t, deviceList("@u:hs1.test", "B", 1, big, 0))...), nil
		}},
		&Pack{Destination: "a.test", NewID: "b0", Now: 1, Origin: origin, MaxBytes: 1 << 20},
		&Accept{Destination: "a.test", TxnID: "1", Items: newer, Accepted: 1},
		&Settle{Destination: "a.test", TxnID: "b0", Outcome: Thaw, Now: 1},
		&Pack{Destination: "a.test", NewID: "b1", Now: 2, Origin: origin, MaxBytes: 1 << 20},
		&Settle{Destination: "a.test", TxnID: "b1", Outcome: Bisect, Now: 3},
		&Pack{Destination: "a.test", NewID: "b2", Now: 4, Origin: origin, MaxBytes: 1 << 20},
		&Settle{Destination: "a.test", TxnID: "b2", Outcome: Bisect, Now: 5},
		&Pack{Destination: "a.test", NewID: "b3", Now: 6, Origin: origin, MaxBytes: 1 << 20},
		&Settle{Destination: "a.test", TxnID: "b3", Outcome: Bisect, Now: 7, Reason: "refused"},
		&Pack{Destination: "a.test", NewID: "b4", Now: 8, Origin: origin, MaxBytes: 1 << 20},
		&Settle{Destination: "a.test", TxnID: "b4", Outcome: Delivered, Now: 9},
		&Pack{Destination: "a.test", NewID: "b5", Now: 10, Origin: origin, MaxBytes: 1 << 20},
		&Settle{Destination: "a.test", TxnID: "b5", Outcome: Delivered, Now: 11},
		&Accept{Destination: "b.test", TxnID: "1", Items: list, Accepted: 10},
		&Compact{Destination: "b.test", Now: 11},
		&Hold{Destination: "b.test", Held: true},
		&Expire{Now: 100_000_000},
		&Drop{Destination: "b.test", Through: maxSeq, PDUs: true},
		&RetryAside{Destination: "a.test", Now: 12},
		&Pack{Destination: "a.test", NewID: "b6", Now: 13, Origin: origin, MaxBytes: 1 << 20},
		&Settle{Destination: "a.test", TxnID: "b6", Outcome: Bisect, Now: 14},
		&ForgetAside{Through: 2},
	}
}

func TestADiskFullAtAnyOperationChangesNothing(t *testing.T) {
	for _, op := range []Op{OpBegin, OpCommit} {
		t.Run(string(op), func(t *testing.T) {
			var full atomic.Bool
			path := newPath(t)
			s := open(t, Options{Path: path, Fault: func(o Op) error {
				if o == op && full.Load() {
					return syscall.ENOSPC
				}
				return nil
			}})
			for _, o := range everyOp(t) {
				before := snapshot(t, s, "a.test", "b.test")
				full.Store(true)
				wantErr(t, o.String(), submit(t, s, &Batch{Outbox: []OutboxOp{o}}), ErrFull)
				full.Store(false)
				want(t, o.String(), snapshot(t, s, "a.test", "b.test"), before)
				do(t, s, o)
				if after := snapshot(t, s, "a.test", "b.test"); after == before {
					t.Errorf("%s did nothing", o)
				}
				audit(t, path)
			}
		})
	}
}

func TestAFileThatFillsUpInTheMiddleOfAnOperationChangesNothing(t *testing.T) {
	path := newPath(t)
	var s *Store
	pages := make(chan int64, 1) // a new limit for the writer's connection
	s = open(t, Options{Path: path, Fault: func(op Op) error {
		if op != OpBegin {
			return nil
		}
		select {
		case n := <-pages:
			return s.writer.conn.exec(context.Background(), fmt.Sprintf("PRAGMA max_page_count = %d", n))
		default:
			return nil
		}
	}})
	raw := openRaw(t, path)
	failed := 0
	for _, o := range everyOp(t) {
		before := snapshot(t, s, "a.test", "b.test")
		used := count(t, raw, "PRAGMA page_count")
		for more := int64(0); ; more++ { // pages, one more at each attempt
			pages <- used + more
			err := submit(t, s, &Batch{Outbox: []OutboxOp{o}})
			if err == nil {
				break
			}
			wantErr(t, o.String(), err, ErrFull)
			want(t, o.String(), snapshot(t, s, "a.test", "b.test"), before)
			audit(t, path)
			failed++
			if more == 100 {
				t.Fatal("never enough")
			}
		}
	}
	if failed < 4 {
		t.Errorf("only %d failures", failed)
	}
	want(t, "items", s.Stats().Outbox.Items, int64(0))
}

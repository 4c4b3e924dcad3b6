package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

// long is more than lies in an item.
var long = strings.Repeat("x", 2*inlineBytes)

// shell does to a file what an admin's shell, or damage, might do.
func shell(t testing.TB, path, script string) {
	t.Helper()
	if err := openRaw(t, path).exec(t.Context(), script); err != nil {
		t.Fatal(err)
	}
}

func asides(t testing.TB, s *Store) (list []Aside) {
	t.Helper()
	if err := s.LoadAside(t.Context(), func(a Aside) error { list = append(list, a); return nil }); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestADamagedRowRefusesOnlyWhatNeedsIt(t *testing.T) {
	for name, damage := range map[string]string{
		"totals":                     "UPDATE dest SET kinds = x'ff' WHERE name = 'bad.test'",
		"frozen batch":               "UPDATE dest SET frozen = '{' WHERE name = 'bad.test'",
		"a kind in the frozen batch": `UPDATE dest SET frozen = '[{"kinds":[{"kind":99}]}]' WHERE name = 'bad.test'`,
	} {
		t.Run(name, func(t *testing.T) {
			path := newPath(t)
			g := newGate(OpBegin)
			s := open(t, Options{Path: path, Fault: g.fault})
			accept(t, s, "bad.test", "1", 1000, pdus(t, pdu("!r", 1, long)))
			accept(t, s, "other.test", "1", 1000, items(t, []string{pdu("!r", 2, "o")}, []string{typing("!r", "@u:hs1.test", true)}))
			pack(t, s, "other.test", "o", 1001)
			accept(t, s, "late.test", "1", 1000, edus(t, typing("!r", "@u:hs1.test", true)))
			shell(t, path, damage)
			g.hold(t, s)
			damaged := &Batch{Hosts: []Host{up("h.test")}, Outbox: []OutboxOp{&Pack{Destination: "bad.test", NewID: "f", Now: 2, Origin: origin, MaxBytes: 1 << 20}}}
			a := &Accept{Destination: "good.test", TxnID: "1", Items: pdus(t, pdu("!r", 3, long)), Accepted: 2}
			st := &Settle{Destination: "other.test", TxnID: "o", Outcome: Delivered}
			ex := &Expire{Now: 100_000}
			done := make(chan error, 4)
			for _, b := range []*Batch{{Outbox: []OutboxOp{a}}, damaged, {Outbox: []OutboxOp{st}}, {Outbox: []OutboxOp{ex}}} {
				if err := s.Submit(b, func(err error) { done <- err }); err != nil {
					t.Fatal(err)
				}
			}
			g.leave <- nil
			for i := range 4 {
				err := <-done
				if (i == 1) != errors.Is(err, ErrDamagedRow) || (i == 1) != (err != nil) {
					t.Errorf("batch %d: %v", i, err)
				}
				if i == 1 {
					wantErr(t, "it is damage", err, ErrCorrupt)
				}
			}
			want(t, "accepted", a.Result.Accepted, 1)
			want(t, "delivered", st.Result.Delivered.Sum().Items, int64(2))
			want(t, "expired, destinations", []any{ex.Result.Expired.Sum().Items, len(ex.Result.Destinations), ex.Result.Next}, []any{int64(1), 1, int64(0)})
			want(t, "hosts", len(load(t, s, 9)), 0)
			want(t, "items", s.Stats().Outbox.Items, int64(2))
			want(t, "commits, failed", []int64{s.Stats().Commits, s.Stats().Failed}, []int64{6, 1})
		})
	}
}

// The body of a payload is gone: the queues that have it lose that and nothing else.
func TestAnItemWithoutItsBodyIsSetAside(t *testing.T) {
	path := newPath(t)
	g := newGate(OpBegin)
	s := open(t, Options{Path: path, Fault: g.fault})
	bad := pdu("!r", 2, long)
	for _, dest := range []matrix.ServerName{"a.test", "b.test"} {
		accept(t, s, dest, "1", 10, items(t, []string{pdu("!r", 1, "before"), bad, pdu("!r", 3, "after")}, []string{toDevice("m", "t")}))
	}
	shell(t, path, "DELETE FROM body")
	g.hold(t, s)
	p := &Pack{Destination: "a.test", NewID: "f", Now: 20, Origin: origin, MaxBytes: 1 << 20}
	a := &Accept{Destination: "good.test", TxnID: "1", Items: pdus(t, pdu("!g", 1, "hello")), Accepted: 20}
	done := make(chan error, 2)
	for _, op := range []OutboxOp{p, a} {
		if err := s.Submit(&Batch{Outbox: []OutboxOp{op}}, func(err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
	}
	g.leave <- nil
	if err := errors.Join(<-done, <-done); err != nil {
		t.Fatal(err)
	}
	r := p.Result
	want(t, "packed, set aside, damaged", []any{r.ID, r.PDUs, r.EDUs, r.SetAside, r.Damaged}, []any{"f", 2, 1, 1, 1})
	want(t, "pending", r.Destination.Kinds.Sum().Items, int64(3))
	want(t, "aside", asides(t, s), []Aside{{
		ID: 1, Destination: "a.test", Kind: matrix.KindPDU, Accepted: 10, At: 20, Reason: "its payload is damaged",
	}})
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 3, Items: 8, Aside: 1})
	want(t, "delivered", settle(t, s, "a.test", "f", Delivered).Destination.Kinds, KindTotals{})
	pack(t, s, "b.test", "f", 20)
	audit(t, path)
	closeStore(t, s)
	s = open(t, Options{Path: path})
	want(t, "totals after a restart", s.Stats().Outbox, OutboxTotals{Destinations: 3, Items: 4, Aside: 2})
	f := &ForgetAside{Through: 2}
	do(t, s, f)
	want(t, "forgotten", f.Result, KindTotal{Items: 2})
	accept(t, s, "a.test", "2", 30, pdus(t, bad)) // nothing is left that it could refer to
	want(t, "accepted again", pack(t, s, "a.test", "f2", 31).PDUs, 1)
	audit(t, path)
}

func TestADamagedItemOfAFrozenBatchIsSetAside(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	accept(t, s, "a.test", "1", 1, pdus(t, pdu("!r", 1, long), pdu("!r", 2, "short")))
	pack(t, s, "a.test", "b1", 2)
	accept(t, s, "alone.test", "1", 1, pdus(t, pdu("!r", 1, long)))
	pack(t, s, "alone.test", "b1", 2)
	accept(t, s, "bisect.test", "1", 1, pdus(t, pdu("!r", 1, long)))
	pack(t, s, "bisect.test", "b1", 2)
	shell(t, path, "DELETE FROM body")
	for range 2 {
		p := pack(t, s, "a.test", "b2", 3)
		want(t, "the rest", []any{p.ID, p.Again, p.PDUs, p.Destination.Kinds.Sum().Items}, []any{"b1", true, 1, int64(1)})
	}
	p := pack(t, s, "alone.test", "b2", 3)
	want(t, "nothing else", []any{p.ID, p.Again, p.SetAside, p.Destination.Frozen, p.Destination.Kinds}, []any{"", false, 1, false, KindTotals{}})
	want(t, "it is stored", loadOutbox(t, s)["alone.test"], Destination{})
	r := settle(t, s, "bisect.test", "b1", Bisect)
	want(t, "refused", []any{r.SetAside.Reason, r.Destination.Kinds}, []any{"refused", KindTotals{}})
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 3, Items: 1, Aside: 3})
	settle(t, s, "a.test", "b1", Delivered)
	audit(t, path)
}

// A kind that is none, or one of another lane, for which matrix.Builder would panic.
func TestAnItemWithADamagedRowIsSetAside(t *testing.T) {
	for _, kind := range []int{0, 99, int(matrix.KindToDevice), int(matrix.KindPresence)} {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			accept(t, s, "a.test", "1", 1, items(t, []string{pdu("!r", 1, "a"), pdu("!r", 2, "bad"), pdu("!r", 3, "c")}, []string{toDevice("m", "t")}))
			accept(t, s, "late.test", "1", 1, edus(t, typing("!r", "@u:hs1.test", true), typing("!s", "@u:hs1.test", true)))
			shell(t, path, fmt.Sprintf("UPDATE item SET kind = %d WHERE depth = 2 OR dest = 2 AND seq = (SELECT min(seq) FROM item WHERE dest = 2)", kind))
			wantErr(t, "LoadItems", s.LoadItems(t.Context(), "a.test", func(PendingItem) error { return nil }), ErrDamagedRow)
			e := &Expire{Now: 1_000_000}
			do(t, s, e)
			want(t, "expired before it is packed", e.Result.Expired.Sum().Items, int64(0))
			p := pack(t, s, "a.test", "f", 2)
			want(t, "packed, set aside, damaged", []int{p.PDUs, p.EDUs, p.SetAside, p.Damaged}, []int{2, 1, 1, 1})
			var kinds KindTotals
			kinds.add(matrix.KindPDU, 2, int64(len(pdu("!r", 1, "a"))+len(pdu("!r", 3, "c"))))
			kinds.add(matrix.KindToDevice, 1, int64(len(toDevice("m", "t"))))
			want(t, "pending", p.Destination.Kinds, kinds)
			p = pack(t, s, "late.test", "f", 1_000_000)
			want(t, "expired, set aside", []any{p.Expired.Sum().Items, p.SetAside, p.Destination.Kinds}, []any{int64(1), 1, KindTotals{}})
			list := asides(t, s)
			want(t, "aside", list, []Aside{
				{ID: 1, Destination: "a.test", Kind: matrix.KindPDU, Accepted: 1, At: 2, Reason: "its row is damaged", Payload: []byte(pdu("!r", 2, "bad"))},
				{ID: 2, Destination: "late.test", Kind: matrix.KindTyping, Accepted: 1, At: 1_000_000, Reason: "its row is damaged", Payload: []byte(typing("!r", "@u:hs1.test", true))},
			})
			audit(t, path)
		})
	}
}

func TestEachLaneHasAKind(t *testing.T) {
	for l := matrix.Lane(1); l <= matrix.NumLanes; l++ {
		want(t, "lane", kindIn(l, 0).Lane(), l)
	}
}

// More damaged items than go in one step.
func TestDamagedItemsGoInSteps(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxAside: 10})
	var list []matrix.Item
	for i := range maxTrim + 10 {
		list = append(list, pdus(t, pdu("!r", i, long))...)
	}
	accept(t, s, "a.test", "1", 1, list)
	accept(t, s, "a.test", "2", 1, pdus(t, pdu("!r", 1, "good")))
	shell(t, path, "DELETE FROM body")
	p := pack(t, s, "a.test", "f", 2)
	want(t, "first step", []any{p.ID, p.SetAside, p.Destination.Kinds.Sum().Items}, []any{"", maxTrim, int64(11)})
	p = pack(t, s, "a.test", "f", 2)
	want(t, "second step", []any{p.ID, p.SetAside, p.PDUs, p.Destination.Kinds.Sum().Items}, []any{"f", 10, 1, int64(1)})
	want(t, "kept", s.Stats().Outbox.Aside, int64(10))
	audit(t, path)
}

func TestNothingMergesIntoADamagedItem(t *testing.T) {
	const u = "@u:hs1.test"
	for _, c := range []struct {
		name        string
		first, next string
		merged      int
		left        int64 // what is packed then
	}{
		{"replaced", presence(u, long, 1), presence(u, long+"new", 1), 1, 1},
		{"fields", signingKey(u, `"master_key":{"k":"`+long+`"}`), signingKey(u, `"self_signing_key":{"k":2}`), 0, 1},
		{"chain", deviceList(u, "A", 1, long, 0), deviceList(u, "A", 2, long, 1), 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			accept(t, s, "a.test", "1", 1, edus(t, c.first))
			shell(t, path, "DELETE FROM body")
			r := accept(t, s, "a.test", "2", 2, edus(t, c.next))
			want(t, "merged", r.Merged, c.merged)
			p := pack(t, s, "a.test", "f", 2)
			want(t, "packed", p.Kinds.Sum().Items, c.left)
			if !strings.Contains(string(p.Body), c.next[len(`{"content":{`):len(c.next)/2]) && c.name != "replaced" {
				t.Errorf("packed %s", p.Body)
			}
			want(t, "set aside", p.SetAside, 1-c.merged)
			audit(t, path)
		})
	}
	t.Run("damaged row in the chain", func(t *testing.T) {
		path := newPath(t)
		s := open(t, Options{Path: path})
		accept(t, s, "a.test", "1", 1, edus(t, deviceList(u, "A", 1, "", 0), deviceList(u, "B", 2, "", 1)))
		loosen(t, path)
		s = reopen(t, s)
		shell(t, path, "UPDATE item SET accepted = NULL WHERE seq = (SELECT max(seq) FROM item)")
		a := &Accept{Destination: "a.test", Items: edus(t, deviceList(u, "A", 3, "", 2)), Accepted: 2}
		wantErr(t, "merging", submit(t, s, &Batch{Outbox: []OutboxOp{a}}), ErrDamagedRow)
		p := pack(t, s, "a.test", "f", 3)
		want(t, "packed, set aside", []int{p.EDUs, p.SetAside}, []int{1, 1})
	})
	t.Run("damaged row", func(t *testing.T) {
		path := newPath(t)
		s := open(t, Options{Path: path})
		accept(t, s, "a.test", "1", 1, edus(t, presence(u, "old", 1), deviceList(u, "A", 1, "", 0), deviceList(u, "B", 2, "", 1)))
		loosen(t, path)
		s = reopen(t, s)
		shell(t, path, "UPDATE item SET accepted = NULL")
		for _, list := range [][]matrix.Item{edus(t, presence(u, "new", 1)), edus(t, deviceList(u, "A", 3, "", 2))} {
			err := submit(t, s, &Batch{Outbox: []OutboxOp{&Accept{Destination: "a.test", Items: list, Accepted: 2}}})
			wantErr(t, "merging", err, ErrDamagedRow)
		}
		p := pack(t, s, "a.test", "f", 3)
		want(t, "set aside", []any{p.ID, p.SetAside, p.Damaged, p.Destination.Kinds}, []any{"", 3, 3, KindTotals{}})
		accept(t, s, "a.test", "2", 4, edus(t, presence(u, "new", 1)))
		want(t, "then", pack(t, s, "a.test", "f", 5).EDUs, 1)
		want(t, "aside, accepted", asides(t, s)[0].Accepted, int64(0))
	})
}

// What cannot have reached anybody waits again whatever is damaged of it, or of what
// came since.
func TestDamagedItemsThaw(t *testing.T) {
	const u = "@u:hs1.test"
	for _, c := range []struct {
		name            string
		frozen, newer   string
		script          string
		merged          int
		packed, damaged int64 // of both
	}{
		{"frozen presence", presence(u, long, 1), presence(u, "new", 1), "DELETE FROM body", 1, 1, 0},
		{"newer presence", presence(u, "old", 1), presence(u, long, 1), "DELETE FROM body", 1, 0, 1},
		{"frozen keys", signingKey(u, `"master_key":{"k":"`+long+`"}`), signingKey(u, `"self_signing_key":{"k":2}`), "DELETE FROM body", 0, 1, 1},
		{"newer keys", signingKey(u, `"master_key":{"k":1}`), signingKey(u, `"self_signing_key":{"k":"`+long+`"}`), "DELETE FROM body", 0, 1, 1},
		{"frozen list", deviceList(u, "A", 1, long, 0), deviceList(u, "A", 2, "", 1), "DELETE FROM body", 0, 1, 1},
		{"newer list", deviceList(u, "A", 1, "", 0), deviceList(u, "A", 2, long, 1), "DELETE FROM body", 0, 1, 1},
		{"kind of the frozen one", signingKey(u, `"master_key":{"k":1}`), signingKey(u, `"self_signing_key":{"k":2}`),
			"UPDATE item SET kind = 99 WHERE seq = (SELECT min(seq) FROM item)", 0, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			accept(t, s, "a.test", "1", 1, edus(t, c.frozen))
			pack(t, s, "a.test", "b1", 2)
			accept(t, s, "a.test", "2", 3, edus(t, c.newer))
			shell(t, path, c.script)
			r := settle(t, s, "a.test", "b1", Thaw)
			want(t, "thawed, merged", []any{r.Thawed, r.Merged}, []any{true, c.merged})
			p := pack(t, s, "a.test", "b2", 4)
			want(t, "packed, damaged", []int64{p.Kinds.Sum().Items, int64(p.Damaged)}, []int64{c.packed, c.damaged})
			want(t, "pending", p.Destination.Kinds, p.Kinds)
			audit(t, path)
		})
	}
}

// loosen lets the tables of items hold anything, as damage may leave it, from the next
// Open on: a STRICT table takes no such values.
func loosen(t testing.TB, path string) {
	t.Helper()
	shell(t, path, `PRAGMA writable_schema = ON;
		UPDATE sqlite_schema SET sql = replace(replace(sql, 'NOT NULL', ''), 'STRICT,', '') WHERE name IN ('item', 'aside');
		UPDATE sqlite_schema SET sql = replace(replace(sql, 'NOT NULL', ''), ') STRICT', ')') WHERE name = 'aside'`)
}

func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	opt := s.opt
	closeStore(t, s)
	return open(t, opt)
}

// Every number of an item, but for what it is found by, may be damaged, and so may
// those of what is set aside already.
func TestDamagedNumbersKeepNoQueueUp(t *testing.T) {
	for _, column := range []string{"kind", "accepted", "lifetime", "size", "key"} {
		for _, value := range []string{"NULL", "'text'", "1.5"} {
			if column == "key" && value == "NULL" {
				continue // it has none
			}
			t.Run(column+" "+value, func(t *testing.T) {
				path := newPath(t)
				s := open(t, Options{Path: path, MaxAside: 1})
				accept(t, s, "other.test", "1", 1, []matrix.Item{{Kind: matrix.KindReceipt, Key: "k", Payload: []byte(`{"no":"receipt"}`)}})
				pack(t, s, "other.test", "f", 2)
				accept(t, s, "a.test", "1", 1, items(t, []string{pdu("!r", 1, long), pdu("!r", 2, "b")}, []string{typing("!r", "@u:hs1.test", true)}))
				loosen(t, path)
				s = reopen(t, s)
				shell(t, path, "UPDATE item SET "+column+" = "+value+" WHERE depth = 1; UPDATE aside SET size = "+value)
				p := pack(t, s, "a.test", "f", 2)
				want(t, "packed, set aside", []int{p.PDUs, p.EDUs, p.SetAside}, []int{1, 1, 1})
				var kinds KindTotals
				kinds.add(matrix.KindPDU, 1, int64(len(pdu("!r", 2, "b"))))
				kinds.add(matrix.KindTyping, 1, int64(len(typing("!r", "@u:hs1.test", true))))
				want(t, "pending", p.Destination.Kinds, kinds)
				want(t, "oldest", p.Destination.Oldest, int64(1))
				want(t, "kept of it", string(asides(t, s)[0].Payload), pdu("!r", 1, long))
				settle(t, s, "a.test", "f", Delivered)
				audit(t, path)
			})
		}
	}
}

// What is damaged behind the batch counts, but for what it does not say, until it is its
// turn. And it holds up neither what stands before it nor what follows.
func TestDamageBehindTheBatchWaitsForItsTurn(t *testing.T) {
	for _, value := range []string{"NULL", "'text'", "1.5"} {
		t.Run(value, func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			var list []string
			for i := range 60 {
				list = append(list, pdu("!r", i, "x"))
			}
			accept(t, s, "a.test", "1", 5, append(pdus(t, list[:30]...), pdus(t, list[30:]...)...))
			size := func(from, to int) (n int64) {
				for _, p := range list[from:to] {
					n += int64(len(p))
				}
				return n
			}
			loosen(t, path)
			s = reopen(t, s)
			shell(t, path, fmt.Sprintf("UPDATE item SET size = %s, accepted = %[1]s WHERE depth IN (0, 52)", value))
			do(t, s, &Drop{Destination: "a.test", Through: maxSeq}) // of the EDUs, of which there are none
			want(t, "items", s.Stats().Outbox.Items, int64(60))
			p := pack(t, s, "a.test", "f", 6)
			want(t, "packed, set aside", []int{p.PDUs, p.SetAside}, []int{matrix.MaxPDUs, 1})
			got := p.Destination.Kinds[matrix.KindPDU]
			if left := size(1, 52) + size(53, 60); got.Items != 59 || got.Bytes != left && (value != "1.5" || got.Bytes != left+1) {
				t.Errorf("pending %+v, want 59 and %d", got, left)
			}
			r := settle(t, s, "a.test", "f", Delivered)
			want(t, "left", r.Destination.Kinds.Sum().Items, int64(9))
			p = pack(t, s, "a.test", "f", 7)
			want(t, "packed, set aside", []int{p.PDUs, p.SetAside}, []int{8, 1})
			want(t, "pending", p.Destination.Kinds.Sum(), KindTotal{8, size(51, 52) + size(53, 60)})
			want(t, "oldest", p.Destination.Oldest, int64(5))
			settle(t, s, "a.test", "f", Delivered)
			audit(t, path)
		})
	}
}

func TestPackPutsWrongTotalsRight(t *testing.T) {
	for _, c := range []struct {
		name, script string
		packed, left int64 // at the second attempt
	}{
		{"no item", "DELETE FROM item WHERE dest = 1", 0, 0},
		{"none of its lane", "UPDATE item SET dest = 9 WHERE dest = 1; UPDATE item SET dest = 1, lane = 1, kind = 1 WHERE dest = 2", 1, 1},
		{"totals below zero", "DELETE FROM item WHERE dest = 1; UPDATE dest SET kinds = x'0000ffffffffffffffffff0100'", 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			accept(t, s, "a.test", "1", 1, pdus(t, pdu("!r", 1, "one")))
			accept(t, s, "b.test", "1", 7, edus(t, toDevice("1", "one")))
			shell(t, path, c.script)
			p := pack(t, s, "a.test", "f", 2)
			want(t, "first", []any{p.ID, p.Destination.Kinds.Sum().Items, p.Destination.Frozen}, []any{"", c.left, false})
			want(t, "oldest", p.Destination.Oldest, 7*c.left)
			want(t, "stored", loadOutbox(t, s)["a.test"].Kinds, p.Destination.Kinds)
			want(t, "items in all", s.Stats().Outbox.Items, 1+c.left)
			p = pack(t, s, "a.test", "f", 2)
			want(t, "second", p.Kinds.Sum().Items, c.packed)
			if c.packed == 0 {
				rows := s.Stats().Rows
				pack(t, s, "a.test", "f", 2)
				want(t, "rows of a third", s.Stats().Rows-rows, int64(0))
			}
		})
	}
}

// A frozen batch of which nothing can be packed, and nothing behind it: what was
// deleted is also stored as deleted.
func TestAFrozenBatchThatCannotBePackedIsNotKept(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	accept(t, s, "a.test", "1", 1, pdus(t, pdu("!r", 1, "one")))
	pack(t, s, "a.test", "f", 2)
	shell(t, path, "UPDATE item SET bytes = x'20'")
	p := pack(t, s, "a.test", "g", 3)
	want(t, "set aside", []any{p.ID, p.Again, p.SetAside, p.Damaged}, []any{"", false, 1, 0})
	want(t, "left", len(loadOutbox(t, s)), 0)
	want(t, "items", s.Stats().Outbox.Items, int64(0))
	audit(t, path)
	closeStore(t, s)
	s = open(t, Options{Path: path})
	want(t, "items after a restart", s.Stats().Outbox.Items, int64(0))
	if err := s.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

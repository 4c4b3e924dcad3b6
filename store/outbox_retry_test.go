package store

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

// aside puts items aside, each at a moment, as if their destination had refused them.
func aside(t *testing.T, s *Store, dest matrix.ServerName, at int64, items ...matrix.Item) {
	t.Helper()
	for i := range items {
		do(t, s, &Accept{Destination: dest, Items: items[i : i+1], Accepted: at - 10})
		p := pack(t, s, dest, fmt.Sprint("b", at, i), at)
		op := &Settle{Destination: dest, TxnID: p.ID, Outcome: Bisect, Now: at, Reason: "refused"}
		if do(t, s, op); op.Result.SetAside == nil {
			t.Fatal("it is not set aside")
		}
	}
}

func TestWhatIsSetAsideIsTriedAgain(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	pdu := []byte(`{"content":{},"depth":7,"room_id":"!r:x","type":"m.room.message"}`)
	txn, err := matrix.ParseTransaction(fmt.Appendf(nil, `{"pdus":[%s],"edus":[{"edu_type":"m.receipt","content":{"!r:x":{"m.read":{"@u:x":{"event_ids":["$a"],"data":{"ts":1}}}}}}]}`, pdu))
	if err != nil && !errors.Is(err, matrix.ErrNoOrigin) {
		t.Fatal(err)
	}
	items := append(txn.Items(nil), matrix.Item{Kind: matrix.KindToDevice, Payload: []byte(`{"edu_type":"m.direct_to_device"}`)})
	aside(t, s, "a.test", 100, items...)
	aside(t, s, "b.test", 200, items[2])

	r := &RetryAside{Destination: "a.test", Now: 300}
	do(t, s, r)
	sum := r.Result.Destination.Kinds.Sum()
	if r.Result.Again.Items != 2 || r.Result.Left != 1 || sum.Items != 2 || r.Result.Destination.Name != "a.test" {
		t.Errorf("%+v", r.Result)
	}
	if n := s.Stats().Outbox.Aside; n != 2 {
		t.Errorf("%d are aside, want the receipt, of which there is a newer one by now, and that of b.test", n)
	}
	p := pack(t, s, "a.test", "again", 300)
	if p.PDUs != 1 || p.EDUs != 1 {
		t.Errorf("%+v", p)
	}
	settle(t, s, "a.test", p.ID, Delivered)
	one := &RetryAside{Destination: "a.test", ID: 4}
	if do(t, s, one); one.Result.Again.Items != 0 {
		t.Errorf("the id is one of b.test: %+v", one.Result)
	}
	one.Destination = "b.test"
	if do(t, s, one); one.Result.Again.Items != 1 {
		t.Errorf("%+v", one.Result)
	}
	closeStore(t, s)
	audit(t, path)
}

// What is set aside is tried again by itself a day later, and not a second time.
func TestWhatIsSetAsideIsTriedAgainOnce(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	day := RetryAfter.Milliseconds()
	do(t, s, &Accept{Destination: "a.test", Items: []matrix.Item{{Kind: matrix.KindToDevice, Payload: []byte(`{}`)}}, Accepted: 1000})
	refuse := func(id string, now int64) {
		t.Helper()
		p := pack(t, s, "a.test", id, now)
		op := &Settle{Destination: "a.test", TxnID: p.ID, Outcome: Bisect, Now: now, Reason: "refused"}
		if do(t, s, op); op.Result.SetAside == nil {
			t.Fatal("it is not set aside")
		}
	}
	retry := func(now, want int64) {
		t.Helper()
		r := &RetryAside{Destination: "a.test", Once: true, Now: now}
		if do(t, s, r); r.Result.Again.Items != want {
			t.Errorf("at %d: %+v, want %d", now, r.Result, want)
		}
	}
	refuse("b1", 2000)
	retry(2000+day-1, 0)
	retry(2000+day, 1)
	refuse("b2", 3000+day)
	retry(3000+2*day, 0)
	retry(3000+9*day, 0)
	if n := s.Stats().Outbox.Aside; n != 1 {
		t.Errorf("%d are aside, want it to stay for an admin", n)
	}
	closeStore(t, s)
	audit(t, path)
}

func TestARetryKeepsToTheBoundsOfTheQueue(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxDestItems: 1})
	aside(t, s, "a.test", 100, matrix.Item{Kind: matrix.KindToDevice, Payload: []byte(`{}`)}, matrix.Item{Kind: matrix.KindToDevice, Payload: []byte(`{"a":1}`)})
	if err := submit(t, s, &Batch{Outbox: []OutboxOp{&RetryAside{Destination: "a.test"}}}); !errors.Is(err, ErrOutboxFull) {
		t.Errorf("two, where one has room: %v", err)
	}
	if st := s.Stats().Outbox; st.Aside != 2 || st.Items != 0 {
		t.Errorf("%+v: nothing is lost", st)
	}
	do(t, s, &RetryAside{Destination: "a.test", ID: 1})
	closeStore(t, s)
	audit(t, path)
}

// What stays aside is in nobody's way, however much of it is older.
func TestWhatStaysAsideHoldsUpNothing(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	at := 2 * RetryAfter.Milliseconds()
	for i := range retryMost + 1 {
		txn, err := matrix.ParseTransaction(fmt.Appendf(nil, `{"origin":"x","edus":[{"edu_type":"m.receipt","content":{"!%d:x":{"m.read":{"@u:x":{"event_ids":["$a"],"data":{"ts":1}}}}}}]}`, i))
		if err != nil {
			t.Fatal(err)
		}
		aside(t, s, "a.test", at+int64(i), txn.Items(nil)...)
	}
	aside(t, s, "a.test", at+retryMost+1, matrix.Item{Kind: matrix.KindToDevice, Payload: []byte(`{}`)})
	aside(t, s, "a.test", at+retryMost+2, matrix.Item{Kind: matrix.KindToDevice, Payload: []byte(`{"a":1}`)})
	for _, r := range []*RetryAside{
		{Destination: "a.test", Once: true, Now: at + retryMost + 2 + RetryAfter.Milliseconds()},
		{Destination: "a.test"},
	} {
		if do(t, s, r); r.Result.Again.Items != 1 || r.Result.Left != retryMost+1 {
			t.Errorf("once %t: %+v", r.Once, r.Result)
		}
	}
	closeStore(t, s)
	audit(t, path)
}

func TestARetryHasABoundInBytes(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	large := fmt.Appendf(nil, `{"a":%q}`, strings.Repeat("x", retryBytes/2))
	for i := range 4 {
		aside(t, s, "a.test", int64(100*(i+1)), matrix.Item{Kind: matrix.KindToDevice, Payload: large})
	}
	for want := int64(2); want >= 0; want -= 2 {
		r := &RetryAside{Destination: "a.test"}
		if do(t, s, r); r.Result.Again.Items != 2 || s.Stats().Outbox.Aside != want {
			t.Errorf("%+v, and %d are aside, want %d", r.Result, s.Stats().Outbox.Aside, want)
		}
	}
	closeStore(t, s)
	audit(t, path)
}

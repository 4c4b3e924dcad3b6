package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

const origin = matrix.ServerName("hs1.test")

// items are those of a transaction with these PDUs and EDUs.
func items(t testing.TB, pdus, edus []string) []matrix.Item {
	t.Helper()
	body := fmt.Sprintf(`{"origin":%q,"origin_server_ts":1,"pdus":[%s],"edus":[%s]}`, origin, strings.Join(pdus, ","), strings.Join(edus, ","))
	txn, err := matrix.ParseTransaction([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	return txn.Items(nil)
}

func pdus(t testing.TB, list ...string) []matrix.Item { return items(t, list, nil) }
func edus(t testing.TB, list ...string) []matrix.Item { return items(t, nil, list) }

func pdu(room string, depth int, text string) string {
	return fmt.Sprintf(`{"content":{"body":%q},"depth":%d,"room_id":%q,"type":"m.room.message"}`, text, depth, room)
}

func typing(room, user string, on bool) string {
	return fmt.Sprintf(`{"content":{"room_id":%q,"typing":%t,"user_id":%q},"edu_type":"m.typing"}`, room, on, user)
}

func presence(user, text string, ago int) string {
	return fmt.Sprintf(`{"content":{"push":[{"last_active_ago":%d,"presence":"online","status_msg":%q,"user_id":%q}]},"edu_type":"m.presence"}`, ago, text, user)
}

func receipt(room, user, event, thread string) string {
	data := `{"ts":1}`
	if thread != "" {
		data = fmt.Sprintf(`{"thread_id":%q,"ts":1}`, thread)
	}
	return fmt.Sprintf(`{"content":{%q:{"m.read":{%q:{"data":%s,"event_ids":[%q]}}}},"edu_type":"m.receipt"}`, room, user, data, event)
}

func toDevice(id, text string) string {
	return fmt.Sprintf(`{"content":{"message_id":%q,"messages":{"@a:x":{"D":{"body":%q}}},"sender":"@b:hs1.test","type":"m.x"},"edu_type":"m.direct_to_device"}`, id, text)
}

func deviceList(user, device string, stream int, name string, prev ...int) string {
	ids, err := json.Marshal(append([]int{}, prev...))
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(`{"content":{"device_display_name":%q,"device_id":%q,"prev_id":%s,"stream_id":%d,"user_id":%q},"edu_type":"m.device_list_update"}`,
		name, device, ids, stream, user)
}

func signingKey(user, fields string) string {
	return fmt.Sprintf(`{"content":{%s,"user_id":%q},"edu_type":"m.signing_key_update"}`, fields, user)
}

// do runs operations as one batch.
func do(t testing.TB, s *Store, ops ...OutboxOp) {
	t.Helper()
	if err := submit(t, s, &Batch{Outbox: ops}); err != nil {
		t.Fatal(err)
	}
}

func accept(t testing.TB, s *Store, dest matrix.ServerName, txn string, at int64, items []matrix.Item) AcceptResult {
	t.Helper()
	a := &Accept{Destination: dest, TxnID: txn, Items: items, Accepted: at}
	do(t, s, a)
	return a.Result
}

func pack(t testing.TB, s *Store, dest matrix.ServerName, id string, now int64) PackResult {
	t.Helper()
	p := &Pack{Destination: dest, NewID: id, Now: now, Origin: origin, MaxBytes: 1 << 20}
	do(t, s, p)
	return p.Result
}

func settle(t testing.TB, s *Store, dest matrix.ServerName, id string, o Outcome) SettleResult {
	t.Helper()
	op := &Settle{Destination: dest, TxnID: id, Outcome: o, Now: 99, Reason: "refused"}
	do(t, s, op)
	return op.Result
}

func pending(t testing.TB, s *Store, dest matrix.ServerName) []PendingItem {
	t.Helper()
	var list []PendingItem
	if err := s.LoadItems(t.Context(), dest, func(p PendingItem) error {
		list = append(list, p)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

func payloads(list []PendingItem) string {
	var b strings.Builder
	for _, it := range list {
		fmt.Fprintf(&b, "%s\n", it.Payload)
	}
	return b.String()
}

// loadOutbox returns what LoadOutbox gives, by name.
func loadOutbox(t testing.TB, s *Store) map[matrix.ServerName]Destination {
	t.Helper()
	m := map[matrix.ServerName]Destination{}
	if err := s.LoadOutbox(t.Context(), func(d Destination) error {
		m[d.Name] = d
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return m
}

func count(t testing.TB, c *conn, query string) int64 {
	t.Helper()
	n, err := value[int64](t.Context(), c, query)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// audit checks what must hold in the tables at any time.
func audit(t testing.TB, path string) {
	t.Helper()
	c := openRaw(t, path)
	for what, query := range map[string]string{
		"payloads with a wrong number of references": `SELECT count(*) FROM payload p
			WHERE refs <> (SELECT count(*) FROM item WHERE item.hash = p.hash)`,
		"payloads without body":    "SELECT count(*) FROM payload WHERE body NOT IN (SELECT id FROM body)",
		"bodies without payload":   "SELECT count(*) FROM body WHERE id NOT IN (SELECT body FROM payload)",
		"items without a payload":  "SELECT count(*) FROM item WHERE (hash IS NULL) = (bytes IS NULL) OR hash IS NOT NULL AND hash NOT IN (SELECT hash FROM payload)",
		"items of no destination":  "SELECT count(*) FROM item WHERE dest NOT IN (SELECT id FROM dest)",
		"wrong numbers of items":   "SELECT count(*) FROM dest WHERE items <> (SELECT count(*) FROM item WHERE dest = dest.id)",
		"numbers given out twice":  "SELECT count(*) - count(DISTINCT seq) FROM item",
		"items of the wrong size":  "SELECT count(*) FROM item LEFT JOIN payload USING (hash) LEFT JOIN body b ON b.id = payload.body WHERE item.size <> length(coalesce(item.bytes, b.bytes))",
		"set aside, another size":  "SELECT count(*) FROM aside WHERE size <> length(bytes)",
		"destinations from nowhen": "SELECT count(*) FROM dest WHERE (items = 0) <> (oldest = 0)",
	} {
		if n := count(t, c, query); n != 0 {
			t.Errorf("%d %s", n, what)
		}
	}
	c.close()
	c.stmts = nil
}

func TestWhatWasAcceptedIsDelivered(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	long := strings.Repeat("x", 1500)
	r := accept(t, s, "a.test", "1", 1000, items(t, []string{pdu("!r", 1, long), pdu("!r", 2, "short")},
		[]string{toDevice("m1", "hi"), presence("@u:hs1.test", "here", 5), typing("!r", "@u:hs1.test", true)}))
	want(t, "accepted", []int{r.Accepted, r.Merged, r.Duplicates}, []int{5, 0, 0})
	want(t, "pending", r.Destination.Kinds.Sum().Items, int64(5))
	want(t, "oldest", r.Destination.Oldest, int64(1000))
	again := accept(t, s, "a.test", "1", 1001, pdus(t, pdu("!r", 3, "not stored")))
	want(t, "repeated", again.Repeated, true)
	want(t, "pending", again.Destination, r.Destination)

	p := pack(t, s, "a.test", "b1", 2000)
	want(t, "id", p.ID, "b1")
	want(t, "counts", []int{p.PDUs, p.EDUs}, []int{2, 3})
	want(t, "body", string(p.Body), `{"edus":[`+toDevice("m1", "hi")+","+typing("!r", "@u:hs1.test", true)+
		`,{"content":{"push":[{"last_active_ago":1005,"presence":"online","status_msg":"here","user_id":"@u:hs1.test"}]},"edu_type":"m.presence"}],`+
		`"origin":"hs1.test","origin_server_ts":2000,"pdus":[`+pdu("!r", 1, long)+","+pdu("!r", 2, "short")+`]}`)

	// The same again, whatever comes in between, and after a restart.
	accept(t, s, "a.test", "2", 3000, items(t, []string{pdu("!r", 1, long)}, []string{presence("@u:hs1.test", "gone", 5)}))
	p.Again, p.Expired = true, KindTotals{}
	p.Destination = loadOutbox(t, s)["a.test"]
	want(t, "again", pack(t, s, "a.test", "b2", 4000), p)
	closeStore(t, s)
	s = open(t, Options{Path: path})
	want(t, "after a restart", pack(t, s, "a.test", "b3", 5000), p)

	if r := settle(t, s, "a.test", "b2", Delivered); r.Found {
		t.Error("another id settled it")
	}
	r2 := settle(t, s, "a.test", "b1", Delivered)
	want(t, "delivered", r2.Delivered, p.Kinds)
	want(t, "left", r2.Destination.Kinds.Sum().Items, int64(1))
	if r := settle(t, s, "a.test", "b1", Delivered); r.Found {
		t.Error("settled twice")
	}
	p = pack(t, s, "a.test", "b4", 3000)
	want(t, "body", string(p.Body), `{"edus":[`+presence("@u:hs1.test", "gone", 5)+`],"origin":"hs1.test","origin_server_ts":3000,"pdus":[]}`)
	settle(t, s, "a.test", "b4", Delivered)
	want(t, "nothing left", pack(t, s, "a.test", "b5", 3000).ID, "")
	want(t, "destinations", len(loadOutbox(t, s)), 0)
	audit(t, path)
	want(t, "bodies", count(t, openRaw(t, path), "SELECT count(*) FROM body"), int64(0))
}

func TestAPayloadIsStoredOnce(t *testing.T) {
	const dests = 4000
	path := newPath(t)
	s := open(t, Options{Path: path, QueueBytes: 32 << 20})
	event := pdus(t, pdu("!r", 1, strings.Repeat("x", 1400)))
	var b Batch
	for i := range dests {
		b.Outbox = append(b.Outbox, &Accept{Destination: matrix.ServerName(numbered("a", i)), TxnID: "1", Items: event, Accepted: 1})
	}
	if err := submit(t, s, &b); err != nil {
		t.Fatal(err)
	}
	c := openRaw(t, path)
	want(t, "bodies", count(t, c, "SELECT count(*) FROM body"), int64(1))
	want(t, "items", count(t, c, "SELECT count(*) FROM item"), int64(dests))
	closeStore(t, s)
	if size := fileSize(path); size > 4<<20 {
		t.Errorf("the file has %d bytes", size)
	} else {
		t.Logf("%d bytes in the file", size)
	}
	s = open(t, Options{Path: path, QueueBytes: 32 << 20})
	b = Batch{}
	for i := range dests {
		dest := matrix.ServerName(numbered("a", i))
		b.Outbox = append(b.Outbox, &Pack{Destination: dest, NewID: "b", Now: 2, Origin: origin, MaxBytes: 1 << 20},
			&Settle{Destination: dest, TxnID: "b", Outcome: Delivered})
	}
	if err := submit(t, s, &b); err != nil {
		t.Fatal(err)
	}
	want(t, "bodies", count(t, c, "SELECT count(*) FROM body"), int64(0))
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: dests})
	audit(t, path)
}

func TestItemsMergeByTheRulesOfTheirKinds(t *testing.T) {
	const u = "@u:hs1.test"
	long := strings.Repeat("k", 300)
	for _, c := range []struct {
		name             string
		first, second    []string
		accepted, merged int // of the second
		want             []string
	}{
		{"typing", []string{typing("!r", u, true), typing("!s", u, true)}, []string{typing("!r", u, false)}, 0, 1,
			[]string{typing("!s", u, true), typing("!r", u, false)}},
		{"to-device", []string{toDevice("1", "a")}, []string{toDevice("1", "a")}, 1, 0, []string{toDevice("1", "a"), toDevice("1", "a")}},
		{"long to-device", []string{toDevice("1", long)}, []string{toDevice("1", long)}, 1, 0, []string{toDevice("1", long), toDevice("1", long)}},
		{"unknown", []string{`{"content":{},"edu_type":"x"}`}, []string{`{"content":{},"edu_type":"x"}`}, 1, 0,
			[]string{`{"content":{},"edu_type":"x"}`, `{"content":{},"edu_type":"x"}`}},
		{"signing keys", []string{signingKey(u, `"master_key":{"k":"`+long+`"}`)}, []string{signingKey(u, `"self_signing_key":{"k":2}`)}, 0, 1,
			[]string{signingKey(u, `"master_key":{"k":"`+long+`"},"self_signing_key":{"k":2}`)}},
		{"device lists in a chain", []string{deviceList(u, "A", 10, long, 9), deviceList(u, "B", 11, long, 10)}, []string{deviceList(u, "A", 12, "new", 11)}, 0, 1,
			[]string{deviceList(u, "B", 11, long, 9), deviceList(u, "A", 12, "new", 11)}},
		{"device lists of one device", []string{deviceList(u, "A", 10, long, 9)}, []string{deviceList(u, "A", 12, long, 10)}, 0, 1,
			[]string{deviceList(u, "A", 12, long, 9)}},
		{"device lists apart", []string{deviceList(u, "A", 10, "", 9)}, []string{deviceList(u, "A", 12, "", 11)}, 1, 0,
			[]string{deviceList(u, "A", 10, "", 9), deviceList(u, "A", 12, "", 11)}},
		{"of another user", []string{deviceList("@v:hs1.test", "A", 10, "", 9)}, []string{deviceList(u, "A", 11, "", 10)}, 1, 0,
			[]string{deviceList("@v:hs1.test", "A", 10, "", 9), deviceList(u, "A", 11, "", 10)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			accept(t, s, "a.test", "1", 1, edus(t, c.first...))
			r := accept(t, s, "a.test", "2", 2, edus(t, c.second...))
			want(t, "accepted, merged", []int{r.Accepted, r.Merged}, []int{c.accepted, c.merged})
			want(t, "pending", payloads(pending(t, s, "a.test")), strings.Join(c.want, "\n")+"\n")
			audit(t, path)
		})
	}
}

func TestALongChainIsLeftAsItIs(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	list := []string{deviceList("@u:hs1.test", "first", 1, "", 0)}
	for i := range maxChain {
		list = append(list, deviceList("@u:hs1.test", fmt.Sprint("d", i), i+2, "", i+1))
		if len(list) == matrix.MaxEDUs {
			accept(t, s, "a.test", "", 1, edus(t, list...))
			list = nil
		}
	}
	accept(t, s, "a.test", "", 1, edus(t, list...))
	r := accept(t, s, "a.test", "", 2, edus(t, deviceList("@u:hs1.test", "first", 1000, "", maxChain+1)))
	want(t, "merged at the bound", r.Merged, 1)
	accept(t, s, "a.test", "", 1, edus(t, deviceList("@u:hs1.test", "one more", 1001, "", 1000)))
	r = accept(t, s, "a.test", "", 2, edus(t, deviceList("@u:hs1.test", "d0", 1002, "", 1001)))
	want(t, "accepted beyond it", r.Accepted, 1)
}

func TestARefusedBatchIsDividedDownToOneItem(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	var list []string
	for i := range 9 {
		list = append(list, toDevice(fmt.Sprint(i), strings.Repeat("x", 100*i)))
	}
	accept(t, s, "a.test", "1", 5, items(t, []string{pdu("!r", 1, "p")}, list))
	bad := []byte(`"message_id":"6"`)
	var delivered []string
	n := 0
	for {
		n++
		p := pack(t, s, "a.test", fmt.Sprint("b", n), int64(n))
		if p.ID == "" {
			break
		}
		want(t, "id", p.ID, fmt.Sprint("b", n))
		if !bytes.Contains(p.Body, bad) {
			want(t, "found", settle(t, s, "a.test", p.ID, Delivered).Found, true)
			delivered = append(delivered, fmt.Sprint(p.Kinds.Sum().Items))
			continue
		}
		r := settle(t, s, "a.test", p.ID, Bisect)
		if (r.SetAside != nil) != (p.Kinds.Sum().Items == 1) {
			t.Errorf("set aside %v of %d", r.SetAside, p.Kinds.Sum().Items)
		}
		closeStore(t, s)
		s = open(t, Options{Path: path})
	}
	want(t, "delivered", delivered, []string{"5", "1", "3"})
	var aside []Aside
	if err := s.LoadAside(t.Context(), func(a Aside) error { aside = append(aside, a); return nil }); err != nil {
		t.Fatal(err)
	}
	want(t, "set aside", aside, []Aside{{
		ID: 1, Destination: "a.test", Kind: matrix.KindToDevice, Accepted: 5, At: 99, Reason: "refused", Payload: []byte(list[6]),
	}})
	closeStore(t, s)
	s = open(t, Options{Path: path})
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 1, Aside: 1, AsideBytes: int64(len(list[6]))})
	f := &ForgetAside{Through: 1}
	do(t, s, f)
	want(t, "forgotten", f.Result, KindTotal{1, int64(len(list[6]))})
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 1})
	audit(t, path)
}

func TestWhatFindsNoRoomInAFrozenBatchIsSentLater(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	var list []string
	for i := range 6 {
		list = append(list, pdu("!r", i, strings.Repeat("x", 100)))
	}
	accept(t, s, "a.test", "1", 1, pdus(t, list...))
	want(t, "packed", pack(t, s, "a.test", "b1", 2).PDUs, 6)
	// As if a later Builder, to which less is enough, took over.
	if err := openRaw(t, path).exec(t.Context(), `UPDATE dest SET frozen = replace(frozen, '"max":1048576', '"max":700')`); err != nil {
		t.Fatal(err)
	}
	p := pack(t, s, "a.test", "b2", 3)
	want(t, "packed again", []any{p.ID, p.Again}, []any{"b1", true})
	if p.PDUs == 0 || p.PDUs == 6 {
		t.Fatalf("%d PDUs", p.PDUs)
	}
	want(t, "delivered", settle(t, s, "a.test", "b1", Delivered).Delivered.Sum().Items, int64(p.PDUs))
	want(t, "the rest", pack(t, s, "a.test", "b2", 3).PDUs, 6-p.PDUs)
	settle(t, s, "a.test", "b2", Delivered)
	audit(t, path)
}

func TestAnItemThatCannotBePackedIsSetAside(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	bad := matrix.Item{Kind: matrix.KindReceipt, Key: "k", Payload: []byte(`{"no":"receipt"}`)}
	accept(t, s, "a.test", "1", 1, append(pdus(t, pdu("!r", 1, "p")), bad))
	p := pack(t, s, "a.test", "b1", 2)
	want(t, "set aside, packed", []int{p.SetAside, p.PDUs, p.EDUs}, []int{1, 1, 0})
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 1, Items: 1, Aside: 1, AsideBytes: 16})
	accept(t, s, "b.test", "1", 1, []matrix.Item{bad})
	p = pack(t, s, "b.test", "b1", 2)
	want(t, "nothing else", []any{p.ID, p.SetAside, p.Destination.Frozen}, []any{"", 1, false})
	audit(t, path)
}

func TestWhatIsSetAsideIsBounded(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxAside: 3, MaxAsideBytes: 1000})
	give := func(size int) {
		t.Helper()
		accept(t, s, "a.test", "", 1, edus(t, toDevice("m", strings.Repeat("x", size))))
		p := pack(t, s, "a.test", "b", 2)
		settle(t, s, "a.test", p.ID, Bisect)
	}
	sizes := func() (list []int) {
		t.Helper()
		total := int64(0)
		if err := s.LoadAside(t.Context(), func(a Aside) error {
			list = append(list, bytes.Count(a.Payload, []byte("x"))-2) // two are elsewhere
			total += int64(len(a.Payload))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 1, Aside: int64(len(list)), AsideBytes: total})
		return list
	}
	for i := range 5 {
		give(10 + i)
	}
	want(t, "number", sizes(), []int{12, 13, 14})
	give(900)
	want(t, "bytes", sizes(), []int{900})
	give(5000)
	want(t, "one that is larger than the bound", sizes(), []int{5000})
}

func TestAnOutboxAtItsBoundsRefuses(t *testing.T) {
	event := func(i int) []matrix.Item { return pdus(t, pdu("!r", i, strings.Repeat("x", 900))) }
	size := int64(len(event(1)[0].Payload))
	for _, c := range []struct {
		name  string
		opt   Options
		dests int // how many destinations get one item after the other
		n     int // how many fit
	}{
		{"items of a destination", Options{MaxDestItems: 7}, 1, 7},
		{"bytes of a destination", Options{MaxDestBytes: 5*size + 10}, 1, 5},
		{"items", Options{MaxItems: 9}, 3, 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.opt.Path = newPath(t)
			s := open(t, c.opt)
			dest := func(i int) matrix.ServerName { return matrix.ServerName(numbered("a", i%c.dests)) }
			for i := range c.n {
				accept(t, s, dest(i), "", 1, event(i+1))
			}
			before := loadOutbox(t, s)
			op := &Accept{Destination: dest(c.n), TxnID: "new", Items: append(event(100), event(101)...), Accepted: 1}
			wantErr(t, "beyond", submit(t, s, &Batch{Hosts: []Host{up("h.test")}, Outbox: []OutboxOp{op}}), ErrOutboxFull)
			want(t, "outbox", loadOutbox(t, s), before)
			want(t, "hosts", len(load(t, s, 1)), 0)
			want(t, "items", s.Stats().Outbox.Items, int64(c.n))
			audit(t, c.opt.Path)

			// A copy takes no room; and there is room again when something is delivered.
			r := accept(t, s, dest(0), "", 1, event(1))
			want(t, "copy", r.Duplicates, 1)
			p := pack(t, s, dest(0), "b", 2)
			settle(t, s, dest(0), p.ID, Delivered)
			accept(t, s, dest(0), "", 1, event(100))
		})
	}
}

func TestARefusalLeavesItsNeighboursAlone(t *testing.T) {
	g := newGate(OpBegin)
	path := newPath(t)
	s := open(t, Options{Path: path, Fault: g.fault, MaxDestItems: 1})
	g.hold(t, s)
	var ops []*Accept
	done := make(chan error, 4)
	for i, list := range [][]matrix.Item{
		pdus(t, pdu("!r", 1, "a")), pdus(t, pdu("!r", 2, strings.Repeat("b", 500)), pdu("!r", 3, "c")), pdus(t, pdu("!r", 4, strings.Repeat("b", 500))), pdus(t, pdu("!r", 5, "d")),
	} {
		ops = append(ops, &Accept{Destination: matrix.ServerName(numbered("a", i)), TxnID: "1", Items: list, Accepted: 1})
		if err := s.Submit(&Batch{Outbox: []OutboxOp{ops[i]}}, func(err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
	}
	g.leave <- nil
	for i := range ops {
		if err := <-done; (i == 1) != (err != nil) {
			t.Errorf("%d: %v", i, err)
		}
	}
	want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 3, Items: 3})
	want(t, "commits", s.Stats().Commits, int64(2))
	audit(t, path)
}

func TestTheFileIsBounded(t *testing.T) {
	const limit = 1 << 20
	path := newPath(t)
	s := open(t, Options{Path: path, MaxFileBytes: limit})
	n := 0
	var err error
	for ; err == nil; n++ {
		if n == 1000 {
			t.Fatal("never full")
		}
		err = submit(t, s, &Batch{Outbox: []OutboxOp{&Accept{
			Destination: matrix.ServerName(numbered("a", n%10)), Items: pdus(t, pdu("!r", n, strings.Repeat("x", 8000))), Accepted: 1,
		}}})
	}
	wantErr(t, "full", err, ErrOutboxFull)
	closeStore(t, s)
	if size := fileSize(path); size < limit*8/10 || size > limit+64<<10 {
		t.Errorf("%d bytes in the file", size)
	}
	s = open(t, Options{Path: path, MaxFileBytes: limit})
	for i := range 5 {
		dest := matrix.ServerName(numbered("a", i))
		for pack(t, s, dest, "b", 2).ID != "" {
			settle(t, s, dest, "b", Delivered)
		}
	}
	for i := range n / 3 { // the space is used again
		accept(t, s, "b.test", "", 1, pdus(t, pdu("!r", i, strings.Repeat("y", 8000))))
	}
	audit(t, path)
}

func TestDestinationsAreBoundedIdleOnesGo(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxDestinations: 32}) // a prune makes room for 2 more
	name := func(i int) matrix.ServerName { return matrix.ServerName(numbered("a", i)) }
	for i := range 32 {
		accept(t, s, name(i), "1", 1, pdus(t, pdu("!r", 1, "x")))
	}
	wantErr(t, "all pending", submit(t, s, &Batch{Outbox: []OutboxOp{&Accept{Destination: "new.test", Accepted: 1}}}), ErrOutboxFull)
	for _, i := range []int{7, 3, 5, 9, 11} {
		p := pack(t, s, name(i), "b", 2)
		settle(t, s, name(i), p.ID, Delivered)
		accept(t, s, name(i), "", 2, nil) // touched
	}
	do(t, s, &Hold{Destination: name(3), Held: true})
	accept(t, s, "new.test", "1", 1, pdus(t, pdu("!r", 1, "x")))
	want(t, "destinations", s.Stats().Outbox, OutboxTotals{Destinations: 30, Items: 28})
	m := loadOutbox(t, s)
	want(t, "pending or held", len(m), 29)
	want(t, "held", m[name(3)].Held, true)
}

func TestExpiredItemsGoInSteps(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	const dests = expireDests + 10
	for i := range dests {
		accept(t, s, matrix.ServerName(numbered("a", i)), "", 1000, items(t, []string{pdu("!r", 1, "x")},
			[]string{typing("!r", "@u:hs1.test", true), toDevice("1", "x"), presence("@u:hs1.test", "", 1)}))
	}
	frozen := matrix.ServerName(numbered("a", 3))
	pack(t, s, frozen, "b", 1001)
	var expired KindTotals
	steps, changed := 0, 0
	for e := (&Expire{Now: 1000 + 30_001}); ; e.After = e.Result.Next {
		do(t, s, e)
		steps++
		changed += len(e.Result.Destinations)
		for k, n := range e.Result.Expired {
			expired.add(matrix.Kind(k), n.Items, n.Bytes)
		}
		if e.Result.Next == 0 {
			break
		}
	}
	want(t, "steps, destinations", []int{steps, changed}, []int{2, dests - 1})
	want(t, "expired", expired[matrix.KindTyping].Items, expired.Sum().Items)
	want(t, "left", s.Stats().Outbox.Items, int64(4*dests-(dests-1)))
	audit(t, path)

	// More than one step's worth for one destination.
	var list []matrix.Item
	for i := range maxTrim + 10 {
		list = append(list, edus(t, typing("!r", fmt.Sprintf("@u%d:hs1.test", i), true))...)
	}
	accept(t, s, "many.test", "", 1000, list)
	e := &Expire{Now: 100_000}
	for {
		do(t, s, e)
		if n := e.Result.Expired.Sum().Items; n > maxTrim {
			t.Errorf("%d in one step", n)
		}
		if e.After = e.Result.Next; e.After == 0 {
			break
		}
	}
	want(t, "left of many", len(pending(t, s, "many.test")), 0)

	// Pack does not send them either.
	accept(t, s, "many.test", "", 1000, list)
	p := pack(t, s, "many.test", "b", 100_000)
	want(t, "packed, expired", []any{p.ID, p.Expired.Sum().Items}, []any{"", int64(maxTrim)})
	p = pack(t, s, "many.test", "b", 100_000)
	want(t, "packed, expired", []any{p.ID, p.Expired.Sum().Items, p.Destination.Oldest}, []any{"", int64(10), int64(0)})
	audit(t, path)
}

func TestCompactKeepsTheNewestOfEachRoom(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	accept(t, s, "a.test", "", 1000, pdus(t, pdu("!r", 1, "frozen")))
	pack(t, s, "a.test", "b", 1000)
	var list []string
	for i := range 20 {
		list = append(list, pdu("!r", 2+i, strings.Repeat("x", 400)), pdu("!s", 100-i, "y"))
	}
	list = append(list, `{"depth":1,"type":"m.room.create"}`)
	accept(t, s, "a.test", "", 1000, items(t, list, []string{typing("!r", "@u:hs1.test", true), toDevice("1", "x")}))
	c := &Compact{Destination: "a.test", Now: 4_000_000}
	do(t, s, c)
	want(t, "superseded, expired", []int64{c.Result.Superseded.Items, c.Result.Expired.Sum().Items}, []int64{19 + 18, 1})
	want(t, "left", payloads(pending(t, s, "a.test")), strings.Join([]string{
		toDevice("1", "x"), pdu("!r", 1, "frozen"), pdu("!s", 100, "y"), pdu("!r", 21, strings.Repeat("x", 400)), pdu("!s", 81, "y"), list[40], "",
	}, "\n"))
	want(t, "totals", c.Result.Destination.Kinds.Sum().Items, int64(6))
	audit(t, path)

	var many []matrix.Item
	for i := range maxTrim + 11 {
		many = append(many, pdus(t, pdu("!r", i, "x"))...)
	}
	accept(t, s, "b.test", "", 1000, many)
	c = &Compact{Destination: "b.test"}
	do(t, s, c)
	want(t, "first step", []any{c.Result.Superseded.Items, c.Result.More}, []any{int64(maxTrim), true})
	do(t, s, c)
	want(t, "second step", []any{c.Result.Superseded.Items, c.Result.More}, []any{int64(10), false})
}

func TestDropTakesWhatTheAdminHasSeen(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	seen := func() int64 {
		last := int64(0)
		for _, it := range pending(t, s, "a.test") {
			last = max(last, it.ID)
		}
		return last
	}
	mix := func(n string) []matrix.Item {
		return items(t, []string{pdu("!r", 1, n)}, []string{toDevice(n, n), typing("!"+n, "@u:hs1.test", true)})
	}
	accept(t, s, "a.test", "", 1, mix("one"))
	pack(t, s, "a.test", "b1", 2)
	accept(t, s, "a.test", "", 3, mix("two"))
	through := seen()
	accept(t, s, "a.test", "", 4, mix("three"))
	d := &Drop{Destination: "a.test", Through: through}
	do(t, s, d)
	want(t, "EDUs", d.Result.Dropped.Sum().Items, int64(2))
	want(t, "left", d.Result.Destination.Kinds.Sum().Items, int64(7))
	want(t, "frozen", pack(t, s, "a.test", "b2", 5).ID, "b1")
	d = &Drop{Destination: "a.test", Through: 2, PDUs: true}
	do(t, s, d)
	want(t, "half of a batch", d.Result.Dropped.Sum().Items, int64(0))
	d = &Drop{Destination: "a.test", Through: seen(), PDUs: true}
	do(t, s, d)
	want(t, "all", d.Result.Dropped.Sum().Items, int64(7))
	want(t, "what is left", d.Result.Destination, Destination{Name: "a.test"})
	want(t, "settle", settle(t, s, "a.test", "b1", Delivered).Found, false)
	audit(t, path)
}

func TestAgesCount(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	now := int64(1e12)
	for i, age := range []int64{-5, 0, 1, 2, 5, 6, 60, 61, 240, 1440, 1441, 100000} {
		accept(t, s, "a.test", "", now-age*60_000, pdus(t, pdu("!r", i, "x")))
	}
	accept(t, s, "b.test", "", now, pdus(t, pdu("!r", 0, "x")))
	accept(t, s, "c.test", "1", now, nil)
	for _, step := range []int64{1, 12, 13, agesStep} { // a step ends behind a destination
		got := map[matrix.ServerName]Ages{}
		calls := 0
		if err := s.loadAges(t.Context(), now, step, func(n matrix.ServerName, a Ages) error {
			calls++
			got[n] = a
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		want(t, "ages", got, map[matrix.ServerName]Ages{"a.test": {3, 2, 1, 1, 2, 1, 2}, "b.test": {1}})
		want(t, "calls", calls, 2)
	}
	broken := errors.New("broken")
	if err := s.LoadAges(t.Context(), now, func(matrix.ServerName, Ages) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("an error of the caller's comes back as %v", err)
	}
}

func TestWhatCannotBeStoredIsRefused(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	one := pdus(t, pdu("!r", 1, "x"))
	for _, op := range []OutboxOp{
		&Accept{Destination: "not a name", Items: one},
		&Accept{Destination: "a.test", TxnID: strings.Repeat("x", MaxTxnID+1), Items: one},
		&Accept{Destination: "a.test", Items: []matrix.Item{{Kind: 0, Payload: []byte("{}")}}},
		&Accept{Destination: "a.test", Items: []matrix.Item{{Kind: matrix.NumKinds + 1, Payload: []byte("{}")}}},
		&Accept{Destination: "a.test", Items: []matrix.Item{{Kind: matrix.KindOther}}},
		&Accept{Destination: "a.test", Items: []matrix.Item{{Kind: matrix.KindOther, Payload: []byte("{}"), Lifetime: -1}}},
		&Pack{Destination: "a.test", MaxBytes: 1},
		&Pack{Destination: "a.test", NewID: "x"},
		&Pack{Destination: "a.test", NewID: strings.Repeat("x", MaxTxnID+1), MaxBytes: 1},
		&Settle{Destination: "a.test", TxnID: "x"},
		&Hold{Destination: "not a name"},
	} {
		wantErr(t, fmt.Sprintf("%+v", op), submit(t, s, &Batch{Outbox: []OutboxOp{op}}), ErrInvalid)
	}
	want(t, "totals", s.Stats().Outbox, OutboxTotals{})
	// Where there is nothing, there is nothing to do.
	do(t, s, &Settle{Destination: "a.test", TxnID: "x", Outcome: Bisect}, &Compact{Destination: "a.test"}, &Drop{Destination: "a.test"},
		&Pack{Destination: "a.test", NewID: "x", MaxBytes: 1, Origin: origin}, &Expire{}, &ForgetAside{})
	want(t, "items", len(pending(t, s, "a.test")), 0)
}

func TestTheSecondSchemaIsStillOpened(t *testing.T) {
	script, err := os.ReadFile("testdata/v2.sql")
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := newPath(t), newPath(t)
	makeRaw(t, old, string(script))
	s := open(t, Options{Path: old})
	audit(t, old)
	want(t, "hosts", load(t, s, 10), []Host{someHosts[1], someHosts[0], someHosts[2]})
	p := pack(t, s, "a.test", "new", 9000)
	body, err := os.ReadFile("testdata/v2.json")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "frozen batch", []any{p.ID, p.Again, string(p.Body)}, []any{"b1", true, strings.TrimSpace(string(body))})
	m := loadOutbox(t, s)
	want(t, "pending", []int64{m["a.test"].Kinds.Sum().Items, m["b.test"].Kinds.Sum().Items}, []int64{9, 1})
	settle(t, s, "a.test", "b1", Delivered)
	want(t, "the rest", pack(t, s, "a.test", "b2", 9000).PDUs, 1)
	settle(t, s, "a.test", "b2", Delivered)
	audit(t, old)
	closeStore(t, s)
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, old), schema(t, fresh))
}

func TestABatchOutlivesWhatAShellDeletes(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	accept(t, s, "a.test", "1", 1, pdus(t, pdu("!r", 1, "a"), pdu("!r", 2, strings.Repeat("b", 400)), pdu("!r", 3, "c")))
	pack(t, s, "a.test", "b1", 2)
	accept(t, s, "a.test", "2", 3, pdus(t, pdu("!r", 4, "d")))
	if err := openRaw(t, path).exec(t.Context(), "DELETE FROM item WHERE depth = 2"); err != nil {
		t.Fatal(err)
	}
	r := settle(t, s, "a.test", "b1", Delivered)
	want(t, "left", r.Destination.Kinds.Sum().Items, int64(1))
	want(t, "totals", s.Stats().Outbox.Items, int64(1))
	audit(t, path)
}

// TestNoStatementScans asks SQLite how it runs the statements of the hot path.
func TestNoStatementScans(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	closeStore(t, s)
	c := openRaw(t, path)
	for _, q := range new(outbox).queries() {
		if strings.HasPrefix(q.query, "PRAGMA") {
			continue
		}
		var plan []string
		if err := explain(t, c, q.query, &plan); err != nil {
			t.Fatalf("%s: %v", q.query, err)
		}
		for _, step := range plan {
			rare := strings.Contains(q.query, "DELETE FROM dest") || strings.Contains(q.query, "FROM aside") || strings.Contains(q.query, "GROUP BY kind")
			if (strings.Contains(step, "SCAN") && !strings.Contains(step, "CONSTANT ROW") || strings.Contains(step, "TEMP B-TREE")) && !rare {
				t.Errorf("%s\n\t%s", q.query, step)
			}
		}
		t.Logf("%.60s...\n\t%s", q.query, strings.Join(plan, "\n\t"))
	}
}

func TestOutboxOpsNameThemselves(t *testing.T) {
	for _, op := range []OutboxOp{
		&Accept{Destination: "a.test"}, &Pack{Destination: "a.test"}, &Settle{Destination: "a.test"}, &Compact{Destination: "a.test"},
		&Hold{Destination: "a.test"}, &Drop{Destination: "a.test"},
	} {
		if !strings.Contains(op.String(), `"a.test"`) {
			t.Errorf("%q does not name the destination", op)
		}
	}
}

func TestClosedStoreLoadsNothing(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	closeStore(t, s)
	ctx := context.Background()
	wantErr(t, "LoadOutbox", s.LoadOutbox(ctx, nil), ErrClosed)
	wantErr(t, "LoadItems", s.LoadItems(ctx, "a.test", nil), ErrClosed)
	wantErr(t, "LoadAges", s.LoadAges(ctx, 0, nil), ErrClosed)
	wantErr(t, "LoadAside", s.LoadAside(ctx, nil), ErrClosed)
}

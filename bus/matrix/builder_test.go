package matrix

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func presenceState(user string, ago int) string {
	return fmt.Sprintf(`{"last_active_ago":%d,"presence":"online","user_id":"%s"}`, ago, user)
}

func receiptItem(room, kind, user, thread string) string {
	data := `{"ts":1}`
	if thread != "" {
		data = `{"thread_id":"` + thread + `","ts":1}`
	}
	return fmt.Sprintf(`{"%s":{"%s":{"%s":{"data":%s,"event_ids":["$e"]}}}}`, room, kind, user, data)
}

// pack builds a transaction and checks that it is one.
func pack(tb testing.TB, b *Builder, now int64) Transaction {
	tb.Helper()
	pdus, edus := b.Counts()
	size := b.size
	body := b.Finish(now)
	if canonical, err := AppendCanonical(nil, body, RawNumbers); err != nil || !bytes.Equal(canonical, body) {
		tb.Fatalf("not canonical: %s, %v", body, err)
	}
	if len(body) > size {
		tb.Fatalf("%d bytes, counted as %d", len(body), size)
	}
	txn, err := ParseTransaction(body)
	if err != nil {
		tb.Fatalf("%s: %v", body, err)
	}
	if len(txn.PDUs) != pdus || len(txn.EDUs) != edus || txn.Origin != b.origin || txn.OriginServerTS != now {
		tb.Fatalf("%d PDUs and %d EDUs of %s at %d; counted %d and %d", len(txn.PDUs), len(txn.EDUs), txn.Origin, txn.OriginServerTS, pdus, edus)
	}
	return txn
}

func add(tb testing.TB, b *Builder, k Kind, payload string) bool {
	tb.Helper()
	ok, err := b.Add(k, []byte(payload), 0)
	if err != nil {
		tb.Fatalf("%s: %v", payload, err)
	}
	return ok
}

func TestBuilderBody(t *testing.T) {
	b := NewBuilder("hs", 4<<20)
	if !b.Empty() {
		t.Error("a new one is not empty")
	}
	if got, want := string(b.Finish(7)), `{"origin":"hs","origin_server_ts":7,"pdus":[]}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	b = NewBuilder("hs", 4<<20)
	for _, it := range []struct {
		kind    Kind
		payload string
	}{
		{KindToDevice, `{"content":{"a":1},"edu_type":"m.direct_to_device"}`},
		{KindPDU, `{"depth":1}`},
		{KindPDU, `{"depth":2}`},
		{KindSigningKey, `{"s":1}`},
		{KindDeviceList, `{"d":1}`},
		{KindSigningKey, `{"s":2}`},
		{KindOther, `{}`},
		{KindReceipt, receiptItem("!s", "m.read", "@b", "")},
		{KindReceipt, receiptItem("!r", "m.read", "@b", "$t")},
		{KindReceipt, receiptItem("!r", "m.read", "@a", "")},
		{KindReceipt, receiptItem("!r", "m.read", "@b", "")},
		{KindReceipt, receiptItem("!r", "m.read", "@b", "main")},
		{KindReceipt, receiptItem("!r", "a", "@b", "")},
		{KindTyping, `{"t":1}`},
		{KindPresence, presenceState("@b", 1)},
		{KindPresence, presenceState("@a", 2)},
	} {
		if !add(t, b, it.kind, it.payload) {
			t.Errorf("no room for %s", it.payload)
		}
	}
	got := string(b.Finish(1795228940000))
	want := `{"edus":[{"content":{"a":1},"edu_type":"m.direct_to_device"},{"s":1},{"d":1},{"s":2},{},` +
		`{"content":{"!r":{"a":{"@b":{"data":{"ts":1},"event_ids":["$e"]}},` +
		`"m.read":{"@a":{"data":{"ts":1},"event_ids":["$e"]},"@b":{"data":{"thread_id":"$t","ts":1},"event_ids":["$e"]}}},` +
		`"!s":{"m.read":{"@b":{"data":{"ts":1},"event_ids":["$e"]}}}},"edu_type":"m.receipt"},` +
		`{"content":{"!r":{"m.read":{"@b":{"data":{"ts":1},"event_ids":["$e"]}}}},"edu_type":"m.receipt"},` +
		`{"content":{"!r":{"m.read":{"@b":{"data":{"thread_id":"main","ts":1},"event_ids":["$e"]}}}},"edu_type":"m.receipt"},` +
		`{"t":1},{"content":{"push":[` + presenceState("@b", 1) + `,` + presenceState("@a", 2) + `]},"edu_type":"m.presence"}],` +
		`"origin":"hs","origin_server_ts":1795228940000,"pdus":[{"depth":1},{"depth":2}]}`
	if got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
}

func TestBuilderAgesPresence(t *testing.T) {
	for _, c := range []struct {
		state  string
		waited int64
		want   string
	}{
		{`{"last_active_ago":1230,"presence":"online"}`, 770, `{"last_active_ago":2000,"presence":"online"}`},
		{`{"a":{"last_active_ago":1},"last_active_ago":0}`, 60_000, `{"a":{"last_active_ago":1},"last_active_ago":60000}`},
		{`{"last_active_ago":-5}`, 7, `{"last_active_ago":2}`},
		{`{"last_active_ago":5}`, 0, `{"last_active_ago":5}`},
		{`{"last_active_ago":5}`, -7, `{"last_active_ago":5}`},
		{`{"last_active_ago":9007199254740990}`, 1 << 62, `{"last_active_ago":9007199254740991}`},
		{`{"last_active_ago":1.5}`, 7, `{"last_active_ago":1.5}`},
		{`{"last_active_ago":"5"}`, 7, `{"last_active_ago":"5"}`},
		{`{"presence":"offline"}`, 7, `{"presence":"offline"}`},
		{`{}`, 7, `{}`},
	} {
		b := NewBuilder("hs", 4<<20)
		if ok, err := b.Add(KindPresence, []byte(c.state), c.waited); !ok || err != nil {
			t.Errorf("%s: %t, %v", c.state, ok, err)
		}
		want := `{"edus":[{"content":{"push":[` + c.want + `]},"edu_type":"m.presence"}],"origin":"hs","origin_server_ts":1,"pdus":[]}`
		if got := string(b.Finish(1)); got != want {
			t.Errorf("%s after %d ms\n got %s\nwant %s", c.state, c.waited, got, want)
		}
	}
}

// endless offers small items of a lane until one finds no room.
func endless(tb testing.TB, b *Builder, k Kind, size int) (n int) {
	tb.Helper()
	pad := strings.Repeat("x", size)
	for ; n < 1<<17; n++ {
		payload := fmt.Sprintf(`{"n":%d,"x":"%s"}`, n, pad)
		switch k {
		case KindReceipt: // of ever new threads, so that each takes an EDU
			payload = receiptItem("!r", "m.read", "@u", fmt.Sprint(n, pad))
		case KindPresence:
			payload = presenceState(fmt.Sprint("@u", n, pad), 1)
		}
		if !add(tb, b, k, payload) {
			if add(tb, b, k, `{"!r":{"t":{"@u":{}}}}`) {
				tb.Errorf("%v: a later item overtook one without room", k)
			}
			return n
		}
	}
	tb.Fatalf("%v: room without end", k)
	return n
}

// When every lane has more than enough, each gets its share, in EDUs or bytes.
func TestBuilderShares(t *testing.T) {
	all := []Kind{KindToDevice, KindPDU, KindDeviceList, KindOther, KindReceipt, KindTyping, KindPresence}

	b := NewBuilder("hs", 4<<20)
	var got []int
	for _, k := range all {
		got = append(got, endless(t, b, k, 0))
	}
	if want := []int{80, 50, 8, 2, 3, 5, 100}; !slices.Equal(got, want) {
		t.Errorf("took %v of the lanes, want %v", got, want)
	}
	if txn := pack(t, b, 1795228940000); len(txn.EDUs) != MaxEDUs || len(txn.PDUs) != MaxPDUs {
		t.Errorf("%d EDUs, %d PDUs", len(txn.EDUs), len(txn.PDUs))
	}

	const maxBytes = 320_000
	b = NewBuilder("hs", maxBytes)
	var bytesAfter []int
	for _, k := range all {
		endless(t, b, k, 4500)
		bytesAfter = append(bytesAfter, b.size)
	}
	for i, part := range []int{16, 24, 27, 29, 30, 31, 32} {
		if limit := maxBytes / 32 * part; bytesAfter[i] > limit || bytesAfter[i] < limit-5000 {
			t.Errorf("%d bytes after lane %d, want nearly %d", bytesAfter[i], i+1, limit)
		}
	}
	if body := b.Finish(1); len(body) > maxBytes {
		t.Errorf("%d bytes, at most %d", len(body), maxBytes)
	}

	// What nobody before has taken is there for the rest.
	for i, want := range []int{80, 50, 88, 90, 93, 98, 100 * maxStates} {
		b := NewBuilder("hs", 4<<20)
		if got := endless(t, b, all[i], 0); got != want {
			t.Errorf("%v alone: %d, want %d", all[i], got, want)
		}
		pack(t, b, 1795228940000)
	}
}

// A large item is no reason for a lane to starve: as the first of its lane it
// goes in beyond the bytes asked for, up to what a receiver takes, and beyond
// that alone.
func TestBuilderLargeItems(t *testing.T) {
	edu := func(size int) string { return `{"x":"` + strings.Repeat("x", size-len(`{"x":""}`)) + `"}` }

	b := NewBuilder("hs", 10_000)
	endless(t, b, KindToDevice, 100)
	if !add(t, b, KindDeviceList, edu(1<<20)) || add(t, b, KindDeviceList, edu(10)) || !add(t, b, KindOther, edu(10)) || add(t, b, KindOther, edu(10)) {
		t.Error("a large item first in its lane, then small ones")
	}
	if txn := pack(t, b, 1795228940000); len(txn.EDUs[len(txn.EDUs)-2].Raw) != 1<<20 {
		t.Error("the large item is not there")
	}

	b = NewBuilder("hs", 10_000)
	if !add(t, b, KindToDevice, edu(100)) || add(t, b, KindToDevice, edu(5000)) || add(t, b, KindToDevice, edu(10)) {
		t.Error("a large item that is not the first of its lane must wait")
	}

	b = NewBuilder("hs", 1<<30)
	if !add(t, b, KindToDevice, edu(10)) || add(t, b, KindOther, edu(MaxRequestBody)) {
		t.Error("a huge item must wait while there are others")
	}
	b = NewBuilder("hs", 10_000)
	if !add(t, b, KindOther, edu(MaxRequestBody)) || add(t, b, KindOther, edu(10)) || add(t, b, KindReceipt, receiptItem("!r", "t", "@u", "")) ||
		add(t, b, KindTyping, edu(10)) || add(t, b, KindPresence, `{}`) {
		t.Error("a huge item goes alone")
	}
	if body := b.Finish(1); len(body) < MaxRequestBody || !bytes.Contains(body, []byte(edu(MaxRequestBody))) {
		t.Errorf("%d bytes", len(body))
	}
}

// Receipts share EDUs of a moderate size.
func TestBuilderReceiptEDUs(t *testing.T) {
	b := NewBuilder("hs", 4<<20)
	size := 0
	for i := range 2000 {
		it := receiptItem("!room:example.org", "m.read", fmt.Sprintf("@user%d:example.org", i), "")
		size += len(it)
		if !add(t, b, KindReceipt, it) {
			t.Fatalf("no room for receipt %d", i)
		}
	}
	// A thread of the first user goes to the second EDU, though the third is open.
	add(t, b, KindReceipt, receiptItem("!room:example.org", "m.read", "@user0:example.org", "$t"))
	txn := pack(t, b, 1795228940000)
	if want := size/maxReceipts + 1; len(txn.EDUs) != want || want < 3 {
		t.Errorf("%d EDUs, want %d", len(txn.EDUs), want)
	}
	for _, e := range txn.EDUs {
		if len(e.Raw) > maxReceipts {
			t.Errorf("an EDU of %d bytes", len(e.Raw))
		}
	}
	if got := len(txn.Items(nil)); got != 2001 {
		t.Errorf("%d receipts came out", got)
	}
}

func TestBuilderRejects(t *testing.T) {
	b := NewBuilder("hs", 4<<20)
	add(t, b, KindToDevice, `{}`)
	for _, c := range []struct {
		kind    Kind
		payload string
	}{
		{KindPDU, ``}, {KindPDU, `[]`}, {KindPDU, ` {}`}, {KindOther, `null`},
		{KindReceipt, `{}`}, {KindReceipt, `{"!r":{}}`}, {KindReceipt, `{"!r":{"t":{}}}`}, {KindReceipt, `{"!r":{"t":{"@u":{}}}`},
		{KindReceipt, `{"!r":{"t":{"@u":{}}}}x`}, {KindReceipt, `{"!r":{"t":{"@u":{},"@v":{}}}}`}, {KindReceipt, `{"!r":{"t":{"@u":{}}},"!s":{"t":{"@u":{}}}}`},
		{KindPresence, `{`}, {KindPresence, `{"a":1`}, {KindPresence, `{"a":1}x`},
	} {
		if ok, err := b.Add(c.kind, []byte(c.payload), 0); ok || !errors.Is(err, ErrItem) {
			t.Errorf("%v %s: got %t, %v", c.kind, c.payload, ok, err)
		}
	}
	// The good ones beside them are taken.
	add(t, b, KindPresence, `{"user_id":"@u"}`)
	if txn := pack(t, b, 1795228940000); len(txn.EDUs) != 2 || len(txn.PDUs) != 0 {
		t.Errorf("%d EDUs, %d PDUs", len(txn.EDUs), len(txn.PDUs))
	}

	for _, k := range []Kind{0, NumKinds + 1, KindToDevice} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("kind %d after presence: no panic", k)
				}
			}()
			b := NewBuilder("hs", 4<<20)
			add(t, b, KindPresence, `{}`)
			add(t, b, k, `{}`)
		}()
	}
}

// The payload may be reused after Add.
func TestBuilderCopies(t *testing.T) {
	b := NewBuilder("hs", 4<<20)
	for _, it := range []struct {
		kind    Kind
		payload string
	}{
		{KindToDevice, `{"a":1}`}, {KindPDU, `{"b":1}`}, {KindReceipt, receiptItem("!r", "t", "@u", "")}, {KindPresence, `{"c":1}`},
	} {
		p := []byte(it.payload)
		if ok, err := b.Add(it.kind, p, 0); !ok || err != nil {
			t.Fatal(ok, err)
		}
		clear(p)
	}
	pack(t, b, 1795228940000)
}

// What arbitrary transactions split into can be packed again, into as many
// transactions as it takes, and splits into the same items.
func FuzzSplitAndPack(f *testing.F) {
	for _, body := range sentTransactions(f) {
		f.Add(body, uint16(4096))
	}
	f.Add(hundredEDUs(), uint16(300))
	f.Add([]byte(`{"edus":[{"content":{"!r":{"t":{"@u":{"data":{"thread_id":"a"}},"@v":{}}}},"edu_type":"m.receipt"},`+
		`{"content":{"!r":{"t":{"@u":{}}}},"edu_type":"m.receipt"},{"content":{"push":[{"user_id":"@u"},{"user_id":"@v"}]},"edu_type":"m.presence"}],`+
		`"origin":"hs","pdus":[{},{}]}`), uint16(0))
	f.Fuzz(func(t *testing.T, body []byte, maxBytes uint16) {
		txn, err := ParseTransaction(body)
		if err != nil || bytes.Count(body, []byte("{")) > maxItems {
			return // beyond the bound EDUs stay whole, and split when they come with fewer
		}
		waiting := txn.Items(nil)
		slices.SortStableFunc(waiting, func(x, y Item) int { return int(x.Kind.Lane()) - int(y.Kind.Lane()) })
		describe := func(items []Item) []string {
			var s []string
			for _, it := range items {
				s = append(s, fmt.Sprintf("%d %v %q %q %s %d %v", it.Kind.Lane(), it.Kind, it.Key, it.Group, it.Payload, it.Depth, it.Lifetime))
			}
			slices.Sort(s)
			return s
		}
		want := describe(waiting)
		var again []Item
		for len(waiting) > 0 {
			b := NewBuilder(txn.Origin, int(maxBytes))
			waiting = slices.DeleteFunc(waiting, func(it Item) bool {
				ok, err := b.Add(it.Kind, it.Payload, 0)
				if err != nil {
					t.Fatalf("%s: %v", it.Payload, err)
				}
				return ok
			})
			if b.Empty() {
				t.Fatalf("%d items find no room", len(waiting))
			}
			packed := pack(t, b, 1795228940000)
			again = append(again, packed.Items(nil)...)
		}
		if got := describe(again); !slices.Equal(got, want) {
			t.Fatalf("%q\n got %q\nwant %q", body, got, want)
		}
	})
}

package matrix

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestKinds(t *testing.T) {
	for k, want := range [...]string{"none", "to_device", "pdu", "device_list", "signing_key", "other", "receipt", "typing", "presence", "invalid"} {
		if got := Kind(k).String(); got != want {
			t.Errorf("kind %d is %q, want %q", k, got, want)
		}
	}
	last := Lane(0)
	for k := Kind(1); k <= NumKinds; k++ {
		if k.Lane() < last || k.Lane() > last+1 {
			t.Errorf("%v is in lane %d after lane %d", k, k.Lane(), last)
		}
		last = k.Lane()
	}
	if last != NumLanes {
		t.Errorf("the last lane is %d, want %d", last, NumLanes)
	}
	for _, k := range []Kind{0, NumKinds + 1, 255} {
		if k.Lane() != 0 || k.Merge() != MergeNever {
			t.Errorf("kind %d has lane %d and merge %d", k, k.Lane(), k.Merge())
		}
	}
}

func TestExpired(t *testing.T) {
	const accepted = 1795228940000
	for _, c := range []struct {
		edu  string
		want time.Duration // how long it is good for; 0 is for ever
	}{
		{`{"content":{"room_id":"!r:hs","typing":true,"user_id":"@u:hs"},"edu_type":"m.typing"}`, 30 * time.Second},
		{`{"content":{"room_id":"!r:hs","typing":false,"user_id":"@u:hs"},"edu_type":"m.typing"}`, time.Minute},
		{`{"content":{"push":[{"presence":"online","user_id":"@u:hs"}]},"edu_type":"m.presence"}`, 30 * time.Minute},
		{`{"content":{"push":[{"presence":"offline","user_id":"@u:hs"}]},"edu_type":"m.presence"}`, 30 * time.Minute},
		{`{"content":{"!r:hs":{"m.read":{"@u:hs":{"event_ids":["$e"]}}}},"edu_type":"m.receipt"}`, 168 * time.Hour},
		{`{"content":{},"edu_type":"m.direct_to_device"}`, 0},
		{`{"content":{"device_id":"D","stream_id":1,"user_id":"@u:hs"},"edu_type":"m.device_list_update"}`, 0},
		{`{"content":{"user_id":"@u:hs"},"edu_type":"m.signing_key_update"}`, 0},
		{`{"content":{},"edu_type":"org.example.new"}`, 0},
	} {
		it := splitOne(t, c.edu)
		if it.Expired(accepted, accepted) || it.Expired(accepted, accepted-time.Hour.Milliseconds()) {
			t.Errorf("%s has expired at once", c.edu)
		}
		if c.want == 0 {
			if it.Expired(0, 1<<62) {
				t.Errorf("%s has expired", c.edu)
			}
			continue
		}
		if end := accepted + c.want.Milliseconds(); it.Expired(accepted, end) || !it.Expired(accepted, end+1) {
			t.Errorf("%s: good for %v, want %v", c.edu, it.Lifetime, c.want)
		}
	}
}

// split returns the items of a transaction with these EDUs.
func split(tb testing.TB, edus ...string) []Item {
	tb.Helper()
	txn, err := ParseTransaction([]byte(`{"edus":[` + strings.Join(edus, ",") + `],"origin":"hs","pdus":[]}`))
	if err != nil {
		tb.Fatalf("%s: %v", edus, err)
	}
	return txn.Items(nil)
}

func splitOne(tb testing.TB, edu string) Item {
	tb.Helper()
	items := split(tb, edu)
	if len(items) != 1 {
		tb.Fatalf("%s: %d items", edu, len(items))
	}
	return items[0]
}

func TestItems(t *testing.T) {
	long := "@" + strings.Repeat("x", maxKeyPart)
	for _, c := range []struct {
		edu  string
		want string // kind key group payload, or "-" for the whole EDU, one line for each
	}{
		{`{"content":{"push":[{"presence":"online","user_id":"@a:hs"},{"user_id":"@b:hs","x":{"y":[]}}]},"edu_type":"m.presence"}`,
			`presence|@a:hs||{"presence":"online","user_id":"@a:hs"}` + "\n" + `presence|@b:hs||{"user_id":"@b:hs","x":{"y":[]}}`},
		{`{"content":{"push":[]},"edu_type":"m.presence"}`, ``},
		{`{"content":{},"edu_type":"m.presence"}`, `other|||-`},
		{`{"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":{}},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":["x"]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"user_id":"@a:hs"},{"presence":"online"}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"user_id":""}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"user_id":7}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"user_id":"` + long + `"}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"user_id":"@\"a:hs"}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"\"":1,"user_id":"@a:hs"}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"more":1,"push":[{"user_id":"@a:hs"}]},"edu_type":"m.presence"}`, `other|||-`},
		{`{"content":{"push":[{"user_id":"@a:hs"}]},"edu_type":"m.presence","more":1}`, `other|||-`},

		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{"data":{"ts":1},"event_ids":["$e"]}}}},"edu_type":"m.receipt"}`,
			`receipt|!r:hs"m.read"@a:hs||{"!r:hs":{"m.read":{"@a:hs":{"data":{"ts":1},"event_ids":["$e"]}}}}`},
		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{"data":{"thread_id":"$t"},"event_ids":["$e"]},"@b:hs":{"data":{"thread_id":"main"}}},"m.x":{"@a:hs":{}}},"!s:hs":{"m.read":{"@a:hs":{"data":{"thread_id":null}}}}},"edu_type":"m.receipt"}`,
			`receipt|!r:hs"m.read"@a:hs"$t||{"!r:hs":{"m.read":{"@a:hs":{"data":{"thread_id":"$t"},"event_ids":["$e"]}}}}` + "\n" +
				`receipt|!r:hs"m.read"@b:hs"main||{"!r:hs":{"m.read":{"@b:hs":{"data":{"thread_id":"main"}}}}}` + "\n" +
				`receipt|!r:hs"m.x"@a:hs||{"!r:hs":{"m.x":{"@a:hs":{}}}}` + "\n" +
				`receipt|!s:hs"m.read"@a:hs||{"!s:hs":{"m.read":{"@a:hs":{"data":{"thread_id":null}}}}}`},
		{`{"content":{},"edu_type":"m.receipt"}`, ``},
		{`{"content":{"!r:hs":{"m.read":{}}},"edu_type":"m.receipt"}`, ``},
		{`{"content":[],"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":[]},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":"x"}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{"event_ids":["$e"]},"@b:hs":7}}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{"data":null}}}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{"data":{"thread_id":"\n"}}}}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{"data":{"thread_id":""}}}}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"":{}}}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"` + long + `":{}}}},"edu_type":"m.receipt"}`, `other|||-`},
		{`{"content":{"!r:hs":{"m.read":{"@a:hs":{}}}},"edu_type":"m.receipt","origin":"hs"}`, `other|||-`},

		{`{"content":{"room_id":"!r:hs","typing":true,"user_id":"@a:hs"},"edu_type":"m.typing","origin":"hs"}`, `typing|!r:hs"@a:hs||-`},
		{`{"content":{"room_id":"!r:hs","user_id":"@a:hs"},"edu_type":"m.typing"}`, `other|||-`},
		{`{"content":{"room_id":"!r:hs","typing":1,"user_id":"@a:hs"},"edu_type":"m.typing"}`, `other|||-`},
		{`{"content":{"typing":true,"user_id":"@a:hs"},"edu_type":"m.typing"}`, `other|||-`},
		{`{"content":{"room_id":"!r:hs","typing":true},"edu_type":"m.typing"}`, `other|||-`},

		{`{"content":{"device_id":"D","prev_id":[1,"2"],"stream_id":3,"user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|@a:hs"D|@a:hs|-`},
		{`{"content":{"device_id":"D","stream_id":"3","user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|@a:hs"D|@a:hs|-`},
		{`{"content":{"device_id":"D","prev_id":[` + strings.Repeat("1,", maxPrevIDs-1) + `1],"stream_id":3,"user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|@a:hs"D|@a:hs|-`},
		{`{"content":{"device_id":"D","prev_id":[` + strings.Repeat("1,", maxPrevIDs) + `1],"stream_id":3,"user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|||-`},
		{`{"content":{"device_id":"D","prev_id":[1.5],"stream_id":3,"user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|||-`},
		{`{"content":{"device_id":"D","prev_id":1,"stream_id":3,"user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|||-`},
		{`{"content":{"device_id":"D","stream_id":null,"user_id":"@a:hs"},"edu_type":"m.device_list_update"}`, `device_list|||-`},
		{`{"content":{"device_id":"D","stream_id":3},"edu_type":"m.device_list_update"}`, `device_list|||-`},
		{`{"content":{"device_id":"D","stream_id":3,"user_id":"@a:hs"},"edu_type":"m.device_list_update","x":1}`, `device_list|||-`},
		{`{"edu_type":"m.device_list_update"}`, `device_list|||-`},

		{`{"content":{"master_key":{},"user_id":"@a:hs"},"edu_type":"m.signing_key_update"}`, `signing_key|m.signing_key_update"@a:hs|@a:hs|-`},
		{`{"content":{"master_key":{},"user_id":"@a:hs"},"edu_type":"org.matrix.signing_key_update"}`, `signing_key|org.matrix.signing_key_update"@a:hs|@a:hs|-`},
		{`{"content":{"master_key":{}},"edu_type":"m.signing_key_update"}`, `signing_key|||-`},
		{`{"content":7,"edu_type":"m.signing_key_update"}`, `signing_key|||-`},
		{`{"content":{"user_id":"@a:hs"},"edu_type":"m.signing_key_update","x":1}`, `signing_key|||-`},

		{`{"content":{"message_id":"x"},"edu_type":"m.direct_to_device"}`, `to_device|||-`},
		{`{"edu_type":"m.direct_to_device"}`, `to_device|||-`},
		{`{"content":{"user_id":"@a:hs"},"edu_type":"org.example.new"}`, `other|||-`},
		{`{"content":{},"edu_type":"m.\"typing"}`, `other|||-`},
		{`{"content":{},"edu_type":7}`, `other|||-`},
		{`{}`, `other|||-`},
	} {
		var got []string
		for _, it := range split(t, c.edu) {
			payload := string(it.Payload)
			if payload == c.edu {
				payload = "-"
			}
			got = append(got, fmt.Sprintf("%v|%s|%s|%s", it.Kind, it.Key, it.Group, payload))
		}
		if got := strings.Join(got, "\n"); got != c.want {
			t.Errorf("%.300s\n got %.300s\nwant %.300s", c.edu, got, c.want)
		}
	}
}

func TestItemsOfPDUs(t *testing.T) {
	txn, err := ParseTransaction([]byte(`{"edus":[{}],"origin":"hs","pdus":[{"depth":7,"room_id":"!r:hs"},{"room_id":"!r:hs", "depth":7},{}]}`))
	if err != nil {
		t.Fatal(err)
	}
	items := txn.Items([]Item{{Kind: KindTyping}})
	if len(items) != 5 || items[0].Kind != KindTyping || items[4].Kind != KindOther {
		t.Fatalf("got %+v", items)
	}
	if it := items[1]; it.Kind != KindPDU || it.Group != "!r:hs" || it.Depth != 7 || it.Lifetime != 0 || string(it.Payload) != `{"depth":7,"room_id":"!r:hs"}` {
		t.Errorf("got %+v", it)
	}
	if items[1].Key != items[2].Key || items[1].Key == items[3].Key || len(items[1].Key) != 32 {
		t.Errorf("keys %x, %x, %x", items[1].Key, items[2].Key, items[3].Key)
	}
}

// A transaction cannot become more items than the bound: EDUs that would go
// beyond it stay whole.
func TestItemsBound(t *testing.T) {
	states := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `{"user_id":"@%d"},`, i)
		}
		return `{"content":{"push":[` + strings.TrimSuffix(b.String(), ",") + `]},"edu_type":"m.presence"}`
	}
	receipts := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `"@%d":{},`, i)
		}
		return `{"content":{"!r":{"m.read":{` + strings.TrimSuffix(b.String(), ",") + `}}},"edu_type":"m.receipt"}`
	}
	for _, c := range []struct {
		edus []string
		want int
	}{
		{[]string{states(maxItems)}, maxItems},
		{[]string{states(maxItems + 1)}, 1},
		{[]string{receipts(maxItems)}, maxItems},
		{[]string{receipts(maxItems + 1)}, 1},
		{[]string{states(maxItems - 1), receipts(1)}, maxItems},
		{[]string{states(maxItems - 1), receipts(2)}, maxItems},
		{[]string{states(3), receipts(maxItems - 2), receipts(2)}, 3 + 1 + 2},
	} {
		if got := len(split(t, c.edus...)); got != c.want {
			t.Errorf("%d items, want %d", got, c.want)
		}
	}
}

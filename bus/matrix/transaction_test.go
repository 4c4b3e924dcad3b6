package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// sentTransactions are the bodies of the transactions that a Synapse 1.160 sent.
func sentTransactions(tb testing.TB) [][]byte {
	tb.Helper()
	var bodies [][]byte
	for _, r := range recordings(tb) {
		if strings.Contains(r.Target, "/send/") && r.Body != "" {
			bodies = append(bodies, []byte(r.Body))
		}
	}
	for _, r := range readLines[struct{ Body string }](tb, "testdata/transactions.jsonl", 4) {
		bodies = append(bodies, []byte(r.Body))
	}
	return bodies
}

func TestParseTransaction(t *testing.T) {
	body := []byte(`{"edus":[{"content":{"a":1},"edu_type":"x.y"},{"edu_type":7},{}],"origin":"hs1.test:18448","origin_server_ts":1795228940000,` +
		`"other":[{"pdus":[1]}],"pdus":[{"content":{"depth":1},"depth":39,"origin_server_ts":1795228939999,"prev_events":["$a","$b"],"room_id":"!r:hs",` +
		`"sender":"@u:hs","type":"m.room.message"},{"depth":1,"room_id":5,"sender":"@u:hs","type":"m.room.create"}]}`)
	txn, err := ParseTransaction(body)
	if err != nil {
		t.Fatal(err)
	}
	if txn.Origin != "hs1.test:18448" || txn.OriginServerTS != 1795228940000 || len(txn.PDUs) != 2 || len(txn.EDUs) != 3 {
		t.Fatalf("got %+v", txn)
	}
	p := txn.PDUs[0]
	if p.Room != "!r:hs" || p.Type != "m.room.message" || p.Sender != "@u:hs" || p.Depth != 39 || p.OriginServerTS != 1795228939999 {
		t.Errorf("got %+v", p)
	}
	if p := txn.PDUs[1]; p.Room != "" || p.Type != "m.room.create" || p.Depth != 1 {
		t.Errorf("got %+v", p)
	}
	if e := txn.EDUs[0]; e.Type != "x.y" || string(e.Raw) != `{"content":{"a":1},"edu_type":"x.y"}` {
		t.Errorf("got %q %s", e.Type, e.Raw)
	}
	if e := txn.EDUs[1]; e.Type != "" || string(e.Raw) != `{"edu_type":7}` {
		t.Errorf("got %q %s", e.Type, e.Raw)
	}
	for _, raw := range [][]byte{txn.PDUs[0].Raw, txn.PDUs[1].Raw, txn.EDUs[0].Raw, txn.EDUs[2].Raw} {
		if !partOf(body, raw) {
			t.Errorf("%s is not a part of the body", raw)
		}
	}
}

// partOf reports whether part lies in the memory of whole.
func partOf(whole, part []byte) bool {
	for i := range whole {
		if &whole[i] == &part[0] {
			return true
		}
	}
	return false
}

// What another encoder wrote comes out as what it means, in canonical form.
func TestParseTransactionCanonical(t *testing.T) {
	body := []byte(" {\n\"pdus\" : [ { \"type\":\"m\\u002ex\", \"room_id\":\"!\\u0072:hs\" ,\"b\\\"\":1.50 } ,{\"z\":1e3,\"a\":\"\\/\"}],\"origin\":\"hs\"," +
		"\"edus\":[\t{\"edu_type\":\"m.typing\", \"content\":{\"user_id\":\"@u:hs\",\"typing\":true,\"room_id\":\"!r:hs\",\"typing\":false}}]\r\n} ")
	txn, err := ParseTransaction(body)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{`{"b\"":1.50,"room_id":"!r:hs","type":"m.x"}`, `{"a":"/","z":1e3}`} {
		if got := string(txn.PDUs[i].Raw); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if p := txn.PDUs[0]; p.Room != "" || p.Type != "" {
		t.Errorf("members beside a name with escapes: %+v", p)
	}
	items := txn.Items(nil)
	if want := `{"content":{"room_id":"!r:hs","typing":false,"user_id":"@u:hs"},"edu_type":"m.typing"}`; len(items) != 3 ||
		string(items[2].Payload) != want || items[2].Kind != KindTyping {
		t.Errorf("got %v", items)
	}
}

func TestParseTransactionRejects(t *testing.T) {
	list := func(n int, element string) string {
		return strings.TrimSuffix(strings.Repeat(element+",", n), ",")
	}
	for _, c := range []struct {
		body string
		want error
	}{
		{``, ErrJSONSyntax},
		{`{`, ErrJSONSyntax},
		{`{"pdus":[],"origin":"hs"`, ErrJSONSyntax},
		{`{"pdus":[],"origin":"hs"}}`, ErrJSONSyntax},
		{`{"pdus":[],"origin":"hs",}`, ErrJSONSyntax},
		{`{"pdus":[{}`, ErrJSONSyntax},
		{`{"pdus":[{},]}`, ErrJSONSyntax},
		{`{"pdus":[{]}`, ErrJSONSyntax},
		{`{"pdus":[{"a":"\ud800"}],"origin":"hs"}`, ErrJSONSyntax},
		{"{\"pdus\":[{\"a\":\"\xff\"}],\"origin\":\"hs\"}", ErrJSONSyntax},
		{`{"pdus":[],"origin":"hs","x":tru}`, ErrJSONSyntax},
		{`{"pdu\u0073":[],"origin":"hs"}`, ErrJSONSyntax},
		{`[]`, ErrTransaction},
		{`null`, ErrTransaction},
		{`"pdus"`, ErrTransaction},
		{`{"pdus":null,"origin":"hs"}`, ErrTransaction},
		{`{"pdus":{},"origin":"hs"}`, ErrTransaction},
		{`{"pdus":[],"edus":null,"origin":"hs"}`, ErrTransaction},
		{`{"pdus":["$id"],"origin":"hs"}`, ErrTransaction},
		{`{"pdus":[[]],"origin":"hs"}`, ErrTransaction},
		{`{"pdus":[],"edus":["m.typing"],"origin":"hs"}`, ErrTransaction},
		{`{"pdus":[],"origin":"hs","pdus":[]}`, ErrTransaction},
		{`{"pdus":[],"edus":[],"edus":[],"origin":"hs"}`, ErrTransaction},
		{`{"pdus":[],"origin":"hs","origin":"hs"}`, ErrTransaction},
		{`{"pdus":[],"origin":"hs","origin_server_ts":1,"origin_server_ts":1}`, ErrTransaction},
		{`{"pdus":[` + list(MaxPDUs+1, `{}`) + `],"origin":"hs"}`, ErrTooManyPDUs},
		{`{"pdus":[` + list(MaxPDUs, `{}`) + `],"edus":[` + list(MaxEDUs+1, `{}`) + `],"origin":"hs"}`, ErrTooManyEDUs},
		{`{"pdus":[],"x":` + strings.Repeat("[", 1<<20), ErrJSONComplex},
		{`{"pdus":[{"x":` + strings.Repeat("[", 1<<20), ErrJSONComplex},
	} {
		txn, err := ParseTransaction([]byte(c.body))
		if !errors.Is(err, c.want) || !reflect.DeepEqual(txn, Transaction{}) {
			t.Errorf("%.100s: got %v, want %v", c.body, err, c.want)
		}
	}
}

// What a Synapse takes is taken: a transaction without what is empty, whatever it says of
// its origin, of which the header speaks, and of its time.
func TestParseTransactionIsNotStricterThanASynapse(t *testing.T) {
	for _, c := range []struct {
		body       string
		err        error
		ts         int64
		pdus, edus int
	}{
		{`{"edus":[{"edu_type":"m.typing"}],"origin":"hs"}`, nil, 0, 0, 1},
		{`{"pdus":[{}],"origin":"hs"}`, nil, 0, 1, 0},
		{`{"origin":"hs"}`, nil, 0, 0, 0},
		{`{}`, ErrNoOrigin, 0, 0, 0},
		{`{"pdus":[{}]}`, ErrNoOrigin, 0, 1, 0},
		{`{"pdus":[{}],"origin":7}`, ErrNoOrigin, 0, 1, 0},
		{`{"pdus":[{}],"origin":null}`, ErrNoOrigin, 0, 1, 0},
		{`{"pdus":[{}],"origin":"no server"}`, ErrNoOrigin, 0, 1, 0},
		{`{"pdus":[{}],"origin":["hs"]}`, ErrNoOrigin, 0, 1, 0},
		{`{"origin":"hs","origin_server_ts":1700000000000}`, nil, 1_700_000_000_000, 0, 0},
		{`{"origin":"hs","origin_server_ts":1.7e12}`, nil, 0, 0, 0},
		{`{"origin":"hs","origin_server_ts":1.5}`, nil, 0, 0, 0},
		{`{"origin":"hs","origin_server_ts":"1700000000000"}`, nil, 0, 0, 0},
		{`{"origin":"hs","origin_server_ts":null}`, nil, 0, 0, 0},
		{`{"origin":"hs","origin_server_ts":{"a":1}}`, nil, 0, 0, 0},
		{`{"origin":"hs","origin_server_ts":17000000000000000000}`, nil, 0, 0, 0},
		{`{"origin":"hs","previous_ids":[],"pdu_failures":[],"hashes":{"sha256":"a"}}`, nil, 0, 0, 0},
	} {
		txn, err := ParseTransaction([]byte(c.body))
		if !errors.Is(err, c.err) || txn.OriginServerTS != c.ts || len(txn.PDUs) != c.pdus || len(txn.EDUs) != c.edus || (c.err == nil) != (txn.Origin == "hs") {
			t.Errorf("%s: %+v, %v", c.body, txn, err)
		}
	}
}

// What is exactly at a bound is taken, and can be signed.
func TestParseTransactionBounds(t *testing.T) {
	full := `{"edus":[` + strings.Repeat(`{},`, MaxEDUs-1) + `{}],"origin":"hs","pdus":[` + strings.Repeat(`{},`, MaxPDUs-1) + `{}]}`
	nested := func(depth int) string {
		return `{"origin":"hs","pdus":[` + strings.Repeat(`{"a":`, depth) + "1" + strings.Repeat("}", depth) + `]}`
	}
	padded := full[:len(full)-1] + `,"x":"` + strings.Repeat("x", MaxRequestBody-len(full)-len(`,"x":""`)) + `"}`
	for _, body := range []string{full, padded, nested(998)} {
		txn, err := ParseTransaction([]byte(body))
		if err != nil || len(txn.PDUs)+len(txn.EDUs) != 1 && len(txn.PDUs)+len(txn.EDUs) != 150 {
			t.Errorf("%.100s: %d PDUs, %d EDUs, %v", body, len(txn.PDUs), len(txn.EDUs), err)
		}
		if _, err := SignRequest(specKey(t), "hs", "other", "PUT", "/", []byte(body)); err != nil {
			t.Errorf("%.100s: %v", body, err)
		}
	}
	if _, err := ParseTransaction([]byte(nested(999))); !errors.Is(err, ErrJSONComplex) {
		t.Errorf("too deep: got %v", err)
	}
	if _, err := SignRequest(specKey(t), "hs", "other", "PUT", "/", []byte(nested(999))); !errors.Is(err, ErrJSONComplex) {
		t.Errorf("signing what is too deep: got %v", err)
	}
}

func TestPrevEvents(t *testing.T) {
	for _, c := range []struct {
		prev string
		want []string
	}{
		{`["$a","$b"]`, []string{"$a", "$b"}},
		{`[["$a:hs",{"sha256":"x"}],["$b:hs",{}]]`, []string{"$a:hs", "$b:hs"}},
		{`[["$a:hs"],"$b",7,{},[],[7,"$no"],"$c"]`, []string{"$a:hs", "$b", "$c"}},
		{`[]`, nil}, {`{}`, nil}, {`"$a"`, nil}, {`null`, nil},
	} {
		txn, err := ParseTransaction([]byte(`{"origin":"hs","pdus":[{"prev_events":` + c.prev + `}]}`))
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Collect(txn.PDUs[0].PrevEvents()); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.prev, got, c.want)
		}
		for id := range txn.PDUs[0].PrevEvents() {
			if id != c.want[0] {
				t.Errorf("%s: the first is %q", c.prev, id)
			}
			break
		}
	}
	if got := slices.Collect(new(PDU).PrevEvents()); got != nil {
		t.Errorf("no event: got %q", got)
	}
}

// Synapse's own transactions come out of the builder as they went in.
func TestTransactionSynapse(t *testing.T) {
	seen := make(map[Kind]int)
	for _, body := range sentTransactions(t) {
		txn, err := ParseTransaction(body)
		if err != nil {
			t.Errorf("%s: %v", body, err)
			continue
		}
		items := txn.Items(nil)
		b := NewBuilder(txn.Origin, MaxRequestBody)
		for _, it := range items {
			seen[it.Kind]++
			if !partOf(body, it.Payload) {
				t.Errorf("%v: a copy of %s", it.Kind, it.Payload)
			}
			if ok, err := b.Add(it.Kind, it.Payload, 0); !ok || err != nil {
				t.Errorf("%v: %t, %v", it.Kind, ok, err)
			}
		}
		if got := b.Finish(txn.OriginServerTS); !bytes.Equal(got, body) {
			t.Errorf("\n got %s\nwant %s", got, body)
		}
	}
	for _, k := range []Kind{KindPDU, KindToDevice, KindDeviceList, KindReceipt, KindTyping, KindPresence} {
		if seen[k] == 0 {
			t.Errorf("the recordings have no %v", k)
		}
	}
}

// asDecoded reads a transaction with encoding/json.
func asDecoded(body []byte) (pdus, edus []json.RawMessage, err error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return nil, nil, err
	}
	if err := json.Unmarshal(members["pdus"], &pdus); err != nil {
		return nil, nil, err
	}
	if len(members["edus"]) > 0 {
		err = json.Unmarshal(members["edus"], &edus)
	}
	return pdus, edus, err
}

func FuzzParseTransaction(f *testing.F) {
	for _, body := range sentTransactions(f) {
		f.Add(body)
	}
	f.Add([]byte("{\"pdus\":[{\"b\":1, \"a\":\"\\u0041\"}] ,\"origin\":\"hs\",\"edus\":[{}]}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		txn, err := ParseTransaction(body)
		if err != nil {
			return
		}
		pdus, edus, err := asDecoded(body)
		if err != nil || len(pdus) != len(txn.PDUs) || len(edus) != len(txn.EDUs) {
			t.Fatalf("%q has %d PDUs and %d EDUs, %v; got %d and %d", body, len(pdus), len(edus), err, len(txn.PDUs), len(txn.EDUs))
		}
		for i, p := range txn.PDUs {
			want, err := AppendCanonical(nil, pdus[i], RawNumbers)
			if err != nil || !bytes.Equal(p.Raw, want) {
				t.Fatalf("%q: PDU %d is %q, want %q, %v", body, i, p.Raw, want, err)
			}
			for range p.PrevEvents() {
			}
		}
		for i, e := range txn.EDUs {
			want, err := AppendCanonical(nil, edus[i], RawNumbers)
			if err != nil || !bytes.Equal(e.Raw, want) {
				t.Fatalf("%q: EDU %d is %q, want %q, %v", body, i, e.Raw, want, err)
			}
		}
		if _, err := SignRequest(specKey(t), string(txn.Origin), "hs", "PUT", "/", body); err != nil {
			t.Fatalf("%q parses but cannot be signed: %v", body, err)
		}
	})
}

// A hundred EDUs of the usual mix.
func hundredEDUs() []byte {
	var edus []string
	for i := range MaxEDUs {
		user := fmt.Sprintf("@user%d:example.org", i)
		switch i % 5 {
		case 0:
			edus = append(edus, `{"content":{"room_id":"!room:example.org","typing":true,"user_id":"`+user+`"},"edu_type":"m.typing"}`)
		case 1:
			states := strings.Repeat(`{"last_active_ago":1230,"presence":"online","user_id":"`+user+`"},`, 10)
			edus = append(edus, `{"content":{"push":[`+states[:len(states)-1]+`]},"edu_type":"m.presence"}`)
		case 2:
			edus = append(edus, `{"content":{"!room:example.org":{"m.read":{"`+user+`":{"data":{"ts":1795228952506},"event_ids":["$xPP4BUmVC5noTOsej3NdklJq3QSUHmA7kYO-JYuADLw"]}}}},"edu_type":"m.receipt"}`)
		case 3:
			edus = append(edus, `{"content":{"device_id":"DEV","prev_id":[7],"stream_id":8,"user_id":"`+user+`"},"edu_type":"m.device_list_update"}`)
		case 4:
			edus = append(edus, `{"content":{"message_id":"id","messages":{"@bob:hs2":{"*":{"ciphertext":"`+strings.Repeat("x", 1000)+`"}}},"sender":"`+user+`","type":"m.x"},"edu_type":"m.direct_to_device"}`)
		}
	}
	return []byte(`{"edus":[` + strings.Join(edus, ",") + `],"origin":"example.org","origin_server_ts":1795228952515,"pdus":[]}`)
}

func BenchmarkParseTransaction(b *testing.B) {
	body := hundredEDUs()
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseTransaction(body); err != nil {
			b.Fatal(err)
		}
	}
}

// From a transaction of a hundred EDUs to the items, and to a transaction again.
func BenchmarkSplitAndPack(b *testing.B) {
	body := hundredEDUs()
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	var items []Item
	for b.Loop() {
		txn, err := ParseTransaction(body)
		if err != nil {
			b.Fatal(err)
		}
		items = txn.Items(items[:0])
		w := NewBuilder(txn.Origin, MaxRequestBody)
		for lane := LaneToDevice; lane <= NumLanes; lane++ {
			for i := range items {
				if items[i].Kind.Lane() == lane {
					if _, err := w.Add(items[i].Kind, items[i].Payload, 1000); err != nil {
						b.Fatal(err)
					}
				}
			}
		}
		if len(w.Finish(1795228952515)) == 0 {
			b.Fatal("no body")
		}
	}
}

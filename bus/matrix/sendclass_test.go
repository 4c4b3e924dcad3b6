package matrix

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestSendClass(t *testing.T) {
	for _, c := range []struct {
		body string
		want Class
	}{
		{`{"pdus":[]}`, ClassPresence},
		{`{"pdus":[],"edus":[]}`, ClassPresence},
		{`{}`, ClassPresence},
		{`{"pdus":[{}]}`, ClassEvent},
		{`{"edus":[{"edu_type":"m.direct_to_device","content":{}}],"origin":"a","origin_server_ts":1,"pdus":[{"a":1}]}`, ClassEvent},
		{`{"edus":[{"content":{"push":[]},"edu_type":"m.presence"},{"edu_type":"m.typing"},{"edu_type":"m.receipt"}],"pdus":[]}`, ClassPresence},
		{`{"edus":[{"edu_type":"m.presence"},{"edu_type":"m.direct_to_device"}],"pdus":[]}`, ClassDevice},
		{`{"edus":[{"edu_type":"m.device_list_update"}],"pdus":[]}`, ClassDevice},
		{`{"edus":[{"edu_type":"m.signing_key_update"}],"pdus":[]}`, ClassDevice},
		{`{"edus":[{"edu_type":"org.example.new"}],"pdus":[]}`, ClassDevice},
		{`{"edus":[{"edu_type":"m.pr\u0065sence"}],"pdus":[]}`, ClassEvent},
		{" {\n\t\"pdus\" : [ ] , \"edus\" : [ { \"edu_type\" : \"m.typing\" , \"content\" : { } } ] } ", ClassPresence},
		// The text of a message is not the transaction's.
		{`{"edus":[{"content":{"pdus":[1],"edu_type":"m.direct_to_device","x":"\"pdus\":[1]\\","y":[[[]]]},"edu_type":"m.presence"}],"pdus":[]}`, ClassPresence},
		{`{"pdus":[],"x":{"pdus":[1]},"y":-1.5e3,"z":null}`, ClassPresence},
		// Of two members of one name any may be meant.
		{`{"pdus":[],"edus":[],"pdus":[{}]}`, ClassEvent},

		{``, ClassEvent},
		{`null`, ClassEvent},
		{`[]`, ClassEvent},
		{`{`, ClassEvent},
		{`{"pdus":null}`, ClassEvent},
		{`{"pdus":{}}`, ClassEvent},
		{`{"pdu\u0073":[]}`, ClassEvent},
		{`{"pdus":[`, ClassEvent},
		{`{"pdus":[],`, ClassEvent},
		{`{"pdus":[],"a":"`, ClassEvent},
		{`{"pdus":[],"a":"\`, ClassEvent},
		{`{"pdus":[],"a":[[`, ClassEvent},
		{`{"edus":[{"edu_type":"m.presence"`, ClassEvent},
		{`{"edus":[{"edu_type":7}],"pdus":[]}`, ClassEvent},
		{`{"edus":["m.presence"],"pdus":[]}`, ClassEvent},
		{`{"edus":{},"pdus":[]}`, ClassEvent},
		{`{"edus":[{"edu_type":"m.typing"} 1],"pdus":[]}`, ClassEvent},
		{`{"edus":[{"content":{}}],"pdus":[]}`, ClassEvent},
		{`{"a":,"pdus":[]}`, ClassEvent},
		{`{"a":1 2,"pdus":[]}`, ClassEvent},
		{strings.Repeat("[", 1<<20), ClassEvent},
		{`{"a":` + strings.Repeat("[", 1<<20), ClassEvent},
	} {
		if got := SendClass([]byte(c.body)); got != c.want {
			t.Errorf("%.200s: got %v, want %v", c.body, got, c.want)
		}
	}
}

// Synapse's own transactions, by what a full decoder finds in them.
func TestSendClassSynapse(t *testing.T) {
	seen := make(map[Class]int)
	for _, r := range recordings(t) {
		if r.Body == "" || !strings.Contains(r.Target, "/send/") {
			continue
		}
		got := SendClass([]byte(r.Body))
		seen[got]++
		if want := classByDecoding(t, []byte(r.Body)); got != want {
			t.Errorf("%s: got %v, want %v", r.Body, got, want)
		}
		if n := testing.AllocsPerRun(10, func() { SendClass([]byte(r.Body)) }); n > 6 {
			t.Errorf("%v allocations for %d bytes", n, len(r.Body))
		}
	}
	if seen[ClassEvent] == 0 || seen[ClassDevice] == 0 || seen[ClassPresence] == 0 {
		t.Errorf("the recordings have only %v", seen)
	}
}

func classByDecoding(t *testing.T, body []byte) Class {
	var txn struct {
		PDUs []json.RawMessage
		EDUs []struct {
			Type string `json:"edu_type"`
		}
	}
	if err := json.Unmarshal(body, &txn); err != nil {
		t.Fatal(err)
	}
	if len(txn.PDUs) > 0 {
		return ClassEvent
	}
	for _, e := range txn.EDUs {
		switch e.Type {
		case "m.presence", "m.typing", "m.receipt":
		default:
			return ClassDevice
		}
	}
	return ClassPresence
}

// Whatever the decoder can read and has no oddities in its names is classed as
// the decoder would, or more urgently.
func FuzzSendClass(f *testing.F) {
	for _, r := range recordings(f) {
		if strings.Contains(r.Target, "/send/") && r.Body != "" {
			f.Add([]byte(r.Body))
		}
	}
	f.Add([]byte(`{"edus":[{"edu_type":"m.typing"}],"pdus":[]} `))
	f.Add([]byte(`{"a":"\"","pdus":[`))
	f.Fuzz(func(t *testing.T, body []byte) {
		got := SendClass(body)
		if got != ClassEvent && got != ClassDevice && got != ClassPresence {
			t.Fatalf("%q: class %d", body, got)
		}
		var txn struct {
			PDUs []json.RawMessage `json:"pdus"`
		}
		if json.Unmarshal(body, &txn) != nil || len(txn.PDUs) == 0 || got == ClassEvent {
			return
		}
		// encoding/json takes "PDUS" for "pdus"; nobody else does.
		var exact map[string]json.RawMessage
		if err := json.Unmarshal(body, &exact); err != nil {
			t.Fatal(err)
		}
		var pdus []json.RawMessage
		if json.Unmarshal(exact["pdus"], &pdus) == nil && len(pdus) > 0 {
			t.Fatalf("%q has %d PDUs but is %v", body, len(pdus), got)
		}
	})
}

func BenchmarkSendClass(b *testing.B) {
	body := []byte(`{"edus":[` + strings.Repeat(`{"content":{"messages":{"@u:hs":{"D":{"ciphertext":"`+strings.Repeat("x", 1000)+`"}}}},"edu_type":"m.direct_to_device"},`, 99) +
		`{"edu_type":"m.presence"}],"origin":"a","pdus":[]}`)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if SendClass(body) != ClassDevice {
			b.Fatal("wrong class")
		}
	}
}

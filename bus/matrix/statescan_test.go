package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// scanResult is all that a StateScan tells of a body.
type scanResult struct {
	Keys    []KeyWant
	Servers []ServerName
	PDUs    int64
	Dropped int64
	Whole   bool
	GaveUp  string
}

// scanPieces gives a body to a scanner in pieces whose ends are said by next, and
// takes what is found whenever take says so, and at the end.
func scanPieces(tb testing.TB, l ScanLimits, body []byte, next func(left int) int, take func() bool) scanResult {
	tb.Helper()
	s := NewStateScan(l)
	var r scanResult
	collect := func() {
		keys, servers := s.Take()
		r.Keys, r.Servers = append(r.Keys, keys...), append(r.Servers, servers...)
	}
	for rest := body; len(rest) > 0; {
		n := next(len(rest))
		// A copy, changed afterwards: nothing of a piece may be kept.
		piece := bytes.Clone(rest[:n])
		if wrote, err := s.Write(piece); wrote != n || err != nil {
			tb.Fatalf("Write of %d bytes: %d, %v", n, wrote, err)
		}
		clear(piece)
		rest = rest[n:]
		if take() {
			collect()
		}
	}
	collect()
	if keys, servers := s.Take(); keys != nil || servers != nil {
		tb.Fatalf("taken twice: %v, %v", keys, servers)
	}
	r.Dropped, r.Whole = s.Dropped(), s.Whole()
	keys, servers, pdus := s.Found()
	if keys != int64(len(r.Keys)) || servers != int64(len(r.Servers)) {
		tb.Fatalf("found %d keys and %d servers, took %d and %d", keys, servers, len(r.Keys), len(r.Servers))
	}
	r.PDUs = pdus
	if err := s.GaveUp(); err != nil {
		r.GaveUp = err.Error()
		if !errors.Is(err, ErrScan) || errors.Is(err, ErrJSONSyntax) == errors.Is(err, ErrJSONComplex) {
			tb.Fatalf("gave up with %v", err)
		}
	}
	return r
}

func scanWhole(tb testing.TB, l ScanLimits, body []byte) scanResult {
	tb.Helper()
	return scanPieces(tb, l, body, func(left int) int { return left }, func() bool { return false })
}

// jsonNode is a JSON value as encoding/json's tokens tell of it: with duplicate
// members, and with where it lies.
type jsonNode struct {
	kind       byte // { [ " 0 or w, a word
	text       string
	members    []jsonMember
	elements   []*jsonNode
	start, end int64
	raw        int64 // of a string: the bytes between its quotes
}

type jsonMember struct {
	name  string
	raw   int64
	value *jsonNode
}

// readNode reads a valid JSON text.
func readNode(tb testing.TB, doc []byte) *jsonNode {
	tb.Helper()
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.UseNumber()
	token := func() (json.Token, int64) {
		before := dec.InputOffset()
		t, err := dec.Token()
		if err != nil {
			tb.Fatalf("%q: %v", doc, err)
		}
		for bytes.IndexByte([]byte(" \t\r\n,:"), doc[before]) >= 0 {
			before++
		}
		return t, before
	}
	var value func() *jsonNode
	value = func() *jsonNode {
		t, start := token()
		n := &jsonNode{kind: 'w', start: start}
		switch t := t.(type) {
		case string:
			n.kind, n.text, n.raw = '"', t, dec.InputOffset()-start-2
		case json.Number:
			n.kind, n.text = '0', t.String()
		case json.Delim:
			n.kind = byte(t)
			for dec.More() {
				if t == '[' {
					n.elements = append(n.elements, value())
					continue
				}
				name, start := token()
				raw := dec.InputOffset() - start - 2
				n.members = append(n.members, jsonMember{name.(string), raw, value()})
			}
			token()
		}
		n.end = dec.InputOffset()
		return n
	}
	return value()
}

// depth returns how deep the arrays and objects of a value nest.
func (n *jsonNode) depth() int {
	d := 0
	for _, e := range n.elements {
		d = max(d, e.depth())
	}
	for _, m := range n.members {
		d = max(d, m.value.depth())
	}
	if n.kind == '{' || n.kind == '[' {
		d++
	}
	return d
}

var (
	keyIDPattern = regexp.MustCompile(`^ed25519:[!#-\[\]-~]+$`)
	digits       = regexp.MustCompile(`^[0-9]+$`)
)

// scanByDecoding is what a scanner has to find in a valid JSON text, an object or
// array that is not too deep. The limits must be set.
func scanByDecoding(tb testing.TB, l ScanLimits, doc []byte) scanResult {
	tb.Helper()
	r := scanResult{Whole: true}
	size, invalid := int64(0), 0
	known, members := map[[2]string]bool{}, map[string]bool{}
	short := func(raw int64) bool { return raw <= l.Element }
	pdu := func(n *jsonNode) {
		r.PDUs++
		if n.end-n.start > l.Element {
			r.Dropped++
			return
		}
		ts := int64(0)
		for _, m := range n.members {
			if m.name != "origin_server_ts" || !short(m.raw) {
				continue
			}
			ts = 0
			if v, err := strconv.ParseInt(m.value.text, 10, 64); m.value.kind == '0' && digits.MatchString(m.value.text) && err == nil && v <= maxJSONInteger {
				ts = v
			}
		}
		for _, m := range n.members {
			if m.name != "signatures" || !short(m.raw) {
				continue
			}
			for _, server := range m.value.members {
				for _, id := range server.value.members {
					name, err := ParseServerName(server.name)
					pair := [2]string{server.name, id.name}
					if err != nil || len(id.name) > 255 || !keyIDPattern.MatchString(id.name) || known[pair] || !short(server.raw) || !short(id.raw) {
						continue
					}
					if add := int64(len(server.name) + len(id.name)); len(known) == l.Keys || size+add > l.Bytes {
						r.Dropped++
					} else {
						size += add
						known[pair] = true
						r.Keys = append(r.Keys, KeyWant{Server: name, KeyID: id.name, MinValid: Timestamp(ts)})
					}
				}
			}
		}
	}
	answer := readNode(tb, doc)
	if answer.kind == '[' {
		if len(answer.elements) < 2 || answer.elements[1].kind != '{' {
			return r
		}
		answer = answer.elements[1]
	}
	for _, m := range answer.members {
		if !short(m.raw) {
			continue
		}
		switch m.name {
		case "event":
			if m.value.kind == '{' {
				pdu(m.value)
			}
		case "state", "auth_chain", "auth_events", "pdus":
			for _, e := range m.value.elements {
				if e.kind == '{' {
					pdu(e)
				}
			}
		case "servers_in_room":
			for _, e := range m.value.elements {
				if e.kind != '"' || invalid >= l.Servers {
					continue
				}
				name, err := ParseServerName(e.text)
				if err != nil || !short(e.raw) {
					invalid++
					continue
				}
				if members[e.text] {
					continue
				}
				if len(members) == l.Servers || size+int64(len(name)) > l.Bytes {
					r.Dropped++
				} else {
					size += int64(len(name))
					members[e.text] = true
					r.Servers = append(r.Servers, name)
				}
			}
		}
	}
	return r
}

var jsonStrings = regexp.MustCompile(`(?s)"(?:[^"\\]|\\.)*"`)

// structured reports whether doc is a JSON object or array, but for what stands in
// strings, and how deep it nests.
func structured(tb testing.TB, doc []byte) (ok bool, depth int) {
	tb.Helper()
	bare := jsonStrings.ReplaceAll(doc, []byte(`""`))
	if trimmed := bytes.TrimLeft(bare, " \t\r\n"); !json.Valid(bare) || trimmed[0] != '{' && trimmed[0] != '[' {
		return false, 0
	}
	return true, readNode(tb, bare).depth()
}

// checkScan holds a scan of doc against encoding/json's reading of it, and scans
// in pieces against the scan in one.
func checkScan(tb testing.TB, l ScanLimits, doc []byte, rng *rand.Rand) scanResult {
	tb.Helper()
	got := scanWhole(tb, l, doc)
	ok, depth := structured(tb, doc)
	if want := ok && depth <= l.Depth; got.Whole != want {
		tb.Fatalf("%q: whole %t (%s); structure %t, depth %d", doc, got.Whole, got.GaveUp, ok, depth)
	}
	if got.Whole && got.GaveUp != "" {
		tb.Fatalf("%q: whole, and gave up: %s", doc, got.GaveUp)
	}
	if got.Whole && json.Valid(doc) {
		if want := scanByDecoding(tb, l, doc); !reflect.DeepEqual(got, want) {
			tb.Fatalf("%q\n got %+v\nwant %+v", doc, got, want)
		}
	}
	most := 1 + rng.IntN(40)
	for _, cut := range []struct {
		how  string
		next func(left int) int
	}{
		{"bytes", func(int) int { return 1 }},
		{"pieces", func(left int) int { return min(left, 1+rng.IntN(most)) }},
		{"two", func(left int) int {
			if left < len(doc) {
				return left
			}
			return 1 + rng.IntN(left)
		}},
	} {
		if in := scanPieces(tb, l, doc, cut.next, func() bool { return rng.IntN(4) == 0 }); !reflect.DeepEqual(in, got) {
			tb.Fatalf("%q\nin %s %+v\nat once %+v", doc, cut.how, in, got)
		}
	}
	return got
}

// defaults are ScanLimits' own, which the oracle has to be told.
var defaults = ScanLimits{Keys: 8192, Servers: 8192, Bytes: 512 << 10, Element: 64 << 10, Depth: 64}

func TestStateScanForms(t *testing.T) {
	pdu := func(server, id string, ts int64) string {
		return fmt.Sprintf(`{"auth_events":["$a"],"content":{"membership":"join"},"origin_server_ts":%d,"signatures":{"%s":{"%s":"c2ln"}},"type":"m.room.member"}`, ts, server, id)
	}
	a, b := pdu("a.test", "ed25519:1", 11), pdu("b.test:8448", "ed25519:a_xY", 22)
	wantA, wantB := KeyWant{"a.test", "ed25519:1", 11}, KeyWant{"b.test:8448", "ed25519:a_xY", 22}
	both := []KeyWant{wantA, wantB}
	for _, c := range []struct {
		name, body string
		keys       []KeyWant
		servers    []ServerName
		pdus       int64
	}{
		{"send_join v2", `{"state":[` + a + `],"auth_chain":[` + b + `,` + a + `],"origin":"a.test","members_omitted":true,"servers_in_room":["a.test","c.test","a.test"]}`,
			both, []ServerName{"a.test", "c.test"}, 3},
		{"send_join v1", `[200,{"state":[` + a + `],"auth_chain":[` + b + `]}]`, both, nil, 2},
		{"state", `{"pdus":[` + a + `],"auth_chain":[` + b + `]}`, both, nil, 2},
		{"auth_events", `{"auth_events":[` + a + `]}`, []KeyWant{wantA}, nil, 1},
		{"event", `{"event":` + b + `,"state":[` + a + `]}`, []KeyWant{wantB, wantA}, nil, 2},
		{"blanks", " \n[ 200\t,\r\n{ \"state\" : [ " + strings.NewReplacer(`":`, `" : `, ",", " ,\n", "{", "{\t", "}", " }").Replace(a) + " ] } ] \n", []KeyWant{wantA}, nil, 1},
		{"the time behind the signatures", `{"state":[{"signatures":{"a.test":{"ed25519:1":""}},"origin_server_ts":11}]}`, []KeyWant{wantA}, nil, 1},
		{"no time", `{"state":[{"signatures":{"a.test":{"ed25519:1":""}}}]}`, []KeyWant{{"a.test", "ed25519:1", 0}}, nil, 1},
		{"a time of the event before", `{"state":[` + a + `,{"signatures":{"b.test":{"ed25519:1":""}}}]}`, []KeyWant{wantA, {"b.test", "ed25519:1", 0}}, nil, 2},
		{"a time in the content", `{"state":[{"content":{"origin_server_ts":5},"signatures":{"a.test":{"ed25519:1":"","origin_server_ts":6}},"origin_server_ts":11,"unsigned":{"origin_server_ts":7}}]}`, []KeyWant{wantA}, nil, 1},
		{"several signatures", `{"state":[{"signatures":{"b.test":{"ed25519:x":"","ed25519:y":""},"a.test":{"ed25519:x":""}},"origin_server_ts":9007199254740991}]}`,
			[]KeyWant{{"b.test", "ed25519:x", 1<<53 - 1}, {"b.test", "ed25519:y", 1<<53 - 1}, {"a.test", "ed25519:x", 1<<53 - 1}}, nil, 1},
		{"a greater time later", `{"state":[` + a + `,` + pdu("a.test", "ed25519:1", 99) + `]}`, []KeyWant{wantA}, nil, 2},

		{"escaped names", `{"\u0073tate":[{"\u0073ignatures":{"\u0061.\u0074est":{"ed25519\u003a1":""}},"origin\u005fserver_ts":11}],"servers\u005Fin_room":["\u0063.test","c.test"]}`,
			[]KeyWant{wantA}, []ServerName{"c.test"}, 1},
		{"every character escaped", `{"state":[{"signatures":{"` + escapeAll(strings.Repeat("a.", 114)+"bc") + `":{"` + escapeAll("ed25519:"+strings.Repeat("k", 247)) + `":""}}}]}`,
			[]KeyWant{{ServerName(strings.Repeat("a.", 114) + "bc"), "ed25519:" + strings.Repeat("k", 247), 0}}, nil, 1},
		{"names too long", `{"state":[{"signatures":{"` + strings.Repeat("a", 231) + `":{"ed25519:1":""},"a.test":{"ed25519:` + strings.Repeat("k", 248) + `":""}}}]}`, nil, nil, 1},
		{"short escapes in a key id", `{"state":[{"signatures":{"a.test":{"ed25519:\/\/":"","ed25519:\"":"","ed25519:\\":"","ed25519:\t":""}}}]}`, []KeyWant{{"a.test", "ed25519://", 0}}, nil, 1},

		{"in a text", `{"state":[{"content":{"body":"\"},\"signatures\":{\"x.test\":{\"ed25519:1\":\"\"}},\\"},"signatures":{}}]}`, nil, nil, 1},
		{"backslashes before the quote", `{"state":[{"content":"\\\\\\\"}]},\"signatures\":{\"x.test\"\\","signatures":{"a.test":{"ed25519:1":""}},"origin_server_ts":11}]}`, []KeyWant{wantA}, nil, 1},
		{"of an invitation", `{"state":[{"content":{"third_party_invite":{"signed":{"mxid":"@a:x.test","signatures":{"x.test":{"ed25519:1":""}}}}},"signatures":{"a.test":{"ed25519:1":""}},"origin_server_ts":11}]}`, []KeyWant{wantA}, nil, 1},
		{"of the content", `{"state":[{"content":{"signatures":{"x.test":{"ed25519:1":""}}},"unsigned":{"signatures":{"x.test":{"ed25519:2":""}}}}]}`, nil, nil, 1},
		{"of the answer", `{"signatures":{"x.test":{"ed25519:1":""}},"content":{"state":[` + a + `],"servers_in_room":["x.test"]}}`, nil, nil, 0},
		{"of a list in a list", `{"state":[[` + a + `]],"pdus":{"state":[` + a + `]},"event":[` + a + `]}`, nil, nil, 0},
		{"deeper in the signatures", `{"state":[{"signatures":{"a.test":{"ed25519:1":{"ed25519:2":{"x.test":{"ed25519:3":""}}}},"c.test":[{"ed25519:4":""}],"d.test":"ed25519:5"},"origin_server_ts":11}]}`, []KeyWant{wantA}, nil, 1},
		{"elsewhere in the array", `[{"state":[` + a + `]},[` + a + `],{"state":[` + a + `]}]`, nil, nil, 0},
		{"the array's second element alone", `["x",{"state":[` + a + `]},{"state":[` + b + `]}]`, []KeyWant{wantA}, nil, 1},

		{"nulls", `{"state":[null,{"signatures":null},{"signatures":{"a.test":null,"b.test":{"ed25519:1":null}},"origin_server_ts":null}],"auth_chain":null,"event":null,"servers_in_room":null}`,
			[]KeyWant{{"b.test", "ed25519:1", 0}}, nil, 2},
		{"duplicate members", `{"state":[` + a + `],"state":[{"origin_server_ts":5,"signatures":{"c.test":{"ed25519:1":"","ed25519:1":""}},"origin_server_ts":6,"signatures":{"c.test":{"ed25519:2":""},"c.test":{"ed25519:3":""}}}]}`,
			[]KeyWant{wantA, {"c.test", "ed25519:1", 6}, {"c.test", "ed25519:2", 6}, {"c.test", "ed25519:3", 6}}, nil, 2},
		{"a time and then none", `{"state":[{"signatures":{"a.test":{"ed25519:1":""}},"origin_server_ts":5,"origin_server_ts":"6"}]}`, []KeyWant{{"a.test", "ed25519:1", 0}}, nil, 1},
		{"no names", `{"state":[{"signatures":{"":{"ed25519:1":""},"a_b":{"ed25519:1":""},"a..b":{"ed25519:1":""},"a.test":{"":"","ed25519:":"","rsa:1":"","ed25519:é":"","ed25519:\u0000":"","ED25519:1":"","ed25519:\ud800":""}}}],"servers_in_room":["","a b","\ud800","a:0",7,{"a":"c.test"},["c.test"],"\u0001"]}`, nil, nil, 1},
		{"empty", `{}`, nil, nil, 0},
		{"an empty array", `[]`, nil, nil, 0},
		{"words and numbers", `{"a":[true,false,null,-0,0,10,-1.5,1e5,1E+5,0.0e-10],"state":[` + a + `]}`, []KeyWant{wantA}, nil, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := scanResult{Keys: c.keys, Servers: c.servers, PDUs: c.pdus, Whole: true}
			rng := rand.New(rand.NewPCG(1, 2))
			if got := checkScan(t, defaults, []byte(c.body), rng); !reflect.DeepEqual(got, want) {
				t.Errorf("%s\n got %+v\nwant %+v", c.body, got, want)
			}
			for cut := range len(c.body) {
				if cut == 0 {
					continue
				}
				next := func(left int) int {
					if left == len(c.body) {
						return cut
					}
					return left
				}
				if got := scanPieces(t, ScanLimits{}, []byte(c.body), next, func() bool { return true }); !reflect.DeepEqual(got, want) {
					t.Errorf("cut at %d\n got %+v\nwant %+v", cut, got, want)
				}
				if got := scanWhole(t, ScanLimits{}, []byte(c.body[:cut])); got.Whole && strings.Trim(c.body[cut:], " \n") != "" || got.GaveUp != "" {
					t.Errorf("the first %d bytes of %s: %+v", cut, c.body, got)
				}
			}
		})
	}
}

// escapeAll writes ASCII text as \u escapes.
func escapeAll(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, `\u%04x`, s[i])
	}
	return b.String()
}

// What was found before the scan ended counts; nothing does afterwards.
func TestStateScanGivesUp(t *testing.T) {
	const (
		head = `{"servers_in_room":["a.test"],"state":[{"signatures":{"a.test":{"ed25519:1":""}}}],"x":`
		tail = `,"servers_in_room":["b.test"]}`
	)
	found := scanResult{Keys: []KeyWant{{"a.test", "ed25519:1", 0}}, Servers: []ServerName{"a.test"}, PDUs: 1}
	deep := func(n int) string { return strings.Repeat(`[{"a":`, n) + "1" + strings.Repeat("}]", n) }
	for _, c := range []struct {
		body string
		why  error
		at   int
	}{
		{"<!DOCTYPE html>", ErrJSONSyntax, 0},
		{"\n<html>", ErrJSONSyntax, 1},
		{"\ufeff{}", ErrJSONSyntax, 0},
		{"\x1f\x8b\x08\x00", ErrJSONSyntax, 0},
		{"null", ErrJSONSyntax, 0},
		{`"a"`, ErrJSONSyntax, 0},
		{"200", ErrJSONSyntax, 0},
		{"{}{}", ErrJSONSyntax, 2},
		{"[] 1", ErrJSONSyntax, 3},
		{head + "}" + tail, ErrJSONSyntax, len(head)},
		{head + "nul1" + tail, ErrJSONSyntax, len(head) + 3},
		{head + "True" + tail, ErrJSONSyntax, len(head)},
		{head + "01" + tail, ErrJSONSyntax, len(head) + 1},
		{head + "-" + tail, ErrJSONSyntax, len(head) + 1},
		{head + "1.e5" + tail, ErrJSONSyntax, len(head) + 2},
		{head + "1e" + tail, ErrJSONSyntax, len(head) + 2},
		{head + "[1}" + tail, ErrJSONSyntax, len(head) + 2},
		{head + `{"a"]` + tail, ErrJSONSyntax, len(head) + 4},
		{head + `{"a":1]` + tail, ErrJSONSyntax, len(head) + 6},
		{head + `{1:1}` + tail, ErrJSONSyntax, len(head) + 1},
		{head + `{"a":1,}` + tail, ErrJSONSyntax, len(head) + 7},
		{head + "[1,]" + tail, ErrJSONSyntax, len(head) + 3},
		{head + "[1 2]" + tail, ErrJSONSyntax, len(head) + 3},
		{head + `"a" "b"` + tail, ErrJSONSyntax, len(head) + 4},
		{head + deep(32) + tail, ErrJSONComplex, len(head) + 31*6 + 1},
		{strings.Repeat("[", 1000), ErrJSONComplex, 64},
	} {
		got := checkScan(t, defaults, []byte(c.body), rand.New(rand.NewPCG(3, 4)))
		want := scanResult{GaveUp: fmt.Sprintf("%v: %v at byte %d", ErrScan, c.why, c.at)}
		if strings.HasPrefix(c.body, head) {
			want.Keys, want.Servers, want.PDUs = found.Keys, found.Servers, found.PDUs
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q\n got %+v\nwant %+v", c.body, got, want)
		}
	}
	if got := checkScan(t, defaults, []byte(head+deep(31)+"}"), rand.New(rand.NewPCG(5, 6))); !got.Whole {
		t.Errorf("at the limit of depth: %+v", got)
	}
}

// An object that is cut in the middle of a PDU brings what its other PDUs brought.
func TestStateScanTruncated(t *testing.T) {
	body := []byte(`{"state":[{"signatures":{"a.test":{"ed25519:1":""}}},{"signatures":{"b.test":{"ed25519:1":""}}`)
	want := scanResult{Keys: []KeyWant{{"a.test", "ed25519:1", 0}}, PDUs: 1}
	if got := checkScan(t, defaults, body, rand.New(rand.NewPCG(1, 1))); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := checkScan(t, defaults, nil, rand.New(rand.NewPCG(1, 1))); !reflect.DeepEqual(got, scanResult{}) {
		t.Errorf("of no body: %+v", got)
	}
}

func TestStateScanBounds(t *testing.T) {
	var body bytes.Buffer
	body.WriteString(`{"servers_in_room":["s0.test"`)
	for i := 1; i < 100; i++ {
		fmt.Fprintf(&body, `,"s%d.test"`, i%50)
	}
	body.WriteString(`],"state":[{}`)
	for i := range 100 {
		fmt.Fprintf(&body, `,{"signatures":{"s%d.test":{"ed25519:1":"","ed25519:2":""}}}`, i%50)
	}
	large := fmt.Sprintf(`,{"signatures":{"large.test":{"ed25519:1":""}},"content":"%s"}`, strings.Repeat("x", 1000))
	body.WriteString(large + `]}`)
	for _, c := range []struct {
		name                   string
		limits                 ScanLimits
		keys, servers, dropped int
	}{
		{"none is reached", ScanLimits{}, 101, 50, 0},
		{"keys", ScanLimits{Keys: 7}, 7, 50, 2*93 + 1},
		{"one key less than there are", ScanLimits{Keys: 100}, 100, 50, 1},
		{"as many keys as there are", ScanLimits{Keys: 101}, 101, 50, 0},
		{"servers", ScanLimits{Servers: 5}, 101, 5, 90},
		{"one server less than there are", ScanLimits{Servers: 49}, 101, 49, 2},
		{"text, before all servers", ScanLimits{Bytes: 70}, 0, 10, 2*40 + 2*100 + 1},
		{"text, before all keys", ScanLimits{Bytes: 390 + 3*16}, 3, 50, 200 - 2*3 + 1},
		{"a PDU", ScanLimits{Element: int64(len(large)) - 2}, 100, 50, 1},
		{"a PDU of just that size", ScanLimits{Element: int64(len(large)) - 1}, 101, 50, 0},
		{"the names", ScanLimits{Element: 10}, 0, 0, 100 + 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.limits
			for _, f := range []struct{ field, value *int }{{&l.Keys, &defaults.Keys}, {&l.Servers, &defaults.Servers}, {&l.Depth, &defaults.Depth}} {
				if *f.field == 0 {
					*f.field = *f.value
				}
			}
			if l.Bytes == 0 {
				l.Bytes = defaults.Bytes
			}
			if l.Element == 0 {
				l.Element = defaults.Element
			}
			got := checkScan(t, l, body.Bytes(), rand.New(rand.NewPCG(7, 8)))
			if len(got.Keys) != c.keys || len(got.Servers) != c.servers || got.Dropped != int64(c.dropped) || got.PDUs != 102 {
				t.Errorf("%d keys, %d servers, %d dropped, %d PDUs; want %d, %d, %d, 102", len(got.Keys), len(got.Servers), got.Dropped, got.PDUs, c.keys, c.servers, c.dropped)
			}
			if given := scanWhole(t, c.limits, body.Bytes()); !reflect.DeepEqual(given, got) {
				t.Errorf("with defaults left out: %+v, want %+v", given, got)
			}
		})
	}
}

// randomAnswer writes an answer with everything that can lead a scanner astray.
func randomAnswer(rng *rand.Rand) []byte {
	var b bytes.Buffer
	pick := func(from ...string) string { return from[rng.IntN(len(from))] }
	blank := func() { b.WriteString(pick("", "", "", "", " ", "\n\t")) }
	str := func(s string) {
		b.WriteByte('"')
		style := rng.IntN(4)
		for _, r := range s {
			switch {
			case r > 0xffff && style == 0:
				fmt.Fprintf(&b, `\u%04X\u%04x`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
			case r == '/' && style == 1:
				b.WriteString(`\/`)
			case r == '\n' && style > 0:
				b.WriteString(`\n`)
			case (r == '"' || r == '\\') && style > 0:
				b.WriteByte('\\')
				b.WriteRune(r)
			case r < ' ' || r == '"' || r == '\\' || r <= 0xffff && style == 0 && rng.IntN(2) == 0:
				fmt.Fprintf(&b, `\u%04x`, r)
			default:
				b.WriteRune(r)
			}
		}
		b.WriteByte('"')
	}
	list := func(open, end byte, n int, each func()) {
		b.WriteByte(open)
		for i := range n {
			if i > 0 {
				b.WriteByte(',')
			}
			blank()
			each()
			blank()
		}
		if n == 0 {
			blank()
		}
		b.WriteByte(end)
	}
	server := func() string {
		return pick("a.test", "b.test", "c.test:8448", "[::1]:1", "1.2.3.4", "d.example.org", fmt.Sprintf("s%d.test", rng.IntN(12)),
			"bad_name", "", "a..b", "x.test:0", "é.test", "a\x00b", strings.Repeat("l", rng.IntN(300)))
	}
	keyID := func() string {
		return pick("ed25519:1", "ed25519:a_bcd", `ed25519:"\`, "ed25519://", "ed25519:", "ed25519: ", "rsa:1", "", "ed25519:é", "ed25519:\x00", fmt.Sprintf("ed25519:k%d", rng.IntN(5)),
			"ed25519:"+strings.Repeat("k", rng.IntN(300)))
	}
	text := func() string {
		return pick("", "x", `\`, `\\`, `"`, `\"`, `"},"signatures":{"x.test":{"ed25519:1":""}}`, "\U0001f600/\n", `{"state":[`, strings.Repeat(`\"`, rng.IntN(20)),
			strings.Repeat("long ", rng.IntN(100)))
	}
	name := func() string {
		return pick("state", "auth_chain", "pdus", "auth_events", "event", "servers_in_room", "signatures", "origin_server_ts", "content", "unsigned", "type", "", "Signatures", "members_omitted", `"`)
	}
	number := func() {
		b.WriteString(pick("0", "-0", "1", "-1", "1.5", "1e3", "10E-1", "9007199254740991", "9007199254740992", "99999999999999999999999", fmt.Sprint(rng.Int64N(1<<41))))
	}
	var value func(depth int)
	member := func(n string, depth int) {
		str(n)
		blank()
		b.WriteByte(':')
		blank()
		value(depth)
	}
	value = func(depth int) {
		k := rng.IntN(8)
		if depth <= 0 {
			k = rng.IntN(4)
		}
		switch k {
		case 0:
			b.WriteString(pick("true", "false", "null"))
		case 1:
			number()
		case 2:
			str(text())
		case 3:
			str(server())
		case 4, 5:
			list('[', ']', rng.IntN(4), func() { value(depth - 1) })
		default:
			list('{', '}', rng.IntN(4), func() { member(pick(name(), server(), keyID()), depth-1) })
		}
	}
	pdu := func() {
		if rng.IntN(20) == 0 {
			value(2)
			return
		}
		list('{', '}', rng.IntN(7), func() {
			switch rng.IntN(5) {
			case 0, 1:
				str("signatures")
				b.WriteByte(':')
				blank()
				if rng.IntN(20) == 0 {
					value(3)
					return
				}
				list('{', '}', rng.IntN(3), func() {
					str(server())
					b.WriteByte(':')
					blank()
					if rng.IntN(20) == 0 {
						value(2)
						return
					}
					list('{', '}', rng.IntN(3), func() {
						str(keyID())
						blank()
						b.WriteByte(':')
						value(rng.IntN(2))
					})
				})
			case 2:
				str("origin_server_ts")
				b.WriteByte(':')
				if rng.IntN(10) == 0 {
					value(1)
				} else {
					number()
				}
			default:
				member(name(), 3)
			}
		})
	}
	answer := func() {
		list('{', '}', rng.IntN(6), func() {
			switch rng.IntN(6) {
			case 0, 1, 2:
				str(pick("state", "auth_chain", "pdus", "auth_events"))
				b.WriteByte(':')
				blank()
				list('[', ']', rng.IntN(6), pdu)
			case 3:
				str("servers_in_room")
				b.WriteByte(':')
				list('[', ']', rng.IntN(6), func() {
					if rng.IntN(10) == 0 {
						value(2)
					} else {
						str(server())
					}
				})
			case 4:
				str("event")
				b.WriteByte(':')
				pdu()
			default:
				member(name(), 4)
			}
		})
	}
	blank()
	switch rng.IntN(8) {
	case 0:
		b.WriteString("[200,")
		answer()
		b.WriteByte(']')
	case 1:
		list('[', ']', rng.IntN(4), answer)
	default:
		answer()
	}
	blank()
	return b.Bytes()
}

// randomLimits returns limits of which some can be reached.
func randomLimits(rng *rand.Rand) ScanLimits {
	l := defaults
	if rng.IntN(4) == 0 {
		l.Keys = 1 + rng.IntN(6)
	}
	if rng.IntN(4) == 0 {
		l.Servers = 1 + rng.IntN(3)
	}
	if rng.IntN(4) == 0 {
		l.Bytes = 1 + rng.Int64N(200)
	}
	if rng.IntN(4) == 0 {
		l.Element = 1 + rng.Int64N(400)
	}
	if rng.IntN(4) == 0 {
		l.Depth = 1 + rng.IntN(8)
	}
	return l
}

func TestStateScanOfAnyForm(t *testing.T) {
	keys, servers, dropped, whole, gaveUp := 0, 0, 0, 0, 0
	for seed := range uint64(1500) {
		rng := rand.New(rand.NewPCG(seed, 9))
		doc := randomAnswer(rng)
		if !json.Valid(doc) {
			t.Fatalf("seed %d: not JSON: %q", seed, doc)
		}
		if rng.IntN(4) == 0 {
			for range 1 + rng.IntN(3) {
				i := rng.IntN(len(doc))
				switch rng.IntN(3) {
				case 0:
					doc[i] = `{}[]",:\ 0ex`[rng.IntN(12)]
				case 1:
					doc = slices.Delete(doc, i, i+1)
				default:
					doc = doc[:i]
				}
				if len(doc) == 0 {
					break
				}
			}
		}
		got := checkScan(t, randomLimits(rng), doc, rng)
		keys, servers, dropped = keys+len(got.Keys), servers+len(got.Servers), dropped+int(got.Dropped)
		if got.Whole {
			whole++
		}
		if got.GaveUp != "" {
			gaveUp++
		}
	}
	// The documents must be about something.
	if keys < 500 || servers < 375 || dropped < 375 || whole < 750 || gaveUp < 200 {
		t.Errorf("%d keys, %d servers, %d dropped, %d whole, %d given up", keys, servers, dropped, whole, gaveUp)
	}
}

func FuzzStateScan(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(randomAnswer(rand.New(rand.NewPCG(seed, 10))), seed)
	}
	f.Add([]byte(`[200,{"state":[{"signatures":{"a.test":{"ed25519:\u0031":""}},"origin_server_ts":1}]}]`), uint64(1))
	f.Add([]byte(`{"state":[{"\u0073ignatures":{"a.test":{"ed25519:1":null}}}],"x":-1.5e+3,"y":"\\\""}`), uint64(2))
	f.Add([]byte("<html>"), uint64(3))
	f.Fuzz(func(t *testing.T, doc []byte, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 11))
		l := randomLimits(rng)
		got := checkScan(t, l, doc, rng)
		size := 0
		for _, k := range got.Keys {
			if _, err := ParseServerName(string(k.Server)); err != nil || k.MinValid < 0 || k.MinValid > maxJSONInteger {
				t.Errorf("%q: %+v", doc, k)
			}
			size += len(k.Server) + len(k.KeyID)
		}
		for _, s := range got.Servers {
			if _, err := ParseServerName(string(s)); err != nil {
				t.Errorf("%q: %q", doc, s)
			}
			size += len(s)
		}
		if len(got.Keys) > l.Keys || len(got.Servers) > l.Servers || int64(size) > l.Bytes {
			t.Errorf("%d keys and %d servers of %d bytes; limits %+v", len(got.Keys), len(got.Servers), size, l)
		}
	})
}

// sendJoinAnswer makes a send_join answer of about size bytes: membership events
// of so many servers, as Synapse writes them.
func sendJoinAnswer(size, servers int) []byte {
	rng := rand.New(rand.NewPCG(12, 13))
	id := func() string {
		const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		b := make([]byte, 43)
		for i := range b {
			b[i] = alphabet[rng.IntN(len(alphabet))]
		}
		return string(b)
	}
	var b bytes.Buffer
	b.Grow(size + 4096)
	b.WriteString(`{"auth_chain":[],"members_omitted":false,"origin":"hs0.example.org","servers_in_room":["hs0.example.org"`)
	for i := 1; i < servers; i++ {
		fmt.Fprintf(&b, `,"hs%d.example.org"`, i)
	}
	b.WriteString(`],"state":[`)
	for n := 0; b.Len() < size; n++ {
		if n > 0 {
			b.WriteByte(',')
		}
		server := rng.IntN(servers)
		user := fmt.Sprintf("@someone_%d:hs%d.example.org", n, server)
		fmt.Fprintf(&b, `{"auth_events":["$%s","$%s","$%s"],"content":{"avatar_url":"mxc://hs%d.example.org/%s","displayname":"Some \"One\" %d \ud83d\ude00"`, id(), id(), id(), server, id()[:24], n)
		if n%4 == 0 {
			fmt.Fprintf(&b, `,"reason":"%s"`, strings.Repeat("because of this and that, ", rng.IntN(30)))
		}
		fmt.Fprintf(&b, `,"membership":"join"},"depth":%d,"hashes":{"sha256":"%s"},"origin":"hs%d.example.org","origin_server_ts":%d,"prev_events":["$%s"],"prev_state":[],"room_id":"!%s:hs0.example.org","sender":"%s","signatures":{"hs%d.example.org":{"ed25519:a_%s":"%s%s"}},"state_key":"%s","type":"m.room.member","unsigned":{"age":%d,"replaces_state":"$%s"}}`,
			n, id(), server, 1_700_000_000_000+int64(n), id(), "abcdefghijklmnopqr", user, server, fmt.Sprintf("%04d", server), id(), id(), user, rng.IntN(1<<30), id())
	}
	b.WriteString(`]}`)
	return b.Bytes()
}

// Keys and servers that are known cost no allocation, and so the size of a body
// costs none.
func TestStateScanAllocations(t *testing.T) {
	body := sendJoinAnswer(1<<20, 50)
	s := NewStateScan(ScanLimits{})
	s.Write(body[:len(body)-1])
	if keys, servers, pdus := s.Found(); keys != 50 || servers != 50 || pdus < 500 {
		t.Fatalf("%d keys, %d servers, %d PDUs", keys, servers, pdus)
	}
	s.Take()
	more := append([]byte(`,"auth_\u0063hain":[`), body[bytes.Index(body, []byte(`"state":[`))+len(`"state":[`):len(body)-1]...)
	_, _, before := s.Found()
	// In pieces, so that tokens are cut.
	n := testing.AllocsPerRun(3, func() {
		for rest := more; len(rest) > 0; {
			size := min(len(rest), 997)
			s.Write(rest[:size])
			rest = rest[size:]
		}
	})
	if n != 0 || s.GaveUp() != nil {
		t.Errorf("%v allocations for %d bytes, %v", n, len(more), s.GaveUp())
	}
	if _, _, after := s.Found(); after-before != 4*before {
		t.Errorf("%d PDUs, then %d", before, after)
	}
}

// Beside what its limits allow, 64 bytes for each pair and server and their text,
// a scanner holds a part of one PDU, and no body makes it grow further.
func TestStateScanMemory(t *testing.T) {
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	for _, l := range []ScanLimits{defaults, {Keys: 1, Servers: 1, Bytes: 100, Element: 64 << 10, Depth: 1000}} {
		before := heap()
		s := NewStateScan(l)
		crowdScan(s)
		keys, servers, pdus := s.Found()
		if s.GaveUp() != nil || keys != int64(l.Keys) || servers != int64(l.Servers) || pdus != 100_011 || s.Dropped() < 90_000 {
			t.Fatalf("%v; %d keys, %d servers, %d PDUs, %d dropped", s.GaveUp(), keys, servers, pdus, s.Dropped())
		}
		untaken := heap() - before
		s.Take()
		held := heap() - before
		t.Logf("%d keys, %d servers: %d bytes held, %d before Take", keys, servers, held, untaken)
		if most := l.Bytes + int64(l.Keys+l.Servers)*64 + 128<<10; held > most {
			t.Errorf("%d bytes held, at most %d expected", held, most)
		}
		if most := l.Bytes + int64(l.Keys+l.Servers)*96 + 128<<10; untaken > most {
			t.Errorf("%d bytes held before Take, at most %d expected", untaken, most)
		}
		runtime.KeepAlive(s)
	}
}

// crowdScan gives s 30 MB that are meant to make it grow.
func crowdScan(s *StateScan) {
	var b []byte
	flush := func(size int) {
		if len(b) > size {
			s.Write(b)
			b = b[:0]
		}
	}
	b = append(b, `{"servers_in_room":["a.test"`...)
	for i := range 10_000 {
		b = fmt.Appendf(b, `,"server%d.example.org"`, i)
		flush(4096)
	}
	b = append(b, `],"state":[{}`...)
	for i := range 100_000 {
		b = fmt.Appendf(b, `,{"content":{"displayname":"%s"},"signatures":{"server%d.example.org":{"ed25519:%s":""}}}`, strings.Repeat("x", i%500), i, strings.Repeat("k", i%20+1))
		flush(4096)
	}
	// As much as one PDU can have.
	for i := range 10 {
		b = fmt.Appendf(b, `,{"signatures":{"huge%d.example.org":{"":""`, i)
		for len(b) < 60_000 {
			b = fmt.Appendf(b, `,"ed25519:%d":""`, len(b))
		}
		b = append(b, `}}}`...)
		flush(0)
	}
	// A name and a PDU without an end, in small pieces and in one.
	b = append(b, `,{"signatures":{"a.test":{"ed25519:`...)
	for range 1 << 20 {
		b = append(b, `\"`...)
		flush(4096)
	}
	b = append(b, `":""`...)
	for i := range 100_000 {
		b = fmt.Appendf(b, `,"ed25519:%d":""`, i)
		flush(4096)
	}
	for i := range 100_000 {
		b = fmt.Appendf(b, `,"ed25519\u003a%d":"","%s":""`, i, strings.Repeat("n", 20))
	}
	flush(0)
}

func BenchmarkStateScan(b *testing.B) {
	scan := func(b *testing.B, body []byte, pdus int64) {
		b.SetBytes(int64(len(body)))
		b.ReportAllocs()
		for b.Loop() {
			s := NewStateScan(ScanLimits{})
			for rest := body; len(rest) > 0; {
				n := min(len(rest), 32<<10)
				s.Write(rest[:n])
				s.Take()
				rest = rest[n:]
			}
			if _, _, n := s.Found(); !s.Whole() || n < pdus {
				b.Fatalf("%d PDUs, %v", n, s.GaveUp())
			}
		}
	}
	b.Run("1000servers", func(b *testing.B) { scan(b, sendJoinAnswer(20<<20, 1000), 15_000) })
	b.Run("8000servers", func(b *testing.B) { scan(b, sendJoinAnswer(20<<20, 8000), 15_000) })
	// What costs most for its size.
	b.Run("tokens", func(b *testing.B) {
		scan(b, append(append([]byte("[0"), bytes.Repeat([]byte(`,[],{"":"\""},1`), 20<<20/15)...), ']'), 0)
	})
	b.Run("quotes", func(b *testing.B) {
		scan(b, append(append([]byte(`["`), bytes.Repeat([]byte(`\"`), 10<<20)...), `"]`...), 0)
	})
	b.Run("invalidservers", func(b *testing.B) {
		scan(b, append(append([]byte(`{"servers_in_room":["a.test"`), bytes.Repeat([]byte(`,"a."`), 4<<20)...), `]}`...), 0)
	})
}

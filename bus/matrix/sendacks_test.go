package matrix

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestAcknowledgedPDUs(t *testing.T) {
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `"$%05d":{},`, i)
		}
		return `{"pdus":{` + strings.TrimSuffix(b.String(), ",") + `}}`
	}
	sized := func(n int) string { return `{"pdus":{}` + strings.Repeat(" ", n-len(`{"pdus":{}}`)) + `}` }
	for _, c := range []struct {
		answer string
		ids    []string
		errors int
	}{
		{`{"pdus":{}}`, nil, 0},
		{` { "x" : [], "pdus" : { "$b" : {}, "$a" : { } } } `, []string{"$a", "$b"}, 0},
		{`{"pdus":{"$a":{"error":"no"},"$b":{"error":""},"$c":{"error":null},"$d":{"other":"x"}}}`, []string{"$a", "$b", "$c", "$d"}, 1},
		{`{"pdus":{"$a":{"error":{}},"$b":{"error":0},"$c":{"error":false},"$d":{"error":"\u0020"}}}`, []string{"$a", "$b", "$c", "$d"}, 4},
		{`{"pdus":{"$a":null,"$b":"","$c":[],"$d":1,"$e":{}}}`, []string{"$a", "$b", "$c", "$d", "$e"}, 4},
		{`{"pdus":{"$a":{},"\u0024\u0061":{"error":"the last one counts"}}}`, []string{"$a"}, 1},
		{`{"pdus":{"$a":{"error":"x"},"$a":{}}}`, []string{"$a"}, 0},
		{`{"pdus":{"$a":{"error":"x","error":null,"Error":"y"}},"PDUS":{"$b":{}}}`, []string{"$a"}, 0},
		{`{"pdus":{"$\n\"\\é":{}}}`, []string{"$\n\"\\é"}, 0},
		{sized(maxAcknowledgment), nil, 0},
	} {
		ids, errors, ok := AcknowledgedPDUs([]byte(c.answer))
		if !ok || errors != c.errors || !slices.Equal(ids, c.ids) {
			t.Errorf("%.200s\n got %q, %d, %t\nwant %q, %d", c.answer, ids, errors, ok, c.ids, c.errors)
		}
	}
	if ids, _, ok := AcknowledgedPDUs([]byte(many(maxAcknowledged))); !ok || len(ids) != maxAcknowledged || ids[99] != "$00099" {
		t.Errorf("%d of %d ids: %q", len(ids), maxAcknowledged, ids)
	}
	for _, answer := range []string{
		``, `null`, `[]`, `{`, `{}`, `{}{}`, `"pdus"`,
		`{"pdus":null}`, `{"pdus":[]}`, `{"pdus":["$a"]}`, `{"pdus":"$a"}`, `{"PDUS":{}}`, `{"pdus":{}}x`, `{"pdus":{"$a"}}`, `{"pdus":{"$a":}}`,
		`{"pdus":{"$a":{"error":"\ud800"}}}`, "{\"pdus\":{\"$\xff\":{}}}", `{"pdus":{},"pdus":[]}`,
		many(maxAcknowledged + 1), sized(maxAcknowledgment + 1),
	} {
		if ids, errors, ok := AcknowledgedPDUs([]byte(answer)); ok || ids != nil || errors != 0 {
			t.Errorf("%.80s: got %q, %d, %t", answer, ids, errors, ok)
		}
	}
}

func FuzzAcknowledgedPDUs(f *testing.F) {
	for _, s := range []string{`{"pdus":{"$a":{},"$b":{"error":"x"}}}`, `{"pdus":{"\u0024\n":{"error":""}},"x":1}`, `{"pdus":[]}`, `{"pdus":{"$a":null}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		ids, errors, ok := AcknowledgedPDUs(answer)
		if !ok {
			if ids != nil || errors != 0 {
				t.Fatalf("%q: %q, %d, although it is none", answer, ids, errors)
			}
			return
		}
		var whole map[string]json.RawMessage
		var pdus map[string]json.RawMessage
		if json.Unmarshal(answer, &whole) != nil || json.Unmarshal(whole["pdus"], &pdus) != nil {
			t.Fatalf("%q: taken, but package json does not", answer)
		}
		var want []string
		refused := 0
		for id, entry := range pdus {
			want = append(want, id)
			var members map[string]any
			if json.Unmarshal(entry, &members) != nil || members == nil || members["error"] != nil && members["error"] != "" {
				refused++
			}
		}
		slices.Sort(want)
		if slices.Sort(ids); !slices.Equal(ids, want) || errors != refused || len(ids) > maxAcknowledged {
			t.Fatalf("%q: got %q, %d; want %q, %d", answer, ids, errors, want, refused)
		}
	})
}

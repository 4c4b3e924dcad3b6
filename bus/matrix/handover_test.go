package matrix

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestParseHandover(t *testing.T) {
	id := HandoverSetID([]string{"a.test", "b.test"})
	if id != "170ea1b118b24ab33755a7edecae7e83" { // sha256sum of the two lines
		t.Fatal(id)
	}
	body := fmt.Sprintf(`{"version":1,"module":"aa","synapse":"1.160.0","later":{},"sets":[{"id":%q,"servers":["b.test","a.test","b.test"]}],"items":[
		{"pdu":{"type":"m.room.message","room_id":"!r:us.test"},"event_id":"$e","room_id":"!r","to":%q},
		{"edu":{"edu_type":"m.presence","content":{"push":[{"user_id":"@a:us.test","presence":"online"},{"user_id":"@b:us.test","presence":"online"}]}},"to":"x"},
		{"pdu":7,"to":"x"},{"edu":{"content":{}},"to":"x"}]}`, id, id)
	h, err := ParseHandover([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	if h.Module != "aa" || h.Synapse != "1.160.0" || len(h.Sets) != 1 || h.Sets[0].ID != id || len(h.Sets[0].Servers) != 2 || len(h.Items) != 4 {
		t.Fatalf("%+v", h)
	}
	pdu, edu, bad := h.Items[0], h.Items[1], h.Items[2]
	if pdu.To != id || len(pdu.Items) != 1 || pdu.Items[0].Kind != KindPDU || pdu.Items[0].Group != "!r:us.test" {
		t.Errorf("%+v", pdu)
	}
	if len(edu.Items) != 2 || edu.Items[0].Kind != KindPresence || edu.Items[0].Key == edu.Items[1].Key {
		t.Errorf("%+v", edu)
	}
	for _, bad := range []HandoverItem{bad, h.Items[3]} {
		if bad.Wrong == "" || len(bad.Items) != 0 {
			t.Errorf("%+v", bad)
		}
	}
}

func TestHandoversThatAreRefused(t *testing.T) {
	many := func(n int, s string) string { return strings.TrimSuffix(strings.Repeat(s+",", n), ",") }
	var names []string
	for i := range MaxHandoverServers + 1 {
		names = append(names, fmt.Sprintf(`"s%04d.test"`, i))
	}
	for body, want := range map[string]error{
		``: ErrHandover, `[]`: ErrHandover, `{"version":"1"}`: ErrHandover, `{}`: ErrHandoverVersion, `{"version":2}`: ErrHandoverVersion,
		`{"version":1,"synapse":"` + strings.Repeat("x", 200) + `"}`:                                                          ErrHandover,
		`{"version":1,"items":[{"to":"x"}]}`:                                                                                  ErrHandover,
		`{"version":1,"items":[{"pdu":{},"edu":{},"to":"x"}]}`:                                                                ErrHandover,
		`{"version":1,"sets":[{"id":"x","servers":["a"]}]}`:                                                                   ErrHandover,
		`{"version":1,"items":[` + many(MaxHandoverItems+1, `{"pdu":{}}`) + `]}`:                                              ErrHandoverTooLarge,
		`{"version":1,"sets":[` + many(MaxHandoverSets+1, `{"id":"x"}`) + `]}`:                                                ErrHandoverTooLarge,
		`{"version":1,"sets":[{"id":"` + HandoverSetID(unquoted(names)) + `","servers":[` + strings.Join(names, ",") + `]}]}`: ErrHandoverTooLarge,
		`{"version":1}` + strings.Repeat(" ", MaxHandoverBytes):                                                               ErrHandoverTooLarge,
	} {
		if _, err := ParseHandover([]byte(body)); !errors.Is(err, want) {
			t.Errorf("%.80s: %v, want %v", body, err, want)
		}
	}
	large := `{"version":1,"items":[{"pdu":{"x":"` + strings.Repeat("x", maxPDUBytes) + `"},"to":"x"}]}`
	if h, err := ParseHandover([]byte(large)); err != nil || h.Items[0].Wrong == "" {
		t.Errorf("%v", err)
	}
}

func unquoted(names []string) (out []string) {
	for _, s := range names {
		out = append(out, strings.Trim(s, `"`))
	}
	return out
}

func FuzzParseHandover(f *testing.F) {
	f.Add([]byte(`{"version":1,"sets":[{"id":"","servers":["a"]}],"items":[{"pdu":{"a":1},"to":"x"},{"edu":{"edu_type":"m.typing","content":{}},"to":"x"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		h, err := ParseHandover(body)
		if err != nil {
			if !errors.Is(err, ErrHandover) && !errors.Is(err, ErrHandoverVersion) && !errors.Is(err, ErrHandoverTooLarge) {
				t.Error(err)
			}
			return
		}
		for _, it := range h.Items {
			if (it.Wrong == "") != (len(it.Items) > 0) {
				t.Errorf("%+v", it)
			}
			for _, i := range it.Items {
				if i.Kind.Lane() == 0 || len(i.Payload) == 0 {
					t.Errorf("%+v", i)
				}
			}
		}
	})
}

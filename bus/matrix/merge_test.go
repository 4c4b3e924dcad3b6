package matrix

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestMergeSigningKeys(t *testing.T) {
	edu := func(eduType, content string) string {
		return `{"content":{` + content + `},"edu_type":"` + eduType + `"}`
	}
	for _, eduType := range []string{"m.signing_key_update", "org.matrix.signing_key_update"} {
		for _, c := range []struct{ old, newer, want string }{
			{`"master_key":{"a":1},"self_signing_key":{"b":1},"user_id":"@a:hs"`, `"master_key":{"a":2},"user_id":"@a:hs"`,
				`"master_key":{"a":2},"self_signing_key":{"b":1},"user_id":"@a:hs"`},
			{`"master_key":{"a":1},"user_id":"@a:hs"`, `"self_signing_key":{"b":2},"user_id":"@a:hs"`,
				`"master_key":{"a":1},"self_signing_key":{"b":2},"user_id":"@a:hs"`},
			{`"master_key":{"a":1},"user_id":"@a:hs"`, `"master_key":null,"self_signing_key":null,"user_id":"@a:hs"`,
				`"master_key":{"a":1},"self_signing_key":null,"user_id":"@a:hs"`},
			{`"user_id":"@a:hs"`, `"user_id":"@a:hs"`, `"user_id":"@a:hs"`},
			{`"user_id":"@a:hs","x":1,"y":1`, `"user_id":"@a:hs"`, `"user_id":"@a:hs","x":1,"y":1`},
			{`"user_id":"@a:hs"`, `"user_id":"@a:hs","x":2,"y":2`, `"user_id":"@a:hs","x":2,"y":2`},
			{`"a":1,"user_id":"@a:hs","z":1`, `"b":2,"user_id":"@a:hs","y":2,"z":2`, `"a":1,"b":2,"user_id":"@a:hs","y":2,"z":2`},
		} {
			old, newer, want := edu(eduType, c.old), edu(eduType, c.newer), edu(eduType, c.want)
			got, err := MergeSigningKeys([]byte(old), []byte(newer))
			if err != nil || string(got) != want {
				t.Errorf("%s\nand %s\n got %s, %v\nwant %s", old, newer, got, err, want)
			}
			if a, b := splitOne(t, old), splitOne(t, string(got)); a.Kind != b.Kind || a.Key != b.Key || b.Key == "" {
				t.Errorf("the key %q became %q", a.Key, b.Key)
			}
		}
	}
	good := edu("m.signing_key_update", `"user_id":"@a:hs"`)
	for _, bad := range []string{
		edu("org.matrix.signing_key_update", `"user_id":"@a:hs"`),
		edu("m.signing_key_update", `"user_id":"@b:hs"`),
		edu("m.signing_key_update", ``),
		edu("m.presence", `"user_id":"@a:hs"`),
		``, `{`, `{}`, `[]`, good[:len(good)-1], good + "x",
	} {
		for _, pair := range [][2]string{{good, bad}, {bad, good}} {
			if got, err := MergeSigningKeys([]byte(pair[0]), []byte(pair[1])); !errors.Is(err, ErrItem) || got != nil {
				t.Errorf("%s and %s: got %s, %v", pair[0], pair[1], got, err)
			}
		}
	}
}

func deviceEDU(user, device, stream, prev string) string {
	if prev != "" {
		prev = `"prev_id":` + prev + `,`
	}
	return fmt.Sprintf(`{"content":{"deleted":false,"device_id":%q,%s"stream_id":%s,"user_id":%q,"z":[]},"edu_type":"m.device_list_update"}`, device, prev, stream, user)
}

func TestRelinkDeviceList(t *testing.T) {
	many := func(from, to int) string {
		var ids []string
		for i := from; i < to; i++ {
			ids = append(ids, fmt.Sprint(i))
		}
		return strings.Join(ids, ",")
	}
	for _, c := range []struct {
		stream, prev string // of the dropped one
		later        string // prev_id of the later one
		want         string // its prev_id then; "" if it does not refer to the dropped one
	}{
		{`6`, `[5]`, `[6]`, `[5]`},
		{`6`, `[5]`, `["6"]`, `[5]`},
		{`"6"`, `["5"]`, `[6]`, `["5"]`},
		{`6`, `[4,5]`, `[6]`, `[4,5]`},
		{`6`, `[4,5]`, `[3,6,7]`, `[3,4,5,7]`},
		{`6`, `[4,"3"]`, `[3,6,"4"]`, `[3,4]`},
		{`6`, `[5]`, `[6,"6"]`, `[5]`},
		{`6`, `[]`, `[6]`, `[]`},
		{`6`, ``, `[6]`, `[]`},
		{`6`, `[]`, `[3,6,7]`, `[]`}, // the receiver must ask, whatever it knows of 3 and 7
		{`6`, `[5]`, `[7]`, ``},
		{`6`, `[5]`, `[]`, ``},
		{`6`, `[5]`, ``, ``},
		{`6`, `[5]`, `[66,"x6"]`, ``},
		{`6`, `[` + many(10, 10+maxPrevIDs) + `]`, `[6]`, `[` + many(10, 10+maxPrevIDs) + `]`},
		{`6`, `[` + many(10, 10+maxPrevIDs) + `]`, `[6,9]`, ``},
		{`"x"`, `["a b"]`, `["x"]`, `["a b"]`},
	} {
		dropped := deviceEDU("@a:hs", "OLD", c.stream, c.prev)
		later := deviceEDU("@a:hs", "DEV", "8", c.later)
		got, refers, err := RelinkDeviceList([]byte(dropped), []byte(later))
		want := ""
		if c.want != "" {
			want = deviceEDU("@a:hs", "DEV", "8", c.want)
		}
		if err != nil || refers != (want != "") || string(got) != want {
			t.Errorf("%s\nout of %s\n got %s, %t, %v\nwant %s", dropped, later, got, refers, err, want)
		}
		if other := deviceEDU("@b:hs", "DEV", "8", c.later); c.later != "" {
			if got, refers, err := RelinkDeviceList([]byte(dropped), []byte(other)); refers || err != nil || got != nil {
				t.Errorf("another user's: got %s, %t, %v", got, refers, err)
			}
		}
	}
	good := deviceEDU("@a:hs", "DEV", "8", "[6]")
	for _, bad := range []string{
		deviceEDU("@a:hs", "DEV", "null", "[6]"), deviceEDU("@a:hs", "DEV", "8", "[null]"), deviceEDU("@a:hs", "DEV", "8", "6"),
		strings.Replace(good, "m.device_list_update", "m.typing", 1),
		``, `{`, `{}`, `[]`, good[:len(good)-1], good + "x",
	} {
		for _, pair := range [][2]string{{good, bad}, {bad, good}} {
			if got, refers, err := RelinkDeviceList([]byte(pair[0]), []byte(pair[1])); !errors.Is(err, ErrItem) || refers || got != nil {
				t.Errorf("%s and %s: got %s, %t, %v", pair[0], pair[1], got, refers, err)
			}
		}
	}
}

// A chain that shrinks step by step stays one chain from what the receiver knows
// to the newest list.
func TestRelinkChain(t *testing.T) {
	var chain []string
	for i := 1; i <= 9; i++ {
		id := fmt.Sprint(10 + i)
		if i%2 == 0 {
			id = `"` + id + `"`
		}
		chain = append(chain, deviceEDU("@a:hs", "DEV"+fmt.Sprint(i), id, fmt.Sprintf(`[%d]`, 9+i)))
	}
	for _, at := range []int{4, 4, 0, 0, 3, 2, 1, 0} {
		links := 0
		for i := at + 1; i < len(chain); i++ {
			got, refers, err := RelinkDeviceList([]byte(chain[at]), []byte(chain[i]))
			if err != nil {
				t.Fatal(err)
			}
			if refers {
				links++
				chain[i] = string(got)
			}
		}
		if links != 1 {
			t.Errorf("%d links to %s", links, chain[at])
		}
		chain = slices.Delete(chain, at, at+1)
		prev := "10"
		for _, c := range chain {
			txn, err := ParseTransaction([]byte(`{"edus":[` + c + `],"origin":"hs","pdus":[]}`))
			if err != nil {
				t.Fatal(err)
			}
			l, ok := parseDeviceList(&txn.EDUs[0])
			if !ok || strings.Trim(string(l.prev), `[]"`) != prev {
				t.Errorf("%s follows %s, want %s", c, l.prev, prev)
			}
			prev = string(l.stream)
		}
	}
	if len(chain) != 1 {
		t.Errorf("%d are left", len(chain))
	}
}

func TestNewest(t *testing.T) {
	for _, c := range []struct {
		depths []int64
		want   []int
	}{
		{nil, nil},
		{[]int64{7}, []int{0}},
		{[]int64{1, 2, 3}, []int{2}},
		{[]int64{1, 3, 2}, []int{1, 2}},
		{[]int64{3, 1, 3, 2, 3}, []int{0, 2, 4}},
		{[]int64{3, 3, 1, 2}, []int{0, 1, 3}},
		{[]int64{0, 0, 0}, []int{0, 1, 2}},
		{[]int64{-1, maxJSONInteger, 5, 5}, []int{1, 3}},
	} {
		if got := Newest(c.depths); !slices.Equal(got, c.want) {
			t.Errorf("%v: got %v, want %v", c.depths, got, c.want)
		}
	}
}

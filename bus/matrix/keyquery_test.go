package matrix

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

func TestParseKeyQuery(t *testing.T) {
	const now = 1700000000000
	for _, c := range []struct {
		body string
		want []KeyWant
	}{
		{`{"server_keys":{}}`, nil},
		{`{"server_keys":{"b.example":{"ed25519:2":{"minimum_valid_until_ts":7},"ed25519:1":{}},"a.example":{}}}`, []KeyWant{
			{"a.example", "", now}, {"b.example", "ed25519:1", now}, {"b.example", "ed25519:2", 7},
		}},
		{` { "server_keys" : { "hs:8448" : { "ed25519:a" : { "minimum_valid_until_ts" : 0 , "x" : 1.5 } } } , "other" : [ ] } `, []KeyWant{
			{"hs:8448", "ed25519:a", 0},
		}},
		{`{"server_\u006beys":{"h\u0073":{"\u0065d25519:a":{"minimum_valid\u005funtil_ts":3}}}}`, []KeyWant{{"hs", "ed25519:a", 3}}},
		{`{"server_keys":{"[::1]":{"rsa:1":{"minimum_valid_until_ts":-5}}}}`, []KeyWant{{"[::1]", "rsa:1", -5}}},
		{`{"server_keys":{"hs":{"ed25519:a":{"minimum_valid_until_ts":null}}}}`, []KeyWant{{"hs", "ed25519:a", now}}},
		{`{"server_keys":{"HS":{},"hs":{}}}`, []KeyWant{{"HS", "", now}, {"hs", "", now}}},

		// Members given twice.
		{`{"server_keys":{"x":{}},"server_keys":{"hs":{}}}`, []KeyWant{{"hs", "", now}}},
		{`{"server_keys":{"hs":{"ed25519:a":{}},"hs":{"ed25519:b":{}}}}`, []KeyWant{{"hs", "ed25519:b", now}}},
		{`{"server_keys":{"hs":{"ed25519:a":1,"ed25519:a":{"minimum_valid_until_ts":1,"minimum_valid_until_ts":2}}}}`, []KeyWant{{"hs", "ed25519:a", 2}}},
		{`{"server_keys":[],"server_keys":{"bad name":1},"server_keys":{}}`, nil},

		// What an event of somebody else may have put there costs nobody else's keys,
		// and does not become a wish for all keys of the server.
		{`{"server_keys":{"hs":{"":{},"ed25519:\u0000":{},"ed25519:é":{},"ed25519:\"":{},"ed25519: ":{},"ed25519:` + strings.Repeat("x", maxKeyID) + `":{},"ed25519:a":{}},"x":{"\n":{}}}}`,
			[]KeyWant{{"hs", "ed25519:a", now}}},
		{`{"server_keys":{"":{},"good":{},"bad name":{},"a\"b":{},"` + strings.Repeat("x", MaxServerName+1) + `":{}}}`, []KeyWant{{"good", "", now}}},
		{`{"server_keys":{"hs":{"a":{"minimum_valid_until_ts":9007199254740991},"b":{"minimum_valid_until_ts":9007199254740992},
			"c":{"minimum_valid_until_ts":1.5},"d":{"minimum_valid_until_ts":1e999},"e":{"minimum_valid_until_ts":` + strings.Repeat("9", 5000) + `}}}}`,
			[]KeyWant{{"hs", "a", maxJSONInteger}, {"hs", "b", maxJSONInteger}, {"hs", "c", maxJSONInteger}, {"hs", "d", maxJSONInteger}, {"hs", "e", maxJSONInteger}}},
	} {
		got, err := ParseKeyQuery([]byte(c.body), now, 5)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s\n got %v, %v\nwant %v", c.body, got, err, c.want)
		}
	}
}

func TestParseKeyQueryRejects(t *testing.T) {
	inKey := func(criteria string) string { return `{"server_keys":{"hs":{"ed25519:a":` + criteria + `}}}` }
	for _, c := range []struct {
		body string
		want error // besides ErrKeyQuery
	}{
		{``, ErrJSONSyntax},
		{`{"server_keys":{}`, ErrJSONSyntax},
		{`{"server_keys":{}}{}`, ErrJSONSyntax},
		{`{"server_keys":{"\ud800":{}}}`, ErrJSONSyntax},
		{"{\"server_keys\":{\"\xff\":{}}}", ErrJSONSyntax},
		{`{"x":` + strings.Repeat("[", MaxJSONDepth) + strings.Repeat("]", MaxJSONDepth) + `,"server_keys":{}}`, ErrJSONComplex},
		{strings.Repeat(`{"server_keys":`, 1<<16), ErrJSONComplex},
		{`[]`, nil},
		{`"server_keys"`, nil},
		{`{}`, nil},
		{`{"Server_Keys":{}}`, nil},
		{`{"server_keys":null}`, nil},
		{`{"server_keys":[]}`, nil},
		{`{"server_keys":{"hs":null}}`, nil},
		{`{"server_keys":{"hs":["ed25519:a"]}}`, nil},
		{inKey(`null`), nil},
		{inKey(`5`), nil},
		{inKey(`[]`), nil},
		{inKey(`{"minimum_valid_until_ts":"5"}`), nil},
		{inKey(`{"minimum_valid_until_ts":true}`), nil},
		{inKey(`{"minimum_valid_until_ts":false}`), nil},
		{inKey(`{"minimum_valid_until_ts":[5]}`), nil},
		{inKey(`{"minimum_valid_until_ts":{}}`), nil},
	} {
		got, err := ParseKeyQuery([]byte(c.body), 1, 100)
		if got != nil || !errors.Is(err, ErrKeyQuery) || errors.Is(err, ErrTooManyKeys) || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%.100s: %v, %v; want ErrKeyQuery and %v", c.body, got, err, c.want)
		}
	}
}

func TestParseKeyQueryBound(t *testing.T) {
	body := []byte(`{"server_keys":{"a":{},"b":{"ed25519:1":{},"ed25519:2":{},"\u0000":{}}}}`)
	for most := range 5 {
		got, err := ParseKeyQuery(body, 1, most)
		if most < 3 {
			if got != nil || !errors.Is(err, ErrTooManyKeys) || errors.Is(err, ErrKeyQuery) {
				t.Errorf("at most %d: %v, %v", most, got, err)
			}
		} else if err != nil || len(got) != 3 {
			t.Errorf("at most %d: %v, %v", most, got, err)
		}
	}
}

func TestAppendKeyQuery(t *testing.T) {
	for _, c := range []struct {
		wants []KeyWant
		want  string
	}{
		{nil, `{"server_keys":{}}`},
		{[]KeyWant{{"hs", "", 5}}, `{"server_keys":{"hs":{}}}`},
		{[]KeyWant{{"hs", "ed25519:a", 5}}, `{"server_keys":{"hs":{"ed25519:a":{"minimum_valid_until_ts":5}}}}`},
		{
			[]KeyWant{{"b", "k2", 1}, {"a", "k", 2}, {"b", "k1", 3}, {"b", "k2", 9}, {"b", "k2", 4}},
			`{"server_keys":{"a":{"k":{"minimum_valid_until_ts":2}},"b":{"k1":{"minimum_valid_until_ts":3},"k2":{"minimum_valid_until_ts":9}}}}`,
		},
		{[]KeyWant{{"b", "", 1}, {"a", "k", 2}, {"a", "", 3}, {"a", "k", 1}}, `{"server_keys":{"a":{},"b":{}}}`},
		{
			[]KeyWant{{"a", "k", math.MaxInt64}, {"a", "l", math.MinInt64}},
			`{"server_keys":{"a":{"k":{"minimum_valid_until_ts":9007199254740991},"l":{"minimum_valid_until_ts":-9007199254740991}}}}`,
		},
		{[]KeyWant{{"a", "k\"\n", 0}}, `{"server_keys":{"a":{"k\"\n":{"minimum_valid_until_ts":0}}}}`},
	} {
		wants := slices.Clone(c.wants)
		got := AppendKeyQuery([]byte("before"), wants)
		if string(got) != "before"+c.want {
			t.Errorf("%v\n got %s\nwant %s", c.wants, got, c.want)
		}
		if !slices.Equal(wants, c.wants) {
			t.Errorf("%v became %v", c.wants, wants)
		}
		body := got[len("before"):]
		if canonical, err := CanonicalJSON(body); err != nil || !bytes.Equal(canonical, body) {
			t.Errorf("%s is not canonical: %v", body, err)
		}
	}
}

func FuzzParseKeyQuery(f *testing.F) {
	f.Add([]byte(`{"server_keys":{"b.example":{"ed25519:2":{"minimum_valid_until_ts":7},"ed25519:1":{}},"a.example":{}}}`), int64(5), 4)
	f.Add([]byte(`{"server_keys":{"hs":{"":{},"ed25519:\u0000":{"minimum_valid_until_ts":1e5}}}}`), int64(-1), 1)
	f.Add([]byte(`{"server_keys":{"hs":{"a":{"minimum_valid_until_ts":null},"a":{"minimum_valid_until_ts":-9007199254740993}}},"x":[{}]}`), int64(0), 0)
	f.Fuzz(func(t *testing.T, body []byte, now int64, most int) {
		now = min(max(now, -maxJSONInteger), maxJSONInteger)
		wants, err := ParseKeyQuery(body, Timestamp(now), most)
		if err != nil {
			if wants != nil || errors.Is(err, ErrKeyQuery) == errors.Is(err, ErrTooManyKeys) {
				t.Fatalf("%q: %v, %v", body, wants, err)
			}
			return
		}
		if len(wants) > max(most, 0) {
			t.Fatalf("%q: %d wants, at most %d", body, len(wants), most)
		}
		var query struct {
			ServerKeys map[string]map[string]json.RawMessage
		}
		var members map[string]json.RawMessage
		if err := errors.Join(json.Unmarshal(body, &members), json.Unmarshal(members["server_keys"], &query.ServerKeys)); err != nil {
			t.Fatalf("%q is taken, but: %v", body, err)
		}
		for i, w := range wants {
			if i > 0 && cmp.Or(cmp.Compare(wants[i-1].Server, w.Server), cmp.Compare(wants[i-1].KeyID, w.KeyID)) >= 0 {
				t.Fatalf("%q: %v is not in order", body, wants)
			}
			if _, err := ParseServerName(string(w.Server)); err != nil {
				t.Fatalf("%q: %v", body, err)
			}
			keys, ok := query.ServerKeys[string(w.Server)]
			if _, named := keys[w.KeyID]; !ok || w.KeyID == "" && len(keys) > 0 || w.KeyID != "" && !named {
				t.Fatalf("%q: nobody asked for %v", body, w)
			}
		}
		again := AppendKeyQuery(nil, wants)
		if canonical, err := CanonicalJSON(again); err != nil || !bytes.Equal(canonical, again) {
			t.Fatalf("%q: %s is not canonical: %v", body, again, err)
		}
		if got, err := ParseKeyQuery(again, Timestamp(now), most); err != nil || !slices.Equal(got, wants) {
			t.Fatalf("%q: %s is %v, %v; want %v", body, again, got, err, wants)
		}
		// Any order, and any want twice, make the same query.
		shuffled := slices.Concat(wants, wants)
		slices.Reverse(shuffled)
		if got := AppendKeyQuery(nil, shuffled); !bytes.Equal(got, again) {
			t.Fatalf("%q: %s, and in another order %s", body, again, got)
		}
	})
}

// readAnswer reads all elements of an answer. The error is nil at its end.
func readAnswer(r io.Reader, most int) (elements []string, skipped int, err error) {
	k := NewKeyAnswerReader(r, most)
	for {
		element, err := k.Next()
		if err == io.EOF {
			err = nil
		} else if err == nil {
			elements = append(elements, string(element))
			continue
		}
		return elements, k.Skipped(), err
	}
}

func TestKeyAnswerReader(t *testing.T) {
	a, b := string(aServersKeys(t, "a", 5)), string(aServersKeys(t, "b", 6))
	const odd = "{ \"x\\\"]}\" : [ 1 , {\"y\":[[],{}]} ] ,\n\"\\ud800\": -0.5e+7 }"
	large := `{"x":"` + strings.Repeat("]", MaxServerKeys) + `"}`
	exact := `{"x":"` + strings.Repeat("x", MaxServerKeys-len(`{"x":""}`)) + `"}`
	for what, c := range map[string]struct {
		answer  string
		want    []string
		skipped int
	}{
		"none":                {`{"server_keys":[]}`, nil, 0},
		"one":                 {KeyAnswerBegin + a + KeyAnswerEnd, []string{a}, 0},
		"two":                 {KeyAnswerBegin + a + "," + b + KeyAnswerEnd, []string{a, b}, 0},
		"blanks":              {" {\n\"server_keys\" :\t[ " + a + " ,\r" + odd + " ] } \n", []string{a, odd}, 0},
		"members before":      {`{"a":[{"server_keys":[1,2]}],"b":{"c":[]},"d":1.5,"e":"\u00e9\\","f":null,"server_keys":[` + a + `]}`, []string{a}, 0},
		"members after":       {`{"server_keys":[` + a + `],"g":{},"h":[[],[{}]],"Server_Keys":true}`, []string{a}, 0},
		"escaped name":        {`{"server\u005fkeys":[` + a + `],"server_keys\u0000":0}`, []string{a}, 0},
		"long name":           {`{"` + strings.Repeat("server_keys", 10000) + `":0,"server_keys":[` + a + `]}`, []string{a}, 0},
		"of other types":      {`{"server_keys":[1,"]",null,[],true,-1e5,0]}`, []string{`1`, `"]"`, `null`, `[]`, `true`, `-1e5`, `0`}, 0},
		"too large":           {KeyAnswerBegin + large + "," + a + "," + large + KeyAnswerEnd, []string{a}, 2},
		"too large only":      {KeyAnswerBegin + large + KeyAnswerEnd, nil, 1},
		"as large as may be":  {KeyAnswerBegin + exact + "," + exact + KeyAnswerEnd, []string{exact, exact}, 0},
		"a byte more":         {KeyAnswerBegin + exact[:2] + " " + exact[2:] + "," + a + KeyAnswerEnd, []string{a}, 1},
		"not UTF-8":           {KeyAnswerBegin + "\"\xff\"" + KeyAnswerEnd, []string{"\"\xff\""}, 0},
		"a lone surrogate":    {KeyAnswerBegin + `"\udc00"` + KeyAnswerEnd, []string{`"\udc00"`}, 0},
		"as deep as may be":   {KeyAnswerBegin + strings.Repeat("[", 998) + strings.Repeat("]", 998) + KeyAnswerEnd, []string{strings.Repeat("[", 998) + strings.Repeat("]", 998)}, 0},
		"empty, in an object": {`{"server_keys":[{}],"x":{"a":{}}}`, []string{`{}`}, 0},
	} {
		for how, r := range map[string]io.Reader{
			"whole":         strings.NewReader(c.answer),
			"by bytes":      iotest.OneByteReader(strings.NewReader(c.answer)),
			"by halves":     iotest.HalfReader(strings.NewReader(c.answer)),
			"end with data": iotest.DataErrReader(strings.NewReader(c.answer)),
		} {
			got, skipped, err := readAnswer(r, len(c.want)+c.skipped)
			if err != nil || skipped != c.skipped || !slices.Equal(got, c.want) {
				t.Errorf("%s, %s: %.200q, %d skipped, %v; want %.200q, %d", what, how, got, skipped, err, c.want, c.skipped)
			}
		}
		if n := len(c.want) + c.skipped; n > 0 {
			got, skipped, err := readAnswer(strings.NewReader(c.answer), n-1)
			if !errors.Is(err, ErrServerKeys) || len(got)+skipped != n-1 {
				t.Errorf("%s, at most %d: %d and %d skipped, %v", what, n-1, len(got), skipped, err)
			}
		}
	}
}

func TestKeyAnswerReaderRejects(t *testing.T) {
	const begin = KeyAnswerBegin + `{"a":1}`
	for _, c := range []struct {
		answer string
		before int // how many elements come nevertheless
	}{
		{`null`, 0}, {`[]`, 0}, {`[{"server_keys":[]}]`, 0}, {`x`, 0}, {"\ufeff" + `{"server_keys":[]}`, 0},
		{`{}`, 0}, {`{"server_key":[]}`, 0},
		{`{"server_keys":{}}`, 0}, {`{"server_keys":null}`, 0}, {`{"server_keys":"x"}`, 0}, {`{"server_keys":1}`, 0},
		{`{"server_keys":[],"server_keys":[]}`, 0}, {`{"server_keys":[1],"server\u005fkeys":[]}`, 1},
		{`{"server_keys":[]}x`, 0}, {`{"server_keys":[]}}`, 0}, {`{"server_keys":[]} {}`, 0},
		{`{"server_keys":[],}`, 0}, {`{,"server_keys":[]}`, 0}, {`{server_keys:[]}`, 0}, {`{"server_keys" []}`, 0}, {`{"server_keys":[]]`, 0},
		{`{"server_keys":[]"x":1}`, 0}, {`{"server_keys":[],"x"}`, 0}, {`{"server_keys":[],1:1}`, 0},
		{begin + `,]}`, 1}, {begin + `{"b":2}]}`, 1}, {begin + `}`, 1}, {begin + `,,1]}`, 1}, {begin + `]]`, 1},
		{begin + `,tru]}`, 1}, {begin + `,nulL]}`, 1}, {begin + `,falsey]}`, 2}, {begin + `,NaN]}`, 1}, {begin + `,Infinity]}`, 1},
		{begin + `,01]}`, 2}, {begin + `,-]}`, 1}, {begin + `,+1]}`, 1}, {begin + `,1.]}`, 1}, {begin + `,.5]}`, 1}, {begin + `,1e]}`, 1}, {begin + `,1e+]}`, 1}, {begin + `,1.e1]}`, 1}, {begin + `,- 1]}`, 1},
		{begin + `,"\x"]}`, 1}, {begin + `,"\u12g4"]}`, 1}, {begin + ",\"\n\"]}", 1}, {begin + ",\"\x00\"]}", 1}, {begin + `,'x']}`, 1},
		{begin + `,{"a"}]}`, 1}, {begin + `,{"a":}]}`, 1}, {begin + `,{"a":1,}]}`, 1}, {begin + `,{1:1}]}`, 1}, {begin + `,{"a":1]]}`, 1}, {begin + `,[1}]}`, 1}, {begin + `,[1,]]}`, 1}, {begin + `,{"a" 1}]}`, 1}, {begin + `,[1 2]]}`, 1}, {begin + `,[,]]}`, 1},
		{begin + `,` + strings.Repeat("[", 999), 1}, {`{"x":` + strings.Repeat("[", 1<<17), 0}, {KeyAnswerBegin + strings.Repeat(`{"":`, 1<<17), 0},
	} {
		for how, r := range map[string]io.Reader{
			"whole":         strings.NewReader(c.answer),
			"by bytes":      iotest.OneByteReader(strings.NewReader(c.answer)),
			"end with data": iotest.DataErrReader(strings.NewReader(c.answer)),
		} {
			got, _, err := readAnswer(r, 100)
			if !errors.Is(err, ErrServerKeys) || len(got) != c.before {
				t.Errorf("%.60s, %s: %.100q, %v; want an ErrServerKeys after %d", c.answer, how, got, err, c.before)
			}
		}
	}

	// Cut anywhere, it is not whole.
	whole := ` {"a":[1.5,{"b":"\u00e9\n"}],"server_keys":[{"x":[-10e+5,true]},"y", null ],"c":{}}`
	if got, _, err := readAnswer(strings.NewReader(whole), 3); err != nil || len(got) != 3 {
		t.Errorf("%q, %v", got, err)
	}
	for n := range whole {
		got, _, err := readAnswer(strings.NewReader(whole[:n]), 3)
		if !errors.Is(err, ErrServerKeys) || !strings.Contains(err.Error(), "cut") {
			t.Errorf("cut at %d: %q, %v", n, got, err)
		}
	}
}

func TestKeyAnswerReaderErrors(t *testing.T) {
	broken := errors.New("broken")
	r := io.MultiReader(strings.NewReader(KeyAnswerBegin+`{"a":1},{"b`), iotest.ErrReader(broken))
	k := NewKeyAnswerReader(r, 5)
	if element, err := k.Next(); err != nil || string(element) != `{"a":1}` {
		t.Errorf("%s, %v", element, err)
	}
	for range 3 { // it stays so
		if element, err := k.Next(); element != nil || !errors.Is(err, ErrServerKeys) || !errors.Is(err, broken) {
			t.Errorf("%q, %v", element, err)
		}
	}
	// An error where the answer could end is no end.
	r = io.MultiReader(strings.NewReader(`{"server_keys":[]}`), iotest.ErrReader(io.ErrUnexpectedEOF))
	if _, _, err := readAnswer(r, 5); !errors.Is(err, ErrServerKeys) || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
	if _, _, err := readAnswer(stuck{}, 5); !errors.Is(err, io.ErrNoProgress) {
		t.Error(err)
	}
	k = NewKeyAnswerReader(strings.NewReader(`{"server_keys":[]}`), 0)
	for range 3 {
		if element, err := k.Next(); element != nil || err != io.EOF {
			t.Errorf("%q, %v", element, err)
		}
	}
}

// stuck reads nothing.
type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

// repeated reads a text again and again.
type repeated struct {
	text string
	at   int
}

func (e *repeated) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = e.text[e.at]
		e.at = (e.at + 1) % len(e.text)
	}
	return len(b), nil
}

// However long an element, a member's name or a member is, memory stays bounded.
func TestKeyAnswerReaderMemory(t *testing.T) {
	const size = 8 << 20
	for what, c := range map[string]struct{ head, body, tail string }{
		"a string":      {KeyAnswerBegin + `"`, `x`, `"` + KeyAnswerEnd},
		"an array":      {KeyAnswerBegin + `[0`, `,[]`, `]` + KeyAnswerEnd},
		"a number":      {KeyAnswerBegin, `7`, KeyAnswerEnd},
		"blanks":        {KeyAnswerBegin, ` `, `1` + KeyAnswerEnd},
		"a name":        {`{"`, `x`, `":1,"server_keys":[]}`},
		"other members": {`{"":0`, `,"a":"b"`, `,"server_keys":[]}`},
		"after":         {`{"server_keys":[]}`, "\n", " "},
	} {
		body := io.LimitReader(&repeated{text: c.body}, int64(size-size%len(c.body)))
		r := io.MultiReader(strings.NewReader(c.head), body, strings.NewReader(c.tail))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, skipped, err := readAnswer(r, 1)
		runtime.ReadMemStats(&after)
		if err != nil {
			t.Errorf("%s: %.50q, %d skipped, %v", what, got, skipped, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 512<<10 {
			t.Errorf("%s: %d bytes of memory", what, n)
		}
	}
}

// The objects of many servers, each as CheckServerKeys takes it, put together and
// taken apart again.
func TestKeyAnswerRoundTrip(t *testing.T) {
	answer := []byte(KeyAnswerBegin)
	for i := range 100 {
		if i > 0 {
			answer = append(answer, ',')
		}
		answer = append(answer, aServersKeys(t, fmt.Sprintf("hs%d", i), Timestamp(i))...)
	}
	answer = append(answer, KeyAnswerEnd...)
	if !json.Valid(answer) {
		t.Fatalf("%s", answer)
	}
	k := NewKeyAnswerReader(bytes.NewReader(answer), 100)
	for i := range 100 {
		element, err := k.Next()
		if err != nil {
			t.Fatal(err)
		}
		o, err := CheckServerKeys(element, ServerName(fmt.Sprintf("hs%d", i)))
		if err != nil || o.ValidUntil != Timestamp(i) {
			t.Errorf("%d: %+v, %v", i, o, err)
		}
	}
	if _, err := k.Next(); err != io.EOF {
		t.Error(err)
	}
}

func FuzzKeyAnswerReader(f *testing.F) {
	f.Add([]byte(KeyAnswerBegin+string(aServersKeys(f, "a", 5))+`,{"x":[1.5e-3,null,"\u00e9"]}`+KeyAnswerEnd), 3, uint8(0))
	f.Add([]byte(`{"a":[{"server_keys":[1]}],"server\u005fkeys":[ true , false ,-0, [] ,{}],"b":{"c":"d"}}`), 9, uint8(1))
	f.Add([]byte(`{"server_keys":[{"a":1},{"b":2}`), 1, uint8(2))
	f.Add([]byte(KeyAnswerBegin+strings.Repeat(`[`, 999)), 1, uint8(0))
	f.Fuzz(func(t *testing.T, answer []byte, most int, how uint8) {
		r := io.Reader(bytes.NewReader(answer))
		switch how % 3 {
		case 1:
			r = iotest.OneByteReader(r)
		case 2:
			r = iotest.DataErrReader(r)
		}
		got, skipped, err := readAnswer(r, most)
		if err != nil && !errors.Is(err, ErrServerKeys) {
			t.Fatalf("%q: %v", answer, err)
		}
		if len(got)+skipped > max(most, 0) {
			t.Fatalf("%q: %d elements and %d skipped, at most %d", answer, len(got), skipped, most)
		}
		for _, element := range got {
			if len(element) > MaxServerKeys || !json.Valid([]byte(element)) {
				t.Fatalf("%q: element %q", answer, element)
			}
		}
		want, large, ok := wantElements(answer)
		if !ok {
			if err == nil {
				t.Fatalf("%q is taken as %q", answer, got)
			}
			return
		}
		if len(want)+large > max(most, 0) {
			if err == nil {
				t.Fatalf("%q: more than %d", answer, most)
			}
			return
		}
		if err != nil && !errors.Is(err, ErrJSONComplex) {
			t.Fatalf("%q: %v", answer, err)
		}
		if err == nil && (!slices.Equal(got, want) || skipped != large) {
			t.Fatalf("%q: %q and %d skipped, want %q and %d", answer, got, skipped, want, large)
		}
		if err != nil && !slices.Equal(got, want[:min(len(got), len(want))]) {
			t.Fatalf("%q: %q, want %q", answer, got, want)
		}
		again := KeyAnswerBegin + strings.Join(got, ",") + KeyAnswerEnd
		if back, _, err := readAnswer(strings.NewReader(again), len(got)); err != nil || !slices.Equal(back, got) {
			t.Fatalf("%q: %q became %q, %v", answer, got, back, err)
		}
	})
}

// wantElements is what encoding/json finds in an answer: the elements, but for how
// many that are too large. It returns false if it is no well-formed answer with
// one member server_keys.
func wantElements(answer []byte) (elements []string, large int, ok bool) {
	var members map[string]json.RawMessage
	if json.Unmarshal(answer, &members) != nil {
		return nil, 0, false
	}
	d, names := json.NewDecoder(bytes.NewReader(answer)), 0
	if start, err := d.Token(); err != nil || start != json.Delim('{') {
		return nil, 0, false // null
	}
	for d.More() {
		name, err := d.Token()
		var value json.RawMessage
		if err != nil || d.Decode(&value) != nil {
			return nil, 0, false
		}
		if name == "server_keys" {
			names++
		}
	}
	raw := members["server_keys"]
	var list []json.RawMessage
	if names != 1 || raw[0] != '[' || json.Unmarshal(raw, &list) != nil {
		return nil, 0, false
	}
	for _, element := range list {
		if len(element) > MaxServerKeys {
			large++
		} else {
			elements = append(elements, string(element))
		}
	}
	return elements, large, true
}

func BenchmarkKeyAnswerReader(b *testing.B) {
	element := aServersKeys(b, "hs.example", 1700000000000)
	answer := []byte(KeyAnswerBegin + strings.Repeat(string(element)+",", 99) + string(element) + KeyAnswerEnd)
	b.SetBytes(int64(len(answer)))
	b.ReportAllocs()
	for b.Loop() {
		k, n := NewKeyAnswerReader(bytes.NewReader(answer), 100), 0
		var err error
		for ; err == nil; n++ {
			_, err = k.Next()
		}
		if err != io.EOF || n != 101 {
			b.Fatal(n, err)
		}
	}
}

package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// The examples of the appendices, "Canonical JSON".
func TestCanonicalJSONSpecification(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{`{}`, `{}`},
		{"{\n    \"one\": 1,\n    \"two\": \"Two\"\n}", `{"one":1,"two":"Two"}`},
		{"{\n    \"b\": \"2\",\n    \"a\": \"1\"\n}", `{"a":"1","b":"2"}`},
		{`{"b":"2","a":"1"}`, `{"a":"1","b":"2"}`},
		{
			`{"auth": {"success": true, "mxid": "@john.doe:example.com", "profile": {"display_name": "John Doe",
			  "three_pids": [{"medium": "email", "address": "john.doe@example.org"},
			                 {"medium": "msisdn", "address": "123456789"}]}}}`,
			`{"auth":{"mxid":"@john.doe:example.com","profile":{"display_name":"John Doe","three_pids":[{"address":"john.doe@example.org","medium":"email"},{"address":"123456789","medium":"msisdn"}]},"success":true}}`,
		},
		{`{"a": "日本語"}`, `{"a":"日本語"}`},
		{`{"本": 2, "日": 1}`, `{"日":1,"本":2}`},
		{`{"a": "\u65E5"}`, `{"a":"日"}`},
		{`{"a": null}`, `{"a":null}`},
		{`{"a": -0, "b": 1e10}`, `{"a":0,"b":10000000000}`},
	} {
		got, err := CanonicalJSON([]byte(c.in))
		if err != nil || string(got) != c.want {
			t.Errorf("%s\n got %s, %v\nwant %s", c.in, got, err, c.want)
		}
	}
}

// testdata/canonicaljson.jsonl holds what Python's canonicaljson 2.0.0, which
// Synapse signs with, makes of its inputs.
func TestCanonicalJSONAsSynapse(t *testing.T) {
	for _, c := range readLines[struct{ In, Out string }](t, "testdata/canonicaljson.jsonl", 50) {
		got, err := CanonicalJSON([]byte(c.In))
		if err != nil || string(got) != c.Out {
			t.Errorf("%s\n got %s, %v\nwant %s", c.In, got, err, c.Out)
		}
	}
}

func TestCanonicalJSONNumbers(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"0", "0"}, {"-0", "0"}, {"-0.0", "0"}, {"0e5", "0"}, {"0.000E-400", "0"}, {"1", "1"}, {"-1", "-1"},
		{"1.0", "1"}, {"100e-2", "1"}, {"1.5e1", "15"}, {"0.00012e5", "12"}, {"-1.20E+1", "-12"}, {"10.0e-1", "1"},
		{"9007199254740991", "9007199254740991"}, {"-9007199254740991", "-9007199254740991"},
		{"9007199254740991.000", "9007199254740991"}, {"90071992547409910e-1", "9007199254740991"},
		{"9.007199254740991e15", "9007199254740991"}, {"1e15", "1000000000000000"},
		{"0.0000000000000000000000000000001e31", "1"},
		{"1000000000000000000000000000000e-30", "1"},
		{"1e0000000000000000000000000000001", "10"},

		{"9007199254740992", ""}, {"-9007199254740992", ""}, {"9007199254740991.5", ""}, {"9007199254740993e0", ""},
		{"1e16", ""}, {"1e999999999999999999999", ""}, {"1e-1", ""}, {"1e-999999999999999999999", ""},
		{"0.1", ""}, {"1.0000000000000000000000001", ""}, {"-3.14", ""}, {"18446744073709551616", ""},
		{"10000000000000000000000000", ""}, {"12345678901234567e-1", ""},
	} {
		got, err := CanonicalJSON([]byte(c.in))
		if c.want == "" {
			if !errors.Is(err, ErrJSONNumber) || got != nil {
				t.Errorf("%s: got %s, %v; want ErrJSONNumber", c.in, got, err)
			}
		} else if err != nil || string(got) != c.want {
			t.Errorf("%s: got %s, %v; want %s", c.in, got, err, c.want)
		}
		raw, err := AppendCanonical(nil, []byte(" ["+c.in+" ] "), RawNumbers)
		if err != nil || string(raw) != "["+c.in+"]" {
			t.Errorf("%s with RawNumbers: got %s, %v", c.in, raw, err)
		}
	}
}

func TestCanonicalJSONRejects(t *testing.T) {
	for _, in := range []string{
		"", " ", "{", "}", "[", "]", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "{,}", `{"a"}`, `{"a":}`, `{"a":1,}`, `{"a":1 "b":2}`,
		`{a:1}`, `{1:1}`, `{'a':1}`, `"`, `"a`, `'a'`, `"\`, `"\x"`, `"\u12"`, `"\u12g4"`, `"\U0041"`, "\"\n\"", "\"\x00\"", "\"\x1f\"",
		"tru", "True", "nul", "truefalse", "NaN", "Infinity", "-Infinity", "-", "+1", "01", "1.", ".1", "1e", "1e+", "0x1", "--1", "1_0",
		"{}{}", "{} x", "1 1", "\ufeff{}", "\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "{\"\xff\":1}", "\xff",
		`"\ud800"`, `"\udc00"`, `"\ud800\ud800"`, `"\ud800x"`, `"\ud800\n"`, `"\ud800\u0041"`, `"\udc00\ud800"`, `{"\ud800":1}`,
		"[1]//", "/**/1", "\v1", "\u00a01",
	} {
		for _, numbers := range []Numbers{StrictNumbers, RawNumbers} {
			dst := []byte("kept")
			got, err := AppendCanonical(dst, []byte(in), numbers)
			if !errors.Is(err, ErrJSONSyntax) || string(got) != "kept" {
				t.Errorf("%q: got %q, %v; want ErrJSONSyntax", in, got, err)
			}
		}
	}
}

func TestCanonicalJSONBounds(t *testing.T) {
	nested := func(n int, open, middle, end string) []byte {
		return []byte(strings.Repeat(open, n) + middle + strings.Repeat(end, n))
	}
	members := func(n int, before string) []byte {
		b := []byte("{" + before)
		for i := range n {
			if i > 0 {
				b = append(b, ',')
			}
			b = fmt.Appendf(b, `"%08d":1`, n-i)
		}
		return append(b, '}')
	}
	for _, c := range []struct {
		name string
		in   []byte
		ok   bool
	}{
		{"arrays at the limit", nested(MaxJSONDepth, "[", "", "]"), true},
		{"arrays beyond it", nested(MaxJSONDepth+1, "[", "", "]"), false},
		{"objects at the limit", nested(MaxJSONDepth, `{"a":`, "1", "}"), true},
		{"objects beyond it", nested(MaxJSONDepth+1, `{"a":`, "1", "}"), false},
		{"never closed", bytes.Repeat([]byte("["), 1<<20), false},
		{"members at the limit", members(MaxJSONMembers, ""), true},
		{"members beyond it", members(MaxJSONMembers+1, ""), false},
		{"members of all open objects", members(1, `"a":1,"b":`+string(members(MaxJSONMembers, ""))+`,`), false},
		{"out of order for a few levels", nested(maxJSONMoves/2, `{"b":0,"a":`, "1", "}"), true},
		{"out of order all the way down", nested(MaxJSONDepth, `{"b":0,"a":`, `"`+strings.Repeat("x", 1<<16)+`"`, "}"), false},
	} {
		got, err := CanonicalJSON(c.in)
		if c.ok && err != nil || !c.ok && (!errors.Is(err, ErrJSONComplex) || got != nil) {
			t.Errorf("%s: ok %t, got error %v", c.name, c.ok, err)
		}
	}
}

// What is in canonical form already costs one allocation, that of the result.
func TestCanonicalJSONAllocations(t *testing.T) {
	for _, r := range recordings(t) {
		if r.Body == "" {
			continue
		}
		raw := []byte(r.Body)
		dst := make([]byte, 0, len(raw))
		n := testing.AllocsPerRun(20, func() {
			if _, err := AppendCanonical(dst, raw, RawNumbers); err != nil {
				t.Fatal(err)
			}
		})
		// The stack of open members grows a few times.
		if n > 7 {
			t.Errorf("%v allocations for %d bytes of canonical JSON", n, len(raw))
		}
		if got, _ := CanonicalJSON(raw); !bytes.Equal(got, raw) {
			t.Errorf("Synapse's own form changed:\n got %s\nwant %s", got, raw)
		}
	}
}

// jsonValue makes a random value of what canonical JSON can express.
func jsonValue(rng *rand.Rand, depth int) any {
	text := func() string {
		var s []rune
		for range rng.IntN(5) {
			s = append(s, []rune("ab\"\\\n\x01\x7fé日\U0001f600\uffff <&")[rng.IntN(14)])
		}
		return string(s)
	}
	kind := rng.IntN(7)
	if depth == 0 {
		kind = rng.IntN(5)
	}
	switch kind {
	case 0:
		return nil
	case 1:
		return rng.IntN(2) == 0
	case 2:
		return json.Number(fmt.Sprint(rng.Int64N(2*maxJSONInteger) - maxJSONInteger))
	case 3, 4:
		return text()
	case 5:
		a := make([]any, rng.IntN(4))
		for i := range a {
			a[i] = jsonValue(rng, depth-1)
		}
		return a
	}
	m := make(map[string]any)
	for range rng.IntN(6) {
		m[text()] = jsonValue(rng, depth-1)
	}
	return m
}

// scramble writes a value as another server might: members in any order, blanks,
// needless escapes, and before a member at times an older value for its name.
func scramble(rng *rand.Rand, b *bytes.Buffer, v any) {
	blank := func() { b.WriteString([]string{"", "", " ", "\n\t", "\r\n"}[rng.IntN(5)]) }
	str := func(s string) {
		b.WriteByte('"')
		for _, r := range s {
			switch {
			case r > 0xffff && rng.IntN(2) == 0:
				r -= 0x10000
				fmt.Fprintf(b, `\u%04x\u%04X`, 0xd800+r>>10, 0xdc00+r&0x3ff)
			case r == '"' || r == '\\' || r < ' ' || r <= 0xffff && rng.IntN(3) == 0:
				fmt.Fprintf(b, `\u%04X`, r)
			default:
				b.WriteRune(r)
			}
		}
		b.WriteByte('"')
	}
	blank()
	defer blank()
	switch v := v.(type) {
	case map[string]any:
		b.WriteByte('{')
		names := make([]string, 0, len(v))
		for name := range v {
			names = append(names, name)
		}
		slices.Sort(names)
		rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for i, name := range names {
			if i > 0 {
				b.WriteByte(',')
			}
			if rng.IntN(4) == 0 {
				blank()
				str(name)
				b.WriteString(`:[{"older":1}],`)
			}
			blank()
			str(name)
			blank()
			b.WriteByte(':')
			scramble(rng, b, v[name])
		}
		if len(v) == 0 {
			blank()
		}
		b.WriteByte('}')
	case []any:
		b.WriteByte('[')
		for i, e := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			scramble(rng, b, e)
		}
		b.WriteByte(']')
	case string:
		str(v)
	default:
		text, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		b.Write(text)
	}
}

// canonicalByHand is the obvious way: decode, sort, write.
func canonicalByHand(b []byte, v any) []byte {
	switch v := v.(type) {
	case map[string]any:
		names := make([]string, 0, len(v))
		for name := range v {
			names = append(names, name)
		}
		slices.Sort(names) // bytes of UTF-8 sort as code points do
		b = append(b, '{')
		for i, name := range names {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(AppendString(b, name), ':')
			b = canonicalByHand(b, v[name])
		}
		return append(b, '}')
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ',')
			}
			b = canonicalByHand(b, e)
		}
		return append(b, ']')
	case string:
		return AppendString(b, v)
	case json.Number:
		return append(b, v.String()...)
	case bool:
		return fmt.Appendf(b, "%t", v)
	}
	return append(b, "null"...)
}

func TestCanonicalJSONOfAnySpelling(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		v := jsonValue(rng, 4)
		want := canonicalByHand(nil, v)
		var b bytes.Buffer
		scramble(rng, &b, v)
		got, err := CanonicalJSON(b.Bytes())
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s\n got %s, %v\nwant %s", b.Bytes(), got, err, want)
		}
	}
}

func FuzzCanonicalJSON(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"b":[1,{"d":null,"c":"\u00e9"}],"a":-0}`, `{"a":1,"a":2}`, `"\ud83d\ude00"`, `[1e10,0.1]`, `{"\n":1,"!":2,"\u0000":3}`,
		`{"b":{"b":1,"a":2},"a":{"b":1,"a":2}}`, `"\ud800"`, ` [ true , false , null ] `, `{"":{"":{"":[]}}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		lenient, err := AppendCanonical(nil, raw, RawNumbers)
		if !bytes.Equal(raw, before) {
			t.Fatal("the input was changed")
		}
		strict, strictErr := CanonicalJSON(raw)
		if err != nil {
			if strictErr == nil {
				t.Fatalf("%q passes as strict only: %v", raw, err)
			}
			// What is refused is no JSON, no UTF-8, half a pair, or too complex.
			if errors.Is(err, ErrJSONSyntax) && json.Valid(raw) && utf8.Valid(raw) && !bytes.Contains(bytes.ToLower(raw), []byte(`\ud`)) {
				t.Fatalf("%q refused: %v", raw, err)
			}
			return
		}
		if again, err := AppendCanonical(nil, lenient, RawNumbers); err != nil || !bytes.Equal(again, lenient) {
			t.Fatalf("%q: %q became %q, %v", raw, lenient, again, err)
		}
		want, wantErr := decode(raw)
		got, gotErr := decode(lenient)
		if wantErr != nil || gotErr != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%q became %q: %v, %v", raw, lenient, wantErr, gotErr)
		}
		if hand := canonicalByHand(nil, want); !bytes.Equal(hand, lenient) {
			t.Fatalf("%q became %q; want %q", raw, lenient, hand)
		}
		if strictErr != nil {
			if !errors.Is(strictErr, ErrJSONNumber) {
				t.Fatalf("%q: strict error %v", raw, strictErr)
			}
			return
		}
		if again, err := CanonicalJSON(strict); err != nil || !bytes.Equal(again, strict) {
			t.Fatalf("%q: strict %q became %q, %v", raw, strict, again, err)
		}
	})
}

// decode is encoding/json's view of a value, with numbers as text.
func decode(raw []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	err = d.Decode(&v)
	return v, err
}

func FuzzAppendString(f *testing.F) {
	f.Add("")
	f.Add("a\"\\\b\f\n\r\t\x00\x1f\x7f\u2028\U0001f600\xff")
	f.Fuzz(func(t *testing.T, s string) {
		b := AppendString([]byte("x"), s)
		var back string
		if err := json.Unmarshal(b[1:], &back); err != nil || back != strings.ToValidUTF8(back, "") {
			t.Fatalf("%q became %q: %v", s, b, err)
		}
		if want := string([]rune(s)); back != want {
			t.Fatalf("%q came back as %q; want %q", s, back, want)
		}
		if c, err := CanonicalJSON(b[1:]); err != nil || !bytes.Equal(c, b[1:]) {
			t.Fatalf("%q is not canonical: %q, %v", b[1:], c, err)
		}
	})
}

func BenchmarkCanonicalJSON(b *testing.B) {
	rng := rand.New(rand.NewPCG(3, 4))
	var scrambled bytes.Buffer
	values := make([]any, 2000)
	for i := range values {
		values[i] = jsonValue(rng, 4)
	}
	scramble(rng, &scrambled, values)
	sorted := canonicalByHand(nil, values)
	for _, c := range []struct {
		name string
		raw  []byte
	}{{"canonical", sorted}, {"scrambled", scrambled.Bytes()}} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.raw)))
			b.ReportAllocs()
			dst := make([]byte, 0, 2*len(c.raw))
			for b.Loop() {
				if _, err := AppendCanonical(dst, c.raw, StrictNumbers); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// What Python 3.11 printed for json.dumps(json.loads(x)).
func TestPythonNumbers(t *testing.T) {
	for in, want := range map[string]string{
		"1": "1", "-0": "0", "9007199254740993": "9007199254740993", "-18446744073709551616": "-18446744073709551616",
		"1.7e12": "1700000000000.0", "1e3": "1000.0", "1.0": "1.0", "-0.0": "-0.0", "51.5": "51.5", "0.1": "0.1", "1E+2": "100.0",
		"1e15": "1000000000000000.0", "1e16": "1e+16", "123456789012345678.0": "1.2345678901234568e+17", "1e-4": "0.0001", "1e-5": "1e-05",
		"0.00001234": "1.234e-05", "1e22": "1e+22", "1.5e300": "1.5e+300", "2.5e-10": "2.5e-10", "5e-324": "5e-324",
	} {
		got, err := AppendCanonical(nil, []byte(`{"a":`+in+`}`), PythonNumbers)
		if err != nil || string(got) != `{"a":`+want+`}` {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
	}
	if _, err := AppendCanonical(nil, []byte(`[1e999]`), PythonNumbers); !errors.Is(err, ErrJSONNumber) {
		t.Errorf("an infinite number: %v", err)
	}
}

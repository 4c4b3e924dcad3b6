package matrix

import (
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
)

// What two readers could take for two different things is refused. The headers of
// the second list are as odd, but mean one thing.
func TestParseXMatrixAmbiguous(t *testing.T) {
	const valid = `X-Matrix origin=a.example,key="ed25519:1",sig="SIG"`
	for _, more := range []string{
		`,v="x,origin=c.example,y=z"`,
		`,v="x, Destination=c.example"`,
		`,v="x,SIG =y"`,
		`,v="x,y,key=z"`,
		`,v="` + "x,\u00a0key=y" + `"`,
		`,v="x\",sig=y"`,
		`,v=",,,sig=\"y\""`,
		`,destination="b.example,key=y"`,
		`,destination="b.example,y"`,
	} {
		for _, header := range []string{valid + more, `X-Matrix ` + more[1:] + valid[len(`X-Matrix`):]} {
			if x, err := ParseXMatrix(strings.Replace(header, `" origin`, `",origin`, 1)); !errors.Is(err, ErrXMatrix) || x != (XMatrix{}) {
				t.Errorf("%s: got %+v, %v", header, x, err)
			}
		}
	}
	for _, header := range []string{
		`X-Matrix origin=a.example,key="ed25519:1,2",sig="SIG"`,
		`X-Matrix origin=a.example,key="ed25519:1",sig="SI,G"`,
		`X-Matrix origin=a.example,key="ed25519:1,sig=X",sig="SIG"`,
	} {
		if x, err := ParseXMatrix(header); !errors.Is(err, ErrXMatrix) {
			t.Errorf("%s: got %+v, %v", header, x, err)
		}
	}
	want, err := ParseXMatrix(valid)
	if err != nil {
		t.Fatal(err)
	}
	for _, more := range []string{`,v="x,y"`, `,v="x,y=origin=z"`, `,v="origin=c.example"`, `,v="x,origins=y, sig"`, `,v="x;key=y"`, `,xsig=y`} {
		if x, err := ParseXMatrix(valid + more); err != nil || x != want {
			t.Errorf("%s: got %+v, %v", valid+more, x, err)
		}
	}
}

// Whoever sends a header decides how long it is and what is in it: reading it takes
// time in proportion.
func TestParseXMatrixLinear(t *testing.T) {
	for _, unit := range []string{`,`, `x=y,`, `x="`, `x="",`, `\`, `x="\,`, `x= `, `v=",,`, `,"`, "\t"} {
		took := func(n int) time.Duration {
			header := `X-Matrix v="` + strings.Repeat(unit, n/len(unit)) + `",origin=a.example,` + strings.Repeat(unit, n/len(unit))
			best := time.Hour
			for range 5 {
				start := time.Now()
				_, _ = ParseXMatrix(header)
				best = min(best, time.Since(start))
			}
			return best
		}
		if short, long := took(1<<14), took(1<<18); long > 16*16*max(short, 10*time.Microsecond)/2 {
			t.Errorf("%q: 16 KiB take %v, 256 KiB %v", unit, short, long)
		}
	}
}

// splitFirst reads a header as Synapse and many others do: split at the commas, only
// then mind the quotes (federation/transport/server/_base.py). ok is false where it
// makes nothing of it.
func splitFirst(header string) (x XMatrix, ok bool) {
	rest, ok := strings.CutPrefix(header, "X-Matrix ")
	if !ok {
		return x, false
	}
	params := make(map[string]string)
	for _, param := range strings.Split(strings.TrimLeft(rest, " "), ",") {
		name, value, ok := strings.Cut(strings.Trim(param, " \t"), "=")
		if !ok {
			return x, false
		}
		if strings.HasPrefix(value, `"`) {
			var b strings.Builder
			escaped := false
			for _, r := range value[1:max(len(value)-1, 1)] {
				if escaped = r == '\\' && !escaped; !escaped {
					b.WriteRune(r)
				}
			}
			value = b.String()
		}
		params[strings.ToLower(name)] = value
	}
	x = XMatrix{Origin: params["origin"], Destination: params["destination"], Key: params["key"], Sig: params["sig"]}
	return x, x.Origin != "" && x.Key != "" && x.Sig != ""
}

// What both readers take they take for the same.
func FuzzXMatrixSplitFirst(f *testing.F) {
	for _, r := range recordings(f)[:3] {
		f.Add(r.Authorization)
	}
	for _, more := range []string{``, `,v="x,origin=c.example,y=z"`, `,destination="b,key=y"`, ` , Destination=b:1`, `,v="a\",sig=b"`, `,v="x, y=z"`} {
		f.Add(`X-Matrix origin=a.example,key="ed25519:\1",sig="S\"IG"` + more)
	}
	f.Fuzz(func(t *testing.T, header string) {
		// The value of a header has no such ends once net/http has read it.
		header = strings.Trim(header, " \t")
		if strings.ContainsFunc(header, func(r rune) bool { return r == unicode.ReplacementChar }) {
			return // what is not UTF-8 is no header to Python
		}
		x, err := ParseXMatrix(header)
		other, ok := splitFirst(header)
		if err == nil && ok && x != other {
			t.Fatalf("%q\n is %+v here,\n and %+v to who splits first", header, x, other)
		}
	})
}

// A signature is of one target, whatever bytes it has, and of one name of each kind.
func TestSignedRequestUTF8(t *testing.T) {
	key := specKey(t)
	const odd = "/_matrix/\ufffd"
	x, err := SignRequest(key, "a.example", "b.example", "GET", odd, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := VerifyRequest(key.Public(), x, "GET", odd, nil); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"/_matrix/\xff", "/_matrix/\xc3", "/_matrix/\xed\xa0\x80"} {
		if err := VerifyRequest(key.Public(), x, "GET", target, nil); !errors.Is(err, ErrJSONSyntax) {
			t.Errorf("%q: %v", target, err)
		}
		if _, err := SignRequest(key, "a.example", "b.example", "GET", target, nil); !errors.Is(err, ErrJSONSyntax) {
			t.Errorf("signing %q: %v", target, err)
		}
	}
	for _, s := range [][3]string{{"\xff", "b", "GET"}, {"a", "\xff", "GET"}, {"a", "b", "\xff"}} {
		if _, err := SignRequest(key, s[0], s[1], s[2], "/", nil); !errors.Is(err, ErrJSONSyntax) {
			t.Errorf("signing %q: %v", s, err)
		}
	}
}

// Signatures are read in both alphabets of base64, with and without padding.
func TestSignatureSpelling(t *testing.T) {
	key := specKey(t)
	for i := range 100 {
		target := "/_matrix/" + strconv.Itoa(i)
		x, err := SignRequest(key, "a.example", "b.example", "GET", target, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(x.Sig, "+") || !strings.Contains(x.Sig, "/") {
			continue
		}
		for _, c := range []struct {
			sig   string
			valid bool
		}{
			{x.Sig, true},
			{strings.ReplaceAll(x.Sig, "+", "-"), true},
			{strings.ReplaceAll(strings.ReplaceAll(x.Sig, "+", "-"), "/", "_"), true},
			{x.Sig + "==", true},
			{strings.ReplaceAll(x.Sig, "+", "_"), false},
			{strings.ReplaceAll(x.Sig, "+", "."), false},
			{strings.ReplaceAll(x.Sig, "/", ""), false},
			{"=" + x.Sig[1:], false},
		} {
			spelt := x
			spelt.Sig = c.sig
			if err := VerifyRequest(key.Public(), spelt, "GET", target, nil); (err == nil) != c.valid || err != nil && !errors.Is(err, ErrSignature) {
				t.Errorf("%s: %v, valid %t", c.sig, err, c.valid)
			}
		}
		return
	}
	t.Fatal("no signature has both characters that the alphabets differ in")
}

package matrix

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"io"
	"strings"
	"testing"
)

func streamKey(t testing.TB) SigningKey {
	t.Helper()
	k, err := NewSigningKey(bytes.Repeat([]byte{3}, ed25519.SeedSize), "1")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A canonical body is verified as VerifyRequest does it, and nothing else is.
func TestVerifyRequestStream(t *testing.T) {
	k := streamKey(t)
	const target = "/_matrix/federation/v1/send/1"
	for _, body := range []string{
		`{}`, `[]`, `{"a":1,"b":[true,false,null,-7,0,"x\"\\\n\u0000é😀"],"c":{"":{},"a":[]}}`,
		`{"edus":[` + strings.TrimSuffix(strings.Repeat(`{"content":{"x":"`+strings.Repeat("y", 10_000)+`"},"edu_type":"m.direct_to_device"},`, 100), ",") + `],"origin":"a.test"}`,
	} {
		x, err := SignRequest(k, "a.test", "b.test", "PUT", target, []byte(body))
		if err != nil {
			t.Fatal(err)
		}
		if err := VerifyRequestStream(k.Public(), x, "PUT", target, strings.NewReader(body)); err != nil {
			t.Errorf("%.60s: %v", body, err)
		}
		if err := VerifyRequestStream(k.Public(), x, "PUT", target+"2", strings.NewReader(body)); !errors.Is(err, ErrSignature) {
			t.Errorf("%.60s with another target: %v", body, err)
		}
		other := x
		other.Sig = strings.Repeat("A", 86)
		if err := VerifyRequestStream(k.Public(), other, "PUT", target, strings.NewReader(body)); !errors.Is(err, ErrSignature) {
			t.Errorf("%.60s with another signature: %v", body, err)
		}
	}
	x, _ := SignRequest(k, "a.test", "b.test", "PUT", target, []byte(`{}`))
	fails := errors.New("the disk fails")
	if err := VerifyRequestStream(k.Public(), x, "PUT", target, io.MultiReader(strings.NewReader("{"), iotestErr{fails})); !errors.Is(err, fails) {
		t.Errorf("a body that cannot be read: %v", err)
	}
}

func newStream(s string) *bufio.Reader { return bufio.NewReader(strings.NewReader(s)) }

type iotestErr struct{ err error }

func (e iotestErr) Read([]byte) (int, error) { return 0, e.err }

func TestStreamTakesCanonicalJSONOnly(t *testing.T) {
	deep := strings.Repeat("[", MaxJSONDepth+1) + strings.Repeat("]", MaxJSONDepth+1)
	for _, body := range []string{
		``, ` {}`, `{} `, `{"b":1,"a":2}`, `{"a":1,"a":2}`, `{"a" :1}`, `{"a":1,}`, `{,"a":1}`, `{"a"}`, `{a:1}`, `[1,]`, `[,1]`, `[1 ,2]`, `[1`,
		`{"a":1.0}`, `{"a":1e3}`, `{"a":01}`, `{"a":-0}`, `{"a":-}`, `{"a":+1}`, `{"a":NaN}`, `tru`, `nul`, `"a`, "\"a\x01\"", "\"\xff\"",
		`"\u0041"`, `"\u00e9"`, `"\/"`, `"\u000a"`, `"\u001F"`, `"\ud83d\ude00"`, `"\x"`, `{}{}`, deep, `{"` + strings.Repeat("k", maxStreamKey+1) + `":1}`,
	} {
		err := (&canonicalStream{r: newStream(body)}).check()
		if !errors.Is(err, ErrNotCanonical) {
			t.Errorf("%.60q: %v", body, err)
		}
	}
}

// FuzzVerifyStream: what the stream takes is canonical, and its signature is good for
// both.
func FuzzVerifyStream(f *testing.F) {
	for _, s := range []string{`{"a":[1,-2,"x\u0001\n"],"b":null}`, `[[],{}]`, `"é"`, `-12`} {
		f.Add([]byte(s))
	}
	k := streamKey(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		err := (&canonicalStream{r: newStream(string(body))}).check()
		canonical, other := AppendCanonical(nil, body, RawNumbers)
		if err != nil {
			return
		}
		if other != nil || !bytes.Equal(canonical, body) {
			t.Fatalf("%q is taken, canonical it is %q (%v)", body, canonical, other)
		}
		x, err := SignRequest(k, "a.test", "b.test", "PUT", "/x", body)
		if err != nil {
			t.Fatal(err)
		}
		if err := VerifyRequestStream(k.Public(), x, "PUT", "/x", bytes.NewReader(body)); err != nil {
			t.Fatalf("%q: %v", body, err)
		}
	})
}

// The parts of ed25519 that are done here agree with package crypto/ed25519, also for
// what is malformed.
func TestVerifyHashIsEd25519(t *testing.T) {
	k := streamKey(t)
	const target = "/x"
	x, err := SignRequest(k, "a.test", "b.test", "PUT", target, []byte(`{"a":1}`))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := decodeBase64(x.Sig)
	if err != nil {
		t.Fatal(err)
	}
	for i := range sig {
		for _, flip := range []byte{1, 0x80} {
			bad := bytes.Clone(sig)
			bad[i] ^= flip
			y := x
			y.Sig = base64.RawStdEncoding.EncodeToString(bad)
			a := VerifyRequest(k.Public(), y, "PUT", target, []byte(`{"a":1}`))
			b := VerifyRequestStream(k.Public(), y, "PUT", target, strings.NewReader(`{"a":1}`))
			if (a == nil) != (b == nil) || a == nil {
				t.Errorf("byte %d ^ %#x: %v and %v", i, flip, a, b)
			}
		}
	}
	for i := range 256 { // odd keys
		pub := ed25519.PublicKey(bytes.Repeat([]byte{byte(i)}, 32))
		a := VerifyRequest(pub, x, "PUT", target, []byte(`{"a":1}`))
		b := VerifyRequestStream(pub, x, "PUT", target, strings.NewReader(`{"a":1}`))
		if (a == nil) != (b == nil) {
			t.Errorf("key %d: %v and %v", i, a, b)
		}
	}
}

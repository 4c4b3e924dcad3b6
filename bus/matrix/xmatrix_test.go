package matrix

import (
	"crypto/ed25519"
	"errors"
	"strings"
	"testing"
)

func TestParseXMatrix(t *testing.T) {
	full := XMatrix{Origin: "a.example", Destination: "b.example:8448", Key: "ed25519:k1", Sig: "AB+/12"}
	old := full
	old.Destination = ""
	for _, c := range []struct {
		in   string
		want XMatrix
	}{
		{`X-Matrix origin="a.example",destination="b.example:8448",key="ed25519:k1",sig="AB+/12"`, full},
		{`x-matrix   sig="AB+/12" , KEY=ed25519:k1	,Origin=a.example,,destination = "b.example:8448" ,`, full},
		{`X-Matrix ,origin=a.example,key=ed25519:k1,sig=AB+/12,destination=b.example:8448`, full},
		{`X-Matrix origin=a.example,key="ed25519:k1",sig="AB+/12"`, old},
		{`X-Matrix origin=a.example,destination="",key="ed25519:k1",sig="AB+/12"`, old},
		{`X-Matrix origin="a.example",signature="no",x=y,v="a,b=\"c",destination="b.example:8448",key="ed25519:k1",sig="AB+/12"`, full},
		{`X-Matrix origin="\a.e\xample",key="\e\d\2\5519:k1",sig="AB+/1\2"`, old},
		{`X-Matrix origin="A.Example",key="ed25519:\"\\",sig="\\"`, XMatrix{Origin: "A.Example", Key: `ed25519:"\`, Sig: `\`}},
		{`X-Matrix origin=[::1]:8448,key=ed25519:1,sig=abc==`, XMatrix{Origin: "[::1]:8448", Key: "ed25519:1", Sig: "abc=="}},
	} {
		got, err := ParseXMatrix(c.in)
		if err != nil || got != c.want {
			t.Errorf("%s\n got %+v, %v\nwant %+v", c.in, got, err, c.want)
			continue
		}
		if again, err := ParseXMatrix(got.String()); err != nil || again != got {
			t.Errorf("%s\n came back as %+v, %v", got, again, err)
		}
	}
}

func TestParseXMatrixRejects(t *testing.T) {
	for _, in := range []string{"", "X", "Bearer abc", "X-Matrixx origin=a", "X-Matrix\torigin=a,key=k,sig=s", " X-Matrix origin=a,key=k,sig=s"} {
		if x, err := ParseXMatrix(in); !errors.Is(err, ErrNotXMatrix) || x != (XMatrix{}) {
			t.Errorf("%q: got %+v, %v; want ErrNotXMatrix", in, x, err)
		}
	}
	for _, in := range []string{
		"", " ", " ,", " origin", " origin=", " =a", " origin=a", " origin=a,key=k", " origin=a,sig=s", " key=k,sig=s",
		" origin=a,key=,sig=s", ` origin=a,key="",sig=s`, " origin=a key=k sig=s", ` origin="a"key=k,sig=s`, ` origin=a;key=k;sig=s`,
		` origin="a,key=k,sig=s`, ` origin=a,key=k,sig="s`, ` origin=a,key=k,sig="s\`, ` origin=a,key=k,sig="s\"`, ` origin=a,key=k,sig=s"`,
		` origin=a,key=k,sig=a\b`, " origin=a,key=k,sig=\x01", " origin=a,key=k,sig=\"\x01\"", " origin=a,key=k,sig=\"\\\x7f\"", " origin=a,key=k,sig=\xc3\xa9",
		" origin=a b,key=k,sig=s", ` origin="",key=k,sig=s`, " origin=a_b,key=k,sig=s", ` origin=a,destination="b/c",key=k,sig=s`,
		" origin=a,origin=a,key=k,sig=s", ` origin=a,key=k,sig=s,SIG="s"`, ` origin=a,destination="",destination=b,key=k,sig=s`,
	} {
		if x, err := ParseXMatrix("X-Matrix" + in); !errors.Is(err, ErrXMatrix) || x != (XMatrix{}) {
			t.Errorf("%q: got %+v, %v; want ErrXMatrix", in, x, err)
		}
	}
	if _, err := ParseXMatrix(`X-Matrix origin=a,key=k,sig=topsecret,`); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseXMatrix(`X-Matrix origin=a,key=k,sig=topsecret "`); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("the error quotes the header: %v", err)
	}
}

// What Synapse sent can be read, and is written as Synapse wrote it.
func TestXMatrixOfSynapse(t *testing.T) {
	for _, r := range recordings(t) {
		x, err := ParseXMatrix(r.Authorization)
		if err != nil {
			t.Fatalf("%s: %v", r.Authorization, err)
		}
		if x.String() != r.Authorization {
			t.Errorf("got  %s\nwant %s", x, r.Authorization)
		}
	}
}

func TestSignRequest(t *testing.T) {
	key := specKey(t)
	// The signature covers this object and nothing else.
	msg, err := appendSignedRequest(nil, "a.example", "b.example", "PUT", `/_matrix/x/%2F?q="`, []byte(`{"b": 1.50, "a": "\u00e9"}`))
	const want = `{"content":{"a":"é","b":1.50},"destination":"b.example","method":"PUT","origin":"a.example","uri":"/_matrix/x/%2F?q=\""}`
	if err != nil || string(msg) != want {
		t.Fatalf("got  %s, %v\nwant %s", msg, err, want)
	}
	if c, err := AppendCanonical(nil, msg, RawNumbers); err != nil || string(c) != want {
		t.Fatalf("not canonical: %s, %v", c, err)
	}

	for _, c := range []struct{ method, uri, content string }{
		{"GET", "/_matrix/federation/v1/version", ""},
		{"PUT", "/_matrix/federation/v1/send/1", `{"pdus":[{"depth":1.0}],"edus":[]}`},
		{"POST", "/_matrix/federation/v1/user/keys/query?a=%20+", "{}"},
	} {
		x, err := SignRequest(key, "a.example", "b.example", c.method, c.uri, []byte(c.content))
		if err != nil {
			t.Fatal(err)
		}
		if x.Key != "ed25519:1" || x.Origin != "a.example" || x.Destination != "b.example" {
			t.Errorf("signed as %+v", x)
		}
		verify := func(x XMatrix, method, uri, content string) error {
			return VerifyRequest(key.Public(), x, method, uri, []byte(content))
		}
		if err := verify(x, c.method, c.uri, c.content); err != nil {
			t.Errorf("%s %s: %v", c.method, c.uri, err)
		}
		if c.content != "" {
			if err := verify(x, c.method, c.uri, " \n"+c.content+"\t"); err != nil {
				t.Errorf("%s %s with other white space: %v", c.method, c.uri, err)
			}
		}
		otherOrigin, otherDestination, otherSig, padded := x, x, x, x
		otherOrigin.Origin = "A.example"
		otherDestination.Destination = "c.example"
		otherSig.Sig = strings.Repeat("A", len(x.Sig))
		padded.Sig += "=="
		if err := verify(padded, c.method, c.uri, c.content); err != nil {
			t.Errorf("padded signature: %v", err)
		}
		for what, err := range map[string]error{
			"method":      verify(x, c.method+"X", c.uri, c.content),
			"uri":         verify(x, c.method, c.uri+"/", c.content),
			"content":     verify(x, c.method, c.uri, `{"other":1}`),
			"origin":      verify(otherOrigin, c.method, c.uri, c.content),
			"destination": verify(otherDestination, c.method, c.uri, c.content),
			"signature":   verify(otherSig, c.method, c.uri, c.content),
			"key":         VerifyRequest(make(ed25519.PublicKey, ed25519.PublicKeySize), x, c.method, c.uri, []byte(c.content)),
			"no key":      VerifyRequest(nil, x, c.method, c.uri, []byte(c.content)),
		} {
			if !errors.Is(err, ErrSignature) {
				t.Errorf("%s %s with another %s: %v; want ErrSignature", c.method, c.uri, what, err)
			}
		}
	}

	if _, err := SignRequest(key, "a", "b", "PUT", "/", []byte(`{"a":`)); !errors.Is(err, ErrJSONSyntax) {
		t.Errorf("signing half an object: %v", err)
	}
	x, err := SignRequest(key, "a", "b", "PUT", "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := VerifyRequest(key.Public(), x, "PUT", "/", []byte(`{"a":`)); !errors.Is(err, ErrJSONSyntax) {
		t.Errorf("verifying half an object: %v", err)
	}
	for _, bad := range []XMatrix{
		{Origin: "a", Destination: "b", Key: "rsa:1", Sig: x.Sig},
		{Origin: "a", Destination: "b", Key: "ed25519:1", Sig: "!"},
		{Origin: "a", Destination: "b", Key: "ed25519:1", Sig: x.Sig[:40]},
		{Origin: "a", Destination: "b", Key: "ed25519:1"},
	} {
		if err := VerifyRequest(key.Public(), bad, "PUT", "/", nil); !errors.Is(err, ErrSignature) {
			t.Errorf("%+v: %v; want ErrSignature", bad, err)
		}
	}
}

func FuzzParseXMatrix(f *testing.F) {
	for _, r := range recordings(f)[:3] {
		f.Add(r.Authorization)
	}
	f.Add(`X-Matrix origin=a.example:8448 , KEY="ed\25519:1",, sig="\"\\",v="a,b"`)
	f.Add(`X-Matrix origin="a`)
	f.Fuzz(func(t *testing.T, header string) {
		x, err := ParseXMatrix(header)
		if err != nil {
			if x != (XMatrix{}) || !errors.Is(err, ErrXMatrix) && !errors.Is(err, ErrNotXMatrix) {
				t.Fatalf("%q: %+v with error %v", header, x, err)
			}
			return
		}
		if _, err := ParseServerName(x.Origin); err != nil || x.Key == "" || x.Sig == "" {
			t.Fatalf("%q: %+v", header, x)
		}
		if again, err := ParseXMatrix(x.String()); err != nil || again != x {
			t.Fatalf("%q: %+v, written %s, came back as %+v, %v", header, x, x, again, err)
		}
	})
}

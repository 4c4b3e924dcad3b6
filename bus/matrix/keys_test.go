package matrix

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// The JSON objects of the appendices' "Cryptographic Test Vectors". The first
// event is given with its hash and as its redaction, which is what is signed.
func TestSignSpecification(t *testing.T) {
	key := specKey(t)
	for _, c := range []struct{ in, want string }{
		{`{}`, `{"signatures":{"domain":{"ed25519:1":"K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ"}}}`},
		{
			`{"two": "Two", "one": 1}`,
			`{"one":1,"signatures":{"domain":{"ed25519:1":"KqmLSbO39/Bzb0QIYE82zqLwsA+PDzYIpIRA2sRQ4sL53+sN6/fpNSoqE7BP7vBZhG6kYdD13EIMJpvhJI+6Bw"}},"two":"Two"}`,
		},
		{
			`{"room_id": "!x:domain", "sender": "@a:domain", "origin": "domain", "origin_server_ts": 1000000, "signatures": {},
			  "hashes": {"sha256": "5jM4wQpv6lnBo7CLIghJuHdW+s2CMBJPUOGOC89ncos"}, "type": "X", "content": {}, "prev_events": [],
			  "auth_events": [], "depth": 3, "unsigned": {"age_ts": 1000000}}`,
			`{"auth_events":[],"content":{},"depth":3,"hashes":{"sha256":"5jM4wQpv6lnBo7CLIghJuHdW+s2CMBJPUOGOC89ncos"},"origin":"domain","origin_server_ts":1000000,"prev_events":[],"room_id":"!x:domain","sender":"@a:domain","signatures":{"domain":{"ed25519:1":"KxwGjPSDEtvnFgU00fwFz+l6d2pJM6XBIaMEn81SXPTRl16AqLAYqfIReFGZlHi5KLjAWbOoMszkwsQma+lYAg"}},"type":"X","unsigned":{"age_ts":1000000}}`,
		},
	} {
		got, err := key.Sign([]byte(c.in), "domain")
		if err != nil || string(got) != c.want {
			t.Errorf("%s\n got %s, %v\nwant %s", c.in, got, err, c.want)
		}
		if err := VerifyJSON(got, "domain", "ed25519:1", key.Public()); err != nil {
			t.Errorf("%s: %v", got, err)
		}
	}
}

func TestSignKeepsWhatItDoesNotCover(t *testing.T) {
	key := specKey(t)
	other, err := NewSigningKey(bytes.Repeat([]byte{7}, ed25519.SeedSize), "other")
	if err != nil {
		t.Fatal(err)
	}
	object := []byte(`{"z":[1.50],"unsigned":{"b":-0.0,"a":[]},"a\"}":"\u007d,"}`)
	for _, k := range []SigningKey{key, other, key} {
		for _, server := range []string{"one.example", `"two"`} {
			if object, err = k.Sign(object, server); err != nil {
				t.Fatal(err)
			}
		}
	}
	var got struct {
		Z          json.RawMessage
		Unsigned   json.RawMessage
		Signatures map[string]map[string]string
	}
	if err := json.Unmarshal(object, &got); err != nil {
		t.Fatal(err)
	}
	if string(got.Z) != "[1.50]" || string(got.Unsigned) != `{"a":[],"b":-0.0}` || len(got.Signatures) != 2 {
		t.Errorf("got %s", object)
	}
	for _, server := range []string{"one.example", `"two"`} {
		for _, k := range []SigningKey{key, other} {
			if err := VerifyJSON(object, server, k.ID(), k.Public()); err != nil {
				t.Errorf("%s, %s: %v", server, k, err)
			}
		}
	}
	changed := bytes.Replace(object, []byte(`"a":[]`), []byte(`"a":[1]`), 1)
	if err := VerifyJSON(changed, "one.example", key.ID(), key.Public()); err != nil {
		t.Errorf("unsigned is covered: %v", err)
	}

	for what, err := range map[string]error{
		"changed content": VerifyJSON(bytes.Replace(object, []byte("1.50"), []byte("1.51"), 1), "one.example", key.ID(), key.Public()),
		"other key":       VerifyJSON(object, "one.example", key.ID(), other.Public()),
		"unknown server":  VerifyJSON(object, "three.example", key.ID(), key.Public()),
		"unknown key id":  VerifyJSON(object, "one.example", "ed25519:2", key.Public()),
		"algorithm":       VerifyJSON(object, "one.example", "rsa:1", key.Public()),
		"short key":       VerifyJSON(object, "one.example", key.ID(), key.Public()[1:]),
		"no signatures":   VerifyJSON([]byte(`{}`), "one.example", key.ID(), key.Public()),
		"null":            VerifyJSON([]byte(`{"signatures":null}`), "one.example", key.ID(), key.Public()),
		"list":            VerifyJSON([]byte(`{"signatures":[]}`), "one.example", key.ID(), key.Public()),
		"number":          VerifyJSON([]byte(`{"signatures":{"one.example":{"ed25519:1":1}}}`), "one.example", key.ID(), key.Public()),
		"no base64":       VerifyJSON([]byte(`{"signatures":{"one.example":{"ed25519:1":"!"}}}`), "one.example", key.ID(), key.Public()),
		"short":           VerifyJSON([]byte(`{"signatures":{"one.example":{"ed25519:1":"QUJD"}}}`), "one.example", key.ID(), key.Public()),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v; want ErrSignature", what, err)
		}
	}
	for _, in := range []string{"", "[]", "1", `"a"`, "null", `{"a":`, `{}{}`} {
		if _, err := key.Sign([]byte(in), "domain"); !errors.Is(err, ErrJSONSyntax) {
			t.Errorf("signing %q: %v; want ErrJSONSyntax", in, err)
		}
		if err := VerifyJSON([]byte(in), "domain", key.ID(), key.Public()); !errors.Is(err, ErrJSONSyntax) {
			t.Errorf("verifying %q: %v; want ErrJSONSyntax", in, err)
		}
	}
	if _, err := key.Sign([]byte(`{"signatures":{"domain":1}}`), "domain"); !errors.Is(err, ErrSignature) {
		t.Errorf("signing beside malformed signatures: %v", err)
	}
	if got, err := key.Sign([]byte(`{"signatures":null}`), "domain"); err != nil || VerifyJSON(got, "domain", key.ID(), key.Public()) != nil {
		t.Errorf("signing beside null signatures: %s, %v", got, err)
	}
}

func TestParseSigningKeys(t *testing.T) {
	public := base64.RawStdEncoding.EncodeToString(specKey(t).Public())
	file := "\n" + `ed25519 1 ` + specSeed + "\r\n  \n" + `ed25519 a_old 1700000000000 ` + public + "\ned25519\ta_new\t" + specSeed + "="
	keys, old, err := ParseSigningKeys([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) != 2 || keys[0].ID() != "ed25519:1" || keys[1].ID() != "ed25519:a_new" || !keys[0].Public().Equal(specKey(t).Public()) {
		t.Errorf("keys %v", keys)
	}
	if len(old) != 1 || old[0].ID != "ed25519:a_old" || old[0].Expired != 1700000000000 || !old[0].Public.Equal(keys[0].Public()) {
		t.Errorf("old keys %v", old)
	}
}

func TestParseSigningKeysRejects(t *testing.T) {
	good := "ed25519 1 " + specSeed + "\n"
	for _, c := range []struct{ file, says string }{
		{"", "no private key"},
		{"\n\n", "no private key"},
		{"ed25519 1 1700000000000 " + specSeed, "no private key"},
		{"ed25519 1", "line 1"},
		{good + "ed25519 2 3 4 " + specSeed, "line 2"},
		{good + "\nrsa 2 " + specSeed, "line 3"},
		{good + "ed25519 a:b " + specSeed, "line 2"},
		{good + "ed25519 \u00e9 " + specSeed, "line 2"},
		{good + "ed25519 2 " + specSeed[1:], "line 2"},
		{good + "ed25519 2 " + specSeed + specSeed, "line 2"},
		{good + "ed25519 2 !" + specSeed[1:], "line 2"},
		{good + "ed25519 2 soon " + specSeed, "line 2"},
		{good + "ed25519 2 -1 " + specSeed, "line 2"},
		{good + good, "line 2"},
	} {
		keys, old, err := ParseSigningKeys([]byte(c.file))
		if !errors.Is(err, ErrKey) || keys != nil || old != nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, %v, %v; want an ErrKey with %q", c.file, keys, old, err, c.says)
			continue
		}
		if strings.Contains(err.Error(), specSeed[1:20]) {
			t.Errorf("%q: the error shows the key: %v", c.file, err)
		}
	}
	if _, err := NewSigningKey([]byte("short"), "1"); !errors.Is(err, ErrKey) {
		t.Errorf("short seed: %v", err)
	}
	if _, err := NewSigningKey(make([]byte, ed25519.SeedSize), ""); !errors.Is(err, ErrKey) {
		t.Errorf("no version: %v", err)
	}
}

// No verb of package fmt, and no encoding, shows the secret of a key, wherever
// in a value it stands.
func TestSigningKeyHidesItsSecret(t *testing.T) {
	key := specKey(t)
	seed, _ := base64.RawStdEncoding.DecodeString(specSeed)
	type holder struct {
		key  SigningKey
		list []SigningKey
		any  any
	}
	for _, v := range []any{key, &key, []SigningKey{key}, map[string]SigningKey{"k": key}, holder{key, []SigningKey{key}, key}, &holder{any: &key}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%b", "%c", "%U", "%e", "%T", "%p"} {
			s := fmt.Sprintf(verb, v)
			for _, secret := range []string{
				specSeed, fmt.Sprintf("%x", seed[:4]), fmt.Sprintf("%X", seed[:4]), strings.Trim(fmt.Sprint(seed[:4]), "[]"),
				strings.Trim(fmt.Sprintf("%#v", seed[:4]), "[]byte{}"), fmt.Sprintf("%s", seed[:4]),
			} {
				if strings.Contains(s, secret) {
					t.Errorf("%s of %T shows %q: %s", verb, v, secret, s)
				}
			}
		}
		if b, err := json.Marshal(v); err == nil && bytes.Contains(b, []byte(specSeed[:10])) {
			t.Errorf("JSON of %T: %s", v, b)
		}
	}
	if got := fmt.Sprintf("%v %#v", key, key); got != `ed25519:1 matrix.SigningKey("ed25519:1")` {
		t.Errorf("printed as %s", got)
	}
	if !(SigningKey{}).IsZero() || key.IsZero() || (SigningKey{}).Public() != nil || (SigningKey{}).ID() != "" {
		t.Error("the zero value is not what it should be")
	}
}

func TestServerKeys(t *testing.T) {
	first := specKey(t)
	second, err := NewSigningKey(bytes.Repeat([]byte{2}, ed25519.SeedSize), "2")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ServerKeys("domain", 1700000000000, []SigningKey{first, second}, []OldKey{{ID: "ed25519:0", Public: first.Public(), Expired: 5}})
	if err != nil {
		t.Fatal(err)
	}
	public := func(k SigningKey) string { return base64.RawStdEncoding.EncodeToString(k.Public()) }
	if c, err := CanonicalJSON(got); err != nil || !bytes.Equal(c, got) {
		t.Errorf("not canonical: %s, %v", got, err)
	}
	o, err := cutSigned(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"old_verify_keys":{"ed25519:0":{"expired_ts":5,"key":"` + public(first) + `"}},"server_name":"domain","valid_until_ts":1700000000000,` +
		`"verify_keys":{"ed25519:1":{"key":"` + public(first) + `"},"ed25519:2":{"key":"` + public(second) + `"}}}`
	if string(o.signed) != want {
		t.Errorf("got  %s\nwant %s", o.signed, want)
	}
	for _, k := range []SigningKey{first, second} {
		if err := VerifyJSON(got, "domain", k.ID(), k.Public()); err != nil {
			t.Errorf("%s: %v", k, err)
		}
	}
	if got, err := ServerKeys("domain", 1, []SigningKey{first}, nil); err != nil || !bytes.Contains(got, []byte(`"old_verify_keys":{}`)) {
		t.Errorf("without old keys: %s, %v", got, err)
	}
	if _, err := ServerKeys("domain", 1, nil, nil); !errors.Is(err, ErrKey) {
		t.Errorf("without keys: %v", err)
	}
}

func FuzzSignJSON(f *testing.F) {
	for _, s := range []string{`{}`, `{"signatures":{"d":{"ed25519:1":"AA"}},"unsigned":{"a":1}}`, `{"unsigned":null,"a":"}\"{","b":[{}],"c":-1.5e3}`, `{"signatures":null}`, `[]`} {
		f.Add([]byte(s))
	}
	key := specKey(f)
	f.Fuzz(func(t *testing.T, object []byte) {
		signed, err := key.Sign(object, "d")
		if err != nil {
			return
		}
		if err := VerifyJSON(signed, "d", key.ID(), key.Public()); err != nil {
			t.Fatalf("%q: %q does not verify: %v", object, signed, err)
		}
		if again, err := key.Sign(signed, "d"); err != nil || !bytes.Equal(again, signed) {
			t.Fatalf("%q: signed again, %q became %q, %v", object, signed, again, err)
		}
		was, err1 := cutSigned(object)
		is, err2 := cutSigned(signed)
		if err1 != nil || err2 != nil || !bytes.Equal(was.signed, is.signed) || !bytes.Equal(was.unsigned, is.unsigned) {
			t.Fatalf("%q became %q: %v, %v", object, signed, err1, err2)
		}
	})
}

func FuzzParseSigningKeys(f *testing.F) {
	f.Add([]byte("ed25519 1 " + specSeed + "\n\ned25519 2 17 " + specSeed))
	f.Add([]byte("ed25519"))
	f.Fuzz(func(t *testing.T, file []byte) {
		keys, old, err := ParseSigningKeys(file)
		if err != nil {
			if !errors.Is(err, ErrKey) || keys != nil || old != nil {
				t.Fatalf("%v, %v, %v", keys, old, err)
			}
			return
		}
		if len(keys) == 0 || len(keys)+len(old) > bytes.Count(file, []byte("\n"))+1 {
			t.Fatalf("%d keys, %d old ones", len(keys), len(old))
		}
	})
}

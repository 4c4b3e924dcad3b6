// Package oracle compares package matrix with gomatrixserverlib, which signs and
// verifies for Dendrite, on generated inputs. It is a module of its own so that
// the bus does not depend on that library. Run it with go test, in this directory.
//
// With a Synapse at hand it compares with that too: SYNAPSE_PYTHON is the command of
// the Python that has it, for the lab's
//
//	SYNAPSE_PYTHON="chroot /tmp/lab/sid python3" go test ./...
package oracle

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"fsbus/bus/matrix"
)

const (
	rounds      = 2000
	origin      = "origin.example:8448"
	destination = "[2001:db8::1]"
)

func keys(t *testing.T) (matrix.SigningKey, ed25519.PrivateKey) {
	seed := bytes.Repeat([]byte{42}, ed25519.SeedSize)
	k, err := matrix.NewSigningKey(seed, "a_key")
	if err != nil {
		t.Fatal(err)
	}
	return k, ed25519.NewKeyFromSeed(seed)
}

const (
	// plain are characters that sort or encode specially.
	plain = "abZ_/\x7f <>&'\u0080é日\u2028\ue000\uffee\U0001f600\U0010ffff"
	// escaped need a backslash. They are not for names: gomatrixserverlib writes
	// names without their escapes.
	escaped = "\"\\\b\f\n\r\t\x00\x1f"
)

func text(rng *rand.Rand, characters string) string {
	from := []rune(characters)
	s := make([]rune, rng.IntN(6))
	for i := range s {
		s[i] = from[rng.IntN(len(from))]
	}
	return string(s)
}

func value(rng *rand.Rand, depth int) any {
	switch kind := rng.IntN(7); {
	case kind == 0:
		return nil
	case kind == 1:
		return rng.IntN(2) == 0
	case kind == 2:
		return rng.Int64N(1<<54-1) - (1<<53 - 1)
	case kind <= 4 || depth == 0:
		return text(rng, plain+escaped)
	case kind == 5:
		a := make([]any, rng.IntN(4))
		for i := range a {
			a[i] = value(rng, depth-1)
		}
		return a
	}
	return object(rng, depth)
}

func object(rng *rand.Rand, depth int) map[string]any {
	m := make(map[string]any)
	for range rng.IntN(7) {
		m[text(rng, plain)] = value(rng, depth-1)
	}
	return m
}

// spell writes a value with white space, escapes and an order that canonical JSON
// does not have: encoding/json escapes <, > and &, and the struct keeps its order.
func spell(t *testing.T, rng *rand.Rand, v any) []byte {
	v = struct {
		Z any `json:"z"`
		A any `json:"a"`
	}{v, text(rng, plain+escaped)}
	var b []byte
	var err error
	if rng.IntN(2) == 0 {
		b, err = json.MarshalIndent(v, " ", "\t")
	} else {
		b, err = json.Marshal(v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCanonicalJSON(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range rounds {
		raw := spell(t, rng, value(rng, 4))
		want, err := gomatrixserverlib.CanonicalJSON(raw)
		if err != nil {
			t.Fatal(err)
		}
		got, err := matrix.CanonicalJSON(raw)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s\n got %s, %v\nwant %s", raw, got, err, want)
		}
	}
}

func TestSignJSON(t *testing.T) {
	key, private := keys(t)
	id := gomatrixserverlib.KeyID(key.ID())
	rng := rand.New(rand.NewPCG(2, 2))
	for range rounds {
		raw := spell(t, rng, object(rng, 3))
		if rng.IntN(2) == 0 {
			raw = append([]byte(`{"unsigned":{"b":1,"a":2},"signatures":{"x.example":{"ed25519:1":"QUJD"}},`), raw[1:]...)
		}
		want, err := gomatrixserverlib.SignJSON(origin, id, private, raw)
		if err != nil {
			t.Fatal(err)
		}
		got, err := key.Sign(raw, origin)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s\n got %s, %v\nwant %s", raw, got, err, want)
		}
		if err := matrix.VerifyJSON(want, origin, key.ID(), key.Public()); err != nil {
			t.Fatalf("%s: %v", want, err)
		}
		if err := gomatrixserverlib.VerifyJSON(origin, id, key.Public(), got); err != nil {
			t.Fatalf("%s: %v", got, err)
		}
	}
}

// verifier checks signatures with one key.
type verifier struct{ key matrix.SigningKey }

func (v verifier) VerifyJSONs(_ context.Context, requests []gomatrixserverlib.VerifyJSONRequest) ([]gomatrixserverlib.VerifyJSONResult, error) {
	results := make([]gomatrixserverlib.VerifyJSONResult, len(requests))
	for i, r := range requests {
		results[i].Error = gomatrixserverlib.VerifyJSON(string(r.ServerName), gomatrixserverlib.KeyID(v.key.ID()), v.key.Public(), r.Message)
	}
	return results, nil
}

func TestRequests(t *testing.T) {
	key, private := keys(t)
	rng := rand.New(rand.NewPCG(3, 3))
	for range rounds {
		method, content := "GET", []byte(nil)
		if rng.IntN(3) > 0 {
			method, content = "PUT", spell(t, rng, object(rng, 3))
		}
		uri := fmt.Sprintf("/_matrix/federation/v1/x/%s?q=%s", url.PathEscape("!"+text(rng, plain+escaped)+"/:"), url.QueryEscape(text(rng, plain+escaped)))

		// Theirs, read and verified by us.
		theirs := fclient.NewFederationRequest(method, origin, destination, uri)
		if content != nil {
			if err := theirs.SetContent(json.RawMessage(content)); err != nil {
				t.Fatal(err)
			}
		}
		if err := theirs.Sign(origin, gomatrixserverlib.KeyID(key.ID()), private); err != nil {
			t.Fatal(err)
		}
		request, err := theirs.HTTPRequest()
		if err != nil {
			t.Fatal(err)
		}
		want, err := matrix.ParseXMatrix(request.Header.Get("Authorization"))
		if err != nil {
			t.Fatalf("%s: %v", request.Header.Get("Authorization"), err)
		}
		if err := matrix.VerifyRequest(key.Public(), want, method, uri, content); err != nil {
			t.Fatalf("%s %s %s: %v", method, uri, content, err)
		}

		// Ours, the same and verified by them.
		got, err := matrix.SignRequest(key, origin, destination, method, uri, content)
		if err != nil || got != want {
			t.Fatalf("%s %s %s\n got %s, %v\nwant %s", method, uri, content, got, err, want)
		}
		inbound := httptest.NewRequest(method, uri, bytes.NewReader(content))
		inbound.Header.Set("Authorization", got.String())
		inbound.Header.Set("Content-Type", "application/json")
		isLocal := func(name spec.ServerName) bool { return name == destination }
		if _, answer := fclient.VerifyHTTPRequest(inbound, time.Unix(0, 0), destination, isLocal, verifier{key}); answer.Code != 200 {
			t.Fatalf("%s %s %s: refused with %d", method, uri, content, answer.Code)
		}
	}
}

// Server names that both libraries take, or both refuse.
func TestServerNames(t *testing.T) {
	for _, name := range []string{
		"matrix.org", "matrix.org:8448", "a-b.example", "1.2.3.4", "1.2.3.4:1", "[::1]", "[::1]:8448", "[1234:5678::abcd]:5678",
		"", ":", "a:", "a:b", "a b", "a_b", "[::1", "::1]", "[]", "[x]", "a/b", "a@b", "\xff",
	} {
		_, _, want := spec.ParseAndValidateServerName(spec.ServerName(name))
		if _, err := matrix.ParseServerName(name); (err == nil) != want {
			t.Errorf("%q: got %v, want valid %t", name, err, want)
		}
	}
}

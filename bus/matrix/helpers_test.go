package matrix

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"os"
	"testing"
)

// recorded is a request as a Synapse 1.160 sent it, to a proxy (an absolute-form
// target) or to another server. The bodies of the latter were not kept.
type recorded struct {
	Method, Target, Authorization, Body string
}

// recordings reads testdata/synapse.jsonl.
func recordings(tb testing.TB) []recorded {
	tb.Helper()
	return readLines[recorded](tb, "testdata/synapse.jsonl", 30)
}

// readLines decodes a file of JSON lines and checks that it has at least so many.
func readLines[T any](tb testing.TB, file string, atLeast int) []T {
	tb.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	var all []T
	for line := range bytes.Lines(data) {
		var v T
		if err := json.Unmarshal(line, &v); err != nil {
			tb.Fatalf("%s: %v", file, err)
		}
		all = append(all, v)
	}
	if len(all) < atLeast {
		tb.Fatalf("%s has %d lines, expected at least %d", file, len(all), atLeast)
	}
	return all
}

// specSeed is the seed of the appendices' "Cryptographic Test Vectors".
const specSeed = "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1"

// specKey is the key "ed25519:1" that the vectors are signed with.
func specKey(tb testing.TB) SigningKey {
	tb.Helper()
	seed, err := base64.RawStdEncoding.DecodeString(specSeed)
	if err != nil {
		tb.Fatal(err)
	}
	k, err := NewSigningKey(seed, "1")
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

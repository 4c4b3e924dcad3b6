package node

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Synapse's own file has one line, and after a rotation by hand several, the
// first of which it signs with; old_signing_keys may stand in the file as well.
func TestReadKeys(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "signing.key")
	seed := func(b byte) string { return base64.RawStdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ed25519 a_hywS " + seed(1) + "\n")
	one, err := readKeys(path)
	if err != nil || one.String() != "ed25519:a_hywS" || len(one.public) != 1 {
		t.Fatalf("%v, %v", one, err)
	}
	write("ed25519 b " + seed(2) + "\ned25519 a_hywS " + seed(1) + "\n")
	two, err := readKeys(path)
	if err != nil || two.String() != "ed25519:b" || len(two.public) != 2 || !bytes.Equal(two.public["ed25519:a_hywS"], one.signing.Public()) {
		t.Fatalf("%v, %v", two, err)
	}
	same, err := readKeys(path)
	if err != nil || !two.equal(same) || two.equal(one) || one.equal(nil) || !(*Keys)(nil).equal(nil) {
		t.Errorf("equality of keys is wrong, %v", err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, two); strings.Contains(s, seed(2)) {
			t.Errorf("%s shows the key: %s", verb, s)
		}
	}
	for _, bad := range []string{"", "\n", "ed25519 a\n", "rsa a " + seed(1) + "\n", strings.Repeat("x", int(maxKeyFile)+1)} {
		write(bad)
		if _, err := readKeys(path); err == nil {
			t.Errorf("%.20q is accepted", bad)
		} else if strings.Contains(err.Error(), seed(1)) {
			t.Errorf("the error shows a key: %v", err)
		}
	}
}

func TestParsePressure(t *testing.T) {
	for _, tt := range []struct {
		text string
		want int32
		ok   bool
	}{
		{"some avg10=73.68 avg60=40.97 avg300=24.09 total=163819668\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", 7368, true},
		{"some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", 0, true},
		{"some avg10=100.00 avg60=0.00 avg300=0.00 total=0\n", 10000, true},
		{"some avg10=5.5", 550, true},
		{"some avg10=7", 700, true},
		{"full avg10=1.00", 0, false},
		{"some avg60=1.00", 0, false},
		{"some avg10=-1.00", 0, false},
		{"some avg10=x", 0, false},
		{"", 0, false},
	} {
		if got, ok := parsePressure([]byte(tt.text)); got != tt.want && tt.ok || ok != tt.ok {
			t.Errorf("%q: %d, %t; want %d, %t", tt.text, got, ok, tt.want, tt.ok)
		}
	}
}

package main

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"

	"fsbus/scripts/fedsim/sim"
)

func TestServeWritesTheAuthorityAndEndsWhenTold(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := serve(ctx, sim.Config{Servers: 3}, ca, "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(text) {
		t.Errorf("%s holds no certificate: %q", ca, text)
	}
	if err := serve(ctx, sim.Config{}, "", "127.0.0.1:0"); err == nil {
		t.Error("a federation of no servers was served")
	}
}

func TestParseOrigin(t *testing.T) {
	key := base64.RawStdEncoding.EncodeToString(make([]byte, ed25519.PublicKeySize))
	o, err := parseOrigin("hs1.test:8448 ed25519:a_1 " + key)
	if err != nil || o.Name != "hs1.test:8448" || o.KeyID != "ed25519:a_1" || len(o.PublicKey) != ed25519.PublicKeySize {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := parseOrigin("hs1.test ed25519:a_1 " + key + "="); err != nil {
		t.Errorf("padded base64: %v", err)
	}
	for _, s := range []string{"", "hs1.test ed25519:a_1", "bad_name! ed25519:a_1 " + key, "hs1.test ed25519:a_1 ?"} {
		if _, err := parseOrigin(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
}

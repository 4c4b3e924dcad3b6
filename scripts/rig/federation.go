package rig

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// Federation is a simulated federation and the homeserver that speaks to it.
type Federation struct {
	*sim.World
	From   fedload.Homeserver
	Roots  *x509.CertPool // the authority of all its servers
	CAFile string         // the same, in PEM
	// KeyFile has the key of From, as Synapse keeps its own. A bus whose
	// homeserver.signing_key_path names it has an outbox.
	KeyFile string
}

// keyVersion is the second part of the key's id.
const keyVersion = "rig"

// NewFederation makes and starts a federation. It writes its authority's
// certificate and the homeserver's key into dir, and has the servers refuse whatever From did not sign.
func NewFederation(dir string, c sim.Config) (*Federation, error) {
	// The key of a homeserver that exists nowhere else.
	seed := make([]byte, ed25519.SeedSize)
	key, err := matrix.NewSigningKey(seed, keyVersion)
	if err != nil {
		return nil, fmt.Errorf("rig: %w", err)
	}
	f := &Federation{
		From:    fedload.Homeserver{Name: "example.org", Key: key},
		Roots:   x509.NewCertPool(),
		CAFile:  filepath.Join(dir, "ca.pem"),
		KeyFile: filepath.Join(dir, "signing.key"),
	}
	c.Origins = []sim.Origin{{Name: f.From.Name, KeyID: key.ID(), PublicKey: key.Public()}}
	if f.World, err = sim.New(c); err != nil {
		return nil, err
	}
	pem := f.CAPEM()
	if !f.Roots.AppendCertsFromPEM(pem) {
		err = errors.New("rig: the simulated authority has no certificate")
	}
	if err == nil {
		err = os.WriteFile(f.CAFile, pem, 0o644)
	}
	if err == nil {
		line := "ed25519 " + keyVersion + " " + base64.RawStdEncoding.EncodeToString(seed) + "\n"
		err = os.WriteFile(f.KeyFile, []byte(line), 0o600)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	f.Start()
	return f, nil
}

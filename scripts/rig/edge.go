package rig

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"fsbus/bus/matrix"
)

// Certificate is what our homeserver shows to other servers: one that it has
// signed itself.
type Certificate struct {
	CertFile, KeyFile string         // PEM
	Roots             *x509.CertPool // what its clients trust: itself
}

// NewCertificate makes a certificate for name and writes it into dir. Its key is
// the one that most authorities of today are asked for, ECDSA P-256.
func NewCertificate(dir string, name matrix.ServerName) (*Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("rig: certificate: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: string(name)},
		DNSNames:              []string{string(name)},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(30 * 24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("rig: certificate: %w", err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("rig: certificate: %w", err)
	}
	c := &Certificate{
		CertFile: filepath.Join(dir, "edge.pem"),
		KeyFile:  filepath.Join(dir, "edge.key"),
		Roots:    x509.NewCertPool(),
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if !c.Roots.AppendCertsFromPEM(public) {
		return nil, fmt.Errorf("rig: certificate: it cannot be read back")
	}
	if err := os.WriteFile(c.CertFile, public, 0o644); err != nil {
		return nil, err
	}
	return c, os.WriteFile(c.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600)
}

// EdgeSettings are the settings of a bus, for StartBus, that stands with TLS at
// the address listen before the stub.
func EdgeSettings(listen string, c *Certificate, s *Stub) map[string]string {
	return map[string]string{
		"memory_limit":         Text("128MiB"), // what config.example.toml says that the edge needs
		"edge.listen":          Texts(listen),
		"edge.upstream":        Text("http://" + s.Address),
		"edge.tls_certificate": Text(c.CertFile),
		"edge.tls_private_key": Text(c.KeyFile),
	}
}

// Metrics are the samples of a Prometheus text, by name and labels as they stand
// there: `fsbus_edge_refused_total{reason="full"}`.
type Metrics map[string]float64

// Metrics asks the bus for its metrics.
func (b *Bus) Metrics(ctx context.Context) (Metrics, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.Page+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("rig: metrics: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("rig: metrics: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("rig: metrics: %s", resp.Status)
	}
	return parseMetrics(string(text))
}

// parseMetrics reads a Prometheus text without times.
func parseMetrics(text string) (Metrics, error) {
	m := make(Metrics)
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if i < 0 {
			return nil, fmt.Errorf("rig: metrics: %q has no value", line)
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("rig: metrics: %q: %w", line, err)
		}
		m[line[:i]] = v
	}
	return m, nil
}

// Get returns a sample. It is an error if there is none: a name that has changed
// must not pass for a zero.
func (m Metrics) Get(name string) (float64, error) {
	v, ok := m[name]
	if !ok {
		return 0, fmt.Errorf("rig: fsbus has no metric %s", name)
	}
	return v, nil
}

// Labels returns all samples of a name by their labels: `reason="full"`.
func (m Metrics) Labels(name string) map[string]float64 {
	all := make(map[string]float64)
	for key, v := range m {
		if rest, ok := strings.CutPrefix(key, name+"{"); ok {
			all[strings.TrimSuffix(rest, "}")] = v
		}
	}
	return all
}

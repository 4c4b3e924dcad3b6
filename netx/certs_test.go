package netx

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// certTest is a pair of files, with a clock.
type certTest struct {
	t         testing.TB
	cert, key string
	now       time.Time
	log       lockedBuffer
}

func newCertTest(t testing.TB) *certTest {
	dir := t.TempDir()
	return &certTest{t: t, cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem"), now: time.Now()}
}

func (ct *certTest) config() CertificatesConfig {
	return CertificatesConfig{CertFile: ct.cert, KeyFile: ct.key, Logger: slog.New(slog.NewTextHandler(&ct.log, nil)),
		Now: func() time.Time { return ct.now }}
}

// put writes a new certificate for name, valid for so long, and its key.
func (ct *certTest) put(name string, valid time.Duration) tls.Certificate {
	ct.t.Helper()
	cert := ca().issue(ct.now.Add(valid), name)
	writePair(ct.t, cert, ct.cert, ct.key)
	return cert
}

// served returns the name in the certificate that a handshake gets.
func served(t testing.TB, cs *Certificates) string {
	t.Helper()
	c, err := cs.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf.DNSNames[0]
}

func certPEM(certs ...tls.Certificate) string {
	var b strings.Builder
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	}
	return b.String()
}

func TestLoadCertificatesErrors(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(ct *certTest, pair tls.Certificate)
		file   string // that the error names
		want   string
		is     error
	}{
		{"no certificate file", func(ct *certTest, _ tls.Certificate) { os.Remove(ct.cert) }, "cert.pem", "no such file", os.ErrNotExist},
		{"no key file", func(ct *certTest, _ tls.Certificate) { os.Remove(ct.key) }, "key.pem", "no such file", os.ErrNotExist},
		{"a directory", func(ct *certTest, _ tls.Certificate) { os.Remove(ct.key); os.Mkdir(ct.key, 0o700) }, "key.pem", "directory", nil},
		{"no PEM", func(ct *certTest, _ tls.Certificate) { writeFile(ct.t, ct.cert, "hello") }, "cert.pem", "no PEM certificate", nil},
		{"no PEM key", func(ct *certTest, _ tls.Certificate) { writeFile(ct.t, ct.key, "") }, "key.pem", "no PEM private key", nil},
		{"too long", func(ct *certTest, _ tls.Certificate) { writeFile(ct.t, ct.cert, strings.Repeat("x", 1<<20+1)) }, "cert.pem", "longer than", nil},
		{"swapped", func(ct *certTest, _ tls.Certificate) {
			os.Rename(ct.cert, ct.cert+"x")
			os.Rename(ct.key, ct.cert)
			os.Rename(ct.cert+"x", ct.key)
		}, "cert.pem", "but a PRIVATE KEY", nil},
		{"a certificate as key", func(ct *certTest, p tls.Certificate) { writeFile(ct.t, ct.key, certPEM(p)) }, "key.pem", "but a CERTIFICATE", nil},
		{"broken certificate", func(ct *certTest, _ tls.Certificate) {
			writeFile(ct.t, ct.cert, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}, "cert.pem", "certificate 1", nil},
		{"encrypted key", func(ct *certTest, _ tls.Certificate) {
			writeFile(ct.t, ct.key, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
		}, "key.pem", "encrypted", nil},
		{"another key", func(ct *certTest, _ tls.Certificate) {
			key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			writeFile(ct.t, ct.key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})))
		}, "key.pem", "does not fit", nil},
		{"wrong order", func(ct *certTest, p tls.Certificate) {
			writeFile(ct.t, ct.cert, certPEM(ca().issue(ct.now.Add(time.Hour), "x"), p))
		}, "cert.pem", "certificate 2, which must come first", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			ct := newCertTest(t)
			pair := ct.put("hs1.test", time.Hour)
			if _, err := LoadCertificates(ct.config()); err != nil {
				t.Fatal(err)
			}
			test.change(ct, pair)
			_, err := LoadCertificates(ct.config())
			if err == nil || !strings.Contains(err.Error(), test.file) || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestCertificatesNotYetValid(t *testing.T) {
	ct := newCertTest(t)
	ct.put("hs1.test", time.Hour)
	ct.now = time.Unix(-3600, 0) // a computer without a clock of its own
	if _, err := LoadCertificates(ct.config()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(ct.log.String(), "not valid yet") {
		t.Error(ct.log.String())
	}
}

// An expired certificate is no reason not to start: it is served, and Info says so
// until a new one is there.
func TestCertificatesExpired(t *testing.T) {
	ct := newCertTest(t)
	cert := ct.put("old.test", time.Hour)
	ct.now = ct.now.Add(2 * time.Hour)
	cs := must(LoadCertificates(ct.config()))
	if got := served(t, cs); got != "old.test" {
		t.Error(got)
	}
	if n := strings.Count(ct.log.String(), "has expired on"); n != 1 {
		t.Errorf("%d log lines: %s", n, ct.log.String())
	}
	if i := cs.Info(); !strings.Contains(i.Problem, "has expired on") || !i.NotAfter.Equal(leafOf(t, cert).NotAfter) {
		t.Errorf("%+v", i)
	}
	if err := cs.Reload(); err != nil { // which a change of something else needs
		t.Error(err)
	}
	writeFile(t, ct.key, "")
	if err := cs.Reload(); err == nil {
		t.Error("no error for an empty key file")
	}
	if p := cs.Info().Problem; !strings.Contains(p, "has expired on") || !strings.Contains(p, "no PEM private key") {
		t.Errorf("%q", p)
	}
	ct.put("new.test", 2*time.Hour)
	ct.now = ct.now.Add(certificateInterval)
	if got := served(t, cs); got != "new.test" || cs.Info().Problem != "" {
		t.Errorf("%s, %q", got, cs.Info().Problem)
	}

	// One that expires while it is in use, unnoticed by the files.
	ct.now = ct.now.Add(3 * time.Hour)
	if got := served(t, cs); got != "new.test" || !strings.Contains(cs.Info().Problem, "has expired on") {
		t.Errorf("%s, %q", got, cs.Info().Problem)
	}
}

// A certificate that has expired does not take the place of one that has not.
func TestCertificatesExpiredLeavesValid(t *testing.T) {
	ct := newCertTest(t)
	ct.put("valid.test", 2*time.Hour)
	cs := must(LoadCertificates(ct.config()))
	ct.put("old.test", 30*time.Minute)
	ct.now = ct.now.Add(time.Hour)
	if got := served(t, cs); got != "valid.test" {
		t.Error(got)
	}
	if err := cs.Reload(); !errors.Is(err, ErrCertificateExpired) || !strings.Contains(err.Error(), ct.cert) {
		t.Errorf("%v", err)
	}
	if p := cs.Info().Problem; !strings.Contains(p, "has expired on") || !strings.Contains(p, ct.cert) {
		t.Errorf("%q", p)
	}
	if n := strings.Count(ct.log.String(), "cannot be used"); n != 1 {
		t.Errorf("%d log lines: %s", n, ct.log.String())
	}
	ct.now = ct.now.Add(time.Hour + time.Minute) // none is valid any more: then what the files hold
	if err := cs.Reload(); err != nil || served(t, cs) != "old.test" {
		t.Errorf("%v, %s", err, served(t, cs))
	}
}

func TestCertificatesReload(t *testing.T) {
	ct := newCertTest(t)
	ct.put("one.test", time.Hour)
	cs := must(LoadCertificates(ct.config()))
	if got := served(t, cs); got != "one.test" {
		t.Fatal(got)
	}
	two := ct.put("two.test", 2*time.Hour)
	if got := served(t, cs); got != "one.test" {
		t.Errorf("%s before 10 s are over", got)
	}
	ct.now = ct.now.Add(certificateInterval)
	if got := served(t, cs); got != "two.test" {
		t.Errorf("%s is served after the change", got)
	}
	info := cs.Info()
	if len(info.Names) != 1 || info.Names[0] != "two.test" || !info.NotAfter.Equal(leafOf(t, two).NotAfter) || !info.Loaded.Equal(ct.now) || info.Problem != "" {
		t.Errorf("%+v", info)
	}

	ct.put("three.test", time.Hour)
	if err := cs.Reload(); err != nil || served(t, cs) != "three.test" {
		t.Errorf("%v, %s", err, served(t, cs))
	}

	// A renewal that has written the certificate and not yet the key.
	three := must(os.ReadFile(ct.key))
	ct.put("four.test", time.Hour)
	four := must(os.ReadFile(ct.key))
	writeFile(t, ct.key, string(three))
	for range 5 {
		ct.now = ct.now.Add(certificateInterval)
		if got := served(t, cs); got != "three.test" {
			t.Errorf("%s, of which the key is missing", got)
		}
	}
	if n := strings.Count(ct.log.String(), "cannot be used"); n != 1 {
		t.Errorf("%d log lines: %s", n, ct.log.String())
	}
	if p := cs.Info().Problem; !strings.Contains(p, "does not fit") {
		t.Errorf("%q", p)
	}
	if err := cs.Reload(); err == nil {
		t.Error("no error of Reload")
	}
	writeFile(t, ct.key, string(four))
	ct.now = ct.now.Add(certificateInterval)
	if got := served(t, cs); got != "four.test" || cs.Info().Problem != "" {
		t.Errorf("%s, %q", got, cs.Info().Problem)
	}

	os.Remove(ct.cert)
	for range 3 {
		ct.now = ct.now.Add(certificateInterval)
		if got := served(t, cs); got != "four.test" {
			t.Error(got)
		}
	}
	if n := strings.Count(ct.log.String(), "cannot be used"); n != 2 {
		t.Errorf("%d log lines: %s", n, ct.log.String())
	}
}

// leafOf parses the certificate itself.
func leafOf(t testing.TB, c tls.Certificate) *x509.Certificate {
	t.Helper()
	return must(x509.ParseCertificate(c.Certificate[0]))
}

// Handshakes go on while the files change.
func TestCertificatesConcurrently(t *testing.T) {
	ct := newCertTest(t)
	ct.put("one.test", time.Hour)
	config := ct.config()
	config.Now = func() func() time.Time {
		var mu sync.Mutex
		now := time.Now()
		return func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			now = now.Add(time.Second)
			return now
		}
	}()
	cs := must(LoadCertificates(config))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				_ = served(t, cs)
				_ = cs.Info()
			}
		})
	}
	for range 5 {
		ct.put("two.test", time.Hour*100)
	}
	wg.Wait()
	if err := cs.Reload(); err != nil || served(t, cs) != "two.test" {
		t.Error(err)
	}
}

// A listener goes on with a new certificate, for new connections.
func TestEdgeTakesNewCertificate(t *testing.T) {
	ct := newCertTest(t)
	ct.put("hs1.test", time.Hour)
	cs := must(LoadCertificates(ct.config()))
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = cs })
	until := func() time.Time { return et.dialTLS().ConnectionState().PeerCertificates[0].NotAfter }
	first := until()
	ct.put("hs1.test", 3*time.Hour)
	if err := cs.Reload(); err != nil {
		t.Fatal(err)
	}
	if !until().After(first) {
		t.Error("the old certificate is still in use")
	}
}

package netx

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrCertificateExpired is wrapped by Reload's error for a certificate that is not
// valid any more, while the one in use still is.
var ErrCertificateExpired = errors.New("the certificate has expired")

const (
	certificateInterval       = 10 * time.Second // between two looks at the files
	maxCertificateFile  int64 = 1 << 20          // a chain has some KiB
)

// CertificatesConfig configures Certificates. CertFile and KeyFile are required.
type CertificatesConfig struct {
	// CertFile holds the server's certificate and behind it those that lead to
	// its authority, as PEM. KeyFile holds its private key, as PEM, not
	// encrypted.
	CertFile, KeyFile string
	// Logger is told of a new pair and, once for each state of the files, of one
	// that cannot be used. nil discards it.
	Logger *slog.Logger
	// Now is the clock. nil means time.Now.
	Now func() time.Time
}

// Certificates serves a certificate and its key from two files, and takes over
// new ones when the files change: at a handshake, at most every 10 s, and with
// Reload. A pair that cannot be used, such as one of which only one file has
// been renewed yet, leaves the one in use as it is, and one that has expired leaves
// one that has not. All methods may be called concurrently.
type Certificates struct {
	cfg     CertificatesConfig
	current atomic.Pointer[certificatePair]

	mu      sync.Mutex
	next    time.Time    // when the files are looked at again
	seen    [2]fileState // of the last attempt
	problem string       // why that one failed
}

type certificatePair struct {
	tls    tls.Certificate
	loaded time.Time
}

// CertificateInfo describes the certificate in use. Without one there is a Problem only.
type CertificateInfo struct {
	Names               []string // DNS names and IP addresses
	NotBefore, NotAfter time.Time
	Loaded              time.Time
	// Problem is why what the files hold now is not in use, and that the certificate
	// in use is not valid, as of this moment. "" if all is well.
	Problem string
}

// LoadCertificates reads the files. The error names the file and what is wrong
// with it. A certificate that is not valid yet is taken and logged: the clock of
// a small computer may be behind when it starts. So is one that has expired: most
// servers refuse it, but those that come through it are served, what goes out does not
// depend on it, and a new one is taken over as soon as it is there.
func LoadCertificates(c CertificatesConfig) (*Certificates, error) {
	cs := newCertificates(c)
	if err := cs.Reload(); err != nil {
		return nil, err
	}
	return cs, nil
}

// NewCertificates is LoadCertificates, but without a pair that can be used no handshake
// succeeds until there is one, and Info says why.
func NewCertificates(c CertificatesConfig) *Certificates {
	cs := newCertificates(c)
	if err := cs.Reload(); err != nil {
		cs.cfg.Logger.Error("there is no TLS certificate that can be used; the files are looked at again", "err", err)
	}
	return cs
}

func newCertificates(c CertificatesConfig) *Certificates {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Certificates{cfg: c}
}

// errNoCertificate: there has been no pair yet that can be used.
var errNoCertificate = errors.New("no certificate")

// Config returns a new server's configuration: these certificates and TLS 1.2
// or later.
func (cs *Certificates) Config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cs.GetCertificate}
}

// GetCertificate is for tls.Config. It fails while there has been no pair to use.
func (cs *Certificates) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	// One handshake looks at the files; the others go on with what there is.
	if cs.mu.TryLock() {
		if now := cs.cfg.Now(); !now.Before(cs.next) {
			cs.next = now.Add(certificateInterval)
			if cs.changedLocked() {
				_ = cs.loadLocked() // which logs it
			}
		}
		cs.mu.Unlock()
	}
	pair := cs.current.Load()
	if pair == nil {
		return nil, errNoCertificate
	}
	return &pair.tls, nil
}

// Reload reads the files now. After an error the pair in use stays in use.
func (cs *Certificates) Reload() error {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.changedLocked()
	cs.next = cs.cfg.Now().Add(certificateInterval)
	return cs.loadLocked()
}

// Info describes the certificate in use.
func (cs *Certificates) Info() CertificateInfo {
	cs.mu.Lock()
	problem := cs.problem
	pair := cs.current.Load() // the one that the problem goes with
	cs.mu.Unlock()
	if pair == nil {
		return CertificateInfo{Problem: problem}
	}
	leaf := pair.tls.Leaf
	switch invalid := invalidity(leaf, cs.cfg.Now()); {
	case problem == "":
		problem = invalid
	case invalid != "":
		problem = invalid + "; and the new one: " + problem
	}
	info := CertificateInfo{
		Names:     slices.Clone(leaf.DNSNames),
		NotBefore: leaf.NotBefore,
		NotAfter:  leaf.NotAfter,
		Loaded:    pair.loaded,
		Problem:   problem,
	}
	for _, ip := range leaf.IPAddresses {
		info.Names = append(info.Names, ip.String())
	}
	return info
}

// fileState is what tells a file from its successor.
type fileState struct {
	info os.FileInfo // nil if there is none
}

func (s fileState) same(o fileState) bool {
	if s.info == nil || o.info == nil {
		return s.info == nil && o.info == nil
	}
	return s.info.Size() == o.info.Size() && s.info.ModTime().Equal(o.info.ModTime()) && os.SameFile(s.info, o.info)
}

// changedLocked notes the files' state, and reports whether it is another one
// than at the last attempt. It comes before the reading, so that a change in
// between is seen as one the next time.
func (cs *Certificates) changedLocked() bool {
	changed := false
	for i, name := range []string{cs.cfg.CertFile, cs.cfg.KeyFile} {
		info, err := os.Stat(name)
		if err != nil {
			info = nil
		}
		state := fileState{info}
		changed = changed || !state.same(cs.seen[i])
		cs.seen[i] = state
	}
	return changed
}

// loadLocked reads the files and takes the pair over.
func (cs *Certificates) loadLocked() error {
	now := cs.cfg.Now()
	cert, err := readPair(cs.cfg.CertFile, cs.cfg.KeyFile)
	old := cs.current.Load()
	if err == nil && now.After(cert.Leaf.NotAfter) && old != nil && !now.After(old.tls.Leaf.NotAfter) {
		err = fmt.Errorf("TLS certificate: %s: %w on %s", cs.cfg.CertFile, ErrCertificateExpired, moment(cert.Leaf.NotAfter))
	}
	if err != nil {
		if old != nil && cs.problem != err.Error() {
			cs.cfg.Logger.Error("the new TLS certificate cannot be used, the old one stays", "err", err)
		}
		cs.problem = err.Error()
		return err
	}
	cs.problem = ""
	leaf := cert.Leaf
	if why := invalidity(leaf, now); why != "" {
		cs.cfg.Logger.Warn("the TLS certificate is in use but not valid", "why", why, "file", cs.cfg.CertFile)
	}
	cs.current.Store(&certificatePair{tls: *cert, loaded: now})
	if old != nil && !old.tls.Leaf.Equal(leaf) {
		cs.cfg.Logger.Info("a new TLS certificate is in use", "until", leaf.NotAfter)
	}
	return nil
}

// invalidity says why a certificate is not valid at a moment, "" if it is.
func invalidity(c *x509.Certificate, now time.Time) string {
	switch {
	case now.Before(c.NotBefore):
		return "the certificate is not valid yet, but from " + moment(c.NotBefore)
	case now.After(c.NotAfter):
		return "the certificate has expired on " + moment(c.NotAfter)
	}
	return ""
}

// moment writes a time for people.
func moment(t time.Time) string { return t.UTC().Format(time.DateTime + " UTC") }

// readPair reads a certificate and its key. Its errors name the file.
func readPair(certFile, keyFile string) (*tls.Certificate, error) {
	certPEM, err := readPEM(certFile)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate: %w", err)
	}
	keyPEM, err := readPEM(keyFile)
	if err != nil {
		return nil, fmt.Errorf("TLS private key: %w", err)
	}
	chain, err := parseChain(certPEM)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate: %s: %w", certFile, err)
	}
	if err := checkKey(keyPEM); err != nil {
		return nil, fmt.Errorf("TLS private key: %s: %w", keyFile, err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		for i, c := range chain[1:] {
			alone := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
			if _, err := tls.X509KeyPair(alone, keyPEM); err == nil {
				return nil, fmt.Errorf("TLS certificate: %s: the key in %s is that of certificate %d, which must come first", certFile, keyFile, i+2)
			}
		}
		return nil, fmt.Errorf("TLS private key: %s: does not fit the certificate in %s: %w", keyFile, certFile, err)
	}
	return &cert, nil
}

// readPEM reads a file that can be no longer than a chain of certificates.
func readPEM(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err // it names the file
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCertificateFile+1))
	switch {
	case err != nil:
		return nil, err
	case int64(len(data)) > maxCertificateFile:
		return nil, fmt.Errorf("%s: longer than %d bytes", name, maxCertificateFile)
	}
	return data, nil
}

// parseChain returns the certificates of a PEM file, at least one.
func parseChain(data []byte) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	other := ""
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			other = block.Type
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(chain)+1, err)
		}
		chain = append(chain, c)
	}
	switch {
	case len(chain) > 0:
		return chain, nil
	case other != "":
		return nil, fmt.Errorf("no certificate in it, but a %s", other)
	}
	return nil, errors.New("no PEM certificate in it")
}

// checkKey tells what is wrong with a key file before crypto/tls says that it
// found none.
func checkKey(data []byte) error {
	other := ""
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch {
		case block.Type == "ENCRYPTED PRIVATE KEY", strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
			return errors.New("the key is encrypted; a key without a passphrase is needed")
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			return nil
		}
		other = block.Type
	}
	if other != "" {
		return fmt.Errorf("no private key in it, but a %s", other)
	}
	return errors.New("no PEM private key in it")
}

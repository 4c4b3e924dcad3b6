package netx

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// The remote servers of the outbound half's tests: loopback listeners with
// certificates of a test authority, found by static addresses.

// testCA is the authority; each test process has its own.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

var ca = sync.OnceValue(newCA)

func newCA() *testCA {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "test authority"},
		NotBefore:             time.Unix(0, 0),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	cert := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))))
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &testCA{cert, key, pool}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// issue returns a certificate for names, some of which may be IP addresses.
func (ca *testCA) issue(notAfter time.Time, names ...string) tls.Certificate {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		NotBefore:    time.Unix(0, 0),
		NotAfter:     notAfter,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// issued caches certificates, which are what costs time here.
var issued sync.Map // of names joined by a space

func serverTLS(names ...string) *tls.Config {
	key := strings.Join(names, " ")
	cert, ok := issued.Load(key)
	if !ok {
		cert, _ = issued.LoadOrStore(key, ca().issue(time.Now().Add(time.Hour), names...))
	}
	return &tls.Config{Certificates: []tls.Certificate{cert.(tls.Certificate)}}
}

// web is an HTTPS server for names; with http2 it speaks that too.
func web(t testing.TB, http2 bool, handler http.HandlerFunc, names ...string) (addr string) {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.EnableHTTP2 = http2
	s.TLS = serverTLS(names...)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// tcp is a server that does with each connection what serve does, and then
// closes it. The connections are closed under serve when the test ends.
func tcp(t testing.TB, serve func(c net.Conn)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				serve(c)
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().String()
}

// raw is a TLS server of HTTP/1.1 by ALPN, but serve decides what is said.
func raw(t testing.TB, serve func(c *tls.Conn, head *bufio.Reader), names ...string) (addr string) {
	t.Helper()
	config := serverTLS(names...)
	return tcp(t, func(c net.Conn) {
		tc := tls.Server(c, config)
		if tc.Handshake() == nil {
			serve(tc, bufio.NewReader(tc))
		}
		_ = tc.Close()
	})
}

// head reads a request's head, line by line. It is nil if the client went away.
func head(r *bufio.Reader) (lines []string) {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil
		}
		if line = strings.TrimRight(line, "\r\n"); line == "" {
			return lines
		}
		lines = append(lines, line)
	}
}

// fakeLookup is a Lookup from maps. A name that is in none does not exist.
type fakeLookup struct {
	mu    sync.Mutex
	ip    map[string][]string
	srv   map[string][]*net.SRV // by "_service._proto.name"
	fail  map[string]error
	asked []string
}

func (f *fakeLookup) IP(_ context.Context, host string) ([]netip.Addr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, host)
	if err := f.fail[host]; err != nil {
		return nil, err
	}
	if len(f.ip[host]) == 0 {
		return nil, notFound(host)
	}
	var addrs []netip.Addr
	for _, s := range f.ip[host] {
		addrs = append(addrs, netip.MustParseAddr(s))
	}
	return addrs, nil
}

func (f *fakeLookup) SRV(_ context.Context, service, proto, name string) ([]*net.SRV, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := "_" + service + "._" + proto + "." + name
	f.asked = append(f.asked, q)
	if err := f.fail[q]; err != nil {
		return nil, err
	}
	if len(f.srv[q]) == 0 {
		return nil, notFound(q)
	}
	return f.srv[q], nil
}

func (f *fakeLookup) set(host string, addrs ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ip[host] = addrs
}

// addrOf splits the address of a test server.
func addrOf(addr string) netip.AddrPort { return netip.MustParseAddrPort(addr) }

// openList is a block-list that lets the tests reach the loopback.
func openList(t testing.TB) *Blocklist {
	t.Helper()
	b, err := NewBlocklist(DefaultBlocklist(), []string{"127.0.0.0/8", "::1"})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newTestClient returns a Client that trusts the test authority and finds the
// servers in static, which are "host:port" and where that is.
func newTestClient(t testing.TB, static map[string]string, change func(*ClientConfig)) *Client {
	t.Helper()
	s, err := NewStatic(static)
	if err != nil {
		t.Fatal(err)
	}
	config := ClientConfig{
		CAs:                 ca().pool,
		Blocklist:           openList(t),
		Static:              s,
		Lookup:              &fakeLookup{},
		HandshakesPerSecond: -1,
		Rand:                mathrand.NewPCG(1, 2),
	}
	if change != nil {
		change(&config)
	}
	c := NewClient(config)
	t.Cleanup(func() {
		c.CloseIdle()
		eventually(t, "every connection is closed", func() bool { return c.Stats().Open == 0 })
	})
	return c
}

// testContext bounds a test's request, so that a hang is a failure.
func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testWait)
	t.Cleanup(cancel)
	return ctx
}

// get does a GET and returns the answer's body.
func get(t testing.TB, c *Client, dest, target string) (*http.Response, string) {
	t.Helper()
	resp, body, err := tryGet(testContext(t), c, dest, target)
	if err != nil {
		t.Fatalf("GET %s %s: %v", dest, target, err)
	}
	return resp, body
}

// tryGet returns the error of Do or of reading the body.
func tryGet(ctx context.Context, c *Client, dest, target string) (*http.Response, string, error) {
	resp, err := c.Do(ctx, &Request{Destination: matrix.ServerName(dest), Method: "GET", Target: target}, nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// wantFailure checks an error of the client for its failure and its step.
func wantFailure(t testing.TB, err error, f matrix.Failure, op string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v (%T) is no *Error, want %v in %s", err, err, f, op)
	}
	if e.Failure != f || e.Op != op {
		t.Fatalf("failure %v in step %s, want %v in %s: %v", e.Failure, e.Op, f, op, err)
	}
	if FailureOf(err) != f {
		t.Fatalf("FailureOf(%v) = %v, want %v", err, FailureOf(err), f)
	}
}

// silentLogs keeps net/http's complaints about hostile remotes out of the
// tests' output.
func silentLogs(t testing.TB) {
	log.SetOutput(io.Discard)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
}

// goroutines fails the test if it leaves more goroutines than there were.
func goroutines(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		eventually(t, "as few goroutines as before: "+strconv.Itoa(before), func() bool { return runtime.NumGoroutine() <= before })
	})
}

// counter counts calls of a handler.
type counter struct{ atomic.Int64 }

func (c *counter) handler(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c.Add(1)
		h(w, r)
	}
}

func ok(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") }

package netx

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"crypto/x509"
)

// writePair puts a certificate for names and its key into two files.
func writePair(t testing.TB, cert tls.Certificate, certFile, keyFile string) {
	t.Helper()
	var chain bytes.Buffer
	for _, der := range cert.Certificate {
		if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			t.Fatal(err)
		}
	}
	key := must(x509.MarshalPKCS8PrivateKey(cert.PrivateKey))
	writeFile(t, certFile, chain.String())
	writeFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
}

func writeFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// testCertificates are for the edge of hs1.test.
func testCertificates(t testing.TB) *Certificates {
	t.Helper()
	dir := t.TempDir()
	c := CertificatesConfig{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	writePair(t, serverTLS("hs1.test").Certificates[0], c.CertFile, c.KeyFile)
	cs, err := LoadCertificates(c)
	if err != nil {
		t.Fatal(err)
	}
	return cs
}

// clientTLS is how a server of the federation connects to hs1.test.
func clientTLS(protos ...string) *tls.Config {
	return &tls.Config{RootCAs: ca().pool, ServerName: "hs1.test", NextProtos: protos}
}

type edgeTest struct {
	*Edge
	t        testing.TB
	spool    *Spool
	requests chan *EdgeRequest
	gone     chan *EdgeRequest
	log      lockedBuffer
	addr     net.Addr
	close    func() // ends Serve
}

// newEdge makes an Edge whose requests and clients gone come out of channels. It
// serves nothing.
func newEdge(t testing.TB, change func(*EdgeConfig)) *edgeTest {
	t.Helper()
	et := &edgeTest{t: t, requests: make(chan *EdgeRequest, 4096), gone: make(chan *EdgeRequest, 4096)}
	c := EdgeConfig{
		Logger: slog.New(slog.NewTextHandler(&et.log, nil)),
		Handle: func(q *EdgeRequest) { et.requests <- q },
		Gone:   func(q *EdgeRequest) { et.gone <- q },
	}
	if change != nil {
		change(&c)
	}
	if c.Spool == nil {
		c.Spool = newTestSpool(t, SpoolConfig{Memory: 16 << 20, Disk: 16 << 20})
	}
	et.spool = c.Spool
	et.Edge = NewEdge(c)
	return et
}

// newEdgeTest serves on a listener of the kernel's. At the end of the test every
// place and every byte must have been given back.
func newEdgeTest(t testing.TB, network string, change func(*EdgeConfig)) *edgeTest {
	t.Helper()
	et := newEdge(t, change)
	addr := "127.0.0.1:0"
	if network == "unix" {
		addr = filepath.Join(t.TempDir(), "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	et.addr = ln.Addr()
	et.serveListener(ln)
	t.Cleanup(func() {
		et.close()
		eventually(t, "everything given back", func() bool {
			s := et.Stats()
			return s.Open == 0 && s.Held == 0 && s.Reading == 0 && s.Idle == 0
		})
		et.checkSpool()
	})
	return et
}

func (et *edgeTest) checkSpool() {
	et.t.Helper()
	if s := et.spool.Stats(); s.Memory != 0 || s.Disk != 0 || s.Files != 0 {
		et.t.Errorf("left over in the spool: %+v", s)
	}
}

func (et *edgeTest) serveListener(ln net.Listener) {
	done := make(chan error, 1)
	go func() { done <- et.Serve(ln) }()
	et.close = sync.OnceFunc(func() {
		et.Close()
		if err := <-done; err != http.ErrServerClosed {
			et.t.Errorf("Serve: %v", err)
		}
	})
}

// dial connects, from an address of the loopback if one is given.
func (et *edgeTest) dial(from ...string) net.Conn {
	et.t.Helper()
	var d net.Dialer
	if len(from) > 0 {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from[0])}
	}
	c, err := d.Dial(et.addr.Network(), et.addr.String())
	if err != nil {
		et.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(testWait))
	et.t.Cleanup(func() { c.Close() })
	return c
}

// dialTLS connects with TLS, and with HTTP/2 if protos says so.
func (et *edgeTest) dialTLS(protos ...string) *tls.Conn {
	et.t.Helper()
	c := tls.Client(et.dial(), clientTLS(protos...))
	if err := c.Handshake(); err != nil {
		et.t.Fatal(err)
	}
	return c
}

// client speaks TLS and HTTP/2 if it may.
func (et *edgeTest) client(http2 bool) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, et.addr.Network(), et.addr.String())
		},
		TLSClientConfig:    clientTLS(),
		ForceAttemptHTTP2:  http2,
		DisableCompression: true,

		ExpectContinueTimeout: testWait, // or the body would be sent without being asked for
	}
	et.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: testWait}
}

func (et *edgeTest) next() *EdgeRequest {
	et.t.Helper()
	return receiveFrom(et.t, et.requests, "a request was handed over")
}

func receiveFrom[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(testWait):
		t.Fatalf("never happened: %s", what)
		panic("unreachable")
	}
}

// reply answers at once.
func reply(q *EdgeRequest) {
	_ = q.Reply(200, nil, []byte(`{"ok":true}`)) // clients in these tests may go away
	q.Release()
}

// readReply reads one answer and leaves the connection as it is.
func readReply(t testing.TB, br *bufio.Reader, method string) (*http.Response, string) {
	t.Helper()
	res, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// wantEnd checks that nothing more comes on a connection.
func wantEnd(t testing.TB, br *bufio.Reader) {
	t.Helper()
	rest, err := io.ReadAll(br)
	if _, timeout := errors.AsType[net.Error](err); len(rest) > 0 || timeout && errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection does not end: %q, %v", rest, err)
	}
}

var edgeTargets = []string{
	"/a%2Fb//c/../d/./?x=%21+%2B+&;=%zz?/",
	"/",
	"/.//",
	"/_matrix/federation/v1/event/$a%2Fb",
	"/!room:hs/$event?",
	"/%E4%f6?a=b%20c&&",
}

func TestEdgeTakesRequests(t *testing.T) {
	for _, test := range []struct {
		name       string
		tls, http2 bool
		network    string
	}{
		{"plain", false, false, "tcp"}, {"unix", false, false, "unix"},
		{"http1", true, false, "tcp"}, {"http2", true, true, "tcp"},
	} {
		t.Run(test.name, func(t *testing.T) {
			goroutines(t)
			et := newEdgeTest(t, test.network, func(c *EdgeConfig) {
				if test.tls {
					c.TLS = testCertificates(t)
				}
			})
			client, scheme := et.client(test.http2), "http"
			if test.tls {
				scheme = "https"
			}
			for i, target := range edgeTargets {
				u, err := requestURL(target)
				if err != nil {
					t.Fatal(err)
				}
				u.Scheme, u.Host = scheme, "hs1.test"
				body := strings.Repeat("x", 1000*i)
				req := &http.Request{Method: "PUT", URL: u, Host: "hs1.test:8448", Header: http.Header{
					"Authorization": {"X-Matrix a", "X-Matrix b"}, "Content-Type": {"application/json"}},
					Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body))}
				answered := make(chan struct{})
				go func() {
					defer close(answered)
					res, err := client.Do(req)
					if err != nil {
						t.Error(err)
						return
					}
					got, err := io.ReadAll(res.Body)
					res.Body.Close()
					if err != nil || string(got) != `{"ok":true}` || res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/json" ||
						res.ContentLength != int64(len(got)) || res.Header.Get("Date") == "" || (res.ProtoMajor == 2) != test.http2 {
						t.Errorf("answer %v %q %v", res, got, err)
					}
				}()
				q := et.next()
				if q.ID != uint64(i+1) || q.Method != "PUT" || q.Target != target || q.Host != "hs1.test:8448" || q.HTTP2 != test.http2 {
					t.Errorf("%d %s %q %q %v, want %q", q.ID, q.Method, q.Target, q.Host, q.HTTP2, target)
				}
				if a := q.Header["Authorization"]; len(a) != 2 || a[0] != "X-Matrix a" || a[1] != "X-Matrix b" || q.Header.Get("Content-Type") != "application/json" {
					t.Errorf("header %v", q.Header)
				}
				if want := netip.MustParseAddr("127.0.0.1"); test.network == "tcp" && q.Client != want || test.network == "unix" && q.Client.IsValid() {
					t.Errorf("client %v", q.Client)
				}
				if i == 0 {
					if q.Body != nil || q.Size != 0 || q.Sum != [32]byte{} {
						t.Errorf("a body of %d bytes out of nothing", q.Size)
					}
				} else if got, ok := q.Body.Bytes(); !ok || string(got) != body || q.Size != int64(len(body)) || q.Sum != sha256.Sum256([]byte(body)) {
					t.Errorf("%d bytes of body instead of %d, or a wrong sum", q.Size, len(body))
				}
				if err := q.Reply(200, nil, []byte(`{"ok":true}`)); err != nil {
					t.Error(err)
				}
				if err := q.Reply(200, nil, nil); err != ErrAnswered {
					t.Errorf("a second answer: %v", err)
				}
				q.Release()
				q.Release()
				<-answered
			}
			client.CloseIdleConnections()
			if s := et.Stats(); s.Requests != uint64(len(edgeTargets)) || len(s.Refused) != 0 || s.MaxHeld != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestEdgeHeader(t *testing.T) {
	et := newEdgeTest(t, "tcp", nil)
	c := et.dial()
	write(t, c, "GET /x HTTP/1.1\r\nHost: hs1.test\r\nauthorization: X-Matrix a\r\nConnection: close, x-listed\r\nX-Listed: 1\r\n"+
		"AUTHORIZATION: X-Matrix b\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil\r\nForwarded: for=1\r\n"+
		"X-Real-IP: 1\r\nX_Forwarded_For: 2\r\nKeep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\nProxy-Authorization: secret\r\nTrailer: x\r\n"+
		"X-Original-URL: /_synapse/admin\r\nX-Rewrite-URL: /a\r\nX-HTTP-Method-Override: DELETE\r\nx-method-override: PUT\r\nTrue-Client-IP: 1.1.1.1\r\nX!Odd: 1\r\nUser-Agent: t\xc3\xa9st\tx\r\nX-Folded: a\r\n  b\r\nAuthorization: X-Matrix c\r\nX-Empty:\r\n\r\n")
	q := et.next()
	want := map[string][]string{
		"Authorization": {"X-Matrix a", "X-Matrix b", "X-Matrix c"},
		"User-Agent":    {"t\xc3\xa9st\tx"},
		"X-Folded":      {"a b"},
		"X-Empty":       {""},
	}
	if fmt.Sprint(q.Header) != fmt.Sprint(http.Header(want)) {
		t.Errorf("header %q", q.Header)
	}
	if q.Client.String() != "127.0.0.1" {
		t.Errorf("client %v: nobody trusts that peer", q.Client)
	}
	reply(q)
}

// Each case is alone on its connection. None sends the body that it announces:
// nothing may wait for it.
func TestEdgeRefusals(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.MaxBody = func(method, target string) int64 { return 10 }
		c.MaxHeaderBytes = 12 << 10
		c.Check = func(q *EdgeRequest) *EdgeRefusal {
			switch q.Target {
			case "/denied":
				return &EdgeRefusal{Status: 403, Errcode: "M_FORBIDDEN", Message: "Denied"}
			case "/limited":
				return &EdgeRefusal{Status: 429, Body: []byte(`{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":5}`), Header: http.Header{"Retry-After": {"1"}}}
			}
			return nil
		}
	})
	const host = " HTTP/1.1\r\nHost: h\r\n"
	for _, test := range []struct {
		name, request string
		status        int
		errcode       string // "" if net/http answers, in plain text
		closes        bool
	}{
		{"connect", "CONNECT hs2.test:8448" + host + "\r\n", 405, "M_UNRECOGNIZED", false},
		{"connect to a path", "CONNECT /x" + host + "\r\n", 405, "M_UNRECOGNIZED", false},
		{"absolute form", "GET http://hs1.test/x" + host + "\r\n", 400, "M_INVALID_PARAM", false},
		{"another scheme", "GET matrix-federation://hs1.test/x" + host + "\r\n", 400, "M_INVALID_PARAM", false},
		{"asterisk", "OPTIONS *" + host + "\r\n", 400, "M_INVALID_PARAM", false},
		{"fragment", "GET /x#y" + host + "\r\n", 400, "M_INVALID_PARAM", false},
		{"beyond ASCII", "GET /\xc3\xa9" + host + "\r\n", 400, "M_INVALID_PARAM", false},
		{"long method", strings.Repeat("A", 33) + " /x" + host + "\r\n", 400, "M_INVALID_PARAM", false},
		{"long target", "GET /" + strings.Repeat("a", 8<<10) + host + "\r\n", 414, "M_TOO_LARGE", false},
		{"GET with a body", "GET /x" + host + "Content-Length: 1\r\n\r\n", 400, "M_UNKNOWN", true},
		{"HEAD with a body", "HEAD /x" + host + "Content-Length: 1\r\n\r\n", 400, "", true},
		{"GET with chunks", "GET /x" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\n{", 400, "M_UNKNOWN", true},
		{"too long", "PUT /x" + host + "Content-Length: 11\r\n\r\n", 413, "M_TOO_LARGE", true},
		{"too long, after asking", "PUT /x" + host + "Content-Length: 11\r\nExpect: 100-continue\r\n\r\n", 413, "M_TOO_LARGE", true},
		{"too many chunks", "PUT /x" + host + "Transfer-Encoding: chunked\r\n\r\nb\r\n12345678901", 413, "M_TOO_LARGE", true},
		{"bad chunk", "PUT /x" + host + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "M_UNKNOWN", true},
		{"denied", "GET /denied" + host + "\r\n", 403, "M_FORBIDDEN", false},
		{"denied with a body", "PUT /denied" + host + "Content-Length: 2\r\n\r\n{}", 403, "M_FORBIDDEN", false},
		{"limited", "GET /limited" + host + "\r\n", 429, "M_LIMIT_EXCEEDED", false},

		{"bad host", "GET /x HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "", true},
		{"no host", "GET /x HTTP/1.1\r\n\r\n", 400, "", true},
		{"two hosts", "GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "", true},
		{"no version", "GET /x\r\n\r\n", 400, "", true},
		{"HTTP/2.0", "GET /x HTTP/2.0\r\nHost: h\r\n\r\n", 505, "", true},
		{"preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "M_INVALID_PARAM", true},
		{"a control byte", "GET /x\x01" + host + "\r\n", 400, "", true},
		{"a bad escape", "GET /%zz" + host + "\r\n", 400, "", true},
		{"two blanks", "GET  /x" + host + "\r\n", 400, "", true},
		{"blank before colon", "GET /x" + host + "A : b\r\n\r\n", 400, "", true},
		{"folded first line", "GET /x HTTP/1.1\r\n Host: h\r\n\r\n", 400, "", true},
		{"name with a blank", "GET /x" + host + "A b: c\r\n\r\n", 400, "", true},
		{"value with a zero", "GET /x" + host + "A: b\x00c\r\n\r\n", 400, "", true},
		{"value with CR", "GET /x" + host + "A: b\rc\r\n\r\n", 400, "", true},
		{"expects something", "PUT /x" + host + "Content-Length: 1\r\nExpect: tea\r\n\r\n", 417, "", true},
		{"large header", "GET /x" + host + "A: " + strings.Repeat("a", 16<<10-len("GET /x"+host+"A: ")), 431, "", true},
		{"negative length", "PUT /x" + host + "Content-Length: -1\r\n\r\n", 400, "", true},
		{"signed length", "PUT /x" + host + "Content-Length: +1\r\n\r\n", 400, "", true},
		{"list of lengths", "PUT /x" + host + "Content-Length: 1, 1\r\n\r\n", 400, "", true},
		{"different lengths", "PUT /x" + host + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "", true},
		{"gzip", "PUT /x" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "", true},
		{"chunked twice", "PUT /x" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 501, "", true},
		{"identity", "PUT /x" + host + "Transfer-Encoding: identity\r\n\r\n", 501, "", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := et.dial()
			write(t, c, test.request)
			br := bufio.NewReader(c)
			method, _, _ := strings.Cut(test.request, " ")
			res, body := readReply(t, br, method)
			if res.StatusCode != test.status {
				t.Fatalf("status %d %q", res.StatusCode, body)
			}
			if test.errcode != "" {
				var m struct{ Errcode string }
				if err := json.Unmarshal([]byte(body), &m); err != nil || m.Errcode != test.errcode || res.Header.Get("Content-Type") != "application/json" {
					t.Errorf("%q %v", body, res.Header)
				}
			}
			if res.Header.Get("Retry-After") == "" && test.status == 429 || (test.status == 405) != (res.Header.Get("Allow") != "") {
				t.Errorf("header %v", res.Header)
			}
			if test.closes {
				c.(*net.TCPConn).CloseWrite()
				wantEnd(t, br)
				return
			}
			write(t, c, "GET /denied"+host+"\r\n")
			if res, _ := readReply(t, br, "GET"); res.StatusCode != 403 {
				t.Errorf("the next one: %d", res.StatusCode)
			}
		})
	}
	if s := et.Stats(); s.Requests != 0 || s.Refused[405] != 2 || s.Refused[414] != 1 || s.Refused[413] != 3 {
		t.Errorf("%+v", s)
	}
}

// What stands behind a request that two parsers may delimit in different ways is
// never read as a request.
func TestEdgeSmuggling(t *testing.T) {
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
	for _, test := range []struct {
		name, request, body string
		status              int // 0: handled
	}{
		{"chunked and a length", "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "", 0},
		{"a length and chunked", "PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 500\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + smuggled, "{}", 0},
		{"chunked alone", "PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + smuggled, "{}", 0},
		{"chunks with a trailer", "PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n2;a=b\r\n{}\r\n0\r\nAuthorization: X-Matrix z\r\n\r\n" + smuggled, "{}", 0},
		{"HTTP/1.0 and chunked", "PUT /x HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "", 0},
		{"HTTP/1.0 and both", "PUT /x HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}" + smuggled, "{}", 0},
		{"folded encoding", "PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + smuggled, "{}", 0},
		{"encoding with a control byte", "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nTransfer-Encoding:\x0bchunked\r\n\r\n{}" + smuggled, "", 400},
		{"blank before colon", "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nTransfer-Encoding : chunked\r\n\r\n{}" + smuggled, "", 400},
		{"different lengths", "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + smuggled, "", 400},
		{"GET with a body", "GET /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}" + smuggled, "", 400},
		{"chunk size too long", "PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n" + smuggled, "", 400},
	} {
		t.Run(test.name, func(t *testing.T) {
			et := newEdgeTest(t, "tcp", nil)
			c := et.dial()
			write(t, c, test.request)
			if test.status == 0 {
				q := et.next()
				var body []byte
				if q.Body != nil {
					body, _ = q.Body.Bytes()
				}
				if q.Target != "/x" || string(body) != test.body || q.Header["Authorization"] != nil || q.Header["Content-Length"] != nil || q.Header["Transfer-Encoding"] != nil {
					t.Errorf("%s %q %v", q.Target, body, q.Header)
				}
				reply(q)
			}
			br := bufio.NewReader(c)
			res, _ := readReply(t, br, "PUT")
			if res.StatusCode != max(test.status, 200) {
				t.Errorf("status %d", res.StatusCode)
			}
			c.(*net.TCPConn).CloseWrite()
			wantEnd(t, br)
			et.close()
			if s := et.Stats(); s.Requests > 1 || test.status != 0 && s.Requests > 0 {
				t.Errorf("%d requests", s.Requests)
			}
		})
	}
}

// Equal lengths are one, and what follows is the next request, as for everyone
// who takes either of them.
func TestEdgeEqualLengths(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.Handle = reply })
	c := et.dial()
	write(t, c, "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}GET /y HTTP/1.1\r\nHost: h\r\n\r\n")
	br := bufio.NewReader(c)
	for range 2 {
		if res, _ := readReply(t, br, "PUT"); res.StatusCode != 200 {
			t.Fatal(res.Status)
		}
	}
}

func TestEdgeClientAddress(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, test := range []struct {
		peer, forwarded, want string
	}{
		{"203.0.113.5", "", "203.0.113.5"},
		{"203.0.113.5", "1.2.3.4", "203.0.113.5"},
		{"10.0.0.1", "1.2.3.4", "1.2.3.4"},
		{"10.0.0.1", "9.9.9.9, 1.2.3.4", "1.2.3.4"},
		{"10.0.0.1", "9.9.9.9,1.2.3.4 , 10.0.0.2", "1.2.3.4"},
		{"10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"},
		{"10.0.0.1", "1.2.3.4, nonsense, 10.0.0.2", "10.0.0.2"},
		{"10.0.0.1", "nonsense", "10.0.0.1"},
		{"10.0.0.1", "1.2.3.4,", "10.0.0.1"},
		{"10.0.0.1", "", "10.0.0.1"},
		{"10.0.0.1", "1.2.3.4:5678", "1.2.3.4"},
		{"fd00::1", "[2001:db8::1]:5678", "2001:db8::1"},
		{"fd00::1", "[2001:db8::1]", "2001:db8::1"},
		{"fd00::1", "fe80::1%eth0", "fe80::1"},
		{"fd00::1", "::ffff:1.2.3.4", "1.2.3.4"},
		{"", "1.2.3.4", "1.2.3.4"},
		{"", "", "invalid IP"},
	} {
		et := newEdge(t, func(c *EdgeConfig) { c.TrustedProxies = trusted })
		conn := &edgeConn{trusted: true}
		if test.peer != "" {
			conn.peer = netip.MustParseAddr(test.peer)
			conn.trusted = et.trusted(conn.peer)
		}
		q := &EdgeRequest{edge: et.Edge, conn: conn}
		var lines []string
		if test.forwarded != "" {
			first, rest, two := strings.Cut(test.forwarded, ", ")
			if lines = []string{first}; two {
				lines = append(lines, rest) // several lines are one list
			}
		}
		if got := q.client(lines); got.String() != test.want {
			t.Errorf("%s via %q: %v, want %s", test.peer, test.forwarded, got, test.want)
		}
	}
}

func TestEdgeTooManyRequests(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.MaxRequests = 1 })
	first := et.dial()
	write(t, first, "GET /1 HTTP/1.1\r\nHost: h\r\n\r\n")
	q := et.next()
	c := et.dial()
	br := bufio.NewReader(c)
	for range 2 {
		write(t, c, "PUT /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
		res, body := readReply(t, br, "PUT")
		if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || res.Close || !strings.Contains(body, "M_UNKNOWN") {
			t.Fatalf("%v %q", res, body)
		}
	}
	reply(q)
	readReply(t, bufio.NewReader(first), "GET")
	eventually(t, "the place is free", func() bool { return et.Stats().Held == 0 })
	write(t, c, "PUT /3 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
	if q = et.next(); q.Target != "/3" {
		t.Errorf("%q", q.Target)
	}
	reply(q)
	readReply(t, br, "PUT")
	if s := et.Stats(); s.MaxHeld != 1 || s.Refused[503] != 2 || s.Requests != 2 {
		t.Errorf("%+v", s)
	}
}

// One client has a quarter of the requests that are held; others have theirs.
func TestEdgeRequestsOfOneClient(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.MaxRequests = 8 })
	send := func(from string) net.Conn {
		c := et.dial(from)
		write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		return c
	}
	var held []*EdgeRequest
	for range 2 {
		send("127.0.0.2")
		held = append(held, et.next())
	}
	res, _ := readReply(t, bufio.NewReader(send("127.0.0.2")), "GET")
	if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
		t.Errorf("%d %v", res.StatusCode, res.Header)
	}
	send("127.0.0.3")
	held = append(held, et.next())
	for _, q := range held {
		reply(q)
	}
	eventually(t, "nothing is held", func() bool { return et.Stats().Held == 0 })
	if n := len(et.held.by.clients); n != 0 {
		t.Errorf("%d clients are remembered", n)
	}
}

// Four clients with as many requests as they get leave room for others, whose first
// ones find a place up to the very last.
func TestEdgeRequestsLeaveRoom(t *testing.T) {
	const limit = 16
	et := newEdgeTest(t, "unix", func(c *EdgeConfig) { c.MaxRequests = limit })
	send := func(from string) (c net.Conn) {
		c = et.dial()
		write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: "+from+"\r\n\r\n")
		return c
	}
	refused := func(c net.Conn) {
		t.Helper()
		if res, _ := readReply(t, bufio.NewReader(c), "GET"); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
			t.Errorf("%d %v", res.StatusCode, res.Header)
		}
	}
	var held []*EdgeRequest
	for i := range 40 {
		c := send(fmt.Sprintf("203.0.113.%d", i%4))
		if len(held) < 10 { // 4/7 of 16, rounded up
			held = append(held, et.next())
			continue
		}
		refused(c)
	}
	for i := range limit - len(held) {
		send(fmt.Sprintf("198.51.100.%d", i))
		held = append(held, et.next())
	}
	refused(send("198.51.100.99"))
	if s := et.Stats(); s.MaxHeld != limit || s.Held != limit {
		t.Errorf("%+v", s)
	}
	for _, q := range held {
		reply(q)
	}
}

// Behind a proxy that does not say for whom it speaks all may be everybody's: they
// have most of the places, and leave some to who has a name.
func TestEdgeRequestsOfNobody(t *testing.T) {
	const limit = 16
	et := newEdgeTest(t, "unix", func(c *EdgeConfig) { c.MaxRequests = limit })
	var held []*EdgeRequest
	send := func(forwarded string, taken bool) {
		t.Helper()
		c := et.dial()
		write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n"+forwarded+"\r\n")
		if taken {
			held = append(held, et.next())
		} else if res, _ := readReply(t, bufio.NewReader(c), "GET"); res.StatusCode != 503 {
			t.Error(res.Status)
		}
	}
	for range limit - limit/8 {
		send("", true)
	}
	send("", false)
	for i := range limit / 8 {
		send(fmt.Sprintf("X-Forwarded-For: 198.51.100.%d\r\n", i), true)
	}
	send("X-Forwarded-For: 198.51.100.99\r\n", false)
	for _, q := range held {
		reply(q)
	}
}

// The byte that is waited for before a body has its place is part of the body.
func TestEdgeSmallBodies(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprint("http2 ", http2), func(t *testing.T) {
			et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
				c.TLS = testCertificates(t)
				c.MaxBody = func(string, string) int64 { return 3 }
			})
			client := et.client(http2)
			for _, body := range []string{"", "1", "12", "123", "1234"} {
				for _, known := range []bool{false, true} {
					req := must(http.NewRequest("PUT", "https://hs1.test/x", io.NopCloser(strings.NewReader(body))))
					if req.ContentLength = -1; known {
						req.ContentLength = int64(len(body))
					}
					if len(body) == 1 {
						req.Header.Set("Expect", "100-continue")
					}
					status := make(chan int, 1)
					go func() {
						res, err := client.Do(req)
						if err != nil {
							t.Error(err)
							status <- 0
							return
						}
						res.Body.Close()
						status <- res.StatusCode
					}()
					if len(body) > 3 {
						if got := receiveFrom(t, status, "a refusal"); got != 413 {
							t.Errorf("%q: status %d", body, got)
						}
						continue
					}
					q := et.next()
					if body == "" {
						if q.Body != nil || q.Sum != [32]byte{} {
							t.Errorf("a body of %d bytes", q.Size)
						}
					} else if got, ok := q.Body.Bytes(); !ok || string(got) != body || q.Size != int64(len(body)) || q.Sum != sha256.Sum256([]byte(body)) {
						t.Errorf("%q instead of %q, or a wrong sum", got, body)
					}
					reply(q)
					receiveFrom(t, status, "an answer")
				}
			}
			client.CloseIdleConnections()
		})
	}
}

func TestEdgeSpoolFull(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.Spool = newTestSpool(t, SpoolConfig{Memory: 1000})
		c.BodyTimeout = 20 * time.Millisecond
	})
	c := et.dial()
	write(t, c, "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2000\r\n\r\n"+strings.Repeat("x", 2000))
	if res, body := readReply(t, bufio.NewReader(c), "PUT"); res.StatusCode != 503 || !strings.Contains(body, "No room") || !res.Close {
		t.Errorf("%v %q", res, body)
	}
}

// countedReads counts what the Edge reads from its clients.
type countedReads struct {
	net.Listener
	n atomic.Int64
}

type countedReader struct {
	net.Conn
	n *atomic.Int64
}

func (l *countedReads) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countedReader{c, &l.n}, nil
}

func (c *countedReader) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// A hundred megabytes are not read: not with a length, not in chunks, not over
// HTTP/2.
func TestEdgeHugeBody(t *testing.T) {
	const limit, huge = 1 << 20, 100 << 20
	for _, test := range []struct {
		name    string
		http2   bool
		chunked bool
		most    int64 // read in all
	}{
		{"length", false, false, 600 << 10}, {"chunks", false, true, limit + 600<<10},
		{"http2 length", true, false, 600 << 10}, {"http2 stream", true, true, limit + 600<<10},
	} {
		t.Run(test.name, func(t *testing.T) {
			et := newEdge(t, func(c *EdgeConfig) {
				c.TLS = testCertificates(t)
				c.MaxBody = func(string, string) int64 { return limit }
			})
			ln := &countedReads{Listener: must(net.Listen("tcp", "127.0.0.1:0"))}
			et.addr = ln.Addr()
			et.serveListener(ln)
			defer et.close()
			req := must(http.NewRequest("PUT", "https://hs1.test/x", io.LimitReader(zeros{}, huge)))
			if req.ContentLength = huge; test.chunked {
				req.ContentLength = -1
			}
			client := et.client(test.http2)
			res, err := client.Do(req)
			if err == nil {
				if res.StatusCode != 413 {
					t.Errorf("status %d", res.StatusCode)
				}
				res.Body.Close()
			} else if test.http2 { // over HTTP/1.1 the client may be told by a reset
				t.Error(err)
			}
			eventually(t, "the refusal is counted", func() bool { return et.Stats().Refused[413] == 1 })
			client.CloseIdleConnections()
			et.close()
			if n := ln.n.Load(); n > test.most {
				t.Errorf("%d bytes were read", n)
			}
			if s := et.spool.Stats(); s.MaxMemory+s.MaxDisk > 2*limit {
				t.Errorf("%+v", s)
			}
			et.checkSpool()
		})
	}
}

func TestEdgeAbortAndStream(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprint("http2 ", http2), func(t *testing.T) {
			silentLogs(t)
			et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = testCertificates(t) })
			client := et.client(http2)
			type result struct {
				res  *http.Response
				body string
				err  error
			}
			do := func() <-chan result {
				out := make(chan result, 1)
				go func() {
					// A POST is not repeated by net/http.
					res, err := client.Post("https://hs1.test/x", "application/json", strings.NewReader("{}"))
					if err != nil {
						out <- result{err: err}
						return
					}
					body, err := io.ReadAll(res.Body)
					res.Body.Close()
					out <- result{res, string(body), err}
				}()
				return out
			}
			answered := func(c <-chan result) result { t.Helper(); return receiveFrom(t, c, "an answer") }

			got := do()
			q := et.next()
			h := http.Header{"Content-Type": {"text/x"}, "Connection": {"x-gone"}, "X-Gone": {"1"}, "Keep-Alive": {"2"}, "X-Kept": {"a", "b"}}
			if err := q.Stream(201, h, 5, strings.NewReader("hello")); err != nil {
				t.Error(err)
			}
			q.Release()
			if r := answered(got); r.err != nil || r.body != "hello" || r.res.StatusCode != 201 || r.res.ContentLength != 5 || len(r.res.Header["X-Kept"]) != 2 || r.res.Header["X-Gone"] != nil || r.res.Header["Keep-Alive"] != nil {
				t.Errorf("%+v", r)
			}

			got = do()
			q = et.next()
			large := strings.Repeat("y", 200<<10)
			body := et.spool.New()
			go func() {
				for part := range strings.SplitSeq(large, "#") {
					body.Write([]byte(part))
				}
				body.CloseWrite(nil)
			}()
			reader := body.Reader()
			if err := q.Stream(200, nil, -1, reader); err != nil {
				t.Error(err)
			}
			reader.Close()
			body.Release()
			q.Release()
			if r := answered(got); r.err != nil || r.body != large || r.res.ContentLength != -1 || r.res.Header["Content-Type"] != nil {
				t.Errorf("%d bytes, %v", len(r.body), r.err)
			}

			for _, test := range []struct {
				size int64
				body io.Reader
				want error
			}{
				{10, strings.NewReader("short"), io.ErrUnexpectedEOF},
				{3, strings.NewReader("long"), http.ErrContentLength},
				{-1, io.MultiReader(strings.NewReader("begins"), failingReader{}), errFailing},
			} {
				got = do()
				q = et.next()
				if err := q.Stream(200, nil, test.size, test.body); !errors.Is(err, test.want) {
					t.Errorf("error %v, want %v", err, test.want)
				}
				q.Release()
				if r := answered(got); r.err == nil {
					t.Errorf("%v: the answer looks complete: %q", test.want, r.body)
				}
			}

			got = do()
			q = et.next()
			if err := q.Abort(); err != nil {
				t.Error(err)
			}
			q.Release()
			if err := q.Abort(); err != ErrAnswered {
				t.Errorf("%v", err)
			}
			if r := answered(got); r.err == nil {
				t.Errorf("%+v", r)
			}

			got = do()
			q = et.next()
			if err := q.Reply(100, nil, nil); err == nil {
				t.Error("an answer that is not final")
			}
			q.Release()
			if r := answered(got); r.err == nil {
				t.Errorf("%+v", r)
			}
		})
	}
}

var errFailing = errors.New("failing")

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errFailing }

func TestEdgeWithoutBody(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.Handle = func(q *EdgeRequest) {
			status := 200
			if q.Target == "/304" {
				status = 304
			}
			if err := q.Stream(status, nil, 4, failingReader{}); err != nil {
				t.Error(err)
			}
		}
	})
	c := et.dial()
	br := bufio.NewReader(c)
	for range 2 {
		write(t, c, "HEAD /x HTTP/1.1\r\nHost: h\r\n\r\n")
		if res, _ := readReply(t, br, "HEAD"); res.ContentLength != 4 {
			t.Errorf("%v", res)
		}
		write(t, c, "GET /304 HTTP/1.1\r\nHost: h\r\n\r\n")
		if res, body := readReply(t, br, "GET"); res.StatusCode != 304 || body != "" {
			t.Errorf("%v", res)
		}
	}
}

// A client of HTTP/1.0, which is what nginx is unless told otherwise, sees that
// an answer was cut: by a reset.
func TestEdgeHTTP10(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.Handle = func(q *EdgeRequest) {
			if q.Target == "/cut" {
				q.Stream(200, nil, -1, io.MultiReader(strings.NewReader("begins"), failingReader{}))
			} else {
				q.Stream(200, nil, -1, strings.NewReader("whole"))
			}
		}
	})
	c := et.dial()
	write(t, c, "GET /whole HTTP/1.0\r\n\r\n")
	res, body := readReply(t, bufio.NewReader(c), "GET")
	if body != "whole" || len(res.TransferEncoding) > 0 {
		t.Errorf("%v %q", res, body)
	}
	c = et.dial()
	write(t, c, "GET /cut HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	if got, err := io.ReadAll(c); err == nil {
		t.Errorf("%q looks complete", got)
	}
}

func TestEdgeGone(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = testCertificates(t) })
	for _, http2 := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		client := et.client(http2)
		req := must(http.NewRequestWithContext(ctx, "PUT", "https://hs1.test/x", strings.NewReader("{}")))
		done := make(chan error, 1)
		go func() {
			_, err := client.Do(req)
			done <- err
		}()
		q := et.next()
		cancel()
		if err := receiveFrom(t, done, "the client gave up"); err == nil {
			t.Error("an answer")
		}
		if g := receiveFrom(t, et.gone, "Gone is told"); g != q {
			t.Error("another request is gone")
		}
		for _, err := range []error{q.Reply(200, nil, nil), q.Stream(200, nil, 0, nil), q.Abort()} {
			if err != ErrClientGone {
				t.Errorf("%v", err)
			}
		}
		q.Release()
	}
	eventually(t, "nothing is held", func() bool { return et.Stats().Held == 0 })
	if s := et.Stats(); s.Gone != 2 || s.HTTP2 != 1 {
		t.Errorf("%+v", s)
	}
}

// A body that its client cuts is dropped, and nobody hears of it.
func TestEdgeCutBody(t *testing.T) {
	et := newEdgeTest(t, "tcp", nil)
	for _, end := range []string{
		"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{",
		"PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
	} {
		c := et.dial()
		write(t, c, end)
		eventually(t, "it is being read", func() bool { return et.Stats().Reading == 1 })
		c.Close()
		eventually(t, "it is not any more", func() bool { return et.Stats().Held == 0 })
	}
	if s := et.Stats(); s.Cut != 2 || s.Requests != 0 || s.Gone != 0 {
		t.Errorf("%+v", s)
	}
}

func TestEdgePanics(t *testing.T) {
	silentLogs(t)
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.Handle = func(q *EdgeRequest) {
			defer q.Release()
			if q.Target == "/answered" {
				q.Reply(200, nil, nil)
			}
			panic("in Handle")
		}
		c.Check = func(q *EdgeRequest) *EdgeRefusal {
			if q.Target == "/check" {
				panic("in Check")
			}
			return nil
		}
	})
	for _, target := range []string{"/answered", "/check", "/x"} {
		c := et.dial()
		write(t, c, "PUT "+target+" HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
		io.Copy(io.Discard, c)
	}
	eventually(t, "nothing is held", func() bool { return et.Stats().Held == 0 })
	if log := et.log.String(); strings.Count(log, "a request could not be handled") != 3 {
		t.Error(log)
	}
}

func TestEdgeSlowReader(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprint("http2 ", http2), func(t *testing.T) {
			et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
				c.TLS = testCertificates(t)
				c.StallTimeout = 50 * time.Millisecond
			})
			if http2 {
				c := newH2Client(et.dialTLS("h2"))
				c.headers(1, true, "GET", "/x")
			} else {
				c := et.dialTLS()
				write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
			}
			q := et.next()
			if err := q.Stream(200, nil, -1, zeros{}); !errors.Is(err, ErrSlowReader) {
				t.Errorf("%v", err)
			}
			eventually(t, "nothing is held", func() bool { return et.Stats().Held == 0 })
		})
	}
}

func TestEdgeShutdown(t *testing.T) {
	et := newEdgeTest(t, "tcp", nil)
	fresh, idle, busy := et.dial(), et.dial(), et.dial()
	write(t, idle, "GET /idle HTTP/1.1\r\nHost: h\r\n\r\n")
	reply(et.next())
	readReply(t, bufio.NewReader(idle), "GET")
	write(t, busy, "GET /busy HTTP/1.1\r\nHost: h\r\n\r\n")
	q := et.next()
	eventually(t, "the fresh one is accepted", func() bool { return et.Stats().Open == 3 })

	fresh.SetDeadline(time.Now().Add(testWait / 4)) // net/http alone would give it 5 s
	done := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), testWait)
	defer cancel()
	go func() { done <- et.Shutdown(ctx) }()
	for _, c := range []net.Conn{fresh, idle} {
		if n, err := c.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%d %v", n, err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("Shutdown does not wait: %v", err)
	default:
	}
	reply(q)
	if res, _ := readReply(t, bufio.NewReader(busy), "GET"); res.StatusCode != 200 || !res.Close {
		t.Errorf("%v", res)
	}
	if err := receiveFrom(t, done, "Shutdown ends"); err != nil {
		t.Error(err)
	}
}

func TestEdgeCloseTellsGone(t *testing.T) {
	et := newEdgeTest(t, "tcp", nil)
	write(t, et.dial(), "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
	q := et.next()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := et.Shutdown(ctx); err != context.Canceled {
		t.Errorf("%v", err)
	}
	et.close()
	if g := receiveFrom(t, et.gone, "Gone is told"); g != q {
		t.Error("another request")
	}
}

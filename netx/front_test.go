package netx

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// testWait bounds every wait in these tests; it is only ever reached when
// something is broken.
const testWait = 10 * time.Second

// eventually waits for a state that nothing announces.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(testWait); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

const testSecret = "lab-secret" // the one in testdata

type frontTest struct {
	*Front
	t        testing.TB
	spool    *Spool
	requests chan *Inbound
	gone     chan *Inbound
	log      lockedBuffer
}

// newFrontTest makes a Front whose requests and clients gone come out of
// channels. At the end of the test every place and every byte must have been
// given back.
func newFrontTest(t testing.TB, change func(*FrontConfig)) *frontTest {
	t.Helper()
	ft := &frontTest{t: t, requests: make(chan *Inbound, 8192), gone: make(chan *Inbound, 8192)}
	c := FrontConfig{
		Secret:        []byte(testSecret),
		SweepInterval: 2 * time.Millisecond,
		Logger:        slog.New(slog.NewTextHandler(&ft.log, nil)),
		Handle:        func(in *Inbound) { ft.requests <- in },
		Gone:          func(in *Inbound) { ft.gone <- in },
	}
	if change != nil {
		change(&c)
	}
	if c.Spool == nil {
		c.Spool = newTestSpool(t, SpoolConfig{Memory: 16 << 20, Disk: 16 << 20})
	}
	ft.spool = c.Spool
	ft.Front = NewFront(c)
	ft.linger = 20 * time.Millisecond
	t.Cleanup(func() {
		ft.Close()
		eventually(t, "all connections closed and handed over", func() bool {
			s := ft.Stats()
			return s.Open == 0 && s.Reading == 0
		})
		if s := ft.Stats(); s.Parked != 0 {
			t.Errorf("left over: %+v", s)
		}
		if s := ft.spool.Stats(); s.Memory != 0 || s.Disk != 0 || s.Files != 0 {
			t.Errorf("left over in the spool: %+v", s)
		}
		if strings.Contains(ft.log.String(), testSecret) {
			t.Error("the secret is in the log")
		}
	})
	return ft
}

// serve serves a new listener and returns a function that connects to it.
func (ft *frontTest) serve(network string) (dial func() net.Conn) {
	ft.t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		addr = filepath.Join(ft.t.TempDir(), "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		ft.t.Fatal(err)
	}
	return ft.serveListener(ln)
}

func (ft *frontTest) serveListener(ln net.Listener) (dial func() net.Conn) {
	done := make(chan error, 1)
	go func() { done <- ft.Serve(ln) }()
	ft.t.Cleanup(func() {
		ft.Close()
		if err := <-done; err != http.ErrServerClosed {
			ft.t.Errorf("Serve: %v", err)
		}
	})
	return func() net.Conn {
		ft.t.Helper()
		c, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
		if err != nil {
			ft.t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(testWait))
		ft.t.Cleanup(func() { c.Close() })
		return c
	}
}

// next returns the next request that was handed over.
func (ft *frontTest) next() *Inbound {
	ft.t.Helper()
	select {
	case in := <-ft.requests:
		return in
	case <-time.After(testWait):
		ft.t.Fatal("no request was handed over")
		return nil
	}
}

func write(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

// readAnswer reads one answer and checks that the connection ends behind it.
func readAnswer(t testing.TB, c net.Conn, method string) (*http.Response, string) {
	t.Helper()
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(br); err != nil || len(rest) > 0 {
		t.Fatalf("behind the answer: %q, %v", rest, err)
	}
	if !res.Close {
		t.Error("the answer does not announce that the connection closes")
	}
	return res, string(body)
}

// request builds a request that passes all checks.
func request(method, target, extra, body string) string {
	return method + " matrix-federation://hs2.test" + target + " HTTP/1.1\r\nHost: hs2.test\r\n" +
		"Proxy-Authorization: Bearer " + testSecret + "\r\n" + extra + "\r\n" + body
}

func synapseRequests(t testing.TB) []string {
	t.Helper()
	data, err := os.ReadFile("testdata/synapse-1.160-requests.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range bytes.Lines(data) {
		var s string
		if err := json.Unmarshal(line, &s); err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	if len(out) < 40 {
		t.Fatalf("only %d requests", len(out))
	}
	return out
}

func TestFrontTakesSynapsesRequests(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			ft := newFrontTest(t, nil)
			dial := ft.serve(network)
			var lastID uint64
			for _, raw := range synapseRequests(t) {
				head, body, _ := strings.Cut(raw, "\r\n\r\n")
				line, _, _ := strings.Cut(head, "\r\n")
				method, rest, _ := strings.Cut(line, " ")
				uri, _, _ := strings.Cut(rest, " ")
				target := strings.TrimPrefix(uri, "matrix-federation://hs2.test:18248")

				c := dial()
				write(t, c, raw)
				in := ft.next()
				if in.Method != method || in.Target != target || in.Destination != "hs2.test:18248" {
					t.Fatalf("%s %s: got %s %s for %s", method, uri, in.Method, in.Target, in.Destination)
				}
				if in.ID <= lastID || time.Since(in.Received) > testWait {
					t.Fatalf("ID %d after %d, received %v", in.ID, lastID, in.Received)
				}
				lastID = in.ID
				for k, v := range in.Header {
					if k != "User-Agent" && k != "Authorization" && k != "Content-Type" {
						t.Errorf("header field %s is forwarded", k)
					}
					if want := "\r\n" + k + ": " + v[0]; len(v) != 1 || !strings.Contains(head, want) {
						t.Errorf("%s: %q is not what was sent", k, v)
					}
				}
				if in.Header.Get("Authorization") == "" || in.Header.Get("User-Agent") == "" || (in.Header.Get("Content-Type") == "") != (body == "") {
					t.Errorf("header fields are missing: %v", in.Header)
				}
				switch {
				case body == "" && (in.Body != nil || in.Size != 0 || in.Sum != [32]byte{}):
					t.Errorf("a body of %d bytes out of nothing", in.Size)
				case body != "":
					got, ok := in.Body.Bytes()
					if !ok || string(got) != body || in.Size != int64(len(body)) || in.Sum != sha256.Sum256([]byte(body)) {
						t.Errorf("%d bytes of body instead of %d, or a wrong sum", in.Size, len(body))
					}
				}
				if err := in.Reply(200, nil, []byte(`{"ok":true}`)); err != nil {
					t.Fatal(err)
				}
				in.Release()
				res, answer := readAnswer(t, c, method)
				if res.StatusCode != 200 || answer != `{"ok":true}` || res.Header.Get("Content-Type") != "application/json" || res.Header.Get("Date") == "" {
					t.Fatalf("answer %v %q", res, answer)
				}
			}
			if s := ft.Stats(); s.Requests != 40 || s.MaxParked != 1 || s.MaxOpen > 3 || len(s.Refused) != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestFrontKeepsTargetBytes(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	for _, target := range []string{
		"/a%2Fb//c/../d/./?x=%21+%2B+&;=%zz?/",
		"/",
		"/.//",
		"/%e4%F6?",
		"/!room:hs/$event",
	} {
		c := dial()
		write(t, c, request("GET", target, "", ""))
		in := ft.next()
		if in.Target != target {
			t.Errorf("%q became %q", target, in.Target)
		}
		in.Reply(200, nil, nil)
	}
}

func TestFrontForwardsEveryAuthorization(t *testing.T) {
	ft := newFrontTest(t, nil)
	c := ft.serve("unix")()
	write(t, c, request("GET", "/x", "Authorization: X-Matrix a\r\nAuthorization: X-Matrix b\r\nCookie: c\r\nX-Y: z\r\n", ""))
	in := ft.next()
	if got := fmt.Sprint(in.Header); got != "map[Authorization:[X-Matrix a X-Matrix b]]" {
		t.Error(got)
	}
	if err := in.Abort(); err != nil {
		t.Error(err)
	}
}

// Each of these lacks what the checks before it look for, and fails those
// behind it, so that the order of the checks is tested as well. None sends the
// body that it announces: nothing may wait for it.
func TestFrontRefusals(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) {
		c.MaxBody = func(_, target string) int64 {
			if target == "/large" {
				return 1000
			}
			return 10
		}
	})
	dial := ft.serve("unix")
	const auth = "Proxy-Authorization: Bearer " + testSecret + "\r\n"
	for _, test := range []struct {
		name, request string
		status        int
		errcode       string
	}{
		{"connect", "CONNECT hs2.test:8448 HTTP/1.1\r\nHost: hs2.test\r\n\r\n", 405, "M_UNRECOGNIZED"},
		{"connect with a good target", "CONNECT matrix-federation://hs2.test/x HTTP/1.1\r\nHost: h\r\n" + auth + "\r\n", 405, "M_UNRECOGNIZED"},
		{"origin form", "GET /_matrix/federation/v1/version HTTP/1.1\r\nHost: hs2.test\r\nContent-Length: 11\r\n\r\n", 404, "M_UNRECOGNIZED"},
		{"asterisk", "OPTIONS * HTTP/1.1\r\nHost: hs2.test\r\n\r\n", 404, "M_UNRECOGNIZED"},
		{"http", "GET http://hs2.test/ HTTP/1.1\r\nHost: hs2.test\r\n" + auth + "\r\n", 404, "M_UNRECOGNIZED"},
		{"no secret", "PUT matrix-federation://a_b/x HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\n", 407, "M_UNAUTHORIZED"},
		{"empty secret", "PUT matrix-federation://a_b/x HTTP/1.1\r\nHost: h\r\nProxy-Authorization: Bearer \r\n\r\n", 407, "M_UNAUTHORIZED"},
		{"wrong secret", "PUT matrix-federation://a_b/x HTTP/1.1\r\nHost: h\r\nProxy-Authorization: Bearer " + testSecret + "x\r\n\r\n", 407, "M_UNAUTHORIZED"},
		{"wrong scheme", "PUT matrix-federation://a_b/x HTTP/1.1\r\nHost: h\r\nProxy-Authorization: Basic " + testSecret + "\r\n\r\n", 407, "M_UNAUTHORIZED"},
		{"no scheme", "PUT matrix-federation://a_b/x HTTP/1.1\r\nHost: h\r\nProxy-Authorization: " + testSecret + "\r\n\r\n", 407, "M_UNAUTHORIZED"},
		{"secret twice", "PUT matrix-federation://a_b/x HTTP/1.1\r\nHost: h\r\n" + auth + auth + "\r\n", 407, "M_UNAUTHORIZED"},
		{"bad name", "PUT matrix-federation://a_b/x HTTP/1.0\r\nHost: h\r\n" + auth + "Content-Length: 11\r\n\r\n", 400, "M_INVALID_PARAM"},
		{"no name", "PUT matrix-federation:///x HTTP/1.0\r\nHost: h\r\n" + auth + "Content-Length: 11\r\n\r\n", 400, "M_INVALID_PARAM"},
		{"userinfo", "PUT matrix-federation://u@hs2.test/x HTTP/1.1\r\nHost: h\r\n" + auth + "\r\n", 400, "M_INVALID_PARAM"},
		{"fragment", "PUT matrix-federation://hs2.test/x#y HTTP/1.1\r\nHost: h\r\n" + auth + "\r\n", 400, "M_INVALID_PARAM"},
		{"HTTP/1.0", "PUT matrix-federation://hs2.test/x HTTP/1.0\r\nHost: h\r\n" + auth + "Content-Length: 11\r\n\r\n", 505, "M_UNKNOWN"},
		{"too large", request("PUT", "/x", "Content-Length: 11\r\n", ""), 413, "M_TOO_LARGE"},
		{"too large for another target", request("PUT", "/large", "Content-Length: 1001\r\n", ""), 413, "M_TOO_LARGE"},
		{"too large, 100-continue", request("PUT", "/x", "Expect: 100-continue\r\nContent-Length: 11\r\n", ""), 413, "M_TOO_LARGE"},
		{"too large in chunks", request("PUT", "/x", "Transfer-Encoding: chunked\r\n", "b\r\nhello world\r\n"), 413, "M_TOO_LARGE"},
		{"bad chunk", request("PUT", "/x", "Transfer-Encoding: chunked\r\n", "z\r\n"), 400, "M_UNKNOWN"},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := ft.Stats().Refused[test.status]
			c := dial()
			write(t, c, test.request)
			res, body := readAnswer(t, c, "PUT")
			var e struct{ Errcode, Error string }
			if err := json.Unmarshal([]byte(body), &e); err != nil {
				t.Fatalf("%q: %v", body, err)
			}
			if res.StatusCode != test.status || e.Errcode != test.errcode || e.Error == "" || res.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%d %q", res.StatusCode, body)
			}
			if strings.Contains(body, testSecret) {
				t.Error("the secret is in the answer")
			}
			if (res.Header.Get("Proxy-Authenticate") == "Bearer") != (test.status == 407) || (res.Header.Get("Allow") != "") != (test.status == 405) {
				t.Errorf("header %v", res.Header)
			}
			if n := ft.Stats().Refused[test.status]; n != before+1 {
				t.Errorf("counted %d times", n-before)
			}
		})
	}
	if n := ft.Stats().Requests; n != 0 {
		t.Errorf("%d requests got through", n)
	}
}

func TestFrontBearerIsCaseInsensitive(t *testing.T) {
	ft := newFrontTest(t, nil)
	c := ft.serve("unix")()
	write(t, c, "GET matrix-federation://h/x HTTP/1.1\r\nHost: h\r\nproxy-authorization: bEARER   "+testSecret+"  \r\n\r\n")
	in := ft.next()
	if err := in.Reply(204, nil, nil); err != nil {
		t.Error(err)
	}
}

// Whatever is wrong with a request's head is told in JSON.
func TestFrontRefusesMalformedHeads(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) { c.MaxHeaderBytes = 2000 })
	dial := ft.serve("unix")
	auth := "Proxy-Authorization: Bearer " + testSecret + "\r\n"
	for name, test := range map[string]struct {
		request string
		status  int
	}{
		"request line":      {"nonsense\r\n\r\n", 400},
		"header":            {"GET matrix-federation://h/x HTTP/1.1\r\nHost h\r\n\r\n", 400},
		"URL escape":        {"GET matrix-federation://h/%zz HTTP/1.1\r\nHost: h\r\n\r\n", 400},
		"URL port":          {"GET matrix-federation://h:x/ HTTP/1.1\r\nHost: h\r\n\r\n", 400},
		"expectation":       {"GET matrix-federation://h/x HTTP/1.1\r\n" + auth + "Expect: wonders\r\n\r\n", 417},
		"header size":       {"GET matrix-federation://h/x HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 6100) + "\r\n\r\n", 431},
		"transfer encoding": {"PUT matrix-federation://h/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 400},
		"two lengths":       {"PUT matrix-federation://h/x HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
		"version":           {"GET matrix-federation://h/x HTTP/3.0\r\n" + auth + "\r\n", 505},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial()
			write(t, c, test.request)
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || res.StatusCode != test.status || res.Header.Get("Content-Type") != "application/json" {
				t.Fatalf("%v, %v", res, err)
			}
			var body struct{ Errcode, Error string }
			if err := json.NewDecoder(res.Body).Decode(&body); err != nil || body.Errcode == "" || body.Error == "" {
				t.Errorf("%+v, %v", body, err)
			}
		})
	}
}

func TestFrontReadsChunkedBodies(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) { c.MaxBody = func(string, string) int64 { return 11 } })
	dial := ft.serve("unix")
	c := dial()
	write(t, c, request("PUT", "/x", "Transfer-Encoding: chunked\r\n", "6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"))
	in := ft.next()
	if got, ok := in.Body.Bytes(); !ok || string(got) != "hello world" || in.Size != 11 || in.Sum != sha256.Sum256(got) {
		t.Errorf("%q %v %d", got, ok, in.Size)
	}
	in.Reply(200, nil, nil)
	in.Release()
	in.Release() // once is enough, twice does no harm

	c = dial()
	write(t, c, request("PUT", "/x", "Transfer-Encoding: chunked\r\n", "0\r\n\r\n"))
	in = ft.next()
	if in.Body != nil || in.Size != 0 || in.Sum != [32]byte{} {
		t.Errorf("%v %d", in.Body, in.Size)
	}
	in.Reply(200, nil, nil)
	in.Release()
}

func TestFrontContinue(t *testing.T) {
	ft := newFrontTest(t, nil)
	c := ft.serve("tcp")()
	write(t, c, request("PUT", "/x", "Expect: 100-continue\r\nContent-Length: 5\r\n", ""))
	br := bufio.NewReader(c)
	if line, err := br.ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatal(line, err)
	}
	br.ReadString('\n')
	write(t, c, "hello")
	in := ft.next()
	if err := in.Reply(200, nil, []byte("{}")); err != nil {
		t.Error(err)
	}
	in.Release()
	if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 200 {
		t.Error(res, err)
	}
}

func TestFrontTimeouts(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) {
		c.HeaderTimeout = 20 * time.Millisecond
		c.BodyTimeout = 20 * time.Millisecond
	})
	dial := ft.serve("tcp")
	silent := dial()
	if b, err := io.ReadAll(silent); err != nil || len(b) > 0 {
		t.Errorf("silent client: %q, %v", b, err)
	}
	slow := dial()
	write(t, slow, request("PUT", "/x", "Content-Length: 10\r\n", "hello"))
	if res, body := readAnswer(t, slow, "PUT"); res.StatusCode != 503 || !strings.Contains(body, matrix.MUnknown) || !strings.Contains(body, refuseTime.message) {
		t.Errorf("slow client: %d %s", res.StatusCode, body)
	}
}

func TestFrontDropsCutBodies(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	for i, body := range []string{"Content-Length: 10\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"} {
		c := dial()
		write(t, c, strings.TrimSuffix(request("PUT", "/x", body, ""), "\r\n"))
		c.(*net.UnixConn).CloseWrite()
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("%q, %v", b, err)
		}
		if s := ft.Stats(); s.Cut != uint64(i+1) || s.Requests != 0 || len(s.Refused) != 0 {
			t.Errorf("%+v", s)
		}
	}
}

func TestFrontWaitsForRoomInTheSpool(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) {
		c.Spool = newTestSpool(t, SpoolConfig{Memory: 100})
	})
	dial := ft.serve("unix")
	first := ft.spool.New()
	if _, err := first.Write(make([]byte, 96)); err != nil {
		t.Fatal(err)
	}
	c := dial()
	write(t, c, request("PUT", "/x", "Content-Length: 5\r\n", "hello"))
	eventually(t, "the request waits", func() bool { return ft.spool.Stats().Full > 0 })
	if s := ft.Stats(); s.Requests != 0 {
		t.Fatalf("%+v", s)
	}
	first.Release()
	in := ft.next()
	in.Reply(200, nil, nil)
	in.Release()
}

func TestFrontSpoolStaysFull(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) {
		c.Spool = newTestSpool(t, SpoolConfig{Memory: 100})
		c.BodyTimeout = 20 * time.Millisecond
	})
	c := ft.serve("unix")()
	write(t, c, request("PUT", "/x", "Content-Length: 101\r\n", strings.Repeat("x", 101)))
	if res, _ := readAnswer(t, c, "PUT"); res.StatusCode != 503 {
		t.Error(res.Status)
	}
}

func TestFrontDiskFails(t *testing.T) {
	spool := newTestSpool(t, SpoolConfig{Disk: 1 << 20})
	spool.open = func(string) (spoolFile, error) { return nil, syscall.EIO }
	ft := newFrontTest(t, func(c *FrontConfig) { c.Spool = spool })
	dial := ft.serve("unix")
	for range 3 {
		c := dial()
		write(t, c, request("PUT", "/x", "Content-Length: 5\r\n", "hello"))
		if res, body := readAnswer(t, c, "PUT"); res.StatusCode != 500 || strings.Contains(body, syscall.EIO.Error()) {
			t.Error(res.Status, body)
		}
	}
	if n := strings.Count(ft.log.String(), syscall.EIO.Error()); n != 1 {
		t.Errorf("logged %d times:\n%s", n, ft.log.String())
	}
}

// countingListener counts the connections that were accepted.
type countingListener struct {
	net.Listener
	accepts atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	l.accepts.Add(1)
	return l.Listener.Accept()
}

func TestFrontLeavesConnectionsInTheBacklog(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) { c.MaxConns = 3 })
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	counting := &countingListener{Listener: ln}
	dial := ft.serveListener(counting)
	const clients = 10
	for range clients {
		write(t, dial(), request("GET", "/x", "", ""))
	}
	for i := range int64(clients) {
		in := ft.next()
		if want, got := min(i+3, clients+1), counting.accepts.Load(); got > want {
			t.Errorf("%d calls of Accept after %d answers", got, i)
		}
		if s := ft.Stats(); s.Open > 3 {
			t.Errorf("%+v", s)
		}
		if err := in.Reply(200, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if s := ft.Stats(); s.MaxOpen != 3 || s.MaxParked > 3 || s.Requests != clients {
		t.Errorf("%+v", s)
	}
}

// Silent connections, slow heads and requests without the secret, over TCP, keep nobody
// waiting: neither over TCP nor over a unix socket.
func TestFrontHostileNeighbours(t *testing.T) {
	for what, head := range map[string]string{
		"silent":  "",
		"slow":    "GET matrix-federation",
		"refused": "PUT matrix-federation://h/x HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n",
	} {
		t.Run(what, func(t *testing.T) {
			ft := newFrontTest(t, func(c *FrontConfig) {
				c.MaxReading = 4
				c.HeaderTimeout, c.BodyTimeout = time.Hour, time.Hour
			})
			ft.linger = time.Hour
			unix, tcp := ft.serve("unix"), ft.serve("tcp")
			for range 40 {
				write(t, tcp(), head)
			}
			for _, dial := range []func() net.Conn{unix, tcp} {
				c := dial()
				write(t, c, request("GET", "/x", "", ""))
				ft.next().Reply(200, nil, nil)
				readAnswer(t, c, "GET")
			}
		})
	}
}

func TestFrontServesSeveralListeners(t *testing.T) {
	ft := newFrontTest(t, nil)
	for _, dial := range []func() net.Conn{ft.serve("unix"), ft.serve("tcp"), ft.serve("unix")} {
		c := dial()
		write(t, c, request("GET", "/x", "", ""))
		ft.next().Reply(200, nil, nil)
		readAnswer(t, c, "GET")
	}
}

func TestFrontShutdown(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	parked, reading := dial(), dial()
	write(t, parked, request("GET", "/parked", "", ""))
	first := ft.next()
	write(t, reading, request("PUT", "/reading", "Content-Length: 10\r\n", "hello"))
	eventually(t, "the second request is being read", func() bool { return ft.spool.Stats().Memory > 0 })

	done := make(chan error)
	go func() { done <- ft.Shutdown(t.Context()) }()
	eventually(t, "the listener is closed", func() bool {
		c, err := net.Dial("unix", parked.RemoteAddr().String())
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	write(t, reading, "world")
	second := ft.next()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for in, c := range map[*Inbound]net.Conn{first: parked, second: reading} {
		if err := in.Reply(200, nil, []byte("late")); err != nil {
			t.Error(err)
		}
		in.Release()
		if _, body := readAnswer(t, c, in.Method); body != "late" {
			t.Error(body)
		}
	}
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "again"))
	if err != nil {
		t.Fatal(err)
	}
	if err := ft.Serve(ln); err != http.ErrServerClosed {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

func TestFrontShutdownGivesUp(t *testing.T) {
	ft := newFrontTest(t, nil)
	c := ft.serve("unix")()
	write(t, c, request("PUT", "/reading", "Content-Length: 10\r\n", "hello"))
	eventually(t, "the request is being read", func() bool { return ft.spool.Stats().Memory > 0 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := ft.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
}

func TestFrontHandlePanics(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) { c.Handle = func(*Inbound) { panic("of the test") } })
	c := ft.serve("unix")()
	write(t, c, request("GET", "/x", "", ""))
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
	eventually(t, "the panic is logged", func() bool { return strings.Contains(ft.log.String(), "of the test") })
}

func TestFrontHandleAnswersAtOnce(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) {
		c.Handle = func(in *Inbound) { in.Reply(200, nil, []byte("now")) }
	})
	c := ft.serve("unix")()
	write(t, c, request("GET", "/x", "", ""))
	if _, body := readAnswer(t, c, "GET"); body != "now" {
		t.Error(body)
	}
}

func TestNewFrontNeedsASecret(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	NewFront(FrontConfig{Spool: newTestSpool(t, SpoolConfig{Memory: 1}), Handle: func(*Inbound) {}, Gone: func(*Inbound) {}})
}

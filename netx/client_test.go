package netx

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// targets that every library between here and there likes to tidy up.
var oddTargets = []string{
	"/",
	"/_matrix/federation/v1/event/%24abc%2Fdef",
	"/_matrix/federation/v1/event/%24abc%2fdef",
	"/_matrix/federation/v1/state/!room:a.test?event_id=%24x&a=b+c&d=%20",
	"/_matrix/federation/v1/send_join/%21room%3Aa.test/%24e",
	"/_matrix//double//slash/",
	"/a/./b/../c",
	"/q?",
	"/q??a=b?c",
	"/q?a=%zz;b",
	"/%",
	"/%zz",
	"/a;b=c,d",
	"/@:[]!$&'()*+,;=~",
	"/\"<>\\^`{|}",
	"/caf\xc3\xa9",
	"/#fragment",
	"//",
	"//two/slashes",
	"//two/slashes?query=%2F",
	"//two%2Fslashes%2f",
	"//?",
	"///",
	"//host.test:443/path",
}

func TestTargetsAreSentToTheByte(t *testing.T) {
	silentLogs(t)
	targets := make(chan string, 1)
	h1 := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		for lines := head(r); lines != nil; lines = head(r) {
			targets <- lines[0]
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	}, "a.test")
	h2 := web(t, true, func(w http.ResponseWriter, r *http.Request) { targets <- r.RequestURI }, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": h1, "a.test:2": h2}, nil)
	for _, target := range oddTargets {
		resp, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: target}, nil)
		if err != nil {
			t.Fatalf("%q over HTTP/1.1: %v", target, err)
		}
		_ = resp.Body.Close()
		if got, want := <-targets, "GET "+target+" HTTP/1.1"; got != want {
			t.Errorf("HTTP/1.1: sent %q, want %q", got, want)
		}
		if _, err := url.ParseRequestURI(target); err != nil {
			continue // net/http's HTTP/2 server would not take it
		}
		resp, err = c.Do(testContext(t), &Request{Destination: "a.test:2", Method: "GET", Target: target}, nil)
		if err != nil || resp.ProtoMajor != 2 {
			t.Fatalf("%q over HTTP/2: %v", target, err)
		}
		_ = resp.Body.Close()
		if got := <-targets; got != target {
			t.Errorf("HTTP/2: sent %q, want %q", got, target)
		}
	}
}

func FuzzRequestURL(f *testing.F) {
	for _, target := range oddTargets {
		f.Add(target)
	}
	for _, target := range []string{"", "*", "a", "http://a.test/", "/a b", "/a\r\nHost: b", "//a|b", "//%zz", "/\x00", "?"} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		u, err := requestURL(target)
		if err != nil {
			return
		}
		u.Host = "a.test"
		// Both protocols of net/http send this.
		if got := u.RequestURI(); got != target {
			t.Errorf("%q goes out as %q", target, got)
		}
		if target[0] != '/' || strings.ContainsAny(target, " \t\r\n\x00\x7f") {
			t.Errorf("%q is taken", target)
		}
	})
}

func TestPrepareRefuses(t *testing.T) {
	c := newTestClient(t, nil, nil)
	good := Request{Destination: "127.0.0.1:1", Method: "GET", Target: "/"}
	for name, change := range map[string]func(*Request){
		"no target":           func(r *Request) { r.Target = "" },
		"relative target":     func(r *Request) { r.Target = "a" },
		"absolute target":     func(r *Request) { r.Target = "https://a.test/" },
		"asterisk":            func(r *Request) { r.Target = "*" },
		"blank in the target": func(r *Request) { r.Target = "/a HTTP/1.1" },
		"line in the target":  func(r *Request) { r.Target = "/a\r\nX: y" },
		"bad escape after //": func(r *Request) { r.Target = "//%zz" },
		"odd byte after //":   func(r *Request) { r.Target = "//a|b" },
		"CONNECT":             func(r *Request) { r.Method = "CONNECT" },
		"blank in the method": func(r *Request) { r.Method = "GET /x" },
		"no method":           func(r *Request) { r.Method = "" },
		"bad header name":     func(r *Request) { r.Header = http.Header{"A b": {"x"}} },
		"bad header value":    func(r *Request) { r.Header = http.Header{"Authorization": {"secret\r\nX: y"}} },
		"size without body":   func(r *Request) { r.Size = 5 },
	} {
		r := good
		change(&r)
		_, err := c.Do(testContext(t), &r, func() { t.Errorf("%s: connected", name) })
		wantFailure(t, err, matrix.FailLocal, OpPrepare)
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error tells a header's value: %v", name, err)
		}
	}
	if s := c.Stats(); s.Dials != 0 {
		t.Errorf("%d connections for requests that cannot be sent", s.Dials)
	}
}

func TestHeadersAreSentAsGiven(t *testing.T) {
	heads := make(chan []string, 1)
	h1 := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		heads <- head(r)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	}, "a.test")
	requests := make(chan *http.Request, 1)
	h2 := web(t, true, func(w http.ResponseWriter, r *http.Request) { requests <- r.Clone(context.Background()) }, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": h1, "a.test:2": h2}, nil)
	do := func(dest matrix.ServerName, h http.Header) {
		t.Helper()
		before := h.Clone()
		resp, err := c.Do(testContext(t), &Request{Destination: dest, Method: "GET", Target: "/", Header: h}, nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if !reflect.DeepEqual(h, before) {
			t.Errorf("the caller's header was changed to %v", h)
		}
	}
	// Nothing of net/http's own: no User-Agent, no Accept-Encoding.
	do("a.test:1", nil)
	if got := strings.Join(<-heads, "\n"); got != "GET / HTTP/1.1\nHost: a.test:1" {
		t.Errorf("HTTP/1.1: %s", got)
	}
	do("a.test:2", nil)
	if r := <-requests; r.Host != "a.test:2" || len(r.Header) != 0 || r.ProtoMajor != 2 {
		t.Errorf("HTTP/2: host %q, header %v, %s", r.Host, r.Header, r.Proto)
	}

	given := http.Header{
		"Authorization":       {`X-Matrix origin="o",key="ed25519:1",sig="x"`, `X-Matrix origin="o",key="ed25519:2",sig="y"`},
		"User-Agent":          {"Synapse/1.160"},
		"Content-Type":        {"application/json"},
		"Connection":          {"close, X-Hop"},
		"X-Hop":               {"1"},
		"Proxy-Authorization": {"Bearer secret"},
		"Proxy-Connection":    {"keep-alive"},
		"Keep-Alive":          {"1"},
		"Transfer-Encoding":   {"chunked"},
		"Content-Length":      {"7"},
		"Te":                  {"trailers"},
		"Trailer":             {"X"},
		"Upgrade":             {"h2c"},
		"Expect":              {"100-continue"},
		"Host":                {"b.test"},
	}
	do("a.test:1", given)
	lines := <-heads
	want := map[string]bool{"GET / HTTP/1.1": true, "Host: a.test:1": true, "User-Agent: Synapse/1.160": true, "Content-Type: application/json": true,
		"Authorization: " + given["Authorization"][0]: true, "Authorization: " + given["Authorization"][1]: true}
	for _, l := range lines {
		if !want[l] {
			t.Errorf("HTTP/1.1: line %q", l)
		}
	}
	if len(lines) != len(want) {
		t.Errorf("HTTP/1.1: %d lines, want %d: %q", len(lines), len(want), lines)
	}
	do("a.test:2", given)
	r := <-requests
	if wantHeader := (http.Header{"Authorization": given["Authorization"], "User-Agent": given["User-Agent"],
		"Content-Type": given["Content-Type"]}); !reflect.DeepEqual(r.Header, wantHeader) {
		t.Errorf("HTTP/2: %v, want %v", r.Header, wantHeader)
	}
}

func TestBodiesAreSentAsGiven(t *testing.T) {
	type got struct {
		body   string
		length int64
		coding []string
		proto  int
	}
	bodies := make(chan got, 1)
	handler := func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		bodies <- got{string(b), r.ContentLength, r.TransferEncoding, r.ProtoMajor}
	}
	c := newTestClient(t, map[string]string{"a.test:1": web(t, false, handler, "a.test"), "a.test:2": web(t, true, handler, "a.test")}, nil)
	large := strings.Repeat("large ", 100_000)
	for _, tt := range []struct {
		name, method string
		body         io.Reader
		size         int64
		want         string
		length       int64
	}{
		{"none", "POST", nil, 0, "", 0},
		{"empty", "PUT", strings.NewReader(""), 0, "", 0},
		{"small", "PUT", strings.NewReader("{}"), 2, "{}", 2},
		{"large", "PUT", strings.NewReader(large), int64(len(large)), large, int64(len(large))},
		{"with GET", "GET", strings.NewReader("{}"), 2, "{}", 2},
		{"unknown size", "POST", io.MultiReader(strings.NewReader("{"), strings.NewReader("}")), -1, "{}", -1},
	} {
		for proto, dest := range map[int]matrix.ServerName{1: "a.test:1", 2: "a.test:2"} {
			if s, ok := tt.body.(*strings.Reader); ok {
				_, _ = s.Seek(0, io.SeekStart)
			}
			if tt.size < 0 {
				tt.body = io.MultiReader(strings.NewReader("{"), strings.NewReader("}"))
			}
			resp, err := c.Do(testContext(t), &Request{Destination: dest, Method: tt.method, Target: "/", Body: tt.body, Size: tt.size}, nil)
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			_ = resp.Body.Close()
			if g := <-bodies; g.body != tt.want || g.length != tt.length || g.proto != proto {
				t.Errorf("%s over HTTP/%d: %d bytes, length %d %v, HTTP/%d", tt.name, proto, len(g.body), g.length, g.coding, g.proto)
			}
		}
	}
}

// closingReader counts what is done to it, and fails the test if it is read
// after Do said that it will not be.
type closingReader struct {
	io.Reader
	t      testing.TB
	closed atomic.Int64
	off    atomic.Bool
}

func (r *closingReader) Read(p []byte) (int, error) {
	if r.off.Load() {
		r.t.Error("a body is read that is no longer the client's")
	}
	return r.Reader.Read(p)
}
func (r *closingReader) Close() error { r.closed.Add(1); return nil }

func TestBodiesThatAreNotAsPromised(t *testing.T) {
	goroutines(t)
	silentLogs(t)
	handler := func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }
	static := map[string]string{"a.test:1": web(t, false, handler, "a.test"), "a.test:2": web(t, true, handler, "a.test")}
	c := newTestClient(t, static, nil)
	broken := errors.New("disk on fire")
	for name, tt := range map[string]struct {
		body io.Reader
		size int64
	}{
		"short":                   {strings.NewReader("123"), 5},
		"empty":                   {strings.NewReader(""), 5},
		"broken":                  {io.MultiReader(strings.NewReader("12"), iotestErrReader{broken}), 5},
		"broken, of unknown size": {io.MultiReader(strings.NewReader("12"), iotestErrReader{broken}), -1},
	} {
		for _, dest := range []matrix.ServerName{"a.test:1", "a.test:2"} {
			if s, ok := tt.body.(*strings.Reader); ok {
				_, _ = s.Seek(0, io.SeekStart)
			} else {
				tt.body = io.MultiReader(strings.NewReader("12"), iotestErrReader{broken})
			}
			body := &closingReader{Reader: tt.body, t: t}
			_, err := c.Do(testContext(t), &Request{Destination: dest, Method: "PUT", Target: "/", Body: body, Size: tt.size}, nil)
			body.off.Store(true)
			wantFailure(t, err, matrix.FailLocal, OpPrepare)
			if strings.HasPrefix(name, "broken") && !errors.Is(err, broken) {
				t.Errorf("%s: %v", name, err)
			}
			if body.closed.Load() != 1 {
				t.Errorf("%s, %s: closed %d times", name, dest, body.closed.Load())
			}
		}
	}
	// One that is too long may have been answered before that is noticed. No more
	// than its size is sent.
	for dest := range static {
		resp, err := c.Do(testContext(t), &Request{Destination: matrix.ServerName(dest), Method: "PUT", Target: "/", Body: strings.NewReader("1234567"), Size: 5}, nil)
		if err != nil {
			wantFailure(t, err, matrix.FailLocal, OpPrepare)
			continue
		}
		_ = resp.Body.Close()
	}
	// Closed also when there was no attempt.
	body := &closingReader{t: t}
	_, err := c.Do(testContext(t), &Request{Destination: "missing.test:1", Method: "PUT", Target: "/", Body: body, Size: 5}, nil)
	wantFailure(t, err, matrix.FailNoName, OpResolve)
	if body.closed.Load() != 1 {
		t.Errorf("no such name: closed %d times", body.closed.Load())
	}
}

type iotestErrReader struct{ err error }

func (r iotestErrReader) Read([]byte) (int, error) { return 0, r.err }

// TestBodyIsLeftAlone: an answer may come before the body has been sent, and
// the caller may then want its buffer back.
func TestBodyIsLeftAlone(t *testing.T) {
	goroutines(t)
	early := func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(403)
		_, _ = io.WriteString(w, "no")
	}
	c := newTestClient(t, map[string]string{"a.test:1": web(t, false, early, "a.test"), "a.test:2": web(t, true, early, "a.test")}, nil)
	for _, dest := range []matrix.ServerName{"a.test:1", "a.test:2"} {
		const size = 1 << 30
		body := &closingReader{Reader: io.LimitReader(zeros{}, size), t: t}
		resp, err := c.Do(testContext(t), &Request{Destination: dest, Method: "PUT", Target: "/", Body: body, Size: size}, nil)
		if err != nil {
			// The answer may get lost in the reset that sending on provokes.
			body.off.Store(true)
			wantFailure(t, err, matrix.FailReset, OpRequest)
			continue
		}
		_, _ = io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		body.off.Store(true)
		if resp.StatusCode != 403 {
			t.Errorf("status %d", resp.StatusCode)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestOnce: whatever the remote does, it sees such a request once.
func TestOnce(t *testing.T) {
	silentLogs(t)
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			var seen atomic.Int64
			addr := web(t, http2, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/once" {
					_, _ = io.Copy(io.Discard, r.Body)
					seen.Add(1)
					panic(http.ErrAbortHandler)
				}
				ok(w, r)
			}, "a.test")
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			for i, r := range []Request{
				{Method: "POST", Size: 2},
				{Method: "POST"},
				{Method: "GET"},
				{Method: "GET", Header: http.Header{"Idempotency-Key": {"1"}}},
				{Method: "POST", Header: http.Header{"X-Idempotency-Key": {"1"}}},
			} {
				get(t, c, "a.test:1", "/") // leaves a connection to reuse
				r.Destination, r.Target, r.Once = "a.test:1", "/once", true
				if r.Size > 0 {
					r.Body = strings.NewReader("{}")
					r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("{}")), nil }
				}
				connected := 0
				_, err := c.Do(testContext(t), &r, func() { connected++ })
				wantFailure(t, err, matrix.FailReset, OpRequest)
				if seen.Load() != int64(i+1) || connected != 1 {
					t.Errorf("%s %v: seen %d times, connected %d times", r.Method, r.Header, seen.Load()-int64(i), connected)
				}
				seen.Store(int64(i + 1))
			}
		})
	}
}

// TestOnceIsClosedAfterReading has a remote that takes the request and hangs up.
func TestOnceIsClosedAfterReading(t *testing.T) {
	var seen atomic.Int64
	addr := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		if head(r) != nil {
			seen.Add(1)
		}
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	_, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/", Once: true}, nil)
	wantFailure(t, err, matrix.FailReset, OpRequest)
	var e *Error
	if errors.As(err, &e); e.Unsent || seen.Load() != 1 {
		t.Errorf("seen %d times, unsent %v", seen.Load(), e.Unsent)
	}
}

// TestKeptConnections: a remote closes one in the moment in which it is used
// again.
func TestKeptConnections(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
	body := func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("{}")), nil }
	for _, tt := range []struct {
		name    string
		second  string // what the remote says to the second request on a connection
		request Request
		failure matrix.Failure
		seen    int64 // requests in all
	}{
		{"without a body it is sent again", "", Request{Method: "GET"}, 0, 3},
		{"a POST as well", "", Request{Method: "POST"}, 0, 3},
		{"with a body that can be opened again", "", Request{Method: "PUT", Body: strings.NewReader("{}"), Size: 2, GetBody: body}, 0, 3},
		{"a body that cannot takes a new connection", "", Request{Method: "PUT", Body: strings.NewReader("{}"), Size: 2}, 0, 2},
		{"nor once something came back", "HTTP/1.1 200 OK\r\nX: y\r\n", Request{Method: "GET"}, matrix.FailReset, 2},
		{"nor once it is nonsense", "nonsense\r\n\r\n", Request{Method: "GET"}, matrix.FailProtocol, 2},
		{"nor inside the answer", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{", Request{Method: "GET"}, matrix.FailCut, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seen atomic.Int64
			addr := raw(t, func(c *tls.Conn, r *bufio.Reader) {
				for i := 0; ; i++ {
					lines := head(r)
					if lines == nil {
						return
					}
					if !strings.HasPrefix(lines[0], "GET") && tt.request.Size > 0 {
						_, _ = r.Discard(2)
					}
					seen.Add(1)
					if i > 0 {
						_, _ = io.WriteString(c, tt.second)
						return
					}
					_, _ = io.WriteString(c, answer)
				}
			}, "a.test")
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			get(t, c, "a.test:1", "/")
			r := tt.request
			r.Destination, r.Target = "a.test:1", "/"
			connected := 0
			resp, err := c.Do(testContext(t), &r, func() { connected++ })
			if err == nil {
				_, err = io.ReadAll(resp.Body)
				_ = resp.Body.Close()
			}
			if FailureOf(err) != tt.failure || seen.Load() != tt.seen {
				t.Errorf("%v (%v), seen %d times; want %v, %d", err, FailureOf(err), seen.Load(), tt.failure, tt.seen)
			}
			if want := int64(connected + 1); c.Stats().Dials != want {
				t.Errorf("connected told of %d connections, there were %d", connected, c.Stats().Dials-1)
			}
		})
	}
}

// TestNewConnectionsAreNotTriedTwice: nothing is repeated there.
func TestNewConnectionsAreNotTriedTwice(t *testing.T) {
	var seen atomic.Int64
	addr := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		head(r)
		seen.Add(1)
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	_, _, err := tryGet(testContext(t), c, "a.test:1", "/")
	wantFailure(t, err, matrix.FailReset, OpRequest)
	if seen.Load() != 1 {
		t.Errorf("seen %d times", seen.Load())
	}
}

func TestConnected(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			addr := web(t, http2, func(w http.ResponseWriter, r *http.Request) { <-release }, "a.test")
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			for i, want := range []int{1, 0} {
				connected := make(chan struct{}, 5)
				done := make(chan error)
				go func() {
					resp, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/"}, func() { connected <- struct{}{} })
					if err == nil {
						_ = resp.Body.Close()
					}
					done <- err
				}()
				if want == 1 {
					<-connected // before there is an answer
				}
				release <- struct{}{}
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if len(connected) != 0 {
					t.Errorf("request %d: told of a connection too many", i)
				}
			}
		})
	}
	c := newTestClient(t, map[string]string{"a.test:1": "127.0.0.1:1"}, nil)
	_, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/"}, func() { t.Error("connected to nothing") })
	wantFailure(t, err, matrix.FailRefused, OpConnect)
}

// TestConnectedComesFirst: nothing of a request goes out on a new connection
// before the caller knows of it, nor is there a call for a kept one.
func TestConnectedComesFirst(t *testing.T) {
	var told atomic.Bool
	early := func(what string) {
		if !told.Load() {
			t.Errorf("%s: a byte of the request came before connected had returned", what)
		}
	}
	h1 := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		for {
			if _, err := r.Peek(1); err != nil {
				return
			}
			early("HTTP/1.1")
			if head(r) == nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	}, "a.test")
	h2 := web(t, true, func(http.ResponseWriter, *http.Request) { early("HTTP/2") }, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": h1, "a.test:2": h2}, nil)
	for _, dest := range []matrix.ServerName{"a.test:1", "a.test:2"} {
		told.Store(false)
		for i, want := range []int{1, 0, 0} {
			calls := 0
			resp, err := c.Do(testContext(t), &Request{Destination: dest, Method: "GET", Target: "/"}, func() {
				calls++
				time.Sleep(50 * time.Millisecond) // for what would be on its way
				told.Store(true)
			})
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if calls != want {
				t.Errorf("%s, request %d: told of %d connections, want %d", dest, i, calls, want)
			}
		}
	}
}

// TestWhatMayHaveArrivedIsNotUnsent: a request that a kept connection took away
// with it may have arrived, even if the remote cannot be reached any more when
// it is to be sent again.
func TestWhatMayHaveArrivedIsNotUnsent(t *testing.T) {
	var seen atomic.Int64
	addr := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		head(r)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
		if head(r) != nil {
			seen.Add(1)
		}
	}, "a.test")
	for _, tt := range []struct {
		name string
		err  error // of the second connect
		want matrix.Failure
	}{
		{"refused", errno(syscall.ECONNREFUSED), matrix.FailReset},
		{"unreachable", errno(syscall.EHOSTUNREACH), matrix.FailReset},
		{"timed out", errno(syscall.ETIMEDOUT), matrix.FailTimeout},
		{"no file descriptors", errno(syscall.EMFILE), matrix.FailLocal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			get(t, c, "a.test:1", "/")
			c.dialer.connectTo = func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, tt.err }
			seen.Store(0)
			_, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/"}, func() { t.Error("connected") })
			wantFailure(t, err, tt.want, OpRequest)
			var e *Error
			if errors.As(err, &e); e.Unsent || e.Failure.NeverConnected() || seen.Load() != 1 {
				t.Errorf("unsent %t, never connected %t, seen %d times", e.Unsent, e.Failure.NeverConnected(), seen.Load())
			}
			if !errors.Is(err, tt.err) {
				t.Errorf("the error does not say why it was not sent again: %v", err)
			}
		})
	}
}

// TestSentErrors: what breaks a request under way never reads like a connect
// that failed.
func TestSentErrors(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want matrix.Failure
	}{
		{&net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.EHOSTUNREACH)}, matrix.FailReset},
		{&net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("write", syscall.EPERM)}, matrix.FailReset},
		{&net.OpError{Op: "remote error", Err: tls.AlertError(80)}, matrix.FailProtocol},
		{io.EOF, matrix.FailReset},
		{errno(syscall.ETIMEDOUT), matrix.FailTimeout},
	} {
		e := sentError(t.Context(), tt.err, false)
		if e.Failure != tt.want || e.Unsent || e.Op != OpRequest {
			t.Errorf("%v: %v in step %s, unsent %t; want %v", tt.err, e.Failure, e.Op, e.Unsent, tt.want)
		}
	}
	for f := range matrix.NumFailures {
		if e := sentError(t.Context(), &Error{Failure: f, Err: io.EOF}, false); e.Failure.NeverConnected() {
			t.Errorf("%v becomes %v, which says that nothing was sent", f, e.Failure)
		}
	}
}

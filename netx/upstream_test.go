package netx

import (
	"bufio"
	"context"
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
	"testing"
	"time"

	"fsbus/bus/matrix"
)

func newTestUpstream(t testing.TB, address string, change func(*UpstreamConfig)) *Upstream {
	t.Helper()
	c := UpstreamConfig{Address: address}
	if change != nil {
		change(&c)
	}
	u, err := NewUpstream(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		u.CloseIdle()
		if s := u.Stats(); s.Active != 0 {
			t.Errorf("left over: %+v", s)
		}
	})
	return u
}

// wireHomeserver answers each request on a connection as answer says, after
// having put the head and the body into heads.
func wireHomeserver(t testing.TB, heads chan<- string, answer string) string {
	return "http://" + tcp(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			lines := head(r)
			if lines == nil {
				return
			}
			n := 0
			for _, l := range lines {
				fmt.Sscanf(l, "Content-Length: %d", &n)
			}
			body := make([]byte, n)
			if _, err := io.ReadFull(r, body); err != nil {
				return
			}
			heads <- strings.Join(lines, "\n") + "\n\n" + string(body)
			io.WriteString(c, answer)
		}
	})
}

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

func putRequest(target, body string) *UpstreamRequest {
	return &UpstreamRequest{Method: "PUT", Target: target, Size: int64(len(body)), Body: strings.NewReader(body),
		GetBody: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(body)), nil }}
}

func drain(t testing.TB, res *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return string(b)
}

func TestUpstreamSendsWhatItGot(t *testing.T) {
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	heads := make(chan string, 100)
	u := newTestUpstream(t, wireHomeserver(t, heads, okAnswer), nil)
	for _, target := range append(edgeTargets, "//double/slash?x=%zz") {
		r := putRequest(target, "{}")
		r.Host = "hs1.test:8448"
		r.Header = http.Header{"Authorization": {"X-Matrix a", "X-Matrix b"}, "X-Forwarded-For": {"1.2.3.4"}, "X-Forwarded-Proto": {"https"},
			"Connection": {"x-gone"}, "X-Gone": {"1"}, "Proxy-Authorization": {"secret"}, "Accept-Encoding": {"gzip"}, "Expect": {"100-continue"}, "Host": {"evil"}}
		res, err := u.Do(testContext(t), r)
		if err != nil {
			t.Fatal(err)
		}
		if got := drain(t, res); got != "{}" || res.StatusCode != 200 {
			t.Errorf("%v %q", res, got)
		}
		want := "PUT " + target + " HTTP/1.1\nHost: hs1.test:8448\nContent-Length: 2\nAccept-Encoding: gzip\nAuthorization: X-Matrix a\nAuthorization: X-Matrix b\nX-Forwarded-For: 1.2.3.4\nX-Forwarded-Proto: https\n\n{}"
		if got := <-heads; got != want {
			t.Errorf("sent %q", got)
		}
	}
	if s := u.Stats(); s.Dials != 1 || s.Idle != 1 || s.PeakActive != 1 || s.Reused != int64(len(edgeTargets)) {
		t.Errorf("%+v", s)
	}
}

func TestUpstreamAnswersAsTheyAre(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
		"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nnope\r\n0\r\n\r\n",
	} {
		u := newTestUpstream(t, wireHomeserver(t, make(chan string, 1), answer), nil)
		res, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/x"})
		if err != nil {
			t.Fatal(err)
		}
		if body := drain(t, res); !strings.Contains(answer, res.Status) || body != "" && body != "nope" || strings.Contains(answer, "gzip") != (res.Header.Get("Content-Encoding") == "gzip") {
			t.Errorf("%v %q", res, body)
		}
	}
}

func TestUpstreamUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln := must(net.Listen("unix", path))
	server := &http.Server{Handler: http.HandlerFunc(ok)}
	go server.Serve(ln)
	u := newTestUpstream(t, "unix:"+path, nil)
	res, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/x"})
	if err != nil || drain(t, res) != "{}" {
		t.Fatal(err)
	}
	server.Close() // which removes the socket
	eventually(t, "down", func() bool {
		_, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/x"})
		return errors.Is(err, ErrUpstreamDown)
	})
}

func TestUpstreamDown(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	addr := ln.Addr().String()
	ln.Close()
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l := must(net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"}))
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, address := range []string{"http://" + addr, "unix:" + filepath.Join(dir, "none"), "unix:" + stale} {
		var log lockedBuffer
		u := newTestUpstream(t, address, func(c *UpstreamConfig) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		for range 3 {
			_, err := u.Do(testContext(t), putRequest("/x", "{}"))
			var e *Error
			if !errors.Is(err, ErrUpstreamDown) || !errors.As(err, &e) || !e.Unsent || e.Op != OpConnect {
				t.Errorf("%s: %v", address, err)
			}
		}
		if n := strings.Count(log.String(), "cannot be reached"); n != 1 || !u.Stats().Down {
			t.Errorf("%d log lines, %+v", n, u.Stats())
		}
		if network, path, _ := upstreamAddress(address); network == "unix" {
			os.Remove(path)
			ln := must(net.Listen("unix", path))
			server := &http.Server{Handler: http.HandlerFunc(ok)}
			go server.Serve(ln)
			defer server.Close()
			res, err := u.Do(testContext(t), putRequest("/x", "{}"))
			if err != nil || drain(t, res) != "{}" || u.Stats().Down || !strings.Contains(log.String(), "answers again") {
				t.Errorf("%v %s", err, log.String())
			}
		}
	}
}

func TestUpstreamAddress(t *testing.T) {
	for in, want := range map[string]string{
		"http://127.0.0.1:8008":  "tcp 127.0.0.1:8008",
		"http://[::1]:8008/":     "tcp [::1]:8008",
		"http://synapse":         "tcp synapse:80",
		"unix:/run/synapse.sock": "unix /run/synapse.sock",
		"":                       "", "127.0.0.1:8008": "", "https://127.0.0.1:8448": "", "http://": "", "http://:80": "", "http://a/b": "", "http://a?b": "",
		"http://u@a": "", "unix:relative": "", "unix:/" + strings.Repeat("x", 107): "", "http://a b": "", "http://a:b": "",
	} {
		network, address, err := upstreamAddress(in)
		if got := network + " " + address; (err != nil) != (want == "") || err == nil && got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
		if _, err := NewUpstream(UpstreamConfig{Address: in}); (err != nil) != (want == "") {
			t.Errorf("%q: %v", in, err)
		}
	}
}

// Of many requests as many run at a time as there are connections, over which
// they all go.
func TestUpstreamMaxConns(t *testing.T) {
	const conns, requests = 3, 30
	var open, most, now, mostNow atomic.Int32
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mostNow.Store(max(mostNow.Load(), now.Add(1)))
			io.Copy(io.Discard, r.Body)
			now.Add(-1)
			io.WriteString(w, "{}")
		}),
		ConnState: func(_ net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				most.Store(max(most.Load(), open.Add(1)))
			case http.StateClosed:
				open.Add(-1)
			}
		},
	}
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	go server.Serve(ln)
	t.Cleanup(func() { server.Close() })
	u := newTestUpstream(t, "http://"+ln.Addr().String(), func(c *UpstreamConfig) { c.MaxConns = conns })
	var wg sync.WaitGroup
	for range requests {
		wg.Go(func() {
			res, err := u.Do(testContext(t), putRequest("/x", "{}"))
			if err != nil {
				t.Error(err)
				return
			}
			drain(t, res)
		})
	}
	wg.Wait()
	if s := u.Stats(); s.PeakActive != conns || s.Dials > conns || s.Reused+s.Dials != requests || s.Idle > conns || most.Load() > conns || mostNow.Load() > conns {
		t.Errorf("%+v, %d connections, %d at a time", s, most.Load(), mostNow.Load())
	}
}

// Whoever finds no free connection in time is told that it is our own limit.
func TestUpstreamPlaces(t *testing.T) {
	u := newTestUpstream(t, wireHomeserver(t, make(chan string, 9), okAnswer), func(c *UpstreamConfig) { c.MaxConns = 1 })
	res, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = u.Do(ctx, putRequest("/y", "{}"))
	wantFailure(t, err, matrix.FailLocal, OpConnect)
	if e, _ := errors.AsType[*Error](err); !e.Unsent {
		t.Error("may have been sent")
	}
	res.Body.Close() // unread: the connection is not kept, the place is free
	res, err = u.Do(testContext(t), putRequest("/z", "{}"))
	if err != nil || drain(t, res) != "{}" {
		t.Fatal(err)
	}
}

// staleHomeserver closes each connection with the second request on it, having
// read it, and having answered part of it if before is set.
func staleHomeserver(t testing.TB, before string, seen chan<- string) string {
	return "http://" + tcp(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		for i := range 2 {
			lines := head(r)
			if lines == nil {
				return
			}
			n := 0
			for _, l := range lines {
				fmt.Sscanf(l, "Content-Length: %d", &n)
			}
			io.CopyN(io.Discard, r, int64(n))
			seen <- lines[0]
			if i == 0 {
				io.WriteString(c, okAnswer)
			} else {
				io.WriteString(c, before)
			}
		}
	})
}

func TestUpstreamStaleConnection(t *testing.T) {
	for _, test := range []struct {
		name, before string
		request      *UpstreamRequest
		ok           bool
	}{
		{"GET", "", &UpstreamRequest{Method: "GET", Target: "/x"}, true},
		{"PUT with GetBody", "", putRequest("/x", "{}"), true},
		{"PUT with GetBody alone", "", func() *UpstreamRequest { r := putRequest("/x", "{}"); r.Body = nil; return r }(), true},
		{"PUT without", "", &UpstreamRequest{Method: "PUT", Target: "/x", Size: 2, Body: strings.NewReader("{}")}, false},
		{"begun answer", "HTTP/1.1 2", putRequest("/x", "{}"), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			seen := make(chan string, 10)
			u := newTestUpstream(t, staleHomeserver(t, test.before, seen), nil)
			var first []*http.Response
			for range 2 { // at a time, on two connections
				res, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/first"})
				if err != nil {
					t.Fatal(err)
				}
				first = append(first, res)
			}
			for _, res := range first {
				drain(t, res)
			}
			res, err := u.Do(testContext(t), test.request)
			if (err == nil) != test.ok {
				t.Fatal(err)
			}
			want, repeats := 3, int64(0)
			if test.ok {
				drain(t, res)
				want, repeats = 4, 1
				if n := u.Stats().Idle; n != 1 {
					t.Errorf("%d connections are kept: the other old one is as stale", n)
				}
			} else if e, ok := errors.AsType[*Error](err); !ok || e.Unsent || e.Failure.NeverConnected() {
				t.Errorf("%v", err)
			}
			if len(seen) != want || u.Stats().Repeats != repeats {
				t.Errorf("the homeserver saw %d requests, %d repeats", len(seen), u.Stats().Repeats)
			}
		})
	}
}

// A request that got no answer on a kept connection, and for which no other one
// can be had, may have arrived.
func TestUpstreamStaleThenDown(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	served := make(chan struct{})
	go func() {
		defer close(served)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		r := bufio.NewReader(c)
		head(r)
		io.WriteString(c, okAnswer)
		head(r)
		ln.Close()
	}()
	u := newTestUpstream(t, "http://"+ln.Addr().String(), nil)
	res, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	drain(t, res)
	_, err = u.Do(testContext(t), putRequest("/x", "{}"))
	if e, ok := errors.AsType[*Error](err); !ok || e.Unsent || !errors.Is(err, ErrUpstreamDown) {
		t.Errorf("%v", err)
	}
	<-served
}

func TestUpstreamTimeouts(t *testing.T) {
	reached := make(chan struct{}, 10)
	release := make(chan struct{})
	server := tcp(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		if l := head(r); l == nil {
			return
		} else if strings.Contains(l[0], "/body") {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
		}
		reached <- struct{}{}
		<-release
	})
	defer close(release)
	u := newTestUpstream(t, "http://"+server, func(c *UpstreamConfig) {
		c.HeaderTimeout = 20 * time.Millisecond
		c.StallTimeout = 20 * time.Millisecond
	})
	_, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/x"})
	wantFailure(t, err, matrix.FailTimeout, OpRequest)
	<-reached

	res, err := u.Do(testContext(t), &UpstreamRequest{Method: "GET", Target: "/body"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.ReadAll(res.Body)
	wantFailure(t, err, matrix.FailCut, OpBody)
	res.Body.Close()
	<-reached

	u.cfg.HeaderTimeout = 0
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-reached; cancel() }()
	_, err = u.Do(ctx, &UpstreamRequest{Method: "GET", Target: "/x"})
	wantFailure(t, err, matrix.FailCancelled, OpRequest)
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = u.Do(ctx, &UpstreamRequest{Method: "GET", Target: "/x"})
	wantFailure(t, err, matrix.FailTimeout, OpRequest)
}

func TestUpstreamRefusesToSend(t *testing.T) {
	u := newTestUpstream(t, "http://127.0.0.1:1", nil)
	for _, r := range []*UpstreamRequest{
		{Method: "CONNECT", Target: "/x"},
		{Method: "G T", Target: "/x"},
		{Method: "GET", Target: "x"},
		{Method: "GET", Target: "/x y"},
		{Method: "GET", Target: "/x\r\nA: b"},
		{Method: "GET", Target: "/x", Host: "a b"},
		{Method: "GET", Target: "/x", Header: http.Header{"A b": {"c"}}},
		{Method: "GET", Target: "/x", Header: http.Header{"A": {"b\r\nc: d"}}},
		{Method: "PUT", Target: "/x", Size: 2},
	} {
		_, err := u.Do(testContext(t), r)
		wantFailure(t, err, matrix.FailLocal, OpPrepare)
	}
}

// The edge and the upstream together: what comes in goes out as it was, and the
// answer back.
func TestEdgeToUpstream(t *testing.T) {
	heads := make(chan string, 10)
	u := newTestUpstream(t, wireHomeserver(t, heads, okAnswer), nil)
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.TLS = testCertificates(t)
		c.Handle = func(q *EdgeRequest) {
			defer q.Release()
			h := q.Header.Clone()
			h.Set("X-Forwarded-For", q.Client.String())
			h.Set("X-Forwarded-Proto", "https")
			r := &UpstreamRequest{Method: q.Method, Target: q.Target, Host: q.Host, Header: h, Size: q.Size}
			if q.Body != nil {
				r.GetBody = func() (io.ReadCloser, error) { return q.Body.Reader(), nil }
			}
			res, err := u.Do(t.Context(), r)
			if err != nil {
				t.Error(err)
				q.Abort()
				return
			}
			defer res.Body.Close()
			if err := q.Stream(res.StatusCode, res.Header, res.ContentLength, res.Body); err != nil {
				t.Error(err)
			}
		}
	})
	c := et.dialTLS()
	write(t, c, "PUT /_matrix/federation/v1/send/1%2F?a=%20 HTTP/1.1\r\nHost: hs1.test\r\nAuthorization: X-Matrix a\r\nAuthorization: X-Matrix b\r\nContent-Type: application/json\r\nX-Forwarded-For: 6.6.6.6\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
	if res, body := readReply(t, bufio.NewReader(c), "PUT"); res.StatusCode != 200 || body != "{}" {
		t.Errorf("%v %q", res, body)
	}
	want := "PUT /_matrix/federation/v1/send/1%2F?a=%20 HTTP/1.1\nHost: hs1.test\nContent-Length: 2\nAuthorization: X-Matrix a\nAuthorization: X-Matrix b\nContent-Type: application/json\nX-Forwarded-For: 127.0.0.1\nX-Forwarded-Proto: https\n\n{}"
	if got := <-heads; got != want {
		t.Errorf("sent %q", got)
	}
}

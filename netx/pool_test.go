package netx

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// TestIdleConnectionsAreBounded sends a request to each of many servers, as a
// message to a large room does. The Transport's own pool would leave one HTTP/2
// connection open for each.
func TestIdleConnectionsAreBounded(t *testing.T) {
	const servers, maxIdle = 120, 8
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			goroutines(t)
			addr := web(t, http2, ok, "a.test")
			static := map[string]string{}
			for i := range servers {
				static[fmt.Sprintf("a.test:%d", i+1)] = addr
			}
			c := newTestClient(t, static, func(c *ClientConfig) { c.MaxIdle = maxIdle })
			before := runtime.NumGoroutine()
			for dest := range static {
				get(t, c, dest, "/")
				if s := c.Stats(); s.Idle > maxIdle || s.Open > maxIdle+2 {
					t.Fatalf("%d idle, %d open, bound %d", s.Idle, s.Open, maxIdle)
				}
			}
			eventually(t, "no more connections are open than are kept", func() bool { return c.Stats().Open == maxIdle })
			// Each has at most two goroutines here and, in this process, three at the server.
			eventually(t, "no more goroutines than they need", func() bool { return runtime.NumGoroutine() <= before+5*maxIdle })
			if s := c.Stats(); s.Idle != maxIdle || s.Dials != servers || s.PeakOpen > maxIdle+2 {
				t.Errorf("%+v", s)
			}
			c.CloseIdle()
			eventually(t, "CloseIdle closes all", func() bool { s := c.Stats(); return s.Open == 0 && s.Idle == 0 })
			if len(c.pool.conns) != 0 {
				t.Errorf("%d servers are still in the pool", len(c.pool.conns))
			}
		})
	}
}

// simultaneously does n requests to dest that are all under way at once.
func simultaneously(t *testing.T, c *Client, dest matrix.ServerName, n int, arrived, release chan struct{}) {
	t.Helper()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if _, _, err := tryGet(testContext(t), c, string(dest), "/"); err != nil {
				t.Error(err)
			}
		})
	}
	for range n {
		<-arrived
	}
	close(release)
	wg.Wait()
}

func TestIdleConnectionsPerHost(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	addr := web(t, false, func(http.ResponseWriter, *http.Request) { arrived <- struct{}{}; <-release }, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	simultaneously(t, c, "a.test:1", 10, arrived, release)
	eventually(t, "two are kept", func() bool { s := c.Stats(); return s.Open == 2 && s.Idle == 2 })
	if s := c.Stats(); s.PeakOpen != 10 {
		t.Errorf("%d connections for 10 requests over HTTP/1.1", s.PeakOpen)
	}
}

func TestRequestsShareAConnectionOfHTTP2(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	addr := web(t, true, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			arrived <- struct{}{}
			<-release
		}
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	get(t, c, "a.test:1", "/warm")
	simultaneously(t, c, "a.test:1", 50, arrived, release)
	if s := c.Stats(); s.Dials != 1 || s.Reused != 50 {
		t.Errorf("51 requests over HTTP/2: %+v", s)
	}
}

func TestConnectionsExpire(t *testing.T) {
	addr := web(t, true, ok, "a.test")
	static := map[string]string{"a.test:1": addr, "a.test:2": addr, "a.test:3": addr}
	c := newTestClient(t, static, func(c *ClientConfig) { c.IdleTimeout = 50 * time.Millisecond })
	for range 2 {
		for dest := range static {
			get(t, c, dest, "/")
		}
		eventually(t, "all are closed", func() bool { s := c.Stats(); return s.Open == 0 && s.Idle == 0 })
	}
	if c.pool.timer != nil {
		t.Error("a timer runs for nothing")
	}
}

func TestNothingIsKeptIfNothingMayBe(t *testing.T) {
	for name, change := range map[string]func(*ClientConfig){
		"MaxIdle":        func(c *ClientConfig) { c.MaxIdle = -1 },
		"MaxIdlePerHost": func(c *ClientConfig) { c.MaxIdlePerHost = -1 },
	} {
		c := newTestClient(t, map[string]string{"a.test:1": web(t, true, ok, "a.test")}, change)
		get(t, c, "a.test:1", "/")
		eventually(t, name, func() bool { s := c.Stats(); return s.Open == 0 && s.Idle == 0 })
	}
}

// TestClosedConnectionsAreNoticed: what the remote closes while it is kept is
// not used, and does not fill the pool.
func TestClosedConnectionsAreNoticed(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		var mu sync.Mutex
		var conns []net.Conn
		addr := web(t, http2, func(w http.ResponseWriter, r *http.Request) {}, "a.test")
		// A relay whose connections the test can cut.
		relay := tcp(t, func(c net.Conn) {
			up := must(net.Dial("tcp", addr))
			mu.Lock()
			conns = append(conns, c, up)
			mu.Unlock()
			go func() { _, _ = io.Copy(up, c); _ = up.Close() }()
			_, _ = io.Copy(c, up)
		})
		c := newTestClient(t, map[string]string{"a.test:1": relay}, nil)
		for i := range 5 {
			resp, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "PUT", Target: "/", Body: strings.NewReader("{}"), Size: 2,
				GetBody: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("{}")), nil }}, nil)
			if err != nil {
				t.Fatalf("%s: request %d: %v", name, i, err)
			}
			_ = resp.Body.Close()
			mu.Lock()
			for _, c := range conns {
				_ = c.Close()
			}
			conns = nil
			mu.Unlock()
			if i%2 == 0 { // in the other cases a race decides when it is noticed
				eventually(t, "our end is closed", func() bool { return c.Stats().Open == 0 })
			}
		}
		if s := c.Stats(); s.Dials != 5 || s.Idle > 2 {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestSuspectConnectionsAreLeft: an HTTP/2 connection on which a request got no
// answer gets no further ones, but those that run on it are left alone.
func TestSuspectConnectionsAreLeft(t *testing.T) {
	release := make(chan struct{})
	addr := web(t, true, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			_, _ = io.WriteString(w, "begun,")
			w.(http.Flusher).Flush()
			<-release
			_, _ = io.WriteString(w, "done")
		case "/never":
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		}
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	slow, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/slow"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct {
		end  func() (context.Context, context.CancelFunc)
		want matrix.Failure
	}{
		{func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 10*time.Millisecond)
		}, matrix.FailTimeout},
		{func() (context.Context, context.CancelFunc) { // which is how the caller may have its own time-outs
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			return ctx, cancel
		}, matrix.FailCancelled},
	} {
		ctx, cancel := tt.end()
		_, _, err = tryGet(ctx, c, "a.test:1", "/never")
		cancel()
		wantFailure(t, err, tt.want, OpRequest)
		get(t, c, "a.test:1", "/")
		if s := c.Stats(); s.Dials != int64(i+2) {
			t.Errorf("after %v: %+v", tt.want, s)
		}
	}
	close(release)
	if body, err := io.ReadAll(slow.Body); string(body) != "begun,done" || err != nil {
		t.Errorf("the other request: %q, %v", body, err)
	}
	_ = slow.Body.Close()
	eventually(t, "it is closed behind it", func() bool { return c.Stats().Open == 1 })
}

// TestDelegationsDoNotShare: a connection made for one certificate and Host
// header is not used for another, nor is one for "a.test" used for "a.test:443".
func TestPoolKeys(t *testing.T) {
	p := newPool(10, 2, time.Minute)
	key := poolKey{"a.test", "a.test", "a.test"}
	for _, other := range []poolKey{{"a.test:443", "a.test", "a.test"}, {"a.test", "b.test", "a.test"}, {"a.test", "a.test", "b.test"}} {
		if other == key {
			t.Errorf("%v is %v", other, key)
		}
	}
	if p.get(key) != nil {
		t.Error("a connection out of nothing")
	}
	defer func() {
		if recover() == nil {
			t.Error("a connection put back twice goes unnoticed")
		}
	}()
	p.put(&poolConn{}, true)
}

// TestAnswersThatWereNotRead: closing an answer's body early ends an HTTP/1
// connection and keeps an HTTP/2 one.
func TestAnswersThatWereNotRead(t *testing.T) {
	goroutines(t)
	endless := func(w http.ResponseWriter, r *http.Request) {
		for {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	}
	for open, http2 := range map[int64]bool{0: false, 1: true} {
		c := newTestClient(t, map[string]string{"a.test:1": web(t, http2, endless, "a.test")}, nil)
		resp, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.ReadFull(resp.Body, make([]byte, 1000))
		if s := c.Stats(); s.Idle != 0 || s.Open != 1 {
			t.Errorf("in use: %+v", s)
		}
		_ = resp.Body.Close()
		_ = resp.Body.Close()
		eventually(t, "it is kept, or not", func() bool { s := c.Stats(); return s.Open == open && s.Idle == int(open) })
	}
}

// TestManyAtOnce lets requests, time-outs, cancellations and evictions meet.
func TestManyAtOnce(t *testing.T) {
	goroutines(t)
	var n atomic.Int64
	handler := func(w http.ResponseWriter, r *http.Request) {
		switch n.Add(1) % 7 {
		case 0:
			panic(http.ErrAbortHandler)
		case 1:
			<-r.Context().Done()
		default:
			_, _ = io.WriteString(w, "{}")
		}
	}
	static := map[string]string{}
	for i := range 6 {
		static[fmt.Sprintf("a.test:%d", i+1)] = web(t, i%2 == 0, handler, "a.test")
	}
	c := newTestClient(t, static, func(c *ClientConfig) { c.MaxIdle, c.IdleTimeout = 3, 5*time.Millisecond })
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for j := range 20 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+(i+j)%20)*time.Millisecond)
				_, _, err := tryGet(ctx, c, fmt.Sprintf("a.test:%d", 1+(i+j)%6), "/")
				switch FailureOf(err) {
				case matrix.FailNone, matrix.FailReset, matrix.FailTimeout, matrix.FailCut:
				default:
					t.Error(err)
				}
				if c.Stats().Idle > 3 {
					t.Errorf("%d idle", c.Stats().Idle)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	c.CloseIdle()
	eventually(t, "everything is closed", func() bool { return c.Stats().Open == 0 })
	if len(c.pool.conns) != 0 || c.pool.idle.Len() != 0 {
		t.Errorf("the pool still has %d servers and %d idle", len(c.pool.conns), c.pool.idle.Len())
	}
}

// TestConnectionCloseIsHonoured: what the remote announces is believed.
func TestConnectionCloseIsHonoured(t *testing.T) {
	addr := raw(t, func(c *tls.Conn, r *bufio.Reader) {
		if head(r) != nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
		}
		_, _ = io.Copy(io.Discard, r)
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	for range 3 {
		get(t, c, "a.test:1", "/")
		if s := c.Stats(); s.Idle != 0 || s.Reused != 0 {
			t.Errorf("%+v", s)
		}
	}
}

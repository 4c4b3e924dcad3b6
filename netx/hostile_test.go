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
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// TestHostileRemotes is about every way in which a remote can misbehave once
// the handshake is done. The table is also where the texts of net/http's errors
// that classify knows are checked against the Go release in use.
func TestHostileRemotes(t *testing.T) {
	goroutines(t)
	silentLogs(t)
	// say answers the request's head with s, and waits for the client to go.
	say := func(s string) func(*tls.Conn, *bufio.Reader) {
		return func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = io.WriteString(c, s)
			_, _ = io.Copy(io.Discard, r)
		}
	}
	// cut is the same, and hangs up.
	cut := func(s string) func(*tls.Conn, *bufio.Reader) {
		return func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = io.WriteString(c, s)
		}
	}
	// endless repeats s for as long as it is taken.
	endless := func(begin, s string) func(*tls.Conn, *bufio.Reader) {
		return func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, err := io.WriteString(c, begin)
			for err == nil {
				_, err = io.WriteString(c, s)
			}
		}
	}
	const okHead = "HTTP/1.1 200 OK\r\n"
	const frames = "\x00\x00\x00\x04\x00\x00\x00\x00\x00" // HTTP/2: empty SETTINGS
	for _, tt := range []struct {
		name    string
		http2   bool
		serve   func(*tls.Conn, *bufio.Reader)
		failure matrix.Failure
		op      string
	}{
		{"hangs up", false, cut(""), matrix.FailReset, OpRequest},
		{"resets", false, func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_ = c.NetConn().(*net.TCPConn).SetLinger(0)
			_ = c.NetConn().Close()
		}, matrix.FailReset, OpRequest},
		{"is silent", false, say(""), matrix.FailTimeout, OpRequest},
		{"hangs up in the status line", false, cut("HTTP/1.1 20"), matrix.FailProtocol, OpRequest},
		{"hangs up in the header", false, cut(okHead + "X: y\r\n"), matrix.FailReset, OpRequest},
		{"hangs up in a header's line", false, cut(okHead + "X-Y"), matrix.FailProtocol, OpRequest},
		{"stops in the header", false, say(okHead + "X: y\r\n"), matrix.FailTimeout, OpRequest},
		{"speaks something else", false, cut("SSH-2.0-OpenSSH_9.9\r\n"), matrix.FailProtocol, OpRequest},
		{"sends a bad status", false, cut("HTTP/1.1 abc OK\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends a bad version", false, cut("HTTP/x 200 OK\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends a bad header", false, cut(okHead + "no colon\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends two lengths", false, cut(okHead + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n12"), matrix.FailProtocol, OpRequest},
		{"sends a bad length", false, cut(okHead + "Content-Length: -1\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends a bad coding", false, cut(okHead + "Transfer-Encoding: x\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends endless headers", false, endless(okHead, "X: "+strings.Repeat("x", 500)+"\r\n"), matrix.FailTooLarge, OpRequest},
		{"sends an endless line", false, endless(okHead+"X: ", strings.Repeat("x", 500)), matrix.FailTooLarge, OpRequest},
		{"continues for ever", false, endless("", "HTTP/1.1 100 Continue\r\n\r\n"), matrix.FailTooLarge, OpRequest},
		{"changes the protocol", false, say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends garbage in TLS", false, func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = c.NetConn().Write([]byte{23, 3, 3, 0, 32, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
				25, 26, 27, 28, 29, 30, 31, 32})
			_, _ = io.Copy(io.Discard, c.NetConn())
		}, matrix.FailTLS, OpRequest},

		{"cuts the body", false, cut(okHead + "Content-Length: 10\r\n\r\n{"), matrix.FailCut, OpBody},
		{"cuts a chunk", false, cut(okHead + "Transfer-Encoding: chunked\r\n\r\na\r\n{"), matrix.FailCut, OpBody},
		{"sends no last chunk", false, cut(okHead + "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"), matrix.FailCut, OpBody},
		{"sends a bad chunk", false, cut(okHead + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{"), matrix.FailCut, OpBody},
		{"stalls in the body", false, say(okHead + "Content-Length: 10\r\n\r\n{"), matrix.FailCut, OpBody},
		{"stalls before the body", false, say(okHead + "Content-Length: 10\r\n\r\n"), matrix.FailCut, OpBody},
		{"resets in the body", false, func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = io.WriteString(c, okHead+"Content-Length: 10\r\n\r\n{")
			// Wait until the client has it.
			time.Sleep(20 * time.Millisecond)
			_ = c.NetConn().(*net.TCPConn).SetLinger(0)
			_ = c.NetConn().Close()
		}, matrix.FailCut, OpBody},

		{"hangs up", true, cut(""), matrix.FailReset, OpRequest},
		{"is silent", true, func(c *tls.Conn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) }, matrix.FailTimeout, OpRequest},
		{"speaks HTTP/1.1", true, cut("HTTP/1.1 400 Bad Request\r\nContent-Length: 1000\r\n\r\n" + strings.Repeat("x", 1000)), matrix.FailProtocol, OpRequest},
		{"sends a frame that is too large", true, cut(frames + "\xff\xff\xff\x00\x00\x00\x00\x00\x01"), matrix.FailProtocol, OpRequest},
		{"sends data to no stream", true, cut(frames + "\x00\x00\x01\x00\x00\x00\x00\x00\x09x"), matrix.FailProtocol, OpRequest},
		{"sends a header that is none", true, cut(frames + "\x00\x00\x01\x01\x05\x00\x00\x00\x01\xff"), matrix.FailProtocol, OpRequest},
		{"resets the stream", true, say(frames + "\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x02"), matrix.FailReset, OpRequest},
		{"goes away", true, cut(frames + "\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), matrix.FailReset, OpRequest},
		{"cuts the body", true, cut(frames + "\x00\x00\x01\x01\x04\x00\x00\x00\x01\x88" + "\x00\x00\x01\x00\x00\x00\x00\x00\x01{"), matrix.FailCut, OpBody},
		{"resets in the body", true, say(frames + "\x00\x00\x01\x01\x04\x00\x00\x00\x01\x88" + "\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x02"),
			matrix.FailCut, OpBody},
		{"stalls in the body", true, say(frames + "\x00\x00\x01\x01\x04\x00\x00\x00\x01\x88" + "\x00\x00\x01\x00\x00\x00\x00\x00\x01{"), matrix.FailCut, OpBody},
	} {
		name := "HTTP/1.1 " + tt.name
		if tt.http2 {
			name = "HTTP/2 " + tt.name
		}
		t.Run(name, func(t *testing.T) {
			config := serverTLS("a.test")
			if tt.http2 {
				config.NextProtos = []string{"h2"}
			}
			var seen atomic.Int64
			addr := tcp(t, func(c net.Conn) {
				seen.Add(1)
				tc := tls.Server(c, config)
				r := bufio.NewReader(tc)
				if tt.http2 {
					skipToHeaders(r)
					// There is no head to read any more.
					r = bufio.NewReader(io.MultiReader(strings.NewReader("\r\n"), r))
				}
				tt.serve(tc, r)
				// Not a reset, which could overtake what was said.
				_ = tc.CloseWrite()
				_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				_, _ = io.Copy(io.Discard, c)
			})
			c := newTestClient(t, map[string]string{"a.test:1": addr}, func(c *ClientConfig) { c.BodyTimeout = 100 * time.Millisecond })
			ctx := testContext(t)
			if tt.failure == matrix.FailTimeout {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				defer cancel()
			}
			_, _, err := tryGet(ctx, c, "a.test:1", "/")
			wantFailure(t, err, tt.failure, tt.op)
			var e *Error
			if errors.As(err, &e); e.Unsent {
				t.Error("said to be unsent")
			}
			if seen.Load() != 1 {
				t.Errorf("%d connections for a request that must not be repeated", seen.Load())
			}
		})
	}
}

// skipToHeaders reads an HTTP/2 connection's preface, and its frames up to and
// including the first HEADERS.
func skipToHeaders(r *bufio.Reader) {
	_, _ = r.Discard(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	for {
		var h [9]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return
		}
		_, _ = r.Discard(int(h[0])<<16 | int(h[1])<<8 | int(h[2]))
		if h[3] == 1 {
			return
		}
	}
}

// TestHeadersOverHTTP2AreBounded needs a server that can write HPACK.
func TestHeadersOverHTTP2AreBounded(t *testing.T) {
	addr := web(t, true, func(w http.ResponseWriter, r *http.Request) {
		for range 100 {
			w.Header().Add("X", strings.Repeat("x", 1000))
		}
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	_, _, err := tryGet(testContext(t), c, "a.test:1", "/")
	wantFailure(t, err, matrix.FailTooLarge, OpRequest)
}

// TestTrickle: an answer may take as long as the caller lets it, as long as it
// goes on.
func TestTrickle(t *testing.T) {
	trickle := func(w http.ResponseWriter, r *http.Request) {
		for range 8 {
			_, _ = io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			time.Sleep(20 * time.Millisecond)
		}
	}
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		c := newTestClient(t, map[string]string{"a.test:1": web(t, http2, trickle, "a.test")}, func(c *ClientConfig) { c.BodyTimeout = 100 * time.Millisecond })
		if _, body := get(t, c, "a.test:1", "/"); body != "xxxxxxxx" {
			t.Errorf("%s: %q", name, body)
		}
		// A caller who is slow to read is not the remote's fault.
		resp, err := c.Do(testContext(t), &Request{Destination: "a.test:1", Method: "GET", Target: "/"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		if body, err := io.ReadAll(resp.Body); string(body) != "xxxxxxxx" || err != nil {
			t.Errorf("%s: %q, %v", name, body, err)
		}
		_ = resp.Body.Close()
	}
}

// TestEndingTheContext is about each step in which a caller may give up.
func TestEndingTheContext(t *testing.T) {
	goroutines(t)
	silent := tcp(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	never := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	half := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "half")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	block := make(chan struct{})
	t.Cleanup(func() { close(block) })
	c := newTestClient(t, map[string]string{
		"tls.test:1": silent,
		"a.test:1":   web(t, false, never, "a.test"), "a.test:2": web(t, true, never, "a.test"),
		"a.test:3": web(t, false, half, "a.test"), "a.test:4": web(t, true, half, "a.test"),
	}, func(c *ClientConfig) { c.Lookup = blockingLookup{} })
	for _, tt := range []struct {
		dest            string
		op              string
		unsent          bool
		cancel, timeout matrix.Failure
	}{
		{"name.test:1", OpResolve, true, matrix.FailCancelled, matrix.FailDNS},
		{"srv.test", OpResolve, true, matrix.FailCancelled, matrix.FailDNS},
		{"tls.test:1", OpTLS, true, matrix.FailCancelled, matrix.FailTimeout},
		{"a.test:1", OpRequest, false, matrix.FailCancelled, matrix.FailTimeout},
		{"a.test:2", OpRequest, false, matrix.FailCancelled, matrix.FailTimeout},
		{"a.test:3", OpBody, false, matrix.FailCancelled, matrix.FailCut},
		{"a.test:4", OpBody, false, matrix.FailCancelled, matrix.FailCut},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(30*time.Millisecond, cancel)
		_, _, err := tryGet(ctx, c, tt.dest, "/")
		wantFailure(t, err, tt.cancel, tt.op)
		ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
		_, _, err = tryGet(ctx, c, tt.dest, "/")
		wantFailure(t, err, tt.timeout, tt.op)
		var e *Error
		if errors.As(err, &e); e.Unsent != tt.unsent {
			t.Errorf("%s: unsent %v", tt.dest, e.Unsent)
		}
		cancel()
		eventually(t, "its connection is closed", func() bool { return c.Stats().Open == 0 })
	}
}

// blockingLookup answers when its caller has had enough.
type blockingLookup struct{ Lookup }

func (blockingLookup) IP(ctx context.Context, host string) ([]netip.Addr, error) {
	<-ctx.Done()
	return nil, &net.DNSError{Err: "no answer", Name: host, IsTimeout: true, UnwrapErr: ctx.Err()}
}

func (blockingLookup) SRV(ctx context.Context, _, _, name string) ([]*net.SRV, error) {
	<-ctx.Done()
	return nil, &net.DNSError{Err: "no answer", Name: name, IsTimeout: true, UnwrapErr: ctx.Err()}
}

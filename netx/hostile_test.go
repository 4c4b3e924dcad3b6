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
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"fsbus/bus/matrix"
)

// TestHostileRemotes is about every way in which a remote can misbehave once
// the handshake is done. The table is also where the texts of net/http's errors
// that classify knows are checked against the Go release in use.
func TestHostileRemotes(t *testing.T) {
	goroutines(t)
	silentLogs(t)
	// said is told when nothing more will be said.
	said := make(chan struct{}, 1)
	// say answers the request's head with s, and waits for the client to go.
	say := func(s string) func(*tls.Conn, *bufio.Reader) {
		return func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = io.WriteString(c, s)
			select {
			case said <- struct{}{}:
			default:
			}
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
		{"a status below 100", false, say("HTTP/1.1 099 Odd\r\nContent-Length: 2\r\n\r\n{}"), matrix.FailProtocol, OpRequest},
		{"changes the protocol", false, say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), matrix.FailProtocol, OpRequest},
		{"sends garbage in TLS", false, func(c *tls.Conn, r *bufio.Reader) {
			head(r)
			_, _ = c.NetConn().Write([]byte{23, 3, 3, 0, 32, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
				25, 26, 27, 28, 29, 30, 31, 32})
			_, _ = io.Copy(io.Discard, c.NetConn())
		}, matrix.FailProtocol, OpRequest},

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
		{"is silent", true, say(""), matrix.FailTimeout, OpRequest},
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
				if tt.http2 && seen.Load() > 1 { // it cannot do without
					_ = tc.Handshake()
					_ = tc.Close()
					return
				}
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
			select {
			case <-said: // by the remote before
			default:
			}
			if tt.failure == matrix.FailTimeout {
				timeout := newDeadline(ctx)
				go func() { <-said; timeout.expire() }()
				ctx = timeout
			}
			_, _, err := tryGet(ctx, c, "a.test:1", "/")
			if tt.http2 && FailureOf(err) == matrix.FailReset && strings.Contains(err.Error(), "then netx: request: http: server closed idle connection") {
				return // the second attempt, over HTTP/1.1, met the end before it had written anything
			}
			wantFailure(t, err, tt.failure, tt.op)
			var e *Error
			if errors.As(err, &e); e.Unsent {
				t.Error("said to be unsent")
			}
			if most := int64(1); seen.Load() != most && !(tt.http2 && brokenHTTP2(e) && seen.Load() == most+1) {
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
// goes on. A caller who is slow to read is not the remote's fault.
func TestTrickle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		r, w := io.Pipe()
		context.AfterFunc(ctx, func() { _ = r.CloseWithError(ctx.Err()) }) // as net/http does
		var ended []error
		b := newAnswerBody(t.Context(), ctx, cancel, r, time.Minute, func(err error) { ended = append(ended, err) })
		go func() {
			for range 100 {
				time.Sleep(59 * time.Second)
				_, _ = w.Write([]byte("x"))
			}
		}()
		p := make([]byte, 10)
		for i := range 100 {
			if i%10 == 0 {
				time.Sleep(10 * time.Minute)
			}
			if n, err := b.Read(p); n != 1 || err != nil {
				t.Fatalf("byte %d: %d, %v", i, n, err)
			}
		}
		start := time.Now()
		for range 2 {
			n, err := b.Read(p)
			if n != 0 || time.Since(start) != time.Minute {
				t.Errorf("%d bytes after %v", n, time.Since(start))
			}
			wantFailure(t, err, matrix.FailCut, OpBody)
			if !errors.Is(err, errStalled) {
				t.Errorf("error %v", err)
			}
		}
		_ = b.Close()
		if len(ended) != 1 || !errors.Is(ended[0], errStalled) {
			t.Errorf("done was told %v", ended)
		}
	})
}

// TestEndingTheContext is about each step in which a caller may give up.
func TestEndingTheContext(t *testing.T) {
	goroutines(t)
	// Each of these says that the request has come as far as it will.
	arrived := make(chan struct{}, 1)
	silent := tcp(t, func(c net.Conn) {
		_, _ = c.Read(make([]byte, 1)) // of the handshake
		arrived <- struct{}{}
		_, _ = io.Copy(io.Discard, c)
	})
	never := func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // returning would be an answer, which may arrive
	}
	// half ends its answer in order when the client goes. That is no whole answer.
	half := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "half")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	c := newTestClient(t, map[string]string{
		"tls.test:1": silent,
		"a.test:1":   web(t, false, never, "a.test"), "a.test:2": web(t, true, never, "a.test"),
		"a.test:3": web(t, false, half, "a.test"), "a.test:4": web(t, true, half, "a.test"),
	}, func(c *ClientConfig) { c.Lookup = blockingLookup{arrived: arrived} })
	for _, tt := range []struct {
		dest            matrix.ServerName
		op              string
		unsent          bool
		cancel, timeout matrix.Failure
	}{
		{"name.test:1", OpResolve, true, matrix.FailCancelled, matrix.FailDNS},
		{"wellknown.test", OpResolve, true, matrix.FailCancelled, matrix.FailDNS},
		{"tls.test:1", OpTLS, true, matrix.FailCancelled, matrix.FailTimeout},
		{"a.test:1", OpRequest, false, matrix.FailCancelled, matrix.FailTimeout},
		{"a.test:2", OpRequest, false, matrix.FailCancelled, matrix.FailTimeout},
		{"a.test:3", OpBody, false, matrix.FailCancelled, matrix.FailCut},
		{"a.test:4", OpBody, false, matrix.FailCancelled, matrix.FailCut},
	} {
		// end has the request reach its step before ctx ends.
		end := func(ctx context.Context, end func()) error {
			r := &Request{Destination: tt.dest, Method: "GET", Target: "/"}
			if tt.op != OpBody {
				go func() { <-arrived; end() }()
				_, err := c.Do(ctx, r, nil)
				return err
			}
			resp, err := c.Do(ctx, r, nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			go end()
			_, err = io.ReadAll(resp.Body)
			return err
		}
		ctx, cancel := context.WithCancel(t.Context())
		wantFailure(t, end(ctx, cancel), tt.cancel, tt.op)

		timeout := newDeadline(t.Context())
		err := end(timeout, timeout.expire)
		wantFailure(t, err, tt.timeout, tt.op)
		var e *Error
		if errors.As(err, &e); e.Unsent != tt.unsent {
			t.Errorf("%s: unsent %v", tt.dest, e.Unsent)
		}
		eventually(t, "its connection is closed", func() bool { return c.Stats().Open == 0 })
	}
}

// deadline is a context whose deadline passes when the test says so.
type deadline struct {
	context.Context
	done chan struct{}
	once sync.Once
}

func newDeadline(parent context.Context) *deadline {
	return &deadline{Context: parent, done: make(chan struct{})}
}

func (d *deadline) expire()               { d.once.Do(func() { close(d.done) }) }
func (d *deadline) Done() <-chan struct{} { return d.done }
func (d *deadline) Err() error {
	select {
	case <-d.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// blockingLookup answers when its caller has had enough.
type blockingLookup struct {
	Lookup
	arrived chan<- struct{}
}

func (l blockingLookup) IP(ctx context.Context, host string) ([]netip.Addr, error) {
	l.arrived <- struct{}{}
	<-ctx.Done()
	return nil, &net.DNSError{Err: "no answer", Name: host, IsTimeout: true, UnwrapErr: ctx.Err()}
}

func (l blockingLookup) SRV(ctx context.Context, _, _, name string) ([]*net.SRV, error) {
	return nil, notFound(name)
}

package netx

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// exchange sends a request, lets answer answer it, and returns the client's
// end and what answer returned.
func (ft *frontTest) exchange(dial func() net.Conn, method string, answer func(*Inbound) error) (net.Conn, error) {
	ft.t.Helper()
	c := dial()
	write(ft.t, c, request(method, "/x", "", ""))
	in := ft.next()
	errs := make(chan error, 1)
	go func() { errs <- answer(in) }()
	ft.t.Cleanup(func() { in.Release() })
	select {
	case err := <-errs:
		return c, err
	case <-time.After(testWait):
		ft.t.Fatal("the answer hangs")
		return nil, nil
	}
}

func TestStreamFraming(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	const text = "hello world"
	for _, test := range []struct {
		name, method string
		status       int
		size         int64
		length       int64 // that the client sees; -1: chunked, or none
		body         string
	}{
		{"known size", "GET", 200, 11, 11, text},
		{"unknown size", "GET", 200, -1, -1, text},
		{"empty", "GET", 200, 0, 0, ""},
		{"error", "GET", 404, 11, 11, text},
		{"odd status", "GET", 799, 11, 11, text},
		{"HEAD", "HEAD", 200, 11, 11, ""},
		{"HEAD of unknown size", "HEAD", 200, -1, -1, ""},
		{"204", "PUT", 204, -1, 0, ""},
		{"204 with a size", "PUT", 204, 11, 0, ""},
		{"304", "GET", 304, 11, 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			body := iotest.OneByteReader(strings.NewReader(text))
			c, err := ft.exchange(dial, test.method, func(in *Inbound) error {
				return in.Stream(test.status, http.Header{"X-Y": {"1", "2"}}, test.size, body)
			})
			if err != nil {
				t.Fatal(err)
			}
			res, got := readAnswer(t, c, test.method)
			if res.StatusCode != test.status || got != test.body || res.ContentLength != test.length || len(res.Header["X-Y"]) != 2 {
				t.Errorf("%v, body %q", res, got)
			}
			if chunked := len(res.TransferEncoding) > 0; chunked != (test.name == "unknown size") {
				t.Errorf("transfer encoding %v", res.TransferEncoding)
			}
		})
	}
}

func TestStreamNilBody(t *testing.T) {
	ft := newFrontTest(t, nil)
	c, err := ft.exchange(ft.serve("unix"), "PUT", func(in *Inbound) error { return in.Stream(200, nil, 0, nil) })
	if err != nil {
		t.Fatal(err)
	}
	if res, body := readAnswer(t, c, "PUT"); res.ContentLength != 0 || body != "" {
		t.Errorf("%v %q", res, body)
	}
}

func TestReplyFraming(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	for _, test := range []struct {
		method      string
		status      int
		header      http.Header
		contentType string
		length      int64
		body        string
	}{
		{"PUT", 200, nil, "application/json", 2, "{}"},
		{"HEAD", 502, nil, "application/json", 2, ""},
		{"PUT", 200, http.Header{"Content-Type": {"text/plain"}, "Retry-After": {"3"}}, "text/plain", 2, "{}"},
		{"PUT", 204, nil, "application/json", 0, ""},
	} {
		c, err := ft.exchange(dial, test.method, func(in *Inbound) error { return in.Reply(test.status, test.header, []byte("{}")) })
		if err != nil {
			t.Fatal(err)
		}
		res, body := readAnswer(t, c, test.method)
		if res.StatusCode != test.status || res.Header.Get("Content-Type") != test.contentType || res.ContentLength != test.length || body != test.body {
			t.Errorf("%s: %v %q", test.method, res, body)
		}
		if res.Header.Get("Retry-After") != test.header.Get("Retry-After") {
			t.Errorf("%s: %v", test.method, res.Header)
		}
	}
}

func TestStreamLeavesOutHopByHopFields(t *testing.T) {
	ft := newFrontTest(t, nil)
	header := http.Header{
		"Content-Type":        {"application/json"},
		"Date":                {"Mon, 02 Jan 2006 15:04:05 GMT"},
		"Retry-After":         {"5"},
		"Connection":          {"keep-alive, x-private", "X-Second"},
		"X-Private":           {"1"},
		"X-Second":            {"1"},
		"Keep-Alive":          {"timeout=5"},
		"Proxy-Authenticate":  {"Basic"},
		"Proxy-Authorization": {"Bearer x"},
		"Proxy-Connection":    {"close"},
		"Te":                  {"trailers"},
		"Trailer":             {"X-T"},
		"Transfer-Encoding":   {"gzip"},
		"Upgrade":             {"h2c"},
		"Content-Length":      {"999"},
		"X-Newline":           {"a\r\nInjected: b"},
		"Bad Name":            {"x"},
	}
	c, err := ft.exchange(ft.serve("unix"), "GET", func(in *Inbound) error {
		return in.Stream(200, header, 2, strings.NewReader("{}"))
	})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	const want = "HTTP/1.1 200 OK\r\n" +
		"Content-Type: application/json\r\n" +
		"Date: Mon, 02 Jan 2006 15:04:05 GMT\r\n" +
		"Retry-After: 5\r\n" +
		"X-Newline: a  Injected: b\r\n" +
		"Content-Length: 2\r\n" +
		"Connection: close\r\n\r\n{}"
	if string(raw) != want {
		t.Errorf("got  %q\nwant %q", raw, want)
	}
	if len(header) != 17 {
		t.Error("the caller's header was changed")
	}
}

// Whatever goes wrong with the body, the client must not take what it got for
// a complete answer.
func TestStreamAbortsWhenTheBodyFails(t *testing.T) {
	fault := errors.New("of the test")
	for _, network := range []string{"unix", "tcp"} {
		ft := newFrontTest(t, nil)
		dial := ft.serve(network)
		for _, test := range []struct {
			name string
			size int64
			body io.Reader
			want error
		}{
			{"at once, chunked", -1, iotest.ErrReader(fault), fault},
			{"at once, known size", 5, iotest.ErrReader(fault), fault},
			{"inside, chunked", -1, io.MultiReader(strings.NewReader("hel"), iotest.ErrReader(fault)), fault},
			{"inside, known size", 5, io.MultiReader(strings.NewReader("hel"), iotest.ErrReader(fault)), fault},
			{"too short", 5, strings.NewReader("hel"), io.ErrUnexpectedEOF},
			{"too long", 5, strings.NewReader("hello world"), http.ErrContentLength},
		} {
			t.Run(network+"/"+test.name, func(t *testing.T) {
				c, err := ft.exchange(dial, "GET", func(in *Inbound) error { return in.Stream(200, nil, test.size, test.body) })
				if !errors.Is(err, test.want) || errors.Is(err, ErrClientGone) {
					t.Errorf("Stream: %v", err)
				}
				res, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil {
					return // a reset has overtaken the header
				}
				if body, err := io.ReadAll(res.Body); err == nil {
					t.Errorf("the client is content with %q", body)
				}
			})
		}
	}
}

func TestStreamStatus(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	for _, status := range []int{0, 101, 199, 1000} {
		c, err := ft.exchange(dial, "GET", func(in *Inbound) error { return in.Stream(status, nil, 0, nil) })
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint(status)) {
			t.Error(err)
		}
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("%q, %v", b, err)
		}
	}
}

func TestInboundIsAnsweredOnce(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	ways := map[string]func(*Inbound) error{
		"Reply":  func(in *Inbound) error { return in.Reply(200, nil, []byte("{}")) },
		"Stream": func(in *Inbound) error { return in.Stream(200, nil, 2, strings.NewReader("{}")) },
		"Abort":  func(in *Inbound) error { return in.Abort() },
	}
	for first, answer := range ways {
		c := dial()
		write(t, c, request("GET", "/x", "", ""))
		in := ft.next()
		if err := answer(in); err != nil {
			t.Errorf("%s: %v", first, err)
		}
		for second, again := range ways {
			if err := again(in); err != ErrAnswered {
				t.Errorf("%s after %s: %v", second, first, err)
			}
		}
		got, err := io.ReadAll(c)
		if n := strings.Count(string(got), "HTTP/1.1"); err != nil || n > 1 || (n == 0) != (first == "Abort") {
			t.Errorf("%s: %q, %v", first, got, err)
		}
	}
	if n := len(ft.gone); n != 0 {
		t.Errorf("%d are gone", n)
	}
}

// A body on disk reaches the client byte for byte, framed either way, whether
// it is complete or still being written.
func TestStreamFromTheSpool(t *testing.T) {
	want := pattern(3 << 20) // more than one call of sendfile moves
	for _, network := range []string{"unix", "tcp"} {
		for _, size := range []int64{int64(len(want)), -1} {
			for _, state := range []string{"complete", "growing", "faulty file"} {
				t.Run(fmt.Sprintf("%s/%d/%s", network, size, state), func(t *testing.T) {
					ft := newFrontTest(t, nil)
					if state == "faulty file" { // not an *os.File, so it is copied
						ft.spool.open = faultyOpen(nil)
					}
					b := ft.spool.New()
					fill := func(p []byte) {
						if _, err := b.ReadFrom(bytes.NewReader(p)); err != nil {
							t.Error(err)
						}
					}
					if state == "growing" {
						fill(want[:1<<20])
						go func() {
							for rest := want[1<<20:]; len(rest) > 0; rest = rest[1<<19:] {
								fill(rest[:1<<19])
							}
							b.CloseWrite(nil)
						}()
					} else {
						fill(want)
						b.CloseWrite(nil)
					}
					c := ft.serve(network)()
					write(t, c, request("GET", "/x", "", ""))
					in := ft.next()
					sent := make(chan error)
					go func() {
						r := b.Reader()
						err := in.Stream(200, nil, size, r)
						r.Close()
						sent <- err
					}()
					_, got := readAnswer(t, c, "GET")
					if err := <-sent; err != nil {
						t.Error(err)
					}
					if got != string(want) {
						t.Errorf("%d bytes of %d, or not the same", len(got), len(want))
					}
					b.Release()
				})
			}
		}
	}
}

func TestStreamSlowReader(t *testing.T) {
	for _, source := range []string{"memory", "disk"} {
		t.Run(source, func(t *testing.T) {
			ft := newFrontTest(t, func(c *FrontConfig) { c.StallTimeout = 30 * time.Millisecond })
			dial := ft.serve("unix")
			var body io.Reader = bytes.NewReader(make([]byte, 8<<20))
			if source == "disk" {
				b := ft.spool.New()
				mustWrite(t, b, make([]byte, 8<<20))
				b.CloseWrite(nil)
				r := b.Reader()
				b.Release()
				defer r.Close()
				body = r
			}
			c, err := ft.exchange(dial, "GET", func(in *Inbound) error { return in.Stream(200, nil, 8<<20, body) })
			if !errors.Is(err, ErrSlowReader) || errors.Is(err, ErrClientGone) {
				t.Errorf("Stream: %v", err)
			}
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, res.Body); err == nil {
				t.Errorf("the client is content with %d bytes", n)
			}
		})
	}
}

func TestStreamClientGone(t *testing.T) {
	for _, source := range []string{"memory", "disk"} {
		t.Run(source, func(t *testing.T) {
			ft := newFrontTest(t, nil)
			c := ft.serve("unix")()
			write(t, c, request("GET", "/x", "", ""))
			in := ft.next()
			b := ft.spool.New()
			if source == "disk" {
				mustWrite(t, b, make([]byte, 1<<20))
			}
			r := b.Reader()
			errs := make(chan error)
			go func() { errs <- in.Stream(200, nil, -1, r) }()
			eventually(t, "the answer has begun", func() bool { return ft.Stats().Parked == 0 })
			c.Close()
			// What is written now meets a closed connection, at the latest
			// when the socket's buffer is full.
			for range 8 {
				mustWrite(t, b, make([]byte, 60<<10))
			}
			b.CloseWrite(nil)
			if err := <-errs; !errors.Is(err, ErrClientGone) {
				t.Error(err)
			}
			r.Close()
			b.Release()
			if len(ft.gone) != 0 {
				t.Error("Gone was told of a request that was being answered")
			}
		})
	}
}

// scriptedConn is a connection whose writes do as they are told.
type scriptedConn struct {
	net.Conn
	takes []int // by write: how many bytes are taken before the deadline; then all
	got   bytes.Buffer
	set   int // deadlines
}

func (c *scriptedConn) SetWriteDeadline(time.Time) error { c.set++; return nil }

func (c *scriptedConn) Write(p []byte) (int, error) {
	if len(c.takes) == 0 {
		return c.got.Write(p)
	}
	n := min(c.takes[0], len(p))
	c.takes = c.takes[1:]
	c.got.Write(p[:n])
	if n < len(p) {
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

// A client that takes a byte now and then is slow; one that takes none is
// stuck.
func TestAnswerWriterProgress(t *testing.T) {
	c := &scriptedConn{takes: []int{1, 2, 1, 3}}
	w := &answerWriter{conn: c, stall: time.Minute, left: 11}
	if n, err := w.Write([]byte("hello world")); n != 11 || err != nil || c.got.String() != "hello world" {
		t.Errorf("%d, %v, %q", n, err, &c.got)
	}
	if c.set != 5 {
		t.Errorf("%d deadlines for 5 writes", c.set)
	}
	if err := w.finish(); err != nil {
		t.Error(err)
	}

	c = &scriptedConn{takes: []int{3, 1, 0}}
	w = &answerWriter{conn: c, stall: time.Minute, chunked: true}
	if _, err := w.Write([]byte("hello world")); err != ErrSlowReader || c.got.String() != "b\r\nh" {
		t.Errorf("%v, %q", err, &c.got)
	}
}

func TestAnswerWriterWritesNoEmptyChunk(t *testing.T) {
	c := &scriptedConn{}
	w := &answerWriter{conn: c, chunked: true}
	w.Write(nil)
	w.Write([]byte("x"))
	w.finish()
	if got := c.got.String(); got != "1\r\nx\r\n0\r\n\r\n" {
		t.Errorf("%q", got)
	}
}

// A file that turns out to be shorter than it was is the file's fault, not the
// client's.
func TestAnswerWriterShortFile(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Disk: 1 << 20})
	ft := newFrontTest(t, func(c *FrontConfig) { c.Spool = s })
	b := s.New()
	mustWrite(t, b, pattern(1000))
	b.CloseWrite(nil)
	if err := b.file.(*os.File).Truncate(500); err != nil {
		t.Fatal(err)
	}
	r := b.Reader()
	_, err := ft.exchange(ft.serve("unix"), "GET", func(in *Inbound) error { return in.Stream(200, nil, 1000, r) })
	if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrClientGone) {
		t.Error(err)
	}
	r.Close()
	b.Release()
}

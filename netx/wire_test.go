package netx

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// flooder is a server of HTTP/2 that answers its first request with frames, for ever, or
// with a body of so many frames of so many bytes.
func flooder(t *testing.T, frame func(c *h2Client) error) (addr string) {
	config := serverTLS("a.test").Clone()
	config.NextProtos = []string{"h2"}
	return tcp(t, func(conn net.Conn) {
		s := tls.Server(conn, config)
		preface := make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		if _, err := io.ReadFull(s, preface); err != nil {
			return
		}
		c := &h2Client{s}
		_ = c.frame(h2Settings, 0, 0, nil)
		if _, _, err := c.until(h2Headers); err != nil {
			return
		}
		go io.Copy(io.Discard, s) // what else it says
		for frame(c) == nil {
		}
	})
}

func processorTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Frames that are no answer end the connection, however they are made.
func TestFloodsOfFramesEnd(t *testing.T) {
	log.SetOutput(io.Discard) // net/http says each unknown frame
	defer log.SetOutput(os.Stderr)
	status := []byte{0x88} // :status 200
	for name, frames := range map[string]func() func(c *h2Client) error{
		"empty CONTINUATION": func() func(c *h2Client) error {
			begun := false
			return func(c *h2Client) error {
				if !begun {
					begun = true
					return c.frame(h2Headers, 0, 1, status)
				}
				return flood(c, h2Continuation, 0, 1, nil)
			}
		},
		"empty DATA": func() func(c *h2Client) error {
			begun := false
			return func(c *h2Client) error {
				if !begun {
					begun = true
					return c.frame(h2Headers, h2EndHeaders, 1, status)
				}
				return flood(c, h2Data, 0, 1, nil)
			}
		},
		"PING": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, h2Ping, h2Ack, 0, make([]byte, 8)) }
		},
		"PING that wants an answer": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, h2Ping, 0, 0, make([]byte, 8)) }
		},
		"interim answers": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, h2Headers, h2EndHeaders, 1, hpack(":status", "103")) }
		},
		"SETTINGS": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, h2Settings, 0, 0, nil) }
		},
		"RST_STREAM": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, h2Reset, 0, 99, make([]byte, 4)) }
		},
		"WINDOW_UPDATE": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, 8, 0, 99, []byte{0, 0, 0, 1}) }
		},
		"of a kind that there is not": func() func(c *h2Client) error {
			return func(c *h2Client) error { return flood(c, 77, 0, 0, nil) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			addr := flooder(t, frames())
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			before := processorTime()
			resp, body, err := tryGet(testContext(t), c, "a.test:1", "/")
			if err == nil {
				t.Fatalf("%v %q", resp, body)
			}
			if f := FailureOf(err); f != matrix.FailProtocol && f != matrix.FailCut && f != matrix.FailReset {
				t.Errorf("%v: %v", f, err)
			}
			t.Logf("%v of processor time, both sides: %v", processorTime()-before, err)
		})
	}
}

// flood writes a thousand frames at once.
func flood(c *h2Client, kind, flags byte, stream uint32, payload []byte) error {
	var b bytes.Buffer
	one := &h2Client{bufferConn{&b}}
	for range 1000 {
		_ = one.frame(kind, flags, stream, payload) // a buffer takes all
	}
	_, err := c.Write(b.Bytes())
	return err
}

type bufferConn struct{ *bytes.Buffer }

func (bufferConn) Close() error                     { return nil }
func (bufferConn) LocalAddr() net.Addr              { return nil }
func (bufferConn) RemoteAddr() net.Addr             { return nil }
func (bufferConn) SetDeadline(time.Time) error      { return nil }
func (bufferConn) SetReadDeadline(time.Time) error  { return nil }
func (bufferConn) SetWriteDeadline(time.Time) error { return nil }

// An honest answer passes, also in small frames or chunks, and so do many small ones on one
// connection.
func TestHonestAnswersAreNoFlood(t *testing.T) {
	const size = 20 << 20
	piece := bytes.Repeat([]byte{'x'}, 512)
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprint("http2 ", http2), func(t *testing.T) {
			addr := web(t, http2, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/small" {
					io.WriteString(w, "{}")
					return
				}
				for n := 0; n < size; n += len(piece) {
					w.Write(piece)
					w.(http.Flusher).Flush()
				}
			}, "a.test")
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			for range 50 {
				get(t, c, "a.test:1", "/small")
			}
			_, body, err := tryGet(testContext(t), c, "a.test:1", "/large")
			if err != nil || len(body) != size {
				t.Errorf("%d bytes, %v", len(body), err)
			}
		})
	}
}

// An answer of HTTP/1 has as many lines in its head as a request may, and so have those that
// come before it together.
func TestAnswersOfManyFields(t *testing.T) {
	fields := func(n int) string { return strings.Repeat("a:\r\n", n) }
	for name, test := range map[string]struct {
		answer string
		ok     bool
	}{
		"the most":          {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + fields(maxFields-2) + "\r\n{}", true},
		"too many":          {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + fields(maxFields) + "\r\n{}", false},
		"too many later":    {"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + fields(maxFields) + "\r\n{}", false},
		"a body of lines":   {"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + strings.Repeat("\n", 1000), true},
		"interim, and then": {"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + strings.Repeat("\n", 1000), true},
	} {
		addr := tcp(t, func(conn net.Conn) {
			s := tls.Server(conn, serverTLS("a.test"))
			if s.Handshake() == nil {
				_, _ = s.Read(make([]byte, 4096))
				_, _ = io.WriteString(s, test.answer)
				_ = s.Close()
			}
		})
		_, _, err := tryGet(testContext(t), newTestClient(t, map[string]string{"a.test:1": addr}, nil), "a.test:1", "/")
		if (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
		if !test.ok {
			wantFailure(t, err, matrix.FailTooLarge, OpRequest)
		}
	}
}

// Over HTTP/2 an answer has as many fields as over HTTP/1, of one name or of many.
func TestAnswersOfManyFieldsOverHTTP2(t *testing.T) {
	addr := web(t, true, func(w http.ResponseWriter, r *http.Request) {
		n := maxFields - 3 // net/http adds Date, Content-Type and Content-Length
		if r.URL.Path != "/most" {
			n++
		}
		for i := range n {
			if r.URL.Path == "/one" {
				i = 0
			}
			w.Header().Add(fmt.Sprint("X", i), "")
		}
		io.WriteString(w, "{}")
	}, "a.test")
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	if resp, body := get(t, c, "a.test:1", "/most"); body != "{}" || len(resp.Header) != maxFields {
		t.Errorf("%q, %d fields", body, len(resp.Header))
	}
	for _, path := range []string{"/one", "/many"} {
		_, _, err := tryGet(testContext(t), c, "a.test:1", path)
		wantFailure(t, err, matrix.FailTooLarge, OpRequest)
	}
}

func TestMeter(t *testing.T) {
	var none *meter
	none.request()
	none.body(1)
	if err := none.saw(2 * wireBase); err != nil {
		t.Error(err)
	}
	for name, explain := range map[string]func(m *meter){
		"nothing":  func(*meter) {},
		"requests": func(m *meter) { m.request() },
		"bodies":   func(m *meter) { m.body(1 << 20) },
	} {
		var m meter
		for range 1000 {
			explain(&m) // what is not used is not saved up
		}
		if err := m.saw(wireBase); err != nil {
			t.Errorf("%s: the most: %v", name, err)
		}
		if err := m.saw(1); err != errFlood {
			t.Errorf("%s: one byte more: %v", name, err)
		}
	}
	var m meter
	for range 1000 { // answers of the largest head, and those of twice their body's size
		m.request()
		if err := m.saw(wirePerRequest); err != nil {
			t.Fatal(err)
		}
		if err := m.saw(wirePerByte << 20); err != nil {
			t.Fatal(err)
		}
		m.body(1 << 20)
	}
}

// Small writes, which is what answers to PING are, count as what comes.
func TestSmallWritesAreMeasured(t *testing.T) {
	var b bytes.Buffer
	c := &countedConn{Conn: bufferConn{&b}}
	large, small := make([]byte, smallWrite), make([]byte, smallWrite-1)
	for range wireBase / wirePerWrite {
		b.Reset()
		if _, err := c.Write(large); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(small); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Write(large); err != nil {
		t.Error(err)
	}
	if _, err := c.Write(small); err != errFlood {
		t.Error(err)
	}
}

// net/http bounds what chunks take besides their bytes. What it lets pass is measured.
func TestFloodsOfChunksEnd(t *testing.T) {
	for name, chunk := range map[string]string{
		"of one byte":              "1\r\nx\r\n",
		"with extensions":          "1;" + strings.Repeat("e", 4000) + "\r\nx\r\n",
		"with endless extensions":  "1;" + strings.Repeat("e", 5000),
		"with long sizes":          strings.Repeat("0", 3000) + "1\r\nx\r\n",
		"of bytes with extensions": "10;" + strings.Repeat("e", 15) + "\r\n" + strings.Repeat("x", 16) + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			addr := raw(t, func(c *tls.Conn, r *bufio.Reader) {
				head(r)
				io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				many := strings.Repeat(chunk, 1+(16<<10)/len(chunk))
				for n := 0; n < 64<<20; n += len(many) {
					if _, err := io.WriteString(c, many); err != nil {
						return
					}
				}
			}, "a.test")
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			before := processorTime()
			_, body, err := tryGet(testContext(t), c, "a.test:1", "/")
			t.Logf("%v of processor time, both sides, %d bytes: %v", processorTime()-before, len(body), err)
			wantFailure(t, err, matrix.FailCut, OpBody)
			if len(body) > 16<<20 {
				t.Errorf("%d bytes were taken", len(body))
			}
		})
	}
}

// Requests that were answered do not pay for a later flood.
func TestFloodAfterManyAnswers(t *testing.T) {
	log.SetOutput(io.Discard)
	defer log.SetOutput(os.Stderr)
	const before = 200
	written := make(chan int, 1)
	config := serverTLS("a.test").Clone()
	config.NextProtos = []string{"h2"}
	addr := tcp(t, func(conn net.Conn) {
		s := tls.Server(conn, config)
		if _, err := io.ReadFull(s, make([]byte, len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))); err != nil {
			return
		}
		c := &h2Client{s}
		_ = c.frame(h2Settings, 0, 0, nil)
		for range before {
			id, _, err := c.until(h2Headers)
			if err != nil {
				return
			}
			_ = c.frame(h2Headers, h2EndHeaders|h2EndStream, id, []byte{0x88})
		}
		if _, _, err := c.until(h2Headers); err != nil {
			return
		}
		n := 0
		for flood(c, h2Reset, 0, 9999, make([]byte, 4)) == nil {
			n += 1000 * 13
		}
		written <- n
	})
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	for range before {
		get(t, c, "a.test:1", "/")
	}
	_, _, err := tryGet(testContext(t), c, "a.test:1", "/")
	wantFailure(t, err, matrix.FailProtocol, OpRequest)
	if c.Stats().Dials != 1 {
		t.Errorf("%d connections", c.Stats().Dials)
	}
	// What the sockets' buffers hold comes to a few MiB; the answers would have paid for 50.
	if n := <-written; n > 24<<20 {
		t.Errorf("%d bytes went out", n)
	}
}

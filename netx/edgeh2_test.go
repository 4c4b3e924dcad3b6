package netx

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
)

// h2Client writes frames as they are, to do what no HTTP/2 library does.
type h2Client struct{ net.Conn }

const (
	h2Data, h2Headers, h2Reset, h2Settings, h2Ping, h2GoAway, h2Continuation = 0, 1, 3, 4, 6, 7, 9

	h2EndStream, h2EndHeaders, h2Ack = 1, 4, 1
)

// newH2Client sends the preface, and settings of nothing.
func newH2Client(c net.Conn) *h2Client {
	h := &h2Client{c}
	io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	h.frame(h2Settings, 0, 0, nil)
	return h
}

func (c *h2Client) frame(kind, flags byte, stream uint32, payload []byte) error {
	n := len(payload)
	b := append([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}, binary.BigEndian.AppendUint32(nil, stream)...)
	_, err := c.Write(append(b, payload...))
	return err
}

// hpack encodes fields without an index and without Huffman codes.
func hpack(fields ...string) (b []byte) {
	text := func(s string) {
		if len(s) < 127 {
			b = append(b, byte(len(s)))
		} else {
			b = binary.AppendUvarint(append(b, 127), uint64(len(s)-127))
		}
		b = append(b, s...)
	}
	for i := 0; i < len(fields); i += 2 {
		b = append(b, 0)
		text(fields[i])
		text(fields[i+1])
	}
	return b
}

func (c *h2Client) headers(stream uint32, end bool, method, path string, fields ...string) error {
	flags := byte(h2EndHeaders)
	if end {
		flags |= h2EndStream
	}
	return c.frame(h2Headers, flags, stream, hpack(append([]string{":method", method, ":scheme", "https", ":path", path, ":authority", "hs1.test"}, fields...)...))
}

// read returns the next frame.
func (c *h2Client) read() (kind, flags byte, stream uint32, payload []byte, err error) {
	var head [9]byte
	if _, err = io.ReadFull(c, head[:]); err != nil {
		return
	}
	payload = make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
	_, err = io.ReadFull(c, payload)
	return head[3], head[4], binary.BigEndian.Uint32(head[5:]), payload, err
}

// until reads up to a frame of a kind, and returns it, or the error in its stead.
func (c *h2Client) until(kind byte) (stream uint32, payload []byte, err error) {
	for {
		k, _, stream, payload, err := c.read()
		if err != nil || k == kind {
			return stream, payload, err
		}
	}
}

// Streams that are opened and reset at once make the Edge work on no more of them
// than MaxStreams at a time, and cost the client its connection.
func TestEdgeRapidReset(t *testing.T) {
	const streams = 8
	hold := make(chan struct{})
	var running, most atomic.Int32
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.TLS = testCertificates(t)
		c.MaxStreams = streams
		c.Check = func(*EdgeRequest) *EdgeRefusal {
			if n := running.Add(1); n > most.Load() {
				most.Store(n)
			}
			<-hold
			running.Add(-1)
			return &EdgeRefusal{Status: 403}
		}
	})
	c := newH2Client(et.dialTLS("h2"))
	go func() {
		for i := uint32(0); i < 10_000; i++ {
			if c.headers(2*i+1, true, "GET", "/x") != nil || c.frame(h2Reset, 0, 2*i+1, []byte{0, 0, 0, 8}) != nil {
				return
			}
		}
	}()
	_, payload, err := c.until(h2GoAway)
	if err == nil && binary.BigEndian.Uint32(payload[4:]) != 11 { // ENHANCE_YOUR_CALM
		t.Errorf("ended with code %d", binary.BigEndian.Uint32(payload[4:]))
	}
	for err == nil {
		_, _, _, _, err = c.read()
	}
	close(hold)
	if n := most.Load(); n > streams || n == 0 {
		t.Errorf("%d at a time", n)
	}
	if et.Stats().Protocol == 0 {
		t.Error("not counted")
	}
}

func TestEdgeTooManyStreams(t *testing.T) {
	const streams = 8
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.TLS = testCertificates(t)
		c.MaxStreams = streams
	})
	c := newH2Client(et.dialTLS("h2"))
	for i := range uint32(streams + 1) {
		c.headers(2*i+1, true, "GET", "/x")
	}
	stream, _, err := c.until(h2Reset)
	if err != nil || stream != 2*streams+1 {
		t.Errorf("stream %d is reset, %v", stream, err)
	}
	var held []*EdgeRequest
	for range streams {
		held = append(held, et.next())
	}
	for _, q := range held {
		reply(q)
	}
	if s := et.Stats(); s.MaxHeld != streams {
		t.Errorf("%+v", s)
	}
}

// A header that never ends costs the client its connection soon.
func TestEdgeContinuationFlood(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = testCertificates(t) })
	c := newH2Client(et.dialTLS("h2"))
	c.frame(h2Headers, 0, 1, hpack(":method", "GET", ":scheme", "https", ":path", "/x"))
	block := make([]byte, 0, 16<<10)
	for len(block) < 15<<10 {
		block = append(block, hpack("x-filler", "0123456789012345678901234567890123456789")...)
	}
	sent := 0
	for c.frame(h2Continuation, 0, 1, block) == nil {
		if sent += len(block); sent > 64<<20 {
			t.Fatal("the flood goes on")
		}
	}
	eventually(t, "the connection is closed", func() bool { return et.Stats().Open == 0 })
	if s := et.Stats(); s.Requests != 0 {
		t.Errorf("%+v", s)
	}
}

// What HTTP/2 can carry in a request and HTTP/1.1 cannot is refused.
func TestEdgeHTTP2Refusals(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = testCertificates(t) })
	for _, test := range []struct {
		name, method, path string
		fields             []string
		status             string // "": the stream is reset
	}{
		{"blank in the path", "GET", "/a b", nil, "400"},
		{"request in the path", "GET", "/a HTTP/1.1\r\nX: y", nil, ""},
		{"blank in the method", "GET /x HTTP/1.1", "/x", nil, "400"},
		{"no path", "GET", "x", nil, ""},
		{"absolute form", "GET", "https://hs1.test/x", nil, "400"},
		{"connect", "CONNECT", "/x", nil, ""},
		{"line break in a value", "GET", "/x", []string{"a", "b\r\nc: d"}, ""},
		{"upper case name", "GET", "/x", []string{"A", "b"}, ""},
		{"transfer-encoding", "GET", "/x", []string{"transfer-encoding", "chunked"}, "400"},
		{"connection", "GET", "/x", []string{"connection", "close"}, "400"},
		{"expects something", "GET", "/x", []string{"expect", "tea"}, "417"},
		{"two lengths", "PUT", "/x", []string{"content-length", "1", "content-length", "2"}, "200"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newH2Client(et.dialTLS("h2"))
			if err := c.headers(1, true, test.method, test.path, test.fields...); err != nil {
				t.Fatal(err)
			}
			if test.status == "200" { // harmless: the body is delimited by frames, and there is none
				q := et.next()
				if q.Body != nil || q.Header["Content-Length"] != nil {
					t.Errorf("%+v", q)
				}
				reply(q)
			}
			kind, _, stream, payload, err := byte(0), byte(0), uint32(0), []byte(nil), error(nil)
			for err == nil && stream == 0 && kind != h2GoAway {
				kind, _, stream, payload, err = c.read()
			}
			switch {
			case err != nil && !errors.Is(err, io.EOF):
				t.Error(err)
			case test.status == "" && kind != h2Reset && kind != h2GoAway:
				t.Errorf("frame %d %q", kind, payload)
			case test.status != "" && kind != h2Headers:
				t.Errorf("frame %d %q", kind, payload)
			case test.status == "400" && payload[0] != 0x8c, test.status == "200" && payload[0] != 0x88: // of HPACK's static table
				t.Errorf("header %q", payload)
			}
		})
	}
	if s := et.Stats(); s.Requests != 1 {
		t.Errorf("%+v", s)
	}
}

// net/http takes the limits as they are meant, and tells the client.
func TestEdgeHTTP2Settings(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) { c.TLS = testCertificates(t) })
	c := newH2Client(et.dialTLS("h2"))
	_, payload, err := c.until(h2Settings)
	if err != nil {
		t.Fatal(err)
	}
	got := map[uint16]uint32{}
	for ; len(payload) >= 6; payload = payload[6:] {
		got[binary.BigEndian.Uint16(payload)] = binary.BigEndian.Uint32(payload[2:])
	}
	// By the numbers of RFC 9113 6.5.2: the header table, streams, the window of
	// each, frames, the header.
	for id, want := range map[uint16]uint32{1: edgeHeaderTable, 3: defaultEdgeStreams, 4: edgeWindow, 5: edgeReadBuffer, 6: defaultMaxHeaderBytes + 320} {
		if got[id] != want {
			t.Errorf("setting %d is %d, not %d", id, got[id], want)
		}
	}
	// What it sends next would be a larger window for the connection than the
	// 65,535 of the protocol.
	c.frame(h2Ping, 0, 0, make([]byte, 8))
	for kind := byte(0); kind != h2Ping; {
		if kind, _, _, payload, err = c.read(); err != nil {
			t.Fatal(err)
		}
		if kind == 8 && binary.BigEndian.Uint32(payload) > 1 {
			t.Errorf("the connection's window grows by %d", binary.BigEndian.Uint32(payload))
		}
	}
}

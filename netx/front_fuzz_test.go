package netx

import (
	"bytes"
	"net"
	"strings"
	"testing"
	"time"
)

// FuzzFront: whatever a client sends is parked, refused in JSON or dropped;
// nothing panics, and every place and byte is given back.
func FuzzFront(f *testing.F) {
	for _, head := range []string{
		request("GET", "/_matrix/federation/v1/version", "", ""),
		request("PUT", "/_matrix/federation/v1/send/1", "Content-Length: 2\r\n", "{}"),
		request("PUT", "/x", "Transfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"),
		request("PUT", "/x", "Expect: 100-continue\r\nContent-Length: 2\r\n", "{}"),
		"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET / HTTP/1.0\r\n\r\n",
		"GET matrix-federation://h/%zz HTTP/1.1\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01",
	} {
		f.Add([]byte(head))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		ft := newFrontTest(t, func(c *FrontConfig) {
			c.Handle = func(in *Inbound) {
				in.Reply(200, nil, []byte("{}"))
				in.Release()
			}
		})
		client := &recordedClient{Reader: bytes.NewReader(raw)}
		ft.gate.enter(overUnix)
		ft.Front.serve(ft.gate.came(client, overUnix))
		if log := ft.log.String(); strings.Contains(log, "panic") {
			t.Fatalf("%q: %s", raw, log)
		}
		text := strings.TrimPrefix(client.answer.String(), "HTTP/1.1 100 Continue\r\n\r\n")
		if text != "" && (!strings.HasPrefix(text, "HTTP/1.1 ") || !strings.Contains(text, "Content-Type: application/json\r\n")) {
			t.Fatalf("%q is answered %q", raw, text)
		}
	})
}

// recordedClient is a connection on which a client has sent all it sends.
type recordedClient struct {
	*bytes.Reader
	answer bytes.Buffer
}

func (c *recordedClient) Write(p []byte) (int, error)      { return c.answer.Write(p) }
func (c *recordedClient) Close() error                     { return nil }
func (c *recordedClient) LocalAddr() net.Addr              { return nil }
func (c *recordedClient) RemoteAddr() net.Addr             { return nil }
func (c *recordedClient) SetDeadline(time.Time) error      { return nil }
func (c *recordedClient) SetReadDeadline(time.Time) error  { return nil }
func (c *recordedClient) SetWriteDeadline(time.Time) error { return nil }

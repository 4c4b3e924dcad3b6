package netx

import (
	"bytes"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// wireRequest is a request as it stands on the wire.
type wireRequest struct{ method, target, body string }

// readWire delimits the requests that stand one behind the other in raw, by the
// plain rules that every parser in front of us shares, and stops where parsers
// may differ: behind a request of HTTP/1.0 and behind chunks.
func readWire(raw []byte) (requests []wireRequest) {
	for {
		raw = bytes.TrimLeft(raw, "\r\n")
		var lines []string
		for {
			line, rest, ok := bytes.Cut(raw, []byte("\n"))
			if !ok {
				return requests
			}
			raw = rest
			if line = bytes.TrimSuffix(line, []byte("\r")); len(line) == 0 {
				break
			}
			if n := len(lines) - 1; n > 0 && (line[0] == ' ' || line[0] == '\t') {
				lines[n] += string(line) // obs-fold
				continue
			}
			lines = append(lines, string(line))
		}
		part := strings.Split(lines[0], " ")
		if len(part) != 3 || !strings.HasPrefix(part[2], "HTTP/1.") {
			return requests
		}
		length, last := "", part[2] != "HTTP/1.1"
		for _, line := range lines[1:] {
			name, value, _ := strings.Cut(line, ":")
			value = strings.Trim(value, " \t")
			switch strings.ToLower(name) {
			case "content-length":
				if length != "" && length != value {
					return requests
				}
				length = value
			case "transfer-encoding":
				last = true
			}
		}
		r := wireRequest{method: part[0], target: part[1]}
		if last {
			return append(requests, r)
		}
		if length != "" {
			n, err := strconv.ParseUint(length, 10, 31)
			if err != nil || n > uint64(len(raw)) {
				return requests
			}
			r.body, raw = string(raw[:n]), raw[n:]
		}
		requests = append(requests, r)
	}
}

// FuzzEdgeHead: whatever comes on a connection, what is handed over stood there
// as a request: its target byte for byte on the request line, its body where its
// length says, and nothing that a proxy could take for a body became a request.
// The rest is refused. Nothing panics, and all is given back.
func FuzzEdgeHead(f *testing.F) {
	const host = " HTTP/1.1\r\nHost: h\r\n"
	for _, head := range []string{
		"GET /_matrix/federation/v1/version" + host + "\r\n",
		"GET /a%2Fb//c?x=%21+&" + host + "\r\nPUT /2" + host + "Content-Length: 2\r\n\r\n{}GET /3" + host + "\r\n",
		"PUT /x" + host + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET /smuggled" + host + "\r\n",
		"PUT /x" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled" + host + "\r\n",
		"PUT /x HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}GET /smuggled" + host + "\r\n",
		"POST /x" + host + "Content-Length: 0\r\n\r\n\r\nGET /y" + host + "\r\n",
		"PUT /x" + host + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
		"PUT /x" + host + "Content-Length: 1\r\nContent-Length: 1\r\n\r\naGET //y?" + host + "\r\n",
		"GET /x" + host + "Content-Length: 1\r\n\r\naGET /y" + host + "\r\n",
		"PUT /x" + host + "Content-Length:\r\n 3\r\n\r\nabcGET /y" + host + "\r\n",
		"CONNECT h:443" + host + "\r\n",
		"OPTIONS *" + host + "\r\nGET /y" + host + "\r\n",
		"GET http://h/x" + host + "\r\n",
		"GET /x" + host + "X: a\r\n b\r\n\r\n",
		"GET /x HTTP/1.1\nHost: h\n\nGET /y HTTP/1.1\nHost: h\n\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01",
	} {
		f.Add([]byte(head))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		wire := readWire(raw)
		et := newEdge(t, func(c *EdgeConfig) {
			c.Handle = func(q *EdgeRequest) {
				body := ""
				if q.Body != nil {
					b, _ := q.Body.Bytes()
					body = string(b)
				}
				found := false
				for len(wire) > 0 && !found { // those before it were refused
					w := wire[0]
					wire = wire[1:]
					found = w.method == q.Method && w.target == q.Target && (w.body == body || q.close)
				}
				if !found || q.Target[0] != '/' || bodyless(q.Method) && body != "" {
					t.Errorf("%q: %s %q %q is handed over", raw, q.Method, q.Target, body)
				}
				reply(q)
			}
		})
		client := &fuzzedClient{recordedClient: recordedClient{Reader: bytes.NewReader(raw)}, closed: make(chan struct{})}
		client.once = sync.OnceFunc(func() { close(client.closed) })
		ln := newPipeListener()
		et.serveListener(ln)
		ln.conns <- client
		<-client.closed
		et.close()
		eventually(t, "all is given back", func() bool { s := et.Stats(); return s.Open == 0 && s.Held == 0 })
		et.checkSpool()
		if log := et.log.String(); strings.Contains(log, "panic") {
			t.Fatalf("%q: %s", raw, log)
		}
	})
}

// fuzzedClient is a recordedClient that tells when it is closed.
type fuzzedClient struct {
	recordedClient
	closed chan struct{}
	once   func()
}

func (c *fuzzedClient) Close() error         { c.once(); return nil }
func (c *fuzzedClient) RemoteAddr() net.Addr { return &net.UnixAddr{Net: "unix"} }
func (c *fuzzedClient) LocalAddr() net.Addr  { return &net.UnixAddr{Net: "unix"} }

package netx

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// h2Breaks is a remote that offers HTTP/2 and answers each request on it with a frame,
// and HTTP/1.1 as it should.
func h2Breaks(t *testing.T, frame []byte) (addr string, over1 *atomic.Int64) {
	t.Helper()
	over1 = new(atomic.Int64)
	config := serverTLS("a.test")
	config.NextProtos = []string{"h2", "http/1.1"}
	return tcp(t, func(c net.Conn) {
		tc := tls.Server(c, config)
		if tc.Handshake() != nil {
			return
		}
		defer tc.Close()
		r := bufio.NewReader(tc)
		if tc.ConnectionState().NegotiatedProtocol == "h2" {
			skipToHeaders(r)
			_, _ = tc.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0}) // SETTINGS
			_, _ = tc.Write(frame)
			_ = tc.CloseWrite()
			_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = io.Copy(io.Discard, tc)
			return
		}
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, req.Body)
		over1.Add(1)
		_, _ = io.WriteString(tc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
	}), over1
}

func rst(code byte) []byte { return []byte{0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, code} }

// A remote whose HTTP/2 is broken is asked over HTTP/1.1, at once if the request may be
// repeated or was certainly not processed, and from then on.
func TestBrokenHTTP2(t *testing.T) {
	goAway := []byte{0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	for _, tt := range []struct {
		name, method string
		frame        []byte
		first        bool // the first request succeeds
	}{
		{"PROTOCOL_ERROR, GET", "GET", rst(1), true},
		{"PROTOCOL_ERROR, PUT", "PUT", rst(1), true},
		{"PROTOCOL_ERROR, POST", "POST", rst(1), false},
		{"REFUSED_STREAM, POST", "POST", rst(7), true},
		{"HTTP_1_1_REQUIRED, POST", "POST", rst(13), true},
		{"GOAWAY, GET", "GET", goAway, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, over1 := h2Breaks(t, tt.frame)
			c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
			ask := func() error {
				r := &Request{Destination: "a.test:1", Method: tt.method, Target: "/"}
				if tt.method != "GET" {
					r.Body, r.Size = strings.NewReader("{}"), 2
					r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("{}")), nil }
				}
				resp, err := c.Do(testContext(t), r, nil)
				if err == nil {
					_ = resp.Body.Close()
				}
				return err
			}
			if err := ask(); (err == nil) != tt.first {
				t.Fatalf("the first request: %v", err)
			}
			if err := ask(); err != nil {
				t.Errorf("the second request: %v", err)
			}
			if n := over1.Load(); n != 1 && !tt.first || n != 2 && tt.first {
				t.Errorf("%d requests came over HTTP/1.1", n)
			}
		})
	}
	var once *quirk[string]
	if once.note("x"); once.has("x") {
		t.Error("a nil one remembers")
	}
}

func TestQuirksAreBoundedAndForgotten(t *testing.T) {
	now := time.Unix(1e9, 0)
	q := newQuirk[int](func() time.Time { return now })
	for i := range 3 * maxQuirks {
		q.note(i)
	}
	if len(q.m) > maxQuirks || !q.has(3*maxQuirks-1) {
		t.Errorf("%d are remembered, %d may be", len(q.m), maxQuirks)
	}
	now = now.Add(quirkFor)
	if q.has(3*maxQuirks - 1) {
		t.Error("it is remembered for ever")
	}
}

// A firewall that resets a ClientHello which does not fit into one packet is met with a
// small one, which is remembered.
func TestLargeClientHelloThatIsReset(t *testing.T) {
	var mu sync.Mutex
	var hellos []int
	config := serverTLS("a.test")
	addr := tcp(t, func(c net.Conn) {
		r := bufio.NewReaderSize(c, 4096)
		head, err := r.Peek(5)
		if err != nil {
			return
		}
		size := int(head[3])<<8 | int(head[4])
		mu.Lock()
		hellos = append(hellos, size)
		mu.Unlock()
		if size > 1300 {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
			return
		}
		tc := tls.Server(&bufferedConn{c, r}, config)
		req, err := http.ReadRequest(bufio.NewReader(tc))
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, req.Body)
		_, _ = io.WriteString(tc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
	})
	c := newTestClient(t, map[string]string{"a.test:1": addr}, nil)
	for range 2 {
		if _, _, err := tryGet(testContext(t), c, "a.test:1", "/"); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(hellos) != 3 || hellos[0] < 1300 || hellos[1] > 1300 || hellos[2] > 1300 {
		t.Errorf("ClientHellos of %v bytes, want a large one and two small ones", hellos)
	}
}

type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// testProxy takes CONNECT, notes the target, and answers with a line, or connects to dial.
func testProxy(t *testing.T, answer string, dial string) (address string, asked *[]string) {
	t.Helper()
	asked = new([]string)
	return tcp(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		*asked = append(*asked, req.Method+" "+req.RequestURI+" "+req.Header.Get("Proxy-Authorization"))
		_, _ = io.WriteString(c, answer)
		if dial == "" {
			return
		}
		to, err := net.Dial("tcp", dial)
		if err != nil {
			return
		}
		defer to.Close()
		go func() { _, _ = io.Copy(to, r); _ = to.Close() }()
		_, _ = io.Copy(c, to)
	}), asked
}

func TestProxyConnects(t *testing.T) {
	server := web(t, false, ok, "a.test")
	for _, names := range []bool{false, true} {
		address, asked := testProxy(t, "HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n", server)
		p, err := ParseProxy("http://user:pa%3Ass@"+address, names)
		if err != nil {
			t.Fatal(err)
		}
		c := newTestClient(t, nil, func(c *ClientConfig) {
			c.Proxy = p
			c.Lookup = &fakeLookup{ip: map[string][]string{"a.test": {"127.0.0.9"}}}
		})
		if _, _, err := tryGet(testContext(t), c, "a.test:1", "/"); err != nil {
			t.Fatalf("names %t: %v, asked %q", names, err, *asked)
		}
		want := map[bool]string{false: "CONNECT 127.0.0.9:1", true: "CONNECT a.test:1"}[names]
		if len(*asked) != 1 || (*asked)[0] != want+" Basic dXNlcjpwYTpzcw==" {
			t.Errorf("names %t: asked %q, want %s", names, *asked, want)
		}
		if strings.Contains(p.String(), "pa") {
			t.Errorf("it shows its password: %s", p)
		}
	}
}

func TestProxyFails(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 502 Bad Gateway\r\n\r\n":                                      "unreachable",
		"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n":                    "local",
		"SSH-2.0-OpenSSH\r\n\r\n":                                               "local",
		"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: yyyyyyyyyyyyyyyy\r\n", 2000): "local",
		"": "local",
	} {
		address, _ := testProxy(t, answer, "")
		p, err := ParseProxy((&url.URL{Scheme: "http", Host: address}).String(), true)
		if err != nil {
			t.Fatal(err)
		}
		c := newTestClient(t, nil, func(c *ClientConfig) { c.Proxy = p })
		if _, _, err := tryGet(testContext(t), c, "a.test:1", "/"); FailureOf(err).String() != want {
			t.Errorf("%.30q: %v is %s, want %s", answer, err, FailureOf(err), want)
		}
	}
	for _, bad := range []string{"", "proxy:3128", "https://proxy", "socks5://proxy", "http://", "http://a/b", "http://a?b", "http://a:b:c"} {
		if p, err := ParseProxy(bad, false); err == nil {
			t.Errorf("%q is %v", bad, p)
		}
	}
}

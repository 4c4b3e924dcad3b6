package netx

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestHeadGuard(t *testing.T) {
	line := func(n int) string { return strings.Repeat("a:\r\n", n) }
	for _, test := range []struct {
		name, head string
		ok         bool
	}{
		{"the most", "GET / HTTP/1.1\r\n" + line(maxFields-1) + "\r\n", true},
		{"one more", "GET / HTTP/1.1\r\n" + line(maxFields), false},
		{"without CR", "GET / HTTP/1.1\n" + strings.Repeat("a:\n", maxFields), false},
		{"an end without CR", "GET / HTTP/1.1\n\n" + strings.Repeat("\n", 1000), true},
		{"a body of lines", "PUT / HTTP/1.1\r\nContent-Length: 3000\r\n\r\n" + strings.Repeat("\n", 3000), true},
		{"a CR within a line", "GET / HTTP/1.1\r\na: \rb\r\n" + line(maxFields), false},
	} {
		for _, piece := range []int{1, 3, 1 << 20} { // however it comes
			var g headGuard
			var err error
			for b := []byte(test.head); len(b) > 0 && err == nil; b = b[min(piece, len(b)):] {
				err = g.see(b[:min(piece, len(b))])
			}
			if (err == nil) != test.ok {
				t.Errorf("%s, in pieces of %d: %v", test.name, piece, err)
			}
		}
	}
	g := headGuard{lines: maxFields, done: true}
	if g.next(); g.see([]byte("GET / HTTP/1.1\r\n")) != nil {
		t.Error("the next head has no lines of its own")
	}
}

// Whatever net/http takes for a head of more fields than there may be, the guard refuses.
func FuzzHeadGuard(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: h\r\n\r\n"), uint8(1))
	f.Add([]byte("GET / HTTP/1.1\nHost: h\n"+strings.Repeat("a:b\n", 200)+"\n"), uint8(7))
	f.Fuzz(func(t *testing.T, head []byte, piece uint8) {
		var g headGuard
		refused := false
		for b := head; len(b) > 0 && !refused; {
			n := min(int(piece)+1, len(b))
			refused = g.see(b[:n]) != nil
			b = b[n:]
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
		if err == nil && fields(r.Header) > maxFields && !refused {
			t.Errorf("%d fields pass", fields(r.Header))
		}
	})
}

// Too many fields are refused before there is a request, also on a connection that has
// had others.
func TestEdgeManyFields(t *testing.T) {
	for _, https := range []bool{false, true} {
		t.Run(fmt.Sprint("tls ", https), func(t *testing.T) {
			et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
				c.Handle = reply
				if https {
					c.TLS = testCertificates(t)
				}
			})
			c := et.dial()
			if https {
				c = tls.Client(c, clientTLS())
			}
			getOn(t, c)
			write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n"+strings.Repeat("a:\r\n", maxFields-2)+"\r\n")
			if res, _ := readReply(t, bufio.NewReader(c), "GET"); res.StatusCode != 200 {
				t.Error(res.Status)
			}
			write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n"+strings.Repeat("a:\r\n", maxFields))
			br := bufio.NewReader(c)
			res, body := readReply(t, br, "GET")
			if res.StatusCode != 431 || !strings.Contains(body, "M_TOO_LARGE") {
				t.Errorf("%v %q", res, body)
			}
			if rest, _ := io.ReadAll(br); len(rest) > 0 {
				t.Errorf("%q follows", rest)
			}
			if s := et.Stats(); s.Refused[431] != 1 || s.Requests != 2 {
				t.Errorf("%+v", s)
			}
		})
	}
}

package matrix

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParseServerName(t *testing.T) {
	for _, c := range []struct {
		in, want string
		host     string
		port     int
		hasPort  bool
		ip       string
	}{
		// The examples of the appendices.
		{in: "matrix.org", want: "matrix.org", host: "matrix.org"},
		{in: "matrix.org:8888", want: "matrix.org:8888", host: "matrix.org", port: 8888, hasPort: true},
		{in: "1.2.3.4", want: "1.2.3.4", host: "1.2.3.4", ip: "1.2.3.4"},
		{in: "1.2.3.4:1234", want: "1.2.3.4:1234", host: "1.2.3.4", port: 1234, hasPort: true, ip: "1.2.3.4"},
		{in: "[1234:5678::abcd]", want: "[1234:5678::abcd]", host: "1234:5678::abcd", ip: "1234:5678::abcd"},
		{in: "[1234:5678::abcd]:5678", want: "[1234:5678::abcd]:5678", host: "1234:5678::abcd", port: 5678, hasPort: true, ip: "1234:5678::abcd"},

		{in: "Matrix.ORG:443", want: "Matrix.ORG:443", host: "Matrix.ORG", port: 443, hasPort: true},
		{in: "[::ABCD]", want: "[::ABCD]", host: "::ABCD", ip: "::abcd"},
		{in: "[::FFFF:192.0.2.1]", want: "[::FFFF:192.0.2.1]", host: "::FFFF:192.0.2.1", ip: "192.0.2.1"},
		{in: "localhost", want: "localhost", host: "localhost"},
		{in: "hs1:08448", want: "hs1:08448", host: "hs1", port: 8448, hasPort: true},
		{in: "a:65535", want: "a:65535", host: "a", port: 65535, hasPort: true},
		{in: "xn--bcher-kva.example", want: "xn--bcher-kva.example", host: "xn--bcher-kva.example"},
		{in: "3com.example", want: "3com.example", host: "3com.example"},
		{in: "1.2.3.4.example", want: "1.2.3.4.example", host: "1.2.3.4.example"},
		{in: strings.Repeat("a", MaxServerName), want: strings.Repeat("a", MaxServerName), host: strings.Repeat("a", MaxServerName)},
	} {
		n, err := ParseServerName(c.in)
		if err != nil || string(n) != c.want {
			t.Errorf("ParseServerName(%q) = %q, %v; want %q", c.in, n, err, c.want)
			continue
		}
		host, port, hasPort := n.Split()
		if host != c.host || port != c.port || hasPort != c.hasPort {
			t.Errorf("%q.Split() = %q, %d, %t; want %q, %d, %t", n, host, port, hasPort, c.host, c.port, c.hasPort)
		}
		ip, ok := n.IP()
		if ok != (c.ip != "") || ok && ip != netip.MustParseAddr(c.ip) {
			t.Errorf("%q.IP() = %v, %t; want %q", n, ip, ok, c.ip)
		}
	}
}

func TestParseServerNameRejects(t *testing.T) {
	for _, in := range []string{
		"", ":", ":8448", "a:", "a:0", "a:65536", "a:123456", "a:+1", "a:-1", "a:8 ", "a:http", "a:1:2",
		".", "a.", ".a", "a..b", "a b", "a_b", "a/b", "a@b", "a%b", "a#b", "a\x00", "a\n", "é.example", "\xff",
		"[", "]", "[]", "[]:1", "[::1", "::1]", "::1", "[::1]x", "[::1]:", "x[::1]", "[[::1]]", "[::1]]", "[::1%eth0]",
		"[1.2.3.4]", "[::g]", "[1:2:3:4:5:6:7:8:9]", "[a.b]",
		"1.2.3", "1.2.3.4.5", "256.1.1.1", "010.0.0.1", "2130706433", "a.1",
		strings.Repeat("a", MaxServerName+1),
	} {
		n, err := ParseServerName(in)
		if err == nil || n != "" || !errors.Is(err, ErrServerName) {
			t.Errorf("ParseServerName(%q) = %q, %v; want an ErrServerName", in, n, err)
		}
	}
}

func FuzzParseServerName(f *testing.F) {
	for _, s := range []string{"matrix.org", "Matrix.org:8448", "1.2.3.4:1", "[::1]:8448", "[::ffff:1.2.3.4]", "[::1%eth0]", "a..b", "a:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseServerName(s)
		if err != nil {
			if n != "" || !errors.Is(err, ErrServerName) {
				t.Fatalf("%q: %q with error %v", s, n, err)
			}
			return
		}
		if string(n) != s || len(n) > MaxServerName {
			t.Fatalf("%q became %q", s, n)
		}
		for _, b := range []byte(n) {
			if b <= ' ' || b >= 0x7f || strings.IndexByte(`/\@%#?"'`, b) >= 0 {
				t.Fatalf("%q lets %q pass", s, b)
			}
		}
		if again, err := ParseServerName(string(n)); err != nil || again != n {
			t.Fatalf("%q is not stable: %q, %v", n, again, err)
		}
		host, port, hasPort := n.Split()
		if host == "" || hasPort != (port != 0) || port < 0 || port > 65535 {
			t.Fatalf("%q.Split() = %q, %d, %t", n, host, port, hasPort)
		}
		ip, ok := n.IP()
		if ok && ip.Zone() != "" || !ok && strings.Contains(host, ":") {
			t.Fatalf("%q.IP() = %v, %t", n, ip, ok)
		}
	})
}

package netx

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

// aSession returns the session of a handshake with a server of these names.
func aSession(t *testing.T, names ...string) *tls.ClientSessionState {
	t.Helper()
	addr := tcp(t, func(conn net.Conn) {
		s := tls.Server(conn, serverTLS(names...))
		if s.Handshake() == nil {
			_, _ = s.Write([]byte("x")) // the ticket comes with it
		}
	})
	client, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	cache := tls.NewLRUClientSessionCache(1)
	c := tls.Client(client, &tls.Config{RootCAs: ca().pool, ServerName: names[0], ClientSessionCache: cache})
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cs, ok := cache.Get(names[0])
	if !ok {
		t.Fatal("there is no session")
	}
	return cs
}

func TestSessionCacheIsBounded(t *testing.T) {
	cs := aSession(t, "a.test")
	c := newSessionCache(1000, 64<<10)
	c.Put("first", cs)
	size := c.bytes
	for i := range 1000 {
		c.Put(fmt.Sprintf("s%03d", i), cs)
		if _, ok := c.Get("first"); !ok { // what is used stays
			t.Fatalf("it is forgotten after %d", i)
		}
		if c.bytes > c.mostBytes || int(c.bytes/size) > len(c.by)+1 {
			t.Fatalf("%d bytes, %d sessions", c.bytes, len(c.by))
		}
	}
	if n := len(c.by); n < 10 || c.has("s000") || !c.has("s999") {
		t.Errorf("%d sessions, of %d bytes each", n, size)
	}
	c.Put("first", nil)
	if c.has("first") {
		t.Error("it is not forgotten")
	}
	few := newSessionCache(2, 1<<20)
	for _, name := range []string{"a", "b", "c"} {
		few.Put(name, cs)
	}
	if few.has("a") || !few.has("b") || !few.has("c") {
		t.Error("more than two, or not the last ones")
	}
	var many []string // of names
	for i := range 800 {
		many = append(many, fmt.Sprintf("%s%d.test", strings.Repeat("x", 20), i))
	}
	c.Put("large", aSession(t, many...))
	if c.has("large") {
		t.Error("a large one is kept")
	}
}

// A server's junk is not taken: its certificates would be held for as long as the
// connection.
func TestLargeChainsAreRefused(t *testing.T) {
	config := serverTLS("a.test").Clone()
	cert := config.Certificates[0]
	for len(cert.Certificate) < 100 {
		cert.Certificate = append(cert.Certificate, ca().cert.Raw)
	}
	config.Certificates = []tls.Certificate{cert}
	addr := tcp(t, func(c net.Conn) {
		s := tls.Server(c, config)
		if s.Handshake() == nil {
			_, _ = bufio.NewReader(s).ReadByte()
		}
	})
	_, _, err := tryGet(testContext(t), newTestClient(t, map[string]string{"a.test:1": addr}, nil), "a.test:1", "/")
	wantFailure(t, err, matrix.FailTLS, OpTLS)
	if !strings.Contains(err.Error(), "are the most") {
		t.Error(err)
	}
}

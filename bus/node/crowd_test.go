package node

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// Any number of connections that say nothing, say half of something or do not read leave
// the status to others, and never are there more than statusConns.
func TestTheStatusHasFewConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const most = 4
	ln := newCrowdListener(inner, most)
	release, started := make(chan struct{}), make(chan struct{})
	s := &http.Server{ConnState: crowdState, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			started <- struct{}{}
			<-release
		}
		io.WriteString(w, "fine")
	})}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ln) }()
	dial := func(text string) net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(c, text) // it may be closed already
		return c
	}
	get := func(path string) net.Conn { return dial("GET " + path + " HTTP/1.1\r\nHost: h\r\n\r\n") }
	fine := func(c net.Conn) {
		t.Helper()
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != "fine" {
			t.Error(string(b), err)
		}
	}
	getSlow := func() net.Conn {
		c := get("/slow")
		<-started
		return c
	}
	slow := getSlow()
	for i := range 10 * most {
		dial([]string{"", "GET /x", "GET /x HTTP/1.1\r\nHost: h\r\n\r\n"}[i%3])
		if i%most == 0 {
			fine(get("/"))
		}
		ln.mu.Lock()
		if n := ln.open.Len(); n > most {
			t.Errorf("%d connections", n)
		}
		ln.mu.Unlock()
	}
	var busy []net.Conn
	for range most - 1 {
		busy = append(busy, getSlow())
	}
	waits := get("/") // until one of them is through
	close(release)
	for _, c := range append(busy, slow, waits) { // the oldest is still there
		fine(c)
	}
	s.Close()
	if err := <-ended; err != http.ErrServerClosed {
		t.Error(err)
	}
}

// Only names that no other site can have lead to the status.
func TestTheStatusHasAName(t *testing.T) {
	c := StatusConfig{Listen: "box.lan:8011", Hosts: []string{"Fsbus.Lan"}}
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST:8011": true, "localhost.": true, "a.localhost": true, "127.0.0.1:8011": true, "[::1]:8011": true, "192.168.1.2": true,
		"box.lan": true, "box.lan:80": true, "fsbus.lan:8011": true, "fsbus.lan.": true, "": true,
		"evil.example": false, "localhost.evil.example": false, "127.0.0.1.evil.example": false, "xbox.lan": false, "[evil": false, "fsbus": false,
	} {
		if got := c.answersTo(statusHost(host)); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}

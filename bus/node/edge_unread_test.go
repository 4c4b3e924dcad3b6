package node

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"fsbus/netx"
)

// frame is one of HTTP/2 (RFC 9113 4.1).
func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	b := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

// fields writes a header without compression (RFC 7541 6.2.2).
func fields(pairs ...string) (b []byte) {
	length := func(n int) { // RFC 7541 5.1, with a prefix of 7 bits
		if n < 127 {
			b = append(b, byte(n))
			return
		}
		b = append(b, 127)
		for n -= 127; n >= 128; n >>= 7 {
			b = append(b, byte(n)|128)
		}
		b = append(b, byte(n))
	}
	for i, s := range pairs {
		if i%2 == 0 {
			b = append(b, 0)
		}
		length(len(s))
		b = append(b, s...)
	}
	return b
}

// asks has server i ask for something over a connection on which no answer is ever
// read: there is no window to send one in.
func (r *edgeRig) asks(i int, targets []string) {
	r.t.Helper()
	c, err := net.Dial("unix", filepath.Join(r.dir, "edge.sock"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	conn := tls.Client(c, &tls.Config{RootCAs: r.pool, ServerName: "us.test", NextProtos: []string{"h2"}})
	out := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	out = append(out, frame(4, 0, 0, []byte{0, 4, 0, 0, 0, 0})...) // INITIAL_WINDOW_SIZE 0
	out = append(out, frame(4, 1, 0, nil)...)
	for k, target := range targets {
		req := r.request(i, "GET", target, "")
		h := fields(":method", "GET", ":scheme", "https", ":authority", "us.test", ":path", target, "authorization", req.Header.Get("Authorization"))
		out = append(out, frame(1, 5, uint32(2*k+1), h)...)
	}
	if _, err := conn.Write(out); err != nil {
		r.t.Fatal(err)
	}
	go io.Copy(io.Discard, conn)
}

// leaves has server i leave n answers unread.
func (r *edgeRig) leaves(i, n int) {
	r.t.Helper()
	r.sends(r.request(i, "GET", "/_matrix/federation/v1/event/$a", ""), 200, "") // its key is known from now on
	const perConn = 20
	for from := 0; from < n; from += perConn {
		var targets []string
		for k := from; k < min(n, from+perConn); k++ {
			targets = append(targets, fmt.Sprintf("/_matrix/federation/v1/state_ids/!r:us.test?event_id=$%d.%d", i, k))
		}
		r.asks(i, targets)
		r.until("the homeserver is asked", func() bool {
			r.home.mu.Lock()
			defer r.home.mu.Unlock()
			asked := 0
			for _, s := range r.home.seen {
				if strings.Contains(s, fmt.Sprintf("event_id=$%d.", i)) {
					asked++
				}
			}
			return asked == min(n, from+perConn)
		})
	}
}

// answersOf has the homeserver answer transactions with little, and all else with
// bytes.
func (h *home) answersOf(bytes int) (large string) {
	large = `{"state":"` + strings.Repeat("x", bytes) + `"}`
	h.answers(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.Contains(req.RequestURI, "/send/") {
			io.WriteString(w, `{"pdus":{"$`+strings.Repeat("x", 43)+`":{}}}`)
			return
		}
		io.WriteString(w, large)
	})
	return large
}

const noRate = "origin_burst = 1000\norigin_rate = 1000.0\n"

// Servers that do not read their answers have a quarter of the room each, and when
// there is none left, others get it. No transaction needs any.
func TestEdgeUnreadAnswersHoldUpNobody(t *testing.T) {
	r := startEdge(t, noRate, config{})
	r.node.edge.unread.still.Store(0)
	large := r.home.answersOf(66 << 10)
	spool := r.node.edge.answers
	unread := func() (answers int, cuts int64) {
		u := r.node.edge.unread
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.by[string(r.world.Names()[0])]), u.cuts.Load()
	}
	const most = spoolFiles / unreadShare
	r.leaves(0, most+16)
	r.until("what is over its share is cut", func() bool {
		n, cuts := unread()
		return n == most && cuts == 16
	})
	r.until("it is let go", func() bool { return spool.Stats().Files == most })
	for i := 1; i <= 4; i++ {
		r.leaves(i, most)
	}
	r.until("the spool is full", func() bool { s := spool.Stats(); return s.MaxFiles == spoolFiles && s.Full > 0 })
	for i := 6; i < 9; i++ {
		r.sends(r.txn(i, "victim", pduNo(i), ""), 200, "")
		r.sends(r.request(i, "GET", "/_matrix/federation/v1/state_ids/!r:us.test?event_id=$e", ""), 200, large)
	}
	if n := r.home.times("PUT /_matrix/federation/v1/send/victim"); n != 3 {
		t.Errorf("the homeserver saw the transactions %d times", n)
	}
	_, cuts := unread()
	if got := countOf(r.report().Edge.Replies, "unread"); got != cuts || cuts < 16+most {
		t.Errorf("%d were cut, %d are reported", cuts, got)
	}
}

// countOf returns one of the counts of a report.
func countOf(list []CountReport, name string) int64 {
	for _, c := range list {
		if c.Name == name {
			return c.Count
		}
	}
	return -1
}

// A transaction is answered also where the spool for answers takes nothing at all,
// whatever the size of its answer up to the one that is kept.
func TestEdgeAnswersToTransactionsNeedNoSpool(t *testing.T) {
	r := startEdge(t, "", config{})
	for _, n := range []int{0, 100, wholeAtOnce + 1, int(maxAnswerKept) - 20} {
		answer := `{"pdus":{},"x":"` + strings.Repeat("x", n) + `"}`
		r.home.answers(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) })
		for range 2 { // the second time from the store
			r.sends(r.txn(0, fmt.Sprint("t", n), pduNo(n), ""), 200, answer)
		}
		if s := r.node.edge.answers.Stats(); s.MaxMemory+s.MaxDisk > 0 {
			t.Fatalf("an answer of %d bytes: %+v", len(answer), s)
		}
	}
	large := `{"pdus":{},"x":"` + strings.Repeat("x", int(maxAnswerKept)) + `"}`
	r.home.answers(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, large) })
	r.sends(r.txn(0, "large", pduNo(1), ""), 200, large)
	if s := r.node.edge.answers.Stats(); s.MaxDisk != int64(len(large)) {
		t.Errorf("%+v", s)
	}
	if n := len(r.home.seen); n != 5 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
	eventually(t, "nothing is left unread", func() bool {
		u := r.node.edge.unread
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.by) == 0
	})
}

// spooledBody returns a complete body of a size, which lies in a file.
func spooledBody(t *testing.T, s *netx.Spool, size int) *netx.Body {
	t.Helper()
	b := s.New()
	if _, err := b.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	b.CloseWrite(nil)
	return b
}

func TestUnreadCutsWhatStandsStill(t *testing.T) {
	spool, err := netx.NewSpool(netx.SpoolConfig{Dir: filepath.Join(t.TempDir(), "spool"), Disk: 1 << 20, Files: 8})
	if err != nil {
		t.Fatal(err)
	}
	u := newUnread(1<<20, 0)
	u.limit.files = 8
	u.still.Store(0)
	add := func(who string, body *netx.Body) *unreadAnswer {
		t.Helper()
		defer body.Release() // as after Discard
		return u.spooled(who, body)
	}
	is := func(a *unreadAnswer, cut bool) {
		t.Helper()
		if _, err := a.Read(make([]byte, 1)); errors.Is(err, errUnread) != cut {
			t.Errorf("%v", err)
		}
	}
	a1 := add("a", spooledBody(t, spool, 10))
	a2 := add("a", spooledBody(t, spool, 10))
	is(a1, false) // so a2 has stood still for longer
	a3 := add("a", spooledBody(t, spool, 10))
	is(a2, true)
	is(a1, false)
	is(a3, false)

	// One answer that is larger than its share is not cut for that, but it is when
	// another comes; one that is read twice counts once.
	b1 := add("b", spooledBody(t, spool, 600<<10))
	is(b1, false)
	shared := spooledBody(t, spool, 10)
	shared.Retain()
	b2, b3 := add("b", shared), add("b", shared)
	is(b1, true)
	is(b2, false)
	is(b3, false)
	b4 := add("b", spooledBody(t, spool, 10))
	is(b2, false)
	is(b4, false)

	// Room is made by who holds most, and by what is all there.
	arriving := spool.New()
	if _, err := arriving.Write(make([]byte, 900<<10)); err != nil {
		t.Fatal(err)
	}
	c1 := u.spooled("c", arriving)
	is(a1, false)
	if !u.makeRoom() {
		t.Error("no room")
	}
	is(c1, false)
	is(a3, true) // of two that hold as much
	if a1.Close(); !u.makeRoom() || !u.makeRoom() || !u.makeRoom() || u.makeRoom() {
		t.Error("more or fewer than three were left")
	}
	is(c1, false)
	arriving.Release()
	c1.Close()
	if s := spool.Stats(); s.Files != 0 || s.Disk != 0 || len(u.by) != 0 {
		t.Errorf("%+v is left, %d clients", s, len(u.by))
	}
	if n := u.cuts.Load(); n != 6 {
		t.Errorf("%d were cut", n)
	}
}

func TestUnreadBoundsWhatIsInMemory(t *testing.T) {
	u := newUnread(1<<20, 100)
	var all []*unreadAnswer
	for i := range 20 {
		all = append(all, u.inMemory(fmt.Sprint(i%5), make([]byte, 12)))
		if n := u.keptLocked(); n > 100 {
			t.Fatalf("%d bytes are held", n)
		}
	}
	if n := u.cuts.Load(); n != 12 {
		t.Errorf("%d were cut", n)
	}
	for _, a := range all[len(all)-5:] { // the latest of each
		if b, err := io.ReadAll(a); err != nil || !bytes.Equal(b, make([]byte, 12)) {
			t.Errorf("%q, %v", b, err)
		}
	}
	if u.makeRoom() {
		t.Error("what is in memory makes no room in the spool")
	}
	for _, a := range all {
		a.Close()
	}
	if len(u.by) != 0 {
		t.Errorf("%d clients are left", len(u.by))
	}
}

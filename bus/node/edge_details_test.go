package node

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
)

// bareEdge is one that looks into requests, and does nothing else.
func bareEdge(change func(*Config)) *edgeShell {
	cfg := DefaultConfig()
	cfg.Homeserver.ServerName = "us.test"
	cfg.Edge.Listen = []string{"127.0.0.1:8448"}
	if change != nil {
		change(&cfg)
	}
	n := &Node{clock: sched.NewClock(), takeover: &takeover{}}
	n.cfg.Store(&cfg)
	s := &edgeShell{n: n, covers: newHasher()}
	core := cfg.Edge.core()
	s.acl.Store(edge.NewACL(&core))
	return s
}

// largest is a transaction that makes us hold as much as it can besides its body, in
// what its sender decides about.
func largest(keys, values int) (header http.Header, target, body string) {
	header = http.Header{}
	for i := range keys {
		header.Add("Authorization", fmt.Sprintf(`X-Matrix origin="%s",destination="us.test",key="ed25519:%0240d",sig="c2ln"`, "x.test", i))
	}
	for i := range values {
		header[fmt.Sprintf("X-%d", i)] = []string{strings.Repeat("a", 20)}
	}
	if room := maxHeader - headerSize(header) - fieldCost - valueCost - 1; room > 0 {
		header["X"] = []string{strings.Repeat("a", int(room))}
	}
	var pdus, edus []string
	for i := range matrix.MaxPDUs {
		var prev []string
		for j := range 20 {
			prev = append(prev, fmt.Sprintf(`"$%d"`, j))
		}
		pdus = append(pdus, fmt.Sprintf(`{"content":{},"prev_events":[%s],"room_id":"!%0254d","type":"m"}`, strings.Join(prev, ","), i))
	}
	for i := range matrix.MaxEDUs {
		edus = append(edus, fmt.Sprintf(`{"content":{"push":[{"user_id":"@%d"},{"user_id":"@a%d"}]},"edu_type":"m.presence"}`, i, i))
	}
	body = `{"edus":[` + strings.Join(edus, ",") + `],"origin":"x.test","pdus":[` + strings.Join(pdus, ",") + `]}`
	target = sendPrefix + "1?" + strings.Repeat("x", 8<<10-len(sendPrefix)-2)
	return header, target, body
}

// What a request holds besides its body is what it is said to hold.
func TestEdgeRequestsAreCountedAsLargeAsTheyAre(t *testing.T) {
	s := bareEdge(nil)
	spool, err := netx.NewSpool(netx.SpoolConfig{Dir: t.TempDir(), Disk: 64 << 20, Files: 1000})
	if err != nil {
		t.Fatal(err)
	}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // what pools held
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	measure := func(keys, values int) (each, size, beyond int64) {
		const many = 50
		var kept []any
		before := heap()
		for i := range many {
			header, target, body := largest(keys, values)
			if n := headerSize(header); n > maxHeader {
				t.Fatalf("a header of %d bytes", n)
			}
			q := &netx.EdgeRequest{ID: uint64(i), Method: "PUT", Target: target, Header: header, Received: time.Now(), Size: int64(len(body)), Body: spool.New()}
			if _, err := q.Body.Write([]byte(body)); err != nil {
				t.Fatal(err)
			}
			q.Body.CloseWrite(nil)
			defer q.Body.Release()
			if ref := s.check(q); ref != nil {
				t.Fatalf("%+v", ref)
			}
			c := &caller{q: q, endpoint: matrix.Match(q.Method, q.Target)}
			a, err := s.arrived(q, c)
			if err != nil {
				t.Fatal(err)
			}
			size, beyond = a.Size-q.Size, c.extra
			kept = append(kept, c, a, q.Header.Clone()) // net/http has one as well
		}
		each = (heap() - before) / many
		runtime.KeepAlive(kept)
		return each, size, beyond
	}
	for _, shape := range []struct{ keys, values int }{{1, 0}, {10, 0}, {1, 50}} {
		// What other tests have left goes meanwhile, which makes each too small.
		var most int64
		for range 5 {
			each, size, beyond := measure(shape.keys, shape.values)
			most = max(most, each)
			if each > size {
				t.Errorf("%+v: a request takes %d bytes and is counted as %d", shape, each, size)
			}
			if beyond > maxDetails || beyond < maxDetails*3/4 {
				t.Errorf("%+v: %d bytes beyond the usual, at most %d are expected", shape, beyond, maxDetails)
			}
			if size <= most+perRequest {
				break
			}
		}
		if _, size, _ := measure(shape.keys, shape.values); size > most+perRequest {
			t.Errorf("%+v: a request takes %d bytes at most and is counted as %d", shape, most, size)
		}
	}
}

// What Synapse sends is counted as usual.
func TestEdgeUsualRequestsHaveNoDetails(t *testing.T) {
	s := bareEdge(nil)
	auth := matrix.XMatrix{Origin: "matrix.example-of-a-name.org", Destination: "us.test", Key: "ed25519:a_AbCd", Sig: strings.Repeat("A", 86)}
	h := http.Header{
		"Authorization": {auth.String()}, "Content-Type": {"application/json"}, "User-Agent": {"Synapse/1.160.0"},
		"Accept": {"*/*"}, "Accept-Encoding": {"gzip"}, "Content-Length": {"900"},
	}
	spool, err := netx.NewSpool(netx.SpoolConfig{Memory: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	body := `{"origin":"matrix.example-of-a-name.org","pdus":[` + pduNo(1) + `],"edus":[` + presenceOfA + `]}`
	q := &netx.EdgeRequest{Method: "PUT", Target: sendPrefix + "1700000000000-12345", Header: h, Size: int64(len(body)), Body: spool.New(), Received: time.Now()}
	q.Body.Write([]byte(body))
	q.Body.CloseWrite(nil)
	c := &caller{q: q, endpoint: matrix.Match(q.Method, q.Target)}
	if a, err := s.arrived(q, c); err != nil || c.extra != 0 || a.Size != perRequest+q.Size {
		t.Errorf("%v, %d bytes more than usual, %d in all", err, c.extra, a.Size)
	}
}

func TestEdgeRefusesLargeHeaders(t *testing.T) {
	r := startEdge(t, "", config{})
	const target = "/_matrix/federation/v1/event/$a"
	fields := func(n int) *http.Request {
		req := r.request(0, "GET", target, "")
		for i := range n {
			req.Header.Set(fmt.Sprintf("X-%d", i), "1")
		}
		return req
	}
	r.sends(fields(40), 200, "")
	s, b := r.send(fields(100))
	if s != 431 || matrix.ErrorCode([]byte(b)) != matrix.MTooLarge {
		t.Errorf("%d %s", s, b)
	}
	if n := r.home.times("GET " + target); n != 1 {
		t.Errorf("the homeserver saw %d", n)
	}
}

func TestDetailsAreBounded(t *testing.T) {
	d := newDetails(8 * maxDetails)
	for i := range 2 { // a quarter of it
		if !d.take("a", maxDetails) {
			t.Fatalf("the %d. is refused", i+1)
		}
	}
	if d.take("a", 1) || !d.take("a", 0) {
		t.Error("an address has more than its share, or what takes nothing is refused")
	}
	for i := range 6 {
		if !d.take("", maxDetails) {
			t.Errorf("the %d. of nobody in particular is refused", i+1)
		}
	}
	if d.take("b", 1) {
		t.Error("more than there is")
	}
	d.give("a", maxDetails)
	if !d.take("b", maxDetails) {
		t.Error("what was given back is not there")
	}
	for peer, n := range map[string]int{"a": 1, "b": 1, "": 6} {
		for range n {
			d.give(peer, maxDetails)
		}
	}
	if d.used != 0 || len(d.by) != 0 {
		t.Errorf("%d bytes are left, of %d", d.used, len(d.by))
	}
	if small := newDetails(maxDetails); !small.take("a", maxDetails) {
		t.Error("one request has no room")
	}
}

// However a request ends, its details are given back, and not before its answer is
// written.
func TestEdgeGivesDetailsBack(t *testing.T) {
	r := newEdgeRig(t, "", config{})
	blocked, release := make(chan struct{}), make(chan struct{})
	r.start(hooks{})
	d := r.node.edge.details
	used := func() int64 {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.used
	}
	padded := func(req *http.Request) *http.Request {
		req.Header.Set("X-Pad", strings.Repeat("a", 8<<10))
		return req
	}
	r.home.answers(func(w http.ResponseWriter, req *http.Request) {
		switch {
		case strings.HasSuffix(req.URL.Path, "/slow"):
			blocked <- struct{}{}
			<-release
		case req.URL.RawQuery == "cut":
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, `{"pdus":{}}`)
	})
	const event = "/_matrix/federation/v1/event/$"
	for range 2 {
		r.sends(padded(r.txn(0, "t1", pduNo(1), "")), 200, "") // from the homeserver, then from the store
		r.sends(padded(r.txn(0, "p", "", presenceOfA)), 200, "")
		r.sends(padded(r.request(0, "GET", event+"a", "")), 200, "")
	}
	auth := r.request(1, "GET", event+"a", "").Header.Get("Authorization")
	r.sends(padded(r.withAuth(auth, "GET", event+"b", "")), 401, "")
	r.sends(padded(r.request(0, "POST", "/_matrix/federation/v1/user/keys/claim", "[]")), 400, "")
	r.sends(padded(r.request(0, "POST", "/_matrix/federation/v1/user/keys/claim?cut", "{}")), 502, "")
	eventually(t, "all is given back", func() bool { return used() == 0 })

	// So it is of those that join one under way, whose answer is the only thing that
	// still refers to them.
	joined := countOf(r.report().Edge.Ways, "joined")
	answered := make(chan int, 3)
	for range 3 {
		req := padded(r.txn(0, "slow", pduNo(3), ""))
		go func() {
			resp, err := r.https.Do(req)
			if err != nil {
				answered <- 0
				return
			}
			resp.Body.Close()
			answered <- resp.StatusCode
		}()
	}
	<-blocked
	r.until("two join the first", func() bool { return countOf(r.report().Edge.Ways, "joined") == joined+2 })
	release <- struct{}{}
	for range 3 {
		if s := <-answered; s != 200 {
			t.Errorf("one of three equal ones is answered %d", s)
		}
	}
	eventually(t, "all is given back", func() bool { return used() == 0 })

	// Of one that is under way it is held, also if nobody waits for it any more.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	req := padded(r.txn(1, "slow", pduNo(2), "")).WithContext(ctx)
	go func() {
		_, err := r.https.Do(req)
		done <- err
	}()
	<-blocked
	cancel()
	if err := <-done; err == nil {
		t.Error("it was answered")
	}
	eventually(t, "that is noticed", func() bool { return r.node.edge.server.Stats().Gone == 1 })
	if n := used(); n < 6<<10 {
		t.Errorf("%d bytes are held", n)
	}
	// Those that would need more than there is are to come again; others are not hit.
	rest := d.limit - used()
	if !d.take("", rest) {
		t.Fatal("the rest is not there")
	}
	s, b := r.send(padded(r.request(0, "GET", event+"c", "")))
	if s != 503 || matrix.ErrorCode([]byte(b)) != matrix.MUnknown {
		t.Errorf("%d %s", s, b)
	}
	r.sends(r.request(0, "GET", event+"d", ""), 200, "")
	if n := countOf(r.report().Edge.Ways, "no_room_for_details"); n != 1 {
		t.Errorf("%d are counted", n)
	}
	d.give("", rest)
	close(release)
	eventually(t, "all is given back", func() bool { return used() == 0 })
}

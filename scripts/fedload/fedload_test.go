package fedload

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedsim/sim"
)

func homeserver(t *testing.T) Homeserver {
	t.Helper()
	key, err := matrix.NewSigningKey(make([]byte, ed25519.SeedSize), "test")
	if err != nil {
		t.Fatal(err)
	}
	return Homeserver{Name: "origin.test:8448", Key: key}
}

// world starts simulated servers that verify hs, and a direct client.
func world(t *testing.T, hs Homeserver, c sim.Config) (*sim.World, *Client) {
	t.Helper()
	c.Origins = []sim.Origin{{Name: hs.Name, KeyID: hs.Key.ID(), PublicKey: hs.Key.Public()}}
	w, err := sim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	w.Start()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.CAPEM())
	client := NewDirect(roots, hs)
	t.Cleanup(client.Close)
	return w, client
}

// seen is what the far end of a hook got.
type seen struct {
	line   string // the request line
	header http.Header
	host   string
	body   string
}

// answerOne takes one connection, reads one request and answers it with 200.
// Then it waits for the client to close.
func answerOne(l net.Listener) (seen, error) {
	c, err := l.Accept()
	if err != nil {
		return seen{}, err
	}
	defer c.Close()
	var head strings.Builder
	in := bufio.NewReader(io.TeeReader(c, &head))
	req, err := http.ReadRequest(in)
	if err != nil {
		return seen{}, err
	}
	line, _, _ := strings.Cut(head.String(), "\r\n")
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return seen{}, err
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"); err != nil {
		return seen{}, err
	}
	if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		return seen{}, errors.New("the connection was used again")
	}
	return seen{line, req.Header, req.Host, string(body)}, nil
}

func TestHookSpeaksAsSynapseDoes(t *testing.T) {
	hs := homeserver(t)
	requests := []*Request{
		{Destination: "remote.test:8448", Method: "GET", Target: "/_matrix/federation/v1/event/%24a%2Fb//c?x=1+2&y=%41"},
		Send(hs.Name, "remote.test:8448", "1", time.UnixMilli(1), nil, []json.RawMessage{hs.Typing("a", "!r:x", true)}),
	}
	for _, network := range []string{"tcp", "unix"} {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = filepath.Join(t.TempDir(), "sock")
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		address = l.Addr().String()
		if network == "unix" {
			address = "unix:" + address
		}
		c := NewHook(address, "s3cret", hs)
		for _, r := range requests {
			var got seen
			done := make(chan error, 1)
			go func() {
				var err error
				got, err = answerOne(l)
				done <- err
			}()
			if res := c.Do(t.Context(), r); res.Err != nil || res.Status != 200 || string(res.Body) != "{}" {
				t.Fatalf("%s: %+v", network, res)
			}
			if err := <-done; err != nil {
				t.Fatalf("%s: %v", network, err)
			}
			if want := r.Method + " matrix-federation://remote.test:8448" + r.Target + " HTTP/1.1"; got.line != want {
				t.Errorf("%s: request line %q, want %q", network, got.line, want)
			}
			if got.host != "remote.test:8448" || got.header.Get("Proxy-Authorization") != "Bearer s3cret" ||
				got.header.Get("Connection") != "close" || got.body != string(r.Body) {
				t.Errorf("%s: %+v", network, got)
			}
			if hasType := got.header.Get("Content-Type") == "application/json"; hasType != (len(r.Body) > 0) {
				t.Errorf("%s: Content-Type %q of a body of %d bytes", network, got.header.Get("Content-Type"), len(r.Body))
			}
			x, err := matrix.ParseXMatrix(got.header.Get("Authorization"))
			if err != nil {
				t.Fatal(err)
			}
			if x.Origin != string(hs.Name) || x.Destination != "remote.test:8448" {
				t.Errorf("%s: signed by %q for %q", network, x.Origin, x.Destination)
			}
			if err := matrix.VerifyRequest(hs.Key.Public(), x, r.Method, r.Target, r.Body); err != nil {
				t.Errorf("%s: %v", network, err)
			}
		}
	}
}

func TestReplayIsWhole(t *testing.T) {
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 20})
	const rounds = 3
	transactions, targets := 0, make(map[string]bool)
	report := c.Run(t.Context(), 8, Replay(hs.Name, w.Names(), "t", rounds*CaptureLines()), func(r *Request, res Result) {
		text := r.Target + string(r.Body)
		for _, placeholder := range []string{"origin.test\"", "remote.test", "TXN", "HASH"} {
			if strings.Contains(text, placeholder) {
				t.Errorf("%s is left in %s", placeholder, text)
			}
		}
		if res.Err != nil || res.Status != 200 && res.Status != 404 {
			t.Errorf("%s %s: %+v", r.Method, r.Target, res)
		}
		if r.Method == "PUT" {
			transactions++
			if targets[r.Target] {
				t.Errorf("%s comes twice", r.Target)
			}
			targets[r.Target] = true
			if res.Status != 200 {
				t.Errorf("%s: %s", r.Target, res.Body)
			}
		}
	})
	s := w.Stats()
	if report.Requests != rounds*int64(CaptureLines()) || s.Requests != report.Requests || report.Failed != 0 {
		t.Errorf("%v; the servers got %d", report, s.Requests)
	}
	got := s.Transactions
	if got.Count != int64(transactions) || got.Repeated != 0 || got.Duplicates != 0 || got.Refused != 0 || got.PDUs == 0 || got.WithoutPDUs == 0 {
		t.Errorf("%d transactions were sent, taken: %+v", transactions, got)
	}
	if len(s.EDUs) != 5 {
		t.Errorf("EDU types %v: want the five that Synapse sends", s.EDUs)
	}
	if s.Endpoints["query/profile"].Outcomes["200"] == 0 || s.Endpoints["user/keys/claim"].Outcomes["200"] == 0 {
		t.Errorf("endpoints %+v", s.Endpoints)
	}
}

func TestContentIsDistinctAndCanonical(t *testing.T) {
	hs, now := homeserver(t), time.UnixMilli(1234)
	one, two := hs.Message("a", "!r:x", "<one>", 1, now), hs.Message("a", "!r:x", "two", 2, now)
	if sim.EventID(one) == sim.EventID(two) {
		t.Error("two messages have one hash")
	}
	if err := matrix.VerifyJSON(one, string(hs.Name), hs.Key.ID(), hs.Key.Public()); err != nil {
		t.Error(err)
	}
	edus := []json.RawMessage{
		hs.Typing("a", "!r:x", true), hs.Presence("a", "online", "here"),
		hs.Receipt("a", "!r:x", "$e", now), hs.ToDevice("a", "@b:remote.test", "m1"),
	}
	r := Send(hs.Name, "remote.test", "a/b", now, []json.RawMessage{one, two}, edus)
	if canonical, err := matrix.CanonicalJSON(r.Body); err != nil || string(canonical) != string(r.Body) {
		t.Errorf("body %s is not canonical (%v)", r.Body, err)
	}
	if !strings.HasSuffix(r.Target, "/send/a%2Fb") {
		t.Errorf("target %q", r.Target)
	}
	if got := string(Send(hs.Name, "remote.test", "1", now, nil, nil).Body); got != `{"origin":"origin.test:8448","origin_server_ts":1234,"pdus":[]}` {
		t.Errorf("empty transaction %s", got)
	}
}

func TestRunBoundsConcurrency(t *testing.T) {
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 20, Latency: 10 * time.Millisecond})
	report := c.Run(t.Context(), 4, func(yield func(*Request) bool) {
		for i := range 40 {
			if !yield(Lookup(w.Names()[i%20], "user")) {
				return
			}
		}
	}, nil)
	if report.Requests != 40 || report.Statuses[200] != 40 || report.Failed != 0 || report.Bytes == 0 {
		t.Errorf("%v", report)
	}
	if s := w.Stats(); s.MaxInFlight != 4 {
		t.Errorf("%d requests at once, want 4", s.MaxInFlight)
	}
	if p := report.Headers.Percentile(50); p < 10*time.Millisecond || report.Whole.Count() != 40 || report.Elapsed < 100*time.Millisecond {
		t.Errorf("%v", report)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 1, Shares: sim.Shares{sim.Hanging: 1}})
	ctx, cancel := context.WithCancel(t.Context())
	begun := 0
	report := c.Run(ctx, 2, func(yield func(*Request) bool) {
		for yield(Lookup(w.Names()[0], "user")) {
			if begun++; begun == 2 {
				cancel()
			}
		}
	}, nil)
	if report.Requests > 3 || report.Statuses[0] != report.Requests || !errors.Is(report.FirstErr, context.Canceled) {
		t.Errorf("%v", report)
	}
}

func TestRefusedConnectionsAreReported(t *testing.T) {
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 2, Shares: sim.Shares{sim.Dead: 0.5}})
	dead, well := w.NamesOf(sim.Dead)[0], w.NamesOf(sim.Well)[0]
	report := c.Run(t.Context(), 1, func(yield func(*Request) bool) {
		_ = yield(Lookup(dead, "user")) && yield(Lookup(well, "user"))
	}, nil)
	if report.Failed != 1 || report.Statuses[0] != 1 || report.Statuses[200] != 1 || report.Headers.Count() != 1 {
		t.Errorf("%v", report)
	}
	if text := report.String(); !strings.Contains(text, "no answer x1 200 x1") || !strings.Contains(text, "1 failed, first: dial") {
		t.Errorf("report %q", text)
	}
}

func TestBadRequestsAreNotSent(t *testing.T) {
	c := NewHook("127.0.0.1:1", "s3cret", homeserver(t))
	for _, r := range []*Request{
		{Destination: "remote.test", Method: "GET", Target: "no-slash"},
		{Destination: "remote.test", Method: "PUT", Target: "/", Body: []byte("not JSON")},
		{Destination: "remote.test", Method: "BAD METHOD", Target: "/"},
	} {
		if res := c.Do(t.Context(), r); res.Err == nil || !strings.HasPrefix(res.Err.Error(), "fedload: ") {
			t.Errorf("%+v: %v", r, res.Err)
		}
	}
}

func TestResultsKeepTheStartOfLargeBodies(t *testing.T) {
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 1})
	res := c.Do(t.Context(), Media(w.Names()[0], 1<<20))
	if res.Err != nil || res.Size <= 1<<20 || len(res.Body) != keepBody {
		t.Errorf("%d bytes, %d kept, %v", res.Size, len(res.Body), res.Err)
	}
}

func TestBodyTimeoutBeginsWithTheHeaders(t *testing.T) {
	const short = 600 * time.Millisecond
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 1, RoomMembers: 1, Latency: short / 2, SendJoin: sim.SendJoin{Drip: short * 2 / 3}})
	r := sendJoin(t, c, w, 0)
	c.Timeout, c.BodyTimeout = short, short // the whole takes longer than either
	if res := c.Do(t.Context(), r); res.Err != nil || res.Whole <= short {
		t.Errorf("status %d after %v, %v", res.Status, res.Whole, res.Err)
	}
	c.BodyTimeout = short / 4
	if res := c.Do(t.Context(), r); res.Status != 200 || !errors.Is(res.Err, context.DeadlineExceeded) {
		t.Errorf("a slow body: status %d, %v", res.Status, res.Err)
	}
	c.Timeout, c.BodyTimeout = short/4, short
	if res := c.Do(t.Context(), r); res.Status != 0 || !errors.Is(res.Err, context.DeadlineExceeded) {
		t.Errorf("late headers: status %d, %v", res.Status, res.Err)
	}
}

// sendJoin makes a request to join the big room of server i, at that server.
func sendJoin(t *testing.T, c *Client, w *sim.World, i int) *Request {
	t.Helper()
	name, room := w.Names()[i], w.RoomID(i)
	made := c.Do(t.Context(), c.from.MakeJoin(name, room, "alice"))
	if err := failure(made); err != nil {
		t.Fatal(err)
	}
	id, event, err := c.from.Join(made.Body, time.UnixMilli(1234))
	if err != nil {
		t.Fatal(err)
	}
	return SendJoin(name, room, id, event)
}

func TestJoinsAreEvents(t *testing.T) {
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 1, RoomMembers: 1})
	r := sendJoin(t, c, w, 0)
	if err := matrix.VerifyJSON(r.Body, string(hs.Name), hs.Key.ID(), hs.Key.Public()); err != nil {
		t.Error(err)
	}
	var event map[string]any
	if err := json.Unmarshal(r.Body, &event); err != nil {
		t.Fatal(err)
	}
	if event["room_id"] != w.RoomID(0) || event["state_key"] != "@alice:origin.test:8448" || event["origin_server_ts"] != 1234. {
		t.Errorf("%s", r.Body)
	}
	again := sendJoin(t, c, w, 0)
	if string(again.Body) != string(r.Body) || again.Target != r.Target {
		t.Errorf("the same join at the same time is %s %s and %s %s", r.Target, r.Body, again.Target, again.Body)
	}
	for _, bad := range []string{"", "[]", `{"room_version":"10"}`} {
		if _, _, err := hs.Join([]byte(bad), time.Now()); err == nil {
			t.Errorf("%q is an answer to make_join", bad)
		}
	}
}

func TestLookupsAndKeyQueriesAreAsSynapseSendsThem(t *testing.T) {
	if r := LookupField("remote.test", "bob", "displayname"); r.Target != "/_matrix/federation/v1/query/profile?user_id=%40bob%3Aremote.test&field=displayname" {
		t.Error(r.Target)
	}
	r := KeyQuery("notary.test", KeyWanted{"b.test", "ed25519:1", 5}, KeyWanted{"a.test", "ed25519:2", 6}, KeyWanted{"b.test", "ed25519:3", 7})
	const want = `{"server_keys":{"a.test":{"ed25519:2":{"minimum_valid_until_ts":6}},"b.test":{"ed25519:1":{"minimum_valid_until_ts":5},"ed25519:3":{"minimum_valid_until_ts":7}}}}`
	if string(r.Body) != want || r.Destination != "notary.test" || r.Method != "POST" {
		t.Errorf("%s %s", r.Method, r.Body)
	}
}

func TestAJoinerTriesAsSynapseDoes(t *testing.T) {
	const short = 500 * time.Millisecond
	hs := homeserver(t)
	w, c := world(t, hs, sim.Config{Servers: 4, RoomMembers: 4})
	for i, how := range map[int]sim.SendJoin{
		1: {Delay: time.Hour},
		2: {Drip: time.Hour},
	} {
		if err := w.SetSendJoin(i, how); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.SetKind(3, sim.Dead); err != nil {
		t.Fatal(err)
	}
	send := *c // shares the connections
	send.Timeout, send.BodyTimeout = short, short
	j := &Joiner{From: hs, Make: c, Send: &send, Pauses: []time.Duration{time.Millisecond, time.Millisecond}}
	for i, want := range []struct {
		joined      bool
		tries       int
		sent        int64
		lastHeaders bool
	}{
		0: {true, 1, 1, true},
		1: {false, 3, 3, false}, // no headers
		2: {false, 1, 1, true},  // the body takes too long
		3: {false, 0, 0, false}, // no make_join
	} {
		got := j.Join(t.Context(), w.Names()[i], w.RoomID(i), "alice")
		if (got.Err == nil) != want.joined || got.Tries != want.tries || w.Server(i).SendJoins != want.sent || (got.Last.Status == 200) != want.lastHeaders {
			t.Errorf("server %d: %+v, %d send_joins arrived; want %+v", i, got, w.Server(i).SendJoins, want)
		}
	}
	for status, want := range map[int]bool{0: true, 200: false, 400: false, 403: false, 404: false, 429: true, 500: true, 502: true} {
		if got := again(Result{Status: status, Err: io.ErrUnexpectedEOF}); got != want {
			t.Errorf("status %d is tried again: %v", status, got)
		}
	}
	d := NewJoiner(hs, func() *Client { return NewDirect(nil, hs) })
	defer d.Close()
	if d.Make.Timeout != 20*time.Second || d.Send.Timeout != time.Minute || d.Send.BodyTimeout != time.Minute || len(d.Pauses) != 3 {
		t.Errorf("Synapse's figures: %+v", d)
	}
}

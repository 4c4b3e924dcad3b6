package sim_test

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// homeserver makes the one that the tests send from.
func homeserver(t *testing.T) fedload.Homeserver {
	t.Helper()
	key, err := matrix.NewSigningKey(make([]byte, ed25519.SeedSize), "test")
	if err != nil {
		t.Fatal(err)
	}
	return fedload.Homeserver{Name: "origin.test", Key: key}
}

// start runs a world until the test ends. It verifies the test's homeserver.
func start(t *testing.T, c sim.Config) (*sim.World, *fedload.Client) {
	t.Helper()
	hs := homeserver(t)
	c.Origins = []sim.Origin{{Name: hs.Name, KeyID: hs.Key.ID(), PublicKey: hs.Key.Public()}}
	w, err := sim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	w.Start()
	return w, client(t, w, hs)
}

func roots(w *sim.World) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(w.CAPEM())
	return pool
}

func client(t *testing.T, w *sim.World, hs fedload.Homeserver) *fedload.Client {
	c := fedload.NewDirect(roots(w), hs)
	c.Timeout = 10 * time.Second
	t.Cleanup(c.Close)
	return c
}

// want makes a request that is to be answered with the status.
func want(t *testing.T, c *fedload.Client, r *fedload.Request, status int) fedload.Result {
	t.Helper()
	res := c.Do(t.Context(), r)
	if res.Err != nil || res.Status != status {
		t.Fatalf("%s %s: status %d, error %v, body %.200q; want status %d", r.Method, r.Target, res.Status, res.Err, res.Body, status)
	}
	return res
}

func TestFaults(t *testing.T) {
	w, c := start(t, sim.Config{Servers: int(sim.NumKinds), SlowDelay: 30 * time.Millisecond, Rate: 0.001})
	lookup := func(k sim.Kind) *fedload.Request { return fedload.Lookup(w.Names()[k], "user") }
	for k := range sim.NumKinds {
		if err := w.SetKind(int(k), k); err != nil {
			t.Fatal(err)
		}
	}
	do := func(k sim.Kind) fedload.Result { return c.Do(t.Context(), lookup(k)) }

	whole := want(t, c, lookup(sim.Well), 200)
	if err := do(sim.Dead).Err; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dead: %v", err)
	}
	if res := want(t, c, lookup(sim.Slow), 200); res.Headers < 30*time.Millisecond {
		t.Errorf("slow: headers after %v", res.Headers)
	}
	want(t, c, lookup(sim.Limited), 200)
	var limit struct {
		Code  string `json:"errcode"`
		After int64  `json:"retry_after_ms"`
	}
	res := want(t, c, lookup(sim.Limited), 429)
	if err := json.Unmarshal(res.Body, &limit); err != nil || limit.Code != matrix.MLimitExceeded || limit.After < 900_000 || limit.After > 1_000_000 {
		t.Errorf("limited: %s (%v); want to wait for most of 1000 s", res.Body, err)
	}
	if res := want(t, c, lookup(sim.Failing), 502); !strings.HasPrefix(string(res.Body), "<html>") {
		t.Errorf("failing: %q", res.Body)
	}
	if res := do(sim.Cut); res.Status != 200 || !errors.Is(res.Err, io.ErrUnexpectedEOF) || res.Size != whole.Size/2 {
		t.Errorf("cut: status %d, %d bytes of %d, error %v", res.Status, res.Size, whole.Size, res.Err)
	}
	if res := do(sim.Garbage); res.Err == nil || !strings.Contains(res.Err.Error(), "malformed HTTP") {
		t.Errorf("garbage: status %d, error %v", res.Status, res.Err)
	}
	c.Timeout = 100 * time.Millisecond
	if err := do(sim.Hanging).Err; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hanging: %v", err)
	}

	s := w.Stats()
	got := fmt.Sprint(s.Endpoints["query/profile"].Outcomes)
	if got != "map[200:3 429:1 502:1 cut:1 garbage:1]" {
		t.Errorf("outcomes %s", got)
	}
	if s.Connections.Accepted != 7 || s.TLS.Full != 6 {
		t.Errorf("%d connections, %d handshakes; want 7 (all but the dead) and 6", s.Connections.Accepted, s.TLS.Full)
	}
	if s.MaxPerServerSecond != 2 || w.Server(int(sim.Limited)).Requests != 2 {
		t.Errorf("fullest second of a server %d, want 2", s.MaxPerServerSecond)
	}
	if names := w.NamesOf(sim.Cut); len(names) != 1 || names[0] != w.Names()[sim.Cut] {
		t.Errorf("cutting servers: %v", names)
	}
}

func TestKillAndRevive(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1})
	r := fedload.Lookup(w.Names()[0], "user")
	want(t, c, r, 200)
	if err := w.SetKind(0, sim.Dead); err != nil {
		t.Fatal(err)
	}
	if s := w.Stats().Connections; s.Open != 0 {
		t.Errorf("%d connections to a dead server", s.Open)
	}
	if err := c.Do(t.Context(), r).Err; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dead: %v", err)
	}
	if err := w.SetKind(0, sim.Well); err != nil {
		t.Fatal(err)
	}
	want(t, c, r, 200)
	if s := w.Stats().TLS; s.Full != 1 || s.Resumed != 1 || s.MaxFullPerSecond != 1 {
		t.Errorf("handshakes: %+v, want one full, one resumed", s)
	}
}

func TestWithoutTicketsNothingIsResumed(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1, NoTickets: true, TLS12: true})
	for range 2 {
		want(t, c, fedload.Lookup(w.Names()[0], "user"), 200)
		if err := w.SetKind(0, sim.Well); err != nil { // closes the connection
			t.Fatal(err)
		}
	}
	if s := w.Stats().TLS; s.Full != 2 || s.Resumed != 0 {
		t.Errorf("handshakes: %+v, want two full", s)
	}
}

func TestRequestsAreVerified(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 2})
	hs, name, other := homeserver(t), w.Names()[0], w.Names()[1]

	forged, err := matrix.NewSigningKey([]byte(strings.Repeat("x", ed25519.SeedSize)), "test")
	if err != nil {
		t.Fatal(err)
	}
	want(t, c, fedload.Lookup(name, "user"), 200)
	want(t, client(t, w, fedload.Homeserver{Name: hs.Name, Key: forged}), fedload.Lookup(name, "user"), 401)
	want(t, client(t, w, fedload.Homeserver{Name: "other.test", Key: hs.Key}), fedload.Lookup(name, "user"), 401)
	want(t, c, fedload.Send("other.test", name, "1", time.Now(), nil, nil), 403)

	// What a signature covers: sign one request, send another.
	signed := fedload.Send(hs.Name, name, "2", time.Now(), nil, nil)
	x, err := matrix.SignRequest(hs.Key, string(hs.Name), string(name), signed.Method, signed.Target, signed.Body)
	if err != nil {
		t.Fatal(err)
	}
	plain := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots(w)}}}
	defer plain.CloseIdleConnections()
	for _, test := range []struct {
		what, host, target, body, header string
		status                           int
	}{
		{"as signed", string(name), signed.Target, string(signed.Body), x.String(), 200},
		{"unsigned", string(name), signed.Target, string(signed.Body), "", 401},
		{"another server", string(other), signed.Target, string(signed.Body), x.String(), 401},
		{"another path", string(name), signed.Target + "0", string(signed.Body), x.String(), 401},
		{"another body", string(name), signed.Target, `{"pdus":[]}`, x.String(), 401},
		{"no body", string(name), signed.Target, "", x.String(), 401},
	} {
		req, err := http.NewRequestWithContext(t.Context(), signed.Method, "https://"+test.host+test.target, strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", test.header)
		resp, err := plain.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != test.status {
			t.Errorf("%s: status %d, want %d", test.what, resp.StatusCode, test.status)
		}
	}
	if s := w.Stats().Transactions; s.Count != 1 || s.Refused != 1 {
		t.Errorf("transactions: %+v, want one taken, one refused", s)
	}
}

func TestTransactionsAreTakenOnce(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 3})
	hs, now := homeserver(t), time.Now()
	message := hs.Message("alice", "!r:origin.test", "hello", 1, now)
	second := hs.Message("alice", "!r:origin.test", "hello again", 2, now)
	typing := hs.Typing("alice", "!r:origin.test", true)
	presence := hs.Presence("alice", "online", "")
	type list = []json.RawMessage

	for _, name := range w.Names() {
		r := fedload.Send(hs.Name, name, "1", now, list{message}, list{typing, presence, presence})
		first := want(t, c, r, 200)
		again := want(t, c, r, 200)
		if string(first.Body) != string(again.Body) || !strings.Contains(string(first.Body), sim.EventID(message)) {
			t.Errorf("answers %s and %s", first.Body, again.Body)
		}
	}
	name := w.Names()[0]
	want(t, c, fedload.Send(hs.Name, name, "1", now, nil, nil), 200)                   // the id with another body
	want(t, c, fedload.Send(hs.Name, name, "2", now, list{message, second}, nil), 200) // one of them once more
	want(t, c, fedload.Send(hs.Name, name, "3", now, nil, list{typing}), 200)

	s := w.Stats()
	wantTxns := sim.TransactionStats{Count: 5, WithoutPDUs: 1, Repeated: 4, Conflicts: 1, PDUs: 5, Duplicates: 1, EDUs: 10, MaxInFlightPerServer: 1}
	if s.Transactions != wantTxns {
		t.Errorf("transactions %+v, want %+v", s.Transactions, wantTxns)
	}
	if got := fmt.Sprint(s.EDUs); got != "map[m.presence:6 m.typing:4]" {
		t.Errorf("EDUs %s", got)
	}
	if len(s.Events) != 2 || s.Events[0].ID != sim.EventID(message) || s.Events[0].Servers != 3 || s.Events[1].Servers != 1 {
		t.Errorf("events %+v", s.Events)
	}
	if got := w.Server(0); got.Transactions != 3 || got.PDUs != 2 || got.EDUs != 4 || got.MaxSendInFlight != 1 {
		t.Errorf("server 0: %+v", got)
	}

	tooMany := make(list, 51)
	for i := range tooMany {
		tooMany[i] = message
	}
	want(t, c, fedload.Send(hs.Name, name, "4", now, tooMany, nil), 400)
	want(t, c, &fedload.Request{Destination: name, Method: "PUT", Target: "/_matrix/federation/v1/send/5", Body: []byte(`{"origin":"origin.test"}`)}, 400)
	if got := w.Stats().Transactions.Refused; got != 2 {
		t.Errorf("%d refused, want 2", got)
	}
}

func TestASlowServerTakesWhatItGets(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1, Shares: sim.Shares{sim.Slow: 1}, SlowDelay: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan fedload.Result)
	go func() { done <- c.Do(ctx, fedload.Send("origin.test", w.Names()[0], "1", time.Now(), nil, nil)) }()
	for w.Stats().Transactions.Count == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if res := <-done; !errors.Is(res.Err, context.Canceled) {
		t.Errorf("%+v", res)
	}
	for w.Stats().InFlight > 0 {
		time.Sleep(time.Millisecond)
	}
	if got := w.Stats().Endpoints["send"].Outcomes["gone"]; got != 1 {
		t.Errorf("%d clients gone, want 1", got)
	}
}

func TestEndpoints(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1})
	name := string(w.Names()[0])
	user := "@alice:" + name
	e := url.QueryEscape
	for _, test := range []struct {
		method, target, body string
		status               int
		part                 string // of the answer
	}{
		{"GET", "/_matrix/federation/v1/version", "", 200, `"fedsim"`},
		{"GET", "/_matrix/federation/v1/query/profile?user_id=" + e(user), "", 200, `"displayname":"alice"`},
		{"GET", "/_matrix/federation/v1/query/profile?field=avatar_url&user_id=" + e(user), "", 200, `{"avatar_url":"mxc`},
		{"GET", "/_matrix/federation/v1/query/profile?user_id=" + e("@nobody:"+name), "", 404, matrix.MNotFound},
		{"GET", "/_matrix/federation/v1/query/profile?user_id=" + e("@alice:other.test"), "", 404, matrix.MNotFound},
		{"GET", "/_matrix/federation/v1/query/directory?room_alias=" + e("#r:"+name), "", 200, `"room_id":"!room:` + name},
		{"GET", "/_matrix/federation/v1/query/directory?room_alias=" + e("#nobody:"+name), "", 404, matrix.MNotFound},
		{"GET", "/_matrix/federation/v1/publicRooms", "", 200, `"chunk"`},
		{"POST", "/_matrix/federation/v1/publicRooms", `{"limit":1}`, 200, `"chunk"`},
		{"GET", "/_matrix/federation/v1/user/devices/" + e(user), "", 200, `"user_id":"` + user},
		{"GET", "/_matrix/federation/v1/user/devices/" + e("@a/b:"+name), "", 200, `"user_id":"@a/b:`},
		{"POST", "/_matrix/federation/v1/user/keys/query", `{"device_keys":{"` + user + `":[]}}`, 200, `"device_keys":{"` + user},
		{"POST", "/_matrix/federation/v1/user/keys/query", `[]`, 400, matrix.MNotJSON},
		{"GET", "/_matrix/federation/v1/event/%24abc", "", 200, `"event_id":"$abc"`},
		{"GET", "/_matrix/federation/v1/make_join/%21r/%40u?ver=10", "", 200, `"state_key":"@u"`},
		{"GET", "/_matrix/federation/v1/media/download/nothing", "", 404, matrix.MNotFound},
		{"GET", "/_matrix/federation/v1/media/download/bytes-1073741825", "", 404, matrix.MNotFound},
		{"GET", "/_matrix/federation/v1/state/%21r", "", 404, matrix.MNotFound},
		{"GET", "/_matrix/federation/v1/members/%21r", "", 404, matrix.MUnrecognized},
		{"POST", "/_matrix/federation/v1/version", "", 404, matrix.MUnrecognized},
	} {
		r := &fedload.Request{Destination: w.Names()[0], Method: test.method, Target: test.target, Body: []byte(test.body)}
		if res := want(t, c, r, test.status); !strings.Contains(string(res.Body), test.part) {
			t.Errorf("%s %s: %s lacks %s", test.method, test.target, res.Body, test.part)
		}
	}
	if got := w.Stats().Endpoints; got["unknown"].Outcomes["404"] != 2 || got["query/profile"].Count != 4 {
		t.Errorf("endpoints: %+v", got)
	}
}

func TestServersPublishTheirKeys(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 2, Seed: 3})
	name, key := w.Names()[1], w.SigningKey(1)
	own := want(t, c, &fedload.Request{Destination: name, Method: "GET", Target: "/_matrix/key/v2/server"}, 200)
	if err := matrix.VerifyJSON(own.Body, string(name), key.ID(), key.Public()); err != nil {
		t.Errorf("%s: %v", own.Body, err)
	}
	res := want(t, c, &fedload.Request{
		Destination: name, Method: "POST", Target: "/_matrix/key/v2/query",
		Body: fmt.Appendf(nil, `{"server_keys":{%q:{},%q:{}}}`, name, w.Names()[0]),
	}, 200)
	var answer struct {
		Keys []json.RawMessage `json:"server_keys"`
	}
	if err := json.Unmarshal(res.Body, &answer); err != nil || len(answer.Keys) != 1 {
		t.Fatalf("%s (%v): want one server's keys", res.Body, err)
	}
	if err := matrix.VerifyJSON(answer.Keys[0], string(name), key.ID(), key.Public()); err != nil {
		t.Error(err)
	}
	if w.SigningKey(0).Public().Equal(key.Public()) {
		t.Error("two servers have the same key")
	}
	again, err := sim.New(sim.Config{Servers: 2, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if !again.SigningKey(1).Public().Equal(key.Public()) {
		t.Error("the same seed makes other keys")
	}
}

func TestOneTimeKeysAreHandedOutOnce(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1})
	r := &fedload.Request{
		Destination: w.Names()[0], Method: "POST", Target: "/_matrix/federation/v1/user/keys/claim",
		Body: fmt.Appendf(nil, `{"one_time_keys":{"@a:%s":{"D":"signed_curve25519"}}}`, w.Names()[0]),
	}
	first, second := want(t, c, r, 200), want(t, c, r, 200)
	if !strings.Contains(string(first.Body), "signed_curve25519:1") || !strings.Contains(string(second.Body), "signed_curve25519:2") {
		t.Errorf("claimed %s and %s", first.Body, second.Body)
	}
}

func TestMediaHasTheSizeAskedFor(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 2})
	empty := want(t, c, fedload.Media(w.Names()[0], 0), 200)
	const size = 3<<20 + 1
	if res := want(t, c, fedload.Media(w.Names()[0], size), 200); res.Size != empty.Size+size {
		t.Errorf("%d bytes, want %d more than %d", res.Size, size, empty.Size)
	}
	if err := w.SetKind(1, sim.Cut); err != nil {
		t.Fatal(err)
	}
	if res := c.Do(t.Context(), fedload.Media(w.Names()[1], size)); res.Err == nil || res.Size != (empty.Size+size)/2 {
		t.Errorf("cut media: %d bytes, error %v", res.Size, res.Err)
	}
}

func TestTooLargeRequestsAreRefused(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1})
	body := []byte(`{"origin":"origin.test","pdus":[],"x":"` + strings.Repeat("x", 200*65536) + `"}`)
	res := c.Do(t.Context(), &fedload.Request{Destination: w.Names()[0], Method: "PUT", Target: "/_matrix/federation/v1/send/1", Body: body})
	// The server stops reading; whether its answer overtakes the break is up to TCP.
	if res.Status != 413 && res.Err == nil {
		t.Errorf("status %d", res.Status)
	}
	if got := w.Stats().Endpoints["send"].Outcomes["413"]; got != 1 {
		t.Errorf("%d answers 413, want 1", got)
	}
}

func TestHTTP2(t *testing.T) {
	w, _ := start(t, sim.Config{Servers: 1, HTTP2: true})
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots(w)}, ForceAttemptHTTP2: true}}
	defer c.CloseIdleConnections()
	get := func() (proto int, body []byte, err error) {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+string(w.Names()[0])+"/_matrix/federation/v1/version", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, nil, err
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(resp.Body)
		return resp.ProtoMajor, body, err
	}
	if proto, body, err := get(); proto != 2 || err != nil || !json.Valid(body) {
		t.Errorf("well: HTTP/%d, %q, %v", proto, body, err)
	}
	for kind, broken := range map[sim.Kind]func(body []byte, err error) bool{
		sim.Cut:     func(_ []byte, err error) bool { return err != nil },
		sim.Garbage: func(body []byte, err error) bool { return err == nil && !json.Valid(body) },
	} {
		c.CloseIdleConnections() // or it might write to the one that SetKind closes
		if err := w.SetKind(0, kind); err != nil {
			t.Fatal(err)
		}
		if _, body, err := get(); !broken(body, err) {
			t.Errorf("%v: %q, %v", kind, body, err)
		}
	}
}

func TestDriver(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 2})
	want(t, c, fedload.Lookup(w.Names()[1], "user"), 200)
	driver := w.Driver()
	call := func(method, target string, status int) string {
		t.Helper()
		rec := httptest.NewRecorder()
		driver.ServeHTTP(rec, httptest.NewRequest(method, target, nil))
		if rec.Code != status {
			t.Errorf("%s %s: status %d, want %d (%s)", method, target, rec.Code, status, rec.Body)
		}
		return rec.Body.String()
	}
	var s sim.Stats
	if err := json.Unmarshal([]byte(call("GET", "/stats", 200)), &s); err != nil || s.Requests != 1 {
		t.Errorf("stats: %+v, %v", s, err)
	}
	if got := call("GET", "/stats?server=1", 200); !strings.Contains(got, `"requests": 1`) {
		t.Errorf("stats of server 1: %s", got)
	}
	call("POST", "/kind?server=1&kind=dead", 200)
	if got := call("GET", "/servers", 200); strings.Count(got, `"dead"`) != 1 || w.Kind(1) != sim.Dead {
		t.Errorf("servers: %s", got)
	}
	call("POST", "/reset", 200)
	if got := w.Stats().Requests; got != 0 {
		t.Errorf("%d requests after a reset", got)
	}
	call("GET", "/stats?server=2", 400)
	call("POST", "/kind?server=-1&kind=dead", 400)
	call("POST", "/kind?server=0&kind=odd", 400)
	call("GET", "/reset", 405)
	w.Close()
	call("POST", "/kind?server=0&kind=slow", 409)
}

func TestCloseHangsUp(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 3, Shares: sim.Shares{sim.Hanging: 0.34}})
	name := string(w.NamesOf(sim.Hanging)[0])
	held, err := net.Dial("tcp", name)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	want(t, c, fedload.Lookup(w.NamesOf(sim.Well)[0], "user"), 200)
	w.Close()
	w.Close()
	if _, err := held.Read(make([]byte, 1)); err == nil {
		t.Error("a hanging server said something")
	}
	if _, err := net.Dial("tcp", name); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after Close: %v", err)
	}
	if got := w.Stats().Connections.Open; got != 0 {
		t.Errorf("%d connections open after Close", got)
	}
	if err := w.SetKind(0, sim.Slow); !errors.Is(err, sim.ErrClosed) {
		t.Errorf("SetKind after Close: %v", err)
	}
}

// Measured: 5.6 MiB of heap and a goroutine per server. What grows here grows
// 5,000 times.
func TestFiveThousandServersAreCheap(t *testing.T) {
	const n, budget = 5000, 10 << 20
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < n+200 {
		t.Skipf("ulimit -n is %d (%v): too low", limit.Cur, err)
	}
	goroutines, heap := runtime.NumGoroutine(), liveHeap()
	start(t, sim.Config{Servers: n})
	if got := runtime.NumGoroutine() - goroutines; got > n+10 {
		t.Errorf("%d goroutines for %d servers", got, n)
	}
	if got := liveHeap() - heap; got > budget {
		t.Errorf("%d bytes of heap for %d servers, want at most %d", got, n, budget)
	}
}

func liveHeap() int64 {
	runtime.GC()
	runtime.GC() // what the first one finalized
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestImpossibleConfigsAreRefused(t *testing.T) {
	for _, c := range []sim.Config{
		{},
		{Servers: sim.MaxServers + 1},
		{Servers: 1, Port: 65536},
		{Servers: 1, Latency: -1},
		{Servers: 1, Rate: -1},
		{Servers: 1, Shares: sim.Shares{sim.Dead: 2}},
		{Servers: 1, RoomMembers: 2},
		{Servers: 1, RoomMembers: -1},
		{Servers: 1, SendJoin: sim.SendJoin{Delay: -1}},
		{Servers: 1, SendJoin: sim.SendJoin{Size: 1<<30 + 1}},
		{Servers: 1, KeyFault: sim.NumKeyFaults},
		{Servers: 1, Notary: true, NotaryLatency: -1},
		{Servers: 1, Origins: []sim.Origin{{Name: "origin.test", KeyID: "ed25519:1"}}},
	} {
		if w, err := sim.New(c); err == nil {
			w.Close()
			t.Errorf("%+v was taken", c)
		}
	}
}

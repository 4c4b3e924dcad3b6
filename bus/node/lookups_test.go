package node

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// fetched is a whole answer.
type fetched struct {
	status int
	header http.Header
	body   string
}

// fetch makes a request as the homeserver does, without a signature, which the bus
// does not look at, and returns the whole answer.
func (r *running) fetch(req *fedload.Request) fetched {
	r.t.Helper()
	f, err := r.tryFetch(req)
	if err != nil {
		r.t.Fatal(err)
	}
	return f
}

// tryFetch is fetch where the answer may not come whole.
func (r *running) tryFetch(req *fedload.Request) (fetched, error) {
	r.t.Helper()
	c := http.Transport{DisableKeepAlives: true, DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(r.dir, "front.sock"))
	}}
	var body io.Reader
	if len(req.Body) > 0 {
		body = strings.NewReader(string(req.Body))
	}
	hr, err := http.NewRequestWithContext(r.t.Context(), req.Method, "http://"+string(req.Destination), body)
	if err != nil {
		r.t.Fatal(err)
	}
	hr.URL = &url.URL{Scheme: "http", Host: "proxy", Opaque: "matrix-federation://" + string(req.Destination) + req.Target}
	hr.Host = string(req.Destination)
	hr.Header.Set("Proxy-Authorization", "Bearer "+secret)
	resp, err := c.RoundTrip(hr)
	if err != nil {
		return fetched{}, err
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	return fetched{resp.StatusCode, resp.Header, string(all)}, err
}

func (f fetched) is(t *testing.T, what string, status int, source, body string) {
	t.Helper()
	if f.status != status || f.header.Get("X-Cache") != source || f.body != body || f.header.Get("Content-Type") != "application/json" {
		t.Errorf("%s: %d, X-Cache %q, %q, %q; want %d, %q, %q", what, f.status, f.header.Get("X-Cache"), f.header.Get("Content-Type"), f.body, status, source, body)
	}
	if _, aged := f.header["Age"]; aged != (source == "HIT" || source == "STALE") {
		t.Errorf("%s: an Age is there: %t", what, aged)
	}
}

// again starts a bus on what the one before has left.
func (r *running) again() {
	r.t.Helper()
	r.stop()
	r.start(hooks{})
}

// unsigned is a federation that lets anybody ask, whatever the signature.
func unsigned(t *testing.T, c sim.Config) *sim.World {
	t.Helper()
	w, err := sim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	w.Start()
	t.Cleanup(func() { w.Close() })
	return w
}

func TestAProfileIsAskedForOnceAndItsFieldsNever(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 1})
	r := start(t, w, "")
	name := w.Names()[0]
	whole := fmt.Sprintf(`{"avatar_url":"mxc://%s/alice","displayname":"alice"}`, name)
	r.fetch(fedload.Lookup(name, "alice")).is(t, "the first time", 200, "MISS", whole)
	r.fetch(fedload.Lookup(name, "alice")).is(t, "the second time", 200, "HIT", whole)
	r.fetch(fedload.LookupField(name, "alice", "displayname")).is(t, "one field", 200, "HIT", `{"displayname":"alice"}`)
	r.fetch(fedload.LookupField(name, "alice", "avatar_url")).is(t, "the other", 200, "HIT", fmt.Sprintf(`{"avatar_url":"mxc://%s/alice"}`, name))
	nobody := r.fetch(fedload.Lookup(name, "nobody"))
	nobody.is(t, "nobody", 404, "MISS", nobody.body)
	r.fetch(fedload.Lookup(name, "nobody")).is(t, "nobody again", 404, "HIT", nobody.body)
	r.again()
	r.fetch(fedload.Lookup(name, "alice")).is(t, "after a restart", 200, "HIT", whole)
	r.fetch(fedload.LookupField(name, "alice", "displayname")).is(t, "a field after a restart", 200, "HIT", `{"displayname":"alice"}`)
	if n := w.Stats().Endpoints["query/profile"].Count; n != 2 {
		t.Errorf("the server was asked %d times, want once for each user", n)
	}
	if err := w.SetKind(0, sim.Dead); err != nil {
		t.Fatal(err)
	}
	r.fetch(fedload.Lookup(name, "alice")).is(t, "while its server is away", 200, "HIT", whole)
}

func TestAnOldProfileIsBetterThanNone(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 1})
	r := start(t, w, "profile_fresh = \"0s\"")
	name := w.Names()[0]
	whole := fmt.Sprintf(`{"avatar_url":"mxc://%s/alice","displayname":"alice"}`, name)
	r.fetch(fedload.Lookup(name, "alice")).is(t, "the first time", 200, "MISS", whole)
	r.fetch(fedload.Lookup(name, "alice")).is(t, "it is not fresh", 200, "MISS", whole)
	if err := w.SetKind(0, sim.Dead); err != nil {
		t.Fatal(err)
	}
	r.fetch(fedload.Lookup(name, "alice")).is(t, "the server is away", 200, "STALE", whole)
	r.fetch(fedload.LookupField(name, "alice", "displayname")).is(t, "and is left alone", 200, "STALE", `{"displayname":"alice"}`)
	r.again()
	r.fetch(fedload.Lookup(name, "alice")).is(t, "after a restart", 200, "STALE", whole)
}

// keyAnswer is the answer to a query for keys.
type keyAnswer struct {
	ServerKeys []json.RawMessage `json:"server_keys"`
}

// keysOf returns the servers whose keys are in an answer, each of which must be
// valid and signed by the notary.
func (f fetched) keysOf(t *testing.T, notary matrix.ServerName) (servers []matrix.ServerName) {
	t.Helper()
	var a keyAnswer
	if err := json.Unmarshal([]byte(f.body), &a); f.status != 200 || err != nil {
		t.Fatalf("answered %d %.200s: %v", f.status, f.body, err)
	}
	for _, raw := range a.ServerKeys {
		name := namedIn(raw)
		o, err := matrix.CheckServerKeys(raw, name)
		if err != nil || !o.SignedBy(notary) {
			t.Errorf("the keys of %s: %v, signed by the notary: %t", name, err, o != nil && o.SignedBy(notary))
		}
		servers = append(servers, name)
	}
	slices.Sort(servers)
	return servers
}

func wanted(names []matrix.ServerName) (keys []fedload.KeyWanted) {
	for _, n := range names {
		keys = append(keys, fedload.KeyWanted{Server: n, ID: "ed25519:sim", Until: time.Now().UnixMilli()})
	}
	return keys
}

func sorted(names []matrix.ServerName) []matrix.ServerName {
	names = slices.Clone(names)
	slices.Sort(names)
	return names
}

func TestKeysAreFetchedInBatchesAndKept(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 120, Notary: true})
	r := start(t, w, "")
	notary := w.Names()[sim.NotaryServer]
	var wg sync.WaitGroup
	for _, part := range [][]matrix.ServerName{w.Names()[:70], w.Names()[50:], w.Names()} {
		wg.Go(func() {
			if got := r.fetch(fedload.KeyQuery(notary, wanted(part)...)).keysOf(t, notary); !slices.Equal(got, sorted(part)) {
				t.Errorf("%d keys of %d", len(got), len(part))
			}
		})
	}
	wg.Wait()
	if n := w.Stats().Endpoints["key/query"].Count; n < 3 || n > 5 {
		t.Errorf("120 servers' keys took %d requests, want 3 batches, or a few more as the queries came one after the other", n)
	}
	w.Reset()
	for range 2 {
		if got := r.fetch(fedload.KeyQuery(notary, wanted(w.Names())...)).keysOf(t, notary); len(got) != 120 {
			t.Errorf("%d keys of 120", len(got))
		}
		r.again()
	}
	if n := w.Stats().Endpoints["key/query"].Count; n != 0 {
		t.Errorf("known keys were asked for again, %d times", n)
	}
	// One that must be valid for longer than it is has to be asked for.
	later := fedload.KeyWanted{Server: w.Names()[7], ID: "ed25519:sim", Until: time.Now().Add(48 * time.Hour).UnixMilli()}
	r.fetch(fedload.KeyQuery(notary, later)).keysOf(t, notary)
	if n := w.Stats().Endpoints["key/query"].Count; n != 1 {
		t.Errorf("keys that are not valid for long enough were asked for %d times", n)
	}
	if k := r.report().Keys; k.Notary != string(notary) || k.Stored < 120 {
		t.Errorf("the status says %+v", k)
	}
}

func TestABadKeyObjectIsNeverKept(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 3, Notary: true})
	notary := w.Names()[sim.NotaryServer]
	for f := sim.NoKeyFault + 1; f < sim.NumKeyFaults; f++ {
		t.Run(f.String(), func(t *testing.T) {
			r := start(t, w, "")
			w.SetKeyFault(f)
			defer w.SetKeyFault(sim.NoKeyFault)
			got := r.fetch(fedload.KeyQuery(notary, wanted(w.Names()[1:2])...))
			if got.status == 200 && strings.Contains(got.body, "server_name") {
				t.Errorf("a bad object is passed on: %.300s", got.body)
			}
			r.tryFetch(&fedload.Request{Destination: w.Names()[2], Method: "GET", Target: "/_matrix/key/v2/server"}) // cut for the caller, too
			rep := r.report()
			if rep.Keys.Stored != 0 {
				t.Errorf("%d bad objects are stored", rep.Keys.Stored)
			}
			w.SetKeyFault(sim.NoKeyFault)
			again := r.fetch(&fedload.Request{Destination: w.Names()[2], Method: "GET", Target: "/_matrix/key/v2/server"})
			if _, err := matrix.CheckServerKeys([]byte(again.body), w.Names()[2]); err != nil || again.header.Get("X-Cache") != "MISS" {
				t.Errorf("afterwards %d, X-Cache %s, %v", again.status, again.header.Get("X-Cache"), err)
			}
		})
	}
}

// withNotary adds the section that makes a bus a notary.
func withNotary(t *testing.T, w *sim.World, more string) *running {
	t.Helper()
	r := newRunning(t, w, config{})
	f, err := os.OpenFile(r.path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("[keys]\nnotary = true\n" + more); err != nil {
		t.Fatal(err)
	}
	r.start(hooks{})
	return r
}

func TestTheBusIsANotary(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 40, Shares: sim.Shares{sim.Dead: 0.25}})
	r := withNotary(t, w, "")
	const own = matrix.ServerName("fsbus.invalid")
	live := sorted(w.NamesOf(sim.Well))
	for range 3 {
		if got := r.fetch(fedload.KeyQuery(own, wanted(w.Names())...)).keysOf(t, own); !slices.Equal(got, live) {
			t.Errorf("%d keys of %d", len(got), len(live))
		}
	}
	if n := w.Stats().Endpoints["key/server"].Count; n != int64(len(live)) {
		t.Errorf("%d requests for the keys of %d live servers", n, len(live))
	}
	object := r.fetch(&fedload.Request{Destination: own, Method: "GET", Target: "/_matrix/key/v2/server"})
	o, err := matrix.CheckServerKeys([]byte(object.body), own)
	if err != nil {
		t.Fatalf("its own keys: %d %s: %v", object.status, object.body, err)
	}
	for _, raw := range func() []json.RawMessage {
		var a keyAnswer
		_ = json.Unmarshal([]byte(r.fetch(fedload.KeyQuery(own, wanted(live[:3])...)).body), &a)
		return a.ServerKeys
	}() {
		for id, pub := range o.Verify {
			if err := matrix.VerifyJSON(raw, string(own), id, pub); err != nil {
				t.Errorf("the notary's signature: %v", err)
			}
		}
	}
	if got := r.fetch(fedload.Lookup(own, "alice")); got.status != 404 || !strings.Contains(got.body, matrix.MUnrecognized) {
		t.Errorf("anything else is answered %d %s", got.status, got.body)
	}
	if got := r.fetch(fedload.Send(us.Name, own, "t1", time.Now(), nil, []json.RawMessage{us.Typing("alice", "!r:us.test", true)})); got.status != 404 {
		t.Errorf("a transaction is answered %d %s", got.status, got.body)
	}
	if got := r.fetch(&fedload.Request{Destination: own, Method: "POST", Target: "/_matrix/key/v2/query", Body: []byte(`{"server_keys":1}`)}); got.status != 400 {
		t.Errorf("a bad query is answered %d %s", got.status, got.body)
	}
}

func TestAJoinIsPreparedWhileItArrives(t *testing.T) {
	const members = 130
	w := unsigned(t, sim.Config{Servers: members, RoomMembers: members, Notary: true})
	r := start(t, w, "")
	names, room := w.Names(), w.RoomID(1)
	notary := names[sim.NotaryServer]
	r.fetch(fedload.KeyQuery(notary, wanted(names[:1])...)) // so that the bus knows whom the homeserver asks
	made := r.fetch(us.MakeJoin(names[1], room, "alice"))
	if made.status != 200 {
		t.Fatalf("make_join: %d %s", made.status, made.body)
	}
	id, event, err := us.Join([]byte(made.body), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	send := fedload.SendJoin(names[1], room, id, event)
	first := r.fetch(send)
	if first.status != 200 {
		t.Fatalf("send_join: %d %.300s", first.status, first.body)
	}
	if again := r.fetch(send); again.body != first.body || again.header.Get("X-Cache") != "HIT" {
		t.Errorf("the same send_join again: %d, X-Cache %s, the same: %t", again.status, again.header.Get("X-Cache"), again.body == first.body)
	}
	var frame struct {
		Event struct {
			Prev []string `json:"prev_events"`
		}
	}
	if err := json.Unmarshal([]byte(made.body), &frame); err != nil || len(frame.Event.Prev) == 0 {
		t.Fatalf("make_join has no prev_events: %s", made.body)
	}
	if state := r.fetch(fedload.State(names[1], room, frame.Event.Prev[0])); state.status != 200 {
		t.Fatalf("state: %d %.300s", state.status, state.body)
	}
	eventually(t, "the members' keys are there", func() bool { return r.report().Keys.Stored >= members })
	w.Reset()
	if got := r.fetch(fedload.KeyQuery(notary, wanted(names)...)).keysOf(t, notary); len(got) != members {
		t.Errorf("%d keys of %d", len(got), members)
	}
	if n := w.Stats().Endpoints["key/query"].Count; n != 0 {
		t.Errorf("%d requests for keys that were fetched ahead", n)
	}
	j := r.report().Joins
	if len(j.Joins) != 1 || j.Joins[0].Upstream != 1 || j.Joins[0].Status != 200 || j.Joins[0].KeysSeen == 0 || j.Joins[0].Passed < 0 || j.Joins[0].Phase != "resync" {
		t.Errorf("the status says %+v", j)
	}
	if _, page := r.get("/"); !strings.Contains(page, "the homeserver gets it") || !strings.Contains(page, strings.TrimPrefix(room, "!")) {
		t.Error("the page does not tell of the join")
	}
}

func TestASlowJoinIsAskedForOnce(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 3, RoomMembers: 3, SendJoin: sim.SendJoin{Delay: 1500 * time.Millisecond, Drip: 1500 * time.Millisecond}})
	r := start(t, w, "")
	dest, room := w.Names()[1], w.RoomID(1)
	id, event, err := us.Join([]byte(r.fetch(us.MakeJoin(dest, room, "alice")).body), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	send := fedload.SendJoin(dest, room, id, event)
	// One whose caller goes away at once, and two that stay.
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if got := r.Do(ctx, send); got.Err == nil {
		t.Errorf("the first is answered %d, too early", got.Status)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if got := r.fetch(send); got.status != 200 || !json.Valid([]byte(got.body)) {
				t.Errorf("answered %d %.200s", got.status, got.body)
			}
		})
	}
	wg.Wait()
	if n := w.Stats().Endpoints["send_join"].Count; n != 1 {
		t.Errorf("the server has seen %d send_joins", n)
	}
}

func TestMediaIsKeptIfThatIsWanted(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 1})
	r := newRunning(t, w, config{})
	f, err := os.OpenFile(r.path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("[media]\ncache_disk = \"100MiB\"\n"); err != nil {
		t.Fatal(err)
	}
	r.start(hooks{})
	req := fedload.Media(w.Names()[0], 3<<20)
	first := r.fetch(req)
	if again := r.fetch(req); first.status != 200 || again.body != first.body || again.header.Get("X-Cache") != "HIT" {
		t.Errorf("%d, then %d, X-Cache %s, the same: %t", first.status, again.status, again.header.Get("X-Cache"), again.body == first.body)
	}
}

package sim_test

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// pdu is what a joining server reads of an event.
type pdu struct {
	Sender     string                       `json:"sender"`
	Type       string                       `json:"type"`
	Signatures map[string]map[string]string `json:"signatures"`
}

// sentJoin is an answer to send_join.
type sentJoin struct {
	AuthChain []pdu           `json:"auth_chain"`
	State     []pdu           `json:"state"`
	Event     json.RawMessage `json:"event"`
	Omitted   bool            `json:"members_omitted"`
	Servers   []string        `json:"servers_in_room"`
}

// join makes and sends a join of the big room of server 0 by way of server i.
func join(t *testing.T, w *sim.World, c *fedload.Client, i int) *fedload.Request {
	t.Helper()
	hs := homeserver(t)
	made := want(t, c, hs.MakeJoin(w.Names()[i], w.RoomID(0), "alice"), 200)
	id, event, err := hs.Join(made.Body, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return fedload.SendJoin(w.Names()[i], w.RoomID(0), id, event)
}

// whole makes a request and returns all of the answer, which fedload does not keep.
func whole(t *testing.T, w *sim.World, r *fedload.Request) (*http.Response, []byte) {
	t.Helper()
	hs := homeserver(t)
	x, err := matrix.SignRequest(hs.Key, string(hs.Name), string(r.Destination), r.Method, r.Target, r.Body)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots(w)}, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), r.Method, "https://"+string(r.Destination)+r.Target, strings.NewReader(string(r.Body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", x.String())
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s: status %d, %v, %.200s", r.Target, resp.StatusCode, err, body)
	}
	return resp, body
}

func TestJoinOfABigRoom(t *testing.T) {
	const members = 30
	w, c := start(t, sim.Config{Servers: members + 2, RoomMembers: members})
	r := join(t, w, c, 1)

	_, body := whole(t, w, r)
	var partial sentJoin
	if err := json.Unmarshal(body, &partial); err != nil {
		t.Fatalf("%v: %.300s", err, body)
	}
	if !partial.Omitted || len(partial.Servers) != members || len(partial.State) != 6 || len(partial.AuthChain) != 0 {
		t.Errorf("without members: %d servers, %d of the state, %d of the auth chain", len(partial.Servers), len(partial.State), len(partial.AuthChain))
	}
	key := w.SigningKey(1)
	hs := homeserver(t)
	for _, signer := range []struct {
		name, id string
		public   []byte
	}{{string(w.Names()[1]), key.ID(), key.Public()}, {string(hs.Name), hs.Key.ID(), hs.Key.Public()}} {
		if err := matrix.VerifyJSON(partial.Event, signer.name, signer.id, signer.public); err != nil {
			t.Errorf("the event, by %s: %v", signer.name, err)
		}
	}

	full := *r
	full.Target = strings.TrimSuffix(r.Target, "?omit_members=true")
	_, body = whole(t, w, &full)
	var all sentJoin
	if err := json.Unmarshal(body, &all); err != nil {
		t.Fatal(err)
	}
	v1 := full
	v1.Target = strings.Replace(full.Target, "/v2/", "/v1/", 1)
	_, body = whole(t, w, &v1)
	var status int
	var old sentJoin
	if err := json.Unmarshal(body, &[]any{&status, &old}); err != nil || status != 200 {
		t.Errorf("v1: %v, status %d", err, status)
	}
	for what, answer := range map[string]sentJoin{"v2": all, "v1": old} {
		signers := make(map[string]bool)
		for _, e := range append(answer.State, answer.AuthChain...) {
			for name, keys := range e.Signatures {
				if len(keys["ed25519:sim"]) == 86 {
					signers[name] = true
				}
			}
		}
		if len(answer.State) != 5+members || len(answer.AuthChain) != 5 || len(signers) != members || answer.Omitted {
			t.Errorf("%s: %d of the state, %d of the auth chain, %d signers", what, len(answer.State), len(answer.AuthChain), len(signers))
		}
	}

	for i, sent := range []int64{0, 3, 0} {
		if got := w.Server(i).SendJoins; got != sent {
			t.Errorf("server %d saw %d send_joins, want %d", i, got, sent)
		}
	}
	if got := w.Stats().Endpoints["send_join"].Outcomes["200"]; got != 3 {
		t.Errorf("%d send_joins answered", got)
	}
}

func TestStateOfABigRoom(t *testing.T) {
	const members = 10
	w, c := start(t, sim.Config{Servers: members, RoomMembers: members})
	name, id := w.Names()[2], w.RoomID(0)
	var made struct {
		Version string `json:"room_version"`
		Event   struct {
			Prev []string `json:"prev_events"`
			Auth []string `json:"auth_events"`
		} `json:"event"`
	}
	res := want(t, c, homeserver(t).MakeJoin(name, id, "alice"), 200)
	if err := json.Unmarshal(res.Body, &made); err != nil || made.Version != "10" || len(made.Event.Prev) != 1 || len(made.Event.Auth) != 3 {
		t.Fatalf("%v: %s", err, res.Body)
	}
	at := made.Event.Prev[0]
	var ids struct {
		State []string `json:"pdu_ids"`
		Auth  []string `json:"auth_chain_ids"`
	}
	var state struct {
		PDUs []json.RawMessage `json:"pdus"`
		Auth []json.RawMessage `json:"auth_chain"`
	}
	if _, body := whole(t, w, fedload.StateIDs(name, id, at)); json.Unmarshal(body, &ids) != nil || len(ids.State) != 5+members || len(ids.Auth) != 5 {
		t.Errorf("ids: %s", body)
	}
	if _, body := whole(t, w, fedload.State(name, id, at)); json.Unmarshal(body, &state) != nil || len(state.PDUs) != 5+members || len(state.Auth) != 5 {
		t.Errorf("state: %s", body)
	}
	for i, event := range ids.State {
		res := want(t, c, fedload.Event(name, event), 200)
		if !strings.Contains(string(res.Body), string(state.PDUs[i])) {
			t.Errorf("event %d is %s, in the state %s", i, res.Body, state.PDUs[i])
		}
	}
	auth := &fedload.Request{Destination: name, Method: "GET", Target: "/_matrix/federation/v1/event_auth/" + id + "/" + at}
	if res := want(t, c, auth, 200); !strings.Contains(string(res.Body), string(state.Auth[4])) {
		t.Errorf("auth chain: %s", res.Body)
	}
	want(t, c, fedload.State(name, id, "$nothing"), 404)
	want(t, c, fedload.State(name, "!big:example.org", at), 404)
	want(t, c, fedload.State(name, id, ""), 400)
	want(t, c, fedload.State(name, w.RoomID(1), at), 404) // the event is another room's
}

func TestJoinsThatAreRefused(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 3, RoomMembers: 2})
	hs, name, id := homeserver(t), w.Names()[0], w.RoomID(0)
	good := join(t, w, c, 0)
	changed := func(from, to string) *fedload.Request {
		r := *good
		r.Body = []byte(strings.Replace(string(good.Body), from, to, 1))
		if string(r.Body) == string(good.Body) {
			t.Fatalf("%s has no %s", r.Body, from)
		}
		return &r
	}
	elsewhere := *good
	elsewhere.Destination = w.Names()[2]
	list := *good
	list.Body = []byte(`[1]`)
	old := hs.MakeJoin(name, id, "alice")
	old.Target = strings.Replace(old.Target, "&ver=10", "", 1)
	for _, test := range []struct {
		what   string
		r      *fedload.Request
		status int
		part   string
	}{
		{"a server that is not in the room", hs.MakeJoin(w.Names()[2], id, "alice"), 404, matrix.MNotFound},
		{"a server that does not know the version", old, 400, `"room_version":"10"`},
		{"another server's user", fedload.Homeserver{Name: "other.test"}.MakeJoin(name, id, "alice"), 403, matrix.MForbidden},
		{"a send_join to a server that is not in the room", &elsewhere, 404, matrix.MNotFound},
		{"another room's event", changed(id, w.RoomID(1)), 400, matrix.MBadJSON},
		{"a leave", changed(`"join"`, `"leave"`), 400, matrix.MBadJSON},
		{"another server's event", changed(`"@alice:origin.test","signatures"`, `"@alice:other.test","signatures"`), 400, matrix.MBadJSON},
		{"no event", &list, 400, matrix.MNotJSON},
	} {
		if res := want(t, c, test.r, test.status); !strings.Contains(string(res.Body), test.part) {
			t.Errorf("%s: %s", test.what, res.Body)
		}
	}
}

func TestSlowSendJoins(t *testing.T) {
	const late = 150 * time.Millisecond
	w, c := start(t, sim.Config{Servers: 5, RoomMembers: 5, SendJoin: sim.SendJoin{Delay: late}})
	for i, how := range map[int]sim.SendJoin{
		1: {Drip: 4 * late},
		2: {Size: 200_000, Rate: 1_000_000},
		3: {Size: 200_000, Chunked: true},
		4: {},
	} {
		if err := w.SetSendJoin(i, how); err != nil {
			t.Fatal(err)
		}
	}
	do := func(i int) fedload.Result { return want(t, c, join(t, w, c, i), 200) }
	if res := do(0); res.Headers < late {
		t.Errorf("delay: headers after %v", res.Headers)
	}
	if res := do(1); res.Headers > res.Whole-late || res.Whole < 4*late {
		t.Errorf("drip: headers after %v, all after %v", res.Headers, res.Whole)
	}
	if res := do(2); res.Whole < 200*time.Millisecond || res.Size < 200_000 || res.Size > 201_500 {
		t.Errorf("200,000 bytes at 1 MB a second: %d bytes, headers after %v, all after %v", res.Size, res.Headers, res.Whole)
	}
	whole1, body := whole(t, w, join(t, w, c, 3))
	var answer sentJoin
	if err := json.Unmarshal(body, &answer); err != nil || whole1.ContentLength != -1 || len(answer.AuthChain) < 100 {
		t.Errorf("chunked: length %d, %d events, %v", whole1.ContentLength, len(answer.AuthChain), err)
	}
	whole2, body := whole(t, w, join(t, w, c, 4))
	if whole2.ContentLength != int64(len(body)) || len(body) > 10_000 {
		t.Errorf("%d bytes with the length %d", len(body), whole2.ContentLength)
	}
	if err := w.SetSendJoin(0, sim.SendJoin{Rate: -1}); err == nil {
		t.Error("a negative rate was taken")
	}
}

// A client that gives up in the middle frees the server.
func TestADrippingSendJoinEndsWithItsClient(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 1, RoomMembers: 1, SendJoin: sim.SendJoin{Drip: time.Hour}})
	r := join(t, w, c, 0)
	c.Timeout, c.BodyTimeout = 10*time.Second, 20*time.Millisecond
	if res := c.Do(t.Context(), r); res.Status != 200 || res.Err == nil {
		t.Errorf("status %d, %v", res.Status, res.Err)
	}
	for deadline := time.Now().Add(10 * time.Second); w.Stats().InFlight > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server still writes")
		}
	}
}

// What a server sends is made on the way.
func TestALargeSendJoinTakesNoMemory(t *testing.T) {
	const size, budget = 40_000_000, 8 << 20
	w, c := start(t, sim.Config{Servers: 20, RoomMembers: 20, SendJoin: sim.SendJoin{Size: size}})
	r := join(t, w, c, 0)
	before := liveHeap()
	done := make(chan fedload.Result)
	go func() { done <- c.Do(t.Context(), r) }()
	var most int64
	for {
		select {
		case res := <-done:
			if res.Err != nil || res.Status != 200 || res.Size < size {
				t.Errorf("status %d, %d bytes, %v", res.Status, res.Size, res.Err)
			}
			if most-before > budget {
				t.Errorf("%d bytes of heap for an answer of %d", most-before, size)
			}
			return
		case <-time.After(20 * time.Millisecond):
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, int64(m.HeapAlloc))
		}
	}
}

func TestTheNotaryKnowsAllKeys(t *testing.T) {
	const late = 50 * time.Millisecond
	w, c := start(t, sim.Config{Servers: 6, Notary: true, NotaryLatency: late, Shares: sim.Shares{sim.Dead: 5. / 6}})
	if w.Kind(sim.NotaryServer) != sim.Well {
		t.Fatalf("the notary is %v", w.Kind(sim.NotaryServer))
	}
	notary := w.Names()[sim.NotaryServer]
	var wanted []fedload.KeyWanted
	for _, name := range append(w.Names()[:6:6], "unknown.test") {
		wanted = append(wanted, fedload.KeyWanted{Server: name, ID: "ed25519:sim", Until: time.Now().UnixMilli()})
	}
	res := want(t, c, fedload.KeyQuery(notary, wanted...), 200)
	if res.Headers < late {
		t.Errorf("answered after %v", res.Headers)
	}
	objects := keyObjects(t, res.Body)
	for i, name := range w.Names() {
		for _, signer := range []int{i, sim.NotaryServer} {
			if err := matrix.VerifyJSON(objects[string(name)], string(w.Names()[signer]), "ed25519:sim", w.SigningKey(signer).Public()); err != nil {
				t.Errorf("keys of %s, signed by server %d: %v", name, signer, err)
			}
		}
	}
	if len(objects) != 6 {
		t.Errorf("%d objects: %s", len(objects), res.Body)
	}
	again := want(t, c, fedload.KeyQuery(notary, wanted[3]), 200)
	if got := keyObjects(t, again.Body)[string(w.Names()[3])]; string(got) != string(objects[string(w.Names()[3])]) {
		t.Errorf("the object has changed from %s to %s", objects[string(w.Names()[3])], got)
	}
}

// keyObjects returns those of an answer by the names they claim.
func keyObjects(t *testing.T, body []byte) map[string]json.RawMessage {
	t.Helper()
	var answer struct {
		Keys []json.RawMessage `json:"server_keys"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	objects := make(map[string]json.RawMessage)
	for _, keys := range answer.Keys {
		objects[claimed(t, keys)] = keys
	}
	return objects
}

func claimed(t *testing.T, keys []byte) string {
	t.Helper()
	var object struct {
		Name string `json:"server_name"`
	}
	if err := json.Unmarshal(keys, &object); err != nil {
		t.Fatalf("%v: %s", err, keys)
	}
	return object.Name
}

func TestFaultsOfKeys(t *testing.T) {
	w, c := start(t, sim.Config{Servers: 3, Notary: true})
	name, other := string(w.Names()[1]), string(w.Names()[2])
	own := func() *fedload.Request {
		return &fedload.Request{Destination: w.Names()[1], Method: "GET", Target: "/_matrix/key/v2/server"}
	}
	query := fedload.KeyQuery(w.Names()[sim.NotaryServer], fedload.KeyWanted{Server: w.Names()[1], ID: "ed25519:sim"})
	// both are the objects of name, as it publishes them and as the notary has them.
	both := func() map[string]json.RawMessage {
		t.Helper()
		published, seen := want(t, c, own(), 200).Body, want(t, c, query, 200).Body
		objects := keyObjects(t, seen)
		if len(objects) != 1 {
			t.Fatalf("%d objects: %s", len(objects), seen)
		}
		all := map[string]json.RawMessage{"published": published}
		for _, o := range objects {
			all["notary"] = o
		}
		if err := matrix.VerifyJSON(all["notary"], string(w.Names()[0]), "ed25519:sim", w.SigningKey(0).Public()); err != nil {
			t.Errorf("the notary's signature: %v", err)
		}
		return all
	}
	signed := func(keys []byte, as string, by int) bool {
		return matrix.VerifyJSON(keys, as, "ed25519:sim", w.SigningKey(by).Public()) == nil
	}
	for fault, bad := range map[sim.KeyFault]func(keys []byte) bool{
		sim.NoKeyFault:   func(k []byte) bool { return claimed(t, k) == name && signed(k, name, 1) },
		sim.WrongName:    func(k []byte) bool { return claimed(t, k) == other && signed(k, other, 1) && !signed(k, other, 2) },
		sim.Swapped:      func(k []byte) bool { return claimed(t, k) == other && signed(k, other, 2) },
		sim.BadSignature: func(k []byte) bool { return claimed(t, k) == name && !signed(k, name, 1) },
	} {
		w.SetKeyFault(fault)
		for what, keys := range both() {
			if !bad(keys) {
				t.Errorf("%v, %s: %s", fault, what, keys)
			}
		}
	}
	for _, r := range []*fedload.Request{own(), query} {
		w.SetKeyFault(sim.NoKeyFault)
		good := want(t, c, r, 200)
		w.SetKeyFault(sim.Oversized)
		if res := want(t, c, r, 200); res.Size < good.Size+sim.OversizedKeys || !strings.HasPrefix(string(res.Body), `{"unsigned":{"padding":"xxx`) {
			t.Errorf("oversized: %d bytes, %.100s", res.Size, res.Body)
		}
		w.SetKeyFault(sim.CutKeys)
		if res := c.Do(t.Context(), r); !errors.Is(res.Err, io.ErrUnexpectedEOF) || res.Size != good.Size/2 {
			t.Errorf("cut: %d bytes of %d, %v", res.Size, good.Size, res.Err)
		}
		w.SetKeyFault(sim.WrongType)
		if resp, body := whole(t, w, r); resp.Header.Get("Content-Type") != "text/html" || string(body) != string(good.Body) {
			t.Errorf("wrong type: %q, %s", resp.Header.Get("Content-Type"), body)
		}
	}
	for f := range sim.NumKeyFaults {
		if got, err := sim.ParseKeyFault(f.String()); got != f || err != nil {
			t.Errorf("ParseKeyFault(%q) = %v, %v", f.String(), got, err)
		}
	}
	if _, err := sim.ParseKeyFault(fmt.Sprint(sim.NumKeyFaults)); err == nil {
		t.Error("an invalid fault has a name")
	}
}

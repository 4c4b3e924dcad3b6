package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/synapse"
)

// module is what the module in Synapse does.
type module struct {
	*running
	http http.Client
	key  string
}

func (r *running) module() *module {
	return &module{running: r, key: secret, http: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(r.dir, "front.sock"))
		},
	}}}
}

func (m *module) do(method, query, body string) (status int, answer map[string]any) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(m.t.Context(), method, "http://fsbus"+handoverPath+query, strings.NewReader(body))
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+m.key)
	resp, err := m.http.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || json.Unmarshal(text, &answer) != nil {
		m.t.Fatalf("%d %s: %v", resp.StatusCode, text, err)
	}
	return resp.StatusCode, answer
}

// set is a set of servers as it is sent.
func set(names ...string) (id, text string) {
	slices.Sort(names)
	id = matrix.HandoverSetID(names)
	list, err := json.Marshal(names)
	if err != nil {
		panic(err)
	}
	return id, fmt.Sprintf(`{"id":%q,"servers":%s}`, id, list)
}

func handoverBody(sets string, items ...string) string {
	return fmt.Sprintf(`{"version":1,"module":%q,"synapse":"1.160.0","sets":[%s],"items":[%s]}`, synapse.Hash(), sets, strings.Join(items, ","))
}

func pduItem(pdu json.RawMessage, to string) string {
	return fmt.Sprintf(`{"pdu":%s,"event_id":"$x","room_id":"!r","to":%q}`, pdu, to)
}

// An event that is given once reaches each of its servers once and in order, beside what
// Synapse sends itself; a set is known again, and what cannot be sent is named.
func TestHandedOverOnce(t *testing.T) {
	w := federation(t, sim.Config{Servers: 5})
	r := startWith(t, w, withOutbox(t, quick))
	m := r.module()
	status, hello := m.do("GET", "?version=1&module="+synapse.Hash()+"&synapse=1.160.0", "")
	if status != 200 || hello["version"] != 1.0 || hello["module"] != synapse.Hash() || hello["max_items"] != float64(matrix.MaxHandoverItems) {
		t.Fatalf("%d %v", status, hello)
	}
	var names []string
	for _, n := range w.Names() {
		names = append(names, string(n))
	}
	names = append(names, "not a name", string(us.Name))
	id, text := set(names...)
	if status, got := m.do("POST", "", handoverBody("", pduItem(message(0), id))); status != 409 || fmt.Sprint(got["unknown"]) != "["+id+"]" {
		t.Fatalf("%d %v", status, got)
	}
	typing := fmt.Sprintf(`{"edu":%s,"to":%q}`, us.Typing("alice", "!r:us.test", true), id)
	status, got := m.do("POST", "", handoverBody(text, pduItem(message(1), id), pduItem([]byte("7"), id), typing, pduItem(message(2), id)))
	if status != 200 || fmt.Sprint(got["refused"]) != "map[not a name:it is not a server's name]" || fmt.Sprint(got["refused_items"]) != "map[1:it is malformed]" {
		t.Fatalf("%d %v", status, got)
	}
	// Then by the set's name alone.
	for _, body := range []string{handoverBody("", pduItem(message(3), id)), handoverBody("", pduItem(message(4), id))} {
		if status, got := m.do("POST", "", body); status != 200 {
			t.Fatalf("%d %v", status, got)
		}
	}
	r.taken(w.Names()[0], "t1", nil, []json.RawMessage{us.ToDevice("alice", "@bob:x", "m1")})
	r.until("all to be delivered", func() bool { return r.report().Outbox.Destinations == 0 })
	st := w.Stats()
	if st.Transactions.PDUs != 4*5 || st.Transactions.Duplicates != 0 || st.Transactions.Refused != 0 {
		t.Errorf("the servers got %+v", st.Transactions)
	}
	h := r.report().Handover
	if h.Events != 4 || h.EDUs != 1 || h.Pairs != 4*5+5 || h.Refused != 4 || h.Sends != 0 || !h.Current || h.Synapse != "1.160.0" {
		t.Errorf("%+v", h)
	}
	if a := r.report().Outbox.Answers; a.Held != 0 {
		t.Errorf("%d answers are held, and the homeserver hands over", a.Held)
	}
	if code, b := r.get("/metrics"); code != 200 || !strings.Contains(b, "fsbus_handover_events_total 4") {
		t.Errorf("%d %s", code, b)
	}
}

// What is handed over is on disk when it is answered.
func TestHandedOverOutlivesTheBus(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2})
	for i := range 2 {
		if err := w.SetKind(i, sim.Dead); err != nil {
			t.Fatal(err)
		}
	}
	r := newRunning(t, w, withOutbox(t, quick))
	r.start(hooks{})
	m := r.module()
	id, text := set(string(w.Names()[0]), string(w.Names()[1]))
	var event json.RawMessage
	for i := range 11 {
		if i < 10 { // then the last one again, as after an answer that was lost
			event = message(i)
		}
		if status, got := m.do("POST", "", handoverBody(text, pduItem(event, id))); status != 200 {
			t.Fatalf("%d %v", status, got)
		}
	}
	r.stop()
	for i := range 2 {
		if err := w.SetKind(i, sim.Well); err != nil {
			t.Fatal(err)
		}
	}
	r.start(hooks{})
	r.until("all to be delivered", func() bool { return w.Stats().Transactions.PDUs == 20 && r.report().Outbox.Destinations == 0 })
	if st := w.Stats().Transactions; st.Duplicates != 0 {
		t.Errorf("%+v", st)
	}
}

func TestHandoversThatAreNotTaken(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := startWith(t, w, withOutbox(t, quick))
	m := r.module()
	for body, want := range map[string]string{
		"{":             "400 M_BAD_JSON",
		"":              "400 M_BAD_JSON",
		`{"version":2}`: "400 FSBUS_VERSION",
		`{"version":1}` + strings.Repeat(" ", matrix.MaxHandoverBytes):                                               "413 M_TOO_LARGE",
		handoverBody("", strings.TrimSuffix(strings.Repeat(`{"pdu":{},"to":"x"},`, matrix.MaxHandoverItems+1), ",")): "413 M_TOO_LARGE",
		handoverBody(""): "200 <nil>",
	} {
		status, got := m.do("POST", "", body)
		if s := fmt.Sprint(status, " ", got["errcode"]); s != want {
			t.Errorf("%.60s: %s, want %s", body, s, want)
		}
	}
	if status, got := m.do("PUT", "", "{}"); status != 405 {
		t.Errorf("%d %v", status, got)
	}
	m.key = "another"
	if status, got := m.do("GET", "", ""); status != 407 || got["errcode"] != "M_UNAUTHORIZED" {
		t.Errorf("%d %v", status, got)
	}
	plain := startWith(t, w, config{}).module() // without an outbox
	if status, got := plain.do("GET", "", ""); status != 404 {
		t.Errorf("%d %v", status, got)
	}
	if plain.report().Handover != nil {
		t.Error("there is a hand-over without an outbox")
	}
}

// A large event for many servers is in memory, and on disk, once.
func TestALargeEventForManyServers(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := startWith(t, w, withOutbox(t, quick))
	m := r.module()
	var names []string
	for i := range 3000 {
		names = append(names, fmt.Sprintf("127.9.%d.%d:1", i/200, i%200)) // which are not dialled
	}
	id, text := set(names...)
	event := us.Message("alice", "!r:us.test", strings.Repeat("x", 60_000), 1, time.Now())
	if status, got := m.do("POST", "", handoverBody(text, pduItem(event, id))); status != 200 || len(got["refused"].(map[string]any)) > 0 {
		t.Fatalf("%d %v", status, got)
	}
	if h := r.report().Handover; h.Pairs != 3000 {
		t.Errorf("%+v", h)
	}
	if s := r.node.store.Stats(); s.Outbox.Items != 3000 || s.FileBytes+s.WALBytes > 16<<20 {
		t.Errorf("%+v", s)
	}
}

// A server whose queue is full is named, and the others get theirs.
func TestHandedOverToAFullQueue(t *testing.T) {
	w := federation(t, sim.Config{Servers: 3})
	if err := w.SetKind(0, sim.Dead); err != nil {
		t.Fatal(err)
	}
	r := startWith(t, w, withOutbox(t, quick+"max_destination_items = 100\n"))
	m := r.module()
	full, fullText := set(string(w.Names()[0]))
	all, allText := set(string(w.Names()[0]), string(w.Names()[1]), string(w.Names()[2]))
	var items []string
	for i := range 100 {
		items = append(items, pduItem(message(i), full))
	}
	if status, got := m.do("POST", "", handoverBody(fullText, items...)); status != 200 || len(got["refused"].(map[string]any)) > 0 {
		t.Fatalf("%d %v", status, got)
	}
	status, got := m.do("POST", "", handoverBody(allText, pduItem(message(100), all)))
	if want := fmt.Sprintf("map[%s:full]", w.Names()[0]); status != 200 || fmt.Sprint(got["refused"]) != want {
		t.Errorf("%d %v, want %s", status, got, want)
	}
	r.until("the others to have theirs", func() bool { return w.Stats().Transactions.PDUs == 2 })
}

// Sets are remembered within bounds, those that were used last.
func TestHandoverSetsAreBounded(t *testing.T) {
	h := &handover{sets: newHandover(nil).sets}
	small := func(i int) matrix.HandoverSet {
		s := []string{fmt.Sprint("s", i)}
		return matrix.HandoverSet{ID: matrix.HandoverSetID(s), Servers: s}
	}
	known := func(s matrix.HandoverSet) bool {
		_, unknown := h.resolve(&matrix.Handover{Items: []matrix.HandoverItem{{To: s.ID}}})
		return len(unknown) == 0
	}
	for i := range maxSets + 1 {
		h.resolve(&matrix.Handover{Sets: []matrix.HandoverSet{small(i)}})
		if !known(small(0)) { // which is used, and so stays
			t.Fatalf("the first is forgotten after %d", i)
		}
	}
	if known(small(1)) || !known(small(2)) || len(h.sets) != maxSets || h.names != maxSets {
		t.Errorf("%d sets, %d names", len(h.sets), h.names)
	}
	large := matrix.HandoverSet{ID: "large", Servers: make([]string, maxHandoverNames-1)}
	h.resolve(&matrix.Handover{Sets: []matrix.HandoverSet{large}})
	if !known(large) || h.names != maxHandoverNames || len(h.sets) != 2 {
		t.Errorf("%d sets, %d names", len(h.sets), h.names)
	}
}

// Many at a time are all answered, each event at its server once.
func TestHandoversAtOnce(t *testing.T) {
	w := federation(t, sim.Config{Servers: 3})
	r := startWith(t, w, withOutbox(t, quick))
	var names []string
	for _, n := range w.Names() {
		names = append(names, string(n))
	}
	id, text := set(names...)
	var running sync.WaitGroup
	for i := range 8 {
		m := r.module()
		running.Go(func() {
			for k := range 5 {
				body := []byte(handoverBody(text, pduItem(message(10*i+k), id)))
				req, err := http.NewRequest("POST", "http://fsbus"+handoverPath, bytes.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Authorization", "Bearer "+m.key)
				resp, err := m.http.Do(req)
				if err != nil || resp.StatusCode != 200 {
					t.Errorf("%v %v", resp, err)
					return
				}
				resp.Body.Close()
			}
		})
	}
	running.Wait()
	r.until("all to be delivered", func() bool { return w.Stats().Transactions.PDUs == 120 && r.report().Outbox.Destinations == 0 })
	if st := w.Stats().Transactions; st.Duplicates != 0 {
		t.Errorf("%+v", st)
	}
}

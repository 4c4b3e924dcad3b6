package node

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/store"
)

// keyFile writes a file of signing keys, of 32 bytes of seed each.
func keyFile(t *testing.T, dir string, seeds ...byte) string {
	t.Helper()
	var text string
	for _, s := range seeds {
		text += "ed25519 test " + base64.RawStdEncoding.EncodeToString(bytes.Repeat([]byte{s}, 32)) + "\n"
	}
	path := filepath.Join(dir, "signing.key")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// withOutbox is the configuration of a bus with an outbox.
func withOutbox(t *testing.T, outbox string) config {
	return config{outbox: outbox, key: keyFile(t, t.TempDir(), 7)}
}

// quick is an outbox in which nothing waits for company.
const quick = "presence_window = \"0s\"\nreceipt_window = \"0s\"\ntyping_window = \"0s\"\n"

// unpaced has everything answered as soon as it is stored: otherwise what is for a
// destination that is away is answered last, after half a minute each.
const unpaced = quick + "ack_pace = \"off\"\n"

// until waits for something that comes by itself, within a bound that only a
// hang reaches.
func (r *running) until(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("waited in vain for %s\n%s", what, r.log)
		}
		r.get("/status") // takes some milliseconds
	}
}

// taken sends a transaction and wants it to be taken over.
func (r *running) taken(dest matrix.ServerName, txn string, pdus, edus []json.RawMessage) {
	r.t.Helper()
	r.takenAt(time.Now(), dest, txn, pdus, edus)
}

// takenAt is taken for a transaction that the homeserver began at a time.
func (r *running) takenAt(at time.Time, dest matrix.ServerName, txn string, pdus, edus []json.RawMessage) {
	r.t.Helper()
	got := r.Do(r.t.Context(), fedload.Send(us.Name, dest, txn, at, pdus, edus))
	if got.Err != nil || got.Status != 200 || string(got.Body) != `{"pdus":{}}` {
		r.t.Fatalf("transaction %s to %s: %d %s, %v", txn, dest, got.Status, got.Body, got.Err)
	}
}

func message(n int) json.RawMessage {
	return us.Message("alice", "!r:us.test", fmt.Sprint("message ", n), int64(n+1), time.Now())
}

func TestTransactionsAreTakenOverAndDelivered(t *testing.T) {
	w := federation(t, sim.Config{Servers: 3})
	r := startWith(t, w, withOutbox(t, quick))
	event := message(1)
	for i, dest := range w.Names() {
		at := time.Now()
		r.takenAt(at, dest, fmt.Sprint("t", i), []json.RawMessage{event}, []json.RawMessage{
			us.Typing("alice", "!r:us.test", true), us.Presence("alice", "online", "x"), us.Receipt("alice", "!r:us.test", "$a", time.Now()), us.ToDevice("alice", "@bob:x", "m1"),
		})
		r.takenAt(at, dest, fmt.Sprint("t", i), []json.RawMessage{event}, nil) // again, as after an answer that was lost
	}
	r.until("all to be delivered", func() bool { return r.report().Outbox.Destinations == 0 })
	st := w.Stats()
	if st.Transactions.PDUs != 3 || st.Transactions.Duplicates != 0 || st.Transactions.Refused != 0 || st.Transactions.EDUs != 12 {
		t.Errorf("the servers got %+v", st.Transactions)
	}
	if e := st.Endpoints["send"]; e.Outcomes["401"] != 0 {
		t.Errorf("signatures were refused: %+v", e)
	}
	if o := r.report().Outbox; o.Accepted != 3 || o.Repeated != 3 || o.Sent != 3 || o.Retried != 0 {
		t.Errorf("outbox: %+v", o)
	}
}

// A homeserver numbers its transactions from the time of its start on. After a clock
// has gone back it comes by the same numbers again, with other content.
func TestATransactionWithAnIdOfBeforeIsAnother(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := newRunning(t, w, withOutbox(t, unpaced))
	dest := w.Names()[0]
	at := time.Now()
	r.start(hooks{})
	r.takenAt(at, dest, "25123", []json.RawMessage{message(0)}, nil)
	r.stop()
	r.start(hooks{})
	r.takenAt(at.Add(-time.Hour), dest, "25123", []json.RawMessage{message(1)}, []json.RawMessage{us.ToDevice("alice", "@bob:x", "m1")})
	r.until("both to be delivered", func() bool { return w.Stats().Transactions.PDUs == 2 && r.report().Outbox.Destinations == 0 })
	if n := r.report().Outbox.Repeated; n != 0 {
		t.Errorf("%d were taken for repeated", n)
	}
}

// While the outbox stands still transactions are carried through, but not past what
// it has.
func TestNothingIsCarriedPastWhatWaits(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2, Shares: sim.Shares{sim.Dead: 0.5}})
	dead, well := w.NamesOf(sim.Dead)[0], w.NamesOf(sim.Well)[0]
	dir := t.TempDir()
	r := startWith(t, w, config{outbox: unpaced, key: keyFile(t, dir, 7)})
	r.taken(dead, "t0", []json.RawMessage{message(0)}, nil)
	r.until("the server to be found dead", func() bool { return r.report().Hosts.BackingOff == 1 })
	keyFile(t, dir, 8)
	r.hup <- syscall.SIGHUP
	r.await("READY=1")
	if err := w.SetKind(slices.Index(w.Names(), dead), sim.Well); err != nil {
		t.Fatal(err)
	}
	send := func(dest matrix.ServerName, n int) int {
		return r.Do(t.Context(), fedload.Send(us.Name, dest, fmt.Sprint("t", n), time.Now(), []json.RawMessage{message(n)}, nil)).Status
	}
	if s := send(well, 1); s != 200 {
		t.Errorf("to a server for which nothing waits: %d", s)
	}
	if s := send(dead, 2); s != 503 {
		t.Errorf("to the one for which something does: %d", s)
	}
	if st := w.Stats().Transactions; st.PDUs != 1 {
		t.Errorf("%+v", st)
	}
}

// What waits for a server that is away goes on merging, and is bounded; when the
// server is back it gets the latest of each.
func TestADeadServersQueueMergesAndIsDelivered(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1, Shares: sim.Shares{sim.Dead: 1}})
	r := startWith(t, w, withOutbox(t, unpaced))
	dest := w.Names()[0]
	for i := range 20 {
		r.taken(dest, fmt.Sprint("t", i), []json.RawMessage{message(i)}, []json.RawMessage{us.Presence("alice", "online", fmt.Sprint(i)), us.Receipt("alice", "!r:us.test", fmt.Sprint("$", i), time.Now())})
	}
	pending := func() map[string]int64 {
		m := map[string]int64{}
		for _, c := range r.report().Outbox.Pending {
			m[c.Name] = c.Count
		}
		return m
	}
	r.until("the server to be found dead", func() bool { return r.report().Hosts.BackingOff == 1 })
	r.until("the batch to be thawed", func() bool { p := pending(); return p["presence"] == 1 && p["receipt"] == 1 })
	if p := pending(); p["pdu"] != 20 {
		t.Errorf("pending: %v", p)
	}
	if err := w.SetKind(0, sim.Well); err != nil {
		t.Fatal(err)
	}
	r.node.loop.Post(event{Event: bus.Flush{Dest: dest}})
	r.until("all to be delivered", func() bool { return r.report().Outbox.Destinations == 0 })
	if st := w.Stats().Transactions; st.PDUs != 20 || st.EDUs != 2 || st.MaxInFlightPerServer != 1 {
		t.Errorf("the server got %+v", st)
	}
}

// A wrong key must not sign anything for long: nobody would take it.
func TestAWrongKeyStopsTheOutbox(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	dir := t.TempDir()
	r := startWith(t, w, config{key: keyFile(t, dir, 8)}) // its id is the same
	dest := w.Names()[0]
	send := func(txn string) fedload.Result {
		t.Helper()
		got := r.Do(t.Context(), fedload.Send(us.Name, dest, txn, time.Now(), []json.RawMessage{message(1)}, nil))
		if got.Status != 200 {
			t.Fatalf("%d %s, %v", got.Status, got.Body, got.Err)
		}
		return got
	}
	if got := send("t1"); string(got.Body) == `{"pdus":{}}` {
		t.Error("the transaction was taken over")
	}
	const want = "does not fit the key ed25519:test"
	if code, body := r.get("/health"); code != 503 || !strings.Contains(body, want) {
		t.Errorf("/health: %d %s", code, body)
	}
	if o := r.report().Outbox; !strings.Contains(o.StandsStill, want) || o.Accepted != 0 {
		t.Errorf("status: %+v", o)
	}
	if !strings.Contains(r.log.String(), want) {
		t.Error("the log does not tell")
	}
	if strings.Contains(r.log.String(), base64.RawStdEncoding.EncodeToString(bytes.Repeat([]byte{8}, 32))) {
		t.Error("the key is in the log")
	}
	// The right one, and the wrong one as an old one.
	keyFile(t, dir, 7)
	r.hup <- syscall.SIGHUP
	r.await("READY=1")
	if code, body := r.get("/health"); code != 200 {
		t.Errorf("after the reload, /health: %d %s", code, body)
	}
	if got := send("t2"); string(got.Body) != `{"pdus":{}}` {
		t.Errorf("after the reload the transaction is not taken over: %s", got.Body)
	}
}

func TestWhatTheOutboxCannotTakeApartIsCarriedThrough(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := startWith(t, w, withOutbox(t, ""))
	dest := w.Names()[0]
	tooMany := make([]json.RawMessage, matrix.MaxPDUs+1)
	for i := range tooMany {
		tooMany[i] = message(i)
	}
	for name, req := range map[string]*fedload.Request{
		"another's":  fedload.Send("other.test", dest, "t1", time.Now(), nil, nil),
		"too many":   fedload.Send(us.Name, dest, "t2", time.Now(), tooMany, nil),
		"an id of 2": {Destination: dest, Method: "PUT", Target: sendPrefix + "a/b", Body: []byte(`{"origin":"us.test","pdus":[]}`)},
		"no origin":  {Destination: dest, Method: "PUT", Target: sendPrefix + "t3", Body: []byte(`{"pdus":[]}`)},
	} {
		before := w.Stats().Endpoints["send"].Count + w.Stats().Endpoints["unknown"].Count
		got := r.Do(t.Context(), req)
		after := w.Stats().Endpoints["send"].Count + w.Stats().Endpoints["unknown"].Count
		if got.Err != nil || after != before+1 {
			t.Errorf("%s: %d %s, %v; the server has seen %d requests", name, got.Status, got.Body, got.Err, after-before)
		}
	}
	if o := r.report().Outbox; o.Accepted != 0 || o.StandsStill != "" {
		t.Errorf("outbox: %+v", o)
	}
}

// A large transaction passes through the spool's files on both ways.
func TestALargeTransactionIsTakenOver(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := startWith(t, w, withOutbox(t, ""))
	var pdus []json.RawMessage
	for i := range matrix.MaxPDUs {
		pdus = append(pdus, us.Message("alice", "!r:us.test", strings.Repeat(fmt.Sprint(i%10), 40_000), int64(i), time.Now()))
	}
	r.taken(w.Names()[0], "t1", pdus, nil)
	r.until("it to be delivered", func() bool { return r.report().Outbox.Destinations == 0 })
	if st := w.Stats().Transactions; st.PDUs != matrix.MaxPDUs || st.Duplicates != 0 {
		t.Errorf("the server got %+v", st)
	}
}

// Whatever the homeserver was told is taken over survives kill -9.
func TestTransactionsSurviveKill(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2, Shares: sim.Shares{sim.Dead: 0.5}})
	dead := w.NamesOf(sim.Dead)[0]
	k := newKillable(t, w, withOutbox(t, unpaced))
	k.run("", 0)
	const each = 10
	for round := range 3 {
		for i := range each {
			n := round*each + i
			k.taken(dead, fmt.Sprint("t", n), []json.RawMessage{message(n)}, []json.RawMessage{us.ToDevice("alice", "@bob:x", fmt.Sprint("m", n))})
		}
		k.kill()
		k.run("", 0)
	}
	if err := w.SetKind(indexOf(w, dead), sim.Well); err != nil {
		t.Fatal(err)
	}
	k.until("all to be delivered", func() bool { return k.report().Outbox.Destinations == 0 })
	if st := w.Stats().Transactions; st.PDUs != 3*each || st.EDUs != 3*each || st.Duplicates != 0 {
		t.Errorf("the server got %+v", st)
	}
}

func indexOf(w *sim.World, name matrix.ServerName) int {
	for i, n := range w.Names() {
		if n == name {
			return i
		}
	}
	return -1
}

// startBeside starts a bus for which example.com:8448 is a server with a handler of the
// test's, beside those of w.
func startBeside(t *testing.T, c config, w *sim.World, listen string, handler http.HandlerFunc) *running {
	t.Helper()
	remote := httptest.NewUnstartedServer(handler)
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	_ = remote.Listener.Close()
	remote.Listener = ln
	remote.StartTLS()
	t.Cleanup(remote.Close)
	r := newRunning(t, w, c)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: remote.Certificate().Raw})
	text, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("[status]"), []byte("resolve = { \"example.com:8448\" = \""+ln.Addr().String()+"\" }\n[status]"), 1)
	if err := errors.Join(os.WriteFile(r.path, text, 0o600), os.WriteFile(filepath.Join(r.dir, "ca.pem"), append(w.CAPEM(), ca...), 0o600)); err != nil {
		t.Fatal(err)
	}
	r.start(hooks{})
	return r
}

// A server that refuses one item takes an empty transaction, and so the item is found and
// set aside, and the others arrive.
func TestADislikedItemIsSetAside(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	var controls, refused, taken atomic.Int64
	r := startBeside(t, withOutbox(t, unpaced), w, "127.1.250.2:0", func(rw http.ResponseWriter, req *http.Request) {
		var txn struct {
			Origin string            `json:"origin"`
			TS     int64             `json:"origin_server_ts"`
			PDUs   []json.RawMessage `json:"pdus"`
			EDUs   []json.RawMessage `json:"edus"`
		}
		body, _ := io.ReadAll(req.Body)
		x, err := matrix.ParseXMatrix(req.Header.Get("Authorization"))
		if json.Unmarshal(body, &txn) != nil || txn.Origin != string(us.Name) || txn.TS == 0 || err != nil || x.Destination != "example.com:8448" {
			t.Errorf("a transaction is %s, signed %q", body, req.Header.Get("Authorization"))
		}
		switch {
		case bytes.Contains(body, []byte("message 3")):
			refused.Add(1)
			rw.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(rw, "<html>Forbidden</html>")
			return
		case len(txn.PDUs)+len(txn.EDUs) == 0:
			controls.Add(1)
		}
		taken.Add(int64(len(txn.PDUs)))
		_, _ = io.WriteString(rw, `{"pdus":{}}`)
	})
	var pdus []json.RawMessage
	for i := range 5 {
		pdus = append(pdus, message(i))
	}
	r.taken("example.com:8448", "t1", pdus, nil)
	r.until("all others to be delivered", func() bool {
		r.node.loop.Post(event{Event: bus.Flush{Dest: "example.com:8448"}}) // in place of its back-off
		return r.report().Outbox.Destinations == 0
	})
	if o := r.report().Outbox; o.SetAsideNow != 1 || taken.Load() != 4 || controls.Load() < 2 || o.Controls != controls.Load() {
		t.Errorf("%d set aside, %d taken, %d controls (%d by the bus's own count); want 1, 4, and at least 2", o.SetAsideNow, taken.Load(), controls.Load(), o.Controls)
	}
	if !strings.Contains(r.log.String(), "a destination refuses a transaction") {
		t.Error("the log does not say that something is refused")
	}
}

// What was set aside the day before goes with the next success.
func TestWhatWasSetAsideIsTriedAgainAfterASuccess(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	var again atomic.Int64
	r := startBeside(t, withOutbox(t, unpaced), w, "127.1.250.4:0", func(rw http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		if bytes.Contains(body, []byte("message 3")) {
			again.Add(1)
		}
		_, _ = io.WriteString(rw, `{"pdus":{}}`)
	})
	const dest = "example.com:8448"
	then := r.node.clock.Now().Add(-2 * store.RetryAfter).Stored()
	txn, err := matrix.ParseTransaction(fmt.Appendf(nil, `{"pdus":[%s]}`, message(3)))
	if err != nil && !errors.Is(err, matrix.ErrNoOrigin) {
		t.Fatal(err)
	}
	for _, op := range []store.OutboxOp{
		&store.Accept{Destination: dest, Items: txn.Items(nil), Accepted: then},
		&store.Pack{Destination: dest, NewID: "then", Now: then, Origin: us.Name, MaxBytes: 1 << 20},
		&store.Settle{Destination: dest, TxnID: "then", Outcome: store.Bisect, Now: then, Reason: "refused"},
	} {
		done := make(chan error, 1)
		if err := r.node.store.Submit(&store.Batch{Outbox: []store.OutboxOp{op}}, func(err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if n := r.report().Outbox.SetAsideNow; n != 1 {
		t.Fatalf("%d are set aside", n)
	}
	r.taken(dest, "t1", []json.RawMessage{message(1)}, nil)
	r.until("it to be delivered, too", func() bool {
		o := r.report().Outbox
		return again.Load() == 1 && o.SetAsideNow == 0 && o.Destinations == 0
	})
}

// A 401 is about our key. It is said, and tried again in seconds.
func TestARefusedSignatureIsSaid(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	var has atomic.Bool
	r := startBeside(t, withOutbox(t, unpaced), w, "127.1.250.3:0", func(rw http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		if !has.Swap(true) {
			rw.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(rw, `{"errcode":"M_UNAUTHORIZED","error":"no key"}`)
			return
		}
		_, _ = io.WriteString(rw, `{"pdus":{}}`)
	})
	r.taken("example.com:8448", "t1", []json.RawMessage{message(1)}, nil)
	r.until("it to be delivered", func() bool { return r.report().Outbox.Destinations == 0 })
	if !strings.Contains(r.log.String(), "does not accept our signature") {
		t.Error("the log does not say what was refused")
	}
}

// The answer to a transaction lies in the spool, whose bounds hold for all of them
// together, and one that is too large is not read to its end.
func TestLargeAnswersToTransactionsAreBounded(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	var tooLarge atomic.Bool
	r := startBeside(t, withOutbox(t, quick), w, "127.1.250.1:0", func(rw http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		fmt.Fprintf(rw, `{"pdus":{"$refused":{"error":"no"}},"more":"%s`, strings.Repeat("x", maxSendAnswer-100))
		if tooLarge.Load() {
			_, _ = io.WriteString(rw, strings.Repeat("x", 200))
		}
		_, _ = io.WriteString(rw, `"}`)
	})
	r.taken("example.com:8448", "t1", []json.RawMessage{message(1)}, nil)
	r.until("a large answer to be taken", func() bool { return r.report().Outbox.Destinations == 0 })
	if s := r.node.spool.Stats(); s.MaxDisk+s.MaxMemory < maxSendAnswer-100 {
		t.Errorf("the answer was not in the spool: %+v", s)
	}
	if !strings.Contains(r.log.String(), "a destination refuses an event") {
		t.Error("what the answer says was not read")
	}
	tooLarge.Store(true)
	r.taken("example.com:8448", "t2", []json.RawMessage{message(2)}, nil)
	r.until("an answer that is too large to be refused", func() bool { return strings.Contains(r.log.String(), errAnswerTooLarge.Error()) })
	if n := r.report().Outbox.Destinations; n != 1 {
		t.Errorf("%d destinations have something pending, want 1", n)
	}
}

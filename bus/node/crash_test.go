package node

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/store"
)

// Variables of the environment.
const (
	childCrash  = "FSBUS_TEST_CRASH"        // where the child kills itself, see crashHooks; set in the child only
	crashRounds = "FSBUS_NODE_CRASH_ROUNDS" // how often to kill, for long runs
	crashSeed   = "FSBUS_NODE_CRASH_SEED"   // repeats a run's moments
)

// crashAt kills the process, as kill -9 does, at a point that it is told of as
// "WHEN WHAT:COUNT": at the COUNTth time that
//
//	on EVENT        the core is about to hear of an event
//	before EFFECT   an effect is about to be executed
//	after EFFECT    it was
//	commit EFFECT   what it has submitted to the store is about to be committed
//	any             any of these, or the store begins or commits a group
//
// EVENT and EFFECT are names of types of package bus. Of Sends only those of the
// outbox count.
type crashAt struct {
	when, what string
	left       atomic.Int64
	state      atomic.Int32
}

// The states of a crash at a commit.
const (
	crashArmed     = 1 + iota // the operation is about to be submitted
	crashSubmitted            // it was
)

// crashHooks has a bus kill itself at a point; "" is never.
func crashHooks(point string) hooks {
	if point == "" {
		return hooks{}
	}
	where, count, _ := strings.Cut(point, ":")
	n, err := strconv.ParseInt(count, 10, 64)
	if err != nil {
		panic(fmt.Sprintf("%s=%s: %v", childCrash, point, err))
	}
	c := &crashAt{}
	c.when, c.what, _ = strings.Cut(where, " ")
	c.left.Store(n)
	return hooks{event: c.event, effect: c.effect, fault: c.fault}
}

func die() {
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // nothing more is done until it has come
}

func (c *crashAt) hit() bool { return c.left.Add(-1) == 0 }

func (c *crashAt) event(ev bus.Event) {
	if r, ok := ev.(bus.Restored); ok {
		// What was dead is tried in each life: for its back-off there is no time.
		for i := range r.Hosts {
			r.Hosts[i].NextTry = 0
		}
	}
	if (c.when == "any" || c.when == "on" && busType(ev) == c.what) && c.hit() {
		die()
	}
}

func (c *crashAt) effect(e bus.Effect, done bool) {
	if s, ok := e.(bus.Send); ok && s.Req != 0 {
		return
	}
	switch {
	case c.when == "any":
		if c.hit() {
			die()
		}
	case busType(e) != c.what:
	case c.when == "before" && !done, c.when == "after" && done:
		if c.hit() {
			die()
		}
	case c.when == "commit" && !done:
		if c.hit() {
			c.state.Store(crashArmed)
		}
	case c.when == "commit":
		c.state.CompareAndSwap(crashArmed, crashSubmitted)
	}
}

// fault runs on the writer's goroutine. A group that commits once the operation is
// about to be submitted is at the latest the one that holds it.
func (c *crashAt) fault(op store.Op) error {
	if c.when == "any" && c.hit() {
		die()
	}
	if c.when == "commit" && op == store.OpCommit && c.state.Load() != 0 {
		for c.state.Load() == crashArmed {
			runtime.Gosched()
		}
		die()
	}
	return nil
}

// busType is the name of a type of package bus.
func busType(v any) string { return strings.TrimPrefix(fmt.Sprintf("%T", v), "bus.") }

// killable is a bus in a process of its own, so that it can be killed.
type killable struct {
	*running
	child *exec.Cmd
	gone  chan struct{} // closed when the child has ended
}

func newKillable(t *testing.T, w *sim.World, c config) *killable {
	t.Helper()
	k := &killable{running: newRunning(t, w, c), gone: make(chan struct{})}
	close(k.gone)
	t.Cleanup(func() {
		if k.child != nil {
			k.child.Process.Kill()
			<-k.gone
		}
	})
	return k
}

// run starts the child and waits until it serves. With a point at which it kills
// itself, or a time after which it is killed if it does not serve by then, it may
// be gone before. run reports whether it serves.
func (k *killable) run(crash string, within time.Duration) bool {
	k.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		k.t.Fatal(err)
	}
	child, gone := exec.Command(exe), make(chan struct{})
	child.Env = append(os.Environ(), childConfig+"="+k.path, childCrash+"="+crash)
	child.Stderr = k.log
	if err := child.Start(); err != nil {
		k.t.Fatal(err)
	}
	k.child, k.gone = child, gone
	go func() {
		child.Wait()
		close(gone)
	}()
	if within > 0 {
		defer time.AfterFunc(within, func() { child.Process.Kill() }).Stop()
	}
	ready := make(chan struct{})
	k.notice.SetReadDeadline(time.Now().Add(60 * time.Second))
	go func() {
		select {
		case <-gone:
			// It says nothing more; what it said may still be there to be read.
			k.notice.SetReadDeadline(time.Now().Add(-time.Second))
		case <-ready:
		}
	}()
	defer close(ready)
	for buf := make([]byte, 4096); ; {
		n, err := k.notice.Read(buf)
		switch {
		case err == nil && strings.Contains(string(buf[:n]), "READY=1"):
			return true
		case err != nil:
			if !k.ended() || crash == "" && within == 0 {
				k.t.Fatalf("the bus does not come up: %v\n%s", err, k.log)
			}
			return false
		}
	}
}

// ended reports whether the child is gone.
func (k *killable) ended() bool {
	select {
	case <-k.gone:
		return true
	default:
		return false
	}
}

func (k *killable) kill() {
	k.t.Helper()
	k.child.Process.Kill()
	k.killed()
}

// killed waits until the child is gone, which must have been killed.
func (k *killable) killed() {
	k.t.Helper()
	select {
	case <-k.gone:
	case <-time.After(60 * time.Second):
		k.t.Fatalf("the child was to be killed, and lives\n%s", k.log)
	}
	if status := k.child.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGKILL {
		k.t.Fatalf("the child was to be killed, not to end with %v\n%s", k.child.ProcessState, k.log)
	}
}

// eventually waits for something that comes by itself, within a bound that only
// a hang reaches.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// quiet waits until the servers have noticed that a bus is gone. Until then they
// count what it had in flight, and cannot tell if the next one keeps to one
// transaction at a time.
func quiet(t *testing.T, w *sim.World) {
	t.Helper()
	eventually(t, "the servers to notice", func() bool {
		for i := range w.Names() {
			if w.Server(i).SendInFlight > 0 {
				return false
			}
		}
		return true
	})
}

// stored is what a database holds for a destination.
type stored struct {
	items  int64
	frozen bool
}

// look reads a copy of a database as a process that was killed has left it.
func (k *killable) look(dest matrix.ServerName) (st stored) {
	t := k.t
	t.Helper()
	dir := t.TempDir()
	for _, suffix := range []string{"", "-wal"} {
		b, err := os.ReadFile(filepath.Join(k.dir, "data", "fsbus.db"+suffix))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "fsbus.db"+suffix), b, 0o600)
		}
		if err != nil && !(suffix != "" && errors.Is(err, fs.ErrNotExist)) {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "fsbus.db")
	s, err := store.Open(t.Context(), store.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	err = s.LoadOutbox(t.Context(), func(d store.Destination) error {
		if d.Name == dest {
			st = stored{d.Kinds.Sum().Items, d.Frozen}
		}
		return nil
	})
	if err := errors.Join(err, s.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	sound(t, path)
	return st
}

// sound has SQLite check a database that nobody has open.
func sound(t *testing.T, path string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var verdict string
	if err := db.QueryRow("PRAGMA integrity_check").Scan(&verdict); err != nil || verdict != "ok" {
		t.Errorf("integrity_check: %s, %v", verdict, err)
	}
}

// letter is a transaction of the homeserver with an event and a message to a
// device, which no receiver may miss or get twice.
func letter(dest matrix.ServerName, n int) *fedload.Request {
	return fedload.Send(us.Name, dest, fmt.Sprint("t", n), time.Now(), []json.RawMessage{message(n)}, []json.RawMessage{us.ToDevice("alice", "@bob:x", fmt.Sprint("m", n))})
}

// accepted reports whether a transaction was taken over. One that was not is
// tried again by the homeserver, with the same id. Only a bus that is killed may
// leave it without an answer.
func (r *running) accepted(req *fedload.Request) bool {
	got := r.Do(context.Background(), req)
	if got.Status == 0 || got.Err != nil {
		return false
	}
	if got.Status != 200 || string(got.Body) != string(takenBody) {
		r.t.Errorf("%s to %s: %d %s", req.Target, req.Destination, got.Status, got.Body)
	}
	return true
}

// idle reports whether nothing is pending. A bus that is gone does not say.
func (k *killable) idle() bool {
	resp, err := k.status.Get("http://localhost/status")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	var rep Report
	return json.NewDecoder(resp.Body).Decode(&rep) == nil && rep.Outbox != nil && rep.Outbox.Destinations == 0
}

// A bus is killed at each step of a transaction's way, the third of five, and
// started again. What is on disk and at the destination at that moment shows that
// it was this step.
func TestNothingIsLostAtAnyStep(t *testing.T) {
	const letters, fatal = 5, 2
	for _, c := range []struct {
		point    string
		answered bool // the homeserver may have been told that it is taken over
		items    int64
		frozen   bool // what is there is packed; not known where Pack is under way
		arrived  int64
		repeated bool // the destination gets it twice
	}{
		{point: "commit Accept", arrived: fatal},
		{point: "on Accepted", items: 2, arrived: fatal},
		{point: "before Acknowledge", items: 2, arrived: fatal},
		{point: "after Acknowledge", answered: true, items: 2, arrived: fatal},
		{point: "commit Pack", answered: true, items: 2, arrived: fatal},
		{point: "on Packed", answered: true, items: 2, frozen: true, arrived: fatal},
		{point: "before Send", answered: true, items: 2, frozen: true, arrived: fatal},
		{point: "on Done", answered: true, items: 2, frozen: true, arrived: fatal + 1, repeated: true},
		{point: "before Settle", answered: true, items: 2, frozen: true, arrived: fatal + 1, repeated: true},
		{point: "commit Settle", answered: true, items: 2, frozen: true, arrived: fatal + 1, repeated: true},
		{point: "on Settled", answered: true, arrived: fatal + 1},
	} {
		t.Run(strings.ReplaceAll(c.point, " ", ""), func(t *testing.T) {
			w := federation(t, sim.Config{Servers: 1})
			dest := w.Names()[0]
			k := newKillable(t, w, withOutbox(t, unpaced))
			k.run(fmt.Sprintf("%s:%d", c.point, fatal+1), 0)
			for n := range letters {
				req := letter(dest, n)
				answered := k.accepted(req)
				eventually(t, "delivery, or the end", func() bool { return k.ended() || w.Server(0).PDUs > int64(n) && k.idle() })
				if n != fatal {
					if !answered || k.ended() {
						t.Fatalf("transaction %d: answered %v, the bus is gone: %v\n%s", n, answered, k.ended(), k.log)
					}
					continue
				}
				k.killed()
				quiet(t, w)
				st, arrived := k.look(dest), w.Server(0).PDUs
				pack := strings.Contains(c.point, "Ack") || strings.HasSuffix(c.point, "Pack") // under way, perhaps
				if answered && !c.answered || st.items != c.items || st.frozen != c.frozen && !pack || arrived != c.arrived {
					t.Errorf("at %s: answered %v, %+v on disk, %d events have arrived; want %+v", c.point, answered, st, arrived, c)
				}
				k.run("", 0)
				if !answered && !k.accepted(req) {
					t.Fatalf("not taken over by the next bus\n%s", k.log)
				}
				eventually(t, "delivery", k.idle)
			}
			var repeated int64
			if c.repeated {
				repeated = 1
			}
			st := w.Stats().Transactions
			if st.PDUs != letters || st.Duplicates != 0 || st.EDUs != letters || st.Repeated != repeated || st.Conflicts != 0 || st.MaxInFlightPerServer != 1 {
				t.Errorf("the server got %+v, want %d events, %d transaction twice", st, letters, repeated)
			}
			k.kill()
			k.look(dest) // is it sound
		})
	}
}

// homeserver sends transactions to one destination, one at a time and each
// until it is answered, as a Synapse does.
type homeserver struct {
	k     *killable
	dest  matrix.ServerName
	acked int // transactions
	again int // times that one was sent again

	mu    sync.Mutex
	wake  sync.Cond
	life  int  // of the bus
	quota int  // of new transactions in this life
	last  bool // no new ones after this life
}

func newHomeserver(k *killable, dest matrix.ServerName) *homeserver {
	h := &homeserver{k: k, dest: dest}
	h.wake.L = &h.mu
	return h
}

// alive: a bus has come up.
func (h *homeserver) alive(quota int, last bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.life++
	h.quota, h.last = quota, last
	h.wake.Broadcast()
}

// next waits until a new transaction may be sent.
func (h *homeserver) next() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.quota == 0 && !h.last {
		h.wake.Wait()
	}
	h.quota--
	return !h.last
}

func (h *homeserver) lifeNow() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.life
}

// another waits for a bus that came up after life.
func (h *homeserver) another(life int) (found bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.life == life && !h.last {
		h.wake.Wait()
	}
	return h.life != life
}

func (h *homeserver) run() {
	for h.next() {
		req := letter(h.dest, h.acked)
		for {
			life := h.lifeNow()
			if h.k.accepted(req) {
				break
			}
			if !h.another(life) {
				h.k.t.Errorf("transaction %d to %s is not answered by a bus that lives", h.acked, h.dest)
				return
			}
			h.again++
		}
		h.acked++
	}
}

// The bus is killed again and again while homeservers' transactions come in and
// destinations are well, dead, slow or broken. In the end each event and message
// has arrived at its destination exactly once.
func TestNothingIsLostWhenTheBusIsKilledAgainAndAgain(t *testing.T) {
	rounds, seed := envNumber(t, crashRounds, 50), envNumber(t, crashSeed, int(time.Now().UnixNano()%1e9))
	t.Logf("%s=%d", crashSeed, seed)
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	const servers, quota = 6, 6
	w := federation(t, sim.Config{Servers: servers, SlowDelay: 30 * time.Millisecond, Remember: rounds * (quota + 1)})
	k := newKillable(t, w, withOutbox(t, unpaced))
	var all []*homeserver
	var running sync.WaitGroup
	for _, dest := range w.Names() {
		h := newHomeserver(k, dest)
		all = append(all, h)
		running.Go(h.run)
	}
	end := func() {
		for _, h := range all {
			h.alive(0, true)
		}
		running.Wait()
	}
	defer end()

	began, starts, self := time.Now(), 0, 0
	var start time.Duration // how long the last one took to come up
	kinds := []sim.Kind{sim.Well, sim.Well, sim.Dead, sim.Slow, sim.Cut, sim.Failing}
	for round := range rounds {
		for i := 1; i < servers; i++ { // the first one stays well
			if rng.IntN(4) == 0 {
				if err := w.SetKind(i, kinds[rng.IntN(len(kinds))]); err != nil {
					t.Fatal(err)
				}
			}
		}
		// It ends while it starts, at a step of its own (they come in bursts), or at
		// a moment of its work.
		steps, within, moment := 1<<30, time.Duration(0), max(100*time.Millisecond, start)
		switch way := rng.IntN(8); {
		case round == 0 || way >= 5:
			moment = time.Duration(rng.Int64N(int64(moment)))
		case way >= 1:
			steps = 1 + rng.IntN(300)
		default:
			within = 1 + time.Duration(rng.Int64N(int64(start)))
		}
		launched := time.Now()
		if k.run(fmt.Sprintf("any:%d", steps), within) {
			if within == 0 {
				start = time.Since(launched)
			} else {
				moment = 0
			}
			for _, h := range all {
				h.alive(quota, false)
			}
			select {
			case <-k.gone:
				self++
			case <-time.After(moment):
				k.child.Process.Kill()
			}
		} else {
			starts++
		}
		k.killed()
		quiet(t, w)
		if t.Failed() {
			return
		}
	}
	took := time.Since(began)

	for i := range w.Names() {
		if err := w.SetKind(i, sim.Well); err != nil {
			t.Fatal(err)
		}
	}
	k.start(hooks{})
	end()
	k.until("all to be delivered", func() bool {
		for _, dest := range w.Names() {
			k.node.loop.Post(event{Event: bus.Flush{Dest: dest}})
		}
		return k.report().Outbox.Destinations == 0
	})
	k.stop()
	sound(t, filepath.Join(k.dir, "data", "fsbus.db"))

	acked, again := 0, 0
	for i, h := range all {
		acked, again = acked+h.acked, again+h.again
		if got := w.Server(i); got.PDUs != int64(h.acked) || got.EDUs != int64(h.acked) {
			t.Errorf("server %d: %d transactions were acknowledged, %d events and %d messages have arrived", i, h.acked, got.PDUs, got.EDUs)
		}
	}
	st := w.Stats()
	if x := st.Transactions; x.Duplicates != 0 || x.Conflicts != 0 || x.Refused != 0 || x.MaxInFlightPerServer != 1 || st.Endpoints["send"].Outcomes["401"] != 0 {
		t.Errorf("the servers got %+v", x)
	}
	if acked < rounds || again == 0 || st.Transactions.Repeated == 0 {
		t.Errorf("too little has happened: %d transactions, %d sent again by the homeserver and %d by the bus", acked, again, st.Transactions.Repeated)
	}
	t.Logf("%d rounds in %v: killed %d times while it started, %d at a step; %d transactions, %d sent again by the homeserver, %d arrived in %d, of which %d again",
		rounds, took.Round(time.Millisecond), starts, self, acked, again, st.Transactions.PDUs, st.Transactions.Count, st.Transactions.Repeated)
}

func envNumber(t *testing.T, env string, def int) int {
	t.Helper()
	v := os.Getenv(env)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

// A full disk stops the outbox, and nothing else; when there is space again all
// goes on.
func TestAFullDiskIsSaidAndSurvived(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2, Shares: sim.Shares{sim.Dead: 0.5}})
	dead, well := w.NamesOf(sim.Dead)[0], w.NamesOf(sim.Well)[0]
	r := newRunning(t, w, withOutbox(t, unpaced))
	var full, atSettle atomic.Pointer[store.Op] // where there is no space, and will be none from the next Settle on
	r.start(hooks{
		effect: func(e bus.Effect, done bool) {
			if _, ok := e.(bus.Settle); ok && !done {
				if op := atSettle.Swap(nil); op != nil {
					full.Store(op)
				}
			}
		},
		fault: func(op store.Op) error {
			if at := full.Load(); at != nil && op == *at {
				return syscall.ENOSPC
			}
			return nil
		},
	})
	must := func(n int, dest matrix.ServerName) {
		t.Helper()
		if !r.accepted(letter(dest, n)) {
			t.Fatalf("no answer\n%s", r.log)
		}
	}
	arrived := func() int64 { return w.Server(indexOf(w, well)).PDUs }
	must(0, dead)
	r.until("the server to be found dead", func() bool { return r.report().Hosts.BackingOff == 1 })
	n := 0
	for i, op := range []store.Op{store.OpBegin, store.OpCommit} {
		atSettle.Store(&op)
		must(n, well)
		n++
		r.until("the disk to be full", func() bool { return full.Load() != nil && arrived() == int64(n) })
		r.until("/health to say so", func() bool {
			code, body := r.get("/health")
			return code == 503 && strings.Contains(body, "disk full")
		})
		req := letter(well, n)
		n++
		for range 2 {
			got := r.Do(t.Context(), req)
			var e struct{ Errcode, Error string }
			if err := json.Unmarshal(got.Body, &e); got.Status != 503 || err != nil || e.Errcode != matrix.MUnknown || e.Error == "" {
				t.Errorf("with a full disk (%s) a transaction is answered %d %s, %v", op, got.Status, got.Body, got.Err)
			}
		}
		// Everything that needs no disk goes on.
		if got := r.Do(t.Context(), fedload.Lookup(well, fmt.Sprint("u", i))); got.Status != 200 {
			t.Errorf("with a full disk (%s) a lookup is answered %d, %v", op, got.Status, got.Err)
		}
		if o := r.report().Outbox; o.Destinations != 2 || o.NotStored != int64(2*(i+1)) || arrived() != int64(n-1) {
			t.Errorf("with a full disk (%s) %d events have arrived, outbox: %+v", op, arrived(), o)
		}
		full.Store(nil)
		if got := r.Do(t.Context(), req); got.Status != 200 {
			t.Errorf("there is space again, a transaction is answered %d %s, %v", got.Status, got.Body, got.Err)
		}
		if code, body := r.get("/health"); code != 200 {
			t.Errorf("there is space again, /health: %d %s", code, body)
		}
		if i == 0 { // the other time it goes on by itself
			r.node.loop.Post(event{Event: bus.Flush{Dest: well}})
		}
		r.until("what waits to be delivered", func() bool { return arrived() == int64(n) && r.report().Outbox.Destinations == 1 })
	}
	// The end finds no space, either.
	op := store.OpCheckpoint
	full.Store(&op)
	r.stop()
	if log := r.log.String(); !strings.Contains(log, "not closed properly") || !strings.Contains(log, "disk full") {
		t.Errorf("the log does not tell\n%s", log)
	}
	if err := w.SetKind(indexOf(w, dead), sim.Well); err != nil {
		t.Fatal(err)
	}
	r.start(hooks{})
	r.until("what waits to be delivered", func() bool {
		r.node.loop.Post(event{Event: bus.Flush{Dest: dead}})
		return r.report().Outbox.Destinations == 0
	})
	r.stop()
	sound(t, filepath.Join(r.dir, "data", "fsbus.db"))
	if st := w.Stats().Transactions; st.PDUs != int64(n+1) || st.EDUs != int64(n+1) || st.Duplicates != 0 || st.Conflicts != 0 || st.MaxInFlightPerServer != 1 {
		t.Errorf("the servers got %+v", st)
	}
}

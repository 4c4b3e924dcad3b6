package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
	"fsbus/scripts/fedsim/sim"
	"fsbus/store"
)

// adminNow is the time in the tests of the queue.
var adminNow = sched.Time(time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC).UnixNano())

// adminTest is an admin's server over a real store, with a core that knows what
// the store holds.
type adminTest struct {
	t      *testing.T
	dir    string
	store  *store.Store
	server *adminServer
	socket string

	mu     sync.Mutex
	says   map[matrix.ServerName]bus.QueueStatus // what the core says beside the backlog
	hosts  map[matrix.ServerName]bus.HostStatus
	told   []bus.Adjusted
	tried  []matrix.ServerName
	cached []bus.QueueStatus          // what queues gives, if not what the store holds
	before func(store.OutboxOp) error // each operation
}

func newAdminTest(t *testing.T) *adminTest {
	t.Helper()
	dir, err := os.MkdirTemp("", "fsbus") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &adminTest{t: t, dir: dir, says: map[matrix.ServerName]bus.QueueStatus{}, hosts: map[matrix.ServerName]bus.HostStatus{}}
	if a.store, err = store.Open(t.Context(), store.Options{Path: filepath.Join(dir, "fsbus.db")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.store.Close(context.Background()) })
	a.socket = filepath.Join(dir, "admin.sock")
	ln, err := listenAdmin(&Config{Status: StatusConfig{Admin: "unix:" + a.socket}})
	if err != nil {
		t.Fatal(err)
	}
	a.server = newAdminServer(a, a.store, dir, func() sched.Time { return adminNow }, slog.New(slog.DiscardHandler))
	done := make(chan error)
	go func() { done <- a.server.http.Serve(ln) }()
	t.Cleanup(func() {
		a.server.close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
	return a
}

func (a *adminTest) status(d store.Destination) bus.QueueStatus {
	st := a.says[d.Name]
	st.Name, st.Backlog = d.Name, backlogOf(d)
	switch {
	case d.Held:
		st.State = "held"
	case st.State == "":
		st.State = "waiting"
	}
	return st
}

func (a *adminTest) queues(ctx context.Context, f func(bus.QueueStatus)) error {
	for _, st := range a.cached {
		f(st)
	}
	if a.cached != nil {
		return nil
	}
	return a.store.LoadOutbox(ctx, func(d store.Destination) error {
		a.mu.Lock()
		defer a.mu.Unlock()
		f(a.status(d))
		return nil
	})
}

func (a *adminTest) queue(ctx context.Context, dest matrix.ServerName) (st bus.QueueStatus, host bus.HostStatus, ok bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	host, ok = a.hosts[dest]
	err = a.store.LoadOutbox(ctx, func(d store.Destination) error {
		if d.Name == dest {
			st, ok = a.status(d), true
		}
		return nil
	})
	return st, host, ok, err
}

func (a *adminTest) adjusted(ev bus.Adjusted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.told = append(a.told, ev)
}

func (a *adminTest) flush(dest matrix.ServerName) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tried = append(a.tried, dest)
}

// flushed returns what the core was to try since the last call.
func (a *adminTest) flushed() []matrix.ServerName {
	a.mu.Lock()
	defer a.mu.Unlock()
	tried := a.tried
	a.tried = nil
	return tried
}

func (a *adminTest) apply(ctx context.Context, ops ...store.OutboxOp) error {
	for _, op := range ops {
		if a.before != nil {
			if err := a.before(op); err != nil {
				return err
			}
		}
	}
	return applyOps(ctx, a.store, a.adjusted, ops)
}

// heard returns what the core was told since the last call.
func (a *adminTest) heard() []bus.Adjusted {
	a.mu.Lock()
	defer a.mu.Unlock()
	told := a.told
	a.told = nil
	return told
}

// do runs operations on the store.
func (a *adminTest) do(ops ...store.OutboxOp) {
	a.t.Helper()
	if err := applyOps(a.t.Context(), a.store, func(bus.Adjusted) {}, ops); err != nil {
		a.t.Fatal(err)
	}
}

// accept puts items that are some minutes old into the queue.
func (a *adminTest) accept(dest matrix.ServerName, minutes int64, kind matrix.Kind, payloads ...string) {
	a.t.Helper()
	var items []matrix.Item
	for i, p := range payloads {
		it := matrix.Item{Kind: kind, Payload: []byte(p)}
		switch kind {
		case matrix.KindPDU:
			it.Key, it.Group, it.Depth = p, "!r", int64(i)
		case matrix.KindPresence:
			it.Key, it.Lifetime = p, 30*time.Minute
		}
		items = append(items, it)
	}
	a.do(&store.Accept{Destination: dest, Items: items, Accepted: adminNow.Stored() - minutes*60_000})
}

// pending returns the payloads that wait for a destination.
func (a *adminTest) pending(dest matrix.ServerName) (list []string) {
	a.t.Helper()
	if err := a.store.LoadItems(a.t.Context(), dest, func(it store.PendingItem) error {
		list = append(list, string(it.Payload))
		return nil
	}); err != nil {
		a.t.Fatal(err)
	}
	return list
}

// run runs "fsbus queue ARGS" and returns what it prints.
func (a *adminTest) run(args ...string) (out, errOut string, err error) {
	return a.answer("", false, args...)
}

// answer is run with somebody at the terminal.
func (a *adminTest) answer(in string, interactive bool, args ...string) (out, errOut string, err error) {
	var o, e bytes.Buffer
	term := Terminal{In: strings.NewReader(in), Out: &o, Err: &e, Interactive: interactive}
	command := Queue
	if len(args) > 0 && args[0] == "explain" {
		command, args = Explain, args[1:]
	}
	err = command(a.t.Context(), term, append(slices.Clone(args), "-address", "unix:"+a.socket))
	return o.String(), e.String(), err
}

// prints checks all that a command prints.
func (a *adminTest) prints(want string, args ...string) {
	a.t.Helper()
	out, errOut, err := a.run(args...)
	if err != nil || errOut != "" {
		a.t.Errorf("%v: %v, %s", args, err, errOut)
	}
	if strings.ReplaceAll(out, a.dir, "DIR") != want {
		a.t.Errorf("%v: got\n%swant\n%s", args, out, want)
	}
}

// fails checks that a command fails with a text, and not for wrong use.
func (a *adminTest) fails(want string, args ...string) {
	a.t.Helper()
	out, errOut, err := a.run(args...)
	if err == nil || errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), want) {
		a.t.Errorf("%v: %v, want %q; printed %s%s", args, err, want, out, errOut)
	}
}

func TestAdminSocketIsTheOwnersAlone(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := start(t, w, "")
	path := filepath.Join(r.dir, "data", "admin.sock")
	fi, err := os.Stat(path)
	if err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	var out, errOut bytes.Buffer
	term := Terminal{Out: &out, Err: &errOut}
	if err := Queue(t.Context(), term, []string{"-config", filepath.Join(r.dir, "fsbus.toml")}); err != nil || !strings.Contains(out.String(), "TOTAL") {
		t.Errorf("%v: %s%s", err, &out, &errOut)
	}
	err = Queue(t.Context(), term, []string{"show", "nobody.test", "-config", filepath.Join(r.dir, "fsbus.toml")})
	if err == nil || !strings.Contains(err.Error(), "nothing is known of nobody.test") {
		t.Errorf("an unknown destination: %v", err)
	}
	r.stop()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the end: %v", err)
	}
	err = Queue(t.Context(), term, []string{"--config", filepath.Join(r.dir, "fsbus.toml")})
	if err == nil || errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "no fsbus is running that answers at "+path) {
		t.Errorf("without a bus: %v", err)
	}
}

func TestAdminUmaskIsPutBack(t *testing.T) {
	before := umaskOf(t)
	ln, err := listenAdmin(&Config{Status: StatusConfig{Admin: "unix:" + filepath.Join(t.TempDir(), "a.sock")}})
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if after := umaskOf(t); after != before {
		t.Errorf("the umask was %#o and is %#o", before, after)
	}
	if ln, err := listenAdmin(&Config{}); ln != nil || err != nil {
		t.Errorf("without an address: %v, %v", ln, err)
	}
}

func umaskOf(t *testing.T) os.FileMode {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	var mask os.FileMode
	_, rest, _ := strings.Cut(string(status), "Umask:")
	if _, err := fmt.Sscanf(rest, "%o", &mask); err != nil {
		t.Fatal(err)
	}
	return mask
}

func TestAdminConnectionsAreFew(t *testing.T) {
	a := newAdminTest(t)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("unix", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		return c
	}
	answered := func(c net.Conn, within time.Duration) error {
		fmt.Fprint(c, "GET /queue/aside HTTP/1.1\r\nHost: fsbus\r\n\r\n")
		c.SetReadDeadline(time.Now().Add(within))
		_, err := c.Read(make([]byte, 1))
		return err
	}
	for i := range adminConns {
		if err := answered(dial(), 10*time.Second); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	last := dial()
	if err := answered(last, 100*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one connection more: %v", err)
	}
	conns[0].Close()
	last.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := last.Read(make([]byte, 1)); err != nil {
		t.Errorf("once another has ended: %v", err)
	}
}

func TestAdminRequestsGoOneAfterTheOther(t *testing.T) {
	a := newAdminTest(t)
	a.server.turn <- struct{}{} // one is under way
	ask := func() *httptest.ResponseRecorder {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		w := httptest.NewRecorder()
		a.server.http.Handler.ServeHTTP(w, httptest.NewRequest("GET", "/queue/aside", nil).WithContext(ctx))
		return w
	}
	if w := ask(); w.Code != 503 || !strings.Contains(w.Body.String(), "another command is under way") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	<-a.server.turn
	if w := ask(); w.Code != 200 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// Wrong parameters are the admin's mistake, and change nothing.
func TestAdminRefusesWrongParameters(t *testing.T) {
	a := newAdminTest(t)
	a.accept("a.test", 1, matrix.KindOther, `{}`)
	for _, tt := range []struct {
		method, target string
		code           int
	}{
		{"GET", "/queue?sort=size", 400},
		{"GET", "/queue?limit=-1", 400},
		{"GET", "/queue?limit=x", 400},
		{"GET", "/queue?filter=%5B*", 400},
		{"GET", "/queue/show", 400},
		{"GET", "/queue/show?destination=a..test", 400},
		{"GET", "/queue/show?destination=b.test", 404},
		{"POST", "/queue/flush?destination=b.test", 404},
		{"POST", "/queue/hold?destination=b.test", 404},
		{"POST", "/queue/drop?destination=b.test&what=all", 404},
		{"POST", "/queue/drop?destination=a.test", 400},
		{"POST", "/queue/drop?destination=a.test&what=pdus", 400},
		{"POST", "/queue/drop?destination=a.test&what=all&through=0", 400},
		{"POST", "/queue/forget", 400},
		{"POST", "/queue/forget?through=-1", 400},
		{"POST", "/queue/retry", 400},
		{"POST", "/queue/retry?id=0", 400},
		{"POST", "/queue/retry?id=1", 404},
		{"POST", "/queue/retry?destination=b.test", 404},
		{"POST", "/queue/retry?all=true", 200},
		{"GET", "/queue/hold?destination=a.test", 405},
		{"GET", "/status", 404},
	} {
		w := httptest.NewRecorder()
		a.server.http.Handler.ServeHTTP(w, httptest.NewRequest(tt.method, tt.target, nil))
		if w.Code != tt.code {
			t.Errorf("%s %s: %d %s, want %d", tt.method, tt.target, w.Code, w.Body, tt.code)
		}
	}
	if n := len(a.pending("a.test")); n != 1 || len(a.heard()) > 0 {
		t.Errorf("%d items are left of 1", n)
	}
}

func TestQueueUsage(t *testing.T) {
	dir := t.TempDir()
	off := filepath.Join(dir, "off.toml")
	if err := os.WriteFile(off, []byte(minimal+"[status]\nadmin = \"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		says string
	}{
		{"nonsense", `unknown command "fsbus queue nonsense"`},
		{"-config x show", `unexpected argument "show"`},
		{"-sort size", "-sort is name, total, oldest or bytes"},
		{"-n -1", "-n is -1"},
		{"-filter [*", `-filter "[*"`},
		{"-nonsense", "flag provided but not defined: -nonsense"},
		{"show", "one destination is wanted, not 0"},
		{"show a b", "one destination is wanted, not 2"},
		{"flush", "one destination or -all is wanted"},
		{"flush -all a", "not both"},
		{"hold", "one destination is wanted"},
		{"release a b", "one destination is wanted"},
		{"drop a", "either -edus or -all is wanted"},
		{"drop a -edus -all", "either -edus or -all is wanted"},
		{"drop a -all", "-yes is wanted"},
		{"drop -edus -yes", "one destination is wanted"},
		{"aside x", `unexpected argument "x"`},
		{"aside -forget -1", "-forget is -1"},
		{"aside -forget 1 -retry all", "-retry and -forget do not go together"},
		{"show a -address 127.0.0.1:8011", `-address is "127.0.0.1:8011"`},
		{"show a -config /no/such/file", "/no/such/file: no such file or directory"},
		{"show a -config " + off, `has status.admin = ""`},
	} {
		var out, errOut bytes.Buffer
		err := Queue(t.Context(), Terminal{In: strings.NewReader("y\n"), Out: &out, Err: &errOut}, strings.Fields(tt.args))
		if !errors.Is(err, ErrUsage) || !strings.Contains(errOut.String(), tt.says) || out.Len() > 0 {
			t.Errorf("%s: %v, %s%s, want %q", tt.args, err, &out, &errOut, tt.says)
		}
	}
	for _, args := range []string{"-h", "--help", "show -h", "flush -h", "hold -h", "release -h", "drop -h", "aside -h"} {
		var out, errOut bytes.Buffer
		err := Queue(t.Context(), Terminal{Out: &out, Err: &errOut}, strings.Fields(args))
		if err == nil || errors.Is(err, ErrUsage) || strings.Count(errOut.String(), "usage: ") != 1 || !strings.Contains(errOut.String(), "-config") {
			t.Errorf("%s: %v, %s", args, err, &errOut)
		}
	}
	if err := Explain(t.Context(), Terminal{Out: io.Discard, Err: io.Discard}, nil); !errors.Is(err, ErrUsage) {
		t.Errorf("explain of nothing: %v", err)
	}
}

// A text that another server has made up does not reach the terminal as it is.
func TestQueueTextsArePrintable(t *testing.T) {
	a := newAdminTest(t)
	a.accept("a.test", 1, matrix.KindOther, `{}`)
	a.says["a.test"] = bus.QueueStatus{State: "backing off", Why: "x\x1b[2J", LastError: "y\x1b]0;z\a\u202e", Failures: 1}
	for _, args := range [][]string{{"show", "a.test"}, {"explain", "a.test"}} {
		out, _, err := a.run(args...)
		if err != nil || strings.ContainsAny(out, "\x1b\a\u202e") || !strings.Contains(out, "x [2J") {
			t.Errorf("%v: %q, %v", args, out, err)
		}
	}
}

// get asks the server itself.
func (a *adminTest) get(path string, q url.Values) *http.Response {
	a.t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", a.socket)
	}}}
	resp, err := c.Get("http://fsbus" + path + "?" + q.Encode())
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { resp.Body.Close() })
	return resp
}

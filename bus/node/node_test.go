package node

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// childConfig makes the test binary an fsbus that runs with the configuration
// named there, so that a test can kill it.
const childConfig = "FSBUS_TEST_CHILD_CONFIG"

func TestMain(m *testing.M) {
	if path := os.Getenv(childConfig); path != "" {
		os.Exit(child(path))
	}
	code := m.Run()
	if n := sched.Panics(); n > 0 && code == 0 {
		fmt.Println(n, "workers panicked")
		code = 1
	}
	os.Exit(code)
}

func child(path string) int {
	cfg, err := Load(path)
	if err != nil {
		fmt.Println(err)
		return 2
	}
	var level slog.LevelVar
	n, err := assemble(context.Background(), cfg, "test", NewLogger(os.Stderr, cfg, &level), &level, crashHooks(os.Getenv(childCrash)))
	if err == nil {
		err = n.Run(context.Background(), nil, nil)
	}
	fmt.Println(err)
	return 1
}

var us = func() fedload.Homeserver {
	key, err := matrix.NewSigningKey(bytes.Repeat([]byte{7}, 32), "test")
	if err != nil {
		panic(err)
	}
	return fedload.Homeserver{Name: "us.test", Key: key}
}()

const secret = "a secret for the tests"

// federation starts simulated servers that verify our signature.
func federation(t *testing.T, c sim.Config) *sim.World {
	t.Helper()
	c.Origins = []sim.Origin{{Name: us.Name, KeyID: us.Key.ID(), PublicKey: us.Key.Public()}}
	w, err := sim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	w.Start()
	t.Cleanup(func() { w.Close() })
	return w
}

// config is what differs between the configurations of tests.
type config struct {
	outbound, outbox, edge string // lines of these sections
	key                    string // homeserver.signing_key_path
}

// setUp writes a configuration into dir and returns its path.
func setUp(t *testing.T, dir string, w *sim.World, c config) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), w.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "fsbus.toml")
	text := fmt.Sprintf(`
data_dir = "data"
memory_limit = "128MiB"
drain_timeout = "5s"
log_level = "debug"
[homeserver]
server_name = %q
signing_key_path = %q
[front]
listen = ["unix:front.sock"]
secret = %q
[outbound]
%s
[outbox]
%s
[edge]
%s
[federation]
ca_file = "ca.pem"
ip_range_allowlist = ["127.1.0.0/16"]
[status]
listen = "unix:status.sock"
`, us.Name, c.key, secret, c.outbound, c.outbox, c.edge)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// running is a bus in this process.
type running struct {
	*fedload.Client
	t      *testing.T
	node   *Node
	dir    string
	path   string // of its configuration
	hup    chan os.Signal
	stop   func() // ends it and waits
	log    *logBuffer
	status *http.Client
	notice *net.UnixConn
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t *testing.T, w *sim.World, outbound string) *running {
	t.Helper()
	return startWith(t, w, config{outbound: outbound})
}

func startWith(t *testing.T, w *sim.World, c config) *running {
	t.Helper()
	r := newRunning(t, w, c)
	r.start(hooks{})
	return r
}

// newRunning sets everything up for a bus that does not run yet.
func newRunning(t *testing.T, w *sim.World, c config) *running {
	t.Helper()
	dir := t.TempDir()
	r := &running{t: t, dir: dir, path: setUp(t, dir, w, c), log: &logBuffer{}, notice: notifySocket(t, dir)}
	r.Client = fedload.NewHook("unix:"+filepath.Join(dir, "front.sock"), secret, us)
	t.Cleanup(r.Client.Close)
	r.status = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "status.sock"))
	}}}
	return r
}

// start runs the bus in this process, with what is in its directory.
func (r *running) start(h hooks) {
	t := r.t
	t.Helper()
	cfg, err := Load(r.path)
	if err != nil {
		t.Fatal(err)
	}
	var level slog.LevelVar
	if r.node, err = assemble(t.Context(), cfg, "test", NewLogger(r.log, cfg, &level), &level, h); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(r.dir, "notify.sock")) // a bus takes it out of its environment
	r.hup = make(chan os.Signal)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- r.node.Run(ctx, r.hup, func() (*Config, error) { return Load(r.path) })
	}()
	r.await("READY=1")
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
}

// notifySocket stands in for systemd, which is told when the bus is ready.
func notifySocket(t *testing.T, dir string) *net.UnixConn {
	t.Helper()
	path := filepath.Join(dir, "notify.sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

func (r *running) await(state string) {
	r.t.Helper()
	buf := make([]byte, 4096)
	r.notice.SetReadDeadline(time.Now().Add(20 * time.Second))
	for {
		n, err := r.notice.Read(buf)
		if err != nil {
			r.t.Fatalf("waiting for %s: %v\n%s", state, err, r.log)
		}
		if strings.Contains(string(buf[:n]), state) {
			return
		}
	}
}

func (r *running) get(path string) (int, string) {
	r.t.Helper()
	resp, err := r.status.Get("http://fsbus" + path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func (r *running) report() *Report {
	r.t.Helper()
	code, body := r.get("/status")
	var rep Report
	if err := json.Unmarshal([]byte(body), &rep); code != 200 || err != nil {
		r.t.Fatalf("/status: %d, %v: %s", code, err, body)
	}
	return &rep
}

func TestAnswersAreThoseOfTheRemote(t *testing.T) {
	w := federation(t, sim.Config{Servers: 4})
	r := start(t, w, "")
	direct := fedload.NewDirect(pool(t, w), us)
	defer direct.Close()
	for _, req := range []*fedload.Request{
		fedload.Lookup(w.Names()[0], "alice"),
		{Destination: w.Names()[1], Method: "GET", Target: "/_matrix/federation/v1/version"},
		{Destination: w.Names()[1], Method: "GET", Target: "/_matrix/key/v2/server"},
		{Destination: w.Names()[2], Method: "GET", Target: "/_matrix/federation/v1/query/directory?room_alias=%23a%2Fb+c%21"},
		{Destination: w.Names()[2], Method: "GET", Target: "/_matrix/no/such//endpoint?x=%2F"},
		fedload.Send(us.Name, w.Names()[3], "t1", time.Now(), nil, []json.RawMessage{us.Typing("alice", "!r:us.test", true)}),
	} {
		want, got := direct.Do(t.Context(), req), r.Do(t.Context(), req)
		if got.Err != nil || got.Status != want.Status || got.Size != want.Size {
			t.Errorf("%s %s: %d, %d bytes, %v; direct %d, %d bytes, %v", req.Method, req.Target, got.Status, got.Size, got.Err, want.Status, want.Size, want.Err)
		}
	}
}

func TestWrongSecretIsRefusedAndNothingIsSent(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := start(t, w, "")
	bad := fedload.NewHook("unix:"+filepath.Join(r.dir, "front.sock"), "wrong", us)
	defer bad.Close()
	if got := bad.Do(t.Context(), fedload.Lookup(w.Names()[0], "alice")); got.Status != 407 {
		t.Errorf("a wrong secret is answered %d, %v", got.Status, got.Err)
	}
	if text := "a request is refused, as it has not the secret"; !strings.Contains(r.log.String(), text) {
		t.Errorf("the log lacks %q", text)
	}
	if code, body := r.get("/health"); code != 200 || body != "ok\nthe homeserver has not connected with the right secret since the start\n" {
		t.Errorf("/health: %d %q", code, body) // it has not been so for a minute
	}
	if _, metrics := r.get("/metrics"); !strings.Contains(metrics, "fsbus_wrong_secret_total 1\n") {
		t.Error("it is not counted")
	}
	if n := w.Stats().Connections.Accepted; n != 0 {
		t.Errorf("the remote has seen %d connections", n)
	}
	if strings.Contains(r.log.String(), secret) {
		t.Error("the secret is in the log")
	}
}

func TestEqualLookupsReachTheRemoteOnce(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1, Latency: 200 * time.Millisecond})
	r := start(t, w, "")
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			if got := r.Do(t.Context(), fedload.Lookup(w.Names()[0], "alice")); got.Status != 200 {
				t.Errorf("answered %d, %v", got.Status, got.Err)
			}
		})
	}
	wg.Wait()
	var seen int64
	for _, e := range w.Stats().Endpoints {
		seen += e.Count
	}
	if seen != 1 {
		t.Errorf("the remote has seen %d requests", seen)
	}
	q := r.report().Requests
	if q.Shared+q.CacheHits != 29 {
		t.Errorf("shared %d, from the cache %d, want 29 together", q.Shared, q.CacheHits)
	}
}

func TestDeadHostIsAnsweredFastWithTheReason(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2, Shares: sim.Shares{sim.Dead: 0.5}})
	r := start(t, w, "")
	dead := w.NamesOf(sim.Dead)[0]
	for i := range 3 {
		status, body := ask(t, r, dead, fmt.Sprint("u", i))
		var e struct{ Errcode, Error string }
		if err := json.Unmarshal([]byte(body), &e); status != 502 || err != nil || e.Errcode != "M_UNKNOWN" || !strings.Contains(e.Error, "connection refused") {
			t.Errorf("answered %d %s, %v", status, body, err)
		}
	}
	rep := r.report()
	if rep.Remotes.Attempts != 1 || rep.Requests.FailedFast != 2 {
		t.Errorf("%d attempts, %d failed fast; want 1 and 2", rep.Remotes.Attempts, rep.Requests.FailedFast)
	}
	if len(rep.Hosts.Worst) != 1 || rep.Hosts.Worst[0].Name != string(dead) || rep.Hosts.Worst[0].NextTryIn <= 0 {
		t.Errorf("worst off: %+v", rep.Hosts.Worst)
	}
	if !strings.Contains(r.log.String(), "destination fails") {
		t.Error("the log does not tell")
	}
}

// ask makes one lookup by hand and returns the whole answer.
func ask(t *testing.T, r *running, dest matrix.ServerName, user string) (int, string) {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(r.dir, "front.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET matrix-federation://%s/_matrix/federation/v1/query/profile?user_id=%s HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: Bearer %s\r\nConnection: close\r\n\r\n", dest, user, dest, secret)
	answer, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	head, body, _ := strings.Cut(string(answer), "\r\n\r\n")
	var status int
	if _, err := fmt.Sscanf(head, "HTTP/1.1 %d", &status); err != nil {
		t.Fatalf("answer %q: %v", head, err)
	}
	return status, body
}

func TestLargeBodyGoesThroughTheSpoolWhole(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := start(t, w, "")
	const size = 30 << 20
	var wg sync.WaitGroup
	for range 3 { // they share one download
		wg.Go(func() {
			got := r.Do(t.Context(), fedload.Media(w.Names()[0], size))
			if got.Err != nil || got.Status != 200 || got.Size < size {
				t.Errorf("%d, %d bytes, %v", got.Status, got.Size, got.Err)
			}
		})
	}
	wg.Wait()
	budget := func(name string) BudgetUse {
		all := r.report().Budgets
		return all[slices.IndexFunc(all, func(b BudgetUse) bool { return b.Name == name })]
	}
	for budget("bodies on disk").Used > 0 { // the last reply lets go right after its end
		runtime.Gosched()
	}
	if b := budget("bodies on disk"); b.Max < size || b.Max >= 2*size {
		t.Errorf("%d bytes were on disk", b.Max)
	}
	if b := budget("bodies in memory"); b.Max > b.Allowed {
		t.Errorf("%d bytes were in memory", b.Max)
	}
}

func TestCutAnswerIsNeverAWholeOne(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1, Shares: sim.Shares{sim.Cut: 1}})
	if k := w.Kind(0); k != sim.Cut {
		if err := w.SetKind(0, sim.Cut); err != nil {
			t.Fatal(err)
		}
	}
	r := start(t, w, "")
	for i := range 3 {
		got := r.Do(t.Context(), fedload.Lookup(w.Names()[0], fmt.Sprint("u", i)))
		if got.Err == nil && got.Status == 200 {
			t.Errorf("a cut answer came as %d with %d bytes", got.Status, got.Size)
		}
	}
}

func TestStatusPage(t *testing.T) {
	w := federation(t, sim.Config{Servers: 3, Shares: sim.Shares{sim.Dead: 0.34}})
	r := start(t, w, "")
	for i, name := range w.Names() {
		r.Do(t.Context(), fedload.Lookup(name, fmt.Sprint("u", i)))
	}
	if code, body := r.get("/health"); code != 200 || !strings.HasPrefix(body, "ok\nthe homeserver was last seen ") {
		t.Errorf("/health: %d %q", code, body)
	}
	_, metrics := r.get("/metrics")
	checkExposition(t, metrics)
	for _, want := range []string{`fsbus_requests_total{class="lookup"} 3`, `fsbus_hosts{rank="failing"} 1`, `fsbus_attempt_ends_total{end="refused"} 1`, `fsbus_endpoint_requests_total{endpoint="query_profile"} 3`, "fsbus_healthy 1"} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	code, page := r.get("/")
	if code != 200 || !strings.Contains(page, "us.test") || !strings.Contains(page, string(w.NamesOf(sim.Dead)[0])) {
		t.Errorf("/: %d, %d bytes", code, len(page))
	}
	if m := regexp.MustCompile(`(?i)<script|src=|url\(|https?://`).FindString(page); m != "" {
		t.Errorf("the page needs something from elsewhere: %s", m)
	}
	if code, _ := r.get("/nothing"); code != 404 {
		t.Errorf("/nothing: %d", code)
	}
	var table bytes.Buffer
	if err := PrintStatus(t.Context(), &table, "unix:"+filepath.Join(r.dir, "status.sock"), false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"fsbus test for us.test", "WORST OFF", "connection refused", "lookup"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("fsbus status lacks %q:\n%s", want, table.String())
		}
	}
}

func TestStatusOfNobodySaysSo(t *testing.T) {
	err := PrintStatus(t.Context(), io.Discard, "unix:"+filepath.Join(t.TempDir(), "none.sock"), false)
	if err == nil || !strings.Contains(err.Error(), "no fsbus answers at") {
		t.Errorf("%v", err)
	}
}

// checkExposition checks the rules of the text format that a scraper insists on.
func checkExposition(t *testing.T, text string) {
	t.Helper()
	typed := map[string]bool{}
	sample := regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="(?:[^"\\\n]|\\.)*"(?:,[a-z_]+="(?:[^"\\\n]|\\.)*")*\})? -?[0-9.e+-]+$`)
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if f := strings.Fields(line); strings.HasPrefix(line, "# TYPE ") {
			if typed[f[2]] || !slices.Contains([]string{"counter", "gauge"}, f[3]) {
				t.Errorf("bad or second type: %s", line)
			}
			if (f[3] == "counter") != strings.HasSuffix(f[2], "_total") {
				t.Errorf("the name does not fit the type: %s", line)
			}
			typed[f[2]] = true
			continue
		} else if strings.HasPrefix(line, "# HELP ") && len(f) > 3 {
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil || !typed[m[1]] || seen[m[1]+m[2]] {
			t.Errorf("bad, untyped or second sample: %s", line)
			continue
		}
		seen[m[1]+m[2]] = true
	}
	if len(seen) < 50 {
		t.Errorf("only %d samples", len(seen))
	}
}

func TestReloadAppliesWhatItCanAndNamesTheRest(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1})
	r := start(t, w, "host_rate = 10.0\nworkers = 100")
	path := filepath.Join(r.dir, "fsbus.toml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		r.hup <- os.Interrupt // any signal: main sends only SIGHUP here
		r.await("READY=1")
	}
	change(strings.NewReplacer("host_rate = 10.0", "host_rate = 33.0", "workers = 100", "workers = 101").Replace(string(text)))
	rep := r.report()
	if rep.RateLimits.HostRate != 33 {
		t.Errorf("host_rate is %v after the reload", rep.RateLimits.HostRate)
	}
	if log := r.log.String(); !strings.Contains(log, "changed=[outbound.host_rate]") || !strings.Contains(log, "need_restart=[outbound.workers]") {
		t.Errorf("the log says %s", log)
	}
	change("nonsense")
	if !strings.Contains(r.log.String(), "the old one stays in force") || r.report().RateLimits.HostRate != 33 {
		t.Errorf("after a mistake: %s", r.log)
	}
}

func TestStopLetsRunningRequestsEnd(t *testing.T) {
	w := federation(t, sim.Config{Servers: 1, Latency: 500 * time.Millisecond})
	r := start(t, w, "")
	got := make(chan fedload.Result)
	go func() { got <- r.Do(context.Background(), fedload.Lookup(w.Names()[0], "alice")) }()
	for r.report().Remotes.Connects == 0 { // until it is under way
		runtime.Gosched()
	}
	r.stop()
	if res := <-got; res.Status != 200 || res.Err != nil {
		t.Errorf("the request under way ended with %d, %v", res.Status, res.Err)
	}
	if _, err := net.Dial("unix", filepath.Join(r.dir, "front.sock")); err == nil {
		t.Error("it still listens")
	}
}

// What does not end in time loses its connection; that there is more in the queue
// than workers does no harm.
func TestStopDropsWhatDoesNotEnd(t *testing.T) {
	w := federation(t, sim.Config{Servers: 40, Shares: sim.Shares{sim.Hanging: 1}})
	r := start(t, w, "workers = 8\nunknown_hosts = 8\nfailing_hosts = 8\nconnect_timeout = \"1m\"\ntls_timeout = \"1m\"")
	r.node.cfg.Load().DrainTimeout = Duration(time.Millisecond)
	ctx, gone := context.WithCancel(t.Context())
	var ended sync.WaitGroup
	for _, dest := range w.Names() {
		ended.Go(func() {
			if res := r.Do(ctx, fedload.Lookup(dest, "alice")); res.Status == 200 {
				t.Errorf("%s has answered", dest)
			}
		})
	}
	r.until("all to wait", func() bool {
		rep := r.report()
		return rep.Budgets[3].Used == 40 && rep.Remotes.Attempts >= 6
	})
	r.stop()
	gone() // as when the process ends
	ended.Wait()
}

// A restart after kill -9 must not begin to hammer hosts that were dead.
func TestBackOffSurvivesKill(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2, Shares: sim.Shares{sim.Dead: 0.5}})
	dead := w.NamesOf(sim.Dead)[0]
	k := newKillable(t, w, config{})
	k.run("", 0)
	if status, body := ask(t, k.running, dead, "u1"); status != 502 {
		t.Errorf("answered %d %s", status, body)
	}
	for k.report().Store.Commits == 0 { // until the failure is on disk
		runtime.Gosched()
	}
	k.kill()
	k.run("", 0)
	status, body := ask(t, k.running, dead, "u2")
	if rep := k.report(); status != 502 || !strings.Contains(body, "next try in") || rep.Remotes.Attempts != 0 {
		t.Errorf("after the restart: %d %s, %d attempts", status, body, rep.Remotes.Attempts)
	}
}

// At saturation the process keeps to its budget of goroutines and connections.
func TestBudgetsHoldUnderAFlood(t *testing.T) {
	w := federation(t, sim.Config{Servers: 60, Latency: 20 * time.Millisecond, Shares: sim.Shares{sim.Dead: 0.2, sim.Hanging: 0.2}})
	r := start(t, w, "workers = 16\nunknown_hosts = 8\nfailing_hosts = 4\nidle_connections = 8\ntls_timeout = \"1s\"\nhandshakes_per_second = 200.0")
	before := runtime.NumGoroutine() // the simulation's among them
	budget := r.node.cfg.Load().Budget()
	stop := make(chan struct{})
	var most int
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				rep := r.report()
				for _, b := range rep.Budgets {
					if b.Unit == "count" && b.Name != "goroutines" && b.Name != "file descriptors" && max(b.Used, b.Max) > b.Allowed {
						t.Errorf("%s: %d, at most %d, %d are allowed", b.Name, b.Used, b.Max, b.Allowed)
					}
					if b.Name == "goroutines" {
						most = max(most, int(b.Used))
					}
				}
			}
		}
	})
	rep := r.Run(t.Context(), 200, func(yield func(*fedload.Request) bool) {
		for i := range 1500 {
			if !yield(fedload.Lookup(w.Names()[i%60], fmt.Sprint("u", i))) {
				return
			}
		}
	}, nil)
	close(stop)
	watch.Wait()
	if rep.Statuses[200] == 0 || rep.Statuses[0] != 0 {
		t.Errorf("%s", rep)
	}
	// Each of the 200 clients and of the remotes' connections has its own
	// goroutines in this process: three and two are generous.
	if limit := before + budget.Goroutines + 3*200 + 2*(16+8); most > limit {
		t.Errorf("%d goroutines, %d are allowed", most, limit)
	}
	t.Logf("%s; at most %d goroutines, budget %d", rep, most, budget.Goroutines)
}

func pool(t *testing.T, w *sim.World) *x509.CertPool {
	t.Helper()
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(w.CAPEM()) {
		t.Fatal("no certificate")
	}
	return p
}

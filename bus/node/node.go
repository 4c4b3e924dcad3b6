package node

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
	"fsbus/store"
)

// Pool sizes that no configuration changes.
const (
	// smallRepliers write refusals and small answers, which the socket takes
	// at once; two would do, more hide a hiccup.
	smallRepliers = 16
	// largeRepliers stream what may be large, and wait for slow readers.
	largeRepliers = 32
	// smallReply is what counts as small: it fits the socket's buffer.
	smallReply = 64 << 10
	// storeReaders read the store for requests: one would do, if there were no
	// large queries for keys.
	storeReaders = 2
	// eventQueue is how many events wait for the loop before those who post
	// them do.
	eventQueue = 1024
)

// Node is one running bus.
type Node struct {
	cfg       atomic.Pointer[Config]
	log       *slog.Logger
	level     *slog.LevelVar
	version   string
	userAgent string // what fsbus calls itself, as a Synapse does with its version, and for whom
	started   time.Time

	clock  *sched.Clock
	core   *bus.Machine
	loop   *sched.Loop[event, effect]
	store  *store.Store
	spool  *netx.Spool
	client *netx.Client
	front  *netx.Front
	notify *netx.Notifier

	senders  *sched.Pool[job]
	small    *sched.Pool[answer]
	large    *sched.Pool[answer]
	readers  *sched.Pool[readJob]
	scanners *sched.Pool[*scan]

	// Of the loop's goroutine.
	requests   map[bus.ReqID]*held
	attempts   map[bus.OpID]*attempt
	packs      map[bus.BatchID]*packed
	deliveries map[bus.OpID]*delivery
	errands    map[bus.OpID]*errand

	bulk      bulk
	handover  *handover
	takeover  *takeover  // nil: there is no outbox
	notary    *notary    // nil: the bus is none
	edge      *edgeShell // nil: other servers do not connect to the bus
	keyCounts keyCounts
	scanned   scanCounts
	replies   replyCounts
	endpoints endpointCounts
	notable   *notes
	page      *http.Server // of the status; nil: there is none
	parts     parts
	asides    asides
	restored  chan struct{} // closed when the core knows what the store had
	drained   chan struct{}
	draining  atomic.Bool
	trouble   trouble

	pressureFile string // of the goroutine that attends

	hooks hooks
}

// hooks let tests look on and interfere. A bus at work has none.
type hooks struct {
	// event is called before the core gets an event, effect before and after an
	// effect is executed; both on the loop's goroutine.
	event     func(bus.Event)
	edgeEvent func(edge.Event)
	effect    func(e bus.Effect, done bool)
	fault     func(store.Op) error // see store.Options
}

// job is what a sender does.
type job interface {
	run(*Node)
	crashed(*Node, error)
}

// event is what enters the loop: an event of one core, or of both, with another one
// that follows at once if then is set, and what the cores never see: for an Arrived,
// a KeyQuery and an Offered the request itself, for a Packed the transaction, for a
// Loaded the answer, and that a signature cannot be checked without a key.
type event struct {
	bus.Event
	then   bus.Event
	in     *netx.Inbound
	txn    string // of a bus.Offered, its name for the store
	packed *packed
	loaded *attempt

	edge, edgeThen edge.Event
	caller         *caller
	wants          *keyWish
}

// effect is what one of the cores wants done, or that a request is gone: what was
// wanted before that is done before that. A Replay comes with the request whose Look
// it is about, which may be over by then.
type effect struct {
	bus.Effect
	gone   bus.ReqID
	edge   edge.Effect
	left   edge.ReqID
	looked *caller
}

// wall returns the time by the system's clock, in Unix ms. Keys are valid by that. The
// bus's own time does not follow when the clock is set, as on a board that has none of
// its own and has just reached a time server.
func (n *Node) wall() matrix.Timestamp { return matrix.At(time.Now()) }

// machine lets the loop run both cores while the node keeps its own books of
// what has arrived and left.
type machine struct {
	n    *Node
	out  []bus.Effect // of one step
	edge []edge.Effect
}

func (m *machine) Step(now sched.Time, ev event, out []effect) []effect {
	if ev.wants != nil {
		ev.Event = m.n.edge.wish(ev.wants)
	}
	if ev.Event != nil {
		out = m.outbound(now, ev, out)
	}
	if ev.edge != nil && m.n.edge != nil {
		out = m.inbound(now, ev, out)
	}
	return out
}

func (m *machine) inbound(now sched.Time, ev event, out []effect) []effect {
	s := m.n.edge
	if e, ok := ev.edge.(edge.Arrived); ok {
		s.requests[e.Req] = ev.caller
	}
	m.edge = s.step(now, ev.edge, m.edge[:0])
	if ev.edgeThen != nil {
		m.edge = s.step(now, ev.edgeThen, m.edge)
	}
	for _, e := range m.edge {
		out = append(out, effect{edge: e, looked: ev.caller})
	}
	if e, ok := ev.edge.(edge.Gone); ok {
		out = append(out, effect{left: e.Req})
	}
	clear(m.edge)
	return out
}

func (m *machine) outbound(now sched.Time, ev event, out []effect) []effect {
	switch e := ev.Event.(type) {
	case bus.Arrived:
		m.n.requests[e.Req] = &held{in: ev.in}
	case bus.Offered:
		m.n.requests[e.Req] = &held{in: ev.in, txn: ev.txn}
	case bus.KeyQuery:
		m.n.requests[e.Req] = &held{in: ev.in}
	case bus.Loaded:
		if ev.loaded != nil {
			m.n.attempts[e.Op] = ev.loaded
		}
	case bus.Packed:
		if ev.packed != nil {
			m.n.packs[e.Batch] = ev.packed
		}
	}
	m.out = m.step(now, ev.Event, m.out[:0])
	if ev.then != nil {
		m.out = m.step(now, ev.then, m.out)
	}
	for _, e := range m.out {
		out = append(out, effect{Effect: e})
	}
	switch e := ev.Event.(type) {
	case bus.Gone:
		out = append(out, effect{gone: e.Req})
	case bus.Restored:
		close(m.n.restored)
	}
	clear(m.out)
	return out
}

func (m *machine) step(now sched.Time, ev bus.Event, out []bus.Effect) []bus.Effect {
	if look := m.n.hooks.event; look != nil {
		look(ev)
	}
	return m.n.core.Step(now, ev, out)
}

func (m *machine) NextWake() (sched.Time, bool) {
	at, ok := m.n.core.NextWake()
	if m.n.edge != nil {
		if in, any := m.n.edge.core.NextWake(); any && (!ok || in < at) {
			return in, true
		}
	}
	return at, ok
}

// tick is what the loop does when a moment that NextWake named has come.
var tick = event{Event: bus.Tick{}, edge: edge.Tick{}}

// New assembles a bus from a valid configuration. It opens the store and the
// spool but serves nothing yet.
func New(ctx context.Context, cfg *Config, version string, log *slog.Logger, level *slog.LevelVar) (*Node, error) {
	return assemble(ctx, cfg, version, log, level, hooks{})
}

func assemble(ctx context.Context, cfg *Config, version string, log *slog.Logger, level *slog.LevelVar, h hooks) (_ *Node, err error) {
	n := &Node{
		log: log, level: level, version: version, userAgent: fmt.Sprintf("fsbus/%s (%s)", version, cfg.Homeserver.ServerName), started: time.Now(), hooks: h,
		clock:      sched.NewClock(),
		requests:   make(map[bus.ReqID]*held),
		attempts:   make(map[bus.OpID]*attempt),
		packs:      make(map[bus.BatchID]*packed),
		deliveries: make(map[bus.OpID]*delivery),
		errands:    make(map[bus.OpID]*errand),
		restored:   make(chan struct{}),
		drained:    make(chan struct{}),
		notable:    newNotes(log),
	}
	n.cfg.Store(cfg)
	n.takeover = newTakeover(cfg, &n.bulk)
	defer func() {
		if err != nil && n.store != nil {
			n.store.Close(ctx)
		}
	}()
	n.store, err = store.Open(ctx, store.Options{
		Reserve: true,
		Path:    filepath.Join(cfg.DataDir, "fsbus.db"), ServerName: cfg.Homeserver.ServerName, Logger: log, Fault: h.fault,
		// A batch for each request and each queue, and for each worker, at
		// worst. What waits is small: transactions lie in the spool.
		QueueLen:   int(cfg.Front.MaxConnections) + int(cfg.Outbound.MaxHosts) + int(cfg.Outbound.Workers) + 16,
		QueueBytes: int64(cfg.Outbound.SpoolMemory) + int64(cfg.Outbound.SpoolDisk),
		MaxHosts:   2 * int(cfg.Outbound.MaxHosts),
		Linger:     commitEach,

		MaxDestinations: cfg.Outbox.MaxDestinations, MaxDestItems: cfg.Outbox.MaxDestinationItems, MaxDestBytes: int64(cfg.Outbox.MaxDestinationBytes),
		MaxItems: cfg.Outbox.MaxItems, MaxFileBytes: int64(cfg.Outbox.MaxDisk),

		// To the store, 0 is its default.
		MaxAnswers: max(1, cfg.Outbound.CacheEntries), MaxAnswerBytes: max(1, int64(cfg.Outbound.CacheDisk)),
		MaxKeys: cfg.Keys.CacheEntries, MaxKeyBytes: int64(cfg.Keys.CacheDisk),
		MaxInbound: cfg.Edge.RecordEntries, MaxInboundBytes: int64(cfg.Edge.RecordDisk),
	})
	if err != nil {
		return nil, err
	}
	if n.notary, err = newNotary(cfg); err != nil { // after the store has made the folder
		return nil, err
	}
	n.spool, err = netx.NewSpool(netx.SpoolConfig{
		Dir:    filepath.Join(cfg.DataDir, "spool"),
		Memory: int64(cfg.Outbound.SpoolMemory), Disk: int64(cfg.Outbound.SpoolDisk), Inline: int64(cfg.Outbound.SpoolInline),
	})
	if err != nil {
		return nil, err
	}
	if n.client, err = newClient(cfg, n.userAgent); err != nil {
		return nil, err
	}
	n.handover = newHandover(n)
	n.front = netx.NewFront(netx.FrontConfig{
		Own:    n.handover.own,
		Secret: cfg.Front.secret, MaxConns: int(cfg.Front.MaxConnections), MaxReading: int(cfg.Front.MaxReading),
		MaxBody: func(method, target string) int64 {
			if ep := matrix.Match(method, target); ep.MaxRequest != matrix.MaxRequestBody {
				return ep.MaxRequest
			}
			return int64(n.cfg.Load().Front.MaxBody)
		},
		Spool: n.spool, Logger: log, Handle: n.ingest, Gone: n.gone, WrongSecret: n.refusedSecret,
	})
	var seed [32]byte
	rand.Read(seed[:])
	n.core = bus.New(cfg.Core(), mathrand.New(mathrand.NewChaCha8(seed)))
	log.Debug("core made", "seed", fmt.Sprintf("%x", binary.BigEndian.Uint64(seed[:])))
	rand.Read(seed[:])
	if n.edge, err = newEdge(n, cfg, seed); err != nil {
		return nil, err
	}
	if n.edge != nil && n.takeover != nil {
		n.takeover.sent = n.edge.gaps.sent
	}
	n.loop = sched.NewLoop(&machine{n: n}, n.clock.Now, tick, eventQueue, n.execute)
	return n, nil
}

// noteProxy says how other servers are reached, where an admin may expect it otherwise.
func (n *Node) noteProxy(f *FederationConfig) {
	if f.proxy != nil {
		n.log.Info("other servers are reached through a proxy", "proxy", f.proxy.String(), "it_looks_up_names", f.ProxyDNS)
		return
	}
	for _, name := range []string{"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"} {
		if os.Getenv(name) != "" {
			n.log.Warn("the environment names a proxy, which fsbus does not use: federation.proxy says which one it is to use", "variable", name)
			return
		}
	}
}

func newClient(cfg *Config, userAgent string) (*netx.Client, error) {
	f, o := &cfg.Federation, &cfg.Outbound
	var roots *x509.CertPool
	if f.CAFile != "" {
		pem, err := os.ReadFile(f.CAFile)
		if err != nil {
			return nil, fmt.Errorf("federation.ca_file: %w", err)
		}
		if roots, err = netx.CAPool(pem); err != nil {
			return nil, fmt.Errorf("federation.ca_file: %w", err)
		}
	}
	block, err := netx.NewBlocklist(f.IPRangeBlocklist, f.IPRangeAllowlist)
	if err == nil && len(f.IPRangeBlocklist) > 0 { // else next to nothing is blocked
		block.Own = netx.HostAddresses
	}
	if err != nil {
		return nil, fmt.Errorf("federation: %w", err)
	}
	static, err := netx.NewStatic(f.Resolve)
	if err != nil {
		return nil, fmt.Errorf("federation.resolve: %w", err)
	}
	idle := o.IdleConnections
	if idle == 0 {
		idle = -1 // to the client, 0 is its default
	}
	return netx.NewClient(netx.ClientConfig{
		CAs: roots, Blocklist: block, Static: static, Proxy: f.proxy, UserAgent: userAgent,
		ConnectTimeout: time.Duration(o.ConnectTimeout), HandshakeTimeout: time.Duration(o.TLSTimeout), BodyTimeout: time.Duration(o.BodyTimeout),
		HandshakesPerSecond: o.HandshakesPerSecond, MaxDNS: o.DNSQueries,
		MaxIdle: idle, MaxIdlePerHost: max(o.HostConcurrency, cfg.Keys.NotaryParallel), IdleTimeout: time.Duration(o.IdleTimeout), SessionBytes: int64(sessionBytes), WellKnownCache: wellKnown,
	}), nil
}

// Run serves until ctx ends and then drains. Each signal from hup has the
// configuration read again with load; one that cannot be read changes nothing.
func (n *Node) Run(ctx context.Context, hup <-chan os.Signal, load func() (*Config, error)) error {
	cfg := n.cfg.Load()
	limitMemory(cfg)
	listeners, err := n.listen(cfg)
	if err != nil {
		return err
	}
	n.notify, err = netx.NewNotifier()
	if err != nil {
		return err
	}
	hosts, err := n.store.LoadHosts(ctx, int(cfg.Outbound.MaxHosts))
	if err != nil {
		return err
	}

	queues, err := n.loadQueues(ctx)
	if err != nil {
		return err
	}

	answers, notary, err := n.loadKnown(ctx, cfg)
	if err != nil {
		return err
	}

	workers := int(cfg.Outbound.Workers)
	n.senders = sched.NewPool(workers, workers, func(j job) { j.run(n) }, func(j job, err error) { j.crashed(n, err) })
	replies := int(cfg.Front.MaxConnections) + smallRepliers
	n.small = sched.NewPool(smallRepliers, replies, n.write, n.unwritten)
	n.large = sched.NewPool(largeRepliers, replies, n.write, n.unwritten)
	// One for each request, from either side, and for each call that failed, and what
	// scans ask for.
	reads := int(cfg.Front.MaxConnections) + int(cfg.Outbound.MaxHosts) + maxKeyWants + cfg.edgeJobs()
	n.readers = sched.NewPool(storeReaders, reads, func(j readJob) { j.run(n) }, func(j readJob, err error) { j.crashed(n, err) })
	if n.edge != nil {
		n.edge.start(cfg)
		n.edge.ring.notary(notary)
	}
	n.scanners = sched.NewPool(scanners, maxScans, func(s *scan) { s.run(n) }, func(s *scan, err error) { s.crashed(n, err) })

	loopCtx, cancelLoop := context.WithCancel(context.Background())
	defer cancelLoop()
	looped := make(chan struct{})
	failed := make(chan error, len(listeners.front)+1)
	lost := make(chan ended)
	serve(loopCtx, func(ctx context.Context) {
		defer close(looped)
		n.loop.Run(ctx)
	})
	n.loop.Post(event{Event: bus.Restored{Hosts: fromStore(hosts), Queues: queues, Answers: answers, Notary: notary}})
	<-n.restored // else the status could say for a moment that nothing waits
	for _, ln := range listeners.front {
		serve(ctx, func(context.Context) {
			if err := n.front.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("front %s: %w", ln.Addr(), err)
			}
		})
	}
	n.serveParts(ctx, lost)
	admin := n.startAdmin(ctx, listeners.admin, failed)
	for _, ln := range listeners.front {
		n.log.Info("listening for the homeserver", "address", ln.Addr().String())
	}
	n.noteProxy(&cfg.Federation)
	n.log.Info("fsbus is up", "version", n.version, "server_name", cfg.Homeserver.ServerName, "memory_limit", cfg.MemoryLimit.String(), "hosts_restored", len(hosts), "signing_key", cfg.Homeserver.keys.String(), "queues_restored", len(queues))
	if err := n.notify.Ready(); err != nil {
		n.log.Warn("systemd was not told", "error", err)
	}
	err = n.attend(ctx, failed, lost, hup, load)
	admin.close()
	n.stop(time.Duration(cfg.DrainTimeout), func() { cancelLoop(); <-looped })
	return err
}

// attend waits for the end. Meanwhile it tells systemd that the loop turns,
// and reloads the configuration when asked to.
func (n *Node) attend(ctx context.Context, failed <-chan error, lost chan ended, hup <-chan os.Signal, load func() (*Config, error)) error {
	var alive <-chan time.Time
	if d := n.notify.WatchdogInterval(); d > 0 {
		t := time.NewTicker(d / 2)
		defer t.Stop()
		alive = t.C
	}
	var pressure <-chan time.Time
	if p := findPressure(); p != "" && (n.takeover != nil || n.edge != nil) {
		t := time.NewTicker(pressureEvery)
		defer t.Stop()
		pressure = t.C
		n.pressureFile = p
	}
	var again <-chan time.Time
	if n.parts.reason() != "" {
		again = time.After(partRetry)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case e := <-lost:
			n.missing(e.part, e.err)
			again = time.After(partRetry)
		case <-again:
			if again = nil; !n.retryParts(ctx, lost) {
				again = time.After(partRetry)
			}
		case <-pressure:
			n.tellPressure()
		case <-hup:
			n.notify.Reloading()
			if cfg, err := load(); err != nil {
				n.log.Error("the configuration has mistakes; the old one stays in force", "error", err)
			} else {
				n.reload(cfg)
			}
			n.notify.Ready()
		case <-alive:
			if n.loop.Call(ctx, func() {}) == nil {
				n.notify.Watchdog()
			}
		}
	}
}

// stop takes nothing new, lets what runs come to an end for a while, and
// closes. Requests that are still waiting then lose their connection, which to
// Synapse looks like a bus that restarts, as it is.
func (n *Node) stop(patience time.Duration, stopLoop func()) {
	n.draining.Store(true)
	n.notify.Stopping()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	n.log.Info("stopping", "drain_timeout", patience.String())
	if n.edge != nil {
		// First, since it needs the other core for keys.
		n.edge.stop(ctx, n.clock.Now().Add(patience/2))
	}
	n.front.Shutdown(ctx)
	end, _ := ctx.Deadline()
	n.loop.Post(event{Event: bus.Draining{By: n.clock.Now().Add(time.Until(end) / 2)}})
	select {
	case <-n.drained:
	case <-ctx.Done(): // Close below says so
	}
	if n.page != nil {
		n.page.Close()
	}
	n.loop.Call(context.Background(), func() {
		for _, a := range n.attempts {
			a.cancel()
		}
		for _, d := range n.deliveries {
			d.cancel()
		}
		for _, e := range n.errands {
			e.cancel()
		}
		if n.edge != nil {
			n.edge.cancel()
		}
	})
	stopLoop() // it might give more work to the pools that are closed now
	closing, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if n.edge != nil {
		n.edge.close(closing)
	}
	for _, closed := range []error{n.senders.Close(closing), n.readers.Close(closing), n.scanners.Close(closing), n.small.Close(ctx), n.large.Close(ctx)} {
		if closed != nil {
			n.log.Warn("work was still under way at the end of drain_timeout and is dropped")
			break
		}
	}
	n.client.CloseIdle()
	if err := n.store.Close(closing); err != nil {
		n.log.Error("the store was not closed properly; nothing is lost, the next start takes longer", "error", err)
	}
	n.log.Info("stopped")
}

// limitMemory tells Go's runtime how much of memory_limit is its own: what is
// outside its heap (code, SQLite) is left out. Below that limit the garbage
// collector takes its time: what lives is small, and collecting it every few
// megabytes would cost a fifth of the processor time of a busy bus.
func limitMemory(cfg *Config) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(cfg.MemoryLimit) * 2 / 3)
	}
	if os.Getenv("GOGC") == "" {
		percent := 200
		if cfg.hasEdge() {
			percent = 100 // hundreds of connections live, and would count three times
		}
		debug.SetGCPercent(percent)
	}
}

// listeners are where the bus is reached.
type listeners struct {
	front  []net.Listener
	status net.Listener
	admin  net.Listener
	edge   []net.Listener
}

// passed sorts what systemd passes by its FileDescriptorName=. What is not named, or
// after its unit, as is the default, is the front's, as the one that everybody has; a name that means nothing is refused, so
// that a socket that was meant for other servers is not given to the homeserver. It closes
// none of them.
func (c *Config) passed(sockets []netx.NamedListener) (l listeners, err error) {
	for _, s := range sockets {
		switch {
		case s.Name == "front", s.Name == "unknown", strings.HasSuffix(s.Name, ".socket"): // a unit that says nothing
			l.front = append(l.front, s.Listener)
		case s.Name == "status" && l.status == nil:
			l.status = s.Listener
		case s.Name == "status":
			return l, errors.New("systemd passes two sockets named \"status\", and the status page has one")
		case s.Name == "edge" && c.hasEdge():
			l.edge = append(l.edge, s.Listener)
		case s.Name == "edge":
			return l, fmt.Errorf("systemd passes a socket named \"edge\" (%s), but edge.listen is not set, so there is no edge", address(s))
		default:
			return l, fmt.Errorf("systemd passes a socket named %q (%s): write FileDescriptorName=front, edge or status into its unit, which says what it is for", s.Name, address(s))
		}
	}
	return l, nil
}

// elsewhere says which addresses of the configuration are not those of the sockets that
// systemd has passed in their place. Other commands go by the configuration.
func elsewhere(key string, specs []string, passed ...net.Listener) (warnings []string) {
	for _, spec := range specs {
		there := func(ln net.Listener) bool { return serves(spec, address(ln)) }
		if len(passed) > 0 && !slices.ContainsFunc(passed, there) {
			warnings = append(warnings, fmt.Sprintf("%s names %s, but systemd passes %s, which is used: set %s to that", key, quote(spec), address(passed[0]), key))
		}
	}
	return warnings
}

// address returns where ln is, as the configuration has it.
func address(ln net.Listener) string {
	if a := ln.Addr(); a.Network() != "unix" {
		return a.String()
	}
	return "unix:" + ln.Addr().String()
}

// listen takes what systemd passes, and for what it does not pass opens what the
// configuration names.
func (n *Node) listen(cfg *Config) (l listeners, err error) {
	sockets, err := netx.SystemdListeners()
	if err != nil {
		return l, err
	}
	defer func() {
		if err != nil {
			l.close()
			for _, s := range sockets {
				s.Close()
			}
		}
	}()
	if l, err = cfg.passed(sockets); err != nil {
		return l, err
	}
	warnings := elsewhere("front.listen", cfg.Front.Listen, l.front...)
	if l.status != nil {
		warnings = append(warnings, elsewhere("status.listen", []string{cfg.Status.Listen}, l.status)...)
	}
	for _, w := range warnings {
		n.log.Warn(w)
	}
	if len(l.front) == 0 {
		for _, spec := range cfg.Front.Listen {
			ln, err := netx.Listen(spec, cfg.frontListenOptions())
			if err != nil {
				return l, fmt.Errorf("front: %w", err)
			}
			l.front = append(l.front, ln)
		}
	}
	if l.admin, err = listenAdmin(cfg); err != nil {
		return l, err
	}
	// Last, as what they have opened is not closed again.
	if l.status != nil || cfg.Status.Listen != "" {
		n.page = n.statusServer()
		n.addPart(n.statusPart(cfg, l.status))
	}
	if n.edge != nil {
		for _, t := range n.edgeParts(cfg, l.edge) {
			n.addPart(t)
		}
	}
	return l, nil
}

func (l listeners) close() {
	for _, ln := range slices.Concat(l.front, l.edge) {
		ln.Close()
	}
	if l.status != nil {
		l.status.Close()
	}
}

// serve starts one of the few goroutines of a node: its loop, one for each
// listener.
func serve(ctx context.Context, run func(context.Context)) { go run(ctx) }

// reload takes over what can change while the bus runs, and says what cannot.
func (n *Node) reload(cfg *Config) {
	old := n.cfg.Load()
	applied, needRestart := Changed(old, cfg)
	next := *old
	next.applyReloadable(cfg)
	n.cfg.Store(&next)
	n.level.Set(next.level())
	if !next.Homeserver.keys.equal(old.Homeserver.keys) || n.takeover.reason() != "" {
		n.takeover.use(next.Homeserver.keys)
		n.loop.Post(event{Event: bus.Suspended{}})
		n.loop.Post(event{Event: bus.KeyChanged{}})
	}
	n.loop.Post(event{Event: bus.Reconfigured{Config: next.Core()}})
	if n.edge != nil {
		n.edge.reload(&next)
	}
	n.log.Info("configuration reloaded", "changed", applied, "need_restart", needRestart)
}

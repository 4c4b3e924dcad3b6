package node

import (
	"context"
	"fmt"
	mathrand "math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
)

const (
	// verifying is how many signatures wait to be checked, or are being, at a time;
	// verifiers check them. They do little but compute, so there are no more of them
	// than a small board has cores to spare.
	verifying = 64
	verifiers = 2
)

// edgeShell executes what the core of package edge decides: it is to that what
// the rest of Node is to the core of package bus.
type edgeShell struct {
	n        *Node
	core     *edge.Machine
	server   *netx.Edge
	upstream *netx.Upstream
	clients  *clientSide // nil: what clients want is not passed on
	certs    *netx.Certificates
	spool    *netx.Spool // of requests
	answers  *netx.Spool // of the homeserver's answers
	bulk     bulk
	ring     *keyring
	own      ownAnswers
	covers   hasher
	unread   *unread
	details  *details
	acl      atomic.Pointer[edge.ACL] // the core has the same one

	verifiers *sched.Pool[verifyJob]
	forwards  *sched.Pool[*relay]

	// Of the loop's goroutine.
	requests map[edge.ReqID]*caller
	relays   map[edge.OpID]*relay
	wanted   map[uint64]*keyWish // by KeyWanted.For
	lastKey  uint64

	counts    edgeCounts
	endpoints endpointCounts
	gaps      gaps
	closing   sync.RWMutex // held for reading while a request is handed to the core
	closed    bool
	drained   chan struct{}
}

// caller is a request of another server that the core may still refer to.
type caller struct {
	q        *netx.EdgeRequest
	endpoint *matrix.Endpoint
	auth     auth
	event    string // the event that it asks for, if the outbox may have it
	txn      *edge.Txn
	found    []byte   // what its Look found
	acked    []string // the events of its PDUs, as far as they are known

	unchecked bool // its body is too large to be in memory, and not looked into
	ended     bool
	freed     bool
	authentic bool // its signature has been checked; the loop's goroutine writes it

	peer  string       // the address that it comes from; "" if nobody knows
	extra int64        // bytes of details, beyond what all have
	holds atomic.Int32 // of the core, of relays and of the answer; the last one gives extra back
}

// client names whom the request's answer is for: its origin, if it is known that it is,
// else an address.
func (c *caller) client() string {
	if c.authentic {
		return string(c.auth.origin)
	}
	return "address " + c.peer // no server's name has a blank
}

// newEdge returns nil if there is none.
func newEdge(n *Node, cfg *Config, seed [32]byte) (*edgeShell, error) {
	if !cfg.hasEdge() {
		return nil, nil
	}
	e := &cfg.Edge
	s := &edgeShell{
		n: n, ring: newKeyring(n), covers: newHasher(),
		requests: make(map[edge.ReqID]*caller), relays: make(map[edge.OpID]*relay), wanted: make(map[uint64]*keyWish),
		drained: make(chan struct{}),
	}
	var err error
	if files, ok := e.certificates(); ok {
		files.Logger = n.log
		s.certs = netx.NewCertificates(files)
	}
	up := e.upstream()
	up.Logger = n.log
	if s.upstream, err = netx.NewUpstream(up); err != nil {
		return nil, fmt.Errorf("edge.upstream: %w", err)
	}
	if e.PassClient {
		if s.clients, err = newClientSide(up); err != nil {
			return nil, fmt.Errorf("edge.upstream: %w", err)
		}
	}
	core := e.core()
	s.acl.Store(edge.NewACL(&core))
	bodies, beyond := e.requestsMemory()
	answers, kept := e.answersMemory()
	s.details, s.unread = newDetails(beyond), newUnread(answers+cfg.answersDisk(), kept)
	for _, sp := range []struct {
		spool        **netx.Spool
		dir          string
		memory, disk int64
	}{{&s.spool, "spool-edge", bodies, cfg.edgeDisk()}, {&s.answers, "spool-answers", answers, cfg.answersDisk()}} {
		*sp.spool, err = netx.NewSpool(netx.SpoolConfig{
			Dir:    filepath.Join(cfg.DataDir, sp.dir),
			Memory: sp.memory, Disk: sp.disk, Inline: int64(cfg.Outbound.SpoolInline), Files: spoolFiles,
		})
		if err != nil {
			return nil, err
		}
	}
	s.server = netx.NewEdge(netx.EdgeConfig{
		TLS: s.certs, TrustedProxies: e.proxies(),
		MaxConns: e.MaxConnections, MaxConnsPerAddr: e.MaxConnectionsPerAddress, MaxReading: e.MaxReading, MaxRequests: e.heldRequests(),
		HeaderTimeout: time.Duration(e.HeaderTimeout), BodyTimeout: time.Duration(e.BodyTimeout), BodyRate: int64(e.BodyRate), BodyTotal: time.Duration(e.BodyTotal), IdleTimeout: time.Duration(e.IdleTimeout),
		MaxBody: s.maxBody, Spool: s.spool, Logger: n.log,
		Check: s.check, Handle: s.ingest, Gone: s.gone,
	})
	s.core = edge.New(core, mathrand.New(mathrand.NewChaCha8(seed)))
	return s, nil
}

// start starts the pools.
func (s *edgeShell) start(cfg *Config) {
	e := &cfg.Edge
	// What asks for a key may come back from it while others are checked.
	s.verifiers = sched.NewPool(verifiers, verifying+e.KeyFetches, func(j verifyJob) { j.run(s) }, func(j verifyJob, err error) { j.crashed(s, err) })
	running := e.Concurrency + e.Parallel
	s.forwards = sched.NewPool(running, running, func(r *relay) { r.run(s) }, func(r *relay, err error) { r.crashed(s, err) })
	if s.clients != nil {
		s.clients.start(s.n)
	}
}

// heldRequests returns how many requests are held at a time.
func (e *EdgeConfig) heldRequests() int {
	if e.PassClient {
		return e.Requests + e.Unverified + clientRequests
	}
	return e.Requests + e.Unverified
}

// edgeDisk returns how many bytes of requests may be on disk.
func (c *Config) edgeDisk() int64 {
	n := int64(c.Edge.RequestBytes) + int64(c.Edge.UnverifiedBytes)
	if c.Edge.PassClient {
		n += max(clientDisk, 4*int64(c.Edge.MaxBody))
	}
	return n
}

// edgeJobs returns how many requests may be waiting to be answered, or for the store.
func (c *Config) edgeJobs() int {
	if !c.hasEdge() {
		return 0
	}
	return c.Edge.Requests + c.Edge.Unverified
}

// step runs the core.
func (s *edgeShell) step(now sched.Time, ev edge.Event, out []edge.Effect) []edge.Effect {
	if look := s.n.hooks.edgeEvent; look != nil {
		look(ev)
	}
	if v, ok := ev.(edge.Verified); ok && v.Verdict == edge.Good {
		s.requests[v.Req].authentic = true
	}
	return s.core.Step(now, ev, out)
}

// post hands an event to the core.
func (s *edgeShell) post(ev edge.Event) { s.n.loop.Post(event{edge: ev}) }

// inject does, on the loop's goroutine.
func (s *edgeShell) inject(ev edge.Event) { s.n.loop.Inject(event{edge: ev}) }

// reload takes over what can change while the bus runs.
func (s *edgeShell) reload(cfg *Config) {
	if s.certs != nil {
		if err := s.certs.Reload(); err != nil {
			s.n.log.Error("the edge goes on with the certificate that it has", "error", err)
		}
	}
	core := cfg.Edge.core()
	s.acl.Store(edge.NewACL(&core))
	s.post(edge.Reconfigured{Config: core})
}

// stop takes nothing new, and lets what is under way come to an end by a moment.
func (s *edgeShell) stop(ctx context.Context, by sched.Time) {
	s.closing.Lock()
	s.closed = true // no Arrived follows
	s.closing.Unlock()
	s.post(edge.Draining{By: by})
	now, cancel := context.WithCancel(ctx)
	cancel()
	_ = s.server.Shutdown(now) // closes what listens and what is idle, and waits for nothing
	// All are answered by then; only what waits for a key may go on for longer.
	late := time.NewTimer(by.Sub(s.n.clock.Now()) + time.Second)
	defer late.Stop()
	select {
	case <-s.drained:
	case <-late.C:
	case <-ctx.Done():
	}
	written, cancel := context.WithTimeout(ctx, edgeFlush)
	defer cancel()
	_ = s.server.Shutdown(written) // what is left then, close ends
}

// edgeFlush is how long the last answers may take to be written.
const edgeFlush = 2 * time.Second

// close ends what is left.
func (s *edgeShell) close(ctx context.Context) {
	_ = s.server.Close()
	for _, closed := range []error{s.verifiers.Close(ctx), s.forwards.Close(ctx)} {
		if closed != nil {
			s.n.log.Warn("work for other servers was still under way at the end of drain_timeout and is dropped")
			break
		}
	}
	s.upstream.CloseIdle()
	if s.clients != nil {
		s.clients.close(ctx)
	}
}

// cancel breaks off what runs. It is called on the loop's goroutine.
func (s *edgeShell) cancel() {
	for _, r := range s.relays {
		r.cancel()
	}
}

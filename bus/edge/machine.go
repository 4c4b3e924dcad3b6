package edge

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Machine is the core of the edge: it decides what is done with requests from the
// federation, and when. It is not safe for concurrent use; one goroutine calls it.
type Machine struct {
	cfg Config
	acl *ACL
	rng *rand.Rand
	now sched.Time // of the present Step
	out []Effect   // of the present Step

	reqs       map[ReqID]*request // that are not answered, or whose body is held
	unverified pool
	held       pool // verified, or without a signature
	desk       verifyDesk
	ledger     ledger

	origins   map[originKey]*origin
	idle      originList // without calls, the longest idle first
	strangers *origin    // whoever could not be verified; not among origins

	txns   map[txnKey]*call   // each that has not ended
	shared map[shareKey]*call // those that equal requests may join
	looks  map[ReqID]*call    // by their leader
	ops    map[OpID]*call
	line   [NumBands]callList  // calls that wait or are held back, the oldest first
	crowd  [NumBands][]*origin // with calls of a band that have not begun, in any order

	lanes [numLanes]lane
	ready [NumBands]originLine
	turns *sched.Stride
	home  homeserver
	pace  *rate.Limiter // of BandEphemeral
	// ephemeral is how long the homeserver takes over one of these, of so many measured
	ephemeral time.Duration
	measured  int64
	joins     joins
	record    recorder

	timers sched.Timers[timer]
	wake   *sched.Timer[timer] // something that waits for a moment may begin

	pressure int32
	seq      uint64
	nextOp   OpID
	draining bool
	over     bool // the time for draining is
	drained  bool

	changed bool // the limits have been, so more may be in use than they allow

	stats Stats
}

// timer is what a moment is awaited for: one of these.
type timer struct {
	req    *request // its sender is about to give up
	call   *call    // what it waits for has taken long enough
	origin *origin  // its rate allows the next
	room   string   // its join window is over
	record bool     // answers that nobody waits for are to be stored
	drain  bool
	wake   bool
}

// New returns a core with the given limits, which must be valid. All its
// randomness comes from rng.
func New(cfg Config, rng *rand.Rand) *Machine {
	m := &Machine{
		rng:     rng,
		reqs:    make(map[ReqID]*request),
		origins: make(map[originKey]*origin),
		txns:    make(map[txnKey]*call),
		shared:  make(map[shareKey]*call),
		looks:   make(map[ReqID]*call),
		ops:     make(map[OpID]*call),
	}
	m.desk.init()
	m.ledger.init()
	m.joins.init()
	var weights []int32
	for b := range m.line {
		m.line[b].in = linkLine
		weights = append(weights, bands[b].weight)
	}
	m.turns = sched.NewStride(weights)
	m.strangers = newOrigin(originKey{})
	m.strangers.stranger = true
	m.strangers.limiter = rate.NewLimiter(1, 1)
	m.pace = rate.NewLimiter(1, 1)
	for l := range m.lanes {
		m.lanes[l].window.init(laneID(l))
	}
	m.configure(cfg)
	return m
}

func (m *Machine) configure(cfg Config) {
	if err := cfg.Validate(); err != nil {
		panic("edge: " + err.Error())
	}
	m.cfg = cfg
	m.acl = NewACL(&cfg)
	m.unverified.maxN, m.unverified.maxBytes = cfg.Unverified, int64(cfg.UnverifiedBytes)
	m.held.maxN, m.held.maxBytes = cfg.Requests, int64(cfg.Bytes)
	m.lanes[laneTxn].window.limit(cfg.Concurrency)
	m.lanes[laneOther].window.limit(cfg.Parallel)
	for l := range m.lanes {
		m.lanes[l].resize()
	}
	for _, o := range m.sorted() {
		o.limit(&cfg, m.now)
		m.update(o)
	}
	m.strangers.limiter.SetLimitAt(m.now.Std(), rate.Limit(cfg.PassRate))
	m.strangers.limiter.SetBurstAt(m.now.Std(), burst(cfg.PassRate))
	m.update(m.strangers)
	m.setPace()
	for len(m.origins) > int(cfg.Origins) && m.idle.first != nil {
		m.forget(m.idle.first)
	}
	if cfg.Ephemeral == DropEphemeral {
		m.shedAll(ShedDropped)
	}
}

// Step handles one event at the moment now, with whatever has become due by
// then, and appends its effects to out. It never blocks.
func (m *Machine) Step(now sched.Time, ev Event, out []Effect) []Effect {
	m.now, m.out = max(m.now, now), out
	switch ev := ev.(type) {
	case Arrived:
		m.arrived(ev)
	case Gone:
		m.gone(ev.Req)
	case Verified:
		m.verified(ev)
	case Looked:
		m.looked(ev)
	case Answered:
		m.answered(m.op(ev.Op, "Answered"), ev)
	case Done:
		m.done(m.op(ev.Op, "Done"), ev)
	case Recorded:
		m.recorded(ev)
	case Joining:
		m.joining(ev)
	case Pressure:
		m.pressure = ev.Hundredths
		m.setPace()
	case Reconfigured:
		m.changed = true
		m.configure(ev.Config)
	case Draining:
		m.drain(ev.By)
	case Tick:
	default:
		panic(fmt.Sprintf("edge: unknown event %T", ev))
	}
	m.due()
	m.verifyNext()
	m.dispatch()
	m.store()
	if m.draining && !m.drained && len(m.reqs)+len(m.ops)+m.record.total() == 0 {
		m.drained = true
		m.emit(Drained{})
	}
	out, m.out = m.out, nil
	return out
}

// NextWake returns the moment at which Step wants a Tick.
func (m *Machine) NextWake() (sched.Time, bool) { return m.timers.Next() }

func (m *Machine) emit(e Effect) { m.out = append(m.out, e) }

func (m *Machine) op(id OpID, event string) *call {
	c := m.ops[id]
	if c == nil {
		panic(fmt.Sprintf("edge: %s for attempt %d, which is not running (%d are)", event, id, len(m.ops)))
	}
	return c
}

// due handles the timers whose moment has come.
func (m *Machine) due() {
	for {
		t, ok := m.timers.Due(m.now)
		if !ok {
			return
		}
		switch {
		case t.req != nil:
			t.req.timer = nil
			m.expired(t.req)
		case t.call != nil:
			t.call.timer = nil
			m.callDue(t.call)
		case t.origin != nil:
			t.origin.timer = nil
			m.update(t.origin)
		case t.room != "":
			m.joinOver(t.room)
		case t.record:
			m.record.timer = nil
			m.record.urgent = true
		case t.drain:
			m.drainOver()
		case t.wake:
			m.wake = nil
		}
	}
}

// drain lets nothing wait that need not.
func (m *Machine) drain(by sched.Time) {
	if m.draining {
		return
	}
	m.draining = true
	m.timers.Set(by, timer{drain: true})
	m.releaseHeld()
	if m.cfg.Ephemeral != PassEphemeral {
		m.shedAll(ShedDrained)
	}
}

// drainOver refuses what is left, and breaks off what runs.
func (m *Machine) drainOver() {
	m.over = true
	for _, id := range slices.Sorted(maps.Keys(m.reqs)) {
		if r := m.reqs[id]; r != nil && !r.answered {
			m.giveUp(r, ForDraining, "fsbus: it is being stopped; ask again")
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.ops)) {
		m.cancel(m.ops[id])
	}
}

// sorted returns the origins in the order of their names.
func (m *Machine) sorted() []*origin {
	return slices.SortedFunc(maps.Values(m.origins), func(a, b *origin) int {
		return cmp.Or(cmp.Compare(a.key.name, b.key.name), cmp.Compare(a.key.peer, b.key.peer))
	})
}

// known reports whether a server has sent something authentic of late.
func (m *Machine) known(n matrix.ServerName) bool { return m.origins[originKey{name: n}] != nil }

package bus

import (
	"fmt"
	"math/rand/v2"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Machine is the core: it decides what is done, for whom, and when. It is not
// safe for concurrent use; one goroutine calls it.
type Machine struct {
	cfg Config
	rng *rand.Rand
	now sched.Time // of the present Step
	out []Effect   // of the present Step

	hosts   map[matrix.ServerName]*host
	idle    hostList // hosts without work, the longest idle first
	reqs    map[ReqID]*request
	calls   map[Key]*call // those that equal requests may join
	ops     map[OpID]*call
	commits map[BatchID]commit
	cache   cache // of small answers
	whole   cache // of whole answers to joins and for resyncs, in files
	media   cache // of media, in files
	answers answers
	keys    keyDesk
	joins   joins
	timers  sched.Timers[timer]
	lanes   [numLanes]lane
	turns   *sched.Stride

	newestNext bool // of pressed look-ups

	workers     sched.Gauge
	maxRequests sched.Slots
	running     [matrix.NumClasses + 1]sched.Slots

	dirty   []*host // whose records are to be stored, in order
	writing bool    // a commit of dirty records is under way

	outbox   outbox
	spending *rate.Limiter // attempts ahead of a host's time

	nextOp    OpID
	nextBatch BatchID
	draining  bool
	drained   bool

	stats Stats
}

// timer is what a moment is awaited for: one of these.
type timer struct {
	req     *request // its caller is about to give up
	host    *host    // it may be sent to
	call    *call    // it should have connected by now, or
	expire  bool     // ended
	queue   *queue   // it may be sent
	late    bool     // or its waiters have waited for long enough
	query   *keyQuery
	notary  *notary     // it may be asked
	join    *joinWindow // its phase is over
	ahead   bool        // the next server may be connected to
	answers bool        // those that are to be stored are
	sweep   bool        // what has expired is looked for
	outcome *settling   // the store is asked again to note it
}

// commit is a batch that is being written: for an attempt that may start once
// its intent is on disk, for answers, or else for the dirty records.
type commit struct {
	call    *call
	answers []KeptAnswer
}

// New returns a core with the given limits, which must be valid. All its
// randomness comes from rng.
func New(cfg Config, rng *rand.Rand) *Machine {
	m := &Machine{
		rng:     rng,
		hosts:   make(map[matrix.ServerName]*host),
		reqs:    make(map[ReqID]*request),
		calls:   make(map[Key]*call),
		ops:     make(map[OpID]*call),
		commits: make(map[BatchID]commit),

		spending: newSpending(),
	}
	m.cache.init()
	m.whole.init()
	m.media.init()
	m.answers.init()
	m.keys.init()
	m.joins.init()
	var weights []int32
	for _, c := range classes {
		weights = append(weights, c.weight)
	}
	m.turns = sched.NewStride(weights)
	m.outbox.init(rng.Uint64())
	m.configure(cfg)
	return m
}

func (m *Machine) configure(cfg Config) {
	if err := cfg.Validate(); err != nil {
		panic("bus: " + err.Error())
	}
	m.cfg = cfg
	m.workers.Limit = cfg.Workers
	m.lanes[laneProven].slots.Limit = cfg.Workers - cfg.Workers/8
	m.lanes[laneSlow].slots.Limit = cfg.Workers * 5 / 8
	m.lanes[laneUnknown].slots.Limit = cfg.Unknown
	m.lanes[laneFailing].slots.Limit = cfg.Failing
	m.cache.maxEntries, m.cache.maxBytes = int(cfg.CacheBytes/entryCost), int64(cfg.CacheBytes)
	m.whole.maxEntries, m.whole.maxBytes = shelfFiles, int64(cfg.KeepBytes)
	m.media.maxEntries, m.media.maxBytes = shelfFiles, int64(cfg.MediaBytes)
	for _, c := range []*cache{&m.cache, &m.whole, &m.media} {
		c.shrink(m)
	}
	m.answers.max = int(cfg.KnownAnswers)
	m.answers.trim()
	m.keys.ownName = cfg.Keys.OwnName
	m.configureOutbox()
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
	case Connected:
		m.connected(m.op(ev.Op, "Connected"))
	case Answered:
		m.answered(m.op(ev.Op, "Answered"), ev)
	case Done:
		m.done(m.op(ev.Op, "Done"), ev)
	case Committed:
		m.committed(ev)
	case Restored:
		m.restored(ev.Hosts)
		m.restoreQueues(ev.Queues)
		m.restoreAnswers(ev.Answers)
		m.keys.latest = ev.Notary
	case Reconfigured:
		m.configure(ev.Config)
		for _, h := range m.hosts { // order does not matter: each is set to the same limits
			h.limit(m.cfg, m.now)
		}
	case Draining:
		m.draining = true
		m.dropUnwanted()
		if m.outbox.pacer != nil {
			m.outbox.pacer.Drain(ev.By)
		}
	case Progress:
		m.progress(m.op(ev.Op, "Progress"), ev)
	case Loaded:
		m.loaded(ev)
	case KeyQuery:
		m.keyQuery(ev)
	case KeysLoaded:
		m.keysLoaded(ev)
	case KeysSeen:
		m.keysSeen(ev)
	case ServersSeen:
		m.serversSeen(ev)
	case KeyWanted:
		m.keyWanted(ev)
	case Alive:
		m.alive(ev.Server)
	case KeyServed:
		m.keyServed()
	case KeyChanged:
		m.trustAgain(m.now, m.now)
	case Offered:
		m.offered(ev)
	case Accepted:
		m.accepted(ev)
	case HandedOver:
		m.handedOver(ev)
	case Packed:
		m.packed(ev)
	case Settled:
		m.settled(ev)
	case Trimmed:
		m.trimmed(ev)
	case Adjusted:
		m.adjusted(ev)
	case Flush:
		m.flush(ev.Dest)
	case Suspended:
		m.suspend(ev.Why)
	case Pressure:
		if m.outbox.pacer != nil {
			m.outbox.pacer.Pressure(m.now, ev.Hundredths)
		}
	case Tick:
	default:
		panic(fmt.Sprintf("bus: unknown event %T", ev))
	}
	m.maxRequests = max(m.maxRequests, sched.Slots(m.waiting()))
	m.due()
	m.dispatch()
	m.release()
	m.sweepSoon()
	m.persist()
	if m.draining {
		m.storeAnswers()
	}
	if m.draining && !m.drained && m.waiting()+len(m.ops)+len(m.commits)+len(m.answers.loads)+m.outbox.underWay() == 0 {
		m.drained = true
		m.emit(Drained{})
	}
	out, m.out = m.out, nil
	return out
}

// NextWake returns the moment at which Step wants a Tick.
func (m *Machine) NextWake() (sched.Time, bool) {
	at, ok := m.timers.Next()
	if p := m.outbox.pacer; p != nil {
		if ack, any := p.NextWake(m.now); any && (!ok || ack < at) {
			return ack, true
		}
	}
	return at, ok
}

func (m *Machine) emit(e Effect) { m.out = append(m.out, e) }

func (m *Machine) op(id OpID, event string) *call {
	c := m.ops[id]
	if c == nil {
		panic(fmt.Sprintf("bus: %s for attempt %d, which is not running (%d are)", event, id, len(m.ops)))
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
		case t.host != nil:
			t.host.timer = nil
			m.ready(t.host)
		case t.call != nil && t.expire:
			t.call.expire = nil
			t.call.overdue = true
			m.cancel(t.call)
		case t.call != nil && t.late:
			t.call.late = nil
			m.keysLate(t.call)
		case t.query != nil:
			m.keysDue(t.query)
		case t.notary != nil:
			t.notary.timer = nil
			m.pump(t.notary)
		case t.join != nil:
			m.closeJoin(t.join)
		case t.ahead:
			m.joins.timer = nil
			m.goAhead()
		case t.answers:
			m.answers.timer = nil
			m.storeAnswers()
		case t.call != nil:
			t.call.timer = nil
			m.suspect(t.call)
		case t.queue != nil:
			t.queue.timer = nil
			m.plan(t.queue)
		case t.outcome != nil:
			m.noteAgain(t.outcome)
		case t.sweep:
			m.outbox.sweep = nil
			if !m.draining {
				m.sweepAll(0)
			}
		}
	}
}

// persist starts at most one commit of changed records at a time; what changes
// meanwhile goes into the next, so a storm of changes costs few writes.
func (m *Machine) persist() {
	if m.writing || len(m.dirty) == 0 {
		return
	}
	batch := make([]HostRecord, 0, len(m.dirty))
	for _, h := range m.dirty {
		h.dirty = false
		h.stored = m.now
		batch = append(batch, h.HostRecord)
	}
	clear(m.dirty)
	m.dirty = m.dirty[:0]
	m.writing = true
	m.commit(batch, commit{})
}

func (m *Machine) commit(hosts []HostRecord, c commit) {
	m.nextBatch++
	m.commits[m.nextBatch] = c
	m.emit(Commit{Batch: m.nextBatch, Hosts: hosts, Answers: c.answers})
}

func (m *Machine) committed(ev Committed) {
	c, ok := m.commits[ev.Batch]
	if !ok {
		panic(fmt.Sprintf("bus: commit %d ended, which is not under way (%d are)", ev.Batch, len(m.commits)))
	}
	delete(m.commits, ev.Batch)
	if !ev.OK {
		// Back-off is a courtesy, not a promise: go on without.
		m.stats.CommitsFailed++
	}
	if c.answers != nil {
		m.stored(c.answers, ev.OK)
		return
	}
	if c.call == nil {
		m.writing = false
		return
	}
	m.start(c.call)
}

// restored takes over what the store knew. A clock that ran wild before the
// restart cannot keep a host away for longer than the longest back-off.
func (m *Machine) restored(records []HostRecord) {
	for _, r := range records {
		if len(m.hosts) >= int(m.cfg.MaxHosts) {
			return
		}
		if m.hosts[r.Name] != nil {
			continue
		}
		h := m.newHost(r.Name)
		h.HostRecord = r
		// If the clock has gone back since, what is left of the back-off goes on.
		h.NextTry = h.NextTry.Add(-max(0, r.LastTry.Sub(m.now)))
		h.NextTry = min(h.NextTry, m.now.Add(maxBackoff))
		h.LastTry = min(h.LastTry, m.now)
		h.LastSuccess = min(h.LastSuccess, m.now)
		h.FirstFailure = min(h.FirstFailure, m.now)
		h.stored = m.now
	}
}

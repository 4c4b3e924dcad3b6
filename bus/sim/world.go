// Package sim runs the core of package bus in a simulated world: clients that
// ask and go away, remotes that answer, hang, refuse, limit and lie, a disk
// that is slow and sometimes full, and a clock that only moves when the
// simulation moves it. A seed decides everything, the limits included, so a
// failure is replayed by its number.
//
// After every step the world checks what must always hold:
//
//   - each request is answered or given up exactly once, within its caller's
//     time-out, and freed exactly once;
//   - each attempt has one end, its answer is discarded once and used only in
//     between;
//   - no more attempts than workers, nor than the host's own limits;
//   - no attempt at a failing host before its time, nor before the intent is
//     on disk;
//   - what must not be sent twice is not, and what must not be shared is not;
//   - an answer goes only to who asked for it, or for a field of it; from a cache
//     only if it is whole, a 200 or 404, and young enough, and an old one only when
//     its host is not well, or the caller's time is up;
//   - a large answer is passed on only when all of it is here, or the rest follows,
//     or its caller will not come again, and is not broken off before it is read;
//   - a query for keys is answered once, with what came through the notary that it
//     names; each server is asked for once at a time, by no more and no larger
//     batches than may be;
//   - what is kept is let go once, and what was committed survives a crash;
//   - all running totals of the core agree with a recount.
//
// With an outbox (OutboxProfile) there are also a homeserver that sends
// transactions as Synapse does, a disk that does what the store promises, and
// remotes that take transactions, refuse or lose them; see outbox.go. Then also:
//
//   - no answer before its transaction is on disk, and none later than may be;
//   - one transaction at a time for a destination, sent only when it is on disk,
//     with the same content under the same id, also after a crash;
//   - each remote gets the events of a room in their order, no older version of
//     anything after a newer one, and nothing twice;
//   - a transaction is thawed only if nothing of it was sent, and delivered only
//     if its destination has taken it.
//
// When a run ends, the world heals and everything must come to rest: then what
// was acknowledged has been delivered, or was merged, a copy, expired, superseded
// or set aside, each only where that may be.
package sim

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Profile shapes a run. Zero fields are drawn from the seed.
type Profile struct {
	Config   bus.Config
	Hosts    int
	Requests int            // that arrive in all
	Gap      time.Duration  // mean time between arrivals
	Faulty   int            // per cent of the hosts that misbehave
	Crash    bool           // restart the core in the middle, with what the disk has
	Outbox   *OutboxProfile // nil: there is none
	Lookups  bool           // see lookups
}

// behaviour is what a remote does.
type behaviour uint8

const (
	healthy behaviour = iota
	slow              // answers after seconds
	refuses
	hangs // the connection never comes up
	mute  // connects, never answers
	limits
	gatewayDown
	cuts // answers, then breaks inside the body
	noName
	flaps // refuses and works in turn
	numBehaviours
)

type remote struct {
	name      matrix.ServerName
	does      behaviour
	connected bool
	running   int
	keys      int          // requests for keys that run
	sends     []sched.Time // of the last second
	triedAt   sched.Time   // of the last attempt
	failedAt  sched.Time   // of the last attempt that found it dead
	failures  int
	intent    bool // an intent for it is on disk and not yet used
	health
	txState
}

type request struct {
	bus.Arrived
	deadline sched.Time
	ended    bool // answered, refused or gone
	freed    bool
	gone     bool
	healed   bool  // came when all remotes were well
	try      int32 // how often its caller has come with it
	query    bool  // for keys
	wants    []matrix.KeyWant
}

type attempt struct {
	id       bus.OpID
	req      *request // nil for a delivery, keys, a connection and what was loaded
	txn      *packed  // of a delivery
	sent     bool     // some of which may have reached the remote
	host     *remote
	class    matrix.Class
	answered bool
	done     bool
	dropped  bool
	cancel   bool

	// The answer to a request.
	key      bus.Key
	endpoint *matrix.Endpoint
	status   int
	headers  sched.Time
	size     int64
	total    int64      // as the headers say, -1 if they do not
	arrived  int64      // as the core was told last
	passed   bool       // before all of it was there
	streamed sched.Time // to the last who got it before it was whole
	sentAt   sched.Time
	whole    bool
	ended    sched.Time // or was stored as of then
	private  bool
	said     [2]time.Duration // how long it is good for, and how long after that

	ahead   bool // only a connection
	servers []matrix.ServerName
	via     matrix.ServerName
	asks    []matrix.KeyWant
}

// World is one simulated run.
type World struct {
	seed    uint64
	profile Profile
	rng     *rand.Rand
	now     sched.Time
	end     sched.Time // no request arrives after it
	m       *bus.Machine
	future  sched.Timers[func()]

	endpoints []*matrix.Endpoint
	remotes   []*remote
	byName    map[matrix.ServerName]*remote
	reqs      map[bus.ReqID]*request
	atts      map[bus.OpID]*attempt
	disk      map[matrix.ServerName]bus.HostRecord
	kept      map[bus.Key]kept
	keys      keyWorld
	onceSent  map[bus.ReqID]bool
	lastReq   bus.ReqID
	drained   bool

	trace  interface{ Write([]byte) (int, error) }
	hash   func() uint64
	recent []string // the last effects and events, for the report
	Steps  int
	Counts map[string]int
	wakeAt sched.Time
	epoch  int // of the core: events of an earlier one are dropped

	bootedAt sched.Time
	jumped   time.Duration // how far the system's clock is from where it was

	out     *outboxWorld // nil: there is no outbox
	healed  bool
	ending  bool // in good order, to start again
	workers int  // the most that have been allowed
}

const origin = sched.Time(1_800_000_000_000_000_000)

// NewWorld draws a world from a seed.
func NewWorld(seed uint64, p Profile) *World {
	h := fnv.New64a()
	w := &World{seed: seed, profile: p, rng: rand.New(rand.NewPCG(seed, 1)), now: origin, trace: h, hash: h.Sum64,
		byName: map[matrix.ServerName]*remote{}, disk: map[matrix.ServerName]bus.HostRecord{}, kept: map[bus.Key]kept{}, Counts: map[string]int{}}
	c := &w.profile.Config
	if c.Workers == 0 {
		*c = bus.Default()
		c.Workers = sched.Slots(8 + w.rng.IntN(40))
		c.Unknown = 1 + sched.Slots(w.rng.IntN(int(c.Workers)))
		c.Failing = 1 + sched.Slots(w.rng.IntN(int(c.Workers)/4))
		c.HostConcurrency = 1 + int32(w.rng.IntN(6))
		c.HostRate = float64(1 + w.rng.IntN(30))
		c.HostBurst = 1 + int32(w.rng.IntN(20))
		c.MaxRequests = int32(20 + w.rng.IntN(300))
		c.MaxHosts = c.MaxRequests + 3*int32(c.Workers) + 5 + int32(w.rng.IntN(100))
		c.MaxHosts += 80 // a host that is forgotten may be tried too early
		w.drawAnswers(c)
		w.drawKeys(c)
	}
	if p.Lookups {
		w.drawLookups(c)
	}
	pick := func(v *int, lo, hi int) {
		if *v == 0 {
			*v = lo + w.rng.IntN(hi-lo)
		}
	}
	if p.Outbox != nil {
		pick(&w.profile.Hosts, 2, 14)
		w.drawOutbox()
		w.drawOutboxConfig(c)
	}
	pick(&w.profile.Hosts, 2, 80)
	pick(&w.profile.Requests, 200, 1500)
	pick(&w.profile.Faulty, 1, 70)
	if w.profile.Gap == 0 {
		w.profile.Gap = time.Duration(1+w.rng.IntN(100)) * time.Millisecond
	}
	for _, e := range matrix.All() {
		w.endpoints = append(w.endpoints, &e)
	}
	for i := range w.profile.Hosts {
		r := &remote{name: matrix.ServerName(fmt.Sprintf("h%d.test", i))}
		if w.rng.IntN(100) < w.profile.Faulty {
			r.does = 1 + behaviour(w.rng.IntN(int(numBehaviours)-1))
		}
		w.remotes = append(w.remotes, r)
		w.byName[r.name] = r
	}
	if w.out != nil {
		w.startOutbox()
	}
	w.boot()
	at := w.now
	for range w.profile.Requests {
		at = at.Add(time.Duration(w.rng.ExpFloat64() * float64(w.profile.Gap)))
		w.future.Set(at, w.arrive)
	}
	w.end = at
	if w.out != nil {
		w.end = w.scheduleOutbox(at)
		w.future.Set(w.end.Add(time.Minute), w.healOutbox)
	}
	if p.Lookups {
		w.scheduleLookups(at)
	}
	w.scheduleJumps(w.end)
	if w.profile.Crash {
		w.future.Set(w.now.Add(time.Duration(w.rng.Int64N(int64(at-w.now)))), w.crash)
	}
	return w
}

// boot starts a core with what the disk has.
func (w *World) boot() {
	if w.epoch++; w.epoch > 1 {
		w.reboot()
	}
	w.bootedAt = w.now
	w.drained = false
	w.reqs, w.atts, w.onceSent = map[bus.ReqID]*request{}, map[bus.OpID]*attempt{}, map[bus.ReqID]bool{}
	w.m = bus.New(w.profile.Config, rand.New(rand.NewPCG(w.seed, uint64(w.epoch))))
	for _, r := range w.remotes {
		r.connected, r.running, r.keys, r.sends, r.intent, r.spent = false, 0, 0, nil, false, 0
		// What a failure adds to the intent may not have reached the disk, and
		// with a full disk not even that.
		r.failedAt = min(r.failedAt, r.triedAt)
		if w.disk[r.name].Failures < int32(r.failures) {
			r.failures = 0
		}
	}
	w.bootKeys()
	w.bootHealth()
	var queues []bus.QueueRecord
	if w.out != nil {
		w.bootOutbox()
		queues = w.out.disk.records()
	}
	var records []bus.HostRecord
	for _, r := range w.remotes { // in a fixed order
		if rec, ok := w.disk[r.name]; ok {
			records = append(records, rec)
		}
	}
	w.step(bus.Restored{Hosts: records, Queues: queues, Answers: w.records(), Notary: w.remotes[0].name})
}

// crash loses everything but the disk. The homeserver's connections break.
func (w *World) crash() {
	w.Counts["crash"]++
	if w.out != nil {
		w.out.hs.broke()
	}
	w.boot()
}

// at has f called d from now, unless the core is restarted before.
func (w *World) at(d time.Duration, f func()) {
	epoch := w.epoch
	w.future.Set(w.now.Add(d), func() {
		if epoch == w.epoch {
			f()
		}
	})
}

func (w *World) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)))
}

func (w *World) arrive() {
	if w.out != nil && w.deaf() || w.ending {
		return
	}
	switch n := w.rng.IntN(20); {
	case n < 2:
		w.askKeys()
		return
	case n < 3:
		w.seeAhead()
	case n < 5:
		w.comesIn()
	}
	w.lastReq++
	ep := w.endpoints[w.rng.IntN(len(w.endpoints))]
	if w.rng.IntN(4) == 0 { // more of what is kept
		ep = matrix.Match("GET", []string{profilePath, "/_matrix/key/v2/server", "/_matrix/federation/v1/make_join/r/u"}[w.rng.IntN(3)])
	}
	if w.profile.Lookups {
		ep = w.lookup()
	}
	host := w.remotes[w.rng.IntN(len(w.remotes))]
	variant := w.rng.IntN(3)
	r := &request{Arrived: bus.Arrived{Req: w.lastReq, Dest: host.name, Endpoint: ep, Class: ep.Class, Received: w.now}}
	r.Key = keyOf(host.name, ep.Name, variant)
	if ep.Join == matrix.JoinSend {
		r.Key = keyOf(host.name, ep.Name, r.Req) // an event is signed once
	}
	if ep.Kind == matrix.AnswerProfile && w.rng.IntN(2) == 0 {
		r.Whole, r.Field = r.Key, []string{"displayname", "avatar_url"}[w.rng.IntN(2)]
		r.Key = keyOf(host.name, ep.Name, variant, r.Field)
	}
	if ep.Join != 0 {
		r.Room = fmt.Sprint("!r", variant)
	}
	w.begin(r)
	w.step(r.Arrived)
}

const profilePath = "/_matrix/federation/v1/query/profile"

// failf ends the run with the seed and what happened last.
func (w *World) failf(format string, args ...any) {
	panic(fmt.Sprintf("seed %d, %s after the start: %s\nlast events and effects:\n%s", w.seed, w.now.Sub(origin), fmt.Sprintf(format, args...), w.tail()))
}

func (w *World) tail() (s string) {
	for _, l := range w.recent {
		s += "  " + l + "\n"
	}
	return s
}

func (w *World) note(what string, v any) {
	line := fmt.Sprintf("%v %s %T%+v", w.now.Sub(origin), what, v, v)
	if a, ok := v.(bus.Arrived); ok {
		line = fmt.Sprintf("%v %s Arrived{%d %s %s class %s}", w.now.Sub(origin), what, a.Req, a.Dest, a.Endpoint.Name, a.Class)
	}
	fmt.Fprintln(w.trace, line)
	if _, ok := v.(bus.Progress); ok {
		return // they are many
	}
	w.recent = append(w.recent, line)
	if len(w.recent) > 60 {
		w.recent = w.recent[20:]
	}
}

func (w *World) step(ev bus.Event) {
	if w.out != nil && w.out.dead {
		return
	}
	w.Steps++
	w.note("<-", ev)
	drained := w.drained
	effects := w.m.Step(w.now, ev, nil)
	if w.out != nil {
		if drained && len(effects) > 0 {
			w.failf("%T%+v after Drained", effects[0], effects[0])
		}
		effects = w.cutByCrash(effects)
	}
	for _, e := range effects {
		w.note("->", e)
		w.do(e)
	}
	if w.out != nil && w.Steps%32 == 0 {
		w.look()
	}
	if err := w.m.Check(); err != nil {
		w.failf("%v", err)
	}
	w.wakeAt, _ = w.m.NextWake()
}

// Run lets the world go on until nothing is left to happen, and returns a hash
// over all events and effects.
func (w *World) Run() uint64 {
	for {
		if w.out != nil && w.out.dead {
			w.crash()
		}
		next, ok := w.future.Next()
		wake, awake := w.m.NextWake()
		switch {
		case awake && (!ok || wake <= next):
			w.now = max(w.now, wake)
			w.step(bus.Tick{})
		case ok:
			w.now = next
			f, _ := w.future.Due(w.now)
			f()
		case !w.healed:
			w.healed = true
			w.heal()
		default:
			w.rest()
			return w.hash()
		}
	}
}

// heal ends all faults and asks each remote once more, after the longest
// back-off: every one must answer.
func (w *World) heal() {
	w.now = w.now.Add(25 * time.Hour)
	for i, r := range w.remotes {
		r.does = healthy
		w.lastReq++
		ep := w.endpoints[0]
		q := &request{Arrived: bus.Arrived{Req: w.lastReq, Dest: r.name, Endpoint: ep, Class: ep.Class, Key: keyOf("healed", i)}, healed: true}
		w.at(time.Duration(i)*200*time.Millisecond, func() {
			q.Received = w.now
			q.deadline = w.now.Add(ep.Timeout)
			w.reqs[q.Req] = q
			w.step(q.Arrived)
		})
		w.at(time.Duration(i)*200*time.Millisecond+ep.Timeout, func() {
			if !q.ended {
				w.failf("request %d to %s is unanswered", q.Req, r.name)
			}
		})
	}
	w.Counts["healed"] = len(w.remotes)
	w.at(time.Hour, func() { w.step(bus.Draining{}) })
}

// rest checks that nothing is left.
func (w *World) rest() {
	for _, r := range w.reqs {
		if !r.ended || !r.freed {
			w.failf("at rest, request %d to %s: ended %t, freed %t", r.Req, r.Dest, r.ended, r.freed)
		}
	}
	s := w.m.Snapshot(w.now, 10)
	if s.Workers.Used != 0 || s.Requests.Used != 0 {
		w.failf("at rest, %d workers and %d requests are in use", s.Workers.Used, s.Requests.Used)
	}
	if !w.drained {
		w.failf("at rest, but not drained")
	}
	w.restAnswers()
	w.restLookups()
	if w.out != nil {
		w.restOutbox()
	}
	if got := w.Counts["healed reply"]; got != w.Counts["healed"] {
		w.failf("%d of %d healthy hosts answered after healing", got, w.Counts["healed"])
	}
}

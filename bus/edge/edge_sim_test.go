package edge

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

var (
	simSeedFlag  = flag.Uint64("edgeseed", 0, "run only this seed, in every profile")
	simSeedsFlag = flag.Uint64("edgeseeds", 40, "how many seeds to run in each profile")
)

// simProfile shapes a run.
type simProfile struct {
	origins, txns int // servers, and transactions of each
	forged        int // requests in forged names
	blackholes    int // that these names are of, whose servers do not answer; 0: each has its own
	slow          int // servers whose transactions the homeserver waits long over
	hoarders      int // servers that send a dozen transactions at once, again and again
	questions     int
	ephemeral     int  // per cent of the transactions
	copies        int  // of each transaction that are sent at once, at most
	parallel      bool // some servers do not wait for answers
	trouble       bool // the homeserver goes away, gets slow, loses requests
	crash         bool // the bus is killed now and then
	joins         bool
	config        func(*Config, *rand.Rand)
	reaches       []string // what some seed must reach
}

var simProfiles = map[string]simProfile{
	"calm": {origins: 10, txns: 8, questions: 60, ephemeral: 30, copies: 1, joins: true,
		reaches: []string{"held for a join"}},
	"retry storm": {origins: 25, txns: 3, questions: 50, ephemeral: 10, copies: 10, parallel: true,
		reaches: []string{"joined", "replay", "shared"}},
	"presence storm": {origins: 120, txns: 2, questions: 20, ephemeral: 90, copies: 1, parallel: true,
		config:  func(c *Config, rng *rand.Rand) { c.EphemeralRate = 1 + 5*rng.Float64() },
		reaches: []string{"shed superseded", "shed expired", "shed held", "shed room", "shed dropped"}},
	"flood": {origins: 8, txns: 5, forged: 1500, questions: 100, ephemeral: 20, copies: 1,
		reaches: []string{"forged", "fetch denied", "refused full", "refused denied"}},
	"trouble": {origins: 15, txns: 5, questions: 120, ephemeral: 30, copies: 3, parallel: true, trouble: true, joins: true,
		reaches: []string{"down", "refused time", "refused homeserver", "homeserver lost it", "stalled", "gone"}},
	"crash": {origins: 15, txns: 6, questions: 60, ephemeral: 30, copies: 4, parallel: true, trouble: true, crash: true, forged: 100,
		reaches: []string{"crash", "replay", "twice after a crash"}},
	"tight": {origins: 30, txns: 4, questions: 600, ephemeral: 40, copies: 2, parallel: true, trouble: true, crash: true, joins: true,
		config: func(c *Config, rng *rand.Rand) {
			c.Requests, c.Unverified, c.Verifying, c.Origins = 30+rng.Int32N(30), 40, 4, 500
			c.Concurrency, c.Parallel, c.TxnQueue = 1+rng.Int32N(3), 2, 1+rng.Int32N(3)
			c.EphemeralWaiting = 5
		},
		reaches: []string{"evicted", "refused full", "shed room", "reconfigured", "aged"}},
	"questions": {origins: 2, txns: 5, questions: 900, ephemeral: 20, copies: 1, parallel: true,
		reaches: []string{"refused rate", "shared", "gone", "event"}},
}

// simWorld is one simulated run.
type simWorld struct {
	t       *testing.T
	p       simProfile
	rng     *rand.Rand
	now     sched.Time
	future  sched.Timers[func()]
	m       *Machine
	cfg     Config
	life    int // how many machines there were
	healing bool
	hash    uint64
	steps   int
	counts  map[string]int

	nextReq ReqID
	reqs    map[ReqID]*simReq
	open    int // not answered
	ops     map[OpID]*simOp
	txns    []*simTxn
	stored  map[txnKey]bool // on disk
	keys    map[matrix.ServerName]bool
	fetches []sched.Time
	windows map[string]sched.Time // rooms being joined: when that is over; 0: not yet
	drained bool

	checkEvery int             // steps; 0: each
	steady     bool            // nobody gives up, nothing is configured anew
	took       []time.Duration // until transactions with events were answered
	turnedAway int             // good requests
	noEvents   int             // of them, transactions with events

	up       bool
	slow     int                           // how much slower than usual the homeserver is
	working  map[matrix.ServerName]*simTxn // transactions at the homeserver
	atHome   int                           // requests at the homeserver
	answered map[txnKey]bool               // that the homeserver remembers
	alive    map[matrix.ServerName]*simTxn // unused servers have none
	verifies map[ReqID]bool                // under way
	looking  map[ReqID]bool                // under way
	batches  map[BatchID][]Stored          // being written
}

type simTruth uint8

const (
	isGood simTruth = iota
	isForged
	isKeyless // no key for it can be had
	isHostile // its signature is good, but it means no good
)

type simReq struct {
	Arrived
	truth    simTruth
	deadline sched.Time
	life     int
	answered bool
	freed    bool
	txn      *simTxn
	then     func(ok bool) // the sender's next move
	verified bool
	tries    int
}

type simOp struct {
	id        OpID
	req       *simReq
	life      int
	status    int
	done      bool
	failed    bool
	discarded bool
	cancelled bool
	recorded  bool // on disk, or the disk has failed to
}

type simTxn struct {
	*Txn
	origin  matrix.ServerName
	acked   bool // the sender has a 200
	given   bool // the homeserver has given one
	real    bool // the sender has one that the homeserver gave, after it was stored
	open    bool // an attempt whose end nobody knows of, or that ended in nothing
	forward int
	lost    bool // what was known of it died with the bus, or the disk failed
}

func (w *simWorld) failf(format string, args ...any) {
	panic(fmt.Sprintf("step %d: ", w.steps) + fmt.Sprintf(format, args...))
}

func newSimWorld(t *testing.T, seed uint64, p simProfile) *simWorld {
	w := &simWorld{
		t: t, p: p, rng: rand.New(rand.NewPCG(seed, 7)), now: sched.FromStored(1_800_000_000_000),
		counts: map[string]int{}, reqs: map[ReqID]*simReq{}, ops: map[OpID]*simOp{}, stored: map[txnKey]bool{},
		keys: map[matrix.ServerName]bool{}, windows: map[string]sched.Time{}, up: true, slow: 1,
		working: map[matrix.ServerName]*simTxn{},
	}
	c := Default()
	c.Concurrency, c.Parallel = 1+w.rng.Int32N(6), 2+w.rng.Int32N(6)
	c.TxnQueue = 1 + w.rng.Int32N(8)
	c.KeyFetches = 4 + w.rng.Int32N(40)
	c.Ephemeral = EphemeralMode(w.rng.IntN(3))
	c.NoKey = NoKeyPolicy(w.rng.IntN(2))
	c.EphemeralRate = 1 + 20*w.rng.Float64()
	c.EphemeralShare = 0.05 + 0.9*w.rng.Float64()
	c.EphemeralHold = time.Duration(1+w.rng.IntN(49)) * time.Second
	c.EphemeralWaiting = 20 + w.rng.Int32N(100)
	c.Unverified = 20 + w.rng.Int32N(200)
	c.Deny = []string{"denied*"}
	if p.config != nil {
		p.config(&c, w.rng)
	}
	w.cfg = c
	for n := range p.origins {
		w.keys[matrix.ServerName(fmt.Sprintf("s%d.test", n))] = w.rng.IntN(5) > 0
	}
	w.boot()
	return w
}

func (w *simWorld) boot() {
	w.life++
	w.m = New(w.cfg, rand.New(rand.NewPCG(w.rng.Uint64(), 1)))
	w.verifies, w.looking, w.batches = map[ReqID]bool{}, map[ReqID]bool{}, map[BatchID][]Stored{}
	w.fetches = nil
}

func (w *simWorld) after(d time.Duration, f func()) { w.future.Set(w.now.Add(d), f) }

// later is after, for what dies with the bus.
func (w *simWorld) later(d time.Duration, f func()) {
	life := w.life
	w.after(d, func() {
		if w.life == life {
			f()
		}
	})
}

func (w *simWorld) between(a, b time.Duration) time.Duration {
	return a + time.Duration(w.rng.Int64N(int64(b-a)+1))
}

// step gives the machine an event, and does what it wants.
func (w *simWorld) step(ev Event) {
	w.steps++
	out := w.m.Step(w.now, ev, nil)
	if w.checkEvery > 1 && w.steps%w.checkEvery != 0 {
	} else if err := w.m.Check(); err != nil {
		w.failf("after %T%+v: %v", ev, ev, err)
	}
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %d %T", w.hash, w.now, ev)
	for _, e := range out {
		switch e := e.(type) {
		case Record:
			fmt.Fprintf(h, "Record %d %d", e.Batch, len(e.Answers))
		default:
			fmt.Fprintf(h, "%T%+v", e, e)
		}
	}
	w.hash = h.Sum64()
	for _, e := range out {
		w.do(e)
	}
	running := [2]int{}
	perOrigin := map[matrix.ServerName]int{}
	for _, op := range w.ops {
		if op.life == w.life && !op.done {
			if op.req.txn != nil && op.req.verified {
				running[0]++
				if perOrigin[op.req.Origin]++; perOrigin[op.req.Origin] > 1 {
					w.failf("two transactions of %s are at the homeserver", op.req.Origin)
				}
			} else {
				running[1]++
			}
		}
	}
	if running[0] > int(w.m.lanes[laneTxn].slots.Max) || running[1] > int(w.m.lanes[laneOther].slots.Max) || !w.m.changed && (running[0] > int(w.cfg.Concurrency) || running[1] > int(w.cfg.Parallel)) {
		w.failf("%v run at a time, of %d and %d", running, w.cfg.Concurrency, w.cfg.Parallel)
	}
}

func (w *simWorld) held(id ReqID) *simReq {
	r := w.reqs[id]
	if r == nil || r.freed || r.life != w.life {
		w.failf("the body of request %d is used, which is not held", id)
	}
	return r
}

func (w *simWorld) do(e Effect) {
	switch e := e.(type) {
	case Verify:
		r := w.held(e.Req)
		w.verifies[e.Req] = true
		if r.Origin == "" || r.Endpoint.Unsigned {
			w.failf("a signature of an unsigned request")
		}
		d := w.between(0, 20*time.Millisecond)
		if e.MayFetch {
			w.counts["fetch"]++
			w.fetches = append(w.fetches, w.now)
			n := 0
			for _, at := range w.fetches {
				if w.now.Sub(at) < time.Minute {
					n++
				}
			}
			if n > int(w.cfg.KeyFetches) && !w.m.changed {
				w.failf("%d fetches in a minute, %d may be", n, w.cfg.KeyFetches)
			}
			d = w.between(20*time.Millisecond, 4*time.Second)
			if r.truth == isKeyless && w.p.blackholes > 0 {
				d = 20 * time.Second
			}
		}
		w.later(d, func() {
			v := Verified{Req: e.Req, Verdict: NoKey, Tried: e.MayFetch && w.rng.IntN(5) > 0 || w.rng.IntN(20) == 0}
			if e.MayFetch && r.truth != isKeyless && w.rng.IntN(10) > 0 {
				w.keys[r.Origin] = true
			}
			if w.keys[r.Origin] {
				v.Verdict = Good
				if r.truth == isForged {
					v.Verdict = Forged
				}
			}
			if r.truth == isKeyless {
				v.Verdict = NoKey
			}
			r.verified = v.Verdict == Good
			delete(w.verifies, e.Req)
			w.step(v)
		})
	case Look:
		r := w.held(e.Req)
		if !r.verified {
			w.failf("request %d is looked up, but is not verified", e.Req)
		}
		w.looking[e.Req] = true
		w.later(w.between(0, 30*time.Millisecond), func() {
			delete(w.looking, e.Req)
			if r.Txn == nil {
				w.step(Looked{Req: e.Req, Found: w.hasEvent(r.Arrived)})
				return
			}
			w.step(Looked{Req: e.Req, Found: w.stored[txnKey{r.Origin, r.Txn.ID}]})
		})
	case Forward:
		w.forward(e)
	case Cancel:
		op := w.ops[e.Op]
		if op.done || op.cancelled {
			w.failf("attempt %d is cancelled, but has ended", e.Op)
		}
		op.cancelled = true
		w.later(w.between(0, 10*time.Millisecond), func() {
			if !op.done {
				w.end(op, Done{Op: op.id, Failure: matrix.FailCancelled})
			}
		})
	case Reply:
		w.reply(e)
	case Replay:
		r := w.reqs[e.Req]
		if r.Txn == nil && r.Look && r.verified && w.hasEvent(r.Arrived) {
			w.counts["event"]++
			w.answer(e.Req, true)
			return
		}
		k := txnKey{r.Origin, r.Txn.ID}
		if !r.verified || !w.stored[k] || e.FromPDUs {
			w.failf("request %d gets an answer that is not there", e.Req)
		}
		w.counts["replay"]++
		w.answer(e.Req, true)
	case Differs:
		w.counts["differs"]++
	case Empty:
		r := w.reqs[e.Req]
		if r.Txn == nil || !r.Txn.Ephemeral || !r.verified || w.cfg.Ephemeral == PassEphemeral && !w.m.changed {
			w.failf("request %d is acknowledged without the homeserver", e.Req)
		}
		w.counts["empty"]++
		w.answer(e.Req, true)
	case Refuse:
		w.refused(e)
	case Record:
		w.write(e)
	case Alive:
		w.counts["alive"]++
	case Free:
		r := w.held(e.Req)
		r.freed = true
		for _, op := range w.ops {
			if op.req == r && !op.done && op.life == w.life {
				w.failf("request %d is freed while attempt %d runs", e.Req, op.id)
			}
		}
		if w.verifies[e.Req] || w.looking[e.Req] {
			w.failf("request %d is freed while it is looked at", e.Req)
		}
		w.forget(r)
	case Discard:
		op := w.ops[e.Op]
		if !op.done || op.discarded {
			w.failf("attempt %d is discarded, done %t, before %t", e.Op, op.done, op.discarded)
		}
		op.discarded = true
		delete(w.ops, e.Op)
	case Drained:
		w.drained = true
	}
}

// hasEvent reports whether the outbox has the event that is asked for.
func (w *simWorld) hasEvent(a Arrived) bool { return a.Look && a.Key[0]%2 == 0 }

func (w *simWorld) forget(r *simReq) {
	if r.freed && r.answered {
		delete(w.reqs, r.Req)
	}
}

// answer notes that a request has its answer.
func (w *simWorld) answer(id ReqID, ok bool) {
	r := w.reqs[id]
	if r == nil || r.answered {
		w.failf("request %d is answered twice", id)
	}
	if w.now > r.deadline.Add(time.Second) {
		w.failf("request %d is answered %s late", id, w.now.Sub(r.deadline))
	}
	r.answered = true
	w.open--
	w.forget(r)
	if ok && r.txn != nil {
		r.txn.acked = true
		if r.txn.PDUs > 0 && r.truth == isGood {
			w.took = append(w.took, w.now.Sub(r.Received))
		}
	}
	if !ok && r.truth == isGood {
		w.turnedAway++
		if r.txn != nil && r.txn.PDUs > 0 {
			w.noEvents++
		}
	}
	if then := r.then; then != nil {
		r.then = nil
		w.after(w.between(0, 50*time.Millisecond), func() { then(ok) })
	}
}

func (w *simWorld) reply(e Reply) {
	r, op := w.reqs[e.Req], w.ops[e.Op]
	switch {
	case op == nil || op.discarded || op.status == 0:
		w.failf("request %d gets the answer of attempt %d, which is not there", e.Req, e.Op)
	case op.req.Origin != r.Origin || op.req.Endpoint != r.Endpoint:
		w.failf("request %d of %s gets the answer to one of %s", e.Req, r.Origin, op.req.Origin)
	case r.Txn != nil && op.req.Txn.ID != r.Txn.ID || r.Txn == nil && op.req.Key != r.Key:
		w.failf("request %d gets the answer to another one", e.Req)
	case op.req != r && (!r.verified && r.Origin != "" || op.req.verified != r.verified):
		w.failf("request %d, verified %t, shares an answer", e.Req, r.verified)
	}
	if r.txn != nil && r.verified {
		switch early := w.now < r.deadline; {
		case !op.done || op.failed:
			w.failf("transaction %s of %s is answered before its answer is complete", r.Txn.ID, r.Origin)
		case op.status == 200 && !r.Txn.Ephemeral && !op.recorded && early:
			w.failf("transaction %s of %s is answered before that is stored", r.Txn.ID, r.Origin)
		}
	}
	w.counts["reply"]++
	if op.req != r {
		w.counts["shared"]++
	}
	if op.status == 200 && r.txn != nil && w.stored[txnKey{r.Origin, r.Txn.ID}] {
		r.txn.real = true
	}
	w.answer(e.Req, op.status == 200)
}

func (w *simWorld) refused(e Refuse) {
	r := w.reqs[e.Req]
	w.counts[fmt.Sprintf("refused %d", e.Status)]++
	switch e.Status {
	case 429:
		n := 0
		for _, q := range w.reqs {
			if q.Origin == r.Origin && !q.answered && q.Txn == nil && q.life == w.life {
				n++
			}
		}
		if r.Txn != nil || n <= synapseQueue {
			w.failf("429 for request %d of %s, which has %d", e.Req, r.Origin, n)
		}
	case 403:
		if r.Origin != "denied.test" {
			w.failf("%s is denied", r.Origin)
		}
	case 401:
		if r.truth == isGood && w.cfg.NoKey == PassNoKey && !w.m.changed {
			w.failf("a good request %d is refused with 401", e.Req)
		}
	}
	if e.Status == 503 && e.RetryAfter <= 0 {
		w.failf("503 for request %d without Retry-After", e.Req)
	}
	w.answer(e.Req, false)
}

// write has the disk store answers. Sometimes it cannot.
func (w *simWorld) write(e Record) {
	if len(w.batches) > 0 {
		w.failf("two writes at a time")
	}
	w.batches[e.Batch] = e.Answers
	for _, a := range e.Answers {
		if a.Op != 0 {
			if op := w.ops[a.Op]; op == nil || op.discarded || op.failed || op.status != 200 || op.req.Origin != a.Origin || op.req.Txn.ID != a.Txn.ID || !op.req.verified {
				w.failf("the answer of attempt %d is stored for %s of %s", a.Op, a.Txn.ID, a.Origin)
			}
		} else if !a.Txn.Ephemeral {
			w.failf("transaction %s of %s is stored as dropped", a.Txn.ID, a.Origin)
		}
	}
	ok := w.healing || w.rng.IntN(50) > 0
	w.later(w.between(0, 200*time.Millisecond), func() {
		for _, a := range e.Answers {
			if ok {
				w.stored[txnKey{a.Origin, a.Txn.ID}] = true
			} else {
				for _, t := range w.txns {
					if t.origin == a.Origin && t.ID == a.Txn.ID {
						t.lost = true
					}
				}
			}
			if op := w.ops[a.Op]; op != nil {
				op.recorded = true
			}
		}
		delete(w.batches, e.Batch)
		// The write may be done without the bus living to hear of it.
		if w.p.crash && !w.healing && w.rng.IntN(20) == 0 {
			w.crash()
			return
		}
		w.step(Recorded{Batch: e.Batch, OK: ok})
	})
}

// forward is the homeserver.
func (w *simWorld) forward(e Forward) {
	r := w.held(e.Req)
	op := &simOp{id: e.Op, req: r, life: w.life}
	if w.ops[e.Op] != nil {
		w.failf("attempt %d is begun twice", e.Op)
	}
	w.ops[e.Op] = op
	w.counts["forward"]++
	switch {
	case r.verified || r.Endpoint.Unsigned:
	case w.cfg.NoKey == RefuseNoKey && !w.m.changed:
		w.failf("request %d of %s is forwarded unverified", e.Req, r.Origin)
	}
	if r.tries++; !w.up {
		w.counts["down"]++
		w.later(w.between(0, 5*time.Millisecond), func() {
			if !op.done {
				w.end(op, Done{Op: op.id, Failure: matrix.FailRefused, Unsent: true})
			}
		})
		return
	}
	txn := r.txn
	if txn != nil && r.verified {
		if w.stored[txnKey{r.Origin, r.Txn.ID}] {
			w.failf("transaction %s of %s is forwarded, but stored", r.Txn.ID, r.Origin)
		}
		if txn.real {
			w.failf("transaction %s of %s is forwarded after its sender has the answer", r.Txn.ID, r.Origin)
		}
		if txn.forward++; txn.forward > 1 && !txn.open && !txn.lost {
			w.failf("transaction %s of %s is forwarded again for no reason", r.Txn.ID, r.Origin)
		}
		if txn.forward > 1 && txn.lost && txn.given {
			w.counts["twice after a crash"]++
		}
		txn.open = false
		for _, room := range r.Txn.Rooms {
			if over, joining := w.windows[room]; joining && (over == 0 || w.now < over.Add(afterJoin)) && w.now < r.Received.Add(w.cfg.JoinHold) && txn.PDUs > 0 && r.tries == 1 && !w.m.changed && w.m.joins.rooms[room] != nil {
				w.failf("transaction %s of %s goes while %s is being joined", r.Txn.ID, r.Origin, room)
			}
		}
	}
	if r.truth != isGood && r.truth != isHostile {
		w.reject(op)
		return
	}
	if txn != nil && r.verified {
		if other := w.working[r.Origin]; other != nil && other != txn {
			if w.life == 1 && !w.p.trouble && w.p.slow == 0 {
				w.failf("the homeserver has two transactions of %s", r.Origin)
			}
			w.counts["429"]++
			w.status(op, 429, time.Second, w.between(0, 5*time.Millisecond))
			return
		}
		w.working[r.Origin] = txn
	}
	d := w.between(5*time.Millisecond, 15*time.Millisecond) * time.Duration((w.atHome+1)*w.slow)
	busy := 1
	if strings.HasPrefix(string(r.Origin), "slow") { // which costs it nothing
		d += w.between(20*time.Second, 90*time.Second)
		busy = 0
	}
	kind := w.rng.IntN(100)
	if w.healing || !w.p.trouble {
		kind = 99
	}
	switch {
	case kind < 3: // it waits for somebody's keys
		d += w.between(time.Second, 20*time.Second)
	case kind < 5: // it never answers
		d = 60 * time.Second
	}
	life := w.life
	w.atHome += busy
	w.after(d, func() {
		w.atHome -= busy
		if w.working[r.Origin] == txn {
			delete(w.working, r.Origin)
		}
		switch {
		case kind < 5 && kind >= 3, !w.up:
			w.counts["homeserver lost it"]++
			if w.life == life && !op.done {
				f := matrix.FailTimeout
				if !w.up {
					f = matrix.FailReset
				}
				w.end(op, Done{Op: op.id, Failure: f})
			}
		case kind < 8:
			if w.life == life && !op.done {
				w.status(op, []int{500, 502, 503}[w.rng.IntN(3)], 0, 0)
			}
		default:
			if txn != nil {
				txn.given = true
			}
			if w.life == life && !op.done {
				w.status(op, 200, 0, 0)
			}
		}
	})
}

func (w *simWorld) reject(op *simOp) { w.status(op, 401, 0, w.between(0, 10*time.Millisecond)) }

// status has the homeserver answer.
func (w *simWorld) status(op *simOp, status int, retry, in time.Duration) {
	w.later(in, func() {
		if op.done {
			return
		}
		op.status = status
		w.step(Answered{Op: op.id, Status: status, RetryAfter: retry})
		w.later(w.between(0, 10*time.Millisecond), func() {
			if op.done {
				return
			}
			d := Done{Op: op.id}
			if w.p.trouble && !w.healing && w.rng.IntN(50) == 0 {
				d.Failure = matrix.FailCut
			}
			w.end(op, d)
		})
	})
}

// end is the end of an attempt.
func (w *simWorld) end(op *simOp, d Done) {
	op.done = true
	op.failed = d.Failure != matrix.FailNone
	if t := op.req.txn; t != nil && (d.Failure != matrix.FailNone || op.status != 200) {
		t.open = true
	}
	w.step(d)
}

// arrive sends a request; then is called with whether it was answered with 200.
func (w *simWorld) arrive(a Arrived, truth simTruth, txn *simTxn, then func(bool)) *simReq {
	w.nextReq++
	a.Req, a.Received = w.nextReq, w.now
	a.Class = a.Endpoint.Class
	if a.Size == 0 {
		a.Size = 100 + w.rng.Int64N(100_000)
	}
	r := &simReq{Arrived: a, truth: truth, deadline: w.now.Add(a.Endpoint.Timeout - min(time.Second, a.Endpoint.Timeout/20)), life: w.life, txn: txn, then: then}
	w.reqs[a.Req] = r
	w.open++
	if !w.healing && !w.steady && w.rng.IntN(30) == 0 {
		w.later(w.between(0, 5*time.Second), func() {
			if !r.answered {
				w.counts["gone"]++
				w.cut(r)
				w.step(Gone{a.Req})
			}
		})
	}
	w.step(a)
	return r
}

// cut ends a request without an answer.
func (w *simWorld) cut(r *simReq) {
	r.answered = true
	w.open--
	w.forget(r)
	if then := r.then; then != nil {
		r.then = nil
		w.after(w.between(0, 50*time.Millisecond), func() { then(false) })
	}
}

// crash kills the bus. What the homeserver has goes on there.
func (w *simWorld) crash() {
	w.counts["crash"]++
	w.tally()
	var ids []ReqID
	for id := range w.reqs {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, t := range w.txns {
		if !w.stored[txnKey{t.origin, t.ID}] {
			t.lost = true
		}
	}
	life := w.life
	w.boot()
	for _, id := range ids {
		r := w.reqs[id]
		r.freed = true
		if !r.answered {
			r.life = life
			w.cut(r)
		} else {
			w.forget(r)
		}
	}
	clear(w.ops)
	clear(w.windows)
}

// tally adds the machine's own counts to those of the run.
func (w *simWorld) tally() {
	s := &w.m.stats
	for i, n := range s.Shed {
		w.counts["shed "+Shed(i).String()] += int(n)
	}
	for i, n := range s.Refused {
		w.counts["refused "+Refusal(i).String()] += int(n)
	}
	w.counts["joined"] += int(s.Joined)
	w.counts["forged"] += int(s.Forged)
	w.counts["fetch denied"] += int(s.FetchesDenied)
	w.counts["passed"] += int(s.Passed)
	w.counts["evicted"] += int(s.Evicted)
	w.counts["stalled"] += int(s.Stalled)
	w.counts["broken off"] += int(s.BrokenOff)
	w.counts["parked denied"] += int(s.ParkedDenied)
	w.counts["displaced"] += int(s.Displaced)
	w.counts["held for a join"] += int(s.Held)
	w.counts["aged"] += int(s.Aged)
}

// sender sends its transactions one after the other, each until it is taken.
func (w *simWorld) sender(n int) {
	name := matrix.ServerName(fmt.Sprintf("s%d.test", n))
	send := matrix.Match("PUT", "/_matrix/federation/v1/send/1")
	eager := w.p.parallel && w.rng.IntN(3) == 0
	var begin func(i int)
	begin = func(i int) {
		if i >= w.p.txns {
			return
		}
		t := &simTxn{origin: name, Txn: w.content(n, i)}
		w.txns = append(w.txns, t)
		copies := 1 + w.rng.IntN(w.p.copies)
		tries := 0
		var attempt func()
		attempt = func() {
			tries++
			left := copies
			for range copies {
				w.arrive(Arrived{Origin: name, Keys: []string{"ed25519:1"}, Peer: fmt.Sprint("p", n%7), Endpoint: send, Key: sha256.Sum256([]byte(name + matrix.ServerName(t.ID))), Txn: t.Txn}, isGood, t, func(bool) {
					if left--; left > 0 {
						return
					}
					if t.acked {
						if w.rng.IntN(4) == 0 && copies > 1 { // it lost the answer
							copies = 1
							w.after(w.between(0, 5*time.Second), attempt)
							return
						}
						if !eager {
							w.after(w.between(0, 3*time.Second), func() { begin(i + 1) })
						}
						return
					}
					w.after(w.between(100*time.Millisecond, 5*time.Second), attempt)
				})
			}
		}
		attempt()
		if eager {
			w.after(w.between(0, time.Second), func() { begin(i + 1) })
		}
	}
	w.after(w.between(0, 10*time.Second), func() { begin(0) })
}

// content draws what a transaction holds.
func (w *simWorld) content(n, i int) *Txn {
	id := fmt.Sprintf("%d-%d", n, i)
	t := &Txn{ID: id, BodyHash: sha256.Sum256([]byte(id))}
	switch {
	case w.rng.IntN(100) < w.p.ephemeral:
		t.Ephemeral, t.EDUs = true, 1
		for k := range uint64(6) {
			if w.rng.IntN(2) == 0 {
				t.Covers = append(t.Covers, k)
			}
		}
		if w.rng.IntN(3) == 0 {
			t.Expires = w.now.Add(w.between(0, 30*time.Second))
		}
		t.Items[matrix.KindPresence] = 1
	case w.rng.IntN(3) == 0:
		t.EDUs, t.Items[matrix.KindReceipt] = 1, 1
	default:
		t.PDUs, t.Items[matrix.KindPDU] = 2, 2
		t.Rooms = []string{fmt.Sprint("!", w.rng.IntN(4)), fmt.Sprint("!", w.rng.IntN(4))}
	}
	return t
}

// hostile has servers send some transactions at once, again and again for a minute,
// whatever the answer.
func (w *simWorld) hostile(name string, servers, txns int, every time.Duration) {
	send := matrix.Match("PUT", "/_matrix/federation/v1/send/1")
	for n := range servers {
		origin := matrix.ServerName(fmt.Sprintf("%s%d.test", name, n))
		w.keys[origin] = true
		for at := w.between(0, every); at < time.Minute; at += every {
			w.after(at, func() {
				for i := range txns {
					t := pdus(fmt.Sprint(w.now, i), "!far")
					w.arrive(Arrived{Origin: origin, Keys: []string{"ed25519:1"}, Peer: fmt.Sprint(name, n%3), Endpoint: send, Key: sha256.Sum256([]byte(fmt.Sprint(origin, t.ID))), Txn: t, Size: 1000}, isHostile, &simTxn{origin: origin, Txn: t}, nil)
				}
			})
		}
	}
}

func (w *simWorld) run() *simWorld {
	for n := range w.p.origins {
		w.sender(n)
	}
	targets := []string{"state_ids/r?event_id=1", "backfill/r?v=1", "event_auth/r/e", "event/1", "event/2", "query/profile?user_id=1", "make_join/r/u", "version"}
	busy := matrix.ServerName(fmt.Sprintf("s%d.test", w.rng.IntN(w.p.origins)))
	for i := range w.p.questions {
		w.after(w.between(0, 30*time.Second), func() {
			o := matrix.ServerName(fmt.Sprintf("s%d.test", w.rng.IntN(w.p.origins)))
			target := "/_matrix/federation/v1/" + targets[w.rng.IntN(len(targets))]
			method := "GET"
			switch w.rng.IntN(8) {
			case 0:
				method, target = "POST", "/_matrix/federation/v1/get_missing_events/r"
			case 1:
				method, target = "POST", "/_matrix/federation/v1/user/keys/claim"
			case 2, 3, 4:
				o, target = busy, fmt.Sprint("/_matrix/federation/v1/event/n", i)
			}
			ep := matrix.Match(method, target)
			a := Arrived{Origin: o, Keys: []string{"ed25519:1"}, Peer: fmt.Sprint("p", i%7), Endpoint: ep}
			if ep.Unsigned {
				a.Origin, o = "", ""
			}
			a.Key = sha256.Sum256([]byte(string(o) + method + target))
			a.Look = ep.Name == "event" && a.Key[1]%2 == 0
			w.arrive(a, isGood, nil, nil)
		})
	}
	for i := range w.p.forged {
		w.after(w.between(5*time.Second, 9*time.Second), func() {
			truth := isForged
			if w.rng.IntN(3) > 0 {
				truth = isKeyless
			}
			name := matrix.ServerName(fmt.Sprintf("x%d.test", i))
			if w.p.blackholes > 0 {
				name, truth = matrix.ServerName(fmt.Sprintf("x%d.test", i%w.p.blackholes)), isKeyless
			}
			switch w.rng.IntN(10) {
			case 0:
				name = "denied.test"
			case 1, 2:
				name, truth = matrix.ServerName(fmt.Sprintf("s%d.test", w.rng.IntN(w.p.origins))), isForged
			}
			t := w.content(100_000, i)
			// Its own name for the transaction, so that none can be taken for it.
			w.arrive(Arrived{Origin: name, Keys: []string{fmt.Sprint("ed25519:", i)}, Peer: fmt.Sprint("evil", i%3), Endpoint: matrix.Match("PUT", "/_matrix/federation/v1/send/1"), Key: sha256.Sum256([]byte(fmt.Sprint(i))), Txn: t}, truth, nil, nil)
		})
	}
	w.hostile("slow", w.p.slow, 2, 20*time.Second)
	w.hostile("hoarder", w.p.hoarders, 12, 2*time.Second)
	if w.p.trouble {
		for range 1 + w.rng.IntN(4) {
			w.after(w.between(2*time.Second, 60*time.Second), func() {
				w.up = false
				w.after(w.between(time.Second, 80*time.Second), func() { w.up = true })
			})
		}
		w.after(w.between(0, 40*time.Second), func() {
			w.slow = 1 + w.rng.IntN(40)
			w.after(w.between(0, 40*time.Second), func() { w.slow = 1 })
		})
		w.after(w.between(0, 40*time.Second), func() { w.step(Pressure{Hundredths: w.rng.Int32N(10000)}) })
	}
	if w.p.crash {
		for range 1 + w.rng.IntN(4) {
			w.after(w.between(2*time.Second, 60*time.Second), w.crash)
		}
	}
	if w.p.joins {
		for range 1 + w.rng.IntN(5) {
			room := fmt.Sprint("!", w.rng.IntN(4))
			w.after(w.between(0, 30*time.Second), func() {
				w.windows[room] = 0
				w.step(Joining{Room: room, Open: true})
				w.after(w.between(time.Second, 60*time.Second), func() {
					if _, open := w.windows[room]; open {
						w.windows[room] = w.now
					}
					w.step(Joining{Room: room})
				})
			})
		}
	}
	if !w.steady && w.rng.IntN(3) == 0 {
		w.after(w.between(10*time.Second, 60*time.Second), func() {
			w.counts["reconfigured"]++
			w.cfg.Concurrency = 1 + w.rng.Int32N(4)
			w.cfg.Ephemeral = EphemeralMode(w.rng.IntN(3))
			w.cfg.TxnQueue = 1 + w.rng.Int32N(5)
			w.cfg.OriginRate = 5
			w.step(Reconfigured{w.cfg})
		})
	}
	w.until(3 * time.Minute)
	w.healing, w.up, w.slow = true, true, 1
	w.p.crash = false
	w.until(20 * time.Minute)
	w.rest()
	return w
}

// until lets time go by.
func (w *simWorld) until(d time.Duration) {
	end := w.now.Add(d)
	for {
		at, ok := w.future.Next()
		wake, want := w.m.NextWake()
		switch {
		case want && wake <= w.now.Add(-time.Second):
			w.failf("a Tick is wanted for %s ago", w.now.Sub(wake))
		case want && (!ok || wake < at) && wake <= end:
			w.now = max(w.now, wake)
			w.step(Tick{})
		case ok && at <= end:
			w.now = at
			f, _ := w.future.Due(at)
			f()
		default:
			w.now = end
			return
		}
	}
}

// rest checks that nothing is left, and that all has arrived that had to.
func (w *simWorld) rest() {
	m := w.m
	if w.open != 0 || len(w.reqs) != 0 || len(w.ops) != 0 {
		w.failf("at rest: %d requests are open, %d held, %d attempts", w.open, len(w.reqs), len(w.ops))
	}
	if len(m.reqs)+len(m.txns)+len(m.shared)+len(m.ops)+len(m.looks)+len(m.desk.peers)+len(m.desk.fetching)+m.record.total()+int(m.desk.running) != 0 ||
		m.held.n+m.unverified.n != 0 || m.held.bytes+m.unverified.bytes != 0 || m.idle.n != len(m.origins) || m.strangers.calls != 0 {
		w.failf("at rest: the machine holds something: %+v", m.Snapshot(w.now, 3))
	}
	for i := range m.lanes {
		if m.lanes[i].slots.Used != 0 || m.lanes[i].stalled != 0 {
			w.failf("at rest: lane %d is in use: %+v", i, m.lanes[i].slots)
		}
	}
	for _, t := range w.txns {
		if !t.acked {
			w.failf("at rest: transaction %s of %s was never taken, in %d attempts", t.ID, t.origin, t.forward)
		}
		if !t.Ephemeral && !t.given {
			w.failf("at rest: transaction %s of %s never reached the homeserver", t.ID, t.origin)
		}
	}
	w.step(Draining{By: w.now.Add(time.Second)})
	w.until(2 * time.Second)
	if !w.drained {
		w.failf("nothing to do, but not drained")
	}
	w.tally()
}

func simRun(t *testing.T, name string, seed uint64, p simProfile) (w *simWorld) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			t.Fatalf("%v\nagain with: go test ./bus/edge -run '%s' -edgeseed=%d", r, t.Name(), seed)
		}
	}()
	return newSimWorld(t, seed, p).run()
}

func TestSimulationHoldsItsInvariants(t *testing.T) {
	for name, p := range simProfiles {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			total := map[string]int{}
			for seed := uint64(1); seed <= *simSeedsFlag; seed++ {
				if *simSeedFlag != 0 && seed != *simSeedFlag {
					continue
				}
				w := simRun(t, name, seed, p)
				for k, n := range w.counts {
					total[k] += n
				}
				total["steps"] += w.steps
			}
			t.Log(fmt.Sprint(total))
			for _, must := range append(p.reaches, "reply", "forward", "empty") {
				if total[must] == 0 && *simSeedFlag == 0 && *simSeedsFlag >= 40 {
					t.Errorf("no %q in any run: the simulation does not reach it", must)
				}
			}
		})
	}
}

// The same seed must give the same run to the last effect.
func TestSimulationSameSeedSameRun(t *testing.T) {
	for name, p := range simProfiles {
		for seed := range uint64(3) {
			a, b := simRun(t, name, seed+1, p), simRun(t, name, seed+1, p)
			if a.hash != b.hash || a.steps != b.steps {
				t.Errorf("profile %s, seed %d: two runs differ", name, seed+1)
			}
		}
	}
}

// Thousands of forged requests are in nobody's way, and cost few fetches of keys.
func TestSimulationFloodLeavesLiveTrafficAlone(t *testing.T) {
	for _, policy := range []NoKeyPolicy{PassNoKey, RefuseNoKey} {
		p := simProfile{origins: 50, txns: 20, copies: 1, forged: 10_000, config: func(c *Config, _ *rand.Rand) {
			*c = Default()
			c.KeyFetches, c.NoKey, c.Deny = 100, policy, []string{"denied*"}
		}}
		w := newSimWorld(t, 3, p)
		w.quiet(t)
		w.run()
		slices.Sort(w.took)
		p99 := w.took[len(w.took)*99/100]
		t.Logf("%s: %d transactions, p50 %s, p99 %s, max %s; %d fetches, %d passed on", policy, len(w.took), w.took[len(w.took)/2], p99, w.took[len(w.took)-1], w.counts["fetch"], w.counts["passed"])
		if w.turnedAway > 0 || p99 > 500*time.Millisecond || w.counts["fetch"] > 100 || len(w.took) < 500 {
			t.Errorf("%s: %d good requests refused, p99 %s, %d fetches", policy, w.turnedAway, p99, w.counts["fetch"])
		}
		if n := len(w.m.origins); n > 50 {
			t.Errorf("%s: %d servers are remembered, 50 are real", policy, n)
		}
	}
}

// Servers that want to be in the way of others are not: the others' keys are at hand,
// their transactions quick and few.
func TestSimulationHostileServersLeaveLiveTrafficAlone(t *testing.T) {
	for _, tt := range []struct {
		what   string
		p      simProfile
		p99    time.Duration
		reach  string
		slower int
		few    int // good ones that may be refused, with no events in them
	}{
		{"keys that cannot be had", simProfile{forged: 6000, blackholes: 3}, 500 * time.Millisecond, "parked denied", 1, 0},
		{"keys of many names that cannot be had", simProfile{forged: 6000, blackholes: 300}, 500 * time.Millisecond, "parked denied", 1, 0},
		{"transactions that are waited over", simProfile{slow: 10}, 2 * time.Second, "broken off", 1, 0},
		{"transactions without end", simProfile{hoarders: 60}, 10 * time.Second, "evicted", 4, 100},
	} {
		for seed := range uint64(5) {
			p := tt.p
			p.origins, p.txns, p.copies = 50, 20, 1
			p.config = func(c *Config, _ *rand.Rand) { *c = Default(); c.Deny = []string{"denied*"} }
			w := newSimWorld(t, seed+1, p)
			w.quiet(t)
			w.checkEvery = 10
			w.slow = tt.slower
			w.run()
			slices.Sort(w.took)
			p99 := w.took[len(w.took)*99/100]
			t.Logf("%s: %d transactions, p50 %s, p99 %s, max %s; %d good ones refused, %d %s", tt.what, len(w.took), w.took[len(w.took)/2], p99, w.took[len(w.took)-1], w.turnedAway, w.counts[tt.reach], tt.reach)
			if w.noEvents > 0 || w.turnedAway > tt.few || p99 > tt.p99 || len(w.took) < 500 || w.counts[tt.reach] == 0 {
				t.Errorf("%s: %d good requests refused, %d with events, p99 %s, %s %d times", tt.what, w.turnedAway, w.noEvents, p99, tt.reach, w.counts[tt.reach])
			}
		}
	}
}

// Two thousand servers that send presence at once do not delay events, and none
// sees an error.
func TestSimulationPresenceStormSparesEvents(t *testing.T) {
	p := simProfile{origins: 2050, txns: 1, copies: 1, ephemeral: 97, config: func(c *Config, _ *rand.Rand) {
		*c = Default()
	}}
	w := newSimWorld(t, 5, p)
	w.checkEvery = 50
	w.quiet(t)
	w.run()
	slices.Sort(w.took)
	p99 := w.took[len(w.took)*99/100]
	t.Logf("%d transactions with events, p50 %s, p99 %s, max %s; of 2,050 %d reached the homeserver, %d were dropped", len(w.took), w.took[len(w.took)/2], p99, w.took[len(w.took)-1], w.counts["forward"], w.counts["empty"])
	if w.turnedAway > 0 || p99 > 500*time.Millisecond || w.counts["forward"] < 100 || w.counts["empty"] < 500 {
		t.Errorf("%d refused, p99 %s, %d forwarded, %d dropped", w.turnedAway, p99, w.counts["forward"], w.counts["empty"])
	}
}

// quiet has every key at hand, nobody give up and nothing change.
func (w *simWorld) quiet(t *testing.T) {
	t.Helper()
	w.steady = true
	for n := range w.p.origins {
		w.keys[matrix.ServerName(fmt.Sprintf("s%d.test", n))] = true
	}
}

// BenchmarkSteps is what the machine costs when many servers send transactions.
func BenchmarkSteps(b *testing.B) {
	c := Default()
	c.OriginRate, c.OriginBurst = 1e6, 1_000_000
	m := New(c, rand.New(rand.NewPCG(1, 2)))
	now := sched.FromStored(1_800_000_000_000)
	send := matrix.Match("PUT", "/_matrix/federation/v1/send/1")
	names := make([]matrix.ServerName, 2000)
	for i := range names {
		names[i] = matrix.ServerName(fmt.Sprintf("s%d.test", i))
	}
	var todo []Event
	var out []Effect
	var req ReqID
	steps := 0
	b.ReportAllocs()
	for b.Loop() {
		req++
		now = now.Add(time.Millisecond)
		todo = append(todo[:0], Arrived{Req: req, Origin: names[int(req)%len(names)], Endpoint: send, Received: now, Size: 1000, Txn: &Txn{ID: fmt.Sprint(req), PDUs: 1}})
		for i := 0; i < len(todo); i++ {
			steps++
			out = m.Step(now, todo[i], out[:0])
			for _, e := range out {
				switch e := e.(type) {
				case Verify:
					todo = append(todo, Verified{Req: e.Req, Verdict: Good})
				case Look:
					todo = append(todo, Looked{Req: e.Req})
				case Forward:
					todo = append(todo, Answered{Op: e.Op, Status: 200}, Done{Op: e.Op})
				case Record:
					todo = append(todo, Recorded{Batch: e.Batch, OK: true})
				}
			}
		}
	}
	b.ReportMetric(float64(steps)/b.Elapsed().Seconds(), "steps/s")
}

package bus

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// rig drives a Machine by hand and keeps what it asked for.
type rig struct {
	t    *testing.T
	m    *Machine
	now  sched.Time
	req  ReqID
	last []Effect // of the latest step
	all  []Effect

	steps, checkEach int // Check after so many steps, 0: after each
}

func newRig(t *testing.T, change func(*Config)) *rig {
	t.Helper()
	cfg := Default()
	cfg.KnownAnswers = 0 // so that the only commits are those that a test is about
	if change != nil {
		change(&cfg)
	}
	return &rig{t: t, m: New(cfg, rand.New(rand.NewPCG(1, 2))), now: sched.FromStored(1_800_000_000_000)}
}

func (r *rig) step(ev Event) []Effect {
	r.t.Helper()
	r.last = r.m.Step(r.now, ev, nil)
	r.all = append(r.all, r.last...)
	if r.steps++; r.checkEach > 0 && r.steps%r.checkEach != 0 {
		return r.last
	}
	if err := r.m.Check(); err != nil {
		r.t.Fatalf("after %T%+v: %v", ev, ev, err)
	}
	return r.last
}

// pass lets time go by, waking the machine whenever it wants to be woken.
func (r *rig) pass(d time.Duration) {
	r.t.Helper()
	until := r.now.Add(d)
	for {
		at, ok := r.m.NextWake()
		if !ok || at > until {
			break
		}
		r.now = max(r.now, at)
		r.step(Tick{})
	}
	r.now = until
}

// get sends a request for a real path and returns its number.
func (r *rig) get(dest matrix.ServerName, method, target string) ReqID {
	r.t.Helper()
	r.req++
	ep := matrix.Match(method, target)
	a := Arrived{Req: r.req, Dest: dest, Endpoint: ep, Class: ep.Class, Received: r.now}
	a.Key = keyOf(dest, target)
	r.step(a)
	return r.req
}

func keyOf(dest matrix.ServerName, target string) Key {
	return sha256.Sum256([]byte(string(dest) + " " + target))
}

func (r *rig) profile(dest matrix.ServerName, n int) ReqID {
	r.t.Helper()
	return r.get(dest, "GET", fmt.Sprintf("/_matrix/federation/v1/query/profile?user_id=%d", n))
}

// of returns the effects of one kind.
func of[E Effect](effects []Effect) (found []E) {
	for _, e := range effects {
		if e, ok := e.(E); ok {
			found = append(found, e)
		}
	}
	return found
}

func (r *rig) one(what string, ok bool) {
	r.t.Helper()
	if !ok {
		r.t.Fatalf("%s; the last step gave %+v", what, r.last)
	}
}

// sent returns the only Send of the last step.
func (r *rig) sent() Send {
	r.t.Helper()
	s := of[Send](r.last)
	r.one("want one Send", len(s) == 1)
	return s[0]
}

// works makes a host a proven one.
func (r *rig) works(dest matrix.ServerName) {
	r.t.Helper()
	r.profile(dest, -1)
	op := r.sent().Op
	r.step(Connected{op})
	r.answer(op, 200)
}

func (r *rig) answer(op OpID, status int) {
	r.t.Helper()
	r.step(Answered{Op: op, Status: status})
	r.step(Done{Op: op, Size: 100, Kept: true})
}

// An error would be taken for the remote's: Synapse leaves it alone for minutes.
func TestOurOwnFaultIsNotTheRemotes(t *testing.T) {
	const devices = "/_matrix/federation/v1/user/devices/@a:h.test"
	r := newRig(t, nil)
	r.works("h.test")
	r.get("h.test", "GET", devices)
	for range 3 {
		r.step(Done{Op: r.sent().Op, Failure: matrix.FailLocal, Sent: true, Detail: "the spool is full"})
		r.one("nothing is answered", len(of[Refuse](r.last)) == 0)
		r.pass(pause)
	}
	before := len(of[Reply](r.all))
	r.answer(r.sent().Op, 200)
	r.one("then it is", len(of[Reply](r.all)) == before+1)

	// While it lasts the answer comes when time is up, and not before.
	r.get("h.test", "GET", devices+"?again")
	start := r.now
	for len(of[Refuse](r.last)) == 0 && r.now.Sub(start) < time.Hour {
		if len(of[Send](r.last)) > 0 {
			r.step(Done{Op: r.sent().Op, Failure: matrix.FailLocal, Detail: "the spool is full"})
			continue
		}
		r.pass(100 * time.Millisecond)
	}
	if d, want := r.now.Sub(start), matrix.Match("GET", devices).Timeout; d < want-5*time.Second || d > want {
		t.Errorf("it is refused after %s, the caller waits for %s", d, want)
	}
}

func TestEqualRequestsShareOneAttempt(t *testing.T) {
	r := newRig(t, nil)
	a := r.profile("h.test", 1)
	op := r.sent().Op
	b := r.profile("h.test", 1)
	r.one("the second waits with the first, its body is freed", reflect.DeepEqual(r.last, []Effect{Free{b}}))
	r.step(Connected{op})
	r.step(Answered{Op: op, Status: 200})
	r.one("both are answered", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: a, Op: op}, {Req: b, Op: op, From: FromOther}}))
	c := r.profile("h.test", 1)
	r.one("a third joins while the body is on its way", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: c, Op: op, From: FromOther}}))
	r.step(Done{Op: op, Size: 100, Kept: true})
	d := r.profile("h.test", 1)
	r.one("a fourth is answered from the cache", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: d, Op: op, From: FromCache}}))
	if s := r.m.stats; s.Attempts != 1 || s.Shared != 2 || s.CacheHits != 1 {
		t.Errorf("attempts %d, shared %d, cache hits %d; want 1, 2, 1", s.Attempts, s.Shared, s.CacheHits)
	}
}

func TestClaimsAreNeverSharedNorRepeated(t *testing.T) {
	r := newRig(t, nil)
	r.works("h.test")
	const claim = "/_matrix/federation/v1/user/keys/claim"
	r.get("h.test", "POST", claim)
	first := r.sent().Op
	r.get("h.test", "POST", claim)
	second := r.sent().Op
	r.step(Answered{Op: first, Status: 429, RetryAfter: time.Second})
	r.one("a 429 is passed on", len(of[Reply](r.last)) == 1)
	r.step(Done{Op: first, Kept: true})
	r.step(Answered{Op: second, Status: 200})
	r.step(Done{Op: second, Kept: true})
	r.pass(5 * time.Second)
	r.get("h.test", "POST", claim)
	r.one("a third is sent, not answered from a cache", len(of[Send](r.last)) == 1)
	if got := len(of[Send](r.all)); got != 4 { // one made the host a proven one
		t.Errorf("%d attempts, want 4", got)
	}
}

func TestFirstRequestToAHostIsThePreflightOfTheOthers(t *testing.T) {
	r := newRig(t, nil)
	r.profile("h.test", 1)
	op := r.sent().Op
	r.profile("h.test", 2)
	r.profile("h.test", 3)
	r.one("the others wait", len(of[Send](r.last)) == 0)
	r.step(Connected{op})
	r.one("the connection lets the others go", len(of[Send](r.last)) == 2)
	r.profile("h.test", 4)
	r.one("lookups use three of four places", len(of[Send](r.last)) == 0)
}

// A host that nobody has talked to has its whole burst to spend.
func TestFirstRequestToAHostDoesNotWaitForItsRate(t *testing.T) {
	r := newRig(t, func(c *Config) { c.HostRate, c.HostBurst = 0.1, 3 })
	r.profile("h.test", 1)
	op := r.sent().Op
	r.step(Connected{op})
	r.answer(op, 200)
	for i := range 2 {
		r.profile("h.test", 2+i)
		r.answer(r.sent().Op, 200)
	}
	r.profile("h.test", 9)
	r.one("the fourth waits", len(of[Send](r.last)) == 0)
	r.pass(9 * time.Second)
	r.one("until its caller's time is nearly up", len(of[Send](r.all)) == 3)
}

func TestDeadHostAnswersItsWholeQueueAtOnce(t *testing.T) {
	r := newRig(t, nil)
	r.profile("h.test", 1)
	op := r.sent().Op
	r.profile("h.test", 2)
	r.get("h.test", "GET", "/_matrix/federation/v1/user/devices/u")
	r.step(Done{Op: op, Failure: matrix.FailRefused, Detail: "dial"})
	refused := of[Refuse](r.last)
	r.one("all three are refused", len(refused) == 3)
	for _, e := range refused {
		if e.Status != 502 || e.Code != matrix.MUnknown || !strings.Contains(e.Text, "h.test") || !strings.Contains(e.Text, "connection refused") {
			t.Errorf("refused with %+v", e)
		}
	}
	r.profile("h.test", 4)
	r.one("a fourth is refused at once", len(of[Refuse](r.last)) == 1 && len(of[Send](r.last)) == 0)
	r.one("and told when the next try is", strings.Contains(of[Refuse](r.last)[0].Text, "next try in"))
}

func TestFailingHostIsTriedOnlyAfterItsIntentIsOnDisk(t *testing.T) {
	r := newRig(t, nil)
	r.profile("h.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailRefused})
	first := of[Commit](r.last)
	r.one("the failure is stored", len(first) == 1 && first[0].Hosts[0].Failures == 1 && first[0].Hosts[0].NextTry > r.now)
	r.step(Committed{Batch: first[0].Batch, OK: true})
	r.pass(7 * time.Second)
	r.profile("h.test", 2)
	intent := of[Commit](r.last)
	r.one("the intent is stored before the attempt", len(intent) == 1 && len(of[Send](r.last)) == 0)
	if h := intent[0].Hosts[0]; h.Failures != 2 || h.NextTry.Sub(r.now) < 12*time.Second || h.LastTry != r.now {
		t.Errorf("the intent is %+v", h)
	}
	r.step(Committed{Batch: intent[0].Batch, OK: true})
	r.step(Connected{r.sent().Op})
	r.answer(of[Send](r.all)[1].Op, 200)
	r.profile("h.test", 3)
	r.one("it works again", len(of[Send](r.last)) == 1)
}

func TestJoinTriesAHostThatIsBackingOff(t *testing.T) {
	r := newRig(t, nil)
	const join = "/_matrix/federation/v1/make_join/r/u?ver=10"
	r.get("h.test", "GET", join+"1")
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailTLS})
	r.step(Committed{Batch: of[Commit](r.last)[0].Batch, OK: true})
	r.pass(10 * time.Second)
	r.get("h.test", "GET", join+"2")
	r.one("not after ten seconds", len(of[Refuse](r.last)) == 1)
	r.pass(25 * time.Second)
	r.profile("h.test", 1)
	r.one("not for a lookup", len(of[Refuse](r.last)) == 1)
	r.get("h.test", "GET", join+"3")
	r.one("but after half a minute for a join", len(of[Commit](r.last)) == 1 && len(of[Refuse](r.last)) == 0)
}

func TestOldAnswerIsBetterThanNone(t *testing.T) {
	r := newRig(t, nil)
	r.works("h.test") // profile -1 is cached
	at := r.now
	op := of[Send](r.all)[0].Op
	r.pass(20 * time.Minute)
	r.profile("h.test", -1)
	second := r.sent().Op
	r.step(Done{Op: second, Failure: matrix.FailRefused})
	r.one("when the attempt fails", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: 2, Op: op, From: FromStale, Age: r.now.Sub(at)}}))
	r.profile("h.test", -1)
	r.one("and while the host is backing off", reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: 3, Op: op, From: FromStale, Age: r.now.Sub(at)}}))
	r.pass(25 * time.Hour)
	r.profile("h.test", -1)
	for _, c := range of[Commit](r.all) {
		if _, under := r.m.commits[c.Batch]; under {
			r.step(Committed{Batch: c.Batch, OK: true})
		}
	}
	third := r.sent().Op
	r.step(Done{Op: third, Failure: matrix.FailRefused})
	r.one("but not for ever", len(of[Reply](r.last)) == 0 && len(of[Refuse](r.last)) == 1)
}

func TestRateLimitIsHonouredWithinTheCallersTime(t *testing.T) {
	r := newRig(t, nil)
	r.works("h.test")
	r.profile("h.test", 1)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 429, RetryAfter: 3 * time.Second})
	r.one("nobody is answered yet", len(of[Reply](r.last)) == 0)
	r.step(Done{Op: op, Kept: true})
	r.profile("h.test", 2)
	r.one("and nothing is sent", len(of[Send](r.last)) == 0)
	start := r.now
	r.pass(2990 * time.Millisecond)
	r.one("until the remote's time is over", len(of[Send](r.all)) == 2)
	r.pass(3 * time.Second) // one at a time, at the rate that the pause speaks of
	if sends := of[Send](r.all); len(sends) != 4 {
		t.Fatalf("%d attempts %s after the 429, want both requests on their way", len(sends), r.now.Sub(start))
	}
}

func TestRateLimitLongerThanTheCallersTimeIsPassedOn(t *testing.T) {
	r := newRig(t, nil)
	r.works("h.test")
	r.profile("h.test", 1)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 429, RetryAfter: time.Minute})
	r.one("the 429 is passed on", len(of[Reply](r.last)) == 1)
	r.step(Done{Op: op, Kept: true})
	r.profile("h.test", 2)
	e := of[Refuse](r.last)
	r.one("another request is told at once", len(e) == 1 && e[0].Status == 429 && e[0].Code == matrix.MLimitExceeded && e[0].RetryAfter > 59_000)
}

func TestRequestsAreAnsweredJustBeforeTheirCallerGivesUp(t *testing.T) {
	for _, tt := range []struct {
		method, target string
		after          time.Duration
	}{
		{"GET", "/_matrix/federation/v1/query/profile?user_id=u", 9500 * time.Millisecond},
		{"GET", "/_matrix/federation/v1/make_join/r/u", 19 * time.Second},
		{"PUT", "/_matrix/federation/v1/send/1", 59 * time.Second},
		{"GET", "/_matrix/federation/v1/state/r?event_id=e", 599 * time.Second},
	} {
		r := newRig(t, nil)
		r.get("h.test", tt.method, tt.target)
		op := r.sent().Op
		r.step(Connected{op})
		r.pass(tt.after - time.Millisecond)
		r.one(tt.target+" is not answered early", len(of[Refuse](r.all)) == 0)
		r.pass(time.Millisecond)
		e := of[Refuse](r.all)
		if len(e) != 1 || e[0].Status != 504 || !strings.Contains(e[0].Text, "has not answered in time") {
			t.Errorf("%s: refused with %+v", tt.target, e)
		}
		if runsOn := matrix.Match(tt.method, tt.target).RunOn; runsOn > 0 {
			r.one("the attempt runs on", len(of[Cancel](r.all)) == 0)
			r.pass(runsOn - tt.after)
		}
		r.one("the attempt is given up", len(of[Cancel](r.all)) == 1)
		r.step(Done{Op: op, Failure: matrix.FailCancelled})
	}
}

func TestCallerThatGoesCancelsOnlyWhatMayBeCancelled(t *testing.T) {
	r := newRig(t, nil)
	r.works("h.test")
	a := r.profile("h.test", 1)
	op := r.sent().Op
	b := r.profile("h.test", 1)
	r.step(Gone{a})
	r.one("another still waits", len(of[Cancel](r.last)) == 0)
	r.step(Gone{b})
	r.one("nobody waits for a lookup", reflect.DeepEqual(of[Cancel](r.last), []Cancel{{op}}))
	r.profile("h.test", 1)
	r.one("who asks now gets an attempt of its own", len(of[Send](r.last)) == 1)
	r.step(Done{Op: op, Failure: matrix.FailCancelled})

	c := r.get("h.test", "PUT", "/_matrix/federation/v1/send_knock/r/e")
	join := r.sent().Op
	r.step(Gone{c})
	r.one("a knock runs on", len(of[Cancel](r.last)) == 0)
	r.pass(time.Minute)
	r.one("until its caller would have given up", len(of[Cancel](r.all)) == 3) // the lookup's second attempt was given up before
	r.one("and nobody is answered", len(of[Refuse](r.all)) == 1)               // the lookup that nobody answered
	r.step(Done{Op: join, Failure: matrix.FailCancelled})
	r.step(Gone{999})
	r.one("a request that was answered meanwhile", len(r.last) == 0)
}

// Hosts that accept a connection and say nothing must not keep live ones from
// being tried, and get a second, longer chance themselves.
func TestSlowConnectsMakeRoomForOthers(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 16, 8, 2 })
	event := func(i int) {
		r.get(matrix.ServerName(fmt.Sprintf("h%d.test", i)), "GET", fmt.Sprintf("/_matrix/federation/v1/event/$%d", i))
	}
	for i := range 20 {
		event(i)
	}
	first := of[Send](r.all)
	r.pass(patience)
	cancelled := of[Cancel](r.all)
	r.one("those that hang make room: some go on among the failing ones", len(cancelled) == len(first)-1 && len(of[Send](r.all)) == len(first)+1)
	onlySlow := first[0]
	for _, c := range cancelled {
		r.one("and not the first", c.Op != onlySlow.Op)
	}
	r.step(Connected{onlySlow.Op})
	r.answer(onlySlow.Op, 200)
	r.one("which was only slow", len(of[Reply](r.all)) == 1)
	r.step(Done{Op: cancelled[0].Op, Failure: matrix.FailCancelled})
	if refused := of[Refuse](r.all); len(refused) != 0 {
		t.Errorf("refused: %+v", refused)
	}
	again := of[Send](r.all)
	r.one("the others are tried again", slices.ContainsFunc(again, func(s Send) bool { return s.Op > cancelled[0].Op && s.Req == first[1].Req }))
}

func TestLookupsAtSilentHostsAreGivenUpSoon(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 16, 8, 2 })
	for i := range 20 {
		r.profile(matrix.ServerName(fmt.Sprintf("h%d.test", i)), 1)
	}
	r.pass(patience)
	cancelled := of[Cancel](r.all)
	r.one("all but those that go on among the failing ones", len(cancelled) >= 4)
	r.step(Done{Op: cancelled[0].Op, Failure: matrix.FailCancelled})
	refused := of[Refuse](r.last)
	r.one("the caller hears of it", len(refused) == 1 && refused[0].Status == 504)
	var silent matrix.ServerName
	for _, s := range of[Send](r.all) {
		if s.Op == cancelled[0].Op {
			silent = s.Dest
		}
	}
	r.pass(time.Minute)
	r.profile(silent, 2)
	refused = of[Refuse](r.last)
	r.one("who asks a minute later need not wait for the same", len(refused) == 1 && refused[0].Status == 502)
	r.pass(hangingFor)
	r.profile(silent, 3)
	r.one("but it is not given up for ever", len(of[Refuse](r.last)) == 0)
}

// Whoever asks in the middle of a flood does not wait behind all of it.
func TestLookupInAFloodIsNotLast(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 16, 8, 2 })
	for i := range 500 {
		r.profile(matrix.ServerName(fmt.Sprintf("h%d.test", i)), 1)
	}
	finish := func() Send { // the oldest attempt ends, another begins
		ops := of[Send](r.all)
		for _, s := range ops {
			if c := r.m.ops[s.Op]; c != nil {
				r.step(Connected{s.Op})
				r.answer(s.Op, 200)
				break
			}
		}
		sends := of[Send](r.all)
		return sends[len(sends)-1]
	}
	r.pass(2 * time.Second)
	mine := r.profile("h400.test", 2) // behind another of the same host
	for range 3 {
		if finish().Req == mine {
			return
		}
	}
	t.Errorf("the newest of 501 look-ups had none of three turns")
}

// A join finds a worker while slow lookups and presence hold all they may.
func TestJoinGoesFirst(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Workers, c.Unknown, c.Failing = 16, 16, 1 })
	for i := range 100 {
		r.get(matrix.ServerName(fmt.Sprintf("p%d.test", i)), "PUT", "/_matrix/federation/v1/send/1")
		r.profile(matrix.ServerName(fmt.Sprintf("l%d.test", i)), 1)
	}
	if used := r.m.workers.Used; used < 12 || used > 15 {
		t.Errorf("lookups and events hold %d of 16 workers", used)
	}
	r.get("j.test", "GET", "/_matrix/federation/v1/make_join/r/u")
	r.one("the join is sent at once", len(of[Send](r.last)) == 1)
}

// Under a flood of one class, every other still gets its turns.
func TestNoClassStarves(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Workers, c.Unknown, c.Failing = 8, 8, 1
		c.HostRate, c.HostBurst = 1e6, 1000
		c.CacheBytes = 0
	})
	targets := map[matrix.Class][2]string{
		matrix.ClassJoin:   {"GET", "/_matrix/federation/v1/make_join/r/u%d"},
		matrix.ClassEvent:  {"GET", "/_matrix/federation/v1/event/e%d"},
		matrix.ClassKey:    {"GET", "/_matrix/key/v2/query/s%d"},
		matrix.ClassDevice: {"GET", "/_matrix/federation/v1/user/devices/u%d"},
		matrix.ClassLookup: {"GET", "/_matrix/federation/v1/query/profile?user_id=%d"},
		matrix.ClassState:  {"GET", "/_matrix/federation/v1/backfill/r?v=%d"},
	}
	running := map[OpID]bool{}
	note := func() {
		for _, s := range of[Send](r.last) {
			running[s.Op] = true
		}
	}
	order := []matrix.Class{matrix.ClassJoin, matrix.ClassEvent, matrix.ClassKey, matrix.ClassDevice, matrix.ClassLookup, matrix.ClassState}
	for i := range 600 {
		for _, c := range order {
			r.get(matrix.ServerName(fmt.Sprintf("h%d.test", i)), targets[c][0], fmt.Sprintf(targets[c][1], i))
			note()
		}
		for op := OpID(1); op <= r.m.nextOp && i%2 == 1; op++ {
			if running[op] {
				delete(running, op)
				r.step(Answered{Op: op, Status: 200})
				r.step(Done{Op: op})
				note()
				break
			}
		}
		r.now = r.now.Add(time.Millisecond)
	}
	for _, c := range order {
		if n := r.m.stats.Waits[c].Count; n == 0 {
			t.Errorf("class %s had no turn of %d", c, r.m.stats.Attempts)
		}
	}
	if j, s := r.m.stats.Waits[matrix.ClassJoin].Count, r.m.stats.Waits[matrix.ClassState].Count; j <= s {
		t.Errorf("joins had %d turns, state %d", j, s)
	}
}

func TestRequestsBeyondTheBoundAreRefused(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxRequests, c.MaxHosts = 20, 400 })
	for i := range 20 {
		r.profile("h.test", i)
	}
	r.profile("h.test", 21)
	e := of[Refuse](r.last)
	r.one("the 21st is refused", len(e) == 1 && e[0].Status == 503)
	r.profile("h.test", 1)
	r.one("also one that could share", len(of[Refuse](r.last)) == 1)
}

func TestHostsBeyondTheBoundAreForgottenTheHealthyFirst(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxRequests, c.MaxHosts, c.CacheBytes = 100, 450, 0 })
	r.profile("dead.test", 1)
	r.step(Done{Op: r.sent().Op, Failure: matrix.FailNoName})
	for i := range 1000 {
		r.works(matrix.ServerName(fmt.Sprintf("h%d.test", i)))
		for b := range r.m.commits {
			r.step(Committed{Batch: b, OK: true})
		}
	}
	if len(r.m.hosts) != 450 || r.m.hosts["dead.test"] == nil {
		t.Errorf("%d hosts are known, the dead one among them: %t", len(r.m.hosts), r.m.hosts["dead.test"] != nil)
	}
}

func TestCacheKeepsToItsBounds(t *testing.T) {
	r := newRig(t, func(c *Config) { c.CacheBytes, c.HostRate, c.HostBurst = 20*sched.KiB, 1e6, 1000 })
	r.works("h.test")
	get := func(n int, size int64) {
		r.profile("h.test", n)
		op := r.sent().Op
		r.step(Answered{Op: op, Status: 200})
		r.step(Done{Op: op, Size: size, Kept: true})
	}
	for i := range 100 {
		get(i, 10)
	}
	if n := r.m.cache.recent.Len(); n != 19 {
		t.Errorf("%d entries of 1,034 bytes within 20 KiB, want 19", n)
	}
	for i := range 100 {
		get(100+i, 3000)
	}
	if n := r.m.cache.recent.Len(); n != 5 {
		t.Errorf("%d entries of 4,024 bytes within 20 KiB, want 5", n)
	}
	get(300, 6000)
	if r.m.cache.get(r.m.cache.recent.Front().Value.(*entry).key).size == 6000+entryCost {
		t.Error("an answer of more than a quarter of the cache was kept")
	}
	discards := len(of[Discard](r.all))
	if sends := len(of[Send](r.all)); discards != sends-r.m.cache.recent.Len() {
		t.Errorf("%d attempts, %d discarded, %d kept", sends, discards, r.m.cache.recent.Len())
	}
}

func TestRestoredBackOffIsCutToTheLongest(t *testing.T) {
	r := newRig(t, nil)
	r.step(Restored{Hosts: []HostRecord{
		{Name: "wild.test", Failures: 3, LastFailure: matrix.FailTLS, NextTry: r.now.Add(1000 * time.Hour), LastTry: r.now.Add(900 * time.Hour)},
		{Name: "dead.test", Failures: 2, LastFailure: matrix.FailRefused, NextTry: r.now.Add(30 * time.Second)},
	}})
	for _, name := range []matrix.ServerName{"wild.test", "dead.test"} {
		r.profile(name, 1)
		r.one("its back-off has survived", len(of[Refuse](r.last)) == 1)
	}
	r.pass(31 * time.Second)
	r.profile("dead.test", 2)
	r.one("and ends", len(of[Commit](r.last)) == 1)
	r.pass(24 * time.Hour)
	r.profile("wild.test", 3)
	r.one("even if the clock ran wild", len(of[Refuse](r.last)) == 0)
}

func TestGatewayErrorsInARowMakeAHostFail(t *testing.T) {
	r := newRig(t, func(c *Config) { c.HostBurst = 10 })
	r.works("h.test")
	for i := range softFailures {
		r.profile("h.test", i)
		r.answer(r.sent().Op, 503)
	}
	r.profile("h.test", 99)
	e := of[Refuse](r.last)
	r.one("it is left alone", len(e) == 1 && strings.Contains(e[0].Text, "status 503"))
}

func TestDrainedComesOnceAllWorkHasEnded(t *testing.T) {
	r := newRig(t, nil)
	r.profile("h.test", 1)
	op := r.sent().Op
	r.step(Draining{})
	r.one("not yet", len(of[Drained](r.last)) == 0)
	r.step(Connected{op})
	r.answer(op, 200)
	for b := range r.m.commits {
		r.step(Committed{Batch: b, OK: true})
	}
	r.step(Tick{})
	if n := len(of[Drained](r.all)); n != 1 {
		t.Errorf("Drained came %d times", n)
	}
}

func TestDetailIsCutBetweenCharacters(t *testing.T) {
	for _, s := range []string{strings.Repeat("ä", 300), strings.Repeat("x", maxDetail-1) + "€", "short"} {
		got := cut(s)
		if len(got) > maxDetail || !strings.HasPrefix(s, got) || len(s) > maxDetail && len(got) < maxDetail-3 {
			t.Errorf("%d bytes are cut to %d: %q", len(s), len(got), got)
		}
	}
}

func TestValidateNamesWhatIsWrong(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"workers":          func(c *Config) { c.Workers = 7 },
		"unknown_hosts":    func(c *Config) { c.Unknown = c.Workers + 1 },
		"failing_hosts":    func(c *Config) { c.Failing = 0 },
		"host_concurrency": func(c *Config) { c.HostConcurrency = 0 },
		"host_rate":        func(c *Config) { c.HostRate = 0 },
		"host_burst":       func(c *Config) { c.HostBurst = 0 },
		"max_requests":     func(c *Config) { c.MaxRequests = 0 },
		"max_hosts":        func(c *Config) { c.MaxHosts = c.MaxRequests + 3*int32(c.Workers) + aheadAtOnce },
		"cache":            func(c *Config) { c.CacheBytes = -1 },
	} {
		c := Default()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// BenchmarkLookup is one lookup from arrival to end at a host that is known.
func BenchmarkLookup(b *testing.B) {
	cfg := Default()
	cfg.HostRate, cfg.HostBurst, cfg.CacheBytes = 1e9, 1<<30, 0
	m := New(cfg, rand.New(rand.NewPCG(1, 2)))
	ep := matrix.Match("GET", "/_matrix/federation/v1/query/profile?user_id=u")
	now := sched.FromStored(1_800_000_000_000)
	var out []Effect
	b.ReportAllocs()
	for i := range b.N {
		now++
		a := Arrived{Req: ReqID(i + 1), Dest: "h.test", Endpoint: ep, Class: ep.Class, Received: now}
		a.Key[0], a.Key[1], a.Key[2], a.Key[3] = byte(i), byte(i>>8), byte(i>>16), byte(i>>24)
		out = m.Step(now, a, out[:0])
		op := out[len(out)-1].(Send).Op
		out = m.Step(now, Answered{Op: op, Status: 200}, out[:0])
		out = m.Step(now, Done{Op: op, Size: 100, Kept: true}, out[:0])
	}
}

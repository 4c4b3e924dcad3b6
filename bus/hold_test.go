package bus

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// joinServer answers a send_join slowly: it sends its headers after some time,
// and then the body at a steady rate.
type joinServer struct {
	headers time.Duration
	size    int64
	over    time.Duration // that the body takes
	known   bool          // whether the headers say its size
}

// joinByTries has a homeserver send a join that is answered so, up to four times,
// each for 60 s, as Synapse does, and checks that it gets all of it, in at most 60 s
// from its headers. It returns how many tries there were and when it had the headers.
func joinByTries(t *testing.T, s joinServer) (tries int, headers time.Duration) {
	t.Helper()
	r := newRig(t, unhurried)
	r.works("h.test")
	r.all = nil
	start := r.now
	began, end := start.Add(s.headers), start.Add(s.headers).Add(s.over)
	var op OpID
	answered, done := false, false
	// pass lets the remote and the machine go on for a while.
	pass := func(until sched.Time) (replied bool) {
		n := len(of[Reply](r.all))
		for r.now < until && len(of[Reply](r.all)) == n {
			r.pass(min(time.Second, until.Sub(r.now)))
			switch {
			case done || r.now < began:
			case !answered:
				answered = true
				size := s.size
				if !s.known {
					size = -1
				}
				r.step(Answered{Op: op, Status: 200, Size: size})
			case r.now < end:
				r.step(Progress{Op: op, Size: int64(float64(s.size) * float64(r.now.Sub(began)) / float64(s.over))})
			default:
				done = true
				r.step(Done{Op: op, Size: s.size})
			}
		}
		return len(of[Reply](r.all)) > n
	}
	for tries = 1; tries <= 4; tries++ {
		id := r.joins("h.test", "PUT", sendJoin, 0)
		if tries == 1 {
			op = r.sent().Op
		}
		got := slices.ContainsFunc(of[Reply](r.last), func(e Reply) bool { return e.Req == id })
		if !got {
			got = pass(r.now.Add(60 * time.Second))
		}
		if !got {
			refused := of[Refuse](r.all)
			if len(refused) != tries || refused[tries-1].Status != 504 {
				t.Fatalf("try %d was not refused: %+v", tries, refused)
			}
			r.pass(time.Second / 2) // the homeserver's own pause
			continue
		}
		headers = r.now.Sub(start)
		for !done {
			if r.now.Sub(start)-headers > 60*time.Second {
				t.Fatalf("the rest has not come in time: headers after %s", headers)
			}
			pass(r.now.Add(time.Second))
		}
		if n := len(of[Send](r.all)); n != 1 || len(of[Cancel](r.all)) != 0 {
			t.Fatalf("%d send_joins went upstream, cancelled: %v", n, of[Cancel](r.all))
		}
		return tries, headers
	}
	t.Fatalf("%+v: no try was answered", s)
	return 0, 0
}

func TestSlowSendJoinSucceedsWithOneRequest(t *testing.T) {
	for name, tt := range map[string]struct {
		joinServer
		tries   int
		headers time.Duration
	}{
		"at once":                    {joinServer{time.Second, 1 << 20, 2 * time.Second, true}, 1, 2 * time.Second},
		"headers after 100 s":        {joinServer{100 * time.Second, 1 << 20, time.Second, true}, 2, 102 * time.Second},
		"headers after 200 s":        {joinServer{200 * time.Second, 1 << 20, time.Second, true}, 4, 202 * time.Second},
		"drips for 90 s":             {joinServer{time.Second, 1 << 20, 90 * time.Second, true}, 2, 63 * time.Second},
		"drips, of unknown size":     {joinServer{time.Second, 1 << 20, 90 * time.Second, false}, 2, 92 * time.Second},
		"120 MB at 1 MB/s":           {joinServer{time.Second, 120_000_000, 120 * time.Second, true}, 2, 92 * time.Second},
		"drips for 5 s, unknown":     {joinServer{time.Second, 1 << 20, 5 * time.Second, false}, 1, 7 * time.Second},
		"the last try cannot wait":   {joinServer{time.Second, 1 << 20, 270 * time.Second, false}, 4, 241 * time.Second},
		"large, over four minutes":   {joinServer{time.Second, 400_000_000, 200 * time.Second, true}, 3, 172 * time.Second},
		"headers after 230 s, quick": {joinServer{230 * time.Second, 1 << 20, time.Second, false}, 4, 232 * time.Second},
	} {
		tries, headers := joinByTries(t, tt.joinServer)
		if tries != tt.tries || headers < tt.headers-3*time.Second || headers > tt.headers+3*time.Second {
			t.Errorf("%s: %d tries, headers after %s; want %d, %s", name, tries, headers, tt.tries, tt.headers)
		}
	}
}

// held is a rig with a send_join whose answer is held back.
func held(t *testing.T, change func(*Config)) (r *rig, id ReqID, op OpID) {
	t.Helper()
	r = newRig(t, func(c *Config) {
		unhurried(c)
		if change != nil {
			change(c)
		}
	})
	r.works("h.test")
	id = r.joins("h.test", "PUT", sendJoin, 0)
	op = r.sent().Op
	r.step(Answered{Op: op, Status: 200, Size: 1000})
	r.one("it is held back", len(of[Reply](r.last)) == 0)
	return r, id, op
}

func TestHeldAnswerThatIsCutIsAnError(t *testing.T) {
	r, id, op := held(t, nil)
	again := r.joins("h.test", "PUT", sendJoin, 0)
	r.step(Done{Op: op, Failure: matrix.FailCut, Size: 10})
	refused := of[Refuse](r.last)
	r.one("to all who wait", len(refused) == 2 && refused[0].Req == id && refused[1].Req == again && refused[0].Status == 502 && strings.Contains(refused[0].Text, "cut short"))
	r.one("it is not kept", len(of[Reply](r.last)) == 0 && len(of[Discard](r.last)) == 1)
	r.joins("h.test", "PUT", sendJoin, 0)
	r.one("the next try is its own", len(of[Send](r.last)) == 1)
}

func TestRefusalOfAJoinIsNotHeldBack(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	id := r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 403, Size: 1000})
	r.replies("at once", Reply{Req: id, Op: op})
}

func TestCallerOfAHeldAnswerIsToldToComeAgain(t *testing.T) {
	r, _, op := held(t, nil)
	r.step(Progress{Op: op, Size: 5})
	r.pass(59 * time.Second)
	refused := of[Refuse](r.all)
	r.one("in words", len(refused) == 1 && refused[0].Status == 504 && strings.Contains(refused[0].Text, "5 of 1000 bytes"))
}

// Nobody is there to pass it on to, and by the time somebody comes it may have
// stopped.
func TestHeldAnswerThatNobodyWaitsForStaysHeld(t *testing.T) {
	r, id, op := held(t, nil)
	r.step(Gone{id})
	r.pass(2 * time.Second)
	r.step(Progress{Op: op, Size: 500})
	b := r.joins("h.test", "PUT", sendJoin, 0)
	r.one("it is not certain", len(of[Reply](r.last)) == 0)
	r.pass(time.Second)
	r.step(Progress{Op: op, Size: 600})
	r.replies("until more comes", Reply{Req: b, Op: op, From: FromOther})
	r.pass(16 * time.Minute)
	r.one("then it is not cut short", len(of[Cancel](r.all)) == 0)
}

func TestSendJoinRunsOnForAWhile(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	r.all = nil
	start := r.now
	id := r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.step(Gone{id})
	runOn := matrix.Match("PUT", sendJoin).RunOn
	r.pass(runOn - time.Minute)
	second := r.joins("h.test", "PUT", sendJoin, 0)
	r.one("who comes joins it", len(of[Send](r.last)) == 0)
	r.pass(59 * time.Second)
	r.one("and is answered in time", len(of[Refuse](r.all)) == 1 && of[Refuse](r.all)[0].Req == second)
	r.one("it runs on", len(of[Cancel](r.all)) == 0)
	r.pass(runOn - r.now.Sub(start) - 1)
	r.one("to its end", len(of[Cancel](r.all)) == 0)
	r.pass(1)
	r.one("and no longer", len(of[Cancel](r.all)) == 1)
	third := r.joins("h.test", "PUT", sendJoin, 0)
	r.one("who comes then is sent anew", r.sent().Req == third)
	r.step(Done{Op: op, Failure: matrix.FailCancelled})
	r.one("the old one concerns nobody", len(of[Refuse](r.last)) == 0 && len(of[Reply](r.last)) == 0)
}

func TestDrainEndsWhatNobodyWaitsFor(t *testing.T) {
	r, id, op := held(t, nil)
	r.step(Gone{id})
	r.step(Draining{})
	r.one("as nobody will come again", len(of[Cancel](r.last)) == 1)
	r.step(Done{Op: op, Failure: matrix.FailCancelled, Size: 10})
	r.committed()
	r.one("that is all", len(of[Drained](r.all)) == 1)

	r, _, op = held(t, nil)
	for range 3 {
		r.pass(59 * time.Second)
		r.joins("h.test", "PUT", sendJoin, 0)
	}
	r.step(Draining{})
	r.pass(59 * time.Second)
	r.one("the last try gets what there is", len(of[Reply](r.all)) == 2 && len(of[Cancel](r.all)) == 0)
	r.step(Done{Op: op, Size: 1000})
}

func TestWholeAnswerStaysForAnHour(t *testing.T) {
	r, _, op := held(t, nil)
	at := r.now
	r.step(Done{Op: op, Size: 100 << 20})
	r.one("it is kept", len(of[Discard](r.last)) == 0)
	r.pass(time.Hour - 1)
	id := r.joins("h.test", "PUT", sendJoin, 0)
	r.replies("for who lost it", Reply{Req: id, Op: op, From: FromCache, Age: r.now.Sub(at)})
	r.pass(1)
	r.joins("h.test", "PUT", sendJoin, 0)
	op = r.sent().Op
	r.step(Answered{Op: op, Status: 200, Size: -1})
	r.step(Done{Op: op, Size: 200 << 20})
	r.one("one that takes too much of the room is not", slices.Contains(of[Discard](r.last), Discard{op}))

	r, _, op = held(t, func(c *Config) { c.KeepBytes = 0 })
	r.step(Done{Op: op, Size: 1000})
	r.one("nor any if there is no room", slices.Contains(of[Discard](r.last), Discard{op}))
}

func TestStateIsHeldBackToo(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	id := r.joins("h.test", "GET", "/_matrix/federation/v1/state/!r?event_id=e", 0)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 200, Size: -1})
	r.pass(598 * time.Second)
	r.one("while its caller waits", len(of[Reply](r.all)) == 1) // of the first that works
	r.pass(time.Second)
	r.one("and no longer: it comes but once", len(of[Reply](r.all)) == 2 && of[Reply](r.all)[1] == (Reply{Req: id, Op: op}) && len(of[Refuse](r.all)) == 0)
	r.step(Done{Op: op, Size: 1000})
}

// Who came for the last time has the answer as far as it is there; the others get
// none of it before all of it is.
func TestLastTryGetsWhatThereIsAndNobodyElseDoes(t *testing.T) {
	for _, failure := range []matrix.Failure{matrix.FailNone, matrix.FailCut} {
		r, _, op := held(t, nil)
		for range 2 {
			r.pass(59 * time.Second)
			r.joins("h.test", "PUT", sendJoin, 0)
		}
		r.pass(59 * time.Second)
		r.one("three were refused", len(of[Refuse](r.all)) == 3)
		fourth := r.joins("h.test", "PUT", sendJoin, 0)
		r.pass(time.Second)
		fifth := r.joins("h.test", "PUT", sendJoin, 0)
		r.all = nil
		r.pass(58 * time.Second)
		r.one("the fourth has what there is", reflect.DeepEqual(of[Reply](r.all), []Reply{{Req: fourth, Op: op, From: FromOther}}))
		r.step(Progress{Op: op, Size: 100})
		r.one("the fifth waits", len(of[Reply](r.all)) == 1 && len(of[Refuse](r.all)) == 0)
		r.step(Done{Op: op, Failure: failure, Size: 1000})
		if failure == matrix.FailNone {
			r.replies("for all of it", Reply{Req: fifth, Op: op, From: FromOther})
			continue
		}
		refused := of[Refuse](r.last)
		r.one("or for the error", len(of[Reply](r.last)) == 0 && len(refused) == 1 && refused[0].Req == fifth)
	}
}

// The rest may take half of the caller's time for the body, and not a moment more.
func TestHeldAnswerIsPassedOnWhenTheRestFollowsInTime(t *testing.T) {
	for _, tt := range []struct {
		total, size int64
		passed      bool
	}{
		{4000, 1000, true},  // 10 s for a quarter, 30 s for the rest
		{4001, 1000, false}, // that and a little
		{-1, 1000, false},   // the end is not in sight
		{4000, 0, false},    // nothing has come
	} {
		r := newRig(t, unhurried)
		r.works("h.test")
		id := r.joins("h.test", "PUT", sendJoin, 0)
		op := r.sent().Op
		r.pass(20 * time.Second) // until the headers; says nothing about the rate
		r.step(Answered{Op: op, Status: 200, Size: tt.total})
		r.pass(10 * time.Second)
		r.step(Progress{Op: op, Size: tt.size})
		if got := reflect.DeepEqual(of[Reply](r.last), []Reply{{Req: id, Op: op}}); got != tt.passed {
			t.Errorf("%d of %d bytes after 10 s: passed on: %t", tt.size, tt.total, got)
		}
	}
	r := newRig(t, unhurried)
	r.works("h.test")
	r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 200, Size: 1000})
	r.pass(time.Second - 1)
	r.step(Progress{Op: op, Size: 999})
	r.one("less than a second says nothing about a rate", len(of[Reply](r.last)) == 0)
}

// A homeserver's connection that breaks is not the end of a join: the state goes on
// arriving, for its next try.
func TestHeldStateRunsOnUntilItsTime(t *testing.T) {
	const target = "/_matrix/federation/v1/state/!r?event_id=e"
	r := newRig(t, unhurried)
	r.works("h.test")
	r.all = nil
	id := r.joins("h.test", "GET", target, 0)
	op := r.sent().Op
	r.step(Answered{Op: op, Status: 200, Size: -1})
	r.step(Gone{id})
	r.pass(11*time.Minute - 1)
	r.one("it runs on", len(of[Cancel](r.all)) == 0)
	r.pass(1)
	r.one("and no longer", reflect.DeepEqual(of[Cancel](r.all), []Cancel{{op}}))
	r.step(Done{Op: op, Failure: matrix.FailCancelled, Size: 10})
	r.one("half of it is not kept", slices.Contains(of[Discard](r.last), Discard{op}))
}

// Somebody who waits keeps a call going past its time; once nobody does, it ends.
func TestSendJoinPastItsTimeEndsWithItsLastCaller(t *testing.T) {
	r := newRig(t, unhurried)
	r.works("h.test")
	r.all = nil
	first := r.joins("h.test", "PUT", sendJoin, 0)
	op := r.sent().Op
	r.step(Gone{first})
	r.pass(matrix.Match("PUT", sendJoin).RunOn - 10*time.Second)
	last := r.joins("h.test", "PUT", sendJoin, 0)
	r.pass(20 * time.Second)
	r.one("it goes on", len(of[Cancel](r.all)) == 0)
	r.step(Gone{last})
	r.one("until then", reflect.DeepEqual(of[Cancel](r.last), []Cancel{{op}}))
}

// What is small enough to lie in memory must not take the room there of what is on
// its way: it is one of the small answers, however long it is kept.
func TestSmallWholeAnswersAreAmongTheSmallOnes(t *testing.T) {
	for _, target := range []string{"/_matrix/federation/v2/send_join/!r/$e", "/_matrix/federation/v1/state/!r?event_id=$e"} {
		r := newRig(t, nil)
		method := "GET"
		if strings.Contains(target, "send_join") {
			method = "PUT"
		}
		r.get("h.test", method, target)
		op := r.sent().Op
		r.step(Connected{op})
		r.answer(op, 200)
		r.one("it is in memory", r.m.cache.recent.Len() == 1 && r.m.whole.recent.Len() == 0)
		r.pass(59 * time.Minute)
		r.get("h.test", method, target)
		r.one("and is kept as long as a large one", len(of[Reply](r.last)) == 1 && of[Reply](r.last)[0].From == FromCache)
		r.pass(2 * time.Minute)
		r.get("h.test", method, target)
		r.one("and no longer", len(of[Send](r.last)) == 1)
	}
}

package sim

import (
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// lookups makes a run out of what may be known already: profiles, keys and joins,
// of few servers that are well and ill in turn, with ages that run out within the
// run, a memory too small for all, and joins so large that their callers come
// again and again. In the middle it ends in good order, or dies, or neither.
func lookups() Profile { return Profile{Lookups: true} }

// health is when a remote was heard of last, well and not.
type health struct {
	goodAt, badAt sched.Time
	limitedUntil  sched.Time // as it asked with a 429
	noKeysAt      sched.Time // when it was asked for its own keys in vain
}

// loadTakes is the longest that the core waits for an old answer which it has
// decided to use: meanwhile another request may have gone well. noKeysFor is how
// long it does not ask a server for its own keys again.
const (
	loadTakes = 200 * time.Millisecond
	noKeysFor = time.Minute
)

// drawLookups draws what a run of look-ups is like.
func (w *World) drawLookups(c *bus.Config) {
	p := &w.profile
	p.Hosts, p.Requests, p.Gap, p.Faulty = 3+w.rng.IntN(8), 300+w.rng.IntN(600), w.between(50*time.Millisecond, 500*time.Millisecond), 20+w.rng.IntN(30)
	c.HostRate, c.HostBurst = 30, 20
	c.ProfileFresh, c.ProfileStale = w.between(200*time.Millisecond, 10*time.Second), w.between(time.Second, 24*time.Hour)
	if w.rng.IntN(2) == 0 {
		c.ProfileStale = w.between(time.Second, 30*time.Second)
	}
	c.KnownAnswers = 5 + int32(w.rng.IntN(100))
	c.CacheBytes = sched.Bytes(w.rng.IntN(80)) * sched.KiB
	c.KeepFor = w.between(time.Second, time.Hour)
	c.Keys.Wait = w.between(500*time.Millisecond, 4*time.Second)
	c.Keys.Batch = 1 + int32(w.rng.IntN(12))
}

// scheduleLookups has remotes fall ill and get well, and the bus end in the middle.
func (w *World) scheduleLookups(end sched.Time) {
	for at := w.now; at < end; at = at.Add(w.between(time.Second, 20*time.Second)) {
		w.future.Set(at, func() {
			r := w.remotes[w.rng.IntN(len(w.remotes))]
			if r.does = healthy; w.rng.IntN(2) == 0 {
				r.does = behaviour(w.rng.IntN(int(numBehaviours)))
			}
		})
	}
	middle := w.now.Add(w.between(0, end.Sub(w.now)))
	switch w.rng.IntN(3) {
	case 0:
		w.future.Set(middle, w.crash)
	case 1:
		w.future.Set(middle, func() {
			w.Counts["drain"]++
			w.ending = true
			// State is waited for for ten minutes, and a body takes as long again.
			w.at(25*time.Minute, func() { w.failf("not drained after 25 minutes") })
			w.step(bus.Draining{By: w.now.Add(5 * time.Second)})
		})
	}
}

// hasEnded starts the bus again, if it was the end in the middle.
func (w *World) hasEnded() {
	if w.ending {
		w.at(0, w.boot)
	}
}

// lookup draws the endpoint of a request.
func (w *World) lookup() *matrix.Endpoint {
	method, path := "GET", profilePath
	switch w.rng.IntN(12) {
	case 0, 1:
		path = "/_matrix/key/v2/server"
	case 2:
		path = "/_matrix/federation/v1/make_join/r/u"
	case 3, 4:
		method, path = "PUT", "/_matrix/federation/v2/send_join/r/e"
	case 5:
		path = "/_matrix/federation/v1/state/r"
	case 6:
		path = "/_matrix/federation/v1/hierarchy/r"
	case 7:
		path = "/_matrix/federation/v1/event/e"
	}
	return matrix.Match(method, path)
}

// heard notes that a remote has shown itself well or not.
func (w *World) heard(h *remote, well bool) {
	if well {
		h.goodAt = w.now
	} else {
		h.badAt = w.now
	}
}

// bootHealth: after a start the core takes a remote for what the disk says, which
// may be older than what was heard.
func (w *World) bootHealth() {
	w.ending = false
	for _, r := range w.remotes {
		if w.disk[r.name].Failures > 0 {
			r.goodAt = 0
		}
	}
}

// unwell reports whether an old answer is better than asking a remote: its last
// attempt failed, or it limits us, or for its keys, it had none a moment ago.
func (w *World) unwell(h *remote, ep *matrix.Endpoint) bool {
	at := w.now.Add(-loadTakes)
	return h.badAt != 0 && h.badAt >= min(h.goodAt, at) || at < h.limitedUntil ||
		ep.Kind == matrix.AnswerServerKeys && h.noKeysAt != 0 && at.Sub(h.noKeysAt) < noKeysFor
}

// streams notes that a caller is being sent an answer, of which more is to come.
func (w *World) streams(a *attempt, r *request) {
	if a.done {
		if a.req != nil && a.endpoint.Whole > 0 {
			w.Counts["whole"]++
		}
	} else {
		a.streamed = w.now
	}
	if r.try < 2 {
		return
	}
	switch {
	case a.req == r:
	case !a.done:
		w.Counts["retry joined"]++
	default:
		w.Counts["retry kept"]++
	}
}

// mayCancel checks that nobody is being sent what an attempt brings. Who got it as
// far as it had come has given up once the time for a whole body is over.
func (w *World) mayCancel(a *attempt) {
	if a.streamed != 0 && w.now.Sub(a.streamed) < a.endpoint.Whole || a.streamed != 0 && a.endpoint.Whole == 0 {
		w.failf("attempt %d (%s) is cancelled %s after a caller got it, who may still read", a.id, a.endpoint.Name, w.now.Sub(a.streamed))
	}
	// Who was late is still worth its answer, unless it may not even be there.
	draining := w.ending || w.healed || w.out != nil && w.out.draining
	if a.servers != nil && w.now.Sub(a.sentAt) < 2*time.Second && !draining {
		w.failf("attempt %d for keys at %s is cancelled after %s", a.id, a.host.name, w.now.Sub(a.sentAt))
	}
}

// answeredInTime checks that a request has come to an end before its caller's does.
func (w *World) answeredInTime(r *request) {
	w.at(r.deadline.Sub(w.now), func() {
		if !r.ended {
			w.failf("request %d (%s) to %s is not answered in time", r.Req, r.Endpoint.Name, r.Dest)
		}
	})
}

// noKeys notes that a server was asked for its own keys in vain.
func (w *World) noKeys(a *attempt) {
	if a.via == ownName {
		a.host.noKeysAt = w.now
	}
}

// mayRefuse checks that a query to the bus itself is refused only for want of room:
// as a notary it says what it has.
func (w *World) mayRefuse(e bus.Refuse, r *request) {
	if r.query && r.Dest == ownName && e.Status != 503 {
		w.failf("query %d to the bus itself is refused: %s", r.Req, e.Text)
	}
}

// endsKeys counts the attempts that nobody waited for any more.
func (w *World) endsKeys(a *attempt) {
	if w.now.Sub(a.sentAt) < w.profile.Config.Keys.Wait {
		return
	}
	if a.via == ownName {
		w.Counts["late origin"]++
	} else {
		w.Counts["late batch"]++
	}
}

// restLookups checks that nothing is asked for any more.
func (w *World) restLookups() {
	s := w.m.Snapshot(w.now, 0)
	ahead := s.AheadWaiting
	if w.out != nil {
		ahead = 0 // it is drained soon after the last of them
	}
	if len(w.keys.wanted) != 0 || s.KeysWanted.Used != 0 || ahead != 0 || len(w.keys.fetches) != 0 {
		w.failf("at rest, %d keys are wanted, %d servers are to be connected to, %d are asked for their keys", s.KeysWanted.Used, ahead, len(w.keys.fetches))
	}
	for _, r := range w.remotes {
		if n := w.keys.running[r.name]; n != 0 || r.keys != 0 || r.running != 0 {
			w.failf("at rest, %s has %d batches, %d requests for keys and %d others", r.name, n, r.keys, r.running)
		}
	}
}

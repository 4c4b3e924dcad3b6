package sim

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// kept is an answer on disk.
type kept struct {
	bus.AnswerRecord
	status   int
	endpoint *matrix.Endpoint
	host     *remote
	said     [2]time.Duration // what it says of its own age
}

func keyOf(parts ...any) bus.Key { return sha256.Sum256([]byte(fmt.Sprint(parts...))) }

// drawAnswers draws the limits of what is kept.
func (w *World) drawAnswers(c *bus.Config) {
	c.KnownAnswers = int32(w.rng.IntN(50))
	c.CacheBytes = sched.Bytes(w.rng.IntN(200)) * sched.KiB
	c.KeepBytes = sched.Bytes(w.rng.IntN(3)) * sched.MiB / 2
	c.MediaBytes = sched.Bytes(w.rng.IntN(3)) * 100 * sched.KiB
	c.ProfileFresh = w.between(time.Second, 5*time.Minute)
	c.Preflight = float64(w.rng.IntN(20))
}

// records returns what the disk has of answers, the newest first.
func (w *World) records() (list []bus.AnswerRecord) {
	for _, k := range w.kept {
		list = append(list, k.AnswerRecord)
	}
	slices.SortFunc(list, func(a, b bus.AnswerRecord) int {
		return cmp.Or(cmp.Compare(b.Stored, a.Stored), bytes.Compare(a.Key[:], b.Key[:]))
	})
	return list
}

// ages returns how long an answer may be used: fresh, and after that.
func (w *World) ages(ep *matrix.Endpoint, status int, said [2]time.Duration) (fresh, stale time.Duration) {
	cfg := w.profile.Config
	switch {
	case status == 404:
		return ep.MissingFor, 0
	case status != 200:
		return 0, 0
	case ep.Kind == matrix.AnswerServerKeys:
		return said[0], said[1]
	case ep.Kind == matrix.AnswerProfile:
		return cfg.ProfileFresh, cfg.ProfileStale
	case ep.Kind == matrix.AnswerMedia:
		return cfg.MediaFor, 0
	case ep.Keep:
		return max(ep.CacheFor, cfg.KeepFor), 0
	}
	return ep.CacheFor, ep.StaleFor
}

// reply checks an answer to a request.
func (w *World) reply(e bus.Reply) {
	a, r := w.attempt(e.Op, "Reply"), w.reqs[e.Req]
	w.endRequest(e.Req, "reply")
	if !a.answered || a.dropped {
		w.failf("Reply to request %d with attempt %d: answered %t, discarded %t", e.Req, e.Op, a.answered, a.dropped)
	}
	want := r.Key
	if e.Field != "" {
		want = r.Whole
		w.Counts["field"]++
	}
	if a.key != want || e.Field != "" && e.Field != r.Field {
		w.failf("request %d (%s of %s) is answered with field %q of what was asked for otherwise", e.Req, r.Field, r.Endpoint.Name, e.Field)
	}
	if r != a.req && r.Endpoint.Share == matrix.ShareNever {
		w.failf("request %d (%s) shares attempt %d", e.Req, r.Endpoint.Name, e.Op)
	}
	w.Counts[e.From.String()]++
	fresh, stale := w.ages(a.endpoint, a.status, a.said)
	age := w.now.Sub(a.ended)
	late := r.deadline.Sub(w.now) <= time.Second // nothing better will come
	well := false
	switch e.From {
	case bus.FromRemote:
		well = a.req == r && e.Age == 0 && w.mayPass(a, r)
	case bus.FromOther:
		well = a.req != nil && a.req != r && e.Age == 0 && w.mayPass(a, r)
	case bus.FromCache:
		well = a.whole && !a.private && a.isOld(e.Age, age) && e.Age < fresh
	case bus.FromStale:
		well = a.whole && !a.private && a.isOld(e.Age, age) && e.Age < fresh+stale && a.status == 200 && (w.unwell(a.host, a.endpoint) || late)
	}
	if !well {
		w.failf("request %d gets attempt %d (%s), status %d, private %t, whole %t, %s old, from %s; it is good for %s and %s, and its host %s is unwell: %t",
			e.Req, e.Op, a.endpoint.Name, a.status, a.private, a.whole, e.Age, e.From, fresh, stale, a.host.name, w.unwell(a.host, a.endpoint))
	}
	w.streams(a, r)
	if e.From == bus.FromStale && !late {
		w.Counts["STALE in time"]++
	}
}

// isOld reports whether an answer is as old as the core says. What was loaded may
// be newer, as it was stored anew meanwhile.
func (a *attempt) isOld(says, age time.Duration) bool {
	return says == age || a.req == nil && says > age
}

// mayPass reports whether an answer may go to its caller now: all of it is there,
// or the rest follows in time, or the caller will not come again.
func (w *World) mayPass(a *attempt, r *request) bool {
	wants := a.endpoint.Whole
	switch {
	case wants == 0 || a.status != 200 || a.whole || a.passed:
		return true
	case a.total > 0 && a.arrived > 0:
		rest := float64(w.now.Sub(a.headers)) / float64(a.arrived) * float64(a.total-a.arrived)
		a.passed = time.Duration(rest) <= wants/2
		w.Counts["passed in the middle"]++
	}
	if !a.passed && r.deadline.Sub(w.now) <= time.Second {
		w.Counts["passed at last"]++
		return r.try >= r.Endpoint.Tries
	}
	return a.passed
}

// load reads an answer from the disk, after a while.
func (w *World) load(e bus.Load) {
	if w.atts[e.Op] != nil {
		w.failf("Load under attempt %d, which there was", e.Op)
	}
	a := &attempt{id: e.Op, key: e.Key}
	w.atts[e.Op] = a
	w.Counts["load"]++
	fails := w.rng.IntN(15) == 0
	w.at(w.between(100*time.Microsecond, 200*time.Millisecond), func() {
		a.done = true
		k, ok := w.kept[e.Key]
		if !ok || fails {
			a.dropped = true
			w.step(bus.Loaded{Op: e.Op})
			return
		}
		a.answered, a.whole, a.status, a.endpoint, a.host, a.said, a.ended = true, true, k.status, k.endpoint, k.host, k.said, k.Stored
		w.step(bus.Loaded{Op: e.Op, OK: true, Status: k.status, Size: int64(w.rng.IntN(20000))}) // of which some are too large to be kept
	})
}

// keepable checks the answers that are to be stored, and returns what the disk will
// have of them.
func (w *World) keepable(list []bus.KeptAnswer) (rows []kept) {
	for _, k := range list {
		a := w.attempt(k.Op, "Commit")
		fresh, stale := time.Duration(0), time.Duration(0)
		if a.endpoint != nil {
			fresh, stale = w.ages(a.endpoint, a.status, a.said)
		}
		switch {
		case !a.whole || a.dropped || a.private || a.key != k.Key || !a.endpoint.Durable:
			w.failf("attempt %d is stored: whole %t, discarded %t, private %t", k.Op, a.whole, a.dropped, a.private)
		case k.Stored != a.ended || k.Fresh != a.ended.Add(fresh) || k.Stale != k.Fresh.Add(stale) || fresh == 0:
			w.failf("attempt %d (%s, status %d) is stored as %+v, but is good for %s and %s", k.Op, a.endpoint.Name, a.status, k.AnswerRecord, fresh, stale)
		}
		rows = append(rows, kept{k.AnswerRecord, a.status, a.endpoint, a.host, a.said})
	}
	return rows
}

// keep has the disk take answers, and forget the oldest of too many.
func (w *World) keep(rows []kept) {
	for _, k := range rows {
		w.kept[k.Key] = k
		w.Counts["stored"]++
	}
	list := w.records()
	for _, r := range list[min(len(list), int(w.profile.Config.KnownAnswers)):] {
		delete(w.kept, r.Key)
	}
}

// restAnswers checks that all answers but those that are kept have been let go.
func (w *World) restAnswers() {
	held := 0
	for _, op := range slices.Sorted(maps.Keys(w.atts)) {
		if a := w.atts[op]; !a.dropped {
			held++
			if !a.done {
				w.failf("at rest, attempt %d goes on", op)
			}
		}
	}
	s := w.m.Snapshot(w.now, 0)
	if n := s.Cache.Entries + s.Whole.Entries + s.Media.Entries; n != held {
		w.failf("at rest, %d answers are held, the core keeps %d", held, n)
	}
}

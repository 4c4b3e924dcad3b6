package sim

import (
	"fmt"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// do executes one effect, checking that it is allowed.
func (w *World) do(e bus.Effect) {
	if w.out != nil && w.outboxEffect(e) {
		return
	}
	switch e := e.(type) {
	case bus.Send:
		w.send(e)
	case bus.Cancel:
		a := w.attempt(e.Op, "Cancel")
		if a.done || a.cancel {
			w.failf("Cancel of attempt %d, done %t, cancelled %t", e.Op, a.done, a.cancel)
		}
		w.mayCancel(a)
		a.cancel = true
		if a.txn != nil && !a.sent {
			w.Counts["delivery put off"]++
		}
		w.at(w.between(0, 5*time.Millisecond), func() { w.finish(a, matrix.FailCancelled) })
	case bus.Reply:
		w.reply(e)
		if w.reqs[e.Req].healed {
			w.Counts["healed reply"]++
		}
	case bus.ReplyKeys:
		w.replyKeys(e)
	case bus.KeyFetched:
		if !w.keys.wanted[e.For] {
			w.failf("key %d is over, which nobody waits for", e.For)
		}
		delete(w.keys.wanted, e.For)
		w.Counts["key wanted"]++
	case bus.JoinWindow:
		if w.keys.joining[e.Room] == e.Open {
			w.failf("the join window of %s is open twice, or not: %t", e.Room, e.Open)
		}
		w.keys.joining[e.Room] = e.Open
		w.Counts[fmt.Sprint("join window ", e.Open)]++
	case bus.Load:
		w.load(e)
	case bus.LoadKeys:
		w.loadKeys(e)
	case bus.Refuse:
		if e.Status < 400 || e.Code == "" || e.Text == "" {
			w.failf("refusal without a reason: %+v", e)
		}
		w.endRequest(e.Req, "refuse")
		w.mayRefuse(e, w.reqs[e.Req])
		if e.Status == 504 {
			w.again(w.reqs[e.Req])
		}
	case bus.Free:
		r := w.reqs[e.Req]
		if r == nil || r.freed {
			w.failf("Free of request %d, which is not held", e.Req)
		}
		r.freed = true
	case bus.Discard:
		a := w.attempt(e.Op, "Discard")
		if !a.done || a.dropped {
			w.failf("Discard of attempt %d: done %t, discarded %t", e.Op, a.done, a.dropped)
		}
		a.dropped = true
	case bus.Commit:
		w.commit(e)
	case bus.Drained:
		w.drained = true
		if w.out != nil {
			w.hasDrained()
		}
		w.hasEnded()
	default:
		w.failf("unknown effect %T", e)
	}
}

func (w *World) attempt(id bus.OpID, what string) *attempt {
	a := w.atts[id]
	if a == nil {
		w.failf("%s for attempt %d, which was never sent", what, id)
	}
	return a
}

func (w *World) endRequest(id bus.ReqID, how string) {
	r := w.reqs[id]
	switch {
	case r == nil:
		w.failf("%s to request %d, which never arrived", how, id)
	case r.ended:
		w.failf("%s to request %d, which has ended (gone: %t)", how, id, r.gone)
	case w.now >= r.deadline:
		w.failf("%s to request %d (%s) %s after its caller's time-out", how, id, r.Endpoint.Name, w.now.Sub(r.deadline))
	}
	r.ended = true
	w.Counts[how]++
	w.Counts[how+" "+r.Class.String()]++
}

func (w *World) commit(e bus.Commit) {
	ok := w.rng.IntN(20) != 0
	rows := w.keepable(e.Answers)
	w.at(w.between(100*time.Microsecond, 30*time.Millisecond), func() {
		if ok {
			w.keep(rows)
			for _, h := range e.Hosts {
				w.disk[h.Name] = h
			}
		}
		for _, h := range e.Hosts {
			if r := w.byName[h.Name]; h.NextTry > w.now {
				r.intent = true // or its failure was: either allows the one attempt that follows
			}
		}
		w.step(bus.Committed{Batch: e.Batch, OK: ok})
	})
}

// send starts an attempt and decides what comes of it.
func (w *World) send(e bus.Send) {
	r := w.reqs[e.Req]
	keys := e.Origin || e.Notary != nil
	if w.atts[e.Op] != nil || keys && e.Ahead || (keys || e.Ahead) != (e.Req == 0) || e.Req != 0 && (r == nil || r.freed || r.Dest != e.Dest) {
		w.failf("Send of attempt %d for request %d", e.Op, e.Req)
	}
	h := w.byName[e.Dest]
	a := &attempt{id: e.Op, req: r, host: h, sentAt: w.now}
	w.atts[e.Op] = a
	switch {
	case keys:
		w.asksKeys(e, a)
	case e.Ahead:
		w.Counts["ahead"]++
		a.ahead = true
	default:
		w.Counts["send"]++
		a.key, a.endpoint = r.Key, r.Endpoint
	}
	if h.connected {
		w.reached(r)
	}
	w.limits(a, e.Class)
	h.triedAt = w.now

	open := h.connected
	connect := w.between(time.Millisecond, 200*time.Millisecond)
	if open {
		connect = 0
	}
	latency := w.between(time.Millisecond, 300*time.Millisecond)
	body := w.between(time.Millisecond, 2*time.Second)
	large := a.endpoint != nil && a.endpoint.Whole > 0
	if large && w.rng.IntN(2) == 0 {
		body = w.between(time.Second, 3*time.Minute)
	}
	if large && w.profile.Lookups && w.rng.IntN(3) == 0 {
		body = w.between(3*time.Minute, 10*time.Minute)
	}
	does := w.does(h)
	if open && (does == refuses || does == noName || does == hangs) {
		w.at(latency, func() { h.connected = false; w.finish(a, matrix.FailReset) })
		return
	}
	switch does {
	case refuses:
		w.at(connect, func() { w.finish(a, matrix.FailRefused) })
		return
	case noName:
		w.at(connect, func() { w.finish(a, matrix.FailNoName) })
		return
	case hangs:
		w.at(8*time.Second, func() { w.finish(a, matrix.FailTimeout) })
		return
	}
	if !open {
		w.at(connect, func() {
			if !a.done {
				h.connected, h.failures = true, 0
				w.reached(r)
				w.step(bus.Connected{Op: a.id})
			}
		})
	}
	if e.Ahead {
		w.at(connect, func() { w.finish(a, matrix.FailNone) })
		return
	}
	status, retry := 200, time.Duration(0)
	switch does {
	case mute:
		return // until it is cancelled
	case slow:
		latency = w.between(time.Second, 20*time.Second)
	case limits:
		if w.rng.IntN(2) == 0 {
			status, retry = 429, w.between(0, 5*time.Second)
		}
	case gatewayDown:
		status = 502
	}
	code := ""
	if w.rng.IntN(10) == 0 && status == 200 {
		status = []int{404, 404, 400, 500}[w.rng.IntN(4)]
		code = []string{matrix.MUnableToAuthoriseJoin, matrix.MUnableDueToPartialState, "M_FORBIDDEN"}[w.rng.IntN(3)]
	}
	size := int64(w.rng.IntN(20000))
	if large {
		size *= 20
	}
	a.size, a.total = size, []int64{-1, size}[w.rng.IntN(2)]
	w.at(connect+latency, func() {
		if a.done {
			return
		}
		a.answered, a.status, a.headers = true, status, w.now
		w.heard(h, status != 429 && status != 502)
		if status == 429 {
			h.limitedUntil = max(h.limitedUntil, w.now.Add(max(retry, time.Second))) // one that does not say is taken for that
		}
		if status != 502 {
			h.failures = 0
		}
		if large {
			w.body(a, size, body)
		}
		w.step(bus.Answered{Op: a.id, Status: status, RetryAfter: retry, Size: a.total, Code: code})
	})
	w.at(connect+latency+body, func() {
		if does == cuts {
			w.finish(a, matrix.FailCut)
			return
		}
		w.finish(a, matrix.FailNone)
	})
}

// does returns what a remote does at this moment.
func (w *World) does(h *remote) behaviour {
	switch {
	case w.out != nil && w.out.partition:
		return []behaviour{refuses, hangs}[w.rng.IntN(2)]
	case h.does != flaps:
		return h.does
	case (w.now/sched.Time(20*time.Second))%2 == 0:
		return refuses
	}
	return healthy
}

// reached notes that a remote has seen a request.
func (w *World) reached(r *request) {
	if r == nil {
		return
	}
	if r.Endpoint.Once && w.onceSent[r.Req] {
		w.failf("request %d (%s) reaches the remote twice", r.Req, r.Endpoint.Name)
	}
	w.onceSent[r.Req] = true
}

// limits checks what the host may be asked for.
func (w *World) limits(a *attempt, class matrix.Class) {
	cfg, h := w.profile.Config, a.host
	a.class = class
	if class == matrix.ClassKey { // a remote does not count these
		if h.keys++; h.keys > int(cfg.Keys.Parallel) {
			w.failf("%d requests for keys at %s at a time", h.keys, h.name)
		}
	} else if h.running++; h.running > int(cfg.HostConcurrency) {
		w.failf("%d attempts at %s at a time", h.running, h.name)
	}
	all := 0
	for _, o := range w.remotes {
		all += o.running + o.keys
	}
	if w.workers = max(w.workers, int(cfg.Workers)); all > w.workers {
		w.failf("%d attempts at a time, %d workers", all, w.workers)
	}
	recent := h.sends[:0]
	for _, t := range h.sends {
		if w.now.Sub(t) < time.Second {
			recent = append(recent, t)
		}
	}
	h.sends = recent
	if class > matrix.ClassEvent && class != matrix.ClassKey && a.txn == nil && !a.ahead { // others do not wait for the rate
		h.sends = append(recent, w.now)
	}
	if most := int(cfg.HostRate) + int(cfg.HostBurst) + 1; len(h.sends) > most {
		w.failf("%d attempts at %s within a second, %d at most", len(h.sends), h.name, most)
	}
	if h.failures == 0 || h.stranger { // how that one failed may have been forgotten
		return
	}
	// The least pause after any failure is 80 % of 5 s; only a join may come
	// sooner than the back-off says, and never sooner than after 30 s.
	least := 4 * time.Second
	for i := 1; i < h.failures && least < 150*time.Second; i++ {
		least *= 2
	}
	if class == matrix.ClassJoin {
		least = min(least, 29*time.Second)
	}
	if least = min(least, 4*time.Minute); h.flushed {
		h.flushed, least = false, 0
	}
	if got := w.now.Sub(h.failedAt); got < least && h.spent <= int(w.now.Sub(w.bootedAt)/spendEach) {
		h.spent++ // for a user's sake
		w.Counts["spent"]++
	} else if got < least {
		w.failf("%s is tried %s after failure %d in a row, %s is the least", h.name, got, h.failures, least)
	}
	if !h.intent {
		w.failf("%s is tried after %d failures without an intent on disk", h.name, h.failures)
	}
	h.intent = false
}

// finish ends an attempt, once.
func (w *World) finish(a *attempt, f matrix.Failure) {
	if a.done {
		return
	}
	a.done = true
	h := a.host
	if a.class == matrix.ClassKey {
		h.keys--
	} else {
		h.running--
	}
	// In an outage, and of a remote that hangs in turn, the core may rightly take a
	// connection that hangs for one that is open and broken, as long as others have
	// worked.
	if f.NeverConnected() || f == matrix.FailTimeout && (w.out == nil || !w.out.partition && (w.out.profile.Ill == 0 || a.txn != nil && !a.sent)) && !w.profile.Lookups {
		h.failures++
		h.failedAt = w.now
		h.intent = false
	}
	if f != matrix.FailNone || a.status == 429 || a.status == 502 {
		w.heard(h, false)
	}
	if f == matrix.FailNone && !a.answered && !a.ahead {
		w.failf("attempt %d ends well without an answer", a.id)
	}
	if a.txn != nil {
		h.delivering = nil
		w.triedOut(a, f == matrix.FailNone && a.status == 200)
		w.step(bus.Done{Op: a.id, Failure: f, Detail: f.String(), Size: 2, Sent: a.sent})
		return
	}
	done := bus.Done{Op: a.id, Failure: f, Detail: f.String(), Size: a.size, Kept: f == matrix.FailNone && a.size < 20000 && w.rng.IntN(4) != 0}
	switch {
	case a.ahead:
	case a.servers != nil:
		done.Missing = w.hasKeys(a, f == matrix.FailNone && a.status == 200)
	default:
		a.whole, a.ended, a.private = f == matrix.FailNone, w.now, w.rng.IntN(10) == 0
		if a.endpoint.Kind == matrix.AnswerServerKeys && a.status == 200 && w.rng.IntN(4) != 0 {
			a.said = [2]time.Duration{w.between(time.Second, time.Hour), w.between(0, time.Hour)}
		}
		done.Private, done.Fresh, done.Stale = a.private, a.said[0], a.said[1]
	}
	w.step(done)
}

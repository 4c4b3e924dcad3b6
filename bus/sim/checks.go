package sim

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

// offer returns the homeserver's attempt that an effect is about.
func (w *World) offer(id bus.ReqID, what string) *offer {
	o := w.out.offers[id]
	if o == nil {
		w.failf("%s for transaction %d, which was never offered", what, id)
	}
	return o
}

func (w *World) endOffer(id bus.ReqID, how string) {
	o := w.offer(id, how)
	if o.ended {
		w.failf("transaction %d is %s, which has ended", id, how)
	}
	o.ended = true
	w.Counts["offer "+how]++
}

// acknowledge checks that what the homeserver now forgets is on disk, or was.
func (w *World) acknowledge(id bus.ReqID) {
	o := w.offer(id, "Acknowledge")
	w.endOffer(id, "acknowledged")
	if o.accepted == 0 || !o.stored {
		w.failf("transaction %d is acknowledged: stored %t, and known to be %t", id, o.stored, o.accepted != 0)
	}
	for _, it := range o.txn.items {
		if it.fate == nowhere {
			w.failf("transaction %d is acknowledged, item %d of it is nowhere", id, it.n)
		}
	}
	if held := w.now.Sub(o.accepted); held > w.longestHold() && !o.loose {
		w.failf("the answer of transaction %d was held for %s", id, held)
	}
	w.out.hs.answered(o)
}

// longestHold is how long the pacer may hold an answer: that of a destination
// which cannot be reached.
func (w *World) longestHold() time.Duration {
	return min(2*w.profile.Config.Outbox.Pace.Hold, 45*time.Second)
}

// due has a transaction checked for its answer when it must have come: what the
// pacer may hold it for, and before that the disk's longest queue.
func (w *World) due(o *offer) {
	w.at(50*time.Second, func() {
		disk := w.out.disk
		if o.ended || o.accepted == 0 {
			if !o.ended && !disk.lagging(o.at) {
				w.failf("transaction %d is not stored after 50 s", o.req)
			}
			return
		}
		if left := w.longestHold() - w.now.Sub(o.accepted); left <= 0 && !o.loose {
			w.failf("transaction %d is not answered after 50 s", o.req)
		}
	})
}

// lagging reports whether the disk still works on what it was given at a moment.
func (d *disk) lagging(at sched.Time) bool { return d.reported < at.Add(30*time.Second) }

// begins notes that the core packs for a destination: nothing else may be under
// way for it.
func (w *World) begins(e bus.Pack) *diskDest {
	r := w.byName[e.Dest]
	o := w.out
	switch {
	case r.busy != "" || r.delivering != nil:
		w.failf("Pack for %s while it has a %s under way, delivering %t", e.Dest, r.busy, r.delivering != nil)
	case o.ids[e.TxnID] || e.TxnID == "" || strings.Trim(e.TxnID, "0123456789") == "":
		w.failf("Pack for %s under the id %q, which is another's", e.Dest, e.TxnID)
	case o.draining || o.suspended:
		w.failf("Pack for %s while draining (%t) or suspended (%t)", e.Dest, o.draining, o.suspended)
	}
	o.ids[e.TxnID] = true
	r.busy = "pack"
	return o.disk.dests[r.index]
}

// hasPacked notes a transaction of which the core is about to be told.
func (w *World) hasPacked(batch bus.BatchID, dd *diskDest, p *packed) {
	dd.r.busy = ""
	if p == nil {
		return
	}
	for _, n := range p.expired {
		w.Counts["expired"] += int(n)
	}
	w.Counts["malformed"] += int(p.setAside)
	if p.id != "" {
		w.out.packs[batch] = p
	}
}

// mayDeliver checks a Send of a transaction.
func (w *World) mayDeliver(h *remote, e bus.Send) *packed {
	p := w.out.packs[e.Batch]
	if e.Control != "" {
		p = w.controls(h, e)
	}
	if p == nil || p.unpacked || p.dest.r != h || w.atts[e.Op] != nil {
		w.failf("Send of batch %d to %s, which is not packed", e.Batch, e.Dest)
	}
	if h.busy != "" || h.delivering != nil {
		w.failf("Send to %s while it has a %s under way, delivering %t", e.Dest, h.busy, h.delivering != nil)
	}
	if parts := p.dest.parts; e.Control == "" && (len(parts) == 0 || parts[0].id != p.id) && w.Counts["drop"] == 0 {
		w.failf("Send of transaction %s to %s, which is not frozen on disk", p.id, e.Dest)
	}
	content := ""
	for _, it := range p.items {
		content += fmt.Sprint(it.n, " ")
	}
	if old, sent := h.content[p.id]; sent && old != content {
		w.failf("transaction %s to %s was %q and is %q", p.id, e.Dest, old, content)
	}
	h.content[p.id] = content
	w.tried(h, p)
	return p
}

// reaches notes that some of a transaction may have arrived.
func (w *World) reaches(a *attempt) {
	a.sent = true
	a.host.reached[a.txn.id] = true
}

// takes has a remote take a transaction, unless it has it.
func (w *World) takes(h *remote, p *packed) {
	if h.taken[p.id] {
		return
	}
	h.taken[p.id] = true
	keys := map[string]bool{}
	for _, it := range p.items {
		if it.to != h {
			w.failf("item %d for %s comes to %s", it.n, it.to.name, h.name)
		}
		if it.got++; it.got > 1 && it.unclear {
			w.Counts["taken twice"]++
			continue
		} else if it.got > 1 {
			w.failf("%s has item %d for the second time, in transaction %s", h.name, it.n, p.id)
		}
		if it.fate != pending && it.fate != dropped {
			w.failf("%s takes item %d, which is %s", h.name, it.n, it.fate)
		}
		if it.kind == matrix.KindPDU {
			last := h.events[it.room]
			if it.event < last {
				w.failf("%s gets event %d of room %d after event %d", h.name, it.event, it.room, last)
			}
			h.events[it.room] = it.event
		}
		if it.version == 0 {
			continue
		}
		key := it.kind.String() + " " + it.key
		if keys[key] {
			w.failf("transaction %s has two of %s", p.id, key)
		}
		keys[key] = true
		if last := h.versions[key]; it.version <= last {
			w.failf("%s gets version %d of %s after %d", h.name, it.version, key, last)
		}
		h.versions[key] = it.version
	}
}

// ends checks what the core says of a transaction.
func (w *World) ends(e bus.Settle) *diskDest {
	h := w.byName[e.Dest]
	if h.busy != "" || h.delivering != nil {
		w.failf("Settle for %s while it has a %s under way, delivering %t", e.Dest, h.busy, h.delivering != nil)
	}
	h.busy = "settle"
	switch {
	case e.Outcome == bus.Delivered && !h.taken[e.TxnID]:
		w.failf("transaction %s is delivered, but %s has not taken it", e.TxnID, e.Dest)
	case e.Outcome == bus.Thaw && h.reached[e.TxnID]:
		w.failf("transaction %s is thawed, but some of it may have reached %s", e.TxnID, e.Dest)
	case e.Outcome == bus.Bisect && (h.attempts(e.TxnID) < 3 || !h.control || e.Reason == ""):
		w.failf("transaction %s is bisected after %d attempts at %s, its control taken: %t, for %q", e.TxnID, h.attempts(e.TxnID), e.Dest, h.control, e.Reason)
	}
	dd := w.out.disk.dests[h.index]
	if e.Outcome == bus.Bisect && len(dd.parts) > 0 && dd.parts[0].id == e.TxnID {
		w.divides(h, dd.parts[0].items)
	}
	return dd
}

// divides checks that what is divided, or set aside if it stands alone, is disliked by
// its destination: an outage is no reason.
func (w *World) divides(h *remote, items []*item) {
	for _, it := range items {
		it.unclear = it.unclear || it.got > 0
	}
	if !h.flaky && !slices.ContainsFunc(items, func(it *item) bool { return it.poison }) {
		w.failf("%d items for %s are divided, or set aside, and it dislikes none of them", len(items), h.name)
	}
}

// tries is how often a transaction was sent, of which some may have arrived.
type tries struct {
	n     int
	last  sched.Time // when the last attempt ended
	fails int        // since the server was last found to be ill, and well again
	epoch int

	limited bool // by the last answer, which said for how long
}

// attempts returns how many attempts at a transaction failed that may have reached the
// remote.
func (h *remote) attempts(id string) int {
	if t := h.tries[id]; t != nil {
		return t.n
	}
	return 0
}

// spendEach is how often a host may be tried ahead of its time for a user's sake.
const spendEach = 5 * time.Minute

// tried checks that a transaction is not attempted more often than its own back-off
// allows, whatever else happens: only an admin, and now and then something from its
// destination, may end it early.
func (w *World) tried(h *remote, p *packed) {
	t := h.tries[p.id]
	if t == nil {
		t = &tries{}
		h.tries[p.id] = t
	}
	if p.control {
		return
	}
	free := h.freed
	h.freed = false
	if h.aliveAt >= t.last && (h.rousedAt == 0 || w.now.Sub(h.rousedAt) >= 10*time.Minute) {
		free = true
	}
	least := time.Duration(0)
	for i := range t.fails {
		least = min(4*time.Second<<min(i, 10), 8*time.Minute)
	}
	if got := w.now.Sub(t.last); got < least && t.epoch == w.epoch && !t.limited {
		if !free {
			w.failf("transaction %s to %s is sent %s after it had failed %d times, %s is the least", p.id, h.name, got, t.fails, least)
		}
		if h.aliveAt >= t.last {
			h.rousedAt = w.now
		}
	}
}

// controls returns the empty transaction that the core sends.
func (w *World) controls(h *remote, e bus.Send) *packed {
	if w.out.ids[e.Control] || e.Batch != 0 {
		w.failf("Send of the control %q to %s, which is another's id, with batch %d", e.Control, e.Dest, e.Batch)
	}
	w.out.ids[e.Control] = true
	w.Counts["control"]++
	return &packed{dest: w.out.disk.dests[h.index], id: e.Control, control: true}
}

// triedOut notes how an attempt at a transaction ended.
func (w *World) triedOut(a *attempt, well bool) {
	h, p := a.host, a.txn
	if p.control {
		if well && !h.control {
			for _, t := range h.tries { // each for itself
				t.fails = 0
			}
		}
		if a.sent {
			h.control = well
		}
		return
	}
	t := h.tries[p.id]
	if !a.sent || well {
		return
	}
	if t.epoch != w.epoch {
		t.epoch, t.fails = w.epoch, 0
	}
	t.n, t.last = t.n+1, w.now
	if t.limited = a.status == 429 && h.does != limitsAll; !t.limited {
		t.fails++
	}
}

func (w *World) trims(e bus.Compact) *diskDest {
	h := w.byName[e.Dest]
	if h.busy != "" || h.delivering != nil {
		w.failf("Compact for %s while it has a %s under way, delivering %t", e.Dest, h.busy, h.delivering != nil)
	}
	h.busy = "compact"
	dd := w.out.disk.dests[h.index]
	if b := dd.backlog(); b.Oldest == 0 || w.now.Sub(b.Oldest) < w.profile.Config.Outbox.CatchUpAfter-3*time.Second {
		if !h.trimming {
			w.failf("Compact for %s, of which the oldest item waits for %s", e.Dest, w.now.Sub(b.Oldest))
		}
	}
	return dd
}

func (w *World) counts(s settled) {
	w.Counts["set aside"] += int(s.setAside)
	w.Counts["thaw merged"] += s.merged
	if s.divided {
		w.Counts["bisect"]++
	}
	if s.thawed {
		w.Counts["thaw"]++
	}
}

// look has every status made, and counts what is rarely seen otherwise.
func (w *World) look() {
	w.m.Queues(w.now, func(s bus.QueueStatus) {
		if s.Why == "" || !slices.Contains([]string{"idle", "waiting", "queued", "sending", "backing off", "held"}, s.State) {
			w.failf("the state of %s is %q: %q", s.Name, s.State, s.Why)
		}
		if s.NextTry != 0 && s.NextTry <= w.now {
			w.failf("the next try of %s (%s, %s) was to be %s ago", s.Name, s.State, s.Why, w.now.Sub(s.NextTry))
		}
		w.Counts["state "+s.State]++
		if strings.Contains(s.Why, "destinations are before it") {
			w.Counts["line"]++
		}
	})
	w.m.Outbox(w.now)
}

// isDelivered reports whether all that was acknowledged has come to its end.
func (w *World) isDelivered() bool {
	if !w.out.hs.idle() {
		return false
	}
	for _, dd := range w.out.disk.dests {
		if !dd.empty() && dd.r.does != broken {
			return false
		}
	}
	return true
}

func (w *World) undelivered() (s string) {
	for i, dd := range w.out.disk.dests {
		d := w.out.hs.dests[i]
		if dd.empty() && d.flight == nil && len(d.waits) == 0 {
			continue
		}
		q, _ := w.m.QueueStatus(w.now, dd.r.name)
		s += fmt.Sprintf("\n%s: %d frozen, %d others, in flight to the bus: %t, waiting for it: %d; %s: %s", dd.r.name, len(dd.frozen()), len(dd.wait), d.flight != nil, len(d.waits), q.State, q.Why)
	}
	return s
}

func (w *World) noneUnderWay(when string) {
	for _, r := range w.remotes {
		if r.busy != "" || r.delivering != nil {
			w.failf("%s, but %s has a %s under way, delivering %t", when, r.name, r.busy, r.delivering != nil)
		}
	}
}

// restOutbox checks that nothing is left undone.
func (w *World) restOutbox() {
	o := w.out
	for _, of := range o.offers {
		if !of.ended || !of.freed {
			w.failf("at rest, transaction %d to %s: ended %t, freed %t", of.req, of.to.name, of.ended, of.freed)
		}
	}
	for id, p := range o.packs {
		if !p.unpacked {
			w.failf("at rest, batch %d to %s is not unpacked", id, p.dest.r.name)
		}
	}
	w.noneUnderWay("at rest")
	type subject struct {
		to  *remote
		key string
	}
	newest := map[subject]*item{}
	for _, it := range o.hs.items {
		w.Counts["item "+it.fate.String()]++
		healed := it.to.does != broken
		var well bool
		switch it.fate {
		case nowhere:
			well = !it.acked
		case pending:
			well = !healed
		case delivered:
			well = it.got == 1 || it.got > 1 && it.unclear
		case merged, expired, superseded:
			well = it.got == 0 && it.kind != matrix.KindToDevice && it.kind != matrix.KindOther
			switch it.kind {
			case matrix.KindPDU:
				well = well && it.fate == superseded
			case matrix.KindDeviceList, matrix.KindSigningKey:
				well = well && it.fate == merged
			default:
				well = well && it.fate != superseded
			}
		case duplicate:
			well = it.got == 0 && it.kind == matrix.KindPDU
		case aside:
			well = it.got == 0 && (it.poison || it.malformed) || it.to.flaky
		case dropped:
			well = true
		}
		if !well {
			w.failf("at rest, item %d (%s, version %d, event %d) for %s is %s, acknowledged %t, received %d times", it.n, it.kind, it.version, it.event, it.to.name, it.fate, it.acked, it.got)
		}
		if it.fate != nowhere && it.version != 0 {
			newest[subject{it.to, it.kind.String() + " " + it.key}] = it
		}
	}
	for s, it := range newest { // each is checked for itself
		if it.fate == delivered && s.to.versions[s.key] != it.version {
			w.failf("at rest, %s has version %d of %s, the newest is %d", s.to.name, s.to.versions[s.key], s.key, it.version)
		}
		if it.fate == merged {
			w.failf("at rest, the newest version of %s for %s is merged", s.key, s.to.name)
		}
	}
	for i, room := range o.hs.rooms {
		for _, to := range room.members {
			r := w.remotes[to]
			if room.newest == nil || room.newest.poison || room.newest.malformed || r.does == broken || r.flaky || w.Counts["drop"] > 0 {
				continue
			}
			if got := r.events[i]; got != room.events {
				w.failf("at rest, the newest event of room %d that %s has is %d, there are %d", i, r.name, got, room.events)
			}
		}
	}
	w.balance()
}

// balance checks that the core's counts of items add up, if it has not been
// restarted.
func (w *World) balance() {
	s, _ := w.m.Outbox(w.now)
	var in, out, left int64
	for k := range s.Items {
		in += s.Stats.ItemsIn[k]
		out += s.Stats.ItemsOut[k] + s.Stats.Expired[k]
		left += s.Items[k]
	}
	out += s.Stats.Merged + s.Stats.Duplicates + s.Stats.Superseded + s.Stats.SetAside + int64(w.out.thawMerged)
	if w.epoch == 1 && w.Counts["drop"] == 0 && in != out+left {
		w.failf("%d items came in, %d are out and %d left", in, out, left)
	}
	for _, dd := range w.out.disk.dests {
		q, ok := w.m.QueueStatus(w.now, dd.r.name)
		if want := dd.backlog(); (ok || !dd.empty()) && q.Backlog != want {
			w.failf("the core takes %+v to be pending for %s, it is %+v", q.Backlog, dd.r.name, want)
		}
	}
}

package bus

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// outboxRig is a rig with an outbox, of which it also plays the store: it knows
// how many items of each kind are pending, packs them all, and freezes them.
type outboxRig struct {
	*rig
	pending map[matrix.ServerName]*Backlog
	frozen  map[matrix.ServerName][]*frozenTxn // one, or the parts of one
	most    int32                              // PDUs in a transaction, 0: all
}

type frozenTxn struct {
	id    string // "": not packed yet
	items [matrix.NumKinds + 1]int32
}

// halve divides what was refused; one of a single item is empty.
func (f *frozenTxn) halve() (parts []*frozenTxn) {
	all := Backlog{Items: f.items}
	first, second := new(frozenTxn), new(frozenTxn)
	half := int32(all.Total() / 2)
	for k, n := range f.items {
		first.items[k] = min(n, half)
		second.items[k] = n - first.items[k]
		half -= first.items[k]
	}
	if all.Total() == 1 {
		return nil
	}
	return []*frozenTxn{first, second}
}

// newOutboxRig answers the homeserver at once, unless change says otherwise.
func newOutboxRig(t *testing.T, change func(*Config)) *outboxRig {
	t.Helper()
	r := newRig(t, func(c *Config) {
		c.Outbox = DefaultOutbox()
		c.Outbox.Pace.Ack = AckOff
		if change != nil {
			change(c)
		}
	})
	o := &outboxRig{rig: r, pending: map[matrix.ServerName]*Backlog{}, frozen: map[matrix.ServerName][]*frozenTxn{}}
	o.now = o.now.Add(time.Hour) // so that a test can speak of what came before
	return o
}

func (r *outboxRig) backlog(dest matrix.ServerName) *Backlog {
	b := r.pending[dest]
	if b == nil {
		b = new(Backlog)
		r.pending[dest] = b
	}
	if b.Total() == 0 {
		b.Oldest = 0
	}
	return b
}

// offer has the homeserver send a transaction.
func (r *outboxRig) offer(dest matrix.ServerName) ReqID {
	r.t.Helper()
	r.req++
	r.step(Offered{Req: r.req, Dest: dest, Class: matrix.ClassEvent})
	r.one("the store is asked to take it over", len(of[Accept](r.last)) == 1 && of[Accept](r.last)[0].Req == r.req)
	return r.req
}

// stores has the store take over what was offered.
func (r *outboxRig) stores(req ReqID, dest matrix.ServerName, kinds ...matrix.Kind) {
	r.t.Helper()
	b := r.backlog(dest)
	ev := Accepted{Req: req}
	for _, k := range kinds {
		ev.Kinds[k]++
		b.Items[k]++
		b.Bytes += 100
	}
	if b.Oldest == 0 {
		b.Oldest = r.now
	}
	ev.Backlog = *b
	r.step(ev)
}

// take has the outbox take over a transaction of such items.
func (r *outboxRig) take(dest matrix.ServerName, kinds ...matrix.Kind) ReqID {
	r.t.Helper()
	req := r.offer(dest)
	r.stores(req, dest, kinds...)
	return req
}

// only returns the only effect of its kind in the last step.
func only[E Effect](r *outboxRig, what string) E {
	r.t.Helper()
	found := of[E](r.last)
	r.one(what, len(found) == 1)
	return found[0]
}

// packs answers the Pack of the last step, and returns the Send that follows.
func (r *outboxRig) packs() Send {
	r.t.Helper()
	p := only[Pack](r, "want one Pack")
	b := r.backlog(p.Dest)
	if r.frozen[p.Dest] == nil {
		f := &frozenTxn{items: b.Items}
		if r.most > 0 {
			f.items[kPDU] = min(f.items[kPDU], r.most)
		}
		r.frozen[p.Dest] = []*frozenTxn{f}
	}
	f := r.frozen[p.Dest][0]
	again := f.id != ""
	if !again {
		f.id = p.TxnID
	}
	b.Frozen = true
	txn := TxnInfo{ID: f.id, Again: again, Bytes: b.Bytes, Oldest: b.Oldest}
	for k, n := range f.items {
		if matrix.Kind(k) == kPDU {
			txn.PDUs += n
		} else {
			txn.EDUs += n
		}
	}
	r.step(Packed{Batch: p.Batch, OK: true, Txn: txn, Backlog: *b})
	return r.sent()
}

// ends has the attempt end with an answer.
func (r *outboxRig) ends(s Send, status int) {
	r.t.Helper()
	r.step(Answered{Op: s.Op, Status: status})
	r.step(Done{Op: s.Op, Size: 2, Sent: true})
}

// breaks has the attempt end without an answer.
func (r *outboxRig) breaks(s Send, f matrix.Failure, sent bool) {
	r.t.Helper()
	r.step(Done{Op: s.Op, Failure: f, Detail: "simulated", Sent: sent})
}

// settles has the store note the outcome that the last step names.
func (r *outboxRig) settles() Settle {
	r.t.Helper()
	s := only[Settle](r, "want one Settle")
	b := r.backlog(s.Dest)
	parts := r.frozen[s.Dest]
	r.one("the outcome is that of what is frozen", len(parts) > 0 && parts[0].id == s.TxnID)
	ev := Settled{Batch: s.Batch, OK: true}
	f := parts[0]
	parts = parts[1:]
	switch s.Outcome {
	case Delivered:
		ev.Delivered = f.items
	case Bisect:
		if halves := f.halve(); halves != nil {
			parts = append(halves, parts...)
			f = new(frozenTxn)
		} else {
			ev.SetAside = 1
		}
	case Thaw:
		f = new(frozenTxn)
	}
	for k, n := range f.items {
		b.Items[k] -= n
	}
	r.frozen[s.Dest] = parts
	if len(parts) == 0 {
		delete(r.frozen, s.Dest)
	}
	b.Frozen = len(parts) > 0
	ev.Backlog = *r.backlog(s.Dest)
	r.step(ev)
	return s
}

// commits has all that was to be written written.
func (r *outboxRig) commits() {
	r.t.Helper()
	for id := BatchID(1); id <= r.m.nextBatch; id++ {
		if _, under := r.m.commits[id]; under {
			r.step(Committed{Batch: id, OK: true})
		}
	}
}

// passTo lets time go by until a Pack or Commit is wanted, and returns how long
// that took; at most d.
func (r *outboxRig) passTo(d time.Duration) time.Duration {
	r.t.Helper()
	start, until := r.now, r.now.Add(d)
	for {
		at, ok := r.m.NextWake()
		if !ok || at > until {
			r.now = until
			return d
		}
		r.now = max(r.now, at)
		r.step(Tick{})
		if len(of[Pack](r.last))+len(of[Commit](r.last)) > 0 {
			return r.now.Sub(start)
		}
		for _, e := range of[Expire](r.last) {
			r.step(Trimmed{Batch: e.Batch, OK: true})
		}
	}
}

// nearly reports whether d is one of sched.Backoff's delays of about want.
func nearly(d, want time.Duration) bool { return d >= want/5*4 && d <= want/5*6 }

const (
	kPDU      = matrix.KindPDU
	kPresence = matrix.KindPresence
	kTyping   = matrix.KindTyping
	kReceipt  = matrix.KindReceipt
	kToDevice = matrix.KindToDevice
)

// Nothing is wanted of a store that may be closed already.
func TestNothingIsSweptAfterTheDrain(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPDU)
	s := r.packs()
	r.step(Draining{By: r.now})
	r.ends(s, 200)
	r.settles()
	r.commits()
	r.one("it is drained", len(of[Drained](r.all)) == 1)
	before := len(r.all)
	r.pass(time.Hour)
	r.one("nothing follows", len(r.all) == before)
}

// crowded lets three queues have a call at a time.
func crowded(c *Config) {
	c.Workers, c.Unknown, c.Failing = 8, 8, 1
	c.MaxRequests = 20
	c.MaxHosts = 20 + 2*8 + 1
}

// fillPlaces has as many destinations want a place as there are, and returns how
// many.
func (r *outboxRig) fillPlaces() int {
	r.t.Helper()
	places := int(r.m.outbox.active.Limit)
	for i := range places {
		r.take(matrix.ServerName(fmt.Sprintf("first%d.test", i)), kPDU)
	}
	r.one("all places are taken", r.m.outbox.active.Free() == 0)
	return places
}

func (r *outboxRig) status(dest matrix.ServerName) QueueStatus {
	r.t.Helper()
	s, ok := r.m.QueueStatus(r.now, dest)
	if !ok {
		r.t.Fatalf("nothing is known of %s", dest)
	}
	return s
}

func TestMorePlacesAreGivenToThoseInLine(t *testing.T) {
	r := newOutboxRig(t, crowded)
	r.fillPlaces()
	r.take("late.test", kPDU)
	r.one("it stands in line", strings.Contains(r.status("late.test").Why, "destinations are before it"))
	c := r.m.cfg
	c.MaxHosts += 5
	r.step(Reconfigured{c})
	r.one("it has a place", r.m.outbox.queues["late.test"].call != nil)
}

func TestStatusOfAFailingDestinationInLine(t *testing.T) {
	r := newOutboxRig(t, crowded)
	r.take("dead.test", kPDU)
	r.breaks(r.packs(), matrix.FailRefused, false)
	r.settles()
	r.commits()
	s := r.status("dead.test")
	r.one("it is left alone for a while", s.State == "backing off" && s.NextTry > r.now && strings.Contains(s.Why, "connection refused"))
	r.fillPlaces()
	r.passTo(10 * time.Second)
	if s := r.status("dead.test"); s.State != "queued" || s.NextTry != 0 || !strings.Contains(s.Why, "destinations are before it") {
		t.Errorf("in line it is %s: %s, next try %d", s.State, s.Why, s.NextTry)
	}
}

// What a full transaction left over has waited long enough: what comes meanwhile
// must not make it wait for more.
func TestWhatIsLeftOverDoesNotWaitForCompany(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.most = 50
	var kinds []matrix.Kind
	for range 120 {
		kinds = append(kinds, kPDU)
	}
	r.take("h.test", kinds...)
	s := r.packs()
	r.take("h.test", kPresence)
	r.ends(s, 200)
	r.settles()
	s = r.packs()
	r.take("h.test", kPresence)
	r.step(Connected{s.Op})
	r.breaks(s, matrix.FailReset, true)
	if waited := r.passTo(time.Minute); !nearly(waited, 5*time.Second) {
		t.Errorf("what was tried already is tried again after %s, want about 5 s", waited)
	}
	r.ends(r.packs(), 200)
	r.settles()
	r.ends(r.packs(), 200)
	r.settles()
	r.one("20 PDUs and presence were the last", r.backlog("h.test").Total() == 0)
	r.take("h.test", kPresence)
	r.one("what comes then waits", len(of[Pack](r.last)) == 0 && r.passTo(time.Minute) == r.m.cfg.Outbox.PresenceWindow)
}

// Who stands in line with presence and gets an event stands before all who have
// none.
func TestBetterClassMovesUpInTheLine(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) {
		crowded(c)
		c.Outbox.PresenceWindow = 0
	})
	r.fillPlaces()
	r.take("a.test", kPresence)
	r.take("b.test", kPresence)
	r.take("c.test", kToDevice)
	r.take("b.test", kPDU)
	var order []matrix.ServerName
	for range 3 {
		for _, p := range of[Pack](r.all) {
			if c := r.m.outbox.packs[p.Batch]; c != nil && len(order) < 3 {
				r.last = []Effect{p}
				r.ends(r.packs(), 200)
				r.settles()
				for _, name := range []matrix.ServerName{"a.test", "b.test", "c.test"} {
					if q := r.m.outbox.queues[name]; q != nil && q.call != nil && !slices.Contains(order, name) {
						order = append(order, name)
					}
				}
				break
			}
		}
	}
	if want := []matrix.ServerName{"b.test", "c.test", "a.test"}; !slices.Equal(order, want) {
		t.Errorf("they are admitted in the order %v, want %v", order, want)
	}
}

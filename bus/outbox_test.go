package bus

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
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

// commits has all that was to be written written; what follows counts as one step.
func (r *outboxRig) commits() {
	r.t.Helper()
	var effects []Effect
	for id := BatchID(1); id <= r.m.nextBatch; id++ {
		if _, under := r.m.commits[id]; under {
			effects = append(effects, r.step(Committed{Batch: id, OK: true})...)
		}
	}
	r.last = effects
}

// passTo lets time go by until something is wanted of the store, or a control is sent, and returns how long
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
		if len(of[Pack](r.last))+len(of[Settle](r.last))+len(of[Commit](r.last))+len(of[Compact](r.last)) > 0 || r.control() {
			return r.now.Sub(start)
		}
		for _, e := range of[Expire](r.last) {
			r.step(Trimmed{Batch: e.Batch, OK: true})
		}
	}
}

// control reports whether the last step sends an empty transaction.
func (r *outboxRig) control() bool {
	found := of[Send](r.last)
	return len(found) == 1 && found[0].Control != ""
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
	c.MaxHosts = 20 + 3*8 + aheadAtOnce + 1
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

func TestWindows(t *testing.T) {
	for _, tt := range []struct {
		what  string
		kinds []matrix.Kind
		wait  time.Duration
	}{
		{"an event goes at once", []matrix.Kind{kPDU}, 0},
		{"to-device messages go at once", []matrix.Kind{kToDevice}, 0},
		{"and take presence along", []matrix.Kind{kPresence, kToDevice}, 0},
		{"typing waits for a moment, and takes presence along", []matrix.Kind{kPresence, kTyping}, 300 * time.Millisecond},
		{"a receipt waits", []matrix.Kind{kReceipt}, time.Second},
		{"presence waits longest", []matrix.Kind{kPresence}, 10 * time.Second},
	} {
		r := newOutboxRig(t, nil)
		r.take("h.test", tt.kinds...)
		waited := time.Duration(0)
		if len(of[Pack](r.last)) == 0 {
			waited = r.passTo(time.Minute)
		}
		if waited != tt.wait {
			t.Errorf("%s: packed after %s, want %s", tt.what, waited, tt.wait)
		}
		r.ends(r.packs(), 200)
		r.settles()
		r.one("all is gone", r.backlog("h.test").Total() == 0 && len(r.m.outbox.queues) == 0)
	}
}

func TestWindowIsThatOfTheMostUrgent(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPresence)
	r.pass(9 * time.Second)
	r.take("h.test", kTyping)
	r.one("typing has its own window", r.passTo(time.Minute) == 300*time.Millisecond)
	s := r.packs()
	r.take("h.test", kPresence)
	r.pass(time.Second)
	r.take("h.test", kPresence)
	r.ends(s, 200)
	r.settles()
	r.one("what came first is not put off by what comes later", r.passTo(time.Minute) == 9*time.Second)
	r.packs()
	r.one("in one class with others of its kind", r.sent().Class == matrix.ClassPresence)
}

// A homeserver must be told of what the outbox does not take over, with what it
// tries again later.
func TestWhatIsNotStoredIsRefused(t *testing.T) {
	for fault, want := range map[AcceptFault]string{AcceptedFull: "holds as much for h.test as it may: 3 items", AcceptedNot: "could not store"} {
		r := newOutboxRig(t, nil)
		req := r.offer("h.test")
		r.step(Accepted{Req: req, Fault: fault, Detail: "3 items"})
		e := only[Refuse](r, "it is refused")
		if e.Req != req || e.Status != 503 || !strings.Contains(e.Text, want) || len(of[Free](r.last)) != 1 || len(of[Acknowledge](r.all)) != 0 {
			t.Errorf("fault %d: %+v", fault, r.last)
		}
		req = r.offer("h.test")
		r.step(Gone{req})
		r.step(Accepted{Req: req, Fault: fault})
		r.one("nobody is told who has gone", len(of[Refuse](r.last)) == 0 && len(of[Free](r.last)) == 1)
		if s, _ := r.m.Outbox(r.now); s.Stats.Full+s.Stats.NotStored != 2 || s.Offers != 0 {
			t.Errorf("fault %d: full %d, not stored %d, offers %d", fault, s.Stats.Full, s.Stats.NotStored, s.Offers)
		}
	}
}

func TestFullDestinationIsShown(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPresence)
	r.step(Accepted{Req: r.offer("h.test"), Fault: AcceptedFull})
	full := func() int { s, _ := r.m.Outbox(r.now); return s.Full }
	r.one("it is", full() == 1)
	r.now = r.now.Add(fullFor)
	r.one("for a while", full() == 0)
}

func TestRepeatedTransactionIsAnswered(t *testing.T) {
	r := newOutboxRig(t, nil)
	first := r.offer("h.test")
	r.step(Gone{first})
	r.stores(first, "h.test", kPDU)
	r.one("what was given up is delivered, but not answered", len(of[Acknowledge](r.last)) == 0 && len(of[Pack](r.last)) == 1)
	r.packs()
	again := r.offer("h.test")
	r.step(Accepted{Req: again, Repeated: true, Kinds: [matrix.NumKinds + 1]int32{kPDU: 1}, Backlog: *r.backlog("h.test")})
	r.one("the repetition is answered", only[Acknowledge](r, "want an answer").Req == again)
	if s := r.m.outbox.stats; s.Accepted != 1 || s.Repeated != 1 || s.ItemsIn[kPDU] != 1 {
		t.Errorf("accepted %d, repeated %d, items %d; want 1 of each", s.Accepted, s.Repeated, s.ItemsIn[kPDU])
	}
}

func TestNoAnswerBeforeTheStoreHasIt(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.Pace.Ack, c.Outbox.Pace.Hold = 1, 5*time.Second })
	req := r.offer("h.test")
	r.pass(time.Minute)
	r.one("however long that takes", len(of[Acknowledge](r.all)) == 0)
	r.stores(req, "h.test", kPresence)
	r.one("its body is let go of", len(of[Free](r.last)) == 1)
	for i := range 20 { // one a second, so that the pace has a say
		r.take(matrix.ServerName(fmt.Sprintf("h%d.test", i)), kPresence)
	}
	r.pass(5 * time.Second)
	if n := len(of[Acknowledge](r.all)); n != 21 {
		t.Errorf("%d of 21 are answered within the hold", n)
	}
	r.one("no body is kept", len(of[Free](r.all)) == 21)
}

func TestTransactionsBeyondTheBoundAreRefused(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.MaxRequests = 3; c.MaxHosts = 1000 })
	r.profile("h.test", 1)
	r.offer("a.test")
	r.offer("b.test")
	r.req++
	r.step(Offered{Req: r.req, Dest: "c.test", Class: matrix.ClassEvent})
	e := only[Refuse](r, "the fourth is refused")
	r.one("with what is tried again, and let go of", e.Status == 503 && len(of[Free](r.last)) == 1 && len(of[Accept](r.last)) == 0)
}

func TestDrainGivesAllAnswersInTime(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.Pace.Ack, c.Outbox.Pace.Hold = 1, 20*time.Second })
	for i := range 50 {
		r.take(matrix.ServerName(fmt.Sprintf("h%d.test", i)), kPresence)
	}
	late := r.offer("late.test")
	given := len(of[Acknowledge](r.all))
	r.one("most are held", given < 5)
	r.step(Draining{By: r.now.Add(3 * time.Second)})
	r.pass(1500 * time.Millisecond)
	if n := len(of[Acknowledge](r.all)) - given; n < 15 || n > 35 {
		t.Errorf("%d of 50 answers are given in half the time, want about half", n)
	}
	r.pass(1500 * time.Millisecond)
	r.one("all are by then", len(of[Acknowledge](r.all)) == 50)
	r.one("one is with the store", len(of[Drained](r.all)) == 0)
	r.pass(time.Second)
	r.stores(late, "late.test", kPDU)
	r.one("it is answered at once, and that was the last", only[Acknowledge](r, "want an answer").Req == late && len(of[Drained](r.last)) == 1)
	r.one("no delivery begins", len(of[Pack](r.all)) == 0)
}

func TestDrainWaitsForWhatIsUnderWay(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("a.test", kPDU)
	r.take("b.test", kPDU)
	packing := of[Pack](r.all)
	r.last = []Effect{packing[0]}
	s := r.packs()
	r.step(Draining{By: r.now})
	r.last = []Effect{packing[1]}
	other := r.packs()
	r.breaks(other, matrix.FailRefused, false)
	r.settles()
	r.commits()
	r.one("a delivery is under way", len(of[Drained](r.all)) == 0)
	r.ends(s, 200)
	note := r.last
	r.commits()
	r.one("its outcome is to be noted", len(of[Drained](r.all)) == 0)
	r.last = note
	r.settles()
	r.commits()
	r.one("then it is over", len(of[Drained](r.all)) == 1)
	r.pass(time.Hour)
	r.one("and nothing follows", len(of[Pack](r.all)) == 2)
}

func TestQueuesAreBegunWithOneAfterTheOtherAfterAStart(t *testing.T) {
	r := newOutboxRig(t, nil)
	var records []QueueRecord
	for i := range 500 {
		b := Backlog{Oldest: r.now.Add(-time.Hour)}
		b.Items[kPDU] = 1
		records = append(records, QueueRecord{matrix.ServerName(fmt.Sprintf("h%d.test", i)), b})
	}
	records[7].Backlog.Held = true
	r.step(Restored{Queues: records})
	r.one("hardly any begins at once", len(of[Pack](r.last)) < 5)
	answered := 0
	half := func() (begun int) {
		for range 250 {
			r.pass(spreadEach)
			for ; answered < len(of[Pack](r.all)); answered++ { // so that workers are free
				r.step(Packed{Batch: of[Pack](r.all)[answered].Batch, OK: true})
			}
		}
		return answered
	}
	if n := half(); n < 200 || n > 300 {
		t.Errorf("%d of 500 begin in the first half of the time", n)
	}
	half()
	seen := map[matrix.ServerName]bool{}
	for _, p := range of[Pack](r.all) {
		seen[p.Dest] = true
	}
	r.one("all but the one that is held have begun by its end", len(seen) == 499 && !seen["h7.test"])
}

func TestNothingIsDeliveredWhileSuspended(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("running.test", kPDU)
	running := r.packs()
	r.take("waiting.test", kPresence)
	r.step(Suspended{"the admin wants it"})
	r.take("new.test", kPDU)
	r.ends(running, 200)
	r.settles()
	r.pass(time.Hour)
	r.one("what was under way ends, nothing begins", len(of[Pack](r.all)) == 1)
	s := r.status("new.test")
	r.one("the status says why", s.State == "waiting" && strings.Contains(s.Why, "the admin wants it"))
	snap, _ := r.m.Outbox(r.now)
	r.one("the summary, too", snap.Suspended == "the admin wants it")
	r.step(Suspended{})
	r.one("all go on", len(of[Pack](r.last)) == 2)
}

func TestSuspendedWhileItWaitsForAWorker(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.works("h.test")
	for i := range 3 {
		r.profile("h.test", i) // all the places that it has for events
	}
	r.get("h.test", "GET", "/_matrix/federation/v1/event/e")
	busy := of[Send](r.all)[1:]
	r.take("h.test", kPDU)
	r.one("it waits for its host", r.status("h.test").State == "queued")
	r.step(Suspended{"for a test"})
	for _, s := range busy {
		r.answer(s.Op, 200)
	}
	r.one("it does not begin", len(of[Pack](r.all)) == 0 && r.m.outbox.queues["h.test"].call == nil)
	r.step(Suspended{})
	r.one("it does later", len(of[Pack](r.last)) == 1)
}

func TestHeldDestination(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPresence)
	b := *r.backlog("h.test")
	b.Held = true
	r.step(Adjusted{Dest: "h.test", Backlog: b})
	r.pass(time.Hour)
	s := r.status("h.test")
	r.one("nothing is sent", len(of[Pack](r.all)) == 0 && s.State == "held" && s.Why == "an admin holds it")
	b.Items[kPDU]++
	req := r.offer("h.test")
	r.step(Accepted{Req: req, Kinds: [matrix.NumKinds + 1]int32{kPDU: 1}, Backlog: b})
	r.one("but taken over", len(of[Acknowledge](r.last)) == 1 && len(of[Pack](r.last)) == 0)
	b.Held = false
	r.step(Adjusted{Dest: "h.test", Backlog: b})
	r.one("until it is let go", len(of[Pack](r.last)) == 1)

	r.step(Adjusted{Dest: "empty.test", Backlog: Backlog{Held: true}})
	r.one("one of which nothing is pending is held, too", r.status("empty.test").State == "held")
	r.step(Adjusted{Dest: "empty.test"})
	_, known := r.m.QueueStatus(r.now, "empty.test")
	r.one("and forgotten when it is let go", !known)
}

func TestHeldWhileItWaitsInLine(t *testing.T) {
	r := newOutboxRig(t, crowded)
	r.fillPlaces()
	r.take("h.test", kPDU)
	b := *r.backlog("h.test")
	b.Held = true
	r.step(Adjusted{Dest: "h.test", Backlog: b})
	for _, p := range of[Pack](r.all) {
		r.last = []Effect{p}
		r.ends(r.packs(), 200)
		r.settles()
	}
	for _, p := range of[Pack](r.all) {
		r.one("it has no turn", p.Dest != "h.test")
	}
}

// Held while its delivery waits for a worker, it must not keep a place that
// others could use.
func TestHeldDestinationLeavesItsPlace(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.works("h.test")
	for i := range 3 {
		r.profile("h.test", i)
	}
	r.get("h.test", "GET", "/_matrix/federation/v1/event/e")
	r.take("h.test", kPDU)
	b := *r.backlog("h.test")
	b.Held = true
	r.one("it has one", r.m.outbox.active.Used == 1)
	r.step(Adjusted{Dest: "h.test", Backlog: b})
	r.one("it has left it", r.m.outbox.active.Used == 0)
}

func TestFlushTriesAtOnce(t *testing.T) {
	r := newOutboxRig(t, nil)
	r.take("h.test", kPresence)
	r.step(Flush{"h.test"})
	r.one("without its window", len(of[Pack](r.last)) == 1)
	r.ends(r.packs(), 401)
	r.step(Flush{"h.test"})
	r.one("without its back-off", len(of[Pack](r.last)) == 1)
	s := r.packs()
	r.step(Answered{Op: s.Op, Status: 429, RetryAfter: time.Hour})
	r.step(Done{Op: s.Op, Sent: true})
	r.step(Flush{"h.test"})
	r.one("though it asked to be left alone", len(of[Pack](r.last)) == 1)
	r.breaks(r.packs(), matrix.FailRefused, false)
	r.commits()
	r.step(Flush{"h.test"})
	r.one("without its host's back-off, but that is on disk first", len(of[Commit](r.last)) == 1)
	r.commits()
	r.one("then it is tried", len(of[Pack](r.last)) == 1)
}

func TestSweepGoesOnFromWhereItEnded(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.PresenceWindow = time.Hour })
	r.take("a.test", kPresence)
	r.take("b.test", kPresence)
	r.pass(sweepEvery - time.Millisecond)
	r.one("not before its time", len(of[Expire](r.all)) == 0)
	r.pass(time.Millisecond)
	e := of[Expire](r.all)
	r.one("from the start", len(e) == 1 && e[0].After == 0)
	r.step(Trimmed{Batch: e[0].Batch, OK: true, Expired: [matrix.NumKinds + 1]int32{kPresence: 1}, Changed: []QueueRecord{{Name: "a.test"}}, Next: 7})
	second := only[Expire](r, "there is more to do")
	r.one("from there on", second.After == 7)
	r.one("what has nothing left is forgotten", r.m.outbox.queues["a.test"] == nil && r.m.outbox.queues["b.test"] != nil)
	r.pass(10 * sweepEvery)
	r.one("one at a time", len(of[Expire](r.all)) == 2)
	r.step(Trimmed{Batch: second.Batch, OK: false, Next: 9})
	r.one("a failure ends the round", len(of[Expire](r.all)) == 2 && r.m.stats.CommitsFailed == 1)
	r.pass(sweepEvery)
	third := of[Expire](r.all)
	r.one("the next begins a minute later", len(third) == 3 && third[2].After == 0)
	r.step(Trimmed{Batch: third[2].Batch, OK: true, Expired: [matrix.NumKinds + 1]int32{kPresence: 1}, Changed: []QueueRecord{{Name: "b.test"}}})
	r.pass(time.Hour)
	r.one("none does while nothing is pending", len(of[Expire](r.all)) == 3)
	if got := r.m.outbox.stats.Expired[kPresence]; got != 2 {
		t.Errorf("%d have expired, want 2", got)
	}
}

func TestPlacesAreBounded(t *testing.T) {
	r := newOutboxRig(t, crowded)
	places := r.fillPlaces()
	for i := range 20 {
		r.take(matrix.ServerName(fmt.Sprintf("late%d.test", i)), kPDU)
	}
	r.one("no more than those have a call", r.m.outbox.active.Used == sched.Slots(places))
	hosts := len(r.m.hosts)
	r.one("nor take a host's place", hosts == places)
	for n := 0; n < len(of[Pack](r.all)); n++ {
		r.last = []Effect{of[Pack](r.all)[n]}
		r.ends(r.packs(), 200)
		r.settles()
	}
	if n := len(of[Pack](r.all)); n != places+20 {
		t.Errorf("%d had their turn, want %d", n, places+20)
	}
}

func TestStateOfAQueueInWords(t *testing.T) {
	r := newOutboxRig(t, nil)
	expect := func(dest matrix.ServerName, state, why string) {
		t.Helper()
		s := r.status(dest)
		if s.State != state || !strings.Contains(s.Why, why) {
			t.Errorf("%s is %s: %s; want %s: %s", dest, s.State, s.Why, state, why)
		}
		if timed := state == "backing off" || state == "waiting"; timed != (s.NextTry > r.now) {
			t.Errorf("%s is %s, its next try %s from now", dest, state, s.NextTry.Sub(r.now))
		}
	}
	r.take("h.test", kPresence)
	expect("h.test", "waiting", "ride along")
	r.take("h.test", kPDU)
	expect("h.test", "sending", "is being made")
	s := r.packs()
	r.pass(3 * time.Second)
	expect("h.test", "sending", "on its way for 3s")
	r.ends(s, 500)
	expect("h.test", "backing off", "answered with status 500; deliveries that failed in a row: 1")
	r.passTo(time.Minute)
	s = r.packs()
	r.step(Answered{Op: s.Op, Status: 429, RetryAfter: time.Minute})
	r.step(Done{Op: s.Op, Sent: true})
	expect("h.test", "backing off", "limits our rate and asked for another 1m0s")
	r.passTo(2 * time.Minute)
	r.breaks(r.packs(), matrix.FailTLS, false)
	expect("h.test", "backing off", "TLS failed (simulated)")
	r.passTo(2 * time.Minute)
	r.commits()
	r.ends(r.packs(), 200)
	expect("h.test", "sending", "outcome of the last transaction is being written")
	r.settles()
	_, known := r.m.QueueStatus(r.now, "h.test")
	r.one("then nothing is known of it", !known)

	b := Backlog{Oldest: r.now}
	b.Items[kPDU] = 1
	r.step(Restored{Queues: []QueueRecord{{"old.test", b}, {"older.test", b}}})
	r.m.outbox.queues["old.test"].notBefore = r.now.Add(time.Millisecond)
	expect("old.test", "waiting", "after a start")

	r.works("busy.test")
	for i := range 3 {
		r.profile("busy.test", i)
	}
	r.get("busy.test", "GET", "/_matrix/federation/v1/event/e")
	r.take("busy.test", kPDU)
	expect("busy.test", "queued", "3 other requests to it are under way")

	r.take("disk.test", kPDU)
	p := only[Pack](r, "want one Pack")
	r.step(Packed{Batch: p.Batch})
	expect("disk.test", "waiting", "could not be written down")

	r.step(Draining{By: r.now.Add(time.Minute)})
	if s := r.status("disk.test"); s.State != "waiting" || !strings.Contains(s.Why, "is stopping") {
		t.Errorf("at the end it is %s: %s", s.State, s.Why)
	}
	n := 0
	r.m.Queues(r.now, func(QueueStatus) { n++ })
	if snap, ok := r.m.Outbox(r.now); !ok || snap.Queues != n || n != 4 {
		t.Errorf("%d queues are listed, %d counted, want 4", n, snap.Queues)
	}
}

func TestWhoHasGoneIsNotAnswered(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.Pace.Ack, c.Outbox.Pace.Hold = 1, 20*time.Second })
	for i := range 3 {
		r.take(matrix.ServerName(fmt.Sprintf("h%d.test", i)), kPresence)
	}
	gone := r.take("gone.test", kPresence)
	r.step(Gone{gone})
	r.step(Gone{gone})
	r.pass(time.Minute)
	for _, a := range of[Acknowledge](r.all) {
		r.one("it is not", a.Req != gone)
	}
	s, _ := r.m.Outbox(r.now)
	r.one("nor kept", s.Offers == 0 && s.Pace.Held == 0 && len(of[Acknowledge](r.all)) == 3)
}

// With the signing key gone there is no outbox, but there may still be something
// in the store.
func TestWithoutAnOutboxWhatIsStoredIsLeftAlone(t *testing.T) {
	r := newRig(t, nil)
	b := Backlog{Oldest: r.now}
	b.Items[kPDU] = 1
	r.step(Restored{Queues: []QueueRecord{{"h.test", b}}})
	r.step(Adjusted{Dest: "i.test", Backlog: b})
	r.pass(time.Hour)
	r.one("nothing is wanted of the store", len(r.all) == 0)
	_, known := r.m.QueueStatus(r.now, "h.test")
	_, is := r.m.Outbox(r.now)
	r.one("and nothing is known of it", !known && !is)
}

// A destination that takes long to answer has workers of its own, so that many of
// them cannot take those of the others; and what matters least waits for company.
func TestSlowDestinationsKeepToTheirWorkers(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) {
		c.Workers, c.Unknown, c.Failing = 16, 16, 4 // 10 for slow ones, 9 of these for events
		c.Outbox.TypingWindow = 0
	})
	slowly := func(dest matrix.ServerName) {
		r.take(dest, kPDU)
		s := r.packs()
		r.step(Connected{s.Op})
		r.pass(3 * time.Second)
		r.ends(s, 200)
		r.settles()
	}
	const many = 15
	for i := range many {
		slowly(matrix.ServerName(fmt.Sprintf("slow%d.test", i)))
	}
	if h, _ := r.m.HostStatus(r.now, "slow0.test"); h.Rank != "slow" {
		t.Fatalf("its rank is %q", h.Rank)
	}
	r.works("quick.test")
	packs := 0
	for i := range many {
		r.take(matrix.ServerName(fmt.Sprintf("slow%d.test", i)), kPDU)
		packs += len(of[Pack](r.last))
	}
	r.one(fmt.Sprintf("%d slow ones have a worker, want 9", packs), packs == 9)
	r.take("quick.test", kPDU)
	r.one("the quick one has one at once", len(of[Pack](r.last)) == 1 && of[Pack](r.last)[0].Dest == "quick.test")
}

func TestWhatMattersLeastWaitsForASlowDestination(t *testing.T) {
	r := newOutboxRig(t, func(c *Config) { c.Outbox.TypingWindow, c.Outbox.PresenceWindow = 0, 10*time.Second })
	send := func(took time.Duration) {
		s := r.packs()
		r.pass(took)
		r.ends(s, 200)
		r.settles()
	}
	r.take("h.test", kTyping)
	send(2 * time.Second)
	r.take("h.test", kTyping)
	r.one("it waits", len(of[Pack](r.last)) == 0)
	if d := r.passTo(time.Minute); d != 4*time.Second {
		t.Errorf("it goes after %v, want twice the time that an answer took", d)
	}
	send(time.Minute / 2)
	r.take("h.test", kTyping)
	if d := r.passTo(time.Minute); d != 10*time.Second {
		t.Errorf("it goes after %v, want the presence window at most", d)
	}
	send(10 * time.Millisecond)
	r.take("h.test", kTyping)
	r.one("of a quick one it goes at once", len(of[Pack](r.last)) == 1)
	send(2 * time.Second)
	r.take("h.test", kPDU)
	r.one("an event goes at once", len(of[Pack](r.last)) == 1)
}

// However many destinations are dead, those that work have their places.
func TestDeadDestinationsLeavePlacesToOthers(t *testing.T) {
	const dead, places = 100, 60
	r := newOutboxRig(t, func(c *Config) {
		c.Workers, c.Unknown, c.Failing = 16, 16, 2
		c.MaxRequests, c.MaxHosts = 100, 100+2*16+aheadAtOnce+1+places
	})
	var ev Restored
	for i := range dead {
		name := matrix.ServerName(fmt.Sprintf("dead%d.test", i))
		b := r.backlog(name)
		b.Items[kPDU], b.Oldest = 1, r.now.Add(-time.Minute)
		ev.Queues = append(ev.Queues, QueueRecord{name, *b})
		ev.Hosts = append(ev.Hosts, HostRecord{Name: name, Failures: 3, LastFailure: matrix.FailRefused, NextTry: r.now})
	}
	r.step(ev)
	for range dead { // their turns come; no intent is ever written
		r.passTo(time.Second)
	}
	o := &r.m.outbox
	r.one(fmt.Sprintf("%d probes of %d and %d places of %d are taken", o.probes.Used, o.probes.Limit, o.active.Used, o.active.Limit),
		o.probes.Used == 2*probesEach && o.active.Used == o.probes.Used && o.active.Limit == places)
	r.works("quick.test")
	r.take("quick.test", kPDU)
	r.one("the one that works is served at once", len(of[Pack](r.last)) == 1 && of[Pack](r.last)[0].Dest == "quick.test")
}

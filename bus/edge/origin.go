package edge

import (
	"container/list"
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// originKey names who asks: a server, or for requests without a signature an
// address.
type originKey struct {
	name matrix.ServerName
	peer string
}

// origin is a server that sends us requests.
type origin struct {
	key      originKey
	stranger bool // it stands for all that could not be verified
	limiter  *rate.Limiter
	alive    sched.Time // when the outbound core was last told; 0: never
	last     sched.Time // its latest request
	counts   OriginCounts

	queue   [NumBands]callList // calls that may begin
	ready   [NumBands]*list.Element
	late    [NumBands]bool // ready is behind the others
	unbegun [NumBands]callList
	waits   [NumBands]int32 // requests that wait for a call in unbegun
	place   [NumBands]int32 // in the machine's crowd, if there is one in unbegun

	current *call // the transaction that the homeserver has, or is to get again
	running int32 // others
	looks   int32 // others that the store is looked through for
	txns    int32 // transactions that are not at the homeserver and have no answer
	bytes   int64 // of the bodies of all its calls
	calls   int32 // in any phase

	stalled [numLanes]int32      // of what runs
	slow    [numLanes]sched.Time // when an attempt was last found to be stalled, or ended so; 0: never

	timer      *sched.Timer[timer]
	prev, next *origin // in the idle list
	isIdle     bool
}

func newOrigin(k originKey) *origin {
	o := &origin{key: k}
	for b := range o.queue {
		o.queue[b].in, o.unbegun[b].in = linkQueue, linkUnbegun
	}
	return o
}

// origin returns the record of a server, a new one if need be, or nil if there is
// no room for another.
func (m *Machine) origin(k originKey) *origin {
	if o := m.origins[k]; o != nil {
		return o
	}
	if len(m.origins) >= int(m.cfg.Origins) {
		if m.idle.first == nil {
			return nil
		}
		m.stats.Forgotten++
		m.forget(m.idle.first)
	}
	o := newOrigin(k)
	o.limiter = rate.NewLimiter(rate.Limit(m.cfg.OriginRate), int(m.cfg.OriginBurst))
	m.origins[k] = o
	m.idle.push(o)
	return o
}

func (m *Machine) forget(o *origin) {
	m.idle.remove(o)
	m.timers.Stop(o.timer)
	delete(m.origins, o.key)
}

func (o *origin) limit(c *Config, now sched.Time) {
	o.limiter.SetLimitAt(now.Std(), rate.Limit(c.OriginRate))
	o.limiter.SetBurstAt(now.Std(), int(c.OriginBurst))
}

// waiting is how many requests other than transactions wait.
func (o *origin) waiting() (n int32) {
	for b := BandJoin; b < NumBands; b++ {
		n += int32(o.queue[b].n)
	}
	return n
}

// fits reports whether the body of a request may be held with the origin's others.
func (o *origin) fits(r *request, c *Config) bool {
	return o.bytes == 0 || o.bytes+r.Size <= int64(c.OriginBytes)
}

// hold counts a new call, drop one that has ended.
func (m *Machine) hold(o *origin) {
	if o.calls++; o.isIdle {
		m.idle.remove(o)
	}
}

func (m *Machine) drop(o *origin) {
	if o.calls--; o.calls == 0 && !o.stranger {
		m.idle.push(o)
	}
}

// nextCall returns the call of a band that is the origin's next: the first, but the
// transaction that is to be sent again goes before older ones that came into the
// queue after it was begun, as these wait for its end.
func (o *origin) nextCall(b Band) *call {
	if c := o.current; c != nil && c.phase == phaseWaiting && c.band == b {
		return c
	}
	return o.queue[b].first
}

// isSlow reports whether the homeserver was slow of late about what the origin sent to
// a lane.
func (o *origin) isSlow(l laneID, now sched.Time) bool {
	return o.stalled[l] > 0 || o.slow[l] != 0 && now.Sub(o.slow[l]) < slowFor
}

// mayRun reports whether the origin's next call of a band may begin as far as the
// origin is concerned. When only time is in the way, it returns the moment.
func (o *origin) mayRun(b Band, cfg *Config, now sched.Time) (ok bool, again sched.Time) {
	c := o.nextCall(b)
	if bands[b].lane == laneTxn {
		if o.current != nil && o.current != c {
			return false, 0
		}
	} else if o.running >= cfg.OriginParallel {
		return false, 0
	}
	if c.charged || b == BandJoin {
		return true, 0
	}
	if tokens := o.limiter.TokensAt(now.Std()); tokens < 1 {
		return false, now.Add(forToken(tokens, o.limiter.Limit()))
	}
	return true, 0
}

// forToken is how long it takes until there is one token.
func forToken(tokens float64, limit rate.Limit) time.Duration {
	return max(time.Millisecond, time.Duration((1-tokens)/float64(limit)*float64(time.Second)))
}

// update puts an origin in line for each band in which it may now begin something,
// takes it out of line where it may not, and sets its timer if time is in the way.
func (m *Machine) update(o *origin) {
	var wake sched.Time
	for b := range NumBands {
		b := Band(b)
		el := o.ready[b]
		if o.queue[b].n == 0 {
			if el != nil {
				m.ready[b].remove(o, b)
			}
			continue
		}
		ok, again := o.mayRun(b, &m.cfg, m.now)
		lane := bands[b].lane
		late := ok && o.isSlow(lane, m.now)
		if el != nil && (!ok || late != o.late[b]) {
			m.ready[b].remove(o, b)
			el = nil
		}
		if ok && el == nil {
			m.ready[b].add(o, b, late)
		}
		if late && o.stalled[lane] == 0 {
			again = o.slow[lane].Add(slowFor)
			ok = false // it comes to stand elsewhere then
		}
		if !ok && again != 0 && (wake == 0 || again < wake) {
			wake = again
		}
	}
	if wake != 0 && (o.timer == nil || o.timer.At > wake) {
		m.timers.Stop(o.timer)
		o.timer = m.timers.Set(wake, timer{origin: o})
	}
}

// originLine is the origins that may begin a call of one band, in turn. Those that the
// homeserver was slow about stand in a line of their own.
type originLine struct{ prompt, late list.List }

func (l *originLine) of(late bool) *list.List {
	if late {
		return &l.late
	}
	return &l.prompt
}

func (l *originLine) Len() int { return l.prompt.Len() + l.late.Len() }

func (l *originLine) add(o *origin, b Band, late bool) {
	o.ready[b], o.late[b] = l.of(late).PushBack(o), late
}

func (l *originLine) remove(o *origin, b Band) {
	l.of(o.late[b]).Remove(o.ready[b])
	o.ready[b] = nil
}

func (l *originLine) first(late bool) *origin {
	if el := l.of(late).Front(); el != nil {
		return el.Value.(*origin)
	}
	return nil
}

// originList is a doubly linked list through the origins themselves.
type originList struct {
	first, last *origin
	n           int
}

func (l *originList) push(o *origin) {
	o.prev, o.next, o.isIdle = l.last, nil, true
	if l.last != nil {
		l.last.next = o
	} else {
		l.first = o
	}
	l.last = o
	l.n++
}

func (l *originList) remove(o *origin) {
	if o.prev != nil {
		o.prev.next = o.next
	} else {
		l.first = o.next
	}
	if o.next != nil {
		o.next.prev = o.prev
	} else {
		l.last = o.prev
	}
	o.prev, o.next, o.isIdle = nil, nil, false
	l.n--
}

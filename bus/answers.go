package bus

import (
	"encoding/binary"
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Answers that may be used again are in up to three places: the small ones that
// were used lately in memory (Machine.cache); the durable ones, which are many, in
// the store, of which Machine.answers has the times; and whole bodies of any size,
// that a caller may ask for once more, in the spool's files (Machine.shelf).

const (
	// storeLater is how long answers to be stored are collected, so that a storm
	// of lookups costs few writes; storeAtOnce is how many are not waited for.
	storeLater  = 2 * time.Second
	storeAtOnce = 100
	// roomRefusalFor is how long a server's refusal to let somebody join, for
	// reasons that lie with itself, answers the next who asks.
	roomRefusalFor = time.Minute
	maxRefusals    = 256
)

// shortKey tells the stored answers apart; a collision only costs a look into the
// store, which knows the whole key.
type shortKey uint64

func short(k Key) shortKey { return shortKey(binary.LittleEndian.Uint64(k[:8])) }

// times are those of a stored answer.
type times struct {
	stored sched.Time
	fresh  sched.Time
	stale  sched.Time
}

// answers is what the machine knows of answers that are not in its cache.
type answers struct {
	known    map[shortKey]times
	order    sched.FIFO[known] // as stored; may hold what has been stored anew
	max      int
	unstored []*entry
	timer    *sched.Timer[timer]

	loads   map[OpID]*load
	parked  int           // requests that wait for one
	loading map[Key]*load // those of loads that new requests wait for

	refusals map[refusalKey]refusal
	refused  sched.FIFO[refusalKey]
}

type known struct {
	key    shortKey
	stored sched.Time
}

// load is a look into the store that requests wait for.
type load struct {
	key    Key
	op     OpID
	at     times
	parked []Arrived // new ones
	losing *call     // or one whose attempt failed, to be refused with
	status int
	text   string
}

type refusalKey struct {
	dest     matrix.ServerName
	endpoint string
	room     string
}

// refusal is what a server said; the text is the bus's own, as the answer itself
// may speak of another user.
type refusal struct {
	status int
	code   string
	until  sched.Time
}

func (s *answers) init() {
	s.known = make(map[shortKey]times)
	s.loads = make(map[OpID]*load)
	s.loading = make(map[Key]*load)
	s.refusals = make(map[refusalKey]refusal)
}

// ages returns how long an answer may be used: as a fresh one, and after that
// when the host fails.
func (m *Machine) ages(ep *matrix.Endpoint, status int, ev Done) (fresh, stale time.Duration) {
	switch {
	case ev.Private:
		return 0, 0
	case status == 404:
		return ep.MissingFor, 0
	case status != 200:
		return 0, 0
	case ev.Fresh > 0:
		return ev.Fresh, ev.Stale
	case ep.Kind == matrix.AnswerServerKeys:
		return 0, 0 // it did not say, so it is not what it should be
	case ep.Kind == matrix.AnswerProfile:
		return m.cfg.ProfileFresh, m.cfg.ProfileStale
	case ep.Keep:
		return m.cfg.KeepFor, 0
	case ep.Kind == matrix.AnswerMedia && m.cfg.MediaBytes > 0:
		return m.cfg.MediaFor, 0
	}
	return ep.CacheFor, ep.StaleFor
}

// keep keeps the answer of a call that has ended well, in the place that suits
// it, and reports whether it did. A whole answer that lies in memory is one of the
// small ones: else it would take the room of what is on its way.
func (m *Machine) keep(c *call, ev Done) bool {
	fresh, stale := m.ages(c.endpoint, c.status, ev)
	if fresh+stale > 0 && ev.Kept && m.cache.fits(ev.Size+entryCost) {
		e := &entry{key: c.key, op: c.op, status: c.status, size: ev.Size + entryCost, stored: m.now, fresh: m.now.Add(fresh), stale: m.now.Add(fresh + stale)}
		m.cache.put(m, e)
		if c.endpoint.Durable && m.answers.max > 0 {
			m.storeSoon(e)
		}
		return true
	}
	shelf := m.shelf(c.endpoint)
	if whole := c.endpoint.Keep || c.endpoint.Kind == matrix.AnswerMedia; !whole || ev.Kept || fresh <= 0 || c.status != 200 || !shelf.fits(ev.Size+entryCost) {
		return false
	}
	shelf.put(m, &entry{key: c.key, op: c.op, status: c.status, size: ev.Size + entryCost, stored: m.now, fresh: m.now.Add(fresh), stale: m.now.Add(fresh)})
	return true
}

// shelf returns where whole answers of an endpoint are kept.
func (m *Machine) shelf(ep *matrix.Endpoint) *cache {
	if ep.Kind == matrix.AnswerMedia {
		return &m.media
	}
	return &m.whole
}

// look returns a known answer to a request that is fresh, and the field of it
// that is asked for.
func (m *Machine) look(a Arrived) (e *entry, field string) {
	if e = m.cache.get(a.Key); e != nil && m.now < e.fresh {
		return e, ""
	}
	if a.Endpoint.Keep || a.Endpoint.Kind == matrix.AnswerMedia {
		if e = m.shelf(a.Endpoint).get(a.Key); e != nil && m.now < e.fresh {
			return e, ""
		}
	}
	if a.Field != "" {
		if e = m.cache.get(a.Whole); e != nil && m.now < e.fresh {
			return e, a.Field
		}
	}
	return nil, ""
}

// lookStale is look for an answer that is better than none.
func (m *Machine) lookStale(a Arrived) (e *entry, field string) {
	if e = m.cache.get(a.Key); e != nil && m.now < e.stale && e.status == 200 {
		return e, ""
	}
	if a.Field != "" {
		if e = m.cache.get(a.Whole); e != nil && m.now < e.stale && e.status == 200 {
			return e, a.Field
		}
	}
	return nil, ""
}

// loadFor begins to load a stored answer for a new request, if there is one: a
// fresh one, or any.
func (m *Machine) loadFor(a Arrived, stale bool) bool {
	if !a.Endpoint.Durable {
		return false
	}
	keys := [...]Key{a.Key, a.Whole}
	for i, k := range keys {
		if i == 1 && a.Field == "" {
			break
		}
		if l := m.answers.loading[k]; l != nil {
			m.park(l, a)
			return true
		}
		t, ok := m.answers.known[short(k)]
		if ok && (m.now < t.fresh || stale && m.now < t.stale) {
			l := m.load(k, t)
			m.park(l, a)
			m.answers.loading[k] = l
			return true
		}
	}
	return false
}

// park has a new request wait for a load.
func (m *Machine) park(l *load, a Arrived) {
	l.parked = append(l.parked, a)
	m.answers.parked++
}

func (m *Machine) load(k Key, t times) *load {
	m.nextOp++
	l := &load{key: k, op: m.nextOp, at: t}
	m.answers.loads[l.op] = l
	m.emit(Load{Op: l.op, Key: k})
	return l
}

func (m *Machine) loaded(ev Loaded) {
	l := m.answers.loads[ev.Op]
	if l == nil {
		panic(fmt.Sprintf("bus: answer %d is loaded, which was not asked for (%d are)", ev.Op, len(m.answers.loads)))
	}
	delete(m.answers.loads, l.op)
	if m.answers.loading[l.key] == l {
		delete(m.answers.loading, l.key)
	}
	e := &entry{key: l.key, op: l.op, status: ev.Status, size: ev.Size + entryCost, stored: l.at.stored, fresh: l.at.fresh, stale: l.at.stale}
	if ev.OK {
		m.stats.Loads++
	} else {
		delete(m.answers.known, short(l.key))
	}
	for i := range l.parked {
		a := l.parked[i]
		if a.Req == 0 {
			continue // it is gone
		}
		m.answers.parked--
		_, away := m.turnsAway(a)
		switch field := fieldOf(a, l.key); {
		case ev.OK && m.now < e.fresh:
			m.answerWith(a, e, field, FromCache)
		case away && ev.OK && m.now < e.stale && e.status == 200:
			m.answerWith(a, e, field, FromStale)
		default:
			m.route(a)
		}
	}
	if c := l.losing; c != nil {
		if ev.OK && m.now < e.stale && e.status == 200 {
			m.replyOld(c, e, fieldOf(c.request(), l.key))
		} else {
			m.refuse(c, l.status, l.text)
		}
		m.end(c)
	}
	if !ev.OK {
		return
	}
	if newer := m.cache.get(e.key); m.now >= e.stale || newer != nil && newer.stored > e.stored || !m.cache.fits(e.size) {
		m.emit(Discard{l.op})
		return
	}
	m.cache.put(m, e)
}

// fieldOf returns the member of the answer under key that answers a.
func fieldOf(a Arrived, k Key) string {
	if a.Key == k {
		return ""
	}
	return a.Field
}

// unparked takes a request that is gone out of the loads.
func (m *Machine) unparked(id ReqID) bool {
	if m.answers.parked == 0 {
		return false
	}
	for _, l := range m.answers.loads { // which it is does not depend on the order
		for i := range l.parked {
			if l.parked[i].Req == id {
				l.parked[i].Req = 0
				m.answers.parked--
				m.emit(Free{id})
				return true
			}
		}
	}
	return false
}

// storeSoon has an answer stored together with others.
func (m *Machine) storeSoon(e *entry) {
	e.keep = true
	s := &m.answers
	s.unstored = append(s.unstored, e)
	if len(s.unstored) >= storeAtOnce {
		m.storeAnswers()
	} else if s.timer == nil {
		s.timer = m.timers.Set(m.now.Add(storeLater), timer{answers: true})
	}
}

// storeAnswers has those stored that wait for it.
func (m *Machine) storeAnswers() {
	s := &m.answers
	m.timers.Stop(s.timer)
	s.timer = nil
	if len(s.unstored) == 0 {
		return
	}
	list := make([]KeptAnswer, 0, len(s.unstored))
	for _, e := range s.unstored {
		e.keep = false
		list = append(list, KeptAnswer{AnswerRecord: AnswerRecord{Key: e.key, Stored: e.stored, Fresh: e.fresh, Stale: e.stale}, Op: e.op})
	}
	clear(s.unstored)
	s.unstored = s.unstored[:0]
	m.commit(nil, commit{answers: list})
}

// stored: a commit of answers is over. If it failed, those of an earlier time are
// still there.
func (m *Machine) stored(list []KeptAnswer, ok bool) {
	for _, k := range list {
		if ok {
			m.know(k.Key, times{k.Stored, k.Fresh, k.Stale})
		}
	}
}

// know notes an answer that is stored, and forgets the one stored first if they
// are too many, as the store does.
func (m *Machine) know(k Key, t times) {
	s := &m.answers
	sk := short(k)
	s.known[sk] = t
	s.order.Push(known{sk, t.stored})
	s.trim()
}

// trim forgets what was stored first until the rest keeps to the bound.
func (s *answers) trim() {
	for len(s.known) > s.max || s.order.Len() > 2*s.max {
		old, ok := s.order.Pop()
		if !ok {
			return
		}
		if s.known[old.key].stored == old.stored {
			delete(s.known, old.key)
		}
	}
}

// forget lets go of what is known under a key, as it is outdated.
func (m *Machine) forget(k Key) {
	m.cache.drop(m, k)
	delete(m.answers.known, short(k))
}

// restoreAnswers takes over the times of what the store has. A clock that ran
// wild cannot make an answer good for longer than from now on.
func (m *Machine) restoreAnswers(list []AnswerRecord) {
	for i := len(list) - 1; i >= 0; i-- {
		r := list[i]
		stored := min(r.Stored, m.now)
		shift := r.Stored.Sub(stored)
		m.know(r.Key, times{stored, r.Fresh.Add(-shift), r.Stale.Add(-shift)})
	}
}

// remember keeps a server's refusal to let somebody join a room that does not
// depend on who asks.
func (m *Machine) remember(c *call, status int, code string) {
	if c.room == "" || code != matrix.MUnableToAuthoriseJoin && code != matrix.MUnableDueToPartialState {
		return
	}
	s := &m.answers
	k := refusalKey{c.host.Name, c.endpoint.Name, c.room}
	if _, ok := s.refusals[k]; !ok {
		s.refused.Push(k)
	}
	s.refusals[k] = refusal{status: status, code: code, until: m.now.Add(roomRefusalFor)}
	for s.refused.Len() > maxRefusals {
		old, _ := s.refused.Pop()
		delete(s.refusals, old)
	}
}

// refusedBefore answers a request with what its server said a moment ago.
func (m *Machine) refusedBefore(a Arrived) bool {
	if a.Room == "" {
		return false
	}
	r, ok := m.answers.refusals[refusalKey{a.Dest, a.Endpoint.Name, a.Room}]
	if !ok || m.now >= r.until {
		return false
	}
	m.stats.RefusedBefore++
	m.refuseNew(a, Refuse{Status: r.status, Code: r.code, Text: fmt.Sprintf("fsbus: %s said so %s ago", a.Dest, round(roomRefusalFor-r.until.Sub(m.now)))})
	return true
}

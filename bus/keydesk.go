package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// The key desk answers queries for server keys. A query is looked up in the store
// first; what is missing there is fetched, each server once, whoever asks: from a
// notary many servers with one request, or, where the bus itself is the notary,
// from each server on its own. What comes is stored, and a query is answered from
// the store when nothing of it is under way any more.

const (
	// gather is how long the first key that is missing waits for others, so that
	// queries that come together go upstream together; the more requests to the
	// notary are under way, the longer.
	gather = 20 * time.Millisecond
	// keysAnswerBy is how long before the caller's time-out a query is answered
	// with what there is, so that the caller has time to ask elsewhere.
	keysAnswerBy = 10 * time.Second
	// keysGiveUp is how long a request for keys may take, whoever still waits:
	// what comes late is stored for the next who asks.
	keysGiveUp = 30 * time.Second
	// keysMissingFor is how long a server is not asked for again of which nothing
	// valid could be had.
	keysMissingFor = time.Minute
	maxKeysMissing = 4096
	// keysAgain is how often a fetch is put off because the notary limits our
	// rate.
	keysAgain = 2
	// aheadShare is the part of MaxWants that queries may take which nobody waits
	// for.
	aheadShare = 4
)

// keyDesk is what is under way. The zero value must be init'ed.
type keyDesk struct {
	queries  map[QueryID]*keyQuery
	byReq    map[ReqID]*keyQuery
	fetches  map[fetchKey]*keyFetch
	notaries map[matrix.ServerName]*notary
	own      notary // to the servers themselves
	missing  map[fetchKey]sched.Time
	forgot   sched.FIFO[fetchKey] // of missing, as noted
	wants    int                  // of all queries
	maxWants int                  // the most so far
	ahead    int                  // of those that nobody waits for
	last     QueryID
	latest   matrix.ServerName // the notary that was asked last
	ownName  matrix.ServerName
}

type fetchKey struct {
	via    matrix.ServerName // "" for the server itself
	server matrix.ServerName
}

// keyQuery is one query that is not answered, or with no req keys that somebody
// will ask for.
type keyQuery struct {
	Arrived
	id       QueryID
	via      matrix.ServerName // as in the store
	own      bool
	room     string
	wants    []matrix.KeyWant
	open     map[*keyFetch]bool
	loading  bool
	found    bool   // some of it is in the store, or came
	again    bool   // it is being looked up once more
	forKey   bool   // it is the shell's, for one key
	asked    bool   // somebody was asked
	answered bool   // the server itself was, and has said what keys it has
	wanted   uint64 // by which KeyWanted, until that is over
	why      string // how a fetch failed
	timer    *sched.Timer[timer]
}

// keyFetch is one server whose keys are wanted.
type keyFetch struct {
	fetchKey
	desk    *notary
	wants   []matrix.KeyWant // no two of the same key
	waiters []*keyQuery
	since   sched.Time
	call    *call // that fetches it
	again   int32
	next    *keyFetch // wants more than what is being asked for; not asked for yet
}

// notary is who is asked: a notary, or all servers for their own keys.
type notary struct {
	name    matrix.ServerName // "" for the servers themselves
	waiting sched.FIFO[*keyFetch]
	running int32
	timer   *sched.Timer[timer]
}

func (d *keyDesk) init() {
	d.queries = make(map[QueryID]*keyQuery)
	d.byReq = make(map[ReqID]*keyQuery)
	d.fetches = make(map[fetchKey]*keyFetch)
	d.notaries = make(map[matrix.ServerName]*notary)
	d.missing = make(map[fetchKey]sched.Time)
}

// keyQuery takes a query of the homeserver.
func (m *Machine) keyQuery(ev KeyQuery) {
	d := &m.keys
	switch {
	case m.reqs[ev.Req] != nil || d.byReq[ev.Req] != nil:
		panic(fmt.Sprintf("bus: request %d arrived twice", ev.Req))
	case ev.Own && d.ownName == "":
		panic(fmt.Sprintf("bus: request %d is for the bus as a notary, which it is not", ev.Req))
	case m.waiting() >= int(m.cfg.MaxRequests), ev.Own && d.wants >= m.cfg.Keys.MaxWants:
		m.stats.Requests[ev.Class]++
		m.refuseNew(ev.Arrived, tooMany)
		return
	case !ev.Own && d.wants+len(ev.Wants) > m.cfg.Keys.MaxWants:
		m.arrived(ev.Arrived) // carried through as it is
		return
	}
	// A notary need not know all keys: for the rest the homeserver asks elsewhere.
	ev.Wants = ev.Wants[:min(len(ev.Wants), m.cfg.Keys.MaxWants-d.wants)]
	m.stats.Requests[ev.Class]++
	q := &keyQuery{Arrived: ev.Arrived, own: ev.Own, via: ev.Dest, wants: ev.Wants}
	if !ev.Own {
		d.latest = ev.Dest
	}
	q.timer = m.timers.Set(max(m.now, m.deadline(ev.Arrived).Add(-keysAnswerBy)), timer{query: q})
	d.byReq[q.Req] = q
	m.stats.KeyQueries++
	m.openQuery(q)
}

// keysSeen fetches keys ahead of the homeserver's asking for them.
func (m *Machine) keysSeen(ev KeysSeen) {
	d := &m.keys
	q := &keyQuery{room: ev.Room, wants: ev.Wants, own: d.ownName != "", via: d.ownName}
	if !q.own {
		q.via = d.latest
	}
	switch {
	case m.draining || q.via == "":
		return // there is no telling whom the homeserver will ask
	case d.wants+len(q.wants) > m.cfg.Keys.MaxWants, (d.ahead+len(q.wants))*aheadShare > m.cfg.Keys.MaxWants:
		m.stats.KeysSkipped += int64(len(q.wants))
		return
	}
	if w := m.joins.rooms[ev.Room]; w != nil {
		w.KeysSeen += len(ev.Wants)
	}
	d.ahead += len(q.wants)
	q.timer = m.timers.Set(m.now.Add(keysGiveUp), timer{query: q})
	m.openQuery(q)
}

func (m *Machine) openQuery(q *keyQuery) {
	d := &m.keys
	d.last++
	q.id, q.loading = d.last, true
	q.open = make(map[*keyFetch]bool)
	d.queries[q.id] = q
	d.wants += len(q.wants)
	d.maxWants = max(d.maxWants, d.wants)
	m.emit(LoadKeys{Query: q.id, Via: q.via, Wants: q.wants})
}

func (m *Machine) keysLoaded(ev KeysLoaded) {
	d := &m.keys
	q := d.queries[ev.Query]
	if q == nil || !q.loading {
		panic(fmt.Sprintf("bus: key query %d has been looked up, which is not under way (%d are)", ev.Query, len(d.queries)))
	}
	for _, k := range ev.Outdated {
		m.forget(k)
	}
	q.found = q.found || len(ev.Missing) < len(q.wants)
	if !q.again {
		m.stats.KeysKnown += int64(len(q.wants) - len(ev.Missing))
	}
	if q.timer == nil || q.gone() {
		ev.Missing = nil // its time is up, or nobody waits for it
	}
	for len(ev.Missing) > 0 {
		server, n := ev.Missing[0].Server, 1
		for n < len(ev.Missing) && ev.Missing[n].Server == server {
			n++
		}
		m.fetchKeys(q, ev.Missing[:n])
		ev.Missing = ev.Missing[n:]
	}
	q.loading = false // not before: a fetch may fail at once, while others are still to begin
	m.closeQuery(q)
}

// fetchKeys has a query wait for keys of one server.
func (m *Machine) fetchKeys(q *keyQuery, wants []matrix.KeyWant) {
	d := &m.keys
	k := fetchKey{via: q.via, server: wants[0].Server}
	if q.own {
		k.via = ""
	}
	if until, ok := d.missing[k]; ok && m.now < until {
		q.asked = true
		m.stats.KeysMissing += int64(len(wants))
		return
	}
	f := d.fetches[k]
	if f != nil && (q.open[f] || f.next != nil && q.open[f.next]) {
		return // looked up once more, it waits for this one still
	}
	switch {
	case f == nil:
		f = &keyFetch{fetchKey: k, desk: m.notary(k.via), since: m.now}
		d.fetches[k] = f
		f.desk.waiting.Push(f)
	case f.call != nil && f.call.slow:
		q.why = fmt.Sprintf("fsbus: %s has not answered in time", f.call.host.Name)
		return
	case f.call == nil || f.covers(wants):
		m.stats.KeysShared += int64(len(wants))
	default:
		if f.next == nil {
			f.next = &keyFetch{fetchKey: k, desk: f.desk}
		}
		f = f.next
	}
	if f.call == nil {
		f.merge(wants)
	}
	f.waiters = append(f.waiters, q)
	q.open[f] = true
	q.asked = q.asked || f.call != nil && f.call.op != 0
	m.pump(f.desk)
}

// notary returns whom to ask.
func (m *Machine) notary(via matrix.ServerName) *notary {
	if via == "" {
		return &m.keys.own
	}
	n := m.keys.notaries[via]
	if n == nil {
		n = &notary{name: via}
		m.keys.notaries[via] = n
	}
	return n
}

// covers reports whether what f asks for is enough for wants, too.
func (f *keyFetch) covers(wants []matrix.KeyWant) bool {
	if f.via == "" {
		return true // a server has one answer for all
	}
	for _, w := range wants {
		ok := false
		for _, have := range f.wants {
			ok = ok || (have.KeyID == w.KeyID || have.KeyID == "") && have.MinValid >= w.MinValid
		}
		if !ok {
			return false
		}
	}
	return true
}

func (f *keyFetch) merge(wants []matrix.KeyWant) {
	for _, w := range wants {
		known := false
		for i := range f.wants {
			if f.wants[i].KeyID == w.KeyID {
				f.wants[i].MinValid = max(f.wants[i].MinValid, w.MinValid)
				known = true
			}
		}
		if !known {
			f.wants = append(f.wants, w)
		}
	}
}

// pump sends what waits for a notary, many servers at a time.
func (m *Machine) pump(n *notary) {
	for n.waiting.Len() > 0 {
		f, _ := n.waiting.Peek()
		if len(f.waiters) == 0 { // everyone is gone
			n.waiting.Pop()
			m.fetchOver(f, false)
			continue
		}
		batch, parallel := int(m.cfg.Keys.Batch), m.cfg.Keys.Parallel
		if n.name == "" {
			batch, parallel = 1, int32(m.cfg.Workers)
		}
		if n.running >= parallel {
			return
		}
		due := f.since.Add(gather * time.Duration(1+2*n.running))
		if h := m.hosts[n.name]; h != nil && h.backingOff(m.now) {
			due = m.now // it comes to nothing, so let that be known at once
		}
		if n.waiting.Len() < batch && m.now < due {
			if n.timer == nil {
				n.timer = m.timers.Set(due, timer{notary: n})
			}
			return
		}
		m.ask(n, batch)
	}
	if n.name != "" && n.running == 0 && n.waiting.Len() == 0 {
		m.timers.Stop(n.timer)
		n.timer = nil
		delete(m.keys.notaries, n.name)
	}
}

// ask makes a call of the first that wait.
func (m *Machine) ask(n *notary, batch int) {
	c := &call{class: matrix.ClassKey, queued: m.now, desk: n}
	for len(c.fetches) < batch {
		f, ok := n.waiting.Pop()
		if !ok {
			break
		}
		if len(f.waiters) == 0 {
			m.fetchOver(f, false)
			continue
		}
		f.call = c
		c.fetches = append(c.fetches, f)
	}
	dest := n.name
	c.endpoint = keyQueryRow
	if dest == "" {
		dest, c.endpoint = c.fetches[0].server, serverKeysRow
	}
	n.running++
	h := m.hosts[dest]
	c.forKey = n.name == "" && c.fetches[0].forKeys()
	if h == nil {
		h = m.newHost(dest)
		h.stranger = c.forKey
	}
	c.host = h
	if c.forKey && h.Failures > 0 && m.worthTrying(h.LastTry, h.NextTry) {
		h.NextTry = m.now // what came in its name may be from it
	}
	if h.backingOff(m.now) || n.name == "" && h.hanging(m.now) {
		m.keysEnd(c, h.why(m.now), false)
		return
	}
	m.enqueue(c)
}

var (
	keyQueryRow   = matrix.Match("POST", "/_matrix/key/v2/query")
	serverKeysRow = matrix.Match("GET", "/_matrix/key/v2/server")
)

// wanted reports whether somebody waits for what a call for keys fetches.
func (c *call) wanted() bool {
	for _, f := range c.fetches {
		if len(f.waiters) > 0 {
			return true
		}
	}
	return false
}

// sendKeys starts the attempt, now that a worker is free.
func (m *Machine) sendKeys(c *call) {
	c.wants = nil
	for _, f := range c.fetches {
		c.wants = append(c.wants, f.wants...)
		for _, q := range f.waiters {
			q.asked = true
		}
	}
	m.stats.KeyBatches++
	m.stats.KeysAsked += int64(len(c.fetches))
	c.expire = m.timers.Set(m.now.Add(keysGiveUp), timer{call: c, expire: true})
	c.late = m.timers.Set(m.now.Add(m.cfg.Keys.Wait), timer{call: c, late: true})
	m.transmit(c)
}

// keysLate: who waits for this attempt has waited for long enough. It goes on, for
// the next who asks.
func (m *Machine) keysLate(c *call) {
	m.stats.KeysLate++
	c.slow = true
	why := fmt.Sprintf("fsbus: %s has not answered in time", c.host.Name)
	m.keysRelease(c, why)
	for _, f := range c.fetches {
		if f.next != nil {
			f.next.release(m, why)
		}
	}
}

// keysRelease lets go of the queries that wait for a call.
func (m *Machine) keysRelease(c *call, why string) {
	for _, f := range c.fetches {
		f.release(m, why)
	}
}

// release lets go of the queries that wait for a fetch.
func (f *keyFetch) release(m *Machine, why string) {
	waiters := f.waiters
	f.waiters = nil
	for _, q := range waiters {
		delete(q.open, f)
		if why == "" {
			q.found = true // what came is better than an error about the rest
		} else {
			q.why = why
		}
		m.closeQuery(q)
	}
}

// keysDone: the attempt is over, its worker given back.
func (m *Machine) keysDone(c *call, ev Done, suspect bool) {
	m.timers.Stop(c.expire)
	m.timers.Stop(c.late)
	c.expire, c.late = nil, nil
	h := c.host
	ok := c.phase == phaseAnswered && ev.Failure == matrix.FailNone && c.status == 200
	why := ""
	switch {
	case ok:
		m.stats.KeysHad += int64(len(c.fetches) - len(ev.Missing))
		if c.desk.name == "" && len(ev.Missing) == 0 {
			for _, q := range c.fetches[0].waiters {
				q.answered = true
			}
		}
		for _, server := range ev.Missing {
			m.keysMiss(fetchKey{c.desk.name, server})
		}
	case suspect && c.desk.name != "":
		h.suspect = !h.reachable
		if m.keysPutOff(c) {
			return
		}
		why = h.why(m.now)
	case suspect:
		// Whoever waits has another way; whoever asks next shall not wait for the
		// same.
		m.failed(h, matrix.FailTimeout, "no connection in "+patience.String(), c.started)
		why = h.why(m.now)
	case c.phase == phaseAnswered && c.status == 429 && m.keysPutOff(c):
		return
	case c.phase == phaseAnswered && ev.Failure == matrix.FailNone:
		why = fmt.Sprintf("fsbus: %s answered with status %d", h.Name, c.status)
	case c.phase == phaseAnswered:
		why = m.failText(h, ev)
	default:
		m.blame(c, ev)
		why = m.failText(h, ev)
	}
	if c.desk.name == "" && !ok && ev.Failure != matrix.FailLocal {
		m.keysMiss(c.fetches[0].fetchKey)
	}
	m.keysEnd(c, why, ok)
	m.pump(c.desk)
	if h.backingOff(m.now) {
		m.refuseQueue(h)
	}
}

// keysPutOff has the same asked once more, after the pause that the notary wants,
// if it wants one.
func (m *Machine) keysPutOff(c *call) bool {
	if c.fetches[0].again >= keysAgain || c.host.pausedUntil > m.now.Add(m.cfg.Keys.Wait) {
		return false
	}
	c.desk.running--
	for i := len(c.fetches) - 1; i >= 0; i-- {
		f := c.fetches[i]
		f.call, f.since = nil, m.now
		f.again++
		c.desk.waiting.PushFront(f)
	}
	c.phase = phaseEnded
	if c.desk.timer == nil {
		c.desk.timer = m.timers.Set(max(m.now, c.host.pausedUntil), timer{notary: c.desk})
	}
	return true
}

// keysMiss notes that nothing valid could be had.
func (m *Machine) keysMiss(k fetchKey) {
	d := &m.keys
	if _, ok := d.missing[k]; !ok {
		d.forgot.Push(k)
	}
	d.missing[k] = m.now.Add(keysMissingFor)
	for d.forgot.Len() > maxKeysMissing {
		old, _ := d.forgot.Pop()
		delete(d.missing, old)
	}
}

// keysTried reports whether a server has been asked for its own keys a moment ago,
// on behalf of the bus as a notary, and had none: its homeserver asks the server
// itself then, which would come to the same.
func (m *Machine) keysTried(server matrix.ServerName) bool {
	until, ok := m.keys.missing[fetchKey{server: server}]
	return ok && m.now < until
}

// keysOver ends a call for keys, and has others take its place; why is how it
// failed, if it did.
func (m *Machine) keysOver(c *call, why string) {
	m.keysEnd(c, why, false)
	m.pump(c.desk)
	m.touch(c.host)
	m.forgetStranger(c.host)
}

func (m *Machine) keysEnd(c *call, why string, came bool) {
	m.keysRelease(c, why)
	c.phase = phaseEnded
	c.desk.running--
	for _, f := range c.fetches {
		f.call = nil
		m.fetchOver(f, came)
	}
}

// fetchOver lets go of a fetch, and has what is wanted beyond it asked for, unless
// keys came which may be good enough for that, too: most are valid for far longer
// than is asked for.
func (m *Machine) fetchOver(f *keyFetch, came bool) {
	d := &m.keys
	next := f.next
	delete(d.fetches, f.fetchKey)
	switch {
	case next == nil || len(next.waiters) == 0:
	case came:
		for _, q := range next.waiters {
			delete(q.open, next)
			if !q.loading {
				q.loading, q.again = true, true
				m.emit(LoadKeys{Query: q.id, Via: q.via, Wants: q.wants})
			}
		}
	default:
		d.fetches[next.fetchKey] = next
		next.since = m.now
		next.desk.waiting.Push(next)
	}
}

// closeQuery answers a query if nothing of it is under way any more.
func (m *Machine) closeQuery(q *keyQuery) {
	if q.loading || len(q.open) > 0 || m.keys.queries[q.id] != q || m.askElsewhere(q) {
		return
	}
	m.endQuery(q)
}

// keysDue: the query is answered with what there is.
func (m *Machine) keysDue(q *keyQuery) {
	m.dropFetches(q)
	if !q.loading {
		m.endQuery(q)
		return
	}
	// The store takes long, and nobody waits for it any more.
	q.timer = nil
	m.keyOver(q)
	if q.Req != 0 {
		q.why = "fsbus: the store is slow"
		q.found = q.found || q.again // some of it came
		m.answerQuery(q)
		q.Req = 0
	}
}

// dropFetches takes a query off what it waits for.
func (m *Machine) dropFetches(q *keyQuery) {
	for f := range q.open { // each is only told that one less waits
		for i, w := range f.waiters {
			if w == q {
				f.waiters = append(f.waiters[:i], f.waiters[i+1:]...)
				break
			}
		}
	}
	clear(q.open)
}

func (m *Machine) endQuery(q *keyQuery) {
	d := &m.keys
	m.timers.Stop(q.timer)
	q.timer = nil
	delete(d.queries, q.id)
	d.wants -= len(q.wants)
	m.keyOver(q)
	if q.Req == 0 {
		if q.isAhead() {
			d.ahead -= len(q.wants)
			if w := m.joins.rooms[q.room]; w != nil {
				w.KeysDone += len(q.wants)
			}
		}
		return
	}
	m.answerQuery(q)
}

// answerQuery answers a query of the homeserver with what there is.
func (m *Machine) answerQuery(q *keyQuery) {
	delete(m.keys.byReq, q.Req)
	if !q.found && q.why != "" && !q.own {
		m.refuseNew(q.Arrived, Refuse{Status: 502, Code: matrix.MUnknown, Text: q.why})
		return
	}
	m.stats.Answered++
	m.emit(ReplyKeys{Req: q.Req, Via: q.via, Wants: q.wants})
	m.emit(Free{q.Req})
}

// isAhead reports whether the query is for keys that somebody will ask for.
func (q *keyQuery) isAhead() bool { return q.Endpoint == nil && !q.forKey }

// gone reports whether the query was the homeserver's, which waits no more.
func (q *keyQuery) gone() bool { return q.Req == 0 && q.Endpoint != nil }

// queryGone: nobody waits for the query any more. What is not on its way yet is
// not asked for.
func (m *Machine) queryGone(q *keyQuery) {
	m.stats.Gone++
	delete(m.keys.byReq, q.Req)
	m.emit(Free{q.Req})
	q.Req = 0
	m.dropFetches(q)
	m.closeQuery(q)
}

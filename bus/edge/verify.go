package edge

import (
	"fmt"
	"slices"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// verifyDesk has signatures checked: first with the keys that are at hand, which
// costs little. Only who fails that may have a key fetched, and of those so many in
// a minute, so that forged names make us ask nobody without bound.
type verifyDesk struct {
	peers   map[string]*peer
	turn    sched.FIFO[*peer] // those with requests in their queues
	queued  int32
	running int32

	fetches  sched.FIFO[fetched]         // of the last minute
	recent   map[matrix.ServerName]int32 // how many of them are for a server
	fetching map[matrix.ServerName]*fetch
	topFetch int32
	parked   int32 // requests that wait for a fetch, or that it is for
	topPark  int32
}

// peer is an address with requests that are not verified yet.
type peer struct {
	name   string
	queue  sched.FIFO[*request]
	turns  bool // it stands in line
	held   int32
	parked int32
	bytes  int64
}

type fetched struct {
	at        sched.Time
	origin    matrix.ServerName
	peer, net string
}

// fetch is a Verify that may fetch a key; requests of the same origin wait for it.
type fetch struct {
	req    *request
	parked []*request
}

func (d *verifyDesk) init() {
	d.peers = make(map[string]*peer)
	d.recent = make(map[matrix.ServerName]int32)
	d.fetching = make(map[matrix.ServerName]*fetch)
}

// toVerify queues a request to have its signature checked.
func (m *Machine) toVerify(r *request) {
	p := m.desk.peers[r.Peer]
	if p != nil && r.Peer != "" && !m.peerMay(p, r.Size) || !m.unverifiedRoom(r, p) {
		m.full(nil, r, "fsbus: too many requests wait to have their signatures checked")
		return
	}
	if p = m.desk.peers[r.Peer]; p == nil {
		p = &peer{name: r.Peer}
		m.desk.peers[r.Peer] = p
	}
	p.held++
	p.bytes += r.Size
	m.unverified.take(r)
	r.timer = m.timers.Set(r.deadline, timer{req: r})
	m.queueVerify(p, r)
}

// peerMay reports whether one more request of an address may be held unverified: a
// quarter of all that may.
func (m *Machine) peerMay(p *peer, size int64) bool {
	return p.held < max(8, m.cfg.Unverified/4) && p.bytes+size <= int64(m.cfg.UnverifiedBytes)/4
}

// unverifiedRoom makes room for a request of an address, if need be at the expense of
// that which has most, and reports whether there is. p is nil if it has none yet.
func (m *Machine) unverifiedRoom(r *request, p *peer) bool {
	var held, bytes int64
	if p != nil {
		held, bytes = int64(p.held), p.bytes
	}
	for !m.unverified.fits(r.Size) {
		if r.Size > m.unverified.maxBytes {
			return false
		}
		load, own := func(x *peer) int64 { return int64(x.held) }, held+1
		if m.unverified.n < m.unverified.maxN {
			load, own = func(x *peer) int64 { return x.bytes }, bytes+r.Size
		}
		var most *peer
		for _, x := range m.desk.peers { // in any order: equal ones go by name
			if n := load(x); x == p || x.queue.Len() == 0 || n <= own {
				continue
			} else if most == nil || n > load(most) || n == load(most) && x.name < most.name {
				most = x
			}
		}
		if most == nil {
			return false
		}
		m.displace(most)
	}
	return true
}

// displace refuses the newest request of an address that has not been looked at.
func (m *Machine) displace(p *peer) {
	r, _ := p.queue.PopBack()
	m.desk.queued--
	if r.answered {
		m.free(r)
		return
	}
	m.stats.Displaced++
	m.full(nil, r, "fsbus: too many requests of this address wait to have their signatures checked")
}

func (m *Machine) queueVerify(p *peer, r *request) {
	r.stage = stageQueued
	m.desk.queued++
	p.queue.Push(r)
	if !p.turns {
		p.turns = true
		m.desk.turn.Push(p)
	}
}

// leavePeer forgets an address that has no requests and does not stand in line.
func (m *Machine) leavePeer(p *peer) {
	if p.held == 0 && !p.turns {
		delete(m.desk.peers, p.name)
	}
}

// unverify takes a request off the desk.
func (m *Machine) unverify(r *request) {
	if r.pool == nil {
		return // it was never on it
	}
	r.pool.give(r)
	p := m.desk.peers[r.Peer]
	p.bytes -= r.Size
	p.held--
	m.leavePeer(p)
}

// park counts a request that waits for a fetch, unpark one that does not any more.
func (m *Machine) park(r *request) {
	m.desk.parked++
	m.desk.topPark = max(m.desk.topPark, m.desk.parked)
	m.desk.peers[r.Peer].parked++
}

func (m *Machine) unpark(r *request) {
	m.desk.parked--
	m.desk.peers[r.Peer].parked--
}

// mostParked is how many requests may be parked in all: half of those that are
// held unverified, so that they are in nobody's way whose key is at hand.
func (m *Machine) mostParked() int32 { return max(2, m.cfg.Unverified/2) }

// verifyNext starts checks while there is room for them. Addresses take turns.
func (m *Machine) verifyNext() {
	d := &m.desk
	for d.running < m.cfg.Verifying {
		p, ok := d.turn.Pop()
		if !ok {
			return
		}
		r, any := p.queue.Pop()
		if p.turns = p.queue.Len() > 0; p.turns {
			d.turn.Push(p)
		}
		if !any { // they were displaced
			m.leavePeer(p)
			continue
		}
		d.queued--
		if r.answered {
			m.free(r)
			continue
		}
		r.stage = stageVerifying
		d.running++
		m.emit(Verify{Req: r.Req})
	}
}

func (m *Machine) verified(ev Verified) {
	r := m.reqs[ev.Req]
	if r == nil || r.stage != stageVerifying {
		panic(fmt.Sprintf("edge: a verdict for request %d, which is not being verified (%d and %d are)", ev.Req, m.desk.running, len(m.desk.fetching)))
	}
	var parked []*request
	if r.fetched {
		parked = m.desk.fetching[r.Origin].parked
		delete(m.desk.fetching, r.Origin)
		for _, p := range append(parked, r) {
			m.unpark(p)
		}
	} else {
		m.desk.running--
	}
	keys := r.Keys
	m.judge(r, ev)
	for _, p := range parked {
		switch {
		case p.answered:
			m.free(p)
		case ev.Verdict == NoKey && slices.Equal(p.Keys, keys):
			m.noKey(p, ev)
		default:
			m.queueVerify(m.desk.peers[p.Peer], p)
		}
	}
}

// judge acts on the verdict for one request.
func (m *Machine) judge(r *request, ev Verified) {
	switch ev.Verdict {
	case Good:
		m.stats.Verified++
		if r.answered {
			m.free(r)
			return
		}
		m.authentic(r)
	case Forged:
		m.stats.Forged++
		m.offend(r.Peer)
		if o := m.origins[originKey{name: r.Origin}]; o != nil {
			o.counts.Forged++
		}
		if r.answered {
			m.free(r)
			return
		}
		m.turnAway(nil, r, ForAuth, 401, matrix.MUnauthorized, "fsbus: invalid signature: "+ev.Text, 0)
	case NoKey:
		switch {
		case r.answered:
			m.free(r)
		case r.fetched, ev.Tried:
			m.noKey(r, ev)
		default:
			m.fetch(r, ev.Text)
		}
	default:
		panic(fmt.Sprintf("edge: unknown verdict %d for request %d", ev.Verdict, r.Req))
	}
}

// fetch has the key of a request fetched, if there is a fetch left for that.
func (m *Machine) fetch(r *request, text string) {
	d := &m.desk
	if !m.mayPark(r) {
		m.stats.ParkedDenied++
		m.noKey(r, Verified{Text: text})
		return
	}
	if f := d.fetching[r.Origin]; f != nil {
		m.park(r)
		r.stage = stageParked
		f.parked = append(f.parked, r)
		return
	}
	if !m.mayFetch(r) {
		m.stats.FetchesDenied++
		m.noKey(r, Verified{Text: text})
		return
	}
	m.stats.Fetches++
	m.park(r)
	d.fetches.Push(fetched{m.now, r.Origin, r.Peer, r.Net})
	count(m.ledger.fetches, r.Peer, 1)
	count(m.ledger.fetches, r.Net, 1)
	d.recent[r.Origin]++
	d.topFetch = max(d.topFetch, int32(d.fetches.Len()))
	d.fetching[r.Origin] = &fetch{req: r}
	r.fetched = true
	r.stage = stageVerifying
	m.emit(Verify{Req: r.Req, MayFetch: true})
}

// oldFetches forgets the fetches that are over a minute old.
func (m *Machine) oldFetches() {
	d := &m.desk
	for {
		f, ok := d.fetches.Peek()
		if !ok || m.now.Sub(f.at) < fetchWindow {
			return
		}
		d.fetches.Pop()
		count(m.ledger.fetches, f.peer, -1)
		count(m.ledger.fetches, f.net, -1)
		if d.recent[f.origin]--; d.recent[f.origin] == 0 {
			delete(d.recent, f.origin)
		}
	}
}

// noKey decides about a request whose signature cannot be checked.
func (m *Machine) noKey(r *request, ev Verified) {
	m.stats.NoKey++
	switch {
	case ev.Lacks:
		m.stats.KeyLacked++
		m.offend(r.Peer)
		m.turnAway(nil, r, ForAuth, 401, matrix.MUnauthorized, fmt.Sprintf("fsbus: %s, asked just now, does not have the key that this was signed with: %s", r.Origin, ev.Text), 0)
	case m.cfg.NoKey == PassNoKey && m.mayPass(r):
		m.admit(r)
		m.stats.Passed++
		m.ask(r, m.strangers, BandLookup)
	case m.cfg.NoKey == PassNoKey || !ev.Tried:
		m.full(nil, r, fmt.Sprintf("fsbus: the signing key of %s is not known, and too many are asked for", r.Origin))
	default:
		m.turnAway(nil, r, ForAuth, 401, matrix.MUnauthorized, fmt.Sprintf("fsbus: the signing key of %s could not be had: %s", r.Origin, ev.Text), 0)
	}
}

// authentic handles a request whose signature is good.
func (m *Machine) authentic(r *request) {
	o := m.origin(originKey{name: r.Origin})
	if o == nil {
		m.full(nil, r, "fsbus: too many servers have requests here")
		return
	}
	o.counts.Requests++
	o.last = m.now
	if o.alive == 0 || m.now.Sub(o.alive) >= aliveEvery {
		o.alive = m.now
		m.emit(Alive{r.Origin})
	}
	if r.Txn != nil {
		m.transaction(r, o)
	} else {
		m.request(r, o)
	}
}

// unsigned handles a request that needs no signature.
func (m *Machine) unsigned(r *request) {
	o := m.origin(originKey{peer: r.Peer})
	if o == nil {
		m.full(nil, r, "fsbus: too many have requests here")
		return
	}
	o.counts.Requests++
	o.last = m.now
	r.stage = stageThrough
	m.request(r, o)
}

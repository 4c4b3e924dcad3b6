package edge

import (
	"time"

	"fsbus/sched"
)

// What costs us something for a request that nobody has signed yet is shared out by
// addresses, and by the networks that these are in: to fetch a key, to wait for that, and
// to have the homeserver try what could not be checked. So whoever makes up names uses up
// his own share, and a server that is new has what it needs. An address that was caught
// forging has less of all.

const (
	// newcomerFetches is how many fetches in a minute, and requests that wait for one, an
	// address has from a quarter that is kept for those with no more.
	newcomerFetches = 2
	// peerPart and netPart are which part of KeyFetches is for one address, and for one
	// network.
	peerPart, netPart = 8, 4
	// offenceFor is how long a forged request counts against its address, and maxOffences
	// how many do: beyond it the oldest do not.
	offenceFor  = 10 * time.Minute
	maxOffences = 4096
	// passOffences is with how many an address has nothing passed on unchecked.
	passOffences = 3
)

// ledger has what addresses and networks have lately had done for them.
type ledger struct {
	fetches  map[string]int32 // in the last minute, by address and by network
	passing  map[string]int32 // requests that wait to be passed on unchecked, by address
	offences sched.FIFO[offence]
	bad      map[string]int32 // how many of offences are an address's
}

type offence struct {
	at   sched.Time
	peer string
}

func (l *ledger) init() {
	l.fetches = make(map[string]int32)
	l.passing = make(map[string]int32)
	l.bad = make(map[string]int32)
}

func count(m map[string]int32, key string, n int32) {
	if key == "" {
		return // nobody knows whose it is
	}
	if m[key] += n; m[key] == 0 {
		delete(m, key)
	}
}

// offend notes that an address has sent something forged.
func (m *Machine) offend(peer string) {
	l := &m.ledger
	if peer == "" {
		return
	}
	m.oldOffences()
	if l.offences.Len() >= maxOffences {
		old, _ := l.offences.Pop()
		count(l.bad, old.peer, -1)
	}
	l.offences.Push(offence{m.now, peer})
	count(l.bad, peer, 1)
}

// oldOffences forgets those that do not count any more.
func (m *Machine) oldOffences() {
	l := &m.ledger
	for {
		o, ok := l.offences.Peek()
		if !ok || m.now.Sub(o.at) < offenceFor {
			return
		}
		l.offences.Pop()
		count(l.bad, o.peer, -1)
	}
}

// mayFetch reports whether a key may be fetched for a request: within all fetches of a
// minute, within those for its origin, and within the share of its address.
func (m *Machine) mayFetch(r *request) bool {
	d, l := &m.desk, &m.ledger
	m.oldFetches()
	m.oldOffences()
	limit := m.cfg.KeyFetches
	if !m.known(r.Origin) {
		limit -= limit / 4
	}
	if r.Peer != "" {
		here, bad := l.fetches[r.Peer], l.bad[r.Peer]
		if here >= max(1, max(newcomerFetches, m.cfg.KeyFetches/peerPart)>>min(bad, 16)) {
			return false
		}
		if r.Net != "" && l.fetches[r.Net] >= max(newcomerFetches, m.cfg.KeyFetches/netPart) {
			return false
		}
		if here >= newcomerFetches || bad > 0 {
			limit -= limit / 4
		}
	}
	return d.fetches.Len() < int(limit) && d.recent[r.Origin] < fetchesPerOrigin
}

// mayPark reports whether one more request may wait for a fetch. A quarter of the
// places is kept for servers that are known, a quarter of the rest for addresses that
// have hardly any, and one address may take a quarter.
func (m *Machine) mayPark(r *request) bool {
	if f := m.desk.fetching[r.Origin]; f != nil && len(f.parked)+1 >= parkedPerOrigin {
		return false
	}
	most := m.mostParked()
	here := max(2, most/4)
	if !m.known(r.Origin) {
		most -= most / 4
	}
	if r.Peer == "" {
		return m.desk.parked < most
	}
	parked := m.desk.peers[r.Peer].parked
	if parked >= newcomerFetches || m.ledger.bad[r.Peer] > 0 {
		most -= most / 4
	}
	return m.desk.parked < most && parked < here
}

// mayPass reports whether the homeserver may be given a request whose signature could not
// be checked: there is a queue of those, of which one address has a quarter.
func (m *Machine) mayPass(r *request) bool {
	m.oldOffences()
	if r.Peer != "" && (m.ledger.bad[r.Peer] >= passOffences || m.ledger.passing[r.Peer] >= passQueue/4) {
		return false
	}
	return m.strangers.waiting() < passQueue && m.strangers.fits(r, &m.cfg) && m.room(r, BandLookup, m.strangers)
}

// checkLedger recounts what addresses have had.
func (m *Machine) checkLedger() (wrong string) {
	l := &m.ledger
	fetches, bad := map[string]int32{}, map[string]int32{}
	for range m.desk.fetches.Len() {
		f, _ := m.desk.fetches.Pop()
		count(fetches, f.peer, 1)
		count(fetches, f.net, 1)
		m.desk.fetches.Push(f)
	}
	for range l.offences.Len() {
		o, _ := l.offences.Pop()
		count(bad, o.peer, 1)
		l.offences.Push(o)
	}
	for _, pair := range []struct {
		what    string
		have, n map[string]int32
	}{{"fetches", l.fetches, fetches}, {"offences", l.bad, bad}} {
		for name, n := range pair.n {
			if pair.have[name] != n {
				return pair.what + " of " + name
			}
		}
		if len(pair.have) != len(pair.n) {
			return pair.what
		}
	}
	for name, n := range l.passing {
		if n < 0 || n > passQueue/4 {
			return "passed on for " + name
		}
	}
	return ""
}

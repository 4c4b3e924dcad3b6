package bus

import (
	"time"

	"fsbus/bus/matrix"
)

// What checks the signatures of other servers' requests has its keys from the key
// desk, too. Whose they are is not known before: the name may be made up. So its
// wishes are for one key each, a server is asked once, a notary only where the
// server cannot be reached, and of a server that nobody else wants anything from,
// nothing is remembered or stored when that fails.

// keyWantedFor bounds the time that a KeyWanted takes, by the server and by a
// notary.
const keyWantedFor = 20 * time.Second

// keyWanted fetches a key of a server.
func (m *Machine) keyWanted(ev KeyWanted) {
	if m.draining || m.keys.wants >= m.cfg.Keys.MaxWants {
		m.emit(KeyFetched{For: ev.For})
		return
	}
	valid := ev.Now
	if ev.Newer {
		valid = valid.Add(matrix.MaxKeyValidity + time.Hour) // nothing that is stored is good for so long
	}
	wants := []matrix.KeyWant{{Server: ev.Server, KeyID: ev.KeyID, MinValid: valid}}
	q := &keyQuery{own: true, via: ev.Server, wants: wants, forKey: true, wanted: ev.For}
	q.timer = m.timers.Set(m.now.Add(keyWantedFor), timer{query: q})
	m.openQuery(q)
}

// keyOver tells the shell that its KeyWanted is over, if this is one.
func (m *Machine) keyOver(q *keyQuery) {
	if q.wanted != 0 {
		m.emit(KeyFetched{For: q.wanted, Asked: q.asked, Answered: q.own && q.answered})
		q.wanted = 0
	}
}

// askElsewhere has a notary asked for a key whose server could not be reached,
// unless the bus is the notary so that no other learns of whom we hear.
func (m *Machine) askElsewhere(q *keyQuery) bool {
	via := m.keys.latest
	if q.wanted == 0 || !q.own || q.why == "" || via == "" || m.keys.ownName != "" || m.draining {
		return false
	}
	q.own, q.via, q.why = false, via, ""
	q.loading, q.again = true, true
	m.emit(LoadKeys{Query: q.id, Via: via, Wants: q.wants})
	return true
}

// forKeys reports whether nobody but KeyWanted waits for a fetch.
func (f *keyFetch) forKeys() bool {
	for _, q := range f.waiters {
		if !q.forKey {
			return false
		}
	}
	return true
}

// forgetStranger drops a host of which nothing is known but the name.
func (m *Machine) forgetStranger(h *host) {
	if !h.stranger || !h.isIdle {
		return
	}
	m.idle.remove(h)
	m.timers.Stop(h.timer)
	delete(m.hosts, h.Name)
}

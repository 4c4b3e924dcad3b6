package sim

import (
	"fmt"
	"slices"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
)

const (
	ownName    = "own.test"
	notaries   = 3 // the first remotes
	keyServers = 60
	strangers  = 2 // the last remotes, of which keys are wanted
)

// keyID is a key as it came through somebody.
type keyID struct {
	via, server matrix.ServerName
	id          string
}

// keyFetch is what may run once at a time.
type keyFetch struct{ via, server matrix.ServerName }

// keyWorld is what a store has of keys, and who is asked for them.
type keyWorld struct {
	stored  map[keyID]matrix.Timestamp // until when it is valid
	fetches map[keyFetch]bool
	running map[matrix.ServerName]int // batches at a notary
	wanted  map[uint64]bool           // KeyWanted that is not over
	last    uint64                    // of them
	joining map[string]bool           // the rooms whose windows are open
}

// drawKeys draws the limits of the key desk.
func (w *World) drawKeys(c *bus.Config) {
	c.Keys.Batch = 1 + int32(w.rng.IntN(50))
	c.Keys.Parallel = 1 + int32(w.rng.IntN(10))
	c.Keys.Wait = w.between(time.Second, 8*time.Second)
	c.Keys.MaxWants = 50 + w.rng.IntN(1000)
	if w.rng.IntN(2) == 0 {
		c.Keys.OwnName = ownName
	}
}

// drawWants draws keys of some servers, by server. A notary is asked for any, the
// bus itself for those that the world has.
func (w *World) drawWants(own bool) (list []matrix.KeyWant) {
	most := keyServers
	if own {
		most = len(w.remotes)
	}
	for i := w.rng.IntN(most); i < most && len(list) < 80; i += 1 + w.rng.IntN(3) {
		name := matrix.ServerName(fmt.Sprintf("k%02d.test", i))
		if own {
			name = w.remotes[i].name
		}
		for id := range 1 + w.rng.IntN(2) {
			list = append(list, matrix.KeyWant{Server: name, KeyID: fmt.Sprint("ed25519:", id), MinValid: matrix.Timestamp(w.rng.IntN(3)) * 10})
		}
	}
	return list
}

// askKeys sends a query for keys.
func (w *World) askKeys() {
	own := w.profile.Config.Keys.OwnName != "" && w.rng.IntN(2) == 0
	dest := w.remotes[w.rng.IntN(min(notaries, len(w.remotes)))].name
	if own {
		dest = ownName
	}
	ep := matrix.Match("POST", "/_matrix/key/v2/query")
	w.lastReq++
	r := &request{Arrived: bus.Arrived{Req: w.lastReq, Dest: dest, Endpoint: ep, Class: ep.Class, Received: w.now, Key: keyOf("keys ", w.lastReq)}, wants: w.drawWants(own), query: true}
	w.begin(r)
	w.Counts["key query"]++
	w.step(bus.KeyQuery{Arrived: r.Arrived, Own: own, Wants: r.wants})
}

// comesIn tells the core of something that came from a server, or in its name.
func (w *World) comesIn() {
	if w.rng.IntN(2) == 0 {
		r := w.remotes[w.rng.IntN(len(w.remotes))]
		r.flushed, r.aliveAt = true, w.now
		w.step(bus.Alive{Server: r.name})
		return
	}
	r := w.remotes[len(w.remotes)-1-w.rng.IntN(strangers)]
	r.stranger = true
	w.keys.last++
	w.keys.wanted[w.keys.last] = true
	w.step(bus.KeyWanted{For: w.keys.last, Server: r.name, KeyID: fmt.Sprint("ed25519:", w.rng.IntN(2)), Now: w.wall()})
}

// seeAhead tells the core what is in an answer to a join.
func (w *World) seeAhead() {
	room := fmt.Sprint("!r", w.rng.IntN(3))
	if w.rng.IntN(2) == 0 {
		w.step(bus.KeysSeen{Room: room, Wants: w.drawWants(w.profile.Config.Keys.OwnName != "")})
		return
	}
	var servers []matrix.ServerName
	for range 1 + w.rng.IntN(20) {
		servers = append(servers, w.remotes[w.rng.IntN(len(w.remotes))].name)
	}
	w.step(bus.ServersSeen{Room: room, Servers: servers})
}

// loadKeys looks up what the store has.
func (w *World) loadKeys(e bus.LoadKeys) {
	fails := w.rng.IntN(15) == 0
	d := w.between(100*time.Microsecond, 100*time.Millisecond)
	if w.rng.IntN(100) == 0 {
		d = w.between(time.Second, time.Minute) // the store hangs
	}
	w.at(d, func() {
		ev := bus.KeysLoaded{Query: e.Query}
		for _, want := range e.Wants {
			if until, ok := w.keys.stored[keyID{e.Via, want.Server, want.KeyID}]; !ok || fails || until < want.MinValid {
				ev.Missing = append(ev.Missing, want)
			}
		}
		if w.rng.IntN(10) == 0 {
			ev.Outdated = []bus.Key{keyOf(w.remotes[w.rng.IntN(len(w.remotes))].name, "server_keys", w.rng.IntN(3))}
		}
		w.step(ev)
	})
}

// replyKeys checks an answer to a query.
func (w *World) replyKeys(e bus.ReplyKeys) {
	r := w.reqs[e.Req]
	// A notary may answer in part, which the bus does when it is short of room.
	if r == nil || !r.query || e.Via != r.Dest || len(e.Wants) > len(r.wants) || !slices.Equal(e.Wants, r.wants[:len(e.Wants)]) ||
		len(e.Wants) < len(r.wants) && e.Via != w.profile.Config.Keys.OwnName {
		w.failf("request %d is answered with keys from %s", e.Req, e.Via)
	}
	w.endRequest(e.Req, "reply")
	w.Counts["keys"]++
}

// asksKeys checks and notes an attempt to get keys.
func (w *World) asksKeys(e bus.Send, a *attempt) {
	cfg := w.profile.Config.Keys
	via := e.Dest
	servers := []matrix.ServerName{e.Dest}
	if e.Origin {
		via = ownName
		w.Counts["origin"]++
	} else {
		w.Counts["batch"]++
		servers = nil
		for _, want := range e.Notary {
			servers = append(servers, want.Server)
		}
		servers = slices.Compact(servers)
		w.keys.running[via]++
		if n := w.keys.running[via]; n > int(cfg.Parallel) || len(servers) > int(cfg.Batch) || len(servers) == 0 {
			w.failf("%d batches at %s, this one of %d servers", n, via, len(servers))
		}
	}
	for _, s := range servers {
		f := keyFetch{via, s}
		if w.keys.fetches[f] {
			w.failf("the keys of %s are asked for twice at a time, via %s", s, via)
		}
		w.keys.fetches[f] = true
	}
	a.asks, a.via, a.servers = e.Notary, via, servers
}

// hasKeys notes the end of such an attempt, and returns whose keys did not come.
func (w *World) hasKeys(a *attempt, well bool) (missing []matrix.ServerName) {
	if a.via != ownName {
		w.keys.running[a.via]--
	}
	w.endsKeys(a)
	for _, s := range a.servers {
		delete(w.keys.fetches, keyFetch{a.via, s})
		switch none := w.rng.IntN(10) == 0; {
		case !well:
			w.noKeys(a) // its homeserver's try would come to the same
		case none:
			missing = append(missing, s)
			w.noKeys(a)
		case a.via == ownName:
			for id := range 2 {
				w.keys.stored[keyID{a.via, s, fmt.Sprint("ed25519:", id)}] = 15
				w.keys.stored[keyID{s, s, fmt.Sprint("ed25519:", id)}] = w.wall().Add(time.Hour)
			}
		default:
			for _, want := range a.asks {
				if k := (keyID{a.via, s, want.KeyID}); want.Server == s {
					w.keys.stored[k] = max(w.keys.stored[k], want.MinValid)
				}
			}
		}
	}
	return missing
}

// bootKeys forgets what a crash loses.
func (w *World) bootKeys() {
	w.keys.fetches, w.keys.running = map[keyFetch]bool{}, map[matrix.ServerName]int{}
	w.keys.wanted, w.keys.joining = map[uint64]bool{}, map[string]bool{}
	if w.keys.stored == nil {
		w.keys.stored = map[keyID]matrix.Timestamp{}
	}
}

// body has an answer's body arrive, with word of it each second.
func (w *World) body(a *attempt, size int64, over time.Duration) {
	start := w.now
	var tell func()
	tell = func() {
		if a.done {
			return
		}
		a.arrived = int64(float64(size) * float64(w.now.Sub(start)) / float64(over))
		w.step(bus.Progress{Op: a.id, Size: a.arrived})
		w.at(time.Second, tell)
	}
	w.at(time.Second, tell)
}

// again has a homeserver that was not answered in time send its join once more.
func (w *World) again(r *request) {
	if r.try >= r.Endpoint.Tries {
		return
	}
	w.at(w.between(0, 2*time.Second), func() {
		if w.out != nil && w.deaf() || w.healed || w.ending {
			return
		}
		w.lastReq++
		next := &request{Arrived: r.Arrived, try: r.try + 1}
		next.Req, next.Received = w.lastReq, w.now
		w.begin(next)
		w.Counts["again"]++
		w.step(next.Arrived)
	})
}

// begin notes a request that is about to arrive.
func (w *World) begin(r *request) {
	r.try = max(r.try, 1)
	r.deadline = r.Received.Add(r.Endpoint.Timeout)
	w.reqs[r.Req] = r
	w.answeredInTime(r)
	if w.rng.IntN(20) == 0 {
		w.at(w.between(0, 15*time.Second), func() {
			if !r.ended {
				r.ended, r.gone = true, true
				w.Counts["gone"]++
				w.step(bus.Gone{Req: r.Req})
				w.again(r)
			}
		})
	}
}

package bus

import (
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// laneID says which workers a host's requests may use: a misbehaving host
// cannot take one that a well-behaved host could use.
type laneID uint8

const (
	laneProven  laneID = iota // answered within the last day
	laneSlow                  // that, too, but took long over the last transaction
	laneUnknown               // not yet
	laneFailing               // the last attempt failed, or takes suspiciously long
	numLanes
)

func (l laneID) String() string { return [numLanes]string{"proven", "slow", "unknown", "failing"}[l] }

// host is one destination.
type host struct {
	HostRecord
	limiter     *rate.Limiter
	pausedUntil sched.Time // the remote asked for it (429)
	soft        int32      // gateway errors and unanswered requests in a row
	quiet       int32      // how many times in a row that were softFailures
	quietUntil  sched.Time // it gets no requests until then, as it does not answer them
	quietFor    string     // what came of the last
	spent       sched.Time // when a user's request ended its back-off last
	reachable   bool       // a handshake succeeded since the last failure
	suspect     bool       // the last attempt took too long to connect
	slowed      bool       // its rate is below the configured one, since it was too fast
	stranger    bool       // known only by name, from a request that may be forged
	former      *queue     // of the outbox: nothing is pending, but it has failed

	took time.Duration // to answer the last transaction of the outbox

	queue   [matrix.NumClasses + 1]sched.FIFO[*call] // may hold dropped calls
	waiting [matrix.NumClasses + 1]int32             // live ones in queue
	listed  [matrix.NumClasses + 1]laneID            // the ready list it is on, numLanes if none
	running [matrix.NumClasses + 1]int32
	inUse   int32      // attempts running or about to
	begun   sched.Time // when the last one got its worker

	timer      *sched.Timer[timer]
	stored     sched.Time // when the record was last stored
	dirty      bool
	prev, next *host // in the idle list
	isIdle     bool
}

func (m *Machine) newHost(name matrix.ServerName) *host {
	if len(m.hosts) >= int(m.cfg.MaxHosts) {
		m.forgetHost()
	}
	h := &host{limiter: rate.NewLimiter(rate.Limit(m.cfg.HostRate), int(m.cfg.HostBurst))}
	h.Name = name
	for c := range h.listed {
		h.listed[c] = numLanes
	}
	m.hosts[name] = h
	m.idle.push(h)
	return h
}

// limit changes the host's rate.
func (h *host) limit(cfg Config, now sched.Time) {
	h.limiter.SetLimitAt(now.Std(), rate.Limit(cfg.HostRate))
	h.limiter.SetBurstAt(now.Std(), int(cfg.HostBurst))
	h.slowed = false
}

// slower lowers the rate at which a host is asked, as it has said that it was too
// fast: to one in the pause that it wants, or if that is no less, by a fifth.
func (m *Machine) slower(h *host, wait time.Duration) {
	h.slowed = true
	limit := min(h.limiter.Limit()*4/5, rate.Every(wait))
	h.limiter.SetLimitAt(m.now.Std(), max(limit, min(slowest, rate.Limit(m.cfg.HostRate))))
	h.limiter.SetBurstAt(m.now.Std(), 1)
}

// faster raises it again, as it has answered.
func (m *Machine) faster(h *host) {
	if !h.slowed {
		return
	}
	limit := h.limiter.Limit() * faster
	if limit >= rate.Limit(m.cfg.HostRate) {
		h.limit(m.cfg, m.now)
		return
	}
	h.limiter.SetLimitAt(m.now.Std(), limit)
}

// forgetHost makes room by dropping a host that has long been idle, rather one
// that works than one whose back-off would be lost, or whose record is about to
// be written.
func (m *Machine) forgetHost() {
	victim := m.idle.first // if all are about to be written; it still will be
	for h, seen := m.idle.first, 0; h != nil && seen < forgetScan; h = h.next {
		if h.dirty {
			continue
		}
		if seen == 0 {
			victim = h
		}
		seen++
		if h.Failures == 0 {
			victim = h
			break
		}
	}
	if victim == nil {
		panic(fmt.Sprintf("bus: none of %d hosts can be forgotten: %d requests, %d attempts, %d records to write", len(m.hosts), len(m.reqs), len(m.ops), len(m.dirty)))
	}
	m.idle.remove(victim)
	m.timers.Stop(victim.timer)
	delete(m.hosts, victim.Name)
	m.stats.HostsForgotten++
}

// touch keeps the idle list true after the host's work has changed.
func (m *Machine) touch(h *host) {
	idle := h.inUse == 0 && h.allWaiting() == 0
	if idle == h.isIdle {
		return
	}
	if idle {
		m.idle.push(h)
	} else {
		m.idle.remove(h)
	}
}

func (h *host) allWaiting() (n int32) {
	for _, w := range h.waiting {
		n += w
	}
	return n
}

// lane returns which workers the host's next attempt uses.
func (h *host) lane(now sched.Time) laneID {
	switch {
	case h.suspect, h.Failures > 0 && !h.reachable:
		return laneFailing
	case h.reachable || h.LastSuccess != 0 && now.Sub(h.LastSuccess) < provenFor:
		if h.took >= slow {
			return laneSlow
		}
		return laneProven
	}
	return laneUnknown
}

// backingOff reports whether the host is to be left alone, with nothing on the
// way that could tell that it is back.
func (h *host) backingOff(now sched.Time) bool {
	return h.Failures > 0 && h.inUse == 0 && h.NextTry > now
}

// hanging reports whether the host is to be left alone by requests, whatever its
// back-off says: an attempt has lately got no answer at all, another may take just
// as long, and its caller knows other ways or can do without. Deliveries, which
// nobody waits for, find out when it is back.
func (h *host) hanging(now sched.Time) bool {
	silent := h.LastFailure == matrix.FailTimeout || h.LastFailure == matrix.FailUnreachable
	return h.Failures > 0 && !h.reachable && h.inUse == 0 && silent && now.Sub(h.LastTry) < hangingFor
}

// mayRun reports whether an attempt of class c may start now. When only time
// is in the way, it returns the moment at which to ask again.
func (h *host) mayRun(c matrix.Class, cfg Config, now sched.Time) (ok bool, again sched.Time) {
	if l := h.lane(now); h.inUse > 0 && l != laneProven && l != laneSlow {
		// The first one is the pre-flight of the others. One that takes longer uses a
		// connection that was open, and does not say whether another could be made.
		if over := h.begun.Add(preflightFor); now < over {
			return false, over
		}
	}
	if c == matrix.ClassKey && h.running[c] >= cfg.Keys.Parallel {
		return false, 0
	}
	// Each class, with all below it, leaves some of the host's places free. A
	// remote does not count requests for keys, which nobody has signed.
	var held int32
	for d := matrix.Class(matrix.NumClasses); d >= 1 && c != matrix.ClassKey; d-- {
		if d == matrix.ClassKey {
			continue
		}
		held += h.running[d]
		if d <= c && held >= max(1, cfg.HostConcurrency-classes[d].spare) {
			return false, 0
		}
	}
	if h.Failures > 0 && !h.reachable && h.NextTry > now {
		return false, h.NextTry
	}
	if h.pausedUntil > now {
		return false, h.pausedUntil
	}
	if tokens := h.limiter.TokensAt(now.Std()); tokens < 1 && c > matrix.ClassEvent && c != matrix.ClassKey {
		wait := time.Duration((1 - tokens) / float64(h.limiter.Limit()) * float64(time.Second))
		return false, now.Add(max(wait, time.Millisecond))
	}
	return true, 0
}

// succeeded notes an answer that shows a working host.
func (m *Machine) succeeded(h *host, status int) {
	h.stranger = false
	h.LastStatus = status
	h.reachable, h.suspect = true, false
	failed := h.Failures > 0
	h.Failures, h.FirstFailure, h.NextTry = 0, 0, 0
	old := h.LastSuccess
	h.LastSuccess = m.now
	if failed || old == 0 || m.now.Sub(h.stored) >= keepSuccess {
		m.store(h)
	}
	m.wake(h)
}

// softFailed notes that a request was not answered, though the host was reached: that
// may be the host's fault or the request's own. After several in a row it gets no
// requests for a while. What the outbox has for it is tried nevertheless.
func (m *Machine) softFailed(h *host, f matrix.Failure, status int, detail string) {
	h.soft++
	h.LastStatus = status
	if h.soft < softFailures {
		return
	}
	h.soft = 0
	h.quiet++
	h.quietUntil = m.now.Add(quietBackoff.Delay(h.quiet, m.rng))
	h.quietFor = failureText(f, status)
	if detail != "" {
		h.quietFor += " (" + cut(detail) + ")"
	}
}

// failed notes an attempt, started at the moment tried, that failed.
func (m *Machine) failed(h *host, f matrix.Failure, detail string, tried sched.Time) {
	h.reachable, h.suspect = false, false
	h.soft = 0
	if h.Failures == 0 {
		h.FirstFailure = m.now
	}
	h.Failures++
	h.LastFailure, h.Detail = f, cut(detail)
	h.LastTry = tried
	h.NextTry = m.now.Add(m.delay(h, h.Failures, f))
	m.store(h)
	if p := m.outbox.pacer; p != nil && !h.stranger {
		p.Reach(m.now, h.Name, true)
	}
}

// delay returns how long a host is left alone after so many failures in a row, the last
// one f.
func (m *Machine) delay(h *host, failures int32, f matrix.Failure) time.Duration {
	q := m.outbox.queues[h.Name]
	return m.pause(backoffs[f], failures, h.FirstFailure, q != nil && q.durable())
}

// store has the host's record written soon.
func (m *Machine) store(h *host) {
	if !h.dirty && !h.stranger {
		h.dirty = true
		m.dirty = append(m.dirty, h)
	}
}

// cut bounds a text without splitting a character.
func cut(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	n := maxDetail
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n]
}

// hostList is a doubly linked list through the hosts themselves.
type hostList struct {
	first, last *host
	n           int
}

func (l *hostList) push(h *host) {
	h.prev, h.next, h.isIdle = l.last, nil, true
	if l.last != nil {
		l.last.next = h
	} else {
		l.first = h
	}
	l.last = h
	l.n++
}

func (l *hostList) remove(h *host) {
	if h.prev != nil {
		h.prev.next = h.next
	} else {
		l.first = h.next
	}
	if h.next != nil {
		h.next.prev = h.prev
	} else {
		l.last = h.prev
	}
	h.prev, h.next, h.isIdle = nil, nil, false
	l.n--
}

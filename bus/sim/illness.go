package sim

import (
	"fmt"
	"time"

	"fsbus/sched"
)

// illnesses are the ways in which a server may be ill for hours.
var illnesses = []struct {
	name string
	does behaviour
}{
	{"500", broken},
	{"502", gatewayDown},
	{"403 in HTML", blocks},
	{"reset before the body", resetsAtOnce},
	{"reset after the body", resets},
	{"no answer", mute},
	{"certificate ended", expiredCert},
	{"NXDOMAIN", noName},
	{"SERVFAIL", servfail},
	{"429 without a time", limitsAll},
	{"empty 200", strange},
	{"refused", refuses},
	{"no connection", hangs},
}

// wellAgain is how long after a server is well all that is durable must be there: a
// quarter of an hour, or little more than a sixteenth of the outage and an hour.
func wellAgain(ill time.Duration) time.Duration {
	return max(15*time.Minute, min(ill/16, time.Hour)+5*time.Minute)
}

// scheduleIllness has each server be ill in one way, all of them for the same time, and
// checks that what is durable arrives soon after. It returns when that is over.
func (w *World) scheduleIllness() sched.Time {
	o := w.out
	from := w.now.Add(time.Minute)
	to, within := from.Add(o.profile.Ill), wellAgain(o.profile.Ill)
	w.future.Set(from, func() {
		for i, r := range w.remotes {
			r.does, r.connected = illnesses[i%len(illnesses)].does, false
		}
	})
	w.future.Set(to, func() {
		for _, r := range w.remotes {
			r.does = healthy
		}
	})
	w.future.Set(to.Add(within), func() {
		for i, dd := range o.disk.dests {
			for _, it := range append(dd.frozen(), dd.wait...) {
				if it.life == 0 && it.accepted < to {
					q, _ := w.m.QueueStatus(w.now, dd.r.name)
					w.failf("%s was ill (%s) and is well since %s ago, and item %d (%s) is not there: %s, %s", dd.r.name, illnesses[i%len(illnesses)].name, within, it.n, it.kind, q.State, q.Why)
				}
			}
		}
		for _, it := range o.hs.items {
			if it.got > 1 || it.fate == aside && !it.malformed {
				w.failf("item %d (%s) for %s came %d times, and is %s", it.n, it.kind, it.to.name, it.got, it.fate)
			}
		}
		w.Counts[fmt.Sprint("well again after ", o.profile.Ill)]++
	})
	return to.Add(within + time.Minute)
}

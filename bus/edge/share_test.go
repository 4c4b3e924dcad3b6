package edge

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// unknown has a request of a made-up server come from an address, and reports whether its
// key is fetched.
func (r *rig) unknown(i int, peer, net string) (fetched bool) {
	r.t.Helper()
	r.arrive(Arrived{Origin: server("made-up", i), Keys: []string{"ed25519:1"}, Peer: peer, Net: net, Txn: pdus("1")})
	for _, v := range of[Verify](r.last) {
		fetched = fetched || v.MayFetch
	}
	return fetched
}

// However many names few addresses make up, a server that is new and comes from somewhere
// else has its key fetched.
func TestAddressesHaveSharesOfFetches(t *testing.T) {
	for _, tt := range []struct {
		what  string
		peers int
		net   string
		most  int // fetches
	}{
		{"one address", 1, "", 300 / peerPart},
		{"one network", 200, "2001:db8::/48", 300 / netPart},
		{"sixteen addresses", 16, "", 225 - 225/4},
	} {
		r := newRig(t, func(c *Config) { c.KeyFetches, c.NoKey = 300, RefuseNoKey })
		r.verdict = func(q *request) Verdict {
			if strings.HasPrefix(string(q.Origin), "made-up") || !q.fetched {
				return NoKey
			}
			return Good
		}
		fetched := 0
		for i := range 2000 {
			if r.unknown(i, fmt.Sprint("evil", i%tt.peers), tt.net) {
				fetched++
			}
		}
		if fetched > tt.most || fetched < tt.most/2 {
			t.Errorf("%s: %d fetches of 300, want %d at most", tt.what, fetched, tt.most)
		}
		r.arrive(Arrived{Origin: "new.test", Keys: []string{"ed25519:1"}, Peer: "honest", Txn: pdus("2")})
		r.one(tt.what+": a new server's key is fetched, and its transaction goes on", len(of[Forward](r.last)) == 1 || len(of[Look](r.last)) == 1)
		if n := len(r.m.ledger.fetches); n > 300*2 {
			t.Errorf("%s: %d addresses are remembered", tt.what, n)
		}
		r.pass(61 * time.Second)
		r.one("a minute later it has a share again", r.unknown(5000, "evil0", ""))
		if n := len(r.m.ledger.fetches); n > 2 {
			t.Errorf("%s: %d addresses are remembered after a minute", tt.what, n)
		}
	}
}

// What an address was caught forging lowers its share, for a while.
func TestForgingLowersAShare(t *testing.T) {
	r := newRig(t, func(c *Config) { c.KeyFetches, c.NoKey = 300, PassNoKey })
	forged := true
	r.verdict = func(*request) Verdict {
		if forged {
			return Forged
		}
		return NoKey
	}
	for i := range passOffences + 1 {
		r.unknown(i, "evil", "")
	}
	forged = false
	fetched, passed := 0, r.m.stats.Passed
	for i := range 100 {
		if r.unknown(100+i, "evil", "") {
			fetched++
		}
	}
	if want := 300 / peerPart >> (passOffences + 1); fetched != want {
		t.Errorf("%d fetches, want %d", fetched, want)
	}
	r.one("nothing of it is passed on unchecked", r.m.stats.Passed == passed)
	r.unknown(1000, "other", "")
	r.one("another's is", r.m.stats.Passed == passed+1)
	r.pass(offenceFor + time.Second)
	r.unknown(1001, "evil", "")
	r.one("and its own after a while", r.m.stats.Passed == passed+2)

	forged = true
	for i := range 2 * maxOffences {
		r.unknown(2000+i, fmt.Sprint("peer", i), "")
	}
	if n := r.m.ledger.offences.Len(); n != maxOffences || len(r.m.ledger.bad) > maxOffences {
		t.Errorf("%d offences of %d addresses are remembered, %d may be", n, len(r.m.ledger.bad), maxOffences)
	}
}

// What is passed on unchecked waits in one queue, of which an address has a quarter.
func TestAddressesHaveSharesOfWhatIsPassedOn(t *testing.T) {
	r := newRig(t, func(c *Config) { c.KeyFetches, c.NoKey, c.PassRate = 300, PassNoKey, 0.1 })
	r.verdict = func(*request) Verdict { return NoKey }
	for i := range 200 {
		r.unknown(i, "evil", "")
	}
	if n := r.m.ledger.passing["evil"]; n != passQueue/4 {
		t.Errorf("%d requests of one address wait to be passed on, want %d", n, passQueue/4)
	}
	before := r.m.stats.Passed
	r.unknown(1000, "honest", "")
	r.one("another's is taken", r.m.stats.Passed == before+1)
}

// A key that the origin's own server does not have, asked just now, is no key of its.
func TestAKeyThatItsServerDoesNotHave(t *testing.T) {
	r := newRig(t, func(c *Config) { c.NoKey = PassNoKey })
	r.manual = true
	req := r.arrive(Arrived{Origin: "a.test", Keys: []string{"ed25519:bogus"}, Peer: "evil", Txn: pdus("1")})
	r.step(Verified{Req: req, Verdict: NoKey, Text: "no key"})
	r.one("it is fetched", len(of[Verify](r.last)) == 1 && of[Verify](r.last)[0].MayFetch)
	r.step(Verified{Req: req, Verdict: NoKey, Text: "no key", Tried: true, Lacks: true})
	f := of[Refuse](r.last)
	r.one("it is refused as a forged one", len(f) == 1 && f[0].Status == 401 && f[0].Code == matrix.MUnauthorized && strings.Contains(f[0].Text, "does not have the key"))
	r.one("counted, and held against its address", r.m.stats.KeyLacked == 1 && r.m.ledger.bad["evil"] == 1)
}

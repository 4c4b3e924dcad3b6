package node

import (
	"testing"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// What does not fit a key that may be out of date is forged only once somebody was
// asked for a newer one.
func TestEdgeCallsNothingForgedThatItDidNotAskAbout(t *testing.T) {
	r := startEdge(t, "no_key = \"refuse\"", config{})
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, "")
	s, name, id := r.node.edge, r.world.Names()[0], r.world.SigningKey(0).ID()
	s.ring.mu.Lock()
	e := s.ring.known[ringKey{name, id}]
	e.fetched = e.fetched.Add(-2 * trustFor)
	s.ring.known[ringKey{name, id}] = e
	s.ring.mu.Unlock()
	const target = "/_matrix/federation/v1/event/$a"
	x, err := matrix.SignRequest(r.world.SigningKey(1), string(name), "us.test", "GET", target, nil)
	if err != nil {
		t.Fatal(err)
	}
	x.Key = id
	c := &caller{q: &netx.EdgeRequest{Method: "GET", Target: target}, auth: auth{origin: name, signatures: []matrix.XMatrix{x}}}
	for _, tt := range []struct {
		job     verifyJob
		verdict edge.Verdict
		wish    bool
	}{
		{verifyJob{c: c}, edge.NoKey, true},
		{verifyJob{c: c, mayFetch: true}, edge.NoKey, true},
		{verifyJob{c: c, mayFetch: true, over: true}, edge.NoKey, true}, // draining, or too many are asked for
		{verifyJob{c: c, mayFetch: true, over: true, asked: true}, edge.Forged, false},
	} {
		v := s.verify(tt.job)
		if v.Verdict != tt.verdict || v.Tried || (v.wish != nil) != tt.wish {
			t.Errorf("over %t, asked %t: %+v", tt.job.over, tt.job.asked, v)
		}
	}
	if !(verifyJob{c: c, mayFetch: true}).fetches(s.verify(verifyJob{c: c})) {
		t.Error("no newer key is asked for")
	}
	if (verifyJob{c: c, mayFetch: true, over: true}).fetches(s.verify(verifyJob{c: c, over: true})) {
		t.Error("it is asked for again and again")
	}
}

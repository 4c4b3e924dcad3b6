package node

import (
	"fmt"
	"testing"

	"fsbus/bus/matrix"
)

func TestKeyringIsBounded(t *testing.T) {
	k := newKeyring(nil)
	for i := range 2*maxRing + 1 {
		name := matrix.ServerName(fmt.Sprintf("s%d.test", i))
		k.none(name, "ed25519:1", false)
		makeRoom(k.known)
		k.known[ringKey{name, "ed25519:1"}] = ringEntry{}
	}
	if len(k.missing) > maxRing || len(k.known) > maxRing || len(k.missing) < maxRing/2 {
		t.Errorf("%d keys are at hand, %d are missing, %d are allowed", len(k.known), len(k.missing), maxRing)
	}
	last := matrix.ServerName(fmt.Sprintf("s%d.test", 2*maxRing))
	if e, looked, _, err := k.find(last, "ed25519:1"); e.public != nil || !looked || err != nil {
		t.Errorf("a key that could not be had a moment ago: %v, %t, %v", e, looked, err)
	}
	k.none(last, "ed25519:2", true)
	if e, looked, lacks, err := k.find(last, "ed25519:2"); e.public != nil || !looked || !lacks || err != nil {
		t.Errorf("a key that its server does not have: %v, %t, %t, %v", e, looked, lacks, err)
	}
}

// An old key, and one of an object that is out of date, are good for no request.
func TestKeyringKnowsOnlyWhatIsInUse(t *testing.T) {
	r := startEdge(t, "", config{})
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, "")
	name := r.world.Names()[0]
	k := r.node.edge.ring
	e, _, _, err := k.find(name, r.world.SigningKey(0).ID())
	if err != nil || !e.public.Equal(r.world.SigningKey(0).Public()) {
		t.Fatalf("%v, %v", e, err)
	}
	for _, id := range []string{"ed25519:other", ""} {
		if e, _, _, err := k.find(name, id); e.public != nil || err != nil {
			t.Errorf("%q: %v, %v", id, e, err)
		}
	}
	if e, _, _, err := k.find(r.world.Names()[1], r.world.SigningKey(0).ID()); e.public != nil || err != nil {
		t.Errorf("another server's: %v, %v", e, err)
	}
}

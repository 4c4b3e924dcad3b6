package main

import (
	"path/filepath"
	"testing"
	"time"

	"fsbus/scripts/rig"
)

// The attacks for a short time, from sixteen addresses: nothing passes its budget. What
// others notice make hostile measures: the race detector makes this process, which is both
// the attackers and the others, too slow for that.
func TestHostile(t *testing.T) {
	if err := rig.NeedFiles(8000); err != nil {
		t.Fatal(err)
	}
	t.Chdir("../..")
	b := &bench{dir: t.TempDir()}
	binary := filepath.Join(b.dir, "fsbus")
	if err := rig.Build(t.Context(), binary); err != nil {
		t.Fatal(err)
	}
	b.fsbus = []string{binary}
	b.result.begin("hostile")
	// The status page is what is measured with.
	var list []attack
	for _, a := range attacks {
		if a.name != statusAttack {
			list = append(list, a)
		}
	}
	if len(list) != len(attacks)-1 {
		t.Fatal("the attack on the status page has another name")
	}
	if err := b.hostile(t.Context(), siege{each: time.Second, addresses: []int{16}, attacks: list}); err != nil {
		t.Fatal(err)
	}
	if b.result.missed() > 0 {
		t.Errorf("%s%s", b.result.table("hostile"), b.result.bounds())
	}
}

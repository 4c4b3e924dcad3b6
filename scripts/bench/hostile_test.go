package main

import (
	"path/filepath"
	"testing"
	"time"

	"fsbus/scripts/rig"
)

// All attacks for a short time, from sixteen addresses: nothing passes its budget, and
// what is sent in earnest is answered. make hostile measures how soon.
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
	if err := b.hostile(t.Context(), siege{each: time.Second, addresses: []int{16}, patience: 10 * time.Second}); err != nil {
		t.Fatal(err)
	}
	if b.result.missed() > 0 {
		t.Errorf("%s%s", b.result.table("hostile"), b.result.bounds())
	}
}

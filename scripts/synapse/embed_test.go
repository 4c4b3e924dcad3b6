package synapse

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	for range 2 { // also over an older one
		path, err := Install(dir)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, Module) || path != filepath.Join(dir, File) {
			t.Errorf("%s: %d bytes, %v", path, len(got), err)
		}
		if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := Install(filepath.Join(dir, File)); err == nil {
		t.Error("a file is taken for a folder")
	}
	if len(Hash()) != 64 || len(Module) < 10_000 {
		t.Errorf("%s, %d bytes", Hash(), len(Module))
	}
}

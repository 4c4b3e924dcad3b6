package store

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What others could look into is closed, and said.
func TestTheFolderIsClosedToOthers(t *testing.T) {
	for mode, want := range map[os.FileMode]os.FileMode{0o700: 0o700, 0o750: 0o750, 0o755: 0o750, 0o770: 0o750, 0o777: 0o750} {
		dir := filepath.Join(t.TempDir(), "data")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		s := open(t, Options{Path: filepath.Join(dir, "fsbus.db"), Logger: slog.New(slog.NewTextHandler(&log, nil))})
		closeStore(t, s)
		fi, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != want || strings.Contains(log.String(), "open to other users") != (mode != want) {
			t.Errorf("%04o: now %04o, want %04o: %s", mode, fi.Mode().Perm(), want, &log)
		}
	}
}

// A link in the place of a file is not followed.
func TestLinksAreNotFollowed(t *testing.T) {
	for _, name := range []string{"fsbus.db", "fsbus.db.lock"} {
		dir := t.TempDir()
		target := filepath.Join(t.TempDir(), "target")
		if err := os.WriteFile(target, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), Options{Path: filepath.Join(dir, "fsbus.db")})
		if err == nil {
			s.Close(t.Context())
			t.Errorf("%s is followed", name)
		} else if !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if b, err := os.ReadFile(target); err != nil || string(b) != "precious" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fsbus/bus/matrix"
	"fsbus/store"
)

// someStore returns what is in the file of a store of several pages that was
// closed properly.
func someStore(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fsbus.db")
	s, err := store.Open(t.Context(), store.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	var b store.Batch
	for i := range 300 {
		b.Hosts = append(b.Hosts, store.Host{Name: matrix.ServerName(fmt.Sprintf("a%05d.test", i)), SucceededAt: 1})
	}
	done := make(chan error, 1)
	if err := s.Submit(&b, func(err error) { done <- err }); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-done, s.Close(context.Background())); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return good
}

// What lies in a damaged database may be the only copy: fsbus does not start, says
// what to do, and leaves it alone.
func TestADamagedDatabaseIsRefusedAndKept(t *testing.T) {
	good := someStore(t)
	for _, c := range []struct {
		name   string
		damage func([]byte) []byte
	}{
		{"empty", func([]byte) []byte { return nil }},
		{"no database", func([]byte) []byte { return bytes.Repeat([]byte("not a database\n"), 1000) }},
		{"header zeroed", func(b []byte) []byte { clear(b[:512]); return b }},
		{"half of it", func(b []byte) []byte { return b[:len(b)/2] }},
		{"a page is missing", func(b []byte) []byte { return b[:len(b)-4096] }},
		{"half a page is missing", func(b []byte) []byte { return b[:len(b)-2048] }},
		{"the last byte is missing", func(b []byte) []byte { return b[:len(b)-1] }},
		{"a page is zeroed", func(b []byte) []byte { clear(b[len(b)-4096:]); return b }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			config, db := filepath.Join(dir, "fsbus.toml"), filepath.Join(dir, "data", "fsbus.db")
			damaged := c.damage(bytes.Clone(good))
			err := errors.Join(
				os.WriteFile(config, []byte("data_dir = \"data\"\n[homeserver]\nserver_name = \"us.test\"\n[front]\nlisten = [\"unix:front.sock\"]\nsecret = \"a secret for the tests\"\n[status]\nlisten = \"\"\n"), 0o600),
				os.Mkdir(filepath.Dir(db), 0o700),
				os.WriteFile(db, damaged, 0o600),
			)
			if err != nil {
				t.Fatal(err)
			}
			cfg, err := Load(config)
			if err != nil {
				t.Fatal(err)
			}
			_, err = New(t.Context(), cfg, "test", slog.New(slog.DiscardHandler), new(slog.LevelVar))
			if err == nil {
				t.Fatal("it starts")
			}
			for _, want := range []string{db, "damaged database", "restore this file"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("it does not say %q: %v", want, err)
				}
			}
			if after, err := os.ReadFile(db); err != nil || !bytes.Equal(after, damaged) {
				t.Errorf("the file has changed, or is gone: %v", err)
			}
		})
	}
}

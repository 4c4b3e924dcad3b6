package netx

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// newTestSpool makes a spool in a directory of its own.
func newTestSpool(t testing.TB, c SpoolConfig) *Spool {
	t.Helper()
	c.Dir = filepath.Join(t.TempDir(), "spool")
	s, err := NewSpool(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNewSpoolPreparesItsDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spool")
	if _, err := NewSpool(SpoolConfig{Dir: dir, Disk: 1}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// What a crash left goes, everything else stays.
	for _, name := range []string{"body-123", "other", "body-dir/x"} {
		path := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(path), 0o700)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := NewSpool(SpoolConfig{Dir: dir, Disk: 1}); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 || entries[0].Name() != "body-dir" || entries[1].Name() != "other" {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestNewSpoolRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		config SpoolConfig
		want   string
	}{
		"no room":        {SpoolConfig{}, "no room"},
		"no directory":   {SpoolConfig{Disk: 1}, "without a directory"},
		"negative":       {SpoolConfig{Memory: -1, Disk: 1, Dir: t.TempDir()}, "negative"},
		"a file":         {SpoolConfig{Disk: 1, Dir: file}, "not a directory"},
		"missing parent": {SpoolConfig{Disk: 1, Dir: file + "-/x"}, "no such file"},
	} {
		if _, err := NewSpool(test.config); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s, err := NewSpool(SpoolConfig{Memory: 1}); err != nil || s == nil {
		t.Errorf("memory only: %v", err)
	}
}

func TestNewSpoolChecksThatItCanWrite(t *testing.T) {
	fault := errors.New("of the test")
	s := newTestSpool(t, SpoolConfig{Disk: 1})
	s.open = faultyOpen(fault)
	if err := s.prepareDir(); !errors.Is(err, fault) {
		t.Error(err)
	}
}

// faultyFile is a file whose writes fail while fault is set.
type faultyFile struct {
	spoolFile
	fault *error
}

func (f faultyFile) WriteAt(p []byte, off int64) (int, error) {
	if *f.fault != nil {
		n, _ := f.spoolFile.WriteAt(p[:len(p)/2], off) // a full disk takes what it can
		return n, *f.fault
	}
	return f.spoolFile.WriteAt(p, off)
}

func faultyOpen(fault error) func(string) (spoolFile, error) { return faultyOpenVar(&fault) }

func faultyOpenVar(fault *error) func(string) (spoolFile, error) {
	return func(dir string) (spoolFile, error) {
		f, err := openUnlinked(dir)
		return faultyFile{f, fault}, err
	}
}

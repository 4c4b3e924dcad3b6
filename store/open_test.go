package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// openRaw is a connection beside the store's, as an admin's shell would be.
func openRaw(t testing.TB, path string) *conn {
	t.Helper()
	c, err := openConn(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.close() })
	return c
}

// makeRaw creates an SQLite file from a script.
func makeRaw(t testing.TB, path, script string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := openConn(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.exec(t.Context(), script); err != nil {
		t.Fatal(err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
}

// tree returns the files of the store's directory with their contents.
func tree(t testing.TB, path string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(path), e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	delete(files, filepath.Base(path)+".lock")
	return files
}

// wantRefused checks that Open fails with err, says each of the words, and
// leaves every file as it was.
func wantRefused(t *testing.T, path string, err error, words ...string) {
	t.Helper()
	before := tree(t, path)
	s, got := Open(t.Context(), Options{Path: path})
	if got == nil {
		s.Close(context.Background())
		t.Fatal("opened")
	}
	wantErr(t, "Open", got, err)
	for _, w := range append(words, path) {
		if !strings.Contains(got.Error(), w) {
			t.Errorf("%q does not say %q", got, w)
		}
	}
	want(t, "files", tree(t, path), before)
}

func TestAnewStoreIsForItsOwnerOnly(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	put(t, s, up("a.test"))
	for name, mode := range map[string]fs.FileMode{
		filepath.Dir(path): 0o700 | fs.ModeDir, path: 0o600, path + "-wal": 0o600, path + "-shm": 0o600, path + ".lock": 0o600,
	} {
		fi, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		want(t, name, fi.Mode(), mode)
	}
	for pragma, val := range map[string]int64{
		"application_id": applicationID, "user_version": int64(len(migrations)), "page_size": pageSize,
	} {
		got, err := value[int64](t.Context(), openRaw(t, path), "PRAGMA "+pragma)
		if err != nil {
			t.Fatal(err)
		}
		want(t, pragma, got, val)
	}
}

func TestTheWriterSyncsEveryCommit(t *testing.T) {
	path := newPath(t)
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	o := Options{Path: path}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	w, err := openWriter(t.Context(), &o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.conn.close()
	for pragma, val := range map[string]int64{
		"synchronous": 2, "foreign_keys": 1, "temp_store": 2, "cache_size": -2048, "wal_autocheckpoint": 500,
		"journal_size_limit": 4096000, "busy_timeout": 5000,
	} {
		got, err := value[int64](t.Context(), w.conn, "PRAGMA "+pragma)
		if err != nil {
			t.Fatal(err)
		}
		want(t, pragma, got, val)
	}
}

func TestPathsNeedNoEscaping(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b?c#d%20é", "x?mode=memory&y.db")
	s := open(t, Options{Path: path})
	put(t, s, up("a.test"))
	want(t, "hosts", len(load(t, s, 1)), 1)
	closeStore(t, s)
	if fileSize(path) == 0 {
		t.Error("the file is somewhere else")
	}
}

func TestAConnectionCreatesNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fsbus.db")
	c, err := openConn(path)
	if err == nil {
		c.close()
		t.Error("opened what is not there")
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("created")
	}
}

func TestASecondOpenerIsRefused(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	_, err := Open(t.Context(), Options{Path: path})
	wantErr(t, "second Open", err, ErrLocked)
	if pid := fmt.Sprint("process ", os.Getpid()); err == nil || !strings.Contains(err.Error(), pid) {
		t.Errorf("%v does not name %s", err, pid)
	}
	put(t, s, up("a.test"))
	closeStore(t, s)
	put(t, open(t, Options{Path: path}), up("b.test"))
}

func TestAFailedOpenReleasesTheLock(t *testing.T) {
	path := newPath(t)
	_, err := Open(t.Context(), Options{Path: path, Fault: func(Op) error { return errInjected }})
	wantErr(t, "Open", err, errInjected)
	open(t, Options{Path: path})
}

func TestADamagedFileIsRefusedAndKept(t *testing.T) {
	const advice = "restore"
	// A store of some pages, closed, and what is in its file.
	path := newPath(t)
	s := open(t, Options{Path: path})
	var b Batch
	for i := range 300 {
		b.Hosts = append(b.Hosts, down(numbered("a", i)))
	}
	put(t, s, b.Hosts...)
	closeStore(t, s)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(good) < 5*pageSize {
		t.Fatalf("only %d bytes", len(good))
	}
	for _, c := range []struct {
		name   string
		damage func([]byte) []byte
	}{
		{"empty", func([]byte) []byte { return nil }},
		{"header zeroed", func(b []byte) []byte { clear(b[:512]); return b }},
		{"text file", func([]byte) []byte { return bytes.Repeat([]byte("not a database\n"), 100) }},
		{"cut inside the header", func(b []byte) []byte { return b[:50] }},
		{"cut after the first page", func(b []byte) []byte { return b[:pageSize] }},
		{"half of it", func(b []byte) []byte { return b[:len(b)/2] }},
		{"the last byte is missing", func(b []byte) []byte { return b[:len(b)-1] }},
		{"schema destroyed", func(b []byte) []byte { clear(b[100:pageSize]); return b }},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := newPath(t)
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, c.damage(bytes.Clone(good)), 0o600); err != nil {
				t.Fatal(err)
			}
			wantRefused(t, path, ErrCorrupt, advice)
		})
	}
}

// afterCrash copies the files of an open store, as a power cut leaves them,
// to another place.
func afterCrash(t *testing.T, s *Store, skip string) string {
	t.Helper()
	path := newPath(t)
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal"} {
		if suffix == skip {
			continue
		}
		b, err := os.ReadFile(s.opt.Path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path+suffix, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestTheLogIsReadAfterACrash(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, someHosts[0])
	put(t, s, someHosts[1])
	path := afterCrash(t, s, "none")
	var log bytes.Buffer
	s = open(t, Options{Path: path, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	want(t, "hosts", load(t, s, 10), []Host{someHosts[1], someHosts[0]})
	if !strings.Contains(log.String(), "file checked") {
		t.Errorf("log %q does not tell of the check", log.String())
	}
}

func TestATornLogEndsBeforeTheTear(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, someHosts[0])
	size := s.Stats().WALBytes
	put(t, s, someHosts[1])
	for _, tear := range []int64{size + 1, size + 24 + 100, s.Stats().WALBytes - 1} {
		path := afterCrash(t, s, "none")
		if err := os.Truncate(path+"-wal", tear); err != nil {
			t.Fatal(err)
		}
		want(t, "hosts", load(t, open(t, Options{Path: path}), 10), []Host{someHosts[0]})
	}
}

// As a move of the log into the file leaves it that found no space.
func TestAPartOfAPageIsFineBesideTheLog(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	var hosts []Host
	for i := range 300 {
		hosts = append(hosts, down(numbered("a", i)))
	}
	put(t, s, hosts...)
	path := afterCrash(t, s, "none")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, pageSize/2)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	want(t, "hosts", len(load(t, open(t, Options{Path: path}), 1000)), len(hosts))
}

func TestALogWithoutItsFileIsRefused(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, someHosts[0])
	wantRefused(t, afterCrash(t, s, ""), ErrCorrupt, "missing", "-wal")
}

func TestDamageIsFoundAfterAnUncleanShutdown(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	var hosts []Host
	for i := range 300 {
		hosts = append(hosts, down(numbered("a", i)))
	}
	put(t, s, hosts...)
	closeStore(t, s)
	s = open(t, Options{Path: path})
	put(t, s, up("b.test")) // changes the last leaf
	crashed := afterCrash(t, s, "none")
	b, err := os.ReadFile(crashed)
	if err != nil {
		t.Fatal(err)
	}
	// In a row on another leaf the type of a column is now NULL (record
	// format, sqlite.org/fileformat.html 2.1). What Open reads anyway is sound.
	good := []byte("\x0b\x23\x09\x11\x08\x0d\x08\x09\x08\x08\x01a00010.test")
	rotten := bytes.Clone(good)
	rotten[4] = 0 // status
	if !bytes.Contains(b, good) {
		t.Fatal("the row is not there")
	}
	b = bytes.ReplaceAll(b, good, rotten)
	if err := os.WriteFile(crashed, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(t.Context(), Options{Path: crashed}); err == nil {
		s.Close(t.Context())
		t.Error("opened")
	} else {
		wantErr(t, "Open", err, ErrCorrupt)
	}
}

func TestAFileTooLargeToCheckIsOpenedUnchecked(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, someHosts[0])
	closeStore(t, s)
	s = open(t, Options{Path: s.opt.Path})
	put(t, s, someHosts[1])
	path := afterCrash(t, s, "none")
	if err := os.Truncate(path, checkLimit+pageSize); err != nil { // sparse
		t.Fatal(err)
	}
	var log bytes.Buffer
	s = open(t, Options{Path: path, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if !strings.Contains(log.String(), "too large") {
		t.Errorf("log %q does not tell that the check was left out", log.String())
	}
	want(t, "hosts", len(load(t, s, 10)), 2)
}

func TestAnotherProgramsFileIsRefused(t *testing.T) {
	for name, script := range map[string]string{
		"no application id": "CREATE TABLE t (x); INSERT INTO t VALUES (1)",
		"another id":        "PRAGMA application_id = 252006673; CREATE TABLE t (x)", // Fossil's
		"in WAL mode":       "PRAGMA journal_mode = WAL; CREATE TABLE t (x)",
	} {
		t.Run(name, func(t *testing.T) {
			path := newPath(t)
			makeRaw(t, path, script)
			wantRefused(t, path, ErrNotOurs, "data_dir")
		})
	}
}

func TestWhatIsNoFileIsRefused(t *testing.T) {
	path := newPath(t)
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Options{Path: path}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Options{Path: filepath.Join(file, "fsbus.db")}); err == nil {
		t.Error("a file as directory: opened")
	}
	if _, err := Open(t.Context(), Options{Path: filepath.Join(t.TempDir(), "missing", "data", "fsbus.db")}); err == nil {
		t.Error("two missing directories: opened")
	}
}

func TestAnInterruptedCreationIsStartedOver(t *testing.T) {
	path := newPath(t)
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path + ".new", path + ".new-journal"} {
		if err := os.WriteFile(name, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, Options{Path: path})
	put(t, s, up("a.test"))
	closeStore(t, s)
	files := tree(t, path)
	if len(files) != 1 {
		t.Errorf("%d files beside the lock", len(files))
	}
	if id := binary.BigEndian.Uint32([]byte(files["fsbus.db"][68:])); id != applicationID {
		t.Errorf("application id %#x in the file", id)
	}
}

// schema returns the definitions in a file, without differences in layout.
func schema(t *testing.T, path string) string {
	t.Helper()
	list, err := value[string](t.Context(), openRaw(t, path), "SELECT group_concat(type || ' ' || name || ' ' || coalesce(sql, ''), char(10)) "+
		"FROM (SELECT * FROM sqlite_schema ORDER BY name)")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(list), " ")
}

func TestTheFirstSchemaIsStillOpened(t *testing.T) {
	script, err := os.ReadFile("testdata/v1.sql")
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := newPath(t), newPath(t)
	makeRaw(t, old, string(script))
	s := open(t, Options{Path: old})
	want(t, "hosts", load(t, s, 10), []Host{someHosts[1], someHosts[0], someHosts[2]})
	put(t, s, up("new.test"))
	closeStore(t, s)
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, old), schema(t, fresh))
}

func TestANewerSchemaIsRefusedAndKept(t *testing.T) {
	path := newPath(t)
	closeStore(t, open(t, Options{Path: path}))
	c := openRaw(t, path)
	if err := c.exec(t.Context(), fmt.Sprintf("PRAGMA journal_mode = DELETE; PRAGMA user_version = %d", len(migrations)+1)); err != nil {
		t.Fatal(err)
	}
	before := fileSize(path)
	_, err := Open(t.Context(), Options{Path: path})
	wantErr(t, "Open", err, ErrNewerSchema)
	for _, w := range []string{fmt.Sprintf("schema %d", len(migrations)+1), fmt.Sprintf("up to %d", len(migrations)), "run that fsbus again"} {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("%v does not say %q", err, w)
		}
	}
	want(t, "size", fileSize(path), before)
}

func TestMigrationsAreAllOrNothing(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	put(t, s, someHosts...)
	closeStore(t, s)
	c := openRaw(t, path)
	version := func() int64 {
		t.Helper()
		v, err := value[int64](t.Context(), c, "PRAGMA user_version")
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	steps := append(migrations[:len(migrations):len(migrations)],
		"ALTER TABLE host ADD COLUMN colour TEXT NOT NULL DEFAULT 'green'; UPDATE host SET colour = 'red' WHERE failures > 0",
		"DELETE FROM host; CREATE TABLE host (x)",
	)
	first := int64(len(migrations))
	if _, err := migrate(t.Context(), c, path, steps); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("migrate to schema %d", first+2)) {
		t.Errorf("a step that cannot work: %v", err)
	}
	want(t, "version", version(), first+1)
	red, err := value[int64](t.Context(), c, "SELECT count(*) FROM host WHERE colour = 'red'")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "rows kept by the failed step, changed by the one before", red, int64(2))

	steps[first+1] = "DELETE FROM host WHERE colour = 'red'"
	found, err := migrate(t.Context(), c, path, steps)
	if err != nil {
		t.Fatal(err)
	}
	want(t, "found", found, first+1)
	want(t, "version", version(), first+2)
	if _, err := migrate(t.Context(), c, path, steps); err != nil {
		t.Errorf("nothing to do: %v", err)
	}
	_, err = migrate(t.Context(), c, path, migrations)
	wantErr(t, "going back", err, ErrNewerSchema)
}

func TestACancelledLoadEnds(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, someHosts...)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.LoadHosts(ctx, 10)
	wantErr(t, "LoadHosts", err, context.Canceled)
	want(t, "next", len(load(t, s, 10)), 3)
}

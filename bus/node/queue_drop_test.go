package node

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/store"
)

// kept returns the files of dropped items.
func (a *adminTest) kept() (names []string) {
	a.t.Helper()
	entries, err := os.ReadDir(filepath.Join(a.dir, "dropped"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		a.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// lines returns the items in a file of dropped ones.
func (a *adminTest) lines(name string) (list []droppedItem) {
	a.t.Helper()
	f, err := os.Open(filepath.Join(a.dir, "dropped", name))
	if err != nil {
		a.t.Fatal(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Mode() != 0o600 {
		a.t.Errorf("%s has mode %v, %v", name, fi.Mode(), err)
	}
	for s := bufio.NewScanner(f); s.Scan(); {
		var it droppedItem
		if err := json.Unmarshal(s.Bytes(), &it); err != nil {
			a.t.Fatalf("%s: %v", s.Bytes(), err)
		}
		list = append(list, it)
	}
	return list
}

// fillDrop puts two EDUs that are on their way, and two EDUs and a PDU that are
// not, into the queue of a destination.
func (a *adminTest) fillDrop(name matrix.ServerName) {
	a.t.Helper()
	a.accept(name, 3, matrix.KindOther, `{"n":1}`, `{"n":2}`)
	a.do(&store.Pack{Destination: name, NewID: "b1", Now: adminNow.Stored(), Origin: "us.test", MaxBytes: 5000})
	a.accept(name, 2, matrix.KindOther, `{"n":3}`)
	a.accept(name, 1, matrix.KindPresence, `{"n":"<&>\u2028"}`)
	a.accept(name, 1, matrix.KindPDU, `{"n":5}`)
}

const droppedEDUs = `a.test: what would be dropped, and not delivered:

KIND      ITEMS  SIZE
other     1      7 B
presence  1      17 B
all       2      24 B

`

func TestDropAsksAndKeepsACopy(t *testing.T) {
	a := newAdminTest(t)
	a.fillDrop("a.test")
	for _, no := range []string{"", "n\n", "\n", "yesterday\n"} {
		out, _, err := a.answer(no, true, "drop", "a.test", "-edus")
		if err == nil || errors.Is(err, ErrUsage) || err.Error() != "nothing was dropped" || out != droppedEDUs+"drop them? [y/N] " {
			t.Errorf("%q: %v\n%s", no, err, out)
		}
	}
	if n := len(a.pending("a.test")); n != 5 || len(a.kept()) > 0 {
		t.Fatalf("%d items are left of 5", n)
	}

	// Whoever commits finds the copy complete.
	a.before = func(op store.OutboxOp) error {
		d := op.(*store.Drop)
		if names := a.kept(); len(names) != 1 || len(a.lines(names[0])) != 2 || d.PDUs {
			t.Errorf("%+v is about to be done, with the files %v", d, names)
		}
		return nil
	}
	out, _, err := a.answer("Y\n", true, "drop", "-edus", "a.test")
	const file = "a.test-20260304T050607Z.jsonl"
	if want := droppedEDUs + "drop them? [y/N] dropped: 2 items, 24 B\na copy is in " + a.dir + "/dropped/" + file + "\n"; err != nil || out != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, out, want)
	}
	if got := a.pending("a.test"); !slices.Equal(got, []string{`{"n":5}`, `{"n":1}`, `{"n":2}`}) {
		t.Errorf("left are %v", got)
	}
	told := a.heard()
	if len(told) != 1 || told[0].Dest != "a.test" || told[0].Backlog.Total() != 3 || !told[0].Backlog.Frozen {
		t.Errorf("the core was told %+v", told)
	}
	text, err := os.ReadFile(filepath.Join(a.dir, "dropped", file))
	if want := `{"destination":"a.test","id":4,"kind":"other","accepted":"2026-03-04T05:04:07Z","payload":{"n":3}}
{"destination":"a.test","id":5,"kind":"presence","accepted":"2026-03-04T05:05:07Z","payload":{"n":"<&>\u2028"}}
`; err != nil || string(text) != want {
		t.Errorf("%v: %s", err, text)
	}
	if fi, err := os.Stat(filepath.Join(a.dir, "dropped")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}

	a.before = nil
	out, _, err = a.run("drop", "a.test", "-all", "-yes")
	if err != nil || strings.Contains(out, "[y/N]") || !strings.Contains(out, "\ndropped: 3 items, 21 B\n") || !strings.HasSuffix(out, "/a.test-20260304T050607Z-2.jsonl\n") {
		t.Errorf("%v: %s", err, out)
	}
	if got := a.pending("a.test"); len(got) != 0 || len(a.lines("a.test-20260304T050607Z-2.jsonl")) != 3 {
		t.Errorf("left are %v", got)
	}
	a.hosts["a.test"] = a.hosts["quiet.test"]
	a.prints("a.test: there is nothing to drop\n", "drop", "a.test", "-all", "-yes")
	a.fails("nothing is known of nobody.test", "drop", "nobody.test", "-all", "-yes")
	if n := len(a.kept()); n != 2 {
		t.Errorf("%d files for two drops", n)
	}
}

// What comes after the admin was shown what would go does not go.
func TestDropLeavesWhatWasNotShown(t *testing.T) {
	a := newAdminTest(t)
	a.fillDrop("a.test")
	ask := readFunc(func(p []byte) (int, error) {
		a.accept("a.test", 0, matrix.KindOther, `{"n":6}`)
		return copy(p, "y\n"), io.EOF
	})
	var out bytes.Buffer
	err := Queue(t.Context(), Terminal{In: ask, Out: &out, Err: io.Discard, Interactive: true},
		[]string{"drop", "a.test", "-all", "-address", "unix:" + a.socket})
	if err != nil || !strings.Contains(out.String(), "dropped: 5 items") {
		t.Errorf("%v: %s", err, &out)
	}
	if got := a.pending("a.test"); !slices.Equal(got, []string{`{"n":6}`}) {
		t.Errorf("left are %v", got)
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// badFile is a file whose disk is full from some byte on, or that cannot be
// synced or closed.
type badFile struct {
	dropFile
	space        int
	sync, closed error
}

func (f *badFile) Write(p []byte) (int, error) {
	if f.space -= len(p); f.space < 0 {
		return 0, syscall.ENOSPC
	}
	return f.dropFile.Write(p)
}

func (f *badFile) Sync() error  { return errors.Join(f.dropFile.Sync(), f.sync) }
func (f *badFile) Close() error { return errors.Join(f.dropFile.Close(), f.closed) }

// Where no copy can be kept nothing is dropped, and nothing half is left.
func TestDropNothingWithoutACopy(t *testing.T) {
	const large = 1 << 20
	broken := errors.New("broken")
	for _, tt := range []struct {
		name string
		file badFile
		want string
	}{
		{"no space at all", badFile{}, "no space left on device"},
		{"no space for all", badFile{space: 100}, "no space left on device"},
		{"sync", badFile{space: large, sync: broken}, "broken"},
		{"close", badFile{space: large, closed: broken}, "broken"},
	} {
		a := newAdminTest(t)
		a.fillDrop("a.test")
		a.accept("a.test", 1, matrix.KindOther, `{"x":"`+strings.Repeat("x", 50_000)+`"}`) // more than the buffer
		a.server.dropped.create = func(path string) (dropFile, error) {
			f, err := createFile(path)
			tt.file.dropFile = f
			return &tt.file, err
		}
		a.before = func(op store.OutboxOp) error {
			t.Errorf("%s: %v is done", tt.name, op)
			return nil
		}
		a.fails("nothing was dropped, since a copy could not be kept (-nocopy keeps none): ", "drop", "a.test", "-all", "-yes")
		a.fails(tt.want, "drop", "a.test", "-edus", "-yes")
		if n := len(a.pending("a.test")); n != 6 || len(a.kept()) > 0 {
			t.Errorf("%s: %d items are left of 6, and the files %v", tt.name, n, a.kept())
		}
	}
}

// On a full disk things are dropped without a copy, if an admin says so, and with the space
// that is kept for it.
func TestDropOnAFullDisk(t *testing.T) {
	a := newAdminTest(t)
	a.fillDrop("a.test")
	a.server.dropped.create = func(string) (dropFile, error) { return nil, syscall.ENOSPC }
	reserve := filepath.Join(a.dir, "fsbus.db.reserve")
	if err := os.WriteFile(reserve, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tries := 0
	a.before = func(store.OutboxOp) error {
		if tries++; tries == 1 {
			return store.ErrFull
		}
		if _, err := os.Stat(reserve); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the reserve is still there: %v", err)
		}
		return nil
	}
	out, _, err := a.run("drop", "a.test", "-all", "-yes", "-nocopy")
	if err != nil || tries != 2 || len(a.pending("a.test")) > 0 || strings.Contains(out, "a copy is in") || !strings.Contains(out, "dropped: 5 items") {
		t.Errorf("%d tries, %v: %s", tries, err, out)
	}
}

func TestDropFolderIsBounded(t *testing.T) {
	a := newAdminTest(t)
	a.fillDrop("a.test")
	a.accept("b.test", 1, matrix.KindOther, `{"x":"`+strings.Repeat("x", 50_000)+`"}`)
	a.server.dropped.max = 50_300
	if _, _, err := a.run("drop", "b.test", "-all", "-yes"); err != nil {
		t.Fatal(err)
	}
	want := a.kept()
	a.fails("move away what is there", "drop", "a.test", "-all", "-yes")
	if n := len(a.pending("a.test")); n != 5 || !slices.Equal(a.kept(), want) {
		t.Errorf("%d items are left of 5, and the files %v", n, a.kept())
	}
	// What a crash has left half written does not count, and goes.
	leftOver := filepath.Join(a.dir, "dropped", "c.test-20260101T000000Z.jsonl"+partial)
	if err := os.WriteFile(leftOver, make([]byte, 60_000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(a.dir, "dropped", want[0])); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.run("drop", "a.test", "-all", "-yes"); err != nil {
		t.Error(err)
	}
	if got := a.kept(); len(got) != 1 || !strings.HasPrefix(got[0], "a.test-") {
		t.Errorf("the files %v", got)
	}
}

// A commit that fails for certain leaves no copy, one that may have happened does.
func TestDropThatIsNotCommitted(t *testing.T) {
	for _, tt := range []struct {
		err, says string
		with      error
		files     int
	}{
		{"queue full", "nothing was dropped: ", store.ErrQueueFull, 0},
		{"closed", "nothing was dropped: ", store.ErrClosed, 0},
		{"disk", "it is not known whether anything was dropped", store.ErrFull, 1},
	} {
		a := newAdminTest(t)
		a.fillDrop("a.test")
		a.before = func(store.OutboxOp) error { return tt.with }
		a.fails(tt.says, "drop", "a.test", "-all", "-yes")
		if n := len(a.kept()); n != tt.files {
			t.Errorf("%s: %d files are left", tt.err, n)
		}
	}
}

func TestDropFileNamesAreSafe(t *testing.T) {
	a := newAdminTest(t)
	const end = "-20260304T050607Z"
	for name, want := range map[matrix.ServerName]string{
		"example.org":        "example.org" + end,
		"Example.org:8448":   "Example.org_8448" + end,
		"[2001:db8::1]:8448": "_2001_db8__1__8448" + end,
		"../../etc/passwd":   "_._.._etc_passwd" + end,
		"-rf":                "_rf" + end,
		"a\x00b\n\u00e9":     "a_b__" + end,
		matrix.ServerName(strings.Repeat("long.", 1000)): strings.Repeat("long.", 30) + end,
	} {
		got := a.server.dropName(name)
		if got != want || filepath.Base(got) != got {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
	// The time is that of the bus, in UTC.
	if s := adminNow.Std().UTC().Format(time.RFC3339); s != "2026-03-04T05:06:07Z" {
		t.Error(s)
	}
}

package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"fsbus/bus/matrix"
)

// openAs runs Open on a thread that has the file permissions of another user,
// since root may write anywhere.
func openAs(t *testing.T, uid int, o Options) error {
	t.Helper()
	result := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and nobody
		// else gets its identity.
		runtime.LockOSThread()
		if err := syscall.Setfsuid(uid); err != nil {
			result <- err
			return
		}
		_, err := Open(t.Context(), o)
		result <- err
	}()
	return <-result
}

func TestADirectoryThatCannotBeWrittenIsReported(t *testing.T) {
	uid := os.Geteuid()
	if uid == 0 {
		uid = 65534
	}
	// Not t.TempDir, whose parent others may not enter.
	dir, err := os.MkdirTemp("", "fsbus-store")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.Chmod(dir, 0o700)
		os.RemoveAll(dir)
	})
	path := filepath.Join(dir, "fsbus.db")
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "directory", openAs(t, uid, Options{Path: path}), fs.ErrPermission)
	wantErr(t, "directory above", openAs(t, uid, Options{Path: filepath.Join(dir, "data", "fsbus.db")}), fs.ErrPermission)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// newTmpfs mounts a file system of the given size, if that is allowed.
func newTmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	switch err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); {
	case errors.Is(err, fs.ErrPermission):
		t.Skip("may not mount a tmpfs; the disk full of TestAFullDatabaseRefusesAndRecovers has to do")
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fillDisk takes what space is left in dir but for a rest.
func fillDisk(t *testing.T, dir string, rest int64) (name string) {
	t.Helper()
	name = filepath.Join(dir, "ballast")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(0)
	for err == nil {
		var n int
		n, err = f.Write(make([]byte, 4096))
		size += int64(n)
	}
	wantErr(t, "ballast", err, syscall.ENOSPC)
	if err := f.Truncate(max(size-rest, 0)); err != nil {
		t.Fatal(err)
	}
	return name
}

// With a reserve a store opens on a full disk, and what frees space can be stored; the
// reserve is made again when there is room.
func TestAFullDiskAndAReserve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newTmpfs(t, "24m")
		path := filepath.Join(dir, "data", "fsbus.db")
		s := open(t, Options{Path: path, Reserve: true})
		do(t, s, &Accept{Destination: "a.test", Items: []matrix.Item{{Kind: matrix.KindToDevice, Payload: []byte("{}")}}, Accepted: 1})
		if !s.HasReserve() {
			t.Fatal("no reserve is made")
		}
		closeStore(t, s)
		ballast := fillDisk(t, dir, 0)
		s = open(t, Options{Path: path, Reserve: true})
		if s.HasReserve() {
			t.Error("the reserve is not spent, and the disk is full")
		}
		drop := &Drop{Destination: "a.test", PDUs: true, Through: maxSeq}
		if do(t, s, drop); drop.Result.Dropped.Sum().Items != 1 {
			t.Errorf("%+v", drop.Result)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		put(t, s, up("soon.test"))
		if s.HasReserve() {
			t.Error("it is made at once, and again and again on a disk that stays full")
		}
		time.Sleep(reserveEach)
		if !s.HasReserve() {
			t.Error("it is not made again")
		}
		if !s.SpendReserve() || s.HasReserve() || s.SpendReserve() {
			t.Error("it is not spent once")
		}
		closeStore(t, s)
	})
}

func TestAFullDiskRefusesAndRecovers(t *testing.T) {
	dir := newTmpfs(t, "4m")
	path := filepath.Join(dir, "data", "fsbus.db")
	s := open(t, Options{Path: path})
	put(t, s, up("first.test"))
	ballast := fillDisk(t, dir, 256<<10)

	acked := []matrix.ServerName{"first.test"}
	var err error
	for i := 0; err == nil; i++ {
		if i == 1000 {
			t.Fatal("never full")
		}
		h := up(numbered("a", i))
		if err = submit(t, s, &Batch{Hosts: []Host{h}}); err == nil {
			acked = append([]matrix.ServerName{h.Name}, acked...)
		}
	}
	wantErr(t, "full", err, ErrFull)
	wantErr(t, "still full", submit(t, s, &Batch{Hosts: []Host{up("lost.test")}}), ErrFull)
	want(t, "hosts while full", names(load(t, s, 2000)), acked)

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	put(t, s, up("last.test"))
	acked = append([]matrix.ServerName{"last.test"}, acked...)
	closeStore(t, s)
	s = open(t, Options{Path: path})
	want(t, "hosts afterwards", names(load(t, s, 2000)), acked)
	closeStore(t, s)

	// Full from the start: the log's index finds no room, which SQLite
	// reports as an I/O error. The directory holds a probe's remains no more
	// than anything else.
	ballast = fillDisk(t, dir, 0)
	if s, err = Open(t.Context(), Options{Path: path}); err == nil {
		s.Close(t.Context())
		t.Fatal("opened on a full disk")
	}
	wantErr(t, "Open", err, ErrFull)
	if _, err := os.Lstat(path + ".probe"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("probe: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Path: path})
	want(t, "hosts in the end", names(load(t, s, 2000)), acked)
	closeStore(t, s)

	// No room for a new store: nothing half-made is left in its place.
	fillDisk(t, dir, 0)
	other := filepath.Join(dir, "data", "other.db")
	_, err = Open(t.Context(), Options{Path: other})
	wantErr(t, "create", err, ErrFull)
	if _, err := os.Lstat(other); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

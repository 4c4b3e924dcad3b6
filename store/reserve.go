package store

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A full disk takes no byte more, and SQLite needs some to open a file and to delete from
// it. So a file of zeros lies beside the store, which is given up when nothing else helps:
// then the store opens, and what frees space can be done. It is made again once there is
// room. While it is missing, HasReserve says so.
const (
	reserveBytes = 1 << 20
	reserveEach  = time.Minute      // between two attempts to make it
	reserveRoom  = 8 * reserveBytes // that must be free for it
)

func reservePath(path string) string { return path + ".reserve" }

// makeReserve makes the file, unless it is there.
func makeReserve(path string) error {
	name := reservePath(path)
	if fi, err := os.Lstat(name); err == nil && fi.Mode().IsRegular() && fi.Size() == reserveBytes {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &fs); err == nil && int64(fs.Bavail)*int64(fs.Bsize) < reserveRoom {
		return ErrFull
	}
	_ = os.Remove(name) // one that was cut short
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, reserveBytes))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(name) // as good as none
	}
	return err
}

// HasReserve reports whether some space is kept for when the disk is full. It is not if
// the disk is full, or nearly. If it is missing it is made, when there is room again.
func (s *Store) HasReserve() bool {
	if !s.opt.Reserve || s.reserved.Load() {
		return true
	}
	s.reserving.Lock()
	defer s.reserving.Unlock()
	if now := time.Now(); now.Sub(s.reserveTried) >= reserveEach {
		s.reserveTried = now
		s.reserved.Store(makeReserve(s.opt.Path) == nil)
	}
	return s.reserved.Load()
}

// SpendReserve gives up the space that is kept for when the disk is full. It reports
// whether there was some.
func (s *Store) SpendReserve() bool {
	s.reserved.Store(false)
	return os.Remove(reservePath(s.opt.Path)) == nil
}

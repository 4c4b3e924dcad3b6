package store

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// lockFile takes the exclusive lock on the store at path. The lock goes with
// the returned file: closing it, and the end of the process whatever its
// cause, release it.
//
// It is a flock on a file of its own. SQLite's locks are POSIX record locks,
// which a process loses when it closes any descriptor of the database, and
// locking_mode=EXCLUSIVE would shut out the reader connection and an admin's
// read-only look. The lock file is never removed: a process that still waits
// to lock the old one would lock nothing.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store: lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("store: lock %s: %w", f.Name(), err)
		}
		return nil, fmt.Errorf("store: %s: %w (%s); stop it first, or give each its own data_dir", path, ErrLocked, holder(f))
	}
	// The process id is for the message above and for admins only; on a full
	// disk it may be missing.
	if f.Truncate(0) == nil {
		f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

// holder says who wrote the lock file.
func holder(f *os.File) string {
	buf := make([]byte, 32)
	n, _ := f.ReadAt(buf, 0)
	pid, err := strconv.ParseInt(strings.TrimSpace(string(buf[:n])), 10, 64)
	if err != nil {
		return "process unknown"
	}
	return fmt.Sprintf("process %d", pid)
}

package netx

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// Defaults of SpoolConfig.
const (
	defaultInline int64 = 64 << 10 // bytes: nearly every request, and most answers
	defaultFiles        = 256      // descriptors: a quarter of the usual soft limit of 1,024
)

// spoolPrefix begins the name of every file the spool makes. A file has this
// name only between its creation and its unlinking, so one that is found at
// start was left by a crash.
const spoolPrefix = "body-"

// ErrSpoolFull is returned when a body has no room left: neither in memory nor
// on disk, or no further file may be opened, or the disk itself is full. It
// passes: whoever meets it may wait until other bodies are released.
var ErrSpoolFull = errors.New("netx: the spool is full")

// SpoolConfig sets the budgets of a Spool. All sizes are bytes.
type SpoolConfig struct {
	// Dir holds the files. It is made (0700) if it is missing; its parent must
	// exist. Only needed when Disk is not 0. It should not be on a tmpfs, which
	// is memory, nor hold anything else named "body-*".
	Dir string

	// Memory bounds what all bodies together hold in memory, by the capacity
	// of their buffers. 0 sends every body to a file.
	Memory int64

	// Disk bounds what all bodies together hold in files. 0 keeps every body
	// in memory, and so limits each of them to Inline.
	Disk int64

	// Inline is the most that one body may hold in memory before it moves to
	// a file. 0 means 64 KiB.
	Inline int64

	// Files bounds the files that are open at a time. A body on disk costs a
	// descriptor for as long as it lives, because its file has no name to open
	// again; small bodies need one only when Memory is used up. 0 means 256.
	Files int
}

// A Spool holds bodies: in memory while they are small and there is room, else
// in unlinked files. All its methods may be called concurrently.
type Spool struct {
	dir    string
	inline int64
	open   func(dir string) (spoolFile, error) // makes an unlinked file; tests put faults here

	mu    sync.Mutex
	limit SpoolStats // only Memory, Disk and Files
	now   SpoolStats
	freed chan struct{} // closed when something is given back; nil when nobody waits
}

// SpoolStats says what a Spool uses now and the most it has used so far.
type SpoolStats struct {
	Memory, Disk       int64 // bytes
	Files              int
	MaxMemory, MaxDisk int64
	MaxFiles           int
	Full               uint64 // how often ErrSpoolFull was returned
}

// spoolFile is what a body needs of its file. It is an *os.File outside tests.
type spoolFile interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Close() error
}

// NewSpool makes the directory, removes files that a crash left in it, and
// checks that it can be written to.
func NewSpool(c SpoolConfig) (*Spool, error) {
	if c.Inline == 0 {
		c.Inline = defaultInline
	}
	if c.Files == 0 {
		c.Files = defaultFiles
	}
	if c.Disk == 0 {
		c.Files = 0
	}
	switch {
	case c.Memory < 0 || c.Disk < 0 || c.Inline < 0 || c.Files < 0:
		return nil, errors.New("spool: a negative budget")
	case c.Memory == 0 && c.Disk == 0:
		return nil, errors.New("spool: no room in memory and none on disk")
	case c.Disk > 0 && c.Dir == "":
		return nil, errors.New("spool: a disk budget without a directory")
	}
	s := &Spool{
		dir:    c.Dir,
		inline: c.Inline,
		open:   openUnlinked,
		limit:  SpoolStats{Memory: c.Memory, Disk: c.Disk, Files: c.Files},
	}
	if c.Disk > 0 {
		if err := s.prepareDir(); err != nil {
			return nil, fmt.Errorf("spool: %w", err)
		}
	}
	return s, nil
}

func (s *Spool) prepareDir() error {
	if err := os.Mkdir(s.dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if fi, err := os.Lstat(s.dir); err != nil {
		return err
	} else if !fi.IsDir() {
		return fmt.Errorf("%s is not a directory of its own, but %v", s.dir, fi.Mode().Type())
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), spoolPrefix) {
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	f, err := s.open(s.dir)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{0}, 0)
	return errors.Join(err, f.Close())
}

// openUnlinked makes a file that vanishes with its last descriptor, so that a
// killed process leaves nothing behind.
func openUnlinked(dir string) (spoolFile, error) {
	f, err := os.CreateTemp(dir, spoolPrefix)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Stats returns what is used now, and the maxima.
func (s *Spool) Stats() SpoolStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// take reserves all of what is asked for, or nothing.
func (s *Spool) take(memory, disk int64, files int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := &s.now
	if n.Memory+memory > s.limit.Memory || n.Disk+disk > s.limit.Disk || n.Files+files > s.limit.Files {
		return false
	}
	n.Memory += memory
	n.Disk += disk
	n.Files += files
	n.MaxMemory = max(n.MaxMemory, n.Memory)
	n.MaxDisk = max(n.MaxDisk, n.Disk)
	n.MaxFiles = max(n.MaxFiles, n.Files)
	return true
}

// give returns what take reserved, and wakes those who wait for room.
func (s *Spool) give(memory, disk int64, files int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := &s.now
	n.Memory -= memory
	n.Disk -= disk
	n.Files -= files
	if n.Memory < 0 || n.Disk < 0 || n.Files < 0 {
		panic(fmt.Sprintf("netx: the spool got back more than it gave: memory %d, disk %d, files %d", n.Memory, n.Disk, n.Files))
	}
	if s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
}

// full counts a refusal and returns ErrSpoolFull.
func (s *Spool) full() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.Full++
	return ErrSpoolFull
}

// room returns a channel that is closed when something is given back after
// this call. Fetch it before the attempt that may fail, so that nothing that
// happens in between is missed.
func (s *Spool) room() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freed == nil {
		s.freed = make(chan struct{})
	}
	return s.freed
}

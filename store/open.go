package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

const (
	// pageSize is the block size of file systems and a multiple of what SD
	// cards write at once, so a page is never half in two blocks.
	pageSize = 4096
	// busyTimeout is how long to wait for a lock of another program, say an
	// admin's shell. Nobody of ours ever holds the writer up.
	busyTimeout = 5 * time.Second
	// checkpointPages is how long the log gets before it is moved into the
	// main file: 2 MiB. It bounds the time that Open needs after a crash and
	// keeps the log's index in one 32 KiB segment (4,062 frames).
	checkpointPages = 500
	// walLimit is what is left of a log that got longer, because of a large
	// group or because somebody was reading, once it starts over.
	walLimit = 2 * checkpointPages * pageSize
	// checkLimit is up to which size a file is read through at Open if the
	// last shutdown was not clean. Checking takes 2 ms for a MiB, reading it
	// from a slow SD card 50 ms: about 3 s for this much.
	checkLimit = 64 << 20
)

// Open opens the store, creating it if there is none, and starts its writer.
// Errors: ErrLocked, ErrNotOurs, ErrCorrupt, ErrNewerSchema, ErrOtherServer,
// ErrFull, and what the file system says. None of them changes what is stored.
func Open(ctx context.Context, opt Options) (*Store, error) {
	if err := opt.check(); err != nil {
		return nil, err
	}
	if err := makeDir(filepath.Dir(opt.Path), opt.Logger); err != nil {
		return nil, err
	}
	lock, err := lockFile(opt.Path)
	if err != nil {
		return nil, err
	}
	w, err := openWriter(ctx, &opt)
	spent := errors.Is(err, ErrFull) && os.Remove(reservePath(opt.Path)) == nil
	if spent {
		opt.Logger.Error("the disk is full: the store opens on what it has kept for that; free some space", "path", opt.Path, "error", err)
		w, err = openWriter(ctx, &opt)
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	s := &Store{
		opt: opt, lock: lock, writer: w,
		queue:   newQueue(opt.QueueLen, opt.QueueBytes),
		stopped: make(chan struct{}),
	}
	s.counters.set(w.totals())
	s.reserveTried = time.Now()
	s.reserved.Store(opt.Reserve && !spent && makeReserve(opt.Path) == nil)
	s.start()
	return s, nil
}

// makeDir creates the directory, for the owner only, if it is missing. One that others
// can look into, or the group can write to, is closed to them: it holds messages.
func makeDir(dir string, log *slog.Logger) error {
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		return syncDir(filepath.Dir(dir))
	case !errors.Is(err, fs.ErrExist):
		return fmt.Errorf("store: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer d.Close()
	fi, err := d.Stat()
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	const open = 0o027
	mode := fi.Mode().Perm()
	if !fi.IsDir() || mode&open == 0 {
		return nil // what is no directory is found out below
	}
	if err := d.Chmod(mode &^ open); err != nil {
		return fmt.Errorf("store: %s has mode %04o, so that other users can read or change what fsbus keeps: chown it to the user who runs fsbus, or chmod %04o %s (%w)", dir, mode, mode&^open, dir, err)
	}
	log.Warn("data_dir was open to other users, and is not any more", "path", dir, "mode", fmt.Sprintf("%04o", mode), "now", fmt.Sprintf("%04o", mode&^open))
	return nil
}

// syncDir makes entries of dir durable: a file that was fsynced can still
// lose its name in a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("store: sync directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("store: sync directory: %w", err)
	}
	return nil
}

// openWriter opens the file at o.Path, which is locked, for writing.
func openWriter(ctx context.Context, o *Options) (*writer, error) {
	switch _, err := os.Lstat(o.Path); {
	case errors.Is(err, fs.ErrNotExist):
		if err := create(ctx, o.Path); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := inspect(o.Path); err != nil {
		return nil, err
	}
	// A clean close leaves no log behind.
	unclean := fileSize(o.Path+"-wal") > 0

	if err := o.Fault(OpOpen); err != nil {
		return nil, classify(string(OpOpen), o.Path, err)
	}
	c, err := openConn(o.Path)
	if err != nil {
		return nil, classify("open", o.Path, err)
	}
	w, err := prepareWriter(ctx, c, o, unclean)
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	return w, nil
}

// prepareWriter checks and configures a new connection.
func prepareWriter(ctx context.Context, c *conn, o *Options, unclean bool) (*writer, error) {
	if err := configure(ctx, c, o); err != nil {
		return nil, classify("configure", o.Path, err)
	}
	if unclean {
		if err := quickCheck(ctx, c, o); err != nil {
			return nil, err
		}
	}
	found, err := migrate(ctx, c, o.Path, migrations)
	if err != nil {
		return nil, err
	}
	if now := len(migrations); found < int64(now) {
		o.Logger.Info("store migrated", "path", o.Path, "from", found, "to", now)
	}
	w, err := newWriter(ctx, c, o)
	if err != nil {
		return nil, classify("read", o.Path, err)
	}
	if err := claim(ctx, c, o); err != nil {
		return nil, err
	}
	return w, nil
}

// configure sets the pragmas that hold for this connection, and makes sure of
// those that durability rests on: SQLite answers with the old value where it
// cannot do what it is told, as on a file system without shared memory.
func configure(ctx context.Context, c *conn, o *Options) error {
	// temp_store: a sort must not need a writable /var/tmp, or space there.
	err := c.exec(ctx, fmt.Sprintf("PRAGMA busy_timeout = %d; PRAGMA cache_size = -%d; PRAGMA temp_store = MEMORY; "+
		"PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = %d; PRAGMA journal_size_limit = %d",
		busyTimeout.Milliseconds(), max(o.CacheBytes>>10, 1), checkpointPages, walLimit))
	if err != nil {
		return err
	}
	mode, err := value[string](ctx, c, "PRAGMA journal_mode = WAL")
	if err != nil {
		return err
	}
	level, err := value[int64](ctx, c, "PRAGMA synchronous")
	if err != nil {
		return err
	}
	const full = 2
	if mode != "wal" || level != full {
		return fmt.Errorf("SQLite refuses WAL with full sync here (journal_mode %s, synchronous %d); "+
			"use a local file system", mode, level)
	}
	return nil
}

// quickCheck reads the file through after an unclean shutdown.
func quickCheck(ctx context.Context, c *conn, o *Options) error {
	if size := fileSize(o.Path); size > checkLimit {
		o.Logger.Warn("the last shutdown was not clean; file too large to check at start", "path", o.Path, "bytes", size)
		return nil
	}
	began := time.Now()
	verdict, err := value[string](ctx, c, "PRAGMA quick_check(1)")
	if err != nil {
		return classify("check", o.Path, err)
	}
	if verdict != "ok" {
		return corrupt(o.Path, errors.New(verdict))
	}
	o.Logger.Info("the last shutdown was not clean; file checked", "path", o.Path, "took", time.Since(began))
	return nil
}

// create makes an empty store under another name and renames it, so that a
// file named path is always whole: if it has no valid header it is damaged,
// not half-made.
func create(ctx context.Context, path string) error {
	// A log without its database: somebody has removed, or not yet restored,
	// one of the two, and SQLite would throw the other away.
	for _, suffix := range []string{"-wal", "-journal"} {
		if fileSize(path+suffix) > 0 {
			return corrupt(path, fmt.Errorf("the file is missing, its %s is there", suffix))
		}
	}
	tmp := path + ".new"
	for _, suffix := range []string{"", "-journal", "-wal", "-shm"} { // of an attempt that was cut off
		if err := os.Remove(tmp + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("store: create: %w", err)
		}
	}
	if err := build(ctx, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("store: create: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

// build writes an empty store at path, first in SQLite's rollback mode, so that
// all of it is in the one file, and then marks that file for WAL mode.
func build(ctx context.Context, path string) error {
	// SQLite would create the file readable for others.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("store: create: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("store: create: %w", err)
	}
	c, err := openConn(path)
	if err != nil {
		return classify("create", path, err)
	}
	err = c.exec(ctx, fmt.Sprintf("PRAGMA synchronous = FULL; PRAGMA page_size = %d; PRAGMA application_id = %d",
		pageSize, applicationID))
	if err != nil {
		err = classify("create", path, err)
	} else {
		_, err = migrate(ctx, c, path, migrations)
	}
	if err == nil {
		if err = c.exec(ctx, "PRAGMA journal_mode = WAL"); err != nil {
			err = classify("create", path, err)
		}
	}
	return errors.Join(err, c.close())
}

// inspect looks at the header before SQLite does: SQLite would treat an empty
// file as a new database and would change another program's. It must not run
// while this process has the file open in SQLite (closing a descriptor drops
// the process's record locks); the lock file sees to that.
func inspect(path string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if !fi.Mode().IsRegular() { // a link may lead to what others own
		return fmt.Errorf("store: %s: not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer f.Close()
	const (
		magic      = "SQLite format 3\x00" // sqlite.org/fileformat.html 1.3.1
		sizeOffset = 16                    // page size, big-endian, 1 for 65536, 1.3.2
		idOffset   = 68                    // application id, big-endian, 1.3.14
	)
	header := make([]byte, 100)
	switch _, err := io.ReadFull(f, header); {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return corrupt(path, fmt.Errorf("%d bytes, too short for a database", fi.Size()))
	case err != nil:
		return fmt.Errorf("store: %w", err)
	}
	if string(header[:len(magic)]) != magic {
		return corrupt(path, errors.New("no SQLite header"))
	}
	if id := binary.BigEndian.Uint32(header[idOffset:]); id != applicationID {
		return notOurs(path, id)
	}
	// SQLite takes what is missing of the last page for zeros. A move of the log
	// that found no space may leave a part of a page, but then the log is there.
	page := int64(binary.BigEndian.Uint16(header[sizeOffset:]))
	if page == 1 {
		page = 1 << 16
	}
	if page > 0 && fi.Size()%page != 0 && fileSize(path+"-wal") == 0 {
		return corrupt(path, fmt.Errorf("%d bytes, the last page of %d is cut off", fi.Size(), page))
	}
	return nil
}

package store

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"fsbus/bus/matrix"
)

// The errors that callers branch on. What the store returns wraps one of them,
// or none where no caller could do better than to refuse and report.
var (
	// ErrFull: the disk, or the quota, is full. Nothing of the batch was
	// stored. The store works again as soon as there is space.
	ErrFull = errors.New("disk full")
	// ErrInvalid: the content of this batch cannot be stored, now or later.
	// Batches beside it are not affected.
	ErrInvalid = errors.New("invalid row")
	// ErrOutboxFull: the outbox, or this destination's part of it, is at one of
	// its bounds. Nothing of the batch was stored. Batches beside it are not
	// affected.
	ErrOutboxFull = errors.New("outbox full")
	// ErrClosed: Close was called before.
	ErrClosed = errors.New("store: closed")
	// ErrQueueFull: as many batches or bytes wait as Options allows.
	ErrQueueFull = errors.New("store: queue full")
	// ErrTooLarge: the batch alone is larger than the whole queue may be.
	ErrTooLarge = errors.New("store: batch larger than the queue")
	// ErrLocked: another process, or another Store, has the file open.
	ErrLocked = errors.New("in use by another fsbus")
	// ErrNewerSchema: a newer fsbus has written the file.
	ErrNewerSchema = errors.New("written by a newer fsbus")
	// ErrCorrupt: the file is damaged.
	ErrCorrupt = errors.New("damaged database")
	// ErrDamagedRow: SQLite reads the file, but a row that this batch needs cannot be
	// as it was written. Nothing of the batch was stored. Batches beside it are not
	// affected. It wraps ErrCorrupt.
	ErrDamagedRow = fmt.Errorf("%w, in one row", ErrCorrupt)
	// ErrOtherServer: the database is that of another homeserver, for which
	// something is still to be sent.
	ErrOtherServer = errors.New("database of another homeserver")
	// ErrNotOurs: the file is an SQLite database of another program.
	ErrNotOurs = errors.New("not an fsbus database")
)

// classify gives an error of SQLite or of the file system its class, and says
// in which operation on which file it came up. An error that wraps a class
// already is left with that.
func classify(op, path string, err error) error {
	switch class := classOf(path, err); class {
	case nil:
		return fmt.Errorf("store: %s: %s: %w", path, op, err)
	case ErrCorrupt:
		return corrupt(path, fmt.Errorf("%s: %w", op, err))
	default:
		return fmt.Errorf("store: %s: %s: %w: %w", path, op, class, err)
	}
}

// refused tells whether err is about the one batch that it came up in, which can
// then be taken back alone.
func refused(err error) bool {
	return errors.Is(err, ErrInvalid) || errors.Is(err, ErrOutboxFull) || errors.Is(err, ErrDamagedRow)
}

// classOf returns the sentinel that err belongs to, nil if to none.
func classOf(path string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return ErrFull
	}
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return nil
	}
	// The low byte of an extended code is the primary one (sqlite.org/rescode.html).
	switch se.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return ErrFull
	case sqlite3.SQLITE_IOERR:
		// SQLite says FULL only where a write came back with ENOSPC. A quota,
		// and an fsync or a shared-memory file that finds no space, end here,
		// and the driver keeps errno to itself.
		if noSpace(path) {
			return ErrFull
		}
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return ErrCorrupt
	case sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE:
		return ErrInvalid
	}
	return nil
}

// probeBytes is what noSpace tries to write: as much as SQLite ever adds to a
// file in one call (a segment of the -shm file).
const probeBytes = 32 << 10

// noSpace reports whether a small file beside path cannot be written for lack
// of space.
func noSpace(path string) bool {
	name := path + ".probe"
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err == nil {
		_, err = f.Write(make([]byte, probeBytes))
		err = errors.Join(err, f.Sync(), f.Close(), os.Remove(name))
	}
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// The next ones tell an admin what to do. Nothing is ever deleted or replaced
// on its own: what lies in the file may be the only copy.

func corrupt(path string, why error) error {
	return fmt.Errorf("store: %s: %w: %w; stop fsbus and restore this file and its -wal from one backup, "+
		"or move both away (keep them: `sqlite3 FILE .recover` may save rows) to start with an empty store", path, ErrCorrupt, why)
}

func notOurs(path string, id uint32) error {
	return fmt.Errorf("store: %s: %w (application id %#08x, want %#08x); point data_dir at a directory of its own, "+
		"or move that file away", path, ErrNotOurs, id, uint32(applicationID))
}

func otherServer(path, stored string, name matrix.ServerName) error {
	return fmt.Errorf("store: %s: %w: it is of %s, and what is pending in it would be sent in the name of %s; "+
		"run fsbus with server_name %s until it is delivered or dropped, or point data_dir at another directory",
		path, ErrOtherServer, stored, name, stored)
}

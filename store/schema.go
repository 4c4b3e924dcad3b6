package store

import (
	"context"
	"fmt"
)

// applicationID marks the file as the store of fsbus ("fsbu"), in the header
// field that SQLite keeps for it (sqlite.org/fileformat.html 1.3.14).
const applicationID = 0x66736275

// migrations build the schema: number n leads from schema n to n+1, and the
// schema of a file is its user_version. Entries are only ever appended; the
// ones before have been run on admins' machines. Constraints are checked at
// once, never DEFERRABLE INITIALLY DEFERRED: an error that comes up at COMMIT
// belongs to no batch, and so would fail a whole group.
var migrations = []string{
	// 1: back-off state. Times are wall-clock milliseconds. touched counts
	// writes and says which rows are old: a board without a battery-backed
	// clock may come up in the past, so no row is judged by a time. WITHOUT
	// ROWID because every access is by name.
	`CREATE TABLE host (
		name          TEXT    NOT NULL PRIMARY KEY,
		failures      INTEGER NOT NULL,
		failure       TEXT    NOT NULL,
		status        INTEGER NOT NULL,
		error         TEXT    NOT NULL,
		failing_since INTEGER NOT NULL,
		failed_at     INTEGER NOT NULL,
		retry_at      INTEGER NOT NULL,
		succeeded_at  INTEGER NOT NULL,
		touched       INTEGER NOT NULL
	) STRICT, WITHOUT ROWID;`,
}

// migrate brings the file to schema len(steps), one transaction for each step,
// so that a crash or an error leaves it at a schema that is whole. It returns
// the schema it found.
func migrate(ctx context.Context, c *conn, path string, steps []string) (int64, error) {
	found, err := value[int64](ctx, c, "PRAGMA user_version")
	if err != nil {
		return 0, classify("read schema version", path, err)
	}
	if found > int64(len(steps)) {
		return found, fmt.Errorf("store: %s: %w (schema %d, this one knows up to %d); "+
			"run that fsbus again, or restore the backup from before the upgrade", path, ErrNewerSchema, found, len(steps))
	}
	for v := found; v < int64(len(steps)); v++ {
		err := c.exec(ctx, fmt.Sprintf("BEGIN IMMEDIATE; %s; PRAGMA user_version = %d; COMMIT", steps[v], v+1))
		if err != nil {
			c.exec(context.Background(), "ROLLBACK") // fails where SQLite has done it already
			return found, classify(fmt.Sprintf("migrate to schema %d", v+1), path, err)
		}
	}
	return found, nil
}

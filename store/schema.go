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

	// 2: the outbox.
	//
	// dest has a row for each destination that has something pending, and for
	// those that had lately, for the sake of txn. What an accepted transaction
	// changes here are a few bytes of one row: totals are kept, not counted.
	//
	// item is clustered by destination, lane and order, WITHOUT ROWID: what is
	// accepted for a destination, packed and deleted lies side by side, on one
	// page where the queue is short, and no second tree holds the rows. A batch
	// is the front of each lane, so that freezing it is a change to dest
	// (frozen) and none to its items. item_key finds what a new item replaces,
	// and is clustered in the same way. It has no entry for what never merges.
	//
	// Small payloads lie in the item. Others are in body, once for all
	// destinations, by a hash: payload is apart from body so that to count a
	// reference writes a row of 30 bytes, and body is in order of insertion, so
	// that a new one goes to the page that was written last. The triggers keep
	// refs, for whatever deletes an item, and an admin's shell is no exception.
	// A body has the number of the item that it came with.
	`CREATE TABLE dest (
		id      INTEGER PRIMARY KEY,
		name    TEXT    NOT NULL UNIQUE,
		txn     TEXT    NOT NULL,
		touched INTEGER NOT NULL,
		items   INTEGER NOT NULL,
		oldest  INTEGER NOT NULL,
		held    INTEGER NOT NULL,
		kinds   BLOB    NOT NULL,
		frozen  TEXT    NOT NULL
	) STRICT;
	CREATE TABLE payload (
		hash BLOB    NOT NULL PRIMARY KEY,
		body INTEGER NOT NULL,
		refs INTEGER NOT NULL
	) STRICT, WITHOUT ROWID;
	CREATE TABLE body (
		id    INTEGER PRIMARY KEY,
		bytes BLOB    NOT NULL
	) STRICT;
	CREATE TABLE item (
		dest     INTEGER NOT NULL,
		lane     INTEGER NOT NULL,
		seq      INTEGER NOT NULL,
		kind     INTEGER NOT NULL,
		accepted INTEGER NOT NULL,
		lifetime INTEGER NOT NULL,
		depth    INTEGER NOT NULL,
		size     INTEGER NOT NULL,
		key      BLOB,
		hash     BLOB,
		bytes    BLOB,
		PRIMARY KEY (dest, lane, seq)
	) STRICT, WITHOUT ROWID;
	CREATE INDEX item_key ON item (dest, kind, key) WHERE key IS NOT NULL;
	CREATE TRIGGER item_inserted AFTER INSERT ON item WHEN new.hash IS NOT NULL BEGIN
		INSERT INTO payload VALUES (new.hash, new.seq, 1) ON CONFLICT DO UPDATE SET refs = refs + 1;
	END;
	CREATE TRIGGER item_deleted AFTER DELETE ON item WHEN old.hash IS NOT NULL BEGIN
		UPDATE payload SET refs = refs - 1 WHERE hash = old.hash;
		DELETE FROM body WHERE id = (SELECT body FROM payload WHERE hash = old.hash AND refs = 0);
		DELETE FROM payload WHERE hash = old.hash AND refs = 0;
	END;
	CREATE TABLE aside (
		id       INTEGER PRIMARY KEY,
		dest     TEXT    NOT NULL,
		kind     INTEGER NOT NULL,
		accepted INTEGER NOT NULL,
		at       INTEGER NOT NULL,
		reason   TEXT    NOT NULL,
		size     INTEGER NOT NULL,
		bytes    BLOB    NOT NULL
	) STRICT;`,

	// 3: answers and keys of other servers. Both can be had again, have a few
	// hundred bytes to 2 KB, are written in bulk and read by key.
	//
	// So id is both the place and the age: a row that is written, again or for the
	// first time, goes to the end. What one batch brings lies side by side on the
	// pages at the end, and what is deleted for a bound on those at the beginning,
	// which become free. No index is needed to know what is old. Of 10,000 answers of
	// 450 bytes, to write 200 new ones and to delete as many writes 105 pages, and
	// 535 if they are clustered by key, WITHOUT ROWID; to replace 200 at random
	// places 287 and 404. The price is room: up to half of it is idle where such
	// replacing goes on.
	//
	// The index is what is written at random places. Hence it has 64 bits instead of
	// a key, so that it has 54 pages for those 10,000, and the size, so that the
	// totals are known without reading the table. Two keys may have the same hash:
	// the row has the key. The blobs stand last, as what is behind a long one is
	// read through its pages.
	`CREATE TABLE answer (
		id     INTEGER PRIMARY KEY,
		hash   INTEGER NOT NULL,
		key    BLOB    NOT NULL,
		size   INTEGER NOT NULL,
		stored INTEGER NOT NULL,
		fresh  INTEGER NOT NULL,
		stale  INTEGER NOT NULL,
		status INTEGER NOT NULL,
		header BLOB    NOT NULL,
		body   BLOB    NOT NULL
	) STRICT;
	CREATE INDEX answer_hash ON answer (hash, size);
	CREATE TABLE server_key (
		id          INTEGER PRIMARY KEY,
		hash        INTEGER NOT NULL,
		via         TEXT    NOT NULL,
		server      TEXT    NOT NULL,
		size        INTEGER NOT NULL,
		fetched     INTEGER NOT NULL,
		valid_until INTEGER NOT NULL,
		object      BLOB    NOT NULL
	) STRICT;
	CREATE INDEX server_key_hash ON server_key (hash, size);`,

	// 4: transactions of other servers that were answered. One comes with nearly each
	// commit, alone or with a few others, and is never read if all goes well. What
	// counts is how many pages a commit has in the log, and how many of those that it
	// changes no other commit before the next checkpoint changes as well.
	//
	// So a row is appended, as in answer, and holds what is kept of the PDUs. And both
	// ways to find it, by the transaction and by a PDU, have the generation first,
	// which is the id without its last bits (inboundGen): the hashes of what is written
	// now are at random places of 25 pages, and of 20 for each PDU that a transaction
	// has on the average, and not of twelve times as many. The oldest rows go together,
	// and their entries lie together, too. The price is that a look-up looks into each
	// generation, 13 for 50,000 rows.
	//
	// The index has the numbers that the totals are made of, so that they are known
	// without reading the table. inbound_pdu has no keys: they are in the list. An
	// entry whose row is gone is of no use, and does no harm.
	`CREATE TABLE inbound (
		id       INTEGER PRIMARY KEY,
		hash     INTEGER NOT NULL,
		key      BLOB    NOT NULL,
		size     INTEGER NOT NULL,
		pdus     INTEGER NOT NULL,
		answered INTEGER NOT NULL,
		list     BLOB    NOT NULL,
		answer   BLOB    NOT NULL
	) STRICT;
	CREATE INDEX inbound_find ON inbound (id >> 12, hash, size, pdus);
	CREATE TABLE inbound_pdu (
		gen  INTEGER NOT NULL,
		hash INTEGER NOT NULL,
		txn  INTEGER NOT NULL,
		PRIMARY KEY (gen, hash, txn)
	) STRICT, WITHOUT ROWID;`,

	// 5: what holds for the whole database. So far that is server_name, the name of
	// the homeserver that it belongs to: the outbox has items without their origin,
	// which is written when they are packed. There is no row until a name is known.
	`CREATE TABLE meta (
		name  TEXT NOT NULL PRIMARY KEY,
		value TEXT NOT NULL
	) STRICT, WITHOUT ROWID;`,

	// 6: what tells the body of an inbound transaction from another under its id; 0
	// where that is not known. SQLite changes no row for it, but it looks at each, and
	// would refuse all for one that is damaged, which is as good as none.
	`DELETE FROM inbound WHERE typeof(hash) <> 'integer' OR typeof(key) <> 'blob' OR typeof(size) <> 'integer' OR typeof(pdus) <> 'integer'
		OR typeof(answered) <> 'integer' OR typeof(list) <> 'blob' OR typeof(answer) <> 'blob';
	ALTER TABLE inbound ADD COLUMN sum INTEGER NOT NULL DEFAULT 0;`,
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

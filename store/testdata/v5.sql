-- Schema 5 as the first fsbus that knows whose database it is wrote it. DO NOT EDIT, see
-- v1.sql.
PRAGMA application_id = 1718837877;
CREATE TABLE host (
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
	) STRICT, WITHOUT ROWID;
CREATE TABLE dest (
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
CREATE TABLE aside (
		id       INTEGER PRIMARY KEY,
		dest     TEXT    NOT NULL,
		kind     INTEGER NOT NULL,
		accepted INTEGER NOT NULL,
		at       INTEGER NOT NULL,
		reason   TEXT    NOT NULL,
		size     INTEGER NOT NULL,
		bytes    BLOB    NOT NULL
	) STRICT;
CREATE TABLE answer (
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
CREATE INDEX server_key_hash ON server_key (hash, size);
CREATE TABLE inbound (
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
	) STRICT, WITHOUT ROWID;
CREATE TRIGGER item_inserted AFTER INSERT ON item WHEN new.hash IS NOT NULL BEGIN
		INSERT INTO payload VALUES (new.hash, new.seq, 1) ON CONFLICT DO UPDATE SET refs = refs + 1;
	END;
CREATE TRIGGER item_deleted AFTER DELETE ON item WHEN old.hash IS NOT NULL BEGIN
		UPDATE payload SET refs = refs - 1 WHERE hash = old.hash;
		DELETE FROM body WHERE id = (SELECT body FROM payload WHERE hash = old.hash AND refs = 0);
		DELETE FROM payload WHERE hash = old.hash AND refs = 0;
	END;
INSERT INTO host VALUES ('down.example.org', 7, 'no_such_name', 0, 'lookup down.example.org: no such host', 1763700000001, 1763703600002, 1763707200003, 0, 1);
INSERT INTO host VALUES ('limited.example.org', 1, 'ok', 429, 'M_LIMIT_EXCEEDED', 1763700000005, 1763700000005, 1763700060006, 1763699999007, 2);
INSERT INTO host VALUES ('up.example.org:8448', 0, 'ok', 0, '', 0, 0, 0, 1763700000004, 3);
INSERT INTO inbound VALUES (1, -2302994585048228368, x'e00a1ea06e8d5df077c5cc6f2168bb5c', 20, 0, 1763700000000, x'', x'312c312c312c312c312c312c312c312c312c312c');
INSERT INTO inbound VALUES (2, 6117131970974446921, x'54e46b1e1e1df54925ea29239d88b1d5', 61, 1, 1763700000000, x'd2a506aa609db234ea0e05543f1dfd4b0424322d30', x'322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c');
INSERT INTO inbound_pdu VALUES (0, -3268198625752272332, 2);
CREATE TABLE meta (
		name  TEXT NOT NULL PRIMARY KEY,
		value TEXT NOT NULL
	) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES('server_name','hs1.test');
PRAGMA user_version = 5;

-- Schema 3 as the first fsbus with caches wrote it, with rows of these. DO NOT EDIT, see
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
CREATE TRIGGER item_inserted AFTER INSERT ON item WHEN new.hash IS NOT NULL BEGIN
		INSERT INTO payload VALUES (new.hash, new.seq, 1) ON CONFLICT DO UPDATE SET refs = refs + 1;
	END;
CREATE TRIGGER item_deleted AFTER DELETE ON item WHEN old.hash IS NOT NULL BEGIN
		UPDATE payload SET refs = refs - 1 WHERE hash = old.hash;
		DELETE FROM body WHERE id = (SELECT body FROM payload WHERE hash = old.hash AND refs = 0);
		DELETE FROM payload WHERE hash = old.hash AND refs = 0;
	END;
INSERT INTO host VALUES ('down.example.org', 7, 'no_such_name', 0, 'lookup down.example.org: no such host', 1763700000001, 1763703600002, 1763707200003, 0, 2);
INSERT INTO host VALUES ('limited.example.org', 1, 'ok', 429, 'M_LIMIT_EXCEEDED', 1763700000005, 1763700000005, 1763700060006, 1763699999007, 3);
INSERT INTO host VALUES ('up.example.org:8448', 0, 'ok', 0, '', 0, 0, 0, 1763700000004, 1);
INSERT INTO answer VALUES (1, 7823993051012782648, x'6c94683a02bdda38721278e54660a42216fb0f28ea9c4677d0e6f03ebe37b1b5', 20, -1, 1, 2, 200, x'312c312c312c312c312c312c312c312c', x'312c312c');
INSERT INTO answer VALUES (2, -1130097261843255119, x'f05116872230f0b18715d85cbe21e607f6fc49a8e7de8f7b7eacef1ad7dd419a', 40, -2, 2, 4, 200, x'322c322c322c322c322c322c322c322c', x'322c322c322c322c322c322c322c322c322c322c322c322c');
INSERT INTO server_key VALUES (1, 311777378782905481, 'notary.test', 's00001.test', 20, -1, 1, x'312c312c312c312c312c312c312c312c312c312c');
INSERT INTO server_key VALUES (2, -3552701299510224568, 'notary.test', 's00002.test', 40, -2, 2, x'322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c322c');
PRAGMA user_version = 3;

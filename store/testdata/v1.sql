-- Schema 1 as the first fsbus wrote it, with rows. DO NOT EDIT: files like
-- this one lie on admins' disks. Migrations have to cope with it as it is.
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
INSERT INTO host VALUES
	('down.example.org',      7, 'no_such_name', 0,   'lookup down.example.org: no such host', 1763700000001, 1763703600002, 1763707200003, 0, 2),
	('limited.example.org',   1, 'ok',           429, 'M_LIMIT_EXCEEDED', 1763700000005, 1763700000005, 1763700060006, 1763699999007, 3),
	('up.example.org:8448',   0, 'ok',           0,   '', 0, 0, 0, 1763700000004, 1);
PRAGMA user_version = 1;

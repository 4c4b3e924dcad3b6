package store

import (
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"

	"fsbus/bus/matrix"
)

// MaxKeyObject is the most that ServerKeys.Object may have.
const MaxKeyObject = 64 << 10

// ServerKeys is what one server said of the signing keys of another (S2S 2.2.2
// "Querying Keys Through Another Server"), or a server of its own (2.2.1). Times
// are wall-clock milliseconds of the caller; the store only keeps them.
type ServerKeys struct {
	// Via is the notary, the server itself for what came from there. With Server it
	// is the key. Both must satisfy matrix.ParseServerName.
	Via, Server matrix.ServerName
	Fetched     matrix.Timestamp // when
	ValidUntil  matrix.Timestamp
	// Object is what was said, at most MaxKeyObject bytes. The store does not look
	// into it. Empty: nothing is known any more, the row goes.
	Object []byte
}

// check tells whether k may be stored.
func (k *ServerKeys) check() error {
	for _, name := range []matrix.ServerName{k.Via, k.Server} {
		if _, err := matrix.ParseServerName(string(name)); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	if len(k.Object) > MaxKeyObject {
		return fmt.Errorf("%w: keys of %d bytes", ErrInvalid, len(k.Object))
	}
	return nil
}

// keysHash is what a row is found by: the first 8 bytes of SHA-256 of both names
// with a NUL, which no name has, between them.
func keysHash(via, server matrix.ServerName) int64 {
	var buf [2*matrix.MaxServerName + 1]byte
	b := append(buf[:0], via...)
	b = append(b, 0)
	h := sha256.Sum256(append(b, server...))
	return int64(binary.BigEndian.Uint64(h[:]))
}

var keyQueries = cacheQueries{
	table: "server_key", same: "via = ?2 AND server = ?3",
	insert: "INSERT INTO server_key (hash, via, server, size, fetched, valid_until, object) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
}

// keyTable is the writer's side of the table.
type keyTable struct{ cacheTable }

func newKeyTable(c *conn, o *outbox) (*keyTable, error) {
	t := &keyTable{cacheTable{outbox: o, maxRows: int64(o.opt.MaxKeys), maxBytes: o.opt.MaxKeyBytes}}
	return t, t.prepare(c, keyQueries)
}

// put writes one row. It does so in a full file as well: while the outbox is full
// the homeserver still has to check what it receives, and what keys take has a
// bound of its own.
func (t *keyTable) put(k *ServerKeys) (int64, error) {
	if err := k.check(); err != nil {
		return 0, err
	}
	hash := keysHash(k.Via, k.Server)
	rows, err := t.delete(hash, string(k.Via), string(k.Server))
	size := int64(len(k.Object))
	if err != nil || size == 0 || size > t.maxBytes {
		return rows, err
	}
	t.outbox.grown += size + cacheRowBytes
	return 1, t.cacheTable.put(size, hash, string(k.Via), string(k.Server), size, int64(k.Fetched), int64(k.ValidUntil), k.Object)
}

// loadKeysQuery yields NULL for an object that is larger than it may be, so that a
// damaged row does not take memory.
var loadKeysQuery = fmt.Sprintf(`SELECT size, fetched, valid_until, iif(length(object) <= %d, object, NULL)
	FROM server_key WHERE hash = ?1 AND via = ?2 AND server = ?3 LIMIT 1`, MaxKeyObject)

// LoadKeys calls each for what is stored of servers by way of via, in the order in
// which they are given, until it returns an error, which LoadKeys returns as it is.
// It has one row in memory at a time, sees whatever was completed before the call,
// and holds up nobody while each runs, which may call the store. What is written
// meanwhile may show. A row that cannot be one of ours is left out (Stats.Damaged).
func (s *Store) LoadKeys(via matrix.ServerName, servers []matrix.ServerName, each func(ServerKeys) error) error {
	for _, server := range servers {
		k, found, err := s.loadKeys(via, server)
		if found && err == nil {
			err = each(k)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) loadKeys(via, server matrix.ServerName) (k ServerKeys, found bool, err error) {
	var bad error
	err = s.lookUp("load keys", func(r *reader) error {
		return r.keys.query(func(vals []driver.Value) error {
			k, bad = scanKeys(vals)
			found = bad == nil
			return nil
		}, keysHash(via, server), string(via), string(server))
	})
	if bad != nil {
		s.leftOut("server_key", 1, bad)
	}
	k.Via, k.Server = via, server
	return k, found, err
}

func scanKeys(vals []driver.Value) (k ServerKeys, err error) {
	var size, fetched, validUntil int64
	if err := scan(vals, &size, &fetched, &validUntil, &k.Object); err != nil {
		return k, err
	}
	k.Fetched, k.ValidUntil = matrix.Timestamp(fetched), matrix.Timestamp(validUntil)
	if n := int64(len(k.Object)); n == 0 || n != size {
		return k, notOurRow("keys of %d bytes, counted as %d", n, size)
	}
	return k, nil
}

// LatestVia returns the notary of the row that was written last of those that came
// from one, and whether there is such a row. It is for the start: it has a
// connection of its own, and where few rows came from a notary it reads many.
func (s *Store) LatestVia() (via matrix.ServerName, found bool, err error) {
	ctx := context.Background()
	err = s.read(ctx, "load the latest notary", func(c *conn) error {
		err := c.query(ctx, "SELECT via FROM server_key WHERE via <> server ORDER BY id DESC", nil, func(vals []driver.Value) error {
			name, _ := vals[0].(string)
			if via, err = matrix.ParseServerName(name); err != nil {
				s.leftOut("server_key", 1, err)
				return nil
			}
			found = true
			return errStop
		})
		if errors.Is(err, errStop) {
			return nil
		}
		return err
	})
	if !found || err != nil {
		return "", false, err
	}
	return via, true, nil
}

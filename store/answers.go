package store

import (
	"context"
	"database/sql/driver"
	"encoding/binary"
	"fmt"
)

// The bounds of an Answer.
const (
	MaxAnswerHeader = 4 << 10
	MaxAnswerBody   = 64 << 10
)

// Answer is an answer of another server that may be used again. Times are
// wall-clock milliseconds of the caller; the store only keeps them.
type Answer struct {
	// Key says what the answer is to. Any value will do; keys that begin alike
	// take longer to find, so a hash is best.
	Key    [32]byte
	Stored int64 // when it was received
	Fresh  int64 // until when it answers any equal request
	Stale  int64 // until when it answers if the server fails
	Status int32
	Header []byte // in a form of the caller's, at most MaxAnswerHeader; nil when read back empty
	Body   []byte // at most MaxAnswerBody; nil when read back empty
}

// check tells whether a may be stored.
func (a *Answer) check() error {
	if len(a.Header) > MaxAnswerHeader || len(a.Body) > MaxAnswerBody {
		return fmt.Errorf("%w: an answer with %d bytes of header and %d of body", ErrInvalid, len(a.Header), len(a.Body))
	}
	return nil
}

func (a *Answer) size() int64 { return int64(len(a.Header)) + int64(len(a.Body)) }

// answerHash is what an answer is found by: the first 8 bytes of its key.
func answerHash(key *[32]byte) int64 { return int64(binary.BigEndian.Uint64(key[:])) }

var answerQueries = cacheQueries{
	table: "answer", same: "key = ?2",
	// An empty slice reaches SQLite as NULL.
	insert: `INSERT INTO answer (hash, key, size, stored, fresh, stale, status, header, body)
		VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, coalesce(?8, x''), coalesce(?9, x''))`,
}

// answerTable is the writer's side of the table.
type answerTable struct{ cacheTable }

func newAnswerTable(c *conn, o *outbox) (*answerTable, error) {
	t := &answerTable{cacheTable{outbox: o, maxRows: int64(o.opt.MaxAnswers), maxBytes: o.opt.MaxAnswerBytes}}
	return t, t.prepare(c, answerQueries)
}

// put writes one answer, unless the file is at its bound: then an answer that
// is older than the caller knows must not stay either.
func (t *answerTable) put(a *Answer) (int64, error) {
	if err := a.check(); err != nil {
		return 0, err
	}
	rows, err := t.drop(&a.Key)
	if err != nil {
		return 0, err
	}
	size := a.size()
	if size > t.maxBytes {
		return rows, nil // all others would go to make room for it, and then it
	}
	fits, err := t.outbox.fits(size + cacheRowBytes)
	if !fits || err != nil {
		return rows, err
	}
	return 1, t.cacheTable.put(size, answerHash(&a.Key), a.Key[:], size, a.Stored, a.Fresh, a.Stale, int64(a.Status), a.Header, a.Body)
}

func (t *answerTable) drop(key *[32]byte) (int64, error) {
	return t.delete(answerHash(key), key[:])
}

// loadAnswerQuery yields NULL for what is larger than it may be, so that a damaged
// row does not take memory.
var loadAnswerQuery = fmt.Sprintf(`SELECT size, stored, fresh, stale, status, iif(length(header) <= %d, header, NULL),
	iif(length(body) <= %d, body, NULL) FROM answer WHERE hash = ?1 AND key = ?2 LIMIT 1`, MaxAnswerHeader, MaxAnswerBody)

// LoadAnswer returns the answer that is stored under key, and whether there is
// one. It sees whatever was completed before the call. It reads a few pages, and
// waits for nobody but other look-ups. A row that cannot be one of ours is as good as
// none (Stats.Damaged).
func (s *Store) LoadAnswer(key [32]byte) (a Answer, found bool, err error) {
	var bad error
	err = s.lookUp("load answer", func(r *reader) error {
		return r.answer.query(func(vals []driver.Value) error {
			a, bad = scanAnswer(vals)
			found = bad == nil
			return nil
		}, answerHash(&key), key[:])
	})
	if bad != nil {
		s.leftOut("answer", 1, bad)
	}
	if !found || err != nil {
		return Answer{}, false, err
	}
	a.Key = key
	return a, true, nil
}

func scanAnswer(vals []driver.Value) (a Answer, err error) {
	var size, status int64
	if err := scan(vals, &size, &a.Stored, &a.Fresh, &a.Stale, &status, &a.Header, &a.Body); err != nil {
		return a, err
	}
	if a.Status = int32(status); int64(a.Status) != status || size != a.size() {
		return a, notOurRow("status %d, %d bytes counted as %d", status, a.size(), size)
	}
	return a, nil
}

// AnswerInfo is what is known of a stored answer without reading it.
type AnswerInfo struct {
	Key                  [32]byte
	Stored, Fresh, Stale int64 // as in Answer
	Size                 int64 // of header and body
}

// AnswerIndex calls each for at most limit stored answers, the last written first,
// until it returns an error. It is for the start: it has a connection of its own
// and reads most of the table. A row that cannot be one of ours is left out.
func (s *Store) AnswerIndex(ctx context.Context, limit int, each func(AnswerInfo) error) error {
	var bad int64
	var why error
	err := s.read(ctx, "load index of answers", func(c *conn) error {
		return c.query(ctx, "SELECT key, stored, fresh, stale, size FROM answer ORDER BY id DESC LIMIT ?1",
			[]driver.Value{int64(max(limit, 0))}, func(vals []driver.Value) error {
				var info AnswerInfo
				var key []byte
				err := scan(vals, &key, &info.Stored, &info.Fresh, &info.Stale, &info.Size)
				if err == nil && (len(key) != len(info.Key) || info.Size < 0) {
					err = notOurRow("a key of %d bytes, size %d", len(key), info.Size)
				}
				if err != nil {
					bad, why = bad+1, err
					return nil
				}
				copy(info.Key[:], key)
				return each(info)
			})
	})
	if bad > 0 {
		s.leftOut("answer", bad, why)
	}
	return err
}

package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// readerCache is the page cache of a connection for reading, in KiB. The Loads read
// each page once, and of the caches' tables it holds the inner pages and the index.
const readerCache = 256

// openReader opens a connection for reading.
func openReader(ctx context.Context, path string) (*conn, error) {
	c, err := openConn(path)
	if err != nil {
		return nil, err
	}
	if err := c.exec(ctx, fmt.Sprintf("PRAGMA busy_timeout = %d; PRAGMA cache_size = -%d; PRAGMA temp_store = MEMORY; "+
		"PRAGMA query_only = ON", busyTimeout.Milliseconds(), readerCache)); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// read calls f with a connection for reading. It sees all that was completed
// before the call and does not hold up the writer. The connection lives as
// long as the call: it is needed at the start only, and an idle one would keep
// its cache. op names the operation in errors.
func (s *Store) read(ctx context.Context, op string, f func(*conn) error) error {
	s.reader.Lock()
	defer s.reader.Unlock()
	if s.readerClosed {
		return ErrClosed
	}
	c, err := openReader(ctx, s.opt.Path)
	if err == nil {
		err = errors.Join(f(c), c.close())
	}
	if err != nil {
		return classify(op, s.opt.Path, err)
	}
	return nil
}

// reader is the connection for what is looked up all the time. It is opened when it
// is first needed and stays. Between two calls it has no statement under way and so
// no read transaction, which would keep the log from starting over.
type reader struct {
	conn                *conn
	answer, keys        *stmt
	inbound, inboundPDU *stmt
	pendingPDU          *stmt
}

// readers holds the one reader.
type readers struct {
	mu     sync.Mutex
	open   *reader // nil before its first use, and after an error
	closed bool
}

func newReader(path string) (*reader, error) {
	c, err := openReader(context.Background(), path)
	if err != nil {
		return nil, err
	}
	r := &reader{conn: c}
	for _, p := range []struct {
		dst   **stmt
		query string
	}{
		{&r.answer, loadAnswerQuery}, {&r.keys, loadKeysQuery},
		{&r.inbound, loadInboundQuery}, {&r.inboundPDU, inboundPDUQuery}, {&r.pendingPDU, pendingPDUQuery},
	} {
		if *p.dst, err = c.prepare(p.query); err != nil {
			return nil, errors.Join(err, c.close())
		}
	}
	return r, nil
}

// lookUp calls f, which must be quick, with the reader. op names the operation in
// errors. After an error the next call begins with a new connection: nobody knows
// what is wrong with this one.
func (s *Store) lookUp(op string, f func(*reader) error) error {
	rs := &s.lookups
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.closed {
		return ErrClosed
	}
	if rs.open == nil {
		r, err := newReader(s.opt.Path)
		if err != nil {
			return classify(op, s.opt.Path, err)
		}
		rs.open = r
	}
	if err := f(rs.open); err != nil {
		err = errors.Join(err, rs.open.conn.close())
		rs.open = nil
		return classify(op, s.opt.Path, err)
	}
	return nil
}

// close waits for the call under way, closes the connection, and refuses others.
func (rs *readers) close() error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.closed = true
	if rs.open == nil {
		return nil
	}
	err := rs.open.conn.close()
	rs.open = nil
	return err
}

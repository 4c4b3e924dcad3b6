package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net/url"

	"modernc.org/sqlite"
)

// conn is one SQLite connection, used by one goroutine at a time. It sits on
// the driver itself instead of on database/sql: a pool replaces a connection
// behind one's back, and with it the pragmas that make a commit durable, costs
// a goroutine, and allocates three times as much per row (doc.go).
type conn struct {
	raw   rawConn
	stmts []*stmt
}

// rawConn and rawStmt are what is used of the driver's connection and statement.
type (
	rawConn interface {
		driver.Conn
		driver.ExecerContext
		driver.QueryerContext
	}
	rawStmt interface {
		driver.Stmt
		driver.StmtExecContext
		driver.StmtQueryContext
	}
)

// openConn opens the database file at path, which must exist: SQLite would
// create an empty one in its place.
func openConn(path string) (*conn, error) {
	u := url.URL{Path: path}
	// _error_rc keeps a stale message of the connection out of error texts.
	raw, err := new(sqlite.Driver).Open("file:" + u.EscapedPath() + "?mode=rw&_error_rc=1")
	if err != nil {
		return nil, err
	}
	return &conn{raw: raw.(rawConn)}, nil
}

// exec runs one statement, or several without parameters.
func (c *conn) exec(ctx context.Context, query string, args ...driver.Value) error {
	_, err := c.raw.ExecContext(ctx, query, named(nil, args))
	return err
}

// query calls row for each row of the result. The slice is reused.
func (c *conn) query(ctx context.Context, query string, arg []driver.Value, row func([]driver.Value) error) error {
	rows, err := c.raw.QueryContext(ctx, query, named(nil, arg))
	if err != nil {
		return err
	}
	return eachRow(ctx, rows, row)
}

// eachRow calls row for each of rows and closes them.
func eachRow(ctx context.Context, rows driver.Rows, row func([]driver.Value) error) (err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	vals := make([]driver.Value, len(rows.Columns()))
	for {
		switch err := rows.Next(vals); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		// The driver looks at ctx when a query starts; a long result has to
		// be left from here.
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := row(vals); err != nil {
			return err
		}
	}
}

// value returns the single value of the first row of a result.
func value[T int64 | string](ctx context.Context, c *conn, query string) (v T, err error) {
	found := false
	err = c.query(ctx, query, nil, func(vals []driver.Value) error {
		if found {
			return nil
		}
		found = true
		return scan(vals, &v)
	})
	if err == nil && !found {
		err = fmt.Errorf("%q: no row", query)
	}
	return v, err
}

// scan copies a row into the variables that dst points at. A value of another
// type than expected can only come from a damaged file: tables are STRICT. Then the
// error is ErrDamagedRow.
func scan(vals []driver.Value, dst ...any) error {
	if len(vals) != len(dst) {
		panic(fmt.Sprintf("store: %d columns into %d variables", len(vals), len(dst)))
	}
	for i, v := range vals {
		ok := false
		switch d := dst[i].(type) {
		case *int64:
			*d, ok = v.(int64)
		case *string:
			*d, ok = v.(string)
		case *[]byte:
			*d, ok = v.([]byte)
		default:
			panic(fmt.Sprintf("store: cannot scan into %T", d))
		}
		if !ok {
			return fmt.Errorf("%w: column %d holds a %T", ErrDamagedRow, i, v)
		}
	}
	return nil
}

// prepare compiles one statement, which lives as long as the connection.
func (c *conn) prepare(query string) (*stmt, error) {
	raw, err := c.raw.Prepare(query)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", query, err)
	}
	s := &stmt{raw: raw.(rawStmt)}
	c.stmts = append(c.stmts, s)
	return s, nil
}

// close finalizes the statements and closes the connection. A statement left
// over would keep SQLite's handle, its locks and the -wal file.
func (c *conn) close() error {
	var errs []error
	for _, s := range c.stmts {
		errs = append(errs, s.raw.Close())
	}
	return errors.Join(append(errs, c.raw.Close())...)
}

// stmt is a prepared statement.
type stmt struct {
	raw  rawStmt
	args []driver.NamedValue // reused
}

// exec runs the statement and returns how many rows it changed; after BEGIN,
// COMMIT and the like that number means nothing. It takes no context: a
// transaction is short, and one that is cut off half-way helps nobody.
func (s *stmt) exec(args ...driver.Value) (int64, error) {
	s.args = named(s.args[:0], args)
	res, err := s.raw.ExecContext(context.Background(), s.args)
	clear(s.args) // a payload may keep the whole body of a transaction in memory
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// query runs the statement and calls row for each row of the result, of which
// the slice is reused. Like exec it takes no context.
func (s *stmt) query(row func([]driver.Value) error, args ...driver.Value) error {
	s.args = named(s.args[:0], args)
	rows, err := s.raw.QueryContext(context.Background(), s.args)
	if err != nil {
		return err
	}
	return eachRow(context.Background(), rows, row)
}

func named(dst []driver.NamedValue, vals []driver.Value) []driver.NamedValue {
	for i, v := range vals {
		dst = append(dst, driver.NamedValue{Ordinal: i + 1, Value: v})
	}
	return dst
}

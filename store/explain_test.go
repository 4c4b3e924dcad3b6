package store

import (
	"database/sql/driver"
	"strings"
	"testing"
)

// explain appends the steps of SQLite's plan for a statement.
// vals[3] is the step in words (sqlite.org/eqp.html).
func explain(t testing.TB, c *conn, query string, plan *[]string) error {
	t.Helper()
	n := 0
	for i := 1; strings.Contains(query, "?"+string(rune('0'+i%10))) && i < 10; i++ {
		n = i
	}
	for _, two := range []string{"?10", "?11"} {
		if strings.Contains(query, two) {
			n++
		}
	}
	args := make([]driver.Value, n)
	for i := range args {
		args[i] = int64(2)
	}
	return c.query(t.Context(), "EXPLAIN QUERY PLAN "+query, args, func(vals []driver.Value) error {
		*plan = append(*plan, vals[3].(string))
		return nil
	})
}

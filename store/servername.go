package store

import (
	"context"
	"database/sql/driver"
)

// claim makes sure that what is in the database may be sent in the name of
// o.ServerName. One that belongs to nobody yet, as those do that an fsbus before
// schema 5 made, or has nothing pending, is from now on that homeserver's.
func claim(ctx context.Context, c *conn, o *Options) error {
	if o.ServerName == "" {
		return nil
	}
	stored := ""
	if err := c.query(ctx, "SELECT value FROM meta WHERE name = 'server_name'", nil, func(vals []driver.Value) error {
		return scan(vals, &stored)
	}); err != nil {
		return classify("read server name", o.Path, err)
	}
	if stored == string(o.ServerName) {
		return nil
	}
	if stored != "" {
		// The items and not the totals of destinations: those may be wrong.
		pending, err := value[int64](ctx, c, "SELECT EXISTS (SELECT 1 FROM item)")
		if err != nil {
			return classify("read server name", o.Path, err)
		}
		if pending != 0 {
			return otherServer(o.Path, stored, o.ServerName)
		}
		o.Logger.Warn("the homeserver has another name now", "path", o.Path, "from", stored, "to", o.ServerName)
	}
	if err := c.exec(ctx, "INSERT INTO meta VALUES ('server_name', ?1) ON CONFLICT DO UPDATE SET value = ?1", string(o.ServerName)); err != nil {
		return classify("write server name", o.Path, err)
	}
	return nil
}

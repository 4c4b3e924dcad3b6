package netx

import (
	"context"

	"fsbus/bus/matrix"
)

// Connect makes a connection to a server, or finds that there is one, so that a
// later request finds the way known: the server's name is resolved, its
// certificate good, its session remembered. The connection is kept as long as at
// most half of those that may be kept are, and else closed: requests that were
// really made go before.
//
// connected is called as Do calls it. Every error is or wraps an *Error.
func (c *Client) Connect(ctx context.Context, server matrix.ServerName, priority int, connected func()) error {
	ctx = withPriority(ctx, priority)
	route, err := discover(ctx, server, c.wellKnown, c.lookup)
	if err != nil {
		return resolveError(ctx, err)
	}
	key := poolKey{server, route.TLSName, route.HostHeader}
	conn := c.pool.get(key)
	if conn == nil {
		if conn, err = c.connect(ctx, route, key); err != nil {
			return err
		}
		if connected != nil {
			connected()
		}
	}
	conn.Release()
	c.pool.put(conn, 2*c.pool.idleCount() < c.pool.maxIdle)
	return nil
}

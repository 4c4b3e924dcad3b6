package node

import (
	"context"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/store"
)

// outboxCore is what an admin's commands need of the core and of the writer of
// the store.
type outboxCore interface {
	// queues calls f, which must be quick, for each destination that has something
	// pending or is held. After an error f may still be running.
	queues(ctx context.Context, f func(bus.QueueStatus)) error
	// queue returns one destination's; ok is false if nothing is known of it.
	queue(ctx context.Context, dest matrix.ServerName) (st bus.QueueStatus, host bus.HostStatus, ok bool, err error)
	// flush has the core try a destination at once.
	flush(dest matrix.ServerName)
	// apply submits operations to the store as one batch and waits until they are
	// durable or ctx ends. After an error they may still be changed. The core has
	// been told of what Hold, Drop and RetryAside changed when it returns nil.
	apply(ctx context.Context, ops ...store.OutboxOp) error
}

// nodeCore is the outboxCore of a node.
type nodeCore struct{ n *Node }

func (c nodeCore) queues(ctx context.Context, f func(bus.QueueStatus)) error {
	return c.n.loop.Call(ctx, func() { c.n.core.Queues(c.n.clock.Now(), f) })
}

func (c nodeCore) queue(ctx context.Context, dest matrix.ServerName) (bus.QueueStatus, bus.HostStatus, bool, error) {
	var got struct { // read only if Call has waited for it
		queue             bus.QueueStatus
		host              bus.HostStatus
		hasQueue, hasHost bool
	}
	if err := c.n.loop.Call(ctx, func() {
		now := c.n.clock.Now()
		got.queue, got.hasQueue = c.n.core.QueueStatus(now, dest)
		got.host, got.hasHost = c.n.core.HostStatus(now, dest)
	}); err != nil {
		return bus.QueueStatus{}, bus.HostStatus{}, false, err
	}
	return got.queue, got.host, got.hasQueue || got.hasHost, nil
}

func (c nodeCore) flush(dest matrix.ServerName) {
	c.n.loop.Post(event{Event: bus.Flush{Dest: dest}})
}

func (c nodeCore) apply(ctx context.Context, ops ...store.OutboxOp) error {
	return applyOps(ctx, c.n.store, func(ev bus.Adjusted) { c.n.loop.Post(event{Event: ev}) }, ops)
}

// applyOps is outboxCore.apply over a store. The core is told from the completion
// rather than by whoever waits for it: completions come in the order of the
// commits, and an old state must not reach the core behind a newer one.
func applyOps(ctx context.Context, s *store.Store, tell func(bus.Adjusted), ops []store.OutboxOp) error {
	done := make(chan error, 1)
	err := s.Submit(&store.Batch{Outbox: ops}, func(err error) {
		if err == nil {
			for _, op := range ops {
				switch op := op.(type) {
				case *store.Hold:
					tell(bus.Adjusted{Dest: op.Destination, Backlog: backlogOf(op.Result)})
				case *store.RetryAside:
					if op.Result.Destination.Name != "" {
						tell(bus.Adjusted{Dest: op.Destination, Backlog: backlogOf(op.Result.Destination)})
					}
				case *store.Drop:
					tell(bus.Adjusted{Dest: op.Destination, Backlog: backlogOf(op.Result.Destination)})
				}
			}
		}
		done <- err
	})
	if err != nil {
		return err
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

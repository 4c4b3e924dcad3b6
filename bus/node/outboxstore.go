package node

import (
	"errors"
	"log/slog"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
	"fsbus/store"
)

// The core's effects on the outbox are operations of the store. Each is a batch
// of its own, and the store makes one commit of all that waits. What it answers is
// posted from its goroutine, so the core hears of things in the order in which
// they took effect.

// commitEach is the least time between the beginnings of two commits. Nobody
// notices it, and it spares an SD card most of its writes.
const commitEach = 10 * time.Millisecond

// packed is a transaction that the core may have sent, until Unpack.
type packed struct {
	id   string
	body *netx.Body
	size int64
}

// apply has the store do op and post what done makes of it. A store that takes
// no more is like one that could not write.
func (n *Node) apply(op store.OutboxOp, done func(error) event) {
	err := n.store.Submit(&store.Batch{Outbox: []store.OutboxOp{op}}, func(err error) {
		n.noteCommit(op, err)
		n.loop.Post(done(err))
	})
	if err != nil {
		n.noteCommit(op, err)
		n.loop.Inject(done(err))
	}
}

// noteCommit tells /health and the log of a store that fails. That the outbox has
// no more room is no failure of the store.
func (n *Node) noteCommit(op store.OutboxOp, err error) {
	switch {
	case errors.Is(err, store.ErrOutboxFull):
		n.notable.write(slog.LevelWarn, "the outbox has no room for a transaction; the homeserver keeps it", slog.Any("error", err))
	case errors.Is(err, store.ErrInvalid):
		n.notable.write(slog.LevelError, "the store refuses what it should take", slog.Any("error", err))
	case errors.Is(err, store.ErrDamagedRow):
		n.notable.write(slog.LevelError, "a row of the database is damaged", slog.Any("error", err), slog.String("operation", op.String()))
	default:
		n.trouble.commit(err)
		if err != nil {
			n.notable.write(slog.LevelError, "the store failed", slog.Any("error", err), slog.String("operation", op.String()))
		}
	}
}

func (n *Node) accept(e bus.Accept) {
	in, txn := n.requests[e.Req].in, n.requests[e.Req].txn
	op := &store.Accept{
		Destination: in.Destination, TxnID: txn, Accepted: n.clock.Now().Stored(), Bytes: in.Size,
		Load: func(dst []matrix.Item) ([]matrix.Item, error) {
			body, done, err := n.takeover.bulk.whole(in.Body, in.Size)
			defer done()
			if err != nil {
				return dst, err
			}
			txn, err := matrix.ParseTransaction(body)
			if err != nil {
				return dst, err
			}
			return txn.Items(dst), nil
		},
	}
	n.apply(op, func(err error) event {
		ev := bus.Accepted{Req: e.Req}
		switch {
		case err == nil:
			r := &op.Result
			ev.Repeated, ev.Merged, ev.Duplicates = r.Repeated, int32(r.Merged), int32(r.Duplicates)
			ev.Kinds, ev.Backlog = countsOf(r.Kinds), backlogOf(r.Destination)
		case errors.Is(err, store.ErrOutboxFull):
			ev.Fault, ev.Detail = bus.AcceptedFull, err.Error()
		default:
			ev.Fault, ev.Detail = bus.AcceptedNot, err.Error()
		}
		return event{Event: ev}
	})
}

func (n *Node) pack(e bus.Pack) {
	op := &store.Pack{
		Destination: e.Dest, NewID: e.TxnID, Now: n.clock.Now().Stored(),
		Origin: n.cfg.Load().Homeserver.ServerName, MaxBytes: int(e.MaxBytes),
	}
	n.apply(op, func(err error) event {
		r := &op.Result
		ev := bus.Packed{Batch: e.Batch, OK: err == nil}
		if err != nil {
			return event{Event: ev}
		}
		ev.Expired, ev.SetAside, ev.Backlog = countsOf(r.Expired), int32(r.SetAside), backlogOf(r.Destination)
		if r.SetAside > 0 {
			n.notable.write(slog.LevelError, "items are set aside: they cannot be sent (fsbus queue aside shows them)",
				slog.String("destination", string(e.Dest)), slog.Int("items", r.SetAside), slog.Int("damaged", r.Damaged))
		}
		if r.ID == "" {
			return event{Event: ev}
		}
		ev.Txn = bus.TxnInfo{
			ID: r.ID, Again: r.Again, PDUs: int32(r.PDUs), EDUs: int32(r.EDUs), Bytes: int64(len(r.Body)), Oldest: sched.FromStored(r.Oldest),
		}
		p := &packed{id: r.ID, body: n.spool.New(), size: int64(len(r.Body))}
		_, err = p.body.Write(r.Body)
		p.body.CloseWrite(err)
		r.Body = nil
		if err != nil {
			n.trouble.spool(err)
			p.body.Release()
			ev.OK, ev.Txn = false, bus.TxnInfo{} // it is packed again, and the same
			return event{Event: ev}
		}
		return event{Event: ev, packed: p}
	})
}

func (n *Node) settle(e bus.Settle) {
	op := &store.Settle{Destination: e.Dest, TxnID: e.TxnID, Now: n.clock.Now().Stored(), Reason: e.Reason}
	switch e.Outcome {
	case bus.Delivered:
		op.Outcome = store.Delivered
	case bus.Bisect:
		op.Outcome = store.Bisect
	case bus.Thaw:
		op.Outcome = store.Thaw
	}
	n.apply(op, func(err error) event {
		r := &op.Result
		ev := bus.Settled{Batch: e.Batch, OK: err == nil}
		if err == nil {
			ev.Delivered, ev.Backlog = countsOf(r.Delivered), backlogOf(r.Destination)
			if e.Outcome == bus.Delivered {
				n.retryAside(e.Dest)
			}
			if a := r.SetAside; a != nil {
				ev.SetAside = 1
				n.notable.write(slog.LevelWarn, "an item is set aside: its destination refuses it",
					slog.String("destination", string(e.Dest)), slog.String("kind", a.Kind.String()), slog.String("why", a.Reason))
			}
		}
		return event{Event: ev}
	})
}

// retryAside has what was set aside for a destination tried again, once: it has just taken
// something, and may take now what it refused a day ago. It runs on the writer's goroutine.
func (n *Node) retryAside(dest matrix.ServerName) {
	if !n.asides.due(dest, n.clock.Now()) || n.store.Stats().Outbox.Aside == 0 {
		return
	}
	op := &store.RetryAside{Destination: dest, Once: true, Now: n.clock.Now().Stored()}
	err := n.store.Submit(&store.Batch{Outbox: []store.OutboxOp{op}}, func(err error) {
		n.noteCommit(op, err)
		if r := &op.Result; err == nil && r.Again.Items > 0 {
			n.notable.write(slog.LevelInfo, "what a destination refused a day ago is tried again, once",
				slog.String("destination", string(dest)), slog.Int64("items", r.Again.Items))
			n.loop.Post(event{Event: bus.Adjusted{Dest: dest, Backlog: backlogOf(r.Destination)}})
		}
	})
	n.noteCommit(op, err)
}

// asides says for which destinations it is time to look for what was set aside. It is for
// one goroutine, the store's writer.
type asides struct {
	looked map[matrix.ServerName]sched.Time
}

const (
	asideEach = time.Hour // between two looks for a destination
	asideMost = 1000      // destinations of which that is remembered
)

func (a *asides) due(dest matrix.ServerName, now sched.Time) bool {
	if at, ok := a.looked[dest]; ok && now.Sub(at) < asideEach {
		return false
	}
	if a.looked == nil || len(a.looked) >= asideMost {
		a.looked = make(map[matrix.ServerName]sched.Time)
	}
	a.looked[dest] = now
	return true
}

func (n *Node) compact(e bus.Compact) {
	op := &store.Compact{Destination: e.Dest, Now: n.clock.Now().Stored()}
	n.apply(op, func(err error) event {
		r := &op.Result
		ev := bus.Trimmed{Batch: e.Batch, OK: err == nil}
		if err == nil {
			ev.Superseded, ev.Expired = int32(r.Superseded.Items), countsOf(r.Expired)
			ev.Changed = []bus.QueueRecord{{Name: e.Dest, Backlog: backlogOf(r.Destination)}}
			if r.More {
				ev.Next = 1
			}
			if r.Superseded.Items > 0 {
				n.notable.write(slog.LevelWarn, "a destination has been away for long: only the newest events of each room stay",
					slog.String("destination", string(e.Dest)), slog.Int64("given_up", r.Superseded.Items))
			}
		}
		return event{Event: ev}
	})
}

func (n *Node) expire(e bus.Expire) {
	op := &store.Expire{Now: n.clock.Now().Stored(), After: e.After}
	n.apply(op, func(err error) event {
		r := &op.Result
		ev := bus.Trimmed{Batch: e.Batch, OK: err == nil}
		if err == nil {
			ev.Expired, ev.Next = countsOf(r.Expired), r.Next
			for _, d := range r.Destinations {
				ev.Changed = append(ev.Changed, bus.QueueRecord{Name: d.Name, Backlog: backlogOf(d)})
			}
		}
		return event{Event: ev}
	})
}

// countsOf returns the items by kind.
func countsOf(k store.KindTotals) (n [matrix.NumKinds + 1]int32) {
	for kind := range k {
		n[kind] = int32(k[kind].Items)
	}
	return n
}

// backlogOf translates what the store knows of a destination.
func backlogOf(d store.Destination) bus.Backlog {
	return bus.Backlog{Items: countsOf(d.Kinds), Bytes: d.Kinds.Sum().Bytes, Oldest: sched.FromStored(d.Oldest), Frozen: d.Frozen, Held: d.Held}
}

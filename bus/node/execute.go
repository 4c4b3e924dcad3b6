package node

import (
	"context"
	"fmt"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/netx"
	"fsbus/store"
)

// smallQuery is for how many keys at most the answer goes the way of small ones: a
// key object has about one KiB.
const smallQuery = 20

// held is a request that the core may still refer to: until it is answered or
// gone, and freed.
type held struct {
	in    *netx.Inbound
	txn   string // its name for the store, if it is offered
	ended bool
	freed bool
}

// execute does what the core asks for, in order. It runs on the loop's
// goroutine and never blocks.
func (n *Node) execute(effects []effect) {
	look := n.hooks.effect
	if look == nil {
		look = func(bus.Effect, bool) {}
	}
	for _, e := range effects {
		switch {
		case e.edge != nil:
			n.edge.perform(e.edge, e.looked)
			continue
		case e.left != 0:
			n.edge.left(e.left)
			continue
		case e.gone != 0:
			n.ended(e.gone)
			continue
		}
		look(e.Effect, false)
		n.perform(e.Effect)
		look(e.Effect, true)
	}
}

func (n *Node) perform(e bus.Effect) {
	switch e := e.(type) {
	case bus.Send:
		n.send(e)
	case bus.Cancel:
		if d := n.deliveries[e.Op]; d != nil {
			d.cancel()
			break
		}
		if w := n.errands[e.Op]; w != nil {
			w.cancel()
			break
		}
		n.attempts[e.Op].cancel()
	case bus.Reply:
		n.reply(e)
	case bus.Refuse:
		in := n.ended(e.Req)
		n.small.Submit(answer{in: in, refusal: &e})
	case bus.Free:
		h := n.requests[e.Req]
		h.in.Release()
		h.freed = true
		n.forget(e.Req, h)
	case bus.Discard:
		if n.deliveries[e.Op] != nil {
			delete(n.deliveries, e.Op)
			break
		}
		if n.errands[e.Op] != nil {
			delete(n.errands, e.Op)
			break
		}
		n.attempts[e.Op].body.Release()
		delete(n.attempts, e.Op)
	case bus.Commit:
		n.commit(e)
	case bus.Load:
		n.readers.Submit(loadAnswer{e})
	case bus.LoadKeys:
		n.readers.Submit(loadKeys{e})
	case bus.ReplyKeys:
		job := answer{in: n.ended(e.Req), keys: &e}
		if len(e.Wants) <= smallQuery {
			n.small.Submit(job)
			break
		}
		n.large.Submit(job)
	case bus.Accept:
		n.accept(e)
	case bus.Acknowledge:
		n.small.Submit(answer{in: n.ended(e.Req), taken: true})
	case bus.Pack:
		n.pack(e)
	case bus.Unpack:
		n.packs[e.Batch].body.Release()
		delete(n.packs, e.Batch)
	case bus.Settle:
		n.settle(e)
	case bus.Compact:
		n.compact(e)
	case bus.Expire:
		n.expire(e)
	case bus.KeyFetched:
		n.edge.fetched(e)
	case bus.JoinWindow:
		if n.edge != nil {
			n.edge.inject(edge.Joining{Room: e.Room, Open: e.Open})
		}
	case bus.Drained:
		close(n.drained)
	default:
		panic(fmt.Sprintf("node: unknown effect %T", e))
	}
}

// ended notes that a request has its answer or no longer wants one.
func (n *Node) ended(id bus.ReqID) *netx.Inbound {
	h := n.requests[id]
	if h == nil {
		return nil
	}
	h.ended = true
	n.forget(id, h)
	return h.in
}

func (n *Node) forget(id bus.ReqID, h *held) {
	if h.ended && h.freed {
		delete(n.requests, id)
	}
}

func (n *Node) send(e bus.Send) {
	switch {
	case e.Batch != 0, e.Control != "":
		n.sendPacked(e)
		return
	case e.Notary != nil, e.Origin, e.Ahead:
		w := &errand{send: e}
		w.ctx, w.cancel = context.WithCancel(context.Background())
		n.errands[e.Op] = w
		n.senders.Submit(w)
		return
	}
	a := &attempt{op: e.Op, class: e.Class, in: n.requests[e.Req].in, body: n.spool.New()}
	if a.in.Body != nil {
		a.in.Body.Retain() // the caller may be answered while the attempt runs
	}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	n.attempts[e.Op] = a
	n.senders.Submit(a)
}

func (n *Node) reply(e bus.Reply) {
	a := n.attempts[e.Op]
	in := n.ended(e.Req)
	a.body.Retain()
	job := answer{in: in, from: a, reader: a.body.Reader(), field: e.Field, source: e.From, age: e.Age}
	if a.body.Complete() && a.body.Size() <= smallReply || a.size >= 0 && a.size <= smallReply {
		n.small.Submit(job)
		return
	}
	n.large.Submit(job)
}

// commit writes host records and answers. A store that takes no more is like one that
// could not write: the core goes on without.
func (n *Node) commit(e bus.Commit) {
	batch := &store.Batch{Hosts: toStore(e.Hosts), Answers: n.rowsOf(e.Answers)}
	n.notable.hosts(e.Hosts)
	err := n.store.Submit(batch, func(err error) {
		n.trouble.commit(err)
		n.loop.Post(event{Event: bus.Committed{Batch: e.Batch, OK: err == nil}})
	})
	if err != nil {
		n.trouble.commit(err)
		n.loop.Inject(event{Event: bus.Committed{Batch: e.Batch}})
	}
}

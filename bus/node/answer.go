package node

import (
	"errors"
	"strconv"
	"sync/atomic"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// answer is one reply to be written: what a remote answered, a refusal of the
// bus's own, or that a transaction is taken over.
type answer struct {
	in      *netx.Inbound
	taken   bool
	refusal *bus.Refuse
	from    *attempt
	reader  *netx.Reader
}

// replyCounts counts how the writing of answers ended.
type replyCounts struct {
	whole atomic.Int64 // all of it was taken
	cut   atomic.Int64 // aborted because the remote's answer was cut short
	slow  atomic.Int64 // aborted because the homeserver did not read it
	gone  atomic.Int64 // the homeserver closed the connection first
}

// write writes one answer. It runs on a replier.
func (n *Node) write(a answer) {
	var err error
	switch {
	case a.taken:
		err = a.in.Reply(200, nil, takenBody)
	case a.refusal != nil:
		err = a.in.Reply(a.refusal.Status, nil, refusalBody(a.refusal))
	default:
		defer a.from.body.Release()
		defer a.reader.Close()
		size := a.from.size
		if a.from.body.Complete() {
			size = a.from.body.Size()
		}
		err = a.in.Stream(a.from.status, a.from.header, size, a.reader)
	}
	switch {
	case err == nil:
		n.replies.whole.Add(1)
	case errors.Is(err, netx.ErrClientGone):
		n.replies.gone.Add(1)
	case errors.Is(err, netx.ErrSlowReader):
		n.replies.slow.Add(1)
		n.notable.reply(a.in, err)
	default:
		n.replies.cut.Add(1)
		n.notable.reply(a.in, err)
	}
}

// takenBody is the answer to a transaction that is taken over (S2S
// "Transactions"). A Synapse looks into it only for errors of events
// (federation/sender/transaction_manager.py).
var takenBody = []byte(`{"pdus":{}}`)

// unwritten ends an answer whose replier panicked.
func (n *Node) unwritten(a answer, err error) {
	n.log.Error("a worker failed", "error", err)
	a.in.Abort()
}

func refusalBody(r *bus.Refuse) []byte {
	body := matrix.ErrorJSON(r.Code, r.Text)
	if r.RetryAfter > 0 {
		// Of the members that ErrorJSON writes, "retry_after_ms" sorts last.
		body = append(body[:len(body)-1], `,"retry_after_ms":`...)
		body = strconv.AppendInt(body, r.RetryAfter, 10)
		body = append(body, '}')
	}
	return body
}

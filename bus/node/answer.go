package node

import (
	"errors"
	"strconv"
	"sync/atomic"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// answer is one reply to be written: what a remote answered, a refusal of the
// bus's own, keys from the store, or that a transaction is taken over.
type answer struct {
	in      *netx.Inbound
	taken   bool
	refusal *bus.Refuse
	keys    *bus.ReplyKeys
	from    *attempt
	reader  *netx.Reader
	field   string // only this member of it
	source  bus.Source
	age     time.Duration
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
		err = a.in.Reply(a.refusal.Status, nil, errorBody(a.refusal.Code, a.refusal.Text, a.refusal.RetryAfter))
	case a.keys != nil:
		err = n.writeKeys(a.in, a.keys)
	default:
		defer a.from.body.Release()
		defer a.reader.Close()
		if a.field != "" && a.from.status == 200 {
			err = n.writeField(a)
			break
		}
		size := a.from.size
		if a.from.body.Complete() {
			size = a.from.body.Size()
		}
		err = a.in.Stream(a.from.status, headerFor(a), size, a.reader)
	}
	n.wrote(a.in, err)
}

// wrote counts and notes how the writing of an answer ended.
func (n *Node) wrote(in *netx.Inbound, err error) {
	switch {
	case err == nil:
		n.replies.whole.Add(1)
	case errors.Is(err, netx.ErrClientGone):
		n.replies.gone.Add(1)
	case errors.Is(err, netx.ErrSlowReader):
		n.replies.slow.Add(1)
		n.notable.reply(in, err)
	default:
		n.replies.cut.Add(1)
		n.notable.reply(in, err)
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

// errorBody is the body of an error, with retry_after_ms if that is not 0.
func errorBody(code, text string, retryAfter int64) []byte {
	body := matrix.ErrorJSON(code, text)
	if retryAfter > 0 {
		// Of the members that ErrorJSON writes, "retry_after_ms" sorts last.
		body = append(body[:len(body)-1], `,"retry_after_ms":`...)
		body = append(strconv.AppendInt(body, retryAfter, 10), '}')
	}
	return body
}

package node

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// maxSendAnswer is how much of the answer to a transaction is read: an id and an
// error for each of 50 events take far less. It lies in the spool, so that however
// many destinations answer with so much, memory holds as much as it may.
const maxSendAnswer = 256 << 10

// delivery is an attempt to deliver a packed transaction.
type delivery struct {
	op     bus.OpID
	class  matrix.Class
	dest   matrix.ServerName
	txn    *packed
	ctx    context.Context
	cancel context.CancelFunc
}

func (n *Node) sendPacked(e bus.Send) {
	d := &delivery{op: e.Op, class: e.Class, dest: e.Dest, txn: n.packs[e.Batch]}
	if e.Control != "" {
		d.txn = n.control(e.Control)
	} else {
		d.txn.body.Retain() // until the attempt is over
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	n.deliveries[e.Op] = d
	n.senders.Submit(d)
}

// control returns a transaction that holds nothing. What cannot be written is found out
// by whoever reads it.
func (n *Node) control(id string) *packed {
	b := matrix.NewBuilder(n.takeover.origin, 1).Finish(n.clock.Now().Stored())
	p := &packed{id: id, body: n.spool.New(), size: int64(len(b))}
	_, err := p.body.Write(b)
	p.body.CloseWrite(err)
	return p
}

// run takes a transaction to its destination. It runs on a sender and posts
// exactly one Done.
func (d *delivery) run(n *Node) {
	answered, done := n.transact(d)
	n.endDelivery(d, answered, done)
}

// crashed ends a delivery whose sender panicked.
func (d *delivery) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
	n.endDelivery(d, nil, bus.Done{Op: d.op, Failure: matrix.FailLocal, Sent: true, Detail: "internal error"})
}

func (n *Node) endDelivery(d *delivery, answered *bus.Answered, done bus.Done) {
	d.cancel()
	d.txn.body.Release()
	if done.Failure != matrix.FailNone {
		n.notable.undelivered(d, done)
	}
	if answered != nil {
		n.notable.refused(d, answered.Status, done)
		n.loop.Post(event{Event: *answered, then: done})
		return
	}
	n.loop.Post(event{Event: done})
}

// transact signs the transaction, sends it and reads the answer.
func (n *Node) transact(d *delivery) (*bus.Answered, bus.Done) {
	failed := func(f matrix.Failure, sent bool, detail string) bus.Done {
		return bus.Done{Op: d.op, Failure: f, Sent: sent, Detail: detail}
	}
	target := sendPrefix + d.txn.id
	authorization, err := n.takeover.sign(d, target)
	if err != nil {
		return nil, failed(matrix.FailLocal, false, err.Error())
	}
	req := &netx.Request{
		Destination: d.dest, Method: http.MethodPut, Target: target, Size: d.txn.size, Priority: int(d.class),
		Header:  http.Header{"Authorization": {authorization}, "Content-Type": {"application/json"}, "User-Agent": {n.userAgent}},
		Body:    d.txn.body.Reader(), // closed by Do
		GetBody: func() (io.ReadCloser, error) { return d.txn.body.Reader(), nil },
	}
	resp, err := n.client.Do(d.ctx, req, func() { n.loop.Post(event{Event: bus.Connected{Op: d.op}}) })
	if err != nil {
		var e *netx.Error
		unsent := errors.As(err, &e) && e.Unsent
		done := failed(netx.FailureOf(err), !unsent, explain(err))
		if e != nil {
			done.Sends = e.Sends
		}
		return nil, done
	}
	defer resp.Body.Close()
	answered := &bus.Answered{Op: d.op, Status: resp.StatusCode}
	answer := n.spool.New()
	defer answer.Release()
	err = fill(answer, nil, resp.Body, maxSendAnswer, nil)
	answer.CloseWrite(err)
	var body []byte
	if err == nil {
		var letGo func()
		body, letGo, err = n.takeover.bulk.whole(answer, answer.Size())
		defer letGo()
	}
	if resp.StatusCode == http.StatusTooManyRequests {
		answered.RetryAfter, _ = matrix.ParseRetryAfter(resp.Header.Get("Retry-After"), body, time.Now())
	}
	done := bus.Done{Op: d.op, Sent: true, Size: answer.Size()}
	switch {
	case err != nil:
		done.Failure, done.Detail = n.unfilled(err)
	case resp.StatusCode == http.StatusOK:
		refused, err := matrix.ParseSendAnswer(body)
		if err != nil {
			done.Failure, done.Detail = matrix.FailContent, err.Error()
			break
		}
		done.PDUErrors = int32(len(refused))
		for _, r := range refused {
			n.notable.write(slog.LevelInfo, "a destination refuses an event", slog.String("destination", string(d.dest)), slog.String("event", cut(r.EventID)), slog.String("why", cut(r.Error)))
		}
	default:
		done.Detail = matrix.ErrorText(body)
	}
	return answered, done
}

// sign returns the Authorization of a transaction.
func (t *takeover) sign(d *delivery, target string) (string, error) {
	body, done, err := t.bulk.whole(d.txn.body, d.txn.size)
	defer done()
	if err != nil {
		return "", err
	}
	x, err := matrix.SignRequest(t.keys.Load().signing, string(t.origin), string(d.dest), http.MethodPut, target, body)
	if err != nil {
		return "", err
	}
	return x.String(), nil
}

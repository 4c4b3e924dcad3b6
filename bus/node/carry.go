package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// attempt is one request on its way to a remote, and its answer. The sender
// writes status, header and size before it posts Answered; nobody reads them
// earlier.
type attempt struct {
	op     bus.OpID
	class  matrix.Class
	in     *netx.Inbound // only what does not change once it is parked
	ctx    context.Context
	cancel context.CancelFunc

	status int
	header http.Header
	size   int64 // -1 when the remote does not say
	body   *netx.Body

	whole *bus.Answered // not posted yet: it goes together with Done
}

const (
	// peek429 is how much of a 429's body is read for retry_after_ms.
	peek429 = 4 << 10
	// wholeAtOnce is how large an answer's body may be that is read before the
	// core hears of its header.
	wholeAtOnce = 8 << 10
)

// run takes a request to its remote and brings the answer. It runs on a sender
// and posts exactly one Done.
func (a *attempt) run(n *Node) {
	failure, detail := n.exchange(a)
	n.end(a, failure, detail)
}

// crashed ends an attempt whose sender panicked.
func (a *attempt) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
	n.end(a, matrix.FailLocal, "internal error")
}

func (n *Node) end(a *attempt, failure matrix.Failure, detail string) {
	a.cancel()
	if a.in.Body != nil {
		a.in.Body.Release()
	}
	done := bus.Done{Op: a.op, Failure: failure, Detail: detail, Size: a.body.Size()}
	if failure == matrix.FailNone {
		_, done.Kept = a.body.Bytes()
		n.judge(a, matrix.Match(a.in.Method, a.in.Target), &done)
	} else {
		n.notable.failed(a, failure, detail)
	}
	if a.whole != nil {
		n.loop.Post(event{Event: *a.whole, then: done})
		return
	}
	n.loop.Post(event{Event: done})
}

// exchange returns how the attempt ended, having closed the body for writing.
func (n *Node) exchange(a *attempt) (failure matrix.Failure, detail string) {
	var err error
	defer func() {
		if failure != matrix.FailNone && err == nil {
			err = errors.New(detail)
		}
		a.body.CloseWrite(err)
	}()
	ep := matrix.Match(a.in.Method, a.in.Target)
	req := &netx.Request{
		Destination: a.in.Destination, Method: a.in.Method, Target: a.in.Target, Header: a.in.Header,
		Size: a.in.Size, Once: ep.Once, Priority: int(a.class),
	}
	if b := a.in.Body; b != nil {
		req.Body = b.Reader() // closed by Do
		req.GetBody = func() (io.ReadCloser, error) { return b.Reader(), nil }
	}
	resp, err := n.client.Do(a.ctx, req, func() { n.loop.Post(event{Event: bus.Connected{Op: a.op}}) })
	if err != nil {
		return netx.FailureOf(err), explain(err)
	}
	defer resp.Body.Close()
	most := n.cfg.Load().maxAnswer(ep)
	if resp.ContentLength > most {
		return matrix.FailTooLarge, fmt.Sprintf("%d bytes, %d are allowed", resp.ContentLength, most)
	}
	a.status, a.header, a.size = resp.StatusCode, resp.Header, resp.ContentLength

	answered := bus.Answered{Op: a.op, Status: resp.StatusCode, Size: resp.ContentLength}
	var rest io.Reader = resp.Body
	switch {
	case ep.Join != 0 && resp.StatusCode >= 400:
		var begin []byte
		begin, err = io.ReadAll(io.LimitReader(resp.Body, maxAside))
		answered.Code = matrix.ErrorCode(begin)
		n.loop.Post(event{Event: answered})
		if err == nil {
			err = fill(a.body, begin, resp.Body, most, nil)
		}
	case resp.StatusCode == http.StatusTooManyRequests:
		var begin []byte
		begin, err = io.ReadAll(io.LimitReader(resp.Body, peek429))
		answered.RetryAfter, _ = matrix.ParseRetryAfter(resp.Header.Get("Retry-After"), begin, time.Now())
		n.loop.Post(event{Event: answered})
		if err == nil {
			err = fill(a.body, begin, resp.Body, most, nil)
		}
	case resp.ContentLength >= 0 && resp.ContentLength <= wholeAtOnce:
		// It comes with the header, or right behind it: the loop and a replier
		// then have to be woken only once.
		err = fill(a.body, nil, resp.Body, most, nil)
		if err == nil || a.body.Size() > 0 {
			a.whole = &answered // else there is nothing to pass on, and it failed
		}
	default:
		n.loop.Post(event{Event: answered})
		if ep.Whole > 0 && resp.StatusCode == http.StatusOK {
			n.startScan(a, ep)
			rest = &progressReader{countingReader: &countingReader{r: rest}, tell: func(size int64) {
				n.loop.Post(event{Event: bus.Progress{Op: a.op, Size: size}})
			}}
		}
		err = fill(a.body, nil, rest, most, nil)
	}
	if err == nil {
		return matrix.FailNone, ""
	}
	return n.unfilled(err)
}

// unfilled says why an answer's body could not be filled.
func (n *Node) unfilled(err error) (matrix.Failure, string) {
	switch {
	case errors.Is(err, errAnswerTooLarge):
		return matrix.FailTooLarge, err.Error()
	case errors.Is(err, netx.ErrSpoolFull):
		n.trouble.spool(err)
		return matrix.FailLocal, err.Error()
	}
	return netx.FailureOf(err), explain(err)
}

var errAnswerTooLarge = errors.New("the answer's body is larger than its endpoint allows")

// fill copies an answer's body, begin first, up to a limit. makeRoom is as Body.Fill
// has it.
func fill(body *netx.Body, begin []byte, rest io.Reader, limit int64, makeRoom func() bool) error {
	if int64(len(begin)) > limit {
		return errAnswerTooLarge
	}
	all := io.MultiReader(bytes.NewReader(begin), io.LimitReader(rest, limit-int64(len(begin))))
	if _, err := body.Fill(all, makeRoom); err != nil {
		return err
	}
	var more [1]byte
	switch _, err := io.ReadFull(rest, more[:]); err {
	case io.EOF:
		return nil
	case nil:
		return errAnswerTooLarge
	default:
		return err
	}
}

// explain says what went wrong at the remote, for people.
func explain(err error) string {
	var e *netx.Error
	if errors.As(err, &e) {
		return e.Op + ": " + e.Err.Error()
	}
	return err.Error()
}

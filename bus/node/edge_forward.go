package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/store"
)

// relay is one request on its way to the homeserver, and its answer. The forwarder
// writes status, header and size before it posts Answered; nobody reads them
// earlier.
type relay struct {
	op     edge.OpID
	c      *caller
	ctx    context.Context
	cancel context.CancelFunc

	status int
	header http.Header
	size   int64 // -1 when the homeserver does not say
	body   *netx.Body
	data   []byte // of a transaction, the whole body if it is small; then body is empty

	whole *edge.Answered // not posted yet: it goes together with Done

	// Of the 200 to a transaction, before Done is posted: what it acknowledges, and the
	// PDUs that are thereby done with.
	acked []string
	pdus  []store.InboundPDU
}

func (s *edgeShell) forward(e edge.Forward) {
	c := s.requests[e.Req]
	c.hold()
	r := &relay{op: e.Op, c: c, body: s.answers.New()}
	if c.q.Body != nil {
		c.q.Body.Retain()
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	s.relays[e.Op] = r
	s.forwards.Submit(r)
}

// run takes a request to the homeserver and brings the answer. It posts exactly
// one Done.
func (r *relay) run(s *edgeShell) {
	done := s.exchange(r)
	if done.Failure == matrix.FailNone {
		r.read(s)
	}
	s.forwarded(r, done)
}

// read looks into an answer of which something is kept.
func (r *relay) read(s *edgeShell) {
	s.own.keep(r, s.n)
	if r.status == http.StatusOK {
		s.keysServed(r.c.endpoint)
	}
	if r.c.txn != nil && r.c.authentic && r.status == http.StatusOK {
		r.acknowledged(s)
	}
}

// crashed ends a relay whose forwarder panicked.
func (r *relay) crashed(s *edgeShell, err error) {
	s.n.log.Error("a worker failed", "error", err)
	s.forwarded(r, edge.Done{Failure: matrix.FailLocal, Detail: "internal error"})
}

func (s *edgeShell) forwarded(r *relay, done edge.Done) {
	r.cancel()
	if r.c.q.Body != nil {
		r.c.q.Body.Release()
	}
	done.Op = r.op
	if r.whole != nil {
		s.n.loop.Post(event{edge: *r.whole, edgeThen: done})
		return
	}
	s.post(done)
}

// perClient are headers that make an answer fit for one client only. An answer may be
// stored, or shared with others who ask for the same.
var perClient = []string{"Accept-Encoding", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range", "Range"}

// forwardedFor says for whom the bus speaks, as Synapse's x_forwarded has it.
func forwardedFor(q *netx.EdgeRequest) http.Header {
	h := q.Header.Clone()
	if h == nil {
		h = make(http.Header, 2)
	}
	if q.Client.IsValid() {
		h["X-Forwarded-For"] = []string{q.Client.String()}
	}
	// A proxy that does TLS stands in front, or the bus does.
	h["X-Forwarded-Proto"] = []string{"https"}
	return h
}

// exchange returns how the attempt ended, having closed the body for writing.
func (s *edgeShell) exchange(r *relay) (done edge.Done) {
	var err error
	done = edge.Done{Failure: matrix.FailLocal, Detail: "internal error"} // after a panic
	defer func() {
		if done.Failure != matrix.FailNone && err == nil {
			err = errors.New(done.Detail)
		}
		r.body.CloseWrite(err)
	}()
	q := r.c.q
	req := &netx.UpstreamRequest{Method: q.Method, Target: q.Target, Host: q.Host, Header: forwardedFor(q), Size: q.Size}
	for _, name := range perClient {
		delete(req.Header, name)
	}
	switch b := q.Body; {
	case b == nil:
	case r.c.endpoint.Once:
		req.Body = b.Reader() // closed by Do, and not sent again
	default:
		req.GetBody = func() (io.ReadCloser, error) { return b.Reader(), nil }
	}
	resp, err := s.upstream.Do(r.ctx, req)
	if err != nil {
		done := s.unforwarded(err)
		if done.Away {
			s.own.asked(false)
		}
		done.Final = s.stand(r.c.endpoint, q.Target) != nil
		return done
	}
	s.own.asked(true)
	defer resp.Body.Close()
	limit := s.n.cfg.Load().maxAnswer(r.c.endpoint)
	if resp.ContentLength > limit {
		return edge.Done{Failure: matrix.FailTooLarge, Detail: errAnswerTooLarge.Error()}
	}
	r.status, r.header, r.size = resp.StatusCode, resp.Header, resp.ContentLength
	answered := edge.Answered{Op: r.op, Status: resp.StatusCode}
	busy := resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable
	var begin []byte
	switch {
	case r.c.endpoint.Name == "send":
		// It has memory of its own, so that no transaction that the homeserver has
		// acknowledged fails for want of room, whatever others leave unread.
		begin, err = io.ReadAll(io.LimitReader(resp.Body, min(maxAnswerKept, limit)+1))
	case busy:
		begin, err = io.ReadAll(io.LimitReader(resp.Body, peek429))
	}
	if busy {
		answered.RetryAfter, _ = matrix.ParseRetryAfter(resp.Header.Get("Retry-After"), begin, time.Now())
	}
	switch {
	case err == nil && r.c.endpoint.Name == "send" && int64(len(begin)) <= min(maxAnswerKept, limit):
		r.data = bytes.Clone(begin) // io.ReadAll's may be much larger
		r.whole = &answered
	case err == nil && !busy && resp.ContentLength >= 0 && resp.ContentLength <= wholeAtOnce:
		err = fill(r.body, nil, resp.Body, limit, s.unread.makeRoom)
		if err == nil || r.body.Size() > 0 {
			r.whole = &answered
		}
	default:
		s.post(answered)
		if err == nil {
			err = fill(r.body, begin, resp.Body, limit, s.unread.makeRoom)
		}
	}
	if err != nil {
		return s.unforwarded(err)
	}
	return edge.Done{}
}

// unforwarded says how an attempt failed.
func (s *edgeShell) unforwarded(err error) edge.Done {
	d := edge.Done{Detail: explain(err), Away: errors.Is(err, netx.ErrUpstreamDown)}
	switch {
	case errors.Is(err, errAnswerTooLarge):
		d.Failure = matrix.FailTooLarge
	case errors.Is(err, netx.ErrSpoolFull):
		s.n.trouble.spool(err)
		d.Failure = matrix.FailLocal
	default:
		d.Failure = netx.FailureOf(err)
	}
	if e, ok := errors.AsType[*netx.Error](err); ok {
		d.Unsent = e.Unsent
	}
	return d
}

// bytes returns the whole of an answer that is small; nil if it is not.
func (r *relay) bytes() []byte {
	if r.data != nil {
		return r.data
	}
	if b, ok := r.body.Bytes(); ok {
		return bytes.Clone(b)
	}
	if r.body.Size() > maxAnswerKept {
		return nil
	}
	b, err := readBody(r.body, r.body.Size())
	if err != nil {
		return nil
	}
	return b
}

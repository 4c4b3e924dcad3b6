package node

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/netx"
)

// edgeCounts counts what the core of the edge never hears of, and how the writing
// of its answers ended.
type edgeCounts struct {
	own       atomic.Int64 // answered by the bus: well-known, keys, version
	unknown   atomic.Int64 // paths that do not exist
	malformed atomic.Int64
	denied    atomic.Int64 // their origin may not talk to us
	clients   atomic.Int64 // passed on as they are
	busy      atomic.Int64 // no room for what is in their headers and lists
	replies   replyCounts
}

// perform does one thing that the core asks for; looked is the request that has been
// looked up, if that is why. It runs on the loop's goroutine and never blocks.
func (s *edgeShell) perform(e edge.Effect, looked *caller) {
	n := s.n
	switch e := e.(type) {
	case edge.Verify:
		s.verifiers.Submit(verifyJob{c: s.requests[e.Req], mayFetch: e.MayFetch})
	case edge.Look:
		n.readers.Submit(lookJob{s, s.requests[e.Req]})
	case edge.Forward:
		s.forward(e)
	case edge.Cancel:
		s.relays[e.Op].cancel()
	case edge.Reply:
		s.reply(s.ended(e.Req), s.relays[e.Op])
	case edge.Differs:
		c := s.requests[e.Req]
		s.n.notable.write(slog.LevelWarn, "a server repeats the id of a transaction with other content, which no homeserver looks at: what it added is lost",
			slog.String("origin", string(c.auth.origin)), slog.String("transaction", cut(c.txn.ID)))
	case edge.Replay:
		body := looked.found
		if e.FromPDUs {
			body = pduAnswer(looked.acked)
		}
		s.answer(s.ended(e.Req), http.StatusOK, nil, body)
	case edge.Empty:
		s.answer(s.ended(e.Req), http.StatusOK, nil, emptyAnswer)
	case edge.Refuse:
		s.refuse(s.ended(e.Req), e)
	case edge.Record:
		s.record(e)
	case edge.Alive:
		n.loop.Inject(event{Event: bus.Alive{Server: e.Origin}})
	case edge.Free:
		c := s.requests[e.Req]
		c.q.Release()
		c.freed = true
		s.forget(e.Req, c)
	case edge.Discard:
		r := s.relays[e.Op]
		r.body.Release()
		s.drop(r.c)
		delete(s.relays, e.Op)
	case edge.Drained:
		close(s.drained)
	default:
		panic(fmt.Sprintf("node: unknown effect %T", e))
	}
}

// ended notes that a request has its answer, which holds its details until it is
// written.
func (s *edgeShell) ended(id edge.ReqID) *caller {
	c := s.requests[id]
	c.hold()
	s.end(id, c)
	return c
}

// left notes that a request no longer wants an answer.
func (s *edgeShell) left(id edge.ReqID) {
	if c := s.requests[id]; c != nil {
		s.end(id, c)
	}
}

func (s *edgeShell) end(id edge.ReqID, c *caller) {
	c.ended = true
	s.forget(id, c)
}

func (s *edgeShell) forget(id edge.ReqID, c *caller) {
	if c.ended && c.freed {
		delete(s.requests, id)
		s.drop(c)
	}
}

// gone passes on that another server no longer waits.
func (s *edgeShell) gone(q *netx.EdgeRequest) {
	if !s.clients.gone(q) {
		s.post(edge.Gone{Req: edge.ReqID(q.ID)})
	}
}

// reply has a request answered with what the homeserver said.
func (s *edgeShell) reply(c *caller, r *relay) {
	if r.data != nil {
		s.answer(c, r.status, r.header, r.data)
		return
	}
	size := r.size
	if r.body.Complete() {
		size = r.body.Size()
	}
	var from io.ReadCloser
	if b, ok := r.body.Bytes(); ok && len(b) <= wholeAtOnce {
		from = r.body.Reader() // it goes out in one piece, and counts in the spool until then
	} else {
		from = s.unread.spooled(c.client(), r.body)
	}
	s.write(c, func() error { return c.q.Stream(r.status, r.header, size, from) }, from)
}

// answer has a request answered with what is in memory.
func (s *edgeShell) answer(c *caller, status int, header http.Header, body []byte) {
	if len(body) <= wholeAtOnce {
		s.write(c, func() error { return c.q.Reply(status, header, body) }, io.NopCloser(nil))
		return
	}
	h := http.Header{"Content-Type": {"application/json"}}
	maps.Copy(h, header)
	from, size := s.unread.inMemory(c.client(), body), int64(len(body))
	s.write(c, func() error { return c.q.Stream(status, h, size, from) }, from)
}

// write has an answer written in the request's own goroutine, and closes what it is
// read from.
func (s *edgeShell) write(c *caller, do func() error, from io.Closer) {
	end := func() {
		_ = from.Close() // always nil
		s.drop(c)
	}
	err := c.q.Answer(func() {
		defer end()
		s.wrote(c, do())
	})
	if err != nil {
		end()
		s.wrote(c, err)
	}
}

func (s *edgeShell) refuse(c *caller, e edge.Refuse) {
	if e.Status >= http.StatusInternalServerError {
		if body := s.stand(c.endpoint, c.q.Target); body != nil {
			s.counts.own.Add(1)
			s.keysServed(c.endpoint)
			s.answer(c, http.StatusOK, nil, body)
			return
		}
	}
	var h http.Header
	ms := int64(0)
	if e.RetryAfter > 0 {
		h = http.Header{"Retry-After": {strconv.FormatInt(int64((e.RetryAfter+time.Second-1)/time.Second), 10)}}
		if e.Status == http.StatusTooManyRequests {
			ms = e.RetryAfter.Milliseconds()
		}
	}
	s.n.notable.write(slog.LevelDebug, "a request from outside is refused", slog.String("origin", string(c.auth.origin)),
		slog.String("endpoint", c.endpoint.Name), slog.Int("status", e.Status), slog.String("why", e.Text))
	s.answer(c, e.Status, h, errorBody(e.Code, e.Text, ms))
}

// wrote counts how the writing of an answer ended.
func (s *edgeShell) wrote(c *caller, err error) {
	r := &s.counts.replies
	switch {
	case err == nil:
		r.whole.Add(1)
	case errors.Is(err, netx.ErrClientGone):
		r.gone.Add(1)
	case errors.Is(err, netx.ErrSlowReader):
		r.slow.Add(1)
	default:
		r.cut.Add(1)
		s.n.notable.write(slog.LevelInfo, "an answer to another server was cut short", slog.String("origin", string(c.auth.origin)),
			slog.String("endpoint", c.endpoint.Name), slog.Any("why", err))
	}
}

package node

import (
	"bytes"
	"errors"
	"fmt"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/bus/matrix"
)

// verifyJob checks the signatures of a request.
type verifyJob struct {
	c        *caller
	mayFetch bool // a key that is not at hand may be asked for
	asked    bool // one was
}

// run checks the signatures and posts a verdict, or asks for a key first.
func (j verifyJob) run(s *edgeShell) {
	verdict, text, missing := s.verify(j)
	if missing != "" && j.mayFetch && !j.asked {
		s.n.loop.Post(event{wants: &keyWish{j, missing}})
		return
	}
	if missing != "" && j.asked {
		s.ring.none(j.c.auth.origin, missing)
	}
	s.post(edge.Verified{Req: edge.ReqID(j.c.q.ID), Verdict: verdict, Text: text})
}

func (j verifyJob) crashed(s *edgeShell, err error) {
	s.n.log.Error("a worker failed", "error", err)
	s.post(edge.Verified{Req: edge.ReqID(j.c.q.ID), Verdict: edge.NoKey, Text: "internal error"})
}

// keyWish is a check of signatures that waits for a key.
type keyWish struct {
	job verifyJob
	id  string
}

// wish has the outbound core fetch a key. It runs on the loop's goroutine.
func (s *edgeShell) wish(w *keyWish) bus.Event {
	s.lastKey++
	w.job.asked = true
	s.wanted[s.lastKey] = w.job
	return bus.KeyWanted{For: s.lastKey, Server: w.job.c.auth.origin, KeyID: w.id}
}

// fetched goes on with what waited for a key.
func (s *edgeShell) fetched(id uint64) {
	job, ok := s.wanted[id]
	if !ok {
		panic(fmt.Sprintf("node: key %d is here, which nobody waits for (%d do)", id, len(s.wanted)))
	}
	delete(s.wanted, id)
	s.verifiers.Submit(job)
}

// verify checks all signatures whose keys are there, as a Synapse does: each must
// be right, and there must be one at least. missing is a key that is not there and
// has not been asked for lately, if that is what is in the way.
func (s *edgeShell) verify(j verifyJob) (v edge.Verdict, text, missing string) {
	q, origin := j.c.q, j.c.auth.origin
	var body []byte
	if q.Body != nil {
		whole, done, err := s.n.bulk.whole(q.Body, q.Size)
		defer done()
		if err != nil {
			return edge.NoKey, "the body could not be read", ""
		}
		body = whole
	}
	v, text = edge.NoKey, "no key of "+string(origin)+" could be had"
	for _, x := range j.c.auth.signatures {
		public, looked, err := s.ring.find(origin, x.Key)
		switch {
		case err != nil:
			return edge.NoKey, "the keys could not be read: " + err.Error(), ""
		case public == nil:
			if !looked && missing == "" {
				missing = x.Key
			}
			continue
		}
		switch err := matrix.VerifyRequest(public, x, q.Method, q.Target, body); {
		case err == nil:
			v, text = edge.Good, ""
		case oddNumbers(body):
			// It may have been signed in another spelling of its numbers, and only what
			// is sure is called forged.
			return edge.NoKey, "the signature does not fit the body as it is spelt", ""
		case errors.Is(err, matrix.ErrSignature):
			return edge.Forged, fmt.Sprintf("the signature with %s is not that of %s", x.Key, origin), ""
		default:
			return edge.Forged, "what is signed is not JSON", ""
		}
	}
	if v == edge.Good {
		missing = ""
	}
	return v, text, missing
}

// oddNumbers reports whether a body has numbers that canonical JSON does not have,
// or writes otherwise.
func oddNumbers(body []byte) bool {
	if len(body) == 0 {
		return false
	}
	raw, err := matrix.AppendCanonical(nil, body, matrix.RawNumbers)
	if err != nil {
		return false
	}
	strict, err := matrix.CanonicalJSON(raw)
	return err != nil || !bytes.Equal(raw, strict)
}

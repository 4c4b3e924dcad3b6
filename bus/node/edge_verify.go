package node

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"time"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// verifyJob checks the signatures of a request.
type verifyJob struct {
	c        *caller
	mayFetch bool // a key that is not at hand may be asked for
	over     bool // that was tried
	asked    bool // somebody was asked for it; else it was not fetched for want of time or room
	answered bool // its server itself was, and has said what keys it has
}

// run checks the signatures and posts a verdict, or asks for a key first.
func (j verifyJob) run(s *edgeShell) {
	v := s.verify(j)
	if j.fetches(v) {
		v.wish.job = j
		s.n.loop.Post(event{wants: v.wish})
		return
	}
	if v.wish != nil && j.asked {
		s.ring.none(j.c.auth.origin, v.wish.id, j.answered)
		v.Tried, v.Lacks = true, j.answered && !v.wish.newer && len(j.c.auth.signatures) == 1
	}
	v.Req = edge.ReqID(j.c.q.ID)
	s.post(v.Verified)
}

// fetches reports whether a key is to be asked for before there is a verdict.
func (j verifyJob) fetches(v verdict) bool { return v.wish != nil && j.mayFetch && !j.over }

func (j verifyJob) crashed(s *edgeShell, err error) {
	s.n.log.Error("a worker failed", "error", err)
	s.post(edge.Verified{Req: edge.ReqID(j.c.q.ID), Verdict: edge.NoKey, Text: "internal error"})
}

// verdict is what came of a check, and a key that could change it.
type verdict struct {
	edge.Verified
	wish *keyWish
}

// keyWish is a check of signatures that waits for a key, or with newer set for one
// that is not the known one.
type keyWish struct {
	job   verifyJob
	id    string
	newer bool
}

// wish has the outbound core fetch a key. It runs on the loop's goroutine.
func (s *edgeShell) wish(w *keyWish) bus.Event {
	s.lastKey++
	s.wanted[s.lastKey] = w
	return bus.KeyWanted{For: s.lastKey, Server: w.job.c.auth.origin, KeyID: w.id, Newer: w.newer, Now: s.n.wall()}
}

// fetched goes on with what waited for a key.
func (s *edgeShell) fetched(e bus.KeyFetched) {
	w := s.wanted[e.For]
	if w == nil {
		panic(fmt.Sprintf("node: key %d is here, which nobody waits for (%d do)", e.For, len(s.wanted)))
	}
	delete(s.wanted, e.For)
	s.ring.forget(w.job.c.auth.origin, w.id)
	w.job.over, w.job.asked, w.job.answered = true, e.Asked, e.Answered
	s.verifiers.Submit(w.job)
}

// trustFor is how old what is known of a server's keys may be for a signature to be
// called forged because of it: the server may have got another key of the same name.
const trustFor = 5 * time.Minute

// verify checks all signatures whose keys are there, as a Synapse does: each must
// be right, and there must be one at least.
func (s *edgeShell) verify(j verifyJob) verdict {
	q, origin := j.c.q, j.c.auth.origin
	v := verdict{Verified: edge.Verified{Verdict: edge.NoKey, Text: "no key of " + string(origin) + " could be had", Tried: true}}
	type signed struct {
		matrix.XMatrix
		ringEntry
	}
	var known []signed
	lacked := 0
	for _, x := range j.c.auth.signatures {
		key, looked, lacks, err := s.ring.find(origin, x.Key)
		if lacks {
			lacked++
		}
		switch {
		case err != nil:
			return verdict{Verified: edge.Verified{Verdict: edge.NoKey, Text: "the keys could not be read: " + err.Error()}}
		case key.public != nil:
			known = append(known, signed{x, key})
		case !looked && v.wish == nil:
			v.wish, v.Tried = &keyWish{id: x.Key}, false
		}
	}
	if len(known) == 0 {
		v.Lacks = lacked == len(j.c.auth.signatures)
		return v
	}
	check := func(x signed, body []byte) error {
		if !j.c.unchecked {
			return matrix.VerifyRequest(x.public, x.XMatrix, q.Method, q.Target, body)
		}
		r := q.Body.Reader()
		defer r.Close()
		return matrix.VerifyRequestStream(x.public, x.XMatrix, q.Method, q.Target, r)
	}
	var body []byte
	if q.Body != nil && !j.c.unchecked {
		whole, done, err := s.bulk.whole(q.Body, q.Size)
		defer done()
		if err != nil {
			return verdict{Verified: edge.Verified{Verdict: edge.NoKey, Text: "the body could not be read"}}
		}
		body = whole
	}
	for _, x := range known {
		switch err := check(x, body); {
		case err == nil:
		case errors.Is(err, matrix.ErrNotCanonical):
			return verdict{Verified: edge.Verified{Verdict: edge.NoKey, Text: "the body is too large to be put into canonical form", Tried: true}}
		case j.c.unchecked && !errors.Is(err, matrix.ErrSignature):
			return verdict{Verified: edge.Verified{Verdict: edge.NoKey, Text: "the body could not be read"}}
		case oddNumbers(body) && errors.Is(err, matrix.ErrSignature) && fitsInPython(x.public, x.XMatrix, q, body):
		case oddNumbers(body):
			// It may have been signed in another spelling of its numbers, and only what
			// is sure is called forged.
			return verdict{Verified: edge.Verified{Verdict: edge.NoKey, Text: "the signature does not fit the body as it is spelt", Tried: true}}
		case errors.Is(err, matrix.ErrSignature) && !j.asked && s.n.wall().Sub(x.fetched).Abs() > trustFor:
			return verdict{edge.Verified{Verdict: edge.NoKey, Text: "the known key does not fit"}, &keyWish{id: x.Key, newer: true}}
		case errors.Is(err, matrix.ErrSignature):
			return verdict{Verified: edge.Verified{Verdict: edge.Forged, Text: fmt.Sprintf("the signature with %s is not that of %s", x.Key, origin)}}
		default:
			return verdict{Verified: edge.Verified{Verdict: edge.Forged, Text: "what is signed is not JSON"}}
		}
	}
	return verdict{Verified: edge.Verified{Verdict: edge.Good}}
}

// fitsInPython reports whether a signature is that of the body with its numbers as a
// Synapse reads and writes them.
func fitsInPython(key ed25519.PublicKey, x matrix.XMatrix, q *netx.EdgeRequest, body []byte) bool {
	spelt, err := matrix.AppendCanonical(nil, body, matrix.PythonNumbers)
	return err == nil && matrix.VerifyRequest(key, x, q.Method, q.Target, spelt) == nil
}

// maxOdd is the size in bytes of the largest body whose numbers are looked at.
const maxOdd = 1 << 20

// oddNumbers reports whether a body has numbers that canonical JSON does not have,
// or writes otherwise.
func oddNumbers(body []byte) bool {
	if len(body) == 0 || len(body) > maxOdd {
		return false
	}
	raw, err := matrix.AppendCanonical(nil, body, matrix.RawNumbers)
	if err != nil {
		return false
	}
	strict, err := matrix.CanonicalJSON(raw)
	return err != nil || !bytes.Equal(raw, strict)
}

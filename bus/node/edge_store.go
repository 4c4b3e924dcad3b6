package node

import (
	"encoding/binary"
	"errors"
	"slices"
	"strconv"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/store"
)

const (
	// maxAnswerKept is the largest answer to a transaction that is kept, in bytes, as
	// the store has it.
	maxAnswerKept = store.MaxInboundAnswer
	// maxEventLook is how many of the events that wait for a server are looked through
	// for one that it asks for, the newest first.
	maxEventLook = 50
)

// emptyAnswer is the answer to a transaction whose content was taken note of.
var emptyAnswer = []byte(`{"pdus":{}}`)

// lookJob looks a request up in the store.
type lookJob struct {
	s *edgeShell
	c *caller
}

func (l lookJob) run(n *Node) {
	ev := edge.Looked{Req: edge.ReqID(l.c.q.ID)}
	var err error
	if l.c.txn == nil {
		ev.Found, err = l.event()
	} else {
		err = l.transaction(&ev)
	}
	if err != nil && !errors.Is(err, store.ErrClosed) {
		n.trouble.commit(err)
	}
	n.loop.Post(event{edge: ev, caller: l.c})
}

func (l lookJob) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
	n.loop.Post(event{edge: edge.Looked{Req: edge.ReqID(l.c.q.ID)}, caller: l.c})
}

// transaction looks for what the transaction, or its PDUs, were answered before.
func (l lookJob) transaction(ev *edge.Looked) error {
	origin, t := l.c.auth.origin, l.c.txn
	since := l.s.n.clock.Now().Add(-store.InboundFor).Stored()
	a, found, err := l.s.n.store.LoadInbound(origin, t.ID, since)
	l.c.found, ev.Found = a.Answer, found
	ev.Differs = found && a.Sum != 0 && a.Sum != sumOf(t)
	if found || err != nil || t.PDUs == 0 || t.EDUs > 0 {
		return err
	}
	hashes := make([][32]byte, len(t.Hashes))
	for i, h := range t.Hashes {
		hashes[i] = h
	}
	l.c.acked, ev.AllPDUs, err = l.s.n.store.InboundPDUs(origin, hashes, since)
	return err
}

// sumOf is what is stored of the hash of a transaction's body.
func sumOf(t *edge.Txn) int64 { return int64(binary.BigEndian.Uint64(t.BodyHash[:])) }

// event looks for an event among what waits for the server that asks for it.
func (l lookJob) event() (found bool, err error) {
	err = l.s.n.store.PendingPDUs(l.c.auth.origin, maxEventLook, func(pdu []byte) (more bool, err error) {
		if !matrix.HasEventID(pdu, l.c.event) {
			return true, nil
		}
		found = true
		l.c.found = l.s.n.eventAnswer(pdu)
		return false, nil
	})
	return found, err
}

// eventAnswer is the answer to GET /event (S2S "Retrieving events").
func (n *Node) eventAnswer(pdu []byte) []byte {
	b := append([]byte(nil), `{"origin":`...)
	b = matrix.AppendString(b, string(n.cfg.Load().Homeserver.ServerName))
	b = append(b, `,"origin_server_ts":`...)
	b = strconv.AppendInt(b, n.clock.Now().Stored(), 10)
	b = append(b, `,"pdus":[`...)
	b = append(b, pdu...)
	return append(b, "]}"...)
}

// pduAnswer is the answer to a transaction whose PDUs have all been acknowledged,
// as far as their ids are known.
func pduAnswer(ids []string) []byte {
	b := append([]byte(nil), `{"pdus":{`...)
	first := true
	for _, id := range ids {
		if id == "" {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(matrix.AppendString(b, id), `:{}`...)
	}
	return append(b, "}}"...)
}

// record stores answers to transactions.
func (s *edgeShell) record(e edge.Record) {
	now := s.n.clock.Now().Stored()
	batch := &store.Batch{Inbound: make([]store.InboundTxn, 0, len(e.Answers))}
	for _, a := range e.Answers {
		row := store.InboundTxn{Origin: a.Origin, ID: a.Txn.ID, Answered: now, Answer: emptyAnswer, Sum: sumOf(a.Txn)}
		if a.Op != 0 {
			r := s.relays[a.Op]
			if r.data != nil { // else it is larger than any real one, and only that it was answered counts
				row.Answer = r.data
			}
			row.PDUs = r.pdus
		}
		batch.Inbound = append(batch.Inbound, row)
	}
	err := s.n.store.Submit(batch, func(err error) {
		s.n.trouble.commit(err)
		s.post(edge.Recorded{Batch: e.Batch, OK: err == nil})
	})
	if err != nil {
		s.n.trouble.commit(err)
		s.inject(edge.Recorded{Batch: e.Batch})
	}
}

// acknowledged finds out what the answer to a transaction acknowledges, and which
// events are missing before its PDUs. The transaction is taken apart again for that,
// as what it was made of is more than a request may hold while it waits.
func (r *relay) acknowledged(s *edgeShell) {
	t := r.c.txn
	ids, failed, ok := matrix.AcknowledgedPDUs(r.data)
	if ok {
		r.acked = ids
	}
	var pdus []matrix.PDU
	if t.PDUs > 0 {
		body, done, err := s.bulk.whole(r.c.q.Body, r.c.q.Size)
		defer done() // pdus are parts of it
		if err == nil {
			if txn, err := matrix.ParseTransaction(body); err == nil || errors.Is(err, matrix.ErrNoOrigin) {
				pdus = txn.PDUs
			}
		}
	}
	if ok && failed == 0 && len(ids) == len(t.Hashes) {
		r.pdus = settledPDUs(t, pdus, ids)
	}
	s.came(r, follows(pdus))
}

// settledPDUs returns the PDUs of a transaction of which the answer acknowledges each.
// Which of its ids is that of which PDU it does not say, so where there are several
// they are computed. One may be left without, if the homeserver knows better than we
// how its room makes ids.
func settledPDUs(t *edge.Txn, parsed []matrix.PDU, acked []string) []store.InboundPDU {
	pdus := make([]store.InboundPDU, len(t.Hashes))
	for i, h := range t.Hashes {
		pdus[i].Hash = h
	}
	if len(pdus) == 1 {
		pdus[0].EventID = acked[0]
		return pdus
	}
	for i := range parsed {
		for _, id := range matrix.EventIDs(parsed[i].Raw) {
			if slices.Contains(acked, id) {
				pdus[i].EventID = id
			}
		}
	}
	return pdus
}

// came notes for the gaps which events an answer to a transaction acknowledges.
func (s *edgeShell) came(r *relay, list []follow) {
	for _, id := range r.acked {
		s.gaps.came(mark(id))
	}
	s.gaps.note(r.c.auth.origin, list, s.n.clock.Now())
	if len(r.acked) > 0 {
		for _, room := range r.c.txn.Rooms {
			s.gaps.came(mark(room))
		}
	}
}

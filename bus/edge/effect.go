package edge

import (
	"time"

	"fsbus/bus/matrix"
)

// Effect is something that the shell must do. The set is closed.
type Effect interface{ effect() }

// Verify has the signature of a request checked. With MayFetch the key may be
// asked for from a notary and from the origin, else only what is at hand counts.
// It is answered by Verified.
type Verify struct {
	Req      ReqID
	MayFetch bool
}

// Look has the store looked through for the answer to a request, and is answered by
// Looked.
type Look struct{ Req ReqID }

// Forward sends the request held under Req to the homeserver, byte for byte. It is
// answered by Done, after at most one Answered.
type Forward struct {
	Op  OpID
	Req ReqID
}

// Cancel ends an attempt early. Its Done still comes.
type Cancel struct{ Op OpID }

// Reply answers a request with what the homeserver answered in Op, as far as it
// has arrived and then as it arrives. Several requests, all of one origin or all
// without one, may get the same Op.
type Reply struct {
	Req ReqID
	Op  OpID
}

// Replay answers a request with what its Look, or that of an equal one, found.
// FromPDUs: not with the answer to a transaction, but with a 200 for its PDUs.
type Replay struct {
	Req      ReqID
	FromPDUs bool
}

// Empty answers a transaction that held presence and typing only, and is not
// forwarded, as one whose content was taken note of: 200 {"pdus":{}}.
type Empty struct{ Req ReqID }

// Differs: a transaction has an id that its origin has used for another content, which
// counts. It is for the log, and another effect answers it.
type Differs struct{ Req ReqID }

// Refuse answers a request with an error of the bus's own.
type Refuse struct {
	Req        ReqID
	Status     int
	Code       string        // Matrix errcode
	Text       string        // for people
	RetryAfter time.Duration // of 429 and 503
}

// Record stores answers to transactions, for 24 hours, in one write, and is
// answered by Recorded.
type Record struct {
	Batch   BatchID
	Answers []Stored
}

// Stored is an answer to be stored: what Op brought, a 200; or with Op 0, Empty's.
// The hashes of those PDUs that it acknowledges without an error are stored with
// it.
type Stored struct {
	Origin matrix.ServerName
	Txn    *Txn
	Op     OpID
}

// Alive tells the outbound core that an authentic request came from a server.
type Alive struct{ Origin matrix.ServerName }

// Free lets go of the request's body: no Verify, Look or Forward will use it any
// more. Exactly one comes for each Arrived; its answer may come before or after.
type Free struct{ Req ReqID }

// Discard lets go of an attempt's answer: no Reply and no Record will use it any
// more. Exactly one comes for each Forward, after its Done. Replies that are under
// way keep what they need.
type Discard struct{ Op OpID }

// Drained says that nothing is left to do after Draining.
type Drained struct{}

func (Verify) effect()  {}
func (Look) effect()    {}
func (Forward) effect() {}
func (Cancel) effect()  {}
func (Reply) effect()   {}
func (Replay) effect()  {}
func (Empty) effect()   {}
func (Differs) effect() {}
func (Refuse) effect()  {}
func (Record) effect()  {}
func (Alive) effect()   {}
func (Free) effect()    {}
func (Discard) effect() {}
func (Drained) effect() {}

package bus

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Effect is something that the shell must do. The set is closed.
type Effect interface{ effect() }

// Send starts an attempt: the request held under Req goes to Dest, or one of the
// five below, of which one at most is set. It is answered by Done, after at most
// one Connected and one Answered.
type Send struct {
	Op    OpID
	Req   ReqID
	Dest  matrix.ServerName
	Class matrix.Class // who goes first where attempts must wait for each other

	Batch   BatchID          // the transaction packed under it
	Control string           // an empty transaction under this id, to find out whether Dest takes any
	Notary  []matrix.KeyWant // a query to the notary Dest; what is valid is stored before Done
	Origin  bool             // a query to Dest for its own keys, the same
	Ahead   bool             // nothing: a connection is made, for later
}

// Cancel ends an attempt early. Its Done still comes.
type Cancel struct{ Op OpID }

// Reply answers a request with what the remote answered in Op, as far as it
// has arrived and then as it arrives. Several requests may get the same Op.
type Reply struct {
	Req   ReqID
	Op    OpID
	Field string // only this member of the answer, if it is a 200
	From  Source
	Age   time.Duration // of an answer that is not new
}

// Source says where an answer comes from.
type Source uint8

// The sources.
const (
	FromRemote Source = iota // asked for by this request
	FromOther                // asked for by an equal one that came before
	FromCache                // known, and fresh
	FromStale                // old, but the remote does not answer
	numSources
)

// String returns the source as the header X-Cache shows it.
func (s Source) String() string { return [numSources]string{"MISS", "SHARED", "HIT", "STALE"}[s] }

// Refuse answers a request with an error of the bus's own.
type Refuse struct {
	Req        ReqID
	Status     int
	Code       string // Matrix errcode
	Text       string // for people
	RetryAfter int64  // milliseconds, for 429; 0 otherwise
}

// Free lets go of the request's body: no Send will use it any more. Exactly
// one comes for each Arrived; its Reply or Refuse may come before or after.
type Free struct{ Req ReqID }

// Discard lets go of an attempt's answer: no Reply will use it any more.
// Exactly one comes for each Send, after its Done. Replies that are under way
// keep what they need.
type Discard struct{ Op OpID }

// Commit writes the records, and the answers held under their Ops, in one
// transaction and is answered by Committed.
type Commit struct {
	Batch   BatchID
	Hosts   []HostRecord
	Answers []KeptAnswer
}

// KeptAnswer is an answer to be stored.
type KeptAnswer struct {
	AnswerRecord
	Op OpID
}

// Load has the answer that is stored under Key read, to be held under Op, and is
// answered by Loaded.
type Load struct {
	Op  OpID
	Key Key
}

// LoadKeys has the store looked through for the keys that are wanted, as they
// came through Via, and is answered by KeysLoaded. It may come once more for a
// query, after something has been fetched that may be good enough for it.
type LoadKeys struct {
	Query QueryID
	Via   matrix.ServerName
	Wants []matrix.KeyWant
}

// ReplyKeys answers a query for keys with what the store has of them.
type ReplyKeys struct {
	Req   ReqID
	Via   matrix.ServerName
	Wants []matrix.KeyWant
}

// KeyFetched says that a KeyWanted is over: what could be had is in the store. Asked
// says whether somebody was asked for it, now or within the last minute. Exactly one
// comes for each.
type KeyFetched struct {
	For   uint64
	Asked bool
	// Answered: the server itself was asked just now, and what it says of its keys is
	// valid and in the store. So what is not there it does not have.
	Answered bool
}

// JoinWindow says that the homeserver has begun to join a room, or is through with
// that: meanwhile it throws away what others send of that room.
type JoinWindow struct {
	Room string
	Open bool
}

// Accept has the store take over the transaction held under Req. It is answered
// by Accepted.
type Accept struct{ Req ReqID }

// Acknowledge tells the homeserver that its transaction is taken over. It comes
// after Accepted, never before.
type Acknowledge struct{ Req ReqID }

// Pack has the store freeze the next transaction for Dest, under the id TxnID
// unless one is frozen already, and is answered by Packed. The shell holds the
// transaction under Batch until Unpack.
type Pack struct {
	Batch    BatchID
	Dest     matrix.ServerName
	TxnID    string
	MaxBytes sched.Bytes
}

// Unpack lets go of a packed transaction: no Send will use it any more.
type Unpack struct{ Batch BatchID }

// Settle has the store note the outcome of a transaction and is answered by
// Settled.
type Settle struct {
	Batch   BatchID
	Dest    matrix.ServerName
	TxnID   string
	Outcome Outcome
	Reason  string // of Bisect, for people
}

// Compact has the store give up the events that Dest need not get after a long
// outage, and is answered by Trimmed.
type Compact struct {
	Batch BatchID
	Dest  matrix.ServerName
}

// Expire has the store give up what has waited for too long, some destinations
// at a time, and is answered by Trimmed.
type Expire struct {
	Batch BatchID
	After int64 // where the last one ended, 0 at first
}

// Drained says that nothing is left to do after Draining.
type Drained struct{}

func (Send) effect()    {}
func (Cancel) effect()  {}
func (Reply) effect()   {}
func (Refuse) effect()  {}
func (Free) effect()    {}
func (Discard) effect() {}
func (Commit) effect()  {}
func (Load) effect()    {}

func (LoadKeys) effect()  {}
func (ReplyKeys) effect() {}
func (Drained) effect()   {}

func (KeyFetched) effect() {}
func (JoinWindow) effect() {}

func (Accept) effect()      {}
func (Acknowledge) effect() {}
func (Pack) effect()        {}
func (Unpack) effect()      {}
func (Settle) effect()      {}
func (Compact) effect()     {}
func (Expire) effect()      {}

package bus

import (
	"fsbus/bus/matrix"
)

// Effect is something that the shell must do. The set is closed.
type Effect interface{ effect() }

// Send starts an attempt: the request held under Req goes to Dest. It is
// answered by Done, after at most one Connected and one Answered.
type Send struct {
	Op    OpID
	Req   ReqID
	Dest  matrix.ServerName
	Class matrix.Class // who goes first where attempts must wait for each other
}

// Cancel ends an attempt early. Its Done still comes.
type Cancel struct{ Op OpID }

// Reply answers a request with what the remote answered in Op, as far as it
// has arrived and then as it arrives. Several requests may get the same Op.
type Reply struct {
	Req ReqID
	Op  OpID
}

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

// Commit writes the records in one transaction and is answered by Committed.
type Commit struct {
	Batch BatchID
	Hosts []HostRecord
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
func (Drained) effect() {}

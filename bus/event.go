package bus

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// ReqID names one request of the homeserver; the shell chooses it and never
// uses it twice.
type ReqID uint64

// OpID names one attempt at a remote server; the core chooses it and never
// uses it twice.
type OpID uint64

// QueryID names one look-up of server keys; the core chooses it and never uses it
// twice.
type QueryID uint64

// BatchID names one commit; the core chooses it and never uses it twice.
type BatchID uint64

// Key tells equal requests: a hash over destination, method, request target
// and body.
type Key [32]byte

// Event is something that happened outside the core. The set is closed.
type Event interface{ event() }

// Arrived: the homeserver sent a request, which the shell has read in full and
// holds under its Req until Free.
type Arrived struct {
	Req      ReqID
	Dest     matrix.ServerName
	Endpoint *matrix.Endpoint
	Class    matrix.Class // the endpoint's, or by content for transactions
	Key      Key
	Received sched.Time // when its head was read; the caller's time-out runs from here

	// Of a query for one field of something, the key of the query for the whole,
	// of whose answer Field is a member. "": it is not such a query.
	Field string
	Whole Key
	// Room is the room that a join or a resync is about; "" if none.
	Room string
}

// Gone: the homeserver closed the connection of a request that has not been
// answered yet.
type Gone struct{ Req ReqID }

// Connected: an attempt has a new connection to its remote, handshake done.
// It comes at most once for an Op, before Answered and Done, and not at all
// when a connection that was open already is used.
type Connected struct{ Op OpID }

// Answered: the headers of the remote's answer are there. Its body may still
// be on the way. At most once for an Op, before Done.
type Answered struct {
	Op         OpID
	Status     int
	RetryAfter time.Duration // how long the remote asks to be left alone, 0 if it does not
	Size       int64         // of the body, -1 if the remote does not say
	Code       string        // errcode of a refusal to let join, else ""
}

// Progress: how much of an answer's body has arrived. It comes now and then for
// answers whose endpoint has a Whole, between Answered and Done.
type Progress struct {
	Op   OpID
	Size int64
}

// Loaded: an answer of an earlier time has been read from the store, and is there
// to be used until Discard; or, with OK false, there is none. Exactly one comes
// for each Load.
type Loaded struct {
	Op     OpID
	OK     bool
	Status int
	Size   int64
}

// KeyQuery is an Arrived that asks a notary for server keys: the server Dest, or
// the bus itself.
type KeyQuery struct {
	Arrived
	Own   bool
	Wants []matrix.KeyWant // by server; not changed afterwards
}

// KeysLoaded: what the store does not have of the keys of a query. Exactly one
// comes for each LoadKeys.
type KeysLoaded struct {
	Query   QueryID
	Missing []matrix.KeyWant // a part of the query's, in their order
	// Outdated are requests for the keys of a server which has signed with a key
	// that the known answers to them do not have.
	Outdated []Key
}

// KeysSeen: while an answer from a room streams through, these servers' keys have
// been seen in it, which the homeserver will ask for.
type KeysSeen struct {
	Room  string
	Wants []matrix.KeyWant // by server; not changed afterwards
}

// KeyWanted: the shell needs a key of a server to check a signature with, which it
// does not have. For is the shell's own name for that, never used twice. Newer: it has
// one, which does not fit, so what is in the store does not count.
type KeyWanted struct {
	For    uint64
	Server matrix.ServerName
	KeyID  string
	Newer  bool
	Now    matrix.Timestamp // by the system's clock, for which the key must be valid
}

// Alive: something came from a server that it has signed.
type Alive struct{ Server matrix.ServerName }

// KeyServed: another server has fetched our keys.
type KeyServed struct{}

// KeyChanged: the homeserver signs with another key from now on.
type KeyChanged struct{}

// ServersSeen: these servers are in a room that is being joined.
type ServersSeen struct {
	Room    string
	Servers []matrix.ServerName
}

// Done: an attempt is over; exactly one comes for each Send.
type Done struct {
	Op      OpID
	Failure matrix.Failure // FailNone when the whole answer has arrived
	Detail  string         // what went wrong, for people
	Size    int64          // body bytes received
	Kept    bool           // the whole body is in memory, so it may be cached
	Private bool           // it is for its caller alone, or for once
	// What the answer itself says about its age, 0 if nothing: how long it answers
	// any equal request, and how long after that if the server fails.
	Fresh, Stale time.Duration
	// Missing are the servers whose keys were asked for and not had.
	Missing []matrix.ServerName

	// Of a transaction of the outbox.
	Sent      bool  // some of it may have reached the remote
	Sends     int32 // how many times it began to go out, if it was not answered
	PDUErrors int32 // events that the remote refuses, in a transaction that it has taken
}

// Offered: the homeserver sent a transaction that the outbox can take apart,
// which the shell holds under its Req until Free.
type Offered struct {
	Req   ReqID
	Dest  matrix.ServerName
	Class matrix.Class // by its content
	Pace  PaceTxn
}

// Accepted: the store has taken a transaction over, or has not. Exactly one
// comes for each Accept.
type Accepted struct {
	Req        ReqID
	Fault      AcceptFault
	Detail     string                     // of the fault, for people
	Repeated   bool                       // it had been stored before
	Kinds      [matrix.NumKinds + 1]int32 // the items that it brought
	Merged     int32                      // those of them that took the place of others
	Duplicates int32                      // those of them that were pending already
	Backlog    Backlog                    // what is pending for the destination now
}

// HandedOver: the store has taken over what the homeserver has handed over for a
// destination; or, without a Dest, its module has asked for the bus.
type HandedOver struct {
	Dest       matrix.ServerName
	Kinds      [matrix.NumKinds + 1]int32 // the items that came
	Merged     int32                      // those of them that took the place of others
	Duplicates int32                      // those of them that were pending already
	Backlog    Backlog                    // what is pending for the destination now
}

// AcceptFault says why a transaction was not stored.
type AcceptFault uint8

// The reasons; the zero value is none.
const (
	AcceptedOK   AcceptFault = iota
	AcceptedFull             // the outbox is at one of its bounds
	AcceptedNot              // the store could not write it
)

// Packed: a transaction is frozen on disk, or could not be. Exactly one comes
// for each Pack.
type Packed struct {
	Batch    BatchID
	OK       bool
	Txn      TxnInfo                    // its ID is empty if nothing was left to send
	Expired  [matrix.NumKinds + 1]int32 // given up meanwhile
	SetAside int32                      // could not be packed
	Backlog  Backlog
}

// Settled: the outcome of a transaction is on disk, or could not be written.
// Exactly one comes for each Settle.
type Settled struct {
	Batch     BatchID
	OK        bool
	Delivered [matrix.NumKinds + 1]int32
	SetAside  int32
	Backlog   Backlog
}

// Trimmed: what is of no use any more has been given up, or could not be.
// Exactly one comes for each Compact and each Expire.
type Trimmed struct {
	Batch      BatchID
	OK         bool
	Superseded int32
	Expired    [matrix.NumKinds + 1]int32
	Changed    []QueueRecord // the destinations of which something was given up
	Next       int64         // not 0: there is more to do, from there on
}

// Pressure: for what part of the last ten seconds some task of the host waited
// for a processor, in 1/100 %.
type Pressure struct{ Hundredths int32 }

// Suspended: nothing may be delivered, for a reason in words; or, with none, it
// may again.
type Suspended struct{ Why string }

// Committed: a commit is on disk, or could not be written. Exactly one comes
// for each Commit.
type Committed struct {
	Batch BatchID
	OK    bool
}

// Restored: what the store knew when the process started. It comes first, once.
type Restored struct {
	Hosts   []HostRecord
	Queues  []QueueRecord
	Answers []AnswerRecord    // the newest first
	Notary  matrix.ServerName // the one asked last, "" if none
}

// Reconfigured: new limits, already validated.
type Reconfigured struct{ Config Config }

// Draining: the process wants to end; no Arrived and no Offered follows. What is
// stored has its answer by the moment By; no further delivery begins.
type Draining struct{ By sched.Time }

// Tick: the moment that NextWake named has come.
type Tick struct{}

func (Arrived) event()      {}
func (Progress) event()     {}
func (Loaded) event()       {}
func (KeyQuery) event()     {}
func (KeysLoaded) event()   {}
func (KeysSeen) event()     {}
func (KeyWanted) event()    {}
func (Alive) event()        {}
func (KeyServed) event()    {}
func (KeyChanged) event()   {}
func (ServersSeen) event()  {}
func (Gone) event()         {}
func (Connected) event()    {}
func (Answered) event()     {}
func (Done) event()         {}
func (Committed) event()    {}
func (Restored) event()     {}
func (Reconfigured) event() {}
func (Draining) event()     {}
func (Tick) event()         {}
func (Offered) event()      {}
func (Accepted) event()     {}
func (HandedOver) event()   {}
func (Packed) event()       {}
func (Settled) event()      {}
func (Trimmed) event()      {}
func (Pressure) event()     {}
func (Suspended) event()    {}
func (Adjusted) event()     {}
func (Flush) event()        {}

// HostRecord is what is kept of a destination over a restart. Times are the
// bus's; zero is "never".
type HostRecord struct {
	Name         matrix.ServerName
	Failures     int32 // in a row
	LastFailure  matrix.Failure
	LastStatus   int    // of the last answer, 0 when there was none
	Detail       string // of the last failure
	FirstFailure sched.Time
	LastTry      sched.Time
	NextTry      sched.Time
	LastSuccess  sched.Time
}

// AnswerRecord is what is kept of an answer over a restart, beside itself.
type AnswerRecord struct {
	Key    Key
	Stored sched.Time
	Fresh  sched.Time // until then it answers any equal request
	Stale  sched.Time // until then it answers when the host fails
}

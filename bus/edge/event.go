package edge

import (
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// ReqID names one request from the federation; the shell chooses it and never
// uses it twice.
type ReqID uint64

// OpID names one attempt at our homeserver; the core chooses it and never uses it
// twice.
type OpID uint64

// BatchID names one write of answers; the core chooses it and never uses it twice.
type BatchID uint64

// Key tells equal requests of one origin: a hash over origin, method, request
// target and body.
type Key [32]byte

// Hash is a hash over a body, or over one PDU as it stands in it.
type Hash [32]byte

// Event is something that happened outside the core. The set is closed.
type Event interface{ event() }

// Arrived: another server sent a request, which the shell has read in full and
// holds under its Req until Free. The shell has refused what is malformed, too
// large, or meant for another server.
type Arrived struct {
	Req ReqID
	// Origin is whom the X-Matrix header claims to be the sender, Keys are the keys
	// it claims to have signed with. "": there is no such header.
	Origin matrix.ServerName
	Keys   []string
	// Peer is where the connection comes from, so that one address cannot take
	// the turns of others. "": nobody knows, as behind a proxy that does not say.
	Peer string
	// Net is the network that Peer is in, where one owner has many addresses: the /48 of
	// IPv6. "": there is none to speak of.
	Net      string
	Endpoint *matrix.Endpoint
	Class    matrix.Class // the endpoint's; for transactions Txn decides
	Key      Key
	Received sched.Time // when its head was read; the sender's time-out runs from here
	Size     int64      // bytes of memory that it holds
	Txn      *Txn       // nil: it is no transaction
	// Look: it is no transaction, but the store may have the answer to it: it asks
	// for an event that the outbox has for this very origin.
	Look bool
}

// Txn is what a transaction holds. It is not changed afterwards.
type Txn struct {
	ID       string
	BodyHash Hash
	// PDUs and EDUs are how many there are.
	PDUs, EDUs int32
	// Items are what the EDUs and PDUs hold, by kind.
	Items [matrix.NumKinds + 1]int32
	// Ephemeral: it holds presence and typing, one or both, and nothing else.
	Ephemeral bool
	// Covers are hashes of the keys of its presence and typing items, ascending;
	// empty if there are none, or so many that they are not listed. It is never a
	// part of them.
	Covers []uint64
	// Expires is when the last of an Ephemeral one is of no use any more; 0: not
	// known.
	Expires sched.Time
	// Rooms are those of its PDUs.
	Rooms []string
	// Hashes are those of its PDUs, for the store.
	Hashes []Hash
}

// Gone: the sender closed the connection of a request. One that has its answer
// already may be named, too.
type Gone struct{ Req ReqID }

// Verdict says what a signature is worth.
type Verdict uint8

// The verdicts.
const (
	NoKey  Verdict = iota // no key to check it with is at hand, or could be fetched
	Good                  // it is the origin's
	Forged                // it is not: the key is there, and says so
)

// Verified: the end of a Verify. Exactly one comes for each.
type Verified struct {
	Req     ReqID
	Verdict Verdict
	Text    string // of Forged and NoKey, for people
	// Tried: of NoKey, the key was asked for, now or within the last minute, so that
	// asking again would come to nothing.
	Tried bool
	// Lacks: of NoKey, the origin's own server answered, now or within the last minute,
	// and does not have the key.
	Lacks bool
}

// Looked: what the store knows of a request. Exactly one comes for each Look.
type Looked struct {
	Req ReqID
	// Found: this origin's transaction of this id was answered before, or the store
	// has the event that is asked for, and the answer is at hand for Replay.
	Found bool
	// Differs: it was, with another body. Whoever changes what he repeats has lost that
	// with any homeserver (S2S "Transactions").
	Differs bool
	// AllPDUs: the transaction was not, but the homeserver has acknowledged each of its PDUs
	// before, byte for byte, and it has PDUs and no EDUs.
	AllPDUs bool
}

// Answered: the headers of the homeserver's answer are there. At most once for an
// Op, before Done.
type Answered struct {
	Op         OpID
	Status     int
	RetryAfter time.Duration // of a 429 or 503, 0 if it does not say
}

// Done: an attempt is over. Exactly one comes for each Forward.
type Done struct {
	Op      OpID
	Failure matrix.Failure // FailNone when the whole answer has arrived
	Detail  string         // what went wrong, for people
	Unsent  bool           // nothing of the request can have reached the homeserver
	Away    bool           // the homeserver does not listen; what was sent before that may have reached it
	Final   bool           // who asks can be answered without the homeserver, so it is not asked again
}

// Recorded: a Record is on disk, or could not be written. Exactly one comes for
// each Record.
type Recorded struct {
	Batch BatchID
	OK    bool
}

// Joining: our homeserver is about to join a room, or is through with that.
type Joining struct {
	Room string
	Open bool
}

// Pressure: for what part of the last ten seconds some task of the host waited
// for a processor, in 1/100 %.
type Pressure struct{ Hundredths int32 }

// Reconfigured: new limits, already validated.
type Reconfigured struct{ Config Config }

// Draining: the process wants to end; no Arrived follows. What is not answered by
// the moment By is refused then.
type Draining struct{ By sched.Time }

// Tick: the moment that NextWake named has come.
type Tick struct{}

func (Arrived) event()      {}
func (Gone) event()         {}
func (Verified) event()     {}
func (Looked) event()       {}
func (Answered) event()     {}
func (Done) event()         {}
func (Recorded) event()     {}
func (Joining) event()      {}
func (Pressure) event()     {}
func (Reconfigured) event() {}
func (Draining) event()     {}
func (Tick) event()         {}

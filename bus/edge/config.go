package edge

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Config bounds what the edge may do. The zero value allows nothing; start from
// Default.
type Config struct {
	// Deny and Allow are patterns of server names, without port, as in a server
	// ACL: * stands for any text, ? for one character, case does not matter. Deny
	// goes first; an empty Allow allows everybody. AllowIPLiterals lets servers in
	// that have an address for a name.
	Deny, Allow     []string
	AllowIPLiterals bool

	// NoKey says what becomes of a request whose signature cannot be checked.
	NoKey NoKeyPolicy
	// PassRate is how many of those may go on to the homeserver in a second, if
	// NoKey is PassNoKey. Beyond it they are refused.
	PassRate float64
	// KeyFetches is how many keys may be fetched in any minute to check signatures.
	// A quarter is kept for servers that are known already.
	KeyFetches int32
	// Verifying is how many signatures are checked at a time.
	Verifying int32

	// Unverified and UnverifiedBytes bound the requests that are held while their
	// signatures are checked, Requests and Bytes those that are held after that. Half of
	// Unverified may wait for keys to be fetched.
	Unverified      int32
	UnverifiedBytes sched.Bytes
	Requests        int32
	Bytes           sched.Bytes
	// Origins is how many servers are remembered. It must be above the sum of
	// Requests, Concurrency and Parallel, so that there is always one that may be
	// forgotten.
	Origins int32

	// Concurrency is how many transactions the homeserver is given at a time at
	// most, Parallel how many other requests. How many it really is follows from
	// its answer times.
	Concurrency int32
	Parallel    int32

	// OriginBytes bounds the bodies that are held of one server, TxnQueue how many of
	// its transactions wait.
	OriginBytes sched.Bytes
	TxnQueue    int32
	// OriginQueue is how many other requests of one server may wait; beyond it they
	// are answered 429. OriginParallel is how many of them run at a time. A Synapse
	// does the same at 50 and 3 (rc_federation in synapse/config/ratelimiting.py).
	OriginQueue    int32
	OriginParallel int32
	// OriginRate is how many requests of one server are forwarded in a second, with
	// OriginBurst at once. More wait. Joins do not wait, but count.
	OriginRate  float64
	OriginBurst int32

	// Ephemeral says what becomes of transactions with presence and typing only,
	// when they are many.
	Ephemeral EphemeralMode
	// EphemeralRate is how many of them the homeserver is given in a second, less
	// under pressure, and EphemeralShare what part of its time they may take by its
	// answer times, whichever is less. EphemeralHold is how long one waits before it is
	// dropped: whatever its server has for us next waits behind it. EphemeralWaiting is
	// how many may wait.
	EphemeralRate    float64
	EphemeralShare   float64
	EphemeralHold    time.Duration
	EphemeralWaiting int32

	// JoinHold is how long a transaction may be held back because our homeserver is
	// joining a room.
	JoinHold time.Duration
}

// NoKeyPolicy says what becomes of a request whose signature cannot be checked.
type NoKeyPolicy uint8

// The policies.
const (
	PassNoKey   NoKeyPolicy = iota // the homeserver may try
	RefuseNoKey                    // 401
)

var noKeyNames = []string{"pass", "refuse"}

// String returns the policy as the configuration has it.
func (p NoKeyPolicy) String() string { return name(noKeyNames, int(p)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *NoKeyPolicy) UnmarshalText(text []byte) error {
	i, err := parse(noKeyNames, string(text))
	*p = NoKeyPolicy(i)
	return err
}

// EphemeralMode says what becomes of transactions with presence and typing only.
type EphemeralMode uint8

// The modes.
const (
	PaceEphemeral EphemeralMode = iota // forwarded at a rate, and dropped if that is not enough
	PassEphemeral                      // forwarded like any other, after all others
	DropEphemeral                      // dropped
)

var ephemeralNames = []string{"pace", "pass", "drop"}

// String returns the mode as the configuration has it.
func (e EphemeralMode) String() string { return name(ephemeralNames, int(e)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (e *EphemeralMode) UnmarshalText(text []byte) error {
	i, err := parse(ephemeralNames, string(text))
	*e = EphemeralMode(i)
	return err
}

func name(names []string, i int) string {
	if i >= len(names) {
		return "invalid"
	}
	return names[i]
}

func parse(names []string, s string) (int, error) {
	for i, n := range names {
		if n == s {
			return i, nil
		}
	}
	return 0, fmt.Errorf("%q is none of %q", s, names)
}

// Default returns the limits that suit a board with four small cores.
func Default() Config {
	return Config{
		NoKey:            PassNoKey,
		PassRate:         5,
		KeyFetches:       300,
		Verifying:        64,
		Unverified:       256,
		UnverifiedBytes:  64 * sched.MiB,
		Requests:         512,
		Bytes:            64 * sched.MiB,
		Origins:          2000,
		Concurrency:      8,
		Parallel:         16,
		TxnQueue:         10,
		OriginBytes:      14 * sched.MiB,
		OriginQueue:      50,
		OriginParallel:   3,
		OriginRate:       10,
		OriginBurst:      20,
		Ephemeral:        PaceEphemeral,
		EphemeralRate:    20,
		EphemeralShare:   0.05,
		EphemeralHold:    5 * time.Second,
		EphemeralWaiting: 160,
		JoinHold:         25 * time.Second,
	}
}

// Validate reports the first limit that makes no sense or contradicts another, by
// its key in the section [edge].
func (c *Config) Validate() error {
	for _, n := range []struct {
		key   string
		value int32
		least int32
	}{
		{"key_fetches", c.KeyFetches, 4},
		{"verifying", c.Verifying, 1},
		{"unverified", c.Unverified, 8},
		{"requests", c.Requests, 8},
		{"concurrency", c.Concurrency, 1},
		{"parallel", c.Parallel, 2},
		{"transaction_queue", c.TxnQueue, 1},
		{"origin_queue", c.OriginQueue, synapseQueue},
		{"origin_parallel", c.OriginParallel, 1},
		{"origin_burst", c.OriginBurst, 1},
		{"ephemeral_waiting", c.EphemeralWaiting, 1},
	} {
		if n.value < n.least || n.value > 1_000_000 {
			return fmt.Errorf("%s is %d, it must be between %d and 1000000", n.key, n.value, n.least)
		}
	}
	for _, n := range []struct {
		key   string
		value sched.Bytes
	}{{"unverified_bytes", c.UnverifiedBytes}, {"request_bytes", c.Bytes}, {"origin_bytes", c.OriginBytes}} {
		if int64(n.value) < matrix.MaxRequestBody {
			return fmt.Errorf("%s is %s, but one request may have %d bytes", n.key, n.value, matrix.MaxRequestBody)
		}
	}
	for _, n := range []struct {
		key   string
		value float64
	}{{"pass_rate", c.PassRate}, {"origin_rate", c.OriginRate}, {"ephemeral_rate", c.EphemeralRate}} {
		if !(n.value > 0 && n.value <= 1e6) {
			return fmt.Errorf("%s is %v, it must be above 0 and at most 1000000", n.key, n.value)
		}
	}
	switch {
	case !(c.EphemeralShare > 0 && c.EphemeralShare <= 1):
		return fmt.Errorf("ephemeral_share is %v, it must be above 0 and at most 1", c.EphemeralShare)
	case int(c.NoKey) >= len(noKeyNames):
		return fmt.Errorf("no_key is %d, it must be one of %q", c.NoKey, noKeyNames)
	case int(c.Ephemeral) >= len(ephemeralNames):
		return fmt.Errorf("ephemeral is %d, it must be one of %q", c.Ephemeral, ephemeralNames)
	case int64(c.Origins) <= int64(c.Requests)+int64(c.Concurrency)+int64(c.Parallel)+maxRecording || c.Origins > 1_000_000:
		return fmt.Errorf("origins is %d, it must be above the sum of requests (%d), concurrency (%d), parallel (%d) and %d", c.Origins, c.Requests, c.Concurrency, c.Parallel, maxRecording)
	case c.EphemeralHold < time.Second || c.EphemeralHold > longestHold:
		return fmt.Errorf("ephemeral_hold is %s, it must be between 1s and %s: a sender waits for %s", c.EphemeralHold, longestHold, matrix.DefaultTimeout)
	case c.JoinHold < 0 || c.JoinHold > longestJoinHold:
		return fmt.Errorf("join_hold is %s, it must be between 0 and %s", c.JoinHold, longestJoinHold)
	}
	if err := checkPatterns("deny", c.Deny); err != nil {
		return err
	}
	return checkPatterns("allow", c.Allow)
}

const (
	// synapseQueue is how many requests of one server wait in a Synapse before it
	// answers 429 (config/ratelimiting.py, reject_limit).
	synapseQueue = 50

	// parkedPerOrigin is how many requests of one server may wait for a fetch of its
	// key, the one that it is for included.
	parkedPerOrigin = 8

	// longestHold and longestJoinHold leave time to forward within a sender's 60 s.
	longestHold     = 50 * time.Second
	longestJoinHold = 30 * time.Second

	// maxMargin is how long before the sender's time-out the bus answers at the
	// latest, so that the answer arrives in time.
	maxMargin = time.Second

	// maxWaiters bounds how many requests may wait for one attempt, crowdedWaiters when
	// half of the room for requests is taken.
	maxWaiters     = 50
	crowdedWaiters = 4

	// maxRecording is how many answers may wait for the disk. Beyond it no
	// transaction is begun.
	maxRecording = 256

	// recordAfter is how long an answer that nobody waits for may wait for others
	// to be stored with.
	recordAfter = time.Second

	// fetchWindow is the time that KeyFetches is about, fetchesPerOrigin how many
	// of them may be for one server.
	fetchWindow      = time.Minute
	fetchesPerOrigin = 3

	// aliveEvery is how often the outbound core is told that a server is alive.
	aliveEvery = 10 * time.Second

	// ageStep is how long the first request of a band waits before it may take
	// the turn of the next better one, twice that for the one above, and so on.
	// Never a join's.
	ageStep = 2 * time.Second

	// maxTries is how often a request is sent to the homeserver when nobody knows
	// what became of it; what surely did not arrive is tried until its time is up.
	maxTries = 3
	// pause is how long a transaction waits before it is sent again; after a 429
	// or 503 as long as the homeserver says, up to maxPause.
	pause    = time.Second
	maxPause = 10 * time.Second

	// slowFor is how long it is remembered of an origin that an attempt stalled. Its
	// turns come after the others' meanwhile, but for calls that have waited for
	// lateAfter.
	slowFor   = time.Minute
	lateAfter = 10 * time.Second
	// breakAfter is how long a stalled attempt has run when it may be broken off to make
	// room. As the homeserver may go on with it, no more than a lane has places, or
	// leastBreaks if that is more, are in a breakWindow.
	breakAfter  = 5 * time.Second
	breakWindow = time.Minute
	leastBreaks = 4

	// maxRun is how long an attempt that may not be broken off runs when nobody
	// waits for it.
	maxRun = 10 * time.Minute

	// A join window goes on after the answer to the join is through, as the homeserver
	// has yet to write down what it has learnt: for as long as the answer took, within
	// these.
	leastAfterJoin = 250 * time.Millisecond
	afterJoin      = 2 * time.Second
	// maxJoins bounds the rooms that are being joined.
	maxJoins = 64

	// fullRetry is the Retry-After of a refusal because the edge is full, or the
	// homeserver is away.
	fullRetry = 5 * time.Second

	// passQueue bounds the requests whose signatures could not be checked and that
	// wait to be passed on.
	passQueue = 50

	// maxPatterns bounds Deny and Allow, maxGlobs those of them that have a * or ?.
	maxPatterns = 10_000
	maxGlobs    = 200
)

// probes says how long to wait before the homeserver is tried again after it
// could not be reached.
var probes = sched.Backoff{First: 250 * time.Millisecond, Factor: 2, Cap: 2 * time.Second}

// Band is a priority class of inbound requests. Bands share the homeserver by
// weight, each with all below it keeps to a share of its lane.
type Band uint8

// The bands.
const (
	BandPDUs      Band = iota // transactions with events or to-device messages
	BandEDUs                  // transactions with device lists, receipts and whatever else
	BandEphemeral             // transactions with nothing but presence and typing
	BandJoin                  // the others by class: joins, invites, leaves, knocks
	BandEvent                 // single events and missing ones
	BandKey                   // our keys and version
	BandDevice                // devices, one-time keys
	BandLookup                // profiles, hierarchy, public rooms, media, and what could not be verified
	BandState                 // backfill, state
	NumBands      = 9
)

var bands = [NumBands]struct {
	name   string
	lane   laneID
	weight int32
	share  int64 // thousandths of the lane, for it and all below it
}{
	BandPDUs:      {"pdus", laneTxn, 16, 1000},
	BandEDUs:      {"edus", laneTxn, 6, 750},
	BandEphemeral: {"ephemeral", laneTxn, 1, 250},
	BandJoin:      {"join", laneOther, 32, 1000},
	BandEvent:     {"event", laneOther, 16, 900},
	BandKey:       {"key", laneOther, 16, 900},
	BandDevice:    {"device", laneOther, 8, 900},
	BandLookup:    {"lookup", laneOther, 4, 750},
	BandState:     {"state", laneOther, 2, 500},
}

// cheapest lists the bands in the order in which they are refused when there is no
// room.
var cheapest = [NumBands]Band{BandEphemeral, BandState, BandLookup, BandDevice, BandKey, BandEDUs, BandEvent, BandPDUs, BandJoin}

// String returns the band's name as metrics and the status page show it.
func (b Band) String() string {
	if b >= NumBands {
		return "invalid"
	}
	return bands[b].name
}

// bandOf returns the band of a request.
func bandOf(a *Arrived, unsigned bool) Band {
	if t := a.Txn; t != nil {
		switch {
		case t.PDUs > 0 || t.Items[matrix.KindPDU] > 0 || t.Items[matrix.KindToDevice] > 0:
			return BandPDUs
		case t.Ephemeral:
			return BandEphemeral
		}
		return BandEDUs
	}
	if unsigned && a.Endpoint.Kind != matrix.AnswerMedia && a.Class > matrix.ClassKey {
		return BandKey
	}
	switch a.Class {
	case matrix.ClassJoin:
		return BandJoin
	case matrix.ClassEvent:
		return BandEvent
	case matrix.ClassKey:
		return BandKey
	case matrix.ClassDevice:
		return BandDevice
	case matrix.ClassState:
		return BandState
	}
	return BandLookup
}

// deadline returns when the bus must have answered a request.
func deadline(a *Arrived) sched.Time {
	t := a.Endpoint.Timeout
	return a.Received.Add(t - min(maxMargin, t/20))
}

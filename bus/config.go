package bus

import (
	"fmt"
	"time"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// Config bounds what the core may do. The zero value allows nothing; start
// from Default.
type Config struct {
	// ClientTimeout is how long a remote has to answer a transaction, or a request for which
	// the homeserver has no time of its own: its client_timeout.
	ClientTimeout time.Duration
	// Workers is how many attempts may run at a time, all hosts together.
	Workers sched.Slots
	// Unknown is how many of them may go to hosts that have not yet answered,
	// Failing to hosts whose last attempt failed. An eighth of Workers is
	// always left to these two, the rest is for hosts that are known to work;
	// those that are slow may have five eighths.
	Unknown sched.Slots
	Failing sched.Slots

	// HostConcurrency is how many attempts at one host may run at a time. A
	// join may use all of them, events, devices and lookups one less, presence two
	// less, state and backfill three less, but each at least one. Requests for
	// keys do not count, see Keys.Parallel. Synapse
	// works on 3 requests of one origin at a time and queues 50 more
	// (rc_federation in synapse/config/ratelimiting.py).
	HostConcurrency int32
	// HostRate is how many attempts at one host may start in a second, with
	// HostBurst at once. Joins and events do not wait for it, but count;
	// transactions and keys do not. Together they are what a Synapse takes of one
	// origin without delay: 10 in any second (rc_federation). A host that answers
	// 429 gets less.
	HostRate  float64
	HostBurst int32

	// MaxRequests is how many requests of the homeserver may be waiting or
	// running; the front accepts no more than that.
	MaxRequests int32
	// MaxHosts is how many destinations are remembered. It must be above
	// MaxRequests plus three times Workers (of queues, of servers that are asked
	// for their keys, and what runs), so that there is always one that may be
	// forgotten.
	MaxHosts int32

	// CacheBytes bounds the answers that are held in memory for equal requests to
	// come, KnownAnswers those that are stored for that, at 64 bytes of memory
	// each. 0 keeps none.
	CacheBytes   sched.Bytes
	KnownAnswers int32
	// ProfileFresh is how long a profile answers further requests, ProfileStale
	// how long after that if its server does not answer.
	ProfileFresh, ProfileStale time.Duration

	// KeepFor and KeepBytes bound the whole answers to joins and for resyncs that
	// are kept in files, MediaFor and MediaBytes media. 0 keeps none.
	KeepFor    time.Duration
	KeepBytes  sched.Bytes
	MediaFor   time.Duration
	MediaBytes sched.Bytes

	// Preflight is how many servers of a joined room are connected to in a second
	// before anything is sent to them. 0 is none.
	Preflight float64

	Keys   KeysConfig
	Outbox OutboxConfig
}

// Default returns the limits that suit a board with four small cores.
func Default() Config {
	return Config{
		ClientTimeout:   matrix.DefaultTimeout,
		Workers:         100,
		Unknown:         72,
		Failing:         16,
		HostConcurrency: 4,
		HostRate:        7,
		HostBurst:       3,
		MaxRequests:     4200,
		MaxHosts:        5600,
		CacheBytes:      256 * sched.KiB,
		KnownAnswers:    10000,
		ProfileFresh:    5 * time.Minute,
		ProfileStale:    24 * time.Hour,
		KeepFor:         time.Hour,
		KeepBytes:       512 * sched.MiB,
		MediaFor:        24 * time.Hour,
		Preflight:       10,
		Keys:            KeysConfig{Batch: 50, Parallel: 10, Wait: 5 * time.Second, MaxWants: 8000},
	}
}

// KeysConfig bounds how server keys are fetched.
type KeysConfig struct {
	// OwnName is the server name under which the bus itself is a notary, "" if it
	// is none.
	OwnName matrix.ServerName
	// Batch is how many servers a notary is asked for at a time, Parallel how many
	// requests to one host for keys run at a time.
	Batch, Parallel int32
	// Wait is how long one request for keys may hold up those who wait for it.
	Wait time.Duration
	// MaxWants bounds the keys that are asked for in all. Beyond it a query is
	// carried through as it is.
	MaxWants int
}

// Validate reports the first limit that makes no sense or contradicts another.
func (c Config) Validate() error {
	switch {
	case c.Workers < 8:
		return fmt.Errorf("workers is %d, at least 8 are needed", c.Workers)
	case c.Unknown < 1 || c.Unknown > c.Workers:
		return fmt.Errorf("unknown_hosts is %d, it must be between 1 and workers (%d)", c.Unknown, c.Workers)
	case c.Failing < 1 || c.Failing > c.Workers:
		return fmt.Errorf("failing_hosts is %d, it must be between 1 and workers (%d)", c.Failing, c.Workers)
	case c.HostConcurrency < 1:
		return fmt.Errorf("host_concurrency is %d, at least 1 is needed", c.HostConcurrency)
	case !(c.HostRate > 0):
		return fmt.Errorf("host_rate is %v, it must be above 0", c.HostRate)
	case c.ClientTimeout < 10*time.Second:
		return fmt.Errorf("client_timeout is %s, at least 10s are needed", c.ClientTimeout)
	case c.HostBurst < 1:
		return fmt.Errorf("host_burst is %d, at least 1 is needed", c.HostBurst)
	case c.MaxRequests < 1:
		return fmt.Errorf("max_requests is %d, at least 1 is needed", c.MaxRequests)
	case c.CacheBytes < 0 || c.KnownAnswers < 0 || c.KeepBytes < 0 || c.MediaBytes < 0:
		return fmt.Errorf("the caches have %d bytes in memory, %d answers on disk, %d and %d bytes in files: none may be negative", c.CacheBytes, c.KnownAnswers, c.KeepBytes, c.MediaBytes)
	case c.ProfileFresh < 0 || c.ProfileStale < 0 || c.KeepFor < 0 || c.MediaFor < 0 || c.Preflight < 0:
		return fmt.Errorf("profiles are kept for %s and %s, whole answers for %s, media for %s, and %v servers are connected to in advance: none may be negative", c.ProfileFresh, c.ProfileStale, c.KeepFor, c.MediaFor, c.Preflight)
	case c.Keys.Batch < 1 || c.Keys.Parallel < 1 || c.Keys.Wait <= 0 || c.Keys.MaxWants < 1:
		return fmt.Errorf("keys are fetched %d at a time by %d requests, within %s, %d in all: each must be above 0", c.Keys.Batch, c.Keys.Parallel, c.Keys.Wait, c.Keys.MaxWants)
	case int64(c.MaxHosts) <= int64(c.MaxRequests)+3*int64(c.Workers)+aheadAtOnce:
		return fmt.Errorf("max_hosts is %d, it must be above the sum of connections (%d), three times the workers (%d) and %d", c.MaxHosts, c.MaxRequests, c.Workers, aheadAtOnce)
	case c.Outbox.MaxQueues == 0:
		return nil
	}
	return c.Outbox.Validate()
}

// What the classes get. A class gets turns in proportion to its weight, and
// together with all classes below it may hold no more than its share of the
// workers (and of those for unknown and for failing hosts): so a flood of slow
// presence transactions leaves workers for the lookups behind which a person
// waits, and those leave workers for a join.
var classes = [matrix.NumClasses + 1]struct {
	weight int32
	share  int64 // thousandths
	spare  int32 // of HostConcurrency, left to better classes
}{
	0:                    {weight: 1, share: 0},
	matrix.ClassJoin:     {weight: 32, share: 1000, spare: 0},
	matrix.ClassEvent:    {weight: 16, share: 900, spare: 1},
	matrix.ClassKey:      {weight: 16, share: 900, spare: 1},
	matrix.ClassDevice:   {weight: 8, share: 900, spare: 1},
	matrix.ClassLookup:   {weight: 4, share: 750, spare: 1},
	matrix.ClassPresence: {weight: 2, share: 500, spare: 2},
	matrix.ClassState:    {weight: 1, share: 330, spare: 3},
}

const (
	// ageStep is how long the first request of a class waits before it may
	// take the turn of the next better class, twice that for the one above,
	// and so on. Never a join's.
	ageStep = 2 * time.Second

	// pressed is how long a look-up waits before every other turn of its class
	// goes to the one that came last. In a flood that outlasts the callers'
	// time-outs the oldest are about to be given up anyway, and whoever asks
	// now need not wait behind all of them.
	pressed = time.Second

	// margin is how long before the caller's time-out the bus answers, so that
	// the answer arrives in time.
	maxMargin = time.Second

	// provenFor is how long after its last success a host still counts as
	// proven.
	provenFor = 24 * time.Hour

	// probeAgain is how long after the last attempt a request of class join
	// may try a host that is backing off: a person is waiting for it.
	probeAgain = 30 * time.Second

	// knownDead is after how many failures in a row a host is not tried for a join
	// but every probeDead.
	knownDead = 3
	probeDead = 5 * time.Minute

	// hangingFor is how long requests leave a host alone of which an attempt heard
	// nothing.
	hangingFor = 2 * time.Minute

	// slowest is the least rate to which 429s bring a host, in attempts a second,
	// and faster by how much each answer raises it again.
	slowest = 0.5
	faster  = 1.02

	// patience is how long an attempt at an unknown host may take to connect
	// while others wait for its worker. A host that needs longer is tried
	// again at leisure, among the failing ones.
	patience = 2 * time.Second

	// preflightFor is how long the first attempt at a host that is not known to work
	// keeps the others waiting: longer than a connection may take.
	preflightFor = 30 * time.Second

	// keepSuccess is how old the stored success of a host may be before it is
	// stored again. It keeps writes to an SD card few.
	keepSuccess = 6 * time.Hour

	// pause is how long a host is left alone after a 429 that does not say.
	pause = time.Second

	// softFailures is how many gateway errors or unanswered requests in a row
	// make a host a failing one. One alone may be the request's own fault.
	softFailures = 3

	// forgetScan is how many idle hosts are looked at for one to forget.
	forgetScan = 64

	// maxDetail bounds the text kept of a failure, in bytes.
	maxDetail = 200
)

// backoffs says how long a host is left alone that could not be reached. What our own
// network may have caused is tried again sooner; what needs somebody at the remote's
// side, such as a name or a certificate, later.
var backoffs = [matrix.NumFailures]sched.Backoff{
	matrix.FailRefused:     {First: 5 * time.Second, Factor: 3, Cap: maxBackoff},
	matrix.FailUnreachable: {First: 5 * time.Second, Factor: 2, Cap: 5 * time.Minute},
	matrix.FailNoName:      {First: 5 * time.Minute, Factor: 2, Cap: maxBackoff},
	matrix.FailDNS:         {First: 5 * time.Second, Factor: 2, Cap: 5 * time.Minute},
	matrix.FailTLS:         {First: time.Minute, Factor: 4, Cap: maxBackoff},
	matrix.FailTimeout:     {First: 10 * time.Second, Factor: 3, Cap: maxBackoff},
	matrix.FailReset:       {First: 5 * time.Second, Factor: 3, Cap: 30 * time.Minute},
	matrix.FailCut:         {First: 5 * time.Second, Factor: 3, Cap: 30 * time.Minute},
	matrix.FailProtocol:    {First: time.Minute, Factor: 4, Cap: maxBackoff},
	matrix.FailBlocked:     {First: 10 * time.Minute, Factor: 1, Cap: 10 * time.Minute},
}

// quietBackoff is how long a host gets no requests that has been reached, but did not
// answer the last ones, or a gateway did in its place. Transactions have a back-off of
// their own: neither says anything about the other.
var quietBackoff = sched.Backoff{First: 10 * time.Second, Factor: 2, Cap: 10 * time.Minute}

// maxBackoff is the longest of all; what the store gives back is cut to it. A server
// that is repaired must not wait for longer.
const maxBackoff = time.Hour

// deadline returns when the bus must have answered a request.
func (m *Machine) deadline(a Arrived) sched.Time {
	t := a.Endpoint.Timeout
	if t == matrix.DefaultTimeout {
		t = m.cfg.ClientTimeout
	}
	return a.Received.Add(t - min(maxMargin, t/20))
}

package sim

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus/matrix"
)

// maxTransactions bounds how many transactions one server remembers.
const maxTransactions = 64

// server is one simulated homeserver.
type server struct {
	world *World
	index int
	name  matrix.ServerName

	kind    atomic.Uint32 // a Kind; written under mu
	answers atomic.Uint64 // so far, for the jitter
	oneTime atomic.Uint64 // one-time keys handed out so far

	sendJoin atomic.Pointer[SendJoin] // nil: Config.SendJoin

	stats    ServerStats // guarded by the recorder's mutex
	requests window      // likewise

	mu           sync.Mutex // guards what follows
	listener     net.Listener
	conns        map[*conn]struct{}
	limiter      *rate.Limiter     // nil until a Limited server's first request
	certificate  *tls.Certificate  // nil until the first handshake
	key          matrix.SigningKey // zero until the first use
	published    []byte            // the key object; nil until the first use
	notarised    []byte            // the same, countersigned by the notary; nil until then
	republish    time.Time         // when both are too old
	signatures   map[string]string // by room: what the server signs events with
	transactions memory            // hash of origin and id -> hash of the body
	pdus         memory            // hash of EventID
}

// address returns the address of server i: 127.1.H.L.
func address(i int) net.IP {
	return net.IPv4(127, 1, byte(i>>8), byte(i)).To4()
}

func serverName(i, port int) matrix.ServerName {
	return matrix.ServerName(net.JoinHostPort(address(i).String(), strconv.Itoa(port)))
}

func (s *server) kindNow() Kind { return Kind(s.kind.Load()) }

// tlsCertificate returns the server's certificate, made at first use.
func (s *server) tlsCertificate() (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.certificate == nil {
		c, err := s.world.authority.certificate(s.index, address(s.index))
		if err != nil {
			return nil, err
		}
		s.certificate = c
	}
	return s.certificate, nil
}

// signingKey returns the server's key, made at first use of seed and number.
func (s *server) signingKey() matrix.SigningKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key.IsZero() {
		text := binary.BigEndian.AppendUint64([]byte("fedsim key "), s.world.config.Seed)
		seed := sha256.Sum256(binary.BigEndian.AppendUint64(text, uint64(s.index)))
		key, err := matrix.NewSigningKey(seed[:], keyVersion)
		if err != nil {
			panic(fmt.Sprintf("sim: signing key of server %d: %v", s.index, err))
		}
		s.key = key
	}
	return s.key
}

// overRate takes a request into account and returns how long the client should
// wait before it tries again, 0 if this one is welcome.
func (s *server) overRate(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.limiter == nil {
		r := s.world.config.Rate
		s.limiter = rate.NewLimiter(rate.Limit(r), max(1, int(math.Ceil(r))))
	}
	if s.limiter.AllowN(now, 1) {
		return 0
	}
	r := s.limiter.ReserveN(now, 1)
	defer r.CancelAt(now) // what is refused costs nothing
	return r.DelayFrom(now)
}

// delay returns how long the server's next answer is to take.
func (s *server) delay() time.Duration {
	c := &s.world.config
	d := c.Latency
	if c.Jitter > 0 {
		n := s.answers.Add(1)
		rng := rand.New(rand.NewPCG(c.Seed+uint64(s.index)<<32, n))
		d += time.Duration(rng.Int64N(int64(c.Jitter) + 1))
	}
	if s.kindNow() == Slow {
		d += c.SlowDelay
	}
	return d
}

package sim

import (
	"crypto/ed25519"
	"fmt"
	"math"
	"time"

	"fsbus/bus/matrix"
)

// MaxServers is how many servers the naming scheme has room for.
const MaxServers = 1 << 16

// Defaults of Config.
const (
	DefaultSlowDelay   = 5 * time.Second
	DefaultRate        = 5.0              // requests a second
	DefaultIdleTimeout = 75 * time.Second // as nginx, which most homeservers stand behind
	DefaultRemember    = 256              // PDUs
)

// Config describes a World. Only Servers must be set.
type Config struct {
	Servers int    // 1 to MaxServers
	Port    int    // every server's; 0: one that is free on all of their addresses
	Seed    uint64 // of everything that looks random, certificates excepted
	Shares  Shares // zero: all servers are well

	// Latency passes before the headers of every answer, and a part of Jitter
	// on top that differs from request to request. TCP and TLS are not delayed.
	Latency, Jitter time.Duration

	SlowDelay time.Duration // of Slow servers, on top of Latency; 0: DefaultSlowDelay

	// Rate is what one Limited server bears, in requests a second, and at most
	// this many at once (at least one). 0: DefaultRate.
	Rate float64

	// Origins are the homeservers whose requests are verified. When there are
	// any, a request to an authenticated endpoint that none of them signed is
	// answered 401. When there are none nothing is verified.
	Origins []Origin

	HTTP2       bool          // offer HTTP/2
	NoTickets   bool          // never resume a TLS session
	TLS12       bool          // TLS 1.2 and no newer
	IdleTimeout time.Duration // until an unused connection is closed; 0: DefaultIdleTimeout

	// RoomMembers is how many members the big rooms have, each on another server;
	// so many of the first servers are in them (see RoomID). 0: there are none.
	RoomMembers int
	SendJoin    SendJoin // of all servers

	// Notary makes the first server a notary that knows all keys, and well
	// whatever Shares says. NotaryLatency passes before its answers to key queries,
	// on top of Latency.
	Notary        bool
	NotaryLatency time.Duration
	KeyFault      KeyFault // of all servers' answers with keys

	// Remember is how many of the latest PDUs a server knows when they come
	// again; others are taken for new. Each costs a comparison with every new
	// one. 0: DefaultRemember.
	Remember int
}

// Origin is a homeserver that sends requests to the simulated ones.
type Origin struct {
	Name      matrix.ServerName
	KeyID     string // such as "ed25519:a_1"
	PublicKey ed25519.PublicKey
}

// withDefaults returns c, checked, with defaults in place of zero values.
func (c Config) withDefaults() (Config, error) {
	if c.Servers < 1 || c.Servers > MaxServers {
		return c, fmt.Errorf("%d servers: want 1 to %d", c.Servers, MaxServers)
	}
	if c.Port < 0 || c.Port > math.MaxUint16 {
		return c, fmt.Errorf("port %d: want 0 to %d", c.Port, math.MaxUint16)
	}
	for _, d := range []time.Duration{c.Latency, c.Jitter, c.SlowDelay, c.IdleTimeout, c.NotaryLatency} {
		if d < 0 {
			return c, fmt.Errorf("a duration of %v is negative", d)
		}
	}
	if !(c.Rate >= 0 && c.Rate <= math.MaxInt32) {
		return c, fmt.Errorf("rate of limited servers is %v: want 0 to %d a second", c.Rate, math.MaxInt32)
	}
	for _, o := range c.Origins {
		if len(o.PublicKey) != ed25519.PublicKeySize {
			return c, fmt.Errorf("public key of %s has %d bytes: want %d", o.Name, len(o.PublicKey), ed25519.PublicKeySize)
		}
	}
	if c.RoomMembers < 0 || c.RoomMembers > c.Servers {
		return c, fmt.Errorf("%d members of a room: want 0 to %d, one on each server", c.RoomMembers, c.Servers)
	}
	if err := c.SendJoin.check(); err != nil {
		return c, err
	}
	if c.KeyFault >= NumKeyFaults {
		return c, fmt.Errorf("no fault of keys has the number %d", c.KeyFault)
	}
	if c.SlowDelay == 0 {
		c.SlowDelay = DefaultSlowDelay
	}
	if c.Rate == 0 {
		c.Rate = DefaultRate
	}
	if c.Remember < 0 {
		return c, fmt.Errorf("%d PDUs to remember is negative", c.Remember)
	}
	if c.Remember == 0 {
		c.Remember = DefaultRemember
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = DefaultIdleTimeout
	}
	return c, nil
}

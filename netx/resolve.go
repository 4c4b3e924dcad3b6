package netx

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"

	"fsbus/bus/matrix"
)

// defaultPort is the port of a server for which nothing names one.
const defaultPort = 8448

// A Route is how a server is reached: what server discovery makes of its name.
type Route struct {
	// TLSName is the name that the certificate must be for, and the SNI sent.
	// An IP literal, without brackets, is checked as an address and not sent.
	TLSName string
	// HostHeader is the request's Host header.
	HostHeader string
	// Targets are where to connect, at least one. The rest stand in for those
	// that fail, in the order of Order.
	Targets []Target
	// Step is the step of S2S "Resolving server names" (v1.18) that decided,
	// such as "3.3".
	Step string
}

// A Target is a place to connect to.
type Target struct {
	Host             string // DNS name, or IP literal without brackets
	Port             uint16
	Priority, Weight uint16 // of its SRV record, as in RFC 2782; else 0
}

// delegator says which server a host's well-known document names.
type delegator interface {
	// delegation returns "" if the host has no valid document. An error means
	// that this could not be found out: the caller gave up, we are at a limit of
	// our own, or our own network or clock is not in order.
	delegation(ctx context.Context, host string) (matrix.ServerName, error)
}

// discover resolves a server name (S2S "Resolving server names", v1.18, with
// that section's numbering). It asks in the section's order, and nothing that
// the answer does not depend on. A name that cannot be resolved for now is an
// error, since another step might lead to another server than the right one.
//
// Hosts are looked up in lower case, so that caches and static addresses meet
// one spelling; the Host header keeps the spelling of the name.
func discover(ctx context.Context, name matrix.ServerName, wellKnown delegator, dns Lookup) (*Route, error) {
	// Steps 1 and 2.
	if r := explicit(name, "1", "2"); r != nil {
		return r, nil
	}
	delegated, err := wellKnown.delegation(ctx, strings.ToLower(string(name)))
	if err != nil {
		return nil, err
	}
	// Step 3. A document is not asked for again for the host it names.
	if delegated != "" {
		if r := explicit(delegated, "3.1", "3.2"); r != nil {
			return r, nil
		}
		return byService(ctx, delegated, dns, "3.3", "3.4", "3.5")
	}
	return byService(ctx, name, dns, "4", "5", "6")
}

// explicit returns the route for a name with an IP literal (in step ip) or a
// port (in step port), nil for any other.
func explicit(name matrix.ServerName, ip, port string) *Route {
	host, p, hasPort := name.Split()
	host = strings.ToLower(host)
	step := port
	switch _, isIP := name.IP(); {
	case isIP:
		step = ip
		if !hasPort {
			p = defaultPort
		}
	case !hasPort:
		return nil
	}
	return &Route{TLSName: host, HostHeader: string(name), Targets: []Target{{Host: host, Port: uint16(p)}}, Step: step}
}

// byService returns the route for a name that is neither an IP literal nor has
// a port, in one of three steps: the SRV record, its deprecated name, neither.
// A record changes where to connect and nothing else.
func byService(ctx context.Context, name matrix.ServerName, dns Lookup, fed, legacy, direct string) (*Route, error) {
	host := strings.ToLower(string(name))
	r := &Route{TLSName: host, HostHeader: string(name)}
	for _, service := range []struct{ name, step string }{{"matrix-fed", fed}, {"matrix", legacy}} {
		srvs, err := dns.SRV(ctx, service.name, "tcp", host)
		if err != nil && !isNotFound(err) {
			return nil, err
		}
		if err != nil || len(srvs) == 0 {
			continue
		}
		r.Step, r.Targets = service.step, serviceTargets(srvs)
		if len(r.Targets) == 0 {
			return nil, fmt.Errorf("_%s._tcp.%s: %w", service.name, host, errNoService)
		}
		return r, nil
	}
	r.Step, r.Targets = direct, []Target{{Host: host, Port: defaultPort}}
	return r, nil
}

// serviceTargets returns what of srvs can be connected to. A record with the
// target "." says that the service is decidedly not there (RFC 2782).
func serviceTargets(srvs []*net.SRV) []Target {
	var targets []Target
	for _, s := range srvs {
		if host := strings.TrimSuffix(s.Target, "."); host != "" && s.Port != 0 {
			targets = append(targets, Target{strings.ToLower(host), s.Port, s.Priority, s.Weight})
		}
	}
	return targets
}

// order returns targets in the order in which to try them: by priority, and at
// random by weight among equal ones (RFC 2782). It leaves targets as it is.
func order(targets []Target, random *lockedRand) []Target {
	ordered := slices.Clone(targets)
	// Records of weight 0 come first, so that they have a small chance.
	slices.SortStableFunc(ordered, func(a, b Target) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(min(a.Weight, 1), min(b.Weight, 1)))
	})
	for i := range ordered {
		// The rest of i's priority, of which one comes to i.
		end := i
		sum := 0
		for ; end < len(ordered) && ordered[end].Priority == ordered[i].Priority; end++ {
			sum += int(ordered[end].Weight)
		}
		if end == i+1 {
			continue
		}
		pick := random.intN(sum + 1)
		chosen := i
		for running := int(ordered[i].Weight); running < pick; running += int(ordered[chosen].Weight) {
			chosen++
		}
		// Move it, keeping the order of the others.
		t := ordered[chosen]
		copy(ordered[i+1:chosen+1], ordered[i:chosen])
		ordered[i] = t
	}
	return ordered
}

// lockedRand is a source of randomness that several goroutines share.
type lockedRand struct {
	mu sync.Mutex
	r  *rand.Rand
}

func newLockedRand(src rand.Source) *lockedRand {
	if src == nil {
		src = rand.NewPCG(rand.Uint64(), rand.Uint64())
	}
	return &lockedRand{r: rand.New(src)}
}

func (l *lockedRand) intN(n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.r.IntN(n)
}

// float64 returns a number in [0, 1).
func (l *lockedRand) float64() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.r.Float64()
}

// resolveError is discover's error as Do returns it.
func resolveError(ctx context.Context, err error) *Error {
	f, ok := classify(err)
	if !ok {
		f = matrix.FailDNS
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		f = matrix.FailCancelled
	}
	return &Error{Failure: f, Op: OpResolve, Unsent: true, Err: err}
}

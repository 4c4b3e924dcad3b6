package netx

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
)

// Lookup answers the DNS questions of server discovery. Names are absolute,
// with or without the final dot. A name without records is a *net.DNSError with
// IsNotFound; any other error means that there is no answer for now. Answers
// are shared: callers must not change them.
type Lookup interface {
	// IP returns the addresses of host, the preferred first.
	IP(ctx context.Context, host string) ([]netip.Addr, error)
	// SRV returns the records of _service._proto.name, in any order.
	SRV(ctx context.Context, service, proto, name string) ([]*net.SRV, error)
}

// How long a DNS answer is used. Go's resolver does not tell a record's TTL, so
// these stand in for it.
const (
	// dnsPositive is short, since a server that moves has usually lowered its
	// TTL to something like it.
	dnsPositive = 5 * time.Minute
	// dnsNoRecord is for the SRV records that most servers do not have.
	dnsNoRecord = 10 * time.Minute
	// dnsNoName is for a name without an address: long enough for one attempt at its
	// server, since when the next one is made others decide, who know that somebody
	// wants it.
	dnsNoName = 5 * time.Second
	// dnsFailed lets the requests that wait for one server share one failure.
	dnsFailed = 30 * time.Second
	// dnsStale is how old an answer may get while the name cannot be looked up,
	// so a name server's bad hour does not stop federation.
	dnsStale = time.Hour
)

// Bounds of one answer and one question.
const (
	maxAddresses  = 16 // of a name; more than one dial will ever try
	maxSRV        = 16 // records of a service
	lookupTimeout = 10 * time.Second
)

// DNSConfig configures a DNS. The zero value is usable.
type DNSConfig struct {
	// MaxConcurrent is how many questions are asked at a time; the rest wait.
	// Docker's resolver takes 100, home routers fewer, and one question means
	// two packets (A and AAAA). Default 16.
	MaxConcurrent int
	// MaxEntries and MaxBytes bound the cache. Defaults 8192 (4 questions for
	// each of 2,000 servers) and 2 MiB.
	MaxEntries int
	MaxBytes   int64
	// Now is the clock. Default time.Now.
	Now func() time.Time

	// resolver is net.Resolver, or a fake of the tests; plain the same without EDNS0.
	resolver, plain resolver
}

// resolver is what DNS needs of *net.Resolver.
type resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
}

// DNS is a Lookup over the system's name servers and hosts file, with a cache
// and a bound on the questions asked at a time. Equal questions are asked once.
// It is safe for concurrent use.
type DNS struct {
	resolver resolver
	plain    resolver // asks without EDNS0
	now      func() time.Time
	slots    slots
	flight   flight[dnsAnswer]

	mu            sync.Mutex
	cache         *lru[dnsAnswer]
	hits, lookups int64
}

// DNSStats describes a DNS.
type DNSStats struct {
	Entries int   // answers in the cache
	Bytes   int64 // their size
	Hits    int64 // questions answered from the cache
	Lookups int64 // questions asked
}

// dnsAnswer is the answer to one question: addrs or srvs, or err.
type dnsAnswer struct {
	addrs []netip.Addr
	srvs  []*net.SRV
	err   error

	expires time.Time // from then on the question is asked again
	stale   time.Time // until then addrs and srvs stand in for a failing look-up
}

// NewDNS returns a DNS with an empty cache.
func NewDNS(c DNSConfig) *DNS {
	setDefault(&c.MaxConcurrent, 16)
	setDefault(&c.MaxEntries, 8192)
	if c.MaxBytes <= 0 {
		c.MaxBytes = 2 << 20
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.resolver == nil {
		// Go's own resolver also where cgo is on: it costs no thread per question.
		c.resolver, c.plain = &net.Resolver{PreferGo: true}, withoutEDNS()
	}
	if c.plain == nil {
		c.plain = c.resolver
	}
	return &DNS{
		resolver: c.resolver,
		plain:    c.plain,
		now:      c.Now,
		slots:    newSlots(c.MaxConcurrent),
		cache:    newLRU[dnsAnswer](c.MaxEntries, c.MaxBytes),
	}
}

// Stats returns the present counts.
func (d *DNS) Stats() DNSStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return DNSStats{Entries: d.cache.len(), Bytes: d.cache.bytes, Hits: d.hits, Lookups: d.lookups}
}

// IP returns the addresses of host, or host itself if it is an IP literal.
func (d *DNS) IP(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	a, err := d.answer(ctx, "IP "+rooted(host), func(ctx context.Context) (a dnsAnswer, err error) {
		a.addrs, err = d.lookupIP(ctx, rooted(host))
		a.addrs = slices.Clone(a.addrs[:min(len(a.addrs), maxAddresses)])
		return a, err
	})
	return a.addrs, err
}

// bothWait is how long A and AAAA records may take together. Some home routers and load
// balancers never answer to AAAA; what has an A record must not wait for that (RFC 8305 3).
const bothWait = 2 * time.Second

// lookupIP asks for the addresses of a name: both kinds together, and if not both come, one
// after the other.
func (d *DNS) lookupIP(ctx context.Context, host string) ([]netip.Addr, error) {
	both, cancel := context.WithTimeout(ctx, bothWait)
	addrs, err := d.resolver.LookupNetIP(both, "ip", host)
	late := both.Err() != nil
	cancel()
	if err == nil || isNotFound(err) || ctx.Err() != nil {
		return addrs, err
	}
	if !late && !misbehaves(err) {
		return addrs, err
	}
	addrs, err = d.plain.LookupNetIP(ctx, "ip4", host)
	if isNotFound(err) || len(addrs) == 0 && err == nil {
		addrs, err = d.plain.LookupNetIP(ctx, "ip6", host)
	}
	return addrs, err
}

// misbehaves reports whether a name server answered with an error of its own, as those do
// that do not know EDNS0, and not that it cannot look the name up for now.
func misbehaves(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && !dns.IsTimeout && !dns.IsTemporary && !dns.IsNotFound
}

// SRV returns the records of _service._proto.name.
func (d *DNS) SRV(ctx context.Context, service, proto, name string) ([]*net.SRV, error) {
	question := srvQuestion + "_" + service + "._" + proto + "." + rooted(name)
	a, err := d.answer(ctx, question, func(ctx context.Context) (a dnsAnswer, err error) {
		_, a.srvs, err = d.resolver.LookupSRV(ctx, service, proto, rooted(name))
		if len(a.srvs) == 0 && misbehaves(err) {
			_, a.srvs, err = d.plain.LookupSRV(ctx, service, proto, rooted(name))
		}
		if len(a.srvs) > 0 {
			// With an error these are the records that were well-formed.
			err = nil
		}
		slices.SortStableFunc(a.srvs, func(x, y *net.SRV) int { return cmp.Compare(x.Priority, y.Priority) })
		a.srvs = slices.Clone(a.srvs[:min(len(a.srvs), maxSRV)])
		return a, err
	})
	return a.srvs, err
}

// srvQuestion begins the name of a question for SRV records in the cache.
const srvQuestion = "SRV "

// rooted makes a name absolute, so that the system's search domains are not
// tried: they would leak every server name to a local domain, and answer for it.
func rooted(name string) string {
	if strings.HasSuffix(name, ".") {
		return name
	}
	return name + "."
}

// answer returns the cached answer to question, or asks.
func (d *DNS) answer(ctx context.Context, question string, ask func(context.Context) (dnsAnswer, error)) (dnsAnswer, error) {
	if a, ok := d.cached(question); ok {
		return a, a.err
	}
	return d.flight.do(ctx, question, func(ctx context.Context) (dnsAnswer, error) {
		if a, ok := d.cached(question); ok { // the answer came while we waited to ask
			return a, a.err
		}
		if err := d.slots.acquire(ctx); err != nil {
			return dnsAnswer{}, err
		}
		defer d.slots.release()
		askCtx, cancel := share(ctx, lookupTimeout)
		defer cancel()
		a, err := ask(askCtx)
		if err != nil && ctx.Err() != nil {
			return dnsAnswer{}, err // the caller gave up: no answer
		}
		a = d.store(question, a, err)
		return a, a.err
	})
}

func (d *DNS) cached(question string) (dnsAnswer, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, ok := d.cache.get(question)
	if !ok || !d.now().Before(a.expires) {
		return dnsAnswer{}, false
	}
	d.hits++
	return a, true
}

// store puts what came of a question into the cache and returns what counts as
// its answer: a stale one, where there is one and the look-up failed for now.
func (d *DNS) store(question string, a dnsAnswer, err error) dnsAnswer {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lookups++
	now := d.now()
	switch {
	case err == nil:
		a.expires, a.stale = now.Add(dnsPositive), now.Add(dnsStale)
	case isNotFound(err):
		keep := dnsNoName
		if strings.HasPrefix(question, srvQuestion) {
			keep = dnsNoRecord
		}
		a = dnsAnswer{err: err, expires: now.Add(keep)}
	default:
		old, ok := d.cache.get(question)
		if ok && old.err == nil && now.Before(old.stale) {
			a = old
		} else {
			a = dnsAnswer{err: err}
		}
		a.expires = now.Add(dnsFailed)
	}
	bytes := int64(len(a.addrs)) * 24
	for _, s := range a.srvs {
		bytes += 40 + int64(len(s.Target))
	}
	if a.err != nil {
		bytes += 2 * int64(len(question)) // it holds the name once more
	}
	d.cache.put(question, a, bytes)
	return a
}

func isNotFound(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound
}

// notFound is the error of a name without records.
func notFound(name string) error {
	return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

// share returns a context with half of the time that ctx has left, at most d.
// What a request needs before it can be sent gets a share each, so that one
// silent name or web server leaves time for the rest, and so that its failure
// is one of its own, to be remembered, and not the caller's giving up.
func share(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		d = min(d, time.Until(deadline)/2)
	}
	return context.WithTimeout(ctx, d)
}

// Static holds addresses that are used instead of what DNS says, for servers
// on the local network and for tests. They must still pass the block-list.
// The zero value and nil hold none.
type Static struct {
	hosts   map[string]netip.Addr
	targets map[string]netip.AddrPort // by "host:port"
	names   map[string]bool           // every host of either
}

// NewStatic parses static addresses. An entry is of one of the forms
//
//	host      = address
//	host:port = address
//	host:port = address:port
//
// where an IPv6 address that a port follows stands in brackets. The error names
// the entry that is none of these.
func NewStatic(entries map[string]string) (*Static, error) {
	s := &Static{hosts: map[string]netip.Addr{}, targets: map[string]netip.AddrPort{}, names: map[string]bool{}}
	for key, value := range entries {
		if err := s.add(key, value); err != nil {
			return nil, fmt.Errorf("netx: static address %q = %q: %w", key, value, err)
		}
	}
	return s, nil
}

func (s *Static) add(key, value string) error {
	name, err := matrix.ParseServerName(strings.ToLower(key))
	if err != nil {
		return err
	}
	host, port, hasPort := name.Split()
	s.names[host] = true
	if addr, err := netip.ParseAddr(value); err == nil {
		if hasPort {
			s.targets[target(host, uint16(port))] = netip.AddrPortFrom(addr, uint16(port))
		} else {
			s.hosts[host] = addr
		}
		return nil
	}
	to, err := netip.ParseAddrPort(value)
	switch {
	case err != nil:
		return errors.New("not an IP address")
	case to.Port() == 0:
		return errors.New("port 0")
	case !hasPort:
		return errors.New("a port needs a port on the left side too")
	}
	s.targets[target(host, uint16(port))] = to
	return nil
}

func target(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// find returns where to connect to for host and port.
func (s *Static) find(host string, port uint16) (netip.AddrPort, bool) {
	if s == nil {
		return netip.AddrPort{}, false
	}
	if to, ok := s.targets[target(host, port)]; ok {
		return to, true
	}
	addr, ok := s.hosts[host]
	return netip.AddrPortFrom(addr, port), ok
}

// has reports whether there is any entry for host.
func (s *Static) has(host string) bool { return s != nil && s.names[host] }

// staticLookup is a Lookup in which names with static addresses have no SRV
// records: what DNS would say of them does not count, and where there is no DNS
// nothing must wait for it.
type staticLookup struct {
	Lookup
	static *Static
}

func (l staticLookup) SRV(ctx context.Context, service, proto, name string) ([]*net.SRV, error) {
	if l.static.has(name) {
		return nil, notFound(name)
	}
	return l.Lookup.SRV(ctx, service, proto, name)
}

package netx

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"fsbus/bus/matrix"
)

const (
	// attemptDelay is how long an attempt to connect is left alone before the
	// next address is tried beside it (RFC 8305 section 5, "Connection Attempt
	// Delay").
	attemptDelay = 250 * time.Millisecond
	// maxAttempts is how many attempts of one dial run at a time. With more, a
	// name with many dead addresses would cost more connections than it is worth.
	maxAttempts = 2
	// dialTimeout bounds one dial as a whole: look-ups, attempts and handshakes
	// of all targets, however long the request itself may take.
	dialTimeout = 30 * time.Second
	// maxTargets is how many targets of a route one dial tries.
	maxTargets = 8
)

// The protocols to offer.
var (
	alpnAny   = []string{"h2", "http/1.1"}
	alpnHTTP1 = []string{"http/1.1"}
)

// A dialer makes TLS connections along a Route.
type dialer struct {
	lookup   Lookup
	static   *Static
	block    *Blocklist
	random   *lockedRand
	shakes   *handshakes
	tls      *tls.Config    // with a ClientSessionCache, without ServerName and NextProtos
	small    *quirk[string] // certificate names whose servers get a small ClientHello
	proxy    *Proxy         // nil: there is none
	connect  time.Duration
	shake    time.Duration
	now      func() time.Time
	reached  atomic.Int64 // when a server was connected to last, Unix ns; 0: none was
	counters dialCounters

	// connectTo makes a TCP connection. It is a field for the tests, which
	// count and delay attempts.
	connectTo func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
}

// dialCounters count what a dialer has done.
type dialCounters struct {
	attempts   atomic.Int64 // TCP connections attempted
	handshakes atomic.Int64 // TLS handshakes that succeeded
	resumed    atomic.Int64 // of which were resumptions
	refused    atomic.Int64 // addresses that the block-list refused
	open       atomic.Int64 // connections open now
	peak       atomic.Int64 // and the most there were
}

// dial connects to the first target of r that takes the connection and shows
// the right certificate. Its errors are *Error. If every target fails the first
// one's error counts, as with Synapse, unless that was only the block-list's.
func (d *dialer) dial(ctx context.Context, r *Route, alpn []string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var first *Error
	for i, t := range order(r.Targets, d.random) {
		if i >= maxTargets {
			break
		}
		conn, err := d.dialTarget(ctx, r.TLSName, t, alpn)
		if err == nil {
			return conn, nil
		}
		if first == nil || first.Failure == matrix.FailBlocked {
			first = err
		}
		if ctx.Err() != nil || err.Failure == matrix.FailLocal {
			break
		}
	}
	if first == nil {
		panic("netx: a route without targets")
	}
	return nil, first
}

func (d *dialer) dialTarget(ctx context.Context, tlsName string, t Target, alpn []string) (*tls.Conn, *Error) {
	proxied := d.proxied(t)
	var addrs []netip.AddrPort
	var err error
	if !proxied || !d.proxy.names || isLiteral(t.Host) {
		if addrs, err = d.addresses(ctx, t); err != nil {
			return nil, dialError(ctx, OpResolve, err)
		}
	}
	reach := func() (net.Conn, error) {
		if proxied {
			return d.through(ctx, t, addrs)
		}
		return d.race(ctx, addrs)
	}
	raw, err := reach()
	if err != nil {
		return nil, dialError(ctx, OpConnect, err)
	}
	cost := d.cost(tlsName)
	if err := d.shakes.wait(ctx, cost); err != nil {
		_ = raw.Close()
		return nil, dialError(ctx, OpTLS, err)
	}
	small := d.small.has(tlsName)
	conn, err := d.handshake(ctx, raw, tlsName, alpn, small)
	if err != nil && !small && cutShort(err) {
		// Some firewalls reset what does not fit into one packet.
		if raw, again := reach(); again == nil {
			d.shakes.charge(fullCost)
			if conn, err = d.handshake(ctx, raw, tlsName, alpn, true); err == nil {
				d.small.note(tlsName)
			}
		}
	}
	if cost < fullCost && (err != nil || !conn.ConnectionState().DidResume) {
		// The remote chose a full one, or may have before it failed.
		d.shakes.charge(fullCost - cost)
	}
	if err != nil {
		return nil, dialError(ctx, OpTLS, err)
	}
	return conn, nil
}

// proxied reports whether a target is reached through the proxy: all are but those with a
// static address, which are near.
func (d *dialer) proxied(t Target) bool {
	if d.proxy == nil {
		return false
	}
	_, static := d.static.find(t.Host, t.Port)
	return !static
}

func isLiteral(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// cost is what a handshake with tlsName counts for: less if there is a session
// to resume. Sessions are kept under Config.ServerName. If a release of Go does
// that in another way, all handshakes count as full ones.
func (d *dialer) cost(tlsName string) int {
	if c, ok := d.tls.ClientSessionCache.(*sessionCache); ok && c.has(tlsName) {
		return resumedCost
	}
	return fullCost
}

// dialError is the error of a dial that failed in step op.
func dialError(ctx context.Context, op string, err error) *Error {
	f, known := classify(err)
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		f = matrix.FailCancelled
	case op == OpTLS && (!known || f == matrix.FailReset || f == matrix.FailProtocol):
		// Whatever breaks or confuses a handshake. crypto/tls has few exported
		// types for what the remote can do wrong.
		f = matrix.FailTLS
	case !known:
		f = matrix.FailLocal
	}
	return &Error{Failure: f, Op: op, Unsent: true, Err: err}
}

// addresses returns what t's name stands for and may be dialled, in the order
// of preference.
func (d *dialer) addresses(ctx context.Context, t Target) ([]netip.AddrPort, error) {
	found, err := d.find(ctx, t)
	if err != nil {
		return nil, err
	}
	var allowed []netip.AddrPort
	seen := make(map[netip.AddrPort]bool, len(found))
	for _, a := range found {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if seen[a] {
			continue
		}
		seen[a] = true
		if d.block.Allowed(a.Addr()) {
			allowed = append(allowed, a)
		} else {
			d.counters.refused.Add(1)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("%s: %w", t.Host, errNoAddress)
	case len(allowed) == 0:
		return nil, fmt.Errorf("%s: %w", t.Host, errBlocked)
	}
	return interleave(allowed), nil
}

func (d *dialer) find(ctx context.Context, t Target) ([]netip.AddrPort, error) {
	if to, ok := d.static.find(t.Host, t.Port); ok {
		return []netip.AddrPort{to}, nil
	}
	if a, err := netip.ParseAddr(t.Host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a, t.Port)}, nil
	}
	ips, err := d.lookup.IP(ctx, t.Host)
	if err != nil {
		return nil, err
	}
	found := make([]netip.AddrPort, 0, len(ips))
	for _, a := range ips[:min(len(ips), maxAddresses)] {
		found = append(found, netip.AddrPortFrom(a, t.Port))
	}
	return found, nil
}

// interleave alternates between the two address families, beginning with that
// of the preferred address (RFC 8305 section 4).
func interleave(addrs []netip.AddrPort) []netip.AddrPort {
	var first, second []netip.AddrPort
	for _, a := range addrs {
		if a.Addr().Is4() == addrs[0].Addr().Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	mixed := make([]netip.AddrPort, 0, len(addrs))
	for i := range max(len(first), len(second)) {
		if i < len(first) {
			mixed = append(mixed, first[i])
		}
		if i < len(second) {
			mixed = append(mixed, second[i])
		}
	}
	return mixed
}

// race connects to the first of addrs that answers (RFC 8305): an attempt that
// fails, or takes longer than attemptDelay, is followed by the next, at most
// maxAttempts at a time. When race returns no attempt is left: those that lost
// have ended and their connections are closed.
//
// It starts a goroutine for each attempt, since that is what there is to wait
// for two connects at once; a single address is tried in the caller's own.
func (d *dialer) race(ctx context.Context, addrs []netip.AddrPort) (net.Conn, error) {
	if len(addrs) == 1 {
		return d.attempt(ctx, addrs[0])
	}
	type result struct {
		conn net.Conn
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan result)
	running, next := 0, 0
	start := func() {
		to := addrs[next]
		next++
		running++
		go func() {
			conn, err := d.attempt(ctx, to)
			results <- result{conn, err}
		}()
	}
	defer func() {
		cancel()
		for ; running > 0; running-- {
			if r := <-results; r.conn != nil {
				_ = r.conn.Close()
			}
		}
	}()

	timer := time.NewTimer(attemptDelay)
	defer timer.Stop()
	var failed error
	start()
	for running > 0 {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				return r.conn, nil
			}
			failed = worse(failed, r.err)
			if ctx.Err() != nil {
				return nil, failed
			}
		case <-timer.C:
		}
		if next < len(addrs) && running < maxAttempts {
			start()
			timer.Reset(attemptDelay)
		}
	}
	return nil, failed
}

// worse returns the error that says more about a remote of which all addresses
// fail: the first, but not that there is no way to it if another address shows
// that there is one, as on a host without IPv6.
func worse(a, b error) error {
	if a == nil || weight(b) > weight(a) {
		return b
	}
	return a
}

// weight orders what attempts end with by how far they show a way to lead.
func weight(err error) int {
	switch {
	case FailureOf(err) != matrix.FailUnreachable:
		return 3 // to the remote, or as far as anybody can tell
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EHOSTDOWN):
		return 2 // out of here
	case ownNetwork(err):
		return 1 // nowhere
	}
	return 0 // perhaps it is only this address, or this machine has no IPv6
}

// attempt makes one TCP connection.
func (d *dialer) attempt(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.connect)
	defer cancel()
	d.counters.attempts.Add(1)
	conn, err := d.connectTo(ctx, to)
	if err != nil {
		return nil, err
	}
	d.reached.Store(d.now().UnixNano())
	return d.counted(conn), nil
}

// upFor is for how long after a server was connected to our network counts as up.
const upFor = time.Minute

// up reports whether our network works.
func (d *dialer) up() bool {
	at := d.reached.Load()
	return at != 0 && d.now().Sub(time.Unix(0, at)) < upFor
}

// connectTCP is what connectTo is outside of tests. The block-list has its
// last word on the very address that the kernel is given.
func (d *dialer) connectTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	nd := net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
		a, err := netip.ParseAddrPort(address)
		if err != nil || !d.block.Allowed(a.Addr()) {
			return errBlocked
		}
		return nil
	}}
	return nd.DialContext(ctx, "tcp", to.String())
}

// smallHello are the key exchanges with which a ClientHello fits into one packet: without
// the hybrid one, whose share has 1,200 bytes.
var smallHello = []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384}

// cutShort reports whether a handshake ended without a word of the remote's.
func cutShort(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EPIPE)
}

// handshake makes a TLS connection of raw, or closes it. With small its first message fits
// into one packet.
func (d *dialer) handshake(ctx context.Context, raw net.Conn, tlsName string, alpn []string, small bool) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.shake)
	defer cancel()
	config := d.tls.Clone()
	// crypto/tls checks an IP literal against the certificate's addresses and
	// sends no SNI for it (S2S "TLS").
	config.ServerName = tlsName
	config.NextProtos = alpn
	if small {
		config.CurvePreferences = smallHello
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		now := time.Now
		if config.Time != nil {
			now = config.Time
		}
		return nil, blameClock(err, now(), knownPast())
	}
	d.counters.handshakes.Add(1)
	if conn.ConnectionState().DidResume {
		d.counters.resumed.Add(1)
	}
	return conn, nil
}

// counted returns conn, counted as open until it is closed.
func (d *dialer) counted(conn net.Conn) net.Conn {
	n := d.counters.open.Add(1)
	for {
		peak := d.counters.peak.Load()
		if n <= peak || d.counters.peak.CompareAndSwap(peak, n) {
			break
		}
	}
	return &countedConn{Conn: conn, open: &d.counters.open}
}

type countedConn struct {
	net.Conn
	once  sync.Once
	open  *atomic.Int64
	meter meter
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if flood := c.meter.saw(n); flood != nil {
		return 0, flood
	}
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	if flood := c.meter.wrote(len(p)); flood != nil {
		return 0, flood
	}
	return c.Conn.Write(p)
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

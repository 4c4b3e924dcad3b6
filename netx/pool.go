package netx

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
)

// connector makes HTTP connections over a dialer's.
//
// Of net/http's Transport it uses the two protocols and not the pool. That one
// does not count HTTP/2 connections as idle ones: it forgets those beyond
// MaxIdleConns without closing them, so a burst to a thousand servers leaves a
// thousand connections. It also repeats requests by rules of its own, and lets
// a dial outlive the request that it is for.
type connector struct {
	transport *http.Transport
}

// dialRequest tells the transport's dial function what to dial. It travels in
// the context, the only way there is.
type dialRequest struct {
	route *Route
	alpn  []string
	http2 bool // set by the dial, as is wire
	wire  *remoteWire
	cc    *http.ClientConn // what was made of it
}

type dialRequestKey struct{}

func newConnector(d *dialer, maxHeaderBytes int64) *connector {
	return &connector{&http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			q := ctx.Value(dialRequestKey{}).(*dialRequest)
			conn, err := d.dial(ctx, q.route, q.alpn)
			if err != nil {
				return nil, err
			}
			q.http2 = conn.ConnectionState().NegotiatedProtocol == "h2"
			top, wire := newRemoteWire(conn)
			q.wire = wire
			return top, nil
		},
		ForceAttemptHTTP2:      true, // it is off by default beside DialTLSContext
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
		// Heads are small and bodies bypass these. Each KiB less is 2 MiB less
		// for a thousand connections.
		WriteBufferSize: 2 << 10,
		ReadBufferSize:  2 << 10,
		// A stream's window is what one slow reader of ours can make the remote
		// fill memory with. 256 KiB carry 20 Mbit/s at 100 ms.
		HTTP2: &http.HTTP2Config{
			MaxReceiveBufferPerStream:     256 << 10,
			MaxReceiveBufferPerConnection: 512 << 10,
			MaxDecoderHeaderTableSize:     4 << 10,
			MaxEncoderHeaderTableSize:     4 << 10,
			// No pings: their timer holds all of a connection's memory for
			// 15 s after its end, which at 50 new ones a second is 20 MiB. A
			// connection that died without a word is given up with the first
			// request that gets no answer on it.
			WriteByteTimeout: 30 * time.Second,
		},
		// The rest stays off: no proxy from the environment, no Expect, no
		// time-out for the answer's header, which the request's context bounds.
	}}
}

// open makes a connection. Its errors are *Error.
func (c *connector) open(ctx context.Context, r *Route, alpn []string) (*http.ClientConn, error) {
	q, err := c.openProtocol(ctx, r, alpn)
	return q.cc, err
}

// openProtocol makes a connection, and tells what it is like.
func (c *connector) openProtocol(ctx context.Context, r *Route, alpn []string) (q *dialRequest, err error) {
	q = &dialRequest{route: r, alpn: alpn}
	// The address is for the dial function, which knows better.
	q.cc, err = c.transport.NewClientConn(context.WithValue(ctx, dialRequestKey{}, q), "https", "remote:0")
	if err != nil {
		var known *Error
		if !errors.As(err, &known) {
			err = dialError(ctx, OpTLS, err) // HTTP/2's first frames
		}
		return q, err
	}
	return q, nil
}

// poolKey says which requests may share a connection: those to one server, as
// long as discovery leads to the same certificate and Host header. A change of
// delegation takes effect with the next request.
type poolKey struct {
	server        matrix.ServerName
	tlsName, host string
}

// pool keeps connections that are in no use for the next request to the same
// server: few, and not for long, since each costs 30 to 50 KB, and a cached TLS
// session makes a new one cheap. It is safe for concurrent use.
type pool struct {
	maxIdle, perHost int
	timeout          time.Duration
	reused           atomic.Int64

	mu    sync.Mutex
	conns map[poolKey][]*poolConn // that may take a request, the oldest first
	idle  list.List               // of *poolConn, the longest idle last
	timer *time.Timer             // for the longest idle; nil if there is none
}

// poolConn is a connection of a pool.
type poolConn struct {
	*http.ClientConn
	key   poolKey
	http2 bool
	wire  *remoteWire // nil: nothing is measured

	// Guarded by the pool's mutex.
	active  int           // requests
	pooled  bool          // in pool.conns
	element *list.Element // in pool.idle, or nil
	since   time.Time     // idle
}

func newPool(maxIdle, perHost int, timeout time.Duration) *pool {
	return &pool{maxIdle: maxIdle, perHost: perHost, timeout: timeout, conns: make(map[poolKey][]*poolConn)}
}

// get returns a kept connection with a place reserved for one request, or nil.
func (p *pool) get(key poolKey) *poolConn {
	p.mu.Lock()
	var found *poolConn
	var dead []*poolConn
	for _, c := range slices.Backward(slices.Clone(p.conns[key])) {
		if c.Err() != nil {
			p.removeLocked(c)
			dead = append(dead, c)
			continue
		}
		if c.Reserve() == nil {
			c.active++
			p.busyLocked(c)
			found = c
			break
		}
	}
	p.mu.Unlock()
	closeAll(dead)
	if found != nil {
		p.reused.Add(1)
	}
	return found
}

// add takes in a new connection with a place reserved for one request.
func (p *pool) add(cc *http.ClientConn, key poolKey, http2 bool, wire *remoteWire) *poolConn {
	c := &poolConn{ClientConn: cc, key: key, http2: http2, wire: wire, active: 1, pooled: true}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[key] = append(p.conns[key], c)
	return c
}

// put ends a request on c. Unless it is good for another one, c takes no more
// requests and is closed with the last.
func (p *pool) put(c *poolConn, good bool) {
	p.mu.Lock()
	if c.active <= 0 {
		p.mu.Unlock()
		panic("netx: a connection put back more often than taken")
	}
	c.active--
	if !good || c.Err() != nil {
		p.removeLocked(c)
	}
	var surplus []*poolConn
	if c.active == 0 {
		switch {
		case !c.pooled || c.Available() == 0:
			// Either side wants no more on it, or an HTTP/1 answer was not read
			// to its end.
			p.removeLocked(c)
			surplus = append(surplus, c)
		default:
			surplus = p.idleLocked(c)
		}
	}
	p.mu.Unlock()
	closeAll(surplus)
}

// idleLocked keeps c, and returns what is too many now.
func (p *pool) idleLocked(c *poolConn) (surplus []*poolConn) {
	c.since = time.Now()
	c.element = p.idle.PushFront(c)
	same := 0
	for _, other := range slices.Backward(slices.Clone(p.conns[c.key])) {
		if other.element == nil {
			continue
		}
		if same++; same > p.perHost {
			p.removeLocked(other)
			surplus = append(surplus, other)
		}
	}
	for p.idle.Len() > p.maxIdle {
		last := p.idle.Back().Value.(*poolConn)
		p.removeLocked(last)
		surplus = append(surplus, last)
	}
	p.scheduleLocked()
	return surplus
}

// scheduleLocked sets the timer for the longest idle connection.
func (p *pool) scheduleLocked() {
	if p.idle.Len() == 0 {
		if p.timer != nil {
			p.timer.Stop()
			p.timer = nil
		}
		return
	}
	if p.timer == nil {
		last := p.idle.Back().Value.(*poolConn)
		p.timer = time.AfterFunc(time.Until(last.since.Add(p.timeout)), p.expire)
	}
}

// expire closes what has been idle for too long.
func (p *pool) expire() {
	p.mu.Lock()
	p.timer = nil
	var old []*poolConn
	for now := time.Now(); p.idle.Len() > 0; {
		last := p.idle.Back().Value.(*poolConn)
		if now.Sub(last.since) < p.timeout {
			break
		}
		p.removeLocked(last)
		old = append(old, last)
	}
	p.scheduleLocked()
	p.mu.Unlock()
	closeAll(old)
}

// closeIdle closes all that are in no use.
func (p *pool) closeIdle() {
	p.mu.Lock()
	var all []*poolConn
	for p.idle.Len() > 0 {
		c := p.idle.Back().Value.(*poolConn)
		p.removeLocked(c)
		all = append(all, c)
	}
	p.scheduleLocked()
	p.mu.Unlock()
	closeAll(all)
}

// busyLocked takes c from the idle ones.
func (p *pool) busyLocked(c *poolConn) {
	if c.element != nil {
		p.idle.Remove(c.element)
		c.element = nil
	}
}

// removeLocked sees to it that c gets no more requests.
func (p *pool) removeLocked(c *poolConn) {
	p.busyLocked(c)
	if !c.pooled {
		return
	}
	c.pooled = false
	rest := p.conns[c.key]
	i := slices.Index(rest, c)
	if rest = slices.Delete(rest, i, i+1); len(rest) > 0 {
		p.conns[c.key] = rest
	} else {
		delete(p.conns, c.key)
	}
}

// closeAll closes connections. It is called without the pool's lock: closing
// writes to the remote.
func closeAll(conns []*poolConn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

// idleCount returns how many connections are in no use.
func (p *pool) idleCount() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle.Len()
}

// newTLSConfig returns what all TLS connections have in common.
func newTLSConfig(c *ClientConfig) *tls.Config {
	return &tls.Config{
		MinVersion:            tls.VersionTLS12,
		RootCAs:               c.CAs,
		ClientSessionCache:    newSessionCache(c.SessionCache, c.SessionBytes),
		VerifyPeerCertificate: checkChain,
	}
}

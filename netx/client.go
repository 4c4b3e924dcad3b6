package netx

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
)

// ClientConfig configures a Client. The zero value is usable and safe.
type ClientConfig struct {
	// CAs are the certificate authorities to trust; CAPool adds some to the
	// system's. Default: the system's.
	CAs *x509.CertPool
	// Blocklist decides which addresses may be dialled, those of well-known
	// documents, redirects and SRV records included. Default: DefaultBlocklist.
	Blocklist *Blocklist
	// Static holds addresses that go before DNS. Default: none.
	Static *Static
	// Lookup answers DNS questions. Default: a DNS with MaxDNS.
	Lookup Lookup
	// MaxDNS is DNSConfig.MaxConcurrent of the default Lookup.
	MaxDNS int

	// HandshakesPerSecond paces TLS handshakes, by Request.Priority. A full
	// handshake costs 1 to 3 ms of a fast core, so the default of 20 is 5 % of
	// one, and about half of a Raspberry Pi's. One that resumes a session counts
	// for 4 tenths. Negative: no limit.
	HandshakesPerSecond float64
	// MaxIdle and MaxIdlePerHost are how many connections are kept for further
	// requests, in all and for one server. A kept connection costs 30 to 50 KB
	// and up to 2 goroutines: 64 are 2 to 3 MB. Defaults 64 and 2. Negative:
	// none.
	MaxIdle, MaxIdlePerHost int
	// IdleTimeout is how long a connection is kept. Most servers keep one for
	// 60 to 75 s; a little less saves requests sent into a closing one. Default
	// 55 s.
	IdleTimeout time.Duration

	// ConnectTimeout bounds each TCP connect, HandshakeTimeout each TLS
	// handshake. Defaults 5 s and 10 s. All of a request's attempts to connect
	// have 30 s together.
	ConnectTimeout, HandshakeTimeout time.Duration
	// BodyTimeout is how long a Read of an answer's body waits for its next
	// byte. Default 60 s, which is Synapse's.
	BodyTimeout time.Duration
	// MaxHeaderBytes bounds an answer's header, which besides has 128 fields at most.
	// HTTP/2 counts 32 bytes more for each field. Default 32 KiB.
	MaxHeaderBytes int64

	// SessionBytes is how many bytes the TLS sessions take that are remembered, at about
	// 5 KiB each. 0 means 1 MiB.
	SessionBytes int64
	// SessionCache is how many those are at most.
	// A resumption costs a fifth to two thirds of a full handshake. Default 1000.
	SessionCache int
	// WellKnownCache is how many hosts' well-known outcomes are remembered, at
	// most 700 bytes each. Default 4096.
	WellKnownCache int

	// Proxy is what connects to servers in place of the client. Default none.
	Proxy *Proxy

	// UserAgent is sent with the client's own requests, which are those for
	// well-known documents. Default: none is sent.
	UserAgent string
	// Rand is the source for SRV weights and for the jitter of cache ages.
	// Default: a random seed.
	Rand rand.Source
	// Now is the clock of the caches. Default time.Now.
	Now func() time.Time
}

// CAPool returns the system's certificate authorities and those in pem.
func CAPool(pem []byte) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("netx: system's certificate authorities: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("netx: no PEM certificate in the file of certificate authorities")
	}
	return pool, nil
}

// A Client sends requests to remote servers. It is safe for concurrent use.
//
// It starts no goroutine of its own but those of a dial (see dialer.race);
// net/http has two for each HTTP/1 connection, one for each HTTP/2 connection
// and one for each request on it.
type Client struct {
	exchange
	dialer    *dialer
	connector *connector
	wellKnown *wellKnown
	lookup    Lookup
	dns       *DNS            // the Lookup, if it is one
	http1     *quirk[poolKey] // servers whose HTTP/2 is broken
}

// exchange sends requests on the connections of a pool.
type exchange struct {
	pool        *pool
	bodyTimeout time.Duration // how long a Read of an answer's body waits
}

// NewClient returns a Client with empty caches.
func NewClient(c ClientConfig) *Client {
	if c.Blocklist == nil {
		var err error
		if c.Blocklist, err = NewBlocklist(DefaultBlocklist(), nil); err != nil {
			panic(err)
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Lookup == nil {
		c.Lookup = NewDNS(DNSConfig{MaxConcurrent: c.MaxDNS, Now: c.Now})
	}
	if c.HandshakesPerSecond == 0 {
		c.HandshakesPerSecond = 20
	}
	if c.MaxIdle == 0 {
		c.MaxIdle = 64
	}
	if c.MaxIdlePerHost == 0 {
		c.MaxIdlePerHost = 2
	}
	if c.MaxHeaderBytes <= 0 {
		c.MaxHeaderBytes = 32 << 10
	}
	setDefault(&c.IdleTimeout, 55*time.Second)
	setDefault(&c.ConnectTimeout, 5*time.Second)
	setDefault(&c.HandshakeTimeout, 10*time.Second)
	setDefault(&c.BodyTimeout, 60*time.Second)
	setDefault(&c.SessionCache, 1000)
	setDefault(&c.SessionBytes, 1<<20)
	setDefault(&c.WellKnownCache, 4096)

	if c.Proxy != nil && c.Proxy.names {
		c.Lookup = proxyLookup{c.Lookup}
	}
	random := newLockedRand(c.Rand)
	d := &dialer{
		lookup:  c.Lookup,
		static:  c.Static,
		block:   c.Blocklist,
		random:  random,
		shakes:  newHandshakes(c.HandshakesPerSecond),
		tls:     newTLSConfig(&c),
		small:   newQuirk[string](c.Now),
		proxy:   c.Proxy,
		connect: c.ConnectTimeout,
		shake:   c.HandshakeTimeout,
		now:     c.Now,
	}
	d.connectTo = d.connectTCP
	connector := newConnector(d, c.MaxHeaderBytes)
	fetcher := &wellKnownFetcher{open: connector.open, now: c.Now, userAgent: c.UserAgent}
	dns, _ := c.Lookup.(*DNS)
	known := newWellKnown(c.WellKnownCache, c.Now, random, fetcher.fetch)
	known.up = d.up
	return &Client{
		exchange: exchange{
			pool:        newPool(max(c.MaxIdle, 0), max(c.MaxIdlePerHost, 0), c.IdleTimeout),
			bodyTimeout: c.BodyTimeout,
		},
		dialer:    d,
		connector: connector,
		wellKnown: known,
		lookup:    staticLookup{c.Lookup, c.Static},
		dns:       dns,
		http1:     newQuirk[poolKey](c.Now),
	}
}

// A Request is what Do sends.
type Request struct {
	// Destination is the server, by the name that the homeserver used.
	Destination matrix.ServerName
	// Method and Target, which is the path and the query, reach the remote as
	// they are here, to the byte: they are signed.
	Method, Target string
	// Header is sent but for what is about a single connection (RFC 9110
	// section 7.6.1), Proxy-*, Expect and Host. Nothing is added to it that
	// HTTP does not demand. It is not changed.
	Header http.Header
	// Body has exactly Size bytes. Size 0 is no body, and Size -1 is a body of
	// unknown size. If Body is an io.Closer, its Close may be called while Read
	// runs and must end it; Do closes it in all cases. Body is not used any
	// more once Do has failed or the answer's body is closed.
	Body io.Reader
	Size int64
	// GetBody opens the body again, from its start. If it is nil, and there is
	// a body, the request cannot use a kept connection.
	GetBody func() (io.ReadCloser, error)
	// Once is for a request that must never reach the remote twice.
	Once bool
	// Priority says who gets the next handshake when many wait: lower goes
	// first, 0 to 15.
	Priority int
}

// Do sends r and returns the answer when its header is there, whatever its
// status: redirects are answers too. The caller closes the answer's body. ctx
// bounds everything, the reading of that body included, and ending it breaks
// off whatever is under way.
//
// connected, if not nil, is called at most once, from Do, when a new connection
// to the remote is usable, and before any of the request goes out on it. A kept
// connection does not count: it proves little. So a request may have reached the
// remote without a call of connected: whether it may have is what Error.Unsent
// says.
//
// Every error, of Do and of the answer's body, is or wraps an *Error.
//
// A request goes out once, with two exceptions. A kept connection may be closed
// by the remote at any moment, also while a request is on its way into it. So
// a request that fails on a kept connection before any byte of an answer is
// sent again, on a new connection. A request with Once set, or with a body that
// cannot be opened again, therefore takes a new connection at once. And where a new
// connection speaks HTTP/2 and breaks that, a request that may be repeated, or was certainly
// not processed (RFC 9113 8.7), goes out once more over HTTP/1.1, as does what follows for a
// while. Error.Sends says how often it went out.
func (c *Client) Do(ctx context.Context, r *Request, connected func()) (*http.Response, error) {
	body := &requestBody{reader: r.Body, size: r.Size}
	defer func() { _ = body.Close() }() // harmless once an answer owns the body in use
	ctx = withPriority(ctx, r.Priority)
	req, err := prepare(r)
	if err != nil {
		return nil, &Error{Failure: matrix.FailLocal, Op: OpPrepare, Unsent: true, Err: err}
	}
	route, err := discover(ctx, r.Destination, c.wellKnown, c.lookup)
	if err != nil {
		return nil, resolveError(ctx, err)
	}
	req.Host, req.URL.Host = route.HostHeader, route.HostHeader
	key := poolKey{r.Destination, route.TLSName, route.HostHeader}

	var first *Error // of a connection before
	var sends int32
	if !r.Once && (r.Size == 0 || r.GetBody != nil) {
		if conn := c.pool.get(key); conn != nil {
			resp, again, e := c.send(ctx, conn, req, body)
			sends++
			if e == nil {
				body = nil
				return resp, nil
			}
			if e.Sends = sends; !again {
				return nil, e
			}
			first = e
			if body, err = r.again(); err != nil {
				return nil, &Error{Failure: matrix.FailLocal, Op: OpPrepare, Sends: sends, Err: err}
			}
		}
	}
	for broken := false; ; broken = true {
		conn, err := c.connect(ctx, route, key)
		if err != nil {
			if first != nil {
				err = afterFirst(first, err)
			}
			return nil, err
		}
		if connected != nil {
			connected()
			connected = nil
		}
		resp, again, e := c.send(ctx, conn, req, body)
		sends++
		if e == nil {
			body = nil
			return resp, nil
		}
		e.Sends = sends
		if broken { // HTTP/2 is what it should be able to do
			return nil, &Error{Failure: first.Failure, Op: first.Op, Sends: sends, Err: fmt.Errorf("%w; then, over HTTP/1.1, %w", first.Err, e.Err)}
		}
		if !conn.http2 || !again || !brokenHTTP2(e) {
			return nil, e
		}
		// What it offers does not work. HTTP/1.1 may.
		c.http1.note(key)
		if r.Once || r.Size != 0 && r.GetBody == nil || !r.repeatable() && !unprocessed(e) {
			return nil, e
		}
		first = e
		if body, err = r.again(); err != nil {
			return nil, &Error{Failure: matrix.FailLocal, Op: OpPrepare, Sends: sends, Err: err}
		}
	}
}

// again returns the body once more, from its start.
func (r *Request) again() (*requestBody, error) {
	if r.Size == 0 {
		return &requestBody{reader: r.Body}, nil
	}
	reader, err := r.GetBody()
	return &requestBody{reader: reader, size: r.Size}, err
}

// repeatable reports whether a request may arrive twice (RFC 9110 9.2.2). A transaction's
// PUT may, under its id.
func (r *Request) repeatable() bool {
	return r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodPut
}

// afterFirst is the error of a request that was sent on a kept connection, which
// ended with first, and for which a new one could not be made, which ended with
// second. It may have arrived, whatever became of the remote since.
func afterFirst(first *Error, second error) *Error {
	e := &Error{Failure: FailureOf(second), Op: OpRequest, Sends: first.Sends, Err: fmt.Errorf("%w; then %w", first, second)}
	if e.Failure.NeverConnected() {
		e.Failure = FailureOf(first)
	}
	return e
}

// connect makes a new connection with a place reserved for one request.
func (c *Client) connect(ctx context.Context, route *Route, key poolKey) (*poolConn, error) {
	alpn := alpnAny
	if c.http1.has(key) {
		alpn = alpnHTTP1
	}
	q, err := c.connector.openProtocol(ctx, route, alpn)
	if err != nil {
		return nil, err
	}
	if err := q.cc.Reserve(); err != nil {
		// Closed already: the way in which TLS 1.3 refuses a client.
		_ = q.cc.Close()
		e := requestError(ctx, err, false)
		e.Unsent = true
		return nil, e
	}
	return c.pool.add(q.cc, key, q.http2, q.wire), nil
}

// send sends req on conn, which has a place reserved for it. again reports
// that it failed before the remote said anything, with ctx and body unharmed, and
// not of a flood, which another connection would only bring again.
func (x *exchange) send(ctx context.Context, conn *poolConn, req *http.Request, body *requestBody) (resp *http.Response, again bool, failed *Error) {
	var answered atomic.Bool
	sendCtx, cancel := context.WithCancelCause(ctx)
	req = req.WithContext(httptrace.WithClientTrace(sendCtx, &httptrace.ClientTrace{
		GotFirstResponseByte: func() { answered.Store(true) },
	}))
	if req.ContentLength != 0 {
		req.Body = body
	}
	conn.wire.request()
	resp, err := conn.RoundTrip(req)
	if err == nil && (resp.StatusCode < http.StatusOK || resp.StatusCode > 999) { // nobody asked for 101, and the others are none
		_ = resp.Body.Close()
		err = errNotFinal
	}
	if err == nil {
		if err = checkFields(resp.Header); err != nil {
			_ = resp.Body.Close()
		}
	}
	if err != nil {
		cancel(nil)
		e := sentError(ctx, err, answered.Load())
		_ = body.Close()
		if bodyErr := body.failure(); bodyErr != nil {
			e = &Error{Failure: matrix.FailLocal, Op: OpPrepare, Err: bodyErr}
		}
		// An HTTP/2 connection outlives a request that was our own fault. One
		// on which no answer came is suspect: a remote that went away leaves it
		// looking sound.
		x.pool.put(conn, conn.http2 && e.Failure == matrix.FailLocal)
		again = !answered.Load() && ctx.Err() == nil && e.Failure != matrix.FailLocal && !errors.Is(err, errFlood)
		return nil, again, e
	}
	resp.Body = newAnswerBody(ctx, sendCtx, cancel, conn.wire.measured(resp.Body), x.bodyTimeout, func(err error) {
		_ = body.Close()
		x.pool.put(conn, err == nil)
	})
	return resp, false, nil
}

// requestError is the error of a request that got no answer. answered says
// whether the remote sent anything.
func requestError(ctx context.Context, err error, answered bool) *Error {
	f, known := classify(err)
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		f = matrix.FailCancelled
	case ctx.Err() != nil:
		f = matrix.FailTimeout
	case known:
	case answered:
		f = matrix.FailProtocol
	default:
		f = matrix.FailReset
	}
	return &Error{Failure: f, Op: OpRequest, Err: err}
}

// sentError is the error of a request that may have reached the remote: never a
// failure that says that it cannot have. On a connection in use the kernel may
// report what else a connect ends with, and the remote may send an alert.
func sentError(ctx context.Context, err error, answered bool) *Error {
	e := requestError(ctx, err, answered)
	switch {
	case e.Failure == matrix.FailTLS:
		e.Failure = matrix.FailProtocol
	case e.Failure.NeverConnected():
		e.Failure = matrix.FailReset
	}
	return e
}

// prepare makes an http.Request of r, without Host, context and body.
func prepare(r *Request) (*http.Request, error) {
	if !isToken(r.Method) || r.Method == "CONNECT" {
		return nil, fmt.Errorf("method %q", r.Method)
	}
	if r.Size != 0 && r.Body == nil {
		return nil, fmt.Errorf("no body, but size %d", r.Size)
	}
	u, err := requestURL(r.Target)
	if err != nil {
		return nil, err
	}
	header := endToEnd(r.Header)
	delete(header, "Expect")
	delete(header, "Host")
	for name, values := range header {
		if !isToken(name) {
			return nil, fmt.Errorf("header name %q", name)
		}
		for _, v := range values {
			if strings.ContainsFunc(v, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
				return nil, fmt.Errorf("value of header %s", name) // which may be a secret
			}
		}
	}
	if len(header["User-Agent"]) == 0 {
		header["User-Agent"] = nil // keeps net/http from sending its own
	}
	return &http.Request{Method: r.Method, URL: u, Header: header, ContentLength: r.Size}, nil
}

// isToken reports whether s is a token (RFC 9110 section 5.6.2), as methods and
// header names are.
func isToken(s string) bool {
	const marks = "!#$%&'*+-.^_`|~"
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') && strings.IndexByte(marks, c) < 0 {
			return false
		}
	}
	return s != ""
}

// requestURL returns a URL that net/http sends as target, to the byte, over
// HTTP/1.1 and HTTP/2.
//
// An opaque URL does that, except that one which begins with "//" goes out in
// absolute form. Such a path goes into Path and RawPath instead, and is refused
// if it holds a byte that net/url would escape there. No path of Matrix begins
// like this.
func requestURL(target string) (*url.URL, error) {
	if err := checkTarget(target); err != nil {
		return nil, err
	}
	if len(target) < 2 || target[1] != '/' {
		return &url.URL{Scheme: "https", Opaque: target}, nil
	}
	path, query, hasQuery := strings.Cut(target, "?")
	unescaped, err := url.PathUnescape(path)
	if err != nil {
		return nil, errors.New("bad escape in a request target that begins with two slashes")
	}
	u := &url.URL{Scheme: "https", Path: unescaped, RawPath: path, RawQuery: query, ForceQuery: hasQuery}
	if u.RequestURI() != target {
		return nil, errors.New("a byte that must be escaped in a request target that begins with two slashes")
	}
	return u, nil
}

// checkTarget refuses what is no path, and the bytes that would end a request
// target: what follows would be taken for the rest of the request's head.
func checkTarget(target string) error {
	if target == "" || target[0] != '/' {
		return errors.New("the request target does not begin with a slash")
	}
	for i := range len(target) {
		if c := target[i]; c <= ' ' || c == 0x7f {
			return fmt.Errorf("byte %#02x in the request target", c)
		}
	}
	return nil
}

// CloseIdle closes the connections that are in no use.
func (c *Client) CloseIdle() { c.pool.closeIdle() }

// ClientStats describes a Client. All but Idle, Open and the caches' entries
// only grow.
type ClientStats struct {
	Dials      int64 // TCP connections attempted
	Handshakes int64 // TLS handshakes that succeeded
	Resumed    int64 // of which were resumptions
	Reused     int64 // requests sent on a kept connection
	Blocked    int64 // addresses that the block-list refused

	Open     int64 // connections open now
	PeakOpen int64 // the most there were
	Idle     int   // connections kept for further requests

	WellKnownEntries int   // hosts of which the outcome is remembered
	WellKnownHits    int64 // times that it was used
	WellKnownFetches int64 // times that it was sought

	DNS DNSStats // zero if the Lookup is no DNS
}

// Stats returns the present counts.
func (c *Client) Stats() ClientStats {
	n := &c.dialer.counters
	s := ClientStats{
		Dials:      n.attempts.Load(),
		Handshakes: n.handshakes.Load(),
		Resumed:    n.resumed.Load(),
		Reused:     c.pool.reused.Load(),
		Blocked:    n.refused.Load(),
		Open:       n.open.Load(),
		PeakOpen:   n.peak.Load(),
		Idle:       c.pool.idleCount(),
	}
	s.WellKnownEntries, s.WellKnownHits, s.WellKnownFetches = c.wellKnown.stats()
	if c.dns != nil {
		s.DNS = c.dns.Stats()
	}
	return s
}

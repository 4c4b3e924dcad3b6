package netx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"fsbus/bus/matrix"
)

// ErrUpstreamDown is wrapped, below an *Error, by the error of a request for
// which nobody listened on the homeserver's address: it is stopped, or starting.
var ErrUpstreamDown = errors.New("the homeserver is down")

var errHeaderTimeout = errors.New("no answer in time")

// UpstreamConfig configures an Upstream. Address is required.
type UpstreamConfig struct {
	// Address is where the homeserver's federation listener is:
	// "http://host:port" or "unix:/absolute/path".
	Address string
	// MaxConns bounds the connections, and so the requests that the homeserver
	// has at a time; further ones wait. Each costs about 20 KiB and two
	// goroutines. 0 means 16.
	MaxConns int
	// ConnectTimeout bounds a connect. 0 means 5 s.
	ConnectTimeout time.Duration
	// HeaderTimeout bounds the time from a request's first byte until its
	// answer's header is there. 0 leaves it to each request's context.
	HeaderTimeout time.Duration
	// StallTimeout is how long a Read of an answer's body waits for its next
	// byte. 0 means 60 s.
	StallTimeout time.Duration
	// IdleTimeout is how long a connection is kept: less than the 60 s after
	// which Twisted closes it. 0 means 50 s.
	IdleTimeout time.Duration
	// MaxHeaderBytes bounds an answer's header. 0 means 64 KiB.
	MaxHeaderBytes int64
	// Logger is told when the homeserver goes down and when it is back. nil
	// discards it.
	Logger *slog.Logger
}

// An Upstream sends requests to the homeserver, over HTTP/1.1 connections that
// are kept. It uses no proxy, follows no redirect, decompresses nothing and
// adds nothing to a request that HTTP does not demand. It is safe for concurrent
// use and starts no goroutine; net/http has two for each connection.
type Upstream struct {
	exchange
	cfg              UpstreamConfig
	network, address string
	transport        *http.Transport
	slots            slots

	down               atomic.Bool // as far as the last connect said
	dials, repeats     atomic.Int64
	active, mostActive int // guarded by mu
	mu                 sync.Mutex
}

// UpstreamStats describes an Upstream. Dials, Reused and Repeats only grow.
type UpstreamStats struct {
	Active     int   // requests that have a place: sent, or about to be
	PeakActive int   // the most there were
	Idle       int   // connections kept for further requests
	Dials      int64 // connections attempted
	Reused     int64 // requests sent on a kept connection
	Repeats    int64 // of which were sent a second time, on a new one
	Down       bool  // the last connect was refused
}

// NewUpstream returns an Upstream that has no connection yet. The error says
// what is wrong with the address.
func NewUpstream(c UpstreamConfig) (*Upstream, error) {
	network, address, err := upstreamAddress(c.Address)
	if err != nil {
		return nil, fmt.Errorf("netx: upstream %q: %w", c.Address, err)
	}
	setDefault(&c.MaxConns, 16)
	setDefault(&c.ConnectTimeout, 5*time.Second)
	setDefault(&c.StallTimeout, 60*time.Second)
	setDefault(&c.IdleTimeout, 50*time.Second)
	if c.MaxHeaderBytes <= 0 {
		c.MaxHeaderBytes = 64 << 10
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	u := &Upstream{
		exchange: exchange{pool: newPool(c.MaxConns, c.MaxConns, c.IdleTimeout), bodyTimeout: c.StallTimeout},
		cfg:      c,
		network:  network,
		address:  address,
		slots:    newSlots(c.MaxConns),
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	u.transport = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return u.dial(ctx) },
		Protocols:              protocols,
		DisableCompression:     true,
		MaxResponseHeaderBytes: c.MaxHeaderBytes,
		// The rest stays off: no proxy from the environment, no Expect.
	}
	return u, nil
}

// upstreamAddress splits UpstreamConfig.Address.
func upstreamAddress(s string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		switch {
		case !filepath.IsAbs(path):
			return "", "", errors.New("the socket's path must be absolute")
		case len(path) > maxSocketPath:
			return "", "", fmt.Errorf("the path has %d bytes, a socket's may have %d", len(path), maxSocketPath)
		}
		return "unix", path, nil
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return "", "", errors.Unwrap(err)
	case u.Scheme != "http":
		return "", "", errors.New("must be http://host:port or unix:/path")
	case u.Host == "" || u.Hostname() == "":
		return "", "", errors.New("no host in it")
	case u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return "", "", errors.New("may hold a host and a port, nothing else")
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	return "tcp", net.JoinHostPort(u.Hostname(), port), nil
}

// An UpstreamRequest is what Upstream.Do sends.
type UpstreamRequest struct {
	// Method and Target, which is the path and the query, reach the homeserver
	// as they are here, to the byte: they are signed.
	Method, Target string
	// Host is the Host header. "" sends the homeserver's address, or "localhost"
	// on a unix socket.
	Host string
	// Header is sent but for what is about a single connection (RFC 9110
	// section 7.6.1), Proxy-*, Expect and Host. X-Forwarded-For and
	// X-Forwarded-Proto are the caller's to put in. It is not changed.
	Header http.Header
	// Body has exactly Size bytes. Size 0 is no body, and Size -1 is a body of
	// unknown size. If Body is nil and there is a body, GetBody opens it. If
	// Body is an io.Closer, its Close may be called while Read runs and must end
	// it; Do closes it in all cases. It is not used any more once Do has failed
	// or the answer's body is closed.
	Body io.Reader
	Size int64
	// GetBody opens the body again, from its start. If it is nil, and there is
	// a body, the request is never sent twice.
	GetBody func() (io.ReadCloser, error)
}

// Do sends r and returns the answer when its header is there, whatever its
// status. It waits for a place among MaxConns, which the request keeps until the
// answer's body has been read to its end, has failed or is closed; the caller
// closes it. ctx bounds everything, the reading of that body included.
//
// Every error, of Do and of the answer's body, is or wraps an *Error, of which
// Unsent says that the homeserver cannot have seen the request. Of those of Do,
// some wrap ErrUpstreamDown. One that our own limit made, as no place was free
// while ctx lasted, has the failure matrix.FailLocal.
//
// A request goes out once, with one exception: the homeserver may close a kept
// connection at any moment. So a request that fails on one before any byte of an
// answer is sent again, on a new connection, once, if it has no body or a
// GetBody. All that may come in over federation can bear that: transactions have
// an identifier, and other servers repeat requests too.
func (u *Upstream) Do(ctx context.Context, r *UpstreamRequest) (*http.Response, error) {
	body := &requestBody{reader: r.Body, size: r.Size}
	defer func() { _ = body.Close() }() // harmless once an answer owns the body in use
	req, err := u.prepare(r)
	if err == nil && r.Size != 0 && r.Body == nil {
		if body, err = reopen(r); err != nil {
			body = nil
		}
	}
	if err != nil {
		return nil, &Error{Failure: matrix.FailLocal, Op: OpPrepare, Unsent: true, Err: err}
	}
	if err := u.slots.acquire(ctx); err != nil {
		return nil, dialError(ctx, OpConnect, err)
	}
	u.count(1)
	ctx, cancel := context.WithCancelCause(ctx)
	end := sync.OnceFunc(func() {
		cancel(nil)
		u.count(-1)
		u.slots.release()
	})
	var timer *time.Timer
	if u.cfg.HeaderTimeout > 0 {
		timer = time.AfterFunc(u.cfg.HeaderTimeout, func() { cancel(errHeaderTimeout) })
	}
	resp, err := u.roundTrip(ctx, req, r, &body)
	if timer != nil {
		timer.Stop()
	}
	if err != nil {
		end()
		var e *Error
		if context.Cause(ctx) == errHeaderTimeout && errors.As(err, &e) {
			return nil, &Error{Failure: matrix.FailTimeout, Op: e.Op, Unsent: e.Unsent, Err: errHeaderTimeout}
		}
		return nil, err
	}
	body = nil
	resp.Body = &endingBody{resp.Body, end}
	return resp, nil
}

// roundTrip sends req, on a kept connection if there is one. *body is the one
// in use; after an error it is the caller's to close.
func (u *Upstream) roundTrip(ctx context.Context, req *http.Request, r *UpstreamRequest, body **requestBody) (*http.Response, error) {
	var first *Error // of a kept connection
	if conn := u.pool.get(poolKey{}); conn != nil {
		resp, again, e := u.send(ctx, conn, req, *body)
		if e == nil {
			return resp, nil
		}
		if !again || r.Size != 0 && r.GetBody == nil {
			return nil, e
		}
		first = e
		// What made this one stale, such as a restart, has most likely made all
		// of them stale.
		u.pool.closeIdle()
		u.repeats.Add(1)
		if r.Size != 0 {
			again, err := reopen(r)
			if err != nil {
				return nil, &Error{Failure: matrix.FailLocal, Op: OpPrepare, Err: err}
			}
			*body = again
		}
	}
	conn, err := u.connect(ctx)
	if err != nil {
		if first != nil {
			err = afterFirst(first, err)
		}
		return nil, err
	}
	resp, _, e := u.send(ctx, conn, req, *body)
	if e != nil {
		return nil, e
	}
	return resp, nil
}

func reopen(r *UpstreamRequest) (*requestBody, error) {
	if r.GetBody == nil {
		return nil, fmt.Errorf("no body, but size %d", r.Size)
	}
	reader, err := r.GetBody()
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	return &requestBody{reader: reader, size: r.Size}, nil
}

// prepare makes an http.Request of r, without context and body.
func (u *Upstream) prepare(r *UpstreamRequest) (*http.Request, error) {
	req, err := prepare(&Request{Method: r.Method, Target: r.Target, Header: r.Header})
	if err != nil {
		return nil, err
	}
	req.ContentLength = r.Size
	req.URL.Scheme, req.URL.Host = "http", "localhost"
	if u.network == "tcp" {
		req.URL.Host = u.address
	}
	req.Host = r.Host
	if r.Host != "" && !validHost(r.Host) {
		return nil, errors.New("malformed host")
	}
	return req, nil
}

// connect makes a new connection with a place reserved for one request.
func (u *Upstream) connect(ctx context.Context) (*poolConn, error) {
	cc, err := u.transport.NewClientConn(ctx, "http", "homeserver:80")
	if err == nil {
		err = cc.Reserve()
	}
	down := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
	if was := u.down.Swap(down); was != down {
		if down {
			u.cfg.Logger.Warn("the homeserver's federation listener cannot be reached", "address", u.cfg.Address, "err", err)
		} else {
			u.cfg.Logger.Info("the homeserver's federation listener answers again", "address", u.cfg.Address)
		}
	}
	if down {
		err = fmt.Errorf("%w: %w", ErrUpstreamDown, err)
	}
	if err != nil {
		return nil, dialError(ctx, OpConnect, err)
	}
	return u.pool.add(cc, poolKey{}, false, nil), nil
}

// dial connects. A unix socket whose backlog is full, which Twisted's is at 50,
// refuses at once what TCP would let wait.
func (u *Upstream) dial(ctx context.Context) (net.Conn, error) {
	u.dials.Add(1)
	ctx, cancel := context.WithTimeout(ctx, u.cfg.ConnectTimeout)
	defer cancel()
	var d net.Dialer
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		conn, err := d.DialContext(ctx, u.network, u.address)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

// count changes the number of requests that have a place.
func (u *Upstream) count(n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.active += n
	u.mostActive = max(u.mostActive, u.active)
}

// CloseIdle closes the connections that are in no use.
func (u *Upstream) CloseIdle() { u.pool.closeIdle() }

// Stats returns the present counts.
func (u *Upstream) Stats() UpstreamStats {
	u.mu.Lock()
	defer u.mu.Unlock()
	return UpstreamStats{
		Active:     u.active,
		PeakActive: u.mostActive,
		Idle:       u.pool.idleCount(),
		Dials:      u.dials.Load(),
		Reused:     u.pool.reused.Load(),
		Repeats:    u.repeats.Load(),
		Down:       u.down.Load(),
	}
}

// endingBody calls end once, with the body's end, failure or Close.
type endingBody struct {
	io.ReadCloser
	end func()
}

func (b *endingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.end()
	}
	return n, err
}

func (b *endingBody) Close() error {
	err := b.ReadCloser.Close()
	b.end()
	return err
}

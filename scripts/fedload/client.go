package fedload

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"fsbus/bus/matrix"
)

// DefaultTimeout is Synapse's for a request without a time-out of its own
// (config/federation.py, client_timeout).
const DefaultTimeout = 60 * time.Second

// keepBody is how much of an answer's body a Result keeps, in bytes.
const keepBody = 64 << 10

// Homeserver is who the requests are from.
type Homeserver struct {
	Name matrix.ServerName
	Key  matrix.SigningKey
}

// Request is a federation request before it is signed.
type Request struct {
	Destination matrix.ServerName
	Method      string
	Target      string // path and query, escaped; sent as it is
	Body        []byte // JSON; empty for none
}

// Result is how a request ended.
type Result struct {
	Status  int           // 0 if no answer's headers came
	Headers time.Duration // from the start to the answer's headers; 0 if none came
	Whole   time.Duration // from the start to the end of the body, or to the error
	Size    int64         // of the body as far as it came, in bytes
	Body    []byte        // its first 64 KiB
	Err     error         // nil if the answer came whole, whatever its status
}

// Client makes requests. It may be used by many goroutines at once.
type Client struct {
	// Timeout bounds each request as a whole, or until its answer's headers if
	// BodyTimeout is set. Neither must be changed once the client is in use.
	Timeout time.Duration
	// BodyTimeout bounds the answer's body, from its headers on. Synapse counts
	// its time-out anew for the body (http/matrixfederationclient.py).
	BodyTimeout time.Duration

	from      Homeserver
	transport *http.Transport
	// address turns a request's destination and target into what the transport
	// connects to and what it puts on the request line.
	address func(r *Request) *url.URL
	proxy   string // value of Proxy-Authorization; "" for none
}

// NewHook returns a client that speaks to the bus at address, "unix:PATH" or
// "HOST:PORT", as Synapse's outbound_federation_restricted_to does
// (http/proxyagent.py): an absolute request target with the scheme
// matrix-federation, a bearer secret, and no connection used twice.
func NewHook(address, secret string, from Homeserver) *Client {
	network, address := "tcp", address
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	}
	dialer := &net.Dialer{}
	return &Client{
		Timeout: DefaultTimeout,
		from:    from,
		transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, network, address)
			},
			DisableKeepAlives:  true,
			DisableCompression: true,
		},
		// Opaque is what net/http puts on the request line as it stands.
		address: func(r *Request) *url.URL {
			return &url.URL{
				Scheme: "http",
				Host:   string(r.Destination),
				Opaque: "matrix-federation://" + string(r.Destination) + r.Target,
			}
		},
		proxy: "Bearer " + secret,
	}
}

// NewDirect returns a client that speaks to the servers themselves, over TLS
// with pooled connections. roots are the authorities it trusts. Names must be
// ones to connect to as they are: there is no discovery.
func NewDirect(roots *x509.CertPool, from Homeserver) *Client {
	return &Client{
		Timeout: DefaultTimeout,
		from:    from,
		transport: &http.Transport{
			TLSClientConfig: &tls.Config{
				RootCAs:            roots,
				MinVersion:         tls.VersionTLS12,
				ClientSessionCache: tls.NewLRUClientSessionCache(1024),
			},
			MaxIdleConns:        1024,
			MaxIdleConnsPerHost: 4,
			IdleConnTimeout:     time.Minute,
			DisableCompression:  true,
		},
		address: func(r *Request) *url.URL {
			return &url.URL{Scheme: "https", Host: string(r.Destination), Opaque: r.Target}
		},
	}
}

// Close closes the connections that are kept for later.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Do signs the request, sends it and reads the answer to its end.
func (c *Client) Do(ctx context.Context, r *Request) Result {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(c.Timeout, func() { cancel(context.DeadlineExceeded) })
	defer timer.Stop()
	req, err := c.sign(ctx, r)
	if err != nil {
		return Result{Err: err}
	}
	start := time.Now()
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return Result{Whole: time.Since(start), Err: why(ctx, err)}
	}
	defer resp.Body.Close()
	if c.BodyTimeout > 0 && timer.Stop() {
		timer.Reset(c.BodyTimeout)
	}
	res := Result{Status: resp.StatusCode, Headers: time.Since(start)}
	var kept bytes.Buffer
	res.Size, res.Err = io.CopyN(&kept, resp.Body, keepBody)
	if errors.Is(res.Err, io.EOF) {
		res.Err = nil
	} else if res.Err == nil {
		var n int64
		n, res.Err = io.Copy(io.Discard, resp.Body)
		res.Size += n
	}
	res.Body, res.Whole, res.Err = kept.Bytes(), time.Since(start), why(ctx, res.Err)
	return res
}

// why adds to an error of a request whose context has ended what ended it.
func why(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// sign makes the HTTP request, with the headers that Synapse sends.
func (c *Client) sign(ctx context.Context, r *Request) (*http.Request, error) {
	if !strings.HasPrefix(r.Target, "/") {
		return nil, fmt.Errorf("fedload: target %q does not begin with a slash", r.Target)
	}
	x, err := matrix.SignRequest(c.from.Key, string(c.from.Name), string(r.Destination), r.Method, r.Target, r.Body)
	if err != nil {
		return nil, fmt.Errorf("fedload: sign: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, "", bytes.NewReader(r.Body))
	if err != nil {
		return nil, fmt.Errorf("fedload: %w", err)
	}
	req.URL, req.Host = c.address(r), string(r.Destination)
	req.Header.Set("User-Agent", "fedload")
	req.Header.Set("Authorization", x.String())
	if len(r.Body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.proxy != "" {
		req.Header.Set("Proxy-Authorization", c.proxy)
	}
	return req, nil
}

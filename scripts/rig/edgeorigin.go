package rig

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
	"net/netip"
	"net/url"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
)

// Origin returns server i of the federation as one that sends requests.
func (f *Federation) Origin(i int) fedload.Homeserver {
	return fedload.Homeserver{Name: f.Names()[i], Key: f.SigningKey(i)}
}

// OriginAddress returns the address that server i of a federation speaks from: one
// of its own, 127.2.H.L, as the one where it listens is 127.1.H.L.
func OriginAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 2, byte(i >> 8), byte(i)}) }

// Signed is a request as it goes over the wire. It may be sent any number of times.
type Signed struct {
	*fedload.Request
	Authorization string
}

// Sign signs a request in the name of from. It panics if that cannot be: what is
// sent here is made by the program itself.
func Sign(from fedload.Homeserver, r *fedload.Request) *Signed {
	x, err := matrix.SignRequest(from.Key, string(from.Name), string(r.Destination), r.Method, r.Target, r.Body)
	if err != nil {
		panic(fmt.Sprintf("rig: sign: %v", err))
	}
	return &Signed{r, x.String()}
}

// Target is where other servers find our homeserver.
type Target struct {
	Address string         // "host:port", whatever the destination's name is
	Roots   *x509.CertPool // nil: without TLS
	HTTP2   bool           // offer it; needs TLS
}

// originTimeout is how long a Synapse waits for the answer to a transaction.
const originTimeout = fedload.DefaultTimeout

// Sender is one server that sends to ours: its connections are its own, and of its
// own address. A TLS session is never resumed, as a Synapse does not. Errors are
// not hidden: nothing is tried twice that may have arrived.
type Sender struct {
	Timeout time.Duration // of each request, to the end of its answer

	transport *http.Transport
	scheme    string
}

// NewSender returns one that speaks from the address local, or from any if that is
// the zero Addr. With HTTP/1.1 it keeps up to idle connections.
func NewSender(t Target, local netip.Addr, idle int) *Sender {
	dialer := &net.Dialer{}
	if local.IsValid() {
		dialer.LocalAddr = &net.TCPAddr{IP: local.AsSlice()}
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!t.HTTP2)
	protocols.SetHTTP2(t.HTTP2)
	s := &Sender{Timeout: originTimeout, scheme: "http", transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", t.Address)
		},
		Protocols:           protocols,
		MaxIdleConnsPerHost: idle,
		DisableCompression:  true,
		ReadBufferSize:      2 << 10, // there are thousands of these
		WriteBufferSize:     2 << 10,
	}}
	if t.Roots != nil {
		s.scheme = "https"
		s.transport.TLSClientConfig = &tls.Config{RootCAs: t.Roots, MinVersion: tls.VersionTLS12}
	}
	return s
}

// Close closes the connections that are kept.
func (s *Sender) Close() { s.transport.CloseIdleConnections() }

// Do sends a request and reads its answer to the end, of which it keeps all: those
// of the stub are small.
func (s *Sender) Do(ctx context.Context, r *Signed) fedload.Result {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.Method, "", bytes.NewReader(r.Body))
	if err != nil {
		return fedload.Result{Err: err}
	}
	req.URL = &url.URL{Scheme: s.scheme, Host: string(r.Destination), Opaque: r.Request.Target}
	req.Host = string(r.Destination)
	req.Header["User-Agent"] = []string{"rig"}
	if r.Authorization != "" {
		req.Header["Authorization"] = []string{r.Authorization}
	}
	if len(r.Body) > 0 {
		req.Header["Content-Type"] = []string{"application/json"}
	}
	start := time.Now()
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		return fedload.Result{Whole: time.Since(start), Err: err}
	}
	defer resp.Body.Close()
	res := fedload.Result{Status: resp.StatusCode, Headers: time.Since(start)}
	res.Body, res.Err = io.ReadAll(resp.Body)
	res.Size, res.Whole = int64(len(res.Body)), time.Since(start)
	return res
}

// Why says in one or two words why a request got no answer: "refused", "connect",
// "TLS", "timed out", "given up" by the caller, "cut" for a connection that the
// other side closed, "other".
func Why(err error) string {
	var op *net.OpError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	var cert *tls.CertificateVerificationError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "timed out"
	case errors.Is(err, context.Canceled):
		return "given up"
	case errors.Is(err, errRefused):
		return "refused"
	case errors.As(err, &op) && op.Op == "dial":
		return "connect"
	case errors.As(err, &record), errors.As(err, &alert), errors.As(err, &cert):
		return "TLS"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, errReset), errors.Is(err, errPipe):
		return "cut"
	case err.Error() == "http: server closed idle connection":
		return "cut" // net/http does not export it
	}
	return "other"
}

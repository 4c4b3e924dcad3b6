package netx

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strings"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// TestFailureOf classifies errors that really happened, where a loopback can
// make them happen.
func TestFailureOf(t *testing.T) {
	dial := func(addr string) error {
		c, err := net.DialTimeout("tcp", addr, testWait)
		if err == nil {
			_ = c.Close()
			t.Fatalf("%s can be connected to", addr)
		}
		return err
	}
	closed := func() string {
		ln := must(net.Listen("tcp", "127.0.0.1:0"))
		_ = ln.Close()
		return ln.Addr().String()
	}
	// read returns the error of reading from a server that does what serve does.
	read := func(serve func(c net.Conn)) error {
		c := must(net.Dial("tcp", tcp(t, serve)))
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(testWait))
		_, _ = io.WriteString(c, "x")
		_, err := io.ReadAll(c)
		return err
	}
	reset := func(c net.Conn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.(*net.TCPConn).SetLinger(0)
	}
	deadline := func() error {
		a, b := net.Pipe()
		defer b.Close()
		defer a.Close()
		_ = a.SetDeadline(time.Unix(1, 0))
		_, err := a.Read(make([]byte, 1))
		return err
	}
	expired, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	dialContext := func(ctx context.Context) error {
		_, err := (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:1")
		return err
	}
	shake := func(client *tls.Config, serve func(c net.Conn)) error {
		c := must(net.Dial("tcp", tcp(t, serve)))
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(testWait))
		tc := tls.Client(c, client)
		if err := tc.Handshake(); err != nil {
			return err
		}
		_, err := tc.Read(make([]byte, 1))
		return err
	}
	serving := func(config *tls.Config) func(net.Conn) {
		return func(c net.Conn) { _ = tls.Server(c, config).Handshake() }
	}
	needsClient := serverTLS("a.test")
	needsClient.ClientAuth = tls.RequireAnyClientCert
	trusting := &tls.Config{RootCAs: ca().pool, ServerName: "a.test"}
	wrap := func(err error) error { return fmt.Errorf("more: %w", err) }

	for _, tt := range []struct {
		name string
		err  error
		want matrix.Failure
	}{
		{"none", nil, matrix.FailNone},
		{"an Error", wrap(&Error{Failure: matrix.FailTooLarge, Err: io.EOF}), matrix.FailTooLarge},
		{"refused", dial(closed()), matrix.FailRefused},
		{"reset", read(reset), matrix.FailReset},
		{"broken pipe", errno(syscall.EPIPE), matrix.FailReset},
		{"aborted", errno(syscall.ECONNABORTED), matrix.FailReset},
		{"end", io.EOF, matrix.FailReset},
		{"unexpected end", io.ErrUnexpectedEOF, matrix.FailReset},
		{"closed", net.ErrClosed, matrix.FailReset},
		{"no route to host", errno(syscall.EHOSTUNREACH), matrix.FailUnreachable},
		{"no route to network", errno(syscall.ENETUNREACH), matrix.FailUnreachable},
		{"host down", errno(syscall.EHOSTDOWN), matrix.FailUnreachable},
		{"network down", errno(syscall.ENETDOWN), matrix.FailUnreachable},
		{"no IPv6", errno(syscall.EAFNOSUPPORT), matrix.FailUnreachable},
		{"firewall", errno(syscall.EPERM), matrix.FailUnreachable},
		{"prohibited", errno(syscall.EACCES), matrix.FailUnreachable},
		{"kernel's time-out", errno(syscall.ETIMEDOUT), matrix.FailTimeout},
		{"socket's time-out", deadline(), matrix.FailTimeout},
		{"dial's time-out", dialContext(expired), matrix.FailTimeout},
		{"context's time-out", wrap(expired.Err()), matrix.FailTimeout},
		{"dial cancelled", dialContext(cancelled), matrix.FailCancelled},
		{"cancelled", wrap(cancelled.Err()), matrix.FailCancelled},
		{"file descriptors", errno(syscall.EMFILE), matrix.FailLocal},
		{"system's file descriptors", errno(syscall.ENFILE), matrix.FailLocal},
		{"memory", errno(syscall.ENOMEM), matrix.FailLocal},
		{"socket buffers", errno(syscall.ENOBUFS), matrix.FailLocal},
		{"disk", &net.OpError{Op: "write", Err: syscall.ENOSPC}, matrix.FailLocal},
		{"ports", errno(syscall.EADDRNOTAVAIL), matrix.FailLocal},
		{"bug", errors.New("something"), matrix.FailLocal},

		{"no such name", notFound("a.test"), matrix.FailNoName},
		{"name server fails", errServfail, matrix.FailDNS},
		{"name server refuses", &net.DNSError{UnwrapErr: errno(syscall.ECONNREFUSED), Err: "refused"}, matrix.FailDNS},
		{"name server is silent", &net.DNSError{IsTimeout: true, UnwrapErr: context.DeadlineExceeded}, matrix.FailDNS},
		{"name look-up cancelled", &net.DNSError{UnwrapErr: context.Canceled}, matrix.FailCancelled},

		{"not TLS", shake(trusting, func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
			_, _ = io.Copy(io.Discard, c)
		}), matrix.FailTLS},
		{"unknown authority", shake(&tls.Config{ServerName: "a.test", RootCAs: x509.NewCertPool()}, serving(serverTLS("a.test"))), matrix.FailTLS},
		{"other name", shake(trusting, serving(serverTLS("b.test"))), matrix.FailTLS},
		{"expired", shake(trusting, serving(&tls.Config{Certificates: []tls.Certificate{ca().issue(time.Unix(1, 0), "a.test")}})), matrix.FailTLS},
		{"alert", shake(&tls.Config{RootCAs: ca().pool, ServerName: "a.test", NextProtos: []string{"x"}}, serving(&tls.Config{
			Certificates: serverTLS("a.test").Certificates, NextProtos: []string{"y"}})), matrix.FailTLS},
		{"alert after the handshake", shake(trusting, serving(needsClient)), matrix.FailTLS},

		{"header", textproto.ProtocolError("malformed MIME header line"), matrix.FailProtocol},
		{"blocked", wrap(errBlocked), matrix.FailBlocked},
		{"no address", wrap(errNoAddress), matrix.FailNoName},
		{"no service", wrap(errNoService), matrix.FailNoName},
		{"stalled", wrap(errStalled), matrix.FailCut},
		{"upgrade", errUpgrade, matrix.FailProtocol},
		{"own limit", wrap(errOwnLimit), matrix.FailLocal},
	} {
		if got := FailureOf(tt.err); got != tt.want {
			t.Errorf("%s: %v, want %v: %v (%T)", tt.name, got, tt.want, tt.err, tt.err)
		}
	}
}

func TestErrorSaysWhere(t *testing.T) {
	err := error(&Error{Failure: matrix.FailRefused, Op: OpConnect, Err: errno(syscall.ECONNREFUSED)})
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.HasPrefix(err.Error(), "netx: connect: dial tcp") {
		t.Errorf("%v", err)
	}
}

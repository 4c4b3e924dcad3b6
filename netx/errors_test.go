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
	"runtime/debug"
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
		{"not final", errNotFinal, matrix.FailProtocol},
		{"own limit", wrap(errOwnLimit), matrix.FailLocal},
		{"own clock", blameClock(notYet(time.Unix(2e9, 0)), time.Unix(1e9, 0), time.Unix(2e9, 0)), matrix.FailLocal},
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

// connectError is what a connect to addr ends with.
func connectError(addr string, e syscall.Errno) error {
	op := errno(e).(*net.OpError)
	op.Addr = &net.TCPAddr{IP: net.ParseIP(addr), Port: 443}
	return op
}

// notYet is how crypto/tls reports a certificate that is valid from t on.
func notYet(t time.Time) error {
	return &tls.CertificateVerificationError{Err: x509.CertificateInvalidError{Cert: &x509.Certificate{NotBefore: t}, Reason: x509.Expired}}
}

// TestBlameClock: only a clock that is certainly wrong excuses a certificate.
func TestBlameClock(t *testing.T) {
	past := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	boot := time.Date(1970, 1, 1, 0, 0, 12, 0, time.UTC)
	expired := &tls.CertificateVerificationError{Err: x509.CertificateInvalidError{
		Cert: &x509.Certificate{NotBefore: boot.Add(-48 * time.Hour), NotAfter: boot.Add(-24 * time.Hour)}, Reason: x509.Expired}}
	for _, tt := range []struct {
		name string
		err  error
		now  time.Time
		want bool
	}{
		{"a board wakes up in 1970", notYet(past.Add(-30 * 24 * time.Hour)), boot, true},
		{"or where it was switched off", notYet(past.Add(-30 * 24 * time.Hour)), past.Add(-60 * 24 * time.Hour), true},
		{"a certificate issued since", notYet(past.Add(30 * 24 * time.Hour)), past.Add(-1), true},
		{"more than the slack", notYet(past), past.Add(-clockSlack - 1), true},
		{"no more than the slack", notYet(past), past.Add(-clockSlack), false},
		{"the clock may be right", notYet(past.Add(30 * 24 * time.Hour)), past, false},
		{"the clock is right", notYet(past.Add(10 * 365 * 24 * time.Hour)), past.Add(365 * 24 * time.Hour), false},
		{"expired before the clock's time", expired, boot, false},
		{"another reason", &tls.CertificateVerificationError{Err: x509.CertificateInvalidError{
			Cert: &x509.Certificate{NotBefore: past}, Reason: x509.NotAuthorizedToSign}}, boot, false},
		{"no certificate in it", x509.CertificateInvalidError{Reason: x509.Expired}, boot, false},
		{"another name", x509.HostnameError{Certificate: &x509.Certificate{NotBefore: past}}, boot, false},
		{"no certificate at all", io.EOF, boot, false},
	} {
		err := blameClock(tt.err, tt.now, past)
		if got := errors.Is(err, errClock); got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: our clock: %v, want %v: %v", tt.name, got, tt.want, err)
		}
		if want := FailureOf(tt.err); !tt.want && (err != tt.err || FailureOf(err) != want) {
			t.Errorf("%s: %v became %v, %v", tt.name, tt.err, err, FailureOf(err))
		}
		if tt.want && (FailureOf(err) != matrix.FailLocal || !strings.Contains(err.Error(), "this machine's clock seems to be wrong")) {
			t.Errorf("%s: %v: %v", tt.name, FailureOf(err), err)
		}
	}
}

func TestKnownPast(t *testing.T) {
	commit := time.Date(2026, 7, 8, 9, 10, 11, 0, time.UTC)
	for _, tt := range []struct {
		settings []debug.BuildSetting
		want     time.Time
	}{
		{nil, builtAfter},
		{[]debug.BuildSetting{{Key: "vcs.revision", Value: "2027-01-01T00:00:00Z"}}, builtAfter},
		{[]debug.BuildSetting{{Key: "vcs.time", Value: "yesterday"}}, builtAfter},
		{[]debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.time", Value: "2026-07-08T09:10:11Z"}}, commit},
		{[]debug.BuildSetting{{Key: "vcs.time", Value: "2026-07-08T11:10:11+02:00"}}, commit},
	} {
		if got := committed(tt.settings); !got.Equal(tt.want) {
			t.Errorf("%v: %v, want %v", tt.settings, got, tt.want)
		}
	}
	// A constant in the future would doubt clocks that are right.
	if now := time.Now(); !knownPast().Before(now) || !builtAfter.Before(now) {
		t.Errorf("%v or %v is not past", knownPast(), builtAfter)
	}
}

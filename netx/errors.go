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
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"fsbus/bus/matrix"
)

// The operations that an Error names, in the order in which a request goes
// through them.
const (
	OpPrepare = "prepare" // the request as the caller gave it
	OpResolve = "resolve" // server discovery and name look-up
	OpConnect = "connect" // TCP
	OpTLS     = "tls"     // handshake and certificate
	OpRequest = "request" // from the request's first byte to the end of the answer's header
	OpBody    = "body"    // the answer's body
)

// An Error says how one attempt at a remote server failed. Every error of a
// Client and of the bodies it returns is one or wraps one.
type Error struct {
	// Failure is never FailNone.
	Failure matrix.Failure
	// Op is the step that failed, one of the Op constants.
	Op string
	// Unsent is true when no byte of the request can have reached the remote,
	// so that sending it again repeats nothing. It is always true where
	// Failure.NeverConnected is, and knows more than that: a connection that was
	// not made within its time and a request that died on the wire are both
	// FailTimeout.
	Unsent bool
	// Sends is how many times the request began to go out: twice where a kept connection
	// broke, or HTTP/2 did. 0 where Unsent is true.
	Sends int32
	// Err is the cause. It holds addresses and names, never a header or a target.
	Err error
}

func (e *Error) Error() string { return "netx: " + e.Op + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// What the outbound half itself finds wrong, wrapped in an Error.
var (
	errBlocked   = errors.New("every address is on the block-list")
	errNoAddress = errors.New("the name has no address")
	errNoService = errors.New("the SRV record says that there is no service")
	errStalled   = errors.New("the answer stalled")
	errNotFinal  = errors.New("answered with a status that is none, and no other")
	errOwnLimit  = errors.New("our own limit was not free in time")
	errClock     = errors.New("this machine's clock seems to be wrong, so that no certificate can be checked")
)

// own are the failures of our own errors.
var own = []struct {
	err     error
	failure matrix.Failure
}{
	{errOwnLimit, matrix.FailLocal},
	{errClock, matrix.FailLocal},
	{errProxy, matrix.FailLocal},
	{errBehindProxy, matrix.FailUnreachable},
	{errBlocked, matrix.FailBlocked},
	{errNoAddress, matrix.FailNoName},
	{errNoService, matrix.FailNoName},
	{errStalled, matrix.FailCut},
	{errNotFinal, matrix.FailProtocol},
	{errFlood, matrix.FailProtocol},
	{errManyFields, matrix.FailTooLarge},
}

// errnos are the failures of what the kernel reports.
var errnos = []struct {
	errno   syscall.Errno
	failure matrix.Failure
}{
	{syscall.ECONNREFUSED, matrix.FailRefused},
	{syscall.EHOSTUNREACH, matrix.FailUnreachable},
	{syscall.ENETUNREACH, matrix.FailUnreachable},
	{syscall.EHOSTDOWN, matrix.FailUnreachable},
	{syscall.ENETDOWN, matrix.FailUnreachable},
	{syscall.EAFNOSUPPORT, matrix.FailUnreachable}, // a kernel without IPv6
	{syscall.EACCES, matrix.FailUnreachable},       // a firewall's or a route's word, for this address
	{syscall.EPERM, matrix.FailUnreachable},        // the same
	{syscall.ETIMEDOUT, matrix.FailTimeout},
	{syscall.ECONNRESET, matrix.FailReset},
	{syscall.ECONNABORTED, matrix.FailReset},
	{syscall.EPIPE, matrix.FailReset},
	{syscall.EMFILE, matrix.FailLocal},
	{syscall.ENFILE, matrix.FailLocal},
	{syscall.ENOBUFS, matrix.FailLocal},
	{syscall.ENOMEM, matrix.FailLocal},
	{syscall.ENOSPC, matrix.FailLocal},
	{syscall.EADDRNOTAVAIL, matrix.FailLocal}, // out of ports
}

// texts are the failures of errors for which net/http exports neither a type
// nor a variable. The tests provoke each of them, so that a new Go release
// which words them otherwise does not pass unnoticed.
var texts = []struct {
	text    string
	failure matrix.Failure
}{
	{"server response headers exceeded", matrix.FailTooLarge},
	{"response header list larger than advertised limit", matrix.FailTooLarge},
	{"malformed HTTP ", matrix.FailProtocol},
	{"connection error: ", matrix.FailProtocol}, // what we find wrong with the remote's HTTP/2
	{"http2: frame too large", matrix.FailProtocol},
}

// FailureOf classifies an error. It is FailNone for nil, what was decided where
// the attempt was made for an *Error, and FailLocal for an error that says
// nothing about the remote.
func FailureOf(err error) matrix.Failure {
	if f, ok := classify(err); ok {
		return f
	}
	return matrix.FailLocal
}

// classify is FailureOf; ok is false for an error that it does not know.
func classify(err error) (f matrix.Failure, ok bool) {
	if err == nil {
		return matrix.FailNone, true
	}
	var decided *Error
	if errors.As(err, &decided) {
		return decided.Failure, true
	}
	// We gave up ourselves, whatever came of it further down.
	if errors.Is(err, context.Canceled) {
		return matrix.FailCancelled, true
	}
	for _, o := range own {
		if errors.Is(err, o.err) {
			return o.failure, true
		}
	}
	// Before the errnos and time-outs: the resolver's own connection to its
	// name server says nothing about the remote.
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsNotFound {
			return matrix.FailNoName, true
		}
		return matrix.FailDNS, true
	}
	if isTLS(err) {
		return matrix.FailTLS, true
	}
	for _, e := range errnos {
		if errors.Is(err, e.errno) {
			return e.failure, true
		}
	}
	var timeout interface{ Timeout() bool }
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, &timeout) && timeout.Timeout() {
		return matrix.FailTimeout, true
	}
	var protocol textproto.ProtocolError
	if errors.As(err, &protocol) {
		return matrix.FailProtocol, true
	}
	for _, t := range texts {
		if strings.Contains(err.Error(), t.text) {
			return t.failure, true
		}
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return matrix.FailReset, true
	}
	return 0, false
}

// isTLS reports whether err comes from a handshake or from the check of a
// certificate.
func isTLS(err error) bool {
	var (
		record       tls.RecordHeaderError
		alert        tls.AlertError
		verification *tls.CertificateVerificationError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		invalid      x509.CertificateInvalidError
		op           *net.OpError
	)
	if errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error") {
		return true // how crypto/tls reports an alert
	}
	return errors.As(err, &record) || errors.As(err, &alert) || errors.As(err, &verification) ||
		errors.As(err, &authority) || errors.As(err, &hostname) || errors.As(err, &invalid)
}

// ownNetwork reports whether err, of an attempt at a remote, says that our own
// network is down, and so nothing about the remote: the name servers do not
// answer, or there is no way out of here.
//
// A machine without IPv6 has no way to any such address and is well all the
// same, so what it says of those does not count. Nor does that a single host
// cannot be reached.
func ownNetwork(err error) bool {
	f, _ := classify(err)
	switch f {
	case matrix.FailDNS:
		return true
	case matrix.FailTimeout:
		// While it waited for somebody else's equal question.
		var e *Error
		return errors.As(err, &e) && e.Op == OpResolve
	case matrix.FailUnreachable:
		return errors.Is(err, syscall.ENETDOWN) || errors.Is(err, syscall.ENETUNREACH) && !toIPv6(err)
	}
	return false
}

// toIPv6 reports whether err comes from a connect to an IPv6 address.
func toIPv6(err error) bool {
	var op *net.OpError
	if !errors.As(err, &op) {
		return false
	}
	to, ok := op.Addr.(*net.TCPAddr)
	return ok && to.IP.To4() == nil
}

// clockSlack is how long before its time a certificate may be met without a
// doubt about our clock.
const clockSlack = time.Hour

// blameClock returns err, or one that wraps it and errClock if it is our clock
// that must be wrong: it is before past, a moment that has certainly been, and
// the certificate is not valid yet. A board without a battery wakes up years ago
// and finds that of every certificate until it has asked for the time.
func blameClock(err error, now, past time.Time) error {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired || invalid.Cert == nil ||
		!now.Before(past) || !now.Add(clockSlack).Before(invalid.Cert.NotBefore) {
		return err
	}
	return fmt.Errorf("%w: %w", errClock, err)
}

// builtAfter is a moment before any build of this code.
var builtAfter = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// knownPast is a moment that has certainly been: when this program's source was
// committed, if the build says so, else builtAfter.
var knownPast = sync.OnceValue(func() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return builtAfter
	}
	return committed(info.Settings)
})

func committed(settings []debug.BuildSetting) time.Time {
	for _, s := range settings {
		if s.Key != "vcs.time" {
			continue
		}
		if t, err := time.Parse(time.RFC3339, s.Value); err == nil {
			return t
		}
	}
	return builtAfter
}

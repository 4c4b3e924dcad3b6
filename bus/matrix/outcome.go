package matrix

// Failure classifies how one attempt at a remote server ended. It is decided
// once, where the attempt is made (netx), so that everything behind it can
// branch on a small closed set instead of on error values.
//
// The zero value is FailNone: an answer arrived, whatever its status code.
type Failure uint8

// The ways in which an attempt can fail.
const (
	FailNone        Failure = iota
	FailRefused             // the remote's host answered that nothing listens there
	FailUnreachable         // no route to the remote's network or host
	FailNoName              // the server name does not exist (NXDOMAIN, or SRV target ".")
	FailDNS                 // the name could not be looked up for now (SERVFAIL, time-out)
	FailTLS                 // handshake or certificate
	FailTimeout             // nothing came back within the time given
	FailReset               // the connection broke before an answer's headers were complete
	FailCut                 // the connection broke, or stalled, inside an answer's body
	FailTooLarge            // the answer is larger than the endpoint allows
	FailProtocol            // what came back is not HTTP
	FailContent             // an answer of success whose body is not what a Matrix server sends
	FailBlocked             // every address of the remote is on the block-list
	FailCancelled           // we gave the attempt up ourselves
	FailLocal               // our own fault: disk full, file descriptors, a bug
	NumFailures
)

var failureNames = [NumFailures]string{
	"ok", "refused", "unreachable", "no_such_name", "dns", "tls", "timeout", "reset",
	"cut", "too_large", "protocol", "content", "blocked", "cancelled", "local",
}

// String returns the name under which metrics and the status page show f.
func (f Failure) String() string {
	if f >= NumFailures {
		return "invalid"
	}
	return failureNames[f]
}

// ParseFailure is the inverse of String; an unknown name gives FailLocal and false.
func ParseFailure(s string) (Failure, bool) {
	for f, n := range failureNames {
		if n == s {
			return Failure(f), true
		}
	}
	return FailLocal, false
}

// NeverConnected reports whether the attempt ended before a single byte of the
// request can have reached the remote, so that trying again repeats nothing.
func (f Failure) NeverConnected() bool {
	switch f {
	case FailRefused, FailUnreachable, FailNoName, FailDNS, FailTLS, FailBlocked:
		return true
	}
	return false
}

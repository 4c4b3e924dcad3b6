package matrix

import (
	"errors"
	"fmt"
	"strings"
)

// MaxRequestTarget is the longest request target in bytes that
// ParseFederationTarget takes.
const MaxRequestTarget = 64 << 10

// What ParseFederationTarget returns, possibly wrapped.
var (
	// ErrNotFederation: the target is not of the scheme matrix-federation.
	ErrNotFederation = errors.New("not a matrix-federation request target")
	// ErrRequestTarget: it is, but malformed.
	ErrRequestTarget = errors.New("malformed request target")
)

// ParseFederationTarget takes the request target apart with which Synapse asks a
// proxy of outbound_federation_restricted_to for a remote server
// (http/proxyagent.py):
//
//	matrix-federation://<server name>/<path>?<query>
//
// target is what follows the name, unchanged to the byte, since the request's
// signature covers it. It begins with a single slash and holds nothing but visible
// ASCII. A fragment, user information or an empty path is malformed.
func ParseFederationTarget(raw string) (name ServerName, target string, err error) {
	rest, ok := strings.CutPrefix(raw, "matrix-federation://")
	if !ok {
		return "", "", ErrNotFederation
	}
	if len(raw) > MaxRequestTarget {
		return "", "", fmt.Errorf("%w: %d bytes, at most %d", ErrRequestTarget, len(raw), MaxRequestTarget)
	}
	slash := strings.IndexByte(rest, '/')
	if slash < 0 {
		return "", "", fmt.Errorf("%w: no path", ErrRequestTarget)
	}
	authority, target := rest[:slash], rest[slash:]
	for i := range len(target) {
		if c := target[i]; c <= ' ' || c >= 0x7f || c == '#' {
			return "", "", fmt.Errorf("%w: byte %#02x in the path or query", ErrRequestTarget, c)
		}
	}
	if strings.HasPrefix(target, "//") {
		// Valid as a path, but more than one URL library reads it as a host.
		return "", "", fmt.Errorf("%w: path begins with two slashes", ErrRequestTarget)
	}
	if name, err = ParseServerName(authority); err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrRequestTarget, err)
	}
	return name, target, nil
}

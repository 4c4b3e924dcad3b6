package matrix

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// MaxServerName is the length in bytes beyond which a server name is refused.
// It is what the specification recommends as the longest (appendices, "Server
// Name").
const MaxServerName = 230

// ErrServerName is what ParseServerName's errors wrap.
var ErrServerName = errors.New("invalid server name")

// ServerName is the name of a homeserver: a DNS name, an IPv4 literal or an
// IPv6 literal in brackets, with an optional port. A value that came from
// ParseServerName is valid and keeps its spelling: names are compared
// case-sensitively (appendices, "Server Name"), and signatures cover them as
// they are spelt. It may stand in a log line, a file name or a metric as it is.
// The zero value is no server.
type ServerName string

// ParseServerName checks s against the grammar of the appendices, "Server
// Name", and returns it as it is. It is stricter than the grammar in what
// no DNS name or address can be: empty labels, an IPv6 literal that is none, a
// port outside 1 to 65535, a name that ends in a number without being an IPv4
// literal (some resolvers would take 010.0.0.1 or 2130706433 for an address).
func ParseServerName(s string) (ServerName, error) {
	if s == "" {
		return "", fmt.Errorf("%w: empty", ErrServerName)
	}
	if len(s) > MaxServerName {
		return "", fmt.Errorf("%w: %d bytes, at most %d", ErrServerName, len(s), MaxServerName)
	}
	host, port, hasPort := cutPort(s)
	if hasPort && parsePort(port) == 0 {
		return "", fmt.Errorf("%w: bad port", ErrServerName)
	}
	if strings.HasPrefix(host, "[") {
		if !strings.HasSuffix(host, "]") {
			return "", fmt.Errorf("%w: bracket without its counterpart", ErrServerName)
		}
		// Is6 alone would let a zone pass: the grammar has no "%".
		a, err := netip.ParseAddr(host[1 : len(host)-1])
		if err != nil || !a.Is6() || a.Zone() != "" {
			return "", fmt.Errorf("%w: bad IPv6 literal", ErrServerName)
		}
		return ServerName(s), nil
	}
	if err := checkDNSName(host); err != nil {
		return "", err
	}
	return ServerName(s), nil
}

// checkDNSName accepts labels of letters, digits and hyphens joined by dots,
// and an IPv4 literal.
func checkDNSName(host string) error {
	label, digits := 0, true // of the current label: length, nothing but digits
	for i := range len(host) {
		switch c := host[i]; {
		case c >= '0' && c <= '9':
			label++
		case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-':
			label++
			digits = false
		case c == '.' && label > 0:
			label, digits = 0, true
		case c == '.':
			return fmt.Errorf("%w: empty label", ErrServerName)
		default:
			return fmt.Errorf("%w: byte %#02x at %d", ErrServerName, c, i)
		}
	}
	if label == 0 {
		return fmt.Errorf("%w: empty host or label", ErrServerName)
	}
	if digits {
		if _, err := netip.ParseAddr(host); err != nil {
			return fmt.Errorf("%w: ends in a number but is no IPv4 literal", ErrServerName)
		}
	}
	return nil
}

// cutPort splits at the colon before the port. The colons inside an IPv6
// literal are followed by its closing bracket and so never split.
func cutPort(s string) (host, port string, hasPort bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.IndexByte(s[i:], ']') >= 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// parsePort returns the number of a port of 1 to 5 digits, or 0.
func parsePort(s string) int {
	if len(s) == 0 || len(s) > 5 {
		return 0
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0
		}
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0
	}
	return int(n)
}

// Split returns the parts of the name: the host, an IPv6 literal without its
// brackets, and the port if there is one. Without a port, port is 0.
func (n ServerName) Split() (host string, port int, hasPort bool) {
	host, p, hasPort := cutPort(string(n))
	if hasPort {
		port = parsePort(p)
	}
	if len(host) >= 2 && host[0] == '[' {
		host = host[1 : len(host)-1]
	}
	return host, port, hasPort
}

// IP returns the address if the host is an IP literal. An IPv4 address that is
// written as an IPv6 one (::ffff:192.0.2.1) comes back as IPv4, so that a rule
// about addresses meets it in one form only.
func (n ServerName) IP() (netip.Addr, bool) {
	host, _, _ := n.Split()
	a, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

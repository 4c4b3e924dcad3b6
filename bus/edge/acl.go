package edge

import (
	"fmt"
	"net/netip"
	"strings"

	"fsbus/bus/matrix"
)

// ACL decides who may talk to us at all. It follows what a room's server ACL does
// (client-server API, m.room.server_acl), but that no pattern to allow means all. It
// is never changed, so any number of goroutines may ask the same one. The zero value
// lets in whoever has no IP address for a name.
type ACL struct {
	deny, allow patterns
	literals    bool
}

// patterns are names and addresses, and those with wildcards apart from them.
type patterns struct {
	exact map[string]bool
	globs []string
}

// NewACL returns the list that Deny, Allow and AllowIPLiterals of a valid configuration
// make. It keeps nothing of c.
func NewACL(c *Config) *ACL {
	return &ACL{newPatterns(c.Deny), newPatterns(c.Allow), c.AllowIPLiterals}
}

func newPatterns(list []string) patterns {
	p := patterns{exact: make(map[string]bool)}
	for _, s := range list {
		if s = strings.TrimSuffix(strings.ToLower(s), "."); strings.ContainsAny(s, "*?") {
			p.globs = append(p.globs, s)
		} else {
			p.exact[canonical(s)] = true
		}
	}
	return p
}

// canonical returns the one way in which an address is written, and a name as it is.
func canonical(s string) string {
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	if err != nil {
		return s
	}
	return a.Unmap().String()
}

func checkPatterns(key string, list []string) error {
	globs := 0
	for _, s := range list {
		switch {
		case s == "" || len(s) > matrix.MaxServerName:
			return fmt.Errorf("%s has a pattern of %d bytes, it must be one of 1 to %d", key, len(s), matrix.MaxServerName)
		case endsInPort(s):
			return fmt.Errorf("%s has the pattern %q, but names are compared without port: it would match none", key, s)
		case strings.ContainsAny(s, "*?"):
			globs++
		}
	}
	if len(list) > maxPatterns || globs > maxGlobs {
		return fmt.Errorf("%s has %d patterns, %d of them with * or ?, it must be at most %d and %d", key, len(list), globs, maxPatterns, maxGlobs)
	}
	return nil
}

// endsInPort reports whether a pattern has a colon and digits at its end. An IPv6
// literal ends in a bracket.
func endsInPort(s string) bool {
	if _, err := netip.ParseAddr(s); err == nil {
		return false
	}
	digits := s[strings.LastIndexByte(s, ':')+1:]
	return len(digits) < len(s) && digits != "" && strings.Trim(digits, "0123456789") == ""
}

// Allows reports whether a server may talk to us. Its name must be valid; a port in it
// does not count.
func (a *ACL) Allows(n matrix.ServerName) bool {
	if !a.literals {
		if _, literal := n.IP(); literal {
			return false
		}
	}
	host := strings.ToLower(string(n)) // an IPv6 literal keeps its brackets, for patterns with *
	if _, port, has := n.Split(); has && port > 0 {
		host = host[:strings.LastIndexByte(host, ':')]
	}
	host = strings.TrimSuffix(host, ".")
	if a.deny.match(host) {
		return false
	}
	return len(a.allow.exact)+len(a.allow.globs) == 0 || a.allow.match(host)
}

func (p *patterns) match(s string) bool {
	c := canonical(s)
	if p.exact[c] {
		return true
	}
	if strings.Contains(c, ":") { // an IPv6 address, which a name has in brackets
		c = "[" + c + "]"
	}
	for _, g := range p.globs {
		if glob(g, s) || glob(g, c) {
			return true
		}
	}
	return false
}

// glob reports whether s matches a pattern with * and ?. On a mismatch it goes
// back to the last * only, so the time is bounded by the product of the lengths.
func glob(pattern, s string) bool {
	p, i := 0, 0
	star, from := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			from++
			p, i = star+1, from
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

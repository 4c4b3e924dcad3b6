package edge

import (
	"fmt"
	"strings"

	"fsbus/bus/matrix"
)

// acl decides who may talk to us at all. It follows what a room's server ACL does
// (client-server API, m.room.server_acl), but that no pattern to allow means all.
type acl struct {
	deny, allow patterns
	literals    bool
}

// patterns are names, and those with wildcards apart from them.
type patterns struct {
	exact map[string]bool
	globs []string
}

func newACL(c *Config) acl {
	return acl{newPatterns(c.Deny), newPatterns(c.Allow), c.AllowIPLiterals}
}

func newPatterns(list []string) patterns {
	p := patterns{exact: make(map[string]bool)}
	for _, s := range list {
		if s = strings.ToLower(s); strings.ContainsAny(s, "*?") {
			p.globs = append(p.globs, s)
		} else {
			p.exact[s] = true
		}
	}
	return p
}

func checkPatterns(key string, list []string) error {
	globs := 0
	for _, s := range list {
		switch {
		case s == "" || len(s) > matrix.MaxServerName:
			return fmt.Errorf("%s has a pattern of %d bytes, it must be one of 1 to %d", key, len(s), matrix.MaxServerName)
		case strings.ContainsAny(s, "*?"):
			globs++
		}
	}
	if len(list) > maxPatterns || globs > maxGlobs {
		return fmt.Errorf("%s has %d patterns, %d of them with * or ?, it must be at most %d and %d", key, len(list), globs, maxPatterns, maxGlobs)
	}
	return nil
}

// allows reports whether a server may talk to us.
func (a *acl) allows(n matrix.ServerName) bool {
	if !a.literals {
		if _, literal := n.IP(); literal {
			return false
		}
	}
	host := strings.ToLower(string(n)) // an IPv6 literal keeps its brackets
	if _, port, has := n.Split(); has && port > 0 {
		host = host[:strings.LastIndexByte(host, ':')]
	}
	if a.deny.match(host) {
		return false
	}
	return len(a.allow.exact)+len(a.allow.globs) == 0 || a.allow.match(host)
}

func (p *patterns) match(s string) bool {
	if p.exact[s] {
		return true
	}
	for _, g := range p.globs {
		if glob(g, s) {
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

package netx

import "net/netip"

// clientKey is what one client is told from another by: an IPv4 address, or the
// /64 of an IPv6 address, of which one client has all.
func clientKey(a netip.Addr) netip.Addr {
	if a.Is6() && !a.Is4In6() {
		p, _ := a.WithZone("").Prefix(64) // 64 is no error
		return p.Addr()
	}
	return a.Unmap()
}

// siteKey is the /48 of an IPv6 client, of which one site may have all; zero for IPv4.
func siteKey(key netip.Addr) netip.Addr {
	if !key.Is6() {
		return netip.Addr{}
	}
	p, _ := key.Prefix(48) // 48 is no error
	return p.Addr()
}

// shares counts what each client has of something. The zero address is nobody's.
type shares struct {
	clients map[netip.Addr]int // by clientKey
	sites   map[netip.Addr]int // by siteKey
}

func newShares() shares {
	return shares{clients: map[netip.Addr]int{}, sites: map[netip.Addr]int{}}
}

// add counts n more for a client, or fewer.
func (s *shares) add(key netip.Addr, n int) {
	count := func(m map[netip.Addr]int, k netip.Addr) {
		if m[k] += n; m[k] == 0 {
			delete(m, k)
		}
	}
	count(s.clients, key)
	if site := siteKey(key); site.IsValid() {
		count(s.sites, site)
	}
}

// own returns what a client itself has.
func (s *shares) own(key netip.Addr) int { return s.clients[key] }

// weight returns what counts as a client's: what it has, or half of what its /48 has if
// that is more, as one who has a /48 has 65,536 clients.
func (s *shares) weight(key netip.Addr) int {
	n := s.clients[key]
	if site := siteKey(key); site.IsValid() {
		n = max(n, (s.sites[site]+1)/2)
	}
	return n
}

// mayTake reports whether a client that counts for own places may have one more, when
// used of limit are taken: three times as many as it holds must stay free. Alone it
// gets a quarter so, several get less each, and 4/7 together if they are four:
// whoever comes next finds a place, and the more a client holds the more of the
// last ones are not for it.
//
// Requests of which nobody knows whose they are, as behind a proxy that does not
// say for whom it speaks, may be everybody's. They have no share but leave an
// eighth to those who have a name.
func mayTake(key netip.Addr, own, used, limit int) bool {
	if !key.IsValid() {
		return limit-used > limit/8
	}
	return limit-used > 3*own
}

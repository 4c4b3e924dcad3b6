package netx

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// DefaultBlocklist returns the ranges that Synapse blocks by default
// (config/repository.py and config/server.py, ip_range_blocklist): private,
// link-local, documentation and multicast addresses; and those that are reserved
// (IANA's special-purpose registries).
func DefaultBlocklist() []string {
	return []string{
		"127.0.0.0/8",     // loopback
		"10.0.0.0/8",      // private
		"172.16.0.0/12",   // private
		"192.168.0.0/16",  // private
		"100.64.0.0/10",   // carrier-grade NAT
		"192.0.0.0/24",    // IETF protocol assignments
		"169.254.0.0/16",  // link-local; cloud metadata services
		"192.88.99.0/24",  // 6to4 relays
		"198.18.0.0/15",   // benchmarks
		"192.0.2.0/24",    // documentation
		"198.51.100.0/24", // documentation
		"203.0.113.0/24",  // documentation
		"224.0.0.0/4",     // multicast
		"240.0.0.0/4",     // reserved, broadcast
		"::1/128",         // loopback
		"fe80::/10",       // link-local
		"fc00::/7",        // private
		"2001:db8::/32",   // documentation
		"ff00::/8",        // multicast
		"fec0::/10",       // site-local
		"100::/64",        // discarded
		"2001::/23",       // Teredo, benchmarks, ORCHID
		"3fff::/20",       // documentation
		"5f00::/16",       // segment routing
	}
}

// A Blocklist decides which addresses may be dialled. The allow-list wins over
// the block-list, as with Synapse's ip_range_allowlist.
//
// Some addresses are refused without standing on any list, unless allowed: all
// of 0.0.0.0/8 and "::", since connecting to them reaches this host itself, and
// the local NAT64 prefix 64:ff9b:1::/48, of which only the local network knows
// where the IPv4 address stands that it leads to. So are the addresses that this host
// has, if Own says what those are: whoever has a name lead to them would have us talk to
// ourselves, or to what listens beside us.
//
// An IPv6 address that leads to an IPv4 one (mapped, IPv4-compatible, translated, NAT64 or
// 6to4) must pass in both forms, so that it is no way around the list.
//
// The zero value and nil refuse those few addresses and nothing else.
type Blocklist struct {
	block, allow []netip.Prefix

	// Own returns the addresses of this host. It is called at most once in ownFor, and
	// may be nil.
	Own func() []netip.Addr

	mu   sync.Mutex
	own  map[netip.Addr]bool
	seen time.Time // when Own was called last
}

// ownFor is how long the addresses of this host are taken to be the same.
const ownFor = time.Minute

// HostAddresses returns the addresses of this host's interfaces, none if they cannot be
// found out.
func HostAddresses() (list []netip.Addr) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			list = append(list, p.Addr().Unmap().WithZone(""))
		}
	}
	return list
}

// isOwn reports whether addr is one of this host's.
func (b *Blocklist) isOwn(addr netip.Addr) bool {
	if b == nil || b.Own == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); b.own == nil || now.Sub(b.seen) >= ownFor {
		b.own, b.seen = map[netip.Addr]bool{}, now
		for _, a := range b.Own() {
			b.own[a] = true
		}
	}
	return b.own[addr]
}

var (
	thisNetwork    = netip.MustParsePrefix("0.0.0.0/8")       // RFC 1122 section 3.2.1.3
	nat64          = netip.MustParsePrefix("64:ff9b::/96")    // RFC 6052
	nat64Local     = netip.MustParsePrefix("64:ff9b:1::/48")  // RFC 8215
	sixToFour      = netip.MustParsePrefix("2002::/16")       // RFC 3056
	translated     = netip.MustParsePrefix("::ffff:0:0:0/96") // RFC 2765 (SIIT)
	ipv4Compatible = netip.MustParsePrefix("::/96")           // RFC 4291 section 2.5.5.1
	ipv6Loopback   = netip.IPv6Loopback()                     // in ::/96, but no IPv4 address
)

// NewBlocklist parses the two lists. An entry is a prefix in CIDR notation or a
// single address. The error names the entry that is neither.
func NewBlocklist(block, allow []string) (*Blocklist, error) {
	var b Blocklist
	var err error
	if b.block, err = parsePrefixes("block-list", block); err != nil {
		return nil, err
	}
	if b.allow, err = parsePrefixes("allow-list", allow); err != nil {
		return nil, err
	}
	return &b, nil
}

func parsePrefixes(list string, entries []string) ([]netip.Prefix, error) {
	prefixes := make([]netip.Prefix, 0, len(entries))
	for _, entry := range entries {
		p, err := parsePrefix(strings.TrimSpace(entry))
		if err != nil {
			return nil, fmt.Errorf("netx: %s: %q: %w", list, entry, err)
		}
		prefixes = append(prefixes, p)
	}
	return prefixes, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	var p netip.Prefix
	if strings.Contains(s, "/") {
		var err error
		if p, err = netip.ParsePrefix(s); err != nil {
			return p, fmt.Errorf("not an IP range")
		}
	} else {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return p, fmt.Errorf("neither an IP range nor an IP address")
		}
		if a.Zone() != "" {
			return p, fmt.Errorf("an address with a zone cannot be listed")
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() {
		// Addresses are compared in their IPv4 form.
		if p.Bits() < 96 {
			return p, fmt.Errorf("covers more than the IPv4-mapped addresses; list IPv4 and IPv6 ranges apart")
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// Allowed reports whether addr may be dialled. The invalid address may not. A
// zone is ignored.
func (b *Blocklist) Allowed(addr netip.Addr) bool {
	if !addr.IsValid() {
		return false
	}
	addr = addr.Unmap().WithZone("")
	if b != nil && within(b.allow, addr) {
		return true
	}
	if b != nil && within(b.block, addr) {
		return false
	}
	if addr.IsUnspecified() || thisNetwork.Contains(addr) || nat64Local.Contains(addr) || b.isOwn(addr) {
		return false
	}
	if v4, ok := embedded(addr); ok {
		return b.Allowed(v4)
	}
	return true
}

func within(prefixes []netip.Prefix, addr netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// embedded returns the IPv4 address that an IPv6 address leads to. addr is
// unmapped and has no zone.
func embedded(addr netip.Addr) (netip.Addr, bool) {
	if addr.Is4() || addr == ipv6Loopback {
		return netip.Addr{}, false
	}
	b := addr.As16()
	switch {
	case nat64.Contains(addr), translated.Contains(addr), ipv4Compatible.Contains(addr):
		return netip.AddrFrom4([4]byte(b[12:16])), true
	case sixToFour.Contains(addr):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}

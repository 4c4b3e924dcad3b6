package netx

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBlocklist(t *testing.T) {
	b, err := NewBlocklist(append(DefaultBlocklist(), "203.0.112.9", "2a00:1::/32"), []string{"10.1.0.0/16", "192.168.7.7", "fe80::1"})
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		addr string
		want bool
	}{
		{"8.8.8.8", true},
		{"2a01:4f8::1", true},
		// Synapse's list, first and last addresses.
		{"127.0.0.1", false}, {"127.255.255.255", false}, {"126.255.255.255", true}, {"128.0.0.0", true},
		{"10.0.0.0", false}, {"11.0.0.0", true},
		{"172.15.255.255", true}, {"172.16.0.0", false}, {"172.31.255.255", false}, {"172.32.0.0", true},
		{"192.168.0.1", false}, {"192.169.0.0", true},
		{"100.64.0.1", false}, {"100.128.0.0", true},
		{"192.0.0.1", false}, {"192.0.1.0", true}, {"192.0.2.1", false},
		{"169.254.169.254", false},
		{"192.88.99.1", false}, {"198.18.0.1", false}, {"198.19.255.255", false},
		{"198.51.100.1", false}, {"203.0.113.1", false},
		{"224.0.0.1", false}, {"239.255.255.255", false},
		{"::1", false}, {"fe80::2", false}, {"febf::1", false}, {"fc00::1", false}, {"fdff::1", false},
		{"2001:db8::1", false}, {"ff02::1", false}, {"fec0::1", false}, {"feff::1", false},
		// The lists' own entries; the allow-list wins.
		{"203.0.112.9", false}, {"203.0.112.8", true}, {"2a00:1::5", false},
		{"10.1.2.3", true}, {"10.2.0.0", false}, {"192.168.7.7", true}, {"192.168.7.8", false}, {"fe80::1", true},
		// What is reserved, and leads to somewhere private.
		{"240.0.0.1", false}, {"255.255.255.255", false}, {"100::1", false}, {"2001:0:4136:e378:8000:63bf:3fff:fdd2", false},
		{"2001:1ff::1", false}, {"2001:200::1", true}, {"3fff:0fff::1", false}, {"5f00::1", false},
		{"::ffff:0:10.9.0.1", false}, {"::ffff:0:8.8.8.8", true},
		// Zones do not help.
		{"fe80::2%eth0", false}, {"fe80::1%eth0", true},
		// This host.
		{"0.0.0.0", false}, {"0.1.2.3", false}, {"::", false},
		// IPv4 in IPv6's clothes.
		{"::ffff:127.0.0.1", false}, {"::ffff:8.8.8.8", true}, {"::ffff:10.1.2.3", true}, {"::ffff:0.0.0.0", false},
		{"::127.0.0.1", false}, {"::8.8.8.8", true}, {"::2", false},
		{"64:ff9b::127.0.0.1", false}, {"64:ff9b::a9fe:a9fe", false}, {"64:ff9b::8.8.8.8", true},
		{"64:ff9b::10.1.2.3", true}, {"64:ff9b::10.2.2.3", false}, {"64:ff9b::", false},
		{"64:ff9b:1::8.8.8.8", false},
		{"2002:7f00:1::1", false}, {"2002:a02:1::1", false}, {"2002:a01:1::1", true}, {"2002:808:808::1", true}, {"2002::1", false},
	}
	for _, tt := range tests {
		if got := b.Allowed(netip.MustParseAddr(tt.addr)); got != tt.want {
			t.Errorf("Allowed(%s) = %v, want %v", tt.addr, got, tt.want)
		}
	}
	if b.Allowed(netip.Addr{}) {
		t.Error("the invalid address is allowed")
	}
}

// The addresses of this host are not dialled, unless they are allowed, and are looked up
// again after a while.
func TestBlocklistOwnAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, err := NewBlocklist(nil, []string{"9.9.9.3"})
		if err != nil {
			t.Fatal(err)
		}
		own, asked := []string{"9.9.9.1", "2a00::1", "9.9.9.3"}, 0
		b.Own = func() (list []netip.Addr) {
			asked++
			for _, s := range own {
				list = append(list, netip.MustParseAddr(s))
			}
			return list
		}
		for addr, want := range map[string]bool{"9.9.9.1": false, "::ffff:9.9.9.1": false, "64:ff9b::9.9.9.1": false, "2a00::1": false, "9.9.9.2": true, "9.9.9.3": true} {
			if got := b.Allowed(netip.MustParseAddr(addr)); got != want {
				t.Errorf("%s: %v", addr, got)
			}
		}
		own = []string{"9.9.9.2"}
		time.Sleep(ownFor)
		if b.Allowed(netip.MustParseAddr("9.9.9.2")) || !b.Allowed(netip.MustParseAddr("9.9.9.1")) || asked != 2 {
			t.Errorf("an address that has changed is not seen, asked %d times", asked)
		}
	})
	for _, a := range HostAddresses() {
		if a.IsLoopback() {
			return
		}
	}
	t.Error("this host has no loopback address")
}

func TestBlocklistWithoutEntries(t *testing.T) {
	empty, err := NewBlocklist(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*Blocklist{"empty": empty, "zero": {}, "nil": nil} {
		for addr, want := range map[string]bool{"127.0.0.1": true, "10.0.0.1": true, "::1": true, "0.0.0.0": false,
			"::": false, "64:ff9b::7f00:1": true, "64:ff9b:1::1": false, "::ffff:0.0.0.0": false} {
			if got := b.Allowed(netip.MustParseAddr(addr)); got != want {
				t.Errorf("%s: Allowed(%s) = %v, want %v", name, addr, got, want)
			}
		}
	}
	all, err := NewBlocklist(nil, []string{"0.0.0.0", "::", "64:ff9b:1::/48"})
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"0.0.0.0", "::", "64:ff9b:1::1", "::ffff:0.0.0.0"} {
		if !all.Allowed(netip.MustParseAddr(addr)) {
			t.Errorf("%s is refused although it is on the allow-list", addr)
		}
	}
}

func TestNewBlocklistEntries(t *testing.T) {
	for entry, blocked := range map[string]string{
		"10.1.2.3/8":             "10.200.0.1", // host bits are no mistake
		"10.1.2.3":               "10.1.2.3",
		" 10.0.0.0/8 ":           "10.0.0.1",
		"::ffff:10.0.0.0/104":    "10.0.0.1",
		"::ffff:10.1.2.3":        "10.1.2.3",
		"2001:67c::/32":          "2001:67c::1",
		"::ffff:192.168.0.0/112": "192.168.0.5",
		"0.0.0.0/0":              "1.2.3.4",
	} {
		b, err := NewBlocklist([]string{entry}, nil)
		if err != nil {
			t.Errorf("%q: %v", entry, err)
			continue
		}
		if b.Allowed(netip.MustParseAddr(blocked)) {
			t.Errorf("%q does not block %s", entry, blocked)
		}
	}
	for _, entry := range []string{"", "/", "10.0.0.0/33", "10.0.0/8", "example.org", "10.0.0.0/-1", "fe80::1%eth0",
		"fe80::%eth0/10", "::/129", "::ffff:0:0/90", "10.0.0.0-10.0.0.9"} {
		for _, lists := range [][2][]string{{{"1.2.3.4", entry}, nil}, {nil, {entry}}} {
			if _, err := NewBlocklist(lists[0], lists[1]); err == nil {
				t.Errorf("%q is taken", entry)
			} else if !strings.Contains(err.Error(), `"`+entry+`"`) {
				t.Errorf("%q: the error does not name the entry: %v", entry, err)
			}
		}
	}
}

// FuzzBlocklist looks for an address that is a way around the list.
func FuzzBlocklist(f *testing.F) {
	f.Add("10.0.0.0/8", "10.0.0.5", []byte{10, 0, 0, 1})
	f.Add("::/0", "::1", []byte{8, 8, 8, 8})
	f.Add("0.0.0.0/0", "2002::/16", []byte{127, 0, 0, 1})
	f.Fuzz(func(t *testing.T, block, allow string, v4 []byte) {
		b, err := NewBlocklist([]string{block}, nil)
		if err == nil && len(v4) >= 4 {
			a := netip.AddrFrom4([4]byte(v4))
			if got, want := b.Allowed(netip.AddrFrom16(a.As16())), b.Allowed(a); got != want {
				t.Errorf("block %q: mapped %v: %v, plain: %v", block, a, got, want)
			}
			if !b.Allowed(a) {
				v := a.As4()
				for _, in6 := range []netip.Addr{
					netip.AddrFrom16([16]byte{0: 0, 1: 0x64, 2: 0xff, 3: 0x9b, 12: v[0], 13: v[1], 14: v[2], 15: v[3]}),
					netip.AddrFrom16([16]byte{0x20, 0x02, v[0], v[1], v[2], v[3], 6: 1}),
				} {
					if b.Allowed(in6) {
						t.Errorf("block %q: %v is refused, %v is not", block, a, in6)
					}
				}
			}
		}
		if both, err := NewBlocklist([]string{block}, []string{allow}); err == nil && len(v4) >= 4 {
			a := netip.AddrFrom4([4]byte(v4))
			only, _ := NewBlocklist(nil, []string{allow})
			if within(only.allow, a) && !both.Allowed(a) {
				t.Errorf("%v is on the allow-list %q and refused", a, allow)
			}
		}
	})
}

package node

import (
	"fmt"
	"strings"
	"testing"

	"fsbus/sched"
)

// fitConfig loads a configuration with a memory limit in MiB and lines of its own.
func fitConfig(t *testing.T, mib int64, keys, edge bool, lines string) *Config {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf("data_dir = \".\"\nmemory_limit = \"%dMiB\"\n[homeserver]\nserver_name = \"example.org\"\n", mib)
	if keys {
		keyFile(t, dir, 7)
		text += "signing_key_path = \"signing.key\"\n"
	}
	text += "[front]\nlisten = \"127.0.0.1:8009\"\nsecret = \"0123456789abcdef\"\n"
	if edge {
		text += "[edge]\nlisten = \"127.0.0.1:8449\"\nupstream = \"http://127.0.0.1:8008\"\n"
	}
	c, err := parseConfig("FILE", dir, text+lines)
	if err != nil {
		t.Fatalf("%d MiB, keys %t, edge %t: %v", mib, keys, edge, err)
	}
	return c
}

// Whatever memory there is, from the least that does, the limits are made to fit
// it, and to one another: parseConfig fails if they do not. More memory is never less
// of anything.
func TestDefaultsFitTheMemoryLimit(t *testing.T) {
	for _, c := range []struct {
		keys, edge bool
		from, to   int64 // MiB; what is needed for all
	}{{false, false, 28, 53}, {true, false, 33, 64}, {false, true, 43, 115}, {true, true, 48, 127}} {
		var before []field
		for mib := c.from; mib <= c.to+1; mib++ {
			cfg := fitConfig(t, mib, c.keys, c.edge, "")
			b := cfg.Budget()
			if b.Memory > sched.Bytes(mib)*sched.MiB {
				t.Errorf("%+v: %v of %d MiB", c, b.Memory, mib)
			}
			if lowered := len(cfg.lowered) > 0; lowered != (mib < c.to) {
				t.Errorf("%+v: with %d MiB lowered: %q", c, mib, cfg.lowered)
			}
			fields := cfg.fields()
			for i, f := range fields {
				if v, ok := number(f.value.Interface()); ok && before != nil {
					if was, _ := number(before[i].value.Interface()); v < was {
						t.Errorf("%+v: %s is %v with %d MiB, and was %v with less", c, f.key(), f.value, mib, before[i].value)
					}
				}
			}
			before = fields
		}
	}
}

// The least memory_limit that may be written is the least that does.
func TestLeastMemoryLimit(t *testing.T) {
	for _, f := range new(Config).fields() {
		if f.key() != "memory_limit" {
			continue
		}
		least, _, _ := strings.Cut(f.tag.Get("range"), "..")
		for _, tt := range []struct {
			limit sched.Bytes
			does  bool
		}{{sched.Bytes(f.parse(least)), true}, {sched.Bytes(f.parse(least)) - sched.MiB, false}} {
			c := DefaultConfig()
			c.MemoryLimit = tt.limit
			(&checker{c: &c}).fit()
			if b := c.Budget(); (b.Memory <= b.Limit) != tt.does {
				t.Errorf("%v of %v may be used, want that to do: %t", b.Memory, b.Limit, tt.does)
			}
		}
	}
}

// Limits that nobody has set go with those that were: one key alone is enough.
func TestFitFollowsWhatIsSet(t *testing.T) {
	type limits struct{ unknown, failing, hosts, origins int }
	of := func(c *Config) limits {
		return limits{c.Outbound.UnknownHosts, c.Outbound.FailingHosts, c.Outbound.MaxHosts, c.Edge.Origins}
	}
	for _, tt := range []struct {
		lines string
		want  limits
		said  string // by Notes; "" for nothing
	}{
		{"", limits{72, 16, 5600, 2000}, ""},
		{"[outbound]\nworkers = 50", limits{36, 8, 5600, 2000}, "outbound.unknown_hosts from 72 to 36, outbound.failing_hosts from 16 to 8"},
		{"[outbound]\nworkers = 8", limits{6, 2, 5600, 2000}, "outbound.unknown_hosts from 72 to 6, outbound.failing_hosts from 16 to 2"},
		{"[outbound]\nworkers = 200", limits{72, 16, 5600, 2000}, ""},
		{"[outbound]\nworkers = 600", limits{72, 16, 6005, 2000}, "outbound.max_hosts from 5600 to 6005"},
		{"[outbound]\nworkers = 50\nunknown_hosts = 50\nmax_hosts = 4400", limits{50, 8, 4400, 2000}, "outbound.failing_hosts from 16 to 8"},
		{"requests = 5000", limits{72, 16, 5600, 5281}, "edge.origins from 2000 to 5281"},
		{"concurrency = 1024\nparallel = 1024", limits{72, 16, 5600, 2817}, "edge.origins from 2000 to 2817"},
		{"requests = 5000\norigins = 5280", limits{}, "mistake"},
		{"[outbound]\nworkers = 50\nunknown_hosts = 51", limits{}, "mistake"},
	} {
		dir := t.TempDir()
		text := "data_dir = \".\"\nmemory_limit = \"512MiB\"\nhomeserver.server_name = \"example.org\"\nfront.listen = \"127.0.0.1:8009\"\nfront.secret = \"0123456789abcdef\"\n" +
			"[edge]\nlisten = \"127.0.0.1:8449\"\nupstream = \"http://127.0.0.1:8008\"\n"
		c, err := parseConfig("FILE", dir, text+tt.lines)
		if tt.said == "mistake" {
			if err == nil {
				t.Errorf("%q is accepted", tt.lines)
			} else if all := configErrors(t, err); len(all) != 1 || !strings.Contains(text+tt.lines, all[0].Key[strings.Index(all[0].Key, ".")+1:]) {
				t.Errorf("%q: %v, which is about what nobody has written", tt.lines, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.lines, err)
			continue
		}
		said := strings.TrimPrefix(strings.Join(c.Notes(), "\n"), "changed to go with what is set: ")
		if got := of(c); got != tt.want || said != tt.said {
			t.Errorf("%q: %+v, %q; want %+v, %q", tt.lines, got, said, tt.want, tt.said)
		}
	}
	c := fitConfig(t, 512, true, false, "max_connections = 8000\n")
	if c.Outbound.MaxHosts != 8305 || len(c.lowered) != 0 {
		t.Errorf("max_hosts is %d, lowered: %q", c.Outbound.MaxHosts, c.lowered)
	}
	// Memory lowers what has followed before.
	c = fitConfig(t, 40, false, false, "max_reading = 64\n[outbound]\nworkers = 80\n")
	if o := c.Outbound; len(c.lowered) == 0 || o.UnknownHosts > 58 || o.MaxHosts <= c.Front.MaxConnections+3*o.Workers+4 {
		t.Errorf("%+v, lowered: %q", o, c.lowered)
	}
}

// What is set stands, and what is lowered is said.
func TestFitLeavesAloneWhatIsSet(t *testing.T) {
	c := fitConfig(t, 64, true, true, "max_connections = 200\n[outbound]\nworkers = 90\n")
	if c.Edge.MaxConnections != 200 || c.Outbound.Workers != 90 {
		t.Errorf("they are %d and %d", c.Edge.MaxConnections, c.Outbound.Workers)
	}
	want := []string{"memory_limit: 64MiB is less than the defaults need; lowered to fit it: ", "front.max_connections from 4200 to ", "edge.checked_body from 12800KiB to "}
	w := strings.Join(c.Warnings(), "\n")
	for _, s := range want {
		if !strings.Contains(w, s) {
			t.Errorf("%q is not in the warnings:\n%s", s, w)
		}
	}
	if strings.Contains(w, "workers") || strings.Contains(w, "edge.max_connections") {
		t.Errorf("what is set is said to be lowered:\n%s", w)
	}
}

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
	}{{false, false, 28, 53}, {true, false, 33, 64}, {false, true, 37, 107}, {true, true, 42, 119}} {
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

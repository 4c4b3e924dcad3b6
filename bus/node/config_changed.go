package node

import (
	"bytes"
	"reflect"
	"slices"
)

// coreSections are those with limits of the core.
var coreSections = []string{"outbound", "keys", "joins", "media", "outbox", "edge"}

// Changed returns the keys in which new differs from old: those that a running
// bus takes over, and those that need a restart.
func Changed(old, new *Config) (applied, needRestart []string) {
	_, applied, needRestart = old.merge(new)
	return applied, needRestart
}

// applyReloadable takes over from new what Changed calls applied.
func (c *Config) applyReloadable(new *Config) {
	*c, _, _ = c.merge(new)
}

// merge returns c with what a running bus can take over from new, and the keys
// of that and of the rest. Limits of the core are taken over all together or
// not at all: not when they are too much for what only a restart changes, as
// more unknown_hosts than there are workers so far. Signing keys are taken over
// when their file has others, but whether there are any needs a restart.
func (c *Config) merge(new *Config) (merged Config, applied, needRestart []string) {
	newSecret := c.Front.SecretPath != "" && !bytes.Equal(c.Front.secret, new.Front.secret) // in the same file
	newKeys := !c.Homeserver.keys.equal(new.Homeserver.keys)
	for _, withLimits := range []bool{true, false} {
		merged, applied, needRestart = *c, nil, nil
		theirs := new.fields()
		for i, f := range merged.fields() {
			reload := f.tag.Get("reload") != "" && (withLimits || !slices.Contains(coreSections, f.section))
			switch {
			case f.key() == "homeserver.signing_key_path":
				switch {
				case f.equal(theirs[i]) && !newKeys:
				case c.hasOutbox() != new.hasOutbox():
					needRestart = append(needRestart, f.key())
				default:
					applied = append(applied, f.key())
					f.value.Set(theirs[i].value)
					merged.Homeserver.keys = new.Homeserver.keys
				}
			case f.equal(theirs[i]) && !(newSecret && f.key() == "front.secret_path"):
			case reload:
				applied = append(applied, f.key())
				f.value.Set(theirs[i].value)
			default:
				needRestart = append(needRestart, f.key())
			}
		}
		inbound := merged.Edge.core()
		if b := merged.Budget(); b.Memory <= b.Limit && merged.Core().Validate() == nil && (!merged.hasEdge() || inbound.Validate() == nil) {
			break
		}
	}
	return merged, applied, needRestart
}

// equal reports whether f and g have the same value.
func (f field) equal(g field) bool {
	return reflect.DeepEqual(f.value.Interface(), g.value.Interface())
}

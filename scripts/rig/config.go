package rig

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

var (
	sectionLine = regexp.MustCompile(`^\[([a-z_]+)\]\s*$`)
	keyLine     = regexp.MustCompile(`^([a-z_]+) = (.*)`)
)

// Adapt returns a configuration like the example, with other values for some
// keys. settings has them by "key" or "section.key", each as it is to stand in
// the file: Text and Texts write what is in quotes. It is an error if the
// example does not have a key, or has a value of several lines for it.
func Adapt(example string, settings map[string]string) (string, error) {
	left := maps.Clone(settings)
	var out strings.Builder
	section := ""
	for line := range strings.Lines(example) {
		if m := sectionLine.FindStringSubmatch(line); m != nil {
			section = m[1] + "."
		}
		m := keyLine.FindStringSubmatch(line)
		if m == nil {
			out.WriteString(line)
			continue
		}
		value, ok := left[section+m[1]]
		if !ok {
			out.WriteString(line)
			continue
		}
		delete(left, section+m[1])
		if m[2] == "[" {
			return "", fmt.Errorf("rig: the example's %s%s has several lines", section, m[1])
		}
		fmt.Fprintf(&out, "%s = %s\n", m[1], value)
	}
	if len(left) > 0 {
		return "", fmt.Errorf("rig: the example configuration has no %s", strings.Join(slices.Sorted(maps.Keys(left)), ", "))
	}
	return out.String(), nil
}

// Text returns s as a text in TOML. Among the escapes of Go only those of
// control characters below U+0020 differ, which no path or address has.
func Text(s string) string { return strconv.Quote(s) }

// Texts returns a list of texts in TOML.
func Texts(list ...string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = Text(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

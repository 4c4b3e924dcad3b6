package matrix

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Bounds on /.well-known/matrix/server. The specification recommends the default
// and the longest age (S2S "Resolving server names"); the shortest, and the size,
// are Synapse's (http/federation/well_known_resolver.py).
const (
	WellKnownDefault = 24 * time.Hour  // the age of an answer that says nothing of it
	WellKnownMin     = 5 * time.Minute // however short an age the answer asks for
	WellKnownMax     = 48 * time.Hour  // however long
	MaxWellKnown     = 50 << 10        // bytes in a document
)

// ErrWellKnown is what ParseWellKnown's errors wrap.
var ErrWellKnown = errors.New("invalid well-known document")

// ParseWellKnown returns the server that a /.well-known/matrix/server document
// delegates to (S2S "Resolving server names", step 3).
func ParseWellKnown(body []byte) (ServerName, error) {
	if len(body) > MaxWellKnown {
		return "", fmt.Errorf("%w: %d bytes, at most %d", ErrWellKnown, len(body), MaxWellKnown)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return "", fmt.Errorf("%w: not a JSON object", ErrWellKnown)
	}
	raw, ok := members["m.server"]
	if !ok {
		return "", fmt.Errorf("%w: no m.server", ErrWellKnown)
	}
	var text *string
	if err := json.Unmarshal(raw, &text); err != nil || text == nil {
		return "", fmt.Errorf("%w: m.server is no string", ErrWellKnown)
	}
	name, err := ParseServerName(*text)
	if err != nil {
		return "", fmt.Errorf("%w: m.server: %w", ErrWellKnown, err)
	}
	return name, nil
}

// WellKnownLifetime returns how long a valid document may be used, from the values
// of its Cache-Control and Expires headers. Cache-Control's no-store and no-cache
// make it the shortest age, else max-age decides, else Expires, of which one that is
// no date means already expired (RFC 9111 section 5.3), else WellKnownDefault. The
// result is from WellKnownMin to WellKnownMax.
func WellKnownLifetime(cacheControl, expires []string, now time.Time) time.Duration {
	maxAge, known := time.Duration(0), false
	for _, header := range cacheControl {
		for rest := header; rest != ""; {
			var directive string
			directive, rest = cutDirective(rest)
			name, value, _ := strings.Cut(directive, "=")
			value = strings.Trim(strings.Trim(value, " \t"), `"`)
			switch strings.ToLower(strings.Trim(name, " \t")) {
			case "no-store", "no-cache":
				return WellKnownMin
			case "max-age":
				// The first that can be read counts (RFC 9111 section 4.2.1).
				if !known && allDigits(value) {
					maxAge, known = clampSeconds(value, WellKnownMax), true
				}
			}
		}
	}
	if known {
		return max(maxAge, WellKnownMin)
	}
	if len(expires) == 0 {
		return WellKnownDefault
	}
	t, ok := parseHTTPDate(strings.Trim(expires[len(expires)-1], " \t"))
	if !ok {
		return WellKnownMin
	}
	return min(max(t.Sub(now), WellKnownMin), WellKnownMax)
}

// cutDirective splits a Cache-Control value at its first comma that is not inside
// a quoted string.
func cutDirective(s string) (directive, rest string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case s[i] == '\\' && quoted:
			i++
		case s[i] == ',' && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

package matrix

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// MaxRetryAfter is the longest wait that ParseRetryAfter returns. A server that
// asks for more is asked again after it.
const MaxRetryAfter = time.Hour

// maxErrorBody is the size up to which the body of an error is looked at.
const maxErrorBody = 64 << 10

// ParseRetryAfter returns how long a server wants to be left alone, from the
// retry_after_ms of an M_LIMIT_EXCEEDED body (client-server API, "Rate limiting")
// or the Retry-After header (RFC 9110 section 10.2.3: seconds, or a date, which is
// compared with now). The body counts if it has a usable value. The result is
// from 0 to MaxRetryAfter. It is false if neither has a value that makes sense: one
// that is negative or in the past does not.
func ParseRetryAfter(header string, body []byte, now time.Time) (time.Duration, bool) {
	if d, ok := retryAfterBody(body); ok {
		return d, true
	}
	header = strings.Trim(header, " \t")
	if allDigits(header) {
		return clampSeconds(header, MaxRetryAfter), true
	}
	t, ok := parseHTTPDate(header)
	if !ok || t.Before(now) {
		return 0, false
	}
	return min(t.Sub(now), MaxRetryAfter), true
}

func retryAfterBody(body []byte) (time.Duration, bool) {
	if len(body) == 0 || len(body) > maxErrorBody {
		return 0, false
	}
	var members map[string]json.RawMessage
	if json.Unmarshal(body, &members) != nil {
		return 0, false
	}
	// Some servers send a fraction; as a float, a huge number stays comparable.
	ms, err := strconv.ParseFloat(string(members["retry_after_ms"]), 64)
	if err != nil || ms < 0 {
		return 0, false
	}
	if ms >= float64(MaxRetryAfter.Milliseconds()) {
		return MaxRetryAfter, true
	}
	return time.Duration(ms * float64(time.Millisecond)), true
}

// allDigits reports whether s is one or more ASCII digits.
func allDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// clampSeconds returns the number of seconds that digits are, at most limit.
func clampSeconds(digits string, limit time.Duration) time.Duration {
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n >= int64(limit/time.Second) { // the only error left is the range
		return limit
	}
	return time.Duration(n) * time.Second
}

// parseHTTPDate reads the three forms of RFC 9110 section 5.6.7. net/http has the
// same, but is not for this package to import.
func parseHTTPDate(s string) (time.Time, bool) {
	for _, layout := range [...]string{
		"Mon, 02 Jan 2006 15:04:05 GMT",
		time.RFC850,
		time.ANSIC,
	} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

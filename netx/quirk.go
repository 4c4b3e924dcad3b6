package netx

import (
	"strings"
	"sync"
	"time"
)

// quirkFor is for how long it is remembered of a server that something does not work with
// it, and maxQuirks of how many.
const (
	quirkFor  = 6 * time.Hour
	maxQuirks = 512
)

// quirk remembers servers with which something does not work that most can do. It is safe
// for concurrent use. A nil one remembers nothing.
type quirk[K comparable] struct {
	now func() time.Time
	mu  sync.Mutex
	m   map[K]time.Time // until when
}

func newQuirk[K comparable](now func() time.Time) *quirk[K] {
	return &quirk[K]{now: now, m: make(map[K]time.Time)}
}

// note remembers a server. When there are too many any other is forgotten: it is found out
// again.
func (q *quirk[K]) note(k K) {
	if q == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for other := range q.m {
		if len(q.m) < maxQuirks {
			break
		}
		delete(q.m, other)
	}
	q.m[k] = q.now().Add(quirkFor)
}

func (q *quirk[K]) has(k K) bool {
	if q == nil {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	until, ok := q.m[k]
	if ok && !q.now().Before(until) {
		delete(q.m, k)
		return false
	}
	return ok
}

// http2Marks are parts of the texts of what net/http says when HTTP/2 fails, for which it
// has no types: the first that the remote has not processed the request.
var http2Marks = []struct {
	text        string
	unprocessed bool
}{
	{"REFUSED_STREAM", true},
	{"HTTP_1_1_REQUIRED", true},
	{"http2: Transport received Server's graceful shutdown GOAWAY", true},
	{"http2: client connection not usable", true},
	{"http2: client conn not usable", true},
	{"stream error: ", false},
	{"connection error: ", false},
	{"PROTOCOL_ERROR", false},
	{"GOAWAY", false},
	{"http2: ", false},
}

// brokenHTTP2 reports whether an error is one of HTTP/2 itself.
func brokenHTTP2(e *Error) bool {
	text := e.Err.Error()
	for _, m := range http2Marks {
		if strings.Contains(text, m.text) {
			return true
		}
	}
	return false
}

// unprocessed reports whether such an error says that the request was not processed.
func unprocessed(e *Error) bool {
	text := e.Err.Error()
	for _, m := range http2Marks {
		if m.unprocessed && strings.Contains(text, m.text) {
			return true
		}
	}
	return false
}

package fedload

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"iter"
	"net/url"
	"strings"
	"sync"

	"fsbus/bus/matrix"
)

// capture holds what a Synapse 1.160 sent through the hook while two users
// joined a room, chatted, read and left, a request a line. It is trimmed to what
// a replay needs. Names stand in for what differs from replay to replay:
// origin.test and remote.test for the two servers, TXN for a transaction or
// message id, HASH for an event's hash.
//
//go:embed capture.jsonl
var capture []byte

// captured is a line of capture.
type captured struct {
	Method string          `json:"method"`
	Target string          `json:"target"`
	Body   json.RawMessage `json:"body"`
}

var captures = sync.OnceValue(func() []captured {
	var lines []captured
	for text := range bytes.Lines(capture) {
		var c captured
		if err := json.Unmarshal(text, &c); err != nil {
			panic(fmt.Sprintf("fedload: capture.jsonl, line %d: %v", len(lines)+1, err))
		}
		lines = append(lines, c)
	}
	return lines
})

// CaptureLines is how many requests Replay makes before it begins again.
func CaptureLines() int { return len(captures()) }

// Replay yields n requests of the embedded capture, over and over, addressed to
// the destinations in turn. Transaction and message ids begin with prefix and
// never repeat, nor do the hashes of events, so give each replay within one run
// a prefix of its own.
//
// Synapse never has two transactions to one server in flight. For that to hold
// here there must be more than twice as many destinations as requests at once.
func Replay(origin matrix.ServerName, destinations []matrix.ServerName, prefix string, n int) iter.Seq[*Request] {
	return func(yield func(*Request) bool) {
		lines := captures()
		for k := range n {
			// Each round is shifted by one, lest a server gets the same line
			// every time.
			to := destinations[(k+k/len(lines))%len(destinations)]
			if !yield(lines[k%len(lines)].request(origin, to, fmt.Sprintf("%s%d", prefix, k))) {
				return
			}
		}
	}
}

func (c captured) request(origin, destination matrix.ServerName, id string) *Request {
	sum := sha256.Sum256([]byte(id))
	hash := base64.RawStdEncoding.EncodeToString(sum[:])
	target := strings.NewReplacer(
		"origin.test", url.QueryEscape(string(origin)),
		"remote.test", url.QueryEscape(string(destination)),
		"TXN", url.PathEscape(id))
	body := strings.NewReplacer(
		"origin.test", string(origin),
		"remote.test", string(destination),
		"TXN", id,
		"HASH", hash)
	return &Request{
		Destination: destination,
		Method:      c.Method,
		Target:      target.Replace(c.Target),
		Body:        []byte(body.Replace(string(c.Body))),
	}
}

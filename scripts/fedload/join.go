package fedload

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"fsbus/bus/matrix"
)

const federation = "/_matrix/federation/v1/"

// MakeJoin asks for the frame of the event with which the user @localpart joins a
// room (S2S "Joining Rooms"). It names the room versions that Synapse knows.
func (h Homeserver) MakeJoin(destination matrix.ServerName, room, localpart string) *Request {
	target := federation + "make_join/" + url.QueryEscape(room) + "/" + url.QueryEscape(h.user(localpart))
	for version, mark := 1, byte('?'); version <= 12; version, mark = version+1, '&' {
		target += fmt.Sprintf("%cver=%d", mark, version)
	}
	return &Request{Destination: destination, Method: http.MethodGet, Target: target}
}

// Join makes the event of an answer to MakeJoin, for a room of version 4 to 11: a
// PDU with the right hash and signature. The id is its true one, as long as the
// frame has nothing that a redaction takes away; simulated servers' have not.
func (h Homeserver) Join(made []byte, now time.Time) (id string, event json.RawMessage, err error) {
	var frame struct {
		Event object `json:"event"`
	}
	if err := json.Unmarshal(made, &frame); err != nil || frame.Event == nil {
		return "", nil, fmt.Errorf("fedload: not an answer to make_join: %.100q (%v)", made, err)
	}
	join := frame.Event
	join["origin"] = h.Name
	join["origin_server_ts"] = now.UnixMilli()
	delete(join, "hashes")
	delete(join, "unsigned")
	delete(join, "signatures")
	text, err := canonicalOf(join)
	if err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256(text)
	join["hashes"] = object{"sha256": base64.RawStdEncoding.EncodeToString(sum[:])}
	if text, err = canonicalOf(join); err != nil {
		return "", nil, err
	}
	sum = sha256.Sum256(text)
	if event, err = h.Key.Sign(text, string(h.Name)); err != nil {
		return "", nil, fmt.Errorf("fedload: sign a join: %w", err)
	}
	return "$" + base64.RawURLEncoding.EncodeToString(sum[:]), event, nil
}

// canonicalOf is canonical for what a server has sent.
func canonicalOf(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err == nil {
		b, err = matrix.CanonicalJSON(b)
	}
	if err != nil {
		return nil, fmt.Errorf("fedload: not an event: %w", err)
	}
	return b, nil
}

// SendJoin sends the event of Join, and asks for the members to be left out, as
// Synapse does.
func SendJoin(destination matrix.ServerName, room, id string, event json.RawMessage) *Request {
	return &Request{
		Destination: destination,
		Method:      http.MethodPut,
		Target:      "/_matrix/federation/v2/send_join/" + url.QueryEscape(room) + "/" + url.QueryEscape(id) + "?omit_members=true",
		Body:        event,
	}
}

// State asks for the state before an event of a room.
func State(destination matrix.ServerName, room, event string) *Request {
	return stateRequest("state/", destination, room, event)
}

// StateIDs is State for ids only.
func StateIDs(destination matrix.ServerName, room, event string) *Request {
	return stateRequest("state_ids/", destination, room, event)
}

func stateRequest(name string, destination matrix.ServerName, room, event string) *Request {
	return &Request{
		Destination: destination,
		Method:      http.MethodGet,
		Target:      federation + name + url.QueryEscape(room) + "?event_id=" + url.QueryEscape(event),
	}
}

// Event asks for one event.
func Event(destination matrix.ServerName, event string) *Request {
	return &Request{
		Destination: destination,
		Method:      http.MethodGet,
		Target:      federation + "event/" + url.QueryEscape(event),
	}
}

// Joiner joins rooms as Synapse does, as far as time-outs and retries go
// (http/matrixfederationclient.py). It stands in for one that knows one server
// of the room only, and looks at the answer's status but not at the state in it.
type Joiner struct {
	From Homeserver
	// Make and Send make the requests of the two steps, with Synapse's time-outs
	// for each: see NewJoiner.
	Make, Send *Client
	// Pauses are those before a send_join is tried again; as many tries as there
	// are pauses follow the first.
	Pauses []time.Duration
}

// NewJoiner returns one with Synapse's figures: 20 s for make_join, without
// another try; for send_join 60 s to the headers, as long again for the body, and
// four tries with 0.5, 1 and 2 s between them. client is called for each step.
func NewJoiner(from Homeserver, client func() *Client) *Joiner {
	j := &Joiner{
		From: from, Make: client(), Send: client(),
		Pauses: []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second},
	}
	j.Make.Timeout = 20 * time.Second
	j.Send.Timeout, j.Send.BodyTimeout = DefaultTimeout, DefaultTimeout
	return j
}

// Close closes both clients.
func (j *Joiner) Close() {
	j.Make.Close()
	j.Send.Close()
}

// Joined is how an attempt to join ended.
type Joined struct {
	Err   error         // nil: joined
	Tries int           // of send_join
	Took  time.Duration // from make_join to the end of the last answer
	Last  Result        // of send_join; the zero value if it did not come that far
}

// Join asks destination to let the user @localpart into the room.
func (j *Joiner) Join(ctx context.Context, destination matrix.ServerName, room, localpart string) (joined Joined) {
	start := time.Now()
	defer func() { joined.Took = time.Since(start) }()
	made := j.Make.Do(ctx, j.From.MakeJoin(destination, room, localpart))
	if err := failure(made); err != nil {
		joined.Err = fmt.Errorf("make_join: %w", err)
		return joined
	}
	id, event, err := j.From.Join(made.Body, time.Now())
	if err != nil {
		joined.Err = err
		return joined
	}
	request := SendJoin(destination, room, id, event)
	for {
		joined.Tries++
		joined.Last = j.Send.Do(ctx, request)
		err := failure(joined.Last)
		if err == nil {
			joined.Err = nil
			return joined
		}
		joined.Err = fmt.Errorf("send_join: %w", err)
		if !again(joined.Last) || joined.Tries > len(j.Pauses) {
			return joined
		}
		select {
		case <-ctx.Done():
			return joined
		case <-time.After(j.Pauses[joined.Tries-1]):
		}
	}
}

// failure is why a result is not the answer that was asked for; nil if it is.
func failure(res Result) error {
	switch {
	case res.Err != nil && res.Status == 0:
		return fmt.Errorf("no answer: %w", res.Err)
	case res.Err != nil:
		return fmt.Errorf("%d bytes of the body: %w", res.Size, res.Err)
	case res.Status != http.StatusOK:
		return fmt.Errorf("status %d: %.200s", res.Status, res.Body)
	}
	return nil
}

// again reports whether Synapse repeats a request after this: not once it has the
// headers of a 200, whatever becomes of the body.
func again(res Result) bool {
	return res.Status == 0 || res.Status == http.StatusTooManyRequests || res.Status >= 500
}

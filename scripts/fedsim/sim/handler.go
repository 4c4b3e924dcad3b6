package sim

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"fsbus/bus/matrix"
)

// maxRequest is the largest request body, in bytes: that of a transaction at
// Synapse (200 * MAX_PDU_SIZE, app/_base.py).
const maxRequest = 200 * 65536

// request is what an endpoint gets to see.
type request struct {
	*http.Request
	body   []byte
	origin string // who signed it; "" when that is not verified
}

// answer is what goes back: head, then filler, then stream, then body.
type answer struct {
	status      int
	contentType string // "": JSON
	head        []byte
	filler      int64            // bytes
	stream      iter.Seq[[]byte] // nil: none
	streamed    int64            // bytes that stream yields
	body        []byte
	retryAfter  time.Duration // 0: none

	delay   time.Duration // on top of the server's
	drip    time.Duration // see SendJoin
	rate    int64         // likewise
	chunked bool          // likewise
	cut     bool          // the connection is closed in the middle of the body
}

// size is that of the whole body, in bytes.
func (a *answer) size() int64 {
	return int64(len(a.head)) + a.filler + a.streamed + int64(len(a.body))
}

// ok answers with the JSON of a value made of maps, slices and strings.
func ok(v any) answer {
	body, err := json.Marshal(v)
	if err != nil {
		panic("sim: answer is not JSON: " + err.Error())
	}
	return answer{status: http.StatusOK, body: body}
}

func refusal(status int, errcode, message string) answer {
	return answer{status: status, body: matrix.ErrorJSON(errcode, message)}
}

// routes registers the endpoints. Patterns match escaped paths, so an encoded
// slash in an identifier does no harm.
func (w *World) routes() http.Handler {
	mux := http.NewServeMux()
	for i := range endpoints {
		e := &endpoints[i]
		mux.HandleFunc(e.pattern, func(rw http.ResponseWriter, r *http.Request) { w.handle(e, rw, r) })
	}
	return mux
}

// handle serves one request: the same way for all endpoints, since faults are
// the server's and not the endpoint's.
func (w *World) handle(e *endpoint, rw http.ResponseWriter, r *http.Request) {
	s := r.Context().Value(serverKey{}).(*server)
	w.recorder.begin(s, e.name)
	end := func(outcome string) { w.recorder.end(s, e.name, outcome) }

	kind := s.kindNow()
	a, whole := w.answer(e, s, kind, rw, r)
	if !whole || !pause(r.Context(), s.delay()+a.delay) {
		end(outcomeGone)
		panic(http.ErrAbortHandler)
	}
	switch {
	case kind == Garbage:
		end(outcomeGarbage)
		writeGarbage(rw, w.config.Seed)
	case kind == Cut || a.cut:
		a.write(r.Context(), rw, true, func() { end(outcomeCut) })
		panic(http.ErrAbortHandler) // closes the connection
	default:
		a.write(r.Context(), rw, false, func() { end(strconv.Itoa(a.status)) })
	}
}

// answer reads the request and decides on the answer. It reports false when the
// request did not arrive whole.
func (w *World) answer(e *endpoint, s *server, kind Kind, rw http.ResponseWriter, r *http.Request) (answer, bool) {
	body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, maxRequest))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return refusal(http.StatusRequestEntityTooLarge, matrix.MTooLarge, "the request is too large"), true
	}
	if err != nil {
		return answer{}, false
	}
	switch kind {
	case Garbage:
		return answer{}, true
	case Failing:
		return answer{
			status:      http.StatusBadGateway,
			contentType: "text/html",
			body:        []byte("<html><head><title>502 Bad Gateway</title></head><body>502 Bad Gateway</body></html>\n"),
		}, true
	case Limited:
		if wait := s.overRate(time.Now()); wait > 0 {
			return limited(wait), true
		}
	}
	req := &request{Request: r, body: body}
	if e.authenticated && len(w.config.Origins) > 0 {
		var verified bool
		if req.origin, verified = w.verify(s, r, body); !verified {
			return refusal(http.StatusUnauthorized, matrix.MUnauthorized, "no valid signature"), true
		}
	}
	return e.answer(s, req), true
}

// limited tells the client to wait, in the body as Synapse does and in the
// header as HTTP does (whole seconds, rounded up).
func limited(wait time.Duration) answer {
	a := ok(map[string]any{
		"errcode":        matrix.MLimitExceeded,
		"error":          "too many requests",
		"retry_after_ms": (wait + time.Millisecond - 1).Milliseconds(),
	})
	a.status, a.retryAfter = http.StatusTooManyRequests, wait
	return a
}

// verify returns who signed the request, if that is one of Config.Origins and
// it is meant for this server (S2S "Request Authentication", v1.18).
func (w *World) verify(s *server, r *http.Request, body []byte) (string, bool) {
	if r.Method == http.MethodGet {
		body = nil // not signed over
	}
	for _, header := range r.Header.Values("Authorization") {
		x, err := matrix.ParseXMatrix(header)
		if err != nil {
			continue
		}
		if x.Destination == "" {
			x.Destination = string(s.name)
		}
		if x.Destination != string(s.name) {
			continue
		}
		for _, o := range w.config.Origins {
			if string(o.Name) == x.Origin && o.KeyID == x.Key &&
				matrix.VerifyRequest(o.PublicKey, x, r.Method, r.RequestURI, body) == nil {
				return x.Origin, true
			}
		}
	}
	return "", false
}

// pause waits for d. It reports false if the client left meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// filler is what large answers are made of.
var filler = bytes.Repeat([]byte("fedsim filler, 32 bytes a line.\n"), 1024)

// write sends the answer, or, for half of it, headers that promise all. It calls
// end before the last bytes go, so that a client that has its answer finds its
// request counted as over. Errors are the client's business.
func (a answer) write(ctx context.Context, rw http.ResponseWriter, half bool, end func()) {
	size := a.size()
	h := rw.Header()
	h.Set("Content-Type", cmp.Or(a.contentType, "application/json"))
	if !a.chunked {
		h.Set("Content-Length", strconv.FormatInt(size, 10))
	}
	if a.retryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((a.retryAfter+time.Second-1)/time.Second), 10))
	}
	rw.WriteHeader(a.status)

	left := size
	if half {
		left /= 2
	}
	var out io.Writer = rw
	if a.drip > 0 || a.rate > 0 {
		out = newPacer(ctx, rw, size, a.drip, a.rate)
	}
	send := func(b []byte) bool {
		n, err := out.Write(b[:min(int64(len(b)), left)])
		left -= int64(n)
		return err == nil
	}
	good := send(a.head)
	for rest := a.filler; good && rest > 0 && left > 0; {
		b := filler[:min(int64(len(filler)), rest)]
		good = send(b)
		rest -= int64(len(b))
	}
	if good && a.stream != nil && left > 0 {
		slow := out
		pieces := bufio.NewWriterSize(slow, 32<<10) // events are small
		out = pieces
		for b := range a.stream {
			if good = send(b); !good || left == 0 {
				break
			}
		}
		good = pieces.Flush() == nil && good
		out = slow
	}
	end()
	if good {
		send(a.body)
	}
	if half {
		http.NewResponseController(rw).Flush()
	}
}

// writeGarbage answers with bytes that are not HTTP. Within HTTP/2, where that
// is not possible, they are a body that is not the JSON it claims to be.
func writeGarbage(rw http.ResponseWriter, seed uint64) {
	b := []byte{0, 0xff, '\r', '\n'}
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 64 {
		b = append(b, byte(rng.Uint32()))
	}
	c, _, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		rw.Header().Set("Content-Type", "application/json")
		rw.Write(b)
		return
	}
	c.Write(b)
	c.Close()
}

package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"slices"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/store"
)

// errand is what the bus asks a remote on its own account: a notary for keys, a
// server for its own keys, or only a connection.
type errand struct {
	send   bus.Send
	ctx    context.Context
	cancel context.CancelFunc
}

const (
	// maxKeyAnswer bounds a notary's answer, in bytes; a key object has about one
	// KiB.
	maxKeyAnswer = 8 << 20
	// maxObjects bounds the objects that are kept of one server: the present one
	// and others with older keys.
	maxObjects = 4

	keyQueryTarget   = "/_matrix/key/v2/query"
	serverKeysTarget = "/_matrix/key/v2/server"
)

// run does the errand on a sender, and sees to it that one Done is posted.
func (e *errand) run(n *Node) {
	if e.send.Ahead {
		err := n.client.Connect(e.ctx, e.send.Dest, int(e.send.Class), e.connected(n))
		n.endErrand(e, bus.Done{Failure: netx.FailureOf(err), Detail: detailOf(err)})
		return
	}
	keys, done, err := n.fetchKeys(e)
	if err != nil {
		done.Failure, done.Detail = netx.FailureOf(err), explain(err)
		n.notable.errand(e, done)
	}
	if len(keys) == 0 {
		n.endErrand(e, done)
		return
	}
	n.storeKeys(keys, func() { n.endErrand(e, done) })
}

func (e *errand) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
	n.endErrand(e, bus.Done{Failure: matrix.FailLocal, Detail: "internal error"})
}

func (n *Node) endErrand(e *errand, done bus.Done) {
	e.cancel()
	done.Op = e.send.Op
	n.loop.Post(event{Event: done})
}

func (e *errand) connected(n *Node) func() {
	return func() { n.loop.Post(event{Event: bus.Connected{Op: e.send.Op}}) }
}

// detailOf says what went wrong, "" if nothing did.
func detailOf(err error) string {
	if err == nil {
		return ""
	}
	return explain(err)
}

// storeKeys stores key objects and then calls done, whether they could be stored
// or not: without them a query is answered with what there is.
func (n *Node) storeKeys(keys []store.ServerKeys, done func()) {
	err := n.store.Submit(&store.Batch{Keys: keys}, func(err error) {
		n.trouble.commit(err)
		done()
	})
	if err != nil {
		n.trouble.commit(err)
		done()
	}
}

// fetchKeys asks for the keys and returns those objects that may be stored.
func (n *Node) fetchKeys(e *errand) (keys []store.ServerKeys, done bus.Done, err error) {
	req := &netx.Request{
		Destination: e.send.Dest, Method: http.MethodGet, Target: serverKeysTarget, Priority: int(e.send.Class),
		Header: http.Header{"User-Agent": {n.userAgent}},
	}
	if e.send.Notary != nil {
		body := matrix.AppendKeyQuery(nil, e.send.Notary)
		req.Method, req.Target = http.MethodPost, keyQueryTarget
		req.Header["Content-Type"] = []string{"application/json"}
		req.Body, req.Size = bytes.NewReader(body), int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	resp, err := n.client.Do(e.ctx, req, e.connected(n))
	if err != nil {
		return nil, done, err
	}
	defer resp.Body.Close()
	answered := bus.Answered{Op: e.send.Op, Status: resp.StatusCode, Size: resp.ContentLength}
	if resp.StatusCode == http.StatusTooManyRequests {
		begin, _ := io.ReadAll(io.LimitReader(resp.Body, peek429)) // without it there is still the header
		answered.RetryAfter, _ = matrix.ParseRetryAfter(resp.Header.Get("Retry-After"), begin, time.Now())
	}
	n.loop.Post(event{Event: answered})
	if resp.StatusCode != http.StatusOK {
		return nil, done, nil
	}
	now := n.wall()
	body := &countingReader{r: io.LimitReader(resp.Body, maxKeyAnswer)}
	if e.send.Notary == nil {
		keys, err = n.originKeys(e.send.Dest, resp, body, now)
		if err != nil && keys == nil && !isNetwork(err) {
			n.refusedKeys(e, e.send.Dest, err)
			done.Missing, err = []matrix.ServerName{e.send.Dest}, nil
		}
	} else {
		keys, done.Missing, err = n.notaryKeys(e, resp, body, now)
	}
	done.Size = body.n
	return keys, done, err
}

// isNetwork reports whether an error is one of the way, and not of what was said.
func isNetwork(err error) bool {
	var e *netx.Error
	return errors.As(err, &e)
}

// originKeys reads what a server says of its own keys.
func (n *Node) originKeys(server matrix.ServerName, resp *http.Response, body io.Reader, now matrix.Timestamp) ([]store.ServerKeys, error) {
	if !isJSON(resp.Header) {
		return nil, fmt.Errorf("%w: content type %q", matrix.ErrServerKeys, resp.Header.Get("Content-Type"))
	}
	object, err := io.ReadAll(io.LimitReader(body, matrix.MaxServerKeys+1))
	if err != nil {
		return nil, err
	}
	return n.keysToStore(server, object, now)
}

// keysToStore checks what a server says of its own keys and returns it as it is
// stored: as its own word, and countersigned if the bus is a notary.
func (n *Node) keysToStore(server matrix.ServerName, object []byte, now matrix.Timestamp) ([]store.ServerKeys, error) {
	o, err := matrix.CheckServerKeys(object, server)
	if err != nil {
		return nil, err
	}
	keys := []store.ServerKeys{{Via: server, Server: server, Fetched: now, ValidUntil: o.ValidUntil, Object: object}}
	if n.notary == nil {
		return keys, nil
	}
	signed, err := n.notary.key.Sign(object, string(n.notary.name))
	if err != nil {
		return nil, err
	}
	return append(keys, store.ServerKeys{Via: n.notary.name, Server: server, Fetched: now, ValidUntil: o.ValidUntil, Object: signed}), nil
}

// notaryKeys reads a notary's answer, of which only that is used which was asked
// for, is signed by the server itself, and carries the notary's signature: the
// homeserver would refuse it without. It returns also the servers for which that
// leaves a wish.
func (n *Node) notaryKeys(e *errand, resp *http.Response, body io.Reader, now matrix.Timestamp) (keys []store.ServerKeys, missing []matrix.ServerName, err error) {
	wanted := make(map[matrix.ServerName][]matrix.KeyWant, len(e.send.Notary))
	for _, w := range e.send.Notary {
		wanted[w.Server] = append(wanted[w.Server], w)
	}
	found := make(map[matrix.ServerName][]keyObject, len(wanted))
	if !isJSON(resp.Header) {
		err = fmt.Errorf("%w: content type %q", matrix.ErrServerKeys, resp.Header.Get("Content-Type"))
	} else {
		err = n.readKeys(e, wanted, found, body)
	}
	if isNetwork(err) {
		return n.foundKeys(e, found, now), nil, err
	}
	if err != nil {
		n.refusedKeys(e, "", err)
	}
	for server, wants := range wanted {
		satisfied := func(w matrix.KeyWant) bool {
			return slices.ContainsFunc(found[server], func(o keyObject) bool { return o.Satisfies(w.KeyID, w.MinValid, now) })
		}
		if slices.ContainsFunc(wants, func(w matrix.KeyWant) bool { return !satisfied(w) }) {
			missing = append(missing, server)
		}
	}
	slices.Sort(missing)
	return n.foundKeys(e, found, now), missing, nil
}

// keyObject is a key object with its raw form.
type keyObject struct {
	*matrix.ServerKeyObject
	raw []byte
}

// readKeys reads the objects of a notary's answer.
func (n *Node) readKeys(e *errand, wanted map[matrix.ServerName][]matrix.KeyWant, found map[matrix.ServerName][]keyObject, body io.Reader) error {
	r := matrix.NewKeyAnswerReader(body, 4*len(wanted)+64)
	for {
		raw, err := r.Next()
		if err == io.EOF {
			if k := r.Skipped(); k > 0 {
				n.refusedKeys(e, "", fmt.Errorf("%w: %d objects are too large", matrix.ErrServerKeys, k))
			}
			return nil
		}
		if err != nil {
			return err
		}
		server := namedIn(raw)
		if wanted[server] == nil || len(found[server]) >= maxObjects {
			continue
		}
		o, err := matrix.CheckServerKeys(raw, server)
		if err == nil && !o.SignedBy(e.send.Dest) {
			err = fmt.Errorf("%w: the notary has not signed it", matrix.ErrServerKeys)
		}
		if err != nil {
			n.refusedKeys(e, server, err)
			continue
		}
		found[server] = append(found[server], keyObject{o, bytes.Clone(raw)})
	}
}

// namedIn returns the server that a key object is about, as it says.
func namedIn(object []byte) matrix.ServerName {
	var o struct {
		Name string `json:"server_name"`
	}
	if json.Unmarshal(object, &o) != nil {
		return ""
	}
	return matrix.ServerName(o.Name)
}

// foundKeys returns what is stored of a notary's answer: the objects of one server
// side by side, as they stand in an answer to a query.
func (n *Node) foundKeys(e *errand, found map[matrix.ServerName][]keyObject, now matrix.Timestamp) (keys []store.ServerKeys) {
	for server, objects := range found { // in no order; each is a row of its own
		k := store.ServerKeys{Via: e.send.Dest, Server: server, Fetched: now}
		for _, o := range objects {
			if len(k.Object) > 0 {
				if len(k.Object)+1+len(o.raw) > matrix.MaxServerKeys {
					break
				}
				k.Object = append(k.Object, ',')
			}
			k.Object = append(k.Object, o.raw...)
			k.ValidUntil = max(k.ValidUntil, o.ValidUntil)
		}
		keys = append(keys, k)
	}
	return keys
}

// refusedKeys says that something came which is not what it should be.
func (n *Node) refusedKeys(e *errand, server matrix.ServerName, err error) {
	n.keyCounts.refused.Add(1)
	n.notable.write(slog.LevelWarn, "server keys that are not valid are not used", slog.String("from", string(e.send.Dest)), slog.String("of", string(server)), slog.Any("why", err))
}

// isJSON reports whether an answer says that it is JSON.
func isJSON(h http.Header) bool {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	return err == nil && t == "application/json"
}

// countingReader counts what is read.
type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

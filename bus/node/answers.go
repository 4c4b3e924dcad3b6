package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/store"
)

const (
	// maxAside is how much of a refusal is read for its errcode, and of a media
	// answer for a Location, in bytes.
	maxAside = 4 << 10
	// progressEach is how often the core is told how much of a large answer has
	// arrived.
	progressEach = time.Second
)

// judge says what an answer that came well is good for beyond its request: an
// answer that is not what its endpoint says never enters a cache.
func (n *Node) judge(a *attempt, ep *matrix.Endpoint, done *bus.Done) {
	switch {
	case ep.Kind == matrix.AnswerMedia:
		done.Private = hasLocation(a)
	case !isJSON(a.header):
		done.Private = true
	case a.status == http.StatusNotFound:
		body, ok := a.body.Bytes()
		done.Private = !ok || matrix.ErrorCode(body) != matrix.MNotFound
	case a.status != http.StatusOK:
		done.Private = true
	case ep.Kind == matrix.AnswerServerKeys:
		n.judgeKeys(a, done)
	case done.Kept:
		body, _ := a.body.Bytes()
		done.Private = !isObject(body, ep)
	}
}

// isObject reports whether a body is the JSON object that Synapse accepts, or for
// joins in their first version the array of a status and an object.
func isObject(body []byte, ep *matrix.Endpoint) bool {
	begin := bytes.TrimLeft(body, " \t\r\n")
	return len(begin) > 0 && (begin[0] == '{' || begin[0] == '[' && ep.Join == matrix.JoinSend) && json.Valid(body)
}

// judgeKeys keeps a server's own keys, if they are valid, for as long as they say.
func (n *Node) judgeKeys(a *attempt, done *bus.Done) {
	done.Private = true
	body, ok := a.body.Bytes()
	if !ok || int64(len(body)) > matrix.MaxServerKeys {
		return
	}
	now := n.wall()
	keys, err := n.keysToStore(a.in.Destination, bytes.Clone(body), now)
	if err != nil {
		n.keyCounts.refused.Add(1)
		return
	}
	o, err := matrix.KnownServerKeys(body, a.in.Destination)
	if err != nil {
		return
	}
	fresh := o.RefreshAt(now) - now
	if fresh <= 0 {
		return
	}
	done.Private = false
	done.Fresh = time.Duration(fresh) * time.Millisecond
	done.Stale = done.Fresh // until it is no longer valid
	n.storeKeys(keys, func() {})
}

// hasLocation reports whether a media answer only says where the media is.
func hasLocation(a *attempt) bool {
	if a.status/100 == 3 || a.header.Get("Location") != "" {
		return true
	}
	r := a.body.Reader()
	defer r.Close()
	begin := make([]byte, maxAside)
	got := 0
	for got < len(begin) {
		k, err := r.Read(begin[got:])
		got += k
		if err != nil {
			break
		}
	}
	return bytes.Contains(bytes.ToLower(begin[:got]), []byte("\nlocation:"))
}

// progressReader tells the core how much of an answer has arrived.
type progressReader struct {
	*countingReader
	tell func(size int64)
	next time.Time
}

func (p *progressReader) Read(b []byte) (int, error) {
	k, err := p.countingReader.Read(b)
	if now := time.Now(); now.After(p.next) {
		p.next = now.Add(progressEach)
		p.tell(p.n)
	}
	return k, err
}

// loadAnswer reads a stored answer, which is then as if its attempt had just ended.
type loadAnswer struct{ bus.Load }

func (l loadAnswer) run(n *Node) {
	row, ok, err := n.store.LoadAnswer(l.Key)
	if err != nil && !errors.Is(err, store.ErrClosed) {
		n.trouble.commit(err)
	}
	var a *attempt
	if ok && err == nil {
		a = &attempt{op: l.Op, status: int(row.Status), size: int64(len(row.Body)), body: n.spool.New(), cancel: func() {}}
		a.header = http.Header{"Content-Type": {string(row.Header)}}
		_, err = a.body.Write(row.Body)
		a.body.CloseWrite(err)
		if err != nil {
			n.trouble.spool(err)
			a.body.Release()
			a = nil
		}
	}
	if a == nil {
		n.loop.Post(event{Event: bus.Loaded{Op: l.Op}})
		return
	}
	n.loop.Post(event{loaded: a, Event: bus.Loaded{Op: l.Op, OK: true, Status: a.status, Size: a.size}})
}

func (l loadAnswer) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
	n.loop.Post(event{Event: bus.Loaded{Op: l.Op}})
}

// rowsOf returns the answers to be stored as rows. Of their headers the content
// type is all that a caller looks at.
func (n *Node) rowsOf(kept []bus.KeptAnswer) []store.Answer {
	rows := make([]store.Answer, 0, len(kept))
	for _, k := range kept {
		a := n.attempts[k.Op]
		body, ok := a.body.Bytes()
		if !ok {
			continue // it was not kept in memory after all
		}
		rows = append(rows, store.Answer{
			Key: k.Key, Stored: k.Stored.Stored(), Fresh: k.Fresh.Stored(), Stale: k.Stale.Stored(),
			Status: int32(a.status), Header: []byte(a.header.Get("Content-Type")), Body: bytes.Clone(body),
		})
	}
	return rows
}

// xcache is the header that says where an answer comes from.
const xcache = "X-Cache"

// headerFor returns an answer's header with what the bus says about it.
func headerFor(a answer) http.Header {
	h := a.from.header.Clone()
	if h == nil {
		h = make(http.Header, 2)
	}
	h[xcache] = []string{a.source.String()}
	if a.source == bus.FromCache || a.source == bus.FromStale {
		h["Age"] = []string{strconv.FormatInt(int64(max(a.age, 0)/time.Second), 10)}
	}
	return h
}

// maxProfile is the largest profile of which a field is cut, in bytes
// (Synapse's own limit, synapse/rest/client/profile.py).
const maxProfile = 64 << 10

// writeField answers with one member of an answer.
func (n *Node) writeField(a answer) error {
	buf := make([]byte, 0, 512)
	for len(buf) <= maxProfile {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		k, err := a.reader.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+k]
		if err != nil {
			break
		}
	}
	body, ok := matrix.ProfileMember(buf, a.field)
	if !a.from.body.Complete() || !ok {
		return a.in.Reply(http.StatusBadGateway, nil, matrix.ErrorJSON(matrix.MUnknown, "fsbus: "+string(a.in.Destination)+": the profile is no JSON object, or was cut short"))
	}
	h := headerFor(a)
	for name := range h {
		if strings.HasPrefix(name, "Content-") && name != "Content-Type" {
			delete(h, name) // it is of the whole
		}
	}
	return a.in.Reply(http.StatusOK, h, body)
}

// readJob reads the store for requests, or the answers of others.
type readJob interface {
	run(*Node)
	crashed(*Node, error)
}

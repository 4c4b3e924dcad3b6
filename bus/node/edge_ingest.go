package node

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/store"
)

// Where a request from outside may go.
type place uint8

const (
	toNobody     place = iota // the path does not exist
	toCore                    // the core decides
	toHomeserver              // as it is, if that is configured
)

// placeOf returns where a path belongs, by its row of the endpoint table if it has
// one. Paths that the table does not know may be newer than it is: those of
// federation, keys and policy servers are the homeserver's to refuse.
func placeOf(ep *matrix.Endpoint, target string) place {
	known := !ep.Unknown()
	switch {
	case ep.Name == "well_known":
		return toNobody // it is answered by the bus, if it is configured
	case !known && strings.HasPrefix(target, sendPrefix):
		return toNobody // a transaction without an id, which could not be told from another
	case known, strings.HasPrefix(target, "/_matrix/federation/"), strings.HasPrefix(target, "/_matrix/key/"), strings.HasPrefix(target, "/_matrix/policy/"):
		return toCore
	case strings.HasPrefix(target, "/_matrix/client/"), target == "/_matrix/client", strings.HasPrefix(target, "/_matrix/media/"),
		strings.HasPrefix(target, "/_synapse/client/"), target == "/.well-known/matrix/client":
		return toHomeserver
	}
	return toNobody
}

// maxBody bounds a body before it is read.
func (s *edgeShell) maxBody(method, target string) int64 {
	ep := matrix.Match(method, target)
	if placeOf(ep, target) == toHomeserver {
		return int64(s.n.cfg.Load().Edge.MaxBody)
	}
	cfg := &s.n.cfg.Load().Edge
	if ep.Unsigned { // what nobody has signed is small
		return min(ep.MaxRequest, int64(cfg.CheckedBody))
	}
	if ep.MaxRequest == matrix.MaxRequestBody {
		return int64(cfg.MaxBody)
	}
	return ep.MaxRequest
}

// row returns the row of the endpoint table of a request.
func row(q *netx.EdgeRequest) *matrix.Endpoint {
	ep := matrix.Match(q.Method, q.Target)
	if len(q.Header["Authorization"]) == 0 {
		return ep.WithoutSignature()
	}
	return ep
}

// check answers what needs no body: what is refused, and what is known.
func (s *edgeShell) check(q *netx.EdgeRequest) *netx.EdgeRefusal {
	cfg := &s.n.cfg.Load().Edge
	if matrix.CheckPath(q.Target) != nil {
		return s.malformed(errPath)
	}
	ep := row(q)
	if ep.Name == "well_known" && cfg.WellKnown != "" {
		s.counts.own.Add(1)
		return &netx.EdgeRefusal{Status: http.StatusOK, Body: fmt.Appendf(nil, `{"m.server":%s}`, matrix.AppendString(nil, cfg.WellKnown))}
	}
	switch placeOf(ep, q.Target) {
	case toNobody:
		return s.unknownPath()
	case toHomeserver:
		if s.clients == nil {
			return s.unknownPath()
		}
		return nil
	}
	if headerSize(q.Header) > maxHeader {
		return s.malformed(errHeader)
	}
	if methods := matrix.Methods(q.Target); len(methods) > 0 && ep.Unknown() && q.Method != http.MethodHead && q.Method != http.MethodOptions {
		s.counts.unknown.Add(1)
		return &netx.EdgeRefusal{Status: http.StatusMethodNotAllowed, Errcode: matrix.MUnrecognized, Message: "Unrecognized request", Header: http.Header{"Allow": {strings.Join(methods, ", ")}}}
	}
	body, ok := s.own.get(ep, q.Target, s.signingKeys())
	if !ok && s.own.isAway() {
		body = s.stand(ep, q.Target)
	}
	if body != nil {
		s.counts.own.Add(1)
		s.keysServed(ep)
		return &netx.EdgeRefusal{Status: http.StatusOK, Body: body}
	}
	if ep.Unsigned {
		return nil
	}
	a, err := readAuth(q.Header, s.n.cfg.Load().Homeserver.ServerName)
	if err != nil {
		return s.malformed(err)
	}
	if !s.acl.Load().Allows(a.origin) { // the core says the same, but would have it read first
		s.counts.denied.Add(1)
		return &netx.EdgeRefusal{Status: http.StatusForbidden, Errcode: matrix.MForbidden, Message: fmt.Sprintf("fsbus: %s may not talk to this server", a.origin)}
	}
	if q.Size == 0 && hasContent(q.Method) {
		return s.malformed(errNoContent)
	}
	return nil
}

func (s *edgeShell) unknownPath() *netx.EdgeRefusal {
	s.counts.unknown.Add(1)
	return &netx.EdgeRefusal{Status: http.StatusNotFound, Errcode: matrix.MUnrecognized, Message: "Unrecognized request"}
}

// mistake is what is wrong with a request, and how that is answered.
type mistake struct {
	status int
	code   string
	text   string
}

func (e *mistake) Error() string { return e.text }

// The answers are those of Synapse (federation/transport/server/_base.py,
// http/servlet.py, federation/federation_server.py).
var (
	errHeader      = &mistake{http.StatusRequestHeaderFieldsTooLarge, matrix.MTooLarge, "The request has too many header fields, or too long ones"}
	errPath        = &mistake{http.StatusBadRequest, matrix.MInvalidParam, "The path has dot segments or backslashes"}
	errNoAuth      = &mistake{http.StatusUnauthorized, matrix.MUnauthorized, "Missing Authorization headers"}
	errBadAuth     = &mistake{http.StatusBadRequest, matrix.MUnauthorized, "Malformed Authorization header"}
	errOwn         = &mistake{http.StatusUnauthorized, matrix.MUnauthorized, "The origin is this server itself"}
	errDestination = &mistake{http.StatusUnauthorized, matrix.MUnauthorized, "Destination mismatch in auth header"}
	errNoContent   = &mistake{http.StatusBadRequest, matrix.MNotJSON, "Content not JSON."}
	errNoObject    = &mistake{http.StatusBadRequest, matrix.MBadJSON, "Content must be a JSON object."}
	errTooMuch     = &mistake{http.StatusBadRequest, matrix.MUnknown, fmt.Sprintf("A transaction has at most %d PDUs and %d EDUs", matrix.MaxPDUs, matrix.MaxEDUs)}
	errTxnID       = &mistake{http.StatusBadRequest, matrix.MInvalidParam, fmt.Sprintf("The transaction's id is empty, or longer than %d bytes", store.MaxTxnID)}
	errTransaction = &mistake{http.StatusBadRequest, matrix.MBadJSON, "This is no transaction"}
)

// malformed counts what is wrong and returns its answer.
func (s *edgeShell) malformed(err error) *netx.EdgeRefusal {
	s.counts.malformed.Add(1)
	bad, ok := errors.AsType[*mistake](err)
	if !ok {
		panic(fmt.Sprintf("node: a mistake without an answer: %v", err))
	}
	return &netx.EdgeRefusal{Status: bad.status, Errcode: bad.code, Message: bad.text}
}

// hasContent reports whether a request has a body, which is signed with it.
func hasContent(method string) bool { return method == http.MethodPut || method == http.MethodPost }

// auth is what a request's Authorization headers say.
type auth struct {
	origin     matrix.ServerName
	signatures []matrix.XMatrix
}

// maxSignatures bounds the headers of one request: one for each key of its origin.
const maxSignatures = 10

// readAuth reads all headers of the scheme X-Matrix. They must be of one origin and
// for us; one without a destination is, as older servers have it.
func readAuth(h http.Header, own matrix.ServerName) (a auth, err error) {
	for _, line := range h["Authorization"] {
		x, err := matrix.ParseXMatrix(line)
		switch {
		case errors.Is(err, matrix.ErrNotXMatrix):
			continue
		case err != nil, len(a.signatures) == maxSignatures, a.origin != "" && x.Origin != string(a.origin):
			return auth{}, errBadAuth
		case x.Origin == string(own):
			return auth{}, errOwn
		case x.Destination == "":
			x.Destination = string(own)
		case x.Destination != string(own):
			return auth{}, errDestination
		}
		// What outlives the request must not hold on to its header.
		if a.origin == "" {
			a.origin = matrix.ServerName(strings.Clone(x.Origin))
		}
		x.Origin, x.Key = string(a.origin), strings.Clone(x.Key)
		if isKeyID(x.Key) {
			a.signatures = append(a.signatures, x)
		}
	}
	if len(a.signatures) == 0 {
		return auth{}, errNoAuth
	}
	return a, nil
}

// isKeyID reports whether a server can have a key of this name (appendices, "Common
// Identifier Format"); there is one algorithm.
func isKeyID(id string) bool { return strings.HasPrefix(id, "ed25519:") && len(id) <= maxIdentifier }

// isRoomID reports whether a room can have this name.
func isRoomID(id string) bool { return id != "" && len(id) <= maxIdentifier }

// maxIdentifier is the length in bytes of the longest one.
const maxIdentifier = 255

// keyIDs returns the keys that a request claims to be signed with.
func (a *auth) keyIDs() []string {
	ids := make([]string, len(a.signatures))
	for i := range a.signatures {
		ids[i] = a.signatures[i].Key
	}
	return ids
}

// ingest hands a request to the core. It runs on the request's goroutine.
func (s *edgeShell) ingest(q *netx.EdgeRequest) {
	ep := row(q)
	if placeOf(ep, q.Target) == toHomeserver {
		s.counts.clients.Add(1)
		if !s.clients.take(q) {
			_ = q.Reply(http.StatusServiceUnavailable, http.Header{"Retry-After": {"5"}}, matrix.ErrorJSON(matrix.MUnknown, "fsbus: too many clients wait for the homeserver")) // who has gone has gone
			q.Release()
		}
		return
	}
	s.endpoints.count(ep.Name)
	c := &caller{q: q, endpoint: ep}
	posted := false
	defer func() {
		if !posted { // also after a panic
			q.Release()
		}
	}()
	a, err := s.arrived(q, c)
	if err != nil {
		ref := s.malformed(err)
		_ = q.Reply(ref.Status, nil, matrix.ErrorJSON(ref.Errcode, ref.Message)) // who has gone has gone
		return
	}
	if !s.details.take(c.peer, c.extra) {
		s.counts.busy.Add(1)
		_ = q.Reply(http.StatusServiceUnavailable, http.Header{"Retry-After": {"5"}}, busyBody) // the same
		return
	}
	c.hold() // until the core is through with it
	defer func() {
		if !posted {
			s.drop(c)
		}
	}()
	s.closing.RLock()
	defer s.closing.RUnlock()
	if s.closed {
		_ = q.Reply(http.StatusServiceUnavailable, nil, matrix.ErrorJSON(matrix.MUnknown, "fsbus: it is being stopped; ask again")) // the same
		return
	}
	posted = true
	s.n.loop.Post(event{edge: a, caller: c})
}

// arrived looks into a request. The error is a *mistake.
func (s *edgeShell) arrived(q *netx.EdgeRequest, c *caller) (a edge.Arrived, err error) {
	cfg := s.n.cfg.Load()
	a = edge.Arrived{
		Req: edge.ReqID(q.ID), Peer: peerOf(q.Client, cfg.Edge.proxies()), Net: netOf(q.Client, cfg.Edge.proxies()),
		Endpoint: c.endpoint, Class: c.endpoint.Class,
		Received: s.n.clock.At(q.Received),
	}
	c.peer = a.Peer
	if !c.endpoint.Unsigned {
		if c.auth, err = readAuth(q.Header, cfg.Homeserver.ServerName); err != nil {
			return a, err
		}
		a.Origin, a.Keys = c.auth.origin, c.auth.keyIDs()
	}
	a.Key = edge.Key(keyOf(a.Origin, q.Method, q.Target, q.Sum))
	switch {
	case c.endpoint.Name == "send":
		c.unchecked = q.Size > int64(cfg.Edge.CheckedBody)
		if a.Txn, err = s.transaction(c, a); err != nil {
			return a, err
		}
		c.txn = a.Txn
	case q.Size > int64(cfg.Edge.CheckedBody):
		c.unchecked = true
	case hasContent(q.Method):
		if err := s.checkJSON(q); err != nil {
			return a, err
		}
	case c.endpoint.Name == "event" && s.n.takeover != nil:
		path, _, _ := strings.Cut(q.Target, "?")
		path = strings.TrimSuffix(path, "/")
		if id, err := url.PathUnescape(path[strings.LastIndexByte(path, '/')+1:]); err == nil && strings.HasPrefix(id, "$") {
			c.event, a.Look = id, true
		}
	}
	c.extra = max(0, headerSize(q.Header)+int64(len(q.Target))+c.auth.size()+txnSize(c.txn)-usualDetails)
	a.Size = perRequest + c.extra + q.Size // in memory or on disk, all are bounded
	return a, nil
}

// peerOf names the address that a request comes from: of IPv6 the network that one
// customer has. "" if a proxy does not say.
func peerOf(a netip.Addr, proxies []netip.Prefix) string {
	if !a.IsValid() {
		return ""
	}
	for _, p := range proxies {
		if p.Contains(a) {
			return ""
		}
	}
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.String()
		}
	}
	return a.String()
}

// netOf returns the network of an address that has a peerOf, if its owner may have many.
func netOf(a netip.Addr, proxies []netip.Prefix) string {
	if peerOf(a, proxies) == "" || !a.Is6() {
		return ""
	}
	p, err := a.Prefix(48)
	if err != nil {
		return ""
	}
	return p.String()
}

// checkJSON refuses a body that is no JSON object, or one that nobody should read.
func (s *edgeShell) checkJSON(q *netx.EdgeRequest) error {
	if q.Body == nil {
		return errNoContent
	}
	body, done, err := s.bulk.whole(q.Body, q.Size)
	defer done()
	if err != nil {
		return errNoContent
	}
	text, err := matrix.AppendCanonical(make([]byte, 0, len(body)), body, matrix.RawNumbers)
	switch {
	case err != nil:
		return errNoContent
	case text[0] != '{':
		return errNoObject
	}
	return nil
}

// transaction looks into a transaction.
func (s *edgeShell) transaction(c *caller, a edge.Arrived) (*edge.Txn, error) {
	q := c.q
	path, _, _ := strings.Cut(q.Target, "?")
	path = strings.TrimSuffix(path, "/")
	id, err := url.PathUnescape(path[strings.LastIndexByte(path, '/')+1:])
	switch {
	case err != nil || id == "" || len(id) > store.MaxTxnID:
		return nil, errTxnID
	case q.Body == nil:
		return nil, errNoContent
	case c.unchecked: // it is too large to be taken apart
		return &edge.Txn{ID: strings.Clone(id), BodyHash: edge.Hash(q.Sum)}, nil
	}
	body, done, err := s.bulk.whole(q.Body, q.Size)
	defer done()
	if err != nil {
		return nil, errNoContent
	}
	txn, err := matrix.ParseTransaction(body)
	switch {
	case err == nil, errors.Is(err, matrix.ErrNoOrigin): // a Synapse goes by the header, whatever it says
	case errors.Is(err, matrix.ErrTooManyPDUs), errors.Is(err, matrix.ErrTooManyEDUs):
		return nil, errTooMuch
	case errors.Is(err, matrix.ErrJSONSyntax), errors.Is(err, matrix.ErrJSONComplex):
		return nil, errNoContent
	case !bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte{'{'}):
		return nil, errNoObject
	default:
		return nil, errTransaction
	}
	t := &edge.Txn{ID: strings.Clone(id), BodyHash: edge.Hash(q.Sum), PDUs: int32(len(txn.PDUs)), EDUs: int32(len(txn.EDUs))}
	var keys [][]byte
	ephemeral, lives := len(txn.PDUs) == 0, time.Duration(0)
	for _, it := range txn.Items(nil) {
		t.Items[it.Kind]++
		switch it.Kind {
		case matrix.KindPresence, matrix.KindTyping:
			keys = append(keys, fmt.Appendf(nil, "%d %s", it.Kind, it.Key))
			lives = max(lives, it.Lifetime)
		default:
			ephemeral = false
		}
	}
	t.Ephemeral = ephemeral && len(keys) > 0
	t.Covers = s.covers.sums(keys)
	if t.Ephemeral && lives > 0 {
		t.Expires = a.Received.Add(lives)
	}
	if len(txn.PDUs) > 0 {
		t.Hashes = make([]edge.Hash, 0, len(txn.PDUs))
	}
	for i := range txn.PDUs {
		p := &txn.PDUs[i]
		t.Hashes = append(t.Hashes, edge.Hash(p.Hash()))
		if isRoomID(p.Room) && !slices.Contains(t.Rooms, p.Room) {
			t.Rooms = append(t.Rooms, strings.Clone(p.Room))
		}
	}
	return t, nil
}

package netx

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
)

// An EdgeRequest is one request of the federation that waits for an answer. It
// keeps its goroutine in net/http until then.
//
// Exactly one of Reply, Stream and Abort takes effect, whether it succeeds or
// not. A further one returns ErrAnswered, or ErrClientGone once EdgeConfig.Gone
// has been told. They may be called by any goroutine, and end the request. With
// Answer they are called in the request's own goroutine, so that a client that
// takes its answer slowly holds up nobody else. The body is not theirs: it is
// freed by Release.
//
// The fields must not be changed.
type EdgeRequest struct {
	ID     uint64 // counts up from 1 within one Edge; 0 in Check
	Method string
	Target string // path and query, byte for byte as they arrived
	Host   string // as it arrived; "" if there is none

	// Header is what may be forwarded: the end-to-end fields, without Host and
	// Expect, without what a proxy says about the client, which anybody can say
	// (Forwarded, X-Forwarded-*, X-Real-Ip), without what asks to be taken for another
	// request (X-Original-URL, X-HTTP-Method-Override), and without names that hold anything
	// but letters, digits and hyphens, since software behind may take "_" for
	// "-". Several Authorization fields, one for each signing key, stay several
	// and in order.
	Header http.Header

	Body     *Body             // complete; nil if there is none
	Size     int64             // bytes of the body
	Sum      [sha256.Size]byte // SHA-256 of the body; zero if there is none
	Received time.Time         // when the header was complete
	HTTP2    bool

	// Client is the client's address, without a zone, as the peer or a trusted
	// proxy has it. It is the zero address on a unix socket without
	// X-Forwarded-For.
	Client netip.Addr

	edge      *Edge
	conn      *edgeConn
	w         http.ResponseWriter
	rc        *http.ResponseController
	close     bool // the connection must not be used for another request
	announces bool // a body, or one of unknown size
	released  atomic.Bool
	place     place
	writing   atomic.Int64 // since when a piece of its answer waits for the client, Unix time in nanoseconds; 0: none does
	at        phase        // what it does with conn; whoever may answer changes it

	state inboundState  // guarded by edge.mu
	work  chan func()   // what Answer wants done; room for one
	done  chan struct{} // closed when an answer has been written or given up
	whole bool          // the former; set before done is closed
}

// An EdgeRefusal is an answer to a request whose body is not read.
type EdgeRefusal struct {
	Status int // 200 to 999
	// Errcode and Message make the body, unless Body is not nil.
	Errcode, Message string
	Body             []byte
	Header           http.Header // may be nil; Content-Type is application/json by default
}

var (
	refuseMethod   = &refusal{http.StatusBadRequest, matrix.MInvalidParam, "The method is malformed"}
	refusePath     = &refusal{http.StatusBadRequest, matrix.MInvalidParam, "The request target is malformed"}
	refuseLong     = &refusal{http.StatusRequestURITooLong, matrix.MTooLarge, "The request target is too long"}
	refuseHost     = &refusal{http.StatusBadRequest, matrix.MUnknown, "The Host header is malformed"}
	refuseContent  = &refusal{http.StatusBadRequest, matrix.MUnknown, "GET and HEAD requests have no body"}
	refuseRequests = &refusal{http.StatusServiceUnavailable, matrix.MUnknown, "Too many requests; try again later"}
	refuseReading  = &refusal{http.StatusServiceUnavailable, matrix.MUnknown, "Too many requests are being read; try again later"}
)

// serve is what net/http calls for a request, in a goroutine that is the
// request's.
func (e *Edge) serve(w http.ResponseWriter, r *http.Request) {
	q := &EdgeRequest{
		Method: r.Method, Target: r.RequestURI, Host: r.Host, Received: time.Now(), HTTP2: r.ProtoMajor == 2 && r.Method != "PRI",
		edge: e, w: w, rc: http.NewResponseController(w), work: make(chan func(), 1), done: make(chan struct{}),
	}
	q.conn = r.Context().Value(edgeConnKey{}).(*edgeConn)
	q.close = !q.HTTP2 && (r.Proto != "HTTP/1.1" || len(r.TransferEncoding) > 0)
	q.announces = r.ContentLength != 0
	q.Client = q.client(r.Header["X-Forwarded-For"])
	leave := e.hold(q)
	defer func() {
		q.enter(phaseNone)
		leave()
		switch p := recover(); {
		case p == http.ErrAbortHandler:
			panic(p)
		case p != nil:
			e.cfg.Logger.Error("a request could not be handled", "panic", p, "stack", string(debug.Stack()))
			panic(http.ErrAbortHandler)
		}
	}()
	switch q.place {
	case placeRefused:
		ref := refuseRequests
		q.refuse(&EdgeRefusal{Status: ref.status, Errcode: ref.errcode, Message: ref.message, Header: http.Header{"Retry-After": {edgeRetryAfter}}}, false)
		return
	case placeNone:
		q.drop()
	}
	if ref := q.head(r); ref != nil {
		q.refuse(&EdgeRefusal{Status: ref.status, Errcode: ref.errcode, Message: ref.message}, q.announces)
		return
	}
	if e.cfg.Check != nil {
		if ref := e.cfg.Check(q); ref != nil {
			q.refuse(ref, false)
			return
		}
	}
	if err := q.readBody(r); err != nil {
		ref, ok := err.(*refusal)
		if !ok {
			e.mu.Lock()
			e.stats.Cut++
			e.mu.Unlock()
			q.drop()
		}
		q.refuse(&EdgeRefusal{Status: ref.status, Errcode: ref.errcode, Message: ref.message}, true)
		return
	}
	q.enter(phaseWait)
	q.hand(r.Context())
}

// place is how a request counts from its header to the end of its answer.
type place uint8

const (
	placeHeld    place = iota // towards MaxRequests
	placeRefused              // beyond that, and answered that there are too many
	placeNone                 // beyond that as well
)

// MaxRefusals returns how many requests beyond MaxRequests are answered at a time.
func MaxRefusals(maxRequests int) int { return max(16, maxRequests/32) }

// hold gives a request its place: a real one, unless so many are held, or as many for
// its client as it may have of them. leave gives it back.
func (e *Edge) hold(q *EdgeRequest) (leave func()) {
	key := q.ClientKey()
	e.mu.Lock()
	defer e.mu.Unlock()
	of := e.held
	switch {
	case e.held.Take(key):
		e.stats.MaxHeld = max(e.stats.MaxHeld, e.held.Used())
	case e.refused.Take(key):
		q.place, of = placeRefused, e.refused
	default:
		q.place = placeNone
		e.stats.Dropped++
		return func() {}
	}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		of.Give(key)
	}
}

// enter notes what the request does with its connection from now on.
func (q *EdgeRequest) enter(to phase) {
	q.conn.phase(q.at, to)
	q.at = to
}

// ClientKey is what its client's share is counted under: an IPv4 address or the first one
// of an IPv6 /64; zero if nobody knows whose it is, as behind a proxy that does not say
// for whom it speaks.
func (q *EdgeRequest) ClientKey() netip.Addr {
	if !q.Client.IsValid() || q.Client == q.conn.peer && q.conn.trusted {
		return netip.Addr{}
	}
	return clientKey(q.Client)
}

// head looks at everything but the body. r.URL is not used: printing it would
// change what the origin has signed.
func (q *EdgeRequest) head(r *http.Request) *refusal {
	q.Size = r.ContentLength
	switch {
	case q.Method == http.MethodConnect:
		return refuseConnect
	case len(q.Method) > maxMethod || !isToken(q.Method):
		return refuseMethod
	case len(q.Target) > maxTarget:
		return refuseLong
	case !validPath(q.Target):
		return refusePath
	case q.Host != "" && !validHost(q.Host):
		return refuseHost
	case fields(r.Header) > maxFields:
		return refuseHead
	}
	if v := r.Header.Get("Expect"); v != "" && !strings.EqualFold(v, "100-continue") {
		return refuseExpect
	}
	q.Header = forwardable(r.Header)
	switch {
	case r.ContentLength > 0 && bodyless(q.Method):
		return refuseContent
	case r.ContentLength > q.maxBody():
		return refuseSize
	}
	return nil
}

// fields returns how many fields a header has.
func fields(h http.Header) (n int) {
	for _, v := range h { // a sum
		n += len(v)
	}
	return n
}

func bodyless(method string) bool { return method == http.MethodGet || method == http.MethodHead }

func (q *EdgeRequest) maxBody() int64 {
	if bodyless(q.Method) {
		return 0
	}
	return q.edge.cfg.MaxBody(q.Method, q.Target)
}

// validPath reports whether target is a path, with a query or not, as RFC 9112
// 3.2.1 has it, as far as others could read it otherwise: net/url takes blanks
// and bytes beyond ASCII in it, and Synapse fails on the latter.
func validPath(target string) bool {
	if target == "" || target[0] != '/' {
		return false
	}
	for i := range len(target) {
		if c := target[i]; c <= ' ' || c >= 0x7f || c == '#' {
			return false
		}
	}
	return true
}

// validHost reports whether s holds only what a name, an address and a port are
// made of.
func validHost(s string) bool {
	const marks = "-._~:[]%!$&'()*+,;="
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') && strings.IndexByte(marks, c) < 0 {
			return false
		}
	}
	return s != ""
}

// misleading are fields by which a request may pass for another one, or for one from
// somewhere else, with software behind: it has another method, path or host then than the
// one that was checked.
var misleading = map[string]bool{
	"X-Original-Url": true, "X-Original-Uri": true, "X-Original-Host": true, "X-Original-Method": true, "X-Original-Path": true,
	"X-Rewrite-Url": true, "X-Rewrite-Uri": true, "X-Rewrite-Path": true, "X-Request-Uri": true,
	"X-Http-Method-Override": true, "X-Http-Method": true, "X-Method-Override": true,
	"X-Host": true, "X-Http-Host-Override": true, "X-Http-Path-Override": true, "X-Proxy-Url": true, "Proxy": true,
	"Forwarded": true, "X-Real-Ip": true, "X-Client-Ip": true, "X-Cluster-Client-Ip": true, "X-Remote-Addr": true, "X-Remote-Ip": true,
	"X-Originating-Ip": true, "X-Proxyuser-Ip": true, "Client-Ip": true, "True-Client-Ip": true, "Cf-Connecting-Ip": true, "Fastly-Client-Ip": true,
}

// forwardable returns a copy of what EdgeRequest.Header may hold of h.
func forwardable(h http.Header) http.Header {
	out := endToEnd(h)
	for name := range out {
		switch {
		case name == "Host", name == "Expect", misleading[name],
			strings.HasPrefix(name, "X-Forwarded-"), !plainName(name):
			delete(out, name)
		}
	}
	return out
}

func plainName(s string) bool {
	for i := range len(s) {
		if c := s[i]; c != '-' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
			return false
		}
	}
	return s != ""
}

// client returns the client's address. What is left of the first address that is
// no trusted proxy's, from the right, anybody may have written, as is what is no
// address.
func (q *EdgeRequest) client(forwarded []string) netip.Addr {
	addr := q.conn.peer
	if !q.conn.trusted {
		return addr
	}
	list := strings.Join(forwarded, ",")
	for list != "" {
		entry := list[strings.LastIndexByte(list, ',')+1:]
		list = strings.TrimSuffix(list[:len(list)-len(entry)], ",")
		a, err := parseForwarded(strings.Trim(entry, " \t"))
		if err != nil {
			break
		}
		if addr = a; !q.edge.trusted(a) {
			break
		}
	}
	return addr
}

// parseForwarded parses an address, which some proxies write with a port.
func parseForwarded(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	if err != nil {
		var p netip.AddrPort
		if p, err = netip.ParseAddrPort(s); err != nil {
			return netip.Addr{}, err
		}
		a = p.Addr()
	}
	return a.Unmap().WithZone(""), nil
}

// readBody reads the body, if there is one, into the spool. After an error
// nothing of it is left there.
func (q *EdgeRequest) readBody(r *http.Request) error {
	q.Size = 0
	if r.ContentLength == 0 {
		return nil
	}
	e, deadline := q.edge, q.Received.Add(q.edge.cfg.BodyTimeout)
	q.enter(phaseRead)
	_ = q.rc.SetReadDeadline(deadline)
	// A place is only for a body of which something is there: a client that sends
	// nothing takes none.
	first := make([]byte, 1)
	switch _, err := io.ReadFull(r.Body, first); {
	case err == io.EOF: // chunked, without a chunk
		return nil
	case err != nil:
		return q.bodyRefusal(r, bodyError(err))
	}
	key := q.ClientKey()
	place, err := e.reading.acquire(r.Context(), key, deadline, q.rc.SetReadDeadline)
	switch {
	case err == errNoSlot:
		return refuseReading
	case err != nil:
		return errCut
	}
	defer place.release()
	src := struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(first), r.Body), r.Body}
	q.Body, q.Sum, err = e.receiver.receive(src, q.maxBody(), bodyPace{q.Received, e.cfg.BodyTimeout, e.cfg.BodyRate, e.cfg.BodyTotal, place.progress})
	if err != nil {
		return q.bodyRefusal(r, err)
	}
	if q.Body != nil {
		q.Size = q.Body.Size()
	}
	return nil
}

// bodyRefusal returns what to answer for an error of the receiver's.
func (q *EdgeRequest) bodyRefusal(r *http.Request, err error) error {
	switch {
	case err == refuseSize && bodyless(q.Method):
		return refuseContent
	case err == refuseChunks && r.Context().Err() != nil:
		return errCut // what net/http says of an HTTP/2 stream that is gone
	}
	return err
}

// hand hands the request over, and returns when it has been answered. It panics
// with http.ErrAbortHandler when there is none or only part of one.
func (q *EdgeRequest) hand(ctx context.Context) {
	e := q.edge
	q.ID = e.lastID.Add(1)
	e.mu.Lock()
	e.stats.Requests++
	if q.HTTP2 {
		e.stats.HTTP2++
	}
	e.mu.Unlock()

	handled := false
	defer func() {
		if !handled {
			if q.Abort() != nil { // Handle panics, having answered or not
				<-q.done
			}
		}
	}()
	e.cfg.Handle(q)
	handled = true
	select {
	case <-q.done:
	case write := <-q.work:
		q.run(write)
	case <-ctx.Done():
		if q.claim(stateGone) == nil {
			e.mu.Lock()
			e.stats.Gone++
			e.mu.Unlock()
			e.cfg.Gone(q)
			panic(http.ErrAbortHandler)
		}
		// The answer's beginning and the client's end came together.
		select {
		case <-q.done:
		case write := <-q.work:
			q.run(write)
		}
	}
	if !q.whole {
		q.drop()
	}
}

// run calls what is to answer the request.
func (q *EdgeRequest) run(write func()) {
	defer func() { _ = q.Abort() }() // takes effect if write has not answered
	write()
}

// Answer has the request's own goroutine call write, once and soon, which is to
// answer the request; if it does not, the request is aborted. After an error,
// which is ErrAnswered or ErrClientGone, write is not called. It does not block.
func (q *EdgeRequest) Answer(write func()) error {
	if err := q.claim(stateOwn); err != nil {
		return err
	}
	q.work <- write
	return nil
}

// drop ends the request without an answer, or within it: HTTP/2 resets the
// stream, and HTTP/1.1 closes the connection in a way that no client takes for
// the end of an answer.
func (q *EdgeRequest) drop() {
	if !q.HTTP2 {
		reset(q.conn.Conn)
	}
	panic(http.ErrAbortHandler)
}

// claim ends the waiting of a request, if it still waits.
func (q *EdgeRequest) claim(to inboundState) error {
	q.edge.mu.Lock()
	defer q.edge.mu.Unlock()
	switch {
	case q.state == stateGone:
		return ErrClientGone
	case q.state == stateOwn && to == stateAnswer:
	case q.state != statePark:
		return ErrAnswered
	}
	q.state = to
	return nil
}

// refuse answers a request that is not taken. With hangUp, the connection ends
// after it.
func (q *EdgeRequest) refuse(ref *EdgeRefusal, hangUp bool) {
	e := q.edge
	e.mu.Lock()
	e.stats.Refused[ref.Status]++
	e.mu.Unlock()
	q.enter(phaseRefuse)
	q.close = q.close || hangUp
	body := ref.Body
	if body == nil {
		body = matrix.ErrorJSON(ref.Errcode, ref.Message)
	}
	h := http.Header{"Content-Type": {"application/json"}}
	maps.Copy(h, ref.Header)
	if ref.Status == http.StatusMethodNotAllowed && len(h["Allow"]) == 0 {
		h.Set("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS") // RFC 9110 15.5.6
	}
	if !q.HTTP2 && q.announces {
		// net/http throws away what is left of the body: before the answer if the
		// connection is kept, else after it.
		_ = q.rc.SetReadDeadline(time.Now().Add(edgeLinger))
		q.conn.drain()
	}
	if q.answerNow(ref.Status, h, int64(len(body)), ownAnswerFor, func(w *edgeWriter) error {
		_, err := w.Write(body)
		return err
	}) != nil {
		q.drop()
	}
}

// answer claims the right to answer, writes the answer, and lets the request's
// goroutine go.
func (q *EdgeRequest) answer(status int, header http.Header, size int64, stall time.Duration, write func(*edgeWriter) error) error {
	if err := q.claim(stateAnswer); err != nil {
		return err
	}
	defer close(q.done) // also when write panics
	q.enter(phaseWrite)
	if err := q.answerNow(status, header, size, stall, write); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	q.whole = true
	return nil
}

// answerNow writes an answer of size bytes, or of unknown size when size is
// negative. write writes the body, when there is one, and the client may stall for so
// long.
func (q *EdgeRequest) answerNow(status int, header http.Header, size int64, stall time.Duration, write func(*edgeWriter) error) error {
	if status < 200 || status > 999 {
		return fmt.Errorf("status %d is not final", status)
	}
	h := q.w.Header()
	maps.Copy(h, endToEnd(header))
	if len(h["Content-Type"]) == 0 {
		h["Content-Type"] = nil // keeps net/http from guessing
	}
	if size >= 0 && status != http.StatusNoContent && status != http.StatusNotModified {
		h["Content-Length"] = []string{strconv.FormatInt(size, 10)}
	}
	if q.close && !q.HTTP2 || q.edge.conns.crowded() {
		h["Connection"] = []string{"close"} // which HTTP/2 takes for GOAWAY
	}
	w := &edgeWriter{q: q, left: size, stall: min(stall, q.edge.cfg.StallTimeout)}
	q.w.WriteHeader(status) // which sends nothing yet
	if size == 0 || !bodyAllowed(q.Method, status) {
		return w.send(nil)
	}
	if err := write(w); err != nil {
		return err
	}
	if w.left > 0 {
		return fmt.Errorf("%w: %d bytes short", io.ErrUnexpectedEOF, w.left)
	}
	return nil
}

// Reply answers with a small body of our own. status is 200 to 999.
// Content-Type is application/json unless header says otherwise. An error is
// ErrSlowReader or wraps ErrClientGone; nil means that the kernel has taken the
// whole answer, for which it has 5 s.
func (q *EdgeRequest) Reply(status int, header http.Header, body []byte) error {
	h := http.Header{"Content-Type": {"application/json"}}
	maps.Copy(h, header)
	return q.answer(status, h, int64(len(body)), ownAnswerFor, func(w *edgeWriter) error {
		_, err := w.Write(body)
		return err
	})
}

// Stream relays an answer. status is 200 to 999. Of header, the fields that are
// about a connection (RFC 9110 7.6.1) and Proxy-* are left out. size is the
// number of bytes that body yields, or -1 when that is unknown. body may be nil
// when size is 0. To a HEAD request, and with a 204 or 304, the body is neither
// read nor sent.
//
// The header is sent before body is read, and each piece as it comes. When body
// fails, or yields more or less than size, the request is aborted so that the
// client cannot take the answer for complete, and that error is returned. An
// error of the connection is ErrSlowReader or wraps ErrClientGone. nil means what
// it means for Reply. Stream does not close body. While it waits for body it does
// not notice that the client went away.
func (q *EdgeRequest) Stream(status int, header http.Header, size int64, body io.Reader) error {
	return q.answer(status, header, size, q.edge.cfg.StallTimeout, func(w *edgeWriter) error {
		if r, ok := body.(*Reader); ok {
			if b, whole := r.whole(); whole && int64(len(b)) == size {
				_, err := w.Write(b) // with the header, in one piece
				return err
			}
		}
		if err := w.step(q.rc.Flush); err != nil {
			return err
		}
		buf := getCopyBuf() // not used when body is an io.WriterTo
		defer putCopyBuf(buf)
		_, err := io.CopyBuffer(w, body, buf[:])
		return err
	})
}

// Abort ends the request without an answer: it closes the connection, or resets
// the HTTP/2 stream.
func (q *EdgeRequest) Abort() error {
	if err := q.claim(stateAnswer); err != nil {
		return err
	}
	close(q.done)
	return nil
}

// Stalled returns for how long the client has not taken a piece of its answer, of 32 KiB
// at most.
func (q *EdgeRequest) Stalled(now time.Time) time.Duration {
	if since := q.writing.Load(); since != 0 {
		return now.Sub(time.Unix(0, since))
	}
	return 0
}

// Cut ends the writing of an answer that a client does not take.
func (q *EdgeRequest) Cut() {
	_ = q.rc.SetWriteDeadline(time.Now()) // one that is over ends by itself
}

// Release gives up the request's reference to its body, if it has one. Only the
// first call has an effect. It is due in every case, also after Gone.
func (q *EdgeRequest) Release() {
	if q.Body != nil && q.released.CompareAndSwap(false, true) {
		q.Body.Release()
	}
}

// An edgeWriter writes a body and gives up when the client takes nothing for too
// long.
type edgeWriter struct {
	q     *EdgeRequest
	left  int64         // bytes still promised; negative: no number was
	stall time.Duration // how long one step may take
}

// Write writes p and has it sent, in pieces that the stall time-out is for. More
// bytes than promised are http.ErrContentLength.
func (w *edgeWriter) Write(p []byte) (int, error) {
	if w.left >= 0 {
		if int64(len(p)) > w.left {
			return 0, http.ErrContentLength
		}
		w.left -= int64(len(p))
	}
	for rest := p; len(rest) > 0; {
		piece := rest[:min(len(rest), copyBufSize)]
		rest = rest[len(piece):]
		if err := w.send(piece); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// send writes a piece and has it sent. HTTP/2 could send the last one together with the
// end, in one frame less, but only once the request's goroutine has ended, and then
// nobody would know how many of them wait for clients that do not read.
func (w *edgeWriter) send(piece []byte) error {
	return w.step(func() error {
		if len(piece) > 0 {
			if _, err := w.q.w.Write(piece); err != nil {
				return err
			}
		}
		return w.q.rc.Flush()
	})
}

// step does one thing that writes to the client, in StallTimeout.
func (w *edgeWriter) step(do func() error) error {
	now := time.Now()
	deadline := now.Add(w.stall)
	w.q.writing.Store(now.UnixNano())
	defer w.q.writing.Store(0)
	_ = w.q.rc.SetWriteDeadline(deadline) // a broken connection fails below
	err := do()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded), !time.Now().Before(deadline): // HTTP/2 does not say why
		return ErrSlowReader
	}
	return clientError(err)
}

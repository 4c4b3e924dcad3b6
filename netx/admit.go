package netx

import (
	"bufio"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
)

// forwarded are the header fields that a request keeps, the same ones that
// Synapse's own proxy resource forwards (synapse/http/proxy.py). There may be
// several Authorization fields, one for each signing key.
var forwarded = [...]string{"User-Agent", "Authorization", "Content-Type"}

// lingerBytes bounds what a refused client may go on sending.
const lingerBytes = 256 << 10

// A refusal is an answer of the Front itself.
type refusal struct {
	status           int
	errcode, message string
}

// errCut says that the client broke its request off, so that nobody is there
// to be answered.
var errCut = errors.New("the client cut its request")

func (r *refusal) Error() string { return fmt.Sprintf("%d %s: %s", r.status, r.errcode, r.message) }

var (
	refuseConnect = &refusal{http.StatusMethodNotAllowed, matrix.MUnrecognized, "CONNECT is not supported"}
	refuseScheme  = &refusal{http.StatusNotFound, matrix.MUnrecognized, "Only matrix-federation:// targets are served here"}
	refuseSecret  = &refusal{http.StatusProxyAuthRequired, matrix.MUnauthorized, "Proxy-Authorization is missing or wrong"}
	refuseTarget  = &refusal{http.StatusBadRequest, matrix.MInvalidParam, "The request target is malformed or has no valid server name"}
	refuseVersion = &refusal{http.StatusHTTPVersionNotSupported, matrix.MUnknown, "HTTP/1.1 is needed"}
	refuseHTTP    = &refusal{http.StatusBadRequest, matrix.MUnknown, "The request is not well-formed HTTP"}
	refuseHead    = &refusal{http.StatusRequestHeaderFieldsTooLarge, matrix.MTooLarge, "The request line and header are too large"}
	refuseExpect  = &refusal{http.StatusExpectationFailed, matrix.MUnknown, "Expect is not supported"}
	refuseSize    = &refusal{http.StatusRequestEntityTooLarge, matrix.MTooLarge, "The request body is too large"}
	refuseTime    = &refusal{http.StatusRequestTimeout, matrix.MUnknown, "The request body took too long"}
	refuseStall   = &refusal{http.StatusServiceUnavailable, matrix.MUnknown, refuseTime.message}
	refuseChunks  = &refusal{http.StatusBadRequest, matrix.MUnknown, "The request body is malformed"}
	refuseFull    = &refusal{http.StatusServiceUnavailable, matrix.MUnknown, "No room for the request body"}
	refuseDisk    = &refusal{http.StatusInternalServerError, matrix.MUnknown, "The request body could not be stored"}
)

// serve waits for the one request of a connection, reads it, checks it and parks it. It
// closes what it does not park.
func (f *Front) serve(c *coming) {
	conn, parked := c.conn, false
	defer func() {
		if r := recover(); r != nil {
			f.cfg.Logger.Error("a request could not be handed over", "panic", r, "stack", string(debug.Stack()))
			if !parked { // else park has closed it
				f.drop(c)
			}
		}
	}()
	// A deadline can only be refused by a connection that is broken, which the
	// next read finds out.
	_ = conn.SetReadDeadline(time.Now().Add(f.cfg.HeaderTimeout))
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		f.refuse(&Inbound{coming: c, conn: conn}, nil, errCut)
		return
	}
	f.gate.read(c, HeadIsThere(conn))
	br := requestReaders.Get().(*requestReader)
	defer br.release()
	br.reset(conn, int64(f.cfg.MaxHeaderBytes), first[0])
	_ = conn.SetReadDeadline(time.Now().Add(f.cfg.HeaderTimeout))
	r, err := http.ReadRequest(br.buf)
	in := &Inbound{front: f, conn: conn, over: c.over, coming: c, pos: -1, Received: time.Now()}
	if err != nil {
		f.refuse(in, br.buf, br.headError(err))
		return
	}
	br.limit = math.MaxInt64
	_ = conn.SetReadDeadline(in.Received.Add(f.cfg.BodyTimeout))
	in.Method = r.Method
	if err = f.check(in, r); err == nil {
		f.gate.enterStage(c, stageBody)
		err = f.readBody(in, r)
	}
	if err != nil {
		f.refuse(in, r.Body, err)
		return
	}
	in.Header = make(http.Header, len(forwarded))
	for _, k := range forwarded {
		if in.Own { // its Authorization is the secret, and nobody gets it
			break
		}
		if v := r.Header[k]; len(v) > 0 {
			// The slices of r.Header share one array, which holds the secret.
			in.Header[k] = append([]string(nil), v...)
		}
	}
	parked = true
	f.park(in)
}

// requestReader reads a request's head, up to a limit, and then its body.
type requestReader struct {
	conn  net.Conn
	first []byte // what was read before, and is read again
	limit int64  // bytes that may still be read
	guard headGuard
	buf   *bufio.Reader
}

var requestReaders = sync.Pool{New: func() any {
	r := new(requestReader)
	r.buf = bufio.NewReaderSize(r, 4<<10)
	return r
}}

func (r *requestReader) reset(conn net.Conn, limit int64, first ...byte) {
	r.conn, r.first, r.limit, r.guard = conn, first, limit, headGuard{}
	r.buf.Reset(r)
}

func (r *requestReader) release() {
	r.reset(nil, 0)
	requestReaders.Put(r)
}

var errHeadTooLarge = errors.New("the request's head is too large")

func (r *requestReader) Read(p []byte) (int, error) {
	if r.limit <= 0 {
		return 0, errHeadTooLarge
	}
	p = p[:min(int64(len(p)), r.limit)]
	n, err := copy(p, r.first), error(nil)
	if r.first = r.first[n:]; n == 0 {
		n, err = r.conn.Read(p)
	}
	r.limit -= int64(n)
	if many := r.guard.see(p[:n]); many != nil {
		return 0, many
	}
	return n, err
}

// headError sorts the errors of http.ReadRequest. A client that goes away is not
// answered.
func (r *requestReader) headError(err error) error {
	switch _, network := errors.AsType[*net.OpError](err); {
	case errors.Is(err, errHeadTooLarge), errors.Is(err, errManyFields):
		return refuseHead
	case network, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errCut
	}
	return refuseHTTP
}

// check looks at everything but the body. r.URL is not used: parsing and
// printing it again would change what Synapse has signed.
func (f *Front) check(in *Inbound, r *http.Request) error {
	if r.Method == http.MethodConnect {
		return refuseConnect
	}
	var err error
	in.Destination, in.Target, err = matrix.ParseFederationTarget(r.RequestURI)
	secret := r.Header["Proxy-Authorization"]
	if errors.Is(err, matrix.ErrNotFederation) && f.cfg.Own != nil {
		if in.maxBody, in.Own = f.cfg.Own(r.Method, r.RequestURI); in.Own {
			in.Target, err, secret = r.RequestURI, nil, r.Header["Authorization"]
		}
	}
	if errors.Is(err, matrix.ErrNotFederation) {
		return refuseScheme
	}
	right := f.authorized(secret)
	f.noteSecret(right, in.Received)
	if !right {
		return refuseSecret
	}
	if err != nil {
		return refuseTarget
	}
	if r.ProtoMajor != 1 || r.ProtoMinor < 1 {
		return refuseVersion
	}
	if e := r.Header.Get("Expect"); e != "" && !strings.EqualFold(e, "100-continue") {
		return refuseExpect
	}
	return nil
}

// authorized reports whether the one value is "Bearer" and the secret. Both
// are compared as digests, so that the time it takes tells nothing about them.
func (f *Front) authorized(values []string) bool {
	if len(values) != 1 {
		return false
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	sum := sha256.Sum256([]byte(strings.Trim(token, " ")))
	return strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare(sum[:], f.secret[:]) == 1
}

// noteSecret notes when a request with the secret came, or one without it.
func (f *Front) noteSecret(right bool, now time.Time) {
	f.mu.Lock()
	s := &f.stats.Secret
	if right {
		s.LastRight, s.FirstWrong = now, time.Time{}
	} else {
		s.LastWrong = now
		if s.FirstWrong.IsZero() {
			s.FirstWrong = now
		}
	}
	f.mu.Unlock()
	if !right && f.cfg.WrongSecret != nil {
		f.cfg.WrongSecret()
	}
}

// progress gives the body more time, unless later is zero.
func (in *Inbound) progress(_ int64, later time.Time) error {
	if later.IsZero() {
		return nil
	}
	return in.conn.SetReadDeadline(later)
}

// readBody reads the body, if there is one, into the spool. After an error
// nothing of it is left there.
func (f *Front) readBody(in *Inbound, r *http.Request) error {
	limit := in.maxBody
	if !in.Own {
		limit = f.cfg.MaxBody(in.Method, in.Target)
	}
	if r.ContentLength > limit {
		return refuseSize
	}
	if r.ContentLength == 0 {
		return nil
	}
	if r.Header.Get("Expect") != "" {
		if _, err := io.WriteString(in.conn, "HTTP/1.1 100 Continue\r\n\r\n"); err != nil {
			return errCut
		}
	}
	var err error
	in.Body, in.Sum, err = f.receiver.receive(r.Body, limit, bodyPace{in.Received, f.cfg.BodyTimeout, defaultBodyRate, defaultBodyTotal, in.progress})
	if err == refuseTime {
		// The homeserver is slow, or this machine: Synapse would take any 4xx to
		// /send for the destination's, and call that down.
		err = refuseStall
	}
	if in.Body != nil {
		in.Size = in.Body.Size()
	}
	return err
}

// refuse answers a request that is not taken, if anybody is there to listen,
// and closes its connection. rest is what the client may still be sending.
func (f *Front) refuse(in *Inbound, rest io.Reader, err error) {
	defer f.drop(in.coming)
	ref, ok := err.(*refusal)
	f.mu.Lock()
	if ok {
		f.stats.Refused[ref.status]++
	} else {
		f.stats.Cut++
	}
	f.mu.Unlock()
	if !ok {
		return
	}
	f.gate.enterStage(in.coming, stageRefused)
	h := http.Header{"Content-Type": {"application/json"}}
	own := "" // what a relayed answer may not have
	switch ref {
	case refuseConnect: // RFC 9110 15.5.6
		h.Set("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS")
	case refuseSecret: // RFC 9110 11.7.1
		own = "Proxy-Authenticate: Bearer\r\n"
	}
	body := matrix.ErrorJSON(ref.errcode, ref.message)
	if !bodyAllowed(in.Method, ref.status) {
		body = nil
	}
	w := &answerWriter{conn: in.conn, stall: f.cfg.StallTimeout}
	if w.send(answerHead(ref.status, h, own+framing(in.Method, ref.status, int64(len(body)))), body) != nil {
		return // nobody listens any more
	}
	// A client that is still sending its body would get a reset instead of
	// the answer (RFC 9112 9.6). So hear it out, within reason.
	if c, ok := in.conn.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		_ = in.conn.SetReadDeadline(time.Now().Add(f.linger))
		_, _ = io.CopyN(io.Discard, rest, lingerBytes)
	}
}

// drop closes a connection whose request is not parked.
func (f *Front) drop(c *coming) {
	_ = c.conn.Close()
	f.gate.dropped(c)
}

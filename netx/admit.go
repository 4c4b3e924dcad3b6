package netx

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
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
	refuseSize    = &refusal{http.StatusRequestEntityTooLarge, matrix.MTooLarge, "The request body is too large"}
	refuseTime    = &refusal{http.StatusRequestTimeout, matrix.MUnknown, "The request body took too long"}
	refuseChunks  = &refusal{http.StatusBadRequest, matrix.MUnknown, "The request body is malformed"}
	refuseFull    = &refusal{http.StatusServiceUnavailable, matrix.MUnknown, "No room for the request body"}
	refuseDisk    = &refusal{http.StatusInternalServerError, matrix.MUnknown, "The request body could not be stored"}
)

// serve takes one request from net/http: checks it, reads its body and parks
// it.
func (f *Front) serve(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	// Also for a request that is refused, since net/http may read on.
	rc := http.NewResponseController(w)
	if err := rc.SetReadDeadline(now.Add(f.cfg.BodyTimeout)); err != nil {
		panic(http.ErrAbortHandler) // the connection is broken
	}
	in := &Inbound{front: f, pos: -1, Received: now, Method: r.Method}
	err := f.check(in, r)
	if err == nil {
		err = f.readBody(in, w, r)
	}
	if err != nil {
		f.refuse(w, r, err)
		return
	}
	in.Header = make(http.Header, len(forwarded))
	for _, k := range forwarded {
		if v := r.Header[k]; len(v) > 0 {
			// The slices of r.Header share one array, which holds the secret.
			in.Header[k] = append([]string(nil), v...)
		}
	}
	f.park(in, rc)
}

// check looks at everything but the body. r.URL is not used: parsing and
// printing it again would change what Synapse has signed.
func (f *Front) check(in *Inbound, r *http.Request) error {
	if r.Method == http.MethodConnect {
		return refuseConnect
	}
	var err error
	in.Destination, in.Target, err = matrix.ParseFederationTarget(r.RequestURI)
	if errors.Is(err, matrix.ErrNotFederation) {
		return refuseScheme
	}
	if !f.authorized(r.Header["Proxy-Authorization"]) {
		return refuseSecret
	}
	if err != nil {
		return refuseTarget
	}
	if !r.ProtoAtLeast(1, 1) {
		return refuseVersion
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

// readBody reads the body, if there is one, into the spool. After an error
// nothing of it is left there.
func (f *Front) readBody(in *Inbound, w http.ResponseWriter, r *http.Request) error {
	limit := f.cfg.MaxBody(in.Method, in.Target)
	if r.ContentLength > limit {
		return refuseSize
	}
	if r.ContentLength == 0 {
		return nil
	}
	body, sum := f.cfg.Spool.New(), sha256.New()
	err := f.copyBody(body, sum, http.MaxBytesReader(w, r.Body, limit), in.Received.Add(f.cfg.BodyTimeout))
	body.CloseWrite(err)
	if in.Size = body.Size(); err != nil || in.Size == 0 { // size 0: chunked, without a chunk
		body.Release()
		return err
	}
	in.Body = body
	sum.Sum(in.Sum[:0])
	return nil
}

// copyBody reads src to its end.
func (f *Front) copyBody(body *Body, sum hash.Hash, src io.Reader, deadline time.Time) error {
	buf := getCopyBuf()
	defer putCopyBuf(buf)
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			sum.Write(buf[:n])
			if err := f.store(body, buf[:n], deadline); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return bodyError(err)
		}
	}
}

// store writes p to body. While the spool is full it waits: an error would
// tell Synapse that the remote is down, whereas waiting soon keeps it from
// sending more, as the number of requests being read is limited.
func (f *Front) store(body *Body, p []byte, deadline time.Time) error {
	for {
		freed := f.cfg.Spool.room()
		_, err := body.Write(p)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, ErrSpoolFull):
			return f.notStored(err, refuseDisk)
		}
		select {
		case <-freed:
		case <-time.After(time.Until(deadline)):
			return f.notStored(err, refuseFull)
		}
	}
}

// notStored logs why a body could not be stored, though not for every request,
// and returns ref.
func (f *Front) notStored(err error, ref *refusal) error {
	f.spoolLog.Do(func() { f.cfg.Logger.Error("a request body could not be stored", "err", err) })
	return ref
}

// bodyError sorts the errors of net/http's body reader.
func bodyError(err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return refuseSize
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return refuseTime
	}
	if _, ok := errors.AsType[*net.OpError](err); ok || errors.Is(err, io.ErrUnexpectedEOF) {
		return errCut
	}
	return refuseChunks
}

// refuse answers a request that is not taken. net/http closes the connection
// after it.
func (f *Front) refuse(w http.ResponseWriter, r *http.Request, err error) {
	ref, ok := err.(*refusal)
	f.mu.Lock()
	if ok {
		f.stats.Refused[ref.status]++
	} else {
		f.stats.Cut++
	}
	f.mu.Unlock()
	if !ok {
		panic(http.ErrAbortHandler) // net/http's way to close without an answer
	}
	h := w.Header()
	switch ref {
	case refuseConnect: // RFC 9110 15.5.6
		h.Set("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS")
	case refuseSecret: // RFC 9110 11.7.1
		h.Set("Proxy-Authenticate", "Bearer")
	}
	body := matrix.ErrorJSON(ref.errcode, ref.message)
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(ref.status)
	_, _ = w.Write(body) // fails when nobody listens any more

	// A client that is still sending its body would get a reset instead of
	// the answer (RFC 9112 9.6). So hear it out, within reason.
	rc := http.NewResponseController(w)
	if rc.Flush() == nil && rc.SetReadDeadline(time.Now().Add(f.linger)) == nil {
		_, _ = io.CopyN(io.Discard, r.Body, lingerBytes)
	}
}

package netx

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
)

// ErrAnswered is returned by Reply, Stream and Abort when one of them has been
// called before.
var ErrAnswered = errors.New("netx: the request has been answered")

// An Inbound is one request that waits, with its connection, for an answer.
// It costs about 2 KiB besides its body, and no goroutine.
//
// Exactly one of Reply, Stream and Abort takes effect, whether it succeeds or
// not, and closes the connection. A further one returns ErrAnswered, or
// ErrClientGone once FrontConfig.Gone has been told. They may be called by any
// goroutine. The body is not theirs: it is freed by Release.
//
// The fields must not be changed.
type Inbound struct {
	ID          uint64            // counts up from 1 within one Front
	Destination matrix.ServerName // the remote server; "" if Own
	Own         bool              // it is for the bus itself
	Method      string
	Target      string            // path and query, byte for byte as they arrived
	Header      http.Header       // only what is forwarded: User-Agent, Authorization, Content-Type
	Body        *Body             // complete; nil if there is none
	Size        int64             // bytes of the body
	Sum         [sha256.Size]byte // SHA-256 of the body; zero if there is none
	Received    time.Time         // when the header was complete

	front    *Front
	maxBody  int64 // if Own
	conn     net.Conn
	over     via
	coming   *coming // nil once it is handed over
	released atomic.Bool

	state inboundState // guarded by front.mu, as is pos
	pos   int          // index in front.waiting, or -1
}

type inboundState uint8

const (
	statePark   inboundState = iota // nobody has begun an answer
	stateAnswer                     // Reply, Stream or Abort was called
	stateGone                       // the client went away first
	stateOwn                        // its own goroutine is to answer (EdgeRequest.Answer)
)

// park hands the request over.
func (f *Front) park(in *Inbound) {
	in.ID = f.lastID.Add(1)
	f.gate.handed(in.coming)
	in.coming = nil
	f.mu.Lock()
	f.stats.Requests++
	f.stats.Parked++
	f.stats.MaxParked = max(f.stats.MaxParked, f.stats.Parked)
	f.mu.Unlock()

	handled := false
	defer func() {
		if !handled {
			_ = in.Abort() // Handle panics; it may have answered before
		}
		f.gate.leave(in.over, 0, 1)
	}()
	f.cfg.Handle(in)
	handled = true
	f.watch(in)
}

// unpark ends the waiting of a request, if it still waits.
func (f *Front) unpark(in *Inbound, to inboundState) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch in.state {
	case stateAnswer:
		return ErrAnswered
	case stateGone:
		return ErrClientGone
	}
	in.state = to
	f.stats.Parked--
	f.unwatch(in)
	return nil
}

// end closes the connection. When it is aborted, a TCP client gets a reset
// instead of an end, and what it has not read yet may be lost to it.
func (in *Inbound) end(abort bool) {
	if tcp, ok := in.conn.(*net.TCPConn); ok && abort {
		_ = tcp.SetLinger(0) // fails only on a connection that is broken already
	}
	_ = in.conn.Close()
	in.front.gate.leave(in.over, 1, 0)
}

// answer claims the right to answer, calls write, and closes the connection,
// aborting it unless write succeeds.
func (in *Inbound) answer(status int, write func(*answerWriter) error) error {
	if err := in.front.unpark(in, stateAnswer); err != nil {
		return err
	}
	whole := false
	defer func() { in.end(!whole) }() // also when write panics
	if status < 200 || status > 999 {
		return fmt.Errorf("answer: status %d is not final", status)
	}
	if err := write(&answerWriter{conn: in.conn, stall: in.front.cfg.StallTimeout}); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	whole = true
	return nil
}

// Reply answers with a small body of our own. status is 200 to 999.
// Content-Type is application/json unless header says otherwise. An error is
// ErrSlowReader or wraps ErrClientGone; nil means that the kernel has taken the
// whole answer.
func (in *Inbound) Reply(status int, header http.Header, body []byte) error {
	return in.answer(status, func(w *answerWriter) error {
		h := http.Header{"Content-Type": {"application/json"}}
		maps.Copy(h, header)
		head := answerHead(status, h, framing(in.Method, status, int64(len(body))))
		if !bodyAllowed(in.Method, status) {
			return w.send(head)
		}
		return w.send(head, body)
	})
}

// Stream relays an answer. status is 200 to 999. Of header, the fields that
// are about a connection (RFC 9110 7.6.1) and Proxy-* are left out. size is the
// number of bytes that body yields, or -1 when that is unknown; it then goes
// out in chunks. body may be nil when size is 0. To a HEAD request, and with a
// 204 or 304, the body is neither read nor sent.
//
// The header is sent before body is read. When body fails, or yields more or
// less than size, the connection is aborted so that the client cannot take the
// answer for complete, and that error is returned. An error of the connection
// is ErrSlowReader or wraps ErrClientGone. nil means that the kernel has taken
// the whole answer. Stream does not close body. While it waits for body it does
// not notice that the client went away.
func (in *Inbound) Stream(status int, header http.Header, size int64, body io.Reader) error {
	return in.answer(status, func(w *answerWriter) error {
		head := answerHead(status, header, framing(in.Method, status, size))
		if r, ok := body.(*Reader); ok && bodyAllowed(in.Method, status) {
			if b, whole := r.whole(); whole && int64(len(b)) == size {
				return w.send(head, b) // one system call instead of two, and one for the client
			}
		}
		if err := w.send(head); err != nil {
			return err
		}
		if size == 0 || !bodyAllowed(in.Method, status) {
			return nil
		}
		w.chunked, w.left = size < 0, size
		buf := getCopyBuf() // not used when body is an io.WriterTo
		defer putCopyBuf(buf)
		if _, err := io.CopyBuffer(w, body, buf[:]); err != nil {
			return err
		}
		return w.finish()
	})
}

// Abort closes the connection without an answer.
func (in *Inbound) Abort() error {
	if err := in.front.unpark(in, stateAnswer); err != nil {
		return err
	}
	in.end(true)
	return nil
}

// Release gives up the request's reference to its body, if it has one. Only
// the first call has an effect. It is due in every case, also after Gone.
func (in *Inbound) Release() {
	if in.Body != nil && in.released.CompareAndSwap(false, true) {
		in.Body.Release()
	}
}

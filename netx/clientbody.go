package netx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"fsbus/bus/matrix"
)

// requestBody is a request's body on its way into net/http, which may read it
// on a goroutine that outlives the request. Close ends that: when it returns,
// the caller's reader is no longer in use.
type requestBody struct {
	reader io.Reader
	size   int64 // -1: unknown
	once   sync.Once

	mu     sync.Mutex
	read   int64
	closed bool
	err    error // why the body could not be read as promised
}

var errBodyClosed = errors.New("request body closed")

func (b *requestBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, errBodyClosed
	}
	n, err := b.reader.Read(p)
	b.read += int64(n)
	switch {
	case b.size >= 0 && (b.read > b.size || err == io.EOF && b.read < b.size):
		b.err = fmt.Errorf("body of %d bytes instead of %d", b.read, b.size)
		return 0, b.err
	case err != nil && err != io.EOF:
		b.err = fmt.Errorf("body: %w", err)
		return n, b.err
	}
	return n, err
}

// Close closes the caller's reader, if it can be, and waits for a Read that is
// under way. A nil requestBody is none.
func (b *requestBody) Close() error {
	if b == nil {
		return nil
	}
	b.once.Do(func() {
		if c, ok := b.reader.(io.Closer); ok {
			_ = c.Close()
		}
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

// failure returns what was wrong with the body, if anything.
func (b *requestBody) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// answerBody is the body of an answer. Its errors are *Error. Read is for one
// goroutine; Close may be called by any, and ends a Read.
type answerBody struct {
	caller  context.Context // the caller's
	ctx     context.Context // derived from it; ends with the body
	cancel  context.CancelCauseFunc
	body    io.ReadCloser
	stall   *time.Timer // ends ctx; runs during a Read
	timeout time.Duration
	err     error // of Read, for ever after

	once sync.Once
	done func(err error)
}

// newAnswerBody wraps body. done is called once: when the body has been read to
// its end or has been closed, or with the error when it has failed.
func newAnswerBody(caller, ctx context.Context, cancel context.CancelCauseFunc, body io.ReadCloser,
	timeout time.Duration, done func(err error)) *answerBody {
	b := &answerBody{caller: caller, ctx: ctx, cancel: cancel, body: body, timeout: timeout, done: done}
	b.stall = time.AfterFunc(timeout, func() { cancel(errStalled) })
	b.stall.Stop()
	return b
}

func (b *answerBody) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	b.stall.Reset(b.timeout)
	n, err := b.body.Read(p)
	b.stall.Stop()
	switch {
	case err == nil:
		return n, nil
	case err == io.EOF && b.ctx.Err() == nil:
		b.err = io.EOF
		b.finish(nil)
	default:
		// Also at an orderly end that came after we gave up: TLS tells the
		// remote that we close, upon which it may end an answer that it had not
		// finished.
		b.err = b.failed(err)
		b.finish(b.err)
	}
	return n, b.err
}

// failed is the error of a Read. Once an answer has begun, a caller's time-out
// is FailCut as well: something did come back.
func (b *answerBody) failed(err error) *Error {
	f := matrix.FailCut
	if err == io.EOF {
		err = b.ctx.Err()
	}
	switch {
	case context.Cause(b.ctx) == errStalled:
		err = fmt.Errorf("%w: no byte for %v", errStalled, b.timeout)
	case errors.Is(b.caller.Err(), context.Canceled):
		f = matrix.FailCancelled
	}
	return &Error{Failure: f, Op: OpBody, Err: err}
}

// Close gives the answer up, or ends it, and never fails.
func (b *answerBody) Close() error {
	_ = b.body.Close()
	b.finish(nil)
	b.cancel(nil)
	return nil
}

func (b *answerBody) finish(err error) {
	b.once.Do(func() { b.done(err) })
}

package netx

import (
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/time/rate"
)

// A receiver reads the bodies of requests into a spool.
type receiver struct {
	spool    *Spool
	logger   *slog.Logger
	errorLog *rate.Sometimes
}

// bodyPace says until when a body must have come: some time after it began, and a second
// more for each rate bytes of it, but for no longer than total. So a slow line gets a
// large body through, and who sends next to nothing keeps its place for no longer than who
// sends nothing.
type bodyPace struct {
	begun    time.Time
	grace    time.Duration
	rate     int64 // bytes a second; 0: no more time for what has come
	total    time.Duration
	progress func(n int64, deadline time.Time) error // is told what has come, and until when more must if that is later now; may be nil
}

// deadline returns until when the next bytes must come after n have.
func (p *bodyPace) deadline(n int64) time.Time {
	d := p.grace
	if p.rate > 0 {
		d = max(d, min(d+time.Duration(n/p.rate)*time.Second, p.total))
	}
	return p.begun.Add(d)
}

// receive reads src to its end, limit bytes at most, and returns the body,
// complete, or nil if there is not one byte of it. sum is its SHA-256. The
// error is a *refusal, or errCut; nothing is left in the spool then.
func (rc *receiver) receive(src io.ReadCloser, limit int64, pace bodyPace) (body *Body, sum [sha256.Size]byte, err error) {
	body, digest := rc.spool.New(), sha256.New()
	err = rc.copy(body, digest, http.MaxBytesReader(nil, src, limit), pace)
	body.CloseWrite(err)
	if err != nil || body.Size() == 0 { // size 0: chunked, without a chunk
		body.Release()
		return nil, sum, err
	}
	digest.Sum(sum[:0])
	return body, sum, nil
}

func (rc *receiver) copy(body *Body, sum hash.Hash, src io.Reader, pace bodyPace) error {
	buf := getCopyBuf()
	defer putCopyBuf(buf)
	held := false // we have kept the client waiting
	deadline := pace.deadline(0)
	var all int64
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			sum.Write(buf[:n])
			all += int64(n)
			if pace.progress != nil {
				var later time.Time
				if next := pace.deadline(all); next.After(deadline) {
					deadline, later = next, next
				}
				_ = pace.progress(all, later) // a deadline that is refused is found out by the next read
			}
			waited, err := rc.store(body, buf[:n], deadline)
			if err != nil {
				return err
			}
			held = held || waited
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			err = bodyError(err)
			if held && err == refuseTime {
				return rc.notStored(ErrSpoolFull, refuseFull) // it was us who took so long
			}
			return err
		}
	}
}

// store writes p to body. While the spool is full it waits, and says so: an
// error would tell Synapse that the remote is down, whereas waiting soon keeps
// it from sending more, as the number of requests being read is limited.
func (rc *receiver) store(body *Body, p []byte, deadline time.Time) (waited bool, err error) {
	for {
		freed := rc.spool.room()
		_, err := body.Write(p)
		switch {
		case err == nil:
			return waited, nil
		case !errors.Is(err, ErrSpoolFull):
			return waited, rc.notStored(err, refuseDisk)
		}
		waited = true
		select {
		case <-freed:
		case <-time.After(time.Until(deadline)):
			return waited, rc.notStored(err, refuseFull)
		}
	}
}

// notStored logs why a body could not be stored, though not for every request,
// and returns ref.
func (rc *receiver) notStored(err error, ref *refusal) error {
	rc.errorLog.Do(func() { rc.logger.Error("a request body could not be stored", "err", err) })
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

package netx

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"strconv"
	"strings"
	"time"
)

var (
	// ErrSlowReader is returned when the client took no byte of its answer
	// for FrontConfig.StallTimeout.
	ErrSlowReader = errors.New("netx: the client does not take its answer")

	// ErrClientGone is returned, wrapped, when the client closed its
	// connection before its answer was written.
	ErrClientGone = errors.New("netx: the client has closed its connection")
)

// hopHeaders are never relayed: they are about one connection (RFC 9110
// 7.6.1), or about framing, which is our own. Proxy-* are left out by prefix.
var hopHeaders = map[string]bool{
	"Connection":        true,
	"Content-Length":    true,
	"Keep-Alive":        true,
	"Te":                true,
	"Trailer":           true,
	"Transfer-Encoding": true,
	"Upgrade":           true,
}

// endToEnd returns a copy of what may be relayed of h.
func endToEnd(h http.Header) http.Header {
	var listed map[string]bool
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			if listed == nil {
				listed = make(map[string]bool)
			}
			listed[textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name))] = true
		}
	}
	out := make(http.Header, len(h)+1)
	for k, v := range h {
		k = textproto.CanonicalMIMEHeaderKey(k)
		if !hopHeaders[k] && !listed[k] && !strings.HasPrefix(k, "Proxy-") {
			out[k] = v
		}
	}
	return out
}

// answerHead returns the status line and header of an answer, up to and
// including the empty line. framing is the one line that says how the body is
// delimited, or "".
func answerHead(status int, header http.Header, framing string) []byte {
	var b bytes.Buffer // its writes do not fail
	b.WriteString("HTTP/1.1 ")
	b.WriteString(strconv.Itoa(status))
	b.WriteByte(' ')
	b.WriteString(http.StatusText(status))
	b.WriteString("\r\n")
	h := endToEnd(header)
	if len(h["Date"]) == 0 { // RFC 9110 6.6.1
		h["Date"] = []string{time.Now().UTC().Format(http.TimeFormat)}
	}
	_ = h.Write(&b)
	b.WriteString(framing)
	b.WriteString("Connection: close\r\n\r\n")
	return b.Bytes()
}

// bodyAllowed reports whether an answer to method has a body at all (RFC 9110
// 6.4.1).
func bodyAllowed(method string, status int) bool {
	return method != http.MethodHead && status != http.StatusNoContent && status != http.StatusNotModified
}

// framing returns the header line that delimits a body of size bytes, or of
// unknown size when size is negative.
func framing(method string, status int, size int64) string {
	switch {
	case status == http.StatusNoContent || status == http.StatusNotModified:
		return ""
	case size >= 0:
		return "Content-Length: " + strconv.FormatInt(size, 10) + "\r\n"
	case method == http.MethodHead:
		return ""
	}
	return "Transfer-Encoding: chunked\r\n"
}

// An answerWriter writes a body to a connection, framed, and gives up when the
// peer takes nothing for too long. After an error it must not be used again,
// and the connection must be aborted. Errors of the connection are
// ErrSlowReader or wrap ErrClientGone.
type answerWriter struct {
	conn    net.Conn
	stall   time.Duration
	chunked bool
	left    int64 // if not chunked: bytes that Content-Length still promises
}

// Write writes p as a part of the body. More bytes than promised are
// http.ErrContentLength. The count is exact only when there is no error.
func (w *answerWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil // an empty chunk would be the end
	}
	var err error
	if w.chunked {
		err = w.send(chunkHead(int64(len(p))), p, crlf)
	} else if err = w.promised(int64(len(p))); err == nil {
		err = w.send(p)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// writeFile writes n bytes of f from off on as a part of the body, without
// copying them through this process where the system can do that. The count is
// exact only when there is no error.
func (w *answerWriter) writeFile(f *os.File, off, n int64) (int64, error) {
	var err error
	if w.chunked {
		err = w.send(chunkHead(n))
	} else {
		err = w.promised(n)
	}
	if err != nil {
		return 0, err
	}
	if err := w.sendFile(f, off, n); err != nil {
		return 0, err
	}
	if w.chunked {
		err = w.send(crlf)
	}
	return n, err
}

// finish ends the body: it writes the last chunk, or checks that as much was
// written as was promised.
func (w *answerWriter) finish() error {
	if w.chunked {
		return w.send(lastChunk)
	}
	if w.left > 0 {
		return fmt.Errorf("%w: %d bytes short", io.ErrUnexpectedEOF, w.left)
	}
	return nil
}

var (
	crlf      = []byte("\r\n")
	lastChunk = []byte("0\r\n\r\n")
)

func chunkHead(n int64) []byte {
	return append(strconv.AppendInt(nil, n, 16), '\r', '\n')
}

// promised takes n bytes off what Content-Length promises.
func (w *answerWriter) promised(n int64) error {
	if n > w.left {
		return http.ErrContentLength
	}
	w.left -= n
	return nil
}

// send writes all of bufs, with one system call where the connection can.
func (w *answerWriter) send(bufs ...[]byte) error {
	b := net.Buffers(bufs)
	for len(b) > 0 {
		_, err := w.progress(func() (int64, error) { return b.WriteTo(w.conn) })
		if err != nil {
			return clientError(err)
		}
	}
	return nil
}

// sendFile writes n bytes of f from off on.
func (w *answerWriter) sendFile(f *os.File, off, n int64) error {
	for n > 0 {
		m, err := w.progress(func() (int64, error) { return sendFile(w.conn, f, off, n) })
		off, n = off+m, n-m
		if err == ErrSlowReader {
			return err
		}
		if err != nil {
			// Either the system cannot do it, or the file or the connection
			// is at fault. Copying the rest works, or tells which.
			return w.copyFile(f, off, n)
		}
	}
	return nil
}

// copyFile is sendFile through a buffer.
func (w *answerWriter) copyFile(f *os.File, off, n int64) error {
	buf := getCopyBuf()
	defer putCopyBuf(buf)
	for n > 0 {
		m, err := f.ReadAt(buf[:min(n, copyBufSize)], off)
		if m == 0 {
			return fmt.Errorf("spool: read: %w", errors.Join(err, io.ErrUnexpectedEOF))
		}
		if err := w.send(buf[:m]); err != nil {
			return err
		}
		off, n = off+int64(m), n-int64(m)
	}
	return nil
}

// progress calls write with a deadline one stall time-out away. A write that
// ran into the deadline but got rid of some bytes counts as a success: the
// peer is slow, not stuck.
func (w *answerWriter) progress(write func() (int64, error)) (int64, error) {
	if err := w.conn.SetWriteDeadline(time.Now().Add(w.stall)); err != nil {
		return 0, err
	}
	n, err := write()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if err = nil; n == 0 {
			err = ErrSlowReader
		}
	}
	return n, err
}

func clientError(err error) error {
	if err == ErrSlowReader {
		return err
	}
	return fmt.Errorf("%w: %w", ErrClientGone, err)
}

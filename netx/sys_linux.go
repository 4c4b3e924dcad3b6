package netx

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerGone reports whether the peer has closed c, or its sending half of it,
// without taking anything from the connection. It does not block.
func peerGone(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	var gone bool
	// An error of Control means that we have closed c ourselves.
	_ = raw.Control(func(fd uintptr) {
		// Unlike a recv with MSG_PEEK this sees an end behind unread bytes.
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0
	})
	return gone
}

// sendFileMax is the most that one system call is asked to move.
const sendFileMax = 1 << 20

// sendFile moves bytes of f from off on to c inside the kernel, n at most and
// as many as c takes now; it waits, until c's write deadline, when that is
// none. The position of f is neither used nor changed.
func sendFile(c net.Conn, f *os.File, off, n int64) (int64, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	dst, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	src, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var sent int
	var sendErr, waitErr error
	err = src.Control(func(in uintptr) {
		waitErr = dst.Write(func(out uintptr) bool {
			for {
				at := off
				sent, sendErr = unix.Sendfile(int(out), int(in), &at, int(min(n, sendFileMax)))
				if sendErr != unix.EINTR {
					return sendErr != unix.EAGAIN
				}
			}
		})
	})
	switch err := errors.Join(err, waitErr); {
	case err != nil:
		return 0, err
	case sendErr != nil:
		return 0, os.NewSyscallError("sendfile", sendErr)
	case sent == 0:
		return 0, io.ErrUnexpectedEOF
	}
	return int64(sent), nil
}

// monotonicUsec returns CLOCK_MONOTONIC in microseconds, as sd_notify(3) wants
// it beside RELOADING=1.
func monotonicUsec() (int64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return ts.Nano() / 1000, nil
}

// adoptSocket keeps fd from being inherited by children, and returns an error
// unless it is a stream socket that listens.
func adoptSocket(fd int) error {
	unix.CloseOnExec(fd)
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if kind != unix.SOCK_STREAM {
		return fmt.Errorf("a socket of type %d, not a stream", kind)
	}
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if listening == 0 {
		return errors.New("a socket that does not listen")
	}
	return nil
}

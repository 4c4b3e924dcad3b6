package netx

import (
	"bytes"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// HeadIsThere reports whether what a connection has got so far has the end of a request's
// head in it. It takes nothing of it, and does not wait.
func HeadIsThere(conn net.Conn) bool {
	s, ok := conn.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return true // the next read finds out
	}
	there := false
	_ = raw.Control(func(fd uintptr) { // as above
		var buf [4 << 10]byte
		n, _, err := unix.Recvfrom(int(fd), buf[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		there = err == nil && (n == len(buf) || bytes.Contains(buf[:n], []byte("\r\n\r\n")))
	})
	return there
}

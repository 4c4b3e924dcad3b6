//go:build !linux

package netx

import (
	"errors"
	"net"
	"os"
)

// peerGone never reports anything here: a client that went away is noticed
// when its answer is written.
func peerGone(net.Conn) bool { return false }

// sendFile is not available here; callers copy instead.
func sendFile(net.Conn, *os.File, int64, int64) (int64, error) { return 0, errors.ErrUnsupported }

// monotonicUsec is not available here, and neither is systemd.
func monotonicUsec() (int64, error) { return 0, errors.ErrUnsupported }

// adoptSocket refuses: sockets are passed on by systemd only.
func adoptSocket(int) error { return errors.ErrUnsupported }

//go:build !linux

package node

import "golang.org/x/sys/unix"

const getTermios = unix.TIOCGETA

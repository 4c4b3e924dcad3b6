package node

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holder returns the process that listens at the address of a listener that could not be
// opened, as far as /proc tells: other users' processes only root can look into. 0 if it
// does not.
func holder(err error) (pid int, name string) {
	op, ok := errors.AsType[*net.OpError](err)
	if !ok || !errors.Is(err, unix.EADDRINUSE) {
		return 0, ""
	}
	tcp, ok := op.Addr.(*net.TCPAddr)
	if !ok {
		return 0, ""
	}
	return holderOf(tcp.Port)
}

// holderText says who that is, "" if it is not known.
func holderText(err error) string {
	pid, name := holder(err)
	if pid == 0 {
		return ""
	}
	return fmt.Sprintf(" (%s, process %d, listens there)", quote(name), pid)
}

// maxProcFile bounds what is read of a file of /proc.
const maxProcFile = 4 << 20

// holderOf returns the process that listens at a TCP port, 0 if that is not known.
func holderOf(port int) (pid int, name string) {
	inodes := make(map[string]bool)
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(file)
		if err != nil {
			continue
		}
		text, _ := io.ReadAll(io.LimitReader(f, maxProcFile)) // those that listen come first
		f.Close()
		for line := range bytes.Lines(text) {
			// proc_pid_net(5): sl local_address rem_address st ... inode, in the tenth column
			f := strings.Fields(string(line))
			const listening = "0A"
			if len(f) < 10 || f[3] != listening {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			if p, err := strconv.ParseInt(hex, 16, 64); err == nil && p == int64(port) {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	if len(inodes) == 0 {
		return 0, ""
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is right
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err != nil || !inodes[to] {
			continue
		}
		process := filepath.Dir(filepath.Dir(fd))
		if pid, err := strconv.Atoi(filepath.Base(process)); err == nil {
			comm, _ := readSmall(filepath.Join(process, "comm"), 64) // without its name it is still a process
			return pid, strings.TrimSpace(string(comm))
		}
	}
	return 0, ""
}

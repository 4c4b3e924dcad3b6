package netx

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
)

const (
	firstPassedFD = 3   // SD_LISTEN_FDS_START
	maxPassedFDs  = 256 // far more than a unit would pass
)

// A NamedListener is a listening socket that systemd passed on, with its
// FileDescriptorName=, or "unknown" if none came with it.
type NamedListener struct {
	Name string
	net.Listener
}

// SystemdListeners returns the sockets that systemd passed to this process, in
// order (sd_listen_fds(3)), or none if it passed none. It unsets the variables
// that announce them, so that a child does not take them for its own; a second
// call finds nothing. Every socket must be a stream socket that listens. Their
// addresses are not checked: they are set in the unit, not in our
// configuration. Closing such a listener leaves the socket and its backlog to
// systemd.
func SystemdListeners() ([]NamedListener, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		os.Unsetenv(v)
	}
	if pid != strconv.Itoa(os.Getpid()) { // not set, or meant for our parent
		return nil, nil
	}
	n, err := strconv.ParseInt(count, 10, 32)
	if err != nil || n < 0 || n > maxPassedFDs {
		return nil, fmt.Errorf("systemd: LISTEN_FDS is %q, not 0 to %d", count, maxPassedFDs)
	}
	var name []string
	if names != "" {
		name = strings.Split(names, ":")
		if len(name) != int(n) {
			return nil, fmt.Errorf("systemd: LISTEN_FDNAMES has %d names for %d sockets", len(name), n)
		}
	}
	var out []NamedListener
	var errs []error
	for i := range int(n) {
		l := NamedListener{Name: "unknown"}
		if name != nil {
			l.Name = name[i]
		}
		if l.Listener, err = passedListener(firstPassedFD+i, l.Name); err != nil {
			errs = append(errs, fmt.Errorf("systemd: socket %d (%s): %w", firstPassedFD+i, l.Name, err))
			continue
		}
		out = append(out, l)
	}
	if len(errs) > 0 {
		for _, l := range out {
			l.Close()
		}
		return nil, errors.Join(errs...)
	}
	return out, nil
}

// passedListener takes over one descriptor: it becomes a listener, or is
// closed.
func passedListener(fd int, name string) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), name)
	defer f.Close() // FileListener works on a copy
	if err := adoptSocket(fd); err != nil {
		return nil, err
	}
	return net.FileListener(f)
}

package netx

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

var (
	// ErrRemoteListen is wrapped by Listen's error for an address that other
	// machines can reach.
	ErrRemoteListen = errors.New("the address is not a loopback address, and the secret would cross the network unencrypted; use a unix socket or 127.0.0.1, or set allow_remote = true if the network is trusted")

	// ErrInUse is wrapped by Listen's error for a unix socket on which some
	// process answers.
	ErrInUse = errors.New("another process answers on it")
)

// defaultSocketMode lets the socket's group connect, which is where the
// homeserver's user belongs.
const defaultSocketMode os.FileMode = 0o660

// maxSocketPath is the longest path of a unix socket on Linux: sun_path of
// unix(7) without its final zero.
const maxSocketPath = 107

// ListenOptions are for Listen. The zero value is usable.
type ListenOptions struct {
	Mode         os.FileMode // of a unix socket; 0 means 0660
	Owner, Group string      // of a unix socket: name or number; "" leaves it as it is
	AllowRemote  bool        // accept TCP addresses other than loopback
}

// Listen listens on "unix:/absolute/path" or on the TCP address "host:port".
//
// A unix socket is made in a directory that must exist. A socket that an
// earlier process left there is replaced; anything else at that path is not
// touched. The socket is removed when the listener is closed. It gets its
// owner, then its mode; until then the umask decides who may connect.
//
// A TCP address must be a loopback address unless o.AllowRemote is set;
// "host:port" without a host means every address, and is refused as well. An
// IPv4 address is IPv4's only and an IPv6 address IPv6's, so that 0.0.0.0 and
// [::] with the same port go together; without a host it is both.
func Listen(spec string, o ListenOptions) (net.Listener, error) {
	var ln net.Listener
	var err error
	if path, ok := strings.CutPrefix(spec, "unix:"); ok {
		ln, err = listenUnix(path, o)
	} else {
		ln, err = listenTCP(spec, o)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", spec, err)
	}
	return ln, nil
}

func listenTCP(spec string, o ListenOptions) (net.Listener, error) {
	addr, err := net.ResolveTCPAddr("tcp", spec)
	if err != nil {
		return nil, err
	}
	if !addr.IP.IsLoopback() && !o.AllowRemote {
		return nil, ErrRemoteListen
	}
	// The address that was checked, not the name once more. Keep-alive probes
	// would be four system calls for a connection that lives for one request.
	lc := net.ListenConfig{KeepAlive: -1}
	return lc.Listen(context.Background(), tcpNetwork(addr.IP), addr.String())
}

// tcpNetwork returns the network to listen on an address with. With "tcp" the
// kernel would be asked for both families for 0.0.0.0 and for [::], and the second
// of the two would find its address in use.
func tcpNetwork(ip net.IP) string {
	switch {
	case ip == nil: // no host
		return "tcp"
	case ip.To4() != nil:
		return "tcp4"
	}
	return "tcp6"
}

func listenUnix(path string, o ListenOptions) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, errors.New("the path must be absolute")
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path has %d bytes, a socket's may have %d", len(path), maxSocketPath)
	}
	uid, err := lookupID(o.Owner, func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
	if err != nil {
		return nil, err
	}
	gid, err := lookupID(o.Group, func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
	if err != nil {
		return nil, err
	}
	if fi, err := os.Stat(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", filepath.Dir(path))
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	mode := o.Mode
	if mode == 0 {
		mode = defaultSocketMode
	}
	// The owner first, so that the mode opens the socket to the right group.
	if uid >= 0 || gid >= 0 {
		err = os.Chown(path, uid, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// removeStale removes the socket of a process that is gone.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return errors.New("there is something that is not a socket; it is left alone")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return ErrInUse
	case errors.Is(err, syscall.EAGAIN): // its backlog is full
		return ErrInUse
	case !errors.Is(err, syscall.ECONNREFUSED): // a missing permission, say, proves nothing
		return fmt.Errorf("is anybody there? %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// lookupID returns the number of a user or group that is given by number or
// name, or -1 for "".
func lookupID(s string, lookup func(string) (string, error)) (int, error) {
	if s == "" {
		return -1, nil
	}
	if id, err := strconv.ParseInt(s, 10, 32); err == nil && id >= 0 {
		return int(id), nil
	}
	id, err := lookup(s)
	if err != nil {
		return -1, err
	}
	return strconv.Atoi(id)
}

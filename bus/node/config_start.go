package node

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"fsbus/netx"
	"fsbus/sched"
)

// AtStart says what would go wrong when the service starts, of what the configuration does
// not say itself: addresses that are taken, and files that the user who runs it cannot read.
// An empty name is whoever asks. notes are of addresses that fsbus itself has, or may have,
// as it runs already. The error is one of the name.
func (c *Config) AtStart(name string) (wrong, notes []string, err error) {
	wrong, notes = c.taken()
	if name == "" {
		return wrong, notes, nil
	}
	u, err := findUser(name)
	if err != nil {
		return nil, nil, err
	}
	return append(wrong, c.unreadable(u)...), notes, nil
}

// taken returns the addresses at which nothing else can listen.
func (c *Config) taken() (wrong, notes []string) {
	keys := []struct {
		key   string
		specs []string
	}{{"front.listen", c.Front.Listen}, {"edge.listen", c.Edge.Listen}, {"status.listen", []string{c.Status.Listen}}}
	for _, k := range keys {
		for _, spec := range k.specs {
			if spec == "" || strings.HasPrefix(spec, "unix:") { // a socket that is there is replaced
				continue
			}
			ln, err := netx.Listen(spec, netx.ListenOptions{AllowRemote: true})
			if err == nil {
				ln.Close()
				continue
			}
			why := err
			if op, ok := errors.AsType[*net.OpError](err); ok {
				why = op.Err
			}
			pid, name := holder(err)
			switch {
			case name == "fsbus", pid == 1: // systemd has the socket
				notes = append(notes, fmt.Sprintf("%s: fsbus runs already, and listens at %s", k.key, quote(spec)))
			case pid == 0 && errors.Is(err, unix.EADDRINUSE):
				notes = append(notes, fmt.Sprintf("%s: somebody listens at %s: if that is not fsbus itself, it will not start there (root is told who it is)", k.key, quote(spec)))
			default:
				wrong = append(wrong, fmt.Sprintf("%s: nothing can listen at %s: %v%s", k.key, quote(spec), why, holderText(err)))
			}
		}
	}
	return wrong, notes
}

// account is a user and the groups that he is in.
type account struct {
	name string
	uid  uint32
	gids []uint32
}

func findUser(name string) (a account, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return a, fmt.Errorf("-user %s: %w", quote(name), err)
	}
	groups, err := u.GroupIds()
	if err != nil {
		return a, fmt.Errorf("-user %s: %w", quote(name), err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return a, fmt.Errorf("-user %s: its number is %s", quote(name), quote(u.Uid))
	}
	a = account{name: name, uid: uint32(uid)}
	for _, g := range append(groups, u.Gid) {
		if gid, err := strconv.ParseUint(g, 10, 32); err == nil {
			a.gids = append(a.gids, uint32(gid))
		}
	}
	return a, nil
}

// may reports whether the account has all the rights of bits (4 read, 2 write, 1 search) to
// a file, by its mode alone.
func (a *account) may(fi os.FileInfo, bits os.FileMode) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || a.uid == 0 {
		return true
	}
	mode := fi.Mode().Perm()
	switch {
	case st.Uid == a.uid:
		mode >>= 6
	case slices.Contains(a.gids, st.Gid):
		mode >>= 3
	}
	return mode&bits == bits
}

// lacks says why the account does not have rights to a file, "" if it has.
func (a *account) lacks(path string, bits os.FileMode) string {
	for i, b := range path {
		if b != '/' {
			continue
		}
		dir := path[:i+1]
		if fi, err := os.Stat(dir); err == nil && !a.may(fi, 1) {
			return fmt.Sprintf("user %s may not enter %s (mode %v)", a.name, quote(dir), FileMode(fi.Mode().Perm()))
		}
	}
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return reason(err)
	case !a.may(fi, bits):
		what := "read"
		if bits&2 != 0 {
			what = "write to"
		}
		return fmt.Sprintf("user %s may not %s it (mode %v)", a.name, what, FileMode(fi.Mode().Perm()))
	}
	return ""
}

// unreadable returns the files that the account needs and cannot read.
func (c *Config) unreadable(a account) (wrong []string) {
	files := []struct{ key, path string }{
		{"the configuration", c.file}, {"homeserver.signing_key_path", c.Homeserver.SigningKeyPath}, {"front.secret_path", c.Front.SecretPath},
		{"keys.key_path", c.Keys.KeyPath}, {"edge.tls_certificate", c.Edge.TLSCertificate}, {"edge.tls_private_key", c.Edge.TLSPrivateKey}, {"federation.ca_file", c.Federation.CAFile},
	}
	for _, f := range files {
		if f.path == "" || strings.HasPrefix(f.path, credentials) { // systemd gives those to the service
			continue
		}
		if why := a.lacks(f.path, 4); why != "" {
			wrong = append(wrong, fmt.Sprintf("%s: %s: %s", f.key, quote(f.path), why))
		}
	}
	if _, err := os.Stat(c.DataDir); err == nil { // else systemd makes it
		if why := a.lacks(c.DataDir, 7); why != "" {
			wrong = append(wrong, fmt.Sprintf("data_dir: %s: %s", quote(c.DataDir), why))
		}
	}
	return wrong
}

// nameWarning says that a certificate is for other names than those by which the server is
// reached, "" if it is not.
func (e *EdgeConfig) nameWarning(i netx.CertificateInfo, serverHost string) string {
	host := serverHost
	if e.WellKnown != "" {
		host = hostOf(e.WellKnown)
	}
	if covers(i.Names, host) {
		return ""
	}
	return fmt.Sprintf("it is for %s, and not for %s: other servers refuse it, unless /.well-known/matrix/server of %s names one of those", strings.Join(i.Names, ", "), host, serverHost)
}

// hostOf returns a server name without its port.
func hostOf(name string) string {
	if host, _, err := net.SplitHostPort(name); err == nil {
		return host
	}
	return strings.Trim(name, "[]")
}

// covers reports whether a certificate with names is one of host (RFC 6125 6.4.3: a
// wildcard is the whole first label).
func covers(names []string, host string) bool {
	_, parent, _ := strings.Cut(host, ".")
	return slices.ContainsFunc(names, func(n string) bool {
		return strings.EqualFold(n, host) || parent != "" && strings.EqualFold(n, "*."+parent)
	})
}

// unitFolders are where systemd looks for units, the one that counts most first.
var unitFolders = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// memoryHigh returns MemoryHigh= of fsbus.service, and the file that sets it; 0 if none does.
func memoryHigh(folders []string) (high sched.Bytes, file string) {
	var files []string // the last one that sets it counts
	for _, dir := range slices.Backward(folders) {
		more, _ := filepath.Glob(filepath.Join(dir, "fsbus.service.d", "*.conf")) // the pattern is right
		files = append(files, more...)
	}
	for _, dir := range folders {
		if unit := filepath.Join(dir, "fsbus.service"); unix.Access(unit, unix.R_OK) == nil {
			files = append([]string{unit}, files...)
			break
		}
	}
	for _, name := range files {
		text, err := readSmall(name, maxConfigFile)
		if err != nil {
			continue
		}
		for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
			value, ok := strings.CutPrefix(strings.TrimSpace(s.Text()), "MemoryHigh=")
			if !ok {
				continue
			}
			high, file = 0, "" // "infinity", a share of the memory, or nothing: no bound to compare with
			switch last := value[max(0, len(value)-1):]; {
			case last == "K" || last == "M" || last == "G":
				value += "iB"
			case last >= "0" && last <= "9":
				value += "B"
			}
			if b, err := sched.ParseBytes(value); err == nil {
				high, file = b, name
			}
		}
	}
	return high, file
}

// memoryWarning says that the unit gives less memory than the bus may use, "" if it does not.
func (c *Config) memoryWarning(folders []string) string {
	high, file := memoryHigh(folders)
	if high == 0 || c.MemoryLimit <= high {
		return ""
	}
	return fmt.Sprintf("memory_limit: %v is more than MemoryHigh=%v in %s, from which on the system slows fsbus down: raise that, and MemoryMax with it", c.MemoryLimit, high, quote(file))
}

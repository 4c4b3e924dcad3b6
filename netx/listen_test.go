package netx

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, test := range []struct {
		options ListenOptions
		mode    os.FileMode
	}{
		{ListenOptions{}, 0o660},
		{ListenOptions{Mode: 0o600}, 0o600},
		{ListenOptions{Mode: 0o666, Owner: strconv.Itoa(os.Getuid()), Group: strconv.Itoa(os.Getgid())}, 0o666},
	} {
		ln, err := Listen("unix:"+path, test.options)
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Type() != os.ModeSocket || fi.Mode().Perm() != test.mode {
			t.Errorf("%v, %v", fi.Mode(), err)
		}
		if _, err := Listen("unix:"+path, ListenOptions{}); !errors.Is(err, ErrInUse) {
			t.Errorf("a second listener: %v", err)
		}
		ln.Close()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	}
}

func TestListenUnixReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	ln, err := Listen("unix:"+path, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		spec    string
		options ListenOptions
		want    string
	}{
		{"unix:", ListenOptions{}, "absolute"},
		{"unix:s", ListenOptions{}, "absolute"},
		{"unix:@abstract", ListenOptions{}, "absolute"},
		{"unix:" + dir + "/none/s", ListenOptions{}, "no such file"},
		{"unix:" + file + "/s", ListenOptions{}, "not a directory"},
		{"unix:" + file, ListenOptions{}, "not a socket"},
		{"unix:" + link, ListenOptions{}, "not a socket"},
		{"unix:/" + strings.Repeat("x", 107), ListenOptions{}, "108 bytes"},
		{"unix:" + dir + "/s", ListenOptions{Owner: "no-such-user"}, "no-such-user"},
		{"unix:" + dir + "/s", ListenOptions{Group: "no-such-group"}, "no-such-group"},
		{"0.0.0.0:0", ListenOptions{}, "allow_remote"},
		{":0", ListenOptions{}, "allow_remote"},
		{"[::]:0", ListenOptions{}, "allow_remote"},
		{"192.0.2.1:0", ListenOptions{}, "allow_remote"},
		{"127.0.0.1", ListenOptions{}, "missing port"},
		{"127.0.0.1:x", ListenOptions{}, "port"},
	} {
		ln, err := Listen(test.spec, test.options)
		if err == nil {
			ln.Close()
			t.Errorf("%s: no error", test.spec)
			continue
		}
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.spec, err)
		}
		if errors.Is(err, ErrRemoteListen) != (test.want == "allow_remote") {
			t.Errorf("%s: wraps the wrong thing: %v", test.spec, err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "s")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a socket was left: %v", err)
	}
}

func TestTCPNetwork(t *testing.T) {
	for _, test := range []struct{ spec, network string }{
		{"0.0.0.0:8448", "tcp4"},
		{"127.0.0.1:8448", "tcp4"},
		{"[::ffff:0.0.0.0]:8448", "tcp4"},
		{"[::]:8448", "tcp6"},
		{"[::1]:8448", "tcp6"},
		{"[2001:db8::1]:8448", "tcp6"},
		{"[fe80::1%1]:8448", "tcp6"},
		{":8448", "tcp"},
	} {
		addr, err := net.ResolveTCPAddr("tcp", test.spec) // literals all of them
		if err != nil {
			t.Fatal(err)
		}
		if got := tcpNetwork(addr.IP); got != test.network {
			t.Errorf("%s: %s, want %s", test.spec, got, test.network)
		}
	}
}

// Both wildcards go together on one port, and each serves its own family.
func TestListenBothFamilies(t *testing.T) {
	remote := ListenOptions{AllowRemote: true}
	v4, err := Listen("0.0.0.0:0", remote)
	if err != nil {
		t.Fatal(err)
	}
	defer v4.Close()
	port := strconv.Itoa(v4.Addr().(*net.TCPAddr).Port)
	reach := func(host string) bool {
		c, err := net.Dial("tcp", net.JoinHostPort(host, port))
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	if !reach("127.0.0.1") {
		t.Error("0.0.0.0 is not reached over IPv4")
	}
	if probe, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skipf("this machine has no IPv6, only 0.0.0.0 was tested: %v", err)
	} else {
		probe.Close()
	}
	if reach("::1") {
		t.Error("0.0.0.0 is reached over IPv6")
	}
	v6, err := Listen("[::]:"+port, remote)
	if err != nil {
		t.Fatal(err)
	}
	if !reach("::1") {
		t.Error("[::] is not reached over IPv6")
	}
	v4.Close()
	if reach("127.0.0.1") {
		t.Error("[::] is reached over IPv4")
	}
	v6.Close()

	both, err := Listen(":"+port, remote)
	if err != nil {
		t.Fatal(err)
	}
	defer both.Close()
	if !reach("127.0.0.1") || !reach("::1") {
		t.Error("without a host it is not both families")
	}
}

func TestListenTCP(t *testing.T) {
	for _, test := range []struct {
		spec    string
		options ListenOptions
	}{
		{"127.0.0.1:0", ListenOptions{}},
		{"localhost:0", ListenOptions{}},
		{"127.9.9.9:0", ListenOptions{}},
		{"127.0.0.1:0", ListenOptions{AllowRemote: true}},
	} {
		ln, err := Listen(test.spec, test.options)
		if err != nil {
			t.Error(err)
			continue
		}
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		ln.Close()
	}
}

package node

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fsbus/netx"
	"fsbus/sched"
)

func TestAddressesThatAreTaken(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := &Config{Front: FrontConfig{Listen: []string{"unix:/x", "127.0.0.1:0"}}, Status: StatusConfig{Listen: ln.Addr().String()}}
	wrong, notes, err := c.AtStart("")
	want := fmt.Sprintf("status.listen: nothing can listen at %q: bind: address already in use (\"node.test\", process %d, listens there)", ln.Addr().String(), os.Getpid())
	if err != nil || len(notes) > 0 || len(wrong) != 1 || wrong[0] != want {
		t.Errorf("%q, %q, %v; want %q", wrong, notes, err, want)
	}
	ln.Close()
	if wrong, _, _ := c.AtStart(""); len(wrong) > 0 {
		t.Errorf("nobody has it: %q", wrong)
	}
	if _, _, err := c.AtStart("nobody has this name"); err == nil {
		t.Error("there is no such user")
	}
}

func TestFilesThatTheUserCannotRead(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} { // those above are everybody's
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	other := account{name: "other", uid: uint32(os.Getuid()) + 1, gids: []uint32{uint32(os.Getgid()) + 1}}
	member := account{name: "member", uid: other.uid, gids: []uint32{uint32(os.Getgid())}}
	own := account{name: "own", uid: uint32(os.Getuid())}
	for _, tt := range []struct {
		path string
		a    account
		want string
	}{
		{file("open", 0o644), other, ""},
		{file("closed", 0o640), other, "user other may not read it (mode 0640)"},
		{file("closed", 0o640), member, ""},
		{file("closed", 0o640), own, ""},
		{file("deep/open", 0o644), other, "user other may not enter"},
		{filepath.Join(dir, "none"), other, "no such file"},
	} {
		why := tt.a.lacks(tt.path, 4)
		if (tt.want == "") != (why == "") || !strings.Contains(why, tt.want) {
			t.Errorf("%s, %s: %q, want %q", tt.a.name, tt.path, why, tt.want)
		}
	}
	c := &Config{DataDir: filepath.Join(dir, "deep"), Edge: EdgeConfig{TLSPrivateKey: file("key", 0o600)}, Front: FrontConfig{SecretPath: credentials + "fsbus.service/secret"}}
	if wrong := c.unreadable(other); len(wrong) != 2 || !strings.HasPrefix(wrong[0], "edge.tls_private_key: ") || !strings.HasPrefix(wrong[1], "data_dir: ") || !strings.Contains(wrong[1], "may not write to it") {
		t.Errorf("%q", wrong)
	}
}

func TestACertificateOfAnotherName(t *testing.T) {
	i := netx.CertificateInfo{Names: []string{"matrix.example.org", "*.example.net", "192.0.2.1"}, NotAfter: time.Now().Add(time.Hour)}
	for _, tt := range []struct {
		server, wellKnown string
		ok                bool
	}{
		{"example.org", "", false}, {"example.org", "matrix.example.org:443", true}, {"matrix.example.org", "", true}, {"MATRIX.example.org", "", true},
		{"a.example.net", "", true}, {"a.b.example.net", "", false}, {"example.net", "", false}, {"192.0.2.1", "", true},
	} {
		e := &EdgeConfig{WellKnown: tt.wellKnown}
		if w := e.nameWarning(i, tt.server); (w == "") != tt.ok {
			t.Errorf("%+v: %q", tt, w)
		}
	}
}

func TestMemoryOfTheUnit(t *testing.T) {
	etc, lib := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	folders := []string{etc, lib}
	c := &Config{MemoryLimit: 100 * sched.MiB}
	if w := c.memoryWarning(folders); w != "" {
		t.Errorf("no unit: %q", w)
	}
	write(filepath.Join(lib, "fsbus.service"), "[Service]\n# MemoryHigh=1M\nMemoryHigh=96M\n")
	if w := c.memoryWarning(folders); !strings.Contains(w, "100MiB is more than MemoryHigh=96MiB in "+quote(filepath.Join(lib, "fsbus.service"))) {
		t.Errorf("%q", w)
	}
	drop := filepath.Join(etc, "fsbus.service.d", "more.conf")
	for text, high := range map[string]sched.Bytes{"1G": sched.GiB, "infinity": 0, "50%": 0, "": 0, "134217728": 128 * sched.MiB} {
		write(drop, "[Service]\nMemoryHigh="+text+"\n")
		if got, _ := memoryHigh(folders); got != high {
			t.Errorf("%q: %v, want %v", text, got, high)
		}
	}
}

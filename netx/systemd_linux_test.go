package netx

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSystemdChild is not a test: it is the process that TestSystemdListeners
// starts with sockets, as systemd would.
func TestSystemdChild(t *testing.T) {
	pid := os.Getenv("FSBUS_TEST_LISTEN_PID")
	if pid == "" {
		t.Skip("started by TestSystemdListeners only")
	}
	if pid == "self" { // it can only be known here
		pid = fmt.Sprint(os.Getpid())
	}
	os.Setenv("LISTEN_PID", pid)
	listeners, err := SystemdListeners()
	if err != nil {
		fmt.Println("error:", err)
	}
	for _, l := range listeners {
		fmt.Println("listener:", l.Name, l.Addr().Network(), l.Addr())
	}
	if again, err := SystemdListeners(); again != nil || err != nil {
		fmt.Println("again:", again, err)
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LISTEN_") {
			fmt.Println("environment:", v)
		}
	}
	for fd := firstPassedFD; fd < firstPassedFD+len(listeners); fd++ {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			fmt.Println("inherited by children:", fd)
		}
	}
	for _, l := range listeners {
		c, err := l.Accept()
		if err != nil {
			fmt.Println("accept:", err)
			continue
		}
		fmt.Fprintf(c, "HTTP/1.1 200 %s\r\nContent-Length: 0\r\n\r\n", l.Name)
		c.Close()
		l.Close()
	}
	fmt.Println("done")
}

// startChild runs TestSystemdChild with files as descriptors 3 and up, and
// returns what it prints.
func startChild(t *testing.T, files []*os.File, env ...string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestSystemdChild$", "-test.v")
	cmd.ExtraFiles = files
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var lines []string
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") && line != "PASS\n" && !strings.HasPrefix(line, "coverage:") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

func TestSystemdListeners(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	unixListener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer unixListener.Close()
	tcpListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcpListener.Close()
	unixFile, err := unixListener.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer unixFile.Close()
	tcpFile, err := tcpListener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer tcpFile.Close()
	datagram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path + "-dgram", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()
	datagramFile, err := datagram.File()
	if err != nil {
		t.Fatal(err)
	}
	defer datagramFile.Close()

	// The backlog holds the clients until the child accepts them.
	clients := make([]net.Conn, 2)
	for i, l := range []net.Listener{unixListener, tcpListener} {
		if clients[i], err = net.Dial(l.Addr().Network(), l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer clients[i].Close()
	}
	out := startChild(t, []*os.File{unixFile, tcpFile}, "FSBUS_TEST_LISTEN_PID=self", "LISTEN_FDS=2", "LISTEN_FDNAMES=front:edge")
	want := fmt.Sprintf("listener: front unix %s\nlistener: edge tcp %s\ndone\n", path, tcpListener.Addr())
	if out != want {
		t.Errorf("the child says\n%s", out)
	}
	for i, name := range []string{"front", "edge"} {
		if res, err := http.ReadResponse(bufio.NewReader(clients[i]), nil); err != nil || res.Status != "200 "+name {
			t.Errorf("%v, %v", res, err)
		}
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the child has removed the socket: %v", err)
	}

	two := []*os.File{unixFile, datagramFile}
	for _, test := range []struct {
		name, want string
		files      []*os.File
		env        []string
	}{
		{"for another process", "done\n", two, []string{"FSBUS_TEST_LISTEN_PID=1", "LISTEN_FDS=2"}},
		{"none", "done\n", nil, []string{"FSBUS_TEST_LISTEN_PID=self", "LISTEN_FDS=0"}},
		{"no count", "error: systemd: LISTEN_FDS is \"\", not 0 to 256\ndone\n", nil, []string{"FSBUS_TEST_LISTEN_PID=self"}},
		{"too many", "error: systemd: LISTEN_FDS is \"257\", not 0 to 256\ndone\n", nil, []string{"FSBUS_TEST_LISTEN_PID=self", "LISTEN_FDS=257"}},
		{"too few names", "error: systemd: LISTEN_FDNAMES has 1 names for 2 sockets\ndone\n", two, []string{"FSBUS_TEST_LISTEN_PID=self", "LISTEN_FDS=2", "LISTEN_FDNAMES=x"}},
		{"a datagram socket", "error: systemd: socket 4 (unknown): a socket of type 2, not a stream\ndone\n", two, []string{"FSBUS_TEST_LISTEN_PID=self", "LISTEN_FDS=2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if out := startChild(t, test.files, test.env...); out != test.want {
				t.Errorf("the child says\n%s", out)
			}
		})
	}
}

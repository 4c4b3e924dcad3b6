package netx

import (
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// setBacklog changes how many connections wait in a listener's backlog.
func setBacklog(t testing.TB, ln *net.UnixListener, n int) {
	t.Helper()
	raw := must(ln.SyscallConn())
	if err := raw.Control(func(fd uintptr) {
		if err := unix.Listen(int(fd), n); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
}

// A full backlog is not a homeserver that is down.
func TestUpstreamFullBacklog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln := must(net.Listen("unix", path)).(*net.UnixListener)
	t.Cleanup(func() { ln.Close() })
	setBacklog(t, ln, 0)
	var filled []net.Conn
	for { // until it is full
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		filled = append(filled, c)
		if len(filled) > 100 {
			t.Fatal("the backlog does not fill")
		}
	}
	u := newTestUpstream(t, "unix:"+path, func(c *UpstreamConfig) { c.ConnectTimeout = 20 * time.Millisecond })
	_, err := u.Do(testContext(t), putRequest("/x", "{}"))
	if e, ok := errors.AsType[*Error](err); !ok || !e.Unsent || errors.Is(err, ErrUpstreamDown) {
		t.Errorf("%v", err)
	}
	u.cfg.ConnectTimeout = testWait
	server := &http.Server{Handler: http.HandlerFunc(ok)}
	t.Cleanup(func() { server.Close() })
	before := u.Stats().Dials
	done := make(chan error, 1)
	go func() {
		res, err := u.Do(testContext(t), putRequest("/x", "{}"))
		if err == nil {
			drain(t, res)
		}
		done <- err
	}()
	eventually(t, "it tries", func() bool { return u.Stats().Dials > before })
	for _, c := range filled {
		c.Close()
	}
	go server.Serve(ln)
	if err := receiveFrom(t, done, "an answer"); err != nil {
		t.Error(err)
	}
}

package netx

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestNotifier(t *testing.T) {
	for _, socket := range []string{filepath.Join(t.TempDir(), "notify"), fmt.Sprintf("@fsbus-test-%d", os.Getpid())} {
		manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer manager.Close()
		manager.SetReadDeadline(time.Now().Add(testWait))
		t.Setenv("NOTIFY_SOCKET", socket)
		t.Setenv("WATCHDOG_USEC", "3000000")
		t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
		n, err := NewNotifier()
		if err != nil {
			t.Fatal(err)
		}
		if n.WatchdogInterval() != 3*time.Second {
			t.Errorf("watchdog %v", n.WatchdogInterval())
		}
		for _, v := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
			if s, ok := os.LookupEnv(v); ok {
				t.Errorf("%s is still %q", v, s)
			}
		}
		before, err := monotonicUsec()
		if err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			send func() error
			want string
		}{
			{n.Ready, "READY=1"},
			{n.Stopping, "STOPPING=1"},
			{n.Watchdog, "WATCHDOG=1"},
			{func() error { return n.Status("a\nREADY=1\rb") }, "STATUS=a READY=1 b"},
			{func() error { return n.Status(strings.Repeat("é", 1000)) }, "STATUS=" + strings.Repeat("é", 512)},
			{func() error { return n.Status("x" + strings.Repeat("é", 1000)) }, "STATUS=x" + strings.Repeat("é", 511)},
			{n.Reloading, ""},
		} {
			if err := test.send(); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 4096)
			k, err := manager.Read(p)
			if err != nil {
				t.Fatal(err)
			}
			got := string(p[:k])
			if test.want != "" {
				if got != test.want {
					t.Errorf("got %q, want %q", got, test.want)
				}
				continue
			}
			var at int64
			after, _ := monotonicUsec()
			if _, err := fmt.Sscanf(got, "RELOADING=1\nMONOTONIC_USEC=%d", &at); err != nil || at < before || at > after {
				t.Errorf("got %q at %d to %d: %v", got, before, after, err)
			}
		}
	}
}

func TestNotifierDoesNothingWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "3000000")
	fromEnv, err := NewNotifier()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*Notifier{fromEnv, {}} {
		for _, send := range []func() error{n.Ready, n.Reloading, n.Stopping, n.Watchdog, func() error { return n.Status("x") }} {
			if err := send(); err != nil {
				t.Error(err)
			}
		}
		if n.WatchdogInterval() != 0 {
			t.Errorf("watchdog %v", n.WatchdogInterval())
		}
	}
}

func TestNotifierErrors(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "vsock:2:1234")
	if _, err := NewNotifier(); err == nil || !strings.Contains(err.Error(), "vsock") {
		t.Error(err)
	}
	for _, usec := range []string{"x", "0", "-1", "9223372036854775807"} {
		t.Setenv("NOTIFY_SOCKET", "/none")
		t.Setenv("WATCHDOG_USEC", usec)
		t.Setenv("WATCHDOG_PID", "")
		if _, err := NewNotifier(); err == nil || !strings.Contains(err.Error(), "WATCHDOG_USEC") {
			t.Errorf("%s: %v", usec, err)
		}
	}
	t.Setenv("NOTIFY_SOCKET", "/none")
	t.Setenv("WATCHDOG_USEC", "3000000")
	t.Setenv("WATCHDOG_PID", "1") // another process's
	n, err := NewNotifier()
	if err != nil || n.WatchdogInterval() != 0 {
		t.Errorf("%v, %v", n.WatchdogInterval(), err)
	}
	if err := n.Ready(); err == nil {
		t.Error("nobody is there, but no error")
	}
}

package netx

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	notifyTimeout   = time.Second // a manager that does not read must not stop us
	maxNotifyStatus = 1 << 10     // bytes of STATUS=
)

// A Notifier tells systemd what the process is doing (sd_notify(3)). The zero
// value, and one from an environment without NOTIFY_SOCKET, does nothing
// successfully. Its methods may be called concurrently.
type Notifier struct {
	addr     net.UnixAddr
	watchdog time.Duration
}

// NewNotifier reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, and unsets
// them, so that a child does not speak in our name. NOTIFY_SOCKET is a path, or
// the name of an abstract socket behind "@".
func NewNotifier() (*Notifier, error) {
	socket, usec, pid := os.Getenv("NOTIFY_SOCKET"), os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID")
	for _, v := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(v)
	}
	n := &Notifier{}
	if socket == "" {
		return n, nil
	}
	if socket[0] != '/' && socket[0] != '@' {
		return nil, fmt.Errorf("systemd: NOTIFY_SOCKET is %q, neither a path nor an abstract socket", socket)
	}
	n.addr = net.UnixAddr{Name: socket, Net: "unixgram"}
	if usec != "" && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		us, err := strconv.ParseInt(usec, 10, 64)
		if err != nil || us <= 0 || us > int64(time.Duration(1<<63-1)/time.Microsecond) {
			return nil, fmt.Errorf("systemd: WATCHDOG_USEC is %q, not a number of microseconds", usec)
		}
		n.watchdog = time.Duration(us) * time.Microsecond
	}
	return n, nil
}

// Ready says that start-up, or a reload, is complete.
func (n *Notifier) Ready() error { return n.send("READY=1") }

// Reloading says that the configuration is being read again; Ready ends it
// (Type=notify-reload in systemd.service(5)).
func (n *Notifier) Reloading() error {
	if n.addr.Name == "" {
		return nil
	}
	us, err := monotonicUsec()
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	return n.send("RELOADING=1\nMONOTONIC_USEC=" + strconv.FormatInt(us, 10))
}

// Stopping says that the process is about to end.
func (n *Notifier) Stopping() error { return n.send("STOPPING=1") }

// Status sets the line that systemctl status shows. Line breaks become spaces,
// since systemd would take what follows for another message; what is beyond
// 1 KiB is cut.
func (n *Notifier) Status(text string) error {
	text = strings.NewReplacer("\n", " ", "\r", " ").Replace(text)
	if len(text) > maxNotifyStatus {
		text = strings.ToValidUTF8(text[:maxNotifyStatus], "")
	}
	return n.send("STATUS=" + text)
}

// Watchdog says that the process is alive.
func (n *Notifier) Watchdog() error { return n.send("WATCHDOG=1") }

// WatchdogInterval returns the time within which Watchdog must be called, or 0
// when the watchdog is off. Half of it is a good interval (sd_notify(3)).
func (n *Notifier) WatchdogInterval() time.Duration { return n.watchdog }

// send opens a socket for each message: they are rare, and an idle process
// need not keep one.
func (n *Notifier) send(state string) error {
	if n.addr.Name == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &n.addr)
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	defer c.Close()
	if err := c.SetWriteDeadline(time.Now().Add(notifyTimeout)); err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	if _, err := c.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	return nil
}

package node

import (
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"fsbus/netx"
)

// listenAt opens a socket as systemd would.
func listenAt(t *testing.T, network, address string) net.Listener {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// A socket from systemd is used for what it is named after, and for nothing else.
func TestListenersFromSystemd(t *testing.T) {
	socket := listenAt(t, "tcp", "127.0.0.1:0")
	for _, tt := range []struct {
		names, want string // of each, in order; or what the error has
		edge        bool
	}{
		{"", "", true},
		{"front", "front", false},
		{"unknown", "front", false},
		{"front unknown front", "front front front", false},
		{"status front", "front status", false},
		{"edge front edge status", "front status edge edge", true},
		{"front edge", `a socket named "edge" (127.0.0.1:`, false},
		{"status status", `two sockets named "status"`, false},
		{"fsbus.socket", "front", true},
		{"fsbus", `a socket named "fsbus" (127.0.0.1:`, true},
		{"front admin", `write FileDescriptorName=front, edge or status`, true},
	} {
		c := DefaultConfig()
		if tt.edge {
			c.Edge.Listen = []string{"127.0.0.1:8449"}
		}
		var sockets []netx.NamedListener
		for _, name := range strings.Fields(tt.names) {
			sockets = append(sockets, netx.NamedListener{Name: name, Listener: socket})
		}
		l, err := c.passed(sockets)
		var got []string
		got = append(got, slices.Repeat([]string{"front"}, len(l.front))...)
		if l.status != nil {
			got = append(got, "status")
		}
		got = append(got, slices.Repeat([]string{"edge"}, len(l.edge))...)
		switch {
		case err != nil && !strings.Contains(err.Error(), tt.want) || err != nil && tt.want == "":
			t.Errorf("%q: %v, want %q", tt.names, err, tt.want)
		case err == nil && strings.Join(got, " ") != tt.want:
			t.Errorf("%q: %q, want %q", tt.names, got, tt.want)
		}
	}
}

func TestListenersElsewhere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	unix, tcp := listenAt(t, "unix", path), listenAt(t, "tcp", "127.0.0.1:0")
	at := tcp.Addr().String()
	_, port, err := net.SplitHostPort(at)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		specs  []string
		passed []net.Listener
		want   []string
	}{
		{[]string{"unix:" + path}, []net.Listener{unix}, nil},
		{[]string{"unix:" + path, "localhost:" + port}, []net.Listener{tcp, unix}, nil},
		{[]string{"unix:/run/other.sock"}, nil, nil}, // it is opened
		{[]string{"unix:/run/other.sock"}, []net.Listener{unix}, []string{`front.listen names "unix:/run/other.sock", but systemd passes unix:` + path + `, which is used: set front.listen to that`}},
		{[]string{"127.0.0.1:1", at}, []net.Listener{tcp}, []string{`front.listen names "127.0.0.1:1", but systemd passes ` + at + `, which is used: set front.listen to that`}},
	} {
		if got := elsewhere("front.listen", tt.specs, tt.passed...); !slices.Equal(got, tt.want) {
			t.Errorf("%q: %q, want %q", tt.specs, got, tt.want)
		}
	}
}

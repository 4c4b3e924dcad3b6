package node

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// Neither a status listener nor an edge that cannot start, nor a key that cannot be read,
// takes what goes out down.
func TestWhatGoesOutDoesWithoutTheOtherListeners(t *testing.T) {
	w := federation(t, sim.Config{Servers: 2})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	r := newRunning(t, w, config{edge: fmt.Sprintf("listen = [%q]\nupstream = \"unix:hs.sock\"\ntls_certificate = \"cert.pem\"\ntls_private_key = \"key.pem\"\n", taken.Addr())})
	certFiles(t, r.dir, "us.test")
	key := filepath.Join(r.dir, "key.pem")
	if err := os.WriteFile(key, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start(hooks{})
	if got := r.Do(t.Context(), fedload.Lookup(w.Names()[0], "alice")); got.Status != 200 {
		t.Fatalf("a request to another server: %d, %v", got.Status, got.Err)
	}
	code, body := r.get("/health")
	want := fmt.Sprintf("edge %s cannot be reached: listen on %q: listen tcp4 %s: bind: address already in use (\"node.test\", process %d, listens there)", taken.Addr(), taken.Addr().String(), taken.Addr(), os.Getpid())
	if code != 503 || !strings.HasPrefix(body, want+"\n") {
		t.Errorf("/health: %d %q, want %q", code, body, want)
	}
	if log := r.log.String(); !strings.Contains(log, "fsbus does without a listener") || !strings.Contains(log, "there is no TLS certificate that can be used") {
		t.Errorf("the log lacks it:\n%s", log)
	}
	taken.Close()
	r.until("the edge listens", func() bool {
		c, err := net.Dial("tcp", taken.Addr().String())
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	r.until("/health to name the key", func() bool {
		_, body := r.get("/health")
		return strings.HasPrefix(body, "the edge has no certificate, so no server can connect: TLS private key: "+key)
	})
	certFiles(t, r.dir, "us.test")
	r.hup <- os.Interrupt // any signal there has it reload
	r.until("all to be well", func() bool { code, _ := r.get("/health"); return code == 200 })
}

func TestAListenerThatFailsIsOpenedAgain(t *testing.T) {
	n := &Node{log: slog.New(slog.DiscardHandler)}
	opened := 0
	p := &part{name: "status x", open: func() (net.Listener, error) {
		if opened++; opened == 1 {
			return nil, os.ErrPermission
		}
		return net.Listen("tcp", "127.0.0.1:0")
	}}
	n.addPart(p)
	if why := n.parts.reason(); why != "status x cannot be reached: permission denied" {
		t.Errorf("%q", why)
	}
	served := make(chan net.Listener, 2)
	fail := make(chan error)
	p.serve = func(ln net.Listener) error { served <- ln; return <-fail }
	failed := make(chan ended)
	if !n.retryParts(t.Context(), failed) {
		t.Errorf("%q", n.parts.reason())
	}
	(<-served).Close()
	fail <- os.ErrClosed
	e := <-failed
	n.missing(e.part, e.err)
	if why := n.parts.reason(); !strings.Contains(why, os.ErrClosed.Error()) {
		t.Errorf("%q", why)
	}
	if !n.retryParts(t.Context(), failed) || opened != 3 {
		t.Errorf("%q, opened %d times", n.parts.reason(), opened)
	}
	(<-served).Close()
	close(fail)
	<-failed
}

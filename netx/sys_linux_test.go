package netx

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// connPair returns both ends of a connection.
func connPair(t *testing.T, network string) (a, b net.Conn) {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		addr = filepath.Join(t.TempDir(), "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial(network, ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return a, b
}

func TestSendFile(t *testing.T) {
	want := pattern(100_000)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			a, b := connPair(t, network)
			n, err := sendFile(a, f, 1000, 5000)
			if n <= 0 || n > 5000 || err != nil {
				t.Fatal(n, err)
			}
			got := make([]byte, n)
			if _, err := io.ReadFull(b, got); err != nil || !bytes.Equal(got, want[1000:1000+n]) {
				t.Errorf("other bytes arrive: %v", err)
			}
			if at, err := f.Seek(0, io.SeekCurrent); at != 0 || err != nil {
				t.Errorf("the file's position is %d, %v", at, err)
			}
			if n, err := sendFile(a, f, 100_000, 1); n != 0 || err != io.ErrUnexpectedEOF {
				t.Errorf("behind the end: %d, %v", n, err)
			}
			a.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			for err = nil; err == nil; {
				_, err = sendFile(a, f, 0, 100_000) // until the socket's buffer is full
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("full: %v", err)
			}
			a.Close()
			if n, err := sendFile(a, f, 0, 1); n != 0 || !errors.Is(err, net.ErrClosed) {
				t.Errorf("closed: %d, %v", n, err)
			}
		})
	}
	if n, err := sendFile(&scriptedConn{}, f, 0, 1); n != 0 || err != errors.ErrUnsupported {
		t.Errorf("not a socket: %d, %v", n, err)
	}
}

func TestPeerGone(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			a, b := connPair(t, network)
			if peerGone(a) {
				t.Error("gone before it went")
			}
			if _, err := b.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if peerGone(a) {
				t.Error("gone because it wrote")
			}
			b.Close()
			eventually(t, "the end arrives", func() bool { return peerGone(a) })
			a.Close()
			if peerGone(a) {
				t.Error("our own closing is taken for the peer's")
			}
		})
	}
	if peerGone(&scriptedConn{}) {
		t.Error("gone, though nobody can know")
	}
}

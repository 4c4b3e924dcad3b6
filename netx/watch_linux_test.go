package netx

import (
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func (ft *frontTest) nextGone() *Inbound {
	ft.t.Helper()
	select {
	case in := <-ft.gone:
		return in
	case <-time.After(testWait):
		ft.t.Fatal("nobody is gone")
		return nil
	}
}

func TestWatcherNoticesClientsThatGo(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		for name, leave := range map[string]func(net.Conn){
			"close": func(c net.Conn) { c.Close() },
			"half-close": func(c net.Conn) {
				c.(interface{ CloseWrite() error }).CloseWrite()
			},
			"close behind unread bytes": func(c net.Conn) {
				c.Write([]byte("GET "))
				c.Close()
			},
			"reset": func(c net.Conn) {
				if c, ok := c.(*net.TCPConn); ok {
					c.SetLinger(0)
				}
				c.Close()
			},
		} {
			t.Run(network+"/"+name, func(t *testing.T) {
				ft := newFrontTest(t, nil)
				dial := ft.serve(network)
				stays, goes := dial(), dial()
				write(t, stays, request("GET", "/stays", "", ""))
				in := ft.next()
				write(t, goes, request("PUT", "/goes", "Content-Length: 5\r\n", "hello"))
				leaver := ft.next()
				leave(goes)
				if gone := ft.nextGone(); gone != leaver {
					t.Fatalf("request %d is gone instead of %d", gone.ID, leaver.ID)
				}
				if s := ft.Stats(); s.Gone != 1 || s.Parked != 1 {
					t.Errorf("%+v", s)
				}
				if err := leaver.Reply(200, nil, nil); err != ErrClientGone {
					t.Errorf("Reply: %v", err)
				}
				if err := leaver.Abort(); err != ErrClientGone {
					t.Errorf("Abort: %v", err)
				}
				leaver.Release()
				if err := in.Reply(200, nil, nil); err != nil {
					t.Errorf("the other one: %v", err)
				}
			})
		}
	}
}

// Whoever comes first, the client that leaves or the answer: exactly one of
// them takes effect.
func TestWatcherAgainstAnswers(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) { c.SweepInterval = 50 * time.Microsecond })
	dial := ft.serve("unix")
	const rounds = 300
	answered := make([]error, rounds+1)
	for i := 1; i <= rounds; i++ {
		c := dial()
		write(t, c, request("GET", "/x", "", ""))
		in := ft.next()
		var wg sync.WaitGroup
		wg.Go(func() { c.Close() })
		wg.Go(func() {
			for range i % 50 {
				runtime.Gosched() // spreads the answers around the moment of the sweep
			}
			answered[i] = in.Reply(200, nil, nil)
		})
		wg.Wait()
	}
	eventually(t, "nothing is parked", func() bool { return ft.Stats().Parked == 0 })
	ft.Close()
	eventually(t, "all closed", func() bool { return ft.Stats().Open == 0 })
	gone := map[uint64]bool{}
	for range ft.Stats().Gone {
		in := ft.nextGone()
		if gone[in.ID] {
			t.Errorf("%d is gone twice", in.ID)
		}
		gone[in.ID] = true
	}
	for id := uint64(1); id <= rounds; id++ {
		if lost := answered[id] == ErrClientGone; lost != gone[id] {
			t.Errorf("request %d: gone %v, Reply says %v", id, gone[id], answered[id])
		}
	}
}

func TestWatcherStopsWhenNothingIsParked(t *testing.T) {
	ft := newFrontTest(t, nil)
	dial := ft.serve("unix")
	for range 3 {
		c := dial()
		write(t, c, request("GET", "/x", "", ""))
		in := ft.next()
		eventually(t, "the watcher runs", func() bool { return ft.isSweeping() })
		in.Reply(200, nil, nil)
		eventually(t, "the watcher stops", func() bool { return !ft.isSweeping() })
	}
}

func (f *Front) isSweeping() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sweeping
}

// A storm: 4,000 requests wait at the same time. The process has 64 MiB for
// everything, so they may cost 6 KiB of heap each at most (measured: 1.6 KiB
// with a body of 186 bytes), and no goroutine.
func TestParkedRequestsAreCheap(t *testing.T) {
	const maxBytes = 6 << 10
	clients := 4000
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	if lim.Cur < 2*4000+200 {
		clients = 1000
	}
	if lim.Cur < 2*1000+200 {
		t.Skipf("only %d file descriptors", lim.Cur)
	}
	ft := newFrontTest(t, nil)
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ft.serveListener(ln)

	raw := []byte(synapseRequests(t)[8]) // PUT /send with a presence EDU
	// The client ends are bare descriptors, so that what is measured is ours.
	fds := make([]int, 0, clients)
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	connect := func() {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Write(fd, raw); n != len(raw) || err != nil {
			t.Fatal(n, err)
		}
	}
	parked := make([]*Inbound, 0, clients)
	connect() // the first one makes what is made once
	parked = append(parked, ft.next())
	settled := func() bool { return ft.Stats().Reading == 0 }
	eventually(t, "the first one is parked", settled)

	goroutines, heap := runtime.NumGoroutine(), liveHeap()
	for len(fds) < clients {
		connect()
	}
	for len(parked) < clients {
		parked = append(parked, ft.next())
	}
	eventually(t, "all are parked", settled)
	if n := runtime.NumGoroutine(); n > goroutines+1 { // the watcher
		t.Errorf("%d goroutines more than before: the %d parked requests have none", n-goroutines, clients)
	}
	each := (liveHeap() - heap) / int64(clients-1)
	if each > maxBytes {
		t.Errorf("a parked request costs %d bytes of heap, more than %d", each, maxBytes)
	}
	t.Logf("%d parked: %d bytes of heap each, %+v", clients, each, ft.Stats())
	if s := ft.Stats(); s.Parked != clients || s.MaxReading > defaultMaxReading {
		t.Errorf("%+v", s)
	}

	for _, in := range parked {
		if err := in.Reply(200, nil, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		in.Release()
	}
	answer := make([]byte, 4096)
	for _, fd := range fds {
		if n, err := unix.Read(fd, answer); err != nil || n < 20 || string(answer[:15]) != "HTTP/1.1 200 OK" {
			t.Fatalf("%q, %v", answer[:max(n, 0)], err)
		}
	}
}

func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC() // twice, since the first one only empties the pools into their victims
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkSweep(b *testing.B) {
	ft := newFrontTest(b, nil)
	c := ft.serve("unix")()
	write(b, c, request("GET", "/x", "", ""))
	in := ft.next()
	for b.Loop() {
		if peerGone(in.conn) {
			b.Fatal("gone")
		}
	}
	in.Abort()
}

package sim

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// listen opens the server's socket. From then on the kernel takes connections;
// accept takes them from there.
func (s *server) listen() error {
	config := net.ListenConfig{KeepAlive: -1}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp4", string(s.name))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener = l
	return nil
}

// mute closes the server's socket and all connections to it.
func (s *server) mute() {
	s.mu.Lock()
	l := s.listener
	s.listener = nil
	s.mu.Unlock()
	if l != nil {
		l.Close()
	}
	s.hangUp()
}

// hangUp closes all connections to the server.
func (s *server) hangUp() {
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.Close() // takes mu
	}
}

// accept hands the connections of l to the world's HTTP server until l is
// closed. A Hanging server's stay here.
func (s *server) accept(l net.Listener) {
	w := s.world
	for {
		raw, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Most likely there is no file descriptor left; the connection
			// waits in the kernel until there is one.
			w.recorder.acceptFailed()
			time.Sleep(10 * time.Millisecond)
			continue
		}
		c, kind, ok := s.admit(raw, l)
		switch {
		case !ok:
			raw.Close()
		case kind == Hanging:
			w.running.Go(func() {
				io.Copy(io.Discard, c) // until the client or SetKind closes it
				c.Close()
			})
		default:
			w.queue.put(c)
		}
	}
}

// admit enters a connection that came over l into the books. It reports false
// when the server has closed l meanwhile.
func (s *server) admit(raw net.Conn, l net.Listener) (*conn, Kind, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != l {
		return nil, 0, false
	}
	c := &conn{Conn: raw, server: s}
	if s.conns == nil {
		s.conns = make(map[*conn]struct{})
	}
	s.conns[c] = struct{}{}
	s.world.recorder.opened(s, 1)
	return c, s.kindNow(), true
}

// conn is a connection to a server, counted.
type conn struct {
	net.Conn
	server *server
	once   sync.Once // of Close
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.server.world.recorder.bytesIn.Add(int64(n))
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.server.world.recorder.bytesOut.Add(int64(n))
	return n, err
}

func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		s := c.server
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		s.world.recorder.opened(s, -1)
		err = c.Conn.Close()
	})
	return err
}

// queue brings the connections of many sockets to the one http.Server. It is a
// net.Listener.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once // of Close
}

func newQueue() *queue {
	return &queue{conns: make(chan net.Conn), done: make(chan struct{})}
}

// put passes c on, or closes it when the queue is closed.
func (q *queue) put(c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.Close()
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr returns the zero address: there are as many as there are servers.
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }

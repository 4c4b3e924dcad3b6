package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
	"fsbus/store"
)

const (
	// adminConns is how many connections of admins there are at a time; further
	// ones wait in the accept backlog.
	adminConns = 4
	// adminPatience is how long a request waits for the one before it, for the
	// loop and for the writer of the store.
	adminPatience = 10 * time.Second
	// adminReading is how long the database is read for one request. A reader
	// never holds up the writer, but it takes the processor and the disk.
	adminReading = 20 * time.Second
	// adminWriting is how long an admin may take to read an answer.
	adminWriting = 30 * time.Second
	// adminSocketMode lets the owner alone connect: there is no password, and
	// what is queued can be deleted.
	adminSocketMode = 0o600
)

// adminServer serves the commands that show and change the queue. It works on
// one request at a time, from the first look to the last byte of the answer, so
// that what an answer is made of is in memory once.
type adminServer struct {
	core    outboxCore
	store   *store.Store
	now     func() sched.Time
	log     *slog.Logger
	dropped dropFolder
	turn    chan struct{} // holds one element while a request is worked on
	http    *http.Server
}

func newAdminServer(core outboxCore, st *store.Store, dataDir string, now func() sched.Time, log *slog.Logger) *adminServer {
	a := &adminServer{
		core: core, store: st, now: now, log: log, turn: make(chan struct{}, 1),
		dropped: dropFolder{path: filepath.Join(dataDir, "dropped"), max: maxDropped, create: createFile},
	}
	mux := http.NewServeMux()
	for pattern, f := range map[string]func(context.Context, url.Values) (reply, error){
		"GET /queue":          a.list,
		"GET /queue/show":     a.show,
		"POST /queue/flush":   a.flush,
		"POST /queue/hold":    a.hold(true),
		"POST /queue/release": a.hold(false),
		"GET /queue/drop":     a.previewDrop,
		"POST /queue/drop":    a.drop,
		"GET /queue/aside":    a.aside,
		"POST /queue/forget":  a.forget,
		"POST /queue/retry":   a.retry,
	} {
		mux.HandleFunc(pattern, a.inTurn(f))
	}
	a.http = &http.Server{
		Handler: mux, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadTimeout: 5 * time.Second, IdleTimeout: 5 * time.Second, MaxHeaderBytes: 8 << 10,
		WriteTimeout: 2*adminPatience + adminReading + adminWriting,
	}
	return a
}

// reply writes an answer. An error means that the client has gone.
type reply func(io.Writer) error

// inTurn serves requests with f, one at a time.
func (a *adminServer) inTurn(f func(context.Context, url.Values) (reply, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), adminPatience)
		defer cancel()
		select {
		case a.turn <- struct{}{}:
			defer func() { <-a.turn }()
		case <-ctx.Done():
			http.Error(w, "another command is under way; try again", http.StatusServiceUnavailable)
			return
		}
		write, err := f(r.Context(), r.URL.Query())
		if err != nil {
			code := http.StatusInternalServerError
			if said, ok := errors.AsType[adminError](err); ok {
				code = said.code
			} else {
				a.log.Warn("an admin's command failed", "path", r.URL.Path, "error", err)
			}
			http.Error(w, err.Error(), code)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		if err := write(w); err != nil {
			a.log.Debug("an admin's answer was not written", "path", r.URL.Path, "error", err)
		}
	}
}

// adminError is an error that is the admin's own doing.
type adminError struct {
	code int
	text string
}

func (e adminError) Error() string { return e.text }

func badRequest(format string, args ...any) error {
	return adminError{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// destination reads the parameter of that name.
func destination(q url.Values) (matrix.ServerName, error) {
	name, err := matrix.ParseServerName(q.Get("destination"))
	if err != nil {
		return "", badRequest("%q is not a server's name: %v", q.Get("destination"), err)
	}
	return name, nil
}

func unknown(name matrix.ServerName) error {
	return adminError{http.StatusNotFound, fmt.Sprintf("nothing is known of %s: nothing waits for it, and fsbus has not talked to it lately", name)}
}

// patiently bounds ctx for the loop and the writer of the store.
func patiently(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, adminPatience)
}

// writeJSON is the reply that is small.
func writeJSON(v any) reply {
	return func(w io.Writer) error { return newEncoder(w).Encode(v) }
}

func newEncoder(w io.Writer) *json.Encoder {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc
}

// writeListed writes an answer that holds a list: the object head, and as its
// last field the n elements that at returns, one after the other.
func writeListed(w io.Writer, head any, field string, n int, at func(int) any) error {
	b, err := json.Marshal(head)
	if err != nil {
		return err
	}
	bw := bufio.NewWriter(w)
	bw.Write(b[:len(b)-1])
	fmt.Fprintf(bw, ",%q:[", field)
	enc := newEncoder(bw)
	for i := range n {
		if i > 0 {
			bw.WriteByte(',')
		}
		if err := enc.Encode(at(i)); err != nil {
			return err
		}
	}
	bw.WriteString("]}\n")
	return bw.Flush()
}

// listenAdmin opens the admin's socket; nil if there is to be none.
func listenAdmin(cfg *Config) (net.Listener, error) {
	path := cfg.adminSocket()
	if path == "" {
		return nil, nil
	}
	// From the start nobody else may connect, not only once the mode is set. What
	// other goroutines create meanwhile is their own as well.
	defer unix.Umask(unix.Umask(0o177))
	ln, err := netx.Listen("unix:"+path, netx.ListenOptions{Mode: adminSocketMode})
	if err != nil {
		return nil, fmt.Errorf("status.admin: %w", err)
	}
	return &fewConns{Listener: ln, free: make(chan struct{}, adminConns)}, nil
}

// startAdmin serves on ln, if there is one, until the server that it returns is
// closed.
func (n *Node) startAdmin(ctx context.Context, ln net.Listener, failed chan<- error) *adminServer {
	if ln == nil {
		return nil
	}
	a := newAdminServer(nodeCore{n}, n.store, n.cfg.Load().DataDir, n.clock.Now, n.log)
	serve(ctx, func(context.Context) {
		if err := a.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("admin %s: %w", ln.Addr(), err)
		}
	})
	return a
}

// close ends the server and its connections.
func (a *adminServer) close() {
	if a != nil {
		a.http.Close()
	}
}

// fewConns is a listener with at most cap(free) connections open.
type fewConns struct {
	net.Listener
	free chan struct{} // holds one element for each open connection
}

func (l *fewConns) Accept() (net.Conn, error) {
	l.free <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &countedConn{Conn: c, ended: sync.OnceFunc(func() { <-l.free })}, nil
}

// countedConn tells when it is closed.
type countedConn struct {
	net.Conn
	ended func()
}

func (c *countedConn) Close() error {
	defer c.ended()
	return c.Conn.Close()
}

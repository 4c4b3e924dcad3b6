package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// reportTimeout is how long the status page waits for the loop, which answers
// within milliseconds unless something is badly wrong.
const reportTimeout = 5 * time.Second

// statusConns is how many connections of the status listener are open at a time. The
// oldest that waits for a request, or for the rest of one, makes room for a new one.
const statusConns = 6

// statusServer serves the status page. It is small on purpose and asks nobody
// who they are: it belongs on a loopback address. Nor does it change anything. A browser
// may be made to ask it by any site, so it answers only to names that nobody else can
// have, and lets no site look at an answer.
func (n *Node) statusServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", n.serveHealth)
	mux.HandleFunc("GET /status", n.reporting(func(w http.ResponseWriter, r *Report) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.Encode(r)
	}))
	mux.HandleFunc("GET /metrics", n.reporting(func(w http.ResponseWriter, r *Report) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		writeMetrics(w, r)
	}))
	mux.HandleFunc("GET /{$}", n.reporting(func(w http.ResponseWriter, r *Report) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		writePage(w, r)
	}))
	return &http.Server{
		Handler: n.guardStatus(mux), ConnState: crowdState, ErrorLog: slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 2 << 10,
	}
}

// guardStatus refuses a request to another name than the page has, and says of each
// answer that it is for nobody else.
func (n *Node) guardStatus(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		at, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		unix := at != nil && at.Network() == "unix" // which no browser connects to
		if name := statusHost(r.Host); !unix && !n.cfg.Load().Status.answersTo(name) {
			http.Error(w, fmt.Sprintf("fsbus: the status is not shown under the name %q: use localhost or an address, or add the name to status.hosts", name), http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// statusHost returns the name in a Host header, without its port.
func statusHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.TrimSuffix(strings.TrimSuffix(strings.TrimPrefix(strings.ToLower(host), "["), "]"), ".")
}

// answersTo reports whether the status is shown under a name: localhost and addresses,
// which no other site can have, the name where it listens, and those of Hosts. Without a
// Host it is no browser that asks.
func (c *StatusConfig) answersTo(name string) bool {
	if _, err := netip.ParseAddr(name); err == nil || name == "" || name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return true
	}
	if !strings.HasPrefix(c.Listen, "unix:") && name == statusHost(c.Listen) {
		return true
	}
	return slices.ContainsFunc(c.Hosts, func(h string) bool { return strings.EqualFold(strings.TrimSuffix(h, "."), name) })
}

// serveHealth answers 200 "ok", or 503 with what is wrong in one line, and in a second
// when the homeserver was last seen.
func (n *Node) serveHealth(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	health := n.health()
	ctx, cancel := context.WithTimeout(r.Context(), reportTimeout)
	defer cancel()
	if err := n.loop.Call(ctx, func() {}); err != nil {
		health = "the event loop does not answer"
	}
	if health != "ok" {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	front := n.front.Stats()
	fmt.Fprintf(w, "%s\n%s\n", health, homeserverReport(&front, time.Now()).Text)
}

func (n *Node) reporting(write func(http.ResponseWriter, *Report)) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		ctx, cancel := context.WithTimeout(req.Context(), reportTimeout)
		defer cancel()
		r, err := n.Report(ctx)
		if err != nil {
			http.Error(w, "the event loop does not answer", http.StatusServiceUnavailable)
			return
		}
		write(w, r)
	}
}

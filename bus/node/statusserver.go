package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"time"
)

// reportTimeout is how long the status page waits for the loop, which answers
// within milliseconds unless something is badly wrong.
const reportTimeout = 5 * time.Second

// statusServer serves the status page. It is small on purpose and asks nobody
// who they are: it belongs on a loopback address.
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
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		writePage(w, r)
	}))
	return &http.Server{
		Handler: mux, ErrorLog: slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10,
	}
}

// serveHealth answers 200 "ok", or 503 with what is wrong in one line, and in a second
// when the homeserver was last seen.
func (n *Node) serveHealth(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
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
		w.Header().Set("Cache-Control", "no-store")
		write(w, r)
	}
}

package node

import (
	"io"
	"log/slog"
)

// NewLogger returns a logger as the configuration wants it. level follows
// reloads.
func NewLogger(w io.Writer, cfg *Config, level *slog.LevelVar) *slog.Logger {
	level.Set(cfg.level())
	o := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

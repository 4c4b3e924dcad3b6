package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// screen is where the demo shows itself. On a terminal the progress is one line
// that changes; elsewhere it is a line a second.
type screen struct {
	mu       sync.Mutex
	out      *os.File
	terminal bool
	showing  bool // the last line on the terminal is progress
	last     time.Time
}

func newScreen(out *os.File) *screen {
	fi, err := out.Stat()
	return &screen{out: out, terminal: err == nil && fi.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"}
}

// print writes lines that stay.
func (s *screen) print(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	fmt.Fprintln(s.out, strings.TrimRight(fmt.Sprintf(format, args...), "\n"))
}

// progress shows a line of the moment, at most one a second.
func (s *screen) progress(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Samples come four a second; a little early is not worth another round.
	if time.Since(s.last) < 900*time.Millisecond {
		return
	}
	s.last = time.Now()
	s.clear()
	fmt.Fprintf(s.out, format, args...)
	s.showing = s.terminal
	if !s.terminal {
		fmt.Fprintln(s.out)
	}
}

// clear makes room where progress was shown.
func (s *screen) clear() {
	if s.showing {
		fmt.Fprint(s.out, "\r\x1b[K")
		s.showing = false
	}
}

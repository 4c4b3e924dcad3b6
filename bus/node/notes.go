package node

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// notes writes to the log what repeats with every faulty host, at a rate that
// an SD card and a reader can bear. What is left out is counted and said with
// the next line.
type notes struct {
	log   *slog.Logger
	mu    sync.Mutex
	kinds map[string]*note
}

type note struct {
	limit *rate.Limiter
	left  int64
}

// notesEach is how many lines of one kind may be written at once, and again
// each minute.
const notesEach = 10

func newNotes(log *slog.Logger) *notes {
	return &notes{log: log, kinds: make(map[string]*note)}
}

func (n *notes) write(level slog.Level, msg string, attrs ...slog.Attr) {
	if !n.log.Enabled(context.Background(), level) {
		return
	}
	n.mu.Lock()
	k := n.kinds[msg]
	if k == nil {
		k = &note{limit: rate.NewLimiter(rate.Every(time.Minute/notesEach), notesEach)}
		n.kinds[msg] = k
	}
	if !k.limit.Allow() {
		k.left++
		n.mu.Unlock()
		return
	}
	left := k.left
	k.left = 0
	n.mu.Unlock()
	if left > 0 {
		attrs = append(attrs, slog.Int64("not_logged", left))
	}
	n.log.LogAttrs(context.Background(), level, msg, attrs...)
}

// hosts tells of destinations that begin to fail and of those that are back,
// as their records change.
func (n *notes) hosts(records []bus.HostRecord) {
	for i := range records {
		switch r := &records[i]; {
		case r.Failures == 1:
			n.write(slog.LevelInfo, "destination fails", slog.String("destination", string(r.Name)), slog.String("why", r.Cause()))
		case r.Failures == 0 && r.LastTry != 0 && r.LastSuccess.Sub(r.LastTry) < time.Minute:
			n.write(slog.LevelInfo, "destination is back", slog.String("destination", string(r.Name)))
		}
	}
}

// ownKeys tells that what the homeserver says of its keys is not what others accept.
func (n *notes) ownKeys(err error) {
	n.write(slog.LevelWarn, "the homeserver's answer about its own keys is not valid; other servers will not take it", slog.Any("why", err))
}

// failed tells of an attempt that failed. The target's query may hold a
// token, so only the path is written.
func (n *notes) failed(a *attempt, f matrix.Failure, detail string) {
	level := slog.LevelDebug
	if f == matrix.FailLocal {
		level = slog.LevelWarn
	}
	path, _, _ := strings.Cut(a.in.Target, "?")
	n.write(level, "attempt failed", slog.String("destination", string(a.in.Destination)), slog.String("method", a.in.Method), slog.String("path", path), slog.String("failure", f.String()), slog.String("detail", detail))
}

// undelivered tells of a transaction that was not answered.
func (n *notes) undelivered(d *delivery, done bus.Done) {
	level := slog.LevelDebug
	if done.Failure == matrix.FailLocal {
		level = slog.LevelWarn
	}
	n.write(level, "delivery failed", slog.String("destination", string(d.dest)), slog.String("transaction", d.txn.id), slog.String("failure", done.Failure.String()), slog.String("detail", done.Detail))
}

// refused tells of a transaction that was answered, and not taken. A 401 is first of all
// about our key: the destination may not have been able to fetch it.
func (n *notes) refused(d *delivery, status int, done bus.Done) {
	attrs := []slog.Attr{slog.String("destination", string(d.dest)), slog.String("transaction", d.txn.id), slog.Int("status", status), slog.String("detail", done.Detail)}
	switch {
	case status == http.StatusOK:
	case status == http.StatusUnauthorized:
		n.write(slog.LevelWarn, "a destination does not accept our signature: it may not have our key yet, or cannot fetch it from us", attrs...)
	default:
		n.write(slog.LevelInfo, "a destination refuses a transaction", attrs...)
	}
}

// reply tells of an answer that the homeserver did not get whole.
func (n *notes) reply(in *netx.Inbound, err error) {
	path, _, _ := strings.Cut(in.Target, "?")
	n.write(slog.LevelWarn, "answer aborted", slog.String("destination", string(in.Destination)), slog.String("method", in.Method), slog.String("path", path), slog.Any("error", err))
}

// errand tells of something that the bus asked for itself and did not get.
func (n *notes) errand(e *errand, done bus.Done) {
	level := slog.LevelDebug
	if done.Failure == matrix.FailLocal {
		level = slog.LevelWarn
	}
	n.write(level, "fetching keys failed", slog.String("from", string(e.send.Dest)), slog.Int("keys", len(e.send.Notary)), slog.String("failure", done.Failure.String()), slog.String("detail", done.Detail))
}

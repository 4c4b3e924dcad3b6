package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"fsbus/bus/matrix"
	"fsbus/store"
)

const (
	// maxDropped is how many bytes of dropped items are kept in all: some times
	// what one destination may have waiting.
	maxDropped = 256 << 20
	// partial ends the name of a file that is still being written.
	partial = ".partial"
)

// dropWanted says what of a destination's queue is to be dropped.
type dropWanted struct {
	name    matrix.ServerName
	pdus    bool  // everything; otherwise EDUs only, but for those that are on their way
	through int64 // the last item
	nocopy  bool  // no copy is kept, for which a full disk has no room
}

// saveNothing goes through what would be saved.
func saveNothing(_ string, write func(io.Writer) error) (string, error) {
	return "", write(io.Discard)
}

func (a *adminServer) parseDrop(ctx context.Context, q url.Values) (dropWanted, error) {
	name, _, err := a.known(ctx, q)
	if err != nil {
		return dropWanted{}, err
	}
	w := dropWanted{name: name, through: math.MaxInt64, nocopy: q.Get("copy") == "no"}
	switch what := q.Get("what"); what {
	case "all":
		w.pdus = true
	case "edus":
	default:
		return w, badRequest(`what to drop is "edus" or "all", not %q`, what)
	}
	if s := q.Get("through"); s != "" {
		if w.through, err = strconv.ParseInt(s, 10, 64); err != nil || w.through < 1 {
			return w, badRequest("%q is not the id of an item", s)
		}
	}
	return w, nil
}

// load calls f for each item that is to be dropped.
func (d *dropWanted) load(ctx context.Context, s *store.Store, f func(*store.PendingItem) error) error {
	ctx, cancel := context.WithTimeout(ctx, adminReading)
	defer cancel()
	return s.LoadItems(ctx, d.name, func(it store.PendingItem) error {
		if it.ID > d.through || !d.pdus && (it.Kind == matrix.KindPDU || it.Frozen) {
			return nil
		}
		return f(&it)
	})
}

// dropPreview is the answer to GET /queue/drop.
type dropPreview struct {
	Destination string       `json:"destination"`
	Kinds       []kindReport `json:"kinds"`
	Items       int64        `json:"items"`
	Bytes       int64        `json:"bytes"`
	Through     int64        `json:"through"` // the last item of them
}

// previewDrop answers GET /queue/drop?destination=&what=: what a POST would drop.
func (a *adminServer) previewDrop(ctx context.Context, q url.Values) (reply, error) {
	w, err := a.parseDrop(ctx, q)
	if err != nil {
		return nil, err
	}
	var kinds store.KindTotals
	p := dropPreview{Destination: string(w.name)}
	err = w.load(ctx, a.store, func(it *store.PendingItem) error {
		kinds[it.Kind].Items++
		kinds[it.Kind].Bytes += it.Size
		p.Through = max(p.Through, it.ID)
		return nil
	})
	p.Items, p.Bytes = kinds.Sum().Items, kinds.Sum().Bytes
	p.Kinds = kindReports(kinds)
	return writeJSON(p), err
}

// dropResult is the answer to POST /queue/drop.
type dropResult struct {
	Destination string       `json:"destination"`
	Kinds       []kindReport `json:"kinds"` // of what was dropped
	Items       int64        `json:"items"`
	Bytes       int64        `json:"bytes"`
	Written     int64        `json:"written"`        // items in the file, some of which may have been delivered meanwhile
	File        string       `json:"file,omitempty"` // none if there was nothing
}

// droppedItem is a line of a file of dropped items.
type droppedItem struct {
	Destination string          `json:"destination"`
	ID          int64           `json:"id"`
	Kind        string          `json:"kind"`
	Accepted    time.Time       `json:"accepted"`
	Payload     json.RawMessage `json:"payload,omitempty"`
	Damaged     []byte          `json:"damaged_payload,omitempty"` // one that is no JSON
}

// drop answers POST /queue/drop?destination=&what=&through=. A copy of what goes
// is on disk before anything does.
func (a *adminServer) drop(ctx context.Context, q url.Values) (reply, error) {
	w, err := a.parseDrop(ctx, q)
	if err != nil {
		return nil, err
	}
	result := dropResult{Destination: string(w.name), Kinds: []kindReport{}}
	last := int64(0)
	keep := a.dropped.save
	if w.nocopy {
		keep = saveNothing
	}
	file, err := keep(a.dropName(w.name), func(to io.Writer) error {
		enc := newEncoder(to)
		return w.load(ctx, a.store, func(it *store.PendingItem) error {
			line := droppedItem{string(w.name), it.ID, it.Kind.String(), time.UnixMilli(it.Accepted).UTC(), it.Payload, nil}
			if !json.Valid(it.Payload) {
				line.Payload, line.Damaged = nil, it.Payload
			}
			last = max(last, it.ID)
			result.Written++
			return enc.Encode(line)
		})
	})
	if err != nil {
		return nil, fmt.Errorf("nothing was dropped, since a copy could not be kept (-nocopy keeps none): %w", err)
	}
	if result.Written == 0 { // nothing to drop
		return writeJSON(result), nil
	}
	op := &store.Drop{Destination: w.name, PDUs: w.pdus, Through: last}
	if err := a.apply(ctx, op); err != nil {
		if errors.Is(err, store.ErrQueueFull) || errors.Is(err, store.ErrClosed) {
			err = fmt.Errorf("nothing was dropped: %w", err)
			if file != "" {
				err = errors.Join(err, os.Remove(file))
			}
			return nil, err
		}
		if file == "" {
			return nil, fmt.Errorf("it is not known whether anything was dropped, look at the queue again: %w", err)
		}
		return nil, fmt.Errorf("it is not known whether anything was dropped, look at the queue again; a copy is in %s: %w", file, err)
	}
	dropped := op.Result.Dropped
	result.Kinds, result.Items, result.Bytes, result.File = kindReports(dropped), dropped.Sum().Items, dropped.Sum().Bytes, file
	a.log.Warn("an admin has dropped items, they are not delivered", "destination", w.name, "items", result.Items, "bytes", result.Bytes, "copy", file)
	return writeJSON(result), nil
}

// dropName is the beginning of the name of a file: what of a server's name some
// file systems do not take is replaced.
func (a *adminServer) dropName(name matrix.ServerName) string {
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r == '-', r == '.':
			return r
		}
		return '_'
	}, string(name))
	if strings.ContainsAny(safe[:1], ".-") { // it would be hidden, or look like a flag
		safe = "_" + safe[1:]
	}
	const most = 150 // names of files have 255
	return safe[:min(len(safe), most)] + "-" + a.now().Std().UTC().Format("20060102T150405Z")
}

// dropFolder is where copies of dropped items are kept.
type dropFolder struct {
	path   string
	max    int64 // bytes of all files
	create func(path string) (dropFile, error)
}

// dropFile is what is used of an *os.File.
type dropFile interface {
	io.WriteCloser
	Sync() error
}

func createFile(path string) (dropFile, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

// save makes a file of what write writes, and returns its path when it is durable.
// Of nothing it makes none, and returns "". On an error nothing is left. It is
// called by one goroutine at a time.
func (d *dropFolder) save(name string, write func(io.Writer) error) (string, error) {
	switch err := os.Mkdir(d.path, 0o700); {
	case err == nil:
		if err := syncFolder(filepath.Dir(d.path)); err != nil {
			return "", err
		}
	case !errors.Is(err, fs.ErrExist):
		return "", err
	}
	used, err := d.used()
	if err != nil {
		return "", err
	}
	final := ""
	for i := 1; final == ""; i++ {
		final = filepath.Join(d.path, name)
		if i > 1 {
			final += "-" + strconv.Itoa(i)
		}
		final += ".jsonl"
		if _, err := os.Lstat(final); err == nil {
			final = ""
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	temp := final + partial
	f, err := d.create(temp)
	if err != nil {
		return "", err
	}
	to := &limitedWriter{to: f, left: d.max - used, folder: d.path, max: d.max}
	buffered := bufio.NewWriterSize(to, 32<<10)
	err = write(buffered)
	if err == nil {
		err = buffered.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err != nil || !to.wrote {
		return "", errors.Join(err, os.Remove(temp))
	}
	if err := os.Rename(temp, final); err != nil {
		return "", errors.Join(err, os.Remove(temp))
	}
	if err := syncFolder(d.path); err != nil {
		return "", errors.Join(err, os.Remove(final))
	}
	return final, nil
}

// used adds up what is in the folder, and removes what a crash has left half
// written.
func (d *dropFolder) used() (bytes int64, err error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), partial) {
			if err := os.Remove(filepath.Join(d.path, e.Name())); err != nil {
				return 0, err
			}
			continue
		}
		fi, err := e.Info()
		if err != nil {
			return 0, err
		}
		bytes += fi.Size()
	}
	return bytes, nil
}

// limitedWriter refuses what goes beyond a limit.
type limitedWriter struct {
	to        io.Writer
	left, max int64
	folder    string
	wrote     bool
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.left -= int64(len(p)); w.left < 0 {
		return 0, fmt.Errorf("%s may have %d MiB, and would have more: move away what is there", w.folder, w.max>>20)
	}
	w.wrote = true
	return w.to.Write(p)
}

// syncFolder makes the names in a folder durable.
func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

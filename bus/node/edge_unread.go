package node

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/netx"
)

// errUnread ends an answer that its client did not read while others needed the room.
var errUnread = errors.New("it was not read in time, and others need the room")

const (
	// unreadShare is the part of the room for answers that one client may leave unread.
	unreadShare = 4
	// unreadFor is how long an answer must have stood still to be cut for its client's
	// sake alone: two large ones on a slow line take a while.
	unreadFor = 10 * time.Second
)

// unread are the answers on their way to clients that hold something until they have
// been read. They count against whoever does not read them: beyond a part of the room
// the one that has stood still for longest is cut if that is long, and in any case when
// an answer to somebody else finds no room.
type unread struct {
	limit taken
	still atomic.Int64 // unreadFor in ns; tests change it
	cuts  atomic.Int64
	clock atomic.Int64 // counts reads, and tells which answer has stood still for longest

	mu sync.Mutex
	by map[string][]*unreadAnswer // by client
}

// taken is what answers hold.
type taken struct {
	files int64 // of the spool
	bytes int64 // of the spool, in memory and in files
	kept  int64 // bytes of memory beside the spool
}

// part returns how much of a limit is taken, by what most is taken of; 1 is all.
func (t taken) part(limit taken) (most float64) {
	for _, x := range [][2]int64{{t.files, limit.files}, {t.bytes, limit.bytes}, {t.kept, limit.kept}} {
		if x[0] > 0 {
			most = max(most, float64(x[0])/float64(max(x[1], 1)))
		}
	}
	return most
}

// newUnread returns an account for a spool of a size in bytes, of which spoolFiles may
// be files, and for bytes of memory beside it.
func newUnread(spool, kept int64) *unread {
	u := &unread{limit: taken{files: spoolFiles, bytes: spool, kept: kept}, by: make(map[string][]*unreadAnswer)}
	u.still.Store(int64(unreadFor))
	return u
}

// unreadAnswer is an answer to one client; it is read by the one goroutine that writes
// it there. It holds what it has until it is closed or cut.
type unreadAnswer struct {
	of   *unread
	who  string
	last atomic.Int64 // when it was last read from, by unread.clock
	at   atomic.Int64 // and in Unix ns

	// One of them. Whoever cuts an answer closes the one and takes away the other.
	body   *netx.Body
	reader *netx.Reader
	kept   atomic.Pointer[bytes.Reader]
	size   int64 // of kept
}

// spooled counts an answer in the spool to a client. The caller holds the body.
func (u *unread) spooled(who string, body *netx.Body) *unreadAnswer {
	return u.add(&unreadAnswer{who: who, body: body, reader: body.Reader()})
}

// inMemory counts an answer in memory.
func (u *unread) inMemory(who string, b []byte) *unreadAnswer {
	a := &unreadAnswer{who: who, size: int64(len(b))}
	a.kept.Store(bytes.NewReader(b))
	return u.add(a)
}

func (u *unread) add(a *unreadAnswer) *unreadAnswer {
	a.of = u
	a.touch()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.by[a.who] = append(u.by[a.who], a)
	// What has just begun is not to blame, however large it is.
	before := time.Now().Add(-time.Duration(u.still.Load())).UnixNano()
	for use(u.by[a.who]).part(u.limit) > 1.0/unreadShare && u.cutLocked(a.who, func(b *unreadAnswer) bool { return b != a && b.at.Load() <= before }) {
	}
	kept := func(b *unreadAnswer) bool { return b != a && b.size > 0 }
	for a.size > 0 && u.keptLocked() > u.limit.kept {
		if who, ok := u.mostLocked(kept); !ok || !u.cutLocked(who, kept) {
			break
		}
	}
	return a
}

// makeRoom cuts the answer that has stood still for longest of the client that leaves
// most unread. It reports whether there was one.
func (u *unread) makeRoom() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	// What is still arriving stays in the spool if it is cut, as it may have others who
	// read it.
	complete := func(a *unreadAnswer) bool { return a.body != nil && a.body.Complete() }
	onDisk := func(a *unreadAnswer) bool {
		if !complete(a) {
			return false
		}
		_, memory := a.body.Bytes()
		return !memory
	}
	for _, may := range []func(*unreadAnswer) bool{onDisk, complete} {
		if who, ok := u.mostLocked(may); ok {
			return u.cutLocked(who, may)
		}
	}
	return false
}

// mostLocked returns the client that holds most of those answers that may be cut.
func (u *unread) mostLocked(may func(*unreadAnswer) bool) (who string, ok bool) {
	most := 0.0
	for name, list := range u.by { // equal ones are told apart by their names
		list = slices.DeleteFunc(slices.Clone(list), func(a *unreadAnswer) bool { return !may(a) })
		if part := use(list).part(u.limit); part > most || part == most && ok && name < who {
			who, most, ok = name, part, part > 0
		}
	}
	return who, ok
}

// keptLocked returns what all hold in memory beside the spool.
func (u *unread) keptLocked() (n int64) {
	for _, list := range u.by { // a sum
		for _, a := range list {
			n += a.size
		}
	}
	return n
}

// use sums up what answers hold. Some may be the same one.
func use(list []*unreadAnswer) (t taken) {
	seen := make(map[*netx.Body]bool, len(list))
	for _, a := range list {
		if t.kept += a.size; a.body == nil || seen[a.body] {
			continue
		}
		seen[a.body] = true
		t.bytes += a.body.Size()
		if _, memory := a.body.Bytes(); !memory {
			t.files++
		}
	}
	return t
}

// cutLocked cuts the answer of a client that has stood still for longest, of those
// that may be, and reports whether there is one.
func (u *unread) cutLocked(who string, may func(*unreadAnswer) bool) bool {
	var oldest *unreadAnswer
	for _, a := range u.by[who] {
		if may(a) && (oldest == nil || a.last.Load() < oldest.last.Load()) {
			oldest = a
		}
	}
	if oldest == nil {
		return false
	}
	u.cuts.Add(1)
	u.endLocked(oldest)
	return true
}

// endLocked lets go of what an answer holds, once.
func (u *unread) endLocked(a *unreadAnswer) {
	list := u.by[a.who]
	i := slices.Index(list, a)
	if i < 0 {
		return
	}
	if list = slices.Delete(list, i, i+1); len(list) == 0 {
		delete(u.by, a.who)
	} else {
		u.by[a.who] = list
	}
	a.kept.Store(nil)
	if a.reader != nil {
		_ = a.reader.Close() // always nil
	}
}

func (a *unreadAnswer) touch() {
	a.last.Store(a.of.clock.Add(1))
	a.at.Store(time.Now().UnixNano())
}

// Read reads on, or fails with errUnread once the answer has been cut. What it
// returns has left the spool: whoever writes it to a client holds nothing else.
func (a *unreadAnswer) Read(p []byte) (n int, err error) {
	a.touch()
	if a.reader == nil {
		kept := a.kept.Load()
		if kept == nil {
			return 0, errUnread
		}
		return kept.Read(p)
	}
	if n, err = a.reader.Read(p); errors.Is(err, netx.ErrReaderClosed) {
		err = errUnread
	}
	return n, err
}

// Close lets go of the answer.
func (a *unreadAnswer) Close() error {
	a.of.mu.Lock()
	defer a.of.mu.Unlock()
	a.of.endLocked(a)
	return nil
}

// answersMemory returns how many bytes the answers to other servers have in memory: in
// the spool, and beside it what is not read of those to transactions.
func (e *EdgeConfig) answersMemory() (spool, kept int64) {
	m := int64(e.SpoolMemory)
	return m - m/2, m / 2
}

// answersDisk returns how many bytes of answers to other servers may be on disk.
func (c *Config) answersDisk() int64 { return int64(c.Outbound.SpoolDisk) / 2 }

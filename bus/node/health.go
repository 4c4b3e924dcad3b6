package node

import (
	"sync/atomic"
	"time"
)

// trouble is what makes /health say 503: faults of the bus itself, each until
// the same thing has worked again or some time has passed.
type trouble struct {
	store atomic.Pointer[string]
	full  atomic.Pointer[fault]
}

type fault struct {
	at   time.Time
	text string
}

// spoolTrouble is how long a full spool counts as trouble.
const spoolTrouble = time.Minute

func (t *trouble) commit(err error) {
	if err == nil {
		t.store.Store(nil)
		return
	}
	text := "the store cannot be written: " + err.Error()
	t.store.Store(&text)
}

func (t *trouble) spool(err error) {
	t.full.Store(&fault{at: time.Now(), text: "no room for bodies: " + err.Error()})
}

// reason returns what is wrong now, or "".
func (t *trouble) reason() string {
	if s := t.store.Load(); s != nil {
		return *s
	}
	if f := t.full.Load(); f != nil && time.Since(f.at) < spoolTrouble {
		return f.text
	}
	return ""
}

// health returns "ok", or what makes the bus unfit for work, in one line.
func (n *Node) health() string {
	if n.draining.Load() {
		return "stopping"
	}
	if why := n.trouble.reason(); why != "" {
		return why
	}
	if n.store != nil && !n.store.HasReserve() {
		return "the disk is full, or nearly: free some megabytes where data_dir is"
	}
	if why := n.takeover.reason(); why != "" {
		return "the outbox stands still, transactions are carried through: " + why
	}
	front := n.front.Stats()
	if why := wrongSecret(&front.Secret, time.Now()); why != "" {
		return why
	}
	if why := n.parts.reason(); why != "" {
		return why
	}
	if why := n.edge.health(); why != "" {
		return why
	}
	return "ok"
}

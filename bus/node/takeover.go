package node

import (
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/store"
)

// takeover decides which transactions of the homeserver the outbox can take, and
// guards it against a wrong key: what would be signed with that nobody takes.
type takeover struct {
	origin matrix.ServerName
	keys   atomic.Pointer[Keys]

	bulk *bulk
	seed maphash.Seed
	sent func([]matrix.PDU) // is told of the events of each, if it is not nil

	mu       sync.Mutex
	verified string // the key id of the last signature that was found good
	sample   uint64 // transactions since the start
	stopped  atomic.Pointer[string]
}

const (
	// verifyEach is of how many transactions one is verified once the first was.
	verifyEach = 64
	// sendPrefix is how the targets of transactions begin.
	sendPrefix = "/_matrix/federation/v1/send/"
)

func newTakeover(cfg *Config, b *bulk) *takeover {
	if !cfg.hasOutbox() {
		return nil
	}
	t := &takeover{origin: cfg.Homeserver.ServerName, bulk: b, seed: maphash.MakeSeed()}
	t.keys.Store(cfg.Homeserver.keys)
	return t
}

// errNotTaken: the transaction goes to its destination as it is.
var errNotTaken = errors.New("not taken over")

// maxTxnID is the longest id of a transaction that is taken over, in bytes.
const maxTxnID = store.MaxTxnID - 1 - 20

// nameTxn returns by what a transaction is known again when it is repeated. Its id
// alone does not do: Synapse begins to count at the time of its start, and a clock
// that has gone back makes it come by the same numbers with other content. The
// transaction's own time is the same each time that it is sent
// (synapse/federation/sender/transaction_manager.py).
func nameTxn(id string, t *matrix.Transaction) string {
	return id + "@" + strconv.FormatInt(t.OriginServerTS, 10)
}

// take looks at a transaction. If the outbox takes it, it returns what the core
// has to know, and the name for the store. An error that does not wrap errNotTaken
// says why nothing can be taken over any more.
func (t *takeover) take(in *netx.Inbound) (ev bus.Offered, name string, err error) {
	id, ok := strings.CutPrefix(in.Target, sendPrefix)
	if !ok || id == "" || len(id) > maxTxnID || strings.ContainsAny(id, "/?") || in.Body == nil {
		return ev, "", fmt.Errorf("%w: an unusual target, or no body", errNotTaken)
	}
	if in.Size > matrix.MaxRequestBody {
		return ev, "", fmt.Errorf("%w: %d bytes are too many to be taken apart", errNotTaken, in.Size)
	}
	body, done, err := t.bulk.whole(in.Body, in.Size)
	defer done()
	if err != nil {
		return ev, "", fmt.Errorf("%w: %w", errNotTaken, err)
	}
	if err := t.verify(in, body); err != nil {
		return ev, "", err
	}
	txn, err := matrix.ParseTransaction(body)
	if err != nil {
		return ev, "", fmt.Errorf("%w: %w", errNotTaken, err)
	}
	if txn.Origin != t.origin {
		return ev, "", fmt.Errorf("%w: it is of %s", errNotTaken, txn.Origin)
	}
	if t.sent != nil {
		t.sent(txn.PDUs)
	}
	ev = bus.Offered{Req: bus.ReqID(in.ID), Dest: in.Destination, Class: txn.Class()}
	ev.Pace.Device = txn.ForDevices()
	for i := range txn.PDUs {
		ev.Pace.PDUs = append(ev.Pace.PDUs, bus.PaceMark{Room: txn.PDUs[i].Room, Mark: maphash.Bytes(t.seed, txn.PDUs[i].Raw)})
	}
	txn.EDURooms(func(room string) bool {
		if n := len(ev.Pace.Rooms); n == 0 || ev.Pace.Rooms[n-1] != room {
			ev.Pace.Rooms = append(ev.Pace.Rooms, room)
		}
		return len(ev.Pace.Rooms) < matrix.MaxEDUs
	})
	return ev, nameTxn(id, &txn), nil
}

// verify checks the homeserver's signature: of the first transaction, of one with
// another key, and of a sample. An error means that the bus has the wrong name or
// the wrong key.
func (t *takeover) verify(in *netx.Inbound, body []byte) error {
	x, err := matrix.ParseXMatrix(in.Header.Get("Authorization"))
	if err != nil {
		return fmt.Errorf("%w: %w", errNotTaken, err)
	}
	if x.Origin != string(t.origin) {
		return fmt.Errorf("the homeserver signs as %s, homeserver.server_name is %s", x.Origin, t.origin)
	}
	if x.Destination == "" {
		x.Destination = string(in.Destination)
	}
	if x.Destination != string(in.Destination) {
		return fmt.Errorf("%w: signed for %s", errNotTaken, x.Destination)
	}
	t.mu.Lock()
	t.sample++
	due := t.verified != x.Key || t.sample%verifyEach == 0
	t.mu.Unlock()
	if !due {
		return nil
	}
	keys := t.keys.Load()
	pub, known := keys.public[x.Key]
	if !known {
		return fmt.Errorf("the homeserver signs with the key %s, the file of homeserver.signing_key_path has %s", x.Key, keys)
	}
	if err := matrix.VerifyRequest(pub, x, in.Method, in.Target, body); err != nil {
		return fmt.Errorf("the homeserver's signature does not fit the key %s of homeserver.signing_key_path: %w", x.Key, err)
	}
	t.mu.Lock()
	t.verified = x.Key
	t.mu.Unlock()
	return nil
}

// use has other keys used from now on.
func (t *takeover) use(keys *Keys) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys.Store(keys)
	t.verified = ""
	t.stopped.Store(nil)
}

// reason says why nothing is taken over, or "".
func (t *takeover) reason() string {
	if t == nil {
		return ""
	}
	if s := t.stopped.Load(); s != nil {
		return *s
	}
	return ""
}

// offer offers a transaction to the core if the outbox takes it. It reports
// whether it did.
func (n *Node) offer(in *netx.Inbound) bool {
	t := n.takeover
	if t == nil || t.reason() != "" {
		return false
	}
	ev, name, err := t.take(in)
	switch {
	case err == nil:
		if ev.Class == matrix.ClassEvent {
			n.handover.sent()
		}
		n.loop.Post(event{in: in, txn: name, Event: ev})
		return true
	case errors.Is(err, errNotTaken):
		n.notable.write(slog.LevelWarn, "a transaction is carried through as it is", slog.String("destination", string(in.Destination)), slog.Any("why", err))
		return false
	}
	n.stopOutbox(err.Error())
	return false
}

// stopOutbox has transactions carried through from now on, until there are other
// keys.
func (n *Node) stopOutbox(why string) {
	if n.takeover.stopped.CompareAndSwap(nil, &why) {
		n.log.Error("the outbox stops: transactions are carried through, and what is pending is not delivered; put right what is wrong and reload (SIGHUP)", "why", why)
		n.loop.Post(event{Event: bus.Suspended{Why: why}})
	}
}

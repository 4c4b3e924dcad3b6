package node

import (
	"crypto/ed25519"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/bus/matrix"
	"fsbus/store"
)

const (
	// maxRing bounds the keys that are at hand, and those of which it is known that
	// there are none, each.
	maxRing = 4096
	// ringFresh is how long a key is used without a look into the store, where a newer
	// object of its server may say that it is not in use any more.
	ringFresh = time.Hour
	// ringMissing is how long a key that could not be had is not looked for again.
	// Whoever is refused because of it sends again after longer than that.
	ringMissing = time.Minute
)

// keyring finds the keys with which other servers sign their requests: those at
// hand, and what the store has, from the server itself or from a notary. All that is
// stored was signed by its own server.
type keyring struct {
	n      *Node
	latest atomic.Pointer[matrix.ServerName] // the notary that the homeserver asks

	mu      sync.Mutex
	known   map[ringKey]ringEntry
	missing map[ringKey]absence
}

type ringKey struct {
	server matrix.ServerName
	id     string
}

// absence is that a key could not be had.
type absence struct {
	until time.Time
	lacks bool // its server itself says that it does not have it
}

// ringEntry is a key; with public nil it is none.
type ringEntry struct {
	public  ed25519.PublicKey
	fetched matrix.Timestamp // when its server said that it is in use
	until   time.Time        // when the store is looked into again
}

func newKeyring(n *Node) *keyring {
	return &keyring{n: n, known: make(map[ringKey]ringEntry), missing: make(map[ringKey]absence)}
}

// notary notes whom the homeserver asks for keys, whose answers are in the store.
func (k *keyring) notary(name matrix.ServerName) {
	if old := k.latest.Load(); name != "" && (old == nil || *old != name) {
		k.latest.Store(&name)
	}
}

// find returns the key of a server with which it may sign a request at this
// moment, none if there is none at hand and in the store; looked is true if that was
// found out a moment ago, when the key was asked for as well, and lacks if its server
// itself answered and does not have it.
func (k *keyring) find(server matrix.ServerName, id string) (e ringEntry, looked, lacks bool, err error) {
	key, now := ringKey{server, id}, time.Now()
	k.mu.Lock()
	e, ok := k.known[key]
	missing := k.missing[key]
	k.mu.Unlock()
	switch {
	case ok && now.Before(e.until):
		return e, false, false, nil
	case now.Before(missing.until):
		return ringEntry{}, true, missing.lacks, nil
	}
	e, err = k.stored(server, id, now)
	if e.public != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		makeRoom(k.known)
		k.known[key] = e
	}
	return e, false, false, err
}

// forget drops what is known of a key, since there may be news in the store.
func (k *keyring) forget(server matrix.ServerName, id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.known, ringKey{server, id})
}

// none notes that a key could not be had, wherever it was asked for, and whether its
// server itself answered and does not have it.
func (k *keyring) none(server matrix.ServerName, id string, lacks bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	makeRoom(k.missing)
	k.missing[ringKey{server, id}] = absence{time.Now().Add(ringMissing), lacks}
}

// makeRoom lets go of some of a full map, whichever come first: all of it can be
// had again.
func makeRoom[V any](m map[ringKey]V) {
	if len(m) < maxRing {
		return
	}
	for key := range m {
		delete(m, key)
		if len(m) <= maxRing*7/8 {
			return
		}
	}
}

// stored looks a key up in the store: of several that it has, the one that came
// last.
func (k *keyring) stored(server matrix.ServerName, id string, now time.Time) (e ringEntry, err error) {
	ways := []matrix.ServerName{server}
	if k.n.notary != nil {
		ways = append(ways, k.n.notary.name)
	}
	if latest := k.latest.Load(); latest != nil {
		ways = append(ways, *latest)
	}
	for _, via := range ways {
		err := k.n.store.LoadKeys(via, []matrix.ServerName{server}, func(row store.ServerKeys) error {
			objects, err := splitObjects(row)
			if err != nil {
				return nil // as if it were not there
			}
			for _, o := range objects {
				if p, ok := o.RequestKey(id, k.n.wall(), row.Fetched); ok && row.Fetched > e.fetched {
					e = ringEntry{public: p, fetched: row.Fetched, until: now.Add(ringFresh)}
					if end := o.ValidUntil.Std(); end.Before(e.until) {
						e.until = end
					}
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, store.ErrClosed) {
			k.n.unreadKeys(err)
			return ringEntry{}, err
		}
	}
	return e, nil
}

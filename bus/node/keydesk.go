package node

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/store"
)

const (
	// maxQueryBody is the largest query for keys that is taken apart, in bytes: 80
	// for each of 13,000 servers. A larger one goes to its notary as it is.
	maxQueryBody = 1 << 20
	// maxQueryWants is how many keys it may ask for.
	maxQueryWants = 20000
	// ownKeyValid is how long the bus's own key object says that it is valid.
	ownKeyValid = 24 * time.Hour
)

// notary is the bus itself, as a notary for its homeserver.
type notary struct {
	name matrix.ServerName
	key  matrix.SigningKey
}

type keyCounts struct {
	refused atomic.Int64 // objects that are not valid
	unread  atomic.Int64 // that the store could not read
}

// newNotary returns nil if the bus is none.
func newNotary(cfg *Config) (*notary, error) {
	if !cfg.Keys.Notary {
		return nil, nil
	}
	key, err := loadNotaryKey(cfg)
	if err != nil {
		return nil, err
	}
	return &notary{name: cfg.Keys.NotaryName, key: key}, nil
}

// queryKeys hands a query for keys to the core, if it can be taken apart.
func (n *Node) queryKeys(in *netx.Inbound, a bus.Arrived, own bool) bool {
	if in.Body == nil || in.Size > maxQueryBody {
		return false
	}
	body, done, err := n.bulk.whole(in.Body, in.Size)
	defer done()
	if err != nil {
		return false
	}
	wants, err := matrix.ParseKeyQuery(body, n.wall(), maxQueryWants)
	if err != nil {
		return false
	}
	if n.edge != nil && !own {
		n.edge.ring.notary(in.Destination)
	}
	n.loop.Post(event{in: in, Event: bus.KeyQuery{Arrived: a, Own: own, Wants: wants}})
	return true
}

// forNotary answers a request to the bus itself, as a notary, or hands it to the
// core. Nothing of it goes to another server.
func (n *Node) forNotary(in *netx.Inbound, a bus.Arrived) {
	switch a.Endpoint.Name {
	case "key_query":
		if n.queryKeys(in, a, true) {
			return
		}
		n.replyNow(in, http.StatusBadRequest, matrix.ErrorJSON(matrix.MBadJSON, "fsbus: this is no query for server keys, or too large a one"))
	case "server_keys":
		until := n.wall().Add(ownKeyValid)
		body, err := matrix.ServerKeys(string(n.notary.name), until, []matrix.SigningKey{n.notary.key}, nil)
		if err != nil {
			panic(fmt.Sprintf("node: own key object: %v", err))
		}
		n.replyNow(in, http.StatusOK, body)
	default:
		n.replyNow(in, http.StatusNotFound, matrix.ErrorJSON(matrix.MUnrecognized, fmt.Sprintf("fsbus: %s is fsbus itself, which is a notary and nothing else", n.notary.name)))
	}
}

// replyNow answers a request that the core never hears of.
func (n *Node) replyNow(in *netx.Inbound, status int, body []byte) {
	n.wrote(in, in.Reply(status, nil, body))
	in.Release()
}

// loadKeys looks up what the store has of the keys that are wanted.
type loadKeys struct{ bus.LoadKeys }

func (l loadKeys) run(n *Node) {
	missing, outdated, err := n.missingKeys(l.Via, l.Wants)
	if err != nil {
		n.unreadKeys(err)
		missing, outdated = l.Wants, nil
	}
	n.loop.Post(event{Event: bus.KeysLoaded{Query: l.Query, Missing: missing, Outdated: outdated}})
}

func (l loadKeys) crashed(n *Node, err error) {
	n.log.Error("a worker failed", "error", err)
	n.loop.Post(event{Event: bus.KeysLoaded{Query: l.Query, Missing: l.Wants}})
}

func (n *Node) unreadKeys(err error) {
	n.keyCounts.unread.Add(1)
	if !errors.Is(err, store.ErrClosed) {
		n.trouble.commit(err)
	}
}

// missingKeys returns the wants that the store does not satisfy, and the requests
// for keys whose answers do not have one that is in use.
func (n *Node) missingKeys(via matrix.ServerName, wants []matrix.KeyWant) (missing []matrix.KeyWant, outdated []bus.Key, err error) {
	now := n.wall()
	own := n.notary != nil && via == n.notary.name
	known := make([]bool, len(wants))
	err = n.store.LoadKeys(via, serversOf(wants), func(k store.ServerKeys) error {
		objects, err := splitObjects(k)
		if err != nil {
			return nil // as if it were not there
		}
		first, _ := slices.BinarySearchFunc(wants, k.Server, func(w matrix.KeyWant, server matrix.ServerName) int { return cmp.Compare(w.Server, server) })
		for i := first; i < len(wants) && wants[i].Server == k.Server; i++ {
			w := wants[i]
			unknown := w.KeyID != ""
			for _, o := range objects {
				_, inUse := o.Verify[w.KeyID]
				_, old := o.Old[w.KeyID]
				unknown = unknown && !inUse && !old
				if o.Satisfies(w.KeyID, w.MinValid, k.Fetched) && !(own && now >= o.RefreshAt(k.Fetched)) {
					known[i] = true
				}
			}
			if unknown {
				outdated = append(outdated, keyOf(w.Server, http.MethodGet, serverKeysTarget, [32]byte{}))
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	for i, w := range wants {
		if !known[i] {
			missing = append(missing, w)
		}
	}
	return missing, outdated, nil
}

// serversOf returns the servers of wants, which are in their order.
func serversOf(wants []matrix.KeyWant) (servers []matrix.ServerName) {
	for i, w := range wants {
		if i == 0 || w.Server != wants[i-1].Server {
			servers = append(servers, w.Server)
		}
	}
	return servers
}

// splitObjects takes the objects of a row apart.
func splitObjects(k store.ServerKeys) (objects []*matrix.ServerKeyObject, err error) {
	r := matrix.NewKeyAnswerReader(io.MultiReader(strings.NewReader(matrix.KeyAnswerBegin), bytes.NewReader(k.Object), strings.NewReader(matrix.KeyAnswerEnd)), maxObjects)
	for {
		raw, err := r.Next()
		if err == io.EOF {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		o, err := matrix.KnownServerKeys(raw, k.Server)
		if err != nil {
			return nil, err
		}
		objects = append(objects, o)
	}
}

// writeKeys answers a query with what the store has of it.
func (n *Node) writeKeys(in *netx.Inbound, q *bus.ReplyKeys) error {
	body := n.spool.New()
	defer body.Release()
	_, err := body.Write([]byte(matrix.KeyAnswerBegin))
	first := true
	if err == nil {
		err = n.store.LoadKeys(q.Via, serversOf(q.Wants), func(k store.ServerKeys) error {
			if !first {
				k.Object = append([]byte{','}, k.Object...)
			}
			first = false
			_, err := body.Write(k.Object)
			return err
		})
	}
	if err == nil {
		_, err = body.Write([]byte(matrix.KeyAnswerEnd))
	}
	body.CloseWrite(err)
	if err != nil {
		if errors.Is(err, netx.ErrSpoolFull) {
			n.trouble.spool(err)
		} else {
			n.unreadKeys(err)
		}
		return in.Reply(http.StatusServiceUnavailable, nil, matrix.ErrorJSON(matrix.MUnknown, "fsbus: the keys could not be read: "+err.Error()))
	}
	r := body.Reader()
	defer r.Close()
	return in.Stream(http.StatusOK, http.Header{"Content-Type": {"application/json"}}, body.Size(), r)
}

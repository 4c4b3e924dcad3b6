package node

import (
	"net/http"
	"sync"
	"time"

	"fsbus/bus/matrix"
)

// ownFresh is how long the homeserver's answer about its keys or its version is
// given again. It is short, as both may change with a restart of the homeserver.
const ownFresh = 5 * time.Minute

// ownAnswers keeps what the homeserver says of itself, which is the same for all
// who ask.
type ownAnswers struct {
	mu   sync.Mutex
	kept map[string]ownAnswer // by endpoint
}

type ownAnswer struct {
	body  []byte
	until time.Time
}

// ownTargets are the targets of which the answers are kept, by endpoint.
var ownTargets = map[string]string{
	"server_keys": serverKeysTarget,
	"version":     "/_matrix/federation/v1/version",
}

// get returns the answer to a request, if there is one.
func (o *ownAnswers) get(ep *matrix.Endpoint, target string) (body []byte, ok bool) {
	if ownTargets[ep.Name] != target || target == "" {
		return nil, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	a, ok := o.kept[ep.Name]
	return a.body, ok && time.Now().Before(a.until)
}

// keep keeps an answer of the homeserver, if it is one about itself.
func (o *ownAnswers) keep(r *relay, n *Node) {
	name := r.c.endpoint.Name
	if ownTargets[name] != r.c.q.Target || r.status != http.StatusOK || !isJSON(r.header) || r.header.Get("Content-Encoding") != "" {
		return
	}
	body := r.bytes()
	if body == nil || len(body) > int(matrix.MaxServerKeys) || !isObject(body, r.c.endpoint) {
		return
	}
	fresh := ownFresh
	if name == "server_keys" {
		keys, err := matrix.CheckServerKeys(body, n.cfg.Load().Homeserver.ServerName)
		if err != nil {
			n.notable.ownKeys(err)
			return
		}
		now := n.wall()
		fresh = min(fresh, keys.RefreshAt(now).Sub(now))
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.kept == nil {
		o.kept = make(map[string]ownAnswer)
	}
	o.kept[name] = ownAnswer{body, time.Now().Add(fresh)}
}

// forget drops what is kept.
func (o *ownAnswers) forget() {
	o.mu.Lock()
	defer o.mu.Unlock()
	clear(o.kept)
}

package node

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"fsbus/bus"
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
	away time.Time            // when the homeserver was last found to be away; zero once it answers
	said ownAnswer            // what the bus says of the keys while it is

	served atomic.Int64 // when the core last heard that somebody has the keys, Unix time in nanoseconds
}

type ownAnswer struct {
	body  []byte
	keys  *matrix.ServerKeyObject // what body says, of server_keys
	of    *Keys                   // what body was made of, if the bus made it
	until time.Time
}

const (
	// awayFor is for how long a homeserver that was found to be away is not asked for its
	// keys, if the bus can say them.
	awayFor = 30 * time.Second
	// saidValid is how long what the bus says of the homeserver's keys is valid. It is
	// short, as the bus knows of no old keys that only the homeserver's configuration has.
	saidValid = time.Hour
	// servedEach is how often the core hears that somebody has fetched the keys.
	servedEach = time.Second
)

// ownTargets are the targets of which the answers are kept, by endpoint.
var ownTargets = map[string]string{
	"server_keys": serverKeysTarget,
	"version":     "/_matrix/federation/v1/version",
}

// get returns the answer to a request, if there is one. keys are what the homeserver signs
// with, nil if that is not known: an answer without that key is from before it was changed.
func (o *ownAnswers) get(ep *matrix.Endpoint, target string, keys *Keys) (body []byte, ok bool) {
	if ownTargets[ep.Name] != target || target == "" {
		return nil, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	a, ok := o.kept[ep.Name]
	if !ok || !time.Now().Before(a.until) || a.keys != nil && !keys.publishedIn(a.keys) {
		return nil, false
	}
	return a.body, true
}

// publishedIn reports whether o has the key that requests are signed with. A nil k asks
// for none.
func (k *Keys) publishedIn(o *matrix.ServerKeyObject) bool {
	return k == nil || k.signing.Public().Equal(o.Verify[k.signing.ID()])
}

// asked says whether the homeserver is there.
func (o *ownAnswers) asked(answers bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.away = time.Time{}
	if !answers {
		o.away = time.Now()
		clear(o.kept) // it may come back with other keys
	}
}

// isAway reports whether the homeserver was away a moment ago.
func (o *ownAnswers) isAway() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.away.IsZero() && time.Since(o.away) < awayFor
}

// say returns what the homeserver would say of its keys. Whoever cannot have them while it
// restarts refuses what it has just signed.
func (o *ownAnswers) say(server matrix.ServerName, keys *Keys, now matrix.Timestamp) ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.said.of != keys || !time.Now().Before(o.said.until) {
		body, err := matrix.ServerKeys(string(server), now.Add(saidValid), keys.private, keys.old)
		if err != nil {
			return nil, err
		}
		o.said = ownAnswer{body: body, of: keys, until: time.Now().Add(saidValid / 2)}
	}
	return o.said.body, nil
}

// signingKeys returns what the homeserver signs with; nil if the bus does not know.
func (s *edgeShell) signingKeys() *Keys {
	if s.n.takeover.reason() != "" {
		return nil // the file has others than the homeserver
	}
	return s.n.cfg.Load().Homeserver.keys
}

// stand answers a request for the homeserver's keys in its place; nil if the bus cannot,
// or the request is another.
func (s *edgeShell) stand(ep *matrix.Endpoint, target string) []byte {
	keys := s.signingKeys()
	if ep.Name != "server_keys" || target != serverKeysTarget || keys == nil {
		return nil
	}
	body, err := s.own.say(s.n.cfg.Load().Homeserver.ServerName, keys, s.n.wall())
	if err != nil {
		panic(fmt.Sprintf("node: the homeserver's keys: %v", err)) // they were read, and its name checked
	}
	return body
}

// keysServed: somebody has fetched the homeserver's keys.
func (s *edgeShell) keysServed(ep *matrix.Endpoint) {
	now, last := time.Now().UnixNano(), s.own.served.Load()
	if ep.Name == "server_keys" && now-last >= int64(servedEach) && s.own.served.CompareAndSwap(last, now) {
		s.n.loop.Post(event{Event: bus.KeyServed{}})
	}
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
	var keys *matrix.ServerKeyObject
	if name == "server_keys" {
		var err error
		keys, err = matrix.CheckServerKeys(body, n.cfg.Load().Homeserver.ServerName)
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
	o.kept[name] = ownAnswer{body: body, keys: keys, until: time.Now().Add(fresh)}
}

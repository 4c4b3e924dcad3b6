package netx

import (
	"container/list"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
)

// sessionCache remembers TLS sessions in a number of bytes, whatever certificates the
// servers have: it keeps them encoded, 5 KiB for a usual chain, where crypto/tls's own
// cache keeps parsed certificates of any size. A session is kept under the name that was
// verified. The one that was not used for longest goes first.
type sessionCache struct {
	most, mostBytes int64

	mu    sync.Mutex
	by    map[string]*list.Element // of *session
	used  list.List                // the last used in front
	bytes int64
}

type session struct {
	name          string
	ticket, state []byte
}

// maxSession bounds one session, in bytes: four usual ones.
const maxSession = 20 << 10

// sessionOverhead is what a session takes beside what it holds, in bytes.
const sessionOverhead = 256

func newSessionCache(most int, mostBytes int64) *sessionCache {
	return &sessionCache{most: int64(most), mostBytes: mostBytes, by: make(map[string]*list.Element)}
}

func (s *session) size() int64 {
	return int64(len(s.name)+len(s.ticket)+len(s.state)) + sessionOverhead
}

// has reports whether there is a session under a name.
func (c *sessionCache) has(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.by[name] != nil
}

// Get implements tls.ClientSessionCache.
func (c *sessionCache) Get(name string) (*tls.ClientSessionState, bool) {
	c.mu.Lock()
	e := c.by[name]
	if e == nil {
		c.mu.Unlock()
		return nil, false
	}
	c.used.MoveToFront(e)
	s := *e.Value.(*session)
	c.mu.Unlock()
	state, err := tls.ParseSessionState(s.state)
	if err != nil {
		return nil, false // what this very program has written
	}
	cs, err := tls.NewResumptionState(s.ticket, state)
	return cs, err == nil
}

// Put implements tls.ClientSessionCache. nil forgets the session.
func (c *sessionCache) Put(name string, cs *tls.ClientSessionState) {
	s := &session{name: name}
	if cs != nil {
		ticket, state, err := cs.ResumptionState()
		if err == nil && state != nil {
			s.ticket = ticket
			s.state, err = state.Bytes()
		}
		if err != nil || state == nil || s.size() > maxSession {
			cs = nil
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.by[name]; e != nil {
		c.dropLocked(e)
	}
	if cs == nil {
		return
	}
	c.by[name] = c.used.PushFront(s)
	c.bytes += s.size()
	for c.bytes > c.mostBytes || int64(len(c.by)) > c.most {
		c.dropLocked(c.used.Back())
	}
}

func (c *sessionCache) dropLocked(e *list.Element) {
	s := c.used.Remove(e).(*session)
	delete(c.by, s.name)
	c.bytes -= s.size()
}

// maxChain bounds the certificates that a server shows, in bytes. Usual chains have 3 to 6
// KiB, and those of a hundred names 10. Parsed they take eight times that, for as long as
// the connection lasts.
const maxChain = 20 << 10

// checkChain is tls.Config.VerifyPeerCertificate.
func checkChain(raw [][]byte, _ [][]*x509.Certificate) error {
	n := 0
	for _, c := range raw {
		n += len(c)
	}
	if n > maxChain {
		return fmt.Errorf("tls: the server shows certificates of %d bytes, and %d are the most", n, maxChain)
	}
	return nil
}

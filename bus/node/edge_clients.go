package node

import (
	"context"
	"net/http"
	"sync"
	"time"

	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
)

const (
	// clientRequests is how many requests of clients are passed on at a time. Most of
	// them wait for news.
	clientRequests = 64
	// clientDisk is what all bodies of clients' requests may have on disk, in bytes, if
	// that is enough for a few.
	clientDisk = 256 << 20
	// clientStalls is for how long a client may leave its answer unread while others find
	// no place.
	clientStalls = 2 * time.Second
	// clientPatience bounds a client's request: it is longer than any long poll.
	clientPatience = 5 * time.Minute
)

// clientSide passes what clients want on to the homeserver, and the answers back,
// without any order. It has connections of its own, so that no server waits for what
// a client waits for.
type clientSide struct {
	upstream *netx.Upstream
	pool     *sched.Pool[*clientJob]

	mu      sync.Mutex
	running map[uint64]*clientJob // by the request's ID
	places  *netx.FairPlaces
}

type clientJob struct {
	q      *netx.EdgeRequest
	ctx    context.Context
	cancel context.CancelFunc
	cut    bool // its place was taken back; guarded by clientSide.mu
}

func newClientSide(up netx.UpstreamConfig) (*clientSide, error) {
	up.MaxConns, up.StallTimeout = clientRequests, 2*clientPatience
	upstream, err := netx.NewUpstream(up)
	return &clientSide{upstream: upstream, running: make(map[uint64]*clientJob), places: netx.NewFairPlaces(clientRequests)}, err
}

func (c *clientSide) start(n *Node) {
	c.pool = sched.NewPool(clientRequests, clientRequests, c.pass, func(j *clientJob, err error) {
		n.log.Error("a worker failed", "error", err)
		_ = j.q.Abort() // it may have been answered
		c.end(j)
	})
}

// take has a request passed on, unless too many are, or too many of its client. An answer
// that is not read gives its place.
func (c *clientSide) take(q *netx.EdgeRequest) bool {
	j := &clientJob{q: q}
	j.ctx, j.cancel = context.WithTimeout(context.Background(), clientPatience)
	c.mu.Lock()
	defer c.mu.Unlock()
	key := q.ClientKey()
	if !c.places.Take(key) {
		if c.cutLocked(time.Now()); !c.places.Take(key) {
			j.cancel()
			return false
		}
	}
	c.running[q.ID] = j
	c.pool.Submit(j)
	return true
}

// cutLocked ends the answer that has stood still for longest, if that is long, and takes
// its place back.
func (c *clientSide) cutLocked(now time.Time) {
	var worst *clientJob
	longest := clientStalls
	for _, j := range c.running { // clientRequests at most, and those that were cut
		if stalled := j.q.Stalled(now); !j.cut && stalled >= longest {
			worst, longest = j, stalled
		}
	}
	if worst != nil {
		worst.cut = true
		c.places.Give(worst.q.ClientKey())
		worst.q.Cut()
	}
}

// pass passes a request on. Who has gone has gone.
func (c *clientSide) pass(j *clientJob) {
	defer c.end(j)
	q := j.q
	req := &netx.UpstreamRequest{Method: q.Method, Target: q.Target, Host: q.Host, Header: forwardedFor(q), Size: q.Size}
	if q.Body != nil {
		req.Body = q.Body.Reader()
	}
	resp, err := c.upstream.Do(j.ctx, req)
	if err != nil {
		_ = q.Reply(http.StatusBadGateway, nil, matrix.ErrorJSON(matrix.MUnknown, "fsbus: the homeserver does not answer"))
		return
	}
	defer resp.Body.Close()
	_ = q.Stream(resp.StatusCode, resp.Header, resp.ContentLength, resp.Body)
}

func (c *clientSide) end(j *clientJob) {
	j.cancel()
	j.q.Release()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.running, j.q.ID)
	if !j.cut {
		c.places.Give(j.q.ClientKey())
	}
}

// gone breaks off what a client does not wait for any more. It reports whether the
// request was one of a client.
func (c *clientSide) gone(q *netx.EdgeRequest) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	j := c.running[q.ID]
	if j != nil {
		j.cancel()
	}
	return j != nil
}

func (c *clientSide) close(ctx context.Context) {
	c.mu.Lock()
	for _, j := range c.running {
		j.cancel()
	}
	c.mu.Unlock()
	_ = c.pool.Close(ctx) // nothing of it matters to the homeserver
	c.upstream.CloseIdle()
}

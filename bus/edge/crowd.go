package edge

// When all room is taken by requests that are worth as much as a newcomer, it is shared
// out by origins. So the machine knows for each band which origins have calls that have
// never begun, from their arrival on, and how many requests wait for these.

func (m *Machine) crowdIn(c *call) {
	o, b := c.origin, c.band
	if o.unbegun[b].n == 0 {
		o.place[b] = int32(len(m.crowd[b]))
		m.crowd[b] = append(m.crowd[b], o)
	}
	o.unbegun[b].insert(c)
	c.crowds = int32(len(c.waiters))
	o.waits[b] += c.crowds
	if o.stranger {
		count(m.ledger.passing, c.leader.Peer, 1)
		c.peer = c.leader.Peer
	}
}

// uncrowd notes that a call begins, or ends without.
func (m *Machine) uncrowd(c *call) {
	o, b := c.origin, c.band
	if !c.link[linkUnbegun].in {
		return
	}
	o.unbegun[b].remove(c)
	o.waits[b] -= c.crowds
	c.crowds = 0
	if o.stranger {
		count(m.ledger.passing, c.peer, -1)
	}
	if o.unbegun[b].n > 0 {
		return
	}
	all := m.crowd[b]
	last := len(all) - 1
	all[o.place[b]] = all[last]
	all[o.place[b]].place[b] = o.place[b]
	all[last] = nil
	m.crowd[b] = all[:last]
}

// room makes room for a request of a band, if need be at the expense of others, and
// reports whether there is.
func (m *Machine) room(r *request, b Band, o *origin) bool {
	if r.Size > m.held.maxBytes {
		return false
	}
	for !m.held.fits(r.Size) {
		v := m.victim(r, b, o)
		if v == nil {
			return false
		}
		m.evict(v)
	}
	return true
}

func (m *Machine) evict(c *call) {
	m.stats.Evicted++
	if c.paced(m) {
		m.shed(c, ShedRoom)
		return
	}
	m.refuseAll(c, ForRoom, 503, "fsbus: others' requests need the room")
}

// uneven is how many times as much as another an origin must have for their bands not
// to count: no requests are so urgent that who sends many of them keeps all others out.
const uneven = 4

// victim returns the call that makes room for a request of band b: the oldest that may
// be dropped, or else of the first origin that has to give way the newest that has never
// begun. These are, from the cheapest band on, whoever has most of it: of a cheaper band
// than b, if that is not far less than the newcomer's origin has of b; of b itself, if it
// is more; and of a dearer one, if it is far more.
func (m *Machine) victim(r *request, b Band, o *origin) *call {
	reached := false
	for _, v := range cheapest {
		if v == BandEphemeral && m.cfg.Ephemeral != PassEphemeral {
			if first := m.line[v].first; first != nil || v == b {
				return first
			}
			continue
		}
		reached = reached || v == b
		if c := m.crowding(r, b, o, v, reached); c != nil {
			return c
		}
	}
	return nil
}

// crowding returns the call of band v that makes room for one of b, which is dearer
// unless v has reached it. What there is no room for counts, requests or bytes.
func (m *Machine) crowding(r *request, b Band, o *origin, v Band, reached bool) (c *call) {
	load, own := func(x *origin) int64 { return int64(x.waits[v]) }, int64(o.waits[b])+1
	if m.held.n < m.held.maxN {
		load, own = func(x *origin) int64 { return x.bytes }, o.bytes+r.Size
	}
	var most int64
	for _, x := range m.crowd[v] {
		n := load(x)
		ok := n > own
		switch {
		case !reached:
			ok = x == o || n*uneven >= own
		case v != b:
			ok = x != o && n > own*uneven && x.unbegun[v].n > 1
		}
		if !ok || n <= most {
			continue
		}
		if newest := x.newest(v); newest != nil {
			c, most = newest, n
		}
	}
	return c
}

// newest returns the origin's newest call of a band that waits and has never begun. Of
// what is looked up the body is needed.
func (o *origin) newest(b Band) *call {
	c := o.unbegun[b].last
	for c != nil && c.phase == phaseLooking {
		c = c.link[linkUnbegun].prev
	}
	return c
}

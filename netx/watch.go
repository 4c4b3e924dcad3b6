package netx

import "time"

// watch lets the watcher look after a parked request, and starts it if need
// be. It runs only while something is parked.
func (f *Front) watch(in *Inbound) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if in.state != statePark { // answered by Handle, or since
		return
	}
	in.pos = len(f.waiting)
	f.waiting = append(f.waiting, in)
	if !f.sweeping {
		f.sweeping = true
		go f.sweep()
	}
}

// unwatch is the opposite of watch. f.mu is held.
func (f *Front) unwatch(in *Inbound) {
	if in.pos < 0 {
		return
	}
	last := len(f.waiting) - 1
	moved := f.waiting[last]
	f.waiting[in.pos], moved.pos = moved, in.pos
	f.waiting[last] = nil
	f.waiting = f.waiting[:last]
	in.pos = -1
}

// sweep is the watcher: one goroutine that asks for every parked connection
// in turn whether its client is still there. The question is one system call
// that does not block; it is asked outside the lock, so answers are not held
// up by a round of 4,000.
func (f *Front) sweep() {
	t := time.NewTicker(f.cfg.SweepInterval)
	defer t.Stop()
	var batch []*Inbound
	for range t.C {
		f.mu.Lock()
		if len(f.waiting) == 0 {
			f.waiting = nil // a storm's worth of capacity
			f.sweeping = false
			f.mu.Unlock()
			return
		}
		batch = append(batch[:0], f.waiting...)
		f.mu.Unlock()
		for i, in := range batch {
			batch[i] = nil // not kept alive until the next round
			if peerGone(in.conn) {
				f.clientGone(in)
			}
		}
	}
}

// clientGone ends a request whose client went away, unless an answer has begun
// meanwhile: then that meets the closed connection.
func (f *Front) clientGone(in *Inbound) {
	if f.unpark(in, stateGone) != nil {
		return
	}
	f.mu.Lock()
	f.stats.Gone++
	f.mu.Unlock()
	in.end(true)
	f.cfg.Gone(in)
}

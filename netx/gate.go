package netx

import (
	"container/list"
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// A gate decides when a Front may accept a further connection, and when it may read a
// request. Whoever wants a connection takes a place first and calls Accept then, so that
// the limits hold exactly and what is beyond them stays in the kernel's backlog. A
// listener that waits in Accept therefore holds a place.
//
// A connection that has said nothing yet costs no more than one that waits for its
// answer, so it only has a place among all. With its first byte it asks for one of those
// in which a request is read. Those are given in the order of asking, first to those whose
// head is there: whoever writes one on this machine writes it at once. While somebody
// waits, what is refused gives its place, and a head that is not complete after
// headPatience. A body may be as
// slow as it likes, as only who has the secret gets there. When all places are in use,
// or MaxComing connections have not handed their request over, the one that has been
// silent for longest gives its own, if that is silentFor.
//
// Where unix sockets are listened on, TCP has half of the places at most.
type gate struct {
	maxOpen, maxReading int

	mu      sync.Mutex
	change  sync.Cond // a place became free, or the gate was closed; L is &mu
	places  [vias]struct{ served, open, coming, reading int }
	coming  map[*coming]struct{}
	waiting [2]list.List // of *coming, for a place to read, the first in front: those whose head is there, and others
	timer   *time.Timer  // looks for what gives way; nil until somebody waits
	closed  bool

	mostOpen, mostReading int
	cuts                  uint64
}

// via is how a connection came.
type via uint8

const (
	overUnix via = iota
	overTCP
	vias
)

const (
	// MaxComing bounds the connections whose request is not handed over. Each has a
	// goroutine.
	MaxComing = 2048
	// headPatience is for how long the rest of a head may lag behind its first byte while
	// others wait.
	headPatience = 30 * time.Millisecond
	// silentFor is for how long a connection may be silent while all places are in use.
	// Synapse may be busy for seconds between connecting and writing.
	silentFor = 3 * time.Second
)

// coming is a connection whose request has not been handed over.
type coming struct {
	conn  net.Conn
	over  via
	turn  chan struct{} // closed when it may be read
	stage comingStage   // guarded by gate.mu, as are the others
	since time.Time     // when it came into stage
	cut   bool
}

type comingStage uint8

const (
	stageSilent  comingStage = iota // no byte has come
	stageQueued                     // it waits to be read
	stageHead                       // its head is read
	stageBody                       // its body is read, or it is handed over
	stageRefused                    // it is refused
)

func newGate(maxOpen, maxReading int) *gate {
	g := &gate{maxOpen: maxOpen, maxReading: maxReading, coming: map[*coming]struct{}{}}
	g.change.L = &g.mu
	return g
}

// listen notes that there is one more listener of a kind, or one less.
func (g *gate) listen(over via, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.places[over].served += n
}

// fitsLocked reports whether one more may have a place of limit, when used are taken.
func (g *gate) fitsLocked(over via, used func(via) int, limit int) bool {
	if over == overTCP && g.places[overUnix].served > 0 && used(overTCP) >= max(1, limit/2) {
		return false
	}
	return used(overUnix)+used(overTCP) < limit
}

func (g *gate) openLocked(over via) int    { return g.places[over].open }
func (g *gate) comingLocked(over via) int  { return g.places[over].coming }
func (g *gate) readingLocked(over via) int { return g.places[over].reading }

// enter waits for a place for a connection. It reports false when the gate is closed.
func (g *gate) enter(over via) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	var leaving *coming
	for !g.closed && !(g.fitsLocked(over, g.openLocked, g.maxOpen) && g.fitsLocked(over, g.comingLocked, MaxComing)) {
		stop := func() bool { return false }
		_, leaves := g.coming[leaving]
		if c := g.silentLocked(over); c != nil && !leaves {
			if wait := silentFor - time.Since(c.since); wait <= 0 {
				g.cutLocked(c)
				leaving = c
			} else {
				stop = time.AfterFunc(wait, g.wake).Stop
			}
		}
		g.change.Wait()
		stop()
	}
	if g.closed {
		return false
	}
	g.places[over].open++
	g.places[over].coming++
	g.mostOpen = max(g.mostOpen, g.openLocked(overUnix)+g.openLocked(overTCP))
	return true
}

// wake has all that wait look again.
func (g *gate) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.change.Broadcast()
}

// silentLocked returns the connection that has been silent for longest. It looks at all.
func (g *gate) silentLocked(over via) (oldest *coming) {
	for c := range g.coming {
		if c.stage == stageSilent && !c.cut && c.over == over && (oldest == nil || c.since.Before(oldest.since)) {
			oldest = c
		}
	}
	return oldest
}

func (g *gate) cutLocked(c *coming) {
	c.cut = true
	g.cuts++
	_ = c.conn.Close() // its goroutine notices
}

// came notes that a connection has the place that was taken by enter.
func (g *gate) came(conn net.Conn, over via) *coming {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := &coming{conn: conn, over: over, turn: make(chan struct{}), since: time.Now()}
	g.coming[c] = struct{}{}
	return c
}

// read waits until a connection may be read; whole says that its head is there.
func (g *gate) read(c *coming, whole bool) {
	g.mu.Lock()
	c.stage = stageQueued
	i := 1
	if whole {
		i = 0
	}
	g.waiting[i].PushBack(c)
	g.nextLocked()
	g.mu.Unlock()
	<-c.turn // every one that is read ends, or is cut off
}

// nextLocked gives the turn to those that may be read, and sees to it that others give
// way if there are more.
func (g *gate) nextLocked() {
	for i := range g.waiting {
		for e := g.waiting[i].Front(); e != nil; {
			c, next := e.Value.(*coming), e.Next()
			if g.fitsLocked(c.over, g.readingLocked, g.maxReading) {
				g.waiting[i].Remove(e)
				g.places[c.over].reading++
				g.mostReading = max(g.mostReading, g.readingLocked(overUnix)+g.readingLocked(overTCP))
				c.stage, c.since = stageHead, time.Now()
				close(c.turn)
			} else if c.over == overUnix {
				break // nor does any behind it
			}
			e = next
		}
	}
	if g.waitingLocked() == 0 {
		return
	}
	if g.timer == nil {
		g.timer = time.AfterFunc(headPatience/3, g.press)
	} else {
		g.timer.Reset(headPatience / 3)
	}
}

func (g *gate) waitingLocked() int { return g.waiting[0].Len() + g.waiting[1].Len() }

// press cuts those off that give way, while somebody waits to be read.
func (g *gate) press() {
	g.mu.Lock()
	defer g.mu.Unlock()
	wanted, now := g.waitingLocked(), time.Now()
	for c := range g.coming { // each gives way for itself
		if c.cut || wanted == 0 {
			continue
		}
		if c.stage == stageRefused || c.stage == stageHead && now.Sub(c.since) >= headPatience {
			g.cutLocked(c)
			wanted--
		}
	}
	g.nextLocked()
}

// enterStage notes how far a connection that is read has come.
func (g *gate) enterStage(c *coming, s comingStage) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c.stage, c.since = s, time.Now()
}

// handed notes that a connection is no longer the reader's; it keeps its place in which
// it was read until leave.
func (g *gate) handed(c *coming) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.goneLocked(c)
	g.change.Broadcast()
}

func (g *gate) goneLocked(c *coming) {
	delete(g.coming, c)
	if g.places[c.over].coming--; g.places[c.over].coming < 0 {
		panic("netx: more connections were handed over than came")
	}
}

// failed notes that no connection came for the place that was taken by enter.
func (g *gate) failed(over via) {
	g.mu.Lock()
	g.places[over].coming--
	g.mu.Unlock()
	g.leave(over, 1, 0)
}

// dropped gives back what a connection has that was not handed over.
func (g *gate) dropped(c *coming) {
	g.mu.Lock()
	reading := 0
	if c.stage > stageQueued {
		reading = 1
	}
	g.goneLocked(c)
	g.mu.Unlock()
	g.leave(c.over, 1, reading)
}

// leave gives back what the caller holds: places among the open connections,
// among those being read, or both.
func (g *gate) leave(over via, open, reading int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := &g.places[over]
	p.open -= open
	p.reading -= reading
	if p.open < 0 || p.reading < 0 {
		panic(fmt.Sprintf("netx: more connections left than came: open %d, reading %d", p.open, p.reading))
	}
	g.nextLocked()
	g.change.Broadcast()
}

// dropAll closes the connections whose request is not handed over.
func (g *gate) dropAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.coming {
		_ = c.conn.Close()
	}
}

// close lets nobody in any more.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.change.Broadcast()
}

// drain waits until no request is on its way, or ctx is done.
func (g *gate) drain(ctx context.Context) error {
	stop := context.AfterFunc(ctx, g.wake)
	defer stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.coming) > 0 || g.readingLocked(overUnix)+g.readingLocked(overTCP) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		g.change.Wait()
	}
	return nil
}

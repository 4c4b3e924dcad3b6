package netx

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// closing is a connection that only knows whether it was closed.
type closing struct {
	net.Conn
	closed atomic.Bool
}

func (c *closing) Close() error { c.closed.Store(true); return nil }

// gateTest is a gate in a bubble of its own.
type gateTest struct {
	t *testing.T
	*gate
}

// come has one more connection come, if there is a place.
func (g gateTest) come(over via) *coming {
	g.t.Helper()
	got := make(chan bool, 1)
	go func() { got <- g.enter(over) }()
	synctest.Wait()
	select {
	case ok := <-got:
		if !ok {
			g.t.Fatal("the gate is closed")
		}
		return g.came(new(closing), over)
	default:
		g.t.Fatal("there is no place")
		return nil
	}
}

// asks has a connection ask to be read.
func (g gateTest) asks(c *coming) {
	go g.read(c, true)
	synctest.Wait()
}

func (c *coming) mayBeRead() bool {
	select {
	case <-c.turn:
		return true
	default:
		return false
	}
}

func TestGateLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gateTest{t, newGate(3, 2)}
		var c []*coming
		for range 3 {
			c = append(c, g.come(overUnix))
		}
		fourth := make(chan bool, 1)
		go func() { fourth <- g.enter(overUnix) }()
		for _, c := range c {
			g.asks(c)

		}
		for _, c := range c[:2] {
			g.enterStage(c, stageBody)
		}
		if !c[0].mayBeRead() || !c[1].mayBeRead() || c[2].mayBeRead() || len(fourth) > 0 {
			t.Fatal("not two are read, and three have come")
		}
		g.handed(c[0])
		g.leave(overUnix, 0, 1)
		synctest.Wait()
		if !c[2].mayBeRead() || len(fourth) > 0 {
			t.Fatal("one is parked, and the third is not read")
		}
		g.enterStage(c[2], stageBody)
		g.leave(overUnix, 1, 0)
		synctest.Wait()
		if len(fourth) != 1 {
			t.Fatal("one is answered, and no other may come")
		}
		if g.mostOpen != 3 || g.mostReading != 2 {
			t.Errorf("most open %d, most reading %d", g.mostOpen, g.mostReading)
		}

		refused := make(chan bool)
		go func() { refused <- !g.enter(overUnix) }()
		synctest.Wait()
		g.close()
		if !<-refused || g.enter(overUnix) {
			t.Error("a closed gate lets somebody in")
		}
		ctx, cancel := context.WithCancel(t.Context())
		drained := make(chan error)
		go func() { drained <- g.drain(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-drained; !errors.Is(err, context.Canceled) {
			t.Errorf("drain: %v", err)
		}
		go func() { drained <- g.drain(t.Context()) }()
		synctest.Wait()
		for _, c := range c[1:] {
			g.dropped(c)
		}
		if err := <-drained; err != nil {
			t.Errorf("drain: %v", err)
		}
	})
}

// Heads that do not come to an end, and what is refused, make room for whoever waits to
// be read; a body does not.
func TestGateSlowHeadsGiveWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gateTest{t, newGate(100, 3)}
		var slow []*coming
		for i := range 3 {
			c := g.come(overTCP)
			g.asks(c)
			g.enterStage(c, []comingStage{stageHead, stageBody, stageRefused}[i])
			slow = append(slow, c)
		}
		cut := func(i int) bool { return slow[i].conn.(*closing).closed.Load() }
		time.Sleep(time.Hour)
		if cut(0) || cut(2) {
			t.Fatal("one is cut, and nobody waits")
		}
		g.enterStage(slow[0], stageHead)
		first, second := g.come(overTCP), g.come(overTCP)
		g.asks(first)
		time.Sleep(headPatience / 2)
		synctest.Wait()
		if cut(0) || cut(1) || !cut(2) {
			t.Fatal("what is refused does not give way first")
		}
		g.dropped(slow[2])
		if !first.mayBeRead() {
			t.Fatal("its place is not given")
		}
		g.enterStage(first, stageBody)
		g.asks(second)
		time.Sleep(headPatience)
		synctest.Wait()
		if !cut(0) || cut(1) || first.conn.(*closing).closed.Load() || g.cuts != 2 {
			t.Fatal("not the slow head gives way")
		}
		g.dropped(slow[0])
		if !second.mayBeRead() {
			t.Fatal("its place is not given")
		}
		for _, c := range []*coming{slow[1], first, second} {
			g.dropped(c)
		}
	})
}

// When all places are in use, the connection that has been silent for longest makes room,
// if that is long; TCP leaves half of the places to unix sockets.
func TestGateSilentGiveWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gateTest{t, newGate(4, 2)}
		g.listen(overUnix, 1)
		g.listen(overTCP, 1)
		a := g.come(overTCP)
		time.Sleep(time.Second)
		b := g.come(overTCP)
		start := time.Now()
		got := make(chan bool, 1)
		go func() { got <- g.enter(overTCP) }()
		x, y := g.come(overUnix), g.come(overUnix) // at once
		time.Sleep(silentFor - time.Second - 1)
		synctest.Wait()
		if a.conn.(*closing).closed.Load() || len(got) > 0 {
			t.Fatal("one gives way too soon")
		}
		time.Sleep(1)
		synctest.Wait()
		if !a.conn.(*closing).closed.Load() || b.conn.(*closing).closed.Load() {
			t.Fatalf("not the oldest gives way after %v", time.Since(start))
		}
		g.dropped(a)
		synctest.Wait()
		if len(got) != 1 {
			t.Fatal("its place is not given")
		}
		g.failed(overTCP)

		// Of those in which a request is read TCP has half as well.
		g.asks(b)
		c := g.come(overTCP)
		g.asks(c)
		if !b.mayBeRead() || c.mayBeRead() {
			t.Fatal("TCP has more than half")
		}
		g.enterStage(b, stageBody)
		g.asks(x)
		if !x.mayBeRead() {
			t.Fatal("a unix socket waits for TCP")
		}
		g.enterStage(x, stageBody)
		g.dropped(b)
		if !c.mayBeRead() {
			t.Fatal("a place of TCP's is not given")
		}
		g.enterStage(c, stageBody)
		for _, c := range []*coming{c, x, y} {
			g.dropped(c)
		}
		time.Sleep(time.Second) // the timer ends
	})
}

// Connections that say nothing have no more than MaxComing of the places.
func TestGateBoundsWhatHasNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gateTest{t, newGate(2*MaxComing, 2)}
		for range MaxComing {
			g.come(overUnix)
		}
		start, last := time.Now(), make(chan bool, 1)
		go func() { last <- g.enter(overUnix) }()
		time.Sleep(silentFor)
		synctest.Wait()
		var cut []*coming
		for c := range g.coming {
			if c.cut {
				cut = append(cut, c)
			}
		}
		if len(cut) != 1 {
			t.Fatalf("none gives way after %v", time.Since(start))
		}
		g.dropped(cut[0])
		synctest.Wait()
		if len(last) != 1 {
			t.Fatal("its place is not given")
		}
		g.failed(overUnix)
		for c := range g.coming {
			g.handed(c)
		}
		if g.comingLocked(overUnix) != 0 {
			t.Error("places are lost")
		}
	})
}

// Of those that wait to be read, the ones whose head is there are first.
func TestGateWholeHeadsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gateTest{t, newGate(10, 1)}
		first, slow, whole := g.come(overTCP), g.come(overTCP), g.come(overTCP)
		g.asks(first)
		g.enterStage(first, stageBody)
		go g.read(slow, false)
		synctest.Wait()
		g.asks(whole)
		g.dropped(first)
		if slow.mayBeRead() || !whole.mayBeRead() {
			t.Fatal("a slow head comes first")
		}
		g.enterStage(whole, stageBody)
		g.dropped(whole)
		if !slow.mayBeRead() {
			t.Fatal("a slow head never comes")
		}
		g.dropped(slow)
		time.Sleep(time.Second) // the timer ends
	})
}

func TestGatePanicsWhenMoreLeaveThanCame(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	newGate(1, 1).leave(overUnix, 1, 0)
}

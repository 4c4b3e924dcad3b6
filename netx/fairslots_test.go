package netx

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestClientKey(t *testing.T) {
	for _, test := range [][2]string{
		{"203.0.113.5", "203.0.113.5"}, {"::ffff:203.0.113.5", "203.0.113.5"},
		{"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"}, {"2001:db8:1:2::9", "2001:db8:1:2::"},
	} {
		if got := clientKey(netip.MustParseAddr(test[0])); got.String() != test[1] {
			t.Errorf("%s: %v", test[0], got)
		}
	}
}

func TestMayTake(t *testing.T) {
	a := netip.MustParseAddr("203.0.113.1")
	for _, test := range []struct {
		key              netip.Addr
		own, used, limit int
		want             bool
	}{
		{a, 0, 0, 1, true}, {a, 0, 1, 1, false}, {a, 1, 1, 2, false},
		{a, 0, 15, 16, true}, {a, 0, 16, 16, false}, // the first for as long as there are any
		{a, 1, 12, 16, true}, {a, 1, 13, 16, false}, // the last three are not for who has one
		{a, 63, 63, 256, true}, {a, 64, 64, 256, false}, // alone a quarter
		{netip.Addr{}, 100, 223, 256, true}, {netip.Addr{}, 100, 224, 256, false}, {netip.Addr{}, 0, 224, 256, false},
		{netip.Addr{}, 0, 0, 1, true}, {netip.Addr{}, 1, 1, 1, false},
	} {
		if got := mayTake(test.key, test.own, test.used, test.limit); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
	// However many are greedy, somebody new finds a place, and at the end each of
	// them has about as many as the others.
	for clients := 1; clients <= 20; clients++ {
		const limit = 256
		own, used := make([]int, clients), 0
		for range limit {
			for i := range own {
				if mayTake(a, own[i], used, limit) {
					own[i]++
					used++
				}
			}
		}
		if want := clients * limit / (clients + 3); used < want || used > want+clients || !mayTake(a, 0, used, limit) {
			t.Errorf("%d clients hold %d, want %d", clients, used, want)
		}
		if most, fewest := slices.Max(own), slices.Min(own); most > fewest+1 {
			t.Errorf("of %d clients one holds %d and another one %d", clients, most, fewest)
		}
	}
}

// slotTest is a fairSlots in a bubble of its own.
type slotTest struct {
	t testing.TB
	*fairSlots
	until time.Time
}

func (s slotTest) acquire(ctx context.Context, key netip.Addr) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := s.fairSlots.acquire(ctx, key, s.until, func(time.Time) error { return nil })
		done <- err
	}()
	synctest.Wait()
	return done
}

// release gives one of a client's back, and lets those go on who get it.
func (s slotTest) release(key netip.Addr) {
	s.mu.Lock()
	var of *slot
	for t := range s.held {
		if t.key == key {
			of = t
		}
	}
	s.mu.Unlock()
	of.release()
	synctest.Wait()
}

func (s slotTest) got(c <-chan error) bool {
	s.t.Helper()
	select {
	case err := <-c:
		if err != nil {
			s.t.Error(err)
		}
		return true
	default:
		return false
	}
}

func TestFairSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c, d := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("203.0.113.3"), netip.MustParseAddr("203.0.113.4")
		nobody := netip.Addr{}
		s := slotTest{t, newFairSlots(8, 0), time.Now().Add(time.Minute)}
		ctx, cancel := context.WithCancel(t.Context())
		if !s.got(s.acquire(ctx, a)) || !s.got(s.acquire(ctx, a)) {
			t.Fatal("a has no share")
		}
		third, fourth := s.acquire(ctx, a), s.acquire(ctx, a)
		if s.got(third) || s.got(fourth) || !s.got(s.acquire(ctx, b)) {
			t.Fatal("a has more than its share, or b has to wait for it")
		}
		for range 4 {
			if !s.got(s.acquire(ctx, nobody)) {
				t.Fatal("the nameless have a share")
			}
		}
		nameless, late := s.acquire(t.Context(), nobody), s.acquire(t.Context(), b)
		if s.got(nameless) || s.got(late) || !s.got(s.acquire(ctx, c)) {
			t.Fatal("the last one is not for who has none")
		}
		newcomer := s.acquire(t.Context(), d)
		if s.got(newcomer) {
			t.Fatal("more slots than there are")
		}
		cancel()
		synctest.Wait()
		for _, gone := range []<-chan error{third, fourth} {
			if err := <-gone; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		s.release(nobody)
		if s.got(nameless) || s.got(late) || !s.got(newcomer) {
			t.Fatal("the newcomer does not get what is free")
		}
		s.release(c)
		if s.got(nameless) || s.got(late) {
			t.Fatal("the last one is taken")
		}
		s.release(nobody)
		if !s.got(nameless) || s.got(late) {
			t.Fatal("the nameless leave more than an eighth")
		}
		for i, key := range []netip.Addr{a, a, d} { // four free are more than three times one
			s.release(key)
			if s.got(late) != (i == 2) {
				t.Fatalf("b has another one with %d free, or not with 4", s.max-s.used)
			}
		}
		full := []netip.Addr{b, b, nobody, nobody, nobody}
		for s.used < s.max {
			key := netip.AddrFrom4([4]byte{198, 51, 100, byte(s.used)})
			if !s.got(s.acquire(t.Context(), key)) {
				t.Fatal("a free slot is not given")
			}
			full = append(full, key)
		}
		last := s.acquire(t.Context(), c)
		start := time.Now()
		if err := <-last; err != errNoSlot || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if s.used != 8 || s.most != 8 || s.waiting.Len() != 0 {
			t.Errorf("%d %d %d", s.used, s.most, s.waiting.Len())
		}
		for _, key := range full {
			s.release(key)
		}
		if s.used != 0 || len(s.by.clients) != 0 {
			t.Errorf("%d %v", s.used, s.by.clients)
		}
	})
}

// What becomes free is for the one who holds fewest, not for the one who has waited
// for longest; among equals it is.
func TestFairSlotsFewestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nobody, a, b := netip.Addr{}, netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
		s := slotTest{t, newFairSlots(4, 0), time.Now().Add(time.Minute)}
		for range 4 {
			if !s.got(s.acquire(t.Context(), nobody)) {
				t.Fatal("they are free")
			}
		}
		waiting := []<-chan error{s.acquire(t.Context(), nobody), s.acquire(t.Context(), nobody), s.acquire(t.Context(), a), s.acquire(t.Context(), b)}
		for _, next := range []int{2, 3, 0, 1} {
			s.release(nobody)
			for i, w := range waiting {
				if s.got(w) != (i == next) {
					t.Fatalf("%d instead of %d", i, next)
				}
			}
		}
		for _, key := range []netip.Addr{a, b, nobody, nobody} {
			s.release(key)
		}
	})
}

// While somebody waits, the slowest body gives its slot, if it is slower than the least
// rate; once somebody has waited for long, the slowest of those that have theirs for long.
func TestFairSlotsTheSlowestGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 1000
		s := newFairSlots(4, rate)
		var held []*slot
		cut := make([]bool, 4)
		for i := range 4 {
			key := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
			got, err := s.acquire(t.Context(), key, time.Now().Add(time.Hour), func(d time.Time) error {
				cut[i] = cut[i] || !d.After(time.Now())
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, got)
		}
		move := func(perSecond ...int64) {
			for t := range s.held {
				n := int64(9 * rate) // of those that waited
				if i := slices.Index(held, t); i >= 0 {
					n = perSecond[i]
				}
				_ = t.progress(t.moved+n, time.Time{})
			}
			time.Sleep(time.Second)
		}
		move(5*rate, 2*rate, 100, 99)
		if slices.Contains(cut, true) {
			t.Fatal("one is cut, and nobody waits")
		}
		waiting := slotTest{t, s, time.Now().Add(time.Hour)}
		first := waiting.acquire(t.Context(), netip.MustParseAddr("198.51.100.1"))
		move(5*rate, 2*rate, 100, 0)
		if !slices.Equal(cut, []bool{false, false, false, true}) {
			t.Fatalf("not the slowest one: %v", cut)
		}
		held[3].release()
		synctest.Wait()
		if !waiting.got(first) || s.cuts != 1 || s.cutting != 0 {
			t.Fatalf("%d cuts, %d under way", s.cuts, s.cutting)
		}
		held = held[:3]

		// A client has no more than its share by it.
		again := waiting.acquire(t.Context(), netip.MustParseAddr("198.51.100.1"))
		move(5*rate, 2*rate, 100)
		if cut[2] {
			t.Fatal("one is cut for a client that has its share")
		}
		move(5*rate, 2*rate, 6*rate) // fast enough now
		second := waiting.acquire(t.Context(), netip.MustParseAddr("198.51.100.2"))
		for range 3 {
			move(5*rate, 2*rate, 2*rate)
		}
		if cut[2] || cut[1] || cut[0] {
			t.Fatalf("a fast one is cut at once: %v", cut)
		}
		for range 8 {
			move(5*rate, 2*rate, 2*rate)
		}
		if !cut[2] || cut[1] || cut[0] {
			t.Fatalf("the slowest does not give way after long: %v", cut)
		}
		for _, h := range held {
			h.release()
		}
		synctest.Wait()
		if !waiting.got(second) || waiting.got(again) {
			t.Error("not the one that has fewer is next")
		}
		waiting.release(netip.MustParseAddr("198.51.100.2"))
		waiting.release(netip.MustParseAddr("198.51.100.1"))
		if !waiting.got(again) || s.cuts != 2 || s.cutting != 0 {
			t.Errorf("%d cuts, %d under way", s.cuts, s.cutting)
		}
	})
}

func TestSharesCountSites(t *testing.T) {
	s := newShares()
	a, b, v4 := netip.MustParseAddr("2001:db8:1:1::"), netip.MustParseAddr("2001:db8:1:2::"), netip.MustParseAddr("203.0.113.1")
	s.add(a, 1)
	s.add(b, 6)
	s.add(v4, 3)
	for key, want := range map[netip.Addr]int{a: 4, b: 6, v4: 3, {}: 0, netip.MustParseAddr("2001:db8:1:3::"): 4, netip.MustParseAddr("2001:db8:2:1::"): 0} {
		if got := s.weight(key); got != want {
			t.Errorf("%v: %d, want %d", key, got, want)
		}
	}
	s.add(a, -1)
	s.add(b, -6)
	s.add(v4, -3)
	if len(s.clients)+len(s.sites) != 0 {
		t.Errorf("%+v", s)
	}
}

package sched

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if n := Panics(); n != wantPanics && code == 0 {
		fmt.Printf("%d jobs panicked in pools, %d were meant to\n", n, wantPanics)
		code = 1
	}
	os.Exit(code)
}

var wantPanics int64 // panics that tests cause on purpose

func TestParseBytes(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Bytes
		out  string // what String gives, "" if the same as in
	}{
		{"0", 0, ""}, {"1B", 1, ""}, {"64MiB", 64 * MiB, ""}, {"1GiB", GiB, ""}, {"1536KiB", 1536 * KiB, ""},
		{"1024KiB", MiB, "1MiB"}, {"64 MiB", 64 * MiB, "64MiB"}, {"0B", 0, "0"}, {"8191GiB", 8191 * GiB, ""},
	} {
		got, err := ParseBytes(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("ParseBytes(%q) = %d, %v; want %d", tt.in, got, err, tt.want)
		}
		if out := cmp.Or(tt.out, tt.in); got.String() != out {
			t.Errorf("ParseBytes(%q).String() = %q, want %q", tt.in, got, out)
		}
	}
	for _, in := range []string{"", "64", "-1B", "+1B", "1.5MiB", "64MB", "64mib", "MiB", "9223372036854775807GiB", "9223372036854775808B", "1 KiB MiB"} {
		if got, err := ParseBytes(in); !errors.Is(err, ErrBytes) {
			t.Errorf("ParseBytes(%q) = %d, %v; want ErrBytes", in, got, err)
		}
	}
}

func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"0", "64MiB", "9223372036854775807B", "-0B", "1GiB "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := ParseBytes(s)
		if err != nil {
			return
		}
		if back, err := ParseBytes(b.String()); b < 0 || err != nil || back != b {
			t.Errorf("ParseBytes(%q) = %d, written as %q, read as %d, %v", s, b, b, back, err)
		}
	})
}

func TestGaugePanicsOnAReturnTooMany(t *testing.T) {
	g := Gauge{Limit: 2}
	g.Take()
	g.Take()
	if g.Free() != 0 || g.Used != 2 || g.Max != 2 {
		t.Fatalf("after two of two: %+v", g)
	}
	g.Take() // over the limit, as after the limit was lowered
	if g.Free() != 0 {
		t.Fatalf("over the limit, %d are free", g.Free())
	}
	g.Give()
	g.Give()
	g.Give()
	defer func() {
		if recover() == nil {
			t.Error("a slot that nobody took was given back without a panic")
		}
	}()
	g.Give()
}

// Timers must agree with a sorted list, whatever is set and stopped.
func TestTimersAgreeWithASortedList(t *testing.T) {
	type entry struct {
		at  Time
		seq int
		tm  *Timer[int]
	}
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 0))
		var timers Timers[int]
		var model []entry
		now, seq := Time(0), 0
		for range 500 {
			switch rng.IntN(4) {
			case 0, 1:
				seq++
				at := now + Time(rng.IntN(20))
				model = append(model, entry{at, seq, timers.Set(at, seq)})
			case 2:
				if len(model) > 0 {
					i := rng.IntN(len(model))
					timers.Stop(model[i].tm)
					timers.Stop(model[i].tm) // twice is harmless
					model = slices.Delete(model, i, i+1)
				}
			case 3:
				now += Time(rng.IntN(10))
				for {
					got, ok := timers.Due(now)
					slices.SortFunc(model, func(a, b entry) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.seq, b.seq)) })
					want := len(model) > 0 && model[0].at <= now
					if ok != want || ok && got != model[0].seq {
						t.Fatalf("seed %d: Due(%d) = %d, %t; the list begins with %+v", seed, now, got, ok, model[:min(1, len(model))])
					}
					if !ok {
						break
					}
					model = model[1:]
				}
			}
			if timers.Len() != len(model) {
				t.Fatalf("seed %d: %d timers, %d in the list", seed, timers.Len(), len(model))
			}
		}
	}
}

func TestFIFOAgreesWithASlice(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 0))
		var q FIFO[int]
		var model []int
		for i := range 2000 {
			switch n := rng.IntN(11); {
			case n == 10:
				peek, ok1 := q.PeekBack()
				got, ok2 := q.PopBack()
				if ok1 != ok2 || ok1 != (len(model) > 0) || ok1 && (peek != got || got != model[len(model)-1]) {
					t.Fatalf("seed %d: PeekBack %d %t, PopBack %d %t, want the last of %v", seed, peek, ok1, got, ok2, model)
				}
				model = model[:max(0, len(model)-1)]
			case n < 4:
				q.Push(i)
				model = append(model, i)
			case n < 5:
				q.PushFront(i)
				model = append([]int{i}, model...)
			default:
				peek, ok1 := q.Peek()
				got, ok2 := q.Pop()
				if ok1 != ok2 || ok1 != (len(model) > 0) || ok1 && (peek != got || got != model[0]) {
					t.Fatalf("seed %d: Peek %d %t, Pop %d %t, want the first of %v", seed, peek, ok1, got, ok2, model)
				}
				if ok1 {
					model = model[1:]
				}
			}
			if q.Len() != len(model) {
				t.Fatalf("seed %d: length %d, want %d", seed, q.Len(), len(model))
			}
		}
	}
}

func TestFIFOShrinks(t *testing.T) {
	var q FIFO[int]
	for i := range 100_000 {
		q.Push(i)
	}
	for range 99_990 {
		q.Pop()
	}
	if len(q.ring) > 256 {
		t.Errorf("10 elements hold a ring of %d", len(q.ring))
	}
}

func TestStrideSharesByWeight(t *testing.T) {
	s := NewStride([]int32{1, 2, 5})
	var turns [3]int
	for range 8000 {
		turns[s.Pick(0b111)]++
	}
	for i, want := range []int{1000, 2000, 5000} {
		if d := turns[i] - want; d < -3 || d > 3 {
			t.Errorf("class %d of weights 1, 2, 5 had %d of 8,000 turns, want %d", i, turns[i], want)
		}
	}
	if got := s.Pick(0); got != -1 {
		t.Errorf("nobody wants a turn, but %d gets it", got)
	}
}

// A class that was away neither owes nor owns turns.
func TestStrideSavesNothingUp(t *testing.T) {
	s := NewStride([]int32{1, 1})
	for range 1000 {
		s.Pick(0b01)
	}
	var turns [2]int
	for range 100 {
		turns[s.Pick(0b11)]++
	}
	if turns[0] < 49 || turns[1] < 49 {
		t.Errorf("after 1,000 turns of class 0 alone, the next 100 are shared %v", turns)
	}
}

func TestBackoffStaysWithinItsBounds(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	b := Backoff{First: 5 * time.Second, Factor: 3, Cap: time.Hour}
	for failures := int32(-1); failures < 100; failures++ {
		mid := 5 * time.Second.Seconds() * math.Pow(3, float64(failures-1))
		for range 20 {
			got := b.Delay(failures, rng)
			switch {
			case failures < 1:
				if got != 0 {
					t.Fatalf("after %d failures: %s", failures, got)
				}
			case got > b.Cap, got.Seconds() < 0.79*min(mid, 3600) || got.Seconds() > 1.21*mid:
				t.Fatalf("after %d failures: %s, want about %.0f s and at most %s", failures, got, mid, b.Cap)
			}
		}
	}
	if got := (Backoff{}).Delay(3, rng); got != 0 {
		t.Errorf("no back-off gives %s", got)
	}
}

func TestPoolRunsEachJobOnceOnAFixedNumberOfGoroutines(t *testing.T) {
	const size, jobs = 4, 1000
	var mu sync.Mutex
	running, most, ran := 0, 0, map[int]int{}
	gate := make(chan struct{})
	p := NewPool(size, jobs, func(j int) {
		mu.Lock()
		running++
		most = max(most, running)
		ran[j]++
		mu.Unlock()
		<-gate
		mu.Lock()
		running--
		mu.Unlock()
	}, func(int, error) { t.Error("a job panicked") })
	for j := range jobs {
		p.Submit(j)
	}
	close(gate)
	p.Close(t.Context())
	if most > size || len(ran) != jobs {
		t.Errorf("%d jobs at a time on %d goroutines, %d of %d ran", most, size, len(ran), jobs)
	}
	for j, n := range ran {
		if n != 1 {
			t.Errorf("job %d ran %d times", j, n)
		}
	}
}

func TestPoolEndsAJobThatPanics(t *testing.T) {
	wantPanics++
	var got error
	p := NewPool(1, 1, func(int) { panic("told to") }, func(j int, err error) { got = fmt.Errorf("job %d: %w", j, err) })
	p.Submit(7)
	p.Close(t.Context())
	if got == nil || !strings.Contains(got.Error(), "job 7: panic in a worker: told to") {
		t.Errorf("the job ended with %v", got)
	}
}

func TestPoolPanicsWhenItIsGivenTooMuch(t *testing.T) {
	gate := make(chan struct{})
	p := NewPool(1, 2, func(int) { <-gate }, nil)
	defer p.Close(t.Context())
	defer close(gate)
	defer func() {
		if recover() == nil {
			t.Error("a fourth job for one goroutine and a queue of two was taken")
		}
	}()
	for j := range 4 {
		p.Submit(j)
	}
}

// echo answers each event with itself, and wakes up every second.
type echo struct {
	next  Time
	ticks int
}

func (e *echo) Step(now Time, ev string, out []string) []string {
	if ev == "tick" {
		e.ticks++
	}
	e.next = now.Add(time.Second)
	return append(out, ev)
}

func (e *echo) NextWake() (Time, bool) { return e.next, e.ticks < 3 }

func TestLoopStepsInOrderAndWakesInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		m := &echo{}
		var seen []string
		clock := NewClock()
		l := NewLoop(m, clock.Now, "tick", 10, func(out []string) { seen = append(seen, out...) })
		done := make(chan struct{})
		go func() { l.Run(ctx); close(done) }()
		start := time.Now()
		for _, ev := range []string{"a", "b", "c"} {
			l.Post(ev)
		}
		time.Sleep(10 * time.Second) // of the bubble's clock
		if err := l.Call(ctx, func() {
			if got := strings.Join(seen, " "); got != "a b c tick tick tick" {
				t.Errorf("seen %q", got)
			}
		}); err != nil {
			t.Error(err)
		}
		if got := m.next.Sub(Time(start.UnixNano())); got != 4*time.Second {
			t.Errorf("the third tick came so that the next would be %s after the start, want 4s", got)
		}
		cancel()
		<-done
		if err := l.Call(ctx, func() {}); !errors.Is(err, context.Canceled) {
			t.Errorf("Call after the end: %v", err)
		}
	})
}

func TestTimeKeepsWallMilliseconds(t *testing.T) {
	for _, ms := range []int64{0, 1, 1_800_000_000_000} {
		if got := FromStored(ms).Stored(); got != ms {
			t.Errorf("%d ms become %d", ms, got)
		}
	}
	at := FromStored(1_800_000_000_000)
	if !at.Std().Equal(time.UnixMilli(1_800_000_000_000)) || at.Add(time.Second).Sub(at) != time.Second || !at.Before(at+1) {
		t.Errorf("%v", at.Std())
	}
}

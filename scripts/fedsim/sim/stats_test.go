package sim

import (
	"fmt"
	"testing"
	"time"
)

func TestWindowFindsTheFullestSecond(t *testing.T) {
	const limit = 100
	var w window
	for _, ms := range []int{0, 400, 999, 1000, 1399, 5000} { // fullest: 400 to 1399
		w.add(time.Duration(ms)*time.Millisecond, limit)
	}
	if w.max != 4 {
		t.Errorf("max %d, want 4", w.max)
	}
	for range 10 * limit {
		w.add(6*time.Second, limit)
	}
	if w.max != limit || len(w.times) != limit {
		t.Errorf("max %d, ring of %d: want both at the limit %d", w.max, len(w.times), limit)
	}
}

func TestMemoryForgetsTheOldest(t *testing.T) {
	var m memory
	for key := range uint64(5) {
		if _, known := m.add(key, key+100, 4); known {
			t.Errorf("key %d is known before it was added", key)
		}
	}
	if v, known := m.add(1, 7, 4); !known || v != 101 {
		t.Errorf("key 1: %d, %v; want its first value", v, known)
	}
	if _, known := m.add(0, 0, 4); known {
		t.Error("the oldest key is still known")
	}
	if len(m.entries) != 4 {
		t.Errorf("%d entries, want 4", len(m.entries))
	}
}

func TestRecorderSeesOverlappingTransactions(t *testing.T) {
	r, a, b := newRecorder(), &server{}, &server{}
	r.begin(a, sendEndpoint)
	r.begin(b, sendEndpoint)
	if s := r.snapshot().Transactions; s.MaxInFlightPerServer != 1 || s.ServersOverOne != 0 {
		t.Errorf("one for each of two servers: %+v", s)
	}
	r.begin(a, sendEndpoint)
	r.begin(a, sendEndpoint)
	s := r.snapshot()
	if s.Transactions.MaxInFlightPerServer != 3 || s.Transactions.ServersOverOne != 1 || s.MaxInFlight != 4 {
		t.Errorf("three for one server, one for the other: %+v", s)
	}
	for range 3 {
		r.end(a, sendEndpoint, "200")
	}
	if s := r.server(a); s.SendInFlight != 0 || s.MaxSendInFlight != 3 || s.Requests != 3 {
		t.Errorf("server: %+v", s)
	}
}

func TestResetKeepsWhatIsUnderWay(t *testing.T) {
	r, s := newRecorder(), &server{}
	r.opened(s, 1)
	r.opened(s, 1)
	r.opened(s, -1)
	r.begin(s, sendEndpoint)
	r.begin(s, "version")
	r.end(s, "version", "200")
	r.taken(s, []string{"$a"}, 0, []string{"m.typing"})
	r.reset([]*server{s})
	got := r.snapshot()
	if got.Requests != 0 || got.InFlight != 1 || got.MaxInFlight != 1 ||
		got.Connections.Accepted != 0 || got.Connections.Open != 1 ||
		got.Transactions.Count != 0 || got.Transactions.MaxInFlightPerServer != 1 ||
		len(got.EDUs) != 0 || len(got.Events) != 0 || len(got.Endpoints) != 1 {
		t.Errorf("after reset: %+v", got)
	}
	r.end(s, sendEndpoint, "200")
	r.opened(s, -1)
	if got := r.snapshot(); got.InFlight != 0 || got.Connections.Open != 0 || got.Endpoints[sendEndpoint].Outcomes["200"] != 1 {
		t.Errorf("after the end of all: %+v", got)
	}
}

func TestRecorderIsBounded(t *testing.T) {
	r, s := newRecorder(), &server{}
	for i := range 2 * maxEvents {
		r.taken(s, []string{fmt.Sprint("$", i)}, 0, []string{fmt.Sprint("type", i)})
	}
	got := r.snapshot()
	if len(got.Events) != maxEvents || got.Events[0].ID != fmt.Sprint("$", maxEvents) {
		t.Errorf("%d events, the first %q", len(got.Events), got.Events[0].ID)
	}
	if len(got.EDUs) != maxEDUTypes+1 || got.EDUs[otherName] != 2*maxEvents-maxEDUTypes {
		t.Errorf("%d EDU types, %d others", len(got.EDUs), got.EDUs[otherName])
	}
}

func TestDelayIsSeeded(t *testing.T) {
	world := func(seed uint64) *World {
		return &World{config: Config{Seed: seed, Latency: time.Second, Jitter: time.Second, SlowDelay: time.Minute}}
	}
	one, same, other := &server{world: world(1)}, &server{world: world(1)}, &server{world: world(2)}
	differ := false
	for range 100 {
		d := one.delay()
		if d < time.Second || d > 2*time.Second {
			t.Fatalf("delay %v is not within latency and jitter", d)
		}
		if got := same.delay(); got != d {
			t.Fatalf("delays %v and %v with the same seed", d, got)
		}
		differ = differ || other.delay() != d
	}
	if !differ {
		t.Error("another seed gives the same delays")
	}
	one.kind.Store(uint32(Slow))
	if d := one.delay(); d < time.Minute+time.Second {
		t.Errorf("a slow server takes %v", d)
	}
}

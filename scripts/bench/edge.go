package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
	"fsbus/scripts/rig"
)

// edgeRoom is the room of all events that are sent to the edge.
const edgeRoom = "!room:example.org"

// edgeField is a federation that sends to our homeserver, which is a stub, with an
// fsbus before it.
type edgeField struct {
	*rig.Federation
	stub   *rig.Stub
	cert   *rig.Certificate
	listen string // of the edge
	bus    *rig.Bus

	dir   string
	fsbus []string
}

// edgeField starts the servers and the stub, which checks who signs if verify is
// set. There is no bus yet.
func (b *bench) edgeField(servers int, verify bool, stub rig.StubConfig) (f *edgeField, err error) {
	f = &edgeField{fsbus: b.fsbus}
	if f.dir, err = b.folder(); err != nil {
		return nil, err
	}
	if f.listen, err = rig.FreeAddress(); err != nil {
		return nil, err
	}
	if f.Federation, err = rig.NewFederation(f.dir, sim.Config{Servers: servers, Seed: 1}); err != nil {
		return nil, err
	}
	stub.Name = f.From.Name
	if verify {
		stub.Keys = make(map[matrix.ServerName]ed25519.PublicKey, servers)
		for i, name := range f.Names() {
			stub.Keys[name] = f.SigningKey(i).Public()
		}
	}
	if f.stub, err = rig.StartStub(stub); err == nil {
		f.cert, err = rig.NewCertificate(f.dir, f.From.Name)
	}
	if err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

// start starts a bus, with what the last one has left on disk.
func (f *edgeField) start(ctx context.Context, settings map[string]string) error {
	all := rig.EdgeSettings(f.listen, f.cert, f.stub)
	maps.Copy(all, settings)
	bus, err := rig.StartBus(ctx, f.dir, f.fsbus, f.Federation, all)
	if err != nil {
		return err
	}
	f.bus = bus
	return nil
}

// stop ends the bus, if there is one.
func (f *edgeField) stop() error {
	if f.bus == nil {
		return nil
	}
	bus := f.bus
	f.bus = nil
	if err := bus.Running(); err != nil {
		return err
	}
	return bus.Stop(30 * time.Second)
}

func (f *edgeField) close() error {
	err := f.stop()
	if f.stub != nil {
		f.stub.Close()
	}
	f.Close()
	return err
}

// target is where the edge is.
func (f *edgeField) target() rig.Target { return rig.Target{Address: f.listen, Roots: f.cert.Roots} }

// direct is where the stub is.
func (f *edgeField) direct() rig.Target { return rig.Target{Address: f.stub.Address} }

// sender returns the connections of server i.
func (f *edgeField) sender(t rig.Target, i, idle int) *rig.Sender {
	return rig.NewSender(t, rig.OriginAddress(i), idle)
}

// learnKeys lets a bus learn the keys of all servers and stops it: a bus that has
// run for days knows whom it hears from, and key_fetches would stretch that here
// over minutes.
func (f *edgeField) learnKeys(ctx context.Context) error {
	const atOnce = 64
	err := f.start(ctx, map[string]string{
		"memory_limit":                   rig.Text("256MiB"),
		"outbound.handshakes_per_second": "10000.0",
		"edge.key_fetches":               "100000",
		"edge.no_key":                    rig.Text("refuse"),
		"edge.origins":                   strconv.Itoa(len(f.Names()) + 2000),
	})
	if err != nil {
		return err
	}
	var ends ends
	parallel(atOnce, len(f.Names()), func(i int) {
		s := f.sender(f.target(), i, 1)
		defer s.Close()
		ends.add(s.Do(ctx, rig.Sign(f.Origin(i), fedload.Lookup(f.From.Name, "user"))), 0)
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if ends.failed() > 0 {
		return fmt.Errorf("the first request of each server: %v", &ends)
	}
	f.stub.Reset()
	return f.stop()
}

// parallel calls each for 0 to n-1, some at a time.
func parallel(atOnce, n int, each func(i int)) {
	next := make(chan int)
	var running sync.WaitGroup
	for range min(atOnce, n) {
		running.Go(func() {
			for i := range next {
				each(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	running.Wait()
}

// events returns a transaction of n new events.
func (f *edgeField) events(from fedload.Homeserver, id string, n int) *rig.Signed {
	now := time.Now()
	pdus := make([]json.RawMessage, n)
	for i := range pdus {
		pdus[i] = from.Message("user", edgeRoom, fmt.Sprint(id, " ", i), 1, now)
	}
	return rig.Sign(from, fedload.Send(from.Name, f.From.Name, id, now, pdus, nil))
}

// presence returns a transaction of one user's presence.
func (f *edgeField) presence(from fedload.Homeserver, id string) *rig.Signed {
	edus := []json.RawMessage{from.Presence("user", "online", id)}
	return rig.Sign(from, fedload.Send(from.Name, f.From.Name, id, time.Now(), nil, edus))
}

// toDevice returns a transaction of one to-device message.
func (f *edgeField) toDevice(from fedload.Homeserver, id string) *rig.Signed {
	edus := []json.RawMessage{from.ToDevice("user", "@alice:"+string(f.From.Name), id)}
	return rig.Sign(from, fedload.Send(from.Name, f.From.Name, id, time.Now(), nil, edus))
}

// ends counts how requests ended. The zero value has none.
type ends struct {
	mu    sync.Mutex
	took  fedload.Histogram // those that were answered 200, with what they were late
	other fedload.Histogram // those that were answered otherwise
	count map[string]int64  // by status, or why there was none
}

// add counts a request that was sent so much later than it should have been.
func (e *ends) add(res fedload.Result, late time.Duration) {
	how := strconv.Itoa(res.Status)
	if res.Err != nil {
		how = rig.Why(res.Err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.count == nil {
		e.count = make(map[string]int64)
	}
	e.count[how]++
	switch {
	case how == good:
		e.took.Add(late + res.Whole)
	case res.Err == nil:
		e.other.Add(late + res.Whole)
	}
}

// good is how a request should end.
const good = "200"

func (e *ends) all() (n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.count {
		n += c
	}
	return n
}

func (e *ends) of(how string) int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.count[how]
}

// failed returns how many were not answered 200.
func (e *ends) failed() int64 { return e.all() - e.of(good) }

// unanswered returns how many got no answer at all.
func (e *ends) unanswered() (n int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for how, c := range e.count {
		if _, err := strconv.Atoi(how); err != nil {
			n += c
		}
	}
	return n
}

// String lists the ends, the most frequent first.
func (e *ends) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	hows := slices.SortedFunc(maps.Keys(e.count), func(a, b string) int {
		if c := int(e.count[b] - e.count[a]); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	parts := make([]string, len(hows))
	for i, how := range hows {
		parts[i] = fmt.Sprintf("%s: %s", how, rig.Count(e.count[how]))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

// addTimes notes the times of what was answered.
func (b *bench) addTimes(name string, h *fedload.Histogram) {
	b.result.add(name+", p50", "ms", milliseconds(h.Percentile(50)))
	b.result.add(name+", p99", "ms", milliseconds(h.Percentile(99)))
	b.result.add(name+", longest", "ms", milliseconds(h.Max()))
}

// counts shows labelled counters that are not zero.
func counts(of map[string]float64) string {
	var parts []string
	for _, label := range slices.Sorted(maps.Keys(of)) {
		if v := of[label]; v != 0 {
			_, value, _ := strings.Cut(label, "=")
			parts = append(parts, fmt.Sprintf("%s %s", strings.Trim(value, `"`), rig.Count(int64(v))))
		}
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

// watch looks at the bus until wait is called, which returns the most that was seen.
// each, which may be nil, gets every look, one after the other.
func (f *edgeField) watch(ctx context.Context, each func(rig.Sample)) (wait func() (*rig.Peaks, error)) {
	ctx, cancel := context.WithCancel(ctx)
	var (
		peaks   *rig.Peaks
		err     error
		watcher sync.WaitGroup
		bus     = f.bus
	)
	watcher.Go(func() { peaks, err = bus.Watch(ctx, 500*time.Millisecond, each) })
	return func() (*rig.Peaks, error) {
		last, lastErr := bus.Sample(context.WithoutCancel(ctx))
		cancel()
		watcher.Wait()
		if lastErr == nil {
			peaks.Add(last)
		}
		return peaks, errors.Join(err, lastErr)
	}
}

// until waits for a moment and reports whether ctx is still well.
func until(ctx context.Context, t time.Time) bool {
	timer := time.NewTimer(time.Until(t))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func isOK(res fedload.Result) bool { return res.Err == nil && res.Status == http.StatusOK }

package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

var errInjected = errors.New("injected")

// gate holds the writer at an Op that it is armed for, and decides its result.
type gate struct {
	op      Op
	entered chan struct{} // sent to when the writer has arrived
	leave   chan error    // received from: what the operation is to return

	mu    sync.Mutex
	armed bool
	skip  int // occurrences to let pass first
}

func newGate(op Op) *gate {
	return &gate{op: op, entered: make(chan struct{}), leave: make(chan error)}
}

func (g *gate) arm(skip int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.armed, g.skip = true, skip
}

// fault is an Options.Fault.
func (g *gate) fault(op Op) error {
	if op != g.op || !g.pass() {
		return nil
	}
	g.entered <- struct{}{}
	return <-g.leave
}

func (g *gate) pass() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.armed || g.skip > 0 {
		g.skip--
		return false
	}
	g.armed = false
	return true
}

// hold submits an empty batch and returns when the writer is held at it, so
// that what is submitted next gathers behind it.
func (g *gate) hold(t *testing.T, s *Store) {
	t.Helper()
	g.arm(0)
	if err := s.Submit(&Batch{}, func(error) {}); err != nil {
		t.Fatal(err)
	}
	<-g.entered
}

// both is an Options.Fault that asks one gate after the other.
func both(a, b *gate) func(Op) error {
	return func(op Op) error {
		if err := a.fault(op); err != nil {
			return err
		}
		return b.fault(op)
	}
}

// recorder collects completions. The writer alone calls done, one at a time,
// so there is no lock: the race detector would see a second goroutine.
type recorder struct {
	order []int
	errs  []error
	wg    sync.WaitGroup
}

func (r *recorder) submit(t *testing.T, s *Store, i int, b *Batch) {
	t.Helper()
	r.wg.Add(1)
	if err := s.Submit(b, func(err error) {
		r.order = append(r.order, i)
		r.errs = append(r.errs, err)
		r.wg.Done() // a second completion panics here
	}); err != nil {
		t.Fatal(err)
	}
}

func (r *recorder) want(t *testing.T, n int, err error) {
	t.Helper()
	r.wg.Wait()
	if len(r.order) != n {
		t.Fatalf("%d completions, want %d", len(r.order), n)
	}
	for i := range n {
		if r.order[i] != i || !errors.Is(r.errs[i], err) {
			t.Fatalf("completion %d is of batch %d with %v, want %v", i, r.order[i], r.errs[i], err)
		}
	}
}

func TestConcurrentSubmitsShareOneCommit(t *testing.T) {
	const n = 500
	g := newGate(OpBegin)
	s := open(t, Options{Path: newPath(t), Fault: g.fault})
	g.hold(t, s)
	var started, completed sync.WaitGroup
	completed.Add(n)
	for i := range n {
		started.Go(func() {
			if err := s.Submit(&Batch{Hosts: []Host{up(numbered("a", i))}}, func(err error) {
				if err != nil {
					t.Error(err)
				}
				completed.Done()
			}); err != nil {
				t.Error(err)
			}
		})
	}
	started.Wait()
	want(t, "queued", s.Stats().QueueLen, n)
	g.leave <- nil
	completed.Wait()
	st := s.Stats()
	want(t, "commits", st.Commits, int64(2)) // the held one and the group
	want(t, "batches", st.Batches, int64(n+1))
	want(t, "queue", [2]int64{int64(st.QueueLen), st.QueueBytes}, [2]int64{})
	want(t, "hosts", len(load(t, s, n+1)), n)
}

func TestGroupsAreBounded(t *testing.T) {
	big := up("a.test")
	big.Error = string(make([]byte, 300<<10)) // three to a MiB
	for _, c := range []struct {
		name          string
		maxGroup      int
		batch         Batch
		n, wantGroups int
	}{
		{"number", 10, Batch{Hosts: []Host{up("a.test")}}, 55, 6},
		{"bytes", 1000, Batch{Hosts: []Host{big}}, 7, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGate(OpBegin)
			s := open(t, Options{Path: newPath(t), Fault: g.fault, MaxGroup: c.maxGroup})
			g.hold(t, s)
			var r recorder
			for i := range c.n {
				r.submit(t, s, i, &c.batch)
			}
			g.leave <- nil
			r.want(t, c.n, nil)
			want(t, "commits", s.Stats().Commits, int64(1+c.wantGroups))
		})
	}
}

func TestFullQueueRefusesAtOnceAndRecovers(t *testing.T) {
	g := newGate(OpBegin)
	b := &Batch{Hosts: []Host{up("a.test")}}
	s := open(t, Options{Path: newPath(t), Fault: g.fault, QueueLen: 2, QueueBytes: 3 * b.size()})
	g.hold(t, s)
	var r recorder
	r.submit(t, s, 0, b)
	r.submit(t, s, 1, b)
	refused := func(error) { t.Error("a refused batch was completed") }
	wantErr(t, "number", s.Submit(b, refused), ErrQueueFull)
	wantErr(t, "bytes", s.Submit(&Batch{Hosts: make([]Host, 10)}, refused), ErrTooLarge)
	g.leave <- nil
	r.want(t, 2, nil)
	put(t, s, up("b.test"))
}

func TestAFailureFailsItsGroupAndNothingElse(t *testing.T) {
	for _, op := range []Op{OpBegin, OpCommit} {
		t.Run(string(op), func(t *testing.T) {
			gather, fail := newGate(OpBegin), newGate(op)
			s := open(t, Options{Path: newPath(t), Fault: both(gather, fail)})
			put(t, s, up("before.test"))
			for _, c := range []struct{ inject, want error }{
				{errInjected, errInjected},
				{fmt.Errorf("write: %w", syscall.EIO), syscall.EIO},
				{syscall.ENOSPC, ErrFull},
				{syscall.EDQUOT, ErrFull},
			} {
				gather.hold(t, s)
				var r recorder
				for i := range 20 {
					r.submit(t, s, i, &Batch{Hosts: []Host{up(numbered("lost", i))}})
				}
				fail.arm(1) // not at the batch that is held
				gather.leave <- nil
				<-fail.entered
				fail.leave <- c.inject
				r.want(t, 20, c.want)
			}
			put(t, s, up("after.test"))
			want(t, "hosts", names(load(t, s, 100)), []matrix.ServerName{"after.test", "before.test"})
			want(t, "failed", s.Stats().Failed, int64(80))
		})
	}
}

func TestOneBadBatchDoesNotFailItsNeighbours(t *testing.T) {
	path := newPath(t)
	g := newGate(OpBegin)
	s := open(t, Options{Path: path, Fault: g.fault})
	// A row that the schema refuses, as a constraint of a later table might.
	if err := openRaw(t, path).exec(t.Context(), `CREATE TRIGGER refuse BEFORE INSERT ON host WHEN new.name = 'refused.test'
		BEGIN SELECT RAISE(ABORT, 'refused'); END`); err != nil {
		t.Fatal(err)
	}
	g.hold(t, s)
	var errs []error
	var wg sync.WaitGroup
	for _, hosts := range [][]Host{
		{up("first.test")},
		{up("beside1.test"), up("")},
		{up("middle.test")},
		{up("beside2.test"), up("refused.test")},
		{up("last.test")},
	} {
		wg.Add(1)
		if err := s.Submit(&Batch{Hosts: hosts}, func(err error) { errs = append(errs, err); wg.Done() }); err != nil {
			t.Fatal(err)
		}
	}
	g.leave <- nil
	wg.Wait()
	for i, err := range errs {
		if bad := i == 1 || i == 3; bad != errors.Is(err, ErrInvalid) || !bad && err != nil {
			t.Errorf("batch %d: %v", i, err)
		}
	}
	want(t, "hosts", names(load(t, s, 10)), []matrix.ServerName{"last.test", "middle.test", "first.test"})
	st := s.Stats()
	want(t, "commits, batches, rows, failed", []int64{st.Commits, st.Batches, st.Rows, st.Failed}, []int64{2, 4, 3, 2})
	wantErr(t, "alone", submit(t, s, &Batch{Hosts: []Host{up("refused.test")}}), ErrInvalid)
}

func TestADiskThatFillsUpInTheSecondAttemptFailsTheGroup(t *testing.T) {
	gather, second := newGate(OpBegin), newGate(OpBegin)
	s := open(t, Options{Path: newPath(t), Fault: both(gather, second)})
	gather.hold(t, s)
	var r recorder
	for i, h := range []Host{up("a.test"), up("a.test"), up("a.test")} {
		r.submit(t, s, i, &Batch{Hosts: []Host{h, {Failures: int32(i - 1)}}}) // all are bad
	}
	second.arm(2) // the held batch, the first attempt
	gather.leave <- nil
	<-second.entered
	second.leave <- syscall.ENOSPC
	r.want(t, 3, ErrFull)
	put(t, s, up("a.test"))
}

func TestCloseStoresWhatIsQueued(t *testing.T) {
	path := newPath(t)
	g := newGate(OpBegin)
	s := open(t, Options{Path: path, Fault: g.fault, MaxGroup: 7})
	g.hold(t, s)
	var r recorder
	for i := range 50 {
		r.submit(t, s, i, &Batch{Hosts: []Host{up(numbered("a", i))}})
	}
	closed := make(chan error)
	go func() { closed <- s.Close(t.Context()) }()
	for s.Submit(&Batch{}, func(error) {}) != ErrClosed { // taken until Close has begun
	}
	g.leave <- nil
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	if len(r.order) != 50 {
		t.Fatalf("%d of 50 completions before Close returned", len(r.order))
	}
	r.want(t, 50, nil)
	if err := s.Close(t.Context()); err != nil {
		t.Errorf("second Close: %v", err)
	}
	wantErr(t, "Submit", s.Submit(&Batch{}, func(error) { t.Error("completed") }), ErrClosed)
	_, err := s.LoadHosts(t.Context(), 1)
	wantErr(t, "LoadHosts", err, ErrClosed)
	want(t, "hosts", len(load(t, open(t, Options{Path: path}), 100)), 50)
}

func TestCloseThatRunsOutOfTimeAbandonsTheQueue(t *testing.T) {
	path := newPath(t)
	g := newGate(OpCommit)
	s := open(t, Options{Path: path, Fault: g.fault})
	g.arm(0)
	var r, late recorder
	r.submit(t, s, 0, &Batch{Hosts: []Host{up("begun.test")}})
	<-g.entered
	for i := range 10 {
		late.submit(t, s, i, &Batch{Hosts: []Host{up("late.test")}})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, "Close", s.Close(ctx), context.Canceled)
	g.leave <- nil
	r.want(t, 1, nil)
	late.want(t, 10, ErrClosed)
	closeStore(t, s) // waits for the rest
	want(t, "hosts", names(load(t, open(t, Options{Path: path}), 10)), []matrix.ServerName{"begun.test"})
}

func TestCloseEmptiesTheLogWhileAShellIsOpen(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	put(t, s, up("a.test"))
	shell := openRaw(t, path)
	if _, err := value[int64](t.Context(), shell, "SELECT count(*) FROM host"); err != nil {
		t.Fatal(err)
	}
	if fileSize(path+"-wal") == 0 {
		t.Fatal("no log before Close")
	}
	closeStore(t, s)
	want(t, "log", fileSize(path+"-wal"), int64(0))
}

func TestAFailedCheckpointLosesNothing(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, Fault: func(op Op) error {
		if op == OpCheckpoint {
			return errInjected
		}
		return nil
	}})
	put(t, s, up("a.test"))
	wantErr(t, "Close", s.Close(t.Context()), errInjected)
	want(t, "hosts", names(load(t, open(t, Options{Path: path}), 10)), []matrix.ServerName{"a.test"})
}

func TestAFullDatabaseRefusesAndRecovers(t *testing.T) {
	path := newPath(t)
	var s *Store
	pages := make(chan int, 1) // a new limit for the writer's connection
	s = open(t, Options{Path: path, Fault: func(op Op) error {
		if op != OpBegin {
			return nil
		}
		select {
		case n := <-pages:
			return s.writer.conn.exec(context.Background(), fmt.Sprintf("PRAGMA max_page_count = %d", n))
		default:
			return nil
		}
	}})
	pages <- 8
	var stored []matrix.ServerName
	var err error
	for i := 0; err == nil; i++ {
		if i == 1000 {
			t.Fatal("never full")
		}
		h := up(numbered("a", i))
		h.Error = string(make([]byte, MaxErrorBytes))
		if err = submit(t, s, &Batch{Hosts: []Host{h}}); err == nil {
			stored = append([]matrix.ServerName{h.Name}, stored...)
		}
	}
	wantErr(t, "full", err, ErrFull)
	wantErr(t, "still full", submit(t, s, &Batch{Hosts: []Host{up("big.test"), {Name: "more.test", Error: string(make([]byte, 200))}}}), ErrFull)
	want(t, "hosts while full", names(load(t, s, 1000)), stored)
	put(t, s, Host{Name: stored[0]}) // changing a row needs no page
	if err := submit(t, s, &Batch{Forget: stored[1:]}); err != nil {
		t.Errorf("forgetting while full: %v", err)
	}
	pages <- 1 << 20
	put(t, s, someHosts...)
	want(t, "hosts", len(load(t, s, 1000)), 1+len(someHosts))
}

func TestAnotherWritersLockIsWaitedForAndReported(t *testing.T) {
	path := newPath(t)
	var s *Store
	impatient := make(chan struct{}, 1)
	s = open(t, Options{Path: path, Fault: func(op Op) error {
		select {
		case <-impatient: // the 5 s of production are too long for a test
			return s.writer.conn.exec(context.Background(), "PRAGMA busy_timeout = 10")
		default:
			return nil
		}
	}})
	shell := openRaw(t, path)
	if err := shell.exec(t.Context(), "BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	impatient <- struct{}{}
	err := submit(t, s, &Batch{Hosts: []Host{up("a.test")}})
	if err == nil || !strings.Contains(err.Error(), "begin: database is locked") {
		t.Errorf("error %v, want one about the lock", err)
	}
	if err := shell.exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	put(t, s, up("a.test"))
}

func TestTheLogIsCutBackAfterALargeBatch(t *testing.T) {
	s := open(t, Options{Path: newPath(t), MaxHosts: 50000, QueueBytes: 64 << 20})
	var b Batch
	for i := range 40000 {
		h := down(numbered("a", i))
		h.Error = strings.Repeat("x", MaxErrorBytes)
		b.Hosts = append(b.Hosts, h)
	}
	put(t, s, b.Hosts...)
	if size := s.Stats().WALBytes; size <= walLimit {
		t.Fatalf("the log has only %d bytes", size)
	}
	put(t, s, up("a.test"))
	if size := s.Stats().WALBytes; size > walLimit {
		t.Errorf("the log still has %d bytes, want at most %d", size, walLimit)
	}
}

// What comes within Linger of a commit shares the next one; after a pause nothing
// waits.
func TestLinger(t *testing.T) {
	s := open(t, Options{Path: t.TempDir() + "/db", Linger: time.Second})
	submit := func(n int) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range n {
			wg.Add(1)
			err := s.Submit(&Batch{Hosts: []Host{{Name: matrix.ServerName(fmt.Sprintf("h%d.test", i))}}}, func(err error) {
				if err != nil {
					t.Error(err)
				}
				wg.Done()
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
	}
	began := time.Now()
	submit(1)
	if took := time.Since(began); took >= time.Second {
		t.Errorf("the first took %v", took)
	}
	submit(10)
	if took := time.Since(began); took < time.Second {
		t.Errorf("the second began %v after the first", took)
	}
	if st := s.Stats(); st.Commits != 2 || st.Batches != 11 {
		t.Errorf("%d commits of %d batches, want 2 of 11", st.Commits, st.Batches)
	}
}

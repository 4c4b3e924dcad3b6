package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"
	"unsafe"

	"fsbus/bus/matrix"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(crashChildEnv); path != "" {
		crashChild(path)
	}
	if path := os.Getenv(crashOutboxEnv); path != "" {
		crashOutboxChild(path)
	}
	if path := os.Getenv(crashCacheEnv); path != "" {
		crashCacheChild(path)
	}
	os.Exit(m.Run())
}

// newPath returns where a test's store goes.
func newPath(t testing.TB) string {
	return filepath.Join(t.TempDir(), "data", "fsbus.db")
}

// open opens a store that is closed at the end of the test.
func open(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	return s
}

func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// submit stores b and returns its completion.
func submit(t testing.TB, s *Store, b *Batch) error {
	t.Helper()
	done := make(chan error, 1)
	if err := s.Submit(b, func(err error) { done <- err }); err != nil {
		t.Fatal(err)
	}
	return <-done
}

// put stores hosts that must be storable.
func put(t testing.TB, s *Store, hosts ...Host) {
	t.Helper()
	if err := submit(t, s, &Batch{Hosts: hosts}); err != nil {
		t.Fatal(err)
	}
}

func load(t testing.TB, s *Store, limit int) []Host {
	t.Helper()
	hosts, err := s.LoadHosts(t.Context(), limit)
	if err != nil {
		t.Fatal(err)
	}
	return hosts
}

func names(hosts []Host) []matrix.ServerName {
	var list []matrix.ServerName
	for _, h := range hosts {
		list = append(list, h.Name)
	}
	return list
}

// up is a host that does not fail, down one that does.
func up(name string) Host   { return Host{Name: matrix.ServerName(name), SucceededAt: 1} }
func down(name string) Host { return Host{Name: matrix.ServerName(name), Failures: 1, FailedAt: 1} }

func numbered(prefix string, i int) string { return fmt.Sprintf("%s%05d.test", prefix, i) }

func want(t testing.TB, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func wantErr(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: error %v, want %v", what, got, want)
	}
}

var someHosts = []Host{
	{
		Name: "down.example.org", Failures: 7, Failure: matrix.FailNoName, Error: "lookup down.example.org: no such host",
		FailingSince: 1763700000001, FailedAt: 1763703600002, RetryAt: 1763707200003,
	},
	{
		Name: "limited.example.org", Failures: 1, Status: 429, Error: "M_LIMIT_EXCEEDED",
		FailingSince: 1763700000005, FailedAt: 1763700000005, RetryAt: 1763700060006, SucceededAt: 1763699999007,
	},
	{Name: "up.example.org:8448", SucceededAt: 1763700000004},
}

func TestWhatWasStoredIsThereAfterReopening(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	put(t, s, someHosts[2], someHosts[0], someHosts[1])
	want(t, "before", load(t, s, 10), []Host{someHosts[1], someHosts[0], someHosts[2]})
	closeStore(t, s)
	if _, err := os.Lstat(path + "-wal"); err == nil {
		t.Error("the log is still there after Close")
	}

	s = open(t, Options{Path: path})
	want(t, "after", load(t, s, 10), []Host{someHosts[1], someHosts[0], someHosts[2]})
	changed := someHosts[0]
	changed.Failures, changed.Failure = 8, matrix.FailTLS
	if err := submit(t, s, &Batch{Hosts: []Host{changed}, Forget: []matrix.ServerName{"limited.example.org", "never.seen"}}); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)

	s = open(t, Options{Path: path})
	want(t, "after a change", load(t, s, 10), []Host{changed, someHosts[2]})
}

func TestABatchTakesEffectInTheOrderOfItsFields(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	b := &Batch{
		Hosts:  []Host{up("twice.test"), down("twice.test"), up("gone.test")},
		Forget: []matrix.ServerName{"gone.test"},
	}
	if err := submit(t, s, b); err != nil {
		t.Fatal(err)
	}
	want(t, "hosts", load(t, s, 10), []Host{down("twice.test")})
}

func TestStatsCountWhatWasDone(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, up("a.test"), up("b.test"))
	if err := submit(t, s, &Batch{Forget: []matrix.ServerName{"a.test", "c.test"}}); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "no name", submit(t, s, &Batch{Hosts: []Host{up("")}}), ErrInvalid)
	st := s.Stats()
	if st.LastCommit <= 0 || st.MaxCommit < st.LastCommit || st.FileBytes < pageSize || st.WALBytes <= 0 {
		t.Errorf("implausible: %+v", st)
	}
	st.LastCommit, st.MaxCommit, st.FileBytes, st.WALBytes = 0, 0, 0, 0
	want(t, "stats", st, Stats{Commits: 2, Batches: 2, Rows: 3, Failed: 1})
}

func TestOptionsAreChecked(t *testing.T) {
	if _, err := Open(t.Context(), Options{}); err == nil {
		t.Error("no path: no error")
	}
	path := newPath(t)
	for _, o := range []Options{
		{Path: path, CacheBytes: -1}, {Path: path, MaxGroup: -1}, {Path: path, QueueLen: -1},
		{Path: path, QueueBytes: -1}, {Path: path, MaxHosts: -1}, {Path: path, MaxAnswers: -1},
		{Path: path, MaxAnswerBytes: -1}, {Path: path, MaxKeys: -1}, {Path: path, MaxKeyBytes: -1},
		{Path: path, MaxInbound: -1}, {Path: path, MaxInboundBytes: -1}, {Path: path, MaxInboundPDUs: -1},
	} {
		if _, err := Open(t.Context(), o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
	if _, err := os.Lstat(filepath.Dir(path)); err == nil {
		t.Error("refused options left a directory")
	}
}

func TestSubmitWithoutACompletionPanics(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	s.Submit(&Batch{}, nil)
}

func TestAnOpenStoreIsOneGoroutine(t *testing.T) {
	before := runtime.NumGoroutine()
	s, err := Open(context.Background(), Options{Path: newPath(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	put(t, s, up("a.test"))
	if n := runtime.NumGoroutine() - before; n > 1 {
		t.Errorf("%d goroutines more than before", n)
	}
}

func TestSizesCoverWhatABatchHolds(t *testing.T) {
	if n := unsafe.Sizeof(Batch{}) + unsafe.Sizeof(job{}); n > batchBytes {
		t.Errorf("a batch takes %d bytes, counted as %d", n, batchBytes)
	}
	if n := unsafe.Sizeof(Host{}); n > hostBytes {
		t.Errorf("a host takes %d bytes, counted as %d", n, hostBytes)
	}
	if n := unsafe.Sizeof(Accept{}); n > acceptBytes {
		t.Errorf("an Accept takes %d bytes, counted as %d", n, acceptBytes)
	}
	if n := unsafe.Sizeof(matrix.Item{}); n > acceptItemBytes {
		t.Errorf("an item takes %d bytes, counted as %d", n, acceptItemBytes)
	}
	if n := unsafe.Sizeof(Answer{}); n > answerBytes {
		t.Errorf("an answer takes %d bytes, counted as %d", n, answerBytes)
	}
	if n := unsafe.Sizeof(ServerKeys{}); n > keysBytes {
		t.Errorf("ServerKeys take %d bytes, counted as %d", n, keysBytes)
	}
	if n := unsafe.Sizeof(InboundTxn{}); n > inboundBytes {
		t.Errorf("an InboundTxn takes %d bytes, counted as %d", n, inboundBytes)
	}
	if n := unsafe.Sizeof(InboundPDU{}); n > inboundPDUBytes {
		t.Errorf("an InboundPDU takes %d bytes, counted as %d", n, inboundPDUBytes)
	}
	op := &Hold{Destination: "abc"}
	b := Batch{Hosts: []Host{{Name: "abc", Error: "12345"}}, Forget: []matrix.ServerName{"x", "yz"}, Outbox: []OutboxOp{op, op}}
	b.Answers = []Answer{{Header: make([]byte, 7), Body: make([]byte, 70)}, {}}
	b.DropAnswers = make([][32]byte, 3)
	b.Keys = []ServerKeys{{Via: "v", Server: "abc", Object: make([]byte, 700)}}
	b.Inbound = []InboundTxn{{Origin: "abc", ID: "12", Answer: make([]byte, 80), PDUs: []InboundPDU{{}, {EventID: "$abc"}}}, {}}
	want(t, "size", b.size(), 2*inboundBytes+3+2+80+2*inboundPDUBytes+4+int64(batchBytes+hostBytes+3+5+2*nameBytes+3+2*opBytes)+2*op.size()+
		2*answerBytes+77+3*answerKeyBytes+keysBytes+704)
}

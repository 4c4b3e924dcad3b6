package store

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"unicode/utf8"

	"fsbus/bus/matrix"
)

func TestLoadHostsGivesTheMostUsefulFirst(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	// The times run backwards, as they do on a board without a clock: order
	// comes from the writes alone.
	old, recent := up("b.test"), up("a.test")
	old.SucceededAt, recent.SucceededAt = 2000, 1000
	put(t, s, down("d.test"))
	put(t, s, old, recent)
	put(t, s, down("c.test"))
	put(t, s, up("e.test"))
	order := []matrix.ServerName{"c.test", "d.test", "e.test", "a.test", "b.test"}
	for limit := range len(order) + 2 {
		want(t, "names", names(load(t, s, limit)), append([]matrix.ServerName(nil), order[:min(limit, len(order))]...))
	}
	want(t, "negative limit", len(load(t, s, -1)), 0)

	put(t, s, old, up("d.test")) // b is touched again, d has recovered
	order = []matrix.ServerName{"c.test", "d.test", "b.test", "e.test", "a.test"}
	want(t, "names", names(load(t, s, 10)), order)
}

func TestTheOrderOfWritesGoesOnAfterReopening(t *testing.T) {
	path := newPath(t)
	for _, name := range []string{"b.test", "a.test", "c.test", "a.test"} {
		s := open(t, Options{Path: path})
		put(t, s, up(name))
		closeStore(t, s)
	}
	want(t, "names", names(load(t, open(t, Options{Path: path}), 10)), []matrix.ServerName{"a.test", "c.test", "b.test"})
}

func TestHostsAreBoundedTheLeastUsefulGoFirst(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, MaxHosts: 64}) // a prune makes room for 4 more
	count := func() (n int64) {
		t.Helper()
		c := openRaw(t, path)
		n, err := value[int64](t.Context(), c, "SELECT count(*) FROM host")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var batch Batch
	for i := range 64 {
		if i < 10 {
			batch.Hosts = append(batch.Hosts, down(numbered("down", i)))
		} else {
			batch.Hosts = append(batch.Hosts, up(numbered("up", i)))
		}
	}
	put(t, s, batch.Hosts...)
	put(t, s, batch.Hosts...) // updates do not count
	want(t, "rows at the bound", count(), int64(64))
	want(t, "pruned at the bound", s.Stats().Pruned, int64(0))

	put(t, s, up("new.test"))
	want(t, "rows beyond the bound", count(), int64(60))
	want(t, "pruned", s.Stats().Pruned, int64(5))
	kept := names(load(t, s, 100))
	want(t, "first kept", kept[0], matrix.ServerName(numbered("down", 9)))
	want(t, "newest kept", kept[10], matrix.ServerName("new.test"))
	want(t, "oldest kept", kept[59], matrix.ServerName(numbered("up", 15)))

	// One batch of more than fits, all failing: even they have a bound.
	batch.Hosts = nil
	for i := range 200 {
		batch.Hosts = append(batch.Hosts, down(numbered("more", i)))
	}
	put(t, s, batch.Hosts...)
	want(t, "rows", count(), int64(60))
	kept = names(load(t, s, 100))
	want(t, "first kept", kept[0], matrix.ServerName(numbered("more", 199)))
	want(t, "last kept", kept[59], matrix.ServerName(numbered("more", 140)))
	closeStore(t, s)

	// A lower bound holds from the first commit on.
	s = open(t, Options{Path: path, MaxHosts: 10})
	put(t, s, up("one.test"))
	want(t, "rows under a lower bound", count(), int64(10))
}

func TestTheBoundHoldsAfterARollback(t *testing.T) {
	path := newPath(t)
	var fail error
	s := open(t, Options{Path: path, MaxHosts: 16, Fault: func(op Op) error {
		if op == OpCommit {
			return fail
		}
		return nil
	}})
	var hosts []Host
	for i := range 16 {
		hosts = append(hosts, up(numbered("a", i)))
	}
	put(t, s, hosts...)
	fail = errInjected // the writer is idle: the channel of submit orders this
	wantErr(t, "commit", submit(t, s, &Batch{Hosts: []Host{up("x.test")}}), errInjected)
	fail = nil
	put(t, s, up("y.test")) // the prune of the failed commit was undone
	want(t, "rows", len(load(t, s, 100)), 15)
	want(t, "pruned", s.Stats().Pruned, int64(2))
}

func TestErrorTextIsClipped(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{strings.Repeat("x", 200), strings.Repeat("x", 200)},
		{strings.Repeat("x", 201), strings.Repeat("x", 200)},
		{strings.Repeat("x", 199) + "é", strings.Repeat("x", 199)},
		{strings.Repeat("é", 101), strings.Repeat("é", 100)},
		{"bad \xff\xfe byte", "bad ? byte"},
		{strings.Repeat("\x80", 300), ""},
		{"nul \x00 byte", "nul \x00 byte"},
	} {
		got := clip(c.in, MaxErrorBytes)
		if got != c.want || len(got) > MaxErrorBytes || !utf8.ValidString(got) {
			t.Errorf("clip(%q) = %q, want %q", c.in, got, c.want)
		}
		s := open(t, Options{Path: newPath(t)})
		put(t, s, Host{Name: "a.test", Error: c.in})
		want(t, "stored", load(t, s, 1)[0].Error, c.want)
	}
}

func TestAHostThatCannotBeReadBackIsNotWritten(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	for _, h := range []Host{
		{}, {Name: "a b.test"}, {Name: "a.test", Failures: -1}, {Name: "a.test", Failure: matrix.NumFailures},
	} {
		wantErr(t, string(h.Name), submit(t, s, &Batch{Hosts: []Host{up("good.test"), h}}), ErrInvalid)
	}
	want(t, "hosts", load(t, s, 10), []Host(nil))
}

func TestNamesKeepTheirSpelling(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	put(t, s, up("a.test"), up("A.test"), up("[2001:DB8::1]:8448"))
	want(t, "names", names(load(t, s, 10)), []matrix.ServerName{"[2001:DB8::1]:8448", "A.test", "a.test"})
}

func TestEveryFailureClassSurvives(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	for f := range matrix.NumFailures {
		put(t, s, Host{Name: "a.test", Failure: f})
		want(t, "class", load(t, s, 1)[0].Failure, f)
	}
}

func TestRowsThatAreNotOursAreLeftOutAndReported(t *testing.T) {
	path := newPath(t)
	var log bytes.Buffer
	s := open(t, Options{Path: path, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	put(t, s, up("a.test"))
	c := openRaw(t, path)
	for _, row := range []string{
		"'not a name', 0, 'ok', 0, '', 0, 0, 0, 0, 2",
		"'b.test', -1, 'ok', 0, '', 0, 0, 0, 0, 3",
		"'c.test', 4294967296, 'ok', 0, '', 0, 0, 0, 0, 4",
		"'d.test', 1, 'retired_class', 4294967296, '', 0, 0, 0, 0, 5",
		"'e.test', 1, 'retired_class', 0, '', 0, 0, 0, 0, 6",
	} {
		if err := c.exec(t.Context(), "INSERT INTO host VALUES ("+row+")"); err != nil {
			t.Fatal(err)
		}
	}
	want(t, "hosts", load(t, s, 10), []Host{{Name: "e.test", Failures: 1, Failure: matrix.FailLocal}, up("a.test")})
	if !strings.Contains(log.String(), "rows=4") {
		t.Errorf("log %q does not tell of 4 rows", log.String())
	}
}

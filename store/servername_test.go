package store

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

// storedName returns whose database a file is, "" if that is not known.
func storedName(t *testing.T, path string) string {
	t.Helper()
	name, err := value[string](t.Context(), openRaw(t, path), "SELECT coalesce(max(value), '') FROM meta WHERE name = 'server_name'")
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestWhatIsPendingIsNotSentInAnotherName(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path, ServerName: "one.test"})
	accept(t, s, "a.test", "1", 1, items(t, []string{pdu("!r", 1, "one")}, []string{toDevice("m", "t")}))
	closeStore(t, s)
	for range 2 { // frozen or not
		for _, name := range []matrix.ServerName{"other.test", "One.test", "one.test:8448", "one.tes"} {
			before := tree(t, path)
			_, err := Open(t.Context(), Options{Path: path, ServerName: name})
			wantErr(t, string(name), err, ErrOtherServer)
			for _, w := range []string{path, "one.test", string(name), "server_name"} {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("%v does not say %q", err, w)
				}
			}
			want(t, "files", tree(t, path), before)
		}
		s = open(t, Options{Path: path, ServerName: "one.test"})
		want(t, "items", s.Stats().Outbox.Items, int64(2))
		pack(t, s, "a.test", "f", 2)
		closeStore(t, s)
	}

	// Totals that are wrong do not open it.
	shell(t, path, "UPDATE dest SET items = 0")
	_, err := Open(t.Context(), Options{Path: path, ServerName: "other.test"})
	wantErr(t, "wrong totals", err, ErrOtherServer)
	shell(t, path, "UPDATE dest SET items = 2")

	// A tool that has no name sees it all and changes no name.
	s = open(t, Options{Path: path})
	want(t, "items", s.Stats().Outbox.Items, int64(2))
	settle(t, s, "a.test", "f", Delivered)
	closeStore(t, s)
	want(t, "stored", storedName(t, path), "one.test")

	// Now that nothing is pending it changes hands, and others are refused from then on.
	var log bytes.Buffer
	s = open(t, Options{Path: path, ServerName: "other.test", Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if !strings.Contains(log.String(), "from=one.test to=other.test") {
		t.Errorf("log %q does not tell of it", log.String())
	}
	want(t, "stored", storedName(t, path), "other.test")
	want(t, "what else there is", s.Stats().Outbox.Destinations, int64(1))
	accept(t, s, "a.test", "2", 1, pdus(t, pdu("!r", 2, "two")))
	closeStore(t, s)
	wantErr(t, "the old name", func() error { _, err := Open(t.Context(), Options{Path: path, ServerName: "one.test"}); return err }(), ErrOtherServer)
	open(t, Options{Path: path, ServerName: "other.test"})
}

func TestADatabaseWithoutANameTakesTheFirst(t *testing.T) {
	script, err := os.ReadFile("testdata/v2.sql")
	if err != nil {
		t.Fatal(err)
	}
	path := newPath(t)
	makeRaw(t, path, string(script))
	s := open(t, Options{Path: path})
	if s.Stats().Outbox.Items == 0 {
		t.Fatal("nothing is pending")
	}
	closeStore(t, s)
	want(t, "nobody's", storedName(t, path), "")
	closeStore(t, open(t, Options{Path: path, ServerName: "one.test"}))
	want(t, "stored", storedName(t, path), "one.test")
	_, err = Open(t.Context(), Options{Path: path, ServerName: "other.test"})
	wantErr(t, "another", err, ErrOtherServer)
}

// That a file is opened again, with the name that it has, writes nothing.
func TestTheSameNameIsNotWrittenAgain(t *testing.T) {
	path := newPath(t)
	closeStore(t, open(t, Options{Path: path, ServerName: "one.test"}))
	before := tree(t, path)
	s := open(t, Options{Path: path, ServerName: "one.test"})
	want(t, "log", s.Stats().WALBytes, int64(0))
	closeStore(t, s)
	want(t, "files", tree(t, path), before)
}

func TestANameThatFindsNoRoomIsTakenLater(t *testing.T) {
	path := newPath(t)
	closeStore(t, open(t, Options{Path: path}))
	o := Options{Path: path, ServerName: "one.test"}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	c := openRaw(t, path)
	if err := c.exec(t.Context(), "PRAGMA query_only = ON"); err != nil {
		t.Fatal(err)
	}
	if err := claim(context.Background(), c, &o); err == nil || !strings.Contains(err.Error(), path+": write server name: ") {
		t.Errorf("a file that takes nothing: %v", err)
	}
	want(t, "stored", storedName(t, path), "")
	closeStore(t, open(t, o))
	want(t, "stored", storedName(t, path), "one.test")
}

func TestTheFifthSchemaIsStillOpened(t *testing.T) {
	script, err := os.ReadFile("testdata/v5.sql")
	if err != nil {
		t.Fatal(err)
	}
	old, fresh := newPath(t), newPath(t)
	makeRaw(t, old, string(script))
	closeStore(t, open(t, Options{Path: old, ServerName: "hs1.test"}))
	closeStore(t, open(t, Options{Path: fresh}))
	want(t, "schema", schema(t, old), schema(t, fresh))
	want(t, "server name", storedName(t, old), "hs1.test")
}

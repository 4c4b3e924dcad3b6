package main

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/rig"
)

func TestEndsAreCounted(t *testing.T) {
	var e ends
	if e.String() != "none" || e.all() != 0 {
		t.Error(&e)
	}
	for _, res := range []fedload.Result{
		{Status: 200, Whole: time.Second}, {Status: 200, Whole: 2 * time.Second}, {Status: 503, Whole: time.Hour},
		{Status: 200, Whole: time.Hour, Err: io.ErrUnexpectedEOF}, {Err: errors.New("else")},
	} {
		e.add(res, time.Second)
	}
	if got, want := e.String(), "200: 2, 503: 1, cut: 1, other: 1"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if e.all() != 5 || e.failed() != 3 || e.unanswered() != 2 || e.took.Count() != 2 || e.took.Max() != 3*time.Second {
		t.Errorf("%d, %d failed, %d unanswered, %v", e.all(), e.failed(), e.unanswered(), &e.took)
	}
}

func TestNamesOfNobodyDiffer(t *testing.T) {
	names := make(map[matrix.ServerName]bool)
	for n := range forgedRequests {
		name := nobody(n)
		if _, err := matrix.ParseServerName(string(name)); err != nil {
			t.Fatal(err)
		}
		names[name] = true
	}
	if len(names) != forgedRequests {
		t.Errorf("%d names, want %d", len(names), forgedRequests)
	}
	shares := 0
	for i := range forgeries {
		shares += forgeries[i].share
	}
	if shares != 12 {
		t.Errorf("shares of %d", shares)
	}
}

func TestCounts(t *testing.T) {
	after := map[string]float64{`why="a"`: 3, `why="b"`: 1, `why="c"`: 2}
	if got := counts(minus(after, map[string]float64{`why="a"`: 1, `why="b"`: 1})); got != "a 2, c 2" {
		t.Error(got)
	}
}

// What is compared with must do the work, by both protocols.
func TestPlainProxyCarriesTransactions(t *testing.T) {
	command, name, ok := findProxy()
	if !ok {
		t.Skip("neither nginx nor caddy is in PATH")
	}
	b := &bench{dir: t.TempDir()}
	f, err := b.edgeField(1, true, rig.StubConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	p, err := b.startPlain(t.Context(), f, command, name)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop(10 * time.Second)
	from := f.Origin(0)
	for _, http2 := range []bool{false, true} {
		target := p.target(f)
		target.HTTP2 = http2
		s := f.sender(target, 0, 1)
		defer s.Close()
		for _, r := range []*rig.Signed{f.events(from, "event", 1), f.presence(from, "presence"), f.toDevice(from, "message")} {
			if res := s.Do(t.Context(), r); res.Err != nil || res.Status != http.StatusOK || !strings.HasPrefix(string(res.Body), `{"pdus":{`) {
				t.Errorf("%s: %+v, %s", name, res, res.Body)
			}
		}
	}
	if got := f.stub.Stats(); got.Transactions != 6 || got.Repeated != 3 || got.Refused != 0 {
		t.Errorf("%+v", got)
	}
}

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/store"
)

// fill puts three destinations into the queue.
func (a *adminTest) fill() {
	a.t.Helper()
	a.accept("alpha.example.org", 0, matrix.KindPresence, `{"u":1}`, `{"u":2}`)
	a.accept("alpha.example.org", 0, matrix.KindPDU, `{"e":1}`)
	a.accept("[2001:db8::1]:8448", 3, matrix.KindToDevice, `{"d":"`+strings.Repeat("x", 2000)+`"}`)
	for _, minutes := range []int64{4000, 1440, 240, 239, 61, 16} {
		a.accept("dead.test", minutes, matrix.KindPDU, fmt.Sprintf(`{"e":%d}`, minutes))
	}
	a.says["dead.test"] = bus.QueueStatus{
		State: "backing off", Why: "5 deliveries in a row have failed", Failures: 5, LastError: "connect: connection refused",
		LastTry: adminNow.Add(-90 * time.Second), NextTry: adminNow.Add(4*time.Minute + 10*time.Second),
		Answer: bus.PaceDest{Held: true, For: 3 * time.Second, Lane: "steady", Why: "it is in a large room, so it is answered at the steady pace", Rooms: 1}, Paced: true,
	}
	a.hosts["dead.test"] = bus.HostStatus{
		HostRecord: bus.HostRecord{Name: "dead.test", Failures: 7, FirstFailure: adminNow.Add(-70 * time.Hour), NextTry: adminNow.Add(250 * time.Second), LastSuccess: adminNow.Add(-71 * time.Hour)},
		Rank:       "failing", Waiting: 2, Why: "refused (connect: connection refused)",
	}
	a.hosts["quiet.test"] = bus.HostStatus{HostRecord: bus.HostRecord{Name: "quiet.test"}, Rank: "unknown"}
}

func TestQueueTable(t *testing.T) {
	a := newAdminTest(t)
	a.prints(` DESTINATION TOTAL 1 5 15 60 240 1440 1440+ BYTES  STATE
       TOTAL     0 0 0  0  0   0    0     0   0 B  0 destinations
`)
	a.fill()
	const all = `        DESTINATION TOTAL 1 5 15 60 240 1440 1440+ BYTES  STATE
              TOTAL    10 3 1  0  1   3    1     1 2 KiB  3 destinations
          dead.test     6 0 0  0  1   3    1     1  54 B  backing off, next try in 4m10s
  alpha.example.org     3 3 0  0  0   0    0     0  21 B  waiting
 [2001:db8::1]:8448     1 0 1  0  0   0    0     0 2 KiB  waiting
`
	a.prints(all)
	a.prints(all, "--n", "0", "--sort=total")
	a.prints(` DESTINATION TOTAL 1 5 15 60 240 1440 1440+ BYTES  STATE
       TOTAL    10 3 1  0  1   3    1     1 2 KiB  3 destinations
   dead.test     6 0 0  0  1   3    1     1  54 B  backing off, next try in 4m10s
      2 more     4 3 1  0  0   0    0     0 2 KiB
`, "-n", "1")
	a.do(&store.Hold{Destination: "empty.test", Held: true})
	for _, tt := range []struct{ args, want string }{
		{"", "dead.test alpha.example.org [2001:db8::1]:8448 empty.test"},
		{"-sort name", "[2001:db8::1]:8448 alpha.example.org dead.test empty.test"},
		{"-sort bytes", "[2001:db8::1]:8448 dead.test alpha.example.org empty.test"},
		{"-sort oldest", "dead.test [2001:db8::1]:8448 alpha.example.org empty.test"},
		{"-filter A -n 2", "dead.test alpha.example.org"},
		{"-filter *.TEST", "dead.test empty.test"},
		{"-filter ?ead.test", "dead.test"},
		{"-filter [2001:", "[2001:db8::1]:8448"},
		{"-filter nobody", ""},
	} {
		out, errOut, err := a.run(append(strings.Fields(tt.args), "-json")...)
		var l queueList
		if err := json.Unmarshal([]byte(out), &l); err != nil {
			t.Errorf("%s: %v: %s", tt.args, err, out)
		}
		var got []string
		for _, d := range l.Destinations {
			got = append(got, d.Destination)
		}
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %v, %v, %s; want %s", tt.args, got, err, errOut, tt.want)
		}
	}
}

// Where the database cannot be read there is still what the core knows.
func TestQueueTableWithoutAges(t *testing.T) {
	a := newAdminTest(t)
	a.fill()
	if err := a.queues(t.Context(), func(st bus.QueueStatus) { a.cached = append(a.cached, st) }); err != nil {
		t.Fatal(err)
	}
	if err := a.store.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.prints(`        DESTINATION TOTAL 1 5 15 60 240 1440 1440+ BYTES  STATE
              TOTAL    10 - -  -  -   -    -     - 2 KiB  3 destinations
          dead.test     6 - -  -  -   -    -     -  54 B  backing off, next try in 4m10s
  alpha.example.org     3 - -  -  -   -    -     -  21 B  waiting
 [2001:db8::1]:8448     1 - -  -  -   -    -     - 2 KiB  waiting
The ages are not known: store: closed.
`)
}

// A list of 10,000 destinations takes little memory and comes in pieces.
func TestQueueOfTenThousand(t *testing.T) {
	if size := unsafe.Sizeof(listed{}); size > 96 {
		t.Errorf("a destination takes %d bytes, not 96", size)
	}
	a := newAdminTest(t)
	var ops []store.OutboxOp
	const many = 10_000
	for i := range many {
		ops = append(ops, &store.Accept{
			Destination: matrix.ServerName(fmt.Sprintf("s%d.test", i)), Accepted: adminNow.Stored(),
			Items: []matrix.Item{{Kind: matrix.KindOther, Payload: []byte(`{}`)}},
		})
	}
	for chunk := range slices.Chunk(ops, 1000) {
		a.do(chunk...)
	}
	resp := a.get("/queue", url.Values{"limit": {"0"}})
	if resp.StatusCode != 200 || resp.ContentLength != -1 {
		t.Errorf("%s with %d bytes in one piece", resp.Status, resp.ContentLength)
	}
	var l queueList
	if err := json.NewDecoder(resp.Body).Decode(&l); err != nil {
		t.Fatal(err)
	}
	if len(l.Destinations) != many || l.Total.Items != many || l.Total.Ages[0] != many || l.Rest != nil {
		t.Errorf("%d destinations, total %+v", len(l.Destinations), l.Total)
	}
	out, _, err := a.run()
	if lines := strings.Count(out, "\n"); err != nil || lines != 53 || !strings.Contains(out, "9950 more  9950  9950 0") {
		t.Errorf("%d lines, %v: %s", lines, err, out)
	}
	out, _, err = a.run("flush", "-all")
	if told := a.flushed(); err != nil || out != "10000 destinations are tried as soon as there is a worker\n" || len(told) != many {
		t.Errorf("%s, %v, the core was told of %d", out, err, len(told))
	}
}

func TestQueueShow(t *testing.T) {
	a := newAdminTest(t)
	a.fill()
	a.accept("dead.test", 20, matrix.KindPresence, `{"u":1}`)
	a.do(&store.Pack{Destination: "dead.test", NewID: "b1", Now: adminNow.Stored(), Origin: "us.test", MaxBytes: 500})
	a.accept("dead.test", 40, matrix.KindPresence, `{"u":2}`)
	const head = `dead.test: backing off
  pending     8 items, 68 B, the oldest for 2d18h
  on its way  7 items in a batch that is sent as it is until its outcome is known
  why         5 deliveries in a row have failed
  last error  connect: connection refused (5 failures in a row, tried 1m30s ago)
  next try    in 4m10s
  answer      the homeserver has waited for one for 3s; it is in a large room, so it is answered at the steady pace (1 known room)

MINUTES  1  5  15  60  240  1440  1440+
items    0  0  0   3   3    1     1

KIND      ITEMS  SIZE
pdu       6      54 B
presence  2      14 B

ID  KIND      SIZE  AGE    EXPIRES
`
	a.prints(head+`8   pdu       10 B  2d18h  never, on its way
9   pdu       10 B  1d0h   never, on its way
10  pdu       9 B   4h0m   never, on its way
11  pdu       9 B   3h59m  never, on its way
12  pdu       8 B   1h1m   never, on its way
13  pdu       8 B   16m0s  never, on its way
14  presence  7 B   20m0s  in 10m0s, on its way
15  presence  7 B   40m0s  expired
`, "show", "dead.test")
	a.prints(`quiet.test: idle
  pending  nothing
  answer   nothing is known of the homeserver's transactions for it
`, "show", "quiet.test")

	out, _, err := a.run("show", "dead.test", "--json")
	var s queueShow
	if err := errors.Join(err, json.Unmarshal([]byte(out), &s)); err != nil {
		t.Fatal(err)
	}
	if len(s.List) != 8 || s.Frozen != 7 || s.Host.Failures != 7 || s.Answer.ForSeconds != 3 || s.OldestSeconds != 240_000 || s.NextTryIn != 250 || *s.List[7].ExpiresIn != -600 {
		t.Errorf("%s", out)
	}
	a.fails("nothing is known of nobody.test", "show", "nobody.test")
	for _, args := range [][]string{{"show", "not a name"}, {"flush", "not a name"}, {"hold", "not a name"}, {"drop", "not a name", "-all", "-yes"}, {"explain", "not a name"}} {
		if _, errOut, err := a.run(args...); !errors.Is(err, ErrUsage) || !strings.Contains(errOut, `"not a name" is not a server's name`) {
			t.Errorf("%s: %v, %s", args, err, errOut)
		}
	}
}

func TestQueueShowIsCut(t *testing.T) {
	a := newAdminTest(t)
	var payloads []string
	for i := range 250 {
		payloads = append(payloads, fmt.Sprintf(`{"n":%d}`, i))
	}
	a.accept("a.test", 1, matrix.KindOther, payloads...)
	for _, tt := range []struct {
		args  string
		lines int
		end   string
	}{{"show a.test", 100, "150 more are shown with -all\n"}, {"show -all a.test", 250, "in 0\n"}} {
		out, _, err := a.run(strings.Fields(tt.args)...)
		if lines := strings.Count(out, "  never\n"); err != nil || lines != tt.lines || strings.HasSuffix(out, tt.end) != (tt.lines == 100) {
			t.Errorf("%s: %d lines, %v: %s", tt.args, lines, err, out)
		}
	}
}

func TestExplain(t *testing.T) {
	a := newAdminTest(t)
	a.fill()
	a.do(&store.Hold{Destination: "alpha.example.org", Held: true})
	for _, tt := range []struct{ name, want string }{
		{"alpha.example.org", `alpha.example.org

The server: fsbus has not talked to it lately, so it does not know whether it answers.

The queue: 3 items (1 pdu, 2 presence; 21 B), the oldest for 0s. It is held. "fsbus queue release alpha.example.org" lets it go on.

The answers to the homeserver: nothing is known of the homeserver's transactions for it.
`},
		{"quiet.test", `quiet.test

The server: it has not answered yet. Its rank is "unknown", so only the workers for servers that have not answered are there for it.

The queue: nothing waits. It is idle.

The answers to the homeserver: nothing is known of the homeserver's transactions for it.
`},
	} {
		a.prints(tt.want, "explain", tt.name)
	}
	var s showHead
	resp := a.get("/queue/show", url.Values{"destination": {"dead.test"}, "items": {"none"}})
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := writeExplain(&b, &s, adminNow.Std()); err != nil {
		t.Fatal(err)
	}
	const want = `dead.test

The server: 7 attempts in a row have failed, for 2d22h. The last one: refused (connect: connection refused). Its rank is "failing", so only the few workers for servers that fail are there for it. It is left alone for another 4m10s. It last answered 2d23h ago. Requests of the homeserver for it: 2 waiting, 0 running.

The queue: 6 items (6 pdu; 54 B), the oldest for 2d18h. It is backing off. Why what is there has not been sent: 5 deliveries in a row have failed. The last delivery failed: connect: connection refused. The next try is in 4m10s.

The answers to the homeserver: the homeserver has waited for one for 3s; it is in a large room, so it is answered at the steady pace (1 known room).
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	a.fails("nothing is known of nobody.test", "explain", "nobody.test")

	s.Host.Failures, s.Host.FailingFor = 1, 300
	b.Reset()
	if err := writeExplain(&b, &s, adminNow.Std()); err != nil || !strings.Contains(b.String(), "The server: the last attempt failed, 5m0s ago: refused (connect: connection refused). Its rank") {
		t.Errorf("one failure: %v, %s", err, &b)
	}
	show := queueShow{showHead: s}
	show.LastError, show.Failures = "refused", 1
	b.Reset()
	if err := writeShow(&b, &show); err != nil || !strings.Contains(b.String(), "refused (1 failure, tried 1m30s ago)") {
		t.Errorf("one failure: %v, %s", err, &b)
	}
}

func TestQueueFlushHoldRelease(t *testing.T) {
	a := newAdminTest(t)
	a.fill()
	a.prints("dead.test is tried as soon as there is a worker\n", "flush", "dead.test")
	if told := a.flushed(); len(told) != 1 || told[0] != "dead.test" {
		t.Errorf("the core was told %+v", told)
	}
	a.prints("nothing waits for quiet.test\n", "flush", "quiet.test")
	a.prints("dead.test is held, with 6 items\n", "hold", "dead.test")
	if told := a.heard(); len(told) != 1 || told[0].Dest != "dead.test" || !told[0].Backlog.Held || told[0].Backlog.Items[matrix.KindPDU] != 6 || told[0].Backlog.Oldest != adminNow.Add(-4000*time.Minute) {
		t.Errorf("the core was told %+v", told)
	}
	a.prints("dead.test is held already, with 6 items\n", "hold", "dead.test")
	a.heard()
	a.fails("dead.test is held: release it first", "flush", "dead.test")
	if told := a.flushed(); len(told) != 0 {
		t.Errorf("the core was told %+v", told)
	}
	a.prints("2 destinations are tried as soon as there is a worker, 1 held and not tried\n", "flush", "-all")
	told := a.flushed()
	if len(told) != 2 || slices.Contains(told, "dead.test") {
		t.Errorf("the core was told %+v", told)
	}
	a.prints("dead.test is released, with 6 items\n", "release", "dead.test")
	if told := a.heard(); len(told) != 1 || told[0].Backlog.Held {
		t.Errorf("the core was told %+v", told)
	}
	a.prints("dead.test was not held\n", "release", "dead.test")
	for _, command := range []string{"flush", "hold", "release"} {
		a.fails("nothing is known of nobody.test", command, "nobody.test")
	}
}

func TestQueueAside(t *testing.T) {
	a := newAdminTest(t)
	a.prints("nothing is set aside\n", "aside")
	for _, name := range []matrix.ServerName{"a.test", "b.test"} {
		a.accept(name, 10, matrix.KindOther, `{"x":1}`)
		a.do(&store.Pack{Destination: name, NewID: "b1", Now: adminNow.Stored(), Origin: "us.test", MaxBytes: 5000},
			&store.Settle{Destination: name, TxnID: "b1", Outcome: store.Bisect, Now: adminNow.Stored() - 60_000, Reason: "M_UNKNOWN: no"})
	}
	a.prints(`ID  DESTINATION  KIND   SIZE  AGE    ASIDE FOR  REASON
1   a.test       other  7 B   10m0s  1m0s       M_UNKNOWN: no
2   b.test       other  7 B   10m0s  1m0s       M_UNKNOWN: no
`, "aside")
	a.hosts["b.test"] = bus.HostStatus{HostRecord: bus.HostRecord{Name: "b.test"}, Rank: "proven"}
	a.prints(`b.test: idle
  pending  nothing
  answer   nothing is known of the homeserver's transactions for it

Set aside, and not sent any more:

ID  KIND   SIZE  AGE    ASIDE FOR  REASON
2   other  7 B   10m0s  1m0s       M_UNKNOWN: no
`, "show", "b.test")
	out, _, err := a.run("aside", "-json")
	var l asideList
	if err := errors.Join(err, json.Unmarshal([]byte(out), &l)); err != nil || len(l.Aside) != 2 || l.Aside[1].AsideFor != 60 {
		t.Errorf("%v: %s", err, out)
	}
	a.prints("forgotten: 1 item, 7 B\n", "aside", "-forget", "1")
	a.prints(`ID  DESTINATION  KIND   SIZE  AGE    ASIDE FOR  REASON
2   b.test       other  7 B   10m0s  1m0s       M_UNKNOWN: no
`, "aside")
	a.prints("tried again: 1 item, 7 B\n", "aside", "-retry", "b.test")
	if n := len(a.pending("b.test")); n != 1 {
		t.Errorf("%d items are pending", n)
	}
	a.prints("nothing is set aside\n", "aside")
	a.prints("tried again: 0 items, 0 B\n", "aside", "-retry", "all")
}

// An answer that is cut short is an error, not a short list.
func TestQueueCutAnswerIsAnError(t *testing.T) {
	a := newAdminTest(t)
	var payloads []string
	for i := range 10000 { // several times what a socket takes
		payloads = append(payloads, fmt.Sprintf(`{"n":%d}`, i))
	}
	a.accept("a.test", 1, matrix.KindOther, payloads...)
	resp := a.get("/queue/show", url.Values{"destination": {"a.test"}, "items": {"all"}})
	if _, err := io.ReadFull(resp.Body, make([]byte, 5000)); err != nil {
		t.Fatal(err)
	}
	a.server.close()
	if _, err := io.Copy(io.Discard, resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

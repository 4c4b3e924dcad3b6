package node

import (
	"fmt"
	"testing"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

func parsePDUs(t *testing.T, pdus string) []matrix.PDU {
	t.Helper()
	txn, err := matrix.ParseTransaction([]byte(`{"origin":"x.test","pdus":[` + pdus + `]}`))
	if err != nil {
		t.Fatal(err)
	}
	return txn.PDUs
}

func eventIn(room, prev string) string {
	return fmt.Sprintf(`{"content":{},"prev_events":[%s],"room_id":%q,"type":"m.room.message"}`, prev, room)
}

func TestGapsAreEventsThatHaveNotComeBy(t *testing.T) {
	var g gaps
	events := func() int64 { n, _ := g.report(10); return n }
	now := sched.FromStored(1_800_000_000_000)
	note := func(pdus string) {
		t.Helper()
		g.note("x.test", follows(parsePDUs(t, pdus)), now)
	}
	note(eventIn("!r", `"$a"`))
	if n := events(); n != 0 {
		t.Errorf("%d gaps in a room that is new", n)
	}
	g.came(mark("$a"), mark("!r"))
	note(eventIn("!r", `"$a"`))
	if n := events(); n != 0 {
		t.Errorf("%d gaps after an event that is there", n)
	}
	note(eventIn("!r", `"$a","$b"`))
	note(eventIn("!other", `"$b"`))
	if n, rooms := g.report(10); n != 1 || len(rooms) != 1 || rooms[0].Room != "!r" || rooms[0].Origin != "x.test" || rooms[0].Events != 1 {
		t.Errorf("%d gaps in %+v", n, rooms)
	}

	// Our own events, and what they go on from, are there as well.
	own := parsePDUs(t, eventIn("!r", `"$c"`))
	g.sent(own)
	ids := matrix.EventIDs(own[0].Raw)
	note(eventIn("!r", `"$c"`) + "," + eventIn("!r", fmt.Sprintf("%q", ids[len(ids)-1])))
	if n := events(); n != 1 {
		t.Errorf("%d gaps after events of ours", n)
	}
}

func TestGapsAreBounded(t *testing.T) {
	var g gaps
	for i := range 5 * gapMemory {
		g.came(mark(fmt.Sprint("$", i)))
	}
	if n := len(g.young) + len(g.old); n > 2*gapMemory {
		t.Errorf("%d events are remembered", n)
	}
	for i := range 3 * gapRooms {
		room := fmt.Sprint("!", i)
		g.came(mark(room))
		g.note("x.test", follows(parsePDUs(t, eventIn(room, `"$unknown"`))), sched.FromStored(int64(i+1)))
	}
	if n, rooms := g.report(1000); n != 3*gapRooms || len(rooms) != gapRooms || rooms[0].Room != fmt.Sprint("!", 3*gapRooms-1) {
		t.Errorf("%d gaps, %d rooms are remembered, the latest %+v", n, len(rooms), rooms[0])
	}
}

package sim

import (
	"encoding/json"
	"slices"
	"testing"

	"fsbus/bus/matrix"
)

// aRoom is one of members servers, seen by the first; nothing listens.
func aRoom(t *testing.T, members int) (*World, *room) {
	t.Helper()
	w := &World{config: Config{Servers: members, RoomMembers: members, Seed: 1}}
	for i := range members {
		name := serverName(i, 65535)
		w.servers = append(w.servers, &server{world: w, index: i, name: name})
		w.names = append(w.names, name)
	}
	r, in := w.servers[0].bigRoom(w.RoomID(members - 1))
	if !in {
		t.Fatalf("the first server is not in %s", w.RoomID(members-1))
	}
	return w, r
}

func TestEventsHaveTheFormThatReadersLookFor(t *testing.T) {
	const members = 300
	w, r := aRoom(t, members)
	sizes := make(map[bool]int) // by whether it is of the upper half
	ids := make(map[string]bool)
	for n := range firstMember + 2*members {
		b := r.appendEvent(nil, n, r.signature)
		if canonical, err := matrix.CanonicalJSON(b); err != nil || string(canonical) != string(b) {
			t.Fatalf("event %d, %s, is not canonical (%v)", n, b, err)
		}
		if len(b) < leastEvent || len(b) > mostEvent {
			t.Errorf("event %d has %d bytes: want %d to %d", n, len(b), leastEvent, mostEvent)
		}
		sizes[len(b) > (leastEvent+mostEvent)/2]++
		var event struct {
			RoomID     string                       `json:"room_id"`
			Sender     string                       `json:"sender"`
			Auth       []string                     `json:"auth_events"`
			Prev       []string                     `json:"prev_events"`
			Signatures map[string]map[string]string `json:"signatures"`
		}
		if err := json.Unmarshal(b, &event); err != nil {
			t.Fatal(err)
		}
		name := string(w.names[r.sender(n)])
		if event.RoomID != r.id || event.Sender != "@member:"+name || len(event.Signatures) != 1 || len(event.Signatures[name]["ed25519:sim"]) != 86 {
			t.Errorf("event %d: %s", n, b)
		}
		if len(event.Auth) != min(n, 3) || len(event.Prev) != min(n, 1) {
			t.Errorf("event %d rests on %q and follows %q", n, event.Auth, event.Prev)
		}
		id := r.eventID(n)
		if of, m, known := w.servers[1].eventByID(id); !known || m != n || of.id != r.id {
			t.Errorf("event %d: its id leads to %d, %v", n, m, known)
		}
		ids[id] = true
	}
	if len(ids) != firstMember+2*members {
		t.Errorf("%d ids", len(ids))
	}
	if sizes[false] < 100 || sizes[true] < 100 {
		t.Errorf("events of the lower and the upper half of sizes: %v", sizes)
	}
	if _, _, known := w.servers[1].eventByID("$" + r.eventID(0)[2:] + "A"); known {
		t.Error("an id that is no event's leads to one")
	}
	membership := r.appendEvent(nil, firstMember+7, r.signature)
	if err := matrix.VerifyJSON(membership, string(w.names[7]), keyID, w.SigningKey(7).Public()); err != nil {
		t.Errorf("a membership: %v", err)
	}
}

func TestOnlyMembersKnowTheRoom(t *testing.T) {
	w, r := aRoom(t, 3)
	w.config.RoomMembers = 2
	for _, test := range []struct {
		server int
		room   string
		in     bool
	}{
		{0, w.RoomID(0), true}, {1, w.RoomID(0), true}, {0, w.RoomID(1), true},
		{2, w.RoomID(0), false}, {0, w.RoomID(2), false},
		{0, "!big:127.1.0.0:1", false}, {0, "!big:example.org", false}, {0, "!room:" + string(w.names[0]), false},
	} {
		if _, in := w.servers[test.server].bigRoom(test.room); in != test.in {
			t.Errorf("server %d, %s: %v", test.server, test.room, in)
		}
	}
	if _, _, known := w.servers[2].eventByID(r.eventID(0)); known {
		t.Error("a server knows an event of a room that it is not in")
	}
}

func TestAServerRemembersFewSignatures(t *testing.T) {
	w, r := aRoom(t, maxRoomSignatures+10)
	first := r.signature(0)
	for creator := range w.servers {
		other, _ := w.servers[0].roomOf(creator)
		other.signature(0)
		if got := len(w.servers[0].signatures); got > maxRoomSignatures {
			t.Fatalf("%d signatures", got)
		}
	}
	if again := r.signature(0); again != first {
		t.Errorf("signatures %s and %s of one membership", first, again)
	}
}

func TestPiecesAddUp(t *testing.T) {
	seq := concat(text("a", "b"), text(), text("cde"))
	var all []byte
	for b := range seq {
		all = append(all, b...)
	}
	if string(all) != "abcde" || length(seq) != 5 {
		t.Errorf("%q, length %d", all, length(seq))
	}
	for range seq { // whoever stops early is not called again
		break
	}
	if got := slices.Collect(span(2, 5)); !slices.Equal(got, []int{2, 3, 4}) {
		t.Error(got)
	}
}

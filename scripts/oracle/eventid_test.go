package oracle

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/matrix-org/gomatrixserverlib"

	"fsbus/bus/matrix"
)

// eventContents are, by type, the members of content that some redaction keeps, and
// one that none does.
var eventContents = map[string][]string{
	"m.room.member":             {"membership", "join_authorised_via_users_server", "third_party_invite", "displayname"},
	"m.room.create":             {"creator", "room_version", "additional_creators"},
	"m.room.join_rules":         {"join_rule", "allow", "reason"},
	"m.room.power_levels":       {"ban", "events", "events_default", "invite", "kick", "redact", "state_default", "users", "users_default", "notifications"},
	"m.room.aliases":            {"aliases", "other"},
	"m.room.history_visibility": {"history_visibility", "other"},
	"m.room.redaction":          {"redacts", "reason"},
	"m.room.message":            {"body", "membership", "creator", "redacts"},
}

// event makes an event up, which no server would take but whose id any can tell.
func event(rng *rand.Rand) map[string]any {
	kind := slices.Sorted(maps.Keys(eventContents))[rng.IntN(len(eventContents))]
	content := object(rng, 2)
	for _, name := range eventContents[kind] {
		if rng.IntN(3) > 0 {
			content[name] = value(rng, 2)
		}
	}
	if _, ok := content["third_party_invite"]; ok && rng.IntN(2) == 0 {
		invite := object(rng, 2)
		if rng.IntN(3) > 0 {
			invite["signed"] = value(rng, 2)
		}
		content["third_party_invite"] = invite
	}
	e := map[string]any{
		"type": kind, "content": content,
		"room_id": "!room:origin.example", "sender": "@" + text(rng, plain) + ":origin.example",
		"depth": rng.Int64N(100), "origin_server_ts": rng.Int64N(1 << 45),
		"auth_events": []string{"$" + text(rng, plain), "$b"}, "prev_events": []string{"$" + text(rng, plain)},
		"hashes":     map[string]string{"sha256": text(rng, plain+escaped)},
		"signatures": map[string]any{"origin.example": map[string]string{"ed25519:a": "QUJD"}},
	}
	for name, v := range map[string]any{
		"state_key": text(rng, plain), "origin": "origin.example", "membership": "join", "prev_state": []string{},
		"redacts": "$c", "unsigned": map[string]any{"age": 1}, "age_ts": 5, "x" + text(rng, plain): value(rng, 2),
	} {
		if rng.IntN(3) == 0 {
			e[name] = v
		}
	}
	return e
}

// gmlID returns the id that gomatrixserverlib gives an event in a room version.
func gmlID(t *testing.T, version string, e map[string]any) string {
	t.Helper()
	raw := marshal(t, e)
	v, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersion(version))
	if err != nil {
		t.Fatal(err)
	}
	pdu, err := v.NewEventFromTrustedJSON(raw, false)
	if err != nil {
		t.Fatalf("version %s: %s: %v", version, raw, err)
	}
	return pdu.EventID()
}

// redactedID is gmlID by steps: for room version 12, whose room ids gomatrixserverlib
// checks, and with a member in the redacted content that its redaction leaves out. It
// drops third_party_invite as a whole, of which signed stays from version 11 on.
func redactedID(t *testing.T, version string, e map[string]any, invite map[string]any) string {
	t.Helper()
	v, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersion(version))
	if err != nil {
		t.Fatal(err)
	}
	redacted, err := v.RedactEventJSON(marshal(t, e))
	if err != nil {
		t.Fatal(err)
	}
	var event map[string]json.RawMessage
	if err := json.Unmarshal(redacted, &event); err != nil {
		t.Fatal(err)
	}
	if invite != nil {
		var content map[string]any
		if err := json.Unmarshal(event["content"], &content); err != nil {
			t.Fatal(err)
		}
		if _, ok := content["third_party_invite"]; ok {
			t.Fatalf("gomatrixserverlib keeps third_party_invite now: %s", redacted)
		}
		content["third_party_invite"] = invite
		event["content"] = marshal(t, content)
	}
	delete(event, "signatures")
	canonical, err := gomatrixserverlib.CanonicalJSON(marshal(t, event))
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(canonical)
	return "$" + base64.RawURLEncoding.EncodeToString(hash[:])
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// An event has the ids that gomatrixserverlib gives it in the room versions, and
// only those, and that which a Synapse gives it is one of them.
func TestEventIDs(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	s := synapse(t)
	var invites, taken, several int
	for i := range rounds {
		e := event(rng)
		if rng.IntN(20) == 0 {
			e["event_id"] = "$" + text(rng, plain) + ":origin.example"
		}
		raw := marshal(t, e)
		want := make(map[string]bool)
		for version := 3; version <= 12; version++ {
			name := strconv.Itoa(version)
			invite, ok := e["content"].(map[string]any)["third_party_invite"].(map[string]any)
			switch {
			case e["event_id"] != nil:
				want[e["event_id"].(string)] = true
			case ok && version >= 11 && e["type"] == "m.room.member":
				invites++
				signed := make(map[string]any)
				if v, ok := invite["signed"]; ok {
					signed["signed"] = v
				}
				want[redactedID(t, name, e, signed)] = true
			case version == 12 && e["type"] == "m.room.create":
				// gomatrixserverlib refuses what Synapse redacts: a create event with a room_id.
				without := maps.Clone(e)
				delete(without, "room_id")
				without["state_key"] = ""
				id := gmlID(t, name, without)
				if !slices.Contains(matrix.EventIDs(marshal(t, without)), id) {
					t.Fatalf("%s\n lacks %s", marshal(t, without), id)
				}
				delete(without, "state_key")
				if key, ok := e["state_key"]; ok {
					without["state_key"] = key
				}
				want[redactedID(t, name, without, nil)] = true
			case version == 12:
				want[redactedID(t, name, e, nil)] = true
			default:
				want[gmlID(t, name, e)] = true
			}
		}
		ids := matrix.EventIDs(raw)
		if got, want := slices.Sorted(slices.Values(ids)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) {
			t.Fatalf("%s\n got %q\nwant %q", raw, got, want)
		}
		if len(ids) > 2 {
			several++
		}
		for _, id := range ids {
			if !matrix.HasEventID(raw, id) || matrix.HasEventID(raw, id[:len(id)-1]) {
				t.Fatalf("%s\n has %q, but not %s; or what is shorter by one", raw, ids, id)
			}
		}
		if s == nil || i >= rounds/4 {
			continue
		}
		for version, id := range s.ask(t, "ids", map[string]any{"event": string(raw)}).IDs {
			taken++
			if !slices.Contains(ids, id) {
				t.Fatalf("%s\n has the id %s in Synapse's version %s, got %q", raw, id, version, ids)
			}
		}
	}
	if invites == 0 || several == 0 || s != nil && taken < rounds {
		t.Errorf("the events were too plain: %d invites, %d with several redactions, %d taken by Synapse", invites, several, taken)
	}
}

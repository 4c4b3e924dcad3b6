package matrix

import (
	"encoding/json"
	"net/url"
	"strings"
)

// maxRoomID bounds a room id, in bytes (appendices, "Room IDs").
const maxRoomID = 255

// RoomID returns the room that a request is about, if its endpoint is one whose
// path names a room first: "/_matrix/federation/v1/make_join/!room:host/@user:host".
// "" is none, or something that is no room id.
func RoomID(ep *Endpoint, target string) string {
	if ep.Join == 0 {
		return ""
	}
	path, _, _ := strings.Cut(target, "?")
	for _, pattern := range ep.Paths {
		prefix, _, _ := strings.Cut(pattern, "*")
		rest, ok := strings.CutPrefix(path, prefix)
		if !ok {
			continue
		}
		segment, _, _ := strings.Cut(rest, "/")
		room, err := url.PathUnescape(segment)
		if err != nil || len(room) > maxRoomID || !strings.HasPrefix(room, "!") || len(room) == 1 {
			return ""
		}
		return room
	}
	return ""
}

// ProfileField takes the target of a profile query apart: the member that is
// asked for, and the target of the query for the whole profile, whose answer
// holds it. They are "" where one member cannot be told from the whole: only
// those that every profile has are there when they are not set
// (synapse/handlers/profile.py, on_profile_query).
func ProfileField(target string) (field, whole string) {
	path, query, ok := strings.Cut(target, "?")
	if !ok {
		return "", ""
	}
	user, found := "", false
	for part := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(part, "=")
		switch {
		case name == "user_id" && !found:
			user, found = part, true
		case name == "field" && field == "" && (value == "displayname" || value == "avatar_url"):
			field = value
		default:
			return "", ""
		}
	}
	if !found || field == "" {
		return "", ""
	}
	return field, path + "?" + user
}

// ProfileMember returns the answer to the query for one field of a profile, cut
// from the whole. It reports false if the profile is no JSON object.
func ProfileMember(profile []byte, field string) ([]byte, bool) {
	var members map[string]json.RawMessage
	if json.Unmarshal(profile, &members) != nil || members == nil {
		return nil, false
	}
	value, ok := members[field]
	if !ok {
		return []byte("{}"), true
	}
	b := append(AppendString([]byte{'{'}, field), ':')
	return append(append(b, value...), '}'), true
}

package matrix

import (
	"strings"
	"testing"
)

func TestRoomOfARequest(t *testing.T) {
	for _, tt := range []struct{ method, target, room string }{
		{"GET", "/_matrix/federation/v1/make_join/!room:host/@user:host?ver=10", "!room:host"},
		{"GET", "/_matrix/federation/v1/make_join/%21room%3Ahost/%40user%3Ahost", "!room:host"},
		{"PUT", "/_matrix/federation/v2/send_join/!room:host/$event?omit_members=true", "!room:host"},
		{"PUT", "/_matrix/federation/v1/send_join/!room:host/$event", "!room:host"},
		{"GET", "/_matrix/federation/v1/state/!room?event_id=$e", "!room"},
		{"GET", "/_matrix/federation/v1/state_ids/!room/?event_id=$e", "!room"},
		{"GET", "/_matrix/federation/v1/event_auth/!room/$e", "!room"},
		{"GET", "/_matrix/federation/v1/state/!a%2Fb?event_id=$e", "!a/b"},
		{"GET", "/_matrix/federation/v1/state/!a%2?event_id=$e", ""}, // no encoding
		{"GET", "/_matrix/federation/v1/state/!?event_id=$e", ""},
		{"GET", "/_matrix/federation/v1/state/@user:host", ""},
		{"GET", "/_matrix/federation/v1/state/!" + strings.Repeat("x", maxRoomID), ""},
		{"GET", "/_matrix/federation/v1/state/!" + strings.Repeat("x", maxRoomID-1), "!" + strings.Repeat("x", maxRoomID-1)},
		{"GET", "/_matrix/federation/v1/backfill/!room?v=$e", ""}, // has no part in a join
		{"GET", "/_matrix/federation/v1/make_leave/!room/@user:host", ""},
		{"GET", "/_matrix/federation/v1/query/profile?user_id=!room", ""},
	} {
		if got := RoomID(Match(tt.method, tt.target), tt.target); got != tt.room {
			t.Errorf("%s: %q, want %q", tt.target, got, tt.room)
		}
	}
}

func TestFieldOfAProfileQuery(t *testing.T) {
	const path = "/_matrix/federation/v1/query/profile"
	for _, tt := range []struct{ target, field, whole string }{
		{path + "?user_id=%40u%3Ah&field=displayname", "displayname", path + "?user_id=%40u%3Ah"},
		{path + "?field=avatar_url&user_id=@u:h", "avatar_url", path + "?user_id=@u:h"},
		{path + "?user_id=@u:h", "", ""},
		{path + "?field=displayname", "", ""},
		{path, "", ""},
		{path + "?user_id=@u:h&field=m.tz", "", ""}, // a 404 if it is not set
		{path + "?user_id=@u:h&field=", "", ""},
		{path + "?user_id=@u:h&field=displayname&field=avatar_url", "", ""},
		{path + "?user_id=@u:h&user_id=@v:h&field=displayname", "", ""},
		{path + "?user_id=@u:h&field=displayname&x=y", "", ""},
		{path + "?user_id=@u:h&field=display%6eame", "", ""},
	} {
		field, whole := ProfileField(tt.target)
		if field != tt.field || whole != tt.whole {
			t.Errorf("%s: %q of %q, want %q of %q", tt.target, field, whole, tt.field, tt.whole)
		}
	}
}

func TestMemberOfAProfile(t *testing.T) {
	for _, tt := range []struct{ profile, field, want string }{
		{`{"displayname":"A \u00fc","avatar_url":null}`, "displayname", `{"displayname":"A \u00fc"}`},
		{` {"displayname" : "A", "avatar_url" : null} `, "avatar_url", `{"avatar_url":null}`},
		{`{"avatar_url":"mxc://h/m"}`, "displayname", `{}`},
		{`{}`, "displayname", `{}`},
		{`null`, "displayname", ""},
		{`[]`, "displayname", ""},
		{`{"displayname":`, "displayname", ""},
		{``, "displayname", ""},
	} {
		got, ok := ProfileMember([]byte(tt.profile), tt.field)
		if ok != (tt.want != "") || string(got) != tt.want {
			t.Errorf("%s of %s: %s, %t; want %s", tt.field, tt.profile, got, ok, tt.want)
		}
	}
}

// Whatever a profile query asks for, the whole that it is cut from is a query of
// its own for the same user.
func FuzzProfileField(f *testing.F) {
	f.Add("/_matrix/federation/v1/query/profile?user_id=%40u%3Ah&field=displayname")
	f.Fuzz(func(t *testing.T, target string) {
		field, whole := ProfileField(target)
		if (field == "") != (whole == "") {
			t.Fatalf("%q of %q", field, whole)
		}
		if field == "" {
			return
		}
		if again, _ := ProfileField(whole); again != "" {
			t.Fatalf("the whole of %q is a query for %q", target, again)
		}
		_, query, _ := strings.Cut(whole, "?")
		if !strings.HasPrefix(query, "user_id=") || !strings.Contains(target, query) {
			t.Fatalf("%q becomes %q", target, whole)
		}
	})
}

package matrix

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Events that a Synapse 1.160 sent. The id of the first stood in the target of the
// request; that of the others in the prev_events or state of what came later.
const (
	joinOfSynapse    = `{"auth_events":["$dH8CwHfys1E3DNNHqpSoJqCP44aVkxF3VL5SAGahAAU","$0t49_KixZMJa5t3rJTZokMu5BwT99bEkMrs4nA9sQH0","$wJxc0MHwUg3chLEdZh9sHb-vbt53HdOIAsg2mHo-kHs"],"content":{"avatar_url":null,"displayname":"alice28941","membership":"join"},"depth":38,"hashes":{"sha256":"72UvIlSctvfIc8I3Xc4Uwa26TbdKnblI6zD4E8iZR1k"},"origin_server_ts":1795228946256,"prev_events":["$01m7SpjBr8AJJE-_yw87wryeljhIfDjD7vkKVh0bICE"],"room_id":"!iuKpZVTqtEohmBNYbT:hs2.test:18248","sender":"@alice28941:hs1.test:18448","signatures":{"hs1.test:18448":{"ed25519:a_lhdP":"4w/zLV/UCGovArVWAy6XezzMCUp3ayxkDzWBJclUgbSNWSF3tnNd9+YyEMfIPOMnEL+Nob1cDNP/WJ/4WKvADQ"}},"state_key":"@alice28941:hs1.test:18448","type":"m.room.member","unsigned":{"age":3}}`
	leaveOfSynapse   = `{"auth_events":["$fUvVH3XkNrKAi3wmxOSEza-QNg0VkwrKzEuVmJGDE7s","$eFAVuhrPMjrl5TQpE8DHqUWxWy3_YZ_uIrjoaNHoG9Y","$3QMUFVXq9JHkg8BN4a5OrtiFvEiQ-nXJRuyXFd3kZSs"],"content":{"membership":"leave"},"depth":9,"hashes":{"sha256":"PguN9NPo6tga9k6r7tHMG+1WbL0Z0KincrvKS9WyDhE"},"origin_server_ts":1795228978522,"prev_events":["$3QMUFVXq9JHkg8BN4a5OrtiFvEiQ-nXJRuyXFd3kZSs"],"room_id":"!WQbCPerPDdcucunSRg:hs2.test:18248","sender":"@ann28941:hs1.test:18448","signatures":{"hs1.test:18448":{"ed25519:a_lhdP":"6lTu5v/YoPReZec0Q3eOuzYc6XVwi+Uf1sq3Y3xPAUkv5iq6cpqmAFoGwf7OlLUYIytqKN3qazmWR0fuW0xaAA"}},"state_key":"@ann28941:hs1.test:18448","type":"m.room.member","unsigned":{"age":1}}`
	messageOfSynapse = `{"auth_events":["$0t49_KixZMJa5t3rJTZokMu5BwT99bEkMrs4nA9sQH0","$d5H77FLtFiBkXx87IS9iSJnM0CuLh-BY_uHc0QgNZ_k","$dH8CwHfys1E3DNNHqpSoJqCP44aVkxF3VL5SAGahAAU"],"content":{"body":"hello","msgtype":"m.text"},"depth":40,"hashes":{"sha256":"1FNScSry2F055wfi+yycdq2lYQhlozUtH01UTuykD6c"},"origin_server_ts":1795228949788,"prev_events":["$8hD8FdawMrPig2ECT-FLRsaJHnTAsxeU3w0pDKaMmvk"],"room_id":"!iuKpZVTqtEohmBNYbT:hs2.test:18248","sender":"@alice28941:hs1.test:18448","signatures":{"hs1.test:18448":{"ed25519:a_lhdP":"X5DDQGjkkui70Un+DZtfwjLiMkC/BaHBrd7ZmCjcNRrM4WD+UNLetx4AMBrrS7TxsYHWqqk5Qvblgu1ESEPSAw"}},"type":"m.room.message","unsigned":{"age_ts":1795228949788}}`
)

// ofAnyType is what the events of the table have in common.
const ofAnyType = `,"depth":7,"hashes":{"sha256":"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU"},"origin_server_ts":1700000000000,"sender":"@ann:origin.example",` +
	`"signatures":{"origin.example":{"ed25519:a":"QUJD"}},"unsigned":{"age":17}`
const inRoom = ofAnyType + `,"auth_events":["$a"],"prev_events":["$p"],"room_id":"!room:origin.example"}`

// The ids that Synapse 1.160 gives these events (event_from_pdu_json), in the room
// versions that take them; scripts/oracle compares many more.
func TestEventIDs(t *testing.T) {
	for _, c := range []struct {
		event string
		ids   []string // from version 3 on
		more  int      // that only an event of this form in another version would have
	}{
		{joinOfSynapse, []string{
			"$d5H77FLtFiBkXx87IS9iSJnM0CuLh+BY/uHc0QgNZ/k",
			"$d5H77FLtFiBkXx87IS9iSJnM0CuLh-BY_uHc0QgNZ_k",
		}, 0},
		{leaveOfSynapse, []string{
			"$dX9GijTvdSVo6EXIU92IGnzf3A1RLkHLwfOSLdSey3w",
		}, 0},
		{messageOfSynapse, []string{
			"$ZAYADZxkbmDVjQdguDlqMvJXzGwwIQAOTz4HWRBMpFo",
		}, 0},
		{`{"type":"m.room.message","content":{"body":"é\"\n<&>","msgtype":"m.text"},"redacts":"$x","age_ts":5` + inRoom, []string{
			"$rzcWtSVXib4xWebvxIIBEFbtaWaEp9Iw7/AqtNWeBpE", // 3
			"$rzcWtSVXib4xWebvxIIBEFbtaWaEp9Iw7_AqtNWeBpE", // 4 to 12
		}, 0},
		{`{"type":"m.room.message","content":{"body":"b"},"origin":"origin.example","prev_state":[],"membership":"join"` + inRoom, []string{
			"$8bXG5R9aE/xoJNYMCT2l96Kh3dI79Lmp9Ar0zUSLgg0", // 3
			"$8bXG5R9aE_xoJNYMCT2l96Kh3dI79Lmp9Ar0zUSLgg0", // 4 to 10
			"$rzcWtSVXib4xWebvxIIBEFbtaWaEp9Iw7_AqtNWeBpE", // 11, 12
		}, 0},
		{`{"type":"m.room.aliases","state_key":"origin.example","content":{"aliases":["#a:origin.example"],"x":1}` + inRoom, []string{
			"$T7tfEmdBcgh1IguEIYCQXgrATJQIjBITx/109XvFKC4", // 3
			"$T7tfEmdBcgh1IguEIYCQXgrATJQIjBITx_109XvFKC4", // 4, 5
			"$aF-4aRANLPgDVKpxwW6sdzgLr1G6bki03DI2p1qETLQ", // 6 to 12
		}, 0},
		{`{"type":"m.room.join_rules","state_key":"","content":{"join_rule":"restricted","allow":[{"type":"m.room_membership","room_id":"!b:c"}],"x":{}},"origin":"origin.example"` + inRoom, []string{
			"$GiBPcdUTOk6R5PHEMMhx2KkGR22qJYuV2yxElC6DjvM", // 3 to 7
			"$TfCZljWZ8qjhy-KoRvzq6zvPzU12TwR64zFOmjg4w08", // 8 to 10
			"$hxxPZSvHfVe5oHW2KfYJnV96Zs1rQRxAdjonHeEMBsY", // 11, 12
		}, 0},
		{`{"type":"m.room.member","state_key":"@bob:b","content":{"membership":"invite","displayname":"Bob","join_authorised_via_users_server":"@cy:c.example","third_party_invite":{"display_name":"b...","signed":{"token":"t","mxid":"@bob:b","signatures":{}}}}` + inRoom, []string{
			"$ohiN1gLuJrbTRnTNHvmaNlWvpZOa22Qt2valTuJznjI", // 3 to 8
			"$QK8AAPcmWR9KEox8z-y2Sct6T4frKx-TtpS4siQT1wQ", // 9, 10
			"$I-PS0vhd7pns5l21pmyiA5nJtf0jAzv1obmsASFna8w", // 11, 12
		}, 0},
		{`{"type":"m.room.member","state_key":"@bob:b","content":{"membership":"invite","third_party_invite":{"display_name":"b..."}}` + inRoom, []string{
			"$ohiN1gLuJrbTRnTNHvmaNlWvpZOa22Qt2valTuJznjI", // 3 to 10
			"$vgZBa4sBowhTLmVJw0tyNQpu70P9d7gQ5tAugGgz248", // 11, 12
		}, 0},
		{`{"type":"m.room.member","state_key":"@bob:b","content":{"membership":"invite","third_party_invite":"b"}` + inRoom, []string{
			"$ohiN1gLuJrbTRnTNHvmaNlWvpZOa22Qt2valTuJznjI", // 3 to 12
		}, 0},
		{`{"type":"m.room.power_levels","state_key":"","content":{"ban":50,"events":{"m.room.name":50},"events_default":0,"invite":1,"kick":50,"notifications":{"room":50},"redact":50,"state_default":50,"users":{"@ann:origin.example":100},"users_default":0}` + inRoom, []string{
			"$t+jqDr14fjQX2YMZnns5Y3SqUXmQVLJcgBcYh30TrOU", // 3
			"$t-jqDr14fjQX2YMZnns5Y3SqUXmQVLJcgBcYh30TrOU", // 4 to 10
			"$mNYMMPBK-SGlzwJN-GewNBoqfScnZ-aEqxSrN6U8-e4", // 11, 12
		}, 0},
		{`{"type":"m.room.power_levels","state_key":"","content":{"users":{"@ann:origin.example":12345678901234567890,"@b:b":"50"},"users_default":1.5}` + inRoom, []string{
			"$Ah86UeAFVFH4hGgMLgKlRY3BznC4avivFVlt5Q3xn/o", // 3
			"$Ah86UeAFVFH4hGgMLgKlRY3BznC4avivFVlt5Q3xn_o", // 4, 5
		}, 0},
		{`{"type":"m.room.history_visibility","state_key":"","content":{"history_visibility":"shared","x":1}` + inRoom, []string{
			"$KMSFEW/guYcrzYeq8lh/QU0OmANP581RQ/qa5Zea8jI", // 3
			"$KMSFEW_guYcrzYeq8lh_QU0OmANP581RQ_qa5Zea8jI", // 4 to 12
		}, 0},
		{`{"type":"m.room.redaction","content":{"reason":"r","redacts":"$c"},"redacts":"$c"` + inRoom, []string{
			"$ILpxQ1aV0mZCClzi+lnemk6W6F9rrwsSkx2vfc3h0Lo", // 3
			"$ILpxQ1aV0mZCClzi-lnemk6W6F9rrwsSkx2vfc3h0Lo", // 4 to 10
			"$lQKlZqqV9XbnELLgISSe4bdryIeIW39_R5WRT7T1CLk", // 11, 12
		}, 0},
		{`{"type":"m.room.create","state_key":"","content":{"creator":"@ann:origin.example","room_version":"10","m.federate":true,"\u0001\"":[]}` + ofAnyType + `,"auth_events":[],"prev_events":[],"room_id":"!room:origin.example"}`, []string{
			"$FUaXoe+BgK/vG0modK9Tud1K9Df/v5AF+p+JhVLpDPA", // 3
			"$FUaXoe-BgK_vG0modK9Tud1K9Df_v5AF-p-JhVLpDPA", // 4 to 10
			"$QB3P41582_XApi_9MGnXIfE3CcvNWt-JMh8ii026sBc", // 11
		}, 1},
		{`{"type":"m.room.create","state_key":"","content":{"room_version":"12","additional_creators":["@b:b"]}` + strings.Replace(ofAnyType, "7", "1", 1) + `,"auth_events":[],"prev_events":[]}`, []string{
			"$dpNTdNrAvDiXjhlRVNooNY8sKUmecgf9ZkJJu-RmTj4", // 12
		}, 2},
		{`{"type":"m.room.message","content":{"body":"b"},"event_id":"$15:origin.example"` + inRoom, []string{"$15:origin.example"}, 0},
	} {
		got := EventIDs([]byte(c.event))
		if len(got) != len(c.ids)+c.more || !isSubsequence(c.ids, got) {
			t.Errorf("%s\n has %q,\nwant %q and %d more", c.event, got, c.ids, c.more)
		}
		for _, id := range got {
			if !HasEventID([]byte(c.event), id) {
				t.Errorf("%s\n has %q, but not %s", c.event, got, id)
			}
		}
		for _, id := range []string{"", "$", got[0][1:], got[0] + "A", got[0][:len(got[0])-1], "!" + got[0][1:], "$dpNTdNrAvDiXjhlRVNooNY8sKUmecgf9ZkJJu-RmTj5", strings.Repeat("$", 300)} {
			if HasEventID([]byte(c.event), id) {
				t.Errorf("%s\n has the id %q", c.event, id)
			}
		}
	}
}

func isSubsequence(some, all []string) bool {
	for _, s := range some {
		i := slices.Index(all, s)
		if i < 0 {
			return false
		}
		all = all[i+1:]
	}
	return true
}

func TestEventIDsNone(t *testing.T) {
	big := func(size int) string {
		head := `{"content":{"body":"`
		tail := `"},"type":"m.room.message"}`
		return head + strings.Repeat("x", size-len(head)-len(tail)) + tail
	}
	if ids := EventIDs([]byte(big(maxEventText))); len(ids) == 0 {
		t.Error("no id for an event of the largest size")
	}
	longest := "$" + strings.Repeat("é", (maxEventID-1)/2)
	if ids := EventIDs([]byte(`{"type":"a","content":{},"event_id":"` + longest + `"}`)); len(ids) != 1 || ids[0] != longest {
		t.Errorf("an event_id of %d bytes: %q", len(longest), ids)
	}
	for _, pdu := range []string{
		big(maxEventText + 1),
		``, ` `, `null`, `[]`, `"x"`, `1`, `{`, `{}x`, `{}`,
		`{"type":"m.room.message"}`,
		`{"content":{}}`,
		`{"type":"m.room.message","content":null}`,
		`{"type":"m.room.message","content":[]}`,
		`{"type":"m.room.message","content":null,"event_id":"$a:b"}`,
		`{"content":{},"event_id":"$a:b"}`,
		`{"type":1,"content":{}}`,
		`{"type":null,"content":{}}`,
		`{"type":"m.room.message","content":{"a":"\ud800"}}`,
		`{"type":"m.room.message","content":{},"event_id":""}`,
		`{"type":"m.room.message","content":{},"event_id":"$"}`,
		`{"type":"m.room.message","content":{},"event_id":"15:origin.example"}`,
		`{"type":"m.room.message","content":{},"event_id":null}`,
		`{"type":"m.room.message","content":{},"event_id":["$a:b"]}`,
		`{"type":"m.room.message","content":{},"event_id":"$a\nb"}`,
		`{"type":"m.room.message","content":{},"event_id":"` + longest + `ab"}`,
		`{"type":"m.room.message","content":` + strings.Repeat(`{"a":`, MaxJSONDepth) + `1` + strings.Repeat(`}`, MaxJSONDepth+1),
	} {
		if ids := EventIDs([]byte(pdu)); len(ids) != 0 {
			t.Errorf("%.80s has %q", pdu, ids)
		}
		if HasEventID([]byte(pdu), "$a:b") {
			t.Errorf("%.80s has an id", pdu)
		}
	}
}

// slowEventIDs is EventIDs as the specification has it: one room version after the
// other, and all of its redaction. It is for any event that has ids.
func slowEventIDs(tb testing.TB, pdu []byte) []string {
	var ids []string
	for version := 3; version <= 12; version++ {
		e := decodeObject(tb, pdu)
		if id, ok := e["event_id"]; ok {
			return []string{id.(string)}
		}
		content := e["content"].(map[string]any)
		top := []string{"type", "room_id", "sender", "state_key", "content", "hashes", "depth", "prev_events", "auth_events", "origin_server_ts"}
		if version <= 10 {
			top = append(top, "prev_state", "origin", "membership")
		}
		if version == 12 && e["type"] == "m.room.create" {
			delete(e, "room_id")
		}
		var inside []string
		switch e["type"] {
		case "m.room.member":
			inside = []string{"membership"}
			if version >= 9 {
				inside = append(inside, "join_authorised_via_users_server")
			}
			if invite, ok := content["third_party_invite"].(map[string]any); ok && version >= 11 {
				inside = append(inside, "third_party_invite")
				keepOnly(invite, []string{"signed"})
			}
		case "m.room.create":
			if inside = []string{"creator"}; version >= 11 {
				for name := range content {
					inside = append(inside, name)
				}
			}
		case "m.room.join_rules":
			if inside = []string{"join_rule"}; version >= 8 {
				inside = append(inside, "allow")
			}
		case "m.room.power_levels":
			inside = []string{"ban", "events", "events_default", "kick", "redact", "state_default", "users", "users_default"}
			if version >= 11 {
				inside = append(inside, "invite")
			}
		case "m.room.aliases":
			if version <= 5 {
				inside = []string{"aliases"}
			}
		case "m.room.history_visibility":
			inside = []string{"history_visibility"}
		case "m.room.redaction":
			if version >= 11 {
				inside = []string{"redacts"}
			}
		}
		keepOnly(e, top)
		keepOnly(content, inside)
		text, err := json.Marshal(e)
		if err != nil {
			tb.Fatal(err)
		}
		if text, err = AppendCanonical(nil, text, RawNumbers); err != nil {
			tb.Fatal(err)
		}
		hash, encoding := sha256.Sum256(text), base64.RawURLEncoding
		if version == 3 {
			encoding = base64.RawStdEncoding
		}
		if id := "$" + encoding.EncodeToString(hash[:]); !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

func keepOnly(m map[string]any, names []string) {
	for name := range m {
		if !slices.Contains(names, name) {
			delete(m, name)
		}
	}
}

func decodeObject(tb testing.TB, text []byte) map[string]any {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		tb.Fatalf("%s: %v", text, err)
	}
	return m
}

func FuzzEventIDs(f *testing.F) {
	for _, event := range []string{joinOfSynapse, messageOfSynapse, `{"type":"m.room.message","content":{},"event_id":"$a:b"}`, `{"type":"m.room.create","content":{"third_party_invite":{"a":1}}}`, `{}`} {
		f.Add([]byte(event))
	}
	for kind, rules := range contentKept {
		var content []string
		for name := range rules {
			if name == "" {
				name = `"any"`
			}
			content = append(content, name+`:{"signed":1,"a":[1.50,-0]}`)
		}
		for _, more := range []string{"", `,"origin":"o","membership":null`, `,"room_id":1e3,"state_key":""`} {
			f.Add(fmt.Appendf(nil, `{"type":%s,"content":{%s}%s,"depth":3}`, kind, strings.Join(content, ","), more))
		}
	}
	f.Fuzz(func(t *testing.T, pdu []byte) {
		ids := EventIDs(pdu)
		if len(ids) == 0 {
			return
		}
		if want := slowEventIDs(t, pdu); !slices.Equal(ids, want) || len(ids) > 4 {
			t.Fatalf("%s\n got %q\nwant %q", pdu, ids, want)
		}
		for _, id := range ids {
			if !HasEventID(pdu, id) {
				t.Fatalf("%s\n has %q, but not %s", pdu, ids, id)
			}
		}
		canonical, err := AppendCanonical(nil, pdu, RawNumbers)
		if err != nil || !slices.Equal(EventIDs(canonical), ids) {
			t.Fatalf("%s\n has %q, in canonical form it has %q", pdu, ids, EventIDs(canonical))
		}
	})
}

func BenchmarkEventIDs(b *testing.B) {
	levels := `{"type":"m.room.power_levels","state_key":"","content":{"ban":50,"events":{"m.room.name":50},"invite":1,"users":{"@ann:origin.example":100},"users_default":0}` + inRoom
	for _, c := range []struct{ name, event string }{
		{"message", messageOfSynapse},
		{"member", joinOfSynapse},
		{"levels", levels},
		{"64KiB", strings.Replace(messageOfSynapse, `"hello"`, `"`+strings.Repeat("hello ", 10800)+`"`, 1)},
	} {
		event, err := AppendCanonical(nil, []byte(c.event), RawNumbers)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(event)))
			for b.Loop() {
				EventIDs(event)
			}
		})
		b.Run(c.name+"/has", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				HasEventID(event, "$dpNTdNrAvDiXjhlRVNooNY8sKUmecgf9ZkJJu-RmTj4")
			}
		})
	}
}

package matrix

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// A request for every path of every row, by the row's name. The targets are what
// Synapse 1.160 or a client library of another server sends.
var examples = []struct{ name, method, target string }{
	{"well_known", "GET", "/.well-known/matrix/server"},
	{"version", "GET", "/_matrix/federation/v1/version"},
	{"server_keys", "GET", "/_matrix/key/v2/server"},
	{"server_keys", "GET", "/_matrix/key/v2/server/"},
	{"server_keys", "GET", "/_matrix/key/v2/server/ed25519%3Aauto"},
	{"key_query", "POST", "/_matrix/key/v2/query"},
	{"key_query_server", "GET", "/_matrix/key/v2/query/matrix.org?minimum_valid_until_ts=0"},
	{"key_query_server", "GET", "/_matrix/key/v2/query/matrix.org/ed25519%3Aauto"},

	{"send", "PUT", "/_matrix/federation/v1/send/1795228940596"},
	{"send", "PUT", "/_matrix/federation/v1/send/1795228940596/"},
	{"event_auth", "GET", "/_matrix/federation/v1/event_auth/%21r%3Ahs2.test/%24e"},
	{"backfill", "GET", "/_matrix/federation/v1/backfill/%21r%3Ahs2.test?v=%2401m7&limit=100"},
	{"get_missing_events", "POST", "/_matrix/federation/v1/get_missing_events/%21r%3Ahs2.test"},
	{"state", "GET", "/_matrix/federation/v1/state/%21r%3Ahs2.test?event_id=%24e"},
	{"state", "GET", "/_matrix/federation/v1/state/%21r%3Ahs2.test/?event_id=%24e%2F"},
	{"state_ids", "GET", "/_matrix/federation/v1/state_ids/%21r%3Ahs2.test?event_id=%24e"},
	{"event", "GET", "/_matrix/federation/v1/event/%24a%2Fb%2F%2Fc"},
	{"timestamp_to_event", "GET", "/_matrix/federation/v1/timestamp_to_event/%21r%3Ahs2.test?ts=1000&dir=b"},
	{"extremities", "GET", "/_matrix/federation/unstable/org.matrix.msc4370/extremities/%21r%3Ahs2.test"},

	{"make_join", "GET", "/_matrix/federation/v1/make_join/%21r%3Ahs2.test/%40u%3Ahs1.test?ver=1&ver=2"},
	{"send_join", "PUT", "/_matrix/federation/v2/send_join/%21r%3Ahs2.test/%24e?omit_members=true"},
	{"send_join", "PUT", "/_matrix/federation/v1/send_join/%21r%3Ahs2.test/%24e"},
	{"make_knock", "GET", "/_matrix/federation/v1/make_knock/%21r%3Ahs2.test/%40u%3Ahs1.test?ver=7"},
	{"send_knock", "PUT", "/_matrix/federation/v1/send_knock/%21r%3Ahs2.test/%24e"},
	{"invite", "PUT", "/_matrix/federation/v2/invite/%21r%3Ahs2.test/%24e"},
	{"invite", "PUT", "/_matrix/federation/v1/invite/%21r%3Ahs2.test/%24e"},
	{"make_leave", "GET", "/_matrix/federation/v1/make_leave/%21r%3Ahs2.test/%40u%3Ahs1.test"},
	{"send_leave", "PUT", "/_matrix/federation/v2/send_leave/%21r%3Ahs2.test/%24e"},
	{"send_leave", "PUT", "/_matrix/federation/v1/send_leave/%21r%3Ahs2.test/%24e"},
	{"exchange_third_party_invite", "PUT", "/_matrix/federation/v1/exchange_third_party_invite/%21r%3Ahs2.test"},
	{"3pid_onbind", "PUT", "/_matrix/federation/v1/3pid/onbind"},
	{"complexity", "GET", "/_matrix/federation/unstable/rooms/%21r%3Ahs2.test/complexity"},
	{"policy_sign", "POST", "/_matrix/policy/v1/sign"},
	{"policy_sign", "POST", "/_matrix/policy/unstable/org.matrix.msc4284/sign"},

	{"query_directory", "GET", "/_matrix/federation/v1/query/directory?room_alias=%23a%3Ahs2.test"},
	{"query_profile", "GET", "/_matrix/federation/v1/query/profile?user_id=%40bob%3Ahs2.test&field=displayname"},
	{"query", "GET", "/_matrix/federation/v1/query/anything?a=/b/c"},
	{"account_status", "POST", "/_matrix/federation/unstable/org.matrix.msc3720/account_status"},
	{"account_status", "POST", "/_matrix/federation/unstable/org.matrix.msc3720/query/account_status"},
	{"public_rooms", "GET", "/_matrix/federation/v1/publicRooms?include_all_networks=false"},
	{"public_rooms_search", "POST", "/_matrix/federation/v1/publicRooms"},
	{"hierarchy", "GET", "/_matrix/federation/v1/hierarchy/%21r%3Ahs2.test?suggested_only=true"},
	{"hierarchy", "GET", "/_matrix/federation/unstable/org.matrix.msc2946/hierarchy/%21r%3Ahs2.test?suggested_only=true"},
	{"openid_userinfo", "GET", "/_matrix/federation/v1/openid/userinfo?access_token=x"},

	{"user_keys_query", "POST", "/_matrix/federation/v1/user/keys/query"},
	{"user_keys_claim", "POST", "/_matrix/federation/v1/user/keys/claim"},
	{"user_keys_claim", "POST", "/_matrix/federation/unstable/user/keys/claim"},
	{"user_devices", "GET", "/_matrix/federation/v1/user/devices/%40bob%3Ahs2.test"},

	{"media_download", "GET", "/_matrix/federation/v1/media/download/yCHBrnCJWxaBZLgzJWfVxkqA?timeout_ms=20000"},
	{"media_thumbnail", "GET", "/_matrix/federation/v1/media/thumbnail/yCHB?width=1&height=1"},
	{"media_download_legacy", "GET", "/_matrix/media/v3/download/hs2.test%3A18248/yCHB?allow_remote=false"},
	{"media_download_legacy", "GET", "/_matrix/media/v3/download/hs2.test/yCHB/a.png"},
	{"media_download_legacy", "GET", "/_matrix/media/r0/download/hs2.test/yCHB?allow_remote=false"},
	{"media_download_legacy", "GET", "/_matrix/media/r0/download/hs2.test/yCHB/a.png"},
	{"media_download_legacy", "GET", "/_matrix/media/v1/download/hs2.test/yCHB"},
	{"media_download_legacy", "GET", "/_matrix/media/v1/download/hs2.test/yCHB/a.png"},
	{"media_thumbnail_legacy", "GET", "/_matrix/media/v3/thumbnail/hs2.test/yCHB?width=1"},
	{"media_thumbnail_legacy", "GET", "/_matrix/media/r0/thumbnail/hs2.test/yCHB"},
	{"media_thumbnail_legacy", "GET", "/_matrix/media/v1/thumbnail/hs2.test/yCHB"},

	{"other_get", "GET", "/"},
	{"other_get", "GET", ""},
	{"other_get", "GET", "?/_matrix/federation/v1/version"},
	{"other_get", "GET", "*"},
	{"other_get", "GET", "//_matrix/federation/v1/version"},
	{"other_get", "GET", "/_matrix/federation/v1/version//"},
	{"other_get", "GET", "/_matrix/federation/v1"},
	{"other_get", "GET", "/_matrix/federation/v1/send/1"},
	{"other_get", "GET", "/_matrix/federation/v1/event/a/b"},
	{"other_get", "GET", "/_matrix/federation/v1/query"},
	{"other_get", "GET", "/_matrix/federation/v3/version"},
	{"other_get", "GET", "/_matrix/federation/v1/groups/%2Bg%3Ahs2.test/profile"},
	{"other_get", "GET", "/_matrix/federation/V1/version"},
	{"other_get", "GET", "/_matrix/federation/v1/%76ersion"},
	{"other", "get", "/_matrix/federation/v1/version"},
	{"other", "HEAD", "/_matrix/federation/v1/version"},
	{"other", "POST", "/_matrix/federation/v1/send/1"},
	{"other", "POST", "/_matrix/federation/v1/groups/local/%2Bg%3Ahs2.test/users/a/invite"},
	{"other", "", ""},
}

func TestMatch(t *testing.T) {
	matched := make(map[string]bool)
	for _, c := range examples {
		e := Match(c.method, c.target)
		if e.Name != c.name {
			t.Errorf("Match(%q, %q) is %q, want %q", c.method, c.target, e.Name, c.name)
		}
		path, _, _ := strings.Cut(c.target, "?")
		for _, p := range e.Paths {
			if samePath(p, strings.TrimSuffix(path, "/")) {
				matched[e.Name+" "+p] = true
			}
		}
	}
	for _, e := range endpoints {
		for _, p := range e.Paths {
			if !matched[e.Name+" "+p] {
				t.Errorf("no example for %s %s", e.Method, p)
			}
		}
	}
	if n := testing.AllocsPerRun(100, func() {
		for _, c := range examples {
			Match(c.method, c.target)
		}
	}); n > 0 {
		t.Errorf("%v allocations for %d matches", n, len(examples))
	}
}

// samePath reports whether path is of the pattern p, the slow and obvious way.
func samePath(p, path string) bool {
	return slices.EqualFunc(strings.Split(p, "/"), strings.Split(path, "/"), func(a, b string) bool {
		return a == "*" || a == b
	})
}

// What Synapse 1.160 sends and is sent all has a row.
func TestMatchSynapse(t *testing.T) {
	seen := make(map[string]bool)
	for _, r := range recordings(t) {
		target := r.Target
		if strings.HasPrefix(target, "matrix-federation:") {
			var err error
			if _, target, err = ParseFederationTarget(r.Target); err != nil {
				t.Fatal(err)
			}
		}
		e := Match(r.Method, target)
		if e.Paths == nil {
			t.Errorf("no row for %s %s", r.Method, target)
		}
		if int64(len(r.Body)) > e.MaxRequest {
			t.Errorf("%s: body of %d bytes is beyond MaxRequest", e.Name, len(r.Body))
		}
		seen[e.Name] = true
	}
	for _, name := range []string{"send", "make_join", "send_join", "invite", "state", "user_keys_claim", "media_download", "server_keys"} {
		if !seen[name] {
			t.Errorf("%s is not among the recordings", name)
		}
	}
}

func TestEndpointTable(t *testing.T) {
	names := make(map[string]bool)
	requests := make(map[string]string)
	for _, e := range All() {
		if e.Name == "" || names[e.Name] || strings.Trim(e.Name, "abcdefghijklmnopqrstuvwxyz_3") != "" {
			t.Errorf("name %q is empty, not unique or no label", e.Name)
		}
		names[e.Name] = true
		for _, p := range e.Paths {
			if other, ok := requests[e.Method+" "+p]; ok {
				t.Errorf("%s %s is both %s and %s", e.Method, p, other, e.Name)
			}
			requests[e.Method+" "+p] = e.Name
			if p[0] != '/' || strings.HasSuffix(p, "/") || strings.ContainsAny(p, "?%#") {
				t.Errorf("%s: path %q", e.Name, p)
			}
			// No named segment hides a row behind it.
			if got := Match(e.Method, strings.ReplaceAll(p, "*", "x")); got.Name != e.Name {
				t.Errorf("%s %s matches %s", e.Method, p, got.Name)
			}
		}
		for _, rule := range []struct {
			broken bool
			says   string
		}{
			{e.Class < ClassJoin || e.Class > NumClasses, "class out of range"},
			{e.Method == "" && !e.Unknown(), "no method"},
			{len(e.Paths) == 0 && !strings.HasPrefix(e.Name, "other"), "no path"},
			{e.Timeout < 10*time.Second || e.Timeout > 600*time.Second, "timeout out of range"},
			{e.MaxRequest != 13_107_200, "request limit"},
			{e.MaxResponse != 100<<20 && e.MaxResponse != 500<<20 && e.Name != "well_known", "response limit"},
			{e.Once && (e.Share != ShareNever || e.CacheFor != 0 || e.Repeat || e.CancelSafe), "Once, but shared, cached, repeated or cancelled"},
			{e.CacheFor > 0 && !(e.Share == ShareSame && e.CancelSafe && e.Repeat), "cached, but no pure query"},
			{e.CacheFor < 0 || e.StaleFor < 0 || e.CacheFor > 24*time.Hour, "age out of range"},
			{e.StaleFor > 0 && e.CacheFor == 0, "stale but never fresh"},
			{e.Method == "PUT" && (e.CancelSafe || e.CacheFor > 0), "changes something, but is cancelled or cached"},
			{e.Method == "GET" && !(e.CancelSafe && e.Repeat), "a GET that is not safe"},
			{e.CancelSafe && !e.Repeat, "harmless to cancel but not to repeat"},
			{(e.Keep || e.Durable || e.Kind == AnswerMedia) && e.Share != ShareSame, "kept, but not shared"},
			{e.Durable && e.CacheFor == 0 && e.Kind != AnswerServerKeys, "stored, but never fresh"},
			{e.MissingFor > 0 && e.CacheFor == 0, "a 404 is kept, a 200 is not"},
			{e.Whole > 0 && (e.RunOn == 0 || !e.Keep), "held back, but not kept for who comes again"},
			{(e.Tries > 0 || e.RunOn > 0) && e.Share != ShareSame, "comes again, but is not shared"},
			{e.RunOn > 0 && e.RunOn < e.Timeout*time.Duration(max(e.Tries, 1)), "ends before its caller has given up"},
			{e.Join == JoinSend && e.Whole != 60*time.Second, "Synapse's time for the body"},
			{e.Join != 0 && !strings.Contains(e.Paths[0], "*"), "a join without a room"},
		} {
			if rule.broken {
				t.Errorf("%s: %s", e.Name, rule.says)
			}
		}
	}
	for _, name := range []string{"user_keys_claim", "3pid_onbind"} {
		if i := slices.IndexFunc(All(), func(e Endpoint) bool { return e.Name == name }); i < 0 || !All()[i].Once {
			t.Errorf("%s is not Once", name)
		}
	}
}

// The figures that differ from the default, each looked up in Synapse.
func TestEndpointFigures(t *testing.T) {
	timeouts := map[time.Duration][]string{
		10 * time.Second:  {"query", "query_directory", "query_profile", "server_keys", "user_keys_claim", "user_keys_query"},
		20 * time.Second:  {"make_join", "make_knock", "make_leave"},
		30 * time.Second:  {"policy_sign", "user_devices"},
		600 * time.Second: {"state"},
	}
	got := make(map[time.Duration][]string)
	sets := make(map[string][]string)
	var ignores, unsigned []string
	for _, e := range All() {
		if e.Timeout != DefaultTimeout {
			got[e.Timeout] = append(got[e.Timeout], e.Name)
		}
		for what, is := range map[string]bool{
			"large answers": e.MaxResponse == MaxStateBody, "durable": e.Durable, "held back": e.Whole > 0, "coming again": e.Tries > 0,
			"make": e.Join == JoinMake, "send": e.Join == JoinSend, "resync": e.Join == JoinResync, "media": e.Kind == AnswerMedia, "404 kept": e.MissingFor > 0,
		} {
			if is {
				sets[what] = append(sets[what], e.Name)
			}
		}
		if e.IgnoresBackoff {
			ignores = append(ignores, e.Name)
		}
		if e.Unsigned && !e.Unknown() {
			unsigned = append(unsigned, e.Name)
		}
	}
	check := func(what string, got, want []string) {
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	for d, names := range timeouts {
		check(d.String(), got[d], names)
		delete(got, d)
	}
	if len(got) > 0 {
		t.Errorf("unexpected timeouts: %v", got)
	}
	for what, want := range map[string][]string{
		"large answers": {"send_join", "state"},
		"durable":       {"complexity", "hierarchy", "query_profile", "server_keys", "version"},
		"held back":     {"send_join", "state"},
		"coming again":  {"send_join"},
		"make":          {"make_join"},
		"send":          {"send_join"},
		"resync":        {"event_auth", "state", "state_ids"},
		"media":         {"media_download", "media_download_legacy", "media_thumbnail", "media_thumbnail_legacy"},
		"404 kept":      {"event", "query_profile"},
	} {
		check(what, sets[what], want)
	}
	check("ignoring back-off", ignores, []string{"invite", "make_leave", "policy_sign", "public_rooms", "public_rooms_search",
		"query_directory", "query_profile", "send_leave", "server_keys"})
	check("unsigned", unsigned, []string{"3pid_onbind", "key_query", "key_query_server", "media_download_legacy",
		"media_thumbnail_legacy", "openid_userinfo", "server_keys", "version", "well_known"})
	if e := Match("GET", "/_matrix/federation/v1/query/profile"); e.CacheFor != 5*time.Minute || e.StaleFor != 24*time.Hour || e.MissingFor != 30*time.Second {
		t.Errorf("profile: cached for %v, stale for %v", e.CacheFor, e.StaleFor)
	}
}

func TestAllIsACopy(t *testing.T) {
	rows := All()
	if len(rows) != len(endpoints)+len(others) {
		t.Fatalf("%d rows", len(rows))
	}
	rows[0].Name, rows[0].Paths[0] = "changed", "changed"
	if again := All(); again[0].Name == "changed" || again[0].Paths[0] == "changed" {
		t.Error("All lends out the table")
	}
}

func FuzzMatch(f *testing.F) {
	for _, c := range examples {
		f.Add(c.method, c.target)
	}
	f.Fuzz(func(t *testing.T, method, target string) {
		e := Match(method, target)
		path, _, _ := strings.Cut(target, "?")
		path = strings.TrimSuffix(path, "/")
		if e.Paths == nil {
			if (e.Name == "other_get") != (method == "GET") {
				t.Fatalf("%q %q is %q", method, target, e.Name)
			}
			return
		}
		if e.Method != method || !slices.ContainsFunc(e.Paths, func(p string) bool { return samePath(p, path) }) {
			t.Fatalf("%q %q is %q", method, target, e.Name)
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		Match("PUT", "/_matrix/federation/v2/send_join/%21r%3Ahs2.test/%24e?omit_members=true")
	}
}

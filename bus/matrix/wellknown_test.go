package matrix

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestParseWellKnown(t *testing.T) {
	for _, c := range []struct {
		body string
		want ServerName
	}{
		{`{"m.server": "delegated.example.com:1234"}`, "delegated.example.com:1234"},
		{" {\"x\": {\"m.server\": 1}, \"m.server\": \"Synapse.Example.com\"}\n", "Synapse.Example.com"},
		{`{"m.server":"192.0.2.1"}`, "192.0.2.1"},
		{`{"m.server":"[2001:db8::1]:443"}`, "[2001:db8::1]:443"},
		{`{"m.server":"a"}` + strings.Repeat(" ", MaxWellKnown-len(`{"m.server":"a"}`)), "a"},
	} {
		got, err := ParseWellKnown([]byte(c.body))
		if err != nil || got != c.want {
			t.Errorf("%.80s: got %q, %v; want %q", c.body, got, err, c.want)
		}
	}
	for _, body := range []string{
		"", "null", "[]", `"a"`, "{", "{}", "<html></html>", `{"M.Server":"a"}`, `{"m.server":null}`, `{"m.server":1}`, `{"m.server":["a"]}`,
		`{"m.server":""}`, `{"m.server":"https://a"}`, `{"m.server":"a/b"}`, `{"m.server":"a:x"}`, `{"m.server":" a"}`, `{"m.server":"\u00e9"}`,
		`{"m.server":"a"}x`, `{"m.server":"a"}` + strings.Repeat(" ", MaxWellKnown),
	} {
		if got, err := ParseWellKnown([]byte(body)); !errors.Is(err, ErrWellKnown) || got != "" {
			t.Errorf("%.80s: got %q, %v; want ErrWellKnown", body, got, err)
		}
	}
}

func TestWellKnownLifetime(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	list := func(s ...string) []string { return s }
	const inTwoHours = "Sat, 21 Nov 2026 14:00:00 GMT"
	for _, c := range []struct {
		cacheControl, expires []string
		want                  time.Duration
	}{
		{nil, nil, 24 * time.Hour},
		{list(""), nil, 24 * time.Hour},
		{list("public"), nil, 24 * time.Hour},
		{list("max-age=3600"), nil, time.Hour},
		{list("public, max-age=3600, must-revalidate"), nil, time.Hour},
		{list("public", " Max-Age = 3600 "), nil, time.Hour},
		{list(`max-age="3600"`), nil, time.Hour},
		{list("max-age=3600"), list(inTwoHours), time.Hour},
		{list("max-age=3600, max-age=7200"), nil, time.Hour},
		{list("max-age=x, max-age=7200"), nil, 2 * time.Hour},
		{list("s-maxage=60"), nil, 24 * time.Hour},
		{list(`private="a, max-age=60", max-age=3600`), nil, time.Hour},
		{list(`ext="\", no-store", max-age=3600`), nil, time.Hour},

		{list("max-age=0"), nil, 5 * time.Minute},
		{list("max-age=299"), nil, 5 * time.Minute},
		{list("max-age=301"), nil, 301 * time.Second},
		{list("max-age=172799"), nil, 172799 * time.Second},
		{list("max-age=172801"), nil, 48 * time.Hour},
		{list("max-age=99999999999999999999"), nil, 48 * time.Hour},
		{list("no-store"), nil, 5 * time.Minute},
		{list("max-age=3600, NO-STORE"), nil, 5 * time.Minute},
		{list("max-age=3600", "no-cache"), list(inTwoHours), 5 * time.Minute},

		{nil, list(inTwoHours), 2 * time.Hour},
		{list("max-age"), list(inTwoHours), 2 * time.Hour},
		{list("max-age=-1"), list(inTwoHours), 2 * time.Hour},
		{list("max-age=1h"), list(inTwoHours), 2 * time.Hour},
		{nil, list("0"), 5 * time.Minute},
		{nil, list(""), 5 * time.Minute},
		{nil, list("Sat, 21 Nov 2026 11:00:00 GMT"), 5 * time.Minute},
		{nil, list("Tue, 21 Nov 2028 11:00:00 GMT"), 48 * time.Hour},
		{nil, list("0", inTwoHours), 2 * time.Hour},
	} {
		if got := WellKnownLifetime(c.cacheControl, c.expires, now); got != c.want {
			t.Errorf("Cache-Control %q, Expires %q: got %v, want %v", c.cacheControl, c.expires, got, c.want)
		}
	}
}

func FuzzParseWellKnown(f *testing.F) {
	f.Add([]byte(`{"m.server":"example.com:443"}`))
	f.Add([]byte(`{"m.server":"\u0041.example"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		name, err := ParseWellKnown(body)
		if err != nil {
			if name != "" || !errors.Is(err, ErrWellKnown) {
				t.Fatalf("%q: %q, %v", body, name, err)
			}
			return
		}
		if again, err := ParseServerName(string(name)); err != nil || again != name {
			t.Fatalf("%q: %q is no server name", body, name)
		}
	})
}

func FuzzWellKnownLifetime(f *testing.F) {
	f.Add("max-age=3600", "no-store", "Sat, 21 Nov 2026 14:00:00 GMT", int64(1795262400))
	f.Add(`a="b\",c",max-age="7"`, "", "0", int64(0))
	f.Fuzz(func(t *testing.T, a, b, expires string, unix int64) {
		now := time.Unix(unix, 0)
		got := WellKnownLifetime([]string{a, b}, []string{expires}, now)
		if got < WellKnownMin || got > WellKnownMax {
			t.Fatalf("%q, %q, %q: %v", a, b, expires, got)
		}
		if got := WellKnownLifetime([]string{a, b, "no-store"}, []string{expires}, now); got != WellKnownMin {
			t.Fatalf("%q, %q, no-store: %v", a, b, got)
		}
	})
}

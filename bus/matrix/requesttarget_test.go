package matrix

import (
	"errors"
	"strings"
	"testing"
)

func TestParseFederationTarget(t *testing.T) {
	for _, c := range []struct {
		raw    string
		name   ServerName
		target string
	}{
		{"matrix-federation://hs2.test:18248/_matrix/federation/v1/event/%24a%2Fb?x=%20+&y", "hs2.test:18248", "/_matrix/federation/v1/event/%24a%2Fb?x=%20+&y"},
		{"matrix-federation://Example.COM/_Matrix/A?B=C", "Example.COM", "/_Matrix/A?B=C"},
		{"matrix-federation://[2001:db8::1]:8448/a//b/../c?q=//d:1@e", "[2001:db8::1]:8448", "/a//b/../c?q=//d:1@e"},
		{"matrix-federation://a/", "a", "/"},
		{"matrix-federation://a/?", "a", "/?"},
		{"matrix-federation://a/b?/_matrix/%", "a", "/b?/_matrix/%"},
	} {
		name, target, err := ParseFederationTarget(c.raw)
		if err != nil || name != c.name || target != c.target {
			t.Errorf("%s: got %q, %q, %v; want %q, %q", c.raw, name, target, err, c.name, c.target)
		}
	}
	for _, r := range recordings(t) {
		rest, ok := strings.CutPrefix(r.Target, "matrix-federation://")
		if !ok {
			continue
		}
		name, target, err := ParseFederationTarget(r.Target)
		if err != nil || string(name)+target != rest {
			t.Errorf("%s: got %q, %q, %v", r.Target, name, target, err)
		}
	}
}

func TestParseFederationTargetRejects(t *testing.T) {
	for _, raw := range []string{
		"", "/", "*", "a:443", "/_matrix/federation/v1/version", "https://a/b", "matrix-federation:/a/b", "matrix-federation:a/b",
		"MATRIX-FEDERATION://a/b", " matrix-federation://a/b", "matrix://a/b",
	} {
		if name, target, err := ParseFederationTarget(raw); !errors.Is(err, ErrNotFederation) || name != "" || target != "" {
			t.Errorf("%q: got %q, %q, %v; want ErrNotFederation", raw, name, target, err)
		}
	}
	const prefix = "matrix-federation://"
	for _, rest := range []string{
		"", "/", "/a", "a", "a?b", "a#b", "a?b/c", "user@a/b", "user:pass@a/b", "a:/b", "a:0/b", "a b/c", "a%2eb/c", "[::1/b", "[::1%25eth0]/b", "é/b", "a\\/b",
		"a//b", "a//", "a/b#c", "a/b?c#d", "a/b c", "a/b\tc", "a/b?c\r\nd", "a/b\x00", "a/b\x7f", "a/é", "a/b?\xff",
		"a/" + strings.Repeat("b", MaxRequestTarget),
	} {
		if name, target, err := ParseFederationTarget(prefix + rest); !errors.Is(err, ErrRequestTarget) || name != "" || target != "" {
			t.Errorf("%.80q: got %q, %q, %v; want ErrRequestTarget", rest, name, target, err)
		}
	}
	longest := prefix + "a/" + strings.Repeat("b", MaxRequestTarget-len(prefix+"a/"))
	if _, _, err := ParseFederationTarget(longest); err != nil {
		t.Errorf("%d bytes: %v", len(longest), err)
	}
	_, _, err := ParseFederationTarget(prefix + "a/b?access_token=secret #")
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("the error quotes the query: %v", err)
	}
}

func FuzzParseFederationTarget(f *testing.F) {
	for _, r := range recordings(f)[:4] {
		f.Add(r.Target)
	}
	f.Add("matrix-federation://A:1/%2F?#")
	f.Fuzz(func(t *testing.T, raw string) {
		name, target, err := ParseFederationTarget(raw)
		if err != nil {
			if name != "" || target != "" || errors.Is(err, ErrNotFederation) == errors.Is(err, ErrRequestTarget) {
				t.Fatalf("%q: %q, %q, %v", raw, name, target, err)
			}
			return
		}
		rest, ok := strings.CutPrefix(raw, "matrix-federation://")
		if !ok || !strings.HasSuffix(rest, target) || strings.TrimSuffix(rest, target) != string(name) {
			t.Fatalf("%q: %q, %q", raw, name, target)
		}
		if target[0] != '/' || strings.HasPrefix(target, "//") || strings.ContainsAny(target, " #\r\n\x00") {
			t.Fatalf("%q: target %q", raw, target)
		}
	})
}

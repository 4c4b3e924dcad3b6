package node

import (
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
)

func TestDocumentLine(t *testing.T) {
	const text = `# a = 1
data_dir = "x" # memory_limit = 1

memory_limit =    "1"
front.secret = "dotted"
[ outbound ]   # workers = 1
workers = 1
'max hosts' = 2
"quo.ted" = 3
cache = """
workers = 2
[status]
"""
after = 1

[federation]
ip_range_blocklist = [ # resolve = {}
    "resolve = 1",
    # ca_file = 1
    "x",
]
resolve = {"a.test" = "1", b.test = "2"}
ca_file = '''
'''
[federation.sub]
[one."t.wo".three]
four = 4
[[list]]
x = 1
[[list]]
y = 1
`
	for _, tt := range []struct {
		key  toml.Key
		want int
	}{
		{toml.Key{"data_dir"}, 2},
		{toml.Key{"memory_limit"}, 4},
		{toml.Key{"front"}, 5}, // no header: its first key
		{toml.Key{"front", "secret"}, 5},
		{toml.Key{"outbound"}, 6},
		{toml.Key{"outbound", "workers"}, 7},
		{toml.Key{"outbound", "max hosts"}, 8},
		{toml.Key{"outbound", "quo.ted"}, 9},
		{toml.Key{"outbound", "cache"}, 10},
		{toml.Key{"outbound", "after"}, 14},
		{toml.Key{"federation"}, 16},
		{toml.Key{"federation", "ip_range_blocklist"}, 17},
		{toml.Key{"federation", "resolve"}, 22},
		{toml.Key{"federation", "resolve", "a.test"}, 22},
		{toml.Key{"federation", "resolve", "b", "test"}, 22},
		{toml.Key{"federation", "ca_file"}, 23},
		{toml.Key{"federation", "sub"}, 25},
		{toml.Key{"one"}, 26},
		{toml.Key{"one", "t.wo"}, 26},
		{toml.Key{"one", "t.wo", "three", "four"}, 27},
		{toml.Key{"list"}, 30},
		// What is not there.
		{toml.Key{"federation", "status"}, 16},
		{toml.Key{"federation", "ca_file", "x"}, 23},
		{toml.Key{"front", "listen"}, 5},
		{toml.Key{"status", "listen"}, 1},
		{toml.Key{"log_level"}, 1},
	} {
		for _, variant := range []struct{ name, text string }{
			{"plain", text},
			{"CRLF", strings.ReplaceAll(text, "\n", "\r\n")},
			{"byte order mark", "\ufeff" + text},
		} {
			d, err := parseDocument(variant.text)
			if err != nil {
				t.Fatal(err)
			}
			if got := d.line(tt.key); got != tt.want {
				t.Errorf("%s, %s: line %d, want %d", variant.name, tt.key, got, tt.want)
			}
		}
	}
}

func TestDocumentValue(t *testing.T) {
	d, err := parseDocument("a = 1\nb.c = \"x\"\nd = [\"y\", 2]\n")
	if err != nil {
		t.Fatal(err)
	}
	if v, ok := d.value(toml.Key{"a"}); v != int64(1) || !ok {
		t.Errorf("a = %v, %v", v, ok)
	}
	if v, ok := d.value(toml.Key{"b", "c"}); v != "x" || !ok {
		t.Errorf("b.c = %v, %v", v, ok)
	}
	if v, ok := d.value(toml.Key{"d"}); !ok || len(v.([]any)) != 2 {
		t.Errorf("d = %v, %v", v, ok)
	}
	for _, key := range []toml.Key{{"x"}, {"a", "x"}, {"b", "x"}, {"b", "c", "x"}, {"d", "x"}, {"b.c"}} {
		if v, ok := d.value(key); ok {
			t.Errorf("%s = %v, want nothing", key, v)
		}
	}
}

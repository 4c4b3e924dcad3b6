package node

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"

	"fsbus/bus"
	"fsbus/netx"
	"fsbus/sched"
)

// minimal is a configuration with nothing but what is required.
const minimal = `data_dir = "."
[homeserver]
server_name = "example.org"
[front]
listen = ["127.0.0.1:8009"]
secret = "0123456789abcdef"
`

// mustParse returns the configuration in text, whose relative paths start at a
// folder of the test's own.
func mustParse(t testing.TB, text string) *Config {
	t.Helper()
	c, err := parseConfig("FILE", t.TempDir(), text)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// configErrors returns the parts of an error of Load.
func configErrors(t testing.TB, err error) []*ConfigError {
	t.Helper()
	if one, ok := err.(*ConfigError); ok {
		return []*ConfigError{one}
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("%T is neither a ConfigError nor several: %v", err, err)
	}
	var all []*ConfigError
	for _, err := range joined.Unwrap() {
		one, ok := err.(*ConfigError)
		if !ok {
			t.Fatalf("%T is not a ConfigError: %v", err, err)
		}
		all = append(all, one)
	}
	return all
}

var update = flag.Bool("update", false, "write what is said about the files in testdata/config into them")

// The files in testdata/config are wrong, each in one way or in some that go
// together. What has to be said about a file stands at its end, in comments
// that begin with "#!".
func TestConfigMistakesAreExplained(t *testing.T) {
	files, err := filepath.Glob("testdata/config/*.toml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for line := range strings.Lines(string(b)) {
				if s, ok := strings.CutPrefix(line, "#! "); ok {
					want = append(want, strings.TrimSuffix(s, "\n"))
				}
			}
			dir := t.TempDir()
			_, err = parseConfig("FILE", dir, string(b))
			if err == nil {
				t.Fatal("accepted")
			}
			got := strings.ReplaceAll(err.Error(), dir, "DIR")
			if w := strings.Join(want, "\n"); got != w && *update {
				text, _, _ := strings.Cut(string(b), "#! ")
				if err := os.WriteFile(file, []byte(text+"#! "+strings.ReplaceAll(got, "\n", "\n#! ")+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != w {
				t.Errorf("got\n%s\nwant\n%s", got, w)
			}
			for _, secret := range []string{"hunter2", "correct-horse", "1234567890123456", "0123456789abcdef"} {
				if strings.Contains(got, secret) {
					t.Errorf("shows %q", secret)
				}
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
	dir := t.TempDir()
	c, err := parseConfig("FILE", dir, minimal)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.DataDir = dir
	want.Homeserver.ServerName = "example.org"
	want.Front.Listen = []string{"127.0.0.1:8009"}
	want.Front.Secret = "0123456789abcdef"
	want.Front.secret = []byte("0123456789abcdef")
	if got := c.adminSocket(); got != dir+"/admin.sock" {
		t.Errorf("the admin's socket is %s", got)
	}
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got %+v\nwant %+v", *c, want)
	}
	if got := c.Core(); got != bus.Default() {
		t.Errorf("Core() = %+v, want bus.Default(), %+v", got, bus.Default())
	}
	if !slices.Equal(c.Federation.IPRangeBlocklist, netx.DefaultBlocklist()) {
		t.Error("the block-list is not netx.DefaultBlocklist()")
	}
}

// Every key is set to something else than its default, and arrives.
func TestConfigEveryKeyIsRead(t *testing.T) {
	const text = `data_dir = "d"
memory_limit = "256MiB"
log_level = "debug"
log_format = "json"
drain_timeout = "1m30s"
homeserver.server_name = "Example.ORG:8448"
homeserver.signing_key_path = "signing.key"
[front]
max_body = "20MiB"
listen = ["unix:s/fsbus.sock", "unix:/run/x.sock", "[::1]:8009", "localhost:0", "10.0.0.1:8009"]
secret = "another secret"
socket_mode = "0666"
socket_owner = "0"
socket_group = "0"
allow_remote = true
max_connections = 1000
max_reading = 48
[outbound]
workers = 64
unknown_hosts = 48
failing_hosts = 8
host_concurrency = 2
host_rate = 5
host_burst = 20
max_hosts = 20_000
connect_timeout = "1s"
tls_timeout = "2s"
body_timeout = "3s"
handshakes_per_second = 12.5
dns_queries = 4
idle_connections = 8
idle_timeout = "2m"
cache = "0"
cache_entries = 0
cache_disk = "0"
profile_fresh = "1m"
profile_stale = "0s"
spool_memory = "1MiB"
spool_disk = "2GiB"
spool_inline = "16KiB"
[keys]
notary = true
notary_name = "keys.invalid"
key_path = "signing.key"
cache_entries = 2000
cache_disk = "8MiB"
notary_batch = 20
notary_parallel = 2
notary_wait = "3s"
[joins]
keep = "2h"
keep_disk = "1GiB"
prefetch_keys = false
preflight = 0
[media]
cache_disk = "1GiB"
max_size = "30MiB"
cache_for = "1h"
[outbox]
ack_pace = 40
ack_pace_floor = 5
ack_pace_ceiling = 50
ack_hurry = 4
ack_hold = "30s"
ack_held = 3000
ack_small_room = 5
ack_talk = "1m"
ack_prompt = 30
ack_rooms = 1000
ack_destinations = 4000
ack_memory = "2MiB"
presence_window = "5s"
receipt_window = "2s"
typing_window = "1s"
max_transaction_bytes = "1MiB"
catch_up_after = "2h"
max_destinations = 2000
max_destination_items = 5000
max_destination_bytes = "8MiB"
max_items = 100000
max_disk = "1GiB"
[edge]
listen = ["unix:edge.sock", "0.0.0.0:8448"]
upstream = "unix:synapse.sock"
tls_certificate = "cert.pem"
tls_private_key = "key.pem"
trusted_proxies = ["127.0.0.1", "10.0.0.0/8"]
well_known = "matrix.example.org:443"
pass_client = true
max_connections = 64
max_connections_per_address = 4
max_reading = 8
header_timeout = "5s"
body_timeout = "20s"
body_rate = "8KiB"
body_total = "5m"
idle_timeout = "1m"
deny = ["*.evil.test"]
allow = ["*.test"]
allow_ip_literals = false
no_key = "refuse"
pass_rate = 1
key_fetches = 100
unverified = 32
unverified_bytes = "16MiB"
requests = 128
request_bytes = "16MiB"
spool_memory = "512KiB"
max_body = "14MiB"
checked_body = "4MiB"
origins = 1000
concurrency = 2
parallel = 4
transaction_queue = 5
origin_bytes = "13MiB"
origin_queue = 60
origin_parallel = 2
origin_rate = 5
origin_burst = 10
ephemeral = "drop"
ephemeral_rate = 10
ephemeral_share = 0.5
ephemeral_hold = "20s"
ephemeral_waiting = 100
join_hold = "10s"
record_entries = 1000
record_disk = "2MiB"
[federation]
ip_range_blocklist = []
ip_range_allowlist = ["10.0.0.0/8"]
resolve = {"HS2.test" = "127.0.0.1", "hs3.test:8448" = "[::1]:8449"}
proxy = "http://u:p@proxy.test:8080"
proxy_dns = true
client_timeout = "2m"
[status]
listen = "unix:status.sock"
hosts = ["fsbus.lan"]
allow_remote = true
admin = "unix:../other.sock"
`
	dir := t.TempDir()
	keyFile(t, dir, 7)
	certFiles(t, dir, "example.org")
	c, err := parseConfig("FILE", dir, text)
	if err != nil {
		t.Fatal(err)
	}
	d := DefaultConfig()
	defaults := d.fields()
	for i, f := range c.fields() {
		if f.equal(defaults[i]) && f.key() != "front.secret_path" && f.key() != "federation.ca_file" {
			t.Errorf("%s is still the default, %v", f.key(), f.value)
		}
	}
	for _, tt := range []struct{ key, got, want string }{
		{"data_dir", c.DataDir, dir + "/d"},
		{"server_name", string(c.Homeserver.ServerName), "Example.ORG:8448"},
		{"listen", fmt.Sprint(c.Front.Listen), "[unix:" + dir + "/s/fsbus.sock unix:/run/x.sock [::1]:8009 localhost:0 10.0.0.1:8009]"},
		{"status", c.Status.Listen, "unix:" + dir + "/status.sock"},
		{"admin", c.adminSocket(), dir + "/other.sock"},
		{"resolve", fmt.Sprint(c.Federation.Resolve), "map[HS2.test:127.0.0.1 hs3.test:8448:[::1]:8449]"},
		{"secret", string(c.Front.secret), "another secret"},
		{"core", fmt.Sprint(c.Core()), fmt.Sprint(bus.Config{
			ClientTimeout: 2 * time.Minute, Workers: 64, Unknown: 48, Failing: 8, HostConcurrency: 2,
			HostRate: 5, HostBurst: 20, MaxRequests: 1000, MaxHosts: 20000,
			ProfileFresh: time.Minute, KeepFor: 2 * time.Hour, KeepBytes: sched.GiB, MediaFor: time.Hour, MediaBytes: sched.GiB,
			Keys: bus.KeysConfig{OwnName: "keys.invalid", Batch: 20, Parallel: 2, Wait: 3 * time.Second, MaxWants: maxKeyWants}, Outbox: bus.OutboxConfig{
				MaxQueues: 2000, MaxTransaction: sched.MiB, PresenceWindow: 5 * time.Second, ReceiptWindow: 2 * time.Second, TypingWindow: time.Second, CatchUpAfter: 2 * time.Hour,
				Pace: bus.PaceConfig{Ack: 40, Floor: 5, Ceiling: 50, Hurry: 4, Hold: 30 * time.Second, MaxHeld: 3000, SmallRoom: 5, Talk: time.Minute, Prompt: 30,
					MaxRooms: 1000, MaxDestinations: 4000, MaxBytes: 2 * sched.MiB},
			}})},
		{"notary's key", c.notaryKeyPath(), dir + "/signing.key"},
		{"signing key", c.Homeserver.SigningKeyPath + " " + c.Homeserver.keys.String(), dir + "/signing.key ed25519:test"},
		{"listen options", fmt.Sprint(c.frontListenOptions()), fmt.Sprint(netx.ListenOptions{Mode: 0o666, Owner: "0", Group: "0", AllowRemote: true})},
		{"level", c.level().String(), "DEBUG"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.key, tt.got, tt.want)
		}
	}
}

// Each number, size and time takes the ends of its range, and nothing beyond.
func TestConfigRanges(t *testing.T) {
	d := DefaultConfig()
	for _, f := range d.fields() {
		if _, numeric := number(f.value.Interface()); !numeric {
			if f.tag.Get("range") != "" {
				t.Errorf("%s has a range that nobody looks at", f.key())
			}
			continue
		}
		least, most, ok := strings.Cut(f.tag.Get("range"), "..")
		if !ok {
			t.Errorf("%s has no range", f.key())
			continue
		}
		for _, tt := range []struct {
			value float64
			ok    bool
		}{{f.parse(least), true}, {f.parse(most), true}, {f.parse(least) - 1, false}, {f.parse(most) + 1, false}} {
			c := DefaultConfig()
			for _, g := range c.fields() {
				if g.key() == f.key() {
					g.value.Set(reflect.ValueOf(tt.value).Convert(g.value.Type()))
				}
			}
			doc, err := parseDocument("")
			if err != nil {
				t.Fatal(err)
			}
			k := &checker{file: "FILE", doc: doc, c: &c}
			if got := k.ranges(); got != tt.ok {
				t.Errorf("%s = %v: accepted is %v, want %v (%v)", f.key(), tt.value, got, tt.ok, k.err())
			}
		}
	}
}

func TestLoadFindsFilesFromTheConfigsFolder(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "fsbus.toml")
	load := func(federation string) (*Config, error) {
		t.Helper()
		write("fsbus.toml", "data_dir = \".\"\n[homeserver]\nserver_name = \"example.org\"\n[front]\nlisten = [\"127.0.0.1:8009\"]\n"+
			"secret_path = \"secret\"\n[federation]\n"+federation, 0o644)
		return Load(path)
	}
	for _, tt := range []struct {
		name, text string
		mode       os.FileMode
		err        string // its end; "" if it is fine
	}{
		{"trimmed", " \n0123456789abcdef\r\n", 0o640, ""},
		{"owner only", "0123456789abcdef", 0o400, ""},
		{"other can read", "0123456789abcdef", 0o644, "mode 0644: users who should not can read or change it; want mode 0640 or 0600 (chmod 640 " + dir + "/secret)"},
		{"group can write", "0123456789abcdef", 0o660, "mode 0640 or 0600 (chmod 640 " + dir + "/secret)"},
		{"other can write", "0123456789abcdef", 0o602, "mode 0640 or 0600 (chmod 640 " + dir + "/secret)"},
		{"empty", " \n", 0o600, "/secret\" is empty; want a file that holds the secret and nothing else, readable for the user who runs fsbus"},
		{"two lines", "0123456789abcdef\nnext", 0o600, "/secret\" has a line break or another control character; want a file that holds the secret and nothing else, readable for the user who runs fsbus"},
		{"no text", "\xff\xfe0123", 0o600, "/secret\" has a line break or another control character; want a file that holds the secret and nothing else, readable for the user who runs fsbus"},
		{"largest", strings.Repeat("x", int(maxSecretFile)), 0o600, ""},
		{"too large", strings.Repeat("x", int(maxSecretFile)+1), 0o600, "/secret\": is too large: more than 1KiB; want a file that holds the secret and nothing else, readable for the user who runs fsbus"},
	} {
		os.Remove(filepath.Join(dir, "secret"))
		write("secret", tt.text, tt.mode)
		c, err := load("")
		switch {
		case tt.err == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.err == "":
			if got, want := string(c.Front.secret), strings.TrimSpace(tt.text); got != want {
				t.Errorf("%s: secret %q, want %q", tt.name, got, want)
			}
			if want := filepath.Join(dir, "secret"); c.Front.SecretPath != want {
				t.Errorf("%s: secret_path %q, want %q", tt.name, c.Front.SecretPath, want)
			}
		case err == nil || !strings.HasSuffix(err.Error(), tt.err):
			t.Errorf("%s: error %v, want one that ends in %q", tt.name, err, tt.err)
		case !strings.HasPrefix(err.Error(), path+":6: front.secret_path: "):
			t.Errorf("%s: error %v, want one at %s:6", tt.name, err, path)
		}
	}

	os.Remove(filepath.Join(dir, "secret"))
	write("secret", "0123456789abcdef", 0o600)
	write("ca.pem", testCA, 0o644)
	c, err := load(`ca_file = "ca.pem"`)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(dir, "ca.pem"); c.Federation.CAFile != want {
		t.Errorf("ca_file %q, want %q", c.Federation.CAFile, want)
	}
	write("ca.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 0o644)
	if _, err := load(`ca_file = "ca.pem"`); err == nil || !strings.HasSuffix(err.Error(), `/ca.pem": netx: no PEM certificate in the file of certificate authorities; want a file with certificates in PEM`) {
		t.Errorf("a file without a certificate: %v", err)
	}
}

// testCA is a certificate of nobody, valid until 2126.
const testCA = `-----BEGIN CERTIFICATE-----
MIIBeTCCAR+gAwIBAgIUSLC7/OKV6TTaOEHvsb+/Jm3ztUowCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGbm9ib2R5MCAXDTI2MTEyMTA1MzM1NFoYDzIxMjYxMDI4MDUz
MzU0WjARMQ8wDQYDVQQDDAZub2JvZHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAQvSiiMpJKD4tUZHrhlQl2KM0FghgKSoty0HVmrR+3IG5d/5nGL6romb6zvo4+H
P7ZPDBuSYXf6crRu/hvOAo/9o1MwUTAdBgNVHQ4EFgQU4VdH/OsMNm8bRe+iqElN
MyWjluIwHwYDVR0jBBgwFoAU4VdH/OsMNm8bRe+iqElNMyWjluIwDwYDVR0TAQH/
BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiA0Cp641NWkblsiYO3BUf85fhl9rlln
ViZN1Tq9gKIk3QIhAOxQofK3csaCZg/+EhyuhnQpX3WxzSCXrmpheOWGRUos
-----END CERTIFICATE-----
`

func TestLoadRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	large := filepath.Join(dir, "large.toml")
	if err := os.WriteFile(large, []byte(strings.Repeat("#", int(maxConfigFile)+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:                            dir + ": is not a regular file; want a configuration file, such as config.example.toml",
		filepath.Join(dir, "no.toml"):  filepath.Join(dir, "no.toml") + ": no such file or directory; want a configuration file, such as config.example.toml",
		large:                          large + ": is too large: more than 1MiB; want a configuration file, such as config.example.toml",
		"/dev/zero":                    "/dev/zero: is not a regular file; want a configuration file, such as config.example.toml",
		filepath.Join(large, "x.toml"): filepath.Join(large, "x.toml") + ": not a directory; want a configuration file, such as config.example.toml",
	} {
		_, err := Load(path)
		if _, ok := errors.AsType[*ConfigError](err); !ok || err.Error() != want {
			t.Errorf("Load(%q): %v, want %s", path, err, want)
		}
	}
}

// Lists, tables and files may be as long as is said, and no longer.
func TestConfigBounds(t *testing.T) {
	entries := func(n int, format string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format+", ", i)
		}
		return strings.TrimSuffix(b.String(), ", ")
	}
	for _, tt := range []struct{ key, text string }{
		{"ip_range_blocklist", "[%s]"},
		{"ip_range_allowlist", "[%s]"},
		{"resolve", "{%s}"},
	} {
		format := `"fc00::%x"`
		if tt.key == "resolve" {
			format = `"hs%d.test" = "127.0.0.1"`
		}
		with := func(n int) error {
			_, err := parseConfig("FILE", t.TempDir(), minimal+"[federation]\n"+tt.key+" = "+fmt.Sprintf(tt.text, entries(n, format)))
			return err
		}
		if err := with(maxEntries); err != nil {
			t.Errorf("%d entries: %v", maxEntries, err)
		}
		want := "FILE:8: federation." + tt.key + ": has 1001 entries; want at most 1000"
		if err := with(maxEntries + 1); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// What is kept on disk may take all of that of which it is a part.
func TestConfigPartsOfTheDisk(t *testing.T) {
	for _, tt := range []struct {
		text string
		key  string // of the only mistake; "" if it is fine
	}{
		{"outbound.spool_disk = \"512MiB\"", ""},
		{"outbound.spool_disk = \"524287KiB\"", "joins.keep_disk"},
		{"joins.keep_disk = \"0\"\nmedia.cache_disk = \"1GiB\"", ""},
		{"joins.keep_disk = \"0\"\nmedia.cache_disk = \"1048577KiB\"", "media.cache_disk"},
		{"media.cache_disk = \"512MiB\"", ""},
		{"media.cache_disk = \"524289KiB\"", "media.cache_disk"},
		{"joins.keep_disk = \"2GiB\"\nmedia.cache_disk = \"2GiB\"", "joins.keep_disk"},
		{"outbox.max_disk = \"48MiB\"", ""},
		{"outbox.max_disk = \"49151KiB\"", "keys.cache_disk"},
		{"keys.cache_disk = \"256MiB\"", ""},
		{"keys.cache_disk = \"262145KiB\"", "keys.cache_disk"},
	} {
		_, err := parseConfig("FILE", t.TempDir(), tt.text+"\n"+minimal)
		switch {
		case tt.key == "":
			if err != nil {
				t.Errorf("%q: %v", tt.text, err)
			}
		case err == nil:
			t.Errorf("%q is accepted", tt.text)
		default:
			if all := configErrors(t, err); len(all) != 1 || all[0].Key != tt.key {
				t.Errorf("%q: %v; want one about %s", tt.text, err, tt.key)
			}
		}
	}
}

// A file of another program is not worth more than some lines.
func TestConfigMistakesAreBounded(t *testing.T) {
	var b strings.Builder
	for i := range 10 * maxMistakes {
		fmt.Fprintf(&b, "unknown%d = 1\n", i)
	}
	_, err := parseConfig("FILE", t.TempDir(), b.String())
	if n := len(configErrors(t, err)); n != maxMistakes {
		t.Errorf("%d mistakes are reported, want %d", n, maxMistakes)
	}
	if d := DefaultConfig(); len(d.fields()) >= maxMistakes {
		t.Errorf("%d keys may have more than maxMistakes", len(d.fields()))
	}
}

func TestConfigTextTypes(t *testing.T) {
	for _, tt := range []struct {
		text string
		want string // as String shows it; "" if it is refused
	}{
		{"10s", "10s"}, {"60s", "1m"}, {"90s", "1m30s"}, {"3600s", "1h"}, {"1h30m", "1h30m"}, {"100ms", "100ms"}, {"0s", "0s"}, {"10m5s", "10m5s"},
		{"", ""}, {"5", ""}, {"0", ""}, {"-1s", ""}, {"-0.5s", ""}, {"5 s", ""}, {"s", ""}, {"1d", ""},
	} {
		d := Duration(-1)
		err := d.UnmarshalText([]byte(tt.text))
		if (err == nil) != (tt.want != "") || err == nil && d.String() != tt.want {
			t.Errorf("Duration %q: %v, %v; want %q", tt.text, d, err, tt.want)
		}
	}
	for _, tt := range []struct {
		text string
		want FileMode
		ok   bool
	}{
		{"0660", 0o660, true}, {"660", 0o660, true}, {"0777", 0o777, true}, {"0", 0, true},
		{"", 0, false}, {"0999", 0, false}, {"1777", 0, false}, {"0o660", 0, false}, {"-1", 0, false}, {"u=rw", 0, false},
	} {
		var m FileMode
		if err := m.UnmarshalText([]byte(tt.text)); (err == nil) != tt.ok || m != tt.want {
			t.Errorf("FileMode %q: %v, %v; want %v", tt.text, m, err, tt.want)
		}
	}
	if got := FileMode(0o40).String(); got != "0040" {
		t.Errorf("FileMode(040) is shown as %q", got)
	}
}

func TestSecretIsNotPrinted(t *testing.T) {
	c := mustParse(t, strings.Replace(minimal, "0123456789abcdef", "hunter2-correct-horse", 1))
	json, err := Secret("hunter2").MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		fmt.Sprint(c), fmt.Sprintf("%v %+v %#v", *c, *c, *c), fmt.Sprintf("%s %q", c.Front.Secret, c.Front.Secret), string(json), synapseConfig(t, c),
	} {
		if strings.Contains(s, "hunter2") {
			t.Errorf("printed: %s", s)
		}
	}
	if s := Secret("").String(); s != "" {
		t.Errorf("no secret is shown as %q", s)
	}
}

// The example has every key once, explained, with the default as its value and
// in words.
// These keys and forms scripts of others rely on. All at once they must do.
func TestAgreedKeys(t *testing.T) {
	const text = `
data_dir     = "."
memory_limit = "64MiB"

[homeserver]
server_name      = "example.org"
signing_key_path = "signing.key"

[front]
listen      = ["unix:fsbus.sock", "127.0.0.1:8009"]
secret_path = "secret"

[federation]
ca_file            = ""
ip_range_blocklist = ["127.0.0.0/8", "10.0.0.0/8"]
ip_range_allowlist = []
resolve            = {"hs2.test" = "127.0.0.1"}

[edge]
listen          = "127.0.0.1:8449"
tls_certificate = ""
tls_private_key = ""
upstream        = "http://127.0.0.1:8008"

[status]
listen = "127.0.0.1:8011"
`
	dir := t.TempDir()
	keyFile(t, dir, 7)
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parseConfig("FILE", dir, text)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Edge.Listen, []string{"127.0.0.1:8449"}) || !c.hasOutbox() {
		t.Errorf("%+v", c)
	}
}

func TestExampleIsComplete(t *testing.T) {
	const path = "../../config.example.toml"
	// These differ from the default, so that the example runs as it is.
	changed := map[string]string{
		"data_dir":               `"data"`,
		"homeserver.server_name": `"example.org"`,
		"front.listen":           `["unix:data/fsbus.sock"]`,
		"front.secret":           `"` + exampleSecret + `"`,
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	doc, err := parseDocument(text)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(text, "\n")
	var inOrder []string
	d := DefaultConfig()
	for _, k := range doc.meta.Keys() {
		if len(k) == 1 && slices.Contains(sections(), k[0]) {
			continue
		}
		inOrder = append(inOrder, k.String())
	}
	var want []string
	for _, f := range d.fields() {
		want = append(want, f.key())
	}
	if !slices.Equal(inOrder, want) {
		t.Fatalf("keys\n%v\nwant, in the order of the struct,\n%v", inOrder, want)
	}
	for _, f := range d.fields() {
		value := tomlValue(f.value.Interface())
		raw, _ := doc.value(f.path())
		if other, ok := changed[f.key()]; ok {
			var v map[string]any
			if _, err := toml.Decode("x = "+other, &v); err != nil || !reflect.DeepEqual(v["x"], raw) {
				t.Errorf("%s is %v, want %s", f.key(), raw, other)
			}
		} else {
			g := field{f.section, f.name, reflect.New(f.value.Type()).Elem(), f.tag}
			if problem := g.set(raw); problem != "" || !g.equal(f) {
				t.Errorf("%s is %v, want the default, %s", f.key(), raw, value)
			}
		}

		n := doc.line(f.path()) - 1 // index of the key's own line
		var comment string
		for i := n - 1; i >= 0 && strings.HasPrefix(lines[i], "#"); i-- {
			comment = strings.TrimPrefix(lines[i], "#") + comment
		}
		says := " Default " + value
		switch f.key() {
		case "homeserver.server_name":
			says = " Required."
		case "federation.ip_range_blocklist":
			says = " Default: this list"
		}
		if !strings.Contains(comment, says) {
			t.Errorf("%s: the comment does not say %q: %q", f.key(), says, comment)
		}
		if _, ok := changed[f.key()]; ok != strings.Contains(comment, "CHANGE") {
			t.Errorf("%s: marked with CHANGE is %v", f.key(), !ok)
		}
		if reload := f.tag.Get("reload") != ""; reload != strings.Contains(comment, "Applied on reload.") {
			t.Errorf("%s: applied on reload is %v, the comment says otherwise", f.key(), reload)
		}
	}
}

// The example can be used from any folder, as it is, and says what is wrong
// with that.
func TestExampleRunsAsItIs(t *testing.T) {
	b, err := os.ReadFile("../../config.example.toml")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "fsbus") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != filepath.Join(dir, "data") || c.Front.Listen[0] != "unix:"+dir+"/data/fsbus.sock" {
		t.Errorf("data_dir %s, listen %s", c.DataDir, c.Front.Listen)
	}
	if w := c.Warnings(); len(w) == 0 || !strings.HasPrefix(w[0], "the secret is the one of the example") {
		t.Errorf("warnings %q, want one about the secret", w)
	}
}

func TestWarnings(t *testing.T) {
	for _, tt := range []struct {
		from, to string // replaced in minimal
		want     string // the only warning; "" for none
	}{
		{"", "", ""},
		{"0123456789abcdef", "0123456789abcde", "the secret has 15 characters: use at least 16 random ones"},
		{"0123456789abcdef", exampleSecret, "the secret is the one of the example, which everybody knows: replace it"},
		{"127.0.0.1:8009", "unix:/no/such/folder/s", `front.listen: the folder "/no/such/folder" is not there, and is not made by fsbus`},
		{"127.0.0.1:8009", "unix:s", ""},
		{"127.0.0.1:8009", "localhost:8009", ""},
		{"127.0.0.1:8009", "[::1]:0", "front.listen: port 0 is another port after each start"},
		{`["127.0.0.1:8009"]`, "[\":8009\"]\nallow_remote = true", `front.listen: ":8009" crosses the network unencrypted, secret included`},
		{"[homeserver]", "edge.listen = [\":8448\"]\nedge.upstream = \"http://127.0.0.1:8008\"\nmemory_limit = \"128MiB\"\n[homeserver]", `edge.listen: ":8448" is reached without TLS, which other servers do not speak: set tls_certificate and tls_private_key, or listen on 127.0.0.1 behind a proxy`},
		{"[homeserver]", "edge.listen = [\"127.0.0.1:8448\"]\nedge.upstream = \"http://127.0.0.1:8008\"\nmemory_limit = \"128MiB\"\n[homeserver]", `edge.trusted_proxies is empty: without it all that comes through a proxy at "127.0.0.1:8448" counts as one address`},
		{"[homeserver]", "edge.upstream = \"http://127.0.0.1:8008\"\nedge.origins = 3000\n[homeserver]", "edge.upstream, edge.origins: set, but without edge.listen there is no edge"},
		{"[homeserver]", "outbox.ack_hold = \"30s\"\noutbox.max_disk = \"1GiB\"\n[homeserver]", "outbox.ack_hold: set, but without homeserver.signing_key_path nothing is taken over"},
		{"[homeserver]", "federation.ip_range_blocklist = []\n[homeserver]", "federation.ip_range_blocklist is empty: any server can make fsbus connect to private addresses"},
	} {
		c := mustParse(t, strings.Replace(minimal, tt.from, tt.to, 1))
		got := slices.DeleteFunc(c.Warnings(), func(s string) bool { return strings.Contains(s, "open files") }) // up to the machine
		if strings.Join(got, "\n") != tt.want {
			t.Errorf("%q: %q, want %q", tt.to, got, tt.want)
		}
	}
	if w := fileWarning(5656, 5656); w != "" {
		t.Errorf("enough files: %q", w)
	}
	const want = "the system allows 1024 open files, and 5656 may be needed: raise LimitNOFILE in the systemd unit (or ulimit -n), or lower front.max_connections"
	if w := fileWarning(5656, 1024); w != want {
		t.Errorf("too few files: %q, want %q", w, want)
	}
}

// Files with secrets that everybody can read are complained about.
func TestWarningsAboutOpenFiles(t *testing.T) {
	dir := t.TempDir()
	keyFile(t, dir, 7)
	certFiles(t, dir, "example.org")
	path := filepath.Join(dir, "fsbus.toml")
	text := "memory_limit = \"128MiB\"\nhomeserver.signing_key_path = \"signing.key\"\nedge.listen = \"127.0.0.1:8448\"\nedge.upstream = \"http://127.0.0.1:8008\"\n" +
		"edge.tls_certificate = \"cert.pem\"\nedge.tls_private_key = \"key.pem\"\n" + minimal
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	files := []string{path, filepath.Join(dir, "signing.key"), filepath.Join(dir, "key.pem")}
	warnings := func() string {
		t.Helper()
		c, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(slices.DeleteFunc(c.Warnings(), func(s string) bool { return strings.Contains(s, "open files") }), "\n")
	}
	for i, want := range []string{
		"front.secret: every user of this system can read it in " + quote(path),
		"homeserver.signing_key_path: every user of this system can read or change " + quote(files[1]),
		"edge.tls_private_key: every user of this system can read or change " + quote(files[2]),
	} {
		for _, f := range files {
			if err := os.Chmod(f, 0o640); err != nil {
				t.Fatal(err)
			}
		}
		if got := warnings(); got != "" {
			t.Errorf("with mode 0640: %s", got)
		}
		if err := os.Chmod(files[i], 0o644); err != nil {
			t.Fatal(err)
		}
		if got := warnings(); !strings.HasPrefix(got, want) || strings.Contains(got, "\n") {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
}

// Who asks a running bus needs neither its secrets nor a configuration that is right in
// all else, but is told what is wrong with where it is.
func TestLoadAddresses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "fsbus.toml")
	for _, tt := range []struct{ text, want string }{ // want is the error, or both addresses
		{"[front]\nsecret_path = \"missing\"\n[edge]\nlisten = \"nonsense\"\nunknown = 1\n[outbound]\nworkers = 0\n", "127.0.0.1:8011 /var/lib/fsbus/admin.sock"},
		{"data_dir = \"/no/such/folder\"\n[status]\nlisten = \"unix:s\"\n", "unix:" + dir + "/s /no/such/folder/admin.sock"},
		{"data_dir = \"d\"\nstatus.admin = \"\"\n", "127.0.0.1:8011 "},
		{"data_dir = \"\"\n", path + `:1: data_dir: is empty; want the path of a folder, such as data_dir = "/var/lib/fsbus"`},
		{"data_dir = 5\nmemory_limit = 5\n", path + `:1: data_dir: is a bare number; want text in quotes, such as data_dir = "/var/lib/fsbus"`},
		{"status = 5\n", path + `:1: status: is a bare number; want a line [status] with its keys below`},
		{"[status]\nlisten = \"8011\"\n", path + `:2: status.listen: has "8011"; want "unix:/path" or "address:port", such as "127.0.0.1:8011"`},
		{"[status]\nadmni = \"\"\n", path + `:2: status.admni: there is no such key; want status.admin`},
		{"[status]\nadmin = \"127.0.0.1:1\"\n", path + `:2: status.admin: is "127.0.0.1:1", and only a unix socket says who may connect: the queue can be deleted there; want "unix:/path", or "" for none`},
		{"data_dir\n", path + `:1: data_dir: expected '.' or '=', but got '\n' instead; want text in quotes, such as data_dir = "/var/lib/fsbus"`},
	} {
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := LoadAddresses(path)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = c.Status.Listen + " " + c.adminSocket()
		}
		if got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.text, got, tt.want)
		}
	}
	if _, err := LoadAddresses(filepath.Join(dir, "no.toml")); err == nil || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestServes(t *testing.T) {
	for _, tt := range []struct {
		spec, address string
		want          bool
	}{
		{"127.0.0.1:8448", "127.0.0.1:8448", true},
		{"127.0.0.1:8448", "127.0.0.1:8008", false},
		{"127.0.0.1:8448", "localhost:8448", true},
		{"localhost:8448", "[::1]:8448", true},
		{"[::ffff:127.0.0.1]:8448", "127.0.0.1:8448", true},
		{"127.0.0.1:8448", "127.0.0.2:8448", false},
		{"10.0.0.1:8448", "localhost:8448", false},
		{":8448", "localhost:8448", true},
		{"0.0.0.0:8448", "127.0.0.1:8448", true},
		{"[::]:8448", "10.0.0.1:8448", false}, // perhaps another machine
		{":8009", "[::]:8009", true},
		{"127.0.0.1:8009", "[::]:8009", false},
		{"127.0.0.1:8009", "synapse:8009", false},
		{"unix:/run/a", "unix:/run/a", true},
		{"unix:/run/a", "unix:/run/b", false},
		{"unix:/run/a:80", "127.0.0.1:80", false},
		{"127.0.0.1:80", "unix:/run/a:80", false},
	} {
		if got := serves(tt.spec, tt.address); got != tt.want {
			t.Errorf("%s serves %s: %t, want %t", tt.spec, tt.address, got, tt.want)
		}
	}
	for upstream, want := range map[string]string{
		"http://127.0.0.1:8008": "127.0.0.1:8008", "http://localhost/": "localhost:80", "http://[::1]": "[::1]:80", "unix:/run/s": "unix:/run/s",
	} {
		if got := (&EdgeConfig{Upstream: upstream}).upstreamAddress(); got != want {
			t.Errorf("%s is at %s, want %s", upstream, got, want)
		}
	}
}

// synapseConfig returns what c.SynapseConfig does.
func synapseConfig(t *testing.T, c *Config) string {
	t.Helper()
	s, err := c.SynapseConfig()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSynapseConfig(t *testing.T) {
	const head = `# For homeserver.yaml of Synapse 1.89 or newer. An instance_map that is there
# already gets the one line more.
instance_map:
  fsbus: {`
	const inline = `}
outbound_federation_restricted_to: [fsbus]
# worker_replication_secret: the text that is secret in [front] of the
# configuration of fsbus, which is not shown here.
`
	for _, tt := range []struct{ listen, secretPath, want string }{
		{"unix:/run/fsbus/fsbus.sock", "/etc/fsbus/secret", head + `path: "/run/fsbus/fsbus.sock"}
outbound_federation_restricted_to: [fsbus]
# Before Synapse 1.126: worker_replication_secret, with the text in that file.
worker_replication_secret_path: "/etc/fsbus/secret"
`},
		{"unix:/run/fsbus/fsbus.sock", "/run/credentials/fsbus.service/secret", head + `path: "/run/fsbus/fsbus.sock"}
outbound_federation_restricted_to: [fsbus]
# The file that LoadCredential in the systemd unit of fsbus names: the copy that
# secret_path names is for fsbus alone. Synapse's user must be able to read it.
# Before Synapse 1.126: worker_replication_secret, with the text in that file.
worker_replication_secret_path: "/etc/fsbus/secret"
`},
		{"127.0.0.1:8009", "", head + `host: "127.0.0.1", port: 8009` + inline},
		{"[::1]:8009", "", head + `host: "::1", port: 8009` + inline},
		{"localhost:8009", "", head + `host: "localhost", port: 8009` + inline},
		{":8009", "", head + `host: "127.0.0.1", port: 8009` + inline},
		{"[::]:8009", "", head + `host: "127.0.0.1", port: 8009` + inline},
		{`unix:/run/a "b".sock`, "", head + `path: "/run/a \"b\".sock"` + inline},
	} {
		c := DefaultConfig()
		c.Front.Listen = []string{tt.listen, "127.0.0.1:9"}
		c.Front.SecretPath = tt.secretPath
		if got := synapseConfig(t, &c); got != tt.want {
			t.Errorf("%s: got\n%s\nwant\n%s", tt.listen, got, tt.want)
		}
	}
}

func TestSynapseConfigOfAnEdge(t *testing.T) {
	const want = `# Other servers connect to fsbus. Of the listeners, the one for federation is
# this; no other one has federation, and nobody from outside can reach it.
#  - type: http
%s
#    x_forwarded: true
#    resources: [{names: [federation]}]
# If clients come to that port, too, leave it its other names, or they are cut off:
# names: [client, federation].
`
	for homeserver, lines := range map[string]string{
		"http://127.0.0.1:8008":  `#    bind_addresses: ["127.0.0.1"]` + "\n#    port: 8008",
		"http://[::1]:8008/":     `#    bind_addresses: ["::1"]` + "\n#    port: 8008",
		"http://localhost":       `#    bind_addresses: ["127.0.0.1"]` + "\n#    port: 80",
		"unix:/run/synapse.sock": `#    path: "/run/synapse.sock"`,
	} {
		c := DefaultConfig()
		c.Front.SecretPath = "/etc/fsbus/secret"
		c.Edge.Listen, c.Edge.Upstream = []string{":8448"}, homeserver
		if got, want := synapseConfig(t, &c), fmt.Sprintf(want, lines); !strings.HasSuffix(got, want) {
			t.Errorf("%s: got\n%s\nwant at the end\n%s", homeserver, got, want)
		}
		c.Edge.PassClient = true
		if got, want := synapseConfig(t, &c), "resources: [{names: [client, federation]}]\n"; !strings.HasSuffix(got, want) {
			t.Errorf("%s, with clients: got\n%s\nwant at the end\n%s", homeserver, got, want)
		}
	}
}

func TestChanged(t *testing.T) {
	base := func() *Config {
		c := DefaultConfig()
		c.Front.SecretPath, c.Front.secret = "/etc/fsbus/secret", []byte("0123456789abcdef")
		return &c
	}
	for _, tt := range []struct {
		name             string
		change           func(*Config)
		applied, restart string
	}{
		{"nothing", func(c *Config) {}, "", ""},
		{"all that can be", func(c *Config) {
			c.LogLevel = "debug"
			o := &c.Outbound
			o.UnknownHosts, o.FailingHosts, o.HostConcurrency, o.HostRate, o.HostBurst = 70, 20, 5, 20, 30
			o.Cache, o.ProfileFresh, o.ProfileStale = sched.MiB/8, 0, 0
			c.Keys.NotaryBatch, c.Keys.NotaryParallel, c.Keys.NotaryWait = 10, 2, Duration(time.Second)
			c.Joins.Keep, c.Joins.PrefetchKeys, c.Joins.Preflight = 0, false, 20
			c.Media.CacheFor = 0
		}, "log_level outbound.unknown_hosts outbound.failing_hosts outbound.host_concurrency outbound.host_rate outbound.host_burst outbound.cache outbound.profile_fresh outbound.profile_stale " +
			"keys.notary_batch keys.notary_parallel keys.notary_wait joins.keep joins.prefetch_keys joins.preflight media.cache_for", ""},
		{"what is on disk", func(c *Config) {
			c.Outbound.CacheEntries, c.Outbound.CacheDisk, c.Keys.CacheEntries, c.Keys.CacheDisk = 1000, sched.MiB, 1000, sched.MiB
			c.Joins.KeepDisk, c.Media.CacheDisk = sched.MiB, sched.MiB
		}, "", "outbound.cache_entries outbound.cache_disk keys.cache_entries keys.cache_disk joins.keep_disk media.cache_disk"},
		{"the notary", func(c *Config) {
			c.Keys.Notary, c.Keys.NotaryName, c.Keys.KeyPath = true, "keys.invalid", "/etc/fsbus/notary.key"
		}, "", "keys.notary keys.notary_name keys.key_path"},
		{"both kinds", func(c *Config) {
			c.LogLevel = "warn"
			c.Front.Listen = []string{"127.0.0.1:1"}
			c.Outbound.HostBurst = 5
		},
			"log_level outbound.host_burst", "front.listen"},
		{"more unknown hosts than workers so far", func(c *Config) { c.Outbound.Workers, c.Outbound.UnknownHosts, c.LogLevel = 256, 200, "warn" },
			"log_level", "outbound.workers outbound.unknown_hosts"},
		{"more cache than the memory so far", func(c *Config) {
			c.MemoryLimit, c.Outbound.Cache, c.Keys.NotaryBatch, c.Joins.Keep, c.Media.CacheFor = 256*sched.MiB, 64*sched.MiB, 1, 0, 0
		}, "", "memory_limit outbound.cache keys.notary_batch joins.keep media.cache_for"},
		{"another secret in the same file", func(c *Config) { c.Front.secret = []byte("fedcba9876543210") }, "", "front.secret_path"},
		{"another file with the same secret", func(c *Config) { c.Front.SecretPath = "/etc/other" }, "", "front.secret_path"},
		{"the secret inline", func(c *Config) {
			c.Front.SecretPath, c.Front.Secret, c.Front.secret = "", "fedcba9876543210", []byte("fedcba9876543210")
		}, "", "front.secret_path front.secret"},
		{"the outbox", func(c *Config) {
			c.Outbox.AckPace, c.Outbox.PresenceWindow, c.Outbox.MaxDestinations = bus.AckOff, 0, 100
		}, "outbox.ack_pace outbox.presence_window", "outbox.max_destinations"},
		{"a signing key where there was none", func(c *Config) {
			c.Homeserver.SigningKeyPath, c.Homeserver.keys = "/etc/key", &Keys{}
		}, "", "homeserver.signing_key_path"},
		{"lists and tables", func(c *Config) {
			c.Federation.IPRangeAllowlist, c.Federation.Resolve = []string{"10.0.0.1"}, map[string]string{"a.test": "10.0.0.1"}
		}, "", "federation.ip_range_allowlist federation.resolve"},
	} {
		old, new := base(), base()
		tt.change(new)
		applied, restart := Changed(old, new)
		if strings.Join(applied, " ") != tt.applied || strings.Join(restart, " ") != tt.restart {
			t.Errorf("%s: applied %v, restart %v; want [%s], [%s]", tt.name, applied, restart, tt.applied, tt.restart)
		}
		if !reflect.DeepEqual(old, base()) {
			t.Errorf("%s: Changed has changed its argument", tt.name)
		}
		merged := *old
		merged.applyReloadable(new)
		if err := merged.Core().Validate(); err != nil {
			t.Errorf("%s: the core is given what it refuses: %v", tt.name, err)
		}
		// What is left are the keys that need a restart.
		again, rest := Changed(&merged, new)
		if strings.Join(rest, " ") != tt.restart || len(again) != 0 {
			t.Errorf("%s: after the reload %v and %v differ, want [] and [%s]", tt.name, again, rest, tt.restart)
		}
	}
}

// An inline secret that differs counts once.
func TestChangedInlineSecret(t *testing.T) {
	old, new := mustParse(t, minimal), mustParse(t, strings.Replace(minimal, "0123456789abcdef", "fedcba9876543210", 1))
	new.DataDir = old.DataDir
	if applied, restart := Changed(old, new); len(applied) != 0 || strings.Join(restart, " ") != "front.secret" {
		t.Errorf("applied %v, restart %v; want front.secret to need a restart", applied, restart)
	}
}

// Whatever the text, there is a valid configuration or a list of mistakes, one
// line each, in the order of the lines.
func FuzzConfig(f *testing.F) {
	files, err := filepath.Glob("testdata/config/*.toml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, "../../config.example.toml") {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Add(minimal)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseConfig("FILE", dir, text)
		if err == nil {
			if err := c.Core().Validate(); err != nil {
				t.Errorf("accepted, but not by the core: %v", err)
			}
			if b := c.Budget(); b.Memory > b.Limit {
				t.Errorf("accepted, but %v is over the limit of %v", b.Memory, b.Limit)
			}
			c.Warnings()
			if !c.Keys.Notary { // or it would make a key wherever the text says
				if _, err := c.SynapseConfig(); err != nil {
					t.Errorf("accepted, but without lines for the homeserver: %v", err)
				}
			}
			c.level()
			if applied, restart := Changed(c, c); len(applied)+len(restart) > 0 {
				t.Errorf("differs from itself in %v and %v", applied, restart)
			}
			return
		}
		lines, last := 1+strings.Count(text, "\n"), 0
		for _, e := range configErrors(t, err) {
			if e.Line < max(last, 1) || e.Line > lines {
				t.Errorf("line %d of %d, after line %d: %v", e.Line, lines, last, e)
			}
			last = e.Line
			if s := e.Error(); strings.ContainsAny(s, "\n\r\x00\x1b") || e.Problem == "" || e.Want == "" {
				t.Errorf("not one line with a problem and a remedy: %q", s)
			}
		}
	})
}

func TestCertificateWarning(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		info netx.CertificateInfo
		want string
	}{
		{netx.CertificateInfo{NotAfter: now.Add(renewBefore)}, ""},
		{netx.CertificateInfo{NotAfter: now.Add(renewBefore - time.Second)}, "it ends at 2026-03-14 23:59:59 UTC, and is not renewed yet"},
		{netx.CertificateInfo{NotAfter: now.Add(-time.Hour), Problem: "it has expired"}, "it has expired"},
	} {
		if got := certificateWarning(tt.info, now); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

package node

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"fsbus/bus/matrix"
)

// notaryConfig is a configuration with a notary, and a data folder of the test's
// own.
func notaryConfig(t *testing.T) *Config {
	t.Helper()
	c := DefaultConfig()
	c.DataDir = t.TempDir()
	c.Homeserver.ServerName = "example.org"
	c.Keys.Notary = true
	return &c
}

func writeFile(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
}

// seedText is a seed as it stands in a file.
func seedText(b byte) string {
	return base64.RawStdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32))
}

func TestNotaryKeyIsMadeOnce(t *testing.T) {
	c := notaryConfig(t)
	key, made, err := findNotaryKey(c)
	if err != nil || !made {
		t.Fatalf("made %v, %v", made, err)
	}
	if !regexp.MustCompile(`^ed25519:fsbus[a-zA-Z0-9]{4}$`).MatchString(key.ID()) {
		t.Errorf("key id %q", key.ID())
	}
	path := filepath.Join(c.DataDir, "notary.key")
	fi, err := os.Stat(path)
	if err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	entries, err := os.ReadDir(c.DataDir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
	again, err := loadNotaryKey(c)
	if err != nil || again.ID() != key.ID() || !bytes.Equal(again.Public(), key.Public()) {
		t.Errorf("the second time %v, %v; want %v", again, err, key)
	}
	if _, made, err := findNotaryKey(c); made || err != nil {
		t.Errorf("made again: %v, %v", made, err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	seed := strings.Fields(string(text))[2]
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if s := fmt.Sprintf(verb, again); strings.Contains(s, seed) {
			t.Errorf("%s shows the key", verb)
		}
	}

	other, err := loadNotaryKey(notaryConfig(t))
	if err != nil || bytes.Equal(other.Public(), key.Public()) {
		t.Errorf("two buses have the same key, or %v", err)
	}
}

// Processes that start together agree on one key, as one of them may have shown
// it already.
func TestNotaryKeyIsMadeByOneOfMany(t *testing.T) {
	c := notaryConfig(t)
	const many = 16
	var keys [many]matrix.SigningKey
	var made [many]bool
	var errs [many]error
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range many {
		wg.Go(func() {
			<-start
			keys[i], made[i], errs[i] = findNotaryKey(c)
		})
	}
	close(start)
	wg.Wait()
	makers := 0
	for i := range many {
		if errs[i] != nil || !bytes.Equal(keys[i].Public(), keys[0].Public()) || keys[i].ID() != keys[0].ID() {
			t.Errorf("%v, %v; the first has %v", keys[i], errs[i], keys[0])
		}
		if made[i] {
			makers++
		}
	}
	if makers != 1 {
		t.Errorf("%d have made it", makers)
	}
	if entries, err := os.ReadDir(c.DataDir); err != nil || len(entries) != 1 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
}

// An admin may ask for Synapse's lines as root, and fsbus runs as another user.
func TestNotaryKeyBelongsToWhoeverHasTheFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
	c := notaryConfig(t)
	if err := os.Chown(c.DataDir, 1234, 5678); err != nil {
		t.Fatal(err)
	}
	if _, err := loadNotaryKey(c); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(c.notaryKeyPath(), &st); err != nil || st.Uid != 1234 || st.Gid != 5678 {
		t.Errorf("user %d, group %d, %v", st.Uid, st.Gid, err)
	}
}

// What is wrong with the file is said at the start, when the lines for Synapse
// are asked for, and by Load with its line; none of these makes a file or shows a
// seed.
func TestNotaryKeyMistakes(t *testing.T) {
	const form = `a signing key file as Synapse has it, readable for the user who runs fsbus, or key_path = "" for one that fsbus makes`
	good := "ed25519 fsbusAbCd " + seedText(3) + "\n"
	damaged := "ed25519 fsbusAbCd " + seedText(3)[:30] + "\n"
	for _, tt := range []struct {
		name    string
		put     func(path string)
		path    string // key_path; "" for the default
		start   string // after the path, when it is used; "" if it is fine
		problem string // in Load; "" if it is fine
		is      error
	}{
		{name: "fine", put: func(p string) { writeFile(t, p, good, 0o600) }},
		{name: "the group can read", put: func(p string) { writeFile(t, p, good, 0o640) }},
		{name: "owner can only read", put: func(p string) { writeFile(t, p, good, 0o400) }},
		{name: "elsewhere", put: func(p string) { writeFile(t, p, good, 0o600) }, path: "other.key"},
		{name: "others can read", put: func(p string) { writeFile(t, p, good, 0o644) },
			start: ": has mode 0644: users who should not can read or change it", problem: " has mode 0644: users who should not can read or change it; want mode 0600 (chmod 600 PATH)", is: errOpenToOthers},
		{name: "the group can write", put: func(p string) { writeFile(t, p, good, 0o660) },
			start: ": has mode 0660: users who should not can read or change it", problem: " has mode 0660: users who should not can read or change it; want mode 0600 (chmod 600 PATH)", is: errOpenToOthers},
		{name: "damaged", put: func(p string) { writeFile(t, p, damaged, 0o600) },
			start: ": invalid signing key: line 1: the key is not 32 bytes of base64", problem: ": invalid signing key: line 1: the key is not 32 bytes of base64; want " + form, is: matrix.ErrKey},
		{name: "empty", put: func(p string) { writeFile(t, p, "", 0o600) },
			start: ": invalid signing key: no private key in the file", problem: ": invalid signing key: no private key in the file; want " + form, is: matrix.ErrKey},
		{name: "only an old key", put: func(p string) { writeFile(t, p, "ed25519 a 1 "+seedText(3)+"\n", 0o600) },
			start: ": invalid signing key: no private key in the file", problem: ": invalid signing key: no private key in the file; want " + form, is: matrix.ErrKey},
		{name: "too large", put: func(p string) { writeFile(t, p, strings.Repeat("\n", int(maxKeyFile)+1), 0o600) },
			start: ": is too large: more than 64KiB", problem: ": is too large: more than 64KiB; want " + form, is: errTooLarge},
		{name: "a folder", put: func(p string) {
			if err := os.Mkdir(p, 0o755); err != nil {
				t.Fatal(err)
			}
		}, start: ": is not a regular file", problem: ": is not a regular file; want " + form, is: errNotRegular},
		{name: "not there", put: func(string) {}, path: "other.key",
			start: ": no such file or directory", problem: ": no such file or directory; want " + form, is: os.ErrNotExist},
		{name: "below a file", put: func(string) {}, path: "fsbus.toml/other.key",
			start: ": not a directory", problem: ": not a directory; want " + form, is: unix.ENOTDIR},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "fsbus.toml")
			writeFile(t, file, minimal+"[keys]\nnotary = true\nkey_path = \""+tt.path+"\"\n", 0o600)
			path := filepath.Join(dir, "notary.key")
			if tt.path != "" {
				path = filepath.Join(dir, tt.path)
			}
			tt.put(path)

			c := notaryConfig(t)
			c.DataDir = dir
			if tt.path != "" {
				c.Keys.KeyPath = path
			}
			key, err := loadNotaryKey(c)
			lines, linesErr := c.SynapseConfig()
			if tt.start == "" {
				if err != nil || linesErr != nil || key.ID() != "ed25519:fsbusAbCd" {
					t.Errorf("%v, %v, %v", key, err, linesErr)
				}
				if strings.Contains(lines, seedText(3)) || strings.Contains(lines, "made just now") {
					t.Errorf("the lines for Synapse are\n%s", lines)
				}
			} else {
				want := fmt.Sprintf("keys.key_path: the notary's key, %q%s", path, tt.start)
				if err == nil || err.Error() != want || !errors.Is(err, tt.is) {
					t.Errorf("got %v, want %s", err, want)
				}
				if linesErr == nil || linesErr.Error() != want || lines != "" {
					t.Errorf("the lines for Synapse: %q, %v; want %s", lines, linesErr, want)
				}
				if !key.IsZero() {
					t.Errorf("there is a key, %v", key)
				}
			}

			_, err = Load(file)
			want := file + ":9: keys.key_path: \"" + path + "\"" + strings.ReplaceAll(tt.problem, "PATH", path)
			switch {
			case tt.problem == "" && err != nil:
				t.Errorf("Load: %v", err)
			case tt.problem != "" && (err == nil || err.Error() != want):
				t.Errorf("Load: got %v, want %s", err, want)
			}
			for _, e := range []error{err, linesErr} {
				if e != nil && strings.Contains(e.Error(), seedText(3)[:30]) {
					t.Errorf("shows the seed: %v", e)
				}
			}
		})
	}
}

func TestNotaryKeyUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root can read everything")
	}
	c := notaryConfig(t)
	writeFile(t, c.notaryKeyPath(), "ed25519 a "+seedText(3)+"\n", 0)
	if _, err := loadNotaryKey(c); !errors.Is(err, os.ErrPermission) || !strings.HasSuffix(err.Error(), ": permission denied") {
		t.Errorf("a file that cannot be read: %v", err)
	}
}

// Load leaves the making to who starts, and says nothing about a key that nobody
// uses.
func TestLoadMakesNoNotaryKey(t *testing.T) {
	for _, keys := range []string{"notary = true", "notary = false\nkey_path = \"no/such.key\"", "notary = false\nnotary_name = \"example.org\""} {
		dir := t.TempDir()
		c, err := parseConfig("FILE", dir, minimal+"[keys]\n"+keys+"\n")
		if err != nil {
			t.Errorf("%s: %v", keys, err)
			continue
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
			t.Errorf("%s: the folder has %v, %v", keys, entries, err)
		}
		if c.Keys.KeyPath != "" && c.Keys.KeyPath != filepath.Join(dir, "no/such.key") {
			t.Errorf("%s: key_path %q", keys, c.Keys.KeyPath)
		}
		if own := c.Core().Keys.OwnName; (own != "") != c.Keys.Notary {
			t.Errorf("%s: to the core its own name is %q", keys, own)
		}
	}
}

func TestNotaryKeyWithoutADataFolder(t *testing.T) {
	c := notaryConfig(t)
	c.DataDir = filepath.Join(c.DataDir, "later")
	want := fmt.Sprintf("keys.key_path: the notary's key, %q: data_dir is not there yet (no such file or directory): start fsbus once, or make the folder for the user who runs fsbus", c.DataDir+"/notary.key")
	if _, err := loadNotaryKey(c); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if s, err := c.SynapseConfig(); err == nil || err.Error() != want || s != "" {
		t.Errorf("the lines for Synapse: %q, %v; want %s", s, err, want)
	}
	if _, err := os.Stat(c.DataDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder was made: %v", err)
	}
}

// A folder where nothing can be written leaves no half of a key.
func TestNotaryKeyThatCannotBeWritten(t *testing.T) {
	c := notaryConfig(t)
	c.DataDir = "/proc/self" // not even root
	if _, err := loadNotaryKey(c); err == nil || !strings.HasPrefix(err.Error(), `keys.key_path: the notary's key, "/proc/self/notary.key": `) {
		t.Errorf("got %v", err)
	}
}

func TestSynapseConfigOfANotary(t *testing.T) {
	c := notaryConfig(t)
	c.Front.Listen = []string{"127.0.0.1:8009"}
	first := synapseConfig(t, c)
	key, err := loadNotaryKey(c)
	if err != nil {
		t.Fatal(err)
	}
	const head = `# For homeserver.yaml of Synapse 1.89 or newer. An instance_map that is there
# already gets the one line more.
instance_map:
  fsbus: {host: "127.0.0.1", port: 8009}
outbound_federation_restricted_to: [fsbus]
# worker_replication_secret: the text that is secret in [front] of the
# configuration of fsbus, which is not shown here.
# fsbus fetches the keys of other servers itself. This takes the place of a
# trusted_key_servers that is there already.
`
	made := "# The key of the notary was made just now: \"" + c.DataDir + "/notary.key\"\n"
	lines := `trusted_key_servers:
  - server_name: "fsbus.invalid"
    verify_keys:
      "` + key.ID() + `": "` + base64.RawStdEncoding.EncodeToString(key.Public()) + `"
`
	if first != head+made+lines {
		t.Errorf("the first time\n%s\nwant\n%s", first, head+made+lines)
	}
	if again := synapseConfig(t, c); again != head+lines {
		t.Errorf("the second time\n%s\nwant\n%s", again, head+lines)
	}
	c.Keys.NotaryName = "keys.example.org:8448"
	if s := synapseConfig(t, c); !strings.Contains(s, "\n  - server_name: \"keys.example.org:8448\"\n") {
		t.Errorf("another name:\n%s", s)
	}
}

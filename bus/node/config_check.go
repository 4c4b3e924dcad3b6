package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/BurntSushi/toml"
	"golang.org/x/sys/unix"

	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
)

const (
	// maxListen leaves most of the least MaxReading to connections: a listener
	// takes one of these places while it waits.
	maxListen = 8
	// maxSocketPath is the longest path of a unix socket: sun_path of unix(7)
	// without its final zero.
	maxSocketPath = 107
	// maxEntries bounds each list and table of the configuration.
	maxEntries = 1000
	// maxMistakes is how many mistakes of a file are reported. It is more than
	// there are keys: a file with more is no configuration of fsbus.
	maxMistakes = 200
	// maxSecretFile bounds the file of the secret, and so what the homeserver
	// has to send with each request.
	maxSecretFile = sched.KiB
	// maxCAFile is ten times the size of a system's bundle.
	maxCAFile = 4 * sched.MiB
	// shortSecret is the length in bytes below which Warnings complains:
	// shorter ones can be guessed by a program that may connect.
	shortSecret = 16
	// exampleSecret is the one in config.example.toml.
	exampleSecret = "please-change-this-secret"
)

// A checker collects the mistakes of one file.
type checker struct {
	file, dir string // dir is where relative paths start
	doc       *document
	c         *Config
	errs      []*ConfigError
}

// bad reports what is wrong with a key, and what would be right.
func (k *checker) bad(key, problem, want string) {
	k.badAt(strings.Split(key, "."), problem, want)
}

// missing reports what keeps a part of the bus from working, and not the bus from starting.
func (k *checker) missing(key, problem, want string) {
	path := toml.Key(strings.Split(key, "."))
	k.c.missing = append(k.c.missing, k.mistake(path, problem, want))
}

func (k *checker) badAt(path toml.Key, problem, want string) {
	if len(k.errs) < maxMistakes {
		k.errs = append(k.errs, k.mistake(path, problem, want))
	}
}

func (k *checker) mistake(path toml.Key, problem, want string) *ConfigError {
	if k.isMissingCredential(path) {
		want += "; systemd puts it there while the service runs, readable for root and the service only"
	}
	return &ConfigError{k.file, k.doc.line(path), clean(path.String()), problem, want}
}

// credentials is where systemd puts what LoadCredential= names.
const credentials = "/run/credentials/"

// isMissingCredential reports whether the value of a key is the path of a credential
// that cannot be read now.
func (k *checker) isMissingCredential(key toml.Key) bool {
	v, _ := k.doc.value(key)
	path, _ := v.(string)
	return strings.HasPrefix(path, credentials) && unix.Access(path, unix.R_OK) != nil
}

// err returns all that was reported, in the order of the lines.
func (k *checker) err() error {
	if len(k.errs) > 0 {
		k.errs = append(k.errs, k.c.missing...)
	}
	slices.SortStableFunc(k.errs, func(a, b *ConfigError) int { return cmp.Compare(a.Line, b.Line) })
	errs := make([]error, len(k.errs))
	for i, e := range k.errs {
		errs[i] = e
	}
	return errors.Join(errs...)
}

// check looks at the values, and at the files and folders that they name.
func (k *checker) check() {
	numbersFine := k.ranges()
	k.dataDir()
	k.serverName()
	k.signingKeys()
	if numbersFine {
		k.fit()
	}
	k.front()
	k.secret()
	k.keys()
	k.federation()
	k.status()
	k.admin()
	k.edge(numbersFine)
	if numbersFine { // else what contradicts what would be a guess
		k.disk()
		k.core()
		k.memory()
	}
}

// checkAddresses looks at the values by which a running bus is found, and at no file. It
// forgets what is wrong with others.
func (k *checker) checkAddresses() {
	if k.dataDirPath() && !k.reported("status") {
		k.status()
		k.admin()
	}
	k.errs = slices.DeleteFunc(k.errs, func(e *ConfigError) bool {
		section, _, _ := strings.Cut(e.Key, ".")
		return section != "data_dir" && section != "status"
	})
}

// ranges holds every value against the limits in its tag. It reports whether
// all numbers are within theirs.
func (k *checker) ranges() bool {
	fine := true
	for _, f := range k.c.fields() {
		if names := strings.Fields(f.tag.Get("oneof")); len(names) > 0 && !slices.Contains(names, f.value.String()) {
			k.bad(f.key(), "is "+quote(f.value.String()), `"`+strings.Join(names, `" or "`)+`"`)
		}
		v, numeric := number(f.value.Interface())
		if !numeric {
			continue
		}
		least, most, _ := strings.Cut(f.tag.Get("range"), "..")
		if lo, hi := f.parse(least), f.parse(most); !(lo <= v && v <= hi) {
			fine = false
			k.bad(f.key(), "is "+tomlValue(f.value.Interface()), f.limits())
		}
	}
	return fine
}

// number returns the values that have a range in a common form.
func number(v any) (float64, bool) {
	switch v := v.(type) {
	case int:
		return float64(v), true
	case float64:
		return v, true
	case sched.Bytes:
		return float64(v), true
	case Duration:
		return float64(v), true
	}
	return 0, false
}

// parse reads one end of the range in the tag of f.
func (f field) parse(s string) float64 {
	var v any
	var err error
	switch f.value.Interface().(type) {
	case sched.Bytes:
		v, err = sched.ParseBytes(s)
	case Duration:
		var d time.Duration
		d, err = time.ParseDuration(s)
		v = Duration(d)
	default:
		v, err = strconv.ParseFloat(s, 64)
	}
	if err != nil {
		panic(fmt.Sprintf("node: the range of %s: %v", f.key(), err))
	}
	n, _ := number(v)
	return n
}

// limits returns the range in the tag of f, with its ends as they would stand
// in a file.
func (f field) limits() string {
	least, most, _ := strings.Cut(f.tag.Get("range"), "..")
	switch f.value.Interface().(type) {
	case sched.Bytes, Duration:
		least, most = strconv.Quote(least), strconv.Quote(most)
	}
	return least + " to " + most
}

// abs returns a path of the file as an absolute one.
func (k *checker) abs(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(k.dir, path)
}

// dataDirPath makes the path absolute. It is false if there is none.
func (k *checker) dataDirPath() bool {
	if k.c.DataDir == "" {
		k.bad("data_dir", "is empty", `the path of a folder, such as data_dir = "/var/lib/fsbus"`)
		return false
	}
	k.c.DataDir = k.abs(k.c.DataDir)
	return true
}

func (k *checker) dataDir() {
	const key = "data_dir"
	if !k.dataDirPath() {
		return
	}
	// It, or what it will be made in.
	dir := k.c.DataDir
	fi, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		dir = filepath.Dir(dir)
		fi, err = os.Stat(dir)
	}
	if err == nil && !fi.IsDir() {
		err = unix.ENOTDIR
	}
	if err == nil {
		err = unix.Access(dir, unix.W_OK|unix.X_OK)
	}
	if err != nil {
		k.bad(key, fmt.Sprintf("%s cannot be used: %s: %s", quote(k.c.DataDir), quote(dir), reason(err)),
			"a folder that the user who runs fsbus can write to, or can make in the one above it")
	}
}

func (k *checker) serverName() {
	const key = "homeserver.server_name"
	const want = `the homeserver's server_name, such as server_name = "example.org"`
	if k.reported(key) {
		return
	}
	if k.c.Homeserver.ServerName == "" {
		k.bad(key, "is not set", want)
		return
	}
	if _, err := matrix.ParseServerName(string(k.c.Homeserver.ServerName)); err != nil {
		k.bad(key, "is "+quote(string(k.c.Homeserver.ServerName))+": "+clean(err.Error()), want)
	}
}

// reported reports whether there is a mistake in a key or its section already,
// so that its value says nothing.
func (k *checker) reported(key string) bool {
	return slices.ContainsFunc(k.errs, func(e *ConfigError) bool { return e.Key == key || strings.HasPrefix(key, e.Key+".") })
}

func (k *checker) front() {
	c := &k.c.Front
	const key = "front.listen"
	if n := len(c.Listen); n < 1 || n > maxListen {
		k.bad(key, fmt.Sprintf("has %d entries", n), fmt.Sprintf("1 to %d addresses", maxListen))
	}
	for i, spec := range c.Listen {
		c.Listen[i] = k.listen(key, spec, c.AllowRemote, "the secret and all requests would cross the network unencrypted")
		if slices.Contains(c.Listen[:i], c.Listen[i]) {
			k.bad(key, "has "+quote(spec)+" twice", "each address once")
		}
	}
	if c.SocketMode&0o600 != 0o600 {
		k.bad("front.socket_mode", "is "+tomlValue(c.SocketMode), `a mode that lets the owner connect, such as socket_mode = "0660"`)
	}
	if !userExists(c.SocketOwner) {
		k.bad("front.socket_owner", fmt.Sprintf("this system has no user %s", quote(c.SocketOwner)), "the name or the number of a user")
	}
	if !groupExists(c.SocketGroup) {
		k.bad("front.socket_group", fmt.Sprintf("this system has no group %s", quote(c.SocketGroup)), "the name or the number of a group")
	}
}

// serves reports whether who connects to an address, "host:port" or "unix:/path",
// reaches what listens as spec says.
func serves(spec, address string) bool {
	host, port, err := net.SplitHostPort(spec)
	to, toPort, toErr := net.SplitHostPort(address)
	if err != nil || toErr != nil || strings.HasPrefix(spec, "unix:") || strings.HasPrefix(address, "unix:") {
		return spec == address
	}
	hostAddr, _ := netip.ParseAddr(host)
	toAddr, _ := netip.ParseAddr(to)
	hostAddr, toAddr = hostAddr.Unmap(), toAddr.Unmap()
	hostLocal, toLocal := host == "localhost" || hostAddr.IsLoopback(), to == "localhost" || toAddr.IsLoopback()
	switch {
	case port != toPort:
		return false
	case host == "":
		return toLocal || to == "" || toAddr.IsUnspecified()
	case hostAddr.IsUnspecified(): // of one family
		return to == "" || to == "localhost" || hostAddr.Is4() == toAddr.Is4() && (toLocal || toAddr.IsUnspecified())
	case host == "localhost" || to == "localhost":
		return hostLocal && toLocal
	}
	return hostAddr == toAddr
}

// userExists reports whether s is empty, a number or the name of a user.
func userExists(s string) bool {
	_, err := user.Lookup(s)
	return s == "" || err == nil || isID(s)
}

// groupExists reports whether s is empty, a number or the name of a group.
func groupExists(s string) bool {
	_, err := user.LookupGroup(s)
	return s == "" || err == nil || isID(s)
}

func isID(s string) bool {
	_, err := strconv.ParseUint(s, 10, 31)
	return err == nil
}

// listen checks an address to listen on, and returns it with an absolute path.
// risk is what speaks against an address that other machines can reach.
func (k *checker) listen(key, spec string, remote bool, risk string) string {
	section, _, _ := strings.Cut(key, ".")
	want := `"unix:/path" or "address:port", such as "` + map[string]string{"front": "127.0.0.1:8009", "status": "127.0.0.1:8011", "edge": "0.0.0.0:8448"}[section] + `"`
	if path, ok := strings.CutPrefix(spec, "unix:"); ok {
		if path == "" || strings.ContainsFunc(path, unicode.IsControl) {
			k.bad(key, "has "+quote(spec), want)
			return spec
		}
		path = k.abs(path)
		if len(path) > maxSocketPath {
			k.bad(key, fmt.Sprintf("the path %s has %d bytes", quote(path), len(path)), fmt.Sprintf("at most %d, as the system has it for sockets", maxSocketPath))
		}
		return "unix:" + path
	}
	host, port, err := net.SplitHostPort(spec)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	var addr netip.Addr
	switch {
	case err != nil:
	case host == "localhost":
		addr = netip.IPv6Loopback()
	case host != "":
		addr, err = netip.ParseAddr(host)
	}
	if err != nil {
		k.bad(key, "has "+quote(spec), want)
		return spec
	}
	if !addr.IsLoopback() && !remote {
		k.bad(key, fmt.Sprintf("other machines can reach %s, and %s", quote(spec), risk),
			`"unix:/path" or "127.0.0.1:port", or allow_remote = true in [`+section+`] if that network is trusted`)
	}
	return spec
}

// secret checks where the secret is, and reads it.
func (k *checker) secret() {
	c := &k.c.Front
	const key, pathKey = "front.secret", "front.secret_path"
	if k.reported(key) || k.reported(pathKey) {
		return
	}
	switch {
	case c.SecretPath == "" && c.Secret == "":
		k.bad(pathKey, "neither this nor secret is set", `the file that has the secret, such as secret_path = "/etc/fsbus/secret"`)
		return
	case c.SecretPath != "" && c.Secret != "":
		k.bad(key, "is set besides secret_path", "only one of the two")
		return
	case c.Secret != "":
		c.secret = []byte(c.Secret)
		if problem := secretProblem(c.secret); problem != "" {
			k.bad(key, problem, "a long random text")
		}
		return
	}
	c.SecretPath = k.abs(c.SecretPath)
	const want = "a file that holds the secret and nothing else, readable for the user who runs fsbus"
	fi, err := os.Stat(c.SecretPath)
	if err != nil {
		k.bad(pathKey, quote(c.SecretPath)+": "+reason(err), want)
		return
	}
	if mode := fi.Mode().Perm(); fi.Mode().IsRegular() && mode&0o026 != 0 {
		k.bad(pathKey, fmt.Sprintf("%s has mode %v: users who should not can read or change it", quote(c.SecretPath), FileMode(mode)),
			"mode 0640 or 0600 (chmod 640 "+clean(c.SecretPath)+")")
	}
	b, err := readSmall(c.SecretPath, maxSecretFile)
	if err != nil {
		k.bad(pathKey, quote(c.SecretPath)+": "+reason(err), want)
		return
	}
	// Synapse strips it as well.
	c.secret = []byte(strings.TrimSpace(string(b)))
	if problem := secretProblem(c.secret); problem != "" {
		k.bad(pathKey, quote(c.SecretPath)+" "+problem, want)
	}
}

// secretProblem says why a secret cannot stand in a header field.
func secretProblem(secret []byte) string {
	switch s := string(secret); {
	case s == "":
		return "is empty"
	case strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == unicode.ReplacementChar }):
		return "has a line break or another control character"
	case strings.TrimSpace(s) != s:
		return "begins or ends with a space"
	}
	return ""
}

// has reports whether name is a key of the section.
func (o *OutboxConfig) has(name string) bool {
	for _, f := range new(Config).fields() {
		if f.section == "outbox" && f.name == name {
			return true
		}
	}
	return false
}

// core lets the core check the limits that contradict one another. It reports
// one at a time; each is then put right, to hear of the others as well.
func (k *checker) core() {
	core := k.c.Core()
	for err := core.Validate(); err != nil; err = core.Validate() {
		// It begins with the name of the key.
		name, rest, _ := strings.Cut(err.Error(), " ")
		problem, want, _ := strings.Cut(rest, ", it must be ")
		section := "outbound."
		if k.c.Outbox.has(name) {
			section = "outbox."
		}
		k.bad(section+name, problem, want+k.c.orMemory(section+name))
		switch name {
		case "unknown_hosts":
			core.Unknown = 1
		case "failing_hosts":
			core.Failing = 1
		default:
			return
		}
	}
}

// orMemory says what else would be right where what a limit contradicts was not
// written by anybody, but lowered for MemoryLimit.
func (c *Config) orMemory(key string) string {
	beside := map[string][]string{
		"outbound.unknown_hosts": {"outbound.workers "},
		"outbound.failing_hosts": {"outbound.workers "},
		"outbound.max_hosts":     {"outbound.workers ", "front.max_connections "},
		"edge.origins":           {"edge.requests ", "edge.concurrency ", "edge.parallel "},
	}[key]
	lowered := func(name string) bool {
		return slices.ContainsFunc(c.lowered, func(s string) bool { return strings.HasPrefix(s, name) })
	}
	if !slices.ContainsFunc(beside, lowered) {
		return ""
	}
	return ", or a higher memory_limit, for which the others are lowered"
}

// disk holds what is kept on disk against that of which it is a part.
func (k *checker) disk() {
	spool, keep, media := k.c.Outbound.SpoolDisk, k.c.Joins.KeepDisk, k.c.Media.CacheDisk
	switch {
	case keep > spool:
		k.bad("joins.keep_disk", fmt.Sprintf("is %s, but it is a part of outbound.spool_disk, which is %s", tomlValue(keep), tomlValue(spool)),
			"at most "+tomlValue(spool)+", or a higher outbound.spool_disk")
	case keep+media > spool:
		k.bad("media.cache_disk", fmt.Sprintf("is %s, which together with joins.keep_disk (%s) is more than outbound.spool_disk (%s)", tomlValue(media), tomlValue(keep), tomlValue(spool)),
			"at most "+tomlValue(spool-keep)+", or a lower joins.keep_disk, or a higher outbound.spool_disk")
	}
	if file := k.c.Outbox.MaxDisk; k.c.hasEdge() && k.c.Edge.RecordDisk > file/4 {
		k.bad("edge.record_disk", fmt.Sprintf("is %s, more than a quarter of outbox.max_disk (%s), which bounds the database", tomlValue(k.c.Edge.RecordDisk), tomlValue(file)),
			"at most "+tomlValue(file/4)+", or a higher outbox.max_disk")
	}
	// Keys are stored even when the database is full, at the outbox's expense.
	if file := k.c.Outbox.MaxDisk; k.c.Keys.CacheDisk > file/2 {
		k.bad("keys.cache_disk", fmt.Sprintf("is %s, more than half of outbox.max_disk (%s), which bounds the database", tomlValue(k.c.Keys.CacheDisk), tomlValue(file)),
			"at most "+tomlValue(file/2)+", or a higher outbox.max_disk")
	}
}

// memory holds what everything may use against the limit.
func (k *checker) memory() {
	b := k.c.Budget()
	if b.Memory <= b.Limit {
		return
	}
	lowered := ""
	if len(k.c.lowered) > 0 {
		lowered = ", with the defaults lowered as far as they go"
	}
	k.bad("memory_limit", fmt.Sprintf("is %s, but the settings may use %s%s", tomlValue(b.Limit), inMiB(b.Memory), lowered),
		fmt.Sprintf("at least memory_limit = %s, or lower %s", tomlValue(roundUp(b.Memory)), b.largest(3)))
}

func (k *checker) federation() {
	c := &k.c.Federation
	k.caFile()
	k.ipRanges("federation.ip_range_blocklist", c.IPRangeBlocklist)
	k.ipRanges("federation.ip_range_allowlist", c.IPRangeAllowlist)
	k.resolve()
	if c.Proxy != "" {
		var err error
		if c.proxy, err = netx.ParseProxy(string(c.Proxy), c.ProxyDNS); err != nil {
			k.bad("federation.proxy", "is "+err.Error(), `a proxy, such as "http://proxy.lan:3128" or "http://user:password@proxy.lan:3128"`)
		}
	} else if c.ProxyDNS {
		k.bad("federation.proxy_dns", "is true, but there is no federation.proxy", "a proxy, or false")
	}
}

func (k *checker) ipRanges(key string, list []string) {
	if len(list) > maxEntries {
		k.bad(key, fmt.Sprintf("has %d entries", len(list)), fmt.Sprintf("at most %d", maxEntries))
		return
	}
	for _, s := range list {
		if _, err := netx.NewBlocklist([]string{s}, nil); err != nil {
			_, why, _ := strings.Cut(err.Error(), strconv.Quote(s))
			k.bad(key, "has "+quote(s)+why, `address ranges, such as "10.0.0.0/8" or "fc00::/7"`)
		}
	}
}

func (k *checker) caFile() {
	const key = "federation.ca_file"
	c := &k.c.Federation
	if c.CAFile == "" {
		return
	}
	c.CAFile = k.abs(c.CAFile)
	const want = "a file with certificates in PEM"
	pem, err := readSmall(c.CAFile, maxCAFile)
	if err != nil {
		k.bad(key, quote(c.CAFile)+": "+reason(err), want)
		return
	}
	if _, err := netx.CAPool(pem); err != nil {
		k.bad(key, quote(c.CAFile)+": "+clean(err.Error()), want)
	}
}

func (k *checker) resolve() {
	const key = "federation.resolve"
	c := &k.c.Federation
	if len(c.Resolve) > maxEntries {
		k.bad(key, fmt.Sprintf("has %d entries", len(c.Resolve)), fmt.Sprintf("at most %d", maxEntries))
		return
	}
	for _, name := range slices.Sorted(maps.Keys(c.Resolve)) {
		addr := c.Resolve[name]
		if _, err := netx.NewStatic(map[string]string{name: addr}); err != nil {
			_, why, _ := strings.Cut(err.Error(), strconv.Quote(addr)+": ")
			k.badAt(toml.Key{"federation", "resolve", name}, "is "+quote(addr)+": "+clean(why),
				`"name" = "address", "name:port" = "address" or "name:port" = "address:port"`)
		}
	}
}

func (k *checker) status() {
	c := &k.c.Status
	if c.Listen == "" {
		return
	}
	c.Listen = k.listen("status.listen", c.Listen, c.AllowRemote, "the page has no password")
	if slices.Contains(k.c.Front.Listen, c.Listen) && !strings.HasSuffix(c.Listen, ":0") {
		k.bad("status.listen", quote(c.Listen)+" is in front.listen as well", "an address of its own")
	}
}

func (k *checker) admin() {
	const key = "status.admin"
	const want = `"unix:/path", or "" for none`
	c := &k.c.Status
	if c.Admin == "" || k.reported(key) {
		return
	}
	given, ok := strings.CutPrefix(c.Admin, "unix:")
	path := k.c.adminSocket()
	switch {
	case !ok:
		k.bad(key, "is "+quote(c.Admin)+", and only a unix socket says who may connect: the queue can be deleted there", want)
	case given == "" || strings.ContainsFunc(given, unicode.IsControl):
		k.bad(key, "is "+quote(c.Admin), want)
	case !filepath.IsAbs(given) && k.reported("data_dir"): // where it would be is not known
	case len(path) > maxSocketPath:
		k.bad(key, fmt.Sprintf("the path %s has %d bytes", quote(path), len(path)),
			fmt.Sprintf("at most %d, as the system has it for sockets, such as \"unix:/run/fsbus/admin.sock\"", maxSocketPath))
	case "unix:"+path == c.Listen || slices.Contains(k.c.Front.Listen, "unix:"+path):
		k.bad(key, quote("unix:"+path)+" is in status.listen or front.listen as well", "a path of its own")
	}
}

// Missing returns what keeps a part of the bus from working, such as a certificate that
// cannot be read. The bus starts without it, and /health says so.
func (c *Config) Missing() (errs []error) {
	for _, e := range c.missing {
		errs = append(errs, e)
	}
	return errs
}

// Warnings returns what works but should not stay as it is, one sentence each.
func (c *Config) Warnings() []string {
	var out []string
	warn := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	switch {
	case string(c.Front.secret) == exampleSecret:
		warn("the secret is the one of the example, which everybody knows: replace it")
	case len(c.Front.secret) < shortSecret:
		warn("the secret has %d characters: use at least %d random ones", len(c.Front.secret), shortSecret)
	}
	if c.Front.Secret != "" && openToOthers(c.file) {
		warn("front.secret: every user of this system can read it in %s: use secret_path, or chmod 640 %s", quote(c.file), clean(c.file))
	}
	if path := c.Homeserver.SigningKeyPath; openToOthers(path) {
		warn("homeserver.signing_key_path: every user of this system can read or change %s, and so speak for the homeserver: chmod 640 %s", quote(path), clean(path))
	}
	for _, spec := range c.Front.Listen {
		if path, ok := strings.CutPrefix(spec, "unix:"); ok {
			dir := filepath.Dir(path)
			if _, err := os.Stat(dir); err != nil && dir != c.DataDir {
				warn("front.listen: the folder %s is not there, and is not made by fsbus", quote(dir))
			}
			continue
		}
		host, port, _ := net.SplitHostPort(spec)
		if addr, _ := netip.ParseAddr(host); !addr.IsLoopback() && host != "localhost" {
			warn("front.listen: %s crosses the network unencrypted, secret included", quote(spec))
		}
		if port == "0" {
			warn("front.listen: port 0 is another port after each start")
		}
	}
	if len(c.lowered) > 0 {
		warn("memory_limit: %v is less than the defaults need; lowered to fit it: %s", c.MemoryLimit, strings.Join(c.lowered, ", "))
	}
	if keys := c.changed("outbox", "outbox.max_disk"); len(keys) > 0 && !c.hasOutbox() { // that one bounds the database in any case
		warn("%s: set, but without homeserver.signing_key_path nothing is taken over", strings.Join(keys, ", "))
	}
	if w := c.memoryWarning(unitFolders); w != "" {
		out = append(out, w)
	}
	c.edgeWarnings(warn)
	if len(c.Federation.IPRangeBlocklist) == 0 {
		warn("federation.ip_range_blocklist is empty: any server can make fsbus connect to private addresses")
	}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		if w := fileWarning(c.Budget().FileDescriptors, uint64(limit.Cur)); w != "" {
			out = append(out, w)
		}
	}
	return out
}

// openToOthers reports whether users who are neither the owner of a file nor of its
// group can read or change it.
func openToOthers(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o006 != 0
}

// changed returns the keys of a section that do not stand at their defaults, without
// one of them.
func (c *Config) changed(section, but string) (keys []string) {
	d := DefaultConfig()
	defaults := d.fields()
	for i, f := range c.fields() {
		if f.section == section && f.key() != but && !f.equal(defaults[i]) {
			keys = append(keys, f.key())
		}
	}
	return keys
}

// Notes returns what Load has made of limits that stand at their defaults, so that they
// go with those that were set, one sentence each.
func (c *Config) Notes() []string {
	if len(c.followed) == 0 {
		return nil
	}
	return []string{"changed to go with what is set: " + strings.Join(c.followed, ", ")}
}

// fileWarning complains about a limit of open files below what is needed.
func fileWarning(need int, limit uint64) string {
	if uint64(need) <= limit {
		return ""
	}
	return fmt.Sprintf("the system allows %d open files, and %d may be needed: raise LimitNOFILE in the systemd unit (or ulimit -n), or lower front.max_connections", limit, need)
}

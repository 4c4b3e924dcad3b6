package node

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
	"fsbus/store"
)

// EdgeConfig is the side to which other servers connect.
type EdgeConfig struct {
	// Listen are the addresses: "address:port" or "unix:/path", ":port" for all of
	// IPv4 and IPv6, of which 0.0.0.0 and [::] are one each. Default none: there
	// is no edge, and nothing else here counts. Each needs one goroutine and one of
	// MaxConnections.
	Listen []string `toml:"listen" eg:"\":8448\""`
	// Upstream is the homeserver's federation listener: "http://host:port" or
	// "unix:/path". Required with Listen.
	Upstream string `toml:"upstream" eg:"\"http://127.0.0.1:8008\""`
	// TLSCertificate is the file of the certificate and those that lead to its authority,
	// TLSPrivateKey that of its key, both PEM. They are read again when they change, and on
	// reload. Default "": HTTP without TLS, for a proxy that does it.
	TLSCertificate string `toml:"tls_certificate" eg:"\"/etc/fsbus/fullchain.pem\""`
	TLSPrivateKey  string `toml:"tls_private_key" eg:"\"/etc/fsbus/privkey.pem\""`
	// TrustedProxies are the addresses of proxies whose X-Forwarded-For is believed.
	// Default none; whoever connects over a unix socket is trusted as well.
	TrustedProxies []string `toml:"trusted_proxies" eg:"[\"127.0.0.0/8\", \"::1/128\"]"`
	// WellKnown is what /.well-known/matrix/server names, "name:port". Default "":
	// the path is not answered.
	WellKnown string `toml:"well_known" eg:"\"matrix.example.org:443\"" reload:"yes"`
	// PassClient is whether paths of clients go to the homeserver too, as they are.
	// Default false: they do not exist.
	PassClient bool `toml:"pass_client"`

	// MaxConnections is how many connections are open at a time; when all are, one of
	// whoever has most makes room. Default 320. Each costs 57 KiB with TLS, up to
	// three goroutines and a file descriptor.
	MaxConnections int `toml:"max_connections" range:"16..100000" fit:"32"`
	// MaxConnectionsPerAddress is how many of them one address may have. Default 0:
	// as many as there are, since one host may serve many servers.
	MaxConnectionsPerAddress int `toml:"max_connections_per_address" range:"0..100000"`
	// MaxReading is how many requests are being read at a time. Default 16. Each
	// costs 48 KiB.
	MaxReading int `toml:"max_reading" range:"4..1024" fit:"4"`
	// HeaderTimeout bounds a TLS handshake, and the head of a request, BodyTimeout
	// its body. Defaults 10 s and 30 s. A body has a second more for each BodyRate bytes
	// that have come, but no more than BodyTotal: defaults 4 KiB and 10 min. IdleTimeout
	// is how long a connection stays open without a request. Default 90 s.
	HeaderTimeout Duration    `toml:"header_timeout" range:"1s..1m"`
	BodyTimeout   Duration    `toml:"body_timeout" range:"1s..5m"`
	BodyRate      sched.Bytes `toml:"body_rate" range:"256B..1GiB"`
	BodyTotal     Duration    `toml:"body_total" range:"1s..24h"`
	IdleTimeout   Duration    `toml:"idle_timeout" range:"1s..1h"`

	// Deny and Allow are patterns of server names, without port, as in a server ACL
	// of a room: * is any text, ? one character. Deny goes first. Default none: all
	// are let in. AllowIPLiterals lets in servers that have an address for a name.
	// Default true.
	Deny            []string `toml:"deny" eg:"[\"*.evil.example\"]" reload:"yes"`
	Allow           []string `toml:"allow" eg:"[\"*.example.org\"]" reload:"yes"`
	AllowIPLiterals bool     `toml:"allow_ip_literals" reload:"yes"`
	// NoKey says what becomes of a request whose signature cannot be checked, since
	// the key cannot be had: "pass" (default) lets the homeserver try, at PassRate in
	// a second, "refuse" answers 401.
	NoKey    string  `toml:"no_key" oneof:"pass refuse" reload:"yes"`
	PassRate float64 `toml:"pass_rate" range:"0.1..1000.0" reload:"yes"`
	// KeyFetches is how many keys are fetched in a minute to check signatures, a
	// quarter of them for servers that are known. Default 300.
	KeyFetches int `toml:"key_fetches" range:"4..100000"`
	// Unverified and UnverifiedBytes bound the requests whose signatures are being
	// checked, Requests and RequestBytes those that wait for their turn or their
	// answer. Defaults 256, 64 MiB, 512 and 64 MiB. Each costs 16 KiB. SpoolMemory is
	// how many of the bytes are in memory, and as many of the answers; the rest is in
	// DataDir, of the answers at most half of Outbound.SpoolDisk. Default 1 MiB.
	Unverified      int         `toml:"unverified" range:"8..100000" fit:"32"`
	UnverifiedBytes sched.Bytes `toml:"unverified_bytes" range:"13MiB..16GiB"`
	Requests        int         `toml:"requests" range:"8..100000" fit:"64"`
	RequestBytes    sched.Bytes `toml:"request_bytes" range:"13MiB..16GiB"`
	SpoolMemory     sched.Bytes `toml:"spool_memory" range:"0..1GiB" fit:"128KiB"`
	// MaxBody is the size of the largest body that is taken, on disk, of a server and,
	// with PassClient, of a client. Default 50 MiB, which is what a Synapse takes by
	// default (max_upload_size). UnverifiedBytes and RequestBytes are no less.
	MaxBody sched.Bytes `toml:"max_body" range:"1MiB..4GiB"`
	// CheckedBody is the size of the largest body that is looked into, which takes twice
	// as much memory. Of a larger one the signature is checked as it is read, if it is
	// canonical JSON; else it goes on to the homeserver as if its key could not be had, or
	// is refused with NoKey "refuse". Default 12.5 MiB.
	CheckedBody sched.Bytes `toml:"checked_body" range:"1MiB..12800KiB" fit:"4MiB"`
	// Origins is how many servers are remembered, more than Requests, Concurrency,
	// Parallel and 256 together. Default 2000, or what these need. Each costs 400 bytes.
	Origins int `toml:"origins" range:"100..1000000" fit:"500"`

	// Concurrency is how many transactions the homeserver is given at a time at most,
	// Parallel how many other requests; how many it really is follows from its answer
	// times. Defaults 8 and 16. Each costs 60 KiB and three goroutines.
	Concurrency int `toml:"concurrency" range:"1..1024" fit:"4"`
	Parallel    int `toml:"parallel" range:"2..1024" fit:"6"`
	// TransactionQueue is how many transactions of one server wait, and OriginBytes
	// bounds all that is held of it. Defaults 10 and 14 MiB. OriginQueue is how many
	// other requests of it wait before they are answered 429, OriginParallel how many
	// run at a time. Defaults 50 and 3, as a Synapse has it.
	TransactionQueue int         `toml:"transaction_queue" range:"1..1000" reload:"yes"`
	OriginBytes      sched.Bytes `toml:"origin_bytes" range:"13MiB..16GiB" reload:"yes"`
	OriginQueue      int         `toml:"origin_queue" range:"50..10000" reload:"yes"`
	OriginParallel   int         `toml:"origin_parallel" range:"1..1000" reload:"yes"`
	// OriginRate is how many requests of one server the homeserver is given in a
	// second, OriginBurst how many at once; more wait. Defaults 10 and 20.
	OriginRate  float64 `toml:"origin_rate" range:"0.1..10000.0" reload:"yes"`
	OriginBurst int     `toml:"origin_burst" range:"1..10000" reload:"yes"`

	// Ephemeral says what becomes of transactions with presence and typing only:
	// "pace" (default) gives the homeserver at most EphemeralRate in a second, and no
	// more than take EphemeralShare of its time, and drops what newer ones supersede,
	// what is out of date, what has waited for EphemeralHold, and what is more than
	// EphemeralWaiting; "pass" treats them like others, after them; "drop" drops all.
	// Defaults 20, 0.05, 5 s and 160.
	Ephemeral        string   `toml:"ephemeral" oneof:"pace pass drop" reload:"yes"`
	EphemeralRate    float64  `toml:"ephemeral_rate" range:"0.1..10000.0" reload:"yes"`
	EphemeralShare   float64  `toml:"ephemeral_share" range:"0.01..1.0" reload:"yes"`
	EphemeralHold    Duration `toml:"ephemeral_hold" range:"1s..50s" reload:"yes"`
	EphemeralWaiting int      `toml:"ephemeral_waiting" range:"1..100000" reload:"yes" fit:"20"`
	// JoinHold is how long traffic of a room waits while the homeserver joins it.
	// Default 25 s.
	JoinHold Duration `toml:"join_hold" range:"0s..30s" reload:"yes"`

	// RecordEntries is how many answered transactions are remembered for the 24 hours
	// in which they may come again, RecordDisk how many bytes of the database they
	// take. Defaults 50000 and 16 MiB.
	RecordEntries int         `toml:"record_entries" range:"100..10000000"`
	RecordDisk    sched.Bytes `toml:"record_disk" range:"1MiB..16GiB"`

	certificate netx.CertificateInfo // what Load found at TLSCertificate
}

func defaultEdge() EdgeConfig {
	e := edge.Default()
	return EdgeConfig{
		Listen:           []string{},
		TrustedProxies:   []string{},
		MaxConnections:   320,
		MaxReading:       16,
		HeaderTimeout:    Duration(10 * time.Second),
		BodyTimeout:      Duration(30 * time.Second),
		BodyRate:         4 * sched.KiB,
		BodyTotal:        Duration(10 * time.Minute),
		IdleTimeout:      Duration(90 * time.Second),
		Deny:             []string{},
		Allow:            []string{},
		AllowIPLiterals:  true,
		NoKey:            e.NoKey.String(),
		PassRate:         e.PassRate,
		KeyFetches:       int(e.KeyFetches),
		Unverified:       int(e.Unverified),
		UnverifiedBytes:  e.UnverifiedBytes,
		Requests:         int(e.Requests),
		RequestBytes:     e.Bytes,
		SpoolMemory:      sched.MiB,
		CheckedBody:      matrix.MaxRequestBody,
		MaxBody:          50 * sched.MiB,
		Origins:          int(e.Origins),
		Concurrency:      int(e.Concurrency),
		Parallel:         int(e.Parallel),
		TransactionQueue: int(e.TxnQueue),
		OriginBytes:      e.OriginBytes,
		OriginQueue:      int(e.OriginQueue),
		OriginParallel:   int(e.OriginParallel),
		OriginRate:       e.OriginRate,
		OriginBurst:      int(e.OriginBurst),
		Ephemeral:        e.Ephemeral.String(),
		EphemeralRate:    e.EphemeralRate,
		EphemeralShare:   e.EphemeralShare,
		EphemeralHold:    Duration(e.EphemeralHold),
		EphemeralWaiting: int(e.EphemeralWaiting),
		JoinHold:         Duration(e.JoinHold),
		RecordEntries:    store.DefaultMaxInbound,
		RecordDisk:       store.DefaultMaxInboundBytes,
	}
}

// hasEdge reports whether other servers connect to the bus.
func (c *Config) hasEdge() bool { return len(c.Edge.Listen) > 0 }

// core returns the limits of the edge's core.
func (e *EdgeConfig) core() edge.Config {
	c := edge.Config{
		Deny: e.Deny, Allow: e.Allow, AllowIPLiterals: e.AllowIPLiterals,
		PassRate: e.PassRate, KeyFetches: int32(e.KeyFetches), Verifying: verifying,
		Unverified: int32(e.Unverified), UnverifiedBytes: e.UnverifiedBytes,
		Requests: int32(e.Requests), Bytes: e.RequestBytes, Origins: int32(e.Origins),
		Concurrency: int32(e.Concurrency), Parallel: int32(e.Parallel),
		OriginBytes: e.OriginBytes, TxnQueue: int32(e.TransactionQueue),
		OriginQueue: int32(e.OriginQueue), OriginParallel: int32(e.OriginParallel),
		OriginRate: e.OriginRate, OriginBurst: int32(e.OriginBurst),
		EphemeralRate: e.EphemeralRate, EphemeralShare: e.EphemeralShare, EphemeralHold: time.Duration(e.EphemeralHold), EphemeralWaiting: int32(e.EphemeralWaiting),
		JoinHold: time.Duration(e.JoinHold),
	}
	for _, f := range []struct {
		to   interface{ UnmarshalText([]byte) error }
		text string
	}{{&c.NoKey, e.NoKey}, {&c.Ephemeral, e.Ephemeral}} {
		if err := f.to.UnmarshalText([]byte(f.text)); err != nil {
			panic(fmt.Sprintf("node: a policy that was not checked: %v", err))
		}
	}
	return c
}

// proxies returns TrustedProxies as ranges.
func (e *EdgeConfig) proxies() []netip.Prefix {
	list := make([]netip.Prefix, 0, len(e.TrustedProxies))
	for _, s := range e.TrustedProxies {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			panic(fmt.Sprintf("node: a range that was not checked: %v", err))
		}
		list = append(list, p)
	}
	return list
}

// upstream returns how the homeserver is reached.
func (e *EdgeConfig) upstream() netx.UpstreamConfig {
	return netx.UpstreamConfig{Address: e.Upstream, MaxConns: e.Concurrency + e.Parallel}
}

// certificates returns where the certificate is; ok is false if there is none.
func (e *EdgeConfig) certificates() (c netx.CertificatesConfig, ok bool) {
	return netx.CertificatesConfig{CertFile: e.TLSCertificate, KeyFile: e.TLSPrivateKey}, e.TLSCertificate != ""
}

func (k *checker) edge(numbersFine bool) {
	c := &k.c.Edge
	k.trustedProxies()
	for _, p := range []struct {
		key  string
		list []string
	}{{"edge.deny", c.Deny}, {"edge.allow", c.Allow}} {
		if len(p.list) > maxPatterns {
			k.bad(p.key, fmt.Sprintf("has %d entries", len(p.list)), fmt.Sprintf("at most %d", maxPatterns))
		}
	}
	if !k.c.hasEdge() || k.reported("edge.listen") {
		return
	}
	k.edgeListen()
	k.edgeUpstream()
	k.edgeTLS()
	if c.WellKnown != "" {
		if _, err := matrix.ParseServerName(c.WellKnown); err != nil {
			k.bad("edge.well_known", "is "+quote(c.WellKnown)+": "+clean(err.Error()), `a server name, with its port if that is not 8448, such as well_known = "matrix.example.org:443"`)
		}
	}
	for _, held := range []struct {
		key   string
		bytes sched.Bytes
	}{{"edge.unverified_bytes", c.UnverifiedBytes}, {"edge.request_bytes", c.RequestBytes}} {
		if numbersFine && held.bytes < c.MaxBody {
			k.bad(held.key, "is "+held.bytes.String()+", but edge.max_body is "+c.MaxBody.String(), "at least that, as one request must fit")
		}
	}
	if numbersFine && !k.reported("edge.no_key") && !k.reported("edge.ephemeral") {
		core := c.core()
		if err := core.Validate(); err != nil { // it begins with the name of the key
			name, rest, _ := strings.Cut(err.Error(), " ")
			problem, want, _ := strings.Cut(rest, ", it must be ")
			key := "edge." + strings.TrimSuffix(name, ":")
			k.bad(key, problem, want+k.c.orMemory(key))
		}
	}
}

// maxPatterns bounds Deny and Allow; the core has the same bound for both together.
const maxPatterns = 10_000

func (k *checker) trustedProxies() {
	const key = "edge.trusted_proxies"
	c := &k.c.Edge
	if len(c.TrustedProxies) > maxEntries {
		k.bad(key, fmt.Sprintf("has %d entries", len(c.TrustedProxies)), fmt.Sprintf("at most %d", maxEntries))
		return
	}
	for i, s := range c.TrustedProxies {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			c.TrustedProxies[i] = netip.PrefixFrom(a, a.BitLen()).String()
			continue
		}
		if _, err := netip.ParsePrefix(s); err != nil {
			k.bad(key, "has "+quote(s), `addresses or ranges, such as "127.0.0.1" or "10.0.0.0/8"`)
		}
	}
}

func (k *checker) edgeListen() {
	const key = "edge.listen"
	c := &k.c.Edge
	if n := len(c.Listen); n > maxListen {
		k.bad(key, fmt.Sprintf("has %d entries", n), fmt.Sprintf("at most %d addresses", maxListen))
	}
	for i, spec := range c.Listen {
		c.Listen[i] = k.listen(key, spec, true, "")
		if strings.HasSuffix(c.Listen[i], ":0") {
			continue // another port each time
		}
		switch {
		case slices.Contains(c.Listen[:i], c.Listen[i]):
			k.bad(key, "has "+quote(spec)+" twice", "each address once")
		case slices.Contains(k.c.Front.Listen, c.Listen[i]):
			k.bad(key, quote(spec)+" is in front.listen as well", "an address of its own")
		case c.Listen[i] == k.c.Status.Listen:
			k.bad(key, quote(spec)+" is status.listen as well", "an address of its own")
		}
	}
}

func (k *checker) edgeUpstream() {
	const key = "edge.upstream"
	const want = `where the homeserver's federation listener is, such as upstream = "http://127.0.0.1:8008" or "unix:/run/synapse/federation.sock"`
	c := &k.c.Edge
	switch {
	case k.reported(key):
		return
	case c.Upstream == "":
		k.bad(key, "is not set, but edge.listen is", want)
		return
	}
	if path, ok := strings.CutPrefix(c.Upstream, "unix:"); ok && path != "" {
		c.Upstream = "unix:" + k.abs(path)
	}
	if _, err := netx.NewUpstream(c.upstream()); err != nil {
		_, why, _ := strings.Cut(err.Error(), strconv.Quote(c.Upstream)+": ")
		k.bad(key, "is "+quote(c.Upstream)+": "+clean(why), want)
		return
	}
	for _, spec := range c.Listen {
		if serves(spec, c.upstreamAddress()) {
			k.bad(key, "is "+quote(c.Upstream)+", where edge.listen ("+quote(spec)+") is", "the homeserver's own address")
			return
		}
	}
}

// upstreamAddress returns Upstream as "unix:/path" or "host:port".
func (e *EdgeConfig) upstreamAddress() string {
	address := strings.TrimSuffix(strings.TrimPrefix(e.Upstream, "http://"), "/")
	if _, _, err := net.SplitHostPort(address); err != nil && !strings.HasPrefix(address, "unix:") {
		return net.JoinHostPort(strings.Trim(address, "[]"), "80")
	}
	return address
}

func (k *checker) edgeTLS() {
	const certKey, keyKey = "edge.tls_certificate", "edge.tls_private_key"
	c := &k.c.Edge
	switch {
	case c.TLSCertificate == "" && c.TLSPrivateKey == "":
		return
	case c.TLSCertificate == "":
		k.bad(certKey, "is not set, but edge.tls_private_key is", "both, or none where a proxy does TLS")
		return
	case c.TLSPrivateKey == "":
		k.bad(keyKey, "is not set, but edge.tls_certificate is", "both, or none where a proxy does TLS")
		return
	}
	c.TLSCertificate, c.TLSPrivateKey = k.abs(c.TLSCertificate), k.abs(c.TLSPrivateKey)
	files, _ := c.certificates()
	certs, err := netx.LoadCertificates(files)
	if err == nil {
		c.certificate = certs.Info()
	} else {
		key, path := certKey, c.TLSCertificate
		if strings.HasPrefix(err.Error(), "TLS private key") {
			key, path = keyKey, c.TLSPrivateKey
		}
		why := reason(err)
		if _, rest, found := strings.Cut(why, path+": "); found {
			why = rest
		}
		k.missing(key, quote(path)+": "+clean(why), "a certificate and its key in PEM, not encrypted, readable for the user who runs fsbus")
	}
}

// renewBefore is how long before its end a certificate should have been renewed.
const renewBefore = 14 * 24 * time.Hour

// certificateWarning says what is wrong with a certificate, or will soon be; "" if
// nothing is.
func certificateWarning(i netx.CertificateInfo, now time.Time) string {
	switch {
	case i.Problem != "":
		return i.Problem
	case i.NotAfter.Sub(now) < renewBefore:
		return "it ends at " + i.NotAfter.UTC().Format(time.DateTime) + " UTC, and is not renewed yet"
	}
	return ""
}

// edgeWarnings returns what works but should not stay as it is.
func (c *Config) edgeWarnings(warn func(format string, args ...any)) {
	e := &c.Edge
	if !c.hasEdge() {
		if keys := c.changed("edge", ""); len(keys) > 0 {
			warn("%s: set, but without edge.listen there is no edge", strings.Join(keys, ", "))
		}
		return
	}
	if openToOthers(e.TLSPrivateKey) {
		warn("edge.tls_private_key: every user of this system can read or change %s: chmod 640 %s", quote(e.TLSPrivateKey), clean(e.TLSPrivateKey))
	}
	if !e.certificate.NotAfter.IsZero() { // else it could not be read, which is said already
		if w := certificateWarning(e.certificate, time.Now()); w != "" {
			warn("edge.tls_certificate: %s: %s", quote(e.TLSCertificate), w)
		}
		if w := e.nameWarning(e.certificate, hostOf(string(c.Homeserver.ServerName))); w != "" {
			warn("edge.tls_certificate: %s: %s", quote(e.TLSCertificate), w)
		}
	}
	for _, spec := range e.Listen {
		host, port, err := net.SplitHostPort(spec)
		if err != nil {
			continue // a unix socket
		}
		addr, _ := netip.ParseAddr(host)
		if addr.IsUnspecified() && !slices.Contains(e.Listen, "0.0.0.0:"+port) {
			warn("edge.listen: %s is IPv6 alone; %q is IPv4, too", quote(spec), ":"+port)
		}
		local := addr.IsLoopback() || host == "localhost"
		switch {
		case e.TLSCertificate == "" && !local:
			warn("edge.listen: %s is reached without TLS, which other servers do not speak: set tls_certificate and tls_private_key, or listen on 127.0.0.1 behind a proxy", quote(spec))
		case e.TLSCertificate == "" && len(e.TrustedProxies) == 0:
			warn("edge.trusted_proxies is empty: without it all that comes through a proxy at %s counts as one address", quote(spec))
		}
	}
}

package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
	"fsbus/sched"
	"fsbus/store"
)

// Config is the configuration file. Load reads, completes and checks it.
//
// The struct is also the schema: the toml tag names the key, range the values
// that a number, a size or a time may have, oneof those that a text may have,
// eg an example for a key whose default is none, fit that a default follows other limits,
// and how far it is lowered for MemoryLimit, and a key tagged reload is applied without a
// restart. config.example.toml shows every key; a test keeps it and this struct the same.
type Config struct {
	// DataDir is the folder of the database and of the spool. It is made if it
	// is missing, but the folder above it is not. Default "/var/lib/fsbus". It
	// holds a database of at most Outbox.MaxDisk, Outbound.SpoolDisk on top for
	// large answers that pass or are kept, and at most 256 MiB of copies of what an
	// admin has dropped. With an edge there are half of SpoolDisk more for answers to
	// other servers, and Edge.RequestBytes and UnverifiedBytes.
	DataDir string `toml:"data_dir"`
	// MemoryLimit is what the whole process may use at worst, in bytes. If Budget
	// adds up to more, limits that stand at their defaults and have a fit tag are
	// lowered; if that does not do, it does not start. Default 64 MiB. A higher limit
	// alone uses no more memory: it makes room for higher limits below.
	MemoryLimit sched.Bytes `toml:"memory_limit" range:"28MiB..1024GiB"`
	// LogLevel is the least serious message that is logged. Default "info".
	// "debug" writes some lines for each request, which an SD card feels.
	LogLevel string `toml:"log_level" oneof:"debug info warn error" reload:"yes"`
	// LogFormat is "text" (default) or "json", one object a line.
	LogFormat string `toml:"log_format" oneof:"text json"`
	// DrainTimeout is how long requests that run may go on after the process
	// was told to end. Default 10 s. The homeserver's new requests wait as
	// long, in the accept backlog.
	DrainTimeout Duration `toml:"drain_timeout" range:"0s..5m"`

	Homeserver HomeserverConfig `toml:"homeserver"`
	Front      FrontConfig      `toml:"front"`
	Outbound   OutboundConfig   `toml:"outbound"`
	Keys       KeysConfig       `toml:"keys"`
	Joins      JoinsConfig      `toml:"joins"`
	Media      MediaConfig      `toml:"media"`
	Outbox     OutboxConfig     `toml:"outbox"`
	Edge       EdgeConfig       `toml:"edge"`
	Federation FederationConfig `toml:"federation"`
	Status     StatusConfig     `toml:"status"`

	file     string         // the configuration's own, absolute; "" if it is none
	followed []string       // limits that fit has set to go with others, with their values
	lowered  []string       // limits that fit has lowered for MemoryLimit, the same
	missing  []*ConfigError // what keeps a part from working
}

// HomeserverConfig says whose traffic it is.
type HomeserverConfig struct {
	// ServerName is server_name of the homeserver's own configuration.
	// Required.
	ServerName matrix.ServerName `toml:"server_name" eg:"\"example.org\""`
	// SigningKeyPath is the file of the homeserver's signing keys, as its own
	// signing_key_path has it. Default "": there is no outbox. The file is read
	// at the start and on each reload; whether there is one needs a restart.
	SigningKeyPath string `toml:"signing_key_path" eg:"\"/etc/matrix-synapse/homeserver.signing.key\"" reload:"yes"`

	keys *Keys // what Load found at SigningKeyPath; nil if it is not set
}

// FrontConfig is the side that the homeserver connects to.
type FrontConfig struct {
	// Listen are the addresses: "unix:/path" or "address:port". Default
	// unix:/run/fsbus/fsbus.sock. Each needs one goroutine and one of
	// MaxConnections.
	Listen []string `toml:"listen"`
	// SecretPath is the file of the secret that the homeserver shows, the same
	// as its worker_replication_secret_path. Space around the secret does not
	// count. Other users must not be able to read the file, nor its group to
	// write it. Either SecretPath or Secret is required.
	SecretPath string `toml:"secret_path" eg:"\"/etc/fsbus/secret\""`
	// Secret is the secret itself.
	Secret Secret `toml:"secret" eg:"\"a long random text\""`
	// SocketMode says who may connect to a unix socket. Default 0660: its
	// owner and its group.
	SocketMode FileMode `toml:"socket_mode"`
	// SocketOwner and SocketGroup are the names or numbers that a unix socket
	// is given. Default "": those of the process. Only root may give a socket
	// away.
	SocketOwner string `toml:"socket_owner" eg:"\"fsbus\""`
	SocketGroup string `toml:"socket_group" eg:"\"matrix-synapse\""`
	// AllowRemote allows TCP addresses that other machines can reach. Default
	// false. The secret and all requests cross that network unencrypted.
	AllowRemote bool `toml:"allow_remote"`
	// MaxConnections is how many requests of the homeserver are held at a
	// time; further ones wait in the accept backlog. Default 4200, as a
	// homeserver sends to all servers of its rooms at once. Each costs 2.5 KiB
	// and a file descriptor.
	MaxConnections int `toml:"max_connections" range:"16..100000" fit:"400"`
	// MaxBody is the size of the largest body that is taken, on disk. Default 50 MiB,
	// which no Synapse exceeds. A transaction over 12.5 MiB is carried through as it is.
	MaxBody sched.Bytes `toml:"max_body" range:"13MiB..4GiB" reload:"yes"`
	// MaxReading is how many of them are being read at a time. Default 24.
	// Each costs 50 KiB.
	MaxReading int `toml:"max_reading" range:"16..1024" fit:"16"`

	secret []byte // Secret, or what Load found at SecretPath
}

// OutboundConfig bounds what is sent to other servers.
type OutboundConfig struct {
	// Workers is how many requests to other servers run at a time. Default
	// 100. Each costs 88 KiB, seven goroutines and two file descriptors.
	Workers int `toml:"workers" range:"8..2048" fit:"16"`
	// UnknownHosts is how many of the workers may wait for servers that have
	// not answered yet. Default 72, of fewer Workers the same part. After a start all
	// servers are such.
	UnknownHosts int `toml:"unknown_hosts" range:"1..2048" reload:"yes" fit:"8"`
	// FailingHosts is how many of the workers may wait for servers whose last
	// attempt failed. Default 16, of fewer Workers the same part.
	FailingHosts int `toml:"failing_hosts" range:"1..2048" reload:"yes" fit:"3"`
	// HostConcurrency is how many requests to one server run at a time.
	// Default 4. A Synapse works on 3 of one origin at a time. Requests for keys
	// do not count, see Keys.NotaryParallel.
	HostConcurrency int `toml:"host_concurrency" range:"1..64" reload:"yes"`
	// HostRate is how many requests to one server start in a second. Default 7,
	// which with HostBurst is what a Synapse takes of one origin without delay: 10
	// within any second. Joins and events count, but do not wait; transactions and
	// requests for keys do neither.
	HostRate float64 `toml:"host_rate" range:"0.1..1000.0" reload:"yes"`
	// HostBurst is how many requests to one server may start at once before
	// HostRate holds. Default 3.
	HostBurst int `toml:"host_burst" range:"1..1000" reload:"yes"`
	// MaxHosts is how many servers are remembered, more than
	// Front.MaxConnections and three times Workers together and 4. Default 5600, or
	// what these two need. Each costs 768 bytes.
	MaxHosts int `toml:"max_hosts" range:"100..1000000" fit:"600"`
	// ConnectTimeout bounds connecting to one address of a server. Default 5 s.
	// A worker is busy for as long with a server that is gone, at most 30 s
	// with all of its addresses.
	ConnectTimeout Duration `toml:"connect_timeout" range:"100ms..1m"`
	// TLSTimeout bounds the TLS handshake. Default 6 s. A worker is busy for
	// as long.
	TLSTimeout Duration `toml:"tls_timeout" range:"100ms..1m"`
	// BodyTimeout is how long a server may pause inside an answer. Default
	// 60 s. A worker is busy for as long.
	BodyTimeout Duration `toml:"body_timeout" range:"1s..10m"`
	// HandshakesPerSecond paces TLS handshakes, all servers together. Default
	// 100. Each costs 1 to 3 ms of a fast core, and several times that of a small
	// board's. One that resumes an earlier session counts for 4 tenths.
	HandshakesPerSecond float64 `toml:"handshakes_per_second" range:"1.0..10000.0"`
	// DNSQueries is how many DNS queries run at a time. Default 16. Each costs
	// a file descriptor.
	DNSQueries int `toml:"dns_queries" range:"1..256"`
	// IdleConnections is how many connections to other servers stay open for
	// the next request, which then needs no handshake. Default 56. Each costs
	// 40 KiB, two goroutines and a file descriptor.
	IdleConnections int `toml:"idle_connections" range:"1..4096" fit:"8"`
	// IdleTimeout is how long such a connection stays open. Default 55 s, since
	// most servers close it after 60 s themselves.
	IdleTimeout Duration `toml:"idle_timeout" range:"1s..10m"`
	// Cache is how many bytes of answers that were used lately are held in memory.
	// Default 256 KiB. An answer that does not fit goes nowhere, so 0 keeps none on
	// disk either.
	Cache sched.Bytes `toml:"cache" range:"0..1GiB" reload:"yes" fit:"64KiB"`
	// CacheEntries is how many answers are kept in the database, CacheDisk how
	// many bytes of it they take. Defaults 10000, at 64 bytes of memory each, and
	// 16 MiB. 0 keeps none.
	CacheEntries int         `toml:"cache_entries" range:"0..1000000" fit:"1000"`
	CacheDisk    sched.Bytes `toml:"cache_disk" range:"0..16GiB"`
	// ProfileFresh is how long a profile answers further requests. Default 5 min.
	// ProfileStale is how long after that it does if its server fails, is left
	// alone or limits our rate. Default 24 h.
	ProfileFresh Duration `toml:"profile_fresh" range:"0s..24h" reload:"yes"`
	ProfileStale Duration `toml:"profile_stale" range:"0s..168h" reload:"yes"`
	// SpoolMemory is how many bytes of requests and answers on their way are
	// held in memory. Default 2 MiB. What is beyond goes to disk.
	SpoolMemory sched.Bytes `toml:"spool_memory" range:"0..1GiB" fit:"256KiB"`
	// SpoolDisk is how many bytes of them are held in DataDir, what Joins and Media
	// keep included. Default 1 GiB: ten joins of the largest rooms.
	SpoolDisk sched.Bytes `toml:"spool_disk" range:"64MiB..1024GiB"`
	// SpoolInline is the size above which one body goes to disk. Default
	// 64 KiB. It counts towards SpoolMemory.
	SpoolInline sched.Bytes `toml:"spool_inline" range:"4KiB..16MiB"`
}

// KeysConfig says how the keys of other servers are fetched, and for whom.
type KeysConfig struct {
	// Notary is whether the bus is a notary for its own homeserver: it then
	// fetches the keys of each server from that server, so that no other one
	// learns with whom the homeserver talks. Default false. The homeserver has to
	// be told, see SynapseConfig.
	Notary bool `toml:"notary"`
	// NotaryName is the server name under which it is one. Default
	// "fsbus.invalid". A request to that name never leaves the bus.
	NotaryName matrix.ServerName `toml:"notary_name"`
	// KeyPath is the file of the key that the notary signs with, in the form of
	// Synapse's signing key. Other users must not be able to read it, nor its group
	// to write it. Default "": notary.key in DataDir, which is made when it is
	// missing.
	KeyPath string `toml:"key_path" eg:"\"/etc/fsbus/notary.key\""`
	// CacheEntries is of how many servers the database has keys, CacheDisk how
	// many bytes of it they take, at most half of Outbox.MaxDisk. Defaults 10000
	// and 24 MiB. A server counts once for each way by which its keys came.
	CacheEntries int         `toml:"cache_entries" range:"1000..1000000"`
	CacheDisk    sched.Bytes `toml:"cache_disk" range:"1MiB..16GiB"`
	// NotaryBatch is for how many servers another notary is asked at a time.
	// Default 50.
	NotaryBatch int `toml:"notary_batch" range:"1..200" reload:"yes"`
	// NotaryParallel is how many such requests to one server run at a time.
	// Default 10.
	NotaryParallel int `toml:"notary_parallel" range:"1..32" reload:"yes"`
	// NotaryWait is how long one request for keys may hold up the answers that
	// need it. Default 5 s. What comes later is kept for the next who asks.
	NotaryWait Duration `toml:"notary_wait" range:"100ms..50s" reload:"yes"`
}

// JoinsConfig says what is done for a homeserver that joins a room.
type JoinsConfig struct {
	// Keep is how long a finished answer to a join, or with the state of a room,
	// is kept for a homeserver that asks again. Default 1 h; 0 keeps none.
	Keep Duration `toml:"keep" range:"0s..24h" reload:"yes"`
	// KeepDisk is how much of Outbound.SpoolDisk they take. Default 512 MiB; 0
	// keeps none.
	KeepDisk sched.Bytes `toml:"keep_disk" range:"0..1024GiB"`
	// PrefetchKeys is whether the keys that the homeserver will want are fetched
	// while the answer to a join still arrives. Default true. For this the answer
	// is looked through once, by one goroutine for all of them.
	PrefetchKeys bool `toml:"prefetch_keys" reload:"yes"`
	// Preflight is how many servers of a joined room are looked up and connected
	// to in a second before there is anything to send. Default 10; 0 is none.
	Preflight int `toml:"preflight" range:"0..1000" reload:"yes"`
}

// maxAnswer returns how large an answer of an endpoint may be, in bytes. What is fixed in a
// Synapse is fixed here; the size of media is an admin's to choose (max_upload_size).
func (c *Config) maxAnswer(ep *matrix.Endpoint) int64 {
	if ep.Kind == matrix.AnswerMedia {
		return int64(min(c.Media.MaxSize, c.Outbound.SpoolDisk/2))
	}
	return ep.MaxResponse
}

// MediaConfig says what is kept of media of other servers, and how large it may be.
type MediaConfig struct {
	// MaxSize is the size of the largest file that is passed on, of another server's to the
	// homeserver and of the homeserver's to another server, on disk, where half of
	// Outbound.SpoolDisk is the most in any case. Default 500 MiB.
	MaxSize sched.Bytes `toml:"max_size" range:"1MiB..1024GiB" reload:"yes"`
	// CacheDisk is how much of Outbound.SpoolDisk downloads and thumbnails take
	// for further requests. Default 0: none are kept, since homeservers keep them
	// themselves. Together with Joins.KeepDisk it is at most Outbound.SpoolDisk.
	CacheDisk sched.Bytes `toml:"cache_disk" range:"0..1024GiB"`
	// CacheFor is how long they are kept. Default 24 h; 0 keeps none.
	CacheFor Duration `toml:"cache_for" range:"0s..168h" reload:"yes"`
}

// OutboxConfig says what the bus takes over from the homeserver and when it
// sends it. It is of use only with Homeserver.SigningKeyPath.
type OutboxConfig struct {
	// AckPace is how many transactions a second are answered: "auto" (default),
	// "off" for all at once, or a number. While a transaction is not answered
	// the homeserver collects what follows for that server, which spares it most
	// of its work. What is stored is on its way regardless.
	AckPace bus.AckPace `toml:"ack_pace" reload:"yes"`
	// AckPaceFloor and AckPaceCeiling are the slowest and the fastest pace of
	// "auto". Defaults 10 and 25.
	AckPaceFloor   int `toml:"ack_pace_floor" range:"1..10000" reload:"yes"`
	AckPaceCeiling int `toml:"ack_pace_ceiling" range:"1..10000" reload:"yes"`
	// AckHurry is by how much faster those are answered behind whose answer an
	// event probably waits. Default 8.
	AckHurry int `toml:"ack_hurry" range:"1..100" reload:"yes"`
	// AckHold is how long an answer is held at most. Default 20 s; a Synapse
	// waits for 60. With N servers waiting, N in this time is the least pace.
	AckHold Duration `toml:"ack_hold" range:"1s..45s" reload:"yes"`
	// AckHeld is how many answers are held at most; beyond it the oldest is
	// given. Default 4000. Each takes one of Front.MaxConnections, and about
	// 16 kB of the homeserver's memory.
	AckHeld int `toml:"ack_held" range:"1..100000" reload:"yes" fit:"300"`
	// AckSmallRoom is up to how many servers a room counts as small; servers of
	// small rooms alone are answered at once. Default 9.
	AckSmallRoom int `toml:"ack_small_room" range:"1..1000" reload:"yes"`
	// AckTalk is for how long after an event of a small room its servers are
	// answered at once. Default 5 min.
	AckTalk Duration `toml:"ack_talk" range:"0s..24h" reload:"yes"`
	// AckPrompt is how many a second are answered at once for these reasons.
	// Default 60.
	AckPrompt int `toml:"ack_prompt" range:"1..10000" reload:"yes"`
	// AckRooms, AckDestinations and AckMemory bound what is remembered of which
	// server is in which room. Defaults 2000, 4500 and 2.25 MiB.
	AckRooms        int         `toml:"ack_rooms" range:"1..1000000" reload:"yes"`
	AckDestinations int         `toml:"ack_destinations" range:"2..1000000" reload:"yes"`
	AckMemory       sched.Bytes `toml:"ack_memory" range:"64KiB..1GiB" reload:"yes"`

	// PresenceWindow, ReceiptWindow and TypingWindow are how long these wait for
	// more, or for something that takes them along. Defaults 10 s, 1 s and
	// 300 ms. All else goes at once.
	PresenceWindow Duration `toml:"presence_window" range:"0s..5m" reload:"yes"`
	ReceiptWindow  Duration `toml:"receipt_window" range:"0s..5m" reload:"yes"`
	TypingWindow   Duration `toml:"typing_window" range:"0s..20s" reload:"yes"`
	// MaxTransactionBytes is the size that a transaction should not exceed.
	// Default 4 MiB, of which two may be in memory.
	MaxTransactionBytes sched.Bytes `toml:"max_transaction_bytes" range:"64KiB..12800KiB" fit:"512KiB"`
	// CatchUpAfter is how old what is pending must be before a server that
	// cannot be reached keeps only the newest events of each room, as a
	// homeserver would. Default 1 h.
	CatchUpAfter Duration `toml:"catch_up_after" range:"1m..168h" reload:"yes"`

	// MaxDestinations is for how many servers something may be pending. Default
	// 4500. Each costs 400 bytes of memory.
	MaxDestinations int `toml:"max_destinations" range:"10..1000000"`
	// MaxDestinationItems and MaxDestinationBytes bound what is pending for one
	// server. Defaults 10000 and 16 MiB. Beyond them, and beyond those below, a
	// transaction is answered with 503, and the homeserver keeps it.
	MaxDestinationItems int         `toml:"max_destination_items" range:"100..1000000"`
	MaxDestinationBytes sched.Bytes `toml:"max_destination_bytes" range:"1MiB..16GiB"`
	// MaxItems bounds what is pending in all. Default 1 million.
	MaxItems int `toml:"max_items" range:"1000..100000000"`
	// MaxDisk bounds the database. Default 512 MiB.
	MaxDisk sched.Bytes `toml:"max_disk" range:"16MiB..1024GiB"`
}

// FederationConfig says which servers may be reached, and how.
type FederationConfig struct {
	// CAFile holds certificates in PEM that are trusted besides the system's.
	// Default "": none.
	CAFile string `toml:"ca_file" eg:"\"/etc/fsbus/ca.pem\""`
	// IPRangeBlocklist are the addresses that are never connected to. Default:
	// Synapse's ip_range_blacklist, which are the networks that are not public;
	// an empty list blocks next to nothing.
	IPRangeBlocklist []string `toml:"ip_range_blocklist" eg:"[\"10.0.0.0/8\", \"fc00::/7\"]"`
	// IPRangeAllowlist are exceptions to IPRangeBlocklist. Default: none.
	IPRangeAllowlist []string `toml:"ip_range_allowlist" eg:"[\"10.1.2.3/32\"]"`
	// Resolve gives servers an address in place of a lookup: "name" or
	// "name:port" = "address" or "address:port". Default: none.
	Resolve map[string]string `toml:"resolve" eg:"{\"hs2.test\" = \"127.0.0.1\"}"`
	// Proxy is an HTTP proxy through which servers are reached, by CONNECT:
	// "http://[user:password@]host[:port]", port 3128 if none is given. Those with an address in Resolve are reached
	// directly. Default "": none, whatever https_proxy says. ProxyDNS has it look up the
	// names of servers too, where this machine cannot; then SRV records are not seen, and
	// IPRangeBlocklist is the proxy's to keep.
	Proxy    Secret `toml:"proxy" eg:"\"http://proxy.lan:3128\""`
	ProxyDNS bool   `toml:"proxy_dns"`
	// ClientTimeout is how long a server may take to answer a transaction, or a request
	// for which Synapse has no time of its own. Default 60 s, as Synapse's client_timeout,
	// which it must not be below.
	ClientTimeout Duration `toml:"client_timeout" range:"10s..10m" reload:"yes"`

	proxy *netx.Proxy
}

// StatusConfig is the page for admins and monitoring.
type StatusConfig struct {
	// Listen is its address, "address:port" or "unix:/path"; "" turns it off.
	// Default 127.0.0.1:8011. It costs up to 13 goroutines.
	Listen string `toml:"listen"`
	// Hosts are the names under which it is shown, besides localhost, addresses and the
	// name in Listen. Default none: a site whose name is made to lead here sees nothing.
	Hosts []string `toml:"hosts" eg:"\"fsbus.lan\""`
	// AllowRemote allows a TCP address that other machines can reach. Default
	// false. The page has no password, and names the servers that are talked
	// to.
	AllowRemote bool `toml:"allow_remote"`
	// Admin is the socket of the commands that show and change the queue,
	// "unix:/path"; a relative path starts at DataDir. "" turns it off. Default
	// "unix:admin.sock". Only its owner may connect. It costs up to nine
	// goroutines.
	Admin string `toml:"admin"`
}

// DefaultConfig returns what holds for keys that are not set. It lacks what
// has no default: the server name and the secret.
func DefaultConfig() Config {
	core := bus.Default()
	return Config{
		DataDir:      "/var/lib/fsbus",
		MemoryLimit:  64 * sched.MiB,
		LogLevel:     "info",
		LogFormat:    "text",
		DrainTimeout: Duration(10 * time.Second),
		Front: FrontConfig{
			Listen:         []string{"unix:/run/fsbus/fsbus.sock"},
			SocketMode:     0o660,
			MaxConnections: int(core.MaxRequests),
			MaxBody:        50 * sched.MiB,
			MaxReading:     24,
		},
		Outbound: OutboundConfig{
			Workers:             int(core.Workers),
			UnknownHosts:        int(core.Unknown),
			FailingHosts:        int(core.Failing),
			HostConcurrency:     int(core.HostConcurrency),
			HostRate:            core.HostRate,
			HostBurst:           int(core.HostBurst),
			MaxHosts:            int(core.MaxHosts),
			ConnectTimeout:      Duration(5 * time.Second),
			TLSTimeout:          Duration(6 * time.Second),
			BodyTimeout:         Duration(60 * time.Second),
			HandshakesPerSecond: 100,
			DNSQueries:          16,
			IdleConnections:     56,
			IdleTimeout:         Duration(55 * time.Second),
			Cache:               core.CacheBytes,
			CacheEntries:        int(core.KnownAnswers),
			CacheDisk:           store.DefaultMaxAnswerBytes,
			ProfileFresh:        Duration(core.ProfileFresh),
			ProfileStale:        Duration(core.ProfileStale),
			SpoolMemory:         2 * sched.MiB,
			SpoolDisk:           sched.GiB,
			SpoolInline:         64 * sched.KiB,
		},
		Keys: KeysConfig{
			NotaryName:     "fsbus.invalid",
			CacheEntries:   store.DefaultMaxKeys,
			CacheDisk:      store.DefaultMaxKeyBytes,
			NotaryBatch:    int(core.Keys.Batch),
			NotaryParallel: int(core.Keys.Parallel),
			NotaryWait:     Duration(core.Keys.Wait),
		},
		Joins: JoinsConfig{
			Keep:         Duration(core.KeepFor),
			KeepDisk:     core.KeepBytes,
			PrefetchKeys: true,
			Preflight:    int(core.Preflight),
		},
		Media:  MediaConfig{MaxSize: 500 * sched.MiB, CacheDisk: core.MediaBytes, CacheFor: Duration(core.MediaFor)},
		Outbox: defaultOutbox(),
		Edge:   defaultEdge(),
		Federation: FederationConfig{
			ClientTimeout:    Duration(core.ClientTimeout),
			IPRangeBlocklist: netx.DefaultBlocklist(),
			IPRangeAllowlist: []string{},
			Resolve:          map[string]string{},
		},
		Status: StatusConfig{Hosts: []string{}, Listen: "127.0.0.1:8011", Admin: "unix:admin.sock"},
	}
}

// maxConfigFile is far more than a configuration has, so that a wrong path
// does not fill the memory.
const maxConfigFile = sched.MiB

// Load reads the configuration file at path, completes it from DefaultConfig,
// makes the paths in it absolute (a relative one starts at the file's folder),
// reads the files that it names, and checks everything. It changes nothing on
// disk. Its error consists of *ConfigError: all that is wrong, joined, in the
// order of their lines.
func Load(path string) (*Config, error) {
	abs, text, err := readConfig(path)
	if err != nil {
		return nil, err
	}
	c, err := parseConfig(path, filepath.Dir(abs), text)
	if err == nil {
		c.file = abs
	}
	return c, err
}

// LoadAddresses is Load for whoever wants to talk to a bus that runs already. Of what it
// returns only DataDir and Status count: nothing else is checked, and no file is read
// beside the configuration, as that user need not be allowed to read the secret.
func LoadAddresses(path string) (*Config, error) {
	abs, text, err := readConfig(path)
	if err != nil {
		return nil, err
	}
	return parse(path, filepath.Dir(abs), text, (*checker).checkAddresses)
}

// readConfig reads the configuration file at path, and returns its absolute path too.
func readConfig(path string) (abs, text string, err error) {
	if abs, err = filepath.Abs(path); err != nil {
		return "", "", &ConfigError{File: path, Problem: reason(err), Want: "the path of a configuration file"}
	}
	b, err := readSmall(abs, maxConfigFile)
	if err != nil {
		return "", "", &ConfigError{File: path, Problem: reason(err), Want: "a configuration file, such as config.example.toml"}
	}
	return abs, string(b), nil
}

// parseConfig is Load for the text of a file that lies in dir. Errors call the
// file name.
func parseConfig(name, dir, text string) (*Config, error) {
	return parse(name, dir, text, (*checker).check)
}

// parse reads a text and has it checked.
func parse(name, dir, text string, check func(*checker)) (*Config, error) {
	doc, err := parseDocument(text)
	if err != nil {
		return nil, syntaxError(name, text, err)
	}
	c := DefaultConfig()
	k := &checker{file: name, dir: dir, doc: doc, c: &c}
	k.decode()
	check(k)
	if err := k.err(); err != nil {
		return nil, err
	}
	return &c, nil
}

// A ConfigError is one mistake in the configuration.
type ConfigError struct {
	File    string // as it was given
	Line    int    // of the key, or where it would belong; 0 if none is to blame
	Key     string // "section.key"; "" if none is to blame
	Problem string
	Want    string // what would be right
}

// Error returns the mistake on one line: "FILE:LINE: key: problem; want ...".
func (e *ConfigError) Error() string {
	s := e.File
	if e.Line > 0 {
		s += ":" + strconv.Itoa(e.Line)
	}
	if e.Key != "" {
		s += ": " + e.Key
	}
	s += ": " + e.Problem
	if e.Want != "" {
		s += "; want " + e.Want
	}
	return s
}

func defaultOutbox() OutboxConfig {
	o := bus.DefaultOutbox()
	p := &o.Pace
	return OutboxConfig{
		AckPace:             p.Ack,
		AckPaceFloor:        int(p.Floor),
		AckPaceCeiling:      int(p.Ceiling),
		AckHurry:            int(p.Hurry),
		AckHold:             Duration(p.Hold),
		AckHeld:             int(p.MaxHeld),
		AckSmallRoom:        int(p.SmallRoom),
		AckTalk:             Duration(p.Talk),
		AckPrompt:           int(p.Prompt),
		AckRooms:            int(p.MaxRooms),
		AckDestinations:     int(p.MaxDestinations),
		AckMemory:           p.MaxBytes,
		PresenceWindow:      Duration(o.PresenceWindow),
		ReceiptWindow:       Duration(o.ReceiptWindow),
		TypingWindow:        Duration(o.TypingWindow),
		MaxTransactionBytes: o.MaxTransaction,
		CatchUpAfter:        Duration(o.CatchUpAfter),
		MaxDestinations:     int(o.MaxQueues),
		MaxDestinationItems: store.DefaultMaxDestItems,
		MaxDestinationBytes: store.DefaultMaxDestBytes,
		MaxItems:            store.DefaultMaxItems,
		MaxDisk:             store.DefaultMaxFileBytes,
	}
}

// core returns the limits of the outbox in the core.
func (o *OutboxConfig) core() bus.OutboxConfig {
	return bus.OutboxConfig{
		MaxQueues:      int32(o.MaxDestinations),
		MaxTransaction: o.MaxTransactionBytes,
		PresenceWindow: time.Duration(o.PresenceWindow),
		ReceiptWindow:  time.Duration(o.ReceiptWindow),
		TypingWindow:   time.Duration(o.TypingWindow),
		CatchUpAfter:   time.Duration(o.CatchUpAfter),
		Pace: bus.PaceConfig{
			Ack: o.AckPace, Floor: int32(o.AckPaceFloor), Ceiling: int32(o.AckPaceCeiling), Hurry: int32(o.AckHurry),
			Hold: time.Duration(o.AckHold), MaxHeld: int32(o.AckHeld),
			SmallRoom: int32(o.AckSmallRoom), Talk: time.Duration(o.AckTalk), Prompt: int32(o.AckPrompt),
			MaxRooms: int32(o.AckRooms), MaxDestinations: int32(o.AckDestinations), MaxBytes: o.AckMemory,
		},
	}
}

// hasOutbox reports whether transactions are taken over.
func (c *Config) hasOutbox() bool { return c.Homeserver.keys != nil }

// Core returns the limits of the core.
func (c *Config) Core() bus.Config {
	core := c.coreWithoutOutbox()
	if c.hasOutbox() {
		core.Outbox = c.Outbox.core()
	}
	return core
}

func (c *Config) coreWithoutOutbox() bus.Config {
	o := &c.Outbound
	return bus.Config{
		Workers:         sched.Slots(o.Workers),
		Unknown:         sched.Slots(o.UnknownHosts),
		Failing:         sched.Slots(o.FailingHosts),
		HostConcurrency: int32(o.HostConcurrency),
		ClientTimeout:   time.Duration(c.Federation.ClientTimeout),
		HostRate:        o.HostRate,
		HostBurst:       int32(o.HostBurst),
		MaxRequests:     int32(c.Front.MaxConnections),
		MaxHosts:        int32(o.MaxHosts),
		CacheBytes:      o.Cache,
		KnownAnswers:    int32(o.CacheEntries),
		ProfileFresh:    time.Duration(o.ProfileFresh),
		ProfileStale:    time.Duration(o.ProfileStale),
		KeepFor:         time.Duration(c.Joins.Keep),
		KeepBytes:       c.Joins.KeepDisk,
		MediaFor:        time.Duration(c.Media.CacheFor),
		MediaBytes:      c.Media.CacheDisk,
		Preflight:       float64(c.Joins.Preflight),
		Keys:            c.Keys.core(),
	}
}

// core returns the limits of the key desk in the core.
func (k *KeysConfig) core() bus.KeysConfig {
	core := bus.KeysConfig{Batch: int32(k.NotaryBatch), Parallel: int32(k.NotaryParallel), Wait: time.Duration(k.NotaryWait), MaxWants: maxKeyWants}
	if k.Notary {
		core.OwnName = k.NotaryName
	}
	return core
}

// level returns LogLevel as slog has it.
func (c *Config) level() slog.Level {
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		panic(fmt.Sprintf("node: a log level that was not checked: %v", err))
	}
	return l
}

// adminSocket returns the path of Status.Admin, "" for none. It is not made
// absolute once and for all like other paths: it moves with DataDir.
func (c *Config) adminSocket() string {
	path := strings.TrimPrefix(c.Status.Admin, "unix:")
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(c.DataDir, path)
}

// frontListenOptions returns how the addresses of Front.Listen are opened.
func (c *Config) frontListenOptions() netx.ListenOptions {
	f := &c.Front
	return netx.ListenOptions{Mode: fs.FileMode(f.SocketMode), Owner: f.SocketOwner, Group: f.SocketGroup, AllowRemote: f.AllowRemote}
}

// Duration is a time in the configuration, written with its unit: "500ms",
// "30s", "1m30s". It is never negative.
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler. It refuses a number
// without a unit, and a negative one.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return err
	}
	if v < 0 || string(text) == "0" {
		return fmt.Errorf("%q: not a time with a unit", text)
	}
	*d = Duration(v)
	return nil
}

// String returns d as in the configuration.
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// FileMode is the mode of a file in the configuration, written as chmod has
// it: "0660".
type FileMode fs.FileMode

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *FileMode) UnmarshalText(text []byte) error {
	v, err := strconv.ParseUint(string(text), 8, 32)
	if err != nil {
		return err
	}
	if v > 0o777 {
		return fmt.Errorf("%q: more than permission bits", text)
	}
	*m = FileMode(v)
	return nil
}

// String returns m as in the configuration.
func (m FileMode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// Secret is a text that is not printed.
type Secret string

// String returns a stand-in, so that no log line or error shows the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "(hidden)"
}

// GoString is String, for %#v.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// MarshalText is String, for encoders such as slog's.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// errTooLarge and errNotRegular say why a file is not read.
var (
	errTooLarge   = errors.New("is too large")
	errNotRegular = errors.New("is not a regular file")
)

// readSmall reads a regular file of at most limit bytes. A device or a pipe
// might never end.
func readSmall(path string, limit sched.Bytes) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, errNotRegular
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && sched.Bytes(len(b)) > limit {
		err = fmt.Errorf("%w: more than %v", errTooLarge, limit)
	}
	return b, err
}

// reason returns what went wrong with a file, without the operation and the
// path, which the error's reader knows.
func reason(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	return err.Error()
}

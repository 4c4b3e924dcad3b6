package matrix

import (
	"slices"
	"strings"
	"time"
)

// Sharing says whether callers that ask for the same may share one answer. The
// zero value is ShareNever.
type Sharing uint8

const (
	// ShareNever: every request goes upstream on its own.
	ShareNever Sharing = iota
	// ShareSame: requests to the same server with the same method, target and
	// body share one upstream call while it runs.
	ShareSame
)

// JoinStep is a request's part in joining a room. The zero value is none.
type JoinStep uint8

// The steps, in the order in which they come.
const (
	JoinMake   JoinStep = 1 + iota // asks for the template of the join event
	JoinSend                       // sends the event, and gets the state
	JoinResync                     // fetches what the answer to that left out
)

// AnswerKind is what an answer is, to the bus. The zero value is nothing special.
type AnswerKind uint8

// The kinds.
const (
	AnswerProfile    AnswerKind = 1 + iota // its age is configured; one field of it may be asked for
	AnswerServerKeys                       // says itself how long it is good for
	AnswerKeyQuery                         // is put together from what different queries brought
	AnswerMedia                            // may be kept on disk, if that is configured
)

// Limits that most endpoints have in common.
const (
	// DefaultTimeout is how long Synapse waits for an answer's headers unless a
	// call says otherwise (config/federation.py).
	DefaultTimeout = 60 * time.Second
	// bodyTimeout is how long Synapse waits for an answer's body once it has the
	// headers (http/matrixfederationclient.py).
	bodyTimeout = 60 * time.Second
	// tries is how often Synapse sends a request that is not answered in time,
	// if the call has no time-out of its own (config/federation.py).
	tries = 4
	// MaxRequestBody is the largest body in bytes that a Synapse takes in: 200
	// events of the largest size (app/_base.py, max_request_body_size).
	MaxRequestBody = 200 * 65536
	// MaxResponseBody is the largest answer in bytes that Synapse reads
	// (http/matrixfederationclient.py).
	MaxResponseBody = 100 << 20
	// MaxStateBody is the same for send_join and state, which Synapse parses as
	// they arrive (federation/transport/client.py).
	MaxStateBody = 500 << 20
)

// Endpoint is what the bus knows of one endpoint: one row of the endpoint table.
// It is the same row for both directions, from our homeserver and to it.
type Endpoint struct {
	// Name is unique in the table and never changes: metrics are labelled with it.
	Name string
	// Method is the HTTP method. The row for unknown requests that are not GETs
	// has none.
	Method string
	// Paths are the paths by which the endpoint goes, the preferred one first. A
	// segment "*" stands for any one segment.
	Paths []string
	// Class is the priority class; for "send" that of a transaction with PDUs,
	// see SendClass.
	Class Class
	// Timeout is the time after which the caller, Synapse, gives up waiting for
	// the answer's headers. An answer that comes later is for nobody.
	Timeout time.Duration
	// Share says whether equal requests may share one running upstream call.
	Share Sharing
	// CacheFor is how long a 200 may answer further equal requests, MissingFor a
	// 404; 0 is not at all. Other answers are never kept.
	CacheFor, MissingFor time.Duration
	// StaleFor is how long past CacheFor an old 200 may still be used when the
	// server cannot be reached, or wants to be left alone.
	StaleFor time.Duration
	// Durable: what may be used again is kept over a restart.
	Durable bool
	// Keep: a 200 of any size stays at hand for a while, for a caller that gave up,
	// or has lost it, and asks once more.
	Keep bool
	// Whole is how long the caller gives the whole body once it has the answer's
	// headers. The headers of a large one are held back until the rest is sure to
	// follow in time. 0: they are passed on at once.
	Whole time.Duration
	// Tries is how often the caller comes with the same request when it is not
	// answered in time; 0 is once.
	Tries int32
	// RunOn is how long the upstream call goes on, from its start, when nobody
	// waits for it any more, as a caller that comes again may still want it.
	RunOn time.Duration
	// Join is the part that the request plays in joining a room. RoomID finds the
	// room.
	Join JoinStep
	// Kind tells apart what the bus has to look into.
	Kind AnswerKind
	// MaxRequest and MaxResponse bound the bodies, in bytes.
	MaxRequest, MaxResponse int64
	// Once: a second copy of the request does harm. It is never shared, cached or
	// repeated, nor sent again on another connection.
	Once bool
	// CancelSafe: the upstream call may be broken off once nobody waits for the
	// answer. False where the request changes something at the other end, whose
	// fate would then be unknown.
	CancelSafe bool
	// Repeat: the request may be sent again, as after a 429, while the caller
	// still waits.
	Repeat bool
	// IgnoresBackoff: Synapse makes this call even to a server that it has marked
	// as down, and marks none as down because of it.
	IgnoresBackoff bool
	// Unsigned: the endpoint works without an X-Matrix signature.
	Unsigned bool
}

// The prefixes of the table's paths (api/urls.py).
const (
	keyV2    = "/_matrix/key/v2"
	fedV1    = "/_matrix/federation/v1"
	fedV2    = "/_matrix/federation/v2"
	unstable = "/_matrix/federation/unstable"
	mediaV3  = "/_matrix/media/v3"
	mediaV1  = "/_matrix/media/v1"
	mediaR0  = "/_matrix/media/r0"
	policyV1 = "/_matrix/policy/v1"
)

// endpoints is the endpoint table. A limit or timeout that is not given is the
// default. Ages are chosen so that nobody can tell the answer from a fresh one by
// anything but luck; where none is given, the reason stands beside it unless the
// request changes something.
var endpoints = fillIn([]Endpoint{
	// Discovery and keys.
	{
		Name: "well_known", Method: "GET",
		Paths: []string{"/.well-known/matrix/server"},
		Class: ClassKey, Share: ShareSame,
		CacheFor:    WellKnownDefault, // unless its headers say otherwise: WellKnownLifetime
		MaxResponse: MaxWellKnown,
		CancelSafe:  true, Repeat: true, Unsigned: true,
	},
	{
		Name: "version", Method: "GET",
		Paths: []string{fedV1 + "/version"},
		Class: ClassLookup, Share: ShareSame, CacheFor: time.Hour, Durable: true,
		CancelSafe: true, Repeat: true, Unsigned: true,
	},
	{
		// The object itself says how long it is good for, see
		// ServerKeyObject.RefreshAt.
		Name: "server_keys", Method: "GET",
		Paths: []string{keyV2 + "/server", keyV2 + "/server/*"},
		Class: ClassKey, Timeout: 10 * time.Second, Share: ShareSame, Kind: AnswerServerKeys, Durable: true,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true, Unsigned: true,
	},
	{
		// Not cached as a whole: what is in an answer has a lifetime key by key.
		Name: "key_query", Method: "POST",
		Paths: []string{keyV2 + "/query"},
		Class: ClassKey, Share: ShareSame, Kind: AnswerKeyQuery,
		CancelSafe: true, Repeat: true, Unsigned: true,
	},
	{
		Name: "key_query_server", Method: "GET",
		Paths: []string{keyV2 + "/query/*", keyV2 + "/query/*/*"},
		Class: ClassKey, Share: ShareSame,
		CancelSafe: true, Repeat: true, Unsigned: true,
	},

	// Transactions and events.
	{
		// Its receiver answers a second copy as the first (S2S "Transactions").
		Name: "send", Method: "PUT",
		Paths: []string{fedV1 + "/send/*"},
		Class: ClassEvent, Repeat: true,
	},
	{
		Name: "event_auth", Method: "GET",
		Paths: []string{fedV1 + "/event_auth/*/*"},
		Class: ClassEvent, Share: ShareSame, CacheFor: 5 * time.Minute, Join: JoinResync,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "backfill", Method: "GET",
		Paths: []string{fedV1 + "/backfill/*"},
		Class: ClassState, Share: ShareSame, CacheFor: 30 * time.Second,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "get_missing_events", Method: "POST",
		Paths: []string{fedV1 + "/get_missing_events/*"},
		Class: ClassEvent, Share: ShareSame, CacheFor: 10 * time.Second,
		CancelSafe: true, Repeat: true,
	},
	{
		// The state at an event does not change.
		Name: "state", Method: "GET",
		Paths: []string{fedV1 + "/state/*"},
		Class: ClassState, Timeout: 600 * time.Second, Share: ShareSame,
		Keep: true, Whole: 10 * time.Minute, RunOn: 11 * time.Minute, Join: JoinResync,
		MaxResponse: MaxStateBody,
		CancelSafe:  true, Repeat: true,
	},
	{
		Name: "state_ids", Method: "GET",
		Paths: []string{fedV1 + "/state_ids/*"},
		Class: ClassState, Share: ShareSame, CacheFor: 10 * time.Minute, Join: JoinResync,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "event", Method: "GET",
		Paths: []string{fedV1 + "/event/*"},
		Class: ClassEvent, Share: ShareSame, CacheFor: 10 * time.Minute, MissingFor: 30 * time.Second,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "timestamp_to_event", Method: "GET",
		Paths: []string{fedV1 + "/timestamp_to_event/*"},
		Class: ClassLookup, Share: ShareSame, CacheFor: time.Minute,
		CancelSafe: true, Repeat: true,
	},
	{
		// The extremities are asked for because they have changed.
		Name: "extremities", Method: "GET",
		Paths: []string{unstable + "/org.matrix.msc4370/extremities/*"},
		Class: ClassState, Share: ShareSame,
		CancelSafe: true, Repeat: true,
	},

	// Memberships. The make_ calls return a template that is out of date with the
	// room's next event.
	{
		Name: "make_join", Method: "GET",
		Paths: []string{fedV1 + "/make_join/*/*"},
		Class: ClassJoin, Timeout: 20 * time.Second, Share: ShareSame, Join: JoinMake,
		CancelSafe: true, Repeat: true,
	},
	{
		// Shared because Synapse sends it again after its time-out, and the first
		// call may be about to be answered.
		Name: "send_join", Method: "PUT",
		Paths: []string{fedV2 + "/send_join/*/*", fedV1 + "/send_join/*/*"},
		Class: ClassJoin, Share: ShareSame, MaxResponse: MaxStateBody,
		Keep: true, Whole: bodyTimeout, Tries: tries, RunOn: 15 * time.Minute, Join: JoinSend,
		Repeat: true,
	},
	{
		Name: "make_knock", Method: "GET",
		Paths: []string{fedV1 + "/make_knock/*/*"},
		Class: ClassJoin, Timeout: 20 * time.Second, Share: ShareSame,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "send_knock", Method: "PUT",
		Paths: []string{fedV1 + "/send_knock/*/*"},
		Class: ClassJoin, Repeat: true,
	},
	{
		Name: "invite", Method: "PUT",
		Paths: []string{fedV2 + "/invite/*/*", fedV1 + "/invite/*/*"},
		Class: ClassJoin, Share: ShareSame,
		Repeat: true, IgnoresBackoff: true,
	},
	{
		Name: "make_leave", Method: "GET",
		Paths: []string{fedV1 + "/make_leave/*/*"},
		Class: ClassJoin, Timeout: 20 * time.Second, Share: ShareSame,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true,
	},
	{
		Name: "send_leave", Method: "PUT",
		Paths: []string{fedV2 + "/send_leave/*/*", fedV1 + "/send_leave/*/*"},
		Class: ClassJoin, Repeat: true, IgnoresBackoff: true,
	},
	{
		Name: "exchange_third_party_invite", Method: "PUT",
		Paths: []string{fedV1 + "/exchange_third_party_invite/*"},
		Class: ClassJoin, Repeat: true,
	},
	{
		// From an identity server, which signs nothing. Each copy sends invites.
		Name: "3pid_onbind", Method: "PUT",
		Paths: []string{fedV1 + "/3pid/onbind"},
		Class: ClassJoin, Once: true, Unsigned: true,
	},
	{
		// Asked before a join, hence its class.
		Name: "complexity", Method: "GET",
		Paths: []string{unstable + "/rooms/*/complexity"},
		Class: ClassJoin, Share: ShareSame, CacheFor: 5 * time.Minute, Durable: true,
		CancelSafe: true, Repeat: true,
	},
	{
		// A user's message waits for it. Equal bodies only: an event is signed once.
		Name: "policy_sign", Method: "POST",
		Paths: []string{policyV1 + "/sign", "/_matrix/policy/unstable/org.matrix.msc4284/sign"},
		Class: ClassJoin, Timeout: 30 * time.Second, Share: ShareSame,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true,
	},

	// Queries.
	{
		Name: "query_directory", Method: "GET",
		Paths: []string{fedV1 + "/query/directory"},
		Class: ClassJoin, Timeout: 10 * time.Second, Share: ShareSame, CacheFor: time.Minute,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true,
	},
	{
		Name: "query_profile", Method: "GET",
		Paths: []string{fedV1 + "/query/profile"},
		Class: ClassLookup, Timeout: 10 * time.Second, Share: ShareSame,
		CacheFor: 5 * time.Minute, StaleFor: 24 * time.Hour, MissingFor: 30 * time.Second,
		Durable: true, Kind: AnswerProfile,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true,
	},
	{
		// Of unknown meaning, so of unknown lifetime.
		Name: "query", Method: "GET",
		Paths: []string{fedV1 + "/query/*"},
		Class: ClassLookup, Timeout: 10 * time.Second, Share: ShareSame,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "account_status", Method: "POST",
		Paths: []string{
			unstable + "/org.matrix.msc3720/account_status",
			unstable + "/org.matrix.msc3720/query/account_status",
		},
		Class: ClassLookup, Share: ShareSame, CacheFor: time.Minute,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "public_rooms", Method: "GET",
		Paths: []string{fedV1 + "/publicRooms"},
		Class: ClassLookup, Share: ShareSame, CacheFor: 30 * time.Second, StaleFor: time.Hour,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true,
	},
	{
		Name: "public_rooms_search", Method: "POST",
		Paths: []string{fedV1 + "/publicRooms"},
		Class: ClassLookup, Share: ShareSame, CacheFor: 30 * time.Second,
		CancelSafe: true, Repeat: true, IgnoresBackoff: true,
	},
	{
		Name: "hierarchy", Method: "GET",
		Paths: []string{fedV1 + "/hierarchy/*", unstable + "/org.matrix.msc2946/hierarchy/*"},
		Class: ClassLookup, Share: ShareSame, CacheFor: 5 * time.Minute, StaleFor: time.Hour, Durable: true,
		CancelSafe: true, Repeat: true,
	},
	{
		// The query holds an access token; the answer is for its bearer.
		Name: "openid_userinfo", Method: "GET",
		Paths: []string{fedV1 + "/openid/userinfo"},
		Class: ClassLookup, CancelSafe: true, Repeat: true, Unsigned: true,
	},

	// Devices. Asked because a device list has changed, so never from a cache.
	{
		Name: "user_keys_query", Method: "POST",
		Paths: []string{fedV1 + "/user/keys/query"},
		Class: ClassDevice, Timeout: 10 * time.Second, Share: ShareSame,
		CancelSafe: true, Repeat: true,
	},
	{
		// Each answer uses up one-time keys (S2S "End-to-End Encryption").
		Name: "user_keys_claim", Method: "POST",
		Paths: []string{fedV1 + "/user/keys/claim", unstable + "/user/keys/claim"},
		Class: ClassDevice, Timeout: 10 * time.Second, Once: true,
	},
	{
		Name: "user_devices", Method: "GET",
		Paths: []string{fedV1 + "/user/devices/*"},
		Class: ClassDevice, Timeout: 30 * time.Second, Share: ShareSame,
		CancelSafe: true, Repeat: true,
	},

	// Media. Its content never changes, but Synapse keeps what it has fetched.
	// Where it is to be kept nevertheless, an answer that is a Location must not
	// be (S2S "Content Repository").
	{
		Name: "media_download", Method: "GET",
		Paths: []string{fedV1 + "/media/download/*"},
		Class: ClassLookup, Share: ShareSame, Kind: AnswerMedia,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "media_thumbnail", Method: "GET",
		Paths: []string{fedV1 + "/media/thumbnail/*"},
		Class: ClassLookup, Share: ShareSame, Kind: AnswerMedia,
		CancelSafe: true, Repeat: true,
	},
	{
		Name: "media_download_legacy", Method: "GET",
		Paths: []string{
			mediaV3 + "/download/*/*", mediaV3 + "/download/*/*/*",
			mediaR0 + "/download/*/*", mediaR0 + "/download/*/*/*",
			mediaV1 + "/download/*/*", mediaV1 + "/download/*/*/*",
		},
		Class: ClassLookup, Share: ShareSame, Kind: AnswerMedia,
		CancelSafe: true, Repeat: true, Unsigned: true,
	},
	{
		Name: "media_thumbnail_legacy", Method: "GET",
		Paths: []string{mediaV3 + "/thumbnail/*/*", mediaR0 + "/thumbnail/*/*", mediaV1 + "/thumbnail/*/*"},
		Class: ClassLookup, Share: ShareSame, Kind: AnswerMedia,
		CancelSafe: true, Repeat: true, Unsigned: true,
	},
})

// others are the rows for requests that the table does not have: GETs, and all
// the rest, of which nothing good may be assumed.
var others = fillIn([]Endpoint{
	{Name: "other_get", Method: "GET", Class: ClassLookup, CancelSafe: true, Repeat: true},
	{Name: "other", Class: ClassLookup},
	{Name: "other_get_unsigned", Method: "GET", Class: ClassLookup, CancelSafe: true, Repeat: true, Unsigned: true},
	{Name: "other_unsigned", Class: ClassLookup, Unsigned: true},
})

// Unknown reports whether e is a row for requests that the table does not have.
func (e *Endpoint) Unknown() bool { return e.Class == ClassLookup && len(e.Paths) == 0 }

// WithoutSignature returns the row of a request that nobody has signed, for which Match
// gave e: an Unknown one may be such a request.
func (e *Endpoint) WithoutSignature() *Endpoint {
	switch e {
	case &others[0]:
		return &others[2]
	case &others[1]:
		return &others[3]
	}
	return e
}

// Methods returns the methods for which the table has the path of a target, in its order;
// none if it does not have the path.
func Methods(target string) (methods []string) {
	if n := node(target); n != nil {
		for _, e := range n.rows {
			methods = append(methods, e.Method)
		}
	}
	return methods
}

// fillIn sets the limits that a row leaves to the default.
func fillIn(rows []Endpoint) []Endpoint {
	for i := range rows {
		r := &rows[i]
		if r.Timeout == 0 {
			r.Timeout = DefaultTimeout
		}
		if r.MaxRequest == 0 {
			r.MaxRequest = MaxRequestBody
		}
		if r.MaxResponse == 0 {
			r.MaxResponse = MaxResponseBody
		}
	}
	return rows
}

// Match returns the row of a request by its method and its target, path and query
// as they stand on the request line. Nothing is decoded: %2F is part of its segment.
// A slash at the end makes no difference. A request that the table does not have
// gets the row "other_get" or "other"; the result is never nil. It points into the
// table and is not to be changed.
func Match(method, target string) *Endpoint {
	if n := node(target); n != nil {
		for _, e := range n.rows {
			if e.Method == method {
				return e
			}
		}
	}
	if method == "GET" {
		return &others[0]
	}
	return &others[1]
}

// node returns where the path of a target ends in the index of the table, nil if it is not
// there.
func node(target string) *pathNode {
	path, _, _ := strings.Cut(target, "?")
	rest, ok := strings.CutPrefix(strings.TrimSuffix(path, "/"), "/")
	n := &paths
	for ok && n != nil {
		var segment string
		segment, rest, ok = strings.Cut(rest, "/")
		n = n.next(segment)
	}
	if n == &paths {
		return nil
	}
	return n
}

// All returns a copy of the table and of the rows for unknown requests.
func All() []Endpoint {
	rows := slices.Concat(endpoints, others)
	for i := range rows {
		rows[i].Paths = slices.Clone(rows[i].Paths)
	}
	return rows
}

// pathNode is a path's segment in the index of the table.
type pathNode struct {
	named map[string]*pathNode // by the segment that follows
	any   *pathNode            // for "*"; a named segment goes before it
	rows  []*Endpoint          // whose path ends here, one for each method
}

// paths is the root of the index.
var paths = indexPaths(endpoints)

func indexPaths(rows []Endpoint) pathNode {
	var root pathNode
	for i := range rows {
		for _, path := range rows[i].Paths {
			n := &root
			for segment := range strings.SplitSeq(path[1:], "/") {
				n = n.add(segment)
			}
			n.rows = append(n.rows, &rows[i])
		}
	}
	return root
}

func (n *pathNode) add(segment string) *pathNode {
	if segment == "*" {
		if n.any == nil {
			n.any = new(pathNode)
		}
		return n.any
	}
	if n.named == nil {
		n.named = make(map[string]*pathNode)
	}
	if n.named[segment] == nil {
		n.named[segment] = new(pathNode)
	}
	return n.named[segment]
}

func (n *pathNode) next(segment string) *pathNode {
	if m := n.named[segment]; m != nil {
		return m
	}
	return n.any
}

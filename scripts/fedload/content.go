package fedload

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"fsbus/bus/matrix"
)

type object = map[string]any

// canonical returns v as canonical JSON. It panics if v has none: what is sent
// here is made by the program itself.
func canonical(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err == nil {
		b, err = matrix.CanonicalJSON(b)
	}
	if err != nil {
		panic(fmt.Sprintf("fedload: not JSON to send: %v", err))
	}
	return b
}

// Lookup asks for the profile of a user of the destination, as Synapse does when
// a client opens a list of users.
func Lookup(destination matrix.ServerName, localpart string) *Request {
	user := url.QueryEscape("@" + localpart + ":" + string(destination))
	return &Request{
		Destination: destination,
		Method:      http.MethodGet,
		Target:      "/_matrix/federation/v1/query/profile?user_id=" + user,
	}
}

// LookupField asks for one field of a profile, "displayname" or "avatar_url", as
// Synapse does when a client asks for that alone.
func LookupField(destination matrix.ServerName, localpart, field string) *Request {
	r := Lookup(destination, localpart)
	r.Target += "&field=" + url.QueryEscape(field)
	return r
}

// KeyWanted is one key that a KeyQuery asks for.
type KeyWanted struct {
	Server matrix.ServerName
	ID     string // such as "ed25519:a_1"
	// Until is when the answer must still be valid, Unix time in milliseconds
	// (minimum_valid_until_ts).
	Until int64
}

// KeyQuery asks a notary for keys, as Synapse does (crypto/keyring.py).
func KeyQuery(notary matrix.ServerName, keys ...KeyWanted) *Request {
	servers := make(map[matrix.ServerName]object)
	for _, k := range keys {
		if servers[k.Server] == nil {
			servers[k.Server] = object{}
		}
		servers[k.Server][k.ID] = object{"minimum_valid_until_ts": k.Until}
	}
	return &Request{
		Destination: notary,
		Method:      http.MethodPost,
		Target:      "/_matrix/key/v2/query",
		Body:        canonical(object{"server_keys": servers}),
	}
}

// Media asks for a file of size bytes, which package sim has under that name.
func Media(destination matrix.ServerName, size int64) *Request {
	return &Request{
		Destination: destination,
		Method:      http.MethodGet,
		Target:      "/_matrix/federation/v1/media/download/bytes-" + strconv.FormatInt(size, 10),
	}
}

// Send is a transaction of PDUs and EDUs, each a JSON object; there may be none
// of either. It panics on what is not JSON.
func Send(origin, destination matrix.ServerName, txn string, now time.Time, pdus, edus []json.RawMessage) *Request {
	body := object{"origin": origin, "origin_server_ts": now.UnixMilli(), "pdus": pdus}
	if pdus == nil {
		body["pdus"] = []json.RawMessage{} // must be there (S2S "Transactions")
	}
	if len(edus) > 0 {
		body["edus"] = edus
	}
	return &Request{
		Destination: destination,
		Method:      http.MethodPut,
		Target:      "/_matrix/federation/v1/send/" + url.PathEscape(txn),
		Body:        canonical(body),
	}
}

// Message is a PDU with a text of user @localpart in a room, of the form that
// room versions 3 to 11 have. Its content hash is right, so messages that differ
// have different hashes; its signature covers the whole event instead of the
// redacted one, which no receiver here looks at.
func (h Homeserver) Message(localpart, room, text string, depth int64, now time.Time) json.RawMessage {
	event := object{
		"type":             "m.room.message",
		"room_id":          room,
		"sender":           h.user(localpart),
		"origin_server_ts": now.UnixMilli(),
		"depth":            depth,
		"auth_events":      []string{},
		"prev_events":      []string{},
		"content":          object{"msgtype": "m.text", "body": text},
	}
	sum := sha256.Sum256(canonical(event))
	event["hashes"] = object{"sha256": base64.RawStdEncoding.EncodeToString(sum[:])}
	signed, err := h.Key.Sign(canonical(event), string(h.Name))
	if err != nil {
		panic(fmt.Sprintf("fedload: sign a message: %v", err))
	}
	return signed
}

func edu(name string, content object) json.RawMessage {
	return canonical(object{"edu_type": name, "content": content})
}

func (h Homeserver) user(localpart string) string { return "@" + localpart + ":" + string(h.Name) }

// Typing is an EDU that says that a user types in a room, or ceased to.
func (h Homeserver) Typing(localpart, room string, typing bool) json.RawMessage {
	return edu("m.typing", object{"user_id": h.user(localpart), "room_id": room, "typing": typing})
}

// Presence is an EDU of one user's presence: "online", "unavailable", "offline".
func (h Homeserver) Presence(localpart, presence, status string) json.RawMessage {
	return edu("m.presence", object{"push": []object{{
		"user_id":          h.user(localpart),
		"presence":         presence,
		"status_msg":       status,
		"last_active_ago":  1000,
		"currently_active": presence == "online",
	}}})
}

// Receipt is an EDU that says that a user has read up to an event.
func (h Homeserver) Receipt(localpart, room, event string, now time.Time) json.RawMessage {
	return edu("m.receipt", object{room: object{"m.read": object{h.user(localpart): object{
		"event_ids": []string{event},
		"data":      object{"ts": now.UnixMilli()},
	}}}})
}

// ToDevice is an EDU with a message to all devices of a remote user. Receivers
// know messages apart by id.
func (h Homeserver) ToDevice(localpart, to, id string) json.RawMessage {
	return edu("m.direct_to_device", object{
		"sender":     h.user(localpart),
		"type":       "m.dummy",
		"message_id": id,
		"messages":   object{to: object{"*": object{}}},
	})
}

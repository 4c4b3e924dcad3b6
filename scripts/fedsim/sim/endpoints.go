package sim

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"fsbus/bus/matrix"
)

// The names of endpoints that statistics treat in ways of their own.
const (
	sendEndpoint     = "send" // takes transactions
	sendJoinEndpoint = "send_join"
)

// maxMedia is the largest media answer, in bytes.
const maxMedia = 1 << 30

// endpoint is a row of the table of what servers answer.
type endpoint struct {
	name          string // in statistics
	pattern       string // of http.ServeMux
	authenticated bool   // wants an X-Matrix signature
	answer        func(*server, *request) answer
}

// endpoints is all that a server knows; the last row catches the rest.
var endpoints = []endpoint{
	{"key/server", "GET /_matrix/key/v2/server", false, keyServer},
	{"key/query", "POST /_matrix/key/v2/query", false, keyQuery},
	{"version", "GET /_matrix/federation/v1/version", false, version},
	{"query/profile", "GET /_matrix/federation/v1/query/profile", true, profile},
	{"query/directory", "GET /_matrix/federation/v1/query/directory", true, directory},
	{"publicRooms", "GET /_matrix/federation/v1/publicRooms", true, publicRooms},
	{"publicRooms", "POST /_matrix/federation/v1/publicRooms", true, publicRooms},
	{"user/devices", "GET /_matrix/federation/v1/user/devices/{user}", true, devices},
	{"user/keys/query", "POST /_matrix/federation/v1/user/keys/query", true, keysQuery},
	{"user/keys/claim", "POST /_matrix/federation/v1/user/keys/claim", true, keysClaim},
	{sendEndpoint, "PUT /_matrix/federation/v1/send/{txn}", true, send},
	{"event", "GET /_matrix/federation/v1/event/{event}", true, event},
	{"state", "GET /_matrix/federation/v1/state/{room}", true, state},
	{"state_ids", "GET /_matrix/federation/v1/state_ids/{room}", true, stateIDs},
	{"event_auth", "GET /_matrix/federation/v1/event_auth/{room}/{event}", true, eventAuth},
	{"make_join", "GET /_matrix/federation/v1/make_join/{room}/{user}", true, makeJoin},
	{sendJoinEndpoint, "PUT /_matrix/federation/v2/send_join/{room}/{event}", true, sendJoin},
	{sendJoinEndpoint, "PUT /_matrix/federation/v1/send_join/{room}/{event}", true, sendJoinV1},
	{"media/download", "GET /_matrix/federation/v1/media/download/{media}", true, media},
	{"unknown", "/", false, unknown},
}

type object = map[string]any

func unknown(*server, *request) answer {
	return refusal(http.StatusNotFound, matrix.MUnrecognized, "unrecognized request")
}

func notFound() answer {
	return refusal(http.StatusNotFound, matrix.MNotFound, "not found")
}

func notJSON() answer {
	return refusal(http.StatusBadRequest, matrix.MNotJSON, "the body is not the JSON expected")
}

// localpart takes an identifier such as @user:name or #alias:name apart. It
// reports false if it is not one of this server's, or is @nobody or #nobody,
// which no server has.
func (s *server) localpart(id string, sigil byte) (string, bool) {
	if id == "" || id[0] != sigil {
		return "", false
	}
	local, ok := strings.CutSuffix(id[1:], ":"+string(s.name))
	return local, ok && local != "nobody"
}

// room is the id of the one room that each server lists. Nobody can join it.
func (s *server) room() string { return "!room:" + string(s.name) }

func version(*server, *request) answer {
	return ok(object{"server": object{"name": "fedsim", "version": "1"}})
}

func profile(s *server, r *request) answer {
	query := r.URL.Query()
	local, found := s.localpart(query.Get("user_id"), '@')
	if !found {
		return notFound()
	}
	all := object{"displayname": local, "avatar_url": "mxc://" + string(s.name) + "/" + local}
	field := query.Get("field")
	if field == "" {
		return ok(all)
	}
	if all[field] == nil {
		return notFound()
	}
	return ok(object{field: all[field]})
}

func directory(s *server, r *request) answer {
	if _, found := s.localpart(r.URL.Query().Get("room_alias"), '#'); !found {
		return notFound()
	}
	return ok(object{"room_id": s.room(), "servers": []string{string(s.name)}})
}

func publicRooms(s *server, _ *request) answer {
	return ok(object{
		"chunk": []object{{
			"room_id":            s.room(),
			"name":               "The room of " + string(s.name),
			"num_joined_members": 1,
			"world_readable":     false,
			"guest_can_join":     false,
		}},
		"total_room_count_estimate": 1,
	})
}

// device is the id of the one device that each user has.
const device = "SIMDEVICE"

func deviceKeys(user string) object {
	return object{
		"user_id":    user,
		"device_id":  device,
		"algorithms": []string{"m.olm.v1.curve25519-aes-sha2"},
		"keys":       object{"ed25519:" + device: strings.Repeat("A", 43)},
		"signatures": object{},
	}
}

func devices(s *server, r *request) answer {
	user := r.PathValue("user")
	if _, found := s.localpart(user, '@'); !found {
		return notFound()
	}
	return ok(object{
		"user_id":   user,
		"stream_id": 1,
		"devices":   []object{{"device_id": device, "keys": deviceKeys(user)}},
	})
}

func keysQuery(s *server, r *request) answer {
	var query struct {
		DeviceKeys map[string]json.RawMessage `json:"device_keys"`
	}
	if json.Unmarshal(r.body, &query) != nil {
		return notJSON()
	}
	users := object{}
	for user := range query.DeviceKeys {
		if _, found := s.localpart(user, '@'); found {
			users[user] = object{device: deviceKeys(user)}
		}
	}
	return ok(object{"device_keys": users})
}

// keysClaim hands out one-time keys, none of them twice: their ids count up.
func keysClaim(s *server, r *request) answer {
	var claim struct {
		OneTimeKeys map[string]map[string]string `json:"one_time_keys"`
	}
	if json.Unmarshal(r.body, &claim) != nil {
		return notJSON()
	}
	users := object{}
	for user, ofUser := range claim.OneTimeKeys {
		if _, found := s.localpart(user, '@'); !found {
			continue
		}
		keys := object{}
		for id, algorithm := range ofUser {
			serial := strconv.FormatUint(s.oneTime.Add(1), 10)
			keys[id] = object{algorithm + ":" + serial: object{"key": strings.Repeat("A", 43), "signatures": object{}}}
		}
		users[user] = keys
	}
	return ok(object{"one_time_keys": users})
}

// media answers a download of the id "bytes-N" with N bytes, as S2S "Content
// Repository" wants it (v1.11): multipart/mixed of a JSON object and the content.
func media(_ *server, r *request) answer {
	digits, _ := strings.CutPrefix(r.PathValue("media"), "bytes-")
	size, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || size < 0 || size > maxMedia {
		return notFound()
	}
	const boundary = "fedsim-boundary"
	return answer{
		status:      http.StatusOK,
		contentType: "multipart/mixed; boundary=" + boundary,
		head: []byte("--" + boundary + "\r\nContent-Type: application/json\r\n\r\n{}" +
			"\r\n--" + boundary + "\r\nContent-Type: application/octet-stream\r\n\r\n"),
		filler: size,
		body:   []byte("\r\n--" + boundary + "--\r\n"),
	}
}

package sim

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strings"
	"time"

	"fsbus/bus/matrix"
)

// SendJoin says how a server answers send_join for a big room. The zero value is
// at once, and with nothing but what belongs into the answer.
type SendJoin struct {
	Delay time.Duration // before the headers, on top of Config.Latency

	// Drip is the time over which the body is spread evenly, from the headers to
	// the last byte. Rate is how many bytes a second go at most; 0: no limit. When
	// both are set the slower one holds.
	Drip time.Duration
	Rate int64

	// Size is how many bytes the body has at least. It is padded with events of
	// the auth chain, and so by less than mostEvent too many.
	Size int64

	Chunked bool // no Content-Length
}

func (j SendJoin) check() error {
	if j.Delay < 0 || j.Drip < 0 || j.Rate < 0 || j.Size < 0 || j.Size > maxMedia {
		return fmt.Errorf("send_join %+v: want nothing negative, and at most %d bytes", j, maxMedia)
	}
	return nil
}

// SetSendJoin changes how server i answers send_join from now on; Config.SendJoin
// holds for the others.
func (w *World) SetSendJoin(i int, j SendJoin) error {
	if err := j.check(); err != nil {
		return fmt.Errorf("sim: server %d: %w", i, err)
	}
	w.servers[i].sendJoin.Store(&j)
	return nil
}

// incompatible is what a server answers to who does not know the room's version
// (S2S "Joining Rooms").
const incompatible = "M_INCOMPATIBLE_ROOM_VERSION"

// ofOrigin reports whether a user is one of the server that signed the request.
func (r *request) ofOrigin(user string) bool {
	_, domain, ok := strings.Cut(user, ":")
	return ok && (r.origin == "" || domain == r.origin)
}

// makeJoin returns the frame of a membership event. Every server answers for any
// room; for a big one with what a join needs.
func makeJoin(s *server, r *request) answer {
	id, user := r.PathValue("room"), r.PathValue("user")
	event := object{
		"type":             "m.room.member",
		"room_id":          id,
		"sender":           user,
		"state_key":        user,
		"origin_server_ts": time.Now().UnixMilli(),
		"depth":            1,
		"auth_events":      []string{},
		"prev_events":      []string{},
		"content":          object{"membership": "join"},
	}
	if strings.HasPrefix(id, bigRoom) {
		room, in := s.bigRoom(id)
		if !in {
			return notFound()
		}
		if !r.ofOrigin(user) {
			return refusal(http.StatusForbidden, matrix.MForbidden, "the user is another server's")
		}
		if !slices.Contains(r.URL.Query()["ver"], roomVersion) {
			a := ok(object{"errcode": incompatible, "error": "the room's version is " + roomVersion, "room_version": roomVersion})
			a.status = http.StatusBadRequest
			return a
		}
		event["auth_events"] = room.auth[:]
		event["prev_events"] = []string{room.eventID(room.last())}
		event["depth"] = room.last() + 2
	}
	return ok(object{"room_version": roomVersion, "event": event})
}

// sendJoin is S2S "Joining Rooms", v2 with omit_members. The server forgets at
// once who has joined, so the same join gets the same answer each time.
func sendJoin(s *server, r *request) answer { return s.join(r, true) }

// sendJoinV1 is the deprecated v1, whose answer is within a list.
func sendJoinV1(s *server, r *request) answer { return s.join(r, false) }

func (s *server) join(r *request, v2 bool) answer {
	room, in := s.bigRoom(r.PathValue("room"))
	if !in {
		return notFound()
	}
	var event struct {
		Type     string `json:"type"`
		RoomID   string `json:"room_id"`
		Sender   string `json:"sender"`
		StateKey string `json:"state_key"`
		Content  struct {
			Membership string `json:"membership"`
		} `json:"content"`
	}
	if json.Unmarshal(r.body, &event) != nil {
		return notJSON()
	}
	if event.Type != "m.room.member" || event.RoomID != room.id || event.StateKey != event.Sender || event.Content.Membership != "join" {
		return refusal(http.StatusBadRequest, matrix.MBadJSON, "not an event that joins this room")
	}
	if !r.ofOrigin(event.Sender) {
		return refusal(http.StatusForbidden, matrix.MForbidden, "the user is another server's")
	}
	signed, err := s.signingKey().Sign(r.body, string(s.name))
	if err != nil {
		return notJSON()
	}
	omit := v2 && r.URL.Query().Get("omit_members") == "true"

	how := s.world.config.SendJoin
	if own := s.sendJoin.Load(); own != nil {
		how = *own
	}
	padding := 0
	body := func(signature func(int) string) iter.Seq[[]byte] {
		pads := room.pdus(span(firstMember+room.members, firstMember+room.members+padding), signature)
		if omit {
			// The members but one, whom a client would show as the room's hero.
			state := func(yield func(int) bool) {
				for n := range firstMember {
					if !yield(n) {
						return
					}
				}
				yield(firstMember + room.creator)
			}
			return concat(
				text(`{"auth_chain":[`), pads,
				text(`],"event":`, string(signed), `,"members_omitted":true,"origin":"`, string(s.name), `","servers_in_room":[`), room.servers(),
				text(`],"state":[`), room.pdus(state, signature))
		}
		chain := []iter.Seq[[]byte]{room.pdus(span(0, firstMember), signature)}
		if padding > 0 {
			chain = append(chain, text(","), pads)
		}
		head, middle := `{"auth_chain":[`, `],"event":`+string(signed)+`,"members_omitted":false,"origin":"`+string(s.name)+`","state":[`
		if !v2 {
			head, middle = `[200,{"auth_chain":[`, `],"origin":"`+string(s.name)+`","state":[`
		}
		return concat(text(head), concat(chain...), text(middle), room.pdus(room.state(), signature))
	}
	end := "]}"
	if !v2 {
		end = "]}]"
	}
	size := length(body(unsigned))
	if missing := how.Size - size - int64(len(end)); missing > 0 {
		var b []byte
		for ; missing > 0; padding++ {
			b = room.appendEvent(b[:0], firstMember+room.members+padding, unsigned)
			missing -= int64(len(b)) + 1 // its comma; the first of a list has none
		}
		size = length(body(unsigned))
	}
	return answer{
		status: http.StatusOK,
		delay:  how.Delay, drip: how.Drip, rate: how.Rate, chunked: how.Chunked,
		stream: body(room.signature), streamed: size,
		body: []byte(end),
	}
}

// stream makes an answer of what parts yields; its last bytes are end.
func stream(end string, parts func(signature func(int) string) iter.Seq[[]byte], signature func(int) string) answer {
	return answer{
		status: http.StatusOK,
		stream: parts(signature), streamed: length(parts(unsigned)),
		body: []byte(end),
	}
}

// at returns the room of a request that names an event in it, or the answer if
// there is none.
func (s *server) at(r *request, event string) (*room, answer) {
	room, in := s.bigRoom(r.PathValue("room"))
	if !in {
		return nil, notFound()
	}
	if event == "" {
		return nil, refusal(http.StatusBadRequest, matrix.MMissingParam, "event_id is missing")
	}
	if of, _, known := s.eventByID(event); !known || of.id != room.id {
		return nil, notFound()
	}
	return room, answer{}
}

// state is S2S "Retrieving events": all of the room's state, whichever of its
// events is asked about.
func state(s *server, r *request) answer {
	room, refused := s.at(r, r.URL.Query().Get("event_id"))
	if room == nil {
		return refused
	}
	return stream("]}", func(signature func(int) string) iter.Seq[[]byte] {
		return concat(text(`{"auth_chain":[`), room.pdus(span(0, firstMember), signature), text(`],"pdus":[`), room.pdus(room.state(), signature))
	}, room.signature)
}

// stateIDs is state with ids only.
func stateIDs(s *server, r *request) answer {
	room, refused := s.at(r, r.URL.Query().Get("event_id"))
	if room == nil {
		return refused
	}
	return stream("]}", func(func(int) string) iter.Seq[[]byte] {
		return concat(text(`{"auth_chain_ids":[`), room.ids(span(0, firstMember)), text(`],"pdu_ids":[`), room.ids(room.state()))
	}, unsigned)
}

// eventAuth is what every event of the room rests on.
func eventAuth(s *server, r *request) answer {
	room, refused := s.at(r, r.PathValue("event"))
	if room == nil {
		return refused
	}
	return stream("]}", func(signature func(int) string) iter.Seq[[]byte] {
		return concat(text(`{"auth_chain":[`), room.pdus(span(0, firstMember), signature))
	}, room.signature)
}

// event returns an event of a big room, and a message for any other id.
func event(s *server, r *request) answer {
	now := time.Now().UnixMilli()
	if room, n, known := s.eventByID(r.PathValue("event")); known {
		return ok(object{
			"origin":           s.name,
			"origin_server_ts": now,
			"pdus":             []json.RawMessage{room.appendEvent(nil, n, room.signature)},
		})
	}
	return ok(object{
		"origin":           s.name,
		"origin_server_ts": now,
		"pdus": []object{{
			"event_id":         r.PathValue("event"),
			"type":             "m.room.message",
			"room_id":          s.room(),
			"sender":           "@user:" + string(s.name),
			"origin_server_ts": now,
			"depth":            1,
			"auth_events":      []string{},
			"prev_events":      []string{},
			"content":          object{"msgtype": "m.text", "body": "simulated"},
			"hashes":           object{"sha256": strings.Repeat("A", 43)},
			"signatures":       object{},
		}},
	})
}

package sim

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"

	"fsbus/bus/matrix"
)

// roomVersion is that of all rooms (rooms/v10).
const roomVersion = "10"

// bigRoom is what the ids of big rooms begin with; the name of the server that
// created the room follows.
const bigRoom = "!big:"

// The events of a room by number: what it began with, then a membership for each
// member, then as many earlier memberships as an answer is to be padded with.
const (
	eventCreate = iota
	eventPowerLevels
	eventJoinRules
	eventVisibility
	eventName
	firstMember
)

// The sizes of events, in bytes. Which one has which size is up to its number.
const (
	leastEvent = 600
	mostEvent  = 1500
)

// memberName is the local part of every member's name.
const memberName = "member"

// maxRoomSignatures bounds for how many rooms a server remembers its signature.
const maxRoomSignatures = 16

// room is a big room. Nothing of it is stored: an event follows from the seed,
// the room and its number.
type room struct {
	world   *World
	creator int    // the server that created it
	members int    // one on each of the first servers
	id      string // bigRoom and the creator's name
	auth    [eventJoinRules + 1]string
}

// RoomID returns the id of the big room that server i created. The first
// Config.RoomMembers servers created one each and are in all of them, with one
// user each; any of them lets others join.
func (w *World) RoomID(i int) string { return bigRoom + string(w.names[i]) }

// bigRoom returns the room of that id, if this server is in it.
func (s *server) bigRoom(id string) (*room, bool) {
	name, big := strings.CutPrefix(id, bigRoom)
	if !big {
		return nil, false
	}
	creator, known := s.world.indexOf(name)
	if !known {
		return nil, false
	}
	return s.roomOf(creator)
}

// roomOf returns the room that a server created, if this server is in it.
func (s *server) roomOf(creator int) (*room, bool) {
	members := s.world.config.RoomMembers
	if creator >= members || s.index >= members {
		return nil, false
	}
	r := &room{world: s.world, creator: creator, members: members, id: s.world.RoomID(creator)}
	for n := range r.auth {
		r.auth[n] = r.eventID(n)
	}
	return r, true
}

// eventByID returns the room and the number of the event that an id names, if
// this server is in the room.
func (s *server) eventByID(id string) (*room, int, bool) {
	text, ok := strings.CutPrefix(id, "$")
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if !ok || err != nil || len(raw) != sha256.Size {
		return nil, 0, false
	}
	r, in := s.roomOf(int(binary.BigEndian.Uint16(raw)))
	if !in {
		return nil, 0, false
	}
	n := int64(binary.BigEndian.Uint32(raw[2:]))
	if n >= 1<<31 || r.eventID(int(n)) != id {
		return nil, 0, false
	}
	return r, int(n), true
}

// eventID has the form of a room version's that hashes events. It tells room and
// number instead, so that what is not stored can be found.
func (r *room) eventID(n int) string {
	var id [sha256.Size]byte
	binary.BigEndian.PutUint16(id[:], uint16(r.creator)) // below MaxServers
	binary.BigEndian.PutUint32(id[2:], uint32(n))
	sum := r.sum(n)
	copy(id[6:], sum[:])
	return "$" + base64.RawURLEncoding.EncodeToString(id[:])
}

// sum is where all that looks random in event n comes from.
func (r *room) sum(n int) [sha256.Size]byte {
	text := binary.BigEndian.AppendUint64([]byte("fedsim event "), r.world.config.Seed)
	text = binary.BigEndian.AppendUint64(text, uint64(n))
	return sha256.Sum256(append(text, r.id...))
}

// sender returns the server whose user sent event n.
func (r *room) sender(n int) int {
	if n < firstMember {
		return r.creator
	}
	return (n - firstMember) % r.members
}

// unsigned stands for signatures where only sizes matter: they have one size.
func unsigned(int) string { return strings.Repeat("A", 86) }

// signature returns what server j signs its events in the room with: the
// signature of its membership as a whole, made once. A receiver that verifies
// would want one for each event, of the event redacted.
func (r *room) signature(j int) string {
	s := r.world.servers[j]
	s.mu.Lock()
	text, known := s.signatures[r.id]
	s.mu.Unlock()
	if known {
		return text
	}
	key, name := s.signingKey(), string(s.name)
	signed, err := key.Sign(bytes.Replace(r.appendEvent(nil, firstMember+j, unsigned), []byte(`"signatures":`), []byte(`"unsigned":`), 1), name)
	var event struct {
		Signatures map[string]map[string]string `json:"signatures"`
	}
	if err == nil {
		err = json.Unmarshal(signed, &event)
	}
	if err != nil {
		panic(fmt.Sprintf("sim: sign a membership of %s: %v", name, err))
	}
	text = event.Signatures[name][key.ID()]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.signatures == nil || len(s.signatures) >= maxRoomSignatures {
		s.signatures = make(map[string]string)
	}
	s.signatures[r.id] = text
	return text
}

// appendEvent appends event n as a PDU: canonical JSON, of the size that its
// number says, at most mostEvent. signature tells the signature of a server.
func (r *room) appendEvent(dst []byte, n int, signature func(server int) string) []byte {
	start := len(dst)
	server := r.sender(n)
	name := string(r.world.names[server])
	sum := r.sum(n)

	dst = append(dst, `{"auth_events":[`...)
	for i := range min(n, len(r.auth)) {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = quote(dst, r.auth[i])
	}
	dst = append(dst, `],"content":{`...)
	kind, state := "m.room.member", "@"+memberName+":"+name
	switch n {
	case eventCreate:
		kind, state = "m.room.create", ""
		dst = append(dst, `"creator":"@`+memberName+`:`+name+`"`...)
	case eventPowerLevels:
		kind, state = "m.room.power_levels", ""
		dst = append(dst, `"events_default":0`...)
	case eventJoinRules:
		kind, state = "m.room.join_rules", ""
		dst = append(dst, `"join_rule":"public"`...)
	case eventVisibility:
		kind, state = "m.room.history_visibility", ""
		dst = append(dst, `"history_visibility":"shared"`...)
	case eventName:
		kind, state = "m.room.name", ""
		dst = append(dst, `"name":"The big room of `+name+`"`...)
	default:
		dst = append(dst, `"displayname":"`...)
		dst = strconv.AppendInt(dst, int64(n-firstMember), 10)
		dst = append(dst, `","membership":"join"`...)
	}
	dst = append(dst, `,"reason":"`...)
	filling := len(dst)
	dst = append(dst, `"},"depth":`...)
	dst = strconv.AppendInt(dst, int64(n)+1, 10)
	dst = append(dst, `,"hashes":{"sha256":"`...)
	dst = base64.RawStdEncoding.AppendEncode(dst, sum[:])
	dst = append(dst, `"},"origin_server_ts":`...)
	dst = strconv.AppendInt(dst, 1_700_000_000_000+int64(n), 10)
	dst = append(dst, `,"prev_events":[`...)
	if n > 0 {
		dst = quote(dst, r.eventID(n-1))
	}
	dst = append(dst, `],"room_id":`...)
	dst = quote(dst, r.id)
	dst = append(dst, `,"sender":"@`+memberName+`:`+name+`","signatures":{"`+name+`":{"`+keyID+`":"`...)
	dst = append(dst, signature(server)...)
	dst = append(dst, `"}},"state_key":`...)
	dst = quote(dst, state)
	dst = append(dst, `,"type":`...)
	dst = append(quote(dst, kind), '}')

	size := leastEvent + int(binary.BigEndian.Uint16(sum[:]))%(mostEvent-leastEvent+1)
	if missing := size - (len(dst) - start); missing > 0 {
		dst = slices.Insert(dst, filling, filler32[:missing]...)
	}
	return dst
}

// filler32 fills texts in JSON.
var filler32 = bytes.Repeat([]byte("x"), 32<<10)

// quote appends a text without anything to escape, which names and ids are.
func quote(dst []byte, s string) []byte {
	return append(append(append(dst, '"'), s...), '"')
}

// span yields the numbers from first to before end.
func span(first, end int) iter.Seq[int] {
	return func(yield func(int) bool) {
		for n := first; n < end; n++ {
			if !yield(n) {
				return
			}
		}
	}
}

// state yields the numbers of the events that are the room's state.
func (r *room) state() iter.Seq[int] { return span(0, firstMember+r.members) }

// last returns the number of the latest event.
func (r *room) last() int { return firstMember + r.members - 1 }

// pdus yields events with commas between them. A piece is good until the next.
func (r *room) pdus(numbers iter.Seq[int], signature func(int) string) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		var b []byte
		for n := range numbers {
			if b != nil {
				b = append(b[:0], ',')
			}
			b = r.appendEvent(b, n, signature)
			if !yield(b) {
				return
			}
		}
	}
}

// ids yields the ids of events, quoted, with commas between them.
func (r *room) ids(numbers iter.Seq[int]) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		var b []byte
		for n := range numbers {
			if b != nil {
				b = append(b[:0], ',')
			}
			b = quote(b, r.eventID(n))
			if !yield(b) {
				return
			}
		}
	}
}

// servers yields the names of those in the room, quoted, with commas between them.
func (r *room) servers() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		var b []byte
		for _, name := range r.world.names[:r.members] {
			if b != nil {
				b = append(b[:0], ',')
			}
			b = quote(b, string(name))
			if !yield(b) {
				return
			}
		}
	}
}

// text yields one piece.
func text(parts ...string) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) { yield([]byte(strings.Join(parts, ""))) }
}

// concat yields what all yield, in order.
func concat(all ...iter.Seq[[]byte]) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for _, seq := range all {
			for b := range seq {
				if !yield(b) {
					return
				}
			}
		}
	}
}

// length is how many bytes a sequence yields.
func length(seq iter.Seq[[]byte]) int64 {
	var n int64
	for b := range seq {
		n += int64(len(b))
	}
	return n
}

// indexOf returns the number of the server of that name.
func (w *World) indexOf(name string) (int, bool) {
	ip, ok := matrix.ServerName(name).IP()
	if !ok || !ip.Is4() {
		return 0, false
	}
	b := ip.As4()
	i := int(b[2])<<8 | int(b[3])
	return i, i < len(w.names) && string(w.names[i]) == name
}

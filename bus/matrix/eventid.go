package matrix

import (
	"crypto/sha256"
	"encoding/base64"
	"iter"
)

const (
	// maxEventID is the length of an event id in bytes beyond which it is none
	// (appendices, "Common Identifier Format").
	maxEventID = 255
	// maxEventText is how many bytes of a PDU are looked at: twice what an event may
	// have (C-S API "Size limits"), so that whatever is in unsigned has room.
	maxEventText = 2 * 65536
	// hashedID is the length of an event id that is a hash: "$" and SHA-256 in base64.
	hashedID = 1 + 43
)

// redactions is a set of redaction rules, of which the room versions have had six (the
// section "Redactions" of each).
type redactions uint8

const (
	redactionV1  redactions = 1 << iota // room versions 1 to 5
	redactionV6                         // 6 and 7
	redactionV8                         // 8
	redactionV9                         // 9 and 10
	redactionV11                        // 11
	redactionV12                        // 12

	redactionsAll     = redactionsToV11 | redactionV12
	redactionsToV5    = redactionV1
	redactionsToV10   = redactionV1 | redactionV6 | redactionV8 | redactionV9
	redactionsToV11   = redactionsToV10 | redactionV11
	redactionsFromV8  = redactionsFromV9 | redactionV8
	redactionsFromV9  = redactionsFromV11 | redactionV9
	redactionsFromV11 = redactionV11 | redactionV12
)

// EventIDs returns the ids that the event pdu can have, since nothing that a bus
// sees tells the version of its room: the member event_id if it has that, as in room
// versions 1 and 2 and in no other (Synapse refuses it there). Or else its reference
// hash, in standard base64 as in version 3 and in the URL-safe one as from 4 on, after
// redaction by the rules of each version (S2S "Calculating the Reference Hash for an
// Event"). They are in the order of the versions, and none is there twice: most
// events have one or two, none more than four.
//
// pdu need not be in canonical form. There is no id for what is no JSON, has more than
// twice the bytes that an event may have, lacks a type or a content, or has an
// event_id that cannot be one. Numbers are hashed as they stand (RawNumbers).
func EventIDs(pdu []byte) []string {
	e, ok := readRedactable(pdu)
	if !ok {
		return nil
	}
	if e.id != "" {
		return []string{e.id}
	}
	var ids []string
	for id := range e.hashedIDs() {
		ids = append(ids, string(id[:]))
	}
	return ids
}

// HasEventID reports whether id is among the EventIDs of pdu, at less cost.
func HasEventID(pdu []byte, id string) bool {
	if len(id) < 2 || len(id) > maxEventID || id[0] != '$' {
		return false
	}
	e, ok := readRedactable(pdu)
	if !ok || e.id != "" || len(id) != hashedID {
		return ok && e.id == id
	}
	for has := range e.hashedIDs() {
		if string(has[:]) == id {
			return true
		}
	}
	return false
}

// redactable is an event, of which only what some rule keeps is left.
type redactable struct {
	id      string       // event_id; "" if it has none
	members []keptMember // in canonical order; content without its value
	content []keptMember // those of content
}

// keptMember is a member in canonical form that the rules by keep.
type keptMember struct {
	name, value []byte // the name in its quotes
	by          redactions
}

func readRedactable(pdu []byte) (e redactable, ok bool) {
	if len(pdu) > maxEventText {
		return e, false
	}
	text, err := AppendCanonical(make([]byte, 0, len(pdu)), pdu, RawNumbers)
	if err != nil || text[0] != '{' {
		return e, false
	}
	e.members = make([]keptMember, 0, 16)
	var kind, content []byte
	room := -1 // where room_id is
	for name, value := range canonicalMembers(text) {
		m := keptMember{name: name, value: value, by: redactionsAll}
		switch string(name) {
		case `"event_id"`:
			if e.id = plainText(value); len(e.id) < 2 || len(e.id) > maxEventID || e.id[0] != '$' {
				return e, false
			}
			continue
		case `"content"`:
			content, m.value = value, nil
		case `"type"`:
			kind = value
		case `"room_id"`:
			room = len(e.members)
		case `"auth_events"`, `"depth"`, `"hashes"`, `"origin_server_ts"`, `"prev_events"`, `"sender"`, `"state_key"`:
		case `"membership"`, `"origin"`, `"prev_state"`:
			m.by = redactionsToV10
		default: // and signatures, which every rule keeps but no hash covers
			continue
		}
		e.members = append(e.members, m)
	}
	if len(kind) == 0 || kind[0] != '"' || len(content) == 0 || content[0] != '{' {
		return e, false
	}
	if room >= 0 && string(kind) == `"m.room.create"` {
		// In version 12 a create event has none, its id being that of the room. Synapse
		// redacts one that has it all the same (rust/src/events/utils.rs).
		e.members[room].by = redactionsToV11
	}
	if e.id == "" {
		e.content = readContent(kind, content)
	}
	return e, true
}

// contentKept is what the rules keep of an event's content, by its type and the name
// of the member, both in quotes. "" is any other name.
var contentKept = map[string]map[string]redactions{
	`"m.room.member"`: {
		`"membership"`:                       redactionsAll,
		`"join_authorised_via_users_server"`: redactionsFromV9,
		`"third_party_invite"`:               redactionsFromV11, // of which only signed
	},
	`"m.room.create"`: {
		`"creator"`: redactionsAll,
		"":          redactionsFromV11,
	},
	`"m.room.join_rules"`: {
		`"join_rule"`: redactionsAll,
		`"allow"`:     redactionsFromV8,
	},
	`"m.room.power_levels"`: {
		`"ban"`:            redactionsAll,
		`"events"`:         redactionsAll,
		`"events_default"`: redactionsAll,
		`"invite"`:         redactionsFromV11,
		`"kick"`:           redactionsAll,
		`"redact"`:         redactionsAll,
		`"state_default"`:  redactionsAll,
		`"users"`:          redactionsAll,
		`"users_default"`:  redactionsAll,
	},
	`"m.room.aliases"`:            {`"aliases"`: redactionsToV5},
	`"m.room.history_visibility"`: {`"history_visibility"`: redactionsAll},
	`"m.room.redaction"`:          {`"redacts"`: redactionsFromV11},
}

// readContent returns what any rule keeps of the content of an event of a type, which
// is in quotes.
func readContent(kind, content []byte) []keptMember {
	rules := contentKept[string(kind)]
	if rules == nil {
		return nil
	}
	var kept []keptMember
	for name, value := range canonicalMembers(content) {
		by, ok := rules[string(name)]
		if !ok {
			by = rules[""]
		}
		if string(name) == `"third_party_invite"` && string(kind) == `"m.room.member"` {
			if value[0] != '{' {
				continue
			}
			value = onlySigned(value)
		}
		if by != 0 {
			kept = append(kept, keptMember{name, value, by})
		}
	}
	return kept
}

// onlySigned returns a third_party_invite without all but its member signed.
func onlySigned(invite []byte) []byte {
	for name, value := range canonicalMembers(invite) {
		if string(name) == `"signed"` {
			return append(append([]byte(`{"signed":`), value...), '}')
		}
	}
	return []byte("{}")
}

// hashedIDs yields the event's reference hashes as ids.
func (e *redactable) hashedIDs() iter.Seq[*[hashedID]byte] {
	return func(yield func(*[hashedID]byte) bool) {
		var (
			text []byte
			id   = [hashedID]byte{'$'}
			done redactions
		)
		for rule := redactionV1; rule <= redactionV12; rule <<= 1 {
			if e.anyLike(rule, done) {
				continue
			}
			done |= rule
			text = e.appendRedacted(text[:0], rule)
			hash := sha256.Sum256(text)
			if rule == redactionV1 {
				base64.RawStdEncoding.Encode(id[1:], hash[:])
				v3 := id
				if !yield(&v3) {
					return
				}
				if base64.RawURLEncoding.Encode(id[1:], hash[:]); id == v3 {
					continue
				}
			} else {
				base64.RawURLEncoding.Encode(id[1:], hash[:])
			}
			if !yield(&id) {
				return
			}
		}
	}
}

// anyLike reports whether one of the rules in done keeps the same of the event as
// rule.
func (e *redactable) anyLike(rule, done redactions) bool {
	for _, kept := range [2][]keptMember{e.members, e.content} {
		for i := range kept {
			if by := kept[i].by; by&rule != 0 {
				done &= by
			} else {
				done &^= by
			}
		}
	}
	return done != 0
}

// appendRedacted appends what rule keeps of the event, in canonical form.
func (e *redactable) appendRedacted(dst []byte, rule redactions) []byte {
	object := func(kept []keptMember, value func(m *keptMember)) {
		dst = append(dst, '{')
		for i := range kept {
			m := &kept[i]
			if m.by&rule == 0 {
				continue
			}
			if dst[len(dst)-1] != '{' {
				dst = append(dst, ',')
			}
			dst = append(append(dst, m.name...), ':')
			value(m)
		}
		dst = append(dst, '}')
	}
	plain := func(m *keptMember) { dst = append(dst, m.value...) }
	object(e.members, func(m *keptMember) {
		if m.value == nil {
			object(e.content, plain)
			return
		}
		plain(m)
	})
	return dst
}

// canonicalMembers yields the names, in their quotes, and the values of an object
// that AppendCanonical wrote.
func canonicalMembers(object []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(name, value []byte) bool) {
		for i := 1; object[i] != '}'; {
			colon := skipCanonical(object, i)
			end := skipCanonical(object, colon+1)
			if !yield(object[i:colon:colon], object[colon+1:end:end]) {
				return
			}
			if i = end; object[i] == ',' {
				i++
			}
		}
	}
}

package matrix

import "bytes"

// Bounds on taking EDUs apart. What exceeds them is passed on whole, as an EDU of
// an unknown type is.
const (
	// maxItems is how many items the receipts and presences of a transaction may
	// become. A Synapse sends 50 presences in one and receipts by the dozen.
	maxItems = 4096
	// maxKeyPart is the longest id in bytes that is used as part of a key. Ids of
	// users, rooms and events have at most 255 (appendices, "Identifier Grammar"),
	// Synapse's device ids 512 (rest/client/login.py).
	maxKeyPart = 512
)

// Items appends what the transaction holds to dst: its PDUs in order, then its
// EDUs in order, taken apart. The rules of the kinds, by type of EDU:
//
//	m.presence            one item per user
//	m.receipt             one per room, receipt type, user and thread
//	m.typing              one, with the room and user as key
//	m.device_list_update  one, with the user and device as key
//	m.signing_key_update  one, with the name of the type and the user as key,
//	                      for Synapse sends each under two names
//	m.direct_to_device    one without a key
//	any other             one of KindOther
//
// An EDU that is not of the form that its type asks for, or that has members
// whose meaning would be lost with its form, becomes one of KindOther, or, if it
// is of LaneDevice, an item without a key: the receiver makes of it what it can.
// One that holds nothing (presence of nobody) becomes nothing.
func (t *Transaction) Items(dst []Item) []Item {
	for i := range t.PDUs {
		pdu := &t.PDUs[i]
		hash := pdu.Hash()
		dst = append(dst, Item{Kind: KindPDU, Key: string(hash[:]), Group: pdu.Room, Payload: pdu.Raw, Depth: pdu.Depth})
	}
	room := maxItems
	for i := range t.EDUs {
		before := len(dst)
		var ok bool
		if dst, ok = t.EDUs[i].split(dst, room); !ok {
			dst = append(dst[:before], Item{Kind: KindOther, Payload: t.EDUs[i].Raw})
		}
		room -= len(dst) - before
	}
	return dst
}

// split appends the EDU's items, at most room. On false it must go whole.
func (e *EDU) split(dst []Item, room int) ([]Item, bool) {
	switch e.Type {
	case "m.presence":
		return e.splitPresence(dst, room)
	case "m.receipt":
		return e.splitReceipts(dst, room)
	case "m.typing":
		it, ok := e.typing()
		return append(dst, it), ok
	case "m.device_list_update":
		it := Item{Kind: KindDeviceList, Payload: e.Raw}
		if l, ok := parseDeviceList(e); ok {
			it.Key, it.Group = key(l.user, l.device), string(l.user)
		}
		return append(dst, it), true
	case "m.signing_key_update", "org.matrix.signing_key_update":
		it := Item{Kind: KindSigningKey, Payload: e.Raw}
		if user, ok := signingKeyUser(e); ok {
			it.Key, it.Group = key([]byte(e.Type), user), string(user)
		}
		return append(dst, it), true
	case "m.direct_to_device":
		return append(dst, Item{Kind: KindToDevice, Payload: e.Raw}), true
	}
	return dst, false
}

// typing reads {"room_id","user_id","typing"} (S2S "Typing Notifications").
func (e *EDU) typing() (Item, bool) {
	var room, user []byte
	it := Item{Kind: KindTyping, Payload: e.Raw}
	ok := eachMember(e.content, func(name, value []byte) bool {
		switch string(name) {
		case "room_id":
			room, _ = plainBytes(value)
		case "user_id":
			user, _ = plainBytes(value)
		case "typing":
			switch string(value) {
			case "true":
				it.Lifetime = typingLifetime
			case "false":
				it.Lifetime = stoppedLifetime
			}
		}
		return true
	})
	it.Key = key(room, user)
	return it, ok && it.Lifetime > 0 && it.Key != ""
}

// splitPresence reads {"push":[{"user_id",...},...]} (S2S "Presence"). Each entry
// is all there is to know of its user: a member that it lacks is null or false to
// the receiver (handlers/presence.py), not unchanged.
func (e *EDU) splitPresence(dst []Item, room int) ([]Item, bool) {
	var push []byte
	ok := eachMember(e.content, func(name, value []byte) bool {
		push = value
		return string(name) == "push"
	})
	if !ok || e.other {
		return dst, false
	}
	ok = eachElement(push, func(state []byte) bool {
		var user []byte
		ok := eachMember(state, func(name, value []byte) bool {
			if string(name) == "user_id" {
				user, _ = plainBytes(value)
			}
			return true
		})
		it := Item{Kind: KindPresence, Key: key(user), Payload: state, Lifetime: presenceLifetime}
		dst = append(dst, it)
		room--
		return ok && it.Key != "" && room >= 0
	})
	return dst, ok
}

// splitReceipts reads {room:{type:{user:{"data":{"thread_id"},...}}}} (S2S
// "Receipts"). A receipt without a thread is another than one in any thread.
func (e *EDU) splitReceipts(dst []Item, room int) ([]Item, bool) {
	if e.other {
		return dst, false
	}
	before := len(dst)
	ok := eachReceipt(e.content, func(r receipt) bool {
		it := Item{Kind: KindReceipt, Lifetime: receiptLifetime}
		thread, threaded, ok := r.thread()
		if threaded {
			it.Key = key(r.room, r.kind, r.user, thread)
		} else {
			it.Key = key(r.room, r.kind, r.user)
		}
		it.Payload = r.append(make([]byte, 0, len(`{"":{"":{"":}}}`)+len(r.room)+len(r.kind)+len(r.user)+len(r.value)))
		dst = append(dst, it)
		room--
		return ok && it.Key != "" && room >= 0
	})
	if ok && len(dst) == before+1 {
		// The usual case: the only receipt is the whole content.
		dst[before].Payload = e.content
	}
	return dst, ok
}

// receipt is one receipt of an EDU. The names are without their quotes.
type receipt struct{ room, kind, user, value []byte }

// eachReceipt walks the content of an EDU of receipts as eachMember walks an
// object.
func eachReceipt(content []byte, each func(receipt) bool) bool {
	return eachMember(content, func(room, kinds []byte) bool {
		return eachMember(kinds, func(kind, users []byte) bool {
			return eachMember(users, func(user, value []byte) bool {
				return each(receipt{room, kind, user, value})
			})
		})
	})
}

// thread returns the id of the receipt's thread. ok is false if the receipt's
// form does not allow to say.
func (r *receipt) thread() (id []byte, threaded, ok bool) {
	var data []byte
	if !eachMember(r.value, func(name, value []byte) bool {
		if string(name) == "data" {
			data = value
		}
		return true
	}) {
		return nil, false, false
	}
	if data == nil {
		return nil, false, true
	}
	ok = eachMember(data, func(name, value []byte) bool {
		if string(name) != "thread_id" || value[0] != '"' {
			return true // like Synapse, which takes no other value for a thread (handlers/receipts.py)
		}
		id, threaded = plainBytes(value)
		return threaded
	})
	return id, threaded, ok
}

// append appends the receipt as the content of an EDU.
func (r *receipt) append(dst []byte) []byte {
	for _, name := range [...][]byte{r.room, r.kind, r.user} {
		dst = append(dst, `{"`...)
		dst = append(dst, name...)
		dst = append(dst, `":`...)
	}
	dst = append(dst, r.value...)
	return append(dst, "}}}"...)
}

// key joins the parts of a key, which are the insides of strings without escapes
// and so cannot contain a quote. It is empty if a part is empty or too long.
func key(parts ...[]byte) string {
	b := make([]byte, 0, 128)
	for _, p := range parts {
		if len(p) == 0 || len(p) > maxKeyPart {
			return ""
		}
		b = append(append(b, p...), '"')
	}
	return string(bytes.TrimSuffix(b, []byte{'"'}))
}

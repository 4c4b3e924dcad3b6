package matrix

// EDURooms calls each with the rooms that the transaction's typing notifications
// and receipts speak of, as often as they do, until it returns false.
func (t *Transaction) EDURooms(each func(room string) bool) {
	for i := range t.EDUs {
		e := &t.EDUs[i]
		on := true
		switch e.Type {
		case "m.typing":
			eachMember(e.content, func(name, value []byte) bool {
				if string(name) == "room_id" {
					on = each(plainText(value))
				}
				return on
			})
		case "m.receipt":
			eachMember(e.content, func(room, _ []byte) bool {
				on = each(string(room))
				return on
			})
		}
		if !on {
			return
		}
	}
}

// Class returns the class of the transaction, as SendClass does for its body.
func (t *Transaction) Class() Class {
	if len(t.PDUs) > 0 {
		return ClassEvent
	}
	if t.ForDevices() {
		return ClassDevice
	}
	return ClassPresence
}

// ForDevices reports whether any EDU is something else than presence, typing or
// receipts: to-device messages, device lists, signing keys, or of an unknown
// type.
func (t *Transaction) ForDevices() bool {
	for i := range t.EDUs {
		switch t.EDUs[i].Type {
		case "m.presence", "m.typing", "m.receipt":
		default:
			return true
		}
	}
	return false
}

package matrix

import "time"

// Kind is what an Item is. The numbers are stored and never change. The zero
// value is not a kind.
type Kind uint8

// The kinds of items.
const (
	KindToDevice   Kind = 1 + iota // an EDU m.direct_to_device
	KindPDU                        // an event
	KindDeviceList                 // an EDU m.device_list_update
	KindSigningKey                 // an EDU m.signing_key_update, or with its older name
	KindOther                      // any other EDU, whole
	KindReceipt                    // one receipt: the content of an EDU m.receipt that holds no other
	KindTyping                     // an EDU m.typing
	KindPresence                   // the presence of one user: an element of push of an EDU m.presence
	NumKinds       = 8
)

var kinds = [NumKinds + 1]struct {
	name  string
	lane  Lane
	merge Merge
}{
	KindToDevice:   {"to_device", LaneToDevice, MergeNever},
	KindPDU:        {"pdu", LanePDU, MergeKeep},
	KindDeviceList: {"device_list", LaneDevice, MergeChain},
	KindSigningKey: {"signing_key", LaneDevice, MergeFields},
	KindOther:      {"other", LaneOther, MergeNever},
	KindReceipt:    {"receipt", LaneReceipt, MergeReplace},
	KindTyping:     {"typing", LaneTyping, MergeReplace},
	KindPresence:   {"presence", LanePresence, MergeReplace},
}

// String returns the kind's name as metrics and the status page show it.
func (k Kind) String() string {
	switch {
	case k == 0:
		return "none"
	case k > NumKinds:
		return "invalid"
	}
	return kinds[k].name
}

// Lane returns the queue that items of the kind stand in; 0 if k is no kind.
func (k Kind) Lane() Lane {
	if k > NumKinds {
		return 0
	}
	return kinds[k].lane
}

// Merge returns what becomes of two items of the kind with one key.
func (k Kind) Merge() Merge {
	if k > NumKinds {
		return MergeNever
	}
	return kinds[k].merge
}

// Lane is one of the queues of a destination. Within a lane items keep their
// order; a transaction takes from the front of each. Lower lanes are packed first.
// The zero value is not a lane.
//
// There is no order between lanes, and none inside a transaction: a Synapse
// handles its EDUs, and its PDUs beside them, several at a time
// (federation/federation_server.py). What must come after something else must
// stand behind it in one lane.
type Lane uint8

// The lanes. Device lists and signing keys share one, since a user's devices are
// signed with these keys.
const (
	LaneToDevice Lane = 1 + iota
	LanePDU
	LaneDevice
	LaneOther
	LaneReceipt
	LaneTyping
	LanePresence
	NumLanes = 7
)

// Merge says what happens when an item comes to a destination's queue in which
// an older one of the same kind and key waits. Only items that were never part of
// a transaction sent may be replaced or changed: of one that was, nobody knows
// whether the other server has seen it, so it stays what it was.
type Merge uint8

const (
	// MergeNever: both stay. Such items have no key.
	MergeNever Merge = iota
	// MergeKeep: the new one is a copy of the old one and is dropped. The old one
	// may have been sent already, as long as the outcome is open.
	MergeKeep
	// MergeReplace: the old one is dropped. The new one says all that it said.
	MergeReplace
	// MergeFields: the old one is dropped; MergeSigningKeys makes the new one of
	// both.
	MergeFields
	// MergeChain: the old one is dropped if RelinkDeviceList can take it out of
	// the chain; otherwise both stay.
	MergeChain
)

// How long items wait until they are of no use, by Synapse's own clocks.
const (
	// typingLifetime: a receiver shows the user as typing for a minute from when
	// it hears of it, and the sender repeats it every 40 s (handlers/typing.py).
	// Late news would outlive the truth by up to that minute.
	typingLifetime = 30 * time.Second
	// stoppedLifetime: after a minute the receiver has stopped by itself.
	stoppedLifetime = time.Minute
	// presenceLifetime: after 30 minutes of silence the receiver takes the user
	// for offline, and a sender repeats what is still true every 25
	// (handlers/presence.py).
	presenceLifetime = 30 * time.Minute
	// receiptLifetime: nobody sends a receipt again, so these are kept as long as
	// the room is likely to be read from where they left off.
	receiptLifetime = 7 * 24 * time.Hour
)

// Item is what an outbox queues for a destination: a PDU, or the smallest part of
// an EDU that newer news may replace.
type Item struct {
	Kind Kind
	// Key names, among the items of one kind, those of which one is enough; see
	// Kind.Merge. It is bytes rather than text. Empty: this one is never merged.
	Key string
	// Group is what the item is about, where a queue may have to know: the room
	// of a PDU, the user of a device list or signing key. It may be empty.
	Group string
	// Payload is the item in canonical form, see the kinds. It may be part of
	// the transaction's body.
	Payload []byte
	// Depth is that of a PDU, see Newest; otherwise 0.
	Depth int64
	// Lifetime is how long the item may wait and still be of use; 0 is for ever.
	// What has one may also be given up when room is short: first the highest
	// kind, which matters least. What has none must be delivered.
	Lifetime time.Duration
}

// Expired reports whether an item accepted at one time is no longer worth sending
// at another, both in Unix milliseconds. It is false if the clock went back.
func (it *Item) Expired(accepted, now int64) bool {
	return it.Lifetime > 0 && now-accepted > it.Lifetime.Milliseconds()
}

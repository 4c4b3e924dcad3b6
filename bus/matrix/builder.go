package matrix

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strconv"
)

const (
	// maxStates is how many presences an EDU gets, as Synapse's do
	// (federation/sender/per_destination_queue.py).
	maxStates = 50
	// maxReceipts is the size in bytes at which an EDU of receipts is full. It is
	// the size to which Synapse keeps EDUs that it can divide (api/constants.py).
	maxReceipts = 65536
)

// shares is how far each lane may fill a transaction, with all lanes before it:
// up to so many EDUs, and so many 32nds of its bytes. What the lanes before have
// left is a lane's to use, what is kept for the lanes behind it never is. So
// to-device messages, which go first, get 80 EDUs of 100 and half of the bytes
// however many wait, and the last lane 2 EDUs at least.
var shares = [NumLanes + 1]struct{ edus, bytes int }{
	LaneToDevice: {80, 16},
	LanePDU:      {80, 24},
	LaneDevice:   {88, 27},
	LaneOther:    {90, 29},
	LaneReceipt:  {93, 30},
	LaneTyping:   {98, 31},
	LanePresence: {100, 32},
}

// Builder packs items into one transaction: of each lane as many as find room,
// from the front. The same items, in the same order, make the same bytes.
//
// A transaction has at most MaxPDUs, MaxEDUs and the number of bytes given to
// NewBuilder, of which shares are kept for each lane. The first item of a lane
// goes in even if that takes more bytes, as long as they are not more than
// MaxRequestBody. One that is larger still goes alone.
//
// The zero value is not usable.
type Builder struct {
	origin   ServerName
	maxBytes int
	edus     []byte // the body up to the end of edus
	pdus     []byte // the elements of pdus
	nEDUs    int
	nPDUs    int
	size     int // of the body, or more

	lane  Lane // of the last item
	items int  // of this lane
	full  bool // it takes no more

	states int    // in the EDU that is being written, if it is one of presence
	aged   []byte // the last presence, as it is sent

	// Receipts are sorted when all are known.
	receipts    []packedReceipt
	receiptEDUs []int          // the bytes in each
	nextEDU     map[string]int // by room, type and user: the first EDU without a receipt of it
}

type packedReceipt struct {
	receipt
	edu int
}

// NewBuilder starts a transaction of origin. maxBytes is the size it should not
// exceed; at most MaxRequestBody.
func NewBuilder(origin ServerName, maxBytes int) *Builder {
	return &Builder{
		origin:   origin,
		maxBytes: min(maxBytes, MaxRequestBody),
		size:     len(`{"edus":[],"origin":"","origin_server_ts":,"pdus":[]}`) + len(origin) + len("-9223372036854775808"),
	}
}

// Add offers the next item. It returns false if the item finds no room; then
// neither does any later one of its lane, whatever its size, since items keep
// their order. Items come by lanes, from LaneToDevice up; Add panics if a lane
// comes after a higher one. Of one kind and key there is only one in a
// transaction, unless Kind.Merge would have kept both.
//
// waited is for how many milliseconds the item has been in the bus: presence
// tells how long ago a user was active, so that grows with the wait.
//
// payload is not used after Add returns. The error wraps ErrItem and means that
// the payload is not of this kind. No other item will be refused for it.
func (b *Builder) Add(kind Kind, payload []byte, waited int64) (bool, error) {
	lane := kind.Lane()
	if lane == 0 || lane < b.lane {
		panic(fmt.Sprintf("matrix: an item of kind %d after lane %d", kind, b.lane))
	}
	if len(payload) == 0 || payload[0] != '{' {
		return false, fmt.Errorf("packing %v: %w", kind, ErrItem)
	}
	if lane > b.lane {
		b.endLane()
		b.lane, b.items, b.full = lane, 0, false
	}
	if b.full {
		return false, nil
	}
	var fits, ok bool
	switch kind {
	case KindPDU:
		fits, ok = b.addPDU(payload), true
	case KindReceipt:
		fits, ok = b.addReceipt(payload)
	case KindPresence:
		fits, ok = b.addPresence(payload, waited)
	default:
		fits, ok = b.addEDU(payload), true
	}
	if !ok {
		return false, fmt.Errorf("packing %v: %w", kind, ErrItem)
	}
	if fits {
		b.items++
	}
	b.full = !fits
	return fits, nil
}

// take makes room for one item: so many bytes and new EDUs.
func (b *Builder) take(bytes, edus int) bool {
	share := shares[b.lane]
	size := b.size + bytes
	switch {
	case b.nEDUs+edus > share.edus:
		return false
	case int64(size)*32 <= int64(b.maxBytes)*int64(share.bytes):
	case b.items == 0 && size <= MaxRequestBody:
	case b.Empty():
	default:
		return false
	}
	b.size = size
	b.nEDUs += edus
	return true
}

func (b *Builder) addPDU(payload []byte) bool {
	if b.nPDUs == MaxPDUs || !b.take(len(payload)+len(","), 0) {
		return false
	}
	b.nPDUs++
	if len(b.pdus) > 0 {
		b.pdus = append(b.pdus, ',')
	}
	b.pdus = append(b.pdus, payload...)
	return true
}

func (b *Builder) addEDU(payload []byte) bool {
	if !b.take(len(payload)+len(","), 1) {
		return false
	}
	b.startEDU()
	b.edus = append(b.edus, payload...)
	return true
}

// startEDU writes what comes before an element of edus.
func (b *Builder) startEDU() {
	if len(b.edus) == 0 {
		b.edus = append(b.edus, `{"edus":[`...)
	} else {
		b.edus = append(b.edus, ',')
	}
}

const (
	presenceHead = `{"content":{"push":[`
	presenceTail = `]},"edu_type":"m.presence"}`
)

func (b *Builder) addPresence(payload []byte, waited int64) (fits, ok bool) {
	if b.aged, ok = appendAged(b.aged[:0], payload, waited); !ok {
		return false, false
	}
	if b.states > 0 && b.states < maxStates {
		if !b.take(len(b.aged)+len(","), 0) {
			return false, true
		}
		b.edus = append(b.edus, ',')
	} else {
		if !b.take(len(b.aged)+len(presenceHead)+len(presenceTail)+len(","), 1) {
			return false, true
		}
		b.endPresence()
		b.startEDU()
		b.edus = append(b.edus, presenceHead...)
	}
	b.edus = append(b.edus, b.aged...)
	b.states++
	return true, true
}

func (b *Builder) endPresence() {
	if b.states > 0 {
		b.edus = append(b.edus, presenceTail...)
		b.states = 0
	}
}

// appendAged appends a user's presence with waited added to its last_active_ago.
// A receiver subtracts that from its own clock (handlers/presence.py).
func appendAged(dst, state []byte, waited int64) ([]byte, bool) {
	waited = min(max(waited, 0), maxJSONInteger)
	dst = append(dst, '{')
	ok := eachMember(state, func(name, value []byte) bool {
		if dst[len(dst)-1] != '{' {
			dst = append(dst, ',')
		}
		dst = append(append(append(dst, '"'), name...), `":`...)
		if string(name) == "last_active_ago" {
			if ago, ok := jsonInteger(value); ok {
				dst = strconv.AppendInt(dst, min(ago+waited, maxJSONInteger), 10)
				return true
			}
		}
		dst = append(dst, value...)
		return true
	})
	return append(dst, '}'), ok
}

const (
	receiptHead = `{"content":{`
	receiptTail = `}}},"edu_type":"m.receipt"}`
)

// addReceipt puts a receipt into the first EDU that has room for it and does not
// hold another one of the same room, type and user yet: of several threads each
// goes into an EDU of its own, for there is no place for two in one.
func (b *Builder) addReceipt(payload []byte) (fits, ok bool) {
	// Until the receipts are written they live in copies.
	payload = bytes.Clone(payload)
	p, n := packedReceipt{}, 0
	ok = eachReceipt(payload, func(r receipt) bool {
		p.receipt = r
		n++
		return n == 1
	})
	if !ok || n == 0 {
		return false, false
	}
	k := key(p.room, p.kind, p.user)
	p.edu = b.nextEDU[k]
	for p.edu < len(b.receiptEDUs) && b.receiptEDUs[p.edu]+len(payload) > maxReceipts {
		p.edu++
	}
	size, edus := len(payload)+len(","), 0
	if p.edu == len(b.receiptEDUs) {
		size, edus = size+len(receiptHead)+len(receiptTail), 1
	}
	if !b.take(size, edus) {
		return false, true
	}
	if edus == 1 {
		b.receiptEDUs = append(b.receiptEDUs, 0)
	}
	if b.nextEDU == nil {
		b.nextEDU = make(map[string]int)
	}
	b.nextEDU[k] = p.edu + 1
	b.receiptEDUs[p.edu] += len(payload)
	b.receipts = append(b.receipts, p)
	return true, true
}

// endReceipts writes the EDUs of receipts: maps of rooms, types and users.
func (b *Builder) endReceipts() {
	slices.SortFunc(b.receipts, func(x, y packedReceipt) int {
		return cmp.Or(
			cmp.Compare(x.edu, y.edu),
			bytes.Compare(x.room, y.room),
			bytes.Compare(x.kind, y.kind),
			bytes.Compare(x.user, y.user),
		)
	})
	name := func(s []byte) {
		b.edus = append(append(append(b.edus, '"'), s...), `":`...)
	}
	for i, r := range b.receipts {
		same := 0 // how many levels this one shares with the one before
		switch {
		case i == 0 || r.edu != b.receipts[i-1].edu:
			if i > 0 {
				b.edus = append(b.edus, receiptTail...)
			}
			b.startEDU()
			b.edus = append(b.edus, receiptHead...)
		case !bytes.Equal(r.room, b.receipts[i-1].room):
			b.edus = append(b.edus, "}},"...)
		case !bytes.Equal(r.kind, b.receipts[i-1].kind):
			same = 1
			b.edus = append(b.edus, "},"...)
		default:
			same = 2
			b.edus = append(b.edus, ',')
		}
		if same < 1 {
			name(r.room)
			b.edus = append(b.edus, '{')
		}
		if same < 2 {
			name(r.kind)
			b.edus = append(b.edus, '{')
		}
		name(r.user)
		b.edus = append(b.edus, r.value...)
	}
	if len(b.receipts) > 0 {
		b.edus = append(b.edus, receiptTail...)
	}
	b.receipts, b.receiptEDUs, b.nextEDU = nil, nil, nil
}

// endLane writes what was kept back of the lane that ends.
func (b *Builder) endLane() {
	b.endReceipts()
	b.endPresence()
}

// Empty reports whether nothing went in yet.
func (b *Builder) Empty() bool { return b.nPDUs == 0 && b.nEDUs == 0 }

// Counts returns how many PDUs and EDUs the transaction has so far.
func (b *Builder) Counts() (pdus, edus int) { return b.nPDUs, b.nEDUs }

// Finish returns the body of the transaction in canonical form, ready for
// SignRequest, with now as the time at which it is sent, in Unix milliseconds.
// The Builder must not be used afterwards.
func (b *Builder) Finish(now int64) []byte {
	b.endLane()
	body := slices.Grow(b.edus, len(b.pdus)+len(b.origin)+128)
	if len(body) > 0 {
		body = append(body, "],"...)
	} else {
		body = append(body, '{')
	}
	body = AppendString(append(body, `"origin":`...), string(b.origin))
	body = strconv.AppendInt(append(body, `,"origin_server_ts":`...), now, 10)
	body = append(append(body, `,"pdus":[`...), b.pdus...)
	return append(body, "]}"...)
}

package matrix

import (
	"bytes"
	"errors"
	"fmt"
)

// ErrItem is what the functions that take the payload of an Item return, wrapped,
// for one that Transaction.Items did not make.
var ErrItem = errors.New("malformed item")

// maxPrevIDs is how many predecessors a device list may name and still be merged.
// Synapse names one at most (storage/databases/main/devices.py).
const maxPrevIDs = 20

// signingKeyUser returns the user whose cross-signing keys the EDU is about, if
// it is one that can be merged.
func signingKeyUser(e *EDU) (user []byte, ok bool) {
	if e.Type != "m.signing_key_update" && e.Type != "org.matrix.signing_key_update" {
		return nil, false
	}
	ok = eachMember(e.content, func(name, value []byte) bool {
		if string(name) == "user_id" {
			user, _ = plainBytes(value)
		}
		return true
	})
	return user, ok && user != nil && !e.other
}

// MergeSigningKeys returns one EDU that says what first old and then newer say of
// a user's cross-signing keys: of each member of the content the newer value. One
// that newer lacks, or that is null, has not changed (S2S "End-to-End Encryption";
// handlers/e2e_keys.py). Both are payloads of KindSigningKey with one key. The
// error wraps ErrItem.
func MergeSigningKeys(old, newer []byte) ([]byte, error) {
	a, b := readEDU(old), readEDU(newer)
	userA, okA := signingKeyUser(&a)
	userB, okB := signingKeyUser(&b)
	if !okA || !okB || a.Type != b.Type || !bytes.Equal(userA, userB) {
		return nil, fmt.Errorf("merging signing keys: %w", ErrItem)
	}
	w := openEDU(len(old) + len(newer))
	// The members of both are in order: merge them as sorted lists.
	was, is := membersOf(a.content), membersOf(b.content)
	for len(was) > 0 || len(is) > 0 {
		switch c := compareFirst(was, is); {
		case c < 0:
			w.member(was[0].name, was[0].value)
			was = was[1:]
		case c > 0:
			w.member(is[0].name, is[0].value)
			is = is[1:]
		default:
			value := is[0].value
			if string(value) == "null" {
				value = was[0].value
			}
			w.member(is[0].name, value)
			was, is = was[1:], is[1:]
		}
	}
	return w.close(b.Type), nil
}

// eduWriter writes an EDU, the members of its content one by one.
type eduWriter []byte

func openEDU(size int) eduWriter {
	return append(make(eduWriter, 0, size), `{"content":{`...)
}

func (w *eduWriter) member(name, value []byte) {
	b := *w
	if b[len(b)-1] != '{' {
		b = append(b, ',')
	}
	b = append(append(append(b, '"'), name...), `":`...)
	*w = append(b, value...)
}

func (w *eduWriter) close(eduType string) []byte {
	b := append(*w, `},"edu_type":`...)
	return append(AppendString(b, eduType), '}')
}

type namedValue struct{ name, value []byte }

// membersOf lists the members of an object that eachMember was seen to walk.
func membersOf(object []byte) []namedValue {
	var all []namedValue
	eachMember(object, func(name, value []byte) bool {
		all = append(all, namedValue{name, value})
		return true
	})
	return all
}

// compareFirst compares the names at the front of two lists. The end of a list
// is after every name.
func compareFirst(a, b []namedValue) int {
	switch {
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return bytes.Compare(a[0].name, b[0].name)
}

// deviceList is an EDU m.device_list_update that can be merged (S2S "Device
// Management").
type deviceList struct {
	user, device []byte
	stream       []byte // its own stream id, as streamID has it
	prev         []byte // the array of the ids that it follows; nil if there is none
}

func parseDeviceList(e *EDU) (l deviceList, ok bool) {
	ok = eachMember(e.content, func(name, value []byte) bool {
		switch string(name) {
		case "user_id":
			l.user, _ = plainBytes(value)
		case "device_id":
			l.device, _ = plainBytes(value)
		case "stream_id":
			l.stream = streamID(value)
		case "prev_id":
			l.prev = value
		}
		return true
	})
	if !ok || e.Type != "m.device_list_update" || e.other || l.user == nil || l.device == nil || l.stream == nil {
		return l, false
	}
	n := 0
	return l, l.prev == nil || eachElement(l.prev, func(id []byte) bool {
		n++
		return n <= maxPrevIDs && streamID(id) != nil
	})
}

// streamID returns the text of a stream id's number, since they may come as
// integers or as strings (handlers/device.py); nil if it is none.
func streamID(value []byte) []byte {
	if text, ok := plainBytes(value); ok {
		return text
	}
	if _, ok := jsonInteger(value); ok {
		return value
	}
	return nil
}

// RelinkDeviceList takes the device list dropped out of the chain of one that
// waits behind it: where later says that it follows dropped, the result says that
// it follows what dropped followed. If it does not say so, is another user's, or
// would come to follow too many, refers is false and there is no result. Both are
// payloads of KindDeviceList with a key. The error wraps ErrItem.
//
// Servers number the changes to a user's devices, and each names those before it,
// so that a receiver that misses one notices and asks for the whole list (S2S
// "Device Management"; handlers/device.py, _need_to_do_resync). When a newer list
// replaces that of the same device, all lists of the user behind the old one,
// the new one last, are relinked. Then the receiver misses nothing; and if it
// already had, it notices as it would have before. That news is carried by those
// that refer to the old one: if none does, the old one must stay.
//
// A list that follows nothing makes the receiver ask in any case. So one that
// followed such a list then follows nothing, whatever else it followed.
func RelinkDeviceList(dropped, later []byte) (relinked []byte, refers bool, err error) {
	from, to := readEDU(dropped), readEDU(later)
	x, okX := parseDeviceList(&from)
	y, okY := parseDeviceList(&to)
	if !okX || !okY {
		return nil, false, fmt.Errorf("relinking device lists: %w", ErrItem)
	}
	if !bytes.Equal(x.user, y.user) {
		return nil, false, nil
	}
	prev := make([][]byte, 0, 2*maxPrevIDs)
	add := func(id []byte) bool {
		for _, p := range prev {
			if bytes.Equal(streamID(p), streamID(id)) {
				return true
			}
		}
		prev = append(prev, id)
		return true
	}
	eachElement(y.prev, func(id []byte) bool {
		if !bytes.Equal(streamID(id), x.stream) {
			return add(id)
		}
		refers = true
		eachElement(x.prev, add)
		return true
	})
	if !refers {
		return nil, false, nil
	}
	if len(x.prev) <= len("[]") {
		prev = prev[:0]
	}
	if len(prev) > maxPrevIDs {
		return nil, false, nil
	}
	list := append([]byte{'['}, bytes.Join(prev, []byte{','})...)
	list = append(list, ']')
	w := openEDU(len(later) + len(x.prev))
	eachMember(to.content, func(name, value []byte) bool {
		if string(name) == "prev_id" {
			value = list
		}
		w.member(name, value)
		return true
	})
	return w.close(to.Type), true, nil
}

// Newest tells which of the PDUs of one room that wait for a destination are
// worth sending after a long outage, given their depths in the order of the
// queue: those of the greatest depth, and the last. It returns their places in
// the queue, in order.
//
// The others need not be lost: the receiver asks for what it lacks between these
// and what it has (S2S "Backfilling and retrieving missing events"). Synapse does
// the same to a server that was away for an hour, by the last event and what
// nothing refers to yet (federation/sender/per_destination_queue.py). Which event
// refers to which cannot be told here, because an event's id is a hash that takes
// its room's version to compute. But one that refers to another is deeper than
// it, so nothing that waits refers to the deepest. The sender's timestamps would
// not tell: they are whatever its clock said. PDUs whose room is not known are not
// for this.
func Newest(depths []int64) []int {
	var keep []int
	for i, d := range depths {
		if len(keep) > 0 && d > depths[keep[0]] {
			keep = keep[:0]
		}
		if len(keep) == 0 || d == depths[keep[0]] {
			keep = append(keep, i)
		}
	}
	if last := len(depths) - 1; last >= 0 && keep[len(keep)-1] != last {
		keep = append(keep, last)
	}
	return keep
}

package matrix

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"strconv"
)

// How many of each a transaction may have (S2S "Transactions"); a Synapse answers
// more with 400 (federation/federation_server.py).
const (
	MaxPDUs = 50
	MaxEDUs = 100
)

// elementDepth is how deep the elements of pdus and edus lie already: in an array
// in the transaction. So no transaction that parses is too deep for SignRequest,
// nor one that is packed of the same elements.
const elementDepth = 2

// What ParseTransaction returns, wrapped, besides, with the offset, ErrJSONSyntax and
// ErrJSONComplex.
var (
	// ErrTransaction: not an object, or a member of the wrong type or given twice.
	ErrTransaction = errors.New("malformed transaction")
	// ErrTooManyPDUs: more than MaxPDUs.
	ErrTooManyPDUs = errors.New("too many PDUs in a transaction")
	// ErrTooManyEDUs: more than MaxEDUs.
	ErrTooManyEDUs = errors.New("too many EDUs in a transaction")
	// ErrNoOrigin: no member origin, or one that is no server name. A Synapse goes by the
	// header.
	ErrNoOrigin = errors.New("transaction without origin")
)

// Transaction is the body of a PUT /send (S2S "Transactions"). The zero value has
// no origin and is none.
type Transaction struct {
	Origin         ServerName
	OriginServerTS int64 // when the origin began it, Unix time in milliseconds; 0 if it does not say so in a whole number
	PDUs           []PDU
	EDUs           []EDU
}

// PDU is an event of a transaction. Its members tell what queueing needs to know;
// each has its zero value if the event has no such member or one of another type.
// Nothing here says that the event is valid.
type PDU struct {
	// Raw is the event in canonical form.
	Raw []byte
	// Room is the room_id. The create events of room version 12 have none.
	Room string
	// Type is the event's type.
	Type string
	// Sender is the user that sent it.
	Sender string
	// Depth is one more than that of the deepest event it refers to.
	Depth int64
	// OriginServerTS is when its sender's clock says it was made, Unix time in
	// milliseconds.
	OriginServerTS int64

	prev []byte // the value of prev_events
}

// EDU is an ephemeral message of a transaction.
type EDU struct {
	// Raw is the whole in canonical form.
	Raw []byte
	// Type is its edu_type; "" if it has none.
	Type string

	content []byte // the value of content; nil if there is none
	other   bool   // has members besides edu_type and content
}

// ParseTransaction reads the body of a PUT /send in one pass. The Raw parts of
// its PDUs and EDUs are checked JSON in canonical form, numbers as they stand
// (RawNumbers). Where body is canonical already, as Synapse's are, they are parts
// of it and no copies, so body must not change while they are in use.
//
// An event or EDU with escapes in a member's name is taken for one without any
// members that PDU or EDU show; real ones have none. A transaction without pdus or edus has
// none of them, as Synapse has it (federation/federation_server.py): some servers leave out
// what is empty. The errors are listed above, and quote no part of body; with ErrNoOrigin the
// rest of the transaction is there.
func ParseTransaction(body []byte) (Transaction, error) {
	p := transactionParser{c: canonicalizer{jsonReader: jsonReader{src: body}, numbers: RawNumbers}}
	err := p.parse()
	if err != nil && !errors.Is(err, ErrNoOrigin) {
		return Transaction{}, err
	}
	return p.txn, err
}

// transactionParser walks the transaction with the canonicalizer's reader, and
// has it write each element to the same scratch memory, for comparison.
type transactionParser struct {
	c    canonicalizer
	txn  Transaction
	seen struct{ origin, ts, pdus, edus bool }
	err  error
}

func (p *transactionParser) parse() error {
	r := &p.c.jsonReader
	if r.space(); r.pos < len(r.src) && r.src[r.pos] != '{' {
		return fmt.Errorf("%w: not an object", ErrTransaction)
	}
	ok := r.members(p.member)
	if p.err != nil {
		return p.err
	}
	if !ok {
		return r.syntax("expected a member of the transaction, or its end")
	}
	if r.space(); r.pos < len(r.src) {
		return r.syntax("more after the transaction")
	}
	if p.txn.Origin == "" {
		return ErrNoOrigin
	}
	return nil
}

// member reads the value of the transaction's member name. It returns false at
// the first error, which is in p.err unless it is one of syntax.
func (p *transactionParser) member(name []byte) bool {
	r := &p.c.jsonReader
	r.space()
	switch string(name) {
	case "pdus":
		return p.array(&p.seen.pdus, "pdus", func() bool {
			if len(p.txn.PDUs) == MaxPDUs {
				return p.fail(ErrTooManyPDUs)
			}
			raw, ok := p.element("an event")
			if ok {
				p.txn.PDUs = append(p.txn.PDUs, readPDU(raw))
			}
			return ok
		})
	case "edus":
		return p.array(&p.seen.edus, "edus", func() bool {
			if len(p.txn.EDUs) == MaxEDUs {
				return p.fail(ErrTooManyEDUs)
			}
			raw, ok := p.element("an EDU")
			if ok {
				p.txn.EDUs = append(p.txn.EDUs, readEDU(raw))
			}
			return ok
		})
	case "origin":
		if !p.once(&p.seen.origin, "origin") {
			return false
		}
		value, ok := p.value()
		if name, err := ParseServerName(plainText(value)); err == nil {
			p.txn.Origin = name
		}
		return ok
	case "origin_server_ts":
		if !p.once(&p.seen.ts, "origin_server_ts") {
			return false
		}
		value, ok := p.value()
		p.txn.OriginServerTS, _ = jsonInteger(value)
		return ok
	}
	_, ok := p.value()
	return ok
}

// value reads a value of the transaction itself, and returns it in canonical form, until
// the next is read.
func (p *transactionParser) value() ([]byte, bool) {
	p.c.dst = p.c.dst[:0]
	if err := p.c.value(elementDepth - 1); err != nil {
		return nil, p.fail(err)
	}
	return p.c.dst, true
}

func (p *transactionParser) array(seen *bool, name string, each func() bool) bool {
	r := &p.c.jsonReader
	if !p.once(seen, name) {
		return false
	}
	if r.pos < len(r.src) && r.src[r.pos] != '[' {
		return p.fail(fmt.Errorf("%w: %s is not an array", ErrTransaction, name))
	}
	return r.elements(each)
}

// once refuses a second member of one name: readers differ in which they take.
func (p *transactionParser) once(seen *bool, name string) bool {
	if *seen {
		return p.fail(fmt.Errorf("%w: %s given twice", ErrTransaction, name))
	}
	*seen = true
	return true
}

func (p *transactionParser) fail(err error) bool {
	p.err = err
	return false
}

// element reads an object and returns it in canonical form.
func (p *transactionParser) element(what string) ([]byte, bool) {
	c := &p.c
	c.space()
	start := c.pos
	c.dst = c.dst[:0]
	if err := c.value(elementDepth); err != nil {
		return nil, p.fail(err)
	}
	raw := c.src[start:c.pos:c.pos]
	if !bytes.Equal(raw, c.dst) {
		raw = bytes.Clone(c.dst)
	}
	if raw[0] != '{' {
		return nil, p.fail(fmt.Errorf("%w: %s is not an object", ErrTransaction, what))
	}
	return raw, true
}

// readPDU reads the members of a canonical event that PDU shows.
func readPDU(raw []byte) PDU {
	pdu := PDU{Raw: raw}
	ok := eachMember(raw, func(name, value []byte) bool {
		switch string(name) {
		case "room_id":
			pdu.Room = plainText(value)
		case "type":
			pdu.Type = plainText(value)
		case "sender":
			pdu.Sender = plainText(value)
		case "depth":
			pdu.Depth, _ = jsonInteger(value)
		case "origin_server_ts":
			pdu.OriginServerTS, _ = jsonInteger(value)
		case "prev_events":
			pdu.prev = value
		}
		return true
	})
	if !ok {
		return PDU{Raw: raw}
	}
	return pdu
}

// PrevEvents yields the ids of the events that the event names as coming before
// it, in its order. (Room versions 1 and 2 have pairs of an id and hashes, later
// ones the ids alone.)
func (p *PDU) PrevEvents() iter.Seq[string] {
	return func(yield func(string) bool) {
		eachElement(p.prev, func(prev []byte) bool {
			eachElement(prev, func(first []byte) bool {
				prev = first
				return false
			})
			id := plainText(prev)
			return id == "" || yield(id)
		})
	}
}

// Hash returns the SHA-256 of the event in canonical form. Two PDUs with one hash
// are the same event. The converse does not hold: unsigned may differ.
func (p *PDU) Hash() [sha256.Size]byte { return sha256.Sum256(p.Raw) }

// readEDU takes the envelope off a canonical EDU.
func readEDU(raw []byte) EDU {
	e := EDU{Raw: raw}
	ok := eachMember(raw, func(name, value []byte) bool {
		switch string(name) {
		case "content":
			e.content = value
		case "edu_type":
			e.Type = plainText(value)
		default:
			e.other = true
		}
		return true
	})
	if !ok {
		return EDU{Raw: raw}
	}
	return e
}

// eachMember calls each with the names, without their quotes, and the values of
// an object's members. It stops when each returns false. It returns false if it
// was stopped, or met a name with escapes or anything else that is not expected
// of an object in canonical form. The slices are parts of object.
func eachMember(object []byte, each func(name, value []byte) bool) bool {
	r := jsonReader{src: object}
	return r.members(func(name []byte) bool {
		r.space()
		start := r.pos
		return r.skipValue() && each(name, object[start:r.pos:r.pos])
	}) && r.pos == len(object)
}

// eachElement calls each with the elements of an array that eachMember yielded,
// as eachMember does with members.
func eachElement(array []byte, each func(value []byte) bool) bool {
	r := jsonReader{src: array}
	return r.elements(func() bool {
		r.space()
		start := r.pos
		return r.skipValue() && each(array[start:r.pos:r.pos])
	})
}

// plainText returns the text of a canonical JSON string without escapes, or ""
// for any other value.
func plainText(value []byte) string {
	if text, ok := plainBytes(value); ok {
		return string(text)
	}
	return ""
}

// plainBytes is plainText without the copy.
func plainBytes(value []byte) ([]byte, bool) {
	if len(value) < 2 || value[0] != '"' || bytes.IndexByte(value, '\\') >= 0 {
		return nil, false
	}
	return value[1 : len(value)-1], true
}

// jsonInteger returns the value of a JSON number that is written as an integer
// and within the bounds of canonical JSON.
func jsonInteger(value []byte) (int64, bool) {
	if len(value) == 0 || len(value) > len("-9007199254740991") {
		return 0, false
	}
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || n > maxJSONInteger || n < -maxJSONInteger {
		return 0, false
	}
	return n, true
}

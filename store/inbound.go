package store

import (
	"bytes"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"fsbus/bus/matrix"
)

// InboundFor is for how long an answered transaction is kept, as long as a Synapse
// does (storage/databases/main/transactions.py, _clean_old_transactions). Rows that
// are older go when others are written, not by a clock: whoever looks one up says
// since when it counts.
const InboundFor = 24 * time.Hour

// The bounds of an InboundTxn. Servers that nobody knows decide what they send, and
// a Batch has the transactions of many. So what is beyond a bound is left out, and
// refuses nobody else's: it is as if it had found no room.
const (
	// MaxInboundAnswer is how many bytes an answer may have. A transaction with more
	// is not stored.
	MaxInboundAnswer = 64 << 10
	// MaxInboundEventID is how many bytes an event id may have (appendices, "Common
	// Identifier Format"). A PDU with a longer one is not stored, nor is one after
	// the first matrix.MaxPDUs.
	MaxInboundEventID = 255
)

// InboundTxn is a transaction of another server that our homeserver has acknowledged
// (S2S 4.2), or that was answered in its place since nothing in it was of use any
// more. It is kept so that whoever sends it again gets the same answer, and our
// homeserver does not see it again.
type InboundTxn struct {
	// Origin and ID name the transaction. Only a hash of both is stored, so an ID
	// may have any length. Origin must satisfy matrix.ParseServerName.
	Origin   matrix.ServerName
	ID       string
	Answered int64  // Unix ms
	Answer   []byte // the body of the 200 that it was answered with
	Sum      int64  // a part of the hash of its body; 0: not known
	// PDUs are those that were acknowledged without an error.
	PDUs []InboundPDU
}

// InboundPDU is a PDU of an InboundTxn.
type InboundPDU struct {
	Hash    [32]byte // of its bytes as they were sent
	EventID string   // "": not known
}

func (x *InboundTxn) check() error {
	if _, err := matrix.ParseServerName(string(x.Origin)); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

func (x *InboundTxn) size() int64 {
	n := int64(len(x.Origin)) + int64(len(x.ID)) + int64(len(x.Answer)) + inboundPDUBytes*int64(len(x.PDUs))
	for i := range x.PDUs {
		n += int64(len(x.PDUs[i].EventID))
	}
	return n
}

// inboundKey is what is stored of the id of a transaction, or of the hash of a PDU: a
// part of SHA-256 of the origin, a NUL, which no name has, and that. Whoever finds two
// that are alike, which takes 2^64 tries, finds them for a server of their own.
type inboundKey [hashBytes]byte

func newInboundKey[T string | []byte](origin matrix.ServerName, what T) (key inboundKey) {
	var buf [512]byte // most ids are short
	b := append(buf[:0], origin...)
	b = append(b, 0)
	h := sha256.Sum256(append(b, what...))
	return inboundKey(h[:])
}

// hash is what a row is found by.
func (k *inboundKey) hash() int64 { return int64(binary.BigEndian.Uint64(k[:])) }

// pduList is what is stored of the PDUs of a transaction, in its row: of each its key,
// the length of its event id as a varint, and that.
type pduList []byte

const maxPDUList = matrix.MaxPDUs * (hashBytes + 2 + MaxInboundEventID)

// appendPDUs appends the list of x's PDUs to dst and the keys that are in it to keys.
// One that comes twice is in it once.
func (x *InboundTxn) appendPDUs(dst pduList, keys []inboundKey) (pduList, []inboundKey) {
next:
	for i := range x.PDUs {
		p := &x.PDUs[i]
		if len(keys) == matrix.MaxPDUs {
			break
		}
		if len(p.EventID) > MaxInboundEventID {
			continue
		}
		key := newInboundKey(x.Origin, p.Hash[:])
		for _, k := range keys {
			if k == key {
				continue next
			}
		}
		keys = append(keys, key)
		dst = append(dst, key[:]...)
		dst = binary.AppendUvarint(dst, uint64(len(p.EventID)))
		dst = append(dst, p.EventID...)
	}
	return dst, keys
}

// find returns the event id of the PDU with a key, and how many there are in the list.
func (l pduList) find(key *inboundKey) (eventID string, found bool, n int64, err error) {
	for ; len(l) > 0; n++ {
		if len(l) < hashBytes {
			return "", false, 0, notOurRow("a list of PDUs that is cut off")
		}
		size, w := binary.Uvarint(l[hashBytes:])
		if w <= 0 || size > uint64(len(l)-hashBytes-w) {
			return "", false, 0, notOurRow("a list of PDUs with an event id of %d bytes", size)
		}
		end := hashBytes + w + int(size)
		if !found && bytes.Equal(l[:hashBytes], key[:]) {
			eventID, found = string(l[hashBytes+w:end]), true
		}
		l = l[end:]
	}
	return eventID, found, n, nil
}

// inboundGens yields the generations of the table (schema.go), the newest first.
var inboundGens = fmt.Sprintf(`WITH RECURSIVE gen (n) AS (SELECT max(id) >> %[1]d FROM inbound UNION ALL
	SELECT n - 1 FROM gen WHERE n > (SELECT min(id) >> %[1]d FROM inbound)) `, inboundGen)

// findInbound is a join that finds the rows of a transaction, by hash and key.
var findInbound = fmt.Sprintf("FROM gen CROSS JOIN inbound t ON t.id >> %d = n AND t.hash = ?1 WHERE t.key = ?2 ", inboundGen)

// These yield NULL for what is larger than it may be, so that a damaged row does not
// take memory.
var (
	loadInboundQuery = inboundGens + fmt.Sprintf("SELECT size, length(list), sum, iif(length(answer) <= %d, answer, NULL) ", MaxInboundAnswer) +
		findInbound + "AND t.answered > ?3 LIMIT 1"
	inboundPDUQuery = inboundGens + fmt.Sprintf(`SELECT t.pdus, iif(length(t.list) <= %d, t.list, NULL)
		FROM gen CROSS JOIN inbound_pdu p ON p.gen = n AND p.hash = ?1 CROSS JOIN inbound t ON t.id = p.txn
		WHERE t.answered > ?2`, maxPDUList)
)

// InboundAnswer is what LoadInbound finds of an InboundTxn.
type InboundAnswer struct {
	Answer []byte // nil if it was empty
	Sum    int64
}

// LoadInbound returns the stored answer to a transaction, and whether there is one,
// answered after since (Unix ms). It sees whatever was completed before the call, reads
// a few pages, and waits for nobody but other look-ups. A row that cannot be one of ours
// is as good as none (Stats.Damaged).
func (s *Store) LoadInbound(origin matrix.ServerName, id string, since int64) (a InboundAnswer, found bool, err error) {
	key := newInboundKey(origin, id)
	var bad error
	err = s.lookUp("load inbound transaction", func(r *reader) error {
		return r.inbound.query(func(vals []driver.Value) error {
			a, bad = scanInbound(vals)
			found = bad == nil
			return nil
		}, key.hash(), key[:], since)
	})
	if bad != nil {
		s.leftOut("inbound", 1, bad)
	}
	if !found || err != nil {
		return InboundAnswer{}, false, err
	}
	return a, true, nil
}

func scanInbound(vals []driver.Value) (a InboundAnswer, err error) {
	var size, list int64
	if err := scan(vals, &size, &list, &a.Sum, &a.Answer); err != nil {
		return InboundAnswer{}, err
	}
	if n := int64(len(a.Answer)) + list; n != size {
		return InboundAnswer{}, notOurRow("an answer and PDUs of %d bytes, counted as %d", n, size)
	}
	return a, nil
}

// InboundPDUs returns the event ids of PDUs of an origin, by their hashes and in the
// order of these, "" for those that are not known. ok is false if one of them was not
// acknowledged after since (Unix ms), in whatever transaction, or if there are no
// hashes. What is written meanwhile may show; else it is as LoadInbound.
func (s *Store) InboundPDUs(origin matrix.ServerName, hashes [][32]byte, since int64) (eventIDs []string, ok bool, err error) {
	if len(hashes) == 0 {
		return nil, false, nil
	}
	for i := range hashes {
		id, found, err := s.inboundPDU(newInboundKey(origin, hashes[i][:]), since)
		if !found || err != nil {
			return nil, false, err
		}
		eventIDs = append(eventIDs, id)
	}
	return eventIDs, true, nil
}

func (s *Store) inboundPDU(key inboundKey, since int64) (eventID string, found bool, err error) {
	var bad int64
	var why error
	err = s.lookUp("load inbound PDU", func(r *reader) error {
		err := r.inboundPDU.query(func(vals []driver.Value) error {
			var pdus, n int64
			var list []byte
			err := scan(vals, &pdus, &list)
			if err == nil {
				eventID, found, n, err = pduList(list).find(&key)
			}
			if err == nil && n != pdus {
				err = notOurRow("%d PDUs, counted as %d", n, pdus)
			}
			switch {
			case err != nil:
				bad, why, found = bad+1, err, false
			case found:
				return errStop
			}
			return nil // another with the same hash may follow
		}, key.hash(), since)
		if errors.Is(err, errStop) {
			return nil
		}
		return err
	})
	if bad > 0 {
		s.leftOut("inbound", bad, why)
	}
	return eventID, found && err == nil, err
}

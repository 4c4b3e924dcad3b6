package sim

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"hash/maphash"
	"net/http"

	"fsbus/bus/matrix"
)

// The largest numbers of PDUs and EDUs in a transaction (S2S "Transactions", v1.18).
const (
	maxTransactionPDUs = 50
	maxTransactionEDUs = 100
)

// EventID returns what the statistics know a PDU by: its event_id if it has one,
// else "$" and its content hash. The latter is not the id that newer room
// versions define, but differs for different events all the same and needs no
// knowledge of the room. A PDU without a hash is known by its bytes.
func EventID(pdu []byte) string {
	var fields struct {
		EventID string `json:"event_id"`
		Hashes  struct {
			SHA256 string `json:"sha256"`
		} `json:"hashes"`
	}
	if err := json.Unmarshal(pdu, &fields); err == nil {
		switch {
		case fields.EventID != "":
			return fields.EventID
		case fields.Hashes.SHA256 != "":
			return "$" + fields.Hashes.SHA256
		}
	}
	sum := sha256.Sum256(pdu)
	return "$" + base64.RawURLEncoding.EncodeToString(sum[:])
}

// send takes a transaction: once for each origin and transaction id, however
// often it comes (S2S "Transactions", v1.18). The answer is the same each time.
func send(s *server, r *request) answer {
	var txn struct {
		Origin string             `json:"origin"`
		PDUs   *[]json.RawMessage `json:"pdus"`
		EDUs   []struct {
			Type string `json:"edu_type"`
		} `json:"edus"`
	}
	rec := s.world.recorder
	if json.Unmarshal(r.body, &txn) != nil || txn.PDUs == nil {
		rec.refused()
		return notJSON()
	}
	if r.origin != "" && txn.Origin != r.origin {
		rec.refused()
		return refusal(http.StatusForbidden, matrix.MForbidden, "the transaction is another server's")
	}
	if len(*txn.PDUs) > maxTransactionPDUs || len(txn.EDUs) > maxTransactionEDUs {
		rec.refused()
		return refusal(http.StatusBadRequest, matrix.MUnknown, "too many PDUs or EDUs")
	}
	ids := make([]string, len(*txn.PDUs))
	results := make(object, len(ids))
	for i, pdu := range *txn.PDUs {
		ids[i] = EventID(pdu)
		results[ids[i]] = object{}
	}
	types := make([]string, len(txn.EDUs))
	for i, edu := range txn.EDUs {
		types[i] = edu.Type
	}
	s.take(txn.Origin, r.PathValue("txn"), r.body, ids, types)
	return ok(object{"pdus": results})
}

// take remembers a transaction and counts what is new in it.
func (s *server) take(origin, txn string, body []byte, ids, types []string) {
	hashes := s.world.hashes
	key := maphash.String(hashes, origin+"\x00"+txn)
	sum := maphash.Bytes(hashes, body)

	s.mu.Lock()
	first, known := s.transactions.add(key, sum, maxTransactions)
	fresh := ids[:0:0]
	if !known {
		for _, id := range ids {
			if _, had := s.pdus.add(maphash.String(hashes, id), 0, s.world.config.Remember); !had {
				fresh = append(fresh, id)
			}
		}
	}
	s.mu.Unlock()

	if known {
		s.world.recorder.repeated(first != sum)
		return
	}
	s.world.recorder.taken(s, fresh, len(ids)-len(fresh), types)
}

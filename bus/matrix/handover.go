package matrix

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

// HandoverVersion is the version of the hand-over's format that is spoken here
// (scripts/synapse/FORMAT.md): the module in Synapse gives each payload once, with the
// servers that get it.
const HandoverVersion = 1

// The most that a Handover may have. The module is told, and splits what is larger.
const (
	MaxHandoverBytes   = 1 << 20
	MaxHandoverItems   = 200
	MaxHandoverSets    = 200
	MaxHandoverServers = 5000    // of all sets of a request, each counted once in each
	MaxHandoverPairs   = 100_000 // of an item and a server
	maxHandoverText    = 128     // bytes of a version or hash
	maxPDUBytes        = 65536   // of an event (S2S 5.1, "Size limits" of the client-server API)
)

var (
	// ErrHandover: it is not what FORMAT.md says.
	ErrHandover = errors.New("the hand-over is malformed")
	// ErrHandoverVersion: it is of a version that is not known.
	ErrHandoverVersion = errors.New("the version of the hand-over is not known")
	// ErrHandoverTooLarge: it has more of something than it may, and should be split.
	ErrHandoverTooLarge = errors.New("the hand-over is too large")
)

// Handover is one request of the module.
type Handover struct {
	Module  string // the hash of its file, in hex; "" if it does not say
	Synapse string // the homeserver's version; "" if it does not say
	Sets    []HandoverSet
	Items   []HandoverItem
}

// HandoverSet is a list of servers and its name.
type HandoverSet struct {
	ID      string
	Servers []string // sorted, each once; they may be no server names
}

// HandoverItem is a payload and the name of the servers that get it.
type HandoverItem struct {
	To    string
	Items []Item // what it is to the outbox: an EDU may be several
	// Wrong says why it cannot be sent; then Items is empty.
	Wrong string
}

// ParseHandover reads the body of a POST. The errors are listed above, and quote no part
// of it. An item that cannot be sent is no error.
func ParseHandover(body []byte) (*Handover, error) {
	if len(body) > MaxHandoverBytes {
		return nil, fmt.Errorf("%w: %d bytes", ErrHandoverTooLarge, len(body))
	}
	var raw struct {
		Version int64  `json:"version"`
		Module  string `json:"module"`
		Synapse string `json:"synapse"`
		Sets    []struct {
			ID      string   `json:"id"`
			Servers []string `json:"servers"`
		} `json:"sets"`
		Items []struct {
			PDU json.RawMessage `json:"pdu"`
			EDU json.RawMessage `json:"edu"`
			To  string          `json:"to"`
		} `json:"items"`
	}
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, fmt.Errorf("%w: it is no JSON of this form", ErrHandover)
	}
	switch {
	case raw.Version != HandoverVersion:
		return nil, fmt.Errorf("%w: %d", ErrHandoverVersion, raw.Version)
	case len(raw.Module) > maxHandoverText || len(raw.Synapse) > maxHandoverText:
		return nil, fmt.Errorf("%w: a version of more than %d bytes", ErrHandover, maxHandoverText)
	case len(raw.Items) > MaxHandoverItems || len(raw.Sets) > MaxHandoverSets:
		return nil, fmt.Errorf("%w: %d items, %d sets", ErrHandoverTooLarge, len(raw.Items), len(raw.Sets))
	}
	h := &Handover{Module: raw.Module, Synapse: raw.Synapse}
	servers := 0
	for i := range raw.Sets {
		s := HandoverSet{raw.Sets[i].ID, raw.Sets[i].Servers}
		slices.Sort(s.Servers)
		s.Servers = slices.Compact(s.Servers)
		if s.ID != HandoverSetID(s.Servers) {
			return nil, fmt.Errorf("%w: the name of set %d is not that of its servers", ErrHandover, i)
		}
		if servers += len(s.Servers); servers > MaxHandoverServers {
			return nil, fmt.Errorf("%w: more than %d servers", ErrHandoverTooLarge, MaxHandoverServers)
		}
		h.Sets = append(h.Sets, s)
	}
	for i := range raw.Items {
		it := &raw.Items[i]
		if (it.PDU == nil) == (it.EDU == nil) {
			return nil, fmt.Errorf("%w: item %d has not one of pdu and edu", ErrHandover, i)
		}
		h.Items = append(h.Items, handoverItem(it.PDU, it.EDU, it.To))
	}
	return h, nil
}

func handoverItem(pdu, edu json.RawMessage, to string) HandoverItem {
	h := HandoverItem{To: to}
	form := `{"edus":[%s]}`
	payload := edu
	if pdu != nil {
		form, payload = `{"pdus":[%s]}`, pdu
	}
	switch {
	case len(pdu) > maxPDUBytes:
		h.Wrong = "the event is too large"
	case !utf8.Valid(payload):
		h.Wrong = "it is not UTF-8"
	default:
		txn, err := ParseTransaction(fmt.Appendf(nil, form, payload))
		if err != nil && !errors.Is(err, ErrNoOrigin) {
			h.Wrong = "it is malformed"
			break
		}
		if len(txn.EDUs) > 0 && txn.EDUs[0].Type == "" {
			h.Wrong = "the EDU has no type"
			break
		}
		h.Items = txn.Items(nil)
	}
	return h
}

// HandoverSetID returns the name of a set of servers, which are sorted, each once.
func HandoverSetID(servers []string) string {
	sum := sha256.New()
	for _, s := range servers {
		sum.Write([]byte(s))
		sum.Write([]byte{'\n'})
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

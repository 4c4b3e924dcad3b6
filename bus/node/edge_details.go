package node

import (
	"fmt"
	"net/http"
	"sync"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/sched"
)

const (
	// perRequest is what a request takes of memory besides its body, with usualDetails
	// of what its sender decides about: 16 KiB measured with HTTP/2, of which 7 are
	// its goroutine's stack and 4 the buffer for its answer; 13 KiB with HTTP/1.1.
	perRequest   = 16 << 10
	usualDetails = 2 << 10
	// maxHeader bounds the header of a request of another server, in bytes of memory
	// (headerSize). One key makes 1 KiB of it, and ten fields of a proxy 2 KiB.
	maxHeader = 16 << 10
	// maxDetails is what a request has at most beyond usualDetails: the header, a
	// target of 8 KiB, as netx has it, the names of its keys, and of a transaction 50
	// rooms, the hashes of as many events and of 256 items.
	maxDetails = 44 << 10
	// detailsShare is the part of all of it that one address may have.
	detailsShare = 4
)

// A field of a header costs this much in the map of net/http and in the copy of it
// that is forwarded, and each of its values.
const (
	fieldCost = 144
	valueCost = 32
)

// headerSize returns what a header takes of memory, in bytes.
func headerSize(h http.Header) (n int64) {
	for name, values := range h { // a sum
		n += fieldCost + int64(len(name))
		for _, v := range values {
			n += valueCost + int64(len(v))
		}
	}
	return n
}

// size returns what is kept of the signatures besides the header, in bytes.
func (a *auth) size() int64 {
	n := int64(len(a.origin))
	for i := range a.signatures {
		x := &a.signatures[i]
		n += 4*16 + 16 + int64(len(x.Key)) // four strings, of which the key is a copy, and it again as edge.Arrived has it
	}
	return n
}

// txnSize returns what is kept of a transaction, in bytes.
func txnSize(t *edge.Txn) int64 {
	if t == nil {
		return 0
	}
	n := int64(len(t.ID)) + 8*int64(cap(t.Covers)) + int64(len(edge.Hash{}))*int64(cap(t.Hashes)) + 16*int64(cap(t.Rooms))
	for _, r := range t.Rooms {
		n += int64(len(r))
	}
	return n
}

// details bounds what requests take of memory beyond the usual: what is in the bodies
// lies on disk if it is much, but headers and lists do not. What requests have for
// longer than the core knows of them, while their answers are not read, counts too.
type details struct {
	limit int64

	mu   sync.Mutex
	used int64
	by   map[string]int64 // by address
}

func newDetails(limit int64) *details {
	return &details{limit: limit, by: make(map[string]int64)}
}

// take reserves n bytes for a request from an address, unless all are in use, or its
// share of them. "" is nobody in particular.
func (d *details) take(peer string, n int64) bool {
	if n == 0 {
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.used+n > d.limit || peer != "" && d.by[peer]+n > max(d.limit/detailsShare, maxDetails) {
		return false
	}
	d.used += n
	d.by[peer] += n
	return true
}

// give returns what take reserved.
func (d *details) give(peer string, n int64) {
	if n == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.used -= n
	if d.by[peer] -= n; d.by[peer] == 0 {
		delete(d.by, peer)
	}
	if d.used < 0 || d.by[peer] < 0 {
		panic(fmt.Sprintf("node: %d bytes of details of %q are given back twice: %d are in use, %d of them its", n, peer, d.used, d.by[peer]))
	}
}

// hold keeps a request's details until drop.
func (c *caller) hold() { c.holds.Add(1) }

// drop gives them back with the last hold.
func (s *edgeShell) drop(c *caller) {
	if c.holds.Add(-1) == 0 {
		s.details.give(c.peer, c.extra)
	}
}

// requestsMemory returns how many bytes the requests of other servers have in memory:
// in the spool, and for what is not in bodies.
func (e *EdgeConfig) requestsMemory() (spool, details int64) {
	m := int64(e.SpoolMemory)
	return m - m/4, int64(leastDetails) + m/4
}

// leastDetails is what there is of the latter without any spool_memory.
const leastDetails = 128 * sched.KiB

// busyBody is the answer to a request whose details have no room.
var busyBody = matrix.ErrorJSON(matrix.MUnknown, "fsbus: too many large requests are under way")

package netx

import "net/netip"

// FairPlaces hands out places to clients so that some cannot keep all the others from
// them; see mayTake. It is not for several goroutines at a time.
type FairPlaces struct {
	limit, used int
	by          shares
}

// NewFairPlaces returns so many places.
func NewFairPlaces(limit int) *FairPlaces { return &FairPlaces{limit: limit, by: newShares()} }

// Take takes a place for a client, as EdgeRequest.ClientKey names it, if it may have one.
func (f *FairPlaces) Take(key netip.Addr) bool {
	if !mayTake(key, f.by.weight(key), f.used, f.limit) {
		return false
	}
	f.used++
	f.by.add(key, 1)
	return true
}

// Give gives back what Take took.
func (f *FairPlaces) Give(key netip.Addr) {
	f.used--
	f.by.add(key, -1)
}

// Used returns how many places are taken.
func (f *FairPlaces) Used() int { return f.used }

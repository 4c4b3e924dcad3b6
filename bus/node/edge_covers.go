package node

import (
	"hash/maphash"
	"slices"
)

// maxCovers is how many items of presence and typing a transaction may hold for
// the bus to find out that a newer one says all that it says.
const maxCovers = 256

// hasher makes short marks of keys, with a secret seed: nobody can make two that
// are alike on purpose.
type hasher struct{ seed maphash.Seed }

func newHasher() hasher { return hasher{maphash.MakeSeed()} }

// sums returns the marks of keys, ascending and each once; nil if there are too
// many.
func (h hasher) sums(keys [][]byte) []uint64 {
	if len(keys) > maxCovers {
		return nil
	}
	sums := make([]uint64, 0, len(keys))
	for _, k := range keys {
		sums = append(sums, maphash.Bytes(h.seed, k))
	}
	slices.Sort(sums)
	return slices.Compact(sums)
}

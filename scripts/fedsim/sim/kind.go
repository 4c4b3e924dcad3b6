package sim

import (
	"fmt"
	"math"
	"math/rand/v2"
)

// Kind is how a server behaves. The zero value is Well.
type Kind uint8

// The kinds of server.
const (
	Well    Kind = iota
	Dead         // refuses connections: nothing listens
	Hanging      // accepts connections and never says a word
	Slow         // answers after Config.SlowDelay
	Limited      // answers 429 with retry_after_ms to what exceeds Config.Rate
	Failing      // answers 502 with an HTML page, as a proxy before a stopped homeserver does
	Cut          // closes the connection in the middle of each answer's body
	Garbage      // answers with bytes that are not HTTP
	NumKinds
)

var kindNames = [NumKinds]string{"well", "dead", "hanging", "slow", "limited", "failing", "cut", "garbage"}

// String returns the name that flags, the driver and statistics use.
func (k Kind) String() string {
	if k >= NumKinds {
		return "invalid"
	}
	return kindNames[k]
}

// ParseKind is the inverse of String.
func ParseKind(s string) (Kind, error) {
	for k, name := range kindNames {
		if name == s {
			return Kind(k), nil
		}
	}
	return 0, fmt.Errorf("%q is not a kind of server: want one of %v", s, kindNames)
}

// Shares is the part of all servers, 0 to 1, that is of each kind, as in
// Shares{Dead: 0.05, Slow: 0.1}. Well servers are what remains; their own share
// is not set.
type Shares [NumKinds]float64

// counts turns shares into numbers of servers out of n, each rounded to the
// nearest.
func (sh Shares) counts(n int) ([NumKinds]int, error) {
	var counts [NumKinds]int
	left := n
	for k, share := range sh {
		kind := Kind(k)
		if !(share >= 0 && share <= 1) { // not NaN either
			return counts, fmt.Errorf("share of %v servers is %v: want 0 to 1", kind, share)
		}
		if kind == Well {
			if share != 0 {
				return counts, fmt.Errorf("share of %v servers is %v: it is what the others leave", kind, share)
			}
			continue
		}
		counts[k] = int(math.Round(share * float64(n)))
		left -= counts[k]
	}
	if left < 0 {
		return counts, fmt.Errorf("shares of faulty servers make %d out of %d", n-left, n)
	}
	counts[Well] = left
	return counts, nil
}

// assign gives n servers their kinds: as many of each as Shares asks for, which
// ones is up to the seed.
func (sh Shares) assign(n int, seed uint64) ([]Kind, error) {
	counts, err := sh.counts(n)
	if err != nil {
		return nil, err
	}
	kinds := make([]Kind, 0, n)
	for k, count := range counts {
		for range count {
			kinds = append(kinds, Kind(k))
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	rng.Shuffle(n, func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	return kinds, nil
}

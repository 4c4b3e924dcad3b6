package sched

import "fmt"

// Stride shares turns among up to 32 classes in proportion to their weights
// (stride scheduling, Waldspurger 1995): a class of weight 8 gets eight turns
// for each one of a class of weight 1 while both want turns, and no class that
// wants turns waits for ever. A class that did not want turns saves none up.
// All arithmetic is on integers, so that a seed replays on any processor.
type Stride struct {
	step []uint64
	pass []uint64
	now  uint64 // pass of the latest turn
}

const strideUnit = 1 << 20

// NewStride returns a Stride for classes 0..len(weights)-1. A weight below 1
// panics.
func NewStride(weights []int32) *Stride {
	s := &Stride{step: make([]uint64, len(weights)), pass: make([]uint64, len(weights))}
	if len(weights) > 32 {
		panic(fmt.Sprintf("sched: %d classes, 32 at most", len(weights)))
	}
	for i, w := range weights {
		if w < 1 {
			panic(fmt.Sprintf("sched: class %d has weight %d", i, w))
		}
		s.step[i] = strideUnit / uint64(w)
	}
	return s
}

// Pick gives a turn to one of the classes whose bit is set in wanting and
// returns it, or -1 when none wants one. Among equals the lowest wins.
func (s *Stride) Pick(wanting uint32) int {
	best := -1
	var bestPass uint64
	for i := range s.step {
		if wanting&(1<<i) == 0 {
			continue
		}
		if p := max(s.pass[i], s.now); best < 0 || p < bestPass {
			best, bestPass = i, p
		}
	}
	if best >= 0 {
		s.now = bestPass
		s.pass[best] = bestPass + s.step[best]
	}
	return best
}

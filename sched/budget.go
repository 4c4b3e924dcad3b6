package sched

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Bytes is an amount of memory or disk, in bytes. In a configuration it is
// written with a unit: "512KiB", "64MiB", "1GiB"; "0" is nothing.
type Bytes int64

// Units of Bytes.
const (
	KiB Bytes = 1 << 10
	MiB Bytes = 1 << 20
	GiB Bytes = 1 << 30
)

// ErrBytes is wrapped by every error of ParseBytes.
var ErrBytes = errors.New(`not a size: write a whole number and a unit, as in "64MiB" (B, KiB, MiB, GiB)`)

// ParseBytes reads the form that String writes. A number without a unit is
// refused, except 0: nobody should have to guess whether it meant megabytes.
func ParseBytes(s string) (Bytes, error) {
	num, unit := s, Bytes(0)
	for _, u := range []struct {
		name string
		size Bytes
	}{{"KiB", KiB}, {"MiB", MiB}, {"GiB", GiB}, {"B", 1}} {
		if rest, ok := strings.CutSuffix(s, u.name); ok {
			num, unit = strings.TrimSuffix(rest, " "), u.size
			break
		}
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n < 0 || strings.HasPrefix(num, "+") {
		return 0, fmt.Errorf("%q: %w", s, ErrBytes)
	}
	if unit == 0 {
		if n != 0 {
			return 0, fmt.Errorf("%q: %w", s, ErrBytes)
		}
		unit = 1
	}
	if n > math.MaxInt64/int64(unit) {
		return 0, fmt.Errorf("%q is too large: %w", s, ErrBytes)
	}
	return Bytes(n) * unit, nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) error {
	v, err := ParseBytes(string(text))
	if err != nil {
		return err
	}
	*b = v
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// String returns b with the largest unit that divides it evenly.
func (b Bytes) String() string {
	switch {
	case b == 0:
		return "0"
	case b%GiB == 0:
		return strconv.FormatInt(int64(b/GiB), 10) + "GiB"
	case b%MiB == 0:
		return strconv.FormatInt(int64(b/MiB), 10) + "MiB"
	case b%KiB == 0:
		return strconv.FormatInt(int64(b/KiB), 10) + "KiB"
	}
	return strconv.FormatInt(int64(b), 10) + "B"
}

// Slots counts things of which only so many may exist at a time: workers,
// connections, requests that wait.
type Slots int32

// Gauge is an amount in use out of an amount allowed. The zero value allows
// nothing. It panics when it is given back more than was taken, since from
// then on no limit that it guards would hold.
type Gauge struct {
	Used, Limit, Max Slots
}

// Free reports how many slots are left; a limit lowered below the use gives 0.
func (g *Gauge) Free() Slots { return max(0, g.Limit-g.Used) }

// Take uses one slot, over the limit if need be: a caller that must not
// exceed it asks Free first.
func (g *Gauge) Take() {
	g.Used++
	g.Max = max(g.Max, g.Used)
}

// Give returns one slot.
func (g *Gauge) Give() {
	if g.Used <= 0 {
		panic(fmt.Sprintf("sched: gauge gives back a slot that nobody took: used %d of %d", g.Used, g.Limit))
	}
	g.Used--
}

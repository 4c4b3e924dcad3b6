package bus

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"fsbus/sched"
)

// AckPace says how fast stored transactions are answered: AckAuto, AckOff, or
// a number of answers a second. The zero value is AckAuto.
type AckPace int32

const (
	AckAuto AckPace = 0  // between Floor and Ceiling, as the host can bear
	AckOff  AckPace = -1 // at once
)

// ErrAckPace is wrapped by every error of AckPace.UnmarshalText.
var ErrAckPace = errors.New(`not a pace: write "auto", "off" or a number of answers a second from 1 to 10000`)

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *AckPace) UnmarshalText(text []byte) error {
	switch string(text) {
	case "auto":
		*a = AckAuto
	case "off":
		*a = AckOff
	default:
		n, err := strconv.ParseInt(string(text), 10, 32)
		if err != nil || n < 1 || n > maxPace || text[0] == '+' {
			return fmt.Errorf("%q: %w", text, ErrAckPace)
		}
		*a = AckPace(n)
	}
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (a AckPace) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// String returns what UnmarshalText reads.
func (a AckPace) String() string {
	switch {
	case a == AckAuto:
		return "auto"
	case a < 0:
		return "off"
	}
	return strconv.Itoa(int(a))
}

// PaceConfig bounds a Pacer. The zero value is not valid; start from
// DefaultPace.
type PaceConfig struct {
	// Ack is the pace at which held answers are given, oldest first.
	Ack AckPace
	// Floor and Ceiling are the slowest and the fastest pace of AckAuto, in
	// answers a second. N answers held are given at N/Hold a second at least,
	// whatever is set here.
	Floor, Ceiling int32
	// Hurry is by how much faster those answers are given behind which a PDU
	// probably waits.
	Hurry int32
	// Hold is how long an answer is held at most. Synapse gives up after 60 s.
	Hold time.Duration
	// MaxHeld is how many answers are held at most. Beyond it the oldest is
	// given at once.
	MaxHeld int32

	// SmallRoom is up to how many destinations a room counts as small.
	SmallRoom int32
	// Talk is for how long after an event of a small room a destination is
	// taken to be in a conversation, so that its answers are not held.
	Talk time.Duration
	// Prompt is how many answers a second are given at once because of small
	// rooms or conversations. Beyond it conversations wait for their turn, and
	// destinations of small rooms are treated as all others.
	Prompt int32

	// MaxRooms, MaxDestinations and MaxBytes bound what is remembered of who
	// is in which room; MaxDestinations must be above MaxHeld.
	MaxRooms, MaxDestinations int32
	MaxBytes                  sched.Bytes
}

// DefaultPace returns what keeps a Synapse on one core responsive; package
// bus/sim prints the figures that the numbers were chosen by.
func DefaultPace() PaceConfig {
	return PaceConfig{
		Ack:             AckAuto,
		Floor:           10,
		Ceiling:         25,
		Hurry:           8,
		Hold:            20 * time.Second,
		MaxHeld:         4000,
		SmallRoom:       9, // as Synapse: fewer than 10 (send_read_receipt in federation/sender)
		Talk:            5 * time.Minute,
		Prompt:          60, // above the 50 destinations a second that presence wakes (_DestinationWakeupQueue)
		MaxRooms:        2000,
		MaxDestinations: 4500,
		MaxBytes:        2304 * sched.KiB,
	}
}

const (
	// maxHold leaves time for what happens before and after the holding
	// within the 60 s after which Synapse takes a transaction for failed.
	maxHold = 45 * time.Second
	maxPace = 10000
	// maxHeld keeps the arithmetic on rates within 64 bits.
	maxHeld = 1000000
)

// Validate reports the first limit that makes no sense or contradicts another.
func (c PaceConfig) Validate() error {
	switch {
	case c.Ack < AckOff || c.Ack > maxPace:
		return fmt.Errorf("ack_pace is %d: %w", int32(c.Ack), ErrAckPace)
	case c.Floor < 1 || c.Ceiling < c.Floor || c.Ceiling > maxPace:
		return fmt.Errorf("ack_pace_floor is %d and ack_pace_ceiling %d, they must be in order and between 1 and %d", c.Floor, c.Ceiling, maxPace)
	case c.Hurry < 1 || c.Hurry > 100:
		return fmt.Errorf("ack_hurry is %d, it must be between 1 and 100", c.Hurry)
	case c.Hold < time.Second || c.Hold > maxHold:
		return fmt.Errorf("ack_hold is %v, it must be between 1s and %v: Synapse waits for 60s", c.Hold, maxHold)
	case c.MaxHeld < 1 || c.MaxHeld > maxHeld:
		return fmt.Errorf("ack_held is %d, it must be between 1 and %d", c.MaxHeld, maxHeld)
	case c.SmallRoom < 1:
		return fmt.Errorf("ack_small_room is %d, at least 1 is needed", c.SmallRoom)
	case c.Talk < 0:
		return fmt.Errorf("ack_talk is %v, it must not be negative", c.Talk)
	case c.Prompt < 1 || c.Prompt > maxPace:
		return fmt.Errorf("ack_prompt is %d, it must be between 1 and %d", c.Prompt, maxPace)
	case c.MaxRooms < 1:
		return fmt.Errorf("ack_rooms is %d, at least 1 is needed", c.MaxRooms)
	case c.MaxDestinations <= c.MaxHeld:
		return fmt.Errorf("ack_destinations is %d, it must be above ack_held (%d)", c.MaxDestinations, c.MaxHeld)
	case c.MaxBytes < sched.Bytes(c.MaxDestinations)*destCost+roomCost:
		return fmt.Errorf("ack_memory is %v, %d destinations and a room need %v", c.MaxBytes, c.MaxDestinations, sched.Bytes(c.MaxDestinations)*destCost+roomCost)
	}
	return nil
}

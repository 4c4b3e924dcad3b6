package matrix

// Class is the priority class of a request (DESIGN.md 4). Lower numbers are
// served more often; no class starves. The zero value is not a class.
type Class uint8

// The classes, most urgent first.
const (
	ClassJoin     Class = 1 + iota // joins, invites, leaves, knocks, directory, policy
	ClassEvent                     // PDUs, missing events, event, event_auth
	ClassKey                       // server keys
	ClassDevice                    // devices, one-time keys, to-device
	ClassLookup                    // profiles, hierarchy, public rooms, media
	ClassPresence                  // presence, typing, receipts only
	ClassState                     // backfill, state, resync
	NumClasses    = 7
)

var classNames = [NumClasses + 1]string{"none", "join", "event", "key", "device", "lookup", "presence", "state"}

// String returns the class's name as metrics and the status page show it.
func (c Class) String() string {
	if int(c) >= len(classNames) {
		return "invalid"
	}
	return classNames[c]
}

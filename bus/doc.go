// Package bus is the core: it decides what is done with the homeserver's
// requests, for whom, and when. It is pure: time is an argument, randomness is
// handed in, and there is no clock, no goroutine, no I/O and no body, only
// references, sizes, keys and classes. Package bus/node executes what it
// decides, package bus/sim runs it through a simulated world.
//
// # Events and effects
//
// Machine.Step takes one event and returns effects. Duties of the caller:
//
//  1. Restored comes first, once; then events in the order in which they
//     happen. Tick comes at the moment that NextWake names.
//  2. Effects are executed in the order in which they stand.
//  3. Each Send is answered by exactly one Done, after at most one Connected
//     and one Answered; each Commit by exactly one Committed.
//  4. A request's body is held until Free, an answer until Discard, a packed
//     transaction until Unpack. Exactly one Free comes for each Arrived and each
//     Offered, one Discard for each Send, one Unpack for each Packed that has a
//     transaction.
//  5. Each Load is answered by exactly one Loaded; what it brings is held as an
//     attempt's answer, until Discard. Each LoadKeys is answered by exactly one
//     KeysLoaded.
//  6. Each Accept, Pack, Settle, Compact and Expire is answered by exactly one
//     Accepted, Packed, Settled or Trimmed, in the order in which they took effect
//     on disk, and that in the order of the effects.
//
// # A request's way
//
// A fresh answer from the cache ends it at once. An equal one that runs is
// joined, if the endpoint table allows that. A host that is backing off refuses
// it, or gives an old answer. Else it becomes a call in its host's queue, and
// dispatch starts it when a worker is free: classes share the workers by
// weight, and each, with all below it, keeps to a share of them; hosts that are
// proven, slow, unknown and failing have workers of their own (lanes); within a class
// hosts take turns. What has waited for long rides on a better class's turn,
// and in a flood of look-ups every other turn goes to the newest.
//
// A host takes so many attempts at a time and in a second, and its first one
// goes alone, as the pre-flight of the others. One that does not connect while
// others wait for its worker is put back, its host among the failing ones. A
// failing host is tried only after the intent is on disk.
//
// # Invariants
//
// Machine.Check recounts them, bus/sim asserts them after each step:
//
//   - every request is answered once, or gone; before its caller's time-out, unless
//     a Load for it takes that long;
//   - no more attempts than workers, nor than a host's own limits;
//   - no attempt at a failing host before its time;
//   - what must not be sent twice never reaches a remote twice;
//   - all running totals agree with a recount.
//
// A broken one panics with its numbers.
//
// # Limits
//
// Config bounds requests, hosts, workers, keys that are wanted and what is kept. A
// list of ready hosts holds at most twice as many entries as there are hosts, a
// queue of calls at most twice the live ones and sixteen. There are as many queues as destinations
// with something pending, which the store bounds; those that have a call are
// bounded so that lookups always find a place for their host.
//
// # Answers kept
//
// The small ones that were used lately are held in memory. Those of durable
// endpoints are stored, some at a time, and of all that are stored the times are
// known, so that one is only loaded if it can be used: as a fresh answer, or as an
// old one where the host fails. Whole answers to joins and media stay in the
// spool's files. All three drop what is oldest or was not used for longest.
//
//   - an answer is used only for a request with its key, or for one that asks for a
//     field of it;
//   - an old one only where the remote would not answer.
//
// # The key desk
//
// A query for server keys is looked up in the store; what is missing is fetched,
// each server once, in batches from its notary, or from the servers themselves
// where the bus is the notary; when nothing of it is under way any more it is
// answered from the store. So a key is in an answer only if the shell has checked
// and stored it. A fetch holds up a query for Config.Keys.Wait at most and goes on
// for the next who asks.
//
// A KeyWanted is for one key, to check a signature of a request that came in. Its
// server is asked, and where that cannot be reached the last notary. A server of
// which only that is known is forgotten when it fails.
//
//   - one fetch at a time for a server by one way;
//   - a query is answered before its caller's time-out, with what there is.
//
// # Held answers
//
// A caller gives the whole body of an answer to a join, or of a state, some time
// from its headers on. These are held back until the rest is sure to follow: all of
// it is here, or its rate says so, or the caller comes for the last time. A caller
// that cannot wait is told to come again. The call goes on meanwhile (RunOn), the
// next equal request joins it, and the answer stays for one that comes later still.
//
//   - nobody gets a half answer to a join, but at the last try.
//
// # Joins
//
// A make_join opens its room's window. While one is asking or sending, the shares
// of classes 5 to 7 are a quarter, of which each keeps one worker. When the
// homeserver has the answer, requests for the room's state are of class 2, until
// none has come for a minute. The servers and keys that are seen in the answer are
// connected to and fetched ahead, at a rate and within bounds. JoinWindow tells the
// shell in which rooms the homeserver is just sending its join.
//
// # The outbox
//
// A transaction of the homeserver is Offered, stored (Accept), and answered
// (Acknowledge) when the Pacer says so: never before it is stored. What is pending
// for a destination is a queue, which knows counts and ages, no items. When its
// window is over and nothing holds it back it becomes a call like any other, of
// the class of the best that it holds; so deliveries and requests share workers,
// lanes and hosts. A worker packs (Pack), sends (Send) and is free; the outcome is
// noted (Settle) before the next is packed:
//
//   - 200: delivered.
//   - Nothing of it was ever sent: the transaction is taken apart again, so that
//     what is pending goes on merging while the destination is away.
//   - Anything else: it stays as it is, under its id, and is tried again after a
//     back-off: the host's when it could not be reached, else the queue's own.
//
// # Whose fault it is
//
// When the same comes of a batch two or three times in a row, whatever it is, an empty
// transaction is sent, the control (verdict.go). If that does not go well either, the
// server is ill: what is pending waits, and the control finds out when the server is
// well, but for every fourth attempt. If it goes well, the batch is sent once more in
// its time, and the control after it; only then are its items divided, until the one
// that is refused stands alone and is set aside. After that the next that stands alone
// has an hour, if the destination has taken nothing in between.
//
// A back-off belongs to what failed. Requests and transactions have their own where the
// host was reached, and the host has one for both where it was not. So a look-up that is
// answered ends the wait for a host that could not be reached, and no other; nor does a
// server that answers no requests go without its events.
//
// A 401 is about our key, as its receiver knows it. Such a wait ends a second after
// somebody has fetched our keys (KeyServed, at most every 30 s), and at once when the key
// is another (KeyChanged).
//
// A pause is an hour at the longest. What is durable waits ten minutes, or for long
// outages a sixteenth of the outage, so that it arrives soon after a repair. A user's
// message, or request for keys, may have a host tried ahead of its time (spend.go).
//
// After an hour of failing only the newest events of each room stay (Compact).
//
//   - a transaction is not sent more often than its own back-off allows, unless an admin
//     wants it, or, now and then, its destination sends something or somebody has fetched
//     our keys;
//   - nothing is divided or set aside unless its destination takes an empty transaction
//     before and after it refuses the batch;
//   - no Acknowledge before its Accepted, no Send before its Packed;
//   - one transaction at a time for a destination, and it keeps its id and bytes
//     until it is settled;
//   - a queue with something pending has a call, a timer, a place in line, or
//     waits for the store.
//
// # Paced acknowledgements
//
// Pacer decides when a stored transaction is answered, see there.
package bus

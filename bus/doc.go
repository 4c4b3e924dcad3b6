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
//  5. Each Accept, Pack, Settle, Compact and Expire is answered by exactly one
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
//   - every request is answered once, before its caller's time-out, or gone;
//   - no more attempts than workers, nor than a host's own limits;
//   - no attempt at a failing host before its time;
//   - what must not be sent twice never reaches a remote twice;
//   - all running totals agree with a recount.
//
// A broken one panics with its numbers.
//
// # Limits
//
// Config bounds requests, hosts, workers and the cache. A list of ready hosts
// holds at most twice as many entries as there are hosts, a queue of calls at
// most twice the live ones and sixteen. There are as many queues as destinations
// with something pending, which the store bounds; those that have a call are
// bounded so that lookups always find a place for their host.
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
//   - The same definite refusal again and again: its items are divided, until the
//     one that is refused stands alone and is set aside. That is soon if the
//     destination has taken some of the others. If it has taken nothing, the first
//     is given an hour and a half, as that is more likely an outage, and each after
//     that a day.
//
// After an hour of failing only the newest events of each room stay (Compact).
//
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

// Package edge is the core for requests from the federation to our homeserver: it
// decides whom they are from as far as that is needed, which of them the homeserver
// sees, when, and what is answered without it. It is package bus's sibling for the
// other direction and as pure: time is an argument, randomness is handed in, and
// there is no clock, no goroutine, no I/O and no body, only references, sizes,
// hashes and classes. Package bus/node executes what it decides, on the same loop.
//
// # Events and effects
//
// Machine.Step takes one event and returns effects. Duties of the caller:
//
//  1. Events come in the order in which they happen, Tick at the moment that
//     NextWake names. A start needs no event: what the store has is found by Look.
//  2. Effects are executed in the order in which they stand.
//  3. Each Verify is answered by exactly one Verified, each Look by one Looked, each
//     Forward by one Done after at most one Answered, each Record by one Recorded.
//     None of these may wait for another's.
//  4. A request's body is held until Free, an answer until Discard. Exactly one Free
//     comes for each Arrived, and one Discard for each Forward. Exactly one of Reply,
//     Replay, Empty and Refuse comes for each Arrived, or its Gone went before.
//  5. What the core cannot see is refused before Arrived: bodies over the endpoint's
//     bound, bad JSON, malformed headers, a path with dot segments or backslashes in any
//     spelling, a destination that is not ours, an origin
//     in a transaction that is not the header's, paths that do not exist. Who is
//     denied may be, before the body is read: ACL says who is.
//  6. The shell's own memory of verdicts and missing keys lasts 60 seconds at most
//     for what is not good.
//
// # What is refused
//
// What the homeserver would take passes, byte for byte. Refused is only what no homeserver
// could take, or what would hurt the box; each such bound is a key of the configuration,
// with what a Synapse takes as its default. What is needed for the record, or to merge, is
// read with care, and where it cannot be read the request passes without that.
//
// # A request's way
//
// Origins that are denied are refused at once, then the signature is checked, with
// the keys at hand (Verify). Only if these do not do may a key be fetched, one at a
// time for an origin, three in a minute, and KeyFetches in a minute for all; a
// quarter is for servers that have sent something authentic, and a quarter of the rest for
// addresses that have hardly had any. One address has an eighth, its network a quarter, and
// what it was caught forging in the last ten minutes halves that each time (share.go). Until then a request is
// counted apart, by the address that it comes from, and addresses take turns: what is
// forged is in the way of nobody else. An address may hold a quarter of Unverified, and
// if that is full, a newcomer displaces the newest of the address that has most. Those
// that wait for a fetch are half of Unverified at most, 8 of one origin, by the same shares, and a
// quarter of that half of one address or kept for servers that are known. So whose
// key is at hand is verified at once, whoever waits. A bad signature is 401, and so is a key
// that its own server, asked just now, does not have. If the key
// cannot be had, the homeserver may try (PassNoKey): at PassRate, as if it came from one
// stranger, and it shares, joins and stores nothing. Or it is 401, but 503 if the
// key was not even asked for, since a sender leaves us alone for long after a 4xx.
//
// Then:
//
//   - A transaction of which there is one under way joins it. Else the store is
//     asked (Look): what was answered in the last 24 hours is answered again, and
//     one whose PDUs have all been acknowledged is, too. The rest waits for its turn,
//     one at a time for an origin. It is never answered 429 for that.
//   - A request for an event that the outbox has for this origin is answered from
//     there, if the shell says that it may (Arrived.Look).
//   - An equal request of the same origin that runs is joined, if the endpoint table
//     allows that. Requests without a signature may share whoever sends them.
//   - Over OriginQueue requests of an origin are answered 429.
//
// # Turns
//
// The homeserver has two lanes, for transactions and for all else. In each, bands
// share by weight, and each with all below it keeps to a share of the places; within
// a band origins take turns, each with its own rate. Who has waited for long rides on
// a better band's turn.
//
// A lane's window says how many run at a time. Answer times are compared with the
// fastest of their kind in the last five to ten minutes, transactions with those of
// about their size. Every eight answers, but at most four times a second, the window
// grows by one if their median is at most 1.5 times that and more could have been
// begun, and is halved from twice that on (2.5 and 4 times for other requests), or
// when an answer never came; what was begun before it was halved does not count.
// Under pressure it does not grow. What takes longer than a second takes no place in
// the window, since it waits for something, such as the keys of another server; but
// no more than Concurrency and Parallel ever run.
//
// So a few servers with such requests could take a whole lane. For a minute after one
// their turns come after the others', but for what has waited for ten seconds, and they
// take three quarters of the lane at most, a place at least. Those that are new may
// still stall in the rest. When these leave others less than a quarter, or than the
// window, and an origin waits that is not slow, the stalled attempt that nobody waits
// for, or else that has run for longest, is broken off after five seconds: a transaction,
// or what may be. It is made again in its turn; the homeserver goes on with a transaction
// meanwhile, and knows it by its id. Since it may have more to do at a time then, a lane
// breaks off one after the other, as many in a minute as it has places (4 if that is
// more), and none under pressure.
//
// When the homeserver cannot be
// reached, one request now and then finds out whether it is back, and the windows
// begin at their least: 1 transaction, 2 requests. A request that the shell can answer
// itself then (Done.Final), such as that for our keys, does not wait for it.
//
// # The order of answer and record
//
// The answer to a transaction is given once it is on disk, if the transaction holds
// anything but presence and typing. So whoever has had an answer gets the same one
// for the same transaction, for 24 hours, and the homeserver does not see that again,
// whatever happens to the bus. What is left is a kill between the homeserver's answer
// and the end of the write: the sender has no answer then, sends again, and the
// homeserver, which remembers for 24 hours as well, answers from that. Giving the
// answer first would be faster by one write, but a repeated transaction could then
// reach the homeserver after its sender had been answered.
//
// It is given without the disk when the disk does not take it in time, or fails:
// the homeserver has acknowledged it, and that is what counts. No more than 256
// answers wait for the disk; then no transaction is begun.
//
// Transactions of presence and typing only are answered at once and stored within a
// second, in one write with others.
//
// An attempt of which nobody knows what became is repeated up to twice, as the
// homeserver knows the transaction by its id; the origin's next one waits for that,
// and older ones that a join held back do, too.
//
// # What may be dropped
//
// Only transactions that hold nothing but presence and typing, and only before they
// are begun. They are forwarded at EphemeralRate at most, less under pressure, and so
// that they take EphemeralShare of the homeserver's time by its answer times. They
// are dropped when they are superseded by what waits of the same origin, are older
// than their expiry, have waited for EphemeralHold, or others need the room. They
// are answered as if their content had been taken note of (Empty), and that is
// stored. Everything else is answered by the homeserver, from the store, or with an
// error after which it is sent again.
//
// When it is full, the cheapest band makes room: presence is dropped, then what
// nobody waits for is refused with 503, the newest first of whoever has most of it. But
// what has begun is not, and room is shared out by origins: within a newcomer's own band
// whoever has more gives way to it, in a dearer one whoever has four times as much, and in
// a cheaper one nobody does that has less than a quarter. Bytes are shared out likewise.
// When half the room is taken, 4 requests at most wait for one answer, as these cannot be
// made to leave.
//
// # Joins
//
// While our homeserver joins a room (Joining), it acknowledges the room's events and
// throws them away. So transactions with such events wait until that is over and, for
// two seconds at most, as long again, or for JoinHold; presence waits for JoinHold.
//
// # Invariants
//
// Machine.Check recounts them, the simulation in the tests asserts them after each
// step:
//
//   - every request is answered once, before its sender's time-out, or gone;
//   - the homeserver has at most one verified transaction of an origin;
//   - one that is stored, or whose sender has its answer, does not reach it again;
//   - no answer to one origin's request is given to another;
//   - nothing but presence and typing is ever acknowledged without it;
//   - a transaction that is to be sent again waits for no other of its origin;
//   - what waits for keys, is slow or broken off keeps to its bounds;
//   - all running totals agree with a recount.
//
// A broken one panics with its numbers.
//
// # Limits
//
// Config bounds the requests and bytes that are held, before and after verification,
// the origins that are remembered, what waits of each, and what runs. Whoever waits
// for one answer is at most 50, rooms that are being joined 64, kinds of answer times
// 128, answers on their way to the disk 256 and what runs. The fetches remembered are
// KeyFetches at most.
//
// At a time there are at most Verifying and KeyFetches of Verify, Requests of Look,
// Concurrency and Parallel of Forward, and one Record, of at most 256 answers and
// what ran.
package edge

// Package sim simulates a Matrix federation on loopback: up to 65,536
// homeservers in one process, all of them strangers to each other, whose only
// purpose is to be asked and to be sent to.
//
// Server i is named 127.1.H.L:PORT with H = i>>8 and L = i&255. A name that is
// an address needs neither DNS nor .well-known, and a socket of its own for
// each address lets a dead server really refuse its connections. One authority,
// made anew for each World, signs all certificates; every server has its own
// ed25519 key, derived from the seed.
//
// # Faults
//
// Each server is of one Kind. Shares says how many are of which, exactly, and
// the seed says which ones, so a run with the same Config meets the same
// servers. SetKind changes one while the world runs. What a server receives it
// takes when it arrives: a Slow server's answer is late and a Cut server's
// answer is short, but the transaction counts. Dead, Hanging, Failing and
// Garbage servers take nothing, nor does a Limited one over its rate.
//
// # Rooms and keys
//
// With Config.RoomMembers there are big rooms, of which a homeserver can join one
// and fetch the state (RoomID). Their events are of the usual sizes, carry the
// names, key ids and signatures that a reader looks for, and are made while they
// are sent, so that an answer of any size takes no memory. They do not stand a
// check: a server signs only its membership, and as a whole instead of redacted,
// and puts that signature on all its events; hashes and ids are made up. Room
// version 10 says that a homeserver must check them, so Synapse joins none of
// these rooms. SetSendJoin makes answers late, slow and large.
//
// Keys are right, signed by those whose they are. Every server publishes its own;
// with Config.Notary the first one answers for all, as a notary does. SetKeyFault
// makes them wrong, for tests of who must not believe them.
//
// # Cost
//
// A living server costs one listening socket and one goroutine that waits for
// its connections; the rest is made at first use. Each open connection costs a
// goroutine more and, with TLS, about 60 KiB. Measured on amd64: 5,000 servers
// start within 0.2 s and need 29 MiB, twice that once each has been asked.
//
// File descriptors: one for each living server, one for each open connection
// and about twenty others. "ulimit -n 20000" is plenty for 5,000 servers and
// their clients in one process.
package sim

// Package matrix is the vocabulary of Matrix federation that the rest of the bus
// speaks: names, keys, signatures, the form of messages, and what is known of
// each endpoint.
//
// It is pure. There is no clock, no I/O, no goroutine and no state: time is an
// argument, bytes come in and go out, and every function may be called from
// anywhere at once. It imports nothing but the standard library, and of that no
// network, file or logging package. Whatever reads bytes from outside is bounded
// in time and memory by a constant or by the size of its input, and is fuzzed.
//
// The parts:
//
//	names.go          ServerName and its grammar
//	requesttarget.go  the request target with which Synapse asks for a server
//	endpoints.go      Endpoint, the table of all endpoints, Match
//	room.go           the room, or the profile's field, that a request is about
//	sendclass.go      the class of a transaction, by its content
//	transaction.go    Transaction, the body of a PUT /send, in its parts
//	item.go           Item, what an outbox queues: kinds, lanes, rules, lifetimes
//	edu.go            EDUs taken apart into items
//	merge.go          what newer items make of older ones that wait
//	builder.go        Builder, items packed into a transaction
//	sendanswer.go     the answer to a PUT /send that we sent, and errors
//	sendacks.go       the answer to one that came in: what it acknowledges
//	eventid.go        the ids that an event may have, whatever its room's version
//	class.go          Class, the priority classes
//	outcome.go        Failure, how an attempt at a remote can fail
//	errors.go         error codes and error bodies
//	retryafter.go     how long a server that is busy asks to be left alone
//	wellknown.go      delegation: the document, and how long it is good for
//	canonical.go      canonical JSON
//	keys.go           signing keys, signed JSON objects
//	serverkeys.go     other servers' key objects, a notary's answer
//	keyquery.go       queries for server keys
//	statescan.go      StateScan, keys and servers of a join's answer as it passes by
//	xmatrix.go        signed requests
//
// Comments cite the specification by document and section, in version 1.18
// unless they name another: "S2S" is the server-server API, "appendices" are
// its appendices. Where they cite Synapse, they name the file below synapse/.
package matrix

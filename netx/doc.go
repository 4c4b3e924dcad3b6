// Package netx is the bus's network: everything that touches a socket, and
// nothing that decides.
//
// # Inbound: from the homeserver
//
// A [Front] accepts the homeserver's outgoing federation requests. Synapse opens
// one connection for each of them, with no limit on how many, so a message to a
// large room arrives as thousands of connections within a second. Three things
// keep that small:
//
//   - The Front takes a place for a connection before it accepts it. What is
//     over the limit stays in the kernel's backlog, where it costs nothing here
//     and Synapse simply waits. Who says nothing takes no place in which a request is
//     read, and who writes its head slowly gives it to who waits (gate).
//   - The request's body goes into a [Spool], which has a budget in memory and
//     one on disk. Then the connection is parked, which leaves an [Inbound] of
//     about 2 KiB and no goroutine.
//   - [Inbound.Reply] or [Inbound.Stream] writes the answer later, from a
//     goroutine of the caller's, and closes the connection.
//
// One watcher looks at all parked connections once a second, so that nothing is
// done for a client that gave up.
//
// A [Body] is written once and read by any number of [Reader]s while it is
// written: one upstream answer serves all who wait for it, and a request can be
// sent a second time.
//
// [Listen] makes the sockets, [SystemdListeners] takes over those of a socket
// unit, and [Notifier] talks to the service manager.
//
// # Outbound: to the federation
//
// A Client resolves server names as the specification has it, keeps to the
// block-list of private addresses at the moment of dialling, and sends requests
// whose path, query, header and body are what the homeserver signed.
//
// [Client.Connect] only makes a connection, for a request that is to come.
//
// # Inbound: from the federation
//
// An [Edge] accepts what other servers send to the homeserver, with TLS
// ([Certificates]) or behind a proxy. Anybody may connect, so each connection,
// header, body and stream has a bound in number, size and time, and what is
// refused is refused before the body is read where that can be. Everything that there is
// a bounded number of can be taken back: each connection is in one class at any time,
// which says who may take its place (edgeConns); of the bodies that are read the slowest
// gives way (fairSlots); requests have shares by client (FairPlaces). A client is an IPv4
// address or an IPv6 /64, and half of what a /48 has counts as each client's in it. A request keeps
// net/http's goroutine until it is answered. An [Upstream] carries it to the
// homeserver's own federation listener, byte for byte.
//
// # Duties of the caller
//
//  1. Answer every Inbound that Handle got, with Reply, Stream or Abort, unless
//     Gone has been told of it. Nothing here times out a parked request: how
//     long it may wait depends on the endpoint.
//  2. Release every Inbound once its body is no longer needed, in all cases.
//  3. Close every Reader, and Release every Body got from New or retained.
//  4. Do not block in Handle and Gone.
//
// # Goroutines
//
// The inbound half starts one for each connection of the homeserver until its request is
// read, MaxComing at most, the watcher, while anything is parked, and one for each of the
// edge's listeners and handshakes. Serve runs in the caller's. The outbound half starts those that race for a server with
// several addresses, two for each dial, which end with it; net/http has two for
// an HTTP/1.1 connection, one for an HTTP/2 connection and one for each request
// on it.
package netx

// Package node puts the parts of the bus together: it reads the configuration,
// opens the store, the front and the client, runs the core of package bus on
// its loop, executes the core's effects, and shows what goes on.
//
// It decides nothing about requests. What happens to one:
//
//  1. The front (netx) reads it, parks its connection and calls Node.ingest,
//     which finds its row of the endpoint table, its class and its key, and
//     posts bus.Arrived.
//  2. The core asks for bus.Send when its turn has come. A goroutine of the
//     sender pool carries it to the remote (carry.go), reports the connection,
//     the answer's headers and the end, and writes the answer's body into a
//     spooled body as it arrives.
//  3. The core asks for bus.Reply for each request that waits for the answer.
//     A goroutine of a reply pool streams the spooled body to the homeserver
//     and closes the connection.
//
// And to a transaction, if there is a signing key (takeover.go):
//
//  1. ingest has it parsed and, now and then, its signature verified, and posts
//     bus.Offered. What cannot be taken over goes the way above.
//  2. The core's effects become operations of the store (outboxstore.go), which
//     reads the transaction's items from the body, one transaction at a time, and
//     makes one commit of what waits. What it did is posted as it takes effect.
//  3. bus.Acknowledge has a replier answer the homeserver.
//  4. A packed transaction lies in the spool until it is settled. A sender signs it
//     and takes it to its destination (deliver.go).
//
// What is used again:
//
//  1. An answer that the core keeps (bus.Discard has not come yet) stays where it
//     is: small ones in memory, large ones in the spool's files. Those that are to
//     outlive a restart are written with bus.Commit; bus.Load brings one back, and
//     it is as if its attempt had just ended. Whether an answer is what it should
//     be is judged before that (answers.go).
//  2. A query for server keys becomes bus.KeyQuery (keydesk.go). Readers of the
//     store say what is missing; errands fetch that (errand.go), check it, and
//     store it; the answer is then put together from the store alone.
//  3. The answer to a join is looked through while it arrives, by a scanner that
//     reads the spooled body beside everybody else (scan.go).
//
// What other servers send, if there is an edge (edge.go), goes the other way:
//
//  1. Its listener (netx) refuses what is malformed, and what the bus knows itself is
//     answered, before a body is read (edge_ingest.go). Then edgeShell.ingest parses a
//     transaction for its kinds, keys, rooms and hashes, and posts edge.Arrived. That
//     core is on the same loop, and meets the other only in KeyWanted, Alive and
//     JoinWindow.
//  2. A verifier checks the signatures with keys at hand or from the store
//     (keyring.go); a key that is missing is fetched by the outbound core's key desk.
//  3. A reader looks the transaction up in the store (edge_store.go), a forwarder
//     takes it to the homeserver (edge_forward.go) and writes the answer into a
//     spooled body, or that to a transaction into memory of its own, and what was
//     acknowledged is stored before it is passed on.
//  4. The request's own goroutine writes the answer (edge_execute.go), so readers that
//     are slow hold up nobody. What they leave unread counts against them
//     (edge_unread.go). Requests and answers have spools of their own, so that
//     nothing from outside takes the room of what goes out.
//
// Of bodies that are so large that they lie on disk, one is in memory at a time
// where transactions are taken apart or signed (bulk), and one more where
// the store packs or loads.
//
// Two pools write answers, so that readers that are slow to take a large one
// cannot hold up the small ones: what is known to be small goes to one, all
// else to the other.
//
// An admin's commands come over a socket of their own (admin.go), one at a time.
// They read the core on its loop, and the store beside its writer.
//
// Maps of requests and attempts belong to the loop's goroutine alone. Bodies
// are counted references; whoever needs one holds one.
package node

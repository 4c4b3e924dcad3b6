// Package store is the only durable state of fsbus: one SQLite file, written
// by one goroutine that merges what waits into one transaction.
//
// Everything lives in one file so that one fsync covers all that belongs
// together, and so that a backup or a move is one thing to get right. That is
// what is known of each destination (Host), so that back-off survives a restart,
// and the outbox: what the homeserver was told is taken over. And it is two caches,
// of what other servers have answered and of their keys, and what they were answered
// themselves.
//
// # The outbox
//
// Each destination has its items in lanes (matrix.Lane), in the order in which
// they came, under numbers that only grow. Operations (OutboxOp) are parts of a
// Batch and so share its group's fsync; what comes of one is in its Result.
//
//	Accept   takes over a transaction, merging its items with those that wait;
//	         it may load them only then
//	Pack     freezes the front of each lane as the next transaction, or gives
//	         again the one that is frozen
//	Settle   deletes what was delivered, divides what is refused, or lets what
//	         cannot have reached anybody wait again (Thaw)
//	Compact, Expire, Drop
//	         give up what is of no use
//
// A payload over 256 bytes is stored once for all its destinations. What is
// frozen is known from the last numbers in it, so freezing writes one row, and
// the transaction comes out the same each time since nothing that it is made of
// changes: see Pack. Everything is safe to do twice: a repeated Accept is known
// by the homeserver's id, a Settle by that of the batch, and Pack repeats itself.
//
// Nothing that is frozen changes, for nobody knows what the destination has seen
// of it. But of a batch for which not even a connection came about it is known:
// nothing. It would only grow stale, with newer items beside it that could take the
// place of its own. Thaw lets them: the items wait as if never packed.
//
// An item is set aside when it is its turn to be packed and its row, or the payload that
// this refers to, is damaged: what is left of it is kept, and the others go on. While it
// waits newer ones replace it, or stand beside it where a merger would need its payload.
// RetryAside puts what is set aside back into its queue, with the time at which it was
// accepted; so one that is set aside again is known as such. Items of which a newer one
// takes the place of an older one stay aside.
// What else meets a damaged row is refused alone (ErrDamagedRow), but for Expire, which
// is about all destinations and passes over one that cannot be read. What SQLite itself
// cannot read fails a group.
//
// Totals are kept and not counted. Settle and Drop count where they find another number
// of items than they should, Pack where it finds nothing to send though something is
// said to be pending, and each of them where a row that it deletes was damaged.
//
// Items do not say in whose name they are sent: Pack is told. So the file has the name
// of the homeserver that it belongs to (Options.ServerName), and Open refuses another
// one for as long as there is an item (ErrOtherServer). Where there is none, or no name
// yet, the name that it is opened with is written.
//
// # The caches
//
// Answers are found by their key, ServerKeys by the notary and the server. Both are
// parts of a Batch like others and survive what the outbox survives, but can be had
// again: beyond its bounds a table gives up what was written first, and where the
// file is full no answer is written, and answers are given up for the sake of the
// outbox. Nobody is told of either. Keys are written in any case, since without them
// the homeserver could not check what it receives.
//
// LoadAnswer and LoadKeys are for every request: they share one connection with
// prepared statements, which is opened at its first use. AnswerIndex and LatestVia
// are for the start, like the other Loads.
//
// # What others were answered
//
// An InboundTxn is a transaction of another server with the answer that it got. So one
// that comes again is answered again (LoadInbound), and one under another id of which
// each PDU has been acknowledged need not reach the homeserver (InboundPDUs). Nobody but
// the homeserver could give that answer again, but it knows it as well, for as long.
// So these rows, too, are given up beyond their bounds, the first written first, and are
// not written where the file is full; Stats.InboundLeft counts that. For the outbox
// answers are given up first, all of them, and then these. They never make room for one
// another.
//
// One is written for nearly each transaction that comes in, and so a commit with it has
// to touch few pages: the last one of the table and, of an index, some among the few
// that what was written lately shares. Schema 4 says how. A transaction alone, with one
// PDU, writes 3 pages to the log, and half a page more for what goes in its place. A
// hundred in one commit write 42, of which some are those of the commits before: moving
// the log into the file writes 15 for a hundred.
//
// What is older than InboundFor is not found by who asks for what is younger, and goes
// with what is written next, once the oldest is a sixteenth older than that, at most
// 1,000 rows at a time: those that go together lie together.
//
// Requests for an event are answered from the outbox (PendingPDUs). It uses the same
// connection as the look-ups, for one PDU at a time.
//
// # Order and duties
//
// What the store promises:
//
//  1. For each Submit that returns nil the completion is called exactly once,
//     in the order of the Submits, from the writer's goroutine.
//  2. A completion with nil means durable: the batch, and every batch
//     completed with nil before it, survives a crash and, if the disk keeps
//     what it was told to keep, a power cut.
//  3. A batch is stored whole or not at all, and batches take effect in the
//     order of the Submits. The Loads see whatever was completed before.
//  4. A completion with an error means not known to be durable. The batch has
//     no effect on what is read from then on, but if the process dies right
//     after a commit that failed in its fsync, the next Open may find it.
//     Whoever submits it again must not mind.
//  5. An error of one batch's content (ErrInvalid), of the room for it
//     (ErrOutboxFull) or of a row that it needs (ErrDamagedRow) is that batch's
//     alone. Any other error is that of all batches of its group. The writer
//     goes on with the next group in either case: a disk that has space again is
//     all it takes to recover.
//  6. Submit never waits. Whoever has an answer to give waits for the
//     completion.
//
// What the caller owes: completions that are quick and never wait for the
// store; a batch left alone until its completion; Close before exit, though
// leaving without it costs nothing but time at the next Open.
//
// # Invariants
//
//   - The writer's goroutine is the only code that changes the file after
//     Open, and the only goroutine of this package (the driver starts one for
//     the length of a call with a context that can end: Open and the Loads).
//   - A file at Options.Path is whole: it is built under another name, synced
//     and renamed. An empty one, or one without header, is damaged and refused.
//   - Nothing is deleted or replaced to get going. A file that is damaged, of
//     another program or of a newer fsbus is left as it is, and the error says
//     what to do.
//   - A commit never leaves more than Options.MaxHosts rows of hosts, nor more rows
//     and bytes of answers, of keys and of inbound transactions, or PDUs of these, than
//     Options has for them.
//   - Where an answer or an inbound transaction is not written, an older one under its
//     key is not left either.
//   - A PDU is not found without its transaction.
//   - Between two calls no connection for reading has a read transaction.
//   - An item leaves the outbox by Settle, Compact, Expire, Drop, Pack (what has
//     expired, is damaged or cannot be sent) or because a newer one replaces it, and is
//     counted in the Result. Frozen ones leave by Settle and Drop alone, or to be
//     set aside.
//   - Of one key whose newer items take the place of older ones (MergeReplace,
//     MergeFields) one item waits besides what is frozen, also after a Thaw, and
//     so a transaction has no two of them, which a receiver may handle in either
//     order.
//   - A half of a batch that was refused is never thawed.
//   - What was accepted for one homeserver is not sent in the name of another.
//   - No clock decides anything. Times in rows come from the caller; which rows
//     are old is known from the order of writes, and of inbound transactions from
//     a comparison with what is written. Only Stats and the log hold
//     durations.
//
// # SQLite settings
//
//   - journal_mode WAL, synchronous FULL: an fsync of the log at each commit.
//     NORMAL would sync at checkpoints only, and what was acknowledged in
//     between could be gone after a power cut. FULL costs one fsync a group,
//     which the group shares: at 100 batches a group FULL and NORMAL are equally
//     fast.
//   - The driver is built to use fsync, not fdatasync. On ext4 that adds a
//     journal write where the log is overwritten in place; mounting with
//     lazytime spares most of it.
//   - wal_autocheckpoint 500 pages, journal_size_limit twice that: see the
//     constants in open.go. The log can only outgrow this while another
//     program keeps a read transaction open; Stats.WALBytes shows it.
//   - busy_timeout 5 s, for an admin's shell; a writing shell that takes longer
//     fails groups. Reading with one is fine at any time.
//   - foreign_keys ON, STRICT tables, temp_store MEMORY.
//   - quick_check at Open, if the last shutdown left a log and the file is not
//     over 64 MiB. A crash alone damages nothing, but what crashes a small board
//     (a brown-out, a dying card) also damages files, and a log beside the wrong
//     file, after half a restore, looks the same. 20,000 hosts take 7 ms.
//   - No second fsbus: a flock on Path.lock (lock.go).
//
// # Limits
//
//   - Options.QueueLen batches and Options.QueueBytes wait at most, beyond
//     that Submit returns ErrQueueFull; Options.MaxGroup batches and 1 MiB share a
//     transaction.
//   - The outbox: bytes and items of a destination, items in all, bytes of the
//     file, destinations, items set aside. Options has them; ErrOutboxFull is the
//     answer, and set aside items push out older ones. MaxFileBytes must be less
//     than what the disk has: delivering writes, too, before it makes room.
//   - An Accept must fit into QueueBytes, with its Bytes if it loads its items. An
//     operation that trims deletes about 1,000 items at a time; Settle, what one
//     transaction holds.
//   - The caches: rows and bytes of each, see Options, of which the file may take
//     twice the bytes. MaxFileBytes counts all that is in the file, so what keys take
//     is not the outbox's.
//   - Inbound transactions: rows, bytes and PDUs, see Options. A row takes about 100
//     bytes of file besides what is kept, an entry of a PDU 32. An answer has
//     MaxInboundAnswer bytes at most, and the first matrix.MaxPDUs PDUs are kept: what
//     is beyond is left out, and refuses nothing.
//   - Options.CacheBytes of page cache, plus 256 KiB for the connection of the look-ups
//     (LoadAnswer and its like) from their first use on, and one row; plus 256 KiB and
//     the rows themselves while LoadHosts runs. All of SQLite's memory lies outside of Go's
//     heap.
//   - Network file systems are not supported: WAL needs shared memory and
//     locks that work.
//   - The tests kill the process at random moments and so prove what the store
//     keeps in a crash of fsbus. They cannot prove anything for a power cut:
//     after a kill the kernel still writes what it was given, synced or not.
//     That each commit ends in an fsync of the log, before any completion, was
//     verified with strace; whether a disk honours it only pulling the plug
//     tells.
//
// # Measured
//
// On two shared 2.5 GHz Xeon cores, fsync 0.1 ms (see BenchmarkStore and its
// neighbours), rows per second with groups of 1, 100 and 1,000:
//
//	store, a batch a row    7,000   204,000   298,000
//	SQLite alone            8,200   231,000   321,000
//	append and fsync        7,500   510,000 3,200,000
//
// Transactions of 2 kB taken over per second (BenchmarkAccept), in the same
// groups, of which 1 MiB ends the last at 376:
//
//	store              4,500   28,000   31,000
//	SQLite alone       5,600   39,000   43,600
//
// Three transactions, packed and delivered, cost a destination 0.17 ms of CPU and
// 830 bytes of file at their height, with 1,000 destinations as with 10,000
// (BenchmarkDestinations). LoadOutbox of 10,000 takes 15 ms. An event of 1.5 kB
// for 4,000 takes 780 kB of file.
//
// With 10,000 rows in each cache LoadAnswer takes 10 µs, or 40 µs after a commit,
// which makes its pages old, and LoadKeys 7 µs for each server. AnswerIndex takes
// 11 ms for all. A batch of 200 answers takes 4 ms; 430 KB go to the log if all are
// new, and up to 1.2 MB if they replace others at random places (schema.go).
//
// Inbound transactions into a full table, with an answer of 60 bytes for each PDU,
// rows per second in batches of 1 and 100, one after the other; what a row writes to
// the log and, when that is moved, to the file (BenchmarkInbound); and in brackets the
// same with indexes that are not divided into generations:
//
//	no PDU     1     2,800    9.5 kB    0.9 kB   (2,900    9.7 kB    4.2 kB)
//	         100    27,100    1.0 kB    0.3 kB  (31,500    4.3 kB    2.6 kB)
//	1 PDU      1     2,700   14.6 kB    1.7 kB   (2,900   14.3 kB    8.0 kB)
//	         100    23,200    1.7 kB    0.6 kB  (17,000    7.9 kB    5.7 kB)
//	10 PDUs    1     1,900   54.4 kB   13.7 kB   (1,800   59.9 kB   36.3 kB)
//	         100    10,600    7.6 kB    4.7 kB   (3,600   24.9 kB   24.4 kB)
//
// LoadInbound takes 29 µs with 50,000 rows, found or not, and 85 µs after a commit;
// with one generation it would take 11 and 62. InboundPDUs takes as much for each PDU.
// To count all, as Open does, takes 3.5 ms, and a row with a PDU 216 bytes of file.
//
// On a disk that needs 10 ms for an fsync there are 100 groups a second at
// best, so rows per second are 100 times what waits.
//
// The driver is used without database/sql: 0.35 MB less memory at idle, one
// goroutine less, 15 % less CPU and 30 % of the allocated bytes per row, and no
// pool that replaces a broken connection by one without the pragmas above. An
// open store idles at 1.9 MB of anonymous memory in a bare process, of which
// the Go runtime has 1.3; it stays at about 10 MB after writing 20,000 rows at
// full speed. LoadHosts of as many takes 60 ms.
package store

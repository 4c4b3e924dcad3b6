package node

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"fsbus/netx"
	"fsbus/sched"
)

// What things cost at worst, rounded up, with the stacks of their goroutines
// and a share of what waits for the garbage collector. Those marked "measured"
// were on linux/amd64; 32-bit ARM needs less.
const (
	// baseCost is a process that does nothing: the program itself (11 MiB
	// resident, measured), the database's page caches and queue, the queues of
	// the pools.
	baseCost = 16 * sched.MiB
	// parkedCost is a request that waits: its connection and header fields
	// (1.7 KiB measured), what the core (0.4 KiB measured) and the node know
	// of it. One on which nothing has come yet has a goroutine instead.
	parkedCost = 2560 * sched.Bytes(1)
	// readingCost is a request that is being read: net/http's buffers (8 KiB),
	// the copy buffer (32 KiB), the stacks of two goroutines. 48 KiB measured.
	readingCost = 50 * sched.KiB
	// workerCost is a request under way, over HTTP/2, which takes more than
	// HTTP/1.1: connection and TLS state, a frame (16 KiB), the copy buffer
	// that the answer passes through (32 KiB), three stacks. 88 KiB measured,
	// 75 KiB with HTTP/1.1.
	workerCost = 88 * sched.KiB
	// idleCost is a connection that waits for its next request. 37 KiB
	// measured, 30 KiB with HTTP/1.1.
	idleCost = 40 * sched.KiB
	// hostCost is a server that is remembered: its record in the core, its
	// name, its place in the map. 723 bytes measured, without the text of its
	// last failure.
	hostCost = 768 * sched.Bytes(1)
	// resolverCost is the caches of DNS answers (netx.DNSConfig.MaxBytes) and
	// of well-known documents (netx.ClientConfig.WellKnownCache, 660 bytes
	// each), of which there are as many as wellKnown.
	resolverCost = 2*sched.MiB + wellKnown*660
	wellKnown    = 2688
	// handoverCost is the names of the servers of sets, of which maxHandoverNames are
	// remembered.
	handoverCost = maxHandoverNames * 48 * sched.Bytes(1)
	// queueCost is a server for which something is pending: what the core knows
	// of it, its timer, its name, its place in the map.
	queueCost = 400 * sched.Bytes(1)
	// sessionBytes is netx.ClientConfig.SessionBytes, which at 5 KiB are 200 TLS sessions
	// that may be resumed.
	sessionBytes = 1000 * sched.KiB
	// answerCost is an answer in the database of which the core knows.
	answerCost = 64 * sched.Bytes(1)
	// keyWantCost is a key that is being asked for, and maxKeyWants how many may
	// be.
	keyWantCost = 100 * sched.Bytes(1)
	maxKeyWants = 8000
	// Of the edge: a connection with TLS (57 KiB resident, measured, with HTTP/2 a
	// little more), a request that waits on one, beside its body, one whose body is
	// being read, one that the homeserver works on with its answer's way through the
	// copy buffer, what the answer to a transaction takes more than that buffer, which
	// it does not use, a server that is remembered, and a key at hand. The most that a
	// request takes is perRequest and maxDetails; what all have beyond usualDetails is
	// bounded by leastDetails and a quarter of edge.spool_memory.
	edgeConnCost    = 58 * sched.KiB
	edgeRequestCost = sched.Bytes(perRequest)
	edgeReadingCost = 48 * sched.KiB
	edgeRefusedCost = 24 * sched.KiB // a goroutine, a header of netx's bounds
	forwardCost     = 60 * sched.KiB
	txnAnswerCost   = maxAnswerKept - 32*sched.KiB
	originCost      = 400 * sched.Bytes(1)
	ringCost        = 256 * sched.Bytes(1)
	// statusCost is a connection of the status page, with a head of 6 KiB and its buffers.
	statusCost = 32 * sched.KiB
	// scanCost is what a scanner knows of the room whose answer it looks through.
	scanCost = sched.MiB
)

const (
	// workerGoroutines are a worker, two of its connection, one that dials, two
	// that race for one of the server's addresses, and one to spare.
	workerGoroutines = 7
	// idleGoroutines read and write a connection; HTTP/2 needs only one.
	idleGoroutines = 2
	// edgeConnGoroutines are those of a connection, beside those of the requests on it:
	// HTTP/2 has one that reads, one that serves and one that writes; HTTP/1.1 one, and
	// another while a request waits.
	edgeConnGoroutines = 3
	// forwardGoroutines forward a request, and read and write its connection.
	forwardGoroutines = 3
	// fixedGoroutines are those that every node has: the loop, the store's writer, the watcher of parked
	// connections, the pools that write answers, read the store and look through
	// answers, the status page with two for each of its connections, the admin's socket, two for each of its
	// connections, and the process itself with its signals (4).
	fixedGoroutines = 3 + smallRepliers + largeRepliers + storeReaders + scanners + 1 + 2*statusConns + 1 + 2*adminConns + 4

	// workerConnections are two that race for one server.
	workerConnections = 2
	// spoolFiles is netx.SpoolConfig.Files when it is left at its default.
	spoolFiles = 256
	// fixedFiles are the database, the log, the listeners, the runtime's own.
	fixedFiles = 64
)

// Budget is what the process may use at worst under a configuration.
type Budget struct {
	Items  []BudgetItem
	Memory sched.Bytes // of all Items
	Limit  sched.Bytes // memory_limit

	Goroutines      int
	Connections     int // to other servers, with those that are being made
	FileDescriptors int
}

// BudgetItem is one thing that takes memory.
type BudgetItem struct {
	Name  string
	Key   string // of the configuration; "" if nothing there changes it
	Count int64
	Each  sched.Bytes
	Total sched.Bytes
}

// Budget adds up what the configuration allows.
func (c *Config) Budget() Budget {
	f, o := &c.Front, &c.Outbound
	b := Budget{
		Limit: c.MemoryLimit,
		// A connection of the homeserver has a goroutine until its request is read.
		Goroutines: fixedGoroutines + o.Workers*workerGoroutines + o.IdleConnections*idleGoroutines +
			min(f.MaxConnections, netx.MaxComing) + len(f.Listen),
		Connections: o.Workers*workerConnections + o.IdleConnections,
	}
	b.FileDescriptors = fixedFiles + spoolFiles + f.MaxConnections + b.Connections + o.DNSQueries
	add := func(name, key string, count int, each sched.Bytes) {
		it := BudgetItem{name, key, int64(count), each, sched.Bytes(count) * each}
		b.Items = append(b.Items, it)
		b.Memory += it.Total
	}
	add("program and database", "", 1, baseCost)
	add("requests that wait", "front.max_connections", f.MaxConnections, parkedCost)
	add("requests being read", "front.max_reading", f.MaxReading, readingCost)
	add("requests to other servers", "outbound.workers", o.Workers, workerCost)
	add("idle connections", "outbound.idle_connections", o.IdleConnections, idleCost)
	add("servers remembered", "outbound.max_hosts", o.MaxHosts, hostCost)
	add("names and addresses", "", 1, resolverCost)
	add("TLS sessions", "", 1, sessionBytes)
	add("bodies on their way", "outbound.spool_memory", 1, o.SpoolMemory)
	add("answers kept", "outbound.cache", 1, o.Cache)
	add("answers known", "outbound.cache_entries", o.CacheEntries, answerCost)
	add("keys being fetched", "", maxKeyWants, keyWantCost)
	add("joins being looked into", "", scanners, scanCost)
	add("servers handed over to", "", 1, handoverCost)
	add("status page's connections", "", statusConns, statusCost)
	if c.hasOutbox() {
		// One that is being packed and one that is signed or taken apart.
		add("transactions being made", "outbox.max_transaction_bytes", 2, c.Outbox.MaxTransactionBytes)
		add("servers with a queue", "outbox.max_destinations", c.Outbox.MaxDestinations, queueCost)
		add("who is in which room", "outbox.ack_memory", 1, c.Outbox.AckMemory)
	}
	if e := &c.Edge; c.hasEdge() {
		forwards := e.Concurrency + e.Parallel
		held := e.heldRequests()
		refused := netx.MaxRefusals(held)
		add("servers' connections", "edge.max_connections", e.MaxConnections, edgeConnCost)
		add("servers' requests", "edge.requests", e.Requests+e.Unverified, edgeRequestCost)
		add("of them, refused", "", refused, edgeRefusedCost)
		add("of them, large headers", "", 1, leastDetails)
		add("servers' bodies, and answers", "edge.spool_memory", 2, e.SpoolMemory)
		add("of them, being read", "edge.max_reading", e.MaxReading, edgeReadingCost)
		add("at the homeserver", "edge.parallel", forwards, forwardCost)
		add("of them, transactions", "edge.concurrency", e.Concurrency, txnAnswerCost)
		add("origins remembered", "edge.origins", e.Origins, originCost)
		add("keys at hand", "", 2*maxRing, ringCost)
		// One body of the largest size at a time, and what is made of it to check it.
		add("large bodies being verified", "edge.checked_body", 2, e.CheckedBody)
		b.Goroutines += e.MaxConnections*edgeConnGoroutines + held + refused + forwards*forwardGoroutines + verifiers + 2*len(e.Listen)
		b.FileDescriptors += e.MaxConnections + forwards + 2*spoolFiles
		if e.PassClient {
			add("clients' requests", "", clientRequests, forwardCost)
			b.FileDescriptors += clientRequests
			b.Goroutines += 2 * clientRequests
		}
	}
	return b
}

// largest names the n items that take most of what can be lowered.
func (b Budget) largest(n int) string {
	items := slices.DeleteFunc(slices.Clone(b.Items), func(it BudgetItem) bool { return it.Key == "" })
	slices.SortStableFunc(items, func(x, y BudgetItem) int { return cmp.Compare(y.Total, x.Total) })
	var out []string
	for _, it := range items[:min(n, len(items))] {
		out = append(out, fmt.Sprintf("%s (%s)", it.Key, inMiB(it.Total)))
	}
	return strings.Join(out, ", ")
}

// WriteTo prints the budget as a table.
func (b Budget) WriteTo(w io.Writer) (int64, error) {
	var text strings.Builder
	row := func(name, count, each, total, key string) {
		line := fmt.Sprintf("%-27s %7s %9s %9s   %s", name, count, each, total, key)
		text.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	row("memory at worst", "count", "each", "total", "set by")
	for _, it := range b.Items {
		row("  "+it.Name, strconv.FormatInt(it.Count, 10), readable(it.Each), inMiB(it.Total), it.Key)
	}
	row("  sum", "", "", inMiB(b.Memory), "of memory_limit, "+inMiB(b.Limit))
	row("goroutines", strconv.Itoa(b.Goroutines), "", "", "")
	row("connections to servers", strconv.Itoa(b.Connections), "", "", "")
	row("file descriptors", strconv.Itoa(b.FileDescriptors), "", "", "")
	n, err := io.WriteString(w, text.String())
	return int64(n), err
}

// inMiB returns b in MiB with one digit after the point.
func inMiB(b sched.Bytes) string { return fmt.Sprintf("%.1f MiB", float64(b)/float64(sched.MiB)) }

// readable returns b in the unit that shows it best.
func readable(b sched.Bytes) string {
	switch {
	case b >= sched.MiB:
		return inMiB(b)
	case b >= sched.KiB:
		return fmt.Sprintf("%.1f KiB", float64(b)/float64(sched.KiB))
	}
	return fmt.Sprintf("%d B", int64(b))
}

// roundUp returns the next whole MiB.
func roundUp(b sched.Bytes) sched.Bytes {
	return (b + sched.MiB - 1) / sched.MiB * sched.MiB
}

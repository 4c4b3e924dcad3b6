package store

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"fsbus/bus/matrix"
)

// benchmarkTxn is a transaction of 2 kB: one event that goes nowhere else.
func benchmarkTxn(i int) *Accept {
	event := fmt.Sprintf(`{"content":{"body":"%09d%s"},"depth":%d,"room_id":"!room:hs1.test","type":"m.room.message"}`,
		i, strings.Repeat("x", 1900), i)
	hash := sha256.Sum256([]byte(event))
	return &Accept{
		Destination: matrix.ServerName(fmt.Sprintf("server%d.example.org", i%1000)), TxnID: fmt.Sprint(i), Accepted: int64(i),
		Items: []matrix.Item{{Kind: matrix.KindPDU, Key: string(hash[:]), Group: "!room:hs1.test", Payload: []byte(event)}},
	}
}

func BenchmarkAccept(b *testing.B) { benchmarkAccept(b, benchmarkTxn) }

// BenchmarkAcceptLoad accepts the same as the bodies that they come in, which the
// writer takes apart.
func BenchmarkAcceptLoad(b *testing.B) {
	benchmarkAccept(b, func(i int) *Accept {
		a := benchmarkTxn(i)
		body := bodyOf([]string{string(a.Items[0].Payload)}, nil)
		a.Items, a.Bytes = nil, int64(len(body))
		a.Load = func(dst []matrix.Item) ([]matrix.Item, error) {
			txn, err := matrix.ParseTransaction(body)
			return txn.Items(dst), err
		}
		return a
	})
}

// acceptGroup returns how many of benchmarkTxn the writer puts into a group of so
// many at most.
func acceptGroup(group int) int {
	n, bytes := 0, int64(0)
	for n < group {
		b := Batch{Outbox: []OutboxOp{benchmarkTxn(n)}}
		if bytes += b.size(); n > 0 && bytes > maxGroupBytes {
			break
		}
		n++
	}
	return n
}

func benchmarkAccept(b *testing.B, txn func(int) *Accept) {
	eachGroupSize(b, func(b *testing.B, group int) {
		s := open(b, Options{Path: newPath(b), MaxGroup: group, QueueBytes: 16 << 20, MaxFileBytes: 1 << 40, MaxDestItems: 1 << 30})
		flight := make(chan struct{}, 2*group)
		done := func(err error) {
			if err != nil {
				b.Error(err)
			}
			<-flight
		}
		txns := make([]*Accept, b.N)
		for i := range txns {
			txns[i] = txn(i)
		}
		b.ResetTimer()
		for _, a := range txns {
			flight <- struct{}{}
			if err := s.Submit(&Batch{Outbox: []OutboxOp{a}}, done); err != nil {
				b.Fatal(err)
			}
		}
		for range cap(flight) {
			flight <- struct{}{}
		}
		b.ReportMetric(float64(b.N)/float64(max(s.Stats().Commits, 1)), "rows/commit")
	})
}

// BenchmarkAcceptAppend appends the bytes of the events to a file.
func BenchmarkAcceptAppend(b *testing.B) {
	benchmarkAppend(b, len(benchmarkTxn(0).Items[0].Payload), acceptGroup)
}

// BenchmarkAcceptSQLite inserts the rows that BenchmarkAccept leaves, in the same
// groups, and does nothing else.
func BenchmarkAcceptSQLite(b *testing.B) {
	eachGroupSize(b, func(b *testing.B, group int) {
		path := newPath(b)
		closeStore(b, open(b, Options{Path: path}))
		c := openRaw(b, path)
		if err := c.exec(b.Context(), "PRAGMA synchronous = FULL; PRAGMA cache_size = -2048; DROP TRIGGER item_inserted; DROP TRIGGER item_deleted"); err != nil {
			b.Fatal(err)
		}
		prepare := func(query string) *stmt {
			s, err := c.prepare(query)
			if err != nil {
				b.Fatal(err)
			}
			return s
		}
		begin, commit := prepare("BEGIN IMMEDIATE"), prepare("COMMIT")
		dest := prepare("INSERT OR REPLACE INTO dest VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)")
		payload := prepare("INSERT INTO payload VALUES (?, ?, 1)")
		body := prepare("INSERT INTO body VALUES (?, ?)")
		item := prepare("INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
		rows := func(n int64, err error) {
			if n != 1 || err != nil {
				b.Fatal(n, err)
			}
		}
		txns := make([]*Accept, b.N)
		for i := range txns {
			txns[i] = benchmarkTxn(i)
		}
		size, commits := acceptGroup(group), 0
		b.ResetTimer()
		for i := 0; i < b.N; {
			if _, err := begin.exec(); err != nil {
				b.Fatal(err)
			}
			for range min(size, b.N-i) {
				a := txns[i]
				it := &a.Items[0]
				id, seq := int64(i%1000+1), int64(i+1)
				hash, key := payloadHash(it.Payload), itemKey(it)
				rows(dest.exec(id, string(a.Destination), a.TxnID, seq, seq, a.Accepted, int64(0), key[:16], ""))
				rows(item.exec(id, int64(2), seq, int64(2), a.Accepted, int64(0), int64(0), int64(len(it.Payload)), key, hash, nil))
				rows(payload.exec(hash, seq))
				rows(body.exec(seq, it.Payload))
				i++
			}
			if _, err := commit.exec(); err != nil {
				b.Fatal(err)
			}
			commits++
		}
		b.ReportMetric(float64(b.N)/float64(commits), "rows/commit")
	})
}

// BenchmarkDestinations shows what a destination costs when there are few and
// when there are many: three transactions with an event that all get and the
// presence of a user, packed and delivered. An op is a destination.
func BenchmarkDestinations(b *testing.B) {
	var rounds [3][]matrix.Item
	for i := range rounds {
		rounds[i] = items(b, []string{pdu("!r", i, strings.Repeat("x", 1500))}, []string{presence("@u:hs1.test", fmt.Sprint(i), 1)})
	}
	for _, dests := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprint("destinations=", dests), func(b *testing.B) {
			s := open(b, Options{Path: newPath(b)})
			all := func(ops func(matrix.ServerName) []OutboxOp) {
				flight := make(chan struct{}, 500)
				for i := range dests {
					flight <- struct{}{}
					if err := s.Submit(&Batch{Outbox: ops(matrix.ServerName(numbered("a", i)))}, func(err error) {
						if err != nil {
							b.Error(err)
						}
						<-flight
					}); err != nil {
						b.Fatal(err)
					}
				}
				for range cap(flight) {
					flight <- struct{}{}
				}
			}
			n, file := 0, int64(0)
			began := cpuTime(b)
			for b.Loop() {
				n++
				for i, items := range rounds {
					all(func(d matrix.ServerName) []OutboxOp {
						return []OutboxOp{&Accept{Destination: d, TxnID: fmt.Sprint(n, i), Items: items, Accepted: 1}}
					})
				}
				used, err := value[int64](b.Context(), openRaw(b, s.opt.Path), "PRAGMA page_count")
				if err != nil {
					b.Fatal(err)
				}
				file = used * pageSize
				all(func(d matrix.ServerName) []OutboxOp {
					return []OutboxOp{&Pack{Destination: d, NewID: "b", Now: 2, Origin: origin, MaxBytes: 1 << 20}}
				})
				all(func(d matrix.ServerName) []OutboxOp {
					return []OutboxOp{&Settle{Destination: d, TxnID: "b", Outcome: Delivered}}
				})
			}
			per := float64(n) * float64(dests)
			b.ReportMetric(float64((cpuTime(b)-began).Microseconds())/per, "cpu-µs/dest")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/per, "µs/dest")
			b.ReportMetric(float64(s.Stats().Rows)/per, "rows/dest")
			b.ReportMetric(float64(file)/float64(dests), "file-B/dest")
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkLoadOutbox is the start with 10,000 destinations that wait.
func BenchmarkLoadOutbox(b *testing.B) {
	s := open(b, Options{Path: newPath(b), QueueBytes: 64 << 20})
	var batch Batch
	event := items(b, []string{pdu("!r", 1, strings.Repeat("x", 1500))}, []string{presence("@u:hs1.test", "", 1)})
	for i := range 10000 {
		batch.Outbox = append(batch.Outbox, &Accept{Destination: matrix.ServerName(numbered("a", i)), Items: event, Accepted: 1})
	}
	if err := submit(b, s, &batch); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if n := len(loadOutbox(b, s)); n != 10000 {
			b.Fatal(n)
		}
	}
}

package store

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"fsbus/bus/matrix"
)

// The benchmarks write the same rows in groups of the same size: through the
// store, one batch a row; through SQLite alone, one transaction a group; and
// as bytes appended to a file, one fsync a group. ns/op is the time of a row.

func benchmarkHost(i int) Host {
	return Host{
		Name: matrix.ServerName(fmt.Sprintf("server%d.example.org", i%DefaultMaxHosts)), Failures: 3, Failure: matrix.FailTimeout,
		Error: "dial tcp 192.0.2.1:8448: i/o timeout", FailingSince: 1763700000000, FailedAt: 1763700000000, RetryAt: 1763700000000,
	}
}

func eachGroupSize(b *testing.B, f func(b *testing.B, group int)) {
	for _, group := range []int{1, 100, 1000} {
		b.Run(fmt.Sprint("group=", group), func(b *testing.B) {
			b.ReportAllocs()
			f(b, group)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}

func BenchmarkStore(b *testing.B) {
	eachGroupSize(b, func(b *testing.B, group int) {
		s := open(b, Options{Path: newPath(b), MaxGroup: group})
		// Two groups in flight, so that one gathers while the other is stored.
		flight := make(chan struct{}, 2*group)
		batches := make([]Batch, 2*group)
		for i := range batches {
			batches[i].Hosts = make([]Host, 1)
		}
		done := func(err error) {
			if err != nil {
				b.Error(err)
			}
			<-flight
		}
		b.ResetTimer()
		for i := range b.N {
			flight <- struct{}{}
			// As many later, batch i is complete: they complete in order.
			batch := &batches[i%len(batches)]
			batch.Hosts[0] = benchmarkHost(i)
			if err := s.Submit(batch, done); err != nil {
				b.Fatal(err)
			}
		}
		for range cap(flight) {
			flight <- struct{}{}
		}
		b.ReportMetric(float64(b.N)/float64(max(s.Stats().Commits, 1)), "rows/commit")
	})
}

func BenchmarkSQLite(b *testing.B) {
	eachGroupSize(b, func(b *testing.B, group int) {
		path := newPath(b)
		closeStore(b, open(b, Options{Path: path}))
		c := openRaw(b, path)
		if err := c.exec(b.Context(), "PRAGMA synchronous = FULL; PRAGMA cache_size = -2048"); err != nil {
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
		put := prepare("INSERT OR REPLACE INTO host VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
		exec := func(s *stmt) {
			if _, err := s.exec(); err != nil {
				b.Fatal(err)
			}
		}
		b.ResetTimer()
		for i := 0; i < b.N; {
			exec(begin)
			for range min(group, b.N-i) {
				h := benchmarkHost(i)
				if _, err := put.exec(string(h.Name), int64(h.Failures), h.Failure.String(), int64(h.Status), h.Error,
					h.FailingSince, h.FailedAt, h.RetryAt, h.SucceededAt, int64(i)); err != nil {
					b.Fatal(err)
				}
				i++
			}
			exec(commit)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	// What a row of the above takes.
	benchmarkAppend(b, 130, func(group int) int { return group })
}

// benchmarkAppend appends rows of so many bytes to a file. limit returns how many
// share an fsync where group is the most.
func benchmarkAppend(b *testing.B, size int, limit func(group int) int) {
	eachGroupSize(b, func(b *testing.B, group int) {
		f, err := os.Create(filepath.Join(b.TempDir(), "log"))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		group = limit(group)
		row := make([]byte, size)
		buf := make([]byte, 0, group*len(row))
		b.ResetTimer()
		for i := 0; i < b.N; {
			buf = buf[:0]
			for range min(group, b.N-i) {
				buf = append(buf, row...)
				i++
			}
			if _, err := f.Write(buf); err != nil {
				b.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkLoadHosts loads a full table, as at every start.
func BenchmarkLoadHosts(b *testing.B) {
	s := open(b, Options{Path: newPath(b)})
	for i := 0; i < DefaultMaxHosts; {
		var batch Batch
		for range 1000 {
			batch.Hosts = append(batch.Hosts, benchmarkHost(i))
			i++
		}
		put(b, s, batch.Hosts...)
	}
	b.ReportAllocs()
	for b.Loop() {
		if n := len(load(b, s, DefaultMaxHosts)); n != DefaultMaxHosts {
			b.Fatal(n)
		}
	}
}

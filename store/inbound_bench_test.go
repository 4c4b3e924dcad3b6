package store

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"testing"

	"fsbus/bus/matrix"
)

// benchmarkInbound is a transaction of so many PDUs, with its answer.
func benchmarkInbound(i, pdus int) InboundTxn {
	x := InboundTxn{
		Origin: matrix.ServerName(fmt.Sprintf("server%d.example.org", i%1000)), ID: fmt.Sprintf("1763700000000-%d", i),
		Answered: inboundAt + int64(i),
	}
	x.Answer = append(x.Answer, `{"pdus":{`...)
	for n := range pdus {
		hash := sha256.Sum256(fmt.Append(nil, i, n))
		p := InboundPDU{hash, fmt.Sprintf("$%x", hash)[:44]}
		x.PDUs = append(x.PDUs, p)
		if n > 0 {
			x.Answer = append(x.Answer, ',')
		}
		x.Answer = fmt.Appendf(x.Answer, "%q:{}", p.EventID)
	}
	x.Answer = append(x.Answer, `}}`...)
	return x
}

// fullInbound opens a store of which the table is full, each with one PDU.
func fullInbound(b *testing.B) *Store {
	s := open(b, Options{Path: newPath(b), QueueBytes: 32 << 20})
	fillInbound(b, s, 0, DefaultMaxInbound, func(i int) InboundTxn { return benchmarkInbound(i, 1) })
	return s
}

// BenchmarkInbound writes transactions in batches, one after the other, into a full
// table: each is an fsync, and so many rows make room for as many. log-B/row is what
// that adds to the log, and file-B/row what moving the log writes into the main file if
// that is done as often as in use: both together are what it costs a disk.
func BenchmarkInbound(b *testing.B) {
	for _, size := range []int{1, 100} {
		for _, pdus := range []int{0, 1, 10} {
			b.Run(fmt.Sprintf("batch=%d/pdus=%d", size, pdus), func(b *testing.B) {
				s := fullInbound(b)
				raw := openRaw(b, s.opt.Path)
				emptyLog(b, s, raw)
				b.ReportAllocs()
				var log, file int64
				n, batches := DefaultMaxInbound, 0
				count := func() {
					pages, different := logPages(b, s)
					log, file = log+pages, file+different
					emptyLog(b, s, raw)
				}
				for b.Loop() {
					var batch Batch
					for range size {
						batch.Inbound = append(batch.Inbound, benchmarkInbound(n, pdus))
						n++
					}
					putBatch(b, s, &batch)
					batches++
					if fileSize(s.opt.Path+"-wal") > checkpointPages*8/10*pageSize {
						b.StopTimer()
						count()
						b.StartTimer()
					}
				}
				count()
				rows := float64(batches * size)
				b.ReportMetric(rows/b.Elapsed().Seconds(), "rows/s")
				b.ReportMetric(float64(log)*pageSize/rows, "log-B/row")
				b.ReportMetric(float64(file)*pageSize/rows, "file-B/row")
			})
		}
	}
}

func BenchmarkLoadInbound(b *testing.B) {
	for _, c := range []struct {
		name  string
		write bool
		txn   func(i int) InboundTxn
		pdus  bool
		found bool
	}{
		{"new", false, func(i int) InboundTxn { return benchmarkInbound(DefaultMaxInbound+i, 1) }, false, false},
		{"new, after a write", true, func(i int) InboundTxn { return benchmarkInbound(DefaultMaxInbound+i, 1) }, false, false},
		{"stored", false, func(i int) InboundTxn { return benchmarkInbound(i*7919%40_000+5000, 1) }, false, true},
		{"new PDU", false, func(i int) InboundTxn { return benchmarkInbound(DefaultMaxInbound+i, 1) }, true, false},
		{"stored PDU", false, func(i int) InboundTxn { return benchmarkInbound(i*7919%40_000+5000, 1) }, true, true},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := fullInbound(b)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				b.StopTimer()
				x := c.txn(i)
				if c.write {
					y := benchmarkInbound(i, 1)
					y.Answered += day / 2
					putBatch(b, s, &Batch{Inbound: []InboundTxn{y}})
				}
				list := hashes(&x)
				b.StartTimer()
				var found bool
				var err error
				if c.pdus {
					_, found, err = s.InboundPDUs(x.Origin, list, 0)
				} else {
					_, found, err = s.LoadInbound(x.Origin, x.ID, 0)
				}
				if found != c.found || err != nil {
					b.Fatal(i, found, err)
				}
				i++
			}
		})
	}
}

func BenchmarkRecountInbound(b *testing.B) {
	s := fullInbound(b)
	for b.Loop() {
		s.writerDo(b, func(w *writer) {
			if err := w.inbound.recount(); err != nil {
				b.Error(err)
			}
		})
	}
	closeStore(b, s)
	b.ReportMetric(float64(fileSize(s.opt.Path))/DefaultMaxInbound, "file-B/row")
}

// logPages returns how many pages the log has, and how many different ones: of each
// frame the first four bytes are its page (sqlite.org/fileformat.html 4.1).
func logPages(b *testing.B, s *Store) (all, different int64) {
	log, err := os.ReadFile(s.opt.Path + "-wal")
	if err != nil {
		b.Fatal(err)
	}
	seen := map[uint32]bool{}
	for at := 32; at+24+pageSize <= len(log); at += 24 + pageSize {
		all++
		seen[binary.BigEndian.Uint32(log[at:])] = true
	}
	return all, int64(len(seen))
}

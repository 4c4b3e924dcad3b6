package store

import (
	"context"
	"fmt"
	"testing"

	"fsbus/bus/matrix"
)

// benchmarkRow is a profile with its header, and about what a key object with the
// signature of a notary has.
const (
	benchmarkAnswer = 450
	benchmarkObject = 1000
)

// fullCaches opens a store of which both tables are full.
func fullCaches(b *testing.B) *Store {
	s := open(b, Options{Path: newPath(b), QueueBytes: 32 << 20})
	var batch Batch
	for i := range DefaultMaxAnswers {
		batch.Answers = append(batch.Answers, anAnswer(i, benchmarkAnswer))
		batch.Keys = append(batch.Keys, someKeys(notaryName, i, benchmarkObject))
	}
	putBatch(b, s, &batch)
	return s
}

func BenchmarkLoadAnswer(b *testing.B) {
	s := fullCaches(b)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, found, err := s.LoadAnswer(answerKey(i * 7919 % DefaultMaxAnswers)); !found || err != nil {
			b.Fatal(found, err)
		}
		i++
	}
}

// As with each commit of the writer, which makes the reader's pages old.
func BenchmarkLoadAnswerAfterAWrite(b *testing.B) {
	s := fullCaches(b)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		b.StopTimer()
		putBatch(b, s, &Batch{Answers: []Answer{anAnswer(i%DefaultMaxAnswers, benchmarkAnswer)}})
		b.StartTimer()
		if _, found, err := s.LoadAnswer(answerKey(i * 7919 % DefaultMaxAnswers)); !found || err != nil {
			b.Fatal(found, err)
		}
		i++
	}
}

func BenchmarkLoadAnswerThatIsNotThere(b *testing.B) {
	s := fullCaches(b)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, found, err := s.LoadAnswer(answerKey(DefaultMaxAnswers + i)); found || err != nil {
			b.Fatal(found, err)
		}
		i++
	}
}

func BenchmarkLoadKeys50(b *testing.B) {
	s := fullCaches(b)
	servers := make([]matrix.ServerName, 50)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		for j := range servers {
			servers[j] = numberedName((i + j*199) % DefaultMaxKeys)
		}
		n := 0
		if err := s.LoadKeys(notaryName, servers, func(ServerKeys) error { n++; return nil }); n != len(servers) || err != nil {
			b.Fatal(n, err)
		}
		i++
	}
}

func BenchmarkAnswerIndex(b *testing.B) {
	s := fullCaches(b)
	b.ReportAllocs()
	for b.Loop() {
		n := 0
		if err := s.AnswerIndex(context.Background(), DefaultMaxAnswers, func(AnswerInfo) error { n++; return nil }); n != DefaultMaxAnswers || err != nil {
			b.Fatal(n, err)
		}
	}
}

// BenchmarkPutAnswers writes 200 answers in a batch into a full table, new ones, of
// which each 3rd batch or so makes room, or others in their place. log/op is what
// that adds to the log, and so what it costs a disk besides moving the log.
func BenchmarkPutAnswers(b *testing.B) {
	for _, fresh := range []bool{true, false} {
		b.Run(fmt.Sprint("new=", fresh), func(b *testing.B) {
			s := fullCaches(b)
			raw := openRaw(b, s.opt.Path)
			emptyLog(b, s, raw)
			b.ReportAllocs()
			n := 0
			var log int64
			for b.Loop() {
				var batch Batch
				for range 200 {
					i := n * 7919 % DefaultMaxAnswers
					if fresh {
						i = DefaultMaxAnswers + n
					}
					batch.Answers = append(batch.Answers, anAnswer(i, benchmarkAnswer))
					n++
				}
				putBatch(b, s, &batch)
				b.StopTimer()
				log += emptyLog(b, s, raw)
				b.StartTimer()
			}
			b.ReportMetric(float64(log)*pageSize/float64(b.N), "log-B/op")
		})
	}
}

// emptyLog empties the log and returns how many pages it had.
func emptyLog(b *testing.B, s *Store, raw *conn) int64 {
	size := fileSize(s.opt.Path + "-wal")
	if err := raw.exec(context.Background(), "PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		b.Fatal(err)
	}
	return max(size-32, 0) / (pageSize + 24)
}

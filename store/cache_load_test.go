package store

import (
	"database/sql/driver"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"fsbus/bus/matrix"
)

// Readers see whole rows, never older ones than those that were completed before,
// and do not keep the log from starting over.
func TestReadersAndTheWriterDoNotDisturbEachOther(t *testing.T) {
	const rows, rounds, readers = 20, 60, 3
	s := open(t, Options{Path: newPath(t)})
	batch := func(round int) *Batch {
		b := new(Batch)
		for i := range rows {
			a := Answer{Key: answerKey(i), Stored: int64(round), Body: filled(round, 3000+i)}
			k := ServerKeys{Via: notaryName, Server: numberedName(i), Fetched: matrix.Timestamp(round), Object: filled(round, 3000+i)}
			x := inboundTxn(i, 3000+i, 2)
			x.Answered += int64(round)
			x.Answer, x.PDUs[1].EventID = a.Body, fmt.Sprint(round)
			b.Answers, b.Keys, b.Inbound = append(b.Answers, a), append(b.Keys, k), append(b.Inbound, x)
		}
		return b
	}
	putBatch(t, s, batch(0))
	var mu sync.Mutex
	completed := 0 // the last round
	least := func() int64 {
		mu.Lock()
		defer mu.Unlock()
		return int64(completed)
	}
	var servers []matrix.ServerName
	for i := range rows {
		servers = append(servers, numberedName(i))
	}
	check := func(i int, round int64, content []byte, least int64) error {
		if round < least || string(content) != string(filled(int(round), 3000+i)) {
			return fmt.Errorf("row %d is of round %d with %.10q, want at least %d", i, round, content, least)
		}
		return nil
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var reads [readers]int
	for r := range readers {
		wg.Go(func() {
			for ; ; reads[r]++ {
				select {
				case <-stop:
					return
				default:
				}
				from, i := least(), reads[r]%rows
				a, found, err := s.LoadAnswer(answerKey(i))
				if err == nil && !found {
					err = errors.New("an answer is gone")
				}
				if err == nil {
					err = check(i, a.Stored, a.Body, from)
				}
				if err != nil {
					t.Error(err)
					return
				}
				from = least()
				x := inboundTxn(i, 0, 2)
				// Of the round that is complete something is there, and never without the rest.
				in, found, err := s.LoadInbound(x.Origin, x.ID, inboundAt+from-1)
				if err == nil && !found {
					err = errors.New("a transaction is gone")
				}
				if err == nil {
					round, _, _ := strings.Cut(string(in.Answer), ",")
					n, _ := strconv.ParseInt(round, 10, 64)
					err = check(i, n, in.Answer, from)
				}
				if err == nil {
					var ids []string
					ids, found, err = s.InboundPDUs(x.Origin, hashes(&x), inboundAt+from-1)
					if err == nil && (!found || ids[0] != x.PDUs[0].EventID) {
						err = fmt.Errorf("PDUs %q, %v", ids, found)
					}
					if err == nil {
						if n, _ := strconv.ParseInt(ids[1], 10, 64); n < from {
							err = fmt.Errorf("PDUs of round %d, want at least %d", n, from)
						}
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
				i, from = 0, least()
				if err := s.LoadKeys(notaryName, servers, func(k ServerKeys) error {
					i++
					return check(i-1, int64(k.Fetched), k.Object, from)
				}); err != nil || i != rows {
					t.Errorf("%d of %d keys: %v", i, rows, err)
					return
				}
			}
		})
	}
	for round := 1; round <= rounds; round++ {
		putBatch(t, s, batch(round))
		mu.Lock()
		completed = round
		mu.Unlock()
	}
	close(stop)
	wg.Wait()
	for r, n := range reads {
		if n == 0 {
			t.Errorf("reader %d never got to read", r)
		}
	}
	auditCaches(t, s)
	// Each round writes 180 KB, so the log started over some times.
	if size := s.Stats().WALBytes; size > 2*walLimit {
		t.Errorf("the log has grown to %d bytes", size)
	}
}

func TestAnIdleReaderKeepsNothingInTheLog(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 100)}, Keys: []ServerKeys{someKeys(notaryName, 1, 100)}})
	loadAnswer(t, s, answerKey(1))
	loadAnswer(t, s, answerKey(2)) // no row
	loadKeys(t, s, notaryName, numberedName(1), numberedName(2))
	if err := s.LoadKeys(notaryName, []matrix.ServerName{numberedName(1)}, func(ServerKeys) error { return errInjected }); err == nil {
		t.Error("no error")
	}
	x := inboundTxn(1, 100, 2)
	putBatch(t, s, &Batch{Inbound: []InboundTxn{x}})
	accept(t, s, "a.test", "", 1, pdus(t, pdu("!r", 1, "1"), pdu("!r", 2, "2")))
	wantInbound(t, s, &x)
	loadInbound(t, s, 2, 0)
	inboundPDUs(t, s, x.Origin, append(hashes(&x), [32]byte{}), 0)
	if err := s.PendingPDUs("a.test", 9, func([]byte) (bool, error) { return true, errInjected }); err == nil {
		t.Error("no error")
	}
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(2, 100)}})
	if fileSize(path+"-wal") == 0 {
		t.Fatal("no log")
	}
	if err := openRaw(t, path).query(t.Context(), "PRAGMA wal_checkpoint(TRUNCATE)", nil, func(vals []driver.Value) error {
		want(t, "busy: somebody still reads what is in the log", vals[0], driver.Value(int64(0)))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want(t, "log", fileSize(path+"-wal"), int64(0))
	_, found := loadAnswer(t, s, answerKey(2))
	want(t, "found", found, true)
}

func TestCloseWaitsForReadersAndRefusesOthers(t *testing.T) {
	for range 20 {
		path := newPath(t)
		s := open(t, Options{Path: path})
		x := inboundTxn(1, 20_000, 5)
		putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 20_000)}, Keys: []ServerKeys{someKeys(notaryName, 1, 20_000)}, Inbound: []InboundTxn{x}})
		var wg, reading sync.WaitGroup
		var closed atomic.Bool
		for range 4 {
			wg.Add(1)
			reading.Add(1)
			go func() {
				defer wg.Done()
				for i := 0; ; i++ {
					late := closed.Load()
					a, found, err := s.LoadAnswer(answerKey(1))
					if err == nil {
						err = s.LoadKeys(notaryName, []matrix.ServerName{numberedName(1)}, func(ServerKeys) error { return nil })
					}
					if err == nil {
						_, found, err = s.InboundPDUs(x.Origin, hashes(&x), 0)
					}
					if i == 0 {
						reading.Done()
					}
					if errors.Is(err, ErrClosed) {
						return
					}
					if err != nil || !found || len(a.Body) == 0 || late {
						t.Errorf("%v, %v, after Close: %v", found, err, late)
						return
					}
				}
			}()
		}
		reading.Wait()
		closeStore(t, s)
		closed.Store(true)
		want(t, "log", fileSize(path+"-wal"), int64(0))
		wg.Wait()
	}
}

// LoadKeys has one row in memory at a time, whatever it reads.
func TestLoadKeysTakesTheMemoryOfOneRow(t *testing.T) {
	const rows = 200
	s := open(t, Options{Path: newPath(t), QueueBytes: 64 << 20})
	var b Batch
	var servers []matrix.ServerName
	for i := range rows {
		b.Keys = append(b.Keys, someKeys(notaryName, i, MaxKeyObject))
		servers = append(servers, numberedName(i))
	}
	putBatch(t, s, &b)
	b = Batch{}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, most, n := heap(), int64(0), 0
	if err := s.LoadKeys(notaryName, servers, func(k ServerKeys) error {
		if n++; n%20 == 0 {
			most = max(most, heap()-before)
		}
		runtime.KeepAlive(k)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want(t, "rows", n, rows)
	if most > 8*MaxKeyObject {
		t.Errorf("%d bytes of heap while reading %d rows of %d", most, rows, MaxKeyObject)
	}
	t.Logf("%d bytes", most)
}

// The reader is not there before it is needed, and is one connection.
func TestAReaderIsOpenedWhenItIsNeeded(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	putBatch(t, s, &Batch{Answers: []Answer{anAnswer(1, 10)}})
	index(t, s, 10)
	if s.lookups.open != nil {
		t.Error("a reader before the first look-up")
	}
	loadAnswer(t, s, answerKey(1))
	r := s.lookups.open
	goroutines := runtime.NumGoroutine()
	for range 100 {
		loadAnswer(t, s, answerKey(1))
		loadKeys(t, s, notaryName, "a.test")
	}
	want(t, "the same reader", s.lookups.open, r)
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines more", n-goroutines)
	}
	for pragma, val := range map[string]int64{"query_only": 1, "cache_size": -readerCache, "busy_timeout": 5000} {
		want(t, pragma, count(t, r.conn, "PRAGMA "+pragma), val)
	}
}

package store

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"fsbus/bus/matrix"
)

// The child process of this test stores numbered batches, each of an answer, keys and
// a transaction that was answered, which belong together, as fast as it can, and writes the number of each that
// was acknowledged to its standard output, until it is killed. The bounds are
// reached again and again.
const (
	crashCacheEnv  = "FSBUS_STORE_CRASH_CACHE" // path of the store; set in the child only
	crashCacheRows = 160
)

func crashCacheOptions(path string) Options {
	return Options{Path: path, MaxGroup: 16, MaxAnswers: crashCacheRows, MaxKeys: crashCacheRows, MaxInbound: crashCacheRows}
}

func crashCacheBatch(n int64) *Batch {
	// Of 200 keys, so that some rows are replaced and others are new.
	i, size := int(n%200), int(n%7)*400+1
	a, k := anAnswer(i, size), someKeys(notaryName, i, size)
	a.Stored, k.Fetched = n, matrix.Timestamp(n)
	x := inboundTxn(i, size, int(n%4))
	x.Answered += n
	return &Batch{Answers: []Answer{a}, Keys: []ServerKeys{k}, Inbound: []InboundTxn{x}}
}

// crashCacheChild never returns.
func crashCacheChild(path string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(3)
	}
	s, err := Open(context.Background(), crashCacheOptions(path))
	if err != nil {
		fail(err)
	}
	last := int64(0)
	if err := s.AnswerIndex(context.Background(), 1, func(a AnswerInfo) error { last = a.Stored; return nil }); err != nil {
		fail(err)
	}
	flight := make(chan struct{}, crashFlight)
	for n := last + 1; ; n++ {
		flight <- struct{}{}
		if err := s.Submit(crashCacheBatch(n), func(err error) {
			if err != nil {
				fail(err)
			}
			if _, err := os.Stdout.Write(binary.BigEndian.AppendUint64(nil, uint64(n))); err != nil {
				fail(err)
			}
			<-flight
		}); err != nil {
			fail(err)
		}
	}
}

func TestTheCachesSurviveKill9(t *testing.T) {
	rounds, seed := crashSetting(t, crashRoundsEnv, 10), crashSetting(t, crashSeedEnv, 1)
	rng := rand.New(rand.NewPCG(uint64(seed), 2))
	path := newPath(t)
	acked := int64(0)
	for round := range rounds {
		acks := 1 + rng.IntN(500)
		first, last := crashCacheOnce(t, path, acks)
		if first <= acked {
			t.Fatalf("round %d (seed %d): the child began at %d, but %d was acknowledged before", round, seed, first, acked)
		}
		acked = last
		crashCacheVerify(t, path, acked)
		if t.Failed() {
			t.Fatalf("round %d (seed %d), killed after %d", round, seed, acks)
		}
	}
	t.Logf("%d rounds, %d batches acknowledged", rounds, acked)
}

// crashCacheOnce runs a child, kills it after it has acknowledged at least acks
// batches, and returns the numbers of the first and the last acknowledged.
func crashCacheOnce(t *testing.T, path string, acks int) (first, last int64) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), crashCacheEnv+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var buf [8]byte
	for r := bufio.NewReader(out); ; acks-- {
		if acks == 0 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := io.ReadFull(r, buf[:]); err != nil {
			break
		}
		if last = int64(binary.BigEndian.Uint64(buf[:])); first == 0 {
			first = last
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 || acks > 0 {
		t.Fatalf("the child was to be killed, not to end with %v, %d acknowledgements early", err, acks)
	}
	return first, last
}

// crashCacheVerify checks that the file is sound, that the tables keep their bounds,
// and that the newest batches, up to the one that was acknowledged last or one that
// was in flight, are there as a whole and those before in the order of writes.
func crashCacheVerify(t *testing.T, path string, acked int64) {
	t.Helper()
	s := open(t, crashCacheOptions(path))
	verdict, err := value[string](t.Context(), openRaw(t, path), "PRAGMA integrity_check")
	if err != nil || verdict != "ok" {
		t.Errorf("integrity_check: %s, %v", verdict, err)
	}
	auditCaches(t, s)
	list := index(t, s, 10*crashCacheRows)
	if len(list) == 0 || len(list) > crashCacheRows || len(list) < min(int(acked), crashCacheRows-crashCacheRows/16-1) {
		t.Fatalf("%d answers after %d batches", len(list), acked)
	}
	newest := list[0].Stored
	if newest < acked || newest > acked+crashFlight {
		t.Errorf("newest batch is %d, want %d to %d", newest, acked, acked+crashFlight)
	}
	for i, info := range list {
		n := newest - int64(i)
		b := crashCacheBatch(n)
		want(t, "index", info.Stored, n)
		a, _ := loadAnswer(t, s, b.Answers[0].Key)
		want(t, "answer", a, b.Answers[0])
		want(t, "keys", loadKeys(t, s, notaryName, b.Keys[0].Server), b.Keys)
		wantInbound(t, s, &b.Inbound[0])
	}
	want(t, "inbound in all", s.Stats().Inbound.Rows, int64(len(list)))
	// What is gone is not found.
	for n := newest - int64(len(list)); n > max(newest-200, 0); n-- {
		x := crashCacheBatch(n).Inbound[0]
		if _, found, err := s.LoadInbound(x.Origin, x.ID, 0); found || err != nil {
			t.Errorf("batch %d of %d: %v, %v", n, newest, found, err)
		}
		if _, ok := inboundPDUs(t, s, x.Origin, hashes(&x), 0); ok {
			t.Errorf("PDUs of batch %d of %d are there without it", n, newest)
		}
	}
	var all []matrix.ServerName
	for i := range 200 {
		all = append(all, numberedName(i))
	}
	want(t, "keys in all", len(loadKeys(t, s, notaryName, all...)), len(list))
	closeStore(t, s)
}

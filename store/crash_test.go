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
	"strconv"
	"testing"

	"fsbus/bus/matrix"
)

// The child process stores batches as fast as it can, always some of them in
// flight, and writes the number of each that was acknowledged to its standard
// output, until it is killed. Batch n writes two hosts, which belong together,
// both with n in a time field; there are crashHosts such pairs, so later
// batches overwrite earlier ones and the log is moved into the file again and
// again.
const (
	crashChildEnv  = "FSBUS_STORE_CRASH_CHILD"  // path of the store; set in the child only
	crashRoundsEnv = "FSBUS_STORE_CRASH_ROUNDS" // how often to kill, for long runs
	crashSeedEnv   = "FSBUS_STORE_CRASH_SEED"   // repeats a run's kill moments

	crashHosts  = 97 // prime, so that groups begin at any pair
	crashFlight = 64 // batches in flight
)

func crashPair(n int64) (a, b matrix.ServerName) {
	i := int(n % crashHosts)
	return matrix.ServerName(numbered("a", i)), matrix.ServerName(numbered("b", i))
}

// crashChild never returns. It starts after the last number stored.
func crashChild(path string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(3)
	}
	s, err := Open(context.Background(), Options{Path: path, MaxGroup: 16})
	if err != nil {
		fail(err)
	}
	hosts, err := s.LoadHosts(context.Background(), 2*crashHosts)
	if err != nil {
		fail(err)
	}
	last := int64(0)
	for _, h := range hosts {
		last = max(last, h.SucceededAt)
	}
	flight := make(chan struct{}, crashFlight)
	for n := last + 1; ; n++ {
		flight <- struct{}{}
		a, b := crashPair(n)
		batch := &Batch{Hosts: []Host{{Name: a, SucceededAt: n}, {Name: b, SucceededAt: n}}}
		if err := s.Submit(batch, func(err error) {
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

// crashOnce runs a child, kills it after it has acknowledged at least acks
// batches, and returns the numbers of the first and the last acknowledged.
func crashOnce(t *testing.T, path string, acks int) (first, last int64) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), crashChildEnv+"="+path)
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
			// SIGKILL: nothing of the child's own runs any more. What it
			// has written to the pipe before can still be read.
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := io.ReadFull(r, buf[:]); err != nil {
			break
		}
		n := int64(binary.BigEndian.Uint64(buf[:]))
		switch {
		case first == 0:
			first = n
		case n != last+1:
			t.Fatalf("batch %d acknowledged after %d", n, last)
		}
		last = n
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 || acks > 0 {
		t.Fatalf("the child was to be killed, not to end with %v, %d acknowledgements early", err, acks)
	}
	return first, last
}

func TestWhatWasAcknowledgedSurvivesKill9(t *testing.T) {
	rounds, seed := crashSetting(t, crashRoundsEnv, 10), crashSetting(t, crashSeedEnv, 1)
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	path := newPath(t)
	var acked int64 // the last number acknowledged in any round
	for round := range rounds {
		acks := 1 + rng.IntN(600)
		first, last := crashOnce(t, path, acks)
		if first <= acked {
			t.Fatalf("round %d (seed %d): the child began at %d, but %d was acknowledged before", round, seed, first, acked)
		}
		acked = last
		crashVerify(t, path, acked)
		if t.Failed() {
			t.Fatalf("round %d (seed %d), killed after %d", round, seed, acks)
		}
	}
	t.Logf("%d rounds, %d batches acknowledged", rounds, acked)
}

// crashVerify opens the store that a child left and checks that it is sound,
// that batches are whole, and that nothing up to number acked is missing.
func crashVerify(t *testing.T, path string, acked int64) {
	t.Helper()
	s := open(t, Options{Path: path})
	verdict, err := value[string](t.Context(), openRaw(t, path), "PRAGMA integrity_check")
	if err != nil || verdict != "ok" {
		t.Errorf("integrity_check: %s, %v", verdict, err)
	}
	found := map[matrix.ServerName]int64{}
	newest := int64(0)
	for _, h := range load(t, s, 1000) {
		found[h.Name] = h.SucceededAt
		newest = max(newest, h.SucceededAt)
	}
	if newest < acked || newest > acked+crashFlight {
		t.Errorf("newest batch is %d, want %d to %d", newest, acked, acked+crashFlight)
	}
	// Batches are stored in order, so the newest decides what each pair holds.
	for n := max(1, newest-crashHosts+1); n <= newest; n++ {
		if a, b := crashPair(n); found[a] != n || found[b] != n {
			t.Errorf("hosts %s and %s are of batches %d and %d, want %d", a, b, found[a], found[b], n)
		}
	}
	closeStore(t, s)
}

func crashSetting(t *testing.T, env string, def int) int {
	t.Helper()
	v := os.Getenv(env)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

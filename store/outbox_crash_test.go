package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"fsbus/bus/matrix"
)

// The child process of this test is a bus without a network. It accepts numbered
// transactions, each for two destinations, packs, "sends" by writing the body to
// its standard output, and settles, as fast as it can, until it is killed. What
// it writes, a line each:
//
//	A number            the transaction was acknowledged
//	D server id body    this body is being sent
const crashOutboxEnv = "FSBUS_STORE_CRASH_OUTBOX" // path of the store; set in the child only

func crashOutboxDests(n int64) [2]matrix.ServerName {
	name := func(i int64) matrix.ServerName { return matrix.ServerName(numbered("d", int(i%7))) }
	return [2]matrix.ServerName{name(n), name(n + 3)}
}

func crashOutboxUser(n int64) string { return fmt.Sprintf("@u%d:hs1.test", n%3) }

// crashOutboxItems is an event, a to-device message and a presence that bear n.
func crashOutboxItems(n int64) []matrix.Item {
	pad := strings.Repeat("x", int(n%5)*200)
	body := fmt.Sprintf(`{"origin":"hs1.test","pdus":[{"body":"%d","depth":%d,"pad":%q,"room_id":"!r"}],"edus":[%s,%s]}`,
		n, n, pad, toDevice(fmt.Sprint(n), fmt.Sprint(n)), presence(crashOutboxUser(n), fmt.Sprint(n), 1))
	txn, err := matrix.ParseTransaction([]byte(body))
	if err != nil {
		panic(err)
	}
	return txn.Items(nil)
}

// crashOutboxChild never returns.
func crashOutboxChild(path string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(3)
	}
	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if _, err := fmt.Fprintf(os.Stdout, format, args...); err != nil {
			fail(err)
		}
	}
	s, err := Open(context.Background(), Options{Path: path, MaxGroup: 16})
	if err != nil {
		fail(err)
	}
	last := int64(0)
	if err := s.LoadOutbox(context.Background(), func(d Destination) error {
		n, err := strconv.ParseInt(d.TxnID, 10, 64)
		last = max(last, n)
		return err
	}); err != nil {
		fail(err)
	}
	flight := make(chan struct{}, crashFlight)
	send := func(op OutboxOp, done func()) {
		flight <- struct{}{}
		if err := s.Submit(&Batch{Outbox: []OutboxOp{op}}, func(err error) {
			if err != nil {
				fail(err)
			}
			done()
			<-flight
		}); err != nil {
			fail(err)
		}
	}
	for n := last + 1; ; n++ {
		flight <- struct{}{}
		var b Batch
		for _, dest := range crashOutboxDests(n) {
			b.Outbox = append(b.Outbox, &Accept{Destination: dest, TxnID: fmt.Sprint(n), Items: crashOutboxItems(n), Accepted: n})
		}
		if err := s.Submit(&b, func(err error) {
			if err != nil {
				fail(err)
			}
			say("A %d\n", n)
			<-flight
		}); err != nil {
			fail(err)
		}
		if n%3 != 0 {
			continue
		}
		// One in flight for each destination: wait for what was packed.
		p := &Pack{Destination: crashOutboxDests(n / 3)[0], NewID: fmt.Sprint("b", n), Now: n, Origin: origin, MaxBytes: 20000}
		packed := make(chan struct{})
		send(p, func() { close(packed) })
		<-packed
		if p.Result.ID == "" {
			continue
		}
		st := &Settle{Destination: p.Destination, TxnID: p.Result.ID, Outcome: Delivered, Now: n}
		switch {
		case n%5 == 0 && !p.Result.Again:
			st.Outcome = Thaw
		case n%4 == 0:
			st.Outcome = Bisect
		}
		if st.Outcome != Thaw {
			say("D %s %s %s\n", p.Destination, p.Result.ID, p.Result.Body)
		}
		send(st, func() {})
	}
}

// crashOutboxWorld is what the other servers and the homeserver have seen.
type crashOutboxWorld struct {
	acked  []int64
	sent   map[string]string // by destination and id
	events map[string]bool   // destination, kind and number
	status map[string]int64  // destination and user: the newest number
}

var crashNumbers = regexp.MustCompile(`"(body|status_msg)":"(\d+)"(?:,"user_id":"([^"]*)")?`)

// see notes what is in a body or payload.
func (w *crashOutboxWorld) see(dest, text string) {
	for _, m := range crashNumbers.FindAllStringSubmatchIndex(text, -1) {
		number := text[m[4]:m[5]]
		switch {
		case text[m[2]:m[3]] == "status_msg":
			n, _ := strconv.ParseInt(number, 10, 64)
			key := dest + text[m[6]:m[7]]
			w.status[key] = max(w.status[key], n)
		case strings.HasPrefix(text[m[1]:], `,"depth"`):
			w.events[dest+" event "+number] = true
		default:
			w.events[dest+" message "+number] = true
		}
	}
}

func (w *crashOutboxWorld) line(t *testing.T, line string) {
	t.Helper()
	f := strings.SplitN(line, " ", 4)
	switch {
	case f[0] == "A" && len(f) == 2:
		n, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		w.acked = append(w.acked, n)
	case f[0] == "D" && len(f) == 4:
		key := f[1] + " " + f[2]
		if before, ok := w.sent[key]; ok && before != f[3] {
			t.Errorf("%s sent again with other bytes:\n%s\n%s", key, before, f[3])
		}
		w.sent[key] = f[3]
		w.see(f[1], f[3])
	default:
		t.Fatalf("child wrote %q", line)
	}
}

func TestTheOutboxSurvivesKill9(t *testing.T) {
	rounds, seed := crashSetting(t, crashRoundsEnv, 10), crashSetting(t, crashSeedEnv, 1)
	rng := rand.New(rand.NewPCG(uint64(seed), 1))
	path := newPath(t)
	w := &crashOutboxWorld{sent: map[string]string{}, events: map[string]bool{}, status: map[string]int64{}}
	for round := range rounds {
		lines := 1 + rng.IntN(500)
		crashOutboxOnce(t, path, lines, w)
		crashOutboxVerify(t, path, w)
		if t.Failed() {
			t.Fatalf("round %d (seed %d), killed after %d lines", round, seed, lines)
		}
	}
	t.Logf("%d rounds, %d transactions acknowledged, %d sent", rounds, len(w.acked), len(w.sent))
}

// crashOutboxOnce runs a child and kills it after it has written so many lines.
func crashOutboxOnce(t *testing.T, path string, lines int, w *crashOutboxWorld) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), crashOutboxEnv+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for r := bufio.NewReader(out); ; lines-- {
		if lines == 0 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		line, err := r.ReadString('\n')
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			break // half a line was not said
		}
		w.line(t, strings.TrimSuffix(line, "\n"))
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 || lines > 0 {
		t.Fatalf("the child was to be killed, not to end with %v, %d lines early", err, lines)
	}
}

// crashOutboxVerify checks that the store is sound, and that of all that was
// acknowledged each part was sent, or waits, or is set aside, or, of presence, a
// newer one is.
func crashOutboxVerify(t *testing.T, path string, w *crashOutboxWorld) {
	t.Helper()
	s := open(t, Options{Path: path})
	verdict, err := value[string](t.Context(), openRaw(t, path), "PRAGMA integrity_check")
	if err != nil || verdict != "ok" {
		t.Errorf("integrity_check: %s, %v", verdict, err)
	}
	audit(t, path)
	have := &crashOutboxWorld{events: map[string]bool{}, status: map[string]int64{}}
	for _, dest := range crashOutboxAll() {
		for _, it := range pending(t, s, dest) {
			have.see(string(dest), string(it.Payload))
		}
	}
	if err := s.LoadAside(t.Context(), func(a Aside) error {
		have.see(string(a.Destination), string(a.Payload))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, n := range w.acked {
		for _, dest := range crashOutboxDests(n) {
			for _, kind := range []string{"event", "message"} {
				if key := fmt.Sprintf("%s %s %d", dest, kind, n); !w.events[key] && !have.events[key] {
					t.Errorf("%s is lost", key)
				}
			}
			if key := string(dest) + crashOutboxUser(n); max(w.status[key], have.status[key]) < n {
				t.Errorf("presence %d of %s is lost", n, key)
			}
		}
	}
	closeStore(t, s)
}

func crashOutboxAll() (names []matrix.ServerName) {
	for n := range int64(7) {
		names = append(names, crashOutboxDests(n)[0])
	}
	return names
}

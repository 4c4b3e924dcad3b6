package netx

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
)

// stalling is a request's body that comes in pieces, and then does not go on
// until its time is over.
type stalling struct {
	pieces   []string
	deadline time.Time
}

func (s *stalling) Read(p []byte) (int, error) {
	if len(s.pieces) == 0 {
		time.Sleep(time.Until(s.deadline))
		return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.ErrDeadlineExceeded}
	}
	n := copy(p, s.pieces[0])
	s.pieces = s.pieces[1:]
	return n, nil
}

func (s *stalling) Close() error { return nil }

// TestReceiveSaysWhoWasSlow: a body that does not come in time is its client's
// fault, unless we have kept the client waiting.
func TestReceiveSaysWhoWasSlow(t *testing.T) {
	const limit = 30 * time.Second
	for _, tt := range []struct {
		name   string
		others time.Duration // how long others fill the spool
		want   *refusal
	}{
		{"there is room", 0, refuseTime},
		{"there is none for a moment", time.Second, refuseFull},
		{"there is none until it is too late", limit - time.Millisecond, refuseFull},
		{"there is none", limit + time.Second, refuseFull},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				spool := newTestSpool(t, SpoolConfig{Memory: 100})
				rc := receiver{spool, slog.New(slog.NewTextHandler(&log, nil)), &rate.Sometimes{First: 1}}
				deadline := time.Now().Add(limit)
				if tt.others > 0 {
					b := spool.New()
					if _, err := b.Write(make([]byte, 96)); err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(tt.others, b.Release)
				}
				body, _, err := rc.receive(&stalling{[]string{"hello", "world"}, deadline}, 1000, bodyPace{begun: deadline, grace: 0})
				if body != nil || err != error(tt.want) {
					t.Errorf("%v, want %v", err, tt.want)
				}
				if !time.Now().Equal(deadline) {
					t.Errorf("it ended %v before its time was over", time.Until(deadline))
				}
				if logged := strings.Contains(log.String(), ErrSpoolFull.Error()); logged != (tt.want == refuseFull) {
					t.Errorf("logged: %q", log.String())
				}
				time.Sleep(limit)
				if s := spool.Stats(); s.Memory != 0 {
					t.Errorf("left over in the spool: %+v", s)
				}
			})
		})
	}
}

// TestFrontWasSlow: Synapse takes any 4xx for a refusal by the destination. It
// gets none when it had to wait until there was no time left.
func TestFrontWasSlow(t *testing.T) {
	ft := newFrontTest(t, func(c *FrontConfig) {
		c.Spool = newTestSpool(t, SpoolConfig{Memory: 100})
		c.BodyTimeout = 300 * time.Millisecond
	})
	first := ft.spool.New()
	if _, err := io.WriteString(first, strings.Repeat("x", 96)); err != nil {
		t.Fatal(err)
	}
	c := ft.serve("unix")()
	write(t, c, request("PUT", "/_matrix/federation/v1/send/1", "Content-Length: 10\r\n", "hello"))
	eventually(t, "the request waits", func() bool { return ft.spool.Stats().Full > 0 })
	first.Release()
	if res, body := readAnswer(t, c, "PUT"); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%d %s", res.StatusCode, body)
	}
}

// A body has more time the more of it has come, as long as it comes at the least rate; one
// that trickles has no more than one that does not come at all.
func TestBodyPace(t *testing.T) {
	begun := time.Unix(1e9, 0)
	p := bodyPace{begun: begun, grace: 30 * time.Second, rate: 4 << 10, total: 10 * time.Minute}
	for _, tt := range []struct {
		n    int64
		want time.Duration
	}{
		{0, 30 * time.Second},
		{100, 30 * time.Second}, // three bytes a second, say
		{4 << 10, 31 * time.Second},
		{1 << 20, 30*time.Second + 256*time.Second},
		{50 << 20, 10 * time.Minute},
	} {
		if got := p.deadline(tt.n).Sub(begun); got != tt.want {
			t.Errorf("after %d bytes: %s, want %s", tt.n, got, tt.want)
		}
	}
}

// A large body over a line of 1 Mbit/s takes longer than BodyTimeout, and gets through.
func TestSlowLineGetsALargeBodyThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rc := receiver{newTestSpool(t, SpoolConfig{Memory: 1 << 20, Disk: 20 << 20}), slog.New(slog.DiscardHandler), &rate.Sometimes{First: 1}}
		line := &slowLine{left: 5 << 20, each: 12500, pause: 100 * time.Millisecond}
		start := time.Now()
		body, _, err := rc.receive(line, 50<<20, bodyPace{start, 30 * time.Second, defaultBodyRate, defaultBodyTotal, func(_ int64, later time.Time) error {
			if !later.IsZero() {
				line.deadline = later
			}
			return nil
		}})
		if err != nil || body.Size() != 5<<20 {
			t.Fatalf("%v, %v", body, err)
		}
		if took := time.Since(start); took < 40*time.Second {
			t.Errorf("it took %s", took)
		}
		body.Release()

		line = &slowLine{left: 5 << 20, each: 1, pause: 300 * time.Millisecond, deadline: time.Now().Add(30 * time.Second)}
		start = time.Now()
		if _, _, err := rc.receive(line, 50<<20, bodyPace{start, 30 * time.Second, defaultBodyRate, defaultBodyTotal, func(_ int64, later time.Time) error {
			if !later.IsZero() {
				line.deadline = later
			}
			return nil
		}}); err != error(refuseTime) {
			t.Errorf("three bytes a second: %v", err)
		}
		if took := time.Since(start); took > 31*time.Second {
			t.Errorf("three bytes a second kept their place for %s", took)
		}
	})
}

// slowLine is a connection that brings so many bytes at a time.
type slowLine struct {
	left, each int
	pause      time.Duration
	deadline   time.Time
}

func (l *slowLine) Read(p []byte) (int, error) {
	time.Sleep(l.pause) // of the test's own clock
	switch {
	case !l.deadline.IsZero() && time.Now().After(l.deadline):
		return 0, os.ErrDeadlineExceeded
	case l.left == 0:
		return 0, io.EOF
	}
	n := min(l.left, l.each, len(p))
	l.left -= n
	return n, nil
}

func (l *slowLine) Close() error { return nil }

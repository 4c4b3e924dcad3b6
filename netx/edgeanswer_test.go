package netx

import (
	"fmt"
	"net/http"
	"testing"
)

// The request's own goroutine writes, so a hundred readers that take nothing hold
// up nobody.
func TestEdgeAnswerHoldsUpNobody(t *testing.T) {
	et := newEdgeTest(t, "tcp", func(c *EdgeConfig) {
		c.TLS = testCertificates(t)
		c.MaxStreams, c.MaxRequests = 200, 1000
		c.StallTimeout = testWait
	})
	slow := newH2Client(et.dialTLS("h2"))
	for i := range 100 {
		slow.headers(uint32(2*i+1), true, "GET", "/slow")
		q := et.next()
		if err := q.Answer(func() { _ = q.Stream(200, nil, -1, zeros{}) }); err != nil {
			t.Fatal(err)
		}
	}
	res := make(chan string, 1)
	client := et.client(false)
	go func() {
		r, err := client.Get("https://hs1.test/quick")
		if err == nil {
			r.Body.Close()
		}
		res <- fmt.Sprint(err)
	}()
	q := et.next()
	if err := q.Answer(func() { reply(q) }); err != nil {
		t.Fatal(err)
	}
	if s := receiveFrom(t, res, "the quick one has its answer"); s != "<nil>" {
		t.Error(s)
	}
	if err := q.Answer(func() { t.Error("a second answer") }); err != ErrAnswered {
		t.Errorf("%v", err)
	}
}

func TestEdgeAnswerThatAnswersNothing(t *testing.T) {
	silentLogs(t)
	et := newEdgeTest(t, "tcp", nil)
	for i, write1 := range []func(){func() {}, func() { panic("in Answer") }} {
		c := et.dial()
		write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		q := et.next()
		if err := q.Answer(write1); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("%d: something was answered", i)
		}
	}
}

// An answer and the client's end may come at the same time; then either Gone is
// told, or the answer is written into nothing. Never both, never neither.
func TestEdgeAnswerOrGone(t *testing.T) {
	et := newEdgeTest(t, "tcp", nil)
	for range 300 {
		c := et.dial()
		write(t, c, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
		q := et.next()
		go c.Close()
		wrote := make(chan error, 1)
		err := q.Answer(func() { wrote <- q.Reply(http.StatusOK, nil, nil) })
		switch err {
		case nil:
			receiveFrom(t, wrote, "the answer is written")
			select {
			case <-et.gone:
				t.Fatal("answered and gone")
			default:
			}
		case ErrClientGone:
			receiveFrom(t, et.gone, "Gone is told")
		default:
			t.Fatal(err)
		}
	}
	eventually(t, "nothing is held", func() bool { return et.Stats().Held == 0 })
}

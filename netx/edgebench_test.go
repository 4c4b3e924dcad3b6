package netx

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// BenchmarkEdge is a PUT of 1 KiB that is answered at once, over kept TLS
// connections. The client's part is in the figures.
func BenchmarkEdge(b *testing.B) {
	body := strings.Repeat("x", 1<<10)
	b.Run("http1", func(b *testing.B) {
		et := newEdgeTest(b, "tcp", func(c *EdgeConfig) {
			c.TLS = testCertificates(b)
			c.Handle = reply
		})
		request := fmt.Appendf(nil, "PUT /_matrix/federation/v1/send/1 HTTP/1.1\r\nHost: hs1.test\r\nAuthorization: X-Matrix x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		b.RunParallel(func(pb *testing.PB) {
			c := et.dialTLS()
			br := bufio.NewReader(c)
			for pb.Next() {
				c.Write(request)
				res, err := http.ReadResponse(br, nil)
				if err != nil {
					b.Error(err)
					return
				}
				io.Copy(io.Discard, res.Body)
			}
		})
	})
	b.Run("http2", func(b *testing.B) {
		et := newEdgeTest(b, "tcp", func(c *EdgeConfig) {
			c.TLS = testCertificates(b)
			c.Handle = reply
		})
		b.RunParallel(func(pb *testing.PB) {
			client := et.client(true)
			for pb.Next() {
				req, _ := http.NewRequest("PUT", "https://hs1.test/_matrix/federation/v1/send/1", bytes.NewReader([]byte(body)))
				res, err := client.Do(req)
				if err != nil {
					b.Error(err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		})
	})
}

// BenchmarkEdgeMemory is what a kept TLS connection costs between two requests,
// and what a request costs that waits for its answer: heap and stacks of the
// Edge and of the client, whose own part is measured without an Edge's.
func BenchmarkEdgeMemory(b *testing.B) {
	const conns = 200
	measure := func() (heap, stack float64) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc), float64(m.StackInuse)
	}
	body := strings.Repeat("x", 1<<10)
	for _, proto := range []string{"http/1.1", "h2"} {
		b.Run(strings.ReplaceAll(proto, "/", ""), func(b *testing.B) {
			for range b.N {
				et := newEdgeTest(b, "tcp", func(c *EdgeConfig) {
					c.TLS = testCertificates(b)
					c.MaxConns = conns + 1
				})
				heap0, stack0 := measure()
				clients := make([]*tls.Conn, conns)
				send := func(i int) {
					if proto == "h2" {
						h := &h2Client{clients[i]}
						h.frame(h2Headers, h2EndHeaders, uint32(1), hpack(":method", "PUT", ":scheme", "https", ":path", "/x", ":authority", "hs1.test"))
						h.frame(h2Data, h2EndStream, 1, []byte(body))
					} else {
						fmt.Fprintf(clients[i], "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
					}
				}
				var held []*EdgeRequest
				for i := range clients {
					clients[i] = et.dialTLS(proto)
					if proto == "h2" {
						newH2Client(clients[i])
					}
					send(i)
				}
				for range clients {
					held = append(held, et.next())
				}
				heap1, stack1 := measure()
				b.ReportMetric((heap1-heap0)/conns, "heap-B/held")
				b.ReportMetric((stack1-stack0)/conns, "stack-B/held")
				for _, q := range held {
					reply(q)
				}
				held = nil
				eventually(b, "all idle", func() bool { return et.Stats().Idle == conns })
				heap2, stack2 := measure()
				b.ReportMetric((heap2-heap0)/conns, "heap-B/idle")
				b.ReportMetric((stack2-stack0)/conns, "stack-B/idle")
				for i := range clients {
					clients[i].NetConn().Close()
					clients[i] = nil
				}
				et.close()
				eventually(b, "all closed", func() bool { return et.Stats().Open == 0 })
			}
		})
	}
	b.Run("client", func(b *testing.B) { // to be taken off
		for range b.N {
			addr := raw(b, func(c *tls.Conn, head *bufio.Reader) { io.Copy(io.Discard, c) }, "hs1.test")
			et := &edgeTest{t: b}
			et.addr = net.TCPAddrFromAddrPort(addrOf(addr))
			heap0, stack0 := measure()
			clients := make([]*tls.Conn, conns)
			for i := range clients {
				clients[i] = et.dialTLS()
			}
			heap1, stack1 := measure()
			b.ReportMetric((heap1-heap0)/conns, "heap-B/pair")
			b.ReportMetric((stack1-stack0)/conns, "stack-B/pair")
		}
	})
}

// BenchmarkEdgeHandshake is a new TLS connection with one request on it, with a
// P-256 certificate. The client's part is in the figures.
func BenchmarkEdgeHandshake(b *testing.B) {
	for _, resume := range []bool{false, true} {
		b.Run(fmt.Sprint("resume ", resume), func(b *testing.B) {
			et := newEdgeTest(b, "tcp", func(c *EdgeConfig) {
				c.TLS = testCertificates(b)
				c.Handle = reply
			})
			config := clientTLS()
			if resume {
				config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
			}
			for range b.N {
				raw, err := net.Dial("tcp", et.addr.String())
				if err != nil {
					b.Fatal(err)
				}
				c := tls.Client(raw, config)
				getOn(b, c)
				c.Close()
			}
		})
	}
}

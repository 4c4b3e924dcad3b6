// Command fedsim runs a simulated Matrix federation on loopback: see package
// fsbus/scripts/fedsim/sim for what it simulates.
//
//	fedsim -servers 2000 -dead 0.05 -hanging 0.01 -ca ca.pem
//	curl http://127.0.0.1:18599/stats
//
// It runs until it gets SIGINT or SIGTERM. Exit codes: 0 stopped, 1 failed,
// 2 used wrongly.
package main

import (
	"context"
	"encoding/base64"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedsim/sim"
)

func main() {
	os.Exit(run())
}

func run() int {
	var c sim.Config
	flag.IntVar(&c.Servers, "servers", 100, "number of servers")
	flag.IntVar(&c.Port, "port", 18500, "port of all servers; 0 takes a free one")
	flag.Uint64Var(&c.Seed, "seed", 1, "seed of faults, keys and jitter")
	for k := sim.Well + 1; k < sim.NumKinds; k++ {
		flag.Float64Var(&c.Shares[k], k.String(), 0, fmt.Sprintf("share of %v servers, 0 to 1", k))
	}
	flag.DurationVar(&c.Latency, "latency", 0, "delay of every answer")
	flag.DurationVar(&c.Jitter, "jitter", 0, "largest random delay on top")
	flag.DurationVar(&c.SlowDelay, "slow-delay", sim.DefaultSlowDelay, "delay of slow servers' answers on top")
	flag.Float64Var(&c.Rate, "rate", sim.DefaultRate, "requests per second that a limited server bears")
	flag.BoolVar(&c.HTTP2, "http2", false, "offer HTTP/2")
	flag.BoolVar(&c.NoTickets, "no-tickets", false, "never resume TLS sessions")
	flag.BoolVar(&c.TLS12, "tls12", false, "TLS 1.2 only")
	flag.DurationVar(&c.IdleTimeout, "idle-timeout", sim.DefaultIdleTimeout, "until an unused connection is closed")
	flag.IntVar(&c.RoomMembers, "room-members", 0, "members of the big rooms, each on another server; 0: no rooms")
	flag.DurationVar(&c.SendJoin.Delay, "send-join-delay", 0, "delay of the headers of answers to send_join")
	flag.DurationVar(&c.SendJoin.Drip, "send-join-drip", 0, "time over which their body is spread")
	flag.Int64Var(&c.SendJoin.Rate, "send-join-rate", 0, "bytes of their body in a second; 0: no limit")
	flag.Int64Var(&c.SendJoin.Size, "send-join-size", 0, "bytes that their body has at least")
	flag.BoolVar(&c.SendJoin.Chunked, "send-join-chunked", false, "no Content-Length")
	flag.BoolVar(&c.Notary, "notary", false, "make the first server a notary that knows all keys")
	flag.DurationVar(&c.NotaryLatency, "notary-latency", 0, "delay of its answers")
	flag.Func("key-fault", "what is wrong with keys: wrong-name, swapped, bad-signature, oversized, cut or wrong-type",
		func(s string) (err error) {
			c.KeyFault, err = sim.ParseKeyFault(s)
			return err
		})
	flag.Func("origin", `verify requests of this homeserver: "NAME ed25519:VERSION PUBLIC_KEY_IN_BASE64" (repeatable)`,
		func(s string) error {
			o, err := parseOrigin(s)
			c.Origins = append(c.Origins, o)
			return err
		})
	ca := flag.String("ca", "", "file to write the authority's certificate to")
	driver := flag.String("driver", "127.0.0.1:18599", "address of the HTTP driver")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "fedsim: unexpected argument %q\n", flag.Arg(0))
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, c, *ca, *driver); err != nil {
		fmt.Fprintln(os.Stderr, "fedsim:", err)
		return 1
	}
	return 0
}

// serve runs the federation and its driver until ctx ends.
func serve(ctx context.Context, c sim.Config, ca, driver string) error {
	l, err := net.Listen("tcp", driver)
	if err != nil {
		return err
	}
	defer l.Close()
	began := time.Now()
	w, err := sim.New(c)
	if err != nil {
		return err
	}
	defer w.Close()
	if ca != "" {
		if err := os.WriteFile(ca, w.CAPEM(), 0o644); err != nil {
			return err
		}
	}
	w.Start()
	names := w.Names()
	fmt.Printf("%d servers, %s to %s, ready after %v; driver at http://%s/stats\n",
		len(names), names[0], names[len(names)-1], time.Since(began).Round(time.Millisecond), l.Addr())

	server := &http.Server{Handler: w.Driver(), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	defer server.Close()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

// parseOrigin reads the value of the flag -origin.
func parseOrigin(s string) (sim.Origin, error) {
	f := strings.Fields(s)
	if len(f) != 3 {
		return sim.Origin{}, fmt.Errorf("want three words, got %d", len(f))
	}
	name, err := matrix.ParseServerName(f[0])
	if err != nil {
		return sim.Origin{}, err
	}
	key, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(f[2], "="))
	if err != nil {
		return sim.Origin{}, fmt.Errorf("public key: %w", err)
	}
	return sim.Origin{Name: name, KeyID: f[1], PublicKey: key}, nil
}

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"fsbus/scripts/fedload"
	"fsbus/scripts/rig"
)

// naiveCommand makes this program the naive proxy.
const naiveCommand = "naive-proxy"

// naiveSecret is what the naive proxy wants to see.
const naiveSecret = "the-secret-of-the-naive-proxy"

// naive is the proxy that one would write in an afternoon: it speaks the hook,
// and passes every request on as soon as it comes. It logs nothing and limits
// nothing. Names must be ones to connect to as they are.
func naive(args []string) int {
	fs := flag.NewFlagSet(naiveCommand, flag.ExitOnError)
	ca := fs.String("ca", "", "certificates to trust")
	unix := fs.String("unix", "", "socket to listen on")
	tcp := fs.String("tcp", "", "address to listen on, as well")
	fs.Parse(args)
	if err := serveNaive(*ca, *unix, *tcp); err != nil {
		fmt.Fprintln(os.Stderr, "naive proxy:", err)
		return 1
	}
	return 0
}

func serveNaive(ca, unix, tcp string) error {
	handler, err := newNaiveProxy(ca)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: handler}
	failed := make(chan error, 2)
	for network, address := range map[string]string{"unix": unix, "tcp": tcp} {
		l, err := net.Listen(network, address)
		if err != nil {
			return err
		}
		go func() { failed <- server.Serve(l) }()
	}
	return <-failed
}

type naiveProxy struct{ transport *http.Transport }

// newNaiveProxy returns one that trusts the certificates in the file ca.
func newNaiveProxy(ca string) (*naiveProxy, error) {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", ca)
	}
	return &naiveProxy{&http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots},
		MaxIdleConnsPerHost: 8,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true,
	}}, nil
}

func (p *naiveProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	target, ok := strings.CutPrefix(r.RequestURI, "matrix-federation://"+r.URL.Host)
	if !ok {
		http.Error(w, "not a federation request", http.StatusNotFound)
		return
	}
	if r.Header.Get("Proxy-Authorization") != "Bearer "+naiveSecret {
		http.Error(w, "wrong secret", http.StatusProxyAuthRequired)
		return
	}
	// No body of unknown length: net/http would send it in chunks.
	out, err := http.NewRequestWithContext(r.Context(), r.Method, "https://"+r.URL.Host+target, r.Body)
	if err != nil {
		http.Error(w, "bad target", http.StatusBadGateway)
		return
	}
	out.ContentLength = r.ContentLength
	if r.ContentLength == 0 {
		out.Body = nil
	}
	for _, k := range []string{"User-Agent", "Authorization", "Content-Type"} {
		if v := r.Header.Values(k); len(v) > 0 {
			out.Header[k] = v
		}
	}
	resp, err := p.transport.RoundTrip(out)
	if err != nil {
		http.Error(w, "upstream error", http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		switch k {
		case "Connection", "Keep-Alive", "Transfer-Encoding", "Te", "Trailer", "Upgrade", "Proxy-Authenticate":
		default:
			w.Header()[k] = v
		}
	}
	w.WriteHeader(resp.StatusCode)
	io.Copy(w, resp.Body)
}

// proxy is a proxy under test, a child process.
type proxy struct {
	*rig.Process
	name      string
	unix, tcp *fedload.Client
	hook      func() *fedload.Client // makes another one for the unix socket
	bus       *rig.Bus               // nil for the naive one
}

// stop ends the proxy and closes its clients.
func (p *proxy) stop() error {
	p.unix.Close()
	p.tcp.Close()
	err := p.Stop(15 * time.Second)
	if p.bus == nil {
		// It knows no better than to die of the signal.
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
			return nil
		}
	}
	return err
}

// startNaive starts the naive proxy before f.
func (b *bench) startNaive(ctx context.Context, f *rig.Federation) (*proxy, error) {
	dir, err := b.folder()
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "naive.sock")
	tcp, err := rig.FreeAddress()
	if err != nil {
		return nil, err
	}
	hook := func() *fedload.Client { return fedload.NewHook("unix:"+socket, naiveSecret, f.From) }
	p := &proxy{name: "naive", unix: hook(), tcp: fedload.NewHook(tcp, naiveSecret, f.From), hook: hook}
	p.Process, err = rig.StartProcess(filepath.Join(dir, "log"), b.self, naiveCommand, "-ca", f.CAFile, "-unix", socket, "-tcp", tcp)
	if err != nil {
		return nil, err
	}
	for {
		if listens("unix", socket) && listens("tcp", tcp) {
			return p, nil
		}
		select {
		case <-p.Done():
			return nil, p.Running()
		case <-ctx.Done():
			p.stop()
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func listens(network, address string) bool {
	c, err := net.Dial(network, address)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// startBus starts an fsbus before f.
func (b *bench) startBus(ctx context.Context, f *rig.Federation, settings map[string]string) (*proxy, error) {
	dir, err := b.folder()
	if err != nil {
		return nil, err
	}
	bus, err := rig.StartBus(ctx, dir, b.fsbus, f, settings)
	if err != nil {
		return nil, err
	}
	hook := func() *fedload.Client { return bus.Hook(bus.Unix) }
	return &proxy{Process: bus.Process, name: "fsbus", unix: hook(), tcp: bus.Hook(bus.TCP), hook: hook, bus: bus}, nil
}

package netx

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// What a proxy comes to, wrapped in an Error.
var (
	// errProxy: the proxy itself, which says nothing about the remote.
	errProxy = errors.New("the proxy cannot be used")
	// errBehindProxy: the proxy could not connect to the remote.
	errBehindProxy = errors.New("the proxy could not connect")
)

// maxProxyHeader bounds a proxy's answer to CONNECT, in bytes.
const maxProxyHeader = 16 << 10

// Proxy is an HTTP proxy through which servers are reached, by CONNECT (RFC 9110 9.3.6),
// well-known documents included. Its own address may be a private one.
type Proxy struct {
	address string
	auth    string // of Proxy-Authorization; "": none
	// names says that the proxy is given names and looks them up. Then only the block-list
	// of the proxy keeps anybody from reaching into a network.
	names bool
}

// ParseProxy reads "http://[user:password@]host[:port]". With names the proxy looks up the
// names of servers, else this machine does. The error does not quote a password.
func ParseProxy(s string, names bool) (*Proxy, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("not a URL")
	case u.Scheme != "http":
		return nil, fmt.Errorf("the scheme %q, only http is known", u.Scheme)
	case u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("more or less than a host and a port")
	}
	port := u.Port()
	if port == "" {
		port = "3128"
	}
	p := &Proxy{address: net.JoinHostPort(u.Hostname(), port), names: names}
	if u.User != nil {
		password, _ := u.User.Password()
		p.auth = "Basic " + base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+password))
	}
	return p, nil
}

// String returns the proxy's address, for people.
func (p *Proxy) String() string { return p.address }

// through connects to a target through the proxy. addrs are what its name stands for,
// unless the proxy is to find out.
func (d *dialer) through(ctx context.Context, t Target, addrs []netip.AddrPort) (net.Conn, error) {
	if d.proxy.names {
		return d.tunnel(ctx, net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port))))
	}
	var failed error
	for i, a := range addrs {
		if i >= maxAttempts {
			break
		}
		conn, err := d.tunnel(ctx, a.String())
		if err == nil || !errors.Is(err, errBehindProxy) {
			return conn, err
		}
		failed = worse(failed, err)
	}
	return nil, failed
}

// tunnel has the proxy connect to an address.
func (d *dialer) tunnel(ctx context.Context, to string) (net.Conn, error) {
	d.counters.attempts.Add(1)
	nd := net.Dialer{Timeout: d.connect}
	raw, err := nd.DialContext(ctx, "tcp", d.proxy.address)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w: %v", errProxy, err)
	}
	conn := d.counted(raw)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = d.proxy.ask(conn, to, time.Now().Add(2*d.connect))
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, err
	}
	d.reached.Store(d.now().UnixNano())
	return conn, nil
}

// ask sends CONNECT and reads the answer's head.
func (p *Proxy) ask(conn net.Conn, to string, by time.Time) error {
	_ = conn.SetDeadline(by)
	head := "CONNECT " + to + " HTTP/1.1\r\nHost: " + to + "\r\n"
	if p.auth != "" {
		head += "Proxy-Authorization: " + p.auth + "\r\n"
	}
	if _, err := conn.Write([]byte(head + "\r\n")); err != nil {
		return fmt.Errorf("%w: %v", errProxy, err)
	}
	// One byte at a time: what follows the head is the remote's.
	answer := make([]byte, 0, 256)
	var one [1]byte
	for !strings.HasSuffix(string(answer[max(0, len(answer)-4):]), "\r\n\r\n") {
		if len(answer) >= maxProxyHeader {
			return fmt.Errorf("%w: its answer is too long", errProxy)
		}
		if _, err := conn.Read(one[:]); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				return fmt.Errorf("%w in time", errBehindProxy)
			}
			return fmt.Errorf("%w: %v", errProxy, err)
		}
		answer = append(answer, one[0])
	}
	line, _, _ := strings.Cut(string(answer), "\r\n")
	fields := strings.SplitN(line, " ", 3)
	if len(fields) < 2 || !strings.HasPrefix(fields[0], "HTTP/1.") {
		return fmt.Errorf("%w: it does not speak HTTP", errProxy)
	}
	switch status := fields[1]; {
	case strings.HasPrefix(status, "2"):
		return conn.SetDeadline(time.Time{})
	case status == "407":
		return fmt.Errorf("%w: it wants another user or password", errProxy)
	case status == "405", status == "400", status == "501":
		return fmt.Errorf("%w: it answers status %s to CONNECT", errProxy, status)
	default:
		return fmt.Errorf("%w: it answers status %s", errBehindProxy, status)
	}
}

// proxyLookup is a Lookup where a proxy looks names up: only it can, and SRV records are
// not among what it finds.
type proxyLookup struct{ Lookup }

// SRV finds none.
func (proxyLookup) SRV(_ context.Context, service, proto, name string) ([]*net.SRV, error) {
	return nil, notFound("_" + service + "._" + proto + "." + name)
}

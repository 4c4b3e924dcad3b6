package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"fsbus/bus/node"
	"fsbus/scripts/fedload"
	"fsbus/scripts/rig"
)

const (
	hostileOrigins = 20
	hostileEvery   = 250 * time.Millisecond // of each request in earnest, by turns
	clientAnswer   = 8 << 20                // bytes; more than the kernel keeps for a connection
)

// siege says how the attacks are run.
type siege struct {
	each      time.Duration // how long each lasts
	addresses []int         // from how many, one after the other
	patience  time.Duration // the bound for what is sent in earnest, p99; 0: there is none
	attacks   []attack
}

// attack is what one hostile connection does, again and again until ctx ends. It
// returns when the connection is of no more use to it.
type attack struct {
	name  string
	conns int // in all
	once  func(ctx context.Context, h *hostileField, from netip.Addr) error
}

// attacks are those whose effect others could notice: each holds something that there is
// a bounded number of.
var attacks = []attack{
	{"unsent bodies", 660, unsentBody},
	{"slow bodies", 64, slowBody},
	{"silent connections", 800, silence},
	{"slow heads", 800, slowHead},
	{"unread streams", 318, unreadStreams},
	{"many fields", 330, manyFields},
	{"unread answers to clients", 128, unreadAnswer},
	{"silent local connections", 600, silentFront},
	{"slow local heads", 600, slowFront},
	{"local requests without the secret", 600, secretlessFront},
	{statusAttack, 800, silentStatus},
}

// statusAttack is the one on the page that shows what is measured.
const statusAttack = "silent connections to the status page"

// hostileField is a field that is attacked.
type hostileField struct {
	*edgeField
	roots *tls.Config
}

// hostile measures what is noticed of each attack, from one address and from sixteen,
// and of all together.
func hostile(ctx context.Context, b *bench) error {
	return b.hostile(ctx, siege{each: 4 * time.Second, addresses: []int{1, 16}, patience: time.Second, attacks: attacks})
}

func (b *bench) hostile(ctx context.Context, how siege) (err error) {
	f, err := b.edgeField(hostileOrigins, true, rig.StubConfig{Delay: 20 * time.Millisecond, ClientAnswer: clientAnswer})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.learnKeys(ctx); err != nil {
		return err
	}
	if err := f.start(ctx, map[string]string{"edge.pass_client": "true"}); err != nil {
		return err
	}
	h := &hostileField{f, &tls.Config{RootCAs: f.cert.Roots, ServerName: string(f.From.Name)}}
	var quiet noticed
	h.inEarnest(ctx, "quiet", time.Now().Add(how.each), &quiet)
	b.notice("quiet", &quiet, 0)
	watched := f.watch(ctx, nil)
	for _, addresses := range how.addresses {
		for _, a := range how.attacks {
			if err := h.attack(ctx, b, fmt.Sprintf("%s from %d", a.name, addresses), how, addresses, a); err != nil {
				return err
			}
		}
	}
	if err := h.attack(ctx, b, "all at once from 16", how, 16, how.attacks...); err != nil {
		return err
	}
	peaks, err := watched()
	if err != nil {
		return err
	}
	usage, err := f.bus.Usage()
	if err != nil {
		return err
	}
	goroutines, err := peaks.Budget(rig.Goroutines)
	if err != nil {
		return err
	}
	memory, err := peaks.Budget(rig.Memory)
	if err != nil {
		return err
	}
	b.result.atMost("memory", mib(usage.PeakRSS), mib(memory.Allowed), "MiB")
	b.result.atMost("goroutines", float64(goroutines.Max), float64(goroutines.Allowed), "")
	allowed := node.DefaultConfig()
	allowed.Edge.Listen = []string{f.listen} // which makes it count
	b.result.atMost("file descriptors", float64(peaks.Files), float64(allowed.Budget().FileDescriptors), "")
	if over := peaks.Over(); len(over) > 0 {
		b.result.note("over its budget: %v", over)
	}
	return nil
}

// attack runs attacks for a while and notes what was noticed.
func (h *hostileField) attack(ctx context.Context, b *bench, what string, how siege, addresses int, list ...attack) error {
	attacking, stop := context.WithCancel(ctx)
	defer stop()
	var running sync.WaitGroup
	for _, a := range list {
		for i := range a.conns / len(list) {
			running.Go(func() {
				from := netip.AddrFrom4([4]byte{127, 3, 0, byte(1 + i%addresses)})
				for attacking.Err() == nil {
					// How it ends tells nothing: what counts is what others notice.
					_ = a.once(attacking, h, from)
					until(attacking, time.Now().Add(time.Duration(rand.IntN(20)+10)*time.Millisecond))
				}
			})
		}
	}
	if !until(ctx, time.Now().Add(how.each/4)) { // the attack is there
		return ctx.Err()
	}
	var n noticed
	h.inEarnest(ctx, what, time.Now().Add(how.each), &n)
	stop()
	running.Wait()
	b.notice(what, &n, how.patience)
	return ctx.Err()
}

// noticed is what became of requests that were made in earnest.
type noticed struct{ servers, homeserver ends }

// notice adds what was noticed, with a bound for its p99 unless that is 0.
func (b *bench) notice(what string, n *noticed, bound time.Duration) {
	for of, e := range map[string]*ends{"servers": &n.servers, "homeserver": &n.homeserver} {
		b.result.add(what+", "+of+", p99", "ms", milliseconds(e.took.Percentile(99)))
		if failed := e.failed(); failed > 0 {
			b.result.note("%s, %s: %v", what, of, e)
		}
		if bound > 0 {
			b.result.atMost(what+", "+of+", p99", milliseconds(e.took.Percentile(99)), milliseconds(bound), "ms")
			b.result.atMost(what+", "+of+", of 100 not answered 200", 100*float64(e.failed())/float64(max(1, e.all())), 1, "")
		}
	}
}

// inEarnest has servers send transactions, half of them on new connections, and our
// homeserver look up profiles, until a moment.
func (h *hostileField) inEarnest(ctx context.Context, what string, end time.Time, n *noticed) {
	var running sync.WaitGroup
	for i := range hostileOrigins {
		running.Go(func() {
			kept := h.sender(h.target(), i, 1)
			defer kept.Close()
			due := time.Now().Add(hostileEvery * time.Duration(i) / hostileOrigins)
			for k := 0; due.Before(end) && until(ctx, due); k++ {
				s := kept
				if k%2 == 1 {
					s = h.sender(h.target(), i, 1)
				}
				late := time.Since(due)
				n.servers.add(s.Do(ctx, h.events(h.Origin(i), fmt.Sprintf("%s %d %d", strings.ReplaceAll(what, " ", "-"), i, k), 1)), late)
				if s != kept {
					s.Close()
				}
				due = due.Add(4 * hostileEvery)
			}
		})
	}
	for _, address := range []string{h.bus.Unix, h.bus.TCP} {
		running.Go(func() {
			hook := h.bus.Hook(address)
			defer hook.Close()
			due := time.Now()
			for k := 0; due.Before(end) && until(ctx, due); k++ {
				late := time.Since(due)
				n.homeserver.add(hook.Do(ctx, fedload.Lookup(h.Names()[5], fmt.Sprintf("%s-%d-%d", strings.ReplaceAll(what, " ", "-"), len(address), k))), late)
				due = due.Add(hostileEvery)
			}
		})
	}
	running.Wait()
}

// dial connects to an address from another, and ends the connection with ctx.
func dial(ctx context.Context, to string, from netip.Addr) (net.Conn, func(), error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "tcp4", to)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	return c, func() { stop(); _ = c.Close() }, nil
}

// edge connects to the edge, with TLS.
func (h *hostileField) edge(ctx context.Context, from netip.Addr, protocols ...string) (net.Conn, func(), error) {
	c, end, err := dial(ctx, h.listen, from)
	if err != nil {
		return nil, nil, err
	}
	config := h.roots.Clone()
	config.NextProtos = protocols
	t := tls.Client(c, config)
	if err := t.HandshakeContext(ctx); err != nil {
		end()
		return nil, nil, err
	}
	return t, end, nil
}

// wait waits until the other side ends the connection, for a minute at most.
func wait(c net.Conn) error {
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	_, err := io.Copy(io.Discard, c)
	return err
}

// madeUp is an Authorization by nobody.
func (h *hostileField) madeUp() string {
	return fmt.Sprintf(`Authorization: X-Matrix origin="%s",destination="%s",key="ed25519:1",sig="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"`+"\r\n", h.Names()[1], h.From.Name)
}

// unsentBody announces a body and sends none.
func unsentBody(ctx context.Context, h *hostileField, from netip.Addr) error {
	c, end, err := h.edge(ctx, from)
	if err != nil {
		return err
	}
	defer end()
	heads := []string{
		"PUT /unknown HTTP/1.1\r\n",
		"PUT /_matrix/federation/v1/send/x HTTP/1.1\r\n",
		"POST /_matrix/key/v2/query HTTP/1.1\r\n",
		"PUT /_matrix/federation/v1/send/x HTTP/1.1\r\n" + h.madeUp(),
	}
	_, err = io.WriteString(c, heads[rand.IntN(len(heads))]+"Host: h\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
	return errors.Join(err, wait(c))
}

// slowBody sends three bytes a second.
func slowBody(ctx context.Context, h *hostileField, from netip.Addr) error {
	c, end, err := h.edge(ctx, from)
	if err != nil {
		return err
	}
	defer end()
	_, err = io.WriteString(c, "PUT /_matrix/federation/v1/send/x HTTP/1.1\r\n"+h.madeUp()+"Host: h\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")
	for err == nil && until(ctx, time.Now().Add(time.Second)) {
		_, err = io.WriteString(c, "   ")
	}
	return err
}

// silence says nothing.
func silence(ctx context.Context, h *hostileField, from netip.Addr) error {
	return silent(ctx, h.listen, from, "")
}

// silent sends what it has and no more.
func silent(ctx context.Context, to string, from netip.Addr, text string) error {
	c, end, err := dial(ctx, to, from)
	if err != nil {
		return err
	}
	defer end()
	_, err = io.WriteString(c, text)
	return errors.Join(err, wait(c))
}

// slowHead sends a byte of its head each second.
func slowHead(ctx context.Context, h *hostileField, from netip.Addr) error {
	c, end, err := h.edge(ctx, from)
	if err != nil {
		return err
	}
	defer end()
	_, err = io.WriteString(c, "GET /x HTTP/1.1\r\nHost: h\r\nX: ")
	for err == nil && until(ctx, time.Now().Add(time.Second)) {
		_, err = io.WriteString(c, "x")
	}
	return err
}

// unreadStreams makes 32 requests on a connection of HTTP/2, and has no window for
// their answers.
func unreadStreams(ctx context.Context, h *hostileField, from netip.Addr) error {
	c, end, err := h.edge(ctx, from, "h2")
	if err != nil {
		return err
	}
	defer end()
	frame := func(kind, flags byte, stream byte, payload string) string {
		n := len(payload)
		return string([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags, 0, 0, 0, stream}) + payload
	}
	field := func(name, value string) string {
		return "\x00" + string(rune(len(name))) + name + string(rune(len(value))) + value
	}
	all := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00")
	for i := range 32 {
		path := []string{"/unknown", "/_matrix/key/v2/server", "/_matrix/federation/v1/version"}[i%3]
		all += frame(1, 5, byte(2*i+1), field(":method", "GET")+field(":scheme", "https")+field(":path", path)+field(":authority", "h"))
	}
	_, err = io.WriteString(c, all)
	return errors.Join(err, wait(c))
}

// manyFields sends a head of tiny fields.
func manyFields(ctx context.Context, h *hostileField, from netip.Addr) error {
	c, end, err := h.edge(ctx, from)
	if err != nil {
		return err
	}
	defer end()
	var head strings.Builder
	head.WriteString("PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n")
	for i := range 3300 {
		fmt.Fprintf(&head, "%c%c:\r\n", 'a'+i%26, 'a'+i/26%26)
	}
	_, err = io.WriteString(c, head.String())
	return errors.Join(err, wait(c))
}

// unreadAnswer asks for a large answer to a client and does not read it.
func unreadAnswer(ctx context.Context, h *hostileField, from netip.Addr) error {
	c, end, err := h.edge(ctx, from)
	if err != nil {
		return err
	}
	defer end()
	if _, err = io.WriteString(c, "GET /_matrix/client/v3/sync HTTP/1.1\r\nHost: h\r\n\r\n"); err == nil {
		until(ctx, time.Now().Add(time.Minute))
	}
	return err
}

func silentFront(ctx context.Context, h *hostileField, from netip.Addr) error {
	return silent(ctx, h.bus.TCP, from, "")
}

func slowFront(ctx context.Context, h *hostileField, from netip.Addr) error {
	return silent(ctx, h.bus.TCP, from, "GET matrix-federation://h/")
}

func secretlessFront(ctx context.Context, h *hostileField, from netip.Addr) error {
	return silent(ctx, h.bus.TCP, from, "PUT matrix-federation://h/x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n")
}

func silentStatus(ctx context.Context, h *hostileField, from netip.Addr) error {
	return silent(ctx, h.bus.Page, from, "GET /metr")
}

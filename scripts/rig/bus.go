package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"time"

	"fsbus/bus/node"
	"fsbus/scripts/fedload"
)

// secret is what the homeserver shows to the bus.
const secret = "the-secret-of-the-rig"

// startTimeout bounds the start of a bus: well below a second on its own, some
// seconds under an emulator.
const startTimeout = 60 * time.Second

// Bus is a running fsbus, a child process.
type Bus struct {
	*Process
	Unix, TCP string // where it listens for the homeserver, as fedload.NewHook has it
	Page      string // its status page, "host:port"

	from fedload.Homeserver
}

// StartBus starts an fsbus before f with config.example.toml, in which settings
// replace values (see Adapt), and waits until it is up. command is the program
// with any words before it, such as those of an emulator. All that it writes is
// in dir, which must not hold a bus already. The caller stops it.
func StartBus(ctx context.Context, dir string, command []string, f *Federation, settings map[string]string) (*Bus, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	b := &Bus{Unix: "unix:" + filepath.Join(dir, "fsbus.sock"), from: f.From}
	var err error
	if b.TCP, err = FreeAddress(); err != nil {
		return nil, err
	}
	if b.Page, err = FreeAddress(); err != nil {
		return nil, err
	}
	all := b.settings(dir, f)
	maps.Copy(all, settings)
	text, err := os.ReadFile(example)
	if err != nil {
		return nil, err
	}
	config, err := Adapt(string(text), all)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return nil, err
	}
	words := append(append([]string{}, command...), "run", "-config", path)
	if b.Process, err = StartProcess(filepath.Join(dir, "fsbus.log"), words...); err != nil {
		return nil, err
	}
	if err := b.await(ctx); err != nil {
		b.Stop(time.Second) // how it ends adds nothing
		return nil, err
	}
	return b, nil
}

// settings are what differs from the example in every bus.
func (b *Bus) settings(dir string, f *Federation) map[string]string {
	return map[string]string{
		"data_dir":                      Text(filepath.Join(dir, "data")),
		"homeserver.server_name":        Text(string(f.From.Name)),
		"front.listen":                  Texts(b.Unix, b.TCP),
		"front.secret":                  Text(secret),
		"federation.ca_file":            Text(f.CAFile),
		"federation.ip_range_allowlist": Texts("127.1.0.0/16"),
		"status.listen":                 Text(b.Page),
	}
}

// FreeAddress returns a loopback address, "host:port", on which nobody listens. Another
// program may take it before it is used, which then fails plainly.
func FreeAddress() (string, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// await waits until the bus shows its status.
func (b *Bus) await(ctx context.Context) error {
	timeout := time.After(startTimeout)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := b.Status(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-b.Done():
			return b.Running()
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return fmt.Errorf("fsbus is not up after %v: %w; the last that it wrote:\n%s", startTimeout, err, b.logTail())
		case <-tick.C:
		}
	}
}

// Hook returns a client that speaks to the bus at one of its addresses.
func (b *Bus) Hook(address string) *fedload.Client { return fedload.NewHook(address, secret, b.from) }

// Status asks the bus for its status.
func (b *Bus) Status(ctx context.Context) (*node.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var text bytes.Buffer
	if err := node.PrintStatus(ctx, &text, b.Page, true); err != nil {
		return nil, err
	}
	r := new(node.Report)
	if err := json.Unmarshal(text.Bytes(), r); err != nil {
		return nil, fmt.Errorf("status of fsbus: %w", err)
	}
	return r, nil
}

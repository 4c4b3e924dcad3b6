package node

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"fsbus/sched"
)

// withKeys returns the defaults with an outbox.
func withKeys() Config {
	c := DefaultConfig()
	c.Homeserver.keys = &Keys{}
	return c
}

// The table is what fsbus check shows; a limit or a cost that changes shows
// here.
func TestBudgetTable(t *testing.T) {
	const want = `memory at worst               count      each     total   set by
  program and database            1  16.0 MiB  16.0 MiB
  requests that wait           4200   2.5 KiB  10.3 MiB   front.max_connections
  requests being read            24  50.0 KiB   1.2 MiB   front.max_reading
  requests to other servers     100  88.0 KiB   8.6 MiB   outbound.workers
  idle connections               56  40.0 KiB   2.2 MiB   outbound.idle_connections
  servers remembered           5600     768 B   4.1 MiB   outbound.max_hosts
  names and addresses             1   3.7 MiB   3.7 MiB
  TLS sessions                    1 1000.0 KiB   1.0 MiB
  bodies on their way             1   2.0 MiB   2.0 MiB   outbound.spool_memory
  answers kept                    1 256.0 KiB   0.2 MiB   outbound.cache
  answers known               10000      64 B   0.6 MiB   outbound.cache_entries
  keys being fetched           8000     100 B   0.8 MiB
  joins being looked into         1   1.0 MiB   1.0 MiB
  servers handed over to          1 234.4 KiB   0.2 MiB
  status page's connections       6  32.0 KiB   0.2 MiB
  transactions being made         2   4.0 MiB   8.0 MiB   outbox.max_transaction_bytes
  servers with a queue         4500     400 B   1.7 MiB   outbox.max_destinations
  who is in which room            1   2.2 MiB   2.2 MiB   outbox.ack_memory
  sum                                          64.0 MiB   of memory_limit, 64.0 MiB
goroutines                     2941
connections to servers          256
file descriptors               4792
`
	c := withKeys()
	var b bytes.Buffer
	n, err := c.Budget().WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Errorf("WriteTo: %d, %v; wrote %d", n, err, b.Len())
	}
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", &b, want)
	}
	broken := errors.New("broken")
	if _, err := c.Budget().WriteTo(writerFunc(func([]byte) (int, error) { return 0, broken })); !errors.Is(err, broken) {
		t.Errorf("a writer that fails: %v", err)
	}
}

// A bus that is given nothing but what is required, and an outbox, must start.
func TestBudgetOfTheDefaultsFits(t *testing.T) {
	c := withKeys()
	if b := c.Budget(); b.Memory > b.Limit {
		t.Errorf("the defaults may use %d bytes, %d more than their own limit", b.Memory, b.Memory-b.Limit)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Each key that the budget blames changes it by what it says, and no key of
// another name does.
func TestBudgetKeys(t *testing.T) {
	d := withKeys()
	before := d.Budget()
	for i, f := range d.fields() {
		each := sched.Bytes(0)
		for _, it := range before.Items {
			if it.Key == f.key() {
				each = it.Each
			}
		}
		c := withKeys()
		step := sched.Bytes(1)
		switch p := c.fields()[i].value.Addr().Interface().(type) {
		case *int:
			*p++
			step = each
		case *sched.Bytes:
			*p++
			if step = 0; each > 0 { // memory
				step = before.count(f.key())
			}
		default:
			continue
		}
		if got := c.Budget().Memory - before.Memory; got != step {
			t.Errorf("one more of %s changes the sum by %d, want %d", f.key(), got, step)
		}
	}
}

// count is how many of what key bounds are counted.
func (b Budget) count(key string) sched.Bytes {
	for _, it := range b.Items {
		if it.Key == key {
			return sched.Bytes(it.Count)
		}
	}
	return 0
}

func TestBudgetCountsEverything(t *testing.T) {
	d := DefaultConfig()
	before := d.Budget()
	for _, tt := range []struct {
		name                           string
		change                         func(*Config)
		goroutines, connections, files int
	}{
		{"worker", func(c *Config) { c.Outbound.Workers++ }, 7, 2, 2},
		{"idle connection", func(c *Config) { c.Outbound.IdleConnections++ }, 2, 1, 1},
		{"DNS query", func(c *Config) { c.Outbound.DNSQueries++ }, 0, 0, 1},
		{"request", func(c *Config) { c.Front.MaxConnections++ }, 0, 0, 1},
		{"request being read", func(c *Config) { c.Front.MaxReading++ }, 0, 0, 0},
		{"listener", func(c *Config) { c.Front.Listen = append(c.Front.Listen, "127.0.0.1:1") }, 1, 0, 0},
	} {
		c := DefaultConfig()
		tt.change(&c)
		b := c.Budget()
		if g, n, f := b.Goroutines-before.Goroutines, b.Connections-before.Connections, b.FileDescriptors-before.FileDescriptors; g != tt.goroutines || n != tt.connections || f != tt.files {
			t.Errorf("one more %s: %d goroutines, %d connections, %d files; want %d, %d, %d", tt.name, g, n, f, tt.goroutines, tt.connections, tt.files)
		}
	}
	var sum sched.Bytes
	for _, it := range before.Items {
		if it.Total != sched.Bytes(it.Count)*it.Each {
			t.Errorf("%s: %d times %d is not %d", it.Name, it.Count, it.Each, it.Total)
		}
		sum += it.Total
	}
	if sum != before.Memory || before.Limit != d.MemoryLimit {
		t.Errorf("sum %d of %d, limit %d of %d", before.Memory, sum, before.Limit, d.MemoryLimit)
	}
}

// The largest values that the ranges allow overflow nothing, also where an int
// has 32 bits.
func TestBudgetOfTheLargestLimits(t *testing.T) {
	c := withKeys()
	for _, f := range c.fields() {
		if _, numeric := number(f.value.Interface()); !numeric {
			continue
		}
		_, most, _ := strings.Cut(f.tag.Get("range"), "..")
		switch p := f.value.Addr().Interface().(type) {
		case *int:
			*p = int(f.parse(most))
		case *sched.Bytes:
			*p = sched.Bytes(f.parse(most))
		}
	}
	b := c.Budget()
	if b.Goroutines < 0 || b.FileDescriptors < 0 || b.Memory < 2*sched.GiB || b.Memory > 8*sched.GiB {
		t.Errorf("%d goroutines, %d files, %d bytes", b.Goroutines, b.FileDescriptors, b.Memory)
	}
	if slices.ContainsFunc(b.Items, func(it BudgetItem) bool { return it.Total <= 0 }) {
		t.Errorf("an item without a cost: %+v", b.Items)
	}
}

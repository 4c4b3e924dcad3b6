package node

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"fsbus/sched"
)

// The table is what fsbus check shows; a limit or a cost that changes shows
// here.
func TestBudgetTable(t *testing.T) {
	const want = `memory at worst               count      each     total   set by
  program and database            1  16.0 MiB  16.0 MiB
  requests that wait           5000   2.5 KiB  12.2 MiB   front.max_connections
  requests being read            64  50.0 KiB   3.1 MiB   front.max_reading
  requests to other servers     128  88.0 KiB  11.0 MiB   outbound.workers
  idle connections               96  40.0 KiB   3.8 MiB   outbound.idle_connections
  servers remembered           8000     768 B   5.9 MiB   outbound.max_hosts
  names and addresses             1   4.6 MiB   4.6 MiB
  TLS sessions                 1000   1.0 KiB   1.0 MiB
  bodies on their way             1   4.0 MiB   4.0 MiB   outbound.spool_memory
  answers kept                    1   2.0 MiB   2.0 MiB   outbound.cache
  sum                                          63.5 MiB   of memory_limit, 64.0 MiB
goroutines                     1216
connections to servers          352
file descriptors               5688
`
	c := DefaultConfig()
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

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Each key that the budget blames changes it by what it says, and no key of
// another name does.
func TestBudgetKeys(t *testing.T) {
	d := DefaultConfig()
	before := d.Budget()
	for i, f := range d.fields() {
		each := sched.Bytes(0)
		for _, it := range before.Items {
			if it.Key == f.key() {
				each = it.Each
			}
		}
		c := DefaultConfig()
		step := sched.Bytes(1)
		switch p := c.fields()[i].value.Addr().Interface().(type) {
		case *int:
			*p++
			step = each
		case *sched.Bytes:
			*p++
			if each == 0 {
				step = 0 // not memory
			}
		default:
			continue
		}
		if got := c.Budget().Memory - before.Memory; got != step {
			t.Errorf("one more of %s changes the sum by %d, want %d", f.key(), got, step)
		}
	}
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
		{"request being read", func(c *Config) { c.Front.MaxReading++ }, 1, 0, 0},
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
	c := DefaultConfig()
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
	if b.Goroutines < 0 || b.FileDescriptors < 0 || b.Memory < 2*sched.GiB || b.Memory > 4*sched.GiB {
		t.Errorf("%d goroutines, %d files, %d bytes", b.Goroutines, b.FileDescriptors, b.Memory)
	}
	if slices.ContainsFunc(b.Items, func(it BudgetItem) bool { return it.Total <= 0 }) {
		t.Errorf("an item without a cost: %+v", b.Items)
	}
}

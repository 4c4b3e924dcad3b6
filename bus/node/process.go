package node

import (
	"os"
	"runtime/metrics"
	"strconv"
	"strings"

	"fsbus/sched"
)

// residentBytes returns the process's resident memory now and its peak, as
// Linux has them; elsewhere what Go's runtime has from the system.
func residentBytes() (now, peak int64) {
	if text, err := os.ReadFile("/proc/self/status"); err == nil {
		return statusKB(string(text), "VmRSS:"), statusKB(string(text), "VmHWM:")
	}
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}}
	metrics.Read(s)
	return int64(s[0].Value.Uint64()), -1
}

func statusKB(text, key string) int64 {
	_, rest, ok := strings.Cut(text, key)
	if !ok {
		return -1
	}
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return -1
	}
	kb, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		return -1
	}
	return kb * int64(sched.KiB)
}

// openFiles returns how many file descriptors are open, -1 if that cannot be
// told.
func openFiles() int64 {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return -1
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return -1
	}
	return int64(len(names)) - 1 // the directory itself
}

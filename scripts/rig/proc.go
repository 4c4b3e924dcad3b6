package rig

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Usage is what a process uses, as the kernel counts it.
type Usage struct {
	RSS     int64         // resident memory, in bytes
	PeakRSS int64         // the most there was since the start or ResetPeak
	CPU     time.Duration // user and system time so far, in steps of 10 ms
	Files   int           // open file descriptors
}

// readUsage returns what the process pid uses now.
func readUsage(pid int) (Usage, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return Usage{}, err
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return Usage{}, err
	}
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return Usage{}, err
	}
	u := Usage{Files: len(files)}
	if u.RSS, err = statusBytes(status, "VmRSS"); err != nil {
		return Usage{}, err
	}
	if u.PeakRSS, err = statusBytes(status, "VmHWM"); err != nil {
		return Usage{}, err
	}
	if u.CPU, err = statCPU(stat); err != nil {
		return Usage{}, err
	}
	return u, nil
}

// statusBytes returns a field of /proc/PID/status that is a size, in bytes. A
// process that has ended and was not yet waited for has none.
func statusBytes(status []byte, key string) (int64, error) {
	for line := range bytes.Lines(status) {
		name, value, _ := strings.Cut(string(line), ":")
		if name != key {
			continue
		}
		number, unit, _ := strings.Cut(strings.TrimSpace(value), " ")
		kb, err := strconv.ParseInt(number, 10, 64)
		if err != nil || unit != "kB" {
			return 0, fmt.Errorf("rig: /proc/PID/status has %q", strings.TrimSpace(string(line)))
		}
		return kb << 10, nil
	}
	return 0, fmt.Errorf("rig: /proc/PID/status has no %s: the process has ended", key)
}

// clockTick is the unit of times in /proc: USER_HZ, 100 on every architecture
// that Go knows.
const clockTick = time.Second / 100

// statCPU returns the sum of utime and stime of /proc/PID/stat, see proc(5). The
// second field, the program's name in parentheses, may hold anything.
func statCPU(stat []byte) (time.Duration, error) {
	const utime, stime = 14 - 3, 15 - 3 // counted from the third field
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	fields := strings.Fields(string(rest))
	if len(fields) <= stime {
		return 0, fmt.Errorf("rig: /proc/PID/stat has %q", stat)
	}
	var ticks int64
	for _, field := range []int{utime, stime} {
		n, err := strconv.ParseInt(fields[field], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("rig: /proc/PID/stat has %q", stat)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// resetPeak makes VmHWM of the process pid its present size: proc(5),
// /proc/PID/clear_refs.
func resetPeak(pid int) error {
	return os.WriteFile(filepath.Join("/proc", strconv.Itoa(pid), "clear_refs"), []byte("5"), 0)
}

// RefusedConnects returns how many attempts to open a TCP connection have failed
// so far, on this machine as a whole: a server that refuses them does not see
// them, but the kernel counts.
func RefusedConnects() (int64, error) {
	text, err := os.ReadFile("/proc/net/snmp")
	if err != nil {
		return 0, err
	}
	return snmpCount(text, "Tcp", "AttemptFails")
}

// snmpCount returns a field of /proc/net/snmp, where each protocol has a line of
// names and a line of values.
func snmpCount(snmp []byte, protocol, field string) (int64, error) {
	var names []string
	for line := range strings.Lines(string(snmp)) {
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || words[0] != protocol+":":
		case names == nil:
			names = words
		default:
			if i := slices.Index(names, field); i >= 0 && i < len(words) {
				return strconv.ParseInt(words[i], 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("rig: /proc/net/snmp has no %s of %s", field, protocol)
}

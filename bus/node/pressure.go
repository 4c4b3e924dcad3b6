package node

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"time"

	"fsbus/bus"
	"fsbus/bus/edge"
)

// pressureEvery is how often the pressure on the host is read. The kernel's mean
// over ten seconds is renewed every two.
const pressureEvery = 2 * time.Second

// findPressure returns the file that tells how much tasks wait for a processor:
// the host's, or in a container that of the container. It returns "" where the
// kernel does not tell (it may be built or started without).
func findPressure() string {
	for _, f := range []string{"/proc/pressure/cpu", "/sys/fs/cgroup/cpu.pressure"} {
		if b, err := os.ReadFile(f); err == nil {
			if _, ok := parsePressure(b); ok {
				return f
			}
		}
	}
	return ""
}

// parsePressure returns "some avg10" of a pressure file in 1/100 %
// (Documentation/accounting/psi.rst).
func parsePressure(text []byte) (hundredths int32, ok bool) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	for i, f := range strings.Fields(string(line)) {
		if i == 0 && f != "some" {
			return 0, false
		}
		if v, found := strings.CutPrefix(f, "avg10="); found {
			whole, part, _ := strings.Cut(v, ".")
			n, err := strconv.ParseInt(whole+(part + "00")[:2], 10, 32)
			return int32(n), err == nil && n >= 0
		}
	}
	return 0, false
}

// tellPressure tells the core of the pressure on the host.
func (n *Node) tellPressure() {
	b, err := os.ReadFile(n.pressureFile)
	if err != nil {
		return
	}
	if v, ok := parsePressure(b); ok {
		n.loop.Post(event{Event: bus.Pressure{Hundredths: v}, edge: edge.Pressure{Hundredths: v}})
	}
}

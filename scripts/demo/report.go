package main

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"fsbus/bus/matrix"
	"fsbus/bus/node"
	"fsbus/scripts/rig"
)

// progress is the line that shows the moment.
func progress(at time.Duration, t *traffic, now rig.Sample) string {
	var asked, good int64
	for _, y := range t.tallies() {
		a, g := y.count()
		asked, good = asked+a, good+g
	}
	used := func(name string) int64 {
		for _, b := range now.Report.Budgets {
			if b.Name == name {
				return b.Used
			}
		}
		return -1
	}
	return fmt.Sprintf("%3.0f s  %6s answered, %5s wait; %3d connections to servers, %4d goroutines, %s",
		at.Seconds(), rig.Count(asked), rig.Count(used(rig.Callers)), used(rig.Connections), used(rig.Goroutines), rig.MiB(now.Usage.RSS))
}

// hostBurst is how many requests to one server fsbus starts at once. The status does
// not say it; the demo leaves it at its default.
var hostBurst = node.DefaultConfig().Outbound.HostBurst

// table is what the demo ends with. Memory is left out if it may be an
// emulator's.
func table(t *traffic, v *view, memory bool) string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")+"\t") }
	left := func(s string) string { return fmt.Sprintf("%-38s", s) }

	var asked int64
	line(left("WHAT THE HOMESERVER ASKED"), "requests", "as expected", "p50", "p99", "longest")
	for _, y := range t.tallies() {
		asked += y.asked
		line(left(y.about), rig.Count(y.asked), rig.Count(y.good), rig.Took(y.took.Percentile(50)), rig.Took(y.took.Percentile(99)), rig.Took(y.took.Max()))
	}
	line(left("in all"), rig.Count(asked))
	w.Flush()
	out.WriteString("\n")

	req, rem := &v.last.Report.Requests, &v.last.Report.Remotes
	w = tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	line(left("WHAT BECAME OF IT"), "requests")
	for _, row := range []struct {
		name string
		n    int64
	}{
		{"shared an equal request's answer", req.Shared},
		{"answered from the cache", req.CacheHits + req.CacheStale},
		{"failed fast: server known to be dead", req.FailedFast},
		{"refused: no answer in the caller's time", req.Expired},
		{"went out (attempts)", rem.Attempts},
		{"  over new connections", rem.Connects},
		{"  paced: told 429, waited, sent again", rem.Limited},
		{"  refused by the server's machine", failures(rem, matrix.FailRefused)},
		{"  timed out", failures(rem, matrix.FailTimeout)},
	} {
		line(left(row.name), rig.Count(row.n))
	}
	w.Flush()
	out.WriteString("\n")

	if o := v.last.Report.Outbox; o != nil {
		w = tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
		line(left("WHAT BECAME OF THE TRANSACTIONS"), "")
		for _, row := range []struct {
			name string
			n    int64
		}{
			{"taken over from the homeserver", o.Accepted},
			{"sent, with all that waited together", o.Sent - o.Thawed},
			{"events that live servers got by them", v.servers.Transactions.PDUs},
			{"dead servers for which some wait", int64(o.Destinations)},
		} {
			line(left(row.name), rig.Count(row.n))
		}
		w.Flush()
		out.WriteString("\n")
	}

	w = tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	line(left("WHAT FSBUS USED"), "most", "allowed")
	for _, b := range v.peaks.Budgets {
		switch {
		case b.Name == rig.Memory && memory:
			line(left(b.Name+", memory_limit"), rig.MiB(b.Max), rig.MiB(b.Allowed))
		case slices.Contains([]string{rig.Goroutines, rig.Callers, rig.Connections}, b.Name):
			line(left(b.Name), rig.Count(b.Max), rig.Count(b.Allowed))
		}
	}
	line(left("processor"), v.last.Usage.CPU.String(), fmt.Sprintf("in %.0f s", v.took.Seconds()))
	limits := v.last.Report.RateLimits
	line(left("full TLS handshakes in one second *"), rig.Count(int64(v.servers.TLS.MaxFullPerSecond)), fmt.Sprintf("%.0f", limits.HandshakesPerSecond))
	line(left("requests to one server in one second *"), rig.Count(int64(v.servers.MaxPerServerSecond)), fmt.Sprintf("%d at once, then %.0f", hostBurst, limits.HostRate))
	w.Flush()
	out.WriteString("* as the servers saw it, where what began evenly may end in a bunch\n")
	return "\n" + out.String()
}

// failures returns how many attempts ended in a way.
func failures(r *node.RemotesReport, f matrix.Failure) int64 {
	for _, c := range r.Failures {
		if c.Name == f.String() {
			return c.Count
		}
	}
	return -1
}

// wrong lists what fsbus or the servers should not have seen.
func (v *view) wrong(memory bool, events int64) []string {
	var list []string
	bad := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	if v.peaks.Health != "" {
		bad("fsbus was not well: %s", v.peaks.Health)
	}
	names := []string{rig.Goroutines, rig.Callers, rig.Connections}
	if memory {
		names = append(names, rig.Memory)
	}
	for _, name := range names {
		switch b, err := v.peaks.Budget(name); {
		case err != nil:
			bad("%v", err)
		case b.Max > b.Allowed:
			bad("%s: %s were seen, %s are allowed", name, rig.Count(b.Max), rig.Count(b.Allowed))
		}
	}
	req, limits := &v.last.Report.Requests, v.last.Report.RateLimits
	if req.Shared == 0 || req.CacheHits == 0 || req.FailedFast == 0 {
		bad("of equal requests %d were shared and %d cached, and %d failed fast: none of them should be 0", req.Shared, req.CacheHits, req.FailedFast)
	}
	// Over the whole time: within one second there may be more, when a busy
	// machine ends late what began evenly. A resumption counts for 4 tenths.
	made := float64(v.servers.TLS.Full) + 0.4*float64(v.servers.TLS.Resumed)
	if most := limits.HandshakesPerSecond * (1 + v.took.Seconds()); made > most {
		bad("TLS handshakes that count for %.0f full ones in %v, at most %.0f are allowed", made, v.took, most)
	}
	if tx := v.servers.Transactions; tx.Repeated+tx.Refused != 0 {
		bad("%d transactions arrived twice, %d were refused", tx.Repeated, tx.Refused)
	}
	if got := v.servers.Transactions.PDUs; events == 0 || got != events {
		bad("live servers got %d events of the %d that were taken over for them", got, events)
	}
	return list
}

// conclusion says what the table shows.
func conclusion(t *traffic, v *view, memory bool) string {
	var asked int64
	for _, y := range t.tallies() {
		asked += y.asked
	}
	// v.wrong has seen that both are there.
	connections, _ := v.peaks.Budget(rig.Connections)
	resident, _ := v.peaks.Budget(rig.Memory)
	text := fmt.Sprintf("\nWHAT THIS SHOWS: the homeserver asked %s times, %s requests went out. Every live server's answer arrived,\n"+
		"what was asked of the dead ones got its error in time, and events that were taken over reached every live server,\n"+
		"while fsbus had at most %s connections open",
		rig.Count(asked), rig.Count(v.last.Report.Remotes.Attempts), rig.Count(connections.Max))
	if memory {
		text += fmt.Sprintf("\nand used at most %s of memory", rig.MiB(resident.Max))
	}
	return text + "."
}

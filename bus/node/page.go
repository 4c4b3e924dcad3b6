package node

import (
	"bufio"
	"fmt"
	"html"
	"io"
	"time"

	"fsbus/sched"
)

// pageHead needs nothing from elsewhere and no script; it reloads by itself.
const pageHead = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="5"><title>fsbus</title><style>
:root{color-scheme:light dark;--line:#8884;--dim:#888;--good:#2a7;--bad:#c43}
body{font:15px/1.4 system-ui,sans-serif;margin:1em auto;max-width:60em;padding:0 .8em}
h1{font-size:1.3em;margin:.2em 0}h2{font-size:1em;margin:1.4em 0 .3em}
table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:.2em .5em;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--dim)}th:first-child,td:first-child{text-align:left}
td:first-child{white-space:normal;overflow-wrap:anywhere}tr.h td{border-bottom:0}.s{overflow-x:auto}.dim{color:var(--dim)}
.ok,.no{display:inline-block;padding:.1em .6em;border-radius:1em;color:#fff;background:var(--good)}.no{background:var(--bad)}
.bar{display:inline-block;width:5em;height:.6em;background:var(--line);border-radius:.3em;overflow:hidden;vertical-align:middle}
.bar i{display:block;height:100%;background:var(--good)}.bar i.hot{background:var(--bad)}
@media(max-width:34em){body{font-size:12px;padding:0 .3em}th,td{padding:.2em .25em}.bar{width:2em}}
</style></head><body>
`

// writePage writes the status page: the same as /status, at a glance.
func writePage(w io.Writer, r *Report) error {
	p := page{bufio.NewWriter(w)}
	p.WriteString(pageHead)
	class := "ok"
	if r.Health != "ok" {
		class = "no"
	}
	p.f(`<h1>fsbus <span class="%s">%s</span></h1><p class="dim">%s · version %s · up %s · %s</p>`,
		class, esc(r.Health), esc(r.ServerName), esc(r.Version), (time.Duration(r.UptimeSeconds) * time.Second).String(), esc(r.Homeserver.Text))

	p.table("In use", "", "used", "most", "allowed", "")
	for _, b := range r.Budgets {
		p.row(b.Name, amount(b.Used, b.Unit), amount(b.Max, b.Unit), amount(b.Allowed, b.Unit))
		p.bar(b.Used, b.Allowed)
	}
	p.end()

	p.table("Queues", "class", "requests", "waiting", "running", "oldest", "mean wait", "longest")
	for _, q := range r.Queues {
		p.row(q.Class, q.Requests, q.Waiting, q.Running, secs(q.OldestSeconds), secs(q.MeanWait), secs(q.MaxWait))
	}
	p.end()

	p.table(fmt.Sprintf("Destinations: %d known, %d left alone for now", r.Hosts.Known, r.Hosts.BackingOff), "rank", "hosts", "workers", "most", "allowed")
	for _, k := range r.Hosts.Ranks {
		p.row(k.Rank, k.Hosts, k.Workers, k.WorkersMax, k.WorkersAllowed)
	}
	p.end()

	p.outbox(r.Outbox)
	if h := r.Handover; h != nil {
		p.f(`<p class="dim">%s.`, esc(h.Text))
		if h.Last != nil {
			p.f(` Synapse %s, %d events and %d EDUs for %d servers each time added up; %d refused, %d transactions with events made beside it.`, esc(h.Synapse), h.Events, h.EDUs, h.Pairs, h.Refused, h.Sends)
		}
		p.WriteString("</p>")
	}
	p.edge(r.Edge)
	p.joins(&r.Joins, &r.Keys)

	if len(r.Hosts.Worst) > 0 {
		p.table("Worst off", "destination", "waiting", "failures", "next try")
		for _, h := range r.Hosts.Worst {
			p.WriteString(`<tr class="h">`)
			p.cells(h.Name, h.Waiting, h.Failures, h.nextTry())
			p.f(`<tr><td colspan="4" class="dim">%s</td>`, esc(h.LastError))
		}
		p.end()
	}

	p.table("Requests of the homeserver", "", "so far")
	for _, c := range r.Requests.counts() {
		p.row(c.Name, c.Count)
	}
	p.end()

	p.table("Attempts at remotes", "", "so far")
	p.row("attempts", r.Remotes.Attempts)
	p.row("new connections", r.Remotes.Connects)
	p.row("TLS handshakes", r.Remotes.Handshakes)
	p.row("of them resumed", r.Remotes.Resumed)
	for _, c := range append(r.Remotes.Statuses[2:len(r.Remotes.Statuses):len(r.Remotes.Statuses)], r.Remotes.Failures...) {
		if c.Count > 0 {
			p.row(c.Name, c.Count)
		}
	}
	p.end()

	p.table("Caches", "", "entries", "hits", "misses")
	for _, c := range r.Caches {
		p.row(c.Name, c.Entries, amount(c.Hits, ""), amount(c.Misses, ""))
	}
	p.end()
	p.f(`<p class="dim">Store: %d commits, last %s, longest %s, %s + %s log. <a href="/status">JSON</a> · <a href="/metrics">metrics</a> · <a href="/health">health</a></p></body></html>`,
		r.Store.Commits, secs(r.Store.LastCommitSeconds), secs(r.Store.MaxCommitSeconds), amount(r.Store.FileBytes, "bytes"), amount(r.Store.WALBytes, "bytes"))
	p.WriteString("\n")
	return p.Flush()
}

type page struct{ *bufio.Writer }

func (p page) f(format string, args ...any) { fmt.Fprintf(p, format, args...) }

func (p page) table(title string, heads ...string) {
	p.f(`<h2>%s</h2><div class="s"><table><tr>`, esc(title))
	for _, h := range heads {
		p.f(`<th>%s</th>`, esc(h))
	}
	p.WriteString("</tr>\n")
}

// row begins a row; the HTML parser ends it where the next one begins.
func (p page) row(cells ...any) {
	p.WriteString("<tr>")
	p.cells(cells...)
}

func (p page) cells(cells ...any) {
	for _, c := range cells {
		p.f(`<td>%s</td>`, esc(fmt.Sprint(c)))
	}
}

// nextTry says when a destination is tried again. One whose time has come is
// tried when there is a worker, or when the homeserver next asks for it.
func (h *HostReport) nextTry() string {
	if h.NextTryIn > 0 {
		return "in " + secs(h.NextTryIn)
	}
	if h.Waiting > 0 {
		return "with the next worker"
	}
	return "when asked"
}

func (p page) bar(used, allowed int64) {
	if allowed <= 0 || used < 0 {
		return
	}
	share := min(100, 100*used/allowed)
	hot := ""
	if share >= 90 {
		hot = ` class="hot"`
	}
	p.f(`<td><span class="bar"><i%s style="width:%d%%"></i></span></td>`, hot, share)
}

func (p page) end() { p.WriteString("</table></div>\n") }

func esc(s string) string { return html.EscapeString(s) }

// amount writes a figure for people; -1 is one that is not known.
func amount(v int64, unit string) string {
	switch {
	case v < 0:
		return "–"
	case unit != "bytes":
		return fmt.Sprint(v)
	case v >= int64(sched.GiB):
		return fmt.Sprintf("%.1f GiB", float64(v)/float64(sched.GiB))
	case v >= int64(sched.MiB):
		return fmt.Sprintf("%.1f MiB", float64(v)/float64(sched.MiB))
	case v >= int64(sched.KiB):
		return fmt.Sprintf("%.0f KiB", float64(v)/float64(sched.KiB))
	}
	return fmt.Sprintf("%d B", v)
}

// secs writes seconds for people.
func secs(s float64) string {
	d := time.Duration(s * float64(time.Second))
	switch {
	case d >= time.Hour:
		return d.Round(time.Minute).String()
	case d >= 10*time.Second:
		return d.Round(time.Second).String()
	}
	return d.Round(time.Millisecond).String()
}

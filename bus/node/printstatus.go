package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"
)

// maxStatus is the largest status that is read, in bytes; a real one has less
// than 20 KiB.
const maxStatus = 4 << 20

// PrintStatus asks the fsbus whose status listener is at address ("host:port"
// or "unix:/path") and writes its status as a table, or as the JSON that came.
func PrintStatus(ctx context.Context, w io.Writer, address string, asJSON bool) error {
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	}
	c := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, "GET", "http://localhost/status", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	// When many connect at once, one may be closed for another before its request is seen.
	for range 9 {
		if op, _ := errors.AsType[*net.OpError](err); err == nil || ctx.Err() != nil || op != nil && op.Op == "dial" {
			break
		}
		resp, err = c.Do(req)
	}
	if err != nil {
		return fmt.Errorf("no fsbus answers at %s: %w", address, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxStatus))
	if err != nil {
		return fmt.Errorf("read the status: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s: %s", address, resp.Status, strings.TrimSpace(string(body)))
	}
	if asJSON {
		_, err := w.Write(body)
		return err
	}
	var r Report
	if err := json.Unmarshal(body, &r); err != nil {
		return fmt.Errorf("%s does not answer like an fsbus: %w", address, err)
	}
	return writeTable(w, &r)
}

// writeTable writes a report for a terminal.
func writeTable(w io.Writer, r *Report) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	say(t, "fsbus %s for %s, up %s: %s\n", r.Version, r.ServerName, time.Duration(r.UptimeSeconds)*time.Second, r.Health)
	say(t, "%s\n", r.Homeserver.Text)

	say(t, "\nIN USE\tNOW\tMOST\tALLOWED\n")
	for _, b := range r.Budgets {
		say(t, "%s\t%s\t%s\t%s\n", b.Name, amount(b.Used, b.Unit), amount(b.Max, b.Unit), amount(b.Allowed, b.Unit))
	}
	say(t, "\nCLASS\tREQUESTS\tWAITING\tRUNNING\tOLDEST\tMEAN WAIT\tLONGEST\n")
	for _, q := range r.Queues {
		say(t, "%s\t%d\t%d\t%d\t%s\t%s\t%s\n", q.Class, q.Requests, q.Waiting, q.Running, secs(q.OldestSeconds), secs(q.MeanWait), secs(q.MaxWait))
	}
	say(t, "\nDESTINATIONS\tHOSTS\tWORKERS\tMOST\tALLOWED\n")
	for _, k := range r.Hosts.Ranks {
		say(t, "%s\t%d\t%d\t%d\t%d\n", k.Rank, k.Hosts, k.Workers, k.WorkersMax, k.WorkersAllowed)
	}
	say(t, "left alone\t%d\n", r.Hosts.BackingOff)
	if len(r.Hosts.Worst) > 0 {
		say(t, "\nWORST OFF\tWAITING\tFAILURES\tNEXT TRY\tWHY\n")
		for _, h := range r.Hosts.Worst {
			say(t, "%s\t%d\t%d\t%s\t%s\n", h.Name, h.Waiting, h.Failures, h.nextTry(), h.LastError)
		}
	}
	r.Outbox.table(t)
	if h := r.Handover; h != nil {
		say(t, "\nHAND-OVER\t%s\n", h.Text)
		if h.Last != nil {
			say(t, "Synapse\t%s\nevents\t%d\nEDUs\t%d\nfor servers, added up\t%d\nrefused\t%d\ntransactions beside it\t%d\n", h.Synapse, h.Events, h.EDUs, h.Pairs, h.Refused, h.Sends)
		}
	}
	r.Edge.table(t)
	for i := range r.Joins.Joins {
		j := &r.Joins.Joins[i]
		say(t, "\nJOIN\t%s\t%s\n", j.Room, j.Phase)
		for _, step := range j.timeline() {
			say(t, "\t%s\n", step)
		}
	}
	say(t, "\nSERVER KEYS\tSO FAR\n")
	for _, c := range r.Keys.counts() {
		say(t, "%s\t%d\n", c.Name, c.Count)
	}
	say(t, "\nREQUESTS\tSO FAR\n")
	for _, c := range r.Requests.counts() {
		say(t, "%s\t%d\n", c.Name, c.Count)
	}
	say(t, "\nATTEMPTS\tSO FAR\n")
	say(t, "sent\t%d\nnew connections\t%d\nTLS handshakes\t%d\nof them resumed\t%d\n", r.Remotes.Attempts, r.Remotes.Connects, r.Remotes.Handshakes, r.Remotes.Resumed)
	for _, list := range [][]CountReport{r.Remotes.Statuses, r.Remotes.Failures} {
		for _, c := range list {
			if c.Count > 0 {
				say(t, "%s\t%d\n", c.Name, c.Count)
			}
		}
	}
	return t.Flush()
}

package node

import (
	"fmt"
	"io"

	"fsbus/bus"
	"fsbus/bus/matrix"
)

// OutboxReport is what is taken over from the homeserver and not delivered yet,
// what became of the rest, and which answers are held.
type OutboxReport struct {
	StandsStill  string        `json:"stands_still,omitempty"` // why nothing is taken over or delivered
	SigningKey   string        `json:"signing_key"`            // its id
	Destinations int           `json:"destinations"`           // with something pending, or held
	Pending      []CountReport `json:"pending"`                // items by kind
	PendingBytes int64         `json:"pending_bytes"`          // shared payloads counted for each destination
	OldestAge    float64       `json:"oldest_seconds"`
	Active       int64         `json:"active"` // destinations that wait for a worker or have one
	Failing      int           `json:"failing"`
	Held         int           `json:"held"` // by an admin
	Full         int           `json:"full"` // of which something was refused lately
	SetAsideNow  int64         `json:"set_aside_now"`

	Accepted   int64         `json:"accepted"`   // transactions of the homeserver
	Repeated   int64         `json:"repeated"`   // that were stored before
	Refused    int64         `json:"refused"`    // since there was no room
	NotStored  int64         `json:"not_stored"` // since the store failed
	ItemsIn    []CountReport `json:"items_in"`
	Merged     int64         `json:"merged"`
	Duplicates int64         `json:"duplicates"`
	ItemsOut   []CountReport `json:"items_delivered"`
	Expired    []CountReport `json:"items_expired"`
	Superseded int64         `json:"events_superseded"`
	Sent       int64         `json:"transactions_sent"`
	Retried    int64         `json:"transactions_retried"`
	Thawed     int64         `json:"transactions_unsent"` // taken apart again since there was no connection
	Bisected   int64         `json:"transactions_divided"`
	Controls   int64         `json:"transactions_empty"` // to find out whether it is the server that refuses
	SetAside   int64         `json:"items_set_aside"`
	PDUErrors  int64         `json:"events_refused"` // by destinations that took their transaction

	Answers AnswersReport `json:"answers"`
}

// AnswersReport is the answers to the homeserver's transactions, and why they are
// held.
type AnswersReport struct {
	Pace     string             `json:"ack_pace"`
	Held     int                `json:"held"`
	MaxHeld  int                `json:"held_allowed"`
	Oldest   float64            `json:"oldest_seconds"`
	Hold     float64            `json:"longest_seconds"`
	Why      string             `json:"why"`
	Pressure float64            `json:"pressure_percent"` // on the host's processors
	Delay    float64            `json:"homeserver_delay_seconds"`
	Arrivals int64              `json:"transactions_per_second"`
	Rooms    int                `json:"rooms_known"`
	Servers  int                `json:"servers_known"`
	Memory   int64              `json:"memory_bytes"`
	Lanes    []AnswerLaneReport `json:"lanes"`
	Given    []CountReport      `json:"given"` // so far, by why they were given when they were
}

// AnswerLaneReport is one lane of held answers.
type AnswerLaneReport struct {
	Lane   string  `json:"lane"`
	Held   int     `json:"held"`
	Oldest float64 `json:"oldest_seconds"`
	Rate   float64 `json:"per_second"` // at which they are given
}

// outboxReport returns nil if there is no outbox.
func (n *Node) outboxReport(s *bus.OutboxSnapshot, aside int64) *OutboxReport {
	if n.takeover == nil {
		return nil
	}
	st := &s.Stats
	return &OutboxReport{
		StandsStill: n.takeover.reason(), SigningKey: n.takeover.keys.Load().String(),
		Destinations: s.Queues, Pending: kindCounts(s.Items), PendingBytes: s.Bytes, OldestAge: seconds(s.Oldest),
		Active: int64(s.Active.Used), Failing: s.Failing, Held: s.Held, Full: s.Full, SetAsideNow: aside,
		Accepted: st.Accepted, Repeated: st.Repeated, Refused: st.Full, NotStored: st.NotStored,
		ItemsIn: kindCounts(st.ItemsIn), Merged: st.Merged, Duplicates: st.Duplicates, ItemsOut: kindCounts(st.ItemsOut),
		Expired: kindCounts(st.Expired), Superseded: st.Superseded,
		Sent: st.Transactions, Retried: st.Retried, Thawed: st.Thawed, Bisected: st.Bisected, Controls: st.Controls, SetAside: st.SetAside, PDUErrors: st.PDUErrors,
		Answers: answersReport(&s.Pace),
	}
}

func answersReport(p *bus.PaceStatus) AnswersReport {
	c := &p.Counts
	r := AnswersReport{
		Pace: p.Ack.String(), Held: p.Held, MaxHeld: p.MaxHeld, Oldest: seconds(p.Oldest), Hold: seconds(p.Hold), Why: p.Why,
		Pressure: float64(p.Pressure) / 100, Delay: seconds(p.Delay), Arrivals: p.Arrivals,
		Rooms: p.Rooms, Servers: p.Dests, Memory: int64(p.Bytes),
		Given: []CountReport{
			{"unheld", c.Unheld}, {"prompt", c.Prompt}, {"hurried", c.Hurried}, {"steady", c.Steady}, {"away", c.Away}, {"late", c.Late},
			{"full", c.Full}, {"passed", c.Passed}, {"stopping", c.Drained}, {"gone", c.Gone},
		},
	}
	for _, l := range p.Lanes {
		r.Lanes = append(r.Lanes, AnswerLaneReport{l.Name, l.Held, seconds(l.Oldest), float64(l.Pace) / 1000})
	}
	return r
}

// kindCounts lists counts by kind of item.
func kindCounts(n [matrix.NumKinds + 1]int64) []CountReport {
	list := make([]CountReport, 0, matrix.NumKinds)
	for k := matrix.Kind(1); k <= matrix.NumKinds; k++ {
		list = append(list, CountReport{k.String(), n[k]})
	}
	return list
}

// totals lists what became of items and transactions, for people and metrics.
func (o *OutboxReport) totals() []CountReport {
	return []CountReport{
		{"accepted", o.Accepted}, {"repeated", o.Repeated}, {"refused_full", o.Refused}, {"not_stored", o.NotStored},
		{"sent", o.Sent}, {"retried", o.Retried}, {"unsent", o.Thawed}, {"divided", o.Bisected}, {"empty", o.Controls},
	}
}

// fates lists what became of items.
func (o *OutboxReport) fates() []CountReport {
	return []CountReport{
		{"merged", o.Merged}, {"duplicate", o.Duplicates}, {"superseded", o.Superseded}, {"set_aside", o.SetAside}, {"refused_by_remote", o.PDUErrors},
	}
}

// outbox writes the outbox's part of the page.
func (p page) outbox(o *OutboxReport) {
	if o == nil {
		return
	}
	if o.StandsStill != "" {
		p.f(`<p><span class="no">the outbox stands still</span> %s</p>`, esc(o.StandsStill))
	}
	p.table(fmt.Sprintf("Outbox: %d destinations, oldest %s", o.Destinations, secs(o.OldestAge)), "kind", "pending", "accepted", "delivered", "expired")
	for i, c := range o.Pending {
		p.row(c.Name, c.Count, o.ItemsIn[i].Count, o.ItemsOut[i].Count, o.Expired[i].Count)
	}
	p.end()
	p.table("Transactions", "", "so far")
	for _, c := range append(o.totals(), o.fates()...) {
		if c.Count > 0 {
			p.row(c.Name, c.Count)
		}
	}
	p.end()
	if o.Failing+o.Held+o.Full+int(o.SetAsideNow) > 0 {
		p.f(`<p class="dim">%d destinations fail, %d are held, %d have been full lately, %d items are set aside</p>`, o.Failing, o.Held, o.Full, o.SetAsideNow)
	}
	a := &o.Answers
	p.table(fmt.Sprintf("Answers held: %d of %d, oldest %s of %s", a.Held, a.MaxHeld, secs(a.Oldest), secs(a.Hold)), "lane", "held", "oldest", "a second")
	for _, l := range a.Lanes {
		p.row(l.Lane, l.Held, secs(l.Oldest), fmt.Sprintf("%.1f", l.Rate))
	}
	p.end()
	p.f(`<p class="dim">ack_pace %s: %s. %d transactions a second; the homeserver takes %s for the next thing; tasks wait for a processor %.0f %% of the time.</p>`,
		esc(a.Pace), esc(a.Why), a.Arrivals, secs(a.Delay), a.Pressure)
}

// outbox writes the outbox's metrics.
func (e exposition) outbox(o *OutboxReport) {
	if o == nil {
		return
	}
	still := 0.0
	if o.StandsStill != "" {
		still = 1
	}
	e.one("fsbus_outbox_stands_still", "gauge", "1 if nothing is taken over or delivered, since the signing key does not fit.", still)
	e.one("fsbus_outbox_destinations", "gauge", "Destinations with something pending, or held.", float64(o.Destinations))
	e.one("fsbus_outbox_destinations_failing", "gauge", "Destinations whose last delivery failed.", float64(o.Failing))
	e.one("fsbus_outbox_destinations_held", "gauge", "Destinations that an admin holds.", float64(o.Held))
	e.one("fsbus_outbox_destinations_full", "gauge", "Destinations of which a transaction was refused in the last ten minutes.", float64(o.Full))
	e.one("fsbus_outbox_oldest_seconds", "gauge", "Age of the oldest pending item.", o.OldestAge)
	e.one("fsbus_outbox_pending_bytes", "gauge", "Bytes of pending payloads, shared ones counted for each destination.", float64(o.PendingBytes))
	e.family("fsbus_outbox_pending_items", "gauge", "Pending items by kind.")
	for _, c := range o.Pending {
		e.sample("fsbus_outbox_pending_items", float64(c.Count), "kind", c.Name)
	}
	for _, f := range []struct {
		name, help string
		list       []CountReport
	}{
		{"fsbus_outbox_items_accepted_total", "Items taken over, by kind.", o.ItemsIn},
		{"fsbus_outbox_items_delivered_total", "Items delivered, by kind.", o.ItemsOut},
		{"fsbus_outbox_items_expired_total", "Items given up since they had waited for too long, by kind.", o.Expired},
	} {
		e.family(f.name, "counter", f.help)
		for _, c := range f.list {
			e.sample(f.name, float64(c.Count), "kind", c.Name)
		}
	}
	e.counts("fsbus_outbox_items_total", "What became of items otherwise.", "fate", o.fates())
	e.counts("fsbus_outbox_transactions_total", "Transactions of the homeserver, and those sent to remotes.", "what", o.totals())
	e.one("fsbus_outbox_aside_items", "gauge", "Items that are set aside.", float64(o.SetAsideNow))
	a := &o.Answers
	e.family("fsbus_acks_held", "gauge", "Acknowledgements of transactions that are held, by lane.")
	for _, l := range a.Lanes {
		e.sample("fsbus_acks_held", float64(l.Held), "lane", l.Lane)
	}
	e.family("fsbus_acks_per_second", "gauge", "The pace at which held acknowledgements are given, by lane.")
	for _, l := range a.Lanes {
		e.sample("fsbus_acks_per_second", l.Rate, "lane", l.Lane)
	}
	e.one("fsbus_acks_oldest_seconds", "gauge", "How long the oldest acknowledgement has been held.", a.Oldest)
	e.counts("fsbus_acks_given_total", "Acknowledgements given, by why they were given when they were.", "why", a.Given)
	e.one("fsbus_host_pressure_ratio", "gauge", "For what part of the last ten seconds some task waited for a processor.", a.Pressure/100)
	e.one("fsbus_homeserver_delay_seconds", "gauge", "How long the homeserver takes to get to the next thing, estimated.", a.Delay)
}

// table writes the outbox's part of fsbus status.
func (o *OutboxReport) table(w io.Writer) {
	if o == nil {
		return
	}
	if o.StandsStill != "" {
		say(w, "\nTHE OUTBOX STANDS STILL: %s\n", o.StandsStill)
	}
	say(w, "\nOUTBOX\tPENDING\tACCEPTED\tDELIVERED\tEXPIRED\n")
	for i, c := range o.Pending {
		say(w, "%s\t%d\t%d\t%d\t%d\n", c.Name, c.Count, o.ItemsIn[i].Count, o.ItemsOut[i].Count, o.Expired[i].Count)
	}
	say(w, "destinations\t%d\noldest\t%s\n", o.Destinations, secs(o.OldestAge))
	for _, c := range append(o.totals(), o.fates()...) {
		if c.Count > 0 {
			say(w, "%s\t%d\n", c.Name, c.Count)
		}
	}
	a := &o.Answers
	say(w, "\nANSWERS HELD\tNOW\tOLDEST\tA SECOND\n")
	for _, l := range a.Lanes {
		say(w, "%s\t%d\t%s\t%.1f\n", l.Lane, l.Held, secs(l.Oldest), l.Rate)
	}
	say(w, "ack_pace %s\t%s\n", a.Pace, a.Why)
}

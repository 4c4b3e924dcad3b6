package node

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// writeQueueList writes the queue in the manner of Postfix's qshape: how many
// items wait for each destination, by how long they do.
func writeQueueList(w io.Writer, l *queueList) error {
	t := tabwriter.NewWriter(w, 0, 0, 1, ' ', tabwriter.AlignRight)
	row := func(name string, items int64, ages []int64, bytes int64, state string) {
		say(t, "%s\t%d\t", name, items)
		for i := range len(l.AgeBounds) + 1 {
			if i < len(ages) {
				say(t, "%d\t", ages[i])
			} else {
				say(t, "-\t")
			}
		}
		if state != "" {
			state = "  " + state
		}
		say(t, "%s\t%s\n", amount(bytes, "bytes"), state)
	}
	say(t, "DESTINATION\tTOTAL\t%s\tBYTES\t  STATE\n", fixed(strings.Join(ageHeads(l.AgeBounds), "\t")))
	row("TOTAL", l.Total.Items, l.Total.Ages, l.Total.Bytes, count(l.Total.Destinations, "destination"))
	for i := range l.Destinations {
		d := &l.Destinations[i]
		row(printable(d.Destination), d.Items, d.Ages, d.Bytes, d.stateText())
	}
	if r := l.Rest; r != nil {
		row(fmt.Sprintf("%d more", r.Destinations), r.Items, r.Ages, r.Bytes, "")
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if l.AgesMissing != "" {
		_, err := say(w, "The ages are not known: %s.\n", l.AgesMissing)
		return err
	}
	return nil
}

// ageHeads are the heads of the columns of ages, in minutes.
func ageHeads(bounds []int64) []string {
	var heads []string
	for _, b := range bounds {
		heads = append(heads, fmt.Sprint(b))
	}
	if n := len(bounds); n > 0 {
		heads = append(heads, fmt.Sprintf("%d+", bounds[n-1]))
	}
	return heads
}

func (r *queueRow) stateText() string {
	if r.NextTryIn > 0 {
		return fmt.Sprintf("%s, next try in %s", r.State, span(r.NextTryIn))
	}
	return r.State
}

// writeShow writes all about a destination.
func writeShow(w io.Writer, s *queueShow) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	say(t, "%s: %s\n", s.Destination, s.State)
	line := func(name, format string, args ...any) {
		say(t, "  %s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	if s.Items > 0 {
		line("pending", "%s, %s, the oldest for %s", count(s.Items, "item"), amount(s.Bytes, "bytes"), span(s.OldestSeconds))
	} else {
		line("pending", "nothing")
	}
	if s.Frozen > 0 {
		line("on its way", "%s in a batch that is sent as it is until its outcome is known", count(s.Frozen, "item"))
	}
	if s.Why != "" {
		line("why", "%s", printable(s.Why))
	}
	if s.LastError != "" {
		line("last error", "%s%s", printable(s.LastError), s.tries())
	}
	if s.NextTryIn > 0 {
		line("next try", "in %s", span(s.NextTryIn))
	}
	line("answer", "%s", s.Answer.text())
	if s.Items > 0 {
		say(t, "\nMINUTES\t%s\n", fixed(strings.Join(ageHeads(s.AgeBounds), "\t")))
		say(t, "items")
		for _, n := range s.Ages {
			say(t, "\t%d", n)
		}
		say(t, "\n\n")
		writeKinds(t, s.Kinds)
	}
	if len(s.List) > 0 {
		say(t, "\nID\tKIND\tSIZE\tAGE\tEXPIRES\n")
		for i := range s.List {
			it := &s.List[i]
			say(t, "%d\t%s\t%s\t%s\t%s\n", it.ID, it.Kind, amount(it.Bytes, "bytes"), span(it.AgeSeconds), it.expires())
		}
		if more := s.Items - int64(len(s.List)); more > 0 {
			say(t, "%d more are shown with -all\n", more)
		}
	}
	if len(s.Aside) > 0 {
		say(t, "\nSet aside, and not sent any more:\n\n")
		writeAside(t, s.Aside, false)
	}
	return t.Flush()
}

func (s *showHead) tries() string {
	var said []string
	switch failures := count(int64(s.Failures), "failure"); {
	case s.Failures == 1:
		said = append(said, failures)
	case s.Failures > 1: // else the host failed, which has its own count
		said = append(said, failures+" in a row")
	}
	if s.LastTryAgo != 0 {
		said = append(said, "tried "+span(s.LastTryAgo)+" ago")
	}
	if len(said) == 0 {
		return ""
	}
	return " (" + strings.Join(said, ", ") + ")"
}

// text says what is known of the homeserver's transactions.
func (a *answerReport) text() string {
	if a == nil {
		return "nothing is known of the homeserver's transactions for it"
	}
	s := "the homeserver waits for none"
	if a.Held {
		s = fmt.Sprintf("the homeserver has waited for one for %s", span(a.ForSeconds))
	}
	return fmt.Sprintf("%s; %s (%s)", s, printable(a.Why), count(int64(a.Rooms), "known room"))
}

// expires says how long an item may still wait.
func (it *itemReport) expires() string {
	s := "never"
	switch {
	case it.ExpiresIn == nil:
	case *it.ExpiresIn < 0:
		s = "expired"
	default:
		s = "in " + span(*it.ExpiresIn)
	}
	if it.Frozen {
		s += ", on its way"
	}
	return s
}

func writeKinds(t io.Writer, kinds []kindReport) {
	say(t, "KIND\tITEMS\tSIZE\n")
	for _, k := range kinds {
		say(t, "%s\t%d\t%s\n", k.Kind, k.Items, amount(k.Bytes, "bytes"))
	}
}

// writeAside writes what was set aside as a table, with the destinations if they
// are not all the same.
func writeAside(t io.Writer, list []asideReport, destinations bool) {
	name := func(s string) fixed {
		if !destinations {
			return ""
		}
		return fixed(printable(s) + "\t")
	}
	say(t, "ID\t%sKIND\tSIZE\tAGE\tASIDE FOR\tREASON\n", name("DESTINATION"))
	for i := range list {
		a := &list[i]
		say(t, "%d\t%s%s\t%s\t%s\t%s\t%s\n", a.ID, name(a.Destination), a.Kind, amount(a.Bytes, "bytes"), span(a.AgeSeconds), span(a.AsideFor), a.Reason)
	}
}

// writeExplain says in words how a destination is doing, as of the moment now.
func writeExplain(w io.Writer, s *showHead, now time.Time) error {
	var b strings.Builder
	say := func(format string, args ...any) { say(&b, format, args...) }
	say("%s\n\n", s.Destination)

	say("The server: ")
	switch h := s.Host; {
	case h == nil:
		say("fsbus has not talked to it lately, so it does not know whether it answers.")
	case h.Failures == 1:
		say("the last attempt failed, %s ago: %s.", span(h.FailingFor), printable(h.LastError))
	case h.Failures > 0:
		say("%s in a row have failed, for %s. The last one: %s.", count(int64(h.Failures), "attempt"), span(h.FailingFor), printable(h.LastError))
	case h.LastError != "":
		say("%s.", printable(h.LastError))
	case h.Rank == "proven":
		say("it answers.")
	default:
		say("it has not answered yet.")
	}
	if h := s.Host; h != nil {
		say(" Its rank is %q, %s.", h.Rank, rankText(h.Rank))
		if h.NextTryIn > 0 {
			say(" It is left alone for another %s.", span(h.NextTryIn))
		}
		if h.LastSuccess != nil {
			say(" It last answered %s ago.", span(max(0, now.Sub(*h.LastSuccess).Seconds())))
		}
		if h.Waiting+h.Running > 0 {
			say(" Requests of the homeserver for it: %d waiting, %d running.", h.Waiting, h.Running)
		}
	}

	say("\n\nThe queue: ")
	if s.Items == 0 {
		say("nothing waits.")
	} else {
		var kinds []string
		for _, k := range s.Kinds {
			kinds = append(kinds, fmt.Sprintf("%d %s", k.Items, k.Kind))
		}
		say("%s (%s; %s), the oldest for %s.", count(s.Items, "item"), strings.Join(kinds, ", "), amount(s.Bytes, "bytes"), span(s.OldestSeconds))
	}
	say(" It is %s.", s.State)
	if s.Why != "" {
		say(" Why what is there has not been sent: %s.", printable(s.Why))
	}
	if s.LastError != "" {
		say(" The last delivery failed: %s.", printable(s.LastError))
	}
	if s.NextTryIn > 0 {
		say(" The next try is in %s.", span(s.NextTryIn))
	}
	if s.Held {
		say(" \"fsbus queue release %s\" lets it go on.", s.Destination)
	}
	if n := int64(len(s.Aside)); n > 0 {
		say(" Set aside and not sent any more: %s; \"fsbus queue show %s\" has the reasons.", count(n, "item"), s.Destination)
	}

	say("\n\nThe answers to the homeserver: %s.\n", s.Answer.text())
	_, err := io.WriteString(w, b.String())
	return err
}

// rankText says what a rank means.
func rankText(rank string) string {
	switch rank {
	case "proven":
		return "so most workers are there for it"
	case "failing":
		return "so only the few workers for servers that fail are there for it"
	}
	return "so only the workers for servers that have not answered are there for it"
}

// span writes seconds as a person would: the two largest units.
func span(s float64) string {
	d := time.Duration(s * float64(time.Second))
	const day = 24 * time.Hour
	switch {
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d >= 10*time.Second:
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return d.Round(100 * time.Millisecond).String()
}

// count writes a number with its noun.
func count(n int64, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

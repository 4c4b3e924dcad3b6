package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// result is what a run found.
type result struct {
	Machine   string
	Started   time.Time
	Scenarios []*scenarioResult
}

type scenarioResult struct {
	Name    string
	Figures []*figure
	Checks  []check
	Notes   []string
}

// figure is one thing that was measured, in one or more rounds.
type figure struct {
	Name   string
	Unit   string
	Rounds []float64
}

// check is a bound and what was found.
type check struct {
	Name  string
	Value float64
	Bound float64
	Unit  string
	Least bool // Value must be at least Bound, else at most
}

func (c check) kept() bool {
	if c.Least {
		return c.Value >= c.Bound
	}
	return c.Value <= c.Bound
}

// sorted returns the rounds in order. There is at least one.
func (f *figure) sorted() []float64 { return slices.Sorted(slices.Values(f.Rounds)) }

func (f *figure) median() float64 {
	s := f.sorted()
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

func (r *result) begin(name string) {
	if r.Started.IsZero() {
		r.Started = time.Now().UTC().Truncate(time.Second)
	}
	r.Scenarios = append(r.Scenarios, &scenarioResult{Name: name})
}

func (r *result) last() *scenarioResult { return r.Scenarios[len(r.Scenarios)-1] }

// add notes one round of a figure.
func (r *result) add(name, unit string, value float64) {
	s := r.last()
	i := slices.IndexFunc(s.Figures, func(f *figure) bool { return f.Name == name })
	if i < 0 {
		s.Figures = append(s.Figures, &figure{Name: name, Unit: unit, Rounds: []float64{value}})
		return
	}
	s.Figures[i].Rounds = append(s.Figures[i].Rounds, value)
}

// median returns that of a figure of the scenario that runs. It panics if there
// is none of that name.
func (r *result) median(name string) float64 {
	for _, f := range r.last().Figures {
		if f.Name == name {
			return f.median()
		}
	}
	panic(fmt.Sprintf("bench: no figure %q", name))
}

func (r *result) atMost(name string, value, bound float64, unit string) {
	r.last().Checks = append(r.last().Checks, check{name, value, bound, unit, false})
}

func (r *result) atLeast(name string, value, bound float64, unit string) {
	r.last().Checks = append(r.last().Checks, check{name, value, bound, unit, true})
}

// note adds a sentence that is shown below the figures.
func (r *result) note(format string, args ...any) {
	r.last().Notes = append(r.last().Notes, fmt.Sprintf(format, args...))
}

// table shows a scenario's figures.
func (r *result) table(name string) string {
	var out strings.Builder
	i := slices.IndexFunc(r.Scenarios, func(s *scenarioResult) bool { return s.Name == name })
	s := r.Scenarios[i]
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	width := 0
	for _, f := range s.Figures {
		width = max(width, len(f.Name))
	}
	fmt.Fprintf(w, "  %-*s\tmedian\tleast\tmost\t\trounds\t\n", width, "")
	for _, f := range s.Figures {
		v := f.sorted()
		fmt.Fprintf(w, "  %-*s\t%s\t%s\t%s\t%s\t%d\t\n", width, f.Name, digits(f.median()), digits(v[0]), digits(v[len(v)-1]), f.Unit, len(v))
	}
	w.Flush()
	for _, n := range s.Notes {
		fmt.Fprintf(&out, "  %s\n", n)
	}
	for _, c := range s.Checks {
		fmt.Fprintf(&out, "  %s\n", c)
	}
	return out.String()
}

func (c check) String() string {
	verdict, relation := "kept  ", "at most"
	if !c.kept() {
		verdict = "MISSED"
	}
	if c.Least {
		relation = "at least"
	}
	return fmt.Sprintf("%s  %s: %s %s, wanted %s %s", verdict, c.Name, digits(c.Value), c.Unit, relation, digits(c.Bound))
}

// bounds lists all checks.
func (r *result) bounds() string {
	var out strings.Builder
	n := 0
	out.WriteString("\nBOUNDS\n")
	for _, s := range r.Scenarios {
		for _, c := range s.Checks {
			n++
			fmt.Fprintf(&out, "  %-14s %s\n", s.Name, c)
		}
	}
	fmt.Fprintf(&out, "%d bounds, %d missed\n", n, r.missed())
	return out.String()
}

func (r *result) missed() int {
	n := 0
	for _, s := range r.Scenarios {
		for _, c := range s.Checks {
			if !c.kept() {
				n++
			}
		}
	}
	return n
}

// digits shows a value with four significant digits, more before the point.
func digits(v float64) string {
	switch a := max(v, -v); {
	case a >= 1000 || v == float64(int64(v)):
		return fmt.Sprintf("%.0f", v)
	case a >= 100:
		return fmt.Sprintf("%.1f", v)
	case a >= 10:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// write writes everything as JSON.
func (r *result) write(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// machine says in one line what all was measured on.
func machine() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		load = []byte("unknown")
	}
	return fmt.Sprintf("%s %s/%s, %d x %s, load before %s", runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), model, strings.TrimSpace(string(load)))
}

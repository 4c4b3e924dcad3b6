package rig

import (
	"context"
	"fmt"
	"slices"
	"time"

	"fsbus/bus/node"
)

// Sample is a bus at one moment.
type Sample struct {
	Report *node.Report
	Usage  Usage
}

// Sample looks at the bus now. Its error says how the bus ended, if it has.
func (b *Bus) Sample(ctx context.Context) (Sample, error) {
	r, err := b.Status(ctx)
	if err == nil {
		var u Usage
		if u, err = b.Usage(); err == nil {
			return Sample{r, u}, nil
		}
	}
	if ended := b.Running(); ended != nil {
		return Sample{}, ended
	}
	return Sample{}, err
}

// Watch looks at the bus again and again until ctx ends, which is no error. It
// hands each sample to each, which may be nil, and returns the most of
// everything that was seen.
func (b *Bus) Watch(ctx context.Context, every time.Duration, each func(Sample)) (*Peaks, error) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	p := new(Peaks)
	for {
		s, err := b.Sample(ctx)
		if ctx.Err() != nil {
			return p, nil
		}
		if err != nil {
			return p, err
		}
		p.Add(s)
		if each != nil {
			each(s)
		}
		select {
		case <-ctx.Done():
			return p, nil
		case <-tick.C:
		}
	}
}

// Peaks are the largest values among samples. The zero value has seen none.
type Peaks struct {
	Samples int
	Health  string // the first that was not "ok"; else ""
	Files   int    // as the kernel counts them
	Budgets []node.BudgetUse
}

// Add takes a sample into account. A budget's Max is then the most that was seen,
// by us or by the bus itself, and its Used is the last.
func (p *Peaks) Add(s Sample) {
	p.Samples++
	p.Files = max(p.Files, s.Usage.Files)
	if p.Health == "" && s.Report.Health != "ok" {
		p.Health = s.Report.Health
	}
	for _, b := range s.Report.Budgets {
		b.Max = max(b.Used, b.Max)
		i := slices.IndexFunc(p.Budgets, func(o node.BudgetUse) bool { return o.Name == b.Name })
		if i < 0 {
			p.Budgets = append(p.Budgets, b)
			continue
		}
		b.Max = max(b.Max, p.Budgets[i].Max)
		p.Budgets[i] = b
	}
}

// Names of budgets, as the status has them.
const (
	Memory      = "memory (resident)"
	Goroutines  = "goroutines"
	Callers     = "connections from the homeserver"
	Connections = "connections to remotes"
	DiskBodies  = "bodies on disk"
)

// Budget returns what was seen of one budget. It is an error if the status has
// no such budget.
func (p *Peaks) Budget(name string) (node.BudgetUse, error) {
	for _, b := range p.Budgets {
		if b.Name == name {
			return b, nil
		}
	}
	return node.BudgetUse{}, fmt.Errorf("the status of fsbus has no budget %q", name)
}

// Over returns the budgets of which more was used than is allowed, in words.
func (p *Peaks) Over() []string {
	var over []string
	for _, b := range p.Budgets {
		if b.Max > b.Allowed {
			over = append(over, fmt.Sprintf("%s: %d, allowed %d %s", b.Name, b.Max, b.Allowed, b.Unit))
		}
	}
	return over
}

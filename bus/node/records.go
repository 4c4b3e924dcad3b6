package node

import (
	"context"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/sched"
	"fsbus/store"
)

// toStore and fromStore translate what the core remembers of a host into what
// the store keeps, and back. The core's times are those of a clock that starts
// with the wall clock, so its label is what is stored; the core corrects what
// a wall clock that ran wild makes of it.
func toStore(records []bus.HostRecord) []store.Host {
	hosts := make([]store.Host, len(records))
	for i, r := range records {
		hosts[i] = store.Host{
			Name: r.Name, Failures: r.Failures, Failure: r.LastFailure, Status: int32(r.LastStatus), Error: r.Detail,
			FailingSince: r.FirstFailure.Stored(), FailedAt: r.LastTry.Stored(), RetryAt: r.NextTry.Stored(), SucceededAt: r.LastSuccess.Stored(),
		}
	}
	return hosts
}

func fromStore(hosts []store.Host) []bus.HostRecord {
	records := make([]bus.HostRecord, len(hosts))
	for i, h := range hosts {
		records[i] = bus.HostRecord{
			Name: h.Name, Failures: h.Failures, LastFailure: h.Failure, LastStatus: int(h.Status), Detail: h.Error,
			FirstFailure: sched.FromStored(h.FailingSince), LastTry: sched.FromStored(h.FailedAt), NextTry: sched.FromStored(h.RetryAt), LastSuccess: sched.FromStored(h.SucceededAt),
		}
	}
	return records
}

// loadQueues returns what the store holds for each destination.
func (n *Node) loadQueues(ctx context.Context) (list []bus.QueueRecord, err error) {
	if n.takeover == nil {
		return nil, nil
	}
	err = n.store.LoadOutbox(ctx, func(d store.Destination) error {
		list = append(list, bus.QueueRecord{Name: d.Name, Backlog: backlogOf(d)})
		return nil
	})
	return list, err
}

// loadKnown returns the times of the answers that the store has, and the notary
// that was asked last.
func (n *Node) loadKnown(ctx context.Context, cfg *Config) (list []bus.AnswerRecord, notary matrix.ServerName, err error) {
	err = n.store.AnswerIndex(ctx, cfg.Outbound.CacheEntries, func(a store.AnswerInfo) error {
		list = append(list, bus.AnswerRecord{Key: a.Key, Stored: sched.FromStored(a.Stored), Fresh: sched.FromStored(a.Fresh), Stale: sched.FromStored(a.Stale)})
		return nil
	})
	if err != nil {
		return nil, "", err
	}
	notary, _, err = n.store.LatestVia()
	if n.notary != nil && notary == n.notary.name {
		notary = ""
	}
	return list, notary, err
}

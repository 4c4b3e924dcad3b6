package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/store"
)

// flushed is the answer to POST /queue/flush.
type flushed struct {
	Destinations int64 `json:"destinations"` // that are tried
	Held         int64 `json:"held"`         // and that are not, being held
}

// flush answers POST /queue/flush?destination= or ?all=true: what waits is tried
// at once.
func (a *adminServer) flush(ctx context.Context, q url.Values) (reply, error) {
	asking, cancel := patiently(ctx)
	defer cancel()
	if q.Get("all") == "true" {
		return a.flushAll(asking)
	}
	name, err := destination(q)
	if err != nil {
		return nil, err
	}
	st, _, known, err := a.core.queue(asking, name)
	switch {
	case err != nil:
		return nil, loopError(err)
	case !known:
		return nil, unknown(name)
	case st.Held:
		return nil, adminError{http.StatusConflict, fmt.Sprintf("%s is held: release it first", name)}
	case st.Total() == 0:
		return writeJSON(flushed{}), nil
	}
	a.core.flush(name)
	a.log.Info("an admin wants a destination to be tried now", "destination", name, "items", st.Total())
	return writeJSON(flushed{Destinations: 1}), nil
}

func (a *adminServer) flushAll(ctx context.Context) (reply, error) {
	var names []matrix.ServerName
	var answer flushed
	if err := a.core.queues(ctx, func(st bus.QueueStatus) {
		switch {
		case st.Held:
			answer.Held++
		case st.Total() > 0:
			names = append(names, st.Name)
		}
	}); err != nil {
		return nil, loopError(err)
	}
	for _, name := range names {
		if ctx.Err() != nil {
			break
		}
		a.core.flush(name)
		answer.Destinations++
	}
	a.log.Info("an admin wants all destinations to be tried now", "destinations", answer.Destinations, "held", answer.Held)
	return writeJSON(answer), nil
}

// heldAnswer is the answer to POST /queue/hold and /queue/release.
type heldAnswer struct {
	Destination string `json:"destination"`
	Held        bool   `json:"held"`
	Changed     bool   `json:"changed"` // it was not so before
	Items       int64  `json:"items"`
}

// hold answers POST /queue/hold?destination= and /queue/release?destination=.
func (a *adminServer) hold(held bool) func(context.Context, url.Values) (reply, error) {
	return func(ctx context.Context, q url.Values) (reply, error) {
		name, st, err := a.known(ctx, q)
		if err != nil {
			return nil, err
		}
		op := &store.Hold{Destination: name, Held: held}
		if err := a.apply(ctx, op); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		answer := heldAnswer{string(name), held, st.Held != held, op.Result.Kinds.Sum().Items}
		a.log.Info("an admin has a destination held or released", "destination", name, "held", held, "items", answer.Items)
		return writeJSON(answer), nil
	}
}

// known returns the destination of a request, which must be known.
func (a *adminServer) known(ctx context.Context, q url.Values) (matrix.ServerName, bus.QueueStatus, error) {
	name, err := destination(q)
	if err != nil {
		return "", bus.QueueStatus{}, err
	}
	ctx, cancel := patiently(ctx)
	defer cancel()
	st, _, known, err := a.core.queue(ctx, name)
	switch {
	case err != nil:
		err = loopError(err)
	case !known:
		err = unknown(name)
	}
	return name, st, err
}

// apply waits for operations even if the admin does not: they are done in any
// case, and are to be told of in the log.
func (a *adminServer) apply(ctx context.Context, ops ...store.OutboxOp) error {
	ctx, cancel := patiently(context.WithoutCancel(ctx))
	defer cancel()
	err := a.core.apply(ctx, ops...)
	if errors.Is(err, store.ErrFull) && a.store.SpendReserve() {
		a.log.Warn("the disk is full: what an admin has asked for is done with what was kept for that")
		err = a.core.apply(ctx, ops...)
	}
	return err
}

// forgotten is the answer to POST /queue/forget.
type forgotten struct {
	Items int64 `json:"items"`
	Bytes int64 `json:"bytes"`
}

// forget answers POST /queue/forget?through=: what is set aside goes, up to that
// id.
func (a *adminServer) forget(ctx context.Context, q url.Values) (reply, error) {
	through, err := strconv.ParseInt(q.Get("through"), 10, 64)
	if err != nil || through < 1 {
		return nil, badRequest("%q is not the id of what is set aside", q.Get("through"))
	}
	op := &store.ForgetAside{Through: through}
	if err := a.apply(ctx, op); err != nil {
		return nil, err
	}
	a.log.Info("an admin has items forgotten that were set aside", "through", through, "items", op.Result.Items, "bytes", op.Result.Bytes)
	return writeJSON(forgotten{op.Result.Items, op.Result.Bytes}), nil
}

// retried is the answer to POST /queue/retry.
type retried struct {
	Items int64 `json:"items"` // that are in their queue again
	Bytes int64 `json:"bytes"`
	Left  int64 `json:"left"` // that stay aside
}

// retry answers POST /queue/retry?id=, ?destination= and ?all=true: what was set aside is
// put into its queue again.
func (a *adminServer) retry(ctx context.Context, q url.Values) (reply, error) {
	var id int64
	var dest matrix.ServerName
	var err error
	switch {
	case q.Get("all") == "true":
	case q.Has("id"):
		if id, err = strconv.ParseInt(q.Get("id"), 10, 64); err != nil || id < 1 {
			return nil, badRequest("%q is not the id of what is set aside", q.Get("id"))
		}
	default:
		if dest, err = destination(q); err != nil {
			return nil, err
		}
	}
	var names []matrix.ServerName // each once, and few have any
	if err := a.store.LoadAside(ctx, func(it store.Aside) error {
		if (id == 0 || it.ID == id) && (dest == "" || it.Destination == dest) && !slices.Contains(names, it.Destination) {
			names = append(names, it.Destination)
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if len(names) == 0 && (id != 0 || dest != "") {
		return nil, adminError{http.StatusNotFound, "nothing like that is set aside; \"fsbus queue aside\" lists what is"}
	}
	var answer retried
	for _, name := range names {
		for { // a hundred at a time
			op := &store.RetryAside{Destination: name, ID: id, Now: a.now().Stored()}
			if err := a.apply(ctx, op); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			r := &op.Result
			answer.Items, answer.Bytes = answer.Items+r.Again.Items, answer.Bytes+r.Again.Bytes
			if r.Again.Items == 0 || id != 0 {
				answer.Left += r.Left
				break
			}
		}
		a.core.flush(name)
	}
	a.log.Info("an admin has items tried again that were set aside", "destinations", len(names), "items", answer.Items, "left", answer.Left)
	return writeJSON(answer), nil
}

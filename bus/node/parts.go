package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"fsbus/netx"
)

// partRetry is how long after a part could not be started that is tried again.
const partRetry = 10 * time.Second

// part is a listener that what goes out can do without: an address of the edge, or the
// status page. One that cannot be opened is tried again, and said meanwhile.
type part struct {
	name  string // "edge 127.0.0.1:8448", as in the configuration
	open  func() (net.Listener, error)
	serve func(net.Listener) error // until it is shut down
	ln    net.Listener             // opened, and not served yet
	err   string                   // of the last attempt, "" if it went well
}

// parts knows which are missing.
type parts struct {
	list []*part
	mu   sync.Mutex
	why  map[*part]string // what keeps it from being there
}

// ended is a part whose listener has failed.
type ended struct {
	part *part
	err  error
}

// reason says which parts are missing and why, "" if none is.
func (p *parts) reason() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []string
	for _, t := range p.list { // in their order
		if why := p.why[t]; why != "" {
			all = append(all, why)
		}
	}
	return strings.Join(all, "; ")
}

func (p *parts) note(t *part, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.why == nil {
		p.why = make(map[*part]string)
	}
	p.why[t] = why
}

// addPart opens a part, or notes why that cannot be.
func (n *Node) addPart(t *part) {
	n.parts.list = append(n.parts.list, t)
	n.openPart(t)
}

func (n *Node) openPart(t *part) {
	ln, err := t.open()
	if err != nil {
		n.missing(t, err)
		return
	}
	t.ln, t.err = ln, ""
}

// missing notes that a part is not there. Each cause is logged once, and looked into once:
// to find out who has an address takes a look at all files of all processes.
func (n *Node) missing(t *part, err error) {
	if err.Error() == t.err {
		return
	}
	t.err = err.Error()
	why := fmt.Sprintf("%s cannot be reached: %v%s", t.name, err, holderText(err))
	n.parts.note(t, why)
	n.log.Error("fsbus does without a listener, and tries again each "+partRetry.String(), slog.String("why", why))
}

// serveParts serves those that are open.
func (n *Node) serveParts(ctx context.Context, failed chan<- ended) {
	for _, t := range n.parts.list {
		ln := t.ln
		if ln == nil {
			continue
		}
		t.ln = nil
		n.parts.note(t, "")
		n.log.Info("listening", "for", t.name, "address", address(ln))
		serve(ctx, func(ctx context.Context) {
			err := t.serve(ln)
			if errors.Is(err, http.ErrServerClosed) {
				return
			}
			select {
			case failed <- ended{t, err}:
			case <-ctx.Done():
			}
		})
	}
}

// retryParts opens what is missing. It reports whether nothing is any more.
func (n *Node) retryParts(ctx context.Context, failed chan<- ended) bool {
	for _, t := range n.parts.list {
		if t.err != "" {
			n.openPart(t)
		}
	}
	n.serveParts(ctx, failed)
	return n.parts.reason() == ""
}

// given returns a part's open for a listener that systemd has passed: it is that, and after
// it has failed an error.
func given(ln net.Listener) func() (net.Listener, error) {
	return func() (net.Listener, error) {
		if ln == nil {
			return nil, errors.New("the socket that systemd passed has failed; restart fsbus")
		}
		l := ln
		ln = nil
		return l, nil
	}
}

// statusPart is the status page's listener, at an address or passed by systemd.
func (n *Node) statusPart(cfg *Config, passed net.Listener) *part {
	t := &part{name: "status " + cfg.Status.Listen, serve: n.servePage, open: func() (net.Listener, error) {
		return netx.Listen(cfg.Status.Listen, netx.ListenOptions{AllowRemote: cfg.Status.AllowRemote})
	}}
	if passed != nil {
		t.name, t.open = "status "+address(passed), given(passed)
	}
	return t
}

func (n *Node) servePage(ln net.Listener) error {
	return n.page.Serve(newCrowdListener(ln, statusConns))
}

// edgeParts are the addresses of the edge, or the listeners that systemd has passed.
func (n *Node) edgeParts(cfg *Config, passed []net.Listener) (list []*part) {
	for _, ln := range passed {
		list = append(list, &part{name: "edge " + address(ln), serve: n.edge.server.Serve, open: given(ln)})
	}
	if len(passed) > 0 {
		return list
	}
	for _, spec := range cfg.Edge.Listen {
		list = append(list, &part{name: "edge " + spec, serve: n.edge.server.Serve, open: func() (net.Listener, error) {
			return netx.Listen(spec, netx.ListenOptions{AllowRemote: true})
		}})
	}
	return list
}

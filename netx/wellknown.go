package netx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"fsbus/bus/matrix"
)

// How long the outcome of a well-known fetch is used, beside what
// matrix.WellKnownLifetime says of a valid document. The numbers are Synapse's
// (http/federation/well_known_resolver.py) except the first back-off step:
// Synapse remembers every failure for an hour, which leads a server's traffic
// astray for that long if its web server was down for a moment.
const (
	wellKnownInvalid = time.Hour       // the remote answered, and has no valid document
	wellKnownRetry   = 2 * time.Minute // it did not answer; doubles with each time in a row ...
	wellKnownBackoff = time.Hour       // ... up to this (S2S: "cached for up to an hour")
	// wellKnownGrace is how long after its end a document still counts as seen
	// lately: a failure then is an outage, and does not back off.
	wellKnownGrace = 2 * time.Hour
	// wellKnownJitter spreads the ages that are our own choice, so that what was
	// learnt in one burst does not expire in one.
	wellKnownJitter = 0.1
	// wellKnownRefresh is the part of its life after which a document is fetched
	// again while the old one still serves.
	wellKnownRefresh = 0.8
	// wellKnownOutage is how long a failure that lies with our own network, or
	// our clock, answers for a host without another fetch. All requests for the
	// host come to one in that time, and hardly wait once the network is back.
	wellKnownOutage = 5 * time.Second
	// maxOutages bounds for how many hosts such failures are remembered, the most
	// wanted ones, and with half a KiB each their size.
	maxOutages = 256

	wellKnownTimeout   = 10 * time.Second // of one fetch, redirects included
	wellKnownRedirects = 5
	wellKnownPath      = "/.well-known/matrix/server"
)

// errNoDocument is a remote's answer that is no valid document.
var errNoDocument = errors.New("no valid well-known document")

// wellKnown is a delegator that fetches documents and remembers them. It is
// safe for concurrent use. Equal fetches are done once, by the first who asks.
type wellKnown struct {
	fetch  func(ctx context.Context, host string) (document, error)
	now    func() time.Time
	random *lockedRand
	flight flight[delegation]

	// up reports whether our network works, as servers were connected to lately. A
	// failure that looks like ours is the host's then: this machine may have IPv6 only,
	// or the name servers of that name be down. nil: nothing is known.
	up func() bool

	mu            sync.Mutex
	cache         *lru[delegation]
	outages       *lru[outage]
	hits, fetches int64
}

// outage is a fetch that failed for our own network's sake.
type outage struct {
	err   error
	until time.Time // from then on a fetch is tried again
}

// document is what a fetch found.
type document struct {
	server matrix.ServerName
	life   time.Duration
	ours   bool // life is our default, not what the remote asks for
}

// delegation is what is known of a host.
type delegation struct {
	server   matrix.ServerName // "" means no valid document
	expires  time.Time         // until then it is used
	refresh  time.Time         // from then on, if before expires, a new one is sought
	seen     time.Time         // until then a valid document counts as seen lately
	failures int               // fetches in a row that the remote did not answer
}

func newWellKnown(maxEntries int, now func() time.Time, random *lockedRand,
	fetch func(ctx context.Context, host string) (document, error)) *wellKnown {
	return &wellKnown{
		fetch:  fetch,
		now:    now,
		random: random,
		// What an entry holds beside its key is in entryOverhead, but for a name.
		cache:   newLRU[delegation](maxEntries, int64(maxEntries)*(entryOverhead+2*matrix.MaxServerName)),
		outages: newLRU[outage](maxOutages, maxOutages<<9),
	}
}

func (w *wellKnown) delegation(ctx context.Context, host string) (matrix.ServerName, error) {
	if d, ok := w.cached(host, true); ok {
		return d.server, nil
	}
	d, err := w.flight.do(ctx, host, func(ctx context.Context) (delegation, error) {
		if d, ok := w.cached(host, false); ok { // another fetch has just ended
			return d, nil
		}
		if err := w.outage(host); err != nil {
			return w.unknown(host, err)
		}
		fetchCtx, cancel := share(ctx, wellKnownTimeout)
		defer cancel()
		doc, err := w.fetch(fetchCtx, host)
		switch f, known := classify(err); {
		case err == nil:
		case ctx.Err() != nil:
			return w.unknown(host, err)
		case ownNetwork(err) && !w.isUp(), errors.Is(err, errClock):
			w.noteOutage(host, err)
			return w.unknown(host, err)
		case known && f == matrix.FailLocal:
			return w.unknown(host, err)
		}
		return w.store(host, doc, err), nil
	})
	return d.server, err
}

// isUp reports whether our network is known to work.
func (w *wellKnown) isUp() bool { return w.up != nil && w.up() }

// unknown is what counts when a fetch ended with err, which is not the remote's
// answer. A document that is still good serves on. Without one the request must
// fail: that our network is down does not mean that the host has no document,
// and the next step would lead to the wrong server.
func (w *wellKnown) unknown(host string, err error) (delegation, error) {
	if d, ok := w.valid(host); ok {
		return d, nil
	}
	return delegation{}, err
}

// outage returns with what a fetch for host has just failed, if it was for our
// own network's sake.
func (w *wellKnown) outage(host string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if o, ok := w.outages.get(host); ok && w.now().Before(o.until) {
		return o.err
	}
	return nil
}

func (w *wellKnown) noteOutage(host string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// The cause has the text once more.
	w.outages.put(host, outage{err, w.now().Add(wellKnownOutage)}, 2*int64(len(err.Error())))
}

// cached returns what is known of host if it need not be fetched now. While
// somebody fetches a document anew, and others is true, the old one does.
func (w *wellKnown) cached(host string, others bool) (delegation, bool) {
	w.mu.Lock()
	d, ok := w.cache.get(host)
	w.mu.Unlock()
	now := w.now()
	if !ok || !now.Before(d.expires) {
		return delegation{}, false
	}
	if !now.Before(d.refresh) && !(others && w.flight.running(host)) {
		return delegation{}, false
	}
	w.mu.Lock()
	w.hits++
	w.mu.Unlock()
	return d, true
}

// valid returns a document that has not expired.
func (w *wellKnown) valid(host string) (delegation, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, ok := w.cache.get(host)
	return d, ok && d.server != "" && w.now().Before(d.expires)
}

// store puts the outcome of a fetch into the cache and returns what counts now.
func (w *wellKnown) store(host string, doc document, err error) delegation {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fetches++
	now := w.now()
	old, _ := w.cache.get(host)
	d := delegation{seen: old.seen}
	switch {
	case err == nil:
		life := doc.life
		if doc.ours {
			life = w.jitter(life)
		}
		d.server = doc.server
		d.expires = now.Add(life)
		d.refresh = now.Add(time.Duration(float64(life) * wellKnownRefresh))
		d.seen = d.expires.Add(wellKnownGrace)
	case errors.Is(err, errNoDocument):
		d.expires = now.Add(w.jitter(wellKnownInvalid))
		d.refresh = d.expires
	case old.server != "" && now.Before(old.expires):
		d = old
		d.refresh = now.Add(w.jitter(wellKnownRetry))
	case now.Before(old.seen):
		d.expires = now.Add(w.jitter(wellKnownRetry))
		d.refresh = d.expires
	default:
		// Six doublings pass wellKnownBackoff.
		wait := min(wellKnownRetry<<min(old.failures, 6), wellKnownBackoff)
		d.failures = old.failures + 1
		d.expires = now.Add(w.jitter(wait))
		d.refresh = d.expires
	}
	w.cache.put(host, d, int64(len(d.server)))
	return d
}

// stats returns the present counts.
func (w *wellKnown) stats() (entries int, hits, fetches int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cache.len(), w.hits, w.fetches
}

// jitter returns d, changed by up to a tenth either way.
func (w *wellKnown) jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (1 - wellKnownJitter + 2*wellKnownJitter*w.random.float64()))
}

// wellKnownFetcher gets documents over HTTPS.
type wellKnownFetcher struct {
	// open makes a connection for one request.
	open      func(ctx context.Context, r *Route, alpn []string) (*http.ClientConn, error)
	now       func() time.Time
	userAgent string
}

// fetch gets host's document. The error wraps errNoDocument if the remote has
// none that is valid, and is anything else if it cannot be got for now.
func (f *wellKnownFetcher) fetch(ctx context.Context, host string) (document, error) {
	u := &url.URL{Scheme: "https", Host: host, Path: wellKnownPath}
	for hop := range 1 + wellKnownRedirects {
		doc, next, err := f.get(ctx, u)
		if hop > 0 && ownNetwork(err) {
			// The first host has answered, so our network is up. A document that
			// is nowhere to be found must not keep the server out of reach.
			return document{}, fmt.Errorf("well-known: redirect: %v", err)
		}
		if next == nil {
			return doc, err
		}
		u = next
	}
	return document{}, fmt.Errorf("%w: more than %d redirects", errNoDocument, wellKnownRedirects)
}

// get makes one request: its outcome is next, if that is a redirect.
func (f *wellKnownFetcher) get(ctx context.Context, u *url.URL) (doc document, next *url.URL, err error) {
	name, err := matrix.ParseServerName(strings.ToLower(u.Host))
	if err != nil {
		return doc, nil, fmt.Errorf("%w: redirect: %w", errNoDocument, err)
	}
	host, port, hasPort := name.Split()
	if !hasPort {
		port = 443
	}
	conn, err := f.open(ctx, &Route{TLSName: host, HostHeader: u.Host, Targets: []Target{{Host: host, Port: uint16(port)}}}, alpnHTTP1)
	if err != nil {
		return doc, nil, err
	}
	// A connection to a web server is of no further use.
	defer conn.Close()
	req := &http.Request{Method: "GET", URL: u, Host: u.Host, Header: http.Header{"User-Agent": nil}, Close: true}
	if f.userAgent != "" {
		req.Header.Set("User-Agent", f.userAgent)
	}
	resp, err := conn.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return doc, nil, requestError(ctx, err, false)
	}
	defer resp.Body.Close()

	redirects := []int{http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect}
	switch status := resp.StatusCode; {
	case slices.Contains(redirects, status):
		next, err = redirect(u, resp.Header.Get("Location"))
		return doc, next, err
	case status >= 500 || status == http.StatusTooManyRequests:
		return doc, nil, fmt.Errorf("well-known: status %d", status)
	case status != http.StatusOK:
		return doc, nil, fmt.Errorf("%w: status %d", errNoDocument, status)
	}
	// One byte more than is allowed, for ParseWellKnown to see.
	body, err := io.ReadAll(io.LimitReader(resp.Body, matrix.MaxWellKnown+1))
	if err != nil {
		return doc, nil, fmt.Errorf("well-known: %w", err)
	}
	if doc.server, err = matrix.ParseWellKnown(body); err != nil {
		return doc, nil, fmt.Errorf("%w: %w", errNoDocument, err)
	}
	cacheControl, expires := resp.Header["Cache-Control"], resp.Header["Expires"]
	doc.life = matrix.WellKnownLifetime(cacheControl, expires, f.now())
	doc.ours = len(cacheControl) == 0 && len(expires) == 0
	return doc, nil, nil
}

// redirect returns where a redirect from u to location leads. It must be HTTPS:
// over anything else, who owns the network would own the server name.
func redirect(u *url.URL, location string) (*url.URL, error) {
	if location == "" {
		return nil, fmt.Errorf("%w: redirect without Location", errNoDocument)
	}
	to, err := u.Parse(location)
	if err != nil {
		return nil, fmt.Errorf("%w: redirect with a bad Location", errNoDocument)
	}
	if to.Scheme != "https" || to.Opaque != "" {
		return nil, fmt.Errorf("%w: redirect to something other than HTTPS", errNoDocument)
	}
	if _, err := matrix.ParseServerName(to.Host); err != nil {
		return nil, fmt.Errorf("%w: redirect: %w", errNoDocument, err)
	}
	to.User, to.Fragment, to.RawFragment = nil, "", ""
	// net/url takes a query as it comes, and net/http sends it like that: a
	// blank would end the request target.
	if err := checkTarget(to.RequestURI()); err != nil {
		return nil, fmt.Errorf("%w: redirect: %w", errNoDocument, err)
	}
	return to, nil
}

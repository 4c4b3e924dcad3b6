package node

import (
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"fsbus/netx"
)

// HomeserverReport is what the bus has seen of the homeserver's own requests.
type HomeserverReport struct {
	// LastSeen is when the last request with the right secret came; nil if none has come
	// since the start.
	LastSeen *time.Time `json:"last_seen,omitempty"`
	// WrongSecret counts the requests without it.
	WrongSecret uint64 `json:"wrong_secret"`
	// Text is LastSeen for people.
	Text string `json:"text"`
}

// What a homeserver with a wrong secret is given, and how long it is remembered.
const (
	// wrongSecretFor is how long there must be only such requests before /health says so.
	wrongSecretFor = time.Minute
	// wrongSecretKept is how long /health goes on to say so without another.
	wrongSecretKept = time.Hour
)

func homeserverReport(s *netx.FrontStats, now time.Time) HomeserverReport {
	r := HomeserverReport{WrongSecret: s.Refused[http.StatusProxyAuthRequired]}
	if s.Secret.LastRight.IsZero() {
		r.Text = "the homeserver has not connected since the start"
		if r.WrongSecret > 0 {
			r.Text = "the homeserver has not connected with the right secret since the start"
		}
		return r
	}
	r.LastSeen = &s.Secret.LastRight
	r.Text = fmt.Sprintf("the homeserver was last seen %s ago", max(now.Sub(s.Secret.LastRight), 0).Round(time.Second))
	return r
}

// wrongSecret returns what is wrong if only requests without the secret come, else "".
func wrongSecret(s *netx.SecretStats, now time.Time) string {
	if s.FirstWrong.IsZero() || now.Sub(s.FirstWrong) < wrongSecretFor || now.Sub(s.LastWrong) >= wrongSecretKept {
		return ""
	}
	return fmt.Sprintf("no request has had the right secret for %s, and each is refused with 407: %s", now.Sub(s.FirstWrong).Round(time.Second), compareSecrets)
}

// compareSecrets says how a wrong secret is put right.
const compareSecrets = "compare worker_replication_secret of homeserver.yaml (or the file of worker_replication_secret_path) with front.secret (or the file of front.secret_path), and restart both"

// refusedSecret logs a request without the right secret.
func (n *Node) refusedSecret() {
	n.notable.write(slog.LevelError, "a request is refused, as it has not the secret: "+compareSecrets)
}

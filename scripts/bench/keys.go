package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

const (
	keyServers       = 2000 // the notary comes on top
	queriesPerServer = 5
	// queriesAtOnce is how many queries are open. A homeserver that does not batch,
	// such as Dendrite, asks for all members of a room at once.
	queriesAtOnce = 2000
	notaryLatency = 2 * time.Second
)

// keyMargins are how far ahead the keys must be valid, one for each query for a
// server: all are within what the servers publish.
var keyMargins = [queriesPerServer]time.Duration{0, time.Minute, time.Hour, 3 * time.Hour, 6 * time.Hour}

// keyQueries asks one notary for many keys, one in each query.
func keyQueries(ctx context.Context, b *bench) error {
	c := sim.Config{Servers: keyServers + 1, Seed: 1, Notary: true, NotaryLatency: notaryLatency}
	if err := b.eachWay(ctx, c, b.keyQueries); err != nil {
		return err
	}
	b.result.note("default configuration; %d queries for each of %d servers, in any order, %d open at a time", queriesPerServer, keyServers, queriesAtOnce)
	b.result.note("the notary answers after %v; right: both signatures hold, and the key is valid for as long as was asked", notaryLatency)
	return nil
}

func (b *bench) keyQueries(ctx context.Context, w *way) error {
	notary := w.Names()[sim.NotaryServer]
	type query struct {
		server int
		until  int64
		answer []byte
	}
	now := time.Now()
	queries := make(map[*fedload.Request]*query)
	requests := make([]*fedload.Request, keyServers*queriesPerServer)
	for i := range requests {
		q := &query{server: 1 + i%keyServers, until: now.Add(keyMargins[i/keyServers]).UnixMilli()}
		requests[i] = fedload.KeyQuery(notary, fedload.KeyWanted{Server: w.Names()[q.server], ID: w.SigningKey(q.server).ID(), Until: q.until})
		queries[requests[i]] = q
	}
	rng := rand.New(rand.NewPCG(2, 2))
	rng.Shuffle(len(requests), func(i, j int) { requests[i], requests[j] = requests[j], requests[i] })

	client := w.client()
	defer client.Close()
	report := client.Run(ctx, queriesAtOnce, slices.Values(requests), func(r *fedload.Request, res fedload.Result) {
		if res.Err == nil && res.Status == http.StatusOK {
			queries[r].answer = res.Body
		}
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	right := 0
	for _, q := range queries {
		server := signer{w.Names()[q.server], w.SigningKey(q.server)}
		if keyIsRight(q.answer, q.until, server, signer{notary, w.SigningKey(sim.NotaryServer)}) {
			right++
		}
	}
	seen := w.Stats()
	left := seen.Endpoints["key/query"].Count + seen.Endpoints["key/server"].Count
	add := func(name, unit string, value float64) { b.result.add(w.name+": "+name, unit, value) }
	add("all over after", "s", report.Elapsed.Seconds())
	add(fmt.Sprintf("of %d, answered right", len(requests)), "", float64(right))
	add("requests that left", "", float64(left))
	add("at once, at most", "", float64(seen.MaxInFlight))
	add("a query took, p50", "s", report.Whole.Percentile(50).Seconds())
	add("a query took, p99", "s", report.Whole.Percentile(99).Seconds())
	if report.FirstErr != nil {
		b.result.note("%s: the first of %d that failed: %v", w.name, report.Failed, report.FirstErr)
	}
	if err := b.addUsage(w); err != nil {
		return err
	}
	if w.name == "fsbus" {
		b.result.atLeast("key queries that are answered right", float64(right), float64(len(requests)), "")
		b.result.atMost("key requests that leave", float64(left), 60, "")
		b.result.atMost("all key queries", report.Elapsed.Seconds(), 15, "s")
	}
	return nil
}

// signer is who must have signed a key object.
type signer struct {
	name matrix.ServerName
	key  matrix.SigningKey
}

// keyIsRight reports whether an answer to a key query has the object of a server,
// signed by that and by the notary, and valid until the time given, in Unix
// milliseconds.
func keyIsRight(answer []byte, until int64, server, notary signer) bool {
	var keys struct {
		Objects []json.RawMessage `json:"server_keys"`
	}
	if json.Unmarshal(answer, &keys) != nil {
		return false
	}
	return slices.ContainsFunc(keys.Objects, func(object json.RawMessage) bool {
		var o struct {
			Name  matrix.ServerName `json:"server_name"`
			Until int64             `json:"valid_until_ts"`
		}
		if json.Unmarshal(object, &o) != nil || o.Name != server.name || o.Until < until {
			return false
		}
		for _, s := range []signer{server, notary} {
			if matrix.VerifyJSON(object, string(s.name), s.key.ID(), s.key.Public()) != nil {
				return false
			}
		}
		return true
	})
}

package store

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"fsbus/bus/matrix"
)

func TestAThawedBatchIsMergedWithWhatWaits(t *testing.T) {
	const u = "@u:hs1.test"
	long := strings.Repeat("k", 300)
	for _, c := range []struct {
		name          string
		packed, newer []string
		merged        int
		want          []string
	}{
		{"typing", []string{typing("!r", u, true), typing("!s", u, true)}, []string{typing("!r", u, false)}, 1,
			[]string{typing("!s", u, true), typing("!r", u, false)}},
		{"receipts", []string{receipt("!r", u, "$1", ""), receipt("!r", u, "$1", "main")}, []string{receipt("!r", u, "$2", "")}, 1,
			[]string{`{"!r":{"m.read":{"` + u + `":{"data":{"thread_id":"main","ts":1},"event_ids":["$1"]}}}}`,
				`{"!r":{"m.read":{"` + u + `":{"data":{"ts":1},"event_ids":["$2"]}}}}`}},
		{"to-device", []string{toDevice("1", "a"), toDevice("2", long)}, []string{toDevice("1", "a"), toDevice("2", long)}, 0,
			[]string{toDevice("1", "a"), toDevice("2", long), toDevice("1", "a"), toDevice("2", long)}},
		{"unknown", []string{`{"content":{},"edu_type":"x"}`}, []string{`{"content":{},"edu_type":"x"}`}, 0,
			[]string{`{"content":{},"edu_type":"x"}`, `{"content":{},"edu_type":"x"}`}},
		{"signing keys", []string{signingKey(u, `"master_key":{"k":"`+long+`"}`)}, []string{signingKey(u, `"self_signing_key":{"k":2}`), signingKey("@v:hs1.test", `"master_key":{"k":3}`)}, 1,
			[]string{signingKey(u, `"master_key":{"k":"`+long+`"},"self_signing_key":{"k":2}`), signingKey("@v:hs1.test", `"master_key":{"k":3}`)}},
		{"the newer of two keys", []string{signingKey(u, `"master_key":{"k":1},"self_signing_key":{"k":1}`)}, []string{signingKey(u, `"master_key":{"k":2}`)}, 1,
			[]string{signingKey(u, `"master_key":{"k":2},"self_signing_key":{"k":1}`)}},
		// The second is relinked when the first is dropped, and then dropped itself.
		{"device lists in a chain", []string{deviceList(u, "A", 10, long, 9), deviceList(u, "B", 11, "old", 10), deviceList(u, "C", 12, "", 11)},
			[]string{deviceList(u, "A", 13, "new", 12), deviceList(u, "B", 14, long, 13)}, 2,
			[]string{deviceList(u, "C", 12, "", 9), deviceList(u, "A", 13, "new", 12), deviceList(u, "B", 14, long, 13)}},
		{"device lists apart", []string{deviceList(u, "A", 10, "", 9)}, []string{deviceList(u, "A", 12, "", 11)}, 0,
			[]string{deviceList(u, "A", 10, "", 9), deviceList(u, "A", 12, "", 11)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := newPath(t)
			s := open(t, Options{Path: path})
			// With and without items in the other lanes.
			accept(t, s, "a.test", "1", 1, items(t, []string{pdu("!r", 1, long)}, c.packed))
			p := pack(t, s, "a.test", "b1", 2)
			want(t, "packed", p.Kinds.Sum().Items, int64(len(c.packed)+1))
			accept(t, s, "a.test", "2", 3, items(t, []string{pdu("!r", 2, "p")}, c.newer))
			r := settle(t, s, "a.test", "b1", Thaw)
			want(t, "found, thawed, merged", []any{r.Found, r.Thawed, r.Merged}, []any{true, true, c.merged})
			list := pending(t, s, "a.test")
			var edus []PendingItem
			var kinds KindTotals
			for _, it := range list {
				if it.Frozen {
					t.Errorf("still frozen: %s", it.Payload)
				}
				if it.Kind != matrix.KindPDU {
					edus = append(edus, it)
				}
				kinds.add(it.Kind, 1, it.Size)
			}
			want(t, "pending", payloads(edus), strings.Join(c.want, "\n")+"\n")
			want(t, "destination", r.Destination, Destination{Name: "a.test", TxnID: "2", Kinds: kinds, Oldest: 1})
			want(t, "stored", loadOutbox(t, s)["a.test"], r.Destination)
			want(t, "totals", s.Stats().Outbox, OutboxTotals{Destinations: 1, Items: int64(len(list))})
			audit(t, path)
			want(t, "settled again", settle(t, s, "a.test", "b1", Delivered).Found, false)
			p = pack(t, s, "a.test", "b2", 4)
			want(t, "packed anew", []any{p.ID, p.Again, p.Kinds}, []any{"b2", false, kinds})
		})
	}
}

func TestAThawedItemThatGoesIsNotTheOldest(t *testing.T) {
	s := open(t, Options{Path: newPath(t)})
	accept(t, s, "a.test", "", 1, edus(t, presence("@u:hs1.test", "old", 1)))
	pack(t, s, "a.test", "b1", 2)
	accept(t, s, "a.test", "", 3, edus(t, presence("@u:hs1.test", "new", 1), presence("@v:hs1.test", "", 1)))
	r := settle(t, s, "a.test", "b1", Thaw)
	want(t, "merged, items, oldest", []any{r.Merged, r.Destination.Kinds.Sum().Items, r.Destination.Oldest}, []any{1, int64(2), int64(3)})
}

func TestOnlyAWholeBatchIsThawed(t *testing.T) {
	path := newPath(t)
	s := open(t, Options{Path: path})
	accept(t, s, "a.test", "1", 1, edus(t, typing("!r", "@u:hs1.test", true), typing("!s", "@u:hs1.test", true)))
	pack(t, s, "a.test", "b1", 2)
	accept(t, s, "a.test", "2", 3, edus(t, typing("!r", "@u:hs1.test", false), typing("!s", "@u:hs1.test", false)))
	refused := func(what, id string, found bool) {
		t.Helper()
		before := snapshot(t, s, "a.test")
		r := settle(t, s, "a.test", id, Thaw)
		want(t, what, []any{r.Found, r.Thawed, r.Merged, r.Destination}, []any{found, false, 0, loadOutbox(t, s)["a.test"]})
		want(t, what, snapshot(t, s, "a.test"), before)
	}
	refused("another id", "b0", false)
	settle(t, s, "a.test", "b1", Bisect)
	refused("divided", "b1", false)
	pack(t, s, "a.test", "b2", 4)
	refused("the first half", "b2", true)
	// As if an earlier fsbus had divided it.
	if err := openRaw(t, path).exec(t.Context(), `UPDATE dest SET frozen = replace(frozen, '"refused":true', '"refused":false')`); err != nil {
		t.Fatal(err)
	}
	refused("the first half without a mark", "b2", true)
	if err := openRaw(t, path).exec(t.Context(), `UPDATE dest SET frozen = replace(frozen, '"refused":false', '"refused":true')`); err != nil {
		t.Fatal(err)
	}
	settle(t, s, "a.test", "b2", Delivered)
	pack(t, s, "a.test", "b3", 5)
	refused("the second half", "b3", true)
	closeStore(t, s)
	s = open(t, Options{Path: path})
	want(t, "packed again", pack(t, s, "a.test", "b4", 6).ID, "b3")
	refused("after a restart", "b3", true)
	settle(t, s, "a.test", "b3", Delivered)
	pack(t, s, "a.test", "b5", 7)
	want(t, "the next", settle(t, s, "a.test", "b5", Thaw).Thawed, true)
	refused("twice", "b5", false)
	audit(t, path)
}

// remote is what a server knows that takes transactions in. Of the EDUs of a
// transaction it handles those of a type that it has a queue for in order, and
// the others in any.
type remote struct {
	rng     *rand.Rand
	state   map[string]string
	devices map[string]*remoteDevices
	lists   map[string][]string // what keeps its order
}

// remoteDevices is a user's list, complete up to the stream ids seen until a
// predecessor is missing.
type remoteDevices struct {
	seen  map[string]bool
	names map[string]string
	stale bool
}

func newRemote(rng *rand.Rand) *remote {
	return &remote{rng: rng, state: map[string]string{}, devices: map[string]*remoteDevices{}, lists: map[string][]string{}}
}

type remoteEDU struct {
	Type    string          `json:"edu_type"`
	Content json.RawMessage `json:"content"`
	place   int             // in the transaction, if it keeps that
}

func (r *remote) take(body []byte) error {
	var txn struct {
		TS   int64             `json:"origin_server_ts"`
		PDUs []json.RawMessage `json:"pdus"`
		EDUs []remoteEDU       `json:"edus"`
	}
	if err := json.Unmarshal(body, &txn); err != nil {
		return err
	}
	for _, p := range txn.PDUs {
		var event struct {
			Room string `json:"room_id"`
		}
		if err := json.Unmarshal(p, &event); err != nil {
			return err
		}
		r.append("events of "+event.Room, string(p))
	}
	// A key that is set twice in one transaction comes out either way.
	for i := range txn.EDUs {
		switch e := &txn.EDUs[i]; e.Type {
		case "m.direct_to_device", "m.device_list_update", "x":
			e.place = 1 + i
		}
	}
	r.rng.Shuffle(len(txn.EDUs), func(i, j int) { txn.EDUs[i], txn.EDUs[j] = txn.EDUs[j], txn.EDUs[i] })
	slices.SortStableFunc(txn.EDUs, func(a, b remoteEDU) int { return a.place - b.place })
	set := map[string]bool{}
	for _, e := range txn.EDUs {
		if err := r.edu(e, txn.TS, set); err != nil {
			return err
		}
	}
	return nil
}

// append notes what comes after what is there, but nothing twice.
func (r *remote) append(list, what string) {
	if !slices.Contains(r.lists[list], what) {
		r.lists[list] = append(r.lists[list], what)
	}
}

// edu takes in an EDU. What it sets is noted in set: nothing twice.
func (r *remote) edu(e remoteEDU, ts int64, set map[string]bool) error {
	put := func(key, value string) error {
		if set[key] {
			return fmt.Errorf("%s twice in a transaction", key)
		}
		set[key] = true
		r.state[key] = value
		return nil
	}
	raw := map[string]any{}
	if err := json.Unmarshal(e.Content, &raw); err != nil {
		return err
	}
	text := func(v any) string {
		b, _ := json.Marshal(v)
		return string(b)
	}
	switch e.Type {
	case "m.typing":
		return put(fmt.Sprint("typing ", raw["room_id"], raw["user_id"]), text(raw["typing"]))
	case "m.presence":
		for _, v := range raw["push"].([]any) {
			p := v.(map[string]any)
			p["last_active_ago"] = ts - int64(p["last_active_ago"].(float64)) // since when
			if err := put(fmt.Sprint("presence ", p["user_id"]), text(p)); err != nil {
				return err
			}
		}
	case "m.receipt":
		var rooms map[string]map[string]map[string]struct {
			Data     map[string]any
			EventIDs []string `json:"event_ids"`
		}
		if err := json.Unmarshal(e.Content, &rooms); err != nil {
			return err
		}
		for room, types := range rooms {
			for kind, users := range types {
				for user, v := range users {
					if err := put(fmt.Sprint("receipt ", room, kind, user, v.Data["thread_id"]), text(v)); err != nil {
						return err
					}
				}
			}
		}
	case "m.signing_key_update":
		user := fmt.Sprint("keys ", raw["user_id"])
		for name, v := range raw {
			if name != "user_id" && v != nil {
				if err := put(user+name, text(v)); err != nil {
					return err
				}
			}
		}
	case "m.device_list_update":
		user := raw["user_id"].(string)
		d := r.devices[user]
		if d == nil {
			d = &remoteDevices{seen: map[string]bool{"0": true}, names: map[string]string{}}
			r.devices[user] = d
		}
		for _, p := range raw["prev_id"].([]any) {
			d.stale = d.stale || !d.seen[fmt.Sprint(p)]
		}
		d.seen[fmt.Sprint(raw["stream_id"])] = true
		d.names[raw["device_id"].(string)] = text(raw["device_display_name"])
	default:
		r.append(e.Type, string(e.Content))
	}
	return nil
}

// knows lists all that the server knows.
func (r *remote) knows() string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(r.state)) {
		fmt.Fprintf(&b, "%s = %s\n", k, r.state[k])
	}
	for _, k := range slices.Sorted(maps.Keys(r.devices)) {
		fmt.Fprintf(&b, "devices of %s, stale %t: %v\n", k, r.devices[k].stale, r.devices[k].names)
	}
	for _, k := range slices.Sorted(maps.Keys(r.lists)) {
		fmt.Fprintf(&b, "%s: %s\n", k, r.lists[k])
	}
	return b.String()
}

// sender is one destination of the two that get the same, one of which thaws.
type sender struct {
	name     matrix.ServerName
	thaws    bool
	maxBytes int
	remote   *remote
	tried    PackResult        // the attempt that goes on
	left     map[string]string // bodies that may have got there, by id
}

// begin packs for an attempt.
func (d *sender) begin(t *testing.T, s *Store, id string, now int64) {
	t.Helper()
	p := &Pack{Destination: d.name, NewID: id, Now: now, Origin: origin, MaxBytes: d.maxBytes}
	do(t, s, p)
	d.tried = p.Result
}

// end ends the attempt: with a connection or without, answered or not.
func (d *sender) end(t *testing.T, s *Store, connected, answered bool) (r SettleResult) {
	t.Helper()
	id, body := d.tried.ID, d.tried.Body
	d.tried = PackResult{}
	before, again := d.left[id]
	switch {
	case id == "":
	case !connected:
		// Unless an earlier attempt may have got there.
		if d.thaws && !again {
			r = settle(t, s, d.name, id, Thaw)
			want(t, "thawed", r.Thawed, true)
		}
	case again && before != string(body):
		t.Errorf("%s of %s sent again with other bytes:\n%s\n%s", id, d.name, before, body)
	default:
		if !again {
			d.left[id] = string(body)
			if err := d.remote.take(body); err != nil {
				t.Errorf("%s of %s: %v:\n%s", id, d.name, err, body)
			}
		}
		if answered {
			r = settle(t, s, d.name, id, Delivered)
		}
	}
	return r
}

func TestThawingChangesNothingForTheReceiver(t *testing.T) {
	const seeds = 40
	path := newPath(t)
	s := open(t, Options{Path: path})
	merged, thawed := 0, 0
	chains := map[string]int{}
	for seed := range uint64(seeds) {
		// A clock that stands still, or items would expire at different times.
		r := &run{t: t, rng: rand.New(rand.NewPCG(seed, 2)), now: 1000}
		direct := newRemote(r.rng)
		var dests []*sender
		for i := range 2 {
			name := matrix.ServerName(fmt.Sprintf("t%d.d%d.test", seed, i))
			// So that a transaction holds all that waits, or some.
			size := []int{2000, 100_000}[seed%2]
			dests = append(dests, &sender{name: name, thaws: i == 1, maxBytes: size, remote: newRemote(r.rng), left: map[string]string{}})
		}
		clear(chains)
		for step := range 30 {
			r.now += int64(r.pick(50))
			if r.pick(2) == 0 {
				p, e := r.news(chains)
				for i := range p {
					if err := direct.take([]byte(fmt.Sprintf(`{"pdus":[%s]}`, p[i]))); err != nil {
						t.Fatal(err)
					}
				}
				for i := range e {
					if err := direct.take([]byte(fmt.Sprintf(`{"origin_server_ts":%d,"edus":[%s]}`, r.now, e[i]))); err != nil {
						t.Fatal(err)
					}
				}
				var ops []OutboxOp
				for _, d := range dests {
					ops = append(ops, &Accept{Destination: d.name, TxnID: fmt.Sprint(step), Accepted: r.now, Items: items(t, p, e)})
				}
				do(t, s, ops...)
				continue
			}
			fate := r.pick(6)
			for _, d := range dests {
				if d.tried.ID == "" {
					d.begin(t, s, fmt.Sprint("b", step), r.now)
					continue
				}
				res := d.end(t, s, fate > 3, fate > 4)
				if res.Thawed {
					thawed++
				}
				merged += res.Merged
			}
		}
		for _, d := range dests {
			d.end(t, s, true, true)
			for i := 0; ; i++ {
				if d.begin(t, s, fmt.Sprint("last", i), r.now); d.tried.ID == "" {
					break
				}
				d.end(t, s, true, true)
			}
			want(t, fmt.Sprintf("seed %d: what %s knows", seed, d.name), d.remote.knows(), direct.knows())
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	audit(t, path)
	want(t, "items in the end", s.Stats().Outbox.Items, int64(0))
	t.Logf("%d thawed, %d items merged", thawed, merged)
	if thawed == 0 || merged == 0 {
		t.Error("nothing was thawed or merged")
	}
}

// news is what a homeserver sends next: few keys, so that much merges.
func (r *run) news(chains map[string]int) (pdus, edus []string) {
	user := func() string { return fmt.Sprintf("@u%d:hs1.test", r.pick(2)) }
	room := func() string { return fmt.Sprintf("!r%d", r.pick(2)) }
	text := func() string { r.next++; return fmt.Sprint(r.next, strings.Repeat("x", r.pick(2)*r.pick(300))) }
	for range r.pick(3) {
		pdus = append(pdus, pdu(room(), 1, text()))
	}
	for range 1 + r.pick(4) {
		switch r.pick(7) {
		case 0:
			edus = append(edus, toDevice("m", text()))
		case 1:
			edus = append(edus, typing(room(), user(), r.pick(2) == 0))
		case 2:
			edus = append(edus, presence(user(), text(), r.pick(1000)))
		case 3:
			edus = append(edus, receipt(room(), user(), "$"+text(), []string{"", "main"}[r.pick(2)]))
		case 4:
			u := user()
			chains[u]++
			edus = append(edus, deviceList(u, fmt.Sprint("D", r.pick(2)), chains[u], text(), chains[u]-1))
		case 5:
			edus = append(edus, signingKey(user(), fmt.Sprintf(`%q:{"k":%q}`, []string{"master_key", "self_signing_key"}[r.pick(2)], text())))
		case 6:
			edus = append(edus, fmt.Sprintf(`{"content":{"n":%q},"edu_type":"x"}`, text()))
		}
	}
	return pdus, edus
}

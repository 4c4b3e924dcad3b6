package matrix

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// The tests of this file let a plain outbox, made of this package's functions,
// carry random traffic to a model of a receiving server, and compare what the
// receiver then knows with what it would know had it got every original
// transaction at once.

// receiver is the part of a homeserver that takes transactions in. Nothing in it
// is shared with the package.
type receiver struct {
	shuffle   *rand.Rand // the order of EDUs in a transaction, nil for that of the transaction
	answered  map[string]bool
	bodies    [][]byte
	typing    map[string]string
	presence  map[string]string
	receipts  map[string]string
	devices   map[string]*deviceCache
	keys      map[string]string
	toDevice  []string
	others    []string
	events    map[string][]string // by room
	seenEvent map[string]bool
}

// deviceCache is what a server knows of a user's devices, as Synapse keeps it
// (handlers/device.py): until it is stale it has all lists up to the extremity.
type deviceCache struct {
	extremity string
	seen      map[string]bool
	devices   map[string]string
	stale     bool
}

func newReceiver(shuffle *rand.Rand, known map[string]string) *receiver {
	r := &receiver{
		shuffle: shuffle, answered: map[string]bool{}, typing: map[string]string{}, presence: map[string]string{}, receipts: map[string]string{},
		devices: map[string]*deviceCache{}, keys: map[string]string{}, events: map[string][]string{}, seenEvent: map[string]bool{},
	}
	for user, stream := range known {
		r.devices[user] = &deviceCache{extremity: stream, seen: map[string]bool{}, devices: map[string]string{}}
	}
	return r
}

type modelEDU struct {
	Type    string          `json:"edu_type"`
	Content json.RawMessage `json:"content"`
}

// transaction takes in what it has not taken in before.
func (r *receiver) transaction(id string, body []byte) error {
	if r.answered[id] {
		return nil
	}
	r.answered[id] = true
	r.bodies = append(r.bodies, body)
	var txn struct {
		TS   int64             `json:"origin_server_ts"`
		PDUs []json.RawMessage `json:"pdus"`
		EDUs []modelEDU        `json:"edus"`
	}
	plain, err := canonicalText(json.RawMessage(body)) // of equal names the last counts
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(plain), &txn); err != nil {
		return err
	}
	if txn.PDUs == nil || len(txn.PDUs) > 50 || len(txn.EDUs) > 100 {
		return fmt.Errorf("%d PDUs, %d EDUs", len(txn.PDUs), len(txn.EDUs))
	}
	for _, p := range txn.PDUs {
		p := string(p)
		var event struct {
			Room string `json:"room_id"`
		}
		if err := json.Unmarshal([]byte(p), &event); err != nil {
			return err
		}
		if !r.seenEvent[p] {
			r.seenEvent[p] = true
			r.events[event.Room] = append(r.events[event.Room], p)
		}
	}
	for _, e := range r.order(txn.EDUs) {
		if err := r.edu(e, txn.TS); err != nil {
			return fmt.Errorf("%s %s: %w", e.Type, e.Content, err)
		}
	}
	return nil
}

// order returns the EDUs in an order in which a server with several workers may
// come to handle them. Those for which it keeps queues stay in order.
func (r *receiver) order(edus []modelEDU) []modelEDU {
	if r.shuffle == nil {
		return edus
	}
	lists := make(map[string][]modelEDU)
	var names []string
	for i, e := range edus {
		name := fmt.Sprint(i)
		switch e.Type {
		case "m.direct_to_device", "m.device_list_update", "org.example.unknown":
			name = e.Type
		}
		if lists[name] == nil {
			names = append(names, name)
		}
		lists[name] = append(lists[name], e)
	}
	var out []modelEDU
	for len(names) > 0 {
		i := r.shuffle.IntN(len(names))
		list := lists[names[i]]
		out = append(out, list[0])
		if lists[names[i]] = list[1:]; len(list) == 1 {
			names = slices.Delete(names, i, i+1)
		}
	}
	return out
}

func canonicalText(v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	var x any
	if err := json.Unmarshal(b, &x); err != nil {
		return "", err
	}
	b, err = json.Marshal(x) // maps come out sorted
	return string(b), err
}

func (r *receiver) edu(e modelEDU, ts int64) error {
	switch e.Type {
	case "m.typing":
		var c struct {
			Room   string `json:"room_id"`
			User   string `json:"user_id"`
			Typing bool
		}
		if err := json.Unmarshal(e.Content, &c); err != nil {
			return err
		}
		r.typing["typing "+c.Room+" "+c.User] = fmt.Sprint(c.Typing)
	case "m.presence":
		var c struct{ Push []map[string]any }
		if err := json.Unmarshal(e.Content, &c); err != nil {
			return err
		}
		if len(c.Push) == 0 || len(c.Push) > 50 {
			return fmt.Errorf("%d presences", len(c.Push))
		}
		for _, p := range c.Push {
			if ago, ok := p["last_active_ago"].(float64); ok {
				p["last_active_ago"] = fmt.Sprintf("at %d", ts-int64(ago))
			}
			text, err := canonicalText(p)
			if err != nil {
				return err
			}
			r.presence["presence "+p["user_id"].(string)] = text
		}
	case "m.receipt":
		var c map[string]map[string]map[string]struct {
			Data     map[string]any
			EventIDs []string `json:"event_ids"`
		}
		if err := json.Unmarshal(e.Content, &c); err != nil {
			return err
		}
		for room, types := range c {
			for kind, users := range types {
				for user, receipt := range users {
					text, err := canonicalText(receipt)
					if err != nil {
						return err
					}
					key := "receipt " + room + " " + kind + " " + user
					if thread, ok := receipt.Data["thread_id"].(string); ok {
						key += " " + thread
					}
					r.receipts[key] = text
				}
			}
		}
	case "m.device_list_update":
		var c struct {
			User    string `json:"user_id"`
			Device  string `json:"device_id"`
			Stream  any    `json:"stream_id"`
			Prev    []any  `json:"prev_id"`
			Deleted bool
		}
		if err := json.Unmarshal(e.Content, &c); err != nil {
			return err
		}
		var content map[string]any
		if err := json.Unmarshal(e.Content, &content); err != nil {
			return err
		}
		delete(content, "stream_id")
		delete(content, "prev_id")
		text, err := canonicalText(content)
		if err != nil {
			return err
		}
		d := r.devices[c.User]
		for _, p := range c.Prev {
			if id := fmt.Sprint(p); id != d.extremity && !d.seen[id] {
				d.stale = true
			}
		}
		if len(c.Prev) == 0 {
			d.stale = true
		}
		if d.stale {
			return nil
		}
		d.devices[c.Device] = text
		if c.Deleted {
			delete(d.devices, c.Device)
		}
		d.extremity = fmt.Sprint(c.Stream)
		d.seen[d.extremity] = true
	case "m.signing_key_update", "org.matrix.signing_key_update":
		var c map[string]any
		if err := json.Unmarshal(e.Content, &c); err != nil {
			return err
		}
		for _, field := range []string{"master_key", "self_signing_key"} {
			if c[field] == nil {
				continue
			}
			text, err := canonicalText(c[field])
			if err != nil {
				return err
			}
			// Both names set the same keys; they are told apart to see that both come.
			r.keys[e.Type+" "+c["user_id"].(string)+" "+field] = text
			r.keys["keys "+c["user_id"].(string)+" "+field] = text
		}
	case "m.direct_to_device":
		r.toDevice = append(r.toDevice, string(e.Content))
	case "org.example.unknown":
		r.others = append(r.others, string(e.Content))
	default:
		return fmt.Errorf("an EDU that nobody sent")
	}
	return nil
}

// knows lists all that the receiver knows, but of the keys in without.
func (r *receiver) knows(without map[string]bool) string {
	var lines []string
	for _, m := range []map[string]string{r.typing, r.presence, r.receipts, r.keys} {
		for k, v := range m {
			if !without[k] {
				lines = append(lines, k+" = "+v)
			}
		}
	}
	for user, d := range r.devices {
		line := "devices of " + user + " are stale"
		if !d.stale {
			line = fmt.Sprintf("devices of %s up to %s = %v", user, d.extremity, d.devices)
		}
		lines = append(lines, line)
	}
	for room, events := range r.events {
		lines = append(lines, "events of "+room+" = "+strings.Join(events, " "))
	}
	slices.Sort(lines)
	return strings.Join(append(lines, "to-device "+strings.Join(r.toDevice, " "), "others "+strings.Join(r.others, " ")), "\n")
}

// outbox queues for one destination, as the bus does, but in memory.
type outbox struct {
	lanes    [NumLanes + 1][]queued
	maxBytes int
	sending  []byte // the transaction that was tried, until its outcome is known
	sendingN int    // its number, which is its id
	frozen   []queued
	dropped  map[string]bool // the receiver's names for what expired
}

type queued struct {
	Item
	accepted int64
}

func (o *outbox) accept(items []Item, now int64) error {
	for _, it := range items {
		q := queued{it, now}
		lane := &o.lanes[it.Kind.Lane()]
		same := func(old queued) bool { return it.Key != "" && old.Kind == it.Kind && old.Key == it.Key }
		i := slices.IndexFunc(*lane, same)
		switch it.Kind.Merge() {
		case MergeNever:
			if it.Key != "" {
				return fmt.Errorf("%v with the key %q", it.Kind, it.Key)
			}
		case MergeKeep:
			if i >= 0 || slices.ContainsFunc(o.frozen, same) {
				continue
			}
		case MergeReplace:
			if i >= 0 {
				*lane = slices.Delete(*lane, i, i+1)
			}
		case MergeFields:
			if i >= 0 {
				var err error
				if q.Payload, err = MergeSigningKeys((*lane)[i].Payload, it.Payload); err != nil {
					return err
				}
				*lane = slices.Delete(*lane, i, i+1)
			}
		case MergeChain:
			if i >= 0 {
				old, linked := (*lane)[i].Payload, false
				later := append(slices.Clone((*lane)[i+1:]), q)
				for j, l := range later {
					if l.Kind != KindDeviceList || l.Group != it.Group {
						continue
					}
					relinked, refers, err := RelinkDeviceList(old, l.Payload)
					if err != nil {
						return err
					}
					if refers {
						linked = true
						later[j].Payload = relinked
					}
				}
				if linked {
					*lane = append((*lane)[:i], later...)
					continue
				}
			}
		}
		*lane = append(*lane, q)
	}
	return nil
}

// attempt returns the transaction to send, the same until it is through.
func (o *outbox) attempt(now int64) ([]byte, error) {
	if o.sending != nil {
		return o.sending, nil
	}
	b := NewBuilder("hs", o.maxBytes)
	for lane := range o.lanes {
		var err error
		o.lanes[lane] = slices.DeleteFunc(o.lanes[lane], func(q queued) bool {
			if err != nil {
				return false
			}
			late := now-q.accepted > usefulFor(q)
			if q.Expired(q.accepted, now) != late {
				err = fmt.Errorf("%v after %d ms: expired %t", q.Kind, now-q.accepted, !late)
				return false
			}
			if late {
				o.dropped[modelKey(q)] = true
				return true
			}
			ok, addErr := b.Add(q.Kind, q.Payload, now-q.accepted)
			if err = addErr; ok {
				o.frozen = append(o.frozen, q)
			}
			return ok
		})
		if err != nil {
			return nil, err
		}
	}
	if b.Empty() {
		return nil, nil
	}
	o.sendingN++
	o.sending = b.Finish(now)
	// Only the first of each lane may go beyond the bound; none is of 500 bytes.
	if len(o.sending) > o.maxBytes+NumLanes*500 {
		return nil, fmt.Errorf("%d items in %d bytes, at most %d", len(o.frozen), len(o.sending), o.maxBytes)
	}
	return o.sending, nil
}

func (o *outbox) done() { o.sending, o.frozen = nil, nil }

func (o *outbox) empty() bool {
	for _, lane := range o.lanes {
		if len(lane) > 0 {
			return false
		}
	}
	return o.sending == nil
}

// usefulFor is for how many milliseconds an item is worth sending.
func usefulFor(q queued) int64 {
	switch {
	case q.Kind == KindTyping && bytes.Contains(q.Payload, []byte("true")):
		return 30_000
	case q.Kind == KindTyping:
		return 60_000
	case q.Kind == KindPresence:
		return 30 * 60_000
	case q.Kind == KindReceipt:
		return 7 * 24 * 3600_000
	}
	return 1 << 60
}

// modelKey is the receiver's name for what an item is about.
func modelKey(q queued) string {
	return q.Kind.String() + " " + strings.ReplaceAll(q.Key, `"`, " ")
}

// homeserver makes random traffic as Synapse would.
type homeserver struct {
	rng    *rand.Rand
	odd    bool // sends device lists only, and these refer to any of the last ones
	stream int
	last   map[string]int    // of each user: the stream id sent last
	sent   map[string][]int  // all of them
	truth  map[string]string // user and device: what is the case
	gaps   map[string]bool   // users whose receivers must notice that they missed something
	events []any
	n      int
}

func newHomeserver(rng *rand.Rand) *homeserver {
	h := &homeserver{rng: rng, stream: 100, last: map[string]int{}, sent: map[string][]int{}, truth: map[string]string{}, gaps: map[string]bool{}}
	for i := range 3 {
		user := fmt.Sprintf("@u%d:hs", i)
		h.last[user] = i + 1
		h.sent[user] = []int{i + 1}
	}
	return h
}

// known is what a receiver that missed nothing knows at the start.
func (h *homeserver) known() map[string]string {
	known := make(map[string]string)
	for user, id := range h.last {
		known[user] = fmt.Sprint(id)
	}
	return known
}

func (h *homeserver) user() string { return fmt.Sprintf("@u%d:hs", h.rng.IntN(3)) }
func (h *homeserver) room() string { return fmt.Sprintf("!r%d:hs", h.rng.IntN(3)) }

type object = map[string]any

// transaction returns the next transaction, at times spelt as no Synapse would.
func (h *homeserver) transaction(now int64) []byte {
	var pdus, edus []any
	for range h.rng.IntN(4) {
		if len(h.events) == 0 || h.rng.IntN(4) > 0 {
			h.n++
			h.events = append(h.events, object{"room_id": h.room(), "depth": h.n, "content": object{"body": fmt.Sprintf("\"%d\"", h.n)}})
			pdus = append(pdus, h.events[len(h.events)-1])
			continue
		}
		recent := h.events[max(0, len(h.events)-5):] // one that was sent before
		pdus = append(pdus, recent[h.rng.IntN(len(recent))])
	}
	bursts := 1
	if h.rng.IntN(20) == 0 {
		bursts = 40
	}
	for range h.rng.IntN(5) {
		edus = append(edus, h.edus(bursts)...)
	}
	edus = edus[:min(len(edus), MaxEDUs)]
	if len(edus) == MaxEDUs && edus[MaxEDUs-1].(object)["edu_type"] == "m.signing_key_update" {
		edus = edus[:MaxEDUs-1] // the two names come together
	}
	var b bytes.Buffer
	write := func(list []any) {
		for i, v := range list {
			if i > 0 {
				b.WriteByte(',')
			}
			if h.rng.IntN(4) == 0 {
				scramble(h.rng, &b, v)
				continue
			}
			text, err := json.Marshal(v)
			if err != nil {
				panic(err)
			}
			b.Write(text)
		}
	}
	fmt.Fprintf(&b, `{"origin":"hs","origin_server_ts":%d,"pdus":[`, now)
	write(pdus)
	b.WriteString(`],"edus":[`)
	write(edus)
	b.WriteString("]}")
	return b.Bytes()
}

// edus returns one EDU, or more where Synapse sends more or a burst is due.
func (h *homeserver) edus(burst int) []any {
	edu := func(eduType string, content object) any { return object{"edu_type": eduType, "content": content} }
	if h.odd {
		return []any{edu("m.device_list_update", h.deviceList())}
	}
	h.n++
	switch h.rng.IntN(7) {
	case 0:
		return []any{edu("m.typing", object{"room_id": h.room(), "user_id": h.user(), "typing": h.rng.IntN(2) == 0})}
	case 1:
		var push []any
		for range 1 + h.rng.IntN(3) {
			state := object{"user_id": fmt.Sprintf("@u%d:hs", h.rng.IntN(3*burst)), "presence": []string{"online", "offline", "unavailable"}[h.rng.IntN(3)]}
			if h.rng.IntN(4) > 0 {
				state["last_active_ago"] = h.rng.IntN(100_000)
			}
			if h.rng.IntN(3) == 0 {
				state["status_msg"] = fmt.Sprint(h.n)
			}
			push = append(push, state)
		}
		return []any{edu("m.presence", object{"push": push})}
	case 2:
		rooms := object{}
		for range 1 + h.rng.IntN(3) {
			h.n++
			data := object{"ts": h.n}
			if h.rng.IntN(2) == 0 {
				data["thread_id"] = []string{"main", "$t1", "$t2"}[h.rng.IntN(3)]
			}
			kind := []string{"m.read", "org.example.read"}[h.rng.IntN(2)]
			rooms[h.room()] = object{kind: object{h.user(): object{"event_ids": []string{fmt.Sprintf("$%d", h.n)}, "data": data}}}
		}
		return []any{edu("m.receipt", rooms)}
	case 3:
		return []any{edu("m.device_list_update", h.deviceList())}
	case 4:
		keys := object{"user_id": h.user()}
		for _, field := range []string{"master_key", "self_signing_key"} {
			switch h.rng.IntN(5) {
			case 0:
				keys[field] = nil
			case 1, 2:
				keys[field] = object{"keys": object{"ed25519:x": fmt.Sprint(h.n)}}
			}
		}
		return []any{edu("m.signing_key_update", keys), edu("org.matrix.signing_key_update", keys)}
	case 5:
		var all []any
		for range burst {
			h.n++
			all = append(all, edu("m.direct_to_device", object{"message_id": fmt.Sprint(h.n), "sender": h.user(), "type": "m.x"}))
		}
		return all
	default:
		var all []any
		for range burst {
			h.n++
			all = append(all, edu("org.example.unknown", object{"n": h.n, "user_id": h.user()}))
		}
		return all
	}
}

func (h *homeserver) deviceList() object {
	user, device := h.user(), fmt.Sprintf("D%d", h.rng.IntN(2))
	h.stream++
	id := func(n int) any {
		if h.rng.IntN(3) == 0 {
			return fmt.Sprint(n)
		}
		return n
	}
	prev := []any{id(h.last[user])}
	if h.odd {
		prev = nil
		recent := h.sent[user][max(0, len(h.sent[user])-3):]
		for range 1 + h.rng.IntN(2) {
			prev = append(prev, id(recent[h.rng.IntN(len(recent))]))
		}
	}
	content := object{"user_id": user, "device_id": device, "stream_id": id(h.stream), "prev_id": prev}
	switch h.rng.IntN(40) {
	case 0: // the receiver was not told of an earlier one
		content["prev_id"] = append(prev, id(1_000_000+h.stream))
		h.gaps[user] = true
	case 1:
		content["prev_id"] = []any{}
		h.gaps[user] = true
	case 2:
		delete(content, "prev_id")
		h.gaps[user] = true
	}
	if h.rng.IntN(4) == 0 {
		content["deleted"] = true
		delete(h.truth, user+" "+device)
	} else {
		content["keys"] = object{"n": h.stream}
		h.truth[user+" "+device] = fmt.Sprint(h.stream)
	}
	h.last[user] = h.stream
	h.sent[user] = append(h.sent[user], h.stream)
	return content
}

// run lets a homeserver send for a while to a destination that is reached at
// times, and everything that is left arrive in the end.
func run(seed uint64, odd bool, step time.Duration) (direct, merged *receiver, o *outbox, h *homeserver, err error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	h = newHomeserver(rng)
	h.odd = odd
	direct = newReceiver(nil, h.known())
	merged = newReceiver(rng, h.known())
	o = &outbox{maxBytes: []int{0, 600, 3000, 4 << 20}[rng.IntN(4)], dropped: map[string]bool{}}
	now := int64(1795228940000)
	fail := func(err error) (*receiver, *receiver, *outbox, *homeserver, error) { return nil, nil, nil, nil, err }
	send := func(outcome int) error {
		body, err := o.attempt(now)
		if err != nil || body == nil {
			return err
		}
		if outcome > 0 { // it arrives
			if err := merged.transaction(fmt.Sprint(o.sendingN), body); err != nil {
				return fmt.Errorf("%s: %w", body, err)
			}
		}
		if outcome > 1 { // and so does the answer
			o.done()
		}
		return nil
	}
	steps := 50
	if odd {
		steps = 10 // after many, every receiver has had to ask
	}
	for i := range steps {
		now += rng.Int64N(step.Milliseconds())
		if rng.IntN(2) == 0 {
			body := h.transaction(now)
			if err := direct.transaction(fmt.Sprint(i), body); err != nil {
				return fail(fmt.Errorf("%s: %w", body, err))
			}
			txn, err := ParseTransaction(body)
			if err != nil {
				return fail(fmt.Errorf("%s: %w", body, err))
			}
			items := txn.Items(nil)
			for _, it := range items {
				if !json.Valid(it.Payload) {
					return fail(fmt.Errorf("%v %s", it.Kind, it.Payload))
				}
			}
			if err := o.accept(items, now); err != nil {
				return fail(err)
			}
		} else if err := send(rng.IntN(3)); err != nil {
			return fail(err)
		}
	}
	for n := 0; !o.empty(); n++ {
		if n == 2000 {
			return fail(fmt.Errorf("after %d transactions there are still items", n))
		}
		if err := send(2); err != nil {
			return fail(err)
		}
	}
	return direct, merged, o, h, nil
}

// Through the outbox the receiver comes to know exactly what it would have come
// to know without.
func TestOutboxLosesNothing(t *testing.T) {
	fewer := 0
	for seed := range uint64(250) {
		direct, merged, o, _, err := run(seed, false, 200*time.Millisecond)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if len(o.dropped) > 0 {
			t.Errorf("seed %d: expired %v", seed, o.dropped)
		}
		if got, want := merged.knows(nil), direct.knows(nil); got != want {
			t.Fatalf("seed %d:\n%s", seed, difference(got, want))
		}
		if len(merged.bodies) < len(direct.bodies) {
			fewer++
		}
	}
	if fewer < 100 {
		t.Errorf("only %d of the seeds took fewer transactions", fewer)
	}
}

// With waits of minutes to hours, what is too old is left out, and only that.
func TestOutboxExpires(t *testing.T) {
	dropped := make(map[string]int)
	for seed := range uint64(100) {
		direct, merged, o, _, err := run(seed, false, []time.Duration{2 * time.Minute, time.Hour, 100 * time.Hour}[seed%3])
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for name := range o.dropped {
			dropped[strings.Fields(name)[0]]++
		}
		if got, want := merged.knows(o.dropped), direct.knows(o.dropped); got != want {
			t.Fatalf("seed %d:\n%s", seed, difference(got, want))
		}
	}
	if kinds := slices.Sorted(maps.Keys(dropped)); !slices.Equal(kinds, []string{"presence", "receipt", "typing"}) {
		t.Errorf("expired: %v", dropped)
	}
}

// However device lists refer to one another: a receiver that missed something
// notices, and one that noticed nothing has every device as it is.
func TestOutboxDeviceListsOfAnyForm(t *testing.T) {
	fresh := 0
	for seed := range uint64(600) {
		_, merged, _, h, err := run(seed, true, 200*time.Millisecond)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for user, d := range merged.devices {
			if d.stale {
				continue
			}
			if h.gaps[user] {
				t.Errorf("seed %d: %s missed something and does not know", seed, user)
			}
			fresh++
			for _, device := range []string{"D0", "D1"} {
				want := ""
				if n := h.truth[user+" "+device]; n != "" {
					want = fmt.Sprintf(`{"device_id":"%s","keys":{"n":%s},"user_id":"%s"}`, device, n, user)
				}
				if got := d.devices[device]; got != want {
					t.Errorf("seed %d: %s %s is %s, not %s", seed, user, device, got, want)
				}
			}
		}
	}
	if fresh < 300 {
		t.Errorf("only %d users whose devices were known to the end", fresh)
	}
}

// The same traffic makes the same transactions.
func TestOutboxIsDeterministic(t *testing.T) {
	for seed := range uint64(20) {
		_, a, _, _, errA := run(seed, false, time.Second)
		_, b, _, _, errB := run(seed, false, time.Second)
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if !slices.EqualFunc(a.bodies, b.bodies, bytes.Equal) {
			t.Errorf("seed %d: two runs differ", seed)
		}
	}
}

// difference lists the lines that only one of two texts has.
func difference(got, want string) string {
	var b strings.Builder
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for _, line := range g {
		if !slices.Contains(w, line) {
			fmt.Fprintf(&b, "got  %s\n", line)
		}
	}
	for _, line := range w {
		if !slices.Contains(g, line) {
			fmt.Fprintf(&b, "want %s\n", line)
		}
	}
	return b.String()
}

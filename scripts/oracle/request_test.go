package oracle

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"fsbus/bus/matrix"
)

// request is one as it arrives at destination.
type request struct {
	method, target string
	headers        []string // Authorization
	body           string
}

// ourVerdict returns the origin of a request, or "-", as the bus finds it out with
// package matrix: of all headers of the scheme, one origin, for us, and each
// signature with a known key right (bus/node).
func ourVerdict(key matrix.SigningKey, r request) string {
	var body []byte
	if r.method == "PUT" || r.method == "POST" {
		body = []byte(r.body)
	}
	found, verified := "", false
	for _, h := range r.headers {
		x, err := matrix.ParseXMatrix(h)
		if errors.Is(err, matrix.ErrNotXMatrix) {
			continue
		}
		if x.Destination == "" {
			x.Destination = destination
		}
		if err != nil || found != "" && x.Origin != found || x.Destination != destination {
			return "-"
		}
		found = x.Origin
		if x.Key != key.ID() {
			continue
		}
		if matrix.VerifyRequest(key.Public(), x, r.method, r.target, body) != nil {
			return "-"
		}
		verified = true
	}
	if !verified {
		return "-"
	}
	return found
}

func gmlVerdict(t *testing.T, key matrix.SigningKey, r request) string {
	t.Helper()
	text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n", r.method, r.target, len(r.body))
	for _, h := range r.headers {
		text += "Authorization: " + h + "\r\n"
	}
	inbound, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text + "\r\n" + r.body)))
	if err != nil {
		return "-"
	}
	isLocal := func(name spec.ServerName) bool { return name == destination }
	q, answer := fclient.VerifyHTTPRequest(inbound, time.Unix(0, 0), destination, isLocal, verifier{key})
	if answer.Code != 200 {
		return "-"
	}
	return string(q.Origin())
}

func synapseVerdict(t *testing.T, s *python, key matrix.SigningKey, r request) (origin, why string) {
	t.Helper()
	headers := make([][]byte, len(r.headers))
	for i, h := range r.headers {
		headers[i] = []byte(h)
	}
	a := s.ask(t, "request", map[string]any{
		"method": r.method, "target": []byte(r.target), "headers": headers, "body": []byte(r.body),
		"server": destination, "keys": map[string][]byte{key.ID(): key.Public()},
	})
	if a.Error != "" {
		return "-", a.Error
	}
	return a.Origin, ""
}

// header signs a request by hand: content is what is signed of the body, "" for none.
func header(private ed25519.PrivateKey, keyID, from, to, method, target, content string) string {
	b := []byte("{")
	if content != "" {
		b = append(append(append(b, `"content":`...), content...), ',')
	}
	b = matrix.AppendString(append(b, `"destination":`...), to)
	b = matrix.AppendString(append(b, `,"method":`...), method)
	b = matrix.AppendString(append(b, `,"origin":`...), from)
	b = matrix.AppendString(append(b, `,"uri":`...), target)
	sig := base64.RawStdEncoding.EncodeToString(ed25519.Sign(private, append(b, '}')))
	return fmt.Sprintf(`X-Matrix origin="%s",key="%s",sig="%s",destination="%s"`, from, keyID, sig, to)
}

func nested(depth int) string {
	return strings.Repeat(`{"a":`, depth) + `1` + strings.Repeat(`}`, depth)
}

// sent is a request in which content is signed and another body sent, perhaps.
type sent struct{ class, method, target, signed, body, verdicts string }

// requests are classes of bodies and targets. verdicts are those of ours,
// gomatrixserverlib and Synapse: "+" takes the request, "-" refuses it. Where ours
// is not as Synapse, why:
//
//   - numbers: canonical JSON does not have them, so there is no right spelling. Ours
//     signs them as they stand (RawNumbers), Synapse as Python writes what it read.
//     Ours is laxer and stricter at once, and bus/node calls no such request forged.
//   - depth: ours is stricter, at MaxJSONDepth, than Python from 3.12 on.
//   - content: what is in a body, ours leaves to whoever reads it.
//   - target: ours takes any text for what it is, Synapse only ASCII, which is all that
//     a Synapse sends.
//
// Where ours is not as gomatrixserverlib, it is as Synapse, but for the same.
var requests = []sent{
	{"alike", "PUT", "/x", `{"a":1,"b":2}`, `{"a":1,"b":2}`, "+++"},
	{"alike: space and order", "PUT", "/x", `{"a":1,"b":2}`, " {\t\"b\" : 2,\r\n\"a\":1} ", "+++"},
	{"alike: escapes", "PUT", "/x", `{"é":"/é😀"}`, `{"\u00e9":"\/\u00E9\ud83d\ude00"}`, "+++"},
	{"alike: escapes that stay", "PUT", "/x", `{"a":"\u001f\n"}`, `{"a":"\u001F\u000a"}`, "+++"},
	{"alike: what some escape", "PUT", "/x", "{\"a\":\"<>&\u2028\x7f\"}", `{"a":"\u003c>\u0026\u2028\u007f"}`, "+++"},
	{"alike: order of code points", "PUT", "/x", "{\"\uffee\":1,\"\U0001f600\":2}", "{\"\U0001f600\":2,\"\uffee\":1}", "+++"},
	{"alike: order of UTF-16", "PUT", "/x", "{\"\U0001f600\":2,\"\uffee\":1}", "{\"\U0001f600\":2,\"\uffee\":1}", "---"},
	{"alike: members that signing drops", "PUT", "/x", `{"signatures":1,"unsigned":2}`, `{"signatures":1,"unsigned":2}`, "+++"},
	{"alike: large integer", "PUT", "/x", `{"a":123456789012345678901234567890}`, `{"a":123456789012345678901234567890}`, "+++"},
	{"alike: fraction", "PUT", "/x", `{"a":1.0}`, `{"a":1.0}`, "+++"},
	{"alike: fraction signed as an integer", "PUT", "/x", `{"a":1}`, `{"a":1.0}`, "---"},
	{"alike: deepest", "PUT", "/x", nested(1000), nested(1000), "+++"},
	{"alike: deeper than any", "PUT", "/x", nested(200000), nested(200000), "---"},
	{"alike: lone surrogate", "PUT", "/x", `{"a":"\ud800"}`, `{"a":"\ud800"}`, "---"},
	{"alike: lone surrogate signed as U+FFFD", "PUT", "/x", "{\"a\":\"\ufffd\"}", `{"a":"\ud800"}`, "---"},
	{"alike: surrogates in the wrong order", "PUT", "/x", `{"a":"\udc00\ud800"}`, `{"a":"\udc00\ud800"}`, "---"},
	{"alike: not UTF-8", "PUT", "/x", "{\"a\":\"\xff\"}", "{\"a\":\"\xff\"}", "---"},
	{"alike: not UTF-8 signed as U+FFFD", "PUT", "/x", "{\"a\":\"\ufffd\"}", "{\"a\":\"\xff\"}", "---"},
	{"alike: control character", "PUT", "/x", `{"a":"\t"}`, "{\"a\":\"\t\"}", "---"},
	{"alike: NaN", "PUT", "/x", `{"a":NaN}`, `{"a":NaN}`, "---"},
	{"alike: leading zero", "PUT", "/x", `{"a":1}`, `{"a":01}`, "---"},
	{"alike: byte order mark", "PUT", "/x", `{}`, "\ufeff{}", "---"},
	{"alike: more after it", "PUT", "/x", `{}`, `{}{}`, "---"},
	{"alike: comma at the end", "PUT", "/x", `{"a":[1]}`, `{"a":[1,]}`, "---"},
	{"alike: NUL at the end", "PUT", "/x", `{}`, "{}\x00", "---"},
	{"alike: other white space", "PUT", "/x", `{"a":1}`, "{\"a\":\v1}", "---"},
	{"alike: empty object", "PUT", "/x", `{}`, `{}`, "+++"},
	{"alike: empty object signed as none", "PUT", "/x", ``, `{}`, "---"},
	{"alike: none signed as an empty object", "PUT", "/x", `{}`, ``, "---"},
	{"alike: null signed as none", "PUT", "/x", ``, `null`, "---"},
	{"alike: only space", "PUT", "/x", ``, ` `, "---"},
	{"alike: GET", "GET", "/x", ``, ``, "+++"},
	{"alike: POST", "POST", "/x", `{"a":1}`, `{"a":1}`, "+++"},
	{"alike: POST of what is not signed", "POST", "/x", ``, `{"a":1}`, "---"},

	{"the last of two members", "PUT", "/x", `{"a":2}`, `{"a":1,"a":2}`, "+-+"},
	{"the first of two members", "PUT", "/x", `{"a":1}`, `{"a":1,"a":2}`, "---"},
	{"both of two members", "PUT", "/x", `{"a":1,"a":2}`, `{"a":1,"a":2}`, "-+-"},
	{"the last of two members, in another spelling", "PUT", "/x", `{"a":2}`, `{"\u0061":1,"a":2}`, "+-+"},
	{"quote in a name", "PUT", "/x", `{"\"":1}`, `{"\"":1}`, "+-+"},
	{"backslash in a name", "PUT", "/x", `{"\\":1}`, `{"\\":1}`, "+-+"},
	{"control character in a name", "PUT", "/x", `{"\n":1}`, `{"\n":1}`, "+-+"},
	{"body of a GET, not signed", "GET", "/x", ``, `{"a":1}`, "+-+"},
	{"body of a GET, signed", "GET", "/x", `{"a":1}`, `{"a":1}`, "-+-"},
	{"body of a DELETE, not signed", "DELETE", "/x", ``, `{"a":1}`, "+-+"},
	{"body of a DELETE, signed", "DELETE", "/x", `{"a":1}`, `{"a":1}`, "-+-"},

	{"numbers: fraction with a zero", "PUT", "/x", `{"a":1.50}`, `{"a":1.50}`, "++-"},
	{"numbers: fraction with a zero, as Python", "PUT", "/x", `{"a":1.5}`, `{"a":1.50}`, "--+"},
	{"numbers: exponent", "PUT", "/x", `{"a":1e2}`, `{"a":1e2}`, "++-"},
	{"numbers: exponent, as Python", "PUT", "/x", `{"a":100.0}`, `{"a":1e2}`, "--+"},
	{"numbers: exponent, as an integer", "PUT", "/x", `{"a":100}`, `{"a":1e2}`, "---"},
	{"numbers: minus zero", "PUT", "/x", `{"a":-0}`, `{"a":-0}`, "+--"},
	{"numbers: minus zero, as Python", "PUT", "/x", `{"a":0}`, `{"a":-0}`, "-++"},
	{"numbers: infinite to Python", "PUT", "/x", `{"a":1e400}`, `{"a":1e400}`, "++-"},
	{"numbers: as many digits as Python reads", "PUT", "/x", `{"a":` + strings.Repeat("9", 4300) + `}`, `{"a":` + strings.Repeat("9", 4300) + `}`, "+++"},
	{"numbers: more", "PUT", "/x", `{"a":` + strings.Repeat("9", 4301) + `}`, `{"a":` + strings.Repeat("9", 4301) + `}`, "++-"},

	{"depth", "PUT", "/x", nested(1001), nested(1001), "-++"},
	{"depth: deeper than encoding/json", "PUT", "/x", nested(10001), nested(10001), "--+"},

	{"content: none", "PUT", "/x", ``, ``, "++-"},
	{"content: array", "PUT", "/x", `[]`, `[]`, "++-"},
	{"content: string", "PUT", "/x", `"a"`, `"a"`, "++-"},
	{"content: null", "PUT", "/x", `null`, `null`, "++-"},

	{"alike: escapes in a target", "GET", "/_matrix/a%2fb%2F%61%C3%A9%00?x=%20+%zz", ``, ``, "+++"},
	{"alike: characters in a target", "GET", "/_matrix/!r:h/$e@x'[b];c?d;e|f{\"g\":1}?", ``, ``, "+++"},
	{"alike: odd paths", "GET", "//_matrix//a/../b/./c?", ``, ``, "+++"},
	{"alike: no path", "OPTIONS", "*", ``, ``, "+++"},
	{"fragment", "GET", "/_matrix/a#b", ``, ``, "+-+"},
	{"broken escape", "GET", "/_matrix/a%zz", ``, ``, "+-+"},
	{"escape cut off", "GET", "/_matrix/a%", ``, ``, "+-+"},
	{"character that URLs escape", "GET", "/_matrix/a|b", ``, ``, "+-+"},
	{"quote", "GET", `/_matrix/a"b`, ``, ``, "+-+"},
	{"backslash", "GET", `/_matrix/a\b`, ``, ``, "+-+"},
	{"braces", "GET", "/_matrix/a{b}", ``, ``, "+-+"},
	{"DEL", "GET", "/_matrix/a\x7f", ``, ``, "+-+"},
	{"absolute form", "GET", "http://h/_matrix/a", ``, ``, "+-+"},
	{"target: not ASCII", "GET", "/_matrix/é", ``, ``, "+--"},
	{"target: not ASCII, in the query", "GET", "/_matrix/a?é", ``, ``, "++-"},
	{"alike: not UTF-8 in a target", "GET", "/_matrix/\xff", ``, ``, "---"},
}

// check asks all three about a request.
func check(t *testing.T, key matrix.SigningKey, class, verdicts string, r request) {
	t.Helper()
	verdict := func(who, found string, want byte) {
		t.Helper()
		if want == '+' && found != origin || want == '-' && found != "-" {
			t.Errorf("%s: %.300q\n%s: %s; expected %c", class, r, who, found, want)
		}
	}
	verdict("ours", ourVerdict(key, r), verdicts[0])
	verdict("gomatrixserverlib", gmlVerdict(t, key, r), verdicts[1])
	if s := synapse(t); s != nil {
		found, why := synapseVerdict(t, s, key, r)
		verdict("Synapse ("+why+")", found, verdicts[2])
	}
}

func TestRequestClasses(t *testing.T) {
	key, private := keys(t)
	for _, c := range requests {
		h := header(private, key.ID(), origin, destination, c.method, c.target, c.signed)
		check(t, key, c.class, c.verdicts, request{c.method, c.target, []string{h}, c.body})
	}
}

// Requests with several headers, or with signatures in another spelling. Ours
// refuses more than the others where they disagree on whose request it is or which
// signature counts: it wants all headers of the scheme to be of one origin, for us,
// and all signatures right whose key it has.
func TestSignatureClasses(t *testing.T) {
	key, private := keys(t)
	signed := func(keyID, from, to, target string) string {
		return header(private, keyID, from, to, "GET", target, "")
	}
	// A signature that is not the same in the URL-safe base64.
	target, good, sig := "", "", ""
	for i := 0; !strings.Contains(sig, "+") || !strings.Contains(sig, "/"); i++ {
		target = fmt.Sprintf("/_matrix/%d", i)
		good = signed(key.ID(), origin, destination, target)
		sig = strings.SplitAfter(good, `sig="`)[1][:86]
	}
	var (
		bad       = signed(key.ID(), origin, destination, "/another")
		unknown   = signed("ed25519:unknown", origin, destination, "/another")
		rsa       = signed("rsa:1", origin, destination, "/another")
		other     = signed(key.ID(), "other.example", destination, target)
		elsewhere = signed(key.ID(), origin, "elsewhere.example", target)
		malformed = "X-Matrix origin"
		lower     = strings.Replace(other, "X-Matrix", "x-matrix", 1)
		with      = func(s string) []string { return []string{strings.Replace(good, sig, s, 1)} }
	)
	for _, c := range []struct {
		class, verdicts string
		headers         []string
	}{
		{"none", "---", nil},
		{"another scheme", "---", []string{"Bearer x"}},
		{"another scheme first", "+++", []string{"Bearer x", good}},
		{"another scheme last", "+++", []string{good, "Bearer x"}},
		{"the same twice", "+++", []string{good, good}},
		{"one right, one with a key that is not there", "+++", []string{good, unknown}},
		{"one with a key that is not there, one right", "+++", []string{unknown, good}},
		{"only with a key that is not there", "---", []string{unknown}},
		{"another algorithm first", "+++", []string{rsa, good}},
		{"another algorithm last", "+++", []string{good, rsa}},
		{"only another algorithm", "---", []string{rsa}},
		{"malformed last", "---", []string{good, malformed}},
		{"malformed first", "---", []string{malformed, good}},
		{"for another", "---", []string{elsewhere}},
		{"no destination", "+++", []string{good[:strings.Index(good, ",destination")]}},
		{"destination in another case", "---", []string{strings.Replace(good, destination, strings.ToUpper(destination), 1)}},
		{"origin in another case", "---", []string{strings.Replace(good, origin, strings.ToUpper(origin), 1)}},

		// The others have one signature for each key id, the last.
		{"right and wrong with one key", "---", []string{good, bad}},
		{"wrong and right with one key", "-++", []string{bad, good}},
		// To a Synapse it is of the last. It checks no other's signature, but its
		// request has been seen as another's by who read the first.
		{"of two origins", "--", []string{good, other}},
		{"of two origins, one in a scheme in another case", "-++", []string{good, lower}},
		// gomatrixserverlib looks at the last one's destination only.
		{"for another and for us", "-+-", []string{elsewhere, good}},
		{"for us and for another", "---", []string{good, elsewhere}},

		{"URL-safe base64", "+++", with(strings.NewReplacer("+", "-", "/", "_").Replace(sig))},
		{"padding", "+-+", with(sig + "==")},
		{"too much padding", "+-+", with(sig + "===")},
		{"other bits at the end", "+++", with(sig[:85] + string(sig[85]+1))},
		{"space in it", "---", with(sig[:40] + " " + sig[40:])},
		{"other characters in it", "---", with(sig[:40] + "!" + sig[40:])},
		{"padding in it", "---", with(sig[:44] + "=" + sig[44:])},
		{"short", "---", with(sig[:80])},
		{"long", "---", with(sig + "AAAA")},
	} {
		r := request{"GET", target, c.headers, ``}
		if len(c.verdicts) == 3 {
			check(t, key, c.class, c.verdicts, r)
			continue
		}
		if ours, gml := ourVerdict(key, r), gmlVerdict(t, key, r); ours != "-" || gml != "-" {
			t.Errorf("%s: ours %s, gomatrixserverlib %s", c.class, ours, gml)
		}
		if s := synapse(t); s != nil {
			if found, why := synapseVerdict(t, s, key, r); found != "other.example" {
				t.Errorf("%s: Synapse: %s %s", c.class, found, why)
			}
		}
	}
}

// Signed by any of the three, taken by all; and with a few bytes changed, taken by
// all or by none, but for the classes of the tables that a changed byte can make.
func TestGeneratedRequests(t *testing.T) {
	key, private := keys(t)
	s := synapse(t)
	rng := rand.New(rand.NewPCG(7, 7))
	var taken, refused int
	for i := range rounds {
		r := request{method: "GET", target: fmt.Sprintf("/_matrix/federation/v1/x/%s?q=%s", url.PathEscape("!"+text(rng, plain+escaped)+"/:"), url.QueryEscape(text(rng, plain+escaped)))}
		if rng.IntN(3) > 0 {
			r.method, r.body = "PUT", string(spell(t, rng, object(rng, 3)))
		}
		switch i % 3 {
		case 0:
			x, err := matrix.SignRequest(key, origin, destination, r.method, r.target, []byte(r.body))
			if err != nil {
				t.Fatal(err)
			}
			r.headers = []string{x.String()}
		case 1:
			q := fclient.NewFederationRequest(r.method, origin, destination, r.target)
			if r.body != "" {
				if err := q.SetContent(json.RawMessage(r.body)); err != nil {
					t.Fatal(err)
				}
			}
			if err := q.Sign(origin, gomatrixserverlib.KeyID(key.ID()), private); err != nil {
				t.Fatal(err)
			}
			h, err := q.HTTPRequest()
			if err != nil {
				t.Fatal(err)
			}
			r.headers = h.Header["Authorization"]
		case 2:
			if s == nil {
				continue
			}
			a := s.ask(t, "sign", map[string]any{
				"origin": origin, "destination": destination, "method": r.method, "target": []byte(r.target), "body": []byte(r.body),
				"version": "a_key", "seed": base64.RawStdEncoding.EncodeToString(private.Seed()),
			})
			if a.Error != "" {
				t.Fatalf("%s: %s", r.body, a.Error)
			}
			r.headers = []string{a.Header}
		}
		check(t, key, "signed", "+++", r)

		changed := r
		h := r.headers[0]
		switch at := rng.IntN(3); {
		case at == 0:
			h = mutated(rng, h)
		case at == 1 || r.body == "":
			changed.target = mutated(rng, r.target)
		default:
			changed.body = mutated(rng, r.body)
		}
		changed.headers = []string{strings.Trim(h, " \t")}
		if strings.ContainsFunc(h+changed.target, func(c rune) bool { return c < '!' && c != ' ' || c >= 0x7f }) || strings.Contains(changed.target, " ") {
			continue // what is no HTTP, or no target to Synapse
		}
		ours, reads := ourVerdict(key, changed), ourReading(changed.headers[0])
		if ours == "-" {
			refused++
		} else {
			taken++
		}
		// Each class that is left out has its row in a table.
		if strings.ContainsAny(reads.sig, "=") || oddNumbers(changed.body) {
			continue
		}
		if u, err := url.ParseRequestURI(changed.target); err == nil && u.RequestURI() == changed.target &&
			gmlReading(t, changed.headers[0]) == reads && sameCanonical(changed.body) {
			if gml := gmlVerdict(t, key, changed); gml != ours {
				t.Fatalf("%q\nours: %s, gomatrixserverlib: %s", changed, ours, gml)
			}
		}
		if s != nil && synapseReading(t, s, changed.headers[0]) == reads {
			if theirs, why := synapseVerdict(t, s, key, changed); theirs != ours {
				t.Fatalf("%q\nours: %s, Synapse: %s %s", changed, ours, theirs, why)
			}
		}
	}
	if taken < rounds/100 || refused < rounds/4 {
		t.Errorf("of the changed requests %d were taken, %d refused", taken, refused)
	}
}

// mutated changes a few bytes of what is not empty.
func mutated(rng *rand.Rand, s string) string {
	const bytes = "\",=\\ abkOx:.[]{}%01-eE/?&\xc3"
	b := []byte(s)
	for range 1 + rng.IntN(2) {
		at := rng.IntN(len(b))
		switch rng.IntN(4) {
		case 0:
			b[at] = bytes[rng.IntN(len(bytes))]
		case 1:
			b = slices.Insert(b, at, bytes[rng.IntN(len(bytes))])
		case 2:
			b = slices.Insert(b, at, ' ')
		case 3:
			b = slices.Delete(b, at, at+1)
		}
	}
	return string(b)
}

// oddNumbers reports whether a body has numbers that canonical JSON does not have or
// spells otherwise.
func oddNumbers(body string) bool {
	raw, err := matrix.AppendCanonical(nil, []byte(body), matrix.RawNumbers)
	if err != nil {
		return false
	}
	strict, err := matrix.CanonicalJSON(raw)
	return err != nil || !bytes.Equal(raw, strict)
}

// sameCanonical reports whether a body has one canonical form here and in
// gomatrixserverlib, which keeps all of several members with one name and writes
// names without their escapes.
func sameCanonical(body string) bool {
	ours, err := matrix.AppendCanonical(nil, []byte(body), matrix.RawNumbers)
	if err != nil {
		return true
	}
	theirs, err := gomatrixserverlib.CanonicalJSON([]byte(body))
	return err == nil && bytes.Equal(ours, theirs)
}

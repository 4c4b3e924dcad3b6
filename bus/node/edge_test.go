package node

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"fsbus/bus"
	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/scripts/fedload"
	"fsbus/scripts/fedsim/sim"
)

// certFiles writes cert.pem and key.pem into a folder: a certificate that signs
// itself.
func certFiles(t testing.TB, dir string, names ...string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 3, 0), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"cert.pem": {Type: "CERTIFICATE", Bytes: der},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(cert)
	return pool
}

// home is the homeserver behind an edge: it acknowledges every transaction, and
// remembers what it saw.
type home struct {
	t    *testing.T
	path string

	mu     sync.Mutex
	server *http.Server
	seen   []string // method and target of each request
	last   map[string]*http.Request
	bodies map[string]string // of the last request to a target
	answer http.HandlerFunc  // nil: its own
}

func newHome(t *testing.T, path string) *home {
	h := &home{t: t, path: path, last: map[string]*http.Request{}, bodies: map[string]string{}}
	h.up()
	t.Cleanup(h.down)
	return h
}

func (h *home) up() {
	h.t.Helper()
	ln, err := net.Listen("unix", h.path)
	if err != nil {
		h.t.Fatal(err)
	}
	server := &http.Server{Handler: h}
	h.mu.Lock()
	h.server = server
	h.mu.Unlock()
	go server.Serve(ln)
}

func (h *home) down() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server.Close()
}

func (h *home) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	h.mu.Lock()
	h.seen = append(h.seen, r.Method+" "+r.RequestURI)
	h.last[r.RequestURI] = r
	h.bodies[r.RequestURI] = string(body)
	answer := h.answer
	h.mu.Unlock()
	if answer != nil {
		answer(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	var txn struct{ PDUs []json.RawMessage }
	_ = json.Unmarshal(body, &txn) // what is none has none
	ids := make([]string, len(txn.PDUs))
	for i, pdu := range txn.PDUs {
		ids[i] = fmt.Sprintf(`"$%x":{}`, sha256.Sum256(pdu))
	}
	fmt.Fprintf(w, `{"pdus":{%s}}`, strings.Join(ids, ","))
}

// times returns how often a request came.
func (h *home) times(request string) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.seen {
		if s == request {
			n++
		}
	}
	return n
}

func (h *home) answers(f http.HandlerFunc) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answer = f
}

// edgeRig is a bus with an edge in front of a homeserver, and servers that send.
type edgeRig struct {
	*running
	world *sim.World
	home  *home
	pool  *x509.CertPool
	https *http.Client
}

// newEdgeRig sets up a bus that does not run yet. lines are more of the section.
func newEdgeRig(t *testing.T, lines string, c config) *edgeRig {
	t.Helper()
	w := unsigned(t, sim.Config{Servers: 12, RoomMembers: 12})
	c.edge = "listen = [\"unix:edge.sock\"]\nupstream = \"unix:hs.sock\"\ntls_certificate = \"cert.pem\"\ntls_private_key = \"key.pem\"\n" + lines
	r := &edgeRig{running: newRunning(t, w, c), world: w}
	r.pool = certFiles(t, r.dir, "us.test")
	r.home = newHome(t, filepath.Join(r.dir, "hs.sock"))
	r.https = r.client()
	return r
}

func startEdge(t *testing.T, lines string, c config) *edgeRig {
	t.Helper()
	r := newEdgeRig(t, lines, c)
	r.start(hooks{})
	return r
}

// client speaks HTTP/2 to the edge.
func (r *edgeRig) client() *http.Client {
	tr := &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: r.pool, ServerName: "us.test"},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(r.dir, "edge.sock"))
		},
	}
	r.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// request is one of server i to us, signed.
func (r *edgeRig) request(i int, method, target, body string) *http.Request {
	r.t.Helper()
	x, err := matrix.SignRequest(r.world.SigningKey(i), string(r.world.Names()[i]), string(us.Name), method, target, []byte(body))
	if err != nil {
		r.t.Fatal(err)
	}
	return r.withAuth(x.String(), method, target, body)
}

func (r *edgeRig) withAuth(auth, method, target, body string) *http.Request {
	r.t.Helper()
	req, err := http.NewRequest(method, "https://us.test"+target, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return req
}

// send sends a request and returns the answer's status and body.
func (r *edgeRig) send(req *http.Request) (int, string) {
	r.t.Helper()
	resp, err := r.https.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func (r *edgeRig) sends(req *http.Request, status int, body string) {
	r.t.Helper()
	if s, b := r.send(req); s != status || body != "" && b != body {
		r.t.Fatalf("%s %s: %d %s, want %d %s\n%s", req.Method, req.URL, s, b, status, body, r.log)
	}
}

// txn is a transaction of server i.
func (r *edgeRig) txn(i int, id string, pdus, edus string) *http.Request {
	r.t.Helper()
	return r.request(i, "PUT", "/_matrix/federation/v1/send/"+id, fmt.Sprintf(`{"edus":[%s],"origin":%q,"origin_server_ts":1,"pdus":[%s]}`, edus, r.world.Names()[i], pdus))
}

func pduNo(n int) string {
	return fmt.Sprintf(`{"content":{"body":"%d"},"depth":%d,"prev_events":["$before%d"],"room_id":"!r:us.test","sender":"@u:x","type":"m.room.message"}`, n, n, n)
}

const presenceOfA = `{"content":{"push":[{"presence":"online","user_id":"@a:x"}]},"edu_type":"m.presence"}`

func TestEdgeForwardsWhatIsAuthentic(t *testing.T) {
	r := startEdge(t, "", config{})
	const target = "/_matrix/federation/v1/send/t1"
	req := r.txn(0, "t1", pduNo(1), "")
	body, _ := io.ReadAll(req.Body)
	req = r.txn(0, "t1", pduNo(1), "")
	want := fmt.Sprintf(`{"pdus":{"$%x":{}}}`, sha256.Sum256([]byte(pduNo(1))))
	r.sends(req, 200, want)
	if n := r.home.times("PUT " + target); n != 1 {
		t.Fatalf("the homeserver saw it %d times", n)
	}
	got := r.home.last[target]
	if r.home.bodies[target] != string(body) || got.Header.Get("Authorization") != req.Header.Get("Authorization") ||
		got.Host != "us.test" || got.Header.Get("X-Forwarded-Proto") != "https" {
		t.Errorf("it saw %+v with %s", got, r.home.bodies[target])
	}
	// The same again, and under another id.
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, want)
	r.sends(r.txn(0, "t2", pduNo(1), ""), 200, want)
	r.sends(r.txn(1, "t1", pduNo(1), ""), 200, want)
	if n := len(r.home.seen); n != 2 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
	rep := r.report()
	if e := rep.Edge; e == nil || e.Requests != 4 || e.Signatures[0].Count != 4 || e.KeyFetches != 2 {
		t.Errorf("%+v", e)
	}
}

// The homeserver names the events of a transaction in an order of its own. Whoever
// sends some of them again gets the ids of these.
func TestEdgeKnowsWhichEventIsWhich(t *testing.T) {
	r := startEdge(t, "", config{})
	id := func(n int) string { return matrix.EventIDs([]byte(pduNo(n)))[0] }
	r.home.answers(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"pdus":{%q:{},%q:{},"$ofItsOwnMaking":{}}}`, id(3), id(1))
	})
	r.send(r.txn(0, "t1", strings.Join([]string{pduNo(1), pduNo(2), pduNo(3)}, ","), ""))
	r.sends(r.txn(0, "t2", pduNo(3), ""), 200, fmt.Sprintf(`{"pdus":{%q:{}}}`, id(3)))
	r.sends(r.txn(0, "t3", pduNo(2)+","+pduNo(1), ""), 200, fmt.Sprintf(`{"pdus":{%q:{}}}`, id(1)))
	if n := len(r.home.seen); n != 1 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
}

func TestEdgeAnswersOutliveAKill(t *testing.T) {
	r := startEdge(t, "", config{})
	var first []string
	for i := range 5 {
		_, b := r.send(r.txn(0, fmt.Sprint("t", i), pduNo(i), ""))
		first = append(first, b)
	}
	r.sends(r.txn(0, "p", "", presenceOfA), 200, `{"pdus":{}}`)
	r.stop()
	r.start(hooks{})
	r.https = r.client()
	for i := range 5 {
		r.sends(r.txn(0, fmt.Sprint("t", i), pduNo(i), ""), 200, first[i])
	}
	r.sends(r.txn(0, "p", "", presenceOfA), 200, `{"pdus":{}}`)
	const text = "a server repeats the id of a transaction with other content"
	if strings.Contains(r.log.String(), text) {
		t.Error("what is the same is said to differ")
	}
	r.sends(r.txn(0, "t0", pduNo(0)+","+pduNo(9), ""), 200, first[0])
	if e := r.report().Edge; !strings.Contains(r.log.String(), text) || !slices.Contains(e.Ways, CountReport{"differing", 1}) {
		t.Errorf("that one differs is not said: %+v", e.Ways)
	}
	if n := len(r.home.seen); n != 6 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
}

// Many that come at the same moment get the same answer, and it is the first one's.
func TestEdgeAnswersThatAreAskedForTogether(t *testing.T) {
	r := startEdge(t, "", config{})
	_, want := r.send(r.txn(0, "t1", pduNo(1), ""))
	_, other := r.send(r.txn(0, "t2", pduNo(2), ""))
	type result struct{ id, body string }
	got := make(chan result, 200)
	for i := range 100 {
		for _, id := range []string{"t1", fmt.Sprint("again", i%3)} {
			pdu := pduNo(1)
			if id != "t1" {
				pdu = pduNo(2)
			}
			req := r.txn(0, id, pdu, "")
			go func() {
				resp, err := r.https.Do(req)
				if err != nil {
					got <- result{id, err.Error()}
					return
				}
				defer resp.Body.Close()
				b, _ := io.ReadAll(resp.Body)
				got <- result{id, string(b)}
			}()
		}
	}
	for range 200 {
		x := <-got
		if x.id == "t1" && x.body != want || x.id != "t1" && x.body != other {
			t.Fatalf("%s is answered with %q, want %q or %q", x.id, x.body, want, other)
		}
	}
	if n := len(r.home.seen); n != 2 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
}

func TestEdgeRefusesWhatIsNotAuthentic(t *testing.T) {
	r := startEdge(t, "deny = [\"*.denied.test\"]\nno_key = \"refuse\"", config{})
	name := string(r.world.Names()[0])
	const target = "/_matrix/federation/v1/send/t1"
	body := fmt.Sprintf(`{"edus":[],"origin":%q,"origin_server_ts":1,"pdus":[%s]}`, name, pduNo(1))
	sign := func(i int, origin, dest, target, body string) string {
		x, err := matrix.SignRequest(r.world.SigningKey(i), origin, dest, "PUT", target, []byte(body))
		if err != nil {
			t.Fatal(err)
		}
		return x.String()
	}
	deep := strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000)
	for _, tt := range []struct {
		what, auth, target, body string
		status                   int
		code                     string
	}{
		{"no signature", "", target, body, 401, "M_UNAUTHORIZED"},
		{"another scheme", "Bearer x", target, body, 401, "M_UNAUTHORIZED"},
		{"a header that is cut", `X-Matrix origin="x`, target, body, 400, "M_UNAUTHORIZED"},
		{"another's key", sign(1, name, "us.test", target, body), target, body, 401, "M_UNAUTHORIZED"},
		{"another body", sign(0, name, "us.test", target, body), target, strings.Replace(body, "!r", "!s", 1), 401, "M_UNAUTHORIZED"},
		{"another path", sign(0, name, "us.test", target, body), "/_matrix/federation/v1/send/t2", body, 401, "M_UNAUTHORIZED"},
		{"ourselves", sign(0, "us.test", "us.test", target, body), target, body, 401, "M_UNAUTHORIZED"},
		{"another destination", sign(0, name, "them.test", target, body), target, body, 401, "M_UNAUTHORIZED"},
		{"a server that is away", sign(0, "nobody.invalid", "us.test", target, strings.Replace(body, name, "nobody.invalid", 1)), target, strings.Replace(body, name, "nobody.invalid", 1), 401, "M_UNAUTHORIZED"},
		{"a denied one", sign(0, "x.denied.test", "us.test", target, strings.Replace(body, name, "x.denied.test", 1)), target, strings.Replace(body, name, "x.denied.test", 1), 403, "M_FORBIDDEN"},
		{"no JSON", sign(0, name, "us.test", target, `{}`), target, `{"pdus":[`, 400, "M_NOT_JSON"},
		{"no object", sign(0, name, "us.test", target, `[]`), target, `[]`, 400, "M_BAD_JSON"},
		{"pdus that are null", sign(0, name, "us.test", target, `{}`), target, fmt.Sprintf(`{"origin":%q,"pdus":null}`, name), 400, "M_BAD_JSON"},
		{"deep JSON", sign(0, name, "us.test", target, `{}`), target, fmt.Sprintf(`{"origin":%q,"pdus":[%s]}`, name, deep), 400, "M_NOT_JSON"},
		{"two pdus", sign(0, name, "us.test", target, `{}`), target, fmt.Sprintf(`{"origin":%q,"pdus":[],"pdus":[]}`, name), 400, "M_BAD_JSON"},
		{"51 PDUs", sign(0, name, "us.test", target, `{}`), target, fmt.Sprintf(`{"origin":%q,"pdus":[%s{}]}`, name, strings.Repeat("{},", 50)), 400, "M_UNKNOWN"},
		{"no body", sign(0, name, "us.test", target, ``), target, ``, 400, "M_NOT_JSON"},
		{"dot segments", sign(0, name, "us.test", "/_matrix/federation/v1/../../_synapse/admin", body), "/_matrix/federation/v1/../../_synapse/admin", body, 400, "M_INVALID_PARAM"},
		{"encoded dot segments", sign(0, name, "us.test", "/_matrix/federation/v1/event/%2e%2e%2f", body), "/_matrix/federation/v1/event/%2e%2e%2f", body, 400, "M_INVALID_PARAM"},
		{"dot segments, unsigned", "", "/_matrix/key/v2/server/..;/..;/_synapse", body, 400, "M_INVALID_PARAM"},
		{"a path that is none", sign(0, name, "us.test", "/_matrix/nothing", body), "/_matrix/nothing", body, 404, "M_UNRECOGNIZED"},
		{"a client's path", "", "/_matrix/client/v3/sync", body, 404, "M_UNRECOGNIZED"},
		{"a method that a path does not have", "", "/_matrix/federation/v1/version", body, 405, "M_UNRECOGNIZED"},
	} {
		s, b := r.send(r.withAuth(tt.auth, "PUT", tt.target, tt.body))
		if s != tt.status || matrix.ErrorCode([]byte(b)) != tt.code {
			t.Errorf("%s: %d %s, want %d %s", tt.what, s, b, tt.status, tt.code)
		}
	}
	if len(r.home.seen) != 0 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
	e := r.report().Edge
	if e.Signatures[1].Count != 3 || e.Refused[0].Count != 1 {
		t.Errorf("%+v", e)
	}
}

// A key that the server, asked just now, does not have is not passed on to the homeserver as
// one that could not be had.
func TestEdgeRefusesAKeyThatItsServerDoesNotHave(t *testing.T) {
	r := startEdge(t, "", config{})
	key, err := matrix.NewSigningKey(bytes.Repeat([]byte{9}, 32), "bogus")
	if err != nil {
		t.Fatal(err)
	}
	name := string(r.world.Names()[0])
	body := fmt.Sprintf(`{"edus":[],"origin":%q,"origin_server_ts":1,"pdus":[]}`, name)
	x, err := matrix.SignRequest(key, name, "us.test", "PUT", "/_matrix/federation/v1/send/t1", []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s, b := r.send(r.withAuth(x.String(), "PUT", "/_matrix/federation/v1/send/t1", body))
		if s != 401 || matrix.ErrorCode([]byte(b)) != "M_UNAUTHORIZED" || !strings.Contains(b, "does not have the key") {
			t.Errorf("%d %s", s, b)
		}
	}
	if len(r.home.seen) != 0 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
	if n := r.report().Edge.Signatures[3].Count; n != 2 {
		t.Errorf("%d are counted", n)
	}
	r.sends(r.txn(0, "t2", pduNo(1), ""), 200, "") // with its own key
}

func TestEdgePassesWhatItHasNoKeyFor(t *testing.T) {
	r := startEdge(t, "", config{})
	body := `{"edus":[],"origin":"nobody.invalid","origin_server_ts":1,"pdus":[]}`
	x, err := matrix.SignRequest(r.world.SigningKey(0), "nobody.invalid", "us.test", "PUT", "/_matrix/federation/v1/send/t1", []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	r.home.answers(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) })
	for range 2 {
		r.sends(r.withAuth(x.String(), "PUT", "/_matrix/federation/v1/send/t1", body), 401, "")
	}
	if n := r.home.times("PUT /_matrix/federation/v1/send/t1"); n != 2 {
		t.Errorf("the homeserver saw it %d times", n)
	}
}

func TestEdgeAnswersOfItsOwn(t *testing.T) {
	r := startEdge(t, "well_known = \"matrix.us.test:443\"", config{})
	keys, err := matrix.ServerKeys("us.test", matrix.At(time.Now().Add(time.Hour)), []matrix.SigningKey{us.Key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.home.answers(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if req.URL.Path == serverKeysTarget {
			w.Write(keys)
			return
		}
		io.WriteString(w, `{"server":{"name":"Synapse","version":"1"}}`)
	})
	for range 3 {
		r.sends(r.withAuth("", "GET", "/.well-known/matrix/server", ""), 200, `{"m.server":"matrix.us.test:443"}`)
		r.sends(r.withAuth("", "GET", serverKeysTarget, ""), 200, string(keys))
		r.sends(r.withAuth("", "GET", "/_matrix/federation/v1/version", ""), 200, `{"server":{"name":"Synapse","version":"1"}}`)
	}
	if n := len(r.home.seen); n != 2 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
}

// A server that has to check a signature of a homeserver that restarts gets its keys all
// the same, and never a document from before the key was changed.
func TestEdgeSaysTheKeysWhileTheHomeserverIsAway(t *testing.T) {
	r := newEdgeRig(t, "", withOutbox(t, ""))
	r.start(hooks{})
	former, err := matrix.NewSigningKey(bytes.Repeat([]byte{7}, 32), "former")
	if err != nil {
		t.Fatal(err)
	}
	signs := former
	r.home.answers(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		r.home.mu.Lock()
		defer r.home.mu.Unlock()
		keys, err := matrix.ServerKeys("us.test", matrix.At(time.Now().Add(time.Hour)), []matrix.SigningKey{signs}, nil)
		if err != nil {
			t.Error(err)
		}
		w.Write(keys)
	})
	ask := func() *matrix.ServerKeyObject {
		t.Helper()
		status, body := r.send(r.withAuth("", "GET", serverKeysTarget, ""))
		o, err := matrix.CheckServerKeys([]byte(body), "us.test")
		if status != 200 || err != nil {
			t.Fatalf("%d %s: %v", status, body, err)
		}
		return o
	}
	if o := ask(); o.Verify[former.ID()] == nil {
		t.Fatalf("%+v", o)
	}
	r.home.mu.Lock()
	signs = us.Key // it was away for a moment, and nobody saw it
	r.home.mu.Unlock()
	if o := ask(); o.Verify[us.Key.ID()] == nil || o.Verify[former.ID()] != nil {
		t.Fatalf("a document from before the change is given: %+v", o)
	}
	own := r.node.edge.counts.own.Load()
	r.sends(r.withAuth("", "GET", serverKeysTarget, ""), 200, "")
	if r.node.edge.counts.own.Load() != own+1 {
		t.Error("the new document is not kept")
	}
	r.home.down()
	o := &r.node.edge.own
	o.mu.Lock()
	clear(o.kept) // the time is over for which it was kept
	o.mu.Unlock()
	for range 3 { // the first finds out that it is away
		if o := ask(); o.Verify[us.Key.ID()] == nil || o.ValidUntil > matrix.At(time.Now().Add(saidValid)) {
			t.Fatalf("%+v", o)
		}
	}
	r.until("the homeserver is known to be away", func() bool { return !r.report().Edge.Homeserver.Up })
}

// What the bus is about to deliver to a server, that server need not ask the
// homeserver for.
func TestEdgeAnswersAnEventFromTheOutbox(t *testing.T) {
	r := newEdgeRig(t, "", withOutbox(t, ""))
	r.start(hooks{})
	dest := r.world.Names()[3]
	r.sends(r.txn(3, "t0", pduNo(0), ""), 200, "") // its key is known from now on
	if err := r.world.SetKind(3, sim.Dead); err != nil {
		t.Fatal(err)
	}
	event := `{"auth_events":[],"content":{"body":"hello"},"depth":1,"event_id":"$v1event:us.test","hashes":{},"origin_server_ts":1,"prev_events":[],"room_id":"!r:us.test","sender":"@u:us.test","signatures":{},"type":"m.room.message"}`
	r.taken(dest, "t1", []json.RawMessage{json.RawMessage(event)}, nil)
	const target = "/_matrix/federation/v1/event/$v1event:us.test"
	s, b := r.send(r.request(3, "GET", target, ""))
	if s != 200 || !strings.Contains(b, `"pdus":[`+event+`]`) || !strings.HasPrefix(b, `{"origin":"us.test","origin_server_ts":`) {
		t.Errorf("%d %s", s, b)
	}
	r.sends(r.request(4, "GET", target, ""), 200, `{"pdus":{}}`) // another server: the homeserver's to say
	if n := r.home.times("GET " + target); n != 1 {
		t.Errorf("the homeserver saw it %d times", n)
	}
}

// The two cores hear of each other: of signs of life, of keys, and of joins.
func TestEdgeAndOutboundCoreMeet(t *testing.T) {
	r := newEdgeRig(t, "", config{})
	var mu sync.Mutex
	seen := map[string]int{}
	r.start(hooks{
		event: func(ev bus.Event) {
			mu.Lock()
			defer mu.Unlock()
			switch ev := ev.(type) {
			case bus.Alive:
				seen["alive "+string(ev.Server)]++
			case bus.KeyWanted:
				seen["key of "+string(ev.Server)]++
			}
		},
		edgeEvent: func(ev edge.Event) {
			mu.Lock()
			defer mu.Unlock()
			if j, ok := ev.(edge.Joining); ok {
				seen[fmt.Sprintf("join of %s %t", j.Room, j.Open)]++
			}
		},
	})
	name := string(r.world.Names()[0])
	for i := range 3 {
		r.sends(r.txn(0, fmt.Sprint("t", i), pduNo(i), ""), 200, "")
	}
	other, room := r.world.Names()[1], r.world.RoomID(1)
	made := r.fetch(us.MakeJoin(other, room, "alice"))
	id, event, err := us.Join([]byte(made.body), time.Now())
	if err != nil {
		t.Fatalf("%v: %s", err, made.body)
	}
	if got := r.fetch(fedload.SendJoin(other, room, id, event)); got.status != 200 {
		t.Fatalf("send_join: %d %.300s", got.status, got.body)
	}
	r.until("the join is through", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return seen["join of "+room+" false"] == 1
	})
	mu.Lock()
	defer mu.Unlock()
	if seen["alive "+name] != 1 || seen["key of "+name] != 1 || seen["join of "+room+" true"] != 1 {
		t.Errorf("%v", seen)
	}
}

func TestEdgeWaitsForAHomeserverThatRestarts(t *testing.T) {
	r := startEdge(t, "", config{})
	r.sends(r.txn(0, "t0", pduNo(0), ""), 200, "")
	r.home.down()
	type result struct {
		status int
		body   string
	}
	done := make(chan result, 1)
	req := r.txn(0, "t1", pduNo(1), "")
	go func() {
		resp, err := r.https.Do(req)
		if err != nil {
			done <- result{0, err.Error()}
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		done <- result{resp.StatusCode, string(b)}
	}()
	r.until("the homeserver is known to be away", func() bool { return !r.report().Edge.Homeserver.Up })
	os.Remove(r.home.path)
	r.home.up()
	if got := <-done; got.status != 200 || !strings.Contains(got.body, "{}") {
		t.Errorf("%+v", got)
	}
	if e := r.report().Edge; !e.Homeserver.Up || e.Homeserver.Downs != 1 {
		t.Errorf("%+v", e.Homeserver)
	}
}

func TestEdgePassesClientsIfItMay(t *testing.T) {
	r := startEdge(t, "pass_client = true", config{})
	r.home.answers(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("X-From", "home")
		w.WriteHeader(418)
		io.WriteString(w, req.Header.Get("Authorization")+req.RequestURI)
	})
	r.sends(r.withAuth("Bearer x", "POST", "/_matrix/client/v3/sync?since=%2F", `{"a":1}`), 418, "Bearer x/_matrix/client/v3/sync?since=%2F")
	r.sends(r.withAuth("Bearer x", "GET", "/_synapse/admin/v1/users", ""), 404, "")
	r.sends(r.withAuth("Bearer x", "GET", "/_matrix/client/v3/%2e%2e/%2e%2e/_synapse/admin/v1/users", ""), 400, "")
	r.sends(r.withAuth("Bearer x", "GET", "/_matrix/client/..;/_synapse/admin/v1/users", ""), 400, "")
	if n := len(r.home.seen); n != 1 {
		t.Errorf("the homeserver saw %v", r.home.seen)
	}
}

// A large answer goes through, and so does a large request.
func TestEdgeLargeBodies(t *testing.T) {
	r := startEdge(t, "max_body = \"13MiB\"", config{})
	large := strings.Repeat("x", 5<<20)
	r.home.answers(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"state":"`+large+`"}`)
	})
	r.sends(r.request(0, "GET", "/_matrix/federation/v1/state/!r:us.test?event_id=$e", ""), 200, `{"state":"`+large+`"}`)
	r.home.answers(nil)
	r.sends(r.txn(0, "big", `{"content":"`+large+`"}`, ""), 200, "")
	if got := len(r.home.bodies["/_matrix/federation/v1/send/big"]); got < len(large) {
		t.Errorf("%d bytes arrived", got)
	}
	s, b := r.send(r.txn(0, "bigger", strings.TrimSuffix(strings.Repeat(`{"content":"`+large+`"},`, 3), ","), ""))
	if s != 413 || matrix.ErrorCode([]byte(b)) != "M_TOO_LARGE" {
		t.Errorf("%d %s", s, b)
	}
}

// A body too large to be in memory has its signature checked as it is read, if it is in
// canonical form. Else that is the homeserver's to do, unless what is not checked is
// refused.
func TestEdgeBodiesTooLargeForMemory(t *testing.T) {
	large := `{"content":"` + strings.Repeat("x", 1<<20) + `"}`
	odd := ` {"edus": [],` // not canonical
	for _, policy := range []string{"pass", "refuse"} {
		r := startEdge(t, "checked_body = \"1MiB\"\nno_key = \""+policy+"\"\n", config{})
		for range 2 { // the second is answered from the record
			r.sends(r.txn(0, "large", large, ""), 200, "")
		}
		if n := r.home.times("PUT /_matrix/federation/v1/send/large"); n != 1 {
			t.Errorf("%s: the homeserver saw it %d times", policy, n)
		}
		forged := r.txn(0, "forged", large, "")
		forged.Header.Set("Authorization", r.txn(0, "another", large, "").Header.Get("Authorization"))
		r.sends(forged, 401, "")
		name := r.world.Names()[0]
		body := odd + fmt.Sprintf(`"origin":%q,"origin_server_ts":1,"pdus":[%s]}`, name, large)
		s, b := r.send(r.request(0, "PUT", "/_matrix/federation/v1/send/odd", body))
		if want := map[string]int{"pass": 200, "refuse": 401}[policy]; s != want {
			t.Errorf("%s: %d %s, want %d", policy, s, b, want)
		}
		if e := r.report().Edge; e.Signatures[0].Count != 2 || e.Signatures[1].Count != 1 || e.Signatures[2].Count != 1 {
			t.Errorf("%s: %+v", policy, e.Signatures)
		}
	}
}

// Fsbus refuses nothing that the homeserver would take: what it does not know is passed
// on, byte for byte.
func TestEdgeIsNotStricterThanItsHomeserver(t *testing.T) {
	r := startEdge(t, "", config{})
	name := string(r.world.Names()[0])
	edu := `{"content":{"room_id":"!r:x","typing":true,"user_id":"@a:` + name + `"},"edu_type":"m.typing"}`
	for i, body := range []string{
		`{"edus":[` + edu + `],"origin":"` + name + `","origin_server_ts":1}`,
		`{"origin":"` + name + `","origin_server_ts":1,"pdus":[` + pduNo(1) + `]}`,
		`{"edus":[],"origin_server_ts":1,"pdus":[]}`,
		`{"edus":[],"origin":"matrix.` + name + `","origin_server_ts":1,"pdus":[]}`,
		`{"edus":[],"origin":7,"origin_server_ts":"1700000000000","pdus":[]}`,
		`{"edus":[],"origin":"` + name + `","origin_server_ts":null,"pdus":[]}`,
		`{"edus":[],"origin":"` + name + `","pdus":[]}`,
	} {
		target := fmt.Sprint("/_matrix/federation/v1/send/lenient", i)
		s, b := r.send(r.request(0, "PUT", target, body))
		if s != 200 || string(r.home.bodies[target]) != body {
			t.Errorf("%s: %d %s, the homeserver got %q", body, s, b, r.home.bodies[target])
		}
	}
	r.home.answers(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(418) })
	for _, req := range []*http.Request{
		r.request(0, "POST", "/_matrix/policy/unstable/org.matrix.msc4284/event/$e/check", `{}`),
		r.withAuth("", "GET", "/_matrix/policy/v1/something", ""),
		r.request(0, "GET", "/_matrix/federation/v9/new", ""),
		r.withAuth("", "GET", "/_matrix/federation/v9/new", ""),
		r.withAuth("", "GET", "/_matrix/key/v9/new", ""),
		r.withAuth("", "HEAD", "/_matrix/federation/v1/version", ""),
	} {
		r.sends(req, 418, "")
	}
	resp, err := r.https.Do(r.withAuth("", "DELETE", "/_matrix/federation/v1/version", ""))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 405 || resp.Header.Get("Allow") != "GET" {
		t.Errorf("a method that the path does not have: %d, Allow %q", resp.StatusCode, resp.Header.Get("Allow"))
	}
}

func TestEdgeShowsItselfOnTheStatusPage(t *testing.T) {
	r := startEdge(t, "", config{})
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, "")
	r.sends(r.txn(0, "t2", pduNo(2), ""), 200, "")
	for path, want := range map[string][]string{
		"/":        {"From other servers", "At the homeserver", "Certificate for [us.test]", "Events after others that have not come by: 1", "!r:us.test"},
		"/metrics": {`fsbus_edge_signatures_total{verdict="good"} 2`, "fsbus_edge_homeserver_up 1", `fsbus_edge_begun_total{band="pdus"} 2`, `fsbus_edge_endpoint_requests_total{endpoint="send"} 2`},
		"/health":  {"ok"},
	} {
		_, body := r.get(path)
		for _, s := range want {
			if !strings.Contains(body, s) {
				t.Errorf("%s lacks %q:\n%s", path, s, body)
			}
		}
	}
	var table strings.Builder
	if err := writeTable(&table, r.report()); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"FROM OTHER SERVERS", "pdus", "AT THE HOMESERVER", "keys fetched"} {
		if !strings.Contains(table.String(), s) {
			t.Errorf("the table lacks %q:\n%s", s, &table)
		}
	}
}

func TestEdgeReloads(t *testing.T) {
	r := startEdge(t, "", config{})
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, "")
	text, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	name := string(r.world.Names()[0])
	host, _, _ := strings.Cut(name, ":")
	if err := os.WriteFile(r.path, []byte(strings.Replace(string(text), "[edge]\n", "[edge]\ndeny = [\""+host+"\"]\n", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	certFiles(t, r.dir, "us.test", "new.test")
	r.hup <- os.Interrupt
	r.await("READY=1")
	r.until("it is denied", func() bool {
		s, _ := r.send(r.txn(0, "t2", pduNo(2), ""))
		return s == 403
	})
	r.until("the new certificate is in use", func() bool { return len(r.report().Edge.Certificate.Names) == 2 })
}

// A client may leave while the loop has its answer already, but has not given it.
func TestEdgeClientThatLeavesAsItIsAnswered(t *testing.T) {
	r := newEdgeRig(t, "", config{})
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.start(hooks{edgeEvent: func(ev edge.Event) {
		if _, ok := ev.(edge.Recorded); ok {
			once.Do(func() {
				close(blocked)
				<-release
			})
		}
	}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	req := r.txn(0, "t1", pduNo(1), "").WithContext(ctx)
	go func() {
		_, err := r.https.Do(req)
		done <- err
	}()
	<-blocked
	cancel()
	if err := <-done; err == nil {
		t.Error("it was answered")
	}
	eventually(t, "that is noticed", func() bool { s := r.node.edge.server.Stats(); return s.Gone == 1 && s.Held == 0 })
	close(release)
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, "")
	if n := r.home.times("PUT /_matrix/federation/v1/send/t1"); n != 1 {
		t.Errorf("the homeserver saw it %d times", n)
	}
	r.until("nothing is held any more", func() bool {
		held := -1
		if err := r.node.loop.Call(t.Context(), func() { held = len(r.node.edge.requests) + len(r.node.edge.relays) }); err != nil {
			t.Fatal(err)
		}
		return held == 0
	})
}

// The homeserver may, too.
func TestHomeserverThatLeavesAsItIsAnswered(t *testing.T) {
	w := unsigned(t, sim.Config{Servers: 3})
	r := newRunning(t, w, config{})
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.start(hooks{event: func(ev bus.Event) {
		if _, ok := ev.(bus.Answered); ok {
			once.Do(func() {
				close(blocked)
				<-release
			})
		}
	}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan fedload.Result, 2)
	profile := fedload.Lookup(w.Names()[0], "u1")
	go func() { done <- r.Do(t.Context(), profile) }()
	<-blocked
	go func() { done <- r.Do(ctx, profile) }()
	eventually(t, "both wait", func() bool { return r.node.front.Stats().Parked == 2 })
	cancel()
	eventually(t, "one is gone", func() bool { return r.node.front.Stats().Gone == 1 })
	close(release)
	for range 2 {
		<-done
	}
	if res := r.Do(t.Context(), profile); res.Err != nil || res.Status != 200 {
		t.Errorf("%+v", res)
	}
}

// What would stay in memory or in the database of what others made up is bounded.
func TestEdgeHostileNames(t *testing.T) {
	r := startEdge(t, "", config{})
	room := "!" + strings.Repeat("r", 1<<20)
	for i := range 3 {
		pdu := fmt.Sprintf(`{"content":{},"prev_events":["$p%d"],"room_id":%q,"type":"m.room.message"}`, i, room)
		r.sends(r.txn(0, fmt.Sprint("t", i), pdu, ""), 200, "")
	}
	if n, rooms := r.node.edge.gaps.report(10); n != 0 || len(rooms) != 0 {
		t.Errorf("%d gaps, %d rooms", n, len(rooms))
	}
	key := "ed25519:" + strings.Repeat("k", 1000)
	auth := fmt.Sprintf(`X-Matrix origin=%q,destination="us.test",key=%q,sig="c2ln"`, r.world.Names()[0], key)
	r.sends(r.withAuth(auth, "GET", "/_matrix/federation/v1/event/$a", ""), 401, "")
	r.sends(r.withAuth(strings.Replace(auth, key, "rsa:1", 1), "GET", "/_matrix/federation/v1/event/$a", ""), 401, "")
	r.sends(r.request(0, "PUT", "/_matrix/federation/v1/send/", `{"origin":"x","pdus":[]}`), 404, "")
	if e := r.report().Edge; e.KeyFetches != 1 {
		t.Errorf("%d keys were fetched", e.KeyFetches)
	}
}

// An answer that is kept, or that several get, is made for nobody in particular.
func TestEdgeAsksForNoSpecialAnswers(t *testing.T) {
	r := startEdge(t, "", config{})
	req := r.txn(0, "t1", pduNo(1), "")
	req.Header.Set("Accept-Encoding", "gzip")
	req.Header.Set("If-None-Match", "x")
	req.Header.Set("Range", "bytes=0-1")
	r.sends(req, 200, "")
	got := r.home.last["/_matrix/federation/v1/send/t1"].Header
	for _, name := range perClient {
		if got.Get(name) != "" {
			t.Errorf("%s: %s", name, got.Get(name))
		}
	}
}

// A server that got another key under the same name is believed.
func TestEdgeLooksForANewKeyBeforeItSaysForged(t *testing.T) {
	r := startEdge(t, "no_key = \"refuse\"", config{})
	r.sends(r.txn(0, "t1", pduNo(1), ""), 200, "")
	name, id := r.world.Names()[0], r.world.SigningKey(0).ID()
	k := r.node.edge.ring
	age := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		e := k.known[ringKey{name, id}]
		e.public = r.world.SigningKey(1).Public() // as it was
		e.fetched = e.fetched.Add(-2 * trustFor)
		k.known[ringKey{name, id}] = e
	}
	age()
	r.sends(r.txn(0, "t2", pduNo(2), ""), 200, "")
	forged := func() *http.Request {
		x, err := matrix.SignRequest(r.world.SigningKey(1), string(name), "us.test", "GET", "/_matrix/federation/v1/event/$a", nil)
		if err != nil {
			t.Fatal(err)
		}
		return r.withAuth(x.String(), "GET", "/_matrix/federation/v1/event/$a", "")
	}
	for range 3 {
		r.sends(forged(), 401, "")
	}
	if e := r.report().Edge; e.KeyFetches != 2 || e.Signatures[1].Count != 3 {
		t.Errorf("%d keys were fetched, %+v", e.KeyFetches, e.Signatures)
	}
}

// One-time keys are claimed once, even if the connection to the homeserver breaks.
func TestEdgeSendsOnceWhatMayBeSentOnce(t *testing.T) {
	r := startEdge(t, "", config{})
	const target = "/_matrix/federation/v1/user/keys/claim"
	r.sends(r.request(0, "POST", target, `{"a":1}`), 200, "") // the connection is kept
	r.home.answers(func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) })
	if s, _ := r.send(r.request(0, "POST", target, `{"a":2}`)); s != 502 {
		t.Errorf("status %d", s)
	}
	if n := r.home.times("POST " + target); n != 2 {
		t.Errorf("the homeserver saw %d claims, 2 were made", n)
	}
}

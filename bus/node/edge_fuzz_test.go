package node

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"fsbus/bus/edge"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// Whatever comes in is handed on with sensible figures, or refused with an answer.
func FuzzEdgeRequest(f *testing.F) {
	s := bareEdge(func(c *Config) { c.Edge.Deny = []string{"denied.*"} })
	spool, err := netx.NewSpool(netx.SpoolConfig{Memory: 1 << 20})
	if err != nil {
		f.Fatal(err)
	}
	const auth = `X-Matrix origin="x.test",destination="us.test",key="ed25519:1",sig="c2ln"`
	const send = "/_matrix/federation/v1/send/"
	f.Add("PUT", send+"1", auth, `{"origin":"x.test","pdus":[`+pduNo(1)+`],"edus":[`+presenceOfA+`]}`)
	f.Add("PUT", send+"%2f", auth, `{"pdus":[],"edus":[{"edu_type":"m.typing","content":{"room_id":"!r","user_id":"@u","typing":true}}]}`)
	f.Add("PUT", send, auth, `{"origin":"x.test","origin":"y.test","pdus":[{"prev_events":["$a",["$b"]]}]}`)
	f.Add("PUT", send+"1", auth+"\n"+strings.Replace(auth, "x.test", "y.test", 1), "{\"\\ud800\":1e999}")
	f.Add("GET", "/_matrix/federation/v1/event/$a?x", strings.Replace(auth, `"us.test"`, "us.test", 1), "")
	f.Add("POST", "/_matrix/federation/v1/get_missing_events/!r", auth, strings.Repeat("[", 2000))
	f.Add("GET", "/.well-known/matrix/server", "", "")
	f.Add("PUT", send+"1", strings.Replace(auth, "x.test", "denied.test", 1), `{"origin":"denied.test","pdus":[]}`)
	f.Add("OPTIONS", "/_matrix/client/../federation", "Bearer x", " ")
	id := uint64(0)
	f.Fuzz(func(t *testing.T, method, target, headers, content string) {
		if len(target) > 8<<10 {
			return // netx refuses it
		}
		id++
		q := &netx.EdgeRequest{ID: id, Method: method, Target: target, Header: http.Header{"Authorization": strings.Split(headers, "\n")}, Received: time.Now(), Size: int64(len(content))}
		if ref := s.check(q); ref != nil {
			if ref.Status < 200 || ref.Status == http.StatusOK && len(ref.Body) == 0 || ref.Status >= 400 && (ref.Errcode == "" || ref.Message == "") {
				t.Fatalf("refused with %+v", ref)
			}
			return
		}
		if content != "" {
			q.Body = spool.New()
			defer q.Release()
			if _, err := q.Body.Write([]byte(content)); err != nil {
				t.Skip("larger than the spool")
			}
			q.Body.CloseWrite(nil)
		}
		ep := matrix.Match(method, target)
		if placeOf(ep, target) != toCore {
			return // there is no homeserver to pass it to
		}
		c := &caller{q: q, endpoint: ep}
		a, err := s.arrived(q, c)
		if err != nil {
			if _, ok := errors.AsType[*mistake](err); !ok {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if a.Origin == "us.test" || !ep.Unsigned && (a.Origin == "" || len(a.Keys) == 0 || len(a.Keys) > maxSignatures) || a.Size < perRequest || c.extra > maxDetails || strings.HasPrefix(string(a.Origin), "denied.") || a.Endpoint == nil {
			t.Fatalf("%+v", a)
		}
		if (a.Txn != nil) != (ep.Name == "send") {
			t.Fatalf("%s: %+v", ep.Name, a.Txn)
		}
		if a.Txn != nil {
			checkTxn(t, a.Txn)
		}
	})
}

func checkTxn(t *testing.T, x *edge.Txn) {
	t.Helper()
	items := int32(0)
	for _, n := range x.Items {
		items += n
	}
	lossy := x.Items[matrix.KindPresence] + x.Items[matrix.KindTyping]
	if x.ID == "" || x.PDUs > matrix.MaxPDUs || x.EDUs > matrix.MaxEDUs || int(x.PDUs) != len(x.Hashes) || x.Items[matrix.KindPDU] != x.PDUs ||
		len(x.Covers) > maxCovers || len(x.Rooms) > matrix.MaxPDUs || x.Ephemeral != (lossy > 0 && lossy == items) {
		t.Fatalf("%+v", x)
	}
	for i := 1; i < len(x.Covers); i++ {
		if x.Covers[i-1] >= x.Covers[i] {
			t.Fatalf("covers are not ascending: %v", x.Covers)
		}
	}
}

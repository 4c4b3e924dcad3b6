package node

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"fsbus/bus/matrix"
	"fsbus/netx"
)

// What a denied server sends is not read, and refused and counted as the core does
// it. The list is the latest one.
func TestEdgeRefusesTheDeniedUnread(t *testing.T) {
	s := bareEdge(func(c *Config) { c.Edge.Deny = []string{"x.test"} })
	header := func(origin string) http.Header {
		return http.Header{"Authorization": {`X-Matrix origin="` + origin + `",destination="us.test",key="ed25519:1",sig="c2ln"`}}
	}
	large := func(origin string) *netx.EdgeRequest {
		return &netx.EdgeRequest{Method: "PUT", Target: sendPrefix + "1", Header: header(origin), Size: matrix.MaxRequestBody}
	}
	for _, name := range []string{"x.test", "X.test:8448"} {
		ref := s.check(large(name))
		if ref == nil || ref.Status != 403 || ref.Errcode != matrix.MForbidden || ref.Message != "fsbus: "+name+" may not talk to this server" {
			t.Errorf("%s: %+v", name, ref)
		}
	}
	if ref := s.check(large("y.test")); ref != nil {
		t.Errorf("%+v", ref)
	}
	// The keys are for all.
	if ref := s.check(&netx.EdgeRequest{Method: "GET", Target: serverKeysTarget, Header: header("x.test")}); ref != nil {
		t.Errorf("%+v", ref)
	}
	if n := s.counts.denied.Load(); n != 2 {
		t.Errorf("%d are counted", n)
	}
}

func TestEdgeDeniesWhomTheNewListDenies(t *testing.T) {
	r := startEdge(t, "", config{})
	name := string(r.world.Names()[0])
	host, _, _ := strings.Cut(name, ":")
	text, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.path, []byte(strings.Replace(string(text), "[edge]\n", "[edge]\ndeny = [\""+host+"\"]\n", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	r.hup <- os.Interrupt
	r.await("READY=1")
	r.until("the new list holds", func() bool {
		return !r.node.edge.acl.Load().Allows(matrix.ServerName(name))
	})
	// Its body never ends, and is not waited for.
	body, end := io.Pipe()
	defer end.Close()
	req := httptest.NewRequest("PUT", "https://us.test"+sendPrefix+"t1", body)
	req.RequestURI, req.ContentLength = "", 1000
	req.Header = r.request(0, "PUT", sendPrefix+"t1", "{}").Header
	s, b := r.send(req)
	if s != 403 || matrix.ErrorCode([]byte(b)) != matrix.MForbidden {
		t.Errorf("%d %s", s, b)
	}
	e := r.report().Edge
	if n := countOf(e.Refused, "denied"); n != 1 || e.Requests != 1 {
		t.Errorf("%d are counted, of %d: %+v", n, e.Requests, e.Refused)
	}
}

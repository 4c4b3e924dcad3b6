package matrix

import (
	"encoding/json"
	"testing"
)

func TestErrorJSON(t *testing.T) {
	for _, c := range []struct{ code, message, want string }{
		{MUnknown, "boom", `{"errcode":"M_UNKNOWN","error":"boom"}`},
		{MTooLarge, "", `{"errcode":"M_TOO_LARGE","error":""}`},
		{MNotJSON, "a \"b\"\\\n\x01<>&\u2028", `{"errcode":"M_NOT_JSON","error":"a \"b\"\\\n\u0001<>&` + "\u2028" + `"}`},
		{MForbidden, "half \xe6 rune", `{"errcode":"M_FORBIDDEN","error":"half ` + "\ufffd" + ` rune"}`},
	} {
		got := ErrorJSON(c.code, c.message)
		if string(got) != c.want {
			t.Errorf("ErrorJSON(%q, %q) = %s; want %s", c.code, c.message, got, c.want)
		}
		canonical, err := CanonicalJSON(got)
		if err != nil || string(canonical) != string(got) {
			t.Errorf("ErrorJSON(%q, %q) is not canonical: %s, %v", c.code, c.message, canonical, err)
		}
		var m map[string]string
		if err := json.Unmarshal(got, &m); err != nil || m["errcode"] != c.code {
			t.Errorf("%s read as %v, %v", got, m, err)
		}
	}
}

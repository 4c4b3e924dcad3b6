package node

import (
	"strings"
	"testing"
	"time"

	"fsbus/netx"
)

func TestAWrongSecretIsUnhealthyAfterAMinute(t *testing.T) {
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) time.Time { return t0.Add(d) }
	for _, tt := range []struct {
		name string
		s    netx.SecretStats
		now  time.Duration
		want bool
	}{
		{"none", netx.SecretStats{}, time.Hour, false},
		{"for half a minute", netx.SecretStats{FirstWrong: t0, LastWrong: at(30 * time.Second)}, 30 * time.Second, false},
		{"for a minute", netx.SecretStats{FirstWrong: t0, LastWrong: at(time.Minute)}, time.Minute, true},
		{"one, and none right for a minute", netx.SecretStats{FirstWrong: t0, LastWrong: t0}, time.Minute, true},
		{"a right one came since", netx.SecretStats{LastRight: at(time.Minute), LastWrong: t0}, 2 * time.Minute, false},
		{"long ago", netx.SecretStats{FirstWrong: t0, LastWrong: at(time.Minute)}, 2 * time.Hour, false},
	} {
		if why := wrongSecret(&tt.s, at(tt.now)); (why != "") != tt.want {
			t.Errorf("%s: %q", tt.name, why)
		}
	}
}

func TestHomeserverLastSeen(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	wrong := map[int]uint64{407: 3, 404: 1}
	for want, s := range map[string]netx.FrontStats{
		"has not connected since the start": {},
		"with the right secret":             {Refused: wrong},
		"was last seen 3s ago":              {Refused: wrong, Secret: netx.SecretStats{LastRight: now.Add(-3 * time.Second)}},
		"was last seen 0s ago":              {Secret: netx.SecretStats{LastRight: now.Add(time.Second)}},
	} {
		r := homeserverReport(&s, now)
		if !strings.Contains(r.Text, want) || (r.LastSeen != nil) != !s.Secret.LastRight.IsZero() || r.WrongSecret != s.Refused[407] {
			t.Errorf("%+v: %+v", s, r)
		}
	}
}

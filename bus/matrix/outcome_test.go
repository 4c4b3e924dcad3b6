package matrix

import "testing"

func TestFailureNames(t *testing.T) {
	for f := FailNone; f < NumFailures; f++ {
		if s := f.String(); s == "" || s == "invalid" {
			t.Errorf("failure %d is called %q", f, s)
		}
		if got, ok := ParseFailure(f.String()); !ok || got != f {
			t.Errorf("%v came back as %v, %t", f, got, ok)
		}
	}
	if s := NumFailures.String(); s != "invalid" {
		t.Errorf("a failure beyond the last is called %q", s)
	}
	if f, ok := ParseFailure("invalid"); ok || f != FailLocal {
		t.Errorf("an unknown name gives %v, %t", f, ok)
	}
}

// Whatever may have reached the remote must not count as never connected.
func TestFailureNeverConnected(t *testing.T) {
	want := map[Failure]bool{
		FailRefused: true, FailUnreachable: true, FailNoName: true, FailDNS: true, FailTLS: true, FailBlocked: true,
	}
	for f := FailNone; f < NumFailures; f++ {
		if f.NeverConnected() != want[f] {
			t.Errorf("%v: %t", f, f.NeverConnected())
		}
	}
}

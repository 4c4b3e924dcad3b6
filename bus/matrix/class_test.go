package matrix

import "testing"

func TestClassString(t *testing.T) {
	seen := make(map[string]bool)
	for c := Class(0); c <= NumClasses; c++ {
		if s := c.String(); s == "" || s == "invalid" || seen[s] {
			t.Errorf("class %d is called %q", c, s)
		}
		seen[c.String()] = true
	}
	if s := Class(NumClasses + 1).String(); s != "invalid" {
		t.Errorf("a class beyond the last is called %q", s)
	}
}

package sim

import (
	"slices"
	"testing"
)

func TestSharesAreExactAndSeeded(t *testing.T) {
	shares := Shares{Dead: 0.05, Hanging: 0.001, Slow: 0.1, Limited: 0.0004, Garbage: 0.25}
	kinds, err := shares.assign(1000, 7)
	if err != nil {
		t.Fatal(err)
	}
	var got [NumKinds]int
	for _, k := range kinds {
		got[k]++
	}
	want := [NumKinds]int{Well: 599, Dead: 50, Hanging: 1, Slow: 100, Limited: 0, Garbage: 250}
	if got != want {
		t.Errorf("counts %v, want %v", got, want)
	}
	again, _ := shares.assign(1000, 7)
	if !slices.Equal(kinds, again) {
		t.Error("the same seed chose other servers")
	}
	other, _ := shares.assign(1000, 8)
	if slices.Equal(kinds, other) {
		t.Error("another seed chose the same servers")
	}
}

func TestImpossibleSharesAreRefused(t *testing.T) {
	for _, shares := range []Shares{{Dead: -0.1}, {Dead: 1.1}, {Well: 0.5}, {Dead: 0.6, Slow: 0.6}} {
		if _, err := shares.assign(10, 0); err == nil {
			t.Errorf("shares %v were taken", shares)
		}
	}
}

func TestKindNames(t *testing.T) {
	for k := range NumKinds {
		if got, err := ParseKind(k.String()); got != k || err != nil {
			t.Errorf("ParseKind(%q) = %v, %v", k.String(), got, err)
		}
	}
	if _, err := ParseKind(NumKinds.String()); err == nil {
		t.Error("an invalid kind has a name")
	}
}

package matrix

import (
	"testing"
	"time"
)

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		header, body string
		want         time.Duration
		ok           bool
	}{
		{"", `{"errcode":"M_LIMIT_EXCEEDED","error":"slow","retry_after_ms":2000}`, 2 * time.Second, true},
		{"7", `{"retry_after_ms":1500}`, 1500 * time.Millisecond, true},
		{"", `{"retry_after_ms":0}`, 0, true},
		{"", `{"retry_after_ms":0.5}`, 500 * time.Microsecond, true},
		{"", `{"retry_after_ms":3.6e6}`, time.Hour, true},
		{"", `{"retry_after_ms":1e300}`, time.Hour, true},
		{"", `{"retry_after_ms":1e9999}`, 0, false},
		{"7", `{"retry_after_ms":-1}`, 7 * time.Second, true},
		{"7", `{"retry_after_ms":"2000"}`, 7 * time.Second, true},
		{"7", `{"retry_after_ms":null}`, 7 * time.Second, true},
		{"7", `{"retry_after_ms":2000`, 7 * time.Second, true},
		{"7", `{"Retry_After_Ms":2000}`, 7 * time.Second, true},
		{"7", `[2000]`, 7 * time.Second, true},
		{"7", `<html>`, 7 * time.Second, true},
		{"0", "", 0, true},
		{" 120\t", "", 2 * time.Minute, true},
		{"3600", "", time.Hour, true},
		{"3601", "", time.Hour, true},
		{"99999999999999999999999999", "", time.Hour, true},
		{"Sat, 21 Nov 2026 12:00:30 GMT", "", 30 * time.Second, true},
		{"Saturday, 21-Nov-26 12:00:30 GMT", "", 30 * time.Second, true},
		{"Sat Nov 21 12:00:30 2026", "", 30 * time.Second, true},
		{"Sat, 21 Nov 2026 12:00:00 GMT", "", 0, true},
		{"Sat, 21 Nov 2026 11:59:59 GMT", "", 0, false},
		{"Mon, 21 Nov 9026 12:00:00 GMT", "", time.Hour, true},
		{"Sat, 21 Nov 2026 12:00:30 CET", "", 0, false},
		{"", "", 0, false},
		{"-1", "", 0, false},
		{"+1", "", 0, false},
		{"1.5", "", 0, false},
		{"soon", "", 0, false},
		{"1 2", "", 0, false},
	} {
		got, ok := ParseRetryAfter(c.header, []byte(c.body), now)
		if got != c.want || ok != c.ok {
			t.Errorf("ParseRetryAfter(%q, %q) = %v, %t; want %v, %t", c.header, c.body, got, ok, c.want, c.ok)
		}
	}
	body := append([]byte(`{"retry_after_ms":2000}`), make([]byte, maxErrorBody)...)
	for i := range body {
		if body[i] == 0 {
			body[i] = ' '
		}
	}
	if d, ok := ParseRetryAfter("", body, now); ok {
		t.Errorf("a body of %d bytes was read: %v", len(body), d)
	}
	if d, ok := ParseRetryAfter("", body[:maxErrorBody], now); !ok || d != 2*time.Second {
		t.Errorf("a body of %d bytes: %v, %t", maxErrorBody, d, ok)
	}
}

func FuzzParseRetryAfter(f *testing.F) {
	f.Add("7", []byte(`{"retry_after_ms":2000}`), int64(0))
	f.Add("Sat, 21 Nov 2026 12:00:30 GMT", []byte(`{}`), int64(1795262400))
	f.Fuzz(func(t *testing.T, header string, body []byte, unix int64) {
		d, ok := ParseRetryAfter(header, body, time.Unix(unix, 0))
		if d < 0 || d > MaxRetryAfter || !ok && d != 0 {
			t.Fatalf("ParseRetryAfter(%q, %q, %d) = %v, %t", header, body, unix, d, ok)
		}
	})
}

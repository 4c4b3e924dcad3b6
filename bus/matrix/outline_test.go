package matrix

import (
	"errors"
	"slices"
	"testing"
)

func TestOutlineOfTransactions(t *testing.T) {
	const head = `{"origin":"a.test","pdus":[`
	for _, tt := range []struct {
		name, body string
		rooms      []string
		class      Class
		devices    bool
	}{
		{"nothing", head + `]}`, nil, ClassPresence, false},
		{"an event", head + `{"room_id":"!r:a.test"}]}`, nil, ClassEvent, false},
		{"an event and a device list", head + `{"room_id":"!r:a.test"}],"edus":[{"edu_type":"m.device_list_update"}]}`, nil, ClassEvent, true},
		{"presence", head + `],"edus":[{"edu_type":"m.presence","content":{"push":[]}}]}`, nil, ClassPresence, false},
		{"typing", head + `],"edus":[{"edu_type":"m.typing","content":{"room_id":"!r:a.test","typing":true}}]}`, []string{"!r:a.test"}, ClassPresence, false},
		{"receipts", head + `],"edus":[{"edu_type":"m.receipt","content":{"!b:a.test":{},"!a:a.test":{}}}]}`, []string{"!a:a.test", "!b:a.test"}, ClassPresence, false},
		{"to-device", head + `],"edus":[{"edu_type":"m.direct_to_device","content":{}}]}`, nil, ClassDevice, true},
		{"unknown", head + `],"edus":[{"edu_type":"org.example","content":{"room_id":"!r:a.test"}}]}`, nil, ClassDevice, true},
	} {
		txn, err := ParseTransaction([]byte(tt.body))
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		var rooms []string
		txn.EDURooms(func(room string) bool { rooms = append(rooms, room); return true })
		if !slices.Equal(rooms, tt.rooms) || txn.Class() != tt.class || txn.ForDevices() != tt.devices {
			t.Errorf("%s: rooms %v, class %v, devices %t", tt.name, rooms, txn.Class(), txn.ForDevices())
		}
		if got := SendClass([]byte(tt.body)); got != txn.Class() {
			t.Errorf("%s: SendClass says %v, Class %v", tt.name, got, txn.Class())
		}
		if n := 0; len(tt.rooms) > 1 {
			txn.EDURooms(func(string) bool { n++; return false })
			if n != 1 {
				t.Errorf("%s: %d rooms after the end", tt.name, n)
			}
		}
	}
}

func TestParseSendAnswer(t *testing.T) {
	for _, tt := range []struct {
		body string
		want []PDUError
		err  error
	}{
		{`{}`, nil, nil},
		{` {"pdus":{}}`, nil, nil},
		{`{"pdus":{"$a":{},"$b":{"error":"bad"},"$c":{"error":5},"$d":null,"$e":7}}`, []PDUError{{"$b", "bad"}, {"$c", "an error that is no text"}}, nil},
		{`{"pdus":[]}`, nil, ErrSendAnswer},
		{`[200,{}]`, nil, ErrSendAnswer},
		{`null`, nil, ErrSendAnswer},
		{``, nil, ErrSendAnswer},
		{`<html>`, nil, ErrSendAnswer},
		{`{"pdus":`, nil, ErrSendAnswer},
	} {
		got, err := ParseSendAnswer([]byte(tt.body))
		if !slices.Equal(got, tt.want) || !errors.Is(err, tt.err) {
			t.Errorf("%s: %v, %v", tt.body, got, err)
		}
	}
}

func TestErrorText(t *testing.T) {
	for body, want := range map[string]string{
		`{"errcode":"M_FORBIDDEN","error":"banned"}`: "M_FORBIDDEN: banned",
		`{"errcode":"M_UNKNOWN"}`:                    "M_UNKNOWN",
		`{"error":"x"}`:                              "",
		`<html>`:                                     "",
	} {
		if got := ErrorText([]byte(body)); got != want {
			t.Errorf("%s: %q", body, got)
		}
	}
}

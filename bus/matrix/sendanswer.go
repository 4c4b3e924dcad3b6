package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"slices"
)

// ErrSendAnswer: the body of a 200 to PUT /send is not what a Matrix server
// sends.
var ErrSendAnswer = errors.New("not an answer to a transaction")

// PDUError is one event that a server refused although it took the transaction.
type PDUError struct{ EventID, Error string }

// ParseSendAnswer reads the body of a 200 to PUT /send (S2S "Transactions"): an
// object with a member pdus, of which older servers leave out what went well, or
// all of it. It returns the events that have an error, by id. The error is
// ErrSendAnswer.
func ParseSendAnswer(body []byte) ([]PDUError, error) {
	if b := bytes.TrimLeft(body, " \t\r\n"); len(b) == 0 || b[0] != '{' {
		return nil, ErrSendAnswer
	}
	var answer struct {
		PDUs map[string]json.RawMessage `json:"pdus"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return nil, ErrSendAnswer
	}
	var refused []PDUError
	for _, id := range slices.Sorted(maps.Keys(answer.PDUs)) {
		var result struct {
			Error any `json:"error"`
		}
		// What is no object says nothing about the event.
		if json.Unmarshal(answer.PDUs[id], &result) != nil || result.Error == nil {
			continue
		}
		text, ok := result.Error.(string)
		if !ok {
			text = "an error that is no text"
		}
		refused = append(refused, PDUError{id, text})
	}
	return refused, nil
}

// ErrorCode returns the errcode of an error's body, or "" for anything that is
// not a standard error.
func ErrorCode(body []byte) string {
	var e struct {
		Code string `json:"errcode"`
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	return e.Code
}

// ErrorText returns what a server says in the body of an error: its errcode and
// text, or "" for anything that is not a standard error (CS "Standard error
// response").
func ErrorText(body []byte) string {
	var e struct {
		Code string `json:"errcode"`
		Text string `json:"error"`
	}
	if json.Unmarshal(body, &e) != nil || e.Code == "" {
		return ""
	}
	if e.Text == "" {
		return e.Code
	}
	return e.Code + ": " + e.Text
}

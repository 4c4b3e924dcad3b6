package matrix

const (
	// maxAcknowledged is how many events an answer to a transaction may name. A
	// transaction has MaxPDUs at most; that servers name no others is not said.
	maxAcknowledged = 2 * MaxPDUs
	// maxAcknowledgment is how many bytes the answer may have: ids are short, and an
	// error is a sentence.
	maxAcknowledgment = 1 << 20
)

// AcknowledgedPDUs reads the body of a 200 to PUT /send (S2S "Transactions") for what
// it says of each event: the ids that its member pdus names, in the order of their
// bytes and each once, and how many of them were not taken. Those have an error
// that is not empty, or an entry that is no object and so says nothing.
//
// ok is false for what is no such object: no JSON, no member pdus, larger than any
// answer, or with more ids than it may have. Older servers leave out events that went
// well, or pdus altogether, so a caller must count the ids.
func AcknowledgedPDUs(answer []byte) (ids []string, errors int, ok bool) {
	if len(answer) > maxAcknowledgment {
		return nil, 0, false
	}
	text, err := AppendCanonical(make([]byte, 0, len(answer)), answer, RawNumbers)
	if err != nil || text[0] != '{' {
		return nil, 0, false
	}
	for name, pdus := range canonicalMembers(text) {
		if string(name) != `"pdus"` {
			continue
		}
		if pdus[0] != '{' {
			return nil, 0, false
		}
		for id, entry := range canonicalMembers(pdus) {
			if len(ids) == maxAcknowledged {
				return nil, 0, false
			}
			ids = append(ids, string(appendUnescaped(nil, id[1:len(id)-1])))
			if refused(entry) {
				errors++
			}
		}
		return ids, errors, true
	}
	return nil, 0, false
}

// refused reports whether an entry of an answer says of its event, or leaves open,
// that it was not taken.
func refused(entry []byte) bool {
	if entry[0] != '{' {
		return true
	}
	for name, value := range canonicalMembers(entry) {
		if string(name) == `"error"` {
			return string(value) != "null" && string(value) != `""`
		}
	}
	return false
}

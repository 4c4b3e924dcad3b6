package matrix

// SendClass returns the class of a transaction by the body of its PUT /send:
//
//	ClassEvent     it has PDUs
//	ClassPresence  it has nothing but presence, typing and receipts, or nothing
//	ClassDevice    anything else: to-device messages, device lists, signing keys
//	               and EDUs of types unknown here, which may matter as much
//
// It reads the body once, without validating it and without allocating for its
// content, and stops at the first PDU. A body that it cannot make sense of is
// ClassEvent, so that a reader's mistake never makes anything wait.
func SendClass(body []byte) Class {
	r := jsonReader{src: body}
	class := ClassPresence
	ok := r.members(func(name []byte) bool {
		switch string(name) {
		case "pdus":
			return r.elements(func() bool { return false })
		case "edus":
			return r.elements(func() bool {
				typed := false
				ok := r.members(func(name []byte) bool {
					if string(name) != "edu_type" {
						return r.skipValue()
					}
					typed = true
					eduType, ok := r.plainString()
					switch string(eduType) {
					case "m.presence", "m.typing", "m.receipt":
					default:
						class = ClassDevice
					}
					return ok
				})
				return ok && typed
			})
		}
		return r.skipValue()
	})
	if !ok {
		return ClassEvent
	}
	return class
}

// members walks the object at pos. It calls each with every member's name when
// pos is before the value, which each must step over. It stops and returns false
// when each does, or where there is no such object. Names with escapes count as
// the latter: none of ours has any.
func (r *jsonReader) members(each func(name []byte) bool) bool {
	if !r.skip('{') {
		return false
	}
	if r.skip('}') {
		return true
	}
	for {
		name, ok := r.plainString()
		if !ok || !r.skip(':') || !each(name) {
			return false
		}
		if r.skip('}') {
			return true
		}
		if !r.skip(',') {
			return false
		}
	}
}

// elements walks the array at pos as members walks an object.
func (r *jsonReader) elements(each func() bool) bool {
	if !r.skip('[') {
		return false
	}
	if r.skip(']') {
		return true
	}
	for {
		if !each() {
			return false
		}
		if r.skip(']') {
			return true
		}
		if !r.skip(',') {
			return false
		}
	}
}

// plainString reads a string without escapes.
func (r *jsonReader) plainString() ([]byte, bool) {
	if !r.skip('"') {
		return nil, false
	}
	start := r.pos
	r.plain()
	if r.pos >= len(r.src) || r.src[r.pos] != '"' {
		return nil, false
	}
	r.pos++
	return r.src[start : r.pos-1], true
}

// skipValue steps over a value, whose brackets it only counts. It returns false
// if the text ends first.
func (r *jsonReader) skipValue() bool {
	r.space()
	depth, start := 0, r.pos
	for ; r.pos < len(r.src); r.pos++ {
		switch r.src[r.pos] {
		case '"':
			for r.pos++; r.pos < len(r.src) && r.src[r.pos] != '"'; r.pos++ {
				if r.src[r.pos] == '\\' {
					r.pos++
				}
			}
			if r.pos >= len(r.src) {
				return false
			}
			if depth == 0 {
				r.pos++
				return true
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return r.pos > start // the end of a number or word
			}
			if depth--; depth == 0 {
				r.pos++
				return true
			}
		case ',', ' ', '\t', '\n', '\r':
			if depth == 0 {
				return r.pos > start
			}
		}
	}
	return false
}

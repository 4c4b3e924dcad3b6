package matrix

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"
)

// ErrScan is what StateScan.GaveUp's errors wrap, beside ErrJSONSyntax or
// ErrJSONComplex.
var ErrScan = errors.New("state not scanned to its end")

// maxScanText is the longest string, as it is written, that can be a key id: every
// character may be a \u escape. All else that is looked for is shorter.
const maxScanText = 6 * maxKeyID

// ScanLimits bounds what a StateScan remembers and looks into. A zero or negative
// field means its default.
type ScanLimits struct {
	// Keys is how many pairs of server and key id are remembered. Default: 8192.
	Keys int
	// Servers is how many servers in the room are remembered. After as many invalid
	// names the rest of servers_in_room is stepped over. Default: 8192.
	Servers int
	// Bytes is how much text those of both kinds may have together. Default:
	// 512 KiB.
	Bytes int64
	// Element is the size in bytes of the largest PDU, and of the longest string
	// as it is written, that is looked into; larger ones are stepped over. Default:
	// 64 KiB, the largest event that there is (client-server API, "Size limits").
	Element int64
	// Depth is how deep arrays and objects may nest, the outermost counted.
	// Default: 64.
	Depth int
}

// StateScan reads the body of a send_join or /state answer as it passes by, in
// pieces of any size, and collects whose keys its reader will need and which
// servers are in the room: so the keys can be fetched, and the servers looked up,
// while the rest of the body is still on its way (DESIGN.md 6). It is meant for hints.
// It checks the structure of the JSON, not the inside of strings that it has no
// interest in, and no signature.
//
// Whatever the size of the body, it holds what its limits say, at some 64 bytes for
// each pair and server beside their text (and half as much again until Take), and
// a part of one PDU. Of members with equal names each counts, since what is taken
// cannot be taken back; only of times in one PDU it is the last. NewStateScan makes
// one; the zero value panics.
type StateScan struct {
	limits ScanLimits
	err    error
	offset int64 // of the piece at hand, in the body

	expect scanExpect
	token  scanToken // that the end of the last piece has cut
	stack  []scanPlace
	depth  int
	place  scanPlace // stack[depth-1]
	member scanMember
	index  int64 // of the element in the array around a v1 answer

	// The token that was cut.
	odd  bool   // an odd number of backslashes before the cut
	keep bool   // the string is of interest
	name bool   // ... and names a member
	long bool   // ... but too long
	raw  []byte // ... and so far reads
	rest string // of the word
	part numberPart

	// The number that is being read, if it can be a time; else -1.
	number int64

	// The PDU that is being read.
	start  int64 // in the body
	ts     int64
	pair   []byte // the server, a zero byte, the key id
	server int    // the length of pair up to the zero byte, with it
	listed bool   // the server is in fresh
	// fresh has the pairs that were not known before, each part before a zero
	// byte: a server's name behind serverMark, then its key ids.
	fresh []byte

	text []byte // a decoded string

	known   map[string]struct{} // pairs, as in pair
	members map[string]struct{} // servers in the room
	size    int64               // of the text in both
	keys    []KeyWant           // not taken yet
	servers []ServerName        // not taken yet
	invalid int                 // strings in servers_in_room that are no names

	foundKeys, foundServers, pdus, dropped int64
}

// serverMark stands before a server's name in StateScan.fresh. It can begin no
// key id.
const serverMark = 1

// NewStateScan returns a scanner at the beginning of a body.
func NewStateScan(l ScanLimits) *StateScan {
	if l.Keys <= 0 {
		l.Keys = 8192
	}
	if l.Servers <= 0 {
		l.Servers = 8192
	}
	if l.Bytes <= 0 {
		l.Bytes = 512 << 10
	}
	if l.Element <= 0 {
		l.Element = 64 << 10
	}
	if l.Depth <= 0 {
		l.Depth = 64
	}
	return &StateScan{
		limits:  l,
		stack:   make([]scanPlace, l.Depth),
		known:   make(map[string]struct{}),
		members: make(map[string]struct{}),
	}
}

// Write reads the next piece of the body and keeps none of it. It always returns
// len(p) and nil, so that the scan can stand beside whatever else the body is
// written to; after GaveUp it does nothing.
func (s *StateScan) Write(p []byte) (int, error) {
	if s.err == nil {
		s.scan(p)
		s.offset += int64(len(p))
	}
	return len(p), nil
}

// Take returns what has been found since the last Take, each pair and each server
// once in all, in the order of the body. MinValid is the origin_server_ts of the
// first PDU with that pair, 0 if it has none that a key query can carry (an
// integer, not negative, of 53 bits). A PDU counts when it has ended.
func (s *StateScan) Take() (keys []KeyWant, servers []ServerName) {
	keys, servers = s.keys, s.servers
	s.keys, s.servers = nil, nil
	return keys, servers
}

// Found returns how many pairs of server and key id, servers in the room and PDUs
// have been found, whether they were taken or not. The PDUs are all that have
// ended, those beyond Element too.
func (s *StateScan) Found() (keys, servers, pdus int64) {
	return s.foundKeys, s.foundServers, s.pdus
}

// Dropped returns how often something was left out because a bound was reached:
// a pair or a server that is not remembered, each time that it was met, and a
// PDU beyond Element.
func (s *StateScan) Dropped() int64 { return s.dropped }

// GaveUp returns why the scan has ended before its time, or nil. The error wraps
// ErrScan, and ErrJSONSyntax (what came is not JSON, or neither an object nor an
// array) or ErrJSONComplex (it nests deeper than Depth). What was found before
// stays.
func (s *StateScan) GaveUp() error { return s.err }

// Whole reports whether the body's one value has ended, with nothing but white
// space after it so far.
func (s *StateScan) Whole() bool { return s.err == nil && s.expect == expectNothing }

// scanExpect is what may come next, between tokens.
type scanExpect uint8

const (
	expectBody        scanExpect = iota
	expectValue                  // after a colon, or a comma in an array
	expectElement                // after [
	expectMember                 // after {
	expectName                   // after a comma in an object
	expectColon                  // after a name
	expectArrayComma             // after an array's element
	expectObjectComma            // after an object's member
	expectNothing                // after the end
	scanExpectations             // how many there are
)

// scanToken is a kind of token that pieces can cut.
type scanToken uint8

const (
	tokenNone scanToken = iota
	tokenString
	tokenNumber
	tokenWord
)

// scanPlace is an array or an object by what it is to the scan. The arrays come
// first, and last those objects whose names are looked at.
type scanPlace uint8

const (
	placeArray      scanPlace = iota // of no interest
	placeEnvelope                    // [200, {...}]
	placePDUs                        // of PDUs
	placeServers                     // of servers in the room
	placeObject                      // of no interest
	placeAnswer                      // the answer itself
	placePDU                         // a PDU
	placeSignatures                  // a PDU's signatures
	placeKeys                        // one server's signatures of a PDU
)

// scanMember is what the name before a value says of it.
type scanMember uint8

const (
	memberOther scanMember = iota
	memberPDUs
	memberPDU
	memberServers
	memberSignatures
	memberTime
	memberServer // of a PDU's signatures, its name in pair
)

// scanStep is what a byte means where it stands.
type scanStep uint8

const (
	stepFail scanStep = iota
	stepBlank
	stepName
	stepString
	stepNumber
	stepWord
	stepObject
	stepArray
	stepClose
	stepColon
	stepArrayComma
	stepObjectComma
)

// scanSteps has the step for each byte where each thing is expected.
var scanSteps = func() (t [scanExpectations][256]scanStep) {
	set := func(e scanExpect, chars string, step scanStep) {
		for i := range len(chars) {
			t[e][chars[i]] = step
		}
	}
	for e := range scanExpectations {
		set(e, " \t\r\n", stepBlank)
	}
	for _, e := range []scanExpect{expectBody, expectValue, expectElement} {
		set(e, "{", stepObject)
		set(e, "[", stepArray)
	}
	for _, e := range []scanExpect{expectValue, expectElement} {
		set(e, `"`, stepString)
		set(e, "-0123456789", stepNumber)
		set(e, "tfn", stepWord)
	}
	for _, e := range []scanExpect{expectMember, expectName} {
		set(e, `"`, stepName)
	}
	set(expectElement, "]", stepClose)
	set(expectMember, "}", stepClose)
	set(expectColon, ":", stepColon)
	set(expectArrayComma, ",", stepArrayComma)
	set(expectArrayComma, "]", stepClose)
	set(expectObjectComma, ",", stepObjectComma)
	set(expectObjectComma, "}", stepClose)
	return t
}()

// scan reads a piece.
func (s *StateScan) scan(p []byte) {
	i := 0
	switch s.token {
	case tokenString:
		i = s.resumeString(p, 0)
	case tokenNumber:
		i = s.readNumber(p, 0)
	case tokenWord:
		i = s.readWord(p, 0)
	}
	for i < len(p) && s.err == nil {
		switch scanSteps[s.expect][p[i]] {
		case stepBlank:
			i++
		case stepName:
			i++
			s.expect = expectColon
			if n := bytes.IndexByte(p[i:], '"'); n == 0 || n > 0 && p[i+n-1] != '\\' {
				if s.place >= placeAnswer {
					s.readName(p[i:i+n], s.offset+int64(i))
				}
				i += n + 1
				continue
			}
			i = s.startString(p, i, s.place >= placeAnswer, true)
		case stepString:
			i++
			s.afterValue()
			if n := bytes.IndexByte(p[i:], '"'); n == 0 || n > 0 && p[i+n-1] != '\\' {
				if s.place == placeServers {
					s.readServer(p[i : i+n])
				}
				i += n + 1
				continue
			}
			i = s.startString(p, i, s.place == placeServers, false)
		case stepNumber:
			s.afterValue()
			s.part, s.number = partNone, -1
			if s.place == placePDU && s.member == memberTime {
				s.number = 0
			}
			i = s.readNumber(p, i)
		case stepWord:
			s.afterValue()
			switch p[i] {
			case 't':
				s.rest = "rue"
			case 'f':
				s.rest = "alse"
			case 'n':
				s.rest = "ull"
			}
			i = s.readWord(p, i+1)
		case stepObject:
			s.open(s.objectPlace(), i)
			s.expect = expectMember
			i++
		case stepArray:
			s.open(s.arrayPlace(), i)
			s.expect = expectElement
			i++
		case stepClose:
			i++
			s.close(i)
		case stepColon:
			s.expect = expectValue
			i++
		case stepArrayComma:
			if s.place == placeEnvelope {
				s.index++
			}
			s.expect = expectValue
			i++
		case stepObjectComma:
			s.expect = expectName
			i++
		default:
			s.giveUp(ErrJSONSyntax, i)
		}
	}
}

func (s *StateScan) giveUp(why error, i int) {
	s.err = fmt.Errorf("%w: %w at byte %d", ErrScan, why, s.offset+int64(i))
}

// afterValue sets what is expected after a value in the place where it stands.
func (s *StateScan) afterValue() {
	if s.place < placeObject {
		s.expect = expectArrayComma
	} else {
		s.expect = expectObjectComma
	}
}

// objectPlace returns what an object is that begins here.
func (s *StateScan) objectPlace() scanPlace {
	switch {
	case s.depth == 0, s.place == placeEnvelope && s.index == 1:
		return placeAnswer
	case s.place == placePDUs, s.place == placeAnswer && s.member == memberPDU:
		return placePDU
	case s.place == placePDU && s.member == memberSignatures:
		return placeSignatures
	case s.place == placeSignatures && s.member == memberServer:
		return placeKeys
	}
	return placeObject
}

// arrayPlace returns what an array is that begins here.
func (s *StateScan) arrayPlace() scanPlace {
	switch {
	case s.depth == 0:
		return placeEnvelope
	case s.place == placeAnswer && s.member == memberPDUs:
		return placePDUs
	case s.place == placeAnswer && s.member == memberServers:
		return placeServers
	}
	return placeArray
}

// open enters the array or object at i.
func (s *StateScan) open(place scanPlace, i int) {
	if s.depth == len(s.stack) {
		s.giveUp(ErrJSONComplex, i)
		return
	}
	if place == placePDU {
		s.start, s.ts = s.offset+int64(i), 0
		s.fresh = s.fresh[:0]
	}
	s.stack[s.depth] = place
	s.depth++
	s.place = place
}

// close leaves the array or object that ends before i.
func (s *StateScan) close(i int) {
	if s.place == placePDU {
		s.endPDU(s.offset + int64(i) - s.start)
	}
	if s.depth--; s.depth == 0 {
		s.expect = expectNothing
		return
	}
	s.place = s.stack[s.depth-1]
	s.afterValue()
}

// startString reads a string from after its quote: one that has an escape before
// its end or does not end in this piece.
func (s *StateScan) startString(p []byte, i int, keep, name bool) int {
	s.token, s.odd, s.keep, s.name, s.long = tokenString, false, keep, name, false
	s.raw = s.raw[:0]
	return s.resumeString(p, i)
}

// resumeString reads on in a string from i and returns the index after it.
func (s *StateScan) resumeString(p []byte, i int) int {
	end, ended := s.findQuote(p, i)
	if s.keep && !s.long {
		if s.long = int64(len(s.raw)+end-i) > s.maxText(); !s.long {
			s.raw = append(s.raw, p[i:end]...)
		}
	}
	if !ended {
		return end
	}
	s.token = tokenNone
	switch {
	case s.name:
		s.member = memberOther
		if s.keep && !s.long {
			s.readName(s.raw, s.offset+int64(end))
		}
	case s.keep && s.long:
		s.invalid++
	case s.keep:
		s.readServer(s.raw)
	}
	return end + 1
}

// findQuote returns the index of the quote that ends the string, or len(p) and
// false. Each backslash is looked at once: they are counted back from a quote, or
// from the end of the piece, to where the last count began.
func (s *StateScan) findQuote(p []byte, i int) (end int, ended bool) {
	if s.odd && i < len(p) {
		s.odd = false
		i++
	}
	for {
		n := bytes.IndexByte(p[i:], '"')
		end = i + n
		if n < 0 {
			end = len(p)
		}
		first := end
		for first > i && p[first-1] == '\\' {
			first--
		}
		odd := (end-first)%2 == 1
		switch {
		case n < 0:
			s.odd = s.odd || odd
			return end, false
		case !odd:
			return end, true
		}
		i = end + 1
	}
}

func (s *StateScan) maxText() int64 { return min(maxScanText, s.limits.Element) }

// decode returns the text of a string as it is written between its quotes. It
// reports false for what can be nothing that is looked for: a string that is too
// long, or has an escape that stands for no character.
func (s *StateScan) decode(raw []byte) ([]byte, bool) {
	if int64(len(raw)) > s.maxText() {
		return nil, false
	}
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw, true
	}
	s.text = s.text[:0]
	for r := (jsonReader{src: raw}); r.pos < len(raw); {
		if raw[r.pos] != '\\' {
			s.text = append(s.text, raw[r.pos])
			r.pos++
			continue
		}
		c, ok := r.escape()
		if !ok {
			return nil, false
		}
		s.text = utf8.AppendRune(s.text, c)
	}
	return s.text, true
}

// readName reads the name of a member of an object that is of interest, which
// begins or ends at the offset at in the body.
func (s *StateScan) readName(raw []byte, at int64) {
	s.member = memberOther
	name, ok := s.decode(raw)
	if !ok {
		return
	}
	switch s.place {
	case placeAnswer:
		switch string(name) {
		case "state", "auth_chain", "pdus", "auth_events":
			s.member = memberPDUs
		case "event":
			s.member = memberPDU
		case "servers_in_room":
			s.member = memberServers
		}
	case placePDU:
		switch string(name) {
		case "signatures":
			s.member = memberSignatures
		case "origin_server_ts":
			s.member, s.ts = memberTime, 0
		}
	case placeSignatures:
		if mayBeServer(name) {
			s.member, s.listed = memberServer, false
			s.pair = append(append(s.pair[:0], name...), 0)
			s.server = len(s.pair)
		}
	case placeKeys:
		s.readKeyID(name, at)
	}
}

// readKeyID notes a key id of the server in pair, if both together are new.
func (s *StateScan) readKeyID(id []byte, at int64) {
	if !isEventKeyID(id) {
		return
	}
	s.pair = append(s.pair[:s.server], id...)
	if _, ok := s.known[string(s.pair)]; ok {
		return
	}
	// A PDU that is too large will be left out: fresh need not grow on.
	if at-s.start > s.limits.Element {
		return
	}
	if !s.listed {
		s.listed = true
		s.fresh = append(append(s.fresh, serverMark), s.pair[:s.server]...)
	}
	s.fresh = append(append(s.fresh, id...), 0)
}

// endPDU takes what a PDU of so many bytes has brought.
func (s *StateScan) endPDU(size int64) {
	s.pdus++
	if size > s.limits.Element {
		s.dropped++
		return
	}
	for rest := s.fresh; len(rest) > 0; {
		n := bytes.IndexByte(rest, 0)
		if part := rest[:n]; part[0] == serverMark {
			s.pair = append(append(s.pair[:0], part[1:]...), 0)
			s.server = len(s.pair)
		} else {
			s.pair = append(s.pair[:s.server], part...)
			s.addPair()
		}
		rest = rest[n+1:]
	}
}

// addPair remembers pair if it is new, its server's name valid, and there is room.
func (s *StateScan) addPair() {
	if _, ok := s.known[string(s.pair)]; ok {
		return // a second time in this PDU
	}
	pair := string(s.pair)
	server, err := ParseServerName(pair[:s.server-1])
	if err != nil {
		return
	}
	size := int64(len(pair) - 1)
	if len(s.known) >= s.limits.Keys || s.size+size > s.limits.Bytes {
		s.dropped++
		return
	}
	s.size += size
	s.foundKeys++
	s.known[pair] = struct{}{}
	s.keys = append(s.keys, KeyWant{Server: server, KeyID: pair[s.server:], MinValid: Timestamp(s.ts)})
}

// readServer reads an element of servers_in_room.
func (s *StateScan) readServer(raw []byte) {
	// An invalid name costs more than it takes to send. A list that has this many
	// is none of servers.
	if s.invalid >= s.limits.Servers {
		return
	}
	name, ok := s.decode(raw)
	if !ok || !mayBeServer(name) {
		s.invalid++
		return
	}
	if _, ok := s.members[string(name)]; ok {
		return
	}
	server, err := ParseServerName(string(name))
	if err != nil {
		s.invalid++
		return
	}
	size := int64(len(server))
	if len(s.members) >= s.limits.Servers || s.size+size > s.limits.Bytes {
		s.dropped++
		return
	}
	s.size += size
	s.foundServers++
	s.members[string(server)] = struct{}{}
	s.servers = append(s.servers, server)
}

// readWord reads what is left of true, false or null.
func (s *StateScan) readWord(p []byte, i int) int {
	for ; i < len(p) && s.rest != ""; i++ {
		if p[i] != s.rest[0] {
			s.giveUp(ErrJSONSyntax, i)
			return i
		}
		s.rest = s.rest[1:]
	}
	s.token = tokenNone
	if s.rest != "" {
		s.token = tokenWord
	}
	return i
}

// numberPart is the part of a number that its last byte belongs to.
type numberPart uint8

const (
	partNone     numberPart = iota // before the first
	partMinus                      // digits must follow
	partZero                       // the only digit before a point
	partInteger                    // digits
	partPoint                      // digits must follow
	partFraction                   // digits
	partE                          // a sign or digits must follow
	partSign                       // digits must follow
	partExponent                   // digits
)

// readNumber reads a number, or what is left of it, and returns the index after it.
func (s *StateScan) readNumber(p []byte, i int) int {
	s.token = tokenNone
	for ; i < len(p); i++ {
		c := p[i]
		digit := c >= '0' && c <= '9'
		switch {
		case digit && s.part == partInteger:
		case digit && s.part <= partMinus && c == '0':
			s.part = partZero
		case digit && s.part <= partMinus:
			s.part = partInteger
		case digit && (s.part == partPoint || s.part == partFraction):
			s.part = partFraction
		case digit && s.part >= partE:
			s.part = partExponent
		case c == '-' && s.part == partNone:
			s.part = partMinus
		case c == '.' && (s.part == partZero || s.part == partInteger):
			s.part = partPoint
		case c|0x20 == 'e' && (s.part == partZero || s.part == partInteger || s.part == partFraction):
			s.part = partE
		case (c == '+' || c == '-') && s.part == partE:
			s.part = partSign
		default:
			s.endNumber(i)
			return i
		}
		if s.number >= 0 {
			s.number = s.number*10 + int64(c-'0')
			if !digit || s.number > maxJSONInteger {
				s.number = -1
			}
		}
	}
	s.token = tokenNumber
	return i
}

// endNumber takes the number that ends before i.
func (s *StateScan) endNumber(i int) {
	switch s.part {
	case partZero, partInteger, partFraction, partExponent:
		if s.number >= 0 {
			s.ts = s.number
		}
	default:
		s.giveUp(ErrJSONSyntax, i)
	}
}

// serverBytes are those that server names are made of.
var serverBytes = func() (t [256]bool) {
	for _, c := range []byte("-.:[]0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		t[c] = true
	}
	return t
}()

// mayBeServer tells most of what is no server name from what may be one, without
// the cost of ParseServerName's errors.
func mayBeServer(name []byte) bool {
	for _, c := range name {
		if !serverBytes[c] {
			return false
		}
	}
	return len(name) > 0 && len(name) <= MaxServerName
}

// isEventKeyID reports whether id may be that of a key that signs events: of the
// one algorithm that there is.
func isEventKeyID(id []byte) bool {
	const prefix = keyAlgorithm + ":"
	return len(id) > len(prefix) && string(id[:len(prefix)]) == prefix && isKeyID(id)
}

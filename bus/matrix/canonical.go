package matrix

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// Bounds of what AppendCanonical takes. Real traffic stays far below all three;
// they keep the work that one hostile body can cause proportional to its size.
const (
	// MaxJSONDepth is how deep arrays and objects may nest, the outermost
	// counted. Nothing that servers send comes near it.
	MaxJSONDepth = 1000
	// MaxJSONMembers is how many members the objects around any one point may
	// have in all. Each costs 16 bytes (32 on 64-bit) while its object is open.
	MaxJSONMembers = 1 << 17
	// maxJSONMoves is how often, per byte of the input, members may be moved to
	// put nested objects in order.
	maxJSONMoves = 64
)

// What CanonicalJSON and AppendCanonical return, wrapped with the offset.
var (
	// ErrJSONSyntax: not JSON, not UTF-8, or a string with half a surrogate pair.
	ErrJSONSyntax = errors.New("invalid JSON")
	// ErrJSONNumber: a number that canonical JSON cannot express.
	ErrJSONNumber = errors.New("number is not an integer of at most 53 bits")
	// ErrJSONComplex: beyond MaxJSONDepth, MaxJSONMembers or the bound on moves.
	ErrJSONComplex = errors.New("JSON too deep or too complex")
)

// maxJSONInteger is the largest magnitude that canonical JSON allows.
const maxJSONInteger = 1<<53 - 1

// Numbers says what AppendCanonical does with numbers. The zero value is
// StrictNumbers.
type Numbers uint8

const (
	// StrictNumbers writes integers in [-(2^53)+1, (2^53)-1] in their shortest
	// form (-0 as 0, 1e10 as 10000000000, as the appendices' examples do) and
	// refuses every other number with ErrJSONNumber.
	StrictNumbers Numbers = iota
	// RawNumbers copies each number as it stands. The events of room versions 1
	// to 5 may carry large integers and fractions (appendices, "Canonical
	// JSON"), which a transaction must be able to carry and sign. Since their
	// sender wrote them the way it signed them, leaving them alone is right.
	RawNumbers
	// PythonNumbers writes each number as Python's json does after reading it, which is
	// what a Synapse signs and verifies.
	PythonNumbers
)

// CanonicalJSON returns the canonical form of one JSON value (appendices,
// "Canonical JSON") with StrictNumbers. Of members with equal names the last
// counts, as in Python's json and so in Synapse. The errors wrap ErrJSONSyntax,
// ErrJSONNumber or ErrJSONComplex.
func CanonicalJSON(raw []byte) ([]byte, error) {
	b, err := AppendCanonical(make([]byte, 0, len(raw)), raw, StrictNumbers)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// AppendCanonical appends the canonical form of the JSON value raw to dst, as
// CanonicalJSON but with a choice about numbers. raw must not overlap dst's
// spare capacity. On an error dst comes back with its old length.
func AppendCanonical(dst, raw []byte, n Numbers) ([]byte, error) {
	c := canonicalizer{jsonReader: jsonReader{src: raw}, dst: dst, numbers: n}
	err := c.value(0)
	if err == nil {
		c.space()
		if c.pos < len(raw) {
			err = c.syntax("more after the value")
		}
	}
	if err != nil {
		return dst, err
	}
	return c.dst, nil
}

// canonicalizer reads src once, front to back, and writes values to dst as it
// meets them. Only when an object's members turn out not to be in order are
// they rearranged, in dst, once the object ends. What Synapse sends is already
// canonical, so the usual cost is one pass and no memory but dst.
type canonicalizer struct {
	jsonReader
	dst     []byte
	numbers Numbers
	members []member // of all objects that are open
	names   []byte   // decoded names that are written with escapes
	scratch []byte   // an object's members while they are rearranged
	moved   int64    // bytes rearranged so far
}

// member is a member of an object as it stands in dst: the text `"name":value`.
// Names order by their decoded text, which is the written one between the
// quotes unless that has escapes; only then does name point into names.
type member struct {
	start, end       int // in dst
	nameAt, nameSize int // in dst; if escaped, nameAt is -1 - offset in names
}

func (c *canonicalizer) value(depth int) error {
	c.space()
	if c.pos >= len(c.src) {
		return c.syntax("no value")
	}
	switch b := c.src[c.pos]; b {
	case '{':
		return c.object(depth + 1)
	case '[':
		return c.array(depth + 1)
	case '"':
		_, err := c.stringValue()
		return err
	case 't':
		return c.literal("true")
	case 'f':
		return c.literal("false")
	case 'n':
		return c.literal("null")
	default:
		return c.number()
	}
}

func (c *canonicalizer) array(depth int) error {
	if depth > MaxJSONDepth {
		return c.complexity("depth")
	}
	c.pos++
	c.dst = append(c.dst, '[')
	if c.skip(']') {
		c.dst = append(c.dst, ']')
		return nil
	}
	for {
		if err := c.value(depth); err != nil {
			return err
		}
		switch {
		case c.skip(','):
			c.dst = append(c.dst, ',')
		case c.skip(']'):
			c.dst = append(c.dst, ']')
			return nil
		default:
			return c.syntax("expected , or ] in an array")
		}
	}
}

func (c *canonicalizer) object(depth int) error {
	if depth > MaxJSONDepth {
		return c.complexity("depth")
	}
	c.pos++
	c.dst = append(c.dst, '{')
	if c.skip('}') {
		c.dst = append(c.dst, '}')
		return nil
	}
	firstMember, firstName, sorted := len(c.members), len(c.names), true
	for {
		if len(c.members) == MaxJSONMembers {
			return c.complexity("members")
		}
		m := member{start: len(c.dst)}
		c.space()
		if c.pos >= len(c.src) || c.src[c.pos] != '"' {
			return c.syntax("expected a member's name")
		}
		escaped, err := c.stringValue()
		if err != nil {
			return err
		}
		m.nameAt, m.nameSize = m.start+1, len(c.dst)-m.start-2
		if escaped {
			at := len(c.names)
			c.names = appendUnescaped(c.names, c.dst[m.nameAt:m.nameAt+m.nameSize])
			m.nameAt, m.nameSize = -1-at, len(c.names)-at
		}
		if !c.skip(':') {
			return c.syntax("expected : after a member's name")
		}
		c.dst = append(c.dst, ':')
		if err := c.value(depth); err != nil {
			return err
		}
		m.end = len(c.dst)
		if n := len(c.members); sorted && n > firstMember {
			sorted = bytes.Compare(c.name(c.members[n-1]), c.name(m)) < 0
		}
		c.members = append(c.members, m)
		if c.skip(',') {
			c.dst = append(c.dst, ',')
			continue
		}
		if !c.skip('}') {
			return c.syntax("expected , or } in an object")
		}
		break
	}
	if !sorted {
		if err := c.rearrange(c.members[firstMember:]); err != nil {
			return err
		}
	}
	c.members = c.members[:firstMember]
	c.names = c.names[:firstName]
	c.dst = append(c.dst, '}')
	return nil
}

// rearrange puts the members of the object at the end of dst in order and drops
// all but the last of those with equal names.
func (c *canonicalizer) rearrange(ms []member) error {
	start := ms[0].start
	size := len(c.dst) - start
	if c.moved += int64(size); c.moved/maxJSONMoves > int64(len(c.src)) {
		return c.complexity("nested objects out of order")
	}
	slices.SortFunc(ms, func(a, b member) int {
		if n := bytes.Compare(c.name(a), c.name(b)); n != 0 {
			return n
		}
		return a.start - b.start
	})
	// The names may lie in dst: settle which members stay before it changes.
	keep := ms[:0]
	for i, m := range ms {
		if i+1 < len(ms) && bytes.Equal(c.name(m), c.name(ms[i+1])) {
			continue
		}
		keep = append(keep, m)
	}
	c.scratch = append(c.scratch[:0], c.dst[start:]...)
	c.dst = c.dst[:start]
	for i, m := range keep {
		if i > 0 {
			c.dst = append(c.dst, ',')
		}
		c.dst = append(c.dst, c.scratch[m.start-start:m.end-start]...)
	}
	return nil
}

func (c *canonicalizer) name(m member) []byte {
	if m.nameAt < 0 {
		at := -1 - m.nameAt
		return c.names[at : at+m.nameSize]
	}
	return c.dst[m.nameAt : m.nameAt+m.nameSize]
}

func (c *canonicalizer) literal(word string) error {
	if !bytes.HasPrefix(c.src[c.pos:], []byte(word)) {
		return c.syntax("unknown word")
	}
	c.pos += len(word)
	c.dst = append(c.dst, word...)
	return nil
}

func (c *canonicalizer) number() error {
	text, integer := c.numberText()
	if text == nil {
		return c.syntax("expected a value")
	}
	switch c.numbers {
	case RawNumbers:
		c.dst = append(c.dst, text...)
		return nil
	case PythonNumbers:
		var ok bool
		if c.dst, ok = appendPythonNumber(c.dst, text, integer); !ok {
			return fmt.Errorf("%w: at byte %d", ErrJSONNumber, c.pos)
		}
		return nil
	}
	if !integer || len(text) > 16 || string(text) == "-0" {
		var ok bool
		if c.dst, ok = appendInteger(c.dst, text); !ok {
			return fmt.Errorf("%w: at byte %d", ErrJSONNumber, c.pos)
		}
		return nil
	}
	// Up to 15 digits and a sign, or 16 digits: only the latter can be too large.
	if len(text) == 16 && text[0] != '-' && string(text) > "9007199254740991" {
		return fmt.Errorf("%w: at byte %d", ErrJSONNumber, c.pos)
	}
	c.dst = append(c.dst, text...)
	return nil
}

// appendPythonNumber appends a JSON number as Python writes it again: integers as they
// are, all else as the shortest text that gives the same 64-bit float, with an exponent
// from 1e16 on and below 1e-4 (float.__repr__).
func appendPythonNumber(dst, text []byte, integer bool) ([]byte, bool) {
	if integer {
		if string(text) == "-0" {
			text = text[1:]
		}
		return append(dst, text...), true
	}
	f, err := strconv.ParseFloat(string(text), 64)
	if err != nil {
		return dst, false // it is infinite, which is not JSON
	}
	e := strconv.AppendFloat(nil, f, 'e', -1, 64)
	exponent, _ := strconv.Atoi(string(e[bytes.IndexByte(e, 'e')+1:]))
	if exponent < -4 || exponent >= 16 {
		return append(dst, e...), true
	}
	start := len(dst)
	dst = strconv.AppendFloat(dst, f, 'f', -1, 64)
	if bytes.IndexByte(dst[start:], '.') < 0 {
		dst = append(dst, ".0"...)
	}
	return dst, true
}

// appendInteger appends the value of a JSON number, which may have a fraction
// and an exponent, if it is an integer in range. It is exact: it moves decimal
// digits and never rounds.
func appendInteger(dst, text []byte) ([]byte, bool) {
	negative := text[0] == '-'
	if negative {
		text = text[1:]
	}
	mantissa, exponent := text, int64(0)
	if i := bytes.IndexAny(text, "eE"); i >= 0 {
		mantissa = text[:i]
		exponent = parseExponent(text[i+1:])
	}
	var digits [16]byte // without leading zeros
	n, zeros, point := 0, 0, -1
	for i, b := range mantissa {
		switch {
		case b == '.':
			point = i
		case b == '0':
			zeros++ // counts only if a digit follows
			if n == 0 {
				zeros = 0
			}
		default:
			if n+zeros+1 > len(digits) {
				return dst, false
			}
			for ; zeros > 0; zeros-- {
				digits[n] = '0'
				n++
			}
			digits[n] = b
			n++
		}
	}
	if n == 0 {
		return append(dst, '0'), true
	}
	if point >= 0 {
		exponent -= int64(len(mantissa) - 1 - point)
	}
	exponent += int64(zeros) // the zeros at the end of the mantissa
	if exponent < 0 || int64(n)+exponent > int64(len(digits)) {
		return dst, false
	}
	for ; exponent > 0; exponent-- {
		digits[n] = '0'
		n++
	}
	if n == 16 && string(digits[:]) > "9007199254740991" {
		return dst, false
	}
	if negative {
		dst = append(dst, '-')
	}
	return append(dst, digits[:n]...), true
}

// parseExponent reads what follows the E. An exponent that no mantissa in memory
// can make up for comes back as some number as hopeless.
func parseExponent(b []byte) int64 {
	const hopeless = 1 << 40
	negative := false
	if b[0] == '+' || b[0] == '-' {
		negative = b[0] == '-'
		b = b[1:]
	}
	n := int64(0)
	for _, d := range b {
		if n = n*10 + int64(d-'0'); n > hopeless {
			n = hopeless
			break
		}
	}
	if negative {
		return -n
	}
	return n
}

// stringValue copies the string at pos to dst in canonical form and reports
// whether it is written there with escapes.
func (c *canonicalizer) stringValue() (escaped bool, err error) {
	c.pos++
	c.dst = append(c.dst, '"')
	for {
		start := c.pos
		c.plain()
		c.dst = append(c.dst, c.src[start:c.pos]...)
		if c.pos >= len(c.src) {
			return false, c.syntax("string without an end")
		}
		switch b := c.src[c.pos]; {
		case b == '"':
			c.pos++
			c.dst = append(c.dst, '"')
			return escaped, nil
		case b == '\\':
			r, ok := c.escape()
			if !ok {
				return false, c.syntax("bad escape")
			}
			if r < ' ' || r == '"' || r == '\\' {
				escaped = true
				c.dst = appendEscape(c.dst, byte(r))
			} else {
				c.dst = utf8.AppendRune(c.dst, r)
			}
		default:
			return false, c.syntax("control character or invalid UTF-8 in a string")
		}
	}
}

func (c *canonicalizer) complexity(what string) error {
	return fmt.Errorf("%w: %s at byte %d", ErrJSONComplex, what, c.pos)
}

// AppendString appends s as a canonical JSON string, quotes included. Bytes
// that are not UTF-8 become U+FFFD.
func AppendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		b := s[i]
		if b >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n == 1 {
				dst = append(dst, s[start:i]...)
				dst = utf8.AppendRune(dst, utf8.RuneError)
				start = i + 1
			}
			i += n
			continue
		}
		if b < ' ' || b == '"' || b == '\\' {
			dst = append(dst, s[start:i]...)
			dst = appendEscape(dst, b)
			start = i + 1
		}
		i++
	}
	dst = append(dst, s[start:]...)
	return append(dst, '"')
}

// appendEscape appends the shortest escape of a control character, a quote or a
// backslash.
func appendEscape(dst []byte, b byte) []byte {
	switch b {
	case '"', '\\':
		return append(dst, '\\', b)
	case '\b':
		return append(dst, '\\', 'b')
	case '\t':
		return append(dst, '\\', 't')
	case '\n':
		return append(dst, '\\', 'n')
	case '\f':
		return append(dst, '\\', 'f')
	case '\r':
		return append(dst, '\\', 'r')
	}
	const hex = "0123456789abcdef"
	return append(dst, '\\', 'u', '0', '0', hex[b>>4], hex[b&15])
}

// appendUnescaped appends the decoded text of the inside of a string that this
// package wrote.
func appendUnescaped(dst, text []byte) []byte {
	r := jsonReader{src: text}
	for r.pos < len(text) {
		if text[r.pos] != '\\' {
			dst = append(dst, text[r.pos])
			r.pos++
			continue
		}
		c, ok := r.escape()
		if !ok {
			panic(fmt.Sprintf("matrix: own escape unreadable at %d of %q", r.pos, text))
		}
		dst = utf8.AppendRune(dst, c)
	}
	return dst
}

// jsonReader is the lexical part that the readers of JSON here share.
type jsonReader struct {
	src []byte
	pos int
}

func (r *jsonReader) syntax(what string) error {
	return fmt.Errorf("%w: %s at byte %d", ErrJSONSyntax, what, r.pos)
}

func (r *jsonReader) space() {
	for r.pos < len(r.src) {
		switch r.src[r.pos] {
		case ' ', '\t', '\n', '\r':
			r.pos++
		default:
			return
		}
	}
}

// skip steps over white space and then over b, if b comes next.
func (r *jsonReader) skip(b byte) bool {
	r.space()
	if r.pos < len(r.src) && r.src[r.pos] == b {
		r.pos++
		return true
	}
	return false
}

// plain steps over characters that stand for themselves in a string. It stops
// at a quote, a backslash, a control character, invalid UTF-8 or the end.
func (r *jsonReader) plain() {
	for r.pos < len(r.src) {
		switch b := r.src[r.pos]; {
		case b == '"' || b == '\\' || b < ' ':
			return
		case b < utf8.RuneSelf:
			r.pos++
		default:
			c, n := utf8.DecodeRune(r.src[r.pos:])
			if c == utf8.RuneError && n == 1 {
				return
			}
			r.pos += n
		}
	}
}

// escape reads the escape sequence at pos, both halves of a surrogate pair at
// once. Half a pair is no character and so no valid escape: Python would read
// it but could not write it again, and what Go's own decoder makes of it, U+FFFD,
// would no longer fit the signature.
func (r *jsonReader) escape() (rune, bool) {
	if r.pos+1 >= len(r.src) {
		return 0, false
	}
	b := r.src[r.pos+1]
	switch b {
	case 'u':
		c, ok := r.hex4()
		if !ok || !utf16.IsSurrogate(c) {
			return c, ok
		}
		low, ok := r.hex4()
		c = utf16.DecodeRune(c, low)
		return c, ok && c != utf8.RuneError
	case '"', '\\', '/':
	case 'b':
		b = '\b'
	case 'f':
		b = '\f'
	case 'n':
		b = '\n'
	case 'r':
		b = '\r'
	case 't':
		b = '\t'
	default:
		return 0, false
	}
	r.pos += 2
	return rune(b), true
}

// hex4 reads \uXXXX.
func (r *jsonReader) hex4() (rune, bool) {
	if len(r.src)-r.pos < 6 || r.src[r.pos] != '\\' || r.src[r.pos+1] != 'u' {
		return 0, false
	}
	var c rune
	for _, h := range r.src[r.pos+2 : r.pos+6] {
		switch {
		case h >= '0' && h <= '9':
			h -= '0'
		case h >= 'a' && h <= 'f':
			h -= 'a' - 10
		case h >= 'A' && h <= 'F':
			h -= 'A' - 10
		default:
			return 0, false
		}
		c = c<<4 | rune(h)
	}
	r.pos += 6
	return c, true
}

// numberText steps over the number at pos and returns its text, or nil if there
// is none. integer is false if it has a fraction or an exponent.
func (r *jsonReader) numberText() (text []byte, integer bool) {
	start, integer := r.pos, true
	p := r.pos
	digits := func() bool {
		from := p
		for p < len(r.src) && r.src[p] >= '0' && r.src[p] <= '9' {
			p++
		}
		return p > from
	}
	if p < len(r.src) && r.src[p] == '-' {
		p++
	}
	if p < len(r.src) && r.src[p] == '0' {
		p++
	} else if !digits() {
		return nil, false
	}
	if p < len(r.src) && r.src[p] == '.' {
		p++
		integer = false
		if !digits() {
			return nil, false
		}
	}
	if p < len(r.src) && (r.src[p] == 'e' || r.src[p] == 'E') {
		p++
		integer = false
		if p < len(r.src) && (r.src[p] == '+' || r.src[p] == '-') {
			p++
		}
		if !digits() {
			return nil, false
		}
	}
	r.pos = p
	return r.src[start:p], integer
}

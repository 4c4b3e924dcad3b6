package matrix

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// What ParseKeyQuery returns, wrapped.
var (
	// ErrKeyQuery: not a query for keys.
	ErrKeyQuery = errors.New("malformed key query")
	// ErrTooManyKeys: more keys than the caller takes.
	ErrTooManyKeys = errors.New("too many keys in a query")
)

// KeyWant is one key that somebody needs.
type KeyWant struct {
	Server ServerName
	KeyID  string // "ed25519:a_abc"; "" is any key of the server
	// MinValid is for when the key must be valid, minimum_valid_until_ts: Unix
	// time in milliseconds.
	MinValid Timestamp
}

// ParseKeyQuery reads the body of a POST /_matrix/key/v2/query (S2S "Querying keys
// through another server"): {"server_keys": {server: {key id: {
// "minimum_valid_until_ts": n}}}}. The result is sorted by server and key id, no
// two of the same. A server without key ids is wanted with "" for one, and a key
// without a minimum must be valid at now, Unix time in milliseconds. Of members
// with equal names the last counts.
//
// A Synapse puts names, key ids and minimums in its queries that come from other
// servers' events, so one of them must not cost it the others: a name that is no
// server's, and an id that no server's keys can have (CheckServerKeys), is left
// out, and a minimum that is no integer of canonical JSON counts as the greatest
// one. More than most keys make it
// ErrTooManyKeys. Everything else is ErrKeyQuery.
func ParseKeyQuery(body []byte, now Timestamp, most int) ([]KeyWant, error) {
	b, err := AppendCanonical(make([]byte, 0, len(body)), body, RawNumbers)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeyQuery, err)
	}
	q := keyQueryReader{now: now, most: most}
	asked := false
	err = eachCanonical(b, func(name, value []byte) error {
		if string(name) != "server_keys" {
			return nil
		}
		asked = true
		return eachCanonical(value, q.server)
	})
	switch {
	case errors.Is(err, ErrTooManyKeys):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrKeyQuery, err)
	case !asked:
		return nil, fmt.Errorf("%w: no server_keys", ErrKeyQuery)
	}
	return q.wants, nil
}

// keyQueryReader collects what a query asks for. Canonical JSON has it in the
// order of the result.
type keyQueryReader struct {
	now   Timestamp
	most  int
	wants []KeyWant
}

func (q *keyQueryReader) server(name, keys []byte) error {
	server, err := ParseServerName(string(name))
	if err != nil {
		return nil // nobody has its keys; the others shall not go without theirs
	}
	all := true
	err = eachCanonical(keys, func(id, criteria []byte) error {
		all = false
		minimum, err := q.minimum(criteria)
		if err != nil || !isKeyID(id) {
			return err
		}
		return q.add(KeyWant{Server: server, KeyID: string(id), MinValid: minimum})
	})
	if err != nil || !all {
		return err
	}
	return q.add(KeyWant{Server: server, MinValid: q.now})
}

func (q *keyQueryReader) minimum(criteria []byte) (Timestamp, error) {
	minimum := q.now
	err := eachCanonical(criteria, func(name, value []byte) error {
		if string(name) != "minimum_valid_until_ts" {
			return nil
		}
		switch value[0] {
		case '"', '{', '[', 't', 'f':
			return errors.New("minimum_valid_until_ts is no number")
		case 'n': // null, which Synapse takes for none
			return nil
		}
		minimum = maxJSONInteger
		if n, ok := jsonInteger(value); ok {
			minimum = Timestamp(n)
		}
		return nil
	})
	return minimum, err
}

func (q *keyQueryReader) add(w KeyWant) error {
	if len(q.wants) >= q.most {
		return fmt.Errorf("%w: at most %d", ErrTooManyKeys, q.most)
	}
	q.wants = append(q.wants, w)
	return nil
}

// AppendKeyQuery appends the body of a query for wants, in canonical JSON. It
// does not change wants, which are best in the order of ParseKeyQuery's result. Of
// several for one key the greatest MinValid counts. One for any key of a server
// asks for all that it has, and makes the others of the server superfluous.
func AppendKeyQuery(dst []byte, wants []KeyWant) []byte {
	if !slices.IsSortedFunc(wants, compareWants) {
		wants = slices.Clone(wants)
		slices.SortFunc(wants, compareWants)
	}
	dst = append(dst, `{"server_keys":{`...)
	for i := 0; i < len(wants); {
		server := wants[i].Server
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(AppendString(dst, string(server)), ':', '{')
		all, first := wants[i].KeyID == "", true
		for ; i < len(wants) && wants[i].Server == server; i++ {
			w := wants[i]
			if all || i+1 < len(wants) && wants[i+1].Server == server && wants[i+1].KeyID == w.KeyID {
				continue // the last of equal ones has the greatest minimum
			}
			if !first {
				dst = append(dst, ',')
			}
			first = false
			dst = append(AppendString(dst, w.KeyID), `:{"minimum_valid_until_ts":`...)
			dst = strconv.AppendInt(dst, min(max(int64(w.MinValid), -maxJSONInteger), maxJSONInteger), 10)
			dst = append(dst, '}')
		}
		dst = append(dst, '}')
	}
	return append(dst, "}}"...)
}

func compareWants(a, b KeyWant) int {
	return cmp.Or(
		cmp.Compare(a.Server, b.Server),
		cmp.Compare(a.KeyID, b.KeyID),
		cmp.Compare(a.MinValid, b.MinValid),
	)
}

// What stands around the objects, with commas between them, in an answer to a key
// query.
const (
	KeyAnswerBegin = `{"server_keys":[`
	KeyAnswerEnd   = `]}`
)

// keyAnswerBuffer is how much of an answer is read at once, in bytes.
const keyAnswerBuffer = 4 << 10

// KeyAnswerReader takes a notary's answer to a key query apart while it arrives.
// Besides a fixed buffer it holds one element of server_keys in memory, of at most
// MaxServerKeys. The zero value is not usable.
//
// It checks the grammar of the whole answer, to the depth that an answer of ours
// may have, but nothing of what an element says: that is for CheckServerKeys.
type KeyAnswerReader struct {
	r        io.Reader
	buf      []byte // buf[pos:end] is read but not consumed
	pos, end int
	before   int64 // bytes before buf
	readErr  error // of r; io.EOF at the end

	kept    []byte // what was consumed since keep, but for buf[mark:pos]
	keeping bool
	mark    int
	over    bool // it is more than MaxServerKeys

	depth int                    // of what is open in a value
	array [MaxJSONDepth + 1]bool // what is open, by depth: an array or an object

	next              keyAnswerPart
	asked             bool // there was a member server_keys
	elements, skipped int
	maxElements       int
	err               error // what Next returns from now on
}

// keyAnswerPart is what comes next in the outer object.
type keyAnswerPart uint8

const (
	answerStart keyAnswerPart = iota
	answerMember
	answerAfterMember
	answerElement
	answerAfterElement
	answerEnd
)

// NewKeyAnswerReader reads an answer from r. More than maxElements elements, those
// that are skipped included, are an error.
func NewKeyAnswerReader(r io.Reader, maxElements int) *KeyAnswerReader {
	return &KeyAnswerReader{r: r, buf: make([]byte, keyAnswerBuffer), maxElements: maxElements}
}

// Skipped returns how many elements so far had more than MaxServerKeys bytes and
// were left out.
func (k *KeyAnswerReader) Skipped() int { return k.skipped }

// Next returns the next element of server_keys as it stands in the answer. It is
// valid until the next call. At the end of a whole and well-formed answer the
// error is io.EOF, else one that wraps ErrServerKeys and the error of the reader,
// if it is its fault. The elements before it stand all the same. An answer with
// two members server_keys is not well-formed: which of them counts is known too
// late. After an error Next returns that again.
func (k *KeyAnswerReader) Next() ([]byte, error) {
	for k.err == nil {
		element, err := k.step()
		if err != nil {
			k.err = err
			k.kept = nil
		} else if element != nil {
			return element, nil
		}
	}
	return nil, k.err
}

// step reads one part of the answer. It returns nil unless that is an element.
func (k *KeyAnswerReader) step() ([]byte, error) {
	c, ok := k.token()
	if !ok && k.next != answerEnd {
		return nil, k.cut()
	}
	switch k.next {
	case answerStart:
		if c != '{' {
			return nil, k.syntax("not an object")
		}
		k.pos++
		k.next = answerMember
		if c, ok := k.token(); ok && c == '}' {
			k.next = answerAfterMember
		}
	case answerMember:
		return nil, k.member()
	case answerAfterMember:
		switch c {
		case ',':
			k.next = answerMember
		case '}':
			k.next = answerEnd
		default:
			return nil, k.syntax("expected , or } in an object")
		}
		k.pos++
	case answerElement:
		return k.element()
	case answerAfterElement:
		switch c {
		case ',':
			k.next = answerElement
		case ']':
			k.next = answerAfterMember
		default:
			return nil, k.syntax("expected , or ] in an array")
		}
		k.pos++
	case answerEnd:
		switch {
		case ok:
			return nil, k.syntax("more after the answer")
		case k.readErr != io.EOF:
			return nil, k.cut()
		case !k.asked:
			return nil, fmt.Errorf("%w: an answer without server_keys", ErrServerKeys)
		}
		return nil, io.EOF
	}
	return nil, nil
}

// member reads a member of the answer, of server_keys only the start.
func (k *KeyAnswerReader) member() error {
	k.keep()
	err := k.name()
	name, whole := k.taken()
	if err != nil {
		return err
	}
	if err := k.colon(); err != nil {
		return err
	}
	if !whole || !isJSONString(name, "server_keys") {
		k.next = answerAfterMember
		return k.value(1)
	}
	if k.asked {
		return k.syntax("server_keys given twice")
	}
	k.asked = true
	switch c, ok := k.token(); {
	case !ok:
		return k.cut()
	case c != '[':
		return k.syntax("server_keys is not an array")
	}
	k.pos++
	k.next = answerElement
	if c, ok := k.token(); ok && c == ']' {
		k.next = answerAfterElement
	}
	return nil
}

// isJSONString reports whether the text of a JSON string means s.
func isJSONString(text []byte, s string) bool {
	if bytes.IndexByte(text, '\\') < 0 {
		return string(text[1:len(text)-1]) == s
	}
	var t string
	return json.Unmarshal(text, &t) == nil && t == s
}

func (k *KeyAnswerReader) element() ([]byte, error) {
	if k.elements++; k.elements > k.maxElements {
		return nil, fmt.Errorf("%w: more than %d in an answer", ErrServerKeys, k.maxElements)
	}
	k.keep()
	err := k.value(elementDepth)
	element, whole := k.taken()
	if err != nil {
		return nil, err
	}
	k.next = answerAfterElement
	if !whole {
		k.skipped++
		return nil, nil
	}
	return element, nil
}

// value steps over a JSON value that lies so deep already.
func (k *KeyAnswerReader) value(depth int) error {
	outside := depth
	k.depth = depth
	for {
		open, err := k.enter()
		if err != nil {
			return err
		}
		if open {
			continue
		}
		// A value has ended. Step over all that ends with it.
		for {
			if k.depth == outside {
				return nil
			}
			more, err := k.leave()
			if err != nil {
				return err
			}
			if more {
				break
			}
		}
	}
}

// enter steps over a value that is no array or object or is an empty one, or up to
// the first value in it, and then returns true.
func (k *KeyAnswerReader) enter() (bool, error) {
	c, ok := k.token()
	if !ok {
		return false, k.cut()
	}
	switch c {
	case '{', '[':
		if k.depth == MaxJSONDepth {
			return false, fmt.Errorf("%w: %w: depth at byte %d", ErrServerKeys, ErrJSONComplex, k.offset())
		}
		k.pos++
		k.depth++
		k.array[k.depth] = c == '['
		switch end, ok := k.token(); {
		case !ok:
			return false, k.cut()
		case end == c+2: // } or ]
			k.pos++
			k.depth--
			return false, nil
		case c == '{':
			return true, k.memberName()
		}
		return true, nil
	case '"':
		return false, k.text()
	case 't':
		return false, k.word("true")
	case 'f':
		return false, k.word("false")
	case 'n':
		return false, k.word("null")
	}
	return false, k.number()
}

// leave steps over what comes after a value in an array or object: over the end of
// that, or up to its next value, and then returns true.
func (k *KeyAnswerReader) leave() (bool, error) {
	c, ok := k.token()
	array := k.array[k.depth]
	switch {
	case !ok:
		return false, k.cut()
	case c == ',':
		k.pos++
		if array {
			return true, nil
		}
		return true, k.memberName()
	case array && c == ']', !array && c == '}':
		k.pos++
		k.depth--
		return false, nil
	}
	return false, k.syntax("expected , or the end of an array or object")
}

func (k *KeyAnswerReader) memberName() error {
	if err := k.name(); err != nil {
		return err
	}
	return k.colon()
}

func (k *KeyAnswerReader) name() error {
	switch c, ok := k.token(); {
	case !ok:
		return k.cut()
	case c != '"':
		return k.syntax("expected a member's name")
	}
	return k.text()
}

func (k *KeyAnswerReader) colon() error {
	switch c, ok := k.token(); {
	case !ok:
		return k.cut()
	case c != ':':
		return k.syntax("expected : after a member's name")
	}
	k.pos++
	return nil
}

// text steps over the string at pos.
func (k *KeyAnswerReader) text() error {
	k.pos++
	for {
		c, ok := k.peek()
		if !ok {
			return k.cut()
		}
		if c < ' ' {
			return k.syntax("control character in a string")
		}
		k.pos++
		switch c {
		case '"':
			return nil
		case '\\':
			if err := k.escape(); err != nil {
				return err
			}
		}
	}
}

// escape steps over what comes after a backslash.
func (k *KeyAnswerReader) escape() error {
	c, ok := k.peek()
	if !ok {
		return k.cut()
	}
	switch c {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		k.pos++
		return nil
	case 'u':
		k.pos++
		for range 4 {
			c, ok := k.peek()
			if !ok {
				return k.cut()
			}
			if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F') {
				return k.syntax("bad escape")
			}
			k.pos++
		}
		return nil
	}
	return k.syntax("bad escape")
}

func (k *KeyAnswerReader) word(word string) error {
	for i := range len(word) {
		switch c, ok := k.peek(); {
		case !ok:
			return k.cut()
		case c != word[i]:
			return k.syntax("unknown word")
		}
		k.pos++
	}
	return nil
}

// number steps over the number at pos. In an answer none is at the very end, so
// where the text ends after one it is cut, which is left to who reads on.
func (k *KeyAnswerReader) number() error {
	c, _ := k.peek()
	if c == '-' {
		k.pos++
		c, _ = k.peek()
	}
	if c == '0' {
		k.pos++
	} else if !k.digits() {
		return k.syntax("expected a value")
	}
	if c, _ = k.peek(); c == '.' {
		k.pos++
		if !k.digits() {
			return k.syntax("expected digits after a point")
		}
	}
	if c, _ = k.peek(); c == 'e' || c == 'E' {
		k.pos++
		if c, _ = k.peek(); c == '+' || c == '-' {
			k.pos++
		}
		if !k.digits() {
			return k.syntax("expected digits in an exponent")
		}
	}
	return nil
}

func (k *KeyAnswerReader) digits() bool {
	some := false
	for {
		c, ok := k.peek()
		if !ok || c < '0' || c > '9' {
			return some
		}
		some = true
		k.pos++
	}
}

// token steps over white space and returns the byte at pos; false at the end.
func (k *KeyAnswerReader) token() (byte, bool) {
	for {
		c, ok := k.peek()
		if !ok || c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			return c, ok
		}
		k.pos++
	}
}

// peek returns the byte at pos; 0 and false at the end.
func (k *KeyAnswerReader) peek() (byte, bool) {
	if k.pos == k.end && !k.fill() {
		return 0, false
	}
	return k.buf[k.pos], true
}

// fill reads on when all of buf is consumed.
func (k *KeyAnswerReader) fill() bool {
	const patience = 100 // with a reader that returns nothing, as of package bufio
	k.put()
	k.before += int64(k.end)
	k.pos, k.end, k.mark = 0, 0, 0
	for range patience {
		if k.readErr != nil {
			return false
		}
		k.end, k.readErr = k.r.Read(k.buf)
		if k.end > 0 {
			return true
		}
	}
	if k.readErr == nil {
		k.readErr = io.ErrNoProgress
	}
	return false
}

// keep starts to keep what is consumed.
func (k *KeyAnswerReader) keep() {
	k.kept, k.keeping, k.over, k.mark = k.kept[:0], true, false, k.pos
}

// taken ends that. It returns false if it was more than MaxServerKeys.
func (k *KeyAnswerReader) taken() ([]byte, bool) {
	k.put()
	k.keeping = false
	return k.kept, !k.over
}

func (k *KeyAnswerReader) put() {
	part := k.buf[k.mark:k.pos]
	if !k.keeping || k.over {
		return
	}
	if k.over = len(k.kept)+len(part) > MaxServerKeys; !k.over {
		k.kept = append(k.kept, part...)
	}
}

func (k *KeyAnswerReader) offset() int64 { return k.before + int64(k.pos) }

func (k *KeyAnswerReader) syntax(what string) error {
	if k.pos == k.end && k.readErr != nil {
		return k.cut()
	}
	return fmt.Errorf("%w: %w: %s at byte %d", ErrServerKeys, ErrJSONSyntax, what, k.offset())
}

// cut is the error where the answer ends too early.
func (k *KeyAnswerReader) cut() error {
	if k.readErr != io.EOF {
		return fmt.Errorf("%w: reading an answer: %w", ErrServerKeys, k.readErr)
	}
	return fmt.Errorf("%w: an answer that is cut at byte %d", ErrServerKeys, k.offset())
}

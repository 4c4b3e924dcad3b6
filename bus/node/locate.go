package node

import (
	"errors"
	"strings"

	"github.com/BurntSushi/toml"
)

// document is a parsed TOML text that knows where its keys stand.
type document struct {
	text string
	meta toml.MetaData
	top  map[string]toml.Primitive
}

// parseDocument checks nothing but the syntax. Its error is a toml.ParseError.
func parseDocument(text string) (*document, error) {
	d := &document{text: stripMark(text)}
	var err error
	d.meta, err = toml.Decode(d.text, &d.top)
	return d, err
}

// stripMark removes the byte order mark that some editors write. The parser
// would do so itself, but then count positions from behind it.
func stripMark(text string) string { return strings.TrimPrefix(text, "\ufeff") }

// find returns the value of a key, not yet decoded.
func (d *document) find(key toml.Key) (p toml.Primitive, ok bool) {
	m := d.top
	for i, part := range key {
		if p, ok = m[part]; !ok {
			return p, false
		}
		if i < len(key)-1 {
			// Stays nil, without an error, for what is not a table.
			m = nil
			if d.meta.PrimitiveDecode(p, &m) != nil {
				return p, false
			}
		}
	}
	return p, ok
}

// value returns the value of a key: string, int64, float64, bool, time.Time,
// []any, map[string]any or []map[string]any.
func (d *document) value(key toml.Key) (v any, ok bool) {
	p, ok := d.find(key)
	if !ok || d.meta.PrimitiveDecode(p, &v) != nil {
		return nil, false
	}
	return v, true
}

// line returns the line of a key, from 1. For a key that is not there it is
// the line of the section where it belongs, and 1 if that is not there either.
func (d *document) line(key toml.Key) int {
	for ; len(key) > 0; key = key[:len(key)-1] {
		if n := d.lineOf(key); n > 0 {
			return n
		}
		// A table that has no header of its own, as a in a.b = 1.
		for _, k := range d.meta.Keys() {
			if len(k) > len(key) && toml.Key(k[:len(key)]).String() == key.String() {
				return d.lineOf(k)
			}
		}
	}
	return 1
}

// lineOf returns the line of a key that has a value or a header, else 0.
func (d *document) lineOf(key toml.Key) int {
	p, ok := d.find(key)
	if !ok {
		return 0
	}
	var pe toml.ParseError
	if !errors.As(d.meta.PrimitiveDecode(p, new(probe)), &pe) || pe.Position.Line == 0 {
		return 0
	}
	return lineAt(d.text, pe.Position)
}

// lineAt returns the line where p starts. The parser's own count is that of
// the end, which differs for a text over several lines, and for what is
// missing at the end of a line.
func lineAt(text string, p toml.Position) int {
	return 1 + strings.Count(text[:min(max(p.Start, 0), len(text))], "\n")
}

// probe accepts no value. The decoder says where the value stands that was
// refused, and that is the one way to learn it.
type probe struct{}

var errProbe = errors.New("probe")

func (*probe) UnmarshalTOML(any) error { return errProbe }

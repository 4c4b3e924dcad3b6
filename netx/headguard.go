package netx

import "errors"

// maxFields bounds the lines of a request's head: its request line and its fields.
// Synapse sends six fields, and a browser behind two proxies 40. net/http keeps some 200
// bytes for a field beside what it says, so that 20 KiB of empty ones would take 800 KiB.
const maxFields = 128

var errManyFields = errors.New("the head has too many fields")

// A headGuard counts the lines of HTTP/1's heads as they are read. The zero value is
// ready for the first one.
type headGuard struct {
	lines int
	empty bool // nothing but CR has come since the last line feed, or since the beginning
	done  bool // the head has ended

	answers bool // they are heads of answers, of which interim ones are followed by others
	column  int  // in the first line of such a head
	interim bool // it is an interim one
}

// next expects another head.
func (g *headGuard) next() { *g = headGuard{answers: g.answers} }

// see looks at what was read. It returns errManyFields if the head has too many.
func (g *headGuard) see(p []byte) error {
	if g.done {
		return nil
	}
	for _, b := range p {
		if g.column++; g.answers && g.column == len("HTTP/1.1 1") {
			g.interim = b == '1'
		}
		switch {
		case b == '\n' && g.empty && g.lines > 0 && g.interim:
			g.column, g.interim, g.empty = 0, false, false // its lines count
		case b == '\n' && g.empty && g.lines > 0:
			g.done = true
			return nil
		case b == '\n':
			if g.lines++; g.lines > maxFields {
				return errManyFields
			}
			g.empty = true
		case b != '\r':
			g.empty = false
		}
	}
	return nil
}

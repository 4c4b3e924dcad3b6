package node

import (
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode"
	"unicode/utf8"
)

// printable makes a blank of all in a text that could play tricks on a terminal, or on the
// table that it stands in: parts of it are what other servers said.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// fixed is text of the program's own, which may have line feeds and tabs.
type fixed string

// say prints to a table or a terminal. All that is text among args is made printable, but
// what is fixed.
func say(w io.Writer, format string, args ...any) (int, error) {
	clean := make([]any, len(args))
	for i, a := range args {
		switch v := a.(type) {
		case fixed:
			clean[i] = a
		case error:
			clean[i] = printable(v.Error())
		case fmt.Stringer:
			clean[i] = printable(v.String())
		default:
			if clean[i] = a; reflect.ValueOf(a).Kind() == reflect.String {
				clean[i] = printable(reflect.ValueOf(a).String())
			}
		}
	}
	return fmt.Fprintf(w, format, clean...)
}

// Clean returns a writer for a terminal, or for whatever may be shown on one. It writes
// as \u00XX what a terminal obeys, and what hides or reorders text: control characters but
// line feeds and tabs, and formatting ones. In JSON that means the same. What is not UTF-8
// becomes \ufffd.
func Clean(w io.Writer) io.Writer { return &cleaner{w: w} }

type cleaner struct {
	w    io.Writer
	part []byte // the beginning of a character; less than utf8.UTFMax bytes
}

// Write implements io.Writer. The beginning of a character waits for the rest of it.
func (c *cleaner) Write(p []byte) (int, error) {
	b := append(c.part, p...)
	out := make([]byte, 0, len(b))
	for len(b) > 0 && utf8.FullRune(b) {
		r, n := utf8.DecodeRune(b)
		switch {
		case r == utf8.RuneError && n == 1:
			out = append(out, `\ufffd`...)
		case r == '\n', r == '\t', !unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co, unicode.Cs):
			out = append(out, b[:n]...)
		case r <= 0xffff:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = append(out, `\ufffd`...)
		}
		b = b[n:]
	}
	c.part = append([]byte(nil), b...)
	if _, err := c.w.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

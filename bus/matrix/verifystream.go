package matrix

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"filippo.io/edwards25519"
)

// ErrNotCanonical: a body that is too large to be put into canonical form, and is not in
// it.
var ErrNotCanonical = errors.New("not canonical JSON")

// maxStreamKey bounds the name of a member, in bytes: two for each level of nesting are
// held.
const maxStreamKey = 1024

// VerifyRequestStream is VerifyRequest for a body that is too large to be in memory. It
// reads it once, and holds a few KiB. The body must be canonical JSON, as Synapse sends
// it; if it is not, the error wraps ErrNotCanonical. An error of content is returned as it
// is.
func VerifyRequestStream(pub ed25519.PublicKey, x XMatrix, method, uri string, content io.Reader) error {
	sig, err := x.signature(pub)
	if err != nil {
		return err
	}
	head, err := appendSignedRequest(nil, x.Origin, x.Destination, method, uri, []byte("0"))
	if err != nil {
		return err
	}
	before, after, _ := bytes.Cut(head, []byte(`"content":0`))
	h := sha512.New()
	h.Write(sig[:32])
	h.Write(pub)
	h.Write(before)
	io.WriteString(h, `"content":`)
	c := canonicalStream{r: bufio.NewReaderSize(io.TeeReader(content, h), 32<<10)}
	if err := c.check(); err != nil {
		return err
	}
	h.Write(after)
	if !verifyHash(pub, sig, h.Sum(nil)) {
		return ErrSignature
	}
	return nil
}

// verifyHash is ed25519.Verify (RFC 8032 5.1.7, without cofactor, as libsodium and package
// crypto/ed25519 have it) with SHA-512(R || A || M) in place of the message.
func verifyHash(pub ed25519.PublicKey, sig, hash []byte) bool {
	a, err := new(edwards25519.Point).SetBytes(pub)
	if err != nil {
		return false
	}
	k, err := edwards25519.NewScalar().SetUniformBytes(hash)
	if err != nil {
		return false
	}
	s, err := edwards25519.NewScalar().SetCanonicalBytes(sig[32:])
	if err != nil {
		return false
	}
	r := new(edwards25519.Point).VarTimeDoubleScalarBaseMult(k, a.Negate(a), s)
	return bytes.Equal(r.Bytes(), sig[:32])
}

// canonicalStream checks that what it reads is canonical JSON, numbers as they stand in
// Matrix: integers without a sign of plus, a leading zero, a fraction or an exponent.
type canonicalStream struct {
	r   *bufio.Reader
	key []byte // scratch
}

func (c *canonicalStream) check() error {
	if err := c.value(1); err != nil {
		return err
	}
	switch _, err := c.r.ReadByte(); err {
	case io.EOF:
		return nil
	case nil:
		return c.odd("more after the value")
	default:
		return err
	}
}

func (c *canonicalStream) odd(what string) error { return fmt.Errorf("%w: %s", ErrNotCanonical, what) }

func (c *canonicalStream) next() (byte, error) {
	b, err := c.r.ReadByte()
	if err == io.EOF {
		err = c.odd("it ends early")
	}
	return b, err
}

func (c *canonicalStream) value(depth int) error {
	if depth > MaxJSONDepth-1 {
		return c.odd("too deep")
	}
	b, err := c.next()
	if err != nil {
		return err
	}
	switch {
	case b == '{':
		return c.object(depth)
	case b == '[':
		return c.array(depth)
	case b == '"':
		_, err := c.text(nil, -1)
		return err
	case b == 't':
		return c.word("rue")
	case b == 'f':
		return c.word("alse")
	case b == 'n':
		return c.word("ull")
	case b == '-', b >= '0' && b <= '9':
		return c.number(b)
	}
	return c.odd("an unexpected byte")
}

func (c *canonicalStream) word(rest string) error {
	for i := range len(rest) {
		if b, err := c.next(); err != nil {
			return err
		} else if b != rest[i] {
			return c.odd("an unknown word")
		}
	}
	return nil
}

// number reads the rest of a number that begins with b.
func (c *canonicalStream) number(b byte) error {
	text := append(make([]byte, 0, 24), b)
	for {
		b, err := c.r.ReadByte()
		if err != nil && err != io.EOF {
			return err
		}
		if err == io.EOF || b < '0' || b > '9' {
			if err == nil {
				if b == '.' || b|0x20 == 'e' {
					return c.odd("a number that is no integer")
				}
				if err := c.r.UnreadByte(); err != nil {
					return err
				}
			}
			break
		}
		if text = append(text, b); len(text) > 20 {
			return c.odd("a long number")
		}
	}
	digits := bytes.TrimPrefix(text, []byte("-"))
	if len(digits) == 0 || len(digits) > 1 && digits[0] == '0' || string(text) == "-0" {
		return c.odd("a number")
	}
	return nil
}

func (c *canonicalStream) array(depth int) error {
	for first := true; ; first = false {
		b, err := c.next()
		switch {
		case err != nil:
			return err
		case b == ']' && first:
			return nil
		case first:
			if err := c.r.UnreadByte(); err != nil {
				return err
			}
		case b == ']':
			return nil
		case b != ',':
			return c.odd("no comma")
		}
		if err := c.value(depth + 1); err != nil {
			return err
		}
	}
}

func (c *canonicalStream) object(depth int) error {
	var last []byte
	for first := true; ; first = false {
		b, err := c.next()
		if err != nil {
			return err
		}
		switch {
		case b == '}':
			return nil // also after "{"; a comma is followed by a name
		case first && b == '"':
		case !first && b == ',':
			if b, err = c.next(); err != nil {
				return err
			} else if b != '"' {
				return c.odd("no name")
			}
		default:
			return c.odd("no name")
		}
		if c.key, err = c.text(c.key[:0], maxStreamKey); err != nil {
			return err
		}
		if !first && bytes.Compare(last, c.key) >= 0 {
			return c.odd("names out of order, or twice")
		}
		last = append(last[:0], c.key...)
		if b, err = c.next(); err != nil {
			return err
		} else if b != ':' {
			return c.odd("no colon")
		}
		if err := c.value(depth + 1); err != nil {
			return err
		}
	}
}

// text reads the rest of a string. With a most that is not negative it appends what the
// string says to dst, so many bytes at most.
func (c *canonicalStream) text(dst []byte, most int) ([]byte, error) {
	for {
		r, size, err := c.r.ReadRune()
		switch {
		case err == io.EOF:
			return dst, c.odd("it ends early")
		case err != nil:
			return dst, err
		case r == '"':
			return dst, nil
		case r == utf8.RuneError && size == 1, r < ' ':
			return dst, c.odd("a byte that is no text")
		case r == '\\':
			if r, err = c.escape(); err != nil {
				return dst, err
			}
		}
		if most < 0 {
			continue
		}
		if dst = utf8.AppendRune(dst, r); len(dst) > most {
			return dst, c.odd("a long name")
		}
	}
}

// escape reads what follows a backslash: only what must be escaped is, in its shortest
// form.
func (c *canonicalStream) escape() (rune, error) {
	b, err := c.next()
	if err != nil {
		return 0, err
	}
	switch b {
	case '"', '\\':
		return rune(b), nil
	case 'b':
		return '\b', nil
	case 'f':
		return '\f', nil
	case 'n':
		return '\n', nil
	case 'r':
		return '\r', nil
	case 't':
		return '\t', nil
	case 'u':
		var digits [4]byte
		for i := range digits {
			if digits[i], err = c.next(); err != nil {
				return 0, err
			}
		}
		var r rune
		for _, d := range digits {
			switch {
			case d >= '0' && d <= '9':
				r = r<<4 | rune(d-'0')
			case d >= 'a' && d <= 'f':
				r = r<<4 | rune(d-'a'+10)
			default:
				return 0, c.odd("an escape")
			}
		}
		if r >= ' ' || r == '\b' || r == '\f' || r == '\n' || r == '\r' || r == '\t' {
			return 0, c.odd("an escape of what needs none")
		}
		return r, nil
	}
	return 0, c.odd("an escape")
}

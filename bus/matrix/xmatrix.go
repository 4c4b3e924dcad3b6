package matrix

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// What ParseXMatrix and VerifyRequest return, possibly wrapped.
var (
	// ErrNotXMatrix: the header uses another authentication scheme.
	ErrNotXMatrix = errors.New("not an X-Matrix authorization")
	// ErrXMatrix: the header is malformed or lacks a parameter.
	ErrXMatrix = errors.New("malformed X-Matrix authorization")
	// ErrSignature: a signature is missing, cannot be read or does not fit.
	ErrSignature = errors.New("invalid signature")
)

// XMatrix is the content of an Authorization header of the scheme X-Matrix (S2S
// "Request Authentication", v1.18).
//
// The names are spelt as in the header, since the signature covers the spelling.
// Origin is a valid server name when it came from ParseXMatrix. Destination is
// empty if the header has none, as older servers do; a server then verifies with
// its own name in its place, and refuses a destination that is not its own.
type XMatrix struct {
	Origin      string
	Destination string
	Key         string // "ed25519:a_abc"
	Sig         string // base64
}

// ParseXMatrix reads the value of an Authorization header. The grammar is that
// of RFC 9110 section 11.4: parameters in any order, their names in any case,
// white space and empty elements allowed around the commas, values as tokens or
// quoted with backslash escapes. Values without quotes may hold any visible
// character but a comma, a quote and a backslash, since older servers send
// colons and slashes so. Unknown parameters are ignored.
//
// Refused is what another reader might believe to say something else, so that no two
// servers take one request for that of two origins: a parameter of ours that comes
// twice, a comma in its value, and a quoted value in which one follows after a comma.
// Many readers, Synapse among them, split the header at its commas and know of quotes
// only then.
//
// The error is ErrNotXMatrix or wraps ErrXMatrix; it never quotes the header.
func ParseXMatrix(header string) (XMatrix, error) {
	const scheme = "X-Matrix"
	if len(header) < len(scheme) || !strings.EqualFold(header[:len(scheme)], scheme) {
		return XMatrix{}, ErrNotXMatrix
	}
	rest := header[len(scheme):]
	if rest != "" && rest[0] != ' ' {
		return XMatrix{}, ErrNotXMatrix
	}
	var (
		x    XMatrix
		seen [len(xMatrixParams)]bool
	)
	to := [len(xMatrixParams)]*string{&x.Origin, &x.Destination, &x.Key, &x.Sig}
	for {
		rest = strings.TrimLeft(rest, " \t,")
		if rest == "" {
			break
		}
		name, value, after, ok := cutAuthParam(rest)
		if !ok {
			return XMatrix{}, fmt.Errorf("%w: at byte %d", ErrXMatrix, len(header)-len(rest))
		}
		if hidesParam(rest[:len(rest)-len(after)]) {
			return XMatrix{}, fmt.Errorf("%w: a parameter in the value of another, at byte %d", ErrXMatrix, len(header)-len(rest))
		}
		rest = strings.TrimLeft(after, " \t")
		if rest != "" && rest[0] != ',' {
			return XMatrix{}, fmt.Errorf("%w: at byte %d", ErrXMatrix, len(header)-len(rest))
		}
		i := xMatrixParam(name)
		if i < 0 {
			continue
		}
		if seen[i] {
			return XMatrix{}, fmt.Errorf("%w: %s given twice", ErrXMatrix, xMatrixParams[i])
		}
		if strings.Contains(value, ",") {
			return XMatrix{}, fmt.Errorf("%w: %s with a comma", ErrXMatrix, xMatrixParams[i])
		}
		seen[i] = true
		*to[i] = value
	}
	if x.Key == "" || x.Sig == "" {
		return XMatrix{}, fmt.Errorf("%w: key or sig missing", ErrXMatrix)
	}
	if _, err := ParseServerName(x.Origin); err != nil {
		return XMatrix{}, fmt.Errorf("%w: origin: %w", ErrXMatrix, err)
	}
	if x.Destination != "" {
		if _, err := ParseServerName(x.Destination); err != nil {
			return XMatrix{}, fmt.Errorf("%w: destination: %w", ErrXMatrix, err)
		}
	}
	return x, nil
}

// xMatrixParams are the parameters that XMatrix shows, in the order of its members.
var xMatrixParams = [...]string{"origin", "destination", "key", "sig"}

// xMatrixParam returns the index of a name in xMatrixParams, or -1.
func xMatrixParam(name string) int {
	return slices.IndexFunc(xMatrixParams[:], func(p string) bool { return strings.EqualFold(name, p) })
}

// hidesParam reports whether a parameter, as it stands in the header, has in its value
// what looks like one of ours to a reader that does not know of quotes.
func hidesParam(param string) bool {
	_, param, more := strings.Cut(param, ",")
	for more {
		var piece string
		piece, param, more = strings.Cut(param, ",")
		// Some trim what Unicode calls a space.
		if name, _, ok := strings.Cut(piece, "="); ok && xMatrixParam(strings.TrimSpace(name)) >= 0 {
			return true
		}
	}
	return false
}

// cutAuthParam reads one `name=value` at the start of s.
func cutAuthParam(s string) (name, value, rest string, ok bool) {
	i := 0
	for i < len(s) && isTokenByte(s[i]) {
		i++
	}
	name, rest = s[:i], strings.TrimLeft(s[i:], " \t")
	if name == "" || rest == "" || rest[0] != '=' {
		return "", "", "", false
	}
	rest = strings.TrimLeft(rest[1:], " \t")
	if rest != "" && rest[0] == '"' {
		value, rest, ok = cutQuoted(rest[1:])
		return name, value, rest, ok
	}
	i = 0
	for i < len(rest) && rest[i] > ' ' && rest[i] < 0x7f && rest[i] != ',' && rest[i] != '"' && rest[i] != '\\' {
		i++
	}
	return name, rest[:i], rest[i:], i > 0
}

// cutQuoted reads the inside of a quoted string and its closing quote.
func cutQuoted(s string) (value, rest string, ok bool) {
	var unescaped []byte
	escaped, start := false, 0 // start of what is not yet in unescaped
	for i := 0; i < len(s); i++ {
		switch b := s[i]; {
		case b == '"' && !escaped:
			return s[:i], s[i+1:], true
		case b == '"':
			return string(append(unescaped, s[start:i]...)), s[i+1:], true
		case isControl(b):
			return "", "", false
		case b == '\\':
			unescaped = append(unescaped, s[start:i]...)
			escaped = true
			i++
			start = i // the next character stands for itself
			if i == len(s) || isControl(s[i]) {
				return "", "", false
			}
		}
	}
	return "", "", false
}

// isControl reports whether b may not stand in a quoted string, not even
// escaped (RFC 9110 section 5.6.4).
func isControl(b byte) bool {
	return b < ' ' && b != '\t' || b == 0x7f
}

// isTokenByte reports whether b is a tchar of RFC 9110 section 5.6.2.
func isTokenByte(b byte) bool {
	switch {
	case b >= '0' && b <= '9', b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z':
		return true
	}
	return strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0
}

// String returns the header value in the form and order that Synapse sends
// (matrixfederationclient.py, build_auth_headers).
func (x XMatrix) String() string {
	b := make([]byte, 0, 64+len(x.Origin)+len(x.Key)+len(x.Sig)+len(x.Destination))
	b = appendQuoted(append(b, `X-Matrix origin=`...), x.Origin)
	b = appendQuoted(append(b, `,key=`...), x.Key)
	b = appendQuoted(append(b, `,sig=`...), x.Sig)
	if x.Destination != "" {
		b = appendQuoted(append(b, `,destination=`...), x.Destination)
	}
	return string(b)
}

func appendQuoted(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for i := range len(s) {
		if s[i] == '"' || s[i] == '\\' {
			dst = append(dst, '\\')
		}
		dst = append(dst, s[i])
	}
	return append(dst, '"')
}

// SignRequest signs a request as origin. uri is the path and query as they
// stand on the request line. content is the body, any JSON value, or empty for
// a request without one. Numbers are signed as they stand (RawNumbers), so a
// body with numbers that canonical JSON lacks must be sent with the same text.
// The error wraps those of AppendCanonical.
func SignRequest(key SigningKey, origin, destination, method, uri string, content []byte) (XMatrix, error) {
	msg, err := appendSignedRequest(nil, origin, destination, method, uri, content)
	if err != nil {
		return XMatrix{}, err
	}
	return XMatrix{
		Origin:      origin,
		Destination: destination,
		Key:         key.ID(),
		Sig:         base64.RawStdEncoding.EncodeToString(key.sign(msg)),
	}, nil
}

// urlSafe turns the URL-safe alphabet of base64 into the standard one.
var urlSafe = strings.NewReplacer("-", "+", "_", "/")

// VerifyRequest checks the signature of a request with the origin's public key
// that x.Key names. x.Destination must be filled in (see XMatrix), content empty
// for a request that has no body or whose method has none (GET). That the key is
// the origin's, and still valid, is the caller's to know. The signature may be in
// URL-safe base64 too, since Synapse and gomatrixserverlib take that. The error is
// ErrSignature or wraps that or an error of AppendCanonical.
func VerifyRequest(pub ed25519.PublicKey, x XMatrix, method, uri string, content []byte) error {
	sig, err := x.signature(pub)
	if err != nil {
		return err
	}
	msg, err := appendSignedRequest(nil, x.Origin, x.Destination, method, uri, content)
	if err != nil {
		return err
	}
	if !ed25519.Verify(pub, msg, sig) {
		return ErrSignature
	}
	return nil
}

// signature returns the signature of x, of the size that pub needs.
func (x *XMatrix) signature(pub ed25519.PublicKey) ([]byte, error) {
	if !strings.HasPrefix(x.Key, keyAlgorithm+":") {
		return nil, fmt.Errorf("%w: unknown algorithm", ErrSignature)
	}
	sig, err := decodeBase64(urlSafe.Replace(x.Sig))
	if err != nil || len(sig) != ed25519.SignatureSize || len(pub) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: not an ed25519 key and signature", ErrSignature)
	}
	return sig, nil
}

// appendSignedRequest appends the canonical JSON of the object that a request's
// signature covers (S2S "Request Authentication", step 1).
func appendSignedRequest(dst []byte, origin, destination, method, uri string, content []byte) ([]byte, error) {
	// A string of JSON has no other bytes, and in place of those would be what is the
	// same for many targets.
	for _, s := range [...]string{origin, destination, method, uri} {
		if !utf8.ValidString(s) {
			return nil, fmt.Errorf("%w: what is signed is not UTF-8", ErrJSONSyntax)
		}
	}
	const names = len(`{"content":,"destination":"","method":"","origin":"","uri":""}`)
	dst = slices.Grow(dst, names+len(content)+len(destination)+len(method)+len(origin)+len(uri))
	dst = append(dst, '{')
	if len(content) > 0 {
		dst = append(dst, `"content":`...)
		var err error
		if dst, err = AppendCanonical(dst, content, RawNumbers); err != nil {
			return nil, fmt.Errorf("request body: %w", err)
		}
		dst = append(dst, ',')
	}
	dst = AppendString(append(dst, `"destination":`...), destination)
	dst = AppendString(append(dst, `,"method":`...), method)
	dst = AppendString(append(dst, `,"origin":`...), origin)
	dst = AppendString(append(dst, `,"uri":`...), uri)
	return append(dst, '}'), nil
}

// decodeBase64 reads unpadded base64 and, as the appendices ask of a reader,
// padded base64 too.
func decodeBase64(s string) ([]byte, error) {
	return base64.RawStdEncoding.DecodeString(strings.TrimRight(s, "="))
}

package matrix

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// keyAlgorithm is the one signing algorithm that Matrix has (appendices,
// "Signing Details").
const keyAlgorithm = "ed25519"

// ErrKey is what errors about signing keys and key files wrap.
var ErrKey = errors.New("invalid signing key")

// SigningKey is a server's private signing key. Printing one, with any verb and
// inside any other value, never shows the secret. The zero value is no key, and
// signing with it panics.
type SigningKey struct {
	id     string
	public ed25519.PublicKey
	// sign closes over the secret. Package fmt prints a nested value's fields
	// without asking its methods, and for some verbs follows pointers, but of a
	// function there is nothing to print but the address.
	sign func(msg []byte) []byte
}

// OldKey is a public key that a server has ceased to sign with. It is good for
// the events signed before it expired, never for a request.
type OldKey struct {
	ID      string // "ed25519:a_abc"
	Public  ed25519.PublicKey
	Expired Timestamp
}

// NewSigningKey makes a key of a 32 byte seed and a version: one or more visible
// ASCII characters other than quote, comma, colon and backslash. (S2S "Publishing
// Keys" has only letters, digits and "_", but a server's old key is what it is.)
// The error wraps ErrKey.
func NewSigningKey(seed []byte, version string) (SigningKey, error) {
	if len(seed) != ed25519.SeedSize {
		return SigningKey{}, fmt.Errorf("%w: the seed has %d bytes, not %d", ErrKey, len(seed), ed25519.SeedSize)
	}
	if !isKeyVersion(version) {
		return SigningKey{}, fmt.Errorf("%w: bad version", ErrKey)
	}
	return newSigningKey(seed, version), nil
}

// newSigningKey is NewSigningKey for a seed and version that have been checked.
func newSigningKey(seed []byte, version string) SigningKey {
	private := ed25519.NewKeyFromSeed(seed)
	return SigningKey{
		id:     keyAlgorithm + ":" + version,
		public: private.Public().(ed25519.PublicKey),
		sign:   func(msg []byte) []byte { return ed25519.Sign(private, msg) },
	}
}

func isKeyVersion(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f || strings.IndexByte(`",:\`, s[i]) >= 0 {
			return false
		}
	}
	return s != ""
}

// ID returns the key's identifier, as "ed25519:a_abc"; "" for the zero value.
func (k SigningKey) ID() string { return k.id }

// IsZero reports whether k is no key.
func (k SigningKey) IsZero() bool { return k.sign == nil }

// Public returns the public key; nil for the zero value.
func (k SigningKey) Public() ed25519.PublicKey { return k.public }

// String returns the key's identifier.
func (k SigningKey) String() string { return k.id }

// GoString returns the key's identifier.
func (k SigningKey) GoString() string { return "matrix.SigningKey(" + strconv.Quote(k.id) + ")" }

// ParseSigningKeys reads Synapse's signing key file. Each line is a private key,
//
//	ed25519 <version> <seed in base64>
//
// or, as signedjson's read_old_signing_keys has them, an expired public one:
//
//	ed25519 <version> <expiry, Unix time in ms> <public key in base64>
//
// Blank lines are skipped. There must be at least one private key; Synapse signs
// with each of them. Errors wrap ErrKey, name the line and quote nothing of it.
func ParseSigningKeys(file []byte) (keys []SigningKey, old []OldKey, err error) {
	seen := make(map[string]bool)
	line := 0
	for text := range bytes.Lines(file) {
		line++
		f := strings.Fields(string(text))
		if len(f) == 0 {
			continue
		}
		bad := func(what string) ([]SigningKey, []OldKey, error) {
			return nil, nil, fmt.Errorf("%w: line %d: %s", ErrKey, line, what)
		}
		if len(f) != 3 && len(f) != 4 {
			return bad("expected three or four fields")
		}
		if f[0] != keyAlgorithm {
			return bad("the algorithm is not ed25519")
		}
		if !isKeyVersion(f[1]) {
			return bad("bad version")
		}
		if seen[f[1]] {
			return bad("a version that an earlier line has too")
		}
		seen[f[1]] = true
		b, err := decodeBase64(f[len(f)-1])
		if err != nil || len(b) != ed25519.SeedSize {
			return bad("the key is not 32 bytes of base64")
		}
		if len(f) == 3 {
			keys = append(keys, newSigningKey(b, f[1]))
			continue
		}
		expired, err := strconv.ParseInt(f[2], 10, 64)
		if err != nil || expired < 0 {
			return bad("the expiry is not a time in milliseconds")
		}
		old = append(old, OldKey{ID: keyAlgorithm + ":" + f[1], Public: b, Expired: Timestamp(expired)})
	}
	if len(keys) == 0 {
		return nil, nil, fmt.Errorf("%w: no private key in the file", ErrKey)
	}
	return keys, old, nil
}

// Sign adds the signature of server to a JSON object, beside those that it has,
// and returns the whole in canonical form (appendices, "Signing Details"). The
// members signatures and unsigned are not covered. Numbers are signed as they
// stand (RawNumbers). The error wraps one of AppendCanonical, or ErrSignature if
// the signatures that the object has are not of the right form.
func (k SigningKey) Sign(object []byte, server string) ([]byte, error) {
	o, err := cutSigned(object)
	if err != nil {
		return nil, err
	}
	signatures, err := o.parseSignatures()
	if err != nil {
		return nil, err
	}
	if signatures[server] == nil {
		signatures[server] = make(map[string]string)
	}
	signatures[server][k.id] = base64.RawStdEncoding.EncodeToString(k.sign(o.signed))

	// Put together in any order: canonicalising sorts.
	b := append(make([]byte, 0, len(o.signed)+len(o.signatures)+len(o.unsigned)+256), `{"signatures":`...)
	b = append(b, '{')
	for name, ofServer := range signatures {
		b = append(AppendString(b, name), ':', '{')
		for id, sig := range ofServer {
			b = append(AppendString(b, id), ':')
			b = append(AppendString(b, sig), ',')
		}
		b = append(bytes.TrimSuffix(b, []byte(",")), '}', ',')
	}
	b = append(bytes.TrimSuffix(b, []byte(",")), '}')
	if o.unsigned != nil {
		b = append(append(b, `,"unsigned":`...), o.unsigned...)
	}
	if len(o.signed) > len("{}") {
		b = append(append(b, ','), o.signed[1:]...)
	} else {
		b = append(b, '}')
	}
	return AppendCanonical(make([]byte, 0, len(b)), b, RawNumbers)
}

// VerifyJSON checks that a JSON object carries the signature of server with the
// key keyID, whose public part is pub (appendices, "Checking for a Signature").
// The error wraps ErrSignature or an error of AppendCanonical.
func VerifyJSON(object []byte, server, keyID string, pub ed25519.PublicKey) error {
	if !strings.HasPrefix(keyID, keyAlgorithm+":") || len(pub) != ed25519.PublicKeySize {
		return fmt.Errorf("%w: not an ed25519 key", ErrSignature)
	}
	o, err := cutSigned(object)
	if err != nil {
		return err
	}
	signatures, err := o.parseSignatures()
	if err != nil {
		return err
	}
	text, ok := signatures[server][keyID]
	if !ok {
		return fmt.Errorf("%w: not signed by this server with this key", ErrSignature)
	}
	sig, err := decodeBase64(text)
	if err != nil || len(sig) != ed25519.SignatureSize {
		return fmt.Errorf("%w: not an ed25519 signature", ErrSignature)
	}
	if !ed25519.Verify(pub, o.signed, sig) {
		return ErrSignature
	}
	return nil
}

// ServerKeys returns the answer to GET /_matrix/key/v2/server: the public keys of
// server, valid until validUntil (Unix time in milliseconds) and signed with each
// private key (S2S "Publishing Keys").
func ServerKeys(server string, validUntil Timestamp, keys []SigningKey, old []OldKey) ([]byte, error) {
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: none to publish", ErrKey)
	}
	type publicKey struct {
		Key     string     `json:"key"`
		Expired *Timestamp `json:"expired_ts,omitempty"`
	}
	verify, expired := make(map[string]publicKey), make(map[string]publicKey)
	for _, k := range keys {
		verify[k.id] = publicKey{Key: base64.RawStdEncoding.EncodeToString(k.Public())}
	}
	for _, k := range old {
		expired[k.ID] = publicKey{Key: base64.RawStdEncoding.EncodeToString(k.Public), Expired: &k.Expired}
	}
	object, err := json.Marshal(map[string]any{
		"server_name":     server,
		"valid_until_ts":  validUntil,
		"verify_keys":     verify,
		"old_verify_keys": expired,
	})
	if err != nil {
		return nil, fmt.Errorf("server keys: %w", err)
	}
	for _, k := range keys {
		if object, err = k.Sign(object, server); err != nil {
			return nil, fmt.Errorf("server keys: %w", err)
		}
	}
	return object, nil
}

// signedObject is a JSON object in canonical form, in the parts that signing
// tells apart.
type signedObject struct {
	signed     []byte // without the members signatures and unsigned
	signatures []byte // the value of signatures; nil if there is none
	unsigned   []byte // the value of unsigned; nil if there is none
}

// cutSigned canonicalises a JSON object and takes it apart.
func cutSigned(object []byte) (signedObject, error) {
	b, err := AppendCanonical(make([]byte, 0, len(object)), object, RawNumbers)
	if err != nil {
		return signedObject{}, err
	}
	if b[0] != '{' {
		return signedObject{}, fmt.Errorf("%w: not an object", ErrJSONSyntax)
	}
	o := signedObject{signed: append(make([]byte, 0, len(b)), '{')}
	for i := 1; b[i] != '}'; {
		start := i
		i = skipCanonical(b, i)
		name := b[start:i]
		value := i + 1 // after the colon
		i = skipCanonical(b, value)
		switch string(name) {
		case `"signatures"`:
			o.signatures = b[value:i]
		case `"unsigned"`:
			o.unsigned = b[value:i]
		default:
			if len(o.signed) > 1 {
				o.signed = append(o.signed, ',')
			}
			o.signed = append(o.signed, b[start:i]...)
		}
		if b[i] == ',' {
			i++
		}
	}
	o.signed = append(o.signed, '}')
	return o, nil
}

// skipCanonical returns the index after the value at i of a canonical text.
func skipCanonical(b []byte, i int) int {
	depth := 0
	for ; ; i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i // the end of a number or word, and of what it is in
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case ',':
			if depth == 0 {
				return i
			}
		}
	}
}

// parseSignatures reads {server: {key id: signature}}; never a nil map.
func (o signedObject) parseSignatures() (map[string]map[string]string, error) {
	m := make(map[string]map[string]string)
	if o.signatures == nil {
		return m, nil
	}
	if err := json.Unmarshal(o.signatures, &m); err != nil {
		return nil, fmt.Errorf("%w: the member signatures is malformed", ErrSignature)
	}
	if m == nil { // null
		m = make(map[string]map[string]string)
	}
	return m, nil
}

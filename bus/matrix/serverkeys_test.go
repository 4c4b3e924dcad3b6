package matrix

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"
)

// testKey makes a signing key whose seed is of one byte only.
func testKey(tb testing.TB, seed byte, version string) SigningKey {
	tb.Helper()
	k, err := NewSigningKey(bytes.Repeat([]byte{seed}, ed25519.SeedSize), version)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func publicText(k SigningKey) string { return base64.RawStdEncoding.EncodeToString(k.Public()) }

// signed returns the object with signatures of server by keys.
func signed(tb testing.TB, object, server string, keys ...SigningKey) []byte {
	tb.Helper()
	b := []byte(object)
	for _, k := range keys {
		var err error
		if b, err = k.Sign(b, server); err != nil {
			tb.Fatalf("signing %s: %v", object, err)
		}
	}
	return b
}

// aServersKeys is an object as a server publishes it, with an old key.
func aServersKeys(tb testing.TB, server string, validUntil Timestamp) []byte {
	tb.Helper()
	old := testKey(tb, 9, "old")
	b, err := ServerKeys(server, validUntil, []SigningKey{testKey(tb, 1, "a")},
		[]OldKey{{ID: old.ID(), Public: old.Public(), Expired: 1000}})
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestCheckServerKeys(t *testing.T) {
	a, b, old := testKey(t, 1, "a"), testKey(t, 2, "b"), testKey(t, 9, "old")
	object, err := ServerKeys("hs.example:8448", 1700000000000, []SigningKey{a, b},
		[]OldKey{{ID: old.ID(), Public: old.Public(), Expired: 1600000000000}})
	if err != nil {
		t.Fatal(err)
	}
	o, err := CheckServerKeys(object, "hs.example:8448")
	if err != nil {
		t.Fatal(err)
	}
	if o.Server != "hs.example:8448" || o.ValidUntil != 1700000000000 || len(o.Verify) != 2 || len(o.Old) != 1 ||
		!o.Verify["ed25519:a"].Equal(a.Public()) || !o.Verify["ed25519:b"].Equal(b.Public()) {
		t.Errorf("got %+v", o)
	}
	if k := o.Old["ed25519:old"]; k.ID != "ed25519:old" || k.Expired != 1600000000000 || !k.Public.Equal(old.Public()) {
		t.Errorf("old key %+v", k)
	}
	if !o.SignedBy("hs.example:8448") || o.SignedBy("hs.example") || o.SignedBy("") {
		t.Errorf("signed by %q", o.signers)
	}
	clear(object) // the result has a memory of its own
	if !o.Verify["ed25519:a"].Equal(a.Public()) || o.Server != "hs.example:8448" {
		t.Error("the result changed with the object")
	}
}

// What servers may well publish although none of it is in the specification's
// example.
func TestCheckServerKeysTakes(t *testing.T) {
	a, b := testKey(t, 1, "a"), testKey(t, 2, "b")
	keyA := `"ed25519:a":{"key":"` + publicText(a) + `"}`
	const head = `{"server_name":"hs","valid_until_ts":5,`
	many := ""
	for i := range maxKeys - 1 {
		many += fmt.Sprintf(`,"ed25519:%d":{"key":%q}`, i, publicText(b))
	}
	for what, c := range map[string]struct {
		object string
		keys   []SigningKey
		want   int
	}{
		"one of two has signed":     {head + `"verify_keys":{` + keyA + `,"ed25519:b":{"key":"` + publicText(b) + `"}}}`, []SigningKey{a}, 2},
		"signed with more":          {head + `"verify_keys":{` + keyA + `}}`, []SigningKey{a, b}, 1},
		"padded":                    {head + `"verify_keys":{"ed25519:a":{"key":"` + publicText(a) + `="}}}`, []SigningKey{a}, 1},
		"no old_verify_keys":        {head + `"verify_keys":{` + keyA + `}}`, []SigningKey{a}, 1},
		"another algorithm":         {head + `"verify_keys":{` + keyA + `,"rsa:1":[1],"\n":0},"old_verify_keys":{"rsa:2":{}}}`, []SigningKey{a}, 1},
		"unknown members":           {head + `"verify_keys":{` + keyA + `},"tls_fingerprints":[{"sha256":"x"}],"a\"b":{"\u0000":null},"é":-3}`, []SigningKey{a}, 1},
		"more in a key":             {head + `"verify_keys":{"ed25519:a":{"key":"` + publicText(a) + `","use":["x"]}}}`, []SigningKey{a}, 1},
		"most keys":                 {head + `"verify_keys":{` + keyA + many + `}}`, []SigningKey{a}, maxKeys},
		"depth":                     {head + `"verify_keys":{` + keyA + `},"x":` + strings.Repeat("[", maxKeyDepth-1) + strings.Repeat("]", maxKeyDepth-1) + `}`, []SigningKey{a}, 1},
		"longest key id":            {head + `"verify_keys":{` + keyA + `,"ed25519:` + strings.Repeat("x", maxKeyID-len("ed25519:")) + `":{"key":"` + publicText(b) + `"}}}`, []SigningKey{a}, 2},
		"unsigned":                  {head + `"verify_keys":{` + keyA + `},"unsigned":{"age":1}}`, []SigningKey{a}, 1},
		"name of another, escaped":  {head + `"verify_keys":{` + keyA + `},"signatures":{"a\"b":{"ed25519:1":"x"}}}`, []SigningKey{a}, 1},
		"an old key's id in Verify": {head + `"verify_keys":{` + keyA + `},"old_verify_keys":{"ed25519:a":{"key":"` + publicText(a) + `","expired_ts":3}}}`, []SigningKey{a}, 0},
		"year 0":                    {`{"server_name":"hs","valid_until_ts":0,"verify_keys":{` + keyA + `}}`, []SigningKey{a}, 1},
		"largest time":              {`{"server_name":"hs","valid_until_ts":9007199254740991,"verify_keys":{` + keyA + `}}`, []SigningKey{a}, 1},
	} {
		o, err := CheckServerKeys(signed(t, c.object, "hs", c.keys...), "hs")
		if err != nil {
			t.Errorf("%s: %v", what, err)
		} else if len(o.Verify) != c.want {
			t.Errorf("%s: %d keys, want %d", what, len(o.Verify), c.want)
		}
	}

	// Another encoder's spelling of a good object, and members given twice.
	good := string(signed(t, head+`"verify_keys":{`+keyA+`}}`, "hs", a))
	for _, object := range []string{
		" \n" + strings.ReplaceAll(good, ":{", " : \t{") + "\r\n ",
		strings.Replace(good, `"server_name":"hs"`, `"server_\u006eame":"\u0068s"`, 1),
		strings.Replace(good, `"valid_until_ts":5`, `"valid_until_ts":"soon","valid_until_ts":5`, 1),
		strings.Replace(good, `"server_name":"hs"`, `"server_name":"other","server_name":"hs"`, 1),
	} {
		if _, err := CheckServerKeys([]byte(object), "hs"); err != nil {
			t.Errorf("%s: %v", object, err)
		}
	}

	// As long as may be.
	object := head + `"verify_keys":{` + keyA + `},"x":""}`
	fill := MaxServerKeys - len(signed(t, object, "hs", a))
	full := signed(t, strings.Replace(object, `"x":""`, `"x":"`+strings.Repeat("x", fill)+`"`, 1), "hs", a)
	if _, err := CheckServerKeys(full, "hs"); err != nil || len(full) != MaxServerKeys {
		t.Errorf("%d bytes: %v", len(full), err)
	}
	if _, err := CheckServerKeys(append(full, ' '), "hs"); !errors.Is(err, ErrServerKeys) || !strings.Contains(err.Error(), "65537 bytes") {
		t.Errorf("one byte more: %v", err)
	}
}

func TestCheckServerKeysRejects(t *testing.T) {
	a, b := testKey(t, 1, "a"), testKey(t, 2, "b")
	keyA := `"ed25519:a":{"key":"` + publicText(a) + `"}`
	const head = `{"server_name":"hs","valid_until_ts":5,`
	good := signed(t, head+`"verify_keys":{`+keyA+`}}`, "hs", a)
	// change is what somebody else made of a good object, sign what the server has
	// signed itself.
	change := func(from, to string) string {
		if !bytes.Contains(good, []byte(from)) {
			t.Fatalf("%s has no %s", good, from)
		}
		return strings.Replace(string(good), from, to, 1)
	}
	sign := func(object string) string { return string(signed(t, object, "hs", a)) }
	nested := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	list := func(n int, format string) string {
		var s []string
		for i := range n {
			s = append(s, fmt.Sprintf(format, i))
		}
		return strings.Join(s, ",")
	}
	sigAt := bytes.Index(good, []byte(`"ed25519:a":"`)) + len(`"ed25519:a":"`)
	sigA := string(good[sigAt : sigAt+86])
	anyKey := `{"key":"` + publicText(b) + `"}`

	for what, c := range map[string]struct{ object, says string }{
		"empty":             {``, "no value"},
		"no object":         {`[]`, "not an object"},
		"null":              {`null`, "not an object"},
		"no members":        {`{}`, "no server_name"},
		"cut":               {string(good[:len(good)-1]), "expected"},
		"cut in a string":   {string(good[:sigAt+5]), "without an end"},
		"two objects":       {string(good) + string(good), "more after"},
		"not UTF-8":         {change(`{"server`, `{"x":"`+"\xff"+`","server`), "UTF-8"},
		"lone surrogate":    {change(`{"server`, `{"x":"\ud800","server`), "escape"},
		"NaN":               {change(`_ts":5`, `_ts":NaN`), "expected a value"},
		"too deep":          {sign(head + `"verify_keys":{` + keyA + `},"x":` + nested(maxKeyDepth) + `}`), "depth"},
		"depth bomb":        {strings.Repeat("[", MaxServerKeys-1), "depth"},
		"too large":         {sign(head + `"verify_keys":{` + keyA + `},"x":"` + strings.Repeat("x", MaxServerKeys) + `"}`), "bytes, at most"},
		"fraction":          {sign(head + `"verify_keys":{` + keyA + `},"x":1.5}`), "number"},
		"exponent":          {sign(head + `"verify_keys":{` + keyA + `},"x":1e3}`), "number"},
		"minus zero":        {sign(head + `"verify_keys":{` + keyA + `},"x":[-0]}`), "number"},
		"infinite number":   {sign(head + `"verify_keys":{` + keyA + `},"unsigned":1e999}`), "number"},
		"unreadable number": {sign(head + `"verify_keys":{` + keyA + `},"x":` + strings.Repeat("7", 5000) + `}`), "number"},

		"another server":        {sign(`{"server_name":"stranger","valid_until_ts":5,"verify_keys":{` + keyA + `}}`), "server_name is another"},
		"another server, twice": {sign(`{"server_name":"hs","server_name":"stranger","valid_until_ts":5,"verify_keys":{` + keyA + `}}`), "server_name is another"},
		"other case":            {sign(`{"server_name":"HS","valid_until_ts":5,"verify_keys":{` + keyA + `}}`), "server_name is another"},
		"no server_name":        {sign(`{"Server_Name":"hs","valid_until_ts":5,"verify_keys":{` + keyA + `}}`), "no server_name"},
		"server_name null":      {sign(`{"server_name":null,"valid_until_ts":5,"verify_keys":{` + keyA + `}}`), "server_name is another"},

		"no valid_until_ts": {sign(`{"server_name":"hs","verify_keys":{` + keyA + `}}`), "no valid_until_ts"},
		"until a string":    {sign(`{"server_name":"hs","valid_until_ts":"5","verify_keys":{` + keyA + `}}`), "valid_until_ts: not a time"},
		"until a fraction":  {sign(`{"server_name":"hs","valid_until_ts":5.0,"verify_keys":{` + keyA + `}}`), "number"},
		"until negative":    {sign(`{"server_name":"hs","valid_until_ts":-1,"verify_keys":{` + keyA + `}}`), "valid_until_ts: not a time"},
		"until too large":   {sign(`{"server_name":"hs","valid_until_ts":9007199254740992,"verify_keys":{` + keyA + `}}`), "number"},
		"until true":        {sign(`{"server_name":"hs","valid_until_ts":true,"verify_keys":{` + keyA + `}}`), "valid_until_ts: not a time"},
		"until null":        {sign(`{"server_name":"hs","valid_until_ts":null,"verify_keys":{` + keyA + `}}`), "valid_until_ts: not a time"},
		"until an array":    {sign(`{"server_name":"hs","valid_until_ts":[5],"verify_keys":{` + keyA + `}}`), "valid_until_ts: not a time"},

		"no verify_keys":       {sign(`{"server_name":"hs","valid_until_ts":5}`), "no key in verify_keys"},
		"empty verify_keys":    {sign(head + `"verify_keys":{}}`), "no key in verify_keys"},
		"other algorithm only": {sign(head + `"verify_keys":{"rsa:a":{"key":"` + publicText(a) + `"}}}`), "no key in verify_keys"},
		"verify_keys an array": {sign(head + `"verify_keys":[` + anyKey + `]}`), "verify_keys: not an object"},
		"key a string":         {sign(head + `"verify_keys":{"ed25519:a":"` + publicText(a) + `"}}`), "verify_keys: not an object"},
		"key without key":      {sign(head + `"verify_keys":{"ed25519:a":{}}}`), "verify_keys: not a key"},
		"key a number":         {sign(head + `"verify_keys":{"ed25519:a":{"key":1}}}`), "verify_keys: not a key"},
		"key of 31 bytes":      {sign(head + `"verify_keys":{"ed25519:a":{"key":"` + publicText(a)[:42] + `"}}}`), "verify_keys: not a key"},
		"key of 33 bytes":      {sign(head + `"verify_keys":{"ed25519:a":{"key":"` + publicText(a) + `A"}}}`), "verify_keys: not a key"},
		"key not base64":       {sign(head + `"verify_keys":{"ed25519:a":{"key":"` + publicText(a)[:42] + `-"}}}`), "verify_keys: not a key"},
		"key with line break":  {sign(head + `"verify_keys":{"ed25519:a":{"key":"` + publicText(a) + `\n"}}}`), "verify_keys: not a key"},
		"one bad key":          {sign(head + `"verify_keys":{` + keyA + `,"ed25519:b":{"key":""}}}`), "verify_keys: not a key"},
		"too many keys":        {sign(head + `"verify_keys":{` + keyA + `,` + list(maxKeys, `"ed25519:%d":`+anyKey) + `}}`), "verify_keys: more than 64"},
		"too many of others":   {sign(head + `"verify_keys":{` + keyA + `,` + list(maxKeys, `"rsa:%d":1`) + `}}`), "verify_keys: more than 64"},
		"NUL in a key id":      {sign(head + `"verify_keys":{` + keyA + `,"ed25519:\u0000":` + anyKey + `}}`), "verify_keys: an impossible key id"},
		"blank in a key id":    {sign(head + `"verify_keys":{` + keyA + `,"ed25519: ":` + anyKey + `}}`), "verify_keys: an impossible key id"},
		"accent in a key id":   {sign(head + `"verify_keys":{` + keyA + `,"ed25519:é":` + anyKey + `}}`), "verify_keys: an impossible key id"},
		"long key id":          {sign(head + `"verify_keys":{` + keyA + `,"ed25519:` + strings.Repeat("x", maxKeyID-7) + `":` + anyKey + `}}`), "verify_keys: an impossible key id"},

		"old_verify_keys null": {sign(head + `"verify_keys":{` + keyA + `},"old_verify_keys":null}`), "old_verify_keys: not an object"},
		"old without expiry":   {sign(head + `"verify_keys":{` + keyA + `},"old_verify_keys":{"ed25519:o":` + anyKey + `}}`), "old_verify_keys: expired_ts"},
		"old, expiry a string": {sign(head + `"verify_keys":{` + keyA + `},"old_verify_keys":{"ed25519:o":{"expired_ts":"1","key":"` + publicText(b) + `"}}}`), "old_verify_keys: expired_ts"},
		"old, expiry negative": {sign(head + `"verify_keys":{` + keyA + `},"old_verify_keys":{"ed25519:o":{"expired_ts":-1,"key":"` + publicText(b) + `"}}}`), "old_verify_keys: expired_ts"},
		"old without key":      {sign(head + `"verify_keys":{` + keyA + `},"old_verify_keys":{"ed25519:o":{"expired_ts":1}}}`), "old_verify_keys: not a key"},
		"too many old":         {sign(head + `"verify_keys":{` + keyA + `},"old_verify_keys":{` + list(maxKeys+1, `"ed25519:%d":{"expired_ts":1,"key":"`+publicText(b)+`"}`) + `}}`), "old_verify_keys: more than 64"},

		"no signatures":        {head + `"verify_keys":{` + keyA + `}}`, "signatures: none"},
		"signatures null":      {head + `"verify_keys":{` + keyA + `},"signatures":null}`, "signatures: not an object"},
		"signatures empty":     {head + `"verify_keys":{` + keyA + `},"signatures":{}}`, "none by a key"},
		"of the server null":   {head + `"verify_keys":{` + keyA + `},"signatures":{"hs":null}}`, "signatures: not an object"},
		"a signature null":     {head + `"verify_keys":{` + keyA + `},"signatures":{"hs":{"ed25519:a":null}}}`, "signatures: not a string"},
		"another's null":       {change(`"signatures":{`, `"signatures":{"a":null,`), "signatures: not an object"},
		"another's a number":   {change(`"signatures":{`, `"signatures":{"a":{"ed25519:1":1},`), "signatures: not a string"},
		"unlisted key only":    {string(signed(t, head+`"verify_keys":{`+keyA+`}}`, "hs", b)), "none by a key"},
		"id of a listed key":   {string(signed(t, head+`"verify_keys":{`+keyA+`}}`, "hs", testKey(t, 2, "a"))), "invalid signature"},
		"another's name":       {string(signed(t, head+`"verify_keys":{`+keyA+`}}`, "notary", a)), "none by a key"},
		"an old key only":      {string(signed(t, head+`"verify_keys":{`+keyA+`},"old_verify_keys":{"ed25519:b":{"expired_ts":9,"key":"`+publicText(b)+`"}}}`, "hs", b)), "none by a key"},
		"changed":              {change(`"valid_until_ts":5`, `"valid_until_ts":6`), "invalid signature"},
		"added":                {change(`{"server`, `{"x":1,"server`), "invalid signature"},
		"duplicate, changed":   {change(`"valid_until_ts":5`, `"valid_until_ts":5,"valid_until_ts":6`), "invalid signature"},
		"bad signature":        {change(sigA, "A"+sigA[1:]), "invalid signature"},
		"short signature":      {change(sigA, sigA[:84]), "invalid signature"},
		"no base64":            {change(sigA, "!"+sigA[1:]), "invalid signature"},
		"line break in it":     {change(sigA, sigA+`\n`), "invalid signature"},
		"one of two bad":       {strings.Replace(string(signed(t, head+`"verify_keys":{`+keyA+`,"ed25519:b":`+anyKey+`}}`, "hs", a)), `"hs":{`, `"hs":{"ed25519:b":"`+sigA+`",`, 1), "invalid signature"},
		"too many signers":     {change(`"signatures":{`, `"signatures":{`+list(maxKeys, `"s%d":{"ed25519:1":"x"}`)+`,`), "signatures: more than 64"},
		"too many of a signer": {change(`"signatures":{`, `"signatures":{"s":{`+list(maxKeys+1, `"ed25519:%d":"x"`)+`},`), "signatures: more than 64"},
	} {
		o, err := CheckServerKeys([]byte(c.object), "hs")
		if !errors.Is(err, ErrServerKeys) || o != nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, %v; want an ErrServerKeys with %q", what, o, err, c.says)
			continue
		}
		if s := err.Error(); len(s) > 150 || strings.Contains(s, "stranger") || strings.Contains(s, sigA[1:20]) {
			t.Errorf("%s: the error quotes the object: %v", what, err)
		}
	}
}

// A key of small order makes one signature fit many messages, as Go's Verify
// sees it. That this one does proves that each point here is weak.
func TestCheckServerKeysWeakKeys(t *testing.T) {
	weak := []string{
		"0000000000000000000000000000000000000000000000000000000000000000",
		"0100000000000000000000000000000000000000000000000000000000000000",
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	}
	sig := append([]byte{1}, make([]byte, 63)...) // of the neutral point, and 0
	for _, point := range weak {
		for _, sign := range []byte{0, 0x80} {
			pub, err := hex.DecodeString(point)
			if err != nil {
				t.Fatal(err)
			}
			pub[31] |= sign
			verified := false
			for i := 0; i < 200 && !verified; i++ {
				msg := fmt.Sprintf(`{"server_name":"hs","valid_until_ts":%d,"verify_keys":{"ed25519:w":{"key":%q}}}`,
					i, base64.RawStdEncoding.EncodeToString(pub))
				if verified = ed25519.Verify(pub, []byte(msg), sig); !verified {
					continue
				}
				object := msg[:1] + `"signatures":{"hs":{"ed25519:w":"` + base64.RawStdEncoding.EncodeToString(sig) + `"}},` + msg[1:]
				if err := VerifyJSON([]byte(object), "hs", "ed25519:w", pub); err != nil {
					t.Errorf("%x: %v", pub, err)
				}
				if _, err := CheckServerKeys([]byte(object), "hs"); !errors.Is(err, errWeakKey) {
					t.Errorf("%x: %v", pub, err)
				}
			}
			if !verified {
				t.Errorf("%x is no weak key", pub)
			}
		}
	}
	for i := range 50 {
		if k := testKey(t, byte(i), "a").Public(); isWeakPoint(k) {
			t.Errorf("%x is taken for weak", k)
		}
	}
}

// A server can also make the first half of its signature a point of small order,
// which libsodium refuses.
func TestCheckServerKeysWeakSignature(t *testing.T) {
	order, ok := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
	if !ok {
		t.Fatal("no number")
	}
	little := func(b []byte) *big.Int { b = slices.Clone(b); slices.Reverse(b); return new(big.Int).SetBytes(b) }

	k := testKey(t, 1, "a")
	msg := fmt.Sprintf(`{"server_name":"hs","valid_until_ts":5,"verify_keys":{"ed25519:a":{"key":%q}}}`, publicText(k))
	secret := sha512.Sum512(bytes.Repeat([]byte{1}, ed25519.SeedSize))
	secret[0] &= 248
	secret[31] = secret[31]&63 | 64
	point := append([]byte{1}, make([]byte, 31)...)
	hash := sha512.Sum512(slices.Concat(point, k.Public(), []byte(msg)))
	s := new(big.Int).Mul(little(hash[:]), little(secret[:32]))
	second := s.Mod(s, order).FillBytes(make([]byte, 32))
	slices.Reverse(second)
	sig := slices.Concat(point, second)
	if !ed25519.Verify(k.Public(), []byte(msg), sig) {
		t.Fatal("not a signature")
	}
	object := msg[:1] + `"signatures":{"hs":{"ed25519:a":"` + base64.RawStdEncoding.EncodeToString(sig) + `"}},` + msg[1:]
	if _, err := CheckServerKeys([]byte(object), "hs"); !errors.Is(err, ErrServerKeys) || !errors.Is(err, ErrSignature) {
		t.Errorf("got %v", err)
	}
}

// A notary signs what it has fetched, and nothing of it changes.
func TestServerKeysCountersigned(t *testing.T) {
	object := aServersKeys(t, "hs", 5000)
	// An object may say more than is read here.
	object = signed(t, strings.Replace(string(object), `{"old`, `{"extra":[1,{"b":2}],"old`, 1), "hs", testKey(t, 1, "a"))
	notary := testKey(t, 7, "n")
	both, err := notary.Sign(object, "notary.example")
	if err != nil {
		t.Fatal(err)
	}
	before, err1 := CheckServerKeys(object, "hs")
	after, err2 := CheckServerKeys(both, "hs")
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if before.SignedBy("notary.example") || !after.SignedBy("notary.example") || !after.SignedBy("hs") {
		t.Errorf("signed by %q, then %q", before.signers, after.signers)
	}
	if err := VerifyJSON(both, "notary.example", notary.ID(), notary.Public()); err != nil {
		t.Error(err)
	}
	was, err1 := cutSigned(object)
	is, err2 := cutSigned(both)
	if err1 != nil || err2 != nil || !bytes.Equal(was.signed, is.signed) {
		t.Errorf("%s became %s: %v, %v", object, both, err1, err2)
	}
	var signatures struct {
		Signatures map[string]map[string]string `json:"signatures"`
	}
	if err := json.Unmarshal(both, &signatures); err != nil || len(signatures.Signatures) != 2 ||
		!bytes.Contains(object, []byte(signatures.Signatures["hs"]["ed25519:a"])) {
		t.Errorf("signatures %v, %v", signatures, err)
	}
	if again, err := notary.Sign(both, "notary.example"); err != nil || !bytes.Equal(again, both) {
		t.Errorf("signed again: %s, %v", again, err)
	}
}

func TestServerKeyObjectTimes(t *testing.T) {
	const (
		week    = Timestamp(7 * 24 * 3600 * 1000)
		fetched = Timestamp(1700000000000)
	)
	if MaxKeyValidity != 7*24*time.Hour {
		t.Errorf("MaxKeyValidity is %v", MaxKeyValidity)
	}
	for _, c := range []struct {
		validUntil, good, refresh Timestamp // the last millisecond, and RefreshAt
	}{
		{fetched + 2000, fetched + 2000, fetched + 1000},
		{fetched + 3, fetched + 3, fetched + 1},
		{fetched + week - 1, fetched + week - 1, fetched + (week-1)/2},
		{fetched + week, fetched + week, fetched + week/2},
		{fetched + week + 1, fetched + week, fetched + week/2},
		{maxJSONInteger, fetched + week, fetched + week/2},
		{fetched, fetched, fetched},
		{fetched - 5000, fetched - 5000, fetched},
		{0, 0, fetched},
	} {
		o, err := CheckServerKeys(aServersKeys(t, "hs", c.validUntil), "hs")
		if err != nil {
			t.Fatal(err)
		}
		if got := o.RefreshAt(fetched); got != c.refresh {
			t.Errorf("valid until %d: refresh at %d, want %d", c.validUntil, got, c.refresh)
		}
		for _, id := range []string{"ed25519:a", ""} {
			if !o.Satisfies(id, c.good, fetched) || !o.Satisfies(id, 0, fetched) || !o.Satisfies(id, -1, fetched) {
				t.Errorf("valid until %d: %q is not good at %d", c.validUntil, id, c.good)
			}
			if o.Satisfies(id, c.good+1, fetched) || o.Satisfies(id, math.MaxInt64, fetched) {
				t.Errorf("valid until %d: %q is good after %d", c.validUntil, id, c.good)
			}
		}
		if key, ok := o.RequestKey("ed25519:a", c.good, fetched); !ok || !key.Equal(testKey(t, 1, "a").Public()) {
			t.Errorf("valid until %d: no key at %d", c.validUntil, c.good)
		}
		if key, ok := o.RequestKey("ed25519:a", c.good+1, fetched); ok || key != nil {
			t.Errorf("valid until %d: a key after %d", c.validUntil, c.good)
		}
		// The old key expired at 1000, whatever the object's age.
		for _, f := range []Timestamp{fetched, 0} {
			if !o.Satisfies("ed25519:old", 1000, f) || o.Satisfies("ed25519:old", 1001, f) {
				t.Error("the old key is not good until 1000")
			}
		}
		for _, id := range []string{"ed25519:old", "ed25519:b", "a", ""} {
			if _, ok := o.RequestKey(id, 0, fetched); ok {
				t.Errorf("%q is a key for requests", id)
			}
		}
		if o.Satisfies("ed25519:b", 0, fetched) || o.Satisfies("a", 0, fetched) {
			t.Error("an unknown key is good")
		}
		for _, f := range []Timestamp{math.MinInt64, -1, 0, math.MaxInt64} {
			if got := o.RefreshAt(f); got < f || got > max(f, o.ValidUntil) {
				t.Errorf("valid until %d, fetched at %d: refresh at %d", c.validUntil, f, got)
			}
		}
	}
	// A key that is also an old one is good for as long as an old one.
	k := testKey(t, 1, "a")
	object := fmt.Sprintf(`{"server_name":"hs","valid_until_ts":9000,"verify_keys":{"ed25519:a":{"key":%[1]q}},"old_verify_keys":{"ed25519:a":{"key":%[1]q,"expired_ts":70}}}`, publicText(k))
	o, err := CheckServerKeys(signed(t, object, "hs", k), "hs")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := o.RequestKey("ed25519:a", 60, 0); ok || !o.Satisfies("ed25519:a", 70, 0) || o.Satisfies("ed25519:a", 71, 0) {
		t.Errorf("a key that has expired: %+v", o)
	}
	var zero ServerKeyObject
	if _, ok := zero.RequestKey("ed25519:a", 0, 0); ok || zero.Satisfies("ed25519:a", 0, 0) || zero.SignedBy("") {
		t.Error("the zero value has keys")
	}
}

func FuzzCheckServerKeys(f *testing.F) {
	key := testKey(f, 1, "a")
	f.Add(aServersKeys(f, "hs", 1700000000000))
	f.Add(signed(f, string(aServersKeys(f, "hs", 5)), "notary", testKey(f, 7, "n")))
	f.Add([]byte(`{"server_name":"hs","valid_until_ts":0,"verify_keys":{"ed25519:a":{"key":"` + publicText(key) + `="},"rsa:1":1},"old_verify_keys":{},"unsigned":1}`))
	f.Add([]byte(`{"server_name":"hs","valid_until_ts":1,"valid_until_ts":2,"verify_keys":{"ed25519:a":{"key":"` + publicText(key) + `"}},"signatures":{"a\"":{"":""}}}`))
	f.Add([]byte(`{"old_verify_keys":{"ed25519:b":{"expired_ts":1,"key":"` + publicText(key) + `"}}}`))
	f.Add([]byte(`{"x":[[[[1e3]]]]}`))
	f.Fuzz(func(t *testing.T, object []byte) {
		checkFuzzed(t, object)
		// No fuzzer guesses a signature.
		if b, err := key.Sign(object, "hs"); err == nil {
			checkFuzzed(t, b)
		}
	})
}

// checkFuzzed compares what CheckServerKeys reads with what encoding/json does.
func checkFuzzed(t *testing.T, object []byte) {
	o, err := CheckServerKeys(object, "hs")
	if err != nil {
		if o != nil || !errors.Is(err, ErrServerKeys) {
			t.Fatalf("%q: %v, %v", object, o, err)
		}
		return
	}
	var (
		members    map[string]json.RawMessage
		name       string
		until      Timestamp
		verify     map[string]json.RawMessage
		old        map[string]json.RawMessage
		signatures map[string]map[string]string
	)
	decode := func(raw json.RawMessage, into any) {
		if err := json.Unmarshal(raw, into); err != nil {
			t.Fatalf("%q is taken, but: %v", object, err)
		}
	}
	decode(object, &members)
	decode(members["server_name"], &name)
	decode(members["valid_until_ts"], &until)
	decode(members["verify_keys"], &verify)
	decode(members["signatures"], &signatures)
	if members["old_verify_keys"] != nil {
		decode(members["old_verify_keys"], &old)
	}
	if len(object) > MaxServerKeys || name != "hs" || o.Server != "hs" || until != o.ValidUntil || until < 0 ||
		len(verify) == 0 || len(verify) > maxKeys || len(old) > maxKeys {
		t.Fatalf("%q is taken as %+v", object, o)
	}
	ed25519Keys := func(m map[string]json.RawMessage) map[string]ed25519.PublicKey {
		keys := make(map[string]ed25519.PublicKey)
		for id, raw := range m {
			if !strings.HasPrefix(id, "ed25519:") {
				continue
			}
			var entry map[string]json.RawMessage
			var text string
			decode(raw, &entry)
			decode(entry["key"], &text)
			b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(text, "="))
			if err != nil || len(b) != ed25519.PublicKeySize {
				t.Fatalf("%q is taken with the key %q", object, text)
			}
			keys[id] = b
		}
		return keys
	}
	current, expired := ed25519Keys(verify), ed25519Keys(old)
	good := 0
	for id := range signatures["hs"] {
		if pub := current[id]; pub != nil {
			good++
			if err := VerifyJSON(object, "hs", id, pub); err != nil {
				t.Fatalf("%q is taken with a bad signature: %v", object, err)
			}
		}
	}
	if good == 0 || !o.SignedBy("hs") {
		t.Fatalf("%q is taken without a signature", object)
	}
	for id, pub := range expired {
		delete(current, id)
		if k := o.Old[id]; k.ID != id || !k.Public.Equal(pub) || k.Expired < 0 {
			t.Fatalf("%q: old key %q is %+v", object, id, k)
		}
	}
	for id, pub := range current {
		if !o.Verify[id].Equal(pub) {
			t.Fatalf("%q: key %q is %x", object, id, o.Verify[id])
		}
	}
	if len(current) != len(o.Verify) || len(expired) != len(o.Old) {
		t.Fatalf("%q is taken as %+v", object, o)
	}
	if at := o.RefreshAt(1000); at < 1000 || at > Timestamp(1000).Add(MaxKeyValidity/2) {
		t.Fatalf("%q: refresh at %d", object, at)
	}
}

func BenchmarkCheckServerKeys(b *testing.B) {
	object := signed(b, string(aServersKeys(b, "hs.example", 1700000000000)), "notary.example", testKey(b, 7, "n"))
	b.SetBytes(int64(len(object)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := CheckServerKeys(object, "hs.example"); err != nil {
			b.Fatal(err)
		}
	}
}

// The most that one object can cost: every key has signed, and it is as large as
// may be.
func BenchmarkCheckServerKeysWorst(b *testing.B) {
	var keys []SigningKey
	for i := range maxKeys {
		keys = append(keys, testKey(b, byte(i), fmt.Sprint(i)))
	}
	object, err := ServerKeys("hs", 5, keys, nil)
	if err != nil {
		b.Fatal(err)
	}
	fill := MaxServerKeys - len(object) - len(`"x":"",`)
	object = signed(b, `{"x":"`+strings.Repeat("x", fill)+`",`+string(object[1:]), "hs", keys...)
	b.SetBytes(int64(len(object)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := CheckServerKeys(object, "hs"); err != nil {
			b.Fatal(err)
		}
	}
}

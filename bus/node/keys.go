package node

import (
	"crypto/ed25519"
	"fmt"
	"slices"

	"fsbus/bus/matrix"
	"fsbus/sched"
)

// maxKeyFile is far more than a file of signing keys has.
const maxKeyFile = 64 * sched.KiB

// Keys are a homeserver's signing keys: the one to sign with, and those by which
// its signatures are known.
type Keys struct {
	signing matrix.SigningKey            // the file's first, which Synapse signs requests with, too
	private []matrix.SigningKey          // all of the file
	old     []matrix.OldKey              // those that the file says are no longer in use
	public  map[string]ed25519.PublicKey // by key id, old ones included
}

// readKeys reads the file of signing keys.
func readKeys(path string) (*Keys, error) {
	b, err := readSmall(path, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("%s", reason(err))
	}
	keys, old, err := matrix.ParseSigningKeys(b)
	if err != nil {
		return nil, err
	}
	k := &Keys{signing: keys[0], private: keys, old: old, public: make(map[string]ed25519.PublicKey)}
	for _, o := range old {
		k.public[o.ID] = o.Public
	}
	for _, s := range keys {
		k.public[s.ID()] = s.Public()
	}
	return k, nil
}

// equal reports whether k and o are the same keys; either may be nil.
func (k *Keys) equal(o *Keys) bool {
	if k == nil || o == nil {
		return k == o
	}
	if k.signing.ID() != o.signing.ID() || !slices.Equal(k.signing.Public(), o.signing.Public()) || len(k.public) != len(o.public) {
		return false
	}
	for id, pub := range k.public {
		if !slices.Equal(pub, o.public[id]) {
			return false
		}
	}
	return true
}

// String names the key, and shows nothing else of it.
func (k *Keys) String() string {
	if k == nil {
		return "none"
	}
	return k.signing.ID()
}

// signingKeys reads the file of the homeserver's signing keys.
func (k *checker) signingKeys() {
	const key = "homeserver.signing_key_path"
	h := &k.c.Homeserver
	if h.SigningKeyPath == "" || k.reported(key) {
		return
	}
	h.SigningKeyPath = k.abs(h.SigningKeyPath)
	var err error
	if h.keys, err = readKeys(h.SigningKeyPath); err != nil {
		k.bad(key, quote(h.SigningKeyPath)+": "+clean(err.Error()),
			"the homeserver's signing key file, readable for the user who runs fsbus (the file that signing_key_path of its homeserver.yaml names)")
	}
}

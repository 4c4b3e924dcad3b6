package node

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"fsbus/bus/matrix"
)

// notaryKeyFile is where the notary's key is in DataDir, if KeysConfig.KeyPath
// does not say otherwise.
const notaryKeyFile = "notary.key"

// errOpenToOthers says that a file of a key is open to users who should not have
// the key.
var errOpenToOthers = errors.New("users who should not can read or change it")

// notaryKeyPath returns the file of the notary's key.
func (c *Config) notaryKeyPath() string {
	if c.Keys.KeyPath != "" {
		return c.Keys.KeyPath
	}
	return filepath.Join(c.DataDir, notaryKeyFile)
}

// loadNotaryKey reads the key that the bus signs with as a notary. A key that is
// missing is made, unless KeysConfig.KeyPath says where it should be; DataDir
// must be there. Its errors show nothing of the key.
func loadNotaryKey(cfg *Config) (matrix.SigningKey, error) {
	key, _, err := findNotaryKey(cfg)
	return key, err
}

// findNotaryKey is loadNotaryKey, and says whether the key was made.
func findNotaryKey(cfg *Config) (key matrix.SigningKey, made bool, err error) {
	path := cfg.notaryKeyPath()
	key, err = readNotaryKey(path)
	if errors.Is(err, fs.ErrNotExist) && cfg.Keys.KeyPath == "" {
		if made, err = makeNotaryKey(path); err == nil {
			key, err = readNotaryKey(path) // perhaps of a process that was faster
		}
	}
	if err != nil {
		return matrix.SigningKey{}, false, fmt.Errorf("keys.key_path: the notary's key, %s: %w", quote(path), err)
	}
	return key, made, nil
}

// readNotaryKey reads the first key of a file; it is the one that Synapse would
// sign with. The error wraps fs.ErrNotExist if there is no file, errOpenToOthers,
// or matrix.ErrKey.
func readNotaryKey(path string) (matrix.SigningKey, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return matrix.SigningKey{}, bare(err)
	}
	if mode := fi.Mode().Perm(); fi.Mode().IsRegular() && mode&0o026 != 0 {
		return matrix.SigningKey{}, fmt.Errorf("has mode %v: %w", FileMode(mode), errOpenToOthers)
	}
	b, err := readSmall(path, maxKeyFile)
	if err != nil {
		return matrix.SigningKey{}, bare(err)
	}
	keys, _, err := matrix.ParseSigningKeys(b)
	if err != nil {
		return matrix.SigningKey{}, err
	}
	return keys[0], nil
}

// bare returns err without the operation and the path, which the error's reader
// knows.
func bare(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

// makeNotaryKey makes a key and the file at path, and leaves alone a file that is
// there by then. Whatever happens, there is the whole file or none.
func makeNotaryKey(path string) (made bool, err error) {
	dir := filepath.Dir(path)
	var owner unix.Stat_t
	if err := unix.Stat(dir, &owner); errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("data_dir is not there yet (%w): start fsbus once, or make the folder for the user who runs fsbus", err)
	} else if err != nil {
		return false, err
	}
	f, err := os.CreateTemp(dir, notaryKeyFile+".*") // with mode 0600
	if err != nil {
		return false, bare(err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(newNotaryKey())
	if err == nil && os.Geteuid() == 0 {
		// An admin who asks for Synapse's lines makes it for who runs fsbus.
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return false, err
	}
	// Unlike a rename, a link does not replace the key of another process, which
	// may be known to the homeserver already. Not every file system has links.
	err = os.Link(f.Name(), path)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return false, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return false, bare(err)
	}
	return true, errors.Join(d.Sync(), d.Close())
}

// newNotaryKey returns the text of a file with a new key. Its version is random,
// so that no old key is taken for it.
func newNotaryKey() string {
	const chars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	var version strings.Builder
	for range 4 {
		version.WriteByte(chars[mathrand.IntN(len(chars))])
	}
	var seed [32]byte
	rand.Read(seed[:])
	return "ed25519 fsbus" + version.String() + " " + base64.RawStdEncoding.EncodeToString(seed[:]) + "\n"
}

// keys checks the name of the notary, and the file of its key if there is one.
func (k *checker) keys() {
	c := &k.c.Keys
	const nameKey, pathKey = "keys.notary_name", "keys.key_path"
	const wantName = `a server name that no server has, such as notary_name = "fsbus.invalid"`
	if !k.reported(nameKey) {
		if _, err := matrix.ParseServerName(string(c.NotaryName)); err != nil {
			k.bad(nameKey, "is "+quote(string(c.NotaryName))+": "+clean(err.Error()), wantName)
		} else if c.Notary && strings.EqualFold(string(c.NotaryName), string(k.c.Homeserver.ServerName)) {
			k.bad(nameKey, "is "+quote(string(c.NotaryName))+", which is the homeserver itself", wantName)
		}
	}
	if k.reported(pathKey) {
		return
	}
	if c.KeyPath != "" {
		c.KeyPath = k.abs(c.KeyPath)
	}
	if !c.Notary || c.KeyPath == "" && k.reported("data_dir") { // then where it would be is not known
		return
	}
	path := k.c.notaryKeyPath()
	_, err := readNotaryKey(path)
	switch {
	case err == nil, c.KeyPath == "" && errors.Is(err, fs.ErrNotExist): // then it is made at the start
	case errors.Is(err, errOpenToOthers):
		k.bad(pathKey, quote(path)+" "+clean(err.Error()), "mode 0600 (chmod 600 "+clean(path)+")")
	default:
		k.bad(pathKey, quote(path)+": "+clean(err.Error()),
			`a signing key file as Synapse has it, readable for the user who runs fsbus, or key_path = "" for one that fsbus makes`)
	}
}

// Package synapse holds the module that has Synapse hand over what it sends to other
// servers. FORMAT.md says what the two say to each other.
package synapse

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
)

// File is what the module's file is called where Synapse finds it.
const File = "fsbus_handover.py"

// Module is the module.
//
//go:embed fsbus_handover.py
var Module []byte

// Hash returns the SHA-256 of the module, in hex, by which an older one is known.
func Hash() string {
	sum := sha256.Sum256(Module)
	return hex.EncodeToString(sum[:])
}

// Install writes the module into a folder, which is made if need be, and returns its path.
// It is there whole or not at all.
func Install(dir string) (path string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("install the module: %w", err)
	}
	path = filepath.Join(dir, File)
	f, err := os.CreateTemp(dir, File+".*")
	if err != nil {
		return "", fmt.Errorf("install the module: %w", err)
	}
	_, err = f.Write(Module)
	for _, step := range []func() error{func() error { return f.Chmod(0o644) }, f.Sync, f.Close, func() error { return os.Rename(f.Name(), path) }} {
		if err == nil {
			err = step()
		}
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return "", fmt.Errorf("install the module: %w", err)
	}
	return path, nil
}

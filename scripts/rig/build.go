package rig

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// example is the configuration that all others are made from.
const example = "config.example.toml"

// InRepository fails unless the working directory is the repository's.
func InRepository() error {
	if _, err := os.Stat(example); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no %s here: run this in the folder that has it", example)
	} else if err != nil {
		return err
	}
	return nil
}

// Workspace makes a new folder inside parent, which is made as well if need be,
// and returns its absolute path.
func Workspace(parent string) (string, error) {
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(parent, "run-")
	if err != nil {
		return "", err
	}
	return filepath.Abs(dir)
}

// Build compiles fsbus, stripped as for a release, to the file path. env is for
// other machines, such as "GOARCH=arm".
func Build(ctx context.Context, path string, env ...string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("go build: %w\n%s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// NeedFiles fails if this process may not open n file descriptors. Go has raised
// its limit at the start as far as it may go, and does so in the children that
// are written in Go.
func NeedFiles(n uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("getrlimit: %w", err)
	}
	if limit.Cur < n {
		return fmt.Errorf("a process may open %d files here, %d are needed: raise the hard limit (ulimit -Hn %d, as root) and try again", limit.Cur, n, n)
	}
	return nil
}

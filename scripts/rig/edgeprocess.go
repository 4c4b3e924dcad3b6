package rig

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

const (
	errRefused = syscall.ECONNREFUSED
	errReset   = syscall.ECONNRESET
	errPipe    = syscall.EPIPE
)

// Kill ends the process as the kernel does, without a chance to put anything in
// order, and waits until it has ended.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// TreeUsage is Usage with that of the children, such as the workers of nginx. What
// they share of memory is counted for each.
func (p *Process) TreeUsage() (Usage, error) { return treeUsage(p.cmd.Process.Pid) }

func treeUsage(pid int) (Usage, error) {
	all, err := readUsage(pid)
	if err != nil {
		return Usage{}, err
	}
	// Only the main thread has children where the program is not threaded.
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "task", strconv.Itoa(pid), "children"))
	if err != nil {
		return Usage{}, err
	}
	for _, word := range bytes.Fields(text) {
		child, err := strconv.Atoi(string(word))
		if err != nil {
			return Usage{}, fmt.Errorf("rig: the children of %d are %q", pid, text)
		}
		u, err := treeUsage(child)
		if err != nil {
			return Usage{}, err
		}
		all.RSS += u.RSS
		all.PeakRSS += u.PeakRSS
		all.CPU += u.CPU
		all.Files += u.Files
	}
	return all, nil
}

package rig

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Process is a child process. Its methods may be called concurrently.
type Process struct {
	name string // of its program
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	err  error // how it ended; written before done is closed
}

// StartProcess starts a command, a program with its arguments, whose output goes
// to a new file log.
//
// It is in a process group of its own: Ctrl-C is for us, who then stop it in good
// order. Should we be killed the kernel kills it as well.
func StartProcess(log string, command ...string) (*Process, error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &Process{name: filepath.Base(command[0]), log: log, done: make(chan struct{})}
	p.cmd = exec.Command(command[0], command[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", strings.Join(command, " "), err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running returns nil while the process runs, and afterwards how it ended with
// the last lines that it wrote.
func (p *Process) Running() error {
	select {
	case <-p.done:
	default:
		return nil
	}
	how := "exit status 0"
	if p.err != nil {
		how = p.err.Error()
	}
	return fmt.Errorf("%s has ended (%s); the last that it wrote:\n%s", p.name, how, p.logTail())
}

// Stop asks the process to end with SIGTERM, and kills it if it has not after
// patience. The error says if it had to, or what exit status there was.
func (p *Process) Stop(patience time.Duration) error {
	select {
	case <-p.done:
		return p.err
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.err
	case <-timer.C:
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return fmt.Errorf("%s did not end within %v and was killed", p.name, patience)
}

// Usage returns what the process uses now.
func (p *Process) Usage() (Usage, error) { return readUsage(p.cmd.Process.Pid) }

// ResetPeak begins a new period for Usage.PeakRSS.
func (p *Process) ResetPeak() error { return resetPeak(p.cmd.Process.Pid) }

// logTail returns the last lines of what the process wrote, indented.
func (p *Process) logTail() string {
	const lines = 10
	text, err := os.ReadFile(p.log)
	if err != nil {
		return "  " + err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	all = all[max(0, len(all)-lines):]
	return "  " + string(bytes.Join(all, []byte("\n  ")))
}

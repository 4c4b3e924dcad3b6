package rig

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What is typed, the exit code, and what is printed.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	fsbus := filepath.Join(dir, "fsbus")
	if out, err := exec.Command("go", "build", "-o", fsbus, "fsbus").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fine := write("fine.toml", "data_dir = \".\"\n[homeserver]\nserver_name = \"example.org\"\n[front]\nlisten = \"127.0.0.1:8009\"\nsecret = \"0123456789abcdef\"\n[outbound]\nworkers = 50\n")
	// Who may not read the secret, or makes a mistake elsewhere, may still ask.
	unreadable := write("unreadable.toml", "data_dir = \".\"\n[front]\nsecret_path = \"missing\"\n[outbound]\nworkers = 0\n[status]\nlisten = \"unix:no.sock\"\n")
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"-h", 0, "\n  synapse-config  print the lines for homeserver.yaml\n"},
		{"help", 0, "\n  run             serve until SIGTERM"},
		{"--version", 0, "fsbus "},
		{"-version", 0, "fsbus "},
		{"version", 0, "fsbus "},
		{"version x", 2, "unexpected argument"},
		{"nonsense", 2, `unknown command "nonsense"`},
		{"run -nonsense", 2, "usage: fsbus run [FLAGS]"},
		{"check -h", 0, "usage: fsbus check [FLAGS]"},
		{"check -config " + fine, 0, "note: changed to go with what is set: outbound.unknown_hosts from 72 to 36"},
		{"check -config " + unreadable, 2, "front.secret_path"},
		{"synapse-config -config " + unreadable, 2, "front.secret_path"},
		{"status -config " + unreadable, 1, "no fsbus answers at " + dir + "/no.sock"},
		{"queue -config " + unreadable, 1, "no fsbus is running that answers at " + dir + "/admin.sock"},
		{"explain a.test -config " + unreadable, 1, "no fsbus is running that answers at " + dir + "/admin.sock"},
		{"explain a_b -config " + unreadable, 2, "is not a server's name"},
		{"queue help", 0, "usage: fsbus queue [FLAGS]"},
		{"queue help drop", 0, "usage: fsbus queue drop DESTINATION"},
		{"queue help nonsense", 2, "unknown command"},
	} {
		out, err := exec.Command(fsbus, strings.Fields(tt.args)...).CombinedOutput()
		code := 0
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if code != tt.code || !strings.Contains(string(out), tt.says) {
			t.Errorf("%s: exit code %d, want %d; %q is wanted in\n%s", tt.args, code, tt.code, tt.says, out)
		}
	}
}

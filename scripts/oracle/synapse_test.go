package oracle

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

//go:embed synapse.py
var synapseScript string

// python is a Python with a Synapse, which answers one question at a time.
type python struct {
	mu  sync.Mutex
	in  io.WriteCloser
	out *bufio.Reader
}

// startPython starts the command line in SYNAPSE_PYTHON once for all tests. There is
// none if it is not set, and an error if it is but fails.
var startPython = sync.OnceValues(func() (*python, error) {
	command := strings.Fields(os.Getenv("SYNAPSE_PYTHON"))
	if len(command) == 0 {
		return nil, nil
	}
	cmd := exec.Command(command[0], append(command[1:], "-c", synapseScript)...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	return &python{in: in, out: bufio.NewReader(out)}, cmd.Start()
})

// synapse returns the Synapse to ask, or nil if there is none.
func synapse(t *testing.T) *python {
	t.Helper()
	p, err := startPython()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// answer is what synapse.py answers to any question.
type answer struct {
	Error       string
	Version     string
	Origin      string
	Key         string
	Sig         string
	Destination string
	Header      string
	IDs         map[string]string
}

func (p *python) ask(t *testing.T, op string, question map[string]any) answer {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	question["op"] = op
	line, err := json.Marshal(question)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
	back, err := p.out.ReadBytes('\n')
	if err != nil {
		t.Fatalf("SYNAPSE_PYTHON ended: %v", err)
	}
	var a answer
	if err := json.Unmarshal(back, &a); err != nil {
		t.Fatalf("%s: %v", back, err)
	}
	return a
}

// TestVersions says what the others are held against: which versions of them.
func TestVersions(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mod), "github.com/matrix-org/gomatrixserverlib "+gmlVersion+"\n") {
		t.Errorf("the tables are of gomatrixserverlib %s, which go.mod does not have", gmlVersion)
	}
	s := synapse(t)
	if s == nil {
		t.Skip("no Synapse: set SYNAPSE_PYTHON")
	}
	got := s.ask(t, "version", map[string]any{}).Version
	t.Logf("Synapse %s", got)
	if !strings.HasPrefix(got, synapseVersion+",") {
		t.Errorf("the tables are of Synapse %s, this one is %s", synapseVersion, got)
	}
}

// The versions that the tables of differences hold for.
const (
	gmlVersion     = "v0.0.0-20260506075950-c9c468727353"
	synapseVersion = "1.160.0"
)

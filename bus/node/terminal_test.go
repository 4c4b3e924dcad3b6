package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode"

	"fsbus/bus/matrix"
)

// tricks are characters that a terminal obeys, or that hide or reorder text.
const tricks = "\x1b[2J\x07\x7f\u009b\u202e\u2066\u200b\ufeff\u2028\r\x00"

// obeyed returns the first of what may not reach a terminal.
func obeyed(s string) (rune, bool) {
	for _, r := range s {
		if r == unicode.ReplacementChar || r != '\n' && r != '\t' && unicode.In(r, unicode.C, unicode.Zl, unicode.Zp) {
			return r, true
		}
	}
	return 0, false
}

// Nothing that other servers say gets through a table, not even a line of its own.
func TestTablesAreClean(t *testing.T) {
	evil := "a" + tricks + "\nFAKE\tLINE"
	now := time.Now()
	r := &Report{Version: evil, ServerName: evil, Health: evil, Homeserver: HomeserverReport{LastSeen: &now, Text: evil}}
	r.Hosts.Worst = []HostReport{{Name: evil, LastError: evil}}
	r.Joins.Joins = []JoinReport{{Room: evil, Phase: evil}}
	r.Edge = &EdgeReport{
		Homeserver: HomeReport{Why: evil},
		Worst:      []OriginReport{{Name: evil}},
		GapRooms:   []GapReport{{Room: evil, Origin: matrix.ServerName(evil)}},
	}
	var b strings.Builder
	if err := writeTable(&b, r); err != nil {
		t.Fatal(err)
	}
	if r, ok := obeyed(b.String()); ok {
		t.Errorf("%U gets through", r)
	}
	if strings.Contains(b.String(), "\nFAKE") || strings.Count(b.String(), "FAKE") < 9 {
		t.Errorf("%q", b.String())
	}
	b.Reset()
	say(&b, "%s %s %v %d %s", evil, errors.New(evil), matrix.ServerName(evil), 7, time.Second)
	if want := strings.Repeat(printable(evil)+" ", 3) + "7 1s"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

// What is printed of reports goes through say.
func TestTablesArePrintedInOneWay(t *testing.T) {
	for _, pattern := range []string{"printstatus.go", "queue_*.go", "*report.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(f, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && slices.Contains([]string{"Fprintf", "Fprint", "Fprintln"}, s.Sel.Name) {
					t.Errorf("%s prints with fmt.%s", file, s.Sel.Name)
				}
				return true
			})
		}
	}
}

func TestCleanKeepsJSON(t *testing.T) {
	in, err := json.Marshal(map[string]string{"é\U0001f600": tricks + "plain"})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := Clean(iotest.TruncateWriter(&b, 1<<20)).Write(in); err != nil {
		t.Fatal(err)
	}
	var out map[string]string
	if err := json.Unmarshal(b.Bytes(), &out); err != nil || out["é\U0001f600"] != tricks+"plain" {
		t.Errorf("%s: %v %q", &b, err, out)
	}
}

func FuzzClean(f *testing.F) {
	f.Add([]byte("plain é"+tricks), uint8(3))
	f.Add([]byte("\xff\xc3"), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, piece uint8) {
		var b bytes.Buffer
		w := Clean(&b)
		for rest := in; len(rest) > 0; {
			n := min(int(piece)+1, len(rest))
			if m, err := w.Write(rest[:n]); m != n || err != nil {
				t.Fatal(m, err)
			}
			rest = rest[n:]
		}
		if r, ok := obeyed(b.String()); ok {
			t.Errorf("%q: %U gets through", in, r)
		}
		if printed := strings.ToValidUTF8(string(in), "\x00"); printable(printed) == printed && b.String() != printed {
			t.Errorf("%q is changed: %q", in, b.String())
		}
	})
}

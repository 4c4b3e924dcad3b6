package node

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// forbidden says which imports a package must not have, itself or through
// others of ours, and why.
var forbidden = []struct{ from, to, why string }{
	{"fsbus/bus", "fsbus/store", "the core says what is to be stored, it does not store"},
	{"fsbus/bus", "fsbus/netx", "the core says what is to be sent, it does not send"},
	{"fsbus/bus", "fsbus/bus/node", "the core does not know who runs it"},
	{"fsbus/bus", "fsbus/bus/edge", "what goes out and what comes in are decided apart, and meet in bus/node"},
	{"fsbus/bus/edge", "fsbus/bus", "what goes out and what comes in are decided apart, and meet in bus/node"},
	{"fsbus/bus/edge", "fsbus/store", "the core says what is to be stored, it does not store"},
	{"fsbus/bus/edge", "fsbus/netx", "the core says what is to be sent, it does not send"},
	{"fsbus/bus/matrix", "fsbus/bus", "the vocabulary is below everything that speaks it"},
	{"fsbus/bus/matrix", "fsbus/sched", "the vocabulary knows no schedule"},
	{"fsbus/sched", "fsbus/bus", "what is scheduled is not the scheduler's business"},
	{"fsbus/sched", "fsbus/bus/matrix", "what is scheduled is not the scheduler's business"},
	{"fsbus/sched", "fsbus/store", "the loop must not wait for a disk"},
	{"fsbus/sched", "fsbus/netx", "the loop must not wait for a network"},
	{"fsbus/store", "fsbus/netx", "disk and network meet in bus/node only"},
	{"fsbus/store", "fsbus/sched", "the store has one goroutine of its own and needs no scheduler"},
	{"fsbus/store", "fsbus/bus", "rows are the store's own, so that the core may change without the schema"},
	{"fsbus/netx", "fsbus/store", "disk and network meet in bus/node only"},
	{"fsbus/netx", "fsbus/sched", "the network is told when to work by its caller"},
	{"fsbus/netx", "fsbus/bus", "the network does what it is told"},
	{"fsbus/bus/sim", "fsbus/store", "a simulation with a real disk cannot be replayed"},
	{"fsbus/bus/sim", "fsbus/netx", "a simulation with a real network cannot be replayed"},
}

// pure packages may not import these themselves.
var impure = map[string]string{
	"net": "no network", "net/http": "no network", "os": "no files, no environment", "database/sql": "no database",
	"log": "errors are returned", "log/slog": "errors are returned", "sync": "one goroutine owns the state",
	"sync/atomic": "one goroutine owns the state", "context": "nothing blocks", "runtime": "nothing depends on the machine",
	"math/rand": "randomness is handed in", "crypto/rand": "randomness is handed in", "unsafe": "no",
}

// thirdParty is what may be imported from outside, and by whom. The reasons
// stand in README.md under "What it is built from".
var thirdParty = map[string][]string{
	"modernc.org/sqlite":         {"fsbus/store"},
	"modernc.org/sqlite/lib":     {"fsbus/store"},
	"golang.org/x/time/rate":     {"fsbus/bus", "fsbus/bus/edge", "fsbus/sched", "fsbus/netx", "fsbus/bus/node"},
	"github.com/BurntSushi/toml": {"fsbus/bus/node"},
	"filippo.io/edwards25519":    {"fsbus/bus/matrix"}, // verifies a signature of what is not in memory
	"golang.org/x/sys/unix":      {"fsbus/netx", "fsbus/store", "fsbus/bus/node"},
}

type pkg struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports,Deps", "fsbus/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	pkgs := map[string]pkg{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[p.ImportPath] = p
	}
	for _, name := range []string{"fsbus", "fsbus/bus", "fsbus/bus/edge", "fsbus/bus/matrix", "fsbus/bus/node", "fsbus/bus/sim", "fsbus/sched", "fsbus/store", "fsbus/netx"} {
		if pkgs[name].Dir == "" {
			t.Fatalf("package %s is missing from %d", name, len(pkgs))
		}
	}
	return pkgs
}

func TestImportDirection(t *testing.T) {
	pkgs := packages(t)
	for _, f := range forbidden {
		if slices.Contains(pkgs[f.from].Deps, f.to) {
			t.Errorf("%s must not import %s: %s", f.from, f.to, f.why)
		}
	}
	for _, name := range []string{"fsbus/bus", "fsbus/bus/edge", "fsbus/bus/matrix"} {
		for _, imp := range pkgs[name].Imports {
			if why, bad := impure[imp]; bad {
				t.Errorf("%s must not import %s: %s", name, imp, why)
			}
		}
	}
	for name, p := range pkgs {
		if strings.HasPrefix(name, "fsbus/scripts/") {
			continue // not part of the binary
		}
		for _, imp := range p.Imports {
			if first, _, _ := strings.Cut(imp, "/"); !strings.Contains(first, ".") {
				continue // the standard library or our own
			}
			if !slices.Contains(thirdParty[imp], name) {
				t.Errorf("%s imports %s, which is not agreed", name, imp)
			}
		}
	}
}

// starters are the functions that may start a goroutine. Nothing else does:
// nothing per destination, per message or per timer.
var starters = map[string]string{
	"bus/node/node.go serve": "the loop, and one for each listener",
	"sched/pool.go NewPool":  "a fixed number, when the pool is made",
	"store/writer.go start":  "the one writer",
	"netx/front.go accept":   "one for each connection until its request is handed over, netx.MaxComing at most",
	"netx/edge.go Serve":     "one for each listener",
	"netx/edgelisten.go run": "one for each handshake, max_connections at most",
	"netx/watch.go watch":    "the one watcher, while there is something to watch",
	"netx/dial.go race":      "at most two attempts to connect, ended with the dial",
}

func TestGoroutinesStartOnlyWhereTheyMay(t *testing.T) {
	seen := map[string]bool{}
	eachFile(t, []string{".", "bus", "sched", "store", "netx"}, func(path string, f *ast.File) {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				if _, ok := n.(*ast.GoStmt); ok {
					where := path + " " + fn.Name.Name
					seen[where] = true
					if starters[where] == "" {
						t.Errorf("%s starts a goroutine", where)
					}
				}
				return true
			})
		}
	})
	for where := range starters {
		if !seen[where] {
			t.Errorf("%s starts no goroutine any more: take it off the list", where)
		}
	}
}

// In the core, time is an argument, and nothing waits.
func TestCoreReadsNoClockAndNeverWaits(t *testing.T) {
	banned := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick"}
	files := 0
	eachFile(t, []string{"bus", "bus/edge", "bus/matrix"}, func(path string, f *ast.File) {
		if dir := filepath.Dir(path); dir != "bus" && dir != "bus/edge" && dir != "bus/matrix" {
			return
		}
		files++
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(banned, n.Sel.Name) {
					t.Errorf("%s uses time.%s", path, n.Sel.Name)
				}
			case *ast.SelectStmt, *ast.SendStmt, *ast.ChanType:
				t.Errorf("%s uses a channel", path)
			}
			return true
		})
	})
	if files < 10 {
		t.Errorf("only %d files were looked at", files)
	}
}

// eachFile parses the Go files below dirs of the module, tests left out.
func eachFile(t *testing.T, dirs []string, f func(path string, file *ast.File)) {
	t.Helper()
	const root = "../.."
	done := map[string]bool{}
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			switch rel, _ := filepath.Rel(root, path); {
			case err != nil:
				return err
			case d.IsDir() && (dir == "." && path != filepath.Join(root, dir) || d.Name() == "testdata"):
				return fs.SkipDir
			case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || done[path]:
				return nil
			default:
				done[path] = true
				file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
				if err != nil {
					return err
				}
				f(filepath.ToSlash(rel), file)
				return nil
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

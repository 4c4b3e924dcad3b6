// Command fsbus is the federation-side bus: it carries all of a Matrix
// homeserver's federation traffic within fixed limits of memory, connections
// and processor time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"fsbus/bus/node"
	"fsbus/scripts/synapse"
)

// version is set by the Makefile from git.
var version = ""

// stderr is for what is said to whoever sits at the terminal.
var stderr = node.Clean(os.Stderr)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // something went wrong while running
	exitUsage  = 2 // wrong use of the command line, or a mistake in the configuration
)

// command is one subcommand. Its flags are added before run is called with
// what was given.
type command struct {
	name, about string
	run         func(fs *flag.FlagSet, args []string) int
}

// commands are all of them, the default first.
var commands = []command{
	{"run", "serve until SIGTERM or SIGINT (the default); SIGHUP reloads the configuration", runCommand},
	{"check", "read the configuration, print the effective budgets, and exit", checkCommand},
	{"status", "ask a running fsbus for its status and print it", statusCommand},
	{"queue", "show and change what waits for other servers (queue -h: how)", queueCommand(node.Queue)},
	{"explain", "say in words why what waits for a server does", queueCommand(node.Explain)},
	{"synapse-config", "print the lines for homeserver.yaml", synapseCommand},
	{"synapse-module", "print the module that has Synapse give each event once, install it, or say where", moduleCommand},
	{"version", "print the version", versionCommand},
}

// usage explains the commands.
func usage() string {
	var b strings.Builder
	b.WriteString("fsbus carries a Matrix homeserver's federation traffic.\n\nusage: fsbus [COMMAND] [FLAGS]\n\ncommands:\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "  %-14s  %s\n", c.name, c.about)
	}
	b.WriteString("\nEach command explains its flags with -h.\n\n" +
		"exit codes: 0 fine, 1 failed, 2 used wrongly or a mistake in the configuration\n")
	return b.String()
}

func main() {
	os.Exit(dispatch(os.Args[1:]))
}

func dispatch(args []string) int {
	name := commands[0].name
	if len(args) > 0 {
		switch first := args[0]; {
		case first == "-h" || first == "-help" || first == "--help" || first == "help":
			io.WriteString(os.Stdout, usage())
			return exitOK
		case first == "-version" || first == "--version":
			name, args = "version", args[1:]
		case first != "" && first[0] != '-':
			name, args = first, args[1:]
		}
	}
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == name })
	if i < 0 {
		fmt.Fprintf(stderr, "fsbus: unknown command %q\n\n%s", name, usage())
		return exitUsage
	}
	c := commands[i]
	fs := flag.NewFlagSet("fsbus "+name, flag.ContinueOnError)
	fs.SetOutput(os.Stderr)
	fs.Usage = func() {
		fmt.Fprintf(fs.Output(), "usage: fsbus %s [FLAGS]\n\n%s\n\n", name, c.about)
		fs.PrintDefaults()
	}
	return c.run(fs, args)
}

// parse reads a command's flags; done means that the command ends with code.
func parse(fs *flag.FlagSet, args []string) (code int, done bool) {
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK, true
	case err != nil:
		return exitUsage, true
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "fsbus: unexpected argument %q; see %s -h\n", fs.Arg(0), fs.Name())
		return exitUsage, true
	}
	return exitOK, false
}

func configFlag(fs *flag.FlagSet) *string {
	return fs.String("config", node.DefaultPath, "the configuration `file`")
}

// load reads the configuration with Load or LoadAddresses, and prints what is wrong
// with it.
func load(read func(path string) (*node.Config, error), path string) (*node.Config, bool) {
	cfg, err := read(path)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return nil, false
	}
	return cfg, true
}

func runCommand(fs *flag.FlagSet, args []string) int {
	path := configFlag(fs)
	if code, done := parse(fs, args); done {
		return code
	}
	cfg, ok := load(node.Load, *path)
	if !ok {
		return exitUsage
	}
	var level slog.LevelVar
	log := node.NewLogger(os.Stderr, cfg, &level)
	for _, w := range cfg.Warnings() {
		log.Warn(w)
	}
	for _, err := range cfg.Missing() {
		log.Error("fsbus starts without a part of it", "error", err)
	}
	// What net/http says of remotes that break the protocol.
	stdlog.SetFlags(0)
	stdlog.SetOutput(slog.NewLogLogger(log.Handler(), slog.LevelDebug).Writer())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	n, err := node.New(ctx, cfg, buildVersion(), log, &level)
	if err != nil {
		log.Error("fsbus cannot start", "error", err)
		return exitFailed
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	if err := n.Run(ctx, hup, func() (*node.Config, error) { return node.Load(*path) }); err != nil {
		log.Error("fsbus failed", "error", err)
		return exitFailed
	}
	return exitOK
}

func checkCommand(fs *flag.FlagSet, args []string) int {
	path := configFlag(fs)
	user := fs.String("user", "", "say which files this `user`, as whom the service runs, cannot read")
	if code, done := parse(fs, args); done {
		return code
	}
	cfg, ok := load(node.Load, *path)
	if !ok {
		return exitUsage
	}
	if _, err := cfg.Budget().WriteTo(node.Clean(os.Stdout)); err != nil {
		return exitFailed
	}
	for _, s := range cfg.Notes() {
		fmt.Println("note:", s)
	}
	for _, w := range cfg.Warnings() {
		fmt.Println("warning:", w)
	}
	wrong, notes, err := cfg.AtStart(*user)
	if err != nil {
		fmt.Fprintln(stderr, "fsbus:", err)
		return exitUsage
	}
	for _, s := range notes {
		fmt.Println("note:", s)
	}
	for _, s := range wrong {
		fmt.Println("at the start:", s)
	}
	missing := cfg.Missing()
	for _, err := range missing {
		fmt.Fprintln(stderr, err)
	}
	switch {
	case len(missing) > 0:
		return exitUsage
	case len(wrong) > 0:
		return exitFailed
	}
	fmt.Printf("%s: no mistakes found\n", *path)
	return exitOK
}

func statusCommand(fs *flag.FlagSet, args []string) int {
	path := configFlag(fs)
	address := fs.String("address", "", "the status listener's `address` (default: as in the configuration)")
	asJSON := fs.Bool("json", false, "print the JSON of /status as it is")
	if code, done := parse(fs, args); done {
		return code
	}
	if *address == "" {
		cfg, ok := load(node.LoadAddresses, *path)
		if !ok {
			return exitUsage
		}
		if *address = cfg.Status.Listen; *address == "" {
			fmt.Fprintf(stderr, "fsbus: %s has no status.listen, so there is no status to ask for\n", *path)
			return exitUsage
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := node.PrintStatus(ctx, node.Clean(os.Stdout), *address, *asJSON); err != nil {
		fmt.Fprintln(stderr, "fsbus:", err)
		return exitFailed
	}
	return exitOK
}

// queueCommand runs a command that has flags of its own.
func queueCommand(run func(context.Context, node.Terminal, []string) error) func(*flag.FlagSet, []string) int {
	return func(_ *flag.FlagSet, args []string) int {
		switch err := run(context.Background(), node.Stdio(), args); {
		case err == nil, errors.Is(err, flag.ErrHelp):
			return exitOK
		case errors.Is(err, node.ErrUsage):
			return exitUsage
		default:
			fmt.Fprintln(stderr, "fsbus:", err)
			return exitFailed
		}
	}
}

func synapseCommand(fs *flag.FlagSet, args []string) int {
	path := configFlag(fs)
	if code, done := parse(fs, args); done {
		return code
	}
	cfg, ok := load(node.Load, *path)
	if !ok {
		return exitUsage
	}
	lines, err := cfg.SynapseConfig()
	if err != nil {
		fmt.Fprintln(stderr, "fsbus:", err)
		return exitFailed
	}
	io.WriteString(os.Stdout, lines)
	return exitOK
}

// moduleWhere says where Synapse finds the module, by packaging.
const moduleWhere = `Synapse must find fsbus_handover.py. Put it into a folder of its own, so that no update
of Python or Synapse takes it away:

  Debian, and the packages of matrix.org
      fsbus synapse-module -install /etc/matrix-synapse/modules
      and in /etc/default/matrix-synapse: PYTHONPATH=/etc/matrix-synapse/modules
  Docker
      fsbus synapse-module -install /some/folder, mount that folder read-only at
      /modules, and set PYTHONPATH=/modules; mount the socket of fsbus, too
  matrix-docker-ansible-deploy
      mount it with matrix_synapse_container_additional_volumes into the folder that
      matrix_synapse_in_container_python_packages_path names
  ESS (Helm)
      extraVolumes and extraVolumeMounts, and synapse.additional for the lines below
  NixOS
      services.matrix-synapse.plugins
  YunoHost, or a virtual environment
      a folder of its own, and PYTHONPATH in a drop-in of the systemd unit

Then add the modules line that fsbus synapse-config prints, and restart Synapse. To take
it out again, remove that line and restart. After an update of fsbus install it again;
fsbus status says when it is old. A Synapse that it does not know it leaves as it is, and
says so once in Synapse's log.
`

func moduleCommand(fs *flag.FlagSet, args []string) int {
	install := fs.String("install", "", "write it into this `folder`, which is made if need be")
	where := fs.Bool("where", false, "say where Synapse finds it, by packaging")
	if code, done := parse(fs, args); done {
		return code
	}
	switch {
	case *where:
		io.WriteString(os.Stdout, moduleWhere)
	case *install != "":
		path, err := synapse.Install(*install)
		if err != nil {
			fmt.Fprintln(stderr, "fsbus:", err)
			return exitFailed
		}
		fmt.Printf("%s is written; fsbus synapse-module -where says what else Synapse needs\n", path)
	default:
		os.Stdout.Write(synapse.Module)
	}
	return exitOK
}

func versionCommand(fs *flag.FlagSet, args []string) int {
	if code, done := parse(fs, args); done {
		return code
	}
	fmt.Printf("fsbus %s (%s %s/%s)\n", buildVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return exitOK
}

// buildVersion is what the Makefile set, else what go build recorded.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value[:min(12, len(s.Value))]
			}
		}
	}
	return "unknown"
}

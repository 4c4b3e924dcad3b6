// Command bench measures fsbus in one run on one machine: against a naive proxy
// that does the same work without any limit, and against no proxy at all.
//
//	go run ./scripts/bench                        everything, about 34 minutes
//	go run ./scripts/bench -run 'overhead|large'  some of it
//	go run ./scripts/bench -json result.json      with every round, for comparisons
//
// The scenarios profiles, keys and joins send what a homeserver does when a user
// opens the members of a large room, or joins it, on each of the three ways: no
// proxy, the naive one, fsbus. They take 7, 2 and 5 minutes, most of which is
// waiting for dead and slow servers where there is no fsbus. Those whose names begin with
// edge are about what other servers send, and take 8; hostile is what of that is meant
// ill, and takes 2; edge-throughput compares with nginx
// or Caddy (-proxy), if there is one.
//
// The simulated servers, the homeserver's part and the proxies share the machine,
// so times and rates tell little by themselves. What is compared is measured in
// turns, A B C A B C, many times over, so that a machine that is now faster and
// now slower is so for all; of the rounds the median counts, and the least and
// the most are shown.
//
// Exit codes: 0 all bounds are kept, 1 one is missed or something failed, 2 used
// wrongly.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"fsbus/scripts/rig"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == naiveCommand {
		os.Exit(naive(os.Args[2:]))
	}
	os.Exit(run())
}

// needFiles is what the storms take: a listening socket for each server, and in
// this process one end of every connection of the homeserver's, and one of each
// that the naive proxy opens to a server.
const needFiles = 3*stormServers + 500

// bench is one run.
type bench struct {
	dir    string
	fsbus  []string // the command
	self   string   // this program, for the naive proxy
	result result
	runs   int // makes names of folders
}

// scenarios are run in this order.
var scenarios = []struct {
	name  string
	about string
	run   func(context.Context, *bench) error
}{
	{"idle", "a bus with nothing to do, and the size of the program", idle},
	{"overhead", "small lookups one after another to servers that are connected", overhead},
	{"throughput", "small lookups 64 at a time to 200 servers that are connected", throughput},
	{"large", "an answer of 100 MiB", large},
	{"storm-send", "a transaction for each of 4,000 servers, a third of them dead, at once", stormSend},
	{"storm-lookups", "a lookup for each of 4,000 servers, a third of them dead, at once", stormLookups},
	{"fanout", "an event for each of 4,000 servers, at once, through the outbox", fanout},
	{"profiles", "8,000 profiles on 500 servers, a third of them dead, 50 at a time, twice over", profiles},
	{"keys", "10,000 queries for the keys of 2,000 servers at one slow notary", keyQueries},
	{"scan", "a send_join of 100 MB, looked through while it passes and not", scan},
	{"joins", "rooms whose servers take minutes to answer, or send 120 MB slowly", joins},
	{"destinations", "what a delivered transaction costs with 100, 1,000 and 10,000 destinations", destinations},
	{"edge-throughput", "small transactions of 64 servers to ours, with a plain reverse proxy and with fsbus before it", edgeThroughput},
	{"edge-forged", "10,000 requests that are not by whom they say, while 20 servers send in earnest", edgeForged},
	{"edge-retries", "a transaction of each of 500 servers, sent 12 times over, with a kill -9 in between", edgeRetries},
	{"edge-connections", "2,000 servers that stay connected, where there are 320 places", edgeConnections},
	{"hostile", "attacks of all kinds on the edge, the front and the status page, from one address and from sixteen", hostile},
	{"edge-storm", "presence of 2,000 servers, as fast as it is taken, while 20 servers send events", edgeStorm},
}

func run() int {
	which := flag.String("run", "", "only scenarios whose name matches this `regexp`")
	file := flag.String("json", "", "write the figures to this `file`")
	parent := flag.String("dir", ".demo", "the `folder` for all that is written meanwhile; it is removed")
	alone := flag.Bool("alone", false, "profiles, keys and joins: only with fsbus, not without it and with the naive proxy, which takes minutes")
	fsbus := flag.String("fsbus", "", "the `command` that is fsbus, words separated by spaces (default: build it)")
	flag.Parse()
	match, err := regexp.Compile(*which)
	if err != nil || flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "bench: used wrongly: %v %q\n", err, flag.Args())
		return 2
	}
	if *alone {
		waysThere = waysThere[len(waysThere)-1:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	b := &bench{fsbus: strings.Fields(*fsbus)}
	err = b.all(ctx, *parent, match)
	if err == nil && *file != "" {
		err = b.result.write(*file)
	}
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			err = errors.New("stopped")
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	fmt.Print(b.result.bounds())
	if b.result.missed() > 0 {
		return 1
	}
	return 0
}

// all runs the scenarios that match.
func (b *bench) all(ctx context.Context, parent string, match *regexp.Regexp) error {
	if err := rig.InRepository(); err != nil {
		return err
	}
	if err := rig.NeedFiles(needFiles); err != nil {
		return err
	}
	var err error
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	if b.dir, err = rig.Workspace(parent); err != nil {
		return err
	}
	defer func() {
		os.RemoveAll(b.dir)
		os.Remove(parent) // if it is empty
	}()
	if len(b.fsbus) == 0 {
		binary := filepath.Join(b.dir, "fsbus")
		if err := rig.Build(ctx, binary); err != nil {
			return err
		}
		b.fsbus = []string{binary}
	}
	b.result.Machine = machine()
	fmt.Println(b.result.Machine)
	ran := 0
	for _, s := range scenarios {
		if !match.MatchString(s.name) {
			continue
		}
		ran++
		b.result.begin(s.name)
		fmt.Printf("\n%s: %s\n", strings.ToUpper(s.name), s.about)
		start := time.Now()
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Print(b.result.table(s.name))
		fmt.Printf("  (took %.0f s)\n", time.Since(start).Seconds())
	}
	if ran == 0 {
		return fmt.Errorf("no scenario matches %q", match)
	}
	return nil
}

// folder returns a new folder for one process.
func (b *bench) folder() (string, error) {
	b.runs++
	dir := filepath.Join(b.dir, fmt.Sprint(b.runs))
	return dir, os.Mkdir(dir, 0o755)
}

// Command demo shows what fsbus does for a homeserver whose rooms reach
// hundreds of servers, many of which are down. It needs no root, no network and
// no homeserver: it builds fsbus, starts it with the example configuration before
// a simulated federation on loopback, and plays a homeserver's part with
// requests that a real Synapse made and with storms of profile lookups.
//
//	go run ./scripts/demo                 40 seconds, then a table
//	go run ./scripts/demo -keep           stays until Ctrl-C, to look at the status page
//	go run ./scripts/demo -quick -fsbus 'qemu-arm-static dist/fsbus-linux-armv7'
//
// Exit codes: 0 all went as it should, 1 something did not, 2 used wrongly.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	os.Exit(run())
}

func run() int {
	var o options
	flag.BoolVar(&o.quick, "quick", false, "100 servers and some ten seconds; checks what was answered, and neither memory nor times")
	flag.BoolVar(&o.keep, "keep", false, "leave it running after the table, until Ctrl-C")
	flag.StringVar(&o.dir, "dir", ".demo", "the `folder` for all that is written; it is removed if all went well")
	fsbus := flag.String("fsbus", "", "the `command` that is fsbus, words separated by spaces (default: build it)")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: unexpected argument %q\n", flag.Arg(0))
		return 2
	}
	o.fsbus = strings.Fields(*fsbus)

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	switch err := demo(ctx, o, newScreen(os.Stdout)); {
	case ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)):
		fmt.Fprintln(os.Stderr, "demo: stopped")
		if o.keep && err == nil {
			return 0
		}
		return 1
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	return 0
}

package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"fsbus/bus/matrix"
)

// DefaultPath is where the configuration is looked for.
const DefaultPath = "/etc/fsbus/config.toml"

// ErrUsage is returned by a command that was used wrongly, or whose configuration
// has mistakes. The command has said so.
var ErrUsage = errors.New("used wrongly")

// Terminal is where a command reads and writes.
type Terminal struct {
	In          io.Reader
	Out, Err    io.Writer
	Interactive bool // somebody reads, and can be asked
}

// Stdio is the process's own terminal.
func Stdio() Terminal {
	_, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), getTermios)
	return Terminal{In: os.Stdin, Out: Clean(os.Stdout), Err: Clean(os.Stderr), Interactive: err == nil}
}

// maxAnswer is the largest answer that is read; the largest real ones, of 20,000
// destinations, have 6 MiB.
const maxAnswer = 64 << 20

const queueAbout = `Shows and changes what waits for other servers.

usage: fsbus queue [FLAGS]                       a table: destinations by how long it waits
       fsbus queue show DESTINATION [FLAGS]      all about one destination
       fsbus queue flush DESTINATION|-all        try now
       fsbus queue hold DESTINATION              send nothing until it is released
       fsbus queue release DESTINATION
       fsbus queue drop DESTINATION -edus|-all   delete what waits; a copy is kept in a file
       fsbus queue aside                         what was given up since it was refused
       fsbus queue aside -retry ID|DESTINATION|all   try it again
       fsbus queue aside -forget ID              delete it, up to this one

Each of them explains its flags with -h. The columns 1, 5, 15, ... of the table
count the items that have waited for so many minutes at most.
`

// queueCommands are those below "fsbus queue", with their arguments and flags.
var queueCommands = map[string]struct {
	usage, about string
	run          func(*queueCommand, []string) error
}{
	"":        {"[FLAGS]", queueAbout, (*queueCommand).list},
	"show":    {"DESTINATION [FLAGS]", "Shows what waits for a destination, why, and what was set aside.", (*queueCommand).show},
	"flush":   {"DESTINATION|-all [FLAGS]", "Has a destination, or all that are not held, be tried now, whatever their back-off.", (*queueCommand).flush},
	"hold":    {"DESTINATION [FLAGS]", "Has nothing be sent to a destination until it is released. What the homeserver sends is still taken.", (*queueCommand).hold},
	"release": {"DESTINATION [FLAGS]", "Ends a hold.", (*queueCommand).release},
	"drop": {"DESTINATION -edus|-all [FLAGS]", "Deletes what waits for a destination. It is not delivered. A copy is kept in\n" +
		"data_dir/dropped, one line of JSON for each item.", (*queueCommand).drop},
	"aside": {"[FLAGS]", "Lists what was given up since a destination refuses it, or since it cannot be sent.", (*queueCommand).aside},
}

// queueCommand is one run of a command.
type queueCommand struct {
	ctx     context.Context
	term    Terminal
	flags   *flag.FlagSet
	config  *string
	address *string
	asJSON  bool
}

func newQueueCommand(ctx context.Context, term Terminal, name, usage, about string) *queueCommand {
	c := &queueCommand{ctx: ctx, term: term, flags: flag.NewFlagSet(name, flag.ContinueOnError)}
	c.flags.SetOutput(term.Err)
	c.flags.Usage = func() {
		if !strings.Contains(about, "\nusage: ") {
			say(term.Err, "usage: %s %s\n\n", name, usage)
		}
		say(term.Err, "%s\n\n", fixed(strings.TrimSuffix(about, "\n")))
		c.flags.PrintDefaults()
	}
	c.config = c.flags.String("config", DefaultPath, "the configuration `file`, to find the running fsbus")
	c.address = c.flags.String("address", "", "its admin `socket`, \"unix:/path\" (default: as in the configuration)")
	return c
}

// Queue runs "fsbus queue" with what follows it on the command line.
func Queue(ctx context.Context, term Terminal, args []string) error {
	name, sub := "fsbus queue", ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		sub, args = args[0], args[1:]
		name += " " + sub
	}
	if sub == "help" {
		name, sub = "fsbus queue", ""
		if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			sub = args[0]
			name += " " + sub
		}
		args = []string{"-h"}
	}
	command, ok := queueCommands[sub]
	if !ok || name == "fsbus queue " {
		say(term.Err, "fsbus: unknown command %q\n\n%s", name, fixed(queueAbout))
		return ErrUsage
	}
	return command.run(newQueueCommand(ctx, term, name, command.usage, command.about), args)
}

// Explain runs "fsbus explain" with what follows it on the command line.
func Explain(ctx context.Context, term Terminal, args []string) error {
	c := newQueueCommand(ctx, term, "fsbus explain", "DESTINATION [FLAGS]", "Says in words how a destination is doing, and why what waits for it does.")
	name, err := c.destination(args)
	if err != nil {
		return err
	}
	var s showHead
	if err := c.get("/queue/show", url.Values{"destination": {name}, "items": {"none"}}, &s); err != nil {
		return err
	}
	return writeExplain(term.Out, &s, time.Now())
}

// parse reads the command line, on which flags may stand before and behind
// arguments.
func (c *queueCommand) parse(args []string) (rest []string, err error) {
	for {
		if err := c.flags.Parse(args); errors.Is(err, flag.ErrHelp) {
			return nil, err
		} else if err != nil {
			return nil, ErrUsage // the flags have said why
		}
		if c.flags.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, c.flags.Arg(0))
		args = c.flags.Args()[1:]
	}
}

// misused says what is wrong with the command line.
func (c *queueCommand) misused(format string, args ...any) error {
	say(c.term.Err, "%s: %s\n\n", c.flags.Name(), fmt.Sprintf(format, args...))
	c.flags.Usage()
	return ErrUsage
}

// nothing parses a command line without arguments.
func (c *queueCommand) nothing(args []string) error {
	rest, err := c.parse(args)
	if err == nil && len(rest) > 0 {
		return c.misused("unexpected argument %q", rest[0])
	}
	return err
}

// destination parses a command line with one argument.
func (c *queueCommand) destination(args []string) (string, error) {
	rest, err := c.parse(args)
	if err == nil && len(rest) != 1 {
		return "", c.misused("one destination is wanted, not %d", len(rest))
	}
	if err != nil {
		return "", err
	}
	return rest[0], c.checkName(rest[0])
}

// checkName says what is wrong with a destination, before anybody is asked about it.
func (c *queueCommand) checkName(name string) error {
	if _, err := matrix.ParseServerName(name); err != nil {
		return c.misused("%q is not a server's name: %v", name, err)
	}
	return nil
}

func (c *queueCommand) jsonFlag(what string) {
	c.flags.BoolVar(&c.asJSON, "json", false, "print "+what+" as JSON")
}

func (c *queueCommand) list(args []string) error {
	sort := c.flags.String("sort", "total", "the `order`: name, total, oldest or bytes")
	filter := c.flags.String("filter", "", "only names that contain this `text`, or match it if it has a * or ?")
	limit := c.flags.Int("n", 50, "how many destinations to show, the others as one line; 0 is all")
	c.jsonFlag("the table")
	if err := c.nothing(args); err != nil {
		return err
	}
	switch {
	case orders[*sort] == nil:
		return c.misused("-sort is name, total, oldest or bytes, not %q", *sort)
	case *limit < 0:
		return c.misused("-n is %d", *limit)
	}
	if _, err := filterTest(*filter); err != nil {
		return c.misused("-filter %q: %v", *filter, err)
	}
	q := url.Values{"sort": {*sort}, "filter": {*filter}, "limit": {strconv.Itoa(*limit)}}
	var l queueList
	if done, err := c.fetch("/queue", q, &l); done {
		return err
	}
	return writeQueueList(c.term.Out, &l)
}

func (c *queueCommand) show(args []string) error {
	all := c.flags.Bool("all", false, fmt.Sprintf("list all items, not only the first %d", shownItems))
	c.jsonFlag("it")
	name, err := c.destination(args)
	if err != nil {
		return err
	}
	q := url.Values{"destination": {name}}
	if *all {
		q.Set("items", "all")
	}
	var s queueShow
	if done, err := c.fetch("/queue/show", q, &s); done {
		return err
	}
	return writeShow(c.term.Out, &s)
}

func (c *queueCommand) flush(args []string) error {
	all := c.flags.Bool("all", false, "all destinations that are not held")
	rest, err := c.parse(args)
	switch {
	case err != nil:
		return err
	case *all && len(rest) > 0:
		return c.misused("either a destination or -all, not both")
	case !*all && len(rest) != 1:
		return c.misused("one destination or -all is wanted")
	}
	q := url.Values{"all": {"true"}}
	if !*all {
		if err := c.checkName(rest[0]); err != nil {
			return err
		}
		q = url.Values{"destination": rest}
	}
	var f flushed
	if err := c.post("/queue/flush", q, &f); err != nil {
		return err
	}
	switch {
	case *all && f.Held > 0:
		say(c.term.Out, "%s tried as soon as there is a worker, %d held and not tried\n", areIs(f.Destinations, "destination"), f.Held)
	case *all:
		say(c.term.Out, "%s tried as soon as there is a worker\n", areIs(f.Destinations, "destination"))
	case f.Destinations == 0:
		say(c.term.Out, "nothing waits for %s\n", rest[0])
	default:
		say(c.term.Out, "%s is tried as soon as there is a worker\n", rest[0])
	}
	return nil
}

// areIs is count with a verb.
func areIs(n int64, noun string) string {
	if n == 1 {
		return count(n, noun) + " is"
	}
	return count(n, noun) + " are"
}

func (c *queueCommand) hold(args []string) error {
	h, err := c.setHeld("/queue/hold", args)
	if err != nil {
		return err
	}
	again := ""
	if !h.Changed {
		again = " already"
	}
	_, err = say(c.term.Out, "%s is held%s, with %s\n", h.Destination, again, count(h.Items, "item"))
	return err
}

func (c *queueCommand) release(args []string) error {
	h, err := c.setHeld("/queue/release", args)
	if err != nil {
		return err
	}
	if !h.Changed {
		_, err = say(c.term.Out, "%s was not held\n", h.Destination)
		return err
	}
	_, err = say(c.term.Out, "%s is released, with %s\n", h.Destination, count(h.Items, "item"))
	return err
}

func (c *queueCommand) setHeld(path string, args []string) (h heldAnswer, err error) {
	name, err := c.destination(args)
	if err != nil {
		return h, err
	}
	err = c.post(path, url.Values{"destination": {name}}, &h)
	return h, err
}

func (c *queueCommand) drop(args []string) error {
	edus := c.flags.Bool("edus", false, "the EDUs, but for those that are on their way")
	all := c.flags.Bool("all", false, "everything, events as well")
	yes := c.flags.Bool("yes", false, "do not ask")
	nocopy := c.flags.Bool("nocopy", false, "keep no copy, as when the disk is full")
	name, err := c.destination(args)
	switch {
	case err != nil:
		return err
	case *edus == *all:
		return c.misused("either -edus or -all is wanted")
	case !*yes && !c.term.Interactive:
		return c.misused("the input is no terminal, so nobody can be asked: -yes is wanted")
	}
	q := url.Values{"destination": {name}, "what": {"edus"}}
	if *all {
		q.Set("what", "all")
	}
	var p dropPreview
	if err := c.get("/queue/drop", q, &p); err != nil {
		return err
	}
	if p.Items == 0 {
		_, err := say(c.term.Out, "%s: there is nothing to drop\n", p.Destination)
		return err
	}
	say(c.term.Out, "%s: what would be dropped, and not delivered:\n\n", p.Destination)
	t := tabwriter.NewWriter(c.term.Out, 0, 0, 2, ' ', 0)
	writeKinds(t, p.Kinds)
	say(t, "all\t%d\t%s\n\n", p.Items, amount(p.Bytes, "bytes"))
	if err := t.Flush(); err != nil {
		return err
	}
	if !*yes {
		say(c.term.Out, "drop them? [y/N] ")
		line, err := bufio.NewReader(io.LimitReader(c.term.In, 100)).ReadString('\n')
		if err != nil && err != io.EOF {
			return err
		}
		if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
			return errors.New("nothing was dropped")
		}
	}
	if *nocopy {
		q.Set("copy", "no")
	}
	q.Set("through", strconv.FormatInt(p.Through, 10)) // what came since was not shown
	var r dropResult
	if err := c.post("/queue/drop", q, &r); err != nil {
		return err
	}
	if r.Written == 0 {
		_, err := say(c.term.Out, "nothing was left to drop\n")
		return err
	}
	say(c.term.Out, "dropped: %s, %s\n", count(r.Items, "item"), amount(r.Bytes, "bytes"))
	if more := r.Written - r.Items; more > 0 {
		say(c.term.Out, "%s of the copy went on its way meanwhile, or was replaced\n", count(more, "item"))
	}
	if r.File == "" {
		return nil
	}
	_, err = say(c.term.Out, "a copy is in %s\n", r.File)
	return err
}

func (c *queueCommand) aside(args []string) error {
	through := c.flags.Int64("forget", 0, "forget, for good, what is set aside up to this `ID`")
	retry := c.flags.String("retry", "", "try again what is set aside: `ID|DESTINATION|all`")
	c.jsonFlag("the list")
	if err := c.nothing(args); err != nil {
		return err
	}
	switch {
	case *retry != "" && *through != 0:
		return c.misused("-retry and -forget do not go together")
	case *retry != "":
		q := url.Values{"destination": {*retry}}
		if _, err := strconv.ParseInt(*retry, 10, 64); err == nil {
			q = url.Values{"id": {*retry}}
		} else if *retry == "all" {
			q = url.Values{"all": {"true"}}
		}
		var r retried
		if err := c.post("/queue/retry", q, &r); err != nil {
			return err
		}
		_, err := say(c.term.Out, "tried again: %s, %s\n", count(r.Items, "item"), amount(r.Bytes, "bytes"))
		if err == nil && r.Left > 0 {
			_, err = say(c.term.Out, "left aside: %s, as a newer one has gone instead, or it cannot be sent\n", count(r.Left, "item"))
		}
		return err
	case *through < 0:
		return c.misused("-forget is %d", *through)
	case *through > 0:
		var f forgotten
		if err := c.post("/queue/forget", url.Values{"through": {strconv.FormatInt(*through, 10)}}, &f); err != nil {
			return err
		}
		_, err := say(c.term.Out, "forgotten: %s, %s\n", count(f.Items, "item"), amount(f.Bytes, "bytes"))
		return err
	}
	var l asideList
	if done, err := c.fetch("/queue/aside", nil, &l); done {
		return err
	}
	if len(l.Aside) == 0 {
		_, err := say(c.term.Out, "nothing is set aside\n")
		return err
	}
	t := tabwriter.NewWriter(c.term.Out, 0, 0, 2, ' ', 0)
	writeAside(t, l.Aside, true)
	return t.Flush()
}

// fetch is get, but with -json it copies the answer to the output. done is true
// if nothing is left to do.
func (c *queueCommand) fetch(path string, q url.Values, v any) (done bool, err error) {
	if !c.asJSON {
		err := c.get(path, q, v)
		return err != nil, err
	}
	return true, c.ask("GET", path, q, func(body io.Reader) error {
		_, err := io.Copy(c.term.Out, body)
		return err
	})
}

func (c *queueCommand) get(path string, q url.Values, v any) error {
	return c.ask("GET", path, q, func(body io.Reader) error { return json.NewDecoder(body).Decode(v) })
}

func (c *queueCommand) post(path string, q url.Values, v any) error {
	return c.ask("POST", path, q, func(body io.Reader) error { return json.NewDecoder(body).Decode(v) })
}

// ask sends a request to the running bus and has read take the answer.
func (c *queueCommand) ask(method, path string, q url.Values, read func(io.Reader) error) error {
	socket, err := c.socket()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.ctx, 2*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://fsbus"+path+"?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("only root and the user who runs fsbus may connect to %s", socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no fsbus is running that answers at %s: %w", socket, errors.Unwrap(err))
	case err != nil:
		return fmt.Errorf("the fsbus at %s: %w", socket, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	body := io.LimitReader(resp.Body, maxAnswer)
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(body, 4<<10))
		return errors.New(printable(strings.TrimSpace(string(text))))
	}
	if err := read(body); err != nil {
		return fmt.Errorf("the answer from %s: %w", socket, err)
	}
	return nil
}

// socket returns the path of the admin's socket.
func (c *queueCommand) socket() (string, error) {
	if *c.address == "" {
		cfg, err := LoadAddresses(*c.config)
		if err != nil {
			say(c.term.Err, "%s\n", fixed(err.Error())) // of a line for each mistake, which are clean
			return "", ErrUsage
		}
		path := cfg.adminSocket()
		if path == "" {
			say(c.term.Err, "fsbus: %s has status.admin = \"\", so nobody can be asked\n", *c.config)
			return "", ErrUsage
		}
		return path, nil
	}
	path, ok := strings.CutPrefix(*c.address, "unix:")
	if !ok || path == "" {
		return "", c.misused("-address is %q, not \"unix:/path\"", *c.address)
	}
	return path, nil
}

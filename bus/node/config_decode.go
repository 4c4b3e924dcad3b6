package node

import (
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/BurntSushi/toml"

	"fsbus/bus"
	"fsbus/sched"
)

// A field is one key of the configuration and its place in a Config.
type field struct {
	section, name string // section is "" for the keys before the first one
	value         reflect.Value
	tag           reflect.StructTag
}

// key returns the name with its section, "front.listen".
func (f field) key() string {
	if f.section == "" {
		return f.name
	}
	return f.section + "." + f.name
}

// path returns the key as the parser has it.
func (f field) path() toml.Key { return strings.Split(f.key(), ".") }

// fields returns all keys, in the order of the struct, with their values in c.
func (c *Config) fields() []field {
	var out []field
	add := func(section string, v reflect.Value) {
		for i := range v.NumField() {
			sf := v.Type().Field(i)
			if name := sf.Tag.Get("toml"); name != "" && sf.Type.Kind() != reflect.Struct {
				out = append(out, field{section, name, v.Field(i), sf.Tag})
			}
		}
	}
	top := reflect.ValueOf(c).Elem()
	add("", top)
	for i := range top.NumField() {
		if sf := top.Type().Field(i); sf.Type.Kind() == reflect.Struct {
			add(sf.Tag.Get("toml"), top.Field(i))
		}
	}
	return out
}

// sections returns the names of the sections, in the order of the struct.
func sections() []string {
	var out []string
	for _, f := range new(Config).fields() {
		if f.section != "" && !slices.Contains(out, f.section) {
			out = append(out, f.section)
		}
	}
	return out
}

// form says how the value of f is written, with an example.
func (f field) form() string {
	eg := f.tag.Get("eg")
	if eg == "" {
		d := DefaultConfig()
		for _, df := range d.fields() {
			if df.key() == f.key() {
				eg = tomlValue(df.value.Interface())
			}
		}
	}
	eg = ", such as " + f.name + " = " + eg
	switch f.value.Interface().(type) {
	case sched.Bytes:
		return "a whole number with its unit (B, KiB, MiB, GiB) in quotes, " + f.limits() + eg
	case Duration:
		return "a number with its unit (ms, s, m, h) in quotes, " + f.limits() + eg
	case FileMode:
		return "an octal mode in quotes" + eg
	case bus.AckPace:
		return `"auto", "off" or a whole number from 1 to 10000` + eg
	case int:
		return "a whole number, " + f.limits() + eg
	case float64:
		return "a number, " + f.limits() + eg
	case bool:
		return "true or false"
	case []string:
		return "a text in quotes or a list of such" + eg
	case map[string]string:
		return "a table of texts in quotes" + eg
	}
	return "text in quotes" + eg
}

// tomlValue writes v, the value of a field, as it stands in a file.
func tomlValue(v any) string {
	switch v := v.(type) {
	case int, bool:
		return fmt.Sprint(v)
	case float64:
		s := strings.ToLower(strconv.FormatFloat(v, 'f', -1, 64)) // nan and inf are written like that
		if v == math.Trunc(v) && !math.IsInf(v, 0) {
			s += ".0"
		}
		return s
	case []string:
		q := make([]string, len(v))
		for i, s := range v {
			q[i] = strconv.Quote(s)
		}
		return "[" + strings.Join(q, ", ") + "]"
	case map[string]string:
		var q []string
		for k, s := range v {
			q = append(q, strconv.Quote(k)+" = "+strconv.Quote(s))
		}
		slices.Sort(q)
		return "{" + strings.Join(q, ", ") + "}"
	}
	return strconv.Quote(fmt.Sprint(v))
}

// set gives f a value of the document, or says what is wrong with it. The
// types are exact, unlike those of toml.Decode: it would take 5 for five
// nanoseconds, and stop at the first mistake.
func (f field) set(raw any) (problem string) {
	mismatch := "is " + typeName(raw)
	switch p := f.value.Addr().Interface().(type) {
	case *int:
		n, ok := raw.(int64)
		if !ok {
			return mismatch
		}
		if n < math.MinInt32 || n > math.MaxInt32 {
			return fmt.Sprintf("is %d", n)
		}
		*p = int(n)
	case *float64:
		switch n := raw.(type) {
		case float64:
			*p = n
		case int64:
			*p = float64(n)
		default:
			return mismatch
		}
	case *bool:
		b, ok := raw.(bool)
		if !ok {
			return mismatch
		}
		*p = b
	case *[]string:
		if s, ok := raw.(string); ok {
			raw = []any{s}
		}
		list, ok := raw.([]any)
		if !ok {
			return mismatch
		}
		out := make([]string, len(list))
		for i, e := range list {
			if out[i], ok = e.(string); !ok {
				return fmt.Sprintf("has %s as entry %d", typeName(e), i+1)
			}
		}
		*p = out
	case *map[string]string:
		table, ok := raw.(map[string]any)
		if !ok {
			return mismatch
		}
		out := make(map[string]string, len(table))
		for _, k := range slices.Sorted(maps.Keys(table)) {
			if out[k], ok = table[k].(string); !ok {
				return fmt.Sprintf("has %s as the value of %s", typeName(table[k]), quote(k))
			}
		}
		*p = out
	case *bus.AckPace:
		s := fmt.Sprint(raw)
		if n, ok := raw.(int64); ok && n < 1 {
			return "is " + s // as a text it would mean something else
		}
		if p.UnmarshalText([]byte(s)) != nil {
			return "is " + quote(s)
		}
	case encoding.TextUnmarshaler:
		s, ok := raw.(string)
		if !ok {
			return mismatch
		}
		if p.UnmarshalText([]byte(s)) != nil {
			return "is " + quote(s)
		}
	default: // string, Secret, matrix.ServerName
		s, ok := raw.(string)
		if !ok {
			return mismatch
		}
		f.value.SetString(s)
	}
	return ""
}

// typeName says what v, a value of the document, is. It does not show v, which
// may be a secret.
func typeName(v any) string {
	switch v.(type) {
	case string:
		return "a text"
	case int64:
		return "a bare number"
	case float64:
		return "a number with a fraction"
	case bool:
		return "a boolean"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	case []map[string]any:
		return "a list of tables"
	case time.Time:
		return "a date or time"
	}
	return "of an unknown type"
}

// decode fills the configuration from the document, and reports keys and
// sections that do not exist.
func (k *checker) decode() {
	known := make(map[string]bool) // keys and sections; true if there is something inside to look at
	for _, s := range sections() {
		path := toml.Key{s}
		known[path.String()] = true
		if v, ok := k.doc.value(path); ok {
			if _, isTable := v.(map[string]any); !isTable {
				known[path.String()] = false
				k.badAt(path, "is "+typeName(v), fmt.Sprintf("a line [%s] with its keys below", s))
			}
		}
	}
	for _, f := range k.c.fields() {
		known[f.path().String()] = false
		if raw, ok := k.doc.value(f.path()); ok {
			if problem := f.set(raw); problem != "" {
				k.bad(f.key(), problem, f.form())
			}
		}
	}
	reported := make(map[string]bool)
	for _, path := range k.doc.meta.Keys() {
		for n := range path {
			p := path[:n+1]
			inside, ok := known[p.String()]
			if !ok && !reported[p.String()] {
				reported[p.String()] = true
				k.badAt(p, "there is no such key", suggest(p))
			}
			if !ok || !inside {
				break
			}
		}
	}
}

// suggest says what may be meant by a key or a section that does not exist.
func suggest(path toml.Key) string {
	name := path[len(path)-1]
	section := ""
	if len(path) > 1 {
		section = path[0]
	}
	type candidate struct {
		text     string
		distance int
	}
	var near []candidate
	var here []string
	for _, f := range new(Config).fields() {
		switch {
		case f.name == name && f.section == "":
			return name + " before the first [section]"
		case f.name == name:
			return fmt.Sprintf("%s in the section [%s]", name, f.section)
		}
		if f.section == section {
			here = append(here, f.name)
			near = append(near, candidate{f.key(), distance(f.name, name)})
		}
	}
	if section == "" {
		for _, s := range sections() {
			here = append(here, "["+s+"]")
			near = append(near, candidate{"[" + s + "]", distance(s, name)})
		}
	}
	best := slices.MinFunc(near, func(a, b candidate) int { return cmp.Compare(a.distance, b.distance) })
	if best.distance <= 1+len(name)/4 {
		return best.text
	}
	return "one of " + strings.Join(here, ", ")
}

// distance is the edit distance of a and b in bytes, lower case and upper
// case being the same. It takes len(a) times len(b) steps.
func distance(a, b string) int {
	if len(b) > 64 { // longer than any key, and far from all of them
		return len(b)
	}
	a, b = strings.ToLower(a), strings.ToLower(b)
	row := make([]int, len(b)+1) // of the beginning of a so far, to each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// syntaxError says what is wrong with a text that is not TOML.
func syntaxError(name, text string, err error) error {
	pe, ok := errors.AsType[toml.ParseError](err)
	if !ok {
		return &ConfigError{File: name, Problem: clean(err.Error()), Want: "a TOML file"}
	}
	text = stripMark(text)
	e := &ConfigError{
		File:    name,
		Line:    lineAt(text, pe.Position),
		Key:     clean(pe.LastKey),
		Problem: strings.TrimSuffix(clean(pe.Message), "."),
		Want:    `key = value on a line of its own, with texts in quotes, or [section]`,
	}
	lines := strings.Split(text, "\n")
	line := lines[min(e.Line, len(lines))-1]
	// The parser may have forgotten the key already, and kept its section.
	left, _, _ := strings.Cut(line, "=")
	left = strings.TrimSpace(left)
	for _, f := range new(Config).fields() {
		if f.key() == e.Key || f.name == left && f.section == e.Key || f.key() == left && e.Key == "" {
			e.Key, e.Want = f.key(), f.form()
			break
		}
	}
	if strings.Contains(e.Problem, "already") {
		e.Want = "each key and each [section] once"
	}
	if e.Key == "front.secret" || strings.Contains(strings.ToLower(line), "secret") {
		e.Problem = "the value cannot be read" // the parser's message may show a part of it
	}
	return e
}

// quote returns s in quotes, cut to a length that fits a line.
func quote(s string) string { return strconv.Quote(cut(s)) }

// clean returns s on one line, cut to a length that fits it.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, cut(s))
}

func cut(s string) string {
	const limit = 100 // bytes
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "..."
}

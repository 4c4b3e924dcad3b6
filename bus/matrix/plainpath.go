package matrix

import (
	"errors"
	"net/url"
	"strings"
)

// ErrPath: a request target's path could be read as another one by what it passes
// through.
var ErrPath = errors.New("the path has dot segments or backslashes")

// maxDecoding is how many times a path is percent-decoded to see what it may come to.
const maxDecoding = 3

// CheckPath reports whether the path of a request target means the same to everybody: that
// it has no segment "." or "..", however it is spelt (RFC 3986 5.2.4; with percent
// encoding, also twice; with path parameters, as in "..;a"), and no backslash, which some
// take for a slash. The query is not looked at. The error is ErrPath.
func CheckPath(target string) error {
	path, _, _ := strings.Cut(target, "?")
	for range maxDecoding {
		for segment := range strings.SplitSeq(path, "/") {
			name, _, _ := strings.Cut(segment, ";")
			if name == "." || name == ".." || strings.Contains(segment, `\`) {
				return ErrPath
			}
		}
		if !strings.Contains(path, "%") {
			return nil
		}
		decoded, err := url.PathUnescape(path)
		if err != nil || decoded == path {
			return nil // a percent sign that means itself
		}
		path = decoded
	}
	return nil
}

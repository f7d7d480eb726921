package process

import (
	"regexp"
	"strings"
)

// Quote is a word as a POSIX shell reads it: as it is where it needs no quotes.
func Quote(word string) string {
	if bare.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

var bare = regexp.MustCompile(`^[-\w./:=,@%+]+$`)

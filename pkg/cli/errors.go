package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Exit codes, as the README promises them.
const (
	exitDone         = 0 // also after Ctrl-C, when everything was put back
	exitFailed       = 1
	exitUsage        = 2
	exitNotPermitted = 3 // root or RBAC
	exitLeftovers    = 4 // something could not be put back
)

// usageError is a wrong flag or argument.
type usageError struct{ error }

func usage(err error) error {
	if err == nil {
		return nil
	}
	return usageError{err}
}

// explain prints err for a person, on one line, and returns the exit code it
// stands for.
func explain(w io.Writer, err error, t typed) int {
	if err == nil {
		return exitDone
	}
	code, hint := judge(err, t)
	if errors.Is(err, context.Canceled) && code == exitFailed {
		err = errors.New("interrupted")
	}
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	fmt.Fprintf(w, "culvert: error: %s\n", strings.Join(lines, "; "))
	if hint != "" {
		fmt.Fprintf(w, "culvert: hint: %s\n", hint)
	}
	return code
}

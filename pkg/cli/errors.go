package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// explain prints err for a person and returns the exit code it stands for.
func explain(w io.Writer, err error) int {
	code, hint := judge(err)
	if code != exitLeftovers && errors.Is(err, context.Canceled) || err == nil {
		return exitDone
	}
	fmt.Fprintf(w, "culvert: error: %v\n", err)
	if hint != "" {
		fmt.Fprintf(w, "culvert: hint: %s\n", hint)
	}
	return code
}

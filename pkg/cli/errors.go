package cli

import (
	"context"
	"errors"
	"io"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/process"
)

// endedError is of another process that has said itself what there was to say.
type endedError struct{ *process.ExitError }

// explain prints err for a person, on one line, and returns the exit code it
// stands for.
func explain(w io.Writer, err error, t typed) int {
	if err == nil {
		return talk.ExitDone
	}
	if ended, ok := err.(endedError); ok {
		return ended.Code
	}
	code, hint := judge(err, t)
	if errors.Is(err, context.Canceled) && code == talk.ExitFailed {
		err = errors.New("interrupted")
	}
	talk.Explain(w, err, hint)
	return code
}

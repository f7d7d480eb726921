package release

import (
	"log/slog"
	"time"
)

// Options say whose host it is.
type Options struct {
	// App is the only one that may be asked for; "" is any, or that of Policy.
	App string
	// Policy is what the host allows; nil is all that the user may do.
	Policy *Policy
	// Who is the deployer as the host knows him. "" is what he says.
	Who string
	Log *slog.Logger // nil: none

	before  func(what string) // of tests: before each change of the app's folder
	silence time.Duration     // 0 is that of the wire
}

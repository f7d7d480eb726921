package release

import "log/slog"

// Options say whose host it is.
type Options struct {
	// App is the only one that may be asked for; "" is any.
	App string
	// Policy is what the host allows; nil is all that the user may do.
	Policy *Policy
	// Who is the deployer as the host knows him. "" is what he says.
	Who string
	Log *slog.Logger // nil: none
}

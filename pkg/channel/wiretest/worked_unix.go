//go:build unix

package wiretest

import (
	"syscall"
	"time"
)

// worked is how long the processors have worked for this process.
func worked() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

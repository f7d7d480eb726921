//go:build !windows

package deploy

import "io/fs"

// permissions are those that a host gets.
func permissions(mode fs.FileMode) uint32 { return uint32(mode.Perm()) }

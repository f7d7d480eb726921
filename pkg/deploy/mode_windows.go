package deploy

import "io/fs"

// permissions are those that a host gets: Windows has none that would mean anything there.
func permissions(mode fs.FileMode) uint32 {
	if mode.IsDir() {
		return 0o755
	}
	return 0o644
}

//go:build unix && !linux

package privileged

func capable() bool { return false }

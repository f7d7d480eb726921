//go:build !windows

package channel

func posix(err error) error { return err }

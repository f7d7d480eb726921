package resolver

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// clear removes the temporary file that a session left which was killed.
func (p paths) clear() error {
	if err := os.Remove(p.tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// private makes the temporary file, which nobody else may open.
func (p paths) private() (*os.File, error) {
	if err := p.clear(); err != nil {
		return nil, err
	}
	return os.OpenFile(p.tmp, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
}

// create makes the temporary file, with mode and owner of the original.
func (p paths) create() (*os.File, error) {
	to, err := p.private()
	if err != nil {
		return nil, err
	}
	mode, uid, gid := fs.FileMode(0o644), 0, 0
	if st, err := os.Lstat(p.conf); err == nil && st.Mode().IsRegular() {
		mode = st.Mode().Perm()
		uid, gid = int(st.Sys().(*syscall.Stat_t).Uid), int(st.Sys().(*syscall.Stat_t).Gid)
	}
	if err := errors.Join(to.Chown(uid, gid), to.Chmod(mode)); err != nil {
		return nil, errors.Join(err, to.Close(), os.Remove(p.tmp))
	}
	return to, nil
}

// write replaces the file, or writes into it where it is a mount of its own, as
// in containers: that no rename can replace.
func (p paths) write(was fs.FileInfo, old, text []byte) error {
	to, err := p.create()
	if err != nil {
		return err
	}
	_, err = to.Write(text)
	err = errors.Join(err, to.Sync(), to.Close())
	if err == nil {
		err = p.exchange(was, old)
	}
	if removeErr := os.Remove(p.tmp); !errors.Is(removeErr, fs.ErrNotExist) {
		err = errors.Join(err, removeErr)
	}
	if errors.Is(err, syscall.EBUSY) {
		return p.overwrite(text)
	}
	return err
}

// errMeanwhile says that what was to be replaced is not what was read.
var errMeanwhile = errors.New("written meanwhile")

// exchange puts the temporary file in the place of what was read, or of
// nothing. If that is another one by now, somebody may still be writing it: it
// is kept, and not what was read.
func (p paths) exchange(was fs.FileInfo, old []byte) error {
	flags := uint(unix.RENAME_EXCHANGE)
	if was == nil {
		flags = unix.RENAME_NOREPLACE
	}
	err := unix.Renameat2(unix.AT_FDCWD, p.tmp, unix.AT_FDCWD, p.conf, flags)
	switch {
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS): // not on this file system
		return os.Rename(p.tmp, p.conf)
	case errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist):
		return errMeanwhile
	case err != nil || was == nil:
		return err
	}
	is, err := os.Lstat(p.tmp)
	if err != nil {
		return err
	}
	text, _ := os.ReadFile(p.tmp)
	if os.SameFile(was, is) && bytes.Equal(text, old) {
		return nil
	}
	_, err = p.keep(p.tmp, text, p.since(p.tmp))
	return errors.Join(err, errMeanwhile)
}

// overwrite writes before it cuts, so that the mark is there first, and blank lines over
// what is to be cut.
func (p paths) overwrite(text []byte) error {
	to, err := os.OpenFile(p.conf, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	size := len(text)
	if st, err := to.Stat(); err == nil && int(st.Size()) > size {
		text = append(slices.Clip(text), bytes.Repeat([]byte("\n"), int(st.Size())-size)...)
	}
	if _, err = to.WriteAt(text, 0); err == nil { // or what was there is not to be cut
		err = to.Truncate(int64(size))
	}
	return errors.Join(err, to.Close())
}

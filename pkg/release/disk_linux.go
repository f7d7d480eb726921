package release

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// A disk is the app's folder. All that apply changes goes through it: nothing of it can lead
// out of there, whatever links there are.
type disk struct {
	*os.Root
	uid, gid int               // who owns what is made for the app; -1: who runs apply
	before   func(what string) // of tests: each change
}

func (d *disk) changes(what, name string) {
	if d.before != nil {
		d.before(what + " " + name)
	}
}

// mkdir makes a folder if it is not there. made: it is ours, and nobody else's.
func (d *disk) mkdir(name string, mode fs.FileMode) (made bool, err error) {
	if info, err := d.Lstat(name); err == nil && info.IsDir() {
		return false, nil
	}
	d.changes("mkdir", name)
	err = d.Root.Mkdir(name, mode)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	return err == nil, err
}

// mkdirs makes one with those above it, up to base, which is there, and gives those that it has
// made to the app's user.
func (d *disk) mkdirs(base, name string) error {
	if name == "." || name == "" {
		return nil
	}
	if info, err := d.Lstat(path.Join(base, name)); err == nil && info.IsDir() {
		return nil
	}
	if err := d.mkdirs(base, path.Dir(name)); err != nil {
		return err
	}
	if made, err := d.mkdir(path.Join(base, name), 0o755); err != nil || !made {
		return err
	}
	return d.give(path.Join(base, name))
}

// give gives something to the app's user.
func (d *disk) give(name string) error {
	if d.uid < 0 {
		return nil
	}
	return d.Root.Lchown(name, d.uid, d.gid)
}

// chmod is only for what nobody else has been given yet: it follows links.
func (d *disk) chmod(name string, mode uint32) error {
	d.changes("chmod", name)
	return d.Root.Chmod(name, fs.FileMode(mode))
}

func (d *disk) symlink(target, name string) error {
	d.changes("symlink", name)
	return d.Root.Symlink(target, name)
}

func (d *disk) rename(from, to string) error {
	d.changes("rename", to)
	return d.Root.Rename(from, to)
}

// unlink removes a file or an empty folder, if it is there.
func (d *disk) unlink(name string) error {
	if _, err := d.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	d.changes("unlink", name)
	return d.Root.Remove(name)
}

// discard removes a tree that nothing refers to any more, if it is there.
func (d *disk) discard(name string) error {
	if _, err := d.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	d.changes("discard", name)
	return d.Root.RemoveAll(name)
}

// sync waits until a file, or the names in a folder, are on the disk itself.
func (d *disk) sync(name string) error {
	f, err := d.Root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // a file system that cannot
		return err
	}
	return nil
}

// own opens a file of ours. It is one, and no link: Root follows those that stay in it, whatever
// the flags. Whoever could read it could lock it.
func (d *disk) own(name string, flag int) (*os.File, error) {
	before, err := d.Lstat(name)
	if err == nil && !before.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", name)
	}
	f, err := d.Root.OpenFile(name, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || before != nil && !os.SameFile(before, info)) {
		err = fmt.Errorf("%s is not a file", name)
	}
	if err == nil && d.uid >= 0 && owner(info) != os.Geteuid() { // once the app's user could write it
		err = fmt.Errorf("%s belongs to somebody else", name)
	}
	if err == nil && flag&os.O_CREATE != 0 && info.Mode().Perm() != 0o600 {
		err = f.Chmod(0o600) // an older culvert's
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// replace puts a whole file into the place of what is there.
func (d *disk) replace(name string, write func(io.Writer) error) error {
	next := name + ".next"
	if err := d.unlink(next); err != nil {
		return err
	}
	d.changes("write", next)
	f, err := d.Root.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, d.Root.Remove(next))
	}
	if err := d.rename(next, name); err != nil {
		return err
	}
	return d.sync(path.Dir(name))
}

// appendLine adds a line to a file that may end with a torn one.
func (d *disk) appendLine(name string, line []byte) error {
	f, err := d.own(name, os.O_RDWR|os.O_CREATE|os.O_APPEND)
	if err != nil {
		return err
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil && size > 0 {
		last := []byte{'\n'}
		if _, err := f.ReadAt(last, size-1); err != nil {
			return err
		} else if last[0] != '\n' {
			line = append([]byte{'\n'}, line...)
		}
	}
	d.changes("append", name)
	if _, err := f.Write(append(line, '\n')); err != nil {
		return err
	}
	return f.Sync()
}

// moveNew renames a folder to a name that nobody may have.
func (d *disk) moveNew(dir, from, to string) error {
	f, err := d.Root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	d.changes("rename", path.Join(dir, to))
	err = unix.Renameat2(fd, from, fd, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // NFS, say: an empty folder of ours is replaced
		if err := unix.Mkdirat(fd, to, 0o755); err != nil {
			return fmt.Errorf("%s: %w", path.Join(dir, to), err)
		}
		d.changes("replace", path.Join(dir, to))
		err = unix.Renameat(fd, from, fd, to)
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", path.Join(dir, from), to, err)
	}
	return f.Sync()
}

// space is what a user may still write to the disk below a path, in bytes and files; -1: not known.
func space(at string) (bytes, files, block int64) {
	for {
		var st unix.Statfs_t
		switch err := unix.Statfs(at, &st); {
		case err == nil:
			bytes, files, block = int64(st.Bavail)*int64(st.Bsize), int64(st.Ffree), max(int64(st.Bsize), 1)
			if st.Files == 0 { // btrfs counts none
				files = -1
			}
			return bytes, files, block
		case !errors.Is(err, fs.ErrNotExist) || at == "/":
			return -1, -1, 1
		}
		at = path.Dir(at)
	}
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

func (d *disk) truncate(name string, size int64) error {
	d.changes("truncate", name)
	f, err := d.Root.OpenFile(name, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

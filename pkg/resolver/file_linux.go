package resolver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// file is ModeFile: a resolv.conf of our own in place of the original.
type file struct {
	paths
	log     *slog.Logger
	inPlace bool

	id   string   // our mark, once set
	held *os.File // what we wrote, locked for as long as we live
	orig conf
}

// paths are resolv.conf, its directory, and the names we use beside it.
type paths struct{ dir, conf, kept, tmp string }

func pathsIn(cfg Config) paths {
	p := cfg.path("/etc/resolv.conf")
	return paths{dir: filepath.Dir(p), conf: p, kept: p + origSuffix, tmp: p + tmpSuffix}
}

// overNothing ends the mark where there was no file to keep.
const overNothing = " over nothing"

func (f *file) set(ctx context.Context, s Settings) error {
	unlock, err := f.transaction(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if f.id == "" {
		return f.take(s)
	}
	if id, _ := f.owner(); id != f.id {
		return fmt.Errorf("%s was rewritten by somebody else", f.conf)
	}
	return f.write(s)
}

// take keeps the original and puts our file in its place.
func (f *file) take(s Settings) error {
	if id, _ := f.owner(); id != "" {
		return fmt.Errorf("%s (%s): %w", f.conf, id, ErrBusy)
	}
	text, err := os.ReadFile(f.conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f.orig = parseConf(text)
	if len(f.orig.Search) == 0 {
		f.orig.Search = hostDomain()
	}
	id := s.Link + " " + token()
	switch err := f.keep(); {
	case errors.Is(err, fs.ErrNotExist):
		id += overNothing
	case err != nil:
		return fmt.Errorf("keep the original: %w", err)
	}
	f.id = id
	return f.write(s)
}

func token() string {
	var b [4]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// hostDomain is what C libraries search when the file names nothing.
func hostDomain() []string {
	host, _ := os.Hostname()
	if _, domain, found := strings.Cut(host, "."); found && checkName(domain) == nil {
		return []string{domain}
	}
	return nil
}

// keep gives the original a second name. A hard link keeps all of it, and of a
// symlink the link itself; a copy is for what cannot be linked (mounts).
func (f *file) keep() error {
	if err := os.Remove(f.kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := os.Link(f.conf, f.kept)
	if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EROFS) {
		return err
	}
	if target, err := os.Readlink(f.conf); err == nil {
		return os.Symlink(target, f.kept)
	}
	return f.copy()
}

func (f *file) copy() error {
	from, err := os.Open(f.conf)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := f.create()
	if err != nil {
		return err
	}
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		return errors.Join(err, os.Remove(f.tmp))
	}
	return os.Rename(f.tmp, f.kept)
}

// create makes the temporary file, with mode and owner of the original.
func (f *file) create() (*os.File, error) {
	if err := os.Remove(f.tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	to, err := os.OpenFile(f.tmp, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	mode, uid, gid := fs.FileMode(0o644), 0, 0
	if st, err := os.Lstat(f.conf); err == nil && st.Mode().IsRegular() {
		mode = st.Mode().Perm()
		uid, gid = int(st.Sys().(*syscall.Stat_t).Uid), int(st.Sys().(*syscall.Stat_t).Gid)
	}
	if err := errors.Join(to.Chown(uid, gid), to.Chmod(mode)); err != nil {
		return nil, errors.Join(err, to.Close(), os.Remove(f.tmp))
	}
	return to, nil
}

// write makes our file say s.
func (f *file) write(s Settings) error {
	text := f.orig.with(s).render(mark(f.id))
	if !f.inPlace {
		err := f.replace(text)
		if !errors.Is(err, syscall.EBUSY) { // a mount that Detect could not see
			return err
		}
		f.inPlace = true
	}
	return f.overwrite(text)
}

// replace puts a new file there, locked before it can be seen.
func (f *file) replace(text []byte) error {
	to, err := f.create()
	if err != nil {
		return err
	}
	_, err = to.Write(text)
	err = errors.Join(err, to.Sync(), unix.Flock(int(to.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	if err == nil {
		err = os.Rename(f.tmp, f.conf)
	}
	if err != nil {
		return errors.Join(err, to.Close(), os.Remove(f.tmp))
	}
	f.hold(to)
	return nil
}

func (f *file) overwrite(text []byte) error {
	if f.held == nil {
		to, err := os.OpenFile(f.conf, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := unix.Flock(int(to.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return errors.Join(fmt.Errorf("lock %s: %w", f.conf, ErrBusy), to.Close())
		}
		f.hold(to)
	}
	return fill(f.held, text)
}

// fill writes before it cuts, so that the mark is there first.
func fill(to *os.File, text []byte) error {
	if _, err := to.WriteAt(text, 0); err != nil {
		return err
	}
	return to.Truncate(int64(len(text)))
}

func (f *file) hold(next *os.File) {
	if f.held != nil {
		f.held.Close()
	}
	f.held = next
}

// revert puts the original back if the file is still the one we wrote.
func (f *file) revert(ctx context.Context) error {
	if f.id == "" {
		return nil
	}
	unlock, err := f.transaction(ctx)
	if err == nil {
		defer unlock()
	} // without the lock it is still better to put it back than not to
	id, err := f.owner()
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case id == f.id:
		err = f.putBack(id)
	case id == "":
		f.log.Warn("resolv.conf was rewritten by somebody else: left as it is")
		err = f.forget()
	default:
		err = nil // another session's by now, and so is what lies beside it
	}
	if err == nil {
		f.hold(nil)
		f.id = ""
	}
	return err
}

// owner returns the mark in the file, "" if it is not ours.
func (p paths) owner() (string, error) {
	text, err := os.ReadFile(p.conf)
	return markOf(text), err
}

// putBack restores what lies beside our file.
func (p paths) putBack(id string) error {
	if strings.HasSuffix(id, overNothing) {
		return os.Remove(p.conf)
	}
	err := os.Rename(p.kept, p.conf)
	if errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EXDEV) {
		return p.putBackInPlace()
	}
	return err
}

func (p paths) putBackInPlace() error {
	text, err := os.ReadFile(p.kept)
	if err != nil {
		return err
	}
	to, err := os.OpenFile(p.conf, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(fill(to, text), to.Close()); err != nil {
		return err
	}
	return p.forget()
}

func (p paths) forget() error {
	if err := os.Remove(p.kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// leftover returns the file that a dead session left, "" if there is none.
// A living one gives ErrBusy.
func (p paths) leftover() (path, id string, err error) {
	id, err = p.owner()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", "", err
	}
	if id == "" {
		if _, err := os.Lstat(p.kept); err == nil {
			return p.kept, "", nil
		}
		return "", "", nil
	}
	if alive(p.conf) {
		return "", id, fmt.Errorf("%s (%s): %w", p.conf, id, ErrBusy)
	}
	return p.conf, id, nil
}

// alive tells whether the session that wrote path still holds its lock.
func alive(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

// restore undoes what a dead session left.
func (p paths) restore(ctx context.Context) error {
	if path, _, err := p.leftover(); path == "" || err != nil {
		return err // nothing to do needs no lock, nor rights
	}
	unlock, err := p.transaction(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	switch path, id, err := p.leftover(); {
	case err != nil || path == "":
		return err
	case path == p.kept:
		return p.forget()
	default:
		return p.putBack(id)
	}
}

// transaction keeps other sessions out while files are moved. The wait is
// bounded, since any user could hold such a lock.
func (p paths) transaction(ctx context.Context) (unlock func() error, err error) {
	dir, err := os.Open(p.dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return dir.Close, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", p.dir, err), dir.Close())
		}
	}
}

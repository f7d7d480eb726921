package resolver

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// keep has kept be what comes back, now that text is what is read at path: resolv.conf,
// or what was there a moment ago. theirs tells that it is not as we left it.
//
// What is not ours is the original from now on. What is ours, but somebody has written it
// there since, is a copy that was put back, as VPN clients do when they end, or an edit.
func (p paths) keep(path string, text []byte, since bool) (theirs bool, err error) {
	if markOf(text) == "" {
		return true, p.name(path, text)
	}
	have, err := readOriginal(p.kept)
	if err != nil {
		return false, err
	}
	said, found := quotedIn(text)
	if found && since && !have.same(said) {
		have, theirs = said, true
		err = p.put(said)
	}
	link, edited := ledBy(text)
	if !edited || !validLink(link) || err != nil {
		return theirs, err
	}
	entryText, err := os.ReadFile(p.entryPath(link))
	e, ok := parseEntry(entryText)
	if err != nil || !ok { // long gone, and so nobody can say what was ours
		return true, nil
	}
	is, meant := parseConf(have.text), parseConf(have.text).edited(parseWhole(text), e.Settings)
	if bytes.Equal(is.text(), meant.text()) {
		return true, nil
	}
	return true, p.put(origin{text: meant.text()})
}

// since tells whether path was written after what is kept.
func (p paths) since(path string) bool {
	var is, kept unix.Stat_t
	if unix.Lstat(p.kept, &kept) != nil {
		return true
	}
	return unix.Lstat(path, &is) == nil && kept.Ctim.Nano() < is.Ctim.Nano()
}

// elapse waits until what is written has a later time than what is kept: file systems go by
// a clock that ticks some 100 to 1,000 times a second.
func (p paths) elapse() {
	for range 20 {
		var kept unix.Stat_t
		var now unix.Timespec
		if unix.Lstat(p.kept, &kept) != nil || unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now) != nil || now.Nano() > kept.Ctim.Nano() {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// name gives an original a second name, if there is one. A hard link keeps all of it, and
// of a symlink the link itself; a copy is for what cannot be linked (mounts). A symlink
// stays the original where its writer wrote the same beside it, as NetworkManager does.
func (p paths) name(path string, text []byte) error {
	if old, err := os.ReadFile(p.kept); err == nil && len(text) > 0 && bytes.Equal(old, text) {
		return nil
	}
	if err := p.forget(); err != nil {
		return err
	}
	err := os.Link(path, p.kept)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil || errors.Is(err, syscall.EROFS):
		return err
	}
	o, err := readOriginal(path)
	if err != nil {
		return err
	}
	return p.put(o)
}

// put writes an original that is not at hand as a file.
func (p paths) put(o origin) error {
	switch {
	case o.missing():
		return p.forget()
	case o.link != "":
		if err := p.clear(); err != nil {
			return err
		}
		if err := os.Symlink(o.link, p.tmp); err != nil {
			return err
		}
	default:
		to, err := p.create()
		if err != nil {
			return err
		}
		_, err = to.Write(o.text)
		if err := errors.Join(err, to.Close()); err != nil {
			return errors.Join(err, os.Remove(p.tmp))
		}
	}
	return os.Rename(p.tmp, p.kept)
}

// putBack makes the original the file again, if it is ours.
func (p paths) putBack() error {
	text, err := os.ReadFile(p.conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if markOf(text) == "" { // somebody else's, and so the original is of no more use
		return p.forget()
	}
	if _, err := p.keep(p.conf, text, p.since(p.conf)); err != nil {
		return err
	}
	if _, err = os.Lstat(p.kept); errors.Is(err, fs.ErrNotExist) { // there was nothing
		err = os.Rename(p.conf, p.kept)
	} else {
		err = unix.Renameat2(unix.AT_FDCWD, p.kept, unix.AT_FDCWD, p.conf, unix.RENAME_EXCHANGE)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist): // removed meanwhile
		return p.putBack()
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS): // not on this file system
		return os.Rename(p.kept, p.conf)
	case errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EXDEV):
		return p.putBackInPlace()
	case err != nil:
		return err
	}
	text, err = os.ReadFile(p.kept)
	if err == nil && markOf(text) == "" { // written meanwhile
		return os.Rename(p.kept, p.conf)
	}
	return p.forget()
}

func (p paths) putBackInPlace() error {
	o, err := readOriginal(p.kept)
	if err != nil {
		return err
	}
	if err := p.overwrite(o.text); err != nil { // there is no other copy
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

package resolver

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// paths are resolv.conf, its directory, and the names we use beside it.
type paths struct{ dir, conf, kept, tmp string }

func pathsIn(cfg Config) paths {
	p := cfg.path("/etc/resolv.conf")
	if target, err := filepath.EvalSymlinks(p); err == nil && fixed(filepath.Dir(p)) && !fixed(filepath.Dir(target)) {
		p = target // of an image that is read-only but for /run
	}
	return paths{dir: filepath.Dir(p), conf: p, kept: p + origSuffix, tmp: p + tmpSuffix}
}

// fixed tells whether path is mounted read-only, whoever asks.
func fixed(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Flags&unix.ST_RDONLY != 0
}

// An entry is what one session wants, in a file of its own beside resolv.conf.
// The session holds that file locked for as long as it lives, so whoever looks
// can tell, without rights, and who watches the folder hears of its end. The lock is
// one for writing (fcntl), which nobody gets who may only read the file.
type entry struct {
	mode Mode
	Settings
}

// entryPath is where the entry for a link is.
func (p paths) entryPath(link string) string { return p.conf + entrySuffix + link }

func (e entry) render() []byte {
	head := fmt.Sprintf("%s\n# What this session wants of resolv.conf. It goes when culvert ends.\n", mark(e.Link, strconv.Itoa(e.LinkIndex), string(e.mode)))
	return conf{Servers: []netip.Addr{e.Server}, Search: e.Search}.render(head)
}

func parseEntry(text []byte) (e entry, ok bool) {
	id := strings.Fields(markOf(text))
	c := parseConf(text)
	if len(id) != 3 || len(c.Servers) != 1 {
		return e, false
	}
	index, err := strconv.Atoi(id[1])
	e = entry{Mode(id[2]), Settings{Link: id[0], LinkIndex: index, Server: c.Servers[0], Search: c.Search}}
	return e, err == nil
}

// entries are those of sessions that live, the last to come first, and the
// files of those that died. A link's number is never given twice.
func (p paths) entries() (living []entry, dead []string, err error) {
	files, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		path := filepath.Join(p.dir, f.Name())
		if !strings.HasPrefix(path, p.conf+entrySuffix) {
			continue
		}
		text, lives, err := readLocked(path)
		switch e, ok := parseEntry(text); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, nil, err
		case !lives:
			dead = append(dead, path)
		case ok:
			living = append(living, e)
		}
	}
	slices.SortFunc(living, func(a, b entry) int { return b.LinkIndex - a.LinkIndex })
	return living, dead, nil
}

// readLocked tells also whether somebody holds the lock.
func readLocked(path string) (text []byte, locked bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	held := unix.Flock_t{Type: unix.F_RDLCK} // what only one for writing is in the way of
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &held); err != nil {
		return nil, false, fmt.Errorf("look for the lock of %s: %w", path, err)
	}
	text, err = os.ReadFile(path)
	return text, held.Type != unix.F_UNLCK, err
}

// lock holds f until it is closed.
func lock(f *os.File) error {
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
}

// living are the entries that count, for who has no rights and changes nothing.
func (r *Resolver) living() ([]entry, error) {
	living, _, err := pathsIn(r.cfg).entries()
	return living, err
}

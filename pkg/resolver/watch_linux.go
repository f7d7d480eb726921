package resolver

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	writingTime = 100 * time.Millisecond // several changes are followed as one
	followAgain = 5 * time.Second        // after a failure
	puttingBack = time.Second            // what a session takes to follow
)

// Run follows what others do to the files that Set uses: what somebody writes
// is the original from then on, below ours, and a session that died is left out.
func (r *Resolver) Run(ctx context.Context) error {
	return r.listen(ctx, writingTime, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		f, ok := r.place.(*file)
		if !ok {
			return nil
		}
		err := f.follow(ctx)
		if err != nil {
			r.cfg.Log.Warn("the resolver does not follow what others wrote", "error", err)
		}
		return err
	})
}

// Watch tells when the system ceases to ask a server that some process Set in
// files, and when it does so again. It needs no rights.
func (r *Resolver) Watch(ctx context.Context, server netip.Addr, tell func(asked bool)) error {
	asked := true
	return r.listen(ctx, puttingBack, func() error {
		living, err := r.living()
		is := slices.ContainsFunc(living, func(e entry) bool { return e.Server == server })
		if err == nil && is != asked {
			asked = is
			tell(is)
		}
		return err
	})
}

// listen calls changed at the beginning, and a while after each change.
func (r *Resolver) listen(ctx context.Context, settle time.Duration, changed func() error) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch resolv.conf: %w", err)
	}
	w := &watch{paths: pathsIn(r.cfg), file: os.NewFile(uintptr(fd), "inotify"), cares: map[int32]func(string) bool{}, heard: make(chan struct{}, 1)}
	var reading sync.WaitGroup
	reading.Go(w.read)
	defer reading.Wait()
	defer w.file.Close()
	due := time.After(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.heard:
			if due == nil {
				due = time.After(settle)
			}
		case <-due:
			due = nil
			if err := w.aim(); err != nil {
				return err
			}
			if changed() != nil {
				due = time.After(followAgain)
			}
		}
	}
}

// A watch hears of changes, by inotify itself: it tells when a file is closed,
// and so of writers that are done and of sessions that died.
type watch struct {
	paths
	file  *os.File
	heard chan struct{}

	mu    sync.Mutex
	cares map[int32]func(name string) bool // by the number of what is watched
}

const heardOf = unix.IN_CLOSE_WRITE | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE

// aim watches what there is to watch by now: resolv.conf itself, for where it is
// a mount its folder hears nothing, and where an original leads that is a symlink.
func (w *watch) aim() error {
	w.add(w.conf, func(string) bool { return true }) // if it is there, as all but the last
	for _, path := range []string{w.kept, w.conf} {
		if target, err := filepath.EvalSymlinks(path); err == nil && target != path {
			w.add(filepath.Dir(target), func(name string) bool { return name == filepath.Base(target) })
		}
	}
	for _, dir := range resolvconfDirs {
		w.add(dir, func(name string) bool { return name != registered })
	}
	base := filepath.Base(w.conf)
	if err := w.add(w.dir, func(name string) bool { return strings.HasPrefix(name, base) }); err != nil {
		return fmt.Errorf("watch %s: %w", w.dir, err)
	}
	return nil
}

func (w *watch) add(path string, cares func(string) bool) error {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var addErr error
	err = raw.Control(func(fd uintptr) {
		wd, err := unix.InotifyAddWatch(int(fd), path, heardOf)
		if addErr = err; err == nil {
			w.cares[int32(wd)] = cares
		}
	})
	if err != nil {
		return err
	}
	return addErr
}

func (w *watch) read() {
	buf := make([]byte, 16<<10)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			return // closed
		}
		if w.concerns(buf[:n]) {
			select {
			case w.heard <- struct{}{}:
			default:
			}
		}
	}
}

// concerns reads events as inotify(7) lays them out.
func (w *watch) concerns(events []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd, mask := int32(binary.NativeEndian.Uint32(events)), binary.NativeEndian.Uint32(events[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		events = events[end:]
		if mask&unix.IN_IGNORED != 0 {
			delete(w.cares, wd)
		}
		if cares := w.cares[wd]; mask&unix.IN_Q_OVERFLOW != 0 || cares != nil && cares(name) {
			return true
		}
	}
	return false
}

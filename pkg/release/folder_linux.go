package release

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/process"
)

// Names below the app's folder.
const (
	releasesDir  = "releases"
	sharedDir    = "shared"
	currentLink  = "current"
	ownDir       = ".culvert"
	manifestsDir = ownDir + "/manifests"
	logFile      = ownDir + "/log.jsonl"
	lockFile     = ownDir + "/lock"
	runFile      = ownDir + "/run.json"
	versionFile  = ownDir + "/version"
	nextLink     = ownDir + "/next"

	incoming = ".incoming-" // before an id, in releases
	goneMark = ".gone-"
)

const maxLog = 16 << 20 // bytes of it, from the end, that are read

func releaseDir(id string) string   { return path.Join(releasesDir, id) }
func manifestFile(id string) string { return path.Join(manifestsDir, id+".jsonl") }

// open opens the app's folder, if it is there.
func (s *session) open() error {
	root, err := os.OpenRoot(s.hello.To)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", s.hello.To, err)
	}
	s.disk = &disk{Root: root, uid: -1, gid: -1, before: s.opts.before}
	if s.as != nil {
		s.disk.uid, s.disk.gid = int(s.as.uid), int(s.as.gid)
	}
	return nil
}

// release lets all go.
func (s *session) release() {
	if s.lock != nil {
		s.lock.Close()
	}
	if s.disk != nil {
		s.disk.Close()
	}
}

// layOut makes what every app's folder has.
func (s *session) layOut() error {
	if s.disk == nil {
		if s.opts.before != nil {
			s.opts.before("mkdir " + s.hello.To)
		}
		made := os.Mkdir(s.hello.To, 0o755)
		if made != nil && !errors.Is(made, fs.ErrExist) {
			return made
		}
		if made == nil {
			if err := public(s.hello.To); err != nil {
				return err
			}
		}
		if err := s.open(); err != nil {
			return err
		}
		if problem := s.foreign(); problem != nil {
			return &Error{Code: problem.Code, Text: problem.Text, Hint: problem.Hint}
		}
	}
	_, err := s.disk.Lstat(sharedDir)
	fresh := errors.Is(err, fs.ErrNotExist)
	for _, dir := range []string{ownDir, manifestsDir, releasesDir} {
		if _, err := s.lay(dir); err != nil {
			return err
		}
	}
	if s.disk.uid >= 0 { // what the log says is nobody's business who can only run as the app's user
		if info, err := s.disk.Lstat(ownDir); err != nil {
			return err
		} else if info.Mode().Perm() != 0o700 {
			if err := s.disk.chmod(ownDir, 0o700); err != nil {
				return err
			}
		}
	}
	if !fresh {
		return nil // it may be a link to another disk
	}
	if made, err := s.lay(sharedDir); err != nil || !made {
		return err
	}
	return s.disk.give(sharedDir)
}

// public is lay's chmod, for the app's folder itself.
func public(to string) error {
	parent, err := os.OpenRoot(path.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(parent.Chmod(path.Base(to), 0o755), parent.Close())
}

// lay makes one of the app's folders. A umask of 077 would leave releases that no server can read.
func (s *session) lay(dir string) (made bool, err error) {
	if made, err = s.disk.mkdir(dir, 0o755); err != nil || !made {
		return made, err
	}
	return true, s.disk.chmod(dir, 0o755)
}

// foreign tells of what an app's user could swap under the hands of root, who has another one.
func (s *session) foreign() *Problem {
	if s.as == nil || s.disk == nil {
		return nil
	}
	for _, dir := range []string{".", ownDir, manifestsDir, releasesDir} {
		at := filepath.Join(s.hello.To, dir)
		info, err := s.disk.Lstat(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return &Problem{Code: Failed, Text: err.Error()}
		case !info.IsDir():
			return &Problem{Code: Failed, Text: at + " is not a folder"}
		case owner(info) != os.Geteuid() || info.Mode().Perm()&0o022 != 0:
			all := ""
			if dir == ownDir { // what is in it, too: he may have the log open
				all = "-R "
			}
			return &Problem{
				Code: Failed, Text: fmt.Sprintf("%s can be changed by others than root, who deploys to it for %s", at, s.as.name),
				Hint: fmt.Sprintf("chown %[2]sroot: %[1]s && chmod %[2]sgo-w %[1]s", process.Quote(at), all),
			}
		}
	}
	return nil
}

// later refuses a folder whose .culvert a later culvert has laid out in another way. Such a one
// says so in version; ours is the first way, and says nothing.
func (s *session) later() *Problem {
	if s.disk == nil {
		return nil
	}
	f, err := s.disk.own(versionFile, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) { // by which nothing else can be done, either
		return nil
	}
	if err != nil {
		return &Problem{Code: Failed, Text: err.Error()}
	}
	defer f.Close()
	version, _ := io.ReadAll(io.LimitReader(f, 32))
	return &Problem{Code: Failed, Text: fmt.Sprintf("%s was laid out by a later culvert (version %q), which the culvert of this host does not know: deploy with that one", filepath.Join(s.hello.To, ownDir), bytes.TrimSpace(version))}
}

// acquire takes the lock, and repairs what a killed apply has left.
func (s *session) acquire(ctx context.Context, l Lock) (Locked, error) {
	if s.lock != nil {
		return Locked{}, errorf(Misused, "this deploy has the lock already")
	}
	if len(s.refused) > 0 {
		return Locked{}, &Error{Code: Refused, Text: s.refused[0].Text, Hint: s.refused[0].Hint}
	}
	if err := s.layOut(); err != nil {
		return Locked{}, fmt.Errorf("prepare %s: %w", s.hello.To, err)
	}
	f, err := s.disk.own(lockFile, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return Locked{}, err
	}
	if err := s.flock(ctx, f, l.Wait); err != nil {
		f.Close()
		return Locked{}, err
	}
	s.lock = f
	locked, err := s.locked(ctx, l)
	if err != nil {
		s.lock = nil
		f.Close()
	}
	return locked, err
}

// locked is what comes first with the lock.
func (s *session) locked(ctx context.Context, l Lock) (locked Locked, err error) {
	if p := s.later(); p != nil { // who had it before us
		return Locked{}, &Error{Code: p.Code, Text: p.Text}
	}
	text, err := json.Marshal(Holder{Who: s.hello.Who, Release: l.Release, Since: time.Now().UTC(), PID: os.Getpid()})
	if err == nil {
		err = errors.Join(s.lock.Truncate(0), write(s.lock, text))
	}
	if err != nil {
		return Locked{}, fmt.Errorf("write %s: %w", lockFile, err)
	}
	if locked.Repaired, err = s.repair(ctx); err != nil {
		return Locked{}, fmt.Errorf("repair %s: %w", s.hello.To, err)
	}
	locked.Current, _ = s.current()
	return locked, nil
}

func write(f *os.File, text []byte) error {
	_, err := f.WriteAt(text, 0)
	return err
}

// A look at the lock, as of hello, has it for less than this.
const glimpse = 250 * time.Millisecond

// flock waits for the lock as long as the deployer does. It is one of the kernel's, so it is
// gone with its process and the hook that this ran, and there is nothing to unlock.
func (s *session) flock(ctx context.Context, f *os.File, patience time.Duration) error {
	until := time.Now().Add(max(patience, glimpse))
	told := false
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("lock %s: %w", s.hello.To, err)
		}
		holder := readHolder(f)
		if time.Now().After(until) {
			return &Error{Code: Held, Text: fmt.Sprintf("%s is locked by %v", s.hello.To, holder), Holder: holder}
		}
		if !told && patience > 0 {
			told = true
			s.note("", "waiting for "+holder.String())
		}
		select {
		case <-time.After(glimpse / 5):
		case <-s.wire.gone.Done():
			return context.Cause(s.wire.gone)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// holder is who has the lock now.
func (s *session) holder() *Holder {
	if s.disk == nil {
		return nil
	}
	f, err := s.disk.own(lockFile, os.O_RDONLY)
	if err != nil {
		return nil
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil { // the lock goes with f
		return nil
	}
	return readHolder(f)
}

func readHolder(f *os.File) *Holder {
	var h Holder
	text, _ := io.ReadAll(io.NewSectionReader(f, 0, 4096))
	_ = json.Unmarshal(text, &h) // who has only just got it has not written
	return &h
}

// linked is where current leads, "" for nowhere.
func (s *session) linked() string {
	if s.disk == nil {
		return ""
	}
	to, err := s.disk.Readlink(currentLink)
	if err != nil {
		return ""
	}
	return to
}

// idOf is the release that a link leads to, "" if it is none of ours.
func (s *session) idOf(link string) string {
	if rest, ok := strings.CutPrefix(link, s.hello.To+"/"); ok {
		link = rest
	}
	dir, id := path.Split(path.Clean(link))
	if path.Clean(dir) != releasesDir || CheckID(id) != nil {
		return ""
	}
	return id
}

// current is the release; link is where current leads, whether or not that is one.
func (s *session) current() (id, link string) {
	link = s.linked()
	return s.idOf(link), link
}

// records are those of the log.
func (s *session) records() ([]record, error) {
	if s.disk == nil {
		return nil, nil
	}
	f, err := s.disk.own(logFile, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err != nil {
		return nil, err
	} else if _, err := f.Seek(max(0, size-maxLog), io.SeekStart); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxLog))
	return parseLog(text), err
}

// record adds lines to the log, and returns when they are on the disk.
func (s *session) record(all ...record) error {
	var lines [][]byte
	for _, r := range all {
		r.Time, r.Who = time.Now().UTC(), s.hello.Who
		r.Commit, r.Phase, r.Error = shorten(r.Commit), shorten(r.Phase), shorten(r.Error)
		if text, _ := json.Marshal(r.Up); len(text) > maxText {
			r.Up = nil
		}
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return nil
	}
	if err := s.disk.appendLine(logFile, bytes.Join(lines, []byte{'\n'})); err != nil {
		return fmt.Errorf("write %s: %w", logFile, err)
	}
	return nil
}

// here are the releases that are in the folder, the oldest first: those of the log in its order,
// after what was there before.
func (s *session) here() ([]Release, error) {
	if s.disk == nil {
		return nil, nil
	}
	log, err := s.records()
	if err != nil {
		return nil, err
	}
	names, err := s.inReleases()
	if err != nil {
		return nil, err
	}
	current, _ := s.current()
	var all []Release
	var logged []Release
	known := map[string]bool{}
	for _, r := range history(log) {
		if _, is := slices.BinarySearch(names, r.ID); is {
			logged, known[r.ID] = append(logged, r), true
		}
	}
	for _, name := range names {
		if CheckID(name) == nil && !known[name] {
			all = append(all, Release{ID: name, State: StateUnknown})
		}
	}
	all = append(all, logged...)
	for _, name := range names {
		if id, ok := strings.CutPrefix(name, incoming); ok && CheckID(id) == nil {
			r := Release{ID: id, State: StateIncoming}
			if m, err := s.readManifest(id); err == nil {
				r.Commit, r.Tree, r.Who, r.When = m.Commit, m.Tree, m.Who, m.When
			}
			all = append(all, r)
		}
	}
	for i := range all {
		all[i].Current = all[i].ID == current && all[i].State != StateIncoming
	}
	return all, nil
}

// inReleases are the names of folders.
func (s *session) inReleases() ([]string, error) {
	f, err := s.disk.Open(releasesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, err
}

func (s *session) list() (listed, error) {
	all, err := s.here()
	slices.Reverse(all)
	return listed{fit(all)}, err
}

// maxText is how much of a text of others' goes into the log and into answers, in bytes.
const maxText = 4 << 10

// shorten: a server may answer with megabytes, and what is in the log is in each answer from then on.
func shorten(text string) string {
	if len(text) <= maxText {
		return text
	}
	return strings.ToValidUTF8(text[:maxText], "") + " …"
}

// fit leaves the oldest out of what would be no message any more; all are the newest first.
func fit(all []Release) []Release {
	weight := 0
	return slices.DeleteFunc(all, func(r Release) bool {
		text, err := json.Marshal(r)
		if weight += len(text) + 1; err == nil && weight > maxMessage/2 {
			return !r.Current
		}
		return err != nil
	})
}

// prune removes old releases, and what was never finished.
func (s *session) prune(spare string) ([]string, error) {
	all, err := s.here()
	if err != nil {
		return nil, err
	}
	keep := s.hello.Config.Keep
	if keep == 0 {
		keep = DefaultKeep
	}
	gone := prunable(all, keep, spare)
	var errs []error
	var pruned []record
	for _, id := range gone {
		if err := s.disk.rename(releaseDir(id), releaseDir(goneMark+id)); err != nil { // half a release is none
			errs = append(errs, err)
			continue
		}
		errs = append(errs, s.disk.unlink(manifestFile(id)))
		pruned = append(pruned, record{Event: eventPruned, Release: id})
	}
	return gone, errors.Join(append(errs, s.record(pruned...), s.sweep())...)
}

// sweep removes what nobody goes on with.
func (s *session) sweep() error {
	names, err := s.inReleases()
	errs := []error{err}
	for _, name := range names {
		if id, ok := strings.CutPrefix(name, incoming); ok {
			errs = append(errs, s.disk.discard(releaseDir(name)), s.disk.unlink(manifestFile(id)))
		} else if strings.HasPrefix(name, goneMark) {
			errs = append(errs, s.disk.discard(releaseDir(name)))
		}
	}
	return errors.Join(errs...)
}

// realReleases is releases/ as the kernel names it.
func (s *session) realReleases() string {
	dir := filepath.Join(s.hello.To, releasesDir)
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		return real
	}
	return dir
}

func (s *session) note(phase, text string) {
	s.wire.tell(Event{Kind: "note", Phase: phase, Text: shorten(text)})
}
